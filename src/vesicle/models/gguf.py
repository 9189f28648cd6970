"""Converting a GGUF file, once, into a folder that plain transformers loads.

The weights are unpacked to 32-bit floats exactly as transformers unpacks them, so that the folder
and the GGUF give the same logits. `vesicle.json` is written last: it records the source and the
size of every file, so that a later start can trust the folder without hashing it.
"""

import hashlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.files import atomic_folder, cache_root, disk_is_full, read_json, write_json

FORMAT = 1
MANIFEST = "vesicle.json"
_MAGIC = b"GGUF"


def check_gguf(path: Path) -> None:
    """Refuse a file that is no GGUF file at all.

    Args:
        path: The file.

    Raises:
        ModelError: It cannot be read or does not start with the GGUF magic bytes.
    """
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if head != _MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it starts with {head!r}, not with {_MAGIC!r}")


def sha256_file(path: Path) -> str:
    """Hash a file.

    Args:
        path: The file.

    Returns:
        The SHA-256 digest in hexadecimal.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error


def is_converted(folder: Path, sha256: str) -> bool:
    """Tell, without reading weights, whether `folder` is a whole conversion of one source.

    Args:
        folder: What `convert_gguf` wrote, if anything.
        sha256: Digest of the GGUF file it must come from.

    Returns:
        False when the manifest is missing, of another format or source, or a file's size differs.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        return (
            manifest["format"] == FORMAT
            and manifest["sha256"] == sha256
            and "model_files" in manifest
            and all(
                (folder / name).stat().st_size == size
                for name, size in manifest["model_files"].items()
            )
        )
    except (DataError, OSError, LookupError, TypeError, AttributeError):
        return False


def convert_gguf(gguf: Path, folder: Path, source: str, sha256: str, needs_bytes: int = 0) -> None:
    """Convert `gguf` into `folder`, all or nothing.

    Args:
        gguf: The GGUF file.
        folder: Folder to create or replace.
        source: Where the file came from, for the manifest.
        sha256: The file's digest, for the manifest.
        needs_bytes: Size of the result, if known; checked against the free space beforehand.

    Raises:
        ModelError: The file is damaged, or transformers cannot convert its architecture.
        VesicleError: The folder cannot be written or the disk is full.
    """
    check_gguf(gguf)
    with atomic_folder(folder, needs_bytes) as part:
        try:
            with _quiet_transformers():
                _save_unpacked(gguf, part)
        except (MemoryError, VesicleError):
            raise
        except Exception as error:
            if disk_is_full(error):
                raise
            # transformers and gguf tell a damaged file by whatever exception it happens to cause.
            raise ModelError(
                f"cannot convert {gguf}: the file is damaged or its architecture is not supported "
                f"({type(error).__name__}: {str(error)[:200]})"
            ) from error
        sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        write_json(
            part / MANIFEST,
            {"format": FORMAT, "source": source, "sha256": sha256, "model_files": sizes},
        )


def convert_once(gguf: Path) -> Path:
    """Convert a GGUF file into the cache, or find it there.

    Args:
        gguf: The GGUF file.

    Returns:
        The folder, named after the file's digest.

    Raises:
        ModelError: The file is not GGUF, damaged, or of an architecture transformers cannot read.
        VesicleError: The cache cannot be written or the disk is full.
    """
    check_gguf(gguf)
    sha256 = sha256_file(gguf)
    folder = cache_root() / "models" / f"gguf-{sha256[:16]}"
    if not is_converted(folder, sha256):
        convert_gguf(gguf, folder, gguf.name, sha256)
    return folder


def _save_unpacked(gguf: Path, folder: Path) -> None:
    """Load the GGUF with transformers and save it as if it had never been quantised."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    tokenizer.save_pretrained(folder)
    _restore_digit_splitting(gguf, folder / "tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("its weights were not unpacked to 32-bit floats")
    # save_pretrained refuses a model that says it is quantised; unpacked, it no longer is. Saving
    # through it (not through the state dict) keeps tied weights once and the names canonical.
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        # Written as 0600 by safetensors: give it the mode the user's umask asks for.
        path.chmod((folder / "config.json").stat().st_mode)


def _restore_digit_splitting(gguf: Path, tokenizer_json: Path) -> None:
    """Give SmolLM tokenizers back the step that isolates digits, which transformers leaves out.

    It matters where blanks meet digits: `"a  1"` is `a, ĠĠ, 1` in training, not `a, Ġ, Ġ, 1`.
    """
    if _pre_tokenizer_name(gguf) != "smollm":
        return
    tokenizer = read_json(tokenizer_json)
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, tokenizer["pre_tokenizer"]],
    }
    write_json(tokenizer_json, tokenizer)


def _pre_tokenizer_name(gguf: Path) -> str:
    """Read `tokenizer.ggml.pre` from a GGUF header, "" if it is not among its first entries.

    Searching for the key takes a millisecond; parsing the whole header takes seconds.
    """
    key = b"tokenizer.ggml.pre"
    with gguf.open("rb") as file:
        head = file.read(1 << 20)
    at = head.find(struct.pack("<Q", len(key)) + key)
    if at < 0:
        return ""
    start = at + 8 + len(key) + 12
    _type, length = struct.unpack_from("<IQ", head, start - 12)
    return head[start : start + length].decode("utf-8", "replace")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hold back bars and warnings of transformers and gguf, and put their settings back after."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One of the bars is made without asking those settings.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
