"""The press keeps what the engine's NAMM keeps, and transformers goes on as the engine does.

Tiny random models in fp32; with the real kvpress, so not run by default (see docs/kvpress.md).
"""

import copy
import gc
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from tests.tiny import CONFIGS, randomise, tiny_model, tokens
from vesicle.engine import Engine
from vesicle.errors import VesicleError
from vesicle.families import cache_argument, find_family
from vesicle.integrations.kvpress import kept_by
from vesicle.namm import Namm, NammMemory, NammSettings
from vesicle.namm.gates import width_of

pytestmark = [pytest.mark.kvpress, pytest.mark.filterwarnings("default")]

FAMILIES = [name for name in CONFIGS if not name.startswith("gpt_neox")]  # kvpress has none
N_CONTEXT, N_MORE = 160, 12
LOGITS_TOLERANCE = 1e-4
"""On logits of up to 12, fp32, sums in another order. Measured: 3e-5."""


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def gated(namm: Namm, model: Any) -> Namm:
    """The same with random gates."""
    shape = find_family(model.config).decoder_config(model.config).shape
    rng = np.random.default_rng(4)
    gates = rng.normal(size=(shape.n_layers, shape.n_kv_heads, width_of(shape.head_size)))
    ages = rng.normal(size=gates.shape[:2]).astype(np.float32)
    return replace(namm, gates=gates.astype(np.float32), ages=ages)


def press_of(*given: Any, **named: Any) -> Any:
    """A NAMMPress, imported late: kvpress marks the modules of all models in its process."""
    from vesicle.integrations.kvpress.namm_press import NAMMPress

    return NAMMPress(*given, **named)


def drawn(n_layers: int = 3, seed: int = 0, n_heads: int = 2, **settings: Any) -> Namm:
    """A random NAMM that observes 48 queries; parts of KV heads differ about e-fold."""
    rng = np.random.default_rng(seed)
    made = NammSettings(
        **{"network": "bam", "hidden": 4, "observes": 48, "sinks": 2, "recent": 16, **settings}
    )
    return Namm(
        settings=made,
        parameters=rng.normal(size=made.n_parameters).astype(np.float32),
        profile=rng.normal(size=(n_layers, n_heads)).astype(np.float32),
    )


def made(family: str, attention: str = "sdpa") -> Any:
    return tiny_model(family, dtype=torch.float32, attention=attention)


def first_layer_full(attention: str = "sdpa") -> Any:
    """Gemma 3 with windows in later layers alone."""
    config = CONFIGS["gemma3"]()
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    randomise(model, 0)
    return model.eval()


def prefilled(model: Any, press: Any, ids: Tensor, cache: Any = None) -> Any:
    """The cache that the press leaves."""
    cache = transformers.DynamicCache() if cache is None else cache
    with press(model):
        model.model(ids, **cache_argument(model, cache))
    return cache


def asked_once(model: Any, namm: Namm, memory: float, ids: Tensor) -> tuple[Engine, Any]:
    """An engine and its sequence, forgotten from at the end of the tokens and not before."""
    engine = Engine.from_model(model)
    interval = ids.shape[1]
    sequence = engine.start(NammMemory(namm, memory=memory, interval=interval))
    engine.forward([(sequence, ids[0].tolist())], "none")
    return engine, sequence


