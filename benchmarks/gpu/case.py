"""One case in a process of its own: a model with random weights made on the device, some steps, one line of JSON.

Shape suffixes: C clients, N rows, D in-features, O out-features, R rank.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

TOKENS = 512
RANK, ALPHA, TARGETS = 8, 16.0, ("q_proj", "v_proj")
LEARNING_RATE = 1e-4
# Llama's shapes: TinyLlama's 1.1 B and Llama 2's 6.7 B
SIZES = {
    "1b": (2048, 5632, 22, 32, 4, 32_000),
    "7b": (4096, 11_008, 32, 32, 32, 32_000),
    "tiny": (64, 128, 2, 4, 2, 256),
}
# dense TFLOP/s in bfloat16 as the makers state them, by what torch.cuda calls the device; the first match counts
PEAKS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 311.8,
    "A800": 311.8,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "A40": 149.7,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "RTX A6000": 154.8,
}


class Case(NamedTuple):
    """What one process does."""

    side: str  # fedloom, trainer or product (LoRA's product alone)
    size: str = "1b"
    clients: int = 1
    kernel: str = "plain"
    steps: int = 10
    tokens: int = TOKENS
    blocks: tuple[int, int] | None = None  # of the kernel: rows and columns; None: its own

    @property
    def name(self) -> str:
        width = "" if self.side == "trainer" else f", C = {self.clients}, {self.kernel}"
        return f"{self.side} {self.size}{width}" + (f", blocks {self.blocks}" if self.blocks else "")


def peak_flops(device_name: str) -> float | None:
    """FLOP/s in bfloat16, or None of a device that the table does not have."""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in device_name), None)


def run(case: Case, device: torch.device) -> dict[str, Any]:
    """Tokens and seconds of the timed steps, what they are of the peak, and the most memory held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found = {"fedloom": by_fedloom, "trainer": by_trainer, "product": product_alone}[case.side](case, device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    peak = peak_flops(name) if on_gpu else None
    found |= {"device": name, "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None}
    if "flops" in found:
        found["tokens_per_second"] = found["tokens"] / found["seconds"]
        found["share_of_peak"] = found["flops"] / found["seconds"] / peak if peak else None
    return found


def make_model(case: Case, device: torch.device) -> Any:
    """Llama-shaped, random, frozen, bfloat16; float32 for the tiny one, as no CPU has to have bfloat16."""
    hidden, inner, layers, heads, groups, vocabulary = SIZES[case.size]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=max(TOKENS, case.tokens),
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case.size == "tiny" else torch.bfloat16)
    try:
        with device:
            return transformers.LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(kept)


def make_ids(case: Case, rows: int, seed: int) -> torch.Tensor:
    """[rows, T], every token but the first a target."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES[case.size][5], (rows, case.tokens), generator=draw)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- the sides -------------------------------------------------------------------------------------------------------


def by_fedloom(case: Case, device: torch.device) -> dict[str, Any]:
    """A round of `clients` clients side by side, one row a step each, after a short round that is not timed."""
    from fedloom.adapters import lora, with_triton
    from fedloom.aggregates import mean
    from fedloom.clients import sgd_client
    from fedloom.optimizers import adamw
    from fedloom.rounds import initial_state, run_round
    from fedloom.runtimes import batched
    from fedloom.servers import replace
    from fedloom.study.costs import training_flops
    from fedloom.types import Algorithm, Client

    model = make_model(case, device)
    adapter: Any = lora(model, rank=RANK, alpha=ALPHA, targets=list(TARGETS))
    if case.kernel == "triton":
        adapter = with_triton(adapter)
    algorithm = Algorithm(sgd_client(adamw(LEARNING_RATE), max_grad_norm=1.0), mean(), replace())
    state = initial_state(algorithm, adapter, 0)
    flops = training_flops(adapter, state.params)

    def clients(steps: int) -> list[Client]:
        made = []
        for number in range(case.clients):
            ids = make_ids(case, steps, number)
            lengths = torch.full((1,), case.tokens)
            batches = [{"input_ids": row[None], "labels": row[None].clone(), "lengths": lengths} for row in ids]
            made.append(Client(f"c{number}", batches, 1.0))
        return made

    runtime = batched(case.clients)
    run_round(algorithm, adapter, runtime, state, clients(min(3, case.steps)))
    cohort = clients(case.steps)
    wait(device)
    began = time.perf_counter()
    _, row = run_round(algorithm, adapter, runtime, state, cohort)
    wait(device)
    seconds = time.perf_counter() - began
    if row.failed:
        raise RuntimeError(f"clients failed: {row.failed}")
    rows = case.clients * case.steps
    return {
        "seconds": seconds,
        **counted(case, flops, rows),
        "loss": row.metrics["loss_sum"] / row.metrics["target_tokens"],
    }


def by_trainer(case: Case, device: torch.device) -> dict[str, Any]:
    """One client by Hugging Face's Trainer with PEFT; clients one after the other have the same rate."""
    from peft import LoraConfig, get_peft_model

    from fedloom.adapters import lora
    from fedloom.study.costs import training_flops

    model = make_model(case, device)
    counting = lora(model, rank=RANK, alpha=ALPHA, targets=list(TARGETS))
    flops = training_flops(counting, counting.init(0))
    counting.detach()
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(TARGETS), task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)

    def train(steps: int, seed: int) -> float:
        data = [{"input_ids": row, "labels": row} for row in make_ids(case, steps, seed)]
        with tempfile.TemporaryDirectory(prefix="fedloom-bench-") as folder:
            settings = transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,
                max_steps=steps,
                learning_rate=LEARNING_RATE,
                max_grad_norm=1.0,
                bf16=device.type == "cuda",
                use_cpu=device.type == "cpu",
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            )
            trainer = transformers.Trainer(model=tuned, args=settings, train_dataset=data)
            wait(device)
            began = time.perf_counter()
            trainer.train()
            wait(device)
            return time.perf_counter() - began

    train(min(3, case.steps), 1)
    seconds = train(case.steps, 0)
    return {"seconds": seconds, **counted(case, flops, case.steps)}


