"""One rule of the walk at a time: how a small function uses its leaves, against what its formula says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paperjax.trace import primitives as prim
from paperjax.trace.traced import walk_model
from paperjax.trace.walk import walk

D, F, T = 6, 4, 5
X = jnp.ones((2, T, D))
INDEX = jnp.zeros((2, T), jnp.int32)


def sites(apply, shapes, x=X):
    """For each leaf its uses, (kind, inside, out, stack), and what is in doubt."""
    found = walk(prim.trace(apply, [jnp.zeros(shape) for shape in shapes], x), len(shapes))
    uses = [[(s.kind, s.inside, s.out, s.stack) for s in found.sites if s.leaf == i] for i in range(len(shapes))]
    return uses, [(u.leaf, u.op) for u in found.unresolved]


def grouped_queries(p, x):
    """Scores q_t . k_s, four heads of queries on two of keys (arXiv 2305.13245)."""
    q, k = jnp.einsum("btd,dkgh->btkgh", x, p[0]), jnp.einsum("bsd,dkh->bskh", x, p[1])
    return jnp.einsum("btkgh,bskh->bkgts", q, k)


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p[0])[0]


def fori(p, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p[0][i]), x)


def while_loop(p, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p[0])), (0, x))[1]


def choose(p, x):
    return jax.lax.cond(x.sum() > 0, lambda h: h @ p[0], lambda h: h @ p[1].T, x)


def learned_start(p, x):
    start = jnp.broadcast_to(p[0], (2, D))
    return jax.lax.scan(lambda h, row: (jnp.tanh(h + row), h), start, x.transpose(1, 0, 2))[1]


def carried_weight(p, x):
    """The weight travels in the carry and stays what it is."""
    (h, _), _ = jax.lax.scan(lambda s, _: ((jnp.tanh(s[0] @ s[1]), s[1]), None), (x, p[0]), None, length=3)
    return h


def stacked_inside(p, x):
    """Layers stacked before the scan, as a loop over a list of layers is turned into one."""
    return scanned([jnp.stack([p[0], p[1]])], x)


def gathered_experts(p, x):
    """One expert for each example, looked up by the data: a product all the same."""
    chosen = p[0][(x.sum((1, 2)) > 0).astype(jnp.int32)]
    return jnp.einsum("btd,bdf->btf", x, chosen)


def expert_of_each_token(p, x):
    """The same under vmap, by a single number for each token: its index names every axis of the leaf, and takes two of them whole."""
    chosen = (x.sum(-1) > 0).astype(jnp.int32)
    return jax.vmap(jax.vmap(lambda h, i: h @ p[0][i]))(x, chosen)


def window_of_positions(p, x):
    """Rows t, t + 1, t + 2 of a table, a start for each example."""
    rows = jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(p[0], start, T))((x.sum((1, 2)) > 0).astype(jnp.int32))
    return x + rows


def sliced_expert(p, x):
    chosen = jax.lax.dynamic_index_in_dim(p[0], (x.sum() > 0).astype(jnp.int32), keepdims=False)
    return x @ chosen


def relative_positions(p, x):
    """Scores of a table of relative positions (arXiv 1803.02155), looked up at known places."""
    table = p[0][np.arange(T)[:, None] - np.arange(T)[None] + T - 1]
    return jnp.einsum("btd,tsd->bts", x, table)


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, jnp.einsum("btd,btf->df", res[0], g)))

PRODUCT = ("product", (0,), (1,), ())
RULES = {
    # name: (apply, shapes, uses by leaf)
    "matmul": (lambda p, x: x @ p[0], [(D, F)], [[PRODUCT]]),
    "transposed": (lambda p, x: x @ p[0].T, [(F, D)], [[("product", (1,), (0,), ())]]),
    "operands exchanged": (lambda p, x: jnp.einsum("fd,btd->ftb", p[0], x), [(F, D)], [[("product", (1,), (0,), ())]]),
    "split into heads": (lambda p, x: jnp.einsum("btd,dhk->bhtk", x, p[0].reshape(D, 2, 2)), [(D, F)], [[PRODUCT]]),
    "merged heads": (lambda p, x: x @ p[0].reshape(D, 4), [(D, 2, 2)], [[("product", (0,), (1, 2), ())]]),
    "scaled, cast and negated": (lambda p, x: x @ (-(p[0].astype(jnp.float16) * 0.5) / 3).astype(jnp.float32), [(D, F)], [[PRODUCT]]),
    "masked": (lambda p, x: x @ jnp.where(np.tri(D, F) > 0, p[0], 0.0), [(D, F)], [[PRODUCT]]),
    "identity added": (lambda p, x: x @ (p[0] + jnp.eye(D)), [(D, D)], [[PRODUCT]]),
    "turned in the complex plane": (lambda p, x: (x.astype(complex) @ p[0].astype(complex) * (1 + 1j)).real, [(D, F)], [[PRODUCT]]),
    "real and imaginary part": (lambda p, x: jnp.abs(x.astype(complex) @ (p[0] + 1j * p[1])), [(D, F), (D, F)], [[PRODUCT], [PRODUCT]]),
    "a phase": (lambda p, x: (x * jnp.exp(1j * p[0])).real, [(D,)], [[("elementwise", (), (0,), ())]]),
    "sliced in two": (lambda p, x: (x @ p[0][:, :2]) * (x @ p[0][:, 2:]), [(D, F)], [[PRODUCT] * 2]),
    "concatenated": (lambda p, x: x @ jnp.concatenate([p[0], p[1]], 1), [(D, F), (D, 2)], [[PRODUCT], [PRODUCT]]),
    "a weight times a number that is trained": (lambda p, x: x @ (p[0] * p[1]), [(D, F), ()], [[PRODUCT], None]),
    "one layer of a stack": (lambda p, x: x @ p[0][1], [(3, D, F)], [[("product", (1,), (2,), ())]]),
    "permuted at known places": (lambda p, x: x @ p[0][:, np.array([1, 0, 3, 2])], [(D, F)], [[PRODUCT]]),
    "batched experts": (lambda p, x: jnp.einsum("ebd,edf->ebf", x, p[0]), [(2, D, F)], [[("product", (1,), (2,), (0,))]]),
    "vmapped over members": (lambda p, x: jax.vmap(lambda w: x @ w)(p[0]), [(3, D, F)], [[("product", (1,), (0, 2), ())]]),
    "jitted and rematerialized": (lambda p, x: jax.jit(jax.checkpoint(lambda h, w: jnp.tanh(h @ w)))(x, p[0]), [(D, F)], [[PRODUCT]]),
    "custom derivative": (lambda p, x: custom(x, p[0]), [(D, F)], [[PRODUCT]]),
    "gain": (lambda p, x: x * p[0], [(D,)], [[("elementwise", (), (0,), ())]]),
    "gain stored as 1 + g": (lambda p, x: x * (1 + p[0]), [(D,)], [[("elementwise", (), (0,), ())]]),
    "softplus of a gain": (lambda p, x: x * jax.nn.softplus(p[0]), [(D,)], [[("elementwise", (), (0,), ())]]),
    "exp(a) b, entry by entry": (
        lambda p, x: x * (jnp.exp(p[0]) * p[1]),
        [(D,), (D,)],
        [[("elementwise", (), (0,), ())], [("elementwise", (), (0,), ())]],
    ),
    "divided by": (lambda p, x: x / p[0], [(D,)], [[("elementwise", (), (0,), ())]]),
    "channel by channel": (lambda p, x: jnp.einsum("btd,dn->btdn", x, p[0]), [(D, 3)], [[("elementwise", (), (0, 1), ())]]),
    "positions by slice": (lambda p, x: x + p[0][:T], [(8, D)], [[("elementwise", (), (0, 1), ())]]),
    "positions by gather": (lambda p, x: x + jnp.take(p[0], jnp.arange(T), axis=0), [(8, D)], [[("lookup", (0,), (1,), ())]]),
    "positions that are constant, times a weight": (lambda p, x: x + jnp.ones((T, 3)) @ p[0], [(3, D)], [[PRODUCT]]),
    "one-hot rows": (lambda p, x: jax.nn.one_hot(x, 11) @ p[0], [(11, D)], [[PRODUCT]]),
    "sum of products": (lambda p, x: (x * p[0]).sum(-1), [(D,)], [[("product", (0,), (), ())]]),
    "matmul by broadcast and sum": (lambda p, x: (x[..., None] * p[0]).sum(-2), [(D, F)], [[PRODUCT]]),
    "gain before a mean that is subtracted": (
        lambda p, x: (x * p[0]) - (x * p[0]).mean(-1, keepdims=True),
        [(D,)],
        # Two uses: the first only in the sum over the coordinates is a product, and JAX sees two multiplications.
        None,
    ),
    "layer norm of gained": (lambda p, x: (lambda h: h - h.mean(-1, keepdims=True))(x * p[0]), [(D,)], [[("elementwise", (), (0,), ())]]),
    "token prepended": (
        lambda p, x: jnp.concatenate([jnp.broadcast_to(p[0], (2, 1, D)), x], 1),
        [(1, 1, D)],
        [[("elementwise", (), (1, 2), ())]],
    ),
    "masked by the data": (lambda p, x: jnp.where(x > 0, x, p[0]), [(D,)], [[("elementwise", (), (0,), ())]]),
    "scan over layers": (scanned, [(3, D, D)], [[("product", (1,), (2,), (0,))]]),
    "fori_loop over layers": (fori, [(3, D, D)], [[("product", (1,), (2,), ())]]),
    "while": (while_loop, [(D, D)], [[PRODUCT]]),
    "cond": (choose, [(D, F), (F, D)], [[PRODUCT], [("product", (1,), (0,), ())]]),
    "learned first state": (learned_start, [(D,)], [[("elementwise", (), (0,), ())]]),
    "weight in the carry": (carried_weight, [(D, D)], [[PRODUCT]]),
    "layers stacked, then scanned": (stacked_inside, [(D, D), (D, D)], [[PRODUCT], [PRODUCT]]),
    "experts looked up": (gathered_experts, [(3, D, F)], [[("product", (1,), (2,), (0,))]]),
    "an expert sliced out": (sliced_expert, [(3, D, F)], [[("product", (1,), (2,), (0,))]]),
    "an expert for each token": (expert_of_each_token, [(3, D, F)], [[("product", (1,), (2,), (0,))]]),
    "a window of positions": (window_of_positions, [(8, D)], [[("lookup", (0,), (1,), ())]]),
    "positions by single numbers": (
        lambda p, x: x + jax.vmap(lambda i: p[0][i])(jnp.arange(T)),
        [(8, D)],
        [[("lookup", (0,), (1,), ())]],
    ),
    "relative positions": (relative_positions, [(2 * T - 1, D)], [[("product", (1,), (), (0,))]]),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    apply, shapes, wanted = RULES[name]
    # Tokens where one-hot rows are wanted.
    found, doubts = sites(apply, shapes, INDEX if name == "one-hot rows" else X)
    for i, uses in enumerate(wanted or []):
        if uses is not None:
            assert found[i] == uses
            assert i not in {leaf for leaf, _ in doubts}


def test_a_complex_number_multiplies_by_its_absolute_value():
    """|1 + i| = sqrt(2), |3 i| = 3."""
    apply = lambda p, x: (x.astype(complex) @ (3j * p[0]) * (1 + 1j)).real  # noqa: E731
    found = walk(prim.trace(apply, [jnp.zeros((D, F))], X), 1)
    np.testing.assert_allclose(found.sites[0].log_factor, np.log(3), rtol=1e-6)
    np.testing.assert_allclose(sum(node.log_factor for node in found.nodes), np.log(2) / 2, rtol=1e-6)


def image(p, x):
    return jax.lax.conv_general_dilated(x[:, None], p[0], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


def depthwise(p, x):
    return jax.lax.conv_general_dilated(x, p[0], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=D)


def transposed(p, x):
    return jax.lax.conv_transpose(x, p[0], (2,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"))


@pytest.mark.parametrize(
    ("apply", "shape", "inside", "out", "window", "groups"),
    [
        (image, (F, 1, 3, 3), (1,), (0,), (2, 3), 1),
        (depthwise, (3, 1, D), (1,), (2,), (0,), D),
        (transposed, (3, D, F), (1,), (2,), (0,), 1),
    ],
)
def test_convolutions(apply, shape, inside, out, window, groups):
    (site,) = walk(prim.trace(apply, [jnp.zeros(shape)], X), 1).sites
    assert (site.kind, site.inside, site.out, site.window, site.groups) == ("convolution", inside, out, window, groups)


def shared_keys(p, x):
    return jnp.einsum("btnh,bsh->bnts", jnp.einsum("btd,dnh->btnh", x, p[0]), x @ p[1])


def mixed_by_position(p, x):
    return jnp.einsum("btef,bte->btf", jnp.einsum("btd,edf->btef", x, p[0]), jax.nn.softmax(x @ p[1]))


def mixed_by_example(p, x):
    return jnp.einsum("btef,be->btf", jnp.einsum("btd,edf->btef", x, p[0]), jax.nn.softmax(x.mean(1) @ p[1]))


def mixed_for_tasks(p, x):
    """One mixture for each task (MMoE, KDD 2018): the weights' free axis is one of the router's kernel."""
    return jnp.einsum("btef,beq->btqf", jnp.einsum("btd,edf->btef", x, p[0]), jax.nn.softmax(jnp.einsum("bd,deq->beq", x.mean(1), p[1])))


@pytest.mark.parametrize(
    ("apply", "shapes", "copies"),
    [
        (grouped_queries, [(D, 2, 2, F), (D, 2, F)], []),
        (shared_keys, [(D, 2, F), (D, F)], []),
        (mixed_by_position, [(3, D, F), (D, 3)], [(0, 0)]),
        (mixed_by_example, [(3, D, F), (D, 3)], [(0, 0)]),
        (mixed_for_tasks, [(3, D, F), (D, 3, 2)], [(0, 0), (1, 1)]),
    ],
)
def test_sums_over_copies_are_in_doubt_and_scores_are_not(apply, shapes, copies):
    found = walk(prim.trace(apply, [jnp.zeros(shape) for shape in shapes], X), len(shapes))
    assert sorted((u.leaf, u.axis or 0) for u in found.unresolved if u.axis is not None) == copies
    assert len(found.unresolved) == len(copies)
    assert all("share one input" in u.reason for u in found.unresolved)


@pytest.mark.parametrize(
    "row",
    [
        lambda p, x: p[0][x],
        lambda p, x: jax.vmap(jax.vmap(lambda i: p[0][i]))(x),
        lambda p, x: jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(p[0], i, keepdims=False)))(x),
    ],
    ids=["rows", "row by row", "slice by slice"],
)
def test_embedding_by_tokens_is_a_lookup(row):
    found, doubts = sites(row, [(11, D)], INDEX)
    assert found == [[("lookup", (0,), (1,), ())]]
    assert not doubts


def test_products_of_two_tables_keep_them_tables():
    """Matrix factorization: u_i . v_j."""
    found, _ = sites(lambda p, x: (p[0][x] * p[1][x]).sum(-1), [(11, D), (9, D)], INDEX)
    assert found == [[("lookup", (0,), (1,), ())]] * 2


@pytest.mark.parametrize("name", ["scan over layers", "while"])
def test_uses_in_a_loop_stand_once_and_count_their_repeats(name):
    apply, shapes, _ = RULES[name]
    (site,) = walk(prim.trace(apply, [jnp.zeros(shape) for shape in shapes], X), 1).sites
    # A while loop's length is not known before it runs; its weight is the same in each step.
    assert (site.repeats, site.reused) == ((3, False) if name == "scan over layers" else (1, True))


def test_the_graph_is_in_order_and_paths_lead_to_primitives():
    """Parents come first, and following a path through the jaxpr ends at the site's primitive."""
    from paperjax.models import transformer

    model = transformer(8, 2, heads=2, vocab=11)
    found, params = walk_model(model, INDEX)
    assert all(parent < i for i, node in enumerate(found.nodes) for parent in node.parents)
    flat, tree = jax.tree.flatten(params)
    jaxpr = prim.trace(lambda leaves, fixed, x: model.apply(jax.tree.unflatten(tree, leaves), x), flat, [], INDEX)
    for site in found.sites:
        inner, eqn = jaxpr, None
        for number, branch in zip(site.path[::2], [*site.path[1::2], None]):
            eqn = inner.jaxpr.eqns[number]
            if branch is not None:
                inner = prim.closed(eqn.params["jaxpr"]) if eqn.primitive.name == "scan" else prim.called(eqn)
                assert inner is not None
        assert eqn is not None
        assert eqn.primitive.name == site.op
