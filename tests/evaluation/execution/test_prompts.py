"""Prompts as token ids: shortened to fit, with a context that ends where it says."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vesicle
from tests.evaluation.helpers import Bytes
from vesicle.errors import DataError
from vesicle.evaluation.execution.prompts import Codec, Prompt, continuation, make_prompt
from vesicle.tasks.items import Item

STYLES: tuple[Literal["chat", "plain"], ...] = ("chat", "plain")


class Letters:
    """One token a character, and back again: nothing is lost, so that cuts can be read."""

    def encode(
        self, text: str, *, control_tokens: bool = True, continues: bool = False
    ) -> list[int]:
        return [ord(c) for c in text]

    def chat(self, prompt: str, system: str | None = None) -> list[int]:
        return self.encode(f"<{prompt}>")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Merging:
    """Byte-pair encoding with a handful of merges: blanks join the word behind, pieces the next.

    Merges are made over the whole text, so that cutting a text moves the boundaries of its tokens.
    """

    MERGES = ("th", "the", " t", " the", "in", " in", "er", "ther", "  ", "an", " a", " an", "s.")

    def __init__(self) -> None:
        self._pieces = [chr(i) for i in range(128)] + list(self.MERGES)
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}

    def encode(
        self, text: str, *, control_tokens: bool = True, continues: bool = False
    ) -> list[int]:
        pieces = list(text)
        for whole in self.MERGES:
            joined: list[str] = []
            for piece in pieces:
                if joined and joined[-1] + piece == whole:
                    joined[-1] = whole
                else:
                    joined.append(piece)
            pieces = joined
        return [self._ids[piece] for piece in pieces]

    def chat(self, prompt: str, system: str | None = None) -> list[int]:
        return self.encode(f"<user>{prompt}<answer>")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[i] for i in ids)


CODECS: dict[str, Codec] = {"bytes": Bytes(), "letters": Letters(), "merging": Merging()}
EVERY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
EVERY_STYLE = pytest.mark.parametrize("style", STYLES)

WORDS = st.lists(
    st.sampled_from(["the", " the", " ", "th", "e", "in", " an", "s", ".", "\n", "er", "x"]),
    max_size=30,
).map("".join)


def whole(item: Item, codec: Codec, style: str) -> list[int]:
    """The prompt as it is with nothing left out."""
    if style == "plain":
        return codec.encode(item.prompt)
    return codec.chat(item.context + item.question) + codec.encode(item.opening)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two sequences begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def of_context(codec: Codec, style: str, context: str) -> list[int]:
    """The prompt cut off after its context."""
    return codec.encode(context) if style == "plain" else codec.chat(context)


def check_whole(item: Item, codec: Codec, style: Any) -> None:
    """A prompt that fits keeps every token and knows where its context ends."""
    expected = whole(item, codec, style)
    assert len(expected) > 0
    prompt = make_prompt(item, codec, style, len(expected))
    opening = shared(of_context(codec, style, item.context), expected)
    n_context = min(opening, len(expected) - 1)  # at least one token is left to be asked
    assert prompt == Prompt(ids=expected, n_context=n_context, shortened=0)


@EVERY_STYLE
@EVERY_CODEC
def test_what_fits_stays_whole(codec: Codec, style: Any):
    check_whole(
        Item(id="a", context="the other thing\n", question="And?", opening=" So"), codec, style
    )


@EVERY_STYLE
@EVERY_CODEC
@given(context=WORDS, question=WORDS.filter(bool), opening=WORDS)
def test_what_fits_stays_whole_whatever_it_is(
    codec: Codec, style: Any, context: str, question: str, opening: str
):
    item = Item(id="a", context=context, question=question, opening=opening)
    check_whole(item, codec, style)


def test_context_ends_where_the_question_begins():
    item = Item(id="a", context="abc", question="?")
    assert make_prompt(item, Letters(), "plain", 9).n_context == 3
    assert make_prompt(item, Letters(), "chat", 9).n_context == 4  # the template's < as well


def test_a_preamble_ends_where_the_rest_of_the_context_begins():
    item = Item(id="a", context="abcdef", preamble="abc", question="?")
    assert make_prompt(item, Letters(), "plain", 9).n_preamble == 3
    assert make_prompt(item, Letters(), "chat", 9).n_preamble == 4  # the template's < as well
    assert make_prompt(replace(item, preamble=""), Letters(), "plain", 9).n_preamble == 0


def test_a_token_across_the_boundary_belongs_to_the_question():
    """`the` at the end of the context becomes a part of `ther` once the question follows."""
    item = Item(id="a", context="x the", question="r.")
    codec = Merging()
    prompt = make_prompt(item, codec, "plain", 9)
    assert [codec.decode([i]) for i in prompt.ids] == ["x", " the", "r", "."]
    assert prompt.n_context == 2
    item = Item(id="a", context="x t", question="he.")
    prompt = make_prompt(item, codec, "plain", 9)
    assert [codec.decode([i]) for i in prompt.ids] == ["x", " the", "."]
    assert prompt.n_context == 1


@EVERY_STYLE
def test_without_a_question_one_token_is_left(style: Any):
    """A method that compresses the context needs a token to go on from."""
    prompt = make_prompt(Item(id="a", context="abc"), Letters(), style, 9)
    assert prompt.n_context == len(prompt.ids) - 1


@pytest.mark.parametrize(
    ("most", "context", "left_out"),
    [(12, "abcdefgh", 0), (11, "abcdfgh", 1), (8, "abgh", 4), (7, "abh", 5), (5, "a", 7)],
)
def test_the_middle_goes_first(most: int, context: str, left_out: int):
    item = Item(id="a", context="abcdefgh", question="??", opening="!!")
    prompt = make_prompt(item, Letters(), "plain", most)
    assert Letters().decode(prompt.ids) == context + "??!!"
    assert prompt.shortened == left_out
    assert prompt.n_context == len(context)


def test_a_chat_keeps_template_question_and_opening():
    item = Item(id="a", context="abcdefgh", question="??", opening="!!")
    prompt = make_prompt(item, Letters(), "chat", 10)
    assert Letters().decode(prompt.ids) == "<abgh??>!!"
    assert (prompt.n_context, prompt.shortened) == (5, 4)


@EVERY_STYLE
@EVERY_CODEC
@given(context=WORDS, question=WORDS.filter(bool), opening=WORDS, most=st.integers(1, 60))
def test_a_prompt_never_exceeds(
    codec: Codec, style: Any, context: str, question: str, opening: str, most: int
):
    item = Item(id="a", context=context, question=question, opening=opening)
    full = whole(item, codec, style)
    try:
        prompt = make_prompt(item, codec, style, most)
    except DataError:
        assert len(full) > most
        return
    assert len(prompt.ids) <= most
    assert (prompt.shortened > 0) == (len(full) > most)
    assert 0 <= prompt.n_context < len(prompt.ids)
    assert prompt.shortened <= len(codec.encode(context))


@EVERY_STYLE
@given(context=WORDS, question=WORDS.filter(bool), opening=WORDS, most=st.integers(1, 60))
def test_a_shortened_context_is_its_two_ends(
    style: Any, context: str, question: str, opening: str, most: int
):
    """With a codec that loses nothing, what was left out is a piece in the middle."""
    codec = Letters()
    item = Item(id="a", context=context, question=question, opening=opening)
    excess = len(whole(item, codec, style)) - most
    if excess > len(context):
        with pytest.raises(DataError):
            make_prompt(item, codec, style, most)
        return
    prompt = make_prompt(item, codec, style, most)
    assert prompt.shortened == max(0, excess)
    kept = len(context) - prompt.shortened
    ends = context[: kept - kept // 2] + context[len(context) - kept // 2 :]
    shorter = Item(id="a", context=ends, question=question, opening=opening)
    assert prompt.ids == whole(shorter, codec, style)
    assert prompt.n_context == make_prompt(shorter, codec, style, most).n_context


@EVERY_STYLE
@EVERY_CODEC
def test_a_question_that_is_too_long(codec: Codec, style: Any):
    item = Item(id="the 7th", context="abc", question="?" * 40)
    least = len(whole(Item(id="", context="", question=item.question), codec, style))
    assert len(make_prompt(item, codec, style, least).ids) == least
    with pytest.raises(DataError, match="--max-length") as caught:
        make_prompt(item, codec, style, least - 1)
    assert "'the 7th'" in str(caught.value)
    assert f"more than {least - 1} tokens" in str(caught.value)


def check_continuation(codec: Codec, prompt: str, choice: str) -> None:
    before, own = continuation(prompt, choice, codec)
    assert before + own == codec.encode(prompt + choice)
    assert len(before) == len(codec.encode(prompt.rstrip()))


@EVERY_CODEC
@given(prompt=WORDS, choice=WORDS)
def test_prompt_and_choice_are_the_whole_text(codec: Codec, prompt: str, choice: str):
    check_continuation(codec, prompt, choice)


def test_blanks_go_to_the_choice():
    codec = Merging()
    for prompt, choice in (("Is it ", "the"), ("Is it", " the")):
        before, own = continuation(prompt, choice, codec)
        assert before == codec.encode("Is it")
        assert own == codec.encode(" the")
        assert len(own) == 1
    before, own = continuation("Is it:\n", "so", codec)
    assert (codec.decode(before), codec.decode(own)) == ("Is it:", "\nso")


TEXT = (
    "The tide pulled back. Numbers such as 12,345.67 and words such as Straßenbahn, naïve and "
    "東京 take several tokens each; so do 🙂 and \t tabs.\n\n"
)


@pytest.fixture(scope="module")
def text() -> vesicle.Text:
    """The default model's tokenizer and chat template."""
    return vesicle.Text.from_folder(vesicle.resolve_model(None))


