"""How language neurons are found and judged."""

from __future__ import annotations

from dataclasses import dataclass

from vesicle.errors import DataError


@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """Settings of an analysis.

    Attributes:
        sentences: By which neurons are found.
        judged: Others, by which lesions are judged; 0 for no lesions.
        share: Of the model's neurons that are selected.
        seeds: Draws of random neurons.
        chunks: In which sentences are drawn again for intervals.
        draws: How often.
    """

    sentences: int = 100
    judged: int = 6
    share: float = 0.01
    seeds: int = 3
    chunks: int = 20
    draws: int = 100

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            DataError: Naming the setting and what is allowed.
        """
        for name, value, least in (
            ("--sentences", self.sentences, 4),
            ("--judged", self.judged, 0),
            ("--seeds", self.seeds, 1),
            ("chunks", self.chunks, 2),
            ("draws", self.draws, 1),
        ):
            if value < least:
                raise DataError(f"{name} is {value}; allowed: {least} and above")
        if not 0 < self.share <= 0.2:
            raise DataError(f"--share is {self.share:g}; allowed: above 0, up to 0.2")
