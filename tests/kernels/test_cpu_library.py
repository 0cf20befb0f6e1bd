"""The compiled library: when it is used, why not where it is not, and the threads that it borrows."""

from __future__ import annotations

import collections
import ctypes
import ctypes.util
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from svdquant import SVDQuantError
from svdquant.kernels.cpu import library, threads

TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)


@pytest.fixture
def fresh(monkeypatch):
    """The library is looked for again, now and after the test; its variant and threads are as before."""
    before = library.status()
    if not before.available:
        pytest.skip(before.reason)
    monkeypatch.delenv("SVDQUANT_CPU_LIBRARY", raising=False)
    monkeypatch.delenv("SVDQUANT_CPU_ISA", raising=False)
    monkeypatch.setattr(library, "_found", None)
    yield before
    monkeypatch.undo()
    cdll = library.load().cdll
    cdll.svdq_select(before.isa.encode())
    cdll.svdq_set_runtime(*threads.find_runtime().pointers)


@pytest.fixture
def parallel_for(fresh):
    """parallel_for(tasks, threads, function of (index, worker))."""
    function = library.load().cdll.svdq_parallel_for
    function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int32, TASK, ctypes.c_void_p], None
    return lambda tasks, number, do: function(tasks, number, TASK(lambda _, index, worker: do(index, worker)), None)


def test_status(fresh):
    found = library.status()
    assert found.available and not found.reason and found.isa in found.variants
    assert Path(found.path).is_file() and library.load().path == found.path
    assert library.load() is library.load()
    if torch.backends.openmp.is_available():
        assert found.threads in ("libgomp", "libomp") and not found.threads_reason