def counted(case: Case, flops: Any, rows: int) -> dict[str, float]:
    """The same work on both sides: FLOPs by the formula of fedloom/study/costs.py."""
    tokens = rows * case.tokens
    work = flops.of(tokens=tokens, targets=rows * (case.tokens - 1), pairs=tokens * case.tokens, rows=rows, steps=rows)
    return {"tokens": tokens, "flops": work}


def product_alone(case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of y + scale * B A x and its gradients, on the shape of one layer's `q_proj`."""
    from fedloom.ops import cohort_lora

    product = cohort_lora.plain
    if case.kernel == "triton":
        from fedloom.ops import cohort_lora_triton

        product = cohort_lora.fused
        if case.blocks:
            cohort_lora_triton.BLOCK_ROWS, cohort_lora_triton.BLOCK_COLUMNS = case.blocks
            cohort_lora_triton.SUM_ROWS, cohort_lora_triton.SUM_COLUMNS = case.blocks
    hidden = SIZES[case.size][0]
    dtype = torch.float32 if case.size == "tiny" else torch.bfloat16
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    x_CND, y_CNO = leaf(case.clients, case.tokens, hidden), leaf(case.clients, case.tokens, hidden)
    a_CRD = leaf(case.clients, RANK, hidden, dtype=torch.float32)
    b_COR = leaf(case.clients, hidden, RANK, dtype=torch.float32)
    scale_C, up = torch.full((case.clients,), 2.0, device=device), torch.ones_like(y_CNO)

    def forward() -> torch.Tensor:
        return product(x_CND, y_CNO, a_CRD, b_COR, scale_C)

    def both() -> None:
        torch.autograd.grad(forward(), (x_CND, y_CNO, a_CRD, b_COR), up)

    with torch.no_grad():
        alone = timed(forward, case.steps, device)
    return {"forward_milliseconds": alone, "with_gradients_milliseconds": timed(both, case.steps, device)}


def timed(work: Callable[[], Any], steps: int, device: torch.device) -> float:
    for _ in range(3):
        work()
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        work()
    wait(device)
    return 1e3 * (time.perf_counter() - began) / steps


def main() -> None:
    given = json.loads(sys.argv[1])
    if given.get("blocks"):
        given["blocks"] = tuple(given["blocks"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformers.utils.logging.set_verbosity_error()
    try:
        found = run(Case(**given), device)
    except torch.OutOfMemoryError:
        found = {"out_of_memory": True}
    except Exception as error:
        if "out of memory" not in str(error).lower():
            raise
        found = {"out_of_memory": True}  # as a run's own error tells it
    print(json.dumps(found))


if __name__ == "__main__":
    main()
