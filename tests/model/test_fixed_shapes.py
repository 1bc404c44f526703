"""Calls of full shapes give what calls of the shapes themselves give; and what only a GPU can do, none is asked for."""

from functools import partial

import torch

from sedd_megatron.model.fixed_shapes import FixedShapes, filled_up


def rows_of_means(x_t: torch.Tensor, sigma: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows [Q, B, 2] that depend on all of their own sequence, and on no other."""
    states = x_t.double() + x_t.double().cumsum(1).square() * sigma[:, None]
    rows = states.t().gather(0, table)
    return torch.stack([rows, rows - states.sum(1)], dim=-1)


def test_numbers_are_filled_up_to_powers_of_two():
    assert [filled_up(number) for number in (1, 2, 3, 4, 5, 8, 9, 1000)] == [1, 2, 4, 4, 8, 8, 16, 1024]


def test_full_shapes_change_no_row_and_are_few():
    generator = torch.Generator().manual_seed(0)
    made: list[tuple] = []

    def make_call(function, inputs):
        made.append(inputs)
        return partial(function, *inputs)

    fixed = FixedShapes(rows_of_means, make_call)
    for _ in range(300):
        batch, num_rows = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(2))
        length = (9, 12)[int(torch.randint(2, (), generator=generator))]
        num_rows = min(num_rows, length)
        x_t = torch.randint(0, 50, (batch, length), generator=generator)
        sigma = torch.rand(batch, generator=generator)
        table = torch.randint(0, length, (num_rows, batch), generator=generator)
        rows = fixed(x_t, sigma, table)
        assert torch.equal(rows, rows_of_means(x_t, sigma, table))
    shapes = {(len(x_t), x_t.shape[1], len(table)) for x_t, _, table in made}
    assert len(made) == len(shapes) == len(fixed.calls) <= 2 * 5 * 5
    # A table has never more rows than there are positions.
    assert {shape[2] for shape in shapes if shape[1] == 9} == {1, 2, 4, 8, 9}
    assert {shape[2] for shape in shapes if shape[1] == 12} == {1, 2, 4, 8, 12}
