"""What several test files share: tolerances by dtype, the comparison that NaN cannot pass, and plain NumPy references.

The references are the textbook's formulas in float64, written without a look at speed; they lean on nothing in gpu_mlp.
"""

from __future__ import annotations

import math

import numpy as np
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits

# The tests' GEMMs are small: with one BLAS thread they take a fraction of the time on a machine that is busy.
_limits = threadpool_limits(1, user_api="blas")

# Properties run on the same examples everywhere, so that CI gives the same answer twice.
PROPERTY = settings(
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

# Relative error by norm against a float64 reference: some ten units of the last place of the type that results are
# stored in (2⁻⁵², 2⁻²³, 2⁻¹⁰, 2⁻⁷), room for the rounding of sums over a few hundred terms and for inputs that were
# stored in that type as well.
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "tf32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}
PRECISIONS = tuple(TOLERANCE)


def assert_close(actual, expected, tolerance, scale=0.0):
    """‖actual − expected‖ ≤ tolerance · max(‖expected‖, scale), after a check of shapes and that all is finite."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    assert np.isfinite(expected).all(), "the reference itself is not finite"
    assert np.isfinite(actual).all(), f"{np.count_nonzero(~np.isfinite(actual))} entries are not finite"
    error, size = np.linalg.norm(actual - expected), max(np.linalg.norm(expected), scale)
    assert error <= tolerance * size, f"relative error {error / size if size else error:.3g} > {tolerance:g}"


def same_bits(a, b):
    """Whether two arrays agree in dtype, shape and every bit."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def blobs(n=240, features=6, classes=3, seed=0, spread=0.6, dtype=np.float64):
    """Gaussian clouds around well separated centres: x, (n, features), and labels, (n,) int64."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features)) * 2
    y = np.arange(n) % classes
    return (centres[y] + spread * rng.normal(size=(n, features))).astype(dtype), y.astype(np.int64)


def waves(n=200, features=3, outputs=2, seed=0):
    """A smooth regression problem: x, (n, features), in [−1, 1], and y, (n, outputs)."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, features))
    return x, np.sin(x @ rng.normal(size=(features, outputs)))


# --- activations -------------------------------------------------------------------------------------------------

_SCALE, _ALPHA = 1.0507009873554805, 1.6732632423543772


def _sigma(z):
    return 1 / (1 + np.exp(-z))


def _erf(z):
    return np.array([math.erf(v) for v in z.ravel()]).reshape(z.shape)


def _gelu_tanh_slope(z):
    u = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * z / np.cosh(u) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)


def _mish_slope(z):
    s = np.log(1 + np.exp(z))
    return np.tanh(s) + z * _sigma(z) / np.cosh(s) ** 2


# f(z) and f′(z) of every elementwise activation, away from kinks
ELEMENTWISE = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.where(z > 0, z, 0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1.0, 0.01)),
    "elu": (lambda z: np.where(z > 0, z, np.exp(z) - 1), lambda z: np.where(z > 0, 1.0, np.exp(z))),
    "celu": (lambda z: np.where(z > 0, z, np.exp(z) - 1), lambda z: np.where(z > 0, 1.0, np.exp(z))),
    "selu": (
        lambda z: _SCALE * np.where(z > 0, z, _ALPHA * (np.exp(z) - 1)),
        lambda z: _SCALE * np.where(z > 0, 1.0, _ALPHA * np.exp(z)),
    ),
    "gelu": (
        lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
        lambda z: 0.5 * (1 + _erf(z / math.sqrt(2))) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": (
        lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
        _gelu_tanh_slope,
    ),
    "silu": (lambda z: z * _sigma(z), lambda z: _sigma(z) + z * _sigma(z) * _sigma(-z)),
    "mish": (lambda z: z * np.tanh(np.log(1 + np.exp(z))), _mish_slope),
    "tanh": (np.tanh, lambda z: 1 / np.cosh(z) ** 2),
    "sigmoid": (_sigma, lambda z: _sigma(z) * _sigma(-z)),
    "softplus": (lambda z: np.log(1 + np.exp(z)), _sigma),
    "softsign": (lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2),
    "hardtanh": (lambda z: np.clip(z, -1, 1), lambda z: np.where(abs(z) < 1, 1.0, 0.0)),
    "hardsigmoid": (lambda z: np.clip(z / 6 + 0.5, 0, 1), lambda z: np.where(abs(z) < 3, 1 / 6, 0.0)),
    "hardswish": (
        lambda z: z * np.clip(z / 6 + 0.5, 0, 1),
        lambda z: np.where(z < -3, 0.0, np.where(z > 3, 1.0, z / 3 + 0.5)),
    ),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: np.where((z > 0) & (z < 6), 1.0, 0.0)),
    "relu_squared": (lambda z: np.where(z > 0, z, 0) ** 2, lambda z: 2 * np.where(z > 0, z, 0)),
    "sine": (np.sin, np.cos),
    "exp": (np.exp, np.exp),
}
ROWWISE = ("softmax", "log_softmax")
ACTIVATION_NAMES = (*ELEMENTWISE, *ROWWISE)


