"""Descriptions name what neurons were planted to fire at, and are judged by what they tell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from tests.neurons.planted import FFN, LAYERS, SIZE, planted, save, word_level
from tests.neurons.tiny_cards import tiny_llama, tiny_text
from tests.tiny import CONFIGS, VOCABULARY, shape_of, tiny_model
from vesicle.commands.neurons.describe import describe as command
from vesicle.errors import DataError, VesicleError
from vesicle.models import Text
from vesicle.neurons.decoding.readout import Readout
from vesicle.neurons.descriptions import candidates
from vesicle.neurons.descriptions.candidates import Limits
from vesicle.neurons.descriptions.classes import CLASSES
from vesicle.neurons.descriptions.describe import Subject, describe, drawn_neurons, pool_of
from vesicle.neurons.descriptions.detection import LexicalDetector
from vesicle.neurons.descriptions.mutual_information import Scorer, mutual_information
from vesicle.neurons.descriptions.report import judged, summary
from vesicle.neurons.descriptions.settings import DescribeSettings
from vesicle.neurons.descriptions.spots import Spot, spots_at
from vesicle.neurons.descriptions.tree import Tree
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron

WORDS = ["?", *"red green stone river cloud apple seven table horse paper lamp garden".split()]
PLANTED = {3: "river", FFN + 5: "seven", 2 * FFN + 9: "horse", 2 * FFN + 11: "lamp"}
"""By layer * FFN + index, the word at which a neuron fires."""
NEURONS = [Neuron(*divmod(number, FFN)) for number in PLANTED]
SETTINGS = DescribeSettings(contexts=10, shown=6, scored=5, random=40, skip=2, shuffled=3)


def word_text() -> Text:
    tokenizer = word_level(WORDS)
    return Text(tokenizer, special_tokens={}, template=None, eos_ids=[], context_window=128)


def sentences(n: int, seed: int):
    """(n, 24) words drawn at random."""
    return torch.randint(1, len(WORDS), (n, 24), generator=torch.Generator().manual_seed(seed))


class OfLastWords:
    """Takes a description for likelier where it is the last word, and some for likely anywhere."""

    def given(self, spots, descriptions):
        rows = [
            [-1.0 if d == s.word else -2.0 if d == "red" else -6.0 for d in descriptions]
            for s in spots
        ]
        return torch.tensor(rows)

    def alone(self, descriptions):
        return torch.tensor([-2.0 if d == "red" else -6.0 for d in descriptions])


def subject() -> Subject:
    model = planted(WORDS, {number: (word, None) for number, word in PLANTED.items()})
    return Subject(hooked=Hooked(model), text=word_text(), judge=OfLastWords())


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("described")
    own = subject()
    report = describe(own, sentences(20, 1), sentences(20, 2), NEURONS, SETTINGS, folder)
    return report, folder, own


# Planted neurons ----------------------------------------------------------------------------------


def test_planted_neurons_are_described_by_their_words(described):
    report = described[0]
    assert [row["description"] for row in report.neurons] == list(PLANTED.values())
    assert {row["side"] for row in report.neurons} == {"high"}
    for row in report.neurons:
        for detector in ("model", "lexical"):
            found = row["detection"][detector]
            # A twelfth of the random contexts end with the word, too, and score as high.
            assert found["own"] > 0.9
            assert found["low"] > 0.85
            assert abs(found["shuffled"] - 0.5) < 0.15
            assert found["described"]
    told = report.summary["lexical"]
    assert told["not_described"] == 0
    assert told["above_shuffled"]["mean"] > 0.35
    assert told["above_token"]["mean"] == 0, "the best token is the word"


def test_a_neuron_that_fires_at_nothing_is_not_described(tmp_path: Path):
    silent = [Neuron(0, 1), Neuron(1, 1), Neuron(2, 1), Neuron(2, 2), Neuron(2, 3)]
    report = describe(subject(), sentences(20, 1), sentences(20, 2), silent, SETTINGS, tmp_path)
    assert report.summary["not_described_by_either"] >= 4
    assert report.summary["lexical"]["above_shuffled"]["low"] < 0.05


def test_what_is_finished_is_not_done_again(described, tmp_path: Path):
    report, folder, own = described

    class Never(OfLastWords):
        def given(self, spots, descriptions):
            raise AssertionError("it is finished")

    steps = []
    again = describe(
        replace(own, judge=Never()),
        sentences(20, 1),
        sentences(20, 2),
        NEURONS,
        SETTINGS,
        folder,
        show=lambda step, note: steps.append(step),
    )
    assert again == report
    assert steps == list(range(41, 49)), "20 windows and 20 more, 4 descriptions, 4 judgements"
    assert json.loads((folder / "report.json").read_text())["neurons"] == report.neurons


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(described, tmp_path: Path):
    report, _, own = described

    class Tired(OfLastWords):
        calls = 0

        def given(self, spots, descriptions):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().given(spots, descriptions)

    given = (sentences(20, 1), sentences(20, 2), NEURONS, SETTINGS, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        describe(replace(own, judge=Tired()), *given)
    assert len(list((tmp_path / "detection").iterdir())) == 1
    assert describe(own, *given) == report


def test_a_folder_of_another_run_is_refused(described):
    _, folder, own = described
    texts = sentences(20, 1), sentences(20, 2)
    with pytest.raises(VesicleError, match="settings"):
        describe(own, *texts, NEURONS, replace(SETTINGS, weight=1.0), folder)
    with pytest.raises(VesicleError, match="neurons"):
        describe(own, *texts, NEURONS[:3], SETTINGS, folder)


def test_one_neuron_is_shuffled_with_others_that_are_drawn(tmp_path: Path):
    own = subject()
    pool = pool_of(NEURONS[:1], own.hooked.shape, SETTINGS)
    assert len(pool) == len(set(pool)) == SETTINGS.shuffled + 1
    report = describe(own, sentences(9, 1), sentences(9, 2), NEURONS[:1], SETTINGS, tmp_path)
    assert [row["neuron"] for row in report.neurons] == [str(NEURONS[0])]
    assert report.summary["model"]["own"]["low"] is None, "no interval over one neuron"
    assert len(list((tmp_path / "descriptions").iterdir())) == 4


# Mutual information -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_tree_gives_what_each_text_gives_by_itself(name: str):
    # Shorter than the window of Gemma's tiny layers, which a mask of one's own has none of.
    model, root = tiny_model(name), [5, 9, 3]
    prompts = [[11, 12], [11, 13, 14, 15], [11, 12, 13]]
    endings = [[[21], [21, 22, 23], [24, 22]], [[21, 22]], [[12, 21, 22], [7]]]
    tree = Tree(root)
    for prompt, own in zip(prompts, endings, strict=True):
        tree.add(prompt, own)
    shared = 3 + (2 + 2 + 1) + (3 + 1) + (1 + 2)
    assert tree.size == shared, "texts that begin alike are read once"
    expected = []
    for prompt, own in zip(prompts, endings, strict=True):
        for ending in own:
            ids = [*root, *prompt, *ending]
            with torch.no_grad():
                chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            first = len(root) + len(prompt)
            rows = range(first - 1, len(ids) - 1)
            expected.append(sum(float(chances[row, ids[row + 1]]) for row in rows))
    torch.testing.assert_close(tree.score(model), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert max(map(max, prompts)) < VOCABULARY


def test_a_specific_string_is_preferred_to_a_frequent_one():
    # The frequent one is likelier after every context, and as likely without any.
    given = torch.tensor([[-1.0, -2.0], [-1.2, -2.4], [-0.8, -1.9]])
    alone = torch.tensor([-1.0, -9.0])
    assert mutual_information(given, alone, 0.0).argmax() == 0
    for weight in (0.3, 0.6, 1.0):
        assert mutual_information(given, alone, weight).argmax() == 1
    # What says nothing of the contexts has none at all.
    nothing = mutual_information(alone.expand(3, -1), alone, 1.0)
    assert torch.equal(nothing, torch.zeros(2))


def test_a_scorer_asks_in_parts_what_it_would_ask_at_once(monkeypatch: pytest.MonkeyPatch):
    scorer = Scorer(tiny_llama(), tiny_text())
    ids = torch.tensor([tiny_text().encode("A cat and a dog sat on the mat.")])
    spots = spots_at(tiny_text(), ids, [(0, 5), (0, 14), (0, 20)], 12)
    whole = scorer.given(spots, ["a cat", "a dog </s>", "mat"])
    monkeypatch.setattr("vesicle.neurons.descriptions.mutual_information._NODES", 1)
    parts = scorer.given(spots, ["a cat", "a dog </s>", "mat"])
    torch.testing.assert_close(whole, parts, atol=1e-3, rtol=1e-5)
    assert whole.shape == (3, 3)
    assert scorer.alone(["a cat"]).shape == (1,)
    with pytest.raises(DataError, match="allowed: visible characters"):
        scorer.alone([" "])


# Candidates and spots -----------------------------------------------------------------------------


def spot_of(before: str, token: str, word: str) -> Spot:
    start = (before + token).rfind(word[0]) if word[0] in token else len(before)
    return Spot(ids=(1,), token=token, word=word, before=before, before_word=before[:start])


def test_spots_tell_the_whole_word_of_a_token():
    text = tiny_text()
    ids = torch.tensor([text.encode("So the cat's mat, it is.\nNo 日本")])
    told = {}
    for place in (8, 15, 16, 24, 25, 30):
        (spot,) = spots_at(text, ids, [(0, place)], 99)
        told[place] = (spot.token, spot.word, spot.before_word, spot.begins_sentence)
    line = "So the cat's mat, it is.\n"
    assert told[8] == ("a", "cat's", "So the ", False)
    assert told[15] == ("t", "mat", "So the cat's ", False)
    assert told[16] == (",", ",", "So the cat's mat", False)
    assert told[24][:2] == ("\n", "")
    assert told[25] == ("N", "No", line, True)
    assert "\ufffd" not in told[30][0], "the last byte of a character has all of it"
    assert spots_at(text, ids, [(0, 8)], 3)[0].before == " c"
    assert spots_at(text, ids, [(0, 8)], 3)[0].continues_word


@pytest.mark.parametrize(
    ("name", "holds", "fails"),
    [
        ("a number", ("in ", "1,024", "1,024"), ("in ", "one", "one")),
        ("a year", ("in 19", "8", "1987"), ("in 9", "8", "987")),
        ("punctuation", ("so", ";", ";"), ("so", "s", "sos")),
        ("a name", ("with ", "Ann", "Ann"), ("So. ", "The", "The")),
        ("the first word of a sentence", ("So. ", "The", "The"), ("with ", "the", "the")),
        ("the rest of a word", ("Sway", "am", "Swayam"), ("the", " am", "am")),
        ("a word ending in -ing", ("was ", "sing", "singing"), ("the", " king", "kin")),
        ("a plural", ("two ", "cats", "cats"), ("the ", "bus", "bus")),
        ("a month", ("in", " May", "May"), ("in", " fall", "fall")),
        ("a line break", ("end.", "\n", " "), ("end.", " ", " ")),
    ],
)
def test_classes_hold_where_they_should(name: str, holds: tuple, fails: tuple):
    assert CLASSES[name](spot_of(*holds))
    assert not CLASSES[name](spot_of(*fails))


def test_candidates_are_what_contexts_have_and_others_lack():
    spots = [spot_of(f"the old red {w} by ", "ships", "ships") for w in ("quay", "pier", "dock")]
    others = [spot_of("the old blue door by ", "it", "it") for _ in range(9)]
    found = candidates.of_contexts(spots, others, Limits())
    by_kind = {kind: [c.text for c in found if c.kind == kind] for kind in {c.kind for c in found}}
    assert by_kind["token"] == ["ships"]
    assert by_kind["word"] == ["ships"]
    assert by_kind["phrase"] == ["by ships"]
    assert by_kind["near"] == ["red"], "what stands around others, too, says nothing"
    assert by_kind["class"] == ["a plural"]
    texts = [c.text for c in candidates.distinct(found)]
    assert len(texts) == len(set(texts))
    assert candidates.best_token(spots) == "ships"
    assert candidates.best_token([spot_of("end.", "\n", " ")]) == "a line break"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox_parallel"])
def test_answers_are_the_models_own_with_and_without_a_cache(name: str):
    model, text = tiny_model(name), Numbers()
    spots = [spot_of("", "7", "7")]
    found = candidates.written(model, text, spots, Limits(written=2))
    ids = [*text.encode(""), *text.encode("")]
    first = model(torch.tensor([ids])).logits[0, -1].topk(2).indices.tolist()
    expected = []
    for start in first:
        row = [*ids, start]
        for _ in range(7):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        expected.append(" ".join(map(str, row[len(ids) :])))
    assert [c.text for c in found] == expected
    assert candidates.written(model, text, spots, Limits(written=0)) == []


class Numbers:
    """Token ids as text."""

    def encode(self, text: str, **how: bool):
        return [3, 8, 9]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_decoded_tokens_are_those_that_the_neuron_writes():
    model = planted(WORDS, {3: ("river", "horse")})
    readout, limits = Readout(model), Limits(decoded=1)
    for low, expected in ((False, "horse"), (True, None)):
        found = candidates.decoded(readout, word_text(), Neuron(0, 3), low=low, limits=limits)
        assert (found[0].text == "horse") == (expected == "horse")


# Detection ----------------------------------------------------------------------------------------


def test_the_lexical_detector_reads_words_and_classes():
    model = planted(WORDS, {})
    detector, text = LexicalDetector(model, word_text()), word_text()
    ids = torch.tensor([text.encode("red stone river cloud")])
    last, earlier, never = (spots_at(text, ids, [(0, n)], 9)[0] for n in (2, 3, 1))
    scores = detector.scores([last, earlier, never], "river")
    assert scores[0] > scores[1] > scores[2]
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert scores[1] == pytest.approx(0.95, abs=1e-5)
    one = spot_of("in 19", "8", "1987")
    assert detector.scores([one, last], "a year").tolist() == [1, 0]
    with pytest.raises(DataError, match="visible characters"):
        detector.scores([last], "\n")


def test_what_is_described_stands_above_chance_and_above_others():
    scores = {
        "own": [torch.arange(40.0, 0, -1)],
        "shuffled": [torch.zeros(40), torch.arange(40.0)],
        "random": [torch.zeros(40)],
        "token": [torch.arange(40.0, 0, -1)],
    }
    found = judged(scores, 20)
    assert (found["own"], found["shuffled"], found["random"], found["token"]) == (1, 0.25, 0.5, 1)
    assert found["low"] == found["high"] == 1
    assert found["described"]
    assert not judged({**scores, "shuffled": scores["own"]}, 20)["described"]
    assert not judged({**scores, "own": scores["random"]}, 20)["described"]
    rows = [{"kind": "word", "detection": {"model": found, "lexical": found}}] * 6
    told = summary(rows)
    assert told["model"]["above_shuffled"] == {"mean": 0.75, "low": 0.75, "high": 0.75}
    assert told["kinds"] == {"word": 6}


# Bad input and the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"contexts": 1}, "contexts is 1; allowed: 2 and above"),
        ({"random": 1}, "random is 1; allowed: 2"),
        ({"shuffled": 0}, "shuffled is 0; allowed: 1"),
        ({"weight": -0.1}, "weight is -0.1; allowed: 0 to 10"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"skip": -1}, "skip is -1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, told: str):
    with pytest.raises(DataError, match=told):
        replace(SETTINGS, **change)


def test_neurons_that_cannot_be_drawn_are_refused(tmp_path: Path):
    shape = shape_of(tiny_model("llama"))
    assert len(set(drawn_neurons(shape, 240, 0))) == 240
    assert drawn_neurons(shape, 9, 0) == drawn_neurons(shape, 9, 0) != drawn_neurons(shape, 9, 1)
    for count in (0, 241):
        with pytest.raises(DataError, match=f"count is {count}; allowed: 1 to 240"):
            drawn_neurons(shape, count, 0)
    with pytest.raises(DataError, match="no neurons"):
        describe(subject(), sentences(9, 1), sentences(9, 2), [], SETTINGS, tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and a text."""
    folder = tmp_path_factory.mktemp("files")
    model = planted(WORDS, {number: (word, None) for number, word in PLANTED.items()})
    text = " ".join(WORDS[i] for i in sentences(50, 3).flatten().tolist())
    (folder / "text.txt").write_text(text)
    return save(model, WORDS, folder / "model"), folder / "text.txt"


