"""What a job on disk is known by when it is continued, and what is left of one that cannot be finished."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fine_tunes as ft
import pytest
import standins
import torch
from original_layouts import ORIGINAL
from safetensors.torch import load_file, save_file
from torch import Tensor

from svdquant import SVDQuantConfig, SVDQuantError
from svdquant.checkpoint.streaming import ShardWriter
from svdquant.integrations.fine_tune import bare_file
from svdquant.integrations.on_disk import quantize_pipeline
from svdquant.integrations.pipeline import PipelineOptions
from svdquant.integrations.skeletons import skeleton

CONFIG = SVDQuantConfig(rank=16, smooth=2, gptq=False, calibration_rows=64)
OPTIONS = PipelineOptions(height=16, width=16, max_sequence_length=16)
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"
DAMAGED = "transformer_blocks.1.attn.to_q.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that draws, in two steps unless told otherwise."""
    folder = standins.save("flux_dev", tmp_path_factory.mktemp("whole"))
    (folder / "prompts.json").write_text(json.dumps({"num_inference_steps": 2, "demo": ["a cat"]}))
    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "transformer").glob("*.safetensors"))}


def stopped(model: Path, out: Path, config: SVDQuantConfig = CONFIG, **arguments: Any) -> None:
    """After the first solved group."""

    def progress(stage: str, done: int, *_: Any) -> None:
        if stage == "solve" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(model, out, config, options=OPTIONS, progress=progress, **arguments)


def test_what_decides_the_pictures_decides_whether_a_job_goes_on(whole: Path, tmp_path: Path) -> None:
    """What the pipeline's own files say about drawing counts as the prompts and the options do."""
    source, out = Path(shutil.copytree(whole, tmp_path / "source")), tmp_path / "out"
    stopped(source, out, prompts=["a dog"])

    def again(prompt: str = "a dog") -> None:
        quantize_pipeline(source, out, CONFIG, prompts=[prompt], options=OPTIONS)

    for name, change in (
        ("prompts.json", {"num_inference_steps": 3}),
        ("prompts.json", {"guidance_scale": 2.0}),
        ("scheduler/scheduler_config.json", {"shift": 2.0}),
        ("scheduler/scheduler_config.json", {}),
    ):
        before = (source / name).read_text()
        (source / name).write_text(json.dumps(json.loads(before) | change))
        with pytest.raises(SVDQuantError, match="was begun with other calibration; repeat that command"):
            again("a dog" if change else "another dog")
        (source / name).write_text(before)
    # Prompts that are not drawn from are nothing to it.
    said = json.loads((source / "prompts.json").read_text())
    (source / "prompts.json").write_text(json.dumps(said | {"demo": ["a horse"]}))
    again()
    assert not (tmp_path / "out.partial").exists()


def damaged(whole: Path, folder: Path, value: Tensor) -> Path:
    shutil.copytree(whole, folder)
    save_file(load_file(whole / WEIGHTS) | {DAMAGED: value}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("prompts", [None, ["a dog"]], ids=["data-free", "calibrated"])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.full((128, 128), 1e30), r"holds numbers as large as 1e\+30, which no trained weight is; download"),
        (torch.full((128, 128), float("nan")), "holds NaN or infinity; download"),
    ],
    ids=["1e30", "nan"],
)
def test_damaged_weights(whole: Path, tmp_path: Path, value: Tensor, sentence: str, prompts: list[str] | None) -> None:
    """The tensor is named, also where pictures are drawn first; the folder beside the output goes."""
    source = damaged(whole, tmp_path / "source", value.bfloat16())
    with pytest.raises(SVDQuantError, match=rf"^transformer_blocks\.1\.attn\.to_q\.weight {sentence}"):
        quantize_pipeline(source, tmp_path / "out", CONFIG, prompts=prompts, options=OPTIONS)
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(SVDQuantError, match=sentence):
        quantize_pipeline(source / WEIGHTS, tmp_path / "out", CONFIG, base=str(whole), options=OPTIONS)
    assert list(tmp_path.iterdir()) == [source]


def test_weights_of_another_shape(whole: Path, tmp_path: Path) -> None:
    source = damaged(whole, tmp_path / "source", torch.zeros(128, 64))
    with pytest.raises(SVDQuantError, match=r"has shape .* belong to another model or configuration"):
        quantize_pipeline(source, tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == [source]


def test_what_float16_does_not_hold_once_quantized(whole: Path, tmp_path: Path) -> None:
    """The remedy is another type, which helps."""
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    state = {name: value.half() for name, value in load_file(whole / WEIGHTS).items()}
    save_file(state | {DAMAGED: torch.full((128, 128), 6e4, dtype=torch.float16)}, source / WEIGHTS)
    config = SVDQuantConfig(rank=16, gptq=False)
    with pytest.raises(SVDQuantError, match=r"does not fit into float16 once quantized; use --dtype bfloat16, or keep"):
        quantize_pipeline(source, tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == [source]
    quantize_pipeline(source, tmp_path / "out", config, dtype="bfloat16")


def test_one_shard_stands_for_its_set(whole: Path, tmp_path: Path) -> None:
    """As it comes from a download page: the index beside it says what the others are."""
    writer = ShardWriter(tmp_path, "model", 200_000)
    for name, value in ORIGINAL["flux"](load_file(whole / WEIGHTS)).items():
        writer.add(name, value)
    writer.finish()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = tmp_path / "model.safetensors.index.json"
    assert len(shards) > 3 and {bare_file(shard) for shard in shards} == {index}
    quantize_pipeline(shards[1], tmp_path / "out", CONFIG, base=str(whole))
    quantize_pipeline(whole, tmp_path / "same", CONFIG)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "same")
    alone = Path(shutil.copy(shards[0], tmp_path / "alone-00001-of-00001.safetensors"))
    assert bare_file(alone) == alone
    index.rename(tmp_path / "elsewhere.json")
    sentence = rf"is one of {len(shards)} parts of a model, and {index.name} is not beside it; download the whole set"
    for call in (
        lambda: quantize_pipeline(shards[1], tmp_path / "no", CONFIG, base=str(whole)),
        lambda: skeleton(shards[1]),
    ):
        with pytest.raises(SVDQuantError, match=sentence):
            call()


@pytest.mark.parametrize("name", ["MODEL.SAFETENSORS", "model.Safetensors", "M.SFT"])
def test_upper_case_is_no_other_format(whole: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    file = ft.write(folder / name, ORIGINAL["flux"](load_file(whole / WEIGHTS)))
    assert bare_file(folder) == bare_file(file) == file
    assert type(skeleton(file)).__name__ == "FluxTransformer2DModel"
    quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(whole))
    assert weights_of(tmp_path / "out")


@pytest.mark.parametrize("name", ["MODEL.CKPT", "model.Pt", "MODEL.GGUF"])
def test_nor_are_pickles_in_upper_case(whole: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"GGUF")
    with pytest.raises(SVDQuantError, match=r"pickle files can run code|GGUF holds quantized weights"):
        quantize_pipeline(file, tmp_path / "out", CONFIG, base=str(whole))
