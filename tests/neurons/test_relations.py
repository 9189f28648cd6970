"""Relation neurons: planted ones are found, lesions of them alone destroy, and parts are kept."""

import json
from importlib import resources

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.neurons.planted import FFN, LAYERS, SIZE, planted, save, word_level
from vesicle.commands.neurons.relations import relations as command
from vesicle.errors import DataError, VesicleError
from vesicle.neurons.claims import HOLDS, estimate, verdict
from vesicle.neurons.finished import Finished, file_name
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.relations import questions as asking
from vesicle.neurons.relations.experiment import find_relation_neurons
from vesicle.neurons.relations.facts import Fact, Relation, pick, read_relations
from vesicle.neurons.relations.knowledge import Asked, ask, split
from vesicle.neurons.relations.questions import activations, judge, question
from vesicle.neurons.relations.settings import RelationSettings
from vesicle.neurons.relations.statistics import average_precision, most_specific
from vesicle.neurons.sets import layer_counts, lesions, matched, overlap

NAMES = ("red", "green", "blue")
SUBJECTS = [f"s{i}" for i in range(40)]
WORDS = ["?", *SUBJECTS, *(f"{n}-{x}" for n in NAMES for x in ("mark", "other", "answer")), "wrong"]
PLANTED = {
    name: tuple(FFN * layer + 5 * n + 1 for layer in range(LAYERS)) for n, name in enumerate(NAMES)
}
PLAN = {
    number: (f"{name}-mark", f"{name}-answer")
    for name, numbers in PLANTED.items()
    for number in numbers
}


def encode(text: str) -> list[int]:
    return word_level(WORDS).encode(text).ids


def a_relation(name: str, n: int = 30) -> Relation:
    """Two thirds of its facts are what the model says; of the others it says something else."""
    facts = [
        Fact(key=f"{name}{s}", subject=s, answer="wrong" if i % 3 == 2 else f"{name}-answer")
        for i, s in enumerate(SUBJECTS[:n])
    ]
    return Relation(
        name=name,
        wordings=(f"[X] {name}-mark [Y]", f"[X] {name}-other [Y]"),
        facts=tuple(facts),
    )


@pytest.fixture(scope="module")
def hooked() -> Hooked:
    return Hooked(planted(WORDS, PLAN))


# The statistic ------------------------------------------------------------------------------------


def brute_force(scores: torch.Tensor, positive: torch.Tensor) -> float:
    own = scores[positive]
    return float(
        np.mean([float((own >= x).sum()) / float((scores >= x).sum()) for x in own.tolist()])
    )


def test_average_precision_is_its_definition_with_ties():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40, 30), generator=generator).double()
    positive = torch.rand(40, generator=generator) < 0.3
    found = average_precision(scores, positive)
    for column in range(30):
        assert float(found[column]) == pytest.approx(brute_force(scores[:, column], positive))


def test_it_does_not_depend_on_the_order_of_facts():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(50, 80, generator=generator)
    positive = torch.arange(50) < 12
    order = torch.randperm(50, generator=generator)
    assert torch.equal(
        average_precision(scores, positive), average_precision(scores[order], positive[order])
    )
    assert torch.equal(
        most_specific(scores, positive, 9), most_specific(scores[order], positive[order], 9)
    )


def test_monotone_changes_of_an_activation_do_not_matter_and_perfect_ones_have_1():
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(2))
    positive = torch.arange(30) % 3 == 0
    scores[:, 4] = positive + 0.1 * torch.rand(30)
    torch.testing.assert_close(
        average_precision(scores, positive), average_precision(scores.exp(), positive)
    )
    assert average_precision(scores, positive)[4] == 1
    assert most_specific(scores, positive, 1).tolist() == [4]


# Questions ----------------------------------------------------------------------------------------


