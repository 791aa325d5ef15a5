"""Flags of SWIFT 2.x that we do not honour yet, by command: named in an error, never silently ignored.

A flag leaves this page when a command learns it.
"""

from __future__ import annotations

_INFER = """
bnb_4bit_comp_dtype bnb_4bit_quant_storage bnb_4bit_quant_type bnb_4bit_use_double_quant cache_max_entry_count
check_dataset_strategy ckpt_dir custom_dataset_info custom_register_path custom_train_dataset_path
custom_val_dataset_path dataset dataset_seed dataset_test_ratio device_map_config device_map_config_path
device_max_memory disable_custom_all_reduce enforce_eager eval_human hqq_axis hqq_dynamic_config_path hub_token
ignore_args_error limit_mm_per_prompt load_args_from_ckpt_dir load_dataset_config local_repo_path lora_modules
max_length max_logprobs merge_device_map merge_lora merge_lora_and_save model_author model_cache_dir model_kwargs
model_name num_beams overwrite_generation_config quant_method quant_policy quantization_bit
result_dir rope_scaling safe_serialization save_result save_safetensors self_cognition_sample sft_type
show_dataset_sample tools_prompt tp train_dataset_sample truncation_strategy use_flash_attn val_dataset_sample
vision_batch_size vllm_enable_lora vllm_lora_modules vllm_max_lora_rank
"""
_DEPLOY = """
max_new_tokens result_path stop_words stream system val_dataset verbose
"""

INFER = frozenset(_INFER.split())
DEPLOY = INFER | frozenset(_DEPLOY.split())
