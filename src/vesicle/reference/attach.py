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
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.cost import Cost, price
from vesicle.effectors import GabaSparsity
from vesicle.effectors.dopamine_precision import largest
from vesicle.errors import ModelError, VesicleError
from vesicle.families import find_cache, find_family
from vesicle.modulator import Modulator, ModulatorMethod, served
from vesicle.nested import NestedWeight
from vesicle.phases import Phases
from vesicle.plan import (
    FFN_BIG,
    FFN_SMALL,
    FULL_BITS,
    Author,
    FloatArray,
    IntArray,
    Method,
    Plan,
    PlanBuilder,
    Rows,
    check_rows,
    resting_rows,
)
from vesicle.plan.forgetting import forgetter_of, with_evidence
from vesicle.plan.rows import check_kept, of_attention
from vesicle.predictors import State
from vesicle.reference.attention import BASES, PREFIX, RULE, BlockRule, register
from vesicle.reference.continuity import Entries, check_mask
from vesicle.reference.memory import Memory
from vesicle.reference.soft_cost import SoftCost
from vesicle.shapes import ModelShape
from vesicle.transmitters import index


@dataclass(frozen=True, kw_only=True)
class Soft:
    """Differentiable execution: mask temperature, 0 for straight-through."""

    temperature: float = 0.0


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
    """

    def __init__(
        self, model: nn.Module, method: Method, soft: Soft | None, *, prompt_tokens: int = 0
    ) -> None:
        """Prepare; nothing is hooked before `__enter__`."""
        config: Any = model.config
        self._model, self.method, self._soft = model, method, soft
        self._family = find_family(config)
        self._decoder = self._family.decoder_config(config)
        parameter = next(model.parameters())
        size = parameter.element_size()
        self.shape: ModelShape = replace(self._decoder.shape, weight_bytes=size, kv_bytes=size)
        if isinstance(method, ModulatorMethod):
            method.modulator.check_fits(self.shape)
        elif soft is not None:
            raise VesicleError("soft execution needs a modulator")
        self._handles: list[Any] = []
        self._prompt_slots = prompt_tokens - 1  # padding included, the last token not
        self._implementation: str | None = None
        self._pass = _Pass(self)
        self._authors: list[Author] = []
        self._builders: list[PlanBuilder] = []
        self.soft_cost: SoftCost | None = None

    def __enter__(self) -> Self:
        """Hook the model, its layers and `generate`, and set the reference's attention function.

        Raises:
            VesicleError: If a method is attached to the model already.
            ModelError: If its attention implementation is not supported.
        """
        config: Any = self._model.config
        base = config._attn_implementation or "eager"
        if base.startswith(PREFIX):
            raise VesicleError("a method is attached to this model already; detach it first")
        if base not in BASES:
            raise ModelError(f"attention implementation {base!r} is not supported; use {BASES}")
        register()
        self._implementation = base
        config._attn_implementation = PREFIX + base
        model: Any = self._model
        if callable(getattr(model, "generate", None)):
            model.generate = self._generating(model.generate)
        try:
            self._handles += self._pass.install()
            for number, layer in enumerate(self._family.layers(self._model)):
                self._handles += _LayerHooks(self, number, layer).install()
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
        self._model.__dict__.pop("generate", None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        config: Any = self._model.config
        config._attn_implementation = self._implementation

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`model.generate`, which says first what the prompt is."""

        @functools.wraps(generate)
        def said(*args: Any, **kwargs: Any) -> Any:
            names = ("inputs", "input_ids", "inputs_embeds")
            given = [*args[:1], *(kwargs[n] for n in names if kwargs.get(n) is not None)]
            before = self._prompt_slots
            self._prompt_slots = given[0].shape[1] - 1 if given else 0
            try:
                return generate(*args, **kwargs)
            finally:
                self._prompt_slots = before

        return said

    @property
    def _modulator(self) -> Modulator:
        assert isinstance(self.method, ModulatorMethod)
        return self.method.modulator

    @property
    def _charged(self) -> SoftCost:
        assert self.soft_cost is not None
        return self.soft_cost

    @property
    def _soft_steps(self) -> bool:
        """Whether serotonin is released at all.

        If not, stand-ins need not run beside the modules.
        """
        return "serotonin" in self._modulator.predictor.config.transmitters

    @property
    def plans(self) -> list[Plan]:
        """One Plan per sequence of the batch."""
        return [self._plan(i) for i in range(len(self._builders))]

    @property
    def plan(self) -> Plan:
        """The Plan of the only sequence.

        Raises:
            VesicleError: If there is no sequence yet, or more than one.
        """
        if len(self._builders) != 1:
            raise VesicleError(f"the batch has {len(self._builders)} sequences; use .plans")
        return self._plan(0)

    def _plan(self, i: int) -> Plan:
        return self._builders[i].build()

    @property
    def levels(self) -> list[FloatArray]:
        """Released levels, one (T, L, 5) per sequence; empty for methods that have none."""
        return [a.levels for a in self._authors if a.levels is not None]

    @property
    def cost(self) -> Cost:
        """Price of all Plans, logits counted at every position."""
        total = Cost()
        overhead = self.method.overhead(self.shape)
        for author, plan, released in zip(self._authors, self.plans, self.released, strict=True):
            own = with_evidence(overhead, author)
            total = total + price(plan, self.shape, own, released=released)
        return total

    @property
    def released(self) -> list[NDArray[np.bool_]]:
        """At which tokens the method's predictor ran, one (T,) per sequence."""
        return [
            author.releases(np.arange(plan.n_tokens, dtype=np.int32))
            for author, plan in zip(self._authors, self.plans, strict=True)
        ]


