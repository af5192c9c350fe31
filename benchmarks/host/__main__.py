"""`python -m benchmarks.host`: see run.py."""

from benchmarks.host.run import main

if __name__ == "__main__":
    main()
