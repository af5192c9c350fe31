"""Run a suite of many short runs in few processes, and write its tables into a folder of benchmarks/.

    python tools/run_warm.py recipes/suites/zoo.yaml --jobs 2 --into benchmarks/zoo [k=v ...]

A run of `fedloom run SUITE` has a process of its own, which for runs of a few seconds is most of their time: Python,
torch and matplotlib start anew, a plan is timed and a page is drawn. Here each of a few processes makes one run after
the other, without the plan's timing and the pages; whatever decides numbers is the same, and so are the run folders.
Then `fedloom run SUITE` finds them, makes what is missing, and tabulates. `fedloom report RUN` draws a page.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def made(recipe: Any, run: Path) -> str:
    """One run, in a process that has made others; what went wrong with it, or nothing."""
    from fedloom.errors import FedloomError
    from fedloom.study import run as running
    from fedloom.study.plan import plan

    setattr(running, "write_report", lambda path: path)  # noqa: B010
    setattr(running, "plan", functools.partial(plan, probe=False))  # noqa: B010
    begun = (run / "recipe.yaml").is_file()
    try:
        running.run_recipe(recipe, resume=run if begun else None)
    except FedloomError as error:
        return error.message
    return ""


def warm(suite_file: str, words: list[str], jobs: int) -> Path:
    """Make the runs that are not done; the suite's folder."""
    import torch

    from fedloom.study.suite import read_suite_file
    from fedloom.study.suite_run import cells_of

    torch.set_num_threads(1)
    suite = read_suite_file(suite_file, words)
    waiting = [job for job in cells_of(suite) if job.status != "done"]
    (suite.output_dir / "cells").mkdir(parents=True, exist_ok=True)  # so that the folder is known as a suite's
    suite.run_store.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        asked = []
        for job in waiting:
            threads = job.cell.recipe.runtime.model_copy(update={"threads": 1})
            told = {"name": job.cell.label, "output_dir": str(job.run.resolve()), "runtime": threads}
            asked.append((job, pool.apply_async(made, (job.cell.recipe.model_copy(update=told), job.run))))
        for number, (job, answer) in enumerate(asked, 1):
            problem = answer.get()
            passed = time.monotonic() - begun
            print(f"{number}/{len(asked)} {passed:.0f} s {job.cell.label} {problem}", file=sys.stderr, flush=True)
    return suite.output_dir


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("suite")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--into", type=Path, help="where suite.json and table.md are copied to")
    told = parser.parse_args()
    folder = warm(told.suite, told.words, told.jobs)
    command = [sys.executable, "-m", "fedloom", "run", told.suite, *told.words, "--jobs", str(told.jobs)]
    done = subprocess.run(command, check=False)
    if told.into is not None and (folder / "suite.json").is_file():
        told.into.mkdir(parents=True, exist_ok=True)
        for name in ("suite.json", "table.md"):
            shutil.copyfile(folder / name, told.into / name)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
