"""Fits the stand-ins: the best low-rank maps from module input to output, by forward passes alone.

For the FFN and the attention of each layer, with x the module's input and y its output over the
tokens of calibration text (means removed, S their covariances):

    W = (S_xx + lambda I)^-1 S_xy                              ridge regression
    V = the r leading eigenvectors of W' (S_xx + lambda I) W   reduced-rank (Izenman 1975)
    down = (W V)',   up = V,   bias = mean y - up down mean x

which is the rank-r map of least ridge loss. lambda is `ridge` times the mean variance of x. The
first position of each window is left out: models park outliers there that would rule the fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.calibration.cache import keep, measurement_key, recall
from vesicle.errors import DataError
from vesicle.families import find_family
from vesicle.files import atomic_path
from vesicle.small_modules import LowRankMaps


@dataclass(frozen=True, kw_only=True)
class StandInErrors:
    """Mean squared error over mean squared output, per layer; skipping outright would give 1.

    Attributes:
        ffn: L numbers.
        attention: L numbers.
    """

    ffn: list[float]
    attention: list[float]


class Moments:
    """Sums over tokens of a module's inputs x and outputs y, enough to regress one on the other."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        """No tokens yet, for x of `inputs` and y of `outputs` numbers."""
        self.n = 0
        self.x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.y = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.yy = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take tokens x (N, inputs) and y (N, outputs)."""
        x, y = x.double(), y.double()
        self.n += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += float(y.square().sum())

    def regress(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Ridge regression: W (inputs, outputs), and the penalised S_xx and S_xy."""
        mean_x, mean_y = self.x / self.n, self.y / self.n
        s_xx = self.xx / self.n - mean_x[:, None] * mean_x
        s_xy = self.xy / self.n - mean_x[:, None] * mean_y
        penalty = ridge * s_xx.diagonal().mean().clamp(min=1e-12)
        s_xx = s_xx + penalty * torch.eye(len(s_xx), dtype=s_xx.dtype, device=s_xx.device)
        return torch.linalg.solve(s_xx, s_xy), s_xx, s_xy

    def low_rank(self, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor, float]:
        """The best map: down (r, inputs), up (outputs, r), bias (outputs,), relative error."""
        w, s_xx, s_xy = self.regress(ridge)
        _, vectors = torch.linalg.eigh(w.T @ s_xx @ w)  # eigenvalues rise
        up = vectors[:, -rank:].flip(-1)
        down = (w @ up).T
        mean_x, mean_y = self.x / self.n, self.y / self.n
        bias = mean_y - up @ (down @ mean_x)
        variance = self.yy / self.n - float(mean_y.square().sum())
        explained = 2 * float((down @ s_xy * up.T).sum()) - float(((down @ s_xx) * down).sum())
        error = max(variance - explained, 0.0) / max(self.yy / self.n, 1e-30)
        return down, up, bias, error


def fit_standins(
    model: nn.Module,
    windows: Tensor,
    ffn: LowRankMaps,
    attention: LowRankMaps,
    *,
    ridge: float = 1e-4,
    cache: Path | None = None,
) -> StandInErrors:
    """Fill stand-ins in place from the dense model's behaviour on text.

    Holds two D x D matrices in fp64 per module: 32 L D^2 bytes in all.

    Args:
        model: A Hugging Face causal LM.
        windows: (N, T) token ids; many more tokens than D.
        ffn: Stand-ins of the FFNs.
        attention: Stand-ins of the attention modules.
        ridge: Penalty, as a share of the input's mean variance.
        cache: Folder that keeps the result.

    Returns:
        Relative errors per layer.

    Raises:
        DataError: There is not one token beyond the first.
    """
    if windows.numel() == 0 or windows.shape[1] < 2:
        raise DataError(f"stand-ins need windows of 2 tokens or more, not {tuple(windows.shape)}")
    settings = {"ffn": ffn.rank, "attention": attention.rank, "ridge": ridge, "kind": "standins"}
    key = measurement_key(model, windows, [], settings)
    kept = recall(cache / "standins.json" if cache else None, key)
    if kept is not None and cache and _load(cache / "standins.safetensors", key, ffn, attention):
        return StandInErrors(**kept)
    moments = collect_moments(model, windows)
    errors: dict[str, list[float]] = {"ffn": [], "attention": []}
    for name, standin in (("ffn", ffn), ("attention", attention)):
        for layer, part in enumerate(moments[name]):
            down, up, bias, error = part.low_rank(standin.rank, ridge)
            with torch.no_grad():
                standin.down[layer].copy_(down)
                standin.up[layer].copy_(up)
                standin.bias[layer].copy_(bias)
            errors[name].append(error)
    result = StandInErrors(**errors)
    if cache:
        _save(cache / "standins.safetensors", key, ffn, attention)
        keep(cache / "standins.json", key, asdict(result))
    return result


def collect_moments(model: nn.Module, windows: Tensor) -> dict[str, list[Moments]]:
    """Moments of every layer's `ffn` and `attention` over windows (N, T), but not position 0."""
    config: Any = model.config
    family = find_family(config)
    width = family.decoder_config(config).shape.width
    device = next(model.parameters()).device
    moments: dict[str, list[Moments]] = {"ffn": [], "attention": []}
    handles = []
    try:
        for layer in family.layers(model):
            modules = family.modules(layer)
            for name, module in (("ffn", modules.ffn), ("attention", modules.attention)):
                part = Moments(width, width, device)
                moments[name].append(part)
                handles.append(module.register_forward_hook(_listen(part), with_kwargs=True))
        with torch.no_grad():
            for window in windows:
                model(window[None].to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _listen(part: Moments) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        y: Tensor = output[0] if isinstance(output, tuple) else output
        part.add(x[:, 1:].flatten(0, 1), y[:, 1:].flatten(0, 1))

    return hook


def _named(ffn: LowRankMaps, attention: LowRankMaps) -> dict[str, Tensor]:
    parts = {"ffn": ffn, "attention": attention}
    return {f"{n}.{k}": t for n, part in parts.items() for k, t in part.state_dict().items()}


def _save(path: Path, key: str, ffn: LowRankMaps, attention: LowRankMaps) -> None:
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in _named(ffn, attention).items()}
    with atomic_path(path) as part:
        save_file(tensors, part, metadata={"key": key})


def _load(path: Path, key: str, ffn: LowRankMaps, attention: LowRankMaps) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return False
            tensors = {name: file.get_tensor(name) for name in _named(ffn, attention)}
    except (OSError, SafetensorError):
        return False
    for name, tensor in _named(ffn, attention).items():
        tensor.copy_(tensors[name])
    return True
