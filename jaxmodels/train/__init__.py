"""The loop: state, optimizer, step, evaluation, checkpoints and metrics of a run."""
