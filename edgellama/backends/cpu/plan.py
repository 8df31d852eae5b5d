"""The tables that the compiled program reads: where the weights, the cache and the work buffers are.

Records of int64 addresses and sizes, made once when a model is loaded. A `plan` holds what is fixed and
the few fields that change with each call. Nothing is computed here.
"""

from __future__ import annotations

import math

import numpy as np

from ...config import LlamaConfig
from ...format import ModelFile
from ...kv_cache import KVCache, aligned_zeros
from ...quant import padded_shape, round_up
from . import native, shapes
from .shapes import BY_TOKEN, FEW, LINE, MANY, ONE, SIZES


def _record(**fields):
    return np.dtype([(name, kind or np.int64) for name, kind in fields.items()], align=True)


def _int64s(names: str):
    return {name: None for name in names.split()}


# A matrix: addresses (bias 0: none), and its size in row blocks, groups and inputs (see `tiles`); bits 4, 8, 16 (or 0:
# see embed); `ceiling` of what it is multiplied with (see `vector_ops.pack_row`).
MATRIX = _record(
    **_int64s("bits weights scales bias blocks groups inputs kernel_one kernel_few kernel_many"), ceiling=np.float32
)
_LAYER_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LAYER = _record(
    **_int64s("input_norm post_norm keys values key_scales value_scales"), **{name: MATRIX for name in _LAYER_MATRICES}
)
# Activations made ready for a matrix: see `matmul`. Pack i < n_threads: thread i's own, for one token; the last two are
# everybody's, in tiles for a few tokens and for many.
PACK = _record(**_int64s("size tile by_token codes masks highs scales sums values"))
PLAN = _record(
    **_int64s("hidden_size intermediate_size n_layers n_heads n_kv_heads head_dim activation n_threads"),
    **_int64s("kv_bytes value_stride key_head_bytes value_head_bytes key_slot_bytes value_slot_bytes"),
    **_int64s("scale_head_bytes scale_slot_bytes"),
    **_int64s(" ".join(shapes.ATTENTION_KERNELS)),
    **_int64s("x x_stride qkv qkv_stride k_column v_column attention attention_stride mlp mlp_stride"),
    **_int64s("scratch scratch_stride normed up lengths queries states split_states pass_scratch control final_norm"),
    **_int64s("piece_tokens few_states splits_done"),
    **_int64s("n_tokens n_embedded tokens positions slots n_rows rows cos sin logits logits_stride hidden_out"),
    embed=MATRIX,
    head=MATRIX,
    eps=np.float32,
    query_scale=np.float32,
)

# Lines of the control buffer, then a counter for each piece of shared work, of a call, then twice those of a layer: a
# line for each thread, of which work that is not a matrix uses the first.
BARRIER, CANCEL, DECISION, COUNTERS = 0, 2, 3, 4
WORK_PER_CALL = 3
WORK_PER_LAYER = 10

UP_CELLS = 128
"""Row blocks x tokens of gate and up that a thread computes before it multiplies them, if they are few: they stay in
cache."""
UP_BLOCKS = 4
"""The row blocks of gate and up where the tokens are many."""

_ACTIVATIONS = {
    "silu": shapes.SILU,
    "gelu": shapes.GELU,
    "gelu_pytorch_tanh": shapes.GELU_TANH,
    "relu": shapes.RELU,
}
_BITS = {"int4.g128": 4, "int8.g128": 8, "f16.r16": 16, "f16": shapes.ROW_MAJOR_F16}


def _tile_kernels(bits: int) -> tuple[str, str, str]:
    """Names of the kernels for one token, a few and many."""
    one, few, many = shapes.TILE_KERNELS[bits]
    return one, many if SIZES[FEW] == SIZES[MANY] else few, many


