"""What of a prompt that is too long reaches the model: all but a stated part of the user's text."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.models.test_text import byte_level, metaspace, save
from vesicle.commands.run import _encoder, _fit
from vesicle.errors import DataError
from vesicle.models.shorten import Place
from vesicle.models.text import Text

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "<|assistant|>"
)
WINDOW, NEW = 64, 8
WORDS = "".join(f"{n:02d} " for n in range(99))
TOKENIZERS = {"byte_level": byte_level, "metaspace": metaspace}


@pytest.fixture(params=TOKENIZERS)
def text(request: pytest.FixtureRequest, tmp_path: Path) -> Text:
    tokenizer: Tokenizer = TOKENIZERS[request.param]()
    tokenizer.add_special_tokens(["<|user|>", "<|system|>", "<|assistant|>"])
    return Text.from_folder(save(tmp_path, tokenizer, chat_template=CHATML))


def shown(text: Text, ids: list[int]) -> str:
    return "".join(text.pieces(ids))


@pytest.mark.parametrize("at", Place)
def test_the_template_stays(text: Text, at: Place, capsys: pytest.CaptureFixture[str]):
    encode = _encoder(text, "sat", raw=False, control_tokens=False)
    ids = _fit(text, WORDS, encode, NEW, at)
    assert WINDOW - NEW - 4 <= len(ids) <= WINDOW - NEW
    prompt = shown(text, ids)
    before, after = "<s><|system|>sat</s><|user|>", "</s><|assistant|>"
    assert prompt.startswith(before)
    assert prompt.endswith(after)
    body = text.decode(ids)
    assert ("00 01" in body) == (at != Place.start)
    assert ("97 98" in body) == (at != Place.end)
    told = capsys.readouterr().err
    assert f"left out {'in' if at == 'middle' else 'at'} its {at.value}" in told


@pytest.mark.parametrize("at", Place)
def test_a_text_that_is_continued_keeps_its_first_token(text: Text, at: Place):
    first = text.encode("")
    encode = _encoder(text, None, raw=True, control_tokens=False)
    ids = _fit(text, WORDS, encode, NEW, at)
    assert ids[: len(first)] == first
    assert len(ids) <= WINDOW - NEW
    assert not set(first) & set(ids[len(first) :])


def test_what_fits_is_not_touched(text: Text, capsys: pytest.CaptureFixture[str]):
    encode = _encoder(text, "sat", raw=False, control_tokens=False)
    assert _fit(text, "the cat", encode, NEW, Place.middle) == text.chat("the cat", "sat")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("at", Place)
def test_no_half_characters(text: Text, at: Place):
    encode = _encoder(text, None, raw=True, control_tokens=False)
    for most in range(20, 40):
        body = text.decode(_fit(text, "日本🙂" * 40, encode, WINDOW - most, at))
        assert "\ufffd" not in body
        assert set(body) <= set("日本🙂")


def test_what_cannot_be_made_short_enough(text: Text):
    encode = _encoder(text, "x" * 99, raw=False, control_tokens=False)
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens, and without any of its text"):
        _fit(text, "hi", encode, NEW, Place.middle)
    with pytest.raises(DataError, match="leaves no room"):
        _fit(text, "hi", encode, WINDOW, Place.middle)