def test_a_planted_neuron_is_ranked_first_and_its_lesion_alone_destroys(hooked):
    facts = [
        (n, q)
        for n, name in enumerate(NAMES)
        for fact in a_relation(name).facts
        if (q := question(fact, f"[X] {name}-mark [Y]", encode)) is not None
    ]
    labels = torch.tensor([n for n, _ in facts])
    for reading in ("mean", "last"):
        scores = activations(hooked, [q for _, q in facts], reading)
        for n, name in enumerate(NAMES):
            found = most_specific(scores, labels == n, len(PLANTED[name])).tolist()
            assert sorted(found) == sorted(PLANTED[name])
    own = [q for n, q in facts if n == 0]
    other = [q for n, q in facts if n == 1]
    before = judge(hooked, own)
    assert before.correct.double().mean() == pytest.approx(2 / 3)
    silenced = judge(hooked, own, PLANTED["red"])
    assert not silenced.correct.any()
    assert (silenced.nats < before.nats)[before.correct].all()
    assert torch.equal(judge(hooked, other, PLANTED["red"]).correct, judge(hooked, other).correct)
    drawn = matched(PLANTED["red"], hooked.shape, np.random.default_rng(0))
    drawn = [n for n in drawn.tolist() if n not in PLAN]
    assert torch.equal(judge(hooked, own, drawn).correct, before.correct)
    assert torch.equal(judge(hooked, own).correct, before.correct)  # nothing is left behind


def test_an_answer_of_two_tokens_is_known_only_if_both_are():
    words = ["?", "s", "mark", "first", "second"]
    hooked = Hooked(planted(words, {0: ("mark", "first"), 1: ("first", "second")}))
    tokenizer = word_level(words)

    def known(answer: str) -> bool:
        fact = Fact(key="s", subject="s", answer=answer)
        asked = question(fact, "[X] mark [Y]", lambda text: tokenizer.encode(text).ids)
        return bool(judge(hooked, [asked]).correct[0])

    assert known("first")
    assert known("first second")
    assert not known("first first")
    assert not known("second second")
    assert known("first second s")  # the third is not asked


def test_a_token_that_straddles_the_prompt_is_no_question():
    fact = Fact(key="s", subject="s", answer="ab")
    assert question(fact, "[X] [Y]", lambda text: [len(text)]) is None


# Knowledge and splits -----------------------------------------------------------------------------


def test_asking_keeps_the_wording_in_which_facts_are_known(hooked):
    relation = a_relation("red")
    turned = Relation(name="red", wordings=tuple(reversed(relation.wordings)), facts=relation.facts)
    for own in (relation, turned):
        asked = ask(hooked, encode, own, wanted=12)
        assert asked.wordings == ("[X] red-mark [Y]",)
        right = [fact.answer == "red-answer" for fact in asked.facts]
        assert list(asked.correct) == right
        assert asked.n_known >= 12
    assert Asked.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


@pytest.mark.parametrize("seed", range(4))
def test_no_subject_is_on_both_sides_of_a_split(seed):
    asked = [
        Asked(
            relation=name,
            wordings=("",),
            facts=tuple(Fact(key=s, subject=s, answer=s) for s in SUBJECTS[start : start + 24]),
            correct=tuple(i % 4 != 0 for i in range(24)),
            nats=(0.0,) * 24,
        )
        for name, start in (("a", 0), ("b", 8), ("c", 16))
    ]
    found = split(asked, wanted=16, seed=seed)
    sides = {
        name: {asked[r].facts[i].key for r, i in getattr(found, name)}
        for name in ("found_by", "judged_by", "unknown")
    }
    assert not sides["found_by"] & (sides["judged_by"] | sides["unknown"])
    for r in range(3):
        known = [p for p in (*found.found_by, *found.judged_by) if p[0] == r]
        assert len(known) <= 16
        assert all(asked[r].correct[i] for _, i in known)
    assert not any(asked[r].correct[i] for r, i in found.unknown)
    assert found == split(asked, wanted=16, seed=seed)
    assert found != split(asked, wanted=16, seed=seed + 10)


# Sets ---------------------------------------------------------------------------------------------


