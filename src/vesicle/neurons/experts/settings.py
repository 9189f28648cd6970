"""How large a comparison of experts is: sizes of decoders, texts and steps, at two scales."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vesicle.errors import VesicleError
from vesicle.files import read_json, write_json
from vesicle.neurons.experts.layer import ExpertSize
from vesicle.scratch import DecoderSize, Recipe

TASKS = ("chess", "text")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of all decoders that are compared.

    Attributes:
        task: One of `TASKS`.
        width: D.
        n_layers: L.
        n_heads: H.
        ffn: Hidden units that a token runs, in every decoder but the wide one.
        n_experts: M.
        n_active: k; divides `ffn`.
        gated: Whether FFNs have a gate, as Llama's; else plain ReLU, as the paper's.
        vocabulary: Of the tokenizer that is learnt for text.
        length: Tokens of a text.
        train: Texts to train on.
        test: Texts whose loss is told.
        judged: Texts whose properties are looked for; half choose classifiers, half judge them.
        least: Tokens of each half for which a property must hold.
        steps: Of training.
        more_steps: Of training on, after the conversion.
        batch: Texts of a step.
        learning_rate: At its highest.
        balance: Weight of the balance loss.
        layer: Whose neurons are looked at.
        sae_active: Features of an autoencoder that are active; it has as many features as the
            layers of experts have units.
        sae_steps: Of training one.
        sae_texts: Training texts whose vectors it, and the probe, are trained on.
        seed: Of the games.
    """

    task: str
    width: int
    n_layers: int
    n_heads: int
    ffn: int
    n_experts: int
    n_active: int
    gated: bool
    vocabulary: int
    length: int
    train: int
    test: int
    judged: int
    least: int
    steps: int
    more_steps: int
    batch: int
    learning_rate: float
    balance: float
    layer: int
    sae_active: int
    sae_steps: int
    sae_texts: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what no other part does.

        Raises:
            ValueError: An unknown task, a layer out of range, or units that experts cannot share.
        """
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; allowed: {', '.join(TASKS)}")
        if not 0 <= self.layer < self.n_layers:
            raise ValueError(f"layer is {self.layer}; allowed: 0 to {self.n_layers - 1}")
        if self.ffn % self.n_active:
            raise ValueError(f"ffn is {self.ffn}; allowed: multiples of n_active, {self.n_active}")

    @property
    def experts(self) -> ExpertSize:
        """Of a layer of experts."""
        return ExpertSize(
            width=self.width,
            n_experts=self.n_experts,
            n_active=self.n_active,
            units=self.ffn // self.n_active,
            gated=self.gated,
        )

    def dense(self, units: int) -> ExpertSize:
        """Of a dense FFN: one expert."""
        return replace(self.experts, n_experts=1, n_active=1, units=units)

    def decoder(self, vocabulary: int, ffn: int) -> DecoderSize:
        """Of a decoder."""
        return DecoderSize(
            vocabulary=vocabulary,
            width=self.width,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            ffn=ffn,
            context=self.length,
        )

    def recipe(self, steps: int) -> Recipe:
        """Of training a decoder."""
        return Recipe(steps=steps, learning_rate=self.learning_rate)

    @property
    def steps_of_a_seed(self) -> int:
        """All that are done for one seed: four decoders, one converted, two autoencoders."""
        return 4 * self.steps + self.more_steps + 2 * self.sae_steps


_DEBUG = Settings(
    task="chess",
    width=32,
    n_layers=2,
    n_heads=2,
    ffn=32,
    n_experts=4,
    n_active=2,
    gated=False,
    vocabulary=300,
    length=33,
    train=24,
    test=6,
    judged=12,
    least=2,
    steps=6,
    more_steps=3,
    batch=4,
    learning_rate=2e-3,
    balance=0.01,
    layer=1,
    sae_active=8,
    sae_steps=6,
    sae_texts=8,
)
_SMALL = replace(
    _DEBUG,
    width=128,
    n_layers=4,
    n_heads=4,
    ffn=256,
    n_experts=8,
    vocabulary=1024,
    length=129,
    train=8000,
    test=200,
    judged=480,
    least=40,
    steps=800,
    more_steps=200,
    batch=16,
    layer=2,
    sae_active=32,
    sae_steps=1000,
    sae_texts=800,
)
SCALES = {"debug": _DEBUG, "small": _SMALL}


def settings_of(task: str, scale: str, *, gated: bool = False) -> Settings:
    """Those of a scale.

    Raises:
        ValueError: There is no such task or scale.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; allowed: {', '.join(SCALES)}")
    return replace(SCALES[scale], task=task, gated=gated)


def claim(out: Path, settings: Settings, texts: str) -> dict[str, Any]:
    """Say what a folder is of, or refuse one that is of something else.

    Args:
        out: The folder.
        settings: Of the comparison.
        texts: A digest of its texts.

    Returns:
        What everything in it depends on.

    Raises:
        VesicleError: It was made with other settings or texts, or cannot be written.
    """
    facts = {**asdict(settings), "texts": texts}
    path = out / "settings.json"
    if not path.exists():
        write_json(path, facts)
        return facts
    held = read_json(path)
    for name in sorted(facts.keys() | (held.keys() if isinstance(held, dict) else set())):
        before = held.get(name) if isinstance(held, dict) else None
        if before != facts.get(name):
            raise VesicleError(
                f"{out} holds a comparison whose {name} is {before!r}, not {facts.get(name)!r}: "
                "use another folder, or remove it"
            )
    return facts
