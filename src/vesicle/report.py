"""What an answer cost, token by token and in all, as a table, a heat strip and JSON.

An answer's token i is charged with the pass that computed its logits. That is the pass over the
token *before* it: over the last prompt token for i = 0, over answer token i - 1 after that. The
passes over the rest of the prompt belong to no answer token; they count in the totals alone.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, Group
from rich.style import Style
from rich.table import Table
from rich.text import Text as Line

from vesicle.cost import Cost, price_dense
from vesicle.engine import Sequence, core
from vesicle.engine.packed import PackedHead
from vesicle.modulator import ModulatorMethod
from vesicle.phases import ALL, GENERATED, NEVER, PROMPT
from vesicle.plan import Dense
from vesicle.terminal import visible
from vesicle.transmitters import NAMES, REST

_COLD_TO_WARM = ((38, 50, 110), (40, 120, 142), (94, 170, 104), (242, 193, 78), (235, 88, 52))
_SWATCHES = 10
_LEAST_SPREAD = 0.005
_LEAST_SCALE = 0.1
_MEMORY = "noradrenaline"
_QUANTITIES = {
    "FLOPs": ("flops_total", "flops", ""),
    "weights read": ("weight_bytes", "weight_bytes", "B"),
    "KV read": ("kv_bytes_read", "kv_bytes_read", "B"),
    "KV held": ("kv_bytes_held", "kv_bytes_held", "B"),
}


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """The engine that gave an answer, and the memory that it held at the end.

    Attributes:
        weights: Format of the weights.
        kv: Format of cached keys and values.
        instructions: The native core's instruction set; None without the core.
        threads: CPU threads.
        weight_bytes: Of all weights.
        kv_bytes: Of the sequence's blocks, filled or not, and their summaries.
        packed_bytes: Of matrices and cached positions alone: no norms, biases, padding, half-filled
            blocks or summaries.
    """

    weights: str
    kv: str
    instructions: str | None
    threads: int
    weight_bytes: int
    kv_bytes: int
    packed_bytes: int

    @classmethod
    def of(cls, sequence: Sequence) -> EngineFacts:
        """Of a sequence that has not been closed."""
        engine, cache = sequence.engine, sequence.cache
        weights = engine._weights
        packed = price_dense(engine.shape, 1).weight_bytes  # a token reads all but the embedding
        embedding = weights.embedding
        if embedding is not weights.head:
            packed += (
                embedding.bytes_held if isinstance(embedding, PackedHead) else embedding.nbytes
            )
        return cls(
            weights=engine.weights_format,
            kv=engine.pool.kv,
            instructions=core.instructions(),
            threads=core.threads(),
            weight_bytes=weights.bytes_held,
            kv_bytes=cache.bytes_allocated + cache.summary_bytes,
            packed_bytes=packed + cache.bytes_held,
        )

    @property
    def packed_ratio(self) -> float:
        """Bytes held over `packed_bytes`."""
        return (self.weight_bytes + self.kv_bytes) / self.packed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The `engine` of `vesicle run --json`."""
        return {**asdict(self), "packed_ratio": self.packed_ratio}


