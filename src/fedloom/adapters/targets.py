"""Which layers an adapter goes to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import UserError, suggest

# PEFT's own defaults for causal LMs (its TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING); tests compare the two
LORA_DEFAULTS: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "falcon": ("query_key_value",),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "mpt": ("Wqkv",),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "stablelm": ("q_proj", "v_proj"),
}


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (and the quantised layers derived from it) or GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, whichever way round its weight lies."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Layers by full name, for "auto" (PEFT's default of the architecture), "all-linear", or names.

    A name matches a layer as PEFT has it: the whole path, or its end after a dot.

    Raises:
        UserError: the architecture has no default, or a name matches no layer; the message says what there is.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: layer for name, layer in model.named_modules() if is_linear(layer) and layer is not output}
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if targets == "all-linear":
        return linear
    if targets == "auto":
        kind = str(getattr(getattr(model, "config", None), "model_type", ""))
        if kind not in LORA_DEFAULTS:
            raise UserError(
                f"no default LoRA layers are known for model type {kind or 'unknown'!r}; its linear layers end in: "
                + ", ".join(endings),
                hint="adapter.lora_target_modules=all-linear",
                code="adapter.targets",
            )
        targets = LORA_DEFAULTS[kind]
    names = [targets] if isinstance(targets, str) else list(targets)
    found: dict[str, nn.Module] = {}
    problems = []
    for target in names:
        hits = {name: layer for name, layer in linear.items() if name == target or name.endswith("." + target)}
        if not hits:
            problems.append(f"{target!r} matches no linear layer{suggest(target, endings)}")
        found.update(hits)
    if problems:
        raise UserError(
            "adapter.lora_target_modules: " + "; ".join(problems),
            hint=f"this model's linear layers end in: {', '.join(endings)}",
            code="adapter.targets",
        )
    return {name: layer for name, layer in linear.items() if name in found}  # in the model's own order
