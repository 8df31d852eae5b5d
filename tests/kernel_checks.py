"""Checks of the Triton kernels under their interpreter, against NumPy; `test_gpu_kernels.py` runs this in a process.

    TRITON_INTERPRET=1 python tests/kernel_checks.py EMPTY_FOLDER [NAME...]

Prints one JSON object: check -> null or what went wrong. Shapes are ragged: nothing is a multiple of a group, a row
block or a tile unless it says so. The interpreter computes float32 sums in NumPy's order, so a result is right to the
rounding of a sum of K products: 2**-24 * sqrt(K) of the terms' size; float16 dots round each activation to 2**-11.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

from edgellama import quant
from edgellama.backends.gpu import attention_kernels, dense, kernels
from edgellama.backends.gpu.backend import TorchBackend
from edgellama.backends.gpu.decode import dequantize
from edgellama.backends.gpu.selection import Choice
from edgellama.backends.reference import ReferenceBackend
from edgellama.format import open_model
from mixed_files import units, write_mixed

F32_TOLERANCE = 1e-5
"""Of the largest value: sums of up to 600 products in float32, in two orders."""
F16_TOLERANCE = 2 * 2.0**-11
"""A factor rounded to float16; sums of roundings grow slower than the sums themselves."""


@triton.jit
def rows_times(codes, scales, x, y, n_groups, BITS: tl.constexpr, LINES: tl.constexpr, EVEN: tl.constexpr):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(y + rows, kernels.multiply(codes, scales, x, rows, n_groups, BITS, LINES, EVEN))


@triton.jit
def two_rows_times(codes, scales, x, y, apart, gap, n_groups, BITS: tl.constexpr, LINES: tl.constexpr):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    a, b = kernels.multiply_two(codes, scales, x, rows, rows + apart, gap, n_groups, BITS, LINES, False)
    tl.store(y + rows, a)
    tl.store(y + apart + rows, b)


def close(got, expected, tolerance: float) -> None:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.2e} is above {tolerance:.2e}"


class Random:
    """A matrix of random weights in the file's layout, with its dense form."""

    def __init__(self, out_features: int, in_features: int, bits: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        groups = -(-in_features // 128)
        if bits == 16:
            self.weights = rng.standard_normal((out_features, in_features)).astype(np.float16).astype(np.float32)
            self.codes = torch.from_numpy(quant.pack_f16(self.weights.astype(np.float16)))
            self.scales = None
        else:
            codes = rng.integers(0, 2**bits, (out_features, in_features)).astype(np.uint8)
            scales = rng.standard_normal((out_features, groups)).astype(np.float16)  # of both signs
            self.weights = quant.dequantize(codes, scales, bits)
            self.codes = torch.from_numpy((quant.pack_int4 if bits == 4 else quant.pack_int8)(codes))
            self.scales = torch.from_numpy(quant.pack_scales(scales))
        self.bits, self.groups = bits, groups
        self.rows = -(-out_features // 16) * 16

    @property
    def words(self) -> torch.Tensor:
        return self.codes if self.bits == 16 else self.codes.view(torch.int32)

    @property
    def scales_or_any(self) -> torch.Tensor:
        return self.codes if self.scales is None else self.scales


def transposed(x: np.ndarray, groups: int) -> torch.Tensor:
    """[M, K] -> [M, 8, lines], zero padded: how the kernels want activations."""
    padded = np.zeros((len(x), groups * 128), np.float32)
    padded[:, : x.shape[1]] = x
    return torch.from_numpy(np.ascontiguousarray(padded.reshape(len(x), -1, 8).transpose(0, 2, 1)))


def activations(tokens: int, width: int, seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, width)).astype(np.float32)


def check_multiply() -> None:
    for bits in (4, 8, 16):
        for out_features, in_features, lines in ((40, 300, 16), (17, 128, 64), (48, 513, 32)):
            matrix = Random(out_features, in_features, bits)
            x = activations(1, in_features)
            y = torch.zeros(matrix.rows)
            rows_times[(matrix.rows // 16,)](
                matrix.words,
                matrix.scales_or_any,
                transposed(x, matrix.groups),
                y,
                matrix.groups,
                bits,
                lines,
                16 * matrix.groups % lines == 0,
            )
            close(y[:out_features], matrix.weights @ x[0], F32_TOLERANCE)
            assert (y[out_features:] == 0).all(), "rows that pad must be zero"


def check_multiply_two() -> None:
    for bits in (4, 8):
        matrix = Random(96, 300, bits)
        x = activations(1, 300)
        gap = 16  # the second half's scales lie a gap further, as between two tensors of a file
        scales = torch.cat(
            (matrix.scales[:3].reshape(-1), torch.zeros(gap, dtype=torch.float16), matrix.scales[3:].reshape(-1))
        )
        y = torch.zeros(96)
        two_rows_times[(3,)](matrix.words, scales, transposed(x, 3), y, 48, gap, 3, bits, 32)
        close(y, matrix.weights @ x[0], F32_TOLERANCE)


def check_every_code_is_exact() -> None:
    """Identity activations return every weight, to the last bit."""
    for bits in (4, 8):
        matrix = Random(16, 128, bits)
        for k in range(0, 128, 11):
            x = np.zeros((1, 128), np.float32)
            x[0, k] = 1
            y = torch.zeros(16)
            rows_times[(1,)](matrix.words, matrix.scales, transposed(x, 1), y, 1, bits, 16, True)
            assert (y.numpy() == matrix.weights[:, k]).all()


def check_gemm() -> None:
    """Splits of K, ragged rows, normed activations, a gap in the scales; codes exact, activations in float16."""
    for bits, tokens, groups_a_split, norm in ((4, 3, 2, True), (8, 17, 3, False), (16, 5, 1, True)):
        matrix = Random(150, 370, bits)
        x = activations(tokens, 370)
        squares = np.square(x).sum(axis=1, keepdims=True)
        splits = -(-matrix.groups // groups_a_split)
        partials = torch.full((splits, tokens, matrix.rows), np.nan)
        kernels.gemm[(-(-matrix.rows // 64), splits)](
            matrix.words, matrix.scales_or_any, transposed(x, matrix.groups), torch.from_numpy(squares), partials,
            matrix.groups, groups_a_split, matrix.rows, tokens, 1 << 30, 1 << 30, 0, 0, 1, 370, 1e-5,
            BITS=bits, TOKENS=32, ROWS=64, BLOCKS=1, NORM=norm, DOT=tl.float16,
        )  # fmt: skip
        if norm:
            x = x / np.sqrt(squares / 370 + 1e-5)
        close(partials.sum(0)[:, :150], x @ matrix.weights.T, F16_TOLERANCE)


def check_dequantize() -> None:
    """Equal to the plain torch form and to NumPy's, in float32 and rounded to float16."""
    for bits in (4, 8, 16):
        matrix = Random(90, 300, bits)
        for dtype in (torch.float32, torch.float16):
            out = torch.full((matrix.groups * 128, matrix.rows), np.nan, dtype=dtype)
            dequantize(matrix.codes, matrix.scales, bits, out)
            plain = dense.dense(matrix.codes, matrix.scales, bits, torch.empty_like(out))
            assert (out == plain).all()
        assert (plain.float().numpy()[:300, :90] == matrix.weights.T.astype(np.float16)).all()


def attention_case(kind: str, group: int, head_dim: int, splits: int) -> None:
    """Three tokens of two slots at several depths against softmax in float64."""
    rng = np.random.default_rng(group * head_dim)
    kv_heads, n_ctx = 2, 150
    positions, slots = np.array([0, 149, 66], np.int32), np.array([1, 0, 1], np.int32)
    q = rng.standard_normal((3, kv_heads * group, head_dim)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, kv_heads, n_ctx, head_dim)).astype(np.float32)
    scales = np.ones((2, 2, kv_heads, n_ctx), np.float32)
    if kind == "int8":
        scales = np.stack([np.abs(each).max(axis=-1) / 127 for each in (k, v)])
        k, v = (np.rint(each / scale[..., None]) for each, scale in zip((k, v), scales, strict=True))
    stored = [torch.from_numpy(each.astype(np.int8 if kind == "int8" else np.float16)) for each in (k, v)]
    k, v = (each.numpy().astype(np.float64) * scale[..., None] for each, scale in zip(stored, scales, strict=True))
    groups = -(-kv_heads * group * head_dim // 128)
    out = torch.zeros(3, 8, groups * 16)
    states = torch.full((3, kv_heads * group, splits, head_dim + 2), np.nan)
    width = max(16, triton.next_power_of_2(head_dim))
    attention_kernels.attend[(kv_heads, 3, splits)](
        torch.from_numpy(q * np.float32(head_dim**-0.5 * np.log2(np.e))), *stored, *map(torch.from_numpy, scales),
        torch.from_numpy(positions), torch.from_numpy(slots), out, states, n_ctx, groups * 16,
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, QUERIES=max(16, triton.next_power_of_2(group)), WIDTH=width,
        BLOCK=32, SPLITS=splits, INT8=kind == "int8", DOT=tl.float16,
    )  # fmt: skip
    if splits > 1:
        attention_kernels.merge[(kv_heads * group, 3)](
            states, out, groups * 16, HEADS=kv_heads * group, HEAD_DIM=head_dim, WIDTH=width, SPLITS=splits,
            SPLITS_UP=triton.next_power_of_2(splits),
        )  # fmt: skip
    got = out.numpy().transpose(0, 2, 1).reshape(3, -1)[:, : kv_heads * group * head_dim].reshape(q.shape)
    for t in range(3):
        for head in range(kv_heads * group):
            keys, values = (each[slots[t], head // group, : positions[t] + 1] for each in (k, v))
            scores = keys @ q[t, head].astype(np.float64) * head_dim**-0.5
            weights = np.exp(scores - scores.max())
            close(got[t, head], weights @ values / weights.sum(), 2 * F16_TOLERANCE)  # queries and weights are rounded


def check_attention_mha() -> None:
    attention_case("float16", 1, 32, 1)
    attention_case("float16", 1, 6, 3)


def check_attention_gqa() -> None:
    attention_case("float16", 3, 40, 4)


def check_attention_int8() -> None:
    attention_case("int8", 2, 24, 1)
    attention_case("int8", 5, 16, 2)


SMALL = {
    "vocab_size": 37, "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "max_position_embeddings": 32,
}  # fmt: skip
# name -> (config, lm_head_bits, cache). Two groups of inputs and a head of whole row blocks: "wide".
MODELS: dict[str, tuple[dict, int, str]] = {
    "gqa": ({}, 8, "float16"),
    "mqa_int8_cache": ({"num_key_value_heads": 1}, 8, "int8"),
    "mha_biases": ({"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, 4, "float16"),
    "gelu_tied": ({"hidden_act": "gelu", "tie_word_embeddings": True}, 8, "float16"),
    "gelu_pytorch_tanh_tied_4": ({"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}, 4, "float16"),
    "relu_tied_16": ({"hidden_act": "relu", "tie_word_embeddings": True}, 16, "int8"),
    "dynamic_rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}, 8, "float16"),
    "wide": ({"hidden_size": 136, "head_dim": 32, "num_hidden_layers": 1}, 16, "float16"),
    "mixed_qkv_down": ({"attention_bias": True, "mlp_bias": True}, 8, "float16"),
    "mixed_o_gate_up": ({"hidden_size": 136, "head_dim": 32}, 4, "int8"),
}
INT8_UNITS = {"mixed_qkv_down": units("0.qkv", "0.down", "1.down"), "mixed_o_gate_up": units("0.o", "1.gate_up")}
MODEL_TOLERANCE = {"float16": 4 * 2.0**-11, "int8": 4 / 127}
"""Two roundings of 2**-11 (cache, activations of several tokens) in each of two layers, as in test_cpu_backend. An int8
cache rounds each key and value to 1/254 of its head's largest number."""


def model_case(folder: Path, name: str) -> None:
    """Some tokens at once, then one at a time, through every kernel of a step, against the float32 oracle."""
    config, lm_head_bits, kv_cache = MODELS[name]
    int8_units = INT8_UNITS.get(name, [])
    write_mixed(folder / f"{name}.edgellama", int8_units, lm_head_bits=lm_head_bits, **{**SMALL, **config})
    with open_model(folder / f"{name}.edgellama") as file:
        n_ctx, n_slots = 12, 2
        reference = ReferenceBackend(file, n_ctx, n_slots)
        backend = TorchBackend(
            file, n_ctx, n_slots, device="cpu", kv_cache=kv_cache, dtype="float16", kernels=True, step_tokens=4
        )
        tokens = np.arange(7, 7 + n_ctx) * 10007 % file.config.vocab_size
        calls = [
            (tokens[:3], [0, 1, 2], [1, 1, 1]),  # several of one slot
            (tokens[3:4], [3], [1]),
            (tokens[5:8], [0, 4, 1], [0, 1, 0]),  # a batch of two
        ]
        for ids, positions, slots in calls:
            rows = np.arange(len(ids))
            expected = reference.forward(ids, positions, slots, rows)
            error = np.abs(backend.forward(ids, positions, slots, rows) - expected).max() / np.ptp(expected)
            assert error <= MODEL_TOLERANCE[kv_cache], f"{error:.2e} is above {MODEL_TOLERANCE[kv_cache]:.2e}"
        plain = TorchBackend(file, n_ctx, n_slots, device="cpu", kv_cache=kv_cache, kernels=False)
        for ids, positions, slots in calls:
            plain.forward(ids, positions, slots, [])
        got, expected = (each.read_slot(1, 5) for each in (backend, plain))
        for part in expected:  # an int8 code may be rounded to its neighbour
            close(got[part], expected[part], 1.01 / 127 if expected[part].dtype == np.int8 else 2 * F16_TOLERANCE)
        if name == "gqa":
            check_choices_are_fed_back(backend, tokens[:2])


def check_choices_are_fed_back(backend: TorchBackend, tokens: np.ndarray) -> None:
    """`decode` gives the tokens that `select` gives step by step, greedy and sampled."""
    rows, slots, positions = np.arange(2), np.array([0, 1]), np.array([2, 5])
    for choices in ([[Choice()] * 2] * 2, [[Choice(0.8, 20, 0.95, 0.05, u), Choice(1.5, u=u)] for u in (0.3, 0.9)]):
        follow = backend.decode(tokens, positions, slots, 2, choices)
        first = backend.select(tokens, positions, slots, rows, choices[0])
        second = backend.select(first, positions + 1, slots, rows, choices[1])
        assert (follow == np.stack((first, second))).all()


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in globals().copy().items()
    if name.startswith("check_") and not check.__code__.co_argcount
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, wanted = Path(sys.argv[1]), sys.argv[2:] or [*CHECKS, *MODELS]
    outcome: dict[str, str | None] = {}
    for name in wanted:
        begun = time.perf_counter()
        try:
            CHECKS[name]() if name in CHECKS else model_case(folder, name)
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc(limit=-4)
        print(f"{name}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    print(json.dumps(outcome))
