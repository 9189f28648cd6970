"""A tiny model folder, a stream of ids, and workers that take no time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.tiny import randomise
from vesicle.bench.process import WorkerError, WorkerTimeout
from vesicle.bench.prompts import Stream

WINDOW = 128


@pytest.fixture(scope="session")
def bench_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("bench-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate([*alphabet, "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=len(vocabulary),
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary["</s>"],
        pad_token_id=None,
    )
    network = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
    randomise(network, 0)
    network.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


@pytest.fixture
def stream() -> Stream:
    """4,000 ids that do not repeat."""
    return Stream(ids=tuple(range(4000)), description="numbers", sha256="0" * 64)


class FakeWorker:
    """Answers as a worker does, from a table of speeds, and takes no time.

    Attributes:
        log: Names and requests of all workers, in the order they were asked.
        failures: What to raise each time it is asked to measure; None to measure.
    """

    def __init__(self, name: str, log: list[tuple[str, dict[str, Any]]]) -> None:
        self.name, self.log = name, log
        self.running, self.closed = True, False
        self.speed_s = {"rest": 0.010, "budget": 0.008, "llamacpp": 0.020}.get(name, 0.040)
        self.failures: list[BaseException | None] = []

    def ask(self, timeout_s: float | None = None, **request: Any) -> dict[str, Any]:
        assert not self.closed
        self.log.append((self.name, request))
        if request["do"] == "bandwidth":
            return {"read_gb_per_s": 20.0, "small_read_gb_per_s": 30.0, "buffer_bytes": 1 << 30}
        if request["do"] == "load":
            facts = {"weight_bytes": 100}
            return {"facts": facts, "start_bytes": 1_000, "loaded_bytes": 2_000}
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            self.running = not isinstance(failure, WorkerTimeout)
            raise failure
        rows, prompt = request["rows"], request["prompt_tokens"]
        return {
            "prefill_s": self.speed_s * prompt,
            "steps_s": [self.speed_s] * (len(rows[0]) - prompt - 1),
            "greedy": [row[prompt:] for row in rows],
            "step_bytes": 1e6,
            "peak_bytes": 5_000,
            "cpu_s": 0.0,
        }

    def __enter__(self) -> "FakeWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed, self.running = True, False


class Workshop:
    """Starts fake workers and remembers them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.workers: list[FakeWorker] = []
        self.prepare: Callable[[FakeWorker], None] = lambda worker: None

    def start(self, name: str, environment: dict[str, str]) -> Any:
        worker = FakeWorker(name, self.log)
        self.prepare(worker)
        self.workers.append(worker)
        return worker

    def turns(self, prompt_tokens: int) -> list[str]:
        """Who measured prompts of this length, in order."""
        return [
            name
            for name, request in self.log
            if request["do"] == "measure" and request["prompt_tokens"] == prompt_tokens
        ]


@pytest.fixture
def workshop() -> Workshop:
    """No workers yet."""
    return Workshop()


@pytest.fixture
def crash() -> WorkerError:
    """What a worker that ended raises."""
    return WorkerError("it ended unexpectedly (signal 9)")
