"""What a GGUF file says of itself, read without gguf's own reader, which is the reference here."""

import gguf
import numpy as np
import pytest

from olica.sources.gguf_header import GgufHeader, GgufTensor, read_header

NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64")
LISTS = {"strings": ["a", "ü", ""], "numbers": [1, 2, 3], "truths": [True], "reals": [0.5], "nested": [[1, 2], [3, 4]]}


@pytest.fixture
def path(tmp_path):
    """A file with every kind of setting."""
    writer = gguf.GGUFWriter(tmp_path / "any.gguf", "llama")
    writer.add_custom_alignment(128)
    for kind in NUMBERS:
        getattr(writer, f"add_{kind}")(f"test.{kind}", 7)
    writer.add_bool("test.bool", True)
    writer.add_name("Größe")
    for name, values in LISTS.items():
        writer.add_array(f"test.{name}", values)
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("half", np.ones((3, 7), np.float16))
    blocks = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "any.gguf"


def test_settings_and_tensors_are_those_of_gguf(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    fields |= {f"test.{name}": None for name in LISTS}
    tensors = {
        tensor.name: GgufTensor(tensor.tensor_type, tuple(tensor.shape.tolist()[::-1]), tensor.data_offset)
        for tensor in reader.tensors
    }
    assert read_header(path) == GgufHeader(fields, tensors)
    for tensor in reader.tensors:
        assert tensors[tensor.name].end == tensor.data_offset + tensor.n_bytes


def test_a_file_that_is_cut_short_says_so_wherever_it_ends(path):
    whole = path.read_bytes()
    needed = max(tensor.end for tensor in read_header(path).tensors.values())
    for length in [*range(4, needed, 7), needed - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short"):
            read_header(path)
    path.write_bytes(whole[:needed])
    read_header(path)


@pytest.mark.parametrize(
    ("place", "bytes_there", "fault"),
    [
        (0, b"GGML", "it is no GGUF file"),
        (4, b"\x04\0\0\0", "its GGUF version is 4, of which we read 2 and 3 only"),
        (4, b"\0\0\0\x03", "its GGUF version is 50331648"),  # written by a machine of the other byte order
        (16, b"\0" * 8, "does not say of which architecture it is"),
        (24, b"\xff" * 8, "cut short"),  # the length of a name
        (24 + 8 + len("general.architecture"), b"\x63\0\0\0", "99 is not a valid GGUFValueType"),
    ],
)
def test_a_file_that_is_no_gguf_file_that_we_know(place, bytes_there, fault, path):
    content = bytearray(path.read_bytes())
    content[place : place + len(bytes_there)] = bytes_there
    path.write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_header(path)


def test_an_empty_file(path):
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        read_header(path)
