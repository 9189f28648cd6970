"""The engine: executes Plans by skipping work, and counts what it runs.

One pass serves tokens of one or several sequences, in prefill and in decode, whole or in chunks: a
*ragged batch* is a list of (sequence, its next tokens). Projections see all tokens side by side;
attention runs per sequence over its own cache. Each sequence has its own method, so budgets mix
freely in one pass.

Counting happens where operands are touched (rows of weights read, positions visited) and knows
nothing of the Plan's prices; `cost.price` of the recorded Plan must come to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.cost import Cost
from vesicle.engine import weights
from vesicle.engine.attention import attend
from vesicle.engine.cache import LayerCache
from vesicle.engine.counters import Counters
from vesicle.engine.decode import CachePointers, Decoder, General
from vesicle.engine.linear import normalise, project
from vesicle.engine.rotary import Rotary
from vesicle.engine.sampling import Sampling
from vesicle.errors import VesicleError
from vesicle.families.base import ACTIVATIONS
from vesicle.modulator import Modulator, ModulatorAuthor
from vesicle.plan import (
    FFN_BIG,
    FFN_SMALL,
    AttentionDecision,
    Dense,
    FfnDecision,
    FloatArray,
    IntArray,
    Method,
    Plan,
    PlanBuilder,
)
from vesicle.shapes import ModelShape


class Sequence:
    """One text being processed.

    Its method's author, its cache, its Plan and its counted cost so far.
    """

    def __init__(self, engine: Engine, method: Method) -> None:
        """Empty; use `Engine.start`."""
        shape = engine.shape
        self.method = method
        self.equipment = method.equipment
        self.overhead = method.overhead(shape)
        self.author = method.author(shape)
        self.builder = PlanBuilder(shape)
        self.caches = [
            LayerCache(shape, engine.dtype, engine.device) for _ in range(shape.n_layers)
        ]
        self.pointers = CachePointers(self.caches)
        self.token_ids: list[int] = []
        self.counted: list[dict[str, NDArray[np.int64]]] = []

    @property
    def length(self) -> int:
        """Tokens processed."""
        return self.caches[0].length

    @property
    def plan(self) -> Plan:
        """What was decided for every token."""
        return self.builder.build()

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5); empty (0, L, 5) for methods that have none."""
        if isinstance(self.author, ModulatorAuthor):
            return self.author.levels
        return np.ones((0, len(self.caches), 5))

    @property
    def token_costs(self) -> dict[str, NDArray[np.int64]]:
        """Counted work of each token (T,), by field of `Cost`."""
        if not self.counted:
            return {}
        return {k: np.concatenate([c[k] for c in self.counted]) for k in self.counted[0]}

    @property
    def cost(self) -> Cost:
        """Counted work of all tokens, and the cache held now."""
        totals = {name: int(values.sum()) for name, values in self.token_costs.items()}
        return Cost(kv_bytes_held=sum(c.bytes_held for c in self.caches), **totals)


