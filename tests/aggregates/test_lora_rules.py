"""What each rule makes of LoRA's factors, by algebra: for unequal weights, mixed ranks, Linear and Conv1D.

The weight that a client came to is W0 + (alpha / r_k) B_k A_k, formed here as a dense matrix.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tests.small import clients, fedavg, gap, llama, small_lora
from transformers.pytorch_utils import Conv1D

from fedloom.adapters import lora
from fedloom.aggregates import fedex_lora, flex_lora, flora, het_lora, mean
from fedloom.clients import sgd_client
from fedloom.errors import UserError
from fedloom.ops.low_rank import A, B
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched
from fedloom.runtimes.cohort import train_block
from fedloom.servers import fed_avgm
from fedloom.types import Client, Proposal, Site, State, Transform

RANK, ALPHA = 4, 8.0
SCALE = ALPHA / RANK
RANKS = [1, 4, 2, 3]


def gpt2():
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).double()


MODELS = {"llama": llama, "gpt2": gpt2}


# ranks and alphas by layer, for clients of any rank; biases where the model has them
MIXED = {"use_rslora": True, "rank_pattern": {"v_proj|c_proj": 3}, "alpha_pattern": {r".*\.0\..*": 5.0}}


def adapter_on(name: str, **settings):
    return lora(MODELS[name](), rank=RANK, alpha=ALPHA, targets="all-linear", **settings)


def started(adapter) -> State:
    """A state in which B is not zero."""
    state = initial_state(fedavg(), adapter, 3)
    draw = torch.Generator().manual_seed(5)
    params = {
        k: leaf + 0.1 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for k, leaf in state.params.items()
    }
    return State(state.seed, 0, params, None)


def weights(adapter) -> dict[str, torch.Tensor]:
    """Frozen weights as they are now, [O, D]."""
    return {
        name: (layer.weight.T if isinstance(layer, Conv1D) else layer.weight).detach().clone()
        for name, layer in adapter.sites.items()
    }


def effective(adapter, state: State, client: Client | None = None) -> dict[str, torch.Tensor]:
    """The weight of each layer with the adapter on it: everyone's, or what a client starts from."""
    adapter.sync(state.base)
    plain = weights(adapter)
    tree = state.params if client is None else adapter.narrow(state.params, client)
    rank = None if client is None else client.rank
    dense = {
        name: w + adapter.scale_of(rank, name) * tree[f"{name}.{B}"] @ tree[f"{name}.{A}"] for name, w in plain.items()
    }
    return {**dense, **{name: tree[name] for name in tree if name.endswith("bias")}}


def came_to(adapter, state: State, cohort: list[Client]) -> list[dict[str, torch.Tensor]]:
    """Each client's dense weights after its local work, found from its own narrowed factors."""
    adapter.sync(state.base)
    plain = weights(adapter)
    found = []
    algorithm = fedavg(sgd_client(sgd(0.3)))
    for client in cohort:
        site = Site(state.seed, state.round, client.id, tuple(c.id for c in cohort), len(client.batches))
        ((delta, _, _),) = train_block(algorithm, adapter, state, [client], [site])
        start = adapter.narrow(state.params, client)
        own = {name: start[name] + leaf for name, leaf in delta.items() if name.endswith("bias")}
        for name, w in plain.items():
            r, scale = adapter.ranks.at(name, client.rank), adapter.scale_of(client.rank, name)
            back = adapter.scale_of(None, name) / scale  # what is sent is in the scale of the full rank
            a = start[f"{name}.{A}"][:r] + delta[f"{name}.{A}"]
            b = start[f"{name}.{B}"][:, :r] + delta[f"{name}.{B}"] * back
            assert a.shape[0] == r
            own[name] = w + scale * b @ a
        found.append(own)
    return found


def mean_of(dense: list[dict[str, torch.Tensor]], cohort: list[Client]) -> dict[str, torch.Tensor]:
    total = sum(c.weight for c in cohort)
    return {name: sum(c.weight * w[name] for c, w in zip(cohort, dense, strict=True)) / total for name in dense[0]}


