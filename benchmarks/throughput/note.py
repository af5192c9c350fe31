"""The notes a side leaves in its folder: CPU seconds and tokens of training, and the adapter that came out."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def cpu_seconds() -> float:
    """User and system time of this process so far, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Seen:
    """Tokens of one stretch of training, to be set inside `training`."""

    tokens = 0


@contextmanager
def training(out: Path) -> Iterator[Seen]:
    """Note the CPU seconds (this process, all its threads) and tokens of a stretch of training, in a file of its own.

    One file per process, so that clients in many processes can write at once.
    """
    seen = Seen()
    before = cpu_seconds()
    yield seen
    line = {"cpu_seconds": cpu_seconds() - before, "tokens": int(seen.tokens)}
    with open(out / f"training-{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def finish(out: Path, adapter: Mapping[str, torch.Tensor], **more: Any) -> None:
    """Write the adapter that came out (PEFT's names), as any run would, and what else there is to tell."""
    save_file({name: leaf.detach().contiguous() for name, leaf in adapter.items()}, out / "adapter.safetensors")
    (out / "more.json").write_text(json.dumps({"dtype": "float32", "clients_per_pass": 1, **more}))
