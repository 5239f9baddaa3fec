"""The decoder of a bundle beside transformers' Llama layers, in float32, one layer in memory.

    internvl-edge bench accuracy layerwise BUNDLE [--prompt N] [--new-tokens N] [--json FILE]

A bundle too large for any float implementation in memory still has one layer at a time that fits:
each layer's weights are read from the bundle's file, multiplied out, and run by transformers over a
prompt and the greedy answer the runtime gave to it. At every position of the answer, the token the
runtime chooses is compared with the reference's, and the logits by their cosine: once as the bundle
runs, and once with the same weights where nothing else is rounded: as they run, block-quantised
layers round their inputs to 8 bits, and an int8 cache rounds keys and values.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from internvl_edge.bench.common.greedy import ONE_BY_ONE
from internvl_edge.bench.common.machine import describe_machine
from internvl_edge.bench.common.stored import check_writable, write_result
from internvl_edge.bench.peers.layout import peer_kind
from internvl_edge.bundle.contract import LANGUAGE_GRAPH, MANIFEST, cache_pairs, stored_name
from internvl_edge.bundle.errors import BundleError, UsageError
from internvl_edge.bundle.manifest import Bundle, file_entry, open_bundle
from internvl_edge.bundle.quoting import reason
from internvl_edge.bundle.specs import LanguageSpec
from internvl_edge.export.checkpoint.names import HEAD, NORM, decoder_prefix
from internvl_edge.export.output.marker import scratch_folder
from internvl_edge.runtime import InternVL
from internvl_edge.runtime.decoding.embedding import EmbeddingTable
from internvl_edge.runtime.options import add_threads, at_least

#: MatMulNBits' accuracy level with inputs in float32.
FLOAT_INPUTS = 1
#: What an int8 cache adds to GroupQueryAttention: inputs from this one on, and attributes.
CACHE_SCALES = 9
CACHE_ATTRIBUTES = ("kv_cache_bit_width", "k_quant_type", "v_quant_type")

Floats = NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--prompt",
        type=at_least(1, "--prompt"),
        default=24,
        metavar="N",
        help="tokens, drawn at random",
    )
    parser.add_argument(
        "--new-tokens", type=at_least(1, "--new-tokens"), default=16, metavar="N", help="greedy"
    )
    add_threads(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures there")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, store; returns the exit status.

    It is 0 when, nothing but weights rounded, every token is the reference's, else 1.

    Raises:
        BundleError: not a bundle of the onnxruntime dialect in symmetric blocks.
        OutputError: the output cannot be written.
    """
    prompt, threads = arguments.prompt, arguments.threads
    check_writable(arguments.json)
    bundle = open_bundle(arguments.bundle, verify="size")
    ids, logits = _answer(bundle, prompt, arguments.new_tokens, threads)
    expected = reference_logits(bundle, ids)[-len(logits) :]
    with unrounded(bundle) as floats:
        exact = _load(floats, threads).logits(ids)[-len(logits) :]
    agreements = {"as_run": agreement(logits, expected), "unrounded": agreement(exact, expected)}
    for name, found in agreements.items():
        print(
            f"{name.replace('_', ' ')}: {found.same} of {len(logits)} tokens are the float"
            f" reference's; cosine of the logits {found.cosine_mean:.5f} (least"
            f" {found.cosine_least:.5f})"
        )
    if arguments.json is not None:
        result = {
            "format": "internvl-edge layerwise",
            "version": 2,
            "precision": bundle.manifest.precision,
            "parameters": dict(bundle.manifest.parameters),
            "prompt_tokens": prompt,
            "tokens": len(logits),
            **{name: asdict(found) for name, found in agreements.items()},
            "machine": describe_machine(threads or 0),
        }
        write_result(result, arguments.json)
    return 0 if agreements["unrounded"].same == len(logits) else 1


@dataclass(frozen=True)
class Agreement:
    """Of logits with a reference's: how many first choices are the same, and the cosines."""

    same: int
    cosine_mean: float
    cosine_least: float


def agreement(logits: Floats, expected: Floats) -> Agreement:
    """Compare `(positions, vocab)`, row by row."""
    norms = np.linalg.norm(logits, axis=-1) * np.linalg.norm(expected, axis=-1)
    cosines = (logits * expected).sum(-1) / norms
    same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    return Agreement(same, float(cosines.mean()), float(cosines.min()))


@contextmanager
def unrounded(bundle: Bundle) -> Iterator[Path]:
    """The same weights with float inputs to every product and a float cache.

    Yields:
        A bundle of links beside the original, gone afterwards.

    Raises:
        BundleError: the directory beside the bundle takes no links.
    """
    model = onnx.load(str(bundle.file(LANGUAGE_GRAPH)), load_external_data=False)
    _compute_in_float(
        model.graph, {name for pair in cache_pairs(bundle.spec.language) for name in pair}
    )
    with scratch_folder(bundle.path.parent) as folder:
        try:
            for file in set(bundle.manifest.files) - {LANGUAGE_GRAPH}:
                os.link(bundle.path / file, folder / file)
        except OSError as error:
            raise BundleError(
                f"cannot link the bundle's files beside it: {reason(error)}"
            ) from error
        onnx.save(model, str(folder / LANGUAGE_GRAPH))
        files = {**bundle.manifest.files, LANGUAGE_GRAPH: file_entry(folder / LANGUAGE_GRAPH)}
        kv = "fp32" if bundle.manifest.kv == "int8" else bundle.manifest.kv
        manifest = replace(bundle.manifest, files=files, kv=kv)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        yield folder


