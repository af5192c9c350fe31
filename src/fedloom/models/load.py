"""Load a frozen base model: the built-in one, a folder, or a name on a model hub.

Nothing is ever unpickled: weights are safetensors or they are refused. Loading is strict: a weight that is missing,
left over or of another shape is an error, never a warning and a random matrix.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom.errors import UserError
from fedloom.hub import hub_is_offline
from fedloom.models import quantised
from fedloom.ops.attention import use_fast_attention

__all__ = [
    "BUILTIN",
    "Base",
    "builtin_folder",
    "hardware_dtype",
    "load_base",
    "load_tokenizer",
    "random_base",
    "stop_ids",
    "train_tokenizer",
]

BUILTIN = "builtin"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
# Tokens that models carry for padding although their tokenizer does not name one, in order of preference.
_SPARE_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|endoftext|>")

logger = logging.getLogger("fedloom")


@dataclass(frozen=True)
class Base:
    """A frozen causal language model: eval mode, no gradients, no key/value cache, and its tokenizer.

    The tokenizer always has a pad token. It is another one than the end token whenever the vocabulary allows it, so
    nobody who masks padding masks the end by accident and gets a model that never stops.
    """

    model: nn.Module
    tokenizer: Any
    name: str  # as asked for: "builtin", a folder, a hub id
    dtype: torch.dtype
    num_parameters: int
    folder: str | None = None  # where its files lie (of a hub id: in the cache), None for a model of `random_base`
    dtype_reason: str = ""  # why this dtype, in words
    quantization: str = "none"  # of its layers: none, int8 or nf4

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_base(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    quantization: str = "none",
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
) -> Base:
    """Load the base model `name`: "builtin", a folder in the Hugging Face layout, or a hub id.

    `dtype` is float32, bfloat16, float16, float64 or auto (see `hardware_dtype`). Training in float16 needs its loss
    scaled (`ops.loss_scale`). `quantization` stores the layers in 8 or 4 bits (`models.quantised`); they compute in
    `dtype`.

    Raises:
        UserError: there is no such model, it is no causal language model, its weights do not fit its config, it is
            not in safetensors, quantised already, or it needs its own code and `trust_remote_code` is not set. The hint
            says the way out.
    """
    quantised.check_installed(quantization)
    device = torch.device(device)
    wanted, reason = _choose_dtype(dtype, device)
    source, offline = _locate(name)
    if isinstance(source, Path):
        _check_folder(source, name)
    config = _load_config(source, name, offline=offline, trust_remote_code=trust_remote_code)
    _check_causal(config, name)
    _check_unquantised(config, name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    more: dict[str, Any] = {}
    if quantization != "none":  # each file's weights are packed as they are read, where they are to be
        more = {"quantization_config": quantised.settings_of(quantization, wanted), "device_map": {"": device}}
    model = _load_model(
        source, name, config, dtype=wanted, offline=offline, trust_remote_code=trust_remote_code, more=more
    )
    _check_vocabulary(model, tokenizer, name)
    if quantization == "none":
        model = model.to(device)
    elif not quantised.pinned_forward(model):
        raise UserError(
            f"quantization is {quantization}, but {name} has no layer that could be stored so",
            hint="quantization=none",
            code="model.quantization",
        )
    _freeze(model)
    use_fast_attention(model)
    count = quantised.num_parameters(model)
    folder = _folder_of(source)
    return Base(model, tokenizer, name, wanted, count, folder, dtype_reason=reason, quantization=quantization)


def load_tokenizer(name: str, *, trust_remote_code: bool = False, pad: bool = True) -> Any:
    """Load only the tokenizer of `name`; `pad=False` leaves it as its makers saved it (for export).

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    source, offline = _locate(name)
    if isinstance(source, Path) and not any((source / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(
            f"model {name}: the folder has no tokenizer ({_listing(source)})",
            hint=f"expected tokenizer.json and tokenizer_config.json in {source}",
            code="model.tokenizer",
        )
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                str(source), trust_remote_code=trust_remote_code, local_files_only=offline
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        _refuse_remote_code(error, name)
        raise UserError(
            f"model {name}: its tokenizer cannot be read: {_first_line(error)}",
            hint="expected a fast tokenizer (tokenizer.json), as save_pretrained writes it",
            code="model.tokenizer",
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model {name}: its tokenizer names no end token, so a tuned model could never stop",
            hint='set "eos_token" in tokenizer_config.json',
            code="model.tokenizer",
        )
    if pad:
        _set_pad_token(tokenizer)
    return tokenizer


def builtin_folder() -> Path:
    """Where the built-in base lies inside the installed package.

    Raises:
        UserError: the installation lacks it.
    """
    folder = Path(str(files("fedloom.models").joinpath("builtin_base")))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"the built-in base is not in this installation: no {folder / 'config.json'}",
            hint="install fedloom again: pip install --force-reinstall fedloom",
            code="model.builtin",
        )
    return folder


def hardware_dtype(device: torch.device | str = "cpu") -> tuple[torch.dtype, str]:
    """(dtype, why): bfloat16 only where the hardware multiplies in it, not where it is emulated; float16 on GPUs that
    multiply in that alone; else float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bfloat16: the GPU multiplies in it"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (7, 0):
            return torch.float16, "float16 with loss scaling: the GPU multiplies in it, and not in bfloat16"
        return torch.float32, "float32: this GPU multiplies neither in bfloat16 nor, faster than in float32, in float16"
    if device.type == "cpu":
        feature = _cpu_bfloat16()
        if feature:
            return torch.bfloat16, f"bfloat16: the processor has {feature}"
        return torch.float32, "float32: the processor has no bfloat16 instructions"
    return torch.float32, f"float32: nothing is known about bfloat16 on {device.type}"


def stop_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends an answer: the tokenizer's, those of the model's configs, and the chat template's.

    Chat models end a turn with another token than a text, and say so in one of four places.
    """
    found: list[int] = []

    def add(value: Any) -> None:
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int) and item not in found:
                found.append(item)

    add(tokenizer.eos_token_id)
    add(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    add(getattr(getattr(model, "config", None), "eos_token_id", None))
    add(_end_of_turn(tokenizer))
    return tuple(found)


def random_base(
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    vocab_size: int = 512,
    max_positions: int = 512,
    text: Iterable[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tie_word_embeddings: bool = True,
) -> Base:
    """A Llama with random weights and a tokenizer made on the spot, for tests and benchmarks.

    The tokenizer is byte level; `text` trains merges up to `vocab_size`. torch's global random state stays as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(text or (), vocab_size=vocab_size, max_length=max_positions)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size if intermediate_size is not None else hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads if num_kv_heads is not None else num_heads,
        max_position_embeddings=max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tie_word_embeddings,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model = model.to(dtype)
    _freeze(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    return Base(model, tokenizer, "random", dtype, count, folder=None, dtype_reason="as asked for")


def train_tokenizer(text: Iterable[str], *, vocab_size: int = 512, max_length: int = 512) -> Any:
    """A byte-level BPE tokenizer with <s>, </s>, <unk> and <pad>; any text survives encoding and decoding.

    Raises:
        UserError: `vocab_size` is too small for 256 bytes and four special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(special) + len(alphabet)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}, but bytes and special tokens need {smallest}", code="model.vocab_size"
        )
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_length,
    )


