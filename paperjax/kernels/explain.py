"""Which route each leaf of a kernel takes, and what it costs."""

import dataclasses
import io
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from paperjax.kernels.checks import check_kinds
from paperjax.kernels.inputs import chosen_outputs
from paperjax.kernels.network import Network, Spec, read, routes, shaped
from paperjax.kernels.ntk import ntk
from paperjax.kernels.routes import Machine
from paperjax.model import as_model, split


@dataclasses.dataclass(frozen=True)
class LeafRoute:
    """One leaf of an `Explanation`.

    Attributes
    ----------
    path, shape
        The leaf.
    route
        What is chosen: ``"gram"`` and ``"gradients"`` use its factors, ``"jacobian"`` and ``"ntvp"`` do not.
    use
        How the leaf is used; for one without factors, by what.
    predicted
        Seconds by route, from operations and bytes, besides the passes through the network.
    measured
        Seconds of the kernel of this leaf alone, by route, passes included; empty if not asked for.
    """

    path: str
    shape: tuple[int, ...]
    route: str
    use: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The routes of a kernel; prints as a table.

    Attributes
    ----------
    n, m, outputs
        Examples of the two batches, and which outputs.
    leaves
        In the order of the flattened parameters.
    given
        Paths of the leaves that are not trained and do not count.
    """

    n: int
    m: int
    outputs: str
    leaves: tuple[LeafRoute, ...]
    given: tuple[str, ...]

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = f"kernel of {self.n} x {self.m} examples, outputs: {self.outputs}"
        table = Table(box=box.SIMPLE_HEAD, title=Text(title, "table.title"), title_justify="left")
        measured = any(row.measured for row in self.leaves)
        for column in ("leaf", "shape", "route", "use", "predicted ms", *(("measured ms",) if measured else ())):
            table.add_column(column)
        for row in self.leaves:
            cells = [row.path, " x ".join(map(str, row.shape)) or "number", row.route, row.use, _times(row.predicted)]
            table.add_row(*map(Text, cells), *([Text(_times(row.measured))] if measured else []))
        if self.given:
            table.caption, table.caption_justify = Text(f"not trained: {', '.join(self.given)}"), "left"
        buffer = io.StringIO()
        Console(file=buffer, width=160, highlight=False, color_system=None, emoji=False).print(table)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).rstrip()


def explain(
    model: Any,
    params: PyTree,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str | int | tuple[int, ...] = "full",
    route: str | Mapping[str, str] = "auto",
    measure: bool = False,
) -> Explanation:
    """The route that `ntk` takes for each leaf, with the cost of every route it could take.

    Parameters
    ----------
    model, params, x1, x2, outputs, route
        As for `ntk`. With ``measure=False`` shapes will do in place of arrays.
    measure
        Also compile and time the kernel of each leaf alone by each route. Takes seconds a leaf.

    Returns
    -------
    Explanation
        Of the first array, where the model returns several. A route that cannot be taken costs infinitely much.

    Raises
    ------
    ValueError
        If a batch is empty, the two batches' features differ, or a leaf, an output or a route is not there.

    Examples
    --------
    >>> from paperjax.models import mlp
    >>> model, x = mlp(512, 2, 10), jnp.ones((16, 64))
    >>> table = explain(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    >>> [(leaf.path, leaf.route) for leaf in table.leaves][:2]
    [("['first']['b']", 'gram'), ("['first']['w']", 'gram')]
    """
    model = as_model(model)
    same = x2 is None or x2 is x1
    x2 = x1 if x2 is None else x2
    for name, x in (("x1", x1), ("x2", x2)):
        if not jnp.shape(x) or not jnp.shape(x)[0]:
            raise ValueError(f"{name} has shape {jnp.shape(x)}: an empty batch has no kernel. Give at least one example.")
    check_kinds(*map(shaped, (x1, x2)))
    n, m = jnp.shape(x1)[0], jnp.shape(x2)[0]
    network = read(model, params, x1)
    name, one = chosen_outputs(outputs, network.out)
    spec = Spec(name, (0, one), route=route if isinstance(route, str) else tuple(sorted(route.items())))
    machine = Machine.of(jax.default_backend())
    rows = {}
    for choice in routes(network, spec, n, m, same=same):
        path = network.paths[choice.leaf]
        if path in rows:
            continue
        timed = {}
        if measure:
            ways = [way for way, cost in choice.costs.items() if _alone(network, choice.leaf, way) and math.isfinite(cost.flops)]
            timed = {way: _seconds(model, params, x1, x2, outputs, path, way) for way in ways}
        use = f"enters {choice.why}" if choice.why else _use(network, choice.leaf)
        predicted = {way: cost.seconds(machine) for way, cost in choice.costs.items()}
        rows[path] = LeafRoute(path, network.shapes[choice.leaf], choice.route, use, predicted, timed)
    given = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(split(params)[1])]
    return Explanation(n, m, name if one is None else f"number {outputs}", tuple(rows[p] for p in network.paths if p in rows), tuple(given))


def _alone(network: Network, leaf: int, way: str) -> bool:
    """Whether a route can be asked for: a bias shares the route of its product."""
    return way in ("jacobian", "ntvp") or any(term.leaf == leaf for term in network.terms.terms)


def _use(network: Network, leaf: int) -> str:
    for term in network.terms.terms:
        if term.bias == leaf:
            return f"bias of {network.paths[term.leaf]}"
        if term.leaf == leaf:
            names = {"dot_general": "product", "conv_general_dilated": "convolution", "gather": "lookup"}
            kinds = " + ".join(names[f.product.eqn.primitive.name] for f in term.factors)
            f = term.factors[0]
            return f"{kinds}, {f.i} x {f.j}" + (f", {f.k} slices" if f.k > 1 else "") + (f", {f.t} places" if f.t > 1 else "")
    return ""


def _seconds(model: Any, params: Any, x1: Any, x2: Any, outputs: Any, path: str, way: str) -> float:
    def run() -> None:
        jax.block_until_ready(ntk(model, params, x1, None if x2 is x1 else x2, outputs=outputs, leaves=[path], route={path: way}))

    run()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * s:.3g}" for name, s in sorted(seconds.items(), key=lambda item: item[1]))
