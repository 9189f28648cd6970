"""Passes in the native core: the next tokens of one or several sequences in one call.

The core (`engine.core`) knows every family of `vesicle.families`, packed, fp32 and bf16 weights,
and every KV format but fp64. It releases levels with the linear predictor and decides as the
effectors do; authors that know their decisions beforehand hand them over (`Author.planned`), and
all others are asked between the halves of each layer. What a token gets does not depend on how a
text is cut into passes, nor on who else is in them, as far as what is decided does not: predictors
that compute in PyTorch round otherwise with another number of tokens.

What it does not execute - fp64, fewer bits of a dense store - runs in PyTorch (`torch_pass`). Both
count alike, and tests hold their Plans and logits together.
"""

from __future__ import annotations

import ctypes
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vesicle.activations import capped
from vesicle.engine import core
from vesicle.engine.asked import Asked
from vesicle.engine.chunk import (
    OTHERS,
    ChunkBuffer,
    Decides,
    coded_module,
    parts_of,
    readable,
    small_module,
)
from vesicle.engine.linear import ChannelMajor, Projection
from vesicle.engine.packed import PackedHead, PackedPair, PackedWeight
from vesicle.engine.pool import BlockPool
from vesicle.engine.rotary import Rotary
from vesicle.engine.sampling import not_finite
from vesicle.engine.screen import Screening
from vesicle.engine.weights import Weights
from vesicle.families.base import Affine, DecoderConfig
from vesicle.modulator import ModulatorAuthor
from vesicle.plan import Author, FloatArray
from vesicle.small_modules import LowRankMaps, SmallFfn, SmallModule

if TYPE_CHECKING:
    from vesicle.engine.sequence import Outcome, Part, Sequence, Wanted

MOST_TOKENS = core.MOST_TOKENS
_WANTS: dict[Wanted, int] = {"none": 0, "last": 1, "whole": 1, "likeliest": 2, "all": 3}
"""As `VesicleWanted`."""


