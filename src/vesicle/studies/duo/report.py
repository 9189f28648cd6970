"""The study's report, made from records alone: `report.json`, and `report.html` for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vesicle.files import atomic_path, write_json
from vesicle.studies.duo import tables
from vesicle.studies.duo.claims import claims
from vesicle.studies.duo.scale import SCALES
from vesicle.studies.duo.sections import page
from vesicle.studies.estimates import Records, Row, by_seed


def write_report(out: Path, scale: str, records: Records) -> dict[str, Any]:
    """Write both files, and give what the JSON one holds."""
    found = summary(scale, records)
    write_json(out / "report.json", found)
    with atomic_path(out / "report.html") as part:
        part.write_text(page(found, by_seed(records, "difficulty")[0]["drawn"]), encoding="utf-8")
    return found


def summary(scale: str, records: Records) -> dict[str, Any]:
    """All tables."""
    size = SCALES[scale]
    found = {
        "schema": "vesicle-study-duo-1",
        "scale": scale,
        "claims": claims(records, size.budgets),
        "decoders": [_decoder(record) for record in by_seed(records, "decoder")],
        "curves": tables.curves(records, "oracle"),
        "layers": tables.layers(records, "oracle"),
        "searches": tables.searches(records),
        "speed": records["speed/0"],
        "executed": tables.executed(records, size.budgets),
        "probes": tables.probes(records),
        "difficulty": tables.difficulty(records),
    }
    if size.three:
        found["three"] = {
            "curves": tables.curves(records, "oracle-three"),
            "layers": tables.layers(records, "oracle-three"),
        }
    return found


def _decoder(record: Row) -> Row:
    kept = {k: v for k, v in record.items() if k != "losses"}
    return {**kept, "first_loss": record["losses"][0], "last_loss": record["losses"][-1]}
