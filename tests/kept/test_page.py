"""The page: whole, escaped, and with nothing that a browser would fetch or run."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vesicle.kept.analysis import Kept
from vesicle.kept.page import Subject, own_text, page

TEXT = "<script>alert('x')</script> & \"q\"\r\n\tä🦔\x1b[2J\u202eend"
SIZE = 8
N = -(-len(TEXT) // SIZE)
"""Tokens, of 8 characters each, so that the first is a whole tag."""
VOID = {"meta"}


def made(sees_entries: bool = True, model: str = "tiny") -> str:
    spans = [(i, min(i + SIZE, len(TEXT))) for i in range(0, len(TEXT), SIZE)]
    held = np.zeros((2, 2, N), bool)
    held[:, :, ::2] = True
    held[0, 1] = True
    kept = Kept(
        held=held,
        layers=[0, 5],
        always=np.arange(N) >= N - 3,
        asked=[16, 32],
        over_time=[1.0, 0.5],
    )
    subject = Subject(
        text=TEXT,
        spans=spans,
        classes=["number"] * N,
        pieces=[TEXT[a:b] for a, b in spans],
        model=model,
        method="namm:<b>",
        memory=0.25,
        sees_entries=sees_entries,
    )
    return page(kept, subject)


class Reader(HTMLParser):
    """Checks that tags are closed in order, and gathers what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.pre += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_the_text_is_all_there_and_does_nothing():
    reader = read(made())
    assert reader.pre == ("<script>alert('x')</script> & \"q\"↵\n\tä🦔\\x1b[2J\\u202eend")
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "b"}
    assert "namm:&lt;b&gt;" in made()
    assert r"\x1b" in made(model="\x1b[2J")
    assert "\x1b" not in made(model="\x1b[2J")


def test_nothing_is_fetched():
    html = made()
    reader = read(html)
    assert not [a for _, attributes in reader.tags for a in attributes if a in ("src", "href")]
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", html)
    assert "default-src 'none'" in html
    assert html.startswith("<!DOCTYPE html>")
    assert 'charset="utf-8"' in html
    assert "prefers-color-scheme: dark" in html


def test_tokens_tell_their_share():
    reader = read(made())
    tokens = [a for tag, a in reader.tags if tag == "span" and "title" in a]
    assert len(tokens) == N
    assert tokens[0]["title"] == "token 0: 100.0 %, number"
    assert tokens[1]["title"] == "token 1: 25.0 %, number"
    assert (tokens[0]["style"], tokens[1]["style"]) == ("--k:1", "--k:0.25")
    assert [a.get("class") for a in tokens] == [None] * (N - 3) + ["a"] * 3


def test_the_heat_map_has_a_cell_for_each_head():
    reader = read(made())
    cells = [a["fill-opacity"] for tag, a in reader.tags if tag == "rect"]
    half = np.arange(N) % 2 == 0
    assert cells == [f"{share:.3f}" for share in (half.mean(), 1, half.mean(), half.mean())]
    assert "layer 5, KV head 1:" in made()


def test_what_looks_at_positions_alone_is_told():
    assert "nothing but where a token stands" in made(sees_entries=False)
    assert "nothing but where a token stands" not in made(sees_entries=True)


@pytest.mark.parametrize(
    ("spans", "pieces", "own", "rest"),
    [
        ([(0, 0), (0, 2), (2, 3)], ["<s>", "a ", "🦔"], ["<s>", "a ", "🦔"], ""),
        ([(0, 3), (2, 3), (2, 3)], ["a \\xf0", "\\x9f", "\\xa6"], ["a 🦔", "·", "·"], ""),
        ([(0, 1)], ["a"], ["a"], " 🦔"),
        ([(1, 2), (2, 3)], [" ", "🦔"], ["a ", "🦔"], ""),
    ],
)
def test_tokens_joined_are_the_text(
    spans: list[tuple[int, int]], pieces: list[str], own: list[str], rest: str
):
    assert own_text("a 🦔", spans, pieces) == (own, rest)
