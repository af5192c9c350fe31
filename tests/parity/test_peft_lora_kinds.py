"""rsLoRA, ranks by pattern, trained biases, DoRA and (IA)^3 against PEFT: loss, gradients, folders; and in a cohort."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.utils import constants
from tests.small import VOCAB, batch, clients, fedavg, gap, llama

from fedloom.adapters import dora, ia3, lora
from fedloom.adapters.frame import SEED
from fedloom.adapters.targets import IA3_DEFAULTS, IA3_FEEDFORWARD
from fedloom.clients import sgd_client
from fedloom.errors import UserError
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, sequential

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=VOCAB, num_key_value_heads=2, attention_bias=True, initializer_range=0.3, **SIZES
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "phi": transformers.PhiConfig(vocab_size=VOCAB, num_key_value_heads=2, initializer_range=0.3, **SIZES),
}
PATTERNS = {
    "llama": {
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3.0},
    },
    "gpt2": {"rank_pattern": {"h.1.attn.c_attn": 2}, "alpha_pattern": {"c_attn": 5.0}},
}
PATTERNS["phi"] = {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"dense": 5.0, "q_proj": 2.0}}
KINDS = {
    "lora": lambda name: (lora, {}),
    "rslora": lambda name: (lora, {"use_rslora": True}),
    "patterns": lambda name: (lora, PATTERNS[name]),
    "rslora_patterns": lambda name: (lora, {"use_rslora": True, **PATTERNS[name]}),
    "bias_lora_only": lambda name: (lora, {"bias": "lora_only"}),
    "bias_all": lambda name: (lora, {"bias": "all"}),
    "dora": lambda name: (dora, {}),
    "dora_everything": lambda name: (dora, {"use_rslora": True, "bias": "all", **PATTERNS[name]}),
    "ia3": lambda name: (ia3, {}),
}
CASES = [(name, kind) for name in ("llama", "gpt2") for kind in KINDS] + [("phi", "bias_all"), ("phi", "ia3")]


def base(name, dtype=torch.float64):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    for key, leaf in model.named_parameters():
        if key.endswith("bias"):  # zeros otherwise, which would hide mistakes
            torch.nn.init.normal_(leaf, std=0.3)
    return model.to(dtype).eval()


def ours(name, kind, dtype=torch.float64):
    make, settings = KINDS[kind](name)
    return make(base(name, dtype), **(settings if make is ia3 else {"rank": 4, "alpha": 8.0, **settings}))


def peft_config(name, kind):
    make, settings = KINDS[kind](name)
    conv = name == "gpt2"
    if make is ia3:
        return peft.IA3Config(fan_in_fan_out=conv, task_type="CAUSAL_LM")
    return peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=make is dora, fan_in_fan_out=conv, task_type="CAUSAL_LM", **settings
    )


def in_peft(name: str) -> str:
    """Our name of a leaf -> that of PEFT's parameter."""
    layer, _, last = name.rpartition(".")
    if last == "weight":
        return f"base_model.model.{layer}.default.weight"
    if last == "bias":
        return f"base_model.model.{name}"
    return f"base_model.model.{name}.default" + (".weight" if last == "lora_magnitude_vector" else "")


def with_peft(name, kind, tree, dtype=torch.float64):
    model = peft.get_peft_model(base(name, dtype), peft_config(name, kind)).to(dtype).eval()
    named = {key.replace(".base_layer.bias", ".bias"): leaf for key, leaf in model.named_parameters()}
    params = {key: named[in_peft(key)] for key in tree}
    trained = {key for key, leaf in named.items() if leaf.requires_grad}
    assert {in_peft(key) for key in tree} == trained, "PEFT and we train different parameters"
    with torch.no_grad():
        for key, leaf in tree.items():
            params[key].copy_(leaf)
    return model, params


def filled(adapter, seed=1):
    draw = torch.Generator().manual_seed(seed)
    tree = adapter.init(seed)
    return {k: leaf + 0.1 * torch.randn(leaf.shape, generator=draw, dtype=leaf.dtype) for k, leaf in tree.items()}


