"""Memory of large results: used again, never while anybody can see it."""

from __future__ import annotations

import gc
import os
import threading

import cpu_truth
import pytest
import torch
from cpu_truth import BF16

from svdquant.kernels import svdquant_linear
from svdquant.kernels.cpu import results

pytestmark = pytest.mark.skipif(not results._FLAGS, reason="no private maps on this system")

LIKE = torch.empty(0, dtype=BF16)
COLUMNS = 4096
ROWS = results.LARGE // COLUMNS // 2


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    results._free.clear()
    yield
    results._free.clear()


def kept() -> int:
    return sum(len(memory) for memory in results._free)


def test_small_results_are_torchs_own():
    y = results.new_result(LIKE, ROWS - 1, COLUMNS)
    assert y.shape == (ROWS - 1, COLUMNS) and y.untyped_storage().resizable()
    del y
    assert not kept()


def test_freed_memory_is_the_next_results():
    y = results.new_result(LIKE, ROWS, COLUMNS)
    assert y.shape == (ROWS, COLUMNS) and y.dtype == BF16 and y.is_contiguous() and y.data_ptr() % 4096 == 0
    address = y.data_ptr()
    del y
    assert kept() == results.LARGE
    again = results.new_result(LIKE, ROWS, COLUMNS)
    assert again.data_ptr() == address and not kept()


@pytest.mark.parametrize("share", [lambda y: y[5:9, ::2], lambda y: y.detach(), lambda y: y.numpy(), lambda y: y.T])
def test_whatever_shares_it_keeps_it(share):
    y = results.new_result(LIKE.float(), ROWS, COLUMNS).fill_(3)
    other, address = share(y), y.data_ptr()
    del y
    assert not kept()
    new = results.new_result(LIKE.float(), ROWS, COLUMNS).fill_(7)
    assert new.data_ptr() != address
    assert bool((torch.as_tensor(other) == 3).all())


def test_no_memory_for_what_is_much_smaller_or_larger():
    results.new_result(LIKE, 2 * ROWS, COLUMNS)
    y = results.new_result(LIKE, ROWS, COLUMNS)
    assert kept() == 2 * results.LARGE
    del y
    larger = results.new_result(LIKE, 3 * ROWS, COLUMNS)
    assert kept() == 3 * results.LARGE and larger.numel() == 3 * ROWS * COLUMNS


def test_what_is_kept_is_bounded_and_the_newest():
    held = [results.new_result(LIKE, ROWS, COLUMNS) for _ in range(results.KEPT // results.LARGE + 3)]
    addresses = [y.data_ptr() for y in held]
    while held:
        held.pop(0)
    assert kept() == results.KEPT
    assert results.new_result(LIKE, ROWS, COLUMNS).data_ptr() == addresses[-1]


def test_one_that_is_larger_than_all_that_is_kept_drives_nothing_out(monkeypatch):
    monkeypatch.setattr(results, "KEPT", 2 * results.LARGE)
    results.new_result(LIKE, ROWS, COLUMNS)
    results.new_result(LIKE, 3 * ROWS, COLUMNS)
    assert kept() == results.LARGE
    results.forget()
    assert not kept()


def test_without_memory_to_map_what_is_kept_is_given_up_first(monkeypatch):
    def full(*_args, **_options):
        raise OSError("no memory")

    results.new_result(LIKE, ROWS, COLUMNS)
    monkeypatch.setattr(results.mmap, "mmap", full)
    y = results.new_result(LIKE, 2 * ROWS, COLUMNS)
    assert y.untyped_storage().resizable() and not kept()


def test_the_linear_uses_it_and_its_bits_are_those_of_other_memory(path):
    if path == "dequantize":
        pytest.skip("dequantized products are torch's")
    n, k = 1024, 64
    rows = results.LARGE // n // 2
    t, x = cpu_truth.layer(k, n), cpu_truth.inputs(rows, k, BF16)
    expected = torch.empty(rows, n, dtype=BF16)
    svdquant_linear(x, t, "int8", out=expected)
    first = svdquant_linear(x, t, "int8")
    address = first.data_ptr()
    assert torch.equal(first, expected)
    first.fill_(float("nan"))
    del first
    second = svdquant_linear(x, t, "int8")
    assert second.data_ptr() == address and torch.equal(second, expected)


def test_threads_never_share_a_result():
    wrong = []

    def work(value: int) -> None:
        for _ in range(12):
            y = results.new_result(LIKE, ROWS, COLUMNS).fill_(value)
            if not bool((y[::97] == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and kept() <= results.KEPT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_does_not_write_into_its_parents():
    y = results.new_result(LIKE, ROWS, COLUMNS).fill_(1)
    child = os.fork()
    if not child:
        y.view(torch.int16).numpy()[:] = 0
        os._exit(0)
    os.waitpid(child, 0)
    assert bool((y == 1).all())


def test_a_gradient_and_inference_mode_go_through_it():
    with torch.inference_mode():
        y = results.new_result(LIKE, ROWS, COLUMNS)
        assert y.is_inference()
    leaf = results.new_result(LIKE, ROWS, COLUMNS).zero_().requires_grad_()
    (2 * leaf).sum().backward()
    assert leaf.grad is not None and bool((leaf.grad == 2).all())
