"""Generated classification tasks, as functions of a key: XOR clusters, modular arithmetic, sparse parity.

Sizes are static, so a function can be traced, jitted and vmapped over the key and over what may be traced. Arrays have JAX's
default floating-point type: float32, or float64 in x64 mode. Except where the examples are all there are, those for training
do not depend on `n_test`. Labels ±1 have shape ``(n, 1)``, that of a network's one output.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from paperjax.data.dataset import Dataset
from paperjax.data.draws import check_between, check_sizes, labelled

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"+": np.add, "-": np.subtract, "*": np.multiply}


def xor_clusters(key: PRNGKeyArray, n_train: int, n_test: int, dim: int, mean_norm: Any, flip: Any = 0.0) -> Dataset:
    """Four Gaussian clusters with the labels of XOR, some training labels flipped (Xu et al., arXiv 2310.02541).

    ``x ~ (1/4) sum_{mu in {mu1, -mu1, mu2, -mu2}} N(mu, I)``, ``mu1 ⟂ mu2``, ``|mu1| = |mu2| = mean_norm``; the clean label is
    +1 for ±mu1 and -1 for ±mu2.

    Parameters
    ----------
    key
        Randomness.
    n_train, n_test, dim
        Sizes, static; `dim` at least 2.
    mean_norm
        ``|mu|``; at 0 there are no clusters, and labels are coin flips that have nothing to do with the inputs. May be
        traced.
    flip
        Probability that a training label is flipped; test labels are clean. May be traced.

    Returns
    -------
    Dataset
        x ``(n, dim)``, y ``(n, 1)`` ±1. ``mu1 = mean_norm e_1``, ``mu2 = mean_norm e_2``: the noise is isotropic, so any other
        orthogonal pair is a rotation of this one. Inputs and clean labels do not depend on `flip`: the clean training
        labels are those of the same key with ``flip=0``.

    Raises
    ------
    ValueError
        If a size is no whole number in range, `mean_norm` is negative, or `flip` no probability.

    Examples
    --------
    >>> key = jax.random.key(0)
    >>> noisy = xor_clusters(key, 100, 2, dim=3, mean_norm=5.0, flip=0.1)
    >>> clean = xor_clusters(key, 100, 2, dim=3, mean_norm=5.0)
    >>> bool(jnp.all(noisy.x_train == clean.x_train)), int(jnp.sum(noisy.y_train != clean.y_train))
    (True, 9)
    """
    check_sizes("xor_clusters", n_train=n_train, n_test=n_test, dim=dim)
    check_between("xor_clusters", "mean_norm", mean_norm, 0.0, math.inf)
    check_between("xor_clusters", "flip", flip, 0.0, 1.0)
    if dim < 2:
        raise ValueError(f"xor_clusters: dim = {dim} has no room for two orthogonal means; give dim >= 2.")
    k_train, k_test, k_flip = jax.random.split(key, 3)
    dtype = jnp.zeros(()).dtype

    def draw(key: PRNGKeyArray, n: int) -> tuple[Array, Array]:
        k_label, k_sign, k_noise = jax.random.split(key, 3)
        y, sign = jax.random.rademacher(k_label, (n, 1), dtype), jax.random.rademacher(k_sign, (n, 1), dtype)
        mean = sign * jnp.asarray(mean_norm).astype(dtype) * jnp.concatenate([y > 0, y < 0], axis=1).astype(dtype)
        return jax.random.normal(k_noise, (n, dim), dtype).at[:, :2].add(mean), y

    (x_train, y_train), (x_test, y_test) = draw(k_train, n_train), draw(k_test, n_test)
    flipped = jax.random.uniform(k_flip, (n_train, 1), dtype) < jnp.asarray(flip).astype(dtype)
    return Dataset(x_train, jnp.where(flipped, -y_train, y_train), x_test, y_test, "xor clusters", "generated, arXiv 2310.02541")


def modular_arithmetic(
    key: PRNGKeyArray,
    p: int,
    operation: Literal["+", "-", "*", "/"] | Callable[[Any, Any], Any] = "+",
    train_fraction: float = 0.5,
    encoding: Literal["one_hot", "tokens"] = "one_hot",
) -> Dataset:
    """All pairs (a, b) modulo p and ``y = a ∘ b mod p``, a random share of them for training (Power et al., arXiv 2201.02177).

    Parameters
    ----------
    key
        Which pairs are for training.
    p
        Modulus, static.
    operation
        "+", "-", "*", or "/" (``a b^-1``; p must be prime, and the pairs with b = 0 are left out); or a function of two
        arrays of integers, of which the remainder modulo p is taken.
    train_fraction
        Share of the pairs for training, static.
    encoding
        "one_hot": the rows ``e_a`` and ``e_b`` side by side. "tokens": the integers a and b.

    Returns
    -------
    Dataset
        x ``(pairs, 2 p)``, or int32 ``(pairs, 2)``; y int32 ``(pairs,)`` in 0..p-1. The training examples are
        ``round(train_fraction * pairs)`` of the p² pairs (p² - p for "/"), the test examples all the others.

    Raises
    ------
    ValueError
        If `p` is below 2 (or not prime for "/"), the operation or encoding is unknown, or the fraction leaves no training
        example.

    Examples
    --------
    >>> modular_arithmetic(jax.random.key(0), 5)
    Dataset a + b mod 5: 12 train, 13 test, x (10,) float32, y () int32; generated, arXiv 2201.02177
    """
    check_sizes("modular_arithmetic", p=p)
    if p < 2:
        raise ValueError(f"modular_arithmetic: p = {p}, but arithmetic modulo p needs p >= 2.")
    if encoding not in ("one_hot", "tokens"):
        raise ValueError(f"modular_arithmetic: encoding = {encoding!r} must be 'one_hot' or 'tokens'.")
    a, b = (grid.reshape(-1) for grid in np.divmod(np.arange(p * p), p))
    if callable(operation):
        symbol, y = getattr(operation, "__name__", "∘"), operation(a, b) % p
    elif operation == "/":
        if any(p % d == 0 for d in range(2, math.isqrt(p) + 1)):
            raise ValueError(
                f"modular_arithmetic: p = {p} is not prime, so not every b has an inverse and '/' makes no sense. Give a prime."
            )
        inverse = np.array([0] + [pow(c, -1, p) for c in range(1, p)])
        a, b = a[b != 0], b[b != 0]
        symbol, y = "/", a * inverse[b] % p
    elif operation in _OPERATIONS:
        symbol, y = operation, _OPERATIONS[operation](a, b) % p
    else:
        raise ValueError(
            f"modular_arithmetic: unknown operation {operation!r}. Give one of + - * /, or a function of two arrays of integers."
        )
    n_train = round(train_fraction * len(y))
    if not 1 <= n_train <= len(y):
        raise ValueError(
            f"modular_arithmetic: train_fraction = {train_fraction} of {len(y)} pairs is {n_train} examples; it must lie in (0, 1]."
        )
    order = jax.random.permutation(key, len(y))
    tokens = jnp.asarray(np.stack([a, b], axis=1), jnp.int32)[order]
    x = tokens if encoding == "tokens" else jax.nn.one_hot(tokens, p).reshape(len(y), 2 * p)
    y = jnp.asarray(y, jnp.int32)[order]
    return Dataset(x[:n_train], y[:n_train], x[n_train:], y[n_train:], f"a {symbol} b mod {p}", "generated, arXiv 2201.02177")


def sparse_parity(key: PRNGKeyArray, n_train: int, n_test: int, dim: int, k: int) -> Dataset:
    """Parity of the first k of `dim` bits: ``x`` uniform on {±1}^dim, ``y = x_1 x_2 ... x_k`` (Barak et al., arXiv 2207.08799).

    Returns
    -------
    Dataset
        x ``(n, dim)`` and y ``(n, 1)``, ±1. Which k bits makes no difference to a network whose initialization treats all alike.

    Raises
    ------
    ValueError
        If a size is no whole number in range, or k is above `dim`.

    Examples
    --------
    >>> sparse_parity(jax.random.key(0), 8, 2, dim=6, k=3).y_test.shape
    (2, 1)
    """
    check_sizes("sparse_parity", n_train=n_train, n_test=n_test, dim=dim, k=k)
    if k > dim:
        raise ValueError(f"sparse_parity: k = {k} of dim = {dim} bits: the parity takes more bits than there are. Give k <= dim.")

    def bits(key: PRNGKeyArray, n: int) -> Array:
        return jax.random.rademacher(key, (n, dim), jnp.zeros(()).dtype)

    return labelled(key, n_train, n_test, bits, lambda x: jnp.prod(x[:, :k], axis=1), f"({dim}, {k}) parity", "generated, arXiv 2207.08799")
