"""The micro-batches that this rank trains on, against the same drawn here for their places in the training order."""

import torch

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.windows import open_windows
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.launch import own_jobs

STEPS = 3
FIRST_SAMPLE = 40


def check(arguments: list[str]) -> None:
    cpu_backend.install()
    from sedd_megatron.diffusion.corruption import corrupt
    from sedd_megatron.diffusion.draws import Stream
    from sedd_megatron.training.build import build_run
    from sedd_megatron.training.iterators import training_iterators
    from sedd_megatron.training.pretrain import data_tokenizer

    options = parse_pretrain_options(arguments)
    tokenizer = data_tokenizer(options)
    training = options.training
    corpora = weighted_corpora(options.data)
    windows = open_windows(corpora, seq_length=options.model.seq_length, split=options.data.split,
                           num_tokens=tokenizer.num_tokens, seed=training.seed)  # fmt: skip
    with parallel_groups(options.parallel, options.parallel.num_model_chunks(options.model.num_layers)) as groups:
        run = build_run(options, tokenizer, groups)
        run.consumed_samples = FIRST_SAMPLE
        iterators = training_iterators(run, windows.train)
        assert len(iterators) == len(run.ddp_chunks)
        seen = []
        for _ in range(STEPS * run.num_microbatches):
            batches = [next(i).noisy for i in iterators]
            for batch in batches[1:]:
                assert all(torch.equal(a, b) for a, b in zip(batch, batches[0], strict=True))
            seen.append(batches[0])

        for batch in seen:
            n = batch.sample_index
            x_0 = torch.stack([windows.train[int(i)][1] for i in n])
            whole = corrupt(x_0, n, graph=run.graph, schedule=run.schedule, seed=training.seed,
                            stream=Stream.TRAIN_NOISE)  # fmt: skip
            length = x_0.shape[1] // groups.context_size
            own = slice(groups.context_rank * length, (groups.context_rank + 1) * length)
            for name in ("t", "sigma", "sigma_rate"):
                assert torch.equal(getattr(batch, name), getattr(whole, name)), name
            for name in ("x_0", "x_t"):
                assert torch.equal(getattr(batch, name), getattr(whole, name)[:, own]), name

        # Over all ranks, each sample of a step is read once for each of a replica's ranks, in the order of one process.
        indices = torch.cat([batch.sample_index for batch in seen])
        gathered = [torch.empty_like(indices) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, indices)
        per_step = [g.view(STEPS, -1) for g in gathered]
        ranks_of_a_replica = len(gathered) // groups.data_size
        for step in range(STEPS):
            first = FIRST_SAMPLE + step * training.global_batch_size
            expected = torch.arange(first, first + training.global_batch_size).repeat_interleave(ranks_of_a_replica)
            assert torch.equal(torch.cat([indices[step] for indices in per_step]).sort().values, expected)


if __name__ == "__main__":
    for arguments in own_jobs():
        check(arguments)
