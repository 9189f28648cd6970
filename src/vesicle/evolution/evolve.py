"""A run of evolution: generations, held-out scores, and a folder from which it is taken up again.

The folder has one line of JSON for each generation in `generations.jsonl`, written when it is over.
What was told to the search is in these lines; so a run that was cut off anywhere goes on as if it
had not been, to the last digit: its lines are told again, and nothing is tried twice.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vesicle.engine import Engine
from vesicle.errors import DataError, VesicleError
from vesicle.evaluation.run.lines import JsonLines
from vesicle.evolution.ablation import by_ablation
from vesicle.evolution.config import EvolveConfig
from vesicle.evolution.questions import Question
from vesicle.evolution.repetition import by_repetition
from vesicle.evolution.search import Search
from vesicle.evolution.trials import Here, Read, Trials
from vesicle.files import read_json, write_json
from vesicle.namm import Namm
from vesicle.training.decay import by_decay

LINES, SETTINGS, START = "generations.jsonl", "evolution.json", "start"
_ABLATED = 8
"""Contexts by which a profile begins, at most: each is tried once for every KV head."""
Say = Callable[[str], None]
Show = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Evolved:
    """What came of it.

    Attributes:
        namm: The mean of the generation with the least held-out loss.
        generation: Which one; 0 for the start.
        held_out: Its loss on held-out contexts, nats a token above the full cache's, weighed.
        started_at: The start's.
        lines: One for each generation.
    """

    namm: Namm
    generation: int
    held_out: float
    started_at: float
    lines: list[dict[str, Any]]


def evolve(
    engine: Engine,
    start: Namm,
    questions: Sequence[Question],
    held_out: Sequence[Question],
    config: EvolveConfig,
    out: Path,
    *,
    request: Sequence[int] = (),
    load: Callable[[], nn.Module] | None = None,
    say: Say = lambda line: None,
    show: Show = lambda line: None,
    wait: Say = lambda note: None,
    read: Read | None = None,
) -> Evolved:
    """Evolve a NAMM, and write the best mean so far to `out`.

    Args:
        engine: Of the model.
        start: Where to begin.
        questions: To train on.
        held_out: To judge means by.
        config: How.
        out: Folder of the run; one that was cut off there is gone on with.
        request: Token ids that ask for a text's repetition, for a run that begins with it.
        load: Gives the model as transformers has it, for a run that begins with gradients.
        say: Takes one-line notices.
        show: Takes a generation's line.
        wait: Takes a note of what is done before the first generation, context by context.
        read: Reads contexts; by default `engine` does, which then holds them.

    Raises:
        DataError: If there are fewer questions than a generation is tried on, or none held out.
        VesicleError: If `out` holds a run of other settings, a line there is damaged, or what reads
            contexts fails.
    """
    if len(questions) < config.contexts or not held_out:
        raise DataError(
            f"there are {len(questions)} contexts to train on and {len(held_out)} held out; "
            f"needed: {config.contexts} and 1"
        )
    always = start.settings.sinks + start.settings.recent
    longest = max(len(question.context) for question in questions)
    if longest <= always:
        raise DataError(
            f"contexts have {longest} tokens at most, and {always} entries always stay; needed: "
            f"more than {always}, or there is nothing to forget"
        )
    file = _begin(out, config, start, questions, held_out)
    lines: list[dict[str, Any]] = list(file.found)
    if lines:
        say(f"going on after generation {lines[-1]['generation']}")
    begin = _fitted(engine, start, questions, config, out, request, load, say, wait)
    # A run that stays at its beginning is judged, and not more.
    used = questions if config.generations or config.begin == "ablation" else []
    train, judges = range(len(used)), range(len(used), len(used) + len(held_out))
    tried: _Tried | None = None
    try:
        if len(lines) <= config.generations:
            sees = config.evolves != "profile" or begin.sees_attention
            settings = begin.settings if sees else None
            asked = [*used, *held_out]
            say(f"reading {len(asked)} contexts once")
            trials = (read or partial(Here, engine))(asked, settings, begin.gates, wait)
            tried = _Tried(trials, asked, config)
        if not lines:
            assert tried is not None
            if config.begin == "ablation":
                few = train[:: -(-len(train) // _ABLATED)]
                say(f"measuring what each KV head loses alone, on {len(few)} contexts")
                begin = by_ablation(begin, tried.alone(few, begin))
                begin.save(out / START)
            # No generation: nobody is told its losses.
            held = tried.mean(judges, begin)
            lines.append(file.append({"generation": 0, "losses": [], "held_out": held}))
        search, best = Search(begin, config), _Best(begin)
        for line in lines:  # told again, without trying anything; the start was told nothing
            if line["generation"]:
                search.ask()
                search.tell(line["losses"])
            best.see(line, search.mean)
        best.save(out, config)
        while (generation := len(lines)) <= config.generations:
            assert tried is not None
            begun = time.perf_counter()
            rng = np.random.default_rng([config.seed, generation])
            chosen = rng.choice(len(train), config.contexts, replace=False).tolist()
            memory = config.memory[generation % len(config.memory)]
            losses = tried.losses(chosen, search.ask(), memory).mean(0).tolist()
            search.tell(losses)
            line = {"generation": generation, "memory": memory, "losses": losses}
            if generation % config.held_out_every == 0 or generation == config.generations:
                line["held_out"] = tried.mean(judges, search.mean)
            line["elapsed_s"] = round(time.perf_counter() - begun, 3)
            lines.append(file.append(line))
            if best.see(line, search.mean):
                best.save(out, config)
            show(line)
    finally:
        if tried is not None:
            tried.trials.close()
    return Evolved(
        namm=best.namm,
        generation=best.generation,
        held_out=best.loss,
        started_at=float(lines[0]["held_out"]),
        lines=lines,
    )


def _fitted(
    engine: Engine,
    start: Namm,
    questions: Sequence[Question],
    config: EvolveConfig,
    out: Path,
    request: Sequence[int],
    load: Callable[[], nn.Module] | None,
    say: Say,
    wait: Say,
) -> Namm:
    """Where evolution begins, but for ablation: written to the run's folder, or read from there.

    Raises:
        VesicleError: If it is to begin with gradients, and there is no model for them.
    """
    folder = out / START
    if Namm.is_saved(folder):
        return Namm.load(folder)
    contexts = [question.context for question in questions]
    match config.begin:
        case "repetition":
            say(f"having {len(contexts)} contexts repeated")
            start = by_repetition(engine, start, contexts, request, config.memory, wait)
        case "decay":
            if load is None:
                raise VesicleError("gates by gradient need the model: load is None")
            say(f"training gates on {len(contexts)} contexts")
            start = by_decay(load(), start, contexts, config.memory, seed=config.seed, wait=wait)
    if config.begin != "ablation":  # which needs contexts that were read
        start.save(folder)
    return start


class _Best:
    """The mean with the least held-out loss."""

    def __init__(self, start: Namm) -> None:
        self.namm, self.loss, self.generation = start, float("inf"), 0

    def see(self, line: dict[str, Any], mean: Namm) -> bool:
        """Take a generation's mean if it is better; whether it is."""
        loss = line.get("held_out")
        if loss is None or loss >= self.loss:
            return False
        self.namm, self.loss, self.generation = mean, loss, line["generation"]
        return True

    def save(self, out: Path, config: EvolveConfig) -> None:
        info = {
            **self.namm.info,
            "evolution": asdict(config),
            "generation": self.generation,
            "held_out_excess": self.loss,
        }
        replace(self.namm, info=info).save(out)


