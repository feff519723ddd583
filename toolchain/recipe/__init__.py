"""Recipes: one flat TOML file is the whole truth of a build."""

from toolchain.recipe.bucket import BUCKET_FORM, BUCKET_SETS, Bucket
from toolchain.recipe.load import load_recipe, parse_recipe
from toolchain.recipe.schema import (
    EXACT_PSNR_DB,
    ROUNDED_PSNR_DB,
    Calibration,
    Check,
    ComponentRecipe,
    Quantize,
    Recipe,
    Safety,
    Sampling,
    Tolerance,
)

__all__ = [
    "BUCKET_FORM",
    "BUCKET_SETS",
    "EXACT_PSNR_DB",
    "ROUNDED_PSNR_DB",
    "Bucket",
    "Calibration",
    "Check",
    "ComponentRecipe",
    "Quantize",
    "Recipe",
    "Safety",
    "Sampling",
    "Tolerance",
    "load_recipe",
    "parse_recipe",
]
