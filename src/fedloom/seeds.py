"""Every random draw of a run starts here, so that results depend on neither order, nor runtime, nor interruption."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, round: int, client: str, purpose: str) -> int:
    """A 63-bit seed for one draw: the run's seed, the round, the client ("" for the server) and what it is for."""
    parts = f"{seed}|{round}|{len(client)}|{client}|{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(parts, digest_size=8).digest(), "big") >> 1


def generator(seed: int, round: int, client: str, purpose: str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(...)`; draw on the CPU and move, so that devices agree."""
    return torch.Generator().manual_seed(seed_of(seed, round, client, purpose))
