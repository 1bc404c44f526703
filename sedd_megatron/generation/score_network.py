"""The trained network as samplers read it: scores of the positions that are asked for, in any layout."""

from functools import partial

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from sedd_megatron.diffusion.score_reader import ChunkLaw, Scores
from sedd_megatron.model.score_head import log_score_offset
from sedd_megatron.model.sedd_model import SEDDModel
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.parallel.vocab_parallel import add_over_shards, gather_columns

# Scores that are there at once, and what a number of rows is a multiple of, which matrix units like.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}
CHUNK_ROWS = 64


class ScoreNetwork:
    """A ScoreFn (diffusion/score_reader.py) on this rank's part of the network.

    Every rank of a replica calls it with the same arguments and gets the same states. Hidden states go from stage to
    stage; the last stage draws, and tells the others a number per position.
    """

    def __init__(self, model: SEDDModel, groups: ParallelGroups) -> None:
        self.model, self.groups = model, groups
        self.stages = P2PCommunicator(groups.collection.pp, model.config)
        self.chunk_rows, columns = 0, 0
        if model.post_process:
            columns = model.head.linear.weight.shape[0]
            rows = CHUNK_ELEMENTS[groups.device.type] // columns
            self.chunk_rows = max(rows - rows % CHUNK_ROWS, CHUNK_ROWS)
        self.tile = torch.empty(self.chunk_rows * columns, dtype=torch.float32, device=groups.device)

    def __call__(self, x_t: Tensor, sigma: Tensor, index: Tensor, law: ChunkLaw) -> Tensor:
        """New states [R] int64 of the positions index [R] into the flattened x_t [B, S], at noise sigma [B] float32."""
        shape = (x_t.shape[1], x_t.shape[0], self.model.config.hidden_size)
        self.model.set_input_tensor(self.stages.recv_forward(shape, self.model.pre_process))
        states = torch.empty_like(index)
        if self.model.post_process:
            self._draw(states, x_t, sigma, index, law)
        else:
            self.stages.send_forward(self.model.trunk(x_t, sigma)[0], is_last_stage=False)
        return self._from_last_stage(states)

    def _draw(self, states: Tensor, x_t: Tensor, sigma: Tensor, index: Tensor, law: ChunkLaw) -> None:
        model, sequence = self.model, index // x_t.shape[1]
        rows, conditioning = model.rows(x_t, sigma, index)
        rows = model.head.modulated_rows(rows, conditioning, sequence)
        log_offset, own = log_score_offset(model.graph, sigma)[sequence], x_t.flatten()[index]
        for start in range(0, len(index), self.chunk_rows):
            part = slice(start, start + self.chunk_rows)
            values = model.head.scores(rows[part], log_offset[part], own[part], model.graph.num_tokens, self.tile)
            states[part] = law(self._scores(values), part)

    def _scores(self, values: Tensor) -> Scores:
        tp_group, shard_columns = self.model.tp_group, self.model.head.linear.weight.shape[0]
        return Scores(
            values,
            partial(add_over_shards, tp_group=tp_group),
            partial(
                gather_columns,
                shard_columns=shard_columns,
                num_columns=self.model.graph.num_tokens,
                tp_group=tp_group,
            ),
        )

    def _from_last_stage(self, states: Tensor) -> Tensor:
        pp_group = self.groups.collection.pp
        if pp_group.size() > 1:
            source = torch.distributed.get_global_rank(pp_group, pp_group.size() - 1)
            torch.distributed.broadcast(states, source, group=pp_group)
        return states
