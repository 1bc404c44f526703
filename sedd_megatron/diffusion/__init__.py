"""The mathematics of score entropy discrete diffusion (arXiv 2310.16834): torch and numpy's Philox, nothing else."""

from sedd_megatron.diffusion.corruption import NoisyBatch, corrupt
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph, make_graph
from sedd_megatron.diffusion.noise_schedule import GeometricSchedule, LogLinearSchedule, NoiseLevel, make_schedule
from sedd_megatron.diffusion.sampler import SAMPLERS
from sedd_megatron.diffusion.sampling import SamplingSettings, sample
from sedd_megatron.diffusion.score_entropy import ScoreEntropyCoefficients, ScoreSums, score_sums, weighted_loss
from sedd_megatron.diffusion.token_choice import TokenChoice

__all__ = [
    "SAMPLERS",
    "AbsorbingGraph",
    "GeometricSchedule",
    "LogLinearSchedule",
    "NoiseLevel",
    "NoisyBatch",
    "SamplingSettings",
    "ScoreEntropyCoefficients",
    "ScoreSums",
    "TokenChoice",
    "UniformGraph",
    "corrupt",
    "make_graph",
    "make_schedule",
    "sample",
    "score_sums",
    "weighted_loss",
]
