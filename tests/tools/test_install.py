"""The installer takes a CPU build where there is one, and stops before CUDA packages that nobody asked for."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import install, lock

ROOT = Path(__file__).resolve().parents[2]
CUDA_BUILD = [
    "jinja2",
    'nvidia-nccl-cu13==2.29.7; platform_system == "Linux" or platform_system == "Darwin"',
    'triton==3.7.1; python_version >= "3.11"',
    'nvidia-nowhere; platform_system == "Nowhere"',
    'cuda-extra; extra == "gpu"',
]
CPU_BUILD = ["jinja2", 'nvidia-nowhere; platform_system == "Nowhere"']


def index_with_torch(folder: Path, requires: list[str]) -> str:
    """Make a package index that offers one torch 99.0 with these requirements, and return its address."""
    shelf = folder / "torch"
    shelf.mkdir(parents=True)
    name = "torch-99.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n" + "".join(
        f"Requires-Dist: {r}\n" for r in requires
    )
    with zipfile.ZipFile(shelf / name, "w") as wheel:
        wheel.writestr("torch-99.0.dist-info/METADATA", metadata)
        wheel.writestr("torch-99.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("torch-99.0.dist-info/RECORD", "")
    (shelf / "index.html").write_text(f'<a href="{name}">{name}</a>', encoding="utf-8")
    return folder.as_uri()


@pytest.fixture
def only_the_named_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this machine's own settings of pip out."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)


def project(folder: Path, lock_text: str = "pip==25.1\ntorch==99.0\n") -> Path:
    """Make a folder with what the installer reads."""
    (folder / "tools").mkdir(parents=True)
    (folder / "requirements.lock").write_text(lock_text, encoding="utf-8")
    (folder / "pyproject.toml").write_text("", encoding="utf-8")
    shutil.copy(ROOT / "tools" / "install.py", folder / "tools")
    return folder


def in_this_environment(root: Path, torch_index: str, gpu: bool = False) -> install.Installer:
    """Return an installer whose environment is the one the tests run in."""
    return install.Installer(root, Path(sys.prefix), gpu, torch_index)


@pytest.mark.usefixtures("only_the_named_index")
class TestWhichBuild:
    def test_only_requirements_that_apply_here_count(self, tmp_path: Path) -> None:
        index = index_with_torch(tmp_path / "index", CUDA_BUILD)
        names = in_this_environment(project(tmp_path / "p"), index).torch_requirements("99.0")
        assert names == ["jinja2", "nvidia-nccl-cu13", "triton"]

    def test_a_cuda_build_is_refused_with_both_ways_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        installer = in_this_environment(project(tmp_path / "p"), index_with_torch(tmp_path / "index", CUDA_BUILD))
        calls = watch_pip(installer, monkeypatch)
        with pytest.raises(install.InstallError) as caught:
            installer.install_torch()
        assert "TORCH_INDEX=<url>" in str(caught.value)
        assert "GPU=1" in str(caught.value)
        assert "2 CUDA packages (nvidia-nccl-cu13, triton" in str(caught.value)
        assert all("--dry-run" in call for call in calls)

    def test_a_cpu_build_is_taken_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        index = index_with_torch(tmp_path / "index", CPU_BUILD)
        installer = in_this_environment(project(tmp_path / "p"), index)
        calls = watch_pip(installer, monkeypatch)
        installer.install_torch()
        assert [call for call in calls if "--dry-run" not in call] == [
            ("--force-reinstall", "--no-deps", "--index-url", index, "torch==99.0")
        ]

    def test_gpu_takes_what_the_index_has_with_its_requirements(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        index = index_with_torch(tmp_path / "index", CUDA_BUILD)
        installer = in_this_environment(project(tmp_path / "p"), index, gpu=True)
        calls = watch_pip(installer, monkeypatch)
        installer.install_torch()
        assert len(calls) == 1
        assert "--no-deps" not in calls[0]

    def test_an_index_without_that_version_is_an_error(self, tmp_path: Path) -> None:
        index = index_with_torch(tmp_path / "index", CPU_BUILD)
        with pytest.raises(install.InstallError, match="pip could not do this"):
            in_this_environment(project(tmp_path / "p"), index).torch_requirements("98.0")


def watch_pip(installer: install.Installer, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Let dry runs through to pip, stop all else, and return the list of calls."""
    calls: list[tuple[str, ...]] = []
    really = installer.pip

    def pip(*arguments: str) -> None:
        calls.append(arguments)
        if "--dry-run" in arguments:
            really(*arguments)

    monkeypatch.setattr(installer, "pip", pip)
    return calls


