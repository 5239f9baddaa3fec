"""Decoder families beside transformers' own classes: random weights, shapes of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import KV8, random_state, small_config, write_checkpoint
from dialects import RUNNABLE
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from internvl_edge.export.bundle import export_bundle
from internvl_edge.export.calibration import run as calibration_run
from internvl_edge.export.calibration.decisions import QuantOptions
from internvl_edge.export.calibration.ranges import sqnr_db
from internvl_edge.export.checkpoint.config import parse_config
from internvl_edge.export.inspection import inspect_checkpoint
from internvl_edge.export.tensorrt.oracle import compare_bundles, run_bundle
from internvl_edge.runtime import CheckpointError, ExportError, InternVL

LOGIT_TOLERANCE = 2e-4
PREFIX = "language_model."

#: Of every family the decoder's config, but for sizes that it shares with the others.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama, biases": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen2, tied": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "qwen3, biases, heads of 24": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 24,
        "attention_bias": True,
    },
    "llama, heads of 8": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 8,
    },
    "internlm3": {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "head_dim": 24,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": 256,
        "pad_token_id": 0,
        "sliding_window": 256,
    },
}
#: With experts; INT8 and INT4 have an operator for ONNX Runtime only.
EXPERTS: dict[str, dict[str, Any]] = {
    name: {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "norm_topk_prob": normed,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
    }
    for name, experts, chosen, normed in (
        ("qwen3 moe", 8, 2, True),
        ("qwen3 moe, shares as they are", 8, 3, False),
        ("qwen3 moe, all chosen", 4, 4, True),
    )
}
#: Kinds of rotary embedding, with sequences that go beyond where each begins to scale.
ROTARY: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {
        "max_position_embeddings": 24,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "longrope": {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1 + i / 8 for i in range(8)],
            "long_factor": [2 + i for i in range(8)],
            "original_max_position_embeddings": 16,
        }
    },
}
#: One key head for each query head, for several, for all.
HEADS = [(4, 4), (4, 2), (7, 1)]


def decoder_config(decoder: dict[str, Any], heads: tuple[int, int]) -> dict[str, Any]:
    """A whole model's config.json with this decoder."""
    config = small_config(layers=2, vision_layers=1)
    config["llm_config"] = {
        "hidden_size": 16 * heads[0],
        "intermediate_size": 192,
        "max_position_embeddings": 256,
        "num_attention_heads": heads[0],
        "num_hidden_layers": 2,
        "num_key_value_heads": heads[1],
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": 512,
        **decoder,
    }
    return config


def reference_logits(config: dict[str, Any], ids: list[int]) -> NDArray[np.float32]:
    """Logits of every position by transformers' own class `(tokens, vocab)`."""
    state = {
        name[len(PREFIX) :]: torch.from_numpy(values)
        for name, values in random_state(config).items()
        if name.startswith(PREFIX)
    }
    decoder = dict(config["llm_config"])
    told = AutoConfig.for_model(decoder.pop("model_type"), **decoder)
    model = AutoModelForCausalLM.from_config(told, attn_implementation="eager").float().eval()
    missing, unknown = model.load_state_dict(_stacked(state, config), strict=False)
    assert set(missing) <= ({"lm_head.weight"} if told.tie_word_embeddings else set())
    assert not unknown
    model.tie_weights()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def _stacked(state: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Experts in one tensor, as transformers holds them in memory."""
    decoder = config["llm_config"]
    layers, count = decoder["num_hidden_layers"], decoder.get("num_experts", 0)
    stacked = {name: value for name, value in state.items() if ".experts." not in name}
    for layer in range(layers if count else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        if f"{prefix}0.down_proj.weight" not in state:
            continue
        parts = {
            kind: torch.stack([state[f"{prefix}{e}.{kind}_proj.weight"] for e in range(count)])
            for kind in ("gate", "up", "down")
        }
        stacked[f"{prefix}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        stacked[f"{prefix}down_proj"] = parts["down"]
    return stacked


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_logits(tmp_path: Path, name: str, heads: tuple[int, int]) -> None:
    compare_logits(tmp_path, decoder_config(DECODERS[name], heads))


def test_logits_of_internlm3_with_biases(tmp_path: Path) -> None:
    """It has none of the output, as Qwen2; transformers' own class of it refuses such a config."""
    decoder = {"head_dim": None, "qkv_bias": True, "attention_bias": True}
    config = decoder_config(DECODERS["internlm3"] | decoder, (4, 2))
    config["llm_config"]["rms_norm_eps"] = 1e-5
    same = decoder_config(DECODERS["qwen2"], (4, 2))
    same["llm_config"]["rms_norm_eps"] = 1e-5
    assert parse_config(config) == parse_config(same)
    compare_logits(tmp_path, config, reference=same)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bias", True, "'llm_config.bias' is True; supported: False"),
        ("mlp_bias", True, "'llm_config.mlp_bias' is True; supported: False"),
        ("attention_bias", True, "'llm_config.attention_bias' is True; supported: False"),
    ],
)
def test_internlm3_refuses_other_biases(key: str, value: object, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        parse_config(decoder_config(DECODERS["internlm3"] | {key: value}, (4, 2)))


@pytest.mark.parametrize("name", EXPERTS)
def test_logits_of_experts(tmp_path: Path, name: str) -> None:
    compare_logits(tmp_path, decoder_config(EXPERTS[name], (4, 2)))


@pytest.mark.parametrize("kind", ROTARY)
def test_logits_of_every_rotary_kind(tmp_path: Path, kind: str) -> None:
    compare_logits(tmp_path, decoder_config(DECODERS["llama"] | ROTARY[kind], (4, 2)))


def compare_logits(
    tmp_path: Path, config: dict[str, Any], reference: dict[str, Any] | None = None
) -> None:
    """Compare the logits of every position with transformers' own class, of `reference` if told."""
    checkpoint = write_checkpoint(tmp_path / "model", config, dtype=np.dtype(np.float32))
    bundle = export_bundle(checkpoint, tmp_path / "bundle")
    model = InternVL.load(bundle, device="cpu", threads=1, reuse_bytes=0)
    ids = np.random.default_rng(0).integers(3, 259, 40).tolist()
    expected = reference_logits(reference or config, ids)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.fixture
def few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_run, "DEFAULT_ITEMS", 2)


