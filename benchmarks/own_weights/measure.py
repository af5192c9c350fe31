"""What training the model's own weights costs a client: memory per trained number, and time against the plain model.

    python benchmarks/own_weights/measure.py [--hidden 512] [--layers 6]

Each case runs in a process of its own: three steps of AdamW of C clients at once, on a random Llama in float32. Memory
is the peak of the process's resident memory above what it holds with the model and the adapter loaded.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

ROWS, TOKENS = 2, 64
CASES = [("lora", 1), ("lora", 4), ("full", 1), ("full", 2), ("full", 4), ("last_layers", 1), ("last_layers", 4),
         ("bottleneck", 1), ("bottleneck", 4)]  # fmt: skip


def case(kind: str, clients: int, shape: dict[str, int]) -> dict[str, float]:
    from fedloom.ops.host import tune_host

    tune_host(1)
    import torch

    import fedloom as fl
    from fedloom.models.load import random_base
    from fedloom.study.costs import peak_memory_bytes, reset_peak_memory

    base = random_base(hidden_size=shape["hidden"], num_layers=shape["layers"], num_heads=8, vocab_size=2048)
    makers: dict[str, Callable[..., Any]] = {
        "lora": fl.lora,
        "full": fl.full,
        "last_layers": fl.last_layers,
        "bottleneck": fl.bottleneck,
    }
    adapter = makers[kind](base.model)
    tree = adapter.init(0)
    update = fl.sgd_client(fl.adamw(1e-5), max_grad_norm=1.0)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 2000, (clients, ROWS, TOKENS), generator=draw)
    batch = {"input_ids": ids, "labels": ids}
    tree_C = {name: leaf.expand(clients, *leaf.shape) for name, leaf in tree.items()}
    from fedloom.types import Site

    sites = [Site(0, 0, str(c), num_steps=3) for c in range(clients)]
    adapter.nll(tree_C, batch)
    held = reset_peak_memory() and peak_memory_bytes()
    work = update.init(tree_C, {}, sites)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work = update.step(adapter.loss, work, batch)
        seconds.append(time.perf_counter() - start)
    update.finish(tree_C, work)
    peak = peak_memory_bytes() - held
    trained = sum(leaf.numel() for leaf in tree.values())
    return {"trained": trained, "total": base.num_parameters, "peak": peak, "step": statistics.median(seconds)}


def passes(shape: dict[str, int]) -> dict[str, float]:
    """Forward and backward: the plain model with all its parameters trained by torch, and `full` with one client."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    import fedloom as fl
    from fedloom.models.load import random_base

    base = random_base(hidden_size=shape["hidden"], num_layers=shape["layers"], num_heads=8, vocab_size=2048)
    plain = random_base(hidden_size=shape["hidden"], num_layers=shape["layers"], num_heads=8, vocab_size=2048).model
    plain.requires_grad_(True)
    ids = torch.randint(5, 2000, (4, 128), generator=torch.Generator().manual_seed(0))
    adapter = fl.full(base.model)
    tree = {name: leaf[None].clone().requires_grad_() for name, leaf in adapter.init(0).items()}

    def torchs() -> None:
        logits = plain(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        torch.autograd.grad(loss, list(plain.parameters()))

    def ours() -> None:
        loss_C = adapter.loss(tree, {"input_ids": ids[None], "labels": ids[None]})
        torch.autograd.grad(loss_C.sum(), list(tree.values()))

    found: dict[str, list[float]] = {"torch": [], "full": []}
    for _ in range(9):
        for name, run in (("torch", torchs), ("full", ours)):
            start = time.process_time()
            run()
            found[name].append(time.process_time() - start)
    return {name: min(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    shape = vars(parser.parse_args())
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        print("| kind | clients at once | trained | peak above the model | bytes per trained number and client |")
        print("|---|---|---|---|---|")
        for kind, clients in CASES:
            row = pool.apply(case, (kind, clients, shape))
            share = row["peak"] / row["trained"] / clients
            trained = f"{row['trained']:,.0f} of {row['total']:,.0f}"
            print(f"| {kind} | {clients} | {trained} | {row['peak'] / 2**20:,.0f} MiB | {share:.1f} |", flush=True)
        both = pool.apply(passes, (shape,))
    print(f"forward and backward of one client: torch's own training {both['torch']:.3f} s, full {both['full']:.3f} s "
          f"of processor time ({both['full'] / both['torch']:.2f} times)")  # fmt: skip


if __name__ == "__main__":
    main()
