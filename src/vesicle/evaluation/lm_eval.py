"""EleutherAI's lm-evaluation-harness on our engine, with the modulator's decisions active.

    python -m vesicle.evaluation.lm_eval --model vesicle --model_args budget=0.8 --tasks ...

registers the model `vesicle` and hands over to lm_eval's own command line. From Python, importing
this module registers it, and `lm_eval.simple_evaluate(model="vesicle", ...)` knows the name.

Every request is computed by the engine under the Plan that the modulator writes for its tokens:

- *Log-likelihoods* come from forward passes over context and continuation. What requests begin with
  in common is read once (`Engine.fork`), and the rest of a few requests side by side. The LM head
  runs for the positions that are scored, and for up to `MANY` - 1 before them: the engine computes
  passes of fewer tokens by another route, which rounds activations (see `docs/engine.md`), so each
  request has `MANY` tokens in a pass if it has that many. Where passes are cut changes rounding and
  nothing else.
- *Texts* are written by the scheduler, `batch_size` at a time; prompts are read from the start.

Tokenizer and chat template are those of transformers, so prompts are the ones that lm_eval's own
model `hf` gets.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vesicle import __version__
from vesicle.cost import Cost, price_dense
from vesicle.engine import Engine, Sampling
from vesicle.engine.engine import CHUNK
from vesicle.engine.linear import MANY
from vesicle.engine.scheduler import Failed, Finished, Request, Scheduler, Token
from vesicle.errors import ModelError, VesicleError
from vesicle.models import Text, resolve_model
from vesicle.models.default import DEFAULT_MODEL
from vesicle.modulator import Modulator, check_budget
from vesicle.shapes import ModelShape
from vesicle.shipped import is_default_model, load_default_modulator

if TYPE_CHECKING:
    from vesicle.engine.engine import Sequence as EngineSequence
    from vesicle.models.text import TextStream
    from vesicle.plan import Method

USER_ERROR = 2
_MISSING = "lm_eval is not installed: pip install 'vesicle[lm-eval]'"

try:
    import lm_eval.models  # noqa: F401 - its own models, which it adds only if it has none
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry, register_model
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    if __name__ == "__main__":
        print(f"vesicle: error: {_MISSING}", file=sys.stderr)
        sys.exit(USER_ERROR)
    raise ModuleNotFoundError(_MISSING, name="lm_eval") from error

NAME = "vesicle"
"""What `--model` calls it."""

SHIPPED = "shipped"
_SIDE_BY_SIDE = 512
"""Tokens of a pass with logits, which take 100 MB in fp32 at a vocabulary of 49152."""
_PASS = 64
"""About as many tokens as a pass takes time for what does not depend on its tokens."""
_AUTO_BATCH = 8
_MOST_BATCH = 256
_ARGUMENTS = (
    *("model", "modulator", "budget", "weights", "kv", "threads"),
    *("max_length", "max_gen_toks", "seed", "batch_size"),
)
# Values that ask for nothing, by name of the generation argument.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1, None),
    "top_k": (0, -1, None),
    "min_p": (0, None),
    "use_cache": (True,),
}
_OF_SAMPLING = ("top_k", "min_p")
_GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")

_logger = logging.getLogger("lm_eval.vesicle")  # so that lm_eval's settings hold for it


@dataclass
class _Tally:
    """Executed work, and the dense model's for the same tokens."""

    tokens: int = 0
    executed: Cost = field(default_factory=Cost)
    dense: Cost = field(default_factory=Cost)

    def add(self, executed: Cost, dense: Cost, tokens: int) -> None:
        self.tokens += tokens
        self.executed += executed
        self.dense += dense

    def to_dict(self) -> dict[str, Any]:
        """As lm_eval writes it into its results."""
        return {
            "tokens": self.tokens,
            "executed": self.executed.summary(),
            "dense": self.dense.summary(),
            "share": self.executed.ratio(self.dense),
        }


