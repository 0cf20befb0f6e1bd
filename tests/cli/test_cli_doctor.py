"""What `svdquant doctor` says of the compiled library."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from svdquant.kernels.cpu import library


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """found(status): what looking for the library found."""

    def set_status(status: library.Status) -> None:
        loaded = library.Library(None, status.isa, status.path) if status.available else None  # type: ignore[arg-type]
        monkeypatch.setattr(library, "_found", (loaded, status, None))

    monkeypatch.delenv("SVDQUANT_BACKEND", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    return set_status


def test_library_in_use(command: Callable, found: Callable) -> None:
    found(library.Status(True, "avx512", "/lib/cpu.so", "libgomp", "", ("avx512", "avx2")))
    done = command("doctor")
    assert "int8 activations, native" in done.out
    assert "compiled products: avx512 (this CPU also runs avx2), threads of torch's libgomp, /lib/cpu.so" in done.out
    assert "compiled" not in done.out.partition("warning")[2]
    data = json.loads(command("doctor", "--json").out)
    assert data["devices"][0]["backend"] == "native"
    assert data["devices"][0]["library"] == {
        "available": True,
        "isa": "avx512",
        "path": "/lib/cpu.so",
        "threads": "libgomp",
        "reason": "",
        "variants": ["avx512", "avx2"],
        "threads_reason": "",
    }


def test_library_on_one_thread(command: Callable, found: Callable) -> None:
    found(library.Status(True, "avx2", "/lib/cpu.so", "none", "", ("avx2",), "this build of torch has no OpenMP"))
    done = command("doctor")
    assert "compiled products: avx2, on one thread, /lib/cpu.so" in done.out
    assert "warning: products on this CPU run on one thread: this build of torch has no OpenMP" in done.out


def test_no_library(command: Callable, found: Callable) -> None:
    reason = "this processor is too old: the library needs AVX2"
    found(library.Status(False, reason=reason))
    done = command("doctor")
    assert "int8 activations, dequantize" in done.out and "compiled products: none" in done.out
    assert f"warning: no compiled products on this CPU, it dequantizes and is slower: {reason}" in done.out
    assert json.loads(command("doctor", "--json").out)["devices"][0]["library"]["reason"] == reason


def test_variables_are_shown(command: Callable, found: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    found(library.Status(False, reason="SVDQUANT_CPU_LIBRARY=0 turns it off"))
    monkeypatch.setenv("SVDQUANT_CPU_LIBRARY", "0")
    assert json.loads(command("doctor", "--json").out)["environment"]["SVDQUANT_CPU_LIBRARY"] == "0"


def test_unknown_variant(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    if not library.status().available:
        pytest.skip(library.status().reason)
    monkeypatch.setenv("SVDQUANT_CPU_ISA", "sse9")
    monkeypatch.setattr(library, "_found", None)
    done = command("doctor")
    assert done.code == 2 and "SVDQUANT_CPU_ISA='sse9' is not one of" in done.err
