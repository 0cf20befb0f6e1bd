"""What is downloaded for which path; huggingface_hub is played by a folder."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from svdquant import SVDQuantError
from svdquant.checkpoint import hub
from svdquant.checkpoint.hub import fetch, looks_like_hub_file, looks_like_hub_id

SVDQUANT = {"quantization_config": {"quant_method": "svdquant"}}
LITE = {"quantization_config": {"quant_method": "nunchaku_lite"}}


class Hub:
    """`repos`: id → file name → content. Downloads copy into `cache`; `calls` records what was asked for."""

    def __init__(self, cache: Path) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.cache = cache
        self.calls: list[dict[str, Any]] = []

    def files(self, repo: str) -> dict[str, Any]:
        if repo not in self.repos:
            raise RepositoryNotFoundError("404 Client Error. More text", response=_Response())  # type: ignore[arg-type]
        return self.repos[repo]

    def list_repo_files(self, repo: str, **options: Any) -> list[str]:
        self.calls.append({"list": repo} | options)
        return list(self.files(repo))

    def hf_hub_download(self, repo: str, name: str, **options: Any) -> str:
        self.calls.append({"file": f"{repo}/{name}"} | options)
        if name not in self.files(repo):
            raise EntryNotFoundError("404")
        return str(self.write(repo, name))

    def snapshot_download(self, repo: str, allow_patterns: list[str] | None = None, **options: Any) -> str:
        self.calls.append({"snapshot": repo} | options)
        if not options.get("local_files_only"):
            for name in self.files(repo):
                if allow_patterns is None or any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                    self.write(repo, name)
        if not (self.cache / repo).is_dir():
            raise FileNotFoundError("no such snapshot")
        return str(self.cache / repo)

    def write(self, repo: str, name: str) -> Path:
        path = self.cache / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self.files(repo)[name]
        path.write_text(json.dumps(content) if isinstance(content, dict) else str(content))
        return path

    def downloaded(self, repo: str) -> set[str]:
        root = self.cache / repo
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


class _Response:
    status_code, headers, request, text = 404, {}, None, ""  # type: ignore[var-annotated]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    it = Hub(tmp_path / "cache")
    for name in ("list_repo_files", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(it, name))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return it


def test_what_looks_like_a_hub_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = ("org/repo/a.safetensors", "org/repo/sub/b.sft", "org/repo.v1/sub/sub/c.safetensors", "org/repo/t5.pt")
    assert all(looks_like_hub_file(path) and not looks_like_hub_id(path) for path in files)
    assert looks_like_hub_id("org/repo") and not looks_like_hub_file("org/repo")
    neither = ("./org/repo/a.safetensors", "/org/repo/a.safetensors", "org/a.safetensors", "a", "org/repo/config.json")
    assert not any(looks_like_hub_file(path) or looks_like_hub_id(path) for path in (*neither, "~/a/b.safetensors"))
    (tmp_path / "org" / "repo").mkdir(parents=True)
    assert not looks_like_hub_file("org/repo/missing.safetensors"), "a missing file of a folder that exists"
    assert not looks_like_hub_id("org/repo")
    assert not looks_like_hub_id("x/" + "y" * 5000)


def test_local_paths_are_returned(world: Hub, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("")
    assert fetch(file) == file and fetch(str(tmp_path)) == tmp_path
    assert fetch(tmp_path / "missing") == tmp_path / "missing"
    assert fetch(tmp_path, subfolder="inner") == tmp_path / "inner"
    assert not world.calls


def test_a_file_by_its_name(world: Hub) -> None:
    world.repos["org/repo"] = {"a.safetensors": "A", "sub/b.safetensors": "B"}
    access = {"revision": "v1", "token": "secret", "cache_dir": None, "unrelated": 1}
    assert fetch("org/repo/a.safetensors", **access).read_text() == "A"
    assert fetch("org/repo/sub/b.safetensors").read_text() == "B"
    assert fetch("org/repo/b.safetensors", subfolder="sub").read_text() == "B"
    assert world.calls[0] == {"file": "org/repo/a.safetensors", "revision": "v1", "token": "secret"}
    with pytest.raises(SVDQuantError, match=r"org/repo: has no c\.safetensors; see https://huggingface"):
        fetch("org/repo/c.safetensors")
    with pytest.raises(SVDQuantError, match="pickle files can run code"):
        fetch("org/repo/svdq-w4a16-t5.pt")
    with pytest.raises(
        SVDQuantError,
        match=r"^org/other/a\.safetensors: is no local path and could not be loaded from the Hub \(404 Client Error\)",
    ):
        fetch("org/other/a.safetensors")


def test_folder_layouts_are_downloaded_whole(world: Hub) -> None:
    content = {
        "config.json": {"_class_name": "FluxTransformer2DModel"},
        "comfy_config.json": {},
        "transformer_blocks.safetensors": "",
        "unquantized_layers.safetensors": "",
        "README.md": "",
        "old/model.safetensors": "",
    }
    world.repos["org/flux"] = content
    assert fetch("org/flux", revision="main") == world.cache / "org/flux"
    assert world.downloaded("org/flux") == {n for n in content if "/" not in n and not n.endswith(".md")}
    world.repos["org/t5"] = {"config.json": {}, "svdq-t5.safetensors": "", "model.safetensors": "", "x.bin": ""}
    assert fetch("org/t5") == world.cache / "org/t5"
    assert world.downloaded("org/t5") == {"config.json", "svdq-t5.safetensors", "model.safetensors"}


def test_the_only_checkpoint_of_a_repository(world: Hub) -> None:
    world.repos["org/sana"] = {"svdq-int4_r32-sana1.6b.safetensors": "S", "README.md": ""}
    assert fetch("org/sana").read_text() == "S"
    world.repos["org/t5"] = {"config.json": {"d_model": 1}, "awq-int4-flux.1-t5xxl.safetensors": "T"}
    path = fetch("org/t5")
    assert path.read_text() == "T" and (path.parent / "config.json").is_file()
    world.repos["org/nested"] = {"a/x.safetensors": "X", "b/y.safetensors": "Y"}
    assert fetch("org/nested", subfolder="a").read_text() == "X"


def test_of_several_one_is_to_be_named(world: Hub) -> None:
    names = ["svdq-fp4_r32-flux.1-dev.safetensors", "svdq-int4_r32-flux.1-dev.safetensors"]
    world.repos["org/flux"] = dict.fromkeys(names, "")
    with pytest.raises(SVDQuantError) as caught:
        fetch("org/flux")
    assert (
        str(caught.value)
        == f"org/flux: holds several checkpoints; name one of org/flux/{names[0]}, org/flux/{names[1]}"
    )


def test_repositories_that_diffusers_loads_stay_ids(world: Hub) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    world.repos = {
        "org/own": {"config.json": SVDQUANT, weights: ""},
        "org/plain": {"config.json": {"_class_name": "X"}, "diffusion_pytorch_model-00001-of-00002.safetensors": ""},
        "org/pipe": {"model_index.json": {}, "transformer/config.json": SVDQUANT, f"transformer/{weights}": ""},
        "org/sdxl": {"model_index.json": {}, "unet/config.json": {}, "sd_xl_base.safetensors": ""},
        "org/empty": {"README.md": ""},
    }
    for repo in world.repos:
        assert fetch(repo) == Path(repo)


def test_nunchaku_lite_is_downloaded(world: Hub) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    world.repos["org/lite"] = {"config.json": LITE, weights: "", "README.md": ""}
    assert fetch("org/lite") == world.cache / "org/lite"
    assert world.downloaded("org/lite") == {"config.json", weights}
    world.repos["org/pipe"] = {
        "model_index.json": {},
        "transformer/config.json": LITE,
        f"transformer/{weights}": "",
        "vae/config.json": {},
        f"vae/{weights}": "",
    }
    assert fetch("org/pipe") == world.cache / "org/pipe"
    assert world.downloaded("org/pipe") == {"model_index.json", "transformer/config.json", f"transformer/{weights}"}


def test_pickles_are_refused(world: Hub) -> None:
    world.repos["org/old"] = {"pytorch_model.bin": "", "README.md": ""}
    with pytest.raises(SVDQuantError, match=r"org/old/pytorch_model\.bin: pickle files can run code"):
        fetch("org/old")


def test_without_network(world: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SVDQuantError, match="run `hf download org/flux` elsewhere and give the folder"):
        fetch("org/flux")
    with pytest.raises(SVDQuantError, match="could not be loaded from the Hub"):
        fetch("org/flux", local_files_only=True)
    world.repos["org/flux"] = {"svdq-int4_r32-flux.1-dev.safetensors": "F"}
    expected = fetch("org/flux")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    world.calls.clear()
    assert fetch("org/flux") == expected
    assert not any("list" in call for call in world.calls), "what has been downloaded is found without asking"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def unplugged(repo: str, **_: Any) -> list[str]:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unplugged)
    assert fetch("org/flux") == expected
    with pytest.raises(SVDQuantError, match="Name or service not known"):
        fetch("org/other")


def test_a_model_by_its_hub_path(world: Hub, tmp_path: Path) -> None:
    """From the path to the model; the file comes from the Hub's cache."""
    import nunchaku_files as files

    from svdquant.nunchaku import NunchakuFluxTransformer2dModel

    config = files.CONFIGS["flux"]
    local = files.write_single(tmp_path / "x.safetensors", files.make("flux", config), files.metadata("flux", config))
    name = "svdq-int4_r32-flux.1-dev.safetensors"
    world.repos["nunchaku-tech/nunchaku-flux.1-dev"] = {name: ""}

    def write(repo: str, name: str) -> Path:
        path = world.cache / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(local, path)
        return path

    world.write = write  # type: ignore[method-assign]
    for path in (f"nunchaku-tech/nunchaku-flux.1-dev/{name}", "nunchaku-tech/nunchaku-flux.1-dev"):
        model = NunchakuFluxTransformer2dModel.from_pretrained(path, cache_dir="cache", token="secret")
        assert isinstance(model, NunchakuFluxTransformer2dModel)
    assert world.calls[0] == {
        "file": f"nunchaku-tech/nunchaku-flux.1-dev/{name}",
        "cache_dir": "cache",
        "token": "secret",
    }
    assert hub.looks_like_hub_file(f"nunchaku-tech/nunchaku-flux.1-dev/{name}")
