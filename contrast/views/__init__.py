"""Batched augmentations that run on the batch's device, drawn anew for every sample from one generator."""

from contrast.views import images, recipes, series
from contrast.views.views import RECIPES, VIEWS, Compose, Operation, Views, build_views, recipe

__all__ = [
    "RECIPES",
    "VIEWS",
    "Compose",
    "Operation",
    "Views",
    "build_views",
    "images",
    "recipe",
    "recipes",
    "series",
]
