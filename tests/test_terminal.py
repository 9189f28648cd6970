"""Text of unknown origin on a terminal."""

import io
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from vesicle.terminal import AnswerWriter, SafeConsole, one_line, visible

OVERRIDES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
ACTIVE = [
    chr(i)
    for i in range(sys.maxunicode + 1)
    if (unicodedata.category(chr(i)) in ("Cc", "Cs") or i in OVERRIDES) and chr(i) not in "\t\n"
]
TEXT = st.text(
    st.sampled_from(ACTIVE) | st.sampled_from("\r\n\t\x1b[2Jm") | st.characters(), max_size=30
)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_active_is_spelt_out():
    for character in ACTIVE:
        assert visible(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"
    kept = "\t\n aÄ日本\u00a0\u3000\u200d\u200f🏴\U000e0067 שלום"
    assert visible(kept) == kept
    assert visible("\x1b[2J\x9b31m\u202etxt\x07\r") == r"\x1b[2J\x9b31m\u202etxt\x07\r"
    assert one_line("a\tb\nc\x7f") == r"a\tb\nc\x7f"


@given(text=TEXT)
def test_no_text_is_acted_upon(text: str):
    shown = visible(text)
    assert not set(shown) & set(ACTIVE)
    assert shown.encode().decode() == shown
    assert visible(shown) == shown
    assert not set(one_line(text)) & {*ACTIVE, "\n", "\t"}


@given(parts=st.lists(TEXT, max_size=6))
def test_parts_are_shown_like_the_whole_on_a_terminal_and_are_raw_elsewhere(parts: list[str]):
    screen, pipe = Screen(), io.StringIO(newline="")
    for stream in (screen, pipe):
        writer = AnswerWriter(stream)
        for part in [*parts, "\n"]:
            writer.write(part)
    whole = "".join(parts) + "\n"
    assert screen.getvalue() == visible(whole.replace("\r\n", "\n"))
    assert pipe.getvalue() == whole


def test_a_sequence_that_is_split_between_parts():
    screen = Screen()
    writer = AnswerWriter(screen)
    for part in ("a\x1b", "[2", "Jb\r", "\nc\r", "d", "\u202e", "\n"):
        writer.write(part)
    assert screen.getvalue() == "a\\x1b[2Jb\nc\\rd\\u202e\n"


@pytest.mark.parametrize("wrap", [str, Text])
def test_a_console_shows_data_as_text_and_keeps_its_own_styles(wrap: type):
    bad = "x\x1b]0;title\x9cy\u202ez"
    table = Table("heading")
    table.add_row(wrap(bad))
    screen, pipe = io.StringIO(), io.StringIO()
    for file, terminal in ((screen, True), (pipe, False)):
        console = SafeConsole(
            file=file,
            force_terminal=terminal,
            width=60,
            highlight=False,
            color_system="standard" if terminal else None,
        )
        console.print(table)
        console.print(wrap(bad), style="bold")
    assert r"x\x1b]0;title\x9cy\u202ez" in screen.getvalue()
    assert not set(screen.getvalue()) & (set(ACTIVE) - {"\x1b"})
    assert "\x1b[1m" in screen.getvalue()
    assert "\x1b]" not in screen.getvalue()
    assert bad in pipe.getvalue()


def test_a_table_stays_in_shape_whatever_its_cells_hold():
    table = Table("heading", "second")
    table.add_row("x\x1b]0;title\x9cy\u202ez", "\x1b[2J")
    screen = io.StringIO()
    SafeConsole(file=screen, force_terminal=True, width=60, color_system=None).print(table)
    lines = screen.getvalue().splitlines()
    assert len({len(line) for line in lines}) == 1, lines
