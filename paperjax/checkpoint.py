"""Checkpoints of a run, through Orbax, on a disk or in a bucket: numbered, whole or absent, newest readable first."""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from paperjax.processes import ProcessLost, any_of, is_lost, lost

# Where an array of that name and shape is to lie; None: on the host.
Place = Callable[[str, tuple[int, ...]], Sharding | None]
BUCKETS = {"gs": "gcloud auth application-default login", "s3": "aws configure", "az": "az login"}


class Checkpoints:
    """Numbered checkpoints in a folder, each a flat dict of arrays and a JSON record.

    Parameters
    ----------
    folder
        Where they lie, a folder or a bucket's URL (``gs://bucket/run``); made if it is not there. All processes name the same one.
    keep
        How many of the newest are kept.

    Notes
    -----
    Orbax writes a checkpoint aside and renames it when it is whole, so a kill at any moment leaves the one before. Arrays
    come back with the bits they were saved with. An array that lies on several devices is written by them, each its part, and may be read
    back onto others.

    Examples
    --------
    >>> import tempfile
    >>> store = Checkpoints(tempfile.mkdtemp())
    >>> store.save({"w": np.arange(3.0)}, {"t": 7})
    >>> arrays, record = store.newest()
    >>> arrays["w"], record["t"]
    (array([0., 1., 2.]), 7)
    >>> store.close()
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        import orbax.checkpoint as ocp

        self.folder = _bucket(str(folder)) if is_url(folder) else _folder(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, cleanup_tmp_directories=True)

        class Manager(ocp.CheckpointManager):
            # Asked by `save` too, with the checkpoints' numbers, JAX's one counter of preemption would lose the turns that the
            # driver counts: the point to save at would be passed unseen.
            def reached_preemption(self, step: int) -> bool:
                return False

        self._manager = Manager(self.folder, options=options, item_names=("arrays", "record"))

    def save(self, arrays: Mapping[str, Any], record: Mapping[str, Any], wait: bool = True) -> None:
        """Write the next checkpoint.

        Parameters
        ----------
        arrays, record
            What is in it. The arrays may be changed or donated once this returns.
        wait
            Return when it is whole on disk; else when all is copied, and a failure is raised by the next call.

        Raises
        ------
        OSError
            If it cannot be written (the disk is full, say). Those before it stay as they are.
        ProcessLost
            If it cannot since another process has died.
        """
        import orbax.checkpoint as ocp

        number = max(self._manager.all_steps(), default=-1) + 1
        spread = {name: value for name, value in arrays.items() if _is_spread(value)}
        # Orbax refuses an empty tree and 0-size arrays; the marker keeps the tree non-empty, and shapes go with the record.
        host = {name: np.array(value) for name, value in arrays.items() if name not in spread}
        shapes = {name: [list(value.shape), str(value.dtype)] for name, value in {**host, **spread}.items()}
        payload = {"_": np.zeros(1, np.int32), **{name: value.reshape(-1) for name, value in host.items() if value.size}}
        payload |= {name: _own(value) for name, value in spread.items()}
        try:
            # One that is still being written is waited for here.
            self._manager.wait_until_finished()
            self._manager.save(
                number,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(payload),  # pyright: ignore[reportCallIssue]
                    record=ocp.args.JsonSave(  # pyright: ignore[reportCallIssue]
                        {"shapes": shapes, "spread": sorted(spread), "record": json.loads(json.dumps(record))}
                    ),
                ),
            )
            if wait:
                self._manager.wait_until_finished()
        except Exception as error:  # Orbax, tensorstore and the disk each raise their own.
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> OSError | ProcessLost:
        if is_lost(error):
            return lost(error)
        cause = next((line for line in str(error).splitlines() if line), type(error).__name__)
        return OSError(
            f"a checkpoint could not be written in {self.folder} ({cause}). Those before it are whole. If the disk is full, make room; "
            "then run the same again."
        )

    def newest(self, place: Callable[[dict[str, Any]], Place] | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that can be read, as ``(arrays, record)``; ``None`` if there is none.

        A checkpoint that cannot be read, by any of the processes, is passed over with a warning that names it.

        Parameters
        ----------
        place
            From the record, where arrays that were saved from several devices are to lie; by default all come to the host. What it
            raises is raised here.

        Raises
        ------
        OSError
            If there are checkpoints and none can be read.
        """
        self._manager.wait_until_finished()
        failures = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            where = f"{self.folder / str(step)}"
            record = self._attempt(lambda step=step: self._record(step), where, failures)
            if record is None:
                continue
            at = place(record["record"]) if place else lambda name, shape: None
            arrays = self._attempt(lambda step=step, record=record, at=at: self._arrays(step, record, at), where, failures)
            if arrays is None:
                continue
            for failure in failures:
                warnings.warn(f"a checkpoint could not be read (truncated?) and the one before, {step}, is used: {failure}", stacklevel=2)
            return arrays, record["record"]
        if failures:
            raise OSError(
                f"no checkpoint in {self.folder} can be read. Delete the folder to start again. Tried, newest first:\n  "
                + "\n  ".join(failures)
            )
        return None

    def _attempt(self, read: Callable[[], dict[str, Any]], where: str, failures: list[str]) -> dict[str, Any] | None:
        found, failure = None, "another process could not read it"
        try:
            found = read()
        except Exception as error:  # noqa: BLE001 Orbax, tensorstore and json each raise their own; every one is reported.
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if any_of(found is None)[0]:
            failures.append(f"{where}: {failure}")
            return None
        return found

    def _record(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]  # pyright: ignore[reportCallIssue]

    def _arrays(self, step: int, record: dict[str, Any], place: Place) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        shapes = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in record["shapes"].items()}
        spread = set(record.get("spread", ()))
        like: dict[str, Any] = {"_": np.zeros(1, np.int32)}
        for name, (shape, dtype) in shapes.items():
            if name in spread:
                at = place(name, shape)
                like[name] = np.zeros(shape, dtype) if at is None else jax.ShapeDtypeStruct(shape, dtype, sharding=at)
            elif np.prod(shape):
                like[name] = np.zeros(int(np.prod(shape)), dtype)
        found = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(like)))["arrays"]  # pyright: ignore[reportCallIssue]
        return {
            n: found[n] if n in spread else np.asarray(found[n]).reshape(s) if np.prod(s) else np.zeros(s, d)
            for n, (s, d) in shapes.items()
        }

    def close(self) -> None:
        """Wait for what is being written, and release the folder.

        Raises
        ------
        OSError
            If the last checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error
        finally:
            self._manager.close()


def is_url(folder: str | Path) -> bool:
    """Whether it is a bucket's URL.

    Examples
    --------
    >>> is_url("gs://bucket/run"), is_url("runs/one")
    (True, False)
    """
    return "://" in str(folder)


def _folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"checkpoint folder {path} cannot be made ({error}). Name a folder that you can write to.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"checkpoint folder {path} cannot be written to. Name a folder that you can write to.")
    return path


def _bucket(url: str) -> Any:
    from etils import epath

    kind = url.partition("://")[0]
    if kind not in BUCKETS:
        raise OSError(f"checkpoint folder {url}: {kind}:// is not known. Buckets are {', '.join(f'{k}://' for k in BUCKETS)}.")
    path = epath.Path(url)
    probe = path / f".paperjax-{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("paperjax")
        probe.unlink()
    except ImportError as error:
        raise OSError(f"checkpoint folder {url}: {error}: pip install 'paperjax[buckets]', or that package.") from error
    except Exception as error:  # Every provider's library raises its own.
        raise OSError(
            f"checkpoint folder {url} cannot be written to ({type(error).__name__}: {error}). Does the bucket exist, and are there "
            f"credentials that may write it ({BUCKETS[kind]}, or the machine's service account)?"
        ) from error
    return path


def _is_spread(value: Any) -> bool:
    return isinstance(value, jax.Array) and len(value.sharding.device_set) > 1 and bool(value.size)


def _own(value: jax.Array) -> jax.Array:
    # On CPU Orbax's copy on the host would be the same memory, which the next call is given.
    return jnp.copy(value) if next(iter(value.sharding.device_set)).platform == "cpu" else value
