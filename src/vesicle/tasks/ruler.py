"""RULER-style retrieval, tracing and counting in prompts of chosen lengths.

After Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(arXiv:2404.06654), section 3, made anew from the description. Seven of its sub-tasks:

- single needle: one number in noise, a few lines repeated;
- multi-key: four named numbers in essays, one is asked for;
- multi-value: four numbers of one name in essays, all are asked for;
- multi-query: four named numbers in essays, all are asked for;
- variable tracking: a chain `VAR A = 12345 ... VAR B = VAR A ...` in noise; all names in it;
- common words: a numbered list; the ten words that occur most often;
- frequent words: coined words, rank r occurring in proportion to r**-2; the three most frequent
  after a filler of dots.

Not here: the needles with uuids or in text that is all needles, and question answering.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from vesicle.tasks.base import Row, Settings
from vesicle.tasks.haystack import GeneratedTask, Haystack, cells, fit, generator
from vesicle.tasks.items import Item
from vesicle.tasks.metrics.retrieval import RULER_SUBTASKS, RulerRecall

LENGTHS = (1024, 2048)
PER_CELL = 3
# Shorter prompts have no room for a worked example.
EXAMPLE_FROM_TOKENS = 1024

_NOISE: tuple[Row, ...] = (
    {
        "text": "The river is wide. The road is long. The night is quiet. We walk along the bank."
        " Then we turn and come home."
    },
)
_NOUNS = tuple(
    """
    acorn anchor apple arrow badge bag ball banner barrel basket beach bell bench berry bird blanket
    board boat bottle bowl box branch bread brick bridge broom brush bucket button cabin cable cake
    camera candle canoe card carpet castle chain chair cheese chest circle clock cloud coat coin
    compass copper corner cotton crown cup curtain desk diamond dish doctor door dragon drawer dress
    drum eagle engine envelope farmer feather fence field finger flag flower flute forest fork
    fountain fox frame garden gate glass glove goat gold grape guitar hammer harbor hat hill honey
    horse hotel house island jacket jar jewel key kitchen kite knife ladder lake lamp lantern leaf
    lemon letter library lion lock magnet map market mask meadow melon mirror monkey moon mountain
    mouse nail needle nest net night oak ocean onion orange orchard oven owl paddle page palace
    paper parrot path peach pearl pencil penny pepper piano picture pillow pilot pine pipe planet
    plate pocket pond potato powder puzzle queen rabbit radio rain ribbon rice ring river road robin
    rock roof room rope rose sailor salt sand scarf school seed shadow sheep shelf shell ship shirt
    shoe silver sister sky snow soap sock spoon spring square stable stamp star statue stone storm
    stove straw street sugar summer sword table tailor teacher temple tent thread ticket tiger tool
    tower town train tree trumpet tunnel turtle umbrella valley vase velvet village violin wagon
    wall watch water whale wheat wheel whistle wind window winter wire wolf wood wool yard zebra
    """.split()
)
_ADJECTIVES = tuple(
    """
    ancient bitter bold brave bright broken calm clever cold curious dark deep distant early empty
    faded famous fancy fast fresh gentle giant golden happy heavy hidden hollow honest hungry kind
    large late lazy light little lonely loud lucky modern narrow noisy old pale patient plain polite
    proud quick quiet rare rough round rusty secret sharp shiny silent simple small smooth soft sour
    spare steady strange strong sweet swift tall tame thick thin tiny tired warm wide wild wise
    """.split()
)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a sub-task asks: the parts of an Item that it sets."""

    context: str
    question: str
    opening: str
    references: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a sub-task makes a prompt from.

    Attributes:
        seed: Parts of the item's seed.
        n_tokens: Length of the prompt.
        encode: Text to token ids.
        essays: Natural filler.
        noise: Repeated filler.
        depths: Where needles may lie; () for anywhere.
    """

    seed: tuple[int | str, ...]
    n_tokens: int
    encode: Callable[[str], list[int]]
    essays: Haystack
    noise: Haystack
    depths: tuple[float, ...]

    def rng(self) -> np.random.Generator:
        """The item's generator, from its beginning."""
        return generator(*self.seed)

    @property
    def has_example(self) -> bool:
        """Whether there is room for a worked example."""
        return self.n_tokens >= EXAMPLE_FROM_TOKENS


