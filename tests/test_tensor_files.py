"""Files of tensors that are written piece by piece: safetensors itself reads them, and wrote what is read."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from olica import tensor_files
from olica.checks import as_bytes
from olica.errors import UsageError
from olica.outputs.weight_shards import cut_into_files
from olica.tensor_files import bytes_in, bytes_of, entries_of, entry_of, write_pieces

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


def tensors() -> dict[str, torch.Tensor]:
    """Of several dtypes and shapes, one of them without numbers and one without dimensions."""
    draw = torch.Generator().manual_seed(0)
    found = {f"of {dtype}": (100 * torch.randn(7, 5, generator=draw)).to(dtype) for dtype in DTYPES}
    return found | {"none": torch.empty(0, 3), "single": torch.tensor(0.5), "row": torch.randn(11, generator=draw)}


def test_what_safetensors_wrote_is_copied_block_by_block_into_a_file_that_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK", 9)
    expected = tensors()
    save_file(expected, tmp_path / "a")
    entries = entries_of(tmp_path / "a")
    assert {name: entry[:3] for name, entry in entries.items()} == {
        name: entry_of(tuple(tensor.shape), tensor.dtype)[:3] for name, tensor in expected.items()
    }
    write_pieces(
        tmp_path / "b", entries, (piece for entry in entries.values() for piece in bytes_in(tmp_path / "a", entry))
    )
    with safe_open(tmp_path / "b", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "b")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_tensors_are_written_one_after_the_other(tmp_path):
    expected = {"a": torch.randn(4, 6).bfloat16().T, "b": torch.randn(3).bfloat16()}
    entries = {name: entry_of(tuple(tensor.shape), tensor.dtype) for name, tensor in expected.items()}
    write_pieces(tmp_path / "a", entries, map(bytes_of, expected.values()))
    found = load_file(tmp_path / "a")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(RuntimeError, match="48 bytes of tensors came for .*, not 54"):
        write_pieces(tmp_path / "b", entries, [bytes_of(expected["a"])])


def test_a_file_that_was_cut_short_is_found(tmp_path):
    save_file({"a": torch.ones(100)}, tmp_path / "a")
    (entry,) = entries_of(tmp_path / "a").values()
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(EOFError):
        list(bytes_in(tmp_path / "a", entry))


@pytest.mark.parametrize(
    ("largest", "groups"),
    [(99, ["abcd"]), (12, ["abcd"]), (11, ["abc", "d"]), (7, ["ab", "cd"]), (5, ["ab", "c", "d"]), (1, [*"abcd"])],
)
def test_weights_are_cut_into_files_in_their_order(largest, groups):
    """Of 3, 2, 6 and 1 bytes: what is larger than a file has its own."""
    files = cut_into_files({"a": 3, "b": 2, "c": 6, "d": 1}, largest)
    assert ["".join(names) for names in files.values()] == groups
    count = len(groups)
    numbered = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    assert [*files] == (numbered if count > 1 else ["model.safetensors"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("20KB", 20_000), ("7", 7), ("8B", 8), ("1TB", 10**12)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert as_bytes("max_shard_size", text) == size


@pytest.mark.parametrize("text", ["", "0", "0.1", "-5GB", "5GiB", "much", "GB", "5 G", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="^--max_shard_size .*: give a size such as 500MB or 5GB$"):
        as_bytes("max_shard_size", text)
