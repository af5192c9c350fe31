"""The shared fixtures keep their word: seeded, typed, offline, one thread."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
def test_a_seed_gives_the_same_model_in_both_types_and_leaves_the_generator(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    make: Callable[..., Any] = request.getfixturevalue(fixture)
    before = torch.random.get_rng_state()
    single, double, other = make(seed=3), make(seed=3, dtype=torch.float64), make(seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, weight in single.state_dict().items():
        assert torch.equal(weight, double.state_dict()[name].float()), name
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert double(input_ids=tokens).logits.dtype == torch.float64
        torch.testing.assert_close(
            single(input_ids=tokens).logits.double(), double(input_ids=tokens).logits, atol=1e-4, rtol=0
        )
        assert not torch.allclose(single(input_ids=tokens).logits, other(input_ids=tokens).logits, atol=1e-2)


def test_the_settings_are_offline_and_single_threaded() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert torch.get_num_threads() == 1
    assert Path(constants.HF_HOME) != Path.home() / ".cache" / "huggingface"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_absent_real_data_skips_with_its_name(real_path: Callable[[str], Path]) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no/such\.jsonl"):
        real_path("no/such.jsonl")