def test_random_sets_have_the_same_layers_and_overlap_by_chance(hooked):
    shape, rng = hooked.shape, np.random.default_rng(3)
    left = torch.tensor([0, 1, 2, 3, 4, 5, FFN, FFN + 1, FFN + 2, 2 * FFN])
    right = torch.tensor([*range(10, 22), FFN + 20])
    drawn = matched(left, shape, rng)
    assert torch.equal(layer_counts(drawn, shape), layer_counts(left, shape))
    assert not set(drawn.tolist()) & set(left.tolist())
    chance = overlap(left, right, shape).chance
    assert chance == pytest.approx((6 * 12 + 3 * 1) / FFN)
    shared = []
    for _ in range(600):
        fresh = torch.cat(
            [
                torch.from_numpy(rng.choice(FFN, int(count), replace=False)) + layer * FFN
                for layer, count in enumerate(layer_counts(right, shape).tolist())
            ]
        )
        shared.append(overlap(left, fresh, shape).shared)
    assert np.mean(shared) == pytest.approx(chance, abs=0.2)
    assert len(lesions(left, shape)) == 3
    with pytest.raises(VesicleError, match=f"no neuron number {SIZE}; allowed: 0 to {SIZE - 1}"):
        lesions([SIZE], shape)
    with pytest.raises(VesicleError, match="30 of layer 0's 40 neurons are chosen"):
        matched(range(30), shape, rng)


def test_a_verdict_needs_the_whole_interval():
    assert verdict(estimate([0.5, 0.6, 0.7])) == HOLDS
    assert verdict(estimate([-0.5, 0.6, 0.1])) == "not told apart from 0"
    assert verdict(estimate([-0.5, -0.6])) == "not reproduced"


# The analysis -------------------------------------------------------------------------------------


def run(hooked, out, **changed):
    settings = RelationSettings(
        **{"neurons": LAYERS / SIZE, "facts": 16, "seeds": 2, "times": (0.25, 1.0, 2.0), **changed}
    )
    return find_relation_neurons(
        hooked, encode, [a_relation(name) for name in NAMES], settings, out, facts={"model": "tiny"}
    )


def test_the_analysis_finds_what_was_planted_and_is_kept(hooked, tmp_path, monkeypatch):
    report = run(hooked, tmp_path)
    assert [row["relation"] for row in report["relations"]] == list(NAMES)
    claims = {row["name"]: row for row in report["claims"]}
    for name in ("existence", "specificity"):
        assert claims[name]["verdict"] == HOLDS
        assert claims[name]["found"]["mean"] == pytest.approx(1, abs=0.05)
    assert claims["cumulativity"]["found"]["mean"] > 0.5  # one of four neurons is not enough
    assert claims["versatility"]["verdict"] != HOLDS  # nothing is shared
    assert claims["interference"]["found"]["mean"] == 0
    for row in report["doses"]:
        assert abs(row["random"]["mean"]) < 0.1
        assert abs(row["others"]["mean"]) < 0.1
    assert min(report["specificity"]["held_out"]) == pytest.approx(1)
    assert max(report["specificity"]["shuffled"]) < 0.8
    assert report["layers"]["red"] == [2] * LAYERS
    monkeypatch.setattr(asking, "_alike", None)  # nothing is asked again
    assert run(hooked, tmp_path) == report
    with pytest.raises(VesicleError, match="whose facts is 16, not 18: use another folder"):
        run(hooked, tmp_path, facts=18)


def test_a_run_that_was_cut_off_gives_what_a_whole_one_does(hooked, tmp_path):
    whole = run(hooked, tmp_path / "whole")
    told = []

    def cut(done: int, total: int, what: str) -> None:
        told.append((done, total))
        if what == "seed 1, green":
            raise KeyboardInterrupt

    settings = RelationSettings(neurons=LAYERS / SIZE, facts=16, seeds=2, times=(0.25, 1.0, 2.0))
    out, each = tmp_path / "cut", [a_relation(name) for name in NAMES]
    with pytest.raises(KeyboardInterrupt):
        find_relation_neurons(
            hooked, encode, each, settings, out, facts={"model": "tiny"}, show=cut
        )
    assert run(hooked, out) == whole
    assert told[-1] == (3 + 1 + 4, 3 + 1 + 6)


