"""Bottleneck adapters against modules written by hand into the models, client by client."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.nn.functional as F
from tests.adapters.test_full import MODELS
from tests.small import batch, clients, fedavg, gap, llama
from torch import nn

from fedloom.adapters import bottleneck
from fedloom.clients import sgd_client
from fedloom.errors import UserError
from fedloom.optimizers import adamw
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import ClientSite, batched, loopback, sequential
from fedloom.types import Client

ACTS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}
# where each family's block ends its attention and its MLP: the projection whose output goes to the residual
ENDS = {
    "llama": ("model.layers.{}.self_attn", "o_proj", "model.layers.{}.mlp", "down_proj"),
    "gpt2": ("transformer.h.{}.attn", "c_proj", "transformer.h.{}.mlp", "c_proj"),
    "opt": ("model.decoder.layers.{}.self_attn", "out_proj", "model.decoder.layers.{}.fc2", ""),
    "phi": ("model.layers.{}.self_attn", "dense", "model.layers.{}.mlp", "fc2"),
}


class Houlsby(nn.Module):
    """The paper's module behind a layer: a skip connection around two projections."""

    def __init__(self, layer: nn.Module, hidden: int, size: int, act: str) -> None:
        super().__init__()
        self.layer, self.act = layer, ACTS[act]()
        self.adapter_down, self.adapter_up = nn.Linear(hidden, size), nn.Linear(size, hidden)

    def forward(self, x):
        y = self.layer(x)
        return self.adapter_up(self.act(self.adapter_down(y))) + y


def by_hand(family: str, act: str, after: str, tree):
    """A model with the modules in it, and their parameters by our names."""
    model = MODELS[family]().to(next(iter(tree.values())).dtype).eval().requires_grad_(False)
    attention, a_end, mlp, m_end = ENDS[family]
    params = {}
    for i in range(model.config.num_hidden_layers):
        parts = [(mlp, m_end)] if after == "mlp" else [(attention, a_end), (mlp, m_end)]
        for part, end in parts:
            site = part.format(i)
            holder, _, name = f"{site}.{end}".rstrip(".").rpartition(".")
            made = Houlsby(getattr(model.get_submodule(holder), name), 32, 6, act).to(next(iter(tree.values())).dtype)
            for leaf, value in made.named_parameters():
                if leaf.startswith("adapter_"):
                    value.data.copy_(tree[f"{site}.{leaf}"])
                    params[f"{site}.{leaf}"] = value
            setattr(model.get_submodule(holder), name, made)
    return model, params


