"""Write the table of bytes in docs/adapters.md: what each kind of adapter sends on the shape of LLaMA-7B.

python tools/write_bytes_table.py

The model is a shape without numbers (torch's meta device), so this takes seconds and no memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fedloom.compress import cast
from fedloom.models.load import Base
from fedloom.runtimes.payload import broadcast_bytes, upload_bytes
from fedloom.study.blocks import DataRecipe
from fedloom.study.build import ADAPTERS, TRAINING_METRICS, algorithm_of
from fedloom.study.recipe import Recipe
from fedloom.types import Client, Site, State

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adapters.md"
START, END = "<!-- bytes: written by tools/write_bytes_table.py -->\n", "<!-- end of bytes -->\n"

# What is in the table besides each kind as it is when nothing is said.
ROWS: tuple[dict[str, Any], ...] = (
    {"kind": "lora", "lora_r": 16, "lora_target_modules": "all-linear"},
    {"kind": "prompt_tuning", "num_virtual_tokens": 8},
    {"kind": "p_tuning", "encoder_hidden_size": 128},
    {"kind": "p_tuning", "encoder_reparameterization_type": "lstm", "encoder_hidden_size": 128},
)
OTHERWISE = ("seed_space",)  # what these send does not depend on the model


class Row(NamedTuple):
    """One adapter's sizes: numbers trained, bytes of their tensors in 16 bits, and of whole messages."""

    settings: dict[str, Any]
    numbers: int
    tensor_bytes: int
    up: int
    down: int


def llama_7b() -> Base:
    """The shape of LLaMA-7B in float16."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig()).half()
    count = sum(leaf.numel() for leaf in model.parameters())
    return Base(model, None, "llama-7b", torch.float16, count)


def tree_of(base: Base, recipe: Recipe) -> tuple[Any, dict[str, Tensor]]:
    """(adapter, shapes of its parameters)."""
    adapter = ADAPTERS[recipe.adapter.kind](base, recipe.adapter)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.nn.init.trunc_normal_"):  # it looks at its draws
            tree = adapter.init(0)
    except DataDependentOutputException:  # words are drawn, and looked up
        tree = adapter.init(0)
    return adapter, {name: torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") for name, leaf in tree.items()}


def row(base: Base, settings: dict[str, Any]) -> Row:
    """The sizes of one kind's messages of one client and round, in 16 bits both ways, by the codec."""
    block: Any = settings
    recipe = Recipe(model="llama-7b", data=DataRecipe(path="-"), adapter=block, local_steps=1)
    adapter, tree = tree_of(base, recipe)
    client = Client("client_0", ())
    site = Site(0, 0, client.id, (client.id,))
    algorithm = algorithm_of(recipe)
    narrowed = {name: leaf[None] for name, leaf in adapter.narrow(tree, client).items()}
    delta_C, _ = algorithm.client.finish(narrowed, algorithm.client.init(narrowed, {}, [site]))
    half = cast("float16")
    sent = half.encode({name: leaf[0] for name, leaf in delta_C.items()}, site)
    up = upload_bytes(sent, 1.0, dict.fromkeys(TRAINING_METRICS, 0.0))
    down = broadcast_bytes(State(0, 0, tree, None), half.encode(tree, site), site)
    return Row(
        {**settings, "kind": recipe.adapter.kind},
        sum(leaf.numel() for leaf in tree.values()),
        sum(leaf.numel() * leaf.itemsize for leaf in sent.values()),
        up,
        down,
    )


def rows() -> list[Row]:
    base = llama_7b()
    kinds: dict[str, list[dict[str, Any]]] = {kind: [{"kind": kind}] for kind in ADAPTERS if kind not in OTHERWISE}
    for more in ROWS:
        kinds[more["kind"]].append(more)
    return [row(base, settings) for several in kinds.values() for settings in several]


def amount(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number} B"


def table(found: list[Row]) -> str:
    lines = [
        "| adapter | trained numbers | tensors | up, bytes | down, bytes |",
        "|---|--:|--:|--:|--:|",
    ]
    for one in found:
        more = ", ".join(f"{key} {value}" for key, value in one.settings.items() if key != "kind")
        name = f"`{one.settings['kind']}`" + (f", {more}" if more else "")
        lines.append(f"| {name} | {one.numbers:,} | {amount(one.tensor_bytes)} | {one.up:,} | {one.down:,} |")
    return "\n".join(lines) + "\n"


def document(text: str, found: list[Row]) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table(found) + END + after


if __name__ == "__main__":
    PAGE.write_text(document(PAGE.read_text(encoding="utf-8"), rows()), encoding="utf-8")
    print(f"wrote {PAGE}")
