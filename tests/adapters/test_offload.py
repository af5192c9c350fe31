"""Activations that wait in the host's memory: the same gradients for every kind, and which tensors are put away."""

from __future__ import annotations

import pytest
import torch
from tests.adapters.test_recompute import KINDS, cohort_batch, gradients, moved
from tests.small import clients, fedavg, gap, llama

from fedloom.adapters import (
    dpo,
    last_layers,
    seed_space,
    with_activation_cache,
    with_activation_offload,
    with_recompute,
)
from fedloom.adapters.offload import with_offload
from fedloom.errors import UserError
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched
from fedloom.study.recipe import Recipe


def offloaded(adapter):
    return with_offload(adapter, least_bytes=0)


def tensors_put_away(adapter, c=2):
    """Sizes of the copies that one loss makes, and the storages that are saved beside them."""
    copies, leaves = [], moved(adapter, c)
    copy = torch.Tensor.copy_

    def copied(host, x, **given):
        copies.append(x)
        return copy(host, x, **given)

    batch = cohort_batch(c)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", copied)
        loss_C = adapter.loss(leaves, batch)
        patch.undo()
    return copies, leaves, loss_C


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_kept_activations(kind, c):
    want_loss, want = gradients(KINDS[kind](llama()), c)
    adapter = offloaded(offloaded(KINDS[kind](llama())))  # asked for twice is once
    got_loss, got = gradients(adapter, c)
    assert float((want_loss - got_loss).abs().max()) < 1e-12
    assert gap(want, got) < 1e-12
    assert adapter.leaves == (), "nothing stays on"


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_put_away_and_weights_are_not(kind):
    adapter = offloaded(KINDS[kind](llama()))
    copies, leaves, loss_C = tensors_put_away(adapter)
    weights = {x.untyped_storage().data_ptr() for x in (*adapter.model.parameters(), *leaves.values())}
    assert len(copies) > 10, "hardly anything was put away"
    assert not weights & {x.untyped_storage().data_ptr() for x in copies}
    del loss_C


def test_a_tensor_that_several_products_share_is_copied_once():
    # q, k and v work on one input, gate and up on another; what attention gives is saved before and after its heads
    # are laid side by side. The angles of positions, which all blocks have, are smaller.
    adapter = with_offload(KINDS["lora"](llama()), least_bytes=1000)
    copies, _, loss_C = tensors_put_away(adapter)
    places = [(x.data_ptr(), x.numel()) for x in copies]
    assert len(places) == len(set(places)) > 20
    del loss_C


def test_small_tensors_stay():
    adapter = with_offload(KINDS["lora"](llama()), least_bytes=10**6)
    assert not tensors_put_away(adapter)[0]


def test_a_change_in_place_after_a_copy_is_seen_by_the_next_one():
    model = llama()
    block = model.model.layers[0]
    adapter = KINDS["lora"](model)
    seen = []

    def twice(hidden, *args, **given):
        x = torch.full((4,), 2.0, dtype=torch.float64)
        w = torch.ones(4, dtype=torch.float64, requires_grad=True)
        y = x * w
        x.mul_(3)
        seen.append((w, (y + x * w).sum()))
        return hidden

    block.forward = twice
    offloaded(adapter)
    block.forward(torch.zeros(1))
    [(w, out)] = seen
    assert torch.autograd.grad(out, w)[0].tolist() == [8.0] * 4


def test_rounds_and_preferences_are_the_same():
    def after(adapter):
        state, report = run_round(fedavg(), adapter, batched(3), initial_state(fedavg(), adapter, 3), clients())
        assert not report.failed
        return state.params

    assert gap(after(KINDS["lora"](llama())), after(offloaded(KINDS["lora"](llama())))) < 1e-10

    def found(adapter):
        one, leaves = cohort_batch(2), moved(adapter, 2)
        mask = (one["labels"] != -100).long()
        pairs = {"input_ids": one["input_ids"], "rejected_ids": one["input_ids"].flip(2), "labels": one["labels"],
                 "chosen_mask": mask, "rejected_mask": mask}  # fmt: skip
        return dict(
            zip(leaves, torch.autograd.grad(adapter.loss(leaves, pairs).sum(), list(leaves.values())), strict=True)
        )

    assert gap(found(dpo(KINDS["lora"](llama()))), found(dpo(offloaded(KINDS["lora"](llama()))))) < 1e-12


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_it_goes_with_packed_rows_and_with_what_is_kept_of_frozen_blocks(way):
    def made(wrap):
        adapter = wrap(last_layers(llama(), layers=2))
        adapter.causal.rows.way = way
        return gradients(with_activation_cache(adapter, 10**9), 2)[1]

    assert gap(made(lambda adapter: adapter), made(offloaded)) < 1e-12


def test_where_it_makes_no_sense_it_is_refused():
    with pytest.raises(UserError, match="CPU, whose memory holds activations already") as caught:
        with_activation_offload(KINDS["lora"](llama()))
    assert "gradient_checkpointing" in caught.value.hint
    with pytest.raises(UserError, match="its blocks run again"):
        offloaded(with_recompute(KINDS["lora"](llama())))
    with pytest.raises(UserError, match="keeps no activations"):
        offloaded(seed_space(llama(dtype=torch.float32), num_seeds=4, seed=1))
    plain = {"model": "builtin", "data": {"path": "builtin:arith"}}
    for more, reason in (
        ({"method": "fedmezo", "runtime": {"activation_offload": True}}, "no backward pass"),
        ({"runtime": {"activation_offload": True, "gradient_checkpointing": True}}, "one or the other"),
        ({"runtime": {"shard_offload": True}}, "without shard_base"),
    ):
        with pytest.raises(ValueError, match=reason):
            Recipe.model_validate({**plain, **more})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose memory is what is saved")
def test_on_a_gpu_less_of_its_memory_is_taken_and_gradients_are_the_same():
    def taken(wrap):
        there = moved(KINDS["lora"](llama(8)), 2)  # drawn on the CPU
        leaves = {name: leaf.detach().cuda().requires_grad_() for name, leaf in there.items()}
        adapter = wrap(KINDS["lora"](llama(8).to("cuda")))
        batch = {name: leaf.cuda() for name, leaf in cohort_batch(2).items()}
        before = torch.cuda.memory_allocated()
        loss = adapter.loss(leaves, batch).sum()
        held = torch.cuda.memory_allocated() - before
        return held, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    kept, want = taken(lambda adapter: adapter)
    away, got = taken(offloaded)
    assert gap(want, got) < 1e-12
    assert away < 0.5 * kept
