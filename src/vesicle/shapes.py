"""The sizes that costs depend on: of a decoder, and of what a method adds to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        n_layers: L.
        width: D, the residual stream.
        n_heads: H, query heads.
        n_kv_heads: G, key-value heads.
        head_size: K.
        ffn_width: F.
        gated: Whether the FFN has a gate projection beside the up projection.
        vocabulary: Rows of the LM head.
        weight_bytes: Bytes of one stored weight at rest.
        kv_bytes: Bytes of one cached number.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    ffn_width: int
    gated: bool
    vocabulary: int
    weight_bytes: int = 4
    kv_bytes: int = 4

    @property
    def query_width(self) -> int:
        """HK."""
        return self.n_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """GK."""
        return self.n_kv_heads * self.head_size

    @property
    def site_widths(self) -> tuple[int, int, int, int]:
        """Input channels at the four sites, in the order of `plan.SITES`."""
        return (self.width, self.query_width, self.width, self.ffn_width)

    @property
    def site_outputs(self) -> tuple[int, int, int, int]:
        """Outputs fed by one input channel at each site."""
        return (
            self.query_width + 2 * self.kv_width,
            self.width,
            self.ffn_width * (2 if self.gated else 1),
            self.width,
        )

    def fingerprint(self) -> dict[str, int | bool]:
        """What a modulator must match to fit a model: everything but the number formats."""
        sizes: dict[str, int | bool] = asdict(self)
        del sizes["weight_bytes"], sizes["kv_bytes"]
        return sizes


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """The work that a method adds to the model.

    Attributes:
        modulator_flops: Of the predictor, per token and layer.
        modulator_bytes: Predictor weights read, per token and layer.
        ffn_standin_rank: Inner width of the small FFN; it costs 4 D rank FLOPs.
        attention_standin_rank: The same for the attention stand-in.
        selection_vectors: Summary vectors per block read to choose blocks (1 mean, 2 bounds).
    """

    modulator_flops: int = 0
    modulator_bytes: int = 0
    ffn_standin_rank: int = 0
    attention_standin_rank: int = 0
    selection_vectors: int = 1
