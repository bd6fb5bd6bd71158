"""What all training shares: losses, batches by step, optimizer, average of the weights, checkpoints, the loop."""
