import dataclasses
import functools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import paperjax as pj
from paperjax.describe import describe
from tests.zoo import blobs, net


def compiled(code, **there):
    """What `code` defines as `fn`, in a module of its own."""
    module = types.ModuleType("a_users_module")
    module.__dict__.update(there)
    exec(code, module.__dict__)
    return module.fn


def closure(value):
    return lambda x: x + value


SAME = [
    lambda: 3,
    lambda: (1, [2.5, None], {"a": "b"}, frozenset({"x", "y", "z"})),
    lambda: np.arange(3.0),
    lambda: jax.random.key(7),
    lambda: closure(2),
    lambda: closure(np.ones(3)),
    lambda: optax.sgd(0.1),
    lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10), b1=0.8),
    lambda: optax.chain(optax.clip(1.0), optax.adamw(0.1)),
    lambda: functools.partial(net, scale=2.0),
    lambda: blobs(),
    lambda: pj.grid(width=[1, 2], lr=0.1, optimizer=["sgd", optax.adam]),
    lambda: pj.family(net, x=jnp.ones((2, 3))),
    lambda: pj.Layout(2, 3, 1),
    lambda: compiled("def fn(x, *, a=1): return x"),
    lambda: compiled("class Net:\n    def __call__(self, x): return x\nfn = Net()"),
]


@pytest.mark.parametrize("make", SAME)
def test_equal_things_made_twice_have_one_description_without_addresses(make):
    assert describe(make()) == describe(make())
    assert "0x" not in describe(make())