def after(rule, adapter, state: State, cohort: list[Client]) -> State:
    algorithm = fedavg(sgd_client(sgd(0.3)), aggregate=rule)
    moved, report = run_round(algorithm, adapter, batched(8), state, cohort)
    assert not report.failed
    return moved


def biggest(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [None, RANKS])
@pytest.mark.parametrize("rule", [flora, fedex_lora])
@pytest.mark.parametrize("settings", ["one rank", "mixed"])
def test_exact_rules_give_the_mean_of_the_clients_weights(model, ranks, rule, settings):
    one = settings == "one rank"
    adapter = adapter_on(model, **({} if one else {**MIXED, "bias": "all" if model == "gpt2" else "none"}))
    assert one or len({adapter.scale_of(None, name) for name in adapter.sites}) == 4
    assert (len(adapter.biased) > 0) == (not one and model == "gpt2")
    scale = SCALE if one else adapter.ranks.scale
    state = started(adapter)
    cohort = clients(4, ranks)
    for _ in range(2):  # the second round begins with merged weights
        want = mean_of(came_to(adapter, state, cohort), cohort)
        moved = after(rule(scale), adapter, state, cohort)
        got = effective(adapter, moved)
        before = effective(adapter, state)
        assert biggest(got, want) < 1e-10
        assert biggest(before, want) > 1e-3, "nothing was learnt"
        state = moved
    export_gives_the_same_model(adapter, state)
    plain = after(mean(), adapter, state, cohort)
    inexact = effective(adapter, plain)
    assert biggest(inexact, mean_of(came_to(adapter, state, cohort), cohort)) > 1e-4, "the plain mean would do as well"


def export_gives_the_same_model(adapter, state):
    """What was merged is stacked into the exported factors, at whatever rank each layer has come to."""
    tree = {k: leaf[None] for k, leaf in state.params.items()}
    ids = torch.arange(12).reshape(2, 6)
    adapter.sync(state.base)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapter.export(state.params, Path(folder) / "adapter")
        with adapter.bound(tree) as tuned:
            want = tuned(ids).logits
        again = MODELS[adapter.model.config.model_type]()
        got = peft.PeftModel.from_pretrained(again, Path(folder) / "adapter").double().eval()(ids).logits
    assert float((got - want).abs().max()) < 1e-9


def test_flora_starts_anew_with_another_a_and_no_b():
    adapter = adapter_on("llama")
    state = started(adapter)
    one = after(flora(SCALE), adapter, state, clients(4))
    two = after(flora(SCALE), adapter, one, clients(4))
    again = after(flora(SCALE), adapter, one, clients(4)[::-1])
    for name in one.params:
        if name.endswith(B):
            assert float(one.params[name].abs().max()) == 0
        else:
            assert not torch.equal(one.params[name], two.params[name])
            assert torch.equal(two.params[name], again.params[name])
            bound = 1 / one.params[name].shape[1] ** 0.5
            assert 0.9 * bound < float(one.params[name].abs().max()) <= bound


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ranks", [None, RANKS])
@pytest.mark.parametrize("settings", [{}, MIXED], ids=["one rank", "mixed"])
def test_flex_lora_gives_everyone_the_best_approximation_of_their_rank(model, ranks, settings):
    adapter = adapter_on(model, **settings)
    state = started(adapter)
    cohort = clients(4, ranks)
    plain = weights(adapter)
    mean_w = mean_of(came_to(adapter, state, cohort), cohort)
    moved = after(flex_lora(), adapter, state, cohort)
    for client in [None, *cohort]:
        got = effective(adapter, moved, client)
        for name, w in mean_w.items():
            r = adapter.ranks.at(name, client.rank if client else None)
            u, s, vh = torch.linalg.svd(w - plain[name])
            want = plain[name] + (u[:, :r] * s[:r]) @ vh[:r]
            assert float((got[name] - want).abs().max()) < 1e-9, (name, r)
    assert not moved.base


def test_flex_lora_with_one_client_of_low_rank_leaves_the_other_directions_alive():
    adapter = adapter_on("llama")
    state = started(adapter)
    cohort = clients(1, [1])
    moved = after(flex_lora(), adapter, state, cohort)
    for name, leaf in moved.params.items():
        if name.endswith(A):
            assert float(leaf.abs().amax(1).min()) > 1e-3, name
    assert biggest(effective(adapter, moved), came_to(adapter, state, cohort)[0]) < 1e-9


