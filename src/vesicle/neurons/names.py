"""Names of what can be read and edited inside a model, in TransformerLens's style.

`blocks.3.mlp.hook_post` is the output of layer 3's hidden units, which we call its neurons. Besides
activations, levels (`blocks.3.hook_levels`) and the decisions of a Plan (`blocks.3.plan.channels`)
have names, so that a transmitter is read, clamped and lesioned like a neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from vesicle.errors import VesicleError
from vesicle.plan import FIELDS

if TYPE_CHECKING:
    from torch import nn

    from vesicle.families.base import Family

LEVELS = "hook_levels"
PLAN = "plan."
PATTERN = "attn.hook_pattern"
MEANINGS = {
    "hook_embed": "(B, T, D) embeddings, scaled as the model scales them",
    "hook_resid_pre": "(B, T, D) the residual stream that enters the layer",
    "ln1.hook_normalized": "(B, T, D) what attention reads, after its norm",
    "attn.hook_q": "(B, T, H K) queries, before norms and rotary phases",
    "attn.hook_k": "(B, T, G K) keys, likewise",
    "attn.hook_v": "(B, T, G K) values",
    PATTERN: "(B, H, T, S) attention of each query; can be read and not edited",
    "attn.hook_z": "(B, T, H K) values mixed by each head",
    "hook_attn_out": "(B, T, D) what attention adds to the residual stream",
    "hook_resid_mid": "(B, T, D) the residual stream after attention",
    "ln2.hook_normalized": "(B, T, D) what the FFN reads, after its norm",
    "mlp.hook_pre": "(B, T, F) hidden units before the activation: of a gated FFN, its gate",
    "mlp.hook_pre_linear": "(B, T, F) what the gate multiplies (up projection)",
    "mlp.hook_post": "(B, T, F) the neurons: what goes into the down projection",
    "hook_mlp_out": "(B, T, D) what the FFN adds to the residual stream",
    "hook_resid_post": "(B, T, D) the residual stream that leaves the layer",
    LEVELS: "(B, T, 5) levels that the layer released",
    "ln_final.hook_normalized": "(B, T, D) what the LM head reads",
}
"""What each name, without its layer, stands for."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where an activation is found in a Hugging Face model.

    Attributes:
        module: Whose input or output it is.
        side: Which of the two.
    """

    module: nn.Module
    side: Literal["input", "output"]


def points(model: Any, family: Family, *, parallel: bool) -> dict[str, Point]:
    """All activations of a model by name, in the order in which they are computed.

    Args:
        model: A Hugging Face causal LM.
        family: Of it.
        parallel: Whether attention and FFN read the same residual stream, so that nothing stands
            between them.
    """
    found = {"hook_embed": Point(module=model.get_input_embeddings(), side="output")}
    for number, layer in enumerate(family.layers(model)):
        m = family.modules(layer)
        own = {
            "hook_resid_pre": Point(module=layer, side="input"),
            "ln1.hook_normalized": Point(module=m.attention, side="input"),
        }
        if len(m.query_key_value) == 3:
            for letter, linear in zip("qkv", m.query_key_value, strict=True):
                own[f"attn.hook_{letter}"] = Point(module=linear, side="output")
        own[PATTERN] = Point(module=m.attention, side="output")
        own["attn.hook_z"] = Point(module=m.out, side="input")
        own["hook_attn_out"] = Point(module=m.attention_end, side="output")
        if not parallel:
            own["hook_resid_mid"] = Point(module=m.ffn_norm, side="input")
        own["ln2.hook_normalized"] = Point(module=m.ffn, side="input")
        own["mlp.hook_pre"] = Point(module=m.ffn_in[0], side="output")
        if len(m.ffn_in) == 2:
            own["mlp.hook_pre_linear"] = Point(module=m.ffn_in[1], side="output")
        own["mlp.hook_post"] = Point(module=m.ffn_out, side="input")
        own["hook_mlp_out"] = Point(module=m.ffn_end, side="output")
        own["hook_resid_post"] = Point(module=layer, side="output")
        found |= {f"blocks.{number}.{name}": point for name, point in own.items()}
    found["ln_final.hook_normalized"] = Point(module=model.get_output_embeddings(), side="input")
    return found


def decision_names(n_layers: int, *, levels: bool) -> list[str]:
    """Names of what a method decides, layer by layer.

    Args:
        n_layers: L.
        levels: Whether it releases any.
    """
    own = [LEVELS] if levels else []
    own += [PLAN + field.name for field in FIELDS]
    return [f"blocks.{layer}.{name}" for layer in range(n_layers) for name in own]


def split(name: str) -> tuple[int | None, str]:
    """A name's layer, None if it is of none, and the rest of it."""
    head, _, rest = name.partition(".")
    number, _, own = rest.partition(".")
    return (int(number), own) if head == "blocks" and number.isdecimal() else (None, name)


def decides(name: str) -> bool:
    """Whether a name is of a level or of a decision."""
    own = split(name)[1]
    return own == LEVELS or own.startswith(PLAN)


def matching(patterns: Iterable[str], known: Sequence[str]) -> list[str]:
    """Known names that patterns such as `blocks.*.mlp.hook_post` ask for, in the known order.

    Raises:
        VesicleError: Naming a pattern that asks for none of them, and what is allowed.
    """
    chosen = set[str]()
    for pattern in patterns:
        own = [name for name in known if fnmatchcase(name, pattern)]
        if not own:
            raise VesicleError(f"there is no {pattern!r} in this model; allowed: {_told(known)}")
        chosen.update(own)
    return [name for name in known if name in chosen]


def _told(known: Sequence[str]) -> str:
    """Known names, those of all layers once."""
    layers = [layer for layer, _ in map(split, known) if layer is not None]
    last = max(layers, default=0)
    own = dict.fromkeys(
        name if layer is None else f"blocks.N.{rest}"
        for name in known
        for layer, rest in [split(name)]
    )
    return f"{', '.join(own)}, N from 0 to {last}"
