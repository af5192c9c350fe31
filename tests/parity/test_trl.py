"""The losses on pairs against TRL's own trainer, where it is installed (pip install trl)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.adapters.test_dpo import one, pair_batch
from tests.small import llama

from fedloom.adapters import dpo, lora
from fedloom.models.load import train_tokenizer

trl = pytest.importorskip("trl", reason="TRL is not installed")
TARGETS = ["q_proj", "v_proj"]


@pytest.mark.parametrize(("loss_type", "beta"), [("sigmoid", 0.1), ("sigmoid_norm", 2.0), ("hinge", 0.3), ("ipo", 0.4)])
def test_loss_and_gradients_are_those_of_trls_trainer(tmp_path: Path, loss_type: str, beta: float) -> None:
    import peft
    from datasets import Dataset

    base = llama(dtype=torch.float32)  # its trainer computes in float32
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    rows = Dataset.from_list([{"prompt": "ab", "chosen": "cd", "rejected": "e"}] * 4)
    settings = trl.DPOConfig(
        output_dir=str(tmp_path), beta=beta, loss_type=loss_type, report_to=[], bf16=False, use_cpu=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=peft.get_peft_model(copy.deepcopy(base), config),
        args=settings,
        train_dataset=rows,
        processing_class=train_tokenizer([], vocab_size=300),
    )
    model = trainer.model.eval()
    draw = torch.Generator().manual_seed(1)
    theirs = {name: leaf for name, leaf in model.named_parameters() if "lora_" in name and ".default." in name}
    for leaf in theirs.values():  # after the trainer took its reference, which is the adapter at its start
        leaf.data = 0.1 * torch.randn(leaf.shape, generator=draw)
    batch = pair_batch(5, pairs=3)
    ids = torch.cat([batch["input_ids"], batch["rejected_ids"]])
    mask = torch.cat([batch["chosen_mask"], batch["rejected_mask"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    want = trainer._compute_loss(model, inputs, False)
    want.backward()

    ours = dpo(lora(copy.deepcopy(base), rank=4, alpha=8.0, targets=TARGETS), beta=beta, loss_type=loss_type)
    same = {name: next(k for k in theirs if k.replace(".default", "").endswith(name)) for name in ours.init(0)}
    tree = {name: theirs[key].detach()[None].clone().requires_grad_() for name, key in same.items()}
    got = ours.loss(tree, one(batch))
    assert float(got.detach()[0]) == pytest.approx(float(want.detach()), rel=1e-5)
    largest = max(float(leaf.grad.abs().max()) for leaf in theirs.values())
    for (name, key), grad in zip(same.items(), torch.autograd.grad(got.sum(), list(tree.values())), strict=True):
        assert float((grad[0] - theirs[key].grad).abs().max()) < 1e-5 * largest, name
