"""Report: the record of a benchmark, with units and provenance; written as one JSON file.

A *turn* is one contender reading its prompts and taking its steps once; a *round* is one turn of
every contender on the same text. Each quantity has one value a round; a row gives their median and
quartiles. Ratios are taken within rounds, so that a slow spell of the machine hits both sides.

With B sequences of T prompt tokens, a step feeds one token to each of the B:

    prefill tokens/s = B T / prefill seconds          first token = prefill seconds
    decode ms/step = mean over the turn's steps       decode tokens/s = B / step seconds
    bytes/token = bytes of a step / B                 share = bytes / (seconds * bandwidth)
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from typing import Any, Self

from vesicle.bench.contenders import REST
from vesicle.records import Record, checked

SCHEMA = "vesicle-bench-1"

SPREAD_LIMIT = 0.15
"""Quartile distance of a row's decode times over their median, above which it is not valid."""

LEAST_ROUNDS = 3
"""Rounds from which a spread says anything."""

AGREEMENT_LIMIT, LEAST_COMPARED = 0.8, 32
"""Least share of equal greedy tokens where nothing is left out, and tokens it takes to tell."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with its quartiles, in the unit of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Median and interpolated quartiles of values; a single one stands for all three."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)

    @property
    def relative(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a worker measured in one turn; see `measure.measure`, and `disturbed` by the parent.

    Attributes:
        phases: Of this engine, by phase of a step: its `s`econds, and the `bytes` it reads at rest.
        energy_j: What the processor's packages used during the turn, in J; None where not told.
        disturbed: What else ran on the machine, in words; None if nothing did.
    """

    prefill_s: float
    steps_s: list[float]
    greedy: list[list[int]]
    step_bytes: float
    executed_share: float | None = None
    peak_bytes: int | None = None
    cpu_s: float | None = None
    phases: dict[str, dict[str, float]] | None = None
    energy_j: float | None = None
    disturbed: str | None = None

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return statistics.fmean(self.steps_s)

    @property
    def request_s(self) -> float:
        """Seconds of the whole: the prompt and all steps."""
        return self.prefill_s + sum(self.steps_s)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A prompt length and batch size."""

    prompt_tokens: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one prompt length and batch size.

    Attributes:
        contender: Its name.
        prompt_tokens: T, of each sequence.
        batch: B sequences.
        new_tokens: Decode steps of a turn.
        rounds: Turns that these numbers are from.
        prefill_tokens_per_s: Of all sequences together.
        first_token_ms: Until every sequence has its first token.
        decode_ms_per_step: A step gives every sequence one token.
        decode_tokens_per_s: Of all sequences together.
        bytes_per_token: Read by a decode step, weights once and each sequence's cache, over B.
        bandwidth_share: Of the machine's measured read bandwidth, in decoding.
        executed_share: Executed FLOPs over the dense model's, in decoding; this engine's only.
        peak_memory_bytes: Most memory in RAM during a turn, libraries and mapped files included.
        own_memory_bytes: The same less what the process held before it read the weights.
        agreement: Share of greedy tokens equal to those of `rest` on the same text; None of a
            contender that is not fed the text, here and in the next one.
        text_hits: Share of greedy tokens that are the text's own next token.
        speed_over: For `rest` and each rival, how many times as fast as it this row is, by
            `prefill`, `decode` and `request`.
        bytes_over_rest: Bytes read a token over those of `rest`.
        tokens_per_s_over_batch: By smaller batch size (as text), decode tokens/s over that batch's.
        valid: Whether the numbers can be relied on.
        reasons: Why not, if not.
        raw: Each round's `prefill_s` and `steps_s`.
        request_s: The whole of it: prompts and all steps.
        energy_j: Of the same, where the processor tells; what the machine uses idle is part of it.
        phases: Of this engine, by phase of a step: `ms`, `bytes` and `gb_per_s`; of rest alone.
    """

    contender: str
    prompt_tokens: int
    batch: int
    new_tokens: int
    rounds: int
    prefill_tokens_per_s: Spread
    first_token_ms: Spread
    decode_ms_per_step: Spread
    decode_tokens_per_s: Spread
    bytes_per_token: float
    bandwidth_share: float | None
    executed_share: float | None
    peak_memory_bytes: int | None
    own_memory_bytes: int | None
    agreement: float | None
    text_hits: float | None
    speed_over: dict[str, dict[str, Spread]] = field(default_factory=dict)
    bytes_over_rest: float | None = None
    tokens_per_s_over_batch: dict[str, float] = field(default_factory=dict)
    valid: bool = True
    reasons: list[str] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    # Records of before there were these have none.
    request_s: Spread | None = None
    energy_j: Spread | None = None
    phases: dict[str, dict[str, float]] | None = None

    @property
    def cell(self) -> Cell:
        """Its prompt length and batch size."""
        return Cell(prompt_tokens=self.prompt_tokens, batch=self.batch)


