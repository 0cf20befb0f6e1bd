"""`w4a16_linear` in Triton's interpreter against float64."""

import pytest
import torch

pytest.importorskip("triton")

from truth import E2M1, INT4, UINT4, random_layer, relative_error, weight

from svdquant.kernels.gpu import weight_only_kernel
from svdquant.kernels.gpu.arch import Arch
from svdquant.kernels.gpu.weight_only import tile_of, w4a16_linear, why_not

BOUND = {torch.bfloat16: 3e-3, torch.float16: 5e-4}


def layer(generator, n, k, weights="int4", group=None, zeros=False, dtype=torch.bfloat16):
    t = random_layer(generator, n, k, weights, rank=0, group=group, smooth=False, dtype=dtype)
    t.wcscales = None
    if weights == "nvfp4":
        t.wscales = torch.rand(t.wscales.shape, generator=generator).to(torch.float8_e4m3fn)
    if zeros:
        t.wzeros = (torch.randn(t.wscales.shape, generator=generator) * 0.1).to(dtype)
    return t


def run(x, t):
    return w4a16_linear(x, t.qweight, t.wscales, t.bias, t.spec.weights, t.wzeros)


def expected(x, t):
    y = x.double() @ weight(t)[:, : x.shape[1]].T
    return y if t.bias is None else y + t.bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("weights", "group", "zeros", "n", "k"),
    [
        ("int4", 64, False, 64, 512),
        ("int4", 64, False, 35, 100),  # K < Kp, odd N
        ("int4", 64, True, 40, 320),
        ("int4", 128, False, 32, 640),
        ("int4", 192, True, 16, 384),
        ("int4", 16, False, 32, 272),
        ("int4", 48, True, 32, 240),
        ("int8", 0, False, 48, 300),
        ("int8", 0, False, 32, 512),
        ("int8", 64, False, 32, 192),
        ("int8", 32, False, 32, 192),
        ("nvfp4", 16, False, 32, 304),
    ],
)
@pytest.mark.parametrize("m", [1, 5, 17])
def test_matches_float64(weights, group, zeros, n, k, m, dtype):
    generator = torch.Generator().manual_seed(n + k + m)
    t = layer(generator, n, k, weights, group, zeros, dtype)
    x = torch.randn(m, k, generator=generator).to(dtype)
    assert why_not(t.qweight, t.wscales, dtype, weights, Arch("interpreter")) is None
    y = run(x, t)
    assert y.shape == (m, n) and y.dtype == dtype
    assert relative_error(y, expected(x, t)) < BOUND[dtype]


def test_groups_of_64_are_scaled_in_float32():
    """What is left is the rounding of the output: each value is its float64 rounded, or a neighbour of that."""
    generator = torch.Generator().manual_seed(0)
    t = layer(generator, 64, 1024)
    x = torch.randn(4, 1024, generator=generator).bfloat16()
    exact = expected(x, t)
    assert relative_error(run(x, t), exact) < 1.02 * relative_error(exact.bfloat16(), exact)


def test_without_bias_and_rows():
    generator = torch.Generator().manual_seed(1)
    t = layer(generator, 32, 256)
    t.bias = None
    x = torch.randn(3, 256, generator=generator).bfloat16()
    assert relative_error(run(x, t), expected(x, t)) < 3e-3
    assert run(x[:0], t).shape == (0, 32)


def test_inputs_of_any_stride_and_other_parameter_types():
    generator = torch.Generator().manual_seed(2)
    t = layer(generator, 48, 192, zeros=True, dtype=torch.float16)
    wide = torch.randn(6, 400, generator=generator).bfloat16()
    for x in (wide[:, 8:200], wide[::2, 1:193], torch.randn(192, 3, generator=generator).bfloat16().T):
        assert torch.equal(run(x, t), run(x.contiguous(), t))
        assert relative_error(run(x, t), expected(x, t)) < 3e-3


@pytest.mark.parametrize(("weights", "group", "zeros"), [("int4", 64, False), ("int4", 32, True), ("int8", 0, False)])
def test_rows_do_not_depend_on_each_other(weights, group, zeros):
    generator = torch.Generator().manual_seed(3)
    t = layer(generator, 80, 448, weights, group, zeros)
    x = torch.randn(40, 448, generator=generator).bfloat16()
    y = run(x, t)
    for m in (1, 7, 16, 33):
        assert torch.equal(run(x[:m], t), y[:m])
        assert torch.equal(run(x[-m:], t), y[-m:])


def test_what_it_cannot_take():
    arch = Arch("nvidia", 90)
    q, s = torch.zeros(8, 60, dtype=torch.uint8), torch.ones(8, 5)
    assert "multiples of 16" in why_not(q, s, torch.bfloat16, "int4", arch)
    assert "float32" in why_not(q, s[:, :1], torch.float32, "int4", arch)
    assert why_not(q, s[:, :1], torch.float16, "int4", arch) is None


def test_few_rows_get_enough_programs():
    arch = Arch("nvidia", 90, 132)
    assert 18432 // tile_of(arch, 1, 18432).outputs >= 2 * 132
    assert 3072 // tile_of(arch, 1, 3072).outputs >= 132


def run_ptx(asm, inputs, dtype):
    """What PTX of 32-bit registers leaves in $0 … $3, for the few instructions that the kernel uses. inputs: int64."""
    registers = {"$4": inputs}

    def value(name):
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    def halves(x):
        """Two 16-bit floats of each register, float32 [..., 2]."""
        pair = torch.stack((x & 0xFFFF, x >> 16), -1)
        return ((pair ^ 0x8000) - 0x8000).to(torch.int16).view(dtype).float()

    for line in asm.strip("{}\n").splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        if name == ".reg":
            continue
        target, *operands = rest.split(", ")
        a, *others = (value(o) for o in operands)
        if name == "mov.b32":
            result = a
        elif name == "shr.u32":
            result = a >> others[0]
        elif name == "shl.b32":
            result = a << others[0] & 0xFFFFFFFF
        elif name == "and.b32":
            result = a & others[0]
        elif name == "lop3.b32":
            b, c, table = others
            result = {0x6A: (a & b) ^ c, 0xF8: a | (b & c)}[int(table)]
        else:
            assert name in ("fma.rn.bf16x2", "fma.rn.f16x2")
            product = halves(a).double() * halves(others[0]) + halves(others[1])
            bits = product.to(dtype).view(torch.int16).long() & 0xFFFF
            result = bits[..., 0] | bits[..., 1] << 16
        registers[target] = result
    return torch.stack([halves(registers[f"${i}"]) for i in range(4)], -1)


@pytest.mark.parametrize(("kind", "table"), [("SIGNED", INT4), ("UNSIGNED", UINT4), ("E2M1", E2M1)])
@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_instructions_that_unpack(kind, table, name, dtype):
    """The interpreter runs no PTX: here is what it means."""
    asm = getattr(weight_only_kernel, f"_{name}_{kind}").value
    words = torch.randint(0, 2**32, (500,), generator=torch.Generator().manual_seed(0))
    shifts = torch.tensor([[0, 4, 8, 12], [16, 20, 24, 28]])
    expected = table[words[:, None, None] >> shifts & 15].float()
    assert torch.equal(run_ptx(asm, words, dtype), expected)
