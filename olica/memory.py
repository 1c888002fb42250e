"""x"""
from .allocation import Sizes
from .options import PruningOptions

INTERPRETER_BYTES = 700_000_000
def expected_memory(
    config, total: int, options: PruningOptions, ids_shape: tuple[int, int], itemsize: int
) -> dict[str, int | None]:
    """Rough peak memory in bytes of pruning a model of `total` parameters, from its sizes alone.

    The host holds the model, the device one layer, its sums, a batch of activations and the float64 work of a solve.
    """
    samples, seqlen = ids_shape
    hidden, channels = config.hidden_size, config.intermediate_size
    sizes = Sizes.of(config, total)
    layer = sizes.layer * itemsize
    sums = 4 * (2 * hidden**2 + (channels**2 + hidden * channels if options.mlp_num else 0))
    tokens = min(options.batch_size.size, samples) * seqlen
    activations = tokens * (8 * hidden + 4 * channels) * 4
    solve = 8 * (6 * hidden**2 + 2 * hidden * channels)
    states = samples * seqlen * hidden * itemsize
    working = 2 * layer + sums + max(activations, solve)
    on_gpu = options.device.type == "cuda"
    on_host = options.cache_device.type == "cpu"
    host = INTERPRETER_BYTES + total * itemsize + (states if on_host else 0) + (0 if on_gpu else working)
    device = working + (0 if on_host else states)
    return {"host_bytes": host, "device_bytes": device if on_gpu else None}


