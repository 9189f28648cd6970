"""`docs/results.md`: reference numbers of all tasks, made from committed records alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from vesicle.evaluation.methods.names import saves_memory
from vesicle.evaluation.report.results import Score, TaskResult, TaskRow
from vesicle.evaluation.report.table import made_with
from vesicle.models.default import DEFAULT_MODEL

HEAD = """# Results

Made by `make results` from the records in `results/tasks`; a test fails when this page is stale.
Numbers come from the command above each table, which [evaluation](evaluation.md) explains. Cost is
the executed share of the dense model's FLOPs on the same tokens. Intervals are 95 % bootstrap
intervals over items; in brackets behind a method is that of its difference to dense, paired. About
one comparison in twenty leaves its interval by chance alone: a single win or loss means little.

Runs went side by side with others, one thread each: their seconds are no measure of speed. The
shipped modulator [previews the LM head](transmitters/gaba.md#words-of-the-lm-head) now; sections
that do not say so are of before, and lose more at the same cost.
"""

TAIL = """
## When not to use
- To compare with a leaderboard: few items, a small model, and prompts that differ from others'.
- To tell two methods apart whose interval of the difference holds 0.
"""


_COSTS = {"flops": "executed FLOPs", "kv_bytes_held": "KV held"}


def results_page(
    runs: Mapping[str, TaskResult], agreements: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page.

    Args:
        runs: By the name of their folder.
        agreements: What `benchmarks/agreement.py` wrote, of the same executors.
    """
    parts = [HEAD]
    for name, result in runs.items():
        parts += _run(name, result)
    if agreements:
        parts += _agreement(agreements)
    return "\n".join(parts).rstrip() + "\n" + TAIL


def _run(name: str, result: TaskResult) -> list[str]:
    model, config = result.model, result.config
    lines = [
        f"## {name.capitalize().replace('_', ' ')}",
        "",
        "```bash",
        command(result),
        "```",
        "",
        f"{model['name']}, {model['weights']} weights, {model['kv']} cache, executed by "
        f"{model['through']}; modulator: {result.decider}. "
        f"{made_with(result.versions, result.hardware)} "
        f"[All columns](../results/tasks/{name}/table.md).",
        "",
    ]
    if all(row.method == "dense" for row in result.rows):
        lines += _dense_table(result)
    else:
        lines += _cost_table(result)
        lines += ["", *_verdicts(result)]
    if config["limit"]:
        lines += ["", f"At most {config['limit']} items of a task, drawn with seed {result.seed}."]
    return [*lines, ""]


def command(result: TaskResult) -> str:
    """The command that makes a run, with what is not at its default; DIR is the data folder."""
    c = result.config
    words = ["vesicle", "eval", *c["tasks"]]
    words += ["--method", ",".join(c["methods"])]
    words += ["--budget", ",".join(f"{b:g}" for b in c["budgets"])]
    if c["data"] is not None:
        words += ["--data", "sample" if c["data"] == "sample" else "DIR"]
    words += ["--limit", str(c["limit"] or 0)]
    # Records of before there were phases have none: every token was governed.
    governs = any(b < 1 for b in c["budgets"]) and set(c["methods"]) - {"dense"}
    for word in c.get("phases", ["all"]) if governs else ():
        words += ["--phase", word]
    for name in ("split", "max_length", "window", "per_cell"):
        if c[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(c[name])]
    if c.get("context"):  # old records have none
        words += ["--context", str(c["context"])]
    for name in ("lengths", "depths"):
        if c[name]:
            words += [f"--{name}", ",".join(f"{v:g}" for v in c[name])]
    if c["seed"]:
        words += ["--seed", str(c["seed"])]
    if c["dial"] != "tuned":
        words += ["--dial", c["dial"]]
    defaults = {"best_of": 20, "selection": 4, "oracle_windows": 2, "oracle_length": 512}
    for name, default in defaults.items():
        if c.get(name, default) != default:  # old records lack some
            words += [f"--{name.replace('_', '-')}", str(c[name])]
    model = result.model
    if model["name"] != DEFAULT_MODEL:
        words += ["--model", model["name"]]
    if model["through"] != "engine":
        words += ["--through", model["through"]]
    elif model["name"] == DEFAULT_MODEL and model["weights"] != "int4":  # its own format
        words += ["--weights", model["weights"]]
    return " ".join(shlex.quote(word) for word in words)


def _dense_table(result: TaskResult) -> list[str]:
    lines = [
        "| task | items | metric | dense [95 %] | other metrics |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task in result.tasks:
        row = result.find(task["name"], "dense", 1.0)
        main, *others = task["metrics"]
        rest = ", ".join(f"{m['title']} {_number(m, row.scores[m['name']].value)}" for m in others)
        lines.append(
            f"| {task['title']} | {task['n_items']} | {main['title']} | "
            f"{_interval(main, row.scores[main['name']])} | {rest} |"
        )
    return lines


def _cost_table(result: TaskResult) -> list[str]:
    """One line a task and budget; the methods side by side.

    What saves memory and no FLOPs has the memory held as its cost.
    """
    methods = list(dict.fromkeys(row.method for row in result.rows if row.method != "dense"))
    cost = "kv_bytes_held" if all(saves_memory(m) for m in methods) else "flops"
    lines = [
        f"| task, metric | items | dense | {_COSTS[cost]} | " + " | ".join(methods) + " |",
        "|" + " --- |" * (4 + len(methods)),
    ]
    for task in result.tasks:
        main = task["metrics"][0]
        rows = result.of_task(task["name"])
        dense = rows[0].scores[main["name"]].value
        sign = "" if main["higher_is_better"] else ", lower is better"
        lost = {(m["method"], m["budget"]) for m in result.missing if m["task"] == task["name"]}
        gone = [budget for _, budget in lost]
        for budget in sorted({*(row.budget for row in rows[1:]), *gone}, reverse=True):
            own = {row.method: row for row in rows[1:] if row.budget == budget}
            shares = [f"{row.ratio[cost]:.3f}" for row in own.values()]
            span = " to ".join(sorted({min(shares), max(shares)})) if shares else "-"
            cells = [
                "out of reach" if (method, budget) in lost else _cell(main, own.get(method))
                for method in methods
            ]
            lines.append(
                f"| {task['title']}, {main['title']}{sign} | {task['n_items']} | "
                f"{_number(main, dense)} | {span} | " + " | ".join(cells) + " |"
            )
    return lines


def _verdicts(result: TaskResult) -> list[str]:
    """Where the learnt modulator wins and loses, by the intervals of paired differences."""
    wins, losses, open_ = [], [], 0
    for task in result.tasks:
        main = task["metrics"][0]
        sign = 1 if main["higher_is_better"] else -1
        for row in result.of_task(task["name"]):
            score = row.scores[main["name"]]
            if score.learnt is None or score.learnt_low is None or score.learnt_high is None:
                continue
            place = f"{task['name']} at {row.budget:g} against {row.method}"
            low, high = sorted((sign * score.learnt_low, sign * score.learnt_high))
            if low > 0:
                wins.append(place)
            elif high < 0:
                losses.append(place)
            else:
                open_ += 1
    total = len(wins) + len(losses) + open_
    if not total:
        return []
    return [
        f"Of {total} comparisons of the modulator with a control at equal cost, the interval of "
        f"the paired difference favours the modulator in {len(wins)}, the control in "
        f"{len(losses)}, and holds 0 in {open_}.",
        "",
        f"- **The modulator is better**: {'; '.join(wins) or 'nowhere'}.",
        f"- **The modulator loses**: {'; '.join(losses) or 'nowhere'}.",
    ]


def _agreement(agreements: Sequence[Mapping[str, Any]]) -> list[str]:
    names = agreements[0]["executors"]
    lines = [
        "## Agreement of executors",
        "",
        "The dense model through each executor, same items and prompts "
        "([how](evaluation.md#do-engine-reference-and-transformers-agree)). Allowed: half a point, "
        "and no difference at all in a choice by log-likelihood.",
        "",
        "| task, metric | items | " + " | ".join(names) + " | items that differ | |",
        "|" + " --- |" * (4 + len(names)),
    ]
    for task in (task for found in agreements for task in found["tasks"]):
        for metric in task["metrics"].values():
            values = " | ".join(f"{v:.3f}" for v in metric["values"])
            differ = ", ".join(map(str, metric["items_that_differ"][1:]))
            verdict = "agree" if metric["agrees"] else "**differ**"
            lines.append(
                f"| {task['name']}, {metric['title']} | {task['n_items']} | {values} | {differ} | "
                f"{verdict} |"
            )
    return lines


def _cell(metric: Mapping[str, Any], row: TaskRow | None) -> str:
    if row is None:
        return ""
    score = row.scores[metric["name"]]
    text = _number(metric, score.value)
    if score.delta_low is None or score.delta_high is None:
        return text
    digits = 1 if metric["percent"] else 2
    return f"{text} ({score.delta_low:+.{digits}f} to {score.delta_high:+.{digits}f})"


def _interval(metric: Mapping[str, Any], score: Score) -> str:
    text = _number(metric, score.value)
    if score.low is None or score.high is None:
        return text
    return f"{text} [{_number(metric, score.low)}, {_number(metric, score.high)}]"


def _number(metric: Mapping[str, Any], value: float) -> str:
    return f"{value:.1f}" if metric["percent"] else f"{value:.2f}"
