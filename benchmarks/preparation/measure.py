"""One preparation in a process of its own: prints a line of JSON.

python -m benchmarks.preparation.measure FILE SPLIT CLIENTS
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from fedloom.data import federation
from fedloom.data.federation import prepare
from fedloom.study.blocks import DataRecipe, SplitRecipe


def memory(name: str) -> int:
    """Bytes that /proc says under this name (VmRSS, VmHWM: the most so far, RssAnon)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith(f"{name}:")).split()[1]) * 1024


def make_tokenizer() -> Any:
    """A byte-level one with 8,192 tokens, trained on the text that the words are from."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(topics.values(), vocab_size=8192, special_tokens=["</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="</s>")


def timed(module: Any, name: str, seconds: dict[str, float]) -> None:
    """Add up the wall seconds that a function of a module takes."""
    real = getattr(module, name)

    def run(*arguments: Any, **settings: Any) -> Any:
        begin = time.perf_counter()
        try:
            return real(*arguments, **settings)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin

    setattr(module, name, run)


def main(path: str, kind: str, clients: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer("warm")
    seconds: dict[str, float] = {}
    for module, name in ((federation, "sources_of"), (federation, "tokenised")):
        timed(module, name, seconds)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most so far begins anew
    begin, cpu = time.perf_counter(), time.process_time()
    split = SplitRecipe.model_validate({"kind": kind, "clients": clients})
    made = prepare(DataRecipe(path=path, max_length=1024), split, tokenizer, 42)
    wall, used = time.perf_counter() - begin, time.process_time() - cpu
    found = {
        "bytes": Path(path).stat().st_size,
        "rows": made.report.rows_read,
        "tokens": sum(made.report.tokens[part] for part in ("train", "validation", "test")),
        "seconds": wall,
        "cpu_seconds": used,
        "parts": seconds,
        "before_bytes": before,
        "peak_bytes": memory("VmHWM"),
        "after_bytes": memory("VmRSS"),
        "after_anonymous_bytes": memory("RssAnon"),
        "digest": made.digest(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
