"""What the native core is handed of a sequence, and what it has recorded of its last tokens.

That lies here until somebody asks for it: adding it to the Plan token by token would take longer
than the arithmetic of a layer.
"""

from __future__ import annotations

import ctypes
import enum
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.effectors.rules import Ladder, Share
from vesicle.engine import core
from vesicle.engine.counters import Counters
from vesicle.engine.pool import summary_dtype
from vesicle.engine.previewed import PreviewedHead, address
from vesicle.engine.rotary import STRIDE, Rotary, RotaryTable
from vesicle.engine.small_codes import packed, written
from vesicle.errors import VesicleError
from vesicle.modulator import ModulatorAuthor
from vesicle.plan import BLOCK, FULL_BITS, ROW, check_rows, resting_rows
from vesicle.plan.rows import BY_NAME, OF_HEAD, PLACES
from vesicle.plan.windows import visible_blocks
from vesicle.predictors.linear import LinearPredictor
from vesicle.small_modules import LowRankMaps, SmallFfn, SmallModule
from vesicle.transmitters import NAMES, index

if TYPE_CHECKING:
    from vesicle.engine.sequence import Sequence

_COUNTED = ("rows", "outputs", "visited", "compared", "summed", "small", "coded")
_ROWS = core.MOST_TOKENS
"""Tokens that a buffer records before they are added to the Plan: as many as a pass may take."""
_MOST_STEPS = 8
"""Steps of a ladder that the core takes."""
_BITS = 1 << np.arange(len(NAMES))
_EXECUTED = ("channels", "bits", "ffn", "attention", "kv_blocks", *OF_HEAD)
"""Fields that the core executes; tokens below rest in another one run in PyTorch."""
OTHERS = [name for name in BY_NAME if name not in _EXECUTED]
"""Fields that it does not."""


class Decides(enum.Enum):
    """Who decides about the next tokens."""

    BEFORE = "planned beforehand"
    CORE = "released by the core"
    ASKED = "the author, layer by layer"


