"""What `evolve` is told."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = ("profile", "network", "both")
BEGINNINGS = ("as-is", "ablation", "repetition", "decay")


@dataclass(frozen=True, kw_only=True)
class EvolveConfig:
    """Settings of a run of evolution.

    Attributes:
        evolves: `profile` (how much each KV head holds), `network` (what of it) or `both`.
        begin: What a profile begins at: `as-is`, at what is lost where each KV head alone
            forgets (`ablation`), or with gates at what is needed to repeat a text and to go on with
            it (`repetition`) or at what decays that were trained by gradient leave (`decay`).
        memory: Shares of the cache at which candidates are tried, by turns.
        generations: How many; 0 leaves it at the beginning.
        population: Candidates in each; the paper has 32.
        contexts: Of the training contexts that a generation is tried on, drawn anew each time.
        sigma: First step, in units of `networks.spread_of` and of the profile; the paper has 0.065.
        held_out_every: Generations between scores of the mean on held-out contexts.
        most_excess: Nats a token above the full cache's loss beyond which a context is given up:
            so one that is lost does not outweigh the others.
        seed: Of candidates and contexts.

    Raises:
        ValueError: If one is outside what is allowed.
    """

    evolves: str = "both"
    begin: str = "as-is"
    memory: tuple[float, ...] = (0.25,)
    generations: int = 60
    population: int = 16
    contexts: int = 6
    sigma: float = 0.3
    held_out_every: int = 5
    most_excess: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check each."""
        if self.evolves not in PARTS:
            raise ValueError(f"evolves is {self.evolves!r}; allowed: {', '.join(PARTS)}")
        if self.begin not in BEGINNINGS:
            raise ValueError(f"begin is {self.begin!r}; allowed: {', '.join(BEGINNINGS)}")
        if self.begin == "ablation" and self.evolves == "network":
            raise ValueError("begin 'ablation' is for a profile, and evolves is 'network'")
        if not self.memory or not all(0 < share < 1 for share in self.memory):
            raise ValueError(f"memory is {list(self.memory)}; allowed: between 0 and 1")
        least = {"generations": 0, "population": 4, "contexts": 1, "held_out_every": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {bound} and above")
        for name in ("sigma", "most_excess"):
            if not 0 < getattr(self, name) < 1000:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: above 0")
