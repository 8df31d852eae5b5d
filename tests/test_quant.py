"""The block layout and the plain quantizer: round trips on ragged shapes, and the layout spelled out byte by byte."""

import numpy as np
import pytest

from edgellama import quant

SHAPES = [(16, 128), (1, 1), (17, 129), (48, 576), (10, 288), (33, 256)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_survive_packing(shape, bits):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 2**bits, shape, dtype=np.uint8)
    pack, unpack = (quant.pack_int4, quant.unpack_int4) if bits == 4 else (quant.pack_int8, quant.unpack_int8)
    packed = pack(codes)
    n, k = quant.padded_shape(*shape)
    assert packed.shape == (n // 16, k // 128, 1024 * bits // 4)
    assert (unpack(packed, *shape) == codes).all()
    padded = unpack(packed, n, k)
    assert (padded[shape[0] :] == quant.ZERO_POINT[bits]).all()
    assert (padded[:, shape[1] :] == quant.ZERO_POINT[bits]).all()
    scales = rng.standard_normal((shape[0], k // 128)).astype(np.float16)
    assert (quant.unpack_scales(quant.pack_scales(scales), shape[0]) == scales).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_f16_survives_packing(shape):
    w = np.random.default_rng(2).standard_normal(shape).astype(np.float16)
    packed = quant.pack_f16(w)
    assert (quant.unpack_f16(packed, *shape) == w).all()
    assert np.count_nonzero(packed) == np.count_nonzero(w)


def test_int4_bytes_are_where_the_format_says():
    """Row 5, input 128 + 8*3 + 4 + 2, is the high nibble of byte 4*5+2 in line 3 of group 1."""
    codes = np.full((16, 256), 8, np.uint8)
    codes[5, 128 + 8 * 3 + 4 + 2] = 1
    packed = quant.pack_int4(codes)
    assert packed[0, 1, 3 * 64 + 4 * 5 + 2] == 0x18
    packed[0, 1, 3 * 64 + 4 * 5 + 2] = 0x88
    assert (packed == 0x88).all()


def test_int8_bytes_are_where_the_format_says():
    codes = np.full((16, 256), 128, np.uint8)
    codes[5, 128 + 4 * 3 + 2] = 7
    packed = quant.pack_int8(codes)
    assert packed[0, 1, 3 * 64 + 4 * 5 + 2] == 7
    assert np.count_nonzero(packed != 128) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_is_within_half_a_step(bits):
    w = np.random.default_rng(3).standard_normal((20, 300)).astype(np.float32)
    w[3] = 0
    codes, scales = quant.quantize_rtn(w, bits)
    # Half a step, and what the scale's own rounding to float16 (2**-11 of absmax) moves the last code by.
    top = 2 ** (bits - 1) - 1
    step = np.repeat(scales.astype(np.float32), 128, axis=1)[:, :300]
    assert (np.abs(quant.dequantize(codes, scales, bits) - w) <= step * (0.5 + top * 2**-11) + 1e-7).all()
    assert (quant.dequantize(codes, scales, bits)[3] == 0).all()
