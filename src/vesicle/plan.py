"""The Plan: what is computed for each token in each layer, and the interface of whoever decides it.

Whoever decides writes a Plan (a modulator, a control, an oracle, a saved file); whoever computes
executes it (the reference, the engine). A Plan holds discrete facts only, one row a token and one
column a layer:

===========  ==========  =====================================================================
field        shape       meaning
===========  ==========  =====================================================================
channels     (T, L, 4)   input channels read, largest magnitude first, at each site
bits         (T, L, 4)   weight bits read at each site: 16 (the stored weights), 8, 4, 3 or 2
ffn          (T, L)      FFN module: 0 skip, 1 small (stand-in), 2 big
attention    (T, L)      1 attention runs, 0 its stand-in; keys and values are written either way
kv_blocks    (T, L)      blocks of 16 cached positions that the query reads, per KV head
head         (T,)        LM head: 0 whole; m screens it by leading bits, then ranks the m best
retained     (T, L, G)   last position whose query may read this token's entry of a KV head
===========  ==========  =====================================================================

The four *sites* are the distinct inputs of a layer's projections: `attention_in` (queries, keys,
values), `attention_out`, `ffn_in` (gate and up) and `ffn_out` (down).

Causality: every decision about token t is a function of tokens up to t. A Plan fills layer by
layer, and a pass in one piece, in chunks or token by token fills it with the same values.

`head` has no layer. It is 0 wherever the whole head ran: where logits were needed for more than the
likeliest token, and where the head is not stored in planes of bits.

`retained` is a fact about an entry of the cache: keys and values of one token in one layer and KV
head. It is `FOREVER` for entries that are never forgotten; where none is, one column stands for all
heads. Entries are forgotten a page at a time (see `retention.py`), so `check` allows what pages of
16 positions of all KV heads can do: an entry outlives its own block of 16, and in a layer all KV
heads forget as many entries at a time, a multiple of 16.

`turns` is no decision: it tells where passes had to end because tokens were decided in another way
from there on (a prompt at rest ends, say). Arithmetic on many tokens rounds otherwise than on one,
so that a replay which is to write the same text has to end its passes there too.

A new effect is a new row in `FIELDS`, a price in `cost.py` and its execution in both executors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.files import atomic_path
from vesicle.shapes import FULL_BITS as FULL_BITS
from vesicle.shapes import ModelShape, Overhead

if TYPE_CHECKING:
    import torch

    from vesicle.standins import StandIns

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]
_T = TypeVar("_T", np.int32, np.float64)

SITES = ("attention_in", "attention_out", "ffn_in", "ffn_out")
BLOCK = 16
FOREVER = 2**31 - 1
"""Of an entry that is never forgotten."""
FFN_SKIP, FFN_SMALL, FFN_BIG = 0, 1, 2

FIELDS: dict[str, int] = {"channels": 4, "bits": 4, "ffn": 0, "attention": 0, "kv_blocks": 0}
"""Name of a field of each layer to the length of its last axis (0: none)."""
TOKEN_FIELDS = ("head",)
"""Fields without a layer axis."""

_ALL = (*FIELDS, *TOKEN_FIELDS)
_RETAINED, _TURNS = "retained", "turns"
_FORMAT = "vesicle-plan-1"


def visible_blocks(positions: IntArray) -> IntArray:
    """Blocks of 16 that hold positions 0..t, for queries at `positions` (any shape)."""
    return (positions // BLOCK + 1).astype(np.int32)


@dataclass(kw_only=True)
class AttentionDecision:
    """How one layer's attention treats T tokens.

    Attributes:
        channels: (T, 2) channels read at `attention_in` and `attention_out`.
        bits: (T, 2) weight bits at the same sites.
        run: (T,) 1 if attention runs.
        kv_blocks: (T,) blocks read.
        rest: True if all of this is at rest, so that executors may take their dense path unasked.
    """

    channels: IntArray
    bits: IntArray
    run: IntArray
    kv_blocks: IntArray
    rest: bool


@dataclass(kw_only=True)
class FfnDecision:
    """How one layer's FFN treats T tokens.

    (T, 2) channels and bits at `ffn_in` and `ffn_out`, (T,) module.
    """

    channels: IntArray
    bits: IntArray
    module: IntArray
    rest: bool


def resting_attention(shape: ModelShape, positions: IntArray) -> AttentionDecision:
    """The attention decision that changes nothing, for queries at `positions` (T,)."""
    n = len(positions)
    return AttentionDecision(
        channels=np.tile(np.array(shape.site_widths[:2], np.int32), (n, 1)),
        bits=np.full((n, 2), FULL_BITS, np.int32),
        run=np.ones(n, np.int32),
        kv_blocks=visible_blocks(positions),
        rest=True,
    )


def resting_ffn(shape: ModelShape, n_tokens: int) -> FfnDecision:
    """The FFN decision that changes nothing."""
    return FfnDecision(
        channels=np.tile(np.array(shape.site_widths[2:], np.int32), (n_tokens, 1)),
        bits=np.full((n_tokens, 2), FULL_BITS, np.int32),
        module=np.full(n_tokens, FFN_BIG, np.int32),
        rest=True,
    )


def resting_rows(shape: ModelShape, positions: IntArray) -> dict[str, IntArray]:
    """Rows of every field of a Plan that change nothing, for tokens at `positions` (T,)."""
    t, n_layers = len(positions), shape.n_layers
    return {
        "channels": np.tile(np.array(shape.site_widths, np.int32), (t, n_layers, 1)),
        "bits": np.full((t, n_layers, 4), FULL_BITS, np.int32),
        "ffn": np.full((t, n_layers), FFN_BIG, np.int32),
        "attention": np.ones((t, n_layers), np.int32),
        "kv_blocks": np.repeat(visible_blocks(positions)[:, None], n_layers, axis=1),
        "head": np.zeros(t, np.int32),
    }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The discrete decisions of one sequence of T tokens.

    See the module docstring for the fields. Without `head`, the whole one runs for every token;
    without `retained`, nothing is forgotten.

    Attributes:
        turns: (n,) rising lengths, each below T and above 0.
    """

    channels: IntArray
    bits: IntArray
    ffn: IntArray
    attention: IntArray
    kv_blocks: IntArray
    head: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    retained: IntArray = field(default_factory=lambda: np.zeros((0, 0, 0), np.int32))
    turns: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        """Fill in fields that were left out."""
        if self.head.shape == (0,) and self.ffn.ndim:
            object.__setattr__(self, "head", np.zeros(len(self.ffn), np.int32))
        if self.retained.shape == (0, 0, 0) and self.ffn.ndim == 2:
            object.__setattr__(self, "retained", _all_retained(*self.ffn.shape))

    @property
    def forgets(self) -> bool:
        """Whether any entry is ever forgotten."""
        return bool((self.retained != FOREVER).any())

    @property
    def n_tokens(self) -> int:
        """T."""
        return int(self.ffn.shape[0])

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.ffn.shape[1])

    @classmethod
    def rest(cls, shape: ModelShape, n_tokens: int) -> Plan:
        """The Plan of the dense model for a sequence that starts at position 0."""
        return cls(**resting_rows(shape, np.arange(n_tokens, dtype=np.int32)))

    def tokens(self, start: int, stop: int | None = None) -> Plan:
        """The rows `start:stop`."""
        rows = {name: getattr(self, name)[start:stop] for name in (*_ALL, _RETAINED)}
        start, stop, _ = slice(start, stop).indices(self.n_tokens)
        within = (self.turns > start) & (self.turns < stop)
        return Plan(**rows, turns=self.turns[within] - np.int32(start))

    def joined(self, other: Plan) -> Plan:
        """This Plan followed by `other`."""
        rows = {n: np.concatenate([getattr(self, n), getattr(other, n)]) for n in _ALL}
        parts = (self.retained, other.retained)
        heads = max(part.shape[2] for part in parts)
        wide = [np.broadcast_to(part, (*part.shape[:2], heads)) for part in parts]
        turns = np.concatenate([self.turns, other.turns + np.int32(self.n_tokens)])
        return Plan(**rows, retained=np.concatenate(wide), turns=turns)

    def equals(self, other: Plan) -> bool:
        """Whether every decision is the same."""
        if not all(np.array_equal(getattr(self, n), getattr(other, n)) for n in _ALL):
            return False
        mine, others = self.retained, other.retained
        if mine.shape != others.shape and 1 not in (mine.shape[2], others.shape[2]):
            return False
        return bool((mine == others).all())  # one column may stand for all heads

    def check(self, shape: ModelShape) -> None:
        """Refuse a Plan that does not fit a model.

        Raises:
            VesicleError: With the field, the value and what is allowed.
        """
        if self.ffn.ndim != 2:
            raise VesicleError(f"plan field 'ffn' has shape {self.ffn.shape}")
        t, n_layers = self.ffn.shape
        if n_layers != shape.n_layers:
            raise VesicleError(f"plan has {n_layers} layers; this model has {shape.n_layers}")
        blocks = visible_blocks(np.arange(t, dtype=np.int32))[:, None]
        bounds: dict[str, tuple[int | IntArray, int | IntArray]] = {
            "channels": (1, np.array(shape.site_widths, np.int32)),
            "ffn": (FFN_SKIP, FFN_BIG),
            "attention": (0, 1),
            "kv_blocks": (np.minimum(blocks, 2), blocks),
            "head": (0, shape.vocabulary),
        }
        for name in _ALL:
            values = getattr(self, name)
            if values.shape != _field_shape(name, t, n_layers):
                raise VesicleError(f"plan field {name!r} has shape {values.shape}")
            if name == "bits":
                bad = ~np.isin(values, (2, 3, 4, 8, 16))
            else:
                low, high = (np.broadcast_to(b, values.shape) for b in bounds[name])
                bad = (values < low) | (values > high)
            if bad.any():
                where = tuple(int(i) for i in np.argwhere(bad)[0])
                allowed = "2, 3, 4, 8, 16" if name == "bits" else f"{low[where]} to {high[where]}"
                raise VesicleError(
                    f"plan field {name!r} is {values[where]} at {where}; allowed: {allowed}"
                )
        self._check_retained(shape)
        edges = np.concatenate([[0], self.turns.ravel(), [t]])
        if len(self.turns) and (np.diff(edges) < 1).any():
            raise VesicleError(
                f"plan field 'turns' is {self.turns.tolist()}; allowed: rising, 1 to {t - 1}"
            )

    def _check_retained(self, shape: ModelShape) -> None:
        t, n_layers, n_heads = self.n_tokens, self.n_layers, shape.n_kv_heads
        values, name = self.retained, f"plan field {_RETAINED!r}"
        if values.shape not in ((t, n_layers, 1), (t, n_layers, n_heads)):
            raise VesicleError(f"{name} has shape {values.shape}")
        own = np.arange(t, dtype=np.int32) // BLOCK * BLOCK + BLOCK - 1
        bad = values < own[:, None, None]
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise VesicleError(
                f"{name} is {values[where]} at {where}; allowed: {own[where[0]]} and above, the "
                f"end of its block of {BLOCK}"
            )
        # What is forgotten after the last token has no effect here, and may be a part of its kind.
        ends = np.sort(np.where(values < t, values, FOREVER), axis=0)
        ends = np.concatenate([ends, np.full((-t % BLOCK, *ends.shape[1:]), FOREVER, np.int32)])
        groups = ends.reshape(-1, BLOCK, *ends.shape[1:])
        torn = ((groups != groups[:, :1]).any((0, 1)) | (ends != ends[..., :1]).any(0)).any(-1)
        if torn.any():
            raise VesicleError(
                f"{name} does not fit pages in layer {int(torn.argmax())}; allowed: at a time, "
                f"all KV heads of a layer forget as many entries, a multiple of {BLOCK}"
            )

    def save(self, path: Path | str) -> None:
        """Write the Plan to a safetensors file, atomically."""
        from safetensors.numpy import save

        names = (*_ALL, _RETAINED) if self.forgets else _ALL
        tensors = {n: np.ascontiguousarray(getattr(self, n)) for n in names}
        if len(self.turns):
            tensors[_TURNS] = np.ascontiguousarray(self.turns)
        data = save(tensors, metadata={"format": _FORMAT})
        # Not by the library's own `save_file`, which replaces a device by a regular file.
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(data)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read a Plan that `save` wrote.

        One of before `head` was a field has the whole head; one without `retained` forgets nothing.

        Raises:
            VesicleError: If the file is missing, corrupt or not a Plan.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise VesicleError(f"{path} is not a vesicle plan")
                known = set(file.keys())
                names = [n for n in (*_ALL, _RETAINED) if n in FIELDS or n in known]
                arrays = {name: file.get_tensor(name) for name in names}
                turns = file.get_tensor(_TURNS) if _TURNS in known else np.zeros(0, np.int32)
        except (OSError, SafetensorError) as error:
            raise VesicleError(f"cannot read {path} as a plan: {error}") from error
        if any(a.dtype != np.int32 for a in (*arrays.values(), turns)):
            raise VesicleError(f"plan {path} must hold int32 arrays")
        return cls(**arrays, turns=turns)


