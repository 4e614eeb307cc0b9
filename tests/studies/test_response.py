"""The first step's exponents, against tables written by hand; nothing is trained here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.studies import residual_stream
from paperjax.studies.response import first_step
from paperjax.studies.scaled import scaled
from paperjax.studies.taps import find_taps, quantities, record
from tests.studies.networks import LinenMLP, Scanned, Transformer, examples, tanh_mlp, tokens

X, _ = examples()
ONE_RATE = (0, 0, 0)
SP_OVER_N = pj.abc("SP, lr / n", (0, 0, 0), (0, 0.5, 0.5), (1, 1, 1), (0, 1, 1))
NTP_ONE_RATE = pj.abc("NTP, one lr", (0, 0.5, 0.5), (0, 0, 0), ONE_RATE, ONE_RATE)


def response(family, scheme, rule, x=X):
    s = scaled(family, scheme, x, [32, 64, 128], None, rule, None, {}, {}, 2, "test")
    taps, _ = find_taps(s.networks[128], x)
    found = first_step(s, x, rule)
    return {tap.name: (found.value[tap.node], found.change[tap.node]) for tap in taps}


# Changes of (h1, h2, outputs): Tensor Programs IV, Section 4, and Everett et al. (arXiv 2407.05872) for full alignment.
@pytest.mark.parametrize(
    ("scheme", "rule", "wanted", "readout"),
    [
        (pj.mup, "sgd", (0, 0, 0), -0.5),
        (pj.mup_table8, "sgd", (0, 0, 0), -0.5),
        (pj.mup_table9, "sgd", (0, 0, 0), -0.5),
        (pj.mup, "adam", (0, 0, 0), -0.5),
        (pj.mup_table8, "adam", (0, 0, 0), -0.5),
        (pj.mup_table9, "adam", (0, 0, 0), -0.5),
        (pj.mean_field, "sgd", (0, 0, 0), -0.5),
        (pj.ntp, "sgd", (-0.5, -0.5, 0), 0),
        (pj.ntp, "adam", (0, 0, 0.5), 0),
        (NTP_ONE_RATE, "adam", (0, 0.5, 1), 0),
        (pj.standard, "sgd", (-0.5, 0.5, 1), 0),
        (None, "sgd", (-0.5, 0.5, 1), 0),
        (SP_OVER_N, "sgd", (-1.5, -0.5, 0), 0),
        (pj.standard, "adam", (0, 1, 1.5), 0),
        (pj.standard_full_align, "adam", (0, 0, 0.5), 0),
    ],
    ids=lambda value: value.name if isinstance(value, pj.Parametrization) else None,
)
def test_exponents_of_an_mlp_are_those_of_the_tables(scheme, rule, wanted, readout):
    found = list(response(tanh_mlp, scheme, rule).values())
    np.testing.assert_allclose([change for _, change in found], wanted, atol=1e-6)
    np.testing.assert_allclose([value for value, _ in found], (0, 0, readout), atol=1e-6)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("family", [LinenMLP, lambda width: Scanned(width, 2)], ids=["linen", "scanned"])
def test_mup_is_flat_whatever_the_model_is_written_in(family, rule):
    found = response(family, pj.mup, rule)
    np.testing.assert_allclose([change for _, change in found.values()], 0, atol=1e-6)


@pytest.mark.slow
def test_attention_logits_are_scaled_by_one_over_d():
    x, _ = tokens()
    found = response(Transformer, pj.mup, "adam", x)
    logits = next(value for name, value in found.items() if "·" in name)
    np.testing.assert_allclose(logits, (-0.5, 0), atol=1e-6)
    np.testing.assert_allclose([change for _, change in found.values()], 0, atol=1e-6)
    as_it_is = response(Transformer, pj.standard, "adam", x)
    # Each of q and k moves as n, and n aligned terms over sqrt(n) add another half.
    np.testing.assert_allclose(next(v for name, v in as_it_is.items() if "·" in name), (0, 1.5), atol=1e-6)


@pytest.mark.slow
def test_attention_under_sgd_has_no_prediction():
    x, _ = tokens()
    found = response(Transformer, pj.mup, "sgd", x)
    assert np.isnan(found["['attention']['query']['kernel']"][1])
    assert found["['attention']['query']['kernel']"][0] == pytest.approx(0, abs=1e-6)


def test_layers_behind_a_readout_of_zeros_do_not_move():
    def family(width):
        inner = tanh_mlp(width)

        def init(key, x):
            params = inner.init(key, x)
            return {**params, "readout": {"w": jnp.zeros_like(params["readout"]["w"])}}

        return pj.Model(init, inner.apply)

    (h1, h2, out) = (change for _, change in response(family, pj.mup, "adam").values())
    assert (h1, h2) == (-np.inf, -np.inf)
    assert out == pytest.approx(0, abs=1e-6)


def test_taps_are_rows_of_a_scan_and_streams():
    model = pj.as_model(Scanned(8, 3))
    taps, _ = find_taps(model, X)
    assert [(tap.name, tap.kind, tap.layers) for tap in taps] == [
        ("['embed']['kernel']", "preactivation", 1),
        ("['blocks']['up']['kernel']", "preactivation", 3),
        ("['blocks']['down']['kernel']", "branch", 3),
        ("stream + ['blocks']['down']['kernel']", "stream", 3),
        ("outputs", "output", 1),
    ]
    params = model.init(jax.random.key(0), X)
    values = record(model, taps, params, X)
    # By hand: the stream after the first block.
    p = params["blocks"]
    h = X @ params["embed"]["kernel"] + params["embed"]["bias"][None]
    z = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-6)
    up = z @ p["up"]["kernel"][0]
    stream = h + jnp.tanh(up) @ p["down"]["kernel"][0]
    np.testing.assert_allclose(values[taps[1]][0], up.reshape(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(values[taps[3]][0], stream.reshape(-1), rtol=1e-4, atol=1e-5)
    assert len(quantities(taps, True)) == 1 + 3 * 3 + 1
    assert len(quantities(taps, False)) == 5


def test_a_preactivation_is_taken_after_its_constant_factor():
    """In ``h = x W / sqrt(n)`` with W of order 1 it is h that is of order 1, wherever the root stands."""

    def family(width):
        def init(key, x):
            key_w, key_h = jax.random.split(key)
            return {"w": jax.random.normal(key_w, (x.shape[1], width)), "h": jax.random.normal(key_h, (width, width))}

        return pj.Model(init, lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["h"] / width**0.5)[:, :2])

    found = response(family, None, "adam")
    np.testing.assert_allclose([value for value, _ in found.values()], 0, atol=1e-6)
    np.testing.assert_allclose([found["['w']"][1], found["['h']"][1]], (0, 0.5), atol=1e-6)


def test_the_stream_of_a_network_without_one_is_refused():
    with pytest.raises(ValueError, match="finds 0 such adds: scan over the blocks"):
        residual_stream(pj.models.mlp(4, 2, 1), pj.models.mlp(4, 2, 1).init(jax.random.key(0), jnp.ones((2, 3))), jnp.ones((2, 3)))
