"""Run every side in a process tree of its own, one after the other, and write results.json and RESULTS.md.

A repetition runs the sides back to back, and ratios are taken inside a repetition, so that a machine that others use as
well spoils them little; the median over repetitions is what counts. Every run is saved as it comes: a benchmark broken
off goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.throughput import environments
from benchmarks.throughput.report import report
from benchmarks.throughput.sides import PEERS, ROOT, SIDES, Side, environment
from benchmarks.throughput.work import Work, held_out_loss

HERE = Path(__file__).parent
LIMIT_SECONDS = 900.0
# The same rows per client at batch 1 as at batch 4.
SETTINGS = (
    Work(clients=3, batch=4, steps=20, rounds=3, held_out=48),
    Work(clients=3, batch=4, steps=6, rounds=1, model="100M", held_out=12),
    Work(clients=3, batch=1, steps=80, rounds=3, held_out=48),
    Work(clients=3, batch=1, steps=24, rounds=1, model="100M", held_out=12),
    Work(clients=30, batch=4, steps=4, rounds=1, held_out=48),
    Work(clients=30, batch=1, steps=16, rounds=1, held_out=48),
)
TINY = (Work(clients=3, batch=2, steps=2, rounds=2, rows=60, model="tiny", held_out=8),)


def main() -> None:
    given = arguments()
    settings = [work for work in (TINY if given.tiny else SETTINGS) if given.settings in work.name]
    sides = chosen(given)
    out: Path | None = given.out or (None if given.tiny else HERE)
    results = earlier(out, given)
    results["note"] = given.note or results["note"]
    pythons = environments_of(sides, given.cache, results)
    keep_bytecode(sides)
    with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as scratch:
        for repetition in range(given.reps):
            for setting in settings:
                work = Work(**{**asdict(setting), "seed": repetition})
                due = [side for side in sides if is_due(side, work, results, pythons)]
                if not due:
                    continue
                folder = prepared(work, Path(scratch))
                for side in rotated(due, repetition):
                    results["runs"].append(one_run(side, work, folder, pythons.get(side.key), Path(scratch)))
                    save(out, results)
                shutil.rmtree(folder)
    print(report(results))
    save(out, results)
    failed = [run for run in results["runs"] if "failed" in run]
    if failed:
        sys.exit("\n".join(f"{run['side']} failed at {run['setting']}:\n{run['failed']}" for run in failed))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a toy in seconds: nothing written unless --out is given")
    parser.add_argument("--reps", type=int, default=3, help="repetitions, each with its own data (default 3)")
    parser.add_argument(
        "--peers", default="", help=f"other frameworks to run as well, of {','.join(PEERS)}, or all; made in --cache"
    )
    parser.add_argument("--sides", default="", help=f"only these, of {','.join(SIDES)}; peers are among them")
    parser.add_argument("--settings", default="", help="only settings whose name has this in it, e.g. 100M or 10M-30")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "throughput", help="where peers are installed")
    parser.add_argument("--out", type=Path, help="folder for results.json and RESULTS.md (default: beside the program)")
    parser.add_argument("--again", default="", help="forget what is known of these sides (or all) and run them anew")
    parser.add_argument("--note", help="what a reader of RESULTS.md must know of how these runs were made")
    parser.add_argument("--page", action="store_true", help="run nothing; write RESULTS.md anew from results.json")
    given = parser.parse_args()
    if given.page:
        given.reps = 0
    return given


def chosen(given: argparse.Namespace) -> list[Side]:
    peers = list(PEERS) if given.peers == "all" else [name for name in given.peers.split(",") if name]
    keys = [key for key in given.sides.split(",") if key]
    wrong = sorted(set(peers) - set(PEERS)) + sorted(set(keys) - set(SIDES))
    if wrong:
        sys.exit(f"no such peer or side: {', '.join(wrong)}; peers: {', '.join(PEERS)}; sides: {', '.join(SIDES)}")
    if keys:
        return [side for key, side in SIDES.items() if key in keys]
    if given.tiny and not peers:
        return [SIDES[key] for key in ("a", "b", "c")]
    return [side for side in SIDES.values() if not side.peer or side.program in peers]


def earlier(out: Path | None, given: argparse.Namespace) -> dict[str, Any]:
    """What an earlier call has measured, less what is asked for again; failures are always tried again."""
    results: dict[str, Any] = {"machine": machine(), "runs": [], "left_out": {}, "note": None}
    path = out / "results.json" if out is not None else None
    if path is not None and path.exists() and given.again != "all":
        found = json.loads(path.read_text(encoding="utf-8"))
        again = given.again.split(",")
        results["runs"] = [run for run in found["runs"] if run["side"] not in again and "failed" not in run]
        results["left_out"] = found["left_out"]
        results["note"] = found.get("note")
        if given.page:
            results["machine"] = found["machine"]
    return results


def environments_of(sides: list[Side], cache: Path, results: dict[str, Any]) -> dict[str, Path]:
    pythons = {}
    for side in sides:
        if side.peer:
            found = environments.ready(side.program, cache)
            if isinstance(found, Path):
                pythons[side.key] = found
                results["left_out"].pop(side.key, None)
            else:
                results["left_out"][side.key] = found
                print(f"{side.program} cannot be installed and is left out: {found}", file=sys.stderr)
    return pythons


def keep_bytecode(sides: list[Side]) -> None:
    """Import what our own sides import, once, unmeasured; pip has compiled the peers' environments.

    Otherwise the first run of a side pays for compiling some thousands of files.
    """
    for program in sorted({side.program for side in sides if not side.peer}):
        command = [sys.executable, "-c", f"import benchmarks.throughput.{program}"]
        subprocess.run(command, cwd=ROOT, env=environment(SIDES["a"], ROOT), capture_output=True, check=True)


def is_due(side: Side, work: Work, results: dict[str, Any], pythons: dict[str, Path]) -> bool:
    if side.peer and (side.key not in pythons or work.clients > (side.max_clients or work.clients)):
        return False
    return not any(
        (run["side"], run["setting"], run["repetition"]) == (side.key, work.name, work.seed) for run in results["runs"]
    )


def rotated(sides: list[Side], by: int) -> list[Side]:
    by %= len(sides)
    return sides[by:] + sides[:by]


def prepared(work: Work, scratch: Path) -> Path:
    folder = scratch / f"{work.name}-{work.seed}"
    command = [sys.executable, "-m", "benchmarks.throughput.work", str(folder), json.dumps(asdict(work))]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(SIDES["a"], folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the work could not be made:\n{done.stderr[-4000:]}")
    return folder


def one_run(side: Side, work: Work, folder: Path, python: Path | None, scratch: Path) -> dict[str, Any]:
    out, cost = scratch / "out", scratch / "cost.json"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    found: dict[str, Any] = {
        "setting": work.name,
        "side": side.key,
        "repetition": work.seed,
        **asdict(work),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_before": os.getloadavg()[0],
    }
    supervise = [sys.executable, "-m", "benchmarks.throughput.supervise", str(cost), str(LIMIT_SECONDS)]
    with open(scratch / "log", "w+", encoding="utf-8", errors="replace") as log:
        done = subprocess.run(
            [*supervise, *side.command(python, folder, out, work.clients)],
            cwd=out if side.peer else ROOT,
            env=environment(side, out) | {"PYTHONPATH": str(ROOT)} if side.peer else environment(side, out),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
        log.seek(0)
        said = log.read()
    if done.returncode == 0:
        found |= json.loads(cost.read_text())
    if done.returncode or found["return_code"] or not (out / "adapter.safetensors").exists():
        print(f"({side.key}) {side.label} failed at {work.name}:\n{said[-3000:]}", file=sys.stderr, flush=True)
        return {**found, "failed": said[-3000:]}
    found |= noted(out)
    found["held_out_loss"] = held_out_loss(folder, adapter_in(out))
    print(
        f"({side.key}) {side.label}: {work.name}: {found['tokens'] / found['cpu_seconds']:,.0f} tokens per CPU-second, "
        f"{found['cpu_seconds']:.1f} CPU s ({found['train_cpu_seconds']:.1f} in training), "
        f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB, held-out loss {found['held_out_loss']:.4f}",
        file=sys.stderr,
        flush=True,
    )
    return found


def noted(out: Path) -> dict[str, Any]:
    """What the side's processes have written down of their training, added up."""
    lines = [
        json.loads(line) for path in out.glob("training-*.jsonl") for line in path.read_text().splitlines() if line
    ]
    return {
        "tokens": sum(line["tokens"] for line in lines),
        "train_cpu_seconds": sum(line["cpu_seconds"] for line in lines),
        **json.loads((out / "more.json").read_text()),
    }


def adapter_in(out: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / "adapter.safetensors")


def save(out: Path | None, results: dict[str, Any]) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("RESULTS.md", report(results))):
        fresh = out / f"{name}.new"
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(out / name)


def machine() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "accelerate", "fedloom")
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "load when started": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {metadata.version(name)}" for name in packages),
        "peers' packages": ", ".join(peer_versions()),
    }


def peer_versions() -> list[str]:
    """The framework's own line of each peer's requirements (they hold our torch, transformers and peft)."""
    names = {"flower": ("flwr", "ray"), "nvflare": ("nvflare",), "pfl": ("pfl",)}
    lines = [
        line.split("==")
        for peer in environments.known()
        for line in (environments.PEERS / peer / "requirements.txt").read_text().split()
        if line.split("==")[0] in names.get(peer, ())
    ]
    return [f"{name} {version}" for name, version in lines]


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "?")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    known = [name for name in ("avx512_bf16", "amx_bf16", "avx512f", "avx2") if f" {name}" in flags]
    return f"{model} ({', '.join(known)})"


if __name__ == "__main__":
    main()
