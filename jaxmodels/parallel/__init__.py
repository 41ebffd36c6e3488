"""Parallelism: the mesh, the table of logical axes, and the processes that share a run."""
