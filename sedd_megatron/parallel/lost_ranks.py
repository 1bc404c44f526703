"""Which rank a collective waited for in vain: the ranks tell each other where they stand, over the store by which they
joined.

torch's flight recorder knows no point-to-point transfers of gloo, and of no rank what the others do; a rank's own stack
knows the collective that it is in, and a rank that does not answer is the one to look at.
"""

import contextlib
import functools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType

import torch

from sedd_megatron.errors import LostRankError, one_line

SECONDS_BETWEEN_LOOKS = 1.0
# Of all ranks together to the one store: thousands look more rarely.
LOOKS_A_SECOND = 100
SECONDS_FOR_ANSWERS = 8.0
MOST_NAMED = 8
# Keys of the store: how many have asked, what ranks answered, what the first who asked had in time, how many read that.
ASKED, ANSWERS, FOUND, READ = "asked", "answers", "found", "read"


@dataclass(frozen=True)
class Place:
    """What a rank is doing: a function of ours or Megatron's, and the collective in it."""

    function: str
    collective: str | None = None
    ranks: tuple[int, ...] = ()  # that take part

    def __str__(self) -> str:
        if self.collective is None:
            return self.function
        return f"{self.function} ({self.collective} among {_named(self.ranks)})"


def place_of(frames: Iterable[FrameType]) -> Place:
    """Where a stack, given from the outside in, stands."""
    function, collective = "torch", None
    for frame in frames:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if file.startswith(_our_folders()):
            function, collective = name, None
        elif collective is None and file == torch.distributed.distributed_c10d.__file__:
            # The first is what was called; others are how it is made.
            collective = frame if name in torch.distributed.distributed_c10d.__all__ else None
    # While they join the ranks have no groups yet.
    if collective is None or not torch.distributed.is_initialized():
        return Place(function)
    ranks = torch.distributed.get_process_group_ranks(collective.f_locals.get("group"))
    return Place(function, collective.f_code.co_name, tuple(ranks))


@functools.cache
def _our_folders() -> tuple[str, ...]:
    """Of this package and Megatron-Core; not by their names: torch may lie in the .venv of a checkout of this one."""
    import megatron.core

    import sedd_megatron

    return tuple(os.path.dirname(package.__file__) + os.sep for package in (sedd_megatron, megatron.core))


class RollCall:
    """Has a thread of each rank answer when another rank asks where it stands. Costs one small request a second, of
    more than LOOKS_A_SECOND ranks that many, and two connections of each rank to the one that holds the store.
    """

    def __init__(self) -> None:
        self.num_ranks, self._rank = 1, 0
        self._store: torch.distributed.Store | None = None
        self._line: socket.socket | None = None
        self._found: dict[int, Place] | None = None
        self._stopped, self._pause = threading.Event(), SECONDS_BETWEEN_LOOKS
        self._thread = threading.Thread(target=self._answer_once, args=(threading.get_ident(),), daemon=True)

    @property
    def is_under_way(self) -> bool:
        """Whether this rank has others to ask."""
        return self._store is not None

    def begin(self) -> None:
        """Once the ranks have joined."""
        self._rank, self.num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.num_ranks > 1:
            store = torch.distributed.distributed_c10d._get_default_store()
            # Where the holder takes no more connections, a lost rank has no name, and the run is none the worse.
            with contextlib.suppress(OSError):
                self._line = _line_to_holder(store)
                self._store, self._pause = store, max(SECONDS_BETWEEN_LOOKS, self.num_ranks / LOOKS_A_SECOND)
                self._thread.start()

    def end(self) -> None:
        """Before the ranks part."""
        self._stopped.set()
        if self._thread.is_alive():
            # Not for long: the store may be gone.
            self._thread.join(SECONDS_BETWEEN_LOOKS)
        if self._line is not None:
            self._line.close()

    def ask(self, own: Place) -> dict[int, Place] | None:
        """Where each rank stands that answers in time, asked by one that stands at `own`; None without an answer of
        the store itself.
        """
        # In threads: of a process that stands still a store never answers, whatever time-out its client has.
        threading.Thread(target=self._ask_all, args=(own,), daemon=True).start()
        self._thread.join(SECONDS_FOR_ANSWERS + 3 * self._pause)
        if self._rank == 0 and self._found is not None:
            # The store may be in this process, which is about to end.
            self._wait_for_readers()
        return self._found

    def _ask_all(self, own: Place) -> None:
        """One rank asks for all: thousands that read thousands of answers would be too much for the store."""
        with contextlib.suppress(RuntimeError, OSError):
            store = self._own_connection()
            self._answer(store, own)
            if store.add(ASKED, 1) > 1:
                return
            deadline = time.monotonic() + SECONDS_FOR_ANSWERS - SECONDS_BETWEEN_LOOKS + self._pause
            while len(_places(store.get(ANSWERS))) < self.num_ranks and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_LOOKS / 4)
            store.set(FOUND, store.get(ANSWERS))

    def _answer_once(self, main_thread: int) -> None:
        # Without its store, which ends with the run or with whoever held it, there is nobody to answer.
        with contextlib.suppress(RuntimeError, OSError):
            store = self._own_connection()
            while not store.check([ASKED]):
                if self._stopped.wait(self._pause):
                    return
                self._require_holder()
            frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[main_thread])]
            self._answer(store, place_of(reversed(frames)))
            # Kept for when this rank notices itself, as the store may be gone by then.
            self._found = _places(store.get(FOUND))
            store.add(READ, 1)

    def _wait_for_readers(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            store, deadline = self._own_connection(), time.monotonic() + 3 * SECONDS_BETWEEN_LOOKS
            while store.add(READ, 0) < len(self._found) and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_LOOKS / 4)

    def _require_holder(self) -> None:
        """Raises:
        ConnectionError: the process that holds the store is gone. Asked for more, torch would print a stack of its own.
        """
        with contextlib.suppress(BlockingIOError):
            if not self._line.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError

    def _own_connection(self) -> torch.distributed.Store:
        self._require_holder()
        # Whatever waits on the other one would keep this thread waiting.
        return torch.distributed.PrefixStore("roll_call", self._store.clone())

    def _answer(self, store: torch.distributed.Store, place: Place) -> None:
        store.append(ANSWERS, json.dumps([self._rank, asdict(place)]) + "\n")


