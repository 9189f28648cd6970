"""The training loop: a modulator learns to spend a budget where it matters.

The base model stays frozen. For each micro-step some windows of text and one budget b, the dense
model's logits without gradient, then a pass with the modulator at dial b and differentiable masks:

    loss = KL(dense || modulated) + weight CE(text) + price (share - b)^2

so that the dial comes to mean the executed share, and within a share the levels go where they cost
least. Budgets follow a golden-ratio sequence, which spreads any run of consecutive micro-steps
evenly over the range.

Of tasks (`training.lessons`) levels act on the tokens that predict an answer's, as they do where a
model generates: a prompt but for its last token is read at rest, and share and loss are of these.

Everything random is a function of (seed, micro-step), so a run that is killed and started again
continues from its newest checkpoint exactly: on one machine the loss curve is the undisturbed one
to the last digit. The output folder holds

    metrics.jsonl       one line a step and one an evaluation; only `*_s` fields may vary
    checkpoints/        the newest two
    tensorboard/        the same curves, if tensorboard is installed
    modulator.*         the trained modulator, once the run is done
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vesicle import __version__
from vesicle.errors import DataError, VesicleError
from vesicle.files import atomic_path, read_text
from vesicle.folders import locked
from vesicle.modulator import Modulator, ModulatorMethod, keep_modulator
from vesicle.predictors import Predictor
from vesicle.reference.attach import Soft, attach
from vesicle.training.checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from vesicle.training.config import DTYPES, TrainConfig
from vesicle.training.display import curves, progress_bar
from vesicle.training.lessons import Lessons, Order
from vesicle.training.objectives import TemperatureSchedule, budget_penalty, divergence
from vesicle.training.processes import Processes, check_shares

__all__ = ["TrainConfig", "TrainResult", "train"]

READ_OUT = ("offset", "log_slope", "position_weight")
"""Parameters of the shared read-out, which take `scale_learning_rate`."""

_METRICS, _CHECKPOINTS, _TENSORBOARD = "metrics.jsonl", "checkpoints", "tensorboard"
_HARMLESS = ("checkpoint_every", "device")
_DEFAULTS = TrainConfig().to_dict()
"""Of settings that a run did not know when it was begun."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came of a run.

    Attributes:
        step: Optimizer steps done.
        stopped_early: Whether patience ran out.
        metrics: The last step's, and under `held_out` the best evaluation's.
    """

    step: int
    stopped_early: bool
    metrics: dict[str, Any]


def train(
    model: nn.Module,
    modulator: Modulator,
    windows: Tensor | Lessons,
    held_out: Tensor | Lessons | None,
    config: TrainConfig,
    out: Path | str,
    *,
    data: str = "",
    restart: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a modulator, or go on with a run that was cut off; leaves the result in `out`.

    The predictor is trained in place and ends with the parameters that did best on the held-out
    windows (the last ones if there was no evaluation). The model is moved to the configured device
    and dtype; its weights do not change.

    Args:
        model: A Hugging Face causal LM.
        modulator: With a trainable predictor; its stand-ins are used as they are.
        windows: (N, sequence_length) token ids of running text, or lessons of that length.
        held_out: The same for evaluation, (M, sequence_length); None for none.
        config: How to train.
        out: Folder to write to.
        data: What the text is, for the record.
        restart: Begin anew although `out` holds a run.
        tensorboard: Write TensorBoard curves too.
        progress: Show a progress bar on the terminal.
        say: Takes one-line notices; by default they go to standard error.

    Returns:
        How far it came and the final metrics.

    Raises:
        VesicleError: `out` holds a run with other settings, cannot be written or is being written
            by another process, or the loss is not finite.
        DataError: The windows do not fit the configuration.
        KeyboardInterrupt: After Ctrl-C, once the way to resume has been said.
    """
    if not isinstance(modulator.predictor, Predictor):
        raise VesicleError(f"a {modulator.predictor.kind!r} control cannot be trained")
    lessons, kept = _as_lessons(windows), None if held_out is None else _as_lessons(held_out)
    for name, part in (("training", lessons), ("held-out", kept)):
        if part is not None and part.length != config.sequence_length:
            raise DataError(
                f"{name} windows have {part.length} tokens; sequence_length is "
                f"{config.sequence_length}"
            )
    if modulator.predictor.remembers and not lessons.is_text:
        raise VesicleError(
            f"a {modulator.predictor.kind!r} predictor carries state from token to token, which it "
            "would not on prompts that are read at rest; train it on text"
        )
    team = Processes(config.device)
    check_shares(config.accumulation)
    speak = say or (lambda line: print(line, file=sys.stderr))
    if not team.first:
        speak, progress, tensorboard = _silent, False, False
    folder = Path(out)
    with locked(folder) if team.first else nullcontext(), _frozen(model):
        if restart and team.first:
            for name in (_CHECKPOINTS, _TENSORBOARD):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / _METRICS).unlink(missing_ok=True)
        model.to(device=config.device, dtype=DTYPES[config.dtype])
        modulator.to(config.device)
        run = _Run(model, modulator, lessons, kept, config, folder, data, team)
        with team.first_first():
            resumed = run.resume()
        if resumed:
            speak(f"resuming at step {run.step} of {config.steps}")
        elif team.first:
            keep_modulator(folder, speak)
        try:
            return run.finish(_loop(run, tensorboard, progress, speak))
        except KeyboardInterrupt:
            speak(
                f"interrupted; run the same command again to resume from step {run.saved_step} "
                f"of {config.steps}"
            )
            raise


