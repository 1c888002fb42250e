"""What a GGUF file says of a model: its architecture and sizes by llama.cpp's names, and its tensors by theirs.

D hidden size, F channels of the MLP, d head width; H query heads and K key/value heads of a layer
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import UsageError
from ..model.configuration_olica import head_dim
from ..model.modeling_deci import DeciLMConfig

Shapes = Mapping[str, tuple[int, ...]]  # of the weights, by their names

# How llama.cpp has the families.
KINDS = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    DeciLMConfig.model_type: MODEL_ARCH.LLAMA,
}
# What it calls a model whose layers differ in their sizes and are otherwise those of a LLaMA.
UNEVEN = MODEL_ARCH.DECI
# Families that are LLaMAs but for biases, which a LLaMA may have: written as one where they are no longer of their own.
LIKE_LLAMA = ("llama", "mistral", "qwen2", DeciLMConfig.model_type)
# In these, rotary embeddings turn neighbouring rows of a head; in the others those that are half a head apart.
TURN_NEIGHBOURS = (MODEL_ARCH.LLAMA, UNEVEN)
# The projections that may have a bias.
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
BIASES = {MODEL_ARCH.LLAMA: ATTENTION + MLP, UNEVEN: ATTENTION + MLP, MODEL_ARCH.QWEN2: ATTENTION[:3]}
# Every so many layers of a Gemma 3 the last attends to all tokens; the file does not say so.
GEMMA3_PERIOD = 6
# The Gemma 3 of 27B alone, which llama.cpp knows by its layers, scales attention by D/H in place of d.
GEMMA3_27B_LAYERS = 62
GEMMA3_LOCAL_THETA = 10000.0
# What YaRN takes where a configuration says nothing; llama.cpp has the same, and no key for another `attention_factor`.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a decoder layer: H, K and F."""

    heads: int
    kv_heads: int
    channels: int


