"""LoRA's product with a cohort axis: the plain one against its definition, Triton's kernels against the plain one.

The kernels run on a GPU where there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
from tests.small import batch, llama
from torch import Tensor

from fedloom.adapters import dora, lora, with_triton
from fedloom.errors import UserError
from fedloom.ops import cohort_lora
from fedloom.runtimes.cohort import collate
from fedloom.study.recipe import Recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where kernels are defined; Triton's own are by now
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (there is none for this system)"
)
# clients, rows, in-features, out-features, rank: less than a block, blocks and a rest, one row, several blocks of each
SHAPES = [(1, 5, 7, 9, 3), (3, 37, 70, 66, 8), (2, 1, 64, 64, 17)]
HALVES = [torch.bfloat16, torch.float16]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, y, A, B, scale and what comes back to the output. A's last rank is padding in the last client."""
    c, n, d, o, r = shape
    draw = torch.Generator().manual_seed(0)
    x, y, up, a, b, scale = (
        torch.randn(size, generator=draw, dtype=torch.float64)
        for size in ((c, n, d), (c, n, o), (c, n, o), (c, r, d), (c, o, r), (c,))
    )
    wide = dtype if dtype == torch.float64 else torch.float32
    a, b = a / d**0.5, b.clone()
    a[-1, -1], b[-1, :, -1] = 0, 0
    return [
        leaf.to(DEVICE) for leaf in (x.to(dtype), y.to(dtype), a.to(wide), b.to(wide), scale.to(wide), up.to(dtype))
    ]


def run(product: Any, given: list[Tensor], needed: str = "xyabs") -> list[Tensor]:
    """The output, and the gradients of those that are needed."""
    leaves = [leaf.detach().clone().requires_grad_(one in needed) for one, leaf in zip("xyabs", given[:5], strict=True)]
    out = product(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, wanted, given[5]) if wanted else ())]


