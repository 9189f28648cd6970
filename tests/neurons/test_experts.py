"""MoE-X: experts are one wide MLP, come from an MLP and go back to one, and are judged fairly."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.tiny import shape_of, tiny_model, tokens
from vesicle.commands.neurons.experts import experts as command
from vesicle.engine import Engine
from vesicle.errors import DataError, ModelError, VesicleError
from vesicle.neurons.experts import (
    Autoencoder,
    Dictionary,
    ExpertFfn,
    ExpertSize,
    FixedRouter,
    Inputs,
    Neurons,
    Properties,
    Routing,
    SparsityRouter,
    TopKRouter,
    activations,
    active_probability,
    as_small_ffn,
    balance_loss,
    chess_games,
    find,
    fit_autoencoder,
    fit_router,
    mlp_of,
    new_experts_decoder,
    restricted,
    to_experts,
    training_loss,
)
from vesicle.neurons.experts.conversion import SPLITS, split_units
from vesicle.neurons.experts.coverage import always_counts, f1_of
from vesicle.neurons.experts.decoder import expert_layers, routings, token_losses
from vesicle.neurons.experts.draws import of_counts, of_means
from vesicle.neurons.experts.features import Probe, vectors
from vesicle.neurons.experts.properties import board_properties, surface_properties
from vesicle.neurons.experts.regression import regression
from vesicle.neurons.experts.settings import claim, settings_of
from vesicle.neurons.experts.study import readers_of, run_comparison
from vesicle.plan import Plan, Replay, StandIns
from vesicle.reference.attach import attach
from vesicle.scratch import DecoderSize, Recipe, fit

EXACT = {"rtol": 1e-9, "atol": 1e-10}
"""Of sums in fp64 in another order."""
NEAR = {"rtol": 1e-4, "atol": 1e-5}
"""Of sums in fp32 in another order."""
ENGINE = {"rtol": 1e-3, "atol": 1e-4}
"""Of the engine, whose small modules and keys are in fp32."""
SIZE = ExpertSize(width=12, n_experts=5, n_active=2, units=7)
DECODER = DecoderSize(
    vocabulary=40, width=16, n_layers=2, n_heads=2, n_kv_heads=2, ffn=12, context=32
)
EXPERTS = ExpertSize(width=16, n_experts=4, n_active=2, units=6)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def new_layer(size: ExpertSize = SIZE, kind: str = "top-k") -> ExpertFfn:
    routers = {
        "top-k": lambda: TopKRouter(size.width, size.n_experts, size.n_active),
        "sparsity": lambda: SparsityRouter(size.n_experts, size.n_active),
        "densest": lambda: SparsityRouter(size.n_experts, size.n_active, densest=True),
        "fixed": lambda: FixedRouter(size.n_experts, [3, 1], [0.25, 2.0]),
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = ExpertFfn(size, routers[kind](), spread=0.5).double()
        if kind == "top-k":
            torch.nn.init.normal_(layer.router.weight)
    return layer


# The layer and its routers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["top-k", "sparsity", "densest", "fixed"])
@pytest.mark.parametrize("form", [{}, {"gated": True}, {"gated": True, "activation": "silu"}])
def test_experts_are_one_wide_mlp(kind, form):
    layer, x = new_layer(replace(SIZE, **form), kind), random(3, 11, SIZE.width)
    wide = layer.as_wide_mlp()
    torch.testing.assert_close(wide(x), layer(x), **EXACT)
    hidden = wide.hidden(x)
    assert hidden.shape == (3, 11, SIZE.all_units)
    groups = hidden.view(3, 11, SIZE.n_experts, SIZE.units)
    assert ((groups != 0).any(-1).sum(-1) <= SIZE.n_active).all()
    assert layer(x).abs().max() > 0.1


def test_a_token_runs_its_experts_alone():
    layer, x = new_layer(replace(SIZE, activation="silu")), random(20, SIZE.width)
    routing = layer.router(x, layer.encoders)
    with torch.no_grad():
        before = layer(x)
        layer.ffn_out[2].mul_(3)
        changed = (layer(x) != before).any(1)
    assert torch.equal(changed, (routing.chosen == 2).any(1))
    assert 0 < changed.sum() < 20


@pytest.mark.parametrize("kind", ["top-k", "sparsity"])
def test_routing_looks_at_each_token_alone(kind):
    model = new_experts_decoder(DECODER, EXPERTS, kind, 0)
    ids = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 12:] = 3
    with torch.no_grad():
        torch.testing.assert_close(model(other).logits[:, :12], model(ids).logits[:, :12], **NEAR)
        layer, x = new_layer(kind=kind), random(9, SIZE.width)
        torch.testing.assert_close(layer(x)[4], layer(x[4:5])[0], **EXACT)


def test_the_estimated_sparsity_is_that_of_normal_weights():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 30, 1, generator=generator)
    encoders = means + torch.randn(4, 30, 20_000, generator=generator)
    x = torch.randn(6, 30, generator=generator)
    true = torch.stack([(x @ encoder > 0).float().mean(1) for encoder in encoders], 1)
    torch.testing.assert_close(active_probability(x, encoders), true, rtol=0, atol=0.02)
    assert true.max() - true.min() > 0.5


def test_the_router_takes_the_sparsest_and_its_opposite_the_densest():
    layer, x = new_layer(kind="sparsity"), random(50, SIZE.width)
    estimated = active_probability(x, layer.encoders)
    sparse = layer.router(x, layer.encoders)
    assert torch.equal(sparse.chosen.sort(1).values, estimated.argsort(1)[:, :2].sort(1).values)
    dense = SparsityRouter(5, 2, densest=True)(x, layer.encoders)
    assert torch.equal(dense.chosen.sort(1).values, estimated.argsort(1)[:, -2:].sort(1).values)
    torch.testing.assert_close(sparse.gates.sum(1), torch.ones(50).double())


def test_the_sparsity_router_learns_through_the_experts():
    layer = new_layer(kind="sparsity")
    x = random(30, SIZE.width)
    balance_loss(layer.router(x, layer.encoders)).backward()
    assert layer.ffn_in.grad is not None
    assert layer.ffn_in.grad.abs().max() > 0
    assert not list(layer.router.parameters())


def test_the_balance_loss_is_least_where_experts_are_used_evenly():
    even = torch.arange(8).repeat(4)[:, None]
    flat = Routing(chosen=even, gates=torch.ones(32, 1), scores=torch.zeros(32, 8))
    assert float(balance_loss(flat)) == pytest.approx(1)
    sure = Routing(
        chosen=torch.zeros(32, 1, dtype=torch.long),
        gates=torch.ones(32, 1),
        scores=torch.eye(8)[:1].repeat(32, 1) * 50,
    )
    assert float(balance_loss(sure)) == pytest.approx(8)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: replace(SIZE, n_active=6), "n_active is 6; allowed: 1 to 5"),
        (lambda: replace(SIZE, units=0), "units is 0; allowed: 1 and above"),
        (lambda: replace(SIZE, activation="tanh"), "activation is 'tanh'; allowed: silu"),
        (lambda: SparsityRouter(4, 5), "n_active is 5; allowed: 1 to the 4"),
        (lambda: SparsityRouter(4, 2, temperature=0), "temperature is 0; allowed: above 0"),
        (lambda: FixedRouter(4, [4]), "expert is 4; allowed: 0 to 3"),
        (lambda: FixedRouter(4, [1, 1]), r"experts are \[1, 1\]"),
        (lambda: new_experts_decoder(DECODER, SIZE, "top-k", 0), "allowed: width 16 and 12"),
        (lambda: new_experts_decoder(DECODER, EXPERTS, "random", 0), "router is 'random'"),
    ],
)
def test_sizes_and_routers_are_checked(make, line):
    with pytest.raises(ValueError, match=line):
        make()


def test_decoders_differ_in_their_ffns_alone():
    dense = new_experts_decoder(
        DECODER, replace(EXPERTS, n_experts=1, n_active=1, units=12), "top-k", 5
    )
    sparse = new_experts_decoder(DECODER, EXPERTS, "sparsity", 5)
    same = {n: p for n, p in sparse.named_parameters() if ".mlp." not in n}
    assert same
    for name, parameter in dense.named_parameters():
        if ".mlp." not in name:
            torch.testing.assert_close(parameter, same[name], rtol=0, atol=0)
    assert [ffn.size.n_experts for ffn in expert_layers(sparse)] == [4, 4]


# Conversion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_where_all_experts_run_they_are_the_mlp(name, split):
    model = tiny_model(name)
    x = random(17, 48)
    layer = to_experts(mlp_of(model, 1), 8, 8, split=split)
    torch.testing.assert_close(layer(x), model.model.layers[1].mlp(x), **EXACT)
    fewer = to_experts(mlp_of(model, 1), 8, 3, split=split)
    assert (fewer(x) - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("split", SPLITS)
def test_units_are_split_evenly_and_once(split):
    groups = split_units(random(12, 40), 8, split, seed=0)
    assert [len(group) for group in groups] == [5] * 8
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(40))


def test_clusters_hold_units_that_look_alike():
    centres = torch.eye(12)[:4]
    encoder = (centres.repeat(10, 1) + 0.05 * random(40, 12).float()).T
    found = [set((group % 4).tolist()) for group in split_units(encoder, 4, "cluster", 0)]
    assert sorted(map(len, found)) == [1, 1, 1, 1]


@torch.no_grad()
def test_a_fitted_router_takes_experts_that_give_much():
    model = tiny_model("llama")
    x = random(400, 48)
    mlp = mlp_of(model, 0)
    errors = {}
    for name in ("fitted", "fixed"):
        layer = to_experts(mlp, 8, 3)
        if name == "fitted":
            fit_router(layer, x[:300])
        else:
            layer.router = FixedRouter(8, [0, 1, 2])
        whole = model.model.layers[0].mlp(x[300:])
        errors[name] = float((layer(x[300:]) - whole).norm() / whole.norm())
    assert errors["fitted"] < errors["fixed"] - 0.03
    with pytest.raises(ModelError, match="SparsityRouter; allowed: TopKRouter"):
        fit_router(to_experts(mlp, 8, 3, SparsityRouter(8, 3, weighted=False)), x)


@pytest.mark.parametrize("gates", [None, [[0.5, 2.0]] * 3])
def test_some_experts_are_a_small_ffn(gates):
    model, experts = tiny_model("llama"), [[0, 5], [2, 1], [7, 3]]
    layers = [to_experts(mlp_of(model, number), 8, 2) for number in range(3)]
    small = as_small_ffn(layers, experts, gates)
    small.check(3, 48)
    assert small.units == 20
    x = random(6, 48)
    for number, layer in enumerate(layers):
        kept = restricted(layer, experts[number])
        if gates is not None:
            kept.router = FixedRouter(8, experts[number], gates[number])
        torch.testing.assert_close(small.double().apply_layer(number, x), kept(x), **EXACT)


class Chosen(torch.nn.Module):
    """Nothing, some experts or the whole layer, as a Plan says of each token."""

    def __init__(self, some: torch.nn.Module, whole: torch.nn.Module, plan: torch.Tensor):
        super().__init__()
        self.some, self.whole, self.plan = some, whole, plan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plan = self.plan[:, None]
        return (plan == 1) * self.some(x) + (plan == 2) * self.whole(x)


@torch.no_grad()
def test_a_plan_chooses_between_some_experts_and_the_whole_layer():
    model, ids = tiny_model("llama"), tokens(40)
    experts = [[0, 5], [2, 1], [7, 3]]
    layers = [to_experts(mlp_of(model, number), 8, 2) for number in range(3)]
    shape = shape_of(model)
    choices = np.random.default_rng(0).integers(0, 3, (40, 3)).astype(np.int32)
    plan = Plan.rest(shape, 40).with_fields(ffn=choices)
    method = Replay(plan, StandIns(ffn=as_small_ffn(layers, experts).double()))
    with attach(model, method):
        reference = model(ids).logits[0]
    engine = Engine.from_model(model)
    (executed,) = engine.forward([(engine.start(method), ids[0].tolist())], logits="all")
    for number, layer in enumerate(model.model.layers):
        some = restricted(layers[number], experts[number])
        layer.mlp = Chosen(some, layer.mlp, torch.from_numpy(choices[:, number]))
    whole = model(ids).logits[0]
    torch.testing.assert_close(reference, whole, **EXACT)
    torch.testing.assert_close(executed, whole, **ENGINE)


@pytest.mark.parametrize(
    ("make", "error", "line"),
    [
        (lambda m: mlp_of(m, 3), ModelError, "layer is 3; allowed: 0 to 2"),
        (lambda m: to_experts(mlp_of(m, 0), 7, 2), ValueError, "n_experts is 7; allowed: divisors"),
        (lambda m: to_experts(mlp_of(m, 0), 8, 2, split="k"), ValueError, "split is 'k'; allowed"),
        (
            lambda m: as_small_ffn([to_experts(mlp_of(m, 0), 8, 2)], [[8]]),
            ValueError,
            "expert is 8; allowed: 0 to 7",
        ),
        (
            lambda m: as_small_ffn([to_experts(mlp_of(m, i), 8, 2) for i in (0, 1)], [[0], [1, 2]]),
            ValueError,
            r"their experts \[10, 20\] units",
        ),
        (
            lambda m: mlp_of(tiny_model("gpt_neox_parallel"), 0),
            ModelError,
            "has biases; allowed: FFNs without",
        ),
    ],
)
def test_conversions_are_checked(make, error, line):
    with pytest.raises(error, match=line):
        make(tiny_model("llama"))


# Features -----------------------------------------------------------------------------------------


def test_neurons_are_what_the_output_projection_is_given():
    model, ids = tiny_model("gemma3"), tokens(9, batch=2)
    given = []
    module = model.model.layers[1].mlp.down_proj
    handle = module.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    found = activations(Neurons(model, 1), ids, batch=1)
    torch.testing.assert_close(found, given[0].flatten(0, 1), **EXACT)
    with pytest.raises(ModelError, match="layer is 5; allowed: 0 to 2"):
        Neurons(model, 5)
    with pytest.raises(DataError, match=r"texts have shape \(9,\)"):
        activations(Neurons(model, 1), ids[0])


def test_neurons_of_experts_give_what_the_layer_gives():
    model = new_experts_decoder(DECODER, EXPERTS, "sparsity", 0)
    ids = torch.randint(0, 40, (3, 10))
    found = activations(Neurons(model, 1), ids)
    ffn = expert_layers(model)[1]
    given = vectors(model, 1, "ffn", ids)
    torch.testing.assert_close(found @ ffn.as_wide_mlp().ffn_out, given, **NEAR)
    assert found.shape == (30, EXPERTS.all_units)


def test_a_probe_reads_what_is_linear():
    model = new_experts_decoder(DECODER, EXPERTS, "top-k", 0)
    ids = torch.randint(0, 40, (20, 10), generator=torch.Generator().manual_seed(0))
    x = vectors(model, 0, "residual", ids)
    held = x @ torch.randn(16, 3, generator=torch.Generator().manual_seed(1)) > 0
    probe = Probe(model, 0, "residual", *regression(x, held))
    found = activations(probe, ids)
    assert ((found > 0.5) == held).float().mean() > 0.9
    assert found.min() == 0


def test_inputs_tell_the_newest_tokens():
    ids = torch.tensor([[3, 1, 2]])
    found = activations(Inputs(5, 16), ids)
    assert found.shape == (3, 2 * 5 + 2 * 2)
    assert found[2, :10].nonzero().flatten().tolist() == [2, 5 + 1]
    assert found[0, 5:10].sum() == 0


def test_an_autoencoder_finds_directions_and_is_resumed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 16, generator=generator), dim=1)
    active = torch.rand(3000, 12, generator=generator) < 0.15
    x = (active * (1 + torch.rand(3000, 12, generator=generator))) @ directions
    recipe = Recipe(steps=150, learning_rate=6e-3, weight_decay=0.0)
    sizes = (16, 48, 4)
    missed = fit_autoencoder(Autoencoder(*sizes), x, recipe, tmp_path, batch=256)
    assert missed < 0.2
    again = Autoencoder(*sizes)
    assert fit_autoencoder(again, x, recipe, tmp_path, batch=256) == pytest.approx(missed, abs=1e-6)
    assert ((again.encode(x) > 0).sum(1) <= 4).all()
    with pytest.raises(VesicleError, match="another recipe"):
        fit_autoencoder(Autoencoder(*sizes), x, replace(recipe, steps=3), tmp_path, batch=256)
    with pytest.raises(ValueError, match="n_active is 9 of 8 features"):
        Autoencoder(4, 8, 9)


def test_a_reconstruction_takes_the_place_of_a_layer():
    model = new_experts_decoder(DECODER, EXPERTS, "top-k", 0)
    ids = torch.randint(0, 40, (2, 10))
    for site in ("residual", "ffn"):
        reader = Dictionary(model, 0, Autoencoder(16, 32, 4), site)
        assert activations(reader, ids).shape == (20, 32)
        with torch.no_grad():
            before = token_losses(model, ids)
            with reader.replacing():
                inside = token_losses(model, ids)
            torch.testing.assert_close(token_losses(model, ids), before, rtol=0, atol=0)
        assert (inside - before).abs().max() > 1e-5
    with pytest.raises(ValueError, match="site is 'head'; allowed: residual, ffn"):
        Dictionary(model, 0, Autoencoder(16, 32, 4), "head")


# Coverage -----------------------------------------------------------------------------------------


def made_up(n_items: int = 20, tokens_each: int = 40) -> tuple[torch.Tensor, Properties]:
    """Features, and two properties: a threshold of the first, and a coin."""
    generator = torch.Generator().manual_seed(0)
    n = n_items * tokens_each
    features = torch.rand(n, 6, generator=generator)
    features[:, 0] = torch.where(features[:, 0] < 0.6, 0.2, 0.9)
    coin = torch.rand(n, generator=generator) < 0.3
    return features, Properties(
        names=("known", "coin"),
        values=torch.stack([features[:, 0] > 0.5, coin], 1),
        items=torch.arange(n_items).repeat_interleave(tokens_each),
        n_items=n_items,
    )


def test_a_threshold_of_one_feature_is_found_and_a_coin_is_not():
    features, properties = made_up()
    found = find(features, properties)
    f1 = f1_of(found.counts.sum(0))
    assert float(f1[0]) == 1
    assert int(found.feature[0]) == 0
    always = f1_of(always_counts(properties).sum(0))
    assert f1[1] < always[1] + 0.05
    assert found.coverage == pytest.approx(float(f1.mean()))
    assert found.counts.shape == (10, 2, 3)
    # Only "known" has a precise classifier, so where it holds without the coin all is right.
    assert 0.3 < float(found.reconstruction.mean()) < 0.5


def test_the_best_of_many_is_lucky_where_it_was_chosen():
    _, properties = made_up()
    noise = torch.rand(800, 500, generator=torch.Generator().manual_seed(1))
    found = find(noise, properties)
    judged = f1_of(found.counts.sum(0))
    assert float(found.published.mean()) > float(judged.mean()) + 0.01


def test_properties_are_checked():
    _, properties = made_up()
    assert properties.frequent(20, most=0.35).names == ("coin",)
    with pytest.raises(DataError, match="no property holds for 900 tokens"):
        properties.frequent(900)
    with pytest.raises(DataError, match="features are of 3 tokens; allowed: 800"):
        find(torch.zeros(3, 2), properties)
    with pytest.raises(DataError, match="1 names"):
        replace(properties, names=("one",))


def test_differences_are_paired_and_seeds_are_told():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    difference = of_means([values + 0.01, values]) - of_means([values, values])
    low, high = difference.interval
    assert low == pytest.approx(0.005, abs=1e-6)
    assert high == pytest.approx(0.005, abs=1e-6)
    assert difference.by_seed == pytest.approx((0.01, 0.0), abs=1e-6)
    assert difference.verdict(1) == "holds"
    assert difference.verdict(-1) == "does not hold"
    assert of_means([values - values.mean()]).verdict(1) == "not told apart from 0"
    features, properties = made_up()
    found = find(features, properties)
    estimate = of_counts([found.counts])
    assert estimate.mean == pytest.approx(found.coverage)
    assert estimate.interval[0] < estimate.mean < estimate.interval[1]


# Games and texts ----------------------------------------------------------------------------------

chess = pytest.importorskip("chess", reason="games need python-chess: pip install 'vesicle[chess]'")


@pytest.fixture(scope="module")
def games(tmp_path_factory) -> list[str]:
    return chess_games.load_games(
        tmp_path_factory.mktemp("games"), 6, chess_games.Play(plies=20), seed=3
    )


def test_games_are_legal_seeded_and_kept(games, tmp_path):
    for game in games:
        board = chess.Board()
        for move in game.split():
            assert board.piece_at(chess.parse_square(move[1:3])).symbol().upper() == move[0]
            queened = chess.Move.from_uci(move[1:] + "q")
            board.push(queened if board.is_legal(queened) else board.parse_uci(move[1:]))
    assert len(set(games)) == 6
    play = chess_games.Play(plies=20)
    assert chess_games.load_games(tmp_path, 2, play, 3) == games[:2]
    assert chess_games.load_games(tmp_path, 6, play, 3) == games
    with pytest.raises(DataError, match="another seed or play"):
        chess_games.load_games(tmp_path, 2, play, 4)


def test_a_careful_player_gives_less_away_than_chance():
    values = (0, 1, 3, 3, 5, 9, 0)

    def given_away(careless: float) -> float:
        """Share of half-moves to attacked squares that take less than they put there."""
        found = []
        for number in range(8):
            board = chess.Board()
            play = chess_games.Play(careless=careless, plies=30)
            for text in chess_games.play_game(play, 0, number).split():
                move = chess.Move.from_uci(text[1:])
                taken = board.piece_type_at(move.to_square) or 0
                mover = board.piece_type_at(move.from_square)
                attacked = board.is_attacked_by(not board.turn, move.to_square)
                found.append(attacked and values[taken] < values[mover])
                board.push(move)
        return float(np.mean(found))

    assert given_away(0.0) < 0.5 * given_away(1.0)


def test_tokens_come_back_as_text(games):
    ids, own = chess_games.texts(games, 45)
    assert ids.shape == own.shape == (6, 45)
    assert ids[0, 0] == chess_games.START
    assert [chess_games.text_of(row) for row in ids.tolist()] == games
    assert own[0].sum() == 2 + 2 * len(games[0].split())  # the start, and one end
    for bad in ("Pe9e4", "e2e4", "Xe2e4", "Pe2e4q"):
        with pytest.raises(DataError, match=f"move is '{bad}'; allowed: a piece and two squares"):
            chess_games.tokens_of(f"Pe2e4 {bad}")


def test_boards_follow_from_moves():
    fools_mate = "Pf2f3 Pe7e5 Pg2g4 Qd8h4"
    replay = chess_games.replay(fools_mate)
    assert replay.flags[-1, chess_games.FLAGS.index("check")]
    assert replay.pieces[-1, chess.H4] == 11  # the black queen
    assert replay.pieces[-1, chess.D8] == 0
    assert replay.legal[0].sum() == 10  # two knights, eight pawns
    allowed = replay.legal[1].nonzero()[0].tolist()
    assert allowed == [chess_games.GOAL + square for square in (chess.F3, chess.F4)]
    # What is played is legal, at its place in the tokens.
    ids = chess_games.tokens_of(fools_mate)[1:]
    assert replay.legal[range(8), ids].all()
    with pytest.raises(DataError, match="half-move 2 of a game is 'Pe2e4', which is not legal"):
        chess_games.replay("Pe2e4 Pe2e4")


def test_properties_stand_after_the_moves(games):
    properties, where = board_properties(games, 41)
    assert len(properties.names) == 768 + len(chess_games.FLAGS)
    assert int(where.sum()) == len(properties.values)
    first = properties.values[0]
    named = {n for n, held in zip(properties.names, first.tolist(), strict=True) if held}
    assert {"white king on e1", "black queen on d8", "black may castle long"} <= named
    assert "white to move" not in named
    assert len([n for n in named if " on " in n]) == 32


def test_surfaces_of_a_text():
    pieces = ["He", " said", ' "', "no", '"', ",", " (", "3", ")", ".", " Then", " he", " said"]
    properties = surface_properties([pieces, pieces])

    def where(name: str) -> list[int]:
        column = properties.values[: len(pieces), properties.names.index(name)]
        return column.nonzero().flatten().tolist()

    assert where("inside quotation marks") == [2, 3]
    assert where("inside parentheses") == [6, 7]
    assert where("first word of a sentence") == [0, 10]
    assert where("after a comma") == [6, 7, 8]
    assert where("word seen before") == [12]
    assert where("digit") == [7]


# The comparison -----------------------------------------------------------------------------------


def test_training_is_resumed(tmp_path):
    class Cut(Exception):
        pass

    def run(folder: Path, cut: int | None = None) -> dict[str, torch.Tensor]:
        model = new_experts_decoder(DECODER, EXPERTS, "sparsity", 0)
        ids = torch.randint(0, 40, (20, 16), generator=torch.Generator().manual_seed(0))
        own = torch.ones_like(ids, dtype=torch.bool)
        loss_at = training_loss(model, ids, own, batch=4, seed=0, balance=0.1)

        def show(step: int, loss: float) -> None:
            if step == cut:
                raise Cut

        recipe = Recipe(steps=8, checkpoint_every=3)
        try:
            fit(model, loss_at, recipe, folder, show=show)
        except Cut:
            return run(folder)
        return dict(model.named_parameters())

    whole, parts = run(tmp_path / "whole"), run(tmp_path / "parts", cut=5)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_the_balance_loss_evens_out_experts(tmp_path):
    ids = torch.randint(0, 40, (64, 16), generator=torch.Generator().manual_seed(0))
    own = torch.ones_like(ids, dtype=torch.bool)
    found = {}
    for balance in (0.0, 1.0):
        model = new_experts_decoder(DECODER, EXPERTS, "top-k", 0)
        with torch.no_grad():
            for ffn in expert_layers(model):
                ffn.router.bias[0] = 3.0
        loss_at = training_loss(model, ids, own, batch=8, seed=0, balance=balance)
        fit(model, loss_at, Recipe(steps=20, learning_rate=4e-2), tmp_path / str(balance))
        with torch.no_grad(), routings(model) as seen:
            model(ids)
        found[balance] = float(torch.stack([balance_loss(each) for each in seen]).mean())
    assert found[1.0] < found[0.0]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    small = settings_of("chess", "debug")
    claim(tmp_path, small, "texts")
    assert claim(tmp_path, small, "texts") == claim(tmp_path, small, "texts")
    with pytest.raises(VesicleError, match="whose steps is 6, not 9: use another folder"):
        claim(tmp_path, replace(small, steps=9), "texts")
    with pytest.raises(ValueError, match="layer is 7; allowed: 0 to 1"):
        replace(small, layer=7)
    with pytest.raises(ValueError, match="ffn is 33; allowed: multiples of n_active"):
        replace(small, ffn=33)
    with pytest.raises(ValueError, match="scale is 'huge'; allowed: debug, small"):
        settings_of("chess", "huge")
    with pytest.raises(VesicleError, match="seeds are 0; allowed: 1 and above"):
        run_comparison(tmp_path, small, 0)


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(command)
    return found


def test_the_command_compares_and_goes_on(app, tmp_path):
    out = tmp_path / "run"
    arguments = ["--out", str(out), "--seeds", "1", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["seeds"] == 1
    for name in ("dense", "wide", "top-k", "sparsity", "converted"):
        row = report["readers"][name]
        assert row["loss"]["low"] <= row["loss"]["mean"] <= row["loss"]["high"]
        assert 0 < row["active"] <= row["features"]
    assert report["readers"]["sparsity"]["features"] == 64
    assert report["readers"]["dense"]["features"] == 32
    assert (
        report["readers"]["untrained"]["loss"]["mean"] > report["readers"]["dense"]["loss"]["mean"]
    )
    assert {row["verdict"] for row in report["claims"]} <= {
        "holds",
        "does not hold",
        "not told apart from 0",
    }
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "://" not in html
    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout.splitlines()[-1]) == report
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    corpus, readers = readers_of(out, settings_of("chess", "debug"), 0)
    assert {name: reader.n_features for name, reader in readers.items()} == {
        name: report["readers"][name]["features"] for name in readers
    }
    features = activations(readers["converted"], corpus.judged)[corpus.where.flatten()]
    active = float((features != 0).sum(1).float().mean())
    assert active == pytest.approx(report["readers"]["converted"]["active"], abs=1e-3)
    gated = CliRunner().invoke(app, [*arguments, "--gated"])
    assert isinstance(gated.exception, VesicleError)
    assert "whose gated is False, not True" in str(gated.exception)


def test_the_command_compares_on_text(app, tmp_path):
    done = CliRunner().invoke(
        app,
        ["--task", "text", "--data", "sample", "--out", str(tmp_path), "--seeds", "1", "--gated"],
    )
    assert done.exit_code == 0, done.output
    assert "converted" in done.stdout
    assert "legal" not in json.loads((tmp_path / "report.json").read_text())["readers"]["dense"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--task", "text"], "--task text needs --data"),
        (["--data", "sample"], "--data is sample, but the games of --task chess are made"),
        (["--task", "text", "--data", "nowhere.txt"], "no data at nowhere.txt"),
        (["--task", "text", "--data", "SHORT"], "has 1 windows of 33 tokens; allowed: 22 and up"),
    ],
)
def test_bad_input_is_told_in_a_line(app, tmp_path, arguments, line):
    short = tmp_path / "short.txt"
    short.write_text("word " * 40)
    given = [str(short) if a == "SHORT" else a for a in arguments]
    done = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, VesicleError)
    assert re.search(re.escape(line), str(done.exception))


def test_without_python_chess_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "chess", None)
    with pytest.raises(VesicleError, match=r"pip install 'vesicle\[chess\]'"):
        chess_games.check_chess()
