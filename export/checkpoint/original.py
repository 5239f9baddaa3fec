"""config.json of the original layout, `internvl_chat`."""

from __future__ import annotations

from internvl_edge.bundle.errors import CheckpointError, PromptError
from internvl_edge.bundle.prompt import NATIVE_TEMPLATE, get_template
from internvl_edge.bundle.specs import (
    SHUFFLE,
    ModelSpec,
    PromptSpec,
    TilingSpec,
    VisionSpec,
)
from internvl_edge.export.checkpoint import config_keys
from internvl_edge.export.checkpoint.family import Family, family_of_architecture
from internvl_edge.export.checkpoint.section import Section

MODEL_TYPE = "internvl_chat"


def read_original(top: Section) -> tuple[ModelSpec, Family]:
    """Read a whole config.json, and find the decoder's family.

    Raises:
        CheckpointError: see `describe_config`.
    """
    _refuse_unknown_kind(top)
    llm = top.section("llm_config")
    llm.refuse_quantised()
    family = family_of_architecture(llm)
    spec = ModelSpec(
        vision=_vision(top), language=family.spec(llm), tiling=_tiling(top), prompt=_prompt(top)
    )
    top.finish(config_keys.TOP)
    return spec, family


def _refuse_unknown_kind(top: Section) -> None:
    architectures = top.raw("architectures", None)  # some tools write null
    if architectures not in (None, ["InternVLChatModel"]):
        raise top.bad("architectures", architectures, "['InternVLChatModel']")
    for key in ("use_backbone_lora", "use_llm_lora"):
        if top.integer(key, 0) != 0:
            raise CheckpointError(
                f"config.json: '{key}' is {top.raw(key)}: the adapter is not merged; merge the"
                " LoRA weights into the model, save it, and export that checkpoint"
            )
    if top.flag("pad2square", False):
        raise top.bad("pad2square", True, "false (only V1-1 era checkpoints pad to a square)")


def _vision(top: Section) -> VisionSpec:
    vision = top.section("vision_config")
    vision.refuse_quantised()
    vision.one_of("hidden_act", ("gelu",), "gelu")
    if (channels := vision.integer("num_channels", 3)) != 3:
        raise vision.bad("num_channels", channels, "3")
    if (ratio := top.number("downsample_ratio", 0.5)) != 1 / SHUFFLE:
        raise top.bad("downsample_ratio", ratio, str(1 / SHUFFLE))
    image_size = vision.positive("image_size", 224)
    forced = top.raw("force_image_size", None)
    spec = VisionSpec(
        hidden_size=vision.positive("hidden_size", 3200),
        num_attention_heads=vision.positive("num_attention_heads", 25),
        intermediate_size=vision.positive("intermediate_size", 12800),
        num_hidden_layers=vision.positive("num_hidden_layers", 48),
        image_size=image_size,
        tile_size=top.positive("force_image_size") if forced else image_size,
        patch_size=vision.positive("patch_size", 14),
        norm_type=vision.one_of("norm_type", ("rms_norm", "layer_norm"), "rms_norm"),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        qk_normalization=vision.flag("qk_normalization", True),
        qkv_bias=vision.flag("qkv_bias", False),
        select_layer=top.integer("select_layer", -1),
        ps_version=top.one_of("ps_version", ("v1", "v2"), "v1"),
    )
    vision.only("attention_bias", spec.qkv_bias)
    vision.only("use_qk_norm", spec.qk_normalization)
    vision.refuse_other_wiring()
    vision.finish(config_keys.VISION)
    return spec


def _tiling(top: Section) -> TilingSpec:
    return TilingSpec(
        dynamic=top.flag("dynamic_image_size", False),
        min_tiles=top.positive("min_dynamic_patch", 1),
        max_tiles=top.positive("max_dynamic_patch", 6),
        thumbnail=top.flag("use_thumbnail", False),
    )


def _prompt(top: Section) -> PromptSpec:
    name = top.raw("template")
    try:
        if name == NATIVE_TEMPLATE:
            raise top.bad("template", name, "that of another layout only")
        get_template(str(name))
    except PromptError as error:
        raise CheckpointError(f"config.json: {error}") from error
    # null occurs in fine-tunes; the reference would print the word "None". Absent is meant.
    message = top.raw("system_message", None)
    if message is not None and not isinstance(message, str):
        raise top.bad("system_message", message, "text")
    return PromptSpec(template=str(name), system_message=message)
