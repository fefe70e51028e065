"""The Ray Train side: driver, worker loop, DeepSpeed, checkpoints, metrics."""
