"""What people and the autoscaler read of the mesh's metrics: Prometheus's rules, and Grafana's dashboards as code.

`python -m dashboards.build` writes `json/`, which is committed. Nothing here is imported by a service.
"""
