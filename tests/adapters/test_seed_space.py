"""Seed space: weights as a function of K numbers, exactly."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from tests.small import batch, clients, fedavg, gap, llama
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom import wire
from fedloom.adapters import dpo, seed_space
from fedloom.adapters.seed_space import COEFFICIENTS, COUNTS, MAGNITUDES, SeedSpace
from fedloom.clients import local_only, zo_client
from fedloom.compress import nonzero, zstd
from fedloom.errors import RunError, UserError
from fedloom.ops.directions import directions
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.seeds import seed_of
from fedloom.study.methods import METHODS
from fedloom.types import Client, Evaluation, State, Transform

module = import_module("fedloom.adapters.seed_space")  # the function of this name hides it


def gpt2(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
    return GPT2LMHeadModel(config).to(dtype)


MODELS = {"llama": lambda: llama(dtype=torch.float32), "gpt2": gpt2, "llama64": llama}


def weights(adapter: SeedSpace) -> dict[str, torch.Tensor]:
    return {name: leaf.detach().clone() for name, leaf in adapter.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(leaf, b[name]) for name, leaf in a.items())


def places(num: int, seeds: int, dtype: torch.dtype, scale: float = 3e-3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(num):
        a = torch.randn(seeds, generator=draw, dtype=torch.float64) * scale
        found.append((a * (torch.rand(seeds, generator=draw) < 0.6)).to(dtype))
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_the_start_minus_the_sum_of_directions(kind: str) -> None:
    model = MODELS[kind]()
    before = {name: leaf.detach().clone().double() for name, leaf in model.named_parameters()}
    adapter = seed_space(model, num_seeds=20, seed=9)
    dtype = next(model.parameters()).dtype
    fine = 2.0 ** -(20 if dtype == torch.float32 else 45)
    assert all(float((leaf.double() - before[name]).abs().max()) < fine for name, leaf in weights(adapter).items())
    [a] = places(1, 20, dtype)
    adapter.go(a)
    z = directions(
        [seed_of(9, 0, "", f"direction/{k}") for k in range(20)],
        0,
        sum(leaf.numel() for leaf in before.values()),
        torch.device("cpu"),
        torch.float64,
    )
    sums, start = a.double() @ z, 0
    for name, leaf in weights(adapter).items():
        want = before[name] - sums[start : start + leaf.numel()].view_as(leaf)
        assert float((leaf.double() - want).abs().max()) < 20 * fine
        start += leaf.numel()


@pytest.mark.parametrize("kind", MODELS)
def test_weights_depend_on_the_place_alone_bit_for_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = seed_space(MODELS[kind](), num_seeds=40, seed=9)
    dtype = next(adapter.model.parameters()).dtype
    first = weights(adapter)
    *way, last = places(25, 40, dtype)
    for place in way:
        adapter.go(place)
    adapter.go(last)
    found = weights(adapter)
    assert not equal(found, first)

    other = seed_space(MODELS[kind](), num_seeds=40, seed=9)  # straight there, one seed after the other, other blocks
    monkeypatch.setattr(module, "CPU_NUMBERS", 997)
    for k in reversed(range(40)):
        other.go(torch.where(torch.arange(40) >= k, last, torch.zeros_like(last)))
    assert equal(weights(other), found)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        third = seed_space(MODELS[kind](), num_seeds=40, seed=9)
        third.go(last)
    finally:
        torch.set_num_threads(threads)
    assert equal(weights(third), found)

    adapter.detach()
    assert equal(weights(adapter), first), "the way back leaves a drift"
    unlike = seed_space(MODELS[kind](), num_seeds=40, seed=10)
    unlike.go(last)
    assert not equal(weights(unlike), found)


def test_only_what_changed_is_worked_through() -> None:
    adapter = seed_space(llama(dtype=torch.float32), num_seeds=30, seed=1)
    [a] = places(1, 30, torch.float32)
    assert adapter.go(a) == int((a != 0).sum())
    assert adapter.go(a.clone()) == 0
    b = a.clone()
    b[4] += 1e-3
    b[7] -= 1e-3
    assert adapter.go(b) == 2
    adapter.loss({COEFFICIENTS: b[None]}, {name: leaf[None] for name, leaf in batch(0).items()})
    assert adapter.go(b) == 0, "a loss leaves the weights where they are"


def test_a_place_too_far_away_is_refused_and_the_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_NUMBERS", 997)
    adapter = seed_space(llama(dtype=torch.float32), num_seeds=8, seed=1)
    near = torch.full((8,), 1e-3)
    adapter.go(near)
    before = weights(adapter)
    with pytest.raises(RunError, match="four times the largest"):
        adapter.go(torch.full((8,), 50.0))
    assert equal(weights(adapter), before)
    far = near.clone()
    far[0] = 1.3  # too far for the norms' weights, and not for the embeddings, which are moved before them
    with pytest.raises(RunError, match="four times the largest"):
        adapter.go(far)
    assert equal(weights(adapter), before), "what had been moved was not moved back"
    with pytest.raises(RunError, match="not finite"):
        adapter.go(torch.full((8,), math.nan))
    assert adapter.go(near) == 0
    assert equal(weights(adapter), before)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="bfloat16"):
        seed_space(llama(dtype=torch.bfloat16))
    with pytest.raises(UserError, match="num_seeds is 0"):
        seed_space(llama(), num_seeds=0)
    adapter = seed_space(llama(), num_seeds=8)
    with pytest.raises(UserError, match="only copy of the weights"):
        dpo(adapter)
    with pytest.raises(UserError, match=r"seed_coefficients is \[9\], expected \[8\]"):
        adapter.check({COEFFICIENTS: torch.zeros(9)})
    with pytest.raises(UserError, match="has no ranks"):
        adapter.narrow(adapter.init(0), Client("c", (), rank=2))
    apart = torch.zeros(2, 8, dtype=torch.float64)
    apart[1, 0] = 1e-3
    with pytest.raises(UserError, match="one client at a time"), adapter.bound({COEFFICIENTS: apart}):
        pass
    assert set(seed_space(llama(), num_seeds=8, magnitudes=True).init(0)) == {COEFFICIENTS, MAGNITUDES, COUNTS}


def test_clients_at_different_places_take_turns() -> None:
    adapter = seed_space(llama(), num_seeds=8)
    tree = {COEFFICIENTS: torch.stack(places(2, 8, torch.float64))}
    both = {name: torch.stack([batch(0)[name], batch(2)[name]]) for name in ("input_ids", "labels")}
    for function in (adapter.loss, lambda t, b: torch.stack(adapter.nll(t, b))):
        together = function(tree, both)
        for c in (0, 1):
            one = function(
                {COEFFICIENTS: tree[COEFFICIENTS][c : c + 1]}, {name: leaf[c : c + 1] for name, leaf in both.items()}
            )
            assert torch.allclose(together[..., c : c + 1], one, rtol=1e-12)
    assert float((adapter.loss(tree, both)[0] - adapter.loss(tree, both)[1]).abs()) > 1e-6


def test_local_models_are_evaluated_one_at_a_time() -> None:
    adapter = seed_space(llama(), num_seeds=16)
    algorithm = fedavg(local_only(zo_client(1e-3)))
    cohort = clients(3)
    state = initial_state(algorithm, adapter, 3)
    state, _ = run_round(algorithm, adapter, batched(8), state, cohort)

    def run(adapter, tree_C, block):
        with adapter.bound(tree_C) as model, torch.no_grad():
            out = model(input_ids=torch.arange(6)[None].expand(len(block), 6)).logits
        return [{"sum": float(out[i].abs().sum())} for i in range(len(block))]

    evaluation = Evaluation("logits", run)
    wide = batched(8).evaluate(algorithm, adapter, state, cohort, evaluation)
    assert wide == sequential().evaluate(algorithm, adapter, state, cohort, evaluation)
    assert len({row["sum"] for row in wide.values()}) == 3


def test_another_node_rebuilds_the_trained_weights_bit_for_bit_from_a_message() -> None:
    """The trained model's weights, and those of a node that gets K numbers as bytes and has only the base."""
    adapter = seed_space(llama(dtype=torch.float32), num_seeds=64, seed=1)
    algorithm = fedavg(zo_client(1e-3, epsilon=1e-3))
    state = initial_state(algorithm, adapter, 3)
    for _ in range(4):
        state, _ = run_round(algorithm, adapter, batched(4), state, clients())
    adapter.go(state.params[COEFFICIENTS])
    message = wire.decode(wire.encode("train", {}, params=state.params))
    node = seed_space(llama(dtype=torch.float32), num_seeds=64, seed=1)
    node.go(message.trees["params"][COEFFICIENTS])
    assert equal(weights(node), weights(adapter))
    assert gap(weights(node), weights(seed_space(llama(dtype=torch.float32), num_seeds=64, seed=1))) > 1e-3


