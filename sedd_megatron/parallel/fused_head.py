"""Final norm, vocabulary head and score entropy in one pass: no [rows, vocabulary] tensor is made, in any precision.

Score entropy is additive over the vocabulary and needs no normaliser, so that a tile of rows x states gives its share
of the loss and of every gradient as soon as its logits are there:

    hidden    = normalized(hidden_states[position]) * factor + shift
    tile      = exp(hidden @ weight^T + bias - log_offset + log(row weight * c_exp)) = row weight * c_exp * score
    loss     += sum(tile)
    d logits  = tile + row weight * c_log + row weight * c_target * [y = x_0],   0 at y = x_t
    d hidden += d logits @ weight;   d weight += d logits^T @ hidden;   d bias += sum of d logits over rows

and the tile is dropped before the next one is computed. The sum of log-scores is linear in the hidden states and needs
no tile at all. Backward has nothing left to do but to multiply by the incoming gradient, a scalar.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sedd_megatron.parallel.main_grad import add_product, mark_added_to_main_grad
from sedd_megatron.parallel.score_tile import SCORE_TILES, logit_at

# Elements of a tile. On a CPU it stays in the cache between its passes; on a GPU it has to fill the device.
TILE_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
MIN_TILE_COLUMNS = 128
# What the sizes of chunks and tiles are multiples of. A GPU's matrix units are slow at others: at odd ones by factors.
ROW_MULTIPLE = {"cpu": 1, "cuda": 256}
COLUMN_MULTIPLE = {"cpu": 1, "cuda": 256}


class ScoreEntropyRows(NamedTuple):
    """What the loss of each row that counts depends on, beside its logits; a row is one position of one sequence.

    Tensors are [R]. Weights are those of the whole loss (sigma_rate, the mean over sequences) times the graph's
    coefficients (diffusion/score_entropy.py), so that the loss is the sum over rows. Float32 in every precision.
    """

    num_rows: int  # rows from here on weigh nothing and only fill a chunk, whatever their position
    position: Tensor  # int64 into the flattened [S, B], different for all others
    x_0: Tensor  # int64
    x_t: Tensor | None  # int64; None if it is none of the states that count: every row is at the mask
    log_scale: Tensor  # log(weight of the sum of scores) - log_offset; -inf for a row that only fills a chunk
    log_sum: Tensor | None  # weight of the sum of log-scores; None where the graph has none
    target: Tensor  # weight of the log-score at x_0
    log_offset: Tensor  # what a log-score is less than its logit

    def part(self, part: slice) -> "ScoreEntropyRows":
        """Some rows in a run."""
        num_rows, *fields = self
        num_rows = min(max(num_rows - part.start, 0), part.stop - part.start)
        return ScoreEntropyRows(num_rows, *(None if field is None else field[part] for field in fields))


class FusedHeadSettings(NamedTuple):
    """What is the same for all batches of a run."""

    num_states: int  # states from here on do not count: padding, and the mask where every row is at it
    chunk_rows: int  # rows of a tile at most
    gradient_scale: float  # what backward will be called with


class HeadLoss(NamedTuple):
    """The loss, and for the log what the rows have told on the way; neither of these has a gradient."""

    loss: Tensor  # scalar float32 (float64 for float64 weights of rows), the same on every rank of the group
    of_sequences: Tensor  # [B] float64, the parts of it, the same on every rank
    largest_log_score: Tensor  # scalar, of this rank's columns; -inf where no row counts


class _FusedHeadScoreEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, factor, shift, weight, bias, rows, settings, eps, tp_group, with_gradient):
        dtype = rows.target.dtype
        norm = _ChunkedNorm(hidden_states, factor, shift, eps, dtype, with_gradient)
        head = _TiledHead(weight, bias, settings, tp_group.rank(), hidden_states.shape[1], dtype, with_gradient)
        for part in equal_parts(len(rows.position), settings.chunk_rows, ROW_MULTIPLE[weight.device.type]):
            _add_chunk(norm, head, rows.part(part))
        if tp_group.size() > 1:
            sums = torch.cat([head.loss[None], head.loss_of_sequences])
            torch.distributed.all_reduce(sums, group=tp_group)
            head.loss, head.loss_of_sequences = sums[0], sums[1:]
        if with_gradient:
            ctx.gradients = [*norm.gradients, *(() if head.in_main_grad else head.gradients)]
            # Not as saved tensors: Megatron hangs its marks on the parameters themselves.
            ctx.in_main_grad = (weight, bias) if head.in_main_grad else ()
            ctx.gradient_scale = settings.gradient_scale
        ctx.mark_non_differentiable(head.loss_of_sequences, head.largest)
        return head.loss.to(dtype), head.loss_of_sequences, head.largest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        if not ctx.in_main_grad:
            gradients = [gradient * grad_output for gradient in ctx.gradients]
            return *gradients, None, None, None, None, None
        # Checked on the device, so that the host does not wait for it.
        torch._assert_async(
            (grad_output - ctx.gradient_scale).abs() <= 1e-6 * ctx.gradient_scale,
            "the loss was scaled by something else than gradient_scale, with which main_grad has been filled",
        )
        for parameter in ctx.in_main_grad:
            mark_added_to_main_grad(parameter)
        # Taken and not copied: there can be no second backward pass, for which main_grad would have to be filled again.
        gradients, ctx.gradients = ctx.gradients, None
        gradients = [gradient.mul_(grad_output) for gradient in gradients]
        return *gradients, None, None, None, None, None, None, None


def fused_head_score_entropy(
    hidden_states: Tensor,
    factor: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: ScoreEntropyRows,
    settings: FusedHeadSettings,
    eps: float,
    tp_group: torch.distributed.ProcessGroup,
) -> HeadLoss:
    """Weighted score entropy summed over the rows, without the terms that do not depend on the model.

    Costs three matrix products, of rows that count only, and for memory one tile, a few [chunk_rows, H] and the
    gradient of the hidden states. Under tensor parallelism 1 + B numbers are summed over the ranks; the gradients with
    respect to the first three arguments are this shard's part, to be summed where these were copied to the ranks.

    Args:
        hidden_states: [S, B, H] floating, before the final norm; whole on every rank.
        factor, shift: [B, H] floating, what the normalized hidden states of each sequence are multiplied by, and what
            is added.
        weight, bias: [padded_vocab_size / TP, H] and [padded_vocab_size / TP], this rank's shard. Where they have
            Megatron's main_grad, gradient_scale times the gradient is added to it, in its precision, here and not in
            the backward pass, which then has to come with just that scale, or torch raises a RuntimeError.
        rows: in any order.
        eps: of the norm.
        tp_group: the ranks that hold the other columns.
    """
    return HeadLoss(
        *_FusedHeadScoreEntropy.apply(
            hidden_states, factor, shift, weight, bias, rows, settings, eps, tp_group, torch.is_grad_enabled()
        )
    )


def sum_by_sequence(values: Tensor, position: Tensor, num_sequences: int) -> Tensor:
    """[C, ...] -> [B, ...]: the sums over the rows of each sequence; position [C] is one into the flattened [S, B]."""
    sequences = torch.arange(num_sequences, device=position.device)
    # A product with ones and zeros: an index_add_ of many rows into few has no fixed order on a GPU.
    return (sequences[:, None] == position % num_sequences).to(values.dtype) @ values


def equal_parts(count: int, largest: int, multiple: int) -> list[slice]:
    """0 ... count in as few parts as sizes up to `largest` allow, all but the last of one size, a multiple of
    `multiple`.

    No part is a small rest, which would cost as much as a whole one where each has to fill the device.
    """
    largest = max(largest // multiple, 1) * multiple
    number = max(-(-count // largest), 1)
    size = max(-(-count // (number * multiple)), 1) * multiple
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _add_chunk(norm: "_ChunkedNorm", head: "_TiledHead", rows: ScoreEntropyRows) -> None:
    """One chunk through norm and head, and back; nothing of it is left when this returns."""
    hidden, kept = norm.forward(rows.position)
    grad_hidden, row_loss = head.add(hidden, rows)
    head.loss_of_sequences += sum_by_sequence(row_loss.double(), rows.position, norm.num_sequences)
    if grad_hidden is not None:
        norm.add_backward(grad_hidden, kept, rows.num_rows)


class _KeptOfNorm(NamedTuple):
    """What the norm's backward pass needs of a chunk of C rows."""

    position: Tensor
    chunk: Tensor  # [C, H], before the norm
    normalized: Tensor
    statistics: list[Tensor]
    factor: Tensor  # [C, H]


