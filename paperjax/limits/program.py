"""The program of a limit: from examples to kernels, read from the trace of a family at two widths."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from paperjax.limits import fields as fl
from paperjax.limits import loops
from paperjax.limits import nodes as nd
from paperjax.limits.contractions import LeafLaw
from paperjax.limits.draws import Draws
from paperjax.limits.functions import NotGaussianError
from paperjax.limits.interpreter import Interpreter
from paperjax.limits.laws import Law, leaf_laws
from paperjax.limits.levels import LEVELS, finite
from paperjax.limits.moments import LARGEST, Run
from paperjax.limits.nodes import Det, Wide
from paperjax.model import Family, Model, split
from paperjax.trace import primitives as prim
from paperjax.trace.batch import coupling
from paperjax.trace.traced import flat_apply

Rates = Mapping[str, float]
Tape = Any


@dataclasses.dataclass(frozen=True)
class Traced:
    """A network at one width: its trace for one example, its leaves' paths, laws, learning rates and dtypes."""

    jaxpr: Any
    paths: tuple[str, ...]
    laws: tuple[Law | None, ...]
    rates: tuple[float, ...]
    dtypes: tuple[Any, ...]


@contextlib.contextmanager
def fails_on(x: jax.ShapeDtypeStruct) -> Iterator[None]:
    """An error of the network itself, with the examples that it was given."""
    try:
        yield
    except Exception as error:
        # Flax and Equinox have errors of their own for it.
        drops = "dropout" in str(error).lower()
        if not drops and not isinstance(error, TypeError | ValueError):
            raise
        what = (
            "Switch dropout off: a limit is of a network without it (linen: deterministic=True; nnx: eval(); Equinox: inference=True)."
            if drops
            else "Are x1 and x2 batches (N, *features) of what it takes, tokens as whole numbers?"
        )
        # JAX's own subclasses are made of tracers.
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"pj.limit: the network fails on examples of shape {tuple(x.shape[1:])} and dtype {x.dtype}: {error} {what}"
        ) from error


def trace_one(model: Model, x: jax.ShapeDtypeStruct, declared: Mapping[str, Law] | None, rates: Rates | None) -> Traced:
    """Trace a network for one example; nothing is allocated."""
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    with fails_on(x):
        params = jax.eval_shape(model.init, jax.random.key(0), one)
        met = coupling(model.apply, params, x)
    # Numbers that are drawn are refused by name where they come in.
    if met is not None and not met.startswith("random_"):
        raise ValueError(
            f"pj.limit: examples of a batch meet in a {met} (batch statistics?), so the network is no function of one example, and has no "
            "kernel of two. Use the statistics of the running average (training off), or LayerNorm or GroupNorm."
        )
    # In double precision, so that the network's own numbers (1/sqrt(3)) are not those of single precision; what it casts itself meets that.
    try:
        with nd.usual(True):
            fn, args = flat_apply(model.apply, *jax.tree.map(_double, (params, one)))
            jaxpr = prim.used(prim.trace(fn, *args))
    except TypeError:
        # Flax's recurrent cells start from single precision, whatever they are given, and a scan's types must agree; and JAX keeps the
        # dtype in which it first met an array of NumPy's (an index). The interpreter reads numbers back from their roundings then.
        with nd.usual(False):
            fn, args = flat_apply(model.apply, params, one)
            jaxpr = prim.used(prim.trace(fn, *args))
    laws = leaf_laws(model, one, declared)
    trained, fixed = split(params)
    there = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    learned = {id(leaf) for leaf in jax.tree.leaves(trained)}
    order = [*jax.tree.leaves(trained), *jax.tree.leaves(fixed)]
    path_of = {id(leaf): path for path, leaf in zip(there, jax.tree.leaves(params))}
    paths = tuple(path_of[id(leaf)] for leaf in order)
    return Traced(
        jaxpr, paths, tuple(laws.get(path) for path in paths),
        tuple((1.0 if rates is None else rates[path]) if id(leaf) in learned else 0.0 for path, leaf in zip(paths, order)),
        tuple(leaf.dtype for leaf in order),
    )  # fmt: skip


def _double(form: Any) -> Any:
    return jax.ShapeDtypeStruct(form.shape, jnp.float64) if jnp.issubdtype(form.dtype, jnp.floating) else form


@contextlib.contextmanager
def told(here: Traced) -> Iterator[None]:
    """Errors of the graph of values, which know a leaf by number, in terms of the network.

    Raises
    ------
    ValueError
        For a leaf whose law survives at infinite width, with what to say of it.
    NotImplementedError
        For anything else that has no known limit, with its primitive and the leaf's path.
    """
    try:
        yield
    except NotGaussianError as error:
        raise ValueError(not_gaussian(here, error.leaf)) from error
    except NotImplementedError as error:
        said, where = str(error), getattr(error, "primitive", None)
        if said.startswith("pj.limit:"):
            raise
        raise NotImplementedError(f"pj.limit: {f'primitive {where}: ' if where else ''}{_with_paths(said, here.paths)}") from error


