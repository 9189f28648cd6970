"""What decoders of experts are trained and judged on: chess games that are made, or a text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from vesicle.errors import DataError
from vesicle.files import decode_json_lines
from vesicle.neurons.experts import chess_games
from vesicle.neurons.experts.coverage import Properties
from vesicle.neurons.experts.properties import board_properties, surface_properties
from vesicle.neurons.experts.settings import Settings
from vesicle.scratch import learn_tokenizer
from vesicle.training.data import load_documents


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts of T tokens each.

    Attributes:
        vocabulary: V.
        train: (N, T) ids to train on.
        train_scored: (N, T) booleans: which count as targets.
        test: (M, T) ids whose loss is told.
        test_scored: (M, T).
        legal: (M, T, V) booleans for chess: which tokens are legal there; else None.
        judged: (J, T) ids whose properties are known.
        where: (J, T) booleans: of which tokens.
        properties: Of those tokens, in order.
        known: (K, T) texts that are trained on, whose properties are known, too.
        known_where: (K, T).
        known_values: (N, P) booleans of the same properties, for probes.
        digest: Of all of it.
    """

    vocabulary: int
    train: Tensor
    train_scored: Tensor
    test: Tensor
    test_scored: Tensor
    legal: Tensor | None
    judged: Tensor
    where: Tensor
    properties: Properties
    known: Tensor
    known_where: Tensor
    known_values: Tensor
    digest: str


def chess_corpus(
    settings: Settings, folder: Path, show: Callable[[int], None] | None = None
) -> Corpus:
    """Games, made where `folder` does not hold them yet.

    Args:
        settings: How many, how long, and their seed.
        folder: Of these games alone.
        show: Told how many there are.

    Raises:
        DataError: The folder holds other games, or there are too few for any property.
        VesicleError: Python-chess is not installed.
    """
    s = settings
    play = chess_games.Play(plies=(s.length - 1) // 2)
    games = chess_games.load_games(folder, s.train + s.test + s.judged, play, s.seed, show)
    ids, own = chess_games.texts(games, s.length)
    judged = board_properties(games[s.train + s.test :], s.length)
    known = board_properties(games[: s.sae_texts], s.length)
    legal = torch.zeros(s.test, s.length, chess_games.VOCABULARY, dtype=torch.bool)
    for row, game in enumerate(games[s.train : s.train + s.test]):
        allowed = torch.from_numpy(chess_games.replay(game).legal)[: s.length - 1]
        legal[row, 1 : 1 + len(allowed)] = allowed
    return _corpus(s, chess_games.VOCABULARY, ids, own, legal, judged, known)


def text_corpus(settings: Settings, source: str | Path) -> Corpus:
    """Windows of running text, the last of which judge.

    Args:
        settings: How many, how long; of a short text all but the last are trained on.
        source: `sample`, or as `training.data.load_documents` takes it.

    Raises:
        DataError: There is no such text, or too little of it.
    """
    s = settings
    documents = _sample() if str(source) == "sample" else load_documents(source)
    held_out = s.test + s.judged
    tokenizer = learn_tokenizer(documents, s.vocabulary)
    ids = torch.tensor([i for d in documents for i in [*tokenizer.encode(d).ids, 0]])
    windows = ids[: len(ids) // s.length * s.length].view(-1, s.length)
    if len(windows) < held_out + s.batch:
        raise DataError(
            f"{source} has {len(windows)} windows of {s.length} tokens; allowed: "
            f"{held_out + s.batch} and up, {held_out} of them to judge by"
        )
    n_train = min(s.train, len(windows) - held_out)
    # Learnt from all of the text, the tokenizer tells decoders nothing that they are judged by.
    kept = torch.cat([windows[:n_train], windows[-held_out:]])
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())]

    def known(rows: Tensor) -> tuple[Properties, Tensor]:
        found = surface_properties([[pieces[i] for i in row] for row in rows.tolist()])
        return found, torch.ones_like(rows, dtype=torch.bool)

    own = torch.ones_like(kept, dtype=torch.bool)
    judged, trained = known(kept[-s.judged :]), known(kept[: min(s.sae_texts, n_train)])
    return _corpus(s, tokenizer.get_vocab_size(), kept, own, None, judged, trained)


def _corpus(
    settings: Settings,
    vocabulary: int,
    ids: Tensor,
    own: Tensor,
    legal: Tensor | None,
    judged: tuple[Properties, Tensor],
    known: tuple[Properties, Tensor],
) -> Corpus:
    """Rows of ids, to train on first, then to test and to judge by; the last have properties.

    So have the first, for probes.
    """
    (properties, where), (trained, trained_where) = judged, known
    properties = properties.frequent(settings.least)
    n_judged = settings.judged
    n_train = len(ids) - settings.test - n_judged
    return Corpus(
        vocabulary=vocabulary,
        train=ids[:n_train],
        train_scored=own[:n_train],
        test=ids[n_train:-n_judged],
        test_scored=own[n_train:-n_judged],
        legal=legal,
        judged=ids[-n_judged:],
        where=where,
        properties=properties,
        known=ids[: len(trained_where)],
        known_where=trained_where,
        known_values=trained.only(properties.names).values,
        digest=_digest([ids, own, where, properties.values]),
    )


def _digest(tensors: Sequence[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def _sample() -> list[str]:
    file = resources.files("vesicle.tasks") / "samples" / "wikitext2.jsonl"
    rows = decode_json_lines(file.read_text("utf-8").splitlines(), "wikitext2")
    return [str(row["text"]) for _, row in rows]
