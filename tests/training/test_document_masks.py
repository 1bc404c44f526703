"""Documents that share a window and do not see each other: what each gives is what it gives alone."""

import numpy as np
import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.data.document_ends import document_ends, position_ids
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import groups_of_this_process
from tests.distributed.layouts import FULL_BLOCK, FULL_UNIFORM, MODEL, SELECTIVE

EOD = 2
LENGTHS = (5, 1, 7, 3)  # of the first window's documents; the second window is one document
RECOMPUTE = {"no-recompute": [], "uniform": FULL_UNIFORM, "block": FULL_BLOCK, "selective": SELECTIVE}


def network(*flags: str):
    """The tests' network in training mode, with no parameter at its start of zero."""
    cpu_backend.install()
    from sedd_megatron.diffusion import AbsorbingGraph
    from sedd_megatron.training.build import build_model

    options = parse_pretrain_options(["--data-path", "x", *MODEL, "--hidden-dropout", "0", *flags])
    (model,) = build_model(options.model, options.parallel, options.precision, options.recompute, AbsorbingGraph(20),
                           groups_of_this_process(options.parallel))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 [2, 16] and a corrupted x_t, in which ends of documents are hidden."""
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(EOD + 1, 20, (2, 16), generator=generator)
    x_0[0, np.cumsum(LENGTHS)[:-1] - 1] = EOD
    return x_0, torch.where(torch.rand(x_0.shape, generator=generator) < 0.5, 20, x_0)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_documents_give_what_each_gives_alone(recompute):
    model, (x_0, x_t) = network(*RECOMPUTE[recompute]), windows()
    sigma, ends = torch.tensor([0.3, 1.7]), document_ends(x_0, EOD)
    assert ends.tolist() == [5, 6, 13, 16, 32]
    logits = model(x_t, sigma, document_ends=ends, position_ids=position_ids(ends, 2))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()
    together = gradients(model)
    model.zero_grad()
    pieces = [
        (0, slice(start, start + length)) for start, length in zip(np.cumsum((0, *LENGTHS)), LENGTHS, strict=False)
    ]
    for row, piece in [*pieces, (1, slice(0, 16))]:
        alone = model(x_t[row : row + 1, piece], sigma[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1, piece], alone, rtol=2e-5, atol=2e-5)
        (alone * weight[row : row + 1, piece]).sum().backward()
    for name, alone in gradients(model).items():
        torch.testing.assert_close(together[name], alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item(), msg=name)


def test_each_flag_does_its_own():
    model, (x_0, x_t) = network(), windows()
    sigma, ends = torch.tensor([0.3, 1.7]), document_ends(x_0, EOD)
    plain = model(x_t, sigma)
    # A window of one document is what it was, and the others are not.
    masked, restarted = model(x_t, sigma, document_ends=ends), model(x_t, sigma, position_ids=position_ids(ends, 2))
    for changed in (masked, restarted):
        torch.testing.assert_close(changed[1], plain[1], rtol=2e-5, atol=2e-5)
        assert not torch.allclose(changed[0], plain[0], rtol=1e-2, atol=1e-2)
    # What another document says is not seen through the mask, and is where positions alone begin anew.
    other = x_t.clone()
    other[0, :5] = 7
    assert torch.equal(model(other, sigma, document_ends=ends)[0, 5:], masked[0, 5:])
    moved = model(other, sigma, position_ids=position_ids(ends, 2))
    assert not torch.allclose(moved[0, 5:], restarted[0, 5:], rtol=1e-3, atol=1e-3)
    # Rotary angles are relative: within one document nothing changes by where it begins.
    both = model(x_t, sigma, document_ends=ends, position_ids=position_ids(ends, 2))
    torch.testing.assert_close(both, masked, rtol=1e-4, atol=1e-4)


def test_what_transformer_engine_is_given_says_the_same():
    cpu_backend.install()
    from sedd_megatron.model.packed_documents import PackedDocuments, attend_within_documents

    model, (x_0, _) = network(), windows()
    layer = model.decoder.layers[0].self_attention
    documents = PackedDocuments.of(document_ends(x_0, EOD), 2, 0, 16, torch.device("cpu"))
    states = torch.randn(3, 16, 2, 4, 8, generator=torch.Generator().manual_seed(5))

    def by_cumulative_lengths(query, key, value, attention_mask, packed_seq_params, attn_mask_type):
        # As transformer_engine.pytorch.DotProductAttention reads qkv_format "thd".
        assert packed_seq_params.qkv_format == "thd"
        assert packed_seq_params.cu_seqlens_q.dtype == packed_seq_params.cu_seqlens_kv.dtype == torch.int32
        q, k = (getattr(packed_seq_params, f"cu_seqlens_{name}").tolist() for name in ("q", "kv"))
        output = []
        for i in range(len(q) - 1):
            rows, keys = slice(q[i], q[i + 1]), slice(k[i], k[i + 1])
            assert rows.stop - rows.start <= packed_seq_params.max_seqlen_q
            assert keys.stop - keys.start <= packed_seq_params.max_seqlen_kv
            weights = torch.einsum("qhd,khd->hqk", query[rows], key[keys]).div(8**0.5).softmax(-1)
            output.append(torch.einsum("hqk,khd->qhd", weights, value[keys]))
        return torch.cat(output).flatten(1)

    found = [attend_within_documents(core, *states, documents, layer.pg_collection.cp, attn_mask_type=None)
             for core in (by_cumulative_lengths, layer.core_attention)]  # fmt: skip
    assert found[0].shape == (16, 2, 32)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_parts_of_documents_by_brute_force():
    cpu_backend.install()
    from sedd_megatron.model.packed_documents import PackedDocuments

    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        x_0 = torch.randint(0, 6, (3, 12), generator=generator)
        ends, size = document_ends(x_0, EOD), int(torch.randint(1, 5, (1,), generator=generator))
        # Whose document each position is, counted one by one.
        number = torch.zeros_like(x_0)
        for row in range(3):
            for column in range(1, 12):
                number[row, column] = number[row, column - 1] + int(x_0[row, column - 1] == EOD)
        starts = [[int((number[row] == number[row, column]).nonzero()[0]) for column in range(12)] for row in range(3)]
        assert position_ids(ends, 3).tolist() == (torch.arange(12) - torch.tensor(starts)).tolist()
        length = 12 // size
        for rank in range(size):
            parts = PackedDocuments.of(ends, 3, rank * length, length, torch.device("cpu"))
            expected, keys = [], []
            for row in range(3):
                own = number[row, rank * length : (rank + 1) * length].tolist()
                seen = sorted(set(own))
                expected += [(own.count(document), int((number[row] == document).sum())) for document in seen]
                inside = [column for column in range(12) if number[row, column] in seen]
                keys.append((inside[0], inside[-1] + 1))
            assert list(zip(parts.query_lengths, parts.key_lengths, strict=True)) == expected
            assert list(parts.key_ranges) == keys
            assert parts.cu_seqlens_q.tolist() == [0, *np.cumsum(parts.query_lengths)]
            assert parts.cu_seqlens_kv.tolist() == [0, *np.cumsum(parts.key_lengths)]
