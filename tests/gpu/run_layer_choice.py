"""Which linear layers a model gets on a GPU with Transformer Engine, by what it is built for."""

from sedd_megatron.config import ModelOptions, ParallelOptions, PrecisionOptions, RecomputeOptions
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.launch import own_jobs

SHAPE = ModelOptions(num_layers=1, hidden_size=64, num_attention_heads=2, seq_length=16)


def check(bf16: bool, for_training: bool, expected: str) -> None:
    parallel = ParallelOptions(device="cuda")
    with parallel_groups(parallel) as groups:
        from sedd_megatron.diffusion import AbsorbingGraph
        from sedd_megatron.training.build import build_model

        precision, graph = PrecisionOptions(bf16=bf16), AbsorbingGraph(27)
        (model,) = build_model(SHAPE, parallel, precision, RecomputeOptions(), graph, groups, for_training)
        assert type(model.decoder.layers[0].mlp.linear_fc1).__name__ == expected


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
