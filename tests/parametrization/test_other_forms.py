"""Arguments and files of another form than a plan takes are refused by name, with the cause and the fix."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import paperjax as pj
from paperjax.parametrization import plan as make_plan
from paperjax.parametrization.plan import Plan
from tests.parametrization.test_contract import BASE, FAMILY, TARGET, one_trace, planned
from tests.zoo import as_users_run_it

__all__ = ["one_trace"]  # a fixture: the family is traced once


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"base": 16}, TypeError, r"base = 16: sizes are given by name, base=dict\(width=16\)"),
        ({"target": [("width", 16)]}, TypeError, r"target = .*sizes are given by name"),
        ({"uses": {"['readout']": "hidden"}}, TypeError, r"uses\[\"\['readout'\]\"\] is 'hidden'.*pj\.trace\.Use"),
        ({"uses": "hidden"}, TypeError, r"uses = 'hidden': give \{path"),
        ({"init_std": {"['readout']": 0.1}}, TypeError, r"init_std\[.*readout.*\] is 0\.1, and must be a function"),
        ({"init_std": 0.1}, TypeError, r"init_std = 0\.1: give \{path"),
        *(
            ({"init_std": {"['readout']": lambda i, o, v=v: v}}, ValueError, rf"\['readout'\].* gives {shown} at fan_in = 16, fan_out = 7")
            for v, shown in ((-1.0, "-1.0"), (math.nan, "nan"), (math.inf, "inf"), ("wide", "'wide'"), (None, "None"))
        ),
        # Wrong at the base alone.
        ({"init_std": {"['readout']": lambda i, o: i - 10}}, ValueError, "gives -2 at fan_in = 8, fan_out = 7"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_another_form(settings, error, message):
    with as_users_run_it(), pytest.raises(error, match=message):
        make_plan(FAMILY, pj.mup, **{"base": BASE, "target": TARGET, **settings})


def test_a_told_std_may_be_an_array_or_zero():
    for std in (np.float32(0.5), jnp.asarray(0.5), 0):
        plan = planned(pj.mup, "adam", init_std={"['readout']": lambda fan_in, fan_out, std=std: std})
        assert {leaf.path: leaf.init_std for leaf in plan.leaves}["['readout']"] == float(std) / 2


def _without(record, *where):
    *above, last = where
    for name in above:
        record = record[name]
    del record[last]


def _with(record, value, *where):
    *above, last = where
    for name in above:
        record = record[name]
    record[last] = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: _without(r, "rule"), "the plan lacks the field 'rule'"),
        (lambda r: _with(r, 1, "leafs"), "has a field 'leafs' that no plan has.*Did you mean 'leaves'"),
        (lambda r: _without(r, "leaves", 0, "dtype"), "a leaf of the plan lacks the field 'dtype'"),
        (lambda r: _without(r, "leaves", 0, "factors", "eps"), "factors lacks the field 'eps'"),
        (lambda r: _with(r, "fast", "leaves", 0, "factors", "learning_rate"), "its learning_rate is 'fast', not a finite number"),
        (lambda r: _with(r, math.nan, "leaves", 0, "factors", "eps"), "its eps is nan, not a finite number"),
        (lambda r: _with(r, 7, "leaves", 0), "a leaf of the plan is 7, not a record"),
        (lambda r: _with(r, 7, "leaves", 0, "shape"), "has another form"),
        (lambda r: _with(r, 7, "leaves"), "has another form"),
        (lambda r: _with(r, 7, "base"), "has another form"),
        (lambda r: _without(r, "scalings", 0, "why"), "on an activation lacks the field 'why'"),
    ],
)
def test_a_file_that_is_no_plan(edit, message):
    record = json.loads(planned(pj.mup, "adam").to_json())
    assert record["scalings"]
    edit(record)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(json.dumps(record))


@pytest.mark.parametrize(("text", "message"), [("hello", "it is not JSON"), ("[]", "no plan of format 3"), ("{}", "no plan of format 3")])
def test_a_text_that_is_no_plan(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)
