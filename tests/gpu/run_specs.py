"""One model, its weights the same by name, in two implementations on one GPU: log-scores and gradients."""

import hashlib

import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.parallel.groups import ParallelGroups, parallel_groups
from tests.distributed.launch import own_jobs

NUM_TOKENS = 1000
BATCH, LENGTH = 4, 256
SHAPE = (
    f"--data-path x --num-layers 3 --hidden-size 1024 --num-attention-heads 16 --seq-length {LENGTH} "
    f"--micro-batch-size {BATCH} --global-batch-size {BATCH} --hidden-dropout 0 --device cuda"
).split()


def outcome(flags: list[str], groups: ParallelGroups) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter, in float32 on the host."""
    from sedd_megatron.diffusion import AbsorbingGraph
    from sedd_megatron.training.build import build_model

    options = parse_pretrain_options([*SHAPE, *flags])
    graph = AbsorbingGraph(NUM_TOKENS)
    (model,) = build_model(options.model, options.parallel, options.precision, options.recompute, graph, groups)
    with torch.no_grad():
        for name, shard in model.sharded_tensors().items():
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            values = torch.randn(shard.data.shape, generator=torch.Generator().manual_seed(seed)) * 0.02
            shard.data.copy_((values + 1 if "norm" in name else values).to(groups.device))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randint(0, NUM_TOKENS + 1, (BATCH, LENGTH), generator=generator).to(groups.device)
    sigma = torch.rand(BATCH, generator=generator).to(groups.device)
    weights = torch.randn(BATCH, LENGTH, 1, generator=generator).to(groups.device)
    # Twice: delayed scaling takes its factors from the pass before.
    for _ in range(2):
        model.zero_grad()
        # Or Transformer Engine goes on with the FP8 weights of the pass before.
        model.set_is_first_microbatch()
        logits = model(x_t, sigma)
        (logits.float().tanh() * weights).sum().backward()
    found = {name: parameter.grad.float().cpu() for name, parameter in model.named_parameters()}
    return found | {"logits": logits.detach().float().cpu()}


def check(flags: list[str], reference_flags: list[str], logits_tolerance: float, gradient_tolerance: float) -> None:
    with parallel_groups(parse_pretrain_options(SHAPE).parallel) as groups:
        expected, actual = outcome(reference_flags, groups), outcome(flags, groups)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = ((actual[name] - tensor).norm() / tensor.norm()).item()
        print(f"{' '.join(flags)} | {name} | {difference:.1e}", flush=True)
        assert difference < (logits_tolerance if name == "logits" else gradient_tolerance), (name, difference)


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