def _compute_in_float(graph: onnx.GraphProto, caches: AbstractSet[str]) -> None:
    """Change a language graph in place: nothing is rounded that is not stored so."""
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            del node.input[CACHE_SCALES:]
        kept = [a for a in node.attribute if a.name not in CACHE_ATTRIBUTES]
        for attribute in kept:
            if attribute.name == "accuracy_level":
                attribute.i = FLOAT_INPUTS
        del node.attribute[:]
        node.attribute.extend(kept)
    for value in (*graph.input, *graph.output):
        if value.name in caches:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _load(path: Path, threads: int | None) -> InternVL:
    return InternVL.load(path, device="cpu", threads=threads, verify="size", reuse_bytes=0)


def _answer(
    bundle: Bundle, prompt: int, new_tokens: int, threads: int | None
) -> tuple[list[int], Floats]:
    """A random prompt with the runtime's answer, and its logits where each token was chosen."""
    model = _load(bundle.path, threads)
    # Ids below this are special or bytes; which words are read does not matter.
    random = np.random.default_rng(0).integers(260, bundle.spec.language.vocab_size, prompt)
    ids = [int(token) for token in random if token != model.context_id]
    answer = model.generate(ids, max_new_tokens=new_tokens, sampling=ONE_BY_ONE).token_ids[:-1]
    if model.context_id in answer:  # which stands for an image when it is read again
        answer = answer[: answer.index(model.context_id)]
    logits = model.logits([*ids, *answer])
    return [*ids, *answer], logits[len(ids) - 1 :]


def reference_logits(bundle: Bundle, ids: Sequence[int]) -> Floats:
    """Logits of every position by transformers' layers in float32, `(tokens, vocab)`.

    Raises:
        UsageError: the decoder is no Llama, whose layers these are.
    """
    if (kind := peer_kind(bundle.spec.language)) != "llama":
        raise UsageError(f"layerwise runs Llama's layers, and this decoder is of the kind {kind}")
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaDecoderLayer,
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
    )

    spec, weights = bundle.spec.language, _Weights(bundle)
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        attention_bias=spec.bias,
        head_dim=spec.head_dim,
    )
    config._attn_implementation = "eager"
    embedded = EmbeddingTable.load(bundle).rows(np.asarray(ids, np.int64))
    x = torch.tensor(embedded, dtype=torch.float32)[None]  # (1, tokens, hidden)
    positions = torch.arange(len(ids))[None]
    rotary = LlamaRotaryEmbedding(config)(x, positions)
    hidden = torch.full((len(ids), len(ids)), torch.finfo(torch.float32).min)
    mask = torch.triu(hidden, diagonal=1)[None, None]
    with torch.inference_mode():
        for number in range(spec.num_hidden_layers):
            with torch.device("meta"):
                layer = LlamaDecoderLayer(config, 0)
            layer.load_state_dict(_layer_state(weights, spec, number), assign=True)
            y = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            x = y[0] if isinstance(y, tuple) else y
        norm = LlamaRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        norm.weight = torch.nn.Parameter(torch.from_numpy(weights[NORM]))
        head = torch.from_numpy(weights[HEAD])
        return np.asarray((norm(x)[0] @ head.T).numpy())


def _layer_state(weights: _Weights, spec: LanguageSpec, number: int) -> dict[str, Any]:
    """One layer under transformers' names. `qkv` holds all Q, all K, all V."""
    import torch

    prefix = decoder_prefix(number)
    qkv = weights[f"{prefix}qkv.weight"]
    query, key, value = np.split(qkv, [spec.query_size, spec.query_size + spec.key_value_size])
    arrays: Mapping[str, Floats] = {
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "self_attn.o_proj": weights[f"{prefix}out.weight"],
        "mlp.gate_proj": weights[f"{prefix}gate.weight"],
        "mlp.up_proj": weights[f"{prefix}up.weight"],
        "mlp.down_proj": weights[f"{prefix}down.weight"],
        "input_layernorm": weights[f"{prefix}attention_norm.weight"],
        "post_attention_layernorm": weights[f"{prefix}ffn_norm.weight"],
    }
    return {
        f"{name}.weight": torch.from_numpy(np.ascontiguousarray(array))
        for name, array in arrays.items()
    }


class _Weights:
    """Weights of a language graph by canonical name, multiplied out to float32 when asked for."""

    def __init__(self, bundle: Bundle) -> None:
        model = onnx.load(str(bundle.file(LANGUAGE_GRAPH)), load_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        self._bits = {
            node.input[1]: next(a.i for a in node.attribute if a.name == "bits")
            for node in products
        }
        if any(len(node.input) > 3 and node.input[3] for node in products):
            raise BundleError("layerwise reads symmetric blocks only; export without --asymmetric")
        self._folder = bundle.path

    def __getitem__(self, name: str) -> Floats:
        name = stored_name(name)
        stored = self._read(name)
        if name not in self._bits:
            return stored.astype(np.float32)
        scales = self._read(f"{name}.scales")[..., np.newaxis]  # (rows, blocks, 1)
        if self._bits[name] == 4:  # the low half of a byte is the first value
            stored = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
        middle = 1 << (self._bits[name] - 1)
        values = (stored.astype(np.float32) - middle) * scales
        return np.asarray(values.reshape(len(values), -1))

    def _read(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = self._folder / entries["location"]
        return np.array(np.memmap(file, dtype, "r", int(entries["offset"]), tuple(tensor.dims)))