class ChunkBuffer:
    """What one sequence hands to the core, and what the core has recorded of its last tokens.

    Attributes:
        used: Tokens recorded, which are in no Plan yet.
        flying: Whether a pass over the sequence is under way.
        blocked: How many of the next tokens are known, and beyond what the core executes.
    """

    def __init__(self, sequence: Sequence) -> None:
        """For a sequence whose author the core covers."""
        shape = sequence.engine.shape
        layers, sites = shape.n_layers, 4
        self._shape = shape
        self.plan = np.zeros((_ROWS, layers), ROW)
        # What the structures point to is held here, for as long as they point to it.
        self._small: list[Tensor] = []
        self._small_places: list[object] | None = None
        self._rotations: list[RotaryTable] = []
        self._predictor: list[Tensor] = []
        self._predictor_places: _Places | None = None
        self.levels = np.ones((_ROWS, layers, len(NAMES)))
        self.rows = np.zeros((_ROWS, layers, sites), np.int64)
        self.outputs = np.zeros((_ROWS, layers, sites), np.int64)
        self.visited = np.zeros((_ROWS, layers), np.int64)
        self.compared = np.zeros((_ROWS, layers), np.int64)
        self.summed = np.zeros((_ROWS, layers), np.int64)
        self.small = np.zeros(_ROWS, np.int64)
        self.coded = np.zeros(_ROWS, np.int64)
        self.heads = np.zeros(_ROWS, np.int64)
        self.used = self._planned = 0
        self._chooses = 0  # up to which of its rows blocks may be chosen, where they are known
        self.released = np.zeros(_ROWS, bool)
        self._ids = np.zeros(_ROWS, np.int32)
        self._acting = np.zeros(_ROWS, np.int64)
        self._summaries = np.zeros(layers, np.uint64)
        self._summarised: tuple[int, int] | None = None
        self._left = np.zeros(layers, np.int64)  # as the cache's, when summaries were made
        self._room: Tensor | None = None  # (L, G, groups of 16, V, K, 16) summaries, turned
        self._tables: object = None
        self.chunk = core.Chunk(ids=self._ids.ctypes.data, acting=self._acting.ctypes.data)
        for name in (*_COUNTED, "plan", "levels"):
            setattr(self.chunk, name, getattr(self, name).ctypes.data)
        self._small_ffn: core.Small | None = None
        self._small_attention: core.Small | None = None
        self._modulator: core.ModulatorParts | None = None
        self._least = 2
        self._decides = Decides.BEFORE
        self._follows: bool | None = None
        self.flying = False
        self.blocked = 0
        self.chunk.vectors = sequence.overhead.selection_vectors
        self.chunk.nearest = sequence.stand_ins.nearest
        self._spread = np.array(sequence.stand_ins.spread, np.int32)
        if self._spread.size:
            self.chunk.spread = self._spread.ctypes.data
        self._preview: PreviewedHead | None = None

    def follow_preview(self, sequence: Sequence) -> None:
        """Point to what previews the head, unless nothing is ever left out."""
        preview, author = sequence.stand_ins.head, sequence.author
        if preview is None or author.rests:
            return
        made = sequence.engine.previews.of(preview)
        if made is not self._preview:
            self._preview, self.chunk.preview = made, address(made)

    def follows(self, author: ModulatorAuthor, packed: bool) -> bool:
        """Whether the core evaluates all rules of an author, which do not change."""
        if self._follows is None:
            ladders = [rule for rule in author.rules if isinstance(rule, Ladder)]
            bits = [rule for rule in ladders if rule.field == "bits"]
            values = {value for rule in bits for _, value in (*rule.steps, (0, rule.below))}
            self._follows = (
                not any(rule.field in OTHERS for rule in author.rules)
                and all(len(ladder.steps) <= _MOST_STEPS for ladder in ladders)
                and (packed or values <= {FULL_BITS})
            )
        return self._follows

    def room(self, sequence: Sequence) -> int:
        """How many of the next tokens it has rows for; 0 where nothing is known of the next one."""
        if self.used == self._planned:
            self.flush(sequence)
            self._plan_ahead(sequence)
        return self._planned - self.used

    def turn(self, sequence: Sequence, decides: Decides) -> None:
        """Say who decides about the next tokens."""
        if decides is self._decides:
            return
        self.flush(sequence)
        self._decides = decides
        self.chunk.modulator = _where(self._modulator) if decides is Decides.CORE else None

    @property
    def asks(self) -> bool:
        """Whether the author is asked layer by layer."""
        return self._decides is Decides.ASKED

    def follow_small(
        self,
        sequence: Sequence,
        executes: Callable[[SmallModule | None, bool], bool],
        describe: Callable[[SmallModule | None], core.Small | None],
    ) -> bool:
        """Point to where small modules lie now: they may have been replaced, or moved and back.

        Args:
            sequence: Whose buffer this is.
            executes: Whether the core computes a module in place of an FFN, or else of attention.
            describe: Gives the structure of a module.

        Returns:
            Whether the core executes them.
        """
        stand_ins = sequence.stand_ins
        both = stand_ins.ffn, stand_ins.attention
        now = [p for module in both for p in parts_of(module)]
        # What `executes` looks at, too: an FFN's activation may be set anew.
        looked_at = "activation", "gated", "bits"
        kinds = [(type(m), *(getattr(m, name, 0) for name in looked_at)) for m in both]
        # Codes are a copy, which does not follow what is written to the weights.
        coded = [written(m) for m in both if isinstance(m, SmallFfn) and m.coded]
        places = [*kinds, *coded, len(parts_of(both[0])), *_places(now)]
        if places == self._small_places:
            return True
        self._small_places = None
        if not executes(both[0], True) or not executes(both[1], False):
            return False
        stand_ins.check(self._shape)  # the core reads as far as the model's sizes say
        self._small = [p.detach() for p in now]
        self._small_ffn, self._small_attention = map(describe, both)
        self.chunk.small_ffn = _where(self._small_ffn)
        self.chunk.small_attention = _where(self._small_attention)
        self._small_places = places
        return True

    def follow_predictor(self, author: ModulatorAuthor) -> bool:
        """The same for the parameters of a predictor; whether the core evaluates it."""
        predictor = author.modulator.predictor
        if not isinstance(predictor, LinearPredictor):
            return False
        now = parts_of(predictor)
        places = _places(now)
        if places == self._predictor_places:
            return True
        self._predictor_places = None
        if not all(map(readable, now)):
            return False
        self._predictor = [p.detach() for p in now]
        self._modulator = _modulator_parts(author)
        self._least = author.modulator.gaba.least
        if self._decides is Decides.CORE:
            self.chunk.modulator = _where(self._modulator)
        self._predictor_places = places
        return True

    def acts(self, sequence: Sequence, author: ModulatorAuthor) -> bool:
        """Whether any transmitter acts on the next token."""
        if self._decides is Decides.CORE and self.used < self._planned:
            return bool(self._acting[self.used])
        return bool(author.acting(np.array([sequence.length], np.int32)).any())

    def prepare(
        self,
        sequence: Sequence,
        ids: list[int],
        rotaries: list[Rotary],
        summarise: Callable[[core.Chunk], None],
    ) -> None:
        """Set the structure for the next tokens, for which there is `room`.

        Args:
            sequence: Whose buffer this is.
            ids: Of the tokens.
            rotaries: The rotary phases that layers have.
            summarise: Fills the structure's summaries.
        """
        if self.flying:
            raise VesicleError("a sequence is to be read that is being read already")
        self.flying = True
        position, cache, n = sequence.length, sequence.cache, len(ids)
        chunk, i = self.chunk, self.used
        self._ids[:n] = ids
        chunk.n, chunk.position, chunk.recorded = n, position, i
        if self._decides is Decides.CORE:
            self.released[i : i + n] = self._acting[i : i + n] != 0
        self._rotate(rotaries, position)
        tables = cache.tables
        if tables is not self._tables:
            self._tables = tables
            chunk.tables, chunk.starts = tables.ctypes.data, cache.starts.ctypes.data
            chunk.room = tables.shape[2]
        chunk.held = cache.n_blocks.ctypes.data
        if sequence.received is not None:
            sums = sequence.received.sums
            chunk.received, chunk.room_received = sums.ctypes.data, sums.shape[2]
        if sequence.observed is not None:
            queries = sequence.observed.queries
            chunk.queries, chunk.room_queries = queries.ctypes.data, queries.shape[1]
        self._summarise(sequence, n, summarise)

    def _rotate(self, rotaries: list[Rotary], position: int) -> None:
        """Point to the cosines and sines of positions from this one on."""
        start = position // STRIDE * STRIDE
        if not self._rotations or self._rotations[0].start != start:
            self._rotations = [rotary.table(position) for rotary in rotaries]
        for i, table in enumerate(self._rotations):
            self.chunk.cosine[i], self.chunk.sine[i] = table.addresses(position)

    def _plan_ahead(self, sequence: Sequence) -> None:
        """Fill the rows of the next tokens with what is known of them, as far as the core goes."""
        author, position = sequence.author, sequence.length
        positions = np.arange(position, position + _ROWS, dtype=np.int32)
        self._planned = self.blocked = self._chooses = 0
        if self._decides is not Decides.BEFORE:
            self._planned = _ROWS
            self.plan[:] = resting_rows(self._shape, positions)
            if isinstance(author, ModulatorAuthor):
                author.bound(self.plan)
                self._acting[:] = author.acting(positions) @ _BITS
            return
        known = author.planned(positions)
        if known is None or not len(known):
            return
        n = len(known)
        if not author.bounded:
            check_rows(known, self._shape, positions[:n])
        beyond = np.zeros(n, bool)  # what the core does not execute
        for name in OTHERS:
            beyond |= (known[name] != BY_NAME[name].rest).any(
                axis=tuple(range(1, known[name].ndim))
            )
        if self._shape.stored_bits is None:
            beyond |= (known["bits"] != FULL_BITS).any((1, 2))
        if beyond[0]:
            self.blocked = n if beyond.all() else int(beyond.argmin())
            return
        n = int(beyond.argmax()) if beyond.any() else n
        self.plan[:n], self._planned = known[:n], n
        seen = visible_blocks(positions[:n, None], self._shape.layer_windows)
        choosing = np.flatnonzero((known["kv_blocks"][:n] < seen).any(1))
        self._chooses = int(choosing[-1]) + 1 if len(choosing) else 0
        if isinstance(author, ModulatorAuthor):
            self.levels[:n] = author.foreseen(positions[:n])

    def _summarise(
        self, sequence: Sequence, n: int, summarise: Callable[[core.Chunk], None]
    ) -> None:
        """Bring the summaries of complete blocks up to date, where the next n tokens may choose.

        The core adds those of blocks that it completes itself.
        """
        position, cache = sequence.length, sequence.cache
        block = position // BLOCK
        if self._decides is not Decides.BEFORE:
            needed = (position + n - 1) // BLOCK + 1 > self._least
        else:
            needed = self.used < self._chooses or bool(self.chunk.summaries)
        if not needed:
            self.chunk.summaries = self._summarised = None
            return
        room = self._room
        if room is None or int(cache.n_blocks.max()) > room.shape[2] * BLOCK:
            self._summarised = None
        if self._summarised != (block, cache.evictions):
            self._make_summaries(sequence, summarise)
        elif len(moved := np.nonzero(self._left != cache.left)[0]):
            self._summarise_again(moved, summarise)
        self._left = cache.left.copy()
        # Blocks are complete when tokens are written into their last places.
        self._summarised = ((position + n) // BLOCK, cache.evictions)

    def _make_summaries(self, sequence: Sequence, summarise: Callable[[core.Chunk], None]) -> None:
        """Summarise all complete blocks, 16 blocks' numbers side by side, with room for more."""
        cache, shape, chunk = sequence.cache, self._shape, self.chunk
        groups = max(4, 2 * (int(cache.n_blocks.max()) // BLOCK + 1))
        # Zeros, since whole groups are compared, beyond the last block too.
        self._room = torch.zeros(
            shape.n_layers,
            shape.n_kv_heads,
            groups,
            chunk.vectors,
            shape.head_size,
            BLOCK,
            dtype=summary_dtype(cache.pool.kv),
        )
        for layer, room in enumerate(self._room):
            self._summaries[layer] = room.data_ptr()
        chunk.room_summaries = groups * BLOCK
        chunk.summaries = self._summaries.ctypes.data
        summarise(chunk)

    def _summarise_again(
        self, layers: NDArray[np.int_], summarise: Callable[[core.Chunk], None]
    ) -> None:
        """Summarise anew what is left in layers whose windows have left blocks behind."""
        only = np.zeros_like(self._summaries)
        only[layers] = self._summaries[layers]
        self.chunk.summaries = only.ctypes.data
        summarise(self.chunk)
        self.chunk.summaries = self._summaries.ctypes.data

    def next(self, n: int) -> slice:
        """The places of the next n tokens in `plan` and `released`."""
        return slice(self.used, self.used + n)

    @property
    def lost(self) -> int:
        """The first token of the last pass whose levels were released from no numbers; else -1."""
        return int(self.chunk.lost) if self._decides is Decides.CORE else -1

    def done(self, sequence: Sequence, heads: int) -> None:
        """Count the tokens that the core has just run, and at how many it ran the head."""
        self.flying = False
        n, start = self.chunk.n, self.used
        self.heads[start : start + n - heads] = 0
        self.heads[start + n - heads : start + n] = 1
        self.used += n
        if self.asks:  # what an author has said itself is not to be told it again
            self.flush(sequence)

    def drop(self, n: int) -> None:
        """Forget what was recorded of the next n tokens, whose pass was broken off."""
        self.flying, self._summarised = False, None
        self._planned = self.used  # an author may plan otherwise now
        self._clear(self.next(n))

    def flush(self, sequence: Sequence) -> None:
        """Add the recorded tokens to the sequence's Plan, levels and counts."""
        if self.flying:  # an author looks at it in the middle of a pass: what was before shows
            return
        n, self.used, self._planned = self.used, 0, 0
        if n == 0:
            return
        sequence.builder.add(self.plan[:n].copy())
        if isinstance(sequence.author, ModulatorAuthor) and not self.asks:
            sequence.author.adopt(self.levels[:n].copy())
        counters = Counters(self._shape, n)
        counted = {name: getattr(self, name)[:n] for name in _COUNTED}
        counters.adopt(bits=self.plan["bits"][:n], **counted)
        counters.released(sequence.overhead, slice(0, n), self.released[:n])
        ran = np.nonzero(self.heads[:n])[0]
        of_head = {name: self.plan[name][ran, -1] for name in OF_HEAD}
        exact = np.maximum(of_head["likeliest"], of_head["logits"])
        counters.head(ran, sequence.overhead, of_head["head"], exact)
        sequence.counted.append(counters.totals(slice(0, n)))
        self._clear(slice(0, n))

    def _clear(self, tokens: slice) -> None:
        for name in _COUNTED:
            getattr(self, name)[tokens] = 0
        self.levels[tokens] = 1
        self.released[tokens] = False


def small_module(module: SmallModule | None) -> core.Small | None:
    """The structure of a small module, which must outlive it; None for none."""
    match module:
        case LowRankMaps():
            down, up, bias = (p.data_ptr() for p in parts_of(module))
            return core.Small(down=down, up=up, bias=bias, rank=module.rank)
        case SmallFfn():
            return _ffns(module.units, _dense(module.ffn_in), _dense(module.ffn_out))
    assert module is None  # others run in PyTorch
    return None


def coded_module(module: SmallFfn) -> core.Small:
    """The structure of small FFNs in 4-bit codes, which holds these.

    Raises:
        VesicleError: Their weights lie on no grid of those.
    """
    pairs = packed(module)  # for all sequences together
    kind = core.Projection * len(pairs)
    both = (kind(*map(core.describe, weights)) for weights in zip(*pairs, strict=True))
    return _ffns(module.units, *both, pairs)


def _ffns(units: int, first: Any, second: Any, *kept: Any) -> core.Small:
    found = core.Small(inner=units)
    found.kept = first, second, *kept
    found.in_, found.out = ctypes.addressof(first), ctypes.addressof(second)
    return found


def _dense(weights: Tensor) -> ctypes.Array[core.Projection]:
    """The structures of all layers' weights (L, in, out)."""
    n_layers, n_in, n_out = weights.shape
    return (core.Projection * n_layers)(
        *(
            core.Projection(
                data=layer.data_ptr(), n_in=n_in, n_out=n_out, stride=n_out, format=core.DENSE32
            )
            for layer in weights.detach()
        )
    )


def parts_of(module: nn.Module | None) -> list[Tensor]:
    """The parameters of a small module or a linear predictor that the core reads."""
    match module:
        case LowRankMaps():
            return [module.down, module.up, module.bias]
        case SmallFfn():
            return [module.ffn_in, module.ffn_out]
        case LinearPredictor():
            return [
                module.weight,
                module.offset,
                module.log_slope,
                module.position_weight,
            ]
    return []


def readable(parameter: Tensor) -> bool:
    """Whether the core can read a parameter where it lies."""
    return (
        parameter.dtype == torch.float32
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
    )


_Places = list[tuple[int, torch.Size, tuple[int, ...], torch.dtype]]


def _places(parameters: list[Tensor]) -> _Places:
    """Where parameters lie; where one is held, nothing else can lie."""
    return [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in parameters]


def _where(structure: ctypes.Structure | None) -> int | None:
    return None if structure is None else ctypes.addressof(structure)


def _modulator_parts(author: ModulatorAuthor) -> core.ModulatorParts:
    modulator, dial = author.modulator, author.dial
    predictor = modulator.predictor
    assert isinstance(predictor, LinearPredictor)
    rules = (core.Rule * len(author.rules))(*map(_rule, author.rules))
    parts = core.ModulatorParts(
        weight=predictor.weight.data_ptr(),
        offset=predictor.offset.data_ptr(),
        log_slope=predictor.log_slope.data_ptr(),
        place_weight=predictor.position_weight.data_ptr(),
        released=len(predictor.config.transmitters),
        logit=math.log((1 - dial) / dial) if dial < 1 else -math.inf,
        rules=ctypes.addressof(rules),
        n_rules=len(rules),
    )
    most = author.most
    if most is not None:
        parts.most = most.ctypes.data
    parts.kept = rules, most  # for as long as they are pointed to
    for i, name in enumerate(predictor.config.transmitters):
        parts.columns[i] = index(name)
    return parts


def _rule(rule: Share | Ladder) -> core.Rule:
    field = BY_NAME[rule.field]
    found = core.Rule(
        number=PLACES[rule.field] + rule.column,
        transmitter=index(rule.transmitter),
        next=rule.next_layer,
        last=field.last_layer,
        steps=-1,
    )
    if isinstance(rule, Share):
        found.width, found.least, found.rate, found.floor = (
            rule.width,
            rule.least,
            rule.rate,
            rule.floor,
        )
        return found
    found.steps, found.below = len(rule.steps), rule.below
    for i, (level, value) in enumerate(rule.steps):
        found.levels[i], found.values[i] = level, value
    return found
