"""A model under its plan against a twin parametrized by hand from the papers' tables: one trajectory, at float64.

The twin knows nothing of plans: its initialization, multipliers and learning rates are written out here, and its SGD and AdamW too.
n is the ratio of widths, m that of depths.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from tests.parametrization.trajectories import STEPS, distance, trajectory
from tests.zoo import as_users_run_it

pytestmark = pytest.mark.slow

N, M = 4.0, 2.0
RATE, EPS, DECAY = {"sgd": 0.05, "adam": 0.02}, 1e-4, 0.3


@pytest.fixture(autouse=True)
def double():
    with as_users_run_it(), jax.enable_x64(True):
        yield


def by_hand(apply, params, x, y, rule, rates, eps):
    """SGD with decay in the gradient, or AdamW (arXiv 1711.05101); lr × decay is one number for all leaves."""

    def step(state, t):
        w, first, second = state
        out, back = jax.vjp(lambda p: apply(p, x), w)
        g = back(2 * (out - y) / out.size)[0]
        if rule == "sgd":
            w = jax.tree.map(lambda w, g, lr: w - RATE[rule] * lr * g - RATE[rule] * DECAY * w, w, g, rates)
        else:
            first = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, first, g)
            second = jax.tree.map(lambda a, g: 0.999 * a + 0.001 * g * g, second, g)
            w = jax.tree.map(
                lambda w, a, b, lr, e: (
                    w - RATE[rule] * lr * (a / (1 - 0.9**t)) / (jnp.sqrt(b / (1 - 0.999**t)) + EPS * e) - RATE[rule] * DECAY * w
                ),
                w, first, second, rates, eps,
            )  # fmt: skip
        return (w, first, second), out

    @jax.jit
    def run(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        (w, _, _), outs = jax.lax.scan(step, (params, zeros, zeros), jnp.arange(1.0, STEPS + 1))
        return jnp.concatenate([outs, apply(w, x)[None]])

    return np.asarray(run(params))


def under_plan(family, scheme, base, target, rule, x, y):
    plan = pj.plan(family, scheme, base=base, target=target, optimizer=rule)
    if rule == "sgd":
        tx = plan.optimizer(optax.sgd, RATE[rule], weight_decay=DECAY)
    else:
        tx = plan.optimizer(optax.adamw, optax.constant_schedule(RATE[rule]), eps=EPS, weight_decay=DECAY)
    return trajectory(plan.model.apply, plan.model.init(jax.random.key(0), x), tx, x, y)


def same(ours, theirs):
    assert distance(ours, theirs) < 1e-10


def rows(features=3, outputs=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(6, features))), jnp.asarray(rng.normal(size=(6, outputs)))


both = pytest.mark.parametrize("rule", ["sgd", "adam"])


@both
def test_plain_perceptron_in_table_3(rule):
    def net(width, stds=lambda n: (3**-0.5, n**-0.5, n**-0.5)):
        def init(key, x):
            shapes, keys = ((3, width), (width, width), (width, 2)), jax.random.split(key, 3)
            return {k: jax.random.normal(j, s) * std for k, j, s, std in zip("uwv", keys, shapes, stds(width))}

        return pj.Model(init, lambda p, x: jnp.tanh(jnp.tanh(x @ p["u"]) @ p["w"]) @ p["v"])

    x, y = rows()
    ours = under_plan(pj.family(lambda width: net(width), x=x), pj.mup, {"width": 8}, {"width": 32}, rule, x, y)
    # Table 3: the readout's variance is 1/n^2 and its lr 1/n; 1/sqrt(8) is what it has at the base.
    twin = net(32, lambda n: (3**-0.5, 32**-0.5, 8**-0.5 / N))
    rates = {"u": N, "w": 1.0, "v": 1 / N} if rule == "sgd" else {"u": 1.0, "w": 1 / N, "v": 1 / N}
    eps = {"u": 1 / N, "w": 1 / N, "v": 1.0}
    same(ours, by_hand(twin.apply, twin.init(jax.random.key(0), x), x, y, rule, rates, eps))


@both
def test_linen_perceptron_with_biases_in_table_8(rule):
    class Net(nn.Module):
        width: int
        multiplier: float = 1.0
        readout_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(nn.Dense(self.width, param_dtype=jnp.float64, bias_init=nn.initializers.normal(0.1))(x))
            z = nn.Dense(2, param_dtype=jnp.float64, use_bias=False, kernel_init=self.readout_init)(x)
            return self.multiplier * z + self.param("c", nn.initializers.zeros, (2,), jnp.float64)[None]

    x, y = rows()
    ours = under_plan(pj.family(lambda width: Net(width), x=x), pj.mup_table8, {"width": 8}, {"width": 32}, rule, x, y)
    # Table 8: the output is multiplied by 1/n and the readout's variance does not know n (here: 1/8, the base's 1/fan_in).
    wide = nn.initializers.variance_scaling(32 / 8, "fan_in", "truncated_normal")
    twin = pj.as_model(Net(32, 1 / N, wide))
    first, dense = {"sgd": (N, 1.0), "adam": (1.0, 1 / N)}[rule]
    rates = {
        "Dense_0": {"kernel": first, "bias": first}, "Dense_1": {"kernel": dense, "bias": first},
        "Dense_2": {"kernel": first}, "c": 1.0,
    }  # fmt: skip
    eps = {**jax.tree.map(lambda _: 1 / N, rates), "c": 1.0}
    same(ours, by_hand(twin.apply, twin.init(jax.random.key(0), x), x, y, rule, rates, eps))


def gpt(width, depth, tied, logits=lambda d: d**-0.5, branch=1.0, output=1.0, embedding=lambda n: n**-0.5):
    """Pre-LN blocks with biases on all that writes; 2 heads; a Python loop over layers."""
    heads, vocab = 2, 5

    def init(key, x):
        keys = iter(jax.random.split(key, 3 + 6 * depth))

        def draw(*shape, fan_in):
            return jax.random.normal(next(keys), shape) * fan_in**-0.5

        def block():
            qkv = draw(width, 3, heads, width // heads, fan_in=width)
            out, up, down = draw(width, width, fan_in=width), draw(width, 2 * width, fan_in=width), draw(2 * width, width, fan_in=2 * width)
            biases = {"b_out": 0.1 * draw(width, fan_in=1), "b_down": 0.1 * draw(width, fan_in=1)}
            return {"gain": jnp.ones(width), "qkv": qkv, "out": out, "up": up, "down": down, **biases}

        params = {
            "embedding": draw(vocab, width, fan_in=1) * embedding(width),
            "position": 0.3 * draw(x.shape[1], width, fan_in=1),
            "blocks": [block() for _ in range(depth)],
        }
        return params if tied else {**params, "readout": draw(width, vocab, fan_in=width)}

    def norm(h):
        return (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)

    def apply(p, x):
        h = p["embedding"][x] + p["position"][None]
        for b in p["blocks"]:
            q, k, v = jnp.moveaxis(jnp.einsum("btd,dchk->cbthk", norm(h) * b["gain"][None, None], b["qkv"]), 0, 0)
            a = jax.nn.softmax(logits(width // heads) * jnp.einsum("bthk,bshk->bhts", q, k), -1)
            mixed = jnp.einsum("bhts,bshk->bthk", a, v).reshape(*x.shape, width)
            h = h + branch * (mixed @ b["out"] + b["b_out"][None, None])
            h = h + branch * (jax.nn.gelu(norm(h) @ b["up"]) @ b["down"] + b["b_down"][None, None])
        return output * (norm(h) @ (p["embedding"].T if tied else p["readout"]))

    return pj.Model(init, apply)


def tokens():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, 5, size=(3, 4))), jnp.asarray(rng.normal(size=(3, 4, 5)))


def transformer_rates(rule, m, depth, alpha):
    """Tables 3 (readout) and 8 (tied) with the branches' factors: lr, and eps."""
    inner, first, hidden = {
        "sgd": (m ** (2 * alpha - 1), N, 1.0),
        "adam": (m ** (alpha - 1), 1.0, 1 / N),
    }[rule]
    block = dict.fromkeys(("gain", "b_out", "b_down"), inner * first) | dict.fromkeys(("qkv", "out", "up", "down"), inner * hidden)
    rates = {"embedding": first, "position": first, "blocks": [block] * depth}
    eps = {"embedding": 1 / N, "position": 1 / N, "blocks": [dict.fromkeys(block, m**-alpha / N)] * depth}
    return rates, eps


