"""Learning-rate transfer: the fit on curves that are known, one small run, and the edges."""

import numpy as np
import pytest

import paperjax as pj
from paperjax.studies import EdgeError, transfer
from paperjax.studies.learning_rates import optimum_drift
from tests.studies.networks import examples, tanh_mlp
from tests.zoo import as_users_run_it

pytestmark = pytest.mark.slow

RATES = 2.0 ** np.arange(-8, 1)
AT = np.log2(RATES)


@pytest.fixture(scope="module", autouse=True)
def _promotion():
    # optax's Adam mixes dtypes, as users' JAX lets it.
    with as_users_run_it():
        yield


def bowls(best, seeds=6, noise=0.0):
    """``log loss`` is a parabola in log2 lr around `best`, the same curve shifted by seed."""
    shift = noise * np.random.default_rng(0).normal(size=seeds)
    return np.exp(0.3 * (AT[None, :, None] - np.asarray(best)[:, None, None] - shift) ** 2)


def test_a_parabola_gives_back_its_vertex():
    optima, drift, interval = optimum_drift(bowls([-2.3, -2.8, -3.3]), [64, 128, 256], RATES)
    np.testing.assert_allclose([o.log2_lr for o in optima], [-2.3, -2.8, -3.3], atol=1e-9)
    assert drift == pytest.approx(-0.5)
    np.testing.assert_allclose(interval, (-0.5, -0.5), atol=1e-9)


def test_interval_widens_with_the_spread_over_seeds():
    widths = []
    for noise in (0.1, 0.4):
        optima, _, _ = optimum_drift(bowls([-3.0, -3.0], noise=noise), [64, 128], RATES)
        assert optima[0].low <= optima[0].log2_lr <= optima[0].high
        widths.append(optima[0].high - optima[0].low)
    assert 0 < widths[0] < widths[1]


def test_next_to_divergence_the_grid_point_stands_for_itself():
    losses = bowls([-3.0, -3.0])
    losses[0, AT > -3] = np.inf
    (first, second), _, _ = optimum_drift(losses, [64, 128], RATES)
    assert (first.log2_lr, first.interpolated) == (-3.0, False)
    assert (first.low, first.high) == (-3.5, -2.5)
    assert second.interpolated


def run(scheme, rates, widths=(32, 128), **more):
    return transfer(tanh_mlp, scheme, examples(), widths=list(widths), learning_rates=rates, seeds=3, steps=20, **more)


def test_mup_keeps_the_optimum_that_sp_moves():
    rates = [2.0**k for k in range(-10, 1)]
    found = {scheme.name: run(scheme, rates) for scheme in (pj.mup, pj.standard)}
    # Two doublings: Adam's best learning rate falls as 1/n in SP's hidden layers.
    assert abs(found["muP"].drift) < 0.5
    assert found["SP"].drift < found["muP"].drift - 0.3
    text = str(found["muP"])
    assert text.startswith("learning-rate transfer of muP, adam")
    assert "per doubling of the width" in text
    assert found["muP"].losses.dims == ("width", "lr", "seed")
    assert found["muP"].plot().axes[0].get_xlabel() == "learning rate at the base"


@pytest.mark.parametrize(("rates", "edge"), [([2.0**k for k in range(-16, -11)], "upper"), ([2.0**k for k in range(0, 4)], "lower")])
def test_an_argmin_on_the_edge_is_an_error_that_keeps_the_losses(rates, edge):
    with pytest.raises(EdgeError, match=rf"{edge} edge .* at width 8, 16.*Widen the grid") as caught:
        run(pj.mup, rates, widths=(8, 16))
    assert caught.value.result["train_loss"].sizes["lr"] == len(rates)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(widths=[8]), "at least 2"),
        (dict(widths=[8, 16], learning_rates=[0.1, 0.2, 0.4]), "at least 4"),
        (dict(widths=[8, 16], learning_rates=[0.1, 0.2, 0.4, 0.5]), "evenly spaced"),
        (dict(widths=[8, 16], seeds=1), "at least 2"),
        (dict(widths=[8, 16], steps=0), "at least one update"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        transfer(tanh_mlp, pj.mup, examples(), **arguments)
