"""Packaging: each top-level folder is a subpackage of the `internvl_edge` namespace.

`internvl_edge` itself has no folder and no `__init__.py`: it is a PEP 420 namespace, so the folder
names at the root are the import suffixes (`runtime/` is `internvl_edge.runtime`).
Metadata and tool settings are in pyproject.toml.
"""

from setuptools import find_packages, setup

ROOMS = ("bundle", "kernels", "runtime", "export", "calib_data", "bench", "cli")
EXAMPLES = ["examples.tiny_ocr"]

folders = find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)]) + EXAMPLES

setup(
    packages=[f"internvl_edge.{name}" for name in folders],
    package_dir={f"internvl_edge.{name}": name.replace(".", "/") for name in folders},
    package_data={
        "*": ["py.typed"],
        "internvl_edge.bench.answers": ["receipts.json"],
        "internvl_edge.bench.common": ["*.schema.json"],
        "internvl_edge.runtime.backends": ["probes/*.onnx"],
        "internvl_edge.kernels": ["*.cu", "*.cuh", "*.cpp", "*.h", "RESOURCES.md"],
        "internvl_edge.kernels.attention": ["*.cpp", "*.h"],
        "internvl_edge.kernels.blocks": ["*.cpp", "*.h"],
        "internvl_edge.kernels.vision": ["*.cpp", "*.h"],
        "internvl_edge.kernels.operators": ["*.cpp", "*.h", "*.so"],
        "internvl_edge.examples.tiny_ocr": ["bundle/*", "checkpoint/*", "receipt.*"],
    },
)
