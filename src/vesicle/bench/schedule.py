"""Whose turn it is: rounds of turns, one contender computing at a time, on a quiet machine.

For each prompt length and batch size every contender warms up; then rounds follow, each on a text
of its own, beginning with another contender each time. Before a turn the machine must be idle, and
during a turn the cores must not have worked much more than the worker itself did. A round that was
disturbed is run again; where that does not help, its rows are marked as not valid.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from vesicle.bench import machine, process
from vesicle.bench.contenders import REST, Contender
from vesicle.bench.process import Worker, WorkerError, WorkerTimeout
from vesicle.bench.prompts import Stream
from vesicle.bench.results import Cell, Report, Row, Turn, make_rows
from vesicle.errors import VesicleError
from vesicle.processors import allowed

IDLE_LIMIT = 0.9
"""Least share of the usable cores' time that must be idle before a turn."""

OTHERS_LIMIT = 0.1
"""Most of the usable cores' time that others may take during a turn."""

DRIFT_LIMIT = 0.15
"""Most by which the read bandwidth may have changed from the beginning to the end."""

PAUSE_S, SAMPLE_S, PATIENCE_S = 0.2, 0.25, 10.0
"""Between turns, so that no library's threads still spin; of an idle sample; for idleness."""

_SHORTEST_JUDGED_S = 0.5
"""Turns shorter than this are not judged by the kernel's clock, which ticks every 10 ms."""

_WARM_UP_PROMPT, _WARM_UP_STEPS = 32, 4


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is swept, and how often.

    Attributes:
        prompts: Prompt lengths in tokens.
        batches: Sequences side by side.
        new_tokens: Decode steps of a turn.
        rounds: Undisturbed rounds wanted of each prompt length and batch size.
        threads: Of each contender.
        limit_s: Longest turn; a contender that takes longer gets no row there or at larger sizes.
        allow_busy: Whether to measure on a busy machine: nothing is repeated.
        bandwidth_repeats: Passes of each reduction when the bandwidth is measured.
    """

    prompts: tuple[int, ...]
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 64
    rounds: int = 5
    threads: int = 1
    limit_s: float = 900.0
    allow_busy: bool = False
    bandwidth_repeats: int = 5

    def __post_init__(self) -> None:
        """Check that prompts and batches are distinct and from 1 up, other numbers above 0.

        Raises:
            VesicleError: Naming the setting, its value and what is allowed.
        """
        for name in ("prompts", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                shown = ",".join(map(str, values)) or "empty"
                raise VesicleError(f"{name} is {shown}; allowed: distinct numbers from 1 up")
        for name in ("new_tokens", "rounds", "threads", "limit_s", "bandwidth_repeats"):
            value = getattr(self, name)
            if value <= 0:
                raise VesicleError(f"{name} is {value:g}; allowed: above 0")

    @property
    def cells(self) -> list[Cell]:
        """Prompt lengths and batch sizes, smallest first."""
        return [
            Cell(prompt_tokens=prompt, batch=batch)
            for prompt in sorted(self.prompts)
            for batch in sorted(self.batches)
        ]

    @property
    def most_rounds(self) -> int:
        """Rounds that are run at most, disturbed ones included."""
        return self.rounds if self.allow_busy else 2 * self.rounds

    @property
    def rows_read(self) -> int:
        """Rows of text that a cell reads at most; one more round's are for warming up."""
        return (self.most_rounds + 1) * max(self.batches)


class Progress(Protocol):
    """Who is told how far a run is. Nothing may be drawn while a turn runs."""

    def stage(self, text: str) -> None:
        """Something outside of turns begins, or a row cannot be had; `text` says what."""

    def turn(self, text: str, done: float) -> None:
        """A turn begins, with `done` of the work (0 to 1) behind it."""

    def row(self, row: Row) -> None:
        """A contender's row at one prompt length and batch size is finished."""


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One turn of each contender, and the text's own tokens after the prompts."""

    turns: dict[str, Turn]
    text: list[list[int]]

    @property
    def disturbed(self) -> str | None:
        """What else ran on the machine during any of them."""
        return next((turn.disturbed for turn in self.turns.values() if turn.disturbed), None)


