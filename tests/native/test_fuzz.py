"""Random models, Plans, batches and evictions: the native decoder against the general path.

Every token is decoded by both from the same cache, so that what one rounds otherwise is not handed
on to the next token. In half of the steps the general path does without native code altogether.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.tiny import random_spread, randomise
from vesicle.engine import Engine, Sequence, core
from vesicle.engine.small_codes import round_to_codes
from vesicle.plan import BLOCK, Plan, Replay, StandIns, visible_blocks
from vesicle.shapes import ModelShape
from vesicle.small_modules import LowRankMaps, SmallFfn, SmallModule

NEAR = 1e-4
"""Of the largest logit: the same sums in another order. Measured: 1e-5."""
FAR = 0.1
FLIPS = 0.05
"""A sum that differs in its last bit may read the other of two nearly equal channels or blocks, or
round to the neighbouring 8-bit code. That may move a token's logits by up to `FAR`, and no more
than this share of all tokens. Measured: 0.005 and 0.002."""
FAST, SLOW = range(20), range(20, 160)
LONGEST = 130

pytestmark = pytest.mark.skipif(not core.available(), reason="the native core is not built here")


@pytest.fixture(autouse=True)
def _best_instructions() -> Iterator[None]:
    yield
    library = core.load()
    assert library is not None
    library.vesicle_instructions(None)


def random_model(rng: np.random.Generator) -> Any:
    """Sizes that divide by nothing; every number is one that bfloat16 has."""
    kinds = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3"]
    kv_heads, family = int(rng.integers(1, 4)), rng.choice(kinds)
    heads, n_layers = kv_heads * int(rng.integers(1, 9)), int(rng.integers(1, 4))
    more: dict[str, Any] = {}
    if family in ("Mistral", "Gemma3"):
        more["sliding_window"] = int(rng.integers(1, 100))
    if family == "Gemma3":
        two = ["full_attention", "sliding_attention"]
        more["layer_types"] = [str(rng.choice(two)) for _ in range(n_layers)]
        more["query_pre_attn_scalar"] = int(rng.integers(1, 300))
        more["final_logit_softcapping"] = [None, 20.0][rng.integers(2)]
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        **more,
        hidden_size=heads * int(rng.integers(1, 150 // heads + 2)),
        intermediate_size=int(rng.integers(3, 200)),
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * int(rng.integers(1, 25)),
        vocab_size=int(rng.integers(5, 300)),
        max_position_embeddings=512,
        tie_word_embeddings=bool(rng.integers(2)),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomise(model, int(rng.integers(1 << 30)))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:  # what leaves a layer is about as large as what enters it
            wide = "embed" in name or "lm_head" in name
            parameter.data *= 4 / np.sqrt(1 if wide else parameter.shape[1])
    return model.bfloat16().float().eval()


def random_plan(shape: ModelShape, t: int, rng: np.random.Generator) -> Plan:
    """A valid Plan that uses all of every field's range."""
    size = (t, shape.n_layers)
    places = np.arange(t, dtype=np.int32)[:, None]
    visible = np.broadcast_to(visible_blocks(places, shape.layer_windows), size)
    channels = []
    for width in shape.site_widths:
        count = rng.integers(1, width + 1, size)
        count = np.where(rng.random(size) < 0.3, width, count)
        channels.append(np.where(rng.random(size) < 0.1, 1, count))
    bits = rng.choice(np.array([16, 8, 4, 3, 2], np.int32), (*size, 4))
    some = rng.integers(np.minimum(visible, 2), visible + 1)
    survivors = rng.integers(1, shape.vocabulary + 1, t)
    return Plan.of(
        channels=np.stack(channels, axis=-1).astype(np.int32),
        bits=bits if shape.stored_bits and rng.integers(2) else np.full_like(bits, 16),
        ffn=rng.choice(np.array([0, 1, 2], np.int32), size, p=[0.1, 0.2, 0.7]),
        attention=rng.choice(np.array([0, 1], np.int32), size, p=[0.2, 0.8]),
        kv_blocks=np.where(rng.random(size) < 0.3, visible, some).astype(np.int32),
        head=np.where(rng.random(t) < 0.5, 0, survivors).astype(np.int32),
    )


