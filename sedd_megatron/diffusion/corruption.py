"""From clean tokens to a noisy batch: the forward process of arXiv 2310.16834, equation 2."""

from typing import NamedTuple

import torch
from torch import Tensor

from sedd_megatron.diffusion.draws import TIME_SAMPLING, philox_uniforms
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.noise_schedule import GeometricSchedule, LogLinearSchedule


class NoisyBatch(NamedTuple):
    """Clean and corrupted tokens [B, S] int64; per sequence [B] the noise (float32) and the sample index (int64)."""

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    sigma: Tensor
    sigma_rate: Tensor
    sample_index: Tensor


def corrupt(
    x_0: Tensor,
    sample_index: Tensor,
    *,
    graph: AbsorbingGraph | UniformGraph,
    schedule: LogLinearSchedule | GeometricSchedule,
    seed: int,
    stream: int,
    time_sampling: str = "low-discrepancy",
    time_eps: float = 1e-3,
) -> NoisyBatch:
    """Draw t and x_t for each sequence from (seed, stream, its sample index) alone.

    Args:
        x_0: [B, S] int64 on the CPU.
        sample_index: [B] int64, position in the training order.
    """
    t = TIME_SAMPLING[time_sampling](seed, sample_index, time_eps, stream)
    noise = schedule(t)
    batch_size, length = x_0.shape
    uniforms = philox_uniforms(seed, stream, sample_index, 2 * length).view(batch_size, 2, length)
    x_t = graph.corrupt_tokens(x_0, noise.sigma, uniforms)
    return NoisyBatch(x_0, x_t, t.float(), noise.sigma.float(), noise.sigma_rate.float(), torch.as_tensor(sample_index))
