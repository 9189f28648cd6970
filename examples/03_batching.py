"""Answer several questions at once, each within its own budget, and stream the answers.

python examples/03_batching.py [MODULATOR]
"""

import sys

from vesicle import Engine, Modulator, Sampling, load_default_modulator
from vesicle.engine.scheduler import Failed, Finished, Request, Scheduler, Token

engine = Engine.from_pretrained()
text = engine.text
modulator = (
    Modulator.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else load_default_modulator()
)


def request(question: str, budget: float | None, seed: int | None = None) -> Request:
    """Dense without a budget; greedy without a seed."""
    return Request(
        prompt=[{"role": "user", "content": question}],
        method=None if budget is None else modulator,
        budget=budget,
        max_new_tokens=24,
        sampling=Sampling() if seed is None else Sampling(temperature=0.7, seed=seed),
    )


# Methods, budgets and sampling mix freely. Each answer is what it would be alone.
scheduler = Scheduler(engine, max_running=4, chunk=128)
for one in (
    request("Why is the sky blue?", budget=None),
    request("Why is the sky blue?", budget=0.9),
    request("Why is the sky red at dusk?", budget=0.9, seed=1),
    request("Name three colours.", budget=0.8),
):
    scheduler.add(one)

# Events come in the order in which things happen, so the answers are interleaved.
for event in scheduler.run():
    match event:
        case Token():
            print(f"{event.request_id}:{text.decode([event.token])}", end=" ", flush=True)
        case Failed():
            print(f"\n{event.request_id} failed: {event.error}")
        case Finished():
            print(
                f"\n{event.request_id} ended ({event.reason}): {text.decode(event.tokens)!r}\n"
                f"  {event.reused_tokens} tokens reused, {event.sequence.share:.3f} of dense FLOPs "
                "on the others"
            )

# What was read stays, for the next request that begins alike. It gives way when room is needed.
print(f"kept: {scheduler.prefixes.bytes_held:,} bytes of keys and values")
scheduler.close()