@dataclass(frozen=True)
class _Tried:
    """Contexts that were read, and how much each counts."""

    trials: Trials
    questions: Sequence[Question]
    config: EvolveConfig

    def losses(
        self, which: Sequence[int], candidates: Sequence[Namm], memory: float
    ) -> NDArray[np.float64]:
        """(n, C) weighed nats a token above the full cache's, up to the most that counts."""
        return self._weighed(which, self.trials.excess(which, candidates, memory))

    def mean(self, which: Sequence[int], namm: Namm) -> float:
        """Of these contexts, at all shares."""
        found = [self.losses(which, [namm], memory) for memory in self.config.memory]
        return float(np.mean(found))

    def alone(self, which: Sequence[int], namm: Namm) -> NDArray[np.float64]:
        """(L, G) the mean of what is lost where one KV head after another forgets alone."""
        found: NDArray[np.float64] = self._weighed(which, self.trials.excess_without(which, namm))
        return found.mean(0)

    def _weighed(self, which: Sequence[int], excess: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = np.array([self.questions[i].weight for i in which])
        counted = np.minimum(excess, self.config.most_excess)
        return weights.reshape(-1, *[1] * (excess.ndim - 1)) * counted


def _begin(
    out: Path,
    config: EvolveConfig,
    start: Namm,
    questions: Sequence[Question],
    held_out: Sequence[Question],
) -> JsonLines:
    """The lines of the run in a folder, which must be this one; none of a new one."""
    begins = sha256(repr([start.digest(), questions, held_out]).encode()).hexdigest()
    # More generations only go on with it.
    ours = asdict(config) | {"generations": None, "begins": begins}
    ours = json.loads(json.dumps(ours))
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    theirs = read_json(path) if path.is_file() else None
    # A run that got nowhere (it was refused, or killed at once) holds nothing that could be lost.
    begun = Namm.is_saved(out / START) or (out / LINES).is_file()
    if theirs is None or (theirs != ours and not begun):
        shutil.rmtree(out / START, ignore_errors=True)
        write_json(path, ours)
        return JsonLines(out / LINES, restart=True)
    if theirs != ours:
        names = sorted(n for n in ours if not isinstance(theirs, dict) or theirs.get(n) != ours[n])
        raise VesicleError(
            f"{out} holds a run of other settings ({', '.join(names)}); go on with those, or give "
            "another folder"
        )
    file = JsonLines(out / LINES)
    for number, line in enumerate(file.found):
        if not isinstance(line, dict) or line.get("generation") != number:
            raise VesicleError(f"{file.path}, line {number + 1}, is no generation {number}")
    return file