def one(tree):
    return {key: leaf[None] for key, leaf in tree.items()}


def test_the_layers_of_ia3_are_those_of_peft():
    theirs = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inside = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for kind, names in IA3_DEFAULTS.items():
        assert (list(names), list(IA3_FEEDFORWARD[kind])) == (theirs[kind], inside[kind])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_loss_gradients_and_logits_equal_peft(name, kind, dtype, tolerance):
    adapter = ours(name, kind, dtype)
    tree = filled(adapter)
    reference, params = with_peft(name, kind, tree, dtype)
    data = batch(1)
    leaves = {k: leaf[None].clone().requires_grad_() for k, leaf in tree.items()}
    loss = adapter.loss(leaves, one(data)).sum()
    logits = reference(input_ids=data["input_ids"]).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=tolerance)
    got = torch.autograd.grad(loss, list(leaves.values()))
    grads = torch.autograd.grad(want, list(params.values()))
    for key, a, b in zip(tree, got, grads, strict=True):
        assert float((a[0] - b).norm()) <= tolerance * float(b.norm()) + 1e-12, key
        assert float(b.norm()) > 1e-6 or "bias" in key, key  # a key's bias moves every score alike: no gradient
    with torch.no_grad(), adapter.bound(one(tree)) as tuned:
        mine = tuned(data["input_ids"]).logits
        assert float((mine - logits).norm() / logits.norm()) < tolerance
    plain = base(name, dtype)(data["input_ids"]).logits
    with torch.no_grad():
        assert torch.equal(adapter.model(data["input_ids"]).logits, plain), "the unbound model changed"
        assert float((plain - mine).abs().max()) > 1e-2
        with adapter.bound(one(adapter.init(3))) as tuned:  # before training it is the base
            assert float((tuned(data["input_ids"]).logits - plain).abs().max()) < 1e-6


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_exported_folder_gives_the_same_logits_in_peft_and_is_read_back(name, kind, tmp_path):
    adapter = ours(name, kind, torch.float32)
    tree = filled(adapter)
    adapter.export(tree, tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(base(name, torch.float32), tmp_path / "adapter").eval()
    ids = batch(1)["input_ids"]
    with torch.no_grad(), adapter.bound(one(tree)) as tuned:
        want = reloaded(ids).logits
        assert float((tuned(ids).logits - want).norm() / want.norm()) < 1e-5
    assert gap(tree, adapter.load(tmp_path / "adapter")) == 0
    with torch.no_grad():
        adapter.merge(tree)
        assert float((adapter.model(ids).logits - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_drops_the_inputs_that_peft_drops(name):
    adapter = dora(base(name), rank=4, alpha=8.0, dropout=0.5)
    tree = filled(adapter)
    reference, _ = with_peft(name, "dora", tree)
    keep_D = torch.tensor([0.0, 2.0]).double().repeat(16)

    class Half(torch.nn.Module):
        def forward(self, x):
            return x * keep_D

    for module in reference.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.lora_dropout["default"] = Half()
            module.training = True
    adapter._dropout = lambda site, seed_C: Half()
    data = batch(1)
    logits = reference(input_ids=data["input_ids"]).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100)
    without = float(adapter.loss(one(tree), one(data)))
    loss = float(adapter.loss(one(tree), {**one(data), SEED: torch.tensor([1])}))
    assert loss == pytest.approx(float(want), rel=1e-10) and abs(loss - without) > 1e-3


@pytest.mark.parametrize("ranks", [None, [1, 4, 2, 3, 4]])
@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_sequential(kind, ranks):
    if kind == "ia3" and ranks:
        with pytest.raises(UserError, match="ia3 has no ranks"):
            ours("llama", kind).narrow({}, clients(5, ranks)[0])
        return
    algorithm = fedavg(sgd_client(sgd(0.05), max_grad_norm=1.0))
    results = []
    for runtime in (sequential(), batched(8), batched(2)):
        adapter = ours("llama", kind)
        state = initial_state(algorithm, adapter, 3)
        for _ in range(2):
            state, report = run_round(algorithm, adapter, runtime, state, clients(5, ranks))
            assert not report.failed
        results.append(state.params)
    start = initial_state(algorithm, ours("llama", kind), 3).params
    assert all(float((results[0][k] - start[k]).abs().max()) > 1e-6 or "k_proj.bias" in k for k in start)
    assert gap(results[0], results[1]) < 1e-10
    assert gap(results[0], results[2]) < 1e-10


@pytest.mark.parametrize("kind", ["rslora_patterns", "dora_everything"])
def test_a_client_of_low_rank_starts_from_the_same_weights_cut_to_its_rank(kind):
    adapter = ours("llama", kind)
    tree = filled(adapter)
    [client] = clients(1, [2])
    own, cut = adapter.narrow(tree, client), dict(tree)
    for name in adapter.sites:
        rank = adapter.ranks.at(name, 2)
        assert rank == {2: 1, 4: 2, 6: 3}[adapter.ranks.at(name)]
        a, b = own[f"{name}.lora_A.weight"], own[f"{name}.lora_B.weight"]
        assert not a[rank:].any() and not b[:, rank:].any() and a[:rank].all()
        want = tree[f"{name}.lora_B.weight"][:, :rank] @ tree[f"{name}.lora_A.weight"][:rank]
        torch.testing.assert_close(adapter.scale_of(2, name) * b @ a, adapter.scale_of(None, name) * want)
        back = adapter.widen(own, client)
        torch.testing.assert_close(back[f"{name}.lora_B.weight"], tree[f"{name}.lora_B.weight"][:, :rank])
        cut[f"{name}.lora_A.weight"] = torch.cat([a[:rank], 0 * a[rank:]])
    data = one(batch(1))
    assert float(adapter.loss(one(own), data)) == pytest.approx(float(adapter.loss(one(cut), data)), rel=1e-10)


def test_settings_that_do_not_fit_are_refused():
    for make, words in (
        (lambda: lora(llama(), bias="all"), "this model has no bias"),
        (lambda: dora(llama(), bias="lora_only"), "the adapted layers have no bias"),
        (lambda: lora(llama(), rank_pattern={"o_proj": 2}), "rank_pattern: 'o_proj' matches no adapted layer"),
        (lambda: lora(llama(), rank_pattern={"q_prj": 2}), "did you mean 'q_proj'"),
        (lambda: lora(llama(), alpha_pattern={"(q": 2.0}), "is no regular expression"),
        (lambda: lora(llama(), alpha_pattern={"q_proj": 0.0}), "'q_proj' is 0.0, must be above 0"),
        (lambda: ia3(llama(), targets=["q_prj"]), "adapter.ia3_target_modules: 'q_prj' matches no linear layer"),
        (lambda: ia3(llama(), feedforward=["up_proj"]), "up_proj is none of the adapted layers"),
        (lambda: dora(llama()).sync({"x.merge_A": torch.zeros(1)}), "dora merges nothing"),
    ):
        with pytest.raises(UserError, match=words):
            make()


def test_a_folder_of_another_scale_or_kind_is_refused(tmp_path):
    adapter = lora(base("llama"), rank=4, alpha=8.0)
    adapter.export(adapter.init(1), tmp_path / "adapter")
    for other, words in (
        (lora(base("llama"), rank=4, alpha=8.0, use_rslora=True), "is scaled by 2 there"),
        (lora(base("llama"), rank=4, alpha=8.0, alpha_pattern={"v_proj": 4.0}), "v_proj is scaled by 2 there"),
        (dora(base("llama"), rank=4, alpha=8.0), "this dora adapter"),
        (ia3(base("llama")), "is a LORA adapter, not IA3"),
    ):
        with pytest.raises(UserError, match=words):
            other.load(tmp_path / "adapter")
