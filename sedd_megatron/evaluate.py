"""python -m sedd_megatron.evaluate: a bound on the negative log-likelihood of text, with its confidence interval."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import MISSING, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sedd_megatron.config import LayoutOptions, ParallelOptions, PrecisionOptions
from sedd_megatron.data.documents import FileSource
from sedd_megatron.data.input_files import INPUT_FORMATS, input_files
from sedd_megatron.diffusion.graph import find_for_graph
from sedd_megatron.diffusion.integration import INTEGRATIONS
from sedd_megatron.errors import UserError, print_output, run_command, say
from sedd_megatron.evaluation.corpora import CORPORA, documents_of
from sedd_megatron.evaluation.intervals import METHOD, Interval
from sedd_megatron.evaluation.published_table import PUBLISHED, published_table
from sedd_megatron.evaluation.windows import MAX_DRAWS, WINDOWINGS, Window, windows_of
from sedd_megatron.layout_rules import check_layout
from sedd_megatron.options import check_rules, option, parse_options
from sedd_megatron.output_files import check_output, write_output
from sedd_megatron.parallel.groups import (
    errors_before_joining,
    is_first_rank,
    joined_after_checks,
    sees_what_the_first_rank_does,
)
from sedd_megatron.wording import counted

if TYPE_CHECKING:
    from sedd_megatron.diffusion.likelihood import Bound
    from sedd_megatron.evaluation.bounds import UnitBound
    from sedd_megatron.pretrained import PretrainedModel
    from sedd_megatron.saved_model import SavedModel

GPT2_TOKENS = 50257


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluation"""

    load: str = option(MISSING, "folder that training saved to, one iter_* folder in it, or a published model")
    data: tuple[str, ...] | None = option(
        None, "text files (a document each), files with a JSON object in each line (one a line), or folders of them"
    )
    input_format: str | None = option(
        None, "what the files are, each a text or lines of JSON; told by their content if not given", INPUT_FORMATS
    )
    corpora: tuple[str, ...] | None = option(
        None,
        "or benchmark corpora by name, detokenized as published; a table with published figures follows",
        choices=tuple(CORPORA),
    )
    data_dir: str | None = option(None, "folder with the corpora's files; without it they are fetched")
    json_key: str = option("text", "key of the lines' objects")
    max_documents: int | None = option(None, "only this many, from the first on")
    windowing: str = option("concatenate", "how documents become windows of the trained length", choices=WINDOWINGS)
    append_eod: bool | None = option(
        None,
        "where they are concatenated, end each by the end-of-document token, if the tokenizer has one; as in the data "
        "that the model was trained on if not given, and as published where that is unknown",
    )
    mc_samples: int = option(1000, "random draws per window, stratified")
    integrate_over: str = option(
        "time",
        "what the draws are stratified over: time as published, or mask-count (absorbing graph; a smaller error)",
        choices=tuple(INTEGRATIONS),
    )
    until_half_width: float | None = option(
        None, "go on with further draws until Monte Carlo's 95 % half-width of the perplexity is at most this"
    )
    batch_size: int = option(16, "corrupted sequences that go through the network at once; does not change the result")
    seed: int = option(0, "seed of times and noise")
    bf16: bool = option(False, "compute in bfloat16; the sums stay float32 and float64")
    output: str | None = option(None, "also write each unit's bound to this file, one JSON object a line")


def check(argv: Sequence[str]) -> "tuple[EvaluateOptions, LayoutOptions, SavedModel]":
    """What the flags ask for, and the model that they name, before any text or weight is read.

    Raises:
        UserError: the first mistake.
    """
    options, layout = parse_options(
        (EvaluateOptions, LayoutOptions), argv, "sedd_megatron.evaluate", "Bound the likelihood of text."
    )
    check_layout(layout)
    _check(options)
    from sedd_megatron.saved_model import find_saved_model

    with errors_before_joining(ParallelOptions(**dataclasses.asdict(layout))):
        saved = find_saved_model(options.load, layout.device)
        read = [("--data", path) for path in options.data or ()]
        if sees_what_the_first_rank_does():
            check_output("--output", options.output, [*read, *saved.files_of_run()], saved.path)
        _check_for_model(options, saved)
    return options, layout, saved


