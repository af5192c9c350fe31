"""Stands for `python -m fedloom` in tests of suites: leaves a run folder as a run would, in no time.

What a run does is in the file that FAKE_PLAN names: {"seed 0": {"sleep": 0.1, "code": 1, ...}} by parts of its name.
"""

import fcntl
import json
import os
import re
import signal
import sys
import time
from pathlib import Path


def main(words: list[str]) -> int:
    resume = words[1] == "--resume"
    text = (Path(words[2]) / "recipe.yaml" if resume else Path(words[1])).read_text(encoding="utf-8")

    def value(key: str) -> str:
        return re.search(rf"^\s*{key}: (.*)$", text, re.MULTILINE)[1].strip('"')

    run = Path(value("output_dir") + ("-smoke" if "--smoke" in words else ""))
    plan = {"sleep": 0.0, "code": 0, "loss": 1.0}
    for part, settings in json.loads(Path(os.environ["FAKE_PLAN"]).read_text()).items():
        if part in value("name"):
            plan |= settings
    events = Path(os.environ["FAKE_PLAN"]).with_suffix(".events")

    def note(what: str) -> None:
        line = json.dumps({"what": what, "name": value("name"), "time": time.time(), "words": words}) + "\n"
        with events.open("a") as file:
            file.write(line)

    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (run / "recipe.yaml").write_text(text)
    note("resumes" if resume else "starts")
    stop: list[int] = []
    if plan.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    lines = [{"arm": "base", "round": 0, "rounds": 0, "val_loss": 2.0}]
    if not plan.get("loading"):
        lines.append({"arm": "federated", "round": 1, "rounds": 1, "clients": 2, "bytes_up_per_client": 100})
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("a line for the log", flush=True)
    if plan.get("kill") and not resume:
        os.kill(os.getpid(), signal.SIGKILL)
    until = time.monotonic() + plan["sleep"]
    while time.monotonic() < until and not stop:
        time.sleep(0.01)
    note("ends")
    if stop:
        return 130
    if plan["code"]:
        print("Traceback and so on\nfedloom: no such file: x.jsonl\n  fetch it\n  [data.missing]", flush=True)
        return plan["code"]
    arm = {"loss": plan["loss"], "score": None, "own_test": {"loss": plan["loss"], "score": None}}
    result = {
        "schema": 1,
        "status": "done",
        "seed": int(value("seed")),
        "arms": {"base": {**arm, "loss": 2.0}, "federated": arm},
        "costs": {"peak_memory_bytes": 10**7, "trainable_parameters": 1, "total_parameters": 4},
        "costs_per_arm": {"base": {"train_seconds": 0}, "federated": {"train_seconds": 3.5}},
    }
    (run / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
