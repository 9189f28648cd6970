"""Every number that the HNLPU ledger rests on, each with where it is from.

A hardwired language processing unit (Liu et al. 2026, ASPLOS; arXiv 2508.16151) has a model's
weights in its metal wires. Its sizes, power and prices are the paper's, of gpt-oss 120B at 5 nm; no
such chip was made, and the paper's own numbers come from layouts and simulation. A `Constant` is

- `published`: stands in the source that is named;
- `derived`: follows from published ones, as `source` says how;
- `assumed`: nobody published it. It has a `low` and a `high`, and what depends on it has a range.

The first version of the paper gave other prices than the second; both stand here, and the ledger
computes with the second's, which are itemised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vesicle.shapes import ModelShape

Kind = Literal["published", "derived", "assumed"]

_PAPER = "Liu et al. 2026 (ASPLOS; arXiv 2508.16151v2)"
_ABSTRACT, _FIRST = f"{_PAPER}, abstract", "Liu et al. 2025 (arXiv 2508.16151v1), abstract"
_TABLE_1, _TABLE_2, _TABLE_3 = (f"{_PAPER}, table {number}" for number in (1, 2, 3))
_TABLE_4, _TABLE_5 = (f"{_PAPER}, table {number}" for number in (4, 5))
_FIGURE_14, _NOTES = f"{_PAPER}, figure 14", f"{_PAPER}, appendix B"
_DESIGN = f"{_PAPER}, sections 4 and 5"
_CARD = "OpenAI 2025, gpt-oss model card"


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One number and where it is from.

    Attributes:
        name: What it is of.
        value: The number; of a published range the middle.
        unit: Its unit; empty for a share or a ratio.
        kind: `published`, `derived` or `assumed`.
        source: The place in a publication, the derivation, or why it is assumed.
        low: The least it may be, where there is a range.
        high: The most.
    """

    name: str
    value: float
    unit: str
    kind: Kind
    source: str
    low: float | None = None
    high: float | None = None


def _published(name: str, value: float, unit: str, source: str) -> Constant:
    return Constant(name=name, value=value, unit=unit, kind="published", source=source)


def _range(name: str, low: float, high: float, unit: str, source: str) -> Constant:
    return Constant(
        name=name,
        value=(low + high) / 2,
        unit=unit,
        kind="published",
        source=source,
        low=low,
        high=high,
    )


def _derived(name: str, value: float, unit: str, source: str) -> Constant:
    return Constant(name=name, value=value, unit=unit, kind="derived", source=source)


# The model that was cast -------------------------------------------------------------------------

GPT_OSS = ModelShape(
    n_layers=36,
    width=2880,
    n_heads=64,
    n_kv_heads=8,
    head_size=64,
    ffn_width=4 * 2880,
    gated=True,
    vocabulary=201_088,
    kv_bytes=2,
    stored_bits=4,
)
"""gpt-oss 120B as a token meets it: the 4 experts of 128 that it takes are one FFN of 4 x 2,880.

The router (0.3 % of a token's multiply-adds) and the windows of half of the layers are left out;
the paper's own dataflow has no windows either."""

PARAMETERS = _published("parameters of gpt-oss 120B", 116.8e9, "", _CARD)
ACTIVE = _published("of which a token meets", 5.1e9, "", _CARD)
CAST = _derived(
    "parameters in metal",
    PARAMETERS.value - GPT_OSS.vocabulary * GPT_OSS.width,
    "",
    "all but the input embedding, which the paper keeps in HBM (section 4.2)",
)
CONTEXT = Constant(
    name="positions read by the token that table 2 is about",
    value=2048,
    unit="",
    kind="assumed",
    source='the paper says "2K token length"; the last position is taken, without windows',
    low=1024,
    high=2048,
)

# The system --------------------------------------------------------------------------------------

