"""Federated optimisation in recipes: what the methods stand for, and what is refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fedloom.study.recipe import Recipe


def recipe(**values: Any) -> Recipe:
    told: dict[str, Any] = {"model": "m", "data": {"path": "d.jsonl"}, "local_steps": 3, **values}
    return Recipe(**told)


def test_the_methods_fill_their_slots() -> None:
    diloco = recipe(method="diloco")
    server = diloco.server
    assert (server.server_optim, server.server_learning_rate, server.server_momentum) == ("nesterov", 0.7, 0.9)
    assert (diloco.client.optim, diloco.client.optimizer_state, diloco.aggregate.weighting) == (
        "adamw",
        "kept",
        "uniform",
    )
    fair = recipe(method="qfedavg")
    assert (fair.client.optim, fair.aggregate.weighting, fair.aggregate.fair_q) == ("sgd", "loss", 1.0)
    assert recipe(method="fednova").aggregate.kind == "fednova"
    drift = recipe(method="scaffold", aggregate={"weighting": "data"})
    assert (drift.client.kind, drift.aggregate.weighting) == ("scaffold", "data")
    assert recipe().aggregate.fair_q is None
    late = recipe(method="fedbuff").runtime
    assert (late.kind, late.clients_per_batch, late.staleness_exponent, late.buffer_size) == (
        "buffered",
        "auto",
        0.5,
        None,
    )
    assert recipe().runtime.staleness_exponent is None
    assert recipe(method="fedavgm", runtime={"kind": "buffered"}).runtime.staleness_exponent == 0.5
    assert recipe(method="scaffold", client={"trainable": "lora_B", "optim": "adamw"}).client.kind == "scaffold"
    assert recipe(method="fednova", adapter={"kind": "prompt_tuning"}).aggregate.kind == "fednova"
    assert recipe(method="fednova", client={"shared": "lora_A"}).client.shared == "lora_A"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "scaffold", "client": {"trainable": "alternate"}}, "client.trainable: alternate, but client.kind"),
        ({"method": "scaffold", "client": {"shared": "lora_A"}}, "client.shared: lora_A, but client.kind is scaffold"),
        ({"method": "scaffold", "client": {"prox_mu": 0.1}}, "client.prox_mu: 0.1, but client.kind is scaffold"),
        ({"method": "scaffold", "client": {"optimizer_state": "kept"}}, "client.optimizer_state: kept, but"),
        ({"method": "scaffold", "aggregate": {"kind": "flora"}}, "aggregate.kind: flora, but client.kind is scaffold"),
        ({"method": "scaffold", "aggregate": {"kind": "fednova"}}, "aggregate.kind: fednova, but client.kind is"),
        ({"method": "scaffold", "aggregate": {"weighting": "loss"}}, "aggregate.weighting: loss, but client.kind is"),
        ({"method": "scaffold", "adapter": {"client_ranks": "normal"}}, "adapter.client_ranks: normal, but"),
        ({"aggregate": {"fair_q": 0.5}}, "aggregate.fair_q: 0.5 would have no effect: weighting is data"),
        ({"method": "qfedavg", "client": {"optim": "adamw"}}, "client.optim: adamw, but weighting loss takes"),
        ({"aggregate": {"kind": "fednova", "weighting": "loss"}}, "aggregate.weighting: loss, but fednova has weights"),
        ({"client": {"optimizer_state": "kept", "optim": "sgd"}}, "kept would have no effect: optim is sgd"),
        ({"client": {"optimizer_state": "kept", "shared": "lora_A"}}, "client.optimizer_state: kept, but client.sha"),
        ({"client": {"optimizer_state": "kept"}, "method": "fednova"}, "client.optimizer_state: kept, but fednova"),
        ({"runtime": {"buffer_size": 2}}, "runtime.buffer_size: 2 would have no effect: kind is batched; buffered has"),
        (
            {"runtime": {"kind": "sequential", "clients_per_batch": 2}},
            "kind is sequential, which takes one client at a time; batched and buffered have it",
        ),
        ({"method": "fedbuff", "runtime": {"kind": "batched"}}, "runtime.kind: batched, but fedbuff is asynchronous"),
        ({"method": "fedbuff", "runtime": {"client_dropout": 0.1}}, "runtime.client_dropout: 0.1, but runtime.kind is"),
        ({"method": "scaffold", "runtime": {"kind": "buffered"}}, "client.kind: scaffold, but runtime.kind is"),
        ({"method": "rolora", "runtime": {"kind": "buffered"}}, "client.trainable: alternate, but runtime.kind is"),
        ({"method": "flora", "runtime": {"kind": "buffered"}}, "aggregate.kind: flora, but runtime.kind is buffered"),
        ({"method": "fednova", "runtime": {"kind": "buffered"}}, "aggregate.kind: fednova, but runtime.kind is"),
        ({"method": "qfedavg", "runtime": {"kind": "buffered"}}, "aggregate.weighting: loss, but runtime.kind is"),
        (
            {"method": "fedbuff", "clients_per_round": 2, "runtime": {"buffer_size": 3}},
            "runtime.buffer_size: 3, but 2 clients train at once: at most 2",
        ),
        ({"method": "diloco", "server": {"server_tau": 0.1}}, "server.server_tau: 0.1 would have no effect"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        recipe(**values)
    assert said in str(error.value)
