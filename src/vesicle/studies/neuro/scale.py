"""How large the study is: `debug` to see that it runs, `small` for two cores, `full` for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vesicle.scratch import DecoderSize


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of a study.

    Attributes:
        decoder: Sizes of the decoders; its context is T, tokens of a text.
        sizes: Widths and layers of the scaling study, beside those of `decoder`.
        timed: Shapes that are only timed, with random weights: by name their width, layers, heads,
            KV heads and hidden units.
        rank: Of the maps that skipped modules land on.
        batch: Texts of a step.
        base_steps: Steps that all variants have in common, dense.
        steps: Steps of each variant after them.
        seeds: Decoders on which all variants are trained.
        size_seeds: Decoders of each other size.
        dials: At which variants are executed; costs between them are interpolated.
        budgets: Shares of the dense FLOPs at which variants are compared.
        test_windows: Texts of each task to judge by.
        valid_windows: Texts of each task on which the best of N random tables is chosen.
        random_tables: N.
        oracle_windows: Test texts of each task for which an oracle searches.
        timed_tokens: Tokens that are decoded for each time that is measured.
        drawn_tokens: Tokens of a text that are drawn.
    """

    decoder: DecoderSize
    sizes: tuple[tuple[int, int], ...]
    timed: dict[str, tuple[int, int, int, int, int]]
    rank: int
    batch: int
    base_steps: int
    steps: int
    seeds: int
    size_seeds: int
    dials: tuple[float, ...]
    budgets: tuple[float, ...]
    test_windows: int
    valid_windows: int
    random_tables: int
    oracle_windows: int
    timed_tokens: int
    drawn_tokens: int

    @property
    def length(self) -> int:
        """T."""
        return self.decoder.context

    def sized(self, size: tuple[int, int] | None) -> DecoderSize:
        """The decoder of a width and a number of layers; heads keep their size."""
        own = self.decoder
        if size is None:
            return own
        width, n_layers = size
        n_kv = max(1, own.n_kv_heads * width // own.width)
        return replace(
            own,
            width=width,
            n_layers=n_layers,
            n_heads=n_kv * (own.n_heads // own.n_kv_heads),
            n_kv_heads=n_kv,
            ffn=own.ffn * width // own.width,
        )


SCALES = {
    "debug": Scale(
        decoder=DecoderSize(
            vocabulary=270, width=16, n_layers=3, n_heads=2, n_kv_heads=1, ffn=32, context=160
        ),
        sizes=((32, 3),),
        timed={"tiny": (32, 2, 2, 1, 64)},
        rank=2,
        batch=2,
        base_steps=2,
        steps=2,
        seeds=1,
        size_seeds=1,
        dials=(0.3,),
        budgets=(0.95,),
        test_windows=2,
        valid_windows=1,
        random_tables=2,
        oracle_windows=1,
        timed_tokens=2,
        drawn_tokens=40,
    ),
    "small": Scale(
        decoder=DecoderSize(
            vocabulary=1024, width=128, n_layers=6, n_heads=4, n_kv_heads=2, ffn=384, context=256
        ),
        sizes=((64, 4), (192, 6)),
        timed={
            "125M": (768, 12, 12, 12, 2048),
            "350M": (1024, 24, 16, 16, 2816),
            "1.3B": (2048, 24, 16, 16, 5632),
        },
        rank=8,
        batch=6,
        base_steps=600,
        steps=120,
        seeds=3,
        size_seeds=3,
        dials=(0.25, 0.4, 0.5, 0.6, 0.7, 0.85),
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5),
        test_windows=12,
        valid_windows=4,
        random_tables=20,
        oracle_windows=3,
        timed_tokens=32,
        drawn_tokens=160,
    ),
    "full": Scale(
        decoder=DecoderSize(
            vocabulary=16384,
            width=768,
            n_layers=12,
            n_heads=12,
            n_kv_heads=4,
            ffn=2048,
            context=1024,
        ),
        sizes=((256, 6), (512, 8), (1024, 24)),
        timed={
            "125M": (768, 12, 12, 12, 2048),
            "350M": (1024, 24, 16, 16, 2816),
            "1.3B": (2048, 24, 16, 16, 5632),
        },
        rank=32,
        batch=32,
        base_steps=20000,
        steps=3000,
        seeds=3,
        size_seeds=3,
        dials=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        budgets=(0.9, 0.8, 0.7, 0.6, 0.5),
        test_windows=48,
        valid_windows=16,
        random_tables=100,
        oracle_windows=8,
        timed_tokens=64,
        drawn_tokens=160,
    ),
}
