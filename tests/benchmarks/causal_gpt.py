"""A causal GPT of Megatron-Core's own modules, unmodified: what SEDD of the same size is compared with.

GPTModel with Megatron's local layers (get_gpt_layer_local_spec) and rotary positions, in Megatron's DDP, with its
AdamW and its learning-rate schedule from the same options that SEDD trains by, and with SEDD's moving average of the
weights. One process, float32. Its loss is the mean over tokens, as in Megatron-LM's pretrain_gpt.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.windows import WindowDataset
from sedd_megatron.parallel.groups import ParallelGroups, seed_dropout
from sedd_megatron.training.build import build_optimizer, build_scheduler
from sedd_megatron.training.ema import ExponentialMovingAverage
from sedd_megatron.training.optimizer_step import step_optimizer


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
    model, is_cpu = options.model, groups.device.type == "cpu"
    seed_dropout(options.training.seed, 0, groups)
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.mlp_hidden_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=0.0,
        activation_func=partial(F.gelu, approximate="tanh"),
        use_cpu_initialization=is_cpu,
        # On a GPU Megatron's own linear layers need Apex for it.
        gradient_accumulation_fusion=is_cpu,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=num_tokens + 1,
        max_sequence_length=model.seq_length,
        position_embedding_type="rope",
        pg_collection=groups.collection,
    )


def build_causal_run(options: PretrainOptions, num_tokens: int, groups: ParallelGroups) -> CausalRun:
    """The GPT before its first step."""
    gpt = build_gpt(options, num_tokens, groups).to(groups.device)
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(gpt.config, config, gpt, pg_collection=groups.collection)
    optimizer = build_optimizer(options, [model])
    # Of a main parameter the average reads the tensor alone; a float32 optimizer updates the model's own.
    parameters = [SimpleNamespace(tensor=parameter) for parameter in gpt.parameters()]
    ema = ExponentialMovingAverage(parameters, lambda: None, options.training.ema_decay)
    scheduler = build_scheduler(options, optimizer)
    return CausalRun(options, num_tokens, groups.device, model, optimizer, scheduler, ema)


def log_probabilities(model: nn.Module, x_0: Tensor, num_tokens: int) -> Tensor:
    """log p(x_i | x_0 ... x_{i-1}) of every position i of x_0 [B, S] int64, in nats; [B, S] float32.

    The first token is predicted from the begin of the sequence. That itself is no token and has no probability: what is
    normalised are the columns of the num_tokens real ones.
    """
    shifted = F.pad(x_0[:, :-1], (1, 0), value=num_tokens)
    # Rotary positions take no ids, and the layers' mask type is causal: Megatron makes the mask itself.
    logits = model(shifted, position_ids=None, attention_mask=None)
    return logits[..., :num_tokens].float().log_softmax(-1).gather(-1, x_0[..., None])[..., 0]


def train_gpt(run: CausalRun, windows: WindowDataset) -> list[float]:
    """Train on the windows in the order in which SEDD gets them; returns each step's seconds."""
    training, seconds = run.options.training, []
    for iteration in range(1, training.train_iters + 1):
        start = time.monotonic()
        last = iteration * training.global_batch_size
        x_0 = _stack(windows, range(last - training.global_batch_size, last), run.device)
        loss = _train_step(run, x_0, iteration)
        seconds.append(time.monotonic() - start)
        if iteration % run.options.logging.log_interval == 0 or iteration == training.train_iters:
            print(f"GPT iteration {iteration}/{training.train_iters} | loss {loss:.4f}", flush=True)
    return seconds


def _train_step(run: CausalRun, x_0: Tensor, iteration: int) -> float:
    run.model.train()
    run.model.zero_grad_buffer()
    run.optimizer.zero_grad()
    loss = -log_probabilities(run.model, x_0, run.num_tokens).mean()
    loss.backward()
    run.model.finish_grad_sync()
    step_optimizer(run.optimizer, run.device)
    run.scheduler.step(increment=len(x_0))
    run.ema.update(iteration)
    return loss.item()


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
