"""The GPU engine: decodes with kernels that read the Plan in device memory.

One decode step of 1 to 16 sequences is a fixed list of kernel launches. What each does depends on
device memory alone (the Plan's rows, positions, page tables), so on CUDA the list is captured once
per batch size as a CUDA graph and replayed for every Plan. The linear predictor and its effectors
run inside it. Rows of the Plan are *given* before a step (the dense model, a saved Plan) or
*released* in it (a modulator); they are read back, with what was counted, when someone asks.

Prefill runs the same kernels on one row per token, with PyTorch's products in place of the skinny
ones; there, channels that a token does not read are zeroed, not skipped, while tokens are gathered
by the modules that they run. Authors that must see hidden states on the CPU (other predictors) are
served by that path too, in decoding one token at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.cost import Cost
from vesicle.engine.sampling import Sampling
from vesicle.errors import VesicleError
from vesicle.gpu import weights
from vesicle.gpu.cache import PagePool
from vesicle.gpu.steps import (
    BLOCKS,
    FFN,
    MOST_ROWS,
    N_FIELDS,
    RUN,
    Gear,
    Rows,
    Steps,
    load_kernels,
)
from vesicle.modulator import Modulator, ModulatorAuthor, ModulatorMethod
from vesicle.phases import EVERYWHERE
from vesicle.plan import (
    BLOCK,
    FFN_BIG,
    FFN_SMALL,
    FULL_BITS,
    Dense,
    FloatArray,
    IntArray,
    Method,
    Plan,
    PlanBuilder,
    Replay,
    visible_blocks,
)
from vesicle.predictors.linear import LinearPredictor

_RING = 32
"""Decode steps whose Plan rows are kept on the device before they are read back."""
_AHEAD = 16
"""Tokens that greedy generation draws before it looks at them."""


class GpuSequence:
    """One text being processed: its pages, its Plan and its counted cost so far."""

    def __init__(self, engine: GpuEngine, method: Method) -> None:
        """Empty; use `GpuEngine.start`."""
        shape = engine.shape
        self.method = method
        self.equipment = method.equipment
        self.overhead = method.overhead(shape)
        self.author = method.author(shape)
        self.builder = PlanBuilder(shape)
        self.length = 0
        self.token_ids: list[int] = []
        self.pages: list[int] = []
        self.counted: list[dict[str, NDArray[np.int64]]] = []
        self._engine = engine
        # Pages go back when the sequence is closed, or dropped.
        self.close = weakref.finalize(self, engine.pool.release, self.pages)
        author = self.author
        self.given = author.rests or isinstance(method, Replay)
        self.releases = (
            not self.given
            and isinstance(author, ModulatorAuthor)
            and isinstance(author.modulator.predictor, LinearPredictor)
        )
        self.limit = engine.max_length
        if isinstance(method, Replay):
            self.limit = min(self.limit, method.plan.n_tokens)

    @property
    def plan(self) -> Plan:
        """What was decided for every token."""
        self._engine.flush()
        return self.builder.build()

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5); empty (0, L, 5) for methods that have none."""
        self._engine.flush()
        if isinstance(self.author, ModulatorAuthor):
            return self.author.levels
        return np.ones((0, self._engine.shape.n_layers, 5))

    @property
    def token_costs(self) -> dict[str, NDArray[np.int64]]:
        """Counted work of each token (T,), by field of `Cost`."""
        self._engine.flush()
        if not self.counted:
            return {}
        return {k: np.concatenate([c[k] for c in self.counted]) for k in self.counted[0]}

    @property
    def cost(self) -> Cost:
        """Counted work of all tokens, and the cache held now."""
        shape = self._engine.shape
        totals = {name: int(values.sum()) for name, values in self.token_costs.items()}
        held = shape.n_layers * shape.position_bytes * self.length
        return Cost(kv_bytes_held=held, **totals)

    def given_rows(self, start: int, n: int) -> IntArray:
        """The Plan (n, L, 7) before anything is released: rest, or a saved Plan's rows."""
        positions = np.arange(start, start + n, dtype=np.int32)
        shape = self._engine.shape
        rows = np.empty((n, shape.n_layers, N_FIELDS), np.int32)
        rows[..., :4] = shape.site_widths
        rows[..., FFN], rows[..., RUN] = FFN_BIG, 1
        rows[..., BLOCKS] = visible_blocks(positions)[:, None]
        if isinstance(self.method, Replay):
            plan = self.method.plan.tokens(start, start + n)
            known = rows[: plan.n_tokens]
            known[..., :4], known[..., FFN] = plan.channels, plan.ffn
            known[..., RUN], known[..., BLOCKS] = plan.attention, plan.kv_blocks
        return rows

    def record(
        self, rows: IntArray, counts: IntArray, levels: FloatArray | None, heads: NDArray[np.bool_]
    ) -> None:
        """Keep the Plan (n, L, 7), counts (n, L, 6) and levels (n, L, 5) of n tokens.

        heads (n,): where the LM head ran.
        """
        self.builder.chunk(len(rows))
        newest = self.builder.newest
        newest["channels"][:] = rows[..., :4]
        newest["bits"][:] = FULL_BITS
        newest["ffn"][:], newest["attention"][:] = rows[..., FFN], rows[..., RUN]
        newest["kv_blocks"][:] = rows[..., BLOCKS]
        if levels is not None and self.releases:
            assert isinstance(self.author, ModulatorAuthor)
            self.author.adopt(levels)
        self.counted.append(self._price(rows, counts.astype(np.int64), heads))

    def _price(
        self, rows: IntArray, counts: NDArray[np.int64], heads: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.int64]]:
        """Fields of `Cost` from the device's counts, with the conventions of `cost`."""
        shape, overhead = self._engine.shape, self.overhead
        outputs = np.broadcast_to(np.array(shape.site_outputs), (*rows.shape[:2], 4)).copy()
        outputs[..., 0] = np.where(rows[..., RUN] == 1, outputs[..., 0], 2 * shape.kv_width)
        numbers = (counts[..., :4] * outputs).sum((1, 2))
        visited, compared = counts[..., 4].sum(1), counts[..., 5].sum(1)
        compared = compared * overhead.selection_vectors
        small, skipped = rows[..., FFN] == FFN_SMALL, rows[..., RUN] == 0
        standin = small.sum(1) * overhead.ffn_standin_rank
        standin = (standin + skipped.sum(1) * overhead.attention_standin_rank) * 2 * shape.width
        head = heads.astype(np.int64) * shape.width * shape.vocabulary
        bits = int(shape.charged_bits(np.array(FULL_BITS)))
        n = np.ones(len(rows), np.int64) * shape.n_layers
        return {
            "flops_linear": 2 * numbers,
            "flops_attention": 4 * shape.query_width * visited,
            "flops_selection": 2 * shape.query_width * compared,
            "flops_standin": 2 * standin,
            "flops_modulator": n * overhead.modulator_flops,
            "flops_head": 2 * head,
            "weight_bytes": (numbers * bits + head * shape.charged_head_bits) // 8
            + standin * shape.weight_bytes
            + n * overhead.modulator_bytes,
            "kv_bytes_read": shape.position_bytes * visited + shape.summary_vector_bytes * compared,
        }


