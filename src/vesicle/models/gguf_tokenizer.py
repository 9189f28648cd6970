"""The tokenizer that a GGUF file's header describes, as the files that plain transformers loads.

It is made from the header alone: no file that lies beside the GGUF has a say. Two kinds of
vocabulary are known, by llama.cpp's names:

- `gpt2`: bytes written as characters, merged in the listed order, split by `tokenizer.ggml.pre`;
- `llama`: SentencePiece with byte fallback; what is merged first follows from the tokens' scores.

Control tokens become special ones, tokens of type "user-defined" are found in any text, and are
text. Ids are those of llama.cpp but for blanks at the start of a text behind a special token, where
SentencePiece files follow the models' own tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from vesicle.errors import ModelError
from vesicle.files import atomic_path, write_json
from vesicle.models.gguf_header import GgufArray, GgufHeader, read_array
from vesicle.models.gguf_settings import shown_value
from vesicle.models.gguf_splits import SPLITS

VOCABULARIES = ("gpt2", "llama")
ENDS = ("eos", "eot", "eom")
"""Tokens that end an answer: of a text, of a turn, of a message."""
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
"""The header's names for special tokens, and those of transformers."""
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_NO_TEXT = (_UNKNOWN, _CONTROL, _BYTE)
_BLANK = "▁"


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What a header says about its tokenizer, checked.

    Attributes:
        vocabulary: Its kind.
        pre: Name of the rule by which text is split, for `gpt2`.
        ids: Ids of the named tokens, by the header's names (`bos`, `eos`, `eot`, ...).
        adds_bos: Whether a text gets a first token.
        adds_eos: Whether it gets a last one.
        adds_blank: Whether a text gets a blank in front, for `llama`.
        template: The chat template.
    """

    vocabulary: str
    pre: str | None
    ids: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_blank: bool
    template: str | None

    @property
    def end_ids(self) -> list[int]:
        """Ids of the tokens that end an answer, the text's own first."""
        return list(dict.fromkeys(self.ids[name] for name in ENDS if name in self.ids))


def read_tokenizer_settings(path: Path, header: GgufHeader) -> TokenizerSettings:
    """Read and check all that a header says about its tokenizer but the vocabulary itself.

    Args:
        path: The file, for messages.
        header: What `read_gguf_header` gave for it.

    Returns:
        The settings, those that are not in the file as llama.cpp has them by default.

    Raises:
        ModelError: A setting is missing, or has a value that cannot be carried over.
    """
    metadata = header.metadata

    def wrong(key: str, allowed: str) -> ModelError:
        full = f"tokenizer.{key}"
        if full not in metadata:
            return ModelError(f"{path} is incomplete: it has no {full}; expected: {allowed}")
        return ModelError(f"{path}: {full} is {shown_value(metadata[full])}; allowed: {allowed}")

    def switch(key: str, default: bool) -> bool:
        value = metadata.get(f"tokenizer.{key}", default)
        if not isinstance(value, bool):
            raise wrong(key, "true, false")
        return value

    vocabulary = metadata.get("tokenizer.ggml.model")
    if vocabulary not in VOCABULARIES:
        raise wrong("ggml.model", ", ".join(VOCABULARIES))
    bytes_only = vocabulary == "gpt2"
    pre = metadata.get("tokenizer.ggml.pre")
    if bytes_only and pre not in SPLITS:
        raise wrong(
            "ggml.pre",
            f"{', '.join(SPLITS)} (the rule by which text is split, without which token ids would "
            "be a guess); use the model's safetensors folder or hub id",
        )
    if not bytes_only and pre not in (None, "default"):
        raise wrong("ggml.pre", "default, for a SentencePiece vocabulary")
    for key, needed in (("ggml.merges", bytes_only), ("ggml.scores", not bytes_only)):
        value = metadata.get(f"tokenizer.{key}")
        if needed and not isinstance(value, GgufArray):
            raise wrong(key, "a list")
    merges = metadata.get("tokenizer.ggml.merges")
    if bytes_only and isinstance(merges, GgufArray) and not merges.is_text:
        raise wrong("ggml.merges", "a list of strings")
    adds_bos = switch("ggml.add_bos_token", SPLITS[str(pre)].adds_bos if bytes_only else True)
    adds_eos = switch("ggml.add_eos_token", False)
    adds_blank = switch("ggml.add_space_prefix", not bytes_only)
    if bytes_only and adds_blank:
        raise wrong("ggml.add_space_prefix", "false, for a byte-level vocabulary")
    ids = {
        name: value
        for name in (*NAMED, *ENDS)
        if isinstance(value := metadata.get(f"tokenizer.ggml.{name}_token_id"), int)
    }
    if adds_bos and "bos" not in ids:
        raise wrong("ggml.bos_token_id", "the first token, which this vocabulary's texts get")
    if adds_eos and "eos" not in ids:
        raise wrong("ggml.eos_token_id", "the last token, which this file's texts get")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise wrong("chat_template", "one string")
    return TokenizerSettings(
        vocabulary=str(vocabulary),
        pre=str(pre) if bytes_only else None,
        ids=ids,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        adds_blank=adds_blank,
        template=template,
    )


