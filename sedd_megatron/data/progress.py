"""How far a preparation is: a bar on a terminal, lines elsewhere."""

import sys
import time

from tqdm import tqdm

from sedd_megatron.data.documents import DocumentSource
from sedd_megatron.data.parts import Extent
from sedd_megatron.data.token_files import TokenSource
from sedd_megatron.errors import say
from sedd_megatron.wording import counted


class Progress:
    """Documents, MB/s and tokens/s on stderr, from where this process began."""

    def __init__(self, source: DocumentSource | TokenSource, begin: Extent, seconds_between: float = 5.0) -> None:
        self._source, self._begin, self._seconds_between = source, begin, seconds_between
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            # tqdm's own rate is of files; ours of text.
            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]" if source.total else None
            self._bar = tqdm(
                total=source.total, unit=source.unit, unit_scale=True, dynamic_ncols=True, bar_format=shape
            )

    def __call__(self, extent: Extent) -> None:
        """Show it, on a terminal at once and elsewhere every few seconds."""
        text = (
            f"{counted(extent.num_documents, 'document')}, {counted(extent.num_tokens, 'token')}, {self.rates(extent)}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(self._source.position - self._bar.n)
        elif time.monotonic() - self._last >= self._seconds_between:
            self._last = time.monotonic()
            say(text, to_stderr=True)

    def rates(self, extent: Extent) -> str:
        """MB/s of text and tokens/s since the start of this process."""
        seconds = time.monotonic() - self._start
        megabytes = (extent.num_bytes - self._begin.num_bytes) / 1e6
        tokens = extent.num_tokens - self._begin.num_tokens
        return f"{megabytes / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
