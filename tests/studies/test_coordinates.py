"""The coordinate check: measured slopes against the table, a closed form, what must fail, and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.studies import coord_check
from tests.studies.networks import Scanned, Transformer, examples, one_hidden_linear, tanh_mlp, tokens
from tests.zoo import as_users_run_it

pytestmark = pytest.mark.slow

DATA = examples()
RATES = {"sgd": 0.01, "adam": 1e-4}
NTP_ONE_RATE = pj.abc("NTP, one lr", (0, 0.5, 0.5), (0, 0, 0), (0, 0, 0), (0, 0, 0))
# Changes of h1, h2 and the outputs after one step: Tensor Programs IV (arXiv 2011.14522), Section 4.
TABLE = [
    (pj.mup, "sgd", (0, 0, 0)),
    (pj.mup, "adam", (0, 0, 0)),
    (pj.ntp, "sgd", (-0.5, -0.5, 0)),
    (pj.ntp, "adam", (0, 0, 0.5)),
    (NTP_ONE_RATE, "adam", (0, 0.5, 1)),
    (pj.standard, "sgd", (-0.5, 0.5, 1)),
    (pj.standard, "adam", (0, 1, 1.5)),
]


@pytest.fixture(scope="module", autouse=True)
def _promotion():
    # optax's Adam mixes dtypes, as users' JAX lets it.
    with as_users_run_it():
        yield


def slopes(check, step=1):
    return [row.exponent for row in check.table() if row.step == step]


def checked(scheme, rule, widths, **more):
    return coord_check(tanh_mlp, scheme, DATA, widths=widths, optimizer=rule, steps=1, learning_rate=RATES[rule], **more)


@pytest.fixture(scope="module")
def mup_adam():
    return checked(pj.mup, "adam", [64, 128, 256, 512])


@pytest.fixture(scope="module")
def sp_sgd():
    return checked(pj.standard, "sgd", [64, 128, 256, 512])


def test_mup_passes(mup_adam):
    np.testing.assert_allclose(slopes(mup_adam), (0, 0, 0), atol=0.15)
    assert mup_adam.passes
    assert mup_adam.as_predicted
    outputs = next(row for row in mup_adam.table() if row.quantity == "outputs" and row.step == 0)
    assert outputs.exponent == pytest.approx(-0.5, abs=0.15)
    assert outputs.expected == pytest.approx(-0.5)


def test_sp_fails(sp_sgd):
    np.testing.assert_allclose(slopes(sp_sgd), (-0.5, 0.5, 1), atol=0.15)
    assert not sp_sgd.passes
    assert sp_sgd.as_predicted
    assert [row.verdict for row in sp_sgd.table() if row.step == 1] == ["vanishes", "grows", "grows"]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "rule", "wanted"), TABLE, ids=[f"{s.name}, {r}" for s, r, _ in TABLE])
def test_slopes_over_widths_to_2048(scheme, rule, wanted):
    check = checked(scheme, rule, [128, 256, 512, 1024, 2048])
    np.testing.assert_allclose(slopes(check), wanted, atol=0.15)
    assert check.as_predicted
    assert check.passes == (scheme is pj.mup)


def test_change_is_that_of_the_closed_form():
    """One step of SGD on ``f = x U V``: ``dU = -lr x' R V'``, ``dV = -lr (x U)' R`` with ``R = 2 (f - y) / (batch outputs)``."""
    x, y = DATA[0], DATA[1][:, :2]
    lr, widths = 0.05, [8, 16, 32, 64]
    check = coord_check(one_hidden_linear, None, (x, y), widths=widths, optimizer="sgd", steps=1, learning_rate=lr, seeds=2)
    for i, width in enumerate(widths):
        for seed in range(2):
            p = one_hidden_linear(width).init(jax.random.fold_in(jax.random.key(seed), 0), x)
            u, v = (np.asarray(p[name], np.float64) for name in ("u", "v"))
            residual = 2 * (x @ u @ v - y) / y.size
            du, dv = -lr * x.T @ residual @ v.T, -lr * (x @ u).T @ residual
            dh, df = x @ du, x @ (u + du) @ (v + dv) - x @ u @ v
            for q, value in ((0, dh), (1, df)):
                assert check.samples(q, "change", 1)[seed, i] == pytest.approx(np.sqrt(np.mean(value**2)), rel=1e-4)


@pytest.mark.slow
def test_a_transformer_of_tokens_as_flax_wrote_it():
    check = coord_check(
        Transformer, pj.mup, tokens(), widths=[32, 64, 128, 256], steps=1, learning_rate=1e-4, loss="cross_entropy", seeds=3
    )
    kinds = {q.name: q.kind for q in check.quantities}
    assert kinds["['attention']['out']['kernel']"] == kinds["['down']['kernel']"] == "branch"
    assert kinds["stream + ['attention']['out']['kernel']"] == "stream"
    assert sorted(kinds.values()).count("attention") == 1
    embedding = next(row for row in check.table() if row.quantity == "['embed']['embedding']" and row.step == 1)
    # Adam moves every entry of a used row by the learning rate, which for an embedding is that of the base.
    assert embedding.exponent == pytest.approx(0, abs=0.01)
    assert all(row.verdict != "grows" for row in check.table() if row.step == 1)