def _check_for_model(options: EvaluateOptions, saved: "SavedModel") -> None:
    if saved.parted_documents and options.windowing == "concatenate":
        raise UserError(
            f"--load {options.load}: its documents were cut off from each other (--reset-attention-mask or "
            "--reset-position-ids), and --windowing concatenate lets them see each other; give --windowing strided "
            "(absorbing graph) or separate"
        )
    try:
        find_for_graph(INTEGRATIONS, options.integrate_over, saved.graph, "--integrate-over")
    except ValueError as error:
        raise UserError(str(error)) from error


def main() -> None:
    """Parse the flags, load model and text, print the bound."""
    options, layout, saved = check(sys.argv[1:])
    parallel = ParallelOptions(**dataclasses.asdict(layout))
    length, may_give = saved.model_options.seq_length, saved.graph.mask_token_id is not None
    append_eod = _append_eod(options, saved)
    windowing = options.windowing
    if windowing == "concatenate" and saved.tokenizer.eod_id is not None:
        windowing += f", documents {'ended' if append_eod else 'not ended'}"
    with errors_before_joining(parallel):
        texts_of = _texts(options)
        windows_by_name = {name: windows_of(texts, saved.tokenizer, length, options.windowing, may_give, append_eod)
                           for name, texts in texts_of.items()}  # fmt: skip
    found = {}
    with ExitStack() as stack:
        model = saved.load(
            parallel, PrecisionOptions(bf16=options.bf16), lambda: stack.enter_context(joined_after_checks(parallel))
        )
        for name, windows in windows_by_name.items():
            found[name] = _bound_units(model, windows, options, saved.diffusion.time_eps)
            if is_first_rank():
                print_output(report(name, found[name], texts_of[name], windowing))
    if is_first_rank():
        if options.output:
            records = ({"corpus": name} | unit.record() for name, units in found.items() for unit in units)
            write_output("--output", options.output, (json.dumps(record) + "\n" for record in records))
        if options.corpora:
            print_output(_beside_published(found, saved.num_tokens, options.load))


def _beside_published(found: "dict[str, list[UnitBound]]", num_tokens: int, name: str) -> str:
    from sedd_megatron.evaluation.bounds import corpus_interval

    if num_tokens != GPT2_TOKENS:
        published = f"published perplexities are per token of GPT-2's {GPT2_TOKENS:,}"
        return f"no table: {published}, and this model has {num_tokens:,}"
    perplexities = {corpus: corpus_interval(units).map(_exp) for corpus, units in found.items()}
    columns = PUBLISHED["zero-shot"].columns
    measured = {corpus: interval for corpus, interval in perplexities.items() if corpus in columns}
    return "\n" + published_table(measured, "zero-shot", name) if measured else "no published perplexity of these"


def _texts(options: EvaluateOptions) -> dict[str, list[str]]:
    """The documents of each corpus, or those of --data under the name of its first file."""
    if options.corpora is not None:
        folder = None if options.data_dir is None else Path(options.data_dir)
        return {name: documents_of(name, folder)[: options.max_documents] for name in options.corpora}
    return {options.data[0]: _texts_of_files(options)}


def _texts_of_files(options: EvaluateOptions) -> list[str]:
    source = FileSource(input_files(options.data, "--data", options.input_format), key_flag="--json-key")
    # A text without characters has no tokens: prepare_data leaves it out too, and an end of its own is in no data.
    values = (value for value in source.values(options.json_key) if value not in (None, ""))
    texts = list(islice(values, options.max_documents))
    if source.num_nulls and is_first_rank():
        what = counted(source.num_nulls, "document")
        say(f"left out {what} with null at key {options.json_key!r}", to_stderr=True)
    return texts