class _Batch:
    """Sequences that decode side by side, and how far they are through their ring of steps."""

    def __init__(
        self,
        sequences: list[GpuSequence],
        rows: Rows,
        run: Callable[[], None],
        capacity: int,
    ) -> None:
        self.sequences, self.rows, self.run = sequences, rows, run
        self.capacity = capacity
        self.done = self.recorded = 0

    def holds(self, sequences: list[GpuSequence]) -> bool:
        return len(sequences) == len(self.sequences) and all(
            a is b for a, b in zip(sequences, self.sequences, strict=True)
        )


class GpuEngine:
    """A Llama-shaped decoder on a GPU."""

    def __init__(
        self,
        loaded: weights.Weights,
        kernels: Any,
        *,
        max_tokens: int = 16384,
        graphs: bool = True,
    ) -> None:
        """Wrap packed weights; use `from_pretrained` or `from_model`.

        Args:
            loaded: The decoder.
            kernels: From `load_kernels`.
            max_tokens: Positions that the cache holds, over all sequences.
            graphs: Whether decode steps are captured as CUDA graphs; ignored without CUDA.

        Raises:
            VesicleError: If `max_tokens` is not positive.
        """
        if max_tokens < 1:
            raise VesicleError(f"max_tokens is {max_tokens}; allowed: 1 and above")
        config = loaded.config
        self.config, self.shape = config, config.shape
        self.weights = loaded
        self.device, self.dtype = loaded.embedding.device, loaded.embedding.dtype
        self.max_length = min(config.context_window, max_tokens)
        self.pool = PagePool(self.shape, max_tokens, self.dtype, self.device)
        angles = torch.arange(self.max_length).float()[:, None] * config.rotary_frequencies.float()
        self._rotation = (
            (angles.cos() * config.rotary_scale).to(self.device),
            (angles.sin() * config.rotary_scale).to(self.device),
        )
        self._kernels = kernels
        self._graphs = graphs and self.device.type == "cuda"
        self._most = max(16, 1 << (-(-self.max_length // BLOCK) - 1).bit_length())
        self._steps: dict[tuple[Any, ...], Steps] = {}
        self._memories: dict[tuple[Steps, int], tuple[Rows, Callable[[], None]]] = {}
        self._batch: _Batch | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        weight_format: str = "bf16",
        device: torch.device | str | None = None,
        max_tokens: int = 16384,
        graphs: bool = True,
    ) -> Self:
        """Load a model: a local folder, a GGUF file, a hub id, or the default model for None.

        Args:
            model: Which.
            revision: Branch, tag or commit of a hub id; its main branch by default.
            token: For private and gated models on the hub; by default what its client has saved.
            weight_format: `bf16`, `int8`, `int4`, or `fp32` for tests.
            device: The GPU by default.
            max_tokens: Positions that the cache holds, over all sequences.
            graphs: Whether decode steps are captured as CUDA graphs.

        Raises:
            ModelError: If it cannot be found or read, or is not of Llama's shape.
            VesicleError: If Triton or a GPU is missing.
        """
        from vesicle.models import resolve_model

        kernels, where = load_kernels(device)
        folder = resolve_model(model, revision=revision, token=token)
        loaded = weights.from_folder(folder, weight_format, where)
        return cls(loaded, kernels, max_tokens=max_tokens, graphs=graphs)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        weight_format: str = "bf16",
        device: torch.device | str | None = None,
        max_tokens: int = 16384,
        graphs: bool = True,
    ) -> Self:
        """Copy the weights of a Hugging Face causal LM; arguments as in `from_pretrained`."""
        kernels, where = load_kernels(device)
        loaded = weights.from_model(model, weight_format, where)
        return cls(loaded, kernels, max_tokens=max_tokens, graphs=graphs)

    def start(
        self, method: Method | Modulator | None = None, budget: float | None = None
    ) -> GpuSequence:
        """A new sequence under a method, or a modulator at a budget; dense for None.

        Raises:
            ModelError: If a modulator does not fit.
            VesicleError: If the budget is out of range or given without a modulator, or if the
                method asks for fewer weight bits than are stored, or forgets entries of the cache.
        """
        if isinstance(method, Modulator):
            method = method.at(budget, EVERYWHERE)
        elif budget is not None:
            raise VesicleError("a budget applies to a modulator; this method has its own")
        if isinstance(method, ModulatorMethod) and not (method.at_rest or method.counts_prompt):
            raise VesicleError("the GPU engine governs every token; give the method EVERYWHERE")
        sequence = GpuSequence(self, method or Dense())
        author = sequence.author
        if author.retained is not None:
            raise VesicleError("the GPU engine forgets no entries of its cache; use the engine")
        if isinstance(method, Replay):
            _check_bits(method.plan.bits)
        elif isinstance(author, ModulatorAuthor) and not author.rests:
            _check_bits(np.array([bits for _, bits in author.modulator.dopamine.bits_ladder]))
        return sequence

    @torch.inference_mode()
    def forward(
        self,
        batch: list[tuple[GpuSequence, list[int]]],
        logits: Literal["last", "all", "none"] = "last",
    ) -> list[Tensor]:
        """One pass over the next tokens of each sequence.

        One token each of up to 16 sequences is one decode step. Anything else is prefill, sequence
        by sequence.

        Args:
            batch: Distinct sequences, each with at least one token id.
            logits: Which positions the LM head runs for; decode steps always run it.

        Returns:
            For each sequence, logits (1, V), (T, V) or (0, V) fp32 on the device.

        Raises:
            VesicleError: If a chunk is empty, a token id is out of range, or the context window,
                the cache or a replayed Plan is exceeded.
        """
        for sequence, ids in batch:
            self._check(sequence, ids)
        sequences = [sequence for sequence, _ in batch]
        if (
            len(batch) <= MOST_ROWS
            and all(len(ids) == 1 for _, ids in batch)
            and all(s.given or s.releases for s in sequences)
        ):
            self._step(sequences, [ids[0] for _, ids in batch])
            assert self._batch is not None
            out = self._batch.rows.logits.clone()
            return [out[i : i + 1, :] if logits != "none" else out[:0] for i in range(len(batch))]
        self._leave()
        return [self._prefill(sequence, ids, logits) for sequence, ids in batch]

    def _check(self, sequence: GpuSequence, ids: list[int]) -> None:
        if not ids:
            raise VesicleError("a chunk has no tokens; give at least one")
        if min(ids) < 0 or max(ids) >= self.shape.vocabulary:
            raise VesicleError(
                f"token id {min(ids) if min(ids) < 0 else max(ids)} is out of range; "
                f"allowed: 0 to {self.shape.vocabulary - 1}"
            )
        if sequence.length + len(ids) > sequence.limit:
            raise VesicleError(
                f"{sequence.length + len(ids)} tokens exceed this sequence's limit of "
                f"{sequence.limit} (the context window, max_tokens, or a replayed plan)"
            )

    # Decoding -----------------------------------------------------------------------------------

    def _step(self, sequences: list[GpuSequence], ids: list[int] | None) -> None:
        """One decode step; ids None feeds what the last step drew."""
        batch = self._batch
        if batch is None or not batch.holds(sequences) or batch.done == batch.capacity:
            self._leave()
            batch = self._enter(sequences)
        if ids is not None:
            batch.rows.tokens.copy_(torch.tensor(ids))
        batch.run()
        batch.done += 1
        for sequence in sequences:
            sequence.length += 1
        if ids is not None:
            for sequence, token in zip(sequences, ids, strict=True):
                sequence.token_ids.append(token)

    def _key(self, sequences: list[GpuSequence]) -> tuple[Any, ...]:
        """What the launches depend on: the modules that some row may need."""
        wanted = [s for s in sequences if not s.author.rests]
        predictors = [
            s.author.modulator
            for s in wanted
            if s.releases and isinstance(s.author, ModulatorAuthor)
        ]
        slots: dict[str, list[Any]] = {
            "FFN stand-in": [s.equipment.ffn_standin for s in wanted],
            "attention stand-in": [s.equipment.attention_standin for s in wanted],
            "modulator": predictors,
        }
        key: list[Any] = []
        for name, modules in slots.items():
            distinct = {id(m): m for m in modules if m is not None}
            if len(distinct) > 1:
                raise VesicleError(
                    f"sequences of one batch have {len(distinct)} different {name}s; allowed: 1"
                )
            key.append(next(iter(distinct.values()), None))
        return (*key, bool(wanted))

    def _steps_for(self, sequences: list[GpuSequence]) -> Steps:
        key = self._key(sequences)
        if key not in self._steps:
            ffn, attention, modulator, chooses = key
            source = modulator or Modulator.new(self.shape, ffn_rank=1, attention_rank=1)
            gear = Gear.make(
                ffn,
                attention,
                None if modulator is None else modulator.predictor,
                (source.dopamine, source.serotonin, source.gaba),
                chooses,
                self.dtype,
                self.device,
            )
            self._steps[key] = Steps(self._kernels, self.weights, self.pool, gear, self._rotation)
        return self._steps[key]

    def _enter(self, sequences: list[GpuSequence]) -> _Batch:
        """Bring sequences' tables and given rows to the device, for a ring of steps."""
        if len({id(s) for s in sequences}) < len(sequences):
            raise VesicleError("a sequence stands twice in one batch")
        rows, run = self._memory(sequences)
        # What this step needs, or an error; then what the ring would like.
        for sequence in sequences:
            self.pool.grow(sequence.pages, sequence.length + 1)
        for sequence in sequences:
            room = BLOCK * (len(sequence.pages) + self.pool.free_pages)
            wish = min(sequence.length + _RING, self.max_length, room)
            self.pool.grow(sequence.pages, wish)
        capacity = min(BLOCK * len(s.pages) - s.length for s in sequences)
        table = np.zeros(rows.table.shape, np.int32)
        for row, sequence in enumerate(sequences):
            table[row, : len(sequence.pages)] = sequence.pages
        given = np.stack([s.given_rows(s.length, _RING) for s in sequences], axis=1)
        rows.table.copy_(torch.from_numpy(table))
        rows.plan.copy_(torch.from_numpy(given))
        rows.counts.zero_()
        rows.levels.fill_(1.0)
        rows.step.zero_()
        rows.positions.copy_(torch.tensor([s.length for s in sequences]))
        self._set_release(rows, sequences)
        self._batch = _Batch(sequences, rows, run, min(capacity, _RING))
        return self._batch

    def _set_release(self, rows: Rows, sequences: list[GpuSequence]) -> None:
        """Dial, release flag and block summary of each row, or of all rows for one sequence."""
        dials = [
            s.author.dial if s.releases and isinstance(s.author, ModulatorAuthor) else 0.5
            for s in sequences
        ]
        rows.dial.copy_(torch.tensor([math.log((1 - d) / d) for d in dials], dtype=torch.float64))
        rows.released.copy_(torch.tensor([int(s.releases) for s in sequences]))
        rows.kind.copy_(torch.tensor([int(s.equipment.summary == "bounds") for s in sequences]))

    def _memory(self, sequences: list[GpuSequence]) -> tuple[Rows, Callable[[], None]]:
        """Memory for a batch size and gear, and what runs a step; captured at its first use."""
        steps, n = self._steps_for(sequences), len(sequences)
        if (steps, n) not in self._memories:
            rows = Rows(
                self.weights, n, steps=_RING, most=self._most, wide=False, device=self.device
            )
            run = self._capture(steps, rows).replay if self._graphs else partial(steps.decode, rows)
            self._memories[steps, n] = (rows, run)
        return self._memories[steps, n]

    def _capture(self, steps: Steps, rows: Rows) -> torch.cuda.CUDAGraph:
        """Compile the kernels by one step, then capture another; all of it on page 0."""
        shape = self.shape
        rows.plan[..., :4] = torch.tensor(shape.site_widths, dtype=torch.int32, device=self.device)
        rows.plan[..., FFN], rows.plan[..., RUN], rows.plan[..., BLOCKS] = FFN_BIG, 1, 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            steps.decode(rows)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps.decode(rows)
        return graph

    @torch.inference_mode()
    def flush(self, keep: list[int] | None = None) -> None:
        """Read back the Plans and counts of decode steps since the last time.

        Args:
            keep: For each row, steps to keep of those; the others are undone. All by default.
        """
        batch = self._batch
        if batch is None or batch.done == batch.recorded:
            return
        span = slice(batch.recorded, batch.done)
        plan, counts, levels = (
            t[span].cpu().numpy() for t in (batch.rows.plan, batch.rows.counts, batch.rows.levels)
        )
        for row, sequence in enumerate(batch.sequences):
            n = len(plan) if keep is None else keep[row]
            sequence.length -= len(plan) - n
            sequence.record(
                plan[:n, row], counts[:n, row], levels[:n, row], np.ones(n, dtype=np.bool_)
            )
        batch.recorded = batch.done
        if keep is not None:
            self._batch = None  # the device's positions are ahead of the sequences

    def _leave(self) -> None:
        self.flush()
        self._batch = None

    # Prefill ------------------------------------------------------------------------------------

    def _prefill(self, sequence: GpuSequence, ids: list[int], logits: str) -> Tensor:
        n, start = len(ids), sequence.length
        end = start + n
        self.pool.grow(sequence.pages, end)
        most = max(16, 1 << (len(sequence.pages) - 1).bit_length())
        rows = Rows(self.weights, n, steps=1, most=most, wide=True, device=self.device)
        steps = self._steps_for([sequence])
        rows.table[0, : len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
        rows.positions.copy_(torch.arange(start, end))
        rows.plan.copy_(torch.from_numpy(sequence.given_rows(start, n))[None])
        self._set_release(rows, [sequence])
        tokens = torch.tensor(ids, device=self.device)
        rows.hidden.copy_(self.weights.embedding[tokens])
        hosted = None if sequence.given or sequence.releases else sequence.author
        positions = np.arange(start, end, dtype=np.int32)
        for number in range(self.shape.n_layers):
            plan = rows.plan[0, :, number]
            if hosted is not None:
                decision = hosted.attention(number, positions)
                _check_bits(decision.bits)
                plan[:, :2] = torch.from_numpy(decision.channels).to(self.device)
                plan[:, RUN] = torch.from_numpy(decision.run).to(self.device)
                plan[:, BLOCKS] = torch.from_numpy(decision.kv_blocks).to(self.device)
            steps.attention(rows, number)
            steps.settle(rows, number)
            if hosted is not None:
                ffn = hosted.release(number, rows.hidden.cpu(), positions)
                _check_bits(ffn.bits)
                plan[:, 2:4] = torch.from_numpy(ffn.channels).to(self.device)
                plan[:, FFN] = torch.from_numpy(ffn.module).to(self.device)
            steps.ffn(rows, number, settled=True)
        steps.head(rows)
        sequence.length = end
        sequence.token_ids += ids
        which = {"last": slice(n - 1, n), "all": slice(0, n), "none": slice(0, 0)}[logits]
        heads = np.zeros(n, np.bool_)
        heads[which] = True
        plans, counts, levels = (t[0].cpu().numpy() for t in (rows.plan, rows.counts, rows.levels))
        sequence.record(plans, counts, levels, heads)
        return steps.logits(rows, which)

    # Text ---------------------------------------------------------------------------------------

    def stream(
        self,
        sequence: GpuSequence,
        prompt: list[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
        chunk: int = 512,
    ) -> Iterator[int]:
        """Generate token by token; arguments as in `engine.Engine.stream`.

        Greedy tokens are drawn on the device, 16 at a time, without waiting for each.

        Raises:
            VesicleError: If the prompt is empty.
        """
        if not prompt:
            raise VesicleError("the prompt has no tokens; give at least one")
        sampling = sampling or Sampling()
        generator = sampling.generator()
        out: list[Tensor] = []
        for start in range(0, len(prompt), chunk):
            last = start + chunk >= len(prompt)
            out = self.forward(
                [(sequence, prompt[start : start + chunk])], "last" if last else "none"
            )
        token = sampling.draw(out[0][-1].cpu(), generator)
        left = max_new_tokens
        while left > 0 and token not in stop:
            yield token
            left -= 1
            n = min(left, _AHEAD, sequence.limit - sequence.length)
            if n < 1:
                return
            if sampling.temperature == 0 and (sequence.given or sequence.releases):
                drawn = self.decode([sequence], [token], n, stop)[0]
                yield from (t for t in drawn[:-1] if t not in stop)
                left -= len(drawn) - 1
                token = drawn[-1]
            else:
                out = self.forward([(sequence, [token])])
                token = sampling.draw(out[0][-1].cpu(), generator)

    @torch.inference_mode()
    def decode(
        self,
        sequences: list[GpuSequence],
        tokens: list[int],
        n_steps: int,
        stop: frozenset[int] = frozenset(),
    ) -> list[list[int]]:
        """Greedy steps of 1 to 16 sequences, each fed what the one before drew, without waiting.

        Args:
            sequences: Distinct, given or with a linear predictor.
            tokens: The first token that each is fed.
            n_steps: Most steps.
            stop: Tokens that end a sequence: later steps of it are undone.

        Returns:
            For each sequence the tokens drawn, up to and with the first one in `stop`. The last one
            has not been fed.

        Raises:
            VesicleError: As `forward`; also for a method that decides on the CPU.
        """
        if not 1 <= len(sequences) <= MOST_ROWS:
            raise VesicleError(f"{len(sequences)} sequences; allowed: 1 to {MOST_ROWS}")
        if not all(s.given or s.releases for s in sequences):
            raise VesicleError("this method decides on the CPU; use forward, one token at a time")
        for sequence, token in zip(sequences, tokens, strict=True):
            self._check(sequence, [token] * n_steps)
        results: list[list[int]] = [[] for _ in sequences]
        self._leave()  # a fresh ring, so that undone steps are all in it
        fed: list[int] | None = tokens
        while len(results[0]) < n_steps:
            batch = self._enter(sequences)
            n = min(n_steps - len(results[0]), batch.capacity)
            for _ in range(n):
                self._step(sequences, fed)
                fed = None
            drawn = batch.rows.drawn[:n].t().tolist()
            over = [next((i for i, t in enumerate(d) if t in stop), None) for d in drawn]
            keep = [n if end is None else end + 1 for end in over]
            for sequence, result, row, count in zip(sequences, results, drawn, keep, strict=True):
                result += row[:count]
                # _step noted the first token; the rest were fed as they were drawn.
                sequence.token_ids += row[: count - 1]
            stopped = any(end is not None for end in over)
            self.flush(keep if stopped else None)
            if stopped:
                break
            fed = [row[-1] for row in drawn]
            self._leave()
        return results

    def generate(
        self,
        prompt: list[int],
        method: Method | Modulator | None = None,
        budget: float | None = None,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> tuple[list[int], GpuSequence]:
        """The new token ids after `prompt`, and the sequence with its Plan, levels and cost."""
        sequence = self.start(method, budget)
        tokens = self.stream(
            sequence, prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop
        )
        return list(tokens), sequence


def _check_bits(bits: IntArray) -> None:
    """Refuse decisions for fewer bits than are stored."""
    wrong = bits[bits != FULL_BITS]
    if len(wrong):
        raise VesicleError(
            f"a plan asks for {int(wrong[0])} weight bits; the GPU engine reads weights as stored "
            f"(allowed: {FULL_BITS})"
        )
