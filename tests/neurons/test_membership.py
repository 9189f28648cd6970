"""Membership inference: its parts by their definitions, and a decoder that has learnt by heart."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from tests.tiny import CONFIGS, tiny_model, tokens
from vesicle.commands.neurons.membership import membership
from vesicle.engine import Engine
from vesicle.errors import BudgetError, DataError, ModelError, VesicleError
from vesicle.models import Text
from vesicle.neurons.membership import (
    AGGREGATIONS,
    ATTACKS,
    NORMALISATIONS,
    PUBLISHED,
    Attacked,
    ExperimentSettings,
    KnownDocuments,
    Precision,
    TokenProbabilities,
    Training,
    attack_scores,
    attacked_of,
    auc,
    bag_of_words_scores,
    chance,
    difference,
    estimate,
    features,
    fold_aucs,
    infer_membership,
    infer_unknown,
    learnt_scores,
    lowered,
    new_folds,
    other_splits,
    out_of_fold,
    prepare,
    read_documents,
    reading,
    reading_by_engine,
    run_experiment,
    settings_of,
    threshold_scores,
    token_probabilities,
    train_decoder,
)
from vesicle.neurons.membership.features import bin_edges, histograms, rarity, token_values
from vesicle.neurons.membership.own_model import lead_of
from vesicle.neurons.membership.probabilities import windows_of
from vesicle.scratch import DecoderSize, learn_tokenizer, new_decoder

SIZE = DecoderSize(
    vocabulary=300, width=32, n_layers=2, n_heads=2, n_kv_heads=1, ffn=64, context=48
)
FP32_NATS = 1e-4
"""Log-probabilities in fp32, batched or not: sums of some hundred numbers round differently."""


def some_texts(n: int, n_words: int = 40, seed: int = 0) -> list[str]:
    """Documents of words that are drawn at random: what is known of one, is known by heart."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghij"))
    words = ["".join(rng.choice(letters, rng.integers(2, 6))) for _ in range(150)]
    return [" ".join(rng.choice(words, n_words)) for _ in range(n)]


def settings(**changes) -> ExperimentSettings:
    attacked = Attacked(window=24, folds=3, bins=12, shortest=20, longest=90, lengths=(12,))
    given = {
        "documents": 24,
        "sizes": {"narrow": SIZE},
        "batch": 8,
        "epochs": 1,
        "seeds": 1,
        "attacked": attacked,
        **changes,
    }
    return ExperimentSettings(**given)


LEARNT_BY_HEART = settings(documents=48, epochs=60, learning_rate=5e-3)


def made_up(lengths, *, vocabulary: int = 11, groups=None, seed: int = 0) -> TokenProbabilities:
    """Predictions that no model made."""
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    groups = np.arange(len(lengths)) % 3 if groups is None else np.array(groups)
    log_top = -rng.exponential(0.5, n)
    return TokenProbabilities(
        tokens=rng.integers(0, vocabulary, n),
        log_p=log_top - rng.exponential(1.0, n) * (rng.random(n) < 0.7),
        log_top=log_top,
        lengths=np.array(lengths),
        groups=groups,
        general=rng.random((groups.max() + 1, vocabulary)) * 9,
    )


# AUC


def test_auc_of_perfect_reversed_and_equal_scores():
    labels = np.array([0, 0, 1, 1, 1], bool)
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert auc(scores, labels) == 1
    assert auc(-scores, labels) == 0
    assert auc(np.zeros(5), labels) == 0.5
    assert auc(np.array([1.0, 2, 2, 3, 3]), labels) == pytest.approx((6 - 0.5) / 6)
    with pytest.raises(ValueError, match="5 of 5 documents are members"):
        auc(scores, np.ones(5, bool))


def test_auc_is_the_share_of_pairs_and_of_no_monotone_map():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, 80).astype(float)
    labels = rng.random(80) < 0.4
    pairs = np.subtract.outer(scores[labels], scores[~labels])
    share = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert auc(scores, labels) == pytest.approx(share)
    for mapped in (np.exp(scores), scores**3 - 7, np.arctan(scores)):
        assert auc(mapped, labels) == pytest.approx(share)


def test_random_scores_are_at_half_within_their_interval():
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(600) < 300)
    folds = np.arange(600) % 5
    found = estimate(rng.random((3, 600)), np.tile(labels, (3, 1)), folds)
    assert found.low < 0.5 < found.high
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.12


