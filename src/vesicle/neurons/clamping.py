"""Does a neuron do what its weights say? Clamp it, and see what becomes of its token.

A neuron whose down-projection decodes to a token (`decoding`) is held, at the last token of
prompts, at a multiple of the largest value that it has in ordinary text, the way that its weights
call for; the logarithm of that token's probability rises by so much. Beside it stand neurons drawn
at random from the same layers, held in the same way and judged by their own tokens, and the same
clamps judged by *another* neuron's token, which tells whether anything is said about this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import VesicleError
from vesicle.intervals import interval
from vesicle.neurons.decoding.tokens import Decoded
from vesicle.neurons.edits import clamp
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron

if TYPE_CHECKING:
    from vesicle.models import Text

NAMES = {
    "gate": "mlp.hook_pre",
    "up": "mlp.hook_pre_linear",
    "down": "mlp.hook_post",
}
"""What is held of a neuron decoded by a projection: what that gives, or what `down` reads."""


@dataclass(frozen=True, kw_only=True)
class Clamped:
    """A neuron that was held.

    Attributes:
        layer: l.
        index: Of the neuron in its layer.
        token: The id that it decodes to.
        score: As `Decoded.best` has it.
        value: At which it was held.
        nats: By how much the log probability of its token rose, over prompts.
        other: The same of another neuron's token.
    """

    layer: int
    index: int
    token: int
    score: float
    value: float
    nats: float
    other: float


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What clamping does to tokens that neurons decode to.

    Attributes:
        kind: The projection by which they were decoded.
        strength: Times the largest value in ordinary text.
        specialised: The neurons with the highest scores.
        random: As many of the same layers.
    """

    kind: str
    strength: float
    specialised: tuple[Clamped, ...]
    random: tuple[Clamped, ...]

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals over neurons, and of the differences."""
        own = np.array([one.nats for one in self.specialised])
        other = np.array([one.other for one in self.specialised])
        chance = np.array([one.nats for one in self.random])
        found: dict[str, Any] = {"kind": self.kind, "strength": self.strength, "neurons": len(own)}
        for name, values in (
            ("specialised", own),
            ("random", chance),
            ("other_token", other),
            # Neurons are paired by layer.
            ("above_random", own - chance),
            ("above_other_token", own - other),
            # What a gate or an up projection reads does not tell which way the neuron pushes.
            ("specialised_size", np.abs(own)),
            ("random_size", np.abs(chance)),
            ("size_above_random", np.abs(own) - np.abs(chance)),
        ):
            low, high = interval(values)
            found[name] = {"mean": float(values.mean()), "low": low, "high": high}
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.summary(),
            "clamped": {
                name: [asdict(one) for one in getattr(self, name)]
                for name in ("specialised", "random")
            },
        }


@torch.no_grad()
def largest_values(hooked: Hooked, texts: Tensor, kind: str) -> Tensor:
    """(L, F) the largest magnitude that each neuron has in texts (N, T)."""
    name = f"blocks.*.{NAMES[kind]}"
    most: Tensor | None = None
    for text in texts:
        seen = hooked.run(text[None], read=[name])
        own = torch.stack([x[0].abs().amax(0) for x in seen.activations.values()])
        most = own if most is None else torch.maximum(most, own)
    if most is None:
        raise VesicleError("there are no texts; allowed: 1 and more")
    return most


def clamp_specialised(
    hooked: Hooked,
    decoded: Decoded,
    kind: str,
    prompts: Tensor,
    most: Tensor,
    *,
    count: int = 50,
    strength: float = 2.0,
    seed: int = 0,
    show: Callable[[int, str], None] | None = None,
) -> Effect:
    """Clamp the most specialised neurons, and random ones of the same layers.

    Args:
        hooked: The dense model.
        decoded: Its neurons as tokens.
        kind: The projection by which neurons are chosen.
        prompts: (N, T) token ids; the clamp acts on the last, the next token is judged.
        most: (L, F) as `largest_values` gives.
        count: Neurons of each.
        strength: Times `most`.
        seed: Of the random ones.
        show: Told how many neurons are done.

    Raises:
        VesicleError: There is no such projection, or there are fewer neurons.
    """
    if kind not in decoded.kinds:
        raise VesicleError(f"kind is {kind!r}; allowed: {', '.join(decoded.kinds)}")
    token, score, way = decoded.best(kind)
    n_layers, width = score.shape
    if not 1 <= count <= n_layers * width // 2:
        raise VesicleError(f"count is {count}; allowed: 1 to {n_layers * width // 2}")
    chosen = score.flatten().argsort(descending=True)[:count].tolist()
    rng = np.random.default_rng(seed)
    taken = set(chosen)
    drawn = []
    for place in chosen:
        layer = place // width
        free = [i for i in range(layer * width, (layer + 1) * width) if i not in taken]
        if not free:
            raise VesicleError(
                f"count is {count}: of layer {layer} no neuron is left to compare with; take fewer"
            )
        drawn.append(int(rng.choice(free)))
        taken.add(drawn[-1])
    base = next_chances(hooked, prompts, [])

    def held(place: int, other: int, number: int) -> Clamped:
        layer, index = divmod(place, width)
        value = strength * float(most[layer, index]) * int(way[layer, index])
        edit = clamp(f"blocks.{layer}.{NAMES[kind]}", index, value, [prompts.shape[1] - 1])
        moved = (next_chances(hooked, prompts, [edit]) - base).mean(0)
        if show is not None:
            show(number + 1, f"{layer}.{index}")
        return Clamped(
            layer=layer,
            index=index,
            token=int(token.flatten()[place]),
            score=float(score.flatten()[place]),
            value=value,
            nats=float(moved[int(token.flatten()[place])]),
            other=float(moved[int(token.flatten()[other])]),
        )

    def judged(places: Sequence[int], start: int) -> tuple[Clamped, ...]:
        others = _others(places, token.flatten())
        return tuple(
            held(p, o, start + i) for i, (p, o) in enumerate(zip(places, others, strict=True))
        )

    return Effect(
        kind=kind,
        strength=strength,
        specialised=judged(chosen, 0),
        random=judged(drawn, count),
    )


@torch.no_grad()
def steer(
    hooked: Hooked,
    text: Text,
    prompt: str,
    neuron: Neuron,
    kind: str,
    values: Sequence[float],
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Answers to a prompt with a neuron held at values, the first one as it is.

    Args:
        hooked: The model.
        text: Its tokens, and its chat template if it has one.
        prompt: A question, or a text to go on with where there is no template.
        neuron: Which.
        kind: What is held, a key of `NAMES`.
        values: To hold it at, in every token; the first is not looked at.
        new_tokens: Of an answer, at most.

    Returns:
        For each the value, None for the first, and the answer.
    """
    ids = torch.tensor([text.chat(prompt)])
    model: Any = hooked.model
    found = []
    for number, value in enumerate(values):
        name = f"blocks.{neuron.layer}.{NAMES[kind]}"
        edits = [clamp(name, neuron.index, value)] if number else []
        with hooked.hold(edits, prompt_tokens=ids.shape[1]):
            output = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        answer = text.decode(output[0, ids.shape[1] :].tolist())
        found.append({"value": value if number else None, "text": answer})
    return found


@torch.no_grad()
def next_chances(hooked: Hooked, prompts: Tensor, edits: Sequence[Any]) -> Tensor:
    """(N, V) log probabilities of what follows prompts (N, T) under edits."""
    with hooked.hold(edits):
        model: Any = hooked.model
        logits = model(prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.float().log_softmax(-1)


def _others(places: Sequence[int], token: Tensor) -> list[int]:
    """For each neuron another one with another token; itself where all have the same."""
    n = len(places)
    found = []
    for i, place in enumerate(places):
        ahead = (places[(i + step) % n] for step in range(1, n))
        found.append(next((p for p in ahead if token[p] != token[place]), place))
    return found
