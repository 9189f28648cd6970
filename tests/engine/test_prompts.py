"""Prompts as texts, chats and ids; where texts end; and what a generation tells."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.models.test_text import TEMPLATE, byte_level, save
from tests.tiny import randomise, tiny_model, tiny_modulator, tokens
from vesicle.engine import Engine, Generation, Sampling
from vesicle.engine.scheduler import Finished, Request, Scheduler
from vesicle.errors import ModelError, VesicleError
from vesicle.models import Text

CHAT = [{"role": "user", "content": "the cat?"}]
QUESTION = "the cat sat on"


def llama(**settings: Any) -> Any:
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
        vocab_size=330,
        max_position_embeddings=256,
        bos_token_id=None,
        **{"eos_token_id": None, **settings},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model, 0)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a chat template, in which nothing ends a text but `</s>`."""
    folder = tmp_path_factory.mktemp("model")
    save(folder, byte_level(), chat_template=TEMPLATE)
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, weights="fp32")


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    return Text.from_folder(folder)


@pytest.mark.parametrize("count", [-1, 2.5, "3", True, None])
def test_a_count_that_is_none_is_refused(engine: Engine, count: Any):
    with pytest.raises(VesicleError, match=r"max_new_tokens is .*; allowed: whole numbers from 0"):
        engine.generate([1, 2], max_new_tokens=count)


def test_a_prompt_beyond_the_window_is_refused_before_it_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Engine, "forward", None)
    with pytest.raises(VesicleError, match="257 tokens exceed the model's context window of 256"):
        engine.generate([5] * 257, max_new_tokens=1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "x"}, "method is 'x'; allowed: a Modulator, a Method such as"),
        ({"phases": "all"}, r"phases is 'all'; allowed: vesicle.Phases\(...\)"),
        ({"budget": "0.8"}, "budget is '0.8'; allowed: above 0, up to 1"),
        ({"budget": True}, "budget is True; allowed: above 0, up to 1"),
    ],
)
def test_what_decides_nothing_is_refused(engine: Engine, given: dict[str, Any], message: str):
    with pytest.raises(VesicleError, match=message):
        engine.start(**{"method": tiny_modulator(engine.shape), **given})


def test_a_text_is_continued_and_a_chat_is_answered(engine: Engine, text: Text):
    forms = {
        "text": (QUESTION, text.encode(QUESTION)),
        "chat": (CHAT, text.chat("the cat?")),
        "tuple": (tuple(CHAT), text.chat("the cat?")),
        "ids": ([5, 6, 7], [5, 6, 7]),
        "array": (np.array([5, 6, 7]), [5, 6, 7]),
        "tensor": (torch.tensor([5, 6, 7]), [5, 6, 7]),
    }
    for prompt, ids in forms.values():
        assert engine.encode(prompt) == ids
        expected = list(engine.stream(engine.start(), ids, max_new_tokens=6))
        assert list(engine.stream(engine.start(), prompt, max_new_tokens=6)) == expected
        generation = engine.generate(prompt, max_new_tokens=6)
        assert generation.ids == expected
        assert generation.sequence.token_ids[: len(ids)] == ids
        scheduler = Scheduler(engine, prefix_bytes=0)
        scheduler.add(Request(prompt=prompt, max_new_tokens=6))
        (end,) = (e for e in scheduler.run() if isinstance(e, Finished))
        assert end.tokens == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt has no tokens; give at least one"),
        ([], "the prompt has no tokens; give at least one"),
        (np.zeros(0, np.int64), "the prompt has no tokens; give at least one"),
        (5, "the prompt is 5; allowed: a text, token ids, or messages with role and content"),
        (["hello"], r"the prompt is \['hello'\]; allowed"),
        ([3, 2.5], r"the prompt is \[3, 2.5\]; allowed"),
        (np.array([[5, 6]]), "allowed: a text, token ids"),
        (CHAT[0], "the prompt is {.*}; allowed"),
        ([{"role": "user"}], "message 0 of the chat is"),
        ([{"role": "user", "content": "x"}, "y"], "message 1 of the chat is 'y'"),
    ],
)
def test_what_is_no_prompt(engine: Engine, prompt: Any, message: str):
    with pytest.raises(VesicleError, match=message):
        engine.generate(prompt, max_new_tokens=3)


def test_the_tokenizer_is_read_when_it_is_needed(engine: Engine, folder: Path, text: Text):
    fresh = Engine.from_pretrained(folder, weights="fp32")
    assert fresh._text is None
    assert fresh.text is fresh.text
    assert fresh.text.encode(QUESTION) == text.encode(QUESTION)


