"""Building a run, the training loop, EMA, checkpoints and metrics."""
