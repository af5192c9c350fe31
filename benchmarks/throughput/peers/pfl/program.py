"""Side (f): pfl-research, its FederatedAveraging on its SimulatedBackend, as its own LLM benchmark composes them.

Users are trained one after the other in one process, on one resident model, by pfl's own loop of local steps and AdamW.
In its favour: no callbacks, and no evaluation. (pfl evaluates every user of the first round before and after training;
here it is given a model whose evaluation returns at once.)
"""

from __future__ import annotations

import argparse
import itertools
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.throughput import note, plain
from benchmarks.throughput import work as shared
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel


class Round(Dataset):  # type: ignore[misc]  # pfl has no types here
    """One user's planned batches of one round; its length is the number of the user's rows, its weight in the mean."""

    def __init__(self, out: Path, data: shared.Data, table_SB: Any, rows: int) -> None:
        super().__init__(raw_data=())
        self.out, self.data, self.table_SB, self.rows = out, data, table_SB, rows

    def __len__(self) -> int:
        return self.rows

    def iter(self, batch_size: int | None) -> Iterator[dict[str, torch.Tensor]]:
        with note.training(self.out) as seen:
            for rows in self.table_SB:
                batch = shared.pad(self.data, rows)
                seen.tokens += int(batch["attention_mask"].sum())
                yield batch


class Unevaluated(PyTorchModel):  # type: ignore[misc]  # pfl has no types here
    def evaluate(self, *_: Any, **__: Any) -> Metrics:
        return Metrics()


def run(folder: Path, out: Path) -> None:
    work, data, plan = shared.load(folder)
    names = plain.client_names(plan)
    rows = dict(zip(names, map(len, shared.client_rows(work)), strict=True))
    network = plain.peft_model(folder)
    set_peft_model_state_dict(network, plain.start_adapter(folder))
    network.loss = types.MethodType(lambda self, **batch: self(**batch).loss, network)
    network.metrics = types.MethodType(lambda self, **batch: {}, network)  # pfl wants to see one
    model = Unevaluated(
        model=network,
        local_optimizer_create=partial(torch.optim.AdamW, weight_decay=0.0),
        central_optimizer=torch.optim.SGD(plain.trained(network), lr=1.0),
    )
    turns = itertools.count()
    in_order = itertools.cycle(names)

    def open_user(name: str) -> Round:
        return Round(out, data, plan[f"{next(turns) // len(names)}/{name}"], rows[name])

    users = FederatedDataset(open_user, lambda: next(in_order))
    backend = SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()])
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=work.rounds + 1,
            train_cohort_size=work.clients,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=work.steps,
            local_learning_rate=shared.LEARNING_RATE,
            local_batch_size=work.batch,
            local_max_grad_norm=shared.CLIP,
        ),
        model_eval_params=None,
        callbacks=[],
    )
    note.finish(out, get_peft_model_state_dict(network))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("clients", type=int)
    given = parser.parse_args()
    run(given.folder, given.out)


if __name__ == "__main__":
    main()
