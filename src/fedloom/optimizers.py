"""Optimisers as pure functions: the same ones serve clients (with the cohort axis) and the server (C = 1).

State is a value, so a fork or a resume repeats the same steps; `torch.optim` objects are mutable. All of them are
elementwise, so a stacked cohort equals C separate optimisers.

Shape suffixes: C clients in the cohort axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedloom.tree import per_client, tmap
from fedloom.types import Tree

OptimizerState = Any
Schedule = Callable[[Tensor], Tensor]  # rounds done so far [C] (a half is half a round) -> factor on the learning rate


class Optimizer(NamedTuple):
    """`init(params_C) -> state`; `update(grads_C, state, params_C, lr_scale_C) -> (params_C, state)`."""

    init: Callable[[Tree], OptimizerState]
    update: Callable[[Tree, OptimizerState, Tree, Tensor], tuple[Tree, OptimizerState]]


class Moments(NamedTuple):
    step_C: Tensor
    first: Tree
    second: Tree


def _zeros(tree: Tree) -> dict[str, Tensor]:
    return {name: torch.zeros_like(x) for name, x in tree.items()}


def _count(tree: Tree) -> Tensor:
    leaf = next(iter(tree.values()))
    return torch.zeros(leaf.shape[0], dtype=torch.float64, device=leaf.device)


def sgd(learning_rate: float, *, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False) -> Optimizer:
    """Stochastic gradient descent as `torch.optim.SGD` has it (weight decay is added to the gradient)."""

    def init(params: Tree) -> OptimizerState:
        return _zeros(params) if momentum else None

    def update(grads: Tree, state: OptimizerState, params: Tree, lr_scale_C: Tensor) -> tuple[Tree, OptimizerState]:
        if weight_decay:
            grads = tmap(lambda g, p: g + weight_decay * p, grads, params)
        direction = grads
        if momentum:
            state = tmap(lambda m, g: momentum * m + g, state, grads)
            direction = tmap(lambda m, g: g + momentum * m, state, grads) if nesterov else state
        lr_C = learning_rate * lr_scale_C
        return tmap(lambda p, d: p - per_client(lr_C, p).to(p.dtype) * d, params, direction), state

    return Optimizer(init, update)


def _adam(
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    bias_correction: bool,
    initial_second: float,
    second_moment: Callable[[Tensor, Tensor], Tensor],
) -> Optimizer:
    def init(params: Tree) -> Moments:
        second = {name: torch.full_like(x, initial_second) for name, x in params.items()}
        return Moments(_count(params), _zeros(params), second)

    def update(grads: Tree, state: Moments, params: Tree, lr_scale_C: Tensor) -> tuple[Tree, Moments]:
        step_C = state.step_C + 1
        first = tmap(lambda m, g: torch.lerp(m, g, 1 - beta1), state.first, grads)
        second = tmap(second_moment, state.second, grads)
        lr_C = (learning_rate * lr_scale_C).to(step_C)
        shrink_C = 1 - lr_C * weight_decay
        root_C = torch.ones_like(step_C)
        if bias_correction:
            lr_C = lr_C / (1 - beta1**step_C)
            root_C = (1 - beta2**step_C).sqrt()

        def move(p: Tensor, m: Tensor, v: Tensor) -> Tensor:
            lr, root = per_client(lr_C, p).to(p.dtype), per_client(root_C, p).to(p.dtype)
            kept = p * per_client(shrink_C, p).to(p.dtype) if weight_decay else p
            return torch.addcdiv(kept, m * lr, (v.sqrt() / root).add_(epsilon), value=-1)

        return tmap(move, params, first, second), Moments(step_C, first, second)

    return Optimizer(init, update)


def adamw(
    learning_rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    initial_second: float = 0.0,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019), as `torch.optim.AdamW` has it.

    `bias_correction=False` with `initial_second=epsilon ** 2` is the form of Reddi et al. 2021, Algorithm 2.
    """

    def second(v: Tensor, g: Tensor) -> Tensor:
        return (v * beta2).addcmul_(g, g, value=1 - beta2)

    return _adam(learning_rate, beta1, beta2, epsilon, weight_decay, bias_correction, initial_second, second)


def adam(
    learning_rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    bias_correction: bool = True,
    initial_second: float = 0.0,
) -> Optimizer:
    """Adam (Kingma and Ba 2015) without weight decay."""
    return adamw(
        learning_rate,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        weight_decay=0.0,
        bias_correction=bias_correction,
        initial_second=initial_second,
    )


def yogi(
    learning_rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-3,
    bias_correction: bool = True,
    initial_second: float = 1e-6,
) -> Optimizer:
    """Yogi (Zaheer et al. 2018): v <- v - (1 - beta2) sign(v - g^2) g^2."""

    def second(v: Tensor, g: Tensor) -> Tensor:
        square = g * g
        return v - (1 - beta2) * torch.sign(v - square) * square

    return _adam(learning_rate, beta1, beta2, epsilon, 0.0, bias_correction, initial_second, second)


def adagrad(
    learning_rate: float, *, beta1: float = 0.0, epsilon: float = 1e-10, initial_second: float = 0.0
) -> Optimizer:
    """Adagrad (Duchi et al. 2011), as `torch.optim.Adagrad` has it; `beta1` averages the gradient as FedAdagrad may."""

    def second(v: Tensor, g: Tensor) -> Tensor:
        return v + g * g

    return _adam(learning_rate, beta1, 0.0, epsilon, 0.0, False, initial_second, second)


def constant(rounds_C: Tensor) -> Tensor:
    """The learning rate as it is."""
    return torch.ones_like(rounds_C)


def decay(kind: str, rounds: int, *, warmup_rounds: float = 0.0, min_lr_ratio: float = 0.0) -> Schedule:
    """A schedule over the whole run: it never restarts with a round.

    Args:
        kind: "constant", "linear" or "cosine".
        rounds: of the whole run; at its end the factor is `min_lr_ratio` (for "constant" it stays 1).
        warmup_rounds: the factor rises linearly from 0 to 1 over so many rounds first; fractions count.
        min_lr_ratio: the floor, as a share of the learning rate.
    """
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "constant": torch.ones_like,
        "linear": lambda x: min_lr_ratio + (1 - min_lr_ratio) * (1 - x),
        "cosine": lambda x: min_lr_ratio + (1 - min_lr_ratio) * (1 + torch.cos(math.pi * x)) / 2,
    }
    shape = shapes[kind]

    def schedule(rounds_C: Tensor) -> Tensor:
        done = ((rounds_C - warmup_rounds) / max(rounds - warmup_rounds, 1e-9)).clamp(0, 1)
        factor = shape(done)
        return torch.where(rounds_C < warmup_rounds, rounds_C / max(warmup_rounds, 1e-9), factor)

    return schedule
