import gzip
import json
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.tasks.rows import HUB, LOCAL, SETTINGS, write_rows
from vesicle.errors import DataError
from vesicle.tasks.base import HubSet, Task
from vesicle.tasks.hub import HubArchive
from vesicle.tasks.items import Item
from vesicle.tasks.longbench import LongBench
from vesicle.tasks.registry import find_task
from vesicle.tasks.sources import load_items


def load(task, data, split=None, limit=None, seed=0):
    task = find_task(task) if isinstance(task, str) else task
    settings = replace(SETTINGS, seed=seed)
    return load_items(task, data=data, split=split, settings=settings, limit=limit)


def failure(task, data, split=None):
    """The one line that loading fails with."""
    with pytest.raises(DataError) as raised:
        load(task, data, split)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the rows of `HUB`, and notes what it was asked for."""
    asked = []

    def load_dataset(path, configuration=None, *, split, streaming):
        asked.append((path, configuration, split, streaming))
        known = {(t.hub.path, t.hub.configuration): rows for t, rows in tasks}
        return iter(known[path, configuration])

    tasks = [(find_task(name), rows) for name, rows in HUB.items()]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    return asked


# Sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUB)
def test_the_sample(name):
    loaded = load(name, "sample")
    task = find_task(name)
    assert loaded.origin == "sample"
    assert loaded.split == task.default_split
    assert loaded.description == f"the sample that comes with Vesicle, {task.folder}.jsonl"
    assert len(loaded.items) == loaded.available == (1 if task.kind == "loss" else loaded.available)
    assert len({item.id for item in loaded.items}) == len(loaded.items)
    assert all(item.context for item in loaded.items)
    assert {
        "generate": lambda i: i.references and all(i.references) and i.max_new_tokens > 0,
        "choose": lambda i: len(i.choices) == 4 and i.choices[i.answer],
        "loss": lambda i: not i.question,
    }[task.kind](loaded.items[0])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("name", LOCAL)
def test_a_local_folder_with_folders_of_tasks_or_the_task_s_own(name, suffix, tmp_path):
    task = find_task(name)
    split = task.splits[-1]
    file = write_rows(tmp_path / task.folder / f"{split}{suffix}", LOCAL[name])
    loaded = load(name, str(tmp_path), split)
    assert loaded == load(name, str(file.parent), split)
    assert loaded.origin == "local"
    assert loaded.description == f"{task.folder}/{split}{suffix} of a local folder"
    assert str(tmp_path) not in repr(loaded)
    assert len(loaded.items) == 1


@pytest.mark.parametrize("name", sorted(set(HUB) - {"longbench"}))
def test_the_hub_gives_what_a_local_folder_gives(name, hub, tmp_path):
    task = find_task(name)
    loaded = load(name, None)
    there = (task.hub.path, task.hub.configuration, task.default_split)
    assert hub == [(*there, True)]
    assert loaded.origin == "hub"
    assert loaded.description == " ".join(filter(None, there)) + " of the Hugging Face hub"
    write_rows(tmp_path / task.folder / f"{task.default_split}.jsonl", LOCAL[name])
    local = load(name, str(tmp_path)).items[0]
    assert replace(loaded.items[0], id=local.id) == local


def test_ids_are_unique_before_anything_is_drawn(hub):
    ids = ["high7", "high7#2", "middle3"]
    assert [item.id for item in load("race", None).items] == ids
    one = [load("race", None, limit=1, seed=seed).items[0].id for seed in range(20)]
    assert set(one) == set(ids)


def test_longbench_is_read_from_the_archive_on_the_hub(tmp_path, monkeypatch):
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("qasper", "trec", "narrativeqa_e"):
            row = {**HUB["longbench"][0], "dataset": name, "_id": name, "context": "a\u2028b"}
            file.writestr(f"data/{name}.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    calls = []

    def download(path, file, *, repo_type, local_files_only=False):
        from huggingface_hub.errors import LocalEntryNotFoundError

        calls.append((path, file, repo_type, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    assert LongBench.hub.members[:2] == ("data/narrativeqa.jsonl", "data/qasper.jsonl")
    assert len(LongBench.hub.members) == 21

    class Two(LongBench):
        hub = HubArchive(
            path="zai-org/LongBench",
            file="data.zip",
            members=("data/qasper.jsonl", "data/trec.jsonl"),
        )

    assert [item.group for item in load(Two(), None).items] == ["qasper", "trec"]
    there = ("zai-org/LongBench", "data.zip", "dataset")
    assert calls == [(*there, True), (*there, False)]
    message = failure("longbench", None)
    assert "There is no item named 'data/narrativeqa.jsonl'" in message
    assert "--data DIR with longbench/test.jsonl.gz" in message


class Filler(Task):
    """Stands for a generated task: no data set of its own."""

    name = "made_up"
    title = "Made up"
    kind = "generate"
    metrics = ()
    folder = "essays"
    hub = None
    splits = ("any",)
    default_split = "any"
    fields = {"text": str}  # noqa: RUF012

    def items(self, rows, settings):
        text = " ".join(row["text"] for row in rows)
        yield Item(id=str(settings.seed), context=text)


@pytest.mark.parametrize("data", [None, "sample"])
def test_a_task_without_data_gets_filler(data):
    loaded = load(Filler(), data, seed=3)
    assert loaded.description == "the filler text that comes with Vesicle, filler.jsonl"
    assert len(loaded.items[0].context) > 5000
    assert loaded.items[0].id == "3"


def test_a_task_without_data_takes_filler_from_a_local_folder(tmp_path):
    write_rows(tmp_path / "essays" / "any.jsonl", [{"text": "Walls."}, {"text": "Doors."}])
    assert load(Filler(), str(tmp_path)).items[0].context == "Walls. Doors."


def test_wikitext103_may_have_its_own_folder(tmp_path):
    write_rows(tmp_path / "wikitext2" / "test.jsonl", LOCAL["wikitext2"])
    write_rows(tmp_path / "wikitext2" / "train.jsonl", LOCAL["wikitext2"])
    assert "Tea" in load("wikitext103", str(tmp_path)).items[0].context
    write_rows(tmp_path / "wikitext103" / "test.jsonl", LOCAL["wikitext103"])
    assert "Sea" in load("wikitext103", str(tmp_path)).items[0].context


# Drawing ----------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    rows = [{"id": f"{n}", "en": f"House {n}.", "de": f"Haus {n}."} for n in range(100)]
    write_rows(tmp_path / "wmt14_en_de" / "test.jsonl", rows)
    return str(tmp_path)


def drawn(many, limit, seed=0):
    return [int(item.id) for item in load("wmt14_en_de", many, limit=limit, seed=seed).items]


def test_a_draw_depends_on_the_seed_alone_and_keeps_the_order(many):
    ten = drawn(many, 10)
    assert ten == sorted(set(ten))
    assert ten == drawn(many, 10) == [25, 35, 40, 46, 52, 56, 70, 71, 75, 97]
    assert ten != drawn(many, 10, seed=1)
    assert set(ten) < set(drawn(many, 20))
    assert drawn(many, 100) == drawn(many, 1000) == drawn(many, None) == list(range(100))
    assert load("wmt14_en_de", many, limit=10).available == 100


def test_every_item_is_drawn_as_often_as_any_other(many):
    counts = [0] * 100
    for seed in range(200):
        for number in drawn(many, 10, seed):
            counts[number] += 1
    # 20 expected, standard deviation 4.2.
    assert min(counts) > 4
    assert max(counts) < 40


def test_documents_are_not_limited(tmp_path):
    rows = [{"text": "One."}, {"text": "Two."}]
    write_rows(tmp_path / "wikitext2" / "test.jsonl", rows)
    assert len(load("wikitext2", str(tmp_path), limit=1).items) == 2


def test_a_limit_below_one_is_a_bug():
    with pytest.raises(ValueError, match="limit is 0"):
        load("squad", "sample", limit=0)


def test_the_digest_is_of_the_drawn_content(many, tmp_path):
    digest = load("wmt14_en_de", many).sha256
    assert len(digest) == 64
    assert digest == load("wmt14_en_de", many, seed=5).sha256
    assert digest != load("wmt14_en_de", many, limit=99).sha256
    file = tmp_path / "wmt14_en_de" / "test.jsonl"
    text = file.read_text()
    file.write_text(text.replace("Haus 99.", "Haus 98."))
    assert digest != load("wmt14_en_de", many).sha256
    # Spacing and the order of fields are not content.
    rows = [dict(reversed(json.loads(line).items())) for line in text.splitlines()]
    write_rows(file, rows)
    assert digest == load("wmt14_en_de", many).sha256


# Problems ---------------------------------------------------------------------------------------


def test_folders_that_are_missing(tmp_path):
    message = failure("squad", str(tmp_path / "nowhere"))
    assert "nowhere does not exist" in message
    assert "docs/tasks/local_data.md" in message
    (tmp_path / "file").write_text("")
    assert "is a file, and a folder is needed" in failure("squad", str(tmp_path / "file"))
    assert failure("squad", str(tmp_path)).endswith(
        "looked for squad/ with SPLIT.jsonl.gz or SPLIT.jsonl files; folders there: none; "
        "see docs/tasks/local_data.md"
    )
    write_rows(tmp_path / "race" / "test.jsonl", [])
    write_rows(tmp_path / "arxiv" / "test.jsonl.gz", [])
    (tmp_path / "squad").mkdir()
    assert "folders there: arxiv, race;" in failure("squad", str(tmp_path))
    assert "looked for wikitext103/ and wikitext2/ with" in failure("wikitext103", str(tmp_path))
    for number in range(20):
        write_rows(tmp_path / f"more{number:02}" / "test.jsonl", [])
    assert ", more10 and 10 more;" in failure("squad", str(tmp_path))


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", refused)
    assert "cannot read the folder" in failure("squad", str(tmp_path))


def test_splits_that_are_missing(tmp_path):
    write_rows(tmp_path / "squad" / "train.jsonl", LOCAL["squad"])
    write_rows(tmp_path / "squad" / "dev.jsonl.gz", LOCAL["squad"])
    message = failure("squad", str(tmp_path))
    assert "no split 'validation' of squad" in message
    assert (
        "looked for validation.jsonl.gz and validation.jsonl; splits there: dev, train" in message
    )
    assert load("squad", str(tmp_path), "dev").split == "dev"
    for data in (None, "sample"):
        expected = "squad has no split 'test'; allowed: validation, train"
        assert failure("squad", data, "test") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b"[1]\n", "line 1 is not a JSON object but a list with other things than text"),
        (b'"a"\n', "line 1 is not a JSON object but text"),
        (b"\n{oops\n", "line 2 is not JSON: Expecting property name"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"\xff\n", "is not UTF-8 text"),
        (
            b'{"id": "a", "en": "x"}\n',
            "line 1 has no field 'de'; fields there: en, id; wmt14_en_de",
        ),
        (b'{"en": "x"}\n', "wmt14_en_de needs: en, de"),
        (b'{"en": "x", "de": 3}\n', "line 1: field 'de' is a whole number; allowed: text"),
        (b'{"en": null, "de": "x"}\n', "field 'en' is null; allowed: text"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_that_are_wrong(content, message, packed, tmp_path):
    file = tmp_path / "wmt14_en_de" / ("test.jsonl.gz" if packed else "test.jsonl")
    file.parent.mkdir()
    file.write_bytes(gzip.compress(content) if packed else content)
    assert message in failure("wmt14_en_de", str(tmp_path))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("squad", {"answers": "1709"}, "'answers' is text; allowed: a list of texts"),
        ("squad", {"answers": [1709]}, "'answers' is a list with other things than text"),
        ("squad", {"answers": {"text": ["1709"]}}, "'answers' is an object"),
        ("race", {"answer": "C"}, "'answer' is text; allowed: a whole number"),
        ("race", {"answer": True}, "'answer' is true or false; allowed: a whole number"),
        ("race", {"answer": 1.0}, "'answer' is a number; allowed: a whole number"),
        ("race", {"answer": 4}, "has the answer 4 to 4 options; allowed: the index"),
        ("longbench", {"dataset": "gsm8k"}, "'gsm8k'; allowed: narrativeqa, qasper"),
        ("wikitext2", {"text": " \n"}, "holds nothing to ask"),
    ],
)
def test_rows_that_are_wrong(task, change, message, tmp_path):
    split = find_task(task).default_split
    write_rows(tmp_path / task / f"{split}.jsonl", [{**LOCAL[task][0], **change}])
    assert message in failure(task, str(tmp_path))


def test_broken_gzip(tmp_path):
    file = write_rows(tmp_path / "squad" / "validation.jsonl.gz", LOCAL["squad"])
    whole = file.read_bytes()
    for broken in (whole[:-6], b"not gzip", whole[:20] + b"\0" * 20 + whole[40:]):
        file.write_bytes(broken)
        assert "is not a whole gzip file" in failure("squad", str(tmp_path))


def test_a_hub_that_cannot_be_read(monkeypatch, hub):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host.\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    for name, where, file in (
        ("squad", "rajpurkar/squad validation", "squad/validation"),
        ("longbench", "LongBench test", "longbench/test"),
        ("needle", "baber/paul_graham_essays train", "paul_graham_essays/train"),
    ):
        assert failure(name, None).endswith(
            f"{where} from the Hugging Face hub: no route to host; use --data sample (comes with "
            f"Vesicle), or --data DIR with {file}.jsonl.gz in it (docs/tasks/local_data.md)"
        )
    assert hub == []


def test_a_hub_that_fails_halfway_or_changed_its_form(monkeypatch, hub):
    def rows(*_, **__):
        yield HUB["squad"][0]
        raise OSError

    monkeypatch.setattr("datasets.load_dataset", rows)
    assert "from the Hugging Face hub: OSError; use" in failure("squad", None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"id": "1", "answers": []}])
    message = failure("squad", None)
    assert "rajpurkar/squad validation row 1 has another form than squad knows" in message
    assert "fields there: answers, id" in message
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "a"}])
    assert "has no field 'article'; fields there: text;" in failure("arxiv", None)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [])
    assert "rajpurkar/squad validation holds no rows" in failure("squad", None)


def test_the_library_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = failure("squad", None)
    assert "the package datasets: pip install 'vesicle[eval]', or use --data sample" in message


def test_splits_may_have_other_names_on_the_hub(hub):
    class Renamed(type(find_task("squad"))):
        hub = HubSet(path="rajpurkar/squad", splits={"validation": "dev"})

    load(Renamed(), None)
    assert hub == [("rajpurkar/squad", None, "dev", True)]
