"""Published weights in this layout's model: what every rank draws with each sampler, and from which scores."""

import json
from functools import partial
from pathlib import Path

import torch

from sedd_megatron.config import ParallelOptions, PrecisionOptions, RecomputeOptions
from sedd_megatron.data.tokenizers import CharTokenizer
from sedd_megatron.diffusion import (
    SAMPLERS,
    GeometricSchedule,
    LogLinearSchedule,
    SamplingSettings,
    TokenChoice,
)
from sedd_megatron.diffusion.score_reader import asked_positions
from sedd_megatron.parallel.groups import parallel_groups
from tests.diffusion.simulated_device import WaitingOperations
from tests.distributed.launch import own_jobs
from tests.distributed.run_published_parity import Published

LETTERS = "abcdefghijklmnopqrstuvwxyzABCD"
SCHEDULES = {"absorb": LogLinearSchedule(), "uniform": GeometricSchedule(1e-3, 20.0)}


def settings_for(graph) -> dict[str, SamplingSettings]:
    """Every sampler of the graph, and one whose tokens need whole rows in order."""
    fitting = [name for name, sampler in SAMPLERS.items() if isinstance(graph, sampler.graphs)]
    settings = {name: SamplingSettings(sampler=name, num_steps=5, corrector_strength=3.0) for name in fitting}
    sharpened = SamplingSettings("analytic", 5, time_grid="cosine", choose=TokenChoice(0.8, top_k=7, top_p=0.9))
    return settings | {"sharpened": sharpened}


def frames_of_all(tokenizer: CharTokenizer) -> list:
    """Several lengths, one of them in blocks, with given text at their edges and inside."""
    from sedd_megatron.generation.requests import TextRequest, frames_of

    frames = []
    for request in (
        TextRequest(infill="ab[MASK*9]c[MASK*4]", num_samples=3, seed=2),
        TextRequest(prompt="q", suffix="xyz", length=35, num_samples=2),
        TextRequest(length=7),
    ):
        frames += frames_of(request, tokenizer, 16, len(frames))
    return frames


def draw_all(network, graph_name: str, groups) -> dict[str, list]:
    """Tokens, network calls and whether it ended, of every sample of every sampler."""
    from sedd_megatron.data.batches import batches_of
    from sedd_megatron.generation.engine import TextEngine

    tokenizer, graph = CharTokenizer(LETTERS), network.model.graph
    tokenizer.eod_id = 4
    engine = TextEngine(network, graph, SCHEDULES[graph_name], tokenizer, 16, groups.device)
    drawn = {}
    for name, settings in settings_for(graph).items():
        texts = [text for batch in batches_of(frames_of_all(tokenizer), 2) for text in engine.make(batch, settings)]
        drawn[name] = [(text.tokens, text.network_calls, text.ended) for text in texts]
    return drawn


def check_waits(network, graph_name: str, groups, drawn: dict[str, list]) -> None:
    """The network makes the host wait for nothing, however many chunks there are, but once for how many leave."""

    def counting(x_t, sigma, asked, law, again=None, dtype=torch.long) -> torch.Tensor:
        with WaitingOperations() as waiting:
            given = network(x_t, sigma, asked, law, again, dtype)
        assert waiting.names == ["aten.nonzero.default"] * (again is not None)
        return given

    counting.model = network.model
    assert draw_all(counting, graph_name, groups) == drawn


def check_scores(network, golden: dict[str, torch.Tensor]) -> None:
    """The scores of some positions are those of the whole table of log-scores, for the trained length and a shorter."""
    device, generator = network.tile.device, torch.Generator().manual_seed(3)
    for length in (16, 9):
        x, sigma = golden["x"][:, :length].to(device), golden["sigma"].to(device)
        # Few positions of one sequence and all of another.
        chosen = torch.rand(x.shape, generator=generator) < torch.tensor([[0.1], [0.4], [0.7], [1.0]])
        chosen[0, length // 2] = True
        active, index, asked = asked_positions(chosen, device)
        assert len(active) == len(x)
        rows, sums = [], []

        def law(scores, part: slice, rows=rows, sums=sums) -> torch.Tensor:
            rows.append(scores.whole_rows(scores.values).clone())
            sums.append(scores.sum_of(scores.values))
            return torch.arange(part.start, part.start + len(scores.values), device=device)

        with torch.no_grad():
            states = network(x, sigma, asked, law)
            expected = network.model.log_score(x, sigma).flatten(0, 1)[index].exp()
        expected = expected.scatter(-1, x.flatten()[index, None], 0.0)[:, : len(LETTERS)]
        assert torch.equal(states, torch.arange(len(index), device=device))
        torch.testing.assert_close(torch.cat(rows), expected, rtol=2e-5, atol=0)
        torch.testing.assert_close(torch.cat(sums), expected.double().sum(-1), rtol=2e-5, atol=0)


def check(
    folder: str,
    name: str,
    graph_name: str,
    tensor_size: int,
    pipeline_size: int,
    divisor: int,
    device: str = "cpu",
    captured: bool = False,
) -> None:
    published = Published.read(graph_name)
    parallel = ParallelOptions(
        tensor_model_parallel_size=tensor_size, pipeline_model_parallel_size=pipeline_size, device=device
    )
    with parallel_groups(parallel) as groups:
        from sedd_megatron.diffusion.graph import make_graph
        from sedd_megatron.model.fixed_shapes import FixedShapes
        from sedd_megatron.model.score_network import ScoreNetwork
        from sedd_megatron.training.build import build_model

        graph, options = make_graph(graph_name, len(LETTERS)), published.options(make_vocab_size_divisible_by=divisor)
        (model,) = build_model(options, parallel, PrecisionOptions(), RecomputeOptions(), graph, groups)
        published.fill(model)
        model.eval()
        network = ScoreNetwork(model, groups)
        if captured:
            network.capture()
        drawn = draw_all(network, graph_name, groups)
        if pipeline_size == 1:
            check_scores(network, published.golden)
            network.chunk_rows, network.tile = 3, network.tile.new_empty(3 * model.head.linear.weight.shape[0])
            check_scores(network, published.golden)
            # With the scores the same, one layout is enough.
            if tensor_size == 1:
                check_waits(network, graph_name, groups, drawn)
            # Filled up to the shapes of a few graphs, which here are plain calls.
            network.rows = FixedShapes(model.rows, lambda function, inputs: partial(function, *inputs))
            assert draw_all(network, graph_name, groups) == drawn
            shapes = network.rows.calls
            assert len(shapes) > 2
            assert all(batch in (1, 2) and rows in (1, 2, 4, 7, 8, 16) for batch, _, rows in shapes)
        path = Path(folder) / f"{name}-{graph_name}-{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(drawn))


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
