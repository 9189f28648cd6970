"""Problems a person can fix: bad input, a broken model, a full disk.

Everything here carries one clear line that names the offending value and what is allowed. The
command line prints that line and exits with status 2; any other exception is a bug in Vesicle.
"""


class VesicleError(Exception):
    """A user-facing problem, told in one line that names the offending value and what is allowed.

    Args:
        message: The line to show. Line breaks and runs of blanks are folded into single blanks, so
            that text quoted from other programs cannot break it up.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ModelError(VesicleError):
    """A model that cannot be found, fetched, read or used."""


class DataError(VesicleError):
    """Input data that cannot be read or has the wrong form."""


class BudgetError(VesicleError, ValueError):
    """A budget outside the range that the model at hand can honour."""


class CacheFullError(VesicleError):
    """More cached positions than the engine's KV memory has room for."""