def _loop(run: _Run, tensorboard: bool, progress: bool, speak: Callable[[str], None]) -> bool:
    """Steps up to the end; True if patience ran out."""
    config = run.config
    with (
        curves(run.folder / _TENSORBOARD, run.step, tensorboard, speak) as writer,
        progress_bar("training", config.steps, run.step, progress) as show,
        (run.folder / _METRICS if run.team.first else Path(os.devnull)).open(
            "a", encoding="utf-8"
        ) as file,
    ):
        while run.step < config.steps and not run.out_of_patience:
            lines = [run.train_step()]
            if config.eval_every and run.step % config.eval_every == 0 and run.held_out is not None:
                lines.append(run.evaluate())
            for line in lines:
                file.write(json.dumps(line) + "\n")
                for name in ("loss", "kl", "penalty", "share", "gradient_norm", "learning_rate"):
                    if writer is not None and name in line:
                        writer.add_scalar(f"{line['event']}/{name}", line[name], run.step)
            file.flush()
            show(run.step, _note(lines[0]))
            last = run.step == config.steps or run.out_of_patience
            if last or run.step % config.checkpoint_every == 0:
                if run.team.first:
                    # The curve must be on disk before a checkpoint that counts on it.
                    os.fsync(file.fileno())
                    run.save()
    return run.out_of_patience


def _note(line: dict[str, Any]) -> str:
    return (
        f"loss {line['loss']:.4f}  KL {line['kl']:.4f}  "
        f"share {line['share']:.3f} of {line['budget']:.3f}"
    )


