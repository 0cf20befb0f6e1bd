"""Plans of the published models, from their configurations alone: what is quantized, how large it is, what stays."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch

from svdquant import SVDQuantConfig
from svdquant.ptq.linears import find_linears
from svdquant.ptq.plan import make_plan

CONFIGS = Path(__file__).parent / "configs"
OUTSIDE, SHARED = "embedding, final norm or projection", "modulation shared by all blocks"
TEXT, PICTURE = "reads the text of a cross-attention", "reads the picture of a cross-attention"
RESNET, REFINER = "part of a residual network of convolutions", "refines the text for all blocks"
ENTERS, LEAVES = "enters a transformer of the UNet", "leaves a transformer of the UNet"
FF = "transformer_blocks.N.ff.net.N"
CONTEXT = "transformer_blocks.N.ff_context.net.N"
SINGLE = "single_transformer_blocks.N.proj_out"


@dataclass
class Row:
    """billions: of parameters; gb: before and after, 10⁹ bytes; kept: reason → per cent of the 16-bit model."""

    name: str
    family: str
    billions: float
    linears: int
    svdquant: int
    w4a16: int
    groups: int
    gb: tuple[float, float]
    kept: dict[str, float]
    unsigned: tuple[str, ...] = ()


ROWS = [
    Row("flux.1-dev", "flux", 11.901, 504, 418, 76, 304, (23.803, 6.687), {OUTSIDE: 0.5}, (SINGLE, FF, CONTEXT)),
    Row("flux.1-schnell", "flux", 11.891, 502, 418, 76, 304, (23.782, 6.667), {OUTSIDE: 0.5}, (SINGLE, FF, CONTEXT)),
    Row("flux.2-dev", "flux2", 32.223, 203, 192, 0, 160, (64.447, 18.725), {OUTSIDE: 0.8, SHARED: 1.8}),
    Row("flux.2-klein-4b", "flux2", 3.876, 109, 100, 0, 80, (7.751, 2.443), {OUTSIDE: 1.4, SHARED: 3.7}),
    Row("flux.2-klein-9b", "flux2", 9.079, 153, 144, 0, 112, (18.157, 5.520), {OUTSIDE: 1.1, SHARED: 2.8}),
    Row("sana-0.6b", "sana", 0.592, 287, 224, 0, 168, (1.183, 0.493), {OUTSIDE: 1.0, SHARED: 1.3, TEXT: 12.6}),
    Row("sana-1.6b", "sana", 1.604, 207, 160, 0, 120, (3.209, 1.299), {OUTSIDE: 1.0, SHARED: 1.9, TEXT: 12.5}),
    Row(
        "pixart-sigma", "pixart", 0.611, 286, 224, 0, 168, (1.222, 0.504), {OUTSIDE: 1.3, SHARED: 1.3, TEXT: 12.2},
        (FF,),
    ),
    Row(
        "sdxl-base", "unet", 2.567, 754, 560, 0, 420, (5.135, 2.568),
        {OUTSIDE: 0.3, RESNET: 1.2, ENTERS: 0.5, LEAVES: 0.5, TEXT: 13.3},
    ),
    Row("sd3.5-large", "sd3", 8.057, 536, 453, 76, 377, (16.113, 4.557), {OUTSIDE: 0.5}, (FF, CONTEXT)),
    Row("sd3.5-medium", "sd3", 2.243, 392, 337, 48, 263, (4.486, 1.318), {OUTSIDE: 0.9}, (FF, CONTEXT)),
    Row(
        "qwen-image", "qwen-image", 20.430, 846, 720, 120, 600, (40.861, 11.353), {OUTSIDE: 0.2},
        ("transformer_blocks.N.img_mlp.net.N", "transformer_blocks.N.txt_mlp.net.N"),
    ),
    Row("z-image", "z-image", 6.155, 276, 238, 32, 168, (12.310, 3.450), {OUTSIDE: 0.2}),
    Row(
        "wan2.1-t2v-1.3b", "wan", 1.419, 306, 240, 0, 180, (2.838, 1.078), {OUTSIDE: 0.8, SHARED: 1.0, TEXT: 10.0},
        ("blocks.N.ffn.net.N",),
    ),
    Row(
        "wan2.1-t2v-14b", "wan", 14.288, 406, 320, 0, 240, (28.577, 11.278), {OUTSIDE: 0.5, SHARED: 1.1, TEXT: 14.7},
        ("blocks.N.ffn.net.N",),
    ),
    Row(
        "wan2.1-i2v-14b", "wan", 16.395, 488, 320, 0, 240, (32.790, 15.491),
        {OUTSIDE: 0.5, SHARED: 1.0, TEXT: 12.8, PICTURE: 12.8}, ("blocks.N.ffn.net.N",),
    ),
    Row(
        "wan2.2-ti2v-5b", "wan", 5.000, 306, 240, 0, 180, (10.000, 3.763), {OUTSIDE: 0.7, SHARED: 1.1, TEXT: 11.3},
        ("blocks.N.ffn.net.N",),
    ),
    Row("ltx-video-2b", "ltx", 1.923, 287, 224, 0, 168, (3.847, 1.514), {OUTSIDE: 0.9, SHARED: 1.3, TEXT: 12.2}, (FF,)),
    Row(
        "ltx-video-13b", "ltx", 13.043, 487, 384, 0, 288, (26.085, 9.807), {OUTSIDE: 0.4, SHARED: 0.8, TEXT: 12.4},
        (FF,),
    ),
    Row(
        "ltx-2", "ltx2", 18.876, 1370, 1152, 0, 864, (37.752, 14.055), {OUTSIDE: 0.6, SHARED: 1.2, TEXT: 10.7},
        ("transformer_blocks.N.audio_ff.net.N", FF),
    ),
    Row(
        "hunyuanvideo", "hunyuan-video", 12.821, 547, 440, 80, 360, (25.642, 7.625), {OUTSIDE: 0.8, REFINER: 2.1},
        (SINGLE, FF, CONTEXT),
    ),
    Row(
        "hunyuanvideo-1.5", "hunyuan-video", 8.327, 784, 648, 108, 540, (16.653, 4.936), {OUTSIDE: 0.6, REFINER: 1.4},
        (FF, CONTEXT),
    ),
]  # fmt: skip
# Published models whose denoisers differ in the channels or the size of their latents at most.
LATENTS = ("in_channels", "out_channels", "sample_size")
ALIKE = {
    "flux.1-kontext-dev": "flux.1-dev",
    "flux.1-fill-dev": "flux.1-dev",
    "flux.1-depth-dev": "flux.1-dev",
    "flux.1-canny-dev": "flux.1-dev",
    "sdxl-turbo": "sdxl-base",
    "qwen-image-edit": "qwen-image",
    "z-image-turbo": "z-image",
    "wan2.2-t2v-a14b": "wan2.1-t2v-14b",
}


def read(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


@cache
def model(name):
    config = read(name)
    with torch.device("meta"):
        made = getattr(diffusers, config.pop("_class_name")).from_config(config)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return made


@cache
def plan(name):
    return make_plan(model(name), SVDQuantConfig())


def pattern(name):
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)


def test_every_configuration_is_planned():
    assert {path.stem for path in CONFIGS.glob("*.json")} == {row.name for row in ROWS} | set(ALIKE)
    for name, other in ALIKE.items():
        latents = dict.fromkeys(LATENTS)
        assert read(name) | latents == read(other) | latents
    inputs = {name: model(name).x_embedder.in_features for name in ("flux.1-fill-dev", "flux.1-depth-dev")}
    assert inputs == {"flux.1-fill-dev": 384, "flux.1-depth-dev": 128}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_plan(row):
    check(row, model(row.name), plan(row.name))


def check(row, model, made):
    assert (made.family, made.traced) == (row.family, True)
    assert set(made.layers) == set(find_linears(model))
    kinds = Counter(layer.kind for layer in made.layers.values())
    assert (len(made.layers), kinds["svdquant"], kinds["w4a16"]) == (row.linears, row.svdquant, row.w4a16)
    assert len(made.groups) == row.groups

    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e9 == pytest.approx(row.billions, abs=6e-4)
    assert made.bytes_before == 2 * parameters
    assert (made.bytes_before / 1e9, made.bytes_after / 1e9) == pytest.approx(row.gb, rel=1e-3)

    kept: Counter[str] = Counter()
    for layer in made.layers.values():
        if layer.kind == "keep":
            kept[layer.reason] += layer.bytes_before
    assert {why: 100 * size / made.bytes_before for why, size in kept.items()} == pytest.approx(row.kept, abs=0.06)

    unsigned = {pattern(name) for name, layer in made.layers.items() if layer.spec and layer.spec.unsigned}
    assert unsigned == set(row.unsigned)


# Bytes of one linear of k inputs and n outputs, stored: codes, a 16-bit scale per 64 inputs, bias.
def weights_only(k, n, bias):
    groups = -(-k // 64)
    return n * groups * 64 // 2 + 2 * n * groups + 2 * n * bias


# With two factors of rank 32 and a smooth factor. Rotated in blocks of 128, so that inputs are padded to them.
def svdquant(k, n, bias):
    return weights_only(-(-k // 128) * 128, n, bias) + 2 * 32 * (k + n) + 2 * k


def joint_blocks(d, ff=4):
    """(inputs, outputs, how many) of a block with two streams."""
    return [(d, d, 8), (d, ff * d, 2), (ff * d, d, 2)]


D1, D2, DQ, DZ, DS = 3072, 6144, 3072, 3840, 2240
# (how many blocks, (inputs, outputs, how many, bias) of linears with a branch, the same of modulation).
BLOCKS = {
    "flux.1-dev": [
        (19, [(k, n, c, 1) for k, n, c in joint_blocks(D1)], [(D1, 6 * D1, 2, 1)]),
        (38, [(D1, D1, 3, 1), (D1, 4 * D1, 1, 1), (5 * D1, D1, 1, 1)], [(D1, 3 * D1, 1, 1)]),
    ],
    "flux.2-dev": [
        (8, [(D2, D2, 8, 0), (D2, 6 * D2, 2, 0), (3 * D2, D2, 2, 0)], []),
        (48, [(D2, 9 * D2, 1, 0), (4 * D2, D2, 1, 0)], []),
    ],
    "qwen-image": [(60, [(k, n, c, 1) for k, n, c in joint_blocks(DQ)], [(DQ, 6 * DQ, 2, 1)])],
    "z-image": [
        (34, [(DZ, DZ, 4, 0), (DZ, 10240, 2, 0), (10240, DZ, 1, 0)], []),
        (32, [], [(256, 4 * DZ, 1, 1)]),
    ],
    # 2240 and 5600 inputs fill no whole number of rotated blocks.
    "sana-1.6b": [(20, [(DS, DS, 3, 0), (DS, DS, 3, 1), (DS, 5 * DS, 1, 1), (5600, DS, 1, 0)], [])],
    "hunyuanvideo": [
        (20, [(k, n, c, 1) for k, n, c in joint_blocks(D1)], [(D1, 6 * D1, 2, 1)]),
        (40, [(D1, D1, 3, 1), (D1, 4 * D1, 1, 1), (5 * D1, D1, 1, 1)], [(D1, 3 * D1, 1, 1)]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_bytes_by_hand(name):
    rest = sum(p.numel() for p in model(name).parameters())
    stored = 0
    for blocks, branched, modulation in BLOCKS[name]:
        for size, linears in ((svdquant, branched), (weights_only, modulation)):
            for k, n, count, bias in linears:
                stored += blocks * count * size(k, n, bias)
                rest -= blocks * count * (k * n + n * bias)
    assert plan(name).bytes_after == stored + 2 * rest


def group_of(name, layer):
    made = plan(name)
    return {
        m.name.rpartition("blocks.")[2] for g in made.groups if g.name == made.layers[layer].group for m in g.members
    }


def test_linears_that_share_an_input():
    assert group_of("flux.2-dev", "transformer_blocks.1.attn.add_v_proj") == {f"1.attn.add_{x}_proj" for x in "qkv"}
    assert group_of("z-image", "layers.7.feed_forward.w3") == {f"layers.7.feed_forward.w{i}" for i in (1, 3)}
    # Sound reads the picture, and the picture sound: queries from one, keys and values from the other.
    reads_sound = "transformer_blocks.5.audio_to_video_attn."
    assert group_of("ltx-2", reads_sound + "to_v") == {"5.audio_to_video_attn.to_k", "5.audio_to_video_attn.to_v"}
    assert group_of("ltx-2", reads_sound + "to_q") == {"5.audio_to_video_attn.to_q"}


def test_the_second_attention_of_sd3_5_medium_reads_the_picture():
    """It has one beside "attn", not beside "attn1", in the first 13 blocks."""
    seconds = [layer for name, layer in plan("sd3.5-medium").layers.items() if ".attn2.to_" in name]
    assert len(seconds) == 13 * 4 and {layer.kind for layer in seconds} == {"svdquant"}
    untraced = make_plan(model("sd3.5-medium"), SVDQuantConfig(), traces={})
    assert untraced.layers["transformer_blocks.0.attn2.to_k"].kind == "svdquant"
    assert group_of("sd3.5-medium", "transformer_blocks.0.attn2.to_k") == {f"0.attn2.to_{x}" for x in "qkv"}


@pytest.mark.parametrize("name", ["ltx-2", "pixart-sigma", "sdxl-base", "wan2.1-i2v-14b", "sana-1.6b", "flux.2-dev"])
def test_names_alone_keep_the_same(name):
    """Without a trace nothing tells of a GELU, but no layer is quantized that should stay."""
    untraced = make_plan(model(name), SVDQuantConfig(), traces={})
    assert not untraced.traced
    kept = [
        {(n, layer.reason) for n, layer in made.layers.items() if layer.kind == "keep"}
        for made in (plan(name), untraced)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("stored", "group_size"), [("int8", 0), ("int4", 64)])
def test_keys_and_values_of_the_text_may_be_stored_smaller(stored, group_size):
    made = make_plan(model("pixart-sigma"), SVDQuantConfig(text_kv=stored))
    keys = [layer for layer in made.layers.values() if layer.reason == "text keys and values: weights only"]
    assert len(keys) == 28 * 2 and {layer.name.rpartition(".")[2] for layer in keys} == {"to_k", "to_v"}
    for layer in keys:
        spec = layer.spec
        assert (spec.kind, spec.weights, spec.group_size, spec.rank) == ("w4a16", stored, group_size, 0)
        assert layer.bytes_after == 1152 * (1152 + 2 + 2 if stored == "int8" else 1152 // 2 + 18 * 2 + 2)
    saved = plan("pixart-sigma").bytes_after - made.bytes_after
    assert saved == sum(layer.bytes_before - layer.bytes_after for layer in keys)


def test_chromas_network_of_modulations_stays():
    """Its error would be every block's, as that of the one linear that other models have for this."""
    with torch.device("meta"):
        made = make_plan(diffusers.ChromaTransformer2DModel(num_layers=1, num_single_layers=1), SVDQuantConfig())
    assert made.traced and made.family == "chroma"
    guidance = {layer.reason for name, layer in made.layers.items() if name.startswith("distilled_guidance_layer.")}
    assert guidance == {"modulation shared by all blocks"}
    assert {layer.block for layer in made.layers.values() if layer.kind != "keep"} == {
        "transformer_blocks.0",
        "single_transformer_blocks.0",
    }
