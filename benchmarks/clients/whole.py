"""A whole `fedloom run` (or plan, or preview) of very many clients, in this process: CPU seconds and memory by part.

python -m benchmarks.clients.whole run FILE fedavg|fedsa_lora COHORT ROUNDS
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")


class Parts:
    """CPU seconds of each part, those inside another taken out of it, and the most memory that was seen in it.

    Memory is the process's own: pages of mapped files, which the system may take back, are not in it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.highest: dict[str, int] = {}
        self.resident = 0  # at most, with those pages
        self.inside = ["start"]
        self.since = 0.0  # of the process, so that imports count

    def charge(self) -> None:
        now = time.process_time()
        self.seconds[self.inside[-1]] = self.seconds.get(self.inside[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.charge()
        self.inside.append(name)
        try:
            yield
        finally:
            self.charge()
            self.inside.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def run(*arguments: Any, **settings: Any) -> Any:
            with self.part(part):
                return real(*arguments, **settings)

        setattr(owner, name, run)

    def look(self) -> None:
        """50 times a second, in a thread: the kernel's own high-water mark is what the run itself sets back."""
        while True:
            resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3])
            name = self.inside[-1]
            self.highest[name] = max(self.highest.get(name, 0), (resident - shared) * PAGE)
            self.resident = max(self.resident, resident * PAGE)
            time.sleep(0.02)


def recipe_of(file: str, method: str, cohort: int, rounds: int, out: Path) -> dict[str, Any]:
    return {
        "model": "builtin",
        "data": {"path": file, "val_set_size": 1000, "test_set_size": 1000, "max_length": 64},
        "split": {"kind": "by_column", "column": "user"},
        "method": method,
        "rounds": rounds,
        "clients_per_round": cohort,
        "local_steps": 1,
        "client": {"per_device_train_batch_size": 2, "learning_rate": 2e-3},
        "arms": ["federated"],
        "runtime": {"threads": 1, **({"personal_state": "disk"} if method == "fedsa_lora" else {})},
        "output_dir": str(out),
    }


def main(command: str, file: str, method: str, cohort: int, rounds: int) -> None:
    parts = Parts()
    threading.Thread(target=parts.look, daemon=True).start()
    from fedloom import cli
    from fedloom import rounds as loop
    from fedloom.data import federation
    from fedloom.study import plan, run, session

    for owner, name, part in (
        (session, "load_base", "load the base"),
        (federation, "prepare", "split"),
        (session, "prepare", "split"),
        (federation, "sources_of", "read"),
        (federation, "tokenised", "tokenise"),
        (federation, "_report", "describe the data"),
        (plan, "plan", "plan"),
        (run, "plan", "plan"),
        (session.Session, "data_digest", "digest of the data"),
        (loop, "run_round", "train"),
        (run._Runner, "_validate", "validate"),
        (run._Runner, "_test", "test"),
        (run._Runner, "_save", "checkpoints"),
        (run, "write_report", "report.html"),
        (run._Runner, "_finish", "result.json"),
    ):
        parts.wrap(owner, name, part)
    with tempfile.TemporaryDirectory(prefix="fedloom-clients-") as place:
        folder = Path(place)
        (folder / "recipe.yaml").write_text(json.dumps(recipe_of(file, method, cohort, rounds, folder / "run")))
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main([command, str(folder / "recipe.yaml"), "--format", "json"])
        if code:
            sys.exit(code)
        parts.charge()
        found = {
            "cpu_seconds": time.process_time(),
            "peak_bytes": parts.resident,
            "own_peak_bytes": max(parts.highest.values()),
            "parts": {name: [seconds, parts.highest.get(name, 0)] for name, seconds in parts.seconds.items()},
        }
        if command == "run":
            result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
            files = [one for one in (folder / "run").rglob("*") if one.is_file() and not one.is_symlink()]
            found |= {
                "train_cpu_seconds_per_client": parts.seconds["train"] / (cohort * rounds),
                "files": {one.name: one.stat().st_size for one in files},
                "loss": result["arms"]["federated"]["loss"],
            }
    print(json.dumps(found))


if __name__ == "__main__":
    command, file, method, cohort, rounds = sys.argv[1:]
    main(command, file, method, int(cohort), int(rounds))
