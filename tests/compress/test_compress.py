"""Each way of compressing: what comes back, what it costs, and that hostile messages are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.small import clients, fedavg, gap, small_lora

from fedloom import wire
from fedloom.aggregates import flora
from fedloom.clients import error_feedback, sgd_client
from fedloom.compress import cast, low_rank, nonzero, quantize, random_k, top_k, zstd
from fedloom.compress.quantize import packed, unpacked
from fedloom.errors import RunError, UserError
from fedloom.optimizers import sgd
from fedloom.rounds import initial_state, run_round
from fedloom.runtimes import ClientSite, batched, loopback, sequential
from fedloom.study.build import algorithm_of
from fedloom.study.load import validate_text
from fedloom.types import Site

SITE = Site(3, 5, "c1")
EVERY = {
    "float16": lambda: cast("float16"),
    "bfloat16": lambda: cast("bfloat16"),
    "int8": lambda: quantize(8),
    "int8_blocks": lambda: quantize(8, block_size=16),
    "int4": lambda: quantize(4),
    "int4_blocks": lambda: quantize(4, block_size=7),
    "top_k": lambda: top_k(0.1),
    "random_k": lambda: random_k(0.1),
    "low_rank": lambda: low_rank(2),
    "nonzero": nonzero,
    "zstd": zstd,
}


def tree(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a.lora_A": (8, 33), "a.lora_B": (31, 8), "bias": (5,), "one": (), "none": (0, 4)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def through(transform, given_tree, site=SITE):
    raw = wire.encode("x", {}, t=transform.encode(given_tree, site))  # what travels is what the codec can carry
    return transform.decode(wire.decode(raw).trees["t"], site)


def wire_bytes(transform, given_tree) -> int:
    return wire.num_bytes("x", {}, t=transform.encode(given_tree, SITE))


@pytest.mark.parametrize("name", EVERY)
def test_names_and_shapes_come_back_and_the_same_message_is_made_again(name):
    back = through(EVERY[name](), tree())
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in tree().items()}
    one, two = (EVERY[name]().encode(tree(), SITE) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_zstd_loses_nothing():
    mixed = {**tree(), "codes": torch.arange(300, dtype=torch.int8), "half": torch.ones(3, dtype=torch.bfloat16)}
    back = through(zstd(), mixed)
    assert all(torch.equal(back[k], mixed[k]) and back[k].dtype == mixed[k].dtype for k in mixed)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block", [None, 16])
def test_rounding_to_the_nearest_errs_by_half_a_step_and_stochastic_by_less_than_one(bits, block):
    x = tree()["a.lora_A"]
    top = 2 ** (bits - 1) - 1
    steps = x.abs().max() / top
    nearest = through(quantize(bits, block_size=block, stochastic=False), {"x": x})["x"]
    drawn = through(quantize(bits, block_size=block), {"x": x})["x"]
    assert float((nearest - x).abs().max()) <= float(steps) / 2 * (1 + 1e-5)
    assert float((drawn - x).abs().max()) < float(steps) * (1 + 1e-5)
    assert not torch.equal(nearest, drawn)


@pytest.mark.parametrize("transform", [quantize(8), quantize(4), quantize(4, block_size=16), random_k(0.25)])
def test_what_comes_back_is_right_on_average(transform):
    x = tree()["bias"]
    tries = 4000
    mean = sum(
        transform.decode(transform.encode({"x": x}, Site(0, r, "c")), Site(0, r, "c"))["x"] for r in range(tries)
    )
    spread = float(x.abs().max()) * (2.0 if "random_k" in str(transform.encode) else 1 / 7)
    assert float((mean / tries - x).abs().max()) < 5 * spread / tries**0.5


def test_nearest_rounding_is_biased_so_the_test_above_can_fail():
    x = torch.tensor([1.0, 0.04])
    step = through(quantize(4, stochastic=False), {"x": x})["x"]
    assert float(step[1]) == 0


@given(st.lists(st.integers(-7, 7), max_size=40))
def test_two_numbers_in_a_byte(codes):
    given_codes = torch.tensor(codes, dtype=torch.int8)
    bytes_ = packed(given_codes)
    assert len(bytes_) == -(-len(codes) // 2)
    assert unpacked(bytes_)[: len(codes)].tolist() == codes


def test_top_k_keeps_the_largest_and_random_k_what_the_seed_says():
    x = {"x": torch.tensor([[0.1, -5.0, 0.0], [3.0, 0.2, -0.3]])}
    assert through(top_k(0.3), x)["x"].tolist() == [[0, -5, 0], [3, 0, 0]]
    some = through(random_k(0.5, unbiased=False), x)["x"]
    assert int((some != 0).sum()) <= 3
    assert torch.equal(some[some != 0], x["x"][some != 0])
    more = through(random_k(0.5), x)["x"]
    assert torch.allclose(more, some * 2)
    rounds = {tuple(through(random_k(0.5), x, Site(3, r, "c1"))["x"].flatten().tolist()) for r in range(8)}
    assert len(rounds) > 2


def test_nonzero_is_lossless_and_small_where_little_has_changed():
    draw = torch.Generator().manual_seed(1)
    few, many = torch.zeros(4096), torch.randn(40_000, generator=draw)
    few[torch.randperm(4096, generator=draw)[:30]] = torch.randn(30, generator=draw)
    large = torch.zeros(300, 300, dtype=torch.float64)
    large[299, 299] = -1e-300
    whole = {"few": few, "many": many, "large": large, "zero": torch.zeros(500), "tiny": torch.zeros(3)}
    back = through(nonzero(), whole)
    assert all(torch.equal(back[name], leaf) and back[name].dtype == leaf.dtype for name, leaf in whole.items())
    assert set(nonzero().encode({"many": many}, SITE)) == {"many"}, "it would not pay"
    frame = wire_bytes(nonzero(), {"few": torch.zeros(4096)})
    assert wire_bytes(nonzero(), {"few": few}) - frame == pytest.approx(30 * 6, abs=16)
    with pytest.raises(RunError, match="no places"):
        nonzero().decode({"x|nonzero": ONE, "x|shape": shape(4)}, SITE)


def test_low_rank_is_exact_for_matrices_of_that_rank_and_leaves_the_small_alone():
    draw = torch.Generator().manual_seed(1)
    thin = torch.randn(30, 2, generator=draw, dtype=torch.float64) @ torch.randn(
        2, 40, generator=draw, dtype=torch.float64
    )
    small = torch.randn(3, 3, generator=draw, dtype=torch.float64)
    back = through(low_rank(2), {"thin": thin, "small": small})
    assert torch.allclose(back["thin"], thin)
    assert torch.equal(back["small"], small)
    assert wire_bytes(low_rank(2), {"thin": thin}) < wire_bytes(cast("float16"), {"thin": thin.float()})


def test_bytes_are_what_was_promised():
    x = {"x": torch.randn(64, 256, generator=torch.Generator().manual_seed(0))}
    n = x["x"].numel()
    plain = wire.num_bytes("x", {}, t=x)
    frame = plain - 4 * n
    sizes = {name: wire_bytes(make(), x) for name, make in EVERY.items()}
    assert abs(sizes["float16"] - 2 * n - frame) < 64
    assert abs(sizes["int8"] - n - frame) < 256
    assert abs(sizes["int4"] - n / 2 - frame) < 256
    assert abs(sizes["int8_blocks"] - n - n / 16 * 4 - frame) < 256
    assert abs(sizes["top_k"] - 0.1 * n * 8 - frame) < 256
    assert abs(sizes["random_k"] - 0.1 * n * 4 - frame) < 256
    both = wire.num_bytes("x", {}, t=zstd().encode(quantize(4).encode(top_k(0.1).encode(x, SITE), SITE), SITE))
    assert both < sizes["top_k"] * 0.62


def shape(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int32)


CODES, ONE, TWO = torch.zeros(3, dtype=torch.int8), torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (quantize(8), {"x|q8": CODES, "x|scale": ONE}),
        (quantize(8), {"x|q8": CODES, "x|scale": ONE, "x|shape": shape(4)}),
        (quantize(4), {"x|q4": CODES.to(torch.uint8), "x|shape": shape(6)}),
        (top_k(0.1), {"x|top": TWO, "x|shape": shape(4)}),
        (top_k(0.1), {"x|top": ONE, "x|place": shape(4), "x|shape": shape(4)}),
        (top_k(0.1), {"x|top": ONE, "x|place": shape(-1), "x|shape": shape(4)}),
        (top_k(0.1), {"x|top": ONE, "x|place": shape(0), "x|shape": shape(2**20, 2**20)}),
        (random_k(0.5), {"x|some": torch.ones(5), "x|shape": shape(4)}),
        (low_rank(2), {"x|P": torch.ones(5, 2)}),
        (low_rank(2), {"x|P": torch.ones(5, 2), "x|R": torch.ones(5, 3)}),
        (zstd(), {"zstd": torch.zeros(9, dtype=torch.uint8)}),
        (zstd(), {"x": torch.zeros(9)}),
    ],
)
def test_messages_that_do_not_fit_are_refused(transform, message):
    with pytest.raises(RunError):
        transform.decode(message, SITE)


COMPRESS = (top_k(0.05), quantize(8), zstd())


def composed(**more):
    update = sgd_client(sgd(0.3))
    return fedavg(error_feedback(update, COMPRESS), compress=COMPRESS, **more)


@pytest.mark.parametrize("down", [(), (quantize(8), zstd()), (cast("bfloat16"),)])
def test_every_runtime_gives_the_same_with_compression_both_ways(down):
    algorithm = composed(downlink=down)

    def two(runtime):
        adapter = small_lora()
        state = initial_state(algorithm, adapter, 3)
        for _ in range(2):
            state, report = run_round(algorithm, adapter, runtime, state, clients())
            assert not report.failed, report.failed
        return state, report

    want, told = two(sequential())
    got, _ = two(batched(8))
    homes = {c.id: ClientSite(c.id, lambda: (algorithm, small_lora()), lambda round, c=c: c, {}) for c in clients()}
    far, far_told = two(loopback({i: home.serve for i, home in homes.items()}))
    # A number that lies between two steps may fall to either side after other rounding: one step of 8 bits at most.
    assert gap(want.params, got.params) < 1e-2
    assert gap(want.params, far.params) < 1e-2
    assert gap(want.params, initial_state(algorithm, small_lora(), 3).params) > 1e-2
    for client, row in told.clients.items():
        assert far_told.clients[client]["bytes_down"] == row["bytes_down"]
        assert far_told.clients[client]["bytes_up"] == pytest.approx(row["bytes_up"], rel=0.02)
    plain = fedavg(sgd_client(sgd(0.3)))
    adapter = small_lora()
    _, full = run_round(plain, adapter, sequential(), initial_state(plain, adapter, 3), clients())
    for client, row in told.clients.items():
        assert row["bytes_up"] < 0.4 * full.clients[client]["bytes_up"]
        assert not down or row["bytes_down"] < 0.7 * full.clients[client]["bytes_down"]


def test_error_feedback_remembers_exactly_what_was_not_seen():
    algorithm = composed()
    adapter = small_lora()
    state = initial_state(algorithm, adapter, 3)
    plain = fedavg(sgd_client(sgd(0.3)))
    one = [clients()[2]]
    moved, _ = run_round(algorithm, adapter, sequential(), state, one)
    whole, _ = run_round(plain, adapter, sequential(), state, one)
    error = {k.removeprefix("error/"): v for k, v in moved.personal["c2"].items()}
    seen = {k: moved.params[k] - state.params[k] for k in moved.params}
    meant = {k: whole.params[k] - state.params[k] for k in whole.params}
    assert gap({k: seen[k] + error[k] for k in seen}, meant) < 1e-6
    assert max(float(leaf.abs().max()) for leaf in error.values()) > 1e-4
    # The next message carries it: from the same start, with a client that learns nothing more.
    still = fedavg(error_feedback(sgd_client(sgd(0.0)), COMPRESS), compress=COMPRESS)
    held = dataclasses.replace(state, personal=moved.personal)
    later, _ = run_round(still, adapter, sequential(), held, one)
    assert gap(later.params, state.params) > 1e-4


def test_with_error_feedback_little_is_lost_over_the_rounds():
    """A mean of 20 rounds of one repeated update: with feedback the sum arrives, without most of it never does."""
    one = [clients()[2]]

    def distance(feedback: bool) -> float:
        keep = (top_k(0.05),)
        update = sgd_client(sgd(0.02))
        small = fedavg(error_feedback(update, keep) if feedback else update, compress=keep)
        plain = fedavg(update)
        adapter = small_lora()
        a = b = initial_state(plain, adapter, 3)
        for _ in range(12):
            a, _ = run_round(small, adapter, sequential(), a, one)
            b, _ = run_round(plain, adapter, sequential(), b, one)
        return sum(float((a.params[k] - b.params[k]).square().sum()) for k in a.params) ** 0.5

    assert distance(True) < 0.7 * distance(False)


def test_rules_that_need_exact_factors_refuse_a_lossy_broadcast():
    with pytest.raises(UserError, match="flora needs the very factors"):
        fedavg(aggregate=flora(2.0), downlink=(quantize(8),))


TEXT = "model: builtin\nlocal_steps: 1\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress.up=[zstd, quantize]"], "in this order: [quantize, zstd]"),
        (["compress.up=[float16, quantize]"], "float16, quantize: one of them is enough"),
        (["compress.bits=4"], "compress.bits 4: would have no effect, it is a setting of quantize"),
        (["compress.up=[zstd]", "compress.error_feedback=true"], "nothing is lost on the way up"),
        (["compress.down=[top_k]"], "expected"),
        (["compress.up=[top_k]", "adapter.client_ranks=normal"], "has no fixed size"),
    ],
)
def test_recipes_are_told_what_has_no_effect(words, said):
    with pytest.raises(UserError) as caught:
        validate_text(TEXT, words)
    assert said in str(caught.value)


def test_a_recipe_composes_them():
    recipe, _ = validate_text(
        TEXT, ["compress.up=[top_k, quantize, zstd]", "compress.down=[quantize]", "compress.bits=4"]
    )
    assert recipe.compress.error_feedback is True
    assert recipe.compress.share == 0.1
    made = algorithm_of(recipe)
    assert (len(made.compress), len(made.downlink)) == (3, 1)
    plain, _ = validate_text(TEXT)
    assert algorithm_of(plain).compress == ()
    assert validate_text(TEXT, ["compress.up=[quantize]"])[0].compress.error_feedback is False
