import json

import pytest

from olica.errors import UsageError
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer


def test_a_folder_may_lack_a_tokenizer(saved_llama):
    assert read_tokenizer(locate(str(saved_llama)))("ab").input_ids
    for path in saved_llama.glob("*token*"):
        path.unlink()
    assert read_tokenizer(locate(str(saved_llama))) is None


def test_a_tokenizer_that_cannot_be_read(saved_llama):
    (saved_llama / "tokenizer.json").write_text('{"model": {"type": "no-such-type"}}')
    with pytest.raises(UsageError, match="its tokenizer cannot be read"):
        read_tokenizer(locate(str(saved_llama)))


def test_a_tokenizer_that_fails_at_the_first_text(saved_llama):
    path = saved_llama / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"] |= {"unk_token": "<gone>", "vocab": {"a": 0}}
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match="its tokenizer cannot be read .*<gone>"):
        read_tokenizer(locate(str(saved_llama)))