def test_shared_neurons_are_versatile_and_their_lesion_harms_both(tmp_path):
    plan = {FFN * layer + 7: ("mark", "red-answer") for layer in range(LAYERS)}
    words = [*WORDS, "mark"]
    tokenizer = word_level(words)
    pair = [
        Relation(
            name=name,
            wordings=("[X] mark [Y]",),
            facts=tuple(
                Fact(key=s, subject=s, answer="red-answer") for s in SUBJECTS[start : start + 16]
            ),
        )
        for name, start in (("one", 0), ("two", 16))
    ]
    far = Relation(
        name="far",
        wordings=("[X] green-mark [Y]",),
        facts=tuple(Fact(key=s, subject=s, answer="green-answer") for s in SUBJECTS[24:40]),
    )
    plan |= {FFN * layer + 9: ("green-mark", "green-answer") for layer in range(LAYERS)}
    report = find_relation_neurons(
        Hooked(planted(words, plan)),
        lambda text: tokenizer.encode(text).ids,
        [*pair, far],
        RelationSettings(neurons=LAYERS / SIZE, facts=16, seeds=1, times=(1.0,)),
        tmp_path,
        facts={},
    )
    nearest = {row["relation"]: row for row in report["nearest"]}
    assert nearest["one"]["other"] == "two"
    assert nearest["two"]["other"] == "one"
    assert nearest["one"]["precision"] == pytest.approx(1)
    assert nearest["far"]["precision"] < 0.9
    pairs = {(row["lesioned"], row["judged"]): row for row in report["pairs"]}
    assert pairs["one", "two"]["shared"] > pairs["one", "far"]["shared"]
    assert pairs["one", "two"]["change"]["mean"] == pytest.approx(-1)
    assert pairs["one", "far"]["change"]["mean"] == pytest.approx(0)


def test_too_few_known_facts_are_told_in_a_line(hooked, tmp_path):
    unknown = Relation(
        name="grey",
        wordings=("[X] red-mark [Y]",),
        facts=tuple(Fact(key=s, subject=s, answer="wrong") for s in SUBJECTS[:10]),
    )
    settings = RelationSettings(facts=8)
    with pytest.raises(DataError, match="knows 0 of 10 facts of 'grey'; needed: 8 and more"):
        find_relation_neurons(
            hooked, encode, [a_relation("red"), unknown], settings, tmp_path, facts={}, named=True
        )
    with pytest.raises(DataError, match="of 2 relations the model knows 8 facts of 1; needed: 2"):
        find_relation_neurons(
            hooked, encode, [a_relation("red"), unknown], settings, tmp_path, facts={}
        )


def test_other_languages_ask_only_subjects_that_found_nothing(hooked, tmp_path):
    other = {
        name: Relation(
            name=name,
            wordings=(f"[X] {name}-mark [Y]",),
            facts=a_relation(name).facts,
        )
        for name in NAMES
    }
    report = find_relation_neurons(
        hooked,
        encode,
        [a_relation(name) for name in NAMES],
        RelationSettings(neurons=LAYERS / SIZE, facts=16, seeds=1, times=(1.0,)),
        tmp_path,
        facts={},
        languages={"xx": other},
    )
    rows = report["languages"]["rows"]
    assert {row["relation"] for row in rows} == set(NAMES)
    for row in rows:
        assert row["lost"] == 1
        assert row["lost_random"] == 0
        assert row["lost_above_random"]["n"] < row["known"]  # those that found neurons are missing
    (claim,) = report["languages"]["claims"]
    assert claim["verdict"] == HOLDS


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"neurons": 0.0}, "--neurons is 0; allowed: above 0, up to 0.1"),
        ({"neurons": 0.5}, "--neurons is 0.5; allowed: above 0, up to 0.1"),
        ({"facts": 7}, "--facts is 7; allowed: 8 and above"),
        ({"seeds": 0}, "--seeds is 0; allowed: 1 and above"),
        ({"reading": "first"}, "--reading is 'first'; allowed: mean, last"),
        ({"times": (0.5, 2.0)}, "allowed: numbers above 0, 1 among them"),
    ],
)
def test_settings_check_themselves(changed, line):
    with pytest.raises(DataError, match=line.replace("(", r"\(")):
        RelationSettings(**changed).check()


