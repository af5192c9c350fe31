"""Tuning of the last blocks: gradients of plain autograd for them, and no graph below."""

from __future__ import annotations

import pytest
import torch
from tests.adapters.test_full import MODELS, moved, plain_loss_and_gradients
from tests.small import batch, clients, fedavg, gap, llama

from fedloom.adapters import last_layers
from fedloom.adapters.targets import decoder_blocks
from fedloom.clients import sgd_client
from fedloom.errors import UserError
from fedloom.optimizers import adamw
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import ClientSite, batched, loopback, sequential

STACKS = {"llama": ("model.layers", 3), "gpt2": ("transformer.h", 2), "opt": ("model.decoder.layers", 2),
          "phi": ("model.layers", 2)}  # fmt: skip
NORMS = {"llama": "model.norm.", "gpt2": "transformer.ln_f.", "opt": "model.decoder.final_layer_norm.",
         "phi": "model.final_layernorm."}  # fmt: skip


@pytest.mark.parametrize("model", STACKS)
@pytest.mark.parametrize("extra", ["none", "norm", "norm_and_head"])
def test_gradients_of_a_cohort_are_those_of_plain_autograd_and_nothing_below_has_a_graph(model, extra):
    if extra == "norm_and_head" and model in ("gpt2", "opt"):
        with pytest.raises(UserError, match="head is its embeddings"):
            last_layers(MODELS[model](), layers=1, extra=extra)
        return
    adapter = last_layers(MODELS[model](), layers=1, extra=extra)
    stack, number = STACKS[model]
    above = (f"{stack}.{number - 1}.",)
    above += () if extra == "none" else (NORMS[model],)
    above += ("lm_head.",) if extra == "norm_and_head" else ()
    wanted = {name for name, _ in adapter.model.named_parameters() if name.startswith(above)}
    trees = [moved(adapter.init(0), seed) for seed in (1, 2)]
    assert set(trees[0]) == wanted

    graph: dict[str, bool] = {}
    for name, block in decoder_blocks(adapter.model).items():
        block.register_forward_pre_hook(lambda _, args, name=name: graph.update({name: args[0].requires_grad}))
    batches = [batch(seed) for seed in (1, 2)]
    leaves = {name: torch.stack([tree[name] for tree in trees]).requires_grad_() for name in trees[0]}
    loss_C = adapter.loss(leaves, {name: torch.stack([data[name] for data in batches]) for name in batches[0]})
    assert graph == {f"{stack}.{i}": False for i in range(number)}, "a graph came from below the trained block"
    grads = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    for c, (tree, data) in enumerate(zip(trees, batches, strict=True)):
        want, want_grads = plain_loss_and_gradients(MODELS[model](), tree, data)
        assert loss_C[c].item() == pytest.approx(want.item(), rel=1e-9)
        for name, got in zip(leaves, grads, strict=True):
            size = 1 + float(want_grads[name].abs().max())
            assert float((got[c] - want_grads[name]).abs().max()) < 1e-9 * size, name


def test_batched_and_messages_equal_sequential():
    algorithm = fedavg(sgd_client(adamw(1e-3), max_grad_norm=1.0))
    homes = {c.id: ClientSite(c.id, lambda: (algorithm, last_layers(llama())), lambda r, c=c: c, {}) for c in clients()}
    results = []
    for runtime in (sequential(), batched(8), loopback({i: home.serve for i, home in homes.items()})):
        state = initial_state(algorithm, last_layers(llama()), 3)
        adapter = last_layers(llama())
        for _ in range(2):
            state, report = run_round(algorithm, adapter, runtime, state, clients())
            assert not report.failed
        results.append(state.params)
    assert gap(results[0], last_layers(llama()).init(3)) > 1e-4
    assert max(gap(results[0], other) for other in results[1:]) < 1e-9


def test_more_layers_than_there_are_is_refused():
    with pytest.raises(UserError, match="trainable_layers is 4, but the model has 3"):
        last_layers(llama(), layers=4)
    with pytest.raises(UserError, match="trainable_layers is 0"):
        last_layers(llama(), layers=0)
    model = llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(UserError, match="has 0 stacks of 7 layers"):
        last_layers(model, layers=1)
