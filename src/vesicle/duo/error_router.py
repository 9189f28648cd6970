"""A router for pretrained models: FFNs are small where the small one is predicted to err least.

With x the normed input of an FFN, y what it adds, r the residual stream after it,

    log (|small(x) - y|² / |r|²)  ~  w_l x + b_l

by ridge regression, layer by layer, from forward passes alone. A token's FFN in a layer is small
where the prediction lies under a threshold, one for all layers and tokens, by which so many FFNs
are small on average as are asked for. It needs no label and no gradient, and sees nothing but the
input that the FFN reads anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vesicle.duo.ffn_inputs import Seen, watched
from vesicle.duo.module import Chooser
from vesicle.errors import DataError, VesicleError
from vesicle.plan import FFN_BIG, FFN_SMALL
from vesicle.small_modules import SmallModule


@dataclass(frozen=True, kw_only=True)
class ErrorRouter:
    """Predictions of L layers, and what they were on the text that they were fitted to.

    Attributes:
        weight: (L, D).
        bias: (L,).
        seen: (n,) predictions of tokens and layers together, rising.
        explained: (L,) share of the variance of log errors, on that text.
    """

    weight: Tensor
    bias: Tensor
    seen: Tensor
    explained: Tensor

    def predicted(self, layer: int, x: Tensor) -> Tensor:
        """(...) log of the error in a layer, for normed inputs x (..., D)."""
        return x @ self.weight[layer] + self.bias[layer]

    def chooser(self, n_small: float) -> Chooser:
        """Who has so many FFNs of a token small on average; the first token of a text stays big.

        Raises:
            VesicleError: It is not from 0 to the number of layers.
        """
        n_layers = len(self.bias)
        if not 0 <= n_small <= n_layers:
            raise VesicleError(f"{n_small} small FFNs; allowed: 0 to {n_layers}, the layers")
        place = round(n_small / n_layers * len(self.seen))
        infinite = self.seen.new_tensor([torch.inf])
        threshold = torch.cat([self.seen, infinite])[place]

        def choose(layer: int, x: Tensor) -> Tensor:
            chosen = torch.where(self.predicted(layer, x) < threshold, FFN_SMALL, FFN_BIG)
            chosen[..., 0] = FFN_BIG  # what later tokens lean on without need
            return chosen

        return choose


@torch.no_grad()
def fit_error_router(
    model: nn.Module, small: SmallModule, windows: Tensor, ridge: float = 1e-2
) -> ErrorRouter:
    """Fit a router.

    Args:
        model: A Hugging Face causal LM, as it is; before small modules are put beside its FFNs.
        small: Its small modules.
        windows: (N, T) token ids.
        ridge: Penalty, as a share of the inputs' mean square.

    Raises:
        DataError: There is not one token beyond the first of a window.
    """
    if windows.numel() == 0 or windows.shape[1] < 2:
        raise DataError(f"a router needs windows of 2 tokens or more, not {tuple(windows.shape)}")
    inputs, errors = [], []
    with watched(model) as read:
        for window in windows:
            seen = read(window[None])
            inputs.append(torch.stack([s.x.float() for s in seen]))
            errors.append(torch.stack([_log_error(small, n, s) for n, s in enumerate(seen)]))
    x, y = torch.cat(inputs, dim=1), torch.cat(errors, dim=1)  # (L, n, D), (L, n)
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    weight = torch.stack(
        [
            _ridge((own - mean).double(), (value - m).double(), ridge)
            for own, mean, value, m in zip(x, mean_x, y, mean_y, strict=True)
        ]
    )
    bias = mean_y[:, 0] - (mean_x[:, 0] * weight).sum(-1)
    predicted = torch.einsum("lnd,ld->ln", x, weight) + bias[:, None]
    left = (y - predicted).square().mean(1) / (y - mean_y).square().mean(1).clamp_min(1e-12)
    return ErrorRouter(
        weight=weight, bias=bias, seen=predicted.flatten().sort().values, explained=1 - left
    )


def _log_error(small: SmallModule, layer: int, seen: Seen) -> Tensor:
    off = (small.apply_layer(layer, seen.x) - seen.y).float().square().sum(-1)
    return (off * seen.weight[:, 0].float()).clamp_min(1e-12).log()


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """(D,) of centred x (n, D) and y (n,)."""
    square = x.T @ x
    penalty = ridge * square.diagonal().mean().clamp_min(1e-12)
    square.diagonal().add_(penalty)
    return torch.linalg.solve(square, x.T @ y).float()
