"""--tp-comm-overlap is refused where it cannot run, and asked for in training alone."""

import dataclasses

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import ParallelOptions
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.user_buffers import check_user_buffers

FLAGS = "--data-path x --tp-comm-overlap".split()
NEEDS = "--tp-comm-overlap needs Transformer Engine's layers on GPUs, and not"
SHARED = "--tensor-model-parallel-size 2 --sequence-parallel".split()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--bf16"], "--tp-comm-overlap runs beside bfloat16 products over a shared sequence; add --sequence-parallel"),
        (SHARED, "--tp-comm-overlap runs beside bfloat16 products"),
        ([*SHARED, "--bf16", "--device", "cpu"], f"{NEEDS} --device cpu; leave"),
        ([*SHARED, "--bf16", "--transformer-impl", "local"], f"{NEEDS} --transformer-impl local; leave"),
    ],
)  # fmt: skip
def test_rules(flags, text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as refused:
        parse_pretrain_options([*FLAGS, *flags])
    assert str(refused.value).startswith(text)


def test_a_machine_without_it_is_one_line():
    with pytest.raises(UserError) as refused:
        check_user_buffers(ParallelOptions(tp_comm_overlap=True), torch.device("cpu"))
    assert str(refused.value).startswith("--tp-comm-overlap needs GPUs and Transformer Engine, and there is no GPU; ")
    check_user_buffers(ParallelOptions(), torch.device("cpu"))


def test_sampling_has_no_buffers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cpu_backend.install()
    from sedd_megatron.model.model_config import transformer_config

    options = parse_pretrain_options([*FLAGS, *SHARED, "--bf16"])
    groups = (options.model, options.parallel, options.precision, options.recompute, torch.device("cpu"))
    assert transformer_config(*groups, for_training=True).tp_comm_overlap
    assert not transformer_config(*groups).tp_comm_overlap
    without = dataclasses.replace(options.parallel, tp_comm_overlap=False)
    assert not transformer_config(options.model, without, *groups[2:], for_training=True).tp_comm_overlap
