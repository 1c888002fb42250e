"""Tiny GGUF files, written through the gguf package, what they hold, and models and tokenizers that make them."""

import io
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
from conftest import make_tokenizer
from tiny_families import make_family
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

GGUF_SIZES = dict(vocab_size=320, hidden_size=64, head_dim=16, intermediate_size=160, num_attention_heads=4)
GGUF_SIZES |= dict(num_key_value_heads=2)

# In GGUF, a llama's query and key rows are in another order, and the norms of a Gemma are stored with their 1 added.
WIDE_HEADS = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
WIDE_MODEL = WIDE_HEADS | {"intermediate_size": 960}
GGUF_FAMILIES = {
    "llama": ("llama", {}),
    "mistral": ("llama", {"sliding_window": None}),  # files of Mistral call themselves llama, and are read as one
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 128}),  # the file does not say the head width: transformers takes its default
    "gemma2": ("gemma2", WIDE_MODEL),  # nor the scale of attention
    "gemma3_text": ("gemma3", WIDE_MODEL),
    "phi3": ("phi3", {}),
}
# What transformers does not take from a file of Gemma 3, but from its own defaults.
GEMMA = WIDE_HEADS | {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "layer_types": ["sliding_attention"] * 3,
}
LLAMA_PIECES = dict(add_dummy_prefix=True)
GEMMA_PIECES = dict(
    add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>"
)


def rounded(weight: np.ndarray) -> np.ndarray:
    """What Q8_0 leaves of a matrix: in runs of 32 a float16 scale, the largest magnitude over 127, times integers."""
    runs = weight.reshape(-1, 32)
    exact = np.abs(runs).max(1, keepdims=True) / np.float32(127)
    integers = np.round(np.divide(runs, exact, out=np.zeros_like(runs), where=exact > 0))
    return (integers * exact.astype(np.float16).astype(np.float32)).reshape(weight.shape)


def write_gguf(model: PreTrainedModel, architecture: str, path: Path, parts: int = 1, name: str = "") -> None:
    """Write matrices as Q8_0, vectors as float32, and a tokenizer of bytes; `model` gets the rounded matrices too.

    With more `parts` than one it is the first of them, by what it says of itself.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    if parts > 1:
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", parts)
    writer.add_name(name or f"Tiny {config.model_type}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if "factor" in rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    vocabulary = make_tokenizer().get_vocab() | {"ab": 259}
    if architecture.startswith("gemma"):  # whose tokenizers are SentencePiece's: of characters, with scores
        vocabulary |= {character: 260 + index for index, character in enumerate("▁\n\tﬁ文")}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(len(vocabulary))])
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(["a b"])
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 3)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.data = torch.from_numpy(rounded(parameter.detach().numpy()))
        tensor = parameter.detach().numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        stem, _, kind = name.rpartition(".")
        if tensor.ndim == 2:
            quantised = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{names.get_name(stem)}.{kind}", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merging_tokenizer(**settings) -> PreTrainedTokenizerFast:
    """That of bytes, with one merge: llama.cpp reads none that merges nothing."""
    backend = make_tokenizer().backend_tokenizer
    vocabulary = backend.get_vocab() | {"ow": 259}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("o", "w")]))
    merging.pre_tokenizer, merging.decoder = backend.pre_tokenizer, backend.decoder
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=merging, **names | settings)


def save(model: PreTrainedModel, folder: Path, tokenizer=None) -> Path:
    """Save a model with a tokenizer that a GGUF file can hold."""
    model.save_pretrained(folder)
    (tokenizer or merging_tokenizer()).save_pretrained(folder)
    return folder


def fields_of(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def config_of(family: str = "llama", **settings):
    return make_family(family, peculiar=False, **GGUF_SIZES | settings).config


def train_sentencepiece(folder: Path, **settings) -> None:
    """Write `tokenizer.model`: byte-pair encoding, bytes to fall back on, text left as it is."""
    text = (Path(__file__).parents[1] / "LICENSE").read_text().splitlines()  # which stays as it is
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=trained,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        **dict(normalization_rule_name="identity", remove_extra_whitespaces=False) | settings,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
