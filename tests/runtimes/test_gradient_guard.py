"""A gradient that is lost or not finite is told in the first step of a round, for every method and base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.small import batch, clients, fedavg, llama, small_lora
from torch import Tensor, nn

from fedloom.adapters import lora
from fedloom.clients import alternate, fednova_client, scaffold_client, sgd_client, split_personal, with_control
from fedloom.errors import RunError
from fedloom.ops.graph import NO_GRADIENT
from fedloom.optimizers import adamw, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.runtimes.cohort import train_block
from fedloom.types import Client, Site

BACKPROP = {
    "fedavg": lambda: sgd_client(sgd(0.1)),
    "fedprox": lambda: sgd_client(adamw(1e-2), prox_mu=0.1),
    "fednova": lambda: fednova_client(sgd(0.1)),
    "scaffold": lambda: scaffold_client(sgd(0.1)),
    "rolora": lambda: alternate(sgd_client(sgd(0.1), trainable=lambda name: "lora_B" in name)),
    "fedsa": lambda: split_personal(sgd_client(sgd(0.1)), lambda name: "lora_A" in name),
}


class Repacked(nn.Linear):
    """As bitsandbytes' 4 bit layer on a CPU with AVX-512: one call without a graph, and there is never one again."""

    repacked = False

    def forward(self, x: Tensor) -> Tensor:
        self.repacked |= not self.training and not torch.is_grad_enabled()
        out = super().forward(x)
        return out.detach() if self.repacked else out


def spoilt(ending: str) -> Any:
    """A tiny Llama whose layers of this name lose the graph once they were evaluated."""
    model = llama()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.endswith(ending):
            layer.__class__ = Repacked
    return model


def trained(adapter: Any, update: Any, cohort: Any = None) -> Any:
    algorithm = fedavg(update)
    cohort = cohort or clients(2)
    state = initial_state(algorithm, adapter, 3)
    return train_block(algorithm, adapter, state, cohort, [Site(0, 0, one.id, num_steps=1) for one in cohort])


@pytest.mark.parametrize("method", BACKPROP)
def test_a_base_that_was_evaluated_first_is_refused_by_name(method):
    adapter: Any = lora(spoilt("mlp.down_proj"), rank=2)  # building it tries the model out: that is the evaluation
    if method == "scaffold":
        adapter = with_control(adapter)
    with pytest.raises(RunError, match=r"no gradient passes model\.layers\.0\.mlp\.down_proj \(Repacked\)") as told:
        trained(adapter, BACKPROP[method]())
    assert told.value.code == NO_GRADIENT
    assert "repacked" in str(told.value.hint)


def test_the_trap_itself_gives_a_normal_loss_and_wrong_gradients_without_a_none():
    """Why it is not enough that every gradient exists: LoRA's own products lead around the layers that lost it."""
    good, bad = (lora(model, rank=2, targets="all-linear") for model in (llama(), spoilt("_proj")))
    tree_C = {name: leaf[None].requires_grad_() for name, leaf in good.init(3).items()}
    data = {name: leaf[None] for name, leaf in batch(0).items()}
    losses = [adapter.loss(tree_C, data).sum() for adapter in (good, bad)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    right, wrong = (torch.autograd.grad(loss, list(tree_C.values()), allow_unused=True) for loss in losses)
    assert all(grad is not None for grad in wrong)
    lost = [
        name
        for name, a, b in zip(tree_C, right, wrong, strict=True)
        if float((a - b).norm()) > 0.5 * float(a.norm()) > 0
    ]
    assert len(lost) == 20  # of 21 B: all but that of the last layer
    with pytest.raises(RunError, match="no gradient passes"):
        trained(bad, sgd_client(sgd(0.1)))


def test_evaluating_between_rounds_springs_the_trap_in_the_next_round():
    model = llama()
    adapter = lora(model, rank=2)
    model.model.layers[2].mlp.up_proj.__class__ = Repacked
    algorithm = fedavg(sgd_client(sgd(0.1)))
    state, _ = run_round(algorithm, adapter, batched(4), initial_state(algorithm, adapter, 3), clients(3))
    adapter.nll({name: leaf[None] for name, leaf in state.params.items()}, {n: x[None] for n, x in batch(0).items()})
    with pytest.raises(
        RunError, match=r"none of 3 clients finished(.|\n)*no gradient passes model\.layers\.2\.mlp\.up_proj"
    ):
        run_round(algorithm, adapter, batched(4), state, clients(3))


@pytest.mark.parametrize("runtime", [sequential, lambda: batched(4)], ids=["sequential", "batched"])
def test_parameters_that_the_loss_does_not_hang_on_are_named(runtime):
    class Forgetful:
        """An adapter whose loss leaves out what is trained of one layer."""

        def __init__(self) -> None:
            self.inner = small_lora(rank=2)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def loss(self, tree_C, batch_CBT):
            left = {n: x.detach() if "layers.1.self_attn.q_proj" in n else x for n, x in tree_C.items()}
            return self.inner.loss(left, batch_CBT)

    algorithm = fedavg(sgd_client(sgd(0.1)))
    with pytest.raises(
        RunError,
        match=r"2 of 12 trained parameters get no gradient \(model\.layers\.1\.self_attn\.q_proj\.lora_A\.weight",
    ):
        run_round(algorithm, Forgetful(), runtime(), initial_state(algorithm, small_lora(rank=2), 3), clients(2))


def test_a_loss_without_any_graph_is_told_as_such():
    adapter: Any = small_lora(rank=2)
    whole = adapter.loss
    adapter.loss = lambda tree_C, batch_CBT: whole(tree_C, batch_CBT).detach()
    with pytest.raises(RunError, match=r"12 of 12 trained parameters get no gradient .* hangs on no trained parameter"):
        trained(adapter, sgd_client(sgd(0.1)))


def test_a_gradient_that_overflows_is_told_of_its_client_alone():
    adapter: Any = small_lora(rank=2)
    whole = adapter.loss

    name = "model.layers.0.self_attn.q_proj.lora_B.weight"

    def overflow(grad_COR: Tensor) -> Tensor:
        return torch.cat([grad_COR[:1], grad_COR[1:] * float("inf")])  # of the second client

    def explodes(tree_C, batch_CBT):
        b_COR = tree_C[name] * 1
        b_COR.register_hook(overflow)
        return whole({**tree_C, name: b_COR}, batch_CBT)

    adapter.loss = explodes
    cohort = [Client(name, (batch(1), batch(2), batch(3))) for name in ("a", "b")]
    updates = trained(adapter, sgd_client(sgd(0.1)), cohort)
    assert not isinstance(updates[0][2], RunError)
    reason = updates[1][2]
    assert isinstance(reason, RunError)
    assert f"its loss was finite, but after its first local step {name} is not" in reason.message
    alone = trained(adapter, sgd_client(sgd(0.1)), cohort[:1])
    assert all(torch.equal(leaf, alone[0][0][name]) for name, leaf in updates[0][0].items())


def test_no_hook_stays_on_the_model():
    adapter = small_lora(rank=2)
    before = sum(len(module._forward_hooks) for module in adapter.model.modules())
    trained(adapter, sgd_client(sgd(0.1)))
    assert sum(len(module._forward_hooks) for module in adapter.model.modules()) == before
