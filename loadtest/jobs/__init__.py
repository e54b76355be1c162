"""`python -m loadtest.jobs`: one job, then several; what ran where, drawn from Prometheus's data."""
