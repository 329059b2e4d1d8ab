"""Training: the loop, one optimizer step, the optimizer, evaluation, early stopping, checkpoint saves."""
