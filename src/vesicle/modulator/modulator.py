"""Modulator: a predictor, its effectors and the small modules that skipped ones are replaced by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import Tensor, nn

from vesicle.effectors import EFFECTORS, DopaminePrecision, Effector, GabaSparsity, SerotoninDepth
from vesicle.effectors.rules import Rules
from vesicle.errors import ModelError, VesicleError
from vesicle.modulator.info import Measured, ModulatorInfo, check_budget
from vesicle.phases import NEVER, Phases
from vesicle.plan import StandIns
from vesicle.predictors import TRAINED, Levels, PredictorConfig, State
from vesicle.preview import HeadPreview
from vesicle.shapes import ModelShape
from vesicle.small_modules import LowRankMaps, SmallModule
from vesicle.transmitters import NAMES, index

if TYPE_CHECKING:
    from vesicle.modulator.method import ModulatorMethod
    from vesicle.reading import Reading

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


class Modulator(nn.Module):
    """Predictor, effectors and stand-ins for one model."""

    def __init__(
        self,
        predictor: Levels,
        effectors: Mapping[str, Effector],
        info: ModulatorInfo,
        *,
        ffn_standin: SmallModule | None = None,
        attention_standin: SmallModule | None = None,
        head_preview: HeadPreview | None = None,
    ) -> None:
        """Put the parts together.

        Raises:
            ValueError: If a released transmitter has no effector.
            VesicleError: If a stand-in is of another number of layers, or another width.
        """
        super().__init__()
        for name in predictor.config.transmitters:
            if name not in effectors:
                raise ValueError(
                    f"{name!r} is released but has no effector; known: {list(EFFECTORS)}"
                )
        n_layers, width = predictor.config.n_layers, predictor.config.width
        for module in (ffn_standin, attention_standin):
            if module is not None:
                module.check(n_layers, width)
        if head_preview is not None:
            head_preview.check(width)
        self.predictor = predictor
        self.effectors = dict(effectors)
        self._dopamine = _effector(effectors, DopaminePrecision)
        self._serotonin = _effector(effectors, SerotoninDepth)
        self._gaba = _effector(effectors, GabaSparsity)
        self.info = info
        self.ffn_standin = ffn_standin or LowRankMaps(n_layers, width, 1)
        self.attention_standin = attention_standin or LowRankMaps(n_layers, width, 1)
        self.head_preview = head_preview

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
        if predictor not in TRAINED:
            raise VesicleError(f"predictor is {predictor!r}; allowed: {', '.join(TRAINED)}")
        config = PredictorConfig(
            n_layers=shape.n_layers, width=shape.width, transmitters=transmitters, hidden=hidden
        )
        chosen = {name: EFFECTORS[name]() for name in transmitters if name in EFFECTORS}
        return cls(
            TRAINED[predictor](config),
            {**chosen, **(effectors or {})},
            ModulatorInfo(model_name=model_name, model=shape.fingerprint()),
            ffn_standin=LowRankMaps(shape.n_layers, shape.width, ffn_rank),
            attention_standin=LowRankMaps(shape.n_layers, shape.width, attention_rank),
        )

    def with_levels(self, levels: Levels) -> Modulator:
        """This modulator's effectors and stand-ins under other levels: how controls are built."""
        return Modulator(
            levels,
            self.effectors,
            self.info,
            ffn_standin=self.ffn_standin,
            attention_standin=self.attention_standin,
            head_preview=self.head_preview,
        )

    def with_preview(self, preview: HeadPreview, likeliest: int, logits: int) -> Modulator:
        """This modulator, with the LM head previewed where GABA's last level is below rest.

        Args:
            preview: Of the head.
            likeliest: Words that are ranked exactly where the likeliest alone is asked for.
            logits: Words whose logits are exact where logits are asked for.

        Raises:
            ValueError: If a count is negative.
            VesicleError: If the preview is of another width, or GABA is not released.
        """
        if "gaba" not in self.predictor.config.transmitters:
            raise VesicleError(
                "the LM head is previewed where GABA is released; this modulator releases "
                f"{', '.join(self.predictor.config.transmitters)}"
            )
        gaba = replace(self.gaba, likeliest=likeliest, logits=logits)
        return Modulator(
            self.predictor,
            {**self.effectors, "gaba": gaba},
            self.info,
            ffn_standin=self.ffn_standin,
            attention_standin=self.attention_standin,
            head_preview=preview,
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
    def stand_ins(self) -> StandIns:
        """What executors need to run this modulator's Plans."""
        return StandIns(
            ffn=self.ffn_standin,
            attention=self.attention_standin,
            head=self.head_preview,
            summary=self.gaba.summary,
        )

    def _measured(self, phases: Phases) -> Measured:
        """What was measured of the tokens that a budget counts."""
        info = self.info
        if info.gaba_alone and phases.only("gaba", self.predictor.config.transmitters):
            return info.gaba_alone
        if info.generated is None or phases.ignores_phase(self.predictor.config.transmitters):
            return Measured(dial=info.dial, default_budget=info.default_budget)
        return info.generated

    def default_budget(self, phases: Phases | None = None) -> float:
        """The budget that is served when none is asked for."""
        return self._measured(phases or Phases()).default_budget

    def least_budget(self, phases: Phases | None = None) -> float:
        """The lowest budget that was measured: at a lower one as much is executed as there."""
        return self._measured(phases or Phases()).dial[0][0]

    def below_reach(self, budget: float, phases: Phases | None = None) -> str:
        """A line that says so where less is asked for than what was measured; "" elsewhere.

        Nothing is known of the reach where some transmitters rest, but for GABA alone.
        """
        phases, transmitters = phases or Phases(), self.predictor.config.transmitters
        rests = any(getattr(phases, name) == NEVER for name in transmitters)
        known = not rests or (self.info.gaba_alone and phases.only("gaba", transmitters))
        if not known or budget >= (least := self.least_budget(phases)):
            return ""
        return (
            f"budget {budget:g} is below what this modulator reaches, {least:.2f}: that is served"
        )

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

    def at(
        self,
        budget: float | None = None,
        phases: Phases | None = None,
        reading: Reading | None = None,
    ) -> ModulatorMethod:
        """The Method that serves a budget.

        Args:
            budget: Share in (0, 1] of the dense FLOPs of generated tokens, or of all tokens where
                `phases` has every transmitter act on all of them; `default_budget` for None.
            phases: On which tokens each transmitter acts; on generated ones by default.
            reading: What bounds the cached entries that any token reads besides, in prompts too;
                the budget knows nothing of what that saves.

        Raises:
            VesicleError: If the budget is outside (0, 1].
        """
        from vesicle.modulator.method import ModulatorMethod

        budget = self.default_budget(phases) if budget is None else budget
        return ModulatorMethod(self, self.dial(budget, phases), phases, reading)

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
        wanted, found = self.info.model, shape.fingerprint()
        for name in [*found, *wanted]:
            if wanted.get(name) != found.get(name):
                raise ModelError(
                    f"this modulator was made for {self.info.model_name or 'a model'} with {name} "
                    f"{wanted.get(name)}; this model has {found.get(name)}"
                )

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the modulator to a folder, each file atomically.

        Raises:
            VesicleError: If the predictor is a control: those are built, not saved.
        """
        from vesicle.modulator.saved import save

        save(self, Path(folder))

    @staticmethod
    def from_pretrained(
        source: Path | str, *, revision: str | None = None, token: str | bool | None = None
    ) -> Modulator:
        """Read a modulator from a folder, or from the Hugging Face hub by id.

        Args:
            source: The folder or id.
            revision: Branch, tag or commit of an id; its main branch by default.
            token: For private repositories; by default what the hub's client has saved.

        Raises:
            VesicleError: If it is missing, corrupt or of another format.
        """
        from vesicle.modulator.saved import load

        return load(source, revision, token)

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