def needles(room: Room, haystack: Haystack, n_keys: int, n_values: int, n_asked: int) -> Ask:
    """Named numbers in a haystack; the numbers of some of the names are asked for."""
    rng = room.rng()
    names = _names(rng, n_keys)
    numbers = rng.choice(9_000_000, size=(n_keys, n_values), replace=False) + 1_000_000
    hidden = [
        f"One of the secret numbers for {name} is {number}."
        for name, values in zip(names, numbers, strict=True)
        for number in values
    ]
    rng.shuffle(hidden)
    depths = rng.choice(room.depths, len(hidden)) if room.depths else rng.random(len(hidden))
    asked = [int(index) for index in rng.choice(n_keys, n_asked, replace=False)]
    references = tuple(str(number) for index in asked for number in numbers[index])
    listed = _listed([names[index] for index in asked])
    one = len(references) == 1
    verb, thing = ("is", "number") if one else ("are", "numbers")
    quantity = "the" if one else "all the"
    before = "Some secret numbers are hidden in the text below. Find them and remember them.\n\n"
    question = f"\n\nQuestion: What {verb} {quantity} secret {thing} for {listed}?\nAnswer:"
    opening = f" The secret {thing} for {listed} {verb}"
    text = haystack.fill(
        rng,
        room.encode,
        room.n_tokens,
        lambda filler: before + filler + question + opening,
        [(float(depth), needle) for depth, needle in zip(depths, hidden, strict=True)],
    )
    return Ask(
        context=before + text,
        question=question,
        opening=opening,
        references=references,
        max_new_tokens=16 if one else 64,
        stop=("\n",),
    )


def single_needle(room: Room) -> Ask:
    """One name and number in noise."""
    return needles(room, room.noise, 1, 1, 1)


def multi_key(room: Room) -> Ask:
    """Four names and numbers in essays, one asked for."""
    return needles(room, room.essays, 4, 1, 1)


def multi_value(room: Room) -> Ask:
    """Four numbers of one name in essays."""
    return needles(room, room.essays, 1, 4, 1)


def multi_query(room: Room) -> Ask:
    """Four names and numbers in essays, all asked for."""
    return needles(room, room.essays, 4, 1, 4)


def variable_tracking(room: Room) -> Ask:
    """A chain of five assignments in noise; the names that hold the first one's value."""
    rng = room.rng()
    before = "Follow the variables that are assigned in the text below.\n\n"

    def chain() -> tuple[str, list[str], list[str]]:
        names: list[str] = []
        while len(names) < 5:
            name = _letters(rng, string.ascii_uppercase, 5)
            names += [] if name in names else [name]
        value = str(rng.integers(10_000, 100_000))
        lines = [f"VAR {names[0]} = {value}."]
        lines += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
        return value, names, lines

    def ask(value: str) -> tuple[str, str]:
        return (
            f"\n\nQuestion: Which variables are assigned the value {value}, directly or through"
            " other variables?\nAnswer:",
            f" The five variables that are assigned the value {value} are",
        )

    example = ""
    if room.has_example:
        value, names, lines = chain()
        noise = room.noise.sentences
        mixed = [part for pair in zip(noise, lines, strict=True) for part in pair]
        example = f"{before}{' '.join(mixed)}{''.join(ask(value))} {_listed(names)}.\n\n"
    value, names, lines = chain()
    while value in example:
        value, names, lines = chain()
    question, opening = ask(value)
    depths = sorted(float(depth) for depth in rng.random(len(lines)))
    text = room.noise.fill(
        rng,
        room.encode,
        room.n_tokens,
        lambda filler: example + before + filler + question + opening,
        list(zip(depths, lines, strict=True)),
    )
    return Ask(
        context=example + before + text,
        question=question,
        opening=opening,
        references=tuple(names),
        max_new_tokens=48,
        stop=("\n\n",),
    )


