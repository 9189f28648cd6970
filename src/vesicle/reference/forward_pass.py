"""One forward pass of the model in the reference: whose tokens are where, and what is decided."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.families import find_cache
from vesicle.modulator import ModulatorMethod
from vesicle.plan import IntArray, PlanBuilder, Rows, check_rows, rest_head, resting_rows
from vesicle.plan.forgetting import forgetter_of
from vesicle.plan.rows import check_kept, of_attention
from vesicle.predictors import State
from vesicle.reference.continuity import Entries, check_mask
from vesicle.reference.memory import Memory
from vesicle.reference.soft_cost import SoftCost

if TYPE_CHECKING:
    from vesicle.reference.attach import Run


class ForwardPass:
    """State of one forward pass, shared by its layers' hooks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.positions = torch.zeros(0)  # (B, T)
        self.numpy_positions: list[IntArray] = []  # per sequence, padding left out
        self.rows: list[Rows] = []  # (T_i, L) per sequence, of this pass
        self.starts: list[int] = []
        self.offsets: tuple[int, ...] = ()
        self.memories: list[list[Memory] | None] = []  # of the layers of those that forget
        self.levels: Tensor | None = None  # (B, T, 5), soft mode, released by the previous layer
        self.state: State = {}
        self.dial = torch.ones(1)
        self.mask: Any = None  # attention mask as the model was given it
        self.cache: Any = None  # filled by this pass
        self.entries: Entries | None = None  # of the latest pass; None before it and inside one

    def install(self) -> list[Any]:
        """Hook the decoder as a whole, which is called once a pass."""
        decoder: Any = self.run.model.base_model
        place = list(inspect.signature(decoder.forward).parameters).index("attention_mask")

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.mask = args[place] if len(args) > place else kwargs.get("attention_mask")

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.end()

        return [
            decoder.register_forward_pre_hook(before, with_kwargs=True),
            decoder.register_forward_hook(after),
        ]

    def begin(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Find out where in its sequence each token is, and start sequences that are new."""
        run = self.run
        b, t = hidden.shape[:2]
        cache = find_cache(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(0))
        given = kwargs.get("position_ids")
        if given is None:
            given = torch.arange(past, past + t, device=hidden.device)[None]
        self.positions = given.expand(b, t)
        last = self.positions[:, -1].tolist()
        self.offsets = tuple(max(0, past + t - 1 - int(p)) for p in last)
        self.starts = [min(t, max(0, offset - past)) for offset in self.offsets]
        check_mask(self.mask, self.offsets, past, t)
        slots = torch.arange(past, past + t)
        for row, start, offset in zip(
            self.positions.tolist(), self.starts, self.offsets, strict=True
        ):
            if row[start:] != (slots[start:] - offset).tolist():
                raise VesicleError(
                    "positions do not rise by one; pad batches on the left, or not at all"
                )
        if any(self.starts):  # what padding is numbered differs between releases of transformers
            padding = torch.arange(t) < torch.tensor(self.starts)[:, None]
            self.positions = self.positions.masked_fill(padding.to(hidden.device), 0)
        if past == 0:
            run.authors = [] if run.soft else [run.method.author(run.shape) for _ in range(b)]
            run.builders = [PlanBuilder(run.shape) for _ in range(b)]
            if not run.soft:
                run.builders = [PlanBuilder(run.shape, a.evict_after) for a in run.authors]
            self.state = {}
            self.memories = [self.memory(i) for i in range(len(run.authors))]
        elif len(run.builders) != b:
            raise VesicleError(
                f"the batch had {len(run.builders)} sequences and now has {b}; "
                "start a new sequence while attached"
            )
        else:
            if self.entries is None:
                raise VesicleError(
                    "the pass before this one failed; start a new sequence while attached"
                )
            self.entries.check(cache, past)
        self.cache, self.entries = cache, None
        rows = self.positions.cpu().numpy().astype(np.int32)
        self.numpy_positions = [rows[i, s:] for i, s in enumerate(self.starts)]
        self.rows = [resting_rows(run.shape, p) for p in self.numpy_positions]
        for builder, table in zip(run.builders, self.rows, strict=True):
            if run.soft is None:
                builder.add(table)
        for author, offset in zip(run.authors, self.offsets, strict=run.soft is None):
            start, stop = max(0, past - offset), run.prompt_slots - offset
            author.prompt(start, stop)
            if author.forgetter is not None:
                author.forgetter.prompt(start, stop)
        if run.soft is not None:
            method = run.method
            assert isinstance(method, ModulatorMethod)
            self.dial = torch.full((b,), method.dial, device=hidden.device)
            self.levels = None
            run.soft_cost = SoftCost(run.shape, method.modulator, method.overhead(run.shape))
            run.soft_cost.head(self.positions)

    def end(self) -> None:
        """Note what the cache holds now, so that the next pass can tell whether it goes on."""
        self.entries = Entries(self.cache)
        self.mask = self.cache = None

    def attention(self, layer: int) -> list[Rows]:
        """Ask every author for a layer's attention; its rows (T_i,), per sequence."""
        for author, table, p in zip(self.run.authors, self.rows, self.numpy_positions, strict=True):
            if len(p):
                author.attention(layer, p, table[:, layer])
        return self.checked(layer)

    def ffn(self, layer: int, hidden: Tensor) -> list[Rows]:
        """Give every author its tokens' hidden states; the layer's rows (T_i,), per sequence."""
        for i, (author, table, p) in enumerate(
            zip(self.run.authors, self.rows, self.numpy_positions, strict=True)
        ):
            if len(p):
                own = hidden[i, self.starts[i] :].detach().cpu()
                before = of_attention(table[:, layer])
                author.ffn(layer, own, p, table[:, layer])
                check_kept(table[:, layer], before, layer)
        found = self.checked(layer)
        previews = self.run.method.stand_ins.head is not None
        for table in self.rows:
            rest_head(table, but="logits" if previews else "")
        return found

    def checked(self, layer: int) -> list[Rows]:
        """The rows of a layer, which may be executed."""
        run = self.run
        for author, table, p in zip(run.authors, self.rows, self.numpy_positions, strict=True):
            if len(p) and not author.bounded:
                check_rows(table[:, layer : layer + 1], run.shape, p, [layer])
        return [table[:, layer] for table in self.rows]

    def at_rest(self) -> bool:
        """Whether nothing differs by construction, so that the model may run as it is."""
        return all(author.rests for author in self.run.authors)

    def memory(self, i: int) -> list[Memory] | None:
        """What the layers of a new sequence will hold; None if it never forgets.

        Windowed layers have one that is never looked at: their window alone forgets.
        """
        author, note = self.run.authors[i], self.run.builders[i].forget
        forgetter, shape = forgetter_of(author), self.run.shape
        if forgetter is not None:
            none = np.zeros((0, shape.n_kv_heads), np.int32)
            decoder = self.run.decoder
            rotations = [None if i is None else decoder.rotaries[i] for i in decoder.rotary_layers]
            return [
                Memory(none, layer, forgetter, note, rotation)
                for layer, rotation in enumerate(rotations)
            ]
        if author.evict_after is None:
            return None
        return [Memory(author.evict_after[:, layer]) for layer in range(shape.n_layers)]

    def forgetting(self, layer: int) -> list[Memory | None] | None:
        """Each sequence's memory of a layer; None where this pass would see no difference."""
        if self.run.shape.layer_windows[layer]:
            return None
        found: list[Memory | None] = []
        for author, memory, p in zip(
            self.run.authors, self.memories, self.numpy_positions, strict=True
        ):
            known = author.evict_after
            late = known is not None and (not len(p) or known.min() >= p[-1])
            found.append(None if memory is None or late else memory[layer])
        return found if any(memory is not None for memory in found) else None

    def column(self, parts: list[IntArray], fill: int, device: torch.device) -> Tensor:
        """Per-sequence columns (T_i,) as one (B, T) tensor, `fill` on padding."""
        table = torch.full(self.positions.shape, fill, dtype=torch.long)
        for i, part in enumerate(parts):
            table[i, self.starts[i] :] = torch.from_numpy(np.ascontiguousarray(part))
        return table.to(device)