def going_on(model: Any, cache: Any, ids: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B, n, V) logits of the tokens after the context, so many at a time."""
    found, at = list[Tensor](), N_CONTEXT
    for size in sizes:
        where = torch.arange(at, at + size).expand(len(ids), -1)
        given = cache_argument(model, cache)
        found.append(model(ids[:, at : at + size], position_ids=where, **given).logits)
        at += size
    return torch.cat(found, 1)


def attention_of(model: Any) -> list[Any]:
    family = find_family(model.config)
    return [family.modules(layer).attention for layer in family.layers(model)]


def windows(model: Any) -> Any:
    return find_family(model.config).decoder_config(model.config).shape.layer_windows


# Parity -----------------------------------------------------------------------------------------


def check_positions(model: Any, namm: Namm, memory: float, n: int = N_CONTEXT) -> list[list[int]]:
    """Compare what is kept with the engine; entries of each KV head, of layers that forget."""
    ids = tokens(n)
    kept = kept_by(press_of(namm, memory), model, ids[0].tolist())
    _, sequence = asked_once(model, namm, memory, ids)
    counts = []
    for layer, heads in enumerate(kept):
        if windows(model)[layer]:
            assert all(head.tolist() == list(range(n)) for head in heads)
            continue
        held = sequence.cache.held(layer)
        assert [head.tolist() for head in heads] == [row.tolist() for row in held], layer
        counts.append([len(head) for head in heads])
    return counts


@pytest.mark.parametrize("scores", ["network", "gates", "decays", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_engines(family: str, scores: str):
    model = made(family)
    namm = drawn(model.config.num_hidden_layers, decays=scores == "decays")
    if scores != "network":
        namm = gated(namm, model)
    if scores in ("gates", "decays"):
        namm = replace(namm, parameters=np.zeros_like(namm.parameters))
    counts = check_positions(model, namm, 0.4)
    assert np.sum(counts) <= 0.4 * N_CONTEXT * np.size(counts)
    assert all(len(set(heads)) > 1 for heads in counts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("memory", [0.15, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("network", ["bam", "mlp", "linear"])
def test_positions_at_any_share_by_any_network(network: str, memory: float, attention: str):
    model = made("llama", attention)
    check_positions(model, drawn(3, 1, network=network), memory)


@pytest.mark.parametrize("n", [48, 64, 96, 256])
def test_positions_at_any_length(n: int):
    check_positions(made("llama"), drawn(3, 2), 0.5, n)


@pytest.mark.parametrize("seed", range(6))
def test_positions_of_many_namms(seed: int):
    """Without the age, too, and with a profile of steeper parts."""
    namm = drawn(3, seed, age=bool(seed % 2), observes=32 + 16 * (seed % 3))
    check_positions(made("llama"), replace(namm, profile=3 * namm.profile), 0.3)


def test_positions_where_the_first_layer_is_full():
    """Parts are those of the layers that forget; the one between them counts for nothing."""
    namm = replace(drawn(3, 3), profile=np.array([[0, -1], [4, 4], [-1, 0]], np.float32))
    assert check_positions(first_layer_full(), namm, 0.4) == [[96, 32], [32, 96]]


def test_one_that_prefers_nothing_keeps_what_is_first_and_newest():
    model = made("llama")
    namm = replace(
        Namm.fresh(NammSettings(sinks=2, recent=16)), profile=np.zeros((3, 2), np.float32)
    )
    check_positions(model, namm, 0.5)
    (head, *_), *_ = kept_by(press_of(namm, 0.5), model, tokens(N_CONTEXT)[0].tolist())
    assert head.tolist() == [0, 1, *range(N_CONTEXT - 78, N_CONTEXT)]


def test_the_network_matters():
    """So that the tests above could fail."""
    model, ids = made("llama"), tokens(N_CONTEXT)[0].tolist()
    one, other = (kept_by(press_of(drawn(3, seed), 0.4), model, ids) for seed in (0, 7))
    newest = kept_by(press_of(replace(Namm.fresh(), profile=drawn().profile), 0.4), model, ids)
    for kept in (other, newest):
        assert any(a.tolist() != b.tolist() for a, b in zip(one[0], kept[0], strict=True))
    assert one[0][0].tolist() != one[0][1].tolist()  # KV heads choose by themselves


# Going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma3, first layer full"])
def test_transformers_goes_on_as_the_engine_does(family: str, attention: str):
    """A question in one pass, then token by token, with layers and heads of unlike lengths."""
    first = family not in FAMILIES
    model = first_layer_full(attention) if first else made(family, attention)
    ids, memory = tokens(N_CONTEXT + N_MORE), 0.4
    context, namm = ids[:, :N_CONTEXT], drawn()
    engine, sequence = asked_once(model, namm, memory, context)
    (expected,) = engine.forward([(sequence, ids[0, N_CONTEXT:].tolist())], "all")
    kept = kept_by(press_of(namm, memory), model, context[0].tolist())
    assert any(len({len(head) for head in heads}) > 1 for heads in kept)
    for configured in (False, True):  # a cache that knows of windows holds no more than they are
        known = {"config": model.config} if configured else {}
        cache = prefilled(
            model, press_of(namm, memory), context, transformers.DynamicCache(**known)
        )
        found = going_on(model, cache, ids, (8, 1, 1, 2))[0]
        assert (found - expected).abs().max() < LOGITS_TOLERANCE
    dense = model(ids).logits[0, N_CONTEXT:]
    assert (dense - expected).abs().max() > 100 * LOGITS_TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_question_of_many_tokens(attention: str):
    """kvpress finds no key that all of its queries are averse to, so masks have to hide entries."""
    from kvpress.attention_patch import search_hyperplane

    model, ids, namm = made("llama", attention), tokens(N_CONTEXT + 96), drawn()
    engine, sequence = asked_once(model, namm, 0.4, ids[:, :N_CONTEXT])
    (expected,) = engine.forward([(sequence, ids[0, N_CONTEXT:].tolist())], "all")
    cache = prefilled(model, press_of(namm, 0.4), ids[:, :N_CONTEXT])
    found = going_on(model, cache, ids, (90, 1, 5))[0]
    assert (found - expected).abs().max() < LOGITS_TOLERANCE
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="Could not find"):
        search_hyperplane(torch.randn(1, 2 * 90, 12, generator=generator))


@pytest.fixture
def maskless() -> Iterator[str]:
    """Attention that kvpress knows and that takes no masks, as flash attention."""
    import kvpress  # noqa: F401  # what it wraps is wrapped
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **named: Any):
        assert mask is None
        return sdpa(module, query, key, value, None, *args, **named)

    sdpa, name = ALL_ATTENTION_FUNCTIONS["sdpa"], "test_maskless"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    yield name
    del ALL_ATTENTION_FUNCTIONS._global_mapping[name]


def test_attention_without_masks_hides_by_the_marks_of_kvpress(maskless: str):
    """Token by token: what is at hand here aligns several queries otherwise."""
    model, ids, namm = made("llama", maskless), tokens(N_CONTEXT + N_MORE), drawn()
    engine, sequence = asked_once(model, namm, 0.4, ids[:, :N_CONTEXT])
    (expected,) = engine.forward([(sequence, ids[0, N_CONTEXT:].tolist())], "all")
    cache = prefilled(model, press_of(namm, 0.4), ids[:, :N_CONTEXT])
    found = going_on(model, cache, ids, (1,) * N_MORE)[0]
    assert (found - expected).abs().max() < LOGITS_TOLERANCE
    for module in attention_of(model):
        module.masked_key_indices = None
    del cache
    check_positions(model, namm, 0.4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
def test_entries_that_fill_up_get_no_attention(attention: str, batch: int):
    """So they may hold anything."""
    model, ids = made("llama", attention), tokens(N_CONTEXT + N_MORE, batch=batch)
    cache = prefilled(model, press_of(drawn(), 0.4), ids[:, :N_CONTEXT])
    marks = [module.masked_key_indices for module in attention_of(model)]
    expected = going_on(model, copy.deepcopy(cache), ids, (8, 1, 1, 2))
    seen = going_on(model, copy.deepcopy(cache), ids, (8, 1, 1, 2))
    assert torch.equal(seen, expected)
    counts = check_positions(model, drawn(), 0.4)
    for layer, places, heads in zip(cache.layers, marks, counts, strict=True):
        assert layer.keys.shape[2] == max(heads)
        assert len(places[0]) == batch * sum(max(heads) - own for own in heads) > 0
        for rows in (layer.keys, layer.values):
            rows[places] = 1e3 * torch.randn(len(places[0]), rows.shape[-1])
    if attention == "eager":
        out = model(
            ids[:, N_CONTEXT : N_CONTEXT + 8],
            output_attentions=True,
            position_ids=torch.arange(N_CONTEXT, N_CONTEXT + 8).expand(batch, -1),
            **cache_argument(model, copy.deepcopy(cache)),
        )
        for paid, (rows, heads, at) in zip(out.attentions, marks, strict=True):
            by_head = paid.unflatten(1, (2, 2))  # KV heads, and query heads of each
            assert not by_head[rows, heads, :, :, at].any()
            assert by_head.sum() == pytest.approx(batch * 4 * 8, rel=1e-5)
    found = going_on(model, cache, ids, (8, 1, 1, 2))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "maskless"])
def test_each_prompt_has_its_own_entries_hidden(attention: str, request: pytest.FixtureRequest):
    """Whichever was read last, and whether by this press or by none."""
    maskless = attention == "maskless"
    attention = request.getfixturevalue("maskless") if maskless else attention
    sizes = (1,) * 5 if maskless else (4, 1)
    model, fresh = made("llama", attention), made("llama")
    ids = tokens(N_CONTEXT + 5)
    context, others = ids[:, :N_CONTEXT], tokens(N_CONTEXT, seed=9)
    dense = fresh(ids).logits[:, N_CONTEXT:]

    def check(cache: Any, expected: Tensor) -> None:
        found = going_on(model, copy.deepcopy(cache), ids, sizes)
        assert (found - expected).abs().max() < LOGITS_TOLERANCE

    pressed, wanted = list[Any](), list[Tensor]()
    for seed in (0, 1):
        engine, sequence = asked_once(fresh, drawn(seed=seed), 0.4, context)
        wanted.append(engine.forward([(sequence, ids[0, N_CONTEXT:].tolist())], "all")[0][None])
    assert (wanted[0] - wanted[1]).abs().max() > 100 * LOGITS_TOLERANCE
    for seed in (0, 1):
        pressed.append(prefilled(model, press_of(drawn(seed=seed), 0.4), context))
        plain = transformers.DynamicCache()
        check(pressed[0], wanted[0])
        model(context, **cache_argument(model, plain))  # by no press
        check(plain, dense)
        prefilled(model, press_of(drawn(seed=3), 0.4), others)  # its cache is gone
        check(plain, dense)
        for cache, expected in zip(pressed, wanted, strict=False):
            check(cache, expected)
            check(plain, dense)
        short = prefilled(model, press_of(drawn(), 0.4), others[:, :47])  # stays whole
        given = cache_argument(model, short)
        found = model(others[:, 47:48], position_ids=torch.tensor([[47]]), **given).logits
        assert (found - fresh(others[:, :48]).logits[:, -1:]).abs().max() < LOGITS_TOLERANCE
    check(pressed[0], wanted[0])
    del pressed, cache
    gc.collect()
    assert all(module.masked_key_indices is None for module in attention_of(model))
    check(plain, dense)


@pytest.mark.parametrize("by_press", [False, True])
def test_a_cache_that_is_filled_anew_hides_nothing_of_before(by_press: bool):
    model, ids, press = made("llama"), tokens(N_CONTEXT + 5), press_of(drawn(), 0.4)
    context = ids[:, :N_CONTEXT]
    cache = prefilled(model, press, context)
    expected, other = going_on(model, copy.deepcopy(cache), ids, (4, 1)), copy.deepcopy(cache)
    cache.crop(0)
    if by_press:
        prefilled(model, press, context.flip(1), cache)
        cache.crop(0)
        prefilled(model, press, context, cache)
        dense = expected
    else:
        model(context, **cache_argument(model, cache))
        dense = model(ids).logits[:, N_CONTEXT:]
    assert (going_on(model, cache, ids, (4, 1)) - dense).abs().max() < LOGITS_TOLERANCE
    assert torch.equal(going_on(model, other, ids, (4, 1)), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_inside_the_context(attention: str):
    model, namm = made("llama", attention), drawn()
    ids = tokens(N_CONTEXT)
    with press_of(namm, 0.4)(model):
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    cache, expected, at = transformers.DynamicCache(), [], N_CONTEXT
    with press_of(namm, 0.4)(model):
        logits = model(ids, **cache_argument(model, cache)).logits
    for _ in range(8):
        expected.append(int(logits[0, -1].argmax()))
        where = torch.tensor([[at]])
        logits = model(
            torch.tensor([expected[-1:]]), position_ids=where, **cache_argument(model, cache)
        ).logits
        at += 1
    assert found[0, N_CONTEXT:].tolist() == expected
    engine, sequence = asked_once(model, namm, 0.4, ids)
    assert sequence.cache.held(0)[0].shape != sequence.cache.held(0)[1].shape
    steps, said = expected[:1], expected[:1]
    for _ in range(7):
        (out,) = engine.forward([(sequence, steps)], "last")
        steps = [int(out[-1].argmax())]
        said += steps
    assert said == expected


def tokenizer() -> Any:
    """One word for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<s>" if i == 1 else f"w{i}": i for i in range(97)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>")