@dataclass(kw_only=True)
class _Bench:
    """One run: what is swept, the workers, and what has come of it so far.

    Attributes:
        start_bytes: Memory that each contender's process held before it read the weights.
        too_slow: For contenders that ran out of time, at how many tokens of prompts, all sequences
            together.
        done: Work that is behind it, in units of `_weight`.
    """

    config: BenchConfig
    contenders: list[Contender]
    stream: Stream
    report: Report
    progress: Progress
    start: Callable[[str, dict[str, str]], Worker]
    save: Callable[[Report], None]
    stack: ExitStack
    workers: dict[str, Worker] = field(default_factory=dict)
    start_bytes: dict[str, int | None] = field(default_factory=dict)
    too_slow: dict[str, int] = field(default_factory=dict)
    done: float = 0.0

    def run(self) -> None:
        idle = machine.idle_share(SAMPLE_S)
        self.report.idle_share = machine.idle_by_load_average() if idle is None else idle
        self._judge_idle_at_start()
        self._bandwidth("begin")
        for contender in self.contenders:
            self._load(contender)
        for cell in self.config.cells:
            self._cell(cell)
            self.save(self.report)
        self._bandwidth("end")
        self._judge_bandwidth()
        self.report.finished = True
        self.save(self.report)

    # Workers ------------------------------------------------------------------------------------

    def _load(self, contender: Contender) -> None:
        self.progress.stage(f"loading {contender.name}")
        worker = self.stack.enter_context(self.start(contender.name, contender.environment()))
        self.workers[contender.name] = worker
        loaded = worker.ask(self.config.limit_s, do="load", contender=asdict(contender))
        self.start_bytes[contender.name] = loaded["start_bytes"]
        self.report.contenders[contender.name].update(loaded)

    def _bandwidth(self, when: str) -> None:
        self.progress.stage("measuring memory bandwidth")
        threads = self.config.threads
        variables = {"OMP_NUM_THREADS": str(threads)}
        with self.start("bandwidth", variables) as worker:
            self.report.bandwidth[when] = worker.ask(
                self.config.limit_s,
                do="bandwidth",
                threads=threads,
                repeats=self.config.bandwidth_repeats,
            )

    # Judging ------------------------------------------------------------------------------------

    def _judge_idle_at_start(self) -> None:
        idle = self.report.idle_share
        if idle is not None and idle < IDLE_LIMIT:
            self._wait_until_idle()
            again = machine.idle_share(SAMPLE_S)
            self.report.idle_share = idle = idle if again is None else again
            if idle < IDLE_LIMIT:
                self.report.reasons.append(f"the machine was busy at the start: {idle:.0%} idle")

    def _judge_bandwidth(self) -> None:
        begin, end = (self.report.bandwidth[w]["read_gb_per_s"] for w in ("begin", "end"))
        drift = abs(end / begin - 1)
        if drift > DRIFT_LIMIT:
            self.report.reasons.append(
                f"memory bandwidth went from {begin:.1f} to {end:.1f} GB/s during the run"
            )

    def _wait_until_idle(self) -> float | None:
        """Wait a while for the machine; the idle share then."""
        deadline = time.monotonic() + (0 if self.config.allow_busy else PATIENCE_S)
        while True:
            idle = machine.idle_share(SAMPLE_S)
            if idle is None or idle >= IDLE_LIMIT or time.monotonic() >= deadline:
                return idle

    def _gb_per_s(self) -> float:
        """The best bandwidth seen so far."""
        return max(seen["read_gb_per_s"] for seen in self.report.bandwidth.values())

    # Measuring ----------------------------------------------------------------------------------

    def _cell(self, cell: Cell) -> None:
        config, names = self.config, []
        for contender in self.contenders:
            slow = self.too_slow.get(contender.name)
            if slow is not None and cell.prompt_tokens * cell.batch >= slow:
                self._miss(contender.name, cell, "it took too long on fewer tokens")
                continue
            if self._warm_up(contender, cell):
                names.append(contender.name)
        good: list[_Round] = []
        bad: list[_Round] = []
        number = 0
        while names and len(good) < config.rounds and number < config.most_rounds:
            rows = self._text(cell, number)
            turns = self._round(cell, names, rows, number, len(good))
            names = [name for name in names if name in turns]
            played = _Round(turns=turns, text=[row[cell.prompt_tokens :] for row in rows])
            (bad if played.disturbed else good).append(played)
            number += 1
        used, reasons = good, list[str]()
        if len(good) < config.rounds and bad:
            used = (good + bad)[: config.rounds]
            reasons = [
                f"the machine was busy in {len(bad)} of {number} rounds: {bad[-1].disturbed}"
            ]
        rows_made = make_rows(
            cell,
            # A contender that gave up has no row, and its turns so far are not compared with.
            [{name: played.turns[name] for name in names} for played in used] if names else [],
            [played.text for played in used],
            rivals=[c.name for c in self.contenders if c.is_rival],
            same_model={c.name for c in self.contenders if c.same_model},
            astray={c.name for c in self.contenders if not c.is_fed},
            start_bytes=self.start_bytes,
            gb_per_s=self._gb_per_s(),
            disturbed=reasons,
        )
        for row in rows_made:
            self.report.rows.append(self._over_smaller_batches(row))
            self.progress.row(self.report.rows[-1])
        self.done += _weight(cell, config)

    def _text(self, cell: Cell, number: int) -> list[list[int]]:
        """A round's rows; the last token of a row is only compared with."""
        length = cell.prompt_tokens + self.config.new_tokens + 1
        return self.stream.rows(number * cell.batch, cell.batch, length)

    def _round(
        self, cell: Cell, names: list[str], rows: list[list[int]], number: int, good: int
    ) -> dict[str, Turn]:
        """One turn of each; those that fail are missing from the result."""
        first = number % len(names)
        turns: dict[str, Turn] = {}
        for place, name in enumerate(names[first:] + names[:first]):
            self._report_progress(cell, name, number, good, place / len(names))
            turn = self._turn(name, cell, rows)
            if turn is not None:
                turns[name] = turn
        return turns

    def _turn(self, name: str, cell: Cell, rows: list[list[int]]) -> Turn | None:
        time.sleep(PAUSE_S)
        idle = self._wait_until_idle()
        energy = machine.energy_j()
        busy, begun = machine.busy_core_seconds(), time.monotonic()
        measured = self._measure(name, cell, rows, cell.prompt_tokens)
        if measured is None:
            return None
        passed, busy_after = time.monotonic() - begun, machine.busy_core_seconds()
        used = machine.energy_between(energy, machine.energy_j())
        turn = Turn(**measured, energy_j=used)
        if idle is not None and idle < IDLE_LIMIT:
            return replace(turn, disturbed=f"cores were {idle:.0%} idle before a turn")
        if busy is None or busy_after is None or passed < _SHORTEST_JUDGED_S:
            return turn
        others = (busy_after - busy - (turn.cpu_s or 0)) / (passed * len(allowed()))
        if others > OTHERS_LIMIT:
            return replace(turn, disturbed=f"others took {others:.0%} of the cores during a turn")
        return turn

    def _warm_up(self, contender: Contender, cell: Cell) -> bool:
        """Touch weights and kernels at this batch size; whether that worked."""
        prompt = min(_WARM_UP_PROMPT, cell.prompt_tokens)
        rows = self.stream.rows(
            self.config.most_rounds * cell.batch, cell.batch, prompt + _WARM_UP_STEPS + 1
        )
        return self._measure(contender.name, cell, rows, prompt) is not None

    def _measure(
        self, name: str, cell: Cell, rows: list[list[int]], prompt_tokens: int
    ) -> dict[str, Any] | None:
        """Ask a worker; None, and a line in the report, if it fails."""
        try:
            return self.workers[name].ask(
                self.config.limit_s, do="measure", rows=rows, prompt_tokens=prompt_tokens
            )
        except WorkerError as error:
            if isinstance(error, WorkerTimeout):
                self.too_slow[name] = cell.prompt_tokens * cell.batch
            self._miss(name, cell, str(error))
            if not self.workers[name].running:
                self._load(next(c for c in self.contenders if c.name == name))
            return None

    # Reporting ----------------------------------------------------------------------------------

    def _miss(self, name: str, cell: Cell, reason: str) -> None:
        self.report.missing.append({"contender": name, **asdict(cell), "reason": reason})
        self.progress.stage(f"no row for {name} at {cell.prompt_tokens} x {cell.batch}: {reason}")

    def _over_smaller_batches(self, row: Row) -> Row:
        earlier = [
            other
            for other in self.report.rows
            if other.contender == row.contender
            and other.prompt_tokens == row.prompt_tokens
            and other.batch < row.batch
        ]
        ratios = {
            str(o.batch): row.decode_tokens_per_s.median / o.decode_tokens_per_s.median
            for o in earlier
        }
        return replace(row, tokens_per_s_over_batch=ratios)

    def _report_progress(self, cell: Cell, name: str, number: int, good: int, part: float) -> None:
        """Before a turn: `good` rounds are done, and `part` of this one."""
        config = self.config
        total = sum(_weight(c, config) for c in config.cells)
        share = (self.done + _weight(cell, config) * (good + part) / config.rounds) / total
        again = f" (run {number + 1})" if number > good else ""
        where = f"{cell.prompt_tokens} tokens x {cell.batch}"
        self.progress.turn(f"{where}, round {good + 1} of {config.rounds}{again}: {name}", share)


