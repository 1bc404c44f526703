"""The fused head and loss in one process: derivatives by differences, bf16 logits, every size of vocabulary."""

import math

import pytest
import torch

from sedd_megatron.config import ParallelOptions
from sedd_megatron.data.micro_batch import positions_that_count
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.parallel import cpu_backend

EPS = 1e-5
VOCABULARIES = [27, 257, 32000, 50257, 50304, 65536, 100277, 131072]


@pytest.fixture(scope="module")
def tp_group():
    from sedd_megatron.parallel.groups import groups_of_this_process

    cpu_backend.install()
    return groups_of_this_process(ParallelOptions(device="cpu")).collection.tp


def random_rows(has_log_sum: bool, num_states: int):
    """Rows of five of eight positions, 0 among them, and two at 0 that only fill; without a sum of log-scores x_t is
    none of the states.
    """
    from sedd_megatron.parallel.fused_head import ScoreEntropyRows

    generator = torch.Generator().manual_seed(0)
    position = torch.tensor([3, 0, 6, 1, 7, 0, 0])
    x_t, x_0 = torch.randint(0, num_states, (2, len(position)), generator=generator)
    log_scale, log_sum, target = torch.rand(3, len(position), generator=generator, dtype=torch.float64)
    log_scale[5:], log_sum[5:], target[5:] = -torch.inf, 0.0, 0.0
    return ScoreEntropyRows(
        5, position, x_0, x_t if has_log_sum else None, log_scale - 1, -log_sum if has_log_sum else None, -target,
        torch.zeros(len(position), dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize("has_log_sum", [False, True])
@pytest.mark.parametrize(("chunk_rows", "multiple"), [(1, 1), (3, 1), (8, 1), (4, 2), (8, 5)])
def test_gradients_are_the_derivatives(has_log_sum, chunk_rows, multiple, tp_group, monkeypatch):
    """With multiples as a GPU has them the last tile ends in the padding, or goes to its end."""
    from sedd_megatron.parallel import fused_head

    # Several tiles of columns, the last of them smaller.
    for sizes in (fused_head.ROW_MULTIPLE, fused_head.COLUMN_MULTIPLE):
        monkeypatch.setitem(sizes, "cpu", multiple)
    monkeypatch.setitem(fused_head.TILE_ELEMENTS, "cpu", 0)
    monkeypatch.setattr(fused_head, "MIN_TILE_COLUMNS", 4)
    rows = random_rows(has_log_sum, 9)
    settings = fused_head.FusedHeadSettings(9, chunk_rows, 1.0)
    shapes = ((4, 2, 3), (2, 3), (2, 3), (12, 3), (12,))
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda *tensors: fused_head.fused_head_score_entropy(*tensors, rows, settings, 1e-5, tp_group).loss, leaves
    )


def test_another_scale_than_the_promised_is_refused(tp_group):
    from sedd_megatron.parallel.fused_head import FusedHeadSettings, fused_head_score_entropy

    shapes = ((4, 2, 3), (2, 3), (2, 3), (12, 3), (12,))
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    for parameter in leaves[3:]:
        parameter.main_grad = torch.zeros_like(parameter)
    settings = FusedHeadSettings(9, 4, gradient_scale=0.25)
    loss = fused_head_score_entropy(*leaves, random_rows(True, 9), settings, 1e-5, tp_group).loss
    with pytest.raises(RuntimeError, match="scaled by something else than gradient_scale"):
        (loss / 2).backward()


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 2049, 8192, 8193, 33_024, 50_304])
@pytest.mark.parametrize(("largest", "multiple"), [(2048, 1), (8192, 256), (100, 256), (4228, 256)])
def test_parts_are_few_equal_and_cover_all(count, largest, multiple):
    from sedd_megatron.parallel.fused_head import equal_parts

    parts = equal_parts(count, largest, multiple)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    limit = max(largest // multiple, 1) * multiple
    assert all(size <= limit and size % multiple == 0 for size in sizes[:-1])
    assert len(set(sizes[:-1])) <= 1
    assert len(parts) <= math.ceil(count / limit)
    if multiple == 1 and parts:
        assert max(sizes) - min(sizes) < len(parts)


@pytest.mark.parametrize("num_tokens", VOCABULARIES)
@pytest.mark.parametrize("graph_name", ["absorb", "uniform"])
def test_gradient_from_bf16_logits_is_that_of_float64(graph_name, num_tokens, tp_group):
    """The gradient with respect to one row's logits, read from the bias, which each of them has for itself."""
    from sedd_megatron.diffusion import LogLinearSchedule
    from sedd_megatron.diffusion.corruption import NoisyBatch
    from sedd_megatron.model.score_head import log_score_offset
    from sedd_megatron.parallel.fused_head import FusedHeadSettings, fused_head_score_entropy
    from sedd_megatron.training.forward_step import score_entropy_rows

    graph, generator = make_graph(graph_name, num_tokens), torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 1, 16, generator=generator).bfloat16()
    factor, shift = torch.ones(1, 16), torch.zeros(1, 16)
    weight = torch.randn(num_tokens + 1, 16, generator=generator).bfloat16()
    bias = torch.nn.Parameter(torch.zeros(num_tokens + 1, dtype=torch.bfloat16))
    # The logits that both start from: bf16 numbers multiplied and added up in float32.
    normalized = torch.nn.functional.layer_norm(hidden.float(), [16], eps=EPS).bfloat16()
    logits = (normalized.double() @ weight.double().t())[:, :, : graph.num_states]
    settings = FusedHeadSettings(num_tokens, 64, 1.0)
    x_0 = torch.tensor([[3]])
    for t in torch.logspace(-3, 0, 7):
        for moved in (5, 3) if graph.mask_token_id is None else (graph.mask_token_id,):
            noise = LogLinearSchedule()(t[None])
            batch = NoisyBatch(x_0, torch.tensor([[moved]]), t[None], *noise, torch.zeros(1))
            rows, _ = score_entropy_rows(batch, graph, *positions_that_count(batch.x_t, graph, 1))
            weight.main_grad, bias.main_grad = torch.zeros(weight.shape), torch.zeros(num_tokens + 1)
            loss = fused_head_score_entropy(hidden, factor, shift, weight, bias, rows, settings, EPS, tp_group).loss
            loss.backward()
            assert loss.isfinite()

            leaf = logits.clone().requires_grad_()
            log_score = leaf - log_score_offset(graph, noise.sigma.double())[:, None, None]
            log_score = log_score.scatter(-1, batch.x_t[..., None], 0.0)
            entropy = graph.score_entropy(log_score, noise.sigma.double(), batch.x_t, x_0)
            (noise.sigma_rate.double()[:, None] * entropy).sum().backward()
            expected = leaf.grad[0, 0]
            actual = bias.main_grad[: graph.num_states].double()
            assert (actual - expected).norm() < 1e-5 * expected.norm(), (t, moved)
            assert (actual - expected).abs().max() < 1e-5 * expected.abs().max(), (t, moved)