def activation(name, z):
    """h = f(z), (rows, n)."""
    z = np.asarray(z, np.float64)
    if name in ELEMENTWISE:
        return ELEMENTWISE[name][0](z)
    p = np.array([np.exp(row) / np.exp(row).sum() for row in z]).reshape(z.shape)
    return p if name == "softmax" else np.log(p)


def through_activation(name, gh, z):
    """gz = (∂h/∂z)ᵀ gh, row by row; with the whole Jacobian of a row where f mixes its entries."""
    gh, z = np.asarray(gh, np.float64), np.asarray(z, np.float64)
    if name in ELEMENTWISE:
        return gh * ELEMENTWISE[name][1](z)
    gz = np.empty_like(gh)
    for i, p in enumerate(activation("softmax", z)):
        if len(p) <= 300:
            jacobian = np.diag(p) - np.outer(p, p) if name == "softmax" else np.eye(len(p)) - np.tile(p, (len(p), 1))
            gz[i] = jacobian.T @ gh[i]
        else:  # the same product, without a matrix of n²
            gz[i] = p * gh[i] - p * (p @ gh[i]) if name == "softmax" else gh[i] - p * gh[i].sum()
    return gz


# --- losses ------------------------------------------------------------------------------------------------------


def rows_of(y, n):
    """Labels as rows with a single 1; rows as they are."""
    if np.ndim(y) == 2:
        return np.asarray(y, np.float64)
    rows = np.zeros((len(y), n))
    for row, label in zip(rows, y):
        row[label] = 1
    return rows


def loss_rows(name, y_hat, y, smoothing=0.0, class_weight=None, clip=0.0):
    """L of every row, (rows,), and ∂L/∂ŷ, (rows, n); ``clip`` bounds the probabilities in L alone."""
    y_hat = np.asarray(y_hat, np.float64)
    n = y_hat.shape[1]
    if clip:
        values, _ = loss_rows(name, np.clip(y_hat, clip, 1 - clip), y, smoothing, class_weight)
        return values, loss_rows(name, y_hat, y, smoothing, class_weight)[1]
    if name == "hinge":
        t = 2 * rows_of(y, n) - 1 if np.ndim(y) == 1 else y
        active = 1 - t * y_hat > 0
        return np.where(active, 1 - t * y_hat, 0).mean(axis=1), np.where(active, -t, 0) / n
    if name in ("cross_entropy", "nll"):
        w = np.ones(n) if class_weight is None else np.asarray(class_weight)
        t = w * ((1 - smoothing) * rows_of(y, n) + smoothing / n)
        if name == "nll":
            return -(t * y_hat).sum(axis=1), -t
        return -(t * np.log(y_hat)).sum(axis=1), -t / y_hat
    d = y_hat - y
    value, slope = {
        "mse": lambda: (d**2, 2 * d),
        "half_mse": lambda: (d**2 / 2, d),
        "mae": lambda: (abs(d), np.sign(d)),
        "huber": lambda: (np.where(abs(d) <= 1, d**2 / 2, abs(d) - 0.5), np.where(abs(d) <= 1, d, np.sign(d))),
        "log_cosh": lambda: (np.log(np.cosh(d)), np.tanh(d)),
        "poisson": lambda: (y_hat - y * np.log(y_hat), 1 - y / y_hat),
        "binary_cross_entropy": lambda: (
            -(y * np.log(y_hat) + (1 - y) * np.log(1 - y_hat)),
            (1 - y) / (1 - y_hat) - y / y_hat,
        ),
    }[name]()
    return value.mean(axis=1), slope / n


