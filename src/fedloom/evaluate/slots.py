"""Keys and values of rows that are written on, in memory that is set aside ahead.

Every row stands in a slot, and all rows end in the same column, so that a step of decoding adds one column at one
place and reads a view: nothing is copied as texts grow. A row's keys and values are one unbroken stretch, what an
adapter puts before the text included. Rows that begin later are masked on the left; a sliding window is a matter of the
mask, too.

Shape suffixes: N slots, M rows of another cache, G key-value heads, S columns, E size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Slots", "unfit"]

SPARE = 64  # columns set aside beyond those in use, at least


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values [N, G, S, E], the first `length` columns of them in use."""

    is_croppable = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self, sliding: bool) -> None:
        super().__init__()
        self.is_sliding = sliding
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = _columns(key_states, SPARE), _columns(value_states, SPARE)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = _columns(key_states, end), _columns(value_states, end)
            self.is_initialized = True
        elif end > self.keys.shape[2]:
            wider = max(end + SPARE, end * 3 // 2)
            self.keys, self.values = (_widened(leaf, self.length, wider) for leaf in (self.keys, self.values))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class Slots(Cache):  # type: ignore[misc]
    """A cache for a model of this config; see the top of the file.

    `managed` tells adapters that what they put before the text is in here already, where it belongs.
    """

    def __init__(self, config: Any) -> None:
        kinds = DynamicCache(config=config).layers
        super().__init__(layers=[SlotLayer(isinstance(one, DynamicSlidingWindowLayer)) for one in kinds])

    @property
    def length(self) -> int:
        """Columns in use."""
        return int(self.layers[0].length)

    @property
    def managed(self) -> bool:
        return self.length > 0

    def copied(self, rows: Sequence[int], spare: int) -> Slots:
        """A new cache that begins with these rows, each as often as it is named, and has `spare` columns more."""
        made = _like(self)
        for new, old in zip(made.layers, self.layers, strict=True):
            index = torch.tensor(rows, device=old.keys.device)
            new.keys, new.values = (
                _widened(leaf[:, :, : old.length].index_select(0, index), old.length, old.length + spare)
                for leaf in (old.keys, old.values)
            )
            new.length, new.is_initialized = old.length, True
        return made

    def moved(
        self, kept: Sequence[int], places: Sequence[int], slots: int, columns: int, spare: int, others: Sequence[Other]
    ) -> Slots:
        """These slots rearranged: a new cache of so many slots that all end in column `columns`.

        What is no row's is zero: masked values are multiplied by nothing, and must be numbers all the same. The old
        cache is taken apart on the way, so that there is never more than one layer twice.

        Args:
            kept: slots to keep.
            places: where each of them goes.
            spare: columns set aside beyond.
            others: rows of other caches that come in.
        """
        made = _like(self)
        for index, new in enumerate(made.layers):
            old = self.layers[index]
            template = old if old.keys is not None else others[0].cache.layers[index]
            whole = []
            for name in ("keys", "values"):
                like = getattr(template, name)
                leaf_NGSE = like.new_zeros(slots, like.shape[1], columns + spare, like.shape[3])
                if kept:
                    width = min(self.length if index == 0 else old.length, columns)
                    taken = getattr(old, name)[:, :, old.length - width : old.length]
                    taken = taken if list(kept) == list(range(len(taken))) else taken[list(kept)]
                    _put(leaf_NGSE, places, columns - width, columns, taken)
                for other in others:
                    taken = getattr(other.cache.layers[index], name)
                    taken = _aligned(taken[other.rows, :, : other.longest], other.lengths)
                    _put(leaf_NGSE, other.places, columns - other.longest, columns, taken)
                whole.append(leaf_NGSE)
            for gone in (old, *(other.cache.layers[index] for other in others)):
                gone.keys = gone.values = None
            new.keys, new.values = whole
            new.length, new.is_initialized = columns, True
        return made


class Other:
    """Rows of another cache, there padded on the right: which ones, how long each is, and where they go."""

    def __init__(self, cache: Slots, rows: Sequence[int], lengths: Sequence[int], places: Sequence[int]) -> None:
        self.cache, self.rows, self.lengths, self.places = cache, list(rows), list(lengths), list(places)
        self.longest = max(lengths)


def unfit(config: Any) -> str | None:
    """Why a model of this config keeps something else than keys and values of each token; None where it does not."""
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # a config that says nothing of the kind
        return f"its config does not say what it keeps ({type(error).__name__})"
    if not layers:
        return "its config does not say what it keeps"
    strange = {type(one).__name__ for one in layers if type(one) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    return f"it keeps {', '.join(sorted(strange))}" if strange else None


def _like(cache: Slots) -> Slots:
    made = Slots.__new__(Slots)
    Cache.__init__(made, layers=[SlotLayer(one.is_sliding) for one in cache.layers])
    return made


def _columns(like: Tensor, columns: int) -> Tensor:
    return like.new_zeros(*like.shape[:2], columns, like.shape[3])


def _widened(leaf_NGSE: Tensor, length: int, columns: int) -> Tensor:
    wide = _columns(leaf_NGSE, columns)
    wide[:, :, :length] = leaf_NGSE[:, :, :length]
    return wide


def _put(leaf_NGSE: Tensor, places: Sequence[int], start: int, end: int, taken_MGSE: Tensor) -> None:
    first = places[0]
    if list(places) == list(range(first, first + len(places))):  # a stretch of slots is a view
        leaf_NGSE[first : first + len(places), :, start:end] = taken_MGSE
    else:
        leaf_NGSE[torch.tensor(places, device=leaf_NGSE.device), :, start:end] = taken_MGSE


def _aligned(leaf_MGSE: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows that begin in the first column -> rows that end in the last one; what is before them is anything."""
    m, g, s, e = leaf_MGSE.shape
    if min(lengths) == s:
        return leaf_MGSE
    late_M1 = s - torch.tensor(lengths, device=leaf_MGSE.device)[:, None]
    from_MS = (torch.arange(s, device=leaf_MGSE.device) - late_M1).clamp(min=0)
    return leaf_MGSE.gather(2, from_MS[:, None, :, None].expand(m, g, s, e))
