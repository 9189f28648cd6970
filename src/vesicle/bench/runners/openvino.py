"""OpenVINO GenAI on the same GGUF file, in its pipeline of continuous batching.

That pipeline advances all requests by a step when it is told to, so that steps can be timed one by
one. It feeds itself what it says, where the others are fed a text: the work is the same. Threads
are given; all else is left at OpenVINO's defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from vesicle.bench.contenders import Contender
from vesicle.bench.runners.base import Runner
from vesicle.errors import ModelError
from vesicle.models.gguf_header import read_gguf_header


class OpenVinoRunner(Runner):
    """A pipeline, and the requests of one batch at a time."""

    def __init__(self, contender: Contender) -> None:
        """Load nothing yet."""
        self._contender = contender
        self._handles: list[Any] = []
        self._written: list[list[int]] = []
        self._length = 0

    def load(self) -> dict[str, Any]:
        """Build a graph from the file and compile it.

        Raises:
            ModelError: OpenVINO cannot read it.
        """
        path = self._contender.model
        try:
            self._pipeline = openvino_genai.ContinuousBatchingPipeline(
                path,
                openvino_genai.SchedulerConfig(),
                "CPU",
                {"INFERENCE_NUM_THREADS": self._contender.threads},
            )
        except RuntimeError as error:
            raise ModelError(
                f"OpenVINO cannot load {path}: {' '.join(str(error).split())}"
            ) from error
        tensors = read_gguf_header(Path(path)).tensors
        self._weight_bytes = sum(t.n_bytes for t in tensors.values())
        return {
            "weight_bytes": self._weight_bytes,
            "description": f"OpenVINO {openvino.__version__}",
            "note": "bytes are those of the file; what it is turned into may be larger",
        }

    def begin(self, batch: int, length: int) -> None:
        """Let go of earlier requests, which have written all that they were asked for by now."""
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._handles, self._written = [], [[] for _ in range(batch)]
        self._length = length

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """As many steps as the first tokens take; it cuts prompts up itself."""
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = self._length - len(prompts[0])
        settings.ignore_eos, settings.do_sample = True, False
        self._handles = [
            self._pipeline.add_request(row, openvino.Tensor(np.array([prompt])), settings)
            for row, prompt in enumerate(prompts)
        ]
        return self._advance(1)

    def step(self, tokens: list[int]) -> list[int]:
        """A token of each request, after what it said itself."""
        return self._advance(len(self._written[0]) + 1)

    def work(self, steps: int) -> dict[str, Any]:
        """The file's tensors; what its cache takes is not told."""
        return {"step_bytes": float(self._weight_bytes)}

    def _advance(self, to: int) -> list[int]:
        """Step until each request has written `to` tokens; the last of each."""
        while any(len(written) < to for written in self._written):
            self._pipeline.step()
            for handle, written in zip(self._handles, self._written, strict=True):
                while handle.can_read():
                    for found in handle.read().values():
                        written += found.generated_ids
        return [written[to - 1] for written in self._written]
