"""Packed rows, a shared beginning and a narrowed last block against plain padded rows: the same numbers, less work."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from tests.adapters.test_recompute import KINDS, moved
from tests.small import VOCAB, gap, llama
from torch import nn

from fedloom.adapters import dpo, full, lora, with_recompute
from fedloom.models import rows as rows_of_models
from fedloom.models.causal import CausalLM
from fedloom.models.rows import Rows
from fedloom.ops import cross_entropy, packing
from fedloom.ops.packing import pick, pick_of
from fedloom.runtimes.cohort import collate

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
ARCHITECTURES = {
    "Llama": SMALL,
    "Qwen2": SMALL,
    "Qwen3": {**SMALL, "head_dim": 8},
    "Mistral": {**SMALL, "sliding_window": 7},
    "Gemma2": {**SMALL, "head_dim": 8, "sliding_window": 7, "attn_logit_softcapping": 2.0},
    "Phi": SMALL,
    "GPTNeoX": {**SMALL, "num_key_value_heads": 4},
    "GPT2": GPT2,
}
NARROWED = {
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Gemma2",
    "Phi",
    "GPTNeoX",
}  # GPT-2's body folds its output by its input
PACKING_KINDS = [kind for kind in KINDS if kind not in ("dropout", "prefix_tuning")]


def model_of(name: str):
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    maker = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    return in_doubles(maker(config).double().eval())


def in_doubles(model):
    """Its norms, too, which compute in float32 whatever comes: sums in another order would show."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gain = 1.0 if "Gemma" in type(module).__name__ else 0.0
            eps = getattr(module, "eps", None) or getattr(module, "variance_epsilon", None)

            def forward(x, module=module, gain=gain, eps=eps):
                return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)) + gain * (
                    x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
                )

            module.forward = forward
    return model


def ragged(c: int, labelled_from: int = 12) -> dict:
    """Rows of several lengths per client, some of whom begin alike; one of them has no label at all."""
    batches = []
    for i in range(c):
        draw = torch.Generator().manual_seed(i)
        b, t = 4 - i % 2, 22 + 3 * i
        ids, labels = torch.randint(1, VOCAB, (b, t), generator=draw), torch.full((b, t), -100)
        ids[:, : 9 + i] = ids[0, : 9 + i]
        ids[1, : 12 + i] = ids[0, : 12 + i]
        lengths = [t - 3 * row for row in range(b)]
        for row, n in enumerate(lengths):
            ids[row, n:] = 0
            if row != 2:
                labels[row, labelled_from + row : n] = ids[row, labelled_from + row : n]
        batches.append({"input_ids": ids, "labels": labels, "lengths": torch.tensor(lengths)})
    return collate(batches, list(range(40, 40 + c)), torch.device("cpu"))


WAYS = {"padded": (False, False), "packed": (False, False), "shared": (True, False), "narrowed": (True, True)}


def gradients(adapter, batch, way: str):
    rows = adapter.causal.rows
    rows.way = "padded" if way == "padded" else "packed"
    rows.shares, rows.narrows = WAYS[way]
    leaves = moved(adapter, len(batch["input_ids"]))
    loss_C = adapter.loss(leaves, batch)
    found = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    return loss_C.detach(), dict(zip(leaves, found, strict=True))


def same_every_way(adapter, batch, narrowed: bool = True, tolerance: float = 1e-10) -> None:
    want_loss, want = gradients(adapter, batch, "padded")
    sizes = []
    watch = adapter.causal.rows._blocks[0].register_forward_pre_hook(
        lambda _, args, given: sizes.append((args[0] if args else given["hidden_states"]).shape[:2].numel()),
        with_kwargs=True,
    )
    for way in ("packed", "shared", "narrowed"):
        got_loss, got = gradients(adapter, batch, way)
        assert float((want_loss - got_loss).abs().max()) < tolerance, way
        assert gap(want, got) < tolerance, way
        sizes.append(0)
    watch.remove()
    assert adapter.causal.rows._can_pack and adapter.causal.rows._can_narrow == narrowed
    passes = [max(sizes[at - 1], 1) for at, size in enumerate(sizes) if not size]
    assert passes[1] < passes[0] < batch["input_ids"].numel(), "less was computed"
    assert max(float(leaf.abs().max()) for leaf in want.values()) > 1e-3, "there is something to compare"


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_architectures(name, c):
    tolerance = 1e-7 if name == "Gemma2" else 1e-10  # its softmax is in float32 whatever comes
    adapter = lora(model_of(name), rank=4, alpha=8.0, targets="all-linear")
    same_every_way(adapter, ragged(c), name in NARROWED, tolerance)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2"])
