"""The reference executor: a method's Plan inside a Hugging Face model, readable, differentiable.

    with attach(model, modulator, budget=0.8) as run:
        model.generate(...)
    run.plan, run.levels, run.cost

Work is masked, not skipped: the reference tells what a Plan does to the outputs, the engine what it
saves. Everything happens in forward hooks and one named attention function; on exit the hooks are
gone and the attention implementation is what it was, also when the body raises. At rest no hook
changes a tensor, so logits are bit-identical to the model's own.

With `soft=Soft(temperature)` levels act through differentiable masks and `run.soft_cost`
accumulates the expected cost, for training; `temperature=0` is straight-through (hard forward, soft
backward).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.cost import Cost, price
from vesicle.errors import ModelError, VesicleError
from vesicle.families import find_family
from vesicle.modulator import Modulator, ModulatorMethod, served
from vesicle.phases import Phases
from vesicle.plan import Author, FloatArray, Method, Plan, PlanBuilder
from vesicle.plan.forgetting import with_evidence
from vesicle.reference.attention import BASES, PREFIX, register
from vesicle.reference.forward_pass import ForwardPass
from vesicle.reference.head_hooks import HeadHooks
from vesicle.reference.layer_hooks import LayerHooks
from vesicle.reference.soft_cost import SoftCost
from vesicle.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Soft:
    """Differentiable execution.

    Attributes:
        temperature: Of the masks; 0 for straight-through.
        acts: (B, T) on which tokens of the pass levels act, as phases tell where Plans are
            executed; on all if not given.
    """

    temperature: float = 0.0
    acts: Tensor | None = None


def attach(
    model: nn.Module,
    method: Modulator | Method,
    budget: float | None = None,
    *,
    phases: Phases | None = None,
    prompt_tokens: int = 0,
    soft: Soft | None = None,
) -> Run:
    """Attach a modulator or any method to a Hugging Face causal LM; use in a `with` statement.

    Args:
        model: A causal LM of a supported family.
        method: A modulator (then `budget` and `phases` apply) or a method such as `Replay(plan)`.
        budget: Share of dense FLOPs in (0, 1]; the modulator's default budget if not given.
        phases: On which tokens each transmitter acts; on generated ones if not given.
        prompt_tokens: Leading tokens of each sequence that are a prompt: what follows the last of
            them is the first to be scored. `model.generate` says so by itself; in any other pass
            every position is taken to be scored, unless this says otherwise.
        soft: Differentiable masks, for training; needs a modulator.

    Raises:
        ModelError: If the model's family or shape does not fit.
        VesicleError: If the budget is out of range, or given to a method that has none.
    """
    decides = served(method, budget, phases)
    assert decides is not None
    return Run(model, decides, soft, prompt_tokens=prompt_tokens)


class Run:
    """What happened while a method was attached. Holds the sequences of the latest prompt.

    Feeding a model tokens at position 0 starts new sequences; later passes of the same cache
    continue them.

    Attributes:
        model: What it is attached to.
        family: Of the model; it knows the names of modules.
        decoder: What the model computes.
        shape: Its sizes, by which work is priced.
        method: Who decides.
        soft: How levels act as differentiable masks; None where decisions are executed.
        soft_cost: The expected cost of the latest pass, in soft mode.
        forward: The pass under way, or the latest one.
        authors: One of each sequence.
        builders: Of their Plans.
        prompt_slots: Leading columns of a pass that are prompt, padding included and the last token
            not.
    """

    def __init__(
        self, model: nn.Module, method: Method, soft: Soft | None, *, prompt_tokens: int = 0
    ) -> None:
        """Prepare; nothing is hooked before `__enter__`."""
        config: Any = model.config
        self.model, self.method, self.soft = model, method, soft
        self.family = find_family(config)
        self.decoder = self.family.decoder_config(config)
        parameter = next(model.parameters())
        size = parameter.element_size()
        self.shape: ModelShape = replace(self.decoder.shape, weight_bytes=size, kv_bytes=size)
        decider = method.decider
        if isinstance(decider, ModulatorMethod):
            decider.modulator.check_fits(self.shape)
        elif soft is not None:
            raise VesicleError("soft execution needs a modulator")
        method.stand_ins.check(self.shape)
        self._handles: list[Any] = []
        self.prompt_slots = prompt_tokens - 1
        self._implementation: str | None = None
        self.forward = ForwardPass(self)
        self.authors: list[Author] = []
        self.builders: list[PlanBuilder] = []
        self.soft_cost: SoftCost | None = None

    def __enter__(self) -> Self:
        """Hook the model, its layers and `generate`, and set the reference's attention function.

        Raises:
            VesicleError: If a method is attached to the model already.
            ModelError: If its attention implementation is not supported.
        """
        config: Any = self.model.config
        base = config._attn_implementation or "eager"
        if base.startswith(PREFIX):
            raise VesicleError("a method is attached to this model already; detach it first")
        if base not in BASES:
            raise ModelError(f"attention implementation {base!r} is not supported; use {BASES}")
        register()
        self._implementation = base
        config._attn_implementation = PREFIX + base
        model: Any = self.model
        if callable(getattr(model, "generate", None)):
            model.generate = self._generating(model.generate)
        try:
            self._handles += self.forward.install()
            for number, layer in enumerate(self.family.layers(self.model)):
                self._handles += LayerHooks(self, number, layer).install()
            if self.method.stand_ins.head is not None:
                self._handles += HeadHooks(self).install()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove every hook and restore the attention implementation."""
        self.model.__dict__.pop("generate", None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        config: Any = self.model.config
        config._attn_implementation = self._implementation

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`model.generate`, which says first what the prompt is."""

        @functools.wraps(generate)
        def said(*args: Any, **kwargs: Any) -> Any:
            names = ("inputs", "input_ids", "inputs_embeds")
            given = [*args[:1], *(kwargs[n] for n in names if kwargs.get(n) is not None)]
            before = self.prompt_slots
            self.prompt_slots = given[0].shape[1] - 1 if given else 0
            try:
                return generate(*args, **kwargs)
            finally:
                self.prompt_slots = before

        return said

    @property
    def modulator(self) -> Modulator:
        """The modulator that is attached; there is one in soft mode."""
        assert isinstance(self.method, ModulatorMethod)
        return self.method.modulator

    @property
    def charged(self) -> SoftCost:
        """The expected cost that the pass adds up, in soft mode."""
        assert self.soft_cost is not None
        return self.soft_cost

    @property
    def soft_steps(self) -> bool:
        """Whether serotonin is released at all.

        If not, stand-ins need not run beside the modules.
        """
        return "serotonin" in self.modulator.predictor.config.transmitters

    @property
    def plans(self) -> list[Plan]:
        """One Plan per sequence of the batch."""
        return [self._plan(i) for i in range(len(self.builders))]

    @property
    def plan(self) -> Plan:
        """The Plan of the only sequence.

        Raises:
            VesicleError: If there is no sequence yet, or more than one.
        """
        if len(self.builders) != 1:
            raise VesicleError(f"the batch has {len(self.builders)} sequences; use .plans")
        return self._plan(0)

    def _plan(self, i: int) -> Plan:
        return self.builders[i].build()

    @property
    def levels(self) -> list[FloatArray]:
        """Released levels, one (T, L, 5) per sequence; empty for methods that have none."""
        return [a.levels for a in self.authors if a.levels is not None]

    @property
    def cost(self) -> Cost:
        """Price of all Plans, logits counted at every position."""
        total = Cost()
        overhead = self.method.overhead(self.shape)
        for author, plan, released in zip(self.authors, self.plans, self.released, strict=True):
            own = with_evidence(overhead, author)
            total = total + price(plan, self.shape, own, released=released)
        return total

    @property
    def released(self) -> list[NDArray[np.bool_]]:
        """At which tokens the method's predictor ran, one (T,) per sequence."""
        return [
            author.releases(np.arange(plan.n_tokens, dtype=np.int32))
            for author, plan in zip(self.authors, self.plans, strict=True)
        ]
