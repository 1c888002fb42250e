import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import no_space_left

from olica.checks import all_finite, check_record_path, check_room, check_writable, refuse_pointers
from olica.errors import UsageError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_makes_a_tensor_unsound(value, dtype):
    tensor = torch.linspace(-3, 3, 60).view(3, 20).to(dtype)
    assert all_finite(tensor)
    tensor[1, 7] = value
    assert not all_finite(tensor)


def test_a_tensor_without_entries_is_sound():
    assert all_finite(torch.empty(0, 4)) and all_finite(torch.empty(4, 0))


def test_the_nearest_folder_that_is_there_has_to_take_what_is_written(tmp_path):
    assert check_writable(tmp_path / "a" / "b" / "c.json", "--flag") == tmp_path
    assert not list(tmp_path.iterdir()), "nothing is left of the trial"
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"--flag: {tmp_path / 'file'} is not a folder that can be written to"):
        check_writable(tmp_path / "file" / "c.json", "--flag")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="wants a folder in which none can be made")
def test_a_folder_that_lets_nobody_write_is_told_by_trying():
    for place in ("/proc/pruned", "/proc/pruned/model/config.json"):
        with pytest.raises(UsageError, match="^--flag: /proc is not a folder that can be written to$"):
            check_writable(Path(place), "--flag")


def test_a_full_disk_is_no_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "mkdir", no_space_left)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    assert check_writable(tmp_path / "a", "--flag") == tmp_path
    with pytest.raises(UsageError, match="--flag: the model takes 2.00 GB more, and .* has 0.00 GB free"):
        check_room(tmp_path / "a", 2 * 10**9, "--flag", "the model")


def test_a_record_may_take_the_place_of_a_file_only(tmp_path):
    (tmp_path / "old.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "old.json")
    (tmp_path / "folder.json").mkdir()
    check_record_path(tmp_path / "old.json", "--output_path")
    check_record_path(tmp_path / "new.json", "--output_path")
    for name in ("link.json", "folder.json"):
        with pytest.raises(UsageError, match=f"--output_path .*{name} is a folder, a link or a device"):
            check_record_path(tmp_path / name, "--output_path")
    with pytest.raises(UsageError, match="^--output_path .*: File name too long; give another$"):
        check_record_path(tmp_path / ("a" * 300), "--output_path")


def test_pointers_are_known_by_how_they_begin_and_how_short_they_are(tmp_path):
    start = b"version https://git-lfs.github.com/spec/v1\n"
    files = {"pointer": start, "long": start + bytes(2000), "other": b"version 2", "empty": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    refuse_pointers(tmp_path / name for name in ("long", "other", "empty", "absent"))
    with pytest.raises(UsageError, match="pointer is a pointer of git-lfs in place of the file; run git lfs pull"):
        refuse_pointers([tmp_path / "other", tmp_path / "pointer"])
