"""Every Python block of the documentation and of the READMEs runs, page by page, in the order written."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "README.zh-CN.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


def test_the_commands_of_the_pages_exist():
    from typer.main import get_command

    from deltatune.cli.main import app

    known = set(get_command(app).list_commands(None))
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                if found := re.match(r"deltatune (\w+)", line):
                    assert found[1] in known, f"{page.name}: {line}"


def test_the_chinese_readme_has_the_same_commands_and_figures():
    english, chinese = ((ROOT / n) for n in ("README.md", "README.zh-CN.md"))
    assert blocks(english, "bash") == blocks(chinese, "bash") and blocks(english, "python") == blocks(chinese, "python")
    figures = r"\d[\d.,]*(?= ?(?:%|x|×|GB|MB|ms|µs|tokens))"
    assert re.findall(figures, english.read_text()) == re.findall(figures, chinese.read_text())


def test_every_recipe_on_the_pages_is_valid(tmp_path):
    from deltatune.train.recipe import Recipe

    for page in PAGES:
        for block in blocks(page, "yaml"):
            (tmp_path / "recipe.yaml").write_text(block)
            assert Recipe.read(tmp_path / "recipe.yaml").base