class TestWhatIsRemembered:
    def installer(self, root: Path, gpu: bool = False, torch_index: str = "", core: bool = False) -> install.Installer:
        return install.Installer(root, root / ".venv", gpu, torch_index, core)

    def finished(self, root: Path, gpu: bool = False, torch_index: str = "", core: bool = False) -> None:
        """Leave what a finished install leaves."""
        one = self.installer(root, gpu, torch_index)
        one.python.parent.mkdir(parents=True, exist_ok=True)
        one.python.symlink_to(sys.executable)
        stamp = {**one.wanted(), "gpu": gpu, "torch_index": torch_index, "core": core}
        one.stamp.write_text(json.dumps(stamp), encoding="utf-8")

    def test_a_second_call_does_nothing_and_needs_no_choice_again(self, tmp_path: Path) -> None:
        root = project(tmp_path)
        assert not self.installer(root).is_current()
        self.finished(root, torch_index="file:///cpu")
        assert self.installer(root).is_current()
        assert self.installer(root, torch_index="file:///cpu").is_current()

    def test_another_build_asked_for_is_not_current(self, tmp_path: Path) -> None:
        root = project(tmp_path)
        self.finished(root)
        assert not self.installer(root, gpu=True).is_current()
        assert not self.installer(root, torch_index="file:///cpu").is_current()

    def test_the_core_alone_does_for_the_demo_but_not_for_the_tests(self, tmp_path: Path) -> None:
        self.finished(project(tmp_path / "core"), core=True)
        assert self.installer(tmp_path / "core", core=True).is_current()
        assert not self.installer(tmp_path / "core").is_current()
        self.finished(project(tmp_path / "all"))
        assert self.installer(tmp_path / "all", core=True).is_current()

    @pytest.mark.parametrize("core", [True, False])
    def test_an_environment_with_everything_is_never_cut_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: bool
    ) -> None:
        root = project(tmp_path)
        self.finished(root, core=core)
        (root / "pyproject.toml").write_text("# changed\n", encoding="utf-8")
        installer = self.installer(root, core=True)
        calls = watch_pip(installer, monkeypatch)
        monkeypatch.setattr(installer, "install_torch", lambda: None)
        monkeypatch.setattr(install, "IMPORTS", ("json",))
        installer.run()
        assert any("--requirement" in call for call in calls) == (not core)
        assert any("--constraint" in call for call in calls) == core
        assert json.loads(installer.stamp.read_text(encoding="utf-8"))["core"] is core

    @pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml", "tools/install.py"])
    def test_a_changed_input_is_not_current(self, tmp_path: Path, name: str) -> None:
        root = project(tmp_path)
        self.finished(root)
        with (root / name).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        assert not self.installer(root).is_current()

    @pytest.mark.parametrize("damage", ["", "[]", "{"])
    def test_a_damaged_stamp_is_not_current(self, tmp_path: Path, damage: str) -> None:
        root = project(tmp_path)
        self.finished(root)
        self.installer(root).stamp.write_text(damage, encoding="utf-8")
        assert not self.installer(root).is_current()

    def test_a_moved_folder_is_not_current(self, tmp_path: Path) -> None:
        root = project(tmp_path / "here")
        self.finished(root)
        root.rename(tmp_path / "there")
        assert not self.installer(tmp_path / "there").is_current()


class TestBytecode:
    def test_it_is_kept_where_the_environment_forbids_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "heavy.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
        monkeypatch.setattr(install, "IMPORTS", ("heavy",))
        in_this_environment(project(tmp_path / "p"), "").keep_bytecode()
        assert len(list((tmp_path / "__pycache__").glob("heavy.*.pyc"))) == 1

    def test_what_cannot_be_imported_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(install, "IMPORTS", ("no_such_module",))
        with pytest.raises(install.InstallError, match="import no_such_module"):
            in_this_environment(project(tmp_path / "p"), "").keep_bytecode()

    def test_make_lets_python_keep_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        (tmp_path / "more.mk").write_text("show:\n\t@echo [$$PYTHONDONTWRITEBYTECODE]\n", encoding="utf-8")
        command = [
            "make",
            "--no-print-directory",
            "-f",
            str(ROOT / "Makefile"),
            "-f",
            str(tmp_path / "more.mk"),
            "show",
        ]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


class TestMake:
    def make(self, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        shutil.copy(ROOT / "Makefile", root)
        return subprocess.run(["make", "-C", str(root), *arguments], capture_output=True, text=True, check=False)

    def test_an_old_python_is_named_with_the_way_out(self, tmp_path: Path) -> None:
        root = project(tmp_path / "p")
        old = tmp_path / "python3.9"
        old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo "Python 3.9.1" && exit 0\nexit 1\n', encoding="utf-8")
        old.chmod(0o755)
        done = self.make(root, "demo", f"PYTHON={old}")
        assert done.returncode == 2
        assert "needs Python 3.11 or later" in done.stderr
        assert "is Python 3.9.1" in done.stderr
        assert "PYTHON=python3.12" in done.stderr

    def test_no_python_is_named_with_the_way_out(self, tmp_path: Path) -> None:
        done = self.make(project(tmp_path / "p"), "demo", "PYTHON=no-such-python")
        assert done.returncode == 2
        assert "there is no no-such-python here" in done.stderr


class TestLock:
    def test_the_committed_lock_is_plain_pins_without_cuda(self) -> None:
        text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
        assert lock.objections(text) == []
        assert install.locked_version(text, "torch") == "2.13.0"

    @pytest.mark.parametrize(
        "line",
        [
            "nvidia-nccl-cu13==2.29.7",
            "triton==3.7.1",
            "--find-links file:///wheels",
            "torch @ file:///wheels/torch.whl",
            "torch==2.13.0+cpu",
            "numpy==2.4.6 --hash=sha256:00",
            "numpy>=2",
        ],
    )
    def test_what_ties_a_lock_to_one_machine_is_found(self, line: str) -> None:
        assert len(lock.objections(f"rich==15.0.0\n{line}\n")) == 1

    def test_a_package_that_the_lock_lacks_is_an_error(self) -> None:
        with pytest.raises(install.InstallError, match="make lock"):
            install.locked_version("torchvision==1.0\n", "torch")
