"""Whole scripts: the form of 2024, and a model put into a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import nunchaku_files as files
import pytest
import standins
import tiny
import torch
from diffusers import FluxPipeline

import svdquant
from svdquant import SVDQuantError, nunchaku
from svdquant.nunchaku.caching.diffusers_adapters import apply_cache_on_pipe
from svdquant.nunchaku.pipelines import flux as nunchaku_flux


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit pipeline folder."""
    return standins.save("flux", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    transformer = standins.PIPELINES["flux"]().transformer.bfloat16()
    # Published files know no rotation.
    svdquant.quantize(transformer, tiny.config(rotate=False))
    return transformer


def draw(pipe: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 16}
    return tiny.quiet(pipe)("a cat", generator=generator, output_type="np", **options).images


@pytest.mark.parametrize("container", ["single", "folder", "blocks", "ours"])
def test_the_form_of_2024(container: str, base: Path, model: Any, tmp_path: Path) -> None:
    path = tmp_path / ("model" if container == "folder" else "model.safetensors")
    if container == "ours":
        svdquant.save_model(model, path)
    else:
        svdquant.save_model(model, path, format="nunchaku", **({"blocks_only": True} if container == "blocks" else {}))
    pipe = nunchaku_flux.from_pretrained(str(base), torch_dtype=torch.bfloat16, qmodel_path=str(path))
    assert type(pipe) is FluxPipeline
    assert isinstance(pipe.transformer, nunchaku.NunchakuFluxTransformer2dModel)
    image = draw(pipe.to("cpu"))
    assert image.shape == (1, 16, 16, 3) and np.isfinite(image).all()
    loaded = svdquant.load_model(path, torch_dtype=torch.bfloat16, base=base)
    again = FluxPipeline.from_pretrained(base, transformer=loaded, torch_dtype=torch.bfloat16)
    assert (draw(again) == image).all()


def test_the_form_of_2024_with_a_4_bit_text_encoder(base: Path, model: Any, tmp_path: Path) -> None:
    path = svdquant.save_model(model, tmp_path / "model.safetensors", format="nunchaku")
    config = standins.t5().config.to_dict()
    wanted = {k: config[k] for k in files.CONFIGS["t5"] if k in config}
    encoder = files.write_single(tmp_path / "awq.safetensors", files.make("t5", wanted), files.metadata("t5", wanted))
    pipe = nunchaku_flux.from_pretrained(
        base, torch_dtype=torch.bfloat16, qmodel_path=path, qencoder_path=encoder, qmodel_device="cpu"
    )
    assert isinstance(pipe.text_encoder_2, nunchaku.NunchakuT5EncoderModel)
    assert draw(pipe).shape == (1, 16, 16, 3)


def test_errors_of_the_form_of_2024(base: Path, model: Any, tmp_path: Path) -> None:
    (tmp_path / "svdq-w4a16-t5.pt").write_bytes(b"pickle")
    with pytest.raises(SVDQuantError, match="is a pickle, which can run code"):
        nunchaku_flux.from_pretrained(base, qencoder_path=tmp_path / "svdq-w4a16-t5.pt")
    path = svdquant.save_model(model, tmp_path / "model.safetensors", format="nunchaku")
    with pytest.raises(SVDQuantError, match="is no pipeline that diffusers can load"):
        nunchaku_flux.from_pretrained(tmp_path, qmodel_path=path)


def test_schnell_with_the_cache(base: Path, model: Any, tmp_path: Path) -> None:
    path = svdquant.save_model(model, tmp_path / "model.safetensors", format="nunchaku")
    transformer = nunchaku.NunchakuFluxTransformer2dModel.from_pretrained(path)
    pipe = FluxPipeline.from_pretrained(base, transformer=transformer, torch_dtype=torch.bfloat16)
    expected = draw(pipe)
    apply_cache_on_pipe(pipe, residual_diff_threshold=1e-9)
    assert (draw(pipe) == expected).all()
    transformer.set_attention_impl("nunchaku-fp16")
    assert np.abs(draw(pipe) - expected).mean() < 0.02
