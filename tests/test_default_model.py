"""The real default model: the engine at rest writes what Hugging Face writes."""

import copy

import pytest
import torch

from tests.default_prompts import PROMPTS

ENGINE_TOLERANCE = 2e-3
"""On logits of up to about 30, fp32: sums of 1536 products in another order, through 30 layers."""


@pytest.fixture(scope="module")
def default():
    from transformers import AutoModelForCausalLM

    from vesicle.engine import Engine
    from vesicle.models import Text, ensure_default_model

    folder = ensure_default_model(progress=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Engine.from_pretrained(folder), Text.from_folder(folder)


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
    replay = Replay(sequence.plan, modulator.equipment)
    exact = with_double_norms(model)
    exact_engine = Engine.from_model(exact)
    [logits] = exact_engine.forward([(exact_engine.start(replay), ids)], "all")
    with torch.no_grad():
        dense = exact(tokens).logits[0]
        with attach(exact, replay):
            reference = exact(tokens).logits[0]
    difference = (logits - reference).abs()
    assert difference.max() < 1e-9, (difference.max(), difference.mean())
    [rounded] = engine.forward([(engine.start(replay), ids)], "all")
    assert divergence(reference, rounded) < 0.4 * divergence(dense, reference)
