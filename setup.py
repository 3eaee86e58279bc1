"""Builds the optional CPU kernels; everything else about the package stands in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(path) for path in Path("duopool/kernels").glob("**/cpu*.cpp"))

# A plain C library with no Python in it. OpenMP's symbols stay undefined on purpose: they are resolved against the
# runtime that torch has already loaded, so that a process never runs two thread pools.
CPU_KERNELS = Extension(
    "duopool.kernels._cpu",
    sources=SOURCES,
    include_dirs=["duopool/kernels"],
    depends=[str(path) for path in Path("duopool/kernels").glob("**/*.h")],
    extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden"],
    language="c++",
    optional=True,
)

setup(ext_modules=[CPU_KERNELS] if SOURCES else [])
