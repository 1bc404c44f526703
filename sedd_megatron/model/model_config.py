"""Our model options as Megatron-Core's TransformerConfig, in one function."""

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from sedd_megatron.config import ModelOptions, ParallelOptions


def transformer_config(model: ModelOptions, parallel: ParallelOptions, device: torch.device) -> TransformerConfig:
    """The configuration of every Megatron-Core module of the score network.

    Follows the published model (arXiv 2310.16834, appendix; the DiT of arXiv 2212.09748): LayerNorm with epsilon
    1e-5, tanh-GELU, biases in the MLP, no dropout inside attention.
    """
    dtype = torch.bfloat16 if parallel.bf16 else torch.float32
    on_gpu = device.type == "cuda"
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
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=parallel.bf16,
        # initialization.py fills every parameter from its name. Megatron's own initialisation runs all the same, with
        # nothing to do: it also marks what is tensor-parallel, and unmarked shards are left out of the gradient norm,
        # silently.
        init_method=leave_uninitialized,
        output_layer_init_method=leave_uninitialized,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    # Not a field: Megatron asks for it by getattr before it sums the sigma embedding's gradients over the pipeline
    # stages (distributed/finalize_model_grads.py). Without it the stages' copies drift apart silently.
    config.has_cond_embedder = True
    return config


def leave_uninitialized(tensor: torch.Tensor) -> None:
    """An init_method that does nothing."""


def padded_vocab_size(num_states: int, divisible_by: int) -> int:
    """Number of states that Megatron allocates: a multiple of `divisible_by`, independent of the layout."""
    return -(-num_states // divisible_by) * divisible_by