class _Run:
    """The state of a run: everything that a checkpoint must hold."""

    def __init__(
        self,
        model: nn.Module,
        modulator: Modulator,
        windows: Lessons,
        held_out: Lessons | None,
        config: TrainConfig,
        folder: Path,
        data: str,
        team: Processes,
    ) -> None:
        self.model, self.modulator, self.config, self.folder = model, modulator, config, folder
        self.windows, self.held_out, self.team = windows, held_out, team
        self.facts: dict[str, Any] = {
            "config": config.to_dict(),
            "data": data,
            "windows": "+".join(
                part.fingerprint for part in (windows, held_out) if part is not None
            ),
            "standins": _fingerprint(
                *modulator.ffn_standin.parameters(), *modulator.attention_standin.parameters()
            ),
            "model": modulator.info.model,
        }
        self.predictor = modulator.predictor
        named = dict(self.predictor.named_parameters())
        self.rates = (config.learning_rate, config.scale_learning_rate)
        self.optimizer = torch.optim.Adam(
            [
                {"params": [p for n, p in named.items() if n not in READ_OUT]},
                {"params": [p for n, p in named.items() if n in READ_OUT]},
            ],
            foreach=False,
        )
        self.temperature = TemperatureSchedule(
            start=config.temperature_start, end=config.temperature_end
        )
        self.step = self.saved_step = 0
        self.best: dict[str, Tensor] = {}
        self.best_metrics: dict[str, Any] = {}
        self.bad_evaluations = 0
        self.last_metrics: dict[str, Any] = {}
        self._started_s = time.monotonic()
        self._order = Order(windows, config.task_temperature, config.seed)

    # Steps ----------------------------------------------------------------------------------------

    def batch(self, micro_step: int) -> Lessons:
        """The lessons of a micro-step: an order drawn anew for each pass over a task's."""
        size = self.config.batch_size
        chosen = [self._order.at(k) for k in range(micro_step * size, (micro_step + 1) * size)]
        return self.windows.part(torch.tensor(chosen))

    def positions(self, micro_step: int, taught: Tensor) -> Tensor | None:
        """The positions (n,), rising, whose distributions a micro-step compares; None for all.

        Those that predict what is taught (B, T) in one of the lessons at least, or as many of them
        as the configuration says.
        """
        n, told = self.config.loss_positions, _predicting(taught).any(0)
        among = told.nonzero()[:, 0].numpy()
        if n == 0 or n >= len(among):
            return None if len(among) == len(told) else torch.from_numpy(among)
        # The third number keeps these draws apart from the order of the windows.
        generator = np.random.default_rng((self.config.seed, micro_step, 1))
        chosen = generator.choice(among, n, replace=False)
        return torch.from_numpy(np.sort(chosen))

    def losses(
        self, lessons: Lessons, budget: float, temperature: float, positions: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`kl`, `labels`, `penalty` and `share` of lessons at a budget, each a scalar.

        KL and the labels' cross-entropy are means over those of `positions` (n,), or of all, that
        predict what is taught. The share is of what is taught, head included.
        """
        config = self.config
        tokens, taught = (x.to(config.device) for x in (lessons.tokens, lessons.taught))
        text = lessons.is_text
        # transformers takes 0 for all of them.
        keep: Any = 0 if positions is None else positions.to(config.device)
        with torch.no_grad():
            dense = self.model(tokens, use_cache=False, logits_to_keep=keep).logits
        method = ModulatorMethod(self.modulator, budget)
        acts = _predicting(taught)
        soft = Soft(temperature=temperature, acts=None if text else acts)
        with attach(self.model, method, soft=soft) as attached:
            modulated = self.model(tokens, use_cache=False, logits_to_keep=keep).logits
        cost = attached.charged
        share = cost.share if text else cost.share_of(acts)
        pair = (dense, modulated)
        if not text:
            pair = (_counted(dense, taught, positions), _counted(modulated, taught, positions))
        found = {
            "kl": divergence(*pair),
            "penalty": budget_penalty(share, budget, config.price, config.one_sided),
            "share": share,
        }
        if config.label_weight:
            found["labels"] = _label_loss(modulated, tokens, taught, positions)
        return found

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics."""
        config, start_s = self.config, time.monotonic()
        temperature = self.temperature.at(self.step / max(1, config.steps - 1))
        self.optimizer.zero_grad(set_to_none=True)
        names = ["loss", "kl", "penalty", "share", "budget", "gap"]
        names += ["labels"] if config.label_weight else []
        sums = dict.fromkeys(names, 0.0)
        for i in self.team.shared(config.accumulation):
            micro_step = self.step * config.accumulation + i
            budget, lessons = config.budget(micro_step), self.batch(micro_step)
            values = self.losses(
                lessons, budget, temperature, self.positions(micro_step, lessons.taught)
            )
            loss = self._total(values)
            (loss / config.accumulation).backward()
            for name, value in {"loss": loss, **values}.items():
                sums[name] += value.item() / config.accumulation
            sums["budget"] += budget / config.accumulation
            sums["gap"] += abs(values["share"].item() - budget) / config.accumulation
        self.team.add_gradients(self.predictor.parameters())
        sums = dict(zip(sums, self._added(list(sums.values())), strict=True))
        norm = nn.utils.clip_grad_norm_(self.predictor.parameters(), config.clip, foreach=False)
        if not math.isfinite(sums["loss"]) or not math.isfinite(norm.item()):
            raise VesicleError(
                f"step {self.step + 1}: loss {sums['loss']} and gradient norm {norm.item()} are "
                "not both finite; lower learning_rate, or use float32"
            )
        factor = config.rate(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.step += 1
        took_s = time.monotonic() - start_s
        tokens = config.accumulation * config.batch_size * config.sequence_length
        self.last_metrics = {
            "event": "train",
            "step": self.step,
            **sums,
            "gradient_norm": norm.item(),
            "learning_rate": self.rates[0] * factor,
            "temperature": temperature,
            "elapsed_s": round(time.monotonic() - self._started_s, 3),
            "tokens_per_s": round(tokens / took_s, 1),
        }
        return self.last_metrics

    def evaluate(self) -> dict[str, Any]:
        """Held-out loss over budgets spread evenly; keeps the best parameters. Returns its line."""
        assert self.held_out is not None
        config = self.config
        n = min(config.eval_windows, len(self.held_out))
        keys = ("kl", "penalty", "share", *(("labels",) if config.label_weight else ()))
        measured = [[0.0] * len(keys) for _ in range(n)]
        with torch.no_grad():
            for i in self.team.shared(n):
                lesson = self.held_out.part(slice(i, i + 1))
                positions = None if lesson.is_text else self._all_positions(lesson)
                found = self.losses(lesson, self._held_out_budget(i, n), 0.0, positions)
                measured[i] = [found[key].item() for key in keys]
        flat = self._added([value for row in measured for value in row])
        points = [
            {
                "budget": self._held_out_budget(i, n),
                **dict(zip(keys, flat[i * len(keys) : (i + 1) * len(keys)], strict=True)),
            }
            for i in range(n)
        ]
        mean = {key: sum(p[key] for p in points) / n for key in keys}
        line = {
            "event": "eval",
            "step": self.step,
            "loss": self._total(mean),
            **mean,
            "points": points,
        }
        if not self.best_metrics or line["loss"] < self.best_metrics["loss"]:
            self.best_metrics, self.bad_evaluations = line, 0
            self.best = {n: t.detach().clone() for n, t in self.predictor.state_dict().items()}
        else:
            self.bad_evaluations += 1
        return line

    def _held_out_budget(self, i: int, n: int) -> float:
        low, high = self.config.budget_low, self.config.budget_high
        return low + (high - low) * (i + 0.5) / n

    def _all_positions(self, lesson: Lessons) -> Tensor:
        return _predicting(lesson.taught)[0].nonzero()[:, 0]

    def _total(self, values: dict[str, Any]) -> Any:
        """What is minimised, from its parts."""
        return (
            values["kl"] + self.config.label_weight * values.get("labels", 0.0) + values["penalty"]
        )

    def _added(self, values: list[float]) -> list[float]:
        """Sums over all processes."""
        if self.team.count == 1:
            return values
        total: list[float] = self.team.add(
            torch.tensor(values, dtype=torch.float64, device=self.config.device)
        ).tolist()
        return total

    @property
    def out_of_patience(self) -> bool:
        """Whether the last evaluations brought nothing."""
        return 0 < self.config.patience <= self.bad_evaluations

    # Keeping --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step: predictor, best parameters, Adam's and random state."""
        tensors = {f"predictor.{n}": t for n, t in self.predictor.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self.best.items()}
        for name, parameter in self.predictor.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{key}.{name}"] = value
        # Nothing in the loop draws from this generator, but a model or predictor may.
        tensors["rng.torch"] = torch.get_rng_state()
        facts = {
            **self.facts,
            "best_metrics": self.best_metrics,
            "bad_evaluations": self.bad_evaluations,
            "last_metrics": self.last_metrics,
        }
        save_checkpoint(
            self.folder / _CHECKPOINTS, Checkpoint(step=self.step, tensors=tensors, facts=facts)
        )
        self.saved_step = self.step

    def resume(self) -> bool:
        """Take up the newest whole checkpoint, if any, and cut the metrics back to it."""
        checkpoint = newest_checkpoint(self.folder / _CHECKPOINTS)
        if checkpoint is not None:
            self._check_same(checkpoint.facts)
            self._load(checkpoint)
        if self.team.first:
            _cut_back(self.folder / _METRICS, self.step)
        return checkpoint is not None

    def _check_same(self, facts: dict[str, Any]) -> None:
        """Refuse to go on with a run that was started differently."""
        theirs, ours = dict(facts.get("config", {})), dict(self.facts["config"])
        for name in sorted(theirs.keys() | ours.keys()):
            if name not in _HARMLESS and theirs.get(name, _DEFAULTS.get(name)) != ours.get(name):
                raise VesicleError(
                    f"{self.folder} holds a run with {name} {theirs.get(name)}, and now it is "
                    f"{ours.get(name)}: use another folder, or --restart to begin anew"
                )
        for name, what in (
            ("windows", "text or other tasks"),
            ("model", "model"),
            ("standins", "stand-ins"),
        ):
            if facts.get(name) != self.facts[name]:
                raise VesicleError(
                    f"{self.folder} holds a run on another {what}: use another folder, "
                    "or --restart to begin anew"
                )

    def _load(self, checkpoint: Checkpoint) -> None:
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            groups.setdefault(kind, {})[rest] = tensor
        try:
            self.predictor.load_state_dict(groups["predictor"])
        except RuntimeError as error:
            raise VesicleError(
                f"{self.folder} holds a run with another predictor: use another folder, "
                "or --restart to begin anew"
            ) from error
        named = dict(self.predictor.named_parameters())
        for key_and_name, tensor in groups.get("adam", {}).items():
            key, _, name = key_and_name.partition(".")
            parameter = named[name]
            # Adam counts its steps on the CPU.
            self.optimizer.state[parameter][key] = (
                tensor if key == "step" else tensor.to(parameter.device)
            )
        self.best = {n: t.to(self.config.device) for n, t in groups.get("best", {}).items()}
        torch.set_rng_state(groups["rng"]["torch"])
        facts = checkpoint.facts
        self.step = self.saved_step = checkpoint.step
        self.best_metrics, self.last_metrics = facts["best_metrics"], facts["last_metrics"]
        self.bad_evaluations = facts["bad_evaluations"]

    def finish(self, stopped_early: bool) -> TrainResult:
        """Write the trained modulator and its record."""
        if self.best:
            self.predictor.load_state_dict(self.best)
        metrics = {k: v for k, v in self.last_metrics.items() if not k.endswith("_s")}
        if self.best_metrics:
            metrics["held_out"] = self.best_metrics
        import transformers

        self.modulator.info.training = {
            **self.modulator.info.training,
            "config": self.config.to_dict(),
            "seed": self.config.seed,
            "data": self.facts["data"],
            "tokens_per_pass": int(self.windows.tokens.numel()),
            **({} if self.windows.is_text else {"tasks": list(self.windows.names)}),
            "steps": self.step,
            "stopped_early": stopped_early,
            "metrics": metrics,
            "versions": {
                "vesicle": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
        if self.team.first:
            self.modulator.save_pretrained(self.folder)
        return TrainResult(step=self.step, stopped_early=stopped_early, metrics=metrics)


def _as_lessons(windows: Tensor | Lessons) -> Lessons:
    return windows if isinstance(windows, Lessons) else Lessons.of_text(windows)


def _silent(line: str) -> None:
    """What processes say that do not write."""


def _predicting(taught: Tensor) -> Tensor:
    """(B, T) positions that predict what is taught; of running text all, the last one too."""
    if bool(taught.all()):
        return taught
    return torch.cat([taught[:, 1:], torch.zeros_like(taught[:, :1])], dim=1)


def _counted(logits: Tensor, taught: Tensor, positions: Tensor | None) -> Tensor:
    """(1, n, V) of logits (B, T, V), or of some positions, those that predict what is taught."""
    mask = _predicting(taught)
    if positions is not None:
        mask = mask[:, positions.to(mask.device)]
    return logits[mask][None]


def _label_loss(logits: Tensor, tokens: Tensor, taught: Tensor, positions: Tensor | None) -> Tensor:
    """Mean cross-entropy of what is taught, where logits (B, n, V) predict it."""
    wanted = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    counts = torch.cat([taught[:, 1:], torch.zeros_like(taught[:, :1])], dim=1)
    if positions is not None:
        wanted, counts = (x[:, positions.to(x.device)] for x in (wanted, counts))
    each = nn.functional.cross_entropy(logits[counts].float(), wanted[counts], reduction="sum")
    return each / counts.sum().clamp_min(1)  # the last position of text predicts nothing


def _cut_back(path: Path, step: int) -> None:
    """Drop what was written after `step`, a torn last line included."""
    if not path.exists():
        return
    kept = []
    for line in read_text(path).split("\n"):
        try:
            values = json.loads(line)
            if int(values["step"]) > step:
                break
        except (ValueError, LookupError, TypeError):
            break
        kept.append(line + "\n")
    with atomic_path(path) as part:
        part.write_text("".join(kept), encoding="utf-8")


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients of its own; as it was afterwards."""
    wanted = [p.requires_grad for p in model.parameters()]
    training = model.training
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(grad)
