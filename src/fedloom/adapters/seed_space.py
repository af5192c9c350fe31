"""Full-parameter tuning in the span of K random directions: FedKSeed's parameters (Qin et al. 2024, Eq. 6).

    w = w0 - sum_k a_k z_k,    z_k the direction that seed k stands for

The tree is the K numbers `a`; they are all that travels, is averaged, compressed, protected or checkpointed, and any
node rebuilds the weights from them. There is one copy of the weights, changed in place; going from one `a` to another
works through the directions whose numbers differ and no others, and nothing is done where none does.

In place, and yet without drift. Floating-point addition rounds, so adding and taking away a direction would leave each
weight a little off, and a weight would depend on the path to it. Here it cannot: the weights of a tensor lie on a grid
whose step is a power of two, and so does what one seed adds to them, round(a_k z_k / step). Sums of multiples of the
step are exact in floating point while a weight stays below four times the largest of its tensor (rounded up to a power
of two), which is checked. So the weights are a function of `a` alone, bit for bit: of no path, order, device or number
of threads. The price is that weights are rounded to the grid once, at the start, in float32 by at most 2^-22 of the
largest weight of their tensor.

Shape suffixes: C clients, K seeds, S of them at a time, N weights of a block.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedloom.adapters.frame import Frame, check_tree
from fedloom.errors import RunError, UserError
from fedloom.ops.directions import LARGEST, directions
from fedloom.seeds import seed_of
from fedloom.types import Batch, Tree

COEFFICIENTS = "seed_coefficients"  # a_k
MAGNITUDES, COUNTS = "seed_magnitudes", "seed_counts"  # FedKSeed-Pro: sums of |g| of each seed, and how many

CPU_NUMBERS, GPU_NUMBERS = 1 << 18, 1 << 23  # of directions at a time: on a CPU they stay in its cache
SEEDS_AT_ONCE = 16
_BITS = {torch.float32: 24, torch.float64: 53}  # of a significand
_HEADROOM = 2  # bits by which weights may outgrow the largest one


def seed_space(
    model: nn.Module,
    *,
    num_seeds: int = 4096,
    seed: int = 0,
    magnitudes: bool = False,
    save_tokenizer: Callable[[Path], None] | None = None,
) -> SeedSpace:
    """All weights of a causal LM as functions of K numbers.

    Args:
        model: any Hugging Face causal LM in float32 or float64. Its weights are rounded to their grids, and moved.
        num_seeds: K.
        seed: what the K directions are drawn from; every node must have the same.
        magnitudes: keep for each seed the sum of its scalar gradients' magnitudes and their number, too, from which
            clients draw seeds with unequal probabilities (FedKSeed-Pro): 3 K numbers.
        save_tokenizer: writes the tokenizer into an exported folder.

    Raises:
        UserError: `num_seeds` is below 1, or the model has weights of another type, where small steps would be lost.
    """
    if num_seeds < 1:
        raise UserError(f"num_seeds is {num_seeds}, must be at least 1", code="adapter.seeds")
    other = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype not in _BITS}
    if other:
        raise UserError(
            f"seed_space moves weights by less than {', '.join(sorted(other))} can tell apart",
            hint="dtype: float32",
            code="adapter.dtype",
        )
    return SeedSpace(model, num_seeds, seed, magnitudes, save_tokenizer)


class _Leaf(NamedTuple):
    """One tensor of weights among all of them."""

    weight_N: Tensor  # flat, a view: what is written here is the model's
    start: int  # among all weights
    step: float  # of its grid
    limit: float  # up to here sums are exact


class _Part(NamedTuple):
    """Some seeds, and where their coefficients go."""

    keys: list[int]
    from_S1: Tensor
    to_S1: Tensor


class SeedSpace(Frame):
    """The adapter; see `seed_space`."""

    kind = "seed_space"
    whole_model = True  # what is exported is a model folder, not an adapter's
    in_place = True  # the model without a tree is not the base

    def __init__(
        self,
        model: nn.Module,
        num_seeds: int,
        seed: int,
        magnitudes: bool,
        save_tokenizer: Callable[[Path], None] | None,
    ) -> None:
        self.num_seeds, self.magnitudes, self.save_tokenizer = num_seeds, magnitudes, save_tokenizer
        self._leaves = _on_grids(model)
        self.num_weights = self._leaves[-1].start + len(self._leaves[-1].weight_N)
        super().__init__(model, self._put_on)
        first = next(model.parameters())
        self._dtype, self._device = first.dtype, first.device
        self._keys = [seed_of(seed, 0, "", f"direction/{k}") for k in range(num_seeds)]
        self._at_K = torch.zeros(num_seeds, dtype=self._dtype)  # where the weights are now

    # ---- the Adapter protocol --------------------------------------------------------------------------------------

    def init(self, seed: int) -> dict[str, Tensor]:
        """All zero, which is the model itself, whatever the seed."""
        names = (COEFFICIENTS, MAGNITUDES, COUNTS) if self.magnitudes else (COEFFICIENTS,)
        return {name: torch.zeros(self.num_seeds, dtype=self._dtype, device=self._device) for name in names}

    def check(self, tree: Tree) -> None:
        """Raise UserError when `tree` is not made for so many seeds."""
        check_tree(tree, dict.fromkeys(self.init(0), (self.num_seeds,)))

    def loss(self, tree_C: Tree, batch_CBT: Batch) -> Tensor:
        """loss_C; clients at different places take turns, for there is one copy of the weights."""
        turns = [Frame.loss(self, tree, batch) for tree, batch in _turns(tree_C, batch_CBT)]
        return torch.cat(turns)

    def nll(self, tree_C: Tree, batch_CBT: Batch) -> tuple[Tensor, Tensor]:
        """(sum_C, count_C), as `loss`."""
        turns = [Frame.nll(self, tree, batch) for tree, batch in _turns(tree_C, batch_CBT)]
        return torch.cat([one[0] for one in turns]), torch.cat([one[1] for one in turns])

    def merge(self, tree: Tree) -> None:
        """The weights that the tree stands for become the model's, for good."""
        self.go(tree[COEFFICIENTS])

    # ---- the weights -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _put_on(self, tree_C: Tree, seed_C: Tensor | None) -> Iterator[None]:
        a_CK = tree_C[COEFFICIENTS]
        if not _same(a_CK):
            raise UserError(
                "these clients have different weights, and there is one copy of them: one client at a time",
                hint="runtime.kind: sequential",
                code="adapter.seeds",
            )
        self.go(a_CK[0])
        yield  # the weights stay where they are: the next place is near

    @torch.no_grad()
    def go(self, a_K: Tensor) -> int:
        """Move the weights to w0 - sum_k a_k z_k; returns the number of directions that were worked through.

        Raises:
            RunError: a weight would leave the range in which sums are exact; the weights stay where they were.
        """
        to_K = a_K.detach().to("cpu", self._dtype, copy=True)
        if not bool(torch.isfinite(to_K).all()):
            raise RunError("the coefficient of a seed is not finite", code="adapter.nonfinite")
        changed = (to_K != self._at_K).nonzero()[:, 0]
        if not len(changed):
            return 0
        at_once = min(SEEDS_AT_ONCE, 1 << (len(changed) - 1).bit_length())
        size = (CPU_NUMBERS if self._device.type == "cpu" else GPU_NUMBERS) // at_once
        most = float((self._at_K[changed].abs() + to_K[changed].abs()).sum()) * LARGEST
        parts = [
            _Part([self._keys[k] for k in some.tolist()], *(a[some, None].to(self._device) for a in (self._at_K, to_K)))
            for some in changed.split(at_once)
        ]
        for start in range(0, self.num_weights, size):
            if not self._shift(start, min(size, self.num_weights - start), parts, most):
                back = [_Part(keys, there, here) for keys, here, there in parts]
                for before in range(0, start, size):
                    self._shift(before, size, back, most)
                raise RunError(
                    "a weight has grown to more than four times the largest of its tensor",
                    hint="lower client.learning_rate or client.zo_eps",
                    code="adapter.range",
                )
        self._at_K = to_K
        return len(changed)

    def _shift(self, start: int, n: int, parts: list[_Part], most: float) -> bool:
        """Move weights `start` to `start + n`; False, and nothing done, where that is too far.

        Args:
            most: no sum of what is added is larger than this.
        """
        pieces = _within(self._leaves, start, n)
        inverse: Any = torch.cat([w.new_full((len(w),), 1 / leaf.step) for leaf, w in pieces])
        # Sums of steps are sums of whole numbers, so they are exact: in the weights' own type where none can be large.
        own = most <= min(leaf.limit for leaf, _ in pieces)
        total_N = torch.zeros(n, dtype=self._dtype if own else torch.float64, device=self._device)
        for part in parts:
            z_SN = directions(part.keys, start, n, self._device, self._dtype)
            for a_S1, sign in ((part.from_S1, 1), (part.to_S1, -1)):
                if bool(a_S1.any()):
                    steps_SN = (z_SN * a_S1).mul_(inverse).round_()
                    total_N.add_(
                        steps_SN[0] if len(part.keys) == 1 else steps_SN.sum(0, dtype=total_N.dtype), alpha=sign
                    )
        moved, place = [], 0
        for leaf, weight_N in pieces:
            new_N = weight_N + total_N[place : place + len(weight_N)] * leaf.step
            if not float(new_N.abs().amax()) <= leaf.limit:
                return False
            moved.append(new_N)
            place += len(weight_N)
        for (_, weight_N), new_N in zip(pieces, moved, strict=True):
            weight_N.copy_(new_N)
        return True

    # ---- writing and reading ---------------------------------------------------------------------------------------

    def export(self, tree: Tree, path: Path) -> None:
        """A model folder (config, safetensors, tokenizer) that `transformers` loads, with the weights of `tree`."""
        self.check(tree)
        self.go(tree[COEFFICIENTS])
        model: Any = self.model
        model.save_pretrained(path)
        if self.save_tokenizer is not None:
            self.save_tokenizer(path)

    def detach(self) -> None:
        """The model as it was before any step (on its grids)."""
        self.go(torch.zeros(self.num_seeds))


