"""The documents: their links lead somewhere, their Python runs, their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from fedloom.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http", "mailto")) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S))
    named = {shlex.split(line, comments=True)[1] for line in blocks.splitlines() if line.startswith("fedloom ")}
    assert named <= known


def test_the_python_of_the_readme_runs_and_is_that_of_the_core_page(capsys: pytest.CaptureFixture[str]) -> None:
    readme, core = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/core.md"))
    [code] = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert code in core
    exec(compile(code, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
