"""A Python environment of its own for every peer, made once: peers/NAME/requirements.txt says what is in it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

PEERS = Path(__file__).parent / "peers"


def known() -> list[str]:
    return sorted(path.parent.name for path in PEERS.glob("*/requirements.txt"))


def ready(peer: str, cache: Path) -> Path | str:
    """The interpreter of a peer's environment under `cache`, which is made if need be; or why there is none.

    The requirements name every package with its version, so nothing is resolved and nothing else comes in.
    """
    requirements = PEERS / peer / "requirements.txt"
    folder = (cache / peer).resolve()
    python, stamp = folder / "bin" / "python", folder / "made-from"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of {peer} in {folder}: this can take minutes", file=sys.stderr, flush=True)
    venv.create(folder, clear=True, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(requirements)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip()[-1000:] or f"pip ended with {done.returncode}"
    stamp.write_text(wanted)
    return python
