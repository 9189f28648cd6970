"""Who takes part: this engine in several settings, and the rivals it is measured against.

A contender is plain data. It travels to its worker as JSON, and `runners` makes it run there, so
that the parent imports none of the libraries that it measures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vesicle.errors import VesicleError

REST, OVERHEAD, BUDGET = "rest", "overhead", "budget"
ENGINE, HUGGING_FACE, LLAMA_CPP = "engine", "huggingface", "llamacpp"
OPENVINO, ONNX = "openvino", "onnx"
READ_GGUF = (LLAMA_CPP, OPENVINO)
"""Runners that take the model as a GGUF file."""

REQUANTISED = {"llamacpp-q4_0": "Q4_0", "llamacpp-q4_k_s": "Q4_K_S"}
"""Rivals that read the GGUF file's weights in another format, with its name."""

RIVALS = {
    "hf": HUGGING_FACE,
    "hf-bf16": HUGGING_FACE,
    "llamacpp": LLAMA_CPP,
    **dict.fromkeys(REQUANTISED, LLAMA_CPP),
    "openvino": OPENVINO,
    "onnx": ONNX,
}
"""Names that `--against` takes, with the runner of each."""

DEVICES = ("cpu",)

_NEEDS = {
    HUGGING_FACE: ("transformers", "pip install transformers"),
    LLAMA_CPP: ("llama_cpp", "pip install 'vesicle[bench]'"),
    OPENVINO: ("openvino_genai", "pip install 'vesicle[openvino]'"),
    ONNX: ("onnxruntime_genai", "pip install 'vesicle[onnx]'"),
}
"""What a rival's runner imports, and what installs it."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way of running the model.

    Attributes:
        name: Of its rows; unique within a run.
        runner: `engine`, `huggingface`, `llamacpp`, `openvino` or `onnx`.
        model: The model's folder, as converted for ONNX; its GGUF file for those of `READ_GGUF`.
        threads: Of its computations.
        device: One of `DEVICES`.
        mode: Of the engine: `rest`, `overhead` (levels computed, nothing skipped), `budget`, or
            `gaba` (every query reads a share of the KV blocks).
        modulator: Its folder or hub id, for the modes that have one.
        budget: Of mode `budget`; the modulator's own by default.
        goal: Of mode `budget`: `time` (transmitters that save none here rest) or `flops`.
        share: Of mode `gaba`, the share of blocks.
        weights: Weight format of the engine, or number format of Hugging Face.
        kv: Cache format of the engine.
    """

    name: str
    runner: str
    model: str
    threads: int
    device: str = "cpu"
    mode: str = REST
    modulator: str | None = None
    budget: float | None = None
    goal: str | None = None
    share: float | None = None
    weights: str | None = None
    kv: str | None = None

    @property
    def is_rival(self) -> bool:
        """Whether it is not this engine."""
        return self.runner != ENGINE

    @property
    def same_model(self) -> bool:
        """Whether it leaves nothing out, so that its greedy tokens should be those of `rest`."""
        if self.is_rival:
            return self.name not in REQUANTISED and self.runner != ONNX
        return self.mode in (REST, OVERHEAD)

    @property
    def is_fed(self) -> bool:
        """Whether a step feeds it the text's own next token; OpenVINO goes on by itself."""
        return self.runner != OPENVINO

    def record(self) -> dict[str, Any]:
        """The settings as a report keeps them: without the folders of one machine."""
        modulator = self.modulator
        return {
            **asdict(self),
            "model": Path(self.model).name,
            "modulator": None if modulator is None else Path(modulator).name,
        }

    def environment(self) -> dict[str, str]:
        """Environment variables of its worker, set before any library is loaded.

        Each contender gets what its users get: `vesicle run` has its threads sleep while they wait,
        the others keep their libraries' defaults. A policy that the user has set serves all.
        """
        variables = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        if not self.is_rival:
            variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")
        return variables


def line_up(
    *,
    folder: Path,
    files: Mapping[str, Path],
    modulator: str | None,
    budget: float | None,
    overhead: bool,
    gaba: tuple[float, ...],
    against: tuple[str, ...],
    threads: int,
    goal: str = "time",
    device: str = "cpu",
    weights: str | None = None,
    kv: str | None = None,
) -> list[Contender]:
    """The contenders of a run, `rest` first.

    Args:
        folder: The model, as `resolve_model` returns.
        files: The same model for rivals that do not read the folder, by rival.
        modulator: Its folder or hub id; without one there is no `budget`.
        budget: Share of the dense FLOPs; the modulator's own by default.
        overhead: Whether the modulator at rest takes part.
        gaba: Shares of KV blocks, one contender each.
        against: Names from `RIVALS`.
        threads: Of each.
        goal: What the budget is to save, `time` or `flops`.
        device: One of `DEVICES`.
        weights: Weight format of the engine; its own by default.
        kv: Cache format of the engine; its own by default.

    Raises:
        VesicleError: A name, share or device is unknown, something is not installed, or what a
            contender needs was not given.
    """
    if device not in DEVICES:
        raise VesicleError(
            f"--device is {device!r}; allowed: {', '.join(DEVICES)} (this engine runs on no other)"
        )
    for share in gaba:
        if not 0 < share < 1:
            raise VesicleError(f"--gaba is {share:g}; allowed: above 0 and below 1")
    if overhead and modulator is None:
        raise VesicleError("--overhead has nothing to measure: this model has no --modulator")

    def engine(name: str, mode: str, **settings: str | float | None) -> Contender:
        return Contender(
            name=name,
            runner=ENGINE,
            model=str(folder),
            threads=threads,
            device=device,
            mode=mode,
            weights=weights,
            kv=kv,
            **settings,  # type: ignore[arg-type]  # fields by name
        )

    entries = [engine(REST, REST)]
    if overhead:
        entries.append(engine(OVERHEAD, OVERHEAD, modulator=modulator))
    if modulator is not None:
        entries.append(engine(BUDGET, BUDGET, modulator=modulator, budget=budget, goal=goal))
    entries += [engine(f"gaba-{share:g}", "gaba", share=share) for share in gaba]
    for name in against:
        entries.append(_rival(name, folder, files, threads, device))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise VesicleError(f"contender {name} is asked for twice")
    return entries


def check_installed(against: tuple[str, ...]) -> None:
    """Refuse rivals that are unknown or not installed, before anything is loaded.

    Raises:
        VesicleError: With what installs it.
    """
    for name in against:
        if name not in RIVALS:
            raise VesicleError(f"--against is {name!r}; allowed: {', '.join(RIVALS)}")
        module, remedy = _NEEDS[RIVALS[name]]
        if find_spec(module) is None:
            raise VesicleError(f"--against {name} needs {module}, not installed here: {remedy}")


def _rival(
    name: str, folder: Path, files: Mapping[str, Path], threads: int, device: str
) -> Contender:
    check_installed((name,))
    runner = RIVALS[name]
    if runner in READ_GGUF and name not in files:
        raise VesicleError(f"--against {name} needs this model as a GGUF file: name it with --gguf")
    return Contender(
        name=name,
        runner=runner,
        model=str(files.get(name, folder)),
        threads=threads,
        device=device,
        weights="bfloat16" if name == "hf-bf16" else None,
    )
