"""Language neurons: planted ones are classified, lesions of them harm their own language."""

import json
import math

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.neurons.planted import FFN, LAYERS, SIZE, planted, save, word_level
from tests.tiny import tiny_model, tokens
from vesicle.commands.neurons.languages import languages as command
from vesicle.errors import DataError, VesicleError
from vesicle.neurons.claims import HOLDS
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.languages import lesions as reading
from vesicle.neurons.languages.alignment import align
from vesicle.neurons.languages.compared import compare
from vesicle.neurons.languages.entropy import (
    GENERAL,
    NONE,
    RELATED,
    SPECIFIC,
    classify,
    entropy,
    fires,
    lape,
    probabilities,
)
from vesicle.neurons.languages.experiment import Languages
from vesicle.neurons.languages.lesions import language_lesions, losses
from vesicle.neurons.languages.parallel import read_pairs, read_parallel
from vesicle.neurons.languages.parts import differences, divide, means, shuffled
from vesicle.neurons.languages.resampled import resample
from vesicle.neurons.languages.settings import LanguageSettings
from vesicle.neurons.languages.written import Identifier, continuations, prompts

NAMES = ("aaa_Latn", "bbb_Latn", "ccc_Latn")
OWN = {name: [f"{name[0]}{i}" for i in range(5)] + [f"{name[0]}*"] for name in NAMES}
WORDS = ["?", *(word for own in OWN.values() for word in own)]
EVERY = set(WORDS)


def firing_in(*names: str) -> set[str]:
    return {word for name in names for word in OWN[name]}


SPECIFIC_AT = {name: FFN * (LAYERS - 1) + 4 + n for n, name in enumerate(NAMES)}
RELATED_AT, GENERAL_AT = (1, 2), (FFN + 1, FFN + 2)
PLAN = {
    **{number: (firing_in(name), f"{name[0]}*") for name, number in SPECIFIC_AT.items()},
    RELATED_AT[0]: (firing_in(*NAMES[:2]), None),
    RELATED_AT[1]: (firing_in(*NAMES[1:]), None),
    **dict.fromkeys(GENERAL_AT, (EVERY, None)),
}
SHARE = 5 / SIZE


def encode(text: str) -> list[int]:
    return word_level(WORDS).encode(text).ids


def decode(ids) -> str:
    return " ".join(WORDS[i] for i in ids)


def sentence(name: str, number: int) -> str:
    """Any word of a language, and then its star, again and again."""
    rng = np.random.default_rng(number)
    return " ".join(f"{OWN[name][int(i)]} {OWN[name][-1]}" for i in rng.integers(0, 5, 7))


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{name: sentence(name, n) for name in NAMES} | {"id": str(n)} for n in range(30)]
    write(folder / "flores200" / "test.jsonl", rows)
    fields = ("en", "de", "fr", "cs")
    pairs = [dict.fromkeys(fields, f"a{n % 5} a{(n + 1) % 5} a*") for n in range(9)]
    write(folder / "multi30k" / "train.jsonl", pairs)
    return str(folder)


@pytest.fixture(scope="module")
def hooked() -> Hooked:
    return Hooked(planted(WORDS, PLAN))


# Classes ------------------------------------------------------------------------------------------


def test_neurons_fire_where_their_gate_is_above_0():
    hooked = Hooked(tiny_model("llama"))
    sentences = [tokens(9, seed=1)[0].tolist(), tokens(5, seed=2)[0].tolist()]
    found, count = fires(hooked, sentences)
    assert count == 8 + 4
    expected = torch.zeros_like(found)
    for ids in sentences:
        seen = hooked.run(torch.tensor([ids]), read=["blocks.*.mlp.hook_pre"])
        gates = torch.cat(list(seen.activations.values()), -1)[0]
        expected += (torch.nn.functional.silu(gates[1:]) > 0).sum(0).int()
    assert torch.equal(found, expected)


def test_entropy_is_0_for_one_language_and_ln_k_for_all_or_none():
    p = torch.tensor([[0.4, 0, 0, 0], [0.2] * 4, [0.0] * 4, [0.3, 0.3, 0, 0]]).double()
    expected = torch.tensor([0, math.log(4), math.log(4), math.log(2)]).double()
    torch.testing.assert_close(entropy(p), expected)


