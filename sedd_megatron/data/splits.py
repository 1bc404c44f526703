"""The three parts of a run's data: cut from one corpus or blend, or each a corpus or blend of its own."""

import dataclasses
from collections.abc import Mapping, Sequence

from sedd_megatron.data.windows import BlendedWindows, CorpusWindows, WindowDataset, Windows, check_tokens, open_windows
from sedd_megatron.training_config import WeightedCorpus

WHOLE = "1,0,0"


def open_parts(
    corpora: Mapping[str, Sequence[WeightedCorpus]], *, seq_length: int, split: str, num_tokens: int, seed: int
) -> Windows:
    """As `open_windows`, of what `arguments.corpora_by_flag` gives: --data-path, cut by `split`; or one or more of the
    parts, each whole, of which those that no flag names have no windows.

    Raises:
        UserError: as open_windows, naming the flag.
    """
    if "--data-path" in corpora:
        return open_windows(
            corpora["--data-path"], seq_length=seq_length, split=split, num_tokens=num_tokens, seed=seed
        )
    opened = {
        flag: open_windows(own, seq_length=seq_length, split=WHOLE, num_tokens=num_tokens, seed=seed, flag=flag).train
        for flag, own in corpora.items()
    }
    train = opened["--train-data-path"]
    none = dataclasses.replace(_corpora(train)[0], num_windows=0, shuffle=False)
    valid, test = (_in_order(opened.get(flag, none)) for flag in ("--valid-data-path", "--test-data-path"))
    return Windows(train, valid, test)


def check_tokens_of_parts(windows: Windows, num_tokens: int, part: int = 0, num_parts: int = 1) -> None:
    """`check_tokens` of each file once, whichever parts it is in; made-up windows have none.

    Raises:
        UserError: a file has tokens outside the vocabulary.
    """
    by_file = {str(corpus.tokens.filename): corpus for dataset in windows for corpus in _corpora(dataset)}
    check_tokens(by_file.values(), num_tokens, part, num_parts)


def _corpora(dataset: WindowDataset) -> tuple[CorpusWindows, ...]:
    if isinstance(dataset, BlendedWindows):
        return dataset.corpora
    return (dataset,) if isinstance(dataset, CorpusWindows) else ()


def _in_order(dataset: WindowDataset) -> WindowDataset:
    """As validation reads them: from the first window on, the same every time."""
    if isinstance(dataset, BlendedWindows):
        in_order = tuple(dataclasses.replace(corpus, shuffle=False) for corpus in dataset.corpora)
        return dataclasses.replace(dataset, corpora=in_order)
    return dataclasses.replace(dataset, shuffle=False)
