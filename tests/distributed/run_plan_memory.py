"""What training takes of a rank's memory, by kind: bytes of tensors, counted where they are allocated."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import PretrainOptions
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.benchmarks.pairs import peak_memory
from tests.benchmarks.training_throughput import sedd_run
from tests.distributed.launch import own_jobs


def measure(options: PretrainOptions, num_tokens: int) -> dict[str, Any]:
    """Bytes by kind after a step, and at its worst moment what it takes beside them."""
    num_chunks = options.parallel.num_model_chunks(options.model.num_layers)
    with parallel_groups(options.parallel, num_chunks) as groups:
        run, step = sedd_run(options, num_tokens, groups)
        # On a busy machine gloo's threads give back late what they have sent, so that a step may seem to take more.
        passing = min(peak_memory(step) for _ in range(3))
        (inner,) = run.optimizer.chained_optimizers
        buffers = [buffer for chunk in run.ddp_chunks for buffer in chunk.buffers]
        weights = [parameter for chunk in run.model_chunks for parameter in chunk.parameters()]
        states = [value for state in inner.optimizer.state.values() for value in state.values()]
        states += [main.tensor for main in run.main_parameters]
        own = _storages(weights)
        return {
            "pipeline_rank": groups.pipeline_rank,
            "parameters": sum(weight.numel() for weight in weights),
            "weights": sum(own.values()),
            "gradients": sum(_storages([buffer.grad_data for buffer in buffers]).values()),
            # In float32 the main parameters are the weights themselves.
            "optimizer": sum(size for start, size in _storages(states).items() if start not in own),
            "moving average": sum(_storages(run.ema.averages).values()),
            "passing": passing,
        }


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors lie in, by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def main() -> None:
    cpu_backend.install()
    for flags, num_tokens, output in own_jobs():
        found = measure(parse_pretrain_options(flags), num_tokens)
        Path(f"{output}-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
