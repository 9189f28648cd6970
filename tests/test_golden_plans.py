"""The shipped modulator decides today what it decided when `golden/plans.safetensors` was made.

In fp64, with every transmitter acting on all tokens, where a Plan depends on nothing but the model
and the modulator. `python -m tests.test_golden_plans` makes the file again, which only a change of
what is *meant* to be decided may ask for.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.default_prompts import PROMPTS

GOLDEN = Path(__file__).parent / "golden" / "plans.safetensors"
FIELDS = ("channels", "bits", "ffn", "attention", "kv_blocks", "head", "logits")
BUDGETS = (0.8, 0.6, 0.45)
TOKENS, LONG, WORDS = 16, 200, 16
"""Of a prompt, of the long text at the end (GABA acts from 9 blocks on), and logits kept."""
DIFFERENT = 1e-3
"""Largest share of decisions that another processor's rounding may move. Measured: 0."""

Arrays = dict[str, NDArray[np.generic]]


def made(n_texts: int | None = None) -> Iterator[tuple[str, Arrays]]:
    """What is decided of each of the first texts, and the largest logits behind it at rest."""
    from vesicle import load_default_modulator
    from vesicle.engine import Engine
    from vesicle.phases import EVERYWHERE

    engine = Engine.from_pretrained(weights="fp64", kv="fp64")
    modulator = load_default_modulator()
    texts = [engine.encode([{"role": "user", "content": p}])[-TOKENS:] for p in PROMPTS]
    texts.append(engine.encode(" ".join(PROMPTS))[:LONG])
    for i, ids in enumerate(texts[:n_texts]):
        sequence = engine.start(modulator, BUDGETS[i % len(BUDGETS)], phases=EVERYWHERE)
        engine.forward([(sequence, ids[:-2])], "none")
        for token in ids[-2:]:
            engine.forward([(sequence, [token])])
        [logits] = engine.forward([(engine.start(), ids)])
        best = logits[0].topk(WORDS)
        plan = {name: getattr(sequence.plan, name).astype(np.int16) for name in FIELDS}
        yield (
            f"{i:02}",
            {**plan, "words": best.indices.numpy(), "logits": best.values.numpy()},
        )


@pytest.mark.model
@pytest.mark.parametrize("n_texts", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_plans_and_logits_are_those_of_before(n_texts: int | None):
    from safetensors.numpy import load_file

    golden = load_file(GOLDEN)
    for name, arrays in made(n_texts):
        for field in FIELDS:
            before, now = golden[f"{name}.{field}"], arrays[field]
            assert before.shape == now.shape
            assert np.mean(before != now) <= DIFFERENT, (name, field)
        np.testing.assert_array_equal(golden[f"{name}.words"], arrays["words"])
        np.testing.assert_allclose(golden[f"{name}.logits"], arrays["logits"], atol=1e-9)


if __name__ == "__main__":
    from safetensors.numpy import save_file

    found = {f"{name}.{field}": a for name, arrays in made() for field, a in arrays.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in found.items()}, GOLDEN)
