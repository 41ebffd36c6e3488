"""What the project's speed is: each benchmark is a module here with `Options`, `run(options)` and one line of help."""
