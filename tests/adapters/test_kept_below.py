"""Hidden states kept from below what is trained: the same losses and gradients, and every row run once."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.adapters.test_recompute import cohort_batch, gradients, moved
from tests.small import VOCAB, clients, fedavg, gap, llama

from fedloom.adapters import full, last_layers, lora, prompt_tuning, with_activation_cache, with_recompute
from fedloom.adapters.kept_below import frozen_below
from fedloom.adapters.targets import decoder_blocks
from fedloom.errors import UserError
from fedloom.rounds import federate, initial_state
from fedloom.runtimes import batched

MUCH = 10**9


def gpt2():
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    torch.manual_seed(3)
    return transformers.GPT2LMHeadModel(config).double()


def gemma2():
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=6,
    )  # fmt: skip
    torch.manual_seed(3)
    return transformers.Gemma2ForCausalLM(config).double()


KINDS = {
    "last_layers": lambda: last_layers(llama(), layers=1, extra="norm"),
    "two_of_three": lambda: last_layers(llama(), layers=2),
    "upper_lora": lambda: lora(
        llama(), rank=4, alpha=8.0, targets=["layers.2.self_attn.q_proj", "layers.2.mlp.up_proj"]
    ),
    "gpt2": lambda: last_layers(gpt2(), layers=1),
    "gemma2": lambda: last_layers(gemma2(), layers=1),
    "recomputed": lambda: with_recompute(last_layers(llama(), layers=2)),
}


INEXACT = ("gemma2",)  # its softmax is in float32, too


@pytest.mark.parametrize("way", ["padded", "packed"])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_pass(kind, c, way):
    plain, kept = KINDS[kind](), with_activation_cache(KINDS[kind](), MUCH)
    exact = 1e-6 if kind in INEXACT or way == "packed" else 1e-10  # norms are in float32 inside
    plain.causal.rows.way, kept.causal.rows.way = "padded", way
    want_loss, want = gradients(plain, c)
    for _ in range(2):  # with nothing kept, and with all
        got_loss, got = gradients(kept, c)
        assert float((want_loss - got_loss).abs().max()) < exact
        assert gap(want, got) < exact
    frozen = kept.causal.rows.frozen
    assert frozen.found == frozen.made == 2 * c
    assert frozen.bytes == sum(leaf.numel() * 8 for leaf in frozen._kept.values()) > 0


def test_the_blocks_are_their_own_again_afterwards():
    adapter = with_activation_cache(last_layers(llama(), layers=1), MUCH)
    model = adapter.model
    ids = torch.arange(12).view(2, 6)
    before = model(input_ids=ids).logits
    gradients(adapter, 2)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in block.__dict__ for block in decoder_blocks(model).values())


def test_blocks_below_run_once_for_each_row():
    adapter = with_activation_cache(last_layers(llama(), layers=1), MUCH)
    calls = []
    decoder_blocks(adapter.model)["model.layers.0"].mlp.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        adapter.loss(moved(adapter, 2), cohort_batch(2))
    assert len(calls) == 4


def run(cache, rounds=3, start=None):
    adapter = last_layers(llama(dtype=torch.float32), layers=1)
    if cache:
        adapter = with_activation_cache(adapter, cache)
    people = clients(4)

    class Population:
        ids = tuple(client.id for client in people)

        def open(self, client, round):
            return next(one for one in people if one.id == client)

    state = start or initial_state(fedavg(), adapter, 0)
    states = [after for after, _ in federate(fedavg(), adapter, batched(2), state, Population(), rounds=rounds)]
    return states, adapter


def test_results_do_not_hang_on_what_was_kept():
    """In float32, bit for bit: with room for all, for some, and begun anew after a round."""
    all_kept, adapter = run(MUCH)
    some_kept, other = run(6000)
    assert 0 < other.causal.rows.frozen.bytes <= 6000 < adapter.causal.rows.frozen.bytes
    resumed, _ = run(MUCH, start=all_kept[0])
    for states in (some_kept, [all_kept[0], *resumed]):
        assert all(torch.equal(states[-1].params[name], leaf) for name, leaf in all_kept[-1].params.items())
    plain, _ = run(None)
    assert gap(plain[-1].params, all_kept[-1].params) < 1e-4  # 0 where a row by itself gives the same sums


@pytest.mark.parametrize("make", [full, lora, lambda model: prompt_tuning(model, num_virtual_tokens=4)])
def test_what_reaches_the_first_block_is_refused(make):
    with pytest.raises(UserError, match="reaches down to the first block") as caught:
        with_activation_cache(make(llama()), MUCH)
    assert "last_layers" in caught.value.hint


def test_frozen_blocks_are_told_from_names():
    def number(adapter):
        return frozen_below(adapter, decoder_blocks(adapter.model))

    assert number(last_layers(llama(5), layers=2)) == 3
    assert number(last_layers(llama(5), layers=2, extra="norm_and_head")) == 3
    assert number(lora(llama(5), targets=["layers.4.mlp.up_proj", "layers.3.self_attn.q_proj"])) == 3
    assert number(full(llama())) == 0
