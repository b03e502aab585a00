"""What moves the bound: log weights, and the one training loop."""
