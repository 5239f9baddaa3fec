"""Programs that own the CUDA context, the stream and the picture, and ask the runtime."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internvl_edge.runtime import InternVL

QUESTION = "How many lanterns are there?"
TOKENS = 8

Load = Callable[[Any], InternVL]  # takes the caller's stream


def answer_in_torch(load: Load, pixels: NDArray[np.uint8], *, own_stream: bool) -> list[int]:
    """Ask about a picture that torch is late to make and overwrites at once."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    model = load(stream if own_stream else None)
    with torch.cuda.stream(stream):
        image = torch.zeros(pixels.shape, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(50_000_000)
        image.copy_(torch.from_numpy(pixels), non_blocking=True)
        reply = model.generate(QUESTION, [image], max_new_tokens=TOKENS)
        image.zero_()
    assert torch.ones(3, device="cuda").sum().item() == 3  # torch's context is as it was
    return reply.token_ids


def answer_in_pycuda(load: Load, pixels: NDArray[np.uint8], *, primary: bool) -> list[int]:
    """Ask from the device's primary context (pycuda.autoprimaryctx) or one of PyCUDA's own."""
    driver = pytest.importorskip("pycuda.driver", reason="no PyCUDA here")
    driver.init()
    device = driver.Device(0)
    if primary:
        context = device.retain_primary_context()
        context.push()
    else:
        context = device.make_context()  # current from here on
    try:
        return _answer_on_pycudas_stream(load, pixels)
    finally:
        gc.collect()  # the model's memory goes before its context
        context.pop()
        context.detach()


def _answer_on_pycudas_stream(load: Load, pixels: NDArray[np.uint8]) -> list[int]:
    from pycuda import driver, gpuarray

    stream = driver.Stream()
    model = load(stream)
    image = gpuarray.to_gpu_async(pixels, stream=stream)
    reply = model.generate(QUESTION, [image], max_new_tokens=TOKENS)
    np.testing.assert_array_equal(image.get(), pixels)  # PyCUDA's context is as it was
    return reply.token_ids
