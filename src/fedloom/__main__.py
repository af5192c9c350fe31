"""`python -m fedloom` is the `fedloom` program."""

import sys

from fedloom.cli import main

if __name__ == "__main__":
    sys.exit(main())
