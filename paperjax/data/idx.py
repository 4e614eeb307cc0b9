"""The IDX format of MNIST and its relatives: a header with the shape, then the bytes of one array."""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from paperjax.data.dataset import Dataset

FILES: tuple[str, ...] = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""The four files of a data set in MNIST's layout; each may also end in ``.gz``, or have a dot for the second hyphen."""

# The third byte of the header: http://yann.lecun.com/exdb/mnist, "the IDX file format".
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"


def decode(content: bytes, name: str = "IDX data") -> np.ndarray:
    """The array that the bytes of an IDX file hold.

    Header: two zero bytes, the type, the number of axes; then each axis as a big-endian int32; then the entries in C
    order, big-endian.

    Parameters
    ----------
    content
        The whole file, not compressed.
    name
        What the message calls it.

    Raises
    ------
    ValueError
        If it is no IDX file, or shorter or longer than its header says.

    Examples
    --------
    >>> decode(encode(np.array([[1, 2, 3]], np.uint8)))
    array([[1, 2, 3]], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        looks = "a gzip file (decompress it first)" if content[:2] == _GZIP else f"something that starts with {content[:8]!r}"
        raise ValueError(f"{name} is no IDX file but {looks}. A download that gave an error page instead?")
    dtype, axes = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", content[4:start]) if len(content) >= start else ()
    wanted = start + dtype.itemsize * math.prod(shape)
    if len(content) != wanted:
        raise ValueError(
            f"{name} has {len(content)} bytes, and its header announces {wanted}, shape {shape}: it was cut off, or is damaged."
        )
    return np.frombuffer(content, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def encode(array: np.ndarray) -> bytes:
    """The bytes of an IDX file that holds `array`; `decode` undoes it.

    Raises
    ------
    TypeError
        If IDX has no code for the dtype.

    Examples
    --------
    >>> encode(np.array([7, 9], np.uint8)).hex()
    '00000801000000020709'
    """
    codes = {np.dtype(dtype).newbyteorder("="): code for code, dtype in _DTYPES.items()}
    if array.dtype not in codes:
        raise TypeError(f"IDX has no type for {array.dtype}; it has {', '.join(map(str, codes))}.")
    code = codes[array.dtype]
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.astype(_DTYPES[code]).tobytes()


def decompress(content: bytes, name: str) -> bytes:
    """Undo gzip where there is gzip, whatever the file is called.

    Examples
    --------
    >>> decompress(gzip.compress(b"abc"), "a file"), decompress(b"abc", "a file")
    (b'abc', b'abc')
    """
    if content[:2] != _GZIP:
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is a damaged gzip file: {error}") from error


def read_folder(folder: str | os.PathLike[str], files: Iterable[str] = FILES) -> dict[str, bytes]:
    """The decompressed contents of files in a folder, each found plain or gzipped, with ``-idx`` or ``.idx``.

    Raises
    ------
    FileNotFoundError
        If one is not there; the message lists what is.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    contents = {}
    for name in files:
        spellings = [folder / f"{base}{end}" for base in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
        path = next((path for path in spellings if path.is_file()), None)
        if path is None:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(f"{folder} has no {name} (nor {name}.gz); it has {there}")
        contents[name] = decompress(path.read_bytes(), str(path))
    return contents


def from_idx(folder: str | os.PathLike[str], *, name: str | None = None, flat: bool = True) -> Dataset:
    """Any data set in MNIST's four IDX files (Kuzushiji-MNIST, a split of EMNIST, one's own), read as it is.

    Parameters
    ----------
    folder
        Where the four `FILES` are, gzipped or not.
    name
        By default the folder's name.
    flat
        Inputs ``(examples, height * width)``; otherwise images ``(examples, height, width, 1)``.

    Returns
    -------
    Dataset
        Inputs float32 in [0, 1], grey levels over 255; labels int32.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If a file is damaged, or images are not unsigned bytes ``(examples, height, width)``.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> images, labels = np.array([[[0, 51]], [[255, 0]]], np.uint8), np.array([3, 5], np.uint8)
    >>> for file, array in zip(FILES, (images, labels, images, labels)):
    ...     _ = (folder / file).write_bytes(encode(array))
    >>> data = from_idx(folder, name="two digits")
    >>> data.x_train.tolist(), data.y_test.tolist()
    ([[0.0, 0.20000000298023224], [1.0, 0.0]], [3, 5])
    """
    folder = Path(folder).expanduser()
    return assemble(read_folder(folder), name or folder.resolve().name, "IDX files", flat)


def assemble(contents: dict[str, bytes], name: str, source: str, flat: bool) -> Dataset:
    """The `Dataset` in the decompressed contents of the four `FILES`."""
    arrays = {}
    for file, content in contents.items():
        array = decode(content, f"{name}: {file}")
        axes = 3 if "images" in file else 1
        if array.ndim != axes or array.dtype != np.uint8:
            raise ValueError(f"{name}: {file} holds {array.dtype}{list(array.shape)}; it must be unsigned bytes with {axes} axes.")
        arrays[file] = array

    def images(file: str) -> np.ndarray:
        x = arrays[file].astype(np.float32)
        x /= np.float32(255)
        return x.reshape(len(x), int(np.prod(x.shape[1:]))) if flat else x[..., None]

    def labels(file: str) -> np.ndarray:
        return arrays[file].astype(np.int32)

    return Dataset(images(FILES[0]), labels(FILES[1]), images(FILES[2]), labels(FILES[3]), name, source)
