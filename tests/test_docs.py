"""The docs cover every registry entry and setting; the code, commands and files they show exist."""

import ast
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import vesicle
from vesicle.cli import app, load_command
from vesicle.commands import GROUPS, SUMMARIES, neurons
from vesicle.cost import Cost
from vesicle.effectors import EFFECTORS
from vesicle.evaluation.methods.names import ON_A_TEXT
from vesicle.families import FAMILIES, supported_model_types
from vesicle.plan import FIELDS, SITES
from vesicle.predictors import BASELINES, CONTROLS, PREDICTORS
from vesicle.training.trainer import TrainConfig
from vesicle.transmitters import TRANSMITTERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(vesicle [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCE = ROOT / "src" / "vesicle"
NO_LIMITS = {
    "cli.md",
    "index.md",
    "json.md",
    "log.md",
    "notation.md",
    "extending.md",
    "families.md",
}
"""Pages of `docs/` that have no section on when not to use their subject."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: str) -> str:
    return (DOCS / path).read_text(encoding="utf-8")


def headings(path: Path) -> list[str]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")]


def missing(names: Any, text: str) -> list[str]:
    """The names that a page does not mention as code."""
    return [name for name in names if f"`{name}`" not in text]


# Coverage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TRANSMITTERS))
def test_every_transmitter_has_a_page(name: str):
    text = text_of(f"transmitters/{name}.md")
    assert ("**It rests today.**" in text) == (name not in EFFECTORS)


@pytest.mark.parametrize("name", list(EFFECTORS))
def test_every_setting_of_an_effector_is_on_its_page(name: str):
    text, kind = text_of(f"transmitters/{name}.md"), EFFECTORS[name]
    assert missing([kind.__name__, *(f.name for f in dataclasses.fields(kind))], text) == []


@pytest.mark.parametrize("name", [*PREDICTORS, *CONTROLS])
def test_every_predictor_and_control_has_a_page(name: str):
    text = text_of(f"predictors/{name}.md")
    assert f"Kind `{name}`" in text if name in PREDICTORS else f"Control `{name}`" in text
    assert name in PREDICTORS or missing([CONTROLS[name].__name__], text) == []


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_has_a_section(name: str):
    text = text_of("adaptive_depth.md")
    assert f"Kind `{name}`, class `{BASELINES[name].__name__}`" in text


def test_every_family_has_a_section():
    assert {f"`{name}`" for name in FAMILIES} <= set(headings(DOCS / "families.md"))
    assert missing(supported_model_types(), text_of("families.md")) == []


def test_pages_of_transmitters_and_predictors_belong_to_something():
    assert {path.stem for path in (DOCS / "transmitters").iterdir()} == set(TRANSMITTERS)
    assert {path.stem for path in (DOCS / "predictors").iterdir()} == {*PREDICTORS, *CONTROLS}


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("plan.md", [field.name for field in FIELDS]),
        ("notation.md", SITES),
        ("ledger.md", [f.name for f in dataclasses.fields(Cost)]),
        ("training.md", [f.name for f in dataclasses.fields(TrainConfig)]),
        ("regret.md", ON_A_TEXT),
    ],
)
def test_every_name_is_on_the_page_about_it(page: str, names: Any):
    assert missing(names, text_of(page)) == []


def test_every_page_is_in_the_index():
    links = LINK.findall(text_of("index.md"))
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links}
    pages = set(DOCS.rglob("*.md")) - {DOCS / "index.md"}
    assert sorted(name_of(page) for page in pages - linked) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_says_when_not_to_use_it(page: Path):
    if page.name not in NO_LIMITS:
        assert any(h.startswith("When not to") for h in headings(page))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_headings_resolve(page: Path):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        if anchor and "://" not in target:
            found = headings((page.parent / target).resolve() if target else page)
            assert anchor in [_anchor(h) for h in found], link


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Code -------------------------------------------------------------------------------------------


SNIPPETS = [
    pytest.param(code, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, (language, code) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
    if language == "python"
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_compiles_and_imports_what_exists(code: str):
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.ImportFrom(module=str(source), names=names) if source.startswith("vesicle"):
                module = importlib.import_module(source)
                assert [n.name for n in names if not hasattr(module, n.name)] == []
            case ast.Attribute(value=ast.Name(id="vesicle"), attr=name):
                assert hasattr(vesicle, name), name


READ_ME = [p for p in SNIPPETS if str(p.id).startswith("README")]


@pytest.mark.model
@pytest.mark.parametrize("code", READ_ME)
def test_the_readmes_python_runs(code: str, tmp_path: Path):
    """As a newcomer pastes it."""
    file = tmp_path / "snippet.py"
    file.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `vesicle ...` in fenced shell and in running text."""
    text = page.read_text(encoding="utf-8")
    lines = [m.strip() for m in INLINE.findall(text) if "..." not in m]
    for language, code in FENCE.findall(text):
        if language in ("bash", "sh", "console"):
            lines += code.replace("\\\n", " ").splitlines()
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        while "vesicle" in words:
            words = words[words.index("vesicle") + 1 :]
            ends = (i for i, word in enumerate(words) if re.fullmatch(r"[|&;<>]+", word))
            yield words[: next(ends, len(words))]


COMMANDS = [
    pytest.param(words, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, words in enumerate(commands(page))
]


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_have_these_options(words: list[str]):
    command: Any = typer.main.get_command(app)
    rest = list(words)
    if rest and not rest[0].startswith("-"):
        assert rest[0] in SUMMARIES, f"no command {rest[0]!r}"
        name = rest.pop(0)
        command = load_command(name)
        if name in GROUPS and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"no command {name} {rest[0]!r}"
            command = load_command(rest.pop(0), f"vesicle.commands.{name}")
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    assert [option for option in given if option not in options] == []
    # A command mentioned with no more than option names is not a whole command line.
    if rest and "--help" not in rest and not rest[-1].startswith("--"):
        assert command.make_context(command.name, list(rest)) is not None


def test_readme_shows_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert missing([f"vesicle {name}" for name in SUMMARIES], text) == []


@pytest.mark.parametrize("name", SUMMARIES)
def test_a_summary_is_how_the_help_begins(name: str):
    assert f"{load_command(name).help}\n\n".startswith(f"{SUMMARIES[name]}\n\n")


@pytest.mark.parametrize("name", neurons.SUMMARIES)
def test_so_it_does_for_commands_about_neurons(name: str):
    command = load_command(name, "vesicle.commands.neurons")
    assert command.help.startswith(f"{neurons.SUMMARIES[name]}\n\n")
    assert f"vesicle neurons {name}" in command.help


@pytest.mark.parametrize("marker", ["README.md:results", "docs/training.md:shipped"])
def test_marked_blocks_are_closed(marker: str):
    page, _, name = marker.partition(":")
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


# Files ------------------------------------------------------------------------------------------


def test_the_readmes_tree_is_the_tree():
    """Every path in it exists, and everything at the top of the package is in it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(code for _, code in FENCE.findall(text) if code.startswith("src/vesicle/"))
    shown, stack = set(), [ROOT]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[: depth + 1], stack[depth] / line.split()[0]]
        shown.add(stack[-1])
    assert [name_of(path) for path in shown if not path.exists()] == []
    own = {p for p in SOURCE.iterdir() if p.suffix == ".py" or p.is_dir()}
    hidden = {p for p in own if p.name.startswith(("__", "."))}
    assert sorted(name_of(path) for path in own - hidden - shown) == []
