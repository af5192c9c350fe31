"""Does the gradient get through the frozen model? Looked at in the first local step of every round, for every base.

A layer may take a faster way where it believes that nobody wants gradients, and give an output that no longer hangs on
its input. The loss looks as it should then, and nothing raises: parameters below the layer have no gradient, or, where
an adapter leads around the layer, a wrong one. bitsandbytes' 4 bit layers do so on CPUs with AVX-512 once they have
run without a graph (they repack their weights), and an evaluation before training is enough for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import RunError

__all__ = ["NO_GRADIENT", "no_gradient", "whole_graph"]

NO_GRADIENT = "client.no_gradient"  # code of the errors


@contextlib.contextmanager
def whole_graph(model: nn.Module) -> Iterator[None]:
    """Within it a layer of `model` whose output does not hang on an input that has a gradient is an error.

    Looked at are the modules that have a weight and no parts: the frozen products, lookups and norms themselves, before
    what an adapter's hooks add to their outputs. It costs one Python call per layer and pass.

    Raises:
        RunError: of code `NO_GRADIENT`, with the layer's name.
    """
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if getattr(module, "weight", None) is not None and next(module.children(), None) is None:
                stack.callback(module.register_forward_hook(_look(name), prepend=True).remove)
        yield


def _look(name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if wanted and isinstance(out, Tensor) and not out.requires_grad:
            raise RunError(
                f"no gradient passes {name} ({type(module).__name__}): its output does not hang on its input, so what "
                "is trained below it would have no gradient or a wrong one",
                hint="a quantised layer gives such outputs once its weights were repacked for inference: load the base "
                "with fedloom (quantization: nf4), or leave it unquantised (quantization: none)",
                code=NO_GRADIENT,
            )

    return hook


def no_gradient(missing: list[str], number: int) -> RunError:
    """What is raised where some of `number` trained parameters have no gradient."""
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    which = "the loss hangs on no trained parameter" if len(missing) == number else "the loss does not hang on them"
    return RunError(
        f"{len(missing)} of {number} trained parameters get no gradient ({', '.join(missing[:4])}{more}): {which}, so "
        "the steps would leave them as they are without another sign",
        hint="are they on layers that the model does not use (adapter.lora_target_modules)? A quantised layer loses "
        "the gradient once its weights were repacked for inference: quantization: none leaves the base as it is",
        code=NO_GRADIENT,
    )
