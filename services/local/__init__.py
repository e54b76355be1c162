"""The `openrl` command, and the supervisor that runs the whole mesh on one machine."""
