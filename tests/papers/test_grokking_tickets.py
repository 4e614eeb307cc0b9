"""The pairs and the network by hand, and the verdicts on curves whose times are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from paperjax.claims import judge
from paperjax.papers.dynamics import grokking_tickets as paper

QUICK = paper.SIZES["quick"]
POINTS = QUICK["steps"] // QUICK["every"] + 1


def test_every_unordered_pair_once():
    data = paper.pairs(jax.random.key(0))
    x = np.concatenate([data.x_train, data.x_test])
    assert len(x) == len({(int(a), int(b)) for a, b in x}) == paper.P * (paper.P + 1) // 2
    assert (x[:, 0] <= x[:, 1]).all()
    np.testing.assert_array_equal(np.concatenate([data.y_train, data.y_test]), x.sum(axis=1) % paper.P)
    assert len(data.x_train) == round(paper.FRACTION * len(x))


def test_network_is_that_of_the_formula_and_symmetric():
    model, w, data = paper.drawn(jax.random.key(0), 7)
    x = data.x_train[:5]
    e = np.asarray(w["embed"], np.float64)
    h = np.maximum((e[np.asarray(x[:, 0])] + e[np.asarray(x[:, 1])]) @ np.asarray(w["in"], np.float64), 0)
    expected = h @ np.asarray(w["out"], np.float64) @ np.asarray(w["unembed"], np.float64)
    np.testing.assert_allclose(model.apply(w, x), expected, rtol=1e-4, atol=1e-5)  # float32
    np.testing.assert_allclose(model.apply(w, x[:, ::-1]), model.apply(w, x), rtol=1e-5, atol=1e-6)


def test_norm_and_magnitude_are_of_all_weights_together():
    w = {"a": jnp.array([3.0, 0.1]), "b": jnp.array([[-4.0, 0.2, 0.3]])}
    assert float(paper.norm(w)) == pytest.approx(np.sqrt(9 + 0.01 + 16 + 0.04 + 0.09))
    kept = paper.magnitude(w)
    assert int(kept["a"].sum() + kept["b"].sum()) == round(paper.DENSITY * 5)
    assert kept["a"].tolist() == [True, False]
    assert kept["b"].tolist() == [[True, False, True]]


def curve(*steps):
    """Accuracies of seeds that reach 95 % at the given steps; beyond the last, never."""
    at = np.arange(POINTS)[None, :] * QUICK["every"]
    test = np.where(at >= np.array(steps)[:, None], 0.95, 0.1)
    both = np.stack([np.ones_like(test), test], axis=-1)[:, None]
    return xr.Dataset({"accuracy": (("seed", "step", "accuracy_0", "accuracy_1"), both)}, coords={"lr": QUICK["lr"]})


def test_steps_to_a_level():
    found = curve(100, 110, 10**9)
    np.testing.assert_array_equal(paper.steps_to(found), [100, 125, np.inf])
    np.testing.assert_array_equal(paper.steps_to(found, never=1.0), [100, 125, QUICK["steps"]])


RESULTS = {
    "dense": curve(700, 725), "ticket": curve(200, 225), "norm": curve(600, 650), "memorisation": curve(900, 925),
    "random": curve(10**9, 10**9), "ticket-no-decay": curve(300, 325), "dense-no-decay": curve(10**9, 10**9),
}  # fmt: skip


def status(results):
    return {claim.says: judge(claim, results).status for claim in paper.CLAIMS}


def test_tickets_that_speed_up_are_verified_and_late_ones_are_not():
    tickets = [claim.says for claim in paper.CLAIMS if "ticket" in claim.control.replace]
    assert all(status(RESULTS)[says] == "verified" for says in tickets)
    late = status({**RESULTS, "ticket": curve(10**9, 10**9)})
    assert all(late[says] == "failed" for says in tickets)


def test_a_dense_network_that_never_generalises_settles_nothing():
    found = status({**RESULTS, "dense": curve(10**9, 10**9), "memorisation": curve(10**9, 10**9)})
    assert "verified" not in {found[claim.says] for claim in paper.CLAIMS if set(claim.control.replace) <= {"memorisation", "random"}}