def mixture(seed: int = 0) -> torch.Tensor:
    """Probabilities of 400 neurons in five languages, most of them low everywhere."""
    p = 0.2 * torch.rand(400, 5, generator=torch.Generator().manual_seed(seed)).double()
    p[:3] *= 0.1
    p[:3, 2] = 0.9  # specific to one
    p[3:6] *= 0.1
    p[3:6, :2] = 0.8  # related to two
    p[6:9] = 0.7 + 0.1 * p[6:9]  # general
    return p


def test_planted_probabilities_are_classified():
    p = mixture()
    found = classify(p, share=6 / 400, bar_share=0.98)
    assert found.kind[:3].tolist() == [SPECIFIC] * 3
    assert found.kind[3:6].tolist() == [RELATED] * 3
    assert found.kind[6:9].tolist() == [GENERAL] * 3
    assert found.of(2, related=False).tolist() == [0, 1, 2]
    assert found.of(0).tolist() == [3, 4, 5]
    assert found.of(4).tolist() == []
    assert (found.kind[9:] == NONE).all()
    chosen = lape(p, share=6 / 400, bar_share=0.98)
    assert chosen.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_no_selected_neuron_is_general_and_the_balance_is_the_largest(share):
    p = mixture()
    found = classify(p, share)
    general = found.count == 5
    count = round(share * len(p))

    def selected(balance: float) -> torch.Tensor:
        return (entropy(p) - balance * p.max(-1).values).topk(count, largest=False).indices

    assert not general[selected(found.balance)].any()
    if found.balance < 1e3:
        assert general[selected(found.balance * 1.001 + 1e-9)].any()
    assert ((found.kind == GENERAL) == general).all()
    assert (found.count[found.kind == SPECIFIC] == 1).all()


def test_classes_do_not_depend_on_the_order_of_languages_and_neurons():
    p = mixture()
    found = classify(p, 0.03)
    generator = torch.Generator().manual_seed(3)
    languages, neurons = torch.randperm(5, generator=generator), torch.randperm(400)
    other = classify(p[neurons][:, languages], 0.03)
    assert torch.equal(other.kind, found.kind[neurons])
    assert torch.equal(other.often, found.often[neurons][:, languages])


# Parts --------------------------------------------------------------------------------------------


def test_layers_are_divided_where_the_curves_step():
    runs = (3, 6, 4, 2)
    published = [[0.08, 0.01, 0.05, 0.06], [0.02, 0.09, 0.01, 0.1]]
    rows = np.array([np.repeat(row, runs) for row in published])
    rows += 0.001 * np.random.default_rng(0).standard_normal(rows.shape)
    parts = divide(rows)
    assert parts.starts == (0, 3, 9, 13)
    assert parts.explained > 0.98
    assert int(np.argmin(parts.criterion)) == 3
    np.testing.assert_allclose(means(rows, parts.starts), published, atol=0.002)
    assert (differences(rows, parts.starts) > 0).all()
    assert (differences(rows[:, ::-1], divide(rows[:, ::-1]).starts) > 0).sum() < 6
    scaled = divide(7 * rows + 1)  # units do not matter
    assert scaled.starts == parts.starts


def test_the_division_is_the_best_of_all():
    rows = np.random.default_rng(1).standard_normal((2, 8))
    scaled = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)

    def error(starts):
        pieces = np.split(scaled, starts[1:], axis=1)
        return sum(((p - p.mean(1, keepdims=True)) ** 2).sum() for p in pieces)

    every = [(0, a, b, c) for a in range(1, 6) for b in range(a + 1, 7) for c in range(b + 1, 8)]
    found = divide(rows).starts
    assert error(found) == pytest.approx(min(error(starts) for starts in every))


def test_noise_calls_for_no_parts_and_few_layers_for_fewer():
    rows = np.random.default_rng(5).standard_normal((2, 40))
    assert int(np.argmin(divide(rows).criterion)) == 0
    assert divide(rows[:, :3]).starts == (0, 1, 2)


def test_mixed_languages_keep_every_count():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 9, (7, 4, 30), generator=generator)
    lengths = torch.randint(5, 9, (7, 4), generator=generator)
    mixed, total = shuffled(counts, lengths, np.random.default_rng(0))
    assert torch.equal(mixed.sum(0), counts.sum((0, 1)))
    assert total.sum() == lengths.sum()
    assert not torch.equal(mixed, counts.sum(0))


