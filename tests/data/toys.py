"""Tokenizers and files made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)


def tokenizer(
    *,
    eos: str | None = "</s>",
    bos: str | None = None,
    pad: str | None = None,
    space: bool = False,
    template: str | None = None,
    special: Sequence[str] = (),
    add_eos: bool = False,
    corpus: Iterable[str] = (),
    merges: int = 0,
    **settings: Any,
) -> Any:
    """A byte-level fast tokenizer.

    `bos` and `add_eos`: what it puts around a text by itself. `space`: begins every text with one, as SentencePiece.
    `merges`: so many are learnt from `corpus`; without, a token is a byte.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([]) if merges else pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    names = [name for name in dict.fromkeys((pad, bos, eos, *special)) if name is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(names) + merges,
        special_tokens=names,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(list(corpus) if merges else [], trainer)
    core.decoder = decoders.ByteLevel()
    if space:
        core.normalizer = normalizers.Prepend(" ")
    if bos is not None or add_eos:
        around = f"{bos or ''} $A {eos if add_eos else ''}".strip()
        used = [name for name in (bos, eos if add_eos else None) if name]
        core.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(name, core.token_to_id(name)) for name in dict.fromkeys(used)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        bos_token=bos,
        pad_token=pad,
        additional_special_tokens=list(special),
        **settings,
    )
    if template is not None:
        made.chat_template = template
    return made


@dataclass(frozen=True)
class Data:
    """Stands for the recipe's block `data`."""

    path: str = ""
    test_path: str | None = None
    type: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    max_length: int | None = 1024
    chat_template: str = "auto"
    val_set_size: float | None = 0.1
    test_set_size: float | None = None
    limit: int | None = None
    cache: bool = True
    train_on_inputs: bool = False
    name: str | None = None


@dataclass(frozen=True)
class Split:
    """Stands for the recipe's block `split`."""

    kind: str = "iid"
    clients: int | None = 3
    alpha: float | None = None
    column: str | None = None
    shards_per_client: int | None = None
    min_rows: int | None = None


def alpaca_rows(number: int, categories: Sequence[str] = (), first: int = 0) -> list[dict[str, Any]]:
    """Distinct rows of different lengths."""
    rows = []
    for i in range(first, first + number):
        row: dict[str, Any] = {
            "instruction": f"say number {i}",
            "input": "" if i % 2 else f"like this {i}",
            "output": f"number {i} " + "so " * (i * 7 % 23) + "it is",
        }
        if categories:
            row["category"] = categories[i % len(categories)]
        rows.append(row)
    return rows


def write(path: Path, rows: Sequence[Any]) -> str:
    """Write rows as .jsonl or .json, by the name."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
