"""Sharded loss against the dense one on these ranks; counts the collectives of forward and backward."""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_megatron.config import ParallelOptions
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.launch import own_jobs


class CollectiveCount(TorchDispatchMode):
    """Counts c10d operations below autograd, wherever they are issued from."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def check(graph_name: str, num_tokens: int, padded: int) -> None:
    from sedd_megatron.diffusion.graph import make_graph
    from sedd_megatron.model.score_head import log_score_offset
    from sedd_megatron.parallel.vocab_parallel import gather_log_score, vocab_parallel_score_entropy

    world_size = int(os.environ["WORLD_SIZE"])
    with parallel_groups_here(world_size) as groups:
        generator = torch.Generator().manual_seed(num_tokens)
        graph = make_graph(graph_name, num_tokens)
        logits = torch.randn(3, 5, padded, generator=generator)
        x_0 = torch.randint(0, num_tokens, (3, 5), generator=generator)
        move = torch.rand(3, 5, generator=generator) < 0.6
        other = torch.randint(0, num_tokens, (3, 5), generator=generator)
        x_t = torch.where(move, other if graph.mask_token_id is None else graph.mask_token_id, x_0)
        sigma = torch.tensor([1e-3, 0.7, 6.0])
        weights = torch.rand(3, 5, generator=generator)
        offset = log_score_offset(graph, sigma)[:, None].expand(3, 5)

        dense = logits[..., : graph.num_states].double().requires_grad_()
        log_score = (dense - offset.double()[..., None]).scatter(-1, x_t[..., None], 0.0)
        expected = graph.score_entropy(log_score, sigma.double(), x_t, x_0)
        (expected * weights.double()).sum().backward()

        width = padded // world_size
        columns = slice(groups.tensor_rank * width, (groups.tensor_rank + 1) * width)
        shard = logits[..., columns].clone().requires_grad_()
        coefficients = graph.coefficients(sigma, x_t, x_0)
        with CollectiveCount() as forward:
            actual = vocab_parallel_score_entropy(
                shard, offset, x_t, x_0, coefficients, graph.num_states, groups.collection.tp
            )
        with CollectiveCount() as backward:
            (actual * weights).sum().backward()
        assert forward.count == (0 if world_size == 1 else 1), f"{forward.count} collectives in the forward pass"
        assert backward.count == 0, f"{backward.count} collectives in the backward pass"
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-5)
        expected_grad = torch.zeros(3, 5, padded, dtype=torch.float64)
        expected_grad[..., : graph.num_states] = dense.grad
        torch.testing.assert_close(shard.grad.double(), expected_grad[..., columns], rtol=2e-5, atol=1e-6)
        whole = gather_log_score(shard.detach(), offset, x_t, graph.num_states, groups.collection.tp)
        torch.testing.assert_close(whole.double(), log_score.detach(), rtol=1e-6, atol=1e-5)


def parallel_groups_here(world_size: int):
    return parallel_groups(ParallelOptions(tensor_model_parallel_size=world_size, device="cpu"))


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
