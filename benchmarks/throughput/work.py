"""The work that every side does: one model, one data set, one plan of who trains on which rows in which step.

A process of its own makes it, so that no side pays for it, and the bare loop needs nothing of fedloom.

Everything is synthetic and seeded. The lengths are GSM8K's under a byte-level BPE tokenizer of 4,096 tokens in the
Alpaca layout: a preamble of 58 tokens, a question of exp(N(4.05, 0.38)) and an answer of exp(N(4.50, 0.43)) tokens,
their logarithms correlated by 0.53 (fitted to all 7,473 rows of the training set). The text is a random bigram language
in which a few tokens are frequent, so that a tuned model's held-out loss falls.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BOS, EOS, PAD = 1, 2, 3
FIRST = 4  # the first token that is a word
PREAMBLE = 58
QUESTION = (4.05, 0.38)
ANSWER = (4.50, 0.43)
CORRELATION = 0.53
MAX_LENGTH = 512
ROWS = 7473
# Llama models with random weights; the tiny one is for the tests.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab": 512, "hidden": 32, "inner": 64, "layers": 2, "heads": 2, "tied": False},
    "10M": {"vocab": 4096, "hidden": 288, "inner": 1024, "layers": 6, "heads": 6, "tied": False},
    "100M": {"vocab": 32000, "hidden": 768, "inner": 2048, "layers": 12, "heads": 12, "tied": True},
}
RANK, ALPHA, TARGETS = 8, 16.0, ("q_proj", "v_proj")
LEARNING_RATE = 5e-3
CLIP = 1.0


@dataclass(frozen=True)
class Work:
    """Who does how much."""

    clients: int
    batch: int
    steps: int  # per client and round
    rounds: int
    seed: int = 0
    rows: int = ROWS
    model: str = "10M"
    held_out: int = 96

    @property
    def name(self) -> str:
        return f"{self.model}-{self.clients}-{self.batch}-{self.steps}x{self.rounds}"


@dataclass(frozen=True)
class Data:
    """Flat tokens: row n is ids[offsets[n] : offsets[n + 1]], its first prompts[n] tokens carry no loss."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompts: NDArray[np.int64]

    def row(self, number: int) -> tuple[NDArray[np.int32], int]:
        return self.ids[self.offsets[number] : self.offsets[number + 1]], int(self.prompts[number])

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def make_model(shape: str, seed: int = 0) -> Any:
    """A Llama with random weights, float32: 9.7 million parameters for "10M", 110 million for "100M"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=size["tied"],
    )
    return LlamaForCausalLM(config)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The frozen base model from disk, as every side loads it."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def make_data(work: Work) -> Data:
    """The training rows and then those held out."""
    rng = np.random.default_rng(work.seed)
    count = work.rows + work.held_out
    z = rng.standard_normal((2, count))
    z[1] = CORRELATION * z[0] + np.sqrt(1 - CORRELATION**2) * z[1]
    questions = np.exp(QUESTION[0] + QUESTION[1] * z[0]).round().astype(np.int64).clip(5, 200)
    answers = np.exp(ANSWER[0] + ANSWER[1] * z[1]).round().astype(np.int64).clip(5, 240)
    prompts = 1 + PREAMBLE + questions
    lengths = prompts + answers + 1
    text = _language(SHAPES[work.model]["vocab"], count, int(lengths.max()), rng)
    text[:, 0] = BOS
    text[:, 1 : 1 + PREAMBLE] = np.arange(FIRST, FIRST + PREAMBLE)
    text[np.arange(count), lengths - 1] = EOS
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([line[:length] for line, length in zip(text, lengths, strict=True)])
    return Data(ids.astype(np.int32), offsets, prompts)


def _language(vocab: int, rows: int, tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Random walks over words, each of which has eight successors; frequent words are successors of many."""
    words = vocab - FIRST
    frequency = 1 / np.arange(1, words + 1)
    successors = rng.choice(words, size=(words, 8), p=frequency / frequency.sum())
    odds = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    walk = np.empty((rows, tokens), dtype=np.int64)
    here = rng.integers(0, words, rows)
    for step in range(tokens):
        walk[:, step] = here
        here = successors[here, rng.choice(8, size=rows, p=odds)]
    return walk + FIRST


def client_rows(work: Work) -> list[NDArray[np.int64]]:
    """Each client's row numbers: an even deal."""
    order = np.random.default_rng(work.seed + 1).permutation(work.rows)
    return [np.sort(part) for part in np.array_split(order, work.clients)]


