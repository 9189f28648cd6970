"""The page holds what the cards do, lets nothing out of it, and finds what is sought."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.neurons.tiny_cards import (
    HARMFUL,
    SETTINGS,
    tiny_cards,
    tiny_llama,
    tiny_text,
    tiny_windows,
)
from vesicle.neurons.atlas import page, summary
from vesicle.neurons.atlas.arrays import _whole, packed
from vesicle.neurons.atlas.overview import RARE, overview
from vesicle.neurons.atlas.plots import bars, spreads
from vesicle.neurons.cards import Cards, make_cards
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron
from vesicle.neurons.own_text import own_texts
from vesicle.terminal import visible

TYPES = {"Uint16Array": "<u2", "Uint32Array": "<u4", "Float32Array": "<f4"}
LAYERS, WIDTH, KINDS = 3, 80, ("gate", "up", "down")


class Read(HTMLParser):
    """Elements of a page as a browser would find them, and what its scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, str] = {}
        self.types: dict[str, str] = {}
        self._own: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._own = (given.get("id") or "") if tag == "script" else None
        if self._own:
            self.types[self._own] = given.get("data-type") or ""

    def handle_endtag(self, tag: str) -> None:
        self._own = None

    def handle_data(self, data: str) -> None:
        if self._own:
            self.data[self._own] = self.data.get(self._own, "") + data

    def array(self, name: str) -> np.ndarray:
        raw = base64.b64decode(self.data.get(f"array-{name}", ""), validate=True)
        return np.frombuffer(raw, TYPES[self.types[f"array-{name}"]])


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Cards:
    return tiny_cards(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def html(cards: Cards) -> str:
    return page(cards, tiny_text())


@pytest.fixture(scope="module")
def read(html: str) -> Read:
    return Read(html)


@pytest.fixture(scope="module")
def facts(read: Read) -> dict[str, Any]:
    return json.loads(read.data["facts"])


# What it holds ------------------------------------------------------------------------------------


def test_arrays_are_the_cards(cards: Cards, read: Read, facts: dict[str, Any]):
    decoded, contexts = cards.decoded, cards.contexts
    ids = read.array("vocabulary")[read.array("ids")]
    np.testing.assert_array_equal(ids.reshape(decoded.ids.shape), decoded.ids)
    for name, tensor in {
        "scores": decoded.scores,
        "high": contexts.activations,
        "low": contexts.low_activations,
        "mean": contexts.mean.float(),
        "deviation": cards.deviation.float(),
        "share": cards.share_above_half.float(),
        "drive": torch.stack(list(cards.drives.drive.values())),
        "size": torch.stack(list(cards.drives.size.values())),
    }.items():
        np.testing.assert_array_equal(read.array(name).reshape(tensor.shape), tensor, name)
    for side, places in (("high", contexts.places), ("low", contexts.low_places)):
        flat = read.array(f"{side}_places").reshape(places.shape[:-1])
        np.testing.assert_array_equal(np.stack(np.divmod(flat, 32), -1), places)
    assert facts["kinds"] == list(KINDS)
    assert facts["transmitters"] == ["dopamine", "serotonin", "gaba"]
    assert (facts["layers"], facts["width"]) == (LAYERS, WIDTH)
    assert (facts["top"], facts["contexts"], facts["length"]) == (4, 5, 32)


def test_texts_are_those_of_tokens(read: Read, facts: dict[str, Any]):
    text = tiny_text()
    pieces = text.pieces(read.array("vocabulary").tolist())
    assert facts["tokens"] == [visible(piece) for piece in pieces]
    told = [facts["strings"][i] for i in read.array("text")]
    assert told == [own for window in tiny_windows().tolist() for own in own_texts(window, text)]
    assert len(set(facts["strings"])) == len(facts["strings"])


def test_nothing_gets_out_of_the_data(html: str, read: Read, facts: dict[str, Any]):
    there = {visible(token) for token in HARMFUL}
    assert there <= set(facts["tokens"])
    assert all(any(token in own for own in facts["strings"]) for token in there)
    tags = [tag for tag, _ in read.tags]
    assert "img" not in tags
    scripts = [given for tag, given in read.tags if tag == "script"]
    plain = [given for given in scripts if not given]
    data = [given for given in scripts if given]
    assert len(plain) == 2
    assert {given["type"] for given in data} == {"application/json", "text/plain"}
    assert tags.count("title") - tags.count("a") == 1, "one of the page, one of each layer's link"
    for _, given in read.tags:
        assert not [name for name in given if name.startswith("on") or name == "src"]
        assert (given.get("href") or "#").startswith("#")
    policy = next(g["content"] for t, g in read.tags if t == "meta" and "http-equiv" in g)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "://" not in re.sub(r"<script (id|type).*?</script>", "", html, flags=re.DOTALL)
    scripted = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", "".join(scripted)
    )
    assert "\x1b" not in html
    assert "\u202e" not in html


