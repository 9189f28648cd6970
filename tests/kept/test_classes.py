"""What class a token is of: by the place of its characters, in prose and in code."""

from pathlib import Path

import pytest

from vesicle.kept.classes import CLASSES, CONTINUATION, SPECIAL, classes
from vesicle.kept.marks import NUMBER, PUNCTUATION, WHITESPACE
from vesicle.kept.prose import CAPITALISED, FUNCTION_WORD, WORD
from vesicle.kept.source import COMMENT, LANGUAGES, NAME, STRING, is_source

SHORT = {
    "f": FUNCTION_WORD,
    "w": WORD,
    "C": CAPITALISED,
    "+": CONTINUATION,
    "#": NUMBER,
    ".": PUNCTUATION,
    "_": WHITESPACE,
    "n": NAME,
    "s": STRING,
    "c": COMMENT,
}


def found(tokens: list[str], code: str | None = None) -> str:
    """A letter for each token, which together are the text."""
    spans, at = [], 0
    for token in tokens:
        spans.append((at, at + len(token)))
        at += len(token)
    letters = {name: letter for letter, name in SHORT.items()}
    return "".join(letters[name] for name in classes("".join(tokens), spans, code))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("The| cat| sat| on| Mount| Ever|est|.", "fwwfCC+."),
        ("It|'s| not| Bob|'s|,| and| we| don|’|t| care", "f+fC+.fff++w"),
        ("in| |2|0|2|4| it| cost| 1|,|500|.|5| or|,| 3|rd", "f_####fw#####f.##"),
        ("well|-|known|  |\n\n|\t|(|see| a|)|!?", "w.w___.wf.."),
        ("na|ï|ve| caf|é| Ελλάδα| и| Москва|ми", "w++w+CwC+"),
        ("e\u0301|te\u0301|s| हिन्|दी", "w++w+"),
        ("iPhone| x|_|y| ²| 5|km", "ww.w###"),
        ("日本|語|。|か", "w+.w"),
        ("“|Yes|”| –| no|…", ".C..f."),
        ("(the| 'tis| \"Ann", "fwC"),
    ],
)
def test_prose(tokens: str, expected: str):
    assert found(tokens.split("|")) == expected


def test_a_token_of_several_tokens_for_one_character():
    """Byte-level tokens of an emoji or a letter all have its span."""
    text = "a 🦔 Éa"
    spans = [(0, 1), (1, 3), (2, 3), (2, 3), (3, 5), (4, 5), (5, 6)]
    expected = [FUNCTION_WORD, *[PUNCTUATION] * 3, CAPITALISED, CONTINUATION, CONTINUATION]
    assert classes(text, spans) == expected


def test_a_joined_emoji_and_its_selector_are_no_word():
    tokens = ["👩", "\u200d", "👧", " ", "\u2764", "\ufe0f", " ok"]
    assert found(tokens) == "..._..w"


def test_what_the_tokenizer_adds_is_special():
    assert classes("no", [(0, 0), (0, 2), (2, 2)]) == [SPECIAL, FUNCTION_WORD, SPECIAL]


@pytest.mark.parametrize(
    ("code", "tokens", "expected"),
    [
        (
            ".py",
            'def| f|(x|):|  # it\'s| a| "no|te"|\n|    |return| x|[|3|.5|]',
            "nnn.cccc__nn.##.",
        ),
        (".py", "x| =| rb|'a|#b\\'|c'| +| f|\"{|y|}\"| #|!", "n.ssss.sssscc"),
        (".py", '"""|Doc|\n|it\'s| #1|"""|\n|x|=|0xFF|+|1e-5', "ss_sss_n.#.#"),
        (".py", "'|open|\n|x", "ss_n"),
        (".c", "int| a|;| //| it's|\n|/*| \"| */| '|\\n|'| 1|.5f", "nn.cc_cccsss##"),
        (".cpp", '1|\'000|;|#|include| "|a|"', "##..nsss"),
        (".js", "`|a ${|b|}`| //|/", "sssscc"),
        (".rs", "fn| f|<|'|a|>(|x|: &|'|a| str|,| '|c|')", "nn..n.n..nn.sss"),
        (".sh", "echo| $|#| \"|a|\n|#b|\"| #| c|\n|x|=|'|#|'", "n..ss_sscc_n.sss"),
        ("", "#| a|\n|x| =| 1", "cc_n.#"),
        ("", "//| a|\n|#|define| x| 1", "cc_.nn#"),
    ],
)
def test_code(code: str, tokens: str, expected: str):
    assert found(tokens.split("|"), code) == expected


def test_every_class_is_shown_once():
    assert sorted({*SHORT.values(), SPECIAL}) == sorted(CLASSES)


def test_suffixes():
    suffixes = ".py .c .cpp .h .js .ts .java .rs .go .sh".split()
    assert sorted(LANGUAGES) == sorted(suffixes)
    assert is_source(Path("a/B.PY"))
    assert not is_source(Path("py"))
    assert not is_source(Path("a.py.txt"))


@pytest.mark.parametrize("code", [None, "", *LANGUAGES])
@pytest.mark.parametrize("text", ['"' * 30_000, "'\\" * 20_000, "/*" * 20_000, "a'" * 20_000])
@pytest.mark.timeout(20)
def test_odd_texts_take_no_long_time(text: str, code: str | None):
    spans = [(i, i + 1) for i in range(0, len(text), 100)]
    assert len(classes(text, spans, code)) == len(spans)
