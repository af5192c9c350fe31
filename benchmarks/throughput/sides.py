"""The sides that are compared, what each is called and how it is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Side:
    key: str
    label: str
    program: str  # a module of benchmarks.throughput, or a peer's name
    more: tuple[str, ...] = ()
    peer: bool = False
    # A peer that starts a process for every client's task is left out where clients are many: it shows only start-up
    max_clients: int | None = None

    def command(self, python: Path | None, folder: Path, out: Path, clients: int) -> list[str]:
        if self.peer:
            program = Path(__file__).parent / "peers" / self.program / "program.py"
            return [str(python), str(program), str(folder), str(out), str(clients)]
        return [sys.executable, "-m", f"benchmarks.throughput.{self.program}", str(folder), str(out), *self.more]


SIDES = {
    side.key: side
    for side in (
        Side("a", "bare PyTorch + PEFT, float32", "bare"),
        Side("b", "fedloom, same settings, one client at a time", "woven"),
        Side("c", "fedloom's defaults", "woven", ("--defaults",)),
        Side("c1", "fedloom's defaults, one client at a time", "woven", ("--defaults", "--one")),
        Side("d", "Flower's simulation engine, FlowerTune pattern", "flower", peer=True),
        Side("e", "NVFlare's simulator", "nvflare", peer=True, max_clients=10),
        Side("f", "pfl-research's simulation", "pfl", peer=True),
        Side("g", "Hugging Face Trainer + PEFT", "hf_trainer"),
    )
}
PEERS = {side.program: side.key for side in SIDES.values() if side.peer}


def environment(side: Side, out: Path) -> dict[str, str]:
    """One thread, nothing from a hub, bytecode kept, and no peer reports home or asks for updates."""
    own = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    if side.peer:
        own |= {
            "FLWR_HOME": str(out / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
    elif inherited := os.environ.get("PYTHONPATH"):
        own["PYTHONPATH"] = f"{ROOT}{os.pathsep}{inherited}"
    others = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**others, **own}
