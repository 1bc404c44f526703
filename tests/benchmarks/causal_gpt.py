"""A causal GPT of Megatron-Core's own modules, unmodified: what SEDD of the same size is compared with.

GPTModel with rotary positions, in Megatron's DDP, with its AdamW and its learning-rate schedule from the same options
that SEDD trains by, and with SEDD's moving average of the weights. One process. Its layers are Megatron's local ones,
and in bfloat16 on a GPU those on Transformer Engine, in FP8 where the options say so, with what Megatron-LM fuses by
default. Its loss is the mean over tokens, as in Megatron-LM's pretrain_gpt: in bfloat16 Megatron's own cross entropy,
which counts the padding in.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.model.layer_spec import transformer_engine_runs_on
from sedd_megatron.parallel.groups import ParallelGroups, seed_megatron_generators
from sedd_megatron.training.build import build_optimizer, build_scheduler
from sedd_megatron.training.ema import ExponentialMovingAverage
from sedd_megatron.training.main_parameters import copy_main_parameters_to_model
from sedd_megatron.training.optimizer_step import squared_gradient_norms, update_parameters


@dataclass(frozen=True)
class CausalRun:
    """A training run of the GPT; every part of it changes in place."""

    options: PretrainOptions
    num_tokens: int
    device: torch.device
    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ema: ExponentialMovingAverage


def build_gpt(options: PretrainOptions, num_tokens: int, groups: ParallelGroups) -> GPTModel:
    """The model with Megatron's own initialisation; the begin of a sequence has the id num_tokens."""
    seed_megatron_generators(options.training.seed)
    with_engine = options.precision.bf16 and transformer_engine_runs_on(groups.device)
    vocab_size = num_tokens + 1
    if with_engine:
        # As Megatron-LM pads it, for the sake of its products.
        vocab_size = options.model.padded_vocab_size(vocab_size)
    gpt = GPTModel(
        gpt_config(options, groups.device, with_engine),
        get_gpt_layer_with_transformer_engine_spec() if with_engine else get_gpt_layer_local_spec(),
        vocab_size=vocab_size,
        max_sequence_length=options.model.seq_length,
        position_embedding_type="rope",
        pg_collection=groups.collection,
    )
    return gpt.to(groups.device, torch.bfloat16 if options.precision.bf16 else torch.float32)


def gpt_config(options: PretrainOptions, device: torch.device, with_engine: bool) -> TransformerConfig:
    """The options as Megatron's own models take them; `with_engine` for its layers on Transformer Engine."""
    model, precision = options.model, options.precision
    dtype = torch.bfloat16 if precision.bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.mlp_hidden_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        # Megatron's fused operation is the tanh form, by the name of the exact one.
        activation_func=F.gelu if with_engine else partial(F.gelu, approximate="tanh"),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.bf16,
        fp8=precision.fp8_format,
        fp8_recipe=precision.recipe,
        fp8_amax_history_len=precision.fp8_amax_history_len,
        fp8_amax_compute_algo=precision.fp8_amax_compute_algo,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=with_engine,
        bias_dropout_fusion=with_engine,
        apply_rope_fusion=with_engine,
        persist_layer_norm=False,
    )


def build_causal_run(options: PretrainOptions, num_tokens: int, groups: ParallelGroups) -> CausalRun:
    """The GPT before its first step."""
    gpt = build_gpt(options, num_tokens, groups)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(gpt.config, config, gpt, pg_collection=groups.collection)
    optimizer = build_optimizer(options, [model])
    # Of a main parameter the average reads the tensor alone: the float32 copy of a bfloat16 one, or itself.
    parameters = [SimpleNamespace(tensor=getattr(parameter, "main_param", parameter)) for parameter in gpt.parameters()]
    copy_to_model = partial(copy_main_parameters_to_model, optimizer, [model])
    ema = ExponentialMovingAverage(parameters, copy_to_model, options.training.ema_decay)
    scheduler = build_scheduler(options, optimizer)
    return CausalRun(options, num_tokens, groups.device, model, optimizer, scheduler, ema)


