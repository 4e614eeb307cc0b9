"""Feature Learning and Generalization in Deep Networks with Orthogonal Weights.

Day, Kahn, Roberts, 2023, arXiv 2310.07765.

With normal weights the fluctuations of a network's norms and of its tangent kernel over draws grow with depth over width, at criticality
too. With Haar orthogonal weights and tanh at (C_b, C_W) = (0, 1) they do not.

Here: one input, K = 1 in the first layer, n = 64. A Haar orthogonal W takes h to its norm times a uniform direction, a normal one to its
norm over n^(1/2) times normal numbers, so for norms nothing else need be drawn. For the NTK (in NTK parametrization, of the neurons of
layer l, n = 32) matrices are drawn. Predictions are `pj.limits.rg_flow`'s, whose orthogonal form is derived there.

Claims, expected numbers and tolerances
    slope of n Var(|z|²/n) / K² on depth, normal weights, layers 5 to 20    2/3, +-0.1
    the same variance, orthogonal, largest of layers 1 to 60                at most 0.3
    normal over orthogonal at layer 20                                      at least 100
    largest of layers 1 to 60, linear networks with orthogonal weights      at most 0.001 (exactly 0)
    n Var(H_ii) / theta², orthogonal, layer 40 over layer 20                at most 1.25
    n Var(H_ii) / theta², normal weights, layer 20 over layer 10            at least 1.7

Controls: the other kind of weights.

What did not hold as first proposed
    - Normal weights at layer 40: with n = 32 that is L/n > 1, where the law of the NTK is so heavy-tailed that its variance cannot be
      measured from a thousand networks. The claim of growth is made from layer 10 to 20.
    - A variance of the NTK that saturates at 1.7 to 2.0 from layer 5 to 40: that of the neurons of a layer falls with depth, as
      `pj.limits.rg_flow` says, from 0.38 in layer 4 to 0.10 in layer 40 (measured: the same).
    - Training on digits (the second half of the paper) is not done here.

Measured (quick): 0.723 +- 0.013, 0.213 +- 0.003, 181 +- 2, 5e-11, 0.60 +- 0.01, 2.36 +- 0.11.

Run time: quick about 35 s on two CPU cores
Command:  paperjax run orthogonal-weights-fluctuations
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import paperjax as pj
from paperjax.claims import Claim, Control, Estimate, Paper, Size, Verdict, estimate
from paperjax.models.initializers import orthogonal
from paperjax.studies import untrained

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

Results = Mapping[str, "xarray.Dataset"]

SEEDS = 8
WIDTH, DEPTH, AT = 64, 60, 20
NTK_WIDTH, NTK_DEPTH = 32, 40


def norms(phi: Any, haar: bool, nets: int) -> Callable[..., Array]:
    """Relative variance, times n, over networks of |z|² in layers 1 to `DEPTH`."""

    def measure(data: Any, key: Array, width: int) -> Float[Array, " depth"]:
        def layer(v_B: Array, k: Array) -> tuple[Array, Array]:
            u_BxN = jax.random.normal(k, (nets, width))
            if haar:
                u_BxN = u_BxN / jnp.sqrt(jnp.mean(u_BxN**2, axis=1, keepdims=True))
            z_BxN = jnp.sqrt(v_B)[:, None] * u_BxN
            norm_B = jnp.mean(z_BxN**2, axis=1)
            # About its mean: float32 would lose a small variance in a square.
            relative_B = norm_B / jnp.mean(norm_B) - 1
            return jnp.mean(phi(z_BxN) ** 2, axis=1), width * jnp.mean(relative_B**2)

        return jax.lax.scan(layer, jnp.ones(nets), jax.random.split(key, DEPTH))[1]

    return measure


def tangents(haar: bool, nets: int) -> Callable[..., Array]:
    """Means over networks and neurons of H_ii and its square in layers 1 to `NTK_DEPTH`, tanh."""
    init = orthogonal()

    def measure(data: Any, key: Array, width: int) -> Float[Array, "depth 2"]:
        def layer(state: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
            h_N, back_NxN = state
            w_NxN = init(k, (width, width), jnp.float32) if haar else jax.random.normal(k, (width, width)) / width**0.5
            ntk_NxN = jnp.mean(h_N**2) * jnp.eye(width) + w_NxN.T @ back_NxN @ w_NxN
            h_N = jnp.tanh(h_N @ w_NxN)
            slope_N = 1 - h_N**2
            diagonal = jnp.diagonal(ntk_NxN)
            return (h_N, slope_N[:, None] * ntk_NxN * slope_N[None]), jnp.stack([jnp.mean(diagonal), jnp.mean(diagonal**2)])

        def network(k: Array) -> Array:
            return jax.lax.scan(layer, (jnp.ones(width), jnp.zeros((width, width))), jax.random.split(k, NTK_DEPTH))[1]

        return jnp.mean(jax.lax.map(network, jax.random.split(key, nets)), axis=0)

    return measure


def drawn(measure: Any, width: int) -> pj.Experiment:
    """Networks as they are drawn; nothing is trained."""
    return untrained(pj.grid(width=[width], lr=1.0, seed=SEEDS), {"found": measure})


def experiments(size: Size) -> dict[str, pj.Experiment]:
    """Norms of tanh and linear networks and NTKs of tanh networks, with both kinds of weights."""
    nets, matrices = (2000, 100) if size == "quick" else (20000, 1000)
    linear = jax.nn.identity
    return {
        "orthogonal": drawn(norms(jnp.tanh, True, nets), WIDTH),
        "normal": drawn(norms(jnp.tanh, False, nets), WIDTH),
        "linear-orthogonal": drawn(norms(linear, True, nets), WIDTH),
        "linear-normal": drawn(norms(linear, False, nets), WIDTH),
        "ntk-orthogonal": drawn(tangents(True, matrices), NTK_WIDTH),
        "ntk-normal": drawn(tangents(False, matrices), NTK_WIDTH),
    }


def variance(result: "xarray.Dataset") -> np.ndarray:
    """``n Var(|z|²/n) / K²``, (seed, depth)."""
    return result.found.isel(step=0, width=0).transpose("seed", "found_0").values.astype(np.float64)


def ntk_variance(result: "xarray.Dataset") -> np.ndarray:
    """``n Var(H_ii) / theta²``, (seed, depth)."""
    first, second = np.moveaxis(result.found.isel(step=0, width=0).transpose("seed", "found_0", "found_1").values.astype(np.float64), -1, 0)
    return NTK_WIDTH * (second / first**2 - 1)


def slope(result: "xarray.Dataset") -> Estimate:
    """Of the variance of norms on the layer, 5 to `AT`."""
    return estimate(np.polyfit(np.arange(5, AT + 1), variance(result)[:, 4:AT].T, 1)[0])


def growth(result: "xarray.Dataset", layer: int) -> Estimate:
    """Of the NTK's variance from a layer to twice it."""
    found = ntk_variance(result)
    return estimate(found[:, 2 * layer - 1] / found[:, layer - 1])


