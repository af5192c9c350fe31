"""What is kept, and what is made again: see README.md."""
