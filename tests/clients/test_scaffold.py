"""SCAFFOLD against a loop written from the paper's Algorithm 1, in float64."""

from __future__ import annotations

import pytest
import torch
from tests.small import clients, gap, small_lora

from fedloom.aggregates import scaffold
from fedloom.clients import scaffold_client, with_control
from fedloom.errors import RunError
from fedloom.ops.names import CONTROL, apart
from fedloom.optimizers import adamw, decay, sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import batched, with_dropout
from fedloom.servers import optimize, replace
from fedloom.types import Algorithm

ETA, N = 0.3, 5


def method(optimizer=None, server=None, uniform=True, weight=float(N), **settings):
    return Algorithm(
        scaffold_client(optimizer or sgd(ETA), **settings),
        scaffold(weight),
        server or replace(),
        uniform_weight=uniform,
    )


def paper(adapter, state, cohorts, *, weights=None):
    """x, c and all c_i after the rounds: Algorithm 1, line by line, with weights p_i (1 / N in the paper)."""
    control, x = apart(state.params, CONTROL)
    c = {k.removeprefix(CONTROL): v for k, v in control.items()}
    c_i = {f"c{i}": {k: torch.zeros_like(v) for k, v in x.items()} for i in range(N)}
    p = weights or {f"c{i}": 1 / N for i in range(N)}
    for cohort in cohorts:
        moves, changes = {}, {}
        for client in cohort:
            y = {k: v.clone() for k, v in x.items()}
            for batch in client.batches:
                leaves = {k: v[None].clone().requires_grad_() for k, v in y.items()}
                told = {k: v[None] for k, v in batch.items()}
                grads = torch.autograd.grad(adapter.loss(leaves, told).sum(), list(leaves.values()))
                for (k, v), g in zip(y.items(), grads, strict=True):
                    y[k] = v - ETA * (g[0] - c_i[client.id][k] + c[k])
            steps = len(client.batches)
            new = {k: c_i[client.id][k] - c[k] + (x[k] - y[k]) / (steps * ETA) for k in x}  # option II
            moves[client.id] = {k: y[k] - x[k] for k in x}
            changes[client.id] = {k: new[k] - c_i[client.id][k] for k in x}
            c_i[client.id] = new
        whole = sum(p[i] for i in moves)
        x = {k: v + sum(p[i] * moves[i][k] for i in moves) / whole for k, v in x.items()}
        c = {k: v + sum(p[i] * changes[i][k] for i in moves) for k, v in c.items()}  # |S| / N of the mean
    return x, c, c_i


def rounds_of(algorithm, adapter, cohorts, width=8, state=None, runtime=None):
    state = state or initial_state(algorithm, adapter, 3)
    for cohort in cohorts:
        state, _ = run_round(algorithm, adapter, runtime or batched(width), state, cohort)
    return state


def check(state, wanted, tolerance=1e-12):
    x, c, c_i = wanted
    control, params = apart(state.params, CONTROL)
    assert gap(params, x) < tolerance
    assert gap({k.removeprefix(CONTROL): v for k, v in control.items()}, c) < tolerance
    for client, own in state.personal.items():
        assert gap({k.removeprefix(CONTROL): v for k, v in own.items()}, c_i[client]) < tolerance
    assert any(float(v.abs().max()) > 1e-3 for v in c.values()), "no control variate moved"


@pytest.mark.parametrize("width", [1, 8])
def test_it_is_algorithm_1_with_everyone_and_with_few(width):
    everyone = clients(N)
    some = [everyone, everyone[1:3], [everyone[4], everyone[0]], everyone[2:]]
    adapter = with_control(small_lora())
    state = rounds_of(method(), adapter, some, width)
    wanted = paper(small_lora(), initial_state(method(), adapter, 3), some)
    check(state, wanted)
    mean = {k: sum(own[k] for own in wanted[2].values()) / N for k in wanted[1]}
    assert gap(mean, wanted[1]) < 1e-12, "c is not the mean of all c_i"