CHIPS = _published("chips of the system", 16, "", _TABLE_2)
THROUGHPUT = _published("throughput, pipeline full", 249_960, "tokens/s", _TABLE_2)
TOKENS_PER_KJ = _published("energy efficiency", 36_226, "tokens/kJ", _TABLE_2)
SYSTEM_AREA = _published("area of all dies", 13_232, "mm2", _TABLE_2)
SYSTEM_POWER = _published("power of the system", 6_900, "W", _TABLE_2)
STAGES = _published("pipeline stages of a layer", 6, "", _DESIGN)
SLOTS = _published("sequences in flight at most", 216, "", _DESIGN)
DENSITY = _published("density against embedding in cells", 15, "", _ABSTRACT)
MASK_SAVING = _published("mask cost, naive over HNLPU", 112, "", _ABSTRACT)
MASK_LAYERS = _published("mask layers", 70, "", _ABSTRACT)
SHARED_LAYERS = _published("mask layers that all chips share", 60, "", _ABSTRACT)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A part of one chip.

    Attributes:
        name: Of the part.
        area: mm2 of one chip.
        power: W of one chip, at work and at rest together: the paper does not part the two.
    """

    name: str
    area: Constant
    power: Constant

    @property
    def joules(self) -> float:
        """Of one token of gpt-oss, all chips together."""
        return CHIPS.value * self.power.value / THROUGHPUT.value


def _block(name: str, what: str, area_mm2: float, power_w: float) -> Block:
    return Block(
        name=name,
        area=_published(f"area of {what}", area_mm2, "mm2 a chip", _TABLE_1),
        power=_published(f"power of {what}", power_w, "W a chip", _TABLE_1),
    )


ARRAY = _block("array", "the hardwired array", 573.16, 76.92)
VECTOR = _block("vector", "the vector unit", 27.87, 33.09)
BUFFER = _block("buffer", "the attention buffer (SRAM)", 136.11, 85.73)
LINK = _block("link", "the interconnect engine", 37.92, 49.65)
MEMORY = _block("memory", "the HBM interface", 52, 63)
BLOCKS = (ARRAY, VECTOR, BUFFER, LINK, MEMORY)
"""The control unit (0.02 mm2, under 0.01 W) is left out."""
CHIP_AREA = _published("area of a chip", 827.08, "mm2", _TABLE_1)
CHIP_POWER = _published("power of a chip", 308.39, "W", _TABLE_1)
OVERHEAD = _derived(
    "power outside of the dies over theirs",
    SYSTEM_POWER.value / (CHIPS.value * CHIP_POWER.value) - 1,
    "",
    "6.9 kW of table 2 over 16 x 308.39 W of table 1, less 1; the paper does not say what it is "
    "(HBM stacks, conversion, cooling)",
)
TOKEN_S = _derived(
    "time of one token through all layers",
    SLOTS.value / THROUGHPUT.value,
    "s",
    "216 sequences over 249,960 tokens/s, by Little's law, if all slots are full",
)

# Where a token's time goes -----------------------------------------------------------------------

TIME_BY_CONTEXT = {
    2 * 1024: {"link": 0.829, "projection": 0.138},
    64 * 1024: {"link": 0.708, "projection": 0.118, "attention": 0.151},
    128 * 1024: {"link": 0.615, "projection": 0.102, "attention": 0.262},
    256 * 1024: {"link": 0.487, "projection": 0.081, "attention": 0.416},
    512 * 1024: {"link": 0.307, "projection": 0.051, "attention": 0.524, "stall": 0.107},
}
"""Shares of a token's time, as figure 14 labels them; what it does not label is not here."""
LINK_TIME = _published("time between chips, at 2K", 0.829, "", _FIGURE_14)
PROJECTION_TIME = _published("time of projections, at 2K", 0.138, "", _FIGURE_14)
ATTENTION_TIME = _derived(
    "time of attention, at 2K",
    0.262 / 0.615 * 0.829 / 64,
    "",
    "at 128K it takes 26.2 % beside 61.5 % between chips, and it grows with the context",
)
ELEMENTWISE_TIME = _derived(
    "time of norms and activations, at 2K",
    1 - LINK_TIME.value - PROJECTION_TIME.value - ATTENTION_TIME.value,
    "",
    "what the other three leave",
)

# Other machines ----------------------------------------------------------------------------------

