"""python -m sedd_megatron.generate: samples from a trained model, around text of a person's choice."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sedd_megatron.config import LayoutOptions, ParallelOptions, PrecisionOptions
from sedd_megatron.data.batches import batches_of
from sedd_megatron.errors import KEPT_CONTROLS, UserError, print_output, printable, run_command
from sedd_megatron.generation.requests import Frame, TextRequest, frames_of, read_requests
from sedd_megatron.generation.settings import SamplingOptions, settings_of
from sedd_megatron.layout_rules import check_layout
from sedd_megatron.options import option, parse_options
from sedd_megatron.output_files import OutputFile, check_output
from sedd_megatron.parallel.groups import (
    choose_device,
    errors_before_joining,
    errors_of_all_replicas,
    is_first_rank,
    joined_after_checks,
    sees_what_the_first_rank_does,
)

if TYPE_CHECKING:
    from sedd_megatron.diffusion import SamplingSettings
    from sedd_megatron.generation.engine import GeneratedText
    from sedd_megatron.generation.observers import TraceRecorder
    from sedd_megatron.pretrained import PretrainedModel
    from sedd_megatron.saved_model import SavedModel


@dataclass(frozen=True)
class GenerateOptions:
    """Model, input and output"""

    load: str = option(
        MISSING, "folder that training saved to, one iter_* folder in it, or a published model (folder or hub name)"
    )
    bf16: bool = option(False, "compute in bfloat16; scores and draws stay float32 and float64")
    cuda_graph: bool = option(False, "replay a round's kernels as one (CUDA graphs), for small batches")
    requests: str | None = option(None, "file of requests, one JSON object a line with the keys named below, or tokens")
    output: str | None = option(None, "also write the samples to this file, one JSON object a line")
    trace: str | None = option(None, "also write a page (HTML) that replays how the samples came about")
    stream: bool = option(False, "show the texts while they appear")


class Checked(NamedTuple):
    """What the flags ask for, checked against the model that they name."""

    options: GenerateOptions
    request: TextRequest
    sampling: SamplingOptions
    layout: LayoutOptions
    saved: "SavedModel"
    settings: "SamplingSettings"
    frames: list[Frame]


def check(argv: Sequence[str]) -> Checked:
    """Everything before weights are read or ranks join.

    Raises:
        UserError: the first mistake.
    """
    options, request, sampling, layout = parse_options(
        (GenerateOptions, TextRequest, SamplingOptions, LayoutOptions),
        argv,
        "sedd_megatron.generate",
        "Sample text from a trained model.",
    )
    check_layout(layout)
    if options.cuda_graph:
        _check_cuda_graph(layout)
    from sedd_megatron.saved_model import find_saved_model

    with errors_before_joining(ParallelOptions(**asdict(layout))):
        saved = find_saved_model(options.load, layout.device)
        settings = settings_of(sampling, saved.graph)
        frames = _frames(options, request, sampling, saved)
        if sees_what_the_first_rank_does():
            # Not emptied yet: a start that fails leaves an older file as it was.
            others = [("--requests", options.requests), *saved.files_of_run()]
            check_output("--output", options.output, others, saved.path)
            check_output("--trace", options.trace, [*others, ("--output", options.output)], saved.path)
    return Checked(options, request, sampling, layout, saved, settings, frames)


def main() -> None:
    """Parse the flags, check them against the checkpoint, load the model, print the samples."""
    options, request, sampling, layout, saved, settings, frames = check(sys.argv[1:])
    parallel = ParallelOptions(**asdict(layout))
    with ExitStack() as stack:
        model = saved.load(
            parallel, PrecisionOptions(bf16=options.bf16), lambda: stack.enter_context(joined_after_checks(parallel))
        )
        if options.cuda_graph:
            model.score_fn.capture()
        output = None
        if options.output is not None and is_first_rank():
            output = stack.enter_context(OutputFile("--output", options.output))
        recorder = _recorder(options, settings)
        for texts in _make_all(model, frames, settings, options, sampling, recorder):
            for text in texts:
                print_output(f"--- sample {text.sample} ---\n{printable(text.text, kept=KEPT_CONTROLS)}")
                if output is not None:
                    output.write(json.dumps(text.record(), ensure_ascii=False) + "\n")
    if recorder is not None and is_first_rank():
        _write_trace(options, request, sampling, saved, recorder)
        print(f"wrote {options.trace}", file=sys.stderr)


def _check_cuda_graph(layout: LayoutOptions) -> None:
    stages, device = layout.pipeline_model_parallel_size, layout.device
    if stages > 1:
        raise UserError(
            f"--cuda-graph captures the layers of one stage, and --pipeline-model-parallel-size is {stages}; leave out "
            "one of the two"
        )
    if choose_device(device).type == "cpu":
        where = "--device is cpu" if device == "cpu" else f"--device {device} has found none"
        raise UserError(f"--cuda-graph captures a GPU's kernels, and {where}; leave it out")


def _frames(
    options: GenerateOptions, request: TextRequest, sampling: SamplingOptions, saved: "SavedModel"
) -> list[Frame]:
    seq_length, first = saved.model_options.seq_length, sampling.first_sample
    if options.requests is None:
        return frames_of(request, saved.tokenizer, seq_length, first, max_samples=sampling.max_samples)
    return read_requests(Path(options.requests), saved.tokenizer, seq_length, request, first, sampling.max_samples)


def _make_all(
    model: "PretrainedModel",
    frames: Sequence[Frame],
    settings: "SamplingSettings",
    options: GenerateOptions,
    sampling: SamplingOptions,
    recorder: "TraceRecorder | None",
) -> Iterator[list["GeneratedText"]]:
    """The finished texts, as many batches at a time as there are replicas; on the first rank those of all."""
    from sedd_megatron.generation.observers import ProgressBar, StreamPrinter

    groups, is_first = model.groups, is_first_rank()
    observers = [recorder] if recorder is not None else []
    if is_first and options.stream and sys.stdout is not None:
        observers.append(StreamPrinter(model.tokenizer, sys.stdout))
    elif is_first:
        observers.append(ProgressBar())
    batches = list(batches_of(frames, sampling.batch_size))
    for start in range(0, len(batches), groups.data_size):
        own = batches[start + groups.data_rank : start + groups.data_rank + 1]
        with errors_of_all_replicas(groups):
            texts = [text for batch in own
                     for text in model.engine.make(batch, settings, sampling.stop_at_eod, observers)]  # fmt: skip
        yield _gathered_from_replicas(texts, recorder, model)


def _gathered_from_replicas(
    texts: list["GeneratedText"], recorder: "TraceRecorder | None", model: "PretrainedModel"
) -> list["GeneratedText"]:
    """All replicas' texts on the first rank and none on the others; traces go into the first rank's recorder."""
    import torch

    groups = model.groups
    if groups.data_size > 1:
        dp_group = groups.collection.dp
        own = (texts, recorder.traces if recorder is not None else [])
        gathered = [None] * groups.data_size if groups.data_rank == 0 else None
        torch.distributed.gather_object(own, gathered, torch.distributed.get_global_rank(dp_group, 0), group=dp_group)
        if groups.data_rank == 0:
            texts = [text for part, _ in gathered for text in part]
        if recorder is not None:
            recorder.traces = [trace for _, part in gathered or [] for trace in part]
    return texts if is_first_rank() else []


def _recorder(options: GenerateOptions, settings: "SamplingSettings") -> "TraceRecorder | None":
    from sedd_megatron.generation.observers import TraceRecorder

    return TraceRecorder(settings.num_steps + settings.denoise) if options.trace else None


def _write_trace(
    options: GenerateOptions,
    request: TextRequest,
    sampling: SamplingOptions,
    saved: "SavedModel",
    recorder: "TraceRecorder",
) -> None:
    from sedd_megatron.generation.trace import write_trace

    graph, tokenizer = saved.graph, saved.tokenizer
    write_trace(
        Path(options.trace),
        recorder.traces,
        lambda token: tokenizer.decode([token]),
        graph.mask_token_id,
        _trace_settings(options, request, sampling, saved),
    )


def _trace_settings(
    options: GenerateOptions, request: TextRequest, sampling: SamplingOptions, saved: "SavedModel"
) -> dict[str, str]:
    """What the page's header says: the model, what was asked for, and how it was sampled, but for defaults."""
    settings = {"model": options.load}
    iteration = re.fullmatch(r"iter_0*(\d+)", saved.path.name)
    if iteration is not None:
        settings["iteration"] = f"{int(iteration[1]):,}"
    if options.requests is not None:
        return settings | {"requests": options.requests} | _sampling_settings(sampling)
    texts = {name: getattr(request, name) for name in ("prompt", "suffix", "infill")}
    settings |= {name: text for name, text in texts.items() if text}
    return settings | _sampling_settings(sampling) | {"seed": str(request.seed)}


def _sampling_settings(sampling: SamplingOptions) -> dict[str, str]:
    count = f"{sampling.sampling_steps} step{'s' * (sampling.sampling_steps > 1)}"
    steps = f"{count} and the last one" if sampling.denoise else f"{count}, without the last one"
    default, names = SamplingOptions(), ("time_grid", "temperature", "top_k", "top_p", "corrector_strength")
    changed = [name for name in names if getattr(sampling, name) != getattr(default, name)]
    named = {name.replace("_", " "): str(getattr(sampling, name)) for name in changed}
    return {"sampler": sampling.sampler, "steps": steps} | named


if __name__ == "__main__":
    run_command(main)
