"""Models whose configuration ties the head to the embedding, and whose weights may hold another head."""

import json
import logging
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from called import call
from conftest import load_weights, make_llama, refused
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

import model_evaluate
import model_pruning
import olica  # noqa: F401
from olica.sources.configuration import _warn_once, count_dense_parameters, read_config
from olica.sources.locate import locate
from olica.sources.tied_head import holds_another_head
from olica.sources.weights import read_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FORMS = ["safetensors", "shards", "bin", "old bin", "no prefix", "links"]


def write_head(form: str, head: torch.Tensor | None) -> None:
    """Put a head beside the embedding in the weights of the tied model `tied`, in one of FORMS."""
    path = Path("tied/model.safetensors")
    weights = load_file(path)
    if head is not None:
        weights[HEAD] = head
    path.unlink()
    match form:
        case "safetensors":
            save_file(weights, path, metadata={"format": "pt"})
        case "shards":
            files = {name: f"model-0000{1 + (name == HEAD)}-of-00002.safetensors" for name in weights}
            for file in set(files.values()):
                part = {name: weight for name, weight in weights.items() if files[name] == file}
                save_file(part, path.with_name(file), metadata={"format": "pt"})
            index = {"metadata": {}, "weight_map": files}
            path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
        case "bin" | "old bin":
            torch.save(weights, "tied/pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
        case "links":  # as in the hub's cache, to files without a suffix
            Path("blob").write_bytes(save(weights, metadata={"format": "pt"}))
            path.symlink_to(Path("blob").absolute())
        case "no prefix":  # as a base model is saved
            save_file({name.removeprefix("model."): w for name, w in weights.items()}, path, metadata={"format": "pt"})


@pytest.fixture
def embedding(here) -> torch.Tensor:
    """The embedding (V, D) of a tied model in the folder `tied`."""
    make_llama(num_key_value_heads=2, tie_word_embeddings=True).save_pretrained("tied")
    _warn_once.cache_clear()  # what is said once of a model was said of that of another test
    return load_weights("tied")[EMBEDDING]


def prune(*flags: str) -> dict:
    """The record of a pruning of the model `tied`."""
    common = ["--base_model=tied", "--datasets=ids.safetensors", "--mlp_num=1", "--ratio=0.1", "--save_dir=out"]
    assert call(model_pruning, *common, *flags) == 0
    return json.loads(Path("out/tied_sparsity-0.2/olica_run.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_differs_is_a_head(embedding, caplog, form):
    tied = count_dense_parameters(locate("tied"), read_config(locate("tied")))["total"]
    write_head(form, embedding + 0.1)
    with caplog.at_level(logging.WARNING):
        record = prune()
    assert "holds another lm_head" in caplog.text
    assert record["parameters"]["before"] == tied + embedding.numel()
    assert record["parameters"]["planned"] == record["parameters"]["after"]
    saved = load_weights("out/tied_sparsity-0.2")
    assert torch.equal(saved[HEAD], embedding + 0.1) and torch.equal(saved[EMBEDDING], embedding)
    pruned = AutoModelForCausalLM.from_pretrained("out/tied_sparsity-0.2")
    assert not pruned.config.tie_word_embeddings and torch.equal(pruned.lm_head.weight, embedding + 0.1)


@cache
def tied() -> tuple[dict, set[str]]:
    """The parameters in the record of the tied model, pruned, and the names of its weights: the same in every test."""
    expected, names = prune()["parameters"], set(load_weights("out/tied_sparsity-0.2"))
    shutil.rmtree("out")
    return expected, names


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, torch.float32) for form in FORMS), *((form, torch.float64) for form in ("safetensors", "bin"))],
)
def test_a_copy_of_the_embedding_counts_as_tied(embedding, caplog, form, dtype):
    expected, names = tied()
    write_head(form, embedding.to(dtype))
    with caplog.at_level(logging.WARNING):
        assert prune()["parameters"] == expected
    assert "lm_head" not in caplog.text
    again = load_weights("out/tied_sparsity-0.2")
    assert HEAD not in again and again.keys() == names


@pytest.mark.parametrize("form", FORMS)
def test_the_evaluation_sees_the_same_model(embedding, form):
    write_head(form, embedding + 0.1)
    expected = AutoModelForCausalLM.from_pretrained("tied")
    model = read_model(locate("tied"))
    ids = torch.arange(3, 43).view(2, 20)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert not model.config.tie_word_embeddings
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in expected.parameters())


def test_dense_and_pruned_by_nothing_have_one_perplexity(embedding, tokenizer):
    write_head("safetensors", embedding + 0.1)
    tokenizer.save_pretrained("tied")
    Path("text.txt").write_text("some plain words about cats, dogs and numbers " * 40)
    flags = ["--base_model=tied", "--datasets=ids.safetensors", "--mlp_num=1", "--sparsity=0", "--save_dir=out"]
    assert call(model_pruning, *flags) == 0
    flags = ["--base_model=tied", "--sparsity=0", "--save_dir=out", "--with_dense", "--ppl=text.txt", "--ppl_seqlen=64"]
    assert call(model_evaluate, *flags, "--output_path=e.json") == 0
    results = json.loads(Path("e.json").read_text())["results"].values()
    dense, pruned = (result["perplexity"]["text.txt"]["value"] for result in results)
    assert pruned == pytest.approx(dense, rel=1e-6)


def test_a_head_of_another_size_is_refused_by_its_name(embedding, capsys):
    """As of an adapter with tokens of its own, merged without them."""
    write_head("safetensors", torch.cat([embedding, embedding[:10]]))
    assert "holds in another size 1 weights (lm_head.weight)" in refused(capsys, prune)


def test_nothing_is_said_of_a_head_that_is_not_tied(here, caplog):
    make_llama(num_key_value_heads=2, tie_word_embeddings=False).save_pretrained("untied")
    with caplog.at_level(logging.WARNING):
        read_model(locate("untied"))
    assert "lm_head" not in caplog.text


def test_a_model_without_both_matrices_has_no_other_head(embedding):
    assert not holds_another_head([])
    assert not holds_another_head([Path("tied/model.safetensors")])
