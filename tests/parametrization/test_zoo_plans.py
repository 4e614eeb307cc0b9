"""The plan of every model of the zoo is the one written by hand: Table 3 of Tensor Programs V at twice the width, and Depth-muP's.

From the roles written beside each model, from its leaves' names, and from the papers' numbers at a ratio of widths of 2; nothing here is
read from a trace but the standard deviations at the base, which `tests/trace/test_read.py` compares with a draw.
"""

import json

import pytest

import paperjax as pj
from paperjax.parametrization import planning
from tests.trace.zoo_models import ZOO
from tests.zoo import as_users_run_it

pytestmark = pytest.mark.slow

ROOT = 2**-0.5
# Per role: learning rate for SGD and for Adam, Adam's eps, std over the base's. arXiv 2203.03466, Table 3 and appendix B.3, n = 2.
TABLE_3 = {
    "input": (2.0, 1.0, 0.5, 1.0), "vector": (2.0, 1.0, 0.5, 1.0), "embedding": (2.0, 1.0, 0.5, 1.0),
    "hidden": (1.0, 0.5, 0.5, ROOT), "output": (0.5, 0.5, 1.0, 0.5), "finite": (1.0, 1.0, 1.0, 1.0),
}  # fmt: skip
# A tied embedding follows the input's column, and its use as a readout is multiplied by 1/n.
TABLE_3["embedding+output"] = TABLE_3["embedding"]

# Products of 1/sqrt(d) of the queries' and keys' size become 1/d: times 2^-1/2, and 1/2 where there was no factor at all. Heads that keep
# their size, and what is 1/d already, stay.
LOGITS = {"vit": [ROOT] * 2, "gpt, unrolled": [ROOT] * 6, "gpt, remat, scan axis 0": [ROOT], "gpt, remat, scan axis 1": [ROOT],
          "gpt, fused qkv": [ROOT] * 6, "gpt, unscaled logits": [0.5], "nnx transformer": [ROOT] * 2,
          "gqa": [ROOT], "gqa, einsum": [ROOT], "gqa, repeated keys": [ROOT], "mqa": [ROOT], "two towers": [0.5]}  # fmt: skip
TIED = {"gpt, tied, 1/d": [0.5], "gpt, tied, heads grow": [0.5]}


@pytest.fixture(autouse=True)
def _usual_promotion():
    with as_users_run_it():
        yield


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Each model is read once for all tests here."""
    known = {}
    read = planning.read

    def once(family, base, target, x=None, uses=None):
        name = (id(family.make), json.dumps(base), json.dumps(target))
        if name not in known:
            known[name] = read(family, base, target, x, uses)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "read", once)
        yield once


def planned(name, scheme, rule):
    case = ZOO[name]
    return pj.plan(case.family, scheme, base=case.base, target=case.target, optimizer=rule)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("name", ZOO)
def test_mup_is_table_3(name, rule, read_once):
    case = ZOO[name]
    plan = planned(name, pj.mup, rule)
    laws = {leaf.path: leaf.base_law for leaf in read_once(case.family, case.base, case.target).leaves}
    assert len(plan.leaves) == len(case.roles)
    for leaf in plan.leaves:
        sgd, adam, eps, std = TABLE_3[case.roles[leaf.path]]
        expected = (sgd, 1.0) if rule == "sgd" else (adam, eps)
        assert (leaf.factors.learning_rate, leaf.factors.eps) == pytest.approx(expected), leaf.path
        # What learning rate × decay removes of a weight in a step does not know the width.
        assert leaf.factors.learning_rate * leaf.factors.weight_decay == pytest.approx(1.0), leaf.path
        assert leaf.factors.multiplier == pytest.approx(1.0), leaf.path
        if laws[leaf.path].kind == "constant":
            assert leaf.factors.init_scale == 1.0, leaf.path
        else:
            assert leaf.init_std == pytest.approx(std * laws[leaf.path].std, rel=1e-3), leaf.path
    logits = [s.factor for s in plan.scalings if s.why.startswith("logits")]
    others = [s.factor for s in plan.scalings if not s.why.startswith("logits")]
    assert logits == pytest.approx(LOGITS.get(name, []))
    assert others == pytest.approx(TIED.get(name, []))


DEEP = {name for name, case in ZOO.items() if case.depth_ratio == 3.0}


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("name", sorted(DEEP))
def test_depth_mup_scales_the_branches(name, rule):
    case = ZOO[name]
    assert len(DEEP) >= 6
    writers = {path for _, paths in case.adds for path in paths}
    plan, flat = planned(name, pj.depth_mup, rule), planned(name, pj.mup, rule)
    for leaf, without in zip(plan.leaves, flat.leaves):
        inside = "block" in leaf.path or ".stack" in leaf.path
        # arXiv 2310.02244: branches 1/sqrt(L), Adam's learning rate 1/sqrt(L), SGD's as it is; three times the depth.
        slower = 3**-0.5 if inside and rule == "adam" else 1.0
        assert leaf.factors.learning_rate == pytest.approx(slower * without.factors.learning_rate), leaf.path
        assert leaf.factors.multiplier == pytest.approx(3**-0.5 if leaf.path in writers else 1.0), leaf.path
        assert leaf.init_std == pytest.approx(without.init_std), leaf.path
