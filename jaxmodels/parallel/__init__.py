"""Where arrays live: the mesh, the table of logical axes, and the processes that share them."""