@dataclass(frozen=True, kw_only=True)
class PhaseShare:
    """The work on the tokens of one phase.

    Attributes:
        tokens: How many there are.
        flops: Executed.
        dense_flops: Of the dense model.
    """

    tokens: int
    flops: int
    dense_flops: int

    @classmethod
    def of(cls, sequence: Sequence, phase: str) -> PhaseShare:
        """Of a sequence's `prompt` or `generated` tokens."""
        tokens = sequence.phase(phase)
        return cls(
            tokens=int(tokens.sum()),
            flops=sequence.cost_of(tokens).flops_total,
            dense_flops=sequence.dense_cost_of(tokens).flops_total,
        )

    @property
    def share(self) -> float:
        """Executed over dense FLOPs; 1 without tokens."""
        return self.flops / self.dense_flops if self.dense_flops else 1.0

    def to_dict(self) -> dict[str, Any]:
        """An entry of `by_phase` of `vesicle run --json`."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer and what it cost.

    Attributes:
        text: All of it.
        token_ids: N ids.
        pieces: Each token's own text.
        shares: Each token's FLOPs over those of the dense model; see the module docstring.
        levels: Mean level of each transmitter over all layers and the tokens on which it acts; None
            where a Plan was replayed, which holds decisions and no levels.
        released: The transmitters that the method sets; the others rest.
        phases: On which tokens each of those acts, see `vesicle.phases`.
        by_phase: Of prompt tokens and of generated ones, how many there are and their FLOPs.
        executed: Counted work, prompt included.
        dense: The dense model's price for the same tokens.
        prompt_tokens: Tokens read before the answer.
        decode_passes: Passes over answer tokens: N, or N - 1 where the last one was not fed back.
        prefill_s: Seconds from the start to the first token.
        decode_s: Seconds in the passes after that.
        engine: What computed it.
    """

    text: str
    token_ids: list[int]
    pieces: list[str]
    shares: list[float]
    levels: dict[str, float] | None
    released: tuple[str, ...]
    phases: dict[str, str]
    by_phase: dict[str, PhaseShare]
    executed: Cost
    dense: Cost
    prompt_tokens: int
    decode_passes: int
    prefill_s: float
    decode_s: float
    engine: EngineFacts

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        *,
        prompt_tokens: int,
        text: str,
        token_ids: list[int],
        pieces: list[str],
        prefill_s: float,
        decode_s: float,
    ) -> Answer:
        """Sum up a sequence that `Engine.stream` has finished."""
        return cls(
            text=text,
            token_ids=token_ids,
            pieces=pieces,
            shares=answer_shares(sequence, prompt_tokens)[: len(token_ids)],
            levels=mean_levels(sequence),
            released=_released(sequence),
            phases=_phases(sequence),
            by_phase={name: PhaseShare.of(sequence, name) for name in (PROMPT, GENERATED)},
            executed=sequence.cost,
            dense=sequence.dense_cost,
            prompt_tokens=prompt_tokens,
            decode_passes=sequence.length - prompt_tokens,
            prefill_s=prefill_s,
            decode_s=decode_s,
            engine=EngineFacts.of(sequence),
        )

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens read per second; None if too short to time."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Answer tokens per second after the first; None if there was only one."""
        return self.decode_passes / self.decode_s if self.decode_passes and self.decode_s else None

    def to_dict(self) -> dict[str, Any]:
        """The answer's part of `vesicle run --json`; `docs/json.md` tells what each key means."""
        return {
            "text": self.text,
            "tokens": [
                {"id": i, "text": piece, "share": share}
                for i, piece, share in zip(self.token_ids, self.pieces, self.shares, strict=True)
            ],
            "levels": self.levels,
            "phases": self.phases,
            "by_phase": {name: part.to_dict() for name, part in self.by_phase.items()},
            "executed": self.executed.summary(),
            "dense": self.dense.summary(),
            "ratio": self.executed.ratio(self.dense),
            "prompt_tokens": self.prompt_tokens,
            "first_token_ms": 1e3 * self.prefill_s,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "engine": self.engine.to_dict(),
        }


def answer_shares(sequence: Sequence, prompt_tokens: int) -> list[float]:
    """FLOPs over the dense model's, of each pass that computed logits; see the module docstring."""
    return [float(share) for share in sequence.token_shares[prompt_tokens - 1 :]]


def mean_levels(sequence: Sequence) -> dict[str, float] | None:
    """Mean level of each transmitter over layers and the tokens on which it acts.

    REST for one that acts on none; None for methods without levels.
    """
    if isinstance(sequence.method.decider, Dense):
        return dict.fromkeys(NAMES, REST)
    levels = sequence.levels
    if not len(levels):
        return None
    acting = sequence.author.acting(np.arange(len(levels), dtype=np.int32))
    return {
        name: float(levels[on, :, i].mean()) if on.any() else REST
        for i, (name, on) in enumerate(zip(NAMES, acting.T, strict=True))
    }


