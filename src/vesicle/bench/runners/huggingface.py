"""Hugging Face transformers: `AutoModelForCausalLM` with its own growing cache."""

from __future__ import annotations

from typing import Any

import torch

from vesicle.bench.contenders import Contender
from vesicle.bench.runners.base import Runner
from vesicle.families import cache_argument


class HuggingFaceRunner(Runner):
    """The model in eager mode, greedy steps in a plain loop, as `generate` runs them."""

    def __init__(self, contender: Contender) -> None:
        """Import, and load nothing yet."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(contender.threads)
        self._contender = contender
        self._auto, self._new_cache = transformers.AutoModelForCausalLM, transformers.DynamicCache
        self._cache: Any = None

    def load(self) -> dict[str, Any]:
        """The weights as float32, or as the contender says."""
        dtype = getattr(torch, self._contender.weights or "float32")
        self._model = self._auto.from_pretrained(self._contender.model, dtype=dtype).eval()
        # A step reads one row of an embedding that does not serve as the head as well.
        embedding = self._model.get_input_embeddings().weight
        head = self._model.get_output_embeddings().weight
        total = sum(p.numel() * p.element_size() for p in self._model.parameters())
        if embedding is not head:
            total -= embedding.numel() * embedding.element_size()
        self._weight_bytes = total
        return {"weight_bytes": total, "dtype": str(dtype).removeprefix("torch.")}

    def begin(self, batch: int, length: int) -> None:
        """Make an empty cache, which grows with each pass whatever `batch` and `length` are."""
        self._cache = self._new_cache()
        self._filled = cache_argument(self._model, self._cache)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """All prompts in one pass, logits for the last position only."""
        return self._forward(prompts)

    def step(self, tokens: list[int]) -> list[int]:
        """One pass over all rows."""
        return self._forward([[token] for token in tokens])

    def work(self, steps: int) -> dict[str, Any]:
        """All weights, and the cache as it was halfway through the steps."""
        held = sum(
            tensor.numel() * tensor.element_size()
            for layer in self._cache.layers
            for tensor in (layer.keys, layer.values)
        )
        length = self._cache.get_seq_length()
        return {"step_bytes": self._weight_bytes + held * (length - (steps - 1) / 2) / length}

    @torch.inference_mode()
    def _forward(self, rows: list[list[int]]) -> list[int]:
        out = self._model(
            input_ids=torch.tensor(rows),
            use_cache=True,
            logits_to_keep=1,
            **self._filled,
        )
        likeliest: list[int] = out.logits[:, -1].argmax(-1).tolist()
        return likeliest
