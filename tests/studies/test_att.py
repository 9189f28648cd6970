"""The study of Adaptive Tensor Tiling at its smallest, from the command to the report."""

import json
from pathlib import Path

import pytest
import torch

from vesicle.cli import main
from vesicle.files import read_json, write_json
from vesicle.scratch import DecoderSize, new_decoder
from vesicle.studies.att import SCALES
from vesicle.studies.att.judging import bigram_surprise, scores
from vesicle.studies.att.plan import stages
from vesicle.studies.att.tables import compared, slopes
from vesicle.studies.att.variants import COMPARED, Decoder, buckets_for
from vesicle.studies.corpora import load_corpus


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    words = ["study", "att", "--data", "sample", "--out", str(folder), "--workers", "1"]
    assert main(words) == 0
    return folder


def test_the_report_has_all_steps(out: Path):
    report = read_json(out / "report.json")
    tables = report["tables"]
    assert {row["variant"] for row in tables["lm"]} == {v.name for v in COMPARED}
    assert {row["variant"] for row in tables["translation"]} >= {"dense", "att", "longformer"}
    assert all("bleu" in row for row in tables["translation"])
    assert all("rouge1" in row for row in tables["summary"])
    assert len({row["variant"] for row in tables["ablations"]}) == 14
    assert {row["variant"] for row in report["pages"]} == {"quest", "twilight", "multipole"}
    assert [text["name"] for text in report["tilings"]] == ["prose", "code", "table"]
    assert report["slopes"]["prefill_s"].keys() >= {"dense", "tiles of 16"}
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 10
    assert "<script" not in page
    assert str(out) not in page + json.dumps(report)


def test_att_keeps_to_the_share_and_is_dense_at_rest(out: Path):
    rows = read_json(out / "report.json")["tables"]["lm"]
    att = {row["wanted"]: row for row in rows if row["variant"] == "att"}
    assert att[1.0]["share"] == pytest.approx(1.0)
    assert att[0.75]["share"] < 0.9
    dense = next(row for row in rows if row["variant"] == "dense")
    assert (dense["difference"], dense["share"]) == (0, 1)


def test_given_again_nothing_is_done_and_the_report_is_the_same(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    before = (out / "report.html").read_bytes(), (out / "report.json").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "records").rglob("*.json")}
    assert main(["study", "att", "--data", "sample", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_json(out / "report.json")
    assert ((out / "report.html").read_bytes(), (out / "report.json").read_bytes()) == before
    assert {p: p.stat().st_mtime_ns for p in (out / "records").rglob("*.json")} == stamps


def test_what_is_lost_is_done_again(out: Path):
    """As where it was killed: the trained model is there, its record is not."""
    path = out / "records" / "lm" / "att" / "0.json"
    before = read_json(path)
    path.unlink()
    assert main(["study", "att", "--data", "sample", "--out", str(out), "--workers", "1"]) == 0
    after = read_json(path)
    timed = ("judged_tokens_per_s",)
    for a, b in zip(before["result"]["points"], after["result"]["points"], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    write_json(path, before, indent=None)


@pytest.mark.parametrize("name", SCALES)
def test_names_of_jobs_are_their_own(name: str):
    jobs = [job.name for _, _, jobs in stages(name, "sample", None, 2) for job in jobs]
    assert len(jobs) == len(set(jobs))


def test_patterns_are_made_for_a_share():
    size = DecoderSize(
        vocabulary=40, width=16, n_layers=1, n_heads=2, n_kv_heads=1, ffn=16, context=256
    )
    ids = torch.randint(0, 40, (1, 256))
    for variant in COMPARED:
        if variant.kind not in ("longformer", "block-sparse"):
            continue
        for share in (0.6, 0.35):
            decoder = Decoder(new_decoder(size, 0), variant, share, 16)
            decoder.model(ids)
            assert share - 0.04 < float(decoder.reads()) / 128.5 <= share
    assert [buckets_for(share) for share in (0.75, 0.5, 0.25)] == [2, 4, 8]


def test_surprise_is_of_counts():
    corpus = load_corpus("lm", "sample", vocabulary=270, length=128, most_test=2)
    found = bigram_surprise(corpus)(corpus.train[:1])
    assert found.shape == (1, 128)
    assert float(found[0, 0]) == 0
    often = torch.tensor([[5, *corpus.train[0, 1:].tolist()]])
    assert float(bigram_surprise(corpus)(often)[0, 1]) > float(found[0, 1])


def test_tables():
    def record(losses: list[float], share: float = 1.0, **more: float):
        point = {
            "text_losses": losses,
            "loss": sum(losses) / len(losses),
            "share": share,
            "judged_tokens_per_s": 1,
        }
        return {"points": [{"wanted": None, **point, **more}]}

    records = {
        "lm/dense/0": record([1.0, 2.0]),
        "lm/dense/1": record([1.2, 2.2]),
        "lm/longformer-0.5/0": record([1.1, 2.1], 0.5),
        "lm/longformer-0.5/1": record([1.5, 2.5], 0.5),
        "lm/linear/0": record([3.0, 4.0], 0.1),
    }
    rows = compared(records, "lm", ["dense", "longformer", "linear"], (0.5,))
    assert [(r["variant"], r["wanted"], r["seeds"]) for r in rows] == [
        ("dense", None, 2),
        ("longformer", 0.5, 2),
        ("linear", None, 1),
    ]
    assert rows[1]["difference"] == pytest.approx(0.2)
    assert rows[1]["by_seed"] == pytest.approx([0.1, 0.3])
    assert rows[1]["low"] == pytest.approx(0.2)
    assert rows[2]["difference"] == pytest.approx(2.0)
    points = [{"what": "a", "length": n, "s": 3.0 * n**1.5} for n in (10, 100, 1000)]
    assert slopes(points, "s") == {"a": pytest.approx(1.5)}


def test_scores():
    lines = ("Ein Hund läuft über die grüne Wiese .\nZwei Männer sitzen auf einer Bank .",)
    assert scores("translation", list(lines), lines)["bleu"] == pytest.approx(100)
    assert scores("translation", [""], lines)["bleu"] == 0
    assert scores("summary", ["cells divide"], ("cells divide",))["rouge1"] == 100


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words, told in (
        (["--data", str(tmp_path / "none")], "no wikitext2/train.jsonl.gz"),
        (["--data", "sample", "--text", str(tmp_path / "none.txt")], "no data at"),
    ):
        assert main(["study", "att", "--out", str(tmp_path / "out"), *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert told in error[-1]
    assert main(["study", "mood", "--out", str(tmp_path / "out")]) == 2
    assert "'mood'" in capsys.readouterr().err
