"""Taking a run to where it shall run; `python -m launch --help` lists the places."""
