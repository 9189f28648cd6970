"""The Local Interaction Basis: its laws, its controls, what is measured of them, the command."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from tests.tiny import tiny_model, tokens
from vesicle.commands import recipe
from vesicle.commands.neurons.basis import basis as command
from vesicle.errors import ModelError, VesicleError
from vesicle.neurons.basis import (
    Basis,
    BasisReport,
    Graph,
    LayerStudy,
    ModularAdder,
    ModularConfig,
    ModularStudy,
    activations,
    attributions,
    compare,
    edges,
    fewest,
    keep_edges,
    keep_features,
    largest,
    local_interaction,
    local_interaction_bases,
    moments,
    principal_components,
    random_rotation,
    residual_edges,
    sampled_jacobian,
    scaled_components,
    sparsity,
    squared_jacobian,
    study_layers,
    study_modular,
    svg,
    trained_adder,
    verdict,
)
from vesicle.neurons.basis.comparison import estimate
from vesicle.neurons.basis.residual import differentiable, logits_of, stream

EXACT = 1e-9
"""In float64; sums of a few hundred products."""
SINGLE = 2e-4
"""In float32, relative to the largest number."""


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def whitened(n: int, d: int, seed: int = 0) -> Tensor:
    """(n, d) points with mean 0 and covariance exactly the identity."""
    x = normal(n, d, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x / n)).mT


def net(seed: int = 0, widths: tuple[int, ...] = (6, 9, 5)) -> list[Callable[[Tensor], Tensor]]:
    """Layers of tanh with random weights."""
    weights = [normal(b, a, seed=seed + k) for k, (a, b) in enumerate(pairwise(widths))]
    return [lambda x, w=w: (x @ w.mT).tanh() for w in weights]


# What the basis is


def test_a_linear_network_with_a_known_basis_is_recovered_up_to_order_and_sign():
    d = 5
    true, out = rotation(d, 1), rotation(d, 2)
    strengths = torch.tensor([3.0, 0.5, 7.0, 1.0, 2.0], dtype=torch.float64)
    mixing = normal(d, d, seed=3)  # activations are correlated, and no feature is a component
    hidden = whitened(400, d)
    x = hidden @ mixing.mT
    # The next layer has strength times feature, on axes of its own.
    to_features = strengths[:, None] * true @ torch.linalg.inv(mixing)
    section = lambda x: x @ to_features.mT @ out.mT  # noqa: E731
    (own, target) = local_interaction_bases([section], x)
    order = strengths.argsort(descending=True)
    expected = (hidden @ true.mT * strengths)[:, order]
    found = own.features(x)
    signs = (found * expected).sum(0).sign()
    torch.testing.assert_close(found * signs, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(own.importance, strengths[order].square(), rtol=1e-9, atol=0)
    # Then each feature acts on one feature alone, which no basis of components would do.
    of = edges(section, x, own, target)
    torch.testing.assert_close(of, of.diagonal().diag(), rtol=0, atol=1e-8)
    components = edges(section, x, principal_components(moments(x)), target)
    assert (components - components.diagonal().diag()).abs().max() > 0.1


def test_features_are_uncorrelated_and_squared_jacobians_are_the_identity():
    sections = net()
    x = normal(300, 6) @ normal(6, 6, seed=9)
    bases = local_interaction_bases(sections, x)
    for section, at, own, target in zip(
        sections, activations(sections, x), bases, bases[1:], strict=False
    ):
        f = own.features(at)
        torch.testing.assert_close(f.mean(0), torch.zeros(own.n_features).double())
        torch.testing.assert_close(
            f.mT @ f / len(f), own.importance.diag(), rtol=0, atol=1e-8 * own.importance[0].item()
        )
        metric = squared_jacobian(section, at, target)
        seen = own.decode.mT @ metric @ own.decode
        torch.testing.assert_close(seen, torch.eye(own.n_features).double(), rtol=0, atol=1e-6)
        assert (own.importance.diff() <= 0).all()


def test_a_jacobian_is_that_of_autograd():
    section = net()[0]
    x = normal(7, 6)
    target = principal_components(moments(section(x)))
    jacobians = [target.encode @ torch.autograd.functional.jacobian(section, point) for point in x]
    expected = sum(j.mT @ j for j in jacobians) / len(x)
    torch.testing.assert_close(squared_jacobian(section, x, target), expected)


def test_random_cotangents_agree_with_all_jacobians_across_positions():
    mixing = normal(4, 4, seed=5).tril()  # each position reads those before it,
    mixing[:, 0] *= 3  # and the first one most
    weight = normal(3, 3, seed=6)
    section = lambda x: torch.einsum("ts,bsd->btd", mixing, (x @ weight.mT).tanh())  # noqa: E731
    x = normal(8, 4, 3)
    target = principal_components(moments(section(x)))
    exact = torch.zeros(3, 3).double()
    for window in x:
        whole = torch.autograd.functional.jacobian(lambda w: section(w[None])[0], window)
        whole = torch.einsum("kd,tdse->tkse", target.encode, whole)[1:, :, 1:]
        exact += torch.einsum("tkse,tksf->ef", whole, whole)
    exact /= 8 * 3
    generator = torch.Generator().manual_seed(0)
    found = sampled_jacobian(section, x, target, probes=500, generator=generator, skipped=1)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1 * exact.abs().max().item())
    other = sampled_jacobian(section, x, target, probes=500, generator=generator)
    assert (other - exact).abs().max() > 0.2 * exact.abs().max()  # the first position counts there


def test_what_has_no_effect_and_what_does_not_vary_is_dropped():
    x = torch.cat([normal(200, 3), 5 * normal(200, 2, seed=1), torch.full((200, 1), 4.0)], 1)
    section = lambda x: x[:, :3].tanh()  # noqa: E731
    own, _ = local_interaction_bases([section], x)
    assert own.n_features == 3
    # Two columns, the strongest for PCA, have no effect; one does not vary.
    assert own.encode[:, 5].abs().max() < EXACT
    changed = x.clone()
    changed[:, 3:5] += normal(200, 2, seed=2)
    same = section(own.restored(own.features(changed))) - section(changed)
    assert same.abs().max() < 1e-6
    assert principal_components(moments(x)).n_features == 5
    assert (principal_components(moments(x)).encode[0, 3:5].abs().max()) > 0.6
    with pytest.raises(ValueError, match="all the same"):
        principal_components(moments(torch.ones(4, 2)))
    with pytest.raises(ValueError, match="does not depend"):
        local_interaction(moments(x), torch.zeros(6, 6))


@pytest.mark.parametrize("kind", ["lib", "pca", "scaled", "random"])
def test_with_all_features_the_network_computes_the_same(kind: str):
    sections = net()
    x = normal(100, 6)
    own, target = _kinds(sections, x)[kind]
    out = sections[0](x)
    assert own.n_features == 6
    assert (own.restored(own.features(x)) - x).abs().max() < 1e-8
    torch.testing.assert_close(own.encode @ own.decode, torch.eye(6).double(), rtol=0, atol=1e-8)
    whole = keep_edges(sections[0], x, own, target, torch.ones(target.n_features, 6).bool())
    assert (whole - target.restored(target.features(out))).abs().max() < 1e-8
    # The fewer features, the more is lost in the end; and the first ones matter more than the last.
    few = keep_features(x, own, 2)
    assert (sections[0](few) - out).abs().max() > 0.1
    torch.testing.assert_close(own.features(few)[:, :2], own.features(x)[:, :2])
    assert own.features(few)[:, 2:].abs().max() < 1e-8


def test_a_random_rotation_keeps_the_space_and_its_variance():
    lib = local_interaction_bases(net(), normal(100, 6))[0]
    turned = random_rotation(lib, torch.Generator().manual_seed(3))
    x = normal(50, 6, seed=4)
    torch.testing.assert_close(
        turned.restored(turned.features(x)), lib.restored(lib.features(x)), rtol=0, atol=1e-8
    )
    torch.testing.assert_close(turned.importance.sum(), lib.importance.sum())
    assert turned.importance[0] < lib.importance[0]
    cosine = (turned.encode * lib.encode).sum(1) / (
        turned.encode.norm(dim=1) * lib.encode.norm(dim=1)
    )
    assert cosine.abs().max() < 0.999


# Edges


@pytest.mark.parametrize("kind", ["lib", "pca", "random"])
def test_attributions_sum_to_what_the_feature_is_less_what_it_is_at_the_mean(kind: str):
    sections = net()
    x = normal(40, 6)
    own, target = (b.first(4) for b in _kinds(sections, x)[kind])
    given = attributions(sections[0], x, own, target, parts=100)
    assert given.shape == (5, 40, 4)  # four features, and what the others give together
    section = sections[0]
    change = target.features(section(x)) - target.features(section(own.mean[None]))
    assert (given.sum(0) - change).abs().max() < 1e-3
    assert given[4].abs().max() > 0.01
    coarse = attributions(sections[0], x, own, target, parts=1)
    assert (coarse.sum(0) - change).abs().max() > 1e-3
    found = edges(section, x, own, target, parts=100, at_once=3)
    torch.testing.assert_close(found, given[:4].square().mean(1).mT)


def test_edges_do_not_depend_on_the_scale_of_the_source_and_follow_that_of_the_target():
    section = net()[0]
    x = normal(40, 6)
    own, target = _kinds(net(), x)["pca"]
    before = edges(section, x, own, target)
    scale = torch.tensor([0.1, 2.0, 3.0, 1.0, 5.0, 0.5]).double()
    other = Basis(
        mean=own.mean,
        encode=own.encode * scale[:, None],
        decode=own.decode / scale,
        importance=own.importance,
    )
    torch.testing.assert_close(edges(section, x, other, target), before)
    doubled = Basis(**{**target.tensors(), "encode": 2 * target.encode})
    torch.testing.assert_close(edges(section, x, own, doubled), 4 * before)


def test_attributions_across_positions_are_directional_derivatives():
    mixing = normal(4, 4, seed=5).tril()
    section = lambda x: torch.einsum("ts,...sd->...td", mixing, x.tanh())  # noqa: E731
    x = normal(2, 4, 3)
    own, target = principal_components(moments(x)), principal_components(moments(section(x)))
    given = attributions(section, x, own, target, columns=range(1, 2), skipped=1)[0]
    middle = x - (x - own.mean) * 0.5
    middle[:, 0] = x[:, 0]
    moved = own.features(x)[..., 1:2] * own.decode[:, 1]
    moved[:, 0] = 0
    h = 1e-5
    slope = (section(middle + h * moved) - section(middle - h * moved)) / (2 * h)
    torch.testing.assert_close(given, (slope @ target.encode.mT)[:, 1:], rtol=0, atol=1e-8)


def test_edges_of_what_a_layer_adds_are_those_without_its_input():
    weight = normal(6, 6)
    layer = lambda x: x + (x @ weight.mT).tanh()  # noqa: E731
    x = normal(8, 5, 6)
    own, target = principal_components(moments(x)), principal_components(moments(layer(x)))
    whole, added = residual_edges(layer, x, own, target, parts=3, skipped=1, at_once=4)
    torch.testing.assert_close(whole, edges(layer, x, own, target, parts=3, skipped=1))
    alone = edges(lambda x: layer(x) - x, x, own, target, parts=3, skipped=1)
    torch.testing.assert_close(added, alone)
    assert (whole - added).abs().max() > 0.1


# Measures


def test_sparsity_of_known_edges():
    even = sparsity(torch.ones(4, 5))
    assert (even.edges_95, even.edges_99, even.inputs_95) == (0.95, 1.0, 1.0)
    assert even.spread == pytest.approx(1)
    assert even.gini == pytest.approx(0)
    one = sparsity(torch.eye(4)[:1].repeat(1, 5))  # 5 of 20
    assert one.edges_95 == 0.25
    alone = torch.zeros(4, 5)
    alone[2, 3] = 7
    single = sparsity(alone)
    assert single.edges_99 == pytest.approx(1 / 20)
    assert single.inputs_95 == pytest.approx(1 / 5)
    assert single.spread == pytest.approx(1 / 20)
    assert single.gini == pytest.approx(1 - 1 / 20)
    with pytest.raises(ValueError, match="all edges are 0"):
        sparsity(torch.zeros(2, 2))


def test_sparsity_by_input_alone_ignores_scales_of_targets():
    made = normal(6, 8).square()
    scaled = made * torch.logspace(-3, 3, 6).double()[:, None]
    assert sparsity(scaled).inputs_95 == sparsity(made).inputs_95
    assert sparsity(scaled).edges_95 < sparsity(made).edges_95


def test_an_edge_is_dropped_for_one_feature_alone():
    sections = net()
    x = normal(30, 6)
    own, target = _kinds(sections, x)["lib"]
    mask = torch.ones(target.n_features, own.n_features).bool()
    mask[1, 0] = False
    found = target.features(keep_edges(sections[0], x, own, target, mask))
    whole = target.features(sections[0](x))
    without = own.features(x)
    without[:, 0] = 0
    expected = target.features(sections[0](own.restored(without)))
    torch.testing.assert_close(
        found[:, [0, *range(2, whole.shape[1])]], whole[:, [0, *range(2, whole.shape[1])]]
    )
    torch.testing.assert_close(found[:, 1], expected[:, 1])
    assert (found[:, 1] - whole[:, 1]).abs().max() > 0.1


def test_the_largest_edges_and_the_fewest():
    made = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    assert largest(made, 2).tolist() == [[False, True], [True, False]]
    assert not largest(made, 0).any()
    for needed in range(18):
        assert fewest(lambda n, needed=needed: float(n >= needed), 17, 1.0) == needed
    assert fewest(lambda n: 0.0, 17, 1.0) == 17


def test_comparisons_are_paired_and_survive_json(tmp_path: Path):
    values = {
        "lib": {"edges_95": [0.1, 0.3, 0.2], "gini": [0.9, 0.8, 0.9]},
        "pca": {"edges_95": [0.2, 0.4, 0.3], "gini": [0.7, 0.6, 0.7]},
        "pca-scaled": {"edges_95": [0.05, 0.2, 0.1], "gini": [0.9, 0.8, 0.9]},
        "random": {"edges_95": [0.1, 0.4, 0.1], "gini": [0.95, 0.85, 0.95]},
    }
    made = compare(values, source="a", target="b", n_source=3, n_target=4)
    assert made.less["pca"]["edges_95"].low == pytest.approx(-0.1)  # each seed by itself
    report = BasisReport(
        subject="modular", unit="seed", settings={"n": 1}, facts={}, compared=(made,)
    )
    assert report.verdicts() == {"a to b": {"edges_95": "sparser", "gini": "sparser"}}
    assert report.verdicts("pca-scaled")["a to b"] == {
        "edges_95": "denser",
        "gini": "not told apart",
    }
    assert report.verdicts("random")["a to b"] == {"edges_95": "not told apart", "gini": "denser"}
    report.save(tmp_path / "report.json")
    assert BasisReport.load(tmp_path / "report.json") == report
    assert verdict("gini", estimate([0.0, 0.0])) == "not told apart"


def test_a_drawing_holds_the_first_features_and_the_largest_edges():
    importance = torch.linspace(5, 1, 40)
    table = torch.zeros(40, 40)
    table[0, 1], table[2, 2], table[39, 39] = 4.0, 1.0, 9.0
    graph = Graph.of(("a < b", "c"), [importance, importance], [table], most=10)
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    drawn = svg(graph, "<graph>")
    assert drawn.count("<circle") == 20
    assert drawn.count("<line") == 2  # the third is of features that are not drawn
    assert "feature 1 to feature 0: 4" in drawn
    assert "a &lt; b" in drawn
    assert "&lt;graph&gt;" in drawn


# Networks for modular addition


def test_a_network_is_trained_once_and_finds_the_rule(tmp_path: Path):
    config = ModularConfig(modulus=5, width=24, steps=150, train_share=0.7)
    network, held_out = trained_adder(config, 0, tmp_path)
    assert len(held_out) == 8
    again, _ = trained_adder(config, 0, tmp_path)
    pairs = torch.tensor([[1, 4], [2, 2]])
    torch.testing.assert_close(network(pairs), again(pairs))
    assert network(pairs).sum(-1).abs().max() < 1e-4
    # Addition commutes, and so does the network, by construction.
    torch.testing.assert_close(network(pairs), network(pairs.flip(1)))
    with pytest.raises(VesicleError, match="another"):
        trained_adder(ModularConfig(modulus=5, width=24, steps=151, train_share=0.7), 0, tmp_path)
    assert ModularAdder(5, 24, 0)(pairs).ne(ModularAdder(5, 24, 1)(pairs)).any()


SMALL = ModularStudy(
    config=ModularConfig(modulus=5, width=16, steps=40, train_share=0.6), seeds=2, pairs=20, parts=2
)


def test_a_study_of_networks_is_gone_on_with(tmp_path: Path):
    said: list[tuple[int, str]] = []
    report, graphs = study_modular(SMALL, tmp_path, lambda n, note: said.append((n, note)))
    assert [n for n, _ in said] == sorted(n for n, _ in said)
    assert [pair.target for pair in report.compared] == ["hidden units", "logits"]
    assert set(report.compared[0].bases) == {"lib", "pca", "pca-scaled", "random"}
    assert set(report.compared[0].bases["lib"]) > {"edges_95", "edges_needed", "features_needed"}
    assert set(graphs) == {"lib", "pca"}
    said.clear()
    assert study_modular(SMALL, tmp_path, lambda n, note: said.append((n, note)))[0] == report
    assert not said  # nothing is done again
    with pytest.raises(VesicleError, match="another pairs"):
        study_modular(ModularStudy(config=SMALL.config, pairs=21, parts=2), tmp_path)


# A language model


def test_layers_as_functions_give_what_the_model_gives():
    for name in ("llama", "gemma3", "gpt_neox_parallel"):
        model = tiny_model(name)
        ids = tokens(7, batch=2)
        with differentiable(model):
            one = stream(model, ids, 1, logits_of(model))
            assert len(one.layers) == 4  # layers 1 and 2, the final norm's input, the logits
            for section, x, y in zip(one.sections, one.layers, one.layers[1:], strict=False):
                torch.testing.assert_close(section(x), y, rtol=0, atol=1e-6)
            if name == "gemma3":
                continue  # its logits are capped
            logits = model(ids).logits
        centred = logits - logits.mean(-1, keepdim=True)
        # In D coordinates they have the same products with each other.
        found = one.layers[-1].flatten(0, 1)
        torch.testing.assert_close(
            found @ found.mT,
            centred.flatten(0, 1) @ centred.flatten(0, 1).mT,
            rtol=1e-4,
            atol=1e-3,
        )


TINY = LayerStudy(layer=1, windows=6, held_out=2, probes=3)


def test_a_study_of_layers_is_gone_on_with_and_leaves_the_model(tmp_path: Path):
    model = tiny_model("llama", dtype=torch.float32)
    ids = tokens(12, batch=8)  # the six of them that bases come from have 66 positions
    before = model(ids).logits
    said: list[str] = []
    report, graphs = study_layers(
        model, ids, TINY, tmp_path, name="tiny", show=lambda n, note: said.append(note)
    )
    assert torch.equal(model(ids).logits, before)
    pair, added = report.compared
    assert (pair.source, pair.target) == ("layer 1", "layer 2")
    assert added.target == "what layer 1 adds"
    assert added.bases["lib"] != pair.bases["lib"]
    assert pair.n_source == pair.n_target == 48
    assert len(pair.bases["random"]["gini"].values) == 2
    assert graphs["lib"].layers == ("layer 1", "layer 2")
    losses = report.facts["losses"]
    assert losses["counts"][-1] == pair.n_source
    for rise in losses["rise"].values():
        assert abs(rise[-1]["mean"]) < SINGLE * losses["whole"]["mean"]
        assert abs(rise[0]["mean"]) > 0.01
    # What was done is read, and gives the same.
    (tmp_path / "edges" / "pca.safetensors").unlink()
    (tmp_path / "bases" / "1.safetensors").unlink()
    said.clear()
    again, _ = study_layers(
        model, ids, TINY, tmp_path, name="tiny", show=lambda n, note: said.append(note)
    )
    assert again == report
    assert "edges, pca" in said
    assert "edges, lib" not in said
    with pytest.raises(VesicleError, match="another probes"):
        study_layers(model, ids, LayerStudy(layer=1, windows=6, held_out=2), tmp_path, name="tiny")


def test_studies_refuse_what_they_cannot_do(tmp_path: Path):
    model = tiny_model("llama", dtype=torch.float32)
    ids = tokens(12, batch=6)
    for study, words in (
        (LayerStudy(layer=2, windows=3, held_out=2), "layer is 2; allowed: 0 to 1"),
        (LayerStudy(layer=1, windows=5, held_out=2), "6 windows; allowed: 7 and more"),
    ):
        with pytest.raises(VesicleError, match=re.escape(words)):
            study_layers(model, ids, study, tmp_path, name="tiny")
    with pytest.raises(ModelError, match="bfloat16; allowed: float32"):
        study_layers(model.bfloat16(), tokens(12, batch=8), TINY, tmp_path, name="tiny")
    for wrong in ({"windows": 0}, {"probes": 0}, {"features": 1}, {"layer": -1}):
        with pytest.raises(VesicleError, match="allowed"):
            LayerStudy(**{"layer": 1, **wrong})
    for wrong in ({"modulus": 2}, {"width": 0}, {"steps": 0}, {"train_share": 1.0}):
        with pytest.raises(VesicleError, match="allowed"):
            ModularConfig(**wrong)
    with pytest.raises(VesicleError, match="seeds is 0"):
        ModularStudy(seeds=0)


# The command


def run(*words: str) -> Any:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_the_command_writes_a_report(tmp_path: Path):
    words = ["modular", "--modulus", "5", "--steps", "30", "--seeds", "1", "--pairs", "9"]
    done = run(*words, "--parts", "1", "--out", str(tmp_path / "out"), "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    assert printed["settings"]["config"]["modulus"] == 5
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "Gini coefficient" in page
    assert "<script" not in page
    assert (tmp_path / "out" / "graph-pca.svg").read_text().startswith("<svg")
    again = run(*words, "--parts", "1", "--out", str(tmp_path / "out"))
    assert again.exit_code == 0, again.output
    assert "embeddings to hidden units" in again.stdout


def test_the_command_on_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama", dtype=torch.float32)
    ids = tokens(10, batch=9)

    def loaded(spec: str | None, revision: str | None) -> recipe.Subject:
        text: Any = None  # windows are given, so nothing is encoded
        return recipe.Subject(model=model, text=text, name="tiny")

    monkeypatch.setattr(recipe, "load_subject", loaded)
    monkeypatch.setattr(recipe, "read_windows", lambda *given: ids)
    words = ["model", "--layers", "0,1", "--data", "text.txt", "--windows", "3", "--held-out", "2"]
    words += ["--probes", "2", "--features", "6", "--length", "10", "--out", str(tmp_path / "out")]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "layer 0 to layer 1, 6 and 6 features" in done.stdout
    assert "layer 0 to what layer 0 adds" in done.stdout
    assert "Loss with the first features" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model", "--layers", "3,5", "--data", "a"], "--layers is '3,5'"),
        (["model", "--layers", "x", "--data", "a"], "--layers is 'x'"),
        (["model"], "--data is missing"),
        (["model", "--data", "a", "--features", "1"], "features is 1"),
        (["modular", "--modulus", "2"], "modulus is 2"),
        (["modular", "--seeds", "0"], "seeds is 0"),
        (["modular", "--parts", "0"], "parts is 0"),
    ],
)
def test_bad_input_is_told_in_one_line(words: list[str], told: str, tmp_path: Path):
    done = run(*words, "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, VesicleError)
    assert told in str(done.exception)
    assert "\n" not in str(done.exception)


def _kinds(sections: list[Callable[[Tensor], Tensor]], x: Tensor) -> dict[str, tuple[Basis, Basis]]:
    """Bases of the first two layers of a network."""
    lib = local_interaction_bases(sections, x)
    components = [principal_components(moments(a)) for a in activations(sections, x)]
    metric = squared_jacobian(sections[0], x, lib[1])
    generator = torch.Generator().manual_seed(1)
    return {
        "lib": (lib[0], lib[1]),
        "pca": (components[0], components[1]),
        "scaled": (scaled_components(components[0], metric), lib[1]),
        "random": (random_rotation(lib[0], generator), random_rotation(lib[1], generator)),
    }
