"""Language neurons from sentences to claims, in parts that are kept.

    fires/LANGUAGE.safetensors    how often each neuron fires, in chunks of sentences
    judged/LANGUAGE.json          losses of other sentences with nothing silenced
    lesions/LANGUAGE.json         the same while a language's neurons, or random ones, are
    written/LANGUAGE.json         how the model goes on then
    checkpoints/NAME/fires/...    of another checkpoint

The same command goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vesicle.errors import DataError
from vesicle.neurons.claims import Claim, estimate, verdict
from vesicle.neurons.finished import Finished
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.languages.compared import compare, of_chunks
from vesicle.neurons.languages.described import describe
from vesicle.neurons.languages.entropy import Classes, fires
from vesicle.neurons.languages.lesions import (
    LANGUAGE_SET,
    RANDOM_SET,
    SPECIFIC_SET,
    language_lesions,
    lesion_claims,
    losses,
    matrix,
)
from vesicle.neurons.languages.parallel import Parallel
from vesicle.neurons.languages.settings import LanguageSettings
from vesicle.neurons.languages.written import Identifier, continuations, prompts
from vesicle.neurons.sets import matched

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]
Show = Callable[[int, int, str], None]
"""Told how many parts are done, of how many, and what comes."""
NOTHING = "nothing"
MOST_LESIONED = 8
_LONGEST = 256
"""Tokens of a sentence that are read."""


class Languages:
    """One analysis: its sentences as tokens, its folder, and how far it is."""

    def __init__(
        self,
        encode: Encode,
        decode: Decode,
        parallel: Parallel,
        settings: LanguageSettings,
        out: Path,
        *,
        facts: dict[str, Any],
        lesioned: Sequence[str] | None = None,
        show: Show | None = None,
    ) -> None:
        """Take a folder.

        Args:
            encode: Text to token ids, with what the model expects at the beginning.
            decode: And back.
            parallel: Sentences.
            settings: How neurons are found and judged.
            out: Folder that keeps finished parts.
            facts: What else the result depends on, such as the model's name (JSON).
            lesioned: Languages whose neurons are silenced; the eight with the most if None.
            show: Told how far it is.

        Raises:
            DataError: A setting is out of range, a language is none of those that are read, or a
                sentence has a single token.
            VesicleError: The folder holds another analysis.
        """
        settings.check()
        check_lesioned(lesioned, parallel)
        self.parallel, self.settings, self.decode = parallel, settings, decode
        self.lesioned = None if lesioned is None else list(dict.fromkeys(lesioned))
        self.read = _encoded(parallel.languages, parallel.read, encode)
        self.judged = _encoded(parallel.languages, parallel.judged, encode)
        self.about = {
            **asdict(settings),
            **facts,
            "languages": list(parallel.languages),
            "lesioned": self.lesioned,
        }
        self.done = Finished(out, self.about)
        n = len(parallel.languages)
        silenced = min(MOST_LESIONED, n) if self.lesioned is None else len(self.lesioned)
        self._show, self._step = show, -1
        self._total = n + (2 * silenced if settings.judged else 0)

    def find(self, hooked: Hooked) -> dict[str, Any]:
        """Find language neurons, silence them, and test what was published of them.

        Returns:
            The report: `settings`, what `describe` gives, and `lesions`, `written` and their claims
            unless no sentences judge.
        """
        counted = self.counts(hooked)
        names, shape = self.parallel.languages, hooked.shape
        report = {"settings": self.about, **describe(counted, names, shape, self.settings)}
        if self.settings.judged:
            chunks = torch.arange(len(counted[1]))
            found = self._lesions(hooked, of_chunks(counted, chunks, self.settings.share))
            report["claims"] += found.pop("claims")
            report |= found
        self._next("")
        return report

    def against(
        self, hooked: Hooked, other: Hooked, name: str, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Compare with another checkpoint, see `compared`.

        Args:
            hooked: The model.
            other: The other one, of the same shape.
            name: Of the folder that keeps its parts.
            facts: What those depend on (JSON).

        Raises:
            DataError: The shapes differ.
        """
        if other.shape != hooked.shape:
            raise DataError(
                f"--against has {other.shape.n_layers} layers of {other.shape.ffn_width} neurons; "
                f"allowed: {hooked.shape.n_layers} of {hooked.shape.ffn_width}, as the model"
            )
        done = Finished(self.done.folder / "checkpoints" / name, {**self.about, **facts})
        self._total += 2 * len(self.parallel.languages)
        before, after = self.counts(hooked), self.counts(other, done)
        self._next("")
        return compare(before, after, hooked.shape, self.settings.share, self.settings.draws)

    def counts(self, hooked: Hooked, done: Finished | None = None) -> tuple[Tensor, Tensor]:
        """How often neurons fire, (C, K, M), and at how many tokens, (C, K).

        Args:
            hooked: The model.
            done: Keeps the parts; the analysis' own folder if None.
        """
        kept = done or self.done
        found = []
        for language, sentences in zip(self.parallel.languages, self.read, strict=True):
            self._next(f"reading {language}")
            make = partial(_fires, hooked, sentences, min(self.settings.chunks, len(sentences)))
            found.append(kept.tensors(f"fires/{language}", make))
        return (
            torch.stack([own["fires"] for own in found], 1),
            torch.stack([own["tokens"] for own in found], 1),
        )

    def _lesions(self, hooked: Hooked, classes: Classes) -> dict[str, Any]:
        names = self.parallel.languages
        chosen = self._chosen(classes)
        judged = [self.judged[k] for k in chosen]
        before = [
            self.done.values(f"judged/{names[k]}", partial(_losses, hooked, self.judged[k]))
            for k in chosen
        ]
        parts, texts = [], []
        for k in chosen:
            self._next(f"silencing {names[k]}")
            make = partial(language_lesions, hooked, judged, classes, k, self.settings.seeds)
            parts.append(self.done.values(f"lesions/{names[k]}", make))
            self._next(f"writing {names[k]}")
            write = partial(_written, hooked, self.judged[k], classes, k, self.decode)
            texts.append(self.done.values(f"written/{names[k]}", write))
        told, claims = self._of_written([names[k] for k in chosen], texts)
        kinds = (SPECIFIC_SET, LANGUAGE_SET, RANDOM_SET)
        return {
            "lesions": {
                "languages": [names[k] for k in chosen],
                "neurons": [part["neurons"] for part in parts],
                "before": [float(np.mean(row)) for row in before],
                **{kind: matrix(parts, before, kind).tolist() for kind in kinds},
            },
            "written": told,
            "claims": [asdict(claim) for claim in (*lesion_claims(parts, before), *claims)],
        }

    def _chosen(self, classes: Classes) -> list[int]:
        """Numbers of the languages whose neurons are silenced.

        Raises:
            DataError: One of those that were named has none.
        """
        names = self.parallel.languages
        numbers = {k: len(classes.of(k)) for k in range(len(names))}
        some = [k for k in numbers if numbers[k]]
        if self.lesioned is None:
            return sorted(sorted(some, key=lambda k: -numbers[k])[:MOST_LESIONED])
        chosen = [names.index(name) for name in self.lesioned]
        for k in chosen:
            if not numbers[k]:
                raise DataError(
                    f"--lesioned names {names[k]!r}, which has no language neurons; allowed: "
                    + ", ".join(names[i] for i in some)
                )
        return chosen

    def _of_written(
        self, names: Sequence[str], texts: Sequence[dict[str, list[str]]]
    ) -> tuple[dict[str, Any], list[Claim]]:
        """In which languages the model went on."""
        tell = Identifier(self.parallel.languages, self.parallel.read)
        shares = {
            kind: [
                float(np.mean([tell.language(text) == name for text in own[kind]]))
                for name, own in zip(names, texts, strict=True)
                if own[kind]
            ]
            for kind in (NOTHING, LANGUAGE_SET, RANDOM_SET)
        }
        found = {
            "right_on_sentences": tell.accuracy(self.parallel.judged),
            "in_own_language": shares,
        }
        if not shares[NOTHING]:
            return found, []
        lost = estimate(np.array(shares[RANDOM_SET]) - np.array(shares[LANGUAGE_SET]))
        claim = Claim(
            name="output language",
            published="a model leaves a language whose neurons are silenced",
            measured="share of continuations in the language with random neurons silenced, less "
            "that with its own",
            found=lost,
            control=f"in the language: {np.mean(shares[NOTHING]):.2f} with nothing silenced, "
            f"{np.mean(shares[RANDOM_SET]):.2f} with random neurons",
            verdict=verdict(lost),
        )
        return found, [claim]

    def _next(self, what: str) -> None:
        self._step = min(self._step + 1, self._total)
        if self._show is not None:
            self._show(self._step, self._total, what)


