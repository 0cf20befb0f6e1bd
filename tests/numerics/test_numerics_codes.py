"""Codes, bytes and rounding of the three weight formats."""

import numpy as np
import pytest
import reference64
import torch

from svdquant.numerics import FORMATS, int4, nvfp4

E2M1_TIES = [
    (0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4),
    (0.2501, 0.5), (0.7499, 0.5), (1.2501, 1.5), (1.7499, 1.5), (2.5001, 3), (3.4999, 3), (5.0001, 6), (7.0, 6),
    (100.0, 6), (0.0, 0),
]  # fmt: skip


def test_int4_bytes_hold_the_low_nibble_first():
    values = torch.tensor([[1.0, -7.0, 7.0, -1.0]])
    assert int4.pack(values).tolist() == [[0x91, 0xF7]]


def test_e2m1_bytes_hold_the_low_nibble_first():
    values = torch.tensor([[0.5, -6.0, -1.5, 4.0]])
    assert nvfp4.pack(values).tolist() == [[0xF1, 0x6B]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_every_byte_unpacks_to_its_two_values(name, dtype):
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = reference64.unpack_nibbles(packed.numpy())
    expected = reference64.INT4[codes] if name == "int4" else np.where(codes & 8, -1, 1) * reference64.E2M1[codes & 7]
    unpacked = FORMATS[name].unpack(packed, dtype)
    assert unpacked.dtype == dtype
    np.testing.assert_array_equal(unpacked.double().numpy(), expected)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "int8"])
def test_round_trip_of_all_values(name):
    values = {
        "int4": torch.arange(-8, 8),
        "nvfp4": torch.tensor([*reference64.E2M1, *-reference64.E2M1[1:]]),
        "int8": torch.arange(-127, 128),
    }[name].float()
    pairs = torch.cartesian_prod(values, values)
    packed = FORMATS[name].pack(pairs)
    assert torch.equal(FORMATS[name].unpack(packed, torch.float32), pairs)
    assert torch.equal(FORMATS[name].round(pairs), pairs)


def test_packing_matches_the_second_implementation():
    values = torch.randint(-7, 8, (5, 64), generator=torch.Generator().manual_seed(0)).float()
    expected = reference64.pack_nibbles(values.numpy().astype(int) % 16)
    np.testing.assert_array_equal(int4.pack(values).numpy(), expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-3.5, -4), (6.5, 6), (7.4, 7), (8, 7), (-7.5, -8), (-9, -8), (0.51, 1)],
)
def test_int4_rounds_half_to_even(value, expected):
    assert float(int4.round_values(torch.tensor([value]))) == expected


@pytest.mark.parametrize(("value", "expected"), E2M1_TIES)
def test_e2m1_rounds_to_the_nearest_and_ties_to_even(value, expected):
    values = torch.tensor([value, -value])
    assert nvfp4.round_values(values).tolist() == [expected, -expected]
    assert reference64.e2m1(values.double().numpy()).tolist() == [expected, -expected]


def test_e2m1_rounding_on_a_fine_grid():
    values = torch.linspace(-8, 8, 4097)
    np.testing.assert_array_equal(nvfp4.round_values(values).numpy(), reference64.e2m1(values.double().numpy()))


def test_int8_rounds_and_saturates():
    values = torch.tensor([126.5, 127.9, -300.0, 0.5, -2.5])
    assert FORMATS["int8"].round(values).tolist() == [126, 127, -127, 0, -2]


def test_table_of_e4m3_is_torchs():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    np.testing.assert_array_equal(every.numpy(), reference64.E4M3)
    values = torch.cat([torch.linspace(0, 448, 3001), torch.logspace(-5, 0, 500)])
    np.testing.assert_array_equal(
        values.to(torch.float8_e4m3fn).double().numpy(), reference64.e4m3(values.double().numpy())
    )