def test_intervals_lie_about_their_values():
    drawn = torch.arange(20).double()
    (found,) = resample(lambda chunks: np.array([float(drawn[chunks].mean())]), 20, 200)
    assert found.mean == pytest.approx(9.5)
    assert found.low < 9.5 < found.high
    assert found.high - found.low == pytest.approx(4 * 5.77 / 20**0.5, rel=0.3)


# Lesions ------------------------------------------------------------------------------------------


def test_losses_are_cross_entropy():
    model = tiny_model("llama", dtype=torch.float32)
    hooked = Hooked(model)
    ids = tokens(12)
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(losses(hooked, ids.tolist())[0], expected)
    assert losses(hooked, ids.tolist(), [3, 90])[0] != expected


def found_classes(hooked):
    counted = [fires(hooked, [encode(sentence(name, n)) for n in range(8)]) for name in NAMES]
    p = probabilities(
        torch.stack([counts for counts, _ in counted]), torch.tensor([n for _, n in counted])
    )
    return classify(p, SHARE)


def test_planted_neurons_are_found_and_their_lesion_harms_one_language(hooked):
    classes = found_classes(hooked)
    for n, name in enumerate(NAMES):
        assert classes.of(n, related=False).tolist() == [SPECIFIC_AT[name]]
    assert classes.kind[list(RELATED_AT)].tolist() == [RELATED] * 2
    assert classes.kind[list(GENERAL_AT)].tolist() == [GENERAL] * 2
    judged = [[encode(sentence(name, n)) for n in range(20, 23)] for name in NAMES]
    before = [losses(hooked, own).mean() for own in judged]
    part = language_lesions(hooked, judged, classes, 0, seeds=2)
    assert part["neurons"] == {"specific": 1, "language": 2}
    for kind in ("specific", "language"):
        rise = [
            float(np.mean(row) - b) for row, b in zip(part["losses"][kind], before, strict=True)
        ]
        assert rise[0] > 0.5
        assert abs(rise[1]) < 1e-5
        assert abs(rise[2]) < 1e-5
    random = [np.mean(row) for row in part["losses"]["random"]]
    np.testing.assert_allclose(random[0], before[0], atol=1e-5)


def test_a_language_is_left_when_its_neurons_are_silenced(hooked):
    ids = prompts([encode(sentence("bbb_Latn", n)) for n in range(4)], length=5)
    plain = continuations(hooked, ids, length=3)
    assert (plain == WORDS.index("b*")).all()
    silenced = continuations(hooked, ids, [SPECIFIC_AT["bbb_Latn"]], length=3)
    assert not torch.equal(silenced, plain)
    whole = hooked.model(torch.cat([ids, plain[:, :1]], 1)).logits[:, -1].argmax(-1)
    assert torch.equal(plain[:, 1], whole)  # the cache changes nothing
    assert prompts([[1, 2]], length=5).shape == (0, 5)


def test_languages_are_told_by_script_and_words():
    parallel = read_parallel("sample", None, 16, 8)
    tell = Identifier(parallel.languages, parallel.read)
    assert tell.accuracy(parallel.judged) >= 0.95
    assert tell.language("поезд") == "rus_Cyrl"
    assert tell.language("der und das ist") == "deu_Latn"
    assert tell.language("les de la une est") == "fra_Latn"
    assert tell.language("12 ... !") is None


# The analysis -------------------------------------------------------------------------------------


def settings(**changed):
    own = {"sentences": 16, "judged": 4, "share": SHARE, "seeds": 2, "chunks": 8, "draws": 8}
    return LanguageSettings(**(own | changed))


def analysis(data, out, show=None, **changed):
    own = settings(**changed)
    parallel = read_parallel(data, None, own.sentences, own.judged)
    return Languages(encode, decode, parallel, own, out, facts={"model": "tiny"}, show=show)


