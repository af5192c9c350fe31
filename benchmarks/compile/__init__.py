"""What torch.compile costs and saves in training on a CPU: see README.md."""
