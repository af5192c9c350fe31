"""`env`: versions and the machine, for a bug report and for the first question of any support."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import typer

from fedloom.cli.common import FormatOption, OutputFormat, out, print_data

__all__ = ["environment", "register"]

PACKAGES = ("fedloom", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "typer", "rich")
EXTRAS = {"data": ("datasets", "pyarrow"), "test": ("pytest", "hypothesis", "peft", "psutil"), "dev": ("ruff", "mypy")}


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("env")(show)


def show(output: FormatOption = OutputFormat.text) -> None:
    """Versions, CPU, memory, GPU, extras: what a bug report needs."""
    facts = environment()
    if output is OutputFormat.json:
        print_data(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            shown = ", ".join(map(str, value)) or "none"
        else:
            shown = "unknown" if value is None else str(value)
        out(f"{name:<13} {shown}")


def environment() -> dict[str, Any]:
    """What this machine and this installation are, as JSON values."""
    flags = _cpu_flags()
    return {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "extras": {
            name: "present" if not missing else f"lacks {' '.join(missing)}"
            for name, packages in EXTRAS.items()
            for missing in [[package for package in packages if _version(package) is None]]
        },
        "cpu": _cpu_name(),
        "cpu_features": sorted(
            flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve"}
        ),
        "cpu_bf16": _yes(bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})),
        "cores": _cores(),
        "memory": _memory(),
        **_torch(),
        "sandbox": _sandbox(),
        "cache": os.environ.get("HF_HOME") or "default",
        "offline": _yes(os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")),
        "executable": sys.executable,
    }


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _version(package: str) -> str | None:
    try:
        from importlib import metadata  # slow to load: `fedloom --help` does without it

        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = text.split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_flags() -> set[str]:
    info = _cpu_info()
    return set((info.get("flags") or info.get("Features") or "").split())


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str | None:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    return f"{size / 2**30:.1f} GiB"


def _sandbox() -> str:
    """What stands between the programs that a model writes and this machine."""
    from fedloom.evaluate.sandbox import describe_sandbox

    return describe_sandbox()


def _torch() -> dict[str, Any]:
    """What PyTorch sees. It takes a second to ask, and nothing else knows."""
    try:
        import torch
    except ImportError as error:
        return {"threads": None, "gpu": f"torch cannot be imported: {error}"}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        gpu = f"{', '.join(names)} (CUDA {torch.version.cuda}, bf16 {_yes(torch.cuda.is_bf16_supported())})"
    elif hasattr(torch.backends, "mps") and torch.backends.mps.is_available():
        gpu = "Apple MPS"
    else:
        gpu = "none" if torch.version.cuda is None else f"none that CUDA {torch.version.cuda} can use"
    return {"threads": torch.get_num_threads(), "gpu": gpu}
