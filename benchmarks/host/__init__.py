"""What threads and allocators are worth in a training step on a CPU: see README.md."""
