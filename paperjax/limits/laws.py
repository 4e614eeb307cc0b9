"""By which law the entries of each leaf are drawn: exact, read from the jaxpr of ``init``, or declared."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paperjax.binding import nearest
from paperjax.limits.entries import Draw, Given, Haar, Number, Random, Unread, Value, base_moments
from paperjax.limits.keys import share
from paperjax.limits.reader import read_entries
from paperjax.model import Model, batch_form


class Law(NamedTuple):
    """The law of each entry of a leaf at initialization; the entries are independent, but for those of an orthogonal matrix.

    Attributes
    ----------
    kind
        ``"normal"``, ``"truncated_normal"``, ``"uniform"``, ``"orthogonal"``, ``"constant"`` (one number, variance 0), ``"given"``
        (numbers that are not drawn and differ from entry to entry: the leaf is ``model.init`` of any key), or ``"other"`` (mean and
        variance are known, and `detail` says what it is).
    mean, variance
        Of one entry, after every cut and scale, as float64. NaN for ``"given"``.
    detail
        The law in words.

    Notes
    -----
    `paperjax.trace` has a law of its own, of all that a parametrization needs: mean and standard deviation.

    Examples
    --------
    >>> normal(0.25)
    Law(kind='normal', mean=0.0, variance=0.25, detail='normal of variance 0.25')
    """

    kind: str
    mean: float
    variance: float
    detail: str = ""

    @property
    def gaussian(self) -> bool:
        """Whether finitely many entries are jointly normal: a normal law, or one number (a normal of variance 0)."""
        return self.kind == "normal" or self.variance == 0

    @property
    def std(self) -> float:
        """Standard deviation of an entry."""
        return math.sqrt(self.variance)


def normal(variance: float, mean: float = 0.0) -> Law:
    """Normal entries.

    Parameters
    ----------
    variance, mean
        Of an entry: for a layer of He's, ``2 / fan_in``.

    Returns
    -------
    Law
        A constant where `variance` is 0.

    Raises
    ------
    ValueError
        If `variance` is negative, or a number is not finite.
    TypeError
        If a number is none.

    Examples
    --------
    >>> normal(1 / 64).std
    0.125
    """
    variance, mean = _number("normal", "variance", variance, at_least=0.0), _number("normal", "mean", mean)
    return _law(Draw("normal", 0, frozenset(), math.sqrt(variance), mean))._replace(variance=variance)


def uniform(low: float, high: float) -> Law:
    """Uniform entries on (low, high): mean ``(low + high) / 2``, variance ``(high - low)² / 12``.

    Raises
    ------
    ValueError
        If `low` is above `high`, or one is not finite.
    TypeError
        If one is no number.

    Examples
    --------
    >>> uniform(-3.0, 3.0).variance
    3.0
    """
    low, high = _number("uniform", "low", low), _number("uniform", "high", high)
    if low > high:
        raise ValueError(f"uniform: low = {low} is above high = {high}.")
    return _law(Draw("uniform", 0, frozenset(), high - low, low))


def truncated_normal(*, variance: float | None = None, scale: float | None = None, low: float = -2.0, high: float = 2.0) -> Law:
    """Entries ``scale · Z``, Z standard normal and kept between `low` and `high`.

    With ``Z = Phi(high) - Phi(low)`` and ``m = (phi(low) - phi(high)) / Z`` the mean is ``scale · m`` and the variance ``scale² (1 + (low
    phi(low) - high phi(high)) / Z - m²)``. At the default cut of ±2 that is ``(0.87962566103423978 scale)²``, mean 0.

    Parameters
    ----------
    variance
        Of an entry after the cut, as in ``jax.nn.initializers.variance_scaling`` (`lecun_normal`, ...).
    scale
        Or the std of the normal before the cut, as in ``jax.nn.initializers.truncated_normal(stddev)``. Give one of the two.
    low, high
        Where it is cut, in standard deviations of the normal: entries lie between ``scale · low`` and ``scale · high``.

    Raises
    ------
    ValueError
        If both or none of `variance` and `scale` are given, one is negative or not finite, or `low` is not below `high`.
    TypeError
        If one is no number.

    Examples
    --------
    >>> round(truncated_normal(scale=1.0).std, 12)
    0.879625661034
    >>> truncated_normal(variance=0.25).detail
    'normal of std 0.568424 cut at -1.13685 and 1.13685'
    """
    low, high = _number("truncated_normal", "low", low, finite=False), _number("truncated_normal", "high", high, finite=False)
    if low >= high:
        raise ValueError(f"truncated_normal: low = {low} is not below high = {high}.")
    if (variance is None) == (scale is None):
        raise ValueError(
            "truncated_normal: give variance= (of an entry, after the cut) or scale= (std of the normal before it), one of them."
        )
    if variance is not None:
        variance = _number("truncated_normal", "variance", variance, at_least=0.0)
        scale = math.sqrt(variance / base_moments("truncated_normal", low, high)[1])
    scale = _number("truncated_normal", "scale", scale, at_least=0.0)
    law = _law(Draw("truncated_normal", 0, frozenset(), scale, 0.0, low, high))
    return law if variance is None else law._replace(variance=variance)


def constant(value: float) -> Law:
    """All entries one number.

    Raises
    ------
    ValueError
        If it is not finite.
    TypeError
        If it is no number.

    Examples
    --------
    >>> constant(0.0).gaussian
    True
    """
    return _law(Number(_number("constant", "value", value)))


def orthogonal(gain: float, longer: int) -> Law:
    """`gain` times a uniformly drawn matrix with orthonormal rows or columns: entries of mean 0 and variance ``gain² / longer``.

    Parameters
    ----------
    gain
        The `scale` of ``jax.nn.initializers.orthogonal``.
    longer
        The longer side of the matrix, ``max(fan_in, fan_out)``.

    Raises
    ------
    ValueError
        If `gain` is negative or not finite, or `longer` below 1.
    TypeError
        If one is no number.

    Examples
    --------
    >>> orthogonal(2.0, 64).variance
    0.0625
    """
    gain = _number("orthogonal", "gain", gain, at_least=0.0)
    return _law(Haar(gain, int(_number("orthogonal", "longer", longer, at_least=1.0)), frozenset()))


def leaf_laws(model: Model, x: Any, declared: Mapping[str, Law] | None = None) -> dict[str, Law]:
    """The law of each leaf of floating-point numbers, trained or `Frozen`, of a model at initialization.

    The jaxpr of ``init`` is read, with shapes alone: a normal, uniform, truncated normal or orthogonal draw is recognised and its scales
    and shifts are followed in float64, and a float32 constant of the code counts as the simplest number that rounds to it (``1 / 3``,
    ``sqrt(2)``, ``0.02``). So variances are those of the formula that was written, not of its float32 rounding; nor of the few levels
    of a bfloat16 draw. Sums of independent normals, and arrays joined of parts of one law, have that law; functions of one draw, sums and
    products of independent ones, and parts with different laws are ``"other"``. The variance of a nonlinear function of a draw comes from
    quadrature: to about 1e-9 where it is smooth, 1e-5 where it has kinks, 1e-3 where it jumps.

    Parameters
    ----------
    model
        The network. A plan's, ``plan.model``, has its scales of the initialization in ``init``.
    x
        A batch, or its ``jax.ShapeDtypeStruct``.
    declared
        ``{path: law}`` of leaves that cannot be read, or are to be taken for something else; nothing is read of those.

    Returns
    -------
    dict
        From paths as ``jax.tree_util.keystr`` writes them to laws, in the order of the leaves.

    Notes
    -----
    Keys are followed to tell independent leaves from dependent ones: ``split(key, 2)[1]``, ``split(key, 3)[1]`` and ``fold_in(key, 1)``
    are one key. Slices of one draw are independent where they lie apart and were cut in one place, before it was moved. Keys in which a
    number that is traced was folded in, and more than 4096 at once, count as different from others.

    Raises
    ------
    ValueError
        If a law cannot be read, entries of a leaf repeat one draw, or two leaves are drawn with one key, so that their entries are not
        independent; the message names each leaf, what was met there, and what to write. If `declared` names an unknown leaf.
    TypeError
        If `declared` is not a mapping from paths to laws, or `model` no `Model`.

    Examples
    --------
    >>> import flax.linen as nn, jax.numpy as jnp
    >>> from paperjax.model import as_model
    >>> for path, law in leaf_laws(as_model(nn.Dense(8)), jnp.ones((2, 3))).items():
    ...     print(path, law.kind, law.mean, round(law.variance, 12))
    ['bias'] constant 0.0 0.0
    ['kernel'] truncated_normal 0.0 0.333333333333
    """
    if not isinstance(model, Model):
        raise TypeError(f"leaf_laws takes a Model, not a {type(model).__name__}: pj.as_model(network), or family(width=...).")
    key = jax.eval_shape(lambda: jax.random.key(0))
    jaxpr, params = jax.make_jaxpr(model.init, return_shape=True)(key, batch_form(x))
    at = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    found = {path: (leaf, value) for (path, leaf), value in zip(at, read_entries(jaxpr)) if jnp.issubdtype(leaf.dtype, jnp.inexact)}
    declared = _declared(declared, found)
    open_leaves = {path: told for path, told in found.items() if path not in declared}
    wrong = {path: _why(value) for path, (_, value) in open_leaves.items()}
    wrong = {path: why for path, why in wrong.items() if why} or _sharing({path: value for path, (_, value) in open_leaves.items()})
    if wrong:
        lines = "".join(f"\n  {path} {tuple(found[path][0].shape)}: {why}" for path, why in _few(list(wrong.items())))
        lines += f"\n  and {len(wrong) - FEW} more." if len(wrong) > FEW else ""
        paste = ", ".join(f'"{path}": pj.limits.normal({_variance(found[path][0].shape)})' for path in _few(list(wrong)))
        paste += ", ..." if len(wrong) > FEW else ""
        raise ValueError(
            f"The law of {len(wrong)} of the {len(found)} leaves cannot be taken from init.{lines}\nDeclare what is so, the variance being "
            f"that of one entry: laws={{{paste}}}; for pj.limit, where it falls with the width, laws=lambda width: {{...}}. "
            "Or draw entries independently, each leaf with a key of its own, by jax.random.normal or "
            "jax.nn.initializers."
        )
    return {path: declared.get(path) or _law(value) for path, (_, value) in found.items()}


FEW = 8
"""Leaves that a message names."""


def _few(names: Sequence[Any]) -> Sequence[Any]:
    return names[:FEW]


ROUNDING = 1e-12
"""A mean of this part of the standard deviation is 0."""


def _law(value: Value) -> Law:
    if isinstance(value, Number):
        return Law("constant", value.value, 0.0, f"the number {value.value:.6g}")
    if isinstance(value, Given):
        return Law("given", math.nan, math.nan, "numbers that are not drawn, and differ from entry to entry")
    assert isinstance(value, Random)
    mean, variance = value.moments
    if abs(mean) <= ROUNDING * math.sqrt(variance):
        # Of a symmetric law whose moments are found by quadrature.
        mean = 0.0
    if variance == 0:
        return Law("constant", mean, 0.0, f"the number {mean:.6g}")
    kind = value.base if isinstance(value, Draw) else "orthogonal" if isinstance(value, Haar) else "other"
    return Law(kind, mean, variance, str(value))


def _why(value: Value) -> str:
    """Why a value is no law."""
    if isinstance(value, Random):
        return "entries of it repeat one draw (a broadcast, or layers with one key), so they are not independent" if value.repeated else ""
    if isinstance(value, Number):
        return "" if math.isfinite(value.value) else f"every entry is {value.value}"
    if isinstance(value, Given):
        return ""
    return value.why if isinstance(value, Unread) else "it holds random bits, a key or the triangle of a QR decomposition"


def _sharing(values: Mapping[str, Value]) -> dict[str, str]:
    """Leaves that are drawn with the key of another."""
    drawn = [(path, value.sources) for path, value in values.items() if isinstance(value, Random)]
    users: dict[int, list[int]] = {}
    for i, (_, sources) in enumerate(drawn):
        for root in {source.root for source in sources}:
            users.setdefault(root, []).append(i)
    pairs = {pair for among in users.values() for pair in itertools.combinations(among, 2)}
    others: dict[int, list[int]] = {}
    for i, j in sorted(pairs):
        if share(drawn[i][1], drawn[j][1]):
            others.setdefault(i, []).append(j)
            others.setdefault(j, []).append(i)
    return {
        drawn[i][0]: f"drawn with the same key as {', '.join(drawn[j][0] for j in _few(among))}"
        f"{f' and {len(among) - FEW} more' if len(among) > FEW else ''}, so they are not independent"
        for i, among in sorted(others.items())
    }


def _variance(shape: tuple[int, ...]) -> str:
    return f"1 / {math.prod(shape[:-1])}" if len(shape) > 1 else "1.0"


def _declared(declared: Any, known: Mapping[str, Any]) -> dict[str, Law]:
    if declared is None:
        return {}
    if not isinstance(declared, Mapping):
        raise TypeError(f'laws = {declared!r}: give {{path: law}}, such as {{"{next(iter(known), "")}": pj.limits.normal(1 / 64)}}.')
    for path, law in declared.items():
        if path not in known:
            raise ValueError(f"laws names a leaf {path!r} that is not there. {nearest(str(path), known)}")
        if not isinstance(law, Law):
            raise TypeError(f"laws[{path!r}] is {law!r}, a {type(law).__name__}, and must be a law: pj.limits.normal(variance), ...")
    return dict(declared)


def _number(where: str, name: str, value: Any, at_least: float = -math.inf, finite: bool = True) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__") or getattr(value, "ndim", 0):
        raise TypeError(f"{where}: {name} = {value!r} is no number.")
    number = float(value)
    if math.isnan(number) or (finite and math.isinf(number)) or number < at_least:
        bound = f" of at least {at_least:g}" if at_least > -math.inf else ""
        raise ValueError(f"{where}: {name} = {number}, and must be a finite number{bound}.")
    return number


def effective_variances(laws: Sequence[tuple[Law | None, ...]], widths: Sequence[int], at: int) -> list[float]:
    """Variances at a width `at` whose products with powers of it are those of infinite width.

    ``v(n) = c n^-p (1 + a/n + ...)`` with 2p whole: exact powers are taken as they are; of others (``2 / (n + d)``) c is extrapolated from
    the last two of `widths`.
    """
    found = []
    for several in zip(*laws):
        v = [math.nan if law is None or math.isnan(law.variance) else law.variance for law in several]
        if any(math.isnan(x) for x in v) or not all(v):
            found.append(v[0])
            continue
        power = math.log(v[-1] / v[-2]) / math.log(widths[-1] / widths[-2])
        clean = round(2 * power) / 2
        first = math.log(v[1] / v[0]) / math.log(widths[1] / widths[0])
        if abs(first - clean) < 1e-9:
            found.append(v[0] * (at / widths[0]) ** clean)
            continue
        c1, c2 = v[-2] * float(widths[-2]) ** -clean, v[-1] * float(widths[-1]) ** -clean
        ratio = widths[-1] / widths[-2]
        found.append((ratio * c2 - c1) / (ratio - 1) * float(at) ** clean)
    return found
