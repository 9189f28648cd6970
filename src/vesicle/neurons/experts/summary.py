"""What a comparison of experts came to: a row for each reader, and the paper's claims beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vesicle.neurons.experts.corpus import Corpus
from vesicle.neurons.experts.coverage import always_counts
from vesicle.neurons.experts.draws import Estimate, of_counts, of_means
from vesicle.neurons.experts.settings import Settings
from vesicle.neurons.experts.study import READERS, Results

Row = dict[str, Any]
METRICS: dict[str, str] = {
    "loss": "nats a token on test texts; of autoencoders with their reconstruction in place",
    "legal": "share of test tokens for which the likeliest is legal, by the rules",
    "coverage": "mean over properties of the F1 of the best single feature, on other items",
    "equal_coverage": "the same with as many features as the dense decoder has, drawn at random",
    "reconstruction": "F1 of what classifiers of a precision of 0.95 say of a token",
}
"""What is estimated, with intervals."""
NUMBERS = (
    "features",
    "active",
    "alive",
    "published_coverage",
    "load",
    "agreement",
    "variance_missed",
)
"""Single numbers, of which the mean over seeds is told."""
CLAIMS: tuple[tuple[str, str, str, str, int], ...] = (
    ("experts lose less at equal active width", "loss", "sparsity", "dense", -1),
    ("experts know more properties than dense neurons", "coverage", "sparsity", "dense", 1),
    ("they rebuild more", "reconstruction", "sparsity", "dense", 1),
    ("they know more at equal number of features", "equal_coverage", "sparsity", "dense", 1),
    ("more than an autoencoder", "coverage", "sparsity", "autoencoder residual", 1),
    (
        "they rebuild more than an autoencoder",
        "reconstruction",
        "sparsity",
        "autoencoder residual",
        1,
    ),
    ("the sparsity-aware router helps coverage", "coverage", "sparsity", "top-k", 1),
    ("the sparsity-aware router helps reconstruction", "reconstruction", "sparsity", "top-k", 1),
    ("converted experts lose less at equal active width", "loss", "converted", "dense", -1),
    ("converted experts know more", "coverage", "converted", "dense", 1),
    ("converted experts rebuild more", "reconstruction", "converted", "dense", 1),
    ("control: more than as many units that all run", "coverage", "sparsity", "wide", 1),
    ("control: more than a decoder that was not trained", "coverage", "sparsity", "untrained", 1),
    ("control: more than the inputs tell", "coverage", "sparsity", "inputs", 1),
    ("control: more than what is always active", "coverage", "sparsity", "always", 1),
)
"""What is claimed, of which metric, of whom, against whom, and on which side of 0 it lies."""


def summarise(settings: Settings, corpus: Corpus, results: Results) -> Row:
    """The report.

    Args:
        settings: Of the comparison.
        corpus: What was judged by.
        results: Of each seed.

    Returns:
        As JSON has it.
    """
    estimates = _estimates(corpus, results)
    rows = {}
    for name in READERS:
        numbers = [seed[name][0] for seed in results]
        rows[name] = {
            **{m: estimates[m][name].row() for m in METRICS if name in estimates[m]},
            **{n: _mean([row[n] for row in numbers]) for n in NUMBERS if n in numbers[0]},
            "best": numbers[0]["best"],
        }
    rows["always"] = {"coverage": estimates["coverage"]["always"].row()}
    conversion = {
        name: of_means([seed["conversion"][1][name] for seed in results]).row()
        for name in results[0]["conversion"][1]
    }
    return {
        "settings": asdict(settings),
        "seeds": len(results),
        "properties": len(corpus.properties.names),
        "tokens_judged": len(corpus.properties.values),
        "metrics": METRICS,
        "readers": rows,
        "conversion": conversion,
        "claims": [_claim(estimates, *claim) for claim in CLAIMS if _told(estimates, *claim)],
    }


def _estimates(corpus: Corpus, results: Results) -> dict[str, dict[str, Estimate]]:
    """By metric and reader; a reader without a metric is left out."""
    found: dict[str, dict[str, Estimate]] = {}
    for metric in METRICS:
        of: Callable[..., Estimate] = of_counts if metric.endswith("coverage") else of_means
        found[metric] = {
            name: of([seed[name][1][metric] for seed in results])
            for name in READERS
            if metric in results[0][name][1]
        }
    always = always_counts(corpus.properties)
    found["coverage"]["always"] = of_counts([always] * len(results))
    # A reader that has no more features than the dense decoder is itself at equal number.
    for name in ("dense", "untrained"):
        found["equal_coverage"][name] = found["coverage"][name]
    return found


def _told(estimates: dict[str, dict[str, Estimate]], claim: str, metric: str, *rest: Any) -> bool:
    return all(name in estimates[metric] for name in rest[:2])


def _claim(
    estimates: dict[str, dict[str, Estimate]],
    claim: str,
    metric: str,
    left: str,
    right: str,
    side: int,
) -> Row:
    difference = estimates[metric][left] - estimates[metric][right]
    return {
        "claim": claim,
        "metric": metric,
        "left": left,
        "right": right,
        "difference": difference.row(),
        "verdict": difference.verdict(side),
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)
