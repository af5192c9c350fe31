"""Which layers an adapter goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

# PEFT's TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING and ..._FEEDFORWARD_MODULES_MAPPING
IA3_DEFAULTS: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "gemma": ("q_proj", "v_proj", "down_proj"),
    "gemma2": ("q_proj", "v_proj", "down_proj"),
    "gemma3_text": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "llama4": ("q_proj", "v_proj", "down_proj"),
    "mistral": ("k_proj", "v_proj", "down_proj"),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "qwen2": ("q_proj", "v_proj", "down_proj"),
    "qwen3": ("q_proj", "v_proj", "down_proj"),
}
IA3_FEEDFORWARD: dict[str, tuple[str, ...]] = {kind: names[-1:] for kind, names in IA3_DEFAULTS.items()}


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (and the quantised layers derived from it) or GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, whichever way round its weight lies."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a decoder by full name, lowest first.

    Raises:
        UserError: the model has no single stack of as many blocks as its config says.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    number = getattr(config, "num_hidden_layers", None)
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        raise UserError(
            f"this model has {len(stacks)} stacks of {number} layers, where one was looked for",
            hint="adapter.kind: lora works on layers by name, adapter.kind: full on all weights",
            code="adapter.layers",
        )
    stack = model.get_submodule(stacks[0])
    return {f"{stacks[0]}.{name}": block for name, block in stack.named_children()}


def final_norms(model: nn.Module, blocks: dict[str, nn.Module]) -> list[str]:
    """Modules beside the stack of blocks that have vectors only; a norm of the embeddings stands before the blocks."""
    stack = next(iter(blocks)).rpartition(".")[0]
    before = stack.rpartition(".")[0]
    found = []
    for name, module in model.get_submodule(before).named_children():
        leaves = list(module.parameters())
        if leaves and all(leaf.ndim == 1 for leaf in leaves) and "embed" not in name:
            found.append(f"{before}.{name}" if before else name)
    return found


def find_targets(
    model: nn.Module,
    targets: str | Sequence[str],
    defaults: Mapping[str, tuple[str, ...]] = LORA_DEFAULTS,
    key: str = "adapter.lora_target_modules",
) -> dict[str, nn.Module]:
    """Layers by full name, for "auto" (PEFT's default of the architecture), "all-linear", or names.

    A name matches a layer as PEFT has it: the whole path, or its end after a dot.

    Args:
        model: the base.
        targets: see above.
        defaults: of each architecture, for "auto".
        key: of the recipe, for messages.

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
        if kind not in defaults:
            raise UserError(
                f"no default layers are known for model type {kind or 'unknown'!r}; its linear layers end in: "
                + ", ".join(endings),
                hint=f"{key}=all-linear" if defaults is LORA_DEFAULTS else f"name them: {key}",
                code="adapter.targets",
            )
        targets = defaults[kind]
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
            f"{key}: " + "; ".join(problems),
            hint=f"this model's linear layers end in: {', '.join(endings)}",
            code="adapter.targets",
        )
    return {name: layer for name, layer in linear.items() if name in found}  # in the model's own order