@both
def test_transformer_in_depth_mup_with_attention_of_1_over_d(rule):
    x, y = tokens()
    family = pj.family(lambda width, depth: gpt(width, depth, tied=False), x=x)
    ours = under_plan(family, pj.depth_mup, {"width": 8, "depth": 1}, {"width": 32, "depth": 2}, rule, x, y)
    # Heads of 4 units at the base: 1/d that agrees with 1/sqrt(d) there is sqrt(4)/d. Branches times 1/sqrt(m).
    twin = gpt(32, 2, tied=False, logits=lambda d: 4**0.5 / d, branch=M**-0.5, embedding=lambda n: 8**-0.5)
    params = twin.init(jax.random.key(0), x)
    params["readout"] = params["readout"] * N**-0.5
    rates, eps = transformer_rates(rule, M, 2, 0.5)
    rates["readout"], eps["readout"] = 1 / N, 1.0
    same(ours, by_hand(twin.apply, params, x, y, rule, rates, eps))


@both
def test_tied_transformer(rule):
    x, y = tokens()
    family = pj.family(lambda width: gpt(width, 1, tied=True), x=x)
    ours = under_plan(family, pj.mup, {"width": 8}, {"width": 32}, rule, x, y)
    # An embedding's init and lr, and an explicit 1/n on the output.
    twin = gpt(32, 1, tied=True, logits=lambda d: 4**0.5 / d, output=1 / N, embedding=lambda n: 8**-0.5)
    same(ours, by_hand(twin.apply, twin.init(jax.random.key(0), x), x, y, rule, *transformer_rates(rule, 1.0, 1, 0.5)))