def test_an_engine_of_a_model_in_memory(text: Text):
    bare = Engine.from_model(llama())
    for attempt in (
        lambda: bare.text,
        lambda: bare.generate(QUESTION),
        lambda: bare.generate(CHAT),
        lambda: bare.generate([5], max_new_tokens=2).text,
    ):
        with pytest.raises(VesicleError, match=r"made from a model in memory and has no tokenizer"):
            attempt()
    whole = Engine.from_model(llama(), text=text)
    assert whole.generate(QUESTION, max_new_tokens=5).ids == (
        bare.generate(text.encode(QUESTION), max_new_tokens=5).ids
    )


def written(engine: Engine, **arguments: Any) -> list[int]:
    """What is written, in each way there is, which must be the same."""
    found = engine.generate([5, 6], max_new_tokens=20, **arguments).ids
    assert list(engine.stream(engine.start(), [5, 6], max_new_tokens=20, **arguments)) == found
    scheduler = Scheduler(engine, prefix_bytes=0)
    scheduler.add(Request(prompt=[5, 6], max_new_tokens=20, **arguments))
    (end,) = (e for e in scheduler.run() if isinstance(e, Finished))
    assert end.tokens == found
    assert end.reason == ("length" if len(found) == 20 else "stop")
    return found


def test_a_text_ends_where_the_model_says(folder: Path, tmp_path: Path):
    """From the configuration in memory, from the folder's files, and from the tokenizer."""
    plain = Engine.from_model(llama())
    assert plain.ends == frozenset()
    whole = written(plain)
    assert len(whole) == 20
    end = whole[7]
    first = whole[: whole.index(end)]
    of_config = Engine.from_model(llama(eos_token_id=end))
    model = llama()
    model.generation_config.eos_token_id = [end, 3]
    of_generation_config = Engine.from_model(model)
    assert of_config.ends == {end}
    assert of_generation_config.ends == {end, 3}
    for engine in (of_config, of_generation_config):
        assert written(engine) == first
        assert written(engine, stop=None) == first
        assert written(engine, stop=frozenset()) == whole
        assert written(engine, stop=()) == whole
        assert written(engine, stop=[whole[2]]) == whole[: whole.index(whole[2])]
    model.save_pretrained(tmp_path)
    without_tokenizer = Engine.from_pretrained(tmp_path, weights="fp32")
    assert without_tokenizer.ends == {end, 3}
    assert written(without_tokenizer) == first
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        without_tokenizer.generate(QUESTION)
    save(tmp_path, byte_level(), eos_token="<|user|>")
    model.save_pretrained(tmp_path)
    assert Engine.from_pretrained(tmp_path).ends == {end, 3, 2}
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "eos_token_id": 9}))
    assert Engine.from_pretrained(tmp_path).ends == {end, 3, 2, 9}


@pytest.mark.parametrize("stop", ["\n", b"a", {5: 6}, 5, ["a"]])
def test_what_ends_a_text_is_token_ids(engine: Engine, stop: Any):
    with pytest.raises(VesicleError, match=r"stop is .*; allowed: token ids, or None for the mode"):
        engine.generate([5, 6], stop=stop)
    with pytest.raises(VesicleError, match=r"stop is .*; allowed: token ids, or None for the mode"):
        Scheduler(engine).add(Request(prompt=[5, 6], stop=stop))


def test_a_generation_tells_everything(engine: Engine, text: Text):
    modulator = tiny_modulator(engine.shape, dtype=torch.float32)
    generation = engine.generate(CHAT, modulator, budget=0.6, max_new_tokens=9)
    sequence = generation.sequence
    assert generation.text == text.decode(generation.ids)
    assert generation.plan.equals(sequence.plan)
    assert generation.plan.n_tokens == len(text.chat("the cat?")) + len(generation.ids) - 1
    np.testing.assert_array_equal(generation.levels, sequence.levels)
    assert generation.cost == sequence.cost
    assert generation.dense_cost == sequence.dense_cost
    assert (
        generation.share
        == sequence.share
        == pytest.approx(generation.cost.ratio(generation.dense_cost)["flops"])
    )
    assert generation.share < 1
    assert engine.generate(CHAT, modulator, budget=1.0, max_new_tokens=9).share == 1.0
    assert engine.generate(CHAT, max_new_tokens=9, sampling=Sampling(temperature=1)).share == 1.0


def test_a_generation_is_taken_apart_as_ever(engine: Engine):
    generation = engine.generate([5, 6], max_new_tokens=4)
    ids, sequence = generation
    assert ids is generation.ids is generation[0]
    assert sequence is generation.sequence is generation[1]
    assert isinstance(generation, Generation)


def test_a_prompt_is_not_changed():
    engine = Engine.from_model(tiny_model("llama"))
    prompt = tokens(20)[0].tolist()
    before = list(prompt)
    engine.generate(prompt, max_new_tokens=3)
    assert prompt == before
