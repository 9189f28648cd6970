"""The real Gemma 3 270M: five languages, windowed layers past their window, packed weights.

Not run by default: the model is a download of 238 MB under terms of its own (`make test-gemma`).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from vesicle.cost import kv_bytes_peak
from vesicle.engine import Engine
from vesicle.models import resolve_model

pytestmark = [pytest.mark.gemma, pytest.mark.timeout(1800)]
NAME = "gemma3-270m"
PROMPTS = {
    "English": (
        "The capital of France is",
        "Photosynthesis is the process by which",
        "She opened the letter with trembling hands, and",
        "The three most common causes of inflation are",
    ),
    "German": (
        "Die Hauptstadt von Österreich ist",
        "Am nächsten Morgen ging er zum Bahnhof, weil",
        "Der Unterschied zwischen einem Virus und einem Bakterium besteht darin, dass",
        "Rezept für Kartoffelsuppe. Zutaten:",
    ),
    "French": (
        "La capitale de l'Italie est",
        "Il était une fois, dans un petit village de montagne,",
        "Pour préparer une bonne omelette, il faut",
        "La Révolution française a commencé en",
    ),
    "Spanish": (
        "La capital de Perú es",
        "El agua hierve a cien grados porque",
        "Cuando llegó a casa, encontró que",
        "Los planetas del sistema solar son",
    ),
    "Japanese": (
        "日本の首都は",
        "むかしむかし、あるところに",
        "水は百度で沸騰します。なぜなら",
        "今日の天気はとても良いので、",
    ),
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    folder = resolve_model(NAME, progress=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # ends are tokens like others
    return model


@pytest.fixture(scope="module")
def exact() -> Engine:
    return Engine.from_pretrained(NAME, weights="fp32")


@pytest.fixture(scope="module")
def packed() -> Engine:
    return Engine.from_pretrained(NAME)


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    return model.generate(given, attention_mask=mask, max_new_tokens=n, do_sample=False)[0].tolist()


@pytest.mark.parametrize("language", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(model: Any, exact: Engine, language: str):
    for prompt in PROMPTS[language]:
        ids = exact.encode(prompt)
        written = exact.generate(ids, max_new_tokens=32, stop=()).ids
        assert len(written) == 32
        assert written == greedy(model, ids, 32)[len(ids) :], prompt


def essay(engine: Engine, n: int) -> list[int]:
    """Tokens of prose that does not repeat itself word for word."""
    subjects = ("The river", "A merchant", "Our neighbour", "The old engine", "Every winter storm")
    verbs = ("crossed", "forgot", "repaired", "described", "followed", "measured", "painted")
    objects = ("the bridge", "a letter", "his garden", "the northern road", "an idea", "the clock")
    text = " ".join(
        f"{subjects[i % 5]} {verbs[i * i % 7]} {objects[i * 5 % 6]} on day {i}." for i in range(n)
    )
    ids = engine.encode(text)
    assert len(ids) >= n
    return ids[:n]


def test_past_the_window(model: Any, exact: Engine):
    """Logits of a text of three windows, and tokens written behind it."""
    ids = essay(exact, 1500)
    sequence = exact.start()
    logits = torch.cat(
        [exact.forward([(sequence, ids[i : i + 500])], "all")[0] for i in range(0, 1500, 500)]
    )
    expected = model(torch.tensor([ids])).logits[0]
    assert (logits - expected).abs().max() < 5e-3
    assert exact.generate(ids, max_new_tokens=24, stop=()).ids == greedy(model, ids, 24)[1500:]


def test_packed_weights_lose_little(model: Any, packed: Engine):
    ids = essay(packed, 1200)
    assert packed.weights_format == "mixed"
    assert packed.uncovered is None
    logits = packed.forward([(packed.start(), ids)], "all")[0]
    expected = model(torch.tensor([ids])).logits[0]
    mine, theirs = (cross_entropy(x[:-1], torch.tensor(ids[1:])) for x in (logits, expected))
    assert abs(float(mine - theirs)) < 0.02


_GROWTH = """
import sys
from vesicle.engine import Engine
from vesicle.plan import ROW

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

engine = Engine.from_pretrained(sys.argv[1])
ids = [i * 7919 % 200_000 + 5 for i in range(int(sys.argv[2]))]
sequence = engine.start()
engine.forward([(sequence, ids[:256])], "last")
before = resident()
for i in range(256, len(ids), 128):
    engine.forward([(sequence, ids[i : i + 128])], "none")
rows = len(ids) * engine.shape.n_layers * ROW.itemsize
print(resident() - before, sequence.kv_bytes_peak, rows)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says")
def test_memory_of_the_process():
    """It grows by what the ledger says and the Plan's rows."""
    made = run([sys.executable, "-c", _GROWTH, NAME, "16384"], check=True, capture_output=True)
    grown, held, rows = map(int, made.stdout.split())
    assert held < grown + 10e6
    assert grown < held + rows + 15e6


def test_windowed_layers_hold_their_window(packed: Engine):
    ids = essay(packed, 3000)
    sequence = packed.start()
    for i in range(0, 3000, 128):
        packed.forward([(sequence, ids[i : i + 128])], "none")
        assert sequence.cache.bytes_held == kv_bytes_peak(sequence.plan, packed.shape)
    full = [window == 0 for window in packed.shape.windows]
    assert sum(full) == 3
    blocks = sequence.cache.n_blocks
    assert (blocks[full] == 188).all()
    assert (blocks[[not f for f in full]] <= 33).all()
    assert sequence.cost == sequence.dense_cost
