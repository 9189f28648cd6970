"""Converting a GGUF file, once, into a folder that plain transformers loads.

The weights are unpacked to 32-bit floats exactly as transformers unpacks them, so that the folder
and the GGUF give the same logits. The scales of the groups that the weights were stored in are kept
beside them (`gguf_groups.py`). Config and tokenizer are made from the file's header alone: what
lies beside the file has no say. `vesicle.json` is written last: it records the source and the size
of every file, so that a later start can trust the folder without hashing it.
"""

import hashlib
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.files import (
    atomic_folder,
    cache_root,
    check_cache,
    disk_is_full,
    read_json,
    remove_leftovers,
    scratch_folder,
    write_json,
)
from vesicle.models.checks import check_weights, read_config
from vesicle.models.gguf_checks import check_gguf_model
from vesicle.models.gguf_config import config_settings
from vesicle.models.gguf_groups import write_groups
from vesicle.models.gguf_header import GgufHeader, check_magic, read_gguf_header
from vesicle.models.gguf_tokenizer import write_tokenizer
from vesicle.models.memory import check_memory

FORMAT = 3
"""Of conversions. Those of format 1 may hold the tokenizer of a file that lay beside the GGUF, and
those of formats 1 and 2 lack `groups.safetensors`."""
MANIFEST = "vesicle.json"
_UNPACKED_BYTES = 4 + 2 * 4 / 32
"""Of a weight as a 32-bit float, and of its part in the scale and the low of its group."""


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


def is_converted(folder: Path, sha256: str, formats: tuple[int, ...] = (FORMAT,)) -> bool:
    """Tell, without reading weights, whether `folder` is a whole conversion of one source.

    Args:
        folder: What `convert_gguf` wrote, if anything.
        sha256: Digest of the GGUF file it must come from.
        formats: Formats of conversions that are good enough.

    Returns:
        False when the manifest is missing, of another format or source, or a file's size differs.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        return (
            manifest["format"] in formats
            and manifest["sha256"] == sha256
            and "model_files" in manifest
            and all(
                (folder / name).stat().st_size == size
                for name, size in manifest["model_files"].items()
            )
        )
    except (DataError, OSError, LookupError, TypeError, AttributeError):
        return False


def convert_gguf(gguf: Path, folder: Path, source: str, sha256: str) -> None:
    """Convert `gguf` into `folder`, all or nothing.

    The file is checked from its first byte to its last offset before anything trusts it, and the
    result is checked as any model folder is.

    Args:
        gguf: The GGUF file.
        folder: Folder to create or replace.
        source: Where the file came from, for the manifest.
        sha256: The file's digest, for the manifest.

    Raises:
        ModelError: The file is damaged, its architecture is not supported, or memory is too small.
        VesicleError: The folder cannot be written or the disk is full.
    """
    header = read_gguf_header(gguf)
    check_gguf_model(gguf, header)
    needs_bytes = int(header.n_weights * _UNPACKED_BYTES)
    check_memory(needs_bytes, f"converting {gguf}")
    with atomic_folder(folder, needs_bytes) as part:
        try:
            with _quiet_transformers():
                _save_unpacked(gguf, header, part)
            _check_result(gguf, part)
        except (KeyboardInterrupt, SystemExit, VesicleError):
            raise
        except MemoryError as error:
            raise ModelError(f"there is too little memory free for converting {gguf}") from error
        except BaseException as error:  # a panic in a library written in Rust is no Exception
            if isinstance(error, Exception) and disk_is_full(error):
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
    check_magic(gguf)
    sha256 = sha256_file(gguf)
    folder = cache_root() / "models" / f"gguf-{sha256[:16]}"
    remove_leftovers(folder.parent)
    if not is_converted(folder, sha256):
        check_cache()
        convert_gguf(gguf, folder, gguf.name, sha256)
    return folder


def _save_unpacked(gguf: Path, header: GgufHeader, folder: Path) -> None:
    """Load the GGUF with transformers and save it as if it had never been quantised."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tokenizer(gguf, header, folder)
    settings = config_settings(gguf, header)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with _alone(gguf, folder) as link:
        model = AutoModelForCausalLM.from_pretrained(
            str(link.parent), gguf_file=link.name, config=config, dtype=torch.float32
        )
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("its weights were not unpacked to 32-bit floats")
    # save_pretrained refuses a model that says it is quantised; unpacked, it no longer is. Saving
    # through it (not through the state dict) keeps tied weights once and the names canonical.
    model.__dict__.pop("hf_quantizer", None)
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    write_groups(gguf, header, folder, model.state_dict())
    for path in folder.glob("*.safetensors"):
        # Written as 0600 by safetensors: give it the mode the user's umask asks for.
        path.chmod((folder / "config.json").stat().st_mode)
    _check_tokenizer(folder)


def _check_tokenizer(folder: Path) -> None:
    """Make sure that transformers reads the tokenizer as written: some classes rebuild it."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = "".join(t.content for t in list(written.get_added_tokens_decoder().values())[:8])
    probe = f"a  12 It's{special} naïve\n\n日本 "
    if AutoTokenizer.from_pretrained(folder)(probe).input_ids != written.encode(probe).ids:
        raise ValueError("transformers reads its tokenizer in another way")


@contextmanager
def _alone(gguf: Path, beside: Path) -> Iterator[Path]:
    """Give the file a folder to itself, in which transformers finds nothing else to read."""
    with scratch_folder(beside.parent) as work:
        link = work / "model.gguf"
        try:
            link.symlink_to(gguf.absolute())
        except OSError:  # a system without links
            shutil.copyfile(gguf, link)
        yield link


def _check_result(gguf: Path, folder: Path) -> None:
    """Check the converted folder, whose name is temporary and would say nothing in a message."""
    try:
        check_weights(folder, read_config(folder))
    except ModelError as error:
        told = str(error).replace(str(folder), "what it unpacks to")
        raise ModelError(f"cannot convert {gguf}: {told}") from error


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
