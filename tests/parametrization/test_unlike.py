"""Leaves that are several layers in one are refused, by name and sizes; a told use takes them as they are, and leaves of their own plan."""

import jax
import jax.numpy as jnp
import pytest

import paperjax as pj

X, BASE, TARGET = jnp.zeros((3, 5)), {"width": 16}, {"width": 64}


def family(shapes, apply, x=X):
    def net(width):
        def init(key, x):
            keys = jax.random.split(key, len(shapes(width)))
            return {name: jax.random.normal(k, s) * s[0] ** -0.5 for k, (name, s) in zip(keys, shapes(width).items())}

        return pj.Model(init, lambda p, x: apply(p, x, width))

    return pj.family(net, x=x)


# A skip connection from the input, as in NeRF (arXiv 2003.08934).
SKIP = family(
    lambda n: {"u": (5, n), "w": (5 + n, n), "o": (n, 3)},
    lambda p, x, n: jnp.tanh(jnp.concatenate([x, jnp.tanh(x @ p["u"])], -1) @ p["w"]) @ p["o"],
)
APART = family(
    lambda n: {"u": (5, n), "x": (5, n), "h": (n, n), "o": (n, 3)},
    lambda p, x, n: jnp.tanh(x @ p["x"] + jnp.tanh(x @ p["u"]) @ p["h"]) @ p["o"],
)
LATE_SKIP = family(lambda n: {"u": (5, n), "o": (n + 5, 3)}, lambda p, x, n: jnp.concatenate([jnp.tanh(x @ p["u"]), x], -1) @ p["o"])
SPLIT = family(
    lambda n: {"u": (5, n), "w": (n, n + 3), "o": (n, 2)},
    lambda p, x, n: (jnp.tanh((h := jnp.tanh(x @ p["u"]) @ p["w"])[:, :n]) @ p["o"]).sum(-1, keepdims=True) + h[:, n:],
)

REFUSED = {
    "inside": (SKIP, "w", r"\(69, 64\), axis 0 \(summed over\): 5 entries from 0 on \(input\), "
               r"64 entries from 5 on, and 16 of them at the base \(hidden\)", "x @ W_x", "inside=(0,), out=(1,)"),
    "inside, output": (LATE_SKIP, "o", r"\(69, 3\), axis 0 \(summed over\): 64 entries from 0 on, and 16 of them at the base "
                       r"\(output\), 5 entries from 64 on \(finite\)", "x @ W_x", "inside=(0,), out=(1,)"),
    "out": (SPLIT, "w", r"\(64, 67\), axis 1 \(free\): 64 entries from 0 on, and 16 of them at the base \(hidden\), "
            r"3 entries from 64 on \(output\)", "h @ W_1", "inside=(0,), out=(1,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_a_told_use_takes_it(name):
    net, leaf, parts, instead, use = REFUSED[name]
    with pytest.raises(ValueError, match=parts) as caught:
        pj.plan(net, pj.mup, base=BASE, target=TARGET)
    assert instead in str(caught.value)
    # The override is Python that works as it is written.
    text = str(caught.value).split("all the same: ")[1]
    assert text == f"uses={{\"['{leaf}']\": pj.trace.Use({use})}}"
    told = eval(f"dict({text})", {"pj": pj})
    plan = pj.plan(net, pj.mup, base=BASE, target=TARGET, **told)
    rows = {row.path: row for row in plan.leaves}
    ratio = 69 / 21 if "inside" in name else 4
    assert rows[f"['{leaf}']"].factors.learning_rate == pytest.approx(1 / ratio)


def test_all_leaves_are_named_and_the_overrides_together_give_a_plan():
    """Mamba-2 (arXiv 2405.21060): of one projection and one depthwise kernel some channels are the state's, whose number is fixed."""

    def apply(p, x, n):
        z = jnp.pad(jnp.tanh(x @ p["u"]) @ p["w"], ((0, 0), (2, 0), (0, 0)))
        kernel = {"feature_group_count": n + 6, "dimension_numbers": ("NWC", "WIO", "NWC")}
        h, b, c = jnp.split(jax.lax.conv_general_dilated(z, p["k"], (1,), "VALID", **kernel), [n, n + 3], -1)
        return jnp.einsum("bts,bls,bth->blh", b, c, jnp.tanh(h)) @ p["o"]

    net = family(lambda n: {"u": (5, n), "w": (n, n + 6), "k": (3, 1, n + 6), "o": (n, 3)}, apply, jnp.zeros((2, 4, 5)))
    with pytest.raises(ValueError, match=r"\['k'\].*axis 2.* \(vector\), 6 entries from 64 on \(finite\)") as caught:
        pj.plan(net, pj.mup, base=BASE, target=TARGET, optimizer="sgd")
    uses = {}
    for line in str(caught.value).splitlines()[1:]:
        uses |= eval(line.split("all the same: uses=")[1], {"pj": pj})
    plan = pj.plan(net, pj.mup, base=BASE, target=TARGET, optimizer="sgd", uses=uses)
    assert {leaf.path[2:-2]: leaf.role for leaf in plan.leaves} == {"u": "input", "w": "hidden", "k": "vector", "o": "output"}


def test_every_scheme_that_scales_it_refuses_and_one_that_does_not_plans():
    for scheme in (pj.mup, pj.mup_table9, pj.ntp, pj.spectral):
        with pytest.raises(ValueError, match=r"\['w'\] \(69, 64\)"):
            pj.plan(SKIP, scheme, base=BASE, target=TARGET)
    # Standard practice is what the model is: 1 / fan_in, one learning rate.
    plan = pj.plan(SKIP, pj.standard, base=BASE, target=TARGET)
    for leaf in plan.leaves:
        assert leaf.factors[:3] == pytest.approx((1.0, 1.0, 1.0), rel=1e-3)


def test_leaves_of_their_own_follow_the_table():
    plan = pj.plan(APART, pj.mup, base=BASE, target=TARGET, optimizer="adam")
    assert {leaf.path[2:-2]: (leaf.role, leaf.factors.learning_rate) for leaf in plan.leaves} == {
        "u": ("input", 1.0), "x": ("input", 1.0), "h": ("hidden", 0.25), "o": ("output", 0.25),
    }  # fmt: skip


def test_at_the_base_nothing_grows():
    assert pj.plan(SKIP, pj.mup, base=BASE, target=BASE).leaves
