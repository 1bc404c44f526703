"""Everything a training run consists of, built from the options: model, DDP, optimizer, schedule, EMA."""

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

from sedd_megatron.config import (
    DiffusionOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    PretrainOptions,
    RecomputeOptions,
)
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.diffusion.noise_schedule import make_schedule
from sedd_megatron.model.initialization import initialize_parameters
from sedd_megatron.model.layer_spec import choose_layer_spec
from sedd_megatron.model.model_config import transformer_config
from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.parallel.groups import ParallelGroups, seed_megatron_generators
from sedd_megatron.training.ema import ExponentialMovingAverage
from sedd_megatron.training.main_parameters import (
    MainParameter,
    copy_main_parameters_to_model,
    gather_parameters,
    main_parameters,
)
from sedd_megatron.training.recent_steps import RecentSteps
from sedd_megatron.training.step_statistics import parameters_by_part
from sedd_megatron.training_schedule import Progress, batch_size_at, end_of, learning_rate_samples

if TYPE_CHECKING:
    from sedd_megatron.training.step_guard import StepGuard


@dataclass
class TrainingRun:
    """One rank's state of a training run. All the progress there is: iteration, consumed_samples, and what became of
    the steps up to there.
    """

    options: PretrainOptions
    groups: ParallelGroups
    tokenizer: Tokenizer
    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    model_chunks: list[SEDDModel]  # one, or with interleaved pipeline stages several
    ddp_chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    main_parameters: list[MainParameter]
    scheduler: OptimizerParamScheduler
    ema: ExponentialMovingAverage
    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0  # of the iterations, those without an update of the parameters
    recent: RecentSteps = field(default_factory=RecentSteps)
    guard: "StepGuard | None" = None  # what becomes of a bad step; None: it ends the run

    @cached_property
    def parameters_by_part(self) -> list[list[torch.Tensor]]:
        """What this rank's optimizer updates, by the part of the network; asked for at every step."""
        return parameters_by_part(self.main_parameters)

    @property
    def optimizer_steps(self) -> int:
        """Updates of the parameters so far."""
        return self.iteration - self.skipped_steps

    @property
    def batch_size(self) -> int:
        """Samples of the next step, of all replicas together."""
        return batch_size_at(self.options.training, self.consumed_samples)

    @property
    def num_microbatches(self) -> int:
        """Of the next step, on each rank."""
        return self.num_microbatches_of(self.batch_size)

    def num_microbatches_of(self, batch_size: int) -> int:
        """Of a batch of this many samples, on each rank."""
        return batch_size // (self.options.training.micro_batch_size * self.groups.data_size)

    @property
    def end(self) -> Progress:
        """Where the run ends, whenever it is asked."""
        return end_of(self.options.training, Progress(self.iteration, self.consumed_samples))

    def gather_parameters(self) -> None:
        """Bring the last step's parameters to every replica, where they would come with the next forward pass."""
        if self.options.parallel.overlap_param_gather:
            gather_parameters(self.ddp_chunks)


def build_model(
    model_options: ModelOptions,
    parallel: ParallelOptions,
    precision: PrecisionOptions,
    recompute: RecomputeOptions,
    graph: AbsorbingGraph | UniformGraph,
    groups: ParallelGroups,
    for_training: bool = False,
) -> list[SEDDModel]:
    """This rank's stages of the score network, with uninitialised parameters; one, unless stages are interleaved.

    `for_training` promises Megatron's DistributedDataParallel around them, which gives the parameters their main_grad:
    gradients are then added to it by the products that make them.
    """
    seed_megatron_generators(0)
    config = transformer_config(model_options, parallel, precision, recompute, groups.device, for_training)
    layer_spec = choose_layer_spec(model_options.cond_dim, precision, groups.device, for_training)
    num_chunks = config.virtual_pipeline_model_parallel_size
    vp_stages = [None] if num_chunks is None else range(num_chunks)
    return [SEDDModel(config, model_options, graph, layer_spec, groups, vp_stage) for vp_stage in vp_stages]