def common_words(room: Room) -> Ask:
    """A numbered list of words; the ten that occur most often.

    As in the original, below 4096 tokens common words occur 6 times and others once; from there on
    30 times and 3 times.
    """
    rng = room.rng()
    words = [str(word) for word in rng.permutation(_NOUNS)]
    pairs = rng.permutation(len(_ADJECTIVES) * len(_NOUNS))
    question = "\n\nQuestion: Which 10 words occur most often in the list?\nAnswer:"
    opening = " The 10 words that occur most often in the list are:"

    def listed(common: list[str], often: int, others: list[str], seldom: int) -> str:
        entries = common * often + others * seldom
        room.rng().shuffle(entries)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))
        return (
            "Below is a numbered list of words. Some of them occur more often than others."
            f" Remember those.\n\n{numbered}"
        )

    example = ""
    if room.has_example:
        shown, words = words[:20], words[20:]
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(shown[:10], start=1))
        example = f"{listed(shown[:10], 3, shown[10:], 1)}{question}{opening} {answer}\n\n"
    common, others = words[:10], words[10:]
    # A long list takes more words than there are: pairs of words follow, as in the original.
    compounds = (f"{_ADJECTIVES[i // len(_NOUNS)]}-{_NOUNS[i % len(_NOUNS)]}" for i in pairs)
    others += [word for word in compounds if word.split("-")[1] not in common]
    often, seldom = (6, 1) if room.n_tokens < 4096 else (30, 3)

    def context(n_others: int) -> str:
        return example + listed(common, often, others[:n_others], seldom)

    size = fit(
        lambda n_others: len(room.encode(context(n_others) + question + opening)), room.n_tokens
    )
    return Ask(
        context=context(size),
        question=question,
        opening=opening,
        references=tuple(common),
        max_new_tokens=80,
    )


def frequent_words(room: Room) -> Ask:
    """Coined words with frequencies of Zeta(2); the three most frequent, dots aside.

    A text of N words holds round(N r**-2 / zeta(2)) of rank r. Rank 1 is a filler of dots.
    """
    rng = room.rng()
    zeta_2 = np.pi**2 / 6
    coined: list[str] = ["....."]
    before = (
        "Below is a coded text. Find the three coded words that occur most often in it. The dots"
        " '.....' do not count.\n\n"
    )
    question = (
        "\n\nQuestion: Which three coded words occur most often in the text, dots aside?\nAnswer:"
    )
    opening = " The three coded words that occur most often are:"

    def text(n_words: int) -> str:
        entries: list[str] = []
        # Never fewer than what keeps ranks 2, 3, 4 and 5 apart: 15, 7, 4 and 2 times.
        total = n_words + 100
        for rank in range(1, total):
            count = round(total * rank**-2.0 / zeta_2)
            if count == 0:
                break
            while len(coined) < rank:
                word = _letters(rng, string.ascii_lowercase, 6)
                coined.extend([] if word in coined else [word])
            entries += [coined[rank - 1]] * count
        room.rng().shuffle(entries)
        return " ".join(entries)

    size = fit(
        lambda n: len(room.encode(before + text(n) + question + opening)),
        room.n_tokens,
    )
    return Ask(
        context=before + text(size),
        question=question,
        opening=opening,
        references=tuple(coined[1:4]),
        max_new_tokens=48,
    )


SUBTASKS: dict[str, Callable[[Room], Ask]] = dict(
    zip(
        RULER_SUBTASKS,
        (
            single_needle,
            multi_key,
            multi_value,
            multi_query,
            variable_tracking,
            common_words,
            frequent_words,
        ),
        strict=True,
    )
)


class Ruler(GeneratedTask):
    """Seven sub-tasks of RULER at each length."""

    name = "ruler"
    title = "RULER-style"
    style = "plain"
    metrics = (RulerRecall(),)

    def items(self, rows: Iterable[Row], settings: Settings) -> Iterable[Item]:
        """Items of all lengths and sub-tasks, then all of them again, `per_cell` times.

        `settings.depths` are where needles may lie, drawn for each; anywhere without them.

        Raises:
            DataError: Filler without sentences, a length too short for a sub-task, a depth outside
                0 to 1.
        """
        essays, noise = Haystack(rows), Haystack(_NOISE)
        for number, length in cells(settings, LENGTHS, PER_CELL):
            for subtask, make in SUBTASKS.items():
                room = Room(
                    seed=(self.name, settings.seed, subtask, length, number),
                    n_tokens=length,
                    encode=settings.encode,
                    essays=essays,
                    noise=noise,
                    depths=tuple(settings.depths),
                )
                ask = make(room)
                yield Item(
                    id=f"{subtask.replace(' ', '-')}-{length}-{number}",
                    context=ask.context,
                    question=ask.question,
                    opening=ask.opening,
                    references=ask.references,
                    max_new_tokens=ask.max_new_tokens,
                    stop=ask.stop,
                    group=subtask,
                    facts={"length": length},
                )


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of two words."""
    nouns = rng.choice(_NOUNS, count, replace=False)
    return [f"{rng.choice(_ADJECTIVES)} {noun}" for noun in nouns]


def _letters(rng: np.random.Generator, alphabet: str, count: int) -> str:
    return "".join(rng.choice(list(alphabet), count))


def _listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
