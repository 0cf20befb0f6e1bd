"""Keys and values of the text with 8- or 4-bit weights: solved, stored, loaded and run."""

import diffusers
import pytest
import torch

import svdquant
from svdquant import SVDQuantConfig


def pixart():
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=64, cross_attention_dim=128, caption_channels=64,
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip


def draw(model):
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 64)))
    added = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        return model(latents, text, torch.tensor([500, 500]), added_cond_kwargs=added).sample


def error(y, reference):
    return ((y - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("stored", "levels"), [("int8", 127), ("int4", 7)])
def test_text_keys_and_values_are_stored_and_loaded(stored, levels, tmp_path):
    model = pixart()
    names = [f"transformer_blocks.{i}.attn2.{leaf}" for i in range(2) for leaf in ("to_k", "to_v")]
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    config = SVDQuantConfig(rank=16, smooth=False, activations="none", skip=["*.ff.*", "attn1"], text_kv=stored)
    svdquant.quantize(model, config)
    for name, weight in originals.items():
        layer = model.get_submodule(name)
        x = torch.eye(layer.in_features)
        stored_weight = (layer(x) - layer.bias).T
        groups = weight.float().view(len(weight), 1 if stored == "int8" else -1, 128 if stored == "int8" else 64)
        # Rounding to the nearest of evenly spaced values is off by half a step at most.
        step = groups.abs().amax(-1, keepdim=True) / levels
        off = (stored_weight.view_as(groups) - groups).abs()
        assert (off <= 0.51 * step + 2e-3 * groups.abs().amax()).float().mean() > 0.99
    expected = draw(model)
    svdquant.save_model(model, tmp_path)
    loaded = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded), expected)
    dense = draw(pixart())
    assert 0 < error(expected, dense) < 0.3
