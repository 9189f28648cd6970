"""What is shipped for which model."""

from pathlib import Path

import pytest

from vesicle import shipped
from vesicle.files import cache_root
from vesicle.models.catalogue import CATALOGUE
from vesicle.modulator import Modulator


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESICLE_CACHE", str(tmp_path / "cache"))
    folder = cache_root() / "models"
    assert folder.is_relative_to(tmp_path)
    (folder / "smollm2-135m-instruct").mkdir(parents=True)
    return folder


def test_a_model_of_the_catalogue_has_its_own(models: Path):
    folder = models / "smollm2-135m-instruct"
    assert shipped.modulator_for(folder) == shipped.shipped_modulator()
    assert shipped.namm_for(folder) == shipped.shipped_namm()


def test_it_may_be_kept_elsewhere(models: Path, tmp_path: Path):
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (models / "gemma3-270m").symlink_to(elsewhere)
    assert shipped.name_of(elsewhere) == shipped.name_of(models / "gemma3-270m") == "gemma3-270m"


@pytest.mark.parametrize("name", ["mine", "smollm2-135m-instruct"])
def test_a_model_of_other_origin_has_none(models: Path, tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    assert shipped.modulator_for(tmp_path / name) is shipped.namm_for(tmp_path / name) is None
    (models / "mine").mkdir()
    assert shipped.name_of(models / "mine") == ""


def test_what_is_shipped_is_small_and_of_the_catalogue():
    found = shipped.shipped_modulators()
    assert {"smollm2-135m-instruct", "gemma3-270m"} <= set(found) <= set(CATALOGUE)
    for name, folder in found.items():
        modulator = Modulator.from_pretrained(folder)
        assert modulator.info.model_name == name
        assert modulator.info.dial[0][0] < 0.8
        assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    assert set(shipped.shipped_namms()) <= set(CATALOGUE)
