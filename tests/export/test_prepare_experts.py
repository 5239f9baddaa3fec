"""Experts are mapped as they are by our own operator; where it is not, ONNX Runtime's packs them,
and they are mapped once prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrating import few_items
from checkpoints import write_checkpoint
from decoders import EXPERTS, decoder_config
from loaded_memory import anonymous_bytes

from internvl_edge.bundle.contract import LANGUAGE_GRAPH
from internvl_edge.bundle.manifest import Bundle, open_bundle
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.checkpoint.names import language_shapes
from internvl_edge.export.prepare.prepare import prepare_bundle
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.backends import own_kernels
from internvl_edge.runtime.backends.blocks import NO_KERNEL, bundle_kernel
from internvl_edge.runtime.backends.own_kernels import mapped_graphs
from internvl_edge.runtime.backends.prepared import find_prepared, packed_graphs
from internvl_edge.runtime.memory import MemoryPlan, plan_memory

pytestmark = pytest.mark.slow(seconds=3)

IDS = [1, 5, 9, 200, 17, 3]
LARGE = {
    "hidden_size": 512,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_hidden_layers": 5,
}


@pytest.fixture(params=["int4", "int8"], scope="module")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of experts that are large enough to be mapped."""
    config = decoder_config(EXPERTS["qwen3 moe"] | LARGE, (8, 2))
    folder = tmp_path_factory.mktemp("experts")
    checkpoint = write_checkpoint(folder / "model", config)
    options = QuantOptions(naive=True)
    with few_items():
        return export_bundle(
            checkpoint,
            folder / "bundle",
            vision="int8",
            language=request.param,
            options=options,
            sensitivity=False,
        )


def test_they_are_mapped_as_they_are(bundle: Path) -> None:
    """And nothing of them is planned, nor to be prepared."""
    opened = open_bundle(bundle)
    if bundle_kernel(opened).library is None:
        pytest.skip("ONNX Runtime packs all of the decoder here")
    experts, taken = expert_bytes(opened), anonymous_bytes(bundle)
    assert experts > 30e6
    assert taken < 0.3 * experts
    planned = planned_memory(opened, prepared=False)
    assert planned.language_weights == 0
    assert taken < planned.sessions + planned.vision_weights
    assert LANGUAGE_GRAPH not in packed_graphs(opened)


def test_without_our_operator_the_same_results_from_less_memory_once_prepared(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and of four bits near those of ours, which rounds inputs to eight."""
    ours = InternVL.load(bundle, device="cpu", threads=1).logits(IDS)
    monkeypatch.setattr(own_kernels, "bundle_kernel", lambda bundle: NO_KERNEL)
    plain = InternVL.load(bundle, device="cpu", threads=1)
    folder = prepare_bundle(bundle, overwrite=True)
    assert LANGUAGE_GRAPH in {path.name for path in folder.iterdir()}
    packed = InternVL.load(bundle, device="cpu", threads=1)
    assert find_prepared(open_bundle(bundle)) == folder
    assert packed.engine.backend.prepared
    np.testing.assert_array_equal(packed.logits(IDS), plain.logits(IDS))
    asked: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    assert packed.generate("Hello", **asked).token_ids == plain.generate("Hello", **asked).token_ids
    assert np.linalg.norm(ours - plain.logits(IDS)) < 0.05 * np.linalg.norm(ours)


def expert_bytes(bundle: Bundle) -> int:
    spec = bundle.spec.language
    decoder = bundle.manifest.parts["decoder_linears"].bytes
    return decoder * spec.expert_weights // spec.linear_weights


def planned_memory(bundle: Bundle, *, prepared: bool) -> MemoryPlan:
    return plan_memory(
        bundle.manifest,
        tokens=64,
        tiles=1,
        prepared=prepared,
        low_memory=False,
        mapped=mapped_graphs(bundle),
    )


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"num_experts": 4, "num_experts_per_tok": 4},
        {"decoder_sparse_step": 2, "num_hidden_layers": 4},
    ],
    ids=str,
)
def test_weights_are_counted(changed: dict[str, Any]) -> None:
    """As tensors have them; of a token's experts as many as it goes through."""
    spec = parse_config(decoder_config(EXPERTS["qwen3 moe"] | changed, (8, 2))).language
    sizes = {name: int(np.prod(shape)) for name, shape in language_shapes(spec).items()}

    def total(*ends: str) -> int:
        return sum(size for name, size in sizes.items() if name.endswith(ends))

    experts = total("experts_gated.weight", "experts_down.weight")
    others = total(".qkv.weight", ".out.weight", ".gate.weight", ".up.weight", ".down.weight")
    assert spec.expert_weights == experts
    assert spec.linear_weights == experts + others
    share = (spec.experts_per_token or 0) / (spec.experts or 1)
    assert spec.token_weights == others + share * experts


def test_without_experts_a_token_goes_through_all() -> None:
    spec: LanguageSpec = parse_config(
        decoder_config({"architectures": ["LlamaForCausalLM"]}, (4, 2))
    ).language
    assert spec.expert_weights == 0
    assert spec.token_weights == spec.linear_weights