CLAIMS = (
    Claim(
        "normal weights: slope on depth of n Var(|z|²/n) / K²",
        "the 2/3 of arXiv 2106.10165, which the paper starts from", 2 / 3, lambda results: slope(results["normal"]), 0.1,
        "next order in 1/l, and in L/n, which is 0.3 at layer 20",
        Control("orthogonal weights", {"normal": "orthogonal"}),
    ),
    Claim(
        "orthogonal weights: n Var(|z|²/n) / K² stays small, largest of layers 1 to 60",
        "the paper's abstract: no growth with depth", 0.3,
        lambda results: estimate(variance(results["orthogonal"]).max(axis=1)), 0.0,
        "a bound: pj.limits.rg_flow has 0.23 at its largest, in layer 3",
        Control("normal weights", {"orthogonal": "normal"}), relation="<=",
    ),
    Claim(
        "variance of |z|², normal weights over orthogonal, in layer 20",
        "formula of pj.limits.rg_flow", 100.0,
        lambda results: estimate(variance(results["normal"])[:, AT - 1] / variance(results["orthogonal"])[:, AT - 1]), 0.0,
        "a bound: pj.limits.rg_flow has 148 at leading order",
        Control("normal weights for both", {"orthogonal": "normal"}), relation=">=",
    ),
    Claim(
        "orthogonal weights, linear: n Var(|z|²/n) / K² is 0, largest of layers 1 to 60",
        "the paper's introduction: norms are kept", 0.0,
        lambda results: estimate(variance(results["linear-orthogonal"]).max(axis=1)), 1e-3,
        "exactly 0: what is left is the rounding of float32 over sixty layers",
        Control("normal weights: 64 [(1 + 2/64)^60 - 1]", {"linear-orthogonal": "linear-normal"}), relation="<=",
    ),
    Claim(
        "orthogonal weights: n Var(H_ii) / theta² does not grow, layer 40 over layer 20",
        "the paper's abstract: the NTK's fluctuations saturate", 1.25, lambda results: growth(results["ntk-orthogonal"], 20), 0.0,
        "a bound, as first proposed; pj.limits.rg_flow has 0.56 in this layer-wise NTK",
        Control("normal weights", {"ntk-orthogonal": "ntk-normal"}), relation="<=",
    ),
    Claim(
        "normal weights: n Var(H_ii) / theta² grows in proportion to depth, layer 20 over layer 10",
        "arXiv 2106.10165, chapter 8", 1.7, lambda results: growth(results["ntk-normal"], 10), 0.0,
        "a bound, as first proposed; pj.limits.rg_flow has 2.05",
        Control("orthogonal weights", {"ntk-normal": "ntk-orthogonal"}), relation=">=",
    ),
)  # fmt: skip


