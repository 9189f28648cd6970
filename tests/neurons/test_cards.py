"""A card tells what was computed, runs that were cut off go on, and other folders are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer

from tests.neurons.tiny_cards import (
    HARMFUL,
    SETTINGS,
    tiny_cards,
    tiny_hooked,
    tiny_llama,
    tiny_text,
    tiny_tokenizer,
    tiny_windows,
)
from tests.tiny import shape_of, tiny_control, tiny_modulator
from vesicle.commands.neurons.card import card
from vesicle.commands.neurons.report import report
from vesicle.errors import DataError, VesicleError
from vesicle.modulator import ModulatorMethod
from vesicle.neurons.cards import Cards, make_cards
from vesicle.neurons.decoding.mixtures import score_mixtures
from vesicle.neurons.decoding.readout import Readout, likeliest
from vesicle.neurons.drives import Drives
from vesicle.neurons.hooks import Hooked
from vesicle.neurons.neuron import Neuron
from vesicle.neurons.own_text import own_texts

SKIP = 8
"""First tokens of a window that do not count."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cards")
    tiny_cards(place)
    return place


@pytest.fixture(scope="module")
def cards(folder: Path) -> Cards:
    return Cards.load(folder)


# A card -------------------------------------------------------------------------------------------


def test_a_card_is_what_a_plain_look_at_the_model_finds(cards: Cards):
    text, windows, (layer, index) = tiny_text(), tiny_windows(), (1, 37)
    found = cards.card(Neuron(layer, index), text)
    name = f"blocks.{layer}.mlp.hook_post"
    seen = Hooked(tiny_llama()).run(windows, read=[name])[name][..., index]  # (N, T)
    counted = seen[:, SKIP:]
    high = counted.flatten().sort(descending=True).values
    assert [one.activation for one in found.highest] == pytest.approx(high[:5].tolist(), abs=1e-5)
    assert [one.activation for one in found.lowest] == pytest.approx(
        high.flip(0)[:5].tolist(), abs=1e-5
    )
    assert found.mean == pytest.approx(float(counted.mean()), abs=1e-5)
    assert found.deviation == pytest.approx(float(counted.std(correction=0)), rel=1e-4)
    window, token = divmod(int(counted.argmax()), counted.shape[1])
    own = own_texts(windows[window].tolist(), text)
    place = SKIP + token
    best = found.highest[0]
    assert best.token == own[place]
    assert best.before == "".join(own[max(0, place - 12) : place])
    assert best.behind == "".join(own[place + 1 : place + 13])


def test_a_card_tells_the_stronger_way_of_each_projection(cards: Cards):
    text, readout = tiny_text(), Readout(tiny_llama())
    for neuron in (Neuron(0, 0), Neuron(2, 79)):
        found = cards.card(neuron, text)
        assert list(found.tokens) == ["gate", "up", "down"]
        for kind, row in found.tokens.items():
            own = readout.directions(neuron.layer, kind)[neuron.index]
            logits = readout.logits(own[None])[0]
            z = (logits - logits.mean()) / logits.std()
            assert row["way"] == ("+" if z.max() > -z.min() else "-")
            assert row["score"] == pytest.approx(float(z.abs().max()), abs=2e-3)
            order = (z if row["way"] == "+" else -z).argsort(descending=True)[:4]
            assert row["likeliest"] == text.pieces(order.tolist())


def test_ranks_go_by_size(cards: Cards):
    text = tiny_text()
    for name, size in cards.drives.size.items():
        layer, index = divmod(int(size.argmax()), 80)
        own = cards.card(Neuron(layer, index), text).drives[name]
        assert own["rank"] == 1
        assert abs(own["drive"]) <= float(size.max()) + 1e-9
        assert cards.card(Neuron(2, 5), text).drives[name]["rank"] == 161  # the last layer: none


