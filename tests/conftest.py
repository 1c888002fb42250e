"""Tiny seeded models and a byte tokenizer, built in memory: no test reaches a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported

# ruff: noqa: E402
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from olica.allocation import allocate
from olica.configuration_olica import LayerShape
from olica.modeling_olica import Projections, projections_of
from olica.pruning import LayerSurvey, PruningOptions, choose_calibrated, prune_layers, survey_layers
from olica.recipes import RECIPES

CPU = torch.device("cpu")
TEST_DATA = Path(__file__).parent / "data"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes (ids 3 to 258), after <unk>, <s> and </s>; it adds no token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def make_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A seeded random LLaMA of 3 layers, 4 query heads of width 16 and, unless overridden, 4 key/value heads."""
    settings = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()


def pruning_options(**overrides) -> PruningOptions:
    """Options that calibrate one layer at rank 6, unless overridden."""
    settings = dict(percdamp=0.5, mlp_num=1, calibration_rank=6, batch_size=4, device=CPU, cache_device=CPU)
    return PruningOptions(**settings | overrides)


def prune(
    model, ids: torch.Tensor, recipe_name: str, sparsity: float, **overrides
) -> tuple[list[LayerSurvey], list[LayerShape]]:
    """Prune a causal model in place as the command line does; returns the survey and the plan."""
    recipe, options = RECIPES[recipe_name], pruning_options(**overrides)
    plan, _ = allocate(recipe, model.config, model.num_parameters(), sparsity, 3.0)
    survey = survey_layers(model.model, ids, plan, recipe, options)
    plan = choose_calibrated(plan, survey, recipe, options)
    prune_layers(model.model, ids, plan, survey, recipe, options)
    return survey, plan


def prune_to(model, ids: torch.Tensor, plan: list[LayerShape], recipe_name: str = "olica", **overrides) -> None:
    """Prune a causal model in place to sizes that no rule has to give."""
    recipe, options = RECIPES[recipe_name], pruning_options(mlp_num=0, **overrides)
    survey = survey_layers(model.model, ids, plan, recipe, options)
    prune_layers(model.model, ids, plan, survey, recipe, options)


@pytest.fixture
def decoder_layer() -> nn.Module:
    """A dense decoder layer whose MLP has biases."""
    return make_llama(mlp_bias=True).model.layers[0]


@pytest.fixture
def mlp(decoder_layer) -> nn.Module:
    """The MLP of `decoder_layer`, to be run."""
    return decoder_layer.mlp


@pytest.fixture
def layer(decoder_layer) -> Projections:
    """The projections of `decoder_layer`, as the stages see them."""
    return projections_of(decoder_layer)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def grouped_llama() -> LlamaForCausalLM:
    """Two key/value heads for four query heads, tied embeddings: the shape of SmolLM2."""
    return make_llama(num_key_value_heads=2, tie_word_embeddings=True)


@pytest.fixture
def saved_llama(grouped_llama, tokenizer, tmp_path) -> Path:
    """The folder of a small checkpoint with its tokenizer."""
    folder = tmp_path / "tiny-llama"
    grouped_llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def shared_data() -> Path:
    """The optional folder of real text and evaluation sets, named by the variable OLICA_DATA."""
    folder = os.environ.get("OLICA_DATA")
    if not folder:
        pytest.skip("wants the folder of real text and evaluation sets: set OLICA_DATA to it")
    return Path(folder)
