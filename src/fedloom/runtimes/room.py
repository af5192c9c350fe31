"""How many clients go through the model in one pass, and what happens where the memory does not hold so many."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["OUT_OF_MEMORY", "Room", "is_out_of_memory", "let_go"]

log = logging.getLogger("fedloom")

OUT_OF_MEMORY = "client.memory"  # code of the error of a block that did not fit

# What allocators say that have no exception of their own: PyTorch's on a CPU (Linux, Windows), on Apple's GPUs, CUDA's
# driver, cuBLAS.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass
class Room:
    """Clients in one pass. What was too many once stays too many: a run has one room, for all its arms and rounds."""

    width: int
    hear: Callable[[str], None] = log.warning

    def halve(self, clients: int) -> None:
        """So many did not fit."""
        self.width = max(1, clients // 2)
        self.hear(f"out of memory with {clients} clients in one pass: {self.width} from now on")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up; any other failure has to be seen."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def let_go() -> None:
    """Give back what a failed pass held, to be called when its exception is gone."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
