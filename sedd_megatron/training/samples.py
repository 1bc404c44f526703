"""Texts that are drawn while a run trains, from its moving average, so that people see what it has learnt.

No state of training is touched: draws have keys, and the average changes places with the weights as in a validation.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from sedd_megatron.diffusion.sampling import Draws, SamplingProgress, SamplingSettings, run_sampler
from sedd_megatron.diffusion.score_reader import Asked, ScoresNotFiniteError
from sedd_megatron.errors import say
from sedd_megatron.model.score_network import ScoreNetwork
from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.parallel.groups import ParallelGroups, is_first_rank, on_first_rank, tell
from sedd_megatron.run_files import SAMPLES
from sedd_megatron.training.build import TrainingRun
from sedd_megatron.training.metrics import MetricsWriter
from sedd_megatron.training.metrics_file import append_whole, end_last_line
from sedd_megatron.training_schedule import is_due


class _BrokenOffError(Exception):
    """Somebody has asked the run to end."""


class LayoutScoreNetwork(ScoreNetwork):
    """The network as samplers read it in any layout of training: interleaved stages, sequence and context parallelism.

    Every rank is asked the same and gets the same. Beside generation's network it computes the last layer at all
    positions, not only those asked about.
    """

    def __init__(self, chunks: Sequence[SEDDModel], groups: ParallelGroups) -> None:
        super().__init__(chunks[-1], groups)
        self.chunks = chunks

    def _asked_rows(self, x_t: Tensor, sigma: Tensor, asked: Asked) -> Tensor | None:
        (num_sequences, length), config = x_t.shape, self.model.config
        own = x_t.chunk(self.groups.context_size, dim=1)[self.groups.context_rank].contiguous()
        shards = self.groups.tensor_size if config.sequence_parallel else 1
        shape = (own.shape[1] // shards, num_sequences, config.hidden_size)
        for chunk in self.chunks:
            chunk.set_input_tensor(self.stages.recv_forward(shape, chunk.pre_process))
            hidden_states, conditioning = chunk.trunk(own, sigma)
            if not chunk.post_process:
                self.stages.send_forward(hidden_states, is_last_stage=False)
        if not self.model.post_process:
            return None
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.groups.collection.tp)
        rows = self.model.head.normalized(self._whole_sequences(hidden_states), conditioning)
        return rows[asked.index % length, asked.index // length]

    def _whole_sequences(self, hidden_states: Tensor) -> Tensor:
        """[S / CP, B, H] -> [S, B, H]."""
        group = self.groups.collection.cp
        if group.size() == 1:
            return hidden_states
        parts = [torch.empty_like(hidden_states) for _ in range(group.size())]
        torch.distributed.all_gather(parts, hidden_states.contiguous(), group=group)
        return torch.cat(parts)


def draw_samples_if_due(run: TrainingRun, requested: Callable[[], int]) -> int:
    """Draw samples and write them down, unless that is not due; returns the signal that broke it off, or 0.

    `requested` gives the signal that has asked any rank to end, or 0. Collective.
    """
    request = 0
    if not is_due(run.iteration, run.options.logging.sample_interval):
        return 0

    def is_broken_off() -> bool:
        nonlocal request
        request = requested()
        return request > 0

    texts = draw_samples(run, is_broken_off)
    if texts is not None and is_first_rank():
        write_samples(_folder(run), run.iteration, texts)
    return request


def make_up_for_samples(run: TrainingRun, metrics: MetricsWriter | None, requested: Callable[[], int]) -> int:
    """Where a run goes on, draw the samples of its last step if those were left out; returns as draw_samples_if_due."""

    def are_left_out() -> bool:
        return metrics is not None and metrics.has_step(run.iteration) and not _has_samples(run)

    return draw_samples_if_due(run, requested) if on_first_rank(are_left_out) else 0


def draw_samples(run: TrainingRun, is_broken_off: Callable[[], bool] = lambda: False) -> list[str] | None:
    """The texts of --num-samples sequences of the trained length, the same in every layout. Collective.

    `is_broken_off` is asked after every round, on every rank; None once it holds, or where scores are not finite,
    which is told.
    """
    logging, length = run.options.logging, run.options.model.seq_length
    for chunk in run.ddp_chunks:
        chunk.eval()

    def on_round(progress: SamplingProgress) -> None:
        if is_broken_off():
            raise _BrokenOffError

    sampler = logging.sampler_for(run.options.diffusion.graph)
    settings = SamplingSettings(sampler=sampler, num_steps=logging.sampling_steps)
    # The same draws every time: what differs from one interval to the next is the model.
    draws = Draws([run.options.training.seed] * logging.num_samples, range(logging.num_samples))
    nothing = torch.zeros(logging.num_samples, length, dtype=torch.long, device=run.groups.device)
    with run.ema.swapped_in():
        network = LayoutScoreNetwork(run.model_chunks, run.groups)
        try:
            result = run_sampler(network, run.graph, run.schedule, settings, draws, nothing, nothing.bool(), on_round)
        except _BrokenOffError:
            return None
        except ScoresNotFiniteError as error:
            where = f"no samples at iteration {run.iteration}"
            tell([f"warning: {where}: scores are not finite at sigma {error.sigma:.4g}"], to_stderr=True)
            return None
    return [run.tokenizer.decode(states) for states in result.states.tolist()]


def _folder(run: TrainingRun) -> Path:
    return Path(run.options.logging.log_dir or run.options.checkpoint.save)


def _has_samples(run: TrainingRun) -> bool:
    try:
        lines = (_folder(run) / SAMPLES).read_bytes().splitlines()
    except OSError:
        return False
    return any(line.startswith(b'{"iteration": %d,' % run.iteration) for line in lines)


def write_samples(folder: Path, iteration: int, texts: Sequence[str]) -> None:
    """Add texts to the folder's samples.jsonl; a disk that refuses them is told, and ends nothing."""
    records = [{"iteration": iteration, "sample": number, "text": text} for number, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path = folder / SAMPLES
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            end_last_line(path)
        with path.open("ab", buffering=0) as file:
            append_whole(file.fileno(), lines.encode())
    except OSError as error:
        say(f"warning: {path}: {error.strerror}; training goes on without the samples of this step", to_stderr=True)