def test_the_pipeline_of_kvpress():
    """Two questions on one context, each as the engine answers it."""
    model, namm = made("llama"), drawn()
    pipe = transformers.pipeline(
        "kv-press-text-generation", model=model, tokenizer=tokenizer(), device="cpu"
    )
    words = [f"w{i}" for i in tokens(N_CONTEXT - 1, seed=4)[0].clamp(2).tolist()]
    questions = ["w5 w7 w9 w11 w13", "w20 w21 w22"]
    found = pipe(
        " " + " ".join(words),  # after the first token, of id 1
        questions=questions,
        press=press_of(namm, 0.4),
        max_new_tokens=6,
    )["answers"]
    context = torch.tensor([[1, *(int(word[1:]) for word in words)]])
    for question, answer in zip(questions, found, strict=True):
        engine, sequence = asked_once(model, namm, 0.4, context)
        steps = [int(word[1:]) for word in question.split()]
        said = []
        for _ in range(6):
            (logits,) = engine.forward([(sequence, steps)], "last")
            said.append(int(logits[-1].argmax()))
            steps = said[-1:]
        assert answer == " ".join(f"w{i}" for i in said)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_a_batch_are_chosen_one_by_one(attention: str):
    model, namm = made("llama", attention), drawn()
    press, both = press_of(namm, 0.4), tokens(N_CONTEXT + N_MORE, batch=2)
    cache = prefilled(model, press, both[:, :N_CONTEXT])
    marks = [module.masked_key_indices for module in attention_of(model)]
    found = going_on(model, copy.deepcopy(cache), both, (8, 1, 1, 2))
    for row in range(2):
        context = both[row : row + 1, :N_CONTEXT]
        alone = prefilled(model, press, context)
        own = [module.masked_key_indices for module in attention_of(model)]
        for i, (layer, other) in enumerate(zip(cache.layers, alone.layers, strict=True)):
            assert (layer.keys[row] - other.keys[0]).abs().max() < 1e-4
            _, heads, places = (x[marks[i][0] == row] for x in marks[i])
            assert torch.equal(torch.stack([heads, places]), torch.stack(own[i][1:]))
        engine, sequence = asked_once(model, namm, 0.4, context)
        (expected,) = engine.forward([(sequence, both[row, N_CONTEXT:].tolist())], "all")
        assert (found[row] - expected).abs().max() < LOGITS_TOLERANCE
    assert (found[0] - found[1]).abs().max() > 100 * LOGITS_TOLERANCE
    assert not torch.equal(*(marks[0][2][marks[0][0] == row] for row in range(2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_number_formats(dtype: torch.dtype):
    """What is kept has the model's own, and a question reads it."""
    model, namm = tiny_model("qwen3", dtype=dtype), drawn()
    cache = prefilled(model, press_of(namm, 0.4), tokens(N_CONTEXT))
    held = [layer.keys.shape[2] for layer in cache.layers]
    assert held == [max(heads) for heads in check_positions(made("qwen3"), namm, 0.4)]
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    where = torch.arange(N_CONTEXT, N_CONTEXT + 4)[None]
    given = cache_argument(model, cache)
    assert model(tokens(4), position_ids=where, **given).logits.isfinite().all()


def test_short_prompts_stay_whole_and_so_do_all_at_1():
    model, press = made("llama"), press_of(drawn(), 0.25)
    for cache, n in (
        (prefilled(model, press, tokens(47)), 47),
        (prefilled(model, press_of(drawn(), 1), tokens(90)), 90),
    ):
        assert [cache.get_seq_length(layer) for layer in range(3)] == [n] * 3


def test_the_model_is_left_as_it_was():
    model = made("llama")
    logits = model(tokens(60)).logits
    press = press_of(drawn(), 0.4)
    cache = prefilled(model, press, tokens(N_CONTEXT))
    assert torch.equal(model(tokens(60)).logits, logits)
    del cache
    gc.collect()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_kvpress_takes_it_for_a_press():
    import kvpress

    model, press = made("llama"), press_of(drawn(), 0.4)
    assert isinstance(press, kvpress.BasePress)
    assert press.compression_ratio == pytest.approx(0.6)
    press.compression_ratio = 0.75
    assert press.memory == 0.25
    cache = prefilled(model, press, tokens(N_CONTEXT))
    held = [cache.get_seq_length(layer) for layer in range(3)]
    kept = kept_by(press, model, tokens(N_CONTEXT)[0].tolist())
    assert held == [max(len(head) for head in heads) for heads in kept]
    assert sum(len(head) for heads in kept for head in heads) <= 0.25 * N_CONTEXT * 6
    wrapped = kvpress.PrefillDecodingPress(prefilling_press=press)
    other = prefilled(model, wrapped, tokens(N_CONTEXT))
    assert [other.get_seq_length(layer) for layer in range(3)] == held


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0.0, -0.5, 1.5, float("nan")])
def test_shares_that_are_none(memory: float):
    with pytest.raises(VesicleError, match=r"memory is \S+; allowed: above 0 and up to 1"):
        press_of(drawn(), memory)
    press = press_of(drawn())
    press.memory = memory
    with pytest.raises(VesicleError, match="memory is "), press(made("llama")):
        pass


def test_ratios_that_are_none():
    press = press_of(drawn())
    with pytest.raises(VesicleError, match=r"memory is 0\.0; allowed"):
        press.compression_ratio = 1.0


@pytest.mark.parametrize(("n_layers", "n_heads"), [(30, 2), (3, 3)])
def test_another_models_profile(n_layers: int, n_heads: int):
    press = press_of(drawn(n_layers, n_heads=n_heads))
    says = f"profile of {n_layers} layers of {n_heads} KV heads; this model has 3 layers of 2 KV"
    with pytest.raises(VesicleError, match=says), press(made("llama")):
        pass


def test_the_shipped_one_by_name():
    assert press_of().namm.profile.shape == (30, 3)
    assert press_of("smollm2-135m-instruct").namm.digest() == press_of().namm.digest()
    with pytest.raises(VesicleError, match="no NAMM of the name 'gpt2' is shipped; allowed: smol"):
        press_of("gpt2")
    with pytest.raises(VesicleError, match="namm is a int; allowed: a Namm"):
        press_of(3)


def test_models_that_it_cannot_choose_for():
    config = CONFIGS["mistral"]()
    config.sliding_window = 16
    model = transformers.AutoModelForCausalLM.from_config(config)
    with (
        pytest.raises(VesicleError, match="all layers of this model have windows"),
        press_of(drawn())(model),
    ):
        pass
    model = made("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(VesicleError, match="'flex_attention'"), press_of(drawn())(model):
        pass


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding(attention: str):
    model, ids = made("llama", attention), tokens(N_CONTEXT, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with pytest.raises(VesicleError, match="have padding"), press_of(drawn())(model):
        model(ids, attention_mask=mask)


def test_after_another_press():
    import kvpress

    press = kvpress.ComposedPress([kvpress.KnormPress(0.5), press_of(drawn())])
    with pytest.raises(VesicleError, match="layer 0 holds 80 entries of 160 tokens"):
        prefilled(made("llama"), press, tokens(N_CONTEXT))


@pytest.mark.model
@pytest.mark.parametrize("by_heads", [False, True])
def test_the_shipped_one_on_the_default_model(by_heads: bool):
    """A quarter of 512 tokens, as the engine holds it, and one answer for both."""
    from tests.default_prompts import PROMPTS
    from vesicle.models import Text, ensure_default_model

    folder = ensure_default_model(progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = Text.from_folder(folder).encode(" ".join(PROMPTS * 4))[: 512 + 8]
    assert len(ids) == 520
    engine = Engine.from_pretrained(folder, weights="fp32")
    press = press_of(memory=0.25)
    if by_heads:  # parts that differ within each layer
        press.namm = replace(press.namm, profile=drawn(30, 2, 3).profile)
    sequence = engine.start(NammMemory(press.namm, memory=0.25, interval=512))
    engine.forward([(sequence, ids[:512])], "none")
    kept = kept_by(press, model, ids[:512])
    for layer, heads in enumerate(kept):
        assert [h.tolist() for h in heads] == [r.tolist() for r in sequence.cache.held(layer)]
    counts = [[len(head) for head in heads] for heads in kept]
    assert np.sum(counts) <= 0.25 * 512 * 90
    assert len(set(np.ravel(counts).tolist())) > 2
    if by_heads:
        assert sum(len(set(heads)) > 1 for heads in counts) > 20
    (expected,) = engine.forward([(sequence, ids[512:])], "last")
    cache = prefilled(model, press, torch.tensor([ids[:512]]))
    assert [cache.get_seq_length(layer) for layer in range(30)] == [max(own) for own in counts]
    where = torch.arange(512, 520)[None]
    given = cache_argument(model, cache)
    found = model(torch.tensor([ids[512:]]), position_ids=where, **given).logits[0, -1]
    assert (found - expected[-1]).abs().max() < 5e-3  # on logits of up to 30, through 30 layers


def test_kvpress_is_loaded_for_the_press_alone():
    """It wraps the attention functions of transformers as soon as it is imported."""
    code = "import sys, {}; print('kvpress' in sys.modules)"
    for module, loads in (
        ("vesicle.cli", "False"),
        ("vesicle.integrations.kvpress", "False"),
        ("vesicle.integrations.kvpress.namm_press", "True"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [loads], module