# ---- finding ---------------------------------------------------------------------------------------------------------


def _locate(name: str) -> tuple[Path | str, bool]:
    """(a folder or a hub id, whether the network must be left alone)."""
    if name == BUILTIN:
        return builtin_folder(), True
    path = Path(name).expanduser()
    if path.is_dir():
        return path, True
    if path.exists():
        raise UserError(
            f"model {name} is a file",
            hint=f"give the folder that holds config.json and the weights: model={path.parent}",
            code="model.not_a_folder",
        )
    if not _may_be_hub_id(name):
        near = sorted(p.name for p in path.parent.iterdir() if p.is_dir())[:12] if path.parent.is_dir() else []
        there = f"{path.parent} has " + ", ".join(near) if near else f"{path.parent} has no folders"
        raise UserError(f"model {name}: no such folder", hint=there, code="model.no_folder")
    if _is_cached(name):
        return name, hub_is_offline()
    if hub_is_offline():
        raise UserError(
            f"model {name}: there is no such folder, and the model hub cannot be reached from here",
            hint=_download_hint(name),
            code="model.offline",
        )
    return name, False


def _may_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    return 0 < len(parts) <= 2 and all(parts) and not name.startswith((".", "~", "/")) and "\\" not in name


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _folder_of(source: Path | str) -> str:
    """Where the files of a loaded model lie; those of a hub id are in the cache by now."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(source, Path):
        return str(source)
    config = try_to_load_from_cache(source, "config.json")
    return str(Path(config).parent) if isinstance(config, str) else source


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, name: str) -> None:
    """The files that must be there, before anything is read."""
    present = sorted(path.name for path in folder.iterdir())
    if not (folder / "config.json").is_file():
        if "adapter_config.json" in present:
            base = _json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
            raise UserError(
                f"model {name} is a PEFT adapter, not a model",
                hint=f"give the base: model={base}",
                code="model.is_adapter",
            )
        if any(file.endswith(".gguf") for file in present):
            raise UserError(
                f"model {name} holds GGUF files, which cannot be tuned here",
                hint="give the model in the Hugging Face layout: config.json and safetensors",
                code="model.gguf",
            )
        raise UserError(
            f"model {name}: the folder has no config.json ({_listing(folder)})",
            hint="expected config.json, model.safetensors and tokenizer.json",
            code="model.no_config",
        )
    if (folder / _SINGLE).is_file():
        return
    if (folder / _INDEX).is_file():
        shards = set(_json(folder / _INDEX).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing or not shards:
            raise UserError(
                f"model {name}: {len(missing)} of {len(shards)} weight files of {_INDEX} are missing: "
                + ", ".join(missing[:4]),
                hint="copy or download them again",
                code="model.no_weights",
            )
        return
    if any(file.startswith("pytorch_model") and file.endswith((".bin", ".json")) for file in present):
        raise UserError(
            f"model {name} has its weights as pickles (pytorch_model.bin) only; fedloom does not unpickle",
            hint="convert them where you trust the file: "
            f'python -c "from transformers import AutoModelForCausalLM as M; p = {str(folder)!r}; '
            'M.from_pretrained(p).save_pretrained(p)"',
            code="model.pickled",
        )
    raise UserError(
        f"model {name}: the folder has no weights ({_listing(folder)})",
        hint=f"expected {_SINGLE}, or {_INDEX} with its parts, in {folder}",
        code="model.no_weights",
    )


def _load_config(source: Path | str, name: str, *, offline: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if isinstance(source, Path):
        raw = _json(source / "config.json")
        if "auto_map" in raw and not trust_remote_code and not _is_known(raw.get("model_type")):
            _refuse_remote_code(None, name)
        if not raw.get("model_type"):
            raise UserError(
                f'model {name}: config.json names no "model_type"',
                hint='add it, for example "model_type": "llama"',
                code="model.architecture",
            )
    try:
        with _quiet():
            return AutoConfig.from_pretrained(
                str(source), trust_remote_code=trust_remote_code, local_files_only=offline
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        _refuse_remote_code(error, name)
        if isinstance(source, Path):
            import transformers

            kind = _json(source / "config.json").get("model_type")
            if not _is_known(kind):
                raise UserError(
                    f"model {name}: the architecture {kind!r} is unknown to transformers {transformers.__version__}",
                    hint="a newer transformers may know it: pip install --upgrade transformers",
                    code="model.architecture",
                ) from error
            raise UserError(
                f"model {name}: config.json cannot be used: {_first_line(error)}", code="model.no_config"
            ) from error
        raise _hub_error(error, name) from error


def _check_causal(config: Any, name: str) -> None:
    """Refuse what is no causal language model, by its type and by the class its weights were saved from."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = tuple(getattr(config, "architectures", None) or ())
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    named = [a for a in architectures if a == expected or "CausalLM" in a or "LMHeadModel" in a]
    if remote or (expected is not None and (named or not architectures)):
        return
    what = architectures[0] if architectures else config.model_type
    raise UserError(
        f"model {name} is a {what}, not a causal language model",
        hint="fedloom tunes models that AutoModelForCausalLM loads: Llama, Qwen, Mistral, Gemma, Phi, GPT-2, OPT, ...",
        code="model.not_causal",
    )


