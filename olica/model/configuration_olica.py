"""Sizes of pruned decoder layers, and one configuration class per model family.

This file and `modeling_olica.py` are copied into every pruned checkpoint, so they import nothing of ours but each
other, and of the library only the family that is asked for: a checkpoint loads where others are missing. They load on
every transformers from 4.46 on; what differs between releases is in one block below. The scalars of the dense
configuration (`intermediate_size`, `head_dim`, ...) stay as they were: the Hugging Face constructor builds the dense
modules and `shrink_layer` narrows them to `layer_shapes`.
"""

from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache

from transformers import CONFIG_MAPPING, PretrainedConfig, __version__, cache_utils, modeling_rope_utils

# What differs between releases of transformers is asked for here, and told by what a release has, not by its number.
# Configurations are dataclasses, checked strictly; before, plain classes that keep every setting they do not know.
STRICT = is_dataclass(PretrainedConfig)
# `rope_parameters` and `dtype` are what `rope_theta`, `rope_scaling` and `torch_dtype` were.
HAS_ROPE_PARAMETERS = hasattr(modeling_rope_utils, "RopeParameters")
# Attention takes the number of heads from what its projections give, and a cache that from what it is given; before,
# both took it from the configuration, so that removed heads have to be there, as zeros.
TAKES_ANY_HEADS = hasattr(cache_utils, "DynamicSlidingWindowLayer")
if STRICT:
    from huggingface_hub.dataclasses import strict

    settings_class = dataclass(kw_only=True)
else:

    def strict(cls: type) -> type:  # type: ignore[no-redef]
        """A plain class as it is."""
        return cls

    settings_class = strict

# model_type of a dense model -> what the names of its classes here have between `Olica` and `Config`, `Model`, ...
FAMILY_NAMES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "olmo2": "Olmo2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
}
PREFIX = "olica_"  # of the model_type of a pruned model
# Version of what `config.json` and the names of the weights mean. 1: `correction_rank` was `calibration_rank`.
FORMAT = 2
RENAMED = {"calibration_rank": "correction_rank"}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one pruned decoder layer; a rank of 0 means that there are no factors.

    Attributes:
        q_rank: inner width of the factors of `q_proj`, 0 where it stays one matrix.
        k_rank: the same for `k_proj`.
        v_head_dim: width that each value head keeps, at most `head_dim`.
        intermediate_size: channels that the MLP keeps.
        correction_rank: inner width of the linear correction beside the MLP, 0 where there is none.
        v_rank: inner width of the factors of `v_proj`, 0 where it stays one matrix.
        o_rank: the same for `o_proj`.
        kv_heads: key/value heads that stay, each with all of its query heads; 0: all.
        o_bias: whether `o_proj` gets a bias that the dense one may lack; one that the dense one has stays anyway.
        down_bias: the same for `down_proj`.
    """

    q_rank: int
    k_rank: int
    v_head_dim: int
    intermediate_size: int
    correction_rank: int = 0
    v_rank: int = 0
    o_rank: int = 0
    kv_heads: int = 0
    o_bias: bool = False
    down_bias: bool = False

    def to_dict(self) -> dict[str, int | bool]:
        """The sizes as a plain dictionary, the form in which `config.json` holds them."""
        return asdict(self)


def head_dim(config) -> int:
    """Width of a query head, for configurations that leave it to `hidden_size / num_attention_heads`."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def norm_spans_heads(config) -> bool:
    """Whether one norm runs over all query heads, and one over all key heads, of a dense or pruned model.

    No query or key head can go there without changing the others: `q_proj` and `k_proj` keep all of them.
    """
    return config.model_type.removeprefix(PREFIX) == "olmo2"


def attends_with_all_heads(config) -> bool:
    """Whether the attention of a dense or pruned model computes and caches all heads, whatever a layer keeps.

    Besides the families of `norm_spans_heads` it is Phi-3, which cuts a fused projection at fixed places, and every
    family where `TAKES_ANY_HEADS` is false.
    """
    return not TAKES_ANY_HEADS or norm_spans_heads(config) or config.model_type.removeprefix(PREFIX) == "phi3"


