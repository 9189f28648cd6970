"""A modulator on disk: `modulator.safetensors`, its numbers, and `modulator.json`, all else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from vesicle.effectors import EFFECTORS
from vesicle.errors import VesicleError
from vesicle.files import atomic_path, read_json, write_json
from vesicle.folders import set_aside
from vesicle.models.finite import check_finite
from vesicle.models.hub import fetch, local_path
from vesicle.modulator.info import Dial, Measured, ModulatorInfo
from vesicle.modulator.modulator import Modulator
from vesicle.predictors import TRAINED, Predictor, PredictorConfig
from vesicle.preview import HeadPreview
from vesicle.small_modules import KINDS, LowRankMaps, SmallModule, of_size

FORMAT = "vesicle-modulator-1"
_WEIGHTS, _CONFIG = "modulator.safetensors", "modulator.json"
_SMALL = {"ffn_standin": "ffn_rank", "attention_standin": "attention_rank"}
"""Where the config has the rank of low-rank maps; it has the whole `size` of other small modules,
by the name of the attribute."""
_PREVIEW = "head_rank"
"""Where it has the rank of the LM head's preview, if there is one."""


def save(modulator: Modulator, folder: Path) -> None:
    """Write the modulator to a folder, each file atomically.

    Raises:
        VesicleError: If the predictor is a control: those are built, not saved; or if a stand-in is
            of no kind that can be read again, or does not fit.
    """
    if not isinstance(modulator.predictor, Predictor):
        raise VesicleError(f"a {modulator.predictor.kind!r} control cannot be saved as a modulator")
    for name in _SMALL:
        _check_small(name, getattr(modulator, name), modulator)
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"standin": torch.bfloat16, "preview": torch.float16}
    tensors = {
        name: t.detach().to("cpu", kinds.get(name.split(".")[0].split("_")[-1])).contiguous()
        for name, t in modulator.state_dict().items()
    }
    with atomic_path(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary)
    write_json(
        folder / _CONFIG,
        {
            "format": FORMAT,
            "predictor": {"kind": modulator.predictor.kind, **asdict(modulator.predictor.config)},
            "effectors": {name: e.to_dict() for name, e in modulator.effectors.items()},
            **_sizes(modulator),
            **asdict(modulator.info),
        },
    )


def load(source: Path | str, revision: str | None, token: str | bool | None) -> Modulator:
    """Read a modulator; arguments and errors as `Modulator.from_pretrained`."""
    folder = _find(source, revision, token)
    values = read_json(folder / _CONFIG)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise VesicleError(f"{folder / _CONFIG} is not a {FORMAT} file")
    try:
        modulator = _from_dict(values)
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


def _from_dict(values: dict[str, Any]) -> Modulator:
    known = {"format", "predictor", "effectors", *_SMALL, *_SMALL.values(), _PREVIEW}
    unknown = set(values) - known - {f.name for f in fields(ModulatorInfo)}
    if unknown:
        raise ValueError(f"unknown setting {sorted(unknown)[0]!r}")
    predictor = dict(values["predictor"])
    kind = predictor.pop("kind")
    predictor["transmitters"] = tuple(predictor["transmitters"])
    config = PredictorConfig(**predictor)
    if kind not in TRAINED:
        raise ValueError(f"predictor is {kind!r}; allowed: {', '.join(TRAINED)}")
    effectors = {}
    for name, settings in values["effectors"].items():
        if name not in EFFECTORS:
            raise ValueError(f"no effector for {name!r}; known: {', '.join(EFFECTORS)}")
        effectors[name] = EFFECTORS[name].from_dict(settings)
    info = ModulatorInfo(
        model_name=values["model_name"],
        model=values["model"],
        dial=_dial(values["dial"]),
        default_budget=float(values["default_budget"]),
        generated=_measured(values.get("generated")),
        gaba_alone=_measured(values.get("gaba_alone")),
        training=values["training"],
    )
    small = {name: _small(name, values, config) for name in _SMALL}
    rank = values.get(_PREVIEW)
    preview = None if rank is None else HeadPreview(rank, config.width)
    return Modulator(TRAINED[kind](config), effectors, info, **small, head_preview=preview)


def _sizes(modulator: Modulator) -> dict[str, Any]:
    """What the config says of the small modules, as `_SMALL` has it."""
    sizes = dict[str, Any]()
    for name, rank in _SMALL.items():
        module = getattr(modulator, name)
        if isinstance(module, LowRankMaps):
            sizes[rank] = module.rank
        else:
            sizes[name] = module.size
    if modulator.head_preview is not None:
        sizes[_PREVIEW] = modulator.head_preview.rank
    return sizes


def _check_small(name: str, module: SmallModule, modulator: Modulator) -> None:
    """Refuse to write what could not be read again."""
    if type(module) not in KINDS.values():
        raise VesicleError(
            f"{name} is a {type(module).__name__}, which cannot be saved; "
            f"allowed: {', '.join(kind.__name__ for kind in KINDS.values())}"
        )
    config = modulator.predictor.config
    module.check(config.n_layers, config.width)
    for parameter, tensor in module.state_dict().items():
        if not tensor.isfinite().all():
            raise VesicleError(f"{parameter} of {name} has numbers that are not finite")


def _small(name: str, values: dict[str, Any], config: PredictorConfig) -> SmallModule:
    """A small module as the config describes it, all zero."""
    size = values.get(name) or {"kind": "low-rank", "rank": values[_SMALL[name]]}
    return of_size(size, config.n_layers, config.width)


def _measured(values: dict[str, Any] | None) -> Measured | None:
    if values is None:
        return None
    return Measured(dial=_dial(values["dial"]), default_budget=float(values["default_budget"]))


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


def keep_modulator(folder: Path, say: Callable[[str], None]) -> None:
    """Before another is saved to a folder: keep a copy of the one it holds, and tell where.

    Raises:
        VesicleError: It cannot be kept.
    """
    kept = set_aside(folder, (_CONFIG, _WEIGHTS), copy=True)
    if kept is not None:
        say(f"the modulator that was in {folder} is kept in {kept}")
