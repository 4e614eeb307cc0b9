"""Forms, laws, blocks and refusals of the empirical kernel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paperjax as pj
from paperjax.kernels import explain, ntk
from paperjax.model import Frozen, Model

pytestmark = pytest.mark.usefixtures("x64")


def dense(sizes, activation=jnp.tanh, dtype=jnp.float64):
    def init(key, x):
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            {"w": jax.random.normal(k, (i, o), dtype) / jnp.sqrt(jnp.asarray(i, dtype)), "b": jnp.full((o,), 0.1, dtype)}
            for k, i, o in zip(keys, sizes[:-1], sizes[1:])
        ]

    def apply(params, x):
        for n, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"][None]
            x = activation(x) if n + 1 < len(params) else x
        return x

    return Model(init, apply)


MODEL = dense((3, 5, 4, 2))
with jax.enable_x64(True):
    X1 = jax.random.normal(jax.random.key(0), (6, 3), jnp.float64)
    X2 = jax.random.normal(jax.random.key(1), (4, 3), jnp.float64)
    PARAMS = MODEL.init(jax.random.key(2), X1)


def brute(model, params, x1, x2):
    def rows(x):
        j = jax.jacobian(lambda p: model.apply(p, x))(params)
        return np.concatenate([np.asarray(a).reshape(*a.shape[:2], -1) for a in jax.tree.leaves(j)], -1)

    return np.einsum("nop,mqp->nmoq", rows(x1), rows(x2))


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        return brute(MODEL, PARAMS, X1, X2)


# Forms ---------------------------------------------------------------------------------------------------------------

FORMS = {
    "full": (lambda k: k, {}),
    "trace": (lambda k: np.einsum("nmoo->nm", k), {"outputs": "trace"}),
    "diagonal": (lambda k: np.einsum("nmoo->nmo", k), {"outputs": "diagonal"}),
    "one output": (lambda k: k[:, :, 1, 1], {"outputs": 1}),
    "one output from the end": (lambda k: k[:, :, 1, 1], {"outputs": (-1,)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, exact):
    reduce, options = FORMS[form]
    np.testing.assert_allclose(ntk(MODEL, PARAMS, X1, X2, **options), reduce(exact), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_examples_with_themselves(form):
    reduce, options = FORMS[form]
    pairs = brute(MODEL, PARAMS, X1, X1)
    wanted = np.stack([reduce(pairs[n : n + 1, n : n + 1])[0, 0] for n in range(6)])
    np.testing.assert_allclose(ntk(MODEL, PARAMS, X1, diagonal=True, **options), wanted, rtol=1e-12)


@pytest.mark.parametrize("per", ["leaf", "layer"])
def test_contributions_add_up(per, exact):
    parts = ntk(MODEL, PARAMS, X1, X2, per=per)
    assert set(parts) == ({"[0]", "[1]", "[2]"} if per == "layer" else {f"[{n}]['{k}']" for n in range(3) for k in "wb"})
    np.testing.assert_allclose(sum(parts.values()), exact, rtol=1e-12)


def test_weights_are_those_of_a_plan():
    plan = pj.plan(pj.family(lambda width: pj.models.mlp(width, 2, 1), x=X1), pj.mup, base={"width": 4}, target={"width": 16})
    params = plan.model.init(jax.random.key(0), X1)
    rates = plan.factors("learning_rate", params)
    whole, parts = ntk(plan.model, params, X1, weights=rates), ntk(plan.model, params, X1, per="leaf")
    factors = {jax.tree_util.keystr(p): float(v) for p, v in jax.tree_util.tree_leaves_with_path(rates)}
    assert len(set(factors.values())) > 1
    np.testing.assert_allclose(whole, sum(factors[path] * kernel for path, kernel in parts.items()), rtol=1e-10)


def test_what_is_given_needs_no_weight():
    params = {"a": Frozen({"x": jnp.ones(2), "y": jnp.ones(3)}), "n": jnp.arange(3), "net": PARAMS}
    model = Model(MODEL.init, lambda p, x: MODEL.apply(p["net"], x))
    rates = [{"w": 2.0, "b": 3.0}, {"w": 5.0, "b": 7.0}, {"w": 11.0, "b": 13.0}]
    wanted = ntk(MODEL, PARAMS, X1, weights=rates)
    for fixed in (Frozen({"x": 17.0, "y": 19.0}), None):
        with pytest.warns(UserWarning, match="do not count"):
            np.testing.assert_allclose(ntk(model, params, X1, weights={"a": fixed, "n": 23, "net": rates}), wanted, rtol=1e-12)


def test_only_some_leaves(exact):
    parts = ntk(MODEL, PARAMS, X1, X2, per="leaf")
    np.testing.assert_allclose(ntk(MODEL, PARAMS, X1, X2, leaves=["[1]['w']"]), parts["[1]['w']"], rtol=1e-12)


@pytest.mark.parametrize("form", [{}, {"outputs": "trace"}, {"diagonal": True}, {"max_bytes": 6000}, {"route": "jacobian"}], ids=str)
def test_what_the_network_does_not_use_has_a_kernel_of_zeros(form):
    params = {"net": {"all": PARAMS}, "spare": {"w": jnp.ones((2, 3))}}
    model = Model(MODEL.init, lambda p, x: MODEL.apply(p["net"]["all"], x))
    whole, alone = ntk(model, params, X1, **form), ntk(model, params, X1, leaves=["['spare']['w']"], **form)
    assert alone.shape == whole.shape
    assert not alone.any()
    for per, name in (("leaf", "['spare']['w']"), ("layer", "['spare']")):
        parts = ntk(model, params, X1, per=per, **form)
        np.testing.assert_array_equal(parts[name], alone)
        np.testing.assert_allclose(sum(parts.values()), whole, rtol=1e-12)


def test_outputs_of_several_axes_and_several_outputs(exact):
    def both(params, x):
        y = MODEL.apply(params, x)
        return {"pair": y.reshape(-1, 2, 1), "first": y[:, 0]}

    found = ntk(Model(MODEL.init, both), PARAMS, X1, X2)
    assert found["pair"].shape == (6, 4, 2, 1, 2, 1)
    np.testing.assert_allclose(found["pair"].reshape(6, 4, 2, 2), exact, rtol=1e-12)
    np.testing.assert_allclose(found["first"], exact[:, :, 0, 0], rtol=1e-12)
    pair = Model(MODEL.init, lambda params, x: both(params, x)["pair"])
    np.testing.assert_allclose(ntk(pair, PARAMS, X1, X2, outputs=(1, 0)), exact[:, :, 1, 1], rtol=1e-12)


@pytest.mark.parametrize("ask", [{}, {"max_bytes": 2500}, {"diagonal": True}, {"coupled": True}], ids=str)
def test_inside_of_jit_the_kernel_of_known_arrays(exact, ask):
    """Nothing in it is traced but what it is multiplied by: it is computed on the way, in blocks where they are asked for."""
    if not ask:
        assert jax.eval_shape(lambda: ntk(MODEL, PARAMS, X1, X2)).shape == exact.shape
    found = jax.jit(lambda s: s * jnp.asarray(ntk(MODEL, PARAMS, X1, None if "diagonal" in ask else X2, **ask)))(2.0)
    wanted = ntk(MODEL, PARAMS, X1, diagonal=True) if "diagonal" in ask else exact
    np.testing.assert_allclose(found, 2 * np.asarray(wanted), atol=1e-10)


def test_under_jit_and_derivatives_of_it(exact):
    found = jax.jit(lambda p: ntk(MODEL, p, X1, X2))(PARAMS)
    np.testing.assert_allclose(found, exact, rtol=1e-12)


INSIDE = {
    "jit": lambda f: jax.jit(f)(2.0),
    "grad": lambda f: jax.value_and_grad(lambda s: f(s).sum())(2.0)[0],
    "vmap": lambda f: jax.vmap(f)(jnp.array([2.0]))[0],
    "loop": lambda f: jax.lax.map(f, jnp.array([2.0]))[0],
}


@pytest.mark.parametrize("form", [{}, {"diagonal": True}, {"max_bytes": 6000}, {"coupled": True}], ids=str)
@pytest.mark.parametrize("inside", INSIDE)
def test_a_network_made_inside_of_a_program(inside, form):
    """It holds values of that program, and the kernel is a part of it."""

    def kernel(scale):
        return ntk(Model(MODEL.init, lambda p, x: scale * MODEL.apply(p, x)), PARAMS, X1, outputs="trace", **form)

    wanted = 4 * ntk(MODEL, PARAMS, X1, outputs="trace", diagonal="diagonal" in form)
    np.testing.assert_allclose(INSIDE[inside](kernel), wanted.sum() if inside == "grad" else wanted, rtol=1e-12)


def test_float64_contraction_of_a_float32_network():
    model = dense((3, 5, 4, 2), dtype=jnp.float32)
    x = X1.astype(jnp.float32)
    params = model.init(jax.random.key(2), x)
    found = ntk(model, params, x, accumulate="float64")
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, ntk(model, params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"route": "jacobian"}, {"route": "ntvp"}, {"coupled": True}, {"diagonal": True}], ids=str)
@pytest.mark.parametrize("inside", [True, False])
def test_half_precision_is_contracted_in_that_of_the_outputs(form, inside):
    """A network that computes in bfloat16 and returns float32, with parameters of either kind."""
    half = dense((3, 5, 4, 2), dtype=jnp.bfloat16)
    to_half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)  # noqa: E731
    to_single = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)  # noqa: E731
    params, x = to_half(PARAMS), to_half(X1)
    model = Model(half.init, lambda p, x: half.apply(to_half(p), x).astype(jnp.float32))
    found = ntk(model, to_single(params) if inside else params, x, outputs="trace", **form)
    assert found.dtype == jnp.float32
    assert (found != found.astype(jnp.bfloat16).astype(jnp.float32)).any(), "rounded on the way"
    exact = np.einsum("nmoo->nm", brute(MODEL, *(jax.tree.map(lambda a: a.astype(jnp.float64), t) for t in (params, x, x))))
    # The forward and backward passes round to 8 bits, a few times each.
    np.testing.assert_allclose(found, np.diag(exact) if "diagonal" in form else exact, atol=0.02 * exact.max())
    assert ntk(half, params, x, outputs="trace", **form).dtype == jnp.bfloat16


# Laws ----------------------------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


@pytest.mark.slow
@settings(max_examples=6)
@given(SIZES, st.sampled_from([jnp.tanh, jax.nn.relu, jnp.sin]), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_laws_on_random_networks(sizes, activation, n, m, seed):
    model, keys = dense(sizes, activation), jax.random.split(jax.random.key(seed), 3)
    x1, x2 = (jax.random.normal(k, (size, sizes[0]), jnp.float64) for k, size in zip(keys, (n, m)))
    params = model.init(keys[2], x1)
    kernel = np.asarray(ntk(model, params, x1))
    matrix = kernel.transpose(0, 2, 1, 3).reshape(n * sizes[-1], -1)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12 * np.abs(matrix).max())
    assert np.linalg.eigvalsh(matrix).min() >= -1e-10 * np.abs(matrix).max()
    across = np.asarray(ntk(model, params, x1, x2))
    np.testing.assert_allclose(across, np.asarray(ntk(model, params, x2, x1)).transpose(1, 0, 3, 2), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(across, brute(model, params, x1, x2), rtol=1e-10, atol=1e-12)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_allclose(ntk(model, params, x1[order]), kernel[order][:, order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [33, 64])
@pytest.mark.parametrize("outputs", ["full", "diagonal"])
def test_a_batch_with_itself_is_that_batch_with_another_like_it(n, outputs):
    model = dense((3, 16, 8))
    x = jax.random.normal(jax.random.key(0), (n, 3), jnp.float64)
    params = model.init(jax.random.key(1), x)
    # The two may take their sums in another order, which shows in entries that nearly cancel; those of a gradient with itself are about 10.
    np.testing.assert_allclose(
        ntk(model, params, x, outputs=outputs), ntk(model, params, x, x + 0, outputs=outputs), rtol=1e-12, atol=1e-14
    )


# Blocks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("second", [None, X2])
def test_blocks_change_nothing(outputs, second):
    whole = ntk(MODEL, PARAMS, X1, second, outputs=outputs)
    np.testing.assert_allclose(ntk(MODEL, PARAMS, X1, second, outputs=outputs, max_bytes=6000), whole, rtol=1e-12)


@pytest.mark.parametrize("outputs", ["full", "trace"])
@pytest.mark.parametrize("route", ["auto", "jacobian"])
def test_what_needs_no_trace_bounds_what_is_counted(outputs, route):
    from paperjax.kernels import programs
    from paperjax.kernels.network import Spec, read

    network, spec = read(MODEL, PARAMS, X1), Spec(outputs=outputs, route=route)
    for n in (1, 5, 100):
        assert programs.at_most(network, spec, n, n, True) >= programs.bytes_of(network, spec, PARAMS, X1, n, n, True, n, {})


def test_few_examples_at_a_time_go_through_the_network(monkeypatch):
    """What is made of an example meanwhile is more than what is kept of it; a budget is for both."""
    from paperjax.kernels import programs

    record, calls = programs.record_program, []

    def counting(model, spec, params, x, shape):
        calls.append((x.shape[0], shape[0]))
        return record(model, spec, params, x, shape)

    monkeypatch.setattr(programs, "record_program", counting)
    budget = 6000
    ntk(MODEL, PARAMS, X1, outputs="trace", max_bytes=budget)
    assert all(n < block for n, block in calls)
    assert len({n for n, _ in calls}) == 1, "one program for all groups"
    np.testing.assert_allclose(ntk(MODEL, PARAMS, X1, diagonal=True, max_bytes=budget), ntk(MODEL, PARAMS, X1, diagonal=True), rtol=1e-12)


def test_a_file_is_taken_up_again(tmp_path, monkeypatch):
    from paperjax.kernels import programs

    whole, path, calls = ntk(MODEL, PARAMS, X1), tmp_path / "kernel.npy", []
    pair = programs.pair_program

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pair(*args)

    monkeypatch.setattr(programs, "pair_program", stopping)
    with pytest.raises(KeyboardInterrupt):
        ntk(MODEL, PARAMS, X1, max_bytes=6000, out=path)
    found = ntk(MODEL, PARAMS, X1, max_bytes=6000, out=path)
    assert isinstance(found, np.memmap)
    np.testing.assert_allclose(found, whole, rtol=1e-12)
    blocks = len(calls) - 1
    ntk(MODEL, PARAMS, X1, max_bytes=6000, out=path)
    assert len(calls) - 1 == blocks
    with pytest.raises(ValueError, match="holds blocks of another kernel"):
        ntk(MODEL, PARAMS, X1 + 1, max_bytes=6000, out=path)
    for other in (dense((3, 5, 4, 2), jax.nn.relu), Model(MODEL.init, lambda p, x: MODEL.apply(p, x) * jnp.array([[1.0, 2.0]]))):
        with pytest.raises(ValueError, match="holds blocks of another kernel"):
            ntk(other, PARAMS, X1, max_bytes=6000, out=path)


# Routes --------------------------------------------------------------------------------------------------------------


def test_explain_says_how_each_leaf_is_used():
    params = {"net": PARAMS, "gain": jnp.ones(2, jnp.float64), "seed": Frozen(jnp.arange(3))}

    def apply(p, x):
        return MODEL.apply(p["net"], x) * p["gain"][None]

    model = Model(lambda key, x: params, apply)
    table = explain(model, params, X1, measure=True)
    by_path = {leaf.path: leaf for leaf in table.leaves}
    assert by_path["['gain']"].use == "enters mul"
    assert by_path["['gain']"].route == "jacobian"
    assert by_path["['net'][1]['b']"].use == "bias of ['net'][1]['w']"
    assert by_path["['net'][1]['w']"].use == "product, 5 x 4"
    assert set(by_path["['net'][1]['w']"].measured) == {"gram", "gradients", "jacobian", "ntvp"}
    assert "not trained: ['seed']" in str(table)
    assert str(table).count("\n") > 7


@pytest.mark.parametrize("route", ["jacobian", "ntvp", {"[0]['w']": "gradients", "[1]['w']": "ntvp", "[1]['b']": "jacobian"}])
def test_routes_can_be_told(route, exact):
    np.testing.assert_allclose(ntk(MODEL, PARAMS, X1, X2, route=route), exact, rtol=1e-12)


@jax.custom_vjp
def sign(x):
    return jnp.sign(x)


sign.defvjp(lambda x: (jnp.sign(x), None), lambda _, y: (y,))


def test_what_has_backward_derivatives_only_takes_no_forward_ones():
    params, x = {"gain": jnp.linspace(1.0, 2.0, 64)}, jnp.linspace(-1.0, 1.0, 128).reshape(2, 64)
    model = Model(lambda key, x: params, lambda p, x: sign(x * p["gain"][None]))
    # Where derivatives could be taken either way, forward ones would be the cheaper: one example, many outputs.
    assert explain(Model(model.init, lambda p, x: jnp.sin(x * p["gain"][None])), params, x[:1]).leaves[0].route == "ntvp"
    table = explain(model, params, x[:1], measure=True)
    assert table.leaves[0].route == "jacobian"
    assert set(table.leaves[0].measured) == {"jacobian"}
    wanted = np.stack([np.diag(row**2) for row in np.asarray(x)])
    np.testing.assert_allclose(ntk(model, params, x, diagonal=True), wanted, rtol=1e-12)
    with pytest.raises(ValueError, match=r"forward derivatives.*'auto'"):
        ntk(model, params, x, route="ntvp")


# Loops, integers, batch statistics ------------------------------------------------------------------------------------


def test_a_loop_of_unknown_length_is_named():
    def apply(params, x):
        return jax.lax.while_loop(lambda state: state[0] < 3 + 0 * state[0], lambda s: (s[0] + 1, s[1] @ params), (0, x))[1]

    with pytest.raises(ValueError, match="while_loop"):
        ntk(Model(lambda key, x: jnp.eye(3), apply), jnp.eye(3), X1)


def test_integers_among_the_parameters_are_said():
    model = Model(MODEL.init, lambda p, x: MODEL.apply(p["net"], x))
    with pytest.warns(UserWarning, match=r"do not count in the kernel: \['steps'\]"):
        ntk(model, {"net": PARAMS, "steps": jnp.asarray(3)}, X1)


@pytest.mark.slow
def test_batch_statistics_when_allowed():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        batch_statistics()


def batch_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(nn.Dense(4, param_dtype=jnp.float64)(x))
            return nn.Dense(2, param_dtype=jnp.float64)(nn.tanh(x))

    model = pj.as_model(Net())
    params = model.init(jax.random.key(0), X1)
    with pytest.raises(ValueError, match="coupled=True"):
        ntk(model, params, X1)
    trained = params["params"]
    other = {k: v for k, v in params.items() if k != "params"}
    exact = brute(Model(model.init, lambda p, x: model.apply({"params": p, **other}, x)), trained, X1, X2)
    np.testing.assert_allclose(ntk(model, params, X1, X2, coupled=True), exact, rtol=1e-10, atol=1e-12)
    half = np.einsum("nmoo->nm", exact)
    np.testing.assert_allclose(sum(ntk(model, params, X1, X2, coupled=True, per="leaf", outputs="trace").values()), half, rtol=1e-10)
