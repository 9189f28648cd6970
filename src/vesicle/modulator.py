"""Modulator: a predictor, its effectors and the stand-ins that skipped modules land on.

`modulator.at(budget)` is the Method: it releases levels layer by layer and turns them into a Plan.
One checkpoint serves every budget. A budget is a share of the dense FLOPs; the *dial* is the
predictor's own scale, and a table measured on calibration text maps one to the other, so that the
executed share is the budget on such text.

A modulator is saved as `modulator.safetensors` (predictor and stand-ins) and `modulator.json`
(everything else); no pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vesicle.effectors import EFFECTORS, DopaminePrecision, Effector, GabaSparsity, SerotoninDepth
from vesicle.errors import ModelError, VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.folders import set_aside
from vesicle.plan import (
    AttentionDecision,
    Author,
    Equipment,
    FfnDecision,
    FloatArray,
    IntArray,
    Method,
    resting_attention,
    resting_ffn,
    resting_rows,
    visible_blocks,
)
from vesicle.predictors import PREDICTORS, Levels, Predictor, PredictorConfig, State
from vesicle.shapes import ModelShape, Overhead
from vesicle.standins import StandIns
from vesicle.transmitters import NAMES, index

FORMAT = "vesicle-modulator-1"
DECIMALS = 6
"""Released levels are rounded to this many.

