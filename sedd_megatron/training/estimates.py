"""What a step costs, by the model's shapes: floating-point operations per token, and memory per rank."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sedd_megatron.config import ModelOptions, PretrainOptions
from sedd_megatron.diffusion import AbsorbingGraph, GeometricSchedule, LogLinearSchedule, UniformGraph
from sedd_megatron.model.conditioning import FREQUENCY_EMBEDDING_SIZE
from sedd_megatron.parallel.fused_head import TILE_ELEMENTS

# Dense peak of the matrix units in TFLOP/s, (bf16, FP8), from the vendors' data sheets, without sparsity; the first
# name found in the device's counts.
PEAK_TFLOPS = {
    "H100 PCIe": (756, 1513),
    "H100": (989, 1979),
    "H200": (989, 1979),
    "H800": (989, 1979),
    "B200": (2250, 4500),
    "A100": (312, None),
    "A800": (312, None),
    "L40S": (362, 733),
    "RTX 4090": (165, 330),
}


def flops_per_token(model: ModelOptions, num_states: int, head_rows: float) -> float:
    """Floating-point operations of one trained token, 2 per multiply-add: forward, and twice that backward.

    What the mathematics needs and not what an implementation repeats: recompute does not count. Attention is
    bidirectional: S keys for each query, not half. adaLN and the sigma embedding run once per sequence. `head_rows` is
    the fraction of positions whose score entropy is not 0 (see `fraction_of_head_rows`).
    """
    hidden, inner, length, cond = model.hidden_size, model.mlp_hidden_size, model.seq_length, model.cond_dim
    matrices = 3 * hidden * hidden + hidden * hidden + 2 * hidden * inner
    attention = 2 * length * hidden
    layer = matrices + attention + 6 * hidden * cond / length
    sigma_embedding = (FREQUENCY_EMBEDDING_SIZE * cond + cond * cond) / length
    head = head_rows * hidden * num_states + 2 * hidden * cond / length
    return 3 * 2 * (model.num_layers * layer + sigma_embedding + head)


def fraction_of_head_rows(
    graph: AbsorbingGraph | UniformGraph, schedule: LogLinearSchedule | GeometricSchedule, time_eps: float
) -> float:
    """Expected fraction of positions that need the head: under the absorbing graph the masked ones alone."""
    if graph.mask_token_id is None:
        return 1.0
    t = time_eps + (1 - time_eps) * (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    return -torch.expm1(-schedule(t).sigma).mean().item()


def peak_tflops(device_name: str, fp8: bool) -> float | None:
    """The device's peak for this precision, or None for a device that is not in the table."""
    found = next((peaks for name, peaks in PEAK_TFLOPS.items() if name in device_name), (None, None))
    return found[1] if fp8 else found[0]


# Bytes of a parameter in the moving average.
MOVING_AVERAGE_SIZE = 4


def gradient_size(options: PretrainOptions) -> int:
    """Bytes of a gradient where it is summed, over micro-batches and over replicas."""
    return 2 if options.parallel.grad_reduce_in_bf16 else 4


def optimizer_size(options: PretrainOptions) -> int:
    """Bytes that the optimizer keeps of a parameter: Adam's moments, and in bfloat16 the master weight."""
    return 12 if options.precision.bf16 else 8


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes that one rank's forward passes keep for the backward passes."""

    per_layer: float  # kept of a layer and micro-batch, on average over a stage's layers
    in_flight: int  # layers times micro-batches whose activations are kept at once
    in_backward: float  # while one layer's backward pass runs: what is computed again, and gradients
    head: float  # while head and loss run, which is at another time

    @property
    def total(self) -> float:
        """All of them, at the worst moment of the step."""
        return self.per_layer * self.in_flight + max(self.in_backward, self.head)


