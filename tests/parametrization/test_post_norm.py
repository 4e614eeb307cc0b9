"""Leaves that act on the residual stream itself in every layer (post-norm gains and biases) are refused where depth is scaled."""

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj

X = jnp.ones((4, 5))
N = 8


def norm(h):
    return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)


def network(layer, loop, last=False, first=False, stacks=1):
    """`layer(h, p)` in a row, in `stacks` with a norm between them; with a norm of the embedding and at the end if asked for."""

    def make(depth):
        per_layer = {"w": (N, N), "g": (N,), "b": (N,)}
        outer = {"u": (5, N), "v": (N, 3), "g_first": (N,), "b_first": (N,), "g_last": (N,), "b_last": (N,), "g_between": (N,)}

        def init(key, x):
            def leaf(name, shape):
                scale = 0.5 if name[0] in "wuv" else 0.0
                return scale * jax.random.normal(jax.random.key(len(name)), shape) + float(name[0] == "g")

            layers, stack = range(stacks if loop else depth * stacks), (depth,) if loop else ()
            return {
                "layers": [{name: leaf(name, stack + shape) for name, shape in per_layer.items()} for _ in layers],
                **{name: leaf(name, shape) for name, shape in outer.items()},
            }

        def apply(p, x):
            affine = lambda h, g, b: norm(h) * p[g][None] + p[b][None]  # noqa: E731
            h = x @ p["u"]
            # Each leaf is used in any case, outside of the layers.
            h = affine(h, "g_first", "b_first") if first else h + 0 * (p["g_first"] + p["b_first"])[None]
            for k in range(stacks):
                if loop:
                    h = jax.lax.scan(lambda h, q: (layer(h, q), None), h, p["layers"][k])[0]
                else:
                    for q in p["layers"][k * depth : (k + 1) * depth]:
                        h = layer(h, q)
                if k + 1 < stacks:
                    h = norm(h) * p["g_between"][None]
            h = affine(h, "g_last", "b_last") if last else h
            out = h @ p["v"]
            unused = ([] if last else ["g_last", "b_last"]) + ([] if stacks > 1 else ["g_between"])
            return out + sum([(p[name] @ p[name]) * 0 for name in unused], jnp.zeros(()))

        return pj.Model(init, apply)

    return pj.family(make, x=X)


def gain_and_bias(h, q):
    return norm(h + jax.nn.relu(h @ q["w"])) * q["g"][None] + q["b"][None]


def gain_before(h, q):
    h = norm(h) * q["g"][None] + q["b"][None]
    return h + jax.nn.relu(h @ q["w"])


def number_on_the_stream(h, q):
    h = h + jax.nn.relu(h @ q["w"] + q["b"][None])
    return h * q["g"][None]


def pre_norm(h, q):
    return h + jax.nn.relu((norm(h) * q["g"][None] + q["b"][None]) @ q["w"])


def norm_of_the_branch(h, q):
    return h + norm(jax.nn.relu(h @ q["w"])) * q["g"][None] + q["b"][None]


POST = {"post-norm": gain_and_bias, "norm before both": gain_before, "gain of the stream": number_on_the_stream}
PRE = {"pre-norm": pre_norm, "norm of the branch": norm_of_the_branch}


@pytest.mark.parametrize("scheme", [pj.depth_mup, pj.completep], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("loop", [False, True], ids=["python", "scan"])
@pytest.mark.parametrize("name", POST)
def test_a_gain_of_every_layer_is_refused(name, loop, scheme):
    family = network(POST[name], loop)
    with pytest.raises(ValueError, match=r"\['layers'\]\[[01]\]\['g'\].*multiplies the residual stream itself.*f\(norm\(h\)\).*pj\.mup"):
        pj.plan(family, scheme, base={"depth": 2}, target={"depth": 8})
    # Where depth stays, or is not scaled, it is a gain like any other.
    pj.plan(family, scheme, base={"depth": 2}, target={"depth": 2})
    assert {leaf.factors.learning_rate for leaf in pj.plan(family, pj.mup, base={"depth": 2}, target={"depth": 8}).leaves} == {1.0}


def test_one_layer_at_the_base_is_enough():
    with pytest.raises(
        ValueError,
        match=r"\[0\]\['b'\], .*\[0\]\['g'\], .*\[1\]\['b'\], .*\[1\]\['g'\] and 2 more",
    ):
        pj.plan(network(gain_and_bias, False), pj.depth_mup, base={"depth": 1}, target={"depth": 4})


@pytest.mark.parametrize("loop", [False, True], ids=["python", "scan"])
@pytest.mark.parametrize("name", PRE)
def test_norms_in_branches_and_outside_of_the_layers_are_planned(name, loop):
    """Before the first layer, between two stacks and after the last: one each, whatever the depth."""
    family = network(PRE[name], loop, last=True, first=True, stacks=2)
    plan = pj.plan(family, pj.depth_mup, base={"depth": 2}, target={"depth": 8})
    found = {leaf.path: leaf.factors for leaf in plan.leaves}
    for path, factors in found.items():
        # Depth-muP (arXiv 2310.02244): Adam's learning rate 1/sqrt(L) in branches, four times as many.
        assert factors.learning_rate == pytest.approx(0.5 if "layers" in path else 1.0), path
