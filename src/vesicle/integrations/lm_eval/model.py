"""EleutherAI's lm-evaluation-harness on our engine, with the modulator's decisions active.

    python -m vesicle.evaluation.lm_eval --model vesicle --model_args budget=0.8 --tasks ...

registers the model `vesicle` and hands over to lm_eval's own command line. From Python, importing
this module registers it, and `lm_eval.simple_evaluate(model="vesicle", ...)` knows the name.

Every request is computed by the engine under the Plan that the modulator writes for its tokens:

- *log-likelihoods* by passes over context and continuation (`lm_eval_scoring.py`);
- *texts* by the scheduler, `batch_size` at a time; prompts are read from the start
  (`lm_eval_generation.py`).

Tokenizer and chat template are those of transformers, so prompts are the ones that lm_eval's own
model `hf` gets.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from vesicle import __version__
from vesicle.engine import Engine
from vesicle.errors import ModelError, VesicleError
from vesicle.integrations.lm_eval.arguments import (
    SHIPPED,
    find_modulator,
    logger,
    number,
    stored_format,
    unknown,
    whole,
    whole_batch,
)
from vesicle.integrations.lm_eval.generation import Job, read_generation, write
from vesicle.integrations.lm_eval.scoring import Continuation, Scorer
from vesicle.integrations.lm_eval.tally import Tally
from vesicle.models import Text, resolve_model
from vesicle.models.default import DEFAULT_MODEL
from vesicle.modulator import check_budget
from vesicle.phases import Phases
from vesicle.terminal import one_line

USER_ERROR = 2
MISSING = "lm_eval is not installed: pip install 'vesicle[lm-eval]'"

try:
    import lm_eval.models  # noqa: F401 - its own models, which it adds only if it has none
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry, register_model
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise ModuleNotFoundError(MISSING, name="lm_eval") from error

NAME = "vesicle"
"""What `--model` calls it."""

_ARGUMENTS = (
    *("model", "modulator", "budget", "phase", "weights", "kv", "threads"),
    *("max_length", "max_gen_toks", "seed", "batch_size"),
)


class VesicleLM(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """A model for lm_eval that runs on the engine."""

    def __init__(
        self,
        model: str | None = None,
        modulator: str | None = SHIPPED,
        budget: float | None = None,
        phase: str | None = None,
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
        **others: Any,
    ) -> None:
        """Load a model. lm_eval passes what `--model_args` says, as numbers where it can.

        Args:
            model: A folder, a GGUF file or a hub id; the default model for None.
            modulator: A folder or a hub id; `shipped` for the one that comes with the package;
                `none` or None for the dense model.
            budget: Share of the dense FLOPs of generated and scored tokens, above 0 and up to 1,
                where all levels rest; by default the modulator's own.
            phase: On which tokens transmitters act: `generated` (the default), `all`, or words such
                as `gaba=all`, with `+` between.
            weights: As `Engine.from_pretrained`, or `auto`.
            kv: Likewise.
            threads: Likewise.
            max_length: Most tokens of a sequence; by default the context window.
            max_gen_toks: Most tokens of a text, where a task does not say.
            seed: Of sampled texts; each request adds its own place.
            batch_size: Texts that are written side by side; `auto` for 8. Log-likelihoods do not
                depend on it.
            max_batch_size: lm_eval passes it; it changes nothing.
            device: lm_eval passes it, `cuda:0` where nobody asks; the engine runs on the CPU.
            pretrained: Another name for `model`, as lm_eval's `hf` has it.
            trust_remote_code: lm_eval passes it for data sets; the engine runs no code of a model.
            others: Refused.

        Raises:
            VesicleError: An argument is unknown or has a value that is not allowed.
            ModelError: The model cannot be found, read or supported, or the modulator does not fit.
        """
        super().__init__()
        if others:
            raise unknown("model argument", next(iter(others)), _ARGUMENTS)
        if pretrained is not None and model is not None:
            raise VesicleError("model and pretrained are both given; they mean the same")
        if budget is not None:
            number("budget", budget)
            budget = check_budget(budget)
        self.phases = Phases.parse(phase.split("+") if phase else ())
        self.batch_size = whole_batch(batch_size)
        self.max_gen_toks = whole("max_gen_toks", max_gen_toks)
        self.seed = whole("seed", seed, least=0)
        if threads is not None:
            whole("threads", threads)
        spec = model or pretrained
        self.model_name = DEFAULT_MODEL if spec is None else str(spec)
        self._folder = resolve_model(None if spec is None else str(spec))
        self._text = Text.from_folder(self._folder)
        decides, self.modulator_name = find_modulator(modulator, self._folder, budget)
        if decides is not None and budget is None:
            budget = decides.default_budget(self.phases)
        self.budget = budget
        self.engine = Engine.from_pretrained(
            self._folder, weights=stored_format(weights), kv=stored_format(kv), threads=threads
        )
        self._method = (
            None if decides is None or budget is None else decides.at(budget, self.phases)
        )
        self.scoring, self.generation = Tally(self.engine.shape), Tally(self.engine.shape)
        # Which refuses a modulator that does not fit.
        self._scorer = Scorer(self.engine, self._method, self.scoring)
        window = self.engine.config.context_window
        self.max_length = window
        if max_length is not None:
            self.max_length = whole("max_length", max_length, least=2, most=window)

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
                # Its first token is the prefix: the tokenizer's own would be a second one.
                token_list=self.tok_encode(string, add_special_tokens=False),
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
        wanted: dict[tuple[int, ...], list[Continuation]] = defaultdict(list)
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
            read = tuple(ids[-(self.max_length + 1) : -1])
            wanted[read].append(Continuation(place, continuation))
        if cut:
            logger.warning("%d requests exceed %d tokens: beginnings cut", cut, self.max_length)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            bar.update(len(requests) - sum(map(len, wanted.values())))
            for found in self._scorer.score(wanted):
                answers[found.place] = (found.nats, found.greedy)
                key = requests[found.place][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[found.place])
                bar.update()
        _tell("scoring", self.scoring)
        return answers

    # Texts

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, ended before the first of its stop strings.

        Raises:
            VesicleError: A generation argument is unknown or has a value that is not allowed, or
                leaves no room for a prompt.
        """
        from tqdm import tqdm

        texts = [""] * len(requests)
        special = self.tokenizer.get_added_vocab()
        jobs, cut = [], 0
        for place, request in enumerate(requests):
            context, arguments = request.args
            how = read_generation(
                arguments,
                default_most=self.max_gen_toks,
                window=self.max_length,
                special=special,
                ends=self._text.eos_ids,
                seed=self.seed + place,
            )
            ids = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - how.most
            cut += len(ids) > room
            jobs.append(Job(place, ids[-room:], how))
        if cut:
            logger.warning("%d prompts leave too little room: beginnings cut", cut)
        done = write(jobs, self.engine, self._method, self._text, self.generation, self.batch_size)
        with tqdm(
            total=len(jobs), disable=disable_tqdm, desc="Running generate_until requests"
        ) as bar:
            for place, text in done:
                texts[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
                bar.update()
        _tell("generation", self.generation)
        return texts

    # What was run

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval puts beside its settings in the results: what ran, and what it cost."""
        about = {
            "version": __version__,
            "model": self.model_name,
            "modulator": self.modulator_name,
            "budget": self.budget,
            "phases": self.phases.to_dict(),
            "weights": self.engine.weights_format,
            "kv": self.engine.pool.kv,
            "threads": torch.get_num_threads(),
            "max_length": self.max_length,
        }
        tallies = {"scoring": self.scoring, "generation": self.generation}
        return {"vesicle": about | {k: t.to_dict() for k, t in tallies.items() if t.tokens}}


def _tell(what: str, tally: Tally) -> None:
    share = tally.share["flops"]
    logger.info("%s: %d tokens, %.3f of the dense FLOPs", what, tally.tokens, share)


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
        print(f"vesicle: error: {one_line(str(error))}", file=sys.stderr)
        return USER_ERROR
    finally:
        sys.argv = before
    return 0
