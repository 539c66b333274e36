"""LoRAs of Flux, in kohya's keys with a fused qkv, and of SDXL with two text encoders, in and out through diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

import diffusers

from lrlora.adapters import factorize, read_updates, save_single_file

Sizes = dict[str, tuple[int, int]]  # module → m, n


def flux() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    others = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(transformer=transformer.eval(), **others)


FLUX: Sizes = {
    "lora_unet_double_blocks_0_img_attn_qkv": (96, 32),
    "lora_unet_double_blocks_0_txt_attn_qkv": (96, 32),
    "lora_unet_double_blocks_0_img_attn_proj": (32, 32),
    "lora_unet_double_blocks_0_img_mlp_0": (128, 32),
    "lora_unet_single_blocks_0_linear2": (32, 160),
}
BLOCK = "transformer.transformer_blocks.0"
# diffusers' modules of each, in the order of their rows.
PARTS = {
    "lora_unet_double_blocks_0_img_attn_qkv": [f"{BLOCK}.attn.to_{x}" for x in "qkv"],
    "lora_unet_double_blocks_0_txt_attn_qkv": [f"{BLOCK}.attn.add_{x}_proj" for x in "qkv"],
    "lora_unet_double_blocks_0_img_attn_proj": [f"{BLOCK}.attn.to_out.0"],
    "lora_unet_double_blocks_0_img_mlp_0": [f"{BLOCK}.ff.net.0.proj"],
    "lora_unet_single_blocks_0_linear2": ["transformer.single_transformer_blocks.0.proj_out"],
}


def sdxl() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text).eval(),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(),
    )


ATTENTION = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL: Sizes = {
    f"lora_unet_{ATTENTION}": (16, 16),
    **{f"lora_te{i}_text_model_encoder_layers_{j}_mlp_fc1": (32, 16) for i in (1, 2) for j in (0, 1)},
}


def write_lora(path: Path, sizes: Sizes) -> None:
    torch.manual_seed(1)
    tensors = {}
    for index, (module, (m, n)) in enumerate(sizes.items()):
        tensors[f"{module}.lora_up.weight"] = torch.randn(m, 6)
        tensors[f"{module}.lora_down.weight"] = torch.randn(6, n) * torch.logspace(0, -index / 2, 6)[:, None]
        tensors[f"{module}.alpha"] = torch.tensor(3.0)
    save_file(tensors, path)


def loaded_updates(pipe: Any, file: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module that diffusers adapts."""
    pipe.load_lora_weights(str(file))
    found = {}
    for part, component in pipe.components.items():
        for name, layer in component.named_modules() if isinstance(component, torch.nn.Module) else ():
            if hasattr(layer, "get_delta_weight"):
                (adapter,) = layer.lora_A
                found[f"{part}.{name}"] = layer.get_delta_weight(adapter).detach()
    return found


@pytest.mark.parametrize("pad", [False, True])
def test_flux_with_a_fused_qkv(pad: bool, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", FLUX)
    updates = read_updates(tmp_path / "lora.safetensors")
    original = loaded_updates(flux(), tmp_path / "lora.safetensors")
    assert original.keys() == {name for names in PARTS.values() for name in names}
    save_single_file(factorize(updates, energy=1.0), updates, tmp_path / "whole.safetensors", pad=pad)
    torch.testing.assert_close(loaded_updates(flux(), tmp_path / "whole.safetensors"), original, rtol=1e-4, atol=1e-5)

    factors = factorize(updates, energy=0.9)
    assert len({part.rank for part in factors}) > 1
    save_single_file(factors, updates, tmp_path / "small.safetensors", pad=pad)
    found = loaded_updates(flux(), tmp_path / "small.safetensors")
    for part in factors:
        rows = torch.cat([found[name] for name in PARTS[part.module]])
        torch.testing.assert_close(rows, part.B @ part.A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", [False, True])
def test_sdxl_with_two_text_encoders(pad: bool, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora.safetensors", SDXL)
    updates = read_updates(tmp_path / "lora.safetensors")
    original = loaded_updates(sdxl(), tmp_path / "lora.safetensors")
    assert len(original) == len(SDXL)
    assert {name.partition(".")[0] for name in original} == {"unet", "text_encoder", "text_encoder_2"}
    save_single_file(factorize(updates, energy=1.0), updates, tmp_path / "whole.safetensors", pad=pad)
    torch.testing.assert_close(loaded_updates(sdxl(), tmp_path / "whole.safetensors"), original, rtol=1e-4, atol=1e-5)

    factors = factorize(updates, energy=0.9)
    assert len({part.rank for part in factors}) > 1
    save_single_file(factors, updates, tmp_path / "small.safetensors", pad=pad)
    assert {key for key in load_file(tmp_path / "small.safetensors") if key.endswith(".alpha")} == {
        f"{module}.alpha" for module in SDXL
    }
    found = loaded_updates(sdxl(), tmp_path / "small.safetensors")
    wanted = sorted((part.B @ part.A for part in factors), key=lambda delta: delta.norm().item())
    for delta, expected in zip(sorted(found.values(), key=lambda delta: delta.norm().item()), wanted, strict=True):
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
