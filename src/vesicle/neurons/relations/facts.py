"""Relations and their facts, read and checked.

A wording is a sentence with `[X]` for the subject that ends in `[Y]`, the answer. Three sets are
read, each from its folder of JSON lines, all splits together:

- `lre` (`relations_lre/`, Hernandez et al. 2024): rows with `relation`, `subject`, `object` and
  `prompt_templates`; stereotypes (`relation_type` `bias`) are left out;
- `pararel` (`pararel/`, Elazar et al. 2021): rows with `relation`, `subject`, `object`, and rows of
  `patterns` with `relation` and `pattern`;
- `mpararel` (`mpararel/`, Fierro & Søgaard 2022): the same with objects that hold one text a
  language, and patterns with `lang`.

A subject with several answers is left out: another right answer would count as a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vesicle.errors import DataError
from vesicle.files import decode_json_lines, lone_surrogate, read_json_lines

SETS = {"lre": "relations_lre", "pararel": "pararel", "mpararel": "mpararel"}
SAMPLE = "sample"
SUBJECT, ANSWER = "[X]", "[Y]"
_SPLITS = ("train", "validation", "test")
_SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact of a relation.

    Attributes:
        key: Tells the same subject in other relations and languages.
        subject: As it is written.
        answer: The object.
    """

    key: str
    subject: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A relation.

    Attributes:
        name: Of it.
        wordings: Sentences with `[X]` that end in `[Y]`.
        facts: Each subject once.
    """

    name: str
    wordings: tuple[str, ...]
    facts: tuple[Fact, ...]


def read_relations(data: str, kind: str = "lre", language: str = "en") -> dict[str, Relation]:
    """Read all relations of a set.

    Args:
        data: A folder of data sets, or `sample` (of the kind `lre`).
        kind: One of `SETS`.
        language: Of `mpararel`.

    Returns:
        By name, those with a wording and a fact.

    Raises:
        DataError: A file is missing, a row has the wrong form (named by file, line and field), or
            there is no such set or language.
    """
    if kind not in SETS:
        raise DataError(f"--set is {kind!r}; allowed: {', '.join(SETS)}")
    if kind != "mpararel" and language != "en":
        raise DataError(f"{kind} has no language {language!r}; allowed: en")
    if data == SAMPLE:
        if kind != "lre":
            raise DataError(f"--set is {kind!r}; allowed with the sample: lre")
        file = resources.files("vesicle.neurons") / "samples" / "relations.jsonl"
        lines = file.read_text(encoding="utf-8").split("\n")
        return _lre(decode_json_lines(lines, "the sample, relations.jsonl"))
    folder = Path(data).expanduser() / SETS[kind]
    rows = _rows(folder, _SPLITS)
    if kind == "lre":
        return _lre(rows)
    patterns = _rows(folder, ("patterns",))
    return _pararel(rows, patterns, language if kind == "mpararel" else None)


def pick(relations: dict[str, Relation], names: Sequence[str]) -> list[Relation]:
    """Relations by name.

    Raises:
        DataError: Naming one that there is not, and those that there are.
    """
    for name in names:
        if name not in relations:
            raise DataError(
                f"there is no relation {name!r}; allowed: {', '.join(sorted(relations))}"
            )
    return [relations[name] for name in dict.fromkeys(names)]


def _rows(folder: Path, splits: Sequence[str]) -> Iterable[tuple[str, Any]]:
    """All rows of those splits that there are, with their places."""
    files = [
        path
        for split in splits
        if (path := next((p for s in _SUFFIXES if (p := folder / (split + s)).is_file()), None))
    ]
    if not files:
        wanted = " or ".join(f"{split}{_SUFFIXES[0]}" for split in splits)
        raise DataError(f"{folder} holds no {wanted}, with or without .gz")
    for path in files:
        yield from read_json_lines(path)


def _lre(rows: Iterable[tuple[str, Any]]) -> dict[str, Relation]:
    found: dict[str, list[Fact]] = {}
    wordings: dict[str, list[str]] = {}
    for place, row in rows:
        name = _text(row, "relation", place)
        if row.get("relation_type") == "bias":
            continue
        subject = _text(row, "subject", place)
        found.setdefault(name, []).append(
            Fact(key=subject, subject=subject, answer=_text(row, "object", place))
        )
        templates = [
            *_texts(row, "prompt_templates", place),
            *(_texts(row, "prompt_templates_zs", place) if "prompt_templates_zs" in row else []),
        ]
        for template in templates:
            if template.count("{}") != 1:
                raise DataError(f"{place}: a template is {template!r}; allowed: one with one {{}}")
            wording = f"{template.replace('{}', SUBJECT).strip()} {ANSWER}"
            if wording not in wordings.setdefault(name, []):
                wordings[name].append(wording)
    return _relations(found, wordings)


def _pararel(
    rows: Iterable[tuple[str, Any]], patterns: Iterable[tuple[str, Any]], language: str | None
) -> dict[str, Relation]:
    wordings: dict[str, list[str]] = {}
    languages = set[str]()
    for place, row in patterns:
        name, pattern = _text(row, "relation", place), _text(row, "pattern", place)
        if language is not None:
            languages.add(_text(row, "lang", place))
            if row["lang"] != language:
                continue
        wording = pattern.rstrip(" .。")
        if wording.count(SUBJECT) == 1 and wording.count(ANSWER) == 1 and wording.endswith(ANSWER):
            wordings.setdefault(name, []).append(wording[0].upper() + wording[1:])
    if language is not None and language not in languages:
        raise DataError(
            f"there is no language {language!r}; allowed: {', '.join(sorted(languages))}"
        )
    found: dict[str, list[Fact]] = {}
    for place, row in rows:
        name = _text(row, "relation", place)
        if language is None:
            subject = key = _text(row, "subject", place)
            answer = _text(row, "object", place)
        else:
            key = _text(row, "sub_uri", place)
            subject = _text(_object(row, "subject", place), language, place)
            answer = _text(_object(row, "object", place), language, place)
        found.setdefault(name, []).append(Fact(key=key, subject=subject, answer=answer))
    return _relations(found, wordings)


def _relations(found: dict[str, list[Fact]], wordings: dict[str, list[str]]) -> dict[str, Relation]:
    relations = {}
    for name, facts in found.items():
        answers: dict[str, set[str]] = {}
        for fact in facts:
            answers.setdefault(fact.key, set()).add(fact.answer)
        kept = {fact.key: fact for fact in facts if len(answers[fact.key]) == 1}
        if kept and name in wordings:
            relations[name] = Relation(
                name=name,
                wordings=tuple(dict.fromkeys(wordings[name])),
                # In an order that is not the file's: draws do not depend on it.
                facts=tuple(sorted(kept.values(), key=lambda fact: fact.key)),
            )
    if not relations:
        raise DataError("the data hold no relation with a wording that ends in its answer")
    return relations


def _text(row: Any, field: str, place: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: {field} is {_told(value)}; allowed: a text")
    if half := lone_surrogate(value):
        raise DataError(f"{place}: {field} holds {half}, half of a surrogate pair")
    return value.strip()


def _texts(row: Any, field: str, place: str) -> list[str]:
    value = row.get(field)
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: {field} is {_told(value)}; allowed: a list of texts")
    return [_text({field: one}, field, place) for one in value]


def _object(row: Any, field: str, place: str) -> Any:
    value = row.get(field)
    if not isinstance(value, dict):
        raise DataError(f"{place}: {field} is {_told(value)}; allowed: an object of texts")
    return value


def _told(value: Any) -> str:
    told = repr(value)
    return "missing" if value is None else told if len(told) <= 40 else told[:37] + "..."
