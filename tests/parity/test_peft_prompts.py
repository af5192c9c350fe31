"""Prompt tuning, P-tuning and prefix tuning against PEFT: logits, gradients, folders both ways, generation."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.small import batch, clients, fedavg, gap, llama

from fedloom.adapters import p_tuning, prefix_tuning, prompt_tuning
from fedloom.clients import sgd_client
from fedloom.errors import UserError
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential
from fedloom.types import Client

P = 5


def gpt2():
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config).double()


MODELS = {"llama": llama, "gpt2": gpt2}
KINDS = {
    "prompt_tuning": lambda model: prompt_tuning(model, num_virtual_tokens=P),
    "p_tuning_mlp": lambda model: p_tuning(model, num_virtual_tokens=P, encoder_hidden_size=12),
    "p_tuning_lstm": lambda model: p_tuning(model, num_virtual_tokens=P, encoder="lstm", encoder_hidden_size=12),
    "prefix_tuning": lambda model: prefix_tuning(model, num_virtual_tokens=P),
}


def peft_config(kind: str):
    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    if kind == "prompt_tuning":
        return peft.PromptTuningConfig(**shared)
    if kind == "prefix_tuning":
        return peft.PrefixTuningConfig(**shared)
    encoder = kind.removeprefix("p_tuning_").upper()
    return peft.PromptEncoderConfig(**shared, encoder_reparameterization_type=encoder, encoder_hidden_size=12)


def with_peft(kind: str, model, tree):
    """PEFT's model with our numbers, and its parameters by our names."""
    tuned = peft.get_peft_model(model, peft_config(kind)).to(model.dtype).eval()
    encoder = dict(tuned.prompt_encoder["default"].named_parameters())
    names = {name: "embedding.weight" if name == "prompt_embeddings" else name for name in tree}
    assert sorted(names.values()) == sorted(encoder)
    with torch.no_grad():
        for name, theirs in names.items():
            encoder[theirs].copy_(tree[name])
    return tuned, {name: encoder[theirs] for name, theirs in names.items()}


