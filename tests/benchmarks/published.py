"""The opponent: the published model, loss and step (arXiv 2310.16834) in plain torch, written from the formulas.

Dense logits for every position, the masked ones picked by boolean indexing afterwards, autograd for the rest, in the
order in which the published code does it; parameters have the published names. One process, float32 on a CPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sedd_megatron.model.conditioning import sinusoids


class Norm(nn.Module):
    """LayerNorm in two operations, the weight by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape) * self.weight


class Block(nn.Module):
    """adaLN-zero around attention and MLP."""

    def __init__(self, width: int, heads: int, cond_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv, self.attn_out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * width)

    def forward(self, x: Tensor, conditioning: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(conditioning)[:, None].chunk(6, dim=2)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        # Values turn by an angle of 0.
        q, k, v = (qkv * cos + rotate_half(qkv) * sin).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.attn_out(attended)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class PublishedModel(nn.Module):
    """x_t [B, S], sigma [B] -> log-scores [B, S, num_states], 0 at x_t."""

    def __init__(self, layers: int, width: int, heads: int, num_states: int, absorbing: bool, cond_dim: int = 128):
        super().__init__()
        self.absorbing, self.head_size = absorbing, width // heads
        self.vocab_embed = nn.ParameterDict({"embedding": torch.empty(num_states, width).uniform_(-0.1, 0.1)})
        self.sigma_map = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(256, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim))}
        )
        self.blocks = nn.ModuleList(Block(width, heads, cond_dim) for _ in range(layers))
        self.output_layer = nn.ModuleDict(
            {
                "norm_final": Norm(width),
                "adaLN_modulation": nn.Linear(cond_dim, 2 * width),
                "linear": nn.Linear(width, num_states),
            }
        )
        # Not there at the published start (adaLN-zero), but every derivative then is.
        for parameter in self.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        x, conditioning = self.trunk(x_t, sigma)
        head = self.output_layer
        shift, scale = head["adaLN_modulation"](conditioning)[:, None].chunk(2, dim=2)
        logits = head["linear"](head["norm_final"](x) * (1 + scale) + shift)
        return scaled_log_score(logits, x_t, sigma, self.absorbing)

    def trunk(self, x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, S, H] before the head, and the conditioning [B, cond_dim]."""
        x, conditioning = self.vocab_embed["embedding"][x_t], F.silu(self.sigma_map["mlp"](sinusoids(sigma)))
        cos, sin = self.rotary(x_t.shape[1], x_t.device)
        for block in self.blocks:
            x = block(x, conditioning, cos, sin)
        return x, conditioning

    def rotary(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[S, 3, 1, head size] each."""
        frequencies = 10_000 ** (-torch.arange(0, self.head_size, 2, device=device) / self.head_size)
        angles = torch.arange(length, device=device)[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        angles = torch.stack([angles, angles, torch.zeros_like(angles)], dim=1)[:, :, None]
        return angles.cos(), angles.sin()


def scaled_log_score(logits: Tensor, x_t: Tensor, sigma: Tensor, absorbing: bool) -> Tensor:
    """Section 5.1: the logits less log(expm1(sigma)) and the log of the number of tokens; 0 at x_t."""
    if absorbing:
        log_e = expm1(sigma).log()[:, None, None]
        logits = logits - log_e - math.log(logits.shape[-1] - 1)
    return torch.scatter(logits, -1, x_t[..., None], torch.zeros_like(logits[..., :1]))


def expm1(sigma: Tensor) -> Tensor:
    return torch.where(sigma < 0.5, torch.expm1(sigma), sigma.exp() - 1)


def published_loss(
    log_score: Tensor, sigma: Tensor, sigma_rate: Tensor, x_t: Tensor, x_0: Tensor, absorbing: bool
) -> Tensor:
    """Equation 10: score entropy of every position, times sigma_rate, summed over them, averaged over sequences."""
    entropy = (absorbing_score_entropy if absorbing else uniform_score_entropy)(log_score, sigma, x_t, x_0)
    return (sigma_rate[:, None] * entropy).sum(-1).mean()


def absorbing_score_entropy(log_score: Tensor, sigma: Tensor, x_t: Tensor, x_0: Tensor) -> Tensor:
    is_masked = x_t == log_score.shape[-1] - 1
    ratio = (1 / expm1(sigma))[:, None].expand_as(x_t)[is_masked]
    negative = ratio * log_score[is_masked].gather(-1, x_0[is_masked][:, None])[:, 0]
    positive = log_score[is_masked][:, :-1].exp().sum(-1)
    entropy = torch.zeros(x_t.shape, dtype=log_score.dtype, device=log_score.device)
    entropy[is_masked] = positive - negative + ratio * (ratio.log() - 1)
    return entropy


def uniform_score_entropy(log_score: Tensor, sigma: Tensor, x_t: Tensor, x_0: Tensor) -> Tensor:
    num_states = log_score.shape[-1]
    e = expm1(sigma)[:, None].expand_as(x_t)
    # The published 1 - D / (e + D) gives logarithms of 0 in float32 at many vocabularies.
    ratio = e / (e + num_states)
    negative = log_score.mean(-1) - log_score.gather(-1, x_t[..., None])[..., 0] / num_states
    unmoved = x_t == x_0
    at_x_0 = log_score.gather(-1, x_0[..., None])[..., 0]
    negative = torch.where(unmoved, ratio * negative, at_x_0 / e + negative)
    constant = torch.where(
        unmoved,
        (num_states - 1) / num_states * ratio * (ratio.log() - 1),
        ((-ratio.log() - 1) / ratio - (num_states - 2)) / num_states,
    )
    score = log_score.exp()
    positive = score.mean(-1) - score.gather(-1, x_t[..., None])[..., 0] / num_states
    return positive - negative + constant


class PublishedStep:
    """Gradient clipping, AdamW and the moving average, after a backward pass."""

    def __init__(self, model: nn.Module, lr: float, decay: float = 0.9999, clip: float = 1.0) -> None:
        self.parameters, self.decay, self.clip, self.num_updates = list(model.parameters()), decay, clip, 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    def __call__(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        with torch.no_grad():
            for average, parameter in zip(self.averages, self.parameters, strict=True):
                average.sub_((1 - decay) * (average - parameter))
        self.optimizer.zero_grad()
