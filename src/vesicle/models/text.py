"""Tokenizer and chat template of a model folder, without loading torch or transformers.

Token ids are those of transformers' `AutoTokenizer` and `apply_chat_template`, without the seconds
that loading transformers takes. Only fast tokenizers (`tokenizer.json`) are supported, and only the
text part of chat templates: no tools, no documents, no images.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from vesicle.errors import DataError, ModelError
from vesicle.files import read_json, read_text
from vesicle.models.control_tokens import ControlTokens, Messages

if TYPE_CHECKING:
    from jinja2 import Template

_WINDOW_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_REPLACEMENT = "\ufffd"
_MAX_PENDING = 64


class Text:
    """What turns text into token ids and back; made by `Text.from_pretrained`.

    Args:
        tokenizer: The tokenizer, without truncation or padding.
        special_tokens: The named special tokens (`bos_token`, ...), which templates may use.
        template: Source of the chat template, or None.
        eos_ids: Ids of the tokens that end a generation.
        context_window: The longest sequence the model was made for, in tokens.

    Attributes:
        eos_ids: Ids of the tokens that end a generation.
        context_window: The longest sequence the model was made for, in tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        template: str | None,
        eos_ids: Iterable[int],
        context_window: int,
    ) -> None:
        self.eos_ids = frozenset(eos_ids)
        self.context_window = context_window
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._control = ControlTokens(tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Text":
        """Read the text side of a model: a folder, a GGUF file, a hub id, or None for the default.

        Of a hub id no weights are fetched.

        Args:
            model: What to read.
            revision: Branch, tag or commit of a hub id; its main branch by default.
            token: For private and gated models on the hub; by default what its client has saved.

        Raises:
            ModelError: If the model cannot be found or is not supported, or a needed file of its
                is missing or damaged.
        """
        from vesicle.models.resolve import resolve_model

        return cls.from_folder(resolve_model(model, revision=revision, token=token, weights=False))

    @classmethod
    def from_folder(cls, path: Path | str) -> "Text":
        """Read the tokenizer, chat template and end-of-text ids of a model folder.

        Args:
            path: A folder with `tokenizer.json` and `config.json`, and whichever it has of
                `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja`.

        Returns:
            The folder's text side.

        Raises:
            ModelError: A needed file is missing or damaged, or no context window is named.
        """
        from vesicle.shapes import context_window  # late: importing this file loads no numpy

        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise ModelError(
                f"{path} has no tokenizer.json: slow tokenizers (tokenizer.model, vocab.txt) "
                "are not supported"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path / 'tokenizer.json'} cannot be read: {error}") from error
        config = _read_object(path / "config.json", needed=True)
        settings = _read_object(path / "tokenizer_config.json")
        special = _special_tokens({**_read_object(path / "special_tokens_map.json"), **settings})
        _configure(tokenizer, special)
        eos = end_ids(path) | token_ids(tokenizer.token_to_id(special.get("eos_token", "")))
        windows = [config[key] for key in _WINDOW_KEYS if isinstance(config.get(key), int)]
        window = context_window(config) or next(iter(windows), 0)
        if window < 1:
            raise ModelError(f"{path / 'config.json'} names no {_WINDOW_KEYS[0]} of 1 or more")
        return cls(
            tokenizer,
            special_tokens=special,
            template=_chat_template(path, settings),
            eos_ids=eos,
            context_window=window,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens the tokenizer knows; a model may have unused rows beyond them."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model was made for chats, and says how."""
        return self._template is not None

    def encode(
        self, text: str, *, control_tokens: bool = True, continues: bool = False
    ) -> list[int]:
        """Tokenise plain text, with the special tokens that the model's tokenizer adds by itself.

        Args:
            text: Any text.
            control_tokens: Whether special tokens spelt out in it are meant; otherwise they are
                text as any other.
            continues: Whether it goes on from other text, and gets no first or last token.

        Returns:
            Token ids, by default as `AutoTokenizer(text).input_ids` would be.
        """
        if not control_tokens:
            return self._control.encode(_encodable(text), add_special=not continues)
        return self._tokenizer.encode(_encodable(text), add_special_tokens=not continues).ids

    def encode_spans(
        self, text: str, *, control_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenise plain text, and tell which characters each token stands for.

        Args:
            text: Any text.
            control_tokens: As in `encode`.

        Returns:
            Token ids, as `encode` gives them; and of each its first character and the one after its
            last. Blanks that a tokenizer leaves out of its offsets are those of the token that
            follows. Tokens that share a character all have it, and those that the tokenizer adds
            by itself have none.
        """
        if control_tokens:
            found = self._tokenizer.encode(_encodable(text))
        else:
            found = self._control.encoding(_encodable(text), add_special=True)
        spans, told = list[tuple[int, int]](), 0
        for (first, stop), added in zip(found.offsets, found.special_tokens_mask, strict=True):
            if added:
                spans.append((told, told))
                continue
            first = min(first, told)
            spans.append((first, max(first, stop)))
            told = max(told, stop)
        return found.ids, spans

    def control_tokens(self, text: str) -> list[str]:
        """Tell which special tokens a text spells out.

        Args:
            text: Any text.

        Returns:
            Each occurrence, in order.
        """
        return self._control.spelt(text)

    def chat(
        self,
        prompt: str | Messages,
        system: str | None = None,
        *,
        control_tokens: bool = False,
    ) -> list[int]:
        """Tokenise a chat, up to where the model's next answer begins.

        Args:
            prompt: What the user says; or the turns so far, each with its `role` (`system`, `user`,
                `assistant`, or what else the template knows) and its `content`.
            system: Instructions before all of that; None leaves them to the turns and to the
                template, which may have its own.
            control_tokens: Whether special tokens spelt out in any of them are meant; otherwise
                they are text as any other, and the template's own alone are special.

        Returns:
            Token ids, as `apply_chat_template(..., add_generation_prompt=True)` would give them,
            which takes special tokens as meant wherever they stand.
            Without a chat template no role is told to the model: those of the plain text of a
            single user turn, to be continued; instructions before it, and a blank line between.

        Raises:
            DataError: The turns are malformed.
            ModelError: The template is broken, or it refuses a turn (some refuse `system`), or
                there is none for more than a single turn.
        """
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += _checked_turns(turns)
        if not self.has_chat_template:
            if [turn["role"] for turn in messages] not in (["user"], ["system", "user"]):
                raise ModelError(
                    "this model has no chat template; give a single user turn, or the text to "
                    "continue"
                )
            whole = "\n\n".join(turn["content"] for turn in messages)
            return self.encode(whole, control_tokens=control_tokens)
        if control_tokens:
            rendered = self._render(messages)
            return self._tokenizer.encode(rendered, add_special_tokens=False).ids
        return self._control.encode_chat(messages, self._render)

    @property
    def turn_end(self) -> int | None:
        """The token id that the chat template puts behind an answer, if it is one that ends a text.

        Without a template, or if it puts none, the lowest of those that end a text; None if there
        are none.
        """
        if self.has_chat_template:
            asked: Messages = [{"role": "user", "content": "a"}]
            told = [*asked, {"role": "assistant", "content": "b"}, *asked]
            behind = self.chat(told)[len(self.chat(asked)) :]
            found = next((i for i in behind if i in self.eos_ids), None)
            if found is not None:
                return found
        return min(self.eos_ids, default=None)

    def _render(self, messages: Messages) -> str:
        """Fill in the chat template, up to where the model's answer begins."""
        variables: dict[str, object] = {"messages": messages, "tools": None, "documents": None}
        variables |= {**self._special_tokens, "add_generation_prompt": True}
        try:
            rendered = self._compiled.render(variables)
        except Exception as error:  # a template is a program of its own, and may fail in any way
            raise ModelError(f"the model's chat template failed: {error}") from error
        return _encodable(rendered)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, leaving special tokens out.

        Args:
            ids: Token ids.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """Start decoding ids that arrive one by one.

        Returns:
            A fresh decoder, independent of all others.
        """
        return TextStream(self._tokenizer, self._special_ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        r"""Tell each token's own text, for display.

        Args:
            ids: Token ids.

        Returns:
            One string a token: blanks and line ends as they are, special tokens spelt out, and the
            bytes of a token that is no whole UTF-8 as `\xe2\x82`.
        """
        return [self._piece(i) for i in ids]

    def _piece(self, i: int) -> str:
        token = self._tokenizer.id_to_token(i)
        if token is None:
            return f"<{i}>"
        if i in self._added_ids:
            return token
        if self._bytes is None:
            return token.replace("▁", " ")
        data = bytes(self._bytes[char] for char in token if char in self._bytes)
        return data.decode("utf-8", "backslashreplace")

    @cached_property
    def _bytes(self) -> dict[str, int] | None:
        """The byte that each character of a byte-level token stands for; None for other kinds."""
        return _byte_alphabet() if "ByteLevel" in repr(self._tokenizer.decoder) else None

    @cached_property
    def _compiled(self) -> "Template":
        return _compile(self._template or "")


class TextStream:
    """An incremental decoder: what it emits, joined, is what `Text.decode` gives for all ids.

    Args:
        tokenizer: The tokenizer.
        special_ids: Ids that stand for no text.
    """

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # Tokens of the last emission: what follows is decoded after them, because some decoders
        # treat a token at the very start in another way (they drop its blank).
        self._context: list[int] = []
        self._pending: list[int] = []
        self._skip = 0

    def push(self, token_id: int) -> str:
        """Take one id.

        Args:
            token_id: The next id.

        Returns:
            The text that is complete now: "" in the middle of a character.
        """
        if token_id in self._special_ids:
            return ""
        self._pending.append(token_id)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """Give what is left at the end: a character cut short, as U+FFFD.

        Returns:
            The rest of the text, usually "".
        """
        return self._emit(self._text()) if self._pending else ""

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)

    def _emit(self, text: str) -> str:
        new = text[self._skip :]
        self._context = self._pending if new else self._context + self._pending
        self._pending = []
        self._skip = len(self._text())
        return new


def _configure(tokenizer: Tokenizer, special: Mapping[str, str]) -> None:
    """Apply what transformers applies on top of `tokenizer.json`.

    The settings `add_bos_token` and `add_eos_token` are not among it: `tokenizer.json` decides.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    vocabulary = tokenizer.get_vocab() if set(special.values()) - known else {}
    # A token beyond the vocabulary would have an id that the model has no row for.
    tokenizer.add_special_tokens(
        [token for token in special.values() if token not in known and token in vocabulary]
    )


def _checked_turns(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The turns of a chat, if they are ones that a model can answer."""
    if not turns:
        raise DataError("the chat has no messages; give at least one")
    for place, turn in enumerate(turns):
        named = isinstance(turn, Mapping) and {"role", "content"} <= turn.keys()
        if not named or not all(isinstance(value, str) for value in turn.values()):
            raise DataError(
                f"message {place} of the chat is {reprlib.repr(turn)}; allowed: a dict with the "
                "texts 'role' and 'content'"
            )
    if turns[-1]["role"] == "assistant":
        raise DataError(
            "the chat ends with what the assistant says; end it with what is to be answered"
        )
    return [dict(turn) for turn in turns]


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of a tokenizer's settings, which spell them in two ways."""
    named = {}
    for key, value in settings.items():
        if not key.endswith("_token") or key.startswith(("add_", "image_", "video_", "audio_")):
            continue
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[key] = content
    return named


def _chat_template(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or one in the settings (the default of several)."""
    if (path / "chat_template.jinja").is_file():
        try:
            return read_text(path / "chat_template.jinja")
        except DataError as error:
            raise ModelError(str(error)) from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _compile(source: str) -> "Template":
    """Compile a chat template, which is code of unknown origin, in a sandbox.

    The settings and helpers are those of transformers, because templates are written against them.
    """
    # Imported here because plain text needs no templates.
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the model's own turns for training: no effect here."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: unprintable ones from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + rank): byte for rank, byte in enumerate(shifted)}


def _encodable(text: str) -> str:
    """Replace lone surrogates, which stand for no text and which the tokenizer cannot take."""
    return text.encode("utf-8", "replace").decode("utf-8")


def end_ids(path: Path) -> set[int]:
    """Ids that end a generation as a folder's configuration names them, its tokenizer aside.

    Raises:
        ModelError: A file is damaged, or there is no `config.json`.
    """
    config = _read_object(path / "config.json", needed=True)
    generation = _read_object(path / "generation_config.json")
    return token_ids(config.get("eos_token_id")) | token_ids(generation.get("eos_token_id"))


def token_ids(value: object) -> set[int]:
    """Ids from a setting that holds one, several or none."""
    return {i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}


def _read_object(path: Path, needed: bool = False) -> dict[str, Any]:
    """Read a JSON object, {} if there is no such file and none is needed."""
    if not needed and not path.is_file():
        return {}
    try:
        value = read_json(path)
    except DataError as error:
        raise ModelError(str(error)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object")
    return value


def n_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Leading tokens that two rows of token ids share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
