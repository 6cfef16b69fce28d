#!/usr/bin/env python3
"""Write the vectors of tests/test_quant.c with the gguf package's (PyPI) dequantisation.

    pip install gguf numpy
    python3 tests/make_quant_vectors.py > tests/data/quant-vectors.bin

Little-endian. Records of: u32 type, u32 n_weights, u32 n_bytes, the raw bytes, n_weights float32 results.
The last record has type 0xFFFFFFFF: n_weights float32 inputs as raw bytes, then n_weights uint16 results of
their conversion to float16.
"""
import struct
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

BLOCKS = 6


def f16(rng, n):
    """Finite halves of both signs over the whole range, subnormals among them."""
    h = rng.integers(0, 0x7C00, n, dtype=np.uint16) | (rng.integers(0, 2, n, dtype=np.uint16) << 15)
    h[:2] = [0x0001, 0x83FF]
    return h.view(np.uint8).reshape(n, 2)


def blocks(rng, kind):
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (BLOCKS, n_bytes), dtype=np.uint8)
    raw[0] |= 0xC0  # high bits of packed scales set
    halves = {T.Q8_0: [0], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}[kind]
    for at in halves:
        raw[:, at:at + 2] = f16(rng, BLOCKS)
    return raw, BLOCKS * n_weights


def record(kind, raw, n_weights, values):
    out = sys.stdout.buffer
    raw, values = np.ascontiguousarray(raw).tobytes(), np.ascontiguousarray(values).tobytes()
    out.write(struct.pack("<III", kind, n_weights, len(raw)) + raw + values)


def main():
    rng = np.random.default_rng(20)
    for kind in (T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K):
        raw, n = blocks(rng, kind)
        record(int(kind), raw, n, gguf.quants.dequantize(raw, kind).astype(np.float32))
    f32 = rng.standard_normal(64).astype(np.float32)
    record(int(T.F32), f32, 64, gguf.quants.dequantize(f32.view(np.uint8), T.F32))
    half = f16(rng, 512).reshape(-1)
    record(int(T.F16), half, 512, gguf.quants.dequantize(half, T.F16))
    bf = rng.integers(0, 0x7F80, 512, dtype=np.uint16)
    bf[::2] |= 0x8000
    record(int(T.BF16), bf, 512, gguf.quants.dequantize(bf.view(np.uint8).reshape(1, -1), T.BF16))

    # To float16: random bits of float32, values near halves, exact ties, the ends of the ranges.
    any_bits = rng.integers(0, 1 << 32, 1024, dtype=np.uint32).view(np.float32)
    near = np.exp2(rng.uniform(-27, 17, 2048)).astype(np.float32) * rng.choice([-1, 1], 2048)
    h = np.arange(0, 0x7BFF, 37, dtype=np.uint16)
    ties = (h.view(np.float16).astype(np.float32) + (h + 1).view(np.float16).astype(np.float32)) / 2
    ends = np.array([0.0, -0.0, 65504, 65519.996, 65520, -65520, 65536, np.inf, -np.inf, 2.0**-24, 2.0**-25,
                     np.nextafter(np.float32(2.0**-25), np.float32(1)), 2.0**-14, 1e-45, -1e-45, 3e38])
    x = np.concatenate([any_bits, near, ties, ends]).astype(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        record(0xFFFFFFFF, x, len(x), x.astype(np.float16))


main()
