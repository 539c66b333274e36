"""A tiny Stable Diffusion, and LoRAs for it in single files, written and loaded by diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file


def pipeline() -> Any:
    """Always the same weights."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def outputs(pipe: Any) -> torch.Tensor:
    """What the noise predictor makes of fixed inputs, with the text encoder's states as its condition."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (1, 6), generator=generator)
    states = pipe.text_encoder(tokens).last_hidden_state
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    return pipe.unet(sample, 10, encoder_hidden_states=states).sample


def with_lora(r: int = 4, alpha: float = 2.0, **options: Any) -> Any:
    """A pipeline with a LoRA of random weights on attention and convolutions of the UNet."""
    pipe = pipeline()
    unet = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"], **options
    )
    pipe.unet.add_adapter(unet)
    torch.manual_seed(1)
    for name, parameter in pipe.unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return pipe


def save_as_kohya(pipe: Any, path: Path, alpha: float) -> None:
    """In kohya's keys, by diffusers' own converter, with α as it was trained with."""
    state = {f"unet.{key}": value for key, value in peft.get_peft_model_state_dict(pipe.unet).items()}
    converted = {key: value.contiguous() for key, value in convert_state_dict_to_kohya(state).items()}
    for key in converted:
        if key.endswith(".alpha"):
            converted[key] = torch.tensor(alpha)
    save_file(converted, path, {"ss_network_dim": "4", "ss_network_alpha": str(alpha), "sshs_model_hash": "abc"})
