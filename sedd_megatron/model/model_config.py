"""Our model options as Megatron-Core's TransformerConfig, in one function."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from sedd_megatron.config import ModelOptions, ParallelOptions, PrecisionOptions, RecomputeOptions


def transformer_config(
    model: ModelOptions,
    parallel: ParallelOptions,
    precision: PrecisionOptions,
    recompute: RecomputeOptions,
    device: torch.device,
    for_training: bool = False,
) -> TransformerConfig:
    """The configuration of every Megatron-Core module of the score network; `for_training` as for `build_model`.

    Follows the published model (arXiv 2310.16834, appendix; the DiT of arXiv 2212.09748): LayerNorm with epsilon
    1e-5, tanh-GELU, biases in the MLP, no dropout inside attention.
    """
    dtype = torch.bfloat16 if precision.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.mlp_hidden_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        layernorm_epsilon=1e-5,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.bf16,
        # initialization.py fills every parameter from its name. Megatron's own initialisation runs all the same: it
        # also marks what is tensor-parallel, and unmarked shards are left out of the gradient norm, silently.
        init_method=start_at_zero,
        output_layer_init_method=start_at_zero,
        use_cpu_initialization=device.type == "cpu",
        # Needs main_grad, which DistributedDataParallel makes.
        gradient_accumulation_fusion=for_training,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,  # our attention rotates by itself, in one operation
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
        recompute_modules=list(recompute.modules),
        fp8=precision.fp8_format,
        fp8_recipe=precision.recipe,
        fp8_amax_history_len=precision.fp8_amax_history_len,
        fp8_amax_compute_algo=precision.fp8_amax_compute_algo,
        fp8_param=precision.fp8_param_gather,
        # Its buffers have training's sizes.
        tp_comm_overlap=parallel.tp_comm_overlap and for_training,
        **_layout_fields(model, parallel, device),
    )
    # Not a field: Megatron asks for it by getattr before it sums the sigma embedding's gradients over the pipeline
    # stages (distributed/finalize_model_grads.py). Without it the stages' copies drift apart silently.
    config.has_cond_embedder = True
    return config


def _layout_fields(model: ModelOptions, parallel: ParallelOptions, device: torch.device) -> dict[str, Any]:
    num_chunks = parallel.num_model_chunks(model.num_layers)
    # Between two ranks interleaved stages send both ways at once. Batched, the directions get mixed up and the loss is
    # wrong, silently; overlapped over gloo, outputs are freed before they are sent.
    interleaved = num_chunks > 1
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": num_chunks if interleaved else None,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.cp_comm_type,
        "sequence_parallel": parallel.sequence_parallel,
        "batch_p2p_comm": not interleaved,
        # A wait for the whole device after each message, for a fault that torch no longer has.
        "batch_p2p_sync": False,
        "overlap_p2p_comm": interleaved and device.type == "cuda",
        "deallocate_pipeline_outputs": True,
    }


@torch.no_grad()
def start_at_zero(tensor: torch.Tensor) -> None:
    """Megatron's init_method here.

    Zeros and not whatever lies in memory: FP8 weights are quantised as they are made, and delayed scaling remembers the
    largest value for as long as its history is.
    """
    tensor.zero_()
