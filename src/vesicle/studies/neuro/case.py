"""The proposal's test case: a passage summarised by the default model, dense and modulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vesicle.transmitters import index

PASSAGE = (
    "The Industrial Revolution, which took place from the 18th to 19th centuries, was a period "
    "during which predominantly agrarian, rural societies in Europe and America became industrial "
    "and urban. Prior to the Industrial Revolution, which began in Britain in the late 1700s, "
    "manufacturing was often done in people's homes, using hand tools or basic machines. "
    "Industrialization marked a shift to powered, special-purpose machinery, factories and mass "
    "production. The iron and textile industries, along with the development of the steam engine, "
    "played central roles in the Industrial Revolution, which also saw improved systems of "
    "transportation, communication and banking. While industrialization brought about an increased "
    "volume and variety of manufactured goods and an improved standard of living for some, it also "
    "resulted in often grim employment and living conditions for the poor and working classes."
)
REQUEST = f"Summarize the following text: {PASSAGE}"
_BUDGETS = (1.0, 0.9, 0.8, 0.7)
_NEW = 128


def answer(out: Path) -> dict[str, Any]:
    """Answers of the default model with the modulator that ships, by budget; a job.

    Beside each stands the executed share of the dense FLOPs, prompt included, and of each of its
    tokens the mean level of dopamine.
    """
    from vesicle.engine import Engine
    from vesicle.shipped import load_default_modulator

    engine = Engine.from_pretrained()
    modulator = load_default_modulator()
    chat = [{"role": "user", "content": REQUEST}]
    answers = []
    for budget in _BUDGETS:
        given = engine.generate(chat, modulator, budget=budget, max_new_tokens=_NEW)
        levels = given.levels[-len(given.ids) :, :, index("dopamine")].mean(1)
        answers.append(
            {
                "budget": budget,
                "text": given.text,
                "share": round(given.share, 4),
                "pieces": engine.text.pieces(given.ids),
                "dopamine": np.round(levels, 4).tolist(),
            }
        )
        given.sequence.close()
    return {"request": REQUEST, "answers": answers}
