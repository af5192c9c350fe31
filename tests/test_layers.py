"""The import layers of pyproject.toml hold, name every room, and refuse what they should."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
ROOMS = [room.strip(" ()") for layer in CONTRACTS[0]["layers"] for room in layer.replace("|", ":").split(":")]


def lint(source: Path) -> subprocess.CompletedProcess[str]:
    """Check the package under a source folder against the committed contracts."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--no-logo", "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [sys.executable, "-c", command, *arguments],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Make a package with every room, each empty."""
    for room in ROOMS:
        folder = tmp_path / "fedloom" / room
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "one.py").touch()
        (folder / "two.py").touch()
    (tmp_path / "fedloom" / "study" / "build.py").touch()
    (tmp_path / "fedloom" / "__init__.py").touch()
    return tmp_path


def test_the_package_keeps_its_layers() -> None:
    done = lint(ROOT / "src")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_without_forbidden_imports_passes(toy: Path) -> None:
    for importer, imported in [
        ("cli.one", "study.one"),
        ("study.build", "clients.one"),
        ("study.build", "protect.one"),
        ("runtimes.one", "rounds.one"),
        ("study.one", "data.one"),
        ("adapters.one", "ops.one"),
        ("data.one", "seeds.one"),
        ("data.one", "errors"),
        ("servers.one", "optimizers.one"),
    ]:
        _add_import(toy, importer, imported)
    done = lint(toy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("clients.one", "aggregates.two"),
        ("adapters.one", "clients.one"),
        ("compress.one", "protect.one"),
        ("rounds.one", "runtimes.one"),
        ("types", "tree"),
        ("errors", "types"),
        ("ops.one", "adapters.one"),
        ("models.one", "study.one"),
        ("runtimes.one", "clients.one"),
        ("cli.one", "aggregates.one"),
        ("study.one", "adapters.one"),
        ("data.one", "models.one"),
        ("runtimes.one", "data.one"),
    ],
)
def test_an_import_against_the_layers_is_refused(toy: Path, importer: str, imported: str) -> None:
    _add_import(toy, importer, imported)
    done = lint(toy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"fedloom.{importer}" in done.stdout


def test_the_contract_about_methods_names_every_slot_room_there_is() -> None:
    (slots,) = (layer for layer in CONTRACTS[0]["layers"] if "clients" in layer)
    there = {f"fedloom.{room.strip(' ()')}" for room in slots.split("|")}
    there = {room for room in there if (ROOT / "src" / Path(*room.split("."))).is_dir()}
    (methods,) = (contract for contract in CONTRACTS if contract["id"] == "methods")
    assert set(methods["forbidden_modules"]) == there


def test_a_room_that_no_layer_names_is_refused(toy: Path) -> None:
    (toy / "fedloom" / "attic.py").touch()
    done = lint(toy)
    assert done.returncode == 1
    assert "attic" in done.stdout


def _add_import(source: Path, importer: str, imported: str) -> None:
    path = source / "fedloom" / Path(*importer.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"import fedloom.{imported}\n")
