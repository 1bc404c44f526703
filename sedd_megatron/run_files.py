"""What a run writes for those who watch it: names of its files, and of what stands in them."""

# Beside its checkpoints, or into --log-dir.
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
# Records that came a second time after a restart.
LOST = "metrics-lost.jsonl"
# When a start began, in the record of its first step.
STARTED = "started"
# Equal bands of the time t, from 0 to 1, each with a loss of its own.
NUM_BANDS = 8
# Of the network, each with a gradient norm of its own.
NETWORK_PARTS = ("embedding", "sigma_embedding", "modulation", "norm", "attention", "mlp", "head")
