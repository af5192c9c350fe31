"""Our LoRA against Hugging Face PEFT: logits, gradients, files, and a whole federated round."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.small import VOCAB, batch, clients, fedavg, gap, llama, small_lora

from fedloom.adapters import lora
from fedloom.adapters.targets import LORA_DEFAULTS
from fedloom.clients import sgd_client
from fedloom.optimizers import adamw
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KV = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.3}
CONFIGS = {
    "llama": transformers.LlamaConfig(vocab_size=VOCAB, **KV),
    "mistral": transformers.MistralConfig(vocab_size=VOCAB, **KV),
    "qwen2": transformers.Qwen2Config(vocab_size=VOCAB, **KV),
    "qwen3": transformers.Qwen3Config(vocab_size=VOCAB, head_dim=8, **KV),
    "gemma": transformers.GemmaConfig(vocab_size=VOCAB, head_dim=8, **KV),
    "gemma2": transformers.Gemma2Config(vocab_size=VOCAB, head_dim=8, final_logit_softcapping=5.0, **KV),
    "phi": transformers.PhiConfig(vocab_size=VOCAB, **KV),
    "phi3": transformers.Phi3Config(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, **KV),
    "gpt2": transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "gpt_neox": transformers.GPTNeoXConfig(vocab_size=VOCAB, intermediate_size=48, initializer_range=0.3, **SIZES),
    "opt": transformers.OPTConfig(
        vocab_size=VOCAB, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3, **SIZES
    ),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}


def base(name):
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()


def with_peft(name, targets, tree):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2")
    model = peft.get_peft_model(base(name), config).double().eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for key, leaf in tree.items():
            named["base_model.model." + key.replace(".weight", ".default.weight")].copy_(leaf)
    return model, {key: named["base_model.model." + key.replace(".weight", ".default.weight")] for key in tree}


def filled(adapter, seed=1):
    """A tree in which B is not zero."""
    draw = torch.Generator().manual_seed(seed)
    tree = adapter.init(seed)
    return {k: leaf + 0.1 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for k, leaf in tree.items()}


def test_default_layers_are_those_of_peft():
    theirs = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {kind: list(names) for kind, names in LORA_DEFAULTS.items()} == {
        kind: theirs[kind] for kind in LORA_DEFAULTS
    }


@pytest.mark.parametrize(
    ("name", "targets"), [(n, t) for n in CONFIGS for t in ("auto", "all-linear") if (n, t) != ("phi3", "auto")]
)
def test_loss_and_gradients_equal_peft(name, targets):
    adapter = lora(base(name), rank=4, alpha=8.0, targets=targets)
    tree = filled(adapter)
    reference, params = with_peft(name, None if targets == "auto" else "all-linear", tree)
    names = {n for n, _ in reference.named_parameters() if "lora_" in n}
    assert len(names) == len(tree), "PEFT and we adapt different layers"
    data = batch(1)
    leaves = {k: leaf[None].clone().requires_grad_() for k, leaf in tree.items()}
    ours = adapter.loss(leaves, {k: leaf[None] for k, leaf in data.items()})
    logits = reference(input_ids=data["input_ids"]).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
    assert float(ours) == pytest.approx(float(want), rel=1e-9)
    got = torch.autograd.grad(ours.sum(), list(leaves.values()))
    grads = torch.autograd.grad(want, list(params.values()))
    for key, a, b in zip(tree, got, grads, strict=True):
        assert float((a[0] - b).abs().max()) < 1e-8 * (1 + float(b.abs().max())), key
    assert any(float(b.abs().max()) > 1e-6 for b in grads)
    with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
        assert float((tuned(data["input_ids"]).logits - logits).abs().max()) < 1e-9
    plain = base(name)(data["input_ids"]).logits
    with torch.no_grad():
        assert float((adapter.model(data["input_ids"]).logits - plain).abs().max()) == 0, "the unbound model changed"


def test_the_head_is_split_off_where_it_can_be():
    for name in CONFIGS:
        split = lora(base(name), rank=2, targets="all-linear").causal.head is not None
        assert split, f"{name} computes whole logits"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_exported_folder_gives_the_same_logits_in_peft(name, tmp_path):
    model = base(name).float()
    adapter = lora(model, rank=4, alpha=8.0, targets="all-linear", base_name="somewhere/base")
    tree = filled(adapter)
    adapter.export(tree, tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(base(name).float(), tmp_path / "adapter").eval()
    ids = batch(1)["input_ids"]
    with torch.no_grad(), adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
        assert float((tuned(ids).logits - reloaded(ids).logits).abs().max()) < 1e-5
    back = adapter.load(tmp_path / "adapter")
    assert gap(tree, back) == 0


def test_a_federated_round_equals_peft_with_torch_adamw_client_by_client():
    algorithm = fedavg(sgd_client(adamw(1e-2, weight_decay=0.01), max_grad_norm=0.5))
    adapter = small_lora(targets=["q_proj", "v_proj"])
    state = initial_state(algorithm, adapter, 3)
    state, _ = run_round(algorithm, adapter, batched(8), state, clients())  # so that B is not zero
    ours, _ = run_round(algorithm, adapter, batched(8), state, clients())
    total, weights = None, 0.0
    for client in clients():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(llama(), config).double()
        named = dict(model.named_parameters())
        params = {k: named["base_model.model." + k.replace(".weight", ".default.weight")] for k in state.params}
        with torch.no_grad():
            for key, leaf in state.params.items():
                params[key].copy_(leaf)
        optimizer = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.01)
        for data in client.batches:
            optimizer.zero_grad()
            logits = model(data["input_ids"]).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
            optimizer.step()
        own = {k: p.detach() * client.weight for k, p in params.items()}
        total = own if total is None else {k: total[k] + own[k] for k in own}
        weights += client.weight
    want = {k: leaf / weights for k, leaf in total.items()}
    assert gap(ours.params, want) < 1e-9
    assert gap(ours.params, state.params) > 1e-3


def test_fp32_factors_over_a_bf16_base_get_fp32_gradients_near_those_of_fp32():
    data = {k: leaf[None] for k, leaf in batch(2, rows=4).items()}
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        adapter = lora(llama(dtype=dtype), rank=4, alpha=8.0)
        tree = filled(lora(llama(dtype=torch.float32), rank=4, alpha=8.0))
        leaves = {k: leaf[None].clone().requires_grad_() for k, leaf in tree.items()}
        found = torch.autograd.grad(adapter.loss(leaves, data).sum(), list(leaves.values()))
        assert all(g.dtype == torch.float32 for g in found)
        grads[dtype] = torch.cat([g.flatten() for g in found])
    a, b = grads[torch.float32], grads[torch.bfloat16]
    assert float((a - b).norm() / a.norm()) < 0.1
    assert float(torch.dot(a, b) / (a.norm() * b.norm())) > 0.99


def test_sync_adds_the_merged_factors_and_takes_them_off_again():
    algorithm = fedavg()
    adapter = small_lora(targets="all-linear")
    tree = filled(adapter)
    ids = batch(1)["input_ids"]
    merge = {}
    for site in adapter.sites:
        merge[f"{site}.merge_A"] = tree[f"{site}.lora_A.weight"]
        merge[f"{site}.merge_B"] = tree[f"{site}.lora_B.weight"] * adapter.scale_of()
    with torch.no_grad():
        plain = adapter.model(ids).logits
        with adapter.bound({k: leaf[None] for k, leaf in tree.items()}) as tuned:
            want = tuned(ids).logits
        state = initial_state(algorithm, adapter, 3)
        adapter.sync(adapter.accumulate(state.base, merge))
        assert float((adapter.model(ids).logits - want).abs().max()) < 1e-9
        assert float((plain - want).abs().max()) > 1e-3
        adapter.sync(adapter.accumulate(adapter.accumulate({}, merge), merge))
        adapter.sync({})
        assert float((adapter.model(ids).logits - plain).abs().max()) == 0


def test_sequential_is_the_bare_loop_in_fp32_too():
    algorithm = fedavg()
    for runtime in (sequential(), batched(4)):
        adapter = lora(llama(dtype=torch.float32), rank=4, alpha=8.0)
        state = initial_state(algorithm, adapter, 3)
        assert all(leaf.dtype == torch.float32 for leaf in state.params.values())
        after, _ = run_round(algorithm, adapter, runtime, state, clients())
        assert all(leaf.dtype == torch.float32 for leaf in after.params.values())