# Data ---------------------------------------------------------------------------------------------


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


LRE = {
    "relation": "capital",
    "relation_type": "factual",
    "subject": "France",
    "object": "Paris",
    "prompt_templates": ["The capital of {} is"],
    "prompt_templates_zs": ["{} has the capital"],
}


def test_the_three_sets_are_read(tmp_path):
    rows = [LRE, {**LRE, "subject": "Peru", "object": "Lima"}, {**LRE, "relation_type": "bias"}]
    write(tmp_path / "relations_lre" / "train.jsonl", rows)
    write(tmp_path / "relations_lre" / "test.jsonl", [{**LRE, "subject": "X", "object": "1"}] * 2)
    found = read_relations(str(tmp_path))["capital"]
    assert found.wordings == ("The capital of [X] is [Y]", "[X] has the capital [Y]")
    assert [fact.subject for fact in found.facts] == ["France", "Peru", "X"]
    write(
        tmp_path / "pararel" / "train.jsonl",
        [
            {"relation": "P1", "subject": "a", "object": "b"},
            {"relation": "P1", "subject": "c", "object": "d"},
            {"relation": "P1", "subject": "c", "object": "e"},  # two answers: left out
            {"relation": "P2", "subject": "a", "object": "b"},  # no pattern ends in [Y]
        ],
    )
    write(
        tmp_path / "pararel" / "patterns.jsonl",
        [
            {"relation": "P1", "pattern": "[X] is in [Y] ."},
            {"relation": "P1", "pattern": "[Y] holds [X]."},
            {"relation": "P2", "pattern": "[Y] holds [X]."},
        ],
    )
    (own,) = read_relations(str(tmp_path), "pararel").values()
    assert (own.name, own.wordings, len(own.facts)) == ("P1", ("[X] is in [Y]",), 1)
    both = {"en": "Germany", "de": "Deutschland"}
    write(
        tmp_path / "mpararel" / "train.jsonl",
        [{"relation": "P1", "sub_uri": "Q1", "subject": both, "object": both}],
    )
    write(
        tmp_path / "mpararel" / "patterns.jsonl",
        [
            {"relation": "P1", "lang": "en", "pattern": "the land of [X] is [Y]"},
            {"relation": "P1", "lang": "de", "pattern": "das Land von [X] ist [Y]。"},
        ],
    )
    (own,) = read_relations(str(tmp_path), "mpararel", "de").values()
    assert own.wordings == ("Das Land von [X] ist [Y]",)
    assert own.facts == (Fact(key="Q1", subject="Deutschland", answer="Deutschland"),)
    with pytest.raises(DataError, match="no language 'fr'; allowed: de, en"):
        read_relations(str(tmp_path), "mpararel", "fr")
    with pytest.raises(DataError, match="no relation 'P9'; allowed: P1"):
        pick({"P1": own}, ["P9"])


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ([1], "line 1: relation is missing; allowed: a text"),
        ({**LRE, "subject": 7}, "line 1: subject is 7; allowed: a text"),
        ({**LRE, "object": " "}, "line 1: object is ' '; allowed: a text"),
        ({**LRE, "object": "\ud800"}, "half of a surrogate pair"),
        ({**LRE, "prompt_templates": "x"}, "prompt_templates is 'x'; allowed: a list of texts"),
        ({**LRE, "prompt_templates": ["x"]}, "a template is 'x'; allowed: one with one {}"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, line):
    write(tmp_path / "relations_lre" / "train.jsonl", [row])
    with pytest.raises(DataError) as told:
        read_relations(str(tmp_path))
    assert line in str(told.value)
    assert "\n" not in str(told.value)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(DataError, match=r"relations_lre holds no train\.jsonl\.gz or"):
        read_relations(str(tmp_path))
    with pytest.raises(DataError, match="--set is 'facts'; allowed: lre, pararel, mpararel"):
        read_relations("sample", "facts")
    with pytest.raises(DataError, match="--set is 'pararel'; allowed with the sample: lre"):
        read_relations("sample", "pararel")
    with pytest.raises(DataError, match="lre has no language 'de'; allowed: en"):
        read_relations("sample", "lre", "de")


