"""Compiles every launch of a decode step and a prefill for a GPU that need not be there.

    python -m tests.gpu.compile_only

The interpreter runs kernels as Python; this finds what only Triton's compiler refuses. A step is
walked on the CPU with launches that compile and do nothing. Run it as its own process: Triton must
not be interpreting.
"""

import inspect
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.gpu.conftest import tiny_llama
from tests.tiny import tiny_modulator
from vesicle.gpu import kernels, weights
from vesicle.gpu.engine import GpuEngine

TARGET = GPUTarget("cuda", 90, 32)  # H100
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Compiled:
    """Stands in for the kernels' module."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        function = getattr(kernels, name)

        class Launch:
            def __getitem__(_, grid: Any) -> Any:
                return lambda *args, **kwargs: self.compile(name, function, args, kwargs)

        return Launch()

    def compile(self, name: str, function: Any, args: Any, kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps",) if k in kwargs}
        bound = inspect.signature(function.fn).bind(*args, **kwargs).arguments
        signature, constants = {}, {}
        for parameter, value in bound.items():
            if isinstance(value, torch.Tensor):
                signature[parameter] = TYPES[value.dtype]
            elif parameter in kwargs:
                signature[parameter], constants[parameter] = "constexpr", value
            else:
                signature[parameter] = "fp32" if isinstance(value, float) else "i32"
        key = f"{name} {signature} {constants} {options}"
        if key not in self.seen:
            self.seen.add(key)
            source = ASTSource(function, signature, constants)
            triton.compile(source, target=TARGET, options=options)


def main() -> None:
    model, recorder = tiny_llama(), Compiled()
    for name in weights.FORMATS:
        loaded = weights.from_model(model, name, torch.device("cpu"))
        engine = GpuEngine(loaded, recorder, max_tokens=512)
        modulator = tiny_modulator(engine.shape, dtype=torch.float32)
        sequences = [engine.start(modulator, 0.5), engine.start(modulator, 0.7)]
        for sequence in sequences:
            engine.forward([(sequence, [1, 2, 3])])
        engine.forward([(sequence, [4]) for sequence in sequences])
        engine.forward([(sequences[0], [5])])
        engine.forward([(engine.start(), [6])])
    print(len(recorder.seen), "kernels compiled")


if __name__ == "__main__":
    main()
