"""Train a network within a random subspace of its parameters (Li et al., arXiv 1804.08838)."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Integer, Key, PRNGKeyArray, PyTree, UInt32

from paperjax.model import Frozen, Model, join, split


class Projection(NamedTuple):
    """A random D x d matrix P with unit-norm columns, held as few numbers as its law allows.

    Attributes
    ----------
    draw
        ``(key, d, D, dtype) -> arrays``. Column j depends on the key and on j alone, so a wider P starts with the
        columns of a narrower one.
    act
        ``(arrays, u, D) -> P u``, a vector of length D.

    Examples
    --------
    >>> arrays = dense.draw(jax.random.key(0), 3, 100, jnp.float32)
    >>> column = dense.act(arrays, jnp.array([0.0, 1.0, 0.0]), 100)
    >>> column.shape, round(float(jnp.linalg.norm(column)), 4)
    ((100,), 1.0)
    """

    draw: Callable[..., PyTree]
    act: Callable[..., Array]


def _column_keys(key: PRNGKeyArray, d: int) -> Key[Array, "d"] | UInt32[Array, "d words"]:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(d))


def _draw_dense(key: PRNGKeyArray, d: int, D: int, dtype: Any) -> Float[Array, "d D"]:
    P_dxD = jax.vmap(lambda key: jax.random.normal(key, (D,), dtype))(_column_keys(key, d))
    return P_dxD / jnp.linalg.norm(P_dxD, axis=1, keepdims=True)


def _act_dense(P_dxD: Array, u_d: Array, D: int) -> Float[Array, "D"]:
    return u_d @ P_dxD


def _draw_sparse(key: PRNGKeyArray, d: int, D: int, dtype: Any) -> dict[str, Array]:
    K = round(math.sqrt(D))
    # Integer arithmetic in Python: i * D passes 2^31 long before D does.
    edges = jnp.array([i * D // K for i in range(K + 1)])

    def column(key: PRNGKeyArray) -> dict[str, Array]:
        key_row, key_sign = jax.random.split(key)
        return {
            "row": jax.random.randint(key_row, (K,), edges[:-1], edges[1:]),
            "value": jax.random.rademacher(key_sign, (K,), dtype) * jnp.asarray(K**-0.5, dtype),
        }

    return jax.vmap(column)(_column_keys(key, d))


def _act_sparse(columns: dict[str, Array], u_d: Array, D: int) -> Float[Array, "D"]:
    return jnp.zeros((D,), u_d.dtype).at[columns["row"]].add(columns["value"] * u_d[:, None])


def _draw_fastfood(key: PRNGKeyArray, d: int, D: int, dtype: Any) -> dict[str, Array]:
    n = _padded(D)
    key_sign, key_order, key_gauss = jax.random.split(key, 3)
    g_n = jax.random.normal(key_gauss, (n,), dtype)
    # Each column of H G Pi H B has squared norm n |g|^2, of which the first D of n rows keep D / n.
    scale = jnp.asarray((D / n) ** -0.5 * n**-0.5, dtype) / jnp.linalg.norm(g_n)
    return {"sign": jax.random.rademacher(key_sign, (n,), dtype), "order": jax.random.permutation(key_order, n), "gauss": scale * g_n}


def _act_fastfood(diagonals: dict[str, Array], u_d: Array, D: int) -> Float[Array, "D"]:
    v_n = jnp.pad(u_d, (0, diagonals["sign"].size - u_d.size))
    v_n = walsh_hadamard(diagonals["sign"] * v_n)[diagonals["order"]]
    return walsh_hadamard(diagonals["gauss"] * v_n)[:D]


def _padded(D: int) -> int:
    return 1 << (D - 1).bit_length()


def walsh_hadamard(v: Float[Array, "n"]) -> Float[Array, "n"]:
    """Walsh–Hadamard transform ``H v`` in n log2 n additions, for n a power of two; H is Sylvester's, unnormalised.

    Examples
    --------
    >>> walsh_hadamard(jnp.array([1.0, 0.0, 2.0, 0.0])).tolist()
    [3.0, 3.0, -1.0, -1.0]
    """
    n = v.size
    if n != _padded(n):
        raise ValueError(f"walsh_hadamard: the vector has {n} entries, which is not a power of two. Pad it with zeros to {_padded(n)}.")
    half = 1
    while half < n:
        pairs = v.reshape(-1, 2, half)
        v = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(n)
        half *= 2
    return v


dense = Projection(_draw_dense, _act_dense)
"""Independent Gaussian columns over their norms, which are then exactly 1. O(dD) time and memory."""

sparse = Projection(_draw_sparse, _act_sparse)
"""Columns of K = round(sqrt D) entries +-K^-1/2, so of norm exactly 1. O(d sqrt D) time and memory.

Li, Hastie and Church (KDD 2006) take each entry nonzero with probability D^-1/2 independently. Here each column has one
nonzero entry in each of K equal stretches of rows: the same density, and a shape that does not depend on the draw."""

fastfood = Projection(_draw_fastfood, _act_fastfood)
"""The first D rows and d columns of ``H G Pi H B / (|g| sqrt D)`` (Le, Sarlos and Smola, arXiv 1408.3060).