def test_scores_of_different_folds_are_not_compared():
    labels = np.array([0, 1, 0, 1], bool)
    folds = np.array([0, 0, 1, 1])
    scores = np.array([10.0, 11.0, 0.0, 1.0])
    assert auc(scores, labels) == 0.75
    assert estimate(scores, labels, folds, draws=10).value == 1


def test_folds_that_a_draw_leaves_without_members_do_not_tell():
    labels = np.array([0, 1] * 4, bool)
    found = estimate(np.arange(8.0), labels, np.arange(8) // 2)  # of two documents a fold
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_a_difference_is_paired():
    rng = np.random.default_rng(2)
    labels = np.arange(200) % 2 == 0
    folds = (np.arange(200) // 2) % 4
    scores = rng.normal(size=200) + labels
    assert difference(scores, scores, labels, folds).row() == {"auc": 0, "low": 0, "high": 0}
    worse = scores + rng.normal(size=200)
    found = difference(scores, worse, labels, folds)
    apart = estimate(scores, labels, folds), estimate(worse, labels, folds)
    assert found.value == pytest.approx(apart[0].value - apart[1].value)
    assert found.high - found.low < sum(one.high - one.low for one in apart)


# Asking a model


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 15, 16, 40])
def test_every_token_but_the_first_is_predicted_once(n_tokens: int):
    predicted = [i for start, stop in windows_of(n_tokens, 8) for i in range(start + 1, stop)]
    assert predicted == list(range(1, n_tokens))


