"""Philox and the dropout masks: the published vectors, the documented counter, and the statistics of the bits."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import PROPERTY, dropout_bits, philox_words
from hypothesis import given
from hypothesis import strategies as st

from gpu_mlp.ops import philox

WORD = st.integers(0, 2**32 - 1)


def words(counter, key):
    counter = tuple(np.array([c], np.uint64) for c in counter)
    return tuple(int(w[0]) for w in philox.philox(counter, key))


# The vectors "philox4x32 10" of kat_vectors, in the Random123 distribution of Salmon et al.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert words(counter, key) == expected
    assert philox_words(counter, key) == expected  # the reference that other tests compare with


@PROPERTY
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_any_counter_follows_integer_arithmetic(counter, key):
    assert words(counter, key) == philox_words(counter, key)


def test_counters_broadcast():
    c0, c1 = np.arange(3, dtype=np.uint64)[None, :], np.arange(5, dtype=np.uint64)[:, None]
    zero = np.zeros((1, 1), np.uint64)
    out = philox.philox((c0, c1, zero, zero), (1, 2))
    assert [w.shape for w in out] == [(5, 3)] * 4
    assert tuple(int(w[4, 2]) for w in out) == philox_words((2, 4, 0, 0), (1, 2))


@PROPERTY
@given(
    seed=st.integers(0, 2**64 - 1),
    layer=st.integers(0, 50),
    round_=st.integers(0, 2**40),
    first_row=st.integers(0, 2**31),
    shape=st.tuples(st.integers(0, 4), st.integers(1, 19)),
)
def test_bits_follow_the_documented_counter(seed, layer, round_, first_row, shape):
    bits = philox.bits(seed, layer, round_, first_row, shape)
    assert bits.dtype == np.uint16
    assert bits.shape == shape
    for i in range(shape[0]):
        np.testing.assert_array_equal(bits[i], dropout_bits(seed, layer, round_, first_row + i, shape[1]))


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 257])
@pytest.mark.parametrize("cut", [0, 1, 13, 40])
def test_bits_do_not_depend_on_how_rows_are_cut(columns, cut):
    whole = philox.bits(7, 1, 5, 100, (40, columns))
    parts = [philox.bits(7, 1, 5, 100, (cut, columns)), philox.bits(7, 1, 5, 100 + cut, (40 - cut, columns))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_bits_of_a_narrow_layer_are_the_first_columns_of_a_wide_one():
    np.testing.assert_array_equal(philox.bits(3, 0, 0, 0, (9, 5)), philox.bits(3, 0, 0, 0, (9, 200))[:, :5])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 6},
        {"seed": 5 + 2**32},  # the upper half of the seed counts as well
        {"layer": 3},
        {"round_": 10},
        {"round_": 9 + 2**32},  # and the upper half of the round
        {"first_row": 64},
    ],
)
def test_streams_differ(other):
    arguments = {"seed": 5, "layer": 2, "round_": 9, "first_row": 0, "shape": (64, 64)}
    a, b = philox.bits(**arguments), philox.bits(**{**arguments, **other})
    # two independent draws of 4096 16-bit numbers agree in 0.06 places on average; 5 is beyond one in a billion
    assert np.count_nonzero(a == b) <= 5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_rate_is_within_binomial_bounds(rate, seed):
    keep = philox.keep_threshold(rate) / philox.LEVELS
    kept = philox.bits(seed, 1, 3, 0, (512, 256)) < philox.keep_threshold(rate)
    n = kept.size
    assert abs(kept.sum() - n * keep) <= 5 * np.sqrt(n * keep * (1 - keep))
    for axis in (0, 1):  # and no row or column is favoured
        m = kept.shape[axis]
        assert (abs(kept.sum(axis=axis) - m * keep) <= 5 * np.sqrt(m * keep * (1 - keep)) + 1).all()


def test_bits_are_uniform_and_uncorrelated():
    bits = philox.bits(11, 0, 0, 0, (1024, 256))
    counts = np.bincount(bits.ravel() >> 8, minlength=256)
    expected = bits.size / 256
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - 255) <= 5 * np.sqrt(2 * 255)  # mean 255, variance 2 · 255
    u = bits / 65535 - 0.5
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[:, 8:], u[:, :-8])):
        assert abs((a * b).mean() * 12) <= 5 / np.sqrt(a.size)  # neighbours in a column, in a row, one call apart
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) <= 5 * 0.5 / np.sqrt(bits.size * 16)


@pytest.mark.parametrize(
    ("rate", "threshold"), [(0.5, 32768), (0.25, 49152), (0.75, 16384), (2**-16, 65535), (1 - 2**-16, 1)]
)
def test_keep_threshold_of_binary_fractions(rate, threshold):
    assert philox.keep_threshold(rate) == threshold


@pytest.mark.parametrize("rate", [1e-9, 0.1, 1 / 3, 0.9, 1 - 1e-12])
def test_keep_threshold_is_the_nearest_that_keeps_some_and_drops_some(rate):
    threshold = philox.keep_threshold(rate)
    assert isinstance(threshold, int)
    assert 1 <= threshold <= 65535
    assert abs(threshold - (1 - rate) * 65536) <= (0.5 if 1e-5 < rate < 1 - 1e-5 else 1)
    # of all 16-bit numbers exactly that many keep an entry, so that kept / keep has the expectation 1 with no error
    assert np.count_nonzero(np.arange(65536, dtype=np.uint16) < threshold) == threshold
