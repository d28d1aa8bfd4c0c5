"""Launch geometry: what CUDA accepts, and a thread for every row, column and number, up to more than 2³¹ of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpu_mlp import SGD
from gpu_mlp.ops import launch

HUGE = 2**31 + 1
COUNTS = (0, 1, 31, 32, 257, 1025, 65535 * 8 + 1, 2**31 - 1, HUGE, 2**34 + 3)
LARGEST_GRID = (2**31 - 1, 65535)


@pytest.fixture(params=[1, 3, 132], ids="{} processors".format)
def processors(request, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda: request.param)
    return request.param


def assert_launchable(grid, block, work):
    """Grid and block within CUDA's limits; a grid without blocks, which is never launched, where there is no work."""
    assert block[0] * block[1] == launch.THREADS
    assert all(n <= limit for n, limit in zip(grid, LARGEST_GRID))
    assert (min(grid) == 0) == (work == 0)


@pytest.mark.parametrize("vec", [1, 2, 8])
def test_tile_has_a_thread_for_every_column_and_strides_over_the_rows(processors, vec):
    for rows, columns in itertools.product(COUNTS, COUNTS):
        grid, block = launch.tile(rows, columns, vec)
        assert_launchable(grid, block, rows * columns)
        assert grid[0] * block[0] * vec >= columns, "no loop over the columns"
        assert block[0] % launch.WARP == 0
        assert grid[1] <= -(-rows // block[1]), "no block without a row"


def test_tile_fills_the_device_and_no_more(processors):
    for rows, columns in itertools.product(COUNTS[3:], (31, 257, 4096)):
        grid, block = launch.tile(rows, columns, 1)
        wanted = processors * launch.BLOCKS_PER_PROCESSOR
        assert grid[0] * grid[1] <= max(wanted, grid[0])
        assert grid[1] == -(-rows // block[1]) or grid[1] == max(1, wanted // grid[0])


def test_by_row_gives_a_warp_or_a_block_to_a_row(processors):
    for rows, columns in itertools.product(COUNTS, COUNTS[1:]):
        grid, block = launch.by_row(rows, columns)
        assert_launchable(grid, block, rows)
        assert block[0] == (launch.THREADS if columns > launch.WIDE_ROW else launch.WARP)
        assert grid[0] == min(-(-rows // block[1]), processors * launch.BLOCKS_PER_PROCESSOR)


@pytest.mark.parametrize("vec", [1, 4])
def test_flat_and_by_column(processors, vec):
    for count in COUNTS:
        grid, block = launch.flat(count, vec)
        assert_launchable(grid, block, count)
        assert grid[0] == min(-(-count // (block[0] * vec)), processors * launch.BLOCKS_PER_PROCESSOR)
        grid, block = launch.by_column(count)
        assert_launchable(grid, block, count)
        assert grid[0] * block[0] >= count
        assert block[0] * block[1] == launch.THREADS


class View:
    """What `vector_length` looks at."""

    def __init__(self, dtype, address):
        self.dtype, self.data = np.dtype(dtype), self
        self.ptr = address


@pytest.mark.parametrize(
    ("columns", "views", "expected"),
    [
        (24, [("float32", 512)], 4),
        (24, [("float16", 512)], 8),
        (24, [("float64", 512)], 2),
        (24, [("uint8", 512)], 1),  # 24 columns are no whole packs of 16
        (32, [("uint8", 512)], 16),
        (23, [("float64", 512)], 1),
        (24, [("float32", 516)], 1),
        (24, [("float32", 528)], 4),
        (24, [("float16", 514)], 1),
        (24, [("uint8", 512), ("float32", 512)], 4),  # the widest type decides
        (24, [("uint8", 516), ("float32", 512)], 4),  # and four bytes are all that is then loaded at once
        (24, [("uint8", 518), ("float32", 512)], 1),
        (0, [("float32", 0)], 4),
    ],
)
def test_vector_length(columns, views, expected):
    assert launch.vector_length(columns, None, *(View(*view) for view in views)) == expected


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16])
def test_hyperparameters_of_numpys_types_are_the_numbers_they_are(number):
    given = {"weight_decay": 0.25, "momentum": 0.5, "dampening": 0.125}
    found = launch.rule_macros(SGD(**{name: number(value) for name, value in given.items()}))
    assert found == launch.rule_macros(SGD(**given))
    assert {name: float(text) for name, text in found if name.lower() in given} == {
        name.upper(): value for name, value in given.items()
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "1"),
        (np.False_, "0"),
        (2, "2"),
        (0.5, "0.5"),
        (np.float32(0.5), "0.5"),
        (np.int64(3), "3.0"),
        (1e-8, "1e-08"),
    ],
)
def test_literal(value, expected):
    assert launch.literal(value) == expected


def test_a_grid_without_blocks_launches_nothing():
    def never(*_):
        raise AssertionError("launched")

    for grid in ((0, 1), (1, 0), (0, 0)):
        launch.launch(never, (grid, (32, 8)), ())


def test_none_becomes_a_null_pointer():
    found = []
    launch.launch(lambda *given: found.append(given), ((2, 1), (32, 8)), (None, np.int64(3)))
    grid, block, (pointer, number) = found[0]
    assert (grid, block) == ((2, 1), (32, 8))
    assert (pointer, pointer.dtype) == (0, np.uint64)
    assert number == 3
