"""A NAMM on disk, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.engine.test_pool import SHAPE
from vesicle.errors import VesicleError
from vesicle.namm import Namm, NammSettings
from vesicle.shipped import shipped_namm


def some(network: str = "mlp") -> Namm:
    rng = np.random.default_rng(0)
    settings = NammSettings(network=network, hidden=4)
    return Namm(
        settings=settings,
        parameters=rng.normal(size=settings.n_parameters).astype(np.float32),
        profile=rng.normal(size=(3, 2)).astype(np.float32),
        gates=rng.normal(size=(3, 2, 17)).astype(np.float32),
        ages=rng.normal(size=(3, 2)).astype(np.float32),
        info={"of": "a test"},
    )


def test_saved_and_loaded(tmp_path: Path):
    namm = some()
    namm.save(tmp_path / "a")
    other = Namm.load(tmp_path / "a")
    assert other.settings == namm.settings
    assert other.info == namm.info
    assert (other.parameters == namm.parameters).all()
    assert (other.profile == namm.profile).all()
    assert (other.gates == namm.gates).all()
    assert (other.ages == namm.ages).all()
    assert other.digest() == namm.digest() != replace(namm, gates=2 * namm.gates).digest()
    assert namm.digest() != replace(namm, ages=2 * namm.ages).digest()


def test_age_adds_to_what_gates_found():
    namm, found = some(), np.array([2.0, -1.0, 5.0], np.float32)
    positions = np.array([0, 4, 9], np.int32)
    expected = found + namm.ages[2, 1] * np.log([10, 6, 1])
    assert namm.gated(2, 1, found, positions, 10) == pytest.approx(expected, rel=1e-5)
    plain = replace(namm, ages=np.zeros((0, 0), np.float32))
    assert (plain.gated(2, 1, found, positions, 10) == found).all()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"network": "cnn"}, "network is 'cnn'; allowed: bam, mlp, linear"),
        ({"hidden": 0}, "hidden is 0; allowed: 1 to 1024"),
        ({"interval": 40}, "interval is 40; allowed: multiples of 16 from 32"),
        ({"observes": 256}, "observes is 256; allowed: multiples of 16 from 32 to the interval"),
        ({"recent": -1}, "recent is -1; allowed: 0 to"),
        ({"sinks": 0, "recent": 0}, "sinks and recent are both 0; allowed: one of them above 0"),
    ],
)
def test_settings_name_what_is_wrong(what: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        NammSettings(**what)


def test_another_feature_size_is_refused():
    with pytest.raises(VesicleError, match="has 5 parameters; a 'linear' network of 18 features"):
        Namm(settings=NammSettings(network="linear"), parameters=np.zeros(5, np.float32))
    with pytest.raises(VesicleError, match="not all finite"):
        replace(some(), profile=np.array([[np.nan]], np.float32))
    with pytest.raises(VesicleError, match=r"has shape \(3,\); allowed: \(layers, KV heads\)"):
        replace(some(), profile=np.zeros(3, np.float32))
    with pytest.raises(VesicleError, match=r"have shape \(3, 2\); allowed: \(layers, KV heads, 2"):
        replace(some(), gates=np.zeros((3, 2), np.float32), ages=np.zeros((0, 0), np.float32))
    with pytest.raises(VesicleError, match=r"ages of a NAMM have shape \(2, 2\); .* \(3, 2\)"):
        replace(some(), ages=np.zeros((2, 2), np.float32))


def test_a_profile_fits_its_own_heads_alone():
    namm, shape = some(), replace(SHAPE, n_layers=3)
    assert (namm.profile_of(shape) == namm.profile).all()
    line = "profile of 3 layers of 2 KV heads; this model has 3 layers of 4 KV heads"
    with pytest.raises(VesicleError, match=line):
        namm.profile_of(replace(shape, n_kv_heads=4))
    any_model = namm.for_any_model()
    assert (any_model.profile_of(shape) == np.zeros((3, 2))).all()
    assert (any_model.parameters == namm.parameters).all()
    any_model.check_fits(replace(shape, n_kv_heads=4))


@pytest.mark.parametrize("fault", ["missing", "format", "settings", "numbers", "short"])
def test_a_damaged_one_is_told_in_one_line(tmp_path: Path, fault: str):
    some().save(tmp_path)
    config, numbers = tmp_path / "namm.json", tmp_path / "namm.safetensors"
    match fault:
        case "missing":
            config.unlink()
        case "format":
            config.write_text('{"format": "else"}')
        case "settings":
            config.write_text(config.read_text().replace('"hidden"', '"hiden"'))
        case "numbers":
            numbers.write_bytes(numbers.read_bytes()[:-9])
        case "short":
            config.write_text(config.read_text().replace('"hidden": 4', '"hidden": 5'))
    with pytest.raises(VesicleError) as caught:
        Namm.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_shipped_one_fits_the_default_model_and_is_small():
    folder = shipped_namm()
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    namm = Namm.load(folder)
    assert namm.profile.shape == (30, 3)
    assert namm.gates.shape == (30, 3, 129)
    assert namm.ages.shape == (30, 3)
    assert (namm.ages < 0).all()  # what is old is needed less
    assert int(namm.profile.max(1).argmax()) == 18  # where pass keys are found
