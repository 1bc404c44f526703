"""What a rank of a run computes, moves and sends in a step: from options to what the time model takes."""

from sedd_megatron.config import PretrainOptions
from sedd_megatron.layout_rules import data_parallel_size_of
from sedd_megatron.planning.devices import TENSOR_EXPOSED, Cluster
from sedd_megatron.planning.memory import parameters_of_rank
from sedd_megatron.planning.time import Group, Product, Work, Workload
from sedd_megatron.training.estimates import gradient_size


def workload_of(options: PretrainOptions, cluster: Cluster, num_states: int, head_rows: float) -> Workload:
    """What one rank of the last stage does in a step."""
    model, parallel, precision, training = options.model, options.parallel, options.precision, options.training
    tensor, stages, context = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    replicas, node = data_parallel_size_of(parallel, cluster.gpus), cluster.gpus_per_node
    chunks = parallel.num_model_chunks(model.num_layers)
    rows = training.micro_batch_size * model.seq_length / context
    count = max(
        (parameters_of_rank(options, num_states, rank) for rank in {0, stages - 1}), key=lambda found: found.total
    )
    parameter_bytes = 2 * count.total - (count.layer_matrices if precision.fp8_param_gather else 0)
    shares = replicas * context if parallel.use_distributed_optimizer else 1
    layer = _layer_work(options, rows)
    # Adam reads the gradient, reads and writes master weight and moments, and writes the weight; the average is a
    # reading and a copy. Every gradient is set to 0 and read for its norm.
    updated_bytes = (4 + 3 * 8 + 2 + 12 / training.ema_interval) * count.total / shares + 8 * count.total
    return Workload(
        layer=layer,
        head=_head_work(options, rows, num_states, head_rows),
        layers=model.num_layers // stages,
        stages=stages,
        chunks=chunks,
        num_microbatches=training.global_batch_size // training.micro_batch_size // replicas,
        recomputed=_recomputed_share(options, layer),
        tensor=Group(tensor, min(tensor, node)),
        context=Group(context, min(context, max(node // tensor, 1))),
        data=Group(replicas * context, min(replicas * context, max(node // tensor, 1))),
        message_bytes=2 * rows * model.hidden_size / (tensor if parallel.sequence_parallel else 1),
        messages_leave_node=cluster.gpus > node,
        # As model/model_config.py has it.
        messages_overlap=chunks > 1,
        gradient_bytes=gradient_size(options) * count.total,
        parameter_bytes=parameter_bytes if parallel.use_distributed_optimizer else 0.0,
        gradients_overlap=parallel.overlap_grad_reduce,
        parameters_overlap=parallel.overlap_param_gather,
        optimizer_bytes=updated_bytes,
        tensor_exposed=TENSOR_EXPOSED if parallel.tp_comm_overlap else 1.0,
    )


def _layer_work(options: PretrainOptions, rows: float) -> Work:
    """A DiT layer's forward pass on `rows` positions, in bfloat16 between its products."""
    model, parallel = options.model, options.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    hidden, inner, batch = model.hidden_size, model.mlp_hidden_size, options.training.micro_batch_size
    fp8 = options.precision.fp8_format is not None
    # Norms read and write; gated residuals read both and write, with a byte of dropout's; rotation and GELU read and
    # write what tensor-parallel ranks share.
    whole = 2 * 2 * 2 + 2 * 3 * 2 + (2 if model.hidden_dropout > 0 else 0)
    moved = rows * hidden * whole / (tensor if parallel.sequence_parallel else 1)
    moved += rows * (2 * 2 * 2 * hidden + 2 * 2 * inner) / tensor
    if fp8:
        # Each product's input is read, and written twice, as it is and transposed.
        moved += rows * 4 * (2 * hidden + (hidden + inner) / tensor)
    return Work(
        products=(
            Product(batch, model.cond_dim, 6 * hidden),
            Product(rows, hidden, 3 * hidden / tensor),
            Product(rows, hidden / tensor, hidden),
            Product(rows, hidden, inner / tensor),
            Product(rows, inner / tensor, hidden),
        ),
        attention_flops=4 * rows * model.seq_length * hidden / tensor,
        moved_bytes=moved,
        reduced_bytes=2 * 2 * rows * hidden,
        reductions=2,
        gathered_bytes=2 * 2 * rows * context * hidden / tensor if context > 1 else 0.0,
        # Five products, attention, two each of norms, rotations and residuals, GELU, and adaLN's six parts.
        operations=19,
        fp8=fp8,
    )


def _head_work(options: PretrainOptions, rows: float, num_states: int, head_rows: float) -> Work:
    """Head and loss on the share of the positions that count: a tile's logits are written, read, and their gradient
    written (parallel/score_tile_kernel.py), once for both passes.
    """
    hidden, tensor = options.model.hidden_size, options.parallel.tensor_model_parallel_size
    counted_rows, columns = head_rows * rows, num_states / tensor
    return Work(
        products=(Product(counted_rows, hidden, columns),),
        moved_bytes=4 * counted_rows * columns,
        # Hidden states are gathered, and their gradient is scattered: half of a sum each.
        reduced_bytes=rows * hidden,
        reductions=1,
    )


def _recomputed_share(options: PretrainOptions, layer: Work) -> float:
    """Of the layers' forward passes, what the backward passes make again."""
    recompute, layers = options.recompute, options.model.num_layers // options.parallel.pipeline_model_parallel_size
    if recompute.recompute_granularity == "full":
        is_block = recompute.recompute_method == "block"
        return min(recompute.recompute_num_layers / layers, 1.0) if is_block else 1.0
    if "mlp" not in recompute.modules:
        return 0.0
    *_, first, second = layer.products
    return (first.flops + second.flops) / (sum(product.flops for product in layer.products) + layer.attention_flops)
