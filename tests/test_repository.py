"""A clone holds no machine's paths and no heavy files, one version, and links that resolve."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_BYTES = 5 * 1024**2
# An absolute path in somebody's home or work folder. A URL or relative path has a word before it.
PERSONAL_PATH = re.compile(
    rb"(?<![\w.~-])/(?:home|Users|root|work|workspace)/[\w.-]+|[A-Z]:\\+Users\\"
)
MARKDOWN_LINK = re.compile(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)")
NOT_SOURCE = {"build", "dist", "runs", "__pycache__"}


def repository_files() -> list[Path]:
    """Files tracked or ready to add; without git, those outside build products and caches."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, check=True, text=True
        ).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in NOT_SOURCE or part.endswith(".egg-info") or re.match(r"\.(?!ci$)", part)
                for part in path.relative_to(ROOT).parts
            )
        ]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def test_no_file_contains_a_personal_path():
    found = {
        str(path.relative_to(ROOT)): match.group().decode()
        for path in repository_files()
        if b"\0" not in (content := path.read_bytes())
        if (match := PERSONAL_PATH.search(content))
    }
    assert found == {}


@pytest.mark.parametrize(
    ("text", "personal"),
    [
        (b'"data": "' + b"/ho" + b'me/ada/x.json"', True),
        (b"C:" + rb"\Users\ada", True),
        (b"https://example.org/home/page", False),
        (b"~/.cache/vesicle", False),
    ],
)
def test_personal_path_pattern(text: bytes, personal: bool):
    assert bool(PERSONAL_PATH.search(text)) == personal


def test_no_file_is_heavy():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in repository_files()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_version_is_the_same_everywhere():
    import vesicle

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert vesicle.__version__ == project["version"]


def test_the_oldest_transformers_tested_is_the_oldest_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    oldest = re.findall(r"^OLDEST = (\d+\.\d+)\.0$", makefile, re.MULTILINE)
    floors = [re.match(r"transformers>=([\d.]+),<6$", d) for d in project["dependencies"]]
    assert oldest == [floor[1] for floor in floors if floor]


def test_docs_links_resolve():
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in repository_files()
        if path.suffix == ".md"
        for target in MARKDOWN_LINK.findall(path.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("mailto:")
        if not (path.parent / target).exists()
    ]
    assert broken == []


def test_docs_give_the_test_command_that_ci_runs():
    command = "pip install '.[test]' && pytest"
    for name in ("README.md", ".ci/run"):
        assert command in (ROOT / name).read_text(encoding="utf-8"), name
