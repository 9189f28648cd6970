"""A byte codec, a text and windows for the tiny models."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.tiny import VOCABULARY
from vesicle.evaluation.execution.executor import Span
from vesicle.evaluation.methods.ledger import Ledger
from vesicle.modulator import Modulator
from vesicle.shapes import ModelShape


class Bytes:
    """One token a byte; 0 is left for padding."""

    def encode(
        self, text: str, *, control_tokens: bool = True, continues: bool = False
    ) -> list[int]:
        return [1 + byte % (VOCABULARY - 1) for byte in text.encode("utf-8")]

    def chat(self, prompt: str, system: str | None = None) -> list[int]:
        return self.encode(f"<{prompt}>")

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(32 + i) for i in ids)


def write_text(path: Path, n: int = 1500, seed: int = 0) -> Path:
    """A file of n random letters."""
    letters = np.random.default_rng(seed).integers(97, 123, n)
    path.write_text("".join(map(chr, letters)), encoding="utf-8")
    return path


def ledger_of(modulator: Modulator, shape: ModelShape, length: int, n: int = 1) -> Ledger:
    """Prices on n windows, all of whose tokens need logits."""
    return Ledger(modulator, shape, [(Span(0, length, 0),)] * n)


def some_windows(n: int = 4, length: int = 64, seed: int = 3) -> Tensor:
    """(n, length) random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (n, length), generator=generator)
