"""Strict settings for every test: types checked at run time, warnings are errors, no silent promotion of rank or dtype."""

import importlib.util
import os
import pathlib

os.environ.setdefault("MPLBACKEND", "agg")
# Read when LAPACK is loaded, by processes of their own, too. Its threads wait for each other in loops that take a whole core each: where
# others are at work, as pytest-xdist's workers are, singular values of 210 x 126 take 330 ms of CPU with two threads, and 3 with one.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jaxtyping

import tests.shares
import tests.typecheck  # The hook finds it as an attribute of `tests`.

# Before paperjax is imported: jaxtyping's shapes and dtypes are checked by beartype, here and nowhere else.
jaxtyping.jaxtyped = tests.typecheck.jaxtyped_in_public
_hook = jaxtyping.install_import_hook("paperjax", "tests.typecheck.checked")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Folders whose tests compile for longer than they run, the slow ones too unless they are marked `optimized`.
COMPILING = {"kernels", "limits", "models", "parametrization", "trace"}


def pytest_configure(config):
    # Compiling is what the quick tests spend their time on: a small training loop takes 2.8 s of CPU as users have it, and 1.9 s with XLA's
    # older emitters. The slow tests, all processes of their own, notebooks and the README's command compile as users do.
    if config.getoption("markexpr") == "not slow":
        flags = os.environ.get("XLA_FLAGS")
        os.environ["XLA_FLAGS"] = f"{flags or ''} --xla_cpu_use_fusion_emitters=false"
        jax.devices()  # Here the flags are read, once; processes of their own are not to inherit them.
        if flags is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = flags


import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("paperjax", max_examples=25, deadline=None, derandomize=True)
hypothesis.settings.load_profile("paperjax")


def pytest_collection_modifyitems(config, items):
    left = tests.shares.left_to_others([item.nodeid for item in items if item.get_closest_marker("slow")])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
    items[:] = [item for item in items if item.nodeid not in left]
    if importlib.util.find_spec("neural_tangents") is None:
        for item in items:
            if item.name.startswith("paperjax.interop.neural_tangents"):
                item.add_marker(pytest.mark.skip(reason="neural-tangents is not installed"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    quick = item.get_closest_marker("slow") is None
    folder_compiles = item.path.parent.name in COMPILING and item.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quick or folder_compiles)
    if pathlib.Path(__file__).parent in item.path.parents:
        return (yield)
    # Examples in docstrings run as their readers' sessions do.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return (yield)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Compiled programs are maps of memory, of which a process may have 65,530; LLVM crashes at the next one."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision for the duration of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache of data sets unless it asks for it."""
    if "PAPERJAX_TEST_CACHE" not in os.environ:
        monkeypatch.setenv("PAPERJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