def log_probabilities(model: nn.Module, x_0: Tensor, num_tokens: int) -> Tensor:
    """log p(x_i | x_0 ... x_{i-1}) of every position i of x_0 [B, S] int64, in nats; [B, S] float32.

    The first token is predicted from the begin of the sequence. That itself is no token and has no probability: what is
    normalised are the columns of the num_tokens real ones.
    """
    # Rotary positions take no ids, and the layers' mask type is causal: Megatron makes the mask itself.
    logits = model(shifted(x_0, num_tokens), position_ids=None, attention_mask=None)
    return logits[..., :num_tokens].float().log_softmax(-1).gather(-1, x_0[..., None])[..., 0]


def shifted(x_0: Tensor, num_tokens: int) -> Tensor:
    """What each token of x_0 [B, S] is predicted from: the one before it, and first the begin."""
    return F.pad(x_0[:, :-1], (1, 0), value=num_tokens)


def train_gpt(run: CausalRun, windows: WindowDataset) -> list[float]:
    """Train on the windows in the order in which SEDD gets them; returns each step's seconds."""
    training, seconds = run.options.training, []
    for iteration in range(1, training.train_iters + 1):
        start = time.monotonic()
        last = iteration * training.global_batch_size
        x_0 = _stack(windows, range(last - training.global_batch_size, last), run.device)
        loss = train_gpt_step(run, x_0, iteration)
        seconds.append(time.monotonic() - start)
        if iteration % run.options.logging.log_interval == 0 or iteration == training.train_iters:
            print(f"GPT iteration {iteration}/{training.train_iters} | loss {loss:.4f}", flush=True)
    return seconds


def train_gpt_step(run: CausalRun, x_0: Tensor, iteration: int) -> float:
    """One optimizer step on a global batch x_0 [B, S] int64, in Megatron's schedule; its loss in nats per token."""
    training = run.options.training
    run.model.train()
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, run),
        data_iterator=iter(x_0.split(training.micro_batch_size)),
        model=[run.model],
        num_microbatches=len(x_0) // training.micro_batch_size,
        seq_length=x_0.shape[1],
        micro_batch_size=training.micro_batch_size,
        forward_only=False,
    )
    run.model.finish_grad_sync()
    update_parameters(run.optimizer, squared_gradient_norms(run.optimizer, run.device)[0])
    run.scheduler.step(increment=len(x_0))
    run.ema.update(iteration)
    return torch.stack(losses).mean().item()


def _forward_step(run: CausalRun, micro_batches: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, Callable]:
    """What Megatron's schedule calls: each token's loss in a micro-batch, and what becomes of it."""
    x_0 = next(micro_batches)

    def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
        loss = losses.mean()
        # A copy: the schedule divides the first in place by the number of micro-batches.
        return loss, loss.detach().clone()

    if run.options.precision.bf16:
        return model(shifted(x_0, run.num_tokens), position_ids=None, attention_mask=None, labels=x_0), mean
    return -log_probabilities(model, x_0, run.num_tokens), mean


@torch.no_grad()
def nats_of_windows(run: CausalRun, windows: WindowDataset) -> float:
    """-log p of all windows together, each by itself, under the moving average of the weights; exact."""
    run.model.eval()
    total = 0.0
    with run.ema.swapped_in():
        for start in range(0, len(windows), run.options.training.global_batch_size):
            numbers = range(start, min(start + run.options.training.global_batch_size, len(windows)))
            x_0 = _stack(windows, numbers, run.device)
            total -= log_probabilities(run.model, x_0, run.num_tokens).sum(dtype=torch.float64).item()
    return total


def _stack(windows: WindowDataset, numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.stack([windows[n][1] for n in numbers]).to(device)
