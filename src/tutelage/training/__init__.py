"""Code shared by all training: losses, batches by step, optimizer, moving average of the weights, checkpoints, the loop."""
