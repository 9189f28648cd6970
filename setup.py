"""Builds the engine's native kernels; everything else about the package is in pyproject.toml.

The extension is optional: without a C++ compiler the installation succeeds and the engine runs its
PyTorch path. It is a plain shared library loaded with ctypes. `-fopenmp` is given to the compiler
alone, so that OpenMP symbols resolve at run time to the runtime that PyTorch has loaded.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "vesicle.engine._native",
            sources=["src/vesicle/engine/native.cpp"],
            language="c++",
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-fopenmp",
                "-ffast-math",
                "-fno-finite-math-only",
                "-Wno-psabi",
            ],
            optional=True,
        )
    ]
)
