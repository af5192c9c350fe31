"""Side (d): Flower's simulation engine in the FlowerTune pattern.

As Flower's LLM template has it: a ClientApp that loads the model anew for every message, puts the received LoRA weights
in, trains, and replies with its own; FedAvg weighted by the number of examples; Ray runs one ClientApp per core side by
side. In its favour: the plain loop of steps in place of trl's trainer, no tokenizer, no evaluation, no checkpoints, and
a server that never loads the model.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()
server = ServerApp()
FOLDER, OUT = "THROUGHPUT_FOLDER", "THROUGHPUT_OUT"


@client.train()
def train(message: Message, context: Context) -> Message:
    from benchmarks.throughput import note, plain
    from benchmarks.throughput import work as shared
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    folder, out = Path(os.environ[FOLDER]), Path(os.environ[OUT])
    work, data, plan = shared.load(folder)
    number = int(context.node_config["partition-id"])
    round = int(message.content["config"]["server-round"]) - 1
    model = plain.peft_model(folder)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    with note.training(out) as seen:
        seen.tokens = plain.train(model, data, plan[f"{round}/{plain.client_names(plan)[number]}"])
    metrics = MetricRecord({"num-examples": len(shared.client_rows(work)[number])})
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    from benchmarks.throughput import note, plain
    from benchmarks.throughput import work as shared

    folder, out = Path(os.environ[FOLDER]), Path(os.environ[OUT])
    work, _, _ = shared.load(folder)
    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=work.clients, min_available_nodes=work.clients
    )
    start = ArrayRecord(plain.start_adapter(folder))
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=work.rounds)
    note.finish(out, result.arrays.to_torch_state_dict(), clients_at_once=os.cpu_count())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("clients", type=int)
    given = parser.parse_args()
    os.environ |= {FOLDER: str(given.folder), OUT: str(given.out), "RAY_USAGE_STATS_ENABLED": "0"}
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, num_supernodes=given.clients, backend_config=resources)


if __name__ == "__main__":
    main()
