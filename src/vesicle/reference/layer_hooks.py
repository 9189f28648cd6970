"""The hooks on one decoder layer: where the reference masks what a Plan leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vesicle.effectors import GabaSparsity
from vesicle.effectors.dopamine_precision import largest
from vesicle.nested import NestedWeight
from vesicle.plan import FFN_BIG, FFN_SMALL, FULL_BITS, Rows, visible_blocks
from vesicle.plan.spread import as_array
from vesicle.reference.attention import RULE, BlockRule
from vesicle.reference.memory import Memory
from vesicle.transmitters import index

if TYPE_CHECKING:
    from vesicle.reference.attach import Run

_DOPAMINE, _SEROTONIN, _GABA = index("dopamine"), index("serotonin"), index("gaba")


class LayerHooks:
    """The hooks of one decoder layer, in the order in which they fire."""

    def __init__(self, run: Run, number: int, layer: nn.Module) -> None:
        self.run, self.number, self.layer = run, number, layer
        self.modules = run.family.modules(layer)
        self.parallel = run.decoder.parallel_residual
        self.window = int(run.shape.layer_windows[number])
        self.decided: list[Rows] = []  # of this layer, per sequence
        self.levels_attention: Tensor | None = None
        self.levels_ffn: Tensor | None = None
        self.attention_input = torch.zeros(0)
        self.attention_output = torch.zeros(0)
        self.ffn_input = torch.zeros(0)
        self._nested: dict[nn.Linear, NestedWeight] = {}

    def install(self) -> list[Any]:
        """Register all; the handles by which they are removed."""
        m = self.modules
        handles = [
            m.attention.register_forward_pre_hook(self.before_attention, with_kwargs=True),
            m.out.register_forward_pre_hook(self.before_out),
            m.attention_end.register_forward_hook(self.after_attention),
            m.ffn_norm.register_forward_pre_hook(self.before_ffn_norm),
            m.ffn.register_forward_pre_hook(self.before_ffn),
            m.ffn_out.register_forward_pre_hook(self.before_ffn_out),
            m.ffn_end.register_forward_hook(self.after_ffn),
        ]
        for site, linears in enumerate((m.query_key_value, (m.out,), m.ffn_in, (m.ffn_out,))):
            for linear in linears:
                handles.append(linear.register_forward_hook(self.fewer_bits(site)))
        return handles

    # Attention

    def before_attention(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Have attention decided; mask channels of its input and hand its rule on."""
        state = self.run.forward
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.number == 0:
            state.begin(hidden, kwargs)
        self.attention_input = hidden
        if self.run.soft is not None:
            self.levels_attention = state.levels
            if state.levels is None:
                self.run.charged.attention(None, state.positions, self.window)
                return None
            level = state.levels
            self.run.charged.attention(level, state.positions, self.window)
            masked = hidden * self.soft_channels(0, hidden, level)
            rule: BlockRule | None = None
            if "gaba" in self.run.modulator.predictor.config.transmitters:
                rule = self.rule(None, level[..., _GABA])
        else:
            decided = self.decided = state.attention(self.number)
            memories = state.forgetting(self.number)
            if state.at_rest() and memories is None:
                return None
            masked = self.keep_channels(0, hidden)
            blocks = state.column([rows["kv_blocks"] for rows in decided], 1 << 30, hidden.device)
            seen = visible_blocks(state.positions.cpu().numpy(), self.window)
            whole = blocks >= torch.from_numpy(seen).to(blocks.device)
            as_is = memories is None and bool(whole.all())
            rule = None if as_is else self.rule(blocks, None, memories)
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
        """How attention reads: `blocks` (B, T), or by `level` (B, T), and what is still there."""
        state, soft = self.run.forward, self.run.soft
        attends: Tensor | None = None
        if memories is not None:
            parts = [rows["attention"] for rows in self.decided]
            attends = state.column(parts, 0, state.positions.device) == 1
        spread = None if soft else as_array(self.run.method.stand_ins.spread)
        return BlockRule(
            positions=state.positions,
            offsets=state.offsets,
            kv_blocks=blocks,
            level=level,
            temperature=soft.temperature if soft else 0.0,
            memories=memories,
            attends=attends,
            window=self.window,
            spread=None if soft or spread is None else spread[self.number],
            nearest=1 if soft else self.run.method.stand_ins.nearest,
            effector=self.run.modulator.gaba
            if soft
            else GabaSparsity(summary=self.run.method.stand_ins.summary),
        )

    def before_out(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Mask channels of what attention gives to its output projection."""
        if self.run.soft is not None:
            if self.levels_attention is None:
                return None
            return (args[0] * self.soft_channels(1, args[0], self.levels_attention),)
        return (self.keep_channels(1, args[0]),)

    def after_attention(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any] | Tensor
    ) -> tuple[Any, ...] | Tensor | None:
        """Replace what is added to the residual stream (B, T, D) of tokens that skip attention."""
        given = output if isinstance(output, Tensor) else output[0]
        result = given
        standin = self.run.method.stand_ins.attention
        if self.run.soft is not None:
            if self.levels_attention is not None and self.run.soft_steps:
                serotonin = self.run.modulator.serotonin
                level = self.levels_attention[..., _SEROTONIN]
                runs = serotonin.mask(
                    level, serotonin.attention_below, self.run.soft.temperature
                ).to(result.dtype)[..., None]
                assert standin is not None
                other = standin.apply_layer(self.number, self.attention_input)
                result = runs * result + (1 - runs) * other
        else:
            parts = [rows["attention"] for rows in self.decided]
            runs = self.run.forward.column(parts, 1, result.device)
            if not bool(runs.all()):
                other = (
                    torch.zeros_like(result)
                    if standin is None
                    else standin.apply_layer(self.number, self.attention_input)
                )
                result = torch.where(runs[..., None] == 1, result, other)
        self.attention_output = result
        if result is given:
            return None
        return result if isinstance(output, Tensor) else (result, *output[1:])

    # FFN

    def before_ffn_norm(self, module: nn.Module, args: tuple[Tensor]) -> None:
        """Show the residual stream (B, T, D), and have the FFN decided."""
        state = self.run.forward
        hidden = args[0] + self.attention_output if self.parallel else args[0]
        if self.run.soft is None:
            self.decided = state.ffn(self.number, hidden)
            return
        state.levels = self.run.modulator.release(
            self.number, hidden, state.positions, state.dial, state.state
        )
        if self.run.soft.acts is not None:
            state.levels = state.levels.masked_fill(~self.run.soft.acts[..., None], 1.0)
        self.levels_ffn = state.levels
        self.run.charged.ffn(state.levels)
        if self.number == self.run.shape.n_layers - 1:
            self.run.charged.preview(state.levels)

    def before_ffn(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Mask channels of the FFN's input."""
        self.ffn_input = args[0]
        if self.run.soft is not None:
            assert self.levels_ffn is not None
            return (args[0] * self.soft_channels(2, args[0], self.levels_ffn),)
        return (self.keep_channels(2, args[0]),)

    def before_ffn_out(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """Mask channels of what goes into its down projection."""
        if self.run.soft is not None:
            assert self.levels_ffn is not None
            return (args[0] * self.soft_channels(3, args[0], self.levels_ffn),)
        return (self.keep_channels(3, args[0]),)

    def after_ffn(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Replace what is added to the residual stream (B, T, D) by an FFN that does not run."""
        standin = self.run.method.stand_ins.ffn
        if self.run.soft is not None:
            if not self.run.soft_steps:
                return None
            assert self.levels_ffn is not None
            assert standin is not None
            serotonin = self.run.modulator.serotonin
            level, heat = self.levels_ffn[..., _SEROTONIN], self.run.soft.temperature
            big = serotonin.mask(level, serotonin.ffn_below, heat).to(output.dtype)[..., None]
            small = standin.apply_layer(self.number, self.ffn_input)
            if serotonin.bypass_below > 0:
                small = small * serotonin.mask(level, serotonin.bypass_below, heat).to(
                    output.dtype
                ).unsqueeze(-1)
            return big * output + (1 - big) * small
        choice = self.run.forward.column([rows["ffn"] for rows in self.decided], 2, output.device)
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
        keep = self.run.forward.column(counts, width, x.device)
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
        assert self.run.soft is not None
        if "dopamine" not in self.run.modulator.predictor.config.transmitters:
            return x.new_ones(1)
        magnitude = x.detach().float().abs()
        mask = self.run.modulator.dopamine.mask(
            levels[..., _DOPAMINE], site, magnitude, self.run.soft.temperature
        )
        return mask.to(x.dtype)

    def fewer_bits(self, site: int) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        """A hook on a projection that recomputes the tokens whose weights have fewer bits."""

        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            if self.run.soft is not None:
                return None
            parts = [rows["bits"][:, site] for rows in self.decided]
            if all((p == FULL_BITS).all() for p in parts):
                return None
            assert isinstance(module, nn.Linear)
            if module not in self._nested:
                self._nested[module] = NestedWeight.quantize(
                    module.weight.detach().t().contiguous()
                )
            bits = self.run.forward.column(parts, FULL_BITS, output.device)
            result = output
            for b in sorted(set(bits.unique().tolist()) - {FULL_BITS}):
                weight = self._nested[module].dequantize(int(b)).to(output.dtype).t()
                coarse = nn.functional.linear(args[0], weight, module.bias)
                result = torch.where((bits == b)[..., None], coarse, result)
            return result

        return hook