@pytest.mark.model
@EVERY_STYLE
def test_the_default_model_keeps_what_fits(text: vesicle.Text, style: Any):
    item = Item(id="a", context=TEXT * 3, question="What pulled back?", opening=" The")
    check_whole(item, text, style)
    prompt = make_prompt(item, text, style, 1000)
    if style == "plain":
        assert text.decode(prompt.ids) == item.prompt
    # Two line ends are one token at the end of a text, and two before a word.
    before = text.decode(prompt.ids[: prompt.n_context])
    assert before.endswith(item.context.rstrip())
    assert text.decode(prompt.ids[prompt.n_context :]).lstrip().startswith(item.question)


@pytest.mark.model
@EVERY_STYLE
def test_the_default_model_shortens_to_any_length(text: vesicle.Text, style: Any):
    """Cuts fall into the middle of characters, whose remains are tokenised anew."""
    item = Item(id="a", context=TEXT * 2, question="What pulled back?", opening=" The")
    full = len(whole(item, text, style))
    least = len(whole(Item(id="", context="", question=item.question, opening=" The"), text, style))
    # Just above the least, see what is left of a character cut in two.
    for most in range(least + 6, full):
        prompt = make_prompt(item, text, style, most)
        assert most - 6 <= len(prompt.ids) <= most
        assert 0 < prompt.shortened < len(text.encode(item.context))
        read = text.decode(prompt.ids)
        assert item.question in read
        assert read.endswith(" The")
        before = text.decode(prompt.ids[: prompt.n_context])
        assert before.rstrip().endswith(".")
    with pytest.raises(DataError, match="--max-length"):
        make_prompt(item, text, style, least - 1)


@pytest.mark.model
@pytest.mark.parametrize("prompt", ["Question: why?\nAnswer:", "Question: why?\nAnswer: ", "A \n"])
@pytest.mark.parametrize("choice", [" because", "because it is so", " 東京", "7"])
def test_the_default_model_continues(text: vesicle.Text, prompt: str, choice: str):
    check_continuation(text, prompt, choice)
    before, own = continuation(prompt, choice, text)
    assert before == text.encode(prompt.rstrip())
    assert text.decode(before) + text.decode(own) == prompt + choice


@pytest.mark.model
def test_no_context_at_all_is_tried_last():
    text = vesicle.Text.from_folder(vesicle.resolve_model(None))
    item = Item(id="a", context="\n\n\n", question="er🙂th")
    least = len(text.encode(item.question))
    assert make_prompt(item, text, "plain", least).ids == text.encode(item.question)