@dataclass(kw_only=True)
class Report(Record):
    """A benchmark, finished or not.

    Attributes:
        config: Of the run, as JSON.
        contenders: By name: settings, environment, facts and memory of its worker.
        hardware: See `machine.hardware`.
        versions: See `machine.versions`.
        date: When it began, ISO 8601.
        command: The command line.
        text: Description and digest of the text read.
        bandwidth: Measured before (`begin`) and after (`end`), see `bandwidth.measure_bandwidth`.
        idle_share: Of the usable cores before anything was started; None if unknown.
        rows: By cell, in the order of contenders.
        missing: Rows that could not be had: `contender`, `prompt_tokens`, `batch`, `reason`.
        valid: Whether every row is.
        reasons: What is wrong with the run as a whole.
        finished: Whether it got to its end.
    """

    what = "a benchmark"
    version = SCHEMA

    config: dict[str, Any]
    contenders: dict[str, dict[str, Any]]
    hardware: dict[str, Any]
    versions: dict[str, str]
    date: str
    command: str
    text: dict[str, Any]
    bandwidth: dict[str, dict[str, Any]] = field(default_factory=dict)
    idle_share: float | None = None
    rows: list[Row] = field(default_factory=list)
    missing: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def valid(self) -> bool:
        """Whether everything in it can be relied on."""
        return self.finished and not self.reasons and all(row.valid for row in self.rows)

    @property
    def cells(self) -> list[Cell]:
        """Prompt lengths and batch sizes that have rows, in order."""
        return list(dict.fromkeys(row.cell for row in self.rows))

    @property
    def names(self) -> list[str]:
        """Contenders that have rows, in order."""
        having = {row.contender for row in self.rows}
        return [name for name in self.contenders if name in having]

    def find(self, contender: str, cell: Cell) -> Row | None:
        """The row of a contender at a prompt length and batch size; None if there is none."""
        for row in self.rows:
            if row.contender == contender and row.cell == cell:
                return row
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it, `schema` and `valid` first."""
        values = super().to_dict()
        return {"schema": values.pop("schema"), "valid": self.valid, **values}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            DataError: It is of another schema, or a field is missing or unknown.
        """
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "valid"}
        return super().from_dict(values)

    @classmethod
    def parts(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Rows are records of their own."""
        return {**values, "rows": [_row(row) for row in values["rows"]]}


def make_rows(
    cell: Cell,
    rounds: list[dict[str, Turn]],
    texts: list[list[list[int]]],
    *,
    rivals: list[str],
    same_model: set[str],
    astray: AbstractSet[str] = frozenset(),
    start_bytes: dict[str, int | None],
    gb_per_s: float | None,
    disturbed: list[str],
) -> list[Row]:
    """The rows of a cell.

    Args:
        cell: Prompt length T and batch size B.
        rounds: Turns by contender; all have the same contenders.
        texts: (rounds, B, new + 1) the text's own tokens from position T on.
        rivals: Contenders to compare with, beside `rest`.
        same_model: Contenders whose greedy tokens should be those of `rest`.
        astray: Contenders that are fed what they say themselves, not the text.
        start_bytes: Memory of each contender's process before it read the weights.
        gb_per_s: The machine's read bandwidth; None if unknown.
        disturbed: Why rounds could not be had undisturbed; empty if they could.
    """
    if not rounds:
        return []
    rows = []
    for name in rounds[0]:
        turns = [turns[name] for turns in rounds]
        steps = Spread.of([turn.step_s for turn in turns])
        rest = [turns[REST] for turns in rounds] if REST in rounds[0] else None
        agreement = None if rest is None or name in astray else _agreement(turns, rest)
        peaks = [turn.peak_bytes for turn in turns if turn.peak_bytes is not None]
        begun = start_bytes.get(name)
        step_bytes = statistics.fmean(turn.step_bytes for turn in turns)
        shares = [turn.executed_share for turn in turns if turn.executed_share is not None]
        reasons = list(disturbed)
        if len(turns) >= LEAST_ROUNDS and steps.relative > SPREAD_LIMIT:
            reasons.append(f"decode times spread by {steps.relative:.0%} of their median")
        compared = sum(len(row) for turn in turns for row in turn.greedy)
        if (
            name in same_model
            and agreement is not None
            and compared >= LEAST_COMPARED
            and agreement < AGREEMENT_LIMIT
        ):
            reasons.append(f"only {agreement:.0%} of its greedy tokens are those of {REST}")
        rows.append(
            Row(
                contender=name,
                prompt_tokens=cell.prompt_tokens,
                batch=cell.batch,
                new_tokens=len(turns[0].steps_s),
                rounds=len(turns),
                prefill_tokens_per_s=Spread.of(
                    [cell.batch * cell.prompt_tokens / turn.prefill_s for turn in turns]
                ),
                first_token_ms=Spread.of([turn.prefill_s * 1e3 for turn in turns]),
                decode_ms_per_step=Spread.of([turn.step_s * 1e3 for turn in turns]),
                decode_tokens_per_s=Spread.of([cell.batch / turn.step_s for turn in turns]),
                bytes_per_token=step_bytes / cell.batch,
                bandwidth_share=(
                    None if gb_per_s is None else step_bytes / steps.median / (gb_per_s * 1e9)
                ),
                executed_share=statistics.fmean(shares) if shares else None,
                peak_memory_bytes=max(peaks, default=None),
                own_memory_bytes=max(peaks) - begun if peaks and begun is not None else None,
                agreement=agreement,
                text_hits=None if name in astray else _hits(turns, texts),
                speed_over={
                    other: _speed_over(turns, [turns[other] for turns in rounds])
                    for other in (REST, *rivals)
                    if other != name and other in rounds[0]
                },
                bytes_over_rest=(
                    None
                    if rest is None
                    else step_bytes / statistics.fmean(turn.step_bytes for turn in rest)
                ),
                valid=not reasons,
                reasons=reasons,
                raw=[{"prefill_s": turn.prefill_s, "steps_s": turn.steps_s} for turn in turns],
                request_s=Spread.of([turn.request_s for turn in turns]),
                energy_j=_energy(turns),
                phases=_phases(turns) if name == REST else None,
            )
        )
    return rows


def _speed_over(turns: list[Turn], others: list[Turn]) -> dict[str, Spread]:
    pairs = list(zip(turns, others, strict=True))
    return {
        "prefill": Spread.of([other.prefill_s / own.prefill_s for own, other in pairs]),
        "decode": Spread.of([other.step_s / own.step_s for own, other in pairs]),
        "request": Spread.of([other.request_s / own.request_s for own, other in pairs]),
    }


def _energy(turns: list[Turn]) -> Spread | None:
    told = [turn.energy_j for turn in turns if turn.energy_j is not None]
    return Spread.of(told) if told else None


def _phases(turns: list[Turn]) -> dict[str, dict[str, float]] | None:
    """Medians of the turns; `other` is what lies outside of the core."""
    told = [turn.phases for turn in turns if turn.phases is not None]
    if not told:
        return None
    found = {}
    for name, first in told[0].items():
        seconds = statistics.median(phases[name]["s"] for phases in told)
        found[name] = {
            "ms": seconds * 1e3,
            "bytes": first["bytes"],
            "gb_per_s": first["bytes"] / max(seconds, 1e-12) / 1e9,
        }
    inside = sum(phase["ms"] for phase in found.values())
    step = statistics.median(turn.step_s for turn in turns) * 1e3
    found["other"] = {"ms": max(0.0, step - inside), "bytes": 0.0, "gb_per_s": 0.0}
    return found


def _agreement(turns: list[Turn], others: list[Turn]) -> float:
    return statistics.fmean(
        own == other
        for a, b in zip(turns, others, strict=True)
        for row_a, row_b in zip(a.greedy, b.greedy, strict=True)
        for own, other in zip(row_a, row_b, strict=True)
    )


def _hits(turns: list[Turn], texts: list[list[list[int]]]) -> float:
    return statistics.fmean(
        own == token
        for turn, text in zip(turns, texts, strict=True)
        for row, tokens in zip(turn.greedy, text, strict=True)
        for own, token in zip(row, tokens, strict=True)
    )


def _row(values: dict[str, Any]) -> Row:
    """Read a row that `asdict` wrote."""
    newer = dict.fromkeys(("request_s", "energy_j", "phases"))
    values = checked(Row, {**newer, **values}, "a benchmark")
    spreads = {
        f.name: Spread(**values[f.name])
        for f in fields(Row)
        if f.type in ("Spread", "Spread | None") and values.get(f.name) is not None
    }
    speeds = {
        other: {phase: Spread(**spread) for phase, spread in by_phase.items()}
        for other, by_phase in values["speed_over"].items()
    }
    return Row(**{**values, **spreads, "speed_over": speeds})
