"""The GGUF reader: against the gguf library on good files, and against damage on bad ones."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hub_files import write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from martlet import hub
from martlet.errors import CheckpointError
from martlet.hub.checkpoint import PackedTensor
from martlet.hub.gguf_config import config_from
from martlet.hub.gguf_file import GGUFCheckpoint
from martlet.hub.gguf_header import BLOCK_TYPES, read_header
from martlet.hub.gguf_tokenizer import tokenizer_from


def test_block_sizes_are_those_of_the_library():
    for type_id, (name, elements, size) in BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert (kind.name.lower(), *gguf.GGML_QUANT_SIZES[kind]) == (name, elements, size)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_tensors_come_as_written(tmp_path, kind):
    wanted = write_gguf(tmp_path / "m.gguf", quantised=kind)
    checkpoint = GGUFCheckpoint(tmp_path / "m.gguf")
    assert set(checkpoint.names()) == set(wanted)
    for name, array in wanted.items():
        assert checkpoint.shape(name) == array.shape
        found = checkpoint.tensor(name)
        if isinstance(found, PackedTensor):
            assert found.format == kind.lower() and found.shape == array.shape and found.data.shape[0] == array.shape[0]
            order = np.arange(array.shape[0])[::-1]
            np.testing.assert_array_equal(found.rows(order).dequantise(), array[order])
            found = found.dequantise()
        np.testing.assert_array_equal(np.asarray(found, np.float32), array)
    assert checkpoint.where("token_embd.weight").endswith("m.gguf")


@pytest.mark.parametrize(
    "kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "TQ2_0"]
)
def test_types_the_library_cannot_write_are_unpacked_by_its_tables(tmp_path, kind):
    type_id = getattr(gguf.GGMLQuantizationType, kind)
    elements, size = gguf.GGML_QUANT_SIZES[type_id]
    data = np.random.default_rng(1).integers(0, 60, (6, 2 * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    packed = GGUFCheckpoint(tmp_path / "m.gguf").tensor("w")
    assert packed.format == kind.lower() and packed.shape == (6, 2 * elements)
    np.testing.assert_array_equal(packed.dequantise(), gguf.quants.dequantize(data, type_id))


def test_default_model_reads_as_the_library_reads_it():
    card = hub.resolve(hub.DEFAULT_MODEL)
    checkpoint = hub.open_checkpoint(card)
    assert checkpoint.interleaved_qk
    assert len(checkpoint.names()) == 272
    for name in ("blk.7.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        info = checkpoint.header.tensors[name]
        found = checkpoint.tensor(name)
        raw = np.frombuffer(card.path.read_bytes()[info.start : info.start + info.nbytes], np.uint8)
        if isinstance(found, PackedTensor):
            wanted = gguf.quants.dequantize(raw.reshape(found.data.shape), gguf.GGMLQuantizationType.Q4_1)
            np.testing.assert_array_equal(found.dequantise(), wanted)
        else:
            np.testing.assert_array_equal(found, raw.view("<f4"))
    q = checkpoint.tensor("blk.0.attn_q.weight")
    assert (q.format, q.shape, q.data.shape) == ("q4_1", (576, 576), (576, 360))
    assert 0.1 < q.dequantise().std() < 0.5


def test_default_model_has_the_config_of_its_original():
    config = hub.resolve(hub.DEFAULT_MODEL).config
    wanted = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    assert {key: config.get(key) for key in wanted} == wanted
    assert sum(np.prod(i.shape) for i in read_header(hub.resolve(hub.DEFAULT_MODEL).path).tensors.values()) == 134515008


def test_opening_the_default_model_is_quick():
    path = hub.resolve(hub.DEFAULT_MODEL).path
    read_header.__globals__["_read_header"].cache_clear()
    start = time.process_time()
    GGUFCheckpoint(path)
    assert time.process_time() - start < 0.5  # 0.03 s on a quiet machine; the library's reader takes 2.9


def test_config_of_other_architectures(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "gemma3")
    for key, value in {"block_count": 7, "embedding_length": 640, "feed_forward_length": 2048}.items():
        writer.add_uint32(f"gemma3.{key}", value)
    writer.add_uint32("gemma3.attention.key_length", 256)
    writer.add_array("gemma3.attention.head_count", [4] * 7)
    writer.add_string("gemma3.rope.scaling.type", "linear")
    writer.add_float32("gemma3.rope.scaling.factor", 8.0)
    writer.add_tensor("output.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = config_from(read_header(tmp_path / "g.gguf"))
    assert config["model_type"] == "gemma3_text" and config["tie_word_embeddings"] is False
    assert config["head_dim"] == 256 and config["num_attention_heads"] == config["num_key_value_heads"] == 4
    assert config["rope_local_base_freq"] == 10000.0 and config["query_pre_attn_scalar"] == 256
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5]
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"llama.block_count": "thirty"}, "llama.block_count"),
        ({"llama.embedding_length": 0}, "llama.embedding_length"),
        ({"llama.rope.freq_base": "x"}, "llama.rope.freq_base"),
        ({"llama.attention.head_count_kv": [1, 2]}, "llama.attention.head_count_kv differs from layer to layer"),
    ],
)
def test_metadata_without_sense_is_refused(tmp_path, changes, complaint):
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=complaint):
        hub.resolve(str(tmp_path / "m.gguf"))


def test_split_files_are_one_checkpoint(tmp_path):
    for number, name in enumerate(("first", "second"), 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.count", 2)
        writer.add_tensor(name, np.full((2, 2), number, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "m-00001-of-00002.gguf")
    assert checkpoint.tensor("second")[0, 0] == 2 and checkpoint.where("second").endswith("m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="m-00002-of-00002"):
        GGUFCheckpoint(tmp_path / "m-00001-of-00002.gguf")


def read_everything(path: Path) -> None:
    checkpoint = GGUFCheckpoint(path)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        if isinstance(tensor, PackedTensor):
            tensor.dequantise()
    config_from(checkpoint.header)
    tokenizer_from(checkpoint.header)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    for kind in ("gpt2", "llama"):
        write_gguf(folder / f"{kind}.gguf", tokenizer=kind)
        read_everything(folder / f"{kind}.gguf")
    return {kind: (folder / f"{kind}.gguf").read_bytes() for kind in ("gpt2", "llama")}


def test_a_truncated_file_names_itself_and_the_tensor(tmp_path, good):
    path = tmp_path / "cut.gguf"
    size = len(good["gpt2"])
    for length in [*range(0, 64, 3), *range(64, size, 97), size - 1]:
        path.write_bytes(good["gpt2"][:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf") as caught:
            read_everything(path)
    assert "tensor output_norm.weight" in str(caught.value) and "truncated" in str(caught.value)


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_ends_in_a_checkpoint_error_or_nothing(tmp_path, good, data):
    raw = bytearray(good[data.draw(st.sampled_from(["gpt2", "llama"]))])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, 1200), st.integers(0, len(raw) - 8)))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**31, 2**32, 2**63, 2**64 - 1])))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    try:
        with np.errstate(all="ignore"):
            read_everything(path)
    except CheckpointError as error:
        assert "damaged.gguf" in str(error)


def test_not_a_gguf_file(tmp_path):
    for raw, complaint in [
        (b"", "cannot be read"),
        (b"PK\x03\x04" * 30, "is not a GGUF file"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "big-endian"),
        (b"GGUF\x01\x00\x00\x00" + bytes(100), "version 1"),
    ]:
        (tmp_path / "x.gguf").write_bytes(raw)
        with pytest.raises(CheckpointError, match=complaint):
            read_header(tmp_path / "x.gguf")