class _ChunkedNorm:
    """The final norm and its modulation on a chunk of rows, forward and at once backward.

    `gradients` are those of hidden states, factor and shift, or None.
    """

    def __init__(
        self, hidden_states: Tensor, factor: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, with_gradient: bool
    ) -> None:
        self.hidden_states, self.eps, self.dtype = hidden_states.flatten(0, 1), eps, dtype
        self.factor, self.shift = factor.to(dtype), shift.to(dtype)
        self.num_sequences = hidden_states.shape[1]
        self.gradients = None
        if with_gradient:
            # A row has one hidden state, but many rows share a factor and a shift: these are summed in float32.
            self.gradients = torch.zeros_like(hidden_states), *map(torch.zeros_like, (self.factor, self.shift))

    def forward(self, position: Tensor) -> tuple[Tensor, _KeptOfNorm]:
        """[C, H] in the hidden states' dtype, and what backward needs."""
        sequence = position % self.num_sequences
        chunk = self.hidden_states.index_select(0, position).to(self.dtype)
        normalized, *statistics = torch.native_layer_norm(chunk, chunk.shape[1:], None, None, self.eps)
        factor = self.factor.index_select(0, sequence)
        hidden = torch.addcmul(self.shift.index_select(0, sequence), normalized, factor)
        return hidden.to(self.hidden_states.dtype), _KeptOfNorm(position, chunk, normalized, statistics, factor)

    def add_backward(self, grad_hidden: Tensor, kept: _KeptOfNorm, num_rows: int) -> None:
        """Adds to the gradients from that of forward's answer, whose rows from num_rows on have none; overwrites what
        it is given.
        """
        grad_hidden_states, grad_factor, grad_shift = self.gradients
        grad_shift += sum_by_sequence(grad_hidden, kept.position, self.num_sequences)
        grad_factor += sum_by_sequence(kept.normalized.mul_(grad_hidden), kept.position, self.num_sequences)
        grad_chunk, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_hidden.mul_(kept.factor), kept.chunk, kept.chunk.shape[1:], *kept.statistics, None, None,
            [True, False, False],
        )  # fmt: skip
        flat = grad_hidden_states.flatten(0, 1)
        # Copied, since a position has one row: sums are atomic on a GPU, and slower.
        flat.index_copy_(0, kept.position[:num_rows], grad_chunk[:num_rows].to(flat.dtype))


