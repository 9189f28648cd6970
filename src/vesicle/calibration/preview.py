"""Fits the LM head's preview: the directions that tell words apart, in a model's own states.

With C the second moment of the states that enter the head and W its rows, the k directions that
leave the least squared error of all logits W x are the first of

    C^(1/2) W'W C^(1/2) = Q diag(s) Q',     down = Q_k' C^(-1/2),     up = C^(1/2) Q_k

(best approximation of W C^(1/2) of rank k, Eckart and Young 1936). `down x` then has unit variance
in each direction, so that eight bits hold all of them equally well. A small multiple of the
identity is added to C, for directions that the text never takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vesicle.errors import DataError
from vesicle.preview import HeadPreview

_RIDGE = 1e-3
"""Of the mean variance, added to that of every direction."""


@torch.no_grad()
def fit_preview(model: nn.Module, windows: Tensor, rank: int) -> HeadPreview:
    """The preview of rank k that foretells a model's logits best.

    Args:
        model: A Hugging Face causal LM.
        windows: (N, T) token ids of text, of as many tokens as the model is wide or more.
        rank: K.

    Raises:
        DataError: If there are fewer tokens than that.
        ValueError: If `rank` is not between 1 and the model's width.
    """
    whole: Any = model
    head = whole.get_output_embeddings().weight
    width = head.shape[1]
    preview = HeadPreview(rank, width)
    if windows.numel() < width:
        raise DataError(
            f"the text has {windows.numel()} tokens; a preview of a model of width {width} takes "
            f"{width} at least"
        )
    moment = torch.zeros(width, width, dtype=torch.float64)
    for window in windows:
        states = whole.base_model(window[None].to(head.device), use_cache=False).last_hidden_state
        states = states[0].float()
        moment += (states.T @ states).double().cpu()
    moment /= windows.numel()
    moment += _RIDGE * moment.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    words = torch.zeros(width, width, dtype=torch.float64)
    for part in head.split(1 << 14):
        words += (part.float().T @ part.float()).double().cpu()
    variances, basis = torch.linalg.eigh(moment)
    root = (basis * variances.sqrt()) @ basis.T
    inverse = (basis * variances.rsqrt()) @ basis.T
    directions = torch.linalg.eigh(root @ words @ root).eigenvectors.flip(1)[:, :rank]
    # In the type in which a modulator is saved, so that saving changes nothing.
    preview.down.copy_((directions.T @ inverse).half().float())
    preview.up.copy_((root @ directions).half().float())
    return preview
