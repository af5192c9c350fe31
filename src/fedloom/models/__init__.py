"""Frozen base models: the built-in one, folders and hub ids, all through one strict loader."""

from __future__ import annotations

from fedloom.models.load import Base, load_base, load_tokenizer, random_base

__all__ = ["Base", "load_base", "load_tokenizer", "random_base"]
