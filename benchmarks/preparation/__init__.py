"""Memory and time of preparing data by size of file: see README.md."""
