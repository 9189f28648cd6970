"""Neural Attention Memory Models: a tiny evolved network decides which KV entries stay.

Noradrenaline, the transmitter of memory (Cetin et al., "An Evolved Universal Transformer Memory",
2024, arXiv:2410.13166).
"""

from vesicle.namm.method import NammMemory
from vesicle.namm.model import Namm, NammSettings

__all__ = ["Namm", "NammMemory", "NammSettings"]
