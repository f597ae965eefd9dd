"""Every recipe in `examples/` is a valid one, and what it names can be put on a model."""

from pathlib import Path

import pytest

import deltatune as dt
from deltatune.models.tiny import tiny
from deltatune.train.recipe import Recipe

# What else than the method decides how fast it may learn.
OWN_RATE = {"init", "callbacks", "quantize", "context"}
RECIPES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def test_there_are_examples():
    assert len(RECIPES) > 30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_example_is_valid(path, tmp_path, monkeypatch):
    recipe = Recipe.read(path)
    method = recipe.made_method()
    assert recipe.train.lr and recipe.output
    assert recipe.made_callbacks() is not None
    monkeypatch.chdir(tmp_path)
    for folder in getattr(method, "adapters", ()):  # trained by other recipes
        dt.attach(tiny("llama"), dt.Pfeiffer()).save(folder)
    if method is not None and not isinstance(getattr(method, "init", None), dt.LoftQ | dt.QPiSSA):
        assert dt.plan(tiny("bert" if "bert" in recipe.base else "llama"), method).trained > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_example_trains_at_the_rate_of_its_method(path):
    recipe = Recipe.read(path)
    given = {*recipe.model_dump(exclude_unset=True), *(recipe.method if isinstance(recipe.method, dict) else ())}
    if isinstance(recipe.method, list) or recipe.method == "full" or given & OWN_RATE:
        return
    assert recipe.train.lr == recipe.made_method().lr
