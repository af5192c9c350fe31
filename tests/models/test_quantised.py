"""A base in 8 or 4 bits gives the gradients of the weights that it reads back, before and after evaluations."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.small import clients, fedavg
from torch import Tensor, nn

from fedloom.adapters import bottleneck, lora, prefix_tuning
from fedloom.clients import mezo_client, sgd_client
from fedloom.errors import RunError, UserError
from fedloom.models import quantised
from fedloom.models.load import Base, load_base, random_base
from fedloom.optimizers import adamw, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.study.objections import objections
from fedloom.study.recipe import Recipe

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in quantised._NEEDED), reason=f"needs {quantised.INSTALL}"
)
KINDS = ("int8", "nf4")

ADAPTERS: dict[str, Callable[[nn.Module], Any]] = {
    "lora": lambda model: lora(model, rank=2, targets="all-linear"),
    "bottleneck": lambda model: bottleneck(model, size=4),
    "prefix_tuning": lambda model: prefix_tuning(model, num_virtual_tokens=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    base = random_base(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=96, vocab_size=300, seed=3)
    base.model.save_pretrained(place)
    base.tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, Base]:
    return {kind: load_base(str(folder), dtype="float32", quantization=kind) for kind in ("none", *KINDS)}


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_packed_base_are_told_before_it_is_packed(bases: dict[str, Base], kind: str) -> None:
    told = quantised.packed_bytes(bases["none"].model, kind)
    assert told == pytest.approx(quantised.stored_bytes(bases[kind].model), rel=1e-3)
    assert told < 0.9 * quantised.stored_bytes(bases["none"].model)
    largest = max(layer.weight.numel() * 4 for layer in bases["none"].model.modules() if isinstance(layer, nn.Linear))
    assert 0 < quantised.largest_layer_bytes(bases["none"].model) <= largest


def read_back(bases: dict[str, Base], kind: str) -> Any:
    """The plain model in float32 whose weights are those of the quantised one."""
    model = copy.deepcopy(bases["none"].model)
    changed = 0
    for name, layer in bases[kind].model.named_modules():
        if quantised.is_int8(layer) or quantised.is_nf4(layer):
            weight: Any = model.get_submodule(name).weight
            before = weight.detach().clone()
            weight.data = quantised.dequantised(layer, torch.float32)
            away = float((weight - before).norm() / before.norm())
            assert {"int8": 1e-3, "nf4": 3e-2}[kind] < away < {"int8": 2e-2, "nf4": 0.15}[kind]
            changed += 1
    assert changed == 2 * 7
    return model


def data(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(4, 300, (1, 2, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def grads(adapter: Any, tree_C: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in tree_C.items()}
    return list(torch.autograd.grad(adapter.loss(leaves, data(1)).sum(), list(leaves.values())))


def moved(adapter: Any) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {k: (x + 0.02 * torch.randn(x.shape, generator=draw))[None] for k, x in adapter.init(3).items()}


@installed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ADAPTERS)
def test_gradients_are_those_of_the_weights_read_back_however_often_it_is_evaluated(bases, kind, what):
    one, other = ADAPTERS[what](copy.deepcopy(bases[kind].model)), ADAPTERS[what](read_back(bases, kind))
    assert one.causal.head is not None  # the head is no packed one, so logits are never whole
    assert all(leaf.dtype == torch.float32 for leaf in one.init(3).values())
    tree_C = moved(one)
    first = grads(one, tree_C)
    want = grads(other, tree_C)
    for got, right in zip(first, want, strict=True):
        assert float((got - right).norm()) <= 1e-6 * float(right.norm()) + 1e-12
    assert sum(float(right.norm()) > 0 for right in want) > len(want) / 2
    for _ in range(2):
        one.model.eval()
        one.nll(tree_C, data(2))
        assert all(torch.equal(a, b) for a, b in zip(first, grads(one, tree_C), strict=True))


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_with_evaluations_between_them_are_those_of_the_weights_read_back(bases, kind):
    found = []
    for model in (copy.deepcopy(bases[kind].model), read_back(bases, kind)):
        adapter = lora(model, rank=2)
        algorithm = fedavg(sgd_client(adamw(1e-2)))
        state = initial_state(algorithm, adapter, 3)
        losses = []
        for _ in range(3):
            losses.append(float(adapter.nll({k: x[None] for k, x in state.params.items()}, data(0))[0]))
            state, _ = run_round(algorithm, adapter, batched(2), state, clients(3))
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert abs(found[0][2] - found[0][0]) > 1e-3 * found[0][0]


@installed
def test_a_kernel_that_reads_back_other_weights_is_not_used(monkeypatch, folder):
    """As bitsandbytes' is on CPUs with AVX-512 for some shapes."""
    import bitsandbytes.functional as functional

    right = load_base(str(folder), dtype="float32", quantization="nf4")
    wanted = grads(lora(right.model, rank=2), moved(lora(right.model, rank=2)))
    honest = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args, **more: 1.3 * honest(*args, **more))
    base = load_base(str(folder), dtype="float32", quantization="nf4")
    adapter = lora(base.model, rank=2)
    for got, want in zip(grads(adapter, moved(adapter)), wanted, strict=True):
        assert float((got - want).norm()) <= 1e-5 * float(want.norm()) + 1e-12


@installed
def test_steps_without_gradients_run_on_packed_weights(bases):
    adapter = lora(copy.deepcopy(bases["nf4"].model), rank=2)
    algorithm = fedavg(mezo_client(sgd(1e-3)))
    state = initial_state(algorithm, adapter, 3)
    after, _ = run_round(algorithm, adapter, sequential(), state, clients(2))
    assert any(not torch.equal(after.params[name], leaf) for name, leaf in state.params.items())


def repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own code as on a CPU with AVX-512 and bfloat16, its two kernels replaced by plain ones."""
    import bitsandbytes.functional as functional
    from bitsandbytes.nn import modules

    def repack(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
        state.packing_format_for_cpu = True
        return packed, state

    def product(x: Tensor, packed: Tensor, out: Any = None, state: Any = None) -> Tensor:
        return (x @ functional.dequantize_4bit(packed, state).to(x.dtype).T).detach()

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    monkeypatch.setattr(functional, "gemv_4bit", product)


@installed
def test_the_trap_of_repacked_weights_is_prevented_and_without_that_the_guard_speaks(monkeypatch, folder):
    repacking(monkeypatch)
    base = load_base(str(folder), dtype="float32", quantization="nf4")
    adapter = lora(base.model, rank=2)
    tree_C = moved(adapter)
    adapter.nll(tree_C, data(0))
    before = grads(adapter, tree_C)
    algorithm = fedavg(sgd_client(sgd(0.1)))
    state = initial_state(algorithm, adapter, 3)
    state, _ = run_round(algorithm, adapter, sequential(), state, clients(2))

    for layer in base.model.modules():
        if quantised.is_nf4(layer):
            layer.support_avx512bf16_for_cpu = True  # as bitsandbytes makes it
    loss = adapter.loss(tree_C, data(1))
    adapter.nll(tree_C, data(0))  # the evaluation that springs the trap
    again = adapter.loss({k: x.requires_grad_() for k, x in tree_C.items()}, data(1))
    assert float(again.detach()) == pytest.approx(float(loss), rel=1e-6)  # nothing to be seen in the loss
    assert not again.requires_grad and all(grad is not None for grad in before)
    with pytest.raises(RunError, match=r"no gradient passes model\.layers\.\d\.\S+ \(Linear4bit\)"):
        run_round(algorithm, adapter, sequential(), state, clients(2))


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_what_one_row_gives_does_not_depend_on_its_neighbours(bases, kind):
    model: Any = bases[kind].model
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[3] *= 1e3  # an outlier, which LLM.int8() would take out of every row
    assert float((layer(x)[:3] - layer(x[:3])).abs().max()) < 1e-5


@installed
def test_counts_are_those_of_the_plain_model_and_bytes_are_exact(bases):
    plain = bases["none"]
    layers = [layer for layer in plain.model.modules() if isinstance(layer, nn.Linear)][:-1]
    weights, rows = sum(layer.weight.numel() for layer in layers), sum(layer.out_features for layer in layers)
    assert {base.num_parameters for base in bases.values()} == {plain.num_parameters}
    size = {kind: quantised.stored_bytes(base.model) for kind, base in bases.items()}
    assert size["none"] - size["int8"] == 3 * weights - 4 * rows
    blocks = [layer.weight.numel() // 64 for layer in layers]
    scales = sum(n + 4 * (1 + -(-n // 256)) for n in blocks)  # a byte per block, a float per 256 of them and one more
    assert size["none"] - size["nf4"] == 4 * weights - weights // 2 - scales
    sizes = [quantised.num_weights(layer) for layer in bases["nf4"].model.modules() if quantised.is_nf4(layer)]
    assert sizes == [layer.weight.numel() for layer in layers]


@installed
def test_gpt2s_layers_lie_the_other_way_round(tiny_gpt2, tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    random_base(vocab_size=300).tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    assert config["model_type"] == "gpt2"
    base = load_base(str(tmp_path), dtype="float32", quantization="int8")
    plain = load_base(str(tmp_path), dtype="float32")
    assert base.num_parameters == plain.num_parameters
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        got, want = (one.model(input_ids=ids).logits for one in (base, plain))
    assert 0 < float((got - want).norm() / want.norm()) < 2e-2


def test_without_the_packages_it_says_how_to_get_them(monkeypatch, folder):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError) as told:
        load_base(str(folder), quantization="nf4")
    assert "bitsandbytes is not installed" in told.value.message
    assert told.value.hint is not None and 'pip install "fedloom[quant]"' in told.value.hint


def test_what_is_packed_already_or_of_no_known_kind_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="must be one of none, int8, nf4"):
        load_base(str(folder), quantization="int4")
    place = Path(shutil.copytree(folder, tmp_path / "packed"))
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantised already .gptq") as told:
        load_base(str(place))
    assert "full precision" in str(told.value.hint)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"adapter": {"kind": "full"}}, "nf4, but adapter.kind full trains the model's own weights"),
        ({"adapter": {"kind": "last_layers"}}, "nf4, but adapter.kind last_layers trains"),
        ({"method": "fedkseed"}, "nf4, but adapter.kind seed_space moves the model's own weights"),
        ({"adapter": {"kind": "dora"}}, "nf4, but adapter.kind dora needs the norms"),
        ({"method": "flora"}, "nf4, but flora adds to the frozen weights"),
        ({"method": "fedex_lora"}, "nf4, but fedex_lora adds to the frozen weights"),
        ({"start_from": "runs/sft"}, "nf4, but start_from merges into the weights"),
        ({"dtype": "float64"}, "float64, but a base in nf4 computes in"),
        ({"runtime": {"shard_base": True}}, "nf4, but runtime.shard_base cuts weights up"),
    ],
)
def test_what_needs_the_weights_themselves_is_refused(values, said):
    with pytest.raises(ValidationError) as told:
        Recipe(model="builtin", local_steps=1, quantization="nf4", **values)
    assert said in str(told.value)


@pytest.mark.parametrize("method", ["fedavg", "flex_lora", "het_lora", "fedsa_lora", "fedmezo", "scaffold", "fednova"])
def test_methods_that_leave_the_base_alone_go_with_it(method):
    assert not list(objections(Recipe(model="builtin", local_steps=1, quantization="int8", method=method)))