DIFFERENT = {
    "closure value": (closure(1), closure(2)),
    "closure array": (closure(np.zeros(3)), closure(np.array([0, 0, 1e-9]))),
    "constant in the code": (lambda x: x + 1, lambda x: x + 2),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "attribute": (lambda x: jnp.sin(x), lambda x: jnp.cos(x)),
    "default": (lambda x, a=1: x, lambda x, a=2: x),
    "keyword default": (compiled("def fn(x, *, a=1): return x"), compiled("def fn(x, *, a=2): return x")),
    "nested function": (
        compiled("def fn(x):\n    def inner(y): return y + 1\n    return inner(x)"),
        compiled("def fn(x):\n    def inner(y): return y + 2\n    return inner(x)"),
    ),
    "helper": (
        compiled("def helper(x): return x + 1\ndef fn(x): return helper(x)"),
        compiled("def helper(x): return x + 2\ndef fn(x): return helper(x)"),
    ),
    "helper of a helper": (
        compiled("def a(x): return x + 1\ndef b(x): return a(x)\ndef fn(x): return b(x)"),
        compiled("def a(x): return x + 2\ndef b(x): return a(x)\ndef fn(x): return b(x)"),
    ),
    "jitted helper": (
        compiled("import jax\n@jax.jit\ndef helper(x): return x + 1\ndef fn(x): return helper(x)"),
        compiled("import jax\n@jax.jit\ndef helper(x): return x + 2\ndef fn(x): return helper(x)"),
    ),
    "helper inside a comprehension": (
        compiled("def helper(x): return x + 1\ndef fn(x): return [helper(v) for v in x]"),
        compiled("def helper(x): return x + 2\ndef fn(x): return [helper(v) for v in x]"),
    ),
    "number of the module": (compiled("C = 1\ndef fn(x): return x * C"), compiled("C = 2\ndef fn(x): return x * C")),
    "array of the module": (
        compiled("def fn(x): return x * C", C=np.array([1.0, 2.0])),
        compiled("def fn(x): return x * C", C=np.array([1.0, 3.0])),
    ),
    "argument names": (lambda lr: lr, lambda width: width),
    "function of another module": (
        compiled("def fn(x): return m.helper(x)", m=types.SimpleNamespace()),
        compiled("def fn(x): return m.other(x)", m=types.SimpleNamespace()),
    ),
    "method": (
        compiled("class Net:\n    def __call__(self, x): return x + 1\ndef fn(): return Net()"),
        compiled("class Net:\n    def __call__(self, x): return x + 2\ndef fn(): return Net()"),
    ),
    "inherited method": (
        compiled("class A:\n    def f(self, x): return x + 1\nclass B(A): pass\ndef fn(): return B()"),
        compiled("class A:\n    def f(self, x): return x + 2\nclass B(A): pass\ndef fn(): return B()"),
    ),
    "Flax module": (
        compiled("import flax.linen as nn\nclass Net(nn.Module):\n    def __call__(self, x): return x + 1\nfn = Net()"),
        compiled("import flax.linen as nn\nclass Net(nn.Module):\n    def __call__(self, x): return x + 2\nfn = Net()"),
    ),
    "stateless object": (
        compiled("class Net:\n    def __call__(self, x): return x + 1\nfn = Net()"),
        compiled("class Net:\n    def __call__(self, x): return x + 2\nfn = Net()"),
    ),
    "bound method": (compiled("class A:\n  def __init__(self): self.a = 1\n  def f(self): pass\nfn = A().f"),
                     compiled("class A:\n  def __init__(self): self.a = 2\n  def f(self): pass\nfn = A().f")),
    "partial": (functools.partial(net, 3), functools.partial(net, 4)),
    "partial keyword": (functools.partial(net, scale=3.0), functools.partial(net, scale=4.0)),
    "optimizer's rate": (optax.sgd(0.1), optax.sgd(0.2)),
    "optimizer": (optax.sgd, optax.adam),
    "optimizer's schedule": (optax.sgd(optax.cosine_decay_schedule(0.1, 10)), optax.sgd(optax.cosine_decay_schedule(0.1, 11))),
    "array content": (np.zeros(3), np.array([0, 0, 1.0])),
    "array dtype": (np.zeros(3, np.float32), np.zeros(3, np.int32)),
    "array shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "array order": (np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2).T),
    "key": (jax.random.key(0), jax.random.key(1)),
    "data": (blobs(seed=0), blobs(seed=1)),
    "type": (1, 1.0),
    "text or number": ("1", 1),
    "tuple or list": ((1,), [1]),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_things_have_different_descriptions(name):
    a, b = DIFFERENT[name]
    assert describe(a) != describe(b)


def test_a_module_of_helpers_is_part_of_what_reads_it():
    def with_helper(constant):
        module = types.ModuleType("my_helpers")
        exec(f"def helper(x): return x + {constant}", module.__dict__)
        return compiled("def fn(x): return my_helpers.helper(x)", my_helpers=module)

    assert describe(with_helper(1)) == describe(with_helper(1))
    assert describe(with_helper(1)) != describe(with_helper(2))


def test_recursion_ends():
    fn = compiled("def fn(n): return fn(n - 1) if n else other(n)\ndef other(n): return fn(n)")
    assert describe(fn) == describe(fn)
    loop = []
    loop.append(loop)
    assert describe(loop) == "[<itself>]"


def test_a_cache_that_fills_does_not_change_what_uses_it():
    cache = {}
    fn = compiled("def fn(x): return cache.setdefault(x, x)", cache=cache)
    before = describe(fn)
    fn(3)
    assert cache
    assert describe(fn) == before


def test_many_functions_that_call_each_other_are_described_once_each():
    # Every one of 60 calls all the others: 60! paths.
    code = "\n".join(f"def f{i}(x): return {' + '.join(f'f{j}(x)' for j in range(60) if j != i)}" for i in range(60))
    fn = compiled(code + "\nfn = f0")
    assert describe(fn) == describe(fn)
    assert len(describe(fn)) < 20_000


def test_views_of_one_content_are_equal():
    array = np.arange(12.0).reshape(3, 4)
    assert describe(array.T) == describe(np.ascontiguousarray(array.T))
    assert describe(jnp.arange(3.0)) == describe(np.arange(3, dtype=np.float32))


def test_a_dataclass_is_described_by_its_fields():
    @dataclasses.dataclass(frozen=True)
    class Setting:
        a: int
        b: object

    assert describe(Setting(1, np.ones(2))) == describe(Setting(1, np.ones(2)))
    assert describe(Setting(1, np.ones(2))) != describe(Setting(1, np.zeros(2)))


def test_a_description_of_paperjaxs_largest_model_is_short():
    # It is an attribute of a netCDF file, where HDF5 allows 64 kB.
    assert len(describe(pj.models.transformer)) < 5000
    assert len(describe(optax.adamw(0.1))) < 5000


PROGRAM = """
import functools, jax, numpy as np, optax, paperjax as pj
from tests.zoo import blobs, net
exp = pj.Experiment(
    lambda width, scale=frozenset({"a", "b", "c"}): net(width), blobs(), loss=lambda f, y: ((f - y) ** 2).mean(), optimizer=optax.adam(0.1),
    grid=pj.grid(width=[3, 4], data=blobs()), measures={"x": functools.partial(lambda p, params: 1.0, {"u", "v", "w"})}, steps=3)
for name, text in exp.describe().items():
    print(name, text)
"""


@pytest.mark.slow
def test_other_processes_describe_an_experiment_alike():
    texts = set()
    for hash_seed in ("0", "1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1
    assert "optimizer GradientTransformation" in texts.pop()


def test_a_module_that_is_closed_over_is_not_walked_through():
    import paperjax as pj

    # Imported in a function, pj is a closure and not a global.
    text = describe(lambda: pj.models.mlp(4, 2))
    assert "module paperjax" in text
    assert len(text) < 300
