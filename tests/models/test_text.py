"""Text gives the ids that transformers gives, without loading it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vesicle.errors import DataError, ModelError
from vesicle.models.text import Text

STRINGS = [
    "",
    "Hello, world!",
    "  two  blanks\n\n\tand a tab ",
    "naïve café, Ελληνικά, 日本語, العربية",
    "🙂👩‍👩‍👧‍👦🇨🇭 emoji",
    "in 2024 there were  12345 cats",
    "<s>special</s> and <|user|> in text",
    "def f(x):\n    return x**2  # ∑",
]
CORPUS = [
    "the cat sat on the mat in 2024",
    "naïve café",
    "hello world, hello cat",
    "日本 日本 🙂🙂🙂",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}\n"
    "{% endfor %}{% generation %}{{ messages | length | tojson }}{% endgeneration %}"
    "{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    "{{ strftime_now('%Y') }}{{ pad_token }}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "TokenizersBackend"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **settings}))
    config = {"model_type": "llama", "max_position_embeddings": 64, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Like Llama 2: blanks as U+2581, unknown characters as byte tokens."""
    letters = sorted({char for text in CORPUS[:1] for char in text.replace(" ", "▁")})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t"]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, [("▁", "t")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


KINDS = {
    "byte_level": (byte_level, {"chat_template": TEMPLATE}),
    "bos_in_settings": (byte_level, {"add_bos_token": True, "add_eos_token": True}),
    "metaspace": (metaspace, {}),
    "named_as_objects": (byte_level, {"bos_token": {"content": "<s>", "__type": "AddedToken"}}),
    "promoted": (byte_level, {"pad_token": "f"}),
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make, settings = KINDS[request.param]
    return save(tmp_path, make(), **settings)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    return save(tmp_path, byte_level(), chat_template=TEMPLATE)


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_transformers(folder: Path):
    text, expected = Text.from_folder(folder), reference(folder)
    for string in STRINGS:
        ids = text.encode(string)
        assert ids == expected(string).input_ids
        assert text.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert text.vocab_size == len(expected)


@pytest.mark.parametrize("system", [None, "Be brief. "])
@pytest.mark.parametrize("in_file", [False, True])
def test_chat_is_that_of_transformers(chatty: Path, system: str | None, in_file: bool):
    if in_file:
        (chatty / "chat_template.jinja").write_text(TEMPLATE + "from the file")
    text, expected = Text.from_folder(chatty), reference(chatty)
    messages = [{"role": "system", "content": system}] if system else []
    for string in STRINGS:
        chat = [*messages, {"role": "user", "content": string}]
        ids = expected.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert text.chat(string, system, control_tokens=True) == ids
        if not text.control_tokens(string):
            assert text.chat(string, system) == ids
    assert text.has_chat_template


def test_several_templates_mean_the_default(tmp_path: Path):
    named = [{"name": name, "template": name} for name in ("tool_use", "default")]
    text = Text.from_folder(save(tmp_path, byte_level(), chat_template=named))
    assert text.decode(text.chat("x")) == "default"


def test_without_a_template_a_chat_is_plain_text(tmp_path: Path):
    text = Text.from_folder(save(tmp_path, byte_level()))
    assert not text.has_chat_template
    assert text.chat("hello") == text.encode("hello")
    assert text.decode(text.chat("hello", "be brief")) == "be brief\n\nhello"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if %}", "chat template failed"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails(tmp_path: Path, template: str, message: str):
    text = Text.from_folder(save(tmp_path, byte_level(), chat_template=template))
    with pytest.raises(ModelError, match=message):
        text.chat("x")


def test_stream_gives_whole_characters_that_join_to_the_text(folder: Path):
    text = Text.from_folder(folder)
    for string in STRINGS:
        ids, stream = text.encode(string), text.stream()
        emitted = [stream.push(i) for i in ids]
        assert not any("\ufffd" in part for part in emitted)
        assert "".join(emitted) + stream.flush() == text.decode(ids)
        assert stream.flush() == ""


def test_stream_tells_a_character_cut_short(tmp_path: Path):
    text = Text.from_folder(save(tmp_path, byte_level()))
    ids = text.encode("a🛑")[:-1]
    stream = text.stream()
    assert "".join(stream.push(i) for i in ids) == "a"
    assert stream.flush() == "\ufffd"


def test_stream_does_not_wait_for_ever(tmp_path: Path):
    text = Text.from_folder(save(tmp_path, byte_level()))
    byte = text._tokenizer.token_to_id("ÿ")
    stream = text.stream()
    assert "".join(stream.push(byte) for _ in range(200)).count("\ufffd") >= 128


