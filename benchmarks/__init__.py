"""Benchmarks of the project: each is a module here with `Options`, `run(options)` and one line of help."""