def show(
    answer: Answer,
    console: Console,
    *,
    budget: float | None = None,
    compared: Answer | None = None,
    heat: bool = True,
) -> None:
    """Print the report of one answer.

    Args:
        answer: What was generated.
        console: Where to; its colours and width are respected.
        budget: What was asked for, if anything.
        compared: The dense run's answer to the same prompt.
        heat: Whether to show the answer coloured by its tokens' shares.
    """
    if compared is not None:
        console.print(Line("\ndense answer", style="bold"))
        console.print(Line(compared.text), highlight=False)
    console.print()
    console.print(_cost_table(answer))
    facts = Table.grid(padding=(0, 2))
    facts.add_row("levels", _levels_line(answer))
    facts.add_row("speed", _speed_line(answer))
    facts.add_row("memory", _memory_line(answer.engine))
    facts.add_row("engine", _engine_line(answer.engine))
    facts.add_row("budget", _budget_line(answer, budget))
    console.print(facts, highlight=False)
    if compared is not None:
        console.print()
        console.print(_comparison_table(answer, compared))
    if heat and answer.shares:
        console.print()
        console.print(heat_strip(answer.pieces, answer.shares, console), highlight=False)


def heat_strip(pieces: Items[str], shares: Items[float], console: Console) -> Group | Line:
    """An answer with each token in the colour of its share, and a legend.

    Without colours, a digit under each token tells the tenths of the dense work.
    """
    low, high = min(shares), max(shares)
    if high - low < _LEAST_SPREAD:
        return Line(f"every token got {high:.2f} of its dense FLOPs")
    if console.color_system is None or console.no_color:
        return _plain_strip(pieces, shares, max(console.width, 20))
    # A narrower scale would paint differences that mean nothing in the strongest colours.
    high = max(high, low + _LEAST_SCALE)
    strip = Line()
    for piece, share in zip(pieces, shares, strict=True):
        shown = _shown(piece).replace("↵", "↵\n")
        strip.append(shown, _style((share - low) / (high - low)))
    legend = Line("share of its dense FLOPs that each token got: ")
    legend.append(f"{low:.2f} ")
    for swatch in range(_SWATCHES):
        legend.append("  ", _style(swatch / (_SWATCHES - 1)))
    legend.append(f" {high:.2f}")
    return Group(strip, legend)


def _plain_strip(pieces: Items[str], shares: Items[float], width: int) -> Group:
    rows: list[tuple[str, str]] = []
    text = digits = ""
    for piece, share in zip(pieces, shares, strict=True):
        shown = _shown(piece)
        digit = "+" if share >= 1 else str(int(share * 10))
        size = cell_len(shown)
        if text and cell_len(text) + size > width:
            rows.append((text, digits))
            text = digits = ""
        text += shown
        digits += (digit if size else "") + " " * (size - 1)
        if shown.endswith("↵"):
            rows.append((text, digits))
            text = digits = ""
    rows.append((text, digits))
    legend = "under each token: tenths of its dense FLOPs that it got, + for all of them"
    lines = [Line(line, no_wrap=True, overflow="ignore") for row in rows if row[0] for line in row]
    return Group(*lines, Line(legend))


def _shown(piece: str) -> str:
    """A token's text on one line."""
    return visible(piece.replace("\r\n", "\n").replace("\n", "↵").replace("\t", "    "))


def _style(place: float) -> Style:
    """Cold for 0 to warm for 1, with a foreground that can be read on it."""
    at = min(max(place, 0.0), 1.0) * (len(_COLD_TO_WARM) - 1)
    first = min(int(at), len(_COLD_TO_WARM) - 2)
    rest = at - first
    red, green, blue = (
        round(a + (b - a) * rest)
        for a, b in zip(_COLD_TO_WARM[first], _COLD_TO_WARM[first + 1], strict=True)
    )
    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 120
    return Style(
        color="black" if bright else "bright_white", bgcolor=Color.from_rgb(red, green, blue)
    )


def _cost_table(answer: Answer) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("executed", "dense", "share"):
        table.add_column(heading, justify="right")
    executed, dense = answer.executed.summary(), answer.dense.summary()
    ratio = answer.executed.ratio(answer.dense)
    for name, (field, share, unit) in _QUANTITIES.items():
        table.add_row(
            name, scaled(executed[field], unit), scaled(dense[field], unit), f"{ratio[share]:.3f}"
        )
    return table


