"""config.json of transformers' own layout, `internvl`, and what the files beside it say."""

from __future__ import annotations

from collections.abc import Mapping

from internvl_edge.bundle.errors import CheckpointError
from internvl_edge.bundle.prompt import NATIVE_TEMPLATE
from internvl_edge.bundle.specs import (
    SHUFFLE,
    ModelSpec,
    PromptSpec,
    TilingSpec,
    VisionSpec,
)
from internvl_edge.export.checkpoint import config_keys
from internvl_edge.export.checkpoint.beside import GENERATION, PREPROCESSOR, PROCESSOR, Beside
from internvl_edge.export.checkpoint.chat_template import check_template
from internvl_edge.export.checkpoint.family import Family, family_of_model_type
from internvl_edge.export.checkpoint.section import Section

MODEL_TYPE = "internvl"
_ARCHITECTURES = ["InternVLForConditionalGeneration"]
_PROCESSORS = (
    "GotOcr2ImageProcessor",
    "GotOcr2ImageProcessorFast",
    "GotOcr2ImageProcessorPil",
)
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_BICUBIC = 3


def is_native(config: Mapping[str, object]) -> bool:
    """Tell whether a config.json is of this layout."""
    return config.get("model_type") == MODEL_TYPE


def read_native(top: Section, beside: Beside) -> tuple[ModelSpec, Family]:
    """Read a whole config.json and the files beside it, and find the decoder's family.

    Raises:
        CheckpointError: see `describe_config`.
    """
    architectures = top.raw("architectures", None)  # some tools write null
    if architectures not in (None, _ARCHITECTURES):
        raise top.bad("architectures", architectures, str(_ARCHITECTURES))
    text = top.section("text_config")
    text.refuse_quantised()
    family = family_of_model_type(text)
    check_template(beside)
    vision = _vision(top)
    stops = _stop_ids(beside, text)
    spec = ModelSpec(
        vision=vision,
        language=family.spec(text),
        tiling=_tiling(beside, vision),
        prompt=PromptSpec(template=NATIVE_TEMPLATE, system_message=None, stop_ids=stops),
    )
    rows = top.raw("image_seq_length", None)
    if rows not in (None, vision.tokens_per_tile):
        raise top.bad("image_seq_length", rows, str(vision.tokens_per_tile))
    top.finish(config_keys.NATIVE_TOP)
    return spec, family


def _stop_ids(beside: Beside, text: Section) -> tuple[int, ...]:
    """Read the tokens that end an answer: generation_config.json's, else the decoder's."""
    section = Section(beside.get(GENERATION, {}), "", GENERATION)
    if section.raw("eos_token_id", None) is None:
        section = text
    if (told := section.raw("eos_token_id", None)) is None:
        return ()
    ids = told if isinstance(told, list) else [told]
    vocab = text.positive("vocab_size")
    if not all(type(one) is int and 0 <= one < vocab for one in ids):
        raise section.bad("eos_token_id", told, f"token ids in 0..{vocab - 1}, one or a list")
    return tuple(dict.fromkeys(ids))


def _vision(top: Section) -> VisionSpec:
    vision = top.section("vision_config")
    vision.refuse_quantised()
    vision.one_of("hidden_act", ("gelu",), "gelu")
    top.one_of("projector_hidden_act", ("gelu",), "gelu")
    top.one_of("vision_feature_select_strategy", ("default",), "default")
    if (channels := vision.integer("num_channels", 3)) != 3:
        raise vision.bad("num_channels", channels, "3")
    if (ratio := top.number("downsample_ratio", 0.5)) != 1 / SHUFFLE:
        raise top.bad("downsample_ratio", ratio, str(1 / SHUFFLE))
    size = _side(vision, "image_size")
    spec = VisionSpec(
        hidden_size=vision.positive("hidden_size"),
        num_attention_heads=vision.positive("num_attention_heads"),
        intermediate_size=vision.positive("intermediate_size"),
        num_hidden_layers=vision.positive("num_hidden_layers"),
        image_size=size,
        tile_size=size,
        patch_size=_side(vision, "patch_size"),
        norm_type=vision.one_of("norm_type", ("rms_norm", "layer_norm"), "layer_norm"),
        layer_norm_eps=vision.number("layer_norm_eps", 1e-6),
        qk_normalization=vision.flag("use_qk_norm", False),
        qkv_bias=vision.flag("attention_bias", False),
        select_layer=top.integer("vision_feature_layer", -1),
        ps_version="v2",
    )
    vision.only("use_absolute_position_embeddings", True)
    vision.only("use_mean_pooling", True)  # the class then has no norm behind the last layer
    vision.only("use_mask_token", False)
    vision.refuse_other_wiring()
    vision.finish(config_keys.NATIVE_VISION)
    return spec


def _side(section: Section, key: str) -> int:
    """Read a square's side: a number, or height and width that are equal."""
    value = section.raw(key)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise section.bad(key, section.raw(key), "a positive integer, or it twice in a list")
    return value


def _tiling(beside: Beside, vision: VisionSpec) -> TilingSpec:
    """Read what the image processor does; see `_refuse_other_pixels` for what it may not do."""
    file = PROCESSOR if "image_processor" in beside.get(PROCESSOR, {}) else PREPROCESSOR
    told = beside.get(file)
    if told is None:
        raise CheckpointError(
            f"the checkpoint has no {PREPROCESSOR} and no image_processor in {PROCESSOR}: how"
            " pictures are cut is not told"
        )
    whole = Section(told, "", file)
    images = whole.section("image_processor") if file == PROCESSOR else whole
    _refuse_other_pixels(images, vision)
    images.finish(config_keys.NATIVE_IMAGES)
    return TilingSpec(
        dynamic=True,  # the processor always passes true, whatever `crop_to_patches` says
        min_tiles=images.positive("min_patches", 1),
        max_tiles=images.positive("max_patches", 12),
        thumbnail=True,
        resize="torchvision",  # what AutoImageProcessor takes, whichever class the file names
    )


def _refuse_other_pixels(images: Section, vision: VisionSpec) -> None:
    images.one_of("image_processor_type", _PROCESSORS, _PROCESSORS[0])
    size = images.raw("size", None)
    if size != {"height": vision.tile_size, "width": vision.tile_size}:
        raise images.bad("size", size, f"height and width {vision.tile_size}, as in config.json")
    for key, value in (("image_mean", _MEAN), ("image_std", _STD)):
        if (got := images.raw(key)) != value:
            raise images.bad(key, got, str(value))
    images.only("resample", _BICUBIC)
    if abs(images.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise images.bad("rescale_factor", images.raw("rescale_factor"), "1/255")
    for key in ("do_rescale", "do_normalize", "do_resize", "do_convert_rgb"):
        images.only(key, True)
    for key in ("crop_to_patches", "min_patches", "max_patches"):
        images.raw(key, None)
