"""What a branch is made of where loops stand in it and around it: against hand-written expectations, and time written out."""

import operator

import jax
import jax.numpy as jnp
import pytest

from paperjax.trace.streams import residual_adds
from tests.trace.test_streams import MATRIX, VECTOR, D, layer_norm, numbers, walked


def over_time(f, s, xs):
    return jax.lax.scan(f, s, xs)


def step_by_step(f, s, xs):
    out = []
    for t in range(len(jax.tree.leaves(xs)[0])):
        s, y = f(s, jax.tree.map(operator.itemgetter(t), xs))
        out.append(y)
    return s, jnp.stack(out)


def state(x):
    return jnp.zeros_like(x[:, 0])


def outer(k, v):
    return k[..., :, None] * v[..., None, :]


# Recurrences in time: `loop` runs over the steps; one step first, of (B, D) each.
def decayed(of):
    """RWKV and its kin: the state keeps a learned share, which acts in the carry alone."""

    def apply(p, x, loop):
        def step(s, a):
            s = of(p["w"]) * s + a
            return s, s

        return loop(step, state(x), (x @ p["a"]).swapaxes(0, 1))[1].swapaxes(0, 1)

    return apply


def matrix_state(reads_first, gate=None):
    """Linear attention (arXiv 2006.16236), RetNet (2307.08621) and GLA (2312.06635), which differ in what the state keeps."""

    def apply(p, x, loop):
        xs = {name: (x @ p[name]).swapaxes(0, 1) for name in ("qkvg" if gate == "data" else "qkv")}

        def step(s, a):
            kept = {None: 1.0, "number": 0.9}.get(gate)
            if kept is None:
                kept = jax.nn.sigmoid(a["g"] if gate == "data" else p["w"])[..., None]
            after = kept * s + outer(a["k"], a["v"])
            return after, jnp.einsum("bi,bij->bj", a["q"], s if reads_first else after)

        return loop(step, jnp.zeros((len(x), D, D)), xs)[1].swapaxes(0, 1)

    return apply


def delta_rule(p, x, loop):
    """DeltaNet (arXiv 2102.11174)."""

    def step(s, a):
        error = a["v"] - jnp.einsum("bi,bij->bj", a["k"], s)
        return s + outer(jax.nn.sigmoid(a["b"]) * a["k"], error), jnp.einsum("bi,bij->bj", a["q"], s)

    return loop(step, jnp.zeros((len(x), D, D)), {name: (x @ p[name]).swapaxes(0, 1) for name in "qkvb"})[1].swapaxes(0, 1)


