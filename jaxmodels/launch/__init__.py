"""Launch: jobs of several processes, on this machine or a cluster, that are supervised and restarted."""
