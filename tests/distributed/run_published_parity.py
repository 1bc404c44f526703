"""Published weights in this layout's model: log-scores, loss and gradients against the published code's."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sedd_megatron.config import ModelOptions, ParallelOptions, PrecisionOptions, RecomputeOptions
from sedd_megatron.data.micro_batch import MicroBatch, own_part_of_sequence, positions_that_count
from sedd_megatron.diffusion.corruption import NoisyBatch
from sedd_megatron.parallel.groups import parallel_groups
from sedd_megatron.parallel.keyed_dropout import dropout_keys
from tests.distributed.launch import own_jobs

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


class Published(NamedTuple):
    """A published model's tensors and configuration."""

    golden: dict[str, torch.Tensor]
    config: dict[str, Any]

    @classmethod
    def read(cls, graph_name: str) -> "Published":
        path = FIXTURES / f"model_{graph_name}.safetensors"
        with safe_open(path, framework="pt") as file:
            return cls(load_file(path), json.loads(file.metadata()["config"]))

    def options(self, **others: Any) -> ModelOptions:
        shape = self.config["model"]
        return ModelOptions(
            num_layers=shape["n_blocks"], hidden_size=shape["hidden_size"], num_attention_heads=shape["n_heads"],
            seq_length=shape["length"], cond_dim=shape["cond_dim"], hidden_dropout=0.0, **others,
        )  # fmt: skip

    def fill(self, model) -> set[str]:
        """Put the published weights into this rank's part of our model; the names of those that were put."""
        from sedd_megatron.model.published_weights import published_name

        seen = set()
        with torch.no_grad():
            for shard in model.sharded_tensors().values():
                name = published_name(shard)
                seen.add("param." + name)
                shard.data.copy_(self.ours("param." + name, shard))
        return seen

    def ours(self, key: str, shard) -> torch.Tensor:
        """This rank's part of `param.` or `grad.` and a name."""
        from sedd_megatron.model.published_weights import own_part

        name = key.split(".", 1)[1]
        return own_part(self.golden[key], name, shard, self.config["model"]["n_heads"])


def check(graph_name: str, tensor_size: int, pipeline_size: int, context_size: int) -> None:
    published = Published.read(graph_name)
    golden, options = published.golden, published.options()
    parallel = ParallelOptions(
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=pipeline_size,
        context_parallel_size=context_size,
        sequence_parallel=tensor_size > 1,
        device="cpu",
    )
    with parallel_groups(parallel) as groups:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from sedd_megatron.diffusion.graph import make_graph
        from sedd_megatron.model.published_weights import published_name
        from sedd_megatron.training.build import build_model
        from sedd_megatron.training.forward_step import make_forward_step

        graph = make_graph(graph_name, published.config["tokens"])
        (model,) = build_model(options, parallel, PrecisionOptions(), RecomputeOptions(), graph, groups)
        seen = published.fill(model)
        if pipeline_size == 1:
            assert seen == {key for key in golden if key.startswith("param.")} - {"param.rotary_emb.inv_freq"}
        if pipeline_size * context_size == 1:
            log_score = model.log_score(golden["x"], golden["sigma"])
            error = (log_score - golden["log_score"]).abs().max() / golden["log_score"].abs().max()
            assert error < 2e-5, f"log-scores are off by {error:.1e}"

        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model,
                                      pg_collection=groups.collection)  # fmt: skip
        model.config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=groups.collection)
        batch = NoisyBatch(golden["x0"], golden["x"], golden["t"], golden["sigma"], golden["dsigma"], torch.arange(4))
        own = own_part_of_sequence(batch, groups.context_rank, groups.context_size)
        counting = positions_that_count(own.x_t, graph, multiple=1)
        micro_batch = MicroBatch(own, *counting, dropout_keys(0, own.sample_index))
        losses = get_forward_backward_func()(
            forward_step_func=make_forward_step(graph, groups, loss_chunk_rows=7, num_microbatches=1),
            data_iterator=iter([micro_batch]), model=[ddp],
            num_microbatches=1, seq_length=options.seq_length, micro_batch_size=4, forward_only=False,
        )  # fmt: skip
        if groups.is_last_stage:
            expected = golden["loss"].double().mean() / options.seq_length
            mean = losses[0]["numbers"][0]
            torch.distributed.all_reduce(mean, group=groups.collection.cp)
            assert abs(mean / context_size - expected) < 1e-5 * expected.abs()
        parameters = dict(model.named_parameters())
        for key, shard in model.sharded_tensors().items():
            name = published_name(shard)
            expected = published.ours("grad." + name, shard)
            actual = parameters[key].main_grad
            error = (actual - expected).norm() / golden["grad." + name].norm().clamp_min(1e-12)
            assert error < 1e-4, f"gradient of {name} is off by {error:.1e}"


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
