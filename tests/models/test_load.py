"""Loading a base model: what works, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedloom import hub
from fedloom.errors import UserError
from fedloom.models import load
from fedloom.models.load import Base, load_base, load_tokenizer, random_base, stop_ids

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    base = random_base(hidden_size=16, num_layers=2, num_heads=2, vocab_size=300, seed=3)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_json(path: Path, edit: Edit) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def refusal(name: Path | str, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load_base(str(name), **settings)
    return caught.value


# ---- what works ------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_frozen_and_whole(saved: Path) -> None:
    base = load_base(str(saved), dtype="float32")
    want = random_base(hidden_size=16, num_layers=2, num_heads=2, vocab_size=300, seed=3)
    assert base.name == str(saved)
    assert base.dtype == torch.float32
    assert base.num_parameters == want.num_parameters == sum(p.numel() for p in base.model.parameters())
    for (name, mine), (_, theirs) in zip(base.model.named_parameters(), want.model.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert not mine.requires_grad
    assert not base.model.training
    assert base.model.config.use_cache is False
    assert base.model.config._attn_implementation == "sdpa"


def test_bfloat16_on_a_processor_takes_the_fast_attention(saved: Path) -> None:
    assert load_base(str(saved), dtype="bfloat16").model.config._attn_implementation == "fedloom_cpu"


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]
)
def test_dtype_is_as_asked_for(saved: Path, name: str, dtype: torch.dtype) -> None:
    base = load_base(str(saved), dtype=name)
    assert base.dtype == dtype
    assert {p.dtype for p in base.model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("capabilities", "dtype", "word"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, "AVX-512"),
        ({"amx_bf16": True}, torch.bfloat16, "AMX"),
        ({"avx512_bf16": False, "amx_bf16": False, "amx_tile": False}, torch.float32, "no bfloat16"),
    ],
)
def test_auto_is_bfloat16_only_where_the_processor_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, saved: Path, capabilities: dict[str, bool], dtype: torch.dtype, word: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    base = load_base(str(saved))
    assert base.dtype == dtype
    assert word in base.dtype_reason


def test_the_random_state_of_torch_is_left_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    first = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, seed=1)
    assert torch.equal(torch.rand(3), want)
    again = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, seed=1)
    other = random_base(hidden_size=16, num_layers=1, num_heads=2, vocab_size=300, seed=2)
    weight = [b.model.get_input_embeddings().weight for b in (first, again, other)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_the_made_tokenizer_survives_any_text_and_a_reload(tmp_path: Path) -> None:
    tokenizer = load.train_tokenizer(["the cat sat on the mat"] * 20, vocab_size=280)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat", "Grüße, 世界 🙂\n\ttab", ""):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert again(text, add_special_tokens=False)["input_ids"] == ids
    assert len(tokenizer("the cat", add_special_tokens=False)["input_ids"]) < len("the cat")
    with pytest.raises(UserError, match="260"):
        load.train_tokenizer([], vocab_size=100)


def test_the_builtin_base_is_found_in_the_package() -> None:
    try:
        folder = load.builtin_folder()
    except UserError:
        pytest.skip("this checkout has no built-in base")
    base = load_base("builtin")
    assert base.name == "builtin"
    assert Path(base.folder or "") == folder
    assert 1_000_000 <= base.num_parameters <= 4_000_000


def test_a_missing_builtin_base_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "files", lambda package: tmp_path)
    error = refusal("builtin")
    assert "not in this installation" in error.message
    assert "pip install" in error.hint


def test_loading_says_nothing_on_stderr(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(str(saved))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# ---- padding and stopping --------------------------------------------------------------------------------------------


def with_special(tokenizer: Any, **tokens: str | None) -> Any:
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def test_a_tokenizer_without_a_pad_token_gets_one_that_is_not_the_end(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("pad_token"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert load_tokenizer(str(folder), pad=False).pad_token is None


def test_a_pad_token_that_is_the_end_token_is_replaced(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(pad_token="</s>"))
    assert load_tokenizer(str(folder)).pad_token_id != load_tokenizer(str(folder)).eos_token_id


def test_no_token_is_added_to_the_vocabulary(folder: Path) -> None:
    before = len(load_tokenizer(str(folder), pad=False))
    edit_json(folder / "tokenizer_config.json", lambda c: (c.pop("pad_token"), c.pop("unk_token")))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token == "<pad>"  # a spare one that the vocabulary has
    assert len(tokenizer) == before


def test_a_tokenizer_without_an_end_token_is_refused(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    assert "never stop" in refusal(folder).message


def test_every_end_token_stops(folder: Path) -> None:
    base = load_base(str(folder))
    eos = base.tokenizer.eos_token_id
    assert stop_ids(base.model, base.tokenizer) == (eos,)
    base.model.generation_config.eos_token_id = [eos, 7]
    base.model.config.eos_token_id = 9
    assert stop_ids(base.model, base.tokenizer) == (eos, 7, 9)


def test_the_end_of_turn_of_a_chat_template_stops(folder: Path) -> None:
    base = load_base(str(folder))
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert base.tokenizer.convert_tokens_to_ids("<|im_end|>") in stop_ids(base.model, base.tokenizer)
    base.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert stop_ids(base.model, base.tokenizer) == (base.tokenizer.eos_token_id,)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_folder_without_weights_says_what_is_there_and_what_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    error = refusal(folder)
    assert error.code == "model.no_weights"
    assert "tokenizer.json" in error.message
    assert "model.safetensors" in error.hint
    assert error.exit_code == 2


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    error = refusal(folder)
    assert "1 of 2" in error.message
    assert "model-00002-of-00002.safetensors" in error.message


def test_pickled_weights_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    mark = folder / "unpickled"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    error = refusal(folder)
    assert error.code == "model.pickled"
    assert "save_pretrained" in error.hint
    assert not mark.exists()


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    error = refusal(folder)
    assert error.code == "model.no_config"
    assert "model.safetensors" in error.message


def test_an_adapter_folder_names_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    error = refusal(tmp_path)
    assert error.code == "model.is_adapter"
    assert "model=org/base" in error.hint


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{nope")
    assert refusal(folder).code == "model.json"


def test_a_config_without_a_type(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.pop("model_type"))
    assert "model_type" in refusal(folder).message


def test_an_unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type="frobnicator"))
    error = refusal(folder)
    assert error.code == "model.architecture"
    assert "frobnicator" in error.message


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM"), ("llama", "LlamaForSequenceClassification")],
)
def test_what_is_no_causal_model(folder: Path, kind: str, architecture: str) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type=kind, architectures=[architecture]))
    error = refusal(folder)
    assert error.code == "model.not_causal"
    assert architecture in error.message


def test_foreign_code_runs_only_when_allowed(folder: Path) -> None:
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_json(folder / "config.json", lambda c: c.update(model_type="frobnicator", auto_map=own))
    (folder / "code.py").write_text("raise SystemExit('foreign code ran')")
    error = refusal(folder)
    assert error.code == "model.remote_code"
    assert "trust_remote_code: true" in error.hint


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(num_hidden_layers=3), ("missing from the file", "model.layers.2.")),
        (lambda c: c.update(num_hidden_layers=1), ("in the file but unknown", "model.layers.1.")),
        (lambda c: c.update(intermediate_size=20), ("of another shape", "[42, 16] in the file, [20, 16] in the model")),
        (lambda c: c.update(tie_word_embeddings=False), ("missing from the file", "lm_head.weight")),
    ],
)
def test_weights_that_do_not_fit_the_config(folder: Path, edit: Edit, words: tuple[str, ...]) -> None:
    edit_json(folder / "config.json", edit)
    error = refusal(folder)
    assert error.code == "model.mismatch"
    for word in words:
        assert word in error.message


def test_a_cut_weight_file(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert refusal(folder).code == "model.damaged"


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    error = refusal(folder)
    assert error.code == "model.tokenizer"
    assert "tokenizer.json" in error.hint


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    load.train_tokenizer(["one two three four five six seven"] * 9, vocab_size=320).save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"word{n}" for n in range(100)])
    tokenizer.save_pretrained(folder)
    error = refusal(folder)
    assert error.code == "model.vocabulary"
    assert "300 tokens" in error.message


def test_an_unknown_dtype(saved: Path) -> None:
    assert "float16" in refusal(saved, dtype="float8").message


def test_auto_on_a_gpu_is_what_it_multiplies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, bf16, dtype in (((8, 0), True, "bfloat16"), ((7, 5), False, "float16"), ((6, 1), False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=bf16: has)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, has=capability: has)
        found, reason = load.hardware_dtype("cuda")
        assert found == getattr(torch, dtype) and reason.startswith(dtype)


def test_a_folder_that_is_not_there_lists_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "some-model").mkdir()
    error = refusal(tmp_path / "nowhere")
    assert error.code == "model.no_folder"
    assert "some-model" in error.hint


def test_a_file_is_not_a_folder(saved: Path) -> None:
    error = refusal(saved / "model.safetensors")
    assert error.code == "model.not_a_folder"
    assert str(saved) in error.hint


def test_a_hub_name_offline_says_what_to_do() -> None:
    error = refusal("some-org/some-model")  # the tests' settings keep the network away
    assert error.code == "model.offline"
    assert "hf download some-org/some-model --local-dir some-model" in error.hint


def test_an_unreachable_hub_is_found_out_once_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    asked: list[Any] = []

    def refuse(address: Any, timeout: float) -> None:
        asked.append(address)
        raise OSError("no network")

    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_reachable", {})
    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    assert refusal("some-org/some-model").code == "model.offline"
    assert refusal("some-org/other").code == "model.offline"
    assert len(asked) == 1


def test_a_base_knows_its_device(saved: Path) -> None:
    base = load_base(str(saved))
    assert isinstance(base, Base)
    assert base.device == torch.device("cpu")
