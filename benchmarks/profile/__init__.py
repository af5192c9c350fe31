"""Where the time of training goes, as a flame graph: see README.md."""