def test_texts_of_tokens_join_to_the_text():
    text = tiny_text()
    ids = text.encode("a café, 日本, 🙂!")
    own = own_texts(ids, text)
    assert "".join(own) == text.decode(ids)
    assert len(own) == len(ids)
    assert own.count("") == sum(len(c.encode()) - 1 for c in "a café, 日本, 🙂!")
    assert own_texts([256, *text.encode("é")[:1]], text) == ["</s>", "\ufffd"]
    evil = own_texts(text.encode(HARMFUL[5]), text)
    assert evil == [r"\u202eevil\x1b[2J"]


# Mixtures -----------------------------------------------------------------------------------------


def test_mixtures_of_one_direction_are_that_direction(tmp_path: Path):
    model = tiny_llama()
    up = model.model.layers[1].mlp.up_proj.weight
    up.copy_(up[3].clone().expand_as(up))
    scores = score_mixtures(model, tmp_path, count=7)
    readout = Readout(model)
    own = likeliest(readout.logits(readout.directions(1, "up")[:1]), 1).scores.amax()
    assert scores.shape == (3, 3, 7)
    torch.testing.assert_close(scores[1, 1], own.expand(7), rtol=1e-4, atol=1e-4)
    assert scores[0, 1].std() > 0.01
    assert torch.equal(score_mixtures(model, tmp_path, count=7), scores)
    with pytest.raises(VesicleError, match="count 7, not 8"):
        score_mixtures(model, tmp_path, count=8)
    (tmp_path / "mixtures.safetensors").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read"):
        score_mixtures(model, tmp_path, count=7)


def test_of_random_weights_as_many_neurons_stand_out_as_mixtures_and_a_planted_one_does(
    tmp_path: Path,
):
    model = tiny_llama()
    readout = Readout(model)
    model.model.layers[2].mlp.down_proj.weight[:, 9] = readout.head[7] / model.model.norm.weight
    mixed = score_mixtures(model, tmp_path, count=200)
    own = torch.stack(
        [
            likeliest(readout.logits(readout.directions(layer, "down")), 1).scores.amax(-1)
            for layer in range(3)
        ]
    )
    share = float((own > mixed[:, 2].quantile(0.95)).float().mean())
    assert 0.01 < share < 0.12
    assert own[2, 9] > mixed[:, 2].max()


# Going on -----------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("stage", "done", "first_after"),
    [
        ("decoding", 2, ("decoding", 1)),  # all layers are told of; two come from their files
        ("mixtures", 1, ("mixtures", 1)),
        ("reading", 17, ("reading", 17)),  # kept after every 16th window
        ("drives of serotonin", 1, ("drives of serotonin", 1)),
    ],
)
def test_a_run_that_was_cut_off_goes_on(
    cards: Cards, tmp_path: Path, stage: str, done: int, first_after: tuple[str, int]
):
    def stop(what: str, at: int, total: int, note: str) -> None:
        if (what, at) == (stage, done):
            raise Stop

    told: list[tuple[str, int]] = []
    with pytest.raises(Stop):
        make_cards(tiny_hooked(), tiny_windows(), tmp_path, SETTINGS, name="tiny", show=stop)
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert kept or stage == "mixtures"
    with pytest.raises(DataError, match=r"holds no finished cards|cannot be read"):
        Cards.load(tmp_path)
    make_cards(
        tiny_hooked(),
        tiny_windows(),
        tmp_path,
        SETTINGS,
        name="tiny",
        show=lambda what, at, total, note: told.append((what, at)),
    )
    assert told[0] == first_after
    again = Cards.load(tmp_path)
    assert torch.equal(again.decoded.ids, cards.decoded.ids)
    assert torch.equal(again.mixtures, cards.mixtures)
    assert torch.equal(again.contexts.places, cards.contexts.places)
    torch.testing.assert_close(again.contexts.mean, cards.contexts.mean)
    for name, drive in cards.drives.drive.items():
        torch.testing.assert_close(again.drives.drive[name], drive)
    # What is finished is not made again.
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    make_cards(tiny_hooked(), tiny_windows(), tmp_path, SETTINGS, name="tiny")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == files


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("text", "contexts made of another text"),
        ("model", "neurons decoded with weights"),
        ("dial", "at dial 0.4, made with another"),
        ("modulator", "drives of transmitters"),
        ("top", "k 4, not 3"),
        ("mixtures", "count 6, not 5"),
        ("contexts", "k 5, not 4"),
    ],
)
def test_a_folder_made_otherwise_is_refused(folder: Path, change: str, named: str):
    hooked, windows, settings = tiny_hooked(), tiny_windows(), SETTINGS
    if change == "text":
        windows[3, 20] = 5
    elif change == "model":
        hooked = Hooked(tiny_llama(seed=1), hooked.method)
    elif change == "dial":
        hooked = tiny_hooked(dial=0.5)
    elif change == "modulator":
        hooked = tiny_hooked(seed=3)
    else:
        settings = replace(settings, **{change: getattr(settings, change) - 1})
    with pytest.raises(VesicleError, match=named):
        make_cards(hooked, windows, folder, settings, name="tiny </title>")


