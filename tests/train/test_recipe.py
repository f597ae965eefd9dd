from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deltatune as dt
from deltatune.core import DeltatuneError, Part, Union
from deltatune.train import Recipe

TEXT = """
version: 1
base: some/base
data: {train: rows.jsonl, eval: 5%}
method: {name: lora, r: 16, init: pissa}
callbacks: [{name: lora_plus, ratio: 16}]
train: {epochs: 2, lr: 2e-4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "law.yaml").write_text(TEXT)
    return tmp_path / "law.yaml"


def test_reads_what_is_written(file: Path) -> None:
    recipe = Recipe.read(file)
    assert recipe.made_method() == dt.LoRA(r=16, init=dt.PiSSA())
    assert recipe.made_callbacks() == [dt.LoRAPlus(ratio=16)]
    assert recipe.train.lr == 2e-4 and recipe.data.eval == "5%" and recipe.output == "runs/law"


@pytest.mark.parametrize(
    ("given", "lr"),
    [(["method=vera"], dt.VeRA.lr), (["method=full"], 1e-4), (["method=mam"], dt.MAM.lr),
     (["method=vera", "lr=0.5"], 0.5), (["method=[{name: prompt_tuning}, lora]"], dt.PromptTuning.lr)],
)  # fmt: skip
def test_a_method_trains_at_its_own_learning_rate(tmp_path: Path, given: list[str], lr: float) -> None:
    (tmp_path / "any.yaml").write_text("version: 1\nbase: base\ndata: {train: rows.jsonl}\n")
    assert Recipe.read(tmp_path / "any.yaml", given).train.lr == lr


def test_the_written_recipe_is_the_same_run(file: Path, tmp_path: Path) -> None:
    given = ["targets={type: Part, names: [q, v]}", "seed=7", "method.init=null", "train.betas=[0.9, 0.95]"]
    recipe = Recipe.read(file, given)
    recipe.write(tmp_path / "used.yaml")
    again = Recipe.read(tmp_path / "used.yaml")
    assert again.made_method() == recipe.made_method() == dt.LoRA(r=16, targets=Part("q", "v"))
    assert (again.train, again.data, again.seed) == (recipe.train, recipe.data, 7) and again.train.seed == 7
    assert again.made_callbacks() == recipe.made_callbacks()
    assert "alpha: 16.0" in (tmp_path / "used.yaml").read_text()  # a default, filled in


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-9, 10, allow_nan=False), st.booleans())
def test_numbers_of_yaml_1_2(lr: float, short: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.yaml"
        path.write_text(TEXT)
        assert Recipe.read(path, [f"{'' if short else 'train.'}lr={lr!r}"]).train.lr == lr


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (["lr=1e-3"], lambda r: r.train.lr, 1e-3),
        (["r=4"], lambda r: r.made_method().r, 4),
        (["method=dora"], lambda r: r.made_method(), dt.DoRA()),
        (
            ["method=[lora, bitfit]", "method.0.r=2"],
            lambda r: r.made_method(),
            Union(methods=(dt.LoRA(r=2), dt.BitFit())),
        ),
        (["method=full"], lambda r: r.made_method(), None),
        (["data=other.jsonl"], lambda r: r.data.train, "other.jsonl"),
        (["max_length=64"], lambda r: r.data.max_length, 64),
        (["data.eval=3"], lambda r: r.data.eval, 3),
    ],
)
def test_overrides(file: Path, overrides: list[str], field, value) -> None:  # type: ignore[no-untyped-def]
    assert field(Recipe.read(file, overrides)) == value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lrr=1", "no key 'lrr'; did you mean 'lr'"),
        ("train.lrr=1", "law.yaml: train has no option 'lrr'; did you mean 'lr'"),
        ("data.max_len=3", "law.yaml: data has no key 'max_len'; did you mean 'max_length'"),
        ("bases.x=3", "law.yaml: a recipe has no key 'bases'; did you mean 'base'"),
        ("method=lorra", "no method is called 'lorra'; did you mean 'LoRA'"),
        ("method.rr=2", "LoRA has no option 'rr'; did you mean 'r'"),
        ("callbacks=[lora_pluss]", "no callback is called 'lora_pluss'; did you mean 'LoRAPlus'"),
        ("data.max_length=x", "data.max_length: input should be a valid integer, got 'x'"),
        ("epochs=0", "train.epochs"),
        ("max_steps=3", "epochs and max_steps"),
        ("train.seed=2", "one seed"),
        ("version=2", "version"),
        ("method=[lora, full]", "full"),
        ("nonsense", "key=value"),
        ("base=", "base"),
    ],
)
def test_errors_name_the_key(file: Path, override: str, told: str) -> None:
    with pytest.raises(DeltatuneError) as caught:
        Recipe.read(file, [override])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base: a", "data is missing"),
        ("data: a.jsonl", "base is missing"),
        ("- a", "a recipe is a mapping"),
        ("base: [", "not valid YAML"),
        ("base: a\nbase: b\ndata: c", "the key 'base' is there twice"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(DeltatuneError, match="bad.yaml") as caught:
        Recipe.read(tmp_path / "bad.yaml")
    assert told in str(caught.value)


def test_a_short_key_that_two_places_have_is_refused(file: Path) -> None:
    with pytest.raises(DeltatuneError, match=r"method.0.r or method.1.r"):
        Recipe.read(file, ["method=[lora, lora]", "r=3"])


def test_missing_file_offers_the_nearest(file: Path) -> None:
    with pytest.raises(DeltatuneError, match="did you mean 'law.yaml'"):
        Recipe.read(file.with_name("lw.yaml"))
