"""The fused operations on plain arrays (`gpu_mlp.ops.cuda`), on an emulated GPU, against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu.fixtures import emulated_gpu  # noqa: F401

from gpu_mlp import L2, SGD, Adam, AdamW, CrossEntropy, Muon
from gpu_mlp.activations import ACTIVATIONS, Scratch

pytestmark = pytest.mark.usefixtures("emulated_gpu")

DTYPES = {"float64": 1e-12, "float32": 2e-6, "float16": 3e-3, "bfloat16": 2e-2}
ELEMENTWISE = [name for name, f in ACTIVATIONS.items() if not f.rowwise]
GELU = ACTIVATIONS["gelu"]


@pytest.fixture
def cuda():
    from gpu_mlp.ops import cuda

    return cuda


def array(values, dtype="float64"):
    import cupy

    return cupy.asarray(np.asarray(values, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))


def host(a):
    return a.get().astype(np.float64)


def close(found, expected, dtype="float64"):
    found = host(found)
    assert found.shape == np.shape(expected)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) <= DTYPES[dtype] * (np.linalg.norm(expected) + 1e-3)


def table(name, values):
    """(f, f') of the table at ``values``, in float64; f' of z or h, as it reads."""
    f, h = ACTIVATIONS[name], np.empty_like(values)
    scratch = Scratch(*(np.empty_like(values) for _ in range(3)), np.empty(values.shape, bool))
    f.f(values.copy(), h, scratch)
    slope = np.ones_like(values)
    if f.reads != "none":
        f.df(slope, h.copy() if f.reads == "h" else values.copy(), scratch)
    return h, slope


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_functions_of_any_shape_and_strides(cuda, name, dtype):
    z = array(np.linspace(-2, 2, 60).reshape(3, 4, 5), dtype)[:, ::2].transpose(2, 0, 1)
    h, slope = table(name, np.ascontiguousarray(host(z)))
    close(cuda.function(name, z.dtype)(z), h, dtype)
    saved = z if ACTIVATIONS[name].reads == "z" else array(h, dtype)
    close(cuda.derivative(name, z.dtype)(saved), slope, dtype)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_function(cuda, name):
    z = np.linspace(-1.5, 1.5, 12)
    close(cuda.function(name, "float64")(array(z)), table(name, z)[0])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_layer_forward_and_backward(cuda, dtype):
    rng = np.random.default_rng(0)
    x, W, b, gh = (array(rng.normal(size=s), dtype) for s in ((9, 7), (16, 7), (16,), (9, 16)))
    h, z = cuda.affine(x, W, b, "gelu", keep_z=True)
    expected = host(x) @ host(W).T + host(b)
    close(z, expected, dtype)
    close(h, table("gelu", expected)[0], dtype)
    close(cuda.affine(x, W, b, "gelu"), table("gelu", expected)[0], dtype)
    expected = host(gh) * table("gelu", host(z))[1]
    gz, gb = cuda.activation_gradient(gh, z, "gelu")
    assert gz is gh
    close(gz, expected, dtype)
    close(gb, expected.sum(0), dtype)
    assert gb.dtype == (np.float64 if dtype == "float64" else np.float32)
    cuda.activation_gradient(gz, None, "identity", gb=gb)
    close(gb, 2 * expected.sum(0), dtype)


def test_dropout_drops_the_same_forwards_and_backwards(cuda):
    drop, rng = cuda.Dropout(0.5, seed=3, layer=0), np.random.default_rng(0)
    x, W, b = array(rng.normal(size=(40, 7))), array(rng.normal(size=(16, 7))), array(np.ones(16))
    masks = []
    for number in (0, 1):
        h = host(cuda.affine(x, W, b, "sigmoid", dropout=drop, round=number))
        gz, _ = cuda.activation_gradient(array(np.ones((40, 16))), array(h), "sigmoid", dropout=drop, round=number)
        np.testing.assert_array_equal(h == 0, host(gz) == 0)
        masks.append(h == 0)
    assert 0.3 < masks[0].mean() < 0.7
    assert (masks[0] != masks[1]).any()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_cross_entropy_of_labels(cuda, dtype):
    rng = np.random.default_rng(0)
    z, y, w = array(rng.normal(size=(9, 5)), dtype), rng.integers(0, 5, 9), rng.uniform(0.5, 2, 9)
    loss = CrossEntropy(label_smoothing=0.1)
    value, gz = cuda.loss_and_gradient(loss, z, array(y, "int64"), output="softmax", sample_weight=array(w), scale=8.0)
    p = np.exp(host(z)) / np.exp(host(z)).sum(1, keepdims=True)
    t = np.eye(5)[y] * 0.9 + 0.02
    close(value, -(w[:, None] * t * np.log(p)).sum() / w.sum(), "float32" if dtype != "float64" else dtype)
    close(gz, 8 * w[:, None] * (p - t) / w.sum(), dtype)
    close(cuda.softmax(z), p, dtype)
    close(cuda.softmax(z, logarithm=True), np.log(p), dtype)
    g = rng.normal(size=(9, 5))
    close(cuda.softmax_gradient(array(g), array(p)), p * (g - (g * p).sum(1, keepdims=True)))


def test_a_loss_behind_an_activation(cuda):
    rng = np.random.default_rng(0)
    h, y = np.tanh(rng.normal(size=(9, 5))), rng.normal(size=(9, 5))
    value, gz = cuda.loss_and_gradient("mse", array(h), array(y), output="tanh")
    close(value, ((h - y) ** 2).mean())
    close(gz, 2 * (h - y) / 45 * (1 - h * h))


def test_products(cuda):
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=s) for s in ((6, 4), (4, 5), (6, 5)))
    close(cuda.product(array(a), array(b)), a @ b)
    close(cuda.product(array(a.T.copy()), array(b.T.copy()), transpose_a=True, transpose_b=True), a @ b)
    out = array(c)
    assert cuda.product(array(a), array(b), out, alpha=2, beta=0.5) is out
    close(out, 2 * a @ b + 0.5 * c)
    wide = array(np.zeros((6, 5)), "float32")
    close(cuda.product(array(a, "bfloat16"), array(b, "bfloat16"), wide), a @ b, "bfloat16")


def test_bytes_become_floats(cuda):
    pixels = np.arange(60, dtype=np.uint8).reshape(5, 3, 4)
    batch = cuda.gather(array(pixels, "uint8"), array([4, 0, 4], "int64"), np.float16, scale=1 / 255)
    assert batch.shape == (3, 3, 4)
    close(batch, pixels[[4, 0, 4]] / 255, "float16")


@pytest.mark.parametrize("rule", [SGD(0.1), Adam(weight_decay=0.1), AdamW()], ids=lambda rule: rule.name)
def test_updates_are_those_of_the_trainer(cuda, rule):
    rng = np.random.default_rng(0)
    theta, shadow = rng.normal(size=1001), None
    on_device = array(theta, "float32")
    shadow = array(theta, "bfloat16")
    update = cuda.Update(rule, on_device, shadow=shadow, regularizer=L2(0.1), clip_norm=1.0)
    wide = theta.astype(np.float64)
    moments = [np.zeros_like(wide) for _ in rule.moments]
    for step in (1, 2, 3):
        g = rng.normal(size=1001)
        update(array(g, "float32"), lr=0.01 * step)
        total = g + 0.1 * wide
        total *= min(1, 1 / (np.linalg.norm(total) + 1e-6))
        rule.rule(wide, total, moments, rule.coefficients(0.01 * step, step), tuple(np.empty((2, 1001))))
    close(on_device, wide, "float32")
    np.testing.assert_array_equal(shadow.get(), on_device.get().astype(ml_dtypes.bfloat16))
    assert list(update.moments) == list(rule.moments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.affine(np.zeros((2, 3)), None, None), TypeError, "x: expected a CuPy array, got ndarray"),
        (lambda c: c.affine(array(np.zeros((2, 3))), array(np.zeros((4, 2))), None), ValueError, r"W: .*\(any, 3\)"),
        (lambda c: c.affine(array([[1, 2]], "int64"), None, None), TypeError, "x: expected float64 or float32"),
        (
            lambda c: c.affine(array([[1.0]]), array([[1.0]], "float32"), array([1.0])),
            TypeError,
            "x, W, b: expected one dtype, got float64, float32, float64",
        ),
        (lambda c: c.affine(array(np.zeros((3, 2))).T, None, None), ValueError, "x: expected C order"),
        (lambda c: c.activation_gradient(array([[1.0]]), None, "gelu"), ValueError, "saved: f′ of gelu reads z"),
        (lambda c: c.activation_gradient(array([[1.0]]), None, "softmax"), ValueError, "softmax_gradient"),
        (lambda c: c.function("reluu"), ValueError, "did you mean 'relu'"),
        (lambda c: c.function("softmax"), ValueError, "works on rows"),
        (lambda c: c.function("relu", "int32"), ValueError, "dtype: unknown name 'int32'"),
        (lambda c: c.product(array([[1.0]]), array([[1.0], [2.0]])), ValueError, "b: expected 1 along"),
        (lambda c: c.Update(Muon(), array([1.0])), ValueError, "optimizer: muon"),
        (lambda c: c.Update("adam", array([1.0], "float16")), TypeError, "theta: expected float32 or float64"),
        (
            lambda c: c.loss_and_gradient("mse", array([[1.0]]), array([1.0])),
            ValueError,
            r"y: expected shape \(1, 1\)",
        ),
        (lambda c: c.loss_and_gradient("mse", array([[1.0]]), array([[1.0]]), output="gelu"), ValueError, "reads z"),
        (lambda c: c.gather(array([[1.0]]), array([0], "int32")), TypeError, "rows: expected int64"),
    ],
)
def test_refusals_name_the_argument(cuda, call, error, message):
    with pytest.raises(error, match=message):
        call(cuda)
