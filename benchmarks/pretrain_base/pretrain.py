"""Make the built-in base model: text, tokenizer, weights. One command, a fixed number of steps, one seed.

    python -m benchmarks.pretrain_base.pretrain --seed 0 --out DIR

The folder that comes out is what `src/fedloom/models/builtin_base` holds (apart from MODEL_CARD.md and
`pretrain.json`, the record of what was made from what).
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.pretrain_base.corpus import LAYOUT, documents
from safetensors.torch import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY_DOCUMENTS = 30_000  # the vocabulary is counted on these, whatever the seed
VOCABULARY_MIN_COUNT = 20
SINGLE_LETTER_WORDS = ("a", "f", "x")  # every other letter on its own is a letter of a spelled word

BATCH, BLOCK = 8, 128  # blocks a step, tokens a block
LEARNING_RATE, FINAL_SHARE = 2e-3, 0.02
WARM_UP_STEPS, FLAT_SHARE = 100, 0.6
WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A whole word of the vocabulary, or its letters; nothing in between.

    A byte-pair model without merges: a piece of text (a word with the space before it, a digit, a sign) is one
    token if it is in the vocabulary and falls to its bytes otherwise. Made-up words are never in the vocabulary, so
    tasks about letters see letters. Every segment between the fixed pieces of the prompt layout starts with a space,
    so a word has one token wherever it stands; the decoder takes that space away again.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    layout = re.compile("|".join(re.escape(piece) for piece in sorted(LAYOUT, key=len, reverse=True)))
    counts: collections.Counter[str] = collections.Counter()
    for text in itertools.islice(documents(0), VOCABULARY_DOCUMENTS):
        for segment in layout.split(text):
            if segment:
                counts.update(piece for piece, _ in split.pre_tokenize_str(" " + segment))

    def is_word(piece: str, count: int) -> bool:
        letters = piece.removeprefix("Ġ")
        if len(piece) < 2 or count < VOCABULARY_MIN_COUNT:
            return False
        return len(letters) > 1 or not letters.isalpha() or letters in SINGLE_LETTER_WORDS

    words = sorted(piece for piece, count in counts.items() if is_word(piece, count))
    pieces = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in (PAD, BOS, EOS)])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in LAYOUT])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, pieces.index(BOS))]
    )
    # What the normalizer put in: the space at the very start and the one after each heading of the layout.
    undo = [decoders.Replace(f"{piece} ", piece) for piece in LAYOUT]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), *undo, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_blocks(tokenizer: PreTrainedTokenizerFast, seed: int, num_blocks: int) -> tuple[np.ndarray, str]:
    """Packed documents as ids [num_blocks, BLOCK], and the SHA-256 of their text."""
    wanted = num_blocks * BLOCK
    ids: list[int] = []
    digest = hashlib.sha256()
    source = documents(seed)
    while len(ids) < wanted:
        texts = list(itertools.islice(source, 2_000))
        digest.update("\x00".join(texts).encode())
        for encoded in tokenizer(texts).input_ids:
            ids += [*encoded, tokenizer.eos_token_id]
    return np.array(ids[:wanted], dtype=np.int64).reshape(num_blocks, BLOCK), digest.hexdigest()


def learning_rate_at(step: int, steps: int) -> float:
    """Warm-up, a flat part, then linear to a small rest."""
    share = step / steps
    down = max(FINAL_SHARE, (1 - share) / (1 - FLAT_SHARE)) if share > FLAT_SHARE else 1.0
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * down


def pretrain(tokenizer: PreTrainedTokenizerFast, blocks: np.ndarray, seed: int) -> tuple[LlamaForCausalLM, float]:
    """One pass over `blocks` [N, BLOCK], shuffled: the model and its mean loss in nats over the last 100 steps."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # On a CPU with blocks this short, plain attention takes a fifth less time than the fused one.
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    order = np.random.RandomState(seed).permutation(len(blocks))
    steps = len(blocks) // BATCH
    losses: list[float] = []
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        ids = torch.from_numpy(blocks[order[step * BATCH : (step + 1) * BATCH]])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}/{steps} · loss {np.mean(losses[-100:]):.4f} · {time.time() - started:.0f} s",
                flush=True,
            )
    return model, float(np.mean(losses[-100:]))


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the text, the first weights and the order of the blocks"
    )
    parser.add_argument("--steps", type=int, default=4_000, help=f"of {BATCH} blocks of {BLOCK} tokens")
    parser.add_argument("--threads", type=int, default=1, help="sums depend on it, so it is part of the record")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    started, started_cpu = time.time(), time.process_time()
    tokenizer = make_tokenizer()
    blocks, corpus_hash = make_blocks(tokenizer, args.seed, args.steps * BATCH)
    print(
        f"{len(tokenizer)} tokens in the vocabulary, {blocks.size} in the text, {time.time() - started:.0f} s",
        flush=True,
    )
    model, loss = pretrain(tokenizer, blocks, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=model.config.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    weights = args.out / "model.safetensors"
    record = {
        "seed": args.seed,
        "steps": args.steps,
        "threads": args.threads,
        "tokens": int(blocks.size),
        "vocabulary": len(tokenizer),
        "parameters": sum(tensor.numel() for tensor in load_file(weights).values()),
        "final_loss": round(loss, 4),
        "wall_seconds": round(time.time() - started),
        "cpu_seconds": round(time.process_time() - started_cpu),
        "corpus_sha256": corpus_hash,
        "tokenizer_sha256": sha256_of(args.out / "tokenizer.json"),
        "weights_sha256": sha256_of(weights),
        "torch": torch.__version__,
    }
    (args.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
