"""The places where OffQ fits into vLLM, checked once so that a change there is one clear error."""

import inspect
from importlib import import_module
from typing import Any

SUPPORTED_VLLM = ">=0.32,<0.34"

_LAYERS = "vllm.model_executor.layers"

SEAMS: dict[str, dict[str, set[str]]] = {
    f"{_LAYERS}.quantization": {"register_quantization_config": {"quantization"}},
    f"{_LAYERS}.quantization.base_config": {
        "QuantizationConfig.get_quant_method": {"layer", "prefix"},
        "QuantizationConfig.maybe_update_config": {"model_name", "hf_config", "revision"},
        "QuantizeMethodBase.embedding": {"layer"},
        "QuantizeMethodBase.process_weights_after_loading": {"layer"},
    },
    f"{_LAYERS}.quantization.kv_cache": {"BaseKVCacheMethod.create_weights": {"layer"}},
    f"{_LAYERS}.linear": {
        "LinearBase": set(),
        "UnquantizedLinearMethod": set(),
        "register_weight_loader_v2_supported_method": {"cls"},
        "LinearMethodBase.create_weights": {
            "layer",
            "input_size_per_partition",
            "output_partition_sizes",
            "input_size",
            "output_size",
            "params_dtype",
        },
        "LinearMethodBase.apply": {"layer", "x", "bias"},
    },
    f"{_LAYERS}.fused_moe": {
        "FusedMoEMethodBase.create_weights": {
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
        },
        "FusedMoEMethodBase.apply": {
            "layer",
            "x",
            "topk_weights",
            "topk_ids",
            "shared_experts",
            "shared_experts_input",
        },
        "FusedMoEMethodBase.get_fused_moe_quant_config": {"layer"},
        "RoutedExperts.__init__": {
            "ckpt_gate_proj_name",
            "ckpt_down_proj_name",
            "ckpt_up_proj_name",
            "apply_router_weight_on_input",
            "swiglu_limit",
            "swiglu_alpha",
            "swiglu_beta",
        },
        "RoutedExperts.weight_loader": {"param", "loaded_weight", "shard_id", "expert_id"},
    },
    f"{_LAYERS}.fused_moe.activation": {"MoEActivation": set()},
    "vllm.model_executor.utils": {"set_weight_attrs": {"weight", "weight_attrs"}},
    "vllm.model_executor.parameter": {
        "ChannelQuantScaleParameter.__init__": {"output_dim"},
        "GroupQuantScaleParameter.__init__": set(),
        "PackedvLLMParameter.__init__": {"packed_factor", "packed_dim"},
    },
    f"{_LAYERS}.vocab_parallel_embedding": {
        "ParallelLMHead": set(),
        "VocabParallelEmbedding": set(),
    },
    f"{_LAYERS}.attention": {"Attention.__init__": {"attn_backend", "quant_config"}},
    f"{_LAYERS}.attention_layer_base": {"AttentionLayerBase": set()},
    "vllm.v1.attention.backend": {
        "AttentionBackend.customize_spec": {"spec"},
        "AttentionBackend.get_supported_kernel_block_sizes": {"kv_cache_spec"},
        "AttentionImpl.forward": {"layer", "query", "kv_cache", "attn_metadata", "output"},
        "AttentionMetadata": set(),
        "AttentionMetadataBuilder._init_reorder_batch_threshold": {
            "reorder_batch_threshold",
            "supports_spec_as_decode",
        },
        "AttentionMetadataBuilder.build": {"common_prefix_len", "common_attn_metadata"},
        "AttentionMetadataBuilder.build_for_cudagraph_capture": {"common_attn_metadata"},
        "AttentionMetadataBuilder.get_cudagraph_support": {"vllm_config", "kv_cache_spec"},
        "AttentionType": set(),
        "AttentionCGSupport": set(),
        "CommonAttentionMetadata": {
            "block_table_tensor",
            "max_query_len",
            "mm_req_doc_ranges",
            "num_actual_tokens",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
        },
        "MultipleOf": {"base"},
    },
    "vllm.compilation.passes.inductor_pass": {
        "InductorPass.uuid": set(),
        "InductorPass.hash_source": {"srcs"},
        "enable_fake_mode": {"fn"},
    },
    "vllm.v1.attention.backends.registry": {"AttentionBackendEnum": set()},
    "vllm.v1.attention.backends.utils": {
        "split_decodes_and_prefills": {"common_attn_metadata", "decode_threshold"},
    },
    "vllm.config": {
        "CompilationConfig": set(),
        "CompilationMode": set(),
        "VllmConfig": set(),
        "get_current_vllm_config": set(),
        "get_current_vllm_config_or_none": set(),
    },
    "vllm.distributed": {
        "get_tensor_model_parallel_rank": set(),
        "get_tensor_model_parallel_world_size": set(),
    },
    "vllm.platforms.interface": {
        "Platform.get_device_capability": set(),
        "Platform.is_cuda_alike": set(),
    },
    "vllm.ir.ops": {"rms_norm": set(), "fused_add_rms_norm": set()},
    f"{_LAYERS}.activation": {"SiluAndMul.forward_native": {"x"}},
    "vllm.v1.metrics.loggers": {
        "AggregateStatLoggerBase.__init__": {"vllm_config", "engine_indexes"},
        "AggregateStatLoggerBase.log_engine_initialized": set(),
        "AggregateStatLoggerBase.record": {"scheduler_stats", "iteration_stats"},
    },
    "vllm.v1.worker.workspace": {
        "current_workspace_manager": set(),
        "is_workspace_manager_initialized": set(),
        "WorkspaceManager.get_simultaneous": {"shapes_and_dtypes"},
    },
    "vllm.v1.kv_cache_interface": {
        "AttentionSpec": {"dtype", "head_size", "state_content_bytes"},
        "KVCacheLayout": set(),
    },
}
"""Module, name in it, parameters that we pass, override or read."""


def check_seams() -> None:
    """Raises: RuntimeError naming the seam that is missing and the vLLM versions supported."""
    for module, names in SEAMS.items():
        for name, parameters in names.items():
            try:
                seam: Any = import_module(module)
                for part in name.split("."):
                    seam = getattr(seam, part)
                missing = parameters - set(inspect.signature(seam).parameters)
            except (ImportError, AttributeError) as error:
                raise _unsupported(f"{module}.{name}") from error
            if missing:
                raise _unsupported(f"{module}.{name}({', '.join(sorted(missing))})")


def _unsupported(seam: str) -> RuntimeError:
    return RuntimeError(
        f"vllm-offq needs vllm{SUPPORTED_VLLM}, and this vLLM has no {seam}; install one of "
        "these versions, or uninstall vllm-offq"
    )
