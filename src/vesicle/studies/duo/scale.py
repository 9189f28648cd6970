"""How large the study is: `debug` to see that it runs, `small` for two cores, `full` for more."""

from __future__ import annotations

from dataclasses import dataclass

from vesicle.scratch import DecoderSize


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of a study.

    Attributes:
        decoder: Sizes of the decoders.
        ratio: Hidden units of a big FFN for each one of a small FFN.
        batch_tokens: Tokens of a step.
        steps: Steps of stage 1, random routing.
        skip: Share of FFNs that are skipped in them.
        three: Whether the oracle that may skip FFNs is asked too.
        seeds: Decoders.
        budgets: Numbers of big FFNs at which routers and probes are compared.
        test_windows: Texts to judge by.
        valid_windows: Texts to choose fixed patterns and leans with.
        label_windows: Texts that stage 1 leaves out, on whose oracles routers and probes learn.
        router_steps: Steps of each router.
        probe_steps: Steps of each probe.
        compared_windows: Test texts on which searches are compared with the exhaustive one.
        timed_patterns: Patterns that are timed by whole passes, where fewer than all stand in.
        timed_positions: Positions that are timed by the plain definition.
    """

    decoder: DecoderSize
    ratio: int
    batch_tokens: int
    steps: int
    skip: float
    three: bool
    seeds: int
    budgets: tuple[int, ...]
    test_windows: int
    valid_windows: int
    label_windows: int
    router_steps: int
    probe_steps: int
    compared_windows: int
    timed_patterns: int
    timed_positions: int

    @property
    def length(self) -> int:
        """T + 1 tokens of a text, the last of which is only predicted."""
        return self.decoder.context

    @property
    def n_layers(self) -> int:
        """L."""
        return self.decoder.n_layers


SCALES = {
    "debug": Scale(
        decoder=DecoderSize(
            vocabulary=270, width=16, n_layers=3, n_heads=2, n_kv_heads=1, ffn=32, context=48
        ),
        ratio=8,
        batch_tokens=192,
        steps=2,
        skip=0.2,
        three=True,
        seeds=1,
        budgets=(1,),
        test_windows=3,
        valid_windows=2,
        label_windows=4,
        router_steps=2,
        probe_steps=4,
        compared_windows=1,
        timed_patterns=4,
        timed_positions=2,
    ),
    "small": Scale(
        decoder=DecoderSize(
            vocabulary=1024, width=128, n_layers=8, n_heads=4, n_kv_heads=2, ffn=512, context=256
        ),
        ratio=16,
        batch_tokens=2048,
        steps=700,
        skip=0.0,
        three=False,
        seeds=3,
        budgets=(2, 4),
        test_windows=16,
        valid_windows=8,
        label_windows=48,
        router_steps=150,
        probe_steps=120,
        compared_windows=4,
        timed_patterns=32,
        timed_positions=2,
    ),
    "full": Scale(
        decoder=DecoderSize(
            vocabulary=8192, width=512, n_layers=12, n_heads=8, n_kv_heads=4, ffn=2048, context=512
        ),
        ratio=16,
        batch_tokens=32768,
        steps=20000,
        skip=0.0,
        three=False,
        seeds=3,
        budgets=(2, 4, 6),
        test_windows=32,
        valid_windows=32,
        label_windows=96,
        router_steps=1000,
        probe_steps=300,
        compared_windows=8,
        timed_patterns=64,
        timed_positions=2,
    ),
}
