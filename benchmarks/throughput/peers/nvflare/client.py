"""An NVFlare client: receive the LoRA weights, train, send its own, as long as the server goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import nvflare.client as flare
import torch
from benchmarks.throughput import note, plain
from benchmarks.throughput import work as shared
from peft import get_peft_model_state_dict, set_peft_model_state_dict


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    work, data, plan = shared.load(folder)
    flare.init()
    number = int(flare.get_site_name().removeprefix("site-")) - 1
    name = plain.client_names(plan)[number]
    model = plain.peft_model(folder)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        set_peft_model_state_dict(model, {key: torch.as_tensor(leaf) for key, leaf in received.params.items()})
        with note.training(out) as seen:
            seen.tokens = plain.train(model, data, plan[f"{received.current_round}/{name}"])
        own = {key: leaf.detach().clone() for key, leaf in get_peft_model_state_dict(model).items()}
        # The weight of this client in the mean.
        meta = {"NUM_STEPS_CURRENT_ROUND": len(shared.client_rows(work)[number])}
        flare.send(flare.FLModel(params=own, meta=meta))


if __name__ == "__main__":
    main()