def test_the_sample_is_whole():
    found = read_relations("sample")
    assert len(found) == 6
    assert all(len(relation.facts) == 30 for relation in found.values())
    assert all(len(relation.wordings) == 3 for relation in found.values())
    file = resources.files("vesicle.neurons") / "samples" / "relations.jsonl"
    assert len(file.read_text(encoding="utf-8").splitlines()) == 180


def test_every_name_has_a_file_of_its_own():
    names = ["a b", "a_b", "a/b", "a%5Fb", "Ä b"]
    files = {file_name(name) for name in names}
    assert len(files) == len(names)
    assert file_name("a b") == "a_b"
    assert not any("/" in name for name in files)


def test_parts_are_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    first = Finished(tmp_path, {"a": (1, 2)})
    assert torch.equal(first.tensors("t", make)["x"], torch.ones(2))
    assert torch.equal(Finished(tmp_path, {"a": [1, 2]}).tensors("t", make)["x"], torch.ones(2))
    assert made == [1]
    with pytest.raises(VesicleError, match=r"whose a is \[1, 2\], not 3: use another folder"):
        Finished(tmp_path, {"a": 3})
    (tmp_path / "t.safetensors").write_bytes(b"\0")
    with pytest.raises(DataError, match="cannot be read"):
        first.tensors("t", make)


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(command)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(planted(WORDS, PLAN), WORDS, tmp_path_factory.mktemp("model"))


def test_the_command_tells_and_goes_on(app, folder, tmp_path):
    rows = [
        {
            "relation": relation.name,
            "subject": fact.subject,
            "object": fact.answer,
            "prompt_templates": [f"{{}} {relation.name}-mark"],
        }
        for relation in map(a_relation, NAMES)
        for fact in relation.facts
    ]
    write(tmp_path / "relations_lre" / "train.jsonl", rows)
    out = tmp_path / "out"
    words = ["--data", str(tmp_path), "--out", str(out), "--model", str(folder)]
    words += ["--neurons", str(LAYERS / SIZE), "--facts", "16", "--seeds", "1"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["settings"]["set"] == "lre"
    assert report["neurons"] == LAYERS
    assert json.loads((out / "report.json").read_text()) == report
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    for word in ("red", "existence", "reproduced", "interference"):
        assert word in again.stdout
    other = CliRunner().invoke(app, [*words, "--reading", "last"])
    assert isinstance(other.exception, VesicleError)
    assert "whose reading is" in str(other.exception)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--relations", "country capital,loves"], "there is no relation 'loves'; allowed: animal"),
        (["--relations", "opposite"], "--relations names 1: a relation's prompts"),
        (["--relations", "a,,b"], "--relations is 'a,,b'; allowed: names with commas between"),
        (["--neurons", "2"], "--neurons is 2; allowed"),
        (["--facts", "3"], "--facts is 3; allowed: 8 and above"),
        (["--languages", "de"], "lre has no language 'de'; allowed: en"),
        (["--data", "nowhere"], "nowhere/relations_lre holds no train.jsonl.gz"),
    ],
)
def test_bad_input_is_told_before_a_model_is_loaded(app, tmp_path, words, line):
    given = words if "--data" in words else ["--data", "sample", *words]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*given, "--out", str(out), "--model", "no-such-model"])
    assert isinstance(done.exception, VesicleError)
    assert line in str(done.exception)
    assert not out.exists()
