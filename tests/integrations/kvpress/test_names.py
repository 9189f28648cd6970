"""Presses by name: what is found, with which arguments, and what is refused in one line."""

import re
from importlib import metadata
from types import ModuleType

import pytest

from tests.integrations.kvpress.doubles import small_kvpress
from vesicle.errors import VesicleError
from vesicle.integrations.kvpress import check_press, make_press, names, press_names


@pytest.fixture
def kvpress(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = small_kvpress()
    monkeypatch.setattr(names, "find_kvpress", lambda: module)
    return module


@pytest.mark.usefixtures("kvpress")
def test_names_are_those_that_need_only_a_ratio():
    assert press_names() == ["Knorm", "SnapKV"]


@pytest.mark.parametrize("name", ["SnapKV", "snapkv", "SnapKVPress", "SNAPKVPRESS", " snapKV() "])
def test_a_name_in_any_case_with_or_without_its_ending(kvpress: ModuleType, name: str):
    assert make_press(name, 0.25) == kvpress.SnapKVPress(compression_ratio=0.25)


def test_arguments_are_literals(kvpress: ModuleType):
    expected = kvpress.SnapKVPress(compression_ratio=0.5, window_size=32)
    assert make_press("SnapKV(window_size=32)", 0.5) == expected


@pytest.mark.parametrize(
    "name", ["AdaKV(SnapKV(window_size=8))", "adakv(press=snapkv(window_size=8))"]
)
def test_a_wrapper_hands_the_ratio_on(kvpress: ModuleType, name: str):
    press = make_press(name, 0.5)
    assert isinstance(press, kvpress.AdaKVPress)
    assert press.press == kvpress.SnapKVPress(compression_ratio=0.5, window_size=8)


@pytest.mark.usefixtures("kvpress")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SnapKW", "no press 'SnapKW'; did you mean SnapKV?"),
        ("zzzzzzzz", "no press 'zzzzzzzz'; it has AdaKV, DMS, Decoding, Knorm, SnapKV"),
        ("NotAPress", "no press 'NotAPress'"),
        ("BasePress", "no press 'BasePress'"),
        ("", "cannot read press ''"),
        ("Snap KV", "cannot read press 'Snap KV'"),
        ("SnapKV(window_size=", "cannot read press"),
        ("kvpress.SnapKV", "cannot read press"),
        ("SnapKV(window_size=open('x'))", "no press 'open'"),
        ("SnapKV(window_size=1+a)", "cannot read press"),
        ("SnapKV(32)", "cannot read press"),
        ("SnapKV(**{'window_size': 1})", "cannot read press"),
        ("SnapKV(\0)", "cannot read press"),
        ("SnapKV(window=3)", "cannot build 'SnapKV(window=3)'"),
        ("SnapKV(window_size=-1)", "window_size must be positive"),
        ("SnapKV(compression_ratio=0.3)", "given apart from the name"),
        ("AdaKV", "cannot build 'AdaKV'"),
        ("AdaKV(SnapKW)", "did you mean SnapKV?"),
        ("DMS(SnapKV)", "DMSPress takes no compression ratio"),
        ("Decoding", "DecodingPress takes no compression ratio"),
    ],
)
def test_other_names_are_refused(name: str, says: str):
    for call in (lambda: make_press(name, 0.5), lambda: check_press(name)):
        with pytest.raises(VesicleError, match=re.escape(says)):
            call()


@pytest.mark.usefixtures("kvpress")
def test_a_name_that_can_be_built_passes():
    check_press("AdaKV(SnapKV(window_size=8))")


@pytest.mark.usefixtures("kvpress")
@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio: float):
    with pytest.raises(VesicleError, match="allowed: 0 to below 1"):
        make_press("SnapKV", ratio)


def test_without_kvpress_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    for call in (press_names, lambda: make_press("SnapKV", 0.5)):
        with pytest.raises(VesicleError, match=re.escape("pip install 'vesicle[kvpress]'")):
            call()


def test_a_transformers_that_kvpress_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy", "transformers<2,>=1"])
    monkeypatch.setattr(metadata, "version", lambda name: "5.2.0")
    with pytest.raises(VesicleError, match=r"needs transformers <2,>=1; 5\.2\.0 is installed"):
        press_names()
