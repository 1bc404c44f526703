"""python -m sedd_megatron.generate: samples from a trained model, with text of a person's choice in place."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sedd_megatron.diffusion.sampler import SAMPLERS, sample
from sedd_megatron.errors import UserError, run_command
from sedd_megatron.options import flag_of, option, parse_options

if TYPE_CHECKING:
    from sedd_megatron.data.tokenizers import Tokenizer
    from sedd_megatron.pretrained import PretrainedModel


@dataclass(frozen=True)
class GenerateOptions:
    """Sampling"""

    load: str = option(MISSING, "folder that training saved to, or one iter_* folder in it")
    num_samples: int = option(1, "how many samples")
    batch_size: int = option(8, "how many at a time; does not change the samples")
    sampling_steps: int = option(128, "steps from noise to text; the network is called once per step")
    sampler: str = option("analytic", "how a step is made", choices=tuple(SAMPLERS))
    denoise: bool = option(True, "a final step that removes the last noise")
    length: int | None = option(None, "tokens per sample; the trained length if not given")
    seed: int = option(0, "seed of the draws; the same seed gives the same samples")
    prompt: str = option("", "text that every sample begins with")
    suffix: str = option("", "text that every sample ends with")
    output: str | None = option(None, "also write the samples to this file, one JSON object a line")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))


def main() -> None:
    """Parse the flags, load the model, print the samples."""
    (options,) = parse_options(
        (GenerateOptions,), sys.argv[1:], "sedd_megatron.generate", "Sample text from a trained model."
    )
    _check_numbers(options)
    from sedd_megatron.pretrained import load_pretrained

    model = load_pretrained(options.load, device=options.device)
    length = options.length or model.seq_length
    fixed_tokens, fixed_mask = fixed_positions(
        model.tokenizer, options.prompt, options.suffix, length, model.seq_length
    )
    output = _open_output(options.output)
    for first_sample in range(0, options.num_samples, options.batch_size):
        count = min(options.batch_size, options.num_samples - first_sample)
        start = time.monotonic()
        tokens = _sample_batch(model, options, length, first_sample, count, fixed_tokens, fixed_mask)
        seconds = (time.monotonic() - start) / count
        for index, row in enumerate(tokens.tolist(), start=first_sample):
            text = decode_states(model.tokenizer, row)
            print(f"--- sample {index} ---\n{text}", flush=True)
            if output is not None:
                record = {"sample": index, "seed": options.seed, "text": text, "tokens": row, "seconds": seconds}
                output.write(json.dumps(record, ensure_ascii=False) + "\n")
    if output is not None:
        output.close()


def fixed_positions(
    tokenizer: "Tokenizer", prompt: str, suffix: str, length: int, seq_length: int
) -> tuple[Tensor, Tensor]:
    """The positions that prompt and suffix take: tokens [length] int64 and a mask [length] bool, True where given.

    Raises:
        UserError: the sample is longer than the trained length, or prompt and suffix are longer than the sample.
    """
    if length > seq_length:
        raise UserError(f"--length {length} is above the trained length of {seq_length} tokens; ask for at most that")
    before, after = (torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in (prompt, suffix))
    given = len(before) + len(after)
    if given > length:
        raise UserError(
            f"--prompt and --suffix take {given} tokens and a sample has {length}; shorten them or raise --length "
            f"(at most {seq_length})"
        )
    tokens, mask = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.bool)
    tokens[: len(before)], mask[: len(before)] = before, True
    tokens[length - len(after) :], mask[length - len(after) :] = after, True
    return tokens, mask


def decode_states(tokenizer: "Tokenizer", states: Sequence[int]) -> str:
    """Text of a row of states; positions that are still masked (without the final step) are shown as a block."""
    parts, run = [], []
    for state in [*states, None]:
        if state is not None and state < tokenizer.num_tokens:
            run.append(state)
            continue
        parts.append(tokenizer.decode(run) + ("" if state is None else "\u2588"))
        run = []
    return "".join(parts)


def _sample_batch(
    model: "PretrainedModel",
    options: GenerateOptions,
    length: int,
    first_sample: int,
    count: int,
    fixed_tokens: Tensor,
    fixed_mask: Tensor,
) -> Tensor:
    return sample(
        model.log_score,
        model.graph,
        model.schedule,
        num_samples=count,
        length=length,
        num_steps=options.sampling_steps,
        sampler=options.sampler,
        seed=options.seed,
        first_sample=first_sample,
        fixed_tokens=fixed_tokens.expand(count, -1),
        fixed_mask=fixed_mask.expand(count, -1),
        denoise=options.denoise,
        device=model.device,
        on_step=_progress(first_sample, count, options.num_samples),
    )


def _progress(first_sample: int, count: int, num_samples: int) -> Callable[[int, int], None] | None:
    if not sys.stderr.isatty():
        return None

    def show(step: int, num_steps: int) -> None:
        end = "\n" if step == num_steps else ""
        print(f"\rsamples {first_sample}-{first_sample + count - 1} of {num_samples}: step {step}/{num_steps}",
              end=end, file=sys.stderr, flush=True)  # fmt: skip

    return show


def _check_numbers(options: GenerateOptions) -> None:
    for name in ("num_samples", "batch_size", "sampling_steps", "length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{flag_of(name)} {value} must be at least 1")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed} must be at least 0")


def _open_output(path: str | None):
    if path is None:
        return None
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return open(path, "w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); name another file") from error


if __name__ == "__main__":
    run_command(main)
