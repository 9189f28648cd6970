"""The text that every contender reads, and how prompts are cut from it.

The text is this project's own. It is short, so a long prompt repeats it, with the sentences in
another order each time. `--text` takes any other file.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path

from vesicle.errors import DataError
from vesicle.files import read_text
from vesicle.models import Text

_STRIDE = 131
"""Tokens between the beginnings of prompts: a prime, so that no two begin alike."""

_MOST_CHARACTERS = 32
"""Of a file, no more is read than this many characters for each token needed."""

_SENTENCE_END = re.compile(r"(?<=[.?!]) ")

TEXT = """\
The harbour wakes before the town does. By four in the morning the first boats have left, and the
lamps along the pier go out one by one. Nets that were mended the evening before hang in long brown
folds from the rails. A lighthouse keeper once wrote that the sea has only two moods, and that both
are dangerous. Most of the catch is herring, though in late summer there are mackerel and a few
cod. Ice comes from the old brewery, where the cellars stay cold through the hottest week of the
year. Children learn to row before they learn to read, and nobody thinks this is strange. In 1874 a
storm carried away eleven houses, the chapel roof and the whole of the eastern wall. The wall was
rebuilt with granite from a quarry forty miles inland, one cart at a time. It took six years, and
the bill was paid with a tax on salt that lasted for two generations. A nerve cell passes its
message on by releasing a small amount of a chemical into a narrow gap. The receiving cell reads
how much arrived, not who sent it, and answers within a few thousandths of a second. Some of these
chemicals excite, some calm, and some only change how strongly the others act. That third kind
works slowly and reaches far, like the weather rather than like a letter. A tired animal and a
rested one may have the same wiring and still behave in quite different ways. Bread needs flour,
water, salt and time, and of these the time is what most people leave out. Mix the dough until no
dry flour is left, cover the bowl, and go away for half a day. The baker on the corner keeps a jar
of starter that is older than any of her apprentices. When the crust sings as it cools, she says,
the loaf has been baked long enough. Prices rose by four percent in the spring, mostly because of
the cost of grain and fuel. The council met on Tuesday to decide whether the bridge should be
repaired or replaced. Three engineers spoke, and each of them gave a different date by which it
would be unsafe. Repairing it would cost 2.4 million and close the road for eleven weeks. Replacing
it would cost four times as much, but the new one would carry trains as well. In the end they
voted, seven to five, to ask for a second report. A river does not choose its bed; it takes
whatever way loses height the fastest. Over thousands of years the bends grow wider, until the
water breaks through the neck of one. What is left behind is a lake shaped like a new moon, full of
reeds and slow fish. Geologists read these lakes as others read diaries, layer by layer and season
by season. Pollen in the mud tells them when the forest came back and when the first fields were
cleared. To find a word in a dictionary, open it in the middle and ask which half the word must be
in. Repeat this with the half that is left, and a million entries take no more than twenty steps.
The same idea finds a faulty change in a long history of changes, or a broken lamp in a string of
lamps. It fails only where the order is wrong, so it is worth the trouble to keep things sorted. My
grandmother sorted everything: buttons, seeds, letters, the nails that she pulled out of old
boards. She had been a telegraph operator, and she could hear three conversations at once without
losing one. When the lines were replaced by radio she bought the last machine for the price of its
brass. It still works, and on her birthday we send one message from the kitchen to the garden. The
message is always the same: all well here, the apples are nearly ripe, come home soon. Light from
the nearest star takes a little more than four years to reach us. A telescope is therefore also a
clock that runs backwards, and the faintest light is the oldest. On clear nights the observatory
opens its doors to anyone who is willing to climb the hill. Visitors often ask whether the colours
in the photographs are real. The honest answer is that the eye would see grey, and that the camera
simply waits longer. Snow fell early that year, and the pass was closed by the middle of October.
The post came over the ridge on skis, twice a week if the wind allowed it. Nobody in the valley had
seen the new schoolteacher yet, but everyone had an opinion about her. She arrived in a borrowed
coat, with two trunks of books and a violin that had only three strings. By the first day of spring
the older pupils could name every bird that passed the window. The younger ones could at least
imitate them, which made the lessons rather loud. A good map leaves out nearly everything, and the
art lies in knowing what nobody will miss. Sailors wanted depths and currents; tax collectors
wanted fields; generals wanted roads and wells. Each of them drew the same island, and no two of
the drawings look alike. The oldest one that survives was painted on a door, because paper would
not have kept in the damp. If you turn it over you can still see where the hinges were. How much
should a city spend on trees, when it does not have enough for its hospitals? A mature lime cools
the air around it as much as several machines would, and it asks for little but water. Streets with
shade are walked more, and people who walk more are ill less often. The sum is hard to write down,
since the costs arrive now and the savings arrive in thirty years. So the trees are planted by
those who will not sit under them, which may be the best thing about them.
"""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Token ids of a text that has no end, and where they came from.

    Attributes:
        ids: Long enough for any prompt of this run.
        description: Of the source, for reports.
        sha256: Of the ids, so that two runs can be told to have read the same.
    """

    ids: tuple[int, ...]
    description: str
    sha256: str

    def rows(self, start: int, batch: int, length: int) -> list[list[int]]:
        """`batch` different stretches of `length` ids; another `start` gives others.

        No two stretches begin alike, so that nothing cached from one can serve another.
        """
        n = len(self.ids)
        begins = [((start + b) * _STRIDE) % (n - length + 1) for b in range(batch)]
        return [list(self.ids[begin : begin + length]) for begin in begins]


def read_stream(text: Text, file: Path | None, longest: int, rows: int) -> Stream:
    """Tokenise enough text for prompts of `longest` tokens and `rows` different beginnings.

    Args:
        text: The model's tokenizer.
        file: A UTF-8 text file; the text above if None.
        longest: Tokens of the longest row, continuation included.
        rows: How many different rows will be asked for.

    Raises:
        DataError: If the file cannot be read or has no text.
    """
    needed = longest + _STRIDE * rows
    source = TEXT if file is None else read_text(file)[: needed * _MOST_CHARACTERS]
    sentences = _SENTENCE_END.split(" ".join(source.split()))
    ids = text.encode(" ".join(sentences) + "\n\n" if file is None else source)
    if not source.strip() or not ids:
        raise DataError(f"--text {file} has no text")
    generator = random.Random(0)
    while len(ids) < needed:
        generator.shuffle(sentences)
        ids += text.encode(" ".join(sentences) + "\n\n", continues=True)
    ids = ids[:needed]
    return Stream(
        ids=tuple(ids),
        description="the text that comes with vesicle" if file is None else file.name,
        sha256=hashlib.sha256(repr(ids).encode()).hexdigest(),
    )
