"""Every public method of the Tinker SDK, called against a real mesh and judged by what its answers mean."""