def _line_to_holder(store: torch.distributed.Store) -> socket.socket:
    """A connection that says nothing, and ends with the process that holds the store."""
    while isinstance(store, torch.distributed.PrefixStore):
        store = store.underlying_store
    line = socket.create_connection((store.host, store.port), timeout=SECONDS_FOR_ANSWERS)
    line.setblocking(False)
    return line


def lost_rank(error: RuntimeError, roll_call: RollCall) -> LostRankError | None:
    """What a collective's error means to a person; None for any other error. NCCL's time-outs end a process by
    themselves.
    """
    # Gloo has no class of its own: "[.../gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4711", or
    # "Gloo connectFullMesh failed with [...". No message of others names its source so.
    from_gloo = re.search(r"\[\S*\bgloo/\S+\] (.*?)(\. This is|$)", str(error), re.DOTALL)
    if from_gloo is None and not isinstance(error, torch.distributed.DistError):
        return None
    said = one_line(RuntimeError(from_gloo[1]) if from_gloo else error)
    own = place_of(frame for frame, _ in traceback.walk_tb(error.__traceback__))
    lost = _who_is_lost(own, roll_call)
    return LostRankError(
        f"rank {os.environ.get('RANK', '0')} waited in {own} for {lost}: {said}; look for the reason there, and start "
        "again"
    )


def _who_is_lost(own: Place, roll_call: RollCall) -> str:
    if not roll_call.is_under_way:
        return "a rank that is gone or stands still"
    found = roll_call.ask(own)
    if found is None:
        return "a rank that is gone or stands still, as the ranks' store is, which the first rank or torchrun holds"
    silent = [rank for rank in range(roll_call.num_ranks) if rank not in found]
    if silent:
        # Its own partners before those of others.
        near = [rank for rank in silent if rank in own.ranks] or silent
        return f"{_named(near)}, which {'are' if len(near) > 1 else 'is'} gone or stand{'s' * (len(near) == 1)} still"
    elsewhere = [f"rank {rank} is in {place}" for rank, place in sorted(found.items()) if place != own]
    return f"a rank that has not come, though all answer; {', '.join(elsewhere[:MOST_NAMED]) or 'all are there'}"


def _places(answers: bytes) -> dict[int, Place]:
    found = {}
    for line in answers.decode().splitlines():
        rank, place = json.loads(line)
        # The first one counts: what a rank says on its way out comes later.
        found.setdefault(rank, Place(place["function"], place["collective"], tuple(place["ranks"])))
    return found


def _named(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:MOST_NAMED])) + (", ..." if len(ranks) > MOST_NAMED else "")
    return f"rank{'s' * (len(ranks) > 1)} {named}"
