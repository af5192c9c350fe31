"""Make .venv and install fedloom with everything requirements.lock names. Run by `make install`; needs only Python.

The one thing to decide is PyTorch's build. On Linux a package index usually offers the build that asks for gigabytes
of CUDA packages, so this script looks at the metadata of the build that pip would take before it takes it. A build
that asks for none is installed; any other only when GPU=1 says so. A second call with nothing changed does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OLDEST = (3, 11)
CUDA_PACKAGE = re.compile(r"^(nvidia|cuda|triton|pytorch-triton)", re.IGNORECASE)

# What a run imports, also where only the core is installed.
IMPORTS = ("fedloom.study.run", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")

# Runs in the new environment, whose pip brings the parser of requirements and their conditions.
APPLICABLE = """
import json, sys
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(line) for line in json.load(sys.stdin)]
print(json.dumps([one.name for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]))
"""


class InstallError(Exception):
    """The install cannot go on; the text says why and what to do."""


def locked_version(lock: str, name: str) -> str:
    """Return the version a lock's text pins for one package.

    >>> locked_version("numpy==2.4.6 ; python_full_version < '3.12'\\ntorch==2.13.0\\n", "torch")
    '2.13.0'
    """
    pin = re.search(rf"^{re.escape(name)}==([^\s;]+)", lock, re.MULTILINE)
    if pin is None:
        raise InstallError(f"requirements.lock pins no {name}; `make lock` remakes it")
    return pin.group(1)


def cuda_packages(names: list[str]) -> list[str]:
    """Return the CUDA packages among the names of requirements.

    >>> cuda_packages(["jinja2", "nvidia-nccl-cu13", "triton"])
    ['nvidia-nccl-cu13', 'triton']
    """
    return [name for name in names if CUDA_PACKAGE.match(name)]


def refusal(version: str, cuda: list[str], index: str) -> str:
    """Say why a CUDA build is not installed, and the ways out."""
    where = f"the index {index}" if index else "the package index pip uses here"
    return (
        f"{where} offers only a CUDA build of torch {version}, which would bring {len(cuda)} CUDA packages "
        f"({', '.join(cuda[:3])}, ...), gigabytes in all. Nothing of it was installed. Two ways out:\n"
        "  make install TORCH_INDEX=<url>   PyTorch's CPU wheel index, see pytorch.org/get-started\n"
        "  make install GPU=1               this machine has an NVIDIA GPU: take the CUDA build\n"
        "Either works once with any target (make demo, make test) and is remembered in .venv."
    )


class Installer:
    """One environment, one lock, and where PyTorch comes from.

    `core` leaves out what only tests, checks and optional extras need; an environment with all of it is not cut back.
    """

    def __init__(self, root: Path, venv: Path, gpu: bool, torch_index: str, core: bool = False) -> None:
        self.root = root
        self.core = core
        self.venv = venv
        self.gpu = gpu
        self.torch_index = torch_index
        self.python = venv / "bin" / "python"
        self.stamp = venv / "fedloom-installed.json"
        self.lock_path = root / "requirements.lock"
        self.lock = self.lock_path.read_text(encoding="utf-8")

    def wanted(self) -> dict[str, str]:
        """Return what a finished install is known by."""
        digest = hashlib.sha256()
        for name in ("requirements.lock", "pyproject.toml", "tools/install.py"):
            digest.update((self.root / name).read_bytes())
        return {"inputs": digest.hexdigest(), "root": str(self.root)}

    def done(self) -> dict[str, Any]:
        """Return what the last finished install left in its stamp; nothing where there was none."""
        try:
            done = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return done if isinstance(done, dict) else {}

    def is_current(self) -> bool:
        """Tell whether the environment is as a call with these arguments would leave it."""
        done, wanted = self.done(), self.wanted()
        if not self.python.exists() or any(done.get(key) != value for key, value in wanted.items()):
            return False
        if done.get("core") is True and not self.core:
            return False
        # A build once chosen stays until another is asked for.
        same_index = not self.torch_index or done.get("torch_index") == self.torch_index
        return same_index and (not self.gpu or done.get("gpu") is True)

    def pip(self, *arguments: str) -> None:
        """Run pip in the environment, quiet but for errors."""
        # Compiling it all is most of an install's time; keep_bytecode compiles what is imported.
        options = ["-qq", "--no-compile", "--disable-pip-version-check"]
        command = [str(self.python), "-m", "pip", "install", *options, *arguments]
        if subprocess.run(command, cwd=self.root, check=False).returncode:
            raise InstallError(f"pip could not do this: pip install {' '.join(arguments)}")

    def make_environment(self) -> None:
        """Create the environment unless a fit one stands there."""
        if self.python.exists():
            moved_from = self.done().get("root", str(self.root))
            probe = [str(self.python), "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
            if moved_from == str(self.root) and subprocess.run(probe, check=False).returncode == 0:
                return
            say(f"{self.venv.name} is of another folder or an older Python: making it anew")
        if sys.version_info < OLDEST:
            have = "{}.{}".format(*sys.version_info)
            raise InstallError(
                f"fedloom needs Python 3.11 or later, and {sys.executable} is {have}; "
                "name another: make install PYTHON=python3.12"
            )
        if self.venv.exists():
            shutil.rmtree(self.venv)
        # The base Python makes it, so that this works from inside an environment, too.
        base = getattr(sys, "_base_executable", None) or sys.executable
        if subprocess.run([base, "-m", "venv", str(self.venv)], check=False).returncode:
            raise InstallError(f"{base} -m venv failed; on Debian and Ubuntu the package python3-venv brings it")

    def torch_requirements(self, version: str) -> list[str]:
        """Return the names of what the torch build that pip would take asks for on this machine."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            # fast-deps reads a wheel's metadata without fetching the wheel, also where the index has none of its own.
            asked = ["--dry-run", "--no-deps", "--ignore-installed", "--use-feature=fast-deps", "--report", str(report)]
            self.pip(*asked, *self.torch_source(), f"torch=={version}")
            found = json.loads(report.read_text(encoding="utf-8"))["install"][0]["metadata"]
        asked_for = json.dumps(found.get("requires_dist", []))
        probe = [str(self.python), "-c", APPLICABLE]
        answer = subprocess.run(probe, input=asked_for, stdout=subprocess.PIPE, text=True, check=True).stdout
        names: list[str] = json.loads(answer)
        return names

    def torch_source(self) -> list[str]:
        """Return pip's option for the index to take torch from."""
        return ["--index-url", self.torch_index] if self.torch_index else []

    def installed_torch(self) -> tuple[str, bool]:
        """Return the installed torch's version and whether that build asks for CUDA packages."""
        probe = (
            "import importlib.metadata as m, json\n"
            "try: print(json.dumps([m.version('torch'), m.requires('torch') or []]))\n"
            "except m.PackageNotFoundError: print(json.dumps(['', []]))"
        )
        text = subprocess.run([str(self.python), "-c", probe], stdout=subprocess.PIPE, text=True, check=True).stdout
        version, requires = json.loads(text)
        return version, bool(cuda_packages(requires))

    def install_torch(self) -> None:
        """Install the locked torch, in the build that was asked for."""
        version = locked_version(self.lock, "torch")
        there, there_cuda = self.installed_torch()
        if there.split("+")[0] == version and there_cuda == self.gpu:
            return
        again = ["--force-reinstall"] if there else []
        if self.gpu:
            say(f"torch {version}, CUDA build, with its CUDA packages (gigabytes)")
            self.pip(*again, "--constraint", str(self.lock_path), *self.torch_source(), f"torch=={version}")
            if not self.installed_torch()[1]:
                say("the build pip took asks for no CUDA packages: name an index that has one with TORCH_INDEX=<url>")
            return
        cuda = cuda_packages(self.torch_requirements(version))
        if cuda:
            raise InstallError(refusal(version, cuda, self.torch_index))
        say(f"torch {version}, CPU build")
        self.pip(*again, "--no-deps", *self.torch_source(), f"torch=={version}")

    def keep_bytecode(self) -> None:
        """Import what a run imports, so that its bytecode lies on disk.

        The first run would do it, but not where PYTHONDONTWRITEBYTECODE is set, as in many containers: there every
        process would compile some 2,900 files anew, which is most of its start-up.
        """
        allowed = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        command = [str(self.python), "-c", f"import {', '.join(IMPORTS)}"]
        if subprocess.run(command, cwd=self.root, env=allowed, check=False).returncode:
            raise InstallError(f"what was installed cannot be imported: {' '.join(command[:2])} '{command[2]}'")

    def run(self) -> None:
        """Bring the environment up to the lock."""
        if self.is_current():
            return
        done = self.done()
        if not self.gpu and not self.torch_index:
            self.gpu, self.torch_index = done.get("gpu") is True, str(done.get("torch_index") or "")
        if done.get("core") is False:
            self.core = False  # what was there before is kept up to date, not taken away
        started = time.monotonic()
        say(f"installing into {self.venv.name} from requirements.lock")
        self.make_environment()
        self.stamp.unlink(missing_ok=True)
        self.pip(f"pip=={locked_version(self.lock, 'pip')}")
        self.install_torch()
        if self.core:
            say("what fedloom itself needs, as pinned in requirements.lock")
            pinned = ["--constraint", str(self.lock_path)]
            self.pip(*pinned, "hatchling", "editables")
            self.pip(*pinned, "--no-build-isolation", "--editable", ".")
        else:
            say("the other packages of requirements.lock")
            # The lock is complete, so nothing but what it names is ever installed.
            self.pip("--no-deps", "--requirement", str(self.lock_path))
            self.pip("--no-deps", "--no-build-isolation", "--editable", ".")
        self.keep_bytecode()
        stamp = {**self.wanted(), "gpu": self.gpu, "torch_index": self.torch_index, "core": self.core}
        self.stamp.write_text(json.dumps(stamp), encoding="utf-8")
        say(f"installed in {time.monotonic() - started:.0f} s")


def say(line: str) -> None:
    """Print one line about the install."""
    print(f"install: {line}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Install, or end with a message that says what to do."""
    parser = argparse.ArgumentParser(description="Make .venv and install fedloom from requirements.lock.")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--gpu", default=os.environ.get("GPU", ""), help="1: take PyTorch's CUDA build")
    parser.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX", ""), help="an index with a CPU build")
    parser.add_argument("--core", action="store_true", help="without what tests, checks and extras need")
    options = parser.parse_args(arguments)
    root = Path(__file__).resolve().parent.parent
    try:
        Installer(root, root / options.venv, options.gpu not in ("", "0"), options.torch_index, options.core).run()
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
