"""What the paper's file computes from results, against results whose laws are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

import paperjax as pj
from paperjax.claims import judge
from paperjax.papers.landscape import dropout_stability_connectivity as paper

WIDTHS = np.array([64, 128, 256, 512, 1024])


def known(power, straight=0.0, s2=3.0, bias=0.0):
    """Results with S² and a barrier that are powers of N, for three seeds that differ by 1 %."""
    seeds = np.array([0.99, 1.0, 1.01])[:, None, None]
    N = WIDTHS[None, :, None] * 1.0
    half, fixed = s2 * N ** (power + 1) / N + bias, s2 * N ** (power + 1) * (1 / 32 - 1 / N) + bias
    barrier = 0.3 * N ** (straight or power) * np.ones((3, 1, 1))
    along = np.stack([np.zeros_like(barrier), barrier * seeds, np.zeros_like(barrier)], axis=-1)
    variables = {
        "increase": (("seed", "width", "step", "increase_0"), np.stack([half * seeds, fixed * seeds], axis=-1)),
        "variance": (("seed", "width", "step"), s2 * seeds * np.ones_like(N)),
        "along": (("seed", "width", "step", "along_0", "along_1"), along[..., None, :]),
    }
    return xr.Dataset(variables, coords={"width": WIDTHS})


RESULTS = {"mean-field": known(-1.0), "straight": known(-1.0, straight=1e-9), "broken": known(-0.4, bias=0.5), "kernel": known(0.0)}


def test_laws_that_hold_are_verified_and_their_controls_fail():
    found = {claim.says: judge(claim, RESULTS) for claim in paper.CLAIMS}
    assert {says: verdict.status for says, verdict in found.items()} == dict.fromkeys(found, "verified")


@pytest.mark.parametrize("name", ["mean-field", "straight"])
def test_each_claim_fails_where_its_law_does_not_hold(name):
    wrong = {**RESULTS, name: known(-0.5, bias=0.1)}
    failed = [claim for claim in paper.CLAIMS if name == "mean-field" or "straight" in claim.says]
    assert {
        judge(claim, wrong).outcome for claim in failed if claim.control.replace != {"straight": "mean-field"} or name == "straight"
    } == {"fails"}


def test_no_increase_at_the_width_that_is_kept():
    result = xr.Dataset({"variance": (("seed", "width", "step"), np.ones((2, 2, 1)))}, coords={"width": [32, 64]})
    np.testing.assert_allclose(paper.formula(result, 1), [[0, 1 / 64]] * 2)
    np.testing.assert_allclose(paper.formula(result, 0), [[1 / 32, 1 / 64]] * 2)


def test_a_pair_is_two_networks():
    x = jax.random.normal(jax.random.key(0), (3, 4))
    both = paper.pair(8, 1.0)
    params = both.init(jax.random.key(1), x)
    alone = pj.models.two_layer(8, 10, scaling=1.0)
    expected = jnp.concatenate([alone.apply(params[name], x) for name in ("one", "other")], axis=1)
    np.testing.assert_array_equal(both.apply(params, x), expected)
    assert not np.allclose(expected[:, :10], expected[:, 10:])


def test_sets_of_neurons_have_their_size():
    sets = paper.halves(jax.random.key(0), 10, 4, 7)
    assert sets.shape == (7, 10)
    np.testing.assert_array_equal(sets.sum(axis=1), 4)
    assert len(np.unique(sets, axis=0)) > 1


@pytest.mark.slow
def test_claims_hold_for_other_seeds():
    results = {}
    for name, experiment in paper.PAPER.plan("quick").items():
        seeds = experiment.grid.axes["seed"]
        results[name] = experiment.replace(grid=experiment.grid.replace(seed=[1000 + s for s in seeds])).run()
    assert {c.says: judge(c, results).status for c in paper.CLAIMS} == {c.says: "verified" for c in paper.CLAIMS}
