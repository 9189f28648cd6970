"""Hooks around the LM head: where a Plan says so, most logits are what a preview makes of them.

In soft mode the whole head runs, and what a preview saves is charged all the same: training looks
at what levels do to the states, of which the preview is a function that does not learn.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.errors import VesicleError
from vesicle.preview import merged

if TYPE_CHECKING:
    from vesicle.reference.attach import Run


class HeadHooks:
    """What an attached method does to the logits of a pass."""

    def __init__(self, run: Run) -> None:
        """Of a run, which has a preview."""
        self.run = run
        self._keep: Any = 0
        self._words: Tensor | None = None

    def install(self) -> list[Any]:
        """Hook the model, which knows of which positions logits are wanted, and its head."""
        model: Any = self.run.model
        named = list(inspect.signature(model.forward).parameters)
        place = named.index("logits_to_keep") if "logits_to_keep" in named else len(named)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep = args[place] if len(args) > place else kwargs.get("logits_to_keep", 0)

        return [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.get_output_embeddings().register_forward_hook(self.after),
        ]

    def after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Logits (B, n, V) with those of words that are not exact replaced."""
        state, preview = self.run.forward, self.run.method.stand_ins.head
        assert preview is not None
        if self.run.soft is not None:
            return None
        counts = state.column(
            [rows["logits"][:, -1] for rows in state.rows], 0, torch.device("cpu")
        )
        counts = counts[:, self._kept(counts.shape[1])]
        if not counts.any():
            return None
        if counts.shape != output.shape[:2]:
            raise VesicleError(
                f"the LM head ran for {tuple(output.shape[:2])} positions and "
                f"{tuple(counts.shape)} were expected; give logits_to_keep by its name"
            )
        head: Any = module
        if self._words is None:
            with torch.no_grad():
                self._words = preview.words(head.weight)
        previewed = preview.scores(args[0], self._words)
        if getattr(head, "bias", None) is not None:
            previewed = previewed + head.bias
        flat = merged(previewed.flatten(0, 1), output.flatten(0, 1), np.asarray(counts).reshape(-1))
        return flat.view_as(output)

    def _kept(self, n_tokens: int) -> Any:
        """Of which of a pass's positions logits are wanted, as transformers has it."""
        if isinstance(self._keep, Tensor):
            return self._keep.cpu()
        return slice(-self._keep, None) if self._keep else slice(0, n_tokens)
