"""Signals that ask a run to end: it finishes its step and saves, unless it is asked again."""

import os
import signal
import socket
import threading
import time
from types import TracebackType

from sedd_megatron.errors import STOP_SIGNALS, say
from sedd_megatron.launcher import is_first_rank

# Slurm signals every process of a step, and a torchrun among them passes on at once what it got: that is one request.
SAME_REQUEST_SECONDS = 1.0
_END = b"\0"  # no signal has this number


def ignore_from_now_on() -> None:
    """For a command that has done its work: what asks it to end would only change the code that it ends with."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequests:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 of a run, from before the imports that take seconds until it ends; used
    in a `with`, on the main thread.

    Before `start_waiting` a signal ends the process at once, for there is nothing to save: a run with 0, and a command
    that is to give a result, and not `is_to_save`, as one that gave none. After it the first one is noted in
    `requested`, and a later one ends the process at once: the checkpoints on disk are whole at any moment. A signal
    that the process was started to ignore (SIGHUP under nohup, SIGINT behind a shell's &) stays ignored.

    A thread of its own listens, because Python runs handlers only between two instructions of the main thread, which
    may wait for another rank for minutes.
    """

    def __init__(self) -> None:
        self.began_at = time.monotonic()  # --exit-duration-in-mins counts from here
        self.is_to_save = True
        self.requested = 0  # the first signal's number; 0 while there is none
        self._requested_at = 0.0
        self._is_waiting = False

    def __enter__(self) -> "StopRequests":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        self._wakeup_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        for number in self._handlers:
            # What the handler does, the thread does; with none at all the signal would end the process.
            signal.signal(number, lambda number, frame: None)
        self._listener = threading.Thread(target=self._listen, name="stop requests", daemon=True)
        self._listener.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        # Closing alone does not end the listener: loader processes have copies.
        self._sender.send(_END)
        self._listener.join()
        self._sender.close()
        self._receiver.close()

    def start_waiting(self) -> None:
        """From now on the run looks at `requested` after each step."""
        self._is_waiting = True

    def _listen(self) -> None:
        while (received := self._receiver.recv(1)) != _END:
            number = received[0]
            if number not in self._handlers:
                continue
            if not self.is_to_save:
                self._end(number, "ended without a result", 128 + number)
            elif not self._is_waiting:
                # What was asked is done; by another code a launcher would kill this rank's neighbours, and say failed.
                self._end(number, "ended before the first step", 0)
            elif not self.requested:
                self.requested, self._requested_at = number, time.monotonic()
            elif time.monotonic() - self._requested_at > SAME_REQUEST_SECONDS:
                self._end(number, "asked again, ended at once; the checkpoints of before are whole", 128 + number)

    def _end(self, number: int, what: str, code: int) -> None:
        if is_first_rank():
            say(f"{signal.Signals(number).name}: {what}", to_stderr=True)
        os._exit(code)
