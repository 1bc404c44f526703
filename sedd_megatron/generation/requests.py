"""What a person asks for: text that is given, and how much is to be made around it."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_megatron.data.documents import json_lines
from sedd_megatron.data.tokenizers import Tokenizer
from sedd_megatron.errors import UserError
from sedd_megatron.options import flag_of, in_short, option, shown

# [MASK] or [MASK*12]
MASK_RUN = re.compile(r"\[MASK(?:\*(\d+))?\]")
# Of seeds and sample numbers, which are words of a draw's key.
MAX_KEY = 2**63 - 1
# How many samples one call makes, unless told: each is a row in memory before the first is drawn.
MAX_SAMPLES = 1_000_000
MAX_LENGTH = 1 << 20  # of a sample


@dataclass(frozen=True)
class TextRequest:
    """What is asked for"""

    prompt: str = option("", "text that every sample begins with", is_text=True)
    suffix: str = option("", "text that every sample ends with", is_text=True)
    infill: str | None = option(
        None, "text with [MASK] or [MASK*12] where 1 or 12 tokens are to be filled in", is_text=True
    )
    length: int | None = option(
        None, "tokens per sample; the trained length if not given, more are made block by block"
    )
    num_samples: int = option(1, "how many samples")
    seed: int = option(0, "seed of the draws; the same seed gives the same samples")


@dataclass(frozen=True)
class Frame:
    """One sample to be made: its number and seed, which decide its draws, and the tokens that are given."""

    sample: int
    seed: int
    tokens: tuple[int, ...]  # [S], 0 where nothing is given
    given: tuple[bool, ...]  # [S]
    line: int | None = None  # of the file of requests


@dataclass(frozen=True)
class _Wording:
    """How errors name what is wrong: flags of the command, or keys of a line of a file."""

    where: str
    name: Callable[[str], str]

    def error(self, text: str) -> UserError:
        return UserError(self.where + text)


AS_FLAGS = _Wording("", flag_of)
AS_ARGUMENTS = _Wording("", str)


def frames_of(
    request: TextRequest,
    tokenizer: Tokenizer,
    seq_length: int,
    first_sample: int = 0,
    wording: _Wording = AS_FLAGS,
    line: int | None = None,
    tokens: Sequence[int | None] | None = None,
    max_samples: int = MAX_SAMPLES,
) -> list[Frame]:
    """The samples of one request, numbered from first_sample.

    Args:
        seq_length: trained length, which a request without a length gets.
        max_samples: how many it may ask for.
        tokens: in place of any text: token ids, and None where one is to be made.

    Raises:
        UserError: given text longer than the sample, nothing to fill in, text or ids that the tokenizer does not know,
            a number below its least.
    """
    _check_numbers(request, first_sample, max_samples, wording)
    if tokens is not None:
        _check_ids(tokens, tokenizer, wording)
        row = list(tokens)
    elif request.infill is not None:
        row = _infill_row(request, tokenizer, wording)
    else:
        row = _prompt_row(request, tokenizer, seq_length, wording)
    given = tuple(token is not None for token in row)
    filled = tuple(token or 0 for token in row)
    numbers = range(first_sample, first_sample + request.num_samples)
    return [Frame(sample, request.seed, filled, given, line) for sample in numbers]


def read_requests(
    path: Path,
    tokenizer: Tokenizer,
    seq_length: int,
    defaults: TextRequest,
    first_sample: int = 0,
    max_samples: int = MAX_SAMPLES,
) -> list[Frame]:
    """The samples of a file with one JSON object a line, numbered on from line to line.

    Keys are those of TextRequest, or `tokens`: a list of ids with null where one is to be made. What a line leaves out
    comes from `defaults`; a line that gives the whole text, infill or tokens, takes no text and no length from there.

    Raises:
        UserError: naming the line, which may be the one that asks for more than max_samples with those before.
    """
    frames: list[Frame] = []
    for number, values in json_lines("--requests", path, f"write it as {EXAMPLE_LINE}"):
        wording = _Wording(f"--requests {path}, line {number}: ", str)
        if not isinstance(values, dict):
            raise wording.error(f"not a JSON object; write it as {EXAMPLE_LINE}")
        tokens = values.pop("tokens", None)
        request = _request_of(_checked(values, wording), tokens, defaults, wording)
        first, left = first_sample + len(frames), max_samples - len(frames)
        frames += frames_of(request, tokenizer, seq_length, first, wording, number, tokens, left)
    if not frames:
        raise UserError(f"--requests {path}: no line there; write one JSON object a line, as in {EXAMPLE_LINE}")
    return frames


EXAMPLE_LINE = '{"prompt": "Once upon", "num_samples": 2}'


def _checked(values: dict[str, Any], wording: _Wording) -> dict[str, Any]:
    kinds = {field.name: int if field.name in ("length", "num_samples", "seed") else str
             for field in dataclasses.fields(TextRequest)}  # fmt: skip
    for name, value in values.items():
        if name not in kinds:
            raise wording.error(f"unknown key {shown(name)!r}; choose from {', '.join([*kinds, 'tokens'])}")
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise wording.error(f"{name} is {in_short(value)}, must be of type {kinds[name].__name__}")
    return values


def _request_of(values: dict[str, Any], tokens: Any, defaults: TextRequest, wording: _Wording) -> TextRequest:
    text_keys = [name for name in values if name not in ("num_samples", "seed")]
    if tokens is not None and text_keys:
        raise wording.error(f"tokens are the whole text; leave out {', '.join(text_keys)}")
    if tokens is not None or "infill" in values:
        defaults = TextRequest(num_samples=defaults.num_samples, seed=defaults.seed)
    return dataclasses.replace(defaults, **values)


def _check_numbers(request: TextRequest, first_sample: int, max_samples: int, wording: _Wording) -> None:
    for name, least, most in (("num_samples", 1, math.inf), ("seed", 0, MAX_KEY), ("length", 1, MAX_LENGTH)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise wording.error(f"{wording.name(name)} {in_short(value)} must be at least {least}")
        if value is not None and value > most:
            raise wording.error(f"{wording.name(name)} {in_short(value)} must be at most {most}")
    if request.num_samples > max_samples:
        limit = wording.name("max_samples") if wording.where == "" else flag_of("max_samples")
        raise wording.error(
            f"{wording.name('num_samples')} {in_short(request.num_samples)} is more than the {max_samples} that "
            f"{limit} leaves; raise that, or ask for fewer at a time"
        )
    last = first_sample + request.num_samples - 1
    if last > MAX_KEY:
        raise wording.error(f"the last sample's number would be {last}, must be at most {MAX_KEY}")


def _prompt_row(request: TextRequest, tokenizer: Tokenizer, seq_length: int, wording: _Wording) -> list[int | None]:
    length = request.length or seq_length
    before = _encode(request.prompt, "prompt", tokenizer, wording)
    after = _encode(request.suffix, "suffix", tokenizer, wording, inside=True)
    given = len(before) + len(after)
    if given > length:
        longer = wording.name("length")
        texts = [wording.name(name) for name, ids in (("prompt", before), ("suffix", after)) if ids]
        raise wording.error(
            f"{' and '.join(texts)} of {given} tokens: longer than a sample of {length}; shorten the text or raise "
            f"{longer}"
        )
    return [*before, *[None] * (length - given), *after]


def _infill_row(request: TextRequest, tokenizer: Tokenizer, wording: _Wording) -> list[int | None]:
    infill, *others = map(wording.name, ("infill", "prompt", "suffix", "length"))
    if request.prompt or request.suffix or request.length is not None:
        raise wording.error(f"{infill} is the whole text; leave out {', '.join(others)}")
    row: list[int | None] = []
    end = 0
    for run in MASK_RUN.finditer(request.infill):
        # Python reads no number of more than 4300 digits.
        count = int(run[1].lstrip("0")[:20] or 0) if run[1] else 1
        if len(row) + count > MAX_LENGTH:
            raise wording.error(f"{infill}: is more than {MAX_LENGTH} tokens long; ask for fewer")
        if count == 0:
            raise wording.error(f"{infill}: {run[0]} fills in nothing; write a number of at least 1, or leave it out")
        row += _encode(request.infill[end : run.start()], "infill", tokenizer, wording, inside=end > 0)
        row += [None] * count
        end = run.end()
    row += _encode(request.infill[end:], "infill", tokenizer, wording, inside=True)
    if None not in row:
        raise wording.error(f"{infill} has nothing to fill in; write [MASK] or [MASK*12] where tokens are wanted")
    return row


def _encode(text: str, field: str, tokenizer: Tokenizer, wording: _Wording, inside: bool = False) -> list[int]:
    try:
        text.encode("utf-8")
        ids = tokenizer.encode_inside(text) if inside else tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise wording.error(
            f"{wording.name(field)}: {text[error.start]!r} is not a character; write the text in UTF-8"
        ) from error
    except UserError as error:
        raise wording.error(f"{wording.name(field)}: {error}") from error
    # In some tokenizers of bytes it ends documents too, and stands for no text.
    if tokenizer.unknown_id not in (None, tokenizer.eod_id) and tokenizer.unknown_id in ids:
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise wording.error(
            f"{wording.name(field)} {shown!r}: the model's {tokenizer.tokenizer_type} has no token for a part of it; "
            "leave that out"
        )
    return ids


def _check_ids(tokens: Any, tokenizer: Tokenizer, wording: _Wording) -> None:
    if not isinstance(tokens, list | tuple) or None not in tokens:
        raise wording.error("tokens must be a list of ids with null where one is to be made")
    for token in tokens:
        known = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < tokenizer.num_tokens
        if token is not None and not known:
            raise wording.error(f"token {in_short(token)} must be an id from 0 to {tokenizer.num_tokens - 1}, or null")