class NativeCore:
    """Runs passes of up to 128 tokens, of one or several sequences, natively."""

    def __init__(self, weights: Weights, config: DecoderConfig, pool: BlockPool) -> None:
        """Describe weights and pages to the library; `build` first asks whether it covers them."""
        library = core.load()
        assert library is not None
        self._library, self._weights, self._pool = library, weights, pool
        shape = config.shape
        self._shape = shape
        self._kept: list[Tensor] = []  # fp32 copies, which the structures point to
        self._rotaries = [Rotary(rotation, torch.float32) for rotation in config.rotaries]
        self._cap = config.logit_cap
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
            layer.attention_norm = self._norm(w.attention_norm)
            layer.ffn_norm = self._norm(w.ffn_norm)
            layer.query_norm, layer.key_norm = self._norm(w.query_norm), self._norm(w.key_norm)
            layer.attention_post_norm = self._norm(w.attention_post_norm)
            layer.ffn_post_norm = self._norm(w.ffn_post_norm)
            which = config.rotary_layers[number]
            layer.rotates = 0 if which is None else which + 1
            layer.window = int(shape.layer_windows[number])
        self._model = core.Model(
            n_layers=shape.n_layers,
            width=shape.width,
            heads=shape.n_heads,
            kv_heads=shape.n_kv_heads,
            size=shape.head_size,
            ffn_width=shape.ffn_width,
            vocabulary=shape.vocabulary,
            eps=config.norm_eps,
            scale=config.attention_scale,
            embedding_scale=config.embedding_scale,
            layers=ctypes.addressof(self._layers),
            rms=config.rms_norm,
            parallel=config.parallel_residual,
            gated=shape.gated,
            activation=core.ACTIVATIONS[config.activation],
            rotated=2 * len(config.rotaries[0].frequencies),
            final_norm=self._norm(weights.final_norm),
            embedding=self._head(weights.embedding, None),
            head=self._head(weights.head, weights.head_bias),
            keys=pool.keys.data_ptr(),
            values=pool.values.data_ptr(),
            key_scales=core.address(pool.key_scales),
            value_scales=core.address(pool.value_scales),
            kv_format=core.KV_FORMATS[pool.keys.dtype],
            summary_format=_summary_format(pool),
            # Keys, then values. Strides say nothing about an axis of one head.
            page_stride=2 * pool.keys[0].numel(),
        )
        self.screening = Screening(weights.head, shape.width)
        self._frames: list[_Frame] = []
        self._depth = 0  # of passes in passes: an author may read another sequence

    def clock(self) -> FloatArray:
        """Have passes measure their phases from now on.

        Returns:
            (6,) seconds of each of `core.PHASES`, added to by every pass, waiting included.
        """
        self._seconds = np.zeros(len(core.PHASES))
        self._model.seconds = self._seconds.ctypes.data
        return self._seconds

    def _summarise(self, chunk: core.Chunk) -> None:
        """Summarise all complete blocks of a sequence."""
        self._library.vesicle_summarise(
            ctypes.addressof(self._model), ctypes.addressof(chunk), core.threads()
        )

    def _fp32(self, tensor: Tensor | None) -> int | None:
        """Address of a small tensor's numbers in fp32."""
        if tensor is None:
            return None
        self._kept.append(tensor.float().contiguous())
        return self._kept[-1].data_ptr()

    def _norm(self, norm: Affine | None) -> core.Norm:
        if norm is None:
            return core.Norm()
        return core.Norm(gain=self._fp32(norm.weight), bias=self._fp32(norm.bias))

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
        rows = core.rows_of(head)
        if isinstance(head, Tensor):
            rows.bias = self._fp32(bias)
        return rows

    @classmethod
    def build(cls, weights: Weights, config: DecoderConfig, pool: BlockPool) -> NativeCore | None:
        """The core for these weights and pages, or None where it does not cover them."""
        covered = uncovered(weights, config, pool) is None
        return cls(weights, config, pool) if covered else None

    def reach(self, sequence: Sequence) -> int:
        """How many of a sequence's next tokens a pass may take; 0 if it cannot execute the next."""
        author, buffer = sequence.author, sequence.buffer()
        if not buffer.follow_small(sequence, self._executes, self._described):
            return 0
        buffer.follow_preview(sequence)
        decides = Decides.BEFORE
        if isinstance(author, ModulatorAuthor) and author.reads_hidden:
            if buffer.acts(sequence, author):
                decides = self._who(author, buffer)
        buffer.turn(sequence, decides)
        room = buffer.room(sequence)
        if room == 0 and decides is Decides.BEFORE:  # it has to see hidden states
            decides = Decides.ASKED
            buffer.turn(sequence, decides)
            room = buffer.room(sequence)
        return 0 if decides is Decides.ASKED and not self._may_ask(author, buffer) else room

    def _executes(self, module: SmallModule | None, ffn: bool) -> bool:
        """Whether the core computes a small module, in place of an FFN or of attention."""
        match module:
            case None:
                return True
            case SmallFfn():
                mine = self._model.gated, self._model.activation
                same = (module.gated, core.ACTIVATIONS.get(module.activation)) == mine
                known = ffn and same
            case _:
                known = isinstance(module, LowRankMaps)
        return known and all(map(readable, parts_of(module)))

    def _described(self, module: SmallModule | None) -> core.Small | None:
        """The structure of a small module."""
        if isinstance(module, SmallFfn) and module.coded and self._weights.packed:
            return coded_module(module)
        return small_module(module)

    def _who(self, author: ModulatorAuthor, buffer: ChunkBuffer) -> Decides:
        """Whether the core decides as a modulator does, or its author has to be asked."""
        core_can = buffer.follow_predictor(author) and buffer.follows(author, self._weights.packed)
        return Decides.CORE if core_can else Decides.ASKED

    def _may_ask(self, author: Author, buffer: ChunkBuffer) -> bool:
        """Whether the core executes whatever an author may answer."""
        if isinstance(author, ModulatorAuthor):
            return buffer.follows(author, self._weights.packed)
        return self._weights.packed and not OTHERS

    def run(self, batch: list[Part], wants: Wanted) -> list[Outcome]:
        """One pass over the next tokens of each sequence; room for them has been reserved.

        Args:
            batch: Sequences and their next token ids, `MOST_TOKENS` at most in all.
            wants: Logits of each sequence's last or all of its tokens, or none, or the likeliest
                token to follow; "whole" for the last ones without a preview.

        Returns:
            For each sequence, logits (1, V), (T, V) or (0, V), or the likeliest token's id; or what
            went wrong.
        """
        logits = self._room_for_logits(batch, wants)
        asked = [i for i, (sequence, _) in enumerate(batch) if sequence.buffer().asks]
        for sequence, _ in batch if asked else ():  # so that authors see all that was before
            sequence.flush()
            self.reach(sequence)
        if self._depth == len(self._frames):
            self._frames.append(_Frame(self._library))
        frame = self._frames[self._depth]
        self._depth += 1
        begun: list[Part] = []
        states, place = None, 0
        if wants == "likeliest" and self.screening.learns:
            states = torch.empty(sum(len(ids) for _, ids in batch), self._shape.width)
        try:
            for i, ((sequence, ids), rows) in enumerate(zip(batch, logits, strict=True)):
                buffer = sequence.buffer()
                buffer.prepare(sequence, ids, self._rotaries, self._summarise)
                begun.append((sequence, ids))
                buffer.chunk.wants = _WANTS[wants]
                if wants == "whole":
                    buffer.chunk.preview = None
                buffer.chunk.logits = None if rows is None else rows.data_ptr()
                buffer.chunk.states = None if states is None else states[place:].data_ptr()
                buffer.chunk.noise = core.address(sequence.noise)
                place += len(ids)
                frame.chunks[i] = buffer.chunk
            failed = dict[int, Exception]()
            if asked:
                failed = self._ask(frame, batch, asked)
            else:
                self._stages(frame, len(batch), 0, self._end)
        except BaseException:  # perhaps an interrupt
            for part in begun:
                with suppress(Exception):  # what went wrong first is told
                    _break_off(part)
            raise
        finally:
            self._depth -= 1
        if wants == "likeliest" and not failed:
            self.screening.count(frame.chunks[i].scored for i in range(len(batch)))
        none = torch.empty(0, self._shape.vocabulary) if wants == "none" else None
        found: list[Outcome] = []
        for i, (part, rows) in enumerate(zip(batch, logits, strict=True)):
            outcome: Outcome | None = failed.get(i)
            if outcome is None:
                outcome = _finished(part, frame.chunks[i], wants)
            if outcome is None and rows is not None:
                outcome = capped(rows, self._cap)
            found.append(next(x for x in (outcome, none) if x is not None))
        for i in failed:
            with suppress(Exception):
                _break_off(batch[i])
        if states is not None and not failed and self._depth == 0:  # else a pass has another screen
            self._model.screen = self.screening.learn(states)
        return found

    def _room_for_logits(
        self, batch: list[Part], wants: Wanted
    ) -> list[Tensor | None] | tuple[Tensor, ...]:
        """Of each sequence (1, V) or (T, V), None where none are asked for."""
        if wants not in ("last", "whole", "all"):
            return [None] * len(batch)
        sizes = [len(ids) if wants == "all" else 1 for _, ids in batch]
        return torch.empty(sum(sizes), self._shape.vocabulary).split(sizes)

    @property
    def _end(self) -> int:
        """Stages of a pass: attention and FFN of each layer by turns, and the head."""
        return 2 * self._shape.n_layers + 1

    def _stages(self, frame: _Frame, n: int, first: int, last: int) -> None:
        """Run stages `first` to `last` of a pass over n chunks."""
        self._library.vesicle_pass(
            frame.handle,
            ctypes.addressof(self._model),
            ctypes.addressof(frame.chunks),
            n,
            first,
            last,
            core.threads(),
        )

    @torch.inference_mode()
    def _ask(self, frame: _Frame, batch: list[Part], asked: list[int]) -> dict[int, Exception]:
        """Run a pass and ask some of its authors before each stage; what went wrong, by place."""
        sequences = [batch[i][0] for i in asked]
        lengths = [len(batch[i][1]) for i in asked]
        hidden = torch.empty(sum(lengths), self._shape.width).split(lengths)
        for i, rows in zip(asked, hidden, strict=True):
            frame.chunks[i].hidden = rows.data_ptr()
        parts = [(s.buffer(), s.buffer().next(n)) for s, n in zip(sequences, lengths, strict=True)]
        asking = Asked(
            self._shape,
            [sequence.author for sequence in sequences],
            [
                np.arange(sequence.length, sequence.length + n, dtype=np.int32)
                for sequence, n in zip(sequences, lengths, strict=True)
            ],
            [buffer.plan[part] for buffer, part in parts],
        )

        def run(stage: int) -> None:
            for sequence, _ in batch:  # perhaps by the author that was asked
                sequence.cache.check_open()
            self._stages(frame, len(batch), stage, stage + 1)

        for layer in range(self._shape.n_layers):
            asking.attention(layer)
            run(2 * layer)
            asking.ffn(layer, [rows.clone() for rows in hidden])  # theirs to keep
            run(2 * layer + 1)
            if len(asking.failed) == len(batch):
                break
        else:
            run(self._end - 1)
        for (buffer, part), released in zip(parts, asking.released, strict=True):
            buffer.released[part] = released
        return {asked[i]: error for i, error in asking.failed.items()}


