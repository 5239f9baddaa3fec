"""Packaging: each top-level folder is a subpackage of the `internvl_edge` namespace.

`internvl_edge` itself has no folder and no `__init__.py`: it is a PEP 420 namespace, so the folder
names at the root are the import suffixes (`runtime/` is `internvl_edge.runtime`).
Metadata and tool settings are in pyproject.toml.
"""

from setuptools import setup

SUBPACKAGES = (
    "calib_data",
    "export",
    "export.dialects",
    "runtime",
    "runtime.backends",
    "kernels",
    "bench",
    "bench.peers",
    "examples.tiny_ocr",
)

setup(
    packages=[f"internvl_edge.{name}" for name in SUBPACKAGES],
    package_dir={f"internvl_edge.{name}": name.replace(".", "/") for name in SUBPACKAGES},
    package_data={
        "*": ["py.typed"],
        "internvl_edge.bench": ["*.schema.json"],
        "internvl_edge.runtime": ["probes/*.onnx"],
        "internvl_edge.kernels": ["*.cu", "*.cuh", "*.cpp", "*.h", "RESOURCES.md"],
        "internvl_edge.examples.tiny_ocr": ["checkpoint/*", "receipt.*"],
    },
)