def _check_unquantised(config: Any, name: str) -> None:
    own = getattr(config, "quantization_config", None)
    if own is None:
        return
    method = own.get("quant_method") if isinstance(own, Mapping) else getattr(own, "quant_method", None)
    raise UserError(
        f"model {name} holds weights that are quantised already ({method or 'by an unknown method'})",
        hint="give the model in full precision: quantization=nf4 or int8 packs it as it is read",
        code="model.quantization",
    )


def _load_model(
    source: Path | str,
    name: str,
    config: Any,
    *,
    dtype: torch.dtype,
    offline: bool,
    trust_remote_code: bool,
    more: Mapping[str, Any],
) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    def load(**attention: Any) -> tuple[nn.Module, Mapping[str, Any]]:
        with _quiet():
            loaded: tuple[nn.Module, Mapping[str, Any]] = AutoModelForCausalLM.from_pretrained(
                str(source),
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                local_files_only=offline,
                # Shapes that do not fit come back by name and are refused below; they never become random weights.
                ignore_mismatched_sizes=True,
                **attention,
                **more,
            )
        return loaded

    try:
        try:
            model, info = load(attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, info = load(attn_implementation="eager")
    except SafetensorError as error:
        raise UserError(
            f"model {name}: a weight file is damaged or cut short: {_first_line(error)}",
            hint="copy or download it again",
            code="model.damaged",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        _refuse_remote_code(error, name)
        if not isinstance(source, Path):
            raise _hub_error(error, name) from error
        raise UserError(f"model {name} cannot be loaded: {_first_line(error)}", code="model.load") from error
    problems = _loading_problems(info)
    if problems:
        raise UserError(
            f"model {name}: the weights do not fit its config.json:\n  - " + "\n  - ".join(problems),
            hint="config.json and the weights must come from the same model",
            code="model.mismatch",
        )
    return model


def _loading_problems(info: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, what in (("missing_keys", "missing from the file"), ("unexpected_keys", "in the file but unknown")):
        keys = sorted(str(item) for item in info.get(key) or ())
        if keys:
            problems.append(f"{len(keys)} {what}: {_some(keys)}")
    mismatched = sorted(tuple(item) for item in info.get("mismatched_keys") or ())
    if mismatched:
        shown = [f"{key} is {list(had)} in the file, {list(wants)} in the model" for key, had, wants in mismatched]
        problems.append(f"{len(shown)} of another shape: {_some(shown)}")
    problems.extend(str(message) for message in info.get("error_msgs") or ())
    return problems


def _check_vocabulary(model: nn.Module, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise UserError(
            f"model {name}: its tokenizer has token {highest}, but the model has embeddings for {rows} tokens only",
            hint="the tokenizer is another model's: copy the one that belongs to these weights",
            code="model.vocabulary",
        )


# ---- small parts -----------------------------------------------------------------------------------------------------


def _freeze(model: nn.Module) -> None:
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False  # type: ignore[union-attr]


def _choose_dtype(dtype: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    if isinstance(dtype, torch.dtype):
        return dtype, "as asked for"
    if dtype == "auto":
        chosen, reason = hardware_dtype(device)
        logger.info("dtype %s", reason)
        return chosen, reason
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, but must be one of auto, {', '.join(DTYPES)}", code="model.dtype")
    return DTYPES[dtype], "as asked for"


def _cpu_bfloat16() -> str:
    """The name of the instructions that multiply bfloat16 matrices, or nothing."""
    capabilities: dict[str, Any] = {}
    with contextlib.suppress(AttributeError, RuntimeError):
        capabilities = dict(torch.cpu.get_capabilities())
    for key, label in (("amx_bf16", "AMX"), ("amx_tile", "AMX"), ("avx512_bf16", "AVX-512 BF16"), ("bf16", "BF16")):
        if capabilities.get(key):
            return label
    with contextlib.suppress(AttributeError, RuntimeError):
        if torch.cpu._is_amx_tile_supported():
            return "AMX"
        if torch.cpu._is_avx512_bf16_supported():
            return "AVX-512 BF16"
    return ""


def _set_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a pad token other than its end token, without adding one to the vocabulary.

    Only when there is no other token at all does the end token pad. fedloom's own labels are made from lengths,
    never from comparing with the pad token, so even then the end of an answer is learnt.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != eos:
        return
    vocabulary = tokenizer.get_vocab()
    candidates: Sequence[str | None] = (tokenizer.unk_token, *_SPARE_PAD_TOKENS, tokenizer.bos_token)
    for token in candidates:
        if token is not None and vocabulary.get(token) not in (None, eos):
            tokenizer.pad_token = token
            return
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right behind an answer, if there is a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    mark = "fedloom-answer"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template is a program of the model's makers and may raise anything
        logger.warning("the chat template cannot be rendered: %s", _first_line(error))
        return None
    ids = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"] if mark in text else []
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return int(ids[0]) if ids and ids[0] in special else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no loading report on stderr: what matters in it becomes an error of ours."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    report = logging.getLogger("transformers.modeling_utils")
    level = report.level
    report.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        report.setLevel(level)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _is_known(model_type: str | None) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _refuse_remote_code(error: Exception | None, name: str) -> None:
    """Turn "contains custom code" into our own words; other errors pass by."""
    if error is not None and "trust_remote_code" not in str(error):
        return
    raise UserError(
        f"model {name} brings its own code, and running it is not allowed",
        hint="read that code; if you trust it, set trust_remote_code: true",
        code="model.remote_code",
    ) from error


def _hub_error(error: Exception, name: str) -> UserError:
    text = str(error)
    if "gated" in text.casefold() or "401" in text or "403" in text:
        return UserError(
            f"model {name}: the hub wants a log-in, or there is no such model",
            hint="accept its licence on its page and log in: hf auth login",
            code="model.gated",
        )
    if "safetensors" in text and "no file named" in text.casefold():
        return UserError(f"model {name} has no safetensors weights on the hub", code="model.pickled")
    if "not a valid model identifier" in text or "404" in text:
        return UserError(f"model {name}: neither a folder here nor a model on the hub", code="model.unknown")
    return UserError(
        f"model {name} cannot be loaded from the hub: {_first_line(error)}",
        hint=_download_hint(name),
        code="model.hub",
    )


def _download_hint(name: str) -> str:
    short = name.rpartition("/")[2]
    return f"download it where there is a network: hf download {name} --local-dir {short}, then model={short}"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON: {_first_line(error)}", code="model.json") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", code="model.json")
    return value


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return "it is empty" if not names else "it has " + _some(names, 8)


def _some(items: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