@both
def test_completep_of_a_stack_that_is_scanned(rule):
    def net(width, depth, branch=1.0, output=1.0, readout=lambda n: n**-0.5):
        def init(key, x):
            k = jax.random.split(key, 3)
            blocks = {"w": jax.random.normal(k[1], (depth, width, width)) * width**-0.5, "b": jnp.zeros((depth, width))}
            return {
                "u": jax.random.normal(k[0], (3, width)),
                "blocks": blocks,
                "v": jax.random.normal(k[2], (width, 2)) * readout(width),
            }

        def apply(p, x):
            h, _ = jax.lax.scan(lambda h, b: (h + branch * (jnp.tanh(h) @ b["w"] + b["b"][None]), None), x @ p["u"], p["blocks"])
            return output * (h @ p["v"])

        return pj.Model(init, apply)

    x, y = rows()
    family = pj.family(lambda width, depth: net(width, depth), x=x)
    ours = under_plan(family, pj.completep, {"width": 8, "depth": 2}, {"width": 32, "depth": 4}, rule, x, y)
    # CompleteP, Table 1: branches 1/m, Adam's lr in them m^0, SGD's m^1; unembedding times 1/n, of variance 1/8 for all n.
    twin = net(32, 4, branch=1 / M, output=1 / N, readout=lambda n: 8**-0.5)
    inner, first, hidden = {"sgd": (M, N, 1.0), "adam": (1.0, 1.0, 1 / N)}[rule]
    rates = {"u": first, "blocks": {"w": inner * hidden, "b": inner * first}, "v": first}
    eps = {"u": 1 / N, "blocks": {"w": 1 / N / M, "b": 1 / N / M}, "v": 1 / N}
    same(ours, by_hand(twin.apply, twin.init(jax.random.key(0), x), x, y, rule, rates, eps))