def test_with_unequal_weights_c_stays_the_weighted_mean_of_all():
    everyone = clients(N)
    whole = sum(client.weight for client in everyone)
    some = [everyone[:2], everyone[1:4]]
    adapter = with_control(small_lora())
    algorithm = method(uniform=False, weight=whole)
    state = rounds_of(algorithm, adapter, some)
    p = {client.id: client.weight / whole for client in everyone}
    check(state, paper(small_lora(), initial_state(algorithm, adapter, 3), some, weights=p))


def test_the_servers_step_length_is_of_the_parameters_alone():
    cohorts = [clients(N), clients(N)[:2]]
    adapter = with_control(small_lora())
    half = rounds_of(method(server=optimize(sgd(0.5))), adapter, cohorts[:1])
    whole = rounds_of(method(), adapter, cohorts[:1])
    first = initial_state(method(), adapter, 3).params
    for name, leaf in half.params.items():
        part = 1.0 if name.startswith(CONTROL) else 0.5
        torch.testing.assert_close(leaf, first[name] + part * (whole.params[name] - first[name]))


def test_clients_that_fail_are_not_in_the_cohort():
    adapter = with_control(small_lora())
    state = initial_state(method(), adapter, 3)
    lossy = with_dropout(batched(8), 0.4)
    after, report = run_round(method(), adapter, lossy, state, clients(N))
    assert 0 < len(report.failed) < N
    there = [client for client in clients(N) if client.id not in report.failed]
    check(after, paper(small_lora(), state, [there]))


def test_adams_steps_are_not_taken_for_gradients():
    """c_i after a round is the mean of the gradients at the places that Adam went through."""
    adapter, client = with_control(small_lora()), clients(N)[3]
    algorithm = method(adamw(1e-2), schedule=decay("cosine", 4))
    state = initial_state(algorithm, adapter, 3)
    after, _ = run_round(algorithm, adapter, batched(1), state, [client])
    seen = []
    plain = small_lora()

    def watch(tree_C, batch):
        leaves = {k: v.detach().clone().requires_grad_() for k, v in tree_C.items() if not k.startswith("fixed/")}
        grads = torch.autograd.grad(plain.loss({**tree_C, **leaves}, batch).sum(), list(leaves.values()))
        seen.append(dict(zip(leaves, grads, strict=True)))
        return plain.loss(tree_C, batch)

    watched = with_control(small_lora())
    watched.inner.loss = watch
    run_round(algorithm, watched, batched(1), state, [client])
    assert len(seen) == len(client.batches) > 1
    wanted = {CONTROL + k: sum(grads[k][0] for grads in seen) / len(seen) for k in seen[0]}
    assert gap(after.personal[client.id], wanted) < 1e-12


def test_bytes_double_both_ways_and_nothing_of_it_is_exported(tmp_path):
    client = clients(1)
    adapter, plain = with_control(small_lora()), small_lora()
    from tests.small import fedavg

    _, twice = run_round(method(weight=1.0), adapter, batched(1), initial_state(method(), adapter, 3), client)
    _, once = run_round(fedavg(), plain, batched(1), initial_state(fedavg(), plain, 3), client)
    numbers = 8 * sum(leaf.numel() for leaf in plain.init(3).values())
    for way in ("bytes_up", "bytes_down"):
        assert numbers < twice.metrics[way] - once.metrics[way] < numbers + 2000
    state = initial_state(method(), adapter, 3)
    adapter.export(state.params, tmp_path / "a")
    plain.export(plain.init(3), tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_what_is_missing_is_said():
    plain = small_lora()
    with pytest.raises(RunError, match="no control variates"):
        run_round(method(), plain, batched(1), initial_state(method(), plain, 3), clients(1))
    adapter = with_control(small_lora())
    for weight in (None, 1.0):
        with pytest.raises(RunError, match="all clients together"):
            rounds_of(method(weight=weight), adapter, [clients(2)])
    with pytest.raises(RunError, match="rank of its own"):
        rounds_of(method(), adapter, [clients(1, ranks=[2])])