def random_small(engine: Engine, rng: np.random.Generator, *, ffn: bool) -> SmallModule | None:
    """Low-rank maps, a small FFN where one may stand, or nothing."""
    shape = engine.shape
    small: SmallModule | None = None
    match rng.integers(3 if ffn else 2):
        case 1:
            small = LowRankMaps(shape.n_layers, shape.width, int(rng.integers(1, 7)))
        case 2:
            form = {"activation": engine.config.activation, "gated": shape.gated}
            units = int(rng.integers(1, shape.ffn_width + 20))
            small = SmallFfn(shape.n_layers, shape.width, units, **form)
    if small is not None:
        randomise(small, int(rng.integers(1 << 30)))
        if isinstance(small, SmallFfn) and rng.integers(2):
            round_to_codes(small)
    return small


def random_method(engine: Engine, rng: np.random.Generator) -> Replay:
    """A Plan, and small modules or none."""
    ffn, attention = (random_small(engine, rng, ffn=ffn) for ffn in (True, False))
    summary = str(rng.choice(["mean", "bounds"]))
    spread = random_spread(engine.shape, rng) if rng.integers(2) else ()
    return Replay(
        random_plan(engine.shape, LONGEST + 20, rng),
        StandIns(
            ffn=ffn,
            attention=attention,
            summary=summary,
            spread=spread,
            nearest=int(rng.integers(1, 6)),
        ),
    )