def row_weights(y, rows, sample_weight=None, class_weight=None):
    """What every row adds to the weight that L is divided by: its sample's weight times, for labels, its class's."""
    w = np.ones(rows) if sample_weight is None else np.asarray(sample_weight, np.float64)
    return w * np.asarray(class_weight)[y] if class_weight is not None and np.ndim(y) == 1 else w


# --- a whole network ---------------------------------------------------------------------------------------------


def network_forward(weights, biases, names, x):
    """Every z and h of the forward pass; names are the activations, the output's last."""
    zs, hs = [], [np.asarray(x, np.float64)]
    for W, b, name in zip(weights, biases, names):
        zs.append(hs[-1] @ np.asarray(W, np.float64).T + np.asarray(b, np.float64))
        hs.append(activation(name, zs[-1]))
    return zs, hs


def network_gradients(weights, biases, names, x, y, loss, sample_weight=None):
    """L and every gW, gb by algorithm 6.4, for a loss without class weights."""
    zs, hs = network_forward(weights, biases, names, x)
    w = row_weights(y, len(hs[0]), sample_weight)
    values, gh = loss_rows(loss, hs[-1], y)
    gh, gW, gb = gh * (w / w.sum())[:, None], [], []
    for W, z, h, name in reversed(list(zip(weights, zs, hs, names))):
        gz = through_activation(name, gh, z)
        gW.insert(0, gz.T @ h)
        gb.insert(0, gz.sum(axis=0))
        gh = gz @ np.asarray(W, np.float64)
    return float(values @ w / w.sum()), gW, gb


# --- update rules ------------------------------------------------------------------------------------------------


