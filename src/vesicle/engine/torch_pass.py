"""A pass in PyTorch: what a layer computes, to be read; and what runs where the core does not.

That is without the core, in fp64, and where a dense store is read at fewer bits. It counts as the
core does, and tests hold their results together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.activations import capped
from vesicle.engine.asked import Asked
from vesicle.engine.attention import Masks, attend
from vesicle.engine.counters import Counters
from vesicle.engine.linear import normalise, project, survivors
from vesicle.engine.packed import PackedHead
from vesicle.engine.previewed import PreviewedHead
from vesicle.engine.sampling import likeliest_of
from vesicle.engine.sequence import Outcome, Sequence, Wanted
from vesicle.engine.small_codes import apply_coded
from vesicle.families.base import Affine
from vesicle.plan import FFN_BIG, FFN_SMALL, IntArray, Rows, rest_head, resting_rows
from vesicle.plan.rows import OF_HEAD
from vesicle.plan.spread import as_array
from vesicle.small_modules import SmallFfn

if TYPE_CHECKING:
    from vesicle.engine.engine import Engine


class TorchPass:
    """One forward pass over N tokens of a ragged batch."""

    def __init__(self, engine: Engine, batch: list[tuple[Sequence, list[int]]]) -> None:
        self.engine = engine
        self.batch = batch
        self.sequences = [sequence for sequence, _ in batch]
        self.rows: list[slice] = []
        self.positions: list[IntArray] = []
        n = 0
        for sequence, ids in batch:
            self.rows.append(slice(n, n + len(ids)))
            n += len(ids)
            start = sequence.length
            self.positions.append(np.arange(start, start + len(ids), dtype=np.int32))
        self.all_positions = np.concatenate(self.positions)
        self.plan = resting_rows(engine.shape, self.all_positions)
        self.asked = Asked(
            engine.shape,
            [sequence.author for sequence in self.sequences],
            self.positions,
            [self.plan[rows] for rows in self.rows],
        )
        self.counters = Counters(engine.shape, n)
        self.rotations = [rotary.at(self.all_positions) for rotary in engine._rotaries]
        self.masks = Masks()

    def outcomes(self, wants: Wanted) -> list[Outcome]:
        """Run; for each sequence the logits (T, V) wanted, or the likeliest id, or an error."""
        ids = [i for _, part in self.batch for i in part]
        hidden = self.engine._weights.embed(torch.tensor(ids))
        for number in range(self.engine.shape.n_layers):
            hidden = self.layer(number, hidden)
            if len(self.asked.failed) == len(self.batch):
                break
        self.of_head = {name: self.plan[name][:, -1].copy() for name in OF_HEAD}
        rest_head(self.plan)  # unless it leaves something out below
        found: list[Outcome] = []
        for i in range(len(self.batch)):
            if i in self.asked.failed:
                found.append(self.asked.failed[i])
            elif wants == "likeliest":
                found.append(self.likeliest(i, hidden))
            else:
                found.append(self.logits(i, hidden, wants))
        for sequence, rows, released in zip(
            self.sequences, self.rows, self.asked.released, strict=True
        ):
            self.counters.released(sequence.overhead, rows, released)
        return found

    def layer(self, number: int, hidden: Tensor) -> Tensor:
        """One decoder layer, hidden (N, D)."""
        config = self.engine.config
        decided = self.plan[:, number]
        self.asked.attention(number)
        after = hidden + self.attention(number, hidden, decided)
        self.asked.ffn(number, [after[rows] for rows in self.rows])
        before = hidden if config.parallel_residual else after
        return after + self.normed_ffn(number, before, decided)

    def logits(
        self, i: int, hidden: Tensor, wanted: Literal["last", "whole", "all", "none"]
    ) -> Tensor:
        """Logits of sequence i's last, all or none of its tokens, from hidden (N, D).

        The last "whole": without a preview.
        """
        rows = self.rows[i]
        last = slice(rows.stop - 1, rows.stop)
        chosen = {"last": last, "whole": last, "all": rows, "none": slice(0, 0)}[wanted]
        x, exact = self.engine._final_norm(hidden[chosen]), self.exact(i, "logits")[chosen]
        if wanted == "whole":
            exact = np.zeros_like(exact)
        self.plan["logits"][chosen, -1] = exact
        self.counters.head(chosen, self.sequences[i].overhead, exact=exact)
        if not exact.any():
            return self.engine._weights.logits(x)
        found = torch.empty(len(x), self.engine.shape.vocabulary, dtype=x.dtype)
        whole, some = np.flatnonzero(exact == 0), np.flatnonzero(exact)
        found[whole] = self.engine._weights.logits(x[whole])
        rough = self.preview(i).logits(x[some], exact[some])
        found[some] = capped(rough, self.engine.config.logit_cap).to(x.dtype)
        return found

    def likeliest(self, i: int, hidden: Tensor) -> Outcome:
        """Id of the word most likely to follow sequence i's last token, from hidden (N, D).

        Or the error, if a logit is not finite.
        """
        engine, stop = self.engine, self.rows[i].stop
        head, last = engine._weights.head, slice(stop - 1, stop)
        position, overhead = int(self.positions[i][-1]), self.sequences[i].overhead
        exact = int(self.exact(i, "likeliest")[stop - 1])
        noise = self.sequences[i].noise
        screens = engine.shape.screens_head and noise is None
        m = int(self.of_head["head"][stop - 1]) if screens else 0
        x = engine._final_norm(hidden[last])
        if exact:
            self.plan["likeliest"][stop - 1, -1] = exact
            self.counters.head(last, overhead, exact=exact)
            ids, logits, scores = self.preview(i).best(x[0], exact, noise)
            if not scores.isfinite().all():
                logits = scores
        elif m and isinstance(head, PackedHead):
            self.plan["head"][stop - 1, -1] = m
            self.counters.head(last, overhead, m)
            (ids,), (logits,) = survivors(x, head, m)
        else:
            self.counters.head(last, overhead)
            logits = engine._weights.logits(x)[0]
            moved = logits if noise is None else logits + noise.to(logits.device)
            return likeliest_of(moved, position)
        place = likeliest_of(logits, position)
        return int(ids[place]) if isinstance(place, int) else place

    def exact(self, i: int, field: str) -> IntArray:
        """(N,) how many words a field has computed exactly; 0 where sequence i has no preview."""
        counts = self.of_head[field]
        return counts if self.sequences[i].stand_ins.head is not None else np.zeros_like(counts)

    def preview(self, i: int) -> PreviewedHead:
        """What previews the head of sequence i."""
        preview = self.sequences[i].stand_ins.head
        assert preview is not None
        return self.engine.previews.of(preview)

    def normed_ffn(self, number: int, hidden: Tensor, decided: Rows) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its input before the norm."""
        config, w = self.engine.config, self.engine._weights.layers[number]
        norm = w.ffn_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        return self.ffn(number, x, decided)

    def attention(self, number: int, hidden: Tensor, decided: Rows) -> Tensor:
        """Attention's contribution to the residual stream, (N, D)."""
        engine = self.engine
        config, shape, w = engine.config, engine.shape, engine._weights.layers[number]
        norm = w.attention_norm
        x = normalise(hidden, norm.weight, norm.bias, config.norm_eps, config.rms_norm)
        runs = decided["attention"] == 1
        channels, bits = decided["channels"], decided["bits"]
        kv, n = shape.kv_width, len(runs)
        if runs.all():
            joint, read = project(x, w.attention_in, channels[:, 0], bits[:, 0])
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
                        channels[chosen, 0],
                        bits[chosen, 0],
                        columns,
                    )
                    joint[index, : part.shape[1]] = part
        outputs = (
            w.attention_in.n_out if runs.all() else np.where(runs, w.attention_in.n_out, 2 * kv)
        )
        self.counters.projection(0, number, read, outputs, bits[:, 0])

        size = shape.head_size
        values = joint[:, :kv].view(n, shape.n_kv_heads, size)
        keys_queries = joint[:, kv:].view(n, shape.n_kv_heads + shape.n_heads, size)
        if w.query_norm is not None and w.key_norm is not None:
            keys_queries = keys_queries.to(hidden.dtype)
            keys, queries = keys_queries.split((shape.n_kv_heads, shape.n_heads), dim=1)
            keys_queries = torch.cat(
                [
                    normalise(keys, w.key_norm.weight, None, config.norm_eps, True),
                    normalise(queries, w.query_norm.weight, None, config.norm_eps, True),
                ],
                dim=1,
            )
        which = config.rotary_layers[number]
        if which is not None:
            keys_queries = engine._rotaries[which].rotate(keys_queries, self.rotations[which])
        keys, queries = keys_queries.split((shape.n_kv_heads, shape.n_heads), dim=1)

        window = int(shape.layer_windows[number])
        mixed = x.new_empty(n, shape.query_width)
        for sequence, rows, positions in zip(
            self.sequences, self.rows, self.positions, strict=True
        ):
            cache, spread = sequence.cache, as_array(sequence.stand_ins.spread)
            cache.append(number, keys[rows].transpose(0, 1), values[rows].transpose(0, 1))
            active = runs[rows]
            if not active.any():
                continue
            whole = bool(active.all())
            index = np.arange(rows.start, rows.stop)[active]
            # What a window leaves behind is never asked about.
            received = None if sequence.received is None or window else sequence.received
            asking = queries[rows] if whole else queries[torch.from_numpy(index)]
            if sequence.observed is not None and not window:
                sequence.observed.keep(number, positions[active], asking)
            out, visited, compared = attend(
                asking.to(x.dtype),
                cache,
                number,
                positions[active],
                decided["kv_blocks"][rows][active],
                config.attention_scale,
                sequence.stand_ins.summary,
                self.masks,
                None if received is None else received.sums[number],
                window,
                None if spread is None else spread[number],
                sequence.stand_ins.nearest,
            )
            if received is not None:
                self.counters.summed(number, index, visited)
            vectors = sequence.overhead.selection_vectors
            self.counters.attention(number, index, visited, compared, vectors)
            if whole:
                mixed[rows] = out
            else:
                mixed[torch.from_numpy(index)] = out
        if runs.all():
            out, read = project(mixed, w.attention_out, channels[:, 1], bits[:, 1])
            self.counters.projection(1, number, read, w.attention_out.n_out, bits[:, 1])
            return self.post_normed(out, w.attention_post_norm)
        result = torch.zeros_like(hidden)
        read = np.zeros(n, np.int32)
        if runs.any():
            index = torch.from_numpy(np.nonzero(runs)[0])
            out, read[runs] = project(
                mixed[index], w.attention_out, channels[runs, 1], bits[runs, 1]
            )
            result[index] = self.post_normed(out, w.attention_post_norm)
        self.counters.projection(1, number, read, w.attention_out.n_out, bits[:, 1])
        self.small_module("attention", number, x, ~runs, result)
        return result

    def ffn(self, number: int, x: Tensor, decided: Rows) -> Tensor:
        """The FFN's contribution to the residual stream, (N, D), from its normed input."""
        big = decided["ffn"] == FFN_BIG
        if big.all():
            return self.big_ffn(number, x, decided, None)
        result = torch.zeros_like(x)
        if big.any():
            rows = np.nonzero(big)[0].astype(np.int32)
            index = torch.from_numpy(rows)
            result[index] = self.big_ffn(number, x[index], decided, rows)
        self.small_module("ffn", number, x, decided["ffn"] == FFN_SMALL, result)
        return result

    def big_ffn(self, number: int, x: Tensor, decided: Rows, rows: IntArray | None) -> Tensor:
        """The FFN itself on the tokens `rows` (all for None), x (len(rows), D)."""
        engine, w = self.engine, self.engine._weights.layers[number]
        tokens = slice(None) if rows is None else rows
        channels, bits = decided["channels"][tokens], decided["bits"][tokens]
        inner, read = project(x, w.ffn_in, channels[:, 2], bits[:, 2])
        self.counters.projection(2, number, read, w.ffn_in.n_out, bits[:, 2], tokens)
        if engine.shape.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = engine._activation(gate) * up
        else:
            inner = engine._activation(inner)
        out, read = project(inner, w.ffn_out, channels[:, 3], bits[:, 3])
        self.counters.projection(3, number, read, w.ffn_out.n_out, bits[:, 3], tokens)
        return self.post_normed(out, w.ffn_post_norm)

    def post_normed(self, out: Tensor, norm: Affine | None) -> Tensor:
        """What a module adds to the residual stream (N, D), of which some decoders take a norm."""
        config = self.engine.config
        if norm is None:
            return out
        return normalise(out, norm.weight, norm.bias, config.norm_eps, config.rms_norm)

    def small_module(
        self, kind: str, number: int, x: Tensor, chosen: NDArray[np.bool_], result: Tensor
    ) -> None:
        """Write the small modules' outputs for the chosen tokens into `result` (N, D)."""
        for sequence, rows in zip(self.sequences, self.rows, strict=True):
            index = np.arange(rows.start, rows.stop)[chosen[rows]]
            stand_ins = sequence.stand_ins
            small = stand_ins.ffn if kind == "ffn" else stand_ins.attention
            if small is None or not len(index):  # a method without small modules skips outright
                continue
            where = torch.from_numpy(index)
            coded = kind == "ffn" and isinstance(small, SmallFfn) and small.coded
            if coded and self.engine.shape.stored_bits is not None:
                assert isinstance(small, SmallFfn)
                result[where] = apply_coded(small, number, x[where]).to(result.dtype)
            else:
                result[where] = small.apply_layer(number, x[where])
            self.counters.small_module(index, small.weights, coded)
