import pytest
import torch
from safetensors import SafetensorError

from olica.errors import UsageError, in_words, memory_in_words, reason
from olica.outputs.journal import writing_in_words
from olica.sources import text_files
from olica.sources.text_sources import read_rows

# Errors of memory that runs out, and whether it is that of the host.
MEMORY = {
    MemoryError(): True,
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes."): True,
    torch.OutOfMemoryError("CUDA out of memory"): False,
    RuntimeError("CUDA error: out of memory"): False,
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"): False,
}


@pytest.mark.parametrize("error", [OSError("gone\nfar away"), KeyError("gone"), RuntimeError("gone")])
def test_errors_of_libraries_become_a_sentence_that_keeps_the_cause(error):
    with (
        pytest.raises(UsageError, match="--flag FILE: .?gone.?; give another$") as caught,
        in_words(lambda error: f"--flag FILE: {reason(error)}; give another"),
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [UsageError("in words"), NameError("x"), AssertionError("x"), KeyboardInterrupt(), *MEMORY]
)
def test_what_is_no_fault_of_input_stays_as_it_is(error):
    with pytest.raises(type(error)) as caught, in_words(lambda error: "a fault of the input"):
        raise error
    assert caught.value is error


def test_kinds_and_what_is_let_through_narrow_what_is_turned():
    with pytest.raises(KeyError), in_words(str, kinds=(OSError, SafetensorError)):
        raise KeyError("x")
    with pytest.raises(UsageError, match="of kind"), in_words(str, kinds=OSError):
        raise FileNotFoundError("of kind")
    with pytest.raises(KeyError), in_words(str, let_through=lambda error: isinstance(error, KeyError)):
        raise KeyError("x")


def test_a_disk_that_fails_names_the_folder(tmp_path):
    words = f"--save_dir: {tmp_path} cannot be written to .*No space"
    with pytest.raises(UsageError, match=words), writing_in_words(tmp_path):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("error", "of_host"), MEMORY.items())
def test_memory_that_runs_out_ends_in_advice_for_where_it_was(error, of_host):
    words = rf"^out of memory \(.+\); host {of_host}$"
    with pytest.raises(UsageError, match=words), memory_in_words(lambda host: f"host {host}"):
        raise error


def test_memory_in_words_leaves_other_errors_alone():
    with pytest.raises(RuntimeError, match="of another kind"), memory_in_words(lambda host: "advice"):
        raise RuntimeError("of another kind")


def test_a_mistake_in_the_program_is_not_taken_for_a_fault_of_the_text(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(text_files, "_read_json", lambda path, cached: undefined_name)  # noqa: F821
    with pytest.raises(NameError, match="undefined_name"):
        read_rows(str(tmp_path / "rows.jsonl"), "train", None)