def test_gradients_with_positions_added_for_the_sake_of_few_shapes(name, c, monkeypatch):
    adapter = lora(model_of(name), rank=4, alpha=8.0, targets="all-linear")
    want_loss, want = gradients(adapter, ragged(c), "padded")
    for module in (rows_of_models, cross_entropy):
        monkeypatch.setattr(module, "rounded", lambda size, *_: -(-size // 32) * 32)
    sizes = []
    adapter.causal.rows._blocks[0].register_forward_pre_hook(
        lambda _, args, given: sizes.append((args[0] if args else given["hidden_states"]).shape[1]), with_kwargs=True
    )
    for way in WAYS:
        got_loss, got = gradients(adapter, ragged(c), way)
        assert float((want_loss - got_loss).abs().max()) < 1e-10, way
        assert gap(want, got) < 1e-10, way
    tried = 6  # tokens of a row when packing is tried
    assert all(size % 32 == 0 for size in sizes if size > 2 * tried), sizes


def test_no_positions_are_added_that_the_model_has_not(monkeypatch):
    adapter = lora(model_of("GPT2"), rank=4)
    want_loss, want = gradients(adapter, ragged(2), "padded")
    monkeypatch.setattr(rows_of_models, "rounded", lambda size, *_: 65)
    got_loss, got = gradients(adapter, ragged(2), "padded")
    assert torch.equal(want_loss, got_loss) and gap(want, got) == 0


def test_batches_of_any_length_make_few_shapes_in_bfloat16():
    adapter = lora(llama().bfloat16(), rank=2)
    shapes: dict[str, set] = {"padded": set(), "packed": set()}
    for way, seen in shapes.items():
        adapter.causal.rows.way = way
        handle = adapter.causal.rows._blocks[0].mlp.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.add(tuple(args[0].shape))
        )
        for length in range(33, 57):
            ids = torch.randint(1, VOCAB, (1, 2, length))
            adapter.loss(moved(adapter, 1), {"input_ids": ids, "labels": ids})
        handle.remove()
    assert {shape[1] for shape in shapes["padded"]} == {40, 48, 56}
    assert {shape[1] for shape in shapes["packed"] if shape[1] > 12} == {64, 72, 80, 88, 96, 104, 112}  # 12: the trial


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", PACKING_KINDS)
def test_gradients_of_kinds(kind, again):
    adapter = KINDS[kind](in_doubles(llama()))
    if again:
        with_recompute(adapter)
    same_every_way(adapter, ragged(2))


def test_gradients_where_every_token_is_labelled_and_one_beginning_serves_several_losses():
    same_every_way(lora(in_doubles(llama()), rank=4), ragged(4, labelled_from=1))


def test_preferences():
    one, other = ragged(2), ragged(2)
    other["input_ids"] = torch.where(other["labels"] == -100, other["input_ids"], (other["input_ids"] + 1) % VOCAB)
    mask = (one["labels"] != -100).long()
    pairs = {
        "input_ids": one["input_ids"], "rejected_ids": other["input_ids"], "labels": one["labels"],
        "chosen_mask": mask, "rejected_mask": mask,
    }  # fmt: skip
    same_every_way(dpo(lora(in_doubles(llama()), rank=4)), pairs)


def test_evaluation():
    adapter = lora(in_doubles(llama()), rank=4)
    leaves, batch = moved(adapter, 3), ragged(3)
    found = {}
    for way in ("padded", "packed"):
        adapter.causal.rows.way = way
        found[way] = adapter.nll(leaves, batch)
    assert torch.allclose(found["padded"][0], found["packed"][0], rtol=1e-12)
    assert torch.equal(found["padded"][1], found["packed"][1])
    ids, rows, places = batch["input_ids"][0], torch.tensor([0, 0, 1, 3]), torch.tensor([3, 9, 9, 4])
    tree = {name: leaf[:1].detach() for name, leaf in leaves.items()}
    asked = (ids, rows, places, torch.tensor([0, 1, 1, 3]), torch.tensor([5, 6, 7, 8]))
    with adapter.bind(tree):
        adapter.causal.rows.way = "packed"
        got = adapter.causal.at(*asked)
        adapter.causal.rows.way = "padded"
        want = adapter.causal.at(*asked)
    assert torch.allclose(got.loglikelihood_M, want.loglikelihood_M, rtol=1e-10) and torch.equal(
        got.first_M, want.first_M
    )


def test_small_work_stays_padded_and_large_work_is_packed():
    adapter = lora(llama(), rank=2)
    adapter.loss(moved(adapter, 2), ragged(2))
    assert adapter.causal.rows._can_pack is None, "not even tried"
    assert adapter.model.config._attn_implementation == "sdpa"
    adapter.causal.rows._parameters = 10**9
    adapter.loss(moved(adapter, 2), ragged(2))
    assert adapter.causal.rows._can_pack is True


@pytest.mark.parametrize("kind", ["lora", "full", "prompt_tuning"])
def test_clients_one_after_the_other(kind, monkeypatch):
    adapter = KINDS[kind](in_doubles(llama()))
    passes = []
    adapter.causal.rows.body.register_forward_pre_hook(lambda *_: passes.append(1))
    want_loss, want = gradients(adapter, ragged(3), "narrowed")
    together = len(passes)
    monkeypatch.setattr(Rows, "apart", lambda self, labels: True)
    got_loss, got = gradients(adapter, ragged(3), "narrowed")
    assert len(passes) == together + 3
    assert float((want_loss - got_loss).abs().max()) < 1e-10
    assert gap(want, got) < 1e-10


def test_clients_go_apart_where_padding_between_them_costs_more_than_passes():
    rows = lora(llama(), rank=2).causal.rows
    labels = torch.full((2, 1, 400), -100)
    labels[0, 0, 1:399], labels[1, 0, 1:20] = 5, 5
    assert not rows.apart(labels), "a small model"
    rows._parameters = 10**7
    assert rows.apart(labels)
    assert not rows.apart(labels[:1])
    labels[1] = labels[0]
    assert not rows.apart(labels), "nothing is padded"
    rows.way = "padded"
    assert not rows.apart(labels)


@pytest.mark.parametrize("kind", ["dropout", "prefix_tuning"])
def test_kinds_that_keep_padded_rows(kind):
    adapter = KINDS[kind](llama())
    adapter.causal.rows._parameters = 10**9
    adapter.loss(moved(adapter, 2), ragged(2))
    assert adapter.causal.rows._can_pack is None


def test_a_model_that_mixes_positions_by_itself_keeps_padded_rows(caplog):
    model = in_doubles(llama())

    class Shifting(nn.Module):  # as a convolution or a recurrence does
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.1 * x.roll(1, 1)

    model.model.layers[1].mlp = Shifting(model.model.layers[1].mlp)
    causal = CausalLM(model)
    causal.rows.way = "packed"
    batch = ragged(1)
    with caplog.at_level(logging.INFO, "fedloom"), torch.no_grad():
        got = causal.nll(batch["input_ids"][0], batch["labels"][0])[0]
        causal.rows.way = "padded"
        want = causal.nll(batch["input_ids"][0], batch["labels"][0])[0]
    assert torch.equal(got, want)
    assert "padded rows" in caplog.text and model.config._attn_implementation == "sdpa"


def test_a_layout_is_off_outside_its_pass():
    adapter = lora(in_doubles(llama()), rank=2)
    gradients(adapter, ragged(2), "narrowed")
    assert packing.current() is None
    ids = ragged(1)["input_ids"][0]
    with torch.no_grad():
        got = adapter.model(input_ids=ids).logits
        want = in_doubles(llama())(input_ids=ids).logits
    assert torch.equal(got, want)


def test_picks_and_their_gradients():
    index = torch.tensor([3, -1, 0, 3, 3, 1, 0]).numpy()
    which = pick_of(index, 5, torch.device("cpu"))
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    out = pick(x, which)
    real = torch.from_numpy(index) >= 0
    assert torch.equal(out[real], x[torch.from_numpy(index)[real]])
    weight = torch.randn(7, 2, dtype=torch.float64)
    [grad] = torch.autograd.grad((out * weight)[real].sum(), [x])
    want = torch.zeros(5, 2, dtype=torch.float64).index_add(0, torch.from_numpy(index)[real], weight[real])
    assert torch.allclose(grad, want, rtol=1e-14)
    straight = pick_of(torch.arange(5).numpy(), 5, torch.device("cpu"))
    assert pick(x, straight) is x


def test_nothing_below_the_lowest_trained_layer_has_a_graph():
    def graphs(adapter) -> list[bool]:
        graph: list[bool] = []
        for block in adapter.causal.rows._blocks:
            block.register_forward_hook(lambda _, args, out: graph.append(out.requires_grad))
        gradients(adapter, ragged(2), "narrowed")
        return graph[-3:]

    assert graphs(KINDS["last_layers"](llama())) == [False, False, True]
    assert graphs(lora(llama(), rank=2, targets=["layers.2.self_attn.v_proj"])) == [False, False, True]
    assert full(llama()).model.get_input_embeddings().weight.requires_grad is False


@pytest.mark.parametrize("c", [1, 2])
def test_rows_of_one_length_do_not_see_each_other(c):
    """End to end they fill the sequence just as padded rows would, and are rows nevertheless."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, (c, 3, 9), generator=draw)
    labels = ids.clone()
    labels[:, :, :2] = -100
    batch = {"input_ids": ids, "labels": labels, "lengths": torch.full((c, 3), 9), "seed": torch.arange(c)}
    adapter = lora(llama(), rank=4, alpha=8.0)
    want_loss, want = gradients(adapter, batch, "padded")
    for way in ("packed", "shared", "narrowed"):
        got_loss, got = gradients(adapter, batch, way)
        assert float((want_loss - got_loss).abs().max()) < 1e-6, way
        assert gap(want, got) < 1e-6, way  # norms are in float32 inside
