"""Runs that die while shards are gathered to files, or while the checkpoint is put in its place."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
from conftest import refused
from tiny_run import FOLDER, LAYERS, WORK, Killed, checkpoint_of, contents, journal, prune

from olica.outputs import run_folder as run_folder_module
from olica.outputs import run_progress
from olica.outputs.journal import Journal
from olica.outputs.run_folder import RunFolder
from olica.pruning import layers as pruning_module

SMALL_FILES = "--max_shard_size=200KB"


@cache
def in_small_files() -> dict[str, bytes]:
    """What the checkpoint of a run of `here` with small files holds."""
    prune(SMALL_FILES)
    expected = contents(FOLDER)
    for folder in ("out", "data"):
        shutil.rmtree(folder)
    assert len([name for name in expected if name.endswith(".safetensors")]) > 4
    return expected


def dying_in(patched, moment: str, files: int) -> None:
    """Have a run die at a moment of gathering the file behind so many."""
    begun = []

    def is_due(counts: bool = True) -> bool:
        if counts:
            begun.append(moment)
        return len(begun) > files

    def writing(path, entries, pieces, write=run_progress.write_pieces):
        if is_due():
            path.write_bytes(next(iter(pieces)))
            raise Killed
        write(path, entries, pieces)

    def committing(self, facts, without=(), commit=Journal.commit):
        if is_due(counts=not facts):
            raise Killed
        commit(self, facts, without)

    def unlinking(self, missing_ok=False, unlink=Path.unlink):
        if self.name.startswith("shard-") and is_due():
            raise Killed
        unlink(self, missing_ok)

    match moment:
        case "half a file":
            patched.setattr(run_progress, "write_pieces", writing)
        case "before the journal":
            patched.setattr(Journal, "commit", committing)
        case "before shards go":
            patched.setattr(Path, "unlink", unlinking)


@pytest.mark.parametrize("files", [0, 2])
@pytest.mark.parametrize("moment", ["half a file", "before the journal", "before shards go"])
def test_a_kill_while_shards_are_gathered(here, monkeypatch, moment, files):
    """No layer is pruned again, and the disk never held more than the weights, a file and a shard."""
    expected = in_small_files()
    with monkeypatch.context() as patched:
        dying_in(patched, moment, files)
        with pytest.raises(Killed):
            prune(SMALL_FILES)
    assert journal()["pruned"] == LAYERS and not FOLDER.exists()
    left = [path.stat().st_size for path in WORK.rglob("*.safetensors")]
    weights = sum(len(held) for name, held in expected.items() if name.endswith(".safetensors"))
    assert weights - 10_000 < sum(left) < weights + 200_000 + max(left)
    monkeypatch.setattr(pruning_module, "cut", None)
    assert prune(SMALL_FILES) == 0
    assert contents(FOLDER) == expected
    assert json.loads((FOLDER / "olica_run.json").read_text())["went_on_after"] == [LAYERS]
    assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]


def test_gathered_files_are_found_by_their_checksums_and_files_of_another_size_refused(here, capsys, monkeypatch):
    expected = in_small_files()
    with monkeypatch.context() as patched:
        dying_in(patched, "half a file", 2)
        with pytest.raises(Killed):
            prune(SMALL_FILES)
    assert "another --max_shard_size (200KB, now 5GB)" in refused(capsys, prune)
    path = next(WORK.glob("checkpoint/model-00002-of-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")  # no weight here ends so
    assert f"{path.name} of the unfinished run was altered" in refused(capsys, prune, SMALL_FILES)
    assert prune(SMALL_FILES, "--overwrite") == 0
    assert contents(FOLDER) == expected


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_kill_while_the_checkpoint_is_put_in_its_place(here, capsys, monkeypatch, replaced, moves):
    """Moving the old folder away and the new one to its place are two steps, tidying up is a third."""
    expected = checkpoint_of("olica")
    flags = ["--overwrite"] if replaced else []
    if replaced:
        prune("--percdamp=0.3")
    done = []

    def counted(move):
        def moving(*arguments):
            if len(done) == moves:
                raise Killed
            done.append(arguments)
            return move(*arguments)

        return moving

    with monkeypatch.context() as patched:
        publish = RunFolder.publish

        def dying(self):
            patched.setattr("olica.outputs.run_folder.move_durably", counted(run_folder_module.move_durably))
            patched.setattr(Path, "replace", counted(Path.replace))
            patched.setattr(RunFolder, "_recover", lambda self: None)
            patched.setattr(RunFolder, "tidy", lambda self: None)
            publish(self)
            raise Killed

        patched.setattr(RunFolder, "publish", dying)
        with pytest.raises(Killed):
            prune(*flags)
    other = ["--percdamp=0.2", *flags]
    if moves == 2 and not replaced:
        assert "--overwrite" in refused(capsys, prune, *other)
        assert contents(FOLDER) == expected
        return
    assert prune(*flags) == 0
    assert contents(FOLDER) == expected
    assert [path.name for path in Path("out").iterdir()] == [FOLDER.name]


def test_an_end_that_was_not_tidied_answers_for_no_other_run(here, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "tidy", lambda self: None)
        prune("--overwrite")
    assert (WORK / "progress.json").exists()
    before = contents(FOLDER)
    assert prune("--overwrite", "--percdamp=0.2") == 0
    assert contents(FOLDER) != before
    assert json.loads((FOLDER / "olica_run.json").read_text())["settings"]["percdamp"] == 0.2
