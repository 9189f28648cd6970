"""Printing results for other programs."""

from __future__ import annotations

import json

from vesicle.errors import VesicleError


def print_json(value: object) -> None:
    """Print one line of strict JSON in ASCII, which every parser takes.

    Half of a surrogate pair, as in the name of a file that is not UTF-8, becomes U+FFFD: JSON can
    spell it, and most parsers refuse it.

    Raises:
        VesicleError: A number is NaN or infinite.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise VesicleError(
            "the result holds NaN or infinity, and JSON numbers are finite"
        ) from error
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    print(json.dumps(json.loads(whole)))
