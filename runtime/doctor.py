"""The `doctor` command: what this machine runs with, and what each optional part lacks.

What a user pastes into a bug report: nothing in it names the user, or a path.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any, get_args

from internvl_edge.bundle.errors import DeviceError
from internvl_edge.kernels.build import BuildError, cpu_library
from internvl_edge.kernels.cpu import cpu_features
from internvl_edge.runtime.backends.attention import ATTENTION
from internvl_edge.runtime.backends.blocks import BLOCKS
from internvl_edge.runtime.backends.machine import cpu_name
from internvl_edge.runtime.backends.ort import TELEMETRY_OFF, TRIED, is_tried, load_onnxruntime
from internvl_edge.runtime.backends.own_kernel import own_kernel
from internvl_edge.runtime.backends.products import FORMS, Product, exact_form, wrong_products
from internvl_edge.runtime.backends.tower import tower_kernel
from internvl_edge.runtime.free_memory import available_memory

Report = dict[str, Any]

DISTRIBUTION = "internvl-edge"
#: Packages that the runtime imports.
PACKAGES = ("numpy", "onnxruntime", "pillow", "sentencepiece")


def examine() -> Report:
    """Describe this machine and installation; plain values, ready for JSON."""
    return {
        "version": _version(DISTRIBUTION) or "not installed",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {
            "name": cpu_name(),
            "cores": os.cpu_count(),
            "features": " ".join(cpu_features()),
            "memory_free_bytes": available_memory(),
        },
        "packages": {name: _package(name) for name in PACKAGES},
        "onnxruntime": _onnxruntime(),
        "products": _products(),
        "kernels": {
            "tiling": _tiling(),
            "block_products": str(own_kernel(BLOCKS)),
            "attention": str(own_kernel(ATTENTION)),
            "vision": str(tower_kernel()),
        },
        "devices": {
            "cpu": "ready",
            "cuda": _reason(_open_cuda),
            "tensorrt": _reason(_open_engines),
        },
        "extras": _extras(),
    }


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _package(name: str) -> str:
    version = _version(name) or _version(f"{name}-gpu") or "not installed"
    if name == "onnxruntime" and not is_tried(version):
        return f"{version}, not tried ({TRIED[0]} to {TRIED[1]} were)"
    return version


def _onnxruntime() -> Report:
    ort = load_onnxruntime()
    telemetry = "off" if os.environ.get(TELEMETRY_OFF) == "1" else f"as {TELEMETRY_OFF} says"
    return {
        "providers": ", ".join(ort.get_available_providers()),
        "telemetry": telemetry,
    }


def _products() -> Report:
    """Say which form each integer product takes here, and in which it is inexact."""
    report: Report = {}
    for product in get_args(Product):
        inexact = [form.name for form in FORMS if wrong_products(form, [product])]
        try:
            report[product] = exact_form((product,)).name
        except DeviceError:
            report[product] = "no exact form"
        if inexact:
            report[product] += f" (inexact: {', '.join(inexact)})"
    return report


def _tiling() -> str:
    try:
        cpu_library()
    except BuildError as error:
        return f"Pillow, exact and slower ({str(error).splitlines()[0]})"
    return "compiled for this CPU"


def _reason(opened: Callable[[], str]) -> str:
    """Return what is opened, or why there is none."""
    try:
        return opened()
    except DeviceError as error:
        return f"not available: {error.message}"


def _open_cuda() -> str:
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.sessions import check_provider

    check_provider("cuda")
    return Cuda.open().name


def _open_engines() -> str:
    from internvl_edge.runtime.backends.cuda import Cuda
    from internvl_edge.runtime.backends.tensorrt_library import Library

    library = Library.open()
    return f"{library.module.__name__} {library.module.__version__}, {Cuda.open().name}"


def _extras() -> Report:
    """Say for each extra whether its packages are there; which are not."""
    needed = _requirements()
    return {
        extra: f"lacks {', '.join(lacking)}"
        if (lacking := _lacking(extra, needed))
        else "installed"
        for extra in sorted(needed)
    }


def _requirements() -> dict[str, list[str]]:
    """Return by extra the packages it brings; other extras of ours as `internvl-edge[name]`."""
    needed: dict[str, list[str]] = {}
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires(DISTRIBUTION) or ():
            package = re.match(r"[\w.-]+(\[[\w,-]+\])?", line)
            extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
            if package and extra:
                needed.setdefault(extra[1], []).append(package[0])
    return needed


def _lacking(extra: str, needed: Mapping[str, list[str]]) -> list[str]:
    """Return the packages of an extra, and of those it includes, that are not installed."""
    lacking: set[str] = set()
    for package in needed.get(extra, ()):
        name, _, included = package.rstrip("]").partition("[")
        if name != DISTRIBUTION:
            lacking |= {name} if _version(name) is None else set()
            continue
        for other in included.split(","):
            lacking.update(_lacking(other, needed))
    return sorted(lacking)
