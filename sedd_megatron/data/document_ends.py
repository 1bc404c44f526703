"""Where documents end in a window, as Megatron-LM tells it: after each end-of-document token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sedd_megatron.data.preparation import preparation_of
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.training_config import DataOptions


@dataclass(frozen=True)
class DocumentRules:
    """What an end of document does to the positions behind it: --reset-attention-mask and --reset-position-ids."""

    eod_id: int
    reset_attention_mask: bool
    reset_position_ids: bool

    @classmethod
    def of(cls, data: DataOptions, tokenizer: Tokenizer) -> "DocumentRules | None":
        """Those of the flags; None where documents that share a window are one text."""
        if not (data.reset_attention_mask or data.reset_position_ids):
            return None
        return cls(tokenizer.eod_id, data.reset_attention_mask, data.reset_position_ids)


def check_ends_of_documents(data: DataOptions, tokenizer: Tokenizer, prefixes: Sequence[str]) -> None:
    """Raise unless each corpus has what the flags look for, as far as anybody wrote it down.

    Raises:
        UserError: the tokenizer has no end-of-document token, or a corpus was prepared without.
    """
    names = {"--reset-attention-mask": data.reset_attention_mask, "--reset-position-ids": data.reset_position_ids}
    flags = [flag for flag, is_given in names.items() if is_given]
    if not flags:
        return
    lacking = [prefix for prefix in prefixes if preparation_of([prefix]).append_eod is False]
    if tokenizer.eod_id is None or lacking:
        what = (
            f"the tokenizer ({tokenizer.tokenizer_type}) has no end-of-document token"
            if tokenizer.eod_id is None
            else f"{lacking[0]} was prepared without --append-eod"
        )
        raise UserError(
            f"{' '.join(flags)}: documents end at end-of-document tokens, and {what}; prepare it so, or leave "
            f"{'it' if len(flags) == 1 else 'them'} out"
        )


def document_ends(x_0: Tensor, eod_id: int) -> Tensor:
    """Where each document of the windows x_0 [B, S] ends, counted through all of them: [D] int64, the last is B * S.

    An end-of-document token is the last of its document; a window's end ends one too.
    """
    is_last = x_0 == eod_id
    is_last[:, -1] = True
    return is_last.flatten().nonzero()[:, 0] + 1


def position_ids(ends: Tensor, batch_size: int) -> Tensor:
    """[B, S] int64: each position counted from where its document begins."""
    lengths = torch.diff(ends, prepend=ends.new_zeros(1))
    return (torch.arange(int(ends[-1])) - torch.repeat_interleave(ends - lengths, lengths)).view(batch_size, -1)
