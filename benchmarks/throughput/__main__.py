"""`python -m benchmarks.throughput`: see run.py."""

from benchmarks.throughput.run import main

if __name__ == "__main__":
    main()
