"""`limit`: the infinite-width limit of any network, from its trace."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from paperjax.devices import device_budget, devices_of, keep_freed_memory
from paperjax.kernels.store import Store, fingerprint, trace_fingerprint
from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd
from paperjax.limits import program as pg
from paperjax.limits.asked import WIDTH, batches, declared, drawn, drawn_finely, named, of_gradient_descent, options, widths
from paperjax.limits.audit import audit, audit_noise, check_result
from paperjax.limits.draws import GROUPS, Draws
from paperjax.limits.laws import Law, effective_variances
from paperjax.limits.program import Program
from paperjax.limits.tiles import kernels
from paperjax.model import Family, batch_form, family
from paperjax.parametrization import Parametrization, plan


class Limit(NamedTuple):
    """Kernels at infinite width.

    Attributes
    ----------
    nngp
        Covariance of an output at init between all pairs of examples, ``(N, M)``. Outputs along an axis of the readout are independent
        and have one law, so they share it; positions of the output come after the examples, ``(N, M, *positions, *positions)``.
    ntk
        The neural tangent kernel, of the same form; with ``per="leaf"`` one for each path. ``None`` if it was not asked for.
    program
        What was read; see `paperjax.limits.program.Program`.
    error
        Standard errors of `nngp` and of `ntk`, of their forms, where expectations were drawn by Monte Carlo; else ``None``.

    Notes
    -----
    Kernels are JAX's arrays if ``jax_enable_x64`` is on or they are in single precision, else NumPy's, in double all the same; traced
    ones are then in single.

    Examples
    --------
    >>> Limit(jnp.eye(2), jnp.eye(2), None).nngp.shape
    (2, 2)
    """

    nngp: Float[Array | np.ndarray, "..."]
    ntk: Any
    program: Any
    error: Any = None


def limit(
    fam: Family | Any,
    x1: Any,
    x2: Any = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    wide: Sequence[str] | None = None,
    at: Mapping[str, Any] | None = None,
    parametrization: Parametrization | None = None,
    base: Mapping[str, Any] | None = None,
    optimizer: Any = "sgd",
    laws: Mapping[str, Law] | Callable[..., Mapping[str, Law]] | None = None,
    gaussian: bool = False,
    ntk: bool = True,
    per: str | None = None,
    key: Key[Array, ""] | None = None,
    samples: int | None = None,
    dtype: str = "float64",
    max_bytes: int | float | None = None,
    out: str | Path | None = None,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> Limit:
    """NNGP and NTK of a network at infinite width, read from its trace; nothing of the network is rewritten or annotated.

    A weight matrix with independent entries of variance ``s²`` that sums over a growing axis makes a Gaussian field, of covariance
    ``s² sum E[u u']`` over the coordinates u of what it multiplies; everything else acts on one coordinate, and means over a growing axis
    are expectations (the master theorem of Tensor Programs, arXiv 2006.14548). The tangent kernel
    ``sum_l lr_l <df(x)/dW_l, df(x')/dW_l>`` follows from the same graph, gradients being independent of the forward pass.

    Parameters
    ----------
    fam
        A `Family` of networks, or what `paperjax.family` takes; or the `program` of an earlier limit, for other examples of the same
        shape: neither traced nor, for as many of them, compiled again. What describes the network is then not given.
    x1, x2
        Batches ``(N, *features)`` and ``(M, *features)``; without `x2` the kernel of `x1` with itself. Gradients with respect to them are
        finite, at coincident and opposite examples too.
    sizes
        The sizes that stay finite, such as ``dict(depth=8)``.
    wide
        Names of those that go to infinity; by default all that the family must be given and `sizes` does not name.
    at
        Values at which the wide ones are traced, and at twice and four times that; 1024 by default. Nothing is allocated.
    parametrization, base, optimizer
        A `Parametrization` for a plan from `base`, as in `paperjax.plan`: the limit is then of the network under the plan, and each leaf
        counts with its factor of the learning rate. A network of standard parametrization has no finite tangent kernel under one
        learning rate; under ``pj.ntp`` it has.
    laws
        ``{path: pj.limits.normal(variance)}`` for leaves whose law ``init`` does not tell, or that are to have another; such a law is that
        of every width. Where a variance falls with the width, a function of sizes, ``lambda width: {path: pj.limits.normal(2 / width)}``.
    gaussian
        Take the Gaussian of equal variance for leaves that are drawn otherwise and whose law survives in the limit (a truncated normal
        first layer), or in half precision, whose draws have a mean that is not 0.
    ntk
        Whether to compute the tangent kernel.
    per
        ``"leaf"``: the contribution of each leaf to the tangent kernel.
    key, samples
        Given both, expectations that have no exact rule are drawn: of attention with logits over ``sqrt(d)`` as the number of heads grows
        (the size of a head being fixed; Hron et al., arXiv 2006.10540), max pooling, maxout, products of functions of fields that depend
        on each other, functions of more than four fields (an LSTM). `samples` draws in eight independent parts, whose mean is
        returned, with its standard error, which does not tell of the bias where drawn covariances are drawn from again (layers, steps): it
        falls as one over `samples`. Exact rules stay exact. Drawn kernels are symmetric, and definite up to that error; they have no
        gradients with respect to examples.
    dtype
        ``"float64"``, whatever the user's flag, or ``"float32"`` for speed and half the memory. There, what is of one example alone and
        pairs whose outputs have a correlation above 0.999, itself among them, are still computed in double precision, and so are all pairs
        of networks with a function that jumps (a sign, a step), which takes the root of rounding where examples are almost parallel or
        opposite.
    max_bytes
        Memory for the work besides the result; half of the device's by default. Pairs of examples are computed in tiles.
    out
        A folder for ``nngp.npy`` and ``ntk.npy``, filled tile by tile and taken up again where a run was stopped, with another `max_bytes`
        or `mesh` too: ``blocks.json`` says what is there. The kernels are then memory-mapped arrays, and need not fit in memory. Not for
        drawn ones.
    mesh
        A `jax.sharding.Mesh` of this process's devices: tiles are spread over them, and kernels are the same.
    progress
        Whether to show a bar; on a terminal if ``None``.

    Returns
    -------
    Limit

    Notes
    -----
    Where what enters a function is exactly 0 at init (an example or a position of zeros, in front of biases that start at 0), a slope that
    jumps there counts as its mean from both sides, 1/2 for relu, for which JAX takes 0: leaves that act there have another part in the
    tangent kernel than in that of a network of finite width.

    Raises
    ------
    NotImplementedError
        If the limit of something in the network is not known here: the message names the primitive and what is known about it.
    ValueError
        If the law of a leaf is not known or its Gaussian needs consent, the network has no width, kernels grow or fade with the width, a
        value that is taken for its mean does not settle, `x1` has a NaN, memory does not suffice, or `out` holds other kernels.

    Examples
    --------
    >>> def net(width):
    ...     def init(key, x):
    ...         u, v = jax.random.split(key)
    ...         return {"u": jax.random.normal(u, (x.shape[1], width)), "v": jax.random.normal(v, (width, 1))}
    ...     def apply(p, x):
    ...         return jax.nn.relu(x @ p["u"] / x.shape[1] ** 0.5) @ p["v"] * (2 / width) ** 0.5
    ...     return init, apply
    >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    >>> K = limit(net, x)
    >>> K.nngp.round(4).tolist(), K.ntk.round(4).tolist()  # 1 and 1/pi; twice 1 and 1/pi
    ([[1.0, 0.3183], [0.3183, 1.0]], [[2.0, 0.3183], [0.3183, 2.0]])
    """
    described = dict(sizes=sizes, wide=wide, at=at, parametrization=parametrization, base=base, laws=laws, key=key, samples=samples)
    x1, x2 = batches(x1, x2)
    rule = options(parametrization, base, optimizer, ntk, per, dtype, max_bytes)
    devices = devices_of(mesh, "limit", x1, x2)
    if isinstance(fam, Program):
        program, wider = _again(fam, x1, described), None
    else:
        fam = fam if isinstance(fam, Family) else family(fam)
        finite = named("sizes", sizes)
        growing = widths(fam, finite, wide, named("at", at))
        forms, draws = batch_form(x1), drawn(key, samples)
        program, wider = _programs(fam, forms, finite, growing, parametrization, base, (optimizer, rule), laws, gaussian, draws)
    wants = ntk and any(program.rates)
    if wants:
        of_gradient_descent(program.rule)
    if wants and program.shared:
        raise ValueError(
            f"pj.limit: {', '.join(program.shared)}: all coordinates share this leaf (a learned scale), so its part of "
            f"the tangent kernel is the "
            "square of a random function and does not settle at infinite width. Ask for ntk=False, or freeze it (pj.Frozen)."
        )
    if wants and program.by_hand:
        raise NotImplementedError(
            f"pj.limit: the derivative of {', '.join(program.by_hand)} was written by hand (jax.custom_vjp, jax.custom_jvp) and is another "
            "than that of what it computes (a straight-through estimator, a gradient that is reversed or clipped): the tangent kernel "
            "follows the function itself. Ask for ntk=False, or take the limit of the network with that function's own derivative."
        )
    if wants and program.stopped:
        raise NotImplementedError(
            "pj.limit: primitive stop_gradient: a gradient is stopped at a leaf or at wide values, and the tangent kernel of the rest is "
            "not followed. Freeze a leaf that is not trained (pj.Frozen) in place of stopping its gradient, or ask for ntk=False: what "
            "the network computes at init does not depend on it."
        )
    if wants and fl.is_bent(program.output):
        raise ValueError(
            "pj.limit: a nonlinear function of the readout is the output (tanh, sigmoid, a square, a product), whose slope is that of a "
            "random number, so the tangent kernel stays random at infinite width. Take the limit of the network without it (a loss can "
            "apply it), or ask for ntk=False: nngp is then the second moment of the output, which is not Gaussian."
        )
    budget = int(max_bytes) if max_bytes is not None else device_budget(devices or jax.local_devices())
    if max_bytes is None and (devices or jax.local_devices())[0].platform == "cpu":
        keep_freed_memory()
    if out is None:
        check_result(len(x1), len(x1 if x2 is None else x2), program, wants, per, dtype)
    traced = any(isinstance(x, Tracer) for x in (x1, x2))
    with pg.told(program.traced), contextlib.nullcontext() if traced else nd.numbers():
        if wider is not None:
            audit_noise(program, wider, x1)
        into = None if out is None else _files(Path(out), program, x1, x2, wants, per, traced)
        found = kernels(program, x1, x2, wants, per == "leaf", np.dtype(dtype), budget, progress, devices, into)
        if wider is not None:
            audit(program, wider, x1, x2, wants, found if per is None else None, dtype)

    def told(two: tuple[Any, ...]) -> tuple[Any, Any]:
        nngp, tangent = two if wants else (two[0], None)
        if per == "leaf" and tangent is not None:
            tangent = {path: tangent[:, :, i] for i, path in enumerate(program.paths) if program.rates[i]}
        return nngp, tangent

    if program.draws is None:
        return Limit(*told(found if out is not None else _for_the_user(found)), program)
    means, errors = map(_for_the_user, _estimates(found, program, per == "leaf"))
    return Limit(*told(means), program, told(errors))


def _files(
    folder: Path, program: Program, x1: Any, x2: Any, ntk: bool, per: str | None, traced: bool
) -> Callable[[Sequence[jax.ShapeDtypeStruct]], Store]:
    """Where kernels of given forms are written."""
    if traced:
        raise ValueError("pj.limit: out= is given in a function that is being traced: files are of numbers. Call limit outside of it.")
    if program.draws is not None:
        raise ValueError("pj.limit: out= is not for kernels that are drawn (key=, samples=): leave it out, and save what is returned.")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out = {str(folder)!r} is a file: name a folder, for nngp.npy and ntk.npy.")
    what = {
        "network": trace_fingerprint(program.traced.jaxpr),
        "laws": fingerprint(str(program.traced.laws), str(program.variances), str(program.rates)),
        "examples": fingerprint(x1, x2),
        "options": f"ntk={ntk}, per={per}",
    }

    def into(forms: Sequence[jax.ShapeDtypeStruct]) -> Store:
        if folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
        files = {name: (folder / f"{name}.npy", form) for name, form in zip(("nngp", "ntk"), forms)}
        # Tiles are small: noting every one of many thousands would take longer than computing it.
        return Store(folder / "blocks.json", files, what, x2 is None, every=1.0)

    return into


def _estimates(found: tuple[Any, ...], program: Program, leaves: bool) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Means over groups of draws, and their standard errors."""
    means, errors, numpy = [], [], jnp if any(isinstance(k, Tracer) for k in found) else np
    with nd.usual(True):
        for k, lead in zip(found, ((), (-1,) if leaves else ())):
            each = numpy.reshape(k, (*k.shape[:2], *lead, GROUPS, *program.shape * 2))
            means.append(numpy.mean(each, 2 + len(lead)))
            errors.append(numpy.std(each, 2 + len(lead), ddof=1) / GROUPS**0.5)
    return tuple(means), tuple(errors)


def _again(program: Program, x: Any, described: Mapping[str, Any]) -> Program:
    """A program that was read and looked at before."""
    told = [name for name, value in described.items() if value is not None]
    if told:
        raise ValueError(f"pj.limit: {', '.join(told)} would describe a network, and a program is one already. Give the family instead.")
    form = program.traced.jaxpr.in_avals[-1]
    shape = form.shape[1:]
    if tuple(x.shape[1:]) != shape:
        raise ValueError(f"x1 has examples of shape {tuple(x.shape[1:])}, and the program was traced for {shape}. Give the family instead.")
    if jnp.issubdtype(form.dtype, jnp.floating) != jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x1 is of {x.dtype}, and the program was traced for {form.dtype}. Convert it, or give the family instead.")
    return program


def _for_the_user(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """Double precision in a form that the user's flag allows: JAX warns of every function of such an array of its own where it does not."""
    if jax.config.read("jax_enable_x64") or all(k.dtype == np.float32 for k in found):
        # Without a copy: see `paperjax.limits.buffers`.
        return tuple(k if isinstance(k, Tracer) else jax.device_put(k) for k in found)
    return tuple(k.astype(jnp.float32) if isinstance(k, Tracer) else k for k in found)


def _programs(
    fam: Family, x: Any, sizes: dict[str, Any], widths: dict[str, int], scheme: Parametrization | None, base: Mapping[str, Any] | None,
    optimizer: tuple[Any, str], laws: Any, gaussian: bool, draws: Draws | None,
) -> tuple[Program, Program]:  # fmt: skip
    def sizes_at(times: int) -> dict[str, Any]:
        return {**sizes, **{name: n * times for name, n in widths.items()}}

    def traced(times: int) -> pg.Traced:
        target = sizes_at(times)
        known = declared(laws, target)
        if scheme is None:
            return pg.trace_one(pg.family_at(fam, target), x, known, None)
        try:
            planned = plan(fam, scheme, base={**sizes, **(base or {})}, target=target, optimizer=optimizer[0], x=x)
        except ValueError as error:
            if "uses={" in str(error) and "Settle it with" not in str(error):
                raise ValueError(
                    f"pj.limit: {error}\nSuch uses= are of pj.plan, not of pj.limit, in which the few entries would count for nothing "
                    "beside those that grow: give each part a leaf."
                ) from error
            if "plan(..., init_std=" in str(error):
                raise ValueError(
                    f"pj.limit: {error}\nSuch init_std= are of pj.plan, not of pj.limit: give the network under the plan, lambda width: "
                    "pj.plan(family, ..., target=dict(width=width), init_std=...).model, in place of parametrization=, and the variances "
                    "that its leaves then have by laws=."
                ) from error
            if "Settle it with uses=" not in str(error):
                raise
            raise ValueError(
                f"pj.limit: {error}\nSuch uses= are of pj.plan, not of pj.limit, which follows no matrix that is computed of leaves before "
                "it multiplies (weight normalisation or standardisation, spectral norms): take the limit of the network without that, "
                "entries being of variance 1 / fan_in. For any other use give the network under the plan, lambda width: pj.plan(family, "
                "..., target=dict(width=width), uses=...).model, in place of parametrization=."
            ) from error
        rates = {leaf.path: leaf.factors.learning_rate for leaf in planned.leaves}
        return pg.trace_one(planned.model, x, known, rates)

    if len(widths) > 1:
        # A depth among them is told before thousands of layers are read.
        models = [pg.family_at(fam, sizes_at(times)) for times in (1, 2)]
        with pg.fails_on(x):
            found = [jax.eval_shape(model.init, jax.random.key(0), x) for model in models]
        _refuse_no_width([[tuple(leaf.shape) for leaf in jax.tree.leaves(params)] for params in found], widths)
    here, twice = traced(1), traced(2)
    _refuse_no_width([[tuple(v.aval.shape) for v in t.jaxpr.jaxpr.invars] for t in (here, twice)], widths)
    four = traced(4)
    if not gaussian:
        drawn_finely(here.paths, here.laws, here.dtypes, declared(laws, {**sizes, **widths}))
    deep = [1 << 20, 1 << 21]
    sampled = [here.laws, twice.laws]
    if any(_odd(a, b) for a, b in zip(here.laws, twice.laws)) and scheme is None:
        first = next(iter(widths.values()))
        far = [traced(d // WIDTH) for d in deep]
        samples, at = [*sampled, *(t.laws for t in far)], [first, 2 * first, *(first * (d // WIDTH) for d in deep)]
    else:
        first = next(iter(widths.values()))
        samples, at = [*sampled, four.laws], [first, 2 * first, 4 * first]
    cache: dict[Any, Any] = {}
    made = [
        Program(t, other, effective_variances(samples, at, first * k), gaussian, cache, draws, "sgd" if scheme is None else optimizer[1])
        for t, other, k in ((here, twice, 1), (twice, four, 2))
    ]
    return made[0], made[1]


def _odd(a: Law | None, b: Law | None) -> bool:
    """Whether a variance is no pure power of the width."""
    if a is None or b is None or not a.variance or not b.variance or math.isnan(a.variance):
        return False
    power = 2 * math.log2(b.variance / a.variance)
    return abs(power - round(power)) > 1e-9


def _refuse_no_width(shapes: Sequence[Sequence[tuple[int, ...]]], widths: Mapping[str, int]) -> None:
    """Of the leaves at one width and at twice that."""
    if len(shapes[0]) != len(shapes[1]):
        raise ValueError(
            f"pj.limit: the number of leaves changes with {', '.join(widths)}: it adds layers (a depth), and is no width. Give it a finite "
            "value: sizes=dict(depth=...)."
        )
    if shapes[0] == shapes[1]:
        raise ValueError(
            f"pj.limit: no axis of any leaf grows with {', '.join(widths)}: the network has no width. Let the family take the width as an "
            "argument, family(lambda width: Net(width))."
        )
