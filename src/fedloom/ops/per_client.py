"""A weight of which each client has its own, put where a model has one weight for all.

A model's own code runs as it is; what it does with the weight (a product, a lookup, a scaling) is done for each client
with that client's part. Activations have the cohort outermost in their first axis, [C * B, ...]. Kinds of layers need
not be known: a linear layer, GPT-2's Conv1D, an embedding that scales, any norm. What cannot be told apart is refused.

Shape suffixes: C clients, N rows (C x B, or C x B x T flattened), D in-features, O out-features, V rows of a lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.errors import UserError

__all__ = ["PerClient", "per_client_weight"]


def per_client_weight(leaf_C: Tensor) -> PerClient:
    """A view of `leaf_C` [C, *shape] that acts as a weight of that shape; gradients go back to `leaf_C`."""
    made: PerClient = leaf_C.as_subclass(PerClient)
    return made


class PerClient(Tensor):
    """See `per_client_weight`. To whoever asks it has the shape of one client's weight."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(func, "__name__", str(func))
            if name == "__get__":  # a property: its own name is on the descriptor
                name = getattr(getattr(func, "__self__", None), "__name__", name)
                if name in ("shape", "ndim"):
                    return getattr(args[0][0], name)
                if name in ("mT", "T"):
                    return per_client_weight(raw(args[0]).mT)
                found = func(*args, **given)
                if not isinstance(found, Tensor):
                    return found
            elif name in _ABOUT_ONE:
                return getattr(raw(args[0])[0], name)(*args[1:], **given)
            elif name in _ABOUT_ALL:
                return func(*map(raw, args), **given)
            elif name in _SAME_SHAPE:
                return per_client_weight(func(*map(raw, args), **given))
            elif name in _PAIRWISE:
                return _pairwise(func, *args)
            elif func in _PRODUCTS:
                return _PRODUCTS[func](*args, **given)
        raise UserError(
            f"this model does something with its weights ({name}) that is not known for several clients at once",
            hint="runtime.clients_per_batch: 1 trains one client at a time, with any model",
            code="adapter.per_client",
        )


_ABOUT_ONE = {"size", "dim", "numel", "stride", "__len__"}
_ABOUT_ALL = {"is_floating_point", "is_complex", "get_device", "element_size", "is_contiguous", "data_ptr", "__hash__"}
_SAME_SHAPE = {"float", "double", "half", "bfloat16", "to", "type_as", "neg", "contiguous", "detach", "clone"}
_PAIRWISE = {
    "add", "sub", "mul", "div", "true_divide", "rsub", "__radd__", "__rmul__", "__rsub__", "__rtruediv__",
    "__add__", "__mul__", "__sub__", "__truediv__",
}  # fmt: skip


def raw(x: Any) -> Any:
    """The plain tensor [C, ...] behind a weight; anything else as it is."""
    return x.as_subclass(Tensor) if isinstance(x, PerClient) else x


def _pairwise(func: Callable[..., Any], a: Any, b: Any) -> Any:
    """Between a weight and a number or a constant: a weight again. Between a weight and activations: activations."""
    weight = a if isinstance(a, PerClient) else b
    other = b if weight is a else a
    c, ndim = raw(weight).shape[0], raw(weight).ndim - 1
    if not isinstance(other, Tensor) or isinstance(other, PerClient) or other.ndim <= ndim:
        return per_client_weight(func(raw(a), raw(b)))
    rows = other.reshape(c, -1, *other.shape[1:])
    mine = raw(weight)
    mine = mine.view(c, *[1] * (rows.ndim - mine.ndim), *mine.shape[1:])
    out: Tensor = func(mine, rows) if weight is a else func(rows, mine)
    return out.reshape(-1, *out.shape[2:])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, W [C, O, D] or one for all."""
    if not isinstance(weight, PerClient):
        out = F.linear(x, weight)
        return out if bias is None else _scaled_and_moved(out, None, bias)
    return _products(x, raw(weight).mT, bias)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """x W + b, W [C, D, O] or one for all: GPT-2's Conv1D."""
    if not isinstance(weight, PerClient):
        return _scaled_and_moved(x @ weight, None, bias)
    return _products(x, raw(weight), bias)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(x, PerClient) or not isinstance(weight, PerClient):
        raise UserError("a model multiplies its weights from the left", code="adapter.per_client")
    return _products(x, raw(weight), None)


def _products(x: Tensor, w_CDO: Tensor, bias: Tensor | None) -> Tensor:
    c = w_CDO.shape[0]
    x_CND = x.reshape(c, -1, x.shape[-1])
    if bias is None:
        out_CNO = torch.bmm(x_CND, w_CDO)
    elif isinstance(bias, PerClient):
        out_CNO = torch.baddbmm(raw(bias).unsqueeze(1), x_CND, w_CDO)
    else:
        out_CNO = torch.baddbmm(bias, x_CND, w_CDO)
    return out_CNO.reshape(*x.shape[:-1], w_CDO.shape[-1])


def _embedding(ids: Tensor, weight: PerClient, padding_idx: int | None = None, *more: Any, **given: Any) -> Tensor:
    """Rows of each client's own table. One row of ids for everyone (positions) gives a weight again."""
    w_CVD = raw(weight)
    c, v, _ = w_CVD.shape
    if ids.ndim == 1 or ids.shape[0] == 1:
        return per_client_weight(w_CVD[:, ids.reshape(-1)])
    first_C = v * torch.arange(c, device=ids.device)
    out = F.embedding(
        ids + first_C.repeat_interleave(ids.shape[0] // c).view(-1, *[1] * (ids.ndim - 1)), w_CVD.reshape(c * v, -1)
    )
    if padding_idx is None or padding_idx < 0 or not out.requires_grad:
        return out
    return torch.where((ids == padding_idx).unsqueeze(-1), out.detach(), out)  # torch gives that row no gradient


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _scaled_and_moved(F.layer_norm(x, shape, None, None, eps), weight, bias)


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _scaled_and_moved(F.rms_norm(x, shape, None, eps), weight, None)


def _scaled_and_moved(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = _pairwise(torch.mul, x, weight) if isinstance(weight, PerClient) else x * weight
    if bias is not None:
        x = _pairwise(torch.add, x, bias) if isinstance(bias, PerClient) else x + bias
    return x


_PRODUCTS: Mapping[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