def test_first_use_from_many_threads(fresh):
    found, barrier = [], threading.Barrier(8)

    def use():
        barrier.wait()
        found.append(library.load())

    users = [threading.Thread(target=use) for _ in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len({id(one) for one in found}) == 1 and len(found) == 8


def test_switched_off(fresh, monkeypatch):
    monkeypatch.setenv("SVDQUANT_CPU_LIBRARY", "0")
    assert library.load() is None
    assert library.status() == library.Status(False, reason="SVDQUANT_CPU_LIBRARY=0 turns it off")


def test_named_library(fresh, monkeypatch, tmp_path):
    copy = tmp_path / "copy.so"
    shutil.copy(fresh.path, copy)
    monkeypatch.setenv("SVDQUANT_CPU_LIBRARY", str(copy))
    assert library.load().path == str(copy)


def refused(monkeypatch, path: Path | str) -> str:
    monkeypatch.setenv("SVDQUANT_CPU_LIBRARY", str(path))
    monkeypatch.setattr(library, "_found", None)
    assert library.load() is None
    found = library.status()
    assert not found.available and not found.isa and "\n" not in found.reason
    return found.reason


def test_files_that_are_not_the_library(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    whole = Path(fresh.path).read_bytes()
    for size in (0, 3, 40, 64, 100, 4096, len(whole) // 2):
        broken.write_bytes(whole[:size])
        assert "cannot be loaded" in refused(monkeypatch, broken), size
    broken.write_bytes(b"\x7fELF" + bytes(range(256)) * 40)
    assert "cannot be loaded" in refused(monkeypatch, broken)
    broken.write_text("int main;")
    assert refused(monkeypatch, broken).endswith("name another one in SVDQUANT_CPU_LIBRARY, or unset it")
    assert "is not a file" in refused(monkeypatch, tmp_path)
    assert "is not a file" in refused(monkeypatch, tmp_path / "nothing.so")
    other = ctypes.util.find_library("z") if sys.platform == "linux" else None
    for folder in ("/lib/x86_64-linux-gnu", "/usr/lib64") if other else ():
        if Path(folder, other).is_file():
            assert "is not a library of svdquant" in refused(monkeypatch, f"{folder}/{other}")


def test_missing_from_the_installation(fresh, monkeypatch, tmp_path):
    from svdquant.kernels.cpu import build

    monkeypatch.setattr(build, "LIBRARIES", tmp_path)
    assert library.load() is None
    assert "lacks the compiled library for" in library.status().reason
    assert "pip install --force-reinstall svdquant" in library.status().reason
    monkeypatch.setattr(library, "_found", None)
    monkeypatch.setattr(build, "host_target", lambda: None)
    assert library.load() is None
    assert library.status().reason == "there is no compiled library for this platform"


def test_another_interface(fresh, monkeypatch):
    monkeypatch.setattr(library, "ABI_VERSION", 1000)
    assert library.load() is None
    assert "this version of svdquant needs 1000: `pip install" in library.status().reason


def test_processor_too_old(fresh, monkeypatch, tmp_path):
    """A library without any variant is what an old processor sees."""
    from svdquant.kernels.cpu import build

    every = [variant.name for variants in build.VARIANTS.values() for variant in variants]
    try:
        (path,) = build.build(out=tmp_path, without=every)
    except build.BuildError as error:
        if "no C compiler" not in str(error):
            raise
        pytest.skip(str(error))
    assert refused(monkeypatch, path).startswith("this processor is too old")


def test_variant_by_name(fresh, monkeypatch):
    slowest = fresh.variants[-1]
    monkeypatch.setenv("SVDQUANT_CPU_ISA", slowest)
    assert library.load().isa == slowest and library.status().isa == slowest
    for name in ("sse9", "AVX2", ","):
        monkeypatch.setenv("SVDQUANT_CPU_ISA", name)
        monkeypatch.setattr(library, "_found", None)
        for _ in range(2):
            with pytest.raises(SVDQuantError, match=f"SVDQUANT_CPU_ISA='{name}' is not one of .*{slowest}"):
                library.load()
        assert not library.status().available and slowest in library.status().reason


def test_import_with_nonsense_in_the_environment():
    code = "import svdquant.kernels.cpu.library as l; s = l.status(); print(s.available, s.reason)"
    env = os.environ | {"SVDQUANT_CPU_ISA": "sse9", "SVDQUANT_CPU_LIBRARY": "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False SVDQUANT_CPU_LIBRARY=/nowhere is not a file")


def check_loop(parallel_for, tasks: int, number: int) -> int:
    """Every task once, every worker one thread; returns how many threads there were."""
    seen, idents = [], collections.defaultdict(set)

    def task(index: int, worker: int) -> None:
        seen.append(index)
        idents[worker].add(threading.get_ident())
        time.sleep(1e-4)

    parallel_for(tasks, number, task)
    assert sorted(seen) == list(range(tasks))
    assert set(idents) <= set(range(number))
    assert all(len(threads_) == 1 for threads_ in idents.values())
    return len(idents)


@pytest.mark.parametrize("tasks", [0, 1, 2, 3, 100])
def test_every_task_once(parallel_for, tasks):
    for number in (1, 2, 3, 8):
        assert check_loop(parallel_for, tasks, number) <= max(min(tasks, number), 0)


def test_several_threads_take_part(parallel_for):
    if library.status().threads == "none":
        pytest.skip(library.status().threads_reason)
    assert max(check_loop(parallel_for, 100, 4) for _ in range(5)) > 1


def test_loops_from_several_threads(parallel_for):
    errors = []

    def user():
        try:
            for number in (2, 3, 4):
                check_loop(parallel_for, 30, number)
        except BaseException as error:
            errors.append(error)

    users = [threading.Thread(target=user) for _ in range(6)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    assert not errors


def test_loops_within_loops(parallel_for):
    inner = []
    parallel_for(10, 3, lambda *_: parallel_for(5, 4, lambda index, _: inner.append(index)))
    assert sorted(inner) == sorted(list(range(5)) * 10)


def test_torch_without_openmp(fresh, monkeypatch):
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    found = library.status()
    assert found.available and found.threads == "none" and "no OpenMP" in found.threads_reason
    idents = set()
    function = library.load().cdll.svdq_parallel_for
    function(
        ctypes.c_int64(20), ctypes.c_int32(4), TASK(lambda *_: idents.add(threading.get_ident())), ctypes.c_void_p()
    )
    assert idents == {threading.get_ident()}


FORK = """
import ctypes, os, signal, torch
from svdquant.kernels.cpu import library
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
seen = []
task = TASK(lambda _, index, worker: seen.append(index))
loop = lambda: library.load().cdll.svdq_parallel_for(ctypes.c_int64(50), ctypes.c_int32(4), task, None)
loop()
child = os.fork()
if child == 0:
    signal.alarm(20)
    loop()
    os._exit(0 if len(seen) == 100 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_in_a_forked_process(fresh):
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