def prepare(work: Work, folder: Path) -> None:
    """Write the data, the plan of plain random batches, and the adapter that all sides begin with."""
    from fedloom.adapters import lora
    from fedloom.data.batches import round_batches

    data = make_data(work)
    examples = federated_examples(work, data)
    plan: dict[str, NDArray[np.int64]] = {}
    for round in range(work.rounds):
        for client, own in examples.items():
            batches = round_batches(
                own,
                batch_size=work.batch,
                num_steps=work.steps,
                pad_id=PAD,
                seed=work.seed,
                round=round,
                client=client,
                bucket=False,
            )
            # Numbers in the data, -1 where the last batch of an epoch is smaller.
            table = np.full((work.steps, work.batch), -1, dtype=np.int64)
            for step, places in enumerate(batches.plan):
                table[step, : len(places)] = own.rows[places]
            plan[f"{round}/{client}"] = table
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", ids=data.ids, offsets=data.offsets, prompts=data.prompts)
    np.savez(folder / "plan.npz", **plan)  # type: ignore[arg-type]  # numpy's own signature names allow_pickle first
    (folder / "work.json").write_text(json.dumps(asdict(work)))
    model = make_model(work.model)
    model.save_pretrained(folder / "model")
    adapter = lora(model, rank=RANK, alpha=ALPHA, targets=list(TARGETS))
    adapter.export(adapter.init(work.seed), folder / "start")


def federated_examples(work: Work, data: Data) -> dict[str, Any]:
    """fedloom's `Examples` of each client."""
    from fedloom.data.tokens import Examples, Tokens

    lengths = data.lengths
    position = np.arange(len(data.ids)) - np.repeat(data.offsets[:-1], lengths)
    trained = position >= np.repeat(data.prompts, lengths)
    targets = (lengths - data.prompts).astype(np.int32)
    numbers = np.arange(len(lengths), dtype=np.int32)
    digests = np.arange(2 * len(lengths), dtype=np.uint64).reshape(-1, 2)  # no two rows are the same
    tokens = Tokens(data.ids, trained, data.offsets, numbers, targets, digests)
    return {f"c{number:04d}": Examples(tokens, rows) for number, rows in enumerate(client_rows(work))}


def load(folder: Path) -> tuple[Work, Data, dict[str, NDArray[np.int64]]]:
    work = Work(**json.loads((folder / "work.json").read_text()))
    with np.load(folder / "data.npz") as arrays:
        data = Data(arrays["ids"], arrays["offsets"], arrays["prompts"])
    with np.load(folder / "plan.npz") as arrays:
        plan = {key: arrays[key] for key in arrays.files}
    return work, data, plan


def pad(data: Data, rows: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """A batch as a Hugging Face collator makes it: padded to its longest row, with an attention mask."""
    rows = rows[rows >= 0]
    longest = int(data.lengths[rows].max())
    ids = torch.full((len(rows), longest), PAD)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for line, number in enumerate(rows):
        tokens, prompt = data.row(int(number))
        row = torch.from_numpy(tokens.astype(np.int64))
        ids[line, : len(row)] = row
        labels[line, prompt : len(row)] = row[prompt:]
        mask[line, : len(row)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@torch.no_grad()
def held_out_loss(folder: Path, adapter: dict[str, torch.Tensor] | None) -> float:
    """Mean loss per answer token of the rows held out, always in float32 by plain transformers, adapter merged.

    `adapter` has PEFT's names; None is the untouched base.
    """
    work, data, _ = load(folder)
    model = load_model(folder)
    merged = 0
    for name, module in model.named_modules():
        a = (adapter or {}).get(f"base_model.model.{name}.lora_A.weight")
        b = (adapter or {}).get(f"base_model.model.{name}.lora_B.weight")
        if a is not None and b is not None:
            module.weight += ALPHA / RANK * (b.float() @ a.float())
            merged += 1
    if adapter is not None and 2 * merged != len(adapter):
        raise RuntimeError(f"{len(adapter)} adapter tensors, but {merged} pairs found their layer")
    total, count = 0.0, 0
    rows = work.rows + np.argsort(data.lengths[work.rows :], kind="stable")
    for start in range(0, work.held_out, 16):
        batch = pad(data, rows[start : start + 16])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((batch["labels"][:, 1:] != -100).sum())
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("work", help="a Work as JSON")
    given = parser.parse_args()
    prepare(Work(**json.loads(given.work)), given.folder)


if __name__ == "__main__":
    main()
