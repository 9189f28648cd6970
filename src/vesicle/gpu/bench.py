"""Decode time on a GPU, at rest and at a budget, beside Hugging Face; one command, one JSON file.

    python -m vesicle.gpu.bench --out gpu.json

Two models: the default one, with the shipped modulator; and a Llama of 1.3 billion random weights,
with a Plan that keeps the same share of channels everywhere. Hugging Face decodes with a static
cache, for which `generate` compiles the model. Contenders take turns, so that a busy spell hits all
of them; each warms up twice. The memory bandwidth is measured first, by copying. Without a GPU it
exits with status 2.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vesicle import __version__
from vesicle.cost import price, price_dense
from vesicle.errors import VesicleError
from vesicle.files import write_json
from vesicle.gpu.engine import GpuEngine
from vesicle.models import resolve_model
from vesicle.models.default import DEFAULT_MODEL
from vesicle.modulator import Modulator
from vesicle.plan import Dense, Method, Plan, Replay
from vesicle.shapes import ModelShape
from vesicle.terminal import one_line

MODELS = ("default", "1.3b")
_SHIPPED = Path(__file__).parents[1] / "modulators" / DEFAULT_MODEL
_WARM_UP = 2


def uniform_plan(shape: ModelShape, n_tokens: int, budget: float) -> Plan:
    """A Plan that keeps one share of channels at every site, for `budget` of the dense FLOPs.

    Raises:
        VesicleError: If the LM head and attention alone cost more.
    """
    rest, dense = Plan.rest(shape, n_tokens), price_dense(shape, n_tokens)
    best, low, high = rest, 0.0, 1.0
    for _ in range(20):
        share = (low + high) / 2
        kept = np.ceil(share * np.array(shape.site_widths)).astype(np.int32)
        plan = replace(rest, channels=np.broadcast_to(kept, rest.channels.shape).copy())
        if price(plan, shape).flops_total > budget * dense.flops_total:
            high = share
        else:
            low, best = share, plan
    if low == 0:
        raise VesicleError(f"budget is {budget}; the LM head and attention alone cost more")
    return best


def build(name: str) -> Any:
    """The Hugging Face model in bfloat16 on the GPU."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name == "default":
        folder = resolve_model(None)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return loaded.cuda().eval()
    config = LlamaConfig(
        num_hidden_layers=24,
        hidden_size=2048,
        num_attention_heads=16,
        num_key_value_heads=16,
        intermediate_size=5504,
        vocab_size=32000,
        max_position_embeddings=4096,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        random: Any = LlamaForCausalLM(config)
    return random.to(torch.bfloat16).eval()


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call, the GPU's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bandwidth() -> float:
    """Bytes per second read and written by a copy of 1 GiB: median of 20."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source)) for _ in range(22)][2:]
    return 2 * source.numel() / statistics.median(times)


def decode_ms(
    engine: GpuEngine, method: Method, prompts: list[list[int]], new: int
) -> tuple[float, int]:
    """Milliseconds per step of a batch, and bytes that the ledger says one step reads."""
    sequences = [engine.start(method) for _ in prompts]
    first = [
        int(engine.forward([(s, p)])[0].argmax()) for s, p in zip(sequences, prompts, strict=True)
    ]
    before = sum(s.cost.bytes_read for s in sequences)
    seconds = timed(lambda: engine.decode(sequences, first, new))
    read = sum(s.cost.bytes_read for s in sequences) - before
    for sequence in sequences:
        sequence.close()
    return seconds / new * 1e3, read // new


def hugging_face_ms(model: Any, prompts: list[list[int]], new: int) -> float:
    """Milliseconds per step: a long generation less a short one, which both read the prompt."""
    ids = torch.tensor(prompts, device="cuda")

    def run(tokens: int) -> float:
        return timed(
            lambda: model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                cache_implementation="static",
                pad_token_id=0,
            )
        )

    short = run(8)
    return (run(8 + new) - short) / new * 1e3


def measure(name: str, given: argparse.Namespace, bytes_per_s: float) -> list[dict[str, Any]]:
    """Records of one model: Hugging Face, and each format at rest and at the budget."""
    model = build(name)
    rng = np.random.default_rng(0)
    size = (given.batch, given.prompt)
    prompts = rng.integers(5, model.config.vocab_size, size).tolist()
    room = given.batch * (given.prompt + given.new + 64)
    runs: dict[str, Callable[[], tuple[float, int]]] = {
        "huggingface bf16": lambda: (hugging_face_ms(model, prompts, given.new), 0)
    }
    for stored in given.formats.split(","):
        engine = GpuEngine.from_model(model, weight_format=stored, max_tokens=room)
        methods: dict[str, Method] = {"rest": Dense()}
        if name == "default":
            modulator = Modulator.from_pretrained(given.modulator or _SHIPPED)
            methods[f"budget {given.budget}"] = modulator.at(given.budget)
        else:
            plan = uniform_plan(engine.shape, given.prompt + given.new, given.budget)
            methods[f"budget {given.budget}"] = Replay(plan)
        for label, method in methods.items():
            # Each loop's engine and method, not the last ones.
            def run(engine: GpuEngine = engine, method: Method = method) -> tuple[float, int]:
                return decode_ms(engine, method, prompts, given.new)

            runs[f"vesicle {stored} {label}"] = run
    taken: dict[str, list[tuple[float, int]]] = {label: [] for label in runs}
    for repeat in range(_WARM_UP + given.repeats):
        for label, call in runs.items():
            value = call()
            if repeat >= _WARM_UP:
                taken[label].append(value)
    records = []
    for label, measured in taken.items():
        times, read = [ms for ms, _ in measured], measured[0][1]
        median = statistics.median(times)
        record = {
            "model": name,
            "contender": label,
            "step_ms": {"median": median, "min": min(times), "max": max(times)},
            "tokens_per_s": given.batch * 1e3 / median,
        }
        if read and given.batch == 1:
            # Of a batch, the ledger charges weights to each token that one read serves.
            record["bytes_per_step"] = read
            record["share_of_bandwidth"] = read / (median / 1e3) / bytes_per_s
        records.append(record)
        share = record.get("share_of_bandwidth")
        print(
            f"{name:>8}  {label:<28} {median:8.3f} ms a step ({min(times):.3f} to "
            f"{max(times):.3f})" + (f", {share:.0%} of bandwidth" if share else "")
        )
    return records


def main(arguments: list[str] | None = None) -> int:
    """Measure and report; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vesicle.gpu.bench")
    parser.add_argument("--out", default="gpu_bench.json", help="JSON file to write")
    parser.add_argument("--models", default=",".join(MODELS), help="of default, 1.3b")
    parser.add_argument("--formats", default="bf16,int8,int4")
    parser.add_argument("--modulator", default=None, help="folder; the shipped one by default")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="decode steps")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise VesicleError("this benchmark needs an NVIDIA GPU, and PyTorch sees none")
        for name in given.models.split(","):
            if name not in MODELS:
                raise VesicleError(f"model is {name!r}; allowed: {', '.join(MODELS)}")
        bytes_per_s = bandwidth()
        import transformers

        record = {
            **{k: v for k, v in vars(given).items() if k != "out"},
            "gpu": torch.cuda.get_device_name(),
            "bandwidth_gb_per_s": bytes_per_s / 1e9,
            "warm_up": _WARM_UP,
            "versions": {
                "vesicle": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "cuda": torch.version.cuda,
            },
            "results": [
                r for name in given.models.split(",") for r in measure(name, given, bytes_per_s)
            ],
        }
        write_json(given.out, record)
    except VesicleError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