class _Pass:
    """State of one forward pass, shared by its layers' hooks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.positions = torch.zeros(0)  # (B, T)
        self.numpy_positions: list[IntArray] = []  # per sequence, padding left out
        self.rows: list[Rows] = []  # (T_i, L) per sequence, of this pass
        self.starts: list[int] = []
        self.offsets: tuple[int, ...] = ()
        self.memories: list[list[Memory] | None] = []  # of the layers of those that forget
        self.levels: Tensor | None = None  # (B, T, 5), soft mode, released by the previous layer
        self.state: State = {}
        self.dial = torch.ones(1)
        self.mask: Any = None  # attention mask as the model was given it
        self.cache: Any = None  # filled by this pass
        self.entries: Entries | None = None  # of the latest pass; None before it and inside one

    def install(self) -> list[Any]:
        """Hook the decoder as a whole, which is called once a pass."""
        decoder: Any = self.run._model.base_model
        place = list(inspect.signature(decoder.forward).parameters).index("attention_mask")

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.mask = args[place] if len(args) > place else kwargs.get("attention_mask")

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.end()

        return [
            decoder.register_forward_pre_hook(before, with_kwargs=True),
            decoder.register_forward_hook(after),
        ]

    def begin(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Find out where in its sequence each token is, and start sequences that are new."""
        run = self.run
        b, t = hidden.shape[:2]
        cache = find_cache(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(0))
        given = kwargs.get("position_ids")
        if given is None:
            given = torch.arange(past, past + t, device=hidden.device)[None]
        self.positions = given.expand(b, t)
        last = self.positions[:, -1].tolist()
        self.offsets = tuple(max(0, past + t - 1 - int(p)) for p in last)
        self.starts = [min(t, max(0, offset - past)) for offset in self.offsets]
        check_mask(self.mask, self.offsets, past, t)
        slots = torch.arange(past, past + t)
        for row, start, offset in zip(
            self.positions.tolist(), self.starts, self.offsets, strict=True
        ):
            if row[start:] != (slots[start:] - offset).tolist():
                raise VesicleError(
                    "positions do not rise by one; pad batches on the left, or not at all"
                )
        if any(self.starts):  # what padding is numbered differs between releases of transformers
            padding = torch.arange(t) < torch.tensor(self.starts)[:, None]
            self.positions = self.positions.masked_fill(padding.to(hidden.device), 0)
        if past == 0:
            run._authors = [] if run._soft else [run.method.author(run.shape) for _ in range(b)]
            run._builders = [PlanBuilder(run.shape) for _ in range(b)]
            if not run._soft:
                run._builders = [PlanBuilder(run.shape, a.evict_after) for a in run._authors]
            self.state = {}
            self.memories = [self.memory(i) for i in range(len(run._authors))]
        elif len(run._builders) != b:
            raise VesicleError(
                f"the batch had {len(run._builders)} sequences and now has {b}; "
                "start a new sequence while attached"
            )
        else:
            if self.entries is None:
                raise VesicleError(
                    "the pass before this one failed; start a new sequence while attached"
                )
            self.entries.check(cache, past)
        self.cache, self.entries = cache, None
        rows = self.positions.cpu().numpy().astype(np.int32)
        self.numpy_positions = [rows[i, s:] for i, s in enumerate(self.starts)]
        self.rows = [resting_rows(run.shape, p) for p in self.numpy_positions]
        for builder, table in zip(run._builders, self.rows, strict=True):
            if run._soft is None:
                builder.add(table)
        for author, offset in zip(run._authors, self.offsets, strict=run._soft is None):
            author.prompt(max(0, past - offset), run._prompt_slots - offset)
        if run._soft is not None:
            method = run.method
            assert isinstance(method, ModulatorMethod)
            self.dial = torch.full((b,), method.dial_position, device=hidden.device)
            self.levels = None
            run.soft_cost = SoftCost(run.shape, method.modulator, method.overhead(run.shape))
            run.soft_cost.head(self.positions)

    def end(self) -> None:
        """Note what the cache holds now, so that the next pass can tell whether it goes on."""
        self.entries = Entries(self.cache)
        self.mask = self.cache = None

    def attention(self, layer: int) -> list[Rows]:
        """Ask every author for a layer's attention; its rows (T_i,), per sequence."""
        for author, table, p in zip(
            self.run._authors, self.rows, self.numpy_positions, strict=True
        ):
            if len(p):
                author.attention(layer, p, table[:, layer])
        return self.checked(layer)

    def ffn(self, layer: int, hidden: Tensor) -> list[Rows]:
        """Give every author its tokens' hidden states; the layer's rows (T_i,), per sequence."""
        for i, (author, table, p) in enumerate(
            zip(self.run._authors, self.rows, self.numpy_positions, strict=True)
        ):
            if len(p):
                own = hidden[i, self.starts[i] :].detach().cpu()
                before = of_attention(table[:, layer])
                author.ffn(layer, own, p, table[:, layer])
                check_kept(table[:, layer], before, layer)
        found = self.checked(layer)
        for table in self.rows:
            table["head"] = 0  # the whole head runs
        return found

    def checked(self, layer: int) -> list[Rows]:
        """The rows of a layer, which may be executed."""
        run = self.run
        for author, table, p in zip(run._authors, self.rows, self.numpy_positions, strict=True):
            if len(p) and not author.bounded:
                check_rows(table[:, layer : layer + 1], run.shape, p, [layer])
        return [table[:, layer] for table in self.rows]

    def at_rest(self) -> bool:
        """Whether nothing differs by construction, so that the model may run as it is."""
        return all(author.rests for author in self.run._authors)

    def memory(self, i: int) -> list[Memory] | None:
        """What the layers of a new sequence will hold; None if it never forgets."""
        author, note = self.run._authors[i], self.run._builders[i].forget
        forgetter, shape = forgetter_of(author), self.run.shape
        if forgetter is not None:
            none = np.zeros((0, shape.n_kv_heads), np.int32)
            return [Memory(none, layer, forgetter, note) for layer in range(shape.n_layers)]
        if author.evict_after is None:
            return None
        return [Memory(author.evict_after[:, layer]) for layer in range(shape.n_layers)]

    def forgetting(self, layer: int) -> list[Memory | None] | None:
        """Each sequence's memory of a layer; None where this pass would see no difference."""
        found: list[Memory | None] = []
        for author, memory, p in zip(
            self.run._authors, self.memories, self.numpy_positions, strict=True
        ):
            known = author.evict_after
            late = known is not None and (not len(p) or known.min() >= p[-1])
            found.append(None if memory is None or late else memory[layer])
        return found if any(memory is not None for memory in found) else None

    def column(self, parts: list[IntArray], fill: int, device: torch.device) -> Tensor:
        """Per-sequence columns (T_i,) as one (B, T) tensor, `fill` on padding."""
        table = torch.full(self.positions.shape, fill, dtype=torch.long)
        for i, part in enumerate(parts):
            table[i, self.starts[i] :] = torch.from_numpy(np.ascontiguousarray(part))
        return table.to(device)