def lstm(p, x, loop):
    def step(carry, a):
        h, c = carry
        i, f, g, o = jnp.split(a + h @ p["w"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), h

    return loop(step, (state(x), state(x)), (x @ p["a"]).swapaxes(0, 1))[1].swapaxes(0, 1)


def gru(p, x, loop):
    def step(h, a):
        r, z = jnp.split(jax.nn.sigmoid(a @ p["a"] + h @ p["w"]), 2, axis=-1)
        n = jnp.tanh(a @ p["n"] + r * (h @ p["m"]))
        return (1 - z) * n + z * h, h

    return loop(step, state(x), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def from_a_learned_state(p, x, loop):
    def step(s, a):
        return p["w"] * s + a, s

    return loop(step, p["s"] + state(x), (x @ p["a"]).swapaxes(0, 1))[1].swapaxes(0, 1)


def last_state(p, x, loop):
    return jnp.broadcast_to(loop(lambda s, a: (p["w"] * s + a, a), state(x), (x @ p["a"]).swapaxes(0, 1))[0][:, None], x.shape)


def two_loops(p, x, loop):
    """What one recurrence leaves is carried by the next."""

    def first(s, a):
        return p["w"] * s + a, s

    def second(s, a):
        return (p["m"] * s[1], s[0] + a), s[0]

    out = loop(first, state(x), (x @ p["a"]).swapaxes(0, 1))[1]
    return loop(second, (state(x), state(x)), out)[1].swapaxes(0, 1)


def shapes_of(names):
    return {name: VECTOR if name in "ws" else MATRIX for name in names}


RECURRENCES = {
    "decay": (decayed(lambda w: w), shapes_of("aw")),
    "decay, exp": (decayed(lambda w: jnp.exp(-jnp.exp(w))), shapes_of("aw")),
    "decay, sigmoid": (decayed(jax.nn.sigmoid), shapes_of("aw")),
    "linear attention": (matrix_state(False), shapes_of("qkv")),
    "linear attention, read first": (matrix_state(True), shapes_of("qkv")),
    "retention, read first": (matrix_state(True, "number"), shapes_of("qkv")),
    "learned decay": (matrix_state(False, "leaf"), shapes_of("qkvw")),
    "learned decay, read first": (matrix_state(True, "leaf"), shapes_of("qkvw")),
    "gated by the data": (matrix_state(False, "data"), shapes_of("qkvg")),
    "gated by the data, read first": (matrix_state(True, "data"), shapes_of("qkvg")),
    "delta rule, read first": (delta_rule, shapes_of("qkvb")),
    "lstm, read first": (lstm, {"a": (D, 4 * D), "w": (D, 4 * D)}),
    "gru, read first": (gru, {"a": (D, 2 * D), "w": (D, 2 * D), "n": MATRIX, "m": MATRIX}),
    "from a learned state, read first": (from_a_learned_state, shapes_of("asw")),
    "last state": (last_state, shapes_of("aw")),
    "state of states": (two_loops, shapes_of("aw") | {"m": VECTOR}),
}


def with_recurrence(mixer, shapes, blocks, loop, deep):
    """``h + mixer(norm(h)) o`` and ``h + tanh(h) f``, `blocks` times, layers in a Python loop or in one of `lax.scan`."""
    names = shapes | {"o": MATRIX, "f": MATRIX}

    def block(p, h):
        h = h + mixer(p, layer_norm(h), loop) @ p["o"]
        return h + jnp.tanh(h) @ p["f"]

    def by_scan(p, x):
        return jax.lax.scan(lambda h, p: (block(p, h), None), x @ p["u"], {name: p[name] for name in names})[0]

    def by_loop(p, x):
        h = x @ p["u"]
        for i in range(blocks):
            h = block({name: p[f"{name}{i}"] for name in names}, h)
        return h

    if deep:
        return by_scan, {"u": MATRIX} | {name: (blocks, *shape) for name, shape in names.items()}
    return by_loop, {"u": MATRIX} | {f"{name}{i}": shape for name, shape in names.items() for i in range(blocks)}


@pytest.mark.parametrize("deep", [False, True], ids=["layers written out", "layers scanned"])
# Written out, the LSTM's ``a[t] + h w`` is an add to what a[t] is cut from.
@pytest.mark.parametrize(
    ("name", "loop"),
    [(name, loop) for name in RECURRENCES for loop in (over_time, step_by_step) if (loop is over_time or "lstm" not in name)],
)
def test_a_branch_has_the_leaves_that_reach_it_through_a_carry(name, loop, deep):
    """By hand: all that the mixer and its projection use; and the same whether time runs in a loop or is written out."""
    mixer, shapes = RECURRENCES[name]
    apply, whole = with_recurrence(mixer, shapes, 2, loop, deep)
    found, names = walked(apply, numbers(whole))
    adds = [(add.repeats, [names[i] for i in add.writers], sorted(names[i] for i in add.leaves)) for add in residual_adds(found)]
    if deep:
        assert adds == [(2, ["o"], sorted([*shapes, "o"])), (2, ["f"], ["f"])]
    else:
        assert adds == [
            one for i in range(2) for one in ((1, [f"o{i}"], sorted([*(f"{n}{i}" for n in shapes), f"o{i}"])), (1, [f"f{i}"], [f"f{i}"]))
        ]


def named_adds(apply, shapes):
    found, names = walked(apply, numbers(shapes))
    adds = residual_adds(found)
    return [(add.repeats, "".join(names[i] for i in add.writers), "".join(sorted(names[i] for i in add.leaves))) for add in adds]


def ends_in_a_recurrence(step):
    def apply(p, x):
        return x + jax.lax.scan(lambda s, a: step(p, s, a), state(x), (jnp.tanh(x) @ p["a"]).swapaxes(0, 1))[1].swapaxes(0, 1)

    return apply


def recurrent_stream(p, x):
    """The state is a stream along time, in a branch of the stream along depth."""

    def step(s, a):
        s = s + jnp.tanh(s @ p["w"] + a)
        return s, s

    return x + jax.lax.scan(step, state(x), (x @ p["a"]).swapaxes(0, 1))[1].swapaxes(0, 1) @ p["o"]


def by_steps(p, x):
    """All layers in each step of time, each with a state that it reads before it writes."""

    def step(states, h):
        after = []
        for i, s in enumerate(states):
            y = layer_norm(h)
            after.append(p[f"{'wm'[i]}"] * s + jnp.tanh(y @ p["kl"[i]]))
            h = h + ((y @ p["qr"[i]]) * s) @ p["op"[i]]
        return tuple(after), h

    return jax.lax.scan(step, (state(x), state(x)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def by_steps_and_layers(p, x):
    def step(states, h):
        def layer(h, given):
            p, s = given
            y = layer_norm(h)
            return h + ((y @ p["q"]) * s) @ p["o"], p["w"] * s + jnp.tanh(y @ p["k"])

        h, states = jax.lax.scan(layer, h, (p, states))
        return states, h

    return jax.lax.scan(step, jnp.zeros((3, len(x), D)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def left_for_the_next_layer(p, x):
    def layer(carry, p):
        h, m = carry
        return (h + jnp.tanh(h @ p["k"] + m) @ p["o"], h @ p["m"]), None

    return jax.lax.scan(layer, (x, jnp.zeros_like(x)), p)[0][0]


def two_streams(p, x):
    def layer(carry, p):
        a, b = carry
        return (a + jnp.tanh(b) @ p["f"], b + jnp.tanh(a) @ p["g"]), None

    a, b = jax.lax.scan(layer, (x, x), p)[0]
    return a * b


def looking_back(p, x):
    """Every layer looks at what the last one made a step before (arXiv 2002.09402): no layer's own."""

    def step(m, h):
        for i in "ab":
            h = h + jnp.tanh(h + m) @ p[i]
        return h @ p["m"], h

    return jax.lax.scan(step, state(x), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def only_by_the_state(p, x):
    """All layers in each step; of two branches one has nothing of its own step."""

    def step(states, h):
        after = []
        for i, s in enumerate(states):
            after.append(s + jnp.tanh(h @ p["ab"[i]]))
            h = h + s @ p["op"[i]]
            h = h + jnp.tanh(h) @ p["fg"[i]]
        return tuple(after), h

    return jax.lax.scan(step, (state(x), state(x)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def fused_gru(p, x):
    """Its gates are sums of parts of one product of what comes in, and of what the cell made of it before."""

    def step(h, a):
        (xr, xz, xn), (hr, hz, hn) = jnp.split(a @ p["a"], 3, -1), jnp.split(h @ p["w"], 3, -1)
        r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
        h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
        return h, h

    return jax.lax.scan(step, state(x), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def added_a_step_later(p, x):
    """Mamba's blocks (arXiv 2312.00752): each adds to the stream what the block before made, and the first one what it begins with."""

    def layer(carry, w):
        made, h = carry
        h = h + made
        return (jnp.tanh(layer_norm(h)) @ w, h), None

    made, h = jax.lax.scan(layer, (x, jnp.zeros_like(x)), p["a"])[0]
    return h + made


LOOPS = {
    # name: (apply, shapes, [(repeats, writers, leaves in the branch)]). Of what goes through a carry no writer is claimed.
    "ends in a sum over time": (ends_in_a_recurrence(lambda p, s, a: (s + a, s)), {"a": MATRIX}, [(1, "", "a")]),
    "ends in a sum over time, read later": (ends_in_a_recurrence(lambda p, s, a: (s + a, s + a)), {"a": MATRIX}, [(1, "", "a")]),
    "ends in a function of the state": (ends_in_a_recurrence(lambda p, s, a: (jnp.tanh(s + a), s)), {"a": MATRIX}, [(1, "", "a")]),
    "ends in a gain on the state": (
        ends_in_a_recurrence(lambda p, s, a: (p["w"] * s + a, p["g"] * s)),
        {"a": MATRIX, "w": VECTOR, "g": VECTOR},
        # The gain is used in every step, so it is not claimed either.
        [(1, "", "agw")],
    ),
    "a stream along time in a branch": (recurrent_stream, dict.fromkeys("awo", MATRIX), [(5, "", "w"), (1, "o", "aow")]),
    "layers in each step": (
        by_steps,
        dict.fromkeys("klqrop", MATRIX) | dict.fromkeys("wm", VECTOR),
        [(5, "", "koqw"), (5, "", "lmpr")],
    ),
    "layers scanned in each step": (
        by_steps_and_layers,
        dict.fromkeys("kqo", (3, *MATRIX)) | {"w": (3, *VECTOR)},
        [(15, "", "koqw")],
    ),
    "left for the next layer": (left_for_the_next_layer, dict.fromkeys("kmo", (3, *MATRIX)), [(3, "o", "kmo")]),
    "two streams": (two_streams, dict.fromkeys("fg", (3, *MATRIX)), [(3, "f", "f"), (3, "g", "g")]),
    "only by the state": (
        only_by_the_state,
        dict.fromkeys("abopfg", MATRIX),
        [(5, "", "ao"), (5, "", "f"), (5, "", "bp"), (5, "", "g")],
    ),
    "gates of a recurrent cell": (fused_gru, {"a": (D, 3 * D), "w": (D, 3 * D)}, []),
    "added a step later": (added_a_step_later, {"a": (3, *MATRIX)}, [(3, "", "a"), (1, "", "a")]),
    "looking back": (looking_back, dict.fromkeys("abm", MATRIX), [(5, "", "a"), (5, "", "b")]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_in_branches_and_around_them(name):
    apply, shapes, wanted = LOOPS[name]
    assert named_adds(apply, shapes) == wanted


def test_what_the_layer_before_made_is_told_from_what_a_layer_makes():
    late = [add.late for add in residual_adds(walked(added_a_step_later, numbers({"a": (3, *MATRIX)}))[0])]
    assert late == [True, False]
    assert not any(add.late for add in residual_adds(walked(only_by_the_state, numbers(dict.fromkeys("abopfg", MATRIX)))[0]))
