"""The study's report, made from records alone: JSON, a page for people, and a summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesicle.files import atomic_path, write_json
from vesicle.studies.estimates import Records, Row, by_seed
from vesicle.studies.neuro import inside, tables
from vesicle.studies.neuro.scale import SCALES
from vesicle.studies.neuro.sections import page, summary
from vesicle.studies.neuro.variants import GROUPS

_TABLES = tuple(group for group in GROUPS if group not in ("whole", "hybrid"))


def write_report(out: Path, scale: str, records: Records) -> dict[str, Any]:
    """Write `report.json`, `report.html` and `summary.md`; give what the first holds."""
    found = tables_of(scale, records)
    write_json(out / "report.json", found)
    drawn = {"paths": by_seed(records, "paths")[0], "case": records.get("case")}
    for name, text in (("report.html", page(found, drawn)), ("summary.md", summary(found))):
        with atomic_path(out / name) as part:
            part.write_text(text, encoding="utf-8")
    return found


def tables_of(scale: str, records: Records) -> dict[str, Any]:
    """All tables."""
    size = SCALES[scale]
    budgets = size.budgets
    compared = [tables.WHOLE, "uniform"]
    return {
        "schema": "vesicle-study-neuro-1",
        "scale": scale,
        "budgets": list(budgets),
        "decoders": [_decoder(record) for record in by_seed(records, "base")],
        "groups": {group: tables.group_table(records, group, budgets) for group in _TABLES},
        "earned": tables.earned(records, budgets),
        "tasks": tables.task_table(records, compared, budgets),
        "controls": tables.control_table(records, budgets),
        "inside": {
            "levels": inside.levels(records),
            "doses": inside.doses(records),
            "lesions": inside.lesions(records),
            "pollution": inside.pollution(records),
            "hybrids": inside.hybrids(records, budgets),
            "pruned": inside.pruned(records, budgets),
            "times": inside.times(records, list(size.timed)),
        },
        "scaling": tables.scaling(records, size.sizes, budgets),
        "curves": tables.curves(
            records,
            [v["name"] for v in tables.group_table(records, "baseline", ())],
            lambda losses: round(sum(losses) / len(losses), 5),
        ),
    }


def _decoder(record: Row) -> Row:
    kept = {k: v for k, v in record.items() if k != "losses"}
    return {**kept, "first_loss": record["losses"][0], "last_loss": record["losses"][-1]}
