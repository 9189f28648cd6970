"""The real default model: the engine at rest writes what Hugging Face writes.

To rounding with fp32 weights; with the packed weights that are the default, as nearly as 8-bit
activations allow.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.default_prompts import PROMPTS

ENGINE_TOLERANCE = 2e-3
"""On logits of up to about 30, fp32: sums of 1536 products in another order, through 30 layers."""


LEAST_AGREEMENT = 0.93
"""Of greedy tokens with those of fp32 weights, when both read the same text. Measured: 0.97; the
others are near ties."""
LOSS_TOLERANCE = 0.02
"""Nats per token, over some hundred tokens. Measured: 0.001 as a mean, 0.007 for one text."""


@pytest.fixture(scope="module")
def default():
    from transformers import AutoModelForCausalLM

    from vesicle.engine import Engine
    from vesicle.models import Text, ensure_default_model

    folder = ensure_default_model(progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Engine.from_pretrained(folder, weights="fp32"), Text.from_folder(folder)


def check_prompts(default, prompts: tuple[str, ...], new_tokens: int) -> None:
    model, engine, text = default
    for prompt in prompts:
        ids = text.chat(prompt)
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=sorted(text.eos_ids),
                pad_token_id=min(text.eos_ids),
            )[0, len(ids) :].tolist()
        while expected and expected[-1] in text.eos_ids:
            expected.pop()
        got, _ = engine.generate(ids, max_new_tokens=new_tokens, stop=text.eos_ids)
        assert got == expected, prompt


@pytest.mark.model
def test_greedy_tokens_at_rest_are_those_of_hugging_face(default):
    check_prompts(default, PROMPTS[:3], 24)


@pytest.mark.model
@pytest.mark.slow
def test_greedy_tokens_at_rest_are_those_of_hugging_face_on_twenty_prompts(default):
    check_prompts(default, PROMPTS, 48)


@pytest.mark.model
def test_reference_at_rest_is_bit_identical_and_the_engine_close(default):
    from vesicle import attach, load_default_modulator

    model, engine, text = default
    ids = text.chat(PROMPTS[0])
    tokens = torch.tensor([ids])
    with torch.no_grad():
        dense = model(tokens).logits
        with attach(model, load_default_modulator(), budget=1.0):
            attached = model(tokens).logits
        after = model(tokens).logits
    assert torch.equal(dense, attached)
    assert torch.equal(dense, after)
    [logits] = engine.forward([(engine.start(), ids)], "all")
    difference = (logits - dense[0]).abs()
    assert difference.max() < ENGINE_TOLERANCE, (difference.max(), difference.mean())


def with_double_norms(model: torch.nn.Module) -> torch.nn.Module:
    """The model in fp64, without the detour of Hugging Face's norms through fp32."""
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(
                len(module.weight), eps=module.variance_epsilon, dtype=torch.float64
            )
            norm.weight = module.weight
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, norm)
    return model


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL of the distributions of logits (T, V), in nats."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.model
def test_the_shipped_modulator_agrees_in_both_executors(default):
    """In fp64 to rounding; in fp32 as far as a discontinuous selection allows.

    Which of two nearly equal channels is read depends on the last bit, and one token that reads the
    other channel moves all later ones a little. In fp64 such ties do not occur on this text.
    """
    from vesicle import attach, load_default_modulator
    from vesicle.cost import price
    from vesicle.engine import Engine
    from vesicle.plan import Replay

    model, engine, text = default
    modulator = load_default_modulator()
    ids = text.chat(PROMPTS[0])
    tokens = torch.tensor([ids])
    method = modulator.at(0.8)
    sequence = engine.start(method)
    engine.forward([(sequence, ids)], "all")
    assert price(sequence.plan, engine.shape, method.overhead(engine.shape)) == sequence.cost
    replay = Replay(sequence.plan, modulator.stand_ins)
    exact = with_double_norms(model)
    exact_engine = Engine.from_model(exact, weights="fp64")
    [logits] = exact_engine.forward([(exact_engine.start(replay), ids)], "all")
    with torch.no_grad():
        dense = exact(tokens).logits[0]
        with attach(exact, replay):
            reference = exact(tokens).logits[0]
    difference = (logits - reference).abs()
    assert difference.max() < 1e-9, (difference.max(), difference.mean())
    [rounded] = engine.forward([(engine.start(replay), ids)], "all")
    assert divergence(reference, rounded) < 0.4 * divergence(dense, reference)


@pytest.fixture(scope="module")
def packed():
    from vesicle.engine import Engine

    return Engine.from_pretrained()


