"""Keys of config.json that change nothing the model computes, section by section.

What is neither here nor read by `config` is refused by name: it may change the mathematics.
Generation's own keys stand here because a caller's `Sampling` decides in their place.
"""

from __future__ import annotations

_DESCRIPTION = """
    architectures auto_map dtype finetuning_task id2label keys_to_ignore_at_inference label2id
    model_type name_or_path problem_type task_specific_params tokenizer_class torch_dtype
    transformers_version
"""
_TRAINING = """
    attention_dropout attention_probs_dropout_prob drop_path_rate dropout gradient_checkpointing
    embd_pdrop hidden_dropout_prob initializer_factor initializer_range projection_dropout
    resid_pdrop tf_legacy_loss
"""
_EXECUTION = """
    attn_implementation chunk_size_feed_forward is_decoder output_attentions output_hidden_states
    pretraining_tp return_dict torchscript use_bfloat16 use_cache use_flash_attn
"""
_GENERATION = """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores pad_token_id prefix remove_invalid_values repetition_penalty
    return_dict_in_generate sep_token_id suppress_tokens temperature top_k top_p typical_p
"""
#: Of mixtures of experts, all of no effect where `use_moe` is false.
_EXPERTS = """
    capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio moe_intermediate_size
    moe_output_scale noisy_gate_policy num_experts num_routed_experts num_shared_experts
    shared_expert_intermediate_size use_residual use_rts use_weighted_residual
"""
_ANY = f"{_DESCRIPTION} {_TRAINING} {_EXECUTION} {_GENERATION}"

#: Some tools repeat here what the sections say; the id of the image slots is the tokenizer's.
TOP = frozenset(
    f"""
    {_ANY} hidden_size img_context_token_id num_attention_heads num_hidden_layers
    num_key_value_heads tie_word_embeddings vocab_size
    """.split()
)

VISION = frozenset(f"{_ANY} {_EXPERTS} tie_word_embeddings".split())

#: `max_window_layers` counts layers without the sliding window that is refused.
LANGUAGE = frozenset(
    f"{_ANY} {_EXPERTS} max_window_layers output_router_logits router_aux_loss_coef".split()
)

#: Of transformers' own layout. The image's id is the tokenizer's, by name: converters were wrong.
NATIVE_TOP = frozenset(f"{_ANY} image_token_id tie_word_embeddings".split())
NATIVE_VISION = frozenset(f"{_ANY} layer_scale_init_value tie_word_embeddings".split())
_NULL_IMAGES = """
    crop_size data_format default_to_square device disable_grouping do_center_crop do_pad
    image_seq_length input_data_format pad_size processor_class return_tensors
"""
NATIVE_IMAGES = frozenset(_NULL_IMAGES.split())
