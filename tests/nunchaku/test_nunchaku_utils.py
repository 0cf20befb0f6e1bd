"""The helpers, on a machine without GPU and on pretended ones."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from svdquant import SVDQuantError
from svdquant.nunchaku import utils


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    properties = SimpleNamespace(total_memory=24 * 1024**3, name="Pretended")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_without_a_gpu() -> None:
    assert utils.get_precision() == "int4" and not utils.is_turing()
    host = psutil.virtual_memory().total
    assert utils.get_gpu_memory() == host // 1024**3 and utils.get_gpu_memory(unit="MiB") == host // 1024**2
    assert utils.get_gpu_memory("cpu", "B", return_gpu_name=True) == (host, "CPU")


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((7, 5), "int4"), ((8, 9), "int4"), ((9, 0), "int4"), ((10, 0), "fp4"), ((12, 0), "fp4"), ((12, 1), "fp4")],
)
def test_on_gpus(capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability)
    assert utils.get_precision() == precision
    assert utils.is_turing() == (capability == (7, 5))
    assert utils.get_gpu_memory(return_gpu_name=True) == (24, "Pretended")
    for group, dtype in ((64, "int4"), (16, "fp4_e2m1_all")):
        utils.check_hardware_compatibility({"weight": {"dtype": dtype, "group_size": group}}, "cuda")


def test_named_precisions() -> None:
    assert utils.get_precision("fp4") == utils.get_precision("nvfp4") == "fp4"
    assert utils.get_precision("int4", "cuda", "org/repo/svdq-fp4_r32-flux.1-dev.safetensors") == "int4"
    with pytest.raises(SVDQuantError, match="precision='int2' is not one of"):
        utils.get_precision("int2")


def test_precision_of_a_record() -> None:
    def record(dtype: str, group: int) -> dict[str, Any]:
        return {"weight": {"dtype": dtype, "group_size": group}}

    assert utils.get_precision_from_quantization_config(record("int4", 64)) == "int4"
    assert utils.get_precision_from_quantization_config(record("fp4_e2m1_all", 16)) == "nvfp4"
    with pytest.raises(SVDQuantError, match="neither int4 nor nvfp4"):
        utils.get_precision_from_quantization_config(record("fp4_e2m1_all", 32))


def test_tensors_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x.weight": torch.ones(2), "y": torch.zeros(1)}, path, {"config": "{}"})
    tensors, metadata = utils.load_state_dict_in_safetensors(path, filter_prefix="x.", return_metadata=True)
    assert list(tensors) == ["weight"] and metadata == {"config": "{}"}
    whole = utils.load_state_dict_in_safetensors(path)
    assert utils.filter_state_dict(whole, "x.").keys() == {"weight"} and len(whole) == 2
    assert utils.fetch_or_download(path) == path
    assert utils.sha256sum(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(SVDQuantError, match="repo_type='dataset'"):
        utils.fetch_or_download(path, repo_type="dataset")


def test_arithmetic() -> None:
    assert [utils.ceil_divide(x, 4) for x in (0, 1, 4, 5)] == [0, 1, 1, 2]
    padded = utils.pad_tensor(torch.ones(2, 3), 4, 1, fill=7)
    assert padded is not None and padded.tolist() == [[1, 1, 1, 7]] * 2
    same = torch.ones(4)
    assert utils.pad_tensor(same, 4, 0) is same and utils.pad_tensor(None, 4, 0) is None


def test_parameters_are_copied() -> None:
    source, target = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        source.weight.fill_(3)
        source.running_mean.fill_(5)  # type: ignore[union-attr,operator]
    utils.copy_params_into(source, target)
    assert target.weight.tolist() == [3, 3] and target.running_mean.tolist() == [5, 5]  # type: ignore[union-attr,operator]
    with pytest.raises(SVDQuantError, match="only one of the two modules"):
        utils.copy_params_into(torch.nn.Linear(1, 1), target)
    with pytest.raises(SVDQuantError, match="bias has another shape"):
        utils.copy_params_into(torch.nn.Linear(1, 1), target, strict=False)
