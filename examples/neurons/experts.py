"""An FFN becomes experts: how much is lost when a token runs a part of them, and who should choose?

    python examples/neurons/experts.py --tiny    # a random model, seconds
    python examples/neurons/experts.py           # the default model

Then some experts of each layer become the small FFNs among which a Plan chooses.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vesicle import resolve_model
from vesicle.neurons.experts import (
    Neurons,
    SparsityRouter,
    activations,
    as_small_ffn,
    fit_router,
    mlp_of,
    to_experts,
)

N_EXPERTS, N_ACTIVE = 8, 4

if "--tiny" in sys.argv:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 60, (4, 32))
else:
    from transformers import AutoTokenizer

    folder = resolve_model(None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "The lighthouse stands on a rock. At night its lamp guides ships past the reef. " * 8
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:128]])

# What the FFN of one layer is given on the text.
layer = 1
given: list[torch.Tensor] = []
handle = model.model.layers[layer].mlp.register_forward_pre_hook(
    lambda module, args: given.append(args[0].flatten(0, 1))
)
with torch.no_grad():
    model(ids)
    handle.remove()
    x = given[0][1:]  # models park outliers in the first position
    whole = model.model.layers[layer].mlp(x)

mlp = mlp_of(model, layer)
print(f"{len(mlp.ffn_out)} hidden units in {N_EXPERTS} experts, of which a token runs {N_ACTIVE}")
fitted = to_experts(mlp, N_EXPERTS, N_ACTIVE)
fit_router(fitted, x)
routed = {
    "all run": to_experts(mlp, N_EXPERTS, N_EXPERTS),
    "fitted router": fitted,
    "sparsest": to_experts(
        mlp, N_EXPERTS, N_ACTIVE, SparsityRouter(N_EXPERTS, N_ACTIVE, weighted=False)
    ),
    "densest": to_experts(
        mlp, N_EXPERTS, N_ACTIVE, SparsityRouter(N_EXPERTS, N_ACTIVE, weighted=False, densest=True)
    ),
}
with torch.no_grad():
    for name, experts in routed.items():
        error = (experts(x) - whole).norm() / whole.norm()
        print(f"{name:14} relative error {error:.3f}")

# A Plan's field `ffn` is 2 for the whole FFN, 1 for the experts chosen here, 0 for neither.
layers = [to_experts(mlp_of(model, k), N_EXPERTS, N_ACTIVE) for k in range(len(model.model.layers))]
small = as_small_ffn(layers, [list(range(N_ACTIVE))] * len(layers))
print(f"small FFNs of {small.units} units, {small.weights:,} weights a token and layer")

# And what its neurons are on the text: (tokens, features), for any analysis.
print("neurons:", tuple(activations(Neurons(model, layer), ids).shape))
