"""What is built from the repository is what its users get: the package data, the recipes, the command."""

import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {path.name for path in (ROOT / "recipes").glob("*.yaml")}


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist offline, and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (path for path in folder.iterdir() if path.is_file())
    return made


def shipped_files() -> set[str]:
    """Return what git tracks of the package, as names inside a wheel; the recipes as real files."""
    listed = subprocess.run(["git", "ls-files", "src/fedloom"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout: nothing to compare the build with")
    tracked = {name.removeprefix("src/") for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    return (tracked - {"fedloom/recipes"}) | {f"fedloom/recipes/{name}" for name in RECIPES}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_all_that_the_package_has(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped_files() <= names
    assert "fedloom/py.typed" in names
    assert not [name for name in names if name.endswith((".pyc", ".so")) or name.startswith(("tests", "tools"))]


def test_a_wheel_built_from_the_source_archive_is_the_same(wheel: Path, tmp_path: Path) -> None:
    archive = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from importlib.resources import files; print(*(p.name for p in (files('fedloom') / 'recipes').iterdir()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) >= RECIPES


def test_the_checkout_finds_the_same_recipes() -> None:
    assert RECIPES
    assert {path.name for path in (files("fedloom") / "recipes").iterdir()} >= RECIPES


def test_the_command_and_the_version_are_declared() -> None:
    (command,) = entry_points(group="console_scripts", name="fedloom")
    assert command.value == "fedloom.cli:main"
    assert version("fedloom") == "0.1.0"