def filled(adapter, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return {
        k: (leaf + 0.2 * torch.randn(leaf.shape, generator=draw, dtype=torch.float64)).to(dtype)
        for k, leaf in adapter.init(seed).items()
    }


@pytest.mark.parametrize("after", ["attention_and_mlp", "mlp"])
@pytest.mark.parametrize("family", ENDS)
def test_losses_and_gradients_of_a_cohort_are_those_of_modules_by_hand(family, after):
    act = {"llama": "relu", "gpt2": "gelu", "opt": "silu", "phi": "tanh"}[family]
    adapter = bottleneck(MODELS[family](), size=6, non_linearity=act, after=after)
    trees = [filled(adapter, seed) for seed in (1, 2)]
    batches = [batch(seed) for seed in (1, 2)]
    leaves = {name: torch.stack([tree[name] for tree in trees]).requires_grad_() for name in trees[0]}
    loss_C = adapter.loss(leaves, {name: torch.stack([data[name] for data in batches]) for name in batches[0]})
    grads = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    for c, (tree, data) in enumerate(zip(trees, batches, strict=True)):
        model, params = by_hand(family, act, after, tree)
        assert params.keys() == tree.keys()
        logits = model(input_ids=data["input_ids"]).logits[:, :-1]
        want = F.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
        assert loss_C[c].item() == pytest.approx(want.item(), rel=1e-9)
        want_grads = dict(zip(params, torch.autograd.grad(want, list(params.values())), strict=True))
        for name, got in zip(leaves, grads, strict=True):
            assert float((got[c] - want_grads[name]).abs().max()) < 1e-9 * (1 + float(want_grads[name].abs().max()))
            assert float(want_grads[name].abs().max()) > 1e-7, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_float32_to_one_in_a_hundred_thousand(family):
    adapter = bottleneck(MODELS[family]().float(), size=6)
    tree = filled(adapter, 1, torch.float32)
    model, params = by_hand(family, "relu", "attention_and_mlp", tree)
    data = batch(2)
    logits = model(input_ids=data["input_ids"]).logits[:, :-1]
    want = F.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
    want_grads = torch.autograd.grad(want, list(params.values()))
    own = {name: tree[name][None].clone().requires_grad_() for name in params}
    loss = adapter.loss(own, {k: leaf[None] for k, leaf in data.items()})
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for got, wanted in zip(torch.autograd.grad(loss.sum(), list(own.values())), want_grads, strict=True):
        assert float((got[0] - wanted).norm()) < 1e-5 * float(wanted.norm())


def test_the_start_is_the_base_and_near_zero():
    adapter = bottleneck(llama(), reduction_factor=4)
    assert adapter.size == 8
    tree = adapter.init(3)
    ids = batch(1)["input_ids"]
    plain = llama().eval()(input_ids=ids).logits
    with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
        assert float((tuned(input_ids=ids).logits - plain).abs().max()) == 0
    down = torch.cat([leaf.flatten() for name, leaf in tree.items() if "down.weight" in name])
    assert 0.005 < float(down.std()) < 0.01
    assert float(down.abs().max()) <= 0.02
    other = adapter.init(4)
    assert gap(tree, other) > 1e-3
    with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in filled(adapter, 1).items()}) as tuned:
        assert float((tuned(input_ids=ids).logits - plain).abs().max()) > 1e-2
    with torch.no_grad():
        assert float((adapter.model(input_ids=ids).logits - plain).abs().max()) == 0, "unbound"


def test_batched_and_messages_equal_sequential():
    algorithm = fedavg(sgd_client(adamw(1e-2), max_grad_norm=1.0))

    def new():
        return bottleneck(llama(), size=6)

    homes = {c.id: ClientSite(c.id, lambda: (algorithm, new()), lambda r, c=c: c, {}) for c in clients()}
    results = []
    for runtime in (sequential(), batched(8), loopback({i: home.serve for i, home in homes.items()})):
        adapter = new()
        state = initial_state(algorithm, adapter, 3)
        for _ in range(2):
            state, report = run_round(algorithm, adapter, runtime, state, clients())
            assert not report.failed
        results.append(state.params)
    assert gap(results[0], new().init(3)) > 1e-3
    assert max(gap(results[0], other) for other in results[1:]) < 1e-9


def test_the_folder_comes_back_and_peft_says_that_it_is_not_its_own(tmp_path):
    adapter = bottleneck(llama(dtype=torch.float32), size=6, non_linearity="gelu", after="mlp", base_name="some/base")
    tree = filled(adapter, 1, torch.float32)
    adapter.export(tree, tmp_path / "adapter")
    assert gap(adapter.load(tmp_path / "adapter"), tree) == 0
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "some/base"
    assert (told["bottleneck_size"], told["non_linearity"], told["bottleneck_after"]) == (6, "gelu", "mlp")
    assert "PEFT has no such kind" in told["note"]
    with pytest.raises((KeyError, ValueError), match="FEDLOOM_BOTTLENECK"):
        peft.PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is \[6, 32\], expected \[5, 32\]"):
        bottleneck(llama(), size=5, after="mlp").load(tmp_path / "adapter")
    with pytest.raises(UserError, match="not an adapter folder"):
        adapter.load(tmp_path)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="bottleneck_size is 0"):
        bottleneck(llama(), size=0)
    with pytest.raises(UserError, match="reduction_factor is -1"):
        bottleneck(llama(), reduction_factor=-1)
    with pytest.raises(UserError, match="has no ranks"):
        bottleneck(llama(), size=2).narrow({}, Client("c", (), rank=2))
    with pytest.raises(UserError, match="cannot be added to the weights"):
        bottleneck(llama(), size=2).merge({})
    model = llama()
    for block in model.model.layers:
        block.another_attention = nn.Linear(4, 4)
    with pytest.raises(UserError, match="no single attention and MLP among its parts, which are: self_attn, mlp"):
        bottleneck(model)