class GgufLayout:
    """How a model lies in a GGUF file.

    Attributes:
        sizes: of every layer.
        kind: the architecture, as the gguf package has it.
        names: of the tensors in the file, by those of the weights.
    """

    def __init__(self, config: PreTrainedConfig, shapes: Shapes):
        """Find the layout of a model of `config`, the sizes of whose layers are those of its weights.

        Raises:
            UsageError: GGUF has none for it.
        """
        if config.model_type not in KINDS:
            raise _refused(f"models of the family {config.model_type} are not written; {', '.join(KINDS)} are")
        self.config = config
        self.sizes = [_sizes(shapes, index, head_dim(config)) for index in range(config.num_hidden_layers)]
        self.kind = self._kind()
        self._check()
        names = get_tensor_name_map(self.kind, config.num_hidden_layers)
        self.names = {}
        for name in shapes:
            stem, _, end = name.rpartition(".")
            found = names.get_name(stem)
            if found is None or (end == "bias" and stem.rpartition(".")[2] not in BIASES.get(self.kind, ())):
                raise _refused(f"the {self.name} of llama.cpp has no place for {name}")
            self.names[name] = f"{found}.{end}"

    def _kind(self) -> MODEL_ARCH:
        kind = KINDS[self.config.model_type]
        if len(set(self.sizes)) > 1:
            if self.config.model_type not in LIKE_LLAMA:
                raise _refused(
                    f"the layers differ in their sizes, which llama.cpp knows of {', '.join(LIKE_LLAMA)} and not of "
                    f"{self.config.model_type}; prune all layers to the same sizes"
                )
            return UNEVEN
        if kind == MODEL_ARCH.QWEN2 and self.sizes[0].heads * head_dim(self.config) != self.config.hidden_size:
            return MODEL_ARCH.LLAMA  # llama.cpp's Qwen 2 has as many heads as fill the hidden size
        return kind

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return MODEL_ARCH_NAMES[self.kind]

    @property
    def context_length(self) -> int:
        """Tokens that the model attends to at most, in every layer: longer texts llama.cpp would run otherwise.

        Of the architectures here it has windows for Gemma's alone.
        """
        length, window = self.config.max_position_embeddings, getattr(self.config, "sliding_window", None)
        return length if window is None or self.kind == MODEL_ARCH.GEMMA3 else min(length, window)

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the fields into a GGUF file."""
        config, width = self.config, head_dim(self.config)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        heads, kv_heads, channels = zip(*((s.heads, s.kv_heads, s.channels) for s in self.sizes), strict=True)
        uneven = self.kind == UNEVEN
        writer.add_head_count(heads if uneven else heads[0])
        writer.add_head_count_kv(kv_heads if uneven else kv_heads[0])
        writer.add_feed_forward_length(channels if uneven else channels[0])
        writer.add_key_length(width)
        writer.add_value_length(width)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        rope = _rope(config)
        writer.add_rope_dimension_count(width)
        writer.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if self.kind == MODEL_ARCH.GEMMA3:
            writer.add_sliding_window(config.sliding_window)

    def computed(self) -> dict[str, Tensor]:
        """Tensors of the file that are no weights of the model: what Llama 3 divides rotary frequencies by (d/2)."""
        rope = _rope(self.config)
        if rope["rope_type"] != "llama3":
            return {}
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, "cpu")
        width = head_dim(self.config)
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        return {"rope_freqs.weight": (plain / frequencies.double()).float()}

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        """A weight of the model as the file has it."""
        stem = name.rpartition(".")[0]
        if self.kind in TURN_NEIGHBOURS and stem.endswith(("q_proj", "k_proj")):
            return weight[neighbouring(len(weight), head_dim(self.config))]
        if self.kind == MODEL_ARCH.GEMMA3 and stem.endswith("norm"):
            return weight.float() + 1  # Gemma's norms multiply by 1 + w, llama.cpp's by what the file has
        return weight

    def _check(self) -> None:
        """Raise UsageError for settings that llama.cpp would not follow."""
        config, rope = self.config, _rope(self.config)
        activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
        if activation != (expected := "gelu_pytorch_tanh" if self.kind == MODEL_ARCH.GEMMA3 else "silu"):
            raise _refused(f"the activation {activation} is none of llama.cpp's {self.name}, which has {expected}")
        if rope["rope_type"] not in ("default", "linear", "yarn") and not (
            rope["rope_type"] == "llama3" and self.kind in TURN_NEIGHBOURS
        ):
            raise _refused(f"the {self.name} of llama.cpp has no rotary embeddings of type {rope['rope_type']}")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise _refused(f"the {self.name} of llama.cpp turns whole heads, not a part of each")
        unlike = {key for key, value in YARN_DEFAULTS.items() if rope.get(key, value) != value}
        unlike |= {"attention_factor", "mscale", "mscale_all_dim"} & {key for key in rope if rope[key] is not None}
        if rope["rope_type"] == "yarn" and unlike:
            raise _refused(f"YaRN with {', '.join(sorted(unlike))} of its own has no place in GGUF")
        if self.kind == MODEL_ARCH.GEMMA3:
            self._check_gemma3()

    def _check_gemma3(self) -> None:
        config, width, layers = self.config, head_dim(self.config), self.config.num_hidden_layers
        scale = config.hidden_size / self.sizes[0].heads if layers == GEMMA3_27B_LAYERS else width
        kinds = ["sliding_attention" if (index + 1) % GEMMA3_PERIOD else "full_attention" for index in range(layers)]
        local = config.rope_parameters["sliding_attention"]
        faults = {
            f"attention scaled by {config.query_pre_attn_scalar}": config.query_pre_attn_scalar != scale,
            "another order of sliding and full attention": config.layer_types != kinds,
            "other rotary embeddings in the layers with windows": local["rope_type"] != "default"
            or local["rope_theta"] != GEMMA3_LOCAL_THETA,
            "attention to later tokens": config.use_bidirectional_attention,
            "capped logits": bool(config.attn_logit_softcapping or config.final_logit_softcapping),
        }
        if any(faults.values()):
            found = ", ".join(fault for fault, is_there in faults.items() if is_there)
            raise _refused(f"the model has {found}, which llama.cpp's {self.name} has not")


def neighbouring(rows: int, width: int) -> Tensor:
    """The order in which the rows of heads of `width` d are written for an engine that turns neighbours.

    Rotary embeddings turn the pair (x_i, x_{i + d/2}) by the angle of frequency i in transformers, (x_2i, x_2i+1) in
    the engine; a product of queries and keys does not depend on the order of rows that both have.
    """
    pairs = torch.arange(width).view(2, width // 2).T.flatten()
    return (torch.arange(0, rows, width)[:, None] + pairs).flatten()


def _refused(fault: str) -> UsageError:
    return UsageError(f"--gguf: {fault}")


def _sizes(shapes: Shapes, index: int, width: int) -> LayerSizes:
    """Sizes of the layer of that index, of heads of `width`, from the rows of its projections."""

    def rows(projection: str) -> int:
        name = f"model.layers.{index}.{projection}.weight"
        if not shapes.get(name, (0,))[0]:
            raise _refused(f"there is no {name}; llama.cpp does not run layers without attention or MLP")
        return shapes[name][0]

    return LayerSizes(rows("self_attn.q_proj") // width, rows("self_attn.k_proj") // width, rows("mlp.gate_proj"))


def _rope(config: PreTrainedConfig) -> dict:
    """Settings of the rotary embeddings, of those layers that attend to all tokens."""
    parameters = config.rope_parameters
    return parameters.get("full_attention", parameters)