def _comparison_table(answer: Answer, dense: Answer) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("two runs")
    for heading in ("this one", "dense", "ratio"):
        table.add_column(heading, justify="right")
    ours, theirs = answer.executed.summary(), dense.executed.summary()
    table.add_row("answer tokens", str(len(answer.token_ids)), str(len(dense.token_ids)), "")
    for name, (field, _, unit) in _QUANTITIES.items():
        ratio = ours[field] / max(theirs[field], 1)
        table.add_row(name, scaled(ours[field], unit), scaled(theirs[field], unit), f"{ratio:.3f}")
    speeds = {
        "prefill tokens/s": (answer.prefill_tokens_per_s, dense.prefill_tokens_per_s),
        "decode tokens/s": (answer.decode_tokens_per_s, dense.decode_tokens_per_s),
    }
    for name, (ours_s, theirs_s) in speeds.items():
        ratio_s = f"{ours_s / theirs_s:.3f}" if ours_s and theirs_s else ""
        table.add_row(name, _speed(ours_s), _speed(theirs_s), ratio_s)
    return table


def _levels_line(answer: Answer) -> str:
    if answer.levels is None:
        return "none released: what is executed was given, by --read or a saved plan"
    acting = [n for n in NAMES if n in answer.released and answer.phases.get(n) != NEVER]
    shown = [f"{name} {answer.levels[name]:.2f}" for name in acting]
    held = answer.executed.ratio(answer.dense)["kv_bytes_held"]
    forgets = held < 0.995 and _MEMORY not in acting  # by a share set for a text
    if forgets:
        shown.append(f"{_MEMORY} holds {held:.2f} of the cache")
    resting = [n for n in NAMES if n not in acting and not (forgets and n == _MEMORY)]
    if resting:
        shown.append(f"resting: {', '.join(resting)}")
    return "  ".join(shown)


def _budget_line(answer: Answer, budget: float | None) -> str:
    """What was asked for, of which tokens, and what each phase and both together executed."""
    if budget is None:
        asked = "none asked for"
    else:
        counted = "all" if set(answer.phases.values()) == {ALL} else GENERATED
        asked = f"{budget:g} asked for on {counted} tokens"
    parts = [
        f"{name} {part.share:.3f} ({part.tokens} tokens)"
        for name, part in answer.by_phase.items()
        if part.tokens
    ]
    never = [name for name, place in answer.phases.items() if place == NEVER]
    if never and budget is not None:
        verb = "acts" if len(never) == 1 else "act"
        asked += f" ({', '.join(never)} never {verb}: --goal or --phase)"
    together = answer.executed.ratio(answer.dense)["flops"]
    return f"{asked}; executed of the dense FLOPs: {', '.join(parts)}, together {together:.3f}"


def _speed_line(answer: Answer) -> str:
    return (
        f"prefill {_speed(answer.prefill_tokens_per_s)} tokens/s ({answer.prompt_tokens} tokens)  "
        f"decode {_speed(answer.decode_tokens_per_s)} tokens/s ({len(answer.token_ids)} tokens)  "
        f"first token after {1e3 * answer.prefill_s:.0f} ms"
    )


def _memory_line(engine: EngineFacts) -> str:
    return (
        f"weights {scaled(engine.weight_bytes, 'B')} ({engine.weights})  "
        f"KV {scaled(engine.kv_bytes, 'B')} ({engine.kv})  "
        f"{engine.packed_ratio:.3f} of their packed size"
    )


def _engine_line(engine: EngineFacts) -> str:
    kind = "PyTorch, no native core"
    if engine.instructions is not None:
        kind = f"native core, {engine.instructions}"
    return f"{kind}  {engine.threads} thread{'' if engine.threads == 1 else 's'}"


def _speed(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f}"


def scaled(value: float, unit: str) -> str:
    """A number with a decimal prefix, three digits long: `1.23 GB`, `45.6 M`."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    digits = 0 if value >= 99.95 or value == int(value) else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefixes[0]}{unit}".rstrip()


def _phases(sequence: Sequence) -> dict[str, str]:
    method = sequence.method.decider
    if not isinstance(method, ModulatorMethod):
        return {}
    places = method.phases.to_dict()
    return {name: places[name] for name in _released(sequence)}


def _released(sequence: Sequence) -> tuple[str, ...]:
    method = sequence.method.decider
    if not isinstance(method, ModulatorMethod):
        return ()
    return method.modulator.predictor.config.transmitters
