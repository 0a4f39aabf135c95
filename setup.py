"""Builds the optional library of CPU kernels for packed matrices; everything else is in pyproject.toml.

The library has a plain C interface and is loaded by ctypes: it needs no headers of torch or Python to build, and one
wheel serves every version of both. Where it cannot be compiled, the wheel is built without it, and is pure Python.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("admm_prune/csrc")


class BuildLibrary(build_ext):
    """Builds a shared library without Python's interface, under a name without Python's version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class TaggedWheel(bdist_wheel):
    """Tags the wheel by the platform where it holds the library, and for every platform where it does not."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        built = any(Path(self.bdist_dir).rglob("_packed.so"))
        self.root_is_pure = not built
        return "py3", "none", platform if built else "any"


setup(
    ext_modules=[
        Extension(
            "admm_prune.ops._packed",
            sources=[str(SOURCES / "packed.cpp")],
            depends=[str(path) for path in sorted(SOURCES.glob("*.inc"))],
            language="c++",
            # GCC 12 sees uninitialized values in its own AVX-512 header.
            extra_compile_args=["-std=c++17", "-O3", "-fno-exceptions", "-fno-rtti", "-g0", "-Wno-maybe-uninitialized"],
            extra_link_args=["-lm"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TaggedWheel},
)
