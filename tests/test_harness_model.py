"""Log-likelihoods of our own in lm-evaluation-harness, against its own."""

import numpy as np
import pytest
import torch

from olica.errors import UsageError
from olica.evaluation.harness_model import harness_model
from olica.processes import ALONE


def test_log_likelihoods_are_those_of_lm_eval_itself(grouped_llama, bos_tokenizer):
    from lm_eval.models.huggingface import HFLM

    generator = np.random.default_rng(3)

    def draw(size):
        return generator.integers(3, grouped_llama.config.vocab_size, size).tolist()

    contexts = [draw(size) for size in (9, 2, 30, 17)]
    requests = [(None, context, draw(size)) for context in contexts for size in (1, 1, 4, 7)]
    requests.append((None, draw(3), draw(grouped_llama.config.max_position_embeddings)))  # cut off on the left
    own = harness_model(grouped_llama, bos_tokenizer, 3, ALONE, add_bos_token=False, apply_chat_template=False)
    # The most likely token behind each context is an answer too, and one that is greedy.
    for context in contexts:
        with torch.no_grad():
            requests.append((None, context, [grouped_llama(torch.tensor([context])).logits[0, -1].argmax().item()]))
    theirs = HFLM(pretrained=grouped_llama, tokenizer=bos_tokenizer, backend="causal", batch_size=2)
    expected = theirs._loglikelihood_tokens(requests, disable_tqdm=True)
    found = own._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(greedy for _, greedy in found) >= 4
    np.testing.assert_allclose([value for value, _ in found], [value for value, _ in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("context", "answer"), [([], [5]), ([5], []), ([5], [6] * 1000)])
def test_what_cannot_be_scored_is_refused(grouped_llama, bos_tokenizer, context, answer):
    own = harness_model(grouped_llama, bos_tokenizer, 8, ALONE, add_bos_token=False, apply_chat_template=False)
    with pytest.raises(UsageError, match=f"an answer of {len(answer)} tokens behind {len(context)} cannot be scored"):
        own._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)


def test_logits_are_made_of_the_last_positions_alone(grouped_llama, bos_tokenizer):
    made, head = [], grouped_llama.lm_head
    handle = head.register_forward_hook(lambda _module, _args, logits: made.append(tuple(logits.shape[:2])))
    own = harness_model(grouped_llama, bos_tokenizer, 8, ALONE, add_bos_token=False, apply_chat_template=False)
    requests = [(None, [5] * size, [6, 7]) for size in (20, 21, 22)]
    requests.append((None, [5] * 22, [6, 8]))  # of the same forward pass
    own._loglikelihood_tokens(requests, disable_tqdm=True)
    handle.remove()
    assert made == [(3, 4)], "positions 19 to 22 of three prompts of 21 to 23 tokens"
