"""How large the study is: `debug` to see that it runs, `small` for two cores, `full` for a GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of a study.

    Attributes:
        width: D of the decoders.
        n_layers: L.
        n_heads: H; half as many KV heads.
        vocabulary: Of each task's tokenizer.
        lengths: Tokens of a text, by task.
        recent: Newest positions that tiles leave alone, at least.
        batch_tokens: Tokens of a step.
        base_steps: Steps that all variants have in common, dense.
        steps: Steps of each variant after them.
        seeds: Of the compared variants, by task.
        ablation_seeds: Of the ablations.
        shares: Of dense attention's reads, at which variants are compared.
        test_windows: Most windows or texts to judge by.
        speed_lengths: Cached tokens at which attention alone is timed.
        sizes: Widths and layers of the decoders whose time is compared, at random weights.
    """

    width: int
    n_layers: int
    n_heads: int
    vocabulary: int
    lengths: dict[str, int]
    recent: int
    batch_tokens: int
    base_steps: int
    steps: int
    seeds: dict[str, int]
    ablation_seeds: int
    shares: tuple[float, ...]
    test_windows: int
    speed_lengths: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]


SCALES = {
    "debug": Scale(
        width=16,
        n_layers=2,
        n_heads=2,
        vocabulary=270,
        lengths={"lm": 192, "translation": 192, "summary": 192},
        recent=16,
        batch_tokens=384,
        base_steps=2,
        steps=2,
        seeds={"lm": 1, "translation": 1, "summary": 1},
        ablation_seeds=1,
        shares=(0.75,),
        test_windows=2,
        speed_lengths=(256, 512),
        sizes=((16, 2), (32, 2)),
    ),
    "small": Scale(
        width=128,
        n_layers=4,
        n_heads=4,
        vocabulary=1024,
        lengths={"lm": 512, "translation": 384, "summary": 512},
        recent=16,
        batch_tokens=4096,
        base_steps=500,
        steps=60,
        seeds={"lm": 3, "translation": 1, "summary": 1},
        ablation_seeds=1,
        shares=(0.5, 0.25),
        test_windows=48,
        speed_lengths=(1024, 2048, 4096, 8192, 16384, 32768),
        sizes=((128, 4), (256, 6), (576, 12)),
    ),
    "full": Scale(
        width=512,
        n_layers=12,
        n_heads=8,
        vocabulary=16384,
        lengths={"lm": 4096, "translation": 512, "summary": 4096},
        recent=64,
        batch_tokens=65536,
        base_steps=20000,
        steps=2000,
        seeds={"lm": 3, "translation": 3, "summary": 3},
        ablation_seeds=3,
        shares=(0.5, 0.25, 0.125),
        test_windows=200,
        speed_lengths=(1024, 2048, 4096, 8192, 16384, 32768),
        sizes=((256, 6), (512, 12), (1024, 24)),
    ),
}
