"""Weights of diffusers' models under the names that their authors publish them by: the inverse of reading a fine-tune.

Written from the published modules, not from diffusers' converters, which are what is tested. Each function takes a
state dict of diffusers and returns that of the original code.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

State = dict[str, Tensor]


def _renamed(state: State, rules: list[tuple[str, str]], stacks: list[tuple[list[str], str]] = ()) -> State:
    """rules: (pattern over the whole name, new name); stacks: ([patterns of members], name of their concatenation)."""
    left, out = dict(state), {}
    for members, target in stacks:
        for name in list(left):
            match = re.fullmatch(members[0], name)
            if match is None:
                continue
            names = [re.sub(members[0], match.expand(member.replace("\\.", ".")), name) for member in _plain(members)]
            out[match.expand(target)] = torch.cat([left.pop(part) for part in names])
    for name, value in left.items():
        for pattern, new in rules:
            match = re.fullmatch(pattern, name)
            if match is not None:
                out[match.expand(new)] = value
                break
        else:
            raise AssertionError(f"no rule for {name}")
    return out


def _plain(members: list[str]) -> list[str]:
    """Templates of all members: the first is a pattern, the others are templates already."""
    first = members[0]
    for number in range(1, first.count("(") + 1):
        first = re.sub(r"\([^()]*\)", rf"\\{number}", first, count=1)
    return [first, *members[1:]]


def _shift_first(value: Tensor) -> Tensor:
    """From diffusers' [scale, shift] to the originals' [shift, scale]."""
    scale, shift = value.chunk(2)
    return torch.cat([shift, scale])


def flux(state: State) -> State:
    """Black Forest Labs' FLUX.1."""
    state = {k: _shift_first(v) if k.startswith("norm_out.linear.") else v for k, v in state.items()}
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    leaf = r"\.(weight|bias)"
    stacks = [
        ([double + r"attn\.to_q" + leaf, r"transformer_blocks.\1.attn.to_k.\2", r"transformer_blocks.\1.attn.to_v.\2"],
         r"double_blocks.\1.img_attn.qkv.\2"),
        ([double + r"attn\.add_q_proj" + leaf, r"transformer_blocks.\1.attn.add_k_proj.\2",
          r"transformer_blocks.\1.attn.add_v_proj.\2"], r"double_blocks.\1.txt_attn.qkv.\2"),
        ([single + r"attn\.to_q" + leaf, r"single_transformer_blocks.\1.attn.to_k.\2",
          r"single_transformer_blocks.\1.attn.to_v.\2", r"single_transformer_blocks.\1.proj_mlp.\2"],
         r"single_blocks.\1.linear1.\2"),
    ]  # fmt: skip
    rules = [
        (r"x_embedder\.(\w+)", r"img_in.\1"),
        (r"context_embedder\.(\w+)", r"txt_in.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"time_in.in_layer.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"time_in.out_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(\w+)", r"vector_in.in_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(\w+)", r"vector_in.out_layer.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_1\.(\w+)", r"guidance_in.in_layer.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_2\.(\w+)", r"guidance_in.out_layer.\1"),
        (double + r"norm1\.linear\.(\w+)", r"double_blocks.\1.img_mod.lin.\2"),
        (double + r"norm1_context\.linear\.(\w+)", r"double_blocks.\1.txt_mod.lin.\2"),
        (double + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale"),
        (double + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale"),
        (double + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale"),
        (double + r"attn\.to_out\.0\.(\w+)", r"double_blocks.\1.img_attn.proj.\2"),
        (double + r"attn\.to_add_out\.(\w+)", r"double_blocks.\1.txt_attn.proj.\2"),
        (double + r"ff\.net\.0\.proj\.(\w+)", r"double_blocks.\1.img_mlp.0.\2"),
        (double + r"ff\.net\.2\.(\w+)", r"double_blocks.\1.img_mlp.2.\2"),
        (double + r"ff_context\.net\.0\.proj\.(\w+)", r"double_blocks.\1.txt_mlp.0.\2"),
        (double + r"ff_context\.net\.2\.(\w+)", r"double_blocks.\1.txt_mlp.2.\2"),
        (single + r"norm\.linear\.(\w+)", r"single_blocks.\1.modulation.lin.\2"),
        (single + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (single + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (single + r"proj_out\.(\w+)", r"single_blocks.\1.linear2.\2"),
        (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
        (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    ]
    return _renamed(state, rules, stacks)


def flux2(state: State) -> State:
    """Black Forest Labs' FLUX.2, which has no biases."""
    state = {k: _shift_first(v) if k.startswith("norm_out.linear.") else v for k, v in state.items()}
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    stacks = [
        ([double + r"attn\.to_q\.weight", r"transformer_blocks.\1.attn.to_k.weight",
          r"transformer_blocks.\1.attn.to_v.weight"], r"double_blocks.\1.img_attn.qkv.weight"),
        ([double + r"attn\.add_q_proj\.weight", r"transformer_blocks.\1.attn.add_k_proj.weight",
          r"transformer_blocks.\1.attn.add_v_proj.weight"], r"double_blocks.\1.txt_attn.qkv.weight"),
    ]  # fmt: skip
    rules = [
        (r"x_embedder\.weight", r"img_in.weight"),
        (r"context_embedder\.weight", r"txt_in.weight"),
        (r"time_guidance_embed\.timestep_embedder\.linear_1\.weight", r"time_in.in_layer.weight"),
        (r"time_guidance_embed\.timestep_embedder\.linear_2\.weight", r"time_in.out_layer.weight"),
        (r"time_guidance_embed\.guidance_embedder\.linear_1\.weight", r"guidance_in.in_layer.weight"),
        (r"time_guidance_embed\.guidance_embedder\.linear_2\.weight", r"guidance_in.out_layer.weight"),
        (r"(double|single)_stream_modulation(_img|_txt|)\.linear\.weight", r"\1_stream_modulation\2.lin.weight"),
        (double + r"attn\.norm_([qk])\.weight", r"double_blocks.\1.img_attn.norm.\2.scale"),
        (double + r"attn\.norm_added_([qk])\.weight", r"double_blocks.\1.txt_attn.norm.\2.scale"),
        (double + r"attn\.to_out\.0\.weight", r"double_blocks.\1.img_attn.proj.weight"),
        (double + r"attn\.to_add_out\.weight", r"double_blocks.\1.txt_attn.proj.weight"),
        (double + r"ff\.linear_in\.weight", r"double_blocks.\1.img_mlp.0.weight"),
        (double + r"ff\.linear_out\.weight", r"double_blocks.\1.img_mlp.2.weight"),
        (double + r"ff_context\.linear_in\.weight", r"double_blocks.\1.txt_mlp.0.weight"),
        (double + r"ff_context\.linear_out\.weight", r"double_blocks.\1.txt_mlp.2.weight"),
        (single + r"attn\.to_qkv_mlp_proj\.weight", r"single_blocks.\1.linear1.weight"),
        (single + r"attn\.to_out\.weight", r"single_blocks.\1.linear2.weight"),
        (single + r"attn\.norm_([qk])\.weight", r"single_blocks.\1.norm.\2.scale"),
        (r"proj_out\.weight", r"final_layer.linear.weight"),
        (r"norm_out\.linear\.weight", r"final_layer.adaLN_modulation.1.weight"),
    ]
    out = _renamed(state, rules, stacks)
    return {k.replace("norm.q.", "norm.query_norm.").replace("norm.k.", "norm.key_norm."): v for k, v in out.items()}


def sd3(state: State) -> State:
    """Stability's MMDiT."""
    last = max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks."))
    swapped = ("norm_out.linear.", f"transformer_blocks.{last}.norm1_context.linear.")
    state = {k: _shift_first(v) if k.startswith(swapped) else v for k, v in state.items()}
    block, leaf = r"transformer_blocks\.(\d+)\.", r"\.(weight|bias)"
    stacks = [
        ([block + rf"{attn}\.{q}" + leaf, rf"transformer_blocks.\1.{attn}.{k}.\2",
          rf"transformer_blocks.\1.{attn}.{v}.\2"], rf"joint_blocks.\1.{part}_block.{attn}.qkv.\2")
        for attn, q, k, v, part in (
            ("attn", "to_q", "to_k", "to_v", "x"),
            ("attn2", "to_q", "to_k", "to_v", "x"),
            ("attn", "add_q_proj", "add_k_proj", "add_v_proj", "context"),
        )
    ]  # fmt: skip
    rules = [
        (r"pos_embed\.pos_embed", r"pos_embed"),
        (r"pos_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"t_embedder.mlp.0.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"t_embedder.mlp.2.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(\w+)", r"y_embedder.mlp.0.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(\w+)", r"y_embedder.mlp.2.\1"),
        (r"context_embedder\.(\w+)", r"context_embedder.\1"),
        (block + r"(attn2?)\.norm_([qk])\.weight", r"joint_blocks.\1.x_block.\2.ln_\3.weight"),
        (block + r"attn\.norm_added_([qk])\.weight", r"joint_blocks.\1.context_block.attn.ln_\2.weight"),
        (block + r"(attn2?)\.to_out\.0\.(\w+)", r"joint_blocks.\1.x_block.\2.proj.\3"),
        (block + r"attn\.to_add_out\.(\w+)", r"joint_blocks.\1.context_block.attn.proj.\2"),
        (block + r"norm1\.linear\.(\w+)", r"joint_blocks.\1.x_block.adaLN_modulation.1.\2"),
        (block + r"norm1_context\.linear\.(\w+)", r"joint_blocks.\1.context_block.adaLN_modulation.1.\2"),
        (block + r"ff\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc1.\2"),
        (block + r"ff\.net\.2\.(\w+)", r"joint_blocks.\1.x_block.mlp.fc2.\2"),
        (block + r"ff_context\.net\.0\.proj\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc1.\2"),
        (block + r"ff_context\.net\.2\.(\w+)", r"joint_blocks.\1.context_block.mlp.fc2.\2"),
        (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
        (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    ]
    return _renamed(state, rules, stacks)


def sana(state: State) -> State:
    """NVIDIA's SANA, with the two buffers that diffusers has no use for."""
    block, leaf = r"transformer_blocks\.(\d+)\.", r"\.(weight|bias)"
    stacks = [
        ([block + r"attn1\.to_q" + leaf, r"transformer_blocks.\1.attn1.to_k.\2",
          r"transformer_blocks.\1.attn1.to_v.\2"], r"blocks.\1.attn.qkv.\2"),
        ([block + r"attn2\.to_k" + leaf, r"transformer_blocks.\1.attn2.to_v.\2"], r"blocks.\1.cross_attn.kv_linear.\2"),
    ]  # fmt: skip
    rules = [
        (r"patch_embed\.proj\.(\w+)", r"x_embedder.proj.\1"),
        (r"time_embed\.emb\.timestep_embedder\.linear_1\.(\w+)", r"t_embedder.mlp.0.\1"),
        (r"time_embed\.emb\.timestep_embedder\.linear_2\.(\w+)", r"t_embedder.mlp.2.\1"),
        (r"time_embed\.linear\.(\w+)", r"t_block.1.\1"),
        (r"caption_projection\.linear_(\d)\.(\w+)", r"y_embedder.y_proj.fc\1.\2"),
        (r"caption_norm\.weight", r"attention_y_norm.weight"),
        (block + r"scale_shift_table", r"blocks.\1.scale_shift_table"),
        (block + r"attn1\.to_out\.0\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (block + r"attn2\.to_q\.(\w+)", r"blocks.\1.cross_attn.q_linear.\2"),
        (block + r"attn2\.to_out\.0\.(\w+)", r"blocks.\1.cross_attn.proj.\2"),
        (block + r"ff\.conv_inverted\.(\w+)", r"blocks.\1.mlp.inverted_conv.conv.\2"),
        (block + r"ff\.conv_depth\.(\w+)", r"blocks.\1.mlp.depth_conv.conv.\2"),
        (block + r"ff\.conv_point\.(\w+)", r"blocks.\1.mlp.point_conv.conv.\2"),
        (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
        (r"scale_shift_table", r"final_layer.scale_shift_table"),
    ]
    spare = {"pos_embed": torch.zeros(1, 4, 8), "y_embedder.y_embedding": torch.zeros(4, 8)}
    return _renamed(state, rules, stacks) | spare


def z_image(state: State) -> State:
    """Z-Image as ComfyUI has it: q, k and v in one."""
    stacks = [
        ([r"(.+)\.attention\.to_q\.weight", r"\1.attention.to_k.weight", r"\1.attention.to_v.weight"],
         r"\1.attention.qkv.weight"),
    ]  # fmt: skip
    rules = [
        (r"(.+)\.attention\.to_out\.0\.(\w+)", r"\1.attention.out.\2"),
        (r"(.+)\.attention\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),
        (r"all_x_embedder\.2-1\.(\w+)", r"x_embedder.\1"),
        (r"all_final_layer\.2-1\.(.+)", r"final_layer.\1"),
        (r"(.+)", r"\1"),
    ]
    return _renamed(state, rules, stacks)


def wan(state: State) -> State:
    """Alibaba's Wan."""
    block = r"blocks\.(\d+)\."
    part = {"1": "self_attn", "2": "cross_attn"}
    rules = [
        (r"patch_embedding\.(\w+)", r"patch_embedding.\1"),
        (r"condition_embedder\.time_embedder\.linear_1\.(\w+)", r"time_embedding.0.\1"),
        (r"condition_embedder\.time_embedder\.linear_2\.(\w+)", r"time_embedding.2.\1"),
        (r"condition_embedder\.text_embedder\.linear_1\.(\w+)", r"text_embedding.0.\1"),
        (r"condition_embedder\.text_embedder\.linear_2\.(\w+)", r"text_embedding.2.\1"),
        (r"condition_embedder\.time_proj\.(\w+)", r"time_projection.1.\1"),
        (r"condition_embedder\.image_embedder\.norm1\.(\w+)", r"img_emb.proj.0.\1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.0\.proj\.(\w+)", r"img_emb.proj.1.\1"),
        (r"condition_embedder\.image_embedder\.ff\.net\.2\.(\w+)", r"img_emb.proj.3.\1"),
        (r"condition_embedder\.image_embedder\.norm2\.(\w+)", r"img_emb.proj.4.\1"),
        (block + r"attn(\d)\.to_([qkv])\.(\w+)", r"blocks.\1.attn\2.\3.\4"),
        (block + r"attn(\d)\.to_out\.0\.(\w+)", r"blocks.\1.attn\2.o.\3"),
        (block + r"attn(\d)\.norm_([qk])\.(\w+)", r"blocks.\1.attn\2.norm_\3.\4"),
        (block + r"attn(\d)\.add_([kv])_proj\.(\w+)", r"blocks.\1.attn\2.\3_img.\4"),
        (block + r"attn(\d)\.norm_added_k\.(\w+)", r"blocks.\1.attn\2.norm_k_img.\3"),
        (block + r"ffn\.net\.0\.proj\.(\w+)", r"blocks.\1.ffn.0.\2"),
        (block + r"ffn\.net\.2\.(\w+)", r"blocks.\1.ffn.2.\2"),
        # The original counts the norms in another order.
        (block + r"norm2\.(\w+)", r"blocks.\1.norm3.\2"),
        (block + r"scale_shift_table", r"blocks.\1.modulation"),
        (r"scale_shift_table", r"head.modulation"),
        (r"proj_out\.(\w+)", r"head.head.\1"),
    ]
    out = _renamed(state, rules)
    return {re.sub(r"\.attn(\d)\.", lambda m: f".{part[m[1]]}.", name): value for name, value in out.items()}


def ltx(state: State) -> State:
    """Lightricks' LTX-Video."""
    rules = [
        (r"proj_in\.(\w+)", r"patchify_proj.\1"),
        (r"time_embed\.(.+)", r"adaln_single.\1"),
        (r"(.+)\.norm_([qk])\.weight", r"\1.\2_norm.weight"),
        (r"(.+)", r"\1"),
    ]
    return _renamed(state, rules)


def hunyuan_video(state: State) -> State:
    """Tencent's HunyuanVideo."""
    state = {k: _shift_first(v) if k.startswith("norm_out.linear.") else v for k, v in state.items()}
    double, single = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
    refiner, leaf = r"context_embedder\.token_refiner\.refiner_blocks\.(\d+)\.", r"\.(weight|bias)"
    new_refiner = r"txt_in.individual_token_refiner.blocks.\1."
    stacks = [
        ([double + r"attn\.to_q" + leaf, r"transformer_blocks.\1.attn.to_k.\2", r"transformer_blocks.\1.attn.to_v.\2"],
         r"double_blocks.\1.img_attn_qkv.\2"),
        ([double + r"attn\.add_q_proj" + leaf, r"transformer_blocks.\1.attn.add_k_proj.\2",
          r"transformer_blocks.\1.attn.add_v_proj.\2"], r"double_blocks.\1.txt_attn_qkv.\2"),
        ([single + r"attn\.to_q" + leaf, r"single_transformer_blocks.\1.attn.to_k.\2",
          r"single_transformer_blocks.\1.attn.to_v.\2", r"single_transformer_blocks.\1.proj_mlp.\2"],
         r"single_blocks.\1.linear1.\2"),
        ([refiner + r"attn\.to_q" + leaf, r"context_embedder.token_refiner.refiner_blocks.\1.attn.to_k.\2",
          r"context_embedder.token_refiner.refiner_blocks.\1.attn.to_v.\2"], new_refiner + r"self_attn_qkv.\2"),
    ]  # fmt: skip
    rules = [
        (r"x_embedder\.proj\.(\w+)", r"img_in.proj.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"time_in.mlp.0.\1"),
        (r"time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"time_in.mlp.2.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_1\.(\w+)", r"guidance_in.mlp.0.\1"),
        (r"time_text_embed\.guidance_embedder\.linear_2\.(\w+)", r"guidance_in.mlp.2.\1"),
        (r"time_text_embed\.text_embedder\.linear_1\.(\w+)", r"vector_in.in_layer.\1"),
        (r"time_text_embed\.text_embedder\.linear_2\.(\w+)", r"vector_in.out_layer.\1"),
        (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_1\.(\w+)", r"txt_in.t_embedder.mlp.0.\1"),
        (r"context_embedder\.time_text_embed\.timestep_embedder\.linear_2\.(\w+)", r"txt_in.t_embedder.mlp.2.\1"),
        (r"context_embedder\.time_text_embed\.text_embedder\.(.+)", r"txt_in.c_embedder.\1"),
        (r"context_embedder\.proj_in\.(\w+)", r"txt_in.input_embedder.\1"),
        (refiner + r"attn\.to_out\.0\.(\w+)", new_refiner + r"self_attn_proj.\2"),
        (refiner + r"norm_out\.linear\.(\w+)", new_refiner + r"adaLN_modulation.1.\2"),
        (refiner + r"ff\.net\.0\.proj\.(\w+)", new_refiner + r"mlp.fc1.\2"),
        (refiner + r"ff\.net\.2\.(\w+)", new_refiner + r"mlp.fc2.\2"),
        (refiner + r"(norm[12])\.(\w+)", new_refiner + r"\2.\3"),
        (double + r"norm1\.linear\.(\w+)", r"double_blocks.\1.img_mod.linear.\2"),
        (double + r"norm1_context\.linear\.(\w+)", r"double_blocks.\1.txt_mod.linear.\2"),
        (double + r"attn\.norm_([qk])\.weight", r"double_blocks.\1.img_attn_\2_norm.weight"),
        (double + r"attn\.norm_added_([qk])\.weight", r"double_blocks.\1.txt_attn_\2_norm.weight"),
        (double + r"attn\.to_out\.0\.(\w+)", r"double_blocks.\1.img_attn_proj.\2"),
        (double + r"attn\.to_add_out\.(\w+)", r"double_blocks.\1.txt_attn_proj.\2"),
        (double + r"ff\.net\.0\.proj\.(\w+)", r"double_blocks.\1.img_mlp.fc1.\2"),
        (double + r"ff\.net\.2\.(\w+)", r"double_blocks.\1.img_mlp.fc2.\2"),
        (double + r"ff_context\.net\.0\.proj\.(\w+)", r"double_blocks.\1.txt_mlp.fc1.\2"),
        (double + r"ff_context\.net\.2\.(\w+)", r"double_blocks.\1.txt_mlp.fc2.\2"),
        (single + r"norm\.linear\.(\w+)", r"single_blocks.\1.modulation.linear.\2"),
        (single + r"attn\.norm_([qk])\.weight", r"single_blocks.\1.\2_norm.weight"),
        (single + r"proj_out\.(\w+)", r"single_blocks.\1.linear2.\2"),
        (r"proj_out\.(\w+)", r"final_layer.linear.\1"),
        (r"norm_out\.linear\.(\w+)", r"final_layer.adaLN_modulation.1.\1"),
    ]
    return _renamed(state, rules, stacks)


def sdxl(state: State) -> State:
    """The UNet of Stability's checkpoints: blocks counted through, with the downsamplers between them."""
    per_block = 1 + max(int(m[1]) for name in state if (m := re.match(r"down_blocks\.\d+\.resnets\.(\d+)\.", name)))
    attended = {m[1] for name in state if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}

    def down(match: re.Match[str]) -> str:
        block, kind, number, rest = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (per_block + 1)}.0.op.{rest.removeprefix('conv.')}"
        place = 1 + block * (per_block + 1) + number
        return f"input_blocks.{place}.{0 if kind == 'resnets' else 1}.{rest}"

    def up(match: re.Match[str]) -> str:
        block, kind, number, rest = match[1], match[2], int(match[3]), match[4]
        place = int(block) * (per_block + 1) + number
        if kind == "upsamplers":
            return f"output_blocks.{(int(block) + 1) * (per_block + 1) - 1}.{2 if block in attended else 1}.{rest}"
        return f"output_blocks.{place}.{0 if kind == 'resnets' else 1}.{rest}"

    resnet = [
        ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
        ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."), ("conv_shortcut.", "skip_connection."),
    ]  # fmt: skip
    outer = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    out = {}
    for name, value in state.items():
        new, pattern = name, r"\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
        if match := re.fullmatch("down_blocks" + pattern, name):
            new = down(match)
        elif match := re.fullmatch("up_blocks" + pattern, name):
            new = up(match)
        elif match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
            new = f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}.{match[3]}"
        else:
            module, _, leaf = name.rpartition(".")
            new = f"{outer[module]}.{leaf}"
        if ".resnets." in name:
            for ours, theirs in resnet:
                new = new.replace(ours, theirs)
        out[new] = value
    return out


def original_vae(state: State) -> State:
    """The autoencoder of Stability's checkpoints: convolutions for attention, the decoder counted from below."""
    highest = max(int(m[1]) for name in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    rules = [
        (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
        (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
        (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
        (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.group_norm\.", r".mid.attn_1.norm."),
        (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
        (r"\.mid_block\.attentions\.0\.to_out\.0\.", r".mid.attn_1.proj_out."),
        (r"\.conv_norm_out\.", r".norm_out."),
        (r"\.conv_shortcut\.", r".nin_shortcut."),
    ]
    out = {}
    for name, value in state.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        new = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{highest - int(m[1])}.", new)
        out[new] = value[:, :, None, None] if ".attn_1." in new and value.dim() == 2 else value
    return out


ORIGINAL: dict[str, Callable[[State], State]] = {
    "flux": flux,
    "flux2": flux2,
    "sd3": sd3,
    "sana": sana,
    "z_image": z_image,
    "wan": wan,
    "ltx": ltx,
    "sdxl": sdxl,
    "hunyuan_video": hunyuan_video,
}
