"""Corpus BLEU and chrF, by sacrebleu, with its signature.

Both are functions of counts that are summed over the corpus, never means of sentences' scores
(Papineni et al. 2002, https://aclanthology.org/P02-1040; Popović 2015,
https://aclanthology.org/W15-3049; Post 2018, https://aclanthology.org/W18-6319). sacrebleu counts,
and sacrebleu makes the number from the sums, so that it is its corpus score to the last bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from vesicle.errors import DataError
from vesicle.plan import FloatArray
from vesicle.tasks.items import Item, Output
from vesicle.tasks.metrics.base import Metric, library, references_of


@cache
def _scorer(scorer: str) -> Any:
    made = getattr(library("sacrebleu.metrics"), scorer)()
    made.num_refs = 1  # part of the signature, which sacrebleu otherwise takes from a whole corpus
    return made


class _Sacrebleu(Metric):
    """Its statistics are sacrebleu's counts of an item, with one reference each."""

    scorer: ClassVar[str]

    def statistics(self, item: Item, output: Output) -> tuple[float, ...]:
        """Integers: lengths and matches for each n-gram order.

        Raises:
            DataError: There is not exactly one reference.
        """
        references = references_of(item)
        if len(references) != 1:
            raise DataError(
                f"item {item.id!r} has {len(references)} reference translations; "
                f"{self.title} is made from 1"
            )
        # Not in sacrebleu's public interface, but the seam of its own significance tests.
        (counts,) = _scorer(self.scorer)._extract_corpus_statistics([output.text], [references])
        return tuple(float(count) for count in counts)

    def value(self, sums: FloatArray) -> float:
        """The corpus score, from 0 to 100, that sacrebleu makes of summed counts (S,)."""
        counts = [round(float(count)) for count in sums]
        return float(_scorer(self.scorer)._compute_score_from_stats(counts).score)

    @property
    def signature(self) -> str:
        """As sacrebleu writes it: `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0`."""
        return str(_scorer(self.scorer).get_signature())


class Bleu(_Sacrebleu):
    """BLEU with n-grams of up to 4 words and the 13a tokenizer.

    Statistics (10,): words of the translation and of the reference, matches of orders 1 to 4,
    n-grams of orders 1 to 4.
    """

    name = "bleu"
    title = "BLEU"
    scorer = "BLEU"


class ChrF(_Sacrebleu):
    """chrF2: F-measure of character n-grams of up to 6, recall counting twice.

    Statistics (18,): for each order, n-grams of the translation, of the reference, and matches.
    """

    name = "chrf"
    title = "chrF"
    scorer = "CHRF"