@contextmanager
def without_native(disabled: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if disabled:
            patch.setattr(core, "available", lambda: False)
        yield


def evict(sequence: Sequence, rng: np.random.Generator) -> None:
    """Drop some complete blocks, or entries, of some layers: of each KV head its own.

    Heads that held as many do so afterwards in some layers, and not in others.
    """
    cache = sequence.cache
    for layer in np.nonzero(cache.windows == 0)[0].tolist():
        if rng.random() < 0.3:
            continue
        complete = [entries[: len(entries) // BLOCK * BLOCK] for entries in cache.held(layer)]
        scattered, alike = rng.random(2) < 0.3
        shares = rng.choice([0.1, 0.7, 0.9, 1.0], len(complete))
        if alike:
            shares[:] = shares[0]
        kept = []
        for entries, share in zip(complete, shares, strict=True):
            n = len(entries) // BLOCK
            stays = int(share * n)
            if scattered:
                chosen = entries[np.sort(rng.permutation(BLOCK * n)[: BLOCK * stays])]
            else:
                chosen = entries.reshape(n, BLOCK)[np.sort(rng.permutation(n)[:stays])].ravel()
            kept.append(chosen)
        cache.compact(layer, kept)


@dataclass
class Case:
    """A model in both engines, on the same pages, and sequences of random lengths."""

    engine: Engine
    other: Engine
    sequences: list[Sequence]
    rng: np.random.Generator

    @classmethod
    def draw(cls, seed: int) -> "Case":
        rng = np.random.default_rng(seed)
        model = random_model(rng)
        weights = ("int4", "int8", "fp32", "bf16")[seed % 4]
        if weights in ("int4", "int8"):  # the format that a checkpoint came in may leave its mark
            model.to((torch.float32, torch.bfloat16, torch.float16)[rng.integers(3)])
        kv = str(rng.choice(["fp32", "fp16", "bf16", "int8"]))
        engine = Engine.from_model(model, weights=weights, kv=kv, kv_capacity=1 << 26)
        assert engine._native is not None
        # The decoder computes in fp32 with bf16 weights, as the general path does with fp32 ones.
        form = "fp32" if weights == "bf16" else weights
        other = Engine.from_model(model, weights=form, kv=kv, kv_capacity=1 << 26)
        other._native, other.pool = None, engine.pool
        case = cls(engine, other, [], rng)
        for _ in range(rng.integers(1, 17 if seed % 3 == 0 else 5)):
            sequence = engine.start(random_method(engine, rng))
            prompt = case.ids(int(rng.integers(0, LONGEST)))
            if prompt:
                engine.forward([(sequence, prompt)], "none")
            case.sequences.append(sequence)
        return case

    def ids(self, n: int) -> list[int]:
        return self.rng.integers(0, self.engine.shape.vocabulary, n).tolist()

    def batch(self) -> list[tuple[Sequence, list[int]]]:
        """Some of the sequences, in any order, and their next tokens."""
        order = self.rng.permutation(len(self.sequences))
        chosen = order[: self.rng.integers(1, len(order) + 1)]
        return [(self.sequences[i], self.ids(1)) for i in chosen]

    def twin(self, engine: Engine, sequence: Sequence) -> Sequence:
        """A sequence at the same place of the same Plan, with a copy of the cache."""
        twin = engine.start(sequence.method)
        twin.cache = sequence.cache.fork(sequence.length)
        return twin

    def step(self) -> list[float]:
        """Decode one token of some sequences both ways; relative differences of logits."""
        for sequence in self.sequences:
            if self.rng.random() < 0.6:
                evict(sequence, self.rng)
        batch, greedy = self.batch(), bool(self.rng.integers(2))
        beside = [(self.twin(self.other, sequence), ids) for sequence, ids in batch]
        alone = [(self.twin(self.engine, sequence), ids) for sequence, ids in batch[:1]]
        starts = [sequence.length for sequence, _ in batch]
        with without_native(bool(self.rng.integers(2))):
            general = self.other.likeliest if greedy else self.other.forward
            expected = general(beside)
        if greedy:
            found = self.engine.likeliest(batch)
            assert self.engine.likeliest(alone) == found[:1]
            differences = [float(a != b) * FAR for a, b in zip(found, expected, strict=True)]
        else:
            logits = self.engine.forward(batch)
            assert torch.equal(self.engine.forward(alone)[0], logits[0])
            differences = [
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(logits, expected, strict=True)
            ]
        for (a, _), (b, _), start in zip(batch, beside, starts, strict=True):
            plan = a.plan.tokens(start)
            assert plan.equals(b.plan)
            planned = a.method.plan.tokens(start, start + 1)
            head = planned.head if greedy and self.engine.shape.screens_head else 0 * planned.head
            assert plan.equals(planned.with_fields(head=head))
            for name in a.token_costs:
                if name != "weight_bytes" or self.engine.shape == self.other.shape:
                    assert a.token_costs[name][-1] == b.token_costs[name][-1], name
        return differences


def run(seed: int, monkeypatch: pytest.MonkeyPatch, steps: int = 4) -> list[float]:
    case, library = Case.draw(seed), core.load()
    assert library is not None
    differences: list[float] = []
    for number in range(steps):
        names = core.instruction_sets()
        library.vesicle_instructions(names[(seed + number) % len(names)].encode())
        threads = int(case.rng.integers(1, 4))
        monkeypatch.setattr(core, "threads", lambda threads=threads: threads)
        differences += case.step()
    assert all(d <= FAR for d in differences), differences  # false for NaN
    return differences


def check(differences: list[float]) -> None:
    flipped = sum(not d < NEAR for d in differences)
    assert flipped <= FLIPS * len(differences), sorted(differences)[-20:]


def test_random_models(monkeypatch: pytest.MonkeyPatch):
    check([d for seed in FAST for d in run(seed, monkeypatch)])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_random_models(monkeypatch: pytest.MonkeyPatch):
    check([d for seed in SLOW for d in run(seed, monkeypatch, steps=10)])


def test_instruction_sets_agree():
    library, differences = core.load(), list[float]()
    assert library is not None
    for seed in FAST:
        case = Case.draw(seed)
        batch = [(sequence, case.ids(1)) for sequence in case.sequences]
        results = []
        for name in core.instruction_sets():
            library.vesicle_instructions(name.encode())
            twins = [(case.twin(case.engine, sequence), ids) for sequence, ids in batch]
            results.append(torch.cat(case.engine.forward(twins)))
        for result in results[1:]:
            difference = (result - results[0]).abs().amax(1) / results[0].abs().amax(1)
            differences += difference.tolist()
    check(differences)