@jax.tree_util.register_static
class Program:
    """What the kernels of two examples are, at infinite width; in a tree of arrays it is no array.

    Attributes
    ----------
    paths
        Of the leaves.
    variances, rates
        Of the entries of each at init, and the factor of its learning rate, at the width that was traced.
    output
        The value of the output: a coordinate of it, over the positions that it has.
    shared
        Leaves that all coordinates share, whose part of the tangent kernel stays random.
    by_hand
        Names of functions whose derivative was written by hand and is another than theirs, so that the tangent kernel is not followed.
    stopped
        Whether a gradient is stopped at a leaf that is trained or at a wide value (``lax.stop_gradient``), which the tangent kernel does
        not follow.
    rule
        The rule of the optimizer that `rates` are of, ``"sgd"`` or another.
    """

    def __init__(
        self, here: Traced, other: Traced, variances: Sequence[float], gaussian: bool, cache: dict[Any, Any], draws: Draws | None,
        rule: str = "sgd",
    ) -> None:  # fmt: skip
        self.rule = rule
        self.paths, self.variances, self.rates = here.paths, tuple(variances), here.rates
        laws = [_leaf_law(path, law, v, gaussian) for path, law, v in zip(here.paths, here.laws, variances)]
        reader = Interpreter(laws, draws is not None)
        self.traced = here
        with told(here):
            outputs = reader.network(here.jaxpr, other.jaxpr, len(laws))
            if len(outputs) != 1:
                raise NotImplementedError(f"the network returns {len(outputs)} arrays, and a limit is of one.")
            self.output = _output(reader.node(outputs[0]))
        self.noises = reader.noises
        self.made: dict[Any, Any] = {}
        self.shared = tuple(here.paths[i] for i in sorted(reader.shared) if here.rates[i])
        self.by_hand, self.stopped = tuple(map(str, reader.by_hand)), any(i is None or here.rates[i] for i in reader.stopped)
        self.cache, self.draws, self.largest = cache, draws, LARGEST

    def _variance(self, leaf: Any) -> float:
        return self.variances[leaf]

    def kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made of this program before, such as a compiled tile."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def noise(self, x: Any) -> list[tuple[str, float]]:
        """The size of what the law of large numbers neglects, at every place where it is used, for an example."""
        found: list[float] = []
        draws = self.draws and self.draws._replace(key=self.draws.key[0])
        for level in LEVELS[LEVELS.index(LARGEST) :]:
            run = self.up_to(level)._run(draws, x)
            found = [float(loops.first_step(run, inside).det(size, 0)) for _, size, inside in self.noises]
            if finite(found):
                break
        return [(where, size) for (where, *_), size in zip(self.noises, found)]

    def up_to(self, largest: float) -> "Program":
        """The same for variances up to this one, see `paperjax.limits.moments.Run`."""

        def made() -> Program:
            other = copy.copy(self)
            other.largest = largest
            # What examples are asked does not depend on it, what was compiled does.
            other.made = {key: value for key, value in self.made.items() if key[0] == "seen"}
            return other

        return self if largest == self.largest else self.kept(("up to", largest), made)

    def seen(self, x: Any, ntk: bool) -> "Seen":
        """What the kernel of two examples of this form asks of each of them alone, and how it is made; no expectation is."""

        def make() -> Seen:
            found: dict[Any, None] = {}
            draws = self.draws and self.draws._replace(key=self.draws.key[0])

            def look(x1: Any, x2: Any, shift: Any) -> Any:
                alone = [self._run(draws, x, looks=True) for x in (x1, x2)]
                by = self._shift(shift) if ntk else None
                both = self._run(draws, x1, x2, shift=by, tapes=tuple(map(_OnDemand, alone)), looks=True)
                kernel = both.second(self.output, self.output, 0, 1)
                found.update(both.asked)
                return kernel

            return Seen(jax.make_jaxpr(look)(x, x, jax.ShapeDtypeStruct((len(self.paths),), jnp.zeros(()).dtype)), tuple(found))

        return self.kept(("seen", ntk, tuple(x.shape), x.dtype), make)

    def tape(self, x: Array, asked: Sequence[Any], unit: Array | None = None) -> tuple[Any, ...]:
        """Those moments of one example; where they are drawn, of each group of draws along a first axis. `unit` is that of `Run`."""

        def one(draws: Draws | None) -> tuple[Any, ...]:
            found = _OnDemand(self._run(draws, x, unit=unit))
            return tuple(found[key] for key in asked)

        return one(None) if self.draws is None else self.draws.each(one)

    def pair(self, x1: Array, x2: Array, tape1: Tape, tape2: Tape, shift: Array | None, unit: Array | None = None) -> Array:
        """``E f_p(x1) f_q(x2)`` for all positions p and q of the output, `pair_shape`, with leaves' variances shifted in between."""

        def one(draws: Draws | None, tape1: Tape, tape2: Tape) -> Array:
            run = self._run(draws, x1, x2, shift=None if shift is None else self._shift(shift), tapes=(tape1, tape2), unit=unit)
            found = run.second(self.output, self.output, 0, 1)
            return jnp.zeros(self.output.shape * 2) if found is None else found

        if self.draws is None:
            found = one(None, tape1, tape2)
        else:
            names = list(tape1)
            found = self.draws.each(
                lambda draws, a, b: one(draws, dict(zip(names, a)), dict(zip(names, b))),
                [tape1[name] for name in names],
                [tape2[name] for name in names],
            )
        return found.reshape(self.pair_shape)

    def _shift(self, shift: Array) -> Callable[[Any], Any]:
        return lambda leaf: shift[leaf] * self.rates[leaf]

    def _run(self, draws: Draws | None, *xs: Any, shift: Any = None, tapes: Any = (), unit: Any = None, looks: bool = False) -> Run:
        xs = tuple(x[None] for x in xs)
        return Run(xs, self._variance, shift, tapes, self.cache, unit=unit, drawn=draws, largest=self.largest, looks=looks)

    @property
    def shape(self) -> tuple[int, ...]:
        """Positions of the output that the kernel keeps: those along which it is not independent; size 1 axes are dropped."""
        return tuple(n for n in self.output.shape if n > 1)

    @property
    def pair_shape(self) -> tuple[int, ...]:
        """Of the kernel of two examples: positions of both, behind an axis for the groups of draws if there are any."""
        return (() if self.draws is None else (len(self.draws.key),)) + self.shape * 2