def tensors_of(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached from an object."""
    if id(thing) in seen or isinstance(thing, type | str | bytes | np.ndarray):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_of(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from tensors_of(value, seen)
    elif type(thing).__module__.startswith("vesicle."):
        yield from tensors_of(vars(thing), seen)


@pytest.mark.model
def test_packed_weights_are_the_models_own_and_take_no_more_room(default, packed):
    _, dense, text = default
    for a, b in zip(packed._weights.layers, dense._weights.layers, strict=True):
        for one, other in zip(a.projections, b.projections, strict=True):
            assert torch.equal(one.dequantize(16), other.weight)
        for one, other in zip(a.norms, b.norms, strict=True):
            assert torch.equal(one.weight, other.weight)
    ids = torch.arange(packed.shape.vocabulary)
    for part in ids.split(8192):
        assert torch.equal(packed._weights.embed(part), dense._weights.embed(part))

    s = packed.shape
    layers = sum(w * o for w, o in zip(s.site_widths, s.site_outputs, strict=True)) * s.n_layers
    least_bytes = layers * 5 / 8 + s.vocabulary * s.width * 9 / 8
    assert packed._weights.bytes_held <= 1.15 * least_bytes
    packed.generate(text.chat(PROMPTS[1]), max_new_tokens=2)  # what running makes, it may keep
    pages = {packed.pool.keys.data_ptr(), packed.pool.values.data_ptr()}
    held = {
        t.untyped_storage().data_ptr(): (t.dtype, t.untyped_storage().nbytes())
        for t in tensors_of(packed, set())
        if t.data_ptr() not in pages
    }
    assert sum(n_bytes for _, n_bytes in held.values()) <= 1.15 * least_bytes
    large = [dtype for dtype, n_bytes in held.values() if n_bytes > 1e6]
    assert large
    assert set(large) == {torch.uint8}


@pytest.mark.model
def test_packed_weights_write_nearly_the_text_of_dense_ones(default, packed):
    """Step by step, so on activations of 8 bits throughout."""
    _, dense, text = default
    alike, losses = [], []
    for prompt in PROMPTS[1:4]:
        ids = text.chat(prompt)
        new, _ = dense.generate(ids, max_new_tokens=40)
        row = ids + new
        (expected,) = dense.forward([(dense.start(), row[:-1])], "all")
        sequence = packed.start()
        logits = torch.cat([packed.forward([(sequence, [i])])[0] for i in row[:-1]])
        alike.append((logits.argmax(-1) == expected.argmax(-1)).float())
        losses.append(
            [
                torch.nn.functional.cross_entropy(x, torch.tensor(row[1:]), reduction="none")
                for x in (logits, expected)
            ]
        )
    assert torch.cat(alike).mean() >= LEAST_AGREEMENT
    rise = torch.cat([packed_loss - loss for packed_loss, loss in losses])
    assert abs(rise.mean()) < LOSS_TOLERANCE


def keys_found(source: Path | None, share: float, length: int) -> int:
    """Of two pass keys, by the NAMM of a folder, or by one that keeps the newest entries."""
    from vesicle.engine import Engine
    from vesicle.models import Text, ensure_default_model
    from vesicle.namm import Namm, NammMemory
    from vesicle.tasks.base import Settings
    from vesicle.tasks.registry import find_task
    from vesicle.tasks.sources import load_items

    folder = ensure_default_model(progress=False)
    engine, text = Engine.from_pretrained(folder), Text.from_folder(folder)
    namm = Namm.fresh() if source is None else Namm.load(source)
    settings = Settings(
        seed=3, encode=text.encode, lengths=(length,), depths=(0.25, 0.75), per_cell=1
    )
    task, right = find_task("needle"), 0
    for item in load_items(task, data="sample", split=None, settings=settings, limit=2).items:
        ids = text.encode(item.prompt, control_tokens=False)
        method = NammMemory(namm, memory=share)
        result = engine.generate(ids, method=method, max_new_tokens=8, stop=())
        held = result.sequence.cache.bytes_held / result.sequence.dense_cost.kv_bytes_held
        assert held < share + 0.05
        right += item.references[0] in text.decode(result.ids)
    return right


@pytest.mark.model
def test_a_quarter_of_the_cache_finds_pass_keys():
    from vesicle.shipped import shipped_namm

    assert keys_found(shipped_namm(), 0.25, 1024) == 2


@pytest.mark.slow
def test_the_newest_quarter_of_the_cache_does_not():
    """In every layer at the same share, as a control of the shipped NAMM."""
    assert keys_found(None, 0.25, 1024) < 2


@pytest.mark.slow
def test_an_eighth_of_the_cache_finds_pass_keys():
    """Of 1,024 tokens it is 128 entries, more than half of which stay in any case."""
    from vesicle.shipped import shipped_namm

    assert keys_found(shipped_namm(), 0.125, 2048) == 2


def test_a_system_turn_stays_in_memory():
    """`vesicle run --system --memory` forgets none of it, in any KV head."""
    from vesicle.commands.run import _system_turn
    from vesicle.models import Text, ensure_default_model

    text = Text.from_folder(ensure_default_model(progress=False))
    system = "Answer in one word, whatever you are asked, and never use the letter q."
    ids = text.chat("A long report.", system)
    n = _system_turn(ids, lambda prompt: text.chat(prompt, system))
    assert system in text.decode(ids[:n])
    assert "report" not in text.decode(ids[:n])
