"""neural-tangents 0.6.5 on a current JAX, without TensorFlow, so that its users can compare and move over.

The published library (Novak et al., arXiv 1912.02803) does not import on a JAX that PaperJAX runs on: it looks for names that JAX has
moved, and imports TensorFlow for its one module on TensorFlow models. Here the names are put back while it is imported, and taken away
again: the user's JAX stays as it is. Install it by two commands; by one, pip would bring TensorFlow along::

    pip install frozendict
    pip install --no-deps neural-tangents==0.6.5

Its wheel also holds top-level packages `tests` and `examples`; where they hide folders of your own, delete them from site-packages.

Then one line of a script changes, and what `neural_tangents` has is here: ``stax``, ``predict``, ``empirical_ntk_fn``,
``empirical_nngp_fn``, ``empirical_kernel_fn``, ``empirical_ntk_vp_fn``, ``NtkImplementation``, ``monte_carlo_kernel_fn``, ``batch``,
``linearize``, ``taylor_expand`` and ``Kernel``. From then on ``import neural_tangents`` works in the same process, too.

What works
----------
Run on JAX 0.7.0 and 0.10.2, in float64; the numbers are those of the library on JAX 0.4.25, to 1e-12, or 1e-8 where a ReLU meets an input
with itself or two outputs of a convolution (there the arccosine of its formula turns a rounding error into the root of one).

- ``stax``: `Dense` and `Conv` in both parameterizations (`Conv` with padding SAME, VALID, CIRCULAR and strides), `ConvTranspose`,
  `ConvLocal`, `Relu`, `LeakyRelu`, `ABRelu`, `Abs`, `Erf`, `Gelu`, `Sigmoid_like`, `Sin`, `Cos`, `Sign`, `Exp`, `Gaussian`, `Gabor`, `Rbf`,
  `Polynomial`, `Monomial`, `Hermite`, `Elementwise`, `ElementwiseNumerical`, `Identity`, `Dropout`, `LayerNorm`, `AvgPool`, `SumPool`,
  `GlobalAvgPool`, `GlobalSumPool`, `Flatten`, `Index`, `Aggregate`, `DotGeneral`, `ImageResize`, `GlobalSelfAttention` (every mechanism
  in linear scaling, IDENTITY in square-root scaling; positional embeddings), `FanOut`, `FanInSum`, `FanInProd`, `FanInConcat`, `parallel`,
  `serial`, `repeat`, residual connections, masks.
- ``predict``: all of it; `gradient_descent_mse` also of a kernel that is traced.
- Empirical kernels by JACOBIAN_CONTRACTION (the default) and NTK_VECTOR_PRODUCTS, with every kind of axes; products with vectors.
- `monte_carlo_kernel_fn` and `batch`, on one device or several.

What does not
-------------
- STRUCTURED_DERIVATIVES and AUTO rest on internals that JAX no longer has: they raise, as does ``neural_tangents.experimental``.
- As on any JAX: `LayerNorm` must follow an affine layer, `RectifiedMonomial` is NaN for an input with itself, `ExpNormalized` has a kernel
  and no network, and attention by SOFTMAX, ABS or RELU in square-root scaling has a network and no kernel.

Scaling
-------
``stax.Dense(n, W_std, b_std)`` is ``W_std / sqrt(fan_in) W x + b_std b``: ``weight_variance = W_std²`` and ``bias_variance = b_std²``
in `paperjax.limits.mlp_kernels`, whose `depth` counts hidden layers. An empirical kernel with ``trace_axes=(-1,)``, the default, is a
mean over outputs, and ``outputs="trace"`` of `paperjax.ntk` their sum; ``trace_axes=()`` is ``outputs="full"``. The loss of ``predict``
is ``|f - y|² / (2 N O)``, half of ``"mse"`` in `paperjax.predict`, so its time 2t is our t. Its ``diag_reg`` is relative to the mean of
the diagonal by default.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.extend.core
import numpy as np
import scipy.linalg
from jax.interpreters import ad

VERSION = "0.6.5"
INSTALL = f"pip install frozendict && pip install --no-deps neural-tangents=={VERSION}"

NAMES = (
    "Kernel", "NtkImplementation", "batch", "empirical_kernel_fn", "empirical_nngp_fn", "empirical_ntk_fn", "empirical_ntk_vp_fn",
    "linearize", "monte_carlo_kernel_fn", "predict", "stax", "taylor_expand",
)  # fmt: skip

_ABSENT = object()
# Held while names are put back: of two threads, the second would take the first one's names for JAX's own.
_LOADING = threading.Lock()


def load() -> types.ModuleType:
    """The module ``neural_tangents``, imported on this JAX; the attributes of `paperjax.interop.neural_tangents` are its own.

    It is imported once in a process. JAX's modules and ``sys.modules`` are afterwards as before, but for the library itself, in which
    what JAX or SciPy no longer allow is replaced.

    Raises
    ------
    ModuleNotFoundError
        If neural-tangents or frozendict is not installed; the message has the command.
    ImportError
        If the installed version is not 0.6.5.

    References
    ----------
    Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python", arXiv 1912.02803; its issue 209.

    Examples
    --------
    >>> from paperjax.interop import neural_tangents as nt
    >>> init, apply, kernel = nt.stax.serial(nt.stax.Dense(64, W_std=2**0.5), nt.stax.Erf(), nt.stax.Dense(1))
    >>> kernel(jax.numpy.eye(2), None, "ntk").shape
    (2, 2)
    >>> load().__version__
    '0.6.5'
    """
    with _LOADING:
        library = sys.modules.get("neural_tangents")
        if library is None:
            _check_installed()
            library = _imported()
        _check_version(library.__version__)
        _adapt(library)
    return library


def __getattr__(name: str) -> Any:
    if name in NAMES:
        return getattr(load(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It hands on {', '.join(NAMES)}; `load()` is the whole library.")


def __dir__() -> list[str]:
    return sorted({*globals(), *NAMES})


def _check_installed() -> None:
    if importlib.util.find_spec("neural_tangents") is None:
        raise ModuleNotFoundError(
            f"neural-tangents is not installed. Type\n    {INSTALL}\nWithout --no-deps pip would bring TensorFlow, which is not needed.",
            name="neural_tangents",
        )
    # A folder on the path that pip knows nothing of says its version once it is imported.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        _check_version(importlib.metadata.version("neural-tangents"))
    if importlib.util.find_spec("frozendict") is None:
        raise ModuleNotFoundError(f"neural-tangents needs frozendict, which is not installed. Type\n    {INSTALL}", name="frozendict")


def _check_version(version: str) -> None:
    if version != VERSION:
        raise ImportError(
            f"neural-tangents {version} is installed, but the names put back here are those that {VERSION} needs. Type\n    {INSTALL}",
            name="neural_tangents",
        )


def _imported() -> types.ModuleType:
    before = set(sys.modules)
    try:
        with _names_put_back():
            return importlib.import_module("neural_tangents")
    except BaseException:
        # Half a library must not be what the next `import neural_tangents` finds.
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "neural_tangents":
                del sys.modules[name]
        raise


@contextlib.contextmanager
def _names_put_back() -> Iterator[None]:
    """What neural-tangents looks up in JAX while it is imported, for that long."""
    attributes = [(jax.core, name, getattr(jax.extend.core, name)) for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")]
    # Only a key of the table of rules for structured derivatives.
    attributes.append((ad, "zeros_like_p", jax.extend.core.Primitive("zeros_like")))
    util = types.ModuleType("jax.util")
    util.__dict__.update(safe_map=_safe_map, safe_zip=_safe_zip)
    modules = {util.__name__: util, "neural_tangents.experimental": _Experimental("neural_tangents.experimental")}
    with contextlib.ExitStack() as restored:
        for module, name, value in attributes:
            restored.callback(_put, vars(module), name, vars(module).get(name, _ABSENT))
            setattr(module, name, value)
        for name, module in modules.items():
            restored.callback(_put, sys.modules, name, sys.modules.get(name, _ABSENT))
            sys.modules[name] = module
        yield


def _put(names: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        del names[name]
    else:
        names[name] = value


def _safe_map(function: Callable[..., Any], *sequences: Any) -> list[Any]:
    return [function(*items) for items in zip(*sequences, strict=True)]


def _safe_zip(*sequences: Any) -> list[tuple[Any, ...]]:
    return list(zip(*sequences, strict=True))


class _Experimental(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotImplementedError(
            f"neural_tangents.experimental.{name} is for TensorFlow models, and paperjax.interop.neural_tangents imports neural-tangents "
            "without TensorFlow. The rest of the library works; `paperjax.ntk` takes Flax, Equinox and plain JAX networks."
        )


def _adapt(library: Any) -> None:
    """Replace, in the library, what fails when it is called."""
    empirical, predict = library._src.empirical, library._src.predict
    if isinstance(predict.sp, types.SimpleNamespace):  # Done, below.
        return
    for function in ("_std_basis", "_unravel_array_into_pytree"):
        setattr(empirical, function, _of_arrays(getattr(empirical, function)))
    ways = library.NtkImplementation
    for way in (ways.AUTO, ways.STRUCTURED_DERIVATIVES):
        empirical._implementation_to_ntk_fn[way] = _refused(way.name)
    predict.gradient_descent_mse = library.predict.gradient_descent_mse = _of_traced_kernels_too(predict.gradient_descent_mse)
    # SciPy 1.14 renamed the argument; the module asks it for nothing else.
    predict.sp = types.SimpleNamespace(linalg=types.SimpleNamespace(eigvalsh=_eigvalsh))


def _eigvalsh(matrix: Any, eigvals: tuple[int, int]) -> np.ndarray:
    return scipy.linalg.eigvalsh(matrix, subset_by_index=eigvals)


def _of_traced_kernels_too(predictor: types.FunctionType) -> Callable[..., Any]:
    """It decomposes the kernel in `jax.core.eval_context`, so that what it keeps is never traced; there JAX now refuses a traced kernel."""
    stub = types.SimpleNamespace(core=types.SimpleNamespace(eval_context=contextlib.nullcontext))
    in_place = types.FunctionType(predictor.__code__, {**predictor.__globals__, "jax": stub}, argdefs=predictor.__defaults__)

    @functools.wraps(predictor)
    def gradient_descent_mse(k_train_train: Any, *args: Any, **kwargs: Any) -> Any:
        return (in_place if isinstance(k_train_train, jax.core.Tracer) else predictor)(k_train_train, *args, **kwargs)

    return gradient_descent_mse


def _of_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """These ask `jnp.size` about shapes and dtypes, which JAX answers for arrays only; this array takes no memory."""

    def of_arrays(pytree: Any, *args: Any) -> Any:
        return function(jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), pytree), *args)

    return of_arrays


def _refused(way: str) -> Callable[..., Any]:
    def refuse(**_: Any) -> Any:
        raise NotImplementedError(
            f"neural-tangents' {way} rests on internals that JAX {jax.__version__} no longer has (linear_util.wrap_init without debug "
            "information, ad.linearize, ad.backward_pass). Its JACOBIAN_CONTRACTION (the default) and NTK_VECTOR_PRODUCTS work, and "
            "`paperjax.ntk(model, params, x)` uses structured derivatives wherever the trace allows."
        )

    return refuse
