"""A corpus is read whole while training goes on, by one reader on each machine, whose disk may have its own copy."""

import os
import sys
from collections.abc import Sequence
from threading import Thread, get_native_id

from sedd_megatron.data.corpus import are_read_at_start, is_index_read_at_start, open_tokens
from sedd_megatron.data.digests import find_fault, has_digests
from sedd_megatron.data.object_storage import RemoteTokens
from sedd_megatron.data.token_range import check_range, range_of_blocks
from sedd_megatron.errors import UserError, say
from sedd_megatron.parallel.groups import is_first_rank

# What takes no longer is known before the first step, or before the last checkpoint.
SECONDS_TO_WAIT, SECONDS_TO_WAIT_AT_LAST = 1.0, 5.0
LOWEST_PRIORITY = 19


class DataCheck:
    """Reads corpora in a thread of low priority, once.

    Those with digests are held against them: their tokens were counted as they were written. Of others, if they were
    too large to be read at the start, the index is held against itself and the tokens against the vocabulary.
    """

    def __init__(self, prefixes: Sequence[str], num_tokens: int) -> None:
        self._fault: str | None = None
        # A daemon, so that a run that is finished does not wait for it.
        self._thread = Thread(target=self._check, args=(tuple(prefixes), num_tokens), daemon=True)
        self._thread.start()
        self._thread.join(SECONDS_TO_WAIT)

    def fault(self) -> str | None:
        """What was found to be wrong so far, in one line with the way out."""
        return self._fault

    def last_fault(self, seconds: float) -> str | None:
        """The same at a run's end, after a wait of some seconds; that data was not read to the end is told."""
        self._thread.join(seconds)
        if self._fault is None and self._thread.is_alive() and is_first_rank():
            say("the data's digests: not read to the end, since the run is over before")
        return self._fault

    def _check(self, prefixes: Sequence[str], num_tokens: int) -> None:
        if sys.platform == "linux":  # where a thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, get_native_id(), LOWEST_PRIORITY)
        for prefix in prefixes:
            try:
                if has_digests(prefix):
                    self._fault = find_fault(prefix)
                else:
                    _check_without_digests(prefix, num_tokens)
            except UserError as error:
                self._fault = str(error)
            if self._fault is not None:
                return


def check_in_background(prefixes: Sequence[str], num_tokens: int) -> DataCheck:
    """Begin to check what there is to check of the corpora; those without digests are named on the first rank."""
    prefixes = tuple(dict.fromkeys(prefixes))
    without = [prefix for prefix in prefixes if not has_digests(prefix)]
    for prefix in without if is_first_rank() else ():
        say(f"{prefix}: has no digests, and is used as it is", to_stderr=True)
    if without and are_read_at_start(prefixes):
        prefixes = [prefix for prefix in prefixes if prefix not in without or not is_index_read_at_start(prefix)]
    return DataCheck(prefixes, num_tokens)


def _check_without_digests(prefix: str, num_tokens: int) -> None:
    tokens = open_tokens(prefix)
    # Object storage gives tokens for what is trained on, and each window is looked at as it comes.
    if not isinstance(tokens, RemoteTokens):
        extremes, _ = range_of_blocks(tokens)
        check_range(*extremes, num_tokens, str(tokens.filename))
