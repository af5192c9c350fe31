"""What a name of the zoo stands for: its texts, its recipe keys with defaults, and its bytes, computed.

Only `message_sizes` imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from fedloom.errors import UserError, suggest
from fedloom.study.explained import ADAPTERS_EXPLAINED, COMPRESS_EXPLAINED, METHODS_EXPLAINED, Explained
from fedloom.study.methods import METHOD_LINES
from fedloom.study.recipe import BLOCKS, Recipe, resolved_json
from fedloom.study.settings import ADAPTER_DEFAULTS, COMPRESS_DEFAULTS, LOSSY

__all__ = ["NAMES", "Entry", "Key", "Sizes", "entry", "message_sizes"]

Shelf = Literal["method", "adapter", "compress"]
NAMES: Mapping[Shelf, Mapping[str, Explained]] = {
    "method": METHODS_EXPLAINED,
    "adapter": ADAPTERS_EXPLAINED,
    "compress": COMPRESS_EXPLAINED,
}


class Key(NamedTuple):
    """A recipe key that a name has, with what it is when nothing is said."""

    key: str
    default: Any
    about: str


class Entry(NamedTuple):
    """All that is known of a name without computing."""

    shelf: Shelf
    name: str
    about: str
    explained: Explained
    write: Mapping[str, Any]  # what to write in a recipe
    keys: tuple[Key, ...]


def entry(name: str) -> Entry:
    """The entry of a method, an adapter kind or a compression.

    Raises:
        UserError: there is no such name.
    """
    for shelf, names in known().items():
        if name in names:
            write = asked(shelf, name)
            about = METHOD_LINES[name] if shelf == "method" else ""
            return Entry(shelf, name, about, NAMES[shelf][name], write, keys_of(shelf, name))
    every = [name for names in known().values() for name in names]
    raise UserError(f"explain {name}: no such name{suggest(name, every)}", "fedloom explain", "explain.name")


def known() -> dict[Shelf, list[str]]:
    """Every name of the tables."""
    from typing import get_args

    from fedloom.study.settings import Compression

    return {"method": list(METHOD_LINES), "adapter": list(ADAPTER_DEFAULTS), "compress": list(get_args(Compression))}


def asked(shelf: Shelf, name: str) -> dict[str, Any]:
    """The recipe keys that ask for a name."""
    if shelf == "method":
        return {"method": name}
    return {"adapter": {"kind": name}} if shelf == "adapter" else {"compress": {"up": [name]}}


def recipe_of(shelf: Shelf, name: str) -> Recipe:
    """The smallest recipe on the built-in model that has the name at work."""
    values: dict[str, Any] = {"model": "builtin", "local_steps": 10, **asked(shelf, name)}
    if name == "seed_space":
        values["method"] = "fedkseed"  # nothing else trains it
    return Recipe.model_validate(values)


def keys_of(shelf: Shelf, name: str) -> tuple[Key, ...]:
    """A method's are those in which its recipe differs from fedavg's; a kind's are the settings it has."""
    if shelf == "method":
        plain, own = resolved_json(recipe_of("method", "fedavg")), resolved_json(recipe_of(shelf, name))
        blocks = [block for block in BLOCKS if isinstance(own.get(block), dict)]
        found = {
            (block, leaf): value
            for block in blocks
            for leaf, value in own[block].items()
            if value != plain.get(block, {}).get(leaf)
        }
    elif shelf == "adapter":
        found = {("adapter", leaf): value for leaf, value in ADAPTER_DEFAULTS[name].items()}
    else:
        found = {("compress", leaf): value for leaf, value in COMPRESS_DEFAULTS.get(name, {}).items()}
        if name in LOSSY:
            found["compress", "error_feedback"] = recipe_of(shelf, name).compress.error_feedback
    return tuple(
        Key(f"{block}.{leaf}", value, BLOCKS[block].model_fields[leaf].description or "")
        for (block, leaf), value in found.items()
    )


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of one client's messages in the first round, by the codec, on one model."""

    model: str
    trained: int  # numbers
    up: int  # bytes
    down: int


MOST_NUMBERS = 2**28  # beyond it messages are not made, only their numbers counted


def message_sizes(shelf: Shelf, name: str, *, llama: bool = True) -> list[Sizes]:
    """On the built-in model, and on the shapes of LLaMA-7B, for which no weights are needed.

    Messages are those of the first round; where the downlink grows, the texts say so.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedloom.models.load import Base, load_base
    from fedloom.study import build
    from fedloom.types import Client, State

    def sizes(said: str, base: Base) -> Sizes:
        recipe = recipe_of(shelf, name)
        algorithm, adapter = build.algorithm_of(recipe), build.adapter_of(base, recipe)
        params = adapter.init(recipe.seed)
        numbers = sum(leaf.numel() for leaf in params.values())
        if numbers > MOST_NUMBERS:
            size = sum(leaf.numel() * leaf.element_size() for leaf in params.values())
            return Sizes(said, numbers, size, size)
        if base.device.type == "meta":
            params = {key: torch.zeros(leaf.shape, dtype=leaf.dtype) for key, leaf in params.items()}
        state = State(recipe.seed, 0, params, algorithm.server.init(params))
        up, down = build.message_bytes(algorithm, adapter, state, Client("client-1", ()), ("client-1",))
        return Sizes(said, numbers, up, down)

    here = load_base("builtin", dtype="float32")
    found = [sizes("the built-in model", here)]
    if llama:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig())  # its defaults are LLaMA-7B's
        count = sum(weight.numel() for weight in model.parameters())
        found.append(sizes("LLaMA-7B", Base(model.eval(), here.tokenizer, "llama", torch.float32, count)))
    return found
