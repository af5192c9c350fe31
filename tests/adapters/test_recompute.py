"""Blocks that run again backward: the same gradients for every kind, less that is kept, nothing else changed."""

from __future__ import annotations

import pytest
import torch
from tests.small import VOCAB, batch, clients, fedavg, gap, llama

from fedloom.adapters import (
    bottleneck,
    dora,
    dpo,
    full,
    ia3,
    last_layers,
    lora,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    seed_space,
    with_recompute,
)
from fedloom.errors import UserError
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.runtimes.cohort import collate
from fedloom.study.recipe import Recipe

KINDS = {
    "lora": lambda model: lora(model, rank=4, alpha=8.0, targets="all-linear"),
    "lora_on_some": lambda model: lora(model, rank=4, alpha=8.0, targets=["q_proj", "v_proj"]),
    "dropout": lambda model: lora(model, rank=4, alpha=8.0, dropout=0.3),
    "dora": lambda model: dora(model, rank=4, alpha=8.0, targets="all-linear"),
    "ia3": ia3,
    "bottleneck": lambda model: bottleneck(model, size=4),
    "prompt_tuning": lambda model: prompt_tuning(model, num_virtual_tokens=5),
    "p_tuning": lambda model: p_tuning(model, num_virtual_tokens=5),
    "prefix_tuning": lambda model: prefix_tuning(model, num_virtual_tokens=5),
    "full": full,
    "last_layers": lambda model: last_layers(model, layers=1, extra="norm"),
}


def moved(adapter, c):
    """Every client somewhere else, and none at the start."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: (leaf + 0.1 * torch.randn(c, *leaf.shape, generator=draw, dtype=leaf.dtype)).requires_grad_()
        for name, leaf in adapter.init(1).items()
    }


def cohort_batch(c):
    return collate([batch(i, rows=2, tokens=10 + i) for i in range(c)], list(range(40, 40 + c)), torch.device("cpu"))


def gradients(adapter, c):
    leaves = moved(adapter, c)
    loss_C = adapter.loss(leaves, cohort_batch(c))
    return loss_C.detach(), dict(zip(leaves, torch.autograd.grad(loss_C.sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_kept_activations(kind, c):
    want_loss, want = gradients(KINDS[kind](llama()), c)
    adapter = with_recompute(KINDS[kind](llama()))
    got_loss, got = gradients(adapter, c)
    assert float((want_loss - got_loss).abs().max()) < 1e-12
    assert gap(want, got) < 1e-12
    assert max(float(leaf.abs().max()) for leaf in got.values()) > 1e-3, "there is something to compare"
    assert adapter._on is None, "nothing stays on"


def test_gradients_of_a_model_with_weights_the_other_way_round():
    def gpt2():
        import transformers

        config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64)
        torch.manual_seed(3)
        return transformers.GPT2LMHeadModel(config).double()

    for make in (lambda model: lora(model, rank=2), full):
        assert gap(gradients(make(gpt2()), 2)[1], gradients(with_recompute(make(gpt2())), 2)[1]) < 1e-12


def test_blocks_run_twice_in_training_and_once_in_evaluation():
    adapter = with_recompute(with_recompute(KINDS["lora"](llama())))  # asked for twice is once
    runs = []
    for layer in adapter.model.model.layers:
        layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    leaves = moved(adapter, 2)
    loss_C = adapter.loss(leaves, cohort_batch(2))
    assert len(runs) == 3
    torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    assert len(runs) == 6
    got = adapter.nll(leaves, cohort_batch(2))
    assert len(runs) == 9
    want = KINDS["lora"](llama()).nll(leaves, cohort_batch(2))
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("kind", ["lora", "prefix_tuning", "full"])
def test_less_is_kept_for_the_backward_pass(kind):
    def kept(adapter) -> int:
        sizes = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaves = moved(adapter, 2)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = adapter.loss(leaves, cohort_batch(2))
        weights = {p.untyped_storage().data_ptr() for p in (*adapter.model.parameters(), *leaves.values())}
        del loss
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept(with_recompute(KINDS[kind](llama(6)))) < 0.4 * kept(KINDS[kind](llama(6)))


def test_two_losses_at_once_have_each_its_own_tree():
    adapter = with_recompute(KINDS["full"](llama()))
    here, there = moved(adapter, 1), adapter.init(1)
    there = {name: leaf[None].clone().requires_grad_() for name, leaf in there.items()}
    first, second = adapter.loss(here, cohort_batch(1)), adapter.loss(there, cohort_batch(1))
    got = torch.autograd.grad(first.sum(), list(here.values()))
    torch.autograd.grad(second.sum(), list(there.values()))
    want = gradients(KINDS["full"](llama()), 1)[1]
    assert gap(want, dict(zip(here, got, strict=True))) < 1e-12


def test_another_tree_in_the_way_is_refused_and_its_own_is_not():
    adapter = with_recompute(KINDS["lora"](llama()))
    leaves = moved(adapter, 1)
    loss = adapter.loss(leaves, cohort_batch(1)).sum()
    with (
        adapter.bound({name: leaf.detach() for name, leaf in leaves.items()}),
        pytest.raises(RuntimeError, match="bound"),
    ):
        torch.autograd.grad(loss, list(leaves.values()))
    ids = cohort_batch(1)["input_ids"][0]
    with adapter.bound(leaves) as model:
        inside = torch.autograd.grad(model(input_ids=ids).logits.sum(), list(leaves.values()))
    with adapter.bound(leaves) as model:
        out = model(input_ids=ids).logits.sum()
    outside = torch.autograd.grad(out, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_rounds_are_the_same():
    def after(adapter, runtime):
        state = initial_state(fedavg(), adapter, 3)
        for _ in range(2):
            state, report = run_round(fedavg(), adapter, runtime, state, clients())
            assert not report.failed
        return state.params

    want = after(KINDS["lora"](llama()), sequential())
    for runtime in (sequential(), batched(3)):
        assert gap(want, after(with_recompute(KINDS["lora"](llama())), runtime)) < 1e-10


def test_preferences_have_the_same_gradients():
    def pairs(c):
        one, other = cohort_batch(c), cohort_batch(c)
        return {
            "input_ids": one["input_ids"], "rejected_ids": other["input_ids"].flip(2), "labels": one["labels"],
            "chosen_mask": (one["labels"] != -100).long(), "rejected_mask": (one["labels"] != -100).long(),
        }  # fmt: skip

    def found(adapter):
        leaves = moved(adapter, 2)
        loss_C = adapter.loss(leaves, pairs(2))
        return dict(zip(leaves, torch.autograd.grad(loss_C.sum(), list(leaves.values())), strict=True))

    assert gap(found(dpo(KINDS["lora"](llama()))), found(dpo(with_recompute(KINDS["lora"](llama()))))) < 1e-12


def test_steps_without_a_graph_have_nothing_to_make_again():
    with pytest.raises(UserError, match="keeps no activations"):
        with_recompute(seed_space(llama(dtype=torch.float32), num_seeds=4, seed=1))
    with pytest.raises(ValueError, match="no backward pass"):
        Recipe.model_validate(
            {
                "model": "builtin",
                "data": {"path": "builtin:arith"},
                "method": "fedmezo",
                "runtime": {"gradient_checkpointing": True},
            }
        )
