"""Oracles and token difficulty of a pretrained model: search, tables, and a page.

Each text's search is kept in `texts/` as safetensors, so that a run that was cut off goes on; the
report is made from these files alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vesicle.duo import (
    MOST_LAYERS,
    SEARCHES,
    Choices,
    Chooser,
    Context,
    DeepOracle,
    ErrorRouter,
    always,
    by_class,
    by_frequency,
    by_position,
    deep_oracle,
    entropy,
    fixed_patterns,
    spearman,
    table,
)
from vesicle.errors import VesicleError
from vesicle.files import atomic_path
from vesicle.intervals import interval
from vesicle.kept.classes import SPECIAL, classes
from vesicle.plan import FFN_BIG, FFN_SMALL
from vesicle.studies.duo.difficulty import told_groups
from vesicle.studies.duo.sections import shade
from vesicle.studies.page import Page
from vesicle.studies.paint import bars, heat, lines
from vesicle.studies.tokens import spans_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from vesicle.models import Text

CURVES = {
    "labelled": "oracle",
    "unlabelled": "oracle without labels",
    "fixed": "one pattern for all tokens",
    "drawn": "oracle's luck, on drawn labels",
}
EXECUTED = {
    "fixed": "one pattern for all tokens",
    "unlabelled": "oracle without labels",
    "shuffled": "its choices, given to other tokens",
    "labelled": "oracle",
    "router": "router by predicted error",
}
GAINS = 0.01
"""Nats from which on a token gains."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How patterns are searched.

    Attributes:
        most: The largest number of small FFNs.
        search: As `duo.SEARCHES` has it.
        n_random: Random patterns of each number.
        seed: Of those, and of drawn labels.
    """

    most: int
    search: str = "gains"
    n_random: int = 10
    seed: int = 0

    def check(self, n_layers: int) -> None:
        """Refuse what a model of L layers does not allow.

        Raises:
            VesicleError: Naming the setting and what is allowed.
        """
        if not 1 <= self.most <= n_layers:
            raise VesicleError(f"--most is {self.most}; allowed: 1 to {n_layers}, the layers")
        if n_layers > MOST_LAYERS:
            raise VesicleError(f"the model has {n_layers} layers; searched are up to {MOST_LAYERS}")
        if self.search not in SEARCHES:
            raise VesicleError(f"--search is {self.search!r}; allowed: {', '.join(SEARCHES)}")
        if self.n_random < 1:
            raise VesicleError(f"--random is {self.n_random}; allowed: 1 and above")

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of small FFNs for which random patterns are drawn."""
        return tuple(sorted({max(1, round(self.most * n / 4)) for n in (1, 2, 3, 4)}))


