"""Trees and nested states."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fedloom import tree
from fedloom.seeds import seed_of


class Nested(NamedTuple):
    step: torch.Tensor
    inner: Any
    nothing: Any = None


def state() -> Nested:
    return Nested(torch.arange(3.0), {"a/b": torch.ones(3, 2), "c~d": (torch.zeros(3, 1, dtype=torch.int64), None)})


def test_flatten_and_unflatten_are_inverse_and_strict():
    flat = tree.flatten(state())
    assert sorted(flat) == ["inner/a~1b", "inner/c~0d/0", "step"]
    back = tree.unflatten(state(), flat)
    assert isinstance(back, Nested)
    assert back.nothing is None
    assert torch.equal(back.inner["a/b"], torch.ones(3, 2))
    with pytest.raises(ValueError, match="missing step"):
        tree.unflatten(state(), {k: v for k, v in flat.items() if k != "step"})
    with pytest.raises(ValueError, match="unexpected other"):
        tree.unflatten(state(), {**flat, "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"step is \[3\] torch.float64, expected \[3\] torch.float32"):
        tree.unflatten(state(), {**flat, "step": flat["step"].double()})
    with pytest.raises(TypeError, match="inner/x is a list"):
        tree.flatten(Nested(torch.ones(1), {"x": [1]}))


def test_prefix_and_write_prefix_are_inverse():
    whole = state()
    first = tree.prefix(whole, 2)
    assert first.step.tolist() == [0, 1]
    changed = tree.write_prefix(whole, first._replace(step=first.step + 10), 2)
    assert changed.step.tolist() == [10, 11, 2]
    assert torch.equal(changed.inner["a/b"], whole.inner["a/b"])


def test_trees_that_differ_in_names_are_refused():
    with pytest.raises(ValueError, match=r"only left \['a'\], only right \['b'\]"):
        tree.add({"a": torch.ones(1)}, {"b": torch.ones(1)})


def test_squared_norms():
    a = {"x": torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "y": torch.tensor([[[2.0]], [[2.0]]])}
    assert float(tree.sqnorm(a)) == 34
    assert tree.sqnorm_C(a).tolist() == [29.0, 5.0]


def test_seeds_depend_on_every_part_and_on_nothing_else():
    parts = [
        (1, 2, "a", "x"),
        (1, 2, "a", "y"),
        (1, 2, "b", "x"),
        (1, 3, "a", "x"),
        (2, 2, "a", "x"),
        (1, 2, "a|x", ""),
    ]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert seed_of(1, 2, "a", "x") == 718579107717922850  # runs made earlier stay repeatable
