"""llama.cpp on the same weights as a GGUF file, through the C interface of llama-cpp-python.

Several sequences share a batch by their sequence ids. Everything but threads and context length is
left at llama.cpp's defaults: 512 tokens a batch, 16-bit cache, its own choice of attention kernel.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as native
import numpy as np

from vesicle.bench.contenders import LLAMA_CPP, Contender
from vesicle.bench.runners.base import CHUNK, Runner
from vesicle.errors import ModelError, VesicleError
from vesicle.models.gguf_header import read_gguf_header

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"

_CACHE_BYTES = 2
"""Of a cached number: llama.cpp keeps 16-bit floats by default."""


_PROBE_TOKENS = 64
"""A prompt long enough for the matrix kernels."""

_PROBE = "import sys; from vesicle.bench.runners.llamacpp import probe; probe(sys.argv[1])"


class LlamaCppRunner(Runner):
    """A model, and a context that is made anew when another batch or length is asked for."""

    def __init__(self, contender: Contender, *, extra_layouts: bool = True) -> None:
        """Load nothing yet.

        Args:
            contender: Its settings.
            extra_layouts: Whether llama.cpp may lay weights out anew for the CPU at hand, as it
                does by default.
        """
        self._contender = contender
        self._extra_layouts = extra_layouts
        _hush()
        self._context: Any = None
        self._batch: Any = None
        self._room = (0, 0)
        self._lengths: list[int] = []
        native.llama_backend_init()

    def load(self) -> dict[str, Any]:
        """The weights, mapped from the file."""
        settings = native.llama_model_default_params()
        path = self._contender.model
        settings.use_extra_bufts = self._extra_layouts
        self._model = native.llama_model_load_from_file(path.encode(), settings)
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {path}")
        heads, kv_heads = (
            native.llama_model_n_head(self._model),
            native.llama_model_n_head_kv(self._model),
        )
        width = native.llama_model_n_embd(self._model)
        layers = native.llama_model_n_layer(self._model)
        self._kv_bytes = 2 * layers * (width // heads) * kv_heads * _CACHE_BYTES
        self._vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self._model))
        tensors = read_gguf_header(Path(path)).tensors
        # A step reads one row of an embedding that does not serve as the head as well.
        unread = {_EMBEDDING} if _HEAD in tensors else set()
        self._weight_bytes = sum(t.n_bytes for n, t in tensors.items() if n not in unread)
        note = {}
        if not self._extra_layouts:
            note = {"note": "this build's own layouts for this CPU crash here, so it runs without"}
        description = ctypes.create_string_buffer(128)
        native.llama_model_desc(self._model, description, len(description))
        return {
            **note,
            "weight_bytes": self._weight_bytes,
            "description": description.value.decode("utf-8", "replace"),
            "system": native.llama_print_system_info().decode("utf-8", "replace").strip(),
        }

    def begin(self, batch: int, length: int) -> None:
        """Clear the cache, in a new context where `batch` or `length` has changed."""
        if self._room != (batch, length):
            self._open(batch, length)
        native.llama_memory_clear(native.llama_get_memory(self._context), True)
        self._lengths = [0] * batch

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """In batches of 512 tokens, each row after the other, logits for last positions only."""
        todo = [
            (row, token, position + 1 == len(prompt))
            for row, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        found: list[int] = []
        for start in range(0, len(todo), CHUNK):
            found += self._decode(todo[start : start + CHUNK])
        return found

    def step(self, tokens: list[int]) -> list[int]:
        """One batch with a token of each sequence."""
        return self._decode([(row, token, True) for row, token in enumerate(tokens)])

    def work(self, steps: int) -> dict[str, Any]:
        """The file's tensors, and the cache as it was halfway through the steps."""
        held = sum(length - (steps - 1) / 2 for length in self._lengths)
        return {"step_bytes": self._weight_bytes + held * self._kv_bytes}

    def _open(self, batch: int, length: int) -> None:
        if self._context is not None:
            native.llama_free(self._context)
            native.llama_batch_free(self._batch)
        settings = native.llama_context_default_params()
        settings.n_ctx = batch * length
        settings.n_seq_max = batch
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_threads = settings.n_threads_batch = self._contender.threads
        self._context = native.llama_init_from_model(self._model, settings)
        if not self._context:
            raise VesicleError(f"llama.cpp cannot make room for {batch} x {length} tokens")
        self._batch = native.llama_batch_init(CHUNK, 0, 1)
        self._room = (batch, length)

    def _decode(self, items: list[tuple[int, int, bool]]) -> list[int]:
        """Run (row, token, whether its logits are wanted); the likeliest token where they are."""
        batch = self._batch
        batch.n_tokens = len(items)
        for i, (row, token, wanted) in enumerate(items):
            batch.token[i] = token
            batch.pos[i] = self._lengths[row]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = wanted
            self._lengths[row] += 1
        status = native.llama_decode(self._context, batch)
        if status != 0:
            raise VesicleError(f"llama.cpp's decode failed with status {status}")
        found = []
        for i, (_, _, wanted) in enumerate(items):
            if wanted:
                logits = native.llama_get_logits_ith(self._context, i)
                found.append(int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()))
        return found


def load_where_it_runs(contender: Contender) -> LlamaCppRunner:
    """A runner with llama.cpp's defaults, if a process that tries them survives.

    A build for this CPU may use instructions (AMX, say) that a virtual machine's system does not
    let programs use, and is killed there. The weight layouts that need them are then left out.
    """
    tried = subprocess.run(
        [sys.executable, "-c", _PROBE, contender.model],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return LlamaCppRunner(contender, extra_layouts=tried.returncode >= 0)


def probe(path: str) -> None:
    """Read a prompt with llama.cpp's defaults; for a process of its own, which may be killed."""
    contender = Contender(name="probe", runner=LLAMA_CPP, model=path, threads=1)
    runner = LlamaCppRunner(contender)
    runner.load()
    runner.begin(1, _PROBE_TOKENS)
    runner.prefill([[1] * _PROBE_TOKENS])


_IGNORE: Any = native.llama_log_callback(lambda level, text, data: None)
"""Takes lines of llama.cpp's log, of which there are many, some in the middle of a turn."""


def _hush() -> None:
    native.llama_log_set(_IGNORE, ctypes.c_void_p(0))