@dataclass(frozen=True)
class _Text:
    """A text to score.

    Attributes:
        ids: Token ids that are read.
        head: Position from where on logits are needed; below 0 where the text is short.
    """

    ids: list[int]
    head: int


@dataclass(frozen=True)
class _Group:
    """Texts that are read side by side.

    Attributes:
        texts: In the order of their token ids.
        shared: Tokens that all begin with, and that are read once; 0 where that is too few.
    """

    texts: list[_Text]
    shared: int


@dataclass(frozen=True)
class _Generation:
    """How one text is to be written."""

    stop: tuple[str, ...]
    ends: frozenset[int]
    most: int
    sampling: Sampling


@dataclass
class _Writing:
    """A text that is being written."""

    place: int
    prompt_tokens: int
    generation: _Generation
    stream: TextStream
    text: str = ""

    def cut(self) -> bool:
        """End the text before its first stop string, and tell whether there was one."""
        found = [self.text.index(s) for s in self.generation.stop if s in self.text]
        if found:
            self.text = self.text[: min(found)]
        return bool(found)


class VesicleLM(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """A model for lm_eval that runs on the engine."""

    def __init__(
        self,
        model: str | None = None,
        modulator: str | None = SHIPPED,
        budget: float | None = None,
        weights: str | None = None,
        kv: str | None = None,
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        pretrained: str | None = None,
        trust_remote_code: bool | None = None,
        **unknown: Any,
    ) -> None:
        """Load a model. lm_eval passes what `--model_args` says, as numbers where it can.

        Args:
            model: A folder, a GGUF file or a hub id; the default model for None.
            modulator: A folder or a hub id; `shipped` for the one that comes with the package;
                `none` or None for the dense model.
            budget: Share of the dense FLOPs, above 0 and up to 1, where all levels rest; by default
                the modulator's own.
            weights: As `Engine.from_pretrained`, or `auto`.
            kv: Likewise.
            threads: Likewise.
            max_length: Most tokens of a sequence; by default the context window.
            max_gen_toks: Most tokens of a text, where a task does not say.
            seed: Of sampled texts; each request adds its own place.
            batch_size: Texts that are written side by side; `auto` for 8. Log-likelihoods are
                computed one by one.
            max_batch_size: lm_eval passes it; it changes nothing.
            device: lm_eval passes it, `cuda:0` where nobody asks; the engine runs on the CPU.
            pretrained: Another name for `model`, as lm_eval's `hf` has it.
            trust_remote_code: lm_eval passes it for data sets; the engine runs no code of a model.
            unknown: Refused.

        Raises:
            VesicleError: An argument is unknown or has a value that is not allowed.
            ModelError: The model cannot be found, read or supported, or the modulator does not fit.
        """
        super().__init__()
        if unknown:
            raise VesicleError(_unknown("model argument", next(iter(unknown)), _ARGUMENTS))
        if pretrained is not None and model is not None:
            raise VesicleError("model and pretrained are both given; they mean the same")
        if budget is not None:
            _number("budget", budget)
            budget = check_budget(budget)
        self.batch_size = _batch_size(batch_size)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks)
        self.seed = _whole("seed", seed, least=0)
        if threads is not None:
            _whole("threads", threads)
        spec = None if (model or pretrained) is None else str(model or pretrained)
        folder = resolve_model(spec)
        self._folder = folder
        self.model_name = DEFAULT_MODEL if spec is None else spec
        self._text = Text.from_folder(folder)
        self._modulator, self.modulator_name = _find_modulator(modulator, folder, budget)
        if self._modulator is not None and budget is None:
            budget = self._modulator.info.default_budget
        self.budget = budget
        self.engine = Engine.from_pretrained(
            folder, weights=_format(weights), kv=_format(kv), threads=threads
        )
        self._method: Method | None = None
        if self._modulator is not None and budget is not None:
            self._method = self._modulator.at(budget)
        self._forks = self._can_fork()  # and refuses a modulator that does not fit
        window = self.engine.config.context_window
        self.max_length = window
        if max_length is not None:
            self.max_length = _whole("max_length", max_length, least=2, most=window)
        self.scoring, self.generation = _Tally(), _Tally()

    # What lm_eval asks about text

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._folder)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ModelError: If the tokenizer names none.
        """
        found = self.tokenizer.eos_token_id
        if found is None and not self._text.eos_ids:
            raise ModelError(f"the tokenizer of {self.model_name} names no end-of-text token")
        return min(self._text.eos_ids) if found is None else int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that is scored without a context."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm_eval's cache of requests."""
        return self.model_name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text.

        Args:
            string: The text.
            add_special_tokens: Whether to add those that the tokenizer adds; by default unless the
                text begins with one, as those from chat templates do.
            kwargs: Nothing is known.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a chat, up to where the model's answer begins or goes on.

        Raises:
            ModelError: The model has no chat template, or the template refuses the chat.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"{self.model_name} has no chat template; leave --apply_chat_template out"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program of its own, and may fail in any way
            raise ModelError(f"the model's chat template failed: {error}") from error
        return str(rendered)

    # Log-likelihoods

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, in windows of at most `max_length`."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            (string,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in rolling]
            counts.append(len(windows) - before)
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum((next(answers)[0] for _ in range(count)), 0.0))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score (key, context ids, continuation ids): nats, and whether greedy would write it."""
        from tqdm import tqdm

        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        cut = 0
        for place, (_, context, continuation) in enumerate(requests):
            if not continuation:
                continue  # of probability 1
            if len(continuation) > self.max_length:
                raise VesicleError(
                    f"a continuation has {len(continuation)} tokens; allowed: {self.max_length}, "
                    "the most of a sequence"
                )
            ids = [*(context or [self.prefix_token_id]), *continuation]
            cut += len(ids) > self.max_length + 1
            # The last token is not read: nothing that follows it is scored.
            wanted[tuple(ids[-(self.max_length + 1) : -1])].append((place, continuation))
        if cut:
            _logger.warning("%d requests exceed %d tokens: beginnings cut", cut, self.max_length)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        bar.update(len(requests) - sum(len(members) for members in wanted.values()))
        before: EngineSequence | None = None
        for group in self._groups(wanted):
            members = [wanted[tuple(text.ids)] for text in group.texts]
            scores = [[[0.0, True] for _ in alike] for alike in members]
            before, rows = self._read(group, before)
            for number, start, logits in rows:
                length = len(group.texts[number].ids)
                self._add_scores(scores[number], members[number], length, start, logits)
            for found, alike in zip(scores, members, strict=True):
                for (place, _), (nats, greedy) in zip(alike, found, strict=True):
                    answers[place] = (nats, bool(greedy))
                    key = requests[place][0]
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[place])
                    bar.update()
        if before is not None:
            before.close()
        bar.close()
        self._tell("scoring", self.scoring)
        return answers

    @staticmethod
    def _add_scores(
        scores: list[list[float]],
        members: list[tuple[int, list[int]]],
        length: int,
        start: int,
        logits: Tensor,
    ) -> None:
        """Add what logits (T, V) of the inputs from `start` on say about each continuation."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chances, best = logits.log_softmax(-1), logits.argmax(-1)
        for score, (_, continuation) in zip(scores, members, strict=True):
            first = length - len(continuation)  # the position that predicts its first token
            begin, end = max(start, first), start + len(logits)
            if begin >= end:
                continue
            labels = torch.tensor(continuation[begin - first : end - first])
            rows = slice(begin - start, end - start)
            score[0] += float(chances[rows].gather(1, labels[:, None]).double().sum())
            score[1] = bool(score[1]) and bool((best[rows] == labels).all())

    def _groups(
        self, wanted: Mapping[tuple[int, ...], list[tuple[int, list[int]]]]
    ) -> Iterator[_Group]:
        """Texts that begin alike, or are short, in groups that are read side by side."""
        group = _Group([], 0)
        for inputs in sorted(wanted):  # so that shared beginnings follow one another
            ids = list(inputs)
            text = _Text(ids, len(ids) - max(MANY, *(len(c) for _, c in wanted[inputs])))
            if not group.texts:
                group = _Group([text], text.head)
                continue
            shared = min(group.shared, text.head, _common(group.texts[0].ids, ids))
            if shared < MANY or not self._forks:
                shared = 0
            texts = [*group.texts, text]
            tokens = sum(len(t.ids) - shared for t in texts)
            again = (group.shared - shared) * (len(group.texts) - 1)  # read by each, not by one
            if tokens <= _SIDE_BY_SIDE and again <= _PASS:
                group = _Group(texts, shared)
            else:
                yield group
                group = _Group([text], text.head)
        if group.texts:
            yield group

    def _read(
        self, group: _Group, before: EngineSequence | None
    ) -> tuple[EngineSequence | None, Iterator[tuple[int, int, Tensor]]]:
        """What a group's texts share, and the logits of the rest of each.

        Args:
            group: What to read.
            before: A sequence to go on from where it begins alike; it is closed.

        Returns:
            A sequence that has read what is shared, None for nothing; and triples of a text's
            number, a position, and its logits (T, V) from there on.
        """
        base, shared, ids = None, group.shared, group.texts[0].ids
        if shared >= MANY:
            start = 0 if before is None else _common(before.token_ids, ids[:shared])
            if start < shared:
                start = min(start, shared - MANY)
            if before is not None and start >= MANY and self._forks:
                base = self.engine.fork(before, start)
            else:
                base, start = self.engine.start(self._method), 0
            for n in _parts(shared - start, CHUNK):
                at = base.length
                self.engine.forward([(base, ids[at : at + n])], "none")
            self._count(base, start, shared)
        if before is not None:
            before.close()
        return base, self._branch(group, base)

    def _branch(
        self, group: _Group, base: EngineSequence | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The logits of each text of a group, beyond what `base` has read of them all."""
        engine, start = self.engine, 0 if base is None else base.length
        if base is not None and len(group.texts) > 1:
            sequences = [engine.fork(base) for _ in group.texts]
        elif base is not None:
            sequences = [base]
        else:
            sequences = [engine.start(self._method) for _ in group.texts]
        heads = [t.head if t.head - start >= MANY else start for t in group.texts]
        pairs = list(zip(sequences, group.texts, heads, strict=True))
        middles = [(s, t.ids[start:head]) for s, t, head in pairs if head > start]
        if middles:
            engine.forward(middles, "none")
        if len(pairs) > 1:
            ends = [(s, t.ids[head:]) for s, t, head in pairs]
            for number, logits in enumerate(engine.forward(ends, "all")):
                yield number, heads[number], logits
        else:
            sequence, text, head = pairs[0]
            for n in _parts(len(text.ids) - head, _SIDE_BY_SIDE):
                at = sequence.length
                yield 0, at, engine.forward([(sequence, text.ids[at : at + n])], "all")[0]
        for sequence, text, head in pairs:
            self._count(sequence, start, len(text.ids), head)
            if sequence is not base:
                sequence.close()

    def _count(
        self, sequence: EngineSequence, start: int, stop: int, head: int | None = None
    ) -> None:
        """Count the work on a sequence's tokens from `start` to `stop`, logits from `head` on."""
        costs = {name: int(v[start:stop].sum()) for name, v in sequence.token_costs.items()}
        executed = Cost(kv_bytes_held=sequence.cache.bytes_held, **costs)
        dense = _dense(self.engine.shape, start, stop, stop if head is None else head)
        self.scoring.add(executed, dense, stop - start)

    def _can_fork(self) -> bool:
        """Whether a sequence can go on from another's; not where a predictor carries state."""
        sequence = self.engine.start(self._method)
        self.engine.forward([(sequence, [0])], "none")
        try:
            self.engine.fork(sequence).close()
        except VesicleError:
            return False
        finally:
            sequence.close()
        return True

    # Texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, ended before the first of its stop strings.

        Raises:
            VesicleError: A generation argument is unknown or has a value that is not allowed, or
                leaves no room for a prompt.
        """
        from tqdm import tqdm

        texts = [""] * len(requests)
        jobs, cut = [], 0
        for place, request in enumerate(requests):
            context, arguments = request.args
            generation = self._generation(arguments, self.seed + place)
            ids = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - generation.most
            cut += len(ids) > room
            jobs.append((place, ids[-room:], generation))
        if cut:
            _logger.warning("%d prompts leave too little room: beginnings cut", cut)
        jobs.sort(key=lambda job: len(job[1]))  # the longest is taken first, from the end
        scheduler = Scheduler(self.engine, max_running=self.batch_size, chunk=CHUNK, prefix_bytes=0)
        writing: dict[int, _Writing] = {}

        def add() -> None:
            place, ids, how = jobs.pop()
            number = scheduler.add(
                Request(
                    prompt=ids,
                    method=self._method,
                    max_new_tokens=how.most,
                    sampling=how.sampling,
                    stop=how.ends,
                )
            )
            writing[number] = _Writing(place, len(ids), how, self._text.stream())

        bar = tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        )
        while len(writing) < self.batch_size and jobs:
            add()
        try:
            for event in scheduler.run():
                match event:
                    case Failed(error=error):
                        raise error
                    case Token(request_id=number, token=token):
                        job = writing[number]
                        job.text += job.stream.push(token)
                        if job.cut():
                            scheduler.cancel(number)
                    case Finished(request_id=number):
                        job = writing.pop(number)
                        texts[job.place] = self._finish(job, event)
                        arguments = requests[job.place].args
                        self.cache_hook.add_partial("generate_until", arguments, texts[job.place])
                        bar.update()
                        if jobs:
                            add()
        finally:
            scheduler.close()
            bar.close()
        self._tell("generation", self.generation)
        return texts

    def _finish(self, job: _Writing, event: Finished) -> str:
        """Count the work of a text that has ended, and give its text."""
        if event.reason != "cancelled":
            job.text += job.stream.flush()
            job.cut()
        n = len(event.sequence.token_costs["flops_head"])
        dense = _dense(self.engine.shape, 0, n, job.prompt_tokens - 1)
        self.generation.add(event.cost, dense, n)
        return job.text

    def _generation(self, arguments: dict[str, Any], seed: int) -> _Generation:
        """What lm_eval's generation arguments ask for.

        Raises:
            VesicleError: One is unknown or has a value that is not allowed.
        """
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        known = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        for name, value in known.items():
            idle = name in _OF_SAMPLING and not known.get("do_sample")
            if name in _GENERATION or idle or value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL:
                allowed = ", ".join(str(v) for v in _NEUTRAL[name])
                raise VesicleError(f"{name} is {value!r}; allowed: {allowed}")
            raise VesicleError(_unknown("generation argument", name, _GENERATION))
        until = [s for s in handle_stop_sequences(known.get("until"), eos=None) if s]
        # A special token has no text, so it is told by its id.
        added = self.tokenizer.get_added_vocab()
        ends = self._text.eos_ids | {int(added[s]) for s in until if s in added}
        most = _whole("max_gen_toks", known["max_gen_toks"], most=self.max_length - 1)
        sampling = Sampling()
        if known.get("do_sample"):
            sampling = Sampling(
                temperature=_number("temperature", known.get("temperature", 1.0)),
                top_p=_number("top_p", known.get("top_p", 1.0)),
                seed=seed,
            )
        return _Generation(tuple(until), frozenset(ends), most, sampling)

    # What was run

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval puts beside its settings in the results: what ran, and what it cost."""
        about = {
            "version": __version__,
            "model": self.model_name,
            "modulator": self.modulator_name,
            "budget": self.budget,
            "weights": self.engine.weights_format,
            "kv": self.engine.pool.kv,
            "threads": torch.get_num_threads(),
            "max_length": self.max_length,
        }
        tallies = {"scoring": self.scoring, "generation": self.generation}
        return {"vesicle": about | {k: t.to_dict() for k, t in tallies.items() if t.tokens}}

    def _tell(self, what: str, tally: _Tally) -> None:
        share = tally.executed.ratio(tally.dense)["flops"]
        _logger.info("%s: %d tokens, %.3f of the dense FLOPs", what, tally.tokens, share)


def _find_modulator(
    spec: str | None, folder: Path, budget: float | None
) -> tuple[Modulator | None, str]:
    """The modulator that `spec` means, and what to call it.

    Raises:
        VesicleError: There is none, and a budget was given.
    """
    if spec is None or str(spec).lower() == "none":
        if budget is not None and budget != 1:
            raise VesicleError(f"budget is {budget}; without a modulator only 1 is allowed")
        return None, "none"
    if spec != SHIPPED:
        return Modulator.from_pretrained(str(spec)), str(spec)
    if is_default_model(folder):
        return load_default_modulator(), SHIPPED
    if budget is not None and budget != 1:
        raise VesicleError(
            f"budget is {budget}, and no modulator is shipped for this model: name one with "
            "modulator=FOLDER"
        )
    _logger.warning("no modulator is shipped for this model, so it runs dense")
    return None, "none"


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown {kind} {name!r}{hint}; allowed: {', '.join(known)}"


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise VesicleError(f"{name} is {value!r}; allowed: a number")
    return float(value)


def _whole(name: str, value: object, *, least: int = 1, most: int | None = None) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        allowed = f"{least} and above" if most is None else f"{least} to {most}"
        raise VesicleError(f"{name} is {value!r}; allowed: whole numbers, {allowed}")
    return value


def _batch_size(value: int | str | None) -> int:
    """Texts side by side; lm_eval's `auto` and `auto:N` leave it to us."""
    if value is None:
        return 1
    if isinstance(value, str) and value.split(":")[0] == "auto":
        return _AUTO_BATCH
    whole = int(value) if isinstance(value, str) and value.isdecimal() else value
    return _whole("batch_size", whole, most=_MOST_BATCH)


def _format(value: str | None) -> str | None:
    return None if value in (None, "auto") else str(value)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    n = min(len(first), len(second))
    differ = np.asarray(first[:n]) != np.asarray(second[:n])
    return int(differ.argmax()) if differ.any() else n


def _parts(n: int, most: int) -> list[int]:
    """As few parts of at most `most` as n can be cut into, as even as can be."""
    count = -(-n // most)
    return [n // count + (i < n % count) for i in range(count)]


@lru_cache(maxsize=4096)
def _dense(shape: ModelShape, start: int, stop: int, head: int) -> Cost:
    """The dense model's cost for tokens `start` to `stop` with logits from `head` on."""
    return price_dense(
        shape, stop - start, first_position=start, with_logits=np.arange(start, stop) >= head
    )


# A second import, as `python -m` makes one beside a task file's, must not register a second class.
if NAME not in model_registry:
    register_model(NAME)(VesicleLM)


def main(arguments: list[str] | None = None) -> int:
    """Run lm_eval's command line with the model `vesicle` registered.

    Args:
        arguments: What follows the program's name; by default the process's own.

    Returns:
        The exit status: 2 for what a person can fix in the model's arguments, told in one line.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *(before[1:] if arguments is None else arguments)]
    try:
        cli_evaluate()
    except VesicleError as error:
        print(f"vesicle: error: {error}", file=sys.stderr)
        return USER_ERROR
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
