"""Launch: one job, on this machine or a cluster, started, watched and started again."""
