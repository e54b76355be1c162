"""How good the autoscaler's packing is, against the exact optimum, and how fast: `python -m loadtest.packing`."""
