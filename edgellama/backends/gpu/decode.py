"""A decode step of a few tokens as fused Triton kernels over static buffers: five launches a layer for one token.

    embed | qkv, attend(, merge), project (o), gate_up, project (down)  for each layer | head_logits | choose

Several tokens put a `gemm` before each of the multiplying kernels. Everything a step needs lies at a fixed address, so
a step can be captured in a CUDA graph (`graph.py`); `launch` runs it as it is, on the CPU under TRITON_INTERPRET=1 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...config import LlamaConfig
from ...quant import round_up
from . import attention_kernels, kernels
from .cache import Cache
from .selection import choose
from .weights import Matrix, Weights

MAX_TOKENS = 64
"""Tokens of a step; a longer batch is a prefill."""
SHORT = 128
"""Sequences up to this long are attended to in one split: no merging."""
MANY_LINES, FEW_LINES = 64, 128
"""Lines (8 inputs each) that a program multiplies at once, where many programs share a matrix, and where few do."""
_ROWS = 64
"""Rows of a program of `gemm`."""
_PARTIAL_SPLITS = 8

OPTIONS = {"enable_fp_fusion": True}
"""For every kernel: a product and a sum are one instruction. Triton's default, until 3.10."""

Launches = list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Joined:
    """Matrices with the same input that lie side by side in the file, as one: `rows[i]`, where the i-th one starts.

    `scale_gaps[i]`, `biases[i]`: elements from where its scales would start without a gap, and from the first bias.
    """

    parts: tuple[Matrix, ...]
    rows: tuple[int, ...]
    scale_gaps: tuple[int, ...]
    biases: tuple[int, ...]
    n_rows: int

    @classmethod
    def of(cls, *parts: Matrix) -> Joined:
        first = parts[0]
        rows, gaps, biases, at = [], [], [], 0
        for part in parts:
            apart = first.codes[:1].nbytes // 16 * at  # bytes: a row of codes has the same everywhere
            assert part.bits == first.bits, "a unit's own rule"
            assert part.codes.data_ptr() - first.codes.data_ptr() == apart, "the file's own order"
            rows.append(at)
            gap = 0
            if part.scales is not None and first.scales is not None:
                gap = (part.scales.data_ptr() - first.scales.data_ptr()) // 2 - at * part.groups
            gaps.append(gap)
            biases.append(0 if part.bias is None else (part.bias.data_ptr() - first.bias.data_ptr()) // 4)  # type: ignore[union-attr]
            at += part.blocks * 16
        return cls(parts, tuple(rows), tuple(gaps), tuple(biases), at)

    @property
    def groups(self) -> int:
        return self.parts[0].groups

    @property
    def bits(self) -> int:
        return self.parts[0].bits


@dataclass(frozen=True)
class Layer:
    qkv: Joined
    o: Joined
    gate_up: Joined
    down: Joined
    input_norm: torch.Tensor
    post_norm: torch.Tensor


class Decoder:
    """Static buffers for `max_tokens` tokens, and the launches of a step over them.

    Inputs: `inputs`, int32 [3, max_tokens]: `tokens`, `positions` and `slots`; cos and sin come from `table` by
    position, or, where they depend on a sequence's length (`by_position` False), from its first rows by token. Outputs:
    `logits` (float32 [max_tokens, vocab_size]), `chosen` (int32 [max_tokens], -1 where logits are not finite).
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        cache: Cache,
        max_tokens: int,
        table: tuple[torch.Tensor, torch.Tensor],
        by_position: bool,
        processors: int,
    ):
        """`table`: cosines and sines, float32 [rows, head_dim / 2]; `processors`: the GPU's multiprocessors."""
        self.config, self.max_tokens, self.by_position = config, max_tokens, by_position
        self.cos, self.sin = table
        self._weights, self._cache, self._processors = weights, cache, processors
        self._n_ctx = cache.keys.shape[3]
        self._dot = tl.bfloat16 if weights.dtype == torch.bfloat16 else tl.float16
        self._attention_dot = tl.bfloat16 if cache.kind == "bfloat16" else tl.float16
        self._final_norm = weights.vector("model.norm.weight")
        self._head = Joined.of(weights.head)
        self._layers = [_layer(weights, i) for i in range(config.num_hidden_layers)]
        per_head = config.num_key_value_heads
        self._splits = max(2, min(32, -(-2 * processors // per_head)))
        self._allocate(config, weights.device)

    def _allocate(self, config: LlamaConfig, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        tokens, heads = self.max_tokens, config.num_attention_heads
        self._blocks = -(-config.hidden_size // 16)
        self.inputs = zeros(3, tokens, dtype=torch.int32)
        self.tokens, self.positions, self.slots = self.inputs.unbind(0)
        self.choices = zeros(tokens, 5, dtype=torch.float64)
        self.chosen = zeros(tokens, dtype=torch.int32)
        self.logits = zeros(tokens, config.n_outputs)
        self._residual = zeros(tokens, config.hidden_size)
        # Transposed activations: what pads their inputs stays zero.
        self._normed = zeros(tokens, round_up(config.hidden_size, 128))
        self._attended = zeros(tokens, round_up(heads * config.head_dim, 128))
        self._inner = zeros(tokens, round_up(config.intermediate_size, 128))
        self._squares = zeros(tokens, self._blocks)
        self._queries = zeros(tokens, heads, config.head_dim)
        self._states = zeros(tokens, heads, self._splits, config.head_dim + 2)
        first = self._layers[0]
        widest = max(each.n_rows for each in (first.qkv, first.o, first.gate_up, first.down))
        self._partials = zeros(_PARTIAL_SPLITS * tokens * widest if tokens > 1 else 0)
        self._head_partials = zeros(tokens * self._head.n_rows if tokens > 1 else 0)

    def attention_splits(self, longest: int) -> int:
        """Splits for sequences of up to `longest` positions; a graph is good for one number of them."""
        return 1 if longest <= SHORT else self._splits

    def step(self, n_tokens: int, splits: int) -> Launches:
        """The kernels of a step in order: (kernel, grid, arguments, constants)."""
        config, m = self.config, n_tokens
        launches: Launches = [self._embed(m)]
        for i, layer in enumerate(self._layers):
            launches += self._qkv(i, layer, m)
            launches += self._attend(i, m, splits)
            launches += self._project(layer.o, self._attended, layer.post_norm, m)
            launches += self._gate_up(layer, m)
            last = i == config.num_hidden_layers - 1
            next_norm = self._final_norm if last else self._layers[i + 1].input_norm
            launches += self._project(layer.down, self._inner, next_norm, m)
        return launches + self._logits(m)

    def select(self, n_tokens: int, greedy: bool) -> None:
        """Choose a token from each row of logits, and make it the next step's input at the next position."""
        logits = self.logits[:n_tokens]
        ids = choose(logits, None if greedy else self.choices[:n_tokens])
        self.chosen[:n_tokens].copy_(ids)
        self.tokens[:n_tokens].copy_(ids.clamp(min=0))
        self.positions[:n_tokens].add_(1).clamp_(max=self._n_ctx - 1)  # a step beyond the end is nobody's, but in range

    # -- launches -----------------------------------------------------------------------------------------------------

    def _embed(self, m: int):
        weights, table = self._weights, self._weights.embedding
        head = weights.head
        scales, bits = (None, 0) if table is not None else (head.scales, head.bits)
        source = table if table is not None else _words(head)
        first = self._layers[0].input_norm
        arguments = (
            self.tokens, source, source if scales is None else scales, first, self._residual, self._normed,
            self._squares, self.config.hidden_size, self._normed.shape[1] // 128, self._blocks,
        )  # fmt: skip
        return kernels.embed, (self._blocks, m), arguments, {"BITS": bits, "num_warps": 1}

    def _multiplied(self, joined: Joined, x: torch.Tensor, m: int, norm: bool) -> tuple[Launches, torch.Tensor, int]:
        """What goes before a kernel that multiplies `x` by a matrix: its partial sums and their number (0: none)."""
        head = joined is self._head
        partials = self._head_partials if head else self._partials
        if m == 1:
            return [], partials, 0
        matrix, groups = joined.parts[0], joined.groups
        programs = -(-joined.n_rows // _ROWS)
        splits = 1 if head else max(1, min(_PARTIAL_SPLITS, groups, 3 * self._processors // programs))
        groups_a_split = -(-groups // splits)
        splits = -(-groups // groups_a_split)
        far = 1 << 30
        second, third = (joined.rows[i] if len(joined.rows) > i else far for i in (1, 2))
        gap2, gap3 = (joined.scale_gaps[i] if len(joined.rows) > i else 0 for i in (1, 2))
        arguments = (
            _words(matrix), _scales(matrix), x, self._squares, partials,
            groups, groups_a_split, joined.n_rows, m, second, third, gap2, gap3, self._blocks, self.config.hidden_size,
            self.config.rms_norm_eps,
        )  # fmt: skip
        constants = {
            "BITS": matrix.bits, "TOKENS": max(16, _power(m)), "ROWS": _ROWS, "BLOCKS": _power(self._blocks),
            "NORM": norm, "DOT": self._dot, "num_warps": 4,
        }  # fmt: skip
        return [(kernels.gemm, (programs, splits), arguments, constants)], partials, splits

    def _tile(self, groups: int, programs: int) -> dict[str, int]:
        """Lines and warps of a program that multiplies, fewer programs being larger ones.

        A warp for 16 lines: with fewer lines than threads Triton loads activations straight to where they are needed;
        with as many it sends them through shared memory, two barriers each.
        """
        lines = MANY_LINES if programs >= 4 * self._processors else FEW_LINES
        lines = min(lines, _power(16 * groups))
        return {"LINES": lines, "EVEN": 16 * groups % lines == 0, "num_warps": lines // 16}

    def _qkv(self, i: int, layer: Layer, m: int) -> Launches:
        config, joined, cache = self.config, layer.qkv, self._cache
        before, partials, splits = self._multiplied(joined, self._normed, m, norm=True)
        half, int8 = config.head_dim // 2, cache.kind == "int8"
        pairs = _power(half) if int8 or half < 16 else 16
        tiles = -(-half // pairs)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        log2e = 1.4426950408889634
        arguments = (
            _words(joined.parts[0]), _scales(joined.parts[0]), _bias(joined), self._normed, partials, self._squares,
            self.positions, self.slots, self.cos, self.sin, self._queries,
            cache.keys[i], cache.values[i], cache.key_scales[i], cache.value_scales[i],
            joined.groups, joined.n_rows, m, joined.rows[1], joined.rows[2], joined.scale_gaps[1], joined.scale_gaps[2],
            joined.biases[1], joined.biases[2], self._blocks, config.hidden_size, self._n_ctx,
            config.head_dim**-0.5 * log2e, config.rms_norm_eps,
        )  # fmt: skip
        lines = max(16, min(MANY_LINES * 16 // pairs, _power(16 * joined.groups)))
        constants = {
            "BITS": joined.bits, "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": config.head_dim, "PAIRS": pairs,
            "LINES": lines, "EVEN": 16 * joined.groups % lines == 0, "BLOCKS": _power(self._blocks), "SPLITS": splits,
            "HAS_BIAS": joined.parts[0].bias is not None, "BY_POSITION": self.by_position, "INT8": int8,
            "num_warps": max(1, lines * pairs // 256),
        }  # fmt: skip
        return [*before, (kernels.qkv, ((heads + 2 * kv_heads) * tiles, m), arguments, constants)]

    def _attend(self, i: int, m: int, splits: int) -> Launches:
        config, cache = self.config, self._cache
        kv_heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        width, out_lines = max(16, _power(config.head_dim)), self._attended.shape[1] // 8
        arguments = (
            self._queries, cache.keys[i], cache.values[i], cache.key_scales[i], cache.value_scales[i],
            self.positions, self.slots, self._attended, self._states, self._n_ctx, out_lines,
        )  # fmt: skip
        constants = {
            "KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": config.head_dim, "QUERIES": max(16, _power(group)),
            "WIDTH": width, "BLOCK": 64 if width <= 128 else 32, "SPLITS": splits, "INT8": cache.kind == "int8",
            "DOT": self._attention_dot, "num_warps": 4,
        }  # fmt: skip
        launches: Launches = [(attention_kernels.attend, (kv_heads, m, splits), arguments, constants)]
        if splits > 1:
            heads = config.num_attention_heads
            constants = {
                "HEADS": heads, "HEAD_DIM": config.head_dim, "WIDTH": width, "SPLITS": splits,
                "SPLITS_UP": _power(splits), "num_warps": 4,
            }  # fmt: skip
            launches.append((attention_kernels.merge, (heads, m), (self._states, self._attended, out_lines), constants))
        return launches

    def _project(self, joined: Joined, x: torch.Tensor, next_norm: torch.Tensor, m: int) -> Launches:
        before, partials, splits = self._multiplied(joined, x, m, norm=False)
        arguments = (
            _words(joined.parts[0]), _scales(joined.parts[0]), _bias(joined), x, partials, next_norm, self._residual,
            self._normed, self._squares, joined.groups, joined.n_rows, m, self._blocks, self.config.hidden_size,
            self._normed.shape[1] // 8,
        )  # fmt: skip
        constants = {"BITS": joined.bits, "SPLITS": splits, "HAS_BIAS": joined.parts[0].bias is not None}
        constants |= self._tile(joined.groups, self._blocks * m)
        return [*before, (kernels.project, (self._blocks, m), arguments, constants)]

    def _gate_up(self, layer: Layer, m: int) -> Launches:
        config, joined = self.config, layer.gate_up
        before, partials, splits = self._multiplied(joined, self._normed, m, norm=True)
        arguments = (
            _words(joined.parts[0]), _scales(joined.parts[0]), _bias(joined), self._normed, partials, self._squares,
            self._inner, joined.groups, joined.n_rows, m, joined.rows[1], joined.scale_gaps[1], joined.biases[1],
            self._blocks, config.hidden_size, config.intermediate_size, self._inner.shape[1] // 8, config.rms_norm_eps,
        )  # fmt: skip
        constants = {
            "BITS": joined.bits, "BLOCKS": _power(self._blocks), "SPLITS": splits,
            "HAS_BIAS": joined.parts[0].bias is not None, "ACTIVATION": config.hidden_act,
        }  # fmt: skip
        constants |= self._tile(joined.groups, joined.parts[0].blocks * m)
        return [*before, (kernels.gate_up, (joined.parts[0].blocks, m), arguments, constants)]

    def _logits(self, m: int) -> Launches:
        config, joined = self.config, self._head
        before, partials, splits = self._multiplied(joined, self._normed, m, norm=True)
        matrix = joined.parts[0]
        arguments = (
            _words(matrix), _scales(matrix), self._normed, partials, self._squares, self.logits,
            joined.groups, joined.n_rows, m, self._blocks, config.hidden_size, config.n_outputs, config.rms_norm_eps,
        )  # fmt: skip
        constants = {"BITS": matrix.bits, "BLOCKS": _power(self._blocks), "SPLITS": splits}
        constants |= self._tile(joined.groups, matrix.blocks * m)
        return [*before, (kernels.head_logits, (matrix.blocks, m), arguments, constants)]


def launch(launches: Launches) -> None:
    """Run kernels in order on the current stream."""
    for kernel, grid, arguments, constants in launches:
        kernel[grid](*arguments, **constants, **OPTIONS)


def dequantize(codes: torch.Tensor, scales: torch.Tensor | None, bits: int, out: torch.Tensor) -> torch.Tensor:
    """`dense.dense` as one kernel."""
    if bits == 16:
        out.view(-1, codes.shape[0], 16).copy_(codes.permute(1, 0, 2))
        return out
    n_rows, groups = out.shape[1], codes.shape[1]
    grid = -(-n_rows // _ROWS), groups
    words = codes.view(torch.int32)
    kernels.dequantize[grid](words, scales, out, groups, n_rows, BITS=bits, ROWS=_ROWS, num_warps=4, **OPTIONS)
    return out


def _layer(weights: Weights, i: int) -> Layer:
    prefix = f"model.layers.{i}"

    def joined(*names: str) -> Joined:
        return Joined.of(*(weights.matrix(f"{prefix}.{name}_proj") for name in names))

    return Layer(
        joined("self_attn.q", "self_attn.k", "self_attn.v"),
        joined("self_attn.o"),
        joined("mlp.gate", "mlp.up"),
        joined("mlp.down"),
        weights.vector(f"{prefix}.input_layernorm.weight"),
        weights.vector(f"{prefix}.post_attention_layernorm.weight"),
    )


def _words(matrix: Matrix) -> torch.Tensor:
    """Codes as the kernels read them: int32 words, or float16."""
    return matrix.codes if matrix.bits == 16 else matrix.codes.view(torch.int32)


def _scales(matrix: Matrix) -> torch.Tensor:
    """Scales; for a matrix without any, something that is not read."""
    return matrix.codes if matrix.scales is None else matrix.scales


def _bias(joined: Joined) -> torch.Tensor:
    """The first bias; without any, something that is not read."""
    bias = joined.parts[0].bias
    return _scales(joined.parts[0]) if bias is None else bias


def _power(n: int) -> int:
    return triton.next_power_of_2(n)
