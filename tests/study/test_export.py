"""Exports against PEFT itself: an adapter made by PEFT opens here, and merges into what PEFT merges it into."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from fedloom.errors import UserError
from fedloom.models.load import load_base, train_tokenizer
from fedloom.study.tuned import export_lora, export_merged, open_tuned

IDS = torch.arange(4, 44).reshape(2, 20)


LLAMA = {
    "lora": peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"]),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=12,
        use_rslora=True,
        target_modules=r".*\.(q_proj|down_proj)",
        exclude_modules=["layers.0.self_attn.q_proj"],
        rank_pattern={"down_proj": 2, "nowhere": 7},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 5, "nowhere": 3},
        init_lora_weights="gaussian",
    ),
    "one_layer": peft.LoraConfig(r=2, lora_alpha=9, target_modules=["v_proj"], layers_to_transform=[1]),
    "dora": peft.LoraConfig(r=3, lora_alpha=12, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "ia3": peft.IA3Config(),
    "ia3_named": peft.IA3Config(target_modules=["o_proj", "up_proj"], feedforward_modules=[]),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=3),
    "p_tuning": peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
    ),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
}
GPT2 = {
    "lora": peft.LoraConfig(r=3, lora_alpha=12, target_modules=["c_attn"], fan_in_fan_out=True),
    "bias_all": peft.LoraConfig(r=3, lora_alpha=12, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"),
    "bias_lora_only": peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=["mlp.c_fc"], fan_in_fan_out=True, bias="lora_only", use_dora=True
    ),
    "ia3": peft.IA3Config(fan_in_fan_out=True),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=3),
}
CASES = [*(("llama", kind) for kind in LLAMA), *(("gpt2", kind) for kind in GPT2)]
VIRTUAL = ("prompt_tuning", "p_tuning", "prefix_tuning")


@pytest.fixture(params=CASES, ids="-".join)
def adapter_of_peft(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Callable[..., Any],
    tiny_gpt2: Callable[..., Any],
) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote, and the logits of PEFT's model."""
    monkeypatch.chdir(tmp_path)
    shape, kind = request.param
    model = (tiny_llama if shape == "llama" else tiny_gpt2)(vocab_size=300)
    model.save_pretrained("model")
    train_tokenizer([], vocab_size=300).save_pretrained("model")
    config = copy.deepcopy((LLAMA if shape == "llama" else GPT2)[kind])
    config.task_type, config.base_model_name_or_path = "CAUSAL_LM", "model"
    tuned = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained("model"), config).eval()
    draw = torch.Generator().manual_seed(1)
    for leaf in tuned.parameters():
        if leaf.requires_grad:
            leaf.data += 0.3 * torch.randn(leaf.shape, generator=draw)
    tuned.save_pretrained("adapter")
    with torch.no_grad():
        return Path("adapter"), logits_of(tuned)


def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found[:, -IDS.shape[1] :]  # PEFT leaves the virtual tokens' in


def test_it_opens_with_pefts_logits(adapter_of_peft: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = adapter_of_peft
    tuned = open_tuned(folder, dtype="float32")
    with torch.no_grad():
        with tuned.adapter.bound({name: leaf[None] for name, leaf in tuned.tree.items()}) as model:
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        assert float((tuned.base.model(input_ids=IDS).logits - wanted).abs().max()) > 0.03


def test_what_is_exported_has_pefts_logits_again(adapter_of_peft: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = adapter_of_peft
    export_lora(folder, Path("again"))
    plain = transformers.AutoModelForCausalLM.from_pretrained("model")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(plain, "again").eval()
        torch.testing.assert_close(logits_of(again), wanted, rtol=1e-4, atol=1e-4)


def test_merged_is_a_plain_model_with_pefts_logits(adapter_of_peft: tuple[Path, torch.Tensor]) -> None:
    folder, wanted = adapter_of_peft
    if open_tuned(folder, dtype="float32").adapter.kind in VIRTUAL:  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="has nothing to add to the weights"):
            export_merged(folder, Path("merged"))
        assert not Path("merged").exists()
        return
    assert export_merged(folder, Path("merged")) < 1e-4
    with torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained("merged")
        torch.testing.assert_close(plain(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    ours = transformers.AutoTokenizer.from_pretrained("merged")
    assert ours("abc")["input_ids"] == transformers.AutoTokenizer.from_pretrained("model")("abc")["input_ids"]
    assert load_base("merged").num_parameters == load_base("model").num_parameters


def test_what_peft_adapters_have_that_is_not_read_is_named(tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(vocab_size=300)
    for config, words in (
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "LoRA with modules_to_save"),
        (peft.LoraConfig(target_modules=["q_proj"], lora_bias=True), "LoRA with lora_bias"),
        (peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights pissa"),
        (peft.LoraConfig(target_modules=["embed_tokens"]), "no layer has lora_A.weight"),
        (peft.LoraConfig(target_modules=["embed_tokens", "q_proj"]), "unexpected model.embed_tokens.lora_embedding_A"),
        (peft.LoHaConfig(target_modules=["q_proj"]), "a LOHA adapter is not read here; LORA, IA3, PROMPT_TUNING"),
    ):
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "adapter")
        model.save_pretrained(tmp_path / "model")
        train_tokenizer([], vocab_size=300).save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=words):
            open_tuned(tmp_path / "adapter", model=str(tmp_path / "model"))
        shutil.rmtree(tmp_path / "adapter")
