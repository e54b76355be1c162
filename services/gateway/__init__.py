"""The gateway: the HTTP interface that the `tinker` SDK speaks, for runs, samples and checkpoints of the mesh."""