def run(files: tuple[Path, Path], out: Path, *more: str) -> None:
    app = typer.Typer()
    app.command()(command)
    model, text = files
    sizes = ["--tokens", "300", "--held-out", "200", "--length", "24", "--contexts", "6"]
    given = ["--data", str(text), "--out", str(out), "--model", str(model), *sizes, *more]
    typer.main.get_command(app).main(given, standalone_mode=False)


def test_the_command_describes_named_neurons(files, tmp_path: Path, capsys):
    names = ",".join(map(str, NEURONS))
    run(files, tmp_path / "out", "--neurons", names, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "vesicle-descriptions-1"
    assert [row["neuron"] for row in told["neurons"]] == list(map(str, NEURONS))
    assert [row["token"] for row in told["neurons"]] == list(PLANTED.values())
    run(files, tmp_path / "out", "--neurons", names)
    shown = capsys.readouterr().out
    assert "2.9" in shown
    assert "other neurons' descriptions" in shown


def test_the_command_draws_neurons(files, tmp_path: Path, capsys):
    run(files, tmp_path / "out", "--count", "5", "--seed", "2", "--json")
    told = json.loads(capsys.readouterr().out)
    shape = Hooked(planted(WORDS, {})).shape
    assert [row["neuron"] for row in told["neurons"]] == list(map(str, drawn_neurons(shape, 5, 2)))
    assert told["summary"]["neurons"] == 5


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--neurons", f"{LAYERS}.0"], rf"no neuron {LAYERS}\.0.*0\.0 to {LAYERS - 1}\.{FFN - 1}"),
        (["--neurons", "1.2,"], "a neuron is ''"),
        (["--neurons", "one"], "a neuron is 'one'"),
        (["--count", str(SIZE + 1)], f"count is {SIZE + 1}; allowed: 1 to {SIZE}"),
        (["--tokens", "9000"], "has 50 windows of 24 tokens; --tokens 9000"),
        (["--length", "129"], "windows have 129 tokens; allowed: up to 128"),
        (["--length", "8"], "windows have 8 tokens; allowed: more than skip, 8"),
        (["--weight", "11"], "weight is 11"),
    ],
)
def test_the_command_refuses_what_does_not_fit(files, tmp_path: Path, more, told):
    with pytest.raises(VesicleError, match=told):
        run(files, tmp_path / "out", *more)
