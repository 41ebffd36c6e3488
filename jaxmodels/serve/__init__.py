"""Runs in use: artefacts that need none of this package, and models over HTTP."""