H is the Walsh–Hadamard matrix of n = D padded to a power of two, B random signs, Pi a permutation, G = diag(g) Gaussian.
O(D log D) time and O(D) memory whatever d is. Column norms are exactly 1 if D is a power of two; otherwise their square has
mean 1 and standard deviation about (2/D - 2/n)^1/2: 1% at D = 3,466."""

_NAMED = {"dense": dense, "sparse": sparse, "fastfood": fastfood}


def subspace(
    model: Model,
    d: int,
    *,
    projection: Literal["dense", "sparse", "fastfood"] | Projection = "dense",
    active: int | Integer[Array, ""] | Float[Array, ""] | None = None,
) -> Model:
    """Train only d coordinates in a random subspace: ``theta = theta_0 + P u``, P a random D x d matrix with unit-norm columns.

    theta is every trained parameter of `model` in one vector of length D, theta_0 its draw at init, and u, zero at
    init, is all that is trained. The least d that reaches 90% of what direct training does is the intrinsic dimension
    d_int90 of Li et al. (arXiv 1804.08838, eq. 2).

    Parameters
    ----------
    model
        The network. What it holds as `Frozen` stays out of theta.
    d
        Dimension of the subspace.
    projection
        Law of P: `dense` (Gaussian), `sparse` or `fastfood`, with their costs below; or another `Projection`.
    active
        If given, only the first `active` of the d coordinates act; the others stay at zero with zero gradient. With
        the same key, the network trained is the one of ``subspace(model, active)``, so a sweep over the dimension is
        a sweep over a scalar, which may be traced, in one compiled program.

    Returns
    -------
    Model
        Parameters ``u`` (d,), ``origin`` = Frozen(parameters of `model`), ``projection`` = Frozen(arrays).
        ``init(key, x)`` draws the origin as ``model.init(jax.random.split(key)[0], x)``.

    Raises
    ------
    ValueError
        If `projection` is unknown, d or active is below 1, active > d, or (at init) d > D or nothing is trained.
    TypeError
        If (at init) a trained parameter is complex.

    Notes
    -----
    Which projection to choose, for d coordinates of D parameters:

    ========  ===============  =================  ==========================
    law       memory           time of one P u    column norms
    ========  ===============  =================  ==========================
    dense     d D              d D                exactly 1
    sparse    2 d sqrt(D)      d sqrt(D)          exactly 1
    fastfood  3 D (padded)     D log D            1 in the mean, exactly for D a power of two
    ========  ===============  =================  ==========================

    `sparse` is the one to start with: a gradient step on an mlp(200, 2) for MNIST (D = 199,210), d = 750, batch 256, takes
    27 ms dense, 4 ms sparse and 8 ms fastfood on two CPU cores, and 2.4 ms without a projection. u has the widest dtype
    among the trained parameters.

    Examples
    --------
    >>> from paperjax.model import check_model, count
    >>> from paperjax.models import mlp
    >>> model = subspace(mlp(200, 2), 750, projection="fastfood")
    >>> params, y = check_model(model, jnp.ones((1, 784)))
    >>> count(params), count(params["origin"].value)
    (750, 199210)
    """
    law = _NAMED.get(projection) if isinstance(projection, str) else projection
    if law is None:
        raise ValueError(f"subspace: projection = {projection!r} is not a law of P. Give one of {', '.join(map(repr, _NAMED))}.")
    _check_dimension("d", d)
    if active is not None and not isinstance(active, Tracer) and _check_dimension("active", active) > d:
        raise ValueError(f"subspace: active = {active} of d = {d} coordinates. Let d be the largest of the sweep over active.")

    def init(key: PRNGKeyArray, x: Array | np.ndarray) -> PyTree:
        key_origin, key_projection = jax.random.split(key)
        origin = model.init(key_origin, x)
        leaves = jax.tree.leaves(split(origin)[0])
        D = sum(jnp.size(leaf) for leaf in leaves)
        if not leaves:
            raise ValueError("subspace: the model has no trained parameter, so there is nothing to project on. Is all of it Frozen?")
        if d > D:
            raise ValueError(
                f"subspace: d = {d} exceeds the D = {D} trained parameters of the model. The columns of P would be dependent: "
                f"nothing is reached that d = {D} does not reach. Give d <= {D}, or a wider network."
            )
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*leaves)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"subspace: a trained parameter has dtype {dtype}, but P is real. Train its real and imaginary parts as two leaves."
            )
        return {"u": jnp.zeros((d,), dtype), "origin": Frozen(origin), "projection": Frozen(law.draw(key_projection, d, D, dtype))}

    def apply(params: PyTree, x: Array | np.ndarray) -> Array:
        u_d = params["u"]
        if active is not None:
            u_d = jnp.where(jnp.arange(d) < jnp.asarray(active).astype(int), u_d, jnp.zeros_like(u_d))
        trained, given = split(params["origin"].value)
        D = sum(jnp.size(leaf) for leaf in jax.tree.leaves(trained))
        return model.apply(join(_add(trained, law.act(params["projection"].value, u_d, D)), given), x)

    return Model(init, apply)


def _add(tree: PyTree, v_D: Float[Array, "D"]) -> PyTree:
    """``tree + v``, v cut along the leaves in the order of the flattened tree."""
    leaves, structure = jax.tree.flatten(tree)
    ends = [sum(jnp.size(leaf) for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    parts = [v_D[end - jnp.size(leaf) : end].reshape(jnp.shape(leaf)) for leaf, end in zip(leaves, ends)]
    return structure.unflatten([leaf + part.astype(jnp.result_type(leaf)) for leaf, part in zip(leaves, parts)])


def _check_dimension(name: str, value: Any) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        whole = int(value) if float(value).is_integer() else 0
    if whole < 1 or isinstance(value, bool):
        raise ValueError(f"subspace: {name} = {value!r}, but a dimension is a whole number of at least 1. d = 0 is the untrained network.")
    return whole
