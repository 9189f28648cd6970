"""MoE-X (Yang et al. 2025): experts as one sparse wide MLP, and what their neurons know."""

from vesicle.neurons.experts.autoencoder import Autoencoder, fit_autoencoder
from vesicle.neurons.experts.conversion import (
    Mlp,
    as_small_ffn,
    fit_router,
    mlp_of,
    restricted,
    to_experts,
)
from vesicle.neurons.experts.coverage import Found, Properties, find
from vesicle.neurons.experts.decoder import new_experts_decoder, training_loss
from vesicle.neurons.experts.features import Dictionary, Inputs, Neurons, Reader, activations
from vesicle.neurons.experts.layer import ExpertFfn, ExpertSize, WideMlp
from vesicle.neurons.experts.routing import (
    FixedRouter,
    Routing,
    SparsityRouter,
    TopKRouter,
    active_probability,
    balance_loss,
)

__all__ = [
    "Autoencoder",
    "Dictionary",
    "ExpertFfn",
    "ExpertSize",
    "FixedRouter",
    "Found",
    "Inputs",
    "Mlp",
    "Neurons",
    "Properties",
    "Reader",
    "Routing",
    "SparsityRouter",
    "TopKRouter",
    "WideMlp",
    "activations",
    "active_probability",
    "as_small_ffn",
    "balance_loss",
    "find",
    "fit_autoencoder",
    "fit_router",
    "mlp_of",
    "new_experts_decoder",
    "restricted",
    "to_experts",
    "training_loss",
]
