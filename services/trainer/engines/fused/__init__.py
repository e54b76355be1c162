"""The layers of a model as a few large operations: fused projections, grouped adapters, one kernel of attention."""
