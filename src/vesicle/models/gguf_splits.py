"""How a byte-level vocabulary's text is split before merging: `tokenizer.ggml.pre` by name.

A GGUF file does not spell the rule out; it names one that llama.cpp knows. The rules below are
llama.cpp's (or, where it approximates one, that of the models' own `tokenizer.json`): expressions
are applied one after the other, each to the pieces that the one before left. A name that is not
here is refused, because another split gives other tokens than the model was trained with.
"""

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
DIGITS = (r"\p{N}", *GPT2)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
LLAMA3 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
QWEN2 = (rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHES}",
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_SLASHES}",
)


@dataclass(frozen=True, kw_only=True)
class TextSplit:
    """A rule, and what llama.cpp takes its name to mean besides.

    Attributes:
        expressions: Applied in order; a match and what lies between two become pieces.
        adds_bos: Whether a text gets a first token unless the file says otherwise.
        ignores_merges: Whether a piece that is in the vocabulary is a token as it is.
    """

    expressions: tuple[str, ...]
    adds_bos: bool = False
    ignores_merges: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """The rule for the tokenizers library."""
        if self.expressions == GPT2:
            return ByteLevel(add_prefix_space=False)
        if self.expressions == DIGITS:
            # The form that the models' own files have.
            return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
        splits = [Split(Regex(text), behavior="isolated") for text in self.expressions]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_LLAMA3 = TextSplit(expressions=LLAMA3, adds_bos=True, ignores_merges=True)
_GROUPS: tuple[tuple[TextSplit, tuple[str, ...]], ...] = (
    (TextSplit(expressions=DEFAULT), ("default",)),
    (
        TextSplit(expressions=GPT2),
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum"),
    ),
    (
        TextSplit(expressions=DIGITS),
        ("smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    (
        _LLAMA3,
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    ),
    (TextSplit(expressions=LLAMA3), ("smaug-bpe", "dbrx")),
    (TextSplit(expressions=QWEN2), ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo")),
    (TextSplit(expressions=GPT4O), ("gpt-4o", "llama4", "kanana2")),
    (TextSplit(expressions=TEKKEN, adds_bos=True, ignores_merges=True), ("tekken",)),
)
SPLITS: dict[str, TextSplit] = {name: rule for rule, names in _GROUPS for name in names}
"""Each name that is carried over."""
