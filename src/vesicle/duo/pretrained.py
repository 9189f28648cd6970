"""A pretrained model as a duo model: its own FFNs are the big ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vesicle.duo.module import Choices, DuoFeedForward
from vesicle.errors import ModelError, VesicleError
from vesicle.small_modules import SmallModule

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class StandsIn(nn.Module):
    """A small module of one layer, called as the FFN that it replaces is."""

    def __init__(self, small: SmallModule, layer: int) -> None:
        super().__init__()
        self._of = small, layer  # not a child: all layers share one

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        small, layer = self._of
        return small.apply_layer(layer, x)


def make_duo_of(model: LlamaForCausalLM, small: SmallModule) -> Choices:
    """Put small modules beside the FFNs of a pretrained model, in place.

    Args:
        model: A Llama, which `Context` can read.
        small: Of all its layers.

    Returns:
        By whom all layers' choices are set.

    Raises:
        ModelError: The model is no Llama.
        VesicleError: The small modules are of another model, or it has some already.
    """
    config: Any = model.config
    if config.model_type != "llama":
        raise ModelError(
            f"patterns are searched in models of type 'llama'; this one is {config.model_type!r}"
        )
    layers: list[Any] = list(model.model.layers)
    small.check(len(layers), int(config.hidden_size))
    choices = Choices()
    for number, layer in enumerate(layers):
        if isinstance(layer.mlp, DuoFeedForward):
            raise VesicleError("the model has small FFNs already")
        layer.mlp = DuoFeedForward(layer.mlp, StandsIn(small, number), choices, number)
    return choices
