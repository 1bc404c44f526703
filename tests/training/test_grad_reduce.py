"""--grad-reduce-in-bf16: gradients in half the memory, and what is added up over steps as exact as before."""

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel.main_grad import embedding_into_main_grad
from tests.training.test_optimizer_step import build

BF16 = ["--bf16", "--grad-reduce-in-bf16"]


def trained(byte_corpus, *flags: str):
    run = build(*flags, "--data-path", str(byte_corpus), "--lr-warmup-iters", "1")
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.step import train_step

    windows = open_windows(weighted_corpora(run.options.data), seq_length=16, split="1,0,0", num_tokens=256, seed=0)
    batches = training_iterators(run, windows.train)
    steps = [train_step(run, batches)[0] for _ in range(12)]
    return run, *(torch.tensor([step[name] for step in steps]) for name in ("loss", "grad_norm"))


@pytest.mark.parametrize("flags", [[], ["--use-distributed-optimizer"], ["--loss-chunk-rows", "0"]], ids=" ".join)
def test_gradients_alone_are_in_bfloat16(byte_corpus, flags):
    _, expected, expected_norm = trained(byte_corpus, "--bf16", *flags)
    run, loss, norm = trained(byte_corpus, *BF16, *flags)
    parameters = [parameter for chunk in run.ddp_chunks for parameter in chunk.parameters()]
    assert {parameter.main_grad.dtype for parameter in parameters} == {torch.bfloat16}
    assert {buffer.grad_data.dtype for chunk in run.ddp_chunks for buffer in chunk.buffers} == {torch.bfloat16}
    assert {main.tensor.dtype for main in run.main_parameters} == {torch.float32}
    assert {tensor.dtype for tensor in run.ema.averages} == {torch.float32}
    state = run.optimizer.chained_optimizers[0].optimizer.state[run.main_parameters[0].tensor]
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    # Rounded to 8 bits in each of four micro-batches, and not the same run.
    assert 0 < ((norm - expected_norm) / expected_norm).abs().max() < 2**-6
    assert loss[0] == expected[0]
    assert 0 < ((loss - expected) / expected).abs().max() < 2**-6
    assert loss[-1] < loss[0]


def test_many_rows_of_one_token_are_added_up():
    weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    weight.main_grad = torch.zeros(3, 2, dtype=torch.bfloat16)
    embedding_into_main_grad(torch.ones(4096, dtype=torch.int64), weight).sum().backward()
    assert weight.main_grad.tolist() == [[0, 0], [4096, 4096], [0, 0]]


def test_float32_weights_have_none():
    with pytest.raises(UserError, match="--grad-reduce-in-bf16 sums gradients of bfloat16 weights; add --bf16"):
        parse_pretrain_options(["--data-path", "x", "--grad-reduce-in-bf16"])