def _field_shape(name: str, n_tokens: int, n_layers: int) -> tuple[int, ...]:
    if name in TOKEN_FIELDS:
        return (n_tokens,)
    last = FIELDS[name]
    return (n_tokens, n_layers, last) if last else (n_tokens, n_layers)


def _all_retained(n_tokens: int, n_layers: int) -> IntArray:
    """(T, L, 1) for nothing forgotten; takes no memory."""
    return np.broadcast_to(np.int32(FOREVER), (n_tokens, n_layers, 1))


def opening(pieces: list[NDArray[_T]], n_rows: int) -> list[NDArray[_T]]:
    """Views of the first `n_rows` rows of arrays that follow one another."""
    views = []
    for piece in pieces:
        if n_rows <= 0:
            break
        views.append(piece[:n_rows])
        n_rows -= len(piece)
    return views


class PlanBuilder:
    """Collects decisions layer by layer and chunk by chunk into a Plan.

    An executor calls `chunk` once per forward pass, then `attention` and `ffn` for each layer, and
    `head` where not the whole LM head runs.
    """

    def __init__(self, shape: ModelShape, retained: IntArray | None = None) -> None:
        """Start with no tokens.

        Args:
            shape: Of the model.
            retained: As `Author.retained` tells.
        """
        self._shape = shape
        self._retained = retained
        self._chunks: list[dict[str, IntArray]] = []

    def chunk(self, n_tokens: int) -> None:
        """Begin a pass over the next `n_tokens` tokens."""
        sizes = {name: _field_shape(name, n_tokens, self._shape.n_layers) for name in _ALL}
        chunk = {name: np.empty(size, np.int32) for name, size in sizes.items()}
        chunk["head"][:] = 0
        self._chunks.append(chunk)

    @property
    def newest(self) -> dict[str, IntArray]:
        """The arrays of the newest chunk, by field, for an executor that fills them in itself."""
        return self._chunks[-1]

    def attention(self, layer: int, decision: AttentionDecision) -> None:
        """Record layer `layer`'s attention decision for the tokens of this pass."""
        rows = self._chunks[-1]
        rows["channels"][:, layer, :2] = decision.channels
        rows["bits"][:, layer, :2] = decision.bits
        rows["attention"][:, layer] = decision.run
        rows["kv_blocks"][:, layer] = decision.kv_blocks

    def ffn(self, layer: int, decision: FfnDecision) -> None:
        """Record layer `layer`'s FFN decision for the tokens of this pass."""
        rows = self._chunks[-1]
        rows["channels"][:, layer, 2:] = decision.channels
        rows["bits"][:, layer, 2:] = decision.bits
        rows["ffn"][:, layer] = decision.module

    def head(self, survivors: IntArray) -> None:
        """Record how the LM head ran for the tokens of this pass; whole unless this is called."""
        self._chunks[-1]["head"][:] = survivors

    def drop(self) -> None:
        """Forget the newest pass, which was broken off."""
        self._chunks.pop()

    def opening(self, n_tokens: int) -> PlanBuilder:
        """A builder of its own that begins with the first `n_tokens` rows, which are shared.

        `head` is whole there: who takes a token over is not asked for its logits.
        """
        other = PlanBuilder(self._shape, self._retained)
        columns = {name: opening([c[name] for c in self._chunks], n_tokens) for name in FIELDS}
        for rows in zip(*columns.values(), strict=True):
            heads = {name: np.zeros(len(rows[0]), np.int32) for name in TOKEN_FIELDS}
            other._chunks.append({**dict(zip(columns, rows, strict=True)), **heads})
        return other

    def build(self) -> Plan:
        """The Plan so far."""
        if not self._chunks:
            self.chunk(0)
        rows = {n: np.concatenate([c[n] for c in self._chunks]) for n in _ALL}
        plan, known = Plan(**rows), self._retained
        if known is None:
            return plan
        t = plan.n_tokens
        retained = np.full((t, plan.n_layers, known.shape[2]), FOREVER, np.int32)
        retained[: len(known)] = known[:t]
        return replace(plan, retained=retained)


