"""What every test may use: offline settings, one torch thread per worker, real data if any, tiny models."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports these libraries: no downloads, no caches in the home of whoever runs the tests, no pictures on
# a screen, and one thread, since the tests run side by side.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TERM"] = "xterm"  # what CI sets, if anything, hides live displays
os.environ.setdefault("NO_COLOR", "1")
_CACHES = tempfile.mkdtemp(prefix="fedloom-tests-")
os.environ["HF_HOME"] = _CACHES
os.environ["FEDLOOM_CACHE"] = str(Path(_CACHES) / "prepared")
os.environ["MPLCONFIGDIR"] = str(Path(_CACHES) / "matplotlib")

import pytest
import torch
from hypothesis import settings
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()
settings.register_profile("fedloom", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fedloom")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write down anew what tests/invariants compares with")


def pytest_unconfigure() -> None:
    """Remove the caches that this process's tests left."""
    shutil.rmtree(_CACHES, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in tests/real, so that `-m 'not real'` leaves it out."""
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "real"):
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def real_path() -> Callable[[str], Path]:
    """Return a function from a name such as "data/gsm8k/train.jsonl" to its path, or a skip where there is none.

    The files lie in ../shared beside the checkout, or in the folder that FEDLOOM_REAL_DATA names.
    """
    folder = Path(os.environ.get("FEDLOOM_REAL_DATA") or ROOT.parent / "shared").resolve()

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"real data absent: {name} (FEDLOOM_REAL_DATA names the folder that holds it)")
        return path

    return find


@pytest.fixture(autouse=True)
def _torch_as_found() -> Iterator[None]:
    """Leave torch's default type, thread count and gradient mode as a test found them."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Return `make(seed=0, dtype=torch.float32, **config)`: a new seeded random Llama, 23 thousand weights."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> LlamaForCausalLM:
        shape: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**shape, **config})), seed, dtype)

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Return `make(seed=0, dtype=torch.float32, **config)`: a new seeded random GPT-2 (Conv1D layers), no dropout."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> GPT2LMHeadModel:
        shape: dict[str, Any] = {
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.1,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**{**shape, **config})), seed, dtype)

    return make


def _seeded(build: Callable[[], Any], seed: int, dtype: torch.dtype) -> Any:
    """Build a model from one seed, the same in every data type, and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    return model.to(dtype).eval()
