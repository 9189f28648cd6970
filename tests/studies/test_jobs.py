"""Jobs: done once, gone on with, and done anew where what they depend on has changed."""

from pathlib import Path

import pytest

from vesicle.errors import VesicleError
from vesicle.files import read_json
from vesicle.studies.jobs import Job, run_jobs


def noted(out: Path, *, number: int, where: str = "") -> dict[str, int]:
    """A job that leaves a trace of each time that it runs."""
    with (out / "trace").open("a") as file:
        file.write(f"{number}\n")
    if number < 0:
        raise VesicleError(f"{number} is below 0")
    return {"square": number * number}


def job(number: int, **facts: int) -> Job:
    return Job(
        name=f"some/{number}",
        call=f"{__name__}:noted",
        facts={"number": number, **facts},
        where={"where": "/a/place"},
    )


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this())


def _this():
    import types

    module = types.ModuleType(__name__)
    module.noted = noted
    return module


def ran(out: Path) -> list[int]:
    return [int(line) for line in (out / "trace").read_text().split()]


def test_each_is_done_once(tmp_path: Path):
    told: list[str] = []
    jobs = [job(2), job(3)]
    first = run_jobs(jobs, tmp_path, workers=1, show=told.append)
    again = run_jobs([*jobs, job(4)], tmp_path, workers=1, show=told.append)
    assert first == {"some/2": {"square": 4}, "some/3": {"square": 9}}
    assert again == {**first, "some/4": {"square": 16}}
    assert ran(tmp_path) == [2, 3, 4]
    assert told == ["some/2", "some/3", "some/2", "some/3", "some/4"]


def test_no_place_of_this_machine_is_kept(tmp_path: Path):
    run_jobs([job(2)], tmp_path, workers=1)
    record = read_json(tmp_path / "records" / "some" / "2.json")
    assert record["facts"] == {"number": 2}
    assert "/a/place" not in str(record)


def test_other_facts_are_another_job(tmp_path: Path):
    run_jobs([job(2)], tmp_path, workers=1)
    other = Job(name="some/2", call=f"{__name__}:noted", facts={"number": 5})
    assert run_jobs([other], tmp_path, workers=1) == {"some/2": {"square": 25}}
    assert ran(tmp_path) == [2, 5]


def test_what_fails_is_named_and_what_was_done_stays(tmp_path: Path):
    with pytest.raises(VesicleError, match="some/-1: -1 is below 0"):
        run_jobs([job(2), job(-1), job(3)], tmp_path, workers=1)
    assert job(2).done(tmp_path) == {"square": 4}
    assert job(-1).done(tmp_path) is None
    assert job(3).done(tmp_path) is None


@pytest.mark.parametrize("content", ['{"call": ', "[]", '{"facts": {}}'])
def test_a_damaged_record_is_named_and_can_be_removed(tmp_path: Path, content: str):
    run_jobs([job(2)], tmp_path, workers=1)
    path = tmp_path / "records" / "some" / "2.json"
    path.write_text(content)
    with pytest.raises(VesicleError, match=r"2\.json is damaged; remove it") as told:
        run_jobs([job(2)], tmp_path, workers=1)
    assert "at at" not in str(told.value)
    path.unlink()
    run_jobs([job(2)], tmp_path, workers=1)
    assert ran(tmp_path) == [2, 2]
