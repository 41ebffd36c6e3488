"""Runs in use: artefacts that need none of this package, models over HTTP, and whether data are what they were."""
