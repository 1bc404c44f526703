"""Turns windows into noisy batches: the one place where training noise is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sedd_megatron.diffusion.corruption import NoisyBatch, corrupt
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.noise_schedule import GeometricSchedule, LogLinearSchedule


@dataclass(frozen=True)
class NoisingCollator:
    """A collate_fn whose noise is a function of (seed, stream, sample index).

    Every rank of a replica, every layout and every resumed run so gets the same batch, without a broadcast and
    without state.
    """

    graph: AbsorbingGraph | UniformGraph
    schedule: LogLinearSchedule | GeometricSchedule
    seed: int
    stream: int
    time_sampling: str = "low-discrepancy"
    time_eps: float = 1e-3

    def __call__(self, samples: Sequence[tuple[int, Tensor]]) -> NoisyBatch:
        """Corrupt (sample index n, x_0 [S] int64) pairs into a NoisyBatch of B = len(samples)."""
        indices, windows = zip(*samples, strict=True)
        return corrupt(
            torch.stack(windows),
            torch.tensor(indices),
            graph=self.graph,
            schedule=self.schedule,
            seed=self.seed,
            stream=self.stream,
            time_sampling=self.time_sampling,
            time_eps=self.time_eps,
        )