def test_a_round_takes_under_18_kilobytes_both_ways_at_4096_seeds() -> None:
    """Messages as the codec makes them, at 200 steps: 4 bytes for each seed down, 6 for each drawn one up."""
    adapter = seed_space(llama(layers=1, dtype=torch.float32), num_seeds=4096)
    draw = torch.Generator().manual_seed(0)
    state = State(3, 7, {COEFFICIENTS: torch.randn(4096, generator=draw) * 1e-4}, None)
    client = Client("c0", [batch(0, rows=1, tokens=4)] * 200)

    def both_ways(**parts: tuple[Transform, ...]) -> tuple[float, float]:
        row = batched(1).train(fedavg(zo_client(1e-3), **parts), adapter, state, [client]).clients["c0"]
        return row["bytes_up"], row["bytes_down"]

    up, down = both_ways(compress=(nonzero(),))
    assert 4 * 4096 < down < 4 * 4096 + 300
    assert 6 * 190 < up < 6 * 200 + 1000, "some seeds are drawn twice; the rest are names and metrics"
    less_up, less_down = both_ways(compress=(nonzero(), zstd()), downlink=(zstd(),))  # as the method has them
    assert less_up + less_down < 18_000
    assert METHODS["fedkseed"]["compress"] == {"up": ["nonzero", "zstd"], "down": ["zstd"]}
