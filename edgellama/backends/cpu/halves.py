"""float16 as integers: conversions of one number for kernels, IEEE on every CPU, whether it has instructions or not."""

from __future__ import annotations

import numpy as np

from .jit import kernel


@kernel
def to_half(x):
    """Bits (uint16) of the float16 nearest to a float32, ties to even; too large gives infinity."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> 16) & 0x8000
    magnitude = np.uint32(bits & 0x7FFFFFFF)
    if magnitude >= 0x477FF000:  # 65520 and above round to infinity
        half = np.uint32(0x7C00)
    elif magnitude < 0x38800000:  # float16 subnormals: the last bit of 0.5 is their unit, 2**-24
        aligned = np.uint32(magnitude).view(np.float32) + np.float32(0.5)
        half = np.uint32(np.float32(aligned).view(np.uint32) - 0x3F000000)
    else:
        half = np.uint32((magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13)
    return np.uint16(sign | half)


@kernel
def from_half(half):
    """The float32 value of finite float16 bits."""
    magnitude = np.uint32(np.uint32(half & 0x7FFF) << 13)
    value = np.uint32(magnitude).view(np.float32) * np.float32(2.0**112)
    return -value if half & 0x8000 else value
