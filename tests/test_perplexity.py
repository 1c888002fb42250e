"""Run with: pytest tests/test_perplexity.py."""

import math

import numpy as np
import pytest
import torch
from conftest import make_llama, no_memory_for_more_than

from olica.errors import UsageError
from olica.evaluation.paired import unpack_floats
from olica.evaluation.perplexity import perplexity, token_windows
from olica.machine import peak_memory, reset_peak_memory
from olica.processes import Processes


@pytest.fixture
def windows():
    """24 windows of 32 random tokens."""
    return torch.randint(3, 259, (24, 32), generator=torch.Generator().manual_seed(5))


def window_nll(model, window):
    """Mean negative log-likelihood of one window (T,), from the logits in float64."""
    with torch.no_grad():
        logits = model(window[None]).logits[0, :-1].double().numpy()
    log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (log_sum - logits[np.arange(len(logits)), window[1:].numpy()]).mean()


def test_windows_are_slices_of_the_whole_text(tokenizer):
    text = "one two three four five six"
    ids = [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in text]
    windows = token_windows(tokenizer, text, 10)
    assert windows.dtype == torch.long
    assert windows.tolist() == [ids[:10], ids[10:20]]  # 27 bytes: a tail of 7 is dropped
    assert token_windows(tokenizer, text, 10, limit=1).tolist() == [ids[:10]]
    assert token_windows(tokenizer, text, 9).shape == (3, 9)  # no tail to drop


def test_windows_hold_the_one_token_that_the_tokenizer_adds(bos_tokenizer):
    windows = token_windows(bos_tokenizer, "abcdefghijk", 4)
    assert windows[0, 0] == bos_tokenizer.bos_token_id
    assert bos_tokenizer.decode(windows.flatten()[1:]) == "abcdefghijk"


def test_every_window_begins_with_the_start_token(bos_tokenizer, tokenizer):
    for given in (bos_tokenizer, tokenizer):
        windows = token_windows(given, "abcdefghijk", 4, add_bos_token=True)
        assert (windows[:, 0] == given.bos_token_id).all()
        assert [given.decode(row[1:]) for row in windows] == ["abc", "def", "ghi"]


def test_a_tokenizer_without_start_token(tokenizer):
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="--add_bos_token"):
        token_windows(tokenizer, "abcdefghijk", 4, add_bos_token=True)


def test_text_longer_than_the_context_is_no_warning(tokenizer, caplog):
    tokenizer.model_max_length = 8
    token_windows(tokenizer, "a" * 100, 8)
    assert not caplog.records


def test_text_too_short_for_a_window(tokenizer):
    with pytest.raises(UsageError, match="--ppl_seqlen 128: the text has only 5 tokens"):
        token_windows(tokenizer, "abcde", 128)


def test_window_too_short_to_predict(tokenizer):
    with pytest.raises(UsageError, match="--ppl_seqlen 1"):
        token_windows(tokenizer, "abcde", 1)


def test_perplexity_is_that_of_the_model_loss(grouped_llama, windows):
    with torch.no_grad():
        losses = [grouped_llama(window[None], labels=window[None]).loss.item() for window in windows]
    result = perplexity(grouped_llama, windows, batch_size=5)
    assert result.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert result.mean_nll == pytest.approx(np.mean(losses), rel=1e-6)
    assert (result.windows, result.seqlen, result.predictions) == (24, 32, 24 * 31)


def test_log_softmax_is_float32_in_a_bfloat16_model(grouped_llama, windows):
    model = grouped_llama.bfloat16()
    expected = np.mean([window_nll(model, window) for window in windows])
    # In bfloat16 the mean would be off by more than 1e-3.
    assert perplexity(model, windows, batch_size=1).mean_nll == pytest.approx(expected, rel=1e-6)


def test_standard_error_is_the_delta_method(grouped_llama, windows):
    means = np.array([window_nll(grouped_llama, window) for window in windows])
    result = perplexity(grouped_llama, windows, batch_size=4)
    centred, places = means - means.mean(), np.arange(24)
    weights = np.clip(1 - np.abs(places[:, None] - places) / 5, 0, None)
    expected = np.exp(means.mean()) * np.sqrt(centred @ weights @ centred / 24 / 23)
    assert result.standard_error == pytest.approx(expected, rel=1e-4)


def test_windows_are_kept_one_by_one(grouped_llama, windows):
    expected = [window_nll(grouped_llama, window) for window in windows]
    found = unpack_floats(perplexity(grouped_llama, windows, batch_size=7).nll_by_window)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_processes_share_the_batches_that_one_would_take(grouped_llama, windows):
    """Each sees its own; together they sum to what one alone has, bit by bit."""

    class Half(Processes):
        def add_up(self, tensors):
            (nll,) = tensors
            sums.append(nll.clone())
            nll.copy_(sum(sums) if len(sums) == 2 else nll + 1)

    sums = []
    alone = perplexity(grouped_llama, windows, batch_size=5)
    assert perplexity(grouped_llama, windows, 5, Half(0, 2)) != alone
    assert perplexity(grouped_llama, windows, 5, Half(1, 2)) == alone
    assert not (sums[0] * sums[1]).any() and (sums[0] + sums[1]).all()


def test_a_batch_that_does_not_fit_is_done_in_halves(grouped_llama, windows, caplog):
    expected = perplexity(grouped_llama, windows, batch_size=1)
    grouped_llama.model.register_forward_pre_hook(no_memory_for_more_than(2), with_kwargs=True)
    found = perplexity(grouped_llama, windows, batch_size=9)
    assert found.value == pytest.approx(expected.value, rel=1e-5) and "going on with --batch_size 2" in caplog.text
    np.testing.assert_allclose(unpack_floats(found.nll_by_window), unpack_floats(expected.nll_by_window), rtol=1e-4)


def test_one_window_has_no_standard_error(grouped_llama, windows):
    assert perplexity(grouped_llama, windows[:1], batch_size=4).standard_error is None


def test_uniform_model_has_the_size_of_the_vocabulary(windows):
    model = make_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = perplexity(model, windows, batch_size=8)
    assert result.value == pytest.approx(320, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("broken", [float("nan"), 1e30])
def test_perplexity_that_is_not_finite(windows, broken):
    model = make_llama()
    torch.nn.init.constant_(model.lm_head.weight[0], broken)
    with pytest.raises(UsageError, match="the checkpoint yields NaN"):
        perplexity(model, windows, batch_size=8)


def test_memory_does_not_grow_with_the_windows():
    """Every window's log-probabilities take 25 MB here; kept or pinned, 60 windows would take 1.5 GB."""
    model = make_llama(vocab_size=49152, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    windows = torch.randint(49152, (60, 128), generator=torch.Generator().manual_seed(0))
    perplexity(model, windows[:4], batch_size=4)
    if not reset_peak_memory("cpu"):
        pytest.skip("this system cannot reset the peak of a process")
    before = peak_memory("cpu")["host_bytes"]
    perplexity(model, windows, batch_size=4)
    assert peak_memory("cpu")["host_bytes"] - before < 600e6