One token and many are computed by other routes: rounding makes 0.25 the same level in both.
"""
_WEIGHTS, _CONFIG = "modulator.safetensors", "modulator.json"


def check_budget(budget: float) -> float:
    """The budget, if it is in (0, 1].

    Raises:
        VesicleError: If it is not.
    """
    if not 0 < budget <= 1:
        raise VesicleError(f"budget is {budget}; allowed: above 0, up to 1")
    return float(budget)


_E = TypeVar("_E", bound=Effector)


def _effector(effectors: Mapping[str, Effector], kind: type[_E]) -> _E:
    """The effector of a kind, or its default where there is none."""
    effector = effectors.get(kind.transmitter)
    if effector is None:
        return kind()
    if not isinstance(effector, kind):
        raise ValueError(
            f"{kind.transmitter} needs a {kind.__name__}, got {type(effector).__name__}"
        )
    return effector


@dataclass(kw_only=True)
class ModulatorInfo:
    """What a modulator knows about itself.

    Attributes:
        model_name: The model that it was trained on.
        model: `ModelShape.fingerprint()` of that model.
        dial: (budget, dial) pairs, rising, ending at (1, 1).
        default_budget: Lowest budget whose measured loss is within 1 % of dense; 1 until measured.
        training: Free-form record of how it was trained and measured.
    """

    model_name: str
    model: dict[str, Any]
    dial: list[tuple[float, float]] = field(default_factory=lambda: [(0.05, 0.05), (1.0, 1.0)])
    default_budget: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)


class Modulator(nn.Module):
    """Predictor, effectors and stand-ins for one model."""

    def __init__(
        self,
        predictor: Levels,
        effectors: Mapping[str, Effector],
        info: ModulatorInfo,
        *,
        ffn_standin: StandIns | None = None,
        attention_standin: StandIns | None = None,
    ) -> None:
        """Put the parts together.

        Raises:
            ValueError: If a released transmitter has no effector, or serotonin has no stand-in to
                land on.
        """
        super().__init__()
        for name in predictor.config.transmitters:
            if name not in effectors:
                raise ValueError(
                    f"{name!r} is released but has no effector; known: {list(EFFECTORS)}"
                )
        n_layers, width = predictor.config.n_layers, predictor.config.width
        self.predictor = predictor
        self.effectors = dict(effectors)
        self._dopamine = _effector(effectors, DopaminePrecision)
        self._serotonin = _effector(effectors, SerotoninDepth)
        self._gaba = _effector(effectors, GabaSparsity)
        self.info = info
        self.ffn_standin = ffn_standin or StandIns(n_layers, width, 1)
        self.attention_standin = attention_standin or StandIns(n_layers, width, 1)

    @classmethod
    def new(
        cls,
        shape: ModelShape,
        *,
        model_name: str = "",
        predictor: str = "linear",
        transmitters: tuple[str, ...] = ("dopamine", "serotonin", "gaba"),
        hidden: int = 16,
        effectors: Mapping[str, Effector] | None = None,
        ffn_rank: int = 32,
        attention_rank: int = 16,
    ) -> Modulator:
        """An untrained modulator for a model of `shape`.

        Raises:
            VesicleError: For an unknown kind of predictor.
        """
        if predictor not in PREDICTORS:
            raise VesicleError(f"predictor is {predictor!r}; allowed: {', '.join(PREDICTORS)}")
        config = PredictorConfig(
            n_layers=shape.n_layers, width=shape.width, transmitters=transmitters, hidden=hidden
        )
        chosen = {name: EFFECTORS[name]() for name in transmitters if name in EFFECTORS}
        return cls(
            PREDICTORS[predictor](config),
            {**chosen, **(effectors or {})},
            ModulatorInfo(model_name=model_name, model=shape.fingerprint()),
            ffn_standin=StandIns(shape.n_layers, shape.width, ffn_rank),
            attention_standin=StandIns(shape.n_layers, shape.width, attention_rank),
        )

    def with_levels(self, levels: Levels) -> Modulator:
        """This modulator's effectors and stand-ins under other levels: how controls are built."""
        return Modulator(
            levels,
            self.effectors,
            self.info,
            ffn_standin=self.ffn_standin,
            attention_standin=self.attention_standin,
        )

    @property
    def dopamine(self) -> DopaminePrecision:
        """The dopamine effector (a resting default if there is none)."""
        return self._dopamine

    @property
    def serotonin(self) -> SerotoninDepth:
        """The serotonin effector."""
        return self._serotonin

    @property
    def gaba(self) -> GabaSparsity:
        """The GABA effector."""
        return self._gaba

    @property
    def equipment(self) -> Equipment:
        """What executors need to run this modulator's Plans."""
        return Equipment(
            ffn_standin=self.ffn_standin,
            attention_standin=self.attention_standin,
            summary=self.gaba.summary,
        )

    def dial(self, budget: float) -> float:
        """The predictor's dial for a budget, from the measured table.

        Raises:
            VesicleError: If the budget is outside (0, 1].
        """
        check_budget(budget)
        if budget == 1:
            return 1.0
        budgets, dials = zip(*self.info.dial, strict=True)
        return float(np.interp(budget, budgets, dials))

    def at(self, budget: float) -> ModulatorMethod:
        """The Method that serves `budget`, a share of the dense FLOPs in (0, 1]."""
        return ModulatorMethod(self, self.dial(budget))

    def release(
        self, layer: int, hidden: Tensor, positions: Tensor, dial: Tensor, state: State
    ) -> Tensor:
        """Levels (B, T, 5) of all five transmitters; those not released rest at 1."""
        released = self.predictor.release(layer, hidden, positions, dial, state)
        levels = released.new_ones(*released.shape[:-1], len(NAMES))
        columns = [index(name) for name in self.predictor.config.transmitters]
        levels[..., columns] = released
        return levels

    def check_fits(self, shape: ModelShape) -> None:
        """Refuse a model of another shape.

        Raises:
            ModelError: Naming the first size that differs.
        """
        for name, value in shape.fingerprint().items():
            if self.info.model.get(name) != value:
                raise ModelError(
                    f"this modulator was made for {self.info.model_name or 'a model'} with {name} "
                    f"{self.info.model.get(name)}; this model has {value}"
                )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the modulator to a folder, each file atomically.

        Raises:
            VesicleError: If the predictor is a control: those are built, not saved.
        """
        if not isinstance(self.predictor, Predictor):
            raise VesicleError(f"a {self.predictor.kind!r} control cannot be saved as a modulator")
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: t.detach().to("cpu", torch.bfloat16 if "standin" in name else None).contiguous()
            for name, t in self.state_dict().items()
        }
        with atomic_path(folder / _WEIGHTS) as temporary:
            save_file(tensors, temporary)
        write_json(
            folder / _CONFIG,
            {
                "format": FORMAT,
                "predictor": {"kind": self.predictor.kind, **asdict(self.predictor.config)},
                "effectors": {name: e.to_dict() for name, e in self.effectors.items()},
                "ffn_rank": self.ffn_standin.rank,
                "attention_rank": self.attention_standin.rank,
                **asdict(self.info),
            },
        )

    @classmethod
    def from_pretrained(cls, source: Path | str) -> Self:
        """Read a modulator from a folder, or from the Hugging Face hub by id.

        Raises:
            VesicleError: If it is missing, corrupt or of another format.
        """
        folder = Path(source)
        if not folder.exists():
            from huggingface_hub import snapshot_download

            try:
                folder = Path(snapshot_download(str(source), allow_patterns=[_WEIGHTS, _CONFIG]))
            except Exception as error:
                raise VesicleError(
                    f"no modulator at {str(source)!r}: not a folder, and the hub says: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        values = read_json(folder / _CONFIG)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise VesicleError(f"{folder / _CONFIG} is not a {FORMAT} file")
        try:
            modulator = cls._from_dict(values)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise VesicleError(f"{folder / _CONFIG}: {error}") from error
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(folder / _WEIGHTS)
            modulator.load_state_dict({k: v.float() for k, v in tensors.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            line = " ".join(str(error).split())
            raise VesicleError(f"cannot read {folder / _WEIGHTS}: {line}") from error
        return modulator.eval()

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> Self:
        known = {"format", "predictor", "effectors", "ffn_rank", "attention_rank"}
        unknown = set(values) - known - {f.name for f in fields(ModulatorInfo)}
        if unknown:
            raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
        predictor = dict(values["predictor"])
        kind = predictor.pop("kind")
        predictor["transmitters"] = tuple(predictor["transmitters"])
        config = PredictorConfig(**predictor)
        if kind not in PREDICTORS:
            raise ValueError(f"predictor is {kind!r}; allowed: {', '.join(PREDICTORS)}")
        effectors = {}
        for name, settings in values["effectors"].items():
            if name not in EFFECTORS:
                raise ValueError(f"no effector for {name!r}; known: {', '.join(EFFECTORS)}")
            effectors[name] = EFFECTORS[name].from_dict(settings)
        info = ModulatorInfo(
            model_name=values["model_name"],
            model=values["model"],
            dial=[(float(a), float(b)) for a, b in values["dial"]],
            default_budget=float(values["default_budget"]),
            training=values["training"],
        )
        return cls(
            PREDICTORS[kind](config),
            effectors,
            info,
            ffn_standin=StandIns(config.n_layers, config.width, values["ffn_rank"]),
            attention_standin=StandIns(config.n_layers, config.width, values["attention_rank"]),
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload to the Hugging Face hub; returns the repository's address.

        Raises:
            VesicleError: If the hub refuses.
        """
        import tempfile

        from huggingface_hub import HfApi

        try:
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                api = HfApi()
                address = api.create_repo(repo_id, private=private, exist_ok=True)
                api.upload_folder(repo_id=repo_id, folder_path=folder)
        except Exception as error:
            raise VesicleError(
                f"cannot push to {repo_id!r}: {str(error).splitlines()[0]}"
            ) from error
        return str(address)

    def describe(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(asdict(self.info), indent=2)


class ModulatorMethod(Method):
    """A modulator at one position of its dial."""

    def __init__(self, modulator: Modulator, dial: float) -> None:
        """Serve `dial` in (0, 1]."""
        self.modulator = modulator
        self.dial_position = dial

    @property
    def at_rest(self) -> bool:
        """Whether every level is 1 by construction, so that nothing need be predicted."""
        return self.dial_position >= 1 and isinstance(self.modulator.predictor, Predictor)

    def overhead(self, shape: ModelShape) -> Overhead:
        """What the modulator adds to the model's own work."""
        modulator = self.modulator
        if self.at_rest:
            return Overhead()
        return replace(
            super().overhead(shape),
            modulator_flops=modulator.predictor.flops,
            modulator_bytes=modulator.predictor.weights_read * 4,
        )

    @property
    def equipment(self) -> Equipment:
        """The modulator's stand-ins and block summary."""
        return self.modulator.equipment

    def author(self, shape: ModelShape) -> ModulatorAuthor:
        """A fresh author."""
        self.modulator.check_fits(shape)
        return ModulatorAuthor(self, shape)


class ModulatorAuthor(Author):
    """Writes one sequence's Plan from released levels; keeps the levels for reports.

    Attributes:
        state: What the predictor carries from token to token, by layer.
    """

    def __init__(self, method: ModulatorMethod, shape: ModelShape) -> None:
        """Start a sequence."""
        self.modulator = method.modulator
        self.dial = method.dial_position
        self._rests = method.at_rest
        self._shape = shape
        self._columns = [index(name) for name in self.modulator.predictor.config.transmitters]
        self.state: State = {}
        self._next: AttentionDecision | None = None
        self._levels: list[FloatArray] = []

    @property
    def rests(self) -> bool:
        """Whether the dial is at rest."""
        return self._rests

    @property
    def vocabulary(self) -> int:
        """Words of the model that the sequence is of."""
        return self._shape.vocabulary

    @property
    def reads_hidden(self) -> bool:
        """Whether levels depend on hidden states: not at rest, and not those of controls."""
        return not self._rests and isinstance(self.modulator.predictor, Predictor)

    def planned(self, positions: IntArray) -> dict[str, IntArray] | None:
        """At rest and for controls, everything."""
        if self._rests:
            return resting_rows(self._shape, positions)
        if self.reads_hidden:
            return None
        return plan_rows(self.modulator, self._shape, self.foreseen(positions), positions)

    def foreseen(self, positions: IntArray) -> FloatArray:
        """Levels (T, L, 5) of coming tokens, where they depend on no hidden state."""
        levels = np.ones((len(positions), self._shape.n_layers, len(NAMES)))
        if not self._rests:
            nothing = torch.zeros(1, len(positions), 0)
            places, dial = torch.from_numpy(positions)[None], torch.tensor([self.dial])
            for layer in range(self._shape.n_layers):
                released = self.modulator.predictor.release(layer, nothing, places, dial, {})
                levels[:, layer, self._columns] = released[0].double().numpy()
        return levels.round(DECIMALS)

    def adopt(self, levels: FloatArray) -> None:
        """Keep the levels (T, L, 5) of tokens for which an executor released them itself."""
        self._levels.append(levels)

    def attention(self, layer: int, positions: IntArray) -> AttentionDecision:
        """Decided by the previous layer's release; the first layer rests."""
        if layer == 0 or self._next is None:
            return resting_attention(self._shape, positions)
        return self._next

    def release(self, layer: int, hidden: Tensor, positions: IntArray) -> FfnDecision:
        """Release levels for the tokens' hidden states (T, D) and decide."""
        n = len(positions)
        if layer == 0:
            self._levels.append(np.ones((n, self._shape.n_layers, len(NAMES))))
        if self._rests:
            return resting_ffn(self._shape, n)
        predictor = self.modulator.predictor
        table = np.ones((n, len(NAMES)))
        if n == 1 and hidden.device.type == "cpu":
            table[0, self._columns] = predictor.release_row(
                layer, hidden[0], int(positions[0]), self.dial, self.state
            )
        else:
            with torch.no_grad():
                released = predictor.release(
                    layer,
                    hidden[None],
                    torch.from_numpy(positions)[None].to(hidden.device),
                    torch.tensor([self.dial], device=hidden.device),
                    self.state,
                )
            table[:, self._columns] = released[0].double().cpu().numpy()
        table = table.round(DECIMALS)
        self._levels[-1][:, layer] = table
        self._next = decide_attention(self.modulator, self._shape, table, positions)
        return decide_ffn(self.modulator, self._shape, table)

    def head(self, hidden: Tensor, positions: IntArray) -> IntArray:
        """Decided by the last layer's release for the same tokens."""
        if self._rests or not self.modulator.dopamine.head_survivors:
            return np.zeros(len(positions), np.int32)
        levels = self._levels[-1][-len(positions) :, -1, _DOPAMINE]
        return self.modulator.dopamine.head(levels, self._shape.vocabulary)

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5) so far."""
        if not self._levels:
            return np.ones((0, self._shape.n_layers, len(NAMES)))
        return np.concatenate(self._levels)


_DOPAMINE, _SEROTONIN, _GABA = index("dopamine"), index("serotonin"), index("gaba")


def decide_attention(
    modulator: Modulator, shape: ModelShape, levels: FloatArray, positions: IntArray
) -> AttentionDecision:
    """The next layer's attention decision from levels (T, 5)."""
    dopamine = levels[:, _DOPAMINE]
    effector = modulator.dopamine
    bits = effector.bits(dopamine)
    return AttentionDecision(
        channels=effector.channels(dopamine, slice(0, 2), np.array(shape.site_widths[:2])),
        bits=np.repeat(bits[:, None], 2, axis=1),
        run=modulator.serotonin.run(levels[:, _SEROTONIN]),
        kv_blocks=modulator.gaba.blocks(levels[:, _GABA], visible_blocks(positions)),
        rest=False,
    )


