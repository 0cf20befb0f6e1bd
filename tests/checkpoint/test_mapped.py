"""safetensors files tensor by tensor, against the safetensors library."""

from __future__ import annotations

import json
import os

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdquant.checkpoint.header import read_header
from svdquant.checkpoint.mapped import MappedTensors, streamed_file

TENSORS = {
    "a.weight": torch.randn(7, 5).bfloat16(),
    "tiny": torch.tensor([1.5], dtype=torch.float16),
    "b": torch.randint(-128, 127, (3, 4, 2), dtype=torch.int8),
    "names with ünicode": torch.randn(9),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.0),
    "e4m3": torch.randn(16, 16).to(torch.float8_e4m3fn),
    "words": torch.randint(-(2**31), 2**31 - 1, (5, 3), dtype=torch.int32),
    "flags": torch.tensor([True, False, True]),
    "view": torch.randn(6, 8).bfloat16()[:, ::2],
}


def same(a, b):
    flat = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_streamed_files_are_safetensors(tmp_path):
    path = tmp_path / "streamed.safetensors"
    metadata = {"b": json.dumps({"x": [1, "é"]}), "a": "1"}
    with streamed_file(path, list(TENSORS), metadata) as file:
        for name, value in TENSORS.items():
            file.add(name, value)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys() and all(same(loaded[name], t) for name, t in TENSORS.items())
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == metadata
    tensors, found = read_header(path)
    assert found == metadata
    # Whatever has whole words begins on one.
    assert all(info.start % 8 == 0 for info in tensors.values() if info.nbytes % 8 == 0 and info.nbytes)


def test_the_same_tensors_make_the_same_file(tmp_path):
    for name in ("one", "two"):
        with streamed_file(tmp_path / name, list(TENSORS), {"b": "2", "a": "1"}) as file:
            for key, value in TENSORS.items():
                file.add(key, value)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_room_for_tensors_that_never_came(tmp_path):
    path = tmp_path / "few.safetensors"
    with streamed_file(path, [f"layer.{i}" for i in range(100)], {}) as file:
        file.add("layer.7", torch.ones(3))
    assert torch.equal(load_file(path)["layer.7"], torch.ones(3))


def test_a_failure_leaves_no_readable_file(tmp_path):
    path = tmp_path / "broken.safetensors"
    with pytest.raises(RuntimeError), streamed_file(path, ["a", "b"], {}) as file:
        file.add("a", torch.ones(8))
        raise RuntimeError
    assert not any(path.read_bytes()[:8])


def test_mapped_tensors_own_their_memory(tmp_path):
    path = tmp_path / "file.safetensors"
    # Header lengths that leave tensors at odd places are allowed.
    save_file({name: t.contiguous() for name, t in TENSORS.items()}, path, {"pad": "x" * 3})
    with MappedTensors(read_header(path)[0]) as file:
        read = {name: file.get(name) for name in TENSORS}
    os.remove(path)
    assert all(same(read[name], t) for name, t in TENSORS.items())
    assert all(t.data_ptr() % 16 == 0 for t in read.values() if t.numel())
    read["a.weight"].zero_()


def test_mapped_tensors_give_their_pages_back(tmp_path):
    """What is resident of the file does not grow with what was read."""
    process = psutil.Process()
    if not hasattr(process.memory_info(), "shared"):
        pytest.skip("only Linux tells the mapped pages of a process")
    path, block = tmp_path / "large.safetensors", torch.zeros(16 << 20, dtype=torch.uint8)
    with streamed_file(path, [str(i) for i in range(12)], {}) as file:
        for i in range(12):
            file.add(str(i), block)
    with MappedTensors(read_header(path)[0]) as file:
        before = process.memory_info().shared
        for i in range(12):
            file.get(str(i))
        grown = process.memory_info().shared - before
    assert grown < block.nbytes
