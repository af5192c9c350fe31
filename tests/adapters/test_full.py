"""Full fine-tuning against plain autograd on the same weights, client by client; folders; runtimes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.small import batch, clients, fedavg, gap, llama

from fedloom.adapters import full
from fedloom.clients import local_only, sgd_client
from fedloom.errors import UserError
from fedloom.optimizers import adamw, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import ClientSite, batched, loopback, sequential
from fedloom.types import Client

SMALL = {"vocab_size": 64, "initializer_range": 0.3}


def gpt2():
    torch.manual_seed(3)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL)
    return transformers.GPT2LMHeadModel(config).double()


def gemma2():  # (1 + w) norms, scaled embeddings, soft caps, tied
    torch.manual_seed(4)
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, pad_token_id=0, sliding_window=32, **SMALL,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).double()


def qwen3():  # norms of each head's queries and keys
    torch.manual_seed(5)
    config = transformers.Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=5, **SMALL,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).double()


def opt():  # learned positions found from the mask, biases everywhere
    torch.manual_seed(6)
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, init_std=0.3, vocab_size=64,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config).double()


def phi():  # a bias in the head, attention and MLP side by side
    torch.manual_seed(7)
    config = transformers.PhiConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
        qk_layernorm=True, **SMALL,
    )  # fmt: skip
    return transformers.PhiForCausalLM(config).double()


def tied_llama():
    model = llama()
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(8)
    return transformers.LlamaForCausalLM(config).double()


MODELS = {
    "llama": llama, "tied": tied_llama, "gpt2": gpt2, "gemma2": gemma2, "qwen3": qwen3, "opt": opt, "phi": phi
}  # fmt: skip


def moved(tree, seed):
    draw = torch.Generator().manual_seed(seed)
    return {k: leaf + 0.05 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for k, leaf in tree.items()}


def plain_loss_and_gradients(model, tree, data):
    """A client alone: its weights copied into the model, everything trained by torch."""
    model.load_state_dict(tree, strict=False)
    model.eval().requires_grad_(True)
    logits = model(input_ids=data["input_ids"]).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
    names = [name for name, _ in model.named_parameters()]
    return loss, dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_losses_and_gradients_of_a_cohort_are_those_of_plain_autograd_one_by_one(model):
    adapter = full(MODELS[model]())
    before = {name: leaf.clone() for name, leaf in adapter.model.named_parameters()}
    trees = [moved(adapter.init(0), seed) for seed in (1, 2, 3)]
    batches = [batch(seed) for seed in (1, 2, 3)]
    leaves = {name: torch.stack([tree[name] for tree in trees]).requires_grad_() for name in trees[0]}
    stacked = {name: torch.stack([data[name] for data in batches]) for name in batches[0]}
    loss_C = adapter.loss(leaves, stacked)
    grads = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    for c, (tree, data) in enumerate(zip(trees, batches, strict=True)):
        want, want_grads = plain_loss_and_gradients(MODELS[model](), tree, data)
        assert loss_C[c].item() == pytest.approx(want.item(), rel=1e-9)
        own = {name: leaf[None].clone().requires_grad_() for name, leaf in tree.items()}
        alone = torch.autograd.grad(
            adapter.loss(own, {k: leaf[None] for k, leaf in data.items()}).sum(), list(own.values())
        )
        assert list(leaves) == list(want_grads)
        for name, got, one in zip(leaves, grads, alone, strict=True):
            size = 1 + float(want_grads[name].abs().max())
            assert float((got[c] - want_grads[name]).abs().max()) < 1e-9 * size, name
            assert float((one[0] - want_grads[name]).abs().max()) < 1e-9 * size, name
            if not name.endswith(("k_proj.bias", "self_attn.k_layernorm.bias")):  # softmax does not see them
                assert float(want_grads[name].abs().max()) > 1e-7, name
    after = dict(adapter.model.named_parameters())
    assert all(torch.equal(leaf, after[name]) and isinstance(after[name], torch.nn.Parameter)
               for name, leaf in before.items()), "the model itself has changed"  # fmt: skip


def test_gradients_in_float32_are_those_of_plain_autograd():
    adapter = full(llama(dtype=torch.float32))
    tree = moved(adapter.init(0), 1)
    own = {name: leaf[None].clone().requires_grad_() for name, leaf in tree.items()}
    loss = adapter.loss(own, {k: leaf[None] for k, leaf in batch(2).items()})
    grads = torch.autograd.grad(loss.sum(), list(own.values()))
    want, want_grads = plain_loss_and_gradients(llama(dtype=torch.float32), tree, batch(2))
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for name, got in zip(own, grads, strict=True):
        assert float((got[0] - want_grads[name]).norm()) < 1e-5 * float(want_grads[name].norm()), name


def test_a_bfloat16_model_is_trained_in_float32():
    adapter = full(llama(dtype=torch.bfloat16))
    tree = adapter.init(0)
    assert {leaf.dtype for leaf in tree.values()} == {torch.float32}
    small = {name: leaf + 1e-6 for name, leaf in tree.items()}  # lost in bfloat16, kept in the tree
    assert gap(tree, small) > 0
    leaves = {name: torch.stack([leaf, leaf]).requires_grad_() for name, leaf in tree.items()}
    loss_C = adapter.loss(leaves, {k: torch.stack([leaf, leaf]) for k, leaf in batch(2).items()})
    grads = torch.autograd.grad(loss_C.sum(), list(leaves.values()))
    assert {grad.dtype for grad in grads} == {torch.float32}
    want, want_grads = plain_loss_and_gradients(llama(dtype=torch.float32), tree, batch(2))
    assert loss_C[1].item() == pytest.approx(want.item(), rel=3e-2)
    for name, got in zip(leaves, grads, strict=True):
        assert float((got[1] - want_grads[name]).norm()) < 0.2 * float(want_grads[name].norm()), name


def test_a_tied_embedding_is_one_leaf_and_untrained_trees_take_no_memory():
    model = tied_llama()
    adapter = full(model)
    tree = adapter.init(0)
    assert "lm_head.weight" not in tree
    assert sum(leaf.numel() for leaf in tree.values()) == sum(leaf.numel() for leaf in model.parameters())
    assert all(leaf.data_ptr() == dict(model.named_parameters())[name].data_ptr() for name, leaf in tree.items())


def test_batched_and_messages_equal_sequential():
    updates = {
        "sgd": lambda: sgd_client(sgd(0.1), max_grad_norm=1.0),
        "adamw, in pieces": lambda: sgd_client(adamw(1e-3), accumulation_steps=2),
        "alone": lambda: local_only(sgd_client(sgd(0.1))),
    }
    for what, make in updates.items():
        algorithm = fedavg(make())
        homes = {
            c.id: ClientSite(c.id, lambda algorithm=algorithm: (algorithm, full(tied_llama())), lambda r, c=c: c, {})
            for c in clients()
        }
        results = []
        for runtime in (sequential(), batched(8), loopback({i: home.serve for i, home in homes.items()})):
            adapter = full(tied_llama())
            state = initial_state(algorithm, adapter, 3)
            for _ in range(2):
                state, report = run_round(algorithm, adapter, runtime, state, clients())
                assert not report.failed, what
            results.append(state)
        start = initial_state(algorithm, full(tied_llama()), 3).params
        assert (gap(results[0].params, start) > 1e-4) == (what != "alone")
        for other in results[1:]:
            assert gap(results[0].params, other.params) < 1e-9, what
        for owner, own in results[0].personal.items():
            assert gap(own, results[1].personal[owner]) < 1e-9, what
            assert gap(own, homes[owner].personal) < 1e-9, what


@pytest.mark.parametrize("model", ["tied", "gpt2"])
def test_the_folder_is_a_model_and_comes_back(model, tmp_path):
    from fedloom.models.load import train_tokenizer

    base = MODELS[model]().float()
    adapter = full(base, save_tokenizer=train_tokenizer([], vocab_size=300).save_pretrained)
    tree = moved(adapter.init(0), 1)
    base.config.vocab_size = 64
    before = {name: leaf.clone() for name, leaf in base.named_parameters()}
    adapter.export(tree, tmp_path / "model")
    assert all(torch.equal(leaf, before[name]) for name, leaf in base.named_parameters())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = batch(1)["input_ids"]
    with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
        assert float((again(input_ids=ids).logits - tuned(input_ids=ids).logits).abs().max()) < 1e-5
    with torch.no_grad():
        assert float((again(input_ids=ids).logits - base(input_ids=ids).logits).abs().max()) > 1e-2
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "</s>"


def test_generation_of_a_cohort_is_that_of_each_alone():
    for make in (gpt2, opt, gemma2):
        adapter = full(make())
        trees = [moved(adapter.init(0), seed) for seed in (1, 2)]
        tree_C = {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
        ids = torch.tensor([[3, 9, 4], [5, 11, 2]] * 2)
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0,
                "eos_token_id": 63}  # fmt: skip
        with torch.no_grad(), adapter.bound(tree_C) as tuned:
            written = tuned.generate(input_ids=ids, **told)[:, 3:].tolist()
        told["attention_mask"] = told["attention_mask"][:2]
        for c, tree in enumerate(trees):
            with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
                alone = tuned.generate(input_ids=ids[:2], **told)[:, 3:].tolist()
            assert written[2 * c : 2 * c + 2] == alone


def test_what_is_no_weight_of_this_model_is_refused():
    adapter = full(llama())
    with pytest.raises(UserError, match=r"missing lm_head\.weight"):
        adapter.check({name: leaf for name, leaf in adapter.init(0).items() if name != "lm_head.weight"})
    with pytest.raises(UserError, match="has no ranks"):
        adapter.narrow({}, Client("c", (), rank=2))
    with pytest.raises(UserError, match="full merges nothing"):
        adapter.sync({"x.merge_A": torch.zeros(1)})


def test_a_model_that_does_something_else_with_its_weights_is_refused_for_several_clients_only():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(32))

        def forward(self, x):
            return x * torch.softmax(self.weight, 0)

    model = llama()
    model.model.norm = Odd().double()
    adapter = full(model)
    tree = adapter.init(0)
    data = {k: leaf[None] for k, leaf in batch(2).items()}
    assert adapter.loss({k: leaf[None] for k, leaf in tree.items()}, data).shape == (1,)
    two = {k: torch.stack([leaf, leaf + 1]) for k, leaf in tree.items()}
    with pytest.raises(UserError, match=r"softmax.*several clients"):
        adapter.loss(two, {k: torch.cat([leaf, leaf]) for k, leaf in data.items()})
    assert isinstance(model.model.norm.weight, torch.nn.Parameter), "the model is its own again"