@pytest.mark.slow(seconds=60)
@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize("name", [*DECODERS, "qwen3 moe"])
def test_integers(tmp_path: Path, name: str) -> None:
    """Random weights lose what rounding loses, and one token at a time as much as a whole pass."""
    decoder = (DECODERS | EXPERTS)[name]
    checkpoint = write_checkpoint(tmp_path / "model", decoder_config(decoder, (8, 2)))
    exact = run_bundle(export_bundle(checkpoint, tmp_path / "float"))
    for language, least, kv in (("int8", 28, {}), ("int4", 8, {}), ("int4", 8, KV8)):
        wanted: dict[str, Any] = {"vision": "int8", "language": language, **kv}
        options = QuantOptions(block=64)
        bundle = tmp_path / f"{language}{kv}"
        export_bundle(checkpoint, bundle, options=options, sensitivity=False, **wanted)
        got = run_bundle(bundle, exact.rows)
        assert _sqnr(exact.rows, got.rows) > 28
        assert _sqnr(exact.whole, got.whole) > least
        assert _sqnr(exact.whole, got.stepped) > least


@pytest.mark.slow(seconds=60)
@pytest.mark.usefixtures("few_items")
@pytest.mark.parametrize("dialect", RUNNABLE)
@pytest.mark.parametrize("name", DECODERS)
def test_tensorrt_dialects(tmp_path: Path, name: str, dialect: Any) -> None:
    """The gate's comparisons with the onnxruntime dialect of the same weights hold."""
    checkpoint = write_checkpoint(tmp_path / "model", decoder_config(DECODERS[name], (8, 2)))
    for vision, language in (("fp16", "fp16"), ("int8", "int4")):
        wanted: dict[str, Any] = {"vision": vision, "language": language}
        wanted |= {"options": QuantOptions(block=64), "sensitivity": False}
        paths = [tmp_path / f"{language} {kind}" for kind in ("onnxruntime", dialect)]
        for path, kind in zip(paths, ("onnxruntime", dialect), strict=True):
            export_bundle(checkpoint, path, dialect=kind, **wanted)
        found = compare_bundles(paths[1], paths[0])
        assert len(found) == 4
        assert [one for one in found if not one.holds] == []


def _sqnr(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    return sqnr_db(float((exact**2).sum()), float(((got - exact) ** 2).sum()))


@pytest.mark.parametrize(
    ("decoder", "size", "rotary"),
    [
        ("llama", "16", "theta 10000"),
        ("llama, heads of 8", "8, rotated before attention: no multiple of 16", "theta 10000"),
        ("qwen3", "32, queries and keys normed", "theta 10000"),
    ],
)
def test_inspect_says_what_a_decoder_is(
    tmp_path: Path, decoder: str, size: str, rotary: str
) -> None:
    config = decoder_config(DECODERS[decoder], (4, 2))
    report = inspect_checkpoint(write_checkpoint(tmp_path / "model", config))
    assert (report["language"]["head_size"], report["language"]["rotary"]) == (size, rotary)


def test_heads_that_no_operator_takes(tmp_path: Path) -> None:
    config = decoder_config(DECODERS["llama"] | {"head_dim": 20}, (4, 2))
    checkpoint = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(ExportError, match=r"head size is 20; .* takes multiples of 8 only"):
        export_bundle(checkpoint, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"dialect": "tensorrt"}, "experts.* no such operator; export for onnxruntime"),
        ({"dialect": "tensorrt-portable"}, "experts.* no such operator; export for onnxruntime"),
        ({"language": "fp16"}, "not exported as fp16; pass --language fp32, int8 or int4"),
        (
            {"language": "int4", "options": QuantOptions(block=128)},
            r"mlp.experts.* 64 inputs.* pass a --block that divides 64",
        ),
        (
            {"language": "int4", "options": QuantOptions(block=32, symmetric=False)},
            "leave --asymmetric out",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_experts_that_are_refused(tmp_path: Path, wanted: dict[str, Any], said: str) -> None:
    config = decoder_config(EXPERTS["qwen3 moe"], (8, 2))
    checkpoint = write_checkpoint(tmp_path / "model", config)
    with pytest.raises(ExportError, match=said):
        export_bundle(checkpoint, tmp_path / "bundle", **wanted)
    assert not (tmp_path / "bundle").exists()


def test_layers_without_experts(tmp_path: Path) -> None:
    """Every second layer, and one by name: those have an MLP of another width."""
    dense = {"decoder_sparse_step": 2, "mlp_only_layers": [1], "num_hidden_layers": 4}
    config = decoder_config(EXPERTS["qwen3 moe"] | dense, (4, 2))
    language = parse_config(config).language
    assert language.dense_layers == (1, 2, 3)
    assert [language.mlp_size(layer) for layer in range(4)] == [192, 192, 192, 64]
    compare_logits(tmp_path, config)