def search_texts(
    model: LlamaForCausalLM,
    texts: Tensor,
    selection: Tensor,
    settings: SearchSettings,
    out: Path,
    *,
    facts: dict[str, Any],
    show: Callable[[int, str], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Search each text, or take what `out` holds of it.

    Args:
        model: With small FFNs, see `duo.make_duo_of`.
        texts: (N, T + 1) token ids.
        selection: (M, T + 1) others, on which the fixed pattern is chosen.
        settings: How.
        out: Folder to write to.
        facts: What else the result depends on (JSON).
        show: Told how many texts are done.

    Returns:
        Of each text what its file holds, see `_packed`.

    Raises:
        VesicleError: The folder holds a search of other texts or settings.
    """
    from safetensors.torch import save_file

    whole = json.dumps({**asdict(settings), **facts}, sort_keys=True)
    found, fixed = [], None
    for number, tokens in enumerate(texts):
        path = out / "texts" / f"{number}.safetensors"
        if path.exists():
            found.append(_kept(path, whole, out))
        else:
            if fixed is None:
                contexts = [Context(model, own) for own in selection]
                fixed = fixed_patterns(contexts, settings.most)
            context = Context(model, tokens)
            oracle = deep_oracle(
                context,
                settings.most,
                fixed,
                search=settings.search,
                n_random=settings.n_random,
                counts=settings.counts,
                seed=settings.seed,
            )
            found.append(_packed(context, tokens, oracle, fixed))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as part:
                save_file(found[-1], part, {"facts": whole})
        if show is not None:
            show(number + 1, "")
    return found


def _kept(path: Path, facts: str, out: Path) -> dict[str, Tensor]:
    """What a file holds, if it is of the same search."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("facts") == facts:
                return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        line = " ".join(str(error).split())
        raise VesicleError(f"cannot read {path}: {line}; remove it") from error
    raise VesicleError(
        f"{out} holds a search of other texts or settings: use another folder, or remove it"
    )


def _packed(
    context: Context, tokens: Tensor, oracle: DeepOracle, fixed: Tensor
) -> dict[str, Tensor]:
    """Tokens (T + 1,), patterns, losses, difficulty, and the entropy of the all-big output."""
    big = context.logits(torch.full((context.n_layers,), FFN_BIG))
    return {
        "tokens": tokens.contiguous(),
        "patterns": oracle.patterns.to(torch.uint8).contiguous(),
        "unlabelled_patterns": oracle.unlabelled_patterns.to(torch.uint8).contiguous(),
        "fixed_patterns": fixed.to(torch.uint8).contiguous(),
        "difficulty": oracle.difficulty.contiguous(),
        "entropy": entropy(big).contiguous(),
        **{f"loss.{name}": loss.contiguous() for name, loss in oracle.loss.items()},
        **{f"random.{n}": loss.contiguous() for n, loss in oracle.random.items()},
    }


@torch.no_grad()
def executed(
    model: LlamaForCausalLM,
    choices: Choices,
    found: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    router: ErrorRouter,
) -> tuple[dict[str, Tensor], list[float]]:
    """Losses where all tokens take their choices at once, as they would be executed.

    Args:
        model: As `search_texts` has it.
        choices: Of the model.
        found: What it found.
        counts: (C,) numbers of small FFNs.
        router: Fitted to other texts.

    Returns:
        For each of `EXECUTED`, (N, C) nats a token above all big; and (C,) how many FFNs the router
        had small on average.
    """
    small: list[list[float]] = []

    def nats(tokens: Tensor, chooser: Chooser) -> float:
        with choices.by(chooser) as taken:
            logits = model(tokens[None, :-1], use_cache=False).logits[0]
        chosen = torch.stack([taken[layer] for layer in sorted(taken)])
        small[-1].append(float((chosen == FFN_SMALL).sum(0).float().mean()))
        return float(nn.functional.cross_entropy(logits, tokens[1:]))

    above: dict[str, list[list[float]]] = {name: [] for name in EXECUTED}
    for own in found:
        tokens, by_token = own["tokens"], own["patterns"]
        n_tokens, _, n_layers = by_token.shape
        small.append([])
        big = nats(tokens, always(FFN_BIG))
        order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(0))
        for name, rows in above.items():
            rows.append([])
            for count in counts:
                chosen = {
                    "fixed": own["fixed_patterns"][count].expand(n_tokens, n_layers),
                    "unlabelled": own["unlabelled_patterns"][:, count],
                    "shuffled": own["unlabelled_patterns"][order, count],
                    "labelled": by_token[:, count],
                }
                chooser = (
                    router.chooser(count) if name == "router" else table(chosen[name].long()[None])
                )
                rows[-1].append(nats(tokens, chooser) - big)
    had = torch.tensor(small)[:, -len(counts) :].mean(0)  # the router comes last
    return {name: torch.tensor(rows) for name, rows in above.items()}, had.tolist()


def summary(
    found: Sequence[dict[str, Tensor]],
    text: Text,
    settings: SearchSettings,
    training: Tensor,
    taken: dict[str, Tensor],
    had: Sequence[float],
    tasks: Sequence[str] = (),
) -> dict[str, Any]:
    """All tables, as JSON.

    Args:
        found: Of `search_texts`.
        text: Decodes tokens.
        settings: Of the search.
        training: (n,) tokens of other text, by which frequency is told.
        taken: Of `executed`.
        had: Likewise.
        tasks: Which task each text is of, if they are of tasks.
    """
    tokens = torch.stack([own["tokens"] for own in found])
    difficulty = torch.stack([own["difficulty"] for own in found])
    big = torch.stack([own["loss.labelled"][:, 0] for own in found])
    fixed = torch.stack([own["loss.fixed"][:, -1] for own in found])
    names = [name for own in found for name in _classes(text, own["tokens"].tolist())[1:]]
    others = {
        "loss, all big": big,
        "loss, fixed pattern": fixed,
        "entropy, all big": torch.stack([own["entropy"] for own in found]),
    }
    pieces = [text.decode([int(i)]) for i in tokens[0, 1:]]
    return {
        "schema": "vesicle-oracle-1",
        "settings": asdict(settings),
        "texts": len(found),
        "tokens": int(difficulty.numel()),
        "loss_all_big": float(big.mean()),
        "curves": {name: _curve(found, f"loss.{name}") for name in CURVES},
        "random": {
            str(n): _curve(found, f"random.{n}", settings.counts)
            for n in sorted(int(k.split(".")[1]) for k in found[0] if k.startswith("random."))
        },
        "executed": {
            name: [{"n_small": n, **_told(values[:, i])} for i, n in enumerate(settings.counts)]
            for name, values in taken.items()
        },
        "router_had_small": [round(n, 3) for n in had],
        "layers": {
            name: _shares(found, key)
            for name, key in (
                ("labelled", "patterns"),
                ("unlabelled", "unlabelled_patterns"),
                ("fixed", "fixed_patterns"),
            )
        },
        "difficulty": {
            "mean": _told(difficulty.mean(1)),
            "idle": _told((difficulty < GAINS).float().mean(1)),
            "by_position": told_groups(by_position(difficulty, min(10, difficulty.shape[1]))),
            "by_frequency": told_groups(by_frequency(difficulty, tokens[:, 1:], training)),
            "by_class": told_groups(by_class(difficulty.flatten(), names)),
            "by_task": {
                task: _told(difficulty[[own == task for own in tasks]].mean(1))
                for task in dict.fromkeys(tasks)
            },
            "correlations": {
                name: _correlation(difficulty.flatten(), values.flatten())
                for name, values in others.items()
            },
        },
        "drawn": {"pieces": pieces, "difficulty": [round(float(d), 4) for d in difficulty[0]]},
    }


def _correlation(left: Tensor, right: Tensor) -> float | None:
    """Of ranks; None where one is the same everywhere."""
    found = spearman(left, right)
    return round(found, 4) if math.isfinite(found) else None


def _curve(
    found: Sequence[dict[str, Tensor]], key: str, counts: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Nats above all big by number of small FFNs, with an interval over texts."""
    above = torch.stack([(own[key] - own["loss.labelled"][:, :1]).mean(0) for own in found])
    numbers = range(above.shape[1]) if counts is None else counts
    return [{"n_small": n, **_told(above[:, i])} for i, n in enumerate(numbers)]


def _told(values: Tensor) -> dict[str, float]:
    low, high = interval(values.double().numpy())
    return {"mean": round(float(values.mean()), 5), "low": round(low, 5), "high": round(high, 5)}


def _shares(found: Sequence[dict[str, Tensor]], key: str) -> list[list[float]]:
    """(K + 1, L) share of tokens whose FFN is small there."""
    small = [(own[key] == FFN_SMALL).float() for own in found]
    means = [s.mean(0) if s.dim() == 3 else s for s in small]
    return [[round(float(v), 4) for v in row] for row in torch.stack(means).mean(0)]


def _classes(text: Text, ids: list[int]) -> list[str]:
    """Classes of tokens by where they stand in what they spell."""
    spans = spans_of(text.decode, ids)
    told = classes(text.decode(ids), spans)
    # Tokens that spell nothing are special, but for the first parts of a character.
    return [
        SPECIAL if start == stop and not text.decode([i]) else name
        for name, (start, stop), i in zip(told, spans, ids, strict=True)
    ]


def page(found: dict[str, Any]) -> str:
    """The page."""
    made = Page("Oracles and token difficulty")
    made.say(
        f"{found['texts']} texts, {found['tokens']:,} tokens; loss with all FFNs big "
        f"{found['loss_all_big']:.3f} nats a token. A token takes a pattern of big and small FFNs "
        "while all tokens before it are all big. The oracle takes the pattern of least loss that "
        "its search finds, by the label; without labels, the nearest to the output of all big. "
        "The fixed pattern was chosen on other texts. What an oracle gains on labels that are "
        "drawn from the model's own output is luck. Intervals are of 95 %, over texts."
    )
    numbers = [row["n_small"] for row in found["curves"]["labelled"]]
    shown = sorted({round(numbers[-1] * n / 6) for n in range(7)})
    made.heading("Loss against the number of small FFNs")
    made.table(
        ["nats above all big", *map(str, shown)],
        [
            [what, *(_cell(found["curves"][name][n]) for n in shown)]
            for name, what in CURVES.items()
        ],
    )
    for n, rows in found["random"].items():
        what = "a random pattern" if n == "1" else f"best of {n} random patterns"
        made.table(
            [f"{what}, small FFNs", *(str(r["n_small"]) for r in rows)],
            [["nats above all big", *(_cell(r) for r in rows)]],
        )
    curves = {
        what: [(r["n_small"], r["mean"]) for r in found["curves"][name]]
        for name, what in CURVES.items()
    }
    for n, rows in found["random"].items():
        curves[f"best of {n} random"] = [(r["n_small"], r["mean"]) for r in rows]
    made.draw("Nats above all big.", lines(curves, "small FFNs of a token", "nats a token"))
    made.say("Executed: all tokens take their choices at once, nats above all big.")
    made.table(
        ["small FFNs", *(str(r["n_small"]) for r in found["executed"]["fixed"])],
        [[what, *map(_cell, found["executed"][name])] for name, what in EXECUTED.items()],
    )
    told = ", ".join(f"{n:.2f}" for n in found["router_had_small"])
    made.say(f"The router was fitted to other texts. It had {told} FFNs small on average.")
    made.heading("Where FFNs are small")
    for name, what in (("labelled", "oracle"), ("unlabelled", "oracle without labels")):
        made.draw(
            f"The {what}: share of tokens, by number of small FFNs.",
            heat(found["layers"][name], "layer", "small FFNs of a token"),
        )
    made.draw("The fixed pattern.", heat(found["layers"]["fixed"], "layer", "small FFNs"))
    _difficulty(made, found)
    return made.html()


def _cell(row: dict[str, Any]) -> str:
    return f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"


def _difficulty(made: Page, found: dict[str, Any]) -> None:
    told = found["difficulty"]
    made.heading("Difficulty")
    made.say(
        f"A token's loss under the fixed pattern of {found['settings']['most']} small FFNs, less "
        f"the least loss that was found for it: {told['mean']['mean']:.3f} nats a token; "
        f"{100 * told['idle']['mean']:.1f} % of the tokens gain less than {GAINS} nats."
    )
    places = {"difficulty": [(n, r["mean"]) for n, r in enumerate(told["by_position"], 1)]}
    made.draw("By position in the text.", lines(places, "tenth of the text", "nats a token"))
    for head, key in (
        ("fifth of tokens, rare to frequent", "by_frequency"),
        ("class of the predicted token", "by_class"),
    ):
        made.table(
            [head, "tokens", "difficulty"],
            [[r["name"], str(r["tokens"]), f"{r['mean']:.3f}"] for r in told[key]],
        )
    if told["by_task"]:
        made.table(
            ["task", "difficulty, mean over texts"],
            [
                [task, f"{r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f})"]
                for task, r in told["by_task"].items()
            ],
        )
    made.draw("By class.", bars({r["name"]: r["mean"] for r in told["by_class"]}, "nats a token"))
    made.table(
        ["difficulty goes with", "rank correlation"],
        [
            [name, "" if value is None else f"{value:+.3f}"]
            for name, value in told["correlations"].items()
        ],
    )
    made.say(
        "A text: the stronger the ground of a token, the more difficult it is to predict; steps at "
        "0.01, 0.3 and 1 nat."
    )
    drawn = found["drawn"]
    made.text(drawn["pieces"], [shade(nats) for nats in drawn["difficulty"]])