def filled(adapter, seed=1):
    draw = torch.Generator().manual_seed(seed)
    tree = adapter.init(seed)
    return {k: leaf + 0.1 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for k, leaf in tree.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_logits_equal_peft(model, kind, dtype, tolerance):
    adapter = KINDS[kind](MODELS[model]().to(dtype))
    tree = filled(adapter)
    reference, params = with_peft(kind, MODELS[model]().to(dtype), tree)
    data = batch(1)
    rows = len(data["input_ids"])
    mask = torch.ones_like(data["input_ids"])
    logits = reference(input_ids=data["input_ids"], attention_mask=mask).logits
    logits = logits[:, -data["input_ids"].shape[1] :]
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
    leaves = {k: leaf[None].clone().requires_grad_() for k, leaf in tree.items()}
    ours = adapter.loss(leaves, {k: leaf[None] for k, leaf in data.items()})
    assert float(ours.detach()) == pytest.approx(float(want.detach()), rel=tolerance)
    got = torch.autograd.grad(ours.sum(), list(leaves.values()))
    grads = torch.autograd.grad(want, list(params.values()))
    for name, a, b in zip(tree, got, grads, strict=True):
        assert float((a[0] - b).norm()) < tolerance * float(b.norm()), name
    assert all(float(b.norm()) > 1e-6 for b in grads)
    with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
        mine = tuned(input_ids=data["input_ids"]).logits
    assert mine.shape == (rows, data["input_ids"].shape[1], 64)
    assert float((mine - logits).norm() / logits.norm()) < tolerance
    with torch.no_grad():
        plain = MODELS[model]().to(dtype).eval()(input_ids=data["input_ids"]).logits
        assert float((adapter.model(input_ids=data["input_ids"]).logits - plain).abs().max()) == 0, "unbound"
        assert float((plain - logits).abs().max()) > 1e-3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_folders_are_read_by_peft_and_back(model, kind, tmp_path):
    base = MODELS[model]().float()
    adapter = KINDS[kind](base)
    tree = filled(adapter)
    adapter.export(tree, tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(MODELS[model]().float(), tmp_path / "adapter").eval()
    ids = batch(1)["input_ids"]
    back = adapter.load(tmp_path / "adapter")
    with torch.no_grad():
        theirs = reloaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
        for one in (tree, back):
            with adapter.bound({k: leaf[None] for k, leaf in one.items()}) as tuned:
                assert float((tuned(input_ids=ids).logits - theirs).abs().max()) < 1e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_of_a_cohort_is_that_of_whole_passes_one_by_one(model, kind):
    adapter = KINDS[kind](MODELS[model]())
    trees = [filled(adapter, seed) for seed in (1, 2)]
    tree_C = {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
    prompts = [[3, 9, 4], [5, 11, 2, 8, 1]]  # per client two rows: left padded
    longest = 5
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts] * 2)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts] * 2)
    with torch.no_grad(), adapter.bound(tree_C) as tuned:
        written = tuned.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=63
        )[:, longest:].tolist()
    for c, tree in enumerate(trees):
        for r, prompt in enumerate(prompts):
            text = list(prompt)
            with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
                for _ in range(6):
                    logits = tuned(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
                    text.append(int(logits.argmax()))
            assert written[2 * c + r] == text[len(prompt) :], (c, r)


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_sequential(kind):
    algorithm = fedavg(sgd_client(sgd(0.05), max_grad_norm=1.0))
    results = []
    for runtime in (sequential(), batched(8), batched(2)):
        adapter = KINDS[kind](llama())
        state = initial_state(algorithm, adapter, 3)
        for _ in range(2):
            state, report = run_round(algorithm, adapter, runtime, state, clients())
            assert not report.failed
        results.append(state.params)
    assert gap(results[0], initial_state(algorithm, KINDS[kind](llama()), 3).params) > 1e-4
    assert gap(results[0], results[1]) < 1e-10
    assert gap(results[0], results[2]) < 1e-10


def test_a_prompt_begins_as_words_of_the_vocabulary_or_as_a_text():
    model = llama()
    weight = model.get_input_embeddings().weight
    rows = prompt_tuning(model, num_virtual_tokens=P).init(3)["prompt_embeddings"]
    assert all(any(torch.equal(row, word) for word in weight) for row in rows)
    again = prompt_tuning(llama(), num_virtual_tokens=P).init(4)["prompt_embeddings"]
    assert not torch.equal(rows, again)
    text = prompt_tuning(llama(), num_virtual_tokens=P, init_ids=[7, 9]).init(3)["prompt_embeddings"]
    assert torch.equal(text, weight[[7, 9, 7, 9, 7]])


def test_a_prefix_begins_as_if_its_words_stood_before_the_text():
    adapter = prefix_tuning(llama(), num_virtual_tokens=P)
    tree = adapter.init(3)
    from fedloom.seeds import generator

    words = torch.randint(64, (P,), generator=generator(3, 0, "", "prefix_tuning"))
    ids = batch(2)["input_ids"]
    with torch.no_grad():
        whole = llama()(input_ids=torch.cat([words.expand(len(ids), -1), ids], 1)).logits[:, P:]
        with adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
            assert float((tuned(input_ids=ids).logits - whole).abs().max()) < 1e-9


def test_settings_and_trees_that_do_not_fit_are_refused():
    for make, words in (
        (lambda: prompt_tuning(llama(), num_virtual_tokens=0), "num_virtual_tokens is 0"),
        (lambda: prompt_tuning(llama(), init_ids=[]), "has no tokens"),
        (lambda: p_tuning(llama(), encoder_hidden_size=0), "encoder_hidden_size is 0"),
        (lambda: prefix_tuning(llama(), num_virtual_tokens=-1), "num_virtual_tokens is -1"),
    ):
        with pytest.raises(UserError, match=words):
            make()
    adapter = prompt_tuning(llama(), num_virtual_tokens=P)
    with pytest.raises(UserError, match=r"is \[3, 32\], expected \[5, 32\]"):
        adapter.check({"prompt_embeddings": torch.zeros(3, 32)})
    with pytest.raises(UserError, match="has no ranks"):
        adapter.narrow({}, Client("c", (), rank=2))