def update_rule(optimizer, theta, g, memory, step):
    """One step of ``optimizer`` on float64 θ, as its paper (or PyTorch's documentation) writes it; returns θ.

    ``optimizer`` is read for its hyperparameters alone; ``memory`` is a dict that carries the moments from call to
    call, empty at first; ``step`` counts from 1.
    """
    name, o = type(optimizer).__name__, optimizer
    decay = getattr(o, "weight_decay", 0.0)
    decoupled = name in ("AdamW", "Lion", "Muon") or getattr(o, "decoupled_weight_decay", False)
    if decoupled:
        theta = theta - o.lr * decay * theta
    else:
        g = g + decay * theta
    b1, b2 = getattr(o, "betas", (0.0, 0.0))
    zero = np.zeros_like(theta)

    def average(key, value, beta):
        memory[key] = beta * memory.get(key, zero) + (1 - beta) * value
        return memory[key]

    if name == "SGD":
        if not o.momentum:
            return theta - o.lr * g
        m = memory["m"] = g if step == 1 else o.momentum * memory["m"] + (1 - o.dampening) * g
        return theta - o.lr * (g + o.momentum * m if o.nesterov else m)
    if name in ("Adam", "AdamW"):
        m, v = average("m", g, b1), average("v", g**2, b2)
        if o.amsgrad:
            v = memory["max"] = np.maximum(memory.get("max", zero), v)
        if o.epsilon_hat:
            return theta - o.lr * np.sqrt(1 - b2**step) / (1 - b1**step) * m / (np.sqrt(v) + o.eps)
        return theta - o.lr * (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + o.eps)
    if name == "NAdam":
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (t * o.momentum_decay)) for t in (step, step + 1))
        product = memory["product"] = memory.get("product", 1.0) * mu
        m, v = average("m", g, b1), average("v", g**2, b2)
        m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
        return theta - o.lr * m_hat / (np.sqrt(v / (1 - b2**step)) + o.eps)
    if name == "RAdam":
        m, v = average("m", g, b1) / (1 - b1**step), average("v", g**2, b2)
        most = 2 / (1 - b2) - 1
        rho = most - 2 * step * b2**step / (1 - b2**step)
        if rho <= 5:
            return theta - o.lr * m
        r = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
        return theta - o.lr * m * r * math.sqrt(1 - b2**step) / (np.sqrt(v) + o.eps)
    if name == "Adamax":
        m = average("m", g, b1)
        u = memory["u"] = np.maximum(b2 * memory.get("u", zero), abs(g) + o.eps)
        return theta - o.lr / (1 - b1**step) * m / u
    if name == "Adagrad":
        v = memory["v"] = memory.get("v", zero + o.initial_accumulator_value) + g**2
        return theta - o.lr / (1 + (step - 1) * o.lr_decay) * g / (np.sqrt(v) + o.eps)
    if name == "RMSprop":
        v = average("v", g**2, o.alpha)
        if o.centered:
            v = v - average("mean", g, o.alpha) ** 2
        direction = g / (np.sqrt(v) + o.eps)
        if o.momentum:
            direction = memory["m"] = o.momentum * memory.get("m", zero) + direction
        return theta - o.lr * direction
    if name == "Adadelta":
        v = average("v", g**2, o.rho)
        delta = np.sqrt(memory.get("delta", zero) + o.eps) / np.sqrt(v + o.eps) * g
        average("delta", delta**2, o.rho)
        return theta - o.lr * delta
    if name == "Lion":
        m = memory.get("m", zero)
        theta = theta - o.lr * np.sign(b1 * m + (1 - b1) * g)
        average("m", g, b2)
        return theta
    raise NotImplementedError(name)


def muon_rule(optimizer, W, g, memory):
    """One step of Muon on a single matrix W, float64."""
    o = optimizer
    m = memory["m"] = o.momentum * memory.get("m", np.zeros_like(W)) + (1 - o.momentum) * g
    u = (1 - o.momentum) * g + o.momentum * m if o.nesterov else m
    tall = u.shape[0] > u.shape[1]
    x = u.T if tall else u
    x = x / max(np.sqrt((x**2).sum()), o.eps)
    a, b, c = o.ns_coefficients
    for _ in range(o.ns_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    n_out, n_in = W.shape
    adjust = 0.2 * math.sqrt(max(W.shape)) if o.adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, n_out / n_in))
    return W - o.lr * o.weight_decay * W - o.lr * adjust * (x.T if tall else x)


# --- dropout -----------------------------------------------------------------------------------------------------


def philox_words(counter, key):
    """Philox-4x32-10 in Python's integers: four 32-bit words from a counter of four and a key of two."""
    c, k, low = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & low, (p0 >> 32) ^ c[3] ^ k[1], p0 & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return tuple(c)


def dropout_bits(seed, layer, round_, row, columns):
    """The 16-bit numbers of a row's first ``columns`` entries: eight from each call's four words, low half first."""
    bits = []
    for call in range(-(-columns // 8)):
        counter = (call, row, layer + ((round_ >> 32) << 16), round_ & 0xFFFFFFFF)
        for word in philox_words(counter, (seed & 0xFFFFFFFF, seed >> 32)):
            bits += [word & 0xFFFF, word >> 16]
    return np.array(bits[:columns], np.int64)


def dropout_factor(rate, seed, layer, round_, shape, first_row=0):
    """The matrix that dropout multiplies h with: 0 or 1 / keep, where keep is 1 − rate in whole 65536ths."""
    kept = round((1 - rate) * 65536)
    factor = np.zeros(shape)
    for i, row in enumerate(factor):
        row[dropout_bits(seed, layer, round_, first_row + i, len(row)) < kept] = 65536 / kept
    return factor