@pytest.mark.parametrize("settings", [{}, MIXED], ids=["one rank", "mixed"])
@pytest.mark.parametrize("norm_weighted", [True, False])
def test_het_lora_averages_padded_factors_by_the_norm_of_what_was_learnt(norm_weighted, settings):
    adapter = adapter_on("llama", **settings)
    state = started(adapter)
    cohort = clients(4, RANKS)
    plain = weights(adapter)
    dense = came_to(adapter, state, cohort)
    norms = [sum(float((own[n] - plain[n]).square().sum()) for n in plain) ** 0.5 for own in dense]
    p = norms if norm_weighted else [c.weight for c in cohort]
    p = [value / sum(p) for value in p]
    moved = after(het_lora(norm_weighted=norm_weighted, scale=adapter.ranks.scale), adapter, state, cohort)
    algorithm = fedavg(sgd_client(sgd(0.3)))
    want = {name: torch.zeros_like(leaf) for name, leaf in state.params.items()}
    for client, share in zip(cohort, p, strict=True):
        site = Site(state.seed, 0, client.id, tuple(c.id for c in cohort), len(client.batches))
        ((delta, _, _),) = train_block(algorithm, adapter, state, [client], [site])
        for name, leaf in delta.items():
            piece = tuple(slice(size) for size in leaf.shape)
            want[name][piece] += share * (state.params[name][piece] + leaf)
    assert gap(moved.params, want) < 1e-10


def test_what_a_low_rank_client_sends_is_small():
    adapter = small_lora(rank=4)
    state = initial_state(fedavg(), adapter, 3)
    _, report = run_round(fedavg(), adapter, batched(8), state, clients(4, RANKS))
    up = {client: row["bytes_up"] for client, row in report.clients.items()}
    assert up["c0"] < up["c2"] < up["c3"] < up["c1"]


def test_rules_that_propose_new_factors_refuse_a_server_optimiser_and_protection_all_at_once():
    masks = Transform(lambda tree, site: tree, lambda tree, site: tree)
    for rule, name in ((flora(SCALE), "flora"), (flex_lora(), "flex_lora"), (fedex_lora(SCALE), "fedex_lora")):
        with pytest.raises(UserError) as caught:
            fedavg(aggregate=rule, server=fed_avgm(), protect=(masks,))
        assert f"{name} proposes new factors" in str(caught.value)
        assert f"{name} stacks" in str(caught.value)
    with pytest.raises(UserError, match="het_lora proposes new factors"):
        fedavg(aggregate=het_lora(), server=fed_avgm())


def test_ffa_and_rolora_average_exactly():
    """With one factor frozen the mean of the other is the mean of the products."""
    adapter = adapter_on("llama")
    state = started(adapter)
    for factor in ("lora_B", "lora_A"):
        update = sgd_client(sgd(0.3), trainable=lambda name, factor=factor: factor in name)
        algorithm = fedavg(update)
        dense = []
        for client in clients(4):
            site = Site(state.seed, 0, client.id, (), len(client.batches))
            ((delta, _, _),) = train_block(algorithm, adapter, state, [client], [site])
            assert all(factor in name for name in delta)
            own = {**state.params, **{name: state.params[name] + leaf for name, leaf in delta.items()}}
            dense.append(effective(adapter, State(3, 0, own, None)))
        moved, _ = run_round(algorithm, adapter, batched(8), state, clients(4))
        assert biggest(effective(adapter, moved), mean_of(dense, clients(4))) < 1e-10


def test_a_proposal_of_unchanged_length_keeps_its_names():
    adapter = adapter_on("llama")
    state = started(adapter)
    for rule in (flora(SCALE), flex_lora(), fedex_lora(SCALE), het_lora()):
        moved = after(rule, adapter, state, clients(3, [2, 4, 1]))
        assert {k: v.shape for k, v in moved.params.items()} == {k: v.shape for k, v in state.params.items()}
    assert Proposal({}).merge == {}
