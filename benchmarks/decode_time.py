"""Decode time against the ledger's bytes: the same engine at rest and at a budget, taking turns.

    python benchmarks/decode_time.py --budget 0.7 --out results/decode_time.json

For each repeat a fresh sequence reads the prompt, then `--new` tokens are decoded one by one (the
same tokens for both), and the median step is taken. Rest and budget alternate, so that a busy spell
hits both. Prints and writes medians, spread and both ratios.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import vesicle
from vesicle.cost import Cost
from vesicle.engine import Engine, Sequence
from vesicle.files import write_json
from vesicle.models import Text, resolve_model
from vesicle.plan import Dense, Method

PROMPT = (
    "Summarize the following text: The Industrial Revolution, which took place from the 18th to "
    "19th centuries, was a period during which predominantly agrarian, rural societies in Europe "
    "and America became industrial and urban. Prior to the Industrial Revolution, which began in "
    "Britain in the late 1700s, manufacturing was often done in people's homes, using hand tools "
    "or basic machines. Industrialization marked a shift to powered, special-purpose machinery, "
    "factories and mass production. "
)


def decode(
    engine: Engine, method: Method, prompt: list[int], tokens: list[int]
) -> tuple[float, float, int]:
    """Median milliseconds per step, prefill seconds, and bytes read per step by the ledger."""
    sequence: Sequence = engine.start(method)
    start = time.perf_counter()
    engine.forward([(sequence, prompt)])
    prefill_s = time.perf_counter() - start
    before: Cost = sequence.cost
    steps_ms = []
    for token in tokens:
        start = time.perf_counter()
        engine.forward([(sequence, [token])])
        steps_ms.append((time.perf_counter() - start) * 1e3)
    read = sequence.cost.bytes_read - before.bytes_read
    return statistics.median(steps_ms), prefill_s, read // len(tokens)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--modulator", default=None, help="folder; the shipped one by default")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=None, help="JSON file to write")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    folder = resolve_model(None)
    text, engine = Text.from_folder(folder), Engine.from_pretrained(folder)
    modulator = (
        vesicle.Modulator.from_pretrained(given.modulator)
        if given.modulator
        else vesicle.load_default_modulator()
    )
    ids = (text.encode(PROMPT) * 100)[: given.prompt_tokens]
    tokens, _ = engine.generate(ids, max_new_tokens=given.new)
    methods = {"rest": Dense(), "budget": modulator.at(given.budget)}
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in methods}
    for repeat in range(given.repeats + 1):
        for name, method in methods.items():
            measured = decode(engine, method, ids, tokens)
            if repeat:  # the first round warms up
                runs[name].append(measured)
    steps = {name: [r[0] for r in values] for name, values in runs.items()}
    bytes_read = {name: values[0][2] for name, values in runs.items()}
    time_ratio = statistics.median(
        b / a for a, b in zip(steps["rest"], steps["budget"], strict=True)
    )
    bytes_ratio = bytes_read["budget"] / bytes_read["rest"]
    record = {
        "budget": given.budget,
        "prompt_tokens": len(ids),
        "new_tokens": len(tokens),
        "repeats": given.repeats,
        "threads": given.threads,
        "omp_wait_policy": os.environ["OMP_WAIT_POLICY"],
        "dtype": "float32",
        "decode_step_ms": {
            name: {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for name, values in steps.items()
        },
        "prefill_tokens_per_s": {
            name: len(ids) / statistics.median(r[1] for r in values)
            for name, values in runs.items()
        },
        "bytes_read_per_token": bytes_read,
        "bandwidth_gb_per_s": {
            name: bytes_read[name] / statistics.median(values) / 1e6
            for name, values in steps.items()
        },
        "time_ratio": time_ratio,
        "bytes_ratio": bytes_ratio,
        "time_over_bytes": time_ratio / bytes_ratio,
        "versions": {
            "vesicle": vesicle.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if given.out:
        write_json(given.out, record)
    for name in methods:
        step = record["decode_step_ms"][name]
        print(
            f"{name:>7}: {step['median']:.2f} ms a token ({step['min']:.2f} to {step['max']:.2f}), "
            f"{bytes_read[name] / 1e6:.1f} MB read a token"
        )
    print(
        f"time ratio {time_ratio:.3f}, bytes ratio {bytes_ratio:.3f}, "
        f"time / bytes {time_ratio / bytes_ratio:.3f}"
    )


if __name__ == "__main__":
    main()
