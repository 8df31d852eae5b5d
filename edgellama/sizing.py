"""How many positions and sequences the KV cache gets: what the model can, cut to what memory allows.

The cache's memory is reserved at once and becomes resident as it is written, slot by slot; what is promised here would
fit even with every slot full. And what a model takes, from its config alone. Knows numbers of bytes only.
"""

from edgellama.config import LlamaConfig
from edgellama.errors import ContextError
from edgellama.format import LAYOUTS, model_tensors
from edgellama.format.container import TENSOR_ALIGNMENT, align
from edgellama.kv_cache import bytes_per_position

DEFAULT_SLOTS = 8
_MIN_CTX = 512  # a context worth having: not cut below it however little memory there seems to be
_SLACK_BYTES = 256 << 20  # left for Python, NumPy and activations


def kv_bytes_per_token(config: LlamaConfig, kv_cache: str = "float16") -> int:
    """Bytes of KV cache that one position takes; "float32" is the reference's."""
    if kv_cache == "float32":
        return bytes_per_position(config) * 2
    return bytes_per_position(config, "int8" if kv_cache == "int8" else "float16")


def layer_weights(config: LlamaConfig) -> int:
    """Weights of all layers' matrices: with the output's, what every token is multiplied with."""
    heads = config.num_attention_heads + config.num_key_value_heads
    layer = config.hidden_size * (2 * heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_hidden_layers * layer


def weight_bytes(config: LlamaConfig, lm_head_bits: int = 8) -> int:
    """Bytes of a model's tensors in a file; header, tokenizer and receipt come on top, some MB at most."""
    end = 0
    for spec in model_tensors(config, lm_head_bits):
        end = align(end, TENSOR_ALIGNMENT) + LAYOUTS[spec.layout].nbytes(spec.shape)
    return align(end, TENSOR_ALIGNMENT)


def memory_bytes(config: LlamaConfig, n_ctx: int, lm_head_bits: int = 8, kv_cache: str = "float16") -> int:
    """Memory that running one sequence of `n_ctx` tokens takes: the mapped file, its cache, and what Python needs."""
    return weight_bytes(config, lm_head_bits) + n_ctx * kv_bytes_per_token(config, kv_cache) + _SLACK_BYTES


def choose_n_ctx(
    config: LlamaConfig,
    asked: int | None,
    weight_bytes: int,
    free_bytes: int | None,
    kv_cache: str = "float16",
    n_slots: int = 1,
) -> tuple[int, list[str]]:
    """The number of positions to keep for each of `n_slots` sequences, and what the user should know about it.

    `free_bytes` None: unknown, no cut. An explicit `asked` is obeyed, or refused with ContextError where it
    cannot fit at all.
    """
    limit = config.max_position_embeddings
    per_token = kv_bytes_per_token(config, kv_cache) * n_slots
    each = f" for each of {n_slots} sequences" if n_slots > 1 else ""
    fits = None
    if free_bytes is not None:
        fits = max(_MIN_CTX, _for_cache(weight_bytes, free_bytes) // per_token)
    if asked is not None:
        if free_bytes is not None and asked * per_token > free_bytes and asked > _MIN_CTX:
            raise ContextError(
                f"n_ctx {asked}{each} needs {asked * per_token / 1e9:.1f} GB of KV cache, "
                f"{free_bytes / 1e9:.1f} GB of memory are free; about {min(limit, fits or limit)} fit"
            )
        if asked > limit:
            return asked, [f"context {asked} is beyond the model's {limit} positions; the end of it may be poor"]
        return asked, []
    if fits is not None and fits < limit:
        fits = fits // 256 * 256
        return fits, [f"context cut from the model's {limit} to {fits} tokens{each}, which is what memory allows"]
    return limit, []


def choose_n_slots(
    config: LlamaConfig, n_ctx: int, weight_bytes: int, free_bytes: int | None, kv_cache: str = "float16"
) -> int:
    """How many sequences of `n_ctx` positions to keep: `DEFAULT_SLOTS`, or as many as fit into memory, at least one."""
    if free_bytes is None:
        return 1
    fits = _for_cache(weight_bytes, free_bytes) // (kv_bytes_per_token(config, kv_cache) * n_ctx)
    return min(DEFAULT_SLOTS, max(1, fits))


def _for_cache(weight_bytes: int, free_bytes: int) -> int:
    """Three quarters of what is left beside the weights: the user's other programs live here too."""
    return (free_bytes - weight_bytes - _SLACK_BYTES) * 3 // 4
