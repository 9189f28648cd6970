"""Attaching: exact at rest, different below it, and gone afterwards."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import CONFIGS, shape_of, tiny_control, tiny_model, tiny_modulator, tokens
from vesicle.cost import price, price_dense
from vesicle.errors import ModelError, VesicleError
from vesicle.modulator import Modulator
from vesicle.plan import Dense, Method, Plan, Replay
from vesicle.predictors import PREDICTORS
from vesicle.reference.attach import Soft, attach


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits(model: Any, ids: Tensor, method: Any = None, budget: float | None = None) -> Tensor:
    if method is None:
        return model(ids).logits
    with attach(model, method, budget):
        return model(ids).logits


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave on a model: hooks, attributes, implementation."""
    left: dict[str, Any] = {"implementation": model.config._attn_implementation}
    for name, module in model.named_modules():
        hooks = [key for key, value in vars(module).items() if "_hooks" in key and value]
        left[name] = (hooks, sorted(vars(module)), module.forward.__qualname__)
    return left


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rest_is_bit_identical(variant: tuple[str, str], dtype: torch.dtype, ids: Tensor):
    family, attention = variant
    model = tiny_model(family, attention=attention, dtype=dtype)
    modulator, own = tiny_modulator(shape_of(model)), logits(model, ids)
    assert torch.equal(logits(model, ids, modulator, 1.0), own)
    assert torch.equal(logits(model, ids, Dense()), own)
    with attach(model, modulator, 1.0) as run:
        model(ids)
    assert run.plan.equals(Plan.rest(run.shape, 70))
    assert (run.levels[0] == 1).all()
    assert run.cost == price_dense(shape_of(model), 70)


def test_a_replayed_rest_is_bit_identical(model: Any, ids: Tensor):
    """Here every hook runs and finds nothing to change."""
    plan = Plan.rest(shape_of(model), 70)
    assert torch.equal(logits(model, ids, Replay(plan)), logits(model, ids))


def test_attached_differs_and_detached_is_the_model(variant: tuple[str, str], ids: Tensor):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, own = traces(model), logits(model, ids)
    modulator = tiny_modulator(shape_of(model), ladder=True, bypass_below=0.2)
    run = attach(model, modulator, 0.6)
    assert traces(model) == before
    with run:
        assert traces(model) != before
        first = model(ids).logits
    assert (first - own).abs().mean() > 0.1
    assert traces(model) == before
    assert torch.equal(logits(model, ids), own)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())
    assert torch.equal(logits(model, ids, modulator, 0.6), first)


def test_clean_after_an_error_in_the_body(variant: tuple[str, str], ids: Tensor):
    family, attention = variant
    model = tiny_model(family, attention=attention)
    before, own = traces(model), logits(model, ids)

    def body() -> None:
        with attach(model, tiny_modulator(shape_of(model)), 0.5):
            model(ids)
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        body()
    assert traces(model) == before
    assert torch.equal(logits(model, ids), own)


def test_clean_after_an_error_in_a_pass(llama: Any, ids: Tensor):
    before, own = traces(llama), logits(llama, ids)
    short = Replay(Plan.rest(shape_of(llama), 30))
    with pytest.raises(VesicleError, match="the plan covers 30 tokens; token 69"):
        logits(llama, ids, short)
    assert traces(llama) == before
    assert torch.equal(logits(llama, ids), own)


def test_clean_after_an_error_while_attaching(llama: Any, monkeypatch: pytest.MonkeyPatch):
    before = traces(llama)
    run = attach(llama, Dense())

    def fail(layer: nn.Module) -> None:
        raise RuntimeError("half-way")

    last = llama.model.layers[-1]
    modules = run.family.modules
    monkeypatch.setattr(run.family, "modules", lambda l: fail(l) if l is last else modules(l))
    with pytest.raises(RuntimeError, match="half-way"):
        run.__enter__()
    assert traces(llama) == before


def test_nesting_is_refused_and_the_outer_one_goes_on(
    llama: Any, modulator: Modulator, ids: Tensor
):
    before, own = traces(llama), logits(llama, ids)
    with attach(llama, modulator, 0.6):
        first = llama(ids).logits
        with pytest.raises(VesicleError, match="attached to this model already"):
            attach(llama, Dense()).__enter__()
        assert torch.equal(llama(ids).logits, first)
    assert traces(llama) == before
    assert torch.equal(logits(llama, ids), own)


def test_two_models_are_attached_at_once(modulator: Modulator, ids: Tensor):
    a, b = tiny_model("llama"), tiny_model("llama", seed=9)
    alone = [logits(m, ids, modulator, 0.6) for m in (a, b)]
    with attach(a, modulator, 0.6), attach(b, modulator, 0.6):
        assert torch.equal(a(ids).logits, alone[0])
        assert torch.equal(b(ids).logits, alone[1])


def test_a_run_is_entered_again(llama: Any, modulator: Modulator, ids: Tensor):
    run = attach(llama, modulator, 0.6)
    with run:
        first = llama(ids).logits
    with run:
        assert torch.equal(llama(ids).logits, first)
    assert run.plan.n_tokens == 70


def test_what_is_refused(llama: Any, modulator: Modulator, ids: Tensor):
    with pytest.raises(VesicleError, match=r"^budget is 0.5, .*, and method is Dense, which"):
        attach(llama, Dense(), 0.5)
    with pytest.raises(VesicleError, match=r"budget is 1.5; allowed: above 0, up to 1"):
        attach(llama, modulator, 1.5)
    with pytest.raises(VesicleError, match="soft execution needs a modulator"):
        attach(llama, Dense(), soft=Soft())
    with pytest.raises(ModelError, match="with head_size 12; this model has 16"):
        attach(tiny_model("mistral"), modulator)
    with pytest.raises(VesicleError, match=r"the batch has 0 sequences; use .plans"):
        _ = attach(llama, modulator, 0.5).plan
    with attach(llama, modulator, 0.5) as run:
        llama(tokens(5, batch=2))
    with pytest.raises(VesicleError, match=r"the batch has 2 sequences; use .plans"):
        _ = run.plan
    assert [p.n_tokens for p in run.plans] == [5, 5]


