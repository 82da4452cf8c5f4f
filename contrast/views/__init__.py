"""Batched augmentations that run on the batch's device, drawn independently per sample from one generator.

- images.py, series.py: the operations. To add one, write a subclass of `Operation` with `@VIEWS.register(name)` there
  (constructor arguments = its options); a user's own is the same class in a plugin.
- recipes.py: sequences of operations by name. To add one, write a function with `@recipe(name, kind)` there.
- views.py: the registries VIEWS and RECIPES, `Operation`, and `build_views`, which reads `views:` of a config.
- draws.py: random numbers per sample, and checks of arguments.

Example:
    >>> "random_resized_crop" in VIEWS, "simclr" in RECIPES
    (True, True)
    >>> VIEWS.build({"name": "jitter", "sigma": 0.5})
    Jitter()
"""

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
