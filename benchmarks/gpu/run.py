"""Every case in a process of its own, the most telling first, until the time is used up; results as they come."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Case
from benchmarks.throughput.run import machine

HERE = Path(__file__).parent
GIB = 2**30
BLOCKS = ((16, 64), (32, 64), (32, 128), (64, 64))


def cases(tiny: bool) -> list[Case]:
    """In the order in which they would be missed."""
    if tiny:
        small = {"size": "tiny", "steps": 2, "tokens": 32}
        return [Case("fedloom", clients=2, **small), Case("trainer", **small), Case("product", clients=2, **small)]  # type: ignore[arg-type]
    first = [
        Case("fedloom", "1b", 8),
        Case("trainer", "1b"),
        Case("fedloom", "7b", 8),
        Case("fedloom", "1b", 8, "triton"),
        Case("fedloom", "7b", 8, "triton"),
        Case("trainer", "7b"),
        Case("fedloom", "1b", 1),
        Case("fedloom", "1b", 1, "triton"),
        Case("fedloom", "1b", 16),
        Case("fedloom", "7b", 1),
        Case("fedloom", "7b", 16),
    ]
    products = [
        Case("product", size, clients, kernel, steps=100)
        for size in ("1b", "7b")
        for clients in (1, 8)
        for kernel in ("plain", "triton")
    ]
    rest = [Case("fedloom", size, clients) for size in ("1b", "7b") for clients in (2, 4)]
    rest += [Case("fedloom", "1b", 16, "triton"), Case("fedloom", "7b", 16, "triton")]
    tuning = [Case("product", "7b", clients, "triton", steps=100, blocks=b) for clients in (1, 8) for b in BLOCKS]
    return first + products + rest + tuning


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget-seconds", type=float, default=780, help="no case begins or goes on after it")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, also on a CPU: that it runs, no measurement")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and RESULTS.md")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    given = parser.parse_args()
    ends = time.monotonic() + given.budget_seconds
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(), "runs": [], "not_run": []}
    for case in cases(given.tiny):
        if given.only not in case.name:
            continue
        left = ends - time.monotonic()
        if left < (0 if given.tiny else 20):
            results["not_run"].append(case.name)
            continue
        results["runs"].append({"name": case.name, **case._asdict(), **one(case, left)})
        print(json.dumps(results["runs"][-1]), flush=True)
        write(results, given.out)
    write(results, given.out)
    print((given.out / "RESULTS.md").read_text(encoding="utf-8"))


def one(case: Case, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu.case", json.dumps(case._asdict())]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent.parent, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write(results: dict[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "RESULTS.md").write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    runs = results["runs"]
    devices = sorted({run["device"] for run in runs if "device" in run})
    lines = ["# One GPU: fedloom against Hugging Face's Trainer with PEFT", ""]
    lines += [f"{key}: {value}  " for key, value in results["machine"].items()]
    lines += [
        f"device: {', '.join(devices) or 'none'}  ",
        "",
        "LoRA r 8 on q and v, one row of 512 tokens a step and client, bfloat16 base, float32 factors. Share of peak:",
        "model FLOPs by the formula of `fedloom/study/costs.py` over the dense bfloat16 peak that the maker states.",
        "",
        "| case | tokens per s | x Trainer | share of peak | peak GiB |",
        "|---|---|---|---|---|",
    ]
    trainer = {run["size"]: run["tokens_per_second"] for run in runs if run["side"] == "trainer" and "tokens" in run}
    for run in runs:
        if run["side"] == "product":
            continue
        if "tokens" not in run:
            lines.append(f"| {run['name']} | {said(run)} | | | |")
            continue
        rate, share, memory = run["tokens_per_second"], run["share_of_peak"], run["peak_memory_bytes"]
        base = trainer.get(run["size"])
        lines.append(
            f"| {run['name']} | {rate:,.0f} | {f'{rate / base:.2f}' if base else ''} "
            f"| {'' if share is None else f'{share:.1%}'} | {'' if memory is None else f'{memory / GIB:.1f}'} |"
        )
    lines += ["", "| LoRA's product alone | forward, ms | with gradients, ms |", "|---|---|---|"]
    for run in runs:
        if run["side"] == "product" and "forward_milliseconds" in run:
            with_gradients = run["with_gradients_milliseconds"]
            lines.append(f"| {run['name']} | {run['forward_milliseconds']:.3f} | {with_gradients:.3f} |")
        elif run["side"] == "product":
            lines.append(f"| {run['name']} | {said(run)} | |")
    if results["not_run"]:
        lines += ["", f"Not run, the time was up: {'; '.join(results['not_run'])}."]
    return "\n".join(lines) + "\n"


def said(run: dict[str, Any]) -> str:
    return "out of memory" if run.get("out_of_memory") else "failed: " + run["error"].splitlines()[-1][:120]
