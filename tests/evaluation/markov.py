"""A source of text whose entropy is known: a stationary Markov chain over a few tokens."""

import torch
from torch import Tensor


class MarkovSource:
    """Windows x of S tokens with p(x) = pi(x_1) P(x_2 | x_1) ... P(x_S | x_S-1), where pi = pi P.

    Rows of P are the softmax of `peak` times normal numbers: the larger, the more a token says of the next.
    """

    def __init__(self, num_tokens: int, peak: float, seed: int) -> None:
        normal = torch.randn(num_tokens, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.transitions = (peak * normal).softmax(1)
        self.stationary = torch.linalg.matrix_power(self.transitions, 1 << 10)[0]

    @property
    def token_entropy(self) -> float:
        """H(pi): of a token by itself, in nats."""
        return _entropy(self.stationary).item()

    def window_entropy(self, length: int) -> float:
        """H(pi) + (S - 1) sum over i of pi_i H(P(. | i)), in nats."""
        return self.token_entropy + (length - 1) * (self.stationary @ _entropy(self.transitions)).item()

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """Independent windows; [count, length] int64."""
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.multinomial(self.stationary, count, replacement=True, generator=generator)]
        for _ in range(length - 1):
            tokens.append(torch.multinomial(self.transitions[tokens[-1]], 1, generator=generator)[:, 0])
        return torch.stack(tokens, dim=1)

    def negative_log_likelihood(self, windows: Tensor) -> Tensor:
        """-log p(x) of windows [N, S], in nats; [N] float64."""
        steps = self.transitions[windows[:, :-1], windows[:, 1:]]
        return -self.stationary[windows[:, 0]].log() - steps.log().sum(1)


def _entropy(probs: Tensor) -> Tensor:
    """Over the last axis of probs, all positive."""
    return -(probs * probs.log()).sum(-1)
