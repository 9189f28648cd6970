"""Builds the engine's native core; everything else about the package is in pyproject.toml.

It is a plain shared library loaded with ctypes, with threads of its own, for every instruction set
that it knows; and it is optional: without a C++ compiler the installation succeeds, a text file in
place of the library says what went wrong, and the engine runs in PyTorch. With
VESICLE_REQUIRE_NATIVE=1 the installation fails instead.
"""

import os
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Not -ffast-math: it lets NaN vanish, so that a damaged model would answer, and it undoes the exact
# splitting of an argument that e^x rests on. What these three give up no result depends on.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-Wno-psabi"]
CORE = Path("src/vesicle/engine/core")
OPTIONAL = os.environ.get("VESICLE_REQUIRE_NATIVE") != "1"
ROW = CORE / "plan_row.h"


def write_row() -> None:
    """Write the layout of a Plan's row for C++, unless it is there already."""
    header = runpy.run_path("src/vesicle/plan/layout.py", run_name="layout")["header"]()
    if not ROW.exists() or ROW.read_text(encoding="utf-8") != header:
        ROW.write_text(header, encoding="utf-8")


class Build(build_ext):
    """Leaves the reason of a failed build where the library would lie."""

    def build_extensions(self) -> None:
        """As setuptools does, with as many files at a time as there are processors."""
        one_by_one = self.compiler.compile

        def compile_all(sources: list[str], **settings: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = list(pool.map(lambda source: one_by_one([source], **settings), sources))
            return [built for part in parts for built in part]

        self.compiler.compile = compile_all
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """As setuptools does, with a note where it fails."""
        note = self._note(self.get_ext_fullpath(ext.name))
        note.unlink(missing_ok=True)
        try:
            super().build_extension(ext)
        except Exception as error:
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"{error}\n", encoding="utf-8")
            raise  # setuptools goes on where the extension is optional

    def copy_extensions_to_source(self) -> None:
        """Libraries and notes, for editable installations."""
        super().copy_extensions_to_source()
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            target, built = map(self._note, self._get_inplace_equivalent(build_py, ext))
            target.unlink(missing_ok=True)
            if built.exists():
                shutil.copy(built, target)

    @staticmethod
    def _note(library: str) -> Path:
        path = Path(library)
        return path.with_name(f"{path.name.partition('.')[0]}.failed.txt")


write_row()
setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "vesicle.engine._core",
            sources=[path.as_posix() for path in sorted(CORE.glob("*.cpp"))],
            depends=[path.as_posix() for path in sorted([*CORE.glob("*.h"), *CORE.glob("*.inc")])],
            language="c++",
            # What GCC 12 says about its own AVX-512 headers is of no use to anybody.
            extra_compile_args=[*FLAGS, "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
            extra_link_args=["-pthread"],
            optional=OPTIONAL,
        ),
    ],
)
