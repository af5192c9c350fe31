"""Weights & Biases: online where a key is set up or WANDB_MODE says so, else offline files in the run folder.

It never asks for a key: without one, what was logged lies under RUN/trackers/wandb and `wandb sync` sends it later.
"""

from __future__ import annotations

import hashlib
import netrc
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

from fedloom.study.trackers import Tracked, Tracker


def has_key() -> bool:
    """Whether wandb would find a key without asking: in the environment, or in the user's netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_tracker(tracked: Tracked) -> Tracker:
    """Open the arm's run; after an interruption the same one goes on."""
    import wandb

    mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    place = tracked.folder / "trackers"
    place.mkdir(exist_ok=True)
    name = f"{tracked.group}/{tracked.arm}"
    # The same run folder is the same wandb run, on whatever day it is resumed.
    made = hashlib.blake2b(f"{tracked.folder.resolve()}|{tracked.arm}".encode(), digest_size=6).hexdigest()
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or tracked.project,
        name=name,
        group=tracked.group,
        job_type=tracked.arm,
        id=tracked.id or made,
        resume="allow",
        config=dict(tracked.config),
        dir=str(place),
        mode=mode,
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
    )

    def log(round: int, metrics: Mapping[str, float]) -> None:
        run.log(dict(metrics), step=round)

    def end(figures: Mapping[str, float], finished: bool) -> None:
        run.summary.update(dict(figures))
        run.finish(exit_code=0 if finished else 1)

    where = f"offline; send it with: wandb sync {place}/wandb/offline-run-*" if mode == "offline" else str(run.url)
    return Tracker(str(run.id), log, end, where)
