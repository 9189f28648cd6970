"""Chess games by seeded self-play of a simple policy, as text and tokens, with their board states.

A player scores every legal move by what can be seen one half-move ahead, in pawns:

    value of what is captured - value of the mover, if the opponent attacks where it goes
    + 8 for a promotion, 2 for castling, 0.5 for a check, and for bringing out a knight or bishop or
      a pawn to the middle, -0.5 for the king, or a piece that goes back to its first rank

adds noise (Gumbel, so that a move is drawn with probability ~ exp(score / temperature)), and takes
the best; now and then it moves at random. So games have openings, exchanges, checks and mates, and
no plans. They are no stand-in for those of people, as the papers' 16 million are.

A game is a text of moves in long algebraic notation, "Pe2e4 Pe7e5 Ng1f3", and a move is two tokens:
the square that it leaves, and the piece with the square that it goes to. Whoever foretells the
second must know what stands on the first. Pawns promote to queens, and to nothing else, so that
this needs no mark. After each second token the board is known, and its properties are asked for.

Needs python-chess, `pip install 'vesicle[chess]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vesicle.errors import DataError, VesicleError
from vesicle.files import read_json, write_json

if TYPE_CHECKING:
    import chess

START, END, ORIGIN, GOAL = 0, 1, 2, 66
"""Ids: of the start and the end of a game, the first of origins, and the first of pieces with where
they go, 64 for each of `PIECES`."""
PIECES = "PNBRQK"
VOCABULARY = GOAL + 64 * len(PIECES)
FLAGS = (
    "check",
    "white may castle short",
    "white may castle long",
    "black may castle short",
    "black may castle long",
    "en passant",
    "a piece is pinned",
    "queens are off",
    "white to move",
    "white is ahead",
    "black is ahead",
)
"""Properties of a board beside its pieces. Ahead: by two pawns or more; pinned: of the side to
move, against its king."""

_VALUES = (0, 1, 3, 3, 5, 9, 0)  # none, pawn, knight, bishop, rook, queen, king
_CHUNK = 250
_CHECKED = 4
"""Of how many of the best moves it is looked whether they give check, which is slow."""


@dataclass(frozen=True, kw_only=True)
class Play:
    """How games are played.

    Attributes:
        temperature: Pawns by which a move has to be better to be e times as likely.
        careless: Share of moves drawn at random.
        plies: Half-moves after which a game is broken off.
    """

    temperature: float = 0.35
    careless: float = 0.05
    plies: int = 64

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            ValueError: A number is out of range.
        """
        if not self.temperature > 0 or not 0 <= self.careless <= 1 or self.plies < 1:
            raise ValueError(
                f"temperature is {self.temperature}, careless {self.careless}, plies {self.plies}; "
                "allowed: above 0, 0 to 1, 1 and above"
            )


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A game's boards, one after each of its n half-moves.

    Attributes:
        pieces: (n, 64) 0 for an empty square, 1 to 6 for white pawn to king, 7 to 12 for black; a1
            first, then b1.
        flags: (n, 11) `FLAGS`.
        legal: (2 n, V) tokens that are legal in each place of a move: origins, then the piece there
            with where it can go.
    """

    pieces: NDArray[np.uint8]
    flags: NDArray[np.bool_]
    legal: NDArray[np.bool_]


def check_chess() -> None:
    """Ask whether python-chess is there, before work that needs it.

    Raises:
        VesicleError: It is not.
    """
    _chess()


def play_game(play: Play, seed: int, number: int) -> str:
    """One game, a function of (seed, number).

    Raises:
        VesicleError: Python-chess is not installed.
    """
    chess = _chess()
    rng = np.random.default_rng((seed, number))
    board, moves = chess.Board(), list[str]()
    while len(moves) < play.plies:
        legal = [m for m in board.legal_moves if m.promotion in (None, chess.QUEEN)]
        if not legal or board.is_insufficient_material() or board.is_repetition(3):
            break
        move = _choose(board, legal, play, rng)
        moves.append(_written(board, move))
        board.push(move)
    return " ".join(moves)


def load_games(
    folder: Path,
    n_games: int,
    play: Play,
    seed: int,
    show: Callable[[int], None] | None = None,
) -> list[str]:
    """Games 0 to n, made where `folder` does not hold them yet.

    Args:
        folder: Of games of this seed and play alone; each file holds 250.
        n_games: How many.
        play: How they are played.
        seed: Of them.
        show: Told how many there are.

    Raises:
        DataError: A file there is not of these games.
        VesicleError: Python-chess is not installed.
    """
    games: list[str] = []
    facts = {"seed": seed, **vars(play)}
    while len(games) < n_games:
        first = len(games)
        path = folder / f"{first:06}.json"
        stop = min(n_games, first + _CHUNK)
        held: Any = read_json(path) if path.exists() else {"facts": facts, "games": []}
        if not isinstance(held, dict) or held.get("facts") != facts:
            raise DataError(f"{path} holds games of another seed or play: use another folder")
        known: list[str] = list(held["games"])
        if len(known) < stop - first:
            more = [play_game(play, seed, k) for k in range(first + len(known), stop)]
            known += more
            write_json(path, {"facts": facts, "games": known}, indent=None)
        games += known[: stop - first]
        if show is not None:
            show(len(games))
    return games


def tokens_of(game: str) -> list[int]:
    """Ids of a game's text: the start, then two for each move.

    Raises:
        DataError: A move has another form.
    """
    ids = [START]
    for move in game.split():
        origin, goal = _SQUARES.get(move[1:3]), _SQUARES.get(move[3:])
        if origin is None or goal is None or move[0] not in PIECES:
            raise DataError(f"move is {move!r}; allowed: a piece and two squares, such as Ng1f3")
        ids += [ORIGIN + origin, GOAL + 64 * PIECES.index(move[0]) + goal]
    return ids


def text_of(ids: Sequence[int]) -> str:
    """The text of a game's ids, without its start and end."""
    own = [i for i in ids if i >= ORIGIN]
    return " ".join(
        PIECES[(goal - GOAL) // 64] + _NAMES[origin - ORIGIN] + _NAMES[(goal - GOAL) % 64]
        for origin, goal in zip(own[::2], own[1::2], strict=False)
    )


def texts(games: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Games as rows of tokens.

    Args:
        games: Their texts.
        length: Tokens of a row; what is beyond is cut, what is missing filled with `END`.

    Returns:
        (N, length) ids, and booleans that tell which belong to the game, or are its first `END`.
    """
    ids = torch.full((len(games), length), END)
    own = torch.zeros(len(games), length, dtype=torch.bool)
    for row, game in enumerate(games):
        known = tokens_of(game)[:length]
        ids[row, : len(known)] = torch.tensor(known)
        own[row, : len(known) + 1] = True
    return ids, own


def replay(game: str) -> Replay:
    """A game's boards.

    Raises:
        DataError: A move is not legal.
        VesicleError: Python-chess is not installed.
    """
    chess = _chess()
    board, moves = chess.Board(), game.split()
    pieces = np.zeros((len(moves), 64), np.uint8)
    flags = np.zeros((len(moves), len(FLAGS)), bool)
    legal = np.zeros((2 * len(moves), VOCABULARY), bool)
    for ply, text in enumerate(moves):
        ways = [m for m in board.legal_moves if m.promotion in (None, chess.QUEEN)]
        taken = [m for m in ways if _written(board, m) == text]
        if not taken:
            raise DataError(f"half-move {ply + 1} of a game is {text!r}, which is not legal there")
        move = taken[0]
        legal[2 * ply, [ORIGIN + m.from_square for m in ways]] = True
        to = [m.to_square for m in ways if m.from_square == move.from_square]
        piece = (board.piece_type_at(move.from_square) or 1) - 1
        legal[2 * ply + 1, [GOAL + 64 * piece + square for square in to]] = True
        board.push(move)
        for square, piece in board.piece_map().items():
            pieces[ply, square] = piece.piece_type + (0 if piece.color else 6)
        flags[ply] = _flags(board)
    return Replay(pieces=pieces, flags=flags, legal=legal)


def _written(board: chess.Board, move: chess.Move) -> str:
    """A move in long algebraic notation, before it is made."""
    return PIECES[(board.piece_type_at(move.from_square) or 1) - 1] + move.uci()[:4]


def _choose(
    board: chess.Board, legal: list[chess.Move], play: Play, rng: np.random.Generator
) -> chess.Move:
    if rng.random() < play.careless:
        return legal[rng.integers(len(legal))]
    noise = rng.gumbel(size=len(legal)) * play.temperature
    scores = np.array([_score(board, move) for move in legal]) + noise
    best = np.argsort(-scores, kind="stable")[:_CHECKED]
    checks = [scores[k] + 0.5 * board.gives_check(legal[k]) for k in best]
    return legal[best[int(np.argmax(checks))]]


def _score(board: chess.Board, move: chess.Move) -> float:
    mover = board.piece_type_at(move.from_square) or 0
    captured = board.piece_type_at(move.to_square) or (1 if board.is_en_passant(move) else 0)
    score = float(_VALUES[captured])
    if board.is_attacked_by(not board.turn, move.to_square):
        score -= _VALUES[mover]
    if move.promotion is not None:
        score += 8
    if board.is_castling(move):
        score += 2
    home = 0 if board.turn else 7
    file, rank = move.to_square % 8, move.to_square // 8
    brings_out = mover in (2, 3) and move.from_square // 8 == home and rank != home
    if brings_out or (mover == 1 and file in (3, 4) and rank in (3, 4)):
        score += 0.5
    if mover == 6 or (mover > 1 and rank == home):
        score -= 0.5
    return score


def _flags(board: chess.Board) -> list[bool]:
    from chess import BLACK, KING, QUEEN, WHITE

    values = {
        color: sum(_VALUES[kind] * len(board.pieces(kind, color)) for kind in range(1, KING))
        for color in (WHITE, BLACK)
    }
    own = board.occupied_co[board.turn]
    pinned = any(own >> s & 1 and board.is_pinned(board.turn, s) for s in range(64))
    return [
        board.is_check(),
        board.has_kingside_castling_rights(WHITE),
        board.has_queenside_castling_rights(WHITE),
        board.has_kingside_castling_rights(BLACK),
        board.has_queenside_castling_rights(BLACK),
        board.has_legal_en_passant(),
        pinned,
        not board.pieces(QUEEN, WHITE) and not board.pieces(QUEEN, BLACK),
        board.turn == WHITE,
        values[WHITE] >= values[BLACK] + 2,
        values[BLACK] >= values[WHITE] + 2,
    ]


_NAMES = [file + rank for rank in "12345678" for file in "abcdefgh"]
_SQUARES = {name: square for square, name in enumerate(_NAMES)}


def _chess() -> Any:
    try:
        import chess
    except ImportError as error:
        raise VesicleError("chess games need python-chess: pip install 'vesicle[chess]'") from error
    return chess
