"""An engine over networks whose law can be written down, and an observer that keeps all that it sees."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sedd_megatron.data.tokenizers import CharTokenizer
from sedd_megatron.diffusion import SAMPLERS, AbsorbingGraph, LogLinearSchedule, SamplingSettings, UniformGraph
from sedd_megatron.diffusion.sampling import SamplingProgress
from sedd_megatron.diffusion.score_reader import Asked, ChunkLaw, score_fn_of
from sedd_megatron.generation.engine import GeneratedText, TextEngine
from sedd_megatron.generation.requests import Frame, TextRequest, frames_of

LETTERS = "abcdefgh|"
TOKENS = len(LETTERS)
SEQ_LENGTH = 8
GRAPHS = {"absorb": AbsorbingGraph(TOKENS), "uniform": UniformGraph(TOKENS)}
CASES = [(name, sampler) for name, graph in GRAPHS.items() for sampler in SAMPLERS
         if isinstance(graph, SAMPLERS[sampler].graphs)]  # fmt: skip

# x [B, S] -> the law of each position's token given the others, [B, S, TOKENS]
Law = Callable[[Tensor], Tensor]


def alphabet(ends: bool = True) -> CharTokenizer:
    """Nine letters, of which | ends a document."""
    tokenizer = CharTokenizer(LETTERS)
    tokenizer.eod_id = LETTERS.index("|") if ends else None
    return tokenizer


def counting(x: Tensor) -> Tensor:
    """Each letter is the next of the one before it, from whatever is known; the first may be any."""
    known, positions = x < TOKENS, torch.arange(x.shape[1])
    first = known.long().argmax(1, keepdim=True)
    letters = (x.gather(1, first) - first + positions) % TOKENS
    return torch.where(known.any(1)[:, None, None], F.one_hot(letters, TOKENS), 1 / TOKENS).double()


def scripts(*texts: str) -> Law:
    """Position k has the k-th letter of a text: of the first, unless the sequence begins with another's letter."""
    table = F.one_hot(torch.tensor([[LETTERS.index(letter) for letter in text] for text in texts]), TOKENS).double()

    def law(x: Tensor) -> Tensor:
        begins = torch.stack([x[:, 0] == LETTERS.index(text[0]) for text in texts], dim=-1)
        return table[begins.long().argmax(-1), : x.shape[1]]

    return law


def any_letters(x: Tensor) -> Tensor:
    """Letters of unequal weight, other ones at each position."""
    weights = 1.0 + (torch.arange(x.shape[1])[:, None] * 5 + torch.arange(TOKENS)) % 7
    return (weights / weights.sum(-1, keepdim=True)).double().expand(len(x), -1, -1)


class Network:
    """The ScoreFn of a law, exact for either graph where positions are independent; counts and keeps its calls."""

    def __init__(self, law: Law, graph: AbsorbingGraph | UniformGraph) -> None:
        self.law, self.graph = law, graph
        self.asked: list[list[int]] = []

    def log_score(self, x: Tensor, sigma: Tensor) -> Tensor:
        probs, sigma = self.law(x), sigma.double()[:, None, None]
        if self.graph.mask_token_id is not None:
            return F.pad(probs / torch.expm1(sigma), (0, 1)).log()
        noisy = torch.exp(-sigma) * probs - torch.expm1(-sigma) / TOKENS
        return (noisy / noisy.gather(-1, x[..., None])).log()

    def __call__(self, x_t: Tensor, sigma: Tensor, asked: Asked, *laws: ChunkLaw | None) -> Tensor:
        self.asked.append(asked.index.tolist())
        return score_fn_of(self.log_score, TOKENS)(x_t, sigma, asked, *laws)


def engine_of(law: Law, graph: str = "absorb", ends: bool = True) -> TextEngine:
    """Of SEQ_LENGTH positions; its score_fn is a Network."""
    network = Network(law, GRAPHS[graph])
    return TextEngine(network, network.graph, LogLinearSchedule(), alphabet(ends), SEQ_LENGTH, torch.device("cpu"))


def frames(*requests: TextRequest) -> list[Frame]:
    """The requests' samples, numbered on."""
    made: list[Frame] = []
    for request in requests:
        made += frames_of(request, alphabet(), SEQ_LENGTH, len(made))
    return made


class Seen(NamedTuple):
    """A text after a round: its step counted over all blocks, and None where there is nothing yet."""

    block: int
    step: int
    states: list[int | None]


class Watcher:
    """An observer that keeps every text after every round, from before the first on, and the network's calls then."""

    def __init__(self, settings: SamplingSettings, network: Network | None = None) -> None:
        self.steps_per_block, self.network = settings.num_steps + settings.denoise, network

    def begin(self, frames: Sequence[Frame], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.rounds: list[tuple[int, tuple[int, ...]]] = []  # the block, and the rows that took part
        self.calls: list[int] = []
        self.history: list[list[Seen]] = [[] for _ in frames]
        self.now = [[t if given else None for t, given in zip(f.tokens, f.given, strict=True)] for f in frames]

    def on_round(self, progress: SamplingProgress, rows: Sequence[int], block: int, start: int) -> None:
        self.rounds.append((block, tuple(rows)))
        self.calls.append(len(self.network.asked) if self.network else 0)
        for row, states, step in zip(rows, progress.states.tolist(), progress.steps.tolist(), strict=True):
            self.now[row][start : start + len(states)] = states
            self.history[row].append(Seen(block, block * self.steps_per_block + step, list(self.now[row])))

    def end(self, texts: Sequence[GeneratedText]) -> None:
        self.texts = texts

    def states_at(self, row: int, step: int) -> list[int | None]:
        """What a text was once all of a step was done."""
        return [seen.states for seen in self.history[row] if seen.step <= step][-1]
