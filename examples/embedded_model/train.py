"""Train the miniature FLUX pipeline on procedural scenes: VAE first, then transformer and text encoders together."""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import string
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import check
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

ASSETS = Path(__file__).resolve().parents[2] / "src" / "svdquant" / "assets" / "tiny_flux"
SIZE = 96
LATENT = SIZE // 8
TOKENS = LATENT // 2
MAX_SEQUENCE_LENGTH = 16
CLIP_LENGTH = 32
STEPS = 12
TEXT_WIDTH = 128
BATCH = 32
LATENT_NOISE = 0.1
DECODER_NOISE = 0.05
CHECKPOINT_SECONDS = 180


@dataclass
class Clock:
    """How far a stage has come: by steps if a number of steps is given, else by minutes spent in it."""

    minutes: float
    steps: int | None = None
    step: int = 0
    seconds: float = 0.0

    @property
    def fraction(self) -> float:
        """0 at the start, 1 or more when the stage is over."""
        done, goal = (self.seconds, 60 * self.minutes) if self.steps is None else (self.step, self.steps)
        return done / goal if goal > 0 else 1.0

    def ticks(self) -> Iterator[int]:
        """Step numbers until the stage is over."""
        last = time.monotonic()
        while self.fraction < 1:
            yield self.step
            now = time.monotonic()
            self.seconds, self.step, last = self.seconds + now - last, self.step + 1, now


def log(*words: object) -> None:
    """Progress to stderr."""
    print(*words, file=sys.stderr, flush=True)


