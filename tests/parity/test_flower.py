"""Server rules against Flower's strategies, whose numbers `write_flower_numbers.py` wrote into `flower_numbers.json`.

What differs from the papers there, and how it is met here:

- FedAdam, FedYogi, FedAdagrad: the second moment starts at 0; Reddi et al. (Algorithm 2) start at tau^2 or more, and so
  do ours. From 0 (`initial_second=0.0`) the numbers are Flower's.
- FedAdam corrects the bias of the moments by a factor on the learning rate, with the round number plus one (the first
  round has the exponent 2); Algorithm 2 corrects nothing, and neither do ours. With that factor in the learning rate
  the numbers are Flower's.
- QFedAvg sums clients alike and takes whatever loss they report; Li et al. mean the one with the parameters they were
  sent, which `tells_start_loss` measures. It adds 1e-10 to the loss.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from fedloom.aggregates import mean, q_fedavg
from fedloom.ops.names import START_LOSS
from fedloom.servers import fed_adagrad, fed_adam, fed_avgm, fed_yogi, replace

TOLERANCE = 1e-12  # float64, parameters of about 1; 1e-9 for QFedAvg
KEPT = json.loads(Path(__file__).with_name("flower_numbers.json").read_text(encoding="ascii"))


def tree(values):
    return {name: torch.tensor(leaf, dtype=torch.float64) for name, leaf in values.items()}


def after_each_round(server_of, aggregate=None, uniform=False):
    """Ours on the same inputs; `server_of(round)` is the server of that round, whose state goes on."""
    aggregate = aggregate or mean()
    params = tree(KEPT["start"])
    state = server_of(1).init(params)
    found = []
    for number, (deltas, losses) in enumerate(zip(KEPT["deltas"], KEPT["losses"], strict=True), start=1):
        total = None
        for delta, loss, examples in zip(deltas, losses, KEPT["examples"], strict=True):
            told = {START_LOSS: torch.tensor(loss, dtype=torch.float64)} if uniform else {}
            upload = aggregate.lift(params, {**tree(delta), **told}, 1.0 if uniform else float(examples))
            total = upload if total is None else aggregate.add(total, upload)
        params, state = server_of(number).apply(params, aggregate.finish(params, total), state)
        found.append(params)
    return found


def gap(name, ours):
    theirs = [tree(one) for one in KEPT["strategies"][name]["after"]]
    moved = max(float((a[key] - b[key]).abs().max()) for a, b in itertools.pairwise(theirs) for key in a)
    assert moved > 1e-2, "nothing moved"
    return max(float((a[key] - b[key]).abs().max()) for a, b in zip(ours, theirs, strict=True) for key in a)


def test_fedavg_and_fedprox():
    ours = after_each_round(lambda _: replace())
    assert gap("fedavg", ours) < TOLERANCE
    assert gap("fedprox", ours) < TOLERANCE  # at the server it is FedAvg


def test_fedavgm():
    said = KEPT["strategies"]["fedavgm"]["settings"]
    ours = after_each_round(lambda _: fed_avgm(said["server_learning_rate"], momentum=said["server_momentum"]))
    assert gap("fedavgm", ours) < TOLERANCE


def settings_of(name):
    said = KEPT["strategies"][name]["settings"]
    return said, {"beta1": said.get("beta_1", 0.0), "tau": said["tau"]}


def test_fedadam_with_its_correction_in_the_learning_rate():
    said, settings = settings_of("fedadam")
    b1, b2 = said["beta_1"], said["beta_2"]

    def server(number, corrected=True, second=0.0):
        factor = (1 - b2 ** (number + 1)) ** 0.5 / (1 - b1 ** (number + 1)) if corrected else 1.0
        return fed_adam(said["eta"] * factor, beta2=b2, initial_second=second, **settings)

    assert gap("fedadam", after_each_round(server)) < TOLERANCE
    assert gap("fedadam", after_each_round(lambda number: server(number, corrected=False))) > 1e-3


@pytest.mark.parametrize("name", ["fedyogi", "fedadagrad"])
def test_fedyogi_and_fedadagrad_from_zero(name):
    said, settings = settings_of(name)

    def server(second):
        if name == "fedadagrad":
            return fed_adagrad(said["eta"], initial_second=second, **settings)
        return fed_yogi(said["eta"], beta2=said["beta_2"], initial_second=second, **settings)

    assert gap(name, after_each_round(lambda _: server(0.0))) < TOLERANCE
    from_the_papers_start = gap(name, after_each_round(lambda _: server(None)))
    assert TOLERANCE < from_the_papers_start < 1e-2, "tau^2 is small, and seen"


def test_qfedavg():
    said = KEPT["strategies"]["qfedavg"]["settings"]
    aggregate = q_fedavg(said["q"], said["client_learning_rate"])
    assert gap("qfedavg", after_each_round(lambda _: replace(), aggregate, uniform=True)) < 1e-9
