"""Texts of small decoders: what counts is what is to be told, and nothing is cut off it."""

import json
from pathlib import Path

import pytest
import torch

from vesicle.errors import DataError
from vesicle.studies.corpora import TASKS, fingerprint, load_corpus, load_mixture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = {
        "wikitext2": [{"text": f"Line {i} of a text that goes on. " * 9} for i in range(20)],
        "multi30k": [{"en": f"A man has {i} dogs.", "de": f"{i} Hunde."} for i in range(40)],
        "pubmed": [{"article": f"word{i} " * 300, "abstract": f"short {i}"} for i in range(5)],
    }
    for name, some in rows.items():
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            lines = "".join(json.dumps(row) + "\n" for row in some)
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    return tmp_path


def load(task: str, data: str | None, length: int = 200):
    return load_corpus(task, data, vocabulary=300, length=length, most_test=3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("source", ["folder", "sample"])
def test_windows(task: str, source: str, folder: Path):
    corpus = load(task, str(folder) if source == "folder" else "sample")
    assert corpus.train.shape == corpus.scored[0].shape
    assert corpus.train.shape[1] == 200
    assert 1 <= len(corpus.test) <= 3
    assert corpus.test.shape == corpus.scored[2].shape
    assert (
        len(corpus.prompts) == len(corpus.references) == (0 if task == "lm" else len(corpus.test))
    )


@pytest.mark.parametrize("task", ["translation", "summary"])
def test_the_target_counts_and_ends(task: str, folder: Path):
    corpus = load(task, str(folder))
    for ids, scored, prompt, reference in zip(
        corpus.test, corpus.scored[2], corpus.prompts, corpus.references, strict=True
    ):
        assert ids[: len(prompt)].tolist() == prompt
        assert not scored[: len(prompt)].any()
        told = ids[scored]
        assert int(told[-1]) == 0
        assert corpus.tokenizer.decode(told[:-1].tolist()) == reference
        assert int(scored.sum()) == len(told)


def test_captions_come_eight_at_a_time(folder: Path):
    corpus = load("translation", str(folder))
    text = corpus.tokenizer.decode(corpus.prompts[0])
    assert text.count("dogs.") == 8
    assert len(corpus.train) == 5


def test_all_tokens_of_running_text_count(folder: Path):
    corpus = load("lm", str(folder))
    assert bool(corpus.scored[0].all())
    more = load_corpus(
        "lm", str(folder), vocabulary=300, length=200, most_test=3, more=["another one " * 99]
    )
    assert len(more.train) > len(corpus.train)
    assert torch.equal(more.test[:, :0], corpus.test[:, :0])


def test_a_fingerprint_is_of_content(folder: Path):
    before = {task: fingerprint(task, str(folder), None) for task in TASKS}
    assert fingerprint("lm", "sample", None) == "sample"
    with (folder / "multi30k" / "test.jsonl").open("a") as file:
        file.write('{"en": "more", "de": "mehr"}\n')
    after = {task: fingerprint(task, str(folder), None) for task in TASKS}
    assert [t for t in TASKS if before[t] != after[t]] == ["translation"]


def test_what_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no wikitext2/train"):
        load("lm", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="too little text for 90000 tokens"):
        load("lm", str(folder), 90000)
    (folder / "multi30k" / "train.jsonl").write_text('{"en": "alone"}\n')
    with pytest.raises(DataError, match="no text in field 'de'"):
        load("translation", str(folder))


def test_a_source_is_left_room_by_its_target():
    corpora = load_mixture(
        ("translation", "summary"),
        "sample",
        vocabulary=300,
        length=120,
        most_test=2,
        captions=1,
        told=0.5,
    )
    for corpus in corpora.values():
        scored = corpus.scored[0]
        assert 0 < int(scored.sum(1).max()) <= 60
        first = scored.int().argmax(1)
        assert int(first.min()) > 8  # a source and a mark come first
