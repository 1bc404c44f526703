"""A run with --async-save whose writing is slow, or fails at its end, or is overtaken by a loss that is not finite."""

import os
import threading

import pytest

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from tests.distributed.launch import own_jobs

EXPECTED = {
    "no manifest": r"^rank 0 cannot save iteration 9 to \S+: no space left on device; the checkpoints before are whole",
    "diverges": "the loss is nan",
}


def train(mode: str, arguments: list[str]) -> None:
    cpu_backend.install()
    from sedd_megatron.training import checkpoint, loop
    from sedd_megatron.training.pretrain import pretrain

    options = parse_pretrain_options(arguments)
    write, step, moved, done = checkpoint.write_own_shards, loop.train_step, threading.Condition(), [0]

    def write_two_steps_later(directory, own):
        saved_at = int(directory.name.split("_")[1].split(".")[0])
        wanted = min(saved_at + 2, options.training.train_iters)
        with moved:
            assert moved.wait_for(lambda: done[0] >= wanted, timeout=60), "training waits for the checkpoint"
        return write(directory, own)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    def counted_step(run, batches, flags):
        if mode == "diverges" and run.iteration == 4:
            # Let the checkpoint of step 3 be written only when the run is about to end.
            threading.Timer(2.0, lambda: announce(options.training.train_iters)).start()
            raise UserError("the loss is nan")
        metrics, raised = step(run, batches, flags)
        announce(metrics["iteration"])
        return metrics, raised

    def announce(iteration):
        with moved:
            done[0] = iteration
            moved.notify_all()

    if mode in ("slow", "diverges"):
        checkpoint.write_own_shards, loop.train_step = write_two_steps_later, counted_step
    elif os.environ["RANK"] == "0":
        checkpoint.write_manifest = fail
    if mode == "slow":
        pretrain(options)
        return
    with pytest.raises(UserError, match=EXPECTED[mode]):
        pretrain(options)


if __name__ == "__main__":
    ((mode, arguments),) = own_jobs()
    train(mode, arguments)
