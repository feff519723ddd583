"""The reference of the start-to-picture measurement: one picture by diffusers, from process start to PNG."""

import sys

import torch
from diffusers import StableDiffusionPipeline

model, prompt, steps, output = sys.argv[1:5]
pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
image = pipeline(prompt, num_inference_steps=int(steps), guidance_scale=5.0, generator=generator).images[0]
image.save(output)
