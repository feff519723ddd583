"""Diffusers folders -> one file in the layout of the original repositories, as A1111 and ComfyUI keep checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
}
FLUX = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "single_transformer_blocks": "single_blocks",
    "transformer_blocks": "double_blocks",
    "norm1_context.linear": "txt_mod.lin",
    "norm1.linear": "img_mod.lin",
    "norm.linear": "modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
}
Tensors = dict[str, Any]


def read(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    (path,) = folder.glob("*.safetensors")
    return dict(load_file(path))


def renamed(tensors: Tensors, rename: Callable[[str], str], prefix: str) -> Tensors:
    return {prefix + rename(key): tensor for key, tensor in tensors.items()}


def replaced(names: dict[str, str]) -> Callable[[str], str]:
    def rename(key: str) -> str:
        for new, old in names.items():
            key = key.replace(new, old)
        return key

    return rename


def unet(tensors: Tensors, layers: int = 1) -> Tensors:
    crossed = {key.split(".")[1] for key in tensors if re.match(r"up_blocks\.\d+\.attentions", key)}

    def rename(key: str) -> str:
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", key)
        if found:
            way, block, kind, layer, rest = found.groups()
            first, last = int(block) * (layers + 1), int(block) * (layers + 1) + layers
            if kind == "downsamplers":
                return f"input_blocks.{last + 1}.0.{rest.replace('conv', 'op')}"
            if kind == "upsamplers":
                return f"output_blocks.{last}.{2 if block in crossed else 1}.{rest}"
            number = first + int(layer) + (way == "down")
            rest = replaced(RESNET)(rest) if kind == "resnets" else rest
            return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"
        if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", key):
            kind, layer, rest = found.groups()
            return (
                f"middle_block.{2 * int(layer)}.{replaced(RESNET)(rest)}"
                if kind == "resnets"
                else f"middle_block.1.{rest}"
            )
        return replaced(UNET)(key)

    return renamed(tensors, rename, "model.diffusion_model.")


def vae(tensors: Tensors, prefix: str, blocks: int = 4) -> Tensors:
    def rename(key: str) -> str:
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)
        if "mid_block.attentions.0" in key:
            key = replaced(VAE_ATTENTION)(key.replace("mid_block.attentions.0", "mid.attn_1"))
        return key

    attended = {k: t[..., None, None] if ".attentions." in k and t.ndim == 2 else t for k, t in tensors.items()}
    return renamed(attended, rename, prefix)


def clip(tensors: Tensors, prefix: str) -> Tensors:
    return renamed(tensors, lambda key: f"text_model.{key.removeprefix('text_model.')}", prefix)


def open_clip(tensors: Tensors, prefix: str) -> Tensors:
    made = renamed(tensors, lambda key: replaced(OPEN_CLIP)(key.removeprefix("text_model.")), prefix)
    joined(made, ("q_proj.", "k_proj.", "v_proj."), "in_proj_")
    if (projection := made.pop(f"{prefix}text_projection.weight", None)) is not None:
        made[f"{prefix}text_projection"] = projection.T
    return made


def joined(tensors: Tensors, parts: tuple[str, ...], whole: str) -> None:
    """Joins tensors that differ in `parts` of their names, along their first axis."""
    import torch

    for key in [k for k in tensors if parts[0] in k]:
        split = [tensors.pop(key.replace(parts[0], part)) for part in parts]
        tensors[key.replace(parts[0], whole)] = torch.cat(split)


def flux(tensors: Tensors) -> Tensors:
    import torch

    made = dict(tensors)
    for key in ("norm_out.linear.weight", "norm_out.linear.bias"):
        scale, shift = made[key].chunk(2)
        made[key] = torch.cat([shift, scale])
    single = {k: made.pop(k) for k in list(made) if k.startswith("single_transformer_blocks.")}
    joined(single, ("attn.to_q.", "attn.to_k.", "attn.to_v.", "proj_mlp."), "linear1.")
    norms = {"attn.norm_q.weight": "norm.query_norm.scale", "attn.norm_k.weight": "norm.key_norm.scale"}
    single = renamed(single, replaced({"proj_out": "linear2", **norms}), "")
    joined(made, ("attn.to_q.", "attn.to_k.", "attn.to_v."), "img_attn.qkv.")
    joined(made, ("attn.add_q_proj.", "attn.add_k_proj.", "attn.add_v_proj."), "txt_attn.qkv.")
    made = {
        k.replace("proj_out.", "final_layer.linear.") if k.startswith("proj_out.") else k: t for k, t in made.items()
    }
    norms = {new: f"img_attn.{old}" for new, old in norms.items()}
    return renamed(single | renamed(made, replaced(norms), ""), replaced(FLUX), "model.diffusion_model.")


def write_single_file(model: Path, kind: str, path: Path) -> Path:
    """`kind`: sd1, sd2, sdxl or flux, which is a file with all four networks as ComfyUI writes it."""
    from safetensors.torch import save_file

    if kind == "flux":
        t5 = renamed(read(model / "text_encoder_2"), str, "text_encoders.t5xxl.transformer.")
        text = clip(read(model / "text_encoder"), "text_encoders.clip_l.transformer.") | t5
        made = flux(read(model / "transformer")) | text | vae(read(model / "vae"), "vae.")
    else:
        made = unet(read(model / "unet")) | vae(read(model / "vae"), "first_stage_model.")
        first = read(model / "text_encoder")
        if kind == "sd1":
            made |= clip(first, "cond_stage_model.transformer.")
        elif kind == "sd2":
            made |= open_clip(first, "cond_stage_model.model.")
        else:
            made |= clip(first, "conditioner.embedders.0.transformer.")
            made |= open_clip(read(model / "text_encoder_2"), "conditioner.embedders.1.model.")
    save_file({key: tensor.contiguous() for key, tensor in made.items()}, path)
    return path
