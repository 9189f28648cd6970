"""Rows of a TaskResult from the records of finished items.

A record is what `items.jsonl` holds of an item: `output`, `statistics` by metric, `spans`, how many
tokens are `prompt`, and the executed cost of `prefill`, of `decode` and of `generated` tokens,
beside what was `measured`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np

from vesicle.cost import Cost
from vesicle.evaluation.execution.executor import Execution, Executor, Span
from vesicle.evaluation.execution.items import Prepared
from vesicle.evaluation.report.results import Key, Score, TaskRow
from vesicle.phases import ALL, GENERATED, PROMPT
from vesicle.plan import FloatArray
from vesicle.tasks.base import Task
from vesicle.tasks.items import Missing, Output
from vesicle.tasks.metrics.base import Metric
from vesicle.tasks.metrics.bootstrap import Estimate, interval, paired

Record = dict[str, Any]
_RATIOS = ("flops_total", "weight_bytes", "kv_bytes_read", "kv_bytes_held", "bytes_read")


def facts_of(metric: Metric) -> dict[str, Any]:
    """What the record says of a metric."""
    return {
        "name": metric.name,
        "title": metric.title,
        "percent": metric.percent,
        "digits": 1 if metric.percent else metric.digits,
        "higher_is_better": metric.higher_is_better,
        "signature": metric.signature,
    }


def make_record(task: Task, prepared: Prepared, execution: Execution) -> Record:
    """What is kept of an item that was run."""
    item, output = prepared.item, execution.output
    return {
        "output": {k: v for k, v in asdict(output).items() if v != getattr(Output(), k)},
        "statistics": {m.name: list(m.statistics(item, output)) for m in task.metrics},
        "spans": [[s.start, s.stop, s.head] for s in execution.spans],
        "prefill": asdict(execution.prefill),
        "decode": asdict(execution.decode),
        "prompt": execution.prompt,
        "generated": asdict(execution.generated),
        "measured": {"seconds": execution.seconds, "peak_bytes": execution.peak_bytes},
    }


def spans_of(record: Record, phase: str = ALL) -> tuple[Span, ...]:
    """The tokens that were run; those of phase `generated` alone, if asked for."""
    spans = tuple(Span(*span) for span in record["spans"])
    return spans if phase == ALL else tuple(span.behind(record["prompt"]) for span in spans)


def executed_share(records: Sequence[Record], executor: Executor, phase: str = ALL) -> float:
    """Executed FLOPs over those of the dense model on the same tokens.

    Of all tokens or of one phase; 1 where it has no tokens.
    """
    everything = sum(executor.dense(spans_of(r)).flops_total for r in records)
    done = sum(_flops(r) for r in records)
    if phase != ALL:
        dense = sum(executor.dense(spans_of(r, GENERATED)).flops_total for r in records)
        executed = sum(Cost(**r["generated"]).flops_total for r in records)
        everything = dense if phase == GENERATED else everything - dense
        done = executed if phase == GENERATED else done - executed
    return done / everything if everything else 1.0


def make_row(
    key: Key,
    task: Task,
    items: Sequence[Prepared],
    scored: Mapping[str, Record],
    executor: Executor,
    *,
    dense: Mapping[str, Record],
    learnt: Mapping[str, Record] | None,
    seed: int,
    details: dict[str, Any],
    setting_seconds: float = 0.0,
    missing: Sequence[Missing] = (),
) -> TaskRow:
    """A row. Differences are over the items that both rows have.

    Args:
        key: Task, method and budget.
        task: The task.
        items: Its items.
        scored: Records by item, at least one of which the dense row has too.
        executor: Who ran them, to price the dense model.
        dense: Records of the dense row.
        learnt: Records of the learnt row at this budget; None where there is none to compare.
        seed: Of bootstraps.
        details: What the method was set to.
        setting_seconds: How long that took.
        missing: Items that could not be run.
    """
    items = [p for p in items if p.item.id in scored]
    records = [scored[p.item.id] for p in items]
    executed = _phases([(Cost(**r["prefill"]), Cost(**r["decode"])) for r in records])
    rest = _phases([_dense_phases(r, task, executor) for r in records])
    return TaskRow(
        task=key[0],
        method=key[1],
        budget=key[2],
        n_items=len(records),
        scores={m.name: score_of(m, scored, dense, learnt, seed) for m in task.metrics},
        executed=executed,
        dense=rest,
        ratio={
            name.removesuffix("_total"): executed["total"][name] / max(rest["total"][name], 1)
            for name in _RATIOS
        },
        shares={phase: executed_share(records, executor, phase) for phase in (PROMPT, GENERATED)},
        measured={
            "seconds": {
                "setting": setting_seconds,
            }
            | {
                phase: round(sum(r["measured"]["seconds"][phase] for r in records), 3)
                for phase in ("prefill", "decode")
            },
            "peak_bytes": max(r["measured"]["peak_bytes"] for r in records),
        },
        items={
            "ids": [p.item.id for p in items],
            "groups": [p.item.group for p in items],
            "statistics": {
                m.name: [r["statistics"][m.name] for r in records] for m in task.metrics
            },
            "flops": [_flops(r) for r in records],
            "dense_flops": [executor.dense(spans_of(r)).flops_total for r in records],
            "prompt_tokens": [r["spans"][0][1] for r in records],
            "answer_tokens": [sum(s[1] - s[0] for s in r["spans"][1:]) for r in records],
            "missing": [asdict(one) for one in missing],
        },
        details=details,
    )


def score_of(
    metric: Metric,
    own: Mapping[str, Record],
    dense: Mapping[str, Record],
    learnt: Mapping[str, Record] | None,
    seed: int,
) -> Score:
    """A metric of a row from records by item, beside the dense and the learnt row's."""

    def statistics(rows: Mapping[str, Record], ids: Sequence[str]) -> FloatArray:
        return np.array([rows[i]["statistics"][metric.name] for i in ids], np.float64)

    def difference(a: Mapping[str, Record], b: Mapping[str, Record]) -> Estimate | None:
        both = [i for i in a if i in b]
        return paired(metric, statistics(a, both), statistics(b, both), seed) if both else None

    value = interval(metric, statistics(own, list(own)), seed)
    delta = difference(own, dense)
    assert delta is not None
    gain = None if learnt is None else difference(learnt, own)
    return Score(
        value=value.value,
        low=value.low,
        high=value.high,
        delta=delta.value,
        delta_low=delta.low,
        delta_high=delta.high,
        learnt=None if gain is None else gain.value,
        learnt_low=None if gain is None else gain.low,
        learnt_high=None if gain is None else gain.high,
    )


def _dense_phases(record: Record, task: Task, executor: Executor) -> tuple[Cost, Cost]:
    spans = spans_of(record)
    if task.kind == "generate":
        return executor.dense(spans[:1]), executor.dense(spans[1:])
    return executor.dense(spans), Cost()


def _phases(costs: Sequence[tuple[Cost, Cost]]) -> dict[str, dict[str, float]]:
    """Costs as JSON, summed over items; of the cache held, the mean at the end of a phase."""
    n = len(costs)

    def total(parts: Sequence[Cost]) -> dict[str, float]:
        names = [f.name for f in fields(Cost)]
        sums = Cost(**{name: sum(getattr(c, name) for c in parts) for name in names})
        return {**sums.summary(), "kv_bytes_held": sums.kv_bytes_held / n}

    prefill, decode = zip(*costs, strict=True)
    ends = [replace(p + d, kv_bytes_held=d.kv_bytes_held or p.kv_bytes_held) for p, d in costs]
    return {"prefill": total(prefill), "decode": total(decode), "total": total(ends)}


def _flops(record: Record) -> int:
    return sum(
        value
        for phase in ("prefill", "decode")
        for name, value in record[phase].items()
        if name.startswith("flops_")
    )