def decide_ffn(modulator: Modulator, shape: ModelShape, levels: FloatArray) -> FfnDecision:
    """This layer's FFN decision from levels (T, 5)."""
    dopamine = levels[:, _DOPAMINE]
    effector = modulator.dopamine
    bits = effector.bits(dopamine)
    return FfnDecision(
        channels=effector.channels(dopamine, slice(2, 4), np.array(shape.site_widths[2:])),
        bits=np.repeat(bits[:, None], 2, axis=1),
        module=modulator.serotonin.module(levels[:, _SEROTONIN]),
        rest=False,
    )


def plan_rows(
    modulator: Modulator, shape: ModelShape, levels: FloatArray, positions: IntArray
) -> dict[str, IntArray]:
    """Rows of every field of a Plan from levels (T, L, 5) of tokens at `positions` (T,).

    Levels released by layer l govern FFN l and attention l + 1; the first attention layer rests.
    The LM head is screened where dopamine allows it; executors do so only if nothing but the
    likeliest token is asked for.
    """
    t, n_layers, _ = levels.shape
    ffn = decide_ffn(modulator, shape, levels.reshape(-1, len(NAMES)))
    first = resting_attention(shape, positions)
    later = decide_attention(
        modulator,
        shape,
        levels[:, :-1].reshape(-1, len(NAMES)),
        np.repeat(positions, n_layers - 1),
    )

    def layers(rest: IntArray, decided: IntArray) -> IntArray:
        return np.concatenate([rest[:, None], decided.reshape(t, n_layers - 1, *rest.shape[1:])], 1)

    dopamine, head = modulator.dopamine, np.zeros(t, np.int32)
    if dopamine.head_survivors and shape.screens_head:
        head = dopamine.head(levels[:, -1, _DOPAMINE], shape.vocabulary)
    return {
        "channels": np.concatenate(
            [layers(first.channels, later.channels), ffn.channels.reshape(t, n_layers, 2)], axis=2
        ),
        "bits": np.concatenate(
            [layers(first.bits, later.bits), ffn.bits.reshape(t, n_layers, 2)], axis=2
        ),
        "ffn": ffn.module.reshape(t, n_layers),
        "attention": layers(first.run, later.run),
        "kv_blocks": layers(first.kv_blocks, later.kv_blocks),
        "head": head,
    }


def keep_modulator(folder: Path, say: Callable[[str], None]) -> None:
    """Before another is saved to a folder: keep a copy of the one it holds, and tell where.

    Raises:
        VesicleError: It cannot be kept.
    """
    kept = set_aside(folder, (_CONFIG, _WEIGHTS), copy=True)
    if kept is not None:
        say(f"the modulator that was in {folder} is kept in {kept}")