def test_tokens_and_places_take_the_smallest_type(cards: Cards, read: Read):
    assert read.types["array-ids"] == read.types["array-text"] == "Uint16Array"
    assert packed(_whole(np.array([3, 65_535])))[0] == "Uint16Array"
    assert packed(_whole(np.array([3, 65_536])))[0] == "Uint32Array"
    assert packed(_whole(np.array([3]), 65_536))[0] == "Uint32Array"


def test_a_model_without_a_modulator_has_a_page(tmp_path: Path):
    made = make_cards(Hooked(tiny_llama()), tiny_windows(), tmp_path, SETTINGS, name="x")
    found = Read(page(made, tiny_text()))
    assert found.array("size").size == 0
    assert json.loads(found.data["facts"])["transmitters"] == []
    assert summary(made, tiny_text())["transmitters"] == {}


# Figures ------------------------------------------------------------------------------------------


def test_the_summary_is_what_counting_finds(cards: Cards):
    text = tiny_text()
    found = json.loads(json.dumps(summary(cards, text), allow_nan=False))
    assert found["neurons"] == LAYERS * WIDTH
    scores = cards.decoded.scores.double().numpy()
    for place, kind in enumerate(KINDS):
        best = {
            (layer, i): max(scores[layer, place, i])
            for layer in range(LAYERS)
            for i in range(WIDTH)
        }
        first = sorted(best, key=lambda at: -best[at])[:20]
        listed = found["specialised"][kind]
        assert [row["neuron"] for row in listed] == [f"{layer}.{i}" for layer, i in first]
        layer, i = first[0]
        way = 0 if scores[layer, place, i, 0] >= scores[layer, place, i, 1] else 1
        assert listed[0]["way"] == "+-"[way]
        assert listed[0]["tokens"] == text.pieces(cards.decoded.ids[layer, place, i, way].tolist())
        high = found["scores"][kind]["high"]
        assert sum(value > high for value in best.values()) == LAYERS * WIDTH // 20
        mixed = cards.mixtures[:, place].double().numpy()
        mixed_high = found["scores"][kind]["mixtures_high"]
        assert mixed_high == pytest.approx(np.quantile(mixed, 0.95))
        for one, row in enumerate(found["by_layer"]):
            own = [best[one, i] for i in range(WIDTH)]
            assert row["scores"][kind]["mean"] == pytest.approx(np.mean(own))
            assert row["scores"][kind]["share_high"] == np.mean([v > high for v in own])
            assert row["scores"][kind]["mixtures_mean"] == pytest.approx(mixed[one].mean())
            above = row["scores"][kind]["share_above_mixtures_high"]
            assert above == np.mean([v > mixed_high for v in own])
        told = found["scores"][kind]["share_above_mixtures_high"]
        assert told["low"] <= told["mean"] <= told["high"]
    for name, size in cards.drives.size.items():
        flat = size.numpy().ravel()
        order = np.argsort(-flat, kind="stable")[:20]
        listed = found["transmitters"][name]["neurons"]
        assert [row["neuron"] for row in listed] == [str(Neuron(*divmod(i, WIDTH))) for i in order]
        shares = found["transmitters"][name]["by_layer"]
        assert shares == pytest.approx((size.double().sum(1) / size.double().sum()).tolist())
        assert sum(shares) == pytest.approx(1)
    assert found["rare_below"] == RARE


def test_rare_neurons_are_counted(cards: Cards, monkeypatch: pytest.MonkeyPatch):
    # One token of so short a text is more than the bound that holds otherwise.
    monkeypatch.setattr("vesicle.neurons.atlas.overview.RARE", 0.01)
    rare = overview(cards).rare.tolist()
    for layer in range(LAYERS):
        shares = cards.share_above_half[layer].tolist()
        assert rare[layer] == sum(share < 0.01 for share in shares) / WIDTH
    assert 0 < sum(rare) < LAYERS
    told = [row["share_rare"] for row in summary(cards, tiny_text())["by_layer"]]
    assert told == rare


def test_drawings_show_every_layer_and_only_numbers(cards: Cards):
    found = overview(cards)
    own = found.scores["up"]
    for drawn in (
        spreads("a < b", own.quantiles, own.mixed_mean, own.mixed_high),
        bars("a < b", found.drive["gaba"]),
        bars("a < b", torch.zeros(LAYERS)),
    ):
        assert re.findall(r'data-layer="(\d+)"', drawn) == ["0", "1", "2"]
        assert "a &lt; b" in drawn
        assert "nan" not in drawn
        assert "inf" not in drawn


