"""Side (e): NVFlare's simulator, the FedAvg recipe with a Client API script (client.py), LoRA weights only.

In its favour: the clients' scripts run inside the simulator's own client processes, the server holds the LoRA weights
alone and exchanges tensors as they are, no evaluation, no tracking, no model selection.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from benchmarks.throughput import note
from benchmarks.throughput import work as shared
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("clients", type=int)
    given = parser.parse_args()
    work, _, _ = shared.load(given.folder)
    recipe = FedAvgRecipe(
        name="lora",
        model={"class_path": "lora_weights.LoraWeights", "args": {"folder": str(given.folder)}},
        min_clients=work.clients,
        num_rounds=work.rounds,
        train_script=str(HERE / "client.py"),
        train_args=f"{given.folder} {given.out}",
        server_expected_format=ExchangeFormat.PYTORCH,
        key_metric="",
    )
    recipe.add_server_file(str(HERE / "lora_weights.py"))
    # With a thread for every client its process stays between rounds; with fewer, one is started for every task.
    cores = os.cpu_count() or 1
    threads = work.clients if work.clients <= 2 * cores else cores
    environment = SimEnv(
        num_clients=work.clients, num_threads=threads, workspace_root=str(given.out / "workspace"), log_config="concise"
    )
    recipe.execute(environment)
    found = sorted((given.out / "workspace").rglob("FL_global_model.pt"))
    if len(found) != 1:
        raise RuntimeError(f"NVFlare left {len(found)} global models: {found}")
    weights = torch.load(found[0], weights_only=True)["model"]
    note.finish(given.out, {name: torch.as_tensor(leaf) for name, leaf in weights.items()}, clients_at_once=threads)


if __name__ == "__main__":
    main()