class Engine:
    """A decoder in the engine's layout."""

    def __init__(self, loaded: weights.Weights) -> None:
        """Wrap loaded weights; use `from_pretrained` or `from_model`."""
        self._weights = loaded
        self.config = loaded.config
        self.shape: ModelShape = loaded.config.shape
        self.dtype = loaded.embedding.dtype
        self.device = loaded.embedding.device
        self._rotary = Rotary(loaded.config, self.dtype)
        self._scale = 1 / math.sqrt(self.shape.head_size)
        self._decoder = Decoder.build(loaded, self._scale)
        self._activation = ACTIVATIONS[loaded.config.activation]

    @classmethod
    def from_pretrained(
        cls, model: Path | str | None = None, *, dtype: torch.dtype | None = None
    ) -> Self:
        """Load a model: a local folder, a GGUF file, a hub id, or the default model for None.

        Raises:
            ModelError: If it cannot be found, read or supported.
        """
        from vesicle.models import resolve_model

        folder = resolve_model(None if model is None else str(model))
        return cls(weights.from_folder(folder, dtype))

    @classmethod
    def from_model(cls, model: nn.Module, *, dtype: torch.dtype | None = None) -> Self:
        """Copy the weights of a Hugging Face causal LM."""
        return cls(weights.from_model(model, dtype))

    def start(
        self, method: Method | Modulator | None = None, budget: float | None = None
    ) -> Sequence:
        """A new sequence under a method, or a modulator at a budget; dense for None.

        Raises:
            ModelError: If a modulator does not fit.
            VesicleError: If the budget is out of range, or is given without a modulator.
        """
        if isinstance(method, Modulator):
            method = method.at(method.info.default_budget if budget is None else budget)
        elif budget is not None:
            raise VesicleError("a budget applies to a modulator; this method has its own")
        return Sequence(self, method or Dense())

    @torch.inference_mode()
    def forward(
        self,
        batch: list[tuple[Sequence, list[int]]],
        logits: Literal["last", "all", "none"] = "last",
    ) -> list[Tensor]:
        """One pass over the next tokens of each sequence.

        Args:
            batch: Distinct sequences, each with at least one token id.
            logits: Which positions the LM head runs for.

        Returns:
            For each sequence, logits (1, V), (T, V) or (0, V).

        Raises:
            VesicleError: If a chunk is empty, a token id is out of range or the context window is
                exceeded.
        """
        for sequence, ids in batch:
            self._check(sequence, ids)
        run = _Pass(self, batch)
        w = self._weights
        flat = [i for _, ids in batch for i in ids]
        hidden = w.embedding[torch.tensor(flat)]
        decoder = self._decoder
        if decoder is not None and len(flat) == 1 and decoder.covers(batch[0][0].author):
            hidden = run.token(decoder, hidden)
        else:
            for number in range(self.shape.n_layers):
                hidden = run.layer(number, hidden)
        results = []
        for (sequence, ids), rows in zip(batch, run.rows, strict=True):
            wanted = {"last": slice(rows.stop - 1, rows.stop), "all": rows, "none": slice(0, 0)}
            chosen = hidden[wanted[logits]]
            results.append(self._head(chosen))
            run.counters.head(wanted[logits])
            sequence.token_ids += ids
        for (sequence, _), rows in zip(batch, run.rows, strict=True):
            sequence.counted.append(run.counters.totals(rows))
        return results

    def _check(self, sequence: Sequence, ids: list[int]) -> None:
        if not ids:
            raise VesicleError("a chunk has no tokens; give at least one")
        if min(ids) < 0 or max(ids) >= self.shape.vocabulary:
            raise VesicleError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is out of range; "
                f"allowed: 0 to {self.shape.vocabulary - 1}"
            )
        end = sequence.length + len(ids)
        if end > self.config.context_window:
            raise VesicleError(
                f"{end} tokens exceed the model's context window of {self.config.context_window}"
            )

    def _head(self, hidden: Tensor) -> Tensor:
        w = self._weights
        norm = w.final_norm
        x = normalise(hidden, norm.weight, norm.bias, self.config.norm_eps, self.config.rms_norm)
        return nn.functional.linear(x, w.head, w.head_bias)

    def stream(
        self,
        sequence: Sequence,
        prompt: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
        chunk: int = 512,
    ) -> Iterator[int]:
        """Generate token by token.

        Args:
            sequence: From `start`; may hold earlier tokens already.
            prompt: Token ids to read first.
            max_new_tokens: Most tokens to yield.
            sampling: Greedy by default.
            stop: Tokens that end the text; they are not yielded.
            chunk: Prompt tokens per prefill pass.

        Yields:
            Token ids. The last one drawn is not fed back, so its own cost is not counted.

        Raises:
            VesicleError: If the prompt is empty.
        """
        if not prompt:
            raise VesicleError("the prompt has no tokens; give at least one")
        sampling = sampling or Sampling()
        generator = sampling.generator()
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            last = start + chunk >= len(prompt)
            out = self.forward([(sequence, part)], "last" if last else "none")
        for count in range(1, max_new_tokens + 1):
            token = sampling.draw(out[0][-1], generator)
            if token in stop:
                return
            yield token
            if count == max_new_tokens or sequence.length >= self.config.context_window:
                return
            out = self.forward([(sequence, [token])])

    def generate(
        self,
        prompt: list[int],
        method: Method | Modulator | None = None,
        budget: float | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> tuple[list[int], Sequence]:
        """The new token ids after `prompt`, and the sequence with its Plan, levels and cost."""
        sequence = self.start(method, budget)
        tokens = self.stream(
            sequence, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        return list(tokens), sequence


class _Pass:
    """One forward pass over N tokens of a ragged batch."""

    def __init__(self, engine: Engine, batch: list[tuple[Sequence, list[int]]]) -> None:
        self.engine = engine
        self.sequences = [sequence for sequence, _ in batch]
        self.rows: list[slice] = []
        self.positions: list[IntArray] = []
        n = 0
        for sequence, ids in batch:
            self.rows.append(slice(n, n + len(ids)))
            n += len(ids)
            start = sequence.length
            self.positions.append(np.arange(start, start + len(ids), dtype=np.int32))
            sequence.builder.chunk(len(ids))
        self.all_positions = np.concatenate(self.positions)
        self.counters = Counters(engine.shape, n)
        self.rotation = engine._rotary.at(self.all_positions)

    def layer(self, number: int, hidden: Tensor) -> Tensor:
        """One decoder layer, hidden (N, D)."""
        config = self.engine.config
        decision = self.decide(number)
        after = hidden + self.attention(number, hidden, decision)
        ffn = self.release(number, after)
        return after + self.normed_ffn(number, hidden if config.parallel_residual else after, ffn)

    def normed_ffn(self, number: int, hidden: Tensor, decision: FfnDecision) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its input before the norm."""
        config, w = self.engine.config, self.engine._weights.layers[number]
        norm = w.ffn_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        return self.ffn(number, x, decision)

    def token(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        """All layers for the pass's only token, by the native decoder."""
        sequence = self.sequences[0]
        return decoder.token(
            hidden,
            int(self.all_positions[0]),
            sequence.author,
            sequence.builder,
            sequence.pointers,
            self.rotation,
            self.counters,
            sequence.overhead,
            General(attention=self.attention, ffn=self.normed_ffn),
        )

    def attention(self, number: int, hidden: Tensor, decision: AttentionDecision) -> Tensor:
        """Attention's contribution to the residual stream, (N, D)."""
        engine = self.engine
        config, shape, w = engine.config, engine.shape, engine._weights.layers[number]
        norm = w.attention_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        runs = decision.run == 1
        kv, n = shape.kv_width, len(runs)
        if runs.all():
            joint, read = project(x, w.attention_in, decision.channels[:, 0], decision.bits[:, 0])
        else:
            # Skipped tokens compute values and keys alone: the leading outputs.
            joint = x.new_zeros(n, w.attention_in.n_out)
            read = np.zeros(n, np.int32)
            for chosen, columns in ((runs, None), (~runs, 2 * kv)):
                if chosen.any():
                    index = torch.from_numpy(np.nonzero(chosen)[0])
                    part, read[chosen] = project(
                        x[index],
                        w.attention_in,
                        decision.channels[chosen, 0],
                        decision.bits[chosen, 0],
                        columns,
                    )
                    joint[index, : part.shape[1]] = part
        outputs = (
            w.attention_in.n_out if runs.all() else np.where(runs, w.attention_in.n_out, 2 * kv)
        )
        self.counters.projection(0, number, read, outputs, decision.bits[:, 0])

        size = shape.head_size
        values = joint[:, :kv].view(n, shape.n_kv_heads, size)
        keys_queries = joint[:, kv:].view(n, shape.n_kv_heads + shape.n_heads, size)
        if w.query_norm is not None and w.key_norm is not None:
            keys, queries = keys_queries.split((shape.n_kv_heads, shape.n_heads), dim=1)
            keys_queries = torch.cat(
                [
                    normalise(keys, w.key_norm.weight, None, config.norm_eps, True),
                    normalise(queries, w.query_norm.weight, None, config.norm_eps, True),
                ],
                dim=1,
            )
        if config.rotary_layers[number]:
            keys_queries = engine._rotary.rotate(keys_queries, self.rotation)
        keys, queries = keys_queries.split((shape.n_kv_heads, shape.n_heads), dim=1)

        mixed = x.new_empty(n, shape.query_width)
        for sequence, rows, positions in zip(
            self.sequences, self.rows, self.positions, strict=True
        ):
            cache = sequence.caches[number]
            cache.append(keys[rows].transpose(0, 1), values[rows].transpose(0, 1))
            active = runs[rows]
            if not active.any():
                continue
            whole = bool(active.all())
            index = np.arange(rows.start, rows.stop)[active]
            out, visited, compared = attend(
                queries[rows] if whole else queries[torch.from_numpy(index)],
                cache,
                positions[active],
                decision.kv_blocks[rows][active],
                engine._scale,
                sequence.equipment.summary,
            )
            vectors = sequence.overhead.selection_vectors
            self.counters.attention(number, index, visited, compared, vectors)
            if whole:
                mixed[rows] = out
            else:
                mixed[torch.from_numpy(index)] = out
        if runs.all():
            out, read = project(
                mixed, w.attention_out, decision.channels[:, 1], decision.bits[:, 1]
            )
            self.counters.projection(1, number, read, w.attention_out.n_out, decision.bits[:, 1])
            return out
        result = torch.zeros_like(hidden)
        read = np.zeros(n, np.int32)
        if runs.any():
            index = torch.from_numpy(np.nonzero(runs)[0])
            result[index], read[runs] = project(
                mixed[index], w.attention_out, decision.channels[runs, 1], decision.bits[runs, 1]
            )
        self.counters.projection(1, number, read, w.attention_out.n_out, decision.bits[:, 1])
        self.stand_in("attention", number, x, ~runs, result)
        return result

    def decide(self, number: int) -> AttentionDecision:
        """Ask the authors, record, and join their decisions (N, ...)."""
        parts = []
        for sequence, positions in zip(self.sequences, self.positions, strict=True):
            part = sequence.author.attention(number, positions)
            sequence.builder.attention(number, part)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return AttentionDecision(
            channels=np.concatenate([p.channels for p in parts]),
            bits=np.concatenate([p.bits for p in parts]),
            run=np.concatenate([p.run for p in parts]),
            kv_blocks=np.concatenate([p.kv_blocks for p in parts]),
            rest=all(p.rest for p in parts),
        )

    def release(self, number: int, hidden: Tensor) -> FfnDecision:
        """Give the authors their hidden states, record, and join their decisions."""
        parts = []
        for sequence, rows, positions in zip(
            self.sequences, self.rows, self.positions, strict=True
        ):
            part = sequence.author.release(number, hidden[rows], positions)
            sequence.builder.ffn(number, part)
            self.counters.modulator(rows, sequence.overhead)
            parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return FfnDecision(
            channels=np.concatenate([p.channels for p in parts]),
            bits=np.concatenate([p.bits for p in parts]),
            module=np.concatenate([p.module for p in parts]),
            rest=all(p.rest for p in parts),
        )

    def ffn(self, number: int, x: Tensor, decision: FfnDecision) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its normed input."""
        big = decision.module == FFN_BIG
        if big.all():
            return self.big_ffn(number, x, decision, None)
        result = torch.zeros_like(x)
        if big.any():
            rows = np.nonzero(big)[0].astype(np.int32)
            index = torch.from_numpy(rows)
            result[index] = self.big_ffn(number, x[index], decision, rows)
        self.stand_in("ffn", number, x, decision.module == FFN_SMALL, result)
        return result

    def big_ffn(
        self, number: int, x: Tensor, decision: FfnDecision, rows: IntArray | None
    ) -> Tensor:
        """The FFN itself on the tokens `rows` (all for None), x (len(rows), D)."""
        engine, w = self.engine, self.engine._weights.layers[number]
        tokens = slice(None) if rows is None else rows
        channels, bits = decision.channels[tokens], decision.bits[tokens]
        inner, read = project(x, w.ffn_in, channels[:, 0], bits[:, 0])
        self.counters.projection(2, number, read, w.ffn_in.n_out, bits[:, 0], tokens)
        if engine.shape.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = engine._activation(gate) * up
        else:
            inner = engine._activation(inner)
        out, read = project(inner, w.ffn_out, channels[:, 1], bits[:, 1])
        self.counters.projection(3, number, read, w.ffn_out.n_out, bits[:, 1], tokens)
        return out

    def stand_in(
        self, kind: str, number: int, x: Tensor, chosen: NDArray[np.bool_], result: Tensor
    ) -> None:
        """Write the stand-ins' outputs for the chosen tokens into `result` (N, D)."""
        for sequence, rows in zip(self.sequences, self.rows, strict=True):
            index = np.arange(rows.start, rows.stop)[chosen[rows]]
            equipment = sequence.equipment
            standin = equipment.ffn_standin if kind == "ffn" else equipment.attention_standin
            if standin is None or not len(index):  # a method without stand-ins skips outright
                continue
            where = torch.from_numpy(index)
            result[where] = standin.apply_layer(number, x[where])
            self.counters.stand_in(index, standin.rank)