def test_probabilities_are_the_models_own():
    model, window = tiny_model("llama"), 9
    documents = [tokens(n, seed=n)[0].tolist() for n in (30, 4, 17)]
    with reading(model) as read:
        found = token_probabilities(read, documents, [0, 1, 0], window=window)
    log_p, log_top, general = [], [], np.zeros((2, model.config.vocab_size))
    for ids, group in zip(documents, (0, 1, 0), strict=True):
        for place in range(1, len(ids)):
            start = (place - 1) // (window - 1) * (window - 1)
            with torch.no_grad():
                shares = model(torch.tensor([ids[start:place]])).logits[0, -1].log_softmax(-1)
            log_p.append(float(shares[ids[place]]))
            log_top.append(float(shares.max()))
            general[group] += shares.exp().numpy()
    np.testing.assert_allclose(found.log_p, log_p, atol=FP32_NATS)
    np.testing.assert_allclose(found.log_top, log_top, atol=FP32_NATS)
    np.testing.assert_allclose(found.general, general, atol=1e-3)
    assert found.tokens.tolist() == [i for ids in documents for i in ids[1:]]
    assert found.general.sum() == pytest.approx(found.lengths.sum(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox_parallel"])
def test_features_do_not_depend_on_what_shares_a_pass(family: str):
    assert family in CONFIGS
    model = tiny_model(family)
    documents = [tokens(n, seed=n)[0].tolist() for n in (50, 5, 23, 31)]
    with reading(model) as read:
        whole = token_probabilities(read, documents, [0, 1, 2, 3], window=16)
        apart = [token_probabilities(read, [ids], [0], window=16) for ids in documents]
    np.testing.assert_allclose(
        whole.log_p, np.concatenate([one.log_p for one in apart]), atol=FP32_NATS
    )
    for row, one in zip(whole.general, apart, strict=True):
        np.testing.assert_allclose(row, one.general[0], atol=1e-3)
    table = features(whole, np.ones(4, bool), "none", "aggregate")
    for i, one in enumerate(apart):
        alone = features(one, np.ones(1, bool), "none", "aggregate")
        np.testing.assert_allclose(table[i], alone[0], atol=10 * FP32_NATS)


@pytest.mark.parametrize("precision", [Precision(), Precision(budget=0.8), Precision(bits=4)])
def test_the_engine_says_what_the_reference_says(precision: Precision):
    model = new_decoder(SIZE, 0).eval()
    documents = [list(range(1, 30)), list(range(40, 55))]
    method = lowered(precision, model, 12).method
    with reading(model, method) as read:
        ours = token_probabilities(read, documents, [0, 0], window=12)
    with reading_by_engine(Engine.from_model(model), method) as read:
        theirs = token_probabilities(read, documents, [0, 0], window=12)
    np.testing.assert_allclose(ours.log_p, theirs.log_p, atol=1e-3)


def test_part_of_a_document_is_its_beginning():
    model = tiny_model("llama")
    documents = [tokens(n, seed=n)[0].tolist() for n in (30, 5, 12)]
    with reading(model) as read:
        part = token_probabilities(read, documents, [0, 1, 0], window=9).first(11)
        cut = token_probabilities(read, [ids[:11] for ids in documents], [0, 1, 0], window=9)
    np.testing.assert_allclose(part.log_p, cut.log_p, atol=FP32_NATS)
    assert part.lengths.tolist() == cut.lengths.tolist() == [10, 4, 10]
    with pytest.raises(ValueError, match="n_tokens is 1"):
        part.first(1)


def test_what_was_asked_is_kept(tmp_path: Path):
    documents = [tokens(n, seed=n)[0].tolist() for n in range(5, 25)]
    with reading(tiny_model("llama")) as read:
        first = token_probabilities(read, documents, [0] * 20, window=9, keep=tmp_path)

    def unasked(ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked again")

    again = token_probabilities(unasked, documents, [0] * 20, window=9, keep=tmp_path)
    np.testing.assert_array_equal(again.log_p, first.log_p)
    np.testing.assert_array_equal(again.general, first.general)
    sorted(tmp_path.iterdir())[1].unlink()
    with pytest.raises(AssertionError, match="asked again"):
        token_probabilities(unasked, documents, [0] * 20, window=9, keep=tmp_path)


def test_a_lead_stands_before_every_window():
    seen = []

    def read(ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        return torch.zeros(*ids.shape, 50)

    found = token_probabilities(read, [[5, 6, 7, 8, 9]], [0], window=3, lead=[1, 2])
    assert sorted(seen) == [[1, 2, 5, 6, 7], [1, 2, 7, 8, 9]]
    np.testing.assert_allclose(found.log_p, -np.log(50), rtol=1e-6)


def test_bad_documents_and_models_are_refused():
    with pytest.raises(DataError, match="document 2 has 1 tokens; allowed: 2"):
        token_probabilities(torch.zeros_like, [[1, 2], [3]], [0, 0], window=4)
    with pytest.raises(DataError, match="no documents"):
        token_probabilities(torch.zeros_like, [], [], window=4)
    with pytest.raises(ValueError, match="window is 1"):
        token_probabilities(torch.zeros_like, [[1, 2]], [0], window=1)
    with pytest.raises(ModelError, match="not finite"):
        token_probabilities(
            lambda ids: torch.full((*ids.shape, 9), torch.nan), [[1, 2]], [0], window=4
        )


# Features


def test_normalisations_by_their_formulas():
    found = made_up([6, 9, 7])
    training = np.array([True, False, True])
    own = training[found.owners]
    counts = np.bincount(found.tokens[own], minlength=11) / own.sum()
    counts[counts == 0] = counts[counts > 0].min() / 2
    general = found.general[0] + found.general[2]
    general /= general.sum()
    p, top = np.exp(found.log_p), np.exp(found.log_top)
    expected = {
        "none": p,
        "ratio-tf": p / counts[found.tokens],
        "ratio-gp": p / general[found.tokens],
        "max-tf": (1 - (top - p)) / counts[found.tokens],
        "max-gp": (1 - (top - p)) / general[found.tokens],
    }
    assert tuple(expected) == NORMALISATIONS
    for name, value in expected.items():
        common = rarity(found, training, name)
        np.testing.assert_allclose(token_values(found, name, common), -np.log(value))


def test_aggregate_and_histogram_features():
    found = made_up([40, 25, 33])
    training = np.array([True, True, False])
    values = -found.log_p
    own = np.split(values, [40, 65])
    table = features(found, training, "none", "aggregate")
    assert table.shape == (3, 13)
    for row, some in zip(table, own, strict=True):
        np.testing.assert_allclose(row[:4], [some.min(), some.max(), some.mean(), some.std()])
        np.testing.assert_allclose(row[[6, 8]], np.percentile(some, [10, 50]))
    bins = features(found, training, "none", "histogram", bins=6)
    assert bins.shape == (3, 6)
    np.testing.assert_allclose(bins.sum(1), 1)
    edges = np.linspace(values[:65].min(), values[:65].max(), 7)
    np.testing.assert_allclose(bins[0], np.histogram(own[0], edges)[0] / 40)


def test_values_beyond_the_outer_bins_count_in_them():
    edges = bin_edges(np.array([0.0, 4.0]), 4)
    table = histograms(np.array([-9.0, 0.0, 4.0, 99.0]), np.array([0, 0, 1, 1]), 2, edges)
    assert table.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_features_are_fitted_to_training_documents_alone(normalisation: str, aggregation: str):
    found = made_up([20] * 6)
    training = found.groups != 2
    other = made_up([20] * 6, seed=5)
    held = ~training[found.owners]
    changed = replace(
        found,
        tokens=np.where(held, other.tokens, found.tokens),
        log_p=np.where(held, 3 * other.log_p, found.log_p),
        general=np.where(np.arange(3)[:, None] == 2, other.general * 50, found.general),
    )
    before = features(found, training, normalisation, aggregation, 9)
    after = features(changed, training, normalisation, aggregation, 9)
    np.testing.assert_array_equal(before[training], after[training])
    assert (before[~training] != after[~training]).any()


def test_unknown_names_and_divided_groups_are_refused():
    found = made_up([9, 9, 9])
    every = np.ones(3, bool)
    with pytest.raises(ValueError, match="normalisation is 'max'; allowed: none, ratio-tf"):
        features(found, every, "max", "aggregate")
    with pytest.raises(ValueError, match="aggregation is 'mean'; allowed: aggregate, histogram"):
        features(found, every, "none", "mean")
    with pytest.raises(ValueError, match="bins is 0"):
        features(found, every, "none", "histogram", 0)
    with pytest.raises(ValueError, match="whole groups"):
        features(made_up([9, 9], groups=[0, 0]), np.array([True, False]), "max-gp", "aggregate")


def test_thresholds():
    found = made_up([10, 5])
    texts = ["a text of some length", "aaaaaaaaaaaaaaaaaaaaa"]
    scores = threshold_scores(found, texts)
    np.testing.assert_allclose(scores["loss"], [found.log_p[:10].mean(), found.log_p[10:].mean()])
    np.testing.assert_allclose(scores["min-k"][0], np.sort(found.log_p[:10])[:2].mean())
    assert scores["zlib"][1] / scores["loss"][1] > 5 / 21  # it packs well


# The classifier


def test_the_classifier_is_at_the_minimum_of_its_loss():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(60, 5)) * [1, 10, 0.1, 1, 0] + 3
    labels = table[:, 0] + rng.normal(size=60) > 3
    fitted = Training(table).fit(labels)
    inputs = torch.tensor((table - table.mean(0)) / np.where(table.std(0) > 0, table.std(0), 1))
    weights = torch.tensor(fitted.weights, requires_grad=True)
    bias = torch.tensor(fitted.bias, requires_grad=True)
    margins = (inputs @ weights + bias) * torch.tensor(np.where(labels, 1.0, -1.0))
    loss = torch.nn.functional.softplus(-margins).sum() + 4 * (weights**2).sum() / 2
    loss.backward()
    assert weights.grad.abs().max() < 1e-5
    assert bias.grad.abs() < 1e-5
    assert fitted.weights[4] == 0  # it does not differ
    moved = Training(table * 7 - 2).fit(labels)
    np.testing.assert_allclose(moved.decide(table * 7 - 2), fitted.decide(table), atol=1e-6)


def test_more_features_than_documents_and_separable_labels():
    rng = np.random.default_rng(1)
    table = rng.normal(size=(20, 300))
    labels = np.arange(20) < 10
    scores = Training(table).fit(labels).decide(table)
    assert auc(scores, labels) == 1
    assert np.isfinite(scores).all()
    with pytest.raises(ValueError, match="same label"):
        Training(table).fit(np.ones(20, bool))


def test_no_document_is_judged_by_a_classifier_that_saw_it():
    rng = np.random.default_rng(2)
    table = rng.normal(size=(40, 3))
    labels = np.arange(40) % 2 == 0
    folds = new_folds(labels, 4, 0)
    masks = []

    def make(training: np.ndarray) -> np.ndarray:
        masks.append(training)
        return table

    before = out_of_fold(make, labels, folds)
    assert sum((~mask).astype(int) for mask in masks).tolist() == [1] * 40
    for fold in range(4):
        own = folds == fold
        flipped = np.where(own, ~labels, labels)
        after = out_of_fold(make, flipped, folds)
        np.testing.assert_array_equal(before[own], after[own])
        assert (before[~own] != after[~own]).any()


def test_several_sets_of_labels_are_as_one_by_one():
    rng = np.random.default_rng(3)
    table = rng.normal(size=(30, 4))
    labels = other_splits(np.arange(30) % 2 == 0, np.arange(30) // 10, 3)
    folds = np.arange(30) // 10
    whole = out_of_fold(lambda training: table, labels, folds)
    for own, truth in zip(whole, labels, strict=True):
        np.testing.assert_array_equal(own, out_of_fold(lambda training: table, truth, folds))


def test_folds_share_out_members_and_others():
    labels = np.arange(47) < 21
    folds = new_folds(labels, 5, 3)
    for some in (labels, ~labels):
        counts = np.bincount(folds[some], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert (folds != new_folds(labels, 5, 4)).any()
    with pytest.raises(ValueError, match="folds is 22; allowed: 2 to 21"):
        new_folds(labels, 22, 0)


def test_chance_is_what_splits_give_that_mean_nothing():
    labels = np.arange(60) % 2 == 0
    folds = (np.arange(60) // 2) % 3
    splits = other_splits(labels, folds, 200)
    assert (splits != labels).any(1).all()
    for fold in range(3):
        assert (splits[:, folds == fold].sum(1) == labels[folds == fold].sum()).all()
    scores = np.tile(np.random.default_rng(4).random(60), (200, 1))
    found = chance(np.array([fold_aucs(scores, splits, folds)]))
    assert found["mean"] == pytest.approx(0.5, abs=0.02)
    # Of 3 folds of 10 and 10: the spread of three rank sums.
    assert found["high"] - 0.5 == pytest.approx(1.96 * (21 / 1200 / 3) ** 0.5, rel=0.2)
    assert 0.5 - found["low"] == pytest.approx(found["high"] - 0.5)


def test_bag_of_words_finds_words_and_nothing_else():
    texts = some_texts(60)
    labels = np.arange(60) % 2 == 0
    folds = (np.arange(60) // 2) % 5
    era = "whilst upon thee thou hath shalt whence thither ere nay yonder betwixt".split()
    rng = np.random.default_rng(0)
    marked = [
        " ".join([text, *rng.choice(era, 6)]) if one else text
        for text, one in zip(texts, labels, strict=True)
    ]
    assert auc(bag_of_words_scores(marked, labels, folds), labels) > 0.95
    splits = other_splits(labels, folds, 30)
    by_chance = chance(
        np.array([fold_aucs(bag_of_words_scores(texts, splits, folds), splits, folds)])
    )
    assert by_chance["mean"] == pytest.approx(0.5, abs=0.05)
    alike = bag_of_words_scores(["the same"] * 60, labels, folds)
    assert estimate(alike, labels, folds, draws=5).value == 0.5


# Attacks


def test_all_attacks_score_all_documents():
    found = made_up([30] * 24)
    labels = np.arange(24) < 12
    scores = attack_scores(found, some_texts(24), labels, 8)
    assert tuple(scores) == ATTACKS
    assert PUBLISHED in scores
    assert all(own.shape == (24,) and np.isfinite(own).all() for own in scores.values())
    np.testing.assert_array_equal(
        scores[PUBLISHED], learnt_scores(found, np.tile(labels, (2, 1)), PUBLISHED, 8)[1]
    )


def test_unknown_documents_are_told_apart():
    known, unknown = made_up([40] * 30), made_up([40] * 10, groups=[0] * 10, seed=9)
    labels = np.arange(30) % 2 == 0
    rise = np.repeat(labels, 40)
    known = replace(known, log_p=np.where(rise, known.log_top, known.log_p - 1))
    rise = np.repeat(np.arange(10) < 5, 40)
    unknown = replace(unknown, log_p=np.where(rise, unknown.log_top, unknown.log_p - 1))
    chances = infer_unknown(known, labels, unknown, 10, "none/histogram")
    assert (chances[:5] > 0.5).all()
    assert (chances[5:] < 0.5).all()


# Precision


@pytest.mark.parametrize(
    ("precision", "name"),
    [(Precision(), "full"), (Precision(budget=0.75), "budget-0.75"), (Precision(bits=3), "bits-3")],
)
def test_precision_comes_to_what_it_says(precision: Precision, name: str):
    assert precision.name == name
    model = tiny_model("llama", dtype=torch.float32)
    found = lowered(precision, model, 32)
    assert found.flops_share == pytest.approx(precision.budget, rel=3e-3)
    assert (found.weight_share < 1) == (precision != Precision())
    documents = [tokens(32, seed=1)[0].tolist()]
    with reading(model) as read:
        full = token_probabilities(read, documents, [0], window=32)
    with reading(model, found.method) as read:
        low = token_probabilities(read, documents, [0], window=32)
    assert (np.abs(full.log_p - low.log_p).max() > 1e-3) == (precision != Precision())
    with reading(model) as read:  # and it is whole again
        again = token_probabilities(read, documents, [0], window=32)
    np.testing.assert_array_equal(again.log_p, full.log_p)


def test_precision_is_checked():
    with pytest.raises(BudgetError, match="budget is 0; allowed: above 0, up to 1"):
        Precision(budget=0)
    with pytest.raises(VesicleError, match="bits is 5; allowed: 16, 8, 4, 3, 2"):
        Precision(bits=5)
    with pytest.raises(VesicleError, match="one of them lowered"):
        Precision(budget=0.5, bits=4)
    with pytest.raises(BudgetError, match=r"0\.010 of dense cannot be reached"):
        lowered(Precision(budget=0.01), new_decoder(SIZE, 0), 16)


# Documents


def test_documents_are_read_once_each(tmp_path: Path):
    rows = [{"text": "one"}, {"article": "two", "highlights": "x"}, {"text": " "}, {"text": "one"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "b.txt").write_text("three\nlines\n")
    (tmp_path / "README.md").write_text("not read")
    assert read_documents(tmp_path) == ["one", "two", "three\nlines\n"]
    assert read_documents(tmp_path / "a.jsonl.gz") == ["one", "two"]
    assert len(read_documents("sample")) == 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "x"}', "line 2 has no document; allowed fields: text, article, document"),
        ('["text"]', "line 2 has no document"),
        ('{"text": 3}', "line 2: text is int; allowed: a text"),
        ('{"text": "\\ud800"}', "line 2 has half of a surrogate pair"),
        ("{", "line 2 is not JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_documents(path)


def test_no_documents(tmp_path: Path):
    with pytest.raises(DataError, match=r"no data at .*; allowed: a file that ends in"):
        read_documents(tmp_path / "none")
    with pytest.raises(DataError, match=r"has no file that ends in one of \.jsonl"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        read_documents(tmp_path)


def test_members_are_half_of_each_fold_and_differ_by_seed():
    given = settings()
    corpus = prepare(some_texts(60), given)
    assert len(corpus.ids) == 24
    first, second = corpus.members(0), corpus.members(1)
    for members in (first, second):
        assert [int(members[corpus.folds == f].sum()) for f in range(3)] == [4, 4, 4]
    assert 0 < (first & second).sum() < 12
    windows = corpus.training_windows(first, 40)
    read = windows.flatten().tolist()
    whole = [i for ids, one in zip(corpus.ids, first, strict=True) if one for i in [*ids, 0]]
    assert read == whole[: len(read)]
    assert len(whole) - len(read) < 40


def test_too_few_documents():
    with pytest.raises(DataError, match="3 of 3 documents have 20 tokens and more; 12 are needed"):
        prepare(some_texts(3), settings())
    with pytest.raises(VesicleError, match="documents is 9; allowed: 12"):
        settings(documents=9)
    with pytest.raises(VesicleError, match="window is 99; allowed: up to 48"):
        settings(attacked=Attacked(window=99, folds=2))
    with pytest.raises(VesicleError, match="longest is 3; allowed: 256"):
        Attacked(longest=3)
    with pytest.raises(VesicleError, match="scale is 'huge'; allowed: debug, small"):
        settings_of("huge")
    with pytest.raises(VesicleError, match="the first precision is lowered"):
        attacked_of("debug", (Precision(bits=4),))


# The experiment


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose decoder has learnt 24 of 48 documents by heart."""
    folder = tmp_path_factory.mktemp("by-heart")
    run_experiment(some_texts(48), folder, LEARNT_BY_HEART)
    return folder


def test_what_is_learnt_by_heart_is_told_and_the_controls_are_not(by_heart: Path):
    report = json.loads((by_heart / "report.json").read_text())
    decoder = report["decoders"][0]
    areas = {row["attack"]: row["auc"] for row in decoder["attacks"]}
    assert decoder["loss"]["members"] < decoder["loss"]["others"] - 0.3
    for name in ("loss", "none/aggregate", "none/histogram", "ratio-gp/aggregate"):
        assert areas[name] > 0.9, areas
    words = report["bag_of_words"]
    assert words["chance"]["low"] < words["auc"] < words["chance"]["high"]
    assert words["low"] < 0.5 < words["high"]
    assert decoder["other_splits"]["mean"] == pytest.approx(0.5, abs=0.1)


def test_an_untrained_decoder_tells_nothing(tmp_path: Path):
    given = settings(learning_rate=0.0)
    report = run_experiment(some_texts(24), tmp_path, given)
    by_chance = report["decoders"][0]["other_splits"]
    found = next(r for r in report["decoders"][0]["attacks"] if r["attack"] == PUBLISHED)
    assert by_chance["low"] - 0.05 < found["auc"] < by_chance["high"] + 0.05


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path, monkeypatch):
    texts = some_texts(24)
    precisions = (Precision(), Precision(bits=2))
    given = settings(
        epochs=2, seeds=2, attacked=replace(settings().attacked, precisions=precisions)
    )
    whole = run_experiment(texts, tmp_path / "whole", given)

    def kill(done: int, total: int, what: str) -> None:
        if done == 4 and "asked" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(texts, tmp_path / "cut", given, kill)
    assert run_experiment(texts, tmp_path / "cut", given) == whole

    def untrained(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr("vesicle.neurons.membership.experiment._do", untrained)
    assert run_experiment(texts, tmp_path / "cut", given) == whole
    fewer = replace(given, seeds=1)
    assert run_experiment(texts, tmp_path / "cut", fewer)["seeds"] == 1
    with pytest.raises(VesicleError, match="holds a run with other epochs"):
        run_experiment(texts, tmp_path / "cut", replace(given, epochs=4))
    with pytest.raises(VesicleError, match="holds a run with other documents"):
        run_experiment(some_texts(24, seed=7), tmp_path / "cut", given)


def test_a_report_tells_of_every_part(tmp_path: Path):
    precisions = (Precision(), Precision(budget=0.8), Precision(bits=4))
    wide = replace(SIZE, width=48)
    given = settings(
        sizes={"narrow": SIZE, "wide": wide},
        attacked=replace(settings().attacked, precisions=precisions),
    )
    report = run_experiment(some_texts(24), tmp_path, given)
    assert [row["decoder"] for row in report["decoders"]] == ["narrow", "wide"]
    assert [row["precision"] for row in report["precisions"]] == ["full", "budget-0.8", "bits-4"]
    for row in report["precisions"]:
        assert row["loss"]["members"] > 0
        assert [own["attack"] for own in row["attacks"]] == list(ATTACKS)
    assert report["precisions"][1]["flops_share"] == pytest.approx(0.8, abs=0.01)
    assert report["precisions"][0]["less"][PUBLISHED]["auc"] == 0
    claims = [row["claim"] for row in report["claims"]]
    assert f"{PUBLISHED}: wide above narrow" in claims
    assert "loss: bits-4 below full" in claims
    assert {row["verdict"] for row in report["claims"]} <= {
        "holds",
        "does not hold",
        "not told apart",
    }


# A model of one's own


@pytest.fixture(scope="module")
def own_model(by_heart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that decoder as a model, and the documents that it was trained on or not."""
    folder = tmp_path_factory.mktemp("own")
    corpus = prepare(some_texts(48), LEARNT_BY_HEART)
    model = train_decoder(corpus, 0, SIZE, LEARNT_BY_HEART, by_heart / "decoders" / "0-narrow")
    model.save_pretrained(folder / "model")
    corpus.tokenizer.save(str(folder / "model" / "tokenizer.json"))
    members = corpus.members(0)
    for name, some in (("seen", members), ("unseen", ~members)):
        rows = [text for text, one in zip(corpus.texts, some, strict=True) if one]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def known(folder: Path, kept: int = 20) -> KnownDocuments:
    seen, unseen = (read_documents(folder / f"{name}.jsonl") for name in ("seen", "unseen"))
    return KnownDocuments(
        members=seen[:kept], others=unseen[:kept], unknown=[*seen[kept:], *unseen[kept:]]
    )


def test_a_model_of_ones_own(own_model: Path, tmp_path: Path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(own_model / "model")
    text = Text.from_folder(own_model / "model")
    attacked = replace(settings().attacked, precisions=(Precision(), Precision(bits=2)))
    report = infer_membership(model, text, known(own_model), tmp_path, attacked)
    assert (report["members"], report["others"]) == (20, 20)
    loss = next(row for row in report["precisions"][0]["attacks"] if row["attack"] == "loss")
    assert loss["auc"] > 0.9
    assert len(report["unknown"]) == 8
    assert all(0 <= row["chance"] <= 1 for row in report["unknown"])

    class Deaf(torch.nn.Module):
        """What was asked is in the folder."""

        config = model.config

        def __init__(self):
            super().__init__()
            self.kept = torch.nn.ParameterList(model.parameters())

        def forward(self, **given):
            raise AssertionError("asked again")

    again = infer_membership(
        Deaf(), text, known(own_model), tmp_path, replace(attacked, precisions=(Precision(),))
    )
    assert again["precisions"][0] == report["precisions"][0]
    with pytest.raises(VesicleError, match="holds a run with other window"):
        infer_membership(model, text, known(own_model), tmp_path, replace(attacked, window=20))
    with pytest.raises(ModelError, match="window is 99; allowed: up to 48"):
        infer_membership(model, text, known(own_model), tmp_path, replace(attacked, window=99))


def test_documents_of_a_model_are_checked(own_model: Path, tmp_path: Path):
    text = Text.from_folder(own_model / "model")
    model, attacked = new_decoder(SIZE, 0), settings().attacked
    with pytest.raises(DataError, match="1 documents are members and others at once, such as 'b'"):
        KnownDocuments(members=["a", "b"], others=["b"])
    with pytest.raises(DataError, match="2 of 2 members have 20 tokens and more; 6 are needed"):
        infer_membership(model, text, known(own_model, 2), tmp_path, attacked)
    short = replace(known(own_model), unknown=["abc"])
    with pytest.raises(DataError, match=r"an unknown document has \d tokens; allowed: 20"):
        infer_membership(model, text, short, tmp_path, attacked)


def test_what_a_tokenizer_puts_before_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = learn_tokenizer(some_texts(5), 300)

    def text() -> Text:
        return Text(tokenizer, special_tokens={}, template=None, eos_ids=(), context_window=9)

    assert lead_of(text()) == []
    tokenizer.post_processor = TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", 0)]
    )
    assert lead_of(text()) == [0]


# The command


def command(*arguments: str):
    app = typer.Typer()
    app.command()(membership)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def test_the_command_end_to_end(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = some_texts(16, n_words=90)
    path.write_text("".join(json.dumps({"document": text}) + "\n" for text in rows))
    given = ["--data", str(path), "--out", str(tmp_path / "out"), "--seeds", "1"]
    given += ["--budget", "1,0.9", "--bits", "2", "--epochs", "1"]
    done = command(*given, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["documents"] == 16
    assert [row["precision"] for row in report["precisions"]] == ["full", "budget-0.9", "bits-2"]
    shown = command(*given)
    assert shown.exit_code == 0
    for words in ("narrow decoder", "wide decoder", "bag of words", "bits-2", "claims"):
        assert words in shown.stdout


def test_the_command_on_a_model_of_ones_own(own_model: Path, tmp_path: Path):
    rows = [json.dumps({"text": text}) + "\n" for text in some_texts(3, n_words=60, seed=3)]
    (tmp_path / "asked.jsonl").write_text("".join(rows))
    given = ["--model", str(own_model / "model"), "--out", str(tmp_path / "out")]
    given += ["--members", str(own_model / "seen.jsonl")]
    given += ["--others", str(own_model / "unseen.jsonl")]
    done = command(*given, "--unknown", str(tmp_path / "asked.jsonl"))
    assert done.exit_code == 0, done.output
    for words in ("whole documents", "full", "chance of a member"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither is given; allowed: --data, or --members and --others"),
        (["--data", "sample", "--members", "a", "--others", "b"], "both are given"),
        (["--members", "a"], "--others is missing"),
        (["--others", "a"], "--members is missing"),
        (["--data", "sample", "--unknown", "a"], "--unknown is a, but with --data"),
        (["--data", "sample", "--model", "m"], "--model is m, but with --data"),
        (["--data", "sample", "--budget", "0.5,2"], "budget is 2; allowed: above 0, up to 1"),
        (["--data", "sample", "--budget", "much"], "--budget is 'much'; allowed: numbers"),
        (["--data", "sample", "--bits", "5"], "bits is 5; allowed: 16, 8, 4, 3, 2"),
        (["--data", "sample", "--bits", "4.5"], "--bits has 4.5"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--data", "sample", "--documents", "3"], "documents is 3; allowed: 8"),
        (["--data", "sample", "--epochs", "0"], "epochs is 0; allowed: 1"),
        (["--members", "nowhere", "--others", "b"], "no data at nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path):
    done = command(*arguments, "--out", str(tmp_path / "out"))
    assert isinstance(done.exception, VesicleError)
    assert message in str(done.exception)
    assert not (tmp_path / "out" / "report.json").exists()
