"""Launch a run as several processes; `python -m launch --help` lists the places."""
