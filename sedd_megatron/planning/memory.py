"""Memory of a rank by kind, by formula: what a run's tensors take, and what the libraries below take beside them."""

from dataclasses import dataclass

from sedd_megatron.config import PretrainOptions
from sedd_megatron.model.conditioning import FREQUENCY_EMBEDDING_SIZE
from sedd_megatron.training.estimates import MOVING_AVERAGE_SIZE, activation_bytes, gradient_size, optimizer_size

# On a GPU, of the libraries: the CUDA context with cuBLAS's and Transformer Engine's workspaces, and of each NCCL
# communicator its channels' buffers (NCCL_BUFFSIZE, 4 MiB, on up to 32 channels, both ways). Both rounded up.
CONTEXT_BYTES, COMMUNICATOR_BYTES = 2**30, 2**28


@dataclass(frozen=True)
class ParameterCount:
    """Parameters that one rank holds."""

    layer_matrices: int  # what FP8 may keep in one byte
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.layer_matrices + self.others


def parameters_of_rank(options: PretrainOptions, num_states: int, pipeline_rank: int) -> ParameterCount:
    """What `model.parameters()` of this rank's stages count; a test compares them.

    Norms, adaLN and the biases of row-parallel products are whole on each tensor-parallel rank, and every stage, of
    which interleaving gives a rank several, has a sigma embedding of its own.
    """
    model, parallel = options.model, options.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    hidden, inner, cond = model.hidden_size, model.mlp_hidden_size, model.cond_dim
    layers, vocabulary = model.num_layers // stages, model.padded_vocab_size(num_states) // tensor
    matrices = layers * (4 * hidden * hidden + 2 * hidden * inner) // tensor
    others = layers * (6 * hidden * (cond + 1) + 2 * hidden + inner // tensor + hidden)
    others += parallel.num_model_chunks(model.num_layers) * (FREQUENCY_EMBEDDING_SIZE + 1 + cond + 1) * cond
    if pipeline_rank == 0:
        others += vocabulary * hidden
    if pipeline_rank == stages - 1:
        others += 2 * hidden * (cond + 1) + hidden + vocabulary * (hidden + 1)
    return ParameterCount(matrices, others)


def parameters_of_model(options: PretrainOptions, num_states: int) -> int:
    """Every parameter once, whatever the layout."""
    model, cond = options.model, options.model.cond_dim
    hidden, inner = model.hidden_size, model.mlp_hidden_size
    layer = 4 * hidden * hidden + 2 * hidden * inner + 6 * hidden * (cond + 1) + 3 * hidden + inner
    ends = (FREQUENCY_EMBEDDING_SIZE + 1 + cond + 1) * cond + 2 * hidden * (cond + 1) + hidden
    return model.num_layers * layer + ends + model.padded_vocab_size(num_states) * (2 * hidden + 1)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank by kind, at the worst moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    moving_average: float
    activations: float
    head: float  # beside them at the worst moment: head and loss, or where it is more a layer's backward pass
    communication: float
    reserve: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def rank_memory(
    options: PretrainOptions,
    num_states: int,
    head_rows: float,
    data_parallel_size: int,
    pipeline_rank: int,
    device: str,
) -> RankMemory:
    """An estimate for a `device` of this type, cpu or cuda; on a CPU tests hold it against what gloo ranks allocate.
    `head_rows` is the fraction of positions that need the head.

    The distributed optimizer is ZeRO's first stage (Rajbhandari et al., arXiv 1910.02054, section 5.1) over all ranks
    with the same parameters, those of the sequence included.
    """
    training, parallel, precision = options.training, options.parallel, options.precision
    count = parameters_of_rank(options, num_states, pipeline_rank)
    shares = data_parallel_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    updated, size = count.total / shares, 2 if precision.bf16 else 4
    num_microbatches = training.global_batch_size // training.micro_batch_size // data_parallel_size
    activations = activation_bytes(options, num_states, head_rows, pipeline_rank, num_microbatches, device)
    communicators = sum(
        ranks > 1
        for ranks in (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
            data_parallel_size,
            data_parallel_size * parallel.context_parallel_size,
        )
    )
    return RankMemory(
        weights=size * count.total - (count.layer_matrices if precision.fp8_param_gather else 0),
        gradients=gradient_size(options) * count.total,
        optimizer=updated * optimizer_size(options),
        moving_average=MOVING_AVERAGE_SIZE * updated,
        activations=activations.per_layer * activations.in_flight,
        head=max(activations.head, activations.in_backward),
        communication=_passing_bytes(options, size) + communicators * COMMUNICATOR_BYTES * (device == "cuda"),
        reserve=CONTEXT_BYTES if device == "cuda" else 0,
    )


def _passing_bytes(options: PretrainOptions, size: int) -> float:
    """What is gathered or sent and nobody keeps: hidden states of the whole sequence and their gradient, keys and
    values, a message each way between stages.
    """
    model, parallel = options.model, options.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    row_bytes = options.training.micro_batch_size * model.seq_length * model.hidden_size * size
    found = 2 * row_bytes / context if parallel.sequence_parallel else 0
    found += 2 * row_bytes / tensor if context > 1 else 0
    if parallel.pipeline_model_parallel_size > 1:
        found += 2 * row_bytes / context / (tensor if parallel.sequence_parallel else 1)
    return found


def checkpoint_bytes(options: PretrainOptions, num_states: int) -> float:
    """Of a checkpoint: weights, in bfloat16 training master weights, Adam's moments and the moving average."""
    return parameters_of_model(options, num_states) * (2 + 16 if options.precision.bf16 else 16)
