"""One file per rule for what the sum of uploads means."""

from fedloom.aggregates.mean import mean

__all__ = ["mean"]
