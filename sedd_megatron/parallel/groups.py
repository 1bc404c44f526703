"""Set-up and tear-down of torch.distributed and Megatron's process groups; the only user of Megatron's
parallel_state.
"""

import atexit
import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from packaging.version import Version

from sedd_megatron.config import ParallelOptions
from sedd_megatron.errors import UserError, say
from sedd_megatron.launcher import has_gpus_of_its_own, is_first_rank
from sedd_megatron.layout_rules import data_parallel_size_of
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.lost_ranks import RollCall, lost_rank
from sedd_megatron.parallel.main_grad import install_gradient_accumulation
from sedd_megatron.wording import counted

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

Key = TypeVar("Key")
Value = TypeVar("Value")

SECONDS_BETWEEN_LOOKS = 0.05  # of a rank that waits for the first one


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the layout: Megatron's process groups and the device that this rank computes on."""

    collection: "ProcessGroupCollection"
    device: torch.device

    @property
    def tensor_rank(self) -> int:
        """Which vocabulary and head shard this rank holds."""
        return self.collection.tp.rank()

    @property
    def tensor_size(self) -> int:
        """Number of shards of each layer."""
        return self.collection.tp.size()

    @property
    def pipeline_rank(self) -> int:
        """Which stage this rank holds."""
        return self.collection.pp.rank()

    @property
    def pipeline_size(self) -> int:
        """Number of stages."""
        return self.collection.pp.size()

    @property
    def context_rank(self) -> int:
        """Which contiguous part of each sequence this rank holds."""
        return self.collection.cp.rank()

    @property
    def context_size(self) -> int:
        """Number of parts of each sequence."""
        return self.collection.cp.size()

    @property
    def data_rank(self) -> int:
        """Which replica this rank belongs to."""
        return self.collection.dp.rank()

    @property
    def data_size(self) -> int:
        """Number of replicas."""
        return self.collection.dp.size()

    @property
    def layout(self) -> str:
        """The sizes in words, as printed to people."""
        return (
            f"tensor {self.tensor_size} x pipeline {self.pipeline_size} x context {self.context_size} x data "
            f"{self.data_size} on {self.device.type}"
        )

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the score head and the loss."""
        return self.pipeline_rank == self.pipeline_size - 1


def choose_device(device: str) -> torch.device:
    """The device of this rank for `--device auto|cpu|cuda`; nothing is allocated.

    Raises:
        UserError: GPUs are asked for and there are none, or fewer than this node's ranks; a torch too old for them.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    # Judged by the node's number of ranks and not by this one's, so that every rank of the node ends.
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if count > 0 and has_gpus_of_its_own(os.environ):
        check_torch_for_gpu(torch.__version__)
        return torch.device("cuda", local_rank % count)
    if local_ranks <= count:
        check_torch_for_gpu(torch.__version__)
        return torch.device("cuda", local_rank)
    if device == "auto":
        return torch.device("cpu")
    ranks, gpus = counted(local_ranks, "rank"), counted(count, "GPU")
    raise UserError(f"--device cuda: {ranks} on this node and {gpus}; start one rank per GPU")


def check_torch_for_gpu(version: str) -> None:
    """Check that torch of this version can add a product of bf16 matrices to a float32 one, as gradients are summed.

    Raises:
        UserError: it is older than 2.11.
    """
    # Builds from before a release, as in NVIDIA's containers, have what it has.
    if Version(version).release < (2, 11):
        raise UserError(
            f"torch {version}: a GPU needs 2.11 or newer (sums of bf16 products in float32); pip install "
            "'torch>=2.11', or --device cpu"
        )


def started_ranks() -> int:
    """Number of ranks that torchrun, srun, or whoever it was, has started; known before any group is made."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_share_a_machine() -> bool:
    """Whether every rank is known to be on this machine, where all see the same files; before any group is made."""
    return started_ranks() in (1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def sees_what_the_first_rank_does() -> bool:
    """Whether this rank is the first, or known to be on its machine: what it finds there, all of those find."""
    return is_first_rank() or ranks_share_a_machine()


def is_first_of_machine() -> bool:
    """Whether this process is the first of its machine's."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def parallel_groups(
    options: ParallelOptions, num_model_chunks: int = 1, world_size: int | None = None
) -> Iterator[ParallelGroups]:
    """Join the ranks that torchrun, srun or mpirun (or nothing: a single process) started, and leave at the end.

    `num_model_chunks` is the number of interleaved pipeline stages on each rank; `world_size` 1 leaves this process by
    itself, whatever torchrun started.

    Raises:
        UserError: before any group is made, if the layout does not fit the ranks or the device is not there.
        LostRankError: another rank is gone, or has not answered for `--distributed-timeout-minutes`.
    """
    world_size = world_size or started_ranks()
    data_parallel_size_of(options, world_size)
    device = choose_device(options.device)
    if device.type == "cpu":
        cpu_backend.install()
    else:
        if options.tensor_model_parallel_size * options.context_parallel_size > 1:
            # Read when the device is first used: one queue keeps a collective from waiting behind what it overlaps.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    install_gradient_accumulation()
    roll_call = RollCall()
    try:
        _join_ranks(device, world_size, timedelta(minutes=options.distributed_timeout_minutes))
        roll_call.begin()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=num_model_chunks if num_model_chunks > 1 else None,
            context_parallel_size=options.context_parallel_size,
            distributed_timeout_minutes=options.distributed_timeout_minutes,
            # For Megatron's own checkpoints of the distributed optimizer; ours gather nothing.
            create_gloo_process_groups=False,
        )
        yield ParallelGroups(ProcessGroupCollection.use_mpu_process_groups(), device)
    except RuntimeError as error:
        raise lost_rank(error, roll_call) or error from error
    finally:
        roll_call.end()
        parallel_state.destroy_model_parallel()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if device.type == "cuda":
            _forget_fp8_state()