class Seen(NamedTuple):
    """The kernel of ``(x1, x2, shift)`` with marks in the place of expectations, and what it asks of each example."""

    kernel: jex.ClosedJaxpr
    asked: tuple[Any, ...]


class _OnDemand:
    """A tape that is written when it is read."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __getitem__(self, key: Any) -> Any:
        return self.run.read(key, 0)


def _leaf_law(path: str, law: Law | None, variance: float, gaussian: bool) -> LeafLaw:
    if law is None or law.kind == "given":
        return LeafLaw(path, math.nan, math.nan, False)
    return LeafLaw(path, law.mean, variance, gaussian or law.gaussian or law.kind == "orthogonal")


def _with_paths(text: str, paths: Sequence[str]) -> str:
    """Errors of the graph of values name a leaf by number."""
    first, colon, rest = text.partition(":")
    return f"{paths[int(first)]}{colon}{rest}" if colon and first.isdigit() else text


def not_gaussian(here: Traced, leaf: int) -> str:
    """What is said of a leaf whose law survives at infinite width."""
    law = here.laws[leaf]
    assert law is not None
    path = here.paths[leaf]
    kind = "no normal" if law.kind == "other" else f"a {law.kind}"
    return (
        f"pj.limit: {path} is drawn from {kind} law ({law.detail}), and is used where nothing that grows is "
        f"summed over (a first layer, a "
        "bias, a table), so what it makes is not Gaussian however wide the network is, and a nonlinear function "
        "follows. Say that the Gaussian "
        f"of equal variance will do, for all such leaves with gaussian=True, or for this one: "
        f'laws={{"{path}": pj.limits.normal({law.variance:.6g})}}. '
        "Or draw it from a normal law (jax.nn.initializers.normal, or variance_scaling(..., distribution='untruncated_normal'))."
    )


def _output(node: Any) -> Wide:
    if isinstance(node, Det) and node.noise is not None:
        raise NotImplementedError(
            "the output is a sum over a growing axis without weights of its own (a mean, or a bilinear form x'Wx of wide values): its mean "
            "is deterministic at infinite width, and how it fluctuates about it is not followed. End in a layer with weights."
        )
    if isinstance(node, Det):
        raise NotImplementedError(
            "the output is deterministic at infinite width, or the network has no width: no axis of its leaves grows. Let the family take "
            "the width, and end in a layer with weights."
        )
    assert isinstance(node, Wide)
    if fl.is_joined(node):
        raise NotImplementedError(
            "outputs of several layers are joined along an axis of independent ones, and have no one kernel. Take the limit of one of them "
            "at a time."
        )
    if any(atom.grows for axis in node.axes for atom in axis):
        raise NotImplementedError(
            "an axis of the output itself grows with the width. Name sizes=... of what is finite, or end in a finite readout."
        )
    return node


def family_at(fam: Family, sizes: Mapping[str, Any]) -> Model:
    """A member of a family; a size that does not fit is said with the sizes."""
    try:
        return fam(**sizes)
    except (TypeError, ValueError) as error:
        named = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"pj.limit: the family fails at {named}: {error} Choose the widths that are traced with at=dict(...)."
        ) from error


def as_tape(asked: Sequence[Any], values: Sequence[Any]) -> Tape:
    """Values under the keys by which they were asked for."""
    return dict(zip(asked, values))


def example(x: Any) -> np.ndarray:
    """Numbers of the form of an example, where there are none to be had (under a trace)."""
    shape, dtype = x.shape[1:], x.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float64)
    return np.zeros((2, *shape), dtype)


def largest(x: np.ndarray) -> np.ndarray:
    """The example in which most is to be seen: of zero nothing is."""
    one = x[np.argmax(np.abs(x.astype(np.float64)).reshape(len(x), -1).sum(1))]
    return one.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else one
