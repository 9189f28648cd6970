"""Builds the engine's two native libraries; everything else about the package is in pyproject.toml.

Both are plain shared libraries loaded with ctypes, and both are optional: without a C++ compiler
the installation succeeds and the engine runs its PyTorch paths. `_core` runs decode steps on
threads of its own, for every instruction set that it knows. `_native` serves prefill on PyTorch's
threads: `-fopenmp` is given to the compiler alone, so that OpenMP symbols resolve at run time to
the runtime that PyTorch has loaded.
"""

from pathlib import Path

from setuptools import Extension, setup

# Not -ffast-math: it lets NaN vanish, so that a damaged model would answer, and it undoes the exact
# splitting of an argument that e^x rests on. What these three give up no result depends on.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wno-psabi"]
CORE = Path("src/vesicle/engine/core")

setup(
    ext_modules=[
        Extension(
            "vesicle.engine._native",
            sources=["src/vesicle/engine/native.cpp"],
            depends=[(CORE / "exponential.h").as_posix()],
            language="c++",
            extra_compile_args=[*FLAGS, "-fopenmp"],
            optional=True,
        ),
        Extension(
            "vesicle.engine._core",
            sources=[path.as_posix() for path in sorted(CORE.glob("*.cpp"))],
            depends=[path.as_posix() for path in sorted([*CORE.glob("*.h"), *CORE.glob("*.inc")])],
            language="c++",
            # What GCC 12 says about its own AVX-512 headers is of no use to anybody.
            extra_compile_args=[*FLAGS, "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
            extra_link_args=["-pthread"],
            optional=True,
        ),
    ]
)
