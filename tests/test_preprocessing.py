"""Preprocessing against scikit-learn's transformers and hand-computed values; every refusal by its message.

Leans on scikit-learn where it is installed.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpu_mlp.preprocessing import Labels, Preprocessor, TargetScaler, infer_task, moments

QUICK = settings(max_examples=40, deadline=None, database=None)

TABLE = {
    "age": np.array([20.0, 30.0, 40.0, 50.0]),
    "colour": np.array(["red", "blue", "red", "green"], object),
    "count": np.array([1, 1, 3, 3]),
}


def through_json(fitted):
    """The object that comes back from what a model file holds."""
    return type(fitted).from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))


def holed(rng: np.random.Generator, n: int = 60, d: int = 5) -> np.ndarray:
    """(n, d) float64 with repeated values and a quarter of them missing."""
    x = np.round(rng.normal(size=(n, d)) * 2) * rng.uniform(0.1, 50, d) + rng.normal(size=d) * 10
    x[rng.random((n, d)) < 0.25] = np.nan
    return x


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_standardized_by_hand():
    x = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])
    prep = Preprocessor.fit(x)
    np.testing.assert_array_equal(prep.mean, [3, 20])
    np.testing.assert_allclose(prep.scale, [math.sqrt(8 / 3), math.sqrt(200)], rtol=1e-15)
    z = prep.transform(x, np.float64)
    np.testing.assert_allclose(z[:, 0], np.array([-2, 0, 2]) / math.sqrt(8 / 3), rtol=1e-15)
    assert (prep.n_features_in, prep.n_features_out, prep.feature_names_out) == (2, 2, ["x0", "x1"])


@pytest.mark.parametrize("dtype", ["u1", "i1", "i4", "u8", "f2", "f4", "f8", ">f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_standardized_like_scikit_learn(dtype, order):
    sklearn = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(0)
    x = np.array(rng.integers(0, 100, (300, 7)), dtype, order=order)
    prep, scaler = Preprocessor.fit(x), sklearn.StandardScaler().fit(x.astype(np.float64))
    np.testing.assert_allclose(prep.mean, scaler.mean_, rtol=1e-12)
    np.testing.assert_allclose(prep.scale, scaler.scale_, rtol=1e-12)
    z = prep.transform(x)
    assert z.dtype == np.float32
    assert z.flags.c_contiguous
    np.testing.assert_allclose(z, scaler.transform(x.astype(np.float64)), rtol=1e-6, atol=1e-7)
    z = prep.transform(x, np.float64)
    assert z.dtype == np.float64
    np.testing.assert_allclose(z, scaler.transform(x.astype(np.float64)), rtol=1e-12, atol=1e-13)


def test_blocks_of_rows_change_nothing_but_the_last_digits(monkeypatch):
    rng = np.random.default_rng(1)
    x = holed(rng, 101, 7)
    table = {f"c{j}": x[:, j] for j in range(7)} | {"t": rng.choice(["u", "v"], 101)}
    whole, whole_table = Preprocessor.fit(x, impute="mean"), Preprocessor.fit(table, impute="mean")
    outputs = whole.transform(x, np.float64), whole_table.transform(table, np.float64)
    monkeypatch.setattr(moments, "BLOCK_VALUES", 30)
    blocks, blocks_table = Preprocessor.fit(x, impute="mean"), Preprocessor.fit(table, impute="mean")
    np.testing.assert_allclose(blocks.mean, whole.mean, rtol=1e-13)
    np.testing.assert_allclose(blocks.scale, whole.scale, rtol=1e-13)
    np.testing.assert_array_equal(whole.transform(x, np.float64), outputs[0])
    np.testing.assert_array_equal(whole_table.transform(table, np.float64), outputs[1])
    np.testing.assert_allclose(blocks_table.transform(table, np.float64), outputs[1], rtol=1e-11, atol=1e-13)


def test_a_large_matrix_of_bytes_gets_no_float64_copy():
    import tracemalloc

    x = np.random.default_rng(0).integers(0, 256, (6000, 784), np.uint8)
    tracemalloc.start()
    prep = Preprocessor.fit(x)
    fit_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    z = prep.transform(x)
    transform_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    float64_copy = x.size * 8
    assert fit_peak < 1.2 * float64_copy  # a few blocks of 8 MiB, whatever the number of rows
    assert transform_peak < z.nbytes + float64_copy


def test_variance_survives_a_large_offset():
    x = 1e9 + np.arange(5.0)[:, None]
    prep = Preprocessor.fit(x)
    assert prep.mean[0] == 1e9 + 2
    np.testing.assert_allclose(prep.scale, [math.sqrt(2)], rtol=1e-15)


@pytest.mark.parametrize("constant", [0.1, -7, 1e300, 5e-324, 0])
@pytest.mark.parametrize("impute", [None, "mean", "median", "most_frequent"])
def test_a_constant_column_becomes_exact_zeros(constant, impute):
    x = np.full((7, 2), constant, np.float64)
    x[:, 1] = range(7)
    if impute:
        x[2, 0] = np.nan
    prep = Preprocessor.fit(x, impute=impute)
    assert prep.scale[0] == 1
    assert not prep.transform(x)[:, 0].any()


def test_a_spread_that_underflows_is_left_unscaled():
    prep = Preprocessor.fit(np.array([[0.0], [5e-324]]))
    assert prep.scale[0] == 1
    assert np.isfinite(prep.transform(np.array([[1.0]]))).all()


def test_without_standardization_numbers_pass_through():
    x = np.random.default_rng(0).normal(size=(5, 3))
    prep = Preprocessor.fit(x, standardize=False)
    np.testing.assert_array_equal(prep.transform(x, np.float64), x)
    np.testing.assert_array_equal(prep.transform(x), x.astype(np.float32))


# --- missing values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["mean", "median", "most_frequent"])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("as_table", [True, False])
def test_imputed_like_scikit_learn(strategy, standardize, as_table):
    impute = pytest.importorskip("sklearn.impute")
    scale = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(2)
    x, new = holed(rng), holed(rng, 20)
    imputer = impute.SimpleImputer(strategy=strategy).fit(x)
    expected = imputer.transform(new)
    if standardize:
        expected = scale.StandardScaler().fit(imputer.transform(x)).transform(expected)
    given_x, given_new = [{f"c{j}": a[:, j] for j in range(5)} if as_table else a for a in (x, new)]
    prep = Preprocessor.fit(given_x, impute=strategy, standardize=standardize)
    np.testing.assert_allclose(prep.fill, imputer.statistics_, rtol=1e-13)
    np.testing.assert_allclose(prep.transform(given_new, np.float64), expected, rtol=1e-11, atol=1e-12)


def test_text_is_imputed_with_its_most_frequent_category():
    impute = pytest.importorskip("sklearn.impute")
    rng = np.random.default_rng(3)
    column = rng.choice(np.array(["u", "v", "w", None], object), 50)
    filled = impute.SimpleImputer(strategy="most_frequent", missing_values=None).fit_transform(column[:, None])[:, 0]
    prep = Preprocessor.fit({"t": column}, impute="mean")
    np.testing.assert_array_equal(prep.transform({"t": column}), filled[:, None] == np.array(["u", "v", "w"]))
    tie = Preprocessor.fit({"t": np.array(["b", "a", "b", "a", None], object)}, impute="mean")
    assert tie.transform({"t": np.array([None], object)}).tolist() == [[1, 0]]


def test_missing_values_are_counted_by_column():
    table = dict(TABLE, age=np.array([1, np.nan, np.nan, 2]), colour=np.array(["a", None, np.nan, "b"], object))
    table["colour"][0] = None
    with pytest.raises(
        ValueError, match=r"column 'age' \(2 of 4\), column 'colour' \(3 of 4\); use impute='mean', 'me"
    ):
        Preprocessor.fit(table)
    x = np.zeros((3, 30), np.float32)
    x[1, 4:28] = np.nan
    with pytest.raises(
        ValueError, match=r"missing values in column 4 \(1 of 3\), .*column 23 \(1 of 3\) and 4 more; use"
    ):
        Preprocessor.fit(x)


def test_missing_values_at_transform():
    prep = Preprocessor.fit(TABLE)
    with pytest.raises(ValueError, match=r"row 2 \(counting from 0\), column 'age': missing value \(NaN\); fit with"):
        prep.transform(dict(TABLE, age=np.array([1, 2, np.nan, 3])))
    with pytest.raises(
        ValueError, match=r"row 1 \(counting from 0\), column 'colour': missing value; fit with impute="
    ):
        prep.transform(dict(TABLE, colour=np.array(["red", None, "red", "red"], object)))


def test_a_column_of_nothing_but_missing_values_is_refused():
    with pytest.raises(ValueError, match="column 1: no value at all to impute from"):
        Preprocessor.fit(np.array([[1.0, np.nan], [2.0, np.nan]]), impute="median")
    for empty in (np.array([None, None], object), np.array([np.nan, np.nan])):
        with pytest.raises(ValueError, match="column 't': no value at all to impute from"):
            Preprocessor.fit({"a": np.array([1.0, 2.0]), "t": empty}, impute="mean")


def test_a_wholly_missing_column_is_filled_at_transform():
    prep = Preprocessor.fit(TABLE, impute="mean")
    for empty in (np.full(2, np.nan), np.array([None, None], object)):
        z = prep.transform({"age": empty, "colour": empty, "count": np.array([1, 3])}, np.float64)
        assert z.tolist() == [[0, 0, 0, 1, -1], [0, 0, 0, 1, 1]]


# --- infinite and very large values ----------------------------------------------------------------------------------


def test_infinite_values_are_refused_by_row_and_column(monkeypatch):
    monkeypatch.setattr(moments, "BLOCK_VALUES", 4)
    x = np.zeros((9, 2))
    x[7, 1] = -np.inf
    for impute in (None, "mean"):
        with pytest.raises(ValueError, match=r"row 7 \(counting from 0\), column 1: inf is not accepted"):
            Preprocessor.fit(x, impute=impute)
        prep = Preprocessor.fit(np.arange(8.0).reshape(4, 2), impute=impute, feature_names=["a", "b"])
        with pytest.raises(ValueError, match=r"row 7 \(counting from 0\), column 'b': inf is not accepted"):
            prep.transform(x)


def test_values_too_large_for_the_output_are_refused():
    prep = Preprocessor.fit(np.array([[1.0], [2.0]]), standardize=False)
    with pytest.raises(ValueError, match=r"row 1 \(counting from 0\), column 0: 1e\+39 is too large for float32"):
        prep.transform(np.array([[1.0], [1e39]]))
    assert prep.transform(np.array([[1e39]]), np.float64) == 1e39


def test_values_that_overflow_are_refused():
    with pytest.raises(ValueError, match=r"column 1: values from -1e\+308 to 1e\+308 overflow in float64"):
        Preprocessor.fit(np.array([[0.0, 1e308], [1.0, -1e308]]))
    with pytest.raises(ValueError, match=r"column 0: values up to 1.5e\+308 overflow in float64"):
        Preprocessor.fit(np.array([[1.5e308], [1.4e308]]), standardize=False, impute="mean")


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e160, 1e300])
def test_moments_of_very_small_and_very_large_values(size):
    x = size * np.array([[1.0], [2.0], [6.0]])
    prep = Preprocessor.fit(x)
    np.testing.assert_allclose(prep.mean / size, [3], rtol=1e-15)
    np.testing.assert_allclose(prep.scale / size, [math.sqrt(14 / 3)], rtol=1e-15)
    np.testing.assert_allclose(prep.transform(x)[:, 0], np.array([-2, -1, 3]) / math.sqrt(14 / 3), rtol=1e-7)


# --- text ------------------------------------------------------------------------------------------------------------


def test_table_by_hand():
    prep = Preprocessor.fit(TABLE)
    assert prep.feature_names == ["age", "colour", "count"]
    assert prep.feature_names_out == ["age", "colour=blue", "colour=green", "colour=red", "count"]
    assert (prep.n_features_in, prep.n_features_out) == (3, 5)
    r = math.sqrt(125)
    expected = [[-15 / r, 0, 0, 1, -1], [-5 / r, 1, 0, 0, -1], [5 / r, 0, 0, 1, 1], [15 / r, 0, 1, 0, 1]]
    np.testing.assert_allclose(prep.transform(TABLE, np.float64), expected, rtol=1e-15)


def test_one_hot_like_scikit_learn():
    sklearn = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(4)
    columns = {name: rng.choice(["é", "Z", "a", "a b", "10", "9"][: 3 + j], 80) for j, name in enumerate("pqrs")}
    columns["q"] = columns["q"].astype(object)
    prep = Preprocessor.fit(columns)
    stacked = np.stack([column.astype(object) for column in columns.values()], axis=1)
    encoder = sklearn.OneHotEncoder(sparse_output=False).fit(stacked)
    np.testing.assert_array_equal(prep.transform(columns), encoder.transform(stacked))
    names = [name.replace("_", "=", 1) for name in encoder.get_feature_names_out(list(columns))]
    assert prep.feature_names_out == names


def test_text_and_numbers_may_come_in_any_order():
    prep = Preprocessor.fit({"t": TABLE["colour"], "a": TABLE["age"], "u": TABLE["colour"]})
    z = prep.transform({"t": ["red"], "a": np.array([35]), "u": np.array(["blue"])})
    assert z.tolist() == [[0, 0, 1, 0, 1, 0, 0]]


def test_unseen_categories():
    new = dict(TABLE, colour=np.array(["red", "blue", "pink", "red"], object))
    with pytest.raises(
        ValueError, match=r"row 2 .*, column 'colour': unseen category 'pink'; .*\(known: blue, green, red\)"
    ):
        Preprocessor.fit(TABLE).transform(new)
    z = Preprocessor.fit(TABLE, impute="median").transform(new)
    assert z[2, 1:4].tolist() == [0, 0, 1]  # red, the most frequent


def test_numbers_that_spell_categories_are_recognised():
    rooms = np.array(["1", "2", "3+", "02.50"], object)
    prep = Preprocessor.fit({"rooms": rooms})
    assert prep.feature_names_out == ["rooms=02.50", "rooms=1", "rooms=2", "rooms=3+"]
    for dtype in (np.float64, np.int64):
        assert prep.transform({"rooms": np.array([2, 1], dtype)}).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert prep.transform({"rooms": np.array([2.5])}).tolist() == [[1, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"unseen category 3\.0"):
        prep.transform({"rooms": np.array([3.0])})
    ambiguous = Preprocessor.fit({"rooms": np.array(["1", "1.0", "x"], object)})
    with pytest.raises(ValueError, match=r"unseen category 1\.0"):
        ambiguous.transform({"rooms": np.array([1.0])})


def test_too_many_categories_are_refused():
    ids = np.array([f"id{i:04}" for i in range(1001)], object)
    with pytest.raises(ValueError, match=r"column 'id': 1001 different texts in 1001 rows \(such as 'id0000'\)"):
        Preprocessor.fit({"id": ids})
    assert Preprocessor.fit({"id": ids}, max_categories=1001).n_features_out == 1001
    assert Preprocessor.fit({"id": ids[1:]}).n_features_out == 1000


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_are_found_by_name_and_others_are_ignored():
    prep = Preprocessor.fit(TABLE)
    shuffled = {"extra": np.array([{}] * 4), "count": TABLE["count"], "colour": TABLE["colour"], "age": TABLE["age"]}
    np.testing.assert_array_equal(prep.transform(shuffled), prep.transform(TABLE))
    with pytest.raises(ValueError, match=r"no column 'colour'; did you mean 'color'\?"):
        prep.transform({"age": TABLE["age"], "color": TABLE["colour"], "count": TABLE["count"]})


def test_feature_names_choose_columns_and_their_order():
    prep = Preprocessor.fit(TABLE, feature_names=["count", "age"])
    assert prep.feature_names_out == ["count", "age"]
    assert prep.transform(TABLE, np.float64)[:, 0].tolist() == [-1, -1, 1, 1]
    with pytest.raises(ValueError, match=r"no column 'agge'; did you mean 'age'\?"):
        Preprocessor.fit(TABLE, feature_names=["agge"])


def test_named_matrix_takes_a_table_and_numeric_table_takes_a_matrix():
    x = np.arange(6.0).reshape(3, 2)
    table = {"b": x[:, 1], "a": x[:, 0]}
    expected = Preprocessor.fit(x).transform(x)
    np.testing.assert_array_equal(Preprocessor.fit(x, feature_names=["a", "b"]).transform(table), expected)
    np.testing.assert_array_equal(Preprocessor.fit(table).transform(x[:, ::-1]), expected[:, ::-1])


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((0, 3)), {}, "at least one row and one column, got 0 rows and 3 columns"),
        (np.zeros((3, 0)), {}, "at least one row and one column, got 3 rows and 0 columns"),
        ({}, {}, "at least one row and one column, got 0 rows and 0 columns"),
        ({"a": np.zeros(0)}, {}, "at least one row and one column, got 0 rows and 1 columns"),
        (
            np.zeros(3),
            {},
            r"expected an \(n, d\) array of real numbers, or a dict of columns; got float64 of shape \(3,\)",
        ),
        (np.zeros((2, 2, 2)), {}, r"got float64 of shape \(2, 2, 2\)"),
        (np.zeros((2, 2), complex), {}, "got complex128"),
        (np.array([["a"]]), {}, "got <U1"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, {}, "column 'b': 3 rows, but column 'a' has 2"),
        ({"a": np.zeros((2, 1))}, {}, r"column 'a': expected \(n,\) numbers or text, got float64 of shape \(2, 1\)"),
        ({"a": np.zeros(2, complex)}, {}, "column 'a': .* got complex128"),
        ({"a": np.array(["u", 5], object)}, {}, r"row 1 \(counting from 0\), column 'a': expected text, got 5"),
        (np.zeros((2, 2)), {"feature_names": ["a"]}, "feature_names: 1 names for 2 columns"),
        (np.zeros((2, 2)), {"feature_names": ["a", "a"]}, "feature_names: expected different strings"),
        (np.zeros((2, 2)), {"feature_names": ["a", 1]}, "feature_names: expected different strings"),
        (np.zeros((2, 2)), {"impute": "meen"}, "impute: unknown name 'meen'; did you mean 'mean'?"),
        (np.zeros((2, 2)), {"max_categories": 0}, "max_categories: expected an integer of at least 1"),
    ],
)
def test_fit_refusals(x, options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessor.fit(x, **options)


def test_standardize_is_a_bool():
    with pytest.raises(TypeError, match="standardize: expected True or False, got 1"):
        Preprocessor.fit(np.zeros((2, 2)), standardize=1)


def test_transform_refusals():
    matrix, table = Preprocessor.fit(np.arange(6.0).reshape(3, 2)), Preprocessor.fit(TABLE)
    with pytest.raises(ValueError, match="expected 2 columns, as at the fit, got 3"):
        matrix.transform(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="fitted on a matrix without column names, got named columns"):
        matrix.transform(TABLE)
    with pytest.raises(ValueError, match="fitted on a table with text columns; pass a dict"):
        table.transform(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"row 1 .*, column 'age': expected a number, as at the fit, got 'old'"):
        table.transform(dict(TABLE, age=np.array([None, "old", None, None], object)))
    for dtype in ("float16", int, "nonsense"):
        with pytest.raises(ValueError, match="dtype: expected float32 or float64, got"):
            matrix.transform(np.zeros((1, 2)), dtype)


def test_no_rows_at_transform_give_no_rows():
    assert Preprocessor.fit(np.arange(6.0).reshape(3, 2)).transform(np.zeros((0, 2))).shape == (0, 2)
    none = {name: column[:0] for name, column in TABLE.items()}
    assert Preprocessor.fit(TABLE).transform(none).shape == (0, 5)


def test_transform_leaves_its_input_alone():
    x = np.array([[1.0, np.nan], [3.0, 4.0]])
    before = x.copy()
    Preprocessor.fit(x, impute="mean").transform(x, np.float64)
    np.testing.assert_array_equal(x, before)


# --- the model file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impute", [None, "mean", "median", "most_frequent"])
@pytest.mark.parametrize("standardize", [True, False])
def test_preprocessor_survives_json_to_the_bit(impute, standardize):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(40, 3)) * [1e-200, 1, 1e200]
    for given_x in (x, {"a": x[:, 0], "t": rng.choice(["u", "v", "w"], 40), "b": x[:, 2]}):
        prep = Preprocessor.fit(given_x, impute=impute, standardize=standardize)
        if not standardize:
            given_x = {k: v[:1] for k, v in given_x.items()} if isinstance(given_x, dict) else given_x[:1]
        back = through_json(prep)
        assert back.to_dict() == prep.to_dict()
        assert back.feature_names_out == prep.feature_names_out
        np.testing.assert_array_equal(back.transform(given_x, np.float64), prep.transform(given_x, np.float64))


GOOD = Preprocessor.fit(TABLE, impute="mean").to_dict()
GROUP = GOOD["categorical"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_features_in": 0}, "n_features_in: expected an integer of at least 1, got 0"),
        ({"n_features_in": True}, "n_features_in: expected an integer"),
        ({"n_features_in": 3.0}, "n_features_in: expected an integer"),
        ({"n_features_in": 4}, "feature_names: expected 4 names, got 3"),
        ({"feature_names": ["a", "b"]}, "feature_names: expected 3 names, got 2"),
        ({"feature_names": ["a", "a", "b"]}, "feature_names: expected different strings"),
        ({"feature_names": ["a", 1, "b"]}, "feature_names: expected a list of strings"),
        ({"feature_names": "abc"}, "feature_names: expected a list of strings"),
        ({"feature_names": None}, "categorical: expected a list, empty without feature names"),
        ({"standardize": 1}, "standardize: expected true or false, got 1"),
        ({"standardize": None}, "standardize: expected true or false, got None"),
        ({"impute": "zero"}, "impute: expected null or one of mean, median, most_frequent, got 'zero'"),
        ({"impute": []}, "impute: expected null or one of"),
        ({"impute": None}, "fill: expected null"),
        ({"mean": [0.0]}, r"mean: expected a list of 2 numbers, got 1 of them: \[0.0\]"),
        ({"mean": [0.0, math.nan]}, "mean: expected finite numbers, got nan"),
        ({"mean": [0.0, math.inf]}, "mean: expected finite numbers, got inf"),
        ({"mean": [0.0, 10**400]}, "mean: expected finite numbers, got 1000"),
        ({"mean": [0.0, "1"]}, "mean: expected finite numbers, got '1'"),
        ({"mean": [0.0, True]}, "mean: expected finite numbers, got True"),
        ({"mean": {"0": 1}}, "mean: expected a list of 2 numbers"),
        ({"scale": [1.0, 0.0]}, "scale: expected numbers above 0, got 0.0"),
        ({"scale": [1.0, -1.0]}, "scale: expected numbers above 0, got -1.0"),
        ({"scale": [1.0, None]}, "scale: expected finite numbers, got None"),
        ({"fill": None}, "fill: expected numbers, got None"),
        ({"fill": [1.0]}, "fill: expected a list of 2 numbers"),
        ({"categorical": None}, "categorical: expected a list"),
        ({"categorical": []}, "mean: expected a list of 3 numbers"),
        ({"categorical": [GROUP, GROUP]}, r"categorical: expected ascending columns, got \[1, 1\]"),
        ({"categorical": [dict(GROUP, column=3)]}, "column: expected an index below 3, got 3"),
        ({"categorical": [dict(GROUP, column=-1)]}, "column: expected an integer of at least 0"),
        ({"categorical": [dict(GROUP, categories=[])]}, "categories: expected sorted strings, at least one"),
        ({"categorical": [dict(GROUP, categories=["red", "blue"])]}, "categories: expected sorted strings"),
        ({"categorical": [dict(GROUP, categories=["red", "red"])]}, "categories: expected different strings"),
        ({"categorical": [dict(GROUP, categories=["red", None])]}, "categories: expected a list of strings"),
        ({"categorical": [dict(GROUP, fill="pink")]}, "fill: expected one of the categories, got 'pink'"),
        ({"categorical": [dict(GROUP, fill=None)]}, "fill: expected one of the categories, got None"),
        ({"categorical": [{"column": 1}]}, "categorical: expected a dict of column, categories, fill; got column"),
        ({"extra": 1}, "preprocessor: expected a dict of n_features_in, .*; got .*extra"),
    ],
)
def test_preprocessor_from_dict_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        Preprocessor.from_dict(GOOD | change)


@pytest.mark.parametrize("kind", [Preprocessor, Labels, TargetScaler])
@pytest.mark.parametrize("state", [None, [], "x", {}])
def test_from_dict_of_something_else(kind, state):
    with pytest.raises(ValueError, match="expected a dict of"):
        kind.from_dict(state)


@pytest.mark.parametrize("name", sorted(GOOD))
def test_preprocessor_from_dict_misses_no_field(name):
    with pytest.raises(ValueError, match="preprocessor: expected a dict of"):
        Preprocessor.from_dict({key: value for key, value in GOOD.items() if key != name})


@QUICK
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-1e15, 1e15, allow_nan=False),
    ),
    st.booleans(),
)
def test_any_matrix_comes_out_finite_centred_and_invertible(x, standardize):
    prep = through_json(Preprocessor.fit(x, standardize=standardize))
    z = prep.transform(x, np.float64)
    assert np.isfinite(z).all()
    spread = np.abs(x).max(axis=0) + 1
    assert (np.abs(z * prep.scale + prep.mean - x) <= 1e-14 * spread).all()
    if standardize:
        assert (np.abs(prep.mean - [math.fsum(column) / len(x) for column in x.T]) <= 1e-15 * spread).all()


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "classes", "dtype"),
    [
        (np.array([3, 1, 3, 7], np.uint8), [1, 3, 7], np.uint8),
        ([5, -2, 5], [-2, 5], np.int64),
        (np.array([2.0, 0.0, 2.0], np.float32), [0.0, 2.0], np.float32),
        ([True, False, True], [False, True], np.bool_),
        (["b", "é", "a"], ["a", "b", "é"], np.dtype("<U1")),
        (np.array(["b", "a", "b"], object), ["a", "b"], object),
        (np.array(["a\0", "a"], object), ["a", "a\0"], object),
        (np.array([2, 1], object), [1, 2], np.int64),
        (np.array([True, False], object), [False, True], np.bool_),
        (np.array([[1], [0]]), [0, 1], np.int64),
        (np.array([2, 1, 2], np.longdouble), [1.0, 2.0], np.float64),
        (np.array([2**63, 2**64 - 1], np.uint64), [2**63, 2**64 - 1], np.uint64),
    ],
)
def test_labels_there_and_back(y, classes, dtype):
    labels = Labels.fit(y)
    assert labels.classes.tolist() == classes
    assert labels.classes.dtype == dtype
    assert len(labels) == len(classes)
    flat = np.asarray(y).reshape(-1)
    codes = labels.encode(y)
    assert codes.dtype == np.int64
    assert codes.tolist() == [classes.index(label) for label in flat.tolist()]
    back = through_json(labels)
    assert back.to_dict() == labels.to_dict()
    assert back.decode(codes).tolist() == flat.tolist()
    assert back.decode(codes).dtype == dtype
    np.testing.assert_array_equal(back.encode(y), codes)


def test_labels_are_coded_like_scikit_learn():
    sklearn = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(6)
    for y in (rng.choice(["10", "9", "B", "a", "é"], 200), rng.integers(-5, 5, 200)):
        np.testing.assert_array_equal(Labels.fit(y).encode(y), sklearn.LabelEncoder().fit_transform(y))


def test_numbers_are_one_family_of_labels():
    labels = Labels.fit(np.array([0, 1, 2]))
    assert labels.encode(np.array([2.0, 0.0])).tolist() == [2, 0]
    assert labels.encode([]).tolist() == []
    assert labels.decode([]).tolist() == []
    with pytest.raises(ValueError, match=r"the labels are numbers, got text \(.*'1'"):
        labels.encode(["1"])
    with pytest.raises(ValueError, match="the labels are numbers, got booleans"):
        labels.encode([True, False])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([], "expected at least one label, got none"),
        ([7, 7, 7], "only one class, 7, in 3 rows"),
        (np.array(["a", None, "b"], object), r"row 1 \(counting from 0\): missing label"),
        (np.array(["a", "b", float("nan")], object), r"row 2 \(counting from 0\): missing label"),
        ([0.0, 1.0, np.nan], r"row 2 \(counting from 0\): missing label"),
        ([0.0, 0.5], r"row 1 \(counting from 0\): the label 0.5 is not a whole number; fractions are for regression"),
        ([0.0, np.inf], "the label inf is not a whole number"),
        (np.array(["a", 1, "b"], object), "expected labels of one kind, text, whole numbers or booleans; got int, str"),
        (np.array([True, 1], object), "expected labels of one kind.*got bool, int"),
        (np.array([b"a", b"b"], object), "expected labels of one kind.*got bytes"),
        (np.array([2**70, 1], object), "expected labels of one kind.*got int"),
        (np.zeros((3, 2)), r"expected \(n,\) labels, got float64 of shape \(3, 2\)"),
        (np.array([1j, 2]), r"expected \(n,\) labels, got complex128"),
        (3, r"expected \(n,\) labels, got int64 of shape \(\)"),
    ],
)
def test_labels_fit_refusals(y, message):
    with pytest.raises(ValueError, match=message):
        Labels.fit(y)


def test_unseen_labels_and_codes_are_refused():
    with pytest.raises(ValueError, match=r"row 2 \(counting from 0\): unseen label 'z'; known: 'a', 'b'"):
        Labels.fit(["a", "b"]).encode(["a", "b", "z", "y"])
    with pytest.raises(ValueError, match=r"row 1 \(counting from 0\): unseen label 9; known: 0, 1"):
        Labels.fit([0, 1]).encode([0, 9])
    for codes, message in [
        ([2], "0 to 1, got 2 to 2"),
        ([1, -1], "0 to 1, got -1 to 1"),
        ([0.0], "integers, got float64"),
    ]:
        with pytest.raises(ValueError, match=f"codes: expected {message}"):
            Labels.fit([0, 1]).decode(codes)


@pytest.mark.parametrize(
    ("dtype", "classes", "message"),
    [
        ("int64", [1], "expected a list of two int or more"),
        ("int64", "01", "expected a list of two int or more"),
        ("int64", [0, 1.0], "expected a list of two int or more"),
        ("int64", [False, True], "expected a list of two int or more"),
        ("float64", [0, 1], "expected a list of two float or more"),
        ("bool", [0, 1], "expected a list of two bool or more"),
        ("str", ["a", None], "expected a list of two str or more"),
        ("int64", [0, 2, 1], "expected different labels in ascending order"),
        ("str", ["a", "a"], "expected different labels in ascending order"),
        ("float64", [0.0, math.nan], "expected different labels in ascending order"),
        ("float64", [0.0, 0.5], "the label 0.5 is not a whole number"),
        ("float64", [0.0, math.inf], "the label inf is not a whole number"),
        ("float16", [0.0, 1e9], "the label inf is not a whole number"),
        ("float32", [0.0, 16777217.0], "not all of them fit float32"),
        ("uint8", [0, 256], "not all of them fit uint8"),
        ("uint8", [-1, 0], "not all of them fit uint8"),
        ("int64", [0, 2**64], "not all of them fit int64"),
        ("complex128", [0, 1], "dtype: expected one of"),
        (7, [0, 1], "dtype: expected one of"),
        ([], [0, 1], "dtype: expected one of"),
    ],
)
@pytest.mark.filterwarnings("ignore:NumPy will stop allowing conversion:DeprecationWarning")
def test_labels_from_dict_refusals(dtype, classes, message):
    with pytest.raises(ValueError, match=message):
        Labels.from_dict({"dtype": dtype, "classes": classes})


@QUICK
@given(
    st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=9),
        st.lists(st.text(st.characters(codec="utf-8"), max_size=4), min_size=2, max_size=9),
    ).filter(lambda values: len(set(values)) > 1)
)
def test_any_labels_there_and_back(values):
    y = np.array(values, object)
    labels = through_json(Labels.fit(y))
    assert labels.classes.tolist() == sorted(set(values))
    assert labels.decode(labels.encode(y)).tolist() == values


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)])
@pytest.mark.parametrize("standardize", [True, False])
def test_target_scaler_there_and_back(shape, standardize):
    y = np.random.default_rng(7).normal(size=shape) * 30 + 5
    scaler = TargetScaler.fit(y, standardize)
    rows = y.reshape(50, -1)
    z = scaler.transform(y, np.float64)
    assert z.shape == rows.shape
    expected = (rows - rows.mean(axis=0)) / rows.std(axis=0) if standardize else rows
    np.testing.assert_allclose(z, expected, rtol=1e-12, atol=1e-13)
    if standardize:
        np.testing.assert_allclose(scaler.scale, rows.std(axis=0), rtol=1e-13)
    back = through_json(scaler)
    assert back.to_dict() == scaler.to_dict()
    assert back.inverse(z).shape == shape
    np.testing.assert_allclose(back.inverse(z), y, rtol=1e-13)
    assert scaler.transform(y).dtype == np.float32
    assert scaler.transform(y).flags.c_contiguous


def test_target_scaler_of_integers_and_constants():
    scaler = TargetScaler.fit([3, 3, 3])
    assert (scaler.mean.tolist(), scaler.scale.tolist(), scaler.ndim) == ([3], [1], 1)
    assert scaler.transform([3, 5]).tolist() == [[0], [2]]
    assert scaler.inverse(np.array([0.5], np.float32)).tolist() == [3.5]
    assert TargetScaler.fit([1, 3]).transform(np.zeros(0)).shape == (0, 1)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([], "expected at least one value"),
        (np.zeros((3, 0)), "expected at least one value"),
        ([1.0, np.nan], r"row 1 \(counting from 0\), output 0: missing target \(NaN\)"),
        ([[1.0, 2.0], [1.0, np.inf]], r"row 1 \(counting from 0\), output 1: inf is not accepted"),
        (["a", "b"], r"expected \(n,\) or \(n, k\) real numbers, got <U1"),
        ([True, False], "real numbers, got bool"),
        (np.zeros((2, 2, 2)), r"got float64 of shape \(2, 2, 2\)"),
        (1.0, r"got float64 of shape \(\)"),
        ([1e308, -1e308], r"y, output 0: values from -1e\+308 to 1e\+308 overflow in float64"),
    ],
)
def test_target_scaler_fit_refusals(y, message):
    with pytest.raises(ValueError, match=message):
        TargetScaler.fit(y)


def test_target_scaler_refusals():
    scaler = TargetScaler.fit(np.zeros((3, 2)))
    for shape in [(3,), (3, 1), (3, 3)]:
        for method in (scaler.transform, scaler.inverse):
            with pytest.raises(ValueError, match="expected 2 outputs, as at the fit, got shape"):
                method(np.zeros(shape))
    with pytest.raises(ValueError, match=r"row 1 \(counting from 0\): 1e\+39 is too large for float32"):
        scaler.transform([[0, 0], [0, 1e39]])
    with pytest.raises(ValueError, match="dtype: expected float32 or float64, got 'float16'"):
        scaler.transform(np.zeros((3, 2)), "float16")
    with pytest.raises(TypeError, match="standardize: expected True or False"):
        TargetScaler.fit([1.0, 2.0], "yes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": []}, "mean: expected a list of at least one number"),
        ({"mean": 0.0}, "mean: expected a list of at least one number"),
        ({"mean": [math.nan]}, "mean: expected finite numbers"),
        ({"scale": [0.0]}, "scale: expected numbers above 0"),
        ({"scale": [1.0, 1.0]}, "scale: expected a list of 1 numbers"),
        ({"ndim": 0}, "ndim: expected an integer of at least 1"),
        ({"ndim": 3}, "ndim: expected 1 .* or 2, got 3"),
        ({"ndim": True}, "ndim: expected an integer"),
        ({"ndim": 1, "mean": [0.0, 0.0], "scale": [1.0, 1.0]}, "ndim: expected 1 .for one output. or 2, got 1"),
        ({"more": 1}, "expected a dict of mean, scale, ndim"),
    ],
)
def test_target_scaler_from_dict_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        TargetScaler.from_dict({"mean": [0.0], "scale": [1.0], "ndim": 1} | change)


# --- which task ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "task"),
    [
        (["a", "b"], "classification"),
        (np.array(["a", None], object), "classification"),
        ([True, False], "classification"),
        ([0, 1], "classification"),
        ([-1.0, 1.0], "classification"),
        ([5, 5, 5], "classification"),
        ([3, 4, 5, 6, 7, 8, 9] * 2, "classification"),  # the grades of wine
        ([[0], [1], [2], [0], [1], [2]], "classification"),
        ([0.0, 1.0, 2.0, np.nan] * 2, "classification"),
        (np.arange(40) % 20 * 3, "classification"),  # few, and each twice
        (np.arange(39) % 20 * 3, "regression"),
        (np.arange(420) % 21 * 3, "regression"),
        (np.arange(1000) % 10, "classification"),
        (np.arange(62**2) % 62, "classification"),
        (np.arange(62**2) % 62 + 1, "classification"),
        (np.arange(62**2) % 62 + 2, "regression"),  # codes begin at 0 or 1
        (np.arange(62**2 - 1) % 62, "regression"),  # too few rows for as many classes
        (np.arange(100_000) % 73 + 18, "regression"),  # ages
        (np.arange(100_000) % 100 * 2, "regression"),  # gaps
        ([3, 7, 10, 15], "regression"),
        ([0, 1, 2, 3, 4], "regression"),  # none repeats
        ([0.0, 0.5, 1.0] * 9, "regression"),
        ([0.0, 1.0, np.inf], "regression"),
        (np.zeros((9, 2)), "regression"),
        (np.array([[0, 1], [1, 0]]), "regression"),
        (np.arange(-128, 128).astype(np.int8).repeat(300), "regression"),
        (np.arange(256).astype(np.uint8).repeat(256), "classification"),
    ],
)
def test_infer_task(y, task):
    assert infer_task(y) == task


@pytest.mark.parametrize("y", [[], np.zeros((0, 2)), np.zeros((1, 1, 1)), 3, [1j]])
def test_infer_task_refuses_what_is_no_target(y):
    with pytest.raises(ValueError, match=r"y: expected \(n,\) or \(n, k\) labels or values"):
        infer_task(y)
