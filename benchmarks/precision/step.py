"""One precision in a process of its own: memory that is held, as one line of JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from fedloom.ops.host import tune_host

tune_host(1)

import torch  # noqa: E402

from fedloom.adapters import lora  # noqa: E402
from fedloom.clients import sgd_client  # noqa: E402
from fedloom.models.load import load_base  # noqa: E402
from fedloom.models.quantised import stored_bytes  # noqa: E402
from fedloom.optimizers import adamw  # noqa: E402
from fedloom.types import Site  # noqa: E402

TOKENS, STEPS = 64, 2


def held() -> int:
    """Bytes of this process's own memory; pages of mapped weight files are the system's."""
    text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    found = re.search(r"RssAnon:\s+(\d+)", text)
    return int(found.group(1)) * 1024 if found else 0


def main() -> None:
    folder, kind = sys.argv[1:]
    before = held()
    base = load_base(folder, dtype="float32", quantization=kind)
    loaded = held() - before
    adapter = lora(base.model, rank=8, targets="all-linear")
    update = sgd_client(adamw(1e-4))
    ids = torch.randint(4, 1000, (1, 1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    work = update.init({name: leaf[None] for name, leaf in adapter.init(0).items()}, {}, [Site(0, 0, "a")])
    for _ in range(STEPS):
        work = update.step(adapter.loss, work, batch)
    told = {"kind": kind, "stored": stored_bytes(base.model), "loaded": loaded, "after_steps": held() - before}
    print(json.dumps({**told, "parameters": base.num_parameters}))


if __name__ == "__main__":
    main()
