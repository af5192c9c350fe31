"""Write the reference numbers of Flower's server strategies, to which tests compare ours.

    python -m venv /tmp/flower && /tmp/flower/bin/pip install flwr
    /tmp/flower/bin/python tests/parity/write_flower_numbers.py

flwr cannot live beside the packages that this one pins, so its numbers are kept in a file (with its version) instead of
being computed in the tests. The strategies' own classes run here, on fixed float64 inputs, for a few rounds.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, QFedAvg
from flwr.supercore.task_identity import TaskIdentity

ROUNDS, CLIENTS = 4, 3
EXAMPLES = [10, 3, 25]
SHAPES = {"a": (3, 2), "b": (4,)}

STRATEGIES: dict[str, tuple[Any, dict[str, float]]] = {
    "fedavg": (FedAvg, {}),
    "fedprox": (FedProx, {"proximal_mu": 0.1}),
    "fedavgm": (FedAvgM, {"server_learning_rate": 0.5, "server_momentum": 0.9}),
    "fedadam": (FedAdam, {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    "fedyogi": (FedYogi, {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}),
    "fedadagrad": (FedAdagrad, {"eta": 0.1, "tau": 1e-3}),
    "qfedavg": (QFedAvg, {"client_learning_rate": 0.2, "q": 0.5}),
}


class Grid:
    """As much of Flower's as the strategies ask for: who is there."""

    def get_node_ids(self) -> list[int]:
        return list(range(1, CLIENTS + 1))


def numbers(draw: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: draw.normal(size=shape) for name, shape in SHAPES.items()}


def record(tree: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(leaf) for name, leaf in tree.items()})


def run(make: Any, settings: dict[str, float], start: dict[str, np.ndarray], deltas: Any, losses: Any) -> list[Any]:
    """The server's parameters after each round."""
    strategy = make(fraction_train=1.0, min_train_nodes=CLIENTS, min_available_nodes=CLIENTS, **settings)
    arrays, found = record(start), []
    for number in range(ROUNDS):
        asked = list(strategy.configure_train(number + 1, arrays, ConfigRecord(), Grid()))
        sent = {name: array.numpy() for name, array in arrays.items()}
        replies = []
        for client in range(CLIENTS):
            moved = {name: sent[name] + deltas[number][client][name] for name in sent}
            told = MetricRecord({"num-examples": EXAMPLES[client], "train_loss": losses[number][client]})
            content = RecordDict({"arrays": record(moved), "metrics": told})
            replies.append(Message(content, reply_to=asked[client]))
        arrays, _ = strategy.aggregate_train(number + 1, replies)
        found.append({name: array.numpy().tolist() for name, array in arrays.items()})
    return found


def main() -> None:
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # messages want to know whose they are
    draw = np.random.default_rng(0)
    start = numbers(draw)
    deltas = [[numbers(draw) for _ in range(CLIENTS)] for _ in range(ROUNDS)]
    losses = [[float(x) for x in draw.uniform(0.2, 3.0, CLIENTS)] for _ in range(ROUNDS)]

    def plain(tree: dict[str, np.ndarray]) -> dict[str, Any]:
        return {name: leaf.tolist() for name, leaf in tree.items()}

    document = {
        "flwr": version("flwr"),
        "numpy": version("numpy"),
        "examples": EXAMPLES,
        "start": plain(start),
        "deltas": [[plain(one) for one in row] for row in deltas],
        "losses": losses,
        "strategies": {
            name: {"settings": settings, "after": run(make, settings, start, deltas, losses)}
            for name, (make, settings) in STRATEGIES.items()
        },
    }
    path = Path(__file__).with_name("flower_numbers.json")
    path.write_text(json.dumps(document) + "\n", encoding="ascii")
    print(path, path.stat().st_size, "bytes, flwr", document["flwr"])


if __name__ == "__main__":
    main()