class _LayerHooks:
    """The hooks of one decoder layer, in the order in which they fire."""

    def __init__(self, run: Run, number: int, layer: nn.Module) -> None:
        self.run, self.number, self.layer = run, number, layer
        self.modules = run._family.modules(layer)
        self.parallel = run._decoder.parallel_residual
        self.decided: list[Rows] = []  # of this layer, per sequence
        self.levels_attention: Tensor | None = None
        self.levels_ffn: Tensor | None = None
        self.attention_input = torch.zeros(0)
        self.attention_output = torch.zeros(0)
        self.ffn_input = torch.zeros(0)
        self._nested: dict[nn.Linear, NestedWeight] = {}

    def install(self) -> list[Any]:
        m = self.modules
        handles = [
            m.attention.register_forward_pre_hook(self.before_attention, with_kwargs=True),
            m.out.register_forward_pre_hook(self.before_out),
            m.attention.register_forward_hook(self.after_attention),
            m.ffn_norm.register_forward_pre_hook(self.before_ffn_norm),
            m.ffn.register_forward_pre_hook(self.before_ffn),
            m.ffn_out.register_forward_pre_hook(self.before_ffn_out),
            m.ffn.register_forward_hook(self.after_ffn),
        ]
        for site, linears in enumerate((m.query_key_value, (m.out,), m.ffn_in, (m.ffn_out,))):
            for linear in linears:
                handles.append(linear.register_forward_hook(self.fewer_bits(site)))
        return handles

    # Attention

    def before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        state = self.run._pass
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.number == 0:
            state.begin(hidden, kwargs)
        self.attention_input = hidden
        if self.run._soft is not None:
            self.levels_attention = state.levels
            if state.levels is None:
                self.run._charged.attention(None, state.positions)
                return None
            level = state.levels
            self.run._charged.attention(level, state.positions)
            masked = hidden * self.soft_channels(0, hidden, level)
            rule: BlockRule | None = None
            if "gaba" in self.run._modulator.predictor.config.transmitters:
                rule = self.rule(None, level[..., _GABA])
        else:
            decided = self.decided = state.attention(self.number)
            memories = state.forgetting(self.number)
            if state.at_rest() and memories is None:
                return None
            masked = self.keep_channels(0, hidden)
            blocks = state.column([rows["kv_blocks"] for rows in decided], 1 << 30, hidden.device)
            whole = blocks >= state.positions // 16 + 1
            seen = memories is None and bool(whole.all())
            rule = None if seen else self.rule(blocks, None, memories)
        if rule is not None:
            kwargs = {**kwargs, RULE: rule}
        if args:
            return (masked, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": masked}

    def rule(
        self,
        blocks: Tensor | None,
        level: Tensor | None,
        memories: list[Memory | None] | None = None,
    ) -> BlockRule:
        state, soft = self.run._pass, self.run._soft
        attends: Tensor | None = None
        if memories is not None:
            parts = [rows["attention"] for rows in self.decided]
            attends = state.column(parts, 0, state.positions.device) == 1
        return BlockRule(
            positions=state.positions,
            offsets=state.offsets,
            kv_blocks=blocks,
            level=level,
            temperature=soft.temperature if soft else 0.0,
            memories=memories,
            attends=attends,
            effector=self.run._modulator.gaba
            if soft
            else GabaSparsity(summary=self.run.method.equipment.summary),
        )

    def before_out(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.run._soft is not None:
            if self.levels_attention is None:
                return None
            return (args[0] * self.soft_channels(1, args[0], self.levels_attention),)
        return (self.keep_channels(1, args[0]),)

    def after_attention(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]
    ) -> tuple[Any, ...] | None:
        result = output[0]
        standin = self.run.method.equipment.attention_standin
        if self.run._soft is not None:
            if self.levels_attention is not None and self.run._soft_steps:
                serotonin = self.run._modulator.serotonin
                level = self.levels_attention[..., _SEROTONIN]
                runs = serotonin.mask(
                    level, serotonin.attention_below, self.run._soft.temperature
                ).to(result.dtype)[..., None]
                assert standin is not None
                other = standin.apply_layer(self.number, self.attention_input)
                result = runs * result + (1 - runs) * other
        else:
            parts = [rows["attention"] for rows in self.decided]
            runs = self.run._pass.column(parts, 1, result.device)
            if not bool(runs.all()):
                other = (
                    torch.zeros_like(result)
                    if standin is None
                    else standin.apply_layer(self.number, self.attention_input)
                )
                result = torch.where(runs[..., None] == 1, result, other)
        self.attention_output = result
        return None if result is output[0] else (result, *output[1:])

    # FFN

    def before_ffn_norm(self, module: nn.Module, args: tuple[Tensor]) -> None:
        state = self.run._pass
        hidden = args[0] + self.attention_output if self.parallel else args[0]
        if self.run._soft is None:
            self.decided = state.ffn(self.number, hidden)
            return
        state.levels = self.run._modulator.release(
            self.number, hidden, state.positions, state.dial, state.state
        )
        self.levels_ffn = state.levels
        self.run._charged.ffn(state.levels)

    def before_ffn(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        self.ffn_input = args[0]
        if self.run._soft is not None:
            assert self.levels_ffn is not None
            return (args[0] * self.soft_channels(2, args[0], self.levels_ffn),)
        return (self.keep_channels(2, args[0]),)

    def before_ffn_out(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if self.run._soft is not None:
            assert self.levels_ffn is not None
            return (args[0] * self.soft_channels(3, args[0], self.levels_ffn),)
        return (self.keep_channels(3, args[0]),)

    def after_ffn(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        standin = self.run.method.equipment.ffn_standin
        if self.run._soft is not None:
            if not self.run._soft_steps:
                return None
            assert self.levels_ffn is not None
            assert standin is not None
            serotonin = self.run._modulator.serotonin
            level, heat = self.levels_ffn[..., _SEROTONIN], self.run._soft.temperature
            big = serotonin.mask(level, serotonin.ffn_below, heat).to(output.dtype)[..., None]
            small = standin.apply_layer(self.number, self.ffn_input)
            if serotonin.bypass_below > 0:
                small = small * serotonin.mask(level, serotonin.bypass_below, heat).to(
                    output.dtype
                ).unsqueeze(-1)
            return big * output + (1 - big) * small
        choice = self.run._pass.column([rows["ffn"] for rows in self.decided], 2, output.device)
        if bool((choice == FFN_BIG).all()):
            return None
        small = (
            torch.zeros_like(output)
            if standin is None
            else standin.apply_layer(self.number, self.ffn_input)
        )
        choice = choice[..., None]
        result = torch.where(choice == FFN_SMALL, small, torch.zeros_like(output))
        return torch.where(choice == FFN_BIG, output, result)

    # Precision

    def keep_channels(self, site: int, x: Tensor) -> Tensor:
        """X (B, T, C) with all but the largest contributions zeroed; x itself if all are kept."""
        width, counts = x.shape[-1], [rows["channels"][:, site] for rows in self.decided]
        if all((c >= width).all() for c in counts):
            return x
        keep = self.run._pass.column(counts, width, x.device)
        magnitude = x.abs()
        threshold = largest(magnitude, keep)
        above, equal = magnitude > threshold, magnitude == threshold
        # Ties at the threshold go to the lower channels, as in the engine.
        spare = keep[..., None] - above.sum(-1, keepdim=True)
        if bool((equal.sum(-1, keepdim=True) > spare).any()):
            equal = equal & (equal.cumsum(-1, dtype=torch.int32) <= spare)
        return x.masked_fill(~(above | equal), 0.0)

    def soft_channels(self, site: int, x: Tensor, levels: Tensor) -> Tensor:
        """Soft mask (B, T, C) over the channels of x; (1,) where dopamine is not released."""
        assert self.run._soft is not None
        if "dopamine" not in self.run._modulator.predictor.config.transmitters:
            return x.new_ones(1)
        magnitude = x.detach().float().abs()
        mask = self.run._modulator.dopamine.mask(
            levels[..., _DOPAMINE], site, magnitude, self.run._soft.temperature
        )
        return mask.to(x.dtype)

    def fewer_bits(self, site: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        """A hook on a projection that recomputes the tokens whose weights have fewer bits."""

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            if self.run._soft is not None:
                return None
            parts = [rows["bits"][:, site] for rows in self.decided]
            if all((p == FULL_BITS).all() for p in parts):
                return None
            assert isinstance(module, nn.Linear)
            if module not in self._nested:
                self._nested[module] = NestedWeight.quantize(
                    module.weight.detach().t().contiguous()
                )
            bits = self.run._pass.column(parts, FULL_BITS, output.device)
            result = output
            for b in sorted(set(bits.unique().tolist()) - {FULL_BITS}):
                weight = self._nested[module].dequantize(int(b)).to(output.dtype).t()
                coarse = nn.functional.linear(args[0], weight, module.bias)
                result = torch.where((bits == b)[..., None], coarse, result)
            return result

        return hook


_DOPAMINE, _SEROTONIN, _GABA = index("dopamine"), index("serotonin"), index("gaba")
