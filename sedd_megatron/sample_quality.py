"""python -m sedd_megatron.sample_quality: how good samples are, as a Markdown table; draws them first if need be."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_megatron.config import ParallelOptions, PrecisionOptions
from sedd_megatron.data.batches import batches_of
from sedd_megatron.data.documents import json_lines, text_lines
from sedd_megatron.errors import UserError, print_output, run_command
from sedd_megatron.evaluation.sample_quality import (
    Judge,
    Measure,
    diversity,
    load_judge,
    mauve_function,
    mauve_measure,
    perplexity_measures,
    quality_table,
)
from sedd_megatron.generation.requests import TextRequest, frames_of
from sedd_megatron.generation.settings import SamplingOptions, settings_of
from sedd_megatron.options import option, parse_options
from sedd_megatron.output_files import check_output, write_output

EXPLANATION = (
    "Text that repeats itself is easy to predict: compare perplexities at equal entropy and length. Published figures "
    "are of samples at full length (--no-stop-at-eod)."
)


@dataclass(frozen=True)
class QualityOptions:
    """What is measured: --samples, or samples drawn from --load"""

    samples: str | None = option(None, "file that sedd_megatron.generate --output wrote (or JSON lines with text)")
    load: str | None = option(None, "model to draw samples from, as for sedd_megatron.generate; flags as there")
    bf16: bool = option(False, "draw with a network that computes in bfloat16")
    save_samples: str | None = option(None, "keep the samples that were drawn in this file")
    judge: str | None = option(None, "causal language model for generative perplexity and MAUVE: folder or hub name")
    judge_tokens: int = option(1024, "judge the first this many of its tokens of each sample; 0 for all, in windows")
    judge_batch_size: int = option(8, "how many windows the judge reads at a time")
    reference: str | None = option(None, "real text for MAUVE: .jsonl with text, or one text a line")
    output: str | None = option(None, "also write the table to this file")
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class SampleSet:
    """Samples, and their tokens where all of them came with some."""

    texts: list[str]
    tokens: list[list[int]] | None


def check(argv: Sequence[str]) -> tuple[QualityOptions, TextRequest, SamplingOptions]:
    """The flags, which belong together.

    Raises:
        UserError: the first mistake.
    """
    options, request, sampling = parse_options(
        (QualityOptions, TextRequest, SamplingOptions),
        argv,
        "sedd_megatron.sample_quality",
        "Measure how good samples are.",
    )
    _check(options, request, sampling)
    return options, request, sampling


def main() -> None:
    """Parse the flags, read or draw the samples, print the table."""
    options, request, sampling = check(sys.argv[1:])
    # All that can be wrong is found before samples are drawn.
    references = _read_references(Path(options.reference)) if options.reference else []
    judge = load_judge(options.judge, options.device, options.judge_batch_size) if options.judge else None
    if references:
        mauve_function()
    samples = read_samples(Path(options.samples)) if options.samples else _draw(options, request, sampling)
    table = quality_table(measures_of(samples, judge, references, options.judge_tokens or None))
    text = f"{table}\n\n{EXPLANATION}"
    print_output(text)
    if options.output:
        write_output("--output", options.output, [text, "\n"])


def measures_of(
    samples: SampleSet, judge: Judge | None, references: list[str], max_tokens: int | None
) -> list[Measure]:
    """Everything that can be measured with what is there: perplexity first, entropy and distinct-n, MAUVE last.

    Diversity is that of the samples' own tokens, else of the judge's, else of words.
    """
    measures = perplexity_measures(judge, samples.texts, max_tokens) if judge else []
    if samples.tokens is not None:
        measures += diversity(samples.tokens, "the model's tokens")
    elif judge is not None:
        measures += diversity(judge.encode(samples.texts), f"tokens of {judge.name}")
    else:
        measures += diversity([text.split() for text in samples.texts], "words")
    if judge is not None and references:
        measures.append(mauve_measure(judge, samples.texts, references, max_tokens))
    return measures


def read_samples(path: Path) -> SampleSet:
    """The samples of a JSONL file with `text`, and `tokens` where there are any.

    Raises:
        UserError: no such file, a line that is not JSON or has no text.
    """
    records = _json_lines("--samples", path)
    tokens = [record.get("tokens") for record in records]
    are_ids = [isinstance(row, list) and all(type(token) is int for token in row) for row in tokens]
    return SampleSet([record["text"] for record in records], tokens if all(are_ids) else None)


def _check(options: QualityOptions, request: TextRequest, sampling: SamplingOptions) -> None:
    if (options.samples is None) == (options.load is None):
        raise UserError("give either --samples, a file of samples, or --load, a model to draw them from")
    drawing = (request, sampling, options.bf16, options.save_samples)
    if options.samples and drawing != (TextRequest(), SamplingOptions(), False, None):
        raise UserError("--samples are drawn already; leave out the flags that say how to draw, or --samples")
    if options.reference and not options.judge:
        raise UserError("--reference needs --judge: MAUVE compares the judge's features of two sets of texts")
    if options.judge_tokens < 0 or options.judge_tokens == 1:
        raise UserError(f"--judge-tokens {options.judge_tokens} must be at least 2, or 0 for all")
    read = [("--samples", options.samples), ("--reference", options.reference)]
    check_output("--save-samples", options.save_samples, read)
    check_output("--output", options.output, [*read, ("--save-samples", options.save_samples)])


def _draw(options: QualityOptions, request: TextRequest, sampling: SamplingOptions) -> SampleSet:
    from sedd_megatron.generation.observers import ProgressBar
    from sedd_megatron.parallel.groups import groups_of_this_process
    from sedd_megatron.saved_model import find_saved_model

    saved = find_saved_model(options.load, options.device)
    settings = settings_of(sampling, saved.graph)
    frames = frames_of(
        request,
        saved.tokenizer,
        saved.model_options.seq_length,
        sampling.first_sample,
        max_samples=sampling.max_samples,
    )
    parallel = ParallelOptions(device=options.device)
    model = saved.load(parallel, PrecisionOptions(bf16=options.bf16), lambda: groups_of_this_process(parallel))
    bar = ProgressBar()
    records: list[dict[str, Any]] = []
    for batch in batches_of(frames, sampling.batch_size):
        records += [text.record() for text in model.engine.make(batch, settings, sampling.stop_at_eod, [bar])]
        if options.save_samples:
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_output("--save-samples", options.save_samples, lines)
    return SampleSet([record["text"] for record in records], [record["tokens"] for record in records])


def _read_references(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [record["text"] for record in _json_lines("--reference", path)]
    texts = [line.strip() for line in text_lines("--reference", path) if line.strip()]
    if not texts:
        raise UserError(f"--reference {path}: no text there; write one text a line")
    return texts


def _json_lines(flag: str, path: Path) -> list[dict[str, Any]]:
    records = []
    for number, record in json_lines(flag, path, "write one object a line"):
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f'{flag} {path}, line {number}: no text; write it as {{"text": "Once upon a time"}}')
        records.append(record)
    if not records:
        raise UserError(f"{flag} {path}: no line there; draw samples with sedd_megatron.generate --output")
    return records


if __name__ == "__main__":
    run_command(main)