GPU_SPEED = _published("throughput over one H100's", 5_555, "", _ABSTRACT)
GPU_ENERGY = _published("tokens/J over an H100's", 1_047, "", _ABSTRACT)
WAFER_SPEED = _published("throughput over a WSE-3's", 85, "", _ABSTRACT)
WAFER_ENERGY = _published("tokens/J over a WSE-3's", 283, "", _ABSTRACT)
GPU_TOKENS_PER_S = _published("throughput of one H100", 45, "tokens/s", _TABLE_2)
WAFER_TOKENS_PER_S = _published("throughput of a WSE-3", 2_940, "tokens/s", _TABLE_2)
GPU_BUSY = _published("throughput of an H100 with 50 requests", 1_080, "tokens/s", _NOTES)

# Money and carbon --------------------------------------------------------------------------------

NAIVE_MASKS = _published("masks of naive hardwiring", 6e9, "USD", _ABSTRACT)
NRE_FIRST = _published("one-off cost, by the first version", 184e6, "USD", _FIRST)
NRE_SECOND = _range("capital of one system, by the second", 59.46e6, 123.5e6, "USD", _ABSTRACT)
VALUE_FIRST = _published("cost-effectiveness against H100, first", 8.57, "", _FIRST)
VALUE_SECOND = _range("cost-effectiveness against H100, second", 41.7, 80.4, "", _ABSTRACT)
CARBON_FIRST = _published("carbon, H100 over HNLPU, first", 230, "", _FIRST)
CARBON_SECOND = _published("carbon, H100 over HNLPU, second", 357, "", _ABSTRACT)
MASK_SET = _range("a full set of masks", 15e6, 30e6, "USD", _NOTES)
SHARED_MASKS = _range("masks that all chips share", 13.85e6, 27.69e6, "USD", _TABLE_5)
CHIP_MASKS = _range("masks of one chip's metal", 18.46e6 / 16, 36.92e6 / 16, "USD", _TABLE_5)
ARCHITECTURE = _range("design: architecture", 1.87e6, 3.74e6, "USD", _TABLE_5)
VERIFICATION = _range("design: verification", 9.97e6, 19.93e6, "USD", _TABLE_5)
LAYOUT = _range("design: physical", 4.80e6, 14.41e6, "USD", _TABLE_5)
LICENCES = _range("design: bought blocks", 10.23e6, 20.46e6, "USD", _TABLE_5)
DESIGN = (ARCHITECTURE, VERIFICATION, LAYOUT, LICENCES)
DIE = _published("a good die", 629, "USD a chip", _TABLE_5)
PACKAGE = _range("package and test", 111, 185, "USD a chip", _TABLE_5)
STACKS = _range("HBM", 1_920, 3_840, "USD a chip", _TABLE_5)
INTEGRATION = _range("system integration", 1_900, 3_800, "USD a chip", _TABLE_5)
MADE = (DIE, PACKAGE, STACKS, INTEGRATION)
PUE = _published("power of a data centre over its machines'", 1.4, "", _NOTES)
ELECTRICITY = _published("electricity", 0.095, "USD/kWh", _NOTES)
FACILITY = _published("building a data centre", 12e6, "USD/MW", _NOTES)
NETWORK = _published("network", 45_000 / 8, "USD a chip", _NOTES)
GRID = _published("carbon of electricity", 0.38, "kg/kWh", _NOTES)
EMBODIED = _published("carbon of making a module", 124.9, "kg a chip", _NOTES)
CHIP_PRICES = {"Kimi-K2": 462e6, "DeepSeek-V3": 353e6, "QwQ": 69e6, "Llama-3": 38e6}
"""USD, one-off, of other models (table 4)."""
DEPLOYED = {1: (96.62e6, 197.8e6), 50: (118.9e6, 229.4e6)}
"""USD of three years with two updates, by number of systems (table 3)."""

# What nobody published ---------------------------------------------------------------------------

STATIC = Constant(
    name="share of each block's power that flows at rest",
    value=0.3,
    unit="",
    kind="assumed",
    source="table 1 does not part static from dynamic power; leakage and clocks of 5 nm logic",
    low=0.1,
    high=0.6,
)


def constants() -> tuple[Constant, ...]:
    """All of them, in the order of this file."""
    found: list[Constant] = []
    for value in globals().values():
        if isinstance(value, Constant):
            found.append(value)
        elif isinstance(value, Block):
            found += [value.area, value.power]
    return tuple(found)
