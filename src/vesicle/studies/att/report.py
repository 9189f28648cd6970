"""The study's report, made from records alone: `report.json`, and `report.html` for people."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vesicle.files import atomic_path, write_json
from vesicle.studies.att.scale import SCALES
from vesicle.studies.att.tables import Records, Row, compared, pages, slopes
from vesicle.studies.att.variants import ABLATIONS, COMPARED, IN_TASKS, SELECTED
from vesicle.studies.page import Page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "lm": "Language modelling (WikiText-2)",
    "translation": "Translation (Multi30k, eight captions at a time)",
    "summary": "Summaries of papers (PubMed)",
}
_SHOWN = 400
"""Tokens of a tiling that are drawn."""


def write_report(out: Path, scale: str, records: Records) -> dict[str, Any]:
    """Write both files, and give what the JSON one holds."""
    found = summary(scale, records)
    write_json(out / "report.json", found)
    with atomic_path(out / "report.html") as part:
        part.write_text(page(found, records), encoding="utf-8")
    return found


def summary(scale: str, records: Records) -> dict[str, Any]:
    """All tables."""
    size = SCALES[scale]
    names = [v.name for v in COMPARED]
    tables = {
        task: compared(records, task, names if task == "lm" else list(IN_TASKS), size.shares)
        for task in _TITLES
    }
    tables["ablations"] = compared(
        records, "lm", ["dense", "att", *(v.name for v in ABLATIONS)], size.shares
    )
    bases = {job: record for job, record in records.items() if "/base/" in job}
    attention = records["speed/attention"]
    return {
        "schema": "vesicle-study-att-1",
        "scale": scale,
        "bases": {
            job: {k: v for k, v in record.items() if k != "losses"} | {"loss": record["losses"][-1]}
            for job, record in bases.items()
        },
        "tables": tables,
        "pages": pages(records, list(SELECTED)),
        "attention": attention,
        "slopes": {
            key: slopes(attention["rows"], key) for key in ("prefill_s", "step_ms", "cache_bytes")
        },
        "decoders": records["speed/decoders"],
        "tilings": [
            {k: text[k] for k in ("name", "by_class", "by_surprise", "by_place")}
            for text in records["tilings"]["texts"]
        ],
    }


def page(found: dict[str, Any], records: Records) -> str:
    """The page."""
    made = Page("Adaptive Tensor Tiling, measured")
    made.say(
        f"Scale: {found['scale']}. Decoders trained from scratch; each variant goes on from the "
        "same densely trained decoder with equal parameters and tokens. Share is what queries read "
        "of what dense attention reads, tiles and summaries counted. Differences are to dense "
        "attention, in nats a token, with 95 % intervals over texts."
    )
    for task, title in _TITLES.items():
        made.heading(title)
        _losses(made, found["tables"][task])
    made.heading("The dense decoder, run by rules that choose pages")
    _losses(made, found["pages"])
    made.heading("Ablations")
    made.say("Each is trained and judged as att is, but for one thing.")
    _losses(made, found["tables"]["ablations"])
    what = {v.name: v.what for v in (*COMPARED, *ABLATIONS)} | SELECTED
    made.table(["variant", "what it is"], list(what.items()))
    _speed(made, found)
    _tilings(made, records["tilings"])
    if "case" in records:
        _case(made, records["case"])
    return made.html()


def _losses(made: Page, rows: list[Row]) -> None:
    extra = [
        k for k in ("bleu", "rouge1", "rougeL", "written_tokens_per_s") if any(k in r for r in rows)
    ]
    head = ["variant", "share", "seeds", "loss", "difference", "95 %", "perplexity", *extra]
    lines = []
    for row in rows:
        name = row["variant"] + (f" {_told(row['options'])}" if "options" in row else "")
        if row["wanted"] is not None:
            name += f" at {row['wanted']:g}"
        lines.append(
            [
                name,
                f"{row['share']:.3f}",
                str(row["seeds"]),
                f"{row['loss']:.4f}",
                f"{row['difference']:+.4f}",
                f"{row['low']:+.4f} to {row['high']:+.4f}",
                f"x {row['perplexity_ratio']:.4f}",
                *(f"{row[k]:.1f}" if k in row else "" for k in extra),
            ]
        )
    made.table(head, lines)
    made.draw("Loss above dense attention's against what is read.", _curves(rows))


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in options.items())


def _curves(rows: list[Row]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = sorted((r["share"], r["difference"]) for r in rows if r["variant"] == name)
            axes.plot(*zip(*own, strict=True), marker="o", markersize=4, linewidth=1, label=name)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_xlabel("share of dense attention's reads")
        axes.set_ylabel("nats a token above dense")
        axes.legend(fontsize=7, ncols=2)

    return paint


def _speed(made: Page, found: dict[str, Any]) -> None:
    attention = found["attention"]
    made.heading("Time and memory against length")
    made.say(
        f"Attention alone, 9 query heads and 3 KV heads of 64, in PyTorch, {attention['threads']} "
        f"threads of {attention['machine']}."
    )
    head = ["", "tokens", "prefill, s", "a step, ms", "held, MB"]
    lines = [
        [
            r["what"],
            f"{r['length']:,}",
            f"{r['prefill_s']:.3f}",
            f"{r['step_ms']:.3f}",
            f"{r['cache_bytes'] / 1e6:.2f}",
        ]
        for r in attention["rows"]
    ]
    made.table(head, lines)
    fitted = found["slopes"]
    made.say("Slopes of the logarithms, over all lengths:")
    made.table(
        ["", "prefill", "a step", "held"],
        [
            [what, *(f"{fitted[k][what]:.2f}" for k in ("prefill_s", "step_ms", "cache_bytes"))]
            for what in fitted["prefill_s"]
        ],
    )
    for key, title in (("prefill_s", "seconds of prefill"), ("step_ms", "milliseconds a step")):
        made.draw(f"Attention alone: {title}.", _lengths(attention["rows"], key, title))
    decoders = found["decoders"]
    made.heading("Against model size")
    made.say(f"Whole decoders with random weights after {decoders['length']:,} tokens.")
    made.table(
        ["", "parameters", "prefill, tokens/s", "decode, tokens/s", "held, MB"],
        [
            [
                f"{r['width']} wide, {r['n_layers']} layers, {r['what']}",
                f"{r['parameters']:,.0f}",
                f"{r['prefill_tokens_per_s']:,.0f}",
                f"{r['decode_tokens_per_s']:.0f}",
                f"{r['cache_bytes'] / 1e6:.1f}",
            ]
            for r in decoders["rows"]
        ],
    )


def _lengths(rows: list[Row], key: str, title: str) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for what in dict.fromkeys(row["what"] for row in rows):
            own = [(r["length"], r[key]) for r in rows if r["what"] == what]
            axes.loglog(*zip(*own, strict=True), marker="o", markersize=4, linewidth=1, label=what)
        axes.set_xlabel("tokens")
        axes.set_ylabel(title)
        axes.legend(fontsize=7)

    return paint


def _tilings(made: Page, record: dict[str, Any]) -> None:
    made.heading("Tilings")
    made.say(
        f"What the learnt importance network does at a share of {record['share']:g}. The stronger "
        "the ground, the smaller the tile that a token lies in; a line begins a tile. Drawn is the "
        "layer whose tiles differ most."
    )
    for text in record["texts"]:
        made.heading(text["name"], 3)
        layer = max(range(len(text["sizes"])), key=lambda i: len(set(text["sizes"][i])))
        made.text(text["pieces"][:_SHOWN], _marks(text["sizes"][layer][:_SHOWN]))
        made.table(
            ["class of tokens", "tokens", "tiles a position"],
            [[r["class"], str(r["tokens"]), f"{r['tiles']:.3f}"] for r in text["by_class"]],
        )
        made.table(
            ["fifth of tokens by surprise", "nats", "tiles a position"],
            [
                [str(i), f"{r['loss']:.2f}", f"{r['tiles']:.3f}"]
                for i, r in enumerate(text["by_surprise"], 1)
            ],
        )
        made.draw("Tiles a position, by layer and tenth of the text.", _places(text["by_place"]))


def _marks(sizes: list[int]) -> list[str]:
    """Classes of the page's style for positions that lie in tiles of these sizes."""
    return [f"s{s}" + (" e" if i % s == 0 and s > 1 else "") for i, s in enumerate(sizes)]


def _case(made: Page, record: dict[str, Any]) -> None:
    made.heading("The proposal's test case")
    made.say(
        "The default model, which was not trained with tiles, dense and with 16 tiles a block of "
        "64, split where attention was received."
    )
    made.say(record["request"])
    for answer in record["answers"]:
        made.heading(f"{answer['what']}, {100 * answer['share']:.0f} % read", 3)
        made.text([answer["text"]], [""])
    made.say("The tiles of the prompt in the layer in the middle:")
    sizes = record["sizes"][len(record["sizes"]) // 2]
    made.text(record["pieces"], _marks(sizes))


def _places(rows: list[list[float]]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        shown = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="Blues")
        axes.set_xlabel("tenth of the text")
        axes.set_ylabel("layer")
        axes.figure.colorbar(shown, ax=axes)

    return paint
