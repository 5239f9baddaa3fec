"""The process that builds one graph: how it ends, and the timings it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builder import needs_builder

from internvl_edge.export.tensorrt import builder as engine_builder
from internvl_edge.export.tensorrt.builder import Request, build_in_process
from internvl_edge.runtime import ExportError


def test_a_builder_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("tensorrt_rtx", "graph.onnx", {}, 80, 1, (), None, "plan")
    monkeypatch.setattr(engine_builder, "sys", SimpleNamespace(executable="/bin/false"))
    with pytest.raises(ExportError, match="tensorrt_rtx ended with status 1"):
        build_in_process(request, b"", lambda *_: None)


@needs_builder
def test_a_graph_rtx_does_not_take(tmp_path: Path) -> None:
    request = Request(
        "tensorrt_rtx", "graph.onnx", {}, 80, 1 << 30, (), None, str(tmp_path / "plan")
    )
    with pytest.raises(ExportError, match="does not build it"):
        build_in_process(request, b"no graph", lambda *_: None)
    assert not (tmp_path / "plan").exists()


@dataclass
class TimingConfig:
    """The part of a builder's configuration that keeps timings; `here` are the ones it takes."""

    here: bytes
    taken: list[bytes] = field(default_factory=list)

    def create_timing_cache(self, content: bytes) -> Any:
        return SimpleNamespace(content=content, serialize=lambda: content + b" and more")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch  # timings of another GPU would choose the wrong kernels
        if cache.content in (b"", self.here):
            self.taken.append(cache.content)
            return True
        return False


@pytest.mark.parametrize(("stored", "taken"), [(None, b""), (b"mine", b"mine"), (b"other", b"")])
def test_timings_are_read_and_kept(tmp_path: Path, stored: bytes | None, taken: bytes) -> None:
    path = tmp_path / "timing" / "a.cache"
    if stored is not None:
        path.parent.mkdir()
        path.write_bytes(stored)
    config = TimingConfig(b"mine")
    cache = engine_builder._timing_cache(config, str(path))
    assert config.taken == [taken]
    engine_builder._keep(cache, str(path))
    assert [file.name for file in path.parent.iterdir()] == ["a.cache"]
    assert path.read_bytes() == taken + b" and more"
