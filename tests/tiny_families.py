"""A tiny seeded model of every supported family, odd in every size that its library code lets be odd."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

# Rotary embeddings need an even head width; it is not hidden_size / num_attention_heads, as in Qwen3.
SIZES = dict(
    vocab_size=319,
    hidden_size=63,
    intermediate_size=177,
    num_hidden_layers=3,
    num_attention_heads=9,
    head_dim=10,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
WINDOW = 7  # shorter than the texts of the tests
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
# What each family has that LLaMA 1 has not.
PECULIARITIES = {
    "llama": dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3_SCALING),
    "mistral": dict(sliding_window=WINDOW),
    "qwen2": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": dict(attention_bias=True),
    "smollm3": dict(no_rope_layers=[1, 0, 1], attention_bias=True, mlp_bias=True),
    "granite": dict(
        embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=2.0, mlp_bias=True
    ),
    "olmo2": dict(),
    "gemma2": dict(layer_types=ALTERNATING, sliding_window=WINDOW, query_pre_attn_scalar=11),
    "gemma3_text": dict(layer_types=ALTERNATING, sliding_window=WINDOW, query_pre_attn_scalar=11),
    "phi3": dict(sliding_window=WINDOW),
}


def make_family(
    model_type: str, grouped: bool = True, tied: bool = False, peculiar: bool = True, **overrides
) -> PreTrainedModel:
    """A seeded random dense model in which no norm or bias is left at its neutral value."""
    settings = SIZES | dict(num_key_value_heads=3 if grouped else 9, tie_word_embeddings=tied)
    settings |= (PECULIARITIES[model_type] if peculiar else {}) | overrides
    if settings["head_dim"] is None:
        del settings["head_dim"]  # most real configurations have none
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if tied:  # else the head finds in the last state little but the last token itself
            model.model.embed_tokens.weight.mul_(0.1)
    return model.eval()


def load(folder: Path, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def kept_parameters(dense: nn.Module, plan) -> int:
    """Parameters of the dense model pruned to `plan`, counted from the sizes of its matrices and biases by hand."""
    config, hidden = dense.config, dense.config.hidden_size
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    channels, names = config.intermediate_size, [name for name, _ in dense.named_parameters()]
    has_bias = {name: f"model.layers.0.{name}.bias" in names for name in ("self_attn.v_proj", "mlp.gate_proj")}
    total = sum(parameter.numel() for parameter in dense.parameters())
    for shape in plan:
        for out_features, rank in ((heads * width, shape.q_rank), (groups * width, shape.k_rank)):
            total += rank * (hidden + out_features) - out_features * hidden if rank else 0
        total -= (width - shape.v_head_dim) * ((heads + groups) * hidden + groups * has_bias["self_attn.v_proj"])
        total -= (channels - shape.intermediate_size) * (3 * hidden + 2 * has_bias["mlp.gate_proj"])
        total += 2 * hidden * shape.correction_rank
    return total


def generate(model, prompts: torch.Tensor, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily generated ids (B, T + 8), and the logits (B, 8, V) that they were chosen by."""
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None) | settings
    found = model.generate(prompts, output_logits=True, return_dict_in_generate=True, **settings)
    return found.sequences, torch.stack(found.logits, dim=1)
