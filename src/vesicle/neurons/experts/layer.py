"""The MoE-X feed-forward layer: M small experts, of which a token runs k, as one sparse wide MLP.

After "Mixture of Experts Made Intrinsically Interpretable" (Yang et al. 2025). With gates g of a
router, 0 for experts that were not chosen,

    y = Σ_j g_j act(x A_j) B_j                             experts one by one: what is executed
      = [g_1 act(x A_1), ..., g_M act(x A_M)] [B_1; ...; B_M]     one MLP with M F hidden units

so that a layer of experts is an MLP of M F units, most of which are 0: those of experts that were
not chosen, and of the chosen ones those that ReLU cuts. Its neurons are these M F units. Experts
may be gated, act(x A_j) * (x U_j), as Llama's FFN is. An MLP is a layer with one expert.

Not reproduced: biases and GELU, which the paper's GPT-2 has; kernels that group tokens by expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vesicle.activations import ACTIVATIONS, hidden_units
from vesicle.neurons.experts.routing import Router, TopKRouter


@dataclass(frozen=True, kw_only=True)
class ExpertSize:
    """Sizes and form of a layer of experts.

    Attributes:
        width: D.
        n_experts: M.
        n_active: k, of which each token runs so many.
        units: F, hidden units of one expert.
        activation: By its name in `activations.ACTIVATIONS`.
        gated: Whether hidden units are multiplied by a second projection.
    """

    width: int
    n_experts: int
    n_active: int
    units: int
    activation: str = "relu"
    gated: bool = False

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            ValueError: A size is out of range, or the activation is unknown.
        """
        for name in ("width", "n_experts", "n_active", "units"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 and above")
        if self.n_active > self.n_experts:
            raise ValueError(f"n_active is {self.n_active}; allowed: 1 to {self.n_experts}")
        if self.activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation is {self.activation!r}; allowed: {allowed}")

    @property
    def active_units(self) -> int:
        """Hidden units that a token runs, k F: what it costs."""
        return self.n_active * self.units

    @property
    def all_units(self) -> int:
        """Hidden units of all experts, M F: the neurons of the layer."""
        return self.n_experts * self.units

    @property
    def columns(self) -> int:
        """Columns of an expert's input projection: F, or 2 F with a gate."""
        return 2 * self.units if self.gated else self.units


class ExpertFfn(nn.Module):
    """Experts and their router, called as the FFN that they replace is.

    Attributes:
        size: Of it.
        router: Who chooses.
        ffn_in: (M, D, F), or (M, D, 2 F) with the columns of the gate first.
        ffn_out: (M, F, D).
    """

    def __init__(self, size: ExpertSize, router: Router | None = None, spread: float = 0.02):
        """Weights drawn from N(0, spread).

        Args:
            size: Of it.
            router: Who chooses; learnt scores if not given.
            spread: Of the weights.
        """
        super().__init__()
        self.size = size
        shape = (size.n_experts, size.width, size.columns)
        self.ffn_in = nn.Parameter(torch.randn(shape) * spread)
        self.ffn_out = nn.Parameter(torch.randn(size.n_experts, size.units, size.width) * spread)
        self.router = router or TopKRouter(size.width, size.n_experts, size.n_active)

    @property
    def encoders(self) -> Tensor:
        """(M, D, F) the weights on which it depends whether units are active."""
        return self.ffn_in[..., : self.size.units]

    def expert(self, number: int, x: Tensor) -> Tensor:
        """What one expert gives for x (N, D), without its gate."""
        inner = x @ self.ffn_in[number]
        return hidden_units(inner, self.size.activation, self.size.gated) @ self.ffn_out[number]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D); an expert sees the tokens that take it alone."""
        flat = x.reshape(-1, self.size.width)
        routing = self.router(flat, self.encoders)
        result = torch.zeros_like(flat)
        for number in range(self.size.n_experts):
            rows, places = (routing.chosen == number).nonzero(as_tuple=True)
            if len(rows):
                given = self.expert(number, flat[rows]) * routing.gates[rows, places, None]
                result.index_add_(0, rows, given)
        return result.view_as(x)

    def as_wide_mlp(self) -> WideMlp:
        """The same function as one sparse MLP of M F units; its weights are copies."""
        return WideMlp(self)


class WideMlp(nn.Module):
    """A layer of experts as one MLP, which computes the units of all experts.

    Attributes:
        ffn_in: (D, M F), or (D, 2 M F) with the columns of all gates first.
        ffn_out: (M F, D).
    """

    def __init__(self, layer: ExpertFfn) -> None:
        """Join the experts of a layer, in their order."""
        super().__init__()
        self.size, self.router = layer.size, layer.router
        halves = layer.ffn_in.detach().split(self.size.units, dim=2)
        wide = [half.transpose(0, 1).flatten(1) for half in halves]  # (D, M F) each
        self.ffn_in = nn.Parameter(torch.cat(wide, 1), requires_grad=False)
        self.ffn_out = nn.Parameter(layer.ffn_out.detach().flatten(0, 1), requires_grad=False)
        self._encoders = layer.encoders.detach()

    def hidden(self, x: Tensor) -> Tensor:
        """(..., M F) hidden units times the gates of their experts: the layer's neurons."""
        flat = x.reshape(-1, self.size.width)
        gates = self.router(flat, self._encoders).all_gates.repeat_interleave(self.size.units, 1)
        units = hidden_units(flat @ self.ffn_in, self.size.activation, self.size.gated)
        return (units * gates).view(*x.shape[:-1], self.size.all_units)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.hidden(x) @ self.ffn_out