class Author(ABC):
    """Writes the Plan of one sequence as it is computed.

    An executor calls, for each pass over the next T tokens and for each layer in order, `attention`
    and then `release`. State (a recurrent predictor's, say) lives in the author, so one author
    serves one sequence; a sequence that goes on from within another has its `fork`.

    Attributes:
        retained: (S, L, G) the last position whose query may read each of the first S entries, as
            the Plan's field; later ones stay forever. None, the default, if nothing is forgotten.
            It is known before the first token and does not change.
    """

    retained: IntArray | None = None

    @property
    def rests(self) -> bool:
        """Whether every decision is at rest by construction, so that none need be asked for."""
        return False

    def prompt(self, start: int, stop: int) -> None:
        """Be told that the coming tokens `start` to `stop` are prompt (see `vesicle.phases`).

        Authors that treat all tokens alike have no use for it.
        """
        return None

    def changes_after(self, position: int) -> int:
        """The next position from which on tokens are decided in another way; `FOREVER` if none.

        Executors cut their passes there, so that tokens at rest do not take the route of those
        that are not.
        """
        return FOREVER

    def turns(self, length: int) -> IntArray:
        """(n,) where a sequence of `length` tokens was cut for `changes_after`, rising."""
        found, at = list[int](), self.changes_after(0)
        while at < length:
            found.append(at)
            at = self.changes_after(at)
        return np.array(found, np.int32)

    def releases(self, positions: IntArray) -> NDArray[np.bool_]:
        """(T,) at which of `positions` (T,) the method's predictor runs, which costs something."""
        return np.ones(len(positions), bool)

    def fork(self, n_tokens: int) -> Author:
        """An author of its own that stands where this one stood after its first `n_tokens` tokens.

        Both go on alone. It knows all that this one knew there: its state, `retained`, and which of
        the first `n_tokens` tokens are prompt. An author without state may return a copy of itself.

        By default refused, since what an author carries is not known here: state that is shared or
        dropped would decide otherwise, without a word.

        Raises:
            VesicleError: If the author cannot tell what it was after `n_tokens`.
        """
        raise VesicleError(
            f"a sequence under {type(self).__name__} cannot be forked; give the author a method "
            "fork(n_tokens), or start a new sequence"
        )

    def rewind(self, n_tokens: int) -> None:
        """Be told that a pass was broken off: only the first `n_tokens` tokens have been read.

        Authors that carry nothing from token to token have no use for it.
        """
        return None

    def planned(self, positions: IntArray) -> dict[str, IntArray] | None:
        """What is decided for coming tokens whatever their hidden states will be.

        Args:
            positions: (T,) of the coming tokens.

        Returns:
            Rows of every field of a Plan, (T', ...) for the first T' <= T of the tokens; None, the
            default, for an author that must see hidden states.

        Raises:
            VesicleError: If nothing is decided for the first of them.
        """
        return None

    @abstractmethod
    def attention(self, layer: int, positions: IntArray) -> AttentionDecision:
        """Decide the attention of `layer` for the tokens at `positions` (T,)."""

    @abstractmethod
    def release(self, layer: int, hidden: torch.Tensor, positions: IntArray) -> FfnDecision:
        """Read the hidden state (T, D) after `layer`'s self-attention.

        Decide the FFN of `layer`.
        """

    def head(self, hidden: torch.Tensor, positions: IntArray) -> IntArray:
        """Decide how the LM head finds the likeliest token, after the last layer.

        Asked only where nothing but the likeliest token is needed.

        Args:
            hidden: (T, D) the residual stream after the last layer.
            positions: (T,) of the tokens, the last ones of the pass.

        Returns:
            (T,) survivors of a screened head; 0, the default, for the whole one.
        """
        return np.zeros(len(positions), np.int32)


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """What an executor needs, beside the model, to run a method's Plans.

    Attributes:
        ffn_standin: Where tokens go whose FFN is small.
        attention_standin: Where tokens go whose attention is skipped.
        summary: How KV blocks are summarised to choose among them: `mean` or `bounds`.
    """

    ffn_standin: StandIns | None = None
    attention_standin: StandIns | None = None
    summary: str = "mean"


