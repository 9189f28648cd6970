"""Time of whole requests at rest and below: `vesicle run`, alternating, each in its own process.

    python benchmarks/request_time.py --text FILE --prompt 1024,4096 --budget 0.7 --rounds 5

A request is a prompt of so many tokens of the text and so many new ones; its time is that to the
first token and that of the passes after it (`decode_seconds`), without loading. Every budget is one
contender, 1 is rest; `default` is the modulator's own; a name such as `0.7/all` adds `--phase all`.
Rounds go through all contenders in turn, and the ratio to rest is taken within each round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from vesicle.engine import core
from vesicle.models import Text, resolve_model


def main() -> None:
    """Print one JSON object a prompt length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, long enough")
    parser.add_argument("--prompt", default="1024", help="tokens, with commas between")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--budget", default="0.7", help="contenders beside rest")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    text = Text.from_pretrained(resolve_model(None))
    ids = text.encode(given.text.read_text(encoding="utf-8"))
    for length in (int(n) for n in given.prompt.split(",")):
        if len(ids) < length:
            parser.error(f"--text has {len(ids)} tokens; --prompt {length} needs more")
        with tempfile.TemporaryDirectory() as folder:
            prompt = Path(folder, "prompt.txt")
            prompt.write_text(text.decode(ids[:length]), encoding="utf-8")
            print(json.dumps(timed(prompt, given.new, given.budget.split(","), given.rounds)))


def timed(prompt: Path, new: int, budgets: list[str], rounds: int) -> dict[str, object]:
    """Medians over rounds, in seconds, by contender; and times over rest's."""
    contenders = ["1", *budgets]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    decoding: dict[str, list[float]] = {name: [] for name in contenders}
    shares: dict[str, dict[str, float]] = {}
    answer: dict[str, object] = {}
    for _ in range(rounds):
        for name in contenders:
            answer = run(prompt, new, name)
            seconds[name].append(answer["seconds"])
            decoding[name].append(answer["decode_seconds"])
            shares[name] = answer["shares"]
    return {
        "prompt_tokens": answer["prompt_tokens"],
        "new_tokens": answer["new_tokens"],
        "seconds": {name: round(statistics.median(s), 3) for name, s in seconds.items()},
        "decode_seconds": {name: round(statistics.median(s), 3) for name, s in decoding.items()},
        "rounds": {name: [round(x, 3) for x in s] for name, s in seconds.items()},
        "over_rest": over_rest(seconds),
        "decode_over_rest": over_rest(decoding),
        "shares": shares,
        "processor": platform.processor() or platform.machine(),
        "instructions": core.instructions(),
        "threads": core.threads(),
    }


def over_rest(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of the ratio to rest within the round."""
    rest = seconds["1"]
    return {
        name: round(statistics.median(a / b for a, b in zip(s, rest, strict=True)), 3)
        for name, s in seconds.items()
    }


def run(prompt: Path, new: int, name: str) -> dict[str, object]:
    """One request."""
    budget, _, phase = name.partition("/")
    words = ["--file", str(prompt), "--raw", "--max-new-tokens", str(new), "--json"]
    words += [] if budget == "default" else ["--budget", budget]
    words += ["--phase", phase] if phase else []
    command = [sys.executable, "-m", "vesicle", "run", *words]
    out = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    passes = len(out["tokens"]) - 1
    decode_s = passes / out["decode_tokens_per_s"] if passes > 0 else 0.0
    return {
        "seconds": out["first_token_ms"] / 1e3 + decode_s,
        "decode_seconds": decode_s,
        "prompt_tokens": out["prompt_tokens"],
        "new_tokens": len(out["tokens"]),
        "shares": {phase: part["share"] for phase, part in out["by_phase"].items()},
    }


if __name__ == "__main__":
    main()
