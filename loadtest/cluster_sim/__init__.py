"""A cluster in simulated time, with the autoscaler's real policy in the loop: `python -m loadtest.cluster_sim`."""
