"""generation_config.json: how a checkpoint has its answers made where the caller does not say."""

from __future__ import annotations

import warnings

from internvl_edge.bundle.errors import CheckpointWarning
from internvl_edge.bundle.quoting import quoted
from internvl_edge.bundle.specs import GenerationSpec
from internvl_edge.export.checkpoint.beside import GENERATION, Beside
from internvl_edge.export.checkpoint.section import Section

#: What transformers draws with where a file that samples does not say.
_TOP_K = 50
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")

#: Keys that change no token: notes, caches, what is given back, how long it may take; those of
#: beams alone; those read elsewhere. Lengths count where they are read only.
_HARMLESS = """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config cache_implementation compile_config
    continuous_batching_config decoder_start_token_id disable_compile do_sample early_stopping
    eos_token_id is_assistant length_penalty low_memory max_cache_len max_length
    max_matching_ngram_size max_new_tokens max_time num_assistant_tokens
    num_assistant_tokens_schedule num_return_sequences output_attentions output_hidden_states
    output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens
    return_dict_in_generate return_legacy_cache speculation_type target_lookbehind
    transformers_version use_cache use_mtp
"""
#: Values of other keys that change nothing either, beside null, false, 0 and empty lists.
_NEUTRAL = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "repetition_penalty": 1,
    "typical_p": 1,
}


def read_generation(beside: Beside) -> GenerationSpec:
    """Read what generation_config.json has a caller's silence mean, as transformers does.

    Only a file that samples (`do_sample`) says anything: answers are greedy otherwise.

    Raises:
        CheckpointError: a value is none that can be drawn with.

    Warns:
        CheckpointWarning: keys would change answers and are left out.
    """
    # Null and absent are alike in transformers.
    told = {key: value for key, value in beside.get(GENERATION, {}).items() if value is not None}
    section = Section(told, "", GENERATION)
    if not section.flag("do_sample", False):
        _warn_of_others(section, _SAMPLED)
        return GenerationSpec()
    _warn_of_others(section, (*_SAMPLED, "repetition_penalty"))
    return GenerationSpec(
        temperature=section.number("temperature", 1.0),
        top_k=section.integer("top_k", _TOP_K) and section.positive("top_k", _TOP_K),
        top_p=_share(section, "top_p", 1.0),
        min_p=_share(section, "min_p", 0.0),
        repetition_penalty=section.number("repetition_penalty", 1.0),
        max_new_tokens=section.positive("max_new_tokens") if "max_new_tokens" in told else None,
    )


def _share(section: Section, key: str, default: float) -> float:
    """Read a number in (0, 1], or the default, which keeps all."""
    if (value := section.raw(key, default)) == default:
        return default
    if section.number(key) > 1:
        raise section.bad(key, value, "a number in (0, 1]")
    return float(value)


def _warn_of_others(section: Section, read: tuple[str, ...]) -> None:
    """Name keys that would change answers in transformers and do not here."""
    others = [
        f"{quoted(key)} {quoted(value)}"
        for key, value in section.others({*_HARMLESS.split(), *read})
        if value and value != _NEUTRAL.get(key)
    ]
    if others:
        warnings.warn(
            f"{GENERATION}: {', '.join(others)} would change answers in transformers: left out",
            CheckpointWarning,
            stacklevel=2,
        )
