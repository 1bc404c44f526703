"""Everything a training run consists of, built from the options: model, DDP, optimizer, schedule, EMA."""

from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sedd_megatron.config import DiffusionOptions, ModelOptions, ParallelOptions, PretrainOptions
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.diffusion.noise_schedule import make_schedule
from sedd_megatron.model.initialization import initialize_parameters
from sedd_megatron.model.layer_spec import choose_layer_spec
from sedd_megatron.model.model_config import transformer_config
from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.parallel.groups import ParallelGroups, seed_dropout
from sedd_megatron.training.ema import ExponentialMovingAverage


@dataclass
class TrainingRun:
    """One rank's state of a training run; iteration and consumed_samples are all the progress there is."""

    options: PretrainOptions
    groups: ParallelGroups
    tokenizer: Tokenizer
    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    model: SEDDModel
    ddp_model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    ema: ExponentialMovingAverage
    num_microbatches: int
    iteration: int = 0
    consumed_samples: int = 0


def build_model(
    model_options: ModelOptions, parallel: ParallelOptions, graph: AbsorbingGraph | UniformGraph, groups: ParallelGroups
) -> SEDDModel:
    """This rank's stage of the score network, with uninitialised parameters."""
    # Megatron forks its generators while it builds, and stops if they have no seed; nothing is drawn from them.
    seed_dropout(0, 0, groups)
    config = transformer_config(model_options, parallel, groups.device)
    return SEDDModel(config, model_options, graph, choose_layer_spec(model_options.cond_dim, groups.device), groups)


def build_schedule(diffusion: DiffusionOptions) -> LogLinearSchedule | GeometricSchedule:
    """The noise schedule that the options name."""
    return make_schedule(
        diffusion.noise, eps=diffusion.noise_eps, sigma_min=diffusion.sigma_min, sigma_max=diffusion.sigma_max
    )


def build_run(options: PretrainOptions, tokenizer: Tokenizer, groups: ParallelGroups) -> TrainingRun:
    """Build a run at iteration 0; the parameters depend on the seed and not on the layout."""
    graph = make_graph(options.diffusion.graph, tokenizer.num_tokens)
    model = build_model(options.model, options.parallel, graph, groups)
    initialize_parameters(model, options.training.seed)
    ddp_model = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, check_for_nan_in_grad=False),
        model,
        pg_collection=groups.collection,
    )
    # A replica reads each parameter before its first all-reduce: start them equal whatever the hardware's arithmetic.
    ddp_model.broadcast_params()
    optimizer = _build_optimizer(options, ddp_model, groups)
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)
    return TrainingRun(
        options=options,
        groups=groups,
        tokenizer=tokenizer,
        graph=graph,
        schedule=build_schedule(options.diffusion),
        model=model,
        ddp_model=ddp_model,
        optimizer=optimizer,
        scheduler=_build_scheduler(options, optimizer),
        ema=ExponentialMovingAverage(model, options.training.ema_decay),
        num_microbatches=_num_microbatches(options, groups),
    )


def _num_microbatches(options: PretrainOptions, groups: ParallelGroups) -> int:
    training = options.training
    calculator = ConstantNumMicroBatchesCalculator(
        training.global_batch_size,
        training.micro_batch_size,
        groups.data_size,
        decrease_batch_size_if_needed=False,
        rank=torch.distributed.get_rank(),
    )
    return calculator.get()


def _build_optimizer(
    options: PretrainOptions, ddp_model: DistributedDataParallel, groups: ParallelGroups
) -> MegatronOptimizer:
    training = options.training
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=options.parallel.bf16,
        params_dtype=torch.bfloat16 if options.parallel.bf16 else torch.float32,
    )
    return get_megatron_optimizer(config, [ddp_model], use_gloo_process_groups=groups.device.type == "cuda")


def _build_scheduler(options: PretrainOptions, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in samples as Megatron-LM does."""
    training = options.training
    decay_iters = training.lr_decay_iters or training.train_iters
    if training.lr_decay_style == "constant":
        # Megatron asserts that the warm-up ends before the decay does, even where nothing decays.
        decay_iters = max(decay_iters, training.lr_warmup_iters + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.lr_warmup_iters * training.global_batch_size,
        lr_decay_steps=max(decay_iters, 1) * training.global_batch_size,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
