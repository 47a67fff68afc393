"""Many adapters' changes of one linear's rows, as one computation, against row by row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from weft.ops.grouped import RowForm, choose_factors, grouped_change, grouped_change_ref, row_table, stack_factors

# A sum of up to 40 products of numbers near 1, and what one rounding of the dtype makes of it.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 0.3}


def forms(generator: torch.Generator, inputs: int, outputs: int) -> list[RowForm | None]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        None,
        RowForm(a=drawn(3, inputs), b=drawn(outputs, 3)),
        RowForm(bias=drawn(outputs)),
        RowForm(scale=drawn(outputs)),
        RowForm(a=drawn(1, inputs), b=drawn(outputs, 1)),
        RowForm(),
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (1, 1), (16, 40)])
def test_grouped_equals_ref(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    some = forms(generator, inputs, outputs)
    for chosen in (range(6), [1], [2, 3], [0], [4, 1, 5]):
        found = [some[i] for i in chosen]
        counts = torch.randint(1, 4, (len(found),), generator=generator)
        owners = torch.arange(len(found)).repeat_interleave(counts)
        x, y = (torch.randn(len(owners), d, generator=generator).to(dtype) for d in (inputs, outputs))
        factors = stack_factors(found, inputs, dtype)
        scale = row_table([None if form is None else form.scale for form in found], owners, 1.0, dtype)
        choices = None if factors is None else choose_factors(factors, owners)
        fast = grouped_change(x, y.clone(), factors, choices, scale)
        ref = grouped_change_ref(x, y, found, owners)
        torch.testing.assert_close(fast, ref, rtol=0, atol=TOLERANCE[dtype])
        apart = grouped_change(x, y.clone(), None, None, scale)
        for index, form in enumerate(found):
            rows = (owners == index).nonzero()[:, 0]
            if form is not None:
                form.cast(dtype).add_to(apart[rows[0] : rows[-1] + 1], x[rows])
        torch.testing.assert_close(apart, ref, rtol=0, atol=TOLERANCE[dtype])


def test_a_broken_neighbour_reaches_no_other_row() -> None:
    """An adapter whose first factor overflows makes its own rows infinite, and no others."""
    some: list[RowForm | None] = [
        RowForm(a=torch.full((2, 4), 3e38), b=torch.ones(3, 2)),
        RowForm(a=torch.ones(1, 4), b=torch.ones(3, 1)),
    ]
    owners = torch.tensor([0, 1])
    factors = stack_factors(some, 4, torch.float32)
    assert factors is not None
    x, y = torch.full((2, 4), 10.0), torch.zeros(2, 3)
    found = grouped_change(x, y, factors, choose_factors(factors, owners))
    assert not found[0].isfinite().any()
    assert found[1].tolist() == [40.0, 40.0, 40.0]


def test_the_number_of_rows_is_that_of_the_owners() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in itertools.islice((1, 2, 5), 3):
        table = row_table([torch.ones(3), None], torch.randint(0, 2, (count,), generator=generator), 0.0, torch.float32)
        assert table is not None
        assert table.shape == (count, 3)