def build_schedule(diffusion: DiffusionOptions) -> LogLinearSchedule | GeometricSchedule:
    """The noise schedule that the options name."""
    return make_schedule(
        diffusion.noise, eps=diffusion.noise_eps, sigma_min=diffusion.sigma_min, sigma_max=diffusion.sigma_max
    )


def build_run(options: PretrainOptions, tokenizer: Tokenizer, groups: ParallelGroups) -> TrainingRun:
    """Build a run at iteration 0; the parameters depend on the seed and not on the layout."""
    graph = make_graph(options.diffusion.graph, tokenizer.num_tokens)
    model_chunks = build_model(
        options.model, options.parallel, options.precision, options.recompute, graph, groups, for_training=True
    )
    for chunk in model_chunks:
        initialize_parameters(chunk, options.training.seed)
    ddp_chunks = _wrap_for_data_parallel(options, model_chunks, groups)
    optimizer = build_optimizer(options, ddp_chunks)
    _connect_schedule(model_chunks[0].config, ddp_chunks, optimizer, groups)
    main = main_parameters(model_chunks, optimizer)
    return TrainingRun(
        options=options,
        groups=groups,
        tokenizer=tokenizer,
        graph=graph,
        schedule=build_schedule(options.diffusion),
        model_chunks=model_chunks,
        ddp_chunks=ddp_chunks,
        optimizer=optimizer,
        main_parameters=main,
        scheduler=build_scheduler(options, optimizer),
        ema=ExponentialMovingAverage(
            main,
            partial(copy_main_parameters_to_model, optimizer, ddp_chunks),
            options.training.ema_decay,
            options.training.ema_interval,
        ),
    )


def _wrap_for_data_parallel(
    options: PretrainOptions, model_chunks: list[SEDDModel], groups: ParallelGroups
) -> list[DistributedDataParallel]:
    parallel = options.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not parallel.grad_reduce_in_bf16,
        check_for_nan_in_grad=False,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
        fp8_param_gather=options.precision.fp8_param_gather,
    )
    ddp_chunks = [
        DistributedDataParallel(
            chunk.config,
            config,
            chunk,
            # Only the first chunk's reductions are on the critical path; smaller ones elsewhere would cost latency.
            disable_bucketing=index > 0,
            pg_collection=groups.collection,
        )
        for index, chunk in enumerate(model_chunks)
    ]
    if not options.precision.fp8_param_gather:
        # Replicas start equal whatever their hardware's arithmetic. FP8 matrices have no one tensor to send.
        for chunk in ddp_chunks:
            chunk.broadcast_params()
    return ddp_chunks


def _connect_schedule(
    config: TransformerConfig,
    ddp_chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ParallelGroups,
) -> None:
    """Give Megatron's schedules what they call during a step; they read it from the model's config."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)
    if ddp_chunks[0].ddp_config.overlap_grad_reduce:
        # Gradients of all micro-batches but the last stay on the rank.
        no_sync = [chunk.no_sync for chunk in ddp_chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def build_optimizer(options: PretrainOptions, ddp_chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's AdamW over the parameters of these model chunks."""
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
        bf16=options.precision.bf16,
        params_dtype=torch.bfloat16 if options.precision.bf16 else torch.float32,
        use_distributed_optimizer=options.parallel.use_distributed_optimizer,
        overlap_param_gather=options.parallel.overlap_param_gather,
        fp8_recipe=options.precision.recipe if options.precision.fp8_format else None,
    )
    optimizer = get_megatron_optimizer(config, ddp_chunks, use_gloo_process_groups=False)
    inner = optimizer.chained_optimizers[0].optimizer
    if isinstance(inner, torch.optim.AdamW):
        # In place of Transformer Engine's: one pass over the parameters, where torch's own choice takes ten.
        for group in inner.param_groups:
            group["fused"] = True
    return optimizer


def build_scheduler(options: PretrainOptions, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Warm-up and decay, counted in samples as Megatron-LM does."""
    training = options.training
    warmup, decay, wsd_decay = learning_rate_samples(training)
    if training.lr_decay_style == "constant":
        # Megatron asserts that the warm-up ends before the decay does, even where nothing decays.
        decay = max(decay, int(warmup) + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=training.lr_warmup_init,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(decay, 1),
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=wsd_decay,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
    )