def test_the_analysis_finds_what_was_planted_and_is_kept(hooked, data, tmp_path, monkeypatch):
    steps = []
    report = analysis(data, tmp_path, lambda *step: steps.append(step)).find(hooked)
    assert {row["language"]: row["specific"] for row in report["languages"]} == dict.fromkeys(
        NAMES, 1
    )
    assert report["classes"]["specific"] == 3
    assert report["classes"]["related"] == 2
    assert report["classes"]["general"] == 2
    assert report["classes"]["kept_by_halves"] == 1
    # Mixed languages have words of all of them, so that no neuron is of one.
    assert report["classes"]["mixed"]["specific"] == 0
    assert report["layers"] == {
        "specific": [0, 0, 0, 3],
        "related": [2, 0, 0, 0],
        "general": [0, 2, 0, 0],
    }
    claims = {row["name"]: row for row in report["claims"]}
    for name in ("language neurons", "own neurons", "own language"):
        assert claims[name]["verdict"] == HOLDS, name
    assert report["written"]["in_own_language"]["nothing"] == [1, 1, 1]
    assert "output language" in claims
    written = json.loads((tmp_path / "written" / "aaa_Latn.json").read_text())
    assert written["nothing"] == written["random"]
    assert report["lesions"]["languages"] == list(NAMES)
    assert steps[0][:2] == (0, 9)
    assert steps[-1][:2] == (9, 9)
    monkeypatch.setattr(reading, "losses", None)  # nothing is read again
    assert analysis(data, tmp_path).find(hooked) == report
    with pytest.raises(VesicleError, match="whose judged is 4, not 5: use another folder"):
        analysis(data, tmp_path, judged=5)


def test_a_run_that_was_cut_off_gives_what_a_whole_one_does(hooked, data, tmp_path):
    whole = analysis(data, tmp_path / "whole").find(hooked)

    def cut(done: int, total: int, what: str) -> None:
        if what == "writing bbb_Latn":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis(data, tmp_path / "cut", cut).find(hooked)
    assert (tmp_path / "cut" / "lesions" / "bbb_Latn.json").exists()
    assert analysis(data, tmp_path / "cut").find(hooked) == whole


def test_a_checkpoint_beside_itself_changes_nothing_and_another_one_does(hooked, data, tmp_path):
    own = analysis(data, tmp_path, judged=0)
    same = own.against(hooked, Hooked(planted(WORDS, PLAN)), "same", {})
    assert same["kept"] == 1
    moved = np.array(same["moved"])
    assert (moved == np.diag(np.diagonal(moved))).all()
    assert all(row["found"]["mean"] == 0 for row in same["claims"])
    # A neuron of one language that now fires in two.
    plan = {**PLAN, SPECIFIC_AT["aaa_Latn"]: (firing_in(*NAMES[:2]), None)}
    other = own.against(hooked, Hooked(planted(WORDS, plan)), "other", {})
    assert other["moved"][SPECIFIC][RELATED] == 1
    assert other["numbers"]["specific"] == [3, 2]
    assert other["numbers"]["related"] == [2, 3]
    assert other["by_count"] == [[3, 2, 2], [2, 3, 2]]
    assert other["layers"]["specific"] == [0, 0, 0, -1]
    assert {row["name"]: row["verdict"] for row in other["claims"]}["more related"] == HOLDS
    with pytest.raises(DataError, match="--against has 3 layers of 80 neurons; allowed: 4 of 40"):
        own.against(hooked, Hooked(tiny_model("llama")), "third", {})


def test_a_sentence_of_one_token_is_refused(data, tmp_path):
    parallel = read_parallel(data, None, 16, 4)
    with pytest.raises(DataError, match="in aaa_Latn has one token; allowed: two and more"):
        Languages(lambda text: [1], decode, parallel, settings(), tmp_path, facts={})


def test_a_model_of_few_layers_has_no_four_parts(data, tmp_path):
    with pytest.raises(DataError, match="the model has 3 layers; allowed: 4 and more, one a part"):
        analysis(data, tmp_path, judged=0).find(Hooked(tiny_model("llama")))


def test_intervals_of_changes_are_about_the_same_sentences():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 20, (6, 3, 60), generator=generator)
    lengths = torch.full((6, 3), 20)
    shape = Hooked(tiny_model("llama")).shape
    found = compare((counts, lengths), (counts, lengths), shape_of_60(shape), 0.05, 10)
    assert all(row["found"]["low"] == row["found"]["high"] == 0 for row in found["claims"])


def shape_of_60(shape):
    from dataclasses import replace

    return replace(shape, ffn_width=20)


# Tuning -------------------------------------------------------------------------------------------


