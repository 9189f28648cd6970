"""Records: dataclasses that are written as JSON, and refuse what is not theirs when read again."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from vesicle.errors import DataError
from vesicle.files import read_json, write_json


def checked(cls: type[Any], values: dict[str, Any], what: str) -> dict[str, Any]:
    """The values, if they are the fields of a dataclass, no more and no less.

    Args:
        cls: The dataclass.
        values: From JSON.
        what: What it is a part of, for the message.

    Raises:
        DataError: Naming a field that is missing or unknown.
    """
    known = {f.name for f in fields(cls)}
    for name in sorted(known ^ set(values)):
        fault = "lacks the field" if name in known else "has the unknown field"
        raise DataError(f"{what}'s {cls.__name__.lower()} {fault} {name!r}")
    return values


class Record:
    """A dataclass with a schema; a subclass says which, what it is called, and how rows are read.

    Attributes:
        what: What it is called in messages.
        version: The schema.
        indent: Blanks a level in the file; None for one line.
    """

    what: ClassVar[str]
    version: ClassVar[str]
    indent: ClassVar[int | None] = 2

    @property
    def schema(self) -> str:
        """Name and version of the record's format, such as `vesicle-tasks-1`."""
        return self.version

    def to_dict(self) -> dict[str, Any]:
        """As JSON writes it, `schema` first."""
        this: Any = self
        return {"schema": self.version, **asdict(this)}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            DataError: It is of another schema, or a field is missing or unknown.
        """
        if not isinstance(values, dict) or values.get("schema") != cls.version:
            found = values.get("schema") if isinstance(values, dict) else type(values).__name__
            raise DataError(f"this is not a {cls.version} record: its schema is {found!r}")
        given = {name: value for name, value in values.items() if name != "schema"}
        return cls(**cls.parts(checked(cls, given, cls.what)))

    @classmethod
    def parts(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The fields from those of JSON; by default as they are."""
        return values

    def save(self, path: Path | str) -> None:
        """Write JSON, all or nothing.

        Raises:
            VesicleError: The file cannot be written.
        """
        write_json(path, self.to_dict(), indent=self.indent)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: The file is missing, malformed or of another schema.
        """
        return cls.from_dict(read_json(path))
