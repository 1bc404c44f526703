"""A run on a GPU compiles what it needs before its first step ends and nothing after that, validations included."""

from torch._dynamo.utils import counters

from sedd_megatron.arguments import parse_pretrain_options, weighted_corpora
from sedd_megatron.data.tokenizers import ByteTokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.parallel.groups import parallel_groups
from tests.distributed.launch import own_jobs

FLAGS = (
    "--num-layers 2 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --micro-batch-size 8 "
    "--global-batch-size 16 --lr-warmup-iters 1 --eval-iters 1 --hidden-dropout 0.1 --device cuda"
).split()


def check(flags: list[str]) -> None:
    options = parse_pretrain_options([*FLAGS, *flags])
    tokenizer = ByteTokenizer()
    windows = open_windows(
        weighted_corpora(options.data), seq_length=128, split="80,20,0", num_tokens=tokenizer.num_tokens, seed=0
    )
    with parallel_groups(options.parallel) as groups:
        from sedd_megatron.training.build import build_run
        from sedd_megatron.training.iterators import training_iterators
        from sedd_megatron.training.step import train_step
        from sedd_megatron.training.validation import compile_validation, validate

        run = build_run(options, tokenizer, groups)
        compile_validation(run, windows.valid)
        batches = training_iterators(run, windows.train)
        train_step(run, batches)
        before = counters["stats"]["unique_graphs"]
        assert before > 0
        for _ in range(3):
            train_step(run, batches)
            validate(run, windows.valid)
        assert counters["stats"]["unique_graphs"] == before


if __name__ == "__main__":
    for job in own_jobs():
        check(job)
