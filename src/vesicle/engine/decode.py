"""The fast path of decoding: one token of each of up to 16 sequences in one native call.

The core (`engine.core`) knows RMSNorm, rotary over the whole head, SiLU-gated FFNs, packed, fp32
and bf16 weights, and every KV format but fp64. It releases levels with the linear predictor and
decides as the effectors do; authors that know their decisions beforehand hand them over
(`Author.planned`). Everything else - other predictors and families, several tokens at once - takes
the engine's general path. Both count alike, and a test holds their Plans and logits equal.

What the core records about a token lies in its sequence's `Slot` until somebody asks for it: adding
it to the Plan token by token would take longer than the arithmetic of a layer.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.effectors.rules import Ladder, Share
from vesicle.engine import core
from vesicle.engine.counters import Counters
from vesicle.engine.linear import ChannelMajor, Projection
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight
from vesicle.engine.pool import BlockPool, summary_dtype
from vesicle.engine.rotary import Rotary
from vesicle.engine.weights import Weights
from vesicle.families.base import DecoderConfig
from vesicle.modulator import ModulatorAuthor
from vesicle.plan import BLOCK, FULL_BITS, ROW, check_rows, resting_rows
from vesicle.plan.rows import BY_NAME, PLACES
from vesicle.predictors.linear import LinearPredictor
from vesicle.standins import StandIns
from vesicle.transmitters import NAMES, index

if TYPE_CHECKING:
    from vesicle.engine.engine import Sequence

_ROWS = 32
"""Tokens that a slot records before they are added to the Plan."""
_MOST_STEPS = 8
"""Steps of a ladder that the core takes."""
_MOST_RATIO = 256
"""Query heads of a KV head that the core takes."""
_BITS = 1 << np.arange(len(NAMES))
_EXECUTED = ("channels", "bits", "ffn", "attention", "kv_blocks", "head")
"""Fields that the core executes; tokens below rest in another one take the general path."""
_OTHERS = [name for name in BY_NAME if name not in _EXECUTED]
MOST_TOKENS = core.MOST_TOKENS
NOTHING, LOGITS, LIKELIEST = 0, 1, 2


class Slot:
    """What one sequence hands to the core, and what the core has recorded of its last tokens."""

    def __init__(self, sequence: Sequence) -> None:
        """For a sequence whose author the core covers."""
        shape = sequence.engine.shape
        layers, sites = shape.n_layers, 4
        self._shape = shape
        self.plan = np.zeros((_ROWS, layers), ROW)
        # What the structures point to is held here, for as long as they point to it.
        self._standins: list[Tensor] = []
        self._predictor: list[Tensor] = []
        self.levels = np.ones((_ROWS, layers, len(NAMES)))
        self.rows = np.zeros((_ROWS, layers, sites), np.int64)
        self.outputs = np.zeros((_ROWS, layers, sites), np.int64)
        self.visited = np.zeros((_ROWS, layers), np.int64)
        self.compared = np.zeros((_ROWS, layers), np.int64)
        self.standin = np.zeros(_ROWS, np.int64)
        self.heads = np.zeros(_ROWS, np.int64)
        self.used = self._planned = 0
        self.hidden = torch.empty(shape.width)
        self._summaries = np.zeros(layers, np.uint64)
        self._summarised: tuple[int, int] | None = None
        self._room: Tensor | None = None  # (L, G, groups of 16, V, K, 16) summaries, turned
        self._tables: object = None
        self.token = core.Token(hidden=self.hidden.data_ptr())
        self._pairs = [
            (name, array, array.strides[0])
            for name, array in (
                ("plan", self.plan),
                ("levels", self.levels),
                ("rows", self.rows),
                ("outputs", self.outputs),
                ("visited", self.visited),
                ("compared", self.compared),
                ("standin", self.standin),
            )
        ]
        self._addresses = [(n, array.ctypes.data, stride) for n, array, stride in self._pairs]
        self._ffn_standin: core.StandIn | None = None
        self._attention_standin: core.StandIn | None = None
        self._modulator: core.ModulatorParts | None = None
        self._least = 0
        self._releases = False
        self._follows: bool | None = None
        self.token.vectors = sequence.overhead.selection_vectors

    def follows(self, author: ModulatorAuthor, packed: bool) -> bool:
        """Whether the core evaluates all rules of an author, which do not change."""
        if self._follows is None:
            ladders = [rule for rule in author.rules if isinstance(rule, Ladder)]
            bits = [rule for rule in ladders if rule.field == "bits"]
            values = {value for rule in bits for _, value in (*rule.steps, (0, rule.below))}
            self._follows = (
                not any(rule.field in _OTHERS for rule in author.rules)
                and all(len(ladder.steps) <= _MOST_STEPS for ladder in ladders)
                and (packed or values <= {FULL_BITS})
            )
        return self._follows

    def knows(self, sequence: Sequence) -> bool:
        """Whether the author says what the next token does without seeing hidden states."""
        self.turn(sequence, releases=False)
        if self.used == self._planned:
            self.settle(sequence)
        return self.used > 0 or self._plan_ahead(sequence)

    def turn(self, sequence: Sequence, *, releases: bool) -> None:
        """Have the core release levels for the next token, or execute what is planned."""
        if releases == self._releases:
            return
        self.settle(sequence)
        self._releases = releases
        self.token.modulator = _where(self._modulator) if releases else None

    def _follow(self, sequence: Sequence) -> None:
        """Point to where parameters lie now: they may have been replaced, or moved and back."""
        equipment = sequence.equipment
        standins = equipment.ffn_standin, equipment.attention_standin
        now = [p for standin in standins for p in _parts_of(standin)]
        if not _same_places(now, self._standins):
            self._standins = [p.detach() for p in now]
            self._ffn_standin, self._attention_standin = map(_stand_in, standins)
            self.token.ffn_standin = _where(self._ffn_standin)
            self.token.attention_standin = _where(self._attention_standin)
        author = sequence.author
        if not self._releases or not isinstance(author, ModulatorAuthor):
            return
        now = _parts_of(author.modulator.predictor)
        if not _same_places(now, self._predictor):
            self._predictor = [p.detach() for p in now]
            self._modulator = _modulator_parts(author)
            self._least = author.modulator.gaba.least
        self.token.modulator = _where(self._modulator)

    def prepare(
        self,
        sequence: Sequence,
        token_id: int,
        rotation: tuple[int, int],
        summarise: Callable[[core.Token], None],
    ) -> None:
        """Set the structure for the next token.

        Args:
            sequence: Whose slot this is.
            token_id: Of the token.
            rotation: Addresses of the cosines and sines of its position.
            summarise: Fills the structure's summaries.
        """
        self._follow(sequence)
        if self.used == self._planned:
            self.settle(sequence)
            self._plan_ahead(sequence)
        position, cache = sequence.length, sequence.cache
        token, i = self.token, self.used
        for name, start, stride in self._addresses:
            setattr(token, name, start + i * stride)
        token.id, token.position = token_id, position
        token.place = math.log2((position + 1) / BLOCK) / 8
        token.cosine, token.sine = rotation
        tables = cache.tables
        if tables is not self._tables:
            self._tables = tables
            token.tables, token.starts = tables.ctypes.data, cache.starts.ctypes.data
            token.room = tables.shape[1]
        token.held = cache.n_blocks.ctypes.data
        self._summarise(sequence, summarise)

    def _plan_ahead(self, sequence: Sequence) -> bool:
        """Fill the rows of the next tokens with what is known of them."""
        position = sequence.length
        positions = np.arange(position, position + _ROWS, dtype=np.int32)
        self._planned = _ROWS
        if self._releases:
            self.plan[:] = resting_rows(self._shape, positions)
            return True
        author = sequence.author
        known = author.planned(positions)
        if known is None:
            self._planned = 0
            return False
        n = self._planned = len(known)
        if n == 0:
            return False
        if not author.bounded:
            check_rows(known, self._shape, positions[:n])
        self.plan[:n] = known
        if isinstance(author, ModulatorAuthor):
            self.levels[:n] = author.foreseen(positions[:n])
        if any((known[name] != BY_NAME[name].rest).any() for name in _OTHERS):
            return False
        packed = self._shape.stored_bits is not None
        return packed or bool((known["bits"] == FULL_BITS).all())

    def _summarise(self, sequence: Sequence, summarise: Callable[[core.Token], None]) -> None:
        """Bring the summaries of complete blocks up to date, where blocks may be chosen.

        The core adds those of blocks that it completes itself.
        """
        position, cache = sequence.length, sequence.cache
        block = position // BLOCK
        if self._releases:
            needed = block + 1 > self._least
        elif self.token.summaries:
            needed = True
        else:
            blocks = self.plan["kv_blocks"][self.used : self._planned]
            visible = np.arange(position, position + len(blocks)) // BLOCK + 1
            needed = bool((blocks < visible[:, None]).any())
        if not needed:
            self.token.summaries = None
            return
        room = self._room
        if room is None or int(cache.n_blocks.max()) > room.shape[2] * BLOCK:
            self._summarised = None
        if self._summarised != (block, cache.evictions):
            self._make_summaries(sequence, summarise)
        # The next block is complete when this token is written into its last place.
        complete = (position + 1) // BLOCK
        self._summarised = (complete, cache.evictions)

    def _make_summaries(self, sequence: Sequence, summarise: Callable[[core.Token], None]) -> None:
        """Summarise all complete blocks, 16 blocks' numbers side by side, with room for more."""
        cache, shape, token = sequence.cache, self._shape, self.token
        groups = max(4, 2 * (int(cache.n_blocks.max()) // BLOCK + 1))
        # Zeros, since whole groups are compared, beyond the last block too.
        self._room = torch.zeros(
            shape.n_layers,
            shape.n_kv_heads,
            groups,
            token.vectors,
            shape.head_size,
            BLOCK,
            dtype=summary_dtype(cache.pool.kv),
        )
        for layer, room in enumerate(self._room):
            self._summaries[layer] = room.data_ptr()
        token.room_summaries = groups * BLOCK
        token.summaries = self._summaries.ctypes.data
        kind, layers = sequence.equipment.summary, range(shape.n_layers)
        if not all(cache.has_summaries(layer, kind) for layer in layers):
            return summarise(token)
        for layer, room in zip(layers, self._room, strict=True):  # a prefill has made them
            made = cache.summaries(layer, kind)  # (G, N, V, K)
            whole = nn.functional.pad(made, (0, 0, 0, 0, 0, -made.shape[1] % BLOCK))
            turned = whole.unflatten(1, (-1, BLOCK)).permute(0, 1, 3, 4, 2)
            room[:, : turned.shape[1]] = turned

    def sound(self) -> bool:
        """Whether levels were released from numbers, as the newest residual stream tells."""
        return not self._releases or bool(self.hidden.isfinite().all())

    def done(self, head: bool) -> None:
        """Count the token that the core has just run."""
        self.heads[self.used] = head
        self.used += 1

    def settle(self, sequence: Sequence) -> None:
        """Add the recorded tokens to the sequence's Plan, levels and counts."""
        n, self.used, self._planned = self.used, 0, 0
        if n == 0:
            return
        sequence.builder.add(self.plan[:n].copy())
        if isinstance(sequence.author, ModulatorAuthor):
            sequence.author.adopt(self.levels[:n].copy())
        counters = Counters(self._shape, n)
        counters.adopt(
            rows=self.rows[:n],
            outputs=self.outputs[:n],
            bits=self.plan["bits"][:n],
            visited=self.visited[:n],
            compared=self.compared[:n],
            standin=self.standin[:n],
        )
        if self._releases:
            counters.released(sequence.overhead, self._shape.n_layers)
        for row in np.nonzero(self.heads[:n])[0]:
            counters.head(slice(row, row + 1), self.plan["head"][row : row + 1, -1])
        sequence.counted.append(counters.totals(slice(0, n)))
        for array in (self.rows, self.outputs, self.visited, self.compared, self.standin):
            array[:n] = 0
        self.levels[:n] = 1


class Decoder:
    """Runs single tokens of up to 16 sequences natively."""

    def __init__(
        self, weights: Weights, config: DecoderConfig, pool: BlockPool, scale: float
    ) -> None:
        """Use `build`."""
        library = core.load()
        assert library is not None
        self._library, self._weights, self._pool = library, weights, pool
        shape = config.shape
        self._shape = shape
        self._kept: list[Tensor] = []  # fp32 copies, which the structures point to
        self._rotary = Rotary(config, torch.float32)
        self._layers = (core.Layer * shape.n_layers)()
        for number, (layer, w) in enumerate(zip(self._layers, weights.layers, strict=True)):
            if isinstance(w.attention_in, PackedPair):
                layer.value_key, layer.query = map(core.describe, w.attention_in.parts)
            else:
                split = 2 * shape.kv_width
                layer.value_key = self._projection(w.attention_in, 0, split)
                layer.query = self._projection(w.attention_in, split, w.attention_in.n_out)
            layer.attention_out = self._projection(w.attention_out)
            layer.ffn_in, layer.ffn_out = self._projection(w.ffn_in), self._projection(w.ffn_out)
            layer.attention_gain = self._fp32(w.attention_norm.weight)
            layer.ffn_gain = self._fp32(w.ffn_norm.weight)
            layer.query_gain = self._fp32(w.query_norm.weight if w.query_norm else None)
            layer.key_gain = self._fp32(w.key_norm.weight if w.key_norm else None)
            layer.rotates = config.rotary_layers[number]
        self._model = core.Model(
            n_layers=shape.n_layers,
            width=shape.width,
            heads=shape.n_heads,
            kv_heads=shape.n_kv_heads,
            size=shape.head_size,
            ffn_width=shape.ffn_width,
            vocabulary=shape.vocabulary,
            eps=config.norm_eps,
            scale=scale,
            layers=ctypes.addressof(self._layers),
            final_gain=self._fp32(weights.final_norm.weight),
            embedding=self._head(weights.embedding, None),
            head=self._head(weights.head, weights.head_bias),
            keys=pool.keys.data_ptr(),
            values=pool.values.data_ptr(),
            key_scales=core.address(pool.key_scales),
            value_scales=core.address(pool.value_scales),
            kv_format=core.KV_FORMATS[pool.keys.dtype],
            summary_format=_summary_format(pool),
            # Keys, then values. Strides say nothing about an axis of one head.
            page_stride=2 * pool.keys[0, 0].numel(),
        )
        self._batches = {n: (core.Token * n)() for n in range(1, core.MOST_TOKENS + 1)}

    def _summarise(self, token: core.Token) -> None:
        """Summarise all complete blocks of a sequence."""
        self._library.vesicle_summarise(
            ctypes.addressof(self._model), ctypes.addressof(token), core.threads()
        )

    def _fp32(self, tensor: Tensor | None) -> int | None:
        """Address of a small tensor's numbers in fp32."""
        if tensor is None:
            return None
        self._kept.append(tensor.float().contiguous())
        return self._kept[-1].data_ptr()

    def _projection(
        self, weight: Projection, start: int = 0, stop: int | None = None
    ) -> core.Projection:
        """A projection, or outputs `start:stop` of a dense one."""
        if isinstance(weight, PackedWeight):
            return core.describe(weight)
        assert isinstance(weight, ChannelMajor)
        size, bias = weight.weight.element_size(), weight.bias
        return core.Projection(
            data=weight.weight.data_ptr() + start * size,
            bias=self._fp32(None if bias is None else bias[start:stop]),
            n_in=weight.n_in,
            n_out=(weight.n_out if stop is None else stop) - start,
            stride=weight.n_out,
            format=_dense_format(weight.weight),
        )

    def _head(self, head: Tensor | PackedHead, bias: Tensor | None) -> core.Projection:
        """The LM head or the embedding."""
        if isinstance(head, PackedHead):
            return core.describe(head)
        return core.Projection(
            data=head.data_ptr(),
            bias=self._fp32(bias),
            n_in=head.shape[1],
            n_out=head.shape[0],
            stride=head.shape[1],
            format=_dense_format(head),
        )

    @classmethod
    def build(
        cls, weights: Weights, config: DecoderConfig, pool: BlockPool, scale: float
    ) -> Decoder | None:
        """A decoder for these weights and pages, or None where the core does not cover them."""
        covered = uncovered(weights, config, pool) is None
        return cls(weights, config, pool, scale) if covered else None

    def covers(self, sequence: Sequence) -> bool:
        """Whether the core can decide for the sequence's next token, or be told beforehand."""
        author, equipment = sequence.author, sequence.equipment
        for standin in (equipment.ffn_standin, equipment.attention_standin):
            if not all(map(_readable, _parts_of(standin))):
                return False
        if not isinstance(author, ModulatorAuthor) or not author.reads_hidden:
            return sequence.slot().knows(sequence)
        modulator = author.modulator
        if not (
            isinstance(modulator.predictor, LinearPredictor)
            and all(map(_readable, _parts_of(modulator.predictor)))
            and sequence.slot().follows(author, self._weights.packed)
        ):
            return False
        acting = author.acting(np.array([sequence.length], np.int32))[0]
        if not acting.any():
            return sequence.slot().knows(sequence)
        sequence.slot().turn(sequence, releases=True)
        sequence.slot().token.acting = int(acting @ _BITS)
        return True

    def step(self, batch: list[tuple[Sequence, int]], wants: int) -> list[Tensor]:
        """One token of each sequence; room for it has been reserved.

        Args:
            batch: Sequences and their next token ids.
            wants: `NOTHING` of the head, `LOGITS`, or the `LIKELIEST` token alone.

        Returns:
            For each sequence, logits (1, V), the likeliest token's id () (-1 where a logit is not
            finite), or (0, V).
        """
        n = len(batch)
        tokens = self._batches[n]
        vocabulary = self._shape.vocabulary
        size = vocabulary if wants == LOGITS else 0
        logits = torch.empty(n, 1 if size else 0, vocabulary)
        # First, since growing would move the rows that other tokens point to.
        self._rotary.reach(max(sequence.length for sequence, _ in batch) + 1)
        for i, (sequence, token_id) in enumerate(batch):
            slot = sequence.slot()
            slot.prepare(
                sequence, token_id, self._rotary.addresses(sequence.length), self._summarise
            )
            slot.token.wants = wants
            slot.token.logits = logits[i].data_ptr() if size else None
            tokens[i] = slot.token
        self._library.vesicle_step(
            ctypes.addressof(self._model), ctypes.addressof(tokens), n, core.threads()
        )
        for sequence, _ in batch:
            sequence.slot().done(wants != NOTHING)
        if wants == LIKELIEST:
            return list(torch.tensor([token.token for token in tokens]))
        return list(logits)


def uncovered(weights: Weights, config: DecoderConfig, pool: BlockPool) -> str | None:
    """What the core does not cover about these weights and pages, in a few words; None for nothing.

    That there is no core comes first.
    """
    dtype, rotated = weights.dtype, 2 * len(config.rotary_frequencies)
    ratio = config.shape.n_heads // config.shape.n_kv_heads
    known = {
        "the native core is missing": core.available(),
        f"weights are {weights.format}": weights.packed or dtype in (torch.float32, torch.bfloat16),
        f"weights are on {weights.device}": weights.device.type == "cpu",
        f"keys and values are {pool.kv}": pool.keys.dtype in core.KV_FORMATS,
        "the model's norms are not RMSNorm": config.rms_norm,
        "the model's attention and FFN are parallel": not config.parallel_residual,
        f"the model's activation is {config.activation!r}": config.activation == "silu",
        "the model's FFNs have no gate": config.shape.gated,
        f"the model rotates {rotated} of {config.shape.head_size} channels of a head": (
            rotated == config.shape.head_size
        ),
        f"{ratio} query heads share a KV head, and {_MOST_RATIO} may": ratio <= _MOST_RATIO,
    }
    return next((what for what, fine in known.items() if not fine), None)


def _stand_in(standin: StandIns | None) -> core.StandIn | None:
    if standin is None:
        return None
    down, up, bias = (p.data_ptr() for p in (standin.down, standin.up, standin.bias))
    return core.StandIn(down=down, up=up, bias=bias, rank=standin.rank)


def _parts_of(module: nn.Module | None) -> list[Tensor]:
    """The parameters of a stand-in or a linear predictor that the core reads."""
    match module:
        case StandIns():
            return [module.down, module.up, module.bias]
        case LinearPredictor():
            return [
                module.weight,
                module.offset,
                module.log_slope,
                module.position_weight,
            ]
    return []


def _readable(parameter: Tensor) -> bool:
    """Whether the core can read a parameter where it lies."""
    return (
        parameter.dtype == torch.float32
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
    )


def _same_places(now: list[Tensor], before: list[Tensor]) -> bool:
    """Whether parameters lie where those lie that are held: no other storage can lie there."""
    return len(now) == len(before) and all(
        p.data_ptr() == q.data_ptr() and p.shape == q.shape
        for p, q in zip(now, before, strict=True)
    )


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
        pressure=math.log((1 - dial) / dial) if dial < 1 else -math.inf,
        rules=ctypes.addressof(rules),
        n_rules=len(rules),
    )
    parts.kept = rules  # for as long as they are pointed to
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


def _dense_format(weight: Tensor) -> int:
    return core.DENSE32 if weight.dtype == torch.float32 else core.DENSE_BF16


def _summary_format(pool: BlockPool) -> int:
    return core.KV_FORMATS[torch.float16 if pool.keys.dtype == torch.int8 else pool.keys.dtype]