def test_tuning_learns_and_leaves_a_plain_model(data):
    model = planted(WORDS, PLAN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = align(model, encode, read_pairs(data), steps=12)
    assert np.mean(found[-4:]) < np.mean(found[:4])
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert not any("embed" in name or "norm" in name for name in changed)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = planted(WORDS, PLAN)
    assert align(again, encode, read_pairs(data), steps=12) == found  # the same seed, the same run
    with pytest.raises(DataError, match="--align is 0; allowed: 1 and above"):
        align(model, encode, read_pairs(data), steps=0)


# Data ---------------------------------------------------------------------------------------------


def test_sentences_stay_parallel_and_are_read_once(data):
    found = read_parallel(data, ["ccc_Latn", "aaa_Latn"], 16, 8)
    assert found.languages == ("ccc_Latn", "aaa_Latn")
    for left, right in zip(*found.read, strict=True):
        assert left.replace("c", "a") == right
    assert not set(found.read[0]) & set(found.judged[0])
    assert found == read_parallel(data, ["ccc_Latn", "aaa_Latn"], 16, 8)
    more = read_parallel(data, None, 20, 4)
    assert more.read[0][:16] == read_parallel(data, None, 16, 8).read[0]
    assert len(read_parallel("sample", None, 20, 4).languages) == 5


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "the data has no language; allowed: fields such as deu_Latn"),
        ([{"en": "a"}], "line 1 has no language; allowed: fields such as deu_Latn"),
        ([{"eng_Latn": "a"}], "--languages names 1; allowed: 2 languages and more"),
        ([{"eng_Latn": "a", "deu_Latn": 3}] * 9, "line 1: deu_Latn is 3; allowed: a text"),
        ([{"eng_Latn": "a", "deu_Latn": "b"}], "the data have 1 sentences; --sentences 4 and"),
    ],
)
def test_malformed_sentences_are_named(tmp_path, rows, line):
    write(tmp_path / "flores200" / "test.jsonl", rows)
    with pytest.raises(DataError) as told:
        read_parallel(str(tmp_path), None, 4, 1)
    assert line in str(told.value)


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(command)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(planted(WORDS, PLAN), WORDS, tmp_path_factory.mktemp("model"))


def test_the_command_tells_tunes_and_goes_on(app, data, folder, tmp_path):
    out = tmp_path / "out"
    words = ["--data", data, "--out", str(out), "--model", str(folder), "--sentences", "16"]
    words += ["--judged", "3", "--share", str(SHARE), "--seeds", "1"]
    done = CliRunner().invoke(app, [*words, "--align", "3", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["classes"]["specific"] == 3
    assert json.loads((out / "report.json").read_text()) == report
    assert len(report["compared"]["claims"]) == 3
    tuned = out / "alignment" / "model"
    AutoModelForCausalLM.from_pretrained(tuned)
    assert (tuned / "tokenizer.json").is_file()
    made = (tuned / "model.safetensors").stat().st_mtime_ns
    again = CliRunner().invoke(app, [*words, "--against", str(tuned)])
    assert again.exit_code == 0, again.output
    for word in ("aaa_Latn", "shared space", "own neurons", "fewer specific"):
        assert word in again.stdout
    assert (tuned / "model.safetensors").stat().st_mtime_ns == made
    other = CliRunner().invoke(app, [*words, "--align", "4"])
    assert isinstance(other.exception, VesicleError)
    assert "whose steps is 3, not 4" in str(other.exception)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--languages", "eng_Latn,xxx_Latn"], "no language 'xxx_Latn'; allowed: eng_Latn, deu"),
        (["--languages", "eng_Latn"], "--languages names 1; allowed: 2 languages and more"),
        (["--languages", "a,,b"], "--languages is 'a,,b'; allowed: names with commas between"),
        (["--lesioned", "jpn_Jpan"], "--lesioned names 'jpn_Jpan'; allowed: eng_Latn, deu_Latn"),
        (["--sentences", "3"], "--sentences is 3; allowed: 4 and above"),
        (["--sentences", "30"], "the data have 24 sentences; --sentences 30 and --judged 6 need"),
        (["--share", "0.5"], "--share is 0.5; allowed: above 0, up to 0.2"),
        (["--seeds", "0"], "--seeds is 0; allowed: 1 and above"),
        (["--align", "9"], "--data is sample, which has no pairs to tune on; allowed: a folder"),
        (["--align", "9", "--against", "x"], "--against and --align are both given"),
        (["--data", "nowhere"], "flores200 holds no test.jsonl.gz, with or without .gz"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(app, tmp_path, words, line):
    given = words if "--data" in words else ["--data", "sample", *words]
    given = given if "--sentences" in words else [*given, "--sentences", "16"]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*given, "--out", str(out), "--model", "no-such-model"])
    assert isinstance(done.exception, VesicleError)
    assert line in str(done.exception)
    assert not out.exists()