def _weight(cell: Cell, config: BenchConfig) -> float:
    """Roughly how long a cell takes: a step of decoding weighs as much as 8 tokens of a prompt."""
    return cell.prompt_tokens * cell.batch + 8.0 * config.new_tokens


def run_bench(
    config: BenchConfig,
    contenders: list[Contender],
    stream: Stream,
    *,
    command: str,
    date: str,
    progress: Progress,
    save: Callable[[Report], None],
    start: Callable[[str, dict[str, str]], Worker] = process.start,
) -> Report:
    """Measure every contender; no worker is left behind, however it ends.

    Args:
        config: What is swept.
        contenders: From `line_up`, `rest` first.
        stream: The text, long enough for `config`.
        command: The command line, for the record.
        date: Now, ISO 8601.
        progress: Is told how far the run is, between turns.
        save: Called with the report after each prompt length and batch size, and at the end.
        start: Starts a worker, from its name and environment.

    Raises:
        VesicleError: A contender cannot be loaded, or the bandwidth cannot be measured.
    """
    assert contenders[0].name == REST
    report = Report(
        config=asdict(config),
        contenders={
            c.name: {"settings": c.record(), "environment": c.environment()} for c in contenders
        },
        hardware=machine.hardware(),
        versions=machine.versions(),
        date=date,
        command=command,
        text={
            "description": stream.description,
            "sha256": stream.sha256,
            "tokens": len(stream.ids),
        },
    )
    with ExitStack() as stack:
        _Bench(
            config=config,
            contenders=contenders,
            stream=stream,
            report=report,
            progress=progress,
            start=start,
            save=save,
            stack=stack,
        ).run()
    return report