@contextlib.contextmanager
def errors_before_joining(options: ParallelOptions) -> Iterator[None]:
    """Around what a command looks for on the disk before its ranks join by `joined_after_checks`: what a machine lacks
    ends all ranks at once, where those of the others would wait for its own.

    Raises:
        UserError: what is raised inside, on every rank where they are on several machines.
    """
    try:
        yield
    except UserError as error:
        if ranks_share_a_machine():
            raise
        with parallel_groups(options):
            raise_on_every_rank(error)


@contextlib.contextmanager
def joined_after_checks(options: ParallelOptions) -> Iterator[ParallelGroups]:
    """parallel_groups after `errors_before_joining`.

    Raises:
        UserError: as both.
    """
    with parallel_groups(options) as groups:
        if not ranks_share_a_machine():
            raise_on_every_rank(None)
        yield groups


def _forget_fp8_state() -> None:
    """Transformer Engine keeps FP8 scales, and the group that shares them, for the process and not for the model."""
    # Its name for Megatron-Core 0.16, in Transformer Engine 2.9 to 2.11; who has not imported it has no such state.
    if "transformer_engine.pytorch.fp8" in sys.modules:
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()


def groups_of_this_process(options: ParallelOptions) -> ParallelGroups:
    """Process groups that live as long as the process, which is one, or a rank that torchrun started and that loads one
    model; in one process a second model shares them.

    Raises:
        UserError: a second model in one rank of many.
    """
    if torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise UserError("several models need a single process; start this without torchrun")
        from megatron.core.process_groups_config import ProcessGroupCollection

        return ParallelGroups(ProcessGroupCollection.use_mpu_process_groups(), choose_device(options.device))
    stack = contextlib.ExitStack()
    groups = stack.enter_context(parallel_groups(options))
    atexit.register(stack.close)
    return groups


def gathered_from_replicas(found: dict[Key, Value], groups: ParallelGroups) -> dict[Key, Value]:
    """What each replica has found, together, on every rank; the keys differ. Values travel as pickles between ranks."""
    if groups.data_size == 1:
        return found
    parts = [None] * groups.data_size
    torch.distributed.all_gather_object(parts, found, group=groups.collection.dp)
    return {key: value for part in parts for key, value in part.items()}


def tell(lines: Iterable[str], to_stderr: bool = False) -> None:
    """Say lines for people, once for all ranks."""
    if is_first_rank():
        for line in lines:
            say(line, to_stderr)


def on_first_rank(action: Callable[[], Value]) -> Value:
    """What `action` gives on the first rank, to every rank, as a pickle. Collective over all ranks.

    Raises:
        UserError: the action's, on every rank.
    """
    outcome: list = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def raise_on_every_rank(error: UserError | None, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Raise the first rank's error that has one, on every rank. Collective over the group, or all ranks.

    Raises:
        UserError: of any rank.
    """
    errors: list[UserError | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(errors, error, group=group)
    for found in errors:
        if found is not None:
            raise found


@contextlib.contextmanager
def errors_of_all_ranks(group: torch.distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Raise on every rank of the group, or of all, what one raises inside: the others would wait for it, and the first
    rank says nothing.

    Raises:
        UserError: that of the first rank with one.
    """
    own = None
    try:
        yield
    except UserError as error:
        own = error
    raise_on_every_rank(own, group)


def errors_of_all_replicas(groups: ParallelGroups) -> contextlib.AbstractContextManager[None]:
    """As errors_of_all_ranks, where each rank of a replica raises what the others of it do."""
    return errors_of_all_ranks(groups.collection.dp) if groups.data_size > 1 else contextlib.nullcontext()


def _join_ranks(device: torch.device, world_size: int, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # No rendezvous for one process: a second command on the same machine must not meet it on a port.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank = int(os.environ["RANK"])
        store = _store_of_this_start(rank, world_size, timeout)
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        try:
            torch.distributed.init_process_group(backend, timeout=timeout)
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"MASTER_PORT {os.environ['MASTER_PORT']}: another program of this machine listens there; give every "
                "rank another one by MASTER_PORT=..."
            ) from error


def _store_of_this_start(rank: int, world_size: int, timeout: timedelta) -> torch.distributed.Store:
    """A part of torchrun's store that no rank of another start has written to.

    torchrun (--max-restarts) keeps its store when it starts the ranks again, and with it the addresses of those that
    are dead; what it says of restarts is no name for the start, since each machine counts its own. So the first rank
    makes up a name, and acknowledges each rank that calls it by that name. A rank that has met the name of an earlier
    start is not acknowledged, since nobody knew its own name then, and looks again.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False, timeout=timeout)
    meeting, own = torch.distributed.PrefixStore("sedd_megatron", store), uuid.uuid4().hex
    if rank == 0:
        name = own
        meeting.set("start", name)
        for other in range(1, world_size):
            caller = meeting.get(f"{name}/{other}").decode()
            meeting.set(f"{name}/{caller}", "")
        return torch.distributed.PrefixStore(name, meeting)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        name = meeting.get("start").decode()
        meeting.set(f"{name}/{rank}", own)
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if meeting.check([f"{name}/{own}"]):
            return torch.distributed.PrefixStore(name, meeting)
        if time.monotonic() > deadline:
            raise torch.distributed.DistStoreError(f"the first rank has not answered for {timeout}")


def seed_megatron_generators(seed: int) -> None:
    """Give Megatron's generators a seed: it forks them while it builds a model, and stops if they have none.

    Nothing of ours draws from them: every draw, dropout's too, has a key instead of a generator's state.
    """
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
