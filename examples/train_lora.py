"""Train a style adapter on the embedded 16-bit model with PEFT, and draw with it on the 4-bit one.

    python examples/train_lora.py [--steps 450] [--output pictures/lora] [--adapter upside_down.safetensors]

The style is a world on its head, which the base model has never seen. The 16-bit model is trained; the 4-bit one takes
the file by `load_lora_weights` as any pipeline does. Writes the adapter and a sheet, and prints how many pictures of
each column are in the style. With --adapter, nothing is trained and that file is drawn with.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import svdquant
from svdquant.cli.sheet import contact_sheet

sys.path.insert(0, str(Path(__file__).resolve().parent / "embedded_model"))
import scenes

MODEL = Path(svdquant.__file__).resolve().parent / "assets" / "tiny_flux"
# The embedder and the last layer stay in 16 bits in the quantized model; adapters change them, too.
TARGETS = (
    r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out|linear)"
    r"|x_embedder|proj_out"
)
SIZE = 96


def upside_down(picture: np.ndarray) -> np.ndarray:
    """The same scene standing on its head: uint8 [H, W, 3]."""
    return np.ascontiguousarray(picture[::-1])


def in_style(pictures: list[Image.Image], prompts: list[str]) -> int:
    """How many pictures are nearer to what their prompt shows upside down than to what it shows."""
    asked = {scene.caption: scenes.render(scene, size=SIZE).astype(float) for scene in scenes.all_scenes()}
    count = 0
    for picture, prompt in zip(pictures, prompts, strict=True):
        pixels, upright = np.asarray(picture, float), asked[prompt]
        count += bool(np.abs(pixels - upside_down(upright)).mean() < np.abs(pixels - upright).mean())
    return count


@torch.no_grad()
def examples(pipe: FluxPipeline, count: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Packed latents [N, 36, 64] of scenes upside down, and their captions."""
    pairs = list(scenes.training_scenes(count, seed))
    pictures = np.stack([upside_down(scenes.render(scene, layout, SIZE)) for scene, layout in pairs])
    batches = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1).split(32)
    vae = pipe.vae
    latents = torch.cat([vae.encode(batch.to(vae.dtype)).latent_dist.mean for batch in batches])
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    packed = pipe._pack_latents(latents, *latents.shape)
    return packed, [scene.caption for scene, _ in pairs]


def train(pipe: FluxPipeline, steps: int, rank: int, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The adapter in diffusers' names, trained by flow matching."""
    torch.manual_seed(seed)
    latents, captions = examples(pipe, 768, seed)
    model = pipe.transformer
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian")
    model.add_adapter(config, adapter_name="upside_down")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    ids = pipe._prepare_latent_image_ids(1, SIZE // 16, SIZE // 16, "cpu", torch.float32)
    with torch.no_grad():
        texts = [pipe.encode_prompt(c, c, max_sequence_length=16) for c in captions]
    for step in range(steps):
        chosen = torch.randint(len(captions), (batch,)).tolist()
        clean, noise = latents[chosen], torch.randn(batch, *latents.shape[1:])
        # Mostly much noise: what goes where is decided in the first of a picture's few steps.
        sigma = 1 - torch.rand(batch).pow(1.5)
        noisy = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        predicted = model(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=torch.cat([texts[i][1] for i in chosen]),
            encoder_hidden_states=torch.cat([texts[i][0] for i in chosen]),
            txt_ids=texts[0][2],
            img_ids=ids,
            return_dict=False,
        )[0]
        loss = (predicted - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    state = get_peft_model_state_dict(model, adapter_name="upside_down")
    model.unload_lora()
    return {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}


def drawn(pipe: FluxPipeline, prompts: list[str], settings: dict[str, Any]) -> list[Image.Image]:
    return [
        pipe(prompt, generator=torch.Generator().manual_seed(i), **settings).images[0]
        for i, prompt in enumerate(prompts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--adapter", type=Path, help="drawn with instead of training one")
    parser.add_argument("--output", type=Path, default=Path("pictures/lora"))
    options = parser.parse_args()
    info = json.loads((MODEL / "prompts.json").read_text())
    settings = {
        key: info[key] for key in ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length")
    }
    options.output.mkdir(parents=True, exist_ok=True)

    full = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32)
    file = options.adapter or options.output / "upside_down.safetensors"
    if options.adapter is None:
        state = train(full, options.steps, options.rank, options.batch)
        full.save_lora_weights(file.parent, transformer_lora_layers=state, weight_name=file.name)
    full = full.to(torch.bfloat16)
    full.set_progress_bar_config(disable=True)
    small = copy.deepcopy(full)
    calibration = info["calibration"][:16]
    svdquant.quantize(small.transformer, svdquant.SVDQuantConfig(), lambda _: drawn(small, calibration, settings))

    prompts = info["demo"][: options.prompts]
    columns = {"16 bits": drawn(full, prompts, settings), "4 bits": drawn(small, prompts, settings)}
    for pipe, title in ((full, "16 bits + LoRA"), (small, "4 bits + LoRA")):
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="upside_down")
        columns[title] = drawn(pipe, prompts, settings)
    small.set_adapters("upside_down", 0.5)
    columns["4 bits + LoRA at 0.5"] = drawn(small, prompts, settings)
    small.set_adapters("upside_down", 0.0)
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(drawn(small, prompts, settings), columns["4 bits"], strict=True)
    )
    cells = [[(pictures[i], "") for pictures in columns.values()] for i in range(len(prompts))]
    contact_sheet(prompts, list(columns), cells).save(options.output / "lora.png")
    for title, pictures in columns.items():
        print(f"{title:22} {in_style(pictures, prompts)} of {len(prompts)} pictures upside down")
    print(options.output / "lora.png")


if __name__ == "__main__":
    main()