def check_lesioned(lesioned: Sequence[str] | None, parallel: Parallel) -> None:
    """Refuse languages that are not read.

    Raises:
        DataError: Naming one, and those that are.
    """
    for name in lesioned or ():
        if name not in parallel.languages:
            raise DataError(f"--lesioned names {name!r}; allowed: {', '.join(parallel.languages)}")


def _encoded(
    languages: Sequence[str], sentences: Sequence[Sequence[str]], encode: Encode
) -> list[list[list[int]]]:
    """Tokens of sentences by language.

    Raises:
        DataError: A sentence has a single token: nothing follows it.
    """
    found = [[encode(text)[:_LONGEST] for text in own] for own in sentences]
    for language, own in zip(languages, found, strict=True):
        if min(map(len, own), default=2) < 2:
            raise DataError(f"a sentence in {language} has one token; allowed: two and more")
    return found


def _fires(hooked: Hooked, sentences: Sequence[Sequence[int]], chunks: int) -> dict[str, Tensor]:
    parts = [fires(hooked, sentences[chunk::chunks]) for chunk in range(chunks)]
    return {
        "fires": torch.stack([counts for counts, _ in parts]),
        "tokens": torch.tensor([tokens for _, tokens in parts]),
    }


def _losses(hooked: Hooked, sentences: Sequence[Sequence[int]]) -> list[float]:
    return losses(hooked, sentences).tolist()


def _written(
    hooked: Hooked, sentences: Sequence[Sequence[int]], classes: Classes, k: int, decode: Decode
) -> dict[str, list[str]]:
    """Continuations of a language's sentences, by what is silenced."""
    ids, own = prompts(sentences), classes.of(k)
    drawn = matched(own, hooked.shape, np.random.default_rng([k, 0]))
    sets = {NOTHING: own[:0], LANGUAGE_SET: own, RANDOM_SET: drawn}
    if not len(ids):
        return {name: [] for name in sets}
    return {
        name: [decode(row) for row in continuations(hooked, ids, neurons).tolist()]
        for name, neurons in sets.items()
    }
