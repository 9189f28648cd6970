"""Control tokens come from a chat template; what a person wrote is text, whatever it spells out.

A tokenizer finds its special tokens anywhere in what it is given, so `<|im_end|>` in a question
would end the user's turn. Two stand-ins tell the template's own from the others:

1. In the *contents*, each spelt-out token is replaced by a random mark before the template is
   rendered. The special tokens in what is rendered are then the template's.
2. In what was rendered, each of *those* is replaced by a random token of a second tokenizer, which
   knows these tokens besides its own vocabulary, and takes special tokens for text. The marks of
   step 1 are undone, all is encoded in one piece, and the stand-ins' ids are mapped back.

So tokens merge across the edge of template and content as they always did, and a template may trim,
split or test its contents. A chat whose contents spell out nothing is encoded as it is.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from tokenizers import AddedToken, Encoding, Tokenizer

from vesicle.errors import ModelError

Messages = Sequence[Mapping[str, str]]


class ControlTokens:
    """Tells special tokens that are meant from those that are only spelt out.

    Args:
        tokenizer: The tokenizer, which is not changed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        # As the tokenizer searches: the first match, and the longest of those.
        ranked = sorted(added.values(), key=lambda token: -len(token.content))
        self._any = re.compile("|".join(map(_pattern, ranked)) or r"(?!)")
        # What cannot be guessed cannot be typed.
        self._key = _unseen(secrets.token_hex(8))

    def spelt(self, text: str) -> list[str]:
        """The special tokens that a text spells out.

        Args:
            text: Any text.

        Returns:
            Each of them, in the order in which they are found.
        """
        return [found for found in self._any.findall(text) if found in self._special]

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Tokenise a text in which no special token is meant.

        Args:
            text: The text.
            add_special: Whether the tokenizer adds its first and last token.

        Returns:
            Token ids.
        """
        return self.encoding(text, add_special=add_special).ids

    def encoding(self, text: str, *, add_special: bool) -> Encoding:
        """The same, as the tokenizer gives it: with the characters that each token stands for."""
        found = self._tokenizer.encode(text, add_special_tokens=add_special)
        special = set(self._special.values())
        pairs = zip(found.ids, found.special_tokens_mask, strict=True)
        # Those that the tokenizer added by itself are marked.
        if not any(i in special and not added for i, added in pairs):
            return found
        return self._literal.encode(text, add_special_tokens=add_special)

    def encode_chat(self, messages: Messages, render: Callable[[Messages], str]) -> list[int]:
        """Tokenise a chat in which the template's special tokens alone are meant.

        Args:
            messages: The turns.
            render: The template: turns to text.

        Returns:
            Token ids.

        Raises:
            ModelError: The template rewrites a spelt-out token, which can then not be told from one
                of its own.
        """
        marks = {token: self._mark(_TYPED, n) for n, token in enumerate(self._special)}
        guarded = [
            {name: self._replaced(value, marks) for name, value in turn.items()}
            for turn in messages
        ]
        rendered = render(guarded)
        if guarded == [dict(turn) for turn in messages]:
            ids = self._tokenizer.encode(rendered, add_special_tokens=False).ids
            special = set(self._special.values())
            # A tokenizer that normalises may find more than is spelt out.
            if [i for i in ids if i in special] == [self._special[t] for t in self.spelt(rendered)]:
                return ids
        text = self._replaced(rendered, self._stand_ins)
        for token, mark in marks.items():
            text = text.replace(mark, token)
        rest = text
        for stand_in in self._stand_ins.values():
            rest = rest.replace(stand_in, "")
        if self._key in rest or json.dumps(self._key)[1:-1] in rest:
            raise ModelError(
                "the model's chat template rewrites control tokens that the text spells out, which "
                "can then not be told from its own; leave them out of the text"
            )
        found = self._literal.encode(text, add_special_tokens=False).ids
        return [self._meant.get(i, i) for i in found]

    def _mark(self, kind: str, number: int) -> str:
        return f"{self._key}{kind}{_unseen(f'{number:x}')}{_END}"

    def _replaced(self, text: str, replacements: Mapping[str, str]) -> str:
        return self._any.sub(lambda found: replacements.get(found[0], found[0]), text)

    @cached_property
    def _stand_ins(self) -> dict[str, str]:
        """Special tokens to their stand-ins."""
        return {token: self._mark(_MEANT, n) for n, token in enumerate(self._special)}

    @cached_property
    def _literal(self) -> Tokenizer:
        """A tokenizer that takes special tokens for text, and knows the stand-ins."""
        literal = Tokenizer.from_str(self._tokenizer.to_str())
        literal.encode_special_tokens = True
        kinds = {t.content: t for t in self._tokenizer.get_added_tokens_decoder().values()}
        literal.add_tokens(
            [
                AddedToken(
                    stand_in,
                    single_word=kinds[token].single_word,
                    lstrip=kinds[token].lstrip,
                    rstrip=kinds[token].rstrip,
                    normalized=kinds[token].normalized,
                    special=False,
                )
                for token, stand_in in self._stand_ins.items()
            ]
        )
        return literal

    @cached_property
    def _meant(self) -> dict[int, int]:
        """Ids of the stand-ins to those of the tokens that they stand for."""
        ids = {token: self._literal.token_to_id(s) for token, s in self._stand_ins.items()}
        return {i: self._special[token] for token, i in ids.items() if i is not None}


# Code points that Unicode keeps free of characters: no token holds one, no letter touches one.
_TYPED, _MEANT, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_FIRST_DIGIT = 0xFDD3


def _unseen(digits: str) -> str:
    """Hexadecimal digits as code points that are no characters."""
    return "".join(chr(_FIRST_DIGIT + int(digit, 16)) for digit in digits)


def _pattern(token: AddedToken) -> str:
    pattern = re.escape(token.content)
    return rf"(?<!\w){pattern}(?!\w)" if token.single_word else pattern