class Plan:
    """Builds the records for one open model and owns every buffer behind their addresses."""

    def __init__(self, file: ModelFile, cache: KVCache, n_threads: int, max_tokens: int, ceilings: dict[str, float]):
        """`ceilings`: of the activations that go into q (k, v), o, gate (up), down and head."""
        config = file.config
        self._file, self._cache = file, cache
        self._owned: list[np.ndarray] = []
        self._ceilings = {**ceilings, "k": ceilings["q"], "v": ceilings["q"], "up": ceilings["gate"]}
        self.tile_tokens = max(SIZES)
        self.max_tokens = round_up(max_tokens, self.tile_tokens)
        self.layers = np.zeros(config.num_hidden_layers, LAYER)
        self.packs = np.zeros(n_threads + 2, PACK)
        self.record = np.zeros(1, PLAN)
        self._fill_sizes(config, cache, n_threads)
        self._fill_weights(config, cache)
        self._fill_buffers(config, cache, n_threads)

    def zeros(self, nbytes: int) -> int:
        """The address of a new zeroed buffer that lives as long as the plan."""
        self._owned.append(aligned_zeros(max(nbytes, 64)))
        return self._owned[-1].ctypes.data

    def rows(self, name: str) -> np.ndarray:
        """A work buffer as float32 [tokens, stride]: "x", "qkv", "attention" or "mlp"; a view."""
        address, stride = int(self.record[0][name]), int(self.record[0][f"{name}_stride"])
        buffer = next(each for each in self._owned if each.ctypes.data == address)
        return buffer.view(np.float32).reshape(-1, stride // 4)

    def _fill_sizes(self, config: LlamaConfig, cache: KVCache, n_threads: int) -> None:
        p = self.record[0]
        p["hidden_size"], p["intermediate_size"] = config.hidden_size, config.intermediate_size
        p["n_layers"], p["n_heads"] = config.num_hidden_layers, config.num_attention_heads
        p["n_kv_heads"], p["head_dim"] = config.num_key_value_heads, config.head_dim
        p["activation"], p["n_threads"] = _ACTIVATIONS[config.hidden_act], n_threads
        p["eps"], p["query_scale"] = config.rms_norm_eps, config.head_dim**-0.5 * math.log2(math.e)
        p["kv_bytes"], p["value_stride"] = cache.element_bytes, cache.value_stride
        p["scale_head_bytes"], p["scale_slot_bytes"] = cache.scale_head_bytes, cache.scale_slot_bytes
        p["key_head_bytes"], p["value_head_bytes"] = cache.key_head_bytes, cache.value_head_bytes
        p["key_slot_bytes"], p["value_slot_bytes"] = cache.key_slot_bytes, cache.value_slot_bytes

    def _matrix(self, name: str, ceiling: float) -> tuple[float, ...]:
        """A MATRIX record for a tensor by its name without suffix."""
        file = self._file
        quantized = f"{name}.qweight" in file.tensors
        entry = file.tensors[f"{name}.qweight" if quantized else f"{name}.weight"]
        n, k = padded_shape(*entry.shape)
        scales = file.address(f"{name}.scales") if quantized else 0
        bias = self._vector(f"{name}.bias", n) if f"{name}.bias" in file.tensors else 0
        inputs = round_up(entry.shape[1], shapes.STEP)
        return _BITS[entry.layout], file.address(entry.name), scales, bias, n // 16, k // 128, inputs, 0, 0, 0, ceiling

    def _matrices(self) -> list[np.ndarray]:
        """MATRIX records of all layers by kind, and of the head; views."""
        return [self.layers[name] for name in _LAYER_MATRICES] + [self.record["head"]]

    def kernels(self) -> list[str]:
        """Names of the kernels that the program calls by address."""
        kinds = {int(bits) for records in self._matrices() for bits in records["bits"]}
        return [*shapes.ATTENTION_KERNELS.values(), *(name for bits in sorted(kinds) for name in _tile_kernels(bits))]

    def link(self) -> None:
        """Put the addresses of tile and attention kernels into the records; compiles those that are needed."""
        for field, name in shapes.ATTENTION_KERNELS.items():
            self.record[field] = native.address(name)
        for records in self._matrices():
            for record in records:
                one, few, many = map(native.address, _tile_kernels(int(record["bits"])))
                record["kernel_one"], record["kernel_few"], record["kernel_many"] = one, few, many

    def _vector(self, name: str, length: int) -> int:
        """The address of a float32 vector of the file, copied and padded with zeros to `length`."""
        values = self._file.array(name)
        address = self.zeros(4 * length)
        self._owned[-1].view(np.float32)[: values.size] = values
        return address

    def _fill_weights(self, config: LlamaConfig, cache: KVCache) -> None:
        width = round_up(config.hidden_size, 128)
        p = self.record[0]
        p["embed"] = self._matrix("model.embed_tokens", self._ceilings["head"])
        p["head"] = p["embed"] if config.tie_word_embeddings else self._matrix(config.head, self._ceilings["head"])
        p["final_norm"] = self._vector("model.norm.weight", width)
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}"
            layer["input_norm"] = self._vector(f"{prefix}.input_layernorm.weight", width)
            layer["post_norm"] = self._vector(f"{prefix}.post_attention_layernorm.weight", width)
            for name in "qkvo":
                layer[name] = self._matrix(f"{prefix}.self_attn.{name}_proj", self._ceilings[name])
            for name in ("gate", "up", "down"):
                layer[name] = self._matrix(f"{prefix}.mlp.{name}_proj", self._ceilings[name])
            layer["keys"], layer["values"], layer["key_scales"], layer["value_scales"] = cache.addresses(i)

    def _fill_buffers(self, config: LlamaConfig, cache: KVCache, n_threads: int) -> None:
        """Work buffers: rows are float32 and padded to whole groups; tokens to whole tiles."""
        p, tokens = self.record[0], self.max_tokens
        hidden = round_up(config.hidden_size, 128)
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        attention_width, mlp_width = round_up(heads, 128), round_up(config.intermediate_size, 128)
        widest = max(hidden, attention_width, mlp_width)

        p["k_column"], p["v_column"] = 4 * round_up(heads, 16), 4 * (round_up(heads, 16) + round_up(kv, 16))
        p["x_stride"], p["attention_stride"], p["mlp_stride"] = 4 * hidden, 4 * attention_width, 4 * mlp_width
        p["qkv_stride"] = int(p["v_column"]) + 4 * round_up(kv, 16)
        for name in ("x", "qkv", "attention", "mlp"):
            p[name] = self.zeros(tokens * int(p[f"{name}_stride"]))

        # Each thread's scratch: a normalized row, a tile of `up`, and attention's.
        p["normed"] = 0
        p["up"] = int(p["normed"]) + 4 * hidden
        end = int(p["up"]) + 64 * max(UP_CELLS, UP_BLOCKS * tokens)
        shared = config.num_attention_heads // config.num_key_value_heads
        for name, nbytes in shapes.scratch_parts(shared, config.head_dim, cache.value_stride).items():
            p[name] = end = round_up(end, LINE)
            end += nbytes
        p["scratch_stride"] = round_up(end, LINE)
        p["scratch"] = self.zeros(n_threads * int(p["scratch_stride"]))
        p["piece_tokens"] = shapes.piece_tokens(shared)
        few_states = shapes.few_states_bytes(config.num_key_value_heads, shared, cache.n_ctx, cache.value_stride)
        p["few_states"] = self.zeros(few_states)
        p["splits_done"] = self.zeros(8 * shapes.FEW_TOKENS * config.num_key_value_heads)

        head_is_f16 = int(p["head"]["bits"]) == 16
        # Packs of both sizes of tile are never in use at once: they share the buffers.
        groups = widest // 128
        for i in range(n_threads + 2):
            size = max(ONE, i - n_threads + FEW)
            if size != MANY:
                n = 1 if size == ONE else tokens
                codes, masks, highs = self.zeros(n * widest), self.zeros(8 * n * groups), self.zeros(n * widest)
                scales, sums = self.zeros(4 * n * groups), self.zeros(4 * n * groups)
                values = self.zeros(4 * n * hidden) if head_is_f16 else 0
            self.packs[i] = size, SIZES[size], BY_TOKEN[size], codes, masks, highs, scales, sums, values

        p["control"] = self.zeros((COUNTERS + (WORK_PER_CALL + 2 * WORK_PER_LAYER) * n_threads) * LINE)
        self.control = self._owned[-1].view(np.int64)