class Method(ABC):
    """Anything that can write Plans for a model.

    A modulator, a control, an oracle, a saved Plan.
    """

    @abstractmethod
    def author(self, shape: ModelShape) -> Author:
        """A fresh author for one sequence on a model of `shape`."""

    @property
    def equipment(self) -> Equipment:
        """What executors need to run its Plans; nothing by default."""
        return Equipment()

    def overhead(self, shape: ModelShape) -> Overhead:
        """What the method adds to the model's own work; by default its equipment alone."""
        ffn, attention = self.equipment.ffn_standin, self.equipment.attention_standin
        return Overhead(
            ffn_standin_rank=ffn.rank if ffn else 0,
            attention_standin_rank=attention.rank if attention else 0,
            selection_vectors=1 if self.equipment.summary == "mean" else 2,
        )


class Replay(Method):
    """Executes a saved Plan again; asking for a token beyond its end is an error."""

    def __init__(self, plan: Plan, equipment: Equipment | None = None) -> None:
        """Replay `plan` with the equipment of the method that wrote it."""
        self.plan = plan
        self._equipment = equipment or Equipment()

    @property
    def equipment(self) -> Equipment:
        """As given."""
        return self._equipment

    def author(self, shape: ModelShape) -> Author:
        """An author that reads the Plan's rows by position."""
        self.plan.check(shape)
        return _ReplayAuthor(self.plan)


