"""The score network: one pipeline stage, or one of a rank's interleaved stages, of embedding | DiT layers | head."""

import dataclasses
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from sedd_megatron.config import ModelOptions
from sedd_megatron.diffusion.graph import AbsorbingGraph, UniformGraph
from sedd_megatron.model.conditioning import SigmaEmbedding
from sedd_megatron.model.model_config import start_at_zero
from sedd_megatron.model.packed_documents import PackedDocuments
from sedd_megatron.model.score_head import ScoreHead, log_score_offset
from sedd_megatron.model.token_embedding import TokenEmbedding
from sedd_megatron.parallel.fused_head import FusedHeadSettings, HeadLoss, ScoreEntropyRows
from sedd_megatron.parallel.groups import ParallelGroups
from sedd_megatron.parallel.vocab_parallel import gather_log_score


class SEDDModel(MegatronModule):
    """This rank's part of the score network of arXiv 2310.16834.

    Every stage embeds sigma for itself; hidden states travel between stages as [S, B, H].
    """

    def __init__(
        self,
        config: TransformerConfig,
        options: ModelOptions,
        graph: AbsorbingGraph | UniformGraph,
        layer_spec: ModuleSpec,
        groups: ParallelGroups,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        # Read by Megatron's pipeline schedules.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        num_chunks = config.virtual_pipeline_model_parallel_size or 1
        # Stages run through the ranks chunk by chunk: 0 is the first of all, num_stages - 1 the last.
        self.vp_stage, self.stage = vp_stage, (vp_stage or 0) * groups.pipeline_size + groups.pipeline_rank
        self.pre_process = self.stage == 0
        self.post_process = self.stage == num_chunks * groups.pipeline_size - 1
        self.graph = graph
        self.pg_collection = groups.collection
        self.tp_group = groups.collection.tp
        vocab_size = options.padded_vocab_size(graph.num_states)
        # Modules are registered in the order of their use, in which the distributed optimizer gathers their parameters.
        self.sigma_embedding = SigmaEmbedding(options.cond_dim, config, groups.device, is_first_stage=self.pre_process)
        if self.pre_process:
            self.embedding = TokenEmbedding(
                vocab_size,
                options.hidden_size,
                init_method=start_at_zero,
                reduce_scatter_embeddings=config.sequence_parallel,
                config=config,
                tp_group=self.tp_group,
            )
        self.rotary_embedding = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=groups.collection.cp,
        )
        self.decoder = TransformerBlock(
            config,
            layer_spec,
            post_layer_norm=False,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        if self.post_process:
            self.head = ScoreHead(config, options.cond_dim, vocab_size, groups.device, self.tp_group)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor | None) -> None:
        """Take the previous stage's hidden states [S, B, H] (Megatron's pipeline schedules call this)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor,
        rows: ScoreEntropyRows | None = None,
        settings: FusedHeadSettings | None = None,
        dropout_keys: Tensor | None = None,
        document_ends: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor | HeadLoss:
        """One stage: x_t [B, S / CP] int64, this context-parallel rank's part of the sequence; sigma [B] float32.

        Training with dropout needs the keys of its draws [B, 2] int64 (parallel/keyed_dropout.py). Attention stays
        within the documents that end at document_ends [D] int64, on the host (data/document_ends.py); position_ids
        [B, S / CP] int64 are what rotates, if they are not those of the window.

        Returns:
            Hidden states [S / CP, B, H] (over TP as well under sequence parallelism). On the last stage the loss of
            `rows`; or without them logits [B, S / CP, padded_vocab_size / TP] in the parameters' dtype.
        """
        hidden_states, conditioning = self.trunk(x_t, sigma, dropout_keys, document_ends, position_ids)
        if not self.post_process:
            return hidden_states
        if rows is None:
            return self.head(hidden_states, conditioning)
        return self.head.loss(hidden_states, conditioning, rows, settings)

    def trunk(
        self,
        x_t: Tensor,
        sigma: Tensor,
        dropout_keys: Tensor | None = None,
        document_ends: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """This stage without the head: hidden states [S / CP, B, H], and the conditioning [B, cond_dim]."""
        conditioning, documents, (batch_size, length) = self.sigma_embedding(sigma), None, x_t.shape
        if document_ends is not None:
            first = self.pg_collection.cp.rank() * length
            documents = PackedDocuments.of(document_ends, batch_size, first, length, x_t.device)
        hidden_states = self.decoder(
            hidden_states=self._embed(x_t) if self.pre_process else None,
            attention_mask=None,
            context=conditioning,
            # The argument that our layers have no other use for, and that activation recompute keeps for them.
            context_mask=dropout_keys,
            rotary_pos_emb=self._rotation(length, position_ids),
            packed_seq_params=documents,
        )
        return hidden_states, conditioning

    def rows(self, x_t: Tensor, sigma: Tensor, table: Tensor) -> Tensor:
        """What the last stage's head multiplies at the positions table [Q, B] int64 of each sequence, in sampling.

        Returns:
            [Q, B, H], after the final norm, from a last layer that computes no other positions.
        """
        conditioning, rotation = self.sigma_embedding(sigma), self._rotation(x_t.shape[1])
        hidden_states = self._embed(x_t) if self.pre_process else self.decoder.input_tensor
        *layers, last = self.decoder.layers
        # Without Megatron's block around them: it adds activation recompute and FP8, which sampling does not have.
        for layer in layers:
            hidden_states, _ = layer(hidden_states, context=conditioning, rotary_pos_emb=rotation)
        rows = last.forward_rows(hidden_states, table, conditioning, rotation)
        return self.head.normalized(rows, conditioning)

    def _embed(self, x_t: Tensor) -> Tensor:
        embedded = self.embedding(x_t)
        # Where it scatters the sequence over the tensor-parallel ranks, Megatron's embedding has transposed already.
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def _rotation(self, length: int, position_ids: Tensor | None = None) -> Tensor:
        """[2, length, 1, 1, head size]: cosines and sines of the angles of this rank's contiguous part.

        With position_ids [B, length] those of each sequence: [2, length, B, 1, head size].

        RotaryEmbedding's own forward would cut the zig-zag parts that balance a causal mask.
        """
        first = self.pg_collection.cp.rank() * length
        angles = self.rotary_embedding.get_emb(self.pg_collection.cp.size() * length)
        angles = angles[first : first + length] if position_ids is None else angles[position_ids.t(), 0]
        return torch.stack([angles.cos(), angles.sin()]).to(self.config.params_dtype)

    def log_score(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Whole log-scores [B, S, num_states] float32, 0 at x_t; for a model that is one pipeline stage."""
        log_offset = log_score_offset(self.graph, sigma.float())[:, None].expand_as(x_t)
        return gather_log_score(self.forward(x_t, sigma), log_offset, x_t, self.graph.num_states, self.tp_group)

    def sharded_tensors(self) -> dict[str, ShardedTensor]:
        """This rank's part of each parameter, by its local name; Megatron's extra state is left out."""
        return {name: value for name, value in self.sharded_state_dict().items() if isinstance(value, ShardedTensor)}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Megatron's description of this rank's shards; the stages' copies of the sigma embedding count as replicas."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, tensor in sharded.items():
            if name.startswith(f"{prefix}sigma_embedding."):
                # Without the stage in the replica id, two ranks would write one tensor.
                replica_id = (self.stage, *tensor.replica_id[1:])
                sharded[name] = dataclasses.replace(tensor, replica_id=replica_id)
        return sharded
