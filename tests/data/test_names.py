"""A name of the data room is the same thing whichever module was imported before."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("first", ["fedloom.data.clients", "fedloom.study.run", "fedloom"])
def test_no_module_hides_a_function(first: str) -> None:
    check = "assert all(callable(getattr(fedloom.data, name)) for name in fedloom.data.__all__)"
    code = f"import {first}, fedloom.data; {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
