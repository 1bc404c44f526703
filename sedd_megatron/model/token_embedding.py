"""Megatron's vocabulary-parallel embedding, with a gradient that costs what was read and not what there is."""

from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from sedd_megatron.parallel.main_grad import embedding_into_main_grad


class TokenEmbedding(VocabParallelEmbedding):
    """VocabParallelEmbedding; on a CPU, where the weight has Megatron's main_grad, without a dense gradient."""

    def forward(self, x_t: Tensor) -> Tensor:
        """x_t [B, S] int64 -> [B, S, H]; [S / TP, B, H] where the sequence is parallel."""
        if self.weight.device.type != "cpu" or not hasattr(self.weight, "main_grad"):
            return super().forward(x_t)
        row = x_t - self.vocab_start_index
        is_elsewhere = (row < 0) | (row >= len(self.weight))
        embedded = embedding_into_main_grad(row.masked_fill(is_elsewhere, 0), self.weight)
        if self.tp_group.size() > 1:
            embedded = embedded.masked_fill(is_elsewhere[..., None], 0)
        if self.reduce_scatter_embeddings:
            return reduce_scatter_to_sequence_parallel_region(
                embedded.transpose(0, 1).contiguous(), group=self.tp_group
            )
        return reduce_from_tensor_model_parallel_region(embedded, group=self.tp_group)
