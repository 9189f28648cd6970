"""Who writes Plans: an Author for one sequence, and the Method that makes authors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vesicle.errors import VesicleError
from vesicle.plan.forgetting import Forgetter
from vesicle.plan.rows import FloatArray, IntArray, Rows
from vesicle.plan.spread import check_spread
from vesicle.shapes import ModelShape, Overhead, Spread
from vesicle.transmitters import NAMES

if TYPE_CHECKING:
    import torch

    from vesicle.preview import HeadPreview
    from vesicle.small_modules import SmallModule


class Author(ABC):
    """Writes the Plan of one sequence as it is computed.

    An executor calls, for each pass over the next T tokens and for each layer in order, `attention`
    and then `ffn`, each with the layer's rows (T,), which come at rest: an author writes what is to
    differ. What it writes is checked before it is executed. State (a recurrent predictor's, say)
    lives in the author, so one author serves one sequence; a sequence that goes on from within
    another has its `fork`.

    Attributes:
        evict_after: (S, L, G) the last position whose query may read each of the first S entries,
            as `Plan.evict_after`; later ones stay forever. None, the default, if nothing is
            forgotten. It is known before the first token and does not change.
        forgetter: Who decides about that as the text goes on, in place of `evict_after`. An
            author's fork gets a fork of it from whoever executes.
    """

    evict_after: IntArray | None = None
    forgetter: Forgetter | None = None

    @property
    def rests(self) -> bool:
        """Whether every decision is at rest by construction, so that none need be asked for."""
        return False

    @property
    def bounded(self) -> bool:
        """Whether its rows are valid by construction, and need not be checked one by one."""
        return False

    @property
    def levels(self) -> FloatArray | None:
        """Released levels (T, L, 5) of the tokens so far; None, by default, of a method of none."""
        return None

    def prompt(self, start: int, stop: int) -> None:
        """Be told that the coming tokens `start` to `stop` are prompt (see `vesicle.phases`).

        Authors that treat all tokens alike have no use for it.
        """
        return None

    def check(self, stop: int) -> None:
        """Refuse tokens up to `stop` before any of them is read; by default none is refused.

        Raises:
            VesicleError: If it cannot decide about all of them.
        """
        return None

    def releases(self, positions: IntArray) -> NDArray[np.bool_]:
        """(T,) at which of `positions` (T,) the method's predictor runs, which costs something."""
        return np.ones(len(positions), bool)

    def acting(self, positions: IntArray) -> NDArray[np.bool_]:
        """(T, 5) which transmitters are released, and act, at `positions` (T,); none by default."""
        return np.zeros((len(positions), len(NAMES)), bool)

    @property
    def carries_state(self) -> bool:
        """Whether it knows more of earlier tokens than is left when a sequence is cut back."""
        return False

    def fork(self, n_tokens: int) -> Author:
        """An author of its own that stands where this one stood after its first `n_tokens` tokens.

        Both go on alone. It knows all that this one knew there: its state, `evict_after`, and which
        of the first `n_tokens` tokens are prompt. An author without state may return a copy of
        itself.

        By default refused, since what an author carries is not known here: state that is shared or
        dropped would decide otherwise, without a word.

        Raises:
            VesicleError: If the author cannot tell what it was after `n_tokens`.
        """
        raise VesicleError(
            f"a sequence under {type(self).__name__} cannot be forked; give the author a method "
            "fork(n_tokens), or start a new sequence"
        )

    def rewind(self, n_tokens: int) -> None:
        """Be told that a pass was broken off: only the first `n_tokens` tokens have been read.

        Authors that carry nothing from token to token have no use for it.
        """
        return None

    def planned(self, positions: IntArray) -> Rows | None:
        """What is decided for coming tokens whatever their hidden states will be.

        Args:
            positions: (T,) of the coming tokens.

        Returns:
            Rows (T', L) of the first T' <= T of the tokens; None, the default, for an author that
            must see hidden states.

        Raises:
            VesicleError: If nothing is decided for the first of them.
        """
        return None

    @abstractmethod
    def attention(self, layer: int, positions: IntArray, rows: Rows) -> None:
        """Decide the attention of a layer.

        Args:
            layer: Its number.
            positions: (T,) of the tokens.
            rows: (T,) of the layer, at rest. To be written: `channels` and `bits` at the sites 0
                and 1, `attention` and `kv_blocks`.
        """

    @abstractmethod
    def ffn(self, layer: int, hidden: torch.Tensor, positions: IntArray, rows: Rows) -> None:
        """Read the tokens' hidden states and decide the FFN of a layer.

        Args:
            layer: Its number.
            hidden: (T, D) the residual stream after the layer's self-attention.
            positions: (T,) of the tokens.
            rows: (T,) of the layer. To be written: `channels` and `bits` at the sites 2 and 3,
                `ffn`, and in the last layer `head`, `likeliest` and `logits`, each of which acts
                where that is asked for.
        """


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """What a method's Plans need beside the model: what stands in for what they leave out.

    Attributes:
        ffn: Where tokens go whose FFN is small; None skips it outright.
        attention: Where tokens go whose attention is skipped; likewise.
        head: What words score that the LM head does not compute exactly; None where it must.
        summary: What stands for the keys of a KV block when blocks are chosen: `mean` or `bounds`.
        spread: L rows of G numbers: how unequally KV heads read, see `spread`; empty for alike.
        nearest: Blocks up to its own that a query reads before it chooses others, the own included.
    """

    ffn: SmallModule | None = None
    attention: SmallModule | None = None
    head: HeadPreview | None = None
    summary: str = "mean"
    spread: Spread = ()
    nearest: int = 1

    def check(self, shape: ModelShape) -> None:
        """Refuse small modules or a spread that do not fit a model.

        Raises:
            VesicleError: With the parameter, its shape and what is allowed.
        """
        check_spread(self.spread, shape)
        for module in (self.ffn, self.attention):
            if module is not None:
                module.check(shape.n_layers, shape.width)
        if self.head is not None:
            self.head.check(shape.width)


class Method(ABC):
    """Anything that can write Plans for a model.

    A modulator, a control, an oracle, a saved Plan.
    """

    @abstractmethod
    def author(self, shape: ModelShape) -> Author:
        """A fresh author for one sequence on a model of `shape`."""

    @property
    def decider(self) -> Method:
        """Who decides all but what is kept: itself, or the method that it is around."""
        return self

    @property
    def stand_ins(self) -> StandIns:
        """What its Plans need beside the model; nothing by default."""
        return StandIns()

    def overhead(self, shape: ModelShape) -> Overhead:
        """What the method adds to the model's own work; by default its stand-ins alone."""
        ffn, attention = self.stand_ins.ffn, self.stand_ins.attention
        return Overhead(
            small_ffn_weights=ffn.weights if ffn else 0,
            small_ffn_coded=ffn is not None and ffn.coded,
            small_attention_weights=attention.weights if attention else 0,
            head_rank=self.stand_ins.head.rank if self.stand_ins.head else 0,
            selection_vectors=1 if self.stand_ins.summary == "mean" else 2,
            spread=self.stand_ins.spread,
        )
