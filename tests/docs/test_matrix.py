"""The capability matrix of the page of methods against what is known of a few of them."""

import importlib.util
from pathlib import Path

import pytest

import deltatune as dt
from deltatune.core import Method

pytest.importorskip("mkdocs")
PAGE = Path(__file__).parents[2] / "docs/generate.py"
EVERYWHERE = {"llama", "gpt2", "bloom", "opt", "bert", "roberta", "t5", "bart"}
BIASED = EVERYWHERE - {"llama", "t5"}


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cls,merges,on", [
    (dt.LoRA, True, EVERYWHERE), (dt.DoRA, True, EVERYWHERE), (dt.BitFit, True, BIASED), (dt.IA3, True, EVERYWHERE),
    (dt.Houlsby, False, EVERYWHERE), (dt.PromptTuning, False, EVERYWHERE), (dt.AdapterFusion, False, EVERYWHERE),
    (dt.S4, False, BIASED), (dt.UniPELT, False, EVERYWHERE - {"bloom"}),
])  # fmt: skip
def test_known_cells(generate, monkeypatch, cls, merges, on):
    monkeypatch.setattr(dt, "methods", lambda: {cls.__name__: cls})
    head, _, row = [[c.strip() for c in line.strip("|").split("|")] for line in generate.matrix().splitlines()]
    cells = dict(zip(head, row, strict=True))
    assert cells.pop("method") == cls.__name__ and cells.pop("merges") == ("yes" if merges else "–")
    assert cells == {a: "yes" if a in on else "–" for a in EVERYWHERE}


def test_references_are_of_the_methods_they_stand_for(generate):
    assert {name: type(method).__name__ for name, method in generate.REFERENCES.items()} == {
        name: name for name in generate.REFERENCES
    }


@pytest.mark.slow
def test_every_method_attaches_somewhere(generate):
    rows = generate.matrix().splitlines()[2:]
    assert len(rows) == sum(issubclass(cls, Method) for cls in dt.methods().values())
    assert not [row for row in rows if " yes " not in row.split("|")[3:]]
