"""FLOPs against torch's own counter, shapes of batches by hand, and peaks of memory."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedloom.adapters import bottleneck, full, last_layers, lora, p_tuning, prefix_tuning, prompt_tuning, with_recompute
from fedloom.data.batches import Batches
from fedloom.data.tokens import Example
from fedloom.models.load import load_base, random_base
from fedloom.study.costs import peak_memory_bytes, reset_peak_memory, training_flops, work_of


def counted(adapter, ids, labels) -> float:
    leaves = {name: leaf[None].requires_grad_() for name, leaf in adapter.init(0).items()}
    adapter.causal.rows.way = "padded"  # packed ones compute less than the formula says
    with FlopCounterMode(display=False) as counter:
        loss = adapter.loss(leaves, {"input_ids": ids[None], "labels": labels[None]})
        torch.autograd.grad(loss.sum(), list(leaves.values()))
    return float(counter.get_total_flops())


KINDS = {
    "auto": (0.02, lambda model: lora(model, rank=16, alpha=32.0, targets="auto")),
    "all-linear": (0.02, lambda model: lora(model, rank=16, alpha=32.0, targets="all-linear")),
    "down_proj": (0.05, lambda model: lora(model, rank=16, alpha=32.0, targets=["down_proj"])),
    "prompt_tuning": (0.02, lambda model: prompt_tuning(model, num_virtual_tokens=20)),
    "p_tuning": (0.02, lambda model: p_tuning(model, num_virtual_tokens=20)),
    "prefix_tuning": (0.05, lambda model: prefix_tuning(model, num_virtual_tokens=20)),
    "full": (0.02, full),
    "last_layers": (0.02, lambda model: last_layers(model, layers=2)),
    "bottleneck": (0.02, lambda model: bottleneck(model, size=16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_the_builtin_model_are_about_those_of_torchs_counter(kind: str) -> None:
    base = load_base("builtin", dtype="float32")
    base.model.set_attn_implementation("eager")  # torch counts no fused attention on a CPU
    within, make = KINDS[kind]
    adapter = make(base.model)
    flops = training_flops(adapter, adapter.init(0))
    for rows, tokens, answer in ((4, 40, 12), (3, 200, 150)):
        ids = torch.randint(5, 800, (rows, tokens), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : tokens - answer] = -100
        ours = flops.of(tokens=rows * tokens, targets=rows * answer, pairs=rows * tokens**2, rows=rows, steps=1)
        assert ours == pytest.approx(counted(adapter, ids, labels), rel=within)


AGAIN = {
    "all-linear": (0.05, lambda model: lora(model, rank=8, targets="all-linear")),
    "auto": (0.02, lambda model: lora(model, rank=8, targets="auto")),
    "full": (0.02, full),
    "last_layers": (0.02, lambda model: last_layers(model, layers=2)),
    "prefix_tuning": (0.05, lambda model: prefix_tuning(model, num_virtual_tokens=20)),
}


@pytest.mark.parametrize("kind", AGAIN)
def test_blocks_that_run_again_are_counted(kind: str) -> None:
    within, make = AGAIN[kind]
    ids = torch.randint(5, 800, (3, 200), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :50] = -100
    found = {}
    for again in (False, True):
        base = load_base("builtin", dtype="float32")
        base.model.set_attn_implementation("eager")
        adapter = make(base.model)
        adapter = with_recompute(adapter) if again else adapter
        flops = training_flops(adapter, adapter.init(0))
        found[again] = flops.of(tokens=600, targets=450, pairs=3 * 200**2, rows=3, steps=1)
        assert found[again] == pytest.approx(counted(adapter, ids, labels), rel=within)
    assert 1.1 < found[True] / found[False] < 1.5


def test_a_head_that_is_trained_costs_half_as_much_again() -> None:
    base = random_base(hidden_size=32, num_layers=2, vocab_size=300, text=["a b c"], max_positions=64)
    size = base.model.lm_head.weight.numel()
    for make, times in ((full, 6), (last_layers, 4), (bottleneck, 4), (lora, 4)):
        adapter = make(base.model)
        assert training_flops(adapter, adapter.init(0)).per_target == times * size


def test_an_adapter_high_in_the_model_needs_less_backward() -> None:
    base = random_base(hidden_size=32, num_layers=4, vocab_size=300, text=["a b c"], max_positions=64)

    def cost(layers: list[int]) -> float:
        adapter = lora(base.model, rank=2, targets=[f"layers.{n}.mlp.down_proj" for n in layers])
        found = training_flops(adapter, adapter.init(0))
        adapter.detach()
        return found.per_token - 6 * sum(leaf.numel() for leaf in adapter.init(0).values())

    everywhere, top = cost([0, 1, 2, 3]), cost([3])
    per_layer = sum(
        leaf.numel() for name, leaf in base.model.named_parameters() if "layers.0" in name and leaf.ndim == 2
    )
    down = base.model.model.layers[0].mlp.down_proj.weight.numel()
    assert cost([0]) == everywhere
    # the gradient goes back to the lowest adapted matrix, and not through it
    assert everywhere - top == pytest.approx(2 * 3 * per_layer, abs=2 * down)


def test_work_is_counted_from_the_plan() -> None:
    def example(tokens: int) -> Example:
        ids = np.arange(tokens)
        return Example(ids, ids, 0)

    batches = Batches([example(n) for n in (3, 5, 2)], [np.array([0, 1]), np.array([2])], pad_id=0)
    work = work_of(batches)
    assert (work.tokens, work.pairs) == (10, 9 + 25 + 4)
    assert (work.padded_tokens, work.padded_pairs) == (12, 2 * 25 + 4)
    assert work.padded_pairs_per_token == 54 / 12


def test_a_peak_of_memory_is_seen_and_forgotten() -> None:
    if not reset_peak_memory():
        pytest.skip("this system keeps one peak for the life of a process")
    before = peak_memory_bytes()
    held = mmap.mmap(-1, 200_000_000)  # not from an allocator, which may keep what is given back
    held.write(bytes(200_000_000))
    high = peak_memory_bytes()
    assert high > before + 100_000_000
    held.close()
    assert reset_peak_memory()
    assert peak_memory_bytes() < high - 100_000_000
