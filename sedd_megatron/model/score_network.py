"""The trained network as samplers read it: scores of the positions that are asked for, in any layout."""

from functools import partial

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from sedd_megatron.diffusion.score_reader import Asked, ChunkLaw, Scores, answers
from sedd_megatron.model.fixed_shapes import CapturedCall, FixedShapes
from sedd_megatron.model.score_head import log_score_offset
from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.parallel.vocab_parallel import add_over_shards, gather_columns

# Scores that are there at once, and what a number of rows is a multiple of, which matrix units like.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
CHUNK_ROWS = 64


class ScoreNetwork:
    """A ScoreFn (diffusion/score_reader.py) on this rank's part of the network.

    Every rank of a replica calls it with the same arguments and gets the same numbers. Hidden states go from stage to
    stage; the last stage asks the law, and tells the others its number for each position.
    """

    def __init__(self, model: SEDDModel, groups: ParallelGroups) -> None:
        self.model, self.groups = model, groups
        self.stages = P2PCommunicator(groups.collection.pp, model.config)
        self.rows, self.chunk_rows, columns = model.rows, 0, 0
        if model.post_process:
            columns = model.head.linear.weight.shape[0]
            rows = CHUNK_ELEMENTS[groups.device.type] // columns
            self.chunk_rows = max(rows - rows % CHUNK_ROWS, CHUNK_ROWS)
        self.tile = torch.empty(self.chunk_rows * columns, dtype=torch.float32, device=groups.device)

    def capture(self) -> None:
        """Replay the kernels of each shape from here on instead of launching them one by one (fixed_shapes.py)."""
        self.rows = FixedShapes(self.model.rows, partial(CapturedCall.of, pool=torch.cuda.graph_pool_handle()))

    @torch.no_grad()
    def __call__(
        self,
        x_t: Tensor,
        sigma: Tensor,
        asked: Asked,
        law: ChunkLaw,
        again: ChunkLaw | None = None,
        dtype: torch.dtype = torch.long,
    ) -> Tensor:
        """What the laws give, [R] of the dtype, for the asked positions of x_t [B, S]."""
        rows = self._asked_rows(x_t, sigma, asked)
        given = torch.empty(len(asked.index), dtype=dtype, device=x_t.device)
        if rows is not None:
            log_offset, own = log_score_offset(self.model.graph, sigma)[asked.sequence], x_t.flatten()[asked.index]

            def scores_of(part: slice | Tensor) -> Scores:
                return self._scores(rows[part], log_offset[part], own[part])

            answers(scores_of, given, self.chunk_rows, law, again)
        return self._from_last_stage(given)

    def _asked_rows(self, x_t: Tensor, sigma: Tensor, asked: Asked) -> Tensor | None:
        """What the head multiplies at the asked positions, [R, H]; None on ranks without the head."""
        shape = (x_t.shape[1], x_t.shape[0], self.model.config.hidden_size)
        self.model.set_input_tensor(self.stages.recv_forward(shape, self.model.pre_process))
        if self.model.post_process:
            return self.rows(x_t, sigma, asked.table)[asked.row, asked.sequence]
        self.stages.send_forward(self.model.trunk(x_t, sigma)[0], is_last_stage=False)
        return None

    def _scores(self, rows: Tensor, log_offset: Tensor, own: Tensor) -> Scores:
        head, num_tokens = self.model.head, self.model.graph.num_tokens
        tp_group, shard_columns = self.model.tp_group, head.linear.weight.shape[0]

        def log_score_at(tokens: Tensor) -> Tensor:
            log_score = add_over_shards(head.logits_at(rows, tokens, num_tokens).double(), tp_group) - log_offset
            return torch.where(tokens == own, 0.0, log_score)

        def log_score_sum() -> Tensor:
            sums = add_over_shards(head.logit_sums(rows, num_tokens).double(), tp_group) - num_tokens * log_offset
            own_logits = add_over_shards(head.logits_at(rows, own, num_tokens).double(), tp_group)
            return sums - torch.where(own < num_tokens, own_logits - log_offset, 0.0)

        return Scores(
            head.scores(rows, log_offset, own, num_tokens, self.tile),
            partial(add_over_shards, tp_group=tp_group),
            partial(
                gather_columns,
                shard_columns=shard_columns,
                num_columns=num_tokens,
                tp_group=tp_group,
            ),
            log_score_at,
            log_score_sum,
        )

    def _from_last_stage(self, given: Tensor) -> Tensor:
        pp_group = self.groups.collection.pp
        if pp_group.size() > 1:
            source = torch.distributed.get_global_rank(pp_group, pp_group.size() - 1)
            torch.distributed.broadcast(given, source, group=pp_group)
        return given
