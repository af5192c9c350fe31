"""The settings of a PEFT adapter folder, whoever wrote it, as those of a recipe's adapter.

Which layers are adapted, and at which rank, is read off the tensors: a folder may have chosen its layers by regular
expressions, numbers of layers or exclusions. What is not read here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import UserError
from fedloom.models.peft_folder import PEFT_PREFIX, WEIGHTS
from fedloom.ops.low_rank import A
from fedloom.ops.ranks import matched
from fedloom.study.blocks import AdapterRecipe

__all__ = ["settings_of_peft"]

Shapes = Mapping[str, tuple[int, ...]]  # of the folder's tensors, by name

# Settings of LoRA that change what it computes, and are not computed here.
_OTHER_LORA = (
    "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip
_PLAIN_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")  # that leave the base as it is


def _lora(config: Mapping[str, Any], shapes: Shapes) -> AdapterRecipe:
    found = [key for key in _OTHER_LORA if config.get(key)]
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_STARTS:
        found.append(
            f"init_lora_weights {start} (it changes the base: save it with path_initial_model_for_weight_conversion)"
        )
    if found:
        raise UserError(f"LoRA with {', '.join(found)} is not read here", code="adapter.config")
    ranks = {_layer(name, f".{A}"): shape[0] for name, shape in shapes.items() if name.endswith(f".{A}")}
    if not ranks:
        raise UserError("no layer has lora_A.weight and lora_B.weight", code="adapter.config")
    alphas = {name: matched(config.get("alpha_pattern") or {}, name, config["lora_alpha"]) for name in ranks}
    return AdapterRecipe(
        kind="dora" if config.get("use_dora") else "lora",
        lora_r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_target_modules=list(ranks),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != config["r"]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != config["lora_alpha"]},
        bias=config.get("bias") or "none",
    )


def _ia3(config: Mapping[str, Any], shapes: Shapes) -> AdapterRecipe:
    if config.get("modules_to_save"):
        raise UserError("IA3 with modules_to_save is not read here", code="adapter.config")
    vectors = {_layer(name, ".ia3_l"): shape for name, shape in shapes.items() if name.endswith(".ia3_l")}
    if not vectors:
        raise UserError("no layer has ia3_l", code="adapter.config")
    return AdapterRecipe(
        kind="ia3",
        ia3_target_modules=list(vectors),
        ia3_feedforward_modules=[name for name, shape in vectors.items() if shape[0] == 1] or "none",
    )


def _p_tuning(config: Mapping[str, Any], shapes: Shapes) -> AdapterRecipe:
    """The folder holds the embeddings alone; the encoder is the one that made them."""
    encoder = str(config.get("encoder_reparameterization_type") or "mlp").lower()
    return AdapterRecipe(
        kind="p_tuning",
        num_virtual_tokens=config["num_virtual_tokens"],
        encoder_reparameterization_type=encoder,  # type: ignore[arg-type]
        encoder_hidden_size=config.get("encoder_hidden_size"),
    )


_KINDS: Mapping[str, Callable[[Mapping[str, Any], Shapes], AdapterRecipe]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "PROMPT_TUNING": lambda c, _: AdapterRecipe(kind="prompt_tuning", num_virtual_tokens=c["num_virtual_tokens"]),
    "P_TUNING": _p_tuning,
    "PREFIX_TUNING": lambda c, _: AdapterRecipe(kind="prefix_tuning", num_virtual_tokens=c["num_virtual_tokens"]),
    "FEDLOOM_BOTTLENECK": lambda c, _: AdapterRecipe(  # our own: PEFT has no such kind
        kind="bottleneck",
        bottleneck_size=c["bottleneck_size"],
        non_linearity=c["non_linearity"],
        bottleneck_after=c["bottleneck_after"],
    ),
}


def settings_of_peft(config: Mapping[str, Any], folder: Path) -> AdapterRecipe:
    """An adapter's settings.

    Raises:
        UserError: a kind or a setting that is not read here. KeyError, TypeError, ValueError: it is no such config.
    """
    kind = str(config["peft_type"])
    if kind not in _KINDS:
        raise UserError(f"a {kind} adapter is not read here; {', '.join(_KINDS)} are", code="adapter.config")
    return _KINDS[kind](config, _shapes(folder / WEIGHTS))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors, without reading them."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        pickled = file.with_suffix(".bin")
        hint = f"it is pickled ({pickled.name}), and nothing is unpickled here: save it as safetensors with PEFT"
        raise UserError(f"{file.parent}: there is no {file.name}", hint if pickled.is_file() else "", "adapter.missing")
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file}: {error}", "copy the folder again", "adapter.damaged") from error


def _layer(name: str, end: str) -> str:
    if not name.startswith(PEFT_PREFIX):
        raise UserError(f"{name} is not named as PEFT names tensors ({PEFT_PREFIX}...)", code="adapter.config")
    return name.removeprefix(PEFT_PREFIX).removesuffix(end)
