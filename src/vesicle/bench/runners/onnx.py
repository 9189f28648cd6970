"""ONNX Runtime GenAI on the model as its own builder converts it: weights in 4 bits, once, cached.

Its 4 bits are symmetric and hold the LM head as well, so it is not quite the same model. Threads
are given; all else is left at its defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from vesicle.bench.contenders import Contender
from vesicle.bench.runners.base import Runner
from vesicle.errors import ModelError, VesicleError

_CACHE_BYTES = 4
"""Of a cached number: the CPU's graph keeps 32-bit floats."""


class OnnxRunner(Runner):
    """A model, and a generator that is made anew for each prompt."""

    def __init__(self, contender: Contender) -> None:
        """Load nothing yet."""
        self._contender = contender
        self._generator: Any = None
        self._filled = 0

    def load(self) -> dict[str, Any]:
        """The converted weights.

        Raises:
            ModelError: ONNX Runtime cannot read them.
        """
        folder = Path(self._contender.model)
        settings = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": self._contender.threads}
        settings.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        try:
            self._model = onnxruntime_genai.Model(settings)
        except Exception as error:  # of its own kinds, which it does not name
            line = " ".join(str(error).split())
            raise ModelError(f"ONNX Runtime cannot load {folder.name}: {line}") from error
        sizes = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        decoder = sizes["model"]["decoder"]
        self._kv_bytes = 2 * _CACHE_BYTES * decoder["num_hidden_layers"]
        self._kv_bytes *= decoder["num_key_value_heads"] * decoder["head_size"]
        self._weight_bytes = sum(p.stat().st_size for p in folder.glob("model.onnx*"))
        return {
            "weight_bytes": self._weight_bytes,
            "description": f"ONNX Runtime GenAI {onnxruntime_genai.__version__}",
        }

    def begin(self, batch: int, length: int) -> None:
        """A generator with room for the sequence.

        Raises:
            VesicleError: More than one: their tokens cannot be fed to it after the prompts.
        """
        if batch > 1:
            raise VesicleError(f"takes one sequence at a time here, not {batch}")
        self._generator = None  # its memory goes before the next one's comes
        settings = onnxruntime_genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=length + 1, do_sample=False)
        self._generator = onnxruntime_genai.Generator(self._model, settings)
        self._filled = 0

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """The prompt in one call."""
        return self._feed(prompts)

    def step(self, tokens: list[int]) -> list[int]:
        """A token of the sequence."""
        return self._feed([[token] for token in tokens])

    def work(self, steps: int) -> dict[str, Any]:
        """The file, and the cache as it was halfway through the steps."""
        held = self._filled - (steps - 1) / 2
        return {"step_bytes": self._weight_bytes + held * self._kv_bytes}

    def _feed(self, rows: list[list[int]]) -> list[int]:
        self._generator.append_tokens(np.array(rows, np.int32))
        self._filled += len(rows[0])
        likeliest: list[int] = self._generator.get_logits()[:, -1].argmax(-1).tolist()
        return likeliest