class _ReplayAuthor(Author):
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        if plan.forgets:
            self.retained = plan.retained

    def fork(self, n_tokens: int) -> Author:
        return copy.copy(self)

    def changes_after(self, position: int) -> int:
        turns = self._plan.turns
        at = int(np.searchsorted(turns, position, side="right"))
        return int(turns[at]) if at < len(turns) else FOREVER

    def planned(self, positions: IntArray) -> dict[str, IntArray] | None:
        if len(positions):
            self._check(int(positions[0]))
        within = positions[positions < self._plan.n_tokens]
        return {name: getattr(self._plan, name)[within] for name in _ALL}

    def _check(self, position: int) -> None:
        if position >= self._plan.n_tokens:
            raise VesicleError(
                f"the plan covers {self._plan.n_tokens} tokens; token {position} was asked for"
            )

    def attention(self, layer: int, positions: IntArray) -> AttentionDecision:
        plan = self._plan
        self._check(int(positions[-1]))
        return AttentionDecision(
            channels=plan.channels[positions, layer, :2],
            bits=plan.bits[positions, layer, :2],
            run=plan.attention[positions, layer],
            kv_blocks=plan.kv_blocks[positions, layer],
            rest=False,
        )

    def release(self, layer: int, hidden: torch.Tensor, positions: IntArray) -> FfnDecision:
        plan = self._plan
        return FfnDecision(
            channels=plan.channels[positions, layer, 2:],
            bits=plan.bits[positions, layer, 2:],
            module=plan.ffn[positions, layer],
            rest=False,
        )

    def head(self, hidden: torch.Tensor, positions: IntArray) -> IntArray:
        return self._plan.head[positions]


class Dense(Method):
    """Everything at rest, and nothing read or predicted: the dense model."""

    def author(self, shape: ModelShape) -> Author:
        """An author that always rests."""
        return _DenseAuthor(shape)


class _DenseAuthor(Author):
    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape

    @property
    def rests(self) -> bool:
        return True

    def fork(self, n_tokens: int) -> Author:
        return copy.copy(self)

    def planned(self, positions: IntArray) -> dict[str, IntArray] | None:
        return resting_rows(self._shape, positions)

    def attention(self, layer: int, positions: IntArray) -> AttentionDecision:
        return resting_attention(self._shape, positions)

    def release(self, layer: int, hidden: torch.Tensor, positions: IntArray) -> FfnDecision:
        return resting_ffn(self._shape, len(positions))
