"""Notes and quantities for checkpoints."""
