"""Properties by which features are judged: of chess boards, and of the surface of a text.

Of a board (Karvonen et al. 2024): which piece stands on which square, 12 x 64, and `FLAGS`, such as
check, castling rights, a pin, who is ahead. They do not stand in the tokens: the board follows from
all moves so far.

Of a text: what can be told without understanding it, some by the token alone (a digit, a capital),
some by what went before (inside quotation marks, how far the sentence has gone). These are modest
stand-ins for the descriptions of neurons, which `vesicle.neurons.descriptions` scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vesicle.neurons.experts.chess_games import FLAGS, replay
from vesicle.neurons.experts.coverage import Properties, joined

_PIECES = [
    f"{c} {k}" for c in ("white", "black") for k in "pawn knight bishop rook queen king".split()
]
SURFACE = (
    "begins a word",
    "capital",
    "digit",
    "punctuation",
    "line end",
    "first word of a sentence",
    "inside quotation marks",
    "inside parentheses",
    "after a comma",
    "after a digit",
    "word seen before",
    "first tenth of the text",
)
"""Properties of a token of a text; "after" means up to three tokens later."""


def board_properties(games: Sequence[str], length: int) -> tuple[Properties, Tensor]:
    """Which pieces stand where and what holds of the board, after each half-move.

    Args:
        games: Their texts.
        length: Tokens of a row, as `chess_games.texts` makes it; later boards are left out.

    Returns:
        Properties of the N boards, and (games, length) booleans that tell the tokens after which
        they stand.
    """
    where = torch.zeros(len(games), length, dtype=torch.bool)
    parts = []
    for row, game in enumerate(games):
        board = replay(game)
        n = min(len(board.pieces), (length - 1) // 2)
        pieces = board.pieces[:n, :, None] == np.arange(1, 13, dtype=np.uint8)
        values = np.concatenate([pieces.reshape(n, -1), board.flags[:n]], 1)
        parts.append(torch.from_numpy(values))
        where[row, 2 : 2 * n + 1 : 2] = True
    squares = [f"{file}{rank}" for rank in range(1, 9) for file in "abcdefgh"]
    names = [f"{piece} on {square}" for square in squares for piece in _PIECES]
    found = Properties(
        names=(*names, *FLAGS),
        values=torch.cat(parts),
        items=joined(parts, range(len(games))),
        n_items=len(games),
    )
    return found, where


def surface_properties(pieces: Sequence[Sequence[str]]) -> Properties:
    """Properties of all tokens of some texts.

    Args:
        pieces: Of each text the string of each token, its leading blank included.
    """
    parts = [torch.tensor(_surface(text), dtype=torch.bool) for text in pieces]
    return Properties(
        names=SURFACE,
        values=torch.cat(parts),
        items=joined(parts, range(len(pieces))),
        n_items=len(pieces),
    )


def _surface(text: Sequence[str]) -> list[list[bool]]:
    rows, quoted, depth = list[list[bool]](), False, 0
    comma = digit = -10
    starts, seen = True, set[str]()
    for place, piece in enumerate(text):
        bare = piece.strip()
        letters = any(c.isalpha() for c in bare)
        if '"' in bare:
            quoted = not quoted if bare.count('"') % 2 else quoted
        depth = max(0, depth + bare.count("(") - bare.count(")"))
        rows.append(
            [
                piece[:1].isspace() and bool(bare),
                any(c.isupper() for c in bare),
                any(c.isdigit() for c in bare),
                bool(bare) and not any(c.isalnum() for c in bare),
                "\n" in piece,
                starts and letters,
                quoted,
                depth > 0,
                0 < place - comma <= 3,
                0 < place - digit <= 3,
                letters and bare in seen,
                place < len(text) / 10,
            ]
        )
        comma = place if "," in bare else comma
        digit = place if any(c.isdigit() for c in bare) else digit
        if bare:
            starts = bare[-1] in ".!?" or (starts and not letters)
            seen.add(bare)
    return rows
