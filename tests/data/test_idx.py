"""The IDX format, against files written byte by byte."""

import gzip
import struct

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperjax.data import from_idx
from paperjax.data.idx import FILES, decode, encode


def write_folder(folder, n=(6, 4), compressed=(), dotted=False):
    """Four files as the format's description has them, without the code under test."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    written = {}
    for file, count in zip(FILES, (n[0], n[0], n[1], n[1])):
        shape = (count, 5, 4) if "images" in file else (count,)
        values = rng.integers(0, 256 if "images" in file else 10, shape).astype(np.uint8)
        content = bytes([0, 0, 8, len(shape)]) + b"".join(struct.pack(">i", size) for size in shape) + values.tobytes()
        name = file.replace("-idx", ".idx") if dotted else file
        if file in compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
        written[file] = values
    return written


@pytest.mark.parametrize(("compressed", "dotted"), [((), False), (FILES, False), (FILES[:2], True)])
def test_reads_a_folder(tmp_path, compressed, dotted):
    written = write_folder(tmp_path / "mine", compressed=compressed, dotted=dotted)
    data = from_idx(tmp_path / "mine", flat=False)
    assert (data.name, data.source) == ("mine", "IDX files")
    assert data.x_train.shape == (6, 5, 4, 1)
    assert (data.x_train.dtype, data.y_train.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose(data.x_test[..., 0], written[FILES[2]] / 255, rtol=1e-7)
    np.testing.assert_array_equal(data.y_train, written[FILES[1]])
    np.testing.assert_array_equal(from_idx(tmp_path / "mine").x_train, data.x_train.reshape(6, 20))


@given(
    st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.float32, np.float64]).flatmap(
        lambda dtype: arrays.arrays(dtype, arrays.array_shapes(max_dims=4, min_side=0, max_side=4))
    )
)
def test_round_trip(array):
    again = decode(encode(array))
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


def test_numbers_are_big_endian():
    np.testing.assert_array_equal(decode(bytes([0, 0, 0x0B, 1, 0, 0, 0, 2, 0x01, 0x02, 0xFF, 0xFF])), [258, -1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no IDX file but something that starts with b''"),
        (b"<html>not found</html>", "error page"),
        (gzip.compress(b"\0\0\x08\x01", mtime=0), "a gzip file"),
        (b"\0\0\x07\x01\0\0\0\0", "no IDX file"),
        (b"\0\0\x08\x01\0\0\0\x03ab", "has 10 bytes, and its header announces 11"),
        (b"\0\0\x08\x01\0\0\0\x01ab", "has 10 bytes, and its header announces 9"),
        (b"\0\0\x08\x03\0\0", "has 6 bytes"),
    ],
)
def test_refuses_what_is_damaged(content, says):
    with pytest.raises(ValueError, match=f"^these bytes .*{says}"):
        decode(content, "these bytes")


def test_refuses_a_type_without_a_code():
    with pytest.raises(TypeError, match="no type for int64"):
        encode(np.zeros(2, np.int64))


def test_names_what_is_missing_and_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        from_idx(tmp_path / "nowhere")
    write_folder(tmp_path)
    (tmp_path / FILES[3]).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {FILES[3]} .*it has {FILES[2]}"):
        from_idx(tmp_path)


def test_refuses_images_and_labels_that_do_not_belong_together(tmp_path):
    write_folder(tmp_path)
    (tmp_path / FILES[1]).write_bytes(encode(np.zeros(5, np.uint8)))
    with pytest.raises(ValueError, match=r"x_train has shape \(6, 20\) and y_train \(5,\)"):
        from_idx(tmp_path, name="mixed")
    (tmp_path / FILES[0]).write_bytes(encode(np.zeros(6, np.uint8)))
    with pytest.raises(ValueError, match=r"mixed: train-images-idx3-ubyte holds uint8\[6\]; it must be unsigned bytes with 3 axes"):
        from_idx(tmp_path, name="mixed")


def test_names_a_damaged_gzip_file(tmp_path):
    write_folder(tmp_path, compressed=FILES)
    path = tmp_path / f"{FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{FILES[0]}\.gz is a damaged gzip file"):
        from_idx(tmp_path)