@pytest.mark.slow
def test_depth_is_checked_with_layers_of_one_kind_together():
    def family(width, depth):
        return Scanned(width, depth)

    def check(scheme):
        return coord_check(
            family, scheme, DATA, depths=[2, 4, 8, 16], width=16, steps=1, learning_rate=1e-3, optimizer="adam", seeds=3, batch=8
        )

    plain, scaled = check(pj.mup), check(pj.depth_mup)
    stream = [i for i, q in enumerate(plain.quantities) if q.kind == "stream"]
    assert len(stream) == 1
    # x + f(x) after L layers has the sum of L independent branches, and L learning rates; over sqrt(L) each, both stay.
    growth = {c.parametrization: next(r.exponent for r in c.table() if r.kind == "stream" and r.step == 1) for c in (plain, scaled)}
    assert growth["muP"] > 0.5
    assert abs(growth["Depth-muP"]) < 0.3
    assert not plain.passes
    assert "no prediction" in str(plain)


def test_table_and_figure_say_what_was_found(sp_sgd, tmp_path):
    text = str(sp_sgd)
    assert text.startswith("coordinate check of SP, sgd, learning rate 0.01: exponents of the width")
    assert "fails: every change flat to ±0.15 after step 1" in text
    figure = sp_sgd.plot()
    assert [ax.get_title() for ax in figure.axes[:2]] == ["size at the start", "change after step 1"]
    from paperjax.report.figure import save_figure

    assert all(path.stat().st_size > 0 for path in save_figure(figure, tmp_path))
    assert sp_sgd.data["change"].dims == ("quantity", "width", "seed", "step")


def test_the_figure_does_not_pool_what_has_other_predictions(sp_sgd):
    """Flax's own numbers: Dense_0 and Dense_2 are input and readout, of other exponents; layers of one prediction are drawn as one."""
    dense = (q._replace(name=f"['Dense_{i}']", kind="preactivation", layer=None) for i, q in enumerate(sp_sgd.quantities))
    named = dataclasses.replace(sp_sgd, quantities=tuple(dense))
    assert _labelled(named) == ["Dense_0", "Dense_1", "Dense_2"]
    assert _labelled(dataclasses.replace(named, predicted=((0.0, 0.0), (0.0, 0.5), (0.0, 0.5)))) == ["Dense_0", "Dense_1 and 1 more"]
    assert _labelled(dataclasses.replace(named, predicted=((0.0, 0.5),) * 3)) == ["Dense_#"]


def _labelled(check):
    return [text.get_text() for ax in check.plot().axes if ax.get_legend() for text in ax.get_legend().get_texts()]


def test_divergence_names_width_step_and_seed():
    def family(width):
        inner = tanh_mlp(width)
        broken = jnp.inf if width == 32 else 1.0
        return pj.Model(inner.init, lambda params, x: inner.apply(params, x) * broken)

    with pytest.raises(FloatingPointError, match=r"width=32, step 0, seed 0, outputs is not finite.*before any training"):
        coord_check(family, None, DATA, widths=[8, 16, 32, 64], optimizer="sgd", steps=1, learning_rate=0.1, seeds=2)
    with pytest.raises(FloatingPointError, match=r"width=8, step \d+, seed 0.*Use a smaller learning rate"):
        coord_check(one_hidden_linear, None, (DATA[0], DATA[1][:, :2]), widths=[8, 16, 32, 64], optimizer="sgd", steps=6, learning_rate=1e6,
                    seeds=2)  # fmt: skip


def test_what_does_not_move_at_all_is_not_called_flat():
    check = coord_check(one_hidden_linear, None, (DATA[0], DATA[1][:, :2]), widths=[8, 16, 32, 64], optimizer="sgd", steps=1,
                        learning_rate=1e-9, seeds=2)  # fmt: skip
    assert {row.verdict for row in check.table() if row.step == 1} <= {"rounding", "unmoved"}
    assert not check.passes


def test_rows_that_are_undecided_say_what_to_do():
    data = DATA[0], DATA[1][:, :2]
    text = str(coord_check(one_hidden_linear, None, data, widths=[4, 5, 6, 7], optimizer="sgd", steps=1, learning_rate=0.01, seeds=2))
    assert "undecided: an interval wider than ±0.15" in text
    assert "more seeds" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "widths=.* or depths="),
        (dict(widths=[8, 16], depths=[1, 2]), "widths=.* or depths="),
        (dict(widths=[8, 16, 32]), "at least 4"),
        (dict(widths=[8, 16, 32, 32, 64]), "each to be given once"),
        (dict(depths=[1, 2, 3, 4]), "takes no size 'depth'"),
        (dict(widths=[8, 16, 32, 64], heads=2), "takes no size 'heads'"),
        (dict(widths=[8, 16, 32, 64], width=4), "keep the first"),
        (dict(widths=[8, 16, 32, 64], seeds=1), "at least 2"),
        (dict(widths=[8, 16, 32, 64], steps=0), "at least one step"),
        (dict(widths=[8, 16, 32, 64], base=dict(width=16)), "base width = 16 is larger"),
        (dict(widths=[8, 16, 32, 64], optimizer="lbfgs"), "no family|unknown"),
    ],
)
def test_bad_input_is_refused_before_training(arguments, message):
    with pytest.raises(ValueError, match=message):
        coord_check(tanh_mlp, pj.mup, DATA, **arguments)


@pytest.mark.parametrize("parametrization", [None, pj.mup])
def test_inputs_that_are_not_one_array_are_refused(parametrization):
    with pytest.raises(TypeError, match="coord_check: x is a dict with 'a', and must be one array"):
        coord_check(tanh_mlp, parametrization, DATA, widths=[8, 16, 32, 64], x={"a": DATA[0]})
