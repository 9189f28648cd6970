"""Log-probabilities of many endings of many prompts, in one pass of a model.

Token ids that have the same ids before them are one node of a tree. A node attends to its ancestors
alone and stands as deep as they are many, so that what is computed is what each text would be by
itself, and what texts share is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Tree:
    """Prompts with a common beginning, and the endings of each.

    Attributes:
        size: Nodes.
    """

    def __init__(self, root: Sequence[int]) -> None:
        """Begin with what all prompts begin with: token ids, at least one."""
        self._ids: list[int] = []
        self._parents: list[int] = []
        self._known: dict[tuple[int, int], int] = {}
        self._steps: list[tuple[int, int, int]] = []  # ending, node, the id that follows it
        self._n_endings = 0
        self._root = -1
        for i in root:
            self._root = self._child(self._root, i)

    @property
    def size(self) -> int:
        """Nodes."""
        return len(self._ids)

    def add(self, prompt: Sequence[int], endings: Sequence[Sequence[int]]) -> None:
        """Put a prompt behind the root, and its endings, of at least one id each, behind it."""
        node = self._root
        for i in prompt:
            node = self._child(node, i)
        for ending in endings:
            at = node
            for number, i in enumerate(ending):
                self._steps.append((self._n_endings, at, i))
                if number + 1 < len(ending):
                    at = self._child(at, i)
            self._n_endings += 1

    @torch.no_grad()
    def score(self, model: nn.Module) -> Tensor:
        """Log-probabilities of all endings, in the order in which they were added.

        Args:
            model: A Hugging Face causal LM.
        """
        n = self.size
        loaded: Any = model
        weight = next(model.parameters())
        seen = torch.zeros(n, n, dtype=torch.bool)
        depth = torch.zeros(n, dtype=torch.long)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                seen[node], depth[node] = seen[parent], depth[parent] + 1
            seen[node, node] = True
        hidden = torch.zeros(n, n, dtype=weight.dtype)
        hidden.masked_fill_(~seen, torch.finfo(weight.dtype).min)
        ending, place, following = torch.tensor(self._steps).unbind(1)
        asked, row = place.unique(return_inverse=True)
        logits = loaded(
            input_ids=torch.tensor([self._ids], device=weight.device),
            attention_mask=hidden[None, None].to(weight.device),
            position_ids=depth[None].to(weight.device),
            logits_to_keep=asked.to(weight.device),
            use_cache=False,
        ).logits[0]
        logits = logits.float().cpu()
        chances = logits[row, following] - logits.logsumexp(-1)[row]
        return torch.zeros(self._n_endings).index_add_(0, ending, chances)

    def _child(self, parent: int, i: int) -> int:
        """The node of an id behind a node, made if there is none."""
        node = self._known.get((parent, i))
        if node is None:
            node = self._known[parent, i] = len(self._ids)
            self._ids.append(i)
            self._parents.append(parent)
        return node