def check_layer_shapes(config) -> None:
    """Raise ValueError unless `config.layer_shapes` fits the dense sizes of `config`.

    So a checkpoint edited by hand, or cut short, is refused for what is wrong, not for the size of some tensor.
    """
    shapes = config.layer_shapes
    if shapes is None:
        return
    if len(shapes) != config.num_hidden_layers:
        raise ValueError(f"layer_shapes has {len(shapes)} rows for {config.num_hidden_layers} layers")
    types = {field.name: field.type for field in fields(LayerShape)}
    required = {field.name for field in fields(LayerShape) if field.default is MISSING}
    limits = {
        "v_head_dim": (1, head_dim(config)),
        "intermediate_size": (1, config.intermediate_size),
        "kv_heads": (0, config.num_key_value_heads),
    }
    for index, shape in enumerate(shapes):
        if not required <= shape.keys() <= types.keys():
            raise ValueError(f"layer_shapes[{index}] has the keys {sorted(shape)}, not {sorted(types)}")
        for name, size in shape.items():
            smallest, largest = limits.get(name, (0, size))
            if type(size) is not types[name] or not smallest <= size <= largest:
                raise ValueError(f"layer_shapes[{index}]: {name} = {size} does not fit this model")


def former_names(settings: dict) -> dict:
    """The dtype and the rotary embeddings of a configuration by the names of old releases, for its `config.json`.

    An old release, or an engine that reads the file itself, would otherwise take the family's default theta, and be
    silent. Nothing of rotary embeddings without `rope_parameters`.
    """
    found = {"torch_dtype": settings["dtype"]} if settings.get("dtype") else {}
    rope = settings.get("rope_parameters") or {}
    whole = rope.get("full_attention", rope)  # Gemma 3 has others for the layers with windows
    if "rope_theta" in whole:
        kind = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
        if kind.get("rope_type") == "longrope":  # Phi-3 refused any other name
            kind = {"type": "longrope", "short_factor": kind["short_factor"], "long_factor": kind["long_factor"]}
        is_scaled = kind.get("rope_type") != "default"
        found |= {"rope_theta": whole["rope_theta"], "rope_scaling": kind if is_scaled else None}
        if "partial_rotary_factor" in whole:
            found["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if "sliding_attention" in rope:
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        kinds = settings["layer_types"]
        if "full_attention" in kinds:
            found["sliding_window_pattern"] = kinds.index("full_attention") + 1
    return found


class BothNames:
    """Of a configuration that every release reads: the file has new and former names, an object those of its release.

    So nothing is said twice in memory, and whichever release saves a checkpoint again, the newest reads it.
    """

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Of a file, take the names that this release knows."""
        former = former_names(config_dict)
        others = former if HAS_ROPE_PARAMETERS else ("dtype", "rope_parameters")
        known = {name: value for name, value in config_dict.items() if name not in others}
        return super().from_dict(known if HAS_ROPE_PARAMETERS else known | former, **kwargs)

    def to_diff_dict(self):
        """What the file says: the settings by new and former names.

        Not `to_dict`: the library asks the object for each of its names, and warns of those that are deprecated.
        """
        return super().to_diff_dict() | (former_names(self.to_dict()) if HAS_ROPE_PARAMETERS else {})


@settings_class
class PrunedConfig(BothNames):
    """What every family's configuration gains: the sizes of each decoder layer, one row per layer (None: all dense)."""

    layer_shapes: list[dict[str, int | bool]] | None = None
    olica_format: int = FORMAT

    # Sharding a zero-padded value projection over devices by the dense model's plan would cut heads apart.
    base_model_tp_plan = None

    def __post_init__(self, **kwargs):
        """Give the sizes that an old checkpoint names otherwise the names of today."""
        if self.layer_shapes is not None:
            self.layer_shapes = [
                {RENAMED.get(name, name): size for name, size in shape.items()} for shape in self.layer_shapes
            ]
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of the strict validation: the format, the dense sizes, then the sizes of every layer."""
        if self.olica_format > FORMAT:
            raise ValueError(
                f"olica_format is {self.olica_format}, of which this olica reads {FORMAT} at most: update olica"
            )
        super().validate_architecture()
        check_layer_shapes(self)


@cache
def config_class(model_type: str) -> type:
    """The configuration class `Olica...Config` of the pruned models of a family, made when it is first asked for.

    Raises:
        ImportError: the installed transformers lacks the family.
    """
    if model_type not in CONFIG_MAPPING:
        raise ImportError(f"transformers {__version__} has no models of the type {model_type}: update transformers")
    family = FAMILY_NAMES[model_type]
    name = f"Olica{family}Config"
    members = dict(
        __module__=__name__, __qualname__=name, __doc__=f"A pruned {family}.", model_type=f"{PREFIX}{model_type}"
    )
    return strict(type(name, (PrunedConfig, CONFIG_MAPPING[model_type]), members))


def __getattr__(name: str) -> type:
    """The configuration classes by their names, for importing and unpickling them."""
    for model_type, family in FAMILY_NAMES.items():
        if name == f"Olica{family}Config":
            return config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
