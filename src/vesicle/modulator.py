"""Modulator: a predictor, its effectors and the stand-ins that skipped modules land on.

`modulator.at(budget)` is the Method: it releases levels layer by layer and turns them into a Plan.
One checkpoint serves every budget. A budget is a share of the dense FLOPs of the tokens that it
governs: the generated ones by default (see `phases`), or all. The *dial* is the predictor's own
scale, and a table measured on calibration text maps one to the other, so that the executed share is
the budget on such text. There are two tables, since a generated token costs what it does after a
prompt that was read at rest.

A modulator is saved as `modulator.safetensors` (predictor and stand-ins) and `modulator.json`
(everything else); no pickle.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vesicle.effectors import EFFECTORS, DopaminePrecision, Effector, GabaSparsity, SerotoninDepth
from vesicle.effectors.rules import Rules, decide
from vesicle.errors import ModelError, VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.folders import set_aside
from vesicle.models.finite import check_finite
from vesicle.models.hub import fetch, local_path
from vesicle.phases import EVERYWHERE, Phases, Spans
from vesicle.plan import (
    Author,
    Equipment,
    FloatArray,
    IntArray,
    Method,
    Rows,
    opening,
    resting_rows,
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
    if isinstance(budget, bool | str) or not 0 < budget <= 1:
        raise VesicleError(f"budget is {budget!r}; allowed: above 0, up to 1")
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


Dial = list[tuple[float, float]]
"""(budget, dial) pairs, rising, ending at (1, 1)."""


@dataclass(kw_only=True)
class Measured:
    """What was measured of tokens that are generated after a prompt at rest.

    Attributes:
        dial: As `ModulatorInfo.dial`, of the work on generated tokens.
        default_budget: As `ModulatorInfo.default_budget`, of the loss of generated tokens.
    """

    dial: Dial
    default_budget: float = 1.0


@dataclass(kw_only=True)
class ModulatorInfo:
    """What a modulator knows about itself.

    Attributes:
        model_name: The model that it was trained on.
        model: `ModelShape.fingerprint()` of that model.
        dial: (budget, dial) pairs, rising, ending at (1, 1), where every token is governed.
        default_budget: Lowest budget whose measured loss is within 1 % of dense, where every token
            is governed; 1 until measured.
        generated: The same two where prompts rest; None until measured, and then the others serve.
        training: Free-form record of how it was trained and measured.
    """

    model_name: str
    model: dict[str, Any]
    dial: Dial = field(default_factory=lambda: [(0.05, 0.05), (1.0, 1.0)])
    default_budget: float = 1.0
    generated: Measured | None = None
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

    def rules(self, shape: ModelShape) -> Rules:
        """How all levels become decisions on a model of `shape`."""
        each = (self._dopamine, self._serotonin, self._gaba)
        return tuple(rule for effector in each for rule in effector.rules(shape))

    @property
    def equipment(self) -> Equipment:
        """What executors need to run this modulator's Plans."""
        return Equipment(
            ffn_standin=self.ffn_standin,
            attention_standin=self.attention_standin,
            summary=self.gaba.summary,
        )

    def _measured(self, phases: Phases) -> Measured:
        """What was measured of the tokens that a budget counts."""
        info = self.info
        if info.generated is None or phases.ignores_phase(self.predictor.config.transmitters):
            return Measured(dial=info.dial, default_budget=info.default_budget)
        return info.generated

    def default_budget(self, phases: Phases | None = None) -> float:
        """The budget that is served when none is asked for."""
        return self._measured(phases or Phases()).default_budget

    def least_budget(self, phases: Phases | None = None) -> float:
        """The lowest budget that was measured: at a lower one as much is executed as there."""
        return self._measured(phases or Phases()).dial[0][0]

    def dial(self, budget: float, phases: Phases | None = None) -> float:
        """The predictor's dial for a budget, from the measured table.

        Raises:
            VesicleError: If the budget is outside (0, 1].
        """
        check_budget(budget)
        if budget == 1:
            return 1.0
        budgets, dials = zip(*self._measured(phases or Phases()).dial, strict=True)
        return float(np.interp(budget, budgets, dials))

    def at(self, budget: float | None = None, phases: Phases | None = None) -> ModulatorMethod:
        """The Method that serves a budget.

        Args:
            budget: Share in (0, 1] of the dense FLOPs of generated tokens, or of all tokens where
                `phases` has every transmitter act on all of them; `default_budget` for None.
            phases: On which tokens each transmitter acts; on generated ones by default.

        Raises:
            VesicleError: If the budget is outside (0, 1].
        """
        budget = self.default_budget(phases) if budget is None else budget
        return ModulatorMethod(self, self.dial(budget, phases), phases)

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
    def from_pretrained(
        cls,
        source: Path | str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Read a modulator from a folder, or from the Hugging Face hub by id.

        Args:
            source: The folder or id.
            revision: Branch, tag or commit of an id; its main branch by default.
            token: For private repositories; by default what the hub's client has saved.

        Raises:
            VesicleError: If it is missing, corrupt or of another format.
        """
        folder = _find(source, revision, token)
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
        for name, tensor in tensors.items():
            check_finite(name, tensor, folder / _WEIGHTS)
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
        generated = values.get("generated")
        info = ModulatorInfo(
            model_name=values["model_name"],
            model=values["model"],
            dial=_dial(values["dial"]),
            default_budget=float(values["default_budget"]),
            generated=None
            if generated is None
            else Measured(
                dial=_dial(generated["dial"]), default_budget=float(generated["default_budget"])
            ),
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


def _dial(rows: list[Any]) -> Dial:
    return [(float(budget), float(dial)) for budget, dial in rows]


def _find(source: Path | str, revision: str | None, token: str | bool | None) -> Path:
    """The folder of a modulator, both files in it."""
    lead, accepted = f"no modulator at {str(source)!r}", f"a folder with {_CONFIG} and {_WEIGHTS}"
    accepted += ", or a Hugging Face id such as owner/name"
    folder = local_path(source, lead=lead, accepted=accepted, revision=revision)
    if folder is None:
        folder = fetch(
            str(source),
            (_CONFIG, _WEIGHTS),
            lead=lead,
            accepted=accepted,
            revision=revision,
            token=token,
        )
    if not folder.is_dir():
        raise VesicleError(f"{lead}: it is a file; accepted: {accepted}")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            hint = "; it holds a model" if (folder / "config.json").is_file() else ""
            raise VesicleError(f"{lead}: the folder has no {name}{hint}")
    return folder


class ModulatorMethod(Method):
    """A modulator at one position of its dial.

    Attributes:
        modulator: The modulator.
        dial_position: In (0, 1]; 1 is rest.
        phases: On which tokens each transmitter acts.
    """

    def __init__(self, modulator: Modulator, dial: float, phases: Phases | None = None) -> None:
        """Serve `dial` in (0, 1] on the tokens that `phases` tells."""
        self.modulator = modulator
        self.dial_position = dial
        self.phases = phases or Phases()

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
    def counts_prompt(self) -> bool:
        """Whether a budget is a share of the work on all tokens, not on generated ones alone."""
        return self.phases.ignores_phase(self.modulator.predictor.config.transmitters)

    @property
    def equipment(self) -> Equipment:
        """The modulator's stand-ins and block summary."""
        return self.modulator.equipment

    def author(self, shape: ModelShape) -> ModulatorAuthor:
        """An author for one new sequence on a model of `shape`, without state or levels yet."""
        self.modulator.check_fits(shape)
        return ModulatorAuthor(self, shape)


def served(
    method: Method | Modulator | None, budget: float | None, phases: Phases | None
) -> Method | None:
    """What a caller asked for: a method as it is, or a modulator at a budget and in its phases.

    Raises:
        VesicleError: If the budget is out of range, or it or phases are given to a method; or if
            one of them is none.
    """
    if not isinstance(method, Method | Modulator | None):
        raise VesicleError(
            f"method is {reprlib.repr(method)}; allowed: a Modulator, a Method such as "
            "modulator.at(0.8), or None for the dense model"
        )
    if not isinstance(phases, Phases | None):
        raise VesicleError(f"phases is {reprlib.repr(phases)}; allowed: vesicle.Phases(...)")
    if isinstance(method, Modulator):
        return method.at(budget, phases)
    if budget is not None:
        raise VesicleError("a budget applies to a modulator; this method has its own")
    if phases is not None:
        raise VesicleError("phases apply to a modulator; this method has its own")
    return method


class ModulatorAuthor(Author):
    """Writes one sequence's Plan from released levels; keeps the levels for reports.

    Attributes:
        state: What the predictor carries from token to token, by layer.
    """

    bounded = True  # rules clip, and effectors have checked their ladders

    def __init__(self, method: ModulatorMethod, shape: ModelShape) -> None:
        """Start a sequence of no tokens under `method`, on a model of `shape`."""
        self.modulator = method.modulator
        self.dial = method.dial_position
        self._rests = method.at_rest
        self._shape = shape
        self._rules = self.modulator.rules(shape)
        self._columns = [index(name) for name in self.modulator.predictor.config.transmitters]
        self._phases = EVERYWHERE if method.counts_prompt else method.phases
        self._prompts = Spans()
        self.state: State = {}
        self._released: FloatArray | None = None  # (T, 5) by the layer before, if anything acts
        self._levels: list[FloatArray] = []
        self._pass: tuple[int, State] | None = None  # where the newest began, and the state there

    @property
    def rests(self) -> bool:
        """Whether the dial is at rest."""
        return self._rests

    @property
    def rules(self) -> Rules:
        """How levels become decisions on the model that the sequence is of."""
        return self._rules

    @property
    def reads_hidden(self) -> bool:
        """Whether levels depend on hidden states: not at rest, and not those of controls."""
        return not self._rests and isinstance(self.modulator.predictor, Predictor)

    @property
    def carries_state(self) -> bool:
        """Whether its predictor does."""
        return bool(self.state)

    def prompt(self, start: int, stop: int) -> None:
        """Transmitters rest on the tokens `start` to `stop` as far as `phases` says so."""
        self._prompts.add(start, stop)

    def fork(self, n_tokens: int) -> Author:
        """Levels, prompts and state as after `n_tokens`; state is known at the end alone."""
        read = sum(map(len, self._levels))
        if self.state and n_tokens != read:
            raise VesicleError(
                f"a {self.modulator.predictor.kind!r} predictor carries state from token to "
                f"token; fork after all {read} tokens, not after {n_tokens}"
            )
        other = copy.copy(self)
        other.state = {layer: carried.clone() for layer, carried in self.state.items()}
        other._levels = opening(self._levels, n_tokens)
        other._prompts = self._prompts.opening(n_tokens)
        other._released = other._pass = None
        return other

    def rewind(self, n_tokens: int) -> None:
        """Levels and state as before the pass that was broken off."""
        self._levels = opening(self._levels, n_tokens)
        if self._pass is not None and self._pass[0] == n_tokens:
            self.state = dict(self._pass[1])

    def acting(self, positions: IntArray) -> NDArray[np.bool_]:
        """(T, 5) which transmitters are released, and act, at `positions` (T,)."""
        acting = self._phases.acting(self._prompts.contains(positions))
        released = np.zeros(len(NAMES), bool)
        if not self._rests:
            released[self._columns] = True
        return np.where(released, acting, False).astype(bool)

    def releases(self, positions: IntArray) -> NDArray[np.bool_]:
        """Where any transmitter acts."""
        return np.logical_or.reduce(self.acting(positions), axis=1)

    def planned(self, positions: IntArray) -> Rows | None:
        """At rest and for controls everything; else the leading tokens on which nothing acts."""
        if not self.reads_hidden and not self._rests:
            return plan_rows(self.modulator, self._shape, self.foreseen(positions), positions)
        resting = ~self.releases(positions)
        n = len(resting) if resting.all() else int(resting.argmin())
        return resting_rows(self._shape, positions[:n]) if n or self._rests else None

    def foreseen(self, positions: IntArray) -> FloatArray:
        """Levels (T, L, 5) of coming tokens that depend on no hidden state."""
        levels = np.ones((len(positions), self._shape.n_layers, len(NAMES)))
        acting = self.acting(positions)
        if acting.any():
            nothing = torch.zeros(1, len(positions), 0)
            places, dial = torch.from_numpy(positions)[None], torch.tensor([self.dial])
            for layer in range(self._shape.n_layers):
                released = self.modulator.predictor.release(layer, nothing, places, dial, {})
                levels[:, layer, self._columns] = released[0].double().numpy()
        return np.where(acting[:, None], levels.round(DECIMALS), 1.0)

    def adopt(self, levels: FloatArray) -> None:
        """Keep the levels (T, L, 5) of tokens for which an executor released them itself."""
        self._levels.append(levels)

    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        """Decided by what the layer before released; the first layer rests."""
        if layer > 0 and self._released is not None:
            last = layer == self._shape.n_layers - 1
            decide(self._rules, self._released, positions, rows, next_layer=True, last_layer=last)

    def ffn(self, layer: int, hidden: Tensor, positions: IntArray, rows: Rows) -> None:
        """Release levels for the tokens' hidden states (T, D) and decide."""
        n = len(positions)
        if layer == 0:
            self._pass = int(positions[0]), dict(self.state)
            self._levels.append(np.ones((n, self._shape.n_layers, len(NAMES))))
            self._acting = self.acting(positions)
        acting = self._acting
        governed = np.nonzero(acting.any(1))[0]
        self._released = None
        if not len(governed):
            return
        table = np.ones((n, len(NAMES)))
        table[governed[:, None], self._columns] = self._predict(
            layer,
            hidden if len(governed) == n else hidden[torch.from_numpy(governed)],
            positions[governed],
        )
        table = np.where(acting, table.round(DECIMALS), 1.0)
        if not np.isfinite(table).all():
            raise VesicleError(
                f"levels of layer {layer} are not finite at a position from {positions[0]} to "
                f"{positions[-1]}: the weights, the cache or the modulator are damaged"
            )
        self._levels[-1][:, layer] = self._released = table
        last = layer == self._shape.n_layers - 1
        decide(self._rules, table, positions, rows, next_layer=False, last_layer=last)

    def _predict(self, layer: int, hidden: Tensor, positions: IntArray) -> FloatArray:
        """The predictor's levels (T, A) for hidden states (T, D)."""
        predictor = self.modulator.predictor
        if len(positions) == 1 and hidden.device.type == "cpu":
            row = predictor.release_row(layer, hidden[0], int(positions[0]), self.dial, self.state)
            return np.asarray(row)[None]
        with torch.no_grad():
            released = predictor.release(
                layer,
                hidden[None],
                torch.from_numpy(positions)[None].to(hidden.device),
                torch.tensor([self.dial], device=hidden.device),
                self.state,
            )
        return released[0].double().cpu().numpy()

    @property
    def levels(self) -> FloatArray:
        """Released levels (T, L, 5) so far."""
        if not self._levels:
            return np.ones((0, self._shape.n_layers, len(NAMES)))
        return np.concatenate(self._levels)


def plan_rows(
    modulator: Modulator, shape: ModelShape, levels: FloatArray, positions: IntArray
) -> Rows:
    """Rows (T, L) of a Plan from levels (T, L, 5) of tokens at `positions` (T,).

    Levels released by layer l govern FFN l and attention l + 1; the first attention layer rests.
    The LM head is screened where dopamine allows it; executors do so only if nothing but the
    likeliest token is asked for.
    """
    rows, rules = resting_rows(shape, positions), modulator.rules(shape)
    for layer in range(shape.n_layers):
        last = layer == shape.n_layers - 1
        for released, next_layer in ((layer, False), (layer - 1, True)):
            if released >= 0:
                decide(
                    rules,
                    levels[:, released],
                    positions,
                    rows[:, layer],
                    next_layer=next_layer,
                    last_layer=last,
                )
    return rows


def keep_modulator(folder: Path, say: Callable[[str], None]) -> None:
    """Before another is saved to a folder: keep a copy of the one it holds, and tell where.

    Raises:
        VesicleError: It cannot be kept.
    """
    kept = set_aside(folder, (_CONFIG, _WEIGHTS), copy=True)
    if kept is not None:
        say(f"the modulator that was in {folder} is kept in {kept}")
