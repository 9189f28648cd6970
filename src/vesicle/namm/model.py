"""A NAMM: settings, numbers of its network, gates and ages, a profile; and how it is kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.namm.gates import width_of
from vesicle.namm.networks import KINDS, score, size_of
from vesicle.namm.spectrogram import HOP, N_FFT, N_FREQUENCIES
from vesicle.plan import BLOCK, IntArray
from vesicle.shapes import ModelShape

Array = NDArray[np.float32]
FORMAT = "vesicle-namm-4"
_EARLIER = ("vesicle-namm-1", "vesicle-namm-2", "vesicle-namm-3")
_CONFIG, _NUMBERS = "namm.json", "namm.safetensors"
_ARRAYS = ("parameters", "profile", "gates", "ages")


@dataclass(frozen=True, kw_only=True)
class NammSettings:
    """What a NAMM looks at, and when.

    Attributes:
        network: `bam`, `mlp` or `linear`.
        hidden: Its units; a linear one has none.
        age: Whether the age of an entry is a feature beside the paper's 17 frequencies.
        decays: Whether gates say how fast an entry's worth decays, instead of what it is.
        interval: Tokens between the times at which entries are forgotten, a multiple of 16. The
            paper has 512.
        observes: Of the newest queries before each, whose attention it sees: 32 or more, a multiple
            of 16, at most `interval`. The paper has all of them; fewer cost less.
        sinks: First entries that always stay.
        recent: Newest entries that always stay.

    Raises:
        ValueError: If one is outside what is allowed.
    """

    network: str = "bam"
    hidden: int = 32
    age: bool = True
    decays: bool = False
    interval: int = 128
    observes: int = 64
    sinks: int = 4
    recent: int = 64

    def __post_init__(self) -> None:
        """Check each."""
        if self.network not in KINDS:
            raise ValueError(f"network is {self.network!r}; allowed: {', '.join(KINDS)}")
        if not 1 <= self.hidden <= 1024:
            raise ValueError(f"hidden is {self.hidden}; allowed: 1 to 1024")
        if self.interval < N_FFT or self.interval % BLOCK:
            raise ValueError(
                f"interval is {self.interval}; allowed: multiples of {BLOCK} from {N_FFT}"
            )
        if not N_FFT <= self.observes <= self.interval or self.observes % HOP:
            raise ValueError(
                f"observes is {self.observes}; allowed: multiples of {HOP} from {N_FFT} to the "
                f"interval, {self.interval}"
            )
        for name in ("sinks", "recent"):
            if not 0 <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to {1 << 20}")
        if not self.sinks + self.recent:  # a query that finds nothing to attend to
            raise ValueError("sinks and recent are both 0; allowed: one of them above 0")

    @property
    def n_features(self) -> int:
        """F, numbers that are known of an entry."""
        return N_FREQUENCIES + self.age

    @property
    def n_parameters(self) -> int:
        """P, numbers of the network."""
        return size_of(self.network, self.n_features, self.hidden)


@dataclass(frozen=True, kw_only=True, eq=False)
class Namm:
    """Scores the entries that a KV head holds; below 0 they are to go.

    Attributes:
        settings: What it looks at.
        parameters: (P,) of its network.
        profile: (L, G) added to the scores of each KV head of one model, and the logarithm of its
            part where memory is a fixed share (see `allotment`); empty for no preference, which
            fits any model.
        gates: (L, G, 2 K + 1) of each KV head of one model (see `gates`), whose scores are added to
            the network's; empty for none.
        ages: (L, G) what the logarithm of an entry's age in tokens adds to a gate's score, times
            this; empty for nothing.
        info: What is worth knowing of how it came to be.
    """

    settings: NammSettings = field(default_factory=NammSettings)
    parameters: Array
    profile: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    gates: Array = field(default_factory=lambda: np.zeros((0, 0, 0), np.float32))
    ages: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            VesicleError: If there are too many or too few numbers, or one is not finite.
        """
        wanted = self.settings.n_parameters
        if self.parameters.shape != (wanted,):
            raise VesicleError(
                f"a NAMM has {self.parameters.size} parameters; a {self.settings.network!r} "
                f"network of {self.settings.n_features} features has {wanted}"
            )
        if self.profile.ndim != 2:
            raise VesicleError(
                f"profile of a NAMM has shape {self.profile.shape}; allowed: (layers, KV heads)"
            )
        if self.gates.ndim != 3:
            raise VesicleError(
                f"gates of a NAMM have shape {self.gates.shape}; allowed: (layers, KV heads, "
                "2 head sizes and 1)"
            )
        if self.ages.shape not in ((0, 0), self.gates.shape[:2]):
            raise VesicleError(
                f"ages of a NAMM have shape {self.ages.shape}; allowed: that of its gates' heads, "
                f"{self.gates.shape[:2]}, or none"
            )
        for name in _ARRAYS:
            if not np.isfinite(getattr(self, name)).all():
                raise VesicleError(f"{name} of a NAMM are not all finite")

    @classmethod
    def fresh(cls, settings: NammSettings | None = None, shape: ModelShape | None = None) -> Namm:
        """One that prefers nothing: every entry has the score 0, and the newest stay.

        Args:
            settings: What it looks at; the defaults if none.
            shape: Of the model that it is to have room for a profile of; none by default.
        """
        settings = settings or NammSettings()
        return cls(
            settings=settings,
            parameters=np.zeros(settings.n_parameters, np.float32),
            profile=np.zeros(
                (0, 0) if shape is None else (shape.n_layers, shape.n_kv_heads), np.float32
            ),
        )

    @property
    def n_numbers(self) -> int:
        """Of all that decides."""
        return sum(getattr(self, name).size for name in _ARRAYS)

    @property
    def sees_attention(self) -> bool:
        """Whether its network prefers anything; one that does not need not see anything."""
        return bool(self.parameters.any())

    @property
    def sees_entries(self) -> bool:
        """Whether it looks at more than where entries stand."""
        return self.sees_attention or bool(self.gates.size)

    def for_any_model(self) -> Namm:
        """Its network alone, which another model may use."""
        return Namm(settings=self.settings, parameters=self.parameters, info=self.info)

    def check_fits(self, shape: ModelShape) -> None:
        """Refuse a model whose KV heads it has no profile or gates for.

        Raises:
            VesicleError: If they are of another number of layers or KV heads, or head size.
        """
        self.profile_of(shape)
        size = shape.n_layers, shape.n_kv_heads, width_of(shape.head_size)
        if self.gates.size and self.gates.shape != size:
            raise VesicleError(
                f"a NAMM has gates of {_sizes(self.gates.shape)}; this model has {_sizes(size)}: "
                "make one for it with vesicle evolve"
            )

    def profile_of(self, shape: ModelShape) -> Array:
        """(L, G) the profile of a model's KV heads.

        Raises:
            VesicleError: If it has one, of another number of layers or KV heads.
        """
        size = shape.n_layers, shape.n_kv_heads
        if not self.profile.size:
            return np.zeros(size, np.float32)
        if self.profile.shape != size:
            theirs, ours = (
                f"{layers} layers of {heads} KV heads"
                for layers, heads in (self.profile.shape, size)
            )
            raise VesicleError(
                f"a NAMM has a profile of {theirs}; this model has {ours}: make one for it with "
                "vesicle evolve"
            )
        return self.profile

    def scores(self, spectral: Array, positions: IntArray, length: int) -> Array:
        """(..., n) that the network gives to entries; profile and gates are left out.

        Args:
            spectral: (..., n, 17) as `spectrogram.Averages` has them.
            positions: (..., n) of the entries, rising.
            length: Tokens read.
        """
        features = spectral
        if self.settings.age:
            ages = np.log((length - positions) / length).astype(np.float32) / 2
            features = np.concatenate([spectral, ages[..., None]], axis=-1)
        return score(self.settings.network, self.parameters, features, self.settings.hidden)

    def gated(self, layer: int, head: int, found: Array, positions: IntArray, length: int) -> Array:
        """(n,) scores of a KV head's entries by what its gate has found.

        Args:
            layer: Of the head.
            head: Which one.
            found: (n,) as `gates.gate_scores` has them.
            positions: (n,) of the entries.
            length: Tokens read.
        """
        ages = (length - positions).astype(np.float32)
        if self.settings.decays:
            # The logarithm of b^n, b the sigmoid of what was found and n the entry's age.
            found = -np.logaddexp(0, -found) * ages
        if self.ages.size:
            found = found + self.ages[layer, head] * np.log(ages)
        return found.astype(np.float32)

    def digest(self) -> str:
        """SHA-256 of all that decides, in hexadecimal."""
        found = sha256(json.dumps(asdict(self.settings), sort_keys=True).encode())
        for name in _ARRAYS:
            found.update(getattr(self, name).tobytes())
        return found.hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write it to a folder, each file atomically; what was there is replaced."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / _NUMBERS) as temporary:
            save_file({name: getattr(self, name) for name in _ARRAYS}, temporary)
        write_json(
            folder / _CONFIG,
            {"format": FORMAT, "settings": asdict(self.settings), "info": self.info},
        )

    @staticmethod
    def is_saved(folder: Path) -> bool:
        """Whether `save` has been through in a folder."""
        return (folder / _CONFIG).is_file()  # the last that it writes

    @classmethod
    def load(cls, folder: Path | str) -> Namm:
        """Read what `save` wrote.

        Raises:
            VesicleError: If it is missing, corrupt or no NAMM.
        """
        folder = Path(folder)
        path = folder / _CONFIG
        if not path.is_file():
            raise VesicleError(f"{folder} holds no {_CONFIG}; a NAMM is a folder with one")
        values = read_json(path)
        theirs = values.get("format") if isinstance(values, dict) else None
        if not isinstance(values, dict) or theirs != FORMAT:
            hint = f", but {theirs}: make it anew" if theirs in _EARLIER else ""
            raise VesicleError(f"{path} is not a {FORMAT} file{hint}")
        given, info = values.get("settings"), values.get("info", {})
        known = {f.name for f in fields(NammSettings)}
        if not isinstance(given, dict) or not isinstance(info, dict):
            raise VesicleError(f"{path} has no objects `settings` and `info`")
        if unknown := sorted(set(given) - known):
            raise VesicleError(
                f"{path} has settings {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            settings = NammSettings(**given)
            numbers = load_file(folder / _NUMBERS)
            parts = {name: numbers[name].astype(np.float32) for name in _ARRAYS}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())
            raise VesicleError(f"cannot read the NAMM in {folder}: {line}") from error
        return cls(settings=settings, info=info, **parts)


def _sizes(shape: tuple[int, ...]) -> str:
    layers, heads, width = shape
    return f"{layers} layers of {heads} KV heads of {(width - 1) // 2}"
