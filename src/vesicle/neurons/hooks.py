"""Reads and edits a Hugging Face model by name, with or without a modulator at work in it.

    hooked = Hooked(model, modulator, budget=0.7)
    louder = clamp("blocks.3.mlp.hook_post", 17, 4.0)
    seen = hooked.run(ids, read=["blocks.*.hook_resid_post"], edits=[louder])
    with hooked.hold([lesion("blocks.3.hook_levels", "gaba")]):
        model.generate(ids)

Inputs are read and edited before the modulator's masks act on them, outputs after: a neuron is what
the model computed, and what a module adds is what the residual stream gets.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vesicle.errors import ModelError, VesicleError
from vesicle.families import find_cache, find_family
from vesicle.modulator import Modulator, ModulatorMethod, served
from vesicle.neurons import names
from vesicle.neurons.decisions import EditedMethod
from vesicle.neurons.edits import Edit
from vesicle.phases import Phases
from vesicle.plan import FIELDS, Dense, Method
from vesicle.reference.attach import Run, attach
from vesicle.transmitters import NAMES

_CHECKED_TOKENS = 8


@dataclass(kw_only=True)
class Seen:
    """What was read while edits were held.

    Attributes:
        activations: By name, all passes of a text one after the other.
        run: What the method did: levels, Plans, cost; None where nothing was attached.
        logits: (B, T, V) of the latest pass.
    """

    activations: dict[str, Tensor] = field(default_factory=dict)
    run: Run | None = None
    logits: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __getitem__(self, name: str) -> Tensor:
        """An activation, (B, T, L's width) levels, or (B, T, numbers) of a Plan's field.

        Raises:
            VesicleError: It was not read.
        """
        if name in self.activations:
            return self.activations[name]
        layer, own = names.split(name)
        if self.run is not None and layer is not None and names.decides(name):
            if own == names.LEVELS:
                tables = [torch.from_numpy(levels[:, layer]) for levels in self.run.levels]
            else:
                rows = [
                    plan.rows[own.removeprefix(names.PLAN)][:, layer] for plan in self.run.plans
                ]
                tables = [torch.from_numpy(r.copy()).reshape(len(r), -1) for r in rows]
            if tables:
                longest = max(map(len, tables))
                # As in the batch: shorter texts stand on the right.
                return torch.stack(
                    [torch.cat([t.new_ones(longest - len(t), t.shape[1]), t]) for t in tables]
                )
        raise VesicleError(f"{name} was not read; read: {', '.join(self.activations) or 'nothing'}")


class Hooked:
    """A model whose activations, levels and decisions have names.

    Attributes:
        model: The model, which is as it was whenever nothing is held.
        method: Who decides what it computes; None for the dense model.
        names: All that can be read.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Modulator | Method | None = None,
        budget: float | None = None,
        *,
        phases: Phases | None = None,
        check: bool = True,
    ) -> None:
        """Find the names, and see that hooks that do nothing change nothing.

        Args:
            model: A causal LM of a supported family.
            method: A modulator (then `budget` and `phases` apply), a method, or None.
            budget: Share of the dense FLOPs in (0, 1].
            phases: On which tokens each transmitter acts; on generated ones if not given.
            check: Whether to run a few tokens with and without hooks.

        Raises:
            ModelError: The family is not supported, or logits are not bit for bit the same.
            VesicleError: A budget is out of range, or there is no modulator that it would apply to.
        """
        loaded: Any = model
        self.model = model
        self.method = served(method, budget, phases)
        self._family = find_family(loaded.config)
        decoder = self._family.decoder_config(loaded.config)
        self.shape = decoder.shape
        self._points = names.points(model, self._family, parallel=decoder.parallel_residual)
        released = isinstance(self.method, ModulatorMethod)
        decided = names.decision_names(self.shape.n_layers, levels=released)
        self.names = (*self._points, *decided)
        self._held = False
        if check:
            self._check()

    @contextmanager
    def hold(
        self, edits: Iterable[Edit] = (), read: Iterable[str] = (), *, prompt_tokens: int = 0
    ) -> Iterator[Seen]:
        """Hold edits and read names in every pass of the body, `model.generate` included.

        Args:
            edits: Changes; several of one name act in their order.
            read: Names, or patterns such as `blocks.*.hook_resid_post`.
            prompt_tokens: Leading tokens that are a prompt, as `attach` has it.

        Raises:
            VesicleError: A name, a number or a value does not fit the model, naming what is
                allowed; or another body holds already.
        """
        if self._held:
            raise VesicleError("edits are held already; hold all of them at once")
        wanted = names.matching(read, self.names)
        each = [edit.checked(self._width(edit.name)) for edit in edits]
        of_method = [edit for edit in each if names.decides(edit.name)]
        of_model = [edit for edit in each if not names.decides(edit.name)]
        method = self.method
        if of_method or (method is None and any(map(names.decides, wanted))):
            method = EditedMethod(method or Dense(), of_method)
        activations = [name for name in wanted if not names.decides(name)]
        seen, place = Seen(), _Place()
        self._held = True
        try:
            with ExitStack() as stack:
                eager = any(names.split(name)[1] == names.PATTERN for name in activations)
                if eager:
                    stack.enter_context(_eager(self.model))
                decoder: Any = self.model
                stack.callback(place.install(decoder.base_model).remove)
                self._install(stack, "input", activations, of_model, seen, place)
                if method is not None:
                    seen.run = stack.enter_context(
                        attach(self.model, method, prompt_tokens=prompt_tokens)
                    )
                self._install(stack, "output", activations, of_model, seen, place)
                yield seen
        finally:
            self._held = False

    def run(
        self,
        ids: Tensor,
        *,
        read: Iterable[str] = (),
        edits: Iterable[Edit] = (),
        gradients: bool = False,
        prompt_tokens: int = 0,
    ) -> Seen:
        """Read one batch of texts once.

        Args:
            ids: (B, T) token ids, not padded.
            read: As in `hold`.
            edits: As in `hold`.
            gradients: Whether activations and logits can be differentiated, by `autograd.grad`.
            prompt_tokens: As in `hold`.

        Raises:
            VesicleError: As `hold`; or a token id is out of range.
        """
        top = self.shape.vocabulary
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < top:
            bad = next(i for i in ids.flatten().tolist() if not 0 <= i < top)
            raise VesicleError(f"token id {bad} is out of range; allowed: 0 to {top - 1}")
        with (
            torch.set_grad_enabled(gradients),
            self.hold(edits, read, prompt_tokens=prompt_tokens) as seen,
        ):
            seen.logits = self.model(ids, use_cache=False).logits
        return seen

    def _install(
        self,
        stack: ExitStack,
        side: str,
        read: Sequence[str],
        edits: Sequence[Edit],
        seen: Seen,
        place: _Place,
    ) -> None:
        """Hook all that is read or edited on one side of modules."""
        # Where the graph begins for a model whose parameters are frozen.
        root = ["hook_embed"] if torch.is_grad_enabled() else []
        for name in dict.fromkeys([*root, *read, *(edit.name for edit in edits)]):
            point = self._points[name]
            if point.side != side:
                continue
            own = [edit for edit in edits if edit.name == name]
            hook = _Hook(name, own, seen.activations if name in read else None, place)
            if side == "input":
                handle = point.module.register_forward_pre_hook(hook.before, with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(hook.after)
            stack.callback(handle.remove)

    def _width(self, name: str) -> int:
        """How many numbers what is named has for each token.

        Raises:
            VesicleError: There is nothing of that name.
        """
        names.matching([name], self.names)
        own, shape = names.split(name)[1], self.shape
        if own == names.LEVELS:
            return len(NAMES)
        for known in FIELDS:
            if own == names.PLAN + known.name:
                return known.width
        if own == "attn.hook_z" or own == "attn.hook_q":
            return shape.n_heads * shape.head_size
        if own in ("attn.hook_k", "attn.hook_v"):
            return shape.n_kv_heads * shape.head_size
        return shape.ffn_width if own.startswith("mlp.") else shape.width

    @torch.no_grad()
    def _check(self) -> None:
        """See that hooks that do nothing change nothing.

        Raises:
            ModelError: If they do.
        """
        model: Any = self.model
        ids = torch.arange(_CHECKED_TOKENS, device=next(model.parameters()).device)[None]
        ids = ids % self.shape.vocabulary
        dense = model(ids, use_cache=False).logits
        method, self.method = self.method, None
        try:
            activations = [n for n in self._points if names.split(n)[1] != names.PATTERN]
            with self.hold(read=activations):
                idle = model(ids, use_cache=False).logits
        finally:
            self.method = method
        if not torch.equal(dense, idle):
            raise ModelError(
                "this model's logits differ by "
                f"{float((dense - idle).abs().max()):.3g} while hooks only read: it is not run as "
                "its family is, and cannot be looked into"
            )


class _Place:
    """At which column of its texts the pass under way begins."""

    def __init__(self) -> None:
        self.start = 0

    def install(self, decoder: nn.Module) -> Any:
        """Hook the decoder as a whole, which is called once a pass."""
        parameters = list(inspect.signature(decoder.forward).parameters)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = find_cache({**dict(zip(parameters, args, strict=False)), **kwargs})
            self.start = 0 if cache is None else int(cache.get_seq_length(0))

        return decoder.register_forward_pre_hook(before, with_kwargs=True)


class _Hook:
    """Reads and edits one activation."""

    def __init__(
        self, name: str, edits: Sequence[Edit], into: dict[str, Tensor] | None, place: _Place
    ) -> None:
        self.name, self.edits, self.into, self.place = name, edits, into, place

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A module's input."""
        if args:
            return None if (x := self._done(args[0])) is args[0] else ((x, *args[1:]), kwargs)
        given = kwargs["hidden_states"]
        x = self._done(given)
        return None if x is given else (args, {**kwargs, "hidden_states": x})

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A module's output, which may be the first of several."""
        if names.split(self.name)[1] == names.PATTERN:
            self._done(output[1])
            return None
        given = output if isinstance(output, Tensor) else output[0]
        x = self._done(given)
        if x is given:
            return None
        return x if isinstance(output, Tensor) else (x, *output[1:])

    def _done(self, x: Tensor) -> Tensor:
        if self.name == "hook_embed" and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        for edit in self.edits:
            x = edit.apply(x, self.place.start)
        if self.into is not None:
            before = self.into.get(self.name)
            # A pattern's keys grow from pass to pass: the newest is kept.
            goes_on = self.place.start and before is not None and x.dim() == 3
            self.into[self.name] = torch.cat([before, x], 1) if goes_on else x  # type: ignore[list-item]  # not None where it goes on
        return x


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Attention whose patterns can be seen."""
    loaded: Any = model
    before = loaded.config._attn_implementation
    loaded.set_attn_implementation("eager")
    try:
        yield
    finally:
        loaded.set_attn_implementation(before)
