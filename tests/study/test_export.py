"""Exports against PEFT itself: an adapter made by PEFT opens here, and merges into what PEFT merges it into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fedloom.models.load import load_base, train_tokenizer
from fedloom.study.tuned import export_lora, export_merged, open_tuned

IDS = torch.arange(4, 44).reshape(2, 20)


@pytest.fixture(params=["llama", "gpt2"])
def adapter_of_peft(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote, and the logits of PEFT's model."""
    monkeypatch.chdir(tmp_path)
    make, targets = {"llama": (tiny_llama, ["q_proj", "down_proj"]), "gpt2": (tiny_gpt2, ["c_attn"])}[request.param]
    model = make(vocab_size=300)
    model.save_pretrained("model")
    train_tokenizer([], vocab_size=300).save_pretrained("model")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path="model",
        fan_in_fan_out=request.param == "gpt2",
    )
    tuned = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained("model"), config)
    draw = torch.Generator().manual_seed(1)
    for name, leaf in tuned.named_parameters():
        if "lora_" in name:
            leaf.data = 0.3 * torch.randn(leaf.shape, generator=draw)
    tuned.save_pretrained("adapter")
    with torch.no_grad():
        return Path("adapter"), tuned(input_ids=IDS).logits


def test_it_opens_with_pefts_logits(adapter_of_peft: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = adapter_of_peft
    tuned = open_tuned(folder, dtype="float32")
    with torch.no_grad(), tuned.adapter.bound({name: leaf[None] for name, leaf in tuned.tree.items()}) as model:
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_exported_has_pefts_logits_again(adapter_of_peft: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = adapter_of_peft
    export_lora(folder, Path("again"))
    plain = transformers.AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        assert float((plain(input_ids=IDS).logits - wanted).abs().max()) > 0.1
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(plain, "again")(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4
        )


def test_merged_is_a_plain_model_with_pefts_logits(adapter_of_peft: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = adapter_of_peft
    assert export_merged(folder, Path("merged")) < 1e-4
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained("merged")
        torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    ours = transformers.AutoTokenizer.from_pretrained("merged")
    assert ours("abc")["input_ids"] == transformers.AutoTokenizer.from_pretrained("model")("abc")["input_ids"]
    assert load_base("merged").num_parameters == load_base("model").num_parameters
