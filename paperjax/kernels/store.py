"""Kernels in NumPy files that survive the process: which of their blocks are there, and of which kernel they are."""

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class Block(NamedTuple):
    """A block of a kernel: its first row and column, and how many of each.

    Examples
    --------
    >>> Block(0, 4, 2, 4).width
    4
    """

    row: int
    column: int
    height: int
    width: int


class Store:
    """Kernels in NumPy files, with a note beside them of which blocks are there.

    Parameters
    ----------
    note
        The note's file.
    files
        By name of the kernel, its file and its shape and dtype.
    what
        Hashes of what the kernels are functions of, by what it is.
    symmetric
        Whether what is below the diagonal is written with the block above.
    every
        Seconds after which the note is written again; what was finished since is computed anew after a kill. At the end of a ``with`` it
        is written in any case.

    Attributes
    ----------
    arrays
        The files' arrays by name, mapped.

    Raises
    ------
    ValueError
        If the files hold another kernel, or are not a note's.
    OSError
        If the folder is not there or has no room.
    """

    def __init__(
        self,
        note: Path,
        files: Mapping[str, tuple[Path, jax.ShapeDtypeStruct]],
        what: Mapping[str, str],
        symmetric: bool,
        every: float = 0.0,
    ):
        forms = {path.name: [list(form.shape), np.dtype(form.dtype).str] for path, form in files.values()}
        self.note, self.wanted, self.symmetric, self.every = note, {**what, "shapes": forms}, symmetric, every
        self.done: list[Block] = []
        self._lock, self._noted, self._new = threading.Lock(), -np.inf, 0
        if not note.parent.is_dir():
            raise FileNotFoundError(f"out: there is no folder {note.parent} to write kernels to. Make it first.")
        if note.exists():
            self.done = self._found(files)
        else:
            for path, _ in files.values():
                if path.exists():
                    raise ValueError(f"{path} is there already, without a note of its blocks ({note}): give another file, or delete it.")
        if not self.done:
            size = sum(int(np.prod(form.shape, dtype=np.int64)) * np.dtype(form.dtype).itemsize for _, form in files.values())
            free = shutil.disk_usage(note.parent).free
            # A mapped file on a full disk ends the process without a word.
            if size > free:
                raise OSError(
                    f"out: the kernels take {size / 1e9:.3g} GB, and {note.parent} has {free / 1e9:.3g} GB free. Choose another disk."
                )
            # Before the files: without it they would be taken for somebody else's.
            self._write()
        self.arrays = {
            name: np.lib.format.open_memmap(path, mode="r+" if self.done else "w+", dtype=np.dtype(form.dtype), shape=tuple(form.shape))
            for name, (path, form) in files.items()
        }

    def _found(self, files: Mapping[str, tuple[Path, jax.ShapeDtypeStruct]]) -> list[Block]:
        names = ", ".join(path.name for path, _ in files.values())
        try:
            found = json.loads(self.note.read_text())
            done = [Block(*block) for block in found.pop("done")]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.note} is no note of a kernel's blocks ({error}). Delete it and {names}.") from error
        differs = sorted(name for name in {*found, *self.wanted} if found.get(name) != self.wanted.get(name))
        if differs:
            raise ValueError(
                f"{', '.join(str(path) for path, _ in files.values())} holds blocks of another kernel ({', '.join(differs)} differ): give "
                f"another file, or delete this one and {self.note.name}."
            )
        for path, form in files.values() if done else ():
            try:
                there = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is gone or broken ({error}), and {self.note} says that it has blocks. Delete both.") from error
            if (there.shape, there.dtype) != (tuple(form.shape), np.dtype(form.dtype)):
                raise ValueError(f"{path} holds {there.dtype}{list(there.shape)}, which is not what {self.note} says. Delete both.")
        return done

    def missing(self, blocks: Iterable[Block]) -> list[Block]:
        """Those blocks that are not on disk as a whole."""
        blocks = list(blocks)
        there = covered(self.done, blocks, self.symmetric)
        return [block for block in blocks if block not in there]

    def finished(self, block: Block) -> None:
        """Note that a block is written; threads may call this."""
        with self._lock:
            self.done.append(Block(*map(int, block)))
            self._new += 1
            if time.monotonic() - self._noted >= self.every:
                self._write()

    def _write(self) -> None:
        for array in getattr(self, "arrays", {}).values():
            array.flush()
        # Written whole and then renamed: a process that is killed leaves the old note.
        new = self.note.with_suffix(".new")
        new.write_text(json.dumps({**self.wanted, "done": self.done}))
        new.replace(self.note)
        self._noted, self._new = time.monotonic(), 0

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            if self._new:
                self._write()


def covered(done: Iterable[Block], wanted: Iterable[Block], symmetric: bool = False) -> set[Block]:
    """Which blocks are covered by others, of whatever sizes; by their mirror images too, if the kernel is symmetric.

    Examples
    --------
    >>> left, right, both = Block(0, 0, 2, 2), Block(0, 2, 2, 3), Block(0, 1, 2, 4)
    >>> covered([left, right], [both]) == {both}, covered([left], [both])
    (True, set())
    """
    rects, wanted = list(done), list(wanted)
    rects += [Block(j, i, w, h) for i, j, h, w in rects] if symmetric else []
    rows = np.unique([edge for block in (*rects, *wanted) for edge in (block.row, block.row + block.height)])
    columns = np.unique([edge for block in (*rects, *wanted) for edge in (block.column, block.column + block.width)])
    there = np.zeros((len(rows), len(columns)), bool)

    def at(block: Block) -> tuple[slice, slice]:
        i, j, h, w = block
        return slice(*np.searchsorted(rows, (i, i + h))), slice(*np.searchsorted(columns, (j, j + w)))

    for block in rects:
        there[at(block)] = True
    return {block for block in wanted if there[at(block)].all()}


def fingerprint(*trees: PyTree) -> str:
    """A hash of the numbers, shapes and settings that a kernel is a function of.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> fingerprint(jnp.ones(2), "full") == fingerprint(jnp.ones(2), "full") != fingerprint(jnp.zeros(2), "full")
    True
    """
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, str):
            digest.update(leaf.encode())
        else:
            key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            array = np.asarray(jax.random.key_data(leaf) if key else leaf)
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def trace_fingerprint(jaxpr: Any) -> str:
    """A hash of a closed jaxpr: the operations of a network and the numbers in it. Another version of JAX may trace other operations.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> of = lambda fn: trace_fingerprint(jax.make_jaxpr(fn)(1.0))
    >>> of(jax.nn.relu) == of(lambda x: jax.nn.relu(x)) != of(jnp.tanh)
    True
    """
    # What a set holds is printed in another order by each process, and functions with their places in memory.
    text = re.sub(r"frozenset\(\{(.*?)\}\)", lambda found: str(sorted(found[1].split(", "))), str(jaxpr))
    return fingerprint(re.sub(r"0x[0-9a-f]+", "", text), list(jaxpr.consts))
