"""The GPU engine: executes Plans with Triton kernels that read a Plan in device memory.

Importing this package needs neither Triton nor a GPU; making a `GpuEngine` says in one line what is
missing.
"""

from vesicle.gpu.engine import GpuEngine, GpuSequence

__all__ = ["GpuEngine", "GpuSequence"]