def _on_grids(model: nn.Module) -> list[_Leaf]:
    """Round each tensor of weights to its grid, in place, and say where it is among all weights (a tied one once)."""
    leaves, start = [], 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.contiguous()
            weight_N = parameter.data.view(-1)
            if not len(weight_N):
                continue
            largest = float(weight_N.abs().amax())
            limit = 2.0 ** (math.ceil(math.log2(largest)) if largest > 0 else 0) * 2**_HEADROOM
            step = limit / 2 ** _BITS[weight_N.dtype]
            weight_N.div_(step).round_().mul_(step)
            leaves.append(_Leaf(weight_N, start, step, limit))
            start += len(weight_N)
    return leaves


def _within(leaves: Sequence[_Leaf], start: int, n: int) -> list[tuple[_Leaf, Tensor]]:
    """The parts of tensors that are weights `start` to `start + n`."""
    found = []
    for leaf in leaves[bisect_right(leaves, start, key=lambda leaf: leaf.start) - 1 :]:
        if leaf.start >= start + n:
            break
        found.append((leaf, leaf.weight_N[max(0, start - leaf.start) : start + n - leaf.start]))
    return found


def _same(a_CK: Tensor) -> bool:
    return a_CK.shape[0] == 1 or a_CK.stride(0) == 0 or bool((a_CK == a_CK[:1]).all())


def _turns(tree_C: Tree, batch_CBT: Batch) -> Iterator[tuple[Tree, Batch]]:
    """The whole cohort where its weights are the same, else one client after the other."""
    if _same(tree_C[COEFFICIENTS]):
        yield tree_C, batch_CBT
        return
    for c in range(tree_C[COEFFICIENTS].shape[0]):
        yield (
            {name: leaf[c : c + 1] for name, leaf in tree_C.items()},
            {name: leaf[c : c + 1] for name, leaf in batch_CBT.items()},
        )