def test_labels_of_an_axis_cover_what_is_drawn():
    for most in (0.003, 0.07, 0.7, 1.0):
        labels = re.findall(r'text-anchor="end">([\d.]+) %<', bars("a", torch.tensor([most, 0.0])))
        ticks = [float(label) / 100 for label in labels]
        assert ticks[0] == 0
        assert 3 <= len(ticks) <= 6
        assert 0.5 * most < ticks[-1] <= 1.05 * most


# Searching, in node -------------------------------------------------------------------------------

_HARNESS = r"""
const fs = require("fs");
const vm = require("vm");
const html = fs.readFileSync(process.argv[2], "utf8");
const held = (id) => new RegExp(`<script [^>]*id="${id}"([^>]*)>([^<]*)<`).exec(html);
vm.runInThisContext(/<script>([^]*?)<\/script>/.exec(html)[1]);
const { Atlas, asked, written, decoded } = vm.runInThisContext(
  "({ Atlas, asked, written, decoded })",
);
const types = { Uint16Array, Uint32Array, Float32Array };
const atlas = new Atlas(JSON.parse(held("facts")[2]), (name) => {
  const [, attributes, text] = held("array-" + name);
  return decoded(text, types[/data-type="(\w+)"/.exec(attributes)[1]]);
});
const call = ([name, ...given]) => {
  if (name === "find") return atlas.find({ ...asked(""), ...given[0] });
  return name in atlas ? atlas[name](...given) : { asked, written }[name](...given);
};
console.log(JSON.stringify(JSON.parse(fs.readFileSync(0, "utf8")).map(call)));
"""
NODE = shutil.which("node")
in_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


