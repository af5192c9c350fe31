"""Where published files are looked for: one folder for all, and an error that says what to fetch and where to put it.

The folder is `$FEDLOOM_DATA`, by default `fedloom/data` in the user's cache. Nothing is downloaded into it unasked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedloom.errors import UserError

__all__ = ["data_home", "locate", "user_cache"]


def data_home() -> Path:
    """The folder that holds published data sets and benchmarks."""
    named = os.environ.get("FEDLOOM_DATA")
    if named:
        return Path(named).expanduser()
    return user_cache() / "data"


def user_cache() -> Path:
    """The folder for what can be made again: `fedloom` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fedloom"


def locate(name: str, places: Sequence[str], given: Path | str | None, *, source: str, setting: str) -> Path:
    """The file or folder of a published set.

    Args:
        name: of the set, for the message.
        places: where it may lie below `data_home()`, the usual one first ("gsm8k/test.jsonl").
        given: what the user named, which is then the only place looked at.
        source: where it is published, as a sentence part ("github.com/openai/grade-school-math, MIT").
        setting: how the user names another place ("data.path=FILE").

    Raises:
        UserError: it is not there; the message says what to fetch, from where, and where to put it.
    """
    if given is not None:
        path = Path(given).expanduser()
        if path.exists():
            return path
        raise UserError(f"{name}: there is no {path}", f"it is published at {source}", code="data.missing")
    home = data_home()
    for place in places:
        if (home / place).exists():
            return home / place
    raise UserError(
        f"{name}: its files are not on this machine (looked for {', '.join(str(home / place) for place in places)})",
        f"fetch it from {source} and put it at {home / places[0]}, or say {setting}, or set FEDLOOM_DATA",
        code="data.missing",
    )
