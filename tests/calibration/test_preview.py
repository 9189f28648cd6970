"""The LM head's preview is the best of its rank, and travels with a modulator."""

from pathlib import Path

import pytest
import torch

from tests.tiny import shape_of, tiny_model, tiny_modulator, tokens
from vesicle.calibration import fit_preview
from vesicle.errors import DataError, VesicleError
from vesicle.modulator import Modulator
from vesicle.preview import HeadPreview, merged


def squared_error(model: torch.nn.Module, preview: HeadPreview, ids: torch.Tensor) -> float:
    """Mean squared error of all logits."""
    with torch.no_grad():
        states = model.base_model(ids).last_hidden_state.flatten(0, 1)
        head = model.get_output_embeddings().weight
        rough = preview.scores(states, preview.words(head))
        return float((rough - states @ head.T).square().mean())


def test_no_other_directions_lose_less():
    model, ids = tiny_model("llama"), tokens(64, batch=8)
    preview = fit_preview(model, ids, 6)
    best = squared_error(model, preview, ids)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        turned = HeadPreview(6, preview.down.shape[1])
        for name in ("down", "up"):
            own = getattr(preview, name)
            noise = torch.randn(own.shape, generator=generator)
            getattr(turned, name).copy_(own + 0.1 * own.std() * noise)
        assert squared_error(model, turned, ids) > best
    errors = [squared_error(model, fit_preview(model, ids, k), ids) for k in (2, 6, 20)]
    assert errors == sorted(errors, reverse=True)


def test_all_directions_lose_nothing():
    model, ids = tiny_model("llama"), tokens(64, batch=8)
    width = shape_of(model).width
    model_error = squared_error(model, fit_preview(model, ids, width), ids)
    assert model_error < 1e-3 * squared_error(model, fit_preview(model, ids, 2), ids)


@pytest.mark.parametrize("rank", [0, 1000])
def test_ranks_that_there_are_not(rank: int):
    with pytest.raises(ValueError, match=f"preview is {rank}; allowed: 1 to"):
        fit_preview(tiny_model("llama"), tokens(64, batch=8), rank)


def test_a_text_that_is_too_short():
    with pytest.raises(DataError, match="tokens; a preview of a model of width"):
        fit_preview(tiny_model("llama"), tokens(5), 2)


def test_it_is_saved_and_read_bit_for_bit(tmp_path: Path):
    model = tiny_model("llama")
    preview = fit_preview(model, tokens(64, batch=8), 6)
    modulator = tiny_modulator(shape_of(model)).with_preview(preview, 5, 40)
    modulator.save_pretrained(tmp_path)
    read = Modulator.from_pretrained(tmp_path)
    assert read.head_preview is not None
    assert torch.equal(read.head_preview.down, preview.down)
    assert torch.equal(read.head_preview.up, preview.up)
    assert (read.gaba.likeliest, read.gaba.logits) == (5, 40)
    assert read.at(0.5).overhead(shape_of(model)).head_rank == 6


def test_gaba_must_be_released():
    shape = shape_of(tiny_model("llama"))
    modulator = tiny_modulator(shape, transmitters=("dopamine",))
    with pytest.raises(VesicleError, match="where GABA is released; this modulator releases dop"):
        modulator.with_preview(HeadPreview(2, shape.width), 5, 40)


def test_settings_out_of_range():
    shape = shape_of(tiny_model("llama"))
    for settings, line in (((-1, 0), "likeliest is -1"), ((0, -2), "logits is -2")):
        with pytest.raises(ValueError, match=line):
            tiny_modulator(shape).with_preview(HeadPreview(2, shape.width), *settings)


def test_merging_keeps_the_best_and_the_rest():
    rough = torch.tensor([[1.0, 3.0, 2.0, 0.0]] * 2)
    exact = torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 2)
    found = merged(rough, exact, torch.tensor([2, 0]).numpy())
    assert found.tolist() == [[1.0, 20.0, 30.0, 0.0], [10.0, 20.0, 30.0, 40.0]]
