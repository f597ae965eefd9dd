from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer

from deltatune.core.errors import DeltatuneError
from deltatune.models import default
from deltatune.models.loading import load_base, load_tokenizer, locate, read_config, to_dtype
from deltatune.models.tiny import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_loaded_as_it_is_stored_or_in_another_precision(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    model = load_base(folder)
    assert model.dtype == torch.bfloat16 and not model.training
    assert all(torch.equal(p, stored[n]) for n, p in model.named_parameters())
    assert (
        load_base(str(folder), dtype="float32").dtype == load_base(folder, dtype=torch.float32).dtype == torch.float32
    )
    assert to_dtype("auto") is None
    with pytest.raises(DeltatuneError, match="'bfloat' is not auto, .*did you mean 'bfloat16'"):
        load_base(folder, dtype="bfloat")


def test_a_head_for_a_task(folder: Path) -> None:
    model = load_base(folder, "classification", labels=["bad", "good", "fine"])
    assert model.score.out_features == 3 and model.config.id2label[1] == "good"
    assert load_base(folder, "tagging", labels=5).score.out_features == 5
    with pytest.raises(DeltatuneError, match="'llama' has no head for task 'seq2seq'"):
        load_base(folder, "seq2seq")
    with pytest.raises(DeltatuneError, match="'clasification' is not one of .*did you mean 'classification'"):
        load_base(folder, "clasification")


def test_the_number_of_labels_may_change(folder: Path) -> None:
    load_base(folder, "classification", labels=3).save_pretrained(folder)
    assert load_base(folder, "classification").score.out_features == 3
    assert load_base(folder, "classification", labels=7).score.out_features == 7


def test_an_encoder_decoder_is_recognised(tmp_path: Path) -> None:
    tiny("t5").save_pretrained(tmp_path)
    assert type(load_base(tmp_path)).__name__ == "T5ForConditionalGeneration"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DeltatuneError, match=rf"base: {folder}: {name} is missing"):
        load_base(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    tiny("llama").save_pretrained(folder, max_shard_size="20kB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(p.name for p in folder.glob("model-*"))
    load_base(folder)
    (folder / shards[1]).unlink()
    with pytest.raises(DeltatuneError, match=rf"1 of {len(shards)} weight files are missing: {shards[1]}"):
        load_base(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        DeltatuneError, match=r"model\.safetensors is missing; pytorch_model\.bin would need unpickling"
    ):
        load_base(folder)


def test_weights_that_are_cut_short_or_lack_a_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(DeltatuneError, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DeltatuneError, match="its weights are damaged"):
        load_base(folder)


def test_an_unknown_architecture_is_named_with_the_nearest(folder: Path) -> None:
    edit(folder / "config.json", model_type="lama")
    with pytest.raises(
        DeltatuneError, match=r"config\.json: transformers knows no model_type 'lama'; did you mean .*'llama'"
    ):
        load_base(folder)
    edit(folder / "config.json", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(DeltatuneError, match="code of its own, which is not run"):
        read_config(folder)


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(DeltatuneError, match=r"config\.json: not valid JSON"):
        load_base(folder)


def test_an_adapter_given_as_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltatuneError, match="is an adapter, not a base model; .*--adapter"):
        load_base(tmp_path)


def test_folders_that_are_not_there(folder: Path) -> None:
    with pytest.raises(DeltatuneError, match="there is no folder .*basse; did you mean 'base'"):
        locate(folder.parent / "basse")
    with pytest.raises(DeltatuneError, match="is a file; name the folder"):
        locate(folder / "config.json")
    with pytest.raises(DeltatuneError, match="there is no folder"):
        locate("./nowhere")


def test_a_hub_name_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (load_base, load_tokenizer):
        with pytest.raises(DeltatuneError, match="nobody/nothing.*'default'"):
            load("nobody/nothing")


def test_default_is_the_default_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "default_base", lambda: folder)
    assert locate("default") == str(folder)


def test_tokenizers(folder: Path, tmp_path: Path) -> None:
    assert load_tokenizer(folder).pad_token == "<pad>"
    other = tiny_tokenizer()
    other.pad_token = None
    other.save_pretrained(tmp_path / "other")
    assert load_tokenizer(tmp_path / "other").pad_token == "<|im_end|>"
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DeltatuneError, match=r"no tokenizer there \(tokenizer\.json is missing\)"):
        load_tokenizer(folder)


def test_the_tokenizer_saved_beside_an_adapter_comes_first(folder: Path, tmp_path: Path) -> None:
    bare, own, template = (tmp_path / name for name in ("bare", "own", "template"))
    for place in (bare, own, template):
        place.mkdir()
    changed = tiny_tokenizer()
    changed.chat_template = "{{ 'mine' }}"
    changed.save_pretrained(own)
    (template / "chat_template.jinja").write_text("{{ 'theirs' }}")
    assert load_tokenizer(folder, [bare]).chat_template == tiny_tokenizer().chat_template
    assert load_tokenizer(folder, [bare, own]).chat_template == "{{ 'mine' }}"
    assert load_tokenizer(folder, [template]).chat_template == "{{ 'theirs' }}"