def _append_eod(options: EvaluateOptions, saved: "SavedModel") -> bool:
    """Whether documents are ended; says on stderr where nobody knows whether those that the model saw were."""
    if options.append_eod is not None:
        return options.append_eod
    is_unknown, has_end = saved.preparation.append_eod is None, saved.tokenizer.eod_id is not None
    if is_unknown and has_end and options.windowing == "concatenate" and is_first_rank():
        print(
            "documents are joined by the end-of-document token, as published; for a model whose data had none give "
            "--no-append-eod",
            file=sys.stderr,
        )
    return saved.preparation.ends_documents


def report(name: str, units: "Sequence[UnitBound]", texts: Sequence[str], windowing: str) -> str:
    """What the command prints of one corpus; `windowing` is the option's value, and what is to be known beside it."""
    from sedd_megatron.evaluation.bounds import corpus_interval, sample_interval

    corpus, here = corpus_interval(units), sample_interval(units)
    num_tokens, num_characters = sum(unit.num_tokens for unit in units), sum(map(len, texts))
    terms = {name: math.fsum(getattr(unit, name) for unit in units) / num_tokens
             for name in ("prior", "diffusion", "reconstruction")}  # fmt: skip
    kind = "windows" if windowing.startswith("concatenate") else "documents"
    bits = here.map(lambda nats: nats * num_tokens / num_characters / math.log(2))
    return "\n".join(
        (
            f"{name}: {len(texts):,} documents, {num_characters:,} characters, {num_tokens:,} tokens in "
            f"{len(units):,} {kind} ({windowing})",
            f"perplexity at most        {_text(corpus.map(_exp))}, {kind} as units ({METHOD})",
            f"  on this text alone      {_text(here.map(_exp))}, Monte Carlo error only",
            f"nats per token            {_text(corpus)}",
            f"  prior {terms['prior']:.4f}, diffusion {terms['diffusion']:.4f}, reconstruction "
            f"{terms['reconstruction']:.4f}",
            f"bits per character        {_text(bits)}, Monte Carlo error only",
        )
    )


def _bound_units(
    model: "PretrainedModel", windows: list[Window], options: EvaluateOptions, time_eps: float
) -> "list[UnitBound]":
    """Rounds of --mc-samples times until they are enough."""
    from sedd_megatron.evaluation.bounds import bound_on_replicas, mean_of_rounds, sample_interval, unit_bounds

    estimator = model.bound_estimator(
        seed=options.seed,
        num_draws=options.mc_samples,
        time_eps=time_eps,
        batch_size=options.batch_size,
        integrate_over=options.integrate_over,
    )
    rounds: list[dict[int, Bound]] = []
    while True:
        rounds.append(bound_on_replicas(estimator, windows, model.groups, len(rounds) * options.mc_samples))
        units = unit_bounds(windows, mean_of_rounds(rounds))
        wanted, half_width = options.until_half_width, sample_interval(units).map(_exp).half_width
        # Every rank has all bounds and stops at the same round; at one that is infinite as well, which stays so.
        if wanted is None or math.isnan(half_width) or half_width <= wanted:
            return units


def _check(options: EvaluateOptions) -> None:
    if (options.data is None) == (options.corpora is None):
        raise UserError("give --data FILES or --corpora NAMES, one of the two")
    if options.data is None and options.input_format is not None:
        raise UserError(f"--input-format {options.input_format}: belongs to --data; leave it out")
    rules = (
        ("mc_samples", options.mc_samples >= 2 and options.mc_samples % 2 == 0, "must be even and at least 2"),
        ("mc_samples", options.mc_samples <= MAX_DRAWS, f"must be at most {MAX_DRAWS}; see --until-half-width"),
        ("batch_size", options.batch_size >= 1, "must be at least 1"),
        ("max_documents", options.max_documents is None or options.max_documents >= 1, "must be at least 1"),
        ("until_half_width", options.until_half_width is None or options.until_half_width > 0, "must be above 0"),
        ("seed", options.seed >= 0, "must be at least 0"),
    )
    check_rules(options, rules)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _text(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


if __name__ == "__main__":
    run_command(main)