def write_tokenizer(path: Path, header: GgufHeader, folder: Path) -> None:
    """Write the tokenizer that a GGUF file describes.

    Args:
        path: The GGUF file.
        header: What `read_gguf_header` gave for it.
        folder: Gets `tokenizer.json`, `tokenizer_config.json` and, if there is a chat template,
            `chat_template.jinja`.

    Raises:
        ModelError: A setting is missing or cannot be carried over, or the vocabulary is damaged.
        VesicleError: The folder cannot be written.
    """
    settings = read_tokenizer_settings(path, header)
    arrays = {
        name: read_array(path, value)
        for name in ("tokens", "token_type", "merges", "scores")
        if isinstance(value := header.metadata.get(f"tokenizer.ggml.{name}"), GgufArray)
    }
    tokens = [str(token) for token in arrays["tokens"]]
    kinds = [int(kind) for kind in arrays.get("token_type", [])]
    try:
        if settings.vocabulary == "gpt2":
            tokenizer = _byte_level(tokens, [str(m) for m in arrays["merges"]], settings)
        else:
            scores = [float(score) for score in arrays["scores"]]
            tokenizer = _sentence_piece(tokens, scores, kinds, settings)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} is damaged: its vocabulary cannot be used: {error}") from error
    named = {
        ours: tokens[settings.ids[name]] for name, ours in NAMED.items() if name in settings.ids
    }
    _add_special(tokenizer, tokens, kinds, list(named.values()))
    tokenizer.post_processor = _post_processor(tokens, settings)
    with atomic_path(folder / "tokenizer.json") as part:
        tokenizer.save(str(part), pretty=False)
    write_json(folder / "tokenizer_config.json", _config(named))
    if settings.template is not None:
        with atomic_path(folder / "chat_template.jinja") as part:
            part.write_text(settings.template, encoding="utf-8", newline="")


def _config(named: dict[str, str]) -> dict[str, Any]:
    # A class that takes tokenizer.json as it is; others build one of their own from its vocabulary.
    return {"backend": "tokenizers", **named, "tokenizer_class": "TokenizersBackend"}


def _byte_level(tokens: list[str], merges: list[str], settings: TokenizerSettings) -> Tokenizer:
    rule = SPLITS[str(settings.pre)]
    pairs = []
    for merge in merges:
        # Not at the first character, which may be a blank that belongs to the left part.
        left, right = merge[:1], merge[1:]
        more, _, right = right.partition(" ")
        pairs.append((left + more, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            pairs,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
            ignore_merges=rule.ignores_merges,
        )
    )
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(
    tokens: list[str], scores: list[float], kinds: list[int], settings: TokenizerSettings
) -> Tokenizer:
    unknown = settings.ids.get("unknown")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            _merges_by_score(tokens, scores, kinds),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_BLANK,
        prepend_scheme="first" if settings.adds_blank else "never",
        split=False,
    )
    steps: list[Any] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.adds_blank:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: the best pair of neighbours joins first.

    Text never merges into a token that is no text, such as `</s>`.
    """
    text = [kind not in _NO_TEXT for kind in kinds] or [True] * len(tokens)
    ids = {token: i for i, token in enumerate(tokens) if text[i]}
    found: list[tuple[float, str, str]] = []
    for token, i in ids.items():
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(a, b) for a, b in cuts if a in ids and b in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(scores[i], a, b) for a, b in pairs]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(a, b) for _, a, b in found]


def _add_special(
    tokenizer: Tokenizer, tokens: list[str], kinds: list[int], named: list[str]
) -> None:
    """Mark the tokens that are found whole in a text: special ones, and those that are text."""
    special = {token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL}
    special |= set(named)
    whole = {token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED}
    # An empty string is found nowhere, and the library would take it for one that is everywhere.
    marked = special | whole
    marked.discard("")
    ordered = [token for token in dict.fromkeys(tokens) if token in marked]
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=token in special) for token in ordered]
    )


def _post_processor(tokens: list[str], settings: TokenizerSettings) -> Any:
    first = [tokens[settings.ids["bos"]]] if settings.adds_bos else []
    last = [tokens[settings.ids["eos"]]] if settings.adds_eos else []
    return processors.TemplateProcessing(
        single=[*first, "$A:0", *last],
        pair=[*first, "$A:0", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
        special_tokens=[
            (tokens[i], i)
            for i in {settings.ids[name] for name in ("bos", "eos") if name in settings.ids}
            if tokens[i] in (*first, *last)
        ],
    )