class _Frame:
    """A pass of the core under way, and the chunks that it is of."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.handle = library.vesicle_open()
        self.chunks = (core.Chunk * MOST_TOKENS)()
        weakref.finalize(self, library.vesicle_close, self.handle).atexit = False


def _finished(part: Part, chunk: core.Chunk, wants: Wanted) -> Outcome | None:
    """Take over what the core has done for a sequence: the likeliest id, None for logits."""
    sequence, ids = part
    start, buffer = sequence.length, sequence.buffer()
    buffer.chunk.lost = chunk.lost
    lost = buffer.lost  # otherwise levels that are no numbers would be taken for rest
    if wants == "likeliest" and chunk.likeliest < 0:  # where a logit is not finite
        lost = len(ids) - 1
    sequence.advance(ids)
    buffer.done(sequence, {"none": 0, "all": len(ids)}.get(wants, 1))
    if lost >= 0:
        return not_finite(start + lost)
    return int(chunk.likeliest) if wants == "likeliest" else None


def _break_off(part: Part) -> None:
    """Have a sequence forget the pass that it was in."""
    sequence, ids = part
    sequence.buffer().drop(len(ids))
    sequence.break_off()


def uncovered(weights: Weights, config: DecoderConfig, pool: BlockPool) -> str | None:
    """What the core does not cover about these weights and pages, in a few words; None for nothing.

    That there is no core comes first.
    """
    dtype = weights.dtype
    known = {
        "the native core is missing": core.available(),
        f"weights are {weights.format}": weights.packed or dtype in (torch.float32, torch.bfloat16),
        f"weights are on {weights.device}": weights.device.type == "cpu",
        f"keys and values are {pool.kv}": pool.keys.dtype in core.KV_FORMATS,
        f"the model's activation is {config.activation!r}": (config.activation in core.ACTIVATIONS),
    }
    return next((what for what, fine in known.items() if not fine), None)


def _dense_format(weight: Tensor) -> int:
    return core.DENSE32 if weight.dtype == torch.float32 else core.DENSE_BF16


def _summary_format(pool: BlockPool) -> int:
    return core.KV_FORMATS[torch.float16 if pool.keys.dtype == torch.int8 else pool.keys.dtype]