def save(state: dict | torch.Tensor, path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the previous one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def build_vae() -> AutoencoderKL:
    """FLUX's VAE in miniature: 8 times smaller pictures of 16 channels."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIZE,
    )


def render_training_set(count: int, seed: int) -> tuple[torch.Tensor, list[scenes.Scene]]:
    """Pictures uint8 [count, 3, 96, 96] of training combinations, and their scenes."""
    pairs = list(scenes.training_scenes(count, seed))
    images = np.stack([scenes.render(scene, layout, SIZE) for scene, layout in pairs])
    return torch.from_numpy(images).permute(0, 3, 1, 2), [scene for scene, _ in pairs]


def as_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to floats in [-1, 1], channels last."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def picture_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the pixels, and L1 of the image gradients to keep outlines sharp."""
    error = prediction - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def psnr(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Decibels between pictures in [-1, 1]."""
    return (10 * torch.log10(4 / F.mse_loss(prediction.detach(), target))).item()


def train_vae(images: torch.Tensor, clock: Clock, work: Path) -> AutoencoderKL:
    """Train or resume the VAE on pictures uint8 [N, 3, 96, 96]."""
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
    path = work / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        clock.step, clock.seconds = state["step"], state["seconds"]
    generator = torch.Generator().manual_seed(clock.step)

    def checkpoint() -> None:
        state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "step": clock.step, "seconds": clock.seconds}, path)

    saved = clock.seconds
    for step in clock.ticks():
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - clock.fraction) + 1e-5
        target = as_input(images[torch.randint(len(images), (8,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(target).latent_dist.mean
            output = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample.float()
        loss = picture_loss(output, target)
        loss = loss + 1e-3 * mean.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log(f"vae step {step} {clock.seconds:.0f}s loss {loss.item():.4f} psnr {psnr(output, target):.2f}")
        if clock.seconds - saved > CHECKPOINT_SECONDS:
            saved = clock.seconds
            checkpoint()
    checkpoint()
    return vae.eval()


def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latent means, float32 [N, 16, 12, 12], before scaling."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(as_input(some)).latent_dist.mean.float() for some in images.split(64)])


def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Decibels between pictures, uint8 [N, 3, 96, 96], and their reconstructions, in the VAE's own dtype."""
    with torch.no_grad():
        target = as_input(images)
        latents = vae.encode(target.to(vae.dtype)).latent_dist.mean
        output = vae.decode(latents).sample.float().clamp(-1, 1)
    return psnr(output, target)


def finish_vae(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Set shift and scale so that latents have unit variance, and the untrained log-variance to that of the noise."""
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    with torch.no_grad():
        vae.encoder.conv_out.weight[16:] = 0
        vae.encoder.conv_out.bias[16:] = 2 * math.log(LATENT_NOISE)


def polish_decoder(vae: AutoencoderKL, images: torch.Tensor, latents: torch.Tensor, clock: Clock, work: Path) -> None:
    """Train or resume the decoder alone; latents [N, 16, 12, 12], before scaling, stay what they are."""
    decoder = vae.decoder.train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    path = work / "decoder.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        clock.step, clock.seconds = state["step"], state["seconds"]
    generator = torch.Generator().manual_seed(clock.step + 1)

    def checkpoint() -> None:
        state = {"decoder": decoder.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "step": clock.step, "seconds": clock.seconds}, path)

    saved = clock.seconds
    for step in clock.ticks():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - clock.fraction) + 1e-5
        chosen = torch.randint(len(images), (8,), generator=generator)
        target = as_input(images[chosen])
        noise = torch.randn(latents[chosen].shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = decoder(latents[chosen] + DECODER_NOISE * noise).float()
        loss = picture_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            log(f"decoder step {step} {clock.seconds:.0f}s loss {loss.item():.4f} psnr {psnr(output, target):.2f}")
        if clock.seconds - saved > CHECKPOINT_SECONDS:
            saved = clock.seconds
            checkpoint()
    checkpoint()
    vae.eval()


def build_t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """One piece for each word, single characters for the rest."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + word, -2.0) for word in words if len(word) > 1]
    pieces += [(",", -2.0), ("\u2581a", -2.0)]
    pieces += [(character, -8.0) for character in string.ascii_letters + string.digits + ".!?'-"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)


def build_clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Byte-level BPE whose merges build exactly the given words, letter by letter."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    # Long words first: a short word's merge must not break up a longer word that contains its letters.
    for word in sorted(words, key=lambda word: (-len(word), word)):
        letters = [*word[:-1], word[-1] + "</w>"]
        prefix = letters[0]
        for letter in letters[1:]:
            if (prefix, letter) not in merges:
                merges.append((prefix, letter))
                tokens.append(prefix + letter)
            prefix += letter
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)


def build_text_encoders(
    t5_tokenizer: T5TokenizerFast, clip_tokenizer: CLIPTokenizer
) -> tuple[T5EncoderModel, CLIPTextModel]:
    """The two text encoders of FLUX.1, two layers of width 128 each, without dropout."""
    t5 = T5Config(
        vocab_size=round_up(len(t5_tokenizer)),
        d_model=TEXT_WIDTH,
        d_kv=64,
        d_ff=256,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    clip = CLIPTextConfig(
        vocab_size=round_up(len(clip_tokenizer)),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    return T5EncoderModel(t5), CLIPTextModel(clip)


def round_up(count: int, multiple: int = 64) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def build_transformer() -> FluxTransformer2DModel:
    """FLUX.1-schnell's transformer with width 256 in 2 double and 4 single blocks."""
    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        in_channels=64,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )


class Denoiser(torch.nn.Module):
    """Everything that is trained in the second stage, and the forward pass of FluxPipeline."""

    def __init__(self, t5_tokenizer: T5TokenizerFast, clip_tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.t5, self.clip = build_text_encoders(t5_tokenizer, clip_tokenizer)
        self.transformer = build_transformer()
        image_ids = FluxPipeline._prepare_latent_image_ids(1, TOKENS, TOKENS, "cpu", torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(MAX_SEQUENCE_LENGTH, 3), persistent=False)

    def forward(
        self, latents: torch.Tensor, time: torch.Tensor, t5_tokens: torch.Tensor, clip_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Velocity [B, 36, 64] for latents [B, 36, 64] at time [B] in 0..1, tokens [B, 16] and [B, 32]."""
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=self.t5(t5_tokens)[0],
            pooled_projections=self.clip(clip_tokens).pooler_output,
            timestep=time,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
        ).sample


def training_captions(drawn: list[scenes.Scene], seed: int) -> list[str]:
    """The caption of each scene; one in ten leaves out a phrase so that shorter prompts work too."""
    rng = random.Random(seed)
    captions = []
    for scene in drawn:
        subject, *rest = scene.phrases()
        if rng.random() < 0.1:
            del rest[rng.randrange(3)]
            captions.append(", ".join([subject, *rest]))
        else:
            captions.append(scene.caption)
    return captions


def tokenize(tokenizer: T5TokenizerFast | CLIPTokenizer, captions: list[str], length: int) -> torch.Tensor:
    """Token ids [N, length], padded as FluxPipeline pads them."""
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def export_pipeline(folder: Path, vae: AutoencoderKL, model: Denoiser, tokenizers: tuple, settings: dict) -> None:
    """Write a bfloat16 FluxPipeline beside `folder`, then swap it in; README.md stays."""
    fresh = folder.with_name(folder.name + ".new")
    stale = folder.with_name(folder.name + ".old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    t5_tokenizer, clip_tokenizer = tokenizers
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=copy.deepcopy(vae).to(torch.bfloat16),
        text_encoder=copy.deepcopy(model.clip).to(torch.bfloat16),
        tokenizer=clip_tokenizer,
        text_encoder_2=copy.deepcopy(model.t5).to(torch.bfloat16),
        tokenizer_2=t5_tokenizer,
        transformer=copy.deepcopy(model.transformer).to(torch.bfloat16),
    )
    pipeline.save_pretrained(fresh)
    (fresh / "prompts.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if (folder / "README.md").exists():
        shutil.copy2(folder / "README.md", fresh / "README.md")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def prompt_settings(seed: int = 0) -> dict:
    """The content of prompts.json."""
    training, held_out = scenes.split()
    calibration = random.Random(seed).sample(training, 64)
    demo: list[scenes.Scene] = []
    for name in scenes.OBJECTS:
        candidates = [scene for scene in held_out if scene.object == name]

        def repeats(scene: scenes.Scene) -> int:
            return sum(
                (weight * (getattr(scene, attribute) == getattr(other, attribute)))
                for other in demo
                for attribute, weight in (("colour", 5), ("time", 2), ("place", 2), ("ground", 2))
            )

        demo.append(min(candidates, key=repeats))
    return {
        "calibration": [scene.caption for scene in calibration],
        "held_out": [scene.caption for scene in held_out],
        "demo": [scene.caption for scene in demo],
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": STEPS,
        "guidance_scale": 0.0,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
    }


def evaluate(folder: Path) -> dict[str, float]:
    """The attribute check on the held-out prompts, drawn by the saved folder."""
    pipeline = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    _, held_out = scenes.split()
    pictures = check.draw(pipeline, [scene.caption for scene in held_out], STEPS, MAX_SEQUENCE_LENGTH, SIZE)
    return check.score(pictures, held_out)


def train_denoiser(
    latents: torch.Tensor, captions: list[str], vae: AutoencoderKL, clock: Clock, arguments: argparse.Namespace
) -> None:
    """Train or resume transformer and text encoders on unit-variance latents [N, 16, 12, 12]."""
    words = scenes.vocabulary()
    tokenizers = build_t5_tokenizer(words), build_clip_tokenizer(words)
    t5_tokens = tokenize(tokenizers[0], captions, MAX_SEQUENCE_LENGTH)
    clip_tokens = tokenize(tokenizers[1], captions, CLIP_LENGTH)
    latents = FluxPipeline._pack_latents(latents, len(latents), 16, LATENT, LATENT)
    model = Denoiser(*tokenizers)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    path = arguments.work / "denoiser.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        clock.step, clock.seconds = state["step"], state["seconds"]
    generator = torch.Generator().manual_seed(arguments.seed + clock.step)
    parameters, averages = list(model.parameters()), list(average.parameters())
    settings = prompt_settings()

    def checkpoint() -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        save({**state, "step": clock.step, "seconds": clock.seconds}, path)

    def export() -> None:
        export_pipeline(arguments.out, vae, average, tokenizers, settings)
        shares = {name: round(share, 3) for name, share in evaluate(arguments.out).items()}
        log(f"exported step {clock.step}: {shares}")

    saved, exported, recent = clock.seconds, clock.seconds, []
    for step in clock.ticks():
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 200) * min(1, 2 * (1 - clock.fraction)) + 1e-6
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        moment = torch.sigmoid(torch.randn(len(clean), generator=generator))
        mixed = torch.lerp(clean, noise, moment[:, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(mixed, moment, t5_tokens[chosen], clip_tokens[chosen])
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, parameters, 1 - min(0.999, (step + 1) / (step + 10)))
        recent.append(loss.item())
        if step % 100 == 0:
            log(f"denoiser step {step} {clock.seconds:.0f}s loss {sum(recent) / len(recent):.4f}")
            recent = []
        if clock.seconds - saved > CHECKPOINT_SECONDS:
            saved = clock.seconds
            checkpoint()
        if clock.seconds - exported > 60 * arguments.export_minutes:
            exported = clock.seconds
            export()
    checkpoint()
    export()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; an interrupted run resumes")
    parser.add_argument("--out", type=Path, default=ASSETS, help="pipeline folder to write")
    parser.add_argument("--vae-minutes", type=float, default=17)
    parser.add_argument("--decoder-minutes", type=float, default=20, help="for the decoder alone, after the VAE")
    parser.add_argument("--minutes", type=float, default=50, help="for the transformer and the text encoders")
    parser.add_argument("--vae-steps", type=int, help="instead of --vae-minutes")
    parser.add_argument("--decoder-steps", type=int, help="instead of --decoder-minutes")
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--export-minutes", type=float, default=8, help="between snapshots of the pipeline folder")
    parser.add_argument("--scenes", type=int, default=17920, help="number of rendered training pictures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, exporting the pipeline folder as training goes on."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.work.mkdir(parents=True, exist_ok=True)
    images, drawn = render_training_set(arguments.scenes, arguments.seed)
    vae = train_vae(images, Clock(arguments.vae_minutes, arguments.vae_steps), arguments.work)
    cache = arguments.work / "latents.pt"
    if not cache.exists():
        save(encode(vae, images), cache)
    latents = torch.load(cache, weights_only=True)
    polish_decoder(vae, images, latents, Clock(arguments.decoder_minutes, arguments.decoder_steps), arguments.work)
    finish_vae(vae, latents)
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    _, held_out = scenes.split()
    unseen = torch.from_numpy(np.stack([scenes.render(scene, size=SIZE) for scene in held_out])).permute(0, 3, 1, 2)
    rounded = copy.deepcopy(vae).to(torch.bfloat16)
    log(f"vae psnr {reconstruction_psnr(vae, unseen):.2f} dB, bfloat16 {reconstruction_psnr(rounded, unseen):.2f} dB")
    captions = training_captions(drawn, arguments.seed)
    train_denoiser(latents, captions, vae, Clock(arguments.minutes, arguments.steps), arguments)


if __name__ == "__main__":
    main()
