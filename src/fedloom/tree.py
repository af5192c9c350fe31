"""Arithmetic on named tensors, and on the nested states that updates keep.

Shape suffixes: C clients in the cohort axis. A name that ends in `_C` carries that axis first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedloom.types import Tree


def tmap(f: Callable[..., Tensor], *trees: Tree) -> dict[str, Tensor]:
    """Apply `f` leaf by leaf.

    Raises:
        ValueError: the trees do not have the same names; the message lists what differs.
    """
    first = trees[0]
    for other in trees[1:]:
        if first.keys() != other.keys():
            only_first, only_other = sorted(first.keys() - other.keys()), sorted(other.keys() - first.keys())
            raise ValueError(f"trees differ in their names: only left {only_first[:5]}, only right {only_other[:5]}")
    return {name: f(*(tree[name] for tree in trees)) for name in first}


def add(a: Tree, b: Tree) -> dict[str, Tensor]:
    return tmap(torch.add, a, b)


def sub(a: Tree, b: Tree) -> dict[str, Tensor]:
    return tmap(torch.sub, a, b)


def scale(a: Tree, factor: float) -> dict[str, Tensor]:
    return tmap(lambda x: x * factor, a)


def dot(a: Tree, b: Tree) -> Tensor:
    """Scalar product over all leaves, accumulated in float64."""
    terms = tmap(lambda x, y: (x.double() * y.double()).sum(), a, b)
    return torch.stack(list(terms.values())).sum()


def sqnorm(a: Tree) -> Tensor:
    """Squared norm over all leaves. Never `norm ** 2`: the gradient of a norm is NaN at zero, where FedProx starts."""
    return dot(a, a)


def sqnorm_C(a_C: Tree) -> Tensor:
    """Squared norm of each client's tree."""
    return torch.stack([x.square().flatten(1).sum(1) for x in a_C.values()]).sum(0)


def per_client(s_C: Tensor, like: Tensor) -> Tensor:
    """A number per client, shaped so that it multiplies a leaf with the cohort axis."""
    return s_C.view(-1, *[1] * (like.ndim - 1))


def num_elements(a: Tree) -> int:
    return sum(x.numel() for x in a.values())


def all_finite(a: Tree) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in a.values() if x.is_floating_point())


def not_finite_C(state: Any) -> list[list[str]]:
    """Of each client the names of what is not finite in a nested state of tensors [C, ...], each name once."""
    named: list[tuple[str, Tensor]] = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                named.append((name, torch.isfinite(value).flatten(1).all(1) if value.ndim > 1 else value.isfinite()))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, str(key))
        elif isinstance(value, tuple):
            for item in value:
                walk(item, name)

    walk(state, "")
    if not named:
        return []
    sound_LC = torch.stack([sound_C for _, sound_C in named])
    if bool(sound_LC.all()):  # the one read from the device in a sound round
        return [[] for _ in range(sound_LC.shape[1])]
    names = [name for name, _ in named]
    return [
        list(dict.fromkeys(name for name, sound in zip(names, row, strict=True) if not sound))
        for row in sound_LC.T.tolist()
    ]


def stack(trees: Sequence[Tree]) -> dict[str, Tensor]:
    """Trees of clients -> one tree with the cohort axis. Leaves that all clients share are expanded, not copied."""
    first = trees[0]
    if all(tree is first for tree in trees):
        return {name: x.expand(len(trees), *x.shape) for name, x in first.items()}
    return tmap(lambda *xs: torch.stack(xs), *trees)


def is_shared(tree_C: Tree) -> bool:
    """Whether all clients have the same leaves, as `stack` expands them."""
    return all(leaf.stride(0) == 0 or leaf.shape[0] == 1 for leaf in tree_C.values())


def client_of(tree_C: Tree, index: int) -> dict[str, Tensor]:
    """One client's tree, without the cohort axis."""
    return {name: x[index] for name, x in tree_C.items()}


def _rebuild(like: Any, values: Sequence[Any]) -> Any:
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def prefix(state: Any, num_clients: int) -> Any:
    """The first clients of a nested state of tensors [C, ...]; what is no tensor is passed through."""
    if isinstance(state, Tensor):
        return state[:num_clients]
    if isinstance(state, Mapping):
        return {key: prefix(value, num_clients) for key, value in state.items()}
    if isinstance(state, tuple):
        return _rebuild(state, [prefix(value, num_clients) for value in state])
    return state


def write_prefix(state: Any, new: Any, num_clients: int) -> Any:
    """`state` with its first clients replaced by `new`; the inverse of `prefix`."""
    if isinstance(state, Tensor):
        return new if num_clients == state.shape[0] else torch.cat([new, state[num_clients:]])
    if isinstance(state, Mapping):
        return {key: write_prefix(value, new[key], num_clients) for key, value in state.items()}
    if isinstance(state, tuple):
        pairs = zip(state, new, strict=True)
        return _rebuild(state, [write_prefix(old, fresh, num_clients) for old, fresh in pairs])
    return new


def flatten(value: Any, path: str = "") -> dict[str, Tensor]:
    """Nested mappings, tuples and None with tensors as leaves -> path -> tensor.

    Raises:
        TypeError: something else is in there, with its path.
    """
    if isinstance(value, Tensor):
        return {path: value}
    if value is None:
        return {}
    items: list[tuple[str, Any]]
    if isinstance(value, Mapping):
        items = [(str(key).replace("~", "~0").replace("/", "~1"), item) for key, item in value.items()]
    elif isinstance(value, tuple):
        names = getattr(value, "_fields", None) or [str(i) for i in range(len(value))]
        items = list(zip(names, value, strict=True))
    else:
        raise TypeError(f"{path or 'the state'} is a {type(value).__name__}; states hold tensors, mappings and tuples")
    flat: dict[str, Tensor] = {}
    for name, item in items:
        flat.update(flatten(item, f"{path}/{name}" if path else name))
    return flat


def unflatten(template: Any, flat: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`, in the shape of `template`; names, shapes and dtypes must all match.

    Raises:
        ValueError: they do not; the message lists what is missing, unexpected and different.
    """
    wanted = flatten(template)
    problems = [f"missing {name}" for name in wanted.keys() - flat.keys()]
    problems += [f"unexpected {name}" for name in flat.keys() - wanted.keys()]
    for name in wanted.keys() & flat.keys():
        a, b = wanted[name], flat[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            problems.append(f"{name} is {list(b.shape)} {b.dtype}, expected {list(a.shape)} {a.dtype}")
    if problems:
        raise ValueError("; ".join(sorted(problems)))
    return _fill(template, flat, "")


def _fill(template: Any, flat: Mapping[str, Tensor], path: str) -> Any:
    if isinstance(template, Tensor):
        return flat[path]
    if template is None:
        return None

    def child(name: str) -> str:
        return f"{path}/{name}" if path else name

    if isinstance(template, Mapping):
        return {
            key: _fill(item, flat, child(str(key).replace("~", "~0").replace("/", "~1")))
            for key, item in template.items()
        }
    names = getattr(template, "_fields", None) or [str(i) for i in range(len(template))]
    return _rebuild(template, [_fill(item, flat, child(name)) for name, item in zip(names, template, strict=True)])
