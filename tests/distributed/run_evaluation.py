"""A published folder in this layout: what every rank bounds of some sequences."""

import json
from pathlib import Path

import torch

from sedd_megatron.config import ParallelOptions, PrecisionOptions
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.launch import own_jobs


def check(folder: str, model_folder: str, tensor_size: int, pipeline_size: int) -> None:
    from sedd_megatron.saved_model import find_saved_model

    parallel = ParallelOptions(
        tensor_model_parallel_size=tensor_size, pipeline_model_parallel_size=pipeline_size, device="cpu"
    )
    saved = find_saved_model(model_folder, "cpu")
    with parallel_groups(parallel) as groups:
        model = saved.load(parallel, PrecisionOptions(), lambda: groups)
        texts = ["1 2 3 4 5 6 7", " ".join(str(n % 30) for n in range(40))]
        units = [unit.record() for unit in model.nll(texts, mc_samples=16, batch_size=5)]
        (Path(folder) / f"{groups.layout}-{torch.distributed.get_rank()}.json").write_text(json.dumps(units))


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
