"""The fused head and loss against the dense float64 loss on these ranks: value, every gradient, collectives."""

import os

import torch

from sedd_megatron.config import ParallelOptions
from sedd_megatron.data.micro_batch import positions_that_count
from sedd_megatron.parallel.groups import ParallelGroups, parallel_groups
from tests.distributed.launch import own_jobs
from tests.distributed.run_vocab_parallel import CollectiveCount

BATCH, LENGTH, HIDDEN, EPS = 3, 7, 6, 1e-5


def noisy_batch(graph, which: str, length: int = LENGTH):
    """A batch in which some, none or all positions are masked (or moved); the last sequence at the smallest time."""
    from sedd_megatron.diffusion import LogLinearSchedule
    from sedd_megatron.diffusion.corruption import NoisyBatch

    generator = torch.Generator().manual_seed(graph.num_tokens)
    x_0 = torch.randint(0, graph.num_tokens, (BATCH, length), generator=generator)
    other = torch.randint(0, graph.num_tokens, (BATCH, length), generator=generator)
    moves = torch.rand(BATCH, length, generator=generator) < {"none": -1.0, "some": 0.6, "all": 2.0}[which]
    x_t = torch.where(moves, other if graph.mask_token_id is None else graph.mask_token_id, x_0)
    t = torch.tensor([1.0, 0.5, 1e-3])
    noise = LogLinearSchedule()(t)
    return NoisyBatch(x_0, x_t, t, noise.sigma, noise.sigma_rate, torch.arange(BATCH))


def tensors(padded: int, dtype: str, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """The head's inputs by name, whole. Factor and shift are float32 in every precision."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (length, BATCH, HIDDEN), "factor": (BATCH, HIDDEN), "shift": (BATCH, HIDDEN),
              "weight": (padded, HIDDEN), "bias": (padded,)}  # fmt: skip
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t if name in ("factor", "shift") else t.to(getattr(torch, dtype)) for name, t in found.items()}


def expected(graph, batch, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, and the gradient of each input, by the graph's own formula in float64."""
    from sedd_megatron.model.score_head import log_score_offset

    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    normalized = torch.nn.functional.layer_norm(leaves["hidden_states"], [HIDDEN], eps=EPS)
    hidden = normalized * leaves["factor"] + leaves["shift"]
    logits = (hidden @ leaves["weight"].t() + leaves["bias"])[..., : graph.num_states].transpose(0, 1)
    sigma = batch.sigma.double()
    log_score = logits - log_score_offset(graph, sigma)[:, None, None]
    log_score = log_score.scatter(-1, batch.x_t[..., None], 0.0)
    entropy = graph.score_entropy(log_score, sigma, batch.x_t, batch.x_0)
    loss = (batch.sigma_rate.double()[:, None] * entropy).sum(1).mean()
    loss.backward()
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def check(
    graph_name: str, num_tokens: int, padded: int, which: str, chunk_rows: int, multiple: int, dtype: str,
    device: str = "cpu", length: int = LENGTH, bf16_tolerance: float = 2e-2,
) -> None:  # fmt: skip
    world_size = int(os.environ["WORLD_SIZE"])
    parallel = ParallelOptions(tensor_model_parallel_size=world_size, device=device)
    with parallel_groups(parallel) as groups:
        from sedd_megatron.diffusion.graph import make_graph

        graph = make_graph(graph_name, num_tokens)
        batch, whole = noisy_batch(graph, which, length), tensors(padded, dtype, length)
        reference = expected(graph, batch, whole)
        own = slice(groups.tensor_rank * padded // world_size, (groups.tensor_rank + 1) * padded // world_size)
        for in_main_grad in (False, True):
            inputs = whole | {name: whole[name][own] for name in ("weight", "bias")}
            actual = fused(graph, batch, inputs, chunk_rows, multiple, groups, in_main_grad)
            tolerance = 2e-6 if dtype == "float32" else bf16_tolerance
            for name, tensor in actual.items():
                wanted = reference[name][own] if name in ("weight", "bias") else reference[name]
                # By the whole tensor's norm: single entries near 0 are sums that cancel.
                error = (tensor.double().cpu() - wanted).norm() / reference[name].norm().clamp_min(1e-30)
                assert error < tolerance, (name, error.item(), in_main_grad)


def fused(
    graph, batch, inputs, chunk_rows: int, multiple: int, groups: ParallelGroups, in_main_grad: bool
) -> dict[str, torch.Tensor]:
    """Loss and gradients; those of the parameters taken from main_grad where they have one, as under Megatron."""
    from sedd_megatron.parallel.fused_head import FusedHeadSettings, fused_head_score_entropy
    from sedd_megatron.training.forward_step import score_entropy_rows

    leaves = {name: tensor.clone().to(groups.device).requires_grad_() for name, tensor in inputs.items()}
    parameters = [leaves["weight"], leaves["bias"]]
    if in_main_grad:
        for parameter in parameters:
            parameter.main_grad = torch.zeros(parameter.shape, device=groups.device)
    position, num_rows = positions_that_count(batch.x_t, graph, multiple)
    batch = type(batch)(*(field.to(groups.device) for field in batch))
    rows, constant = score_entropy_rows(batch, graph, position.to(groups.device), num_rows)
    # Half of it: the schedule divides by the number of micro-batches.
    settings = FusedHeadSettings(graph.num_tokens, chunk_rows, gradient_scale=0.5)
    with CollectiveCount() as forward:
        loss = fused_head_score_entropy(*leaves.values(), rows, settings, EPS, groups.collection.tp).loss
    with CollectiveCount() as backward:
        (loss / 2).backward()
    assert forward.count == (groups.tensor_size > 1), f"{forward.count} collectives in the forward pass"
    assert backward.count == 0, f"{backward.count} collectives in the gradient path"
    gradients = {name: leaf.grad.float() for name, leaf in leaves.items()}
    for name in ("hidden_states", "factor", "shift"):
        torch.distributed.all_reduce(gradients[name], group=groups.collection.tp)
    if in_main_grad:
        assert all(parameter.grad_added_to_main_grad for parameter in parameters)
        gradients |= {name: leaves[name].main_grad for name in ("weight", "bias")}
    return {"loss": loss.detach() + constant.sum()} | {name: 2 * gradient for name, gradient in gradients.items()}


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