def test_without_a_modulator_nothing_is_driven(tmp_path: Path):
    found = make_cards(Hooked(tiny_llama()), tiny_windows()[:2], tmp_path, SETTINGS, name="tiny")
    assert found.drives.size == {}
    assert Cards.load(tmp_path).card(Neuron(0, 3), tiny_text()).drives == {}


def test_what_would_fail_later_fails_first(tmp_path: Path):
    hooked, windows = tiny_hooked(), tiny_windows()
    with pytest.raises(DataError, match="k is 5; allowed: up to 2"):
        make_cards(hooked, windows[:1, : SKIP + 2], tmp_path, SETTINGS, name="tiny")
    with pytest.raises(DataError, match="more than skip, 8"):
        make_cards(hooked, windows[:, :SKIP], tmp_path, SETTINGS, name="tiny")
    with pytest.raises(VesicleError, match="rests"):
        make_cards(tiny_hooked(dial=1.0), windows, tmp_path, SETTINGS, name="tiny")
    modulator = tiny_modulator(shape_of(hooked.model))
    constant = tiny_control("constant", modulator.predictor.config)
    modulator = modulator.with_levels(constant)
    levelled = Hooked(hooked.model, ModulatorMethod(modulator, 0.5))
    with pytest.raises(VesicleError, match="no hidden states"):
        make_cards(levelled, windows, tmp_path, SETTINGS, name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_damaged_cards_have_their_line(tmp_path: Path):
    with pytest.raises(DataError, match="vesicle neurons report makes them"):
        Cards.load(tmp_path)
    (tmp_path / "drives.json").write_text('{"transmitters": ["gaba"]}')
    with pytest.raises(DataError, match=r"gaba\.safetensors cannot be read"):
        Drives.load(tmp_path)
    (tmp_path / "drives.json").write_text("[]")
    with pytest.raises(DataError, match="not what find_drives wrote"):
        Drives.load(tmp_path)


# The commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(place)
    tiny_tokenizer().save(str(place / "tokenizer.json"))
    return place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command("report")(report)
    app.command("card")(card)

    def call(*words: object) -> tuple[str, str]:
        typer.main.get_command(app).main([*map(str, words)], "neurons", standalone_mode=False)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return call


def test_report_and_card_from_end_to_end(
    run: Callable[..., tuple[str, str]], model: Path, tmp_path: Path
):
    data = tmp_path / "data.txt"
    data.write_text("The cat café sat on the mat; 日本 caught it.\n" * 20)
    out = tmp_path / "atlas"
    modulator = tmp_path / "modulator"
    tiny_modulator(shape_of(tiny_llama()), dtype=torch.float32).save_pretrained(modulator)
    words = ("report", "--model", model, "--data", data, "--out", out, "--tokens", 200)
    words = (*words, "--length", 40, "--modulator", modulator, "--budget", 0.5)
    found = json.loads(run(*words, "--json")[0])
    assert found == json.loads((out / "report.json").read_text())
    assert found["neurons"] == 240
    assert found["tokens_read"] == 5 * (40 - SKIP)
    assert list(found["transmitters"]) == ["dopamine", "serotonin", "gaba"]
    assert "<h1>Neurons of" in (out / "atlas.html").read_text(encoding="utf-8")
    before = (out / "atlas.html").read_bytes()
    again = run(*words)[1]
    assert "240 cards" in again
    assert "no modulator" not in again
    assert (out / "atlas.html").read_bytes() == before
    told = json.loads(run("card", "1.7", "--cards", out, "--model", model, "--json")[0])
    own = Cards.load(out).card(Neuron(1, 7), tiny_text())
    assert told == json.loads(json.dumps(own.to_dict()))
    printed, _ = run("card", "1.7", "--cards", out, "--model", model)
    assert "neuron 1.7" in printed
    assert "drives gaba" in printed


def test_a_shorter_text_is_read_whole_and_told_of(
    run: Callable[..., tuple[str, str]], model: Path, tmp_path: Path
):
    data = tmp_path / "data.txt"
    data.write_text("A short text, though not too short a one for this.\n" * 2)
    _, told = run(
        *("report", "--model", model, "--data", data, "--out", tmp_path / "out"),
        *("--tokens", 1000, "--length", 40),
    )
    assert "the text has 80 tokens in whole windows of 40" in told
    assert "no modulator ships with this model: cards have no drives" in told


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("card", "3.0"),
            "there is no neuron 3.0 in this model; allowed: LAYER.NEURON, 0.0 to 2.79",
        ),
        (("card", "1.80"), "allowed: LAYER.NEURON, 0.0 to 2.79"),
        (("card", "seven"), "a neuron is 'seven'"),
        (("card", "1.2", "--cards", "/nowhere"), "/nowhere has no decoded"),
        (("report", "--budget", 1.5), "--budget is 1.5"),
        (("report", "--data", "/nowhere.txt"), "no data at /nowhere.txt"),
        (("report", "--length", 4096), "allowed: up to 512"),
    ],
)
def test_every_mistake_has_its_line(
    run: Callable[..., tuple[str, str]],
    model: Path,
    folder: Path,
    tmp_path: Path,
    words: tuple[object, ...],
    named: str,
):
    more = {"--model": model, "--cards": folder, "--out": tmp_path / "out"}
    more = {name: value for name, value in more.items() if name not in words}
    del more["--out" if words[0] == "card" else "--cards" if "--cards" in more else "--model"]
    with pytest.raises(VesicleError) as caught:
        run(*words, *(word for pair in more.items() for word in pair))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_of_another_model_are_refused(cards: Cards):
    from tokenizers import Tokenizer, models

    from vesicle.models import Text

    small = Text(
        Tokenizer(models.BPE({"a": 0, "b": 1}, [])),
        special_tokens={},
        template=None,
        eos_ids=[],
        context_window=8,
    )
    with pytest.raises(DataError, match="this model's tokens are 0 to 1"):
        cards.check_text(small)


def test_a_neuron_is_read_as_it_is_written():
    assert Neuron.parse_within(" 2.79 ", 3, 80) == Neuron(2, 79)
    assert Neuron.parse(str(Neuron(1, 4)), shape_of(tiny_llama())) == Neuron(1, 4)
    for bad in ("", "2", "2.80", "3.0", "-1.0", "1.2.3", "1,2"):
        with pytest.raises(DataError, match=r"allowed: LAYER\.NEURON, 0\.0 to 2\.79"):
            Neuron.parse_within(bad, 3, 80)
