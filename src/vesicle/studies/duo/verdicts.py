"""A claim, its controls, and what they leave of it.

Each claim is a difference with a side of 0 on which it has to lie. Beside it are controls, which
share what might make the claim true for a reason of no use. One takes the claim's air out if it
shows the same where nothing is placed or known (the best of N random patterns, by the label; the
oracle of labels that are drawn from the model's own output), or does not show it where only the
label is missing.
"""

from __future__ import annotations

from vesicle.studies.estimates import HOLDS, Row, verdict

_SIDES = {-1: "below 0", 1: "above 0"}


def control(name: str, measured: Row, side: int, takes: str | None = None, reason: str = "") -> Row:
    """A control, and what it says of the claim if it shows the same, or fails to.

    Args:
        name: What it is.
        measured: An estimate.
        side: Of 0, on which the claim lies.
        takes: `HOLDS` if it takes the claim's air out by showing the same, `FAILS` if by not
            showing it; None where it does neither.
        reason: What is said then.
    """
    says = verdict(measured, side)
    against = takes is not None and (says == HOLDS) == (takes == HOLDS)
    return {
        "control": name,
        "measured": measured,
        "says": says,
        "against": reason if against else "",
    }


def claim(
    letter: str,
    text: str,
    what: str,
    measured: Row,
    side: int,
    controls: list[Row],
    says: str | None = None,
) -> Row:
    """A claim with its verdict, and what takes its air out if it holds.

    Args:
        letter: By which it is called.
        text: It, in words.
        what: What is measured.
        measured: An estimate.
        side: Of 0, on which it has to lie.
        controls: Beside it.
        says: The verdict, where it is known without an estimate.
    """
    says = says or verdict(measured, side)
    against = [c["against"] for c in controls if c["against"]] if says == HOLDS else []
    return {
        "letter": letter,
        "claim": text,
        "what": what,
        "wanted": _SIDES[side],
        "measured": measured,
        "verdict": says,
        "controls": controls,
        "against": against,
    }
