"""Remake requirements.lock from pyproject.toml with uv, and refuse a lock that would not install everywhere.

Run by `make lock`. The lock names versions only: no index address, no hash of one machine's wheel, no CUDA package.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Every package fedloom is developed and tested with, for Python 3.11 and later on Linux and macOS.
# Made by `make lock` from pyproject.toml; do not edit. `make install` installs it.
"""
# Triton itself is no gigabytes, and its interpreter needs no GPU; there is none for macOS.
CUDA_PACKAGE = re.compile(r"^(nvidia|cuda|pytorch-triton|triton(?!==\S+ ; sys_platform == 'linux'$))", re.IGNORECASE)
PIN = re.compile(r"^[a-z0-9][a-z0-9.-]*==[a-z0-9.!]+( ; .+)?$")


def objections(lock: str) -> list[str]:
    """Say what in a lock's text would pull CUDA packages or tie it to one machine."""
    found = []
    for number, line in enumerate(lock.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if CUDA_PACKAGE.match(line):
            found.append(f"line {number}: {line}: a CUDA package")
        elif not PIN.match(line):
            found.append(f"line {number}: {line}: not a plain name==version line")
    return found


def main() -> int:
    """Compile, check and write the lock; versions stay where they can unless --upgrade is given."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / LOCK.name
        if LOCK.exists() and "--upgrade" not in sys.argv[1:]:
            shutil.copy(LOCK, made)  # uv keeps what an existing output file pins
        command = ["uv", "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11", "--all-extras"]
        command += ["--no-header", "--no-annotate", "--quiet", "--output-file", str(made)]
        subprocess.run(command, cwd=ROOT, check=True)
        lock = HEADER + made.read_text(encoding="utf-8")
    wrong = objections(lock)
    if wrong:
        print("requirements.lock left as it was:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    LOCK.write_text(lock, encoding="utf-8")
    print(f"requirements.lock: {sum(1 for line in lock.splitlines() if '==' in line)} pins")
    return 0


if __name__ == "__main__":
    sys.exit(main())
