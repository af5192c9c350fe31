"""One file per way to make a message smaller; both halves of each in one value.

A leaf `name` of what is sent becomes leaves `name|part`; what a transform does not touch passes as it is. Decoding is
linear in nothing and needs only the message and the site: seeds stand for what both sides can draw.
"""

from fedloom.compress.cast import cast
from fedloom.compress.low_rank import low_rank
from fedloom.compress.quantize import quantize
from fedloom.compress.sparsify import nonzero, random_k, top_k
from fedloom.compress.zstd import zstd

__all__ = ["cast", "low_rank", "nonzero", "quantize", "random_k", "top_k", "zstd"]