@pytest.fixture(scope="module")
def ask(html: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Call functions of the page's first script: a list of names and arguments."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "page.html").write_text(html, encoding="utf-8")
    (folder / "harness.js").write_text(_HARNESS, encoding="utf-8")

    def call(*calls: tuple[Any, ...]) -> list[Any]:
        done = subprocess.run(
            [str(NODE), str(folder / "harness.js"), str(folder / "page.html")],
            input=json.dumps(calls),
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


@in_node
def test_scripts_are_valid(html: str, tmp_path: Path):
    for number, script in enumerate(re.findall(r"<script>(.*?)</script>", html, re.DOTALL)):
        file = tmp_path / f"{number}.js"
        file.write_text(script, encoding="utf-8")
        done = subprocess.run([str(NODE), "--check", str(file)], capture_output=True)
        assert done.returncode == 0, done.stderr


@in_node
def test_neurons_by_number(ask: Any):
    names = ["0.0", " 2.79 ", "2.80", "3.0", "1", "1.2.3", "", "1e1.0"]
    found = ask(*(("number", name) for name in names), ("name", 239), ("name", 80))
    assert found == [0, 239, None, None, None, None, None, None, "2.79", "1.0"]


@in_node
def test_the_page_tells_what_a_card_does(cards: Cards, ask: Any):
    text = tiny_text()
    for layer, index in ((0, 0), (1, 42), (2, 79)):
        number, own = layer * WIDTH + index, cards.card(Neuron(layer, index), text)
        ways = ask(*(("ways", number, kind) for kind in KINDS))
        for kind, (first, second) in zip(KINDS, ways, strict=True):
            assert first["sign"] == own.tokens[kind]["way"] != second["sign"]
            assert first["score"] == pytest.approx(own.tokens[kind]["score"], abs=1e-3)
            assert first["score"] >= second["score"]
            likeliest = [visible(piece) for piece in own.tokens[kind]["likeliest"]]
            assert [token["text"] for token in first["likeliest"]] == likeliest
        drives, *sides = ask(
            ("drives", number), ("places", number, "high"), ("places", number, "low")
        )
        assert {row["name"]: row["rank"] for row in drives} == {
            name: row["rank"] for name, row in own.drives.items()
        }
        for side, expected in zip(sides, (own.highest, own.lowest), strict=True):
            strips = ask(*(("strip", number, one["place"]) for one in side))
            for one, context, strip in zip(side, expected, strips, strict=True):
                assert one["value"] == pytest.approx(context.activation, rel=1e-6)
                here = next(i for i, token in enumerate(strip) if token["here"])
                assert "".join(t["text"] for t in strip[:here]) == context.before
                assert strip[here]["text"] == context.token
                assert strip[here]["value"] == one["value"]
                assert "".join(t["text"] for t in strip[here + 1 :]) == context.behind
                known = [t["value"] for t in strip if "value" in t]
                assert set(known) <= {row["value"] for row in (*sides[0], *sides[1])}


@in_node
def test_the_stronger_side_comes_first(cards: Cards, ask: Any):
    sides = ask(*(("sides", number) for number in range(240)))
    stronger = cards.contexts.stronger_low().flatten().tolist()
    assert [own[0] == "low" for own in sides] == stronger
    assert 0 < sum(stronger) < 240


@in_node
@pytest.mark.parametrize(
    ("q", "kind", "whole"),
    [
        ("a", "", ""),
        ("A", "down", "1"),
        ("script", "", ""),
        ("</s>", "gate", "1"),
        (r"\xe6", "up", ""),
    ],
)
def test_neurons_by_a_token(
    cards: Cards, facts: dict[str, Any], ask: Any, q: str, kind: str, whole: str
):
    text, best = tiny_text(), {}
    for layer in range(LAYERS):
        for place, name in enumerate(KINDS):
            if kind and name != kind:
                continue
            for i in range(WIDTH):
                for way in range(2):
                    ids = cards.decoded.ids[layer, place, i, way].tolist()
                    pieces = [visible(piece).lower() for piece in text.pieces(ids)]
                    fits = [p.strip() == q.lower() if whole else q.lower() in p for p in pieces]
                    if any(fits):
                        score = float(cards.decoded.scores[layer, place, i, way])
                        key = (-fits.index(True), score)
                        number = layer * WIDTH + i
                        best[number] = max(best.get(number, key), key)
    assert best
    expected = sorted(best, key=lambda n: (-best[n][0], -best[n][1], n))
    found = ask(("find", {"q": q, "kind": kind, "whole": whole}))[0]
    assert found == expected


@in_node
@pytest.mark.parametrize("side", ["high", "low"])
@pytest.mark.parametrize(
    ("q", "whole", "sought"),
    [
        ("cat", "", r"cat"),
        ("CAT", "1", r"(?<![\w])cat(?![\w])"),
        ("at", "1", r"(?<![\w])at(?![\w])"),
        ("caf", "", r"caf"),
        ("café", "", r"café"),
        ("日本", "", r"日本"),
        ("t on", "", r"t on"),
        ("nowhere", "", r"nowhere"),
    ],
)
def test_neurons_by_the_text_where_they_fire(
    cards: Cards, ask: Any, q: str, whole: str, sought: str, side: str
):
    text, hit = tiny_text(), set()
    for number, window in enumerate(tiny_windows().tolist()):
        own = [piece.lower() for piece in own_texts(window, text)]
        ends = np.cumsum([len(piece) for piece in own])
        for found in re.finditer(f"(?={sought})", "".join(own)):
            stop = found.start() + len(q)
            for place, (end, piece) in enumerate(zip(ends, own, strict=True)):
                # Parts of a character have no text, and belong to the one behind that has.
                holder = piece or next((text for text in own[place:] if text), "")
                start = end - len(piece)
                if start < stop and start + len(holder) > found.start():
                    hit.add((number, place))
    hits = {}
    values, places = cards.contexts.extremes(low=side == "low")
    for number, own in enumerate(places.flatten(0, 1).tolist()):
        if many := sum(tuple(place) in hit for place in own):
            hits[number] = many
    found = ask(("find", {"q": q, "by": side, "whole": whole}))[0]
    most = (values[..., 0].flatten() * (1 if side == "high" else -1)).tolist()
    assert found == sorted(hits, key=lambda n: (-hits[n], -most[n], n))
    assert bool(found) == (q != "nowhere")


@in_node
def test_sorting_and_filtering(cards: Cards, ask: Any):
    everything = ask(("find", {}))[0]
    assert everything == list(range(240))
    layer, none, bad, wrong = ask(
        ("find", {"layer": "1"}),
        ("find", {"layer": "3"}),
        ("find", {"layer": "x"}),
        ("find", {"sort": "score.sideways"}),
    )
    assert layer == list(range(80, 160))
    assert none == []
    assert bad == wrong == everything
    keys = {
        "score.up": cards.decoded.scores[:, 1].amax(-1),
        "drive.gaba": cards.drives.size["gaba"],
        "rare": -cards.share_above_half,
        "maximum": cards.contexts.activations[..., 0],
    }
    for sort, key in keys.items():
        values = key.flatten().float().tolist()
        expected = sorted(range(240), key=lambda n: (-values[n], n))
        assert ask(("find", {"sort": sort}))[0] == expected
        expected = [n for n in expected if n // WIDTH == 2]
        assert ask(("find", {"sort": sort, "layer": "2"}))[0] == expected


@in_node
def test_an_address_is_written_and_read(ask: Any):
    wanted = {"q": "a&b=c #é", "by": "low", "kind": "up", "layer": "12", "page": "3"}
    whole = ask(("asked", ""))[0] | wanted
    address = ask(("written", whole))[0]
    assert "sort" not in address
    found, unknown, none = ask(
        ("asked", address), ("asked", "evil=1&q=x&__proto__=2"), ("asked", "99.1")
    )
    assert found == whole
    assert unknown == ask(("asked", "q=x"))[0]
    assert none["q"] == "99.1"