def test_pieces(tmp_path: Path):
    text = Text.from_folder(save(tmp_path, byte_level()))
    for string in STRINGS:
        if string.isascii():
            assert "".join(text.pieces(text.encode(string))) == string
    euro = [r"\xe2", r"\x82", r"\xac"]
    assert text.pieces(text.encode("<s>€<think>")) == ["<s>", *euro, "<think>"]
    assert text.pieces([10**6]) == ["<1000000>"]


def test_pieces_keep_the_blanks_of_metaspace(tmp_path: Path):
    text = Text.from_folder(save(tmp_path, metaspace()))
    assert text.pieces(text.encode("cat the")) == ["<s>", " ", "c", "a", "t", " t", "h", "e"]


def test_spans_are_of_the_same_tokens(folder: Path):
    text = Text.from_folder(folder)
    for string in STRINGS:
        for control in (True, False):
            ids, spans = text.encode_spans(string, control_tokens=control)
            assert ids == text.encode(string, control_tokens=control)
            assert len(spans) == len(ids)
            reached = 0
            for first, stop in spans:
                assert first <= reached <= len(string) or first == stop
                reached = max(reached, stop)
            assert reached == len(string)


def test_spans_of_tokens_that_share_a_character_and_of_none(tmp_path: Path):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
            ),
        ]
    )
    text = Text.from_folder(save(tmp_path, tokenizer))
    ids, spans = text.encode_spans("q  €<|user|>", control_tokens=False)
    pieces = [
        "<s>",
        "q",
        " ",
        " ",
        r"\xe2",
        r"\x82",
        r"\xac",
        *"<|",
        "u",
        "s",
        "e",
        "r",
        *"|>",
        "</s>",
    ]
    assert text.pieces(ids) == pieces
    assert spans[:8] == [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (3, 4), (3, 4), (4, 5)]
    assert spans[-2:] == [(11, 12), (12, 12)]


def test_eos_ids_are_gathered_from_everywhere(tmp_path: Path):
    save(tmp_path, byte_level(), eos_token="<|user|>")
    assert Text.from_folder(tmp_path).eos_ids == {1, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    text = Text.from_folder(tmp_path)
    assert text.eos_ids == {0, 1, 2, 3}
    assert text.context_window == 64


def test_lone_surrogates_are_replaced(chatty: Path):
    text = Text.from_folder(chatty)
    assert text.decode(text.encode("a\udc80b")) == "a?b"
    assert "a?b" in text.decode(text.chat("a\udc80b"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json: slow tokenizers"),
        ("tokenizer.json", "{}", r"tokenizer.json.* cannot be read"),
        ("config.json", None, "No such file"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", "{}", "names no max_position_embeddings"),
        ("tokenizer_config.json", "{", "not valid JSON"),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, content: str | None, message: str):
    save(tmp_path, byte_level())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        Text.from_folder(tmp_path)


def test_importing_it_loads_neither_torch_nor_transformers():
    code = (
        "import sys, vesicle.models; print({'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on the mat?"},
]


def test_a_dialogue_is_that_of_transformers(chatty: Path):
    text, expected = Text.from_folder(chatty), reference(chatty)
    for turns in (DIALOGUE, DIALOGUE[1:], DIALOGUE[1:2]):
        ids = expected.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert text.chat(turns) == ids
    assert text.chat(DIALOGUE[1:], "Be brief.") == text.chat(DIALOGUE)


def test_a_dialogue_without_a_template(tmp_path: Path):
    text = Text.from_folder(save(tmp_path, byte_level()))
    assert text.chat(DIALOGUE[1:2]) == text.encode("the cat?")
    assert text.chat(DIALOGUE[:2]) == text.encode("Be brief.\n\nthe cat?")
    with pytest.raises(ModelError, match="this model has no chat template; give a single user"):
        text.chat(DIALOGUE)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "the chat has no messages; give at least one"),
        ([{"role": "user"}], "message 0 of the chat is {'role': 'user'}; allowed: a dict with"),
        ([DIALOGUE[0], {"role": "user", "content": ["x"]}], "message 1 of the chat is"),
        ([{"role": 3, "content": "x"}], "message 0 of the chat is"),
        (["hello"], "message 0 of the chat is 'hello'"),
        (DIALOGUE[:3], "the chat ends with what the assistant says"),
    ],
)
def test_malformed_dialogues(chatty: Path, turns: Any, message: str):
    with pytest.raises(DataError, match=message):
        Text.from_folder(chatty).chat(turns)
