"""One training step: batch, loss, gradient, update."""
