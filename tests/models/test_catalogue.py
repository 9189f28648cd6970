import re

import pytest

from vesicle.models import DEFAULT_MODEL
from vesicle.models.catalogue import CATALOGUE, GEMMA3, Entry, find
from vesicle.models.hub import local_path
from vesicle.models.resolve import ACCEPTED

SHA256 = re.compile("[0-9a-f]{64}")


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_entries(entry: Entry):
    assert find(entry.name) is entry
    assert entry.name in ACCEPTED
    # Neither a path nor with an owner, as hub ids are, and a folder's name everywhere.
    assert re.fullmatch("[a-z0-9][a-z0-9.-]+", entry.name)
    assert local_path(entry.name, lead="", accepted="", revision=None) is None
    assert entry.gguf.endswith(".gguf")
    assert SHA256.fullmatch(entry.gguf_sha256)
    for wheel in entry.wheels:
        project, _, version = wheel.requirement.partition("==")
        assert wheel.file == f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
        assert SHA256.fullmatch(wheel.sha256)
        assert wheel.member.rpartition("/")[2].startswith(entry.gguf)
    assert entry.folder_bytes > entry.gguf_bytes > 0.9 * entry.download_bytes
    for text in (entry.what, entry.licence, entry.terms):
        assert "\n" not in text


def test_names_of_files_are_its_own():
    wheels = [wheel for entry in CATALOGUE.values() for wheel in entry.wheels]
    for values in (
        [entry.gguf for entry in CATALOGUE.values()],
        [wheel.file for wheel in wheels],
        [wheel.sha256 for wheel in wheels],
        [wheel.member for wheel in wheels],
    ):
        assert len({*values}) == len(values)


def test_the_default_is_the_one_that_asks_for_nothing():
    assert DEFAULT_MODEL == next(iter(CATALOGUE)) == "smollm2-135m-instruct"
    assert CATALOGUE[DEFAULT_MODEL].licence == "Apache-2.0"
    assert CATALOGUE[DEFAULT_MODEL].terms == ""
    assert "https://ai.google.dev/gemma/terms" in GEMMA3.terms
