"""The safetensors reader: against the library on good files, and against damage on bad ones."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hub_files import write_folder, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from martlet.errors import CheckpointError
from martlet.hub.files import INDEX
from martlet.hub.safetensors_file import SafetensorsCheckpoint


def test_reads_what_the_library_writes(tmp_path):
    random = np.random.default_rng(0)
    wanted = {
        "f32": random.standard_normal((3, 5)).astype(np.float32),
        "f16": random.standard_normal((4,)).astype(np.float16),
        "bf16": random.standard_normal((2, 3, 2)).astype(ml_dtypes.bfloat16),
        "i64": np.arange(6).reshape(2, 3),
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 4), np.float32),
    }
    safetensors.numpy.save_file(wanted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.names()) == set(wanted)
    for name, array in wanted.items():
        found = checkpoint.tensor(name)
        assert found.dtype == array.dtype and found.shape == checkpoint.shape(name) == array.shape
        np.testing.assert_array_equal(found, array)
    view = checkpoint.tensor("f32")
    assert not view.flags.owndata and not view.flags.writeable
    checkpoint.close()
    np.testing.assert_array_equal(view, wanted["f32"])  # a view outlives the checkpoint


def test_data_that_the_file_does_not_align_is_copied(tmp_path):
    numbers = np.arange(5, dtype=np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"a": ("U8", [1], b"x"), "b": ("F32", [5], numbers.tobytes())})
    found = SafetensorsCheckpoint(tmp_path).tensor("b")
    assert found.flags.aligned
    np.testing.assert_array_equal(found, numbers)


def sharded(folder):
    for shard, name in (("s1", "a"), ("s2", "b")):
        write_safetensors(folder / f"{shard}.safetensors", {name: ("F32", [1], bytes(4))})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}}))
    return folder


def test_shards(tmp_path):
    checkpoint = SafetensorsCheckpoint(sharded(tmp_path))
    assert sorted(checkpoint.names()) == ["a", "b"] and checkpoint.where("b").endswith("s2.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ({"a": "s1.safetensors", "b": "s3.safetensors"}, r"missing: s3\.safetensors"),
        ({"a": "s1.safetensors", "b": "s1.safetensors"}, r"s1\.safetensors: tensor b is not there"),
        ({"a": "../s1.safetensors"}, "no plain file name"),
        ({"a": 3}, "no plain file name"),
        ({}, "no weight_map"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, weight_map, complaint):
    (sharded(tmp_path) / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=complaint):
        SafetensorsCheckpoint(tmp_path)


def test_no_weights_and_no_such_tensor(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        SafetensorsCheckpoint(tmp_path)
    checkpoint = SafetensorsCheckpoint(write_folder(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="no tensor missing"):
        checkpoint.tensor("missing")
    with pytest.raises(KeyError):
        checkpoint.shape("missing")


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 15]}, "takes 16 bytes, not 15"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}, "the file ends at"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "bad shape"),
        ({"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}, "bad shape"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}, "takes"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}, "should lie"),
        ({"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}, "unknown dtype"),
        ({"shape": [4], "data_offsets": [0, 16]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [4]}, "bad data_offsets"),
        ([], "no object"),
    ],
)
def test_a_wrong_entry_names_file_and_tensor(tmp_path, info, complaint):
    text = json.dumps({"w": info}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor w: .*{complaint}"):
        SafetensorsCheckpoint(tmp_path)


def read_everything(folder):
    checkpoint = SafetensorsCheckpoint(folder)
    for name in checkpoint.names():
        checkpoint.tensor(name).sum()


def test_truncation_anywhere_is_noticed(tmp_path):
    write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read_everything(tmp_path)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 120), value=st.integers(0, 255), more=st.binary(max_size=6))
def test_damage_ends_in_a_checkpoint_error_or_nothing(tmp_path, at, value, more):
    file = write_folder(tmp_path) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[at : at + 1 + len(more)] = bytes([value]) + more
    file.write_bytes(raw)
    try:
        read_everything(tmp_path)
    except CheckpointError as error:
        assert "model.safetensors" in str(error)


def test_a_header_nested_beyond_reason(tmp_path):
    text = b"[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="not JSON"):
        SafetensorsCheckpoint(tmp_path)
