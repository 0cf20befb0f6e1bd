"""Calibration inputs: a bounded, uniform, reproducible sample on disk."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import svdquant
from svdquant import SVDQuantError
from svdquant.ptq import GroupPlan, LayerPlan
from svdquant.ptq.capture import CalibrationStore, _Reservoir, capture


def groups(*names, k=2):
    return [GroupPlan(n, (LayerPlan(n, "svdquant", k, 4, True, 4, "", n, ""),)) for n in names]


def numbered(start, stop):
    """Rows that say which they are."""
    return torch.stack([torch.arange(start, stop).float(), torch.ones(stop - start)], 1)


def model():
    return nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Linear(2, 4)})


def forwards(*inputs, name="a"):
    def run(m):
        for x in inputs:
            m[name](x)

    return run


def test_fewer_rows_than_the_budget_are_all_kept(tmp_path):
    store = capture(model(), groups("a"), forwards(numbered(0, 5), numbered(5, 12)), tmp_path, 100, 0)
    kept = store.inputs("a")
    assert torch.equal(kept.rows, numbered(0, 12))
    assert kept.amax.tolist() == [11, 1]
    assert store.index["a"]["rows"] == store.index["a"]["seen"] == 12


def test_the_budget_bounds_the_rows_and_the_sample_is_uniform(tmp_path):
    parts = [numbered(i, i + 250) for i in range(0, 4000, 250)]
    store = capture(model(), groups("a"), forwards(*parts), tmp_path, 400, 0)
    kept = store.inputs("a")
    picked = kept.rows[:, 0]
    assert len(picked) == 400 == len(set(picked.tolist()))
    assert store.index["a"]["seen"] == 4000
    # Statistics are of all tokens, not of the kept.
    assert kept.amax.tolist() == [3999, 1]
    # 100 expected in each quarter of the stream, σ = 8.2.
    counts = torch.histc(picked, 4, 0, 4000)
    assert float((counts - 100).abs().max()) < 33
    assert float(picked.mean()) == pytest.approx(2000, abs=4 * 4000 / 12**0.5 / 20)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_same_seed_same_rows(tmp_path, seeds):
    parts = [numbered(i, i + 100) for i in range(0, 1000, 100)]
    rows = []
    for i, seed in enumerate(seeds):
        torch.manual_seed(i)
        rows.append(capture(model(), groups("a"), forwards(*parts), tmp_path / str(i), 50, seed).inputs("a").rows)
    assert torch.equal(*rows) is (seeds[0] == seeds[1])


def test_one_groups_sample_does_not_depend_on_the_others(tmp_path):
    def run(m):
        for i in range(0, 1000, 100):
            m["b"](numbered(i, i + 77))
            m["a"](numbered(i, i + 100))

    both = capture(model(), groups("b", "a"), run, tmp_path / "both", 50, 0).inputs("a").rows
    alone = capture(model(), groups("a"), run, tmp_path / "alone", 50, 0).inputs("a").rows
    assert torch.equal(both, alone)


def test_identical_tensors_count_once(tmp_path):
    text = numbered(0, 30)
    store = capture(model(), groups("a"), forwards(text, text.clone(), numbered(30, 40), text), tmp_path, 100, 0)
    assert store.index["a"]["seen"] == 40
    other = text.clone()
    other[29, 1] = 2
    store = capture(model(), groups("a"), forwards(text, other), tmp_path / "other", 100, 0)
    assert store.index["a"]["seen"] == 60


def test_all_leading_dimensions_are_rows(tmp_path):
    store = capture(model(), groups("a"), forwards(numbered(0, 24).reshape(2, 3, 4, 2)), tmp_path, 100, 0)
    assert torch.equal(store.inputs("a").rows, numbered(0, 24))


def test_a_convolutions_rows_are_pixels(tmp_path):
    net = nn.ModuleDict({"a": nn.Conv2d(2, 4, 1)})
    pixels = numbered(0, 24).reshape(2, 3, 4, 2)
    store = capture(net, groups("a"), forwards(pixels.movedim(-1, 1)), tmp_path, 100, 0)
    assert torch.equal(store.inputs("a").rows, numbered(0, 24))


def test_keyword_inputs(tmp_path):
    store = capture(model(), groups("a"), lambda m: m["a"](input=numbered(0, 3)), tmp_path, 10, 0)
    assert torch.equal(store.inputs("a").rows, numbered(0, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_keep_their_type(tmp_path, dtype):
    net = model().to(dtype)
    kept = capture(net, groups("a"), forwards(numbered(0, 3).to(dtype)), tmp_path, 10, 0).inputs("a")
    assert kept.rows.dtype == dtype and kept.amax.dtype == torch.float32


def test_only_finished_files_remain(tmp_path):
    folder = tmp_path / "calibration"
    assert not CalibrationStore.complete(folder)
    (tmp_path / "calibration").mkdir()
    (folder / "00000.rows").write_bytes(b"left by a run that was killed")

    def run(m):
        # While it runs, the sample lives in a file of the budget's size.
        m["a"](numbered(0, 3))
        m["b"](numbered(0, 3))
        assert (folder / "00000.rows").stat().st_size == 64 * 2 * 4
        assert not CalibrationStore.complete(folder)

    capture(model(), groups("a", "b"), run, folder, 64, 0)
    assert CalibrationStore.complete(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["00000.safetensors", "00001.safetensors", "inputs.json"]
    assert torch.equal(CalibrationStore(folder).inputs("b").rows, numbered(0, 3))


def test_a_layer_that_no_forward_reaches_is_named(tmp_path):
    net = model()
    with pytest.raises(SVDQuantError, match=r"calibration never reached b; .* skip"):
        capture(net, groups("a", "b"), forwards(numbered(0, 3)), tmp_path, 10, 0)
    with pytest.raises(SVDQuantError, match="never reached a and 1 more"):
        capture(net, groups("a", "b"), lambda m: None, tmp_path, 10, 0)
    assert not CalibrationStore.complete(tmp_path)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_an_error_in_the_model_leaves_no_hooks(tmp_path):
    net = model()

    def run(m):
        m["a"](numbered(0, 3))
        raise RuntimeError("out of prompts")

    with pytest.raises(RuntimeError, match="out of prompts"):
        capture(net, groups("a"), run, tmp_path, 10, 0)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_gradients_are_off(tmp_path):
    seen = []
    capture(model(), groups("a"), lambda m: seen.append(m["a"](numbered(0, 3)).requires_grad), tmp_path, 10, 0)
    assert seen == [False]


def test_memory_and_disk_do_not_grow_with_the_forwards(tmp_path):
    """Neither may keep the 200 MiB that pass by."""
    net = nn.ModuleDict({"a": nn.Linear(512, 4)})
    x = torch.zeros(1024, 512)
    sizes = []

    def run(count):
        def inner(m):
            for i in range(count):
                x[:, 0] = i
                m["a"](x.clone())
                sizes.append((tmp_path / str(count) / "00000.rows").stat().st_size)

        return inner

    capture(net, groups("a", k=512), run(3), tmp_path / "3", 256, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    capture(net, groups("a", k=512), run(100), tmp_path / "100", 256, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 60 * 1024
    assert set(sizes) == {256 * 512 * 4}
    assert (tmp_path / "100" / "00000.safetensors").stat().st_size < 256 * 512 * 4 + 512 * 4 + 1024


def test_of_rows_that_draw_the_same_slot_the_last_stays(tmp_path):
    """As if every row were handled on its own."""
    rows, budget = torch.randn(500, 8), 16
    whole = _Reservoir(tmp_path / "whole.rows", budget, torch.Generator().manual_seed(3))
    whole.add(rows)
    expected, generator = rows[:budget].clone(), torch.Generator().manual_seed(3)
    slots = (torch.rand(500 - budget, generator=generator, dtype=torch.float64) * torch.arange(budget + 1, 501)).long()
    for i, slot in enumerate(slots.tolist()):
        if slot < budget:
            expected[slot] = rows[budget + i]
    assert torch.equal(whole._rows, expected)


_FULL = """
import sys, torch
from pathlib import Path
from svdquant.ptq.capture import _Reservoir
reservoir = _Reservoir(Path(sys.argv[1]) / "a.rows", 1024, torch.Generator())
try:
    reservoir.add(torch.ones(1024, 256))
except OSError as error:
    sys.exit(error.errno)
"""


def test_a_full_disk_is_an_error_not_a_signal(tmp_path):
    """In a process of its own, which writing to a mapped file without room would end by SIGBUS."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    environment = os.environ | {"PYTHONPATH": str(Path(svdquant.__file__).parents[1])}
    try:
        done = subprocess.run([sys.executable, "-c", _FULL, str(tmp_path)], env=environment, capture_output=True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == errno.ENOSPC, done.stderr.decode()


def test_without_posix_the_file_is_filled(tmp_path, monkeypatch):
    monkeypatch.delattr("os.posix_fallocate")
    store = capture(model(), groups("a"), forwards(numbered(0, 5)), tmp_path, 200_000, 0)
    assert torch.equal(store.inputs("a").rows, numbered(0, 5))