def figure(results: Results, verdicts: Sequence[Verdict]) -> "Figure":
    """Variances of norms and of the NTK by layer, and `pj.limits.rg_flow`'s."""
    from paperjax.report.figure import panels, points, prediction

    fig, axes = panels(1, 2, (4.6, 3.6))
    norm, ntk = axes.reshape(-1)
    kinds: tuple[tuple[pj.limits.Weights, str], ...] = (("gaussian", "normal"), ("orthogonal", "orthogonal"))
    for weights, name in kinds:
        flow = pj.limits.rg_flow(jnp.tanh, DEPTH, C_W=1.0, weights=weights)
        layers = np.arange(2, DEPTH + 1)
        colour = points(norm, layers, variance(results[name])[:, 1:], f"tanh, {name}")
        prediction(norm, layers, flow.norm_variance[1:], "rg_flow", color=colour)
        layers = np.arange(2, NTK_DEPTH + 1)
        colour = points(ntk, layers, ntk_variance(results[f"ntk-{name}"])[:, 1:], f"tanh, {name}")
        prediction(ntk, layers, flow.ntk_variance[1:NTK_DEPTH], "rg_flow", color=colour)
    norm.set(ylabel="$n\\,Var(|z|^2/n) / K^2$", title=f"norms, n = {WIDTH}")
    ntk.set(ylabel="$n\\,Var(H_{ii}) / \\Theta^2$", title=f"NTK, n = {NTK_WIDTH}")
    for ax in (norm, ntk):
        ax.set(xlabel="layer", yscale="log")
        ax.legend(fontsize=7)
    return fig


PAPER = Paper(
    slug="orthogonal-weights-fluctuations",
    title="Feature Learning and Generalization in Deep Networks with Orthogonal Weights",
    authors="Hannah Day, Yonatan Kahn, Daniel A. Roberts",
    year=2023,
    arxiv="2310.07765",
    area="finite-width",
    tier="T",
    claims=CLAIMS,
    experiments=experiments,
    figure=figure,
    run_time={"quick": "about 35 s on two CPU cores", "full": "not measured"},
    data="generated: one input",
)
