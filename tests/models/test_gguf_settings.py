"""A conversion carries a setting of the GGUF file's header over, or refuses it by name."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.models.tiny_gguf import HEADS, WIDTH, write_gguf
from vesicle.errors import ModelError
from vesicle.models.gguf import MANIFEST, convert_once, is_converted
from vesicle.models.gguf_checks import check_gguf_model
from vesicle.models.gguf_header import read_gguf_header
from vesicle.models.gguf_settings import CARRIED, HARMLESS, NEUTRAL
from vesicle.models.gguf_splits import SPLITS
from vesicle.models.text import Text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check(path: Path) -> None:
    check_gguf_model(path, read_gguf_header(path))


def converted(path: Path) -> tuple[Text, dict[str, Any]]:
    folder = convert_once(path)
    return Text.from_folder(folder), json.loads((folder / "config.json").read_text())


# What lies beside the file


def write_neighbours(folder: Path) -> None:
    """Files of another model, each of which transformers would read."""
    other = Tokenizer(models.WordLevel({"[x]": 0, "a": 1}, unk_token="[x]"))
    other.pre_tokenizer = pre_tokenizers.Whitespace()
    other.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "TokenizersBackend", "eos_token": "[x]", "bos_token": "[x]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "[x]"}))
    (folder / "chat_template.jinja").write_text("another template")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "model.safetensors").write_bytes(b"no weights")


def test_what_lies_beside_the_file_has_no_say(tmp_path: Path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "beside").mkdir()
    paths = [write_gguf(tmp_path / name / "tiny.gguf") for name in ("alone", "beside")]
    write_neighbours(tmp_path / "beside")
    folders = []
    for number, path in enumerate(paths):
        folder = convert_once(path)
        folders.append(folder.rename(tmp_path / f"converted {number}"))
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert Text.from_folder(folders[1]).vocab_size == 260


def test_a_conversion_that_a_neighbour_may_have_spoilt_is_redone(tmp_path: Path):
    path = write_gguf(tmp_path / "tiny.gguf")
    folder = convert_once(path)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": 1}))
    assert not is_converted(folder, manifest["sha256"])
    assert is_converted(folder, manifest["sha256"], formats=(1, 2))
    assert convert_once(path) == folder
    assert is_converted(folder, manifest["sha256"])


# How text is split

SPLIT_TEXTS = {
    "a  12": {
        "smollm": ["a", "  ", "1", "2"],
        "gpt-2": ["a", " ", " 12"],
        "qwen2": ["a", " ", " ", "1", "2"],
        "llama-bpe": ["a", " ", " ", "12"],
        "tekken": ["a", " ", " ", "1", "2"],
        "default": ["a", " ", " ", "12"],
    },
    "I'LL 12345 x": {
        "smollm": ["I", "'", "LL", " ", "1", "2", "3", "4", "5", " x"],
        "gpt-2": ["I", "'", "LL", " 12345", " x"],
        "qwen2": ["I", "'LL", " ", "1", "2", "3", "4", "5", " x"],
        "llama-bpe": ["I", "'LL", " ", "123", "45", " x"],
        "tekken": ["I", "'LL", " ", "1", "2", "3", "4", "5", " x"],
        "default": ["I", "'", "LL", " ", "123", "45", " x"],
    },
    "Hello$ WORLDs": {
        "gpt-4o": ["Hello", "$", " WORLDs"],
        "tekken": ["Hello", "$", " WORLDs"],
        "default": ["Hello", "$", " WORLDs"],
    },
}


@pytest.mark.parametrize("text", SPLIT_TEXTS)
def test_splits(text: str):
    for name, pieces in SPLIT_TEXTS[text].items():
        found = SPLITS[name].pre_tokenizer().pre_tokenize_str(text)
        assert [piece.replace("Ġ", " ") for piece, _ in found] == pieces, name


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_is_lossless_and_byte_level(name: str):
    text = "a  12\n\n 日本 naïve's  ½ \t!?x_1\r\n  end "
    pieces = SPLITS[name].pre_tokenizer().pre_tokenize_str(text)
    assert decoders.ByteLevel().decode([piece for piece, _ in pieces]) == text


def test_splits_are_those_of_transformers():
    """Where transformers has a table of its own, as its later versions do."""
    table = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    text = "a  12 I'll I'LL 12345\n\n 日本 naïve  ½ HTTPServer/x !?\r\n end "
    known = table.GGUF_PRE_TOKENIZER_SPLITS.keys() & SPLITS.keys()
    assert {"llama-bpe", "qwen2", "tekken", "gpt-4o"} <= known
    for name in known:
        split = pre_tokenizers.Split(Regex(table.GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
        ours = SPLITS[name].pre_tokenizer().pre_tokenize_str(text)
        assert [span for _, span in ours] == [span for _, span in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", ["refact", "qwen2", "gpt-2"])
def test_the_split_is_carried_over(tmp_path: Path, name: str):
    settings = {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}
    text, _ = converted(write_gguf(tmp_path / "tiny.gguf", settings=settings))
    pieces = {
        "refact": ["a", "  ", "1", "2"],
        "qwen2": ["a", " ", " ", "1", "2"],
        "gpt-2": ["a", " ", " ", "1", "2"],
    }
    assert text.pieces(text.encode("a  12")) == pieces[name]


# Special tokens


def test_every_end_is_carried_over(tmp_path: Path):
    settings = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.eom_token_id": 0}
    text, config = converted(write_gguf(tmp_path / "tiny.gguf", settings=settings))
    assert text.eos_ids == {0, 1, 2}
    assert config["eos_token_id"] == [2, 1, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "a b"),
        ({"tokenizer.ggml.add_bos_token": True}, "<|im_start|>a b"),
        ({"tokenizer.ggml.add_bos_token": False}, "a b"),
        ({"tokenizer.ggml.pre": "llama-bpe"}, "<|im_start|>a b"),
        ({"tokenizer.ggml.pre": "tekken"}, "<|im_start|>a b"),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, "a b"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True},
            "<|im_start|>a b<|im_end|>",
        ),
    ],
)
def test_first_and_last_tokens_are_carried_over(
    tmp_path: Path, settings: dict[str, Any], expected: str
):
    from transformers import AutoTokenizer

    folder = convert_once(write_gguf(tmp_path / "tiny.gguf", settings=settings))
    text = Text.from_folder(folder)
    assert "".join(text.pieces(text.encode("a b"))) == expected
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids == text.encode("a b")


def test_the_chat_template_and_named_tokens_are_carried_over(tmp_path: Path):
    settings = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}{{ pad_token }}",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.ggml.padding_token_id": 0,
    }
    text, _ = converted(write_gguf(tmp_path / "tiny.gguf", settings=settings))
    assert "".join(text.pieces(text.chat("x"))) == "<|im_start|>x<|endoftext|>"


def sentence_piece(**settings: Any) -> dict[str, Any]:
    """Settings of a vocabulary with scores, as many tokens as the tiny file has."""
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "l", "o"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(240)), *pieces]
    tokens += [f"<pad{i}>" for i in range(260 - len(tokens))]
    scores = [0.0] * 243 + [-float(i) for i in range(17)]
    kinds = [2, 3, 3, *[6] * 240, *[1] * 10, *[4], *[5] * 6]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": None,
        **{f"tokenizer.ggml.{key}": value for key, value in settings.items()},
    }


@pytest.mark.parametrize(
    ("settings", "pieces"),
    [
        ({}, ["<s>", " the", " the", "<pad0>"]),
        ({"add_space_prefix": False}, ["<s>", "t", "he", " the", "<pad0>"]),
        ({"add_bos_token": False}, [" the", " the", "<pad0>"]),
    ],
)
def test_sentence_piece(tmp_path: Path, settings: dict[str, Any], pieces: list[str]):
    text, _ = converted(write_gguf(tmp_path / "tiny.gguf", settings=sentence_piece(**settings)))
    ids = text.encode("the the<pad0>")
    assert text.pieces(ids) == pieces
    assert text.decode(ids) == "the the<pad0>"


def test_text_never_merges_into_a_control_token(tmp_path: Path):
    settings = sentence_piece()
    tokens = settings["tokenizer.ggml.tokens"]
    # Parts of "</s>", which would join if it were a piece of text.
    tokens[254:257] = ["</", "s>", "<"]
    settings["tokenizer.ggml.token_type"][254:257] = [1, 1, 1]
    text, _ = converted(write_gguf(tmp_path / "tiny.gguf", settings=settings))
    assert text.pieces(text.encode("the</s>"))[-1] == "</s>"
    typed = text.pieces(text.encode("the</s>", control_tokens=False))
    assert "</s>" not in typed


def test_sentence_piece_is_that_of_transformers(tmp_path: Path):
    from transformers import AutoTokenizer

    path = write_gguf(tmp_path / "tiny.gguf", settings=sentence_piece())
    text, _ = converted(path)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for string in ("the hello", "he the  the", "\t日!"):
        assert text.encode(string) == reference(string).input_ids
    # Before leading spaces 5.0 puts one more, as SentencePiece does, and later versions do not.
    (start, *rest), expected = text.encode("  he"), reference("  he").input_ids
    (space,) = text.encode(" ", control_tokens=True)[1:]
    assert expected in ([start, *rest], [start, space, *rest])


# The config


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_config_comes_from_the_header(tmp_path: Path, arch: str):
    """No default of a class stands where the file says something else, or nothing."""
    size = WIDTH // HEADS
    settings = {
        "general.architecture": arch,
        "general.name": "mistral",
        f"{arch}.block_count": 1,
        f"{arch}.context_length": 64,
        f"{arch}.embedding_length": WIDTH,
        f"{arch}.feed_forward_length": 64,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 3e-5,
        f"{arch}.attention.key_length": size,
        f"{arch}.attention.value_length": size,
        f"{arch}.rope.freq_base": 1234.0,
        f"{arch}.rope.dimension_count": None,
        "tokenizer.ggml.eos_token_id": None,
    }
    path = tmp_path / "tiny.gguf"
    if arch == "qwen3":
        with pytest.MonkeyPatch.context() as patch:
            add_norms(patch)
            write_gguf(path, settings=settings)
    else:
        write_gguf(path, settings=settings)
    text, config = converted(path)
    assert config["model_type"] == arch
    assert config["head_dim"] == size
    assert config["rms_norm_eps"] == pytest.approx(3e-5)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1234.0}
    assert config.get("sliding_window") is None
    assert config["eos_token_id"] is None
    assert text.eos_ids == set()


def add_norms(patch: pytest.MonkeyPatch) -> None:
    import numpy as np

    finish = gguf.GGUFWriter.write_header_to_file

    def patched(writer: gguf.GGUFWriter) -> None:
        for name in ("q", "k"):
            ones = np.ones(WIDTH // HEADS, np.float32)
            writer.add_tensor(f"blk.0.attn_{name}_norm.weight", ones)
        finish(writer)

    patch.setattr(gguf.GGUFWriter, "write_header_to_file", patched)


# What is refused, by name

REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"split.count": 2, "split.no": 0, "split.tensors.count": 99},
        r"tiny.gguf is part 1 of 2 of a split model: join the parts first \(llama-gguf-split",
    ),
    ({"split.count": 3, "split.no": 2, "general.architecture": None}, "is part 3 of 3"),
    ({"tokenizer.ggml.pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; allowed: def"),
    ({"tokenizer.ggml.pre": "no such"}, "tokenizer.ggml.pre is 'no such'; allowed: default, gpt"),
    ({"tokenizer.ggml.pre": None}, "it has no tokenizer.ggml.pre; expected: default, gpt-2"),
    ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'; allowed: gpt2, llama"),
    ({"tokenizer.ggml.model": None}, "it has no tokenizer.ggml.model; expected: gpt2, llama"),
    ({"tokenizer.ggml.merges": None}, "it has no tokenizer.ggml.merges; expected: a list"),
    ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is True; allowed: false"),
    ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1; allowed: true, false"),
    ({"tokenizer.ggml.eot_token_id": 260}, "eot_token_id is 260; allowed: .* 0 to 259"),
    (
        {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
        "it has no tokenizer.ggml.bos_token_id; expected: the first token",
    ),
    ({"tokenizer.ggml.remove_extra_whitespaces": True}, "whitespaces is True, which a GGUF"),
    ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap .a list of 2 items."),
    ({"tokenizer.ggml.some_new_switch": True}, "the setting tokenizer.ggml.some_new_switch .True"),
    ({"llama.attention.head_count_kv": None}, "it has no llama.attention.head_count_kv; expected"),
    ({"llama.some_new_scale": 2.0}, "the setting llama.some_new_scale .2.0., which is not known"),
    ({"llama.rope.dimension_sections": [1, 2]}, "the setting llama.rope.dimension_sections"),
    ({"llama.rope.scaling.factor": 4.0}, "scales its rotary frequencies"),
    ({"llama.rope.scaling.type": "longrope"}, "scales its rotary frequencies"),
    ({"llama.expert_count": 4}, "is a mixture of experts"),
    ({"adapter.lora.alpha": 1.0}, "the setting adapter.lora.alpha"),
    ({"general.type": "adapter"}, "general.type is 'adapter', which .* allowed: 'model'"),
    *(
        ({key.replace("*", "llama"): "x"}, f"{key[2:] if key[0] == '*' else key} is 'x'")
        for key in NEUTRAL
        if key != "*.expert_count"
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_cannot_be_carried_over_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
):
    path = write_gguf(tmp_path / "tiny.gguf", settings=settings)
    with pytest.raises(ModelError, match=message):
        check(path)


def test_what_is_harmless_is_let_through(tmp_path: Path):
    settings: dict[str, Any] = {
        "general.author": "someone",
        "general.file_type": 3,
        "general.something_new": "told",
        "quantize.imatrix.file": "x.dat",
        "split.count": 1,
        "split.no": 0,
        "tokenizer.chat_template.rag": "x",
        **{key.replace("*", "llama"): values[0] for key, values in NEUTRAL.items()},
        **{key.replace("*", "llama"): 1 for key in HARMLESS if "rope" not in key},
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.finetuned": False,
    }
    check(write_gguf(tmp_path / "tiny.gguf", settings=settings))


def test_every_key_that_the_gguf_package_knows_for_tokenizers_has_a_place():
    """So that a key which is added there is looked at here."""
    keys = {
        value
        for name, value in vars(gguf.Keys.Tokenizer).items()
        if not name.startswith("_") and isinstance(value, str) and "{" not in value
    }
    # Of other kinds of vocabulary.
    unknown = {"tokenizer.ggml.precompiled_charsmap", "tokenizer.rwkv.world"}
    # Of other versions of the package.
    optional = {"tokenizer.ggml.cls_token_id"}
    placed = {key for key in CARRIED | HARMLESS | NEUTRAL.keys() if key.startswith("tokenizer.")}
    assert keys - placed <= unknown
    assert placed - keys <= optional
    assert not CARRIED & HARMLESS
    assert not (CARRIED | HARMLESS) & NEUTRAL.keys()