def one_by_one(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([y[i] + scale[i] * (x[i] @ a[i].T) @ b[i].T for i in range(len(x))])


def distance(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_product_is_what_it_is_defined_as(shape: tuple[int, ...]) -> None:
    given = inputs(shape, torch.float64)
    for mine, theirs in zip(run(cohort_lora.plain, given), run(one_by_one, given), strict=True):
        assert distance(mine, theirs) < 1e-14


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_give_the_plain_product_and_gradients(shape: tuple[int, ...]) -> None:
    given = inputs(shape)
    for mine, theirs in zip(run(cohort_lora.fused, given), run(cohort_lora.plain, given), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert distance(mine, theirs) < 1e-6


@needs_triton
@pytest.mark.parametrize("dtype", HALVES)
def test_in_half_precision_they_are_as_near_to_the_truth_as_the_plain_ones(dtype: torch.dtype) -> None:
    given = inputs((2, 19, 33, 40, 4), dtype)
    exact = run(one_by_one, [leaf.double() for leaf in given])
    found = zip(run(cohort_lora.fused, given), run(cohort_lora.plain, given), exact, strict=True)
    for mine, theirs, truth in found:
        assert mine.dtype == theirs.dtype
        # the interpreter cuts bfloat16 off where a GPU rounds
        assert distance(mine, truth) < (0.03 if dtype == torch.bfloat16 else 2 * distance(theirs, truth) + 1e-7)


@needs_triton
@pytest.mark.parametrize("needed", ["", "ab", "b", "a", "x", "xab", "s"])
def test_each_gradient_is_the_same_whichever_others_are_asked_for(needed: str) -> None:
    given = inputs((2, 9, 20, 24, 4))
    whole = dict(zip("oxyabs", run(cohort_lora.fused, given), strict=True))
    for one, leaf in zip(
        ["o", *(one for one in "xyabs" if one in needed)], run(cohort_lora.fused, given, needed), strict=True
    ):
        assert torch.equal(leaf, whole[one])


@needs_triton
def test_memory_layouts_do_not_matter() -> None:
    given = inputs((2, 9, 20, 24, 4))
    turned = [leaf.mT.contiguous().mT for leaf in given[:4]] + [given[4], given[5][:, :1].expand_as(given[5])]
    straight = [leaf.contiguous() for leaf in turned]
    for mine, theirs in zip(run(cohort_lora.fused, turned), run(cohort_lora.fused, straight), strict=True):
        assert torch.equal(mine, theirs)


@needs_triton
def test_rows_of_one_type_added_to_another() -> None:
    """Some quantised layers give float32 for half-precision inputs."""
    given = inputs((2, 9, 20, 24, 4))
    given[0] = given[0].half()
    mine = run(cohort_lora.fused, given)
    theirs = run(one_by_one, [leaf.double() for leaf in given])
    assert [leaf.dtype for leaf in mine[:2]] == [torch.float32, torch.float16]
    assert all(distance(*pair) < 2e-3 for pair in zip(mine, theirs, strict=True))


@needs_triton
def test_how_the_features_are_shared_out_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloom.ops import cohort_lora_triton

    given = inputs((1, 5, 20, 130, 8))
    whole = run(cohort_lora.fused, given)
    monkeypatch.setattr(cohort_lora_triton, "_span", lambda m, programs, device: 64)
    assert all(torch.equal(*pair) for pair in zip(run(cohort_lora.fused, given), whole, strict=True))


@needs_triton
def test_a_client_of_lower_rank_is_as_if_it_were_alone() -> None:
    """Zero padding: the padded rank's B and A get no gradient, and everything else is that of the own rank."""
    given = inputs((2, 9, 20, 24, 4))
    _, dx, _, da, db, _ = run(cohort_lora.fused, given)
    x, y, a, b, scale, up = (leaf[-1:] for leaf in given)
    _, own_dx, _, own_da, own_db, _ = run(cohort_lora.fused, [x, y, a[:, :-1], b[..., :-1], scale, up])
    assert not da[-1, -1].any() and not db[-1, :, -1].any()
    assert torch.equal(dx[-1:], own_dx) and torch.equal(da[-1:, :-1], own_da) and torch.equal(db[-1:, :, :-1], own_db)


@needs_triton
def test_a_whole_adapter_has_the_same_losses_and_gradients() -> None:
    def gradients(triton: bool) -> tuple[Tensor, list[Tensor]]:
        adapter = lora(llama(layers=1, dtype=torch.float32).to(DEVICE), rank=4, alpha=8.0, targets=["q_proj", "v_proj"])
        chosen: Any = with_triton(adapter) if triton else adapter
        draw = torch.Generator().manual_seed(5)
        tree_C = {
            name: (leaf + 0.1 * torch.randn(3, *leaf.shape, generator=draw).to(DEVICE)).requires_grad_()
            for name, leaf in adapter.init(1).items()
        }
        loss_C = chosen.loss(tree_C, collate([batch(i) for i in range(3)], [0, 1, 2], torch.device(DEVICE)))
        return loss_C.detach(), list(torch.autograd.grad(loss_C.sum(), list(tree_C.values())))

    (loss_C, mine), (plain_C, theirs) = gradients(True), gradients(False)
    assert torch.allclose(loss_C, plain_C, rtol=1e-6)
    assert all(distance(*pair) < 1e-5 for pair in zip(mine, theirs, strict=True))


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the tests above have compiled them")
def test_the_kernels_compile_for_gpus_that_are_not_there() -> None:
    """The interpreter takes what the compiler does not. What is shared among threads must fit a consumer's GPU, too."""
    import triton.language as tl
    from triton import JITFunction, compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedloom.ops import cohort_lora_triton as ops

    types = dict.fromkeys(("w_in", "w_out", "scale", "out"), "*fp32")
    types |= dict.fromkeys(("x", "add", "kept", "made", "waist"), "*bf16")
    unit = ("x_k", "in_k", "out_r", "add_m", "kept_r", "made_m", "waist_r")  # strides that are 1
    for interpreted, more in ((ops._through, {"ADD": True, "KEEP": True}), (ops._summed, {})):
        kernel = JITFunction(interpreted.fn)
        names = kernel.arg_names
        fixed = {"RANK": 16, "ROWS": 16, "COLUMNS": 32, "PRECISION": "ieee", "DOT": tl.bfloat16, **more}
        fixed |= {name: 1 for name in names if name in unit}
        signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
        source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
        compiled = compile(source, target=GPUTarget("cuda", 80, 32))
        assert "mma.sync" in compiled.asm["ptx"]  # tensor cores
        assert 0 < compiled.metadata.shared <= 101_376


# ---- where they are refused ------------------------------------------------------------------------------------------


@needs_triton
def test_what_has_no_such_product_is_refused() -> None:
    for made, said in (
        (dora(llama(1, torch.float32), rank=2), "not dora"),
        (lora(llama(1, torch.float32), rank=200), "ranks up to 128, and there is one of 200"),
        (lora(llama(1), rank=2), "no float64"),
    ):
        with pytest.raises(UserError, match=said):
            with_triton(made)


def test_without_a_gpu_or_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="needs a GPU, and the model is on cpu") as caught:
        with_triton(lora(llama(1, torch.float32), rank=2))
    assert caught.value.hint == "runtime.lora_kernel: plain"
    assert cohort_lora.why_not_fused("cuda") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(cohort_lora.why_not_fused("cuda"))


def test_a_recipe_without_lora_is_refused() -> None:
    given = {"model": "builtin", "data": {"path": "builtin:skills"}, "local_steps": 1, "adapter": {"kind": "ia3"}}
    with pytest.raises(ValueError, match=r"would have no effect: adapter.kind is ia3"):
        Recipe.model_validate({**given, "runtime": {"lora_kernel": "triton"}})