def test_unsupported_models_are_refused(modulator: Modulator):
    import transformers

    gpt2 = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=97)
    model = transformers.AutoModelForCausalLM.from_config(gpt2)
    with pytest.raises(ModelError, match="model type 'gpt2' is not supported; supported: llama"):
        attach(model, modulator)
    config = CONFIGS["llama"]()
    config.sliding_window = 64
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match="sliding window of 64 of its 512 positions"):
        attach(model, modulator)
    model = tiny_model("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match="attention implementation 'flex_attention' is not supp"):
        attach(model, modulator).__enter__()


def test_the_default_budget_is_used(llama: Any, modulator: Modulator, ids: Tensor):
    assert torch.equal(logits(llama, ids, modulator), logits(llama, ids))
    modulator.info.default_budget = 0.5
    assert torch.equal(logits(llama, ids, modulator), logits(llama, ids, modulator, 0.5))


@pytest.mark.parametrize("budget", [1.0, 0.6])
def test_generate(variant: tuple[str, str], budget: float):
    """Greedy with a cache: every processed token is planned; steps agree with a whole pass."""
    family, attention = variant
    model, prompt = tiny_model(family, attention=attention), tokens(20)
    own = model.generate(prompt, max_new_tokens=20, do_sample=False)
    modulator = tiny_modulator(shape_of(model))
    with attach(model, modulator, budget) as run:
        text = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert text.shape == (1, 40)
    assert torch.equal(text, own) == (budget == 1)
    assert run.plan.n_tokens == 39  # the last one generated was never fed
    assert run.levels[0].shape == (39, 3, 5)
    with attach(model, modulator, budget, prompt_tokens=20), torch.no_grad():
        whole = model(text[:, :-1]).logits
    assert torch.equal(whole[0, 19:].argmax(-1), text[0, 20:])


def test_a_new_prompt_starts_a_new_sequence(llama: Any, modulator: Modulator):
    with attach(llama, modulator, 0.6) as run:
        llama(tokens(30))
        llama(tokens(8, seed=3))
    assert run.plan.n_tokens == 8
    assert run.levels[0].shape == (8, 3, 5)


def test_cost_is_the_plans_price(model: Any, ids: Tensor):
    modulator = tiny_modulator(shape_of(model))
    with attach(model, modulator, 0.6) as run:
        model(ids)
    run.plan.check(shape_of(model))
    overhead = modulator.at(0.6).overhead(run.shape)
    assert run.cost == price(run.plan, run.shape, overhead)
    assert run.cost.flops_total < price_dense(run.shape, 70).flops_total


@pytest.mark.parametrize("kind", ["constant", "random"])
def test_controls_attach(llama: Any, modulator: Modulator, ids: Tensor, kind: str):
    control = modulator.with_levels(tiny_control(kind, modulator.predictor.config))
    with attach(llama, control, 0.6) as run:
        first = llama(ids).logits
    assert (first - logits(llama, ids)).abs().mean() > 0.1
    assert torch.equal(logits(llama, ids, control, 0.9), first)  # the dial does not move a control
    assert (run.levels[0][..., :3] < 1).any()


@pytest.mark.parametrize("kind", list(PREDICTORS))
def test_lower_budgets_cost_less(llama: Any, ids: Tensor, kind: str):
    modulator = tiny_modulator(shape_of(llama), kind)
    shares = []
    for budget in (0.2, 0.5, 0.8, 0.95):
        with attach(llama, modulator, budget) as run:
            llama(ids)
        shares.append(run.cost.flops_total)
    assert shares == sorted(shares)
    assert shares[0] < 0.8 * shares[-1]


def test_methods_are_not_changed_by_running(llama: Any, ids: Tensor, modulator: Modulator):
    method: Method = modulator.at(0.6)
    first = logits(llama, ids, method)
    logits(llama, tokens(9, batch=3), method)
    assert torch.equal(logits(llama, ids, method), first)


def test_eager_attention_tells_where_governed_queries_look(ids: Tensor):
    """`output_attentions` lists every layer, and blocks that are not read have no probability."""
    model = tiny_model("llama", attention="eager")
    plan = Plan.rest(shape_of(model), 70)
    plan.rows["kv_blocks"][40:, 1] = 2
    dense = model(ids, output_attentions=True).attentions
    with attach(model, Replay(plan)):
        found = model(ids, output_attentions=True).attentions
    assert len(found) == len(dense) == model.config.num_hidden_layers
    torch.testing.assert_close(found[0], dense[0])
    torch.testing.assert_close(found[1].sum(-1), torch.ones_like(found[1][..., 0]))
    # transformers' own takes its softmax in fp32.
    torch.testing.assert_close(found[1][:, :, :40], dense[1][:, :, :40], atol=1e-6, rtol=1e-5)

    def blocks(attentions: Tensor) -> Tensor:
        """(B, H) blocks at which the last query looks."""
        padded = nn.functional.pad(attentions[:, :, 69], (0, 10))
        return (padded.unflatten(-1, (5, 16)).sum(-1) > 0).sum(-1)

    assert (blocks(found[1]) == 2).all()
    assert (blocks(dense[1]) == 5).all()
