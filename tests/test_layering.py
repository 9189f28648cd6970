"""Imports go one way, in data-flow order; slow libraries are imported where they are needed."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "vesicle"
TIERS = """
    errors < terminal streams files processors < figures intervals records folders
    < transmitters shapes < nested activations phases < small_modules preview < plan tiling
    < blocks retention eviction reading
    < namm < cost < families < models < predictors < effectors < modulator
    < shipped reference engine
    < integrations < presses < calibration < training < scratch < duo < tasks < evaluation
    < neurons evolution kept < report < bench < studies < commands < cli
"""
# A module may import itself and lower tiers. Two names in one tier may not import each other.
RANK = {name: rank for rank, tier in enumerate(TIERS.split("<")) for name in tier.split()}
EVALUATION = ("execution", "methods", "report", "run")
"""The order within `evaluation`."""
USES_TRANSFORMERS = {
    "models",
    "reference",
    "training",
    "scratch",
    "studies",
    "evaluation",
    "families",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The top-level module a file belongs to; "" for the package's own __init__ and __main__."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name.startswith("__") else name


def imports(path: Path, *, deferred: bool) -> Iterator[tuple[str, int]]:
    """Dotted names a file imports, with lines; deferred adds functions and TYPE_CHECKING."""
    parents = ["vesicle", *path.relative_to(PACKAGE).parent.parts]
    queue: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while queue:
        match queue.pop():
            case ast.Import(names=names, lineno=line):
                yield from ((name.name, line) for name in names)
            case ast.ImportFrom(module=module, names=names, level=level, lineno=line):
                base = parents[: len(parents) + 1 - level] if level else []
                prefix = ".".join([*base, *([module] if module else [])])
                yield from ((f"{prefix}.{name.name}", line) for name in names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda() if not deferred:
                pass
            case ast.If(test=test, orelse=orelse) if (
                not deferred and "TYPE_CHECKING" in ast.unparse(test)
            ):
                queue.extend(orelse)
            case node:
                queue.extend(ast.iter_child_nodes(node))


def wrong_way(path: Path) -> Iterator[str]:
    unit = unit_of(path)
    for name, line in imports(path, deferred=True):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root != "vesicle" or target == unit or target == "__version__":
            continue
        if target not in RANK:
            yield f"{path.name}:{line} imports {name}: name the module, not the package"
        elif RANK[target] >= RANK[unit]:
            yield f"{path.name}:{line} {unit} imports {target}, which is not below it"


def test_every_module_has_a_place_in_the_order():
    assert {unit_of(path) for path in FILES} - {""} <= RANK.keys(), "add the new module to TIERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_respect_the_order(path: Path):
    unit = unit_of(path)
    if unit in RANK:
        assert list(wrong_way(path)) == []
    on_import = {name.partition(".")[0] for name, _ in imports(path, deferred=False)}
    assert unit in USES_TRANSFORMERS or "transformers" not in on_import
    assert unit != "cli" or "torch" not in on_import, "`vesicle --help` must not wait for torch"


@pytest.mark.parametrize("folder", EVALUATION)
def test_evaluation_has_an_order_of_its_own(folder: str):
    above = [f"vesicle.evaluation.{f}." for f in EVALUATION[EVALUATION.index(folder) + 1 :]]
    found = [
        f"{path.name}:{line} imports {name}"
        for path in sorted((PACKAGE / "evaluation" / folder).glob("*.py"))
        for name, line in imports(path, deferred=True)
        if name.startswith(tuple(above))
    ]
    assert found == []