class _TiledHead:
    """This rank's columns of the head, and what its tiles give: the loss, whole and of each sequence, the largest
    log-score, and `gradients` of weight and bias or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        settings: FusedHeadSettings,
        tp_rank: int,
        num_sequences: int,
        dtype: torch.dtype,
        with_gradient: bool,
    ) -> None:
        self.first_state = tp_rank * weight.shape[0]
        self.num_states = settings.num_states
        columns = min(max(settings.num_states - self.first_state, 0), weight.shape[0])
        self.weight, self.bias = weight[:columns], bias[:columns]
        # Tiles go on into the padding as far as their width likes.
        multiple = COLUMN_MULTIPLE[weight.device.type]
        columns = min(-(-columns // multiple) * multiple, weight.shape[0])
        self.tiled_weight, self.tiled_bias = weight[:columns], bias[:columns]
        self.weight_sum: tuple[Tensor, Tensor] | None = None
        self.loss = torch.zeros((), dtype=torch.float64, device=weight.device)
        self.loss_of_sequences = self.loss.new_zeros(num_sequences)
        self.largest = torch.full((), -torch.inf, dtype=dtype, device=weight.device)
        self.in_main_grad, self.gradients, self.scale = hasattr(weight, "main_grad"), None, 1.0
        if with_gradient and self.in_main_grad:
            self.gradients, self.scale = (weight.main_grad, bias.main_grad), settings.gradient_scale
        elif with_gradient:
            self.gradients = torch.zeros_like(weight, dtype=dtype), torch.zeros_like(bias, dtype=dtype)

    def add(self, hidden: Tensor, rows: ScoreEntropyRows) -> tuple[Tensor | None, Tensor]:
        """Adds one chunk [C, H]; returns the gradient of its hidden states in the rows' dtype, if wanted, and the loss
        of each row [C].
        """
        row_loss, largest = torch.zeros_like(rows.target), torch.zeros_like(rows.target)
        if len(self.weight) > 0:
            row_loss += self._linear_terms(hidden, rows)
            self.loss += row_loss.sum(dtype=torch.float64)
        grad_hidden = torch.zeros_like(hidden, dtype=rows.target.dtype) if self.gradients is not None else None
        device = hidden.device.type
        columns = max(TILE_ELEMENTS[device] // max(len(hidden), 1), MIN_TILE_COLUMNS)
        for part in equal_parts(len(self.tiled_weight), columns, COLUMN_MULTIPLE[device]):
            row_sums, tile_largest = self._add_tile(hidden, rows, part, grad_hidden)
            row_loss += row_sums
            largest = torch.maximum(largest, tile_largest)
        if rows.num_rows > 0:
            # A tile's numbers are scores times the row's weight.
            log_score = (largest.log() - rows.log_scale - rows.log_offset)[: rows.num_rows]
            self.largest = torch.maximum(self.largest, log_score.amax())
        return grad_hidden, row_loss

    def _add_tile(
        self, hidden: Tensor, rows: ScoreEntropyRows, part: slice, grad_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One tile, of which nothing but its rows' sums and largest numbers is left when this returns: two at once
        would double the memory.
        """
        weight, first_state = self.tiled_weight[part], self.first_state + part.start
        score_tile = SCORE_TILES[hidden.device.type]
        tile = score_tile(
            hidden, weight, self.tiled_bias[part], rows, first_state, self.num_states, grad_hidden is not None
        )
        self.loss += tile.score_sum
        if grad_hidden is None:
            return tile.row_sums, tile.row_largest
        grad_weight, grad_bias = (gradient[part] for gradient in self.gradients)
        grad_bias.add_(tile.grad_bias, alpha=self.scale)
        add_product(grad_hidden, tile.grad_logits, weight)
        add_product(grad_weight, tile.grad_logits.t(), hidden, self.scale)
        return tile.row_sums, tile.row_largest

    def _linear_terms(self, hidden: Tensor, rows: ScoreEntropyRows) -> Tensor:
        """c_target * a + c_log * L of the shard's states [C], but for what log_offset adds to them."""
        terms = rows.target * logit_at(rows.x_0 - self.first_state, hidden, self.weight, self.bias)
        if rows.log_sum is not None:
            if self.weight_sum is None:
                self.weight_sum = self.weight.sum(0, dtype=terms.dtype), self.bias.sum(dtype=terms.dtype)
            log_sum = hidden.to(terms.dtype) @ self.weight_sum[0] + self.weight_sum[1]
            log_sum -= logit_at(rows.x_t - self.first_state, hidden, self.weight, self.bias)
            terms += rows.log_sum * log_sum
        return terms
