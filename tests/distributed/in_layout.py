"""A saved model in this job's layout, and what each rank says of it as a file."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sedd_megatron.config import ParallelOptions, PrecisionOptions
from sedd_megatron.parallel.groups import parallel_groups
from sedd_megatron.pretrained import PretrainedModel


@contextlib.contextmanager
def model_in_layout(model_folder: str, tensor_size: int, pipeline_size: int) -> Iterator[PretrainedModel]:
    """This rank's part of the model; its groups end with the block."""
    from sedd_megatron.saved_model import find_saved_model

    parallel = ParallelOptions(
        tensor_model_parallel_size=tensor_size, pipeline_model_parallel_size=pipeline_size, device="cpu"
    )
    saved = find_saved_model(model_folder, "cpu")
    with parallel_groups(parallel) as groups:
        yield saved.load(parallel, PrecisionOptions(), lambda: groups)


def write_found(folder: str, model: PretrainedModel, found: Any) -> None:
    """Into LAYOUT-RANK.json of the folder."""
    path = Path(folder) / f"{model.groups.layout}-{torch.distributed.get_rank()}.json"
    path.write_text(json.dumps(found))