def activation_bytes(
    options: PretrainOptions,
    num_states: int,
    head_rows: float,
    pipeline_rank: int,
    num_microbatches: int,
    device: str,
) -> ActivationBytes:
    """An estimate for the local layers on a `device` of this type, in the manner of Korthikanti et al. (arXiv
    2205.05198, section 4), for layers that keep less; a test holds it against what autograd keeps. `head_rows` as for
    `flops_per_token`.
    """
    model, parallel, recompute = options.model, options.parallel, options.recompute
    stages = parallel.pipeline_model_parallel_size
    size = 2 if options.precision.bf16 else 4
    rows = options.training.micro_batch_size * model.seq_length / parallel.context_parallel_size
    layer = _layer_bytes(options, rows, size, device)
    layers = model.num_layers // stages
    per_layer, recomputed = layer.kept, layer.computed_again
    if recompute.recompute_granularity == "full" and recompute.recompute_method == "uniform":
        per_layer, recomputed = (
            layer.checkpoint / recompute.recompute_num_layers,
            layer.kept * recompute.recompute_num_layers,
        )
    elif recompute.recompute_granularity == "full":
        share = min(recompute.recompute_num_layers / layers, 1.0)
        per_layer = share * layer.checkpoint + (1 - share) * layer.kept
        # The first layers are computed again last, when what the others have kept is gone.
        recomputed = layer.kept if share == 1 else 0.0
    chunks = parallel.num_model_chunks(model.num_layers)
    # 1F1B: a stage starts as many micro-batches as there are stages from it to the last; interleaving adds a round.
    in_flight = layers * min(stages - pipeline_rank, num_microbatches)
    in_flight += layers // chunks * (stages - 1) if chunks > 1 else 0
    head = _head_bytes(options, num_states, head_rows, rows, size, device) if pipeline_rank == stages - 1 else 0.0
    return ActivationBytes(per_layer, in_flight, recomputed + layer.gradients, head)


def _head_bytes(
    options: PretrainOptions, num_states: int, head_rows: float, rows: float, size: int, device: str
) -> float:
    """The head and loss at their worst moment, of a micro-batch in which as many positions count as on average."""
    hidden, shard = options.model.hidden_size, num_states / options.parallel.tensor_model_parallel_size
    chunk = min(options.training.loss_chunk_rows_on(device), head_rows * rows)
    if chunk == 0:
        # Logits, and in the loss two float32 copies of them.
        return rows * shard * (size + 8)
    # The gradient of the hidden states; a chunk of these and what its norm needs; a tile, and in bfloat16 its gradient.
    return (
        rows * hidden * size
        + chunk * hidden * (2 * size + 5 * 4)
        + min(chunk * shard, TILE_ELEMENTS[device]) * (4 if size == 4 else 4 + size)
    )


class _LayerBytes(NamedTuple):
    """Of one layer and micro-batch."""

    kept: float
    checkpoint: float
    computed_again: float  # at once, where modules are selected
    gradients: float


def _layer_bytes(options: PretrainOptions, rows: float, size: int, device: str) -> _LayerBytes:
    """What a layer keeps of one micro-batch, what a checkpoint of it would, and what its backward pass needs.

    Per token: each norm keeps its input and its modulated output, each gate the output that it multiplies, and dropout
    a byte for each of its elements; these are whole on each tensor-parallel rank unless the sequence is parallel.
    Queries, keys and values before and after the rotation, attention's output, and the MLP before and after GELU are
    shared in any case.
    """
    model, selected = options.model, options.recompute.modules
    tensor = options.parallel.tensor_model_parallel_size
    hidden, inner = model.hidden_size * size, model.mlp_hidden_size * size
    sequence_shares = tensor if options.parallel.sequence_parallel else 1
    norm, again = (hidden, hidden) if "layernorm" in selected else (2 * hidden, 0)
    dropped = model.hidden_size if model.hidden_dropout > 0 else 0
    whole = 2 * (norm + hidden + dropped)
    # core_attn changes nothing: the fused kernel keeps no [S, S] matrix that recomputing could save.
    mlp, mlp_again = (0, 2 * inner) if "mlp" in selected else (2 * inner, 0)
    # On a CPU a product adds to a float32 main_grad from float32 copies of its factors (parallel/main_grad.py).
    copies = 4 * (model.hidden_size + model.mlp_hidden_size / tensor) if device == "cpu" and size == 2 else 0
    return _LayerBytes(
        kept=rows * (whole / sequence_shares + (6 * hidden + mlp) / tensor),
        checkpoint=rows * hidden / sequence_shares,
        computed_again=rows * (again / sequence_shares + mlp_again / tensor),
        # The residual's, a branch's output's, and the MLP's inner layer's.
        gradients=rows * (2 * hidden / sequence_shares + inner / tensor + copies),
    )
