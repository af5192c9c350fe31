"""Hidden states of rows of tokens, computed for as few positions as give them exactly.

Three things are left out of the plain pass over padded rows: padding and whatever follows the last position that is
asked about; the common beginning of a client's rows, which is computed once; and, in the last block, the positions
that nobody asks about. What pays is told from sizes. Whether a model allows it is tried on a few tokens, the first time
that it would pay; a model whose attention goes other ways keeps padded rows, and the log says so.

Shape suffixes: N = C * B rows, C clients, T tokens, M positions asked about, D hidden size, S positions computed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fedloom.models.frozen import FrozenBlocks
from fedloom.ops import packing
from fedloom.ops.packing import Caught, Ints, Layout, pack, pick, pick_of
from fedloom.ops.shapes import HALF, rounded

log = logging.getLogger("fedloom")

WORKS_WITH = ("sdpa", "eager", "fedloom_cpu")  # attentions that take padded rows
# What packing costs and gains, in seconds, roughly: only the choice between equal ways hangs on it.
CPU_FLOPS, CPU_HALF_FLOPS, GPU_FLOPS = 4e10, 1e11, 2e14  # per second, norms and all that is no product included
PER_BLOCK_SECONDS = 2e-4  # gathers, forward and backward
PER_PASS_SECONDS = 1e-3  # the layout
PER_BLOCK_PASS_SECONDS = 3e-3  # a block's own operations, however few its tokens are


class Rows:
    """How rows go through one model's body.

    Attributes:
        way: "auto" does what pays; "padded" is the plain reference; "packed" packs where the model allows it.
        shares: a common beginning of a client's rows is computed once.
        narrows: the last block works on the positions asked about only.
    """

    way: Literal["auto", "padded", "packed"] = "auto"
    shares = narrows = True

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        self.model, self.body = model, body
        self._blocks = _blocks(model, body)
        self._parameters = sum(p.numel() for block in self._blocks for p in block.parameters())
        self._can_pack: bool | None = None  # None: not tried yet
        self._can_narrow = False
        self.frozen: FrozenBlocks | None = None
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self._device, self._dtype = weight.device, weight.dtype

    def keep_below(self, frozen: FrozenBlocks) -> None:
        """Take the output of the lowest blocks from what was kept of each row."""
        self.frozen = frozen
        self._parameters = sum(p.numel() for block in self._blocks[len(frozen.below) :] for p in block.parameters())

    def hidden(self, ids_NT: Tensor, row_M: Tensor, position_M: Tensor, clients: int) -> Tensor:
        """Hidden states [M, D] at these positions of rows padded on the right, clients outermost among the rows."""
        layout = None
        if self.way != "padded" and len(row_M) and self._blocks and ids_NT.device.type != "meta":
            rows, positions = row_M.cpu().numpy(), position_M.cpu().numpy()
            layout = self._layout(ids_NT, rows, positions, clients)
        if layout is None:
            t = ids_NT.shape[1]
            most = positions_of(self.model)
            if most is None or self._size(t) <= most:
                ids_NT = F.pad(ids_NT, (0, self._size(t) - t))
            with self._kept_below(None, ids_NT, row_M, position_M):
                hidden_NTD: Tensor = self.body(input_ids=ids_NT, use_cache=False)[0]
            return hidden_NTD.flatten(0, 1).index_select(0, row_M * ids_NT.shape[1] + position_M)
        with self._kept_below(layout, ids_NT, row_M, position_M):
            return self._run(layout, rows, positions, len(ids_NT), self.narrows and self._can_narrow)

    def _kept_below(
        self, layout: Layout | None, ids_NT: Tensor, row_M: Tensor, position_M: Tensor
    ) -> contextlib.AbstractContextManager[None]:
        frozen = self.frozen
        if frozen is None or not len(row_M):
            return contextlib.nullcontext()
        need_N = torch.zeros(len(ids_NT), dtype=torch.int64, device=ids_NT.device)
        need_N.scatter_reduce_(0, row_M, position_M + 1, "amax")
        rows = [(n, need) for n, need in enumerate(need_N.tolist()) if need]
        states = [frozen.states(ids_NT[n, :need]) for n, need in rows]

        def fill(hidden: Tensor) -> Tensor:
            out = torch.zeros_like(hidden)  # nobody looks at padding
            if layout is None:
                for (n, need), states_TD in zip(rows, states, strict=True):
                    out[n, :need] = states_TD
                return out
            per = len(ids_NT) // len(layout.ids_CP)
            numbers = (layout.sequence_R * per + layout.row_R).tolist()
            slots = dict(zip(numbers, layout.slot_RT, strict=True))
            for (n, need), states_TD in zip(rows, states, strict=True):
                slot_T = slots[n][:need]
                out[n // per, torch.from_numpy(slot_T).to(out.device)] = states_TD
            return out

        return frozen.replaced(fill)

    def apart(self, labels_CBT: Tensor) -> bool:
        """Whether clients had better go one after the other: what one pass would pad between them costs more."""
        if self.way == "padded" or self._can_pack is False or len(labels_CBT) == 1 or labels_CBT.device.type == "meta":
            return False
        labelled = labels_CBT.cpu().numpy() != -100
        t = labelled.shape[2]
        need_CB = np.where(labelled.any(2), t - 1 - labelled[:, :, ::-1].argmax(2), 0)
        tokens_C = need_CB.sum(1)
        saved = len(tokens_C) * int(tokens_C.max()) - int(tokens_C.sum())
        passes = (len(tokens_C) - 1) * (PER_PASS_SECONDS + PER_BLOCK_PASS_SECONDS * len(self._blocks))
        return self._seconds(saved) > passes

    # ---- which way -------------------------------------------------------------------------------------------------

    def _layout(self, ids_NT: Tensor, row_M: Ints, position_M: Ints, clients: int) -> Layout | None:
        n, t = ids_NT.shape
        need_N = np.zeros(n, dtype=np.int64)
        np.maximum.at(need_N, row_M, position_M + 1)
        forced = self.way == "packed"
        if self._can_pack is False or not (forced or self._pays(n * t - int(need_N.max()))):  # if all were shared
            return None
        ids_CBT = ids_NT.cpu().numpy().reshape(clients, -1, t)
        found = pack(
            ids_CBT, need_N.reshape(clients, -1), row_M, position_M, ids_NT.device,
            packing.LEAST_SHARED if self.shares else 0, self._size,
        )  # fmt: skip
        saved = n * t - found.ids_CP.numel()
        asked = found.wanted_CQ.size if self.narrows else found.ids_CP.numel()
        saved += (found.ids_CP.numel() - asked) // len(self._blocks)
        gathers = n > clients  # which cost some per cent of all tokens
        if not forced and not (self._pays(saved) and (saved > n * t / 32 or not gathers)):
            return None
        if self._can_pack is None:
            self._can_pack = self._try(clients, ids_NT.device)
        return found if self._can_pack else None

    def _size(self, size: int) -> int:
        return rounded(size, self._device, self._dtype)

    def _pays(self, saved_tokens: int) -> bool:
        return self._seconds(saved_tokens) > PER_PASS_SECONDS + PER_BLOCK_SECONDS * len(self._blocks)

    def _seconds(self, tokens: int) -> float:
        """What a forward and a backward pass of so many tokens cost: the weights are frozen, or nearly."""
        cpu = CPU_HALF_FLOPS if self._dtype in HALF else CPU_FLOPS
        return 4 * tokens * self._parameters / (cpu if self._device.type == "cpu" else GPU_FLOPS)

    @torch.no_grad()
    def _try(self, clients: int, device: torch.device) -> bool:
        """Whether two rows of each client come out as they do padded, with what is on the model now."""
        model: Any = self.model
        before = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if before is None or not getattr(model, "_can_set_attn_implementation", lambda: False)():
            return self._stays("it does not let its attention be chosen")
        name = str(before).removeprefix(packing.NAME)
        if name not in WORKS_WITH:
            return self._stays(f"its attention is {name}")
        tokens = min(7, int(model.config.vocab_size))
        ids = torch.arange(clients * 2 * 6).view(clients * 2, 6) % tokens
        ids[1::2, :3] = ids[::2, :3]  # a beginning that they share
        need = np.tile([6, 4], clients)
        rows = np.repeat(np.arange(2 * clients), need - 1)
        positions = np.concatenate([np.arange(1, n) for n in need])
        ids = ids.to(device)
        want = self.body(input_ids=ids, use_cache=False)[0][rows, positions].double()
        model.set_attn_implementation(packing.attend_in_rows(name))
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(next(model.parameters()).dtype, 5e-2)

        def problem(shared: int, narrow: bool) -> str:
            ids_CBT = ids.cpu().numpy().reshape(clients, 2, 6)
            layout = pack(ids_CBT, need.reshape(clients, 2), rows, positions, device, shared)
            try:
                got = self._run(layout, rows, positions, 2 * clients, narrow).double()
            except Exception as error:  # whatever a model's own code says to it
                return f"{type(error).__name__}: {error}"
            if layout.calls != len(self._blocks) + narrow:
                return "its attention does not go through transformers' interface"
            gap = float((got - want).abs().max())
            return "" if gap <= tolerance * (1 + float(want.abs().max())) else "its positions are not independent"

        wrong = problem(0, False) or problem(2, False)
        if wrong:
            model.set_attn_implementation(before)
            return self._stays(wrong)
        whole = problem(2, True)
        if whole:
            log.info("the last block of this model works on every position (more time): %s", whole)
        self._can_narrow = not whole
        return True

    def _stays(self, reason: str) -> bool:
        log.info("this model is run on padded rows (more time): %s", reason)
        return False

    # ---- the pass --------------------------------------------------------------------------------------------------

    def _run(self, layout: Layout, row_M: Ints, position_M: Ints, num_rows: int, narrow: bool) -> Tensor:
        (c, p), q = layout.ids_CP.shape, layout.wanted_CQ.shape[1]
        narrow = narrow and q < p
        with packing.on(layout), self._narrowed(layout) if narrow else contextlib.nullcontext():
            out = self.body(
                input_ids=layout.ids_CP,
                position_ids=layout.position_CP,
                attention_mask=torch.ones_like(layout.ids_CP),  # rows inside are not to be guessed from the positions
                use_cache=False,
            )[0]
        per = num_rows // c
        slot = np.full((c, per, layout.length), -1, dtype=np.int64)
        slot[layout.sequence_R, layout.row_R] = layout.slot_RT
        index = slot[row_M // per, row_M % per, position_M]
        width = p
        if narrow:
            width = q
            place = np.zeros((c, p), dtype=np.int64)
            client, nth = np.nonzero(layout.wanted_CQ >= 0)
            place[client, layout.wanted_CQ[client, nth]] = nth
            index = place[row_M // per, index]
        if out.shape[:2] != (c, width):
            raise RuntimeError(f"hidden states of {list(out.shape[:2])} where [{c}, {width}] went in")
        return pick(out.flatten(0, 1), pick_of(index + width * (row_M // per), c * width, out.device))

    @contextlib.contextmanager
    def _narrowed(self, layout: Layout) -> Iterator[None]:
        def before(block: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, Any]:
            forward: Any = block.forward
            layout.catching = True
            try:
                getattr(forward, "kept_whole", forward)(*args, **given)
            except Caught:
                pass
            finally:
                layout.catching = False
            if layout.kept is None:
                raise RuntimeError("its attention does not go through transformers' interface")
            which, p = layout.kept.picks.narrow, len(layout.kept.picks.narrow.back_S) // len(layout.ids_CP)

            def short(x: Any) -> Any:
                if not isinstance(x, Tensor) or x.ndim not in (2, 3) or x.shape[1] != p:
                    return x
                x = x.expand(len(layout.ids_CP), *x.shape[1:])
                return pick(x.reshape(-1, *x.shape[2:]), which).view(len(x), -1, *x.shape[2:])

            return tree_map(short, args), tree_map(short, given)

        handle = self._blocks[-1].register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def positions_of(model: nn.Module) -> int | None:
    """Positions that a text may take, an adapter's virtual tokens taken off; None where the model does not say."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    return positions - int(getattr(model, "num_virtual_tokens", 0))


def _blocks(model: nn.Module, body: nn.Module) -> list[nn.Module]:
    """The body's blocks; none where it has no single stack of them."""
    number = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return list(stacks[0]) if len(stacks) == 1 else []
