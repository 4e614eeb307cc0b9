"""What every parametrization's plan must keep, over the table of them all; and what it must refuse."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from paperjax.parametrization import plan as make_plan
from paperjax.parametrization import planning
from paperjax.parametrization.factors import RULES, Factors
from paperjax.parametrization.plan import Plan
from paperjax.trace.program import read
from tests.zoo import as_users_run_it

SCHEMES = (
    pj.standard, pj.standard_full_align, pj.ntp, pj.mean_field, pj.mup, pj.mup_table8, pj.mup_table9, pj.depth_mup, pj.completep,
    pj.spectral, pj.u_mup, pj.wd_layerwise,
)  # fmt: skip
TOKENS = jnp.zeros((2, 4), int)
BASE, TARGET = {"width": 8, "depth": 1}, {"width": 16, "depth": 2}
FAMILY = pj.family(lambda width, depth: pj.models.transformer(width, depth, 2, vocab=7), x=TOKENS)
ROWS = jnp.ones((2, 3))
MLP = pj.family(lambda width, depth: pj.models.mlp(width, depth, 2), x=ROWS)


@pytest.fixture(autouse=True)
def one_trace(monkeypatch):
    """A family is traced once between two sizes for all the plans made of it here: the trace is not what is tested."""
    monkeypatch.setattr(planning, "read", _read)


_seen = {}


def _read(fam, base, target, x, uses):
    if fam is not FAMILY or uses or not isinstance(base, dict) or not isinstance(target, dict):
        return read(fam, base, target, x, uses)
    key = (id(fam), tuple(base.items()), tuple(target.items()))
    if key not in _seen:
        _seen[key] = read(fam, base, target, x, uses)
    return _seen[key]


every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
every_rule = pytest.mark.parametrize("rule", ["sgd", "adam", "muon"])


def planned(scheme, rule, base=BASE, target=TARGET, **settings):
    return make_plan(FAMILY, scheme, base=base, target=target, optimizer=rule, **settings)


def moves_features(scheme):
    return pj.parametrization.classify(scheme, 2, "adam").regime == "feature learning"


@every_scheme
@every_rule
def test_contract(scheme, rule):
    if rule == "muon" and not moves_features(scheme) and scheme.name != "u-muP":
        with pytest.raises(ValueError, match="Muon's learning rates come from Adam's, as updates"):
            planned(scheme, rule)
        return
    plan = planned(scheme, rule)

    same = planned(scheme, rule, TARGET, TARGET)
    for leaf, like in zip(same.leaves, plan.leaves):
        undecayed = like.factors.weight_decay == 0
        assert leaf.factors == Factors(weight_decay=0.0 if undecayed else 1.0)
        assert leaf.rule == like.rule
    assert same.scalings == ()

    again = planned(scheme, rule)
    assert again == plan
    assert hash(again) == hash(plan)
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    assert read.network is None
    assert json.loads(plan.to_json())["format"] == 3
    assert dataclasses.replace(plan, name="another") != plan

    for leaf in plan.leaves:
        assert all(math.isfinite(value) and value > 0 for value in leaf.factors[:4]), leaf
        assert leaf.factors.weight_decay >= 0
        assert math.isfinite(leaf.init_std)
    assert {leaf.rule for leaf in plan.leaves} == ({"muon", "adam"} if rule == "muon" else {rule})


def programs(model):
    """The traces of init and apply, as text: the same text is the same arithmetic."""
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key, TOKENS)
    return str(jax.make_jaxpr(model.init)(key, TOKENS)), str(jax.make_jaxpr(model.apply)(params, TOKENS))


@every_scheme
def test_at_the_base_the_model_is_the_users(scheme):
    assert programs(planned(scheme, "adam", TARGET, TARGET).model) == programs(FAMILY(**TARGET))


@pytest.mark.parametrize("scheme", [pj.depth_mup, pj.mup_table9], ids=lambda s: s.name)
def test_a_plan_from_a_file_is_the_plan(scheme):
    plan = planned(scheme, "adam")
    read = Plan.from_json(plan.to_json()).bind(FAMILY(**TARGET))
    assert programs(read.model) == programs(plan.model)
    assert programs(plan.model) != programs(plan.network)
    # Nothing of the plan is left in the network that it was made for.
    assert programs(plan.network) == programs(FAMILY(**TARGET))


def test_plans_pass_through_transformations():
    plan = planned(pj.depth_mup, "adam")
    keys = jax.random.split(jax.random.key(0), 3)

    def ensemble(keys):
        inside = planned(pj.depth_mup, "adam")
        assert inside == plan
        params = jax.vmap(lambda key: inside.model.init(key, TOKENS))(keys)
        return jax.grad(lambda p: jnp.sum(jax.vmap(inside.model.apply, in_axes=(0, None))(p, TOKENS)))(params)

    assert jax.eval_shape(jax.jit(ensemble), keys)["readout"].shape == (3, 16, 7)


# Refusals ---------------------------------------------------------------------------------------------------------------


def test_a_model_of_other_shapes_is_refused():
    plan = planned(pj.mup, "adam")
    params = plan.network.init(jax.random.key(0), TOKENS)
    other = {**params, "readout": jnp.zeros((16, 9))}
    with pytest.raises(ValueError, match=r"leaf \['readout'\] has shape \(16, 9\).*made for \(16, 7\)"):
        plan.model.apply(other, TOKENS)
    with pytest.raises(ValueError, match=r"has no leaf \['readot'\].*readout"):
        plan.factors("eps", {**{k: v for k, v in params.items() if k != "readout"}, "readot": params["readout"]})
    with pytest.raises(ValueError, match=r"a leaf \['readout'\] that the parameters lack"):
        plan.factors("eps", {k: v for k, v in params.items() if k != "readout"})
    with pytest.raises(ValueError, match=r"\['readout'\] has shape"):
        plan.optimizer(optax.adam, 0.1).init(other)


def test_optimizers():
    plan = planned(pj.mup, "adamw")
    with pytest.raises(ValueError, match=r"sgd follows the rule of 'sgd'.*optimizer='sgd'"):
        plan.optimizer(optax.sgd, 0.1)
    with pytest.raises(ValueError, match="of no family"):
        plan.optimizer(optax.lamb, 0.1)
    with pytest.raises(ValueError, match="'novograd' is of no family"):
        planned(pj.mup, optax.novograd)
    with pytest.raises(ValueError, match=r"Did you mean.*adamw"):
        planned(pj.mup, "adamv")
    with pytest.raises(ValueError, match=r"say plan\.optimizer.*follows='adam'"):
        plan.optimizer(lambda learning_rate: optax.adam(learning_rate), 0.1)
    with pytest.raises(ValueError, match="follows the rule of 'sgd'"):
        plan.optimizer(lambda learning_rate: optax.sgd(learning_rate), 0.1, follows="sgd")
    with pytest.raises(ValueError, match="must be 'sgd' or 'adam'"):
        plan.optimizer(lambda learning_rate: optax.sgd(learning_rate), 0.1, follows="muon")
    with pytest.raises(ValueError, match="factory"):
        plan.optimizer(optax.adam(0.1), 0.1)


@pytest.mark.parametrize("optimizer", [name for members in RULES.values() for name in members])
def test_every_optimizer_of_the_families_is_one_of_optaxs(optimizer):
    assert hasattr(optax, optimizer) or hasattr(optax.contrib, optimizer)


def test_sizes():
    with pytest.raises(ValueError, match="base width = 16 is larger than the target's 8"):
        planned(pj.mup, "adam", TARGET, {**TARGET, "width": 8})
    with pytest.raises(ValueError, match=r"'width' that the family does not take. It names no size"):
        pj.plan(pj.family(lambda **sizes: pj.models.mlp(**sizes), x=jnp.ones((1, 4))), pj.mup, base=dict(width=4), target=dict(width=8))
    with pytest.raises(ValueError, match=r"'widht' that the family does not take.*width"):
        planned(pj.mup, "adam", {"widht": 8, "depth": 1})
    with pytest.raises(ValueError, match="depth is in one of them only"):
        planned(pj.mup, "adam", {"width": 8})
    with pytest.raises(ValueError, match="base width = 16 is larger than the target's 8"):
        planned(pj.mup, "adam", TARGET, {**TARGET, "width": np.int64(8)})
    with pytest.raises(ValueError, match="base width = 16 is larger than the target's 8"):
        planned(pj.mup, "adam", {**TARGET, "width": np.int32(16)}, {**TARGET, "width": 8})
    for base, target in (((8, 8), (4, 4)), ([4, 8], [8, 4]), ((4, np.int64(8)), (8, np.int64(4)))):
        with pytest.raises(ValueError, match=r"base widths = .* is larger than the target's"):
            make_plan(BY_LAYER, pj.mup, base={"widths": base}, target={"widths": target})


def by_layer(widths):
    return nn.Sequential([nn.Dense(widths[0]), nn.tanh, nn.Dense(widths[1]), nn.tanh, nn.Dense(1)])


BY_LAYER = pj.family(by_layer, x=ROWS)


@pytest.mark.parametrize(
    ("base", "target"), [((4, 4), (16, 8)), ([4, 4], [16, 8]), ((np.int64(4), 4), (np.int32(16), 8))], ids=["tuple", "list", "numpy"]
)
def test_sizes_that_are_several_numbers(base, target):
    plan = make_plan(BY_LAYER, pj.mup, base={"widths": base}, target={"widths": target})
    assert plan.target == (("widths", (16, 8)),)
    rates = {leaf.path: leaf.factors.learning_rate for leaf in plan.leaves if "kernel" in leaf.path}
    assert rates == {"['layers_0']['kernel']": 1.0, "['layers_2']['kernel']": 0.25, "['layers_4']['kernel']": 0.5}
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    assert read == make_plan(BY_LAYER, pj.mup, base={"widths": (4, 4)}, target={"widths": (16, 8)})


def test_sizes_of_numpy_are_plain_numbers_in_a_plan():
    family = pj.family(lambda width, rate, biased: nn.Dense(width, use_bias=biased), x=ROWS)
    sizes = {"rate": np.float32(0.5), "biased": np.bool_(True)}
    theirs = make_plan(family, pj.mup, base={"width": np.int64(4), **sizes}, target={"width": np.int32(16), **sizes})
    ours = make_plan(family, pj.mup, base={"width": 4, "rate": 0.5, "biased": True}, target={"width": 16, "rate": 0.5, "biased": True})
    assert [type(value) for _, value in theirs.target] == [int, float, bool]
    assert theirs == ours == Plan.from_json(theirs.to_json())
    assert hash(theirs) == hash(ours)


def test_a_size_that_json_cannot_hold_is_said_to_be_one():
    family = pj.family(lambda width, activation: nn.Sequential([nn.Dense(width), activation, nn.Dense(1)]), x=ROWS)
    plan = make_plan(family, pj.mup, base={"width": 4, "activation": nn.tanh}, target={"width": 8, "activation": nn.tanh})
    assert hash(plan) == hash(dataclasses.replace(plan))
    with pytest.raises(TypeError, match=r"a size of the plan is .*tanh.* which JSON cannot hold"):
        plan.to_json()


def test_a_standard_deviation_that_is_not_known_is_none():
    """A finite leaf may be drawn in a way that was not followed; its plan is still equal to itself, and JSON."""

    def gamma(key, shape, dtype=jnp.float32):
        return jax.random.gamma(key, 2.0, shape)

    def made():
        family = pj.family(lambda width: nn.Sequential([nn.Dense(width), nn.tanh, nn.Dense(1, bias_init=gamma)]), x=ROWS)
        return make_plan(family, pj.mup, base={"width": 4}, target={"width": 8})

    plan = made()
    bias = next(leaf for leaf in plan.leaves if leaf.path == "['layers_2']['bias']")
    assert bias.init_std is None
    assert bias.factors.init_scale == 1.0
    assert plan == made() == Plan.from_json(plan.to_json())
    assert hash(plan) == hash(made())

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert None in [leaf["init_std"] for leaf in json.loads(plan.to_json(), parse_constant=refuse)["leaves"]]
    row = next(line for line in str(plan).splitlines() if "layers_2.bias" in line)
    assert row.split()[3] == "?"
    # What an earlier version wrote.
    assert Plan.from_json(plan.to_json().replace('"init_std": null', '"init_std": NaN')) == plan


def test_overrides_of_leaves_that_are_not_there():
    with pytest.raises(ValueError, match=r"init_std names a leaf \"\['readot'\]\" that is not there.*readout"):
        planned(pj.mup, "adam", init_std={"['readot']": lambda fan_in, fan_out: 1.0})
    with pytest.raises(ValueError, match=r"uses names a leaf.*readout"):
        planned(pj.mup, "adam", uses={"['readot']": pj.trace.program.Use()})


def test_modes_and_schemes():
    with pytest.raises(ValueError, match=r"no mode of decay.*coupled"):
        planned(pj.mup, "adam", weight_decay="couple")
    with as_users_run_it(), pytest.raises(TypeError, match="needs a Parametrization"):
        planned("mup", "adam")
    with pytest.raises(ValueError, match="no residual add"):
        make_plan(MLP, pj.depth_mup, base={"width": 4, "depth": 2}, target={"width": 8, "depth": 4})
    with pytest.raises(ValueError, match="it was read from a file"):
        _ = Plan.from_json(planned(pj.mup, "adam").to_json()).model
    with pytest.raises(ValueError, match="no plan of format 3"):
        Plan.from_json('{"format": 7}')
    with pytest.raises(ValueError, match="three exponents"):
        pj.abc("two", (0, 0), (0, 0.5, 1), (0, 0, 0), (0, 0, 0))
    with pytest.raises(ValueError, match="finite"):
        pj.abc("nan", (0, 0, math.nan), (0, 0.5, 1), (0, 0, 0), (0, 0, 0))


def test_a_leaf_used_in_two_ways_that_scale_differently():
    def twice(width):
        def apply(p, x):
            h = jnp.tanh(x @ p["u"]) @ p["w"]
            return (h + p["w"][jnp.argmax(x, -1)]) @ p["v"]

        shapes = {"u": (3, width), "w": (width, width), "v": (width, 1)}
        return pj.Model(lambda key, x: {k: jax.random.normal(key, s) for k, s in shapes.items()}, apply)

    with pytest.raises(ValueError, match=r"\['w'\] is used as hidden and as embedding"):
        make_plan(pj.family(twice, x=ROWS), pj.mup, base={"width": 4}, target={"width": 8})


def test_an_initialization_that_cannot_be_read_is_asked_for():
    class Whitened(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            w = self.param("w", lambda key: x.T @ jax.random.normal(key, (x.shape[0], self.width)))
            return nn.Dense(1)(jnp.tanh(x @ w))

    family = pj.family(lambda width: Whitened(width), x=ROWS)
    with pytest.raises(ValueError, match=r"\['w'\]: its initialization depends on the data"):
        make_plan(family, pj.mup, base={"width": 4}, target={"width": 16})
    plan = make_plan(family, pj.mup, base={"width": 4}, target={"width": 16}, init_std={"['w']": lambda fan_in, fan_out: fan_out**-0.5})
    assert {leaf.path: leaf.factors.init_scale for leaf in plan.leaves}["['w']"] == 2.0


def test_a_centred_network_starts_at_zero_under_any_plan():
    def centred(net):
        return pj.family(lambda width: pj.transforms.center(net(width)), x=ROWS if net is tanh_net else TOKENS)

    def tanh_net(width):
        return pj.models.mlp(width, 2, 2, activation=jnp.tanh)

    for scheme in (pj.mup, pj.mup_table9, pj.ntp):
        plan = make_plan(centred(tanh_net), scheme, base={"width": 8}, target={"width": 64}, optimizer="sgd")
        params = plan.model.init(jax.random.key(0), ROWS)
        alone = make_plan(pj.family(tanh_net, x=ROWS), scheme, base={"width": 8}, target={"width": 64}, optimizer="sgd")
        assert jnp.abs(alone.model.apply(alone.model.init(jax.random.key(0), ROWS), ROWS)).max() > 1e-3
        assert plan.model.apply(params, ROWS).tolist() == [[0.0, 0.0]] * 2
        assert Plan.from_json(plan.to_json()) == plan
    # Logits of 1/d are a factor on an activation, which the copy would not get.
    with pytest.raises(ValueError, match=r"copy of itself.*\['origin'\].*center\(plan\.model\)"):
        make_plan(
            centred(lambda width: pj.models.transformer(width, 1, 2, vocab=7)),
            pj.mup,
            base={"width": 8},
            target={"width": 16},
            optimizer="sgd",
        )
