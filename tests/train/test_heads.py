"""Heads of classifiers and taggers in the adapter: saved, restored, switched, of several tasks on one base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

import deltatune as dt
from deltatune.models.tiny import inputs, tiny
from deltatune.train import Recipe, run
from deltatune.train.merged import write_merged

NAMES = ("good", "bad", "odd")
FAMILIES = ["bert", "roberta", "distilbert", "llama", "gpt2", "t5"]


def base(family: str = "bert", task: str = "classification") -> Any:
    torch.manual_seed(0)
    return tiny(family, task)  # of three classes


def method(labels: tuple[str, ...], inner: Any = None) -> Any:
    return dt.Union(methods=(inner or dt.LoRA(r=2), dt.Tune(labels=labels)))


def perturbed(adapter: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return adapter


@torch.no_grad()
def logits(model: Any, given: Any = None) -> torch.Tensor:
    return model(**(given or inputs(model))).logits


def named(model: Any) -> tuple[str, ...]:
    """What transformers calls the classes; the three places in which it counts them agree."""
    names = tuple(model.config.id2label[i] for i in range(len(model.config.id2label)))
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    assert len(names) == model.config.num_labels == getattr(model, "num_labels", len(names))
    return names


@pytest.mark.parametrize("task", ["classification", "tokens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_tasks_with_heads_of_their_own_on_one_base(family: str, task: str, tmp_path: Path) -> None:
    two, five = ("no", "yes"), ("a", "b", "c", "d", "e")
    alone, folders = {}, {}
    for name, labels in (("two", two), ("five", five)):
        model = base(family, task)
        adapter = perturbed(dt.attach(model, method(labels), name), len(labels))
        alone[name], folders[name] = logits(model), adapter.save(tmp_path / name)
        assert alone[name].shape[-1] == len(labels) and named(model) == labels
    model = base(family, task)
    given, own = inputs(model), named(model)
    before = logits(model)
    for name in folders:
        dt.load(model, folders[name], name)
    with torch.no_grad():
        whole = [p.clone() for n, p in model.named_parameters() if "adapters" not in n]
    for name, labels in (("two", two), ("five", five), ("two", two)):
        dt.activate(model, name)
        got = logits(model, given)
        assert torch.equal(got, alone[name]) and named(model) == labels == dt.adapters(model)[name].labels
        wanted = torch.randint(len(labels), got.shape[:-1], generator=torch.Generator().manual_seed(0))
        loss = F.cross_entropy(got.flatten(0, -2), wanted.flatten())
        torch.testing.assert_close(model(**given, labels=wanted).loss, loss)
    with dt.using(model, "five"):
        assert torch.equal(logits(model, given), alone["five"]) and named(model) == two  # the model's, not the thread's
    dt.activate(model)
    torch.testing.assert_close(logits(model, given), before)
    assert named(model) == own
    assert all(torch.equal(a, b) for a, (n, b) in zip(
        whole, ((n, p) for n, p in model.named_parameters() if "adapters" not in n), strict=True))  # fmt: skip
    dt.activate(model, "five")
    dt.detach(model, "two")
    assert named(model) == five
    dt.detach(model)
    assert named(model) == own and torch.equal(logits(model, given), before)


@pytest.mark.parametrize("inner", [dt.LoRA(r=2), dt.Houlsby(size=4)], ids=["PEFT's file", "own file"])
def test_rows_of_one_batch_under_heads_of_one_size(inner: Any) -> None:
    model = base()
    given = inputs(model, batch=3)
    for name, labels in (("one", ("a", "b", "c")), ("other", ("x", "y", "z")), ("four", ("k", "l", "m", "n"))):
        perturbed(dt.attach(model, method(labels, inner), name), len(name))
    want = []
    for i, name in enumerate(("other", None, "one")):
        dt.activate(model, *([name] if name else []))
        want.append(logits(model, {k: v[i : i + 1] for k, v in given.items()}))
    router = dt.PerRow(["other", None, "one"])
    dt.activate(model, router=router)
    torch.testing.assert_close(logits(model, given), torch.cat(want))
    assert named(model) == ("LABEL_0", "LABEL_1", "LABEL_2")  # rows call them differently
    with pytest.raises(dt.DeltatuneError, match="'one' 3, 'four' 4; run these rows in other batches"):
        dt.activate(model, router=dt.PerRow(["one", "four"]))
    with (
        pytest.raises(dt.DeltatuneError, match="'four' 4, the base 3"),
        dt.using(model, router=dt.PerRow(["four", None])),
    ):
        pass
    assert named(model) == ("LABEL_0", "LABEL_1", "LABEL_2")
    dt.activate(model, "four")
    assert named(model) == ("k", "l", "m", "n")


def test_rows_without_a_head_of_their_own_have_the_bases_names() -> None:
    model = base()
    model.config.id2label, model.config.label2id = dict(enumerate("uvw")), {n: i for i, n in enumerate("uvw")}
    plain, generic = ("u", "v", "w"), ("LABEL_0", "LABEL_1", "LABEL_2")
    dt.attach(model, method(("a", "b", "c")), "one")
    dt.attach(model, method(plain), "same")
    dt.attach(model, dt.LoRA(r=2), "lora")
    for rows, want in (
        (["one", "one"], ("a", "b", "c")),
        (["one", None], generic),
        (["one", "lora"], generic),
        (["one", "same"], generic),
        (["same", None, "lora"], plain),
        ([None, "lora"], plain),
    ):
        dt.activate(model, router=dt.PerRow(rows))
        assert named(model) == want, rows
    dt.activate(model)
    assert named(model) == plain


def test_the_head_of_the_outermost_adapter_names_the_classes() -> None:
    model = base()
    for name, labels in (("two", ("no", "yes")), ("five", tuple("abcde"))):
        perturbed(dt.attach(model, method(labels), name))
    given = inputs(model)
    for order, labels in ((("two", "five"), tuple("abcde")), (("five", "two"), ("no", "yes"))):
        dt.activate(model, *order)
        assert logits(model, given).shape[-1] == len(labels) and named(model) == labels
    dt.merge(model, "five")
    dt.activate(model, "two")
    assert logits(model, given).shape[-1] == 2 and named(model) == ("no", "yes")


def test_detaching_another_adapter_leaves_the_rows_as_they_are() -> None:
    model = base()
    for name, labels in (("one", ("a", "b", "c")), ("other", ("a", "b", "c")), ("spare", ("x", "y"))):
        perturbed(dt.attach(model, method(labels), name), len(name))
    given, router = inputs(model, batch=3), dt.PerRow(["other", None, "one"])
    dt.activate(model, router=router)
    want = logits(model, given)
    dt.detach(model, "spare")
    assert torch.equal(logits(model, given), want)
    dt.activate(model, router=dt.PerRow(["other", "other", "one"]))
    assert named(model) == ("a", "b", "c")


@pytest.mark.parametrize("inner", [dt.LoRA(r=2), dt.Houlsby(size=4)], ids=["PEFT's file", "own file"])
@pytest.mark.parametrize("labels", [("good", "bad"), NAMES, ("1", "2", "3", "4")], ids=len)
def test_a_base_of_any_number_of_classes_gets_the_adapters_head(inner: Any, labels: Any, tmp_path: Path) -> None:
    model = base()
    perturbed(dt.attach(model, method(labels, inner))).save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["deltatune"]["labels"] == list(labels)
    assert config["deltatune"]["tensors"] == ("peft" if isinstance(inner, dt.LoRA) else "deltatune")
    fresh = base()
    loaded = dt.load(fresh, tmp_path)
    assert loaded.labels == named(fresh) == labels
    assert torch.equal(logits(fresh), logits(model))
    loaded.save(tmp_path / "again")
    again = base()
    assert dt.load(again, tmp_path / "again").labels == labels and torch.equal(logits(again), logits(model))
    twin = copy.deepcopy(fresh)
    dt.activate(twin)
    assert named(fresh) == labels and named(twin) == named(base())


def test_peft_reads_the_head_and_its_own_are_read(tmp_path: Path) -> None:
    model = base("llama")
    perturbed(dt.attach(model, method(("a", "b", "c", "d")))).save(tmp_path / "ours")
    torch.manual_seed(0)
    four = tiny("llama", "classification", num_labels=4)
    state = base("llama").state_dict()
    four.load_state_dict({k: v for k, v in state.items() if k != "score.weight"}, strict=False)
    theirs = peft.PeftModel.from_pretrained(four, str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs, inputs(model)), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")  # which says nothing of names
    fresh = base("llama")
    assert dt.load(fresh, tmp_path / "theirs").labels == named(fresh) == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    torch.testing.assert_close(logits(fresh), logits(model))


def test_merging_makes_the_head_the_bases_and_unmerging_gives_it_back() -> None:
    model, labels = base(), ("a", "b", "c", "d")
    before, own, state = logits(model), named(model), {k: v.clone() for k, v in model.state_dict().items()}
    perturbed(dt.attach(model, method(labels), "four"))
    want = logits(model)
    dt.merge(model, "four")
    dt.activate(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert named(model) == labels
    dt.unmerge(model)
    assert named(model) == own
    dt.activate(model, "four")
    dt.detach(model)
    assert torch.equal(logits(model), before) and all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    perturbed(dt.attach(model, method(labels), "four"))
    want = logits(model)
    dt.merge(model, "four", keep=False)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    assert named(model) == labels and not dt.adapters(model)
    assert model.classifier.weight.shape[0] == 4


def test_a_new_head_is_drawn_where_the_classes_are_others_and_is_the_bases_where_not() -> None:
    model = base()
    torch.manual_seed(0)
    three = dt.attach(model, dt.Tune(labels=NAMES), "three").state_dict()
    assert torch.equal(three["classifier.0.v"], model.classifier.weight)
    seven = dt.attach(model, dt.Tune(labels=tuple("abcdefg")), "seven")
    weight, bias = seven.parameters()
    assert weight.shape == (7, 32) and 0.01 < float(weight.detach().std()) < 0.03 and not bias.any()
    assert dt.plan(base(), dt.Tune(labels=tuple("abcdefg"))).trained == 7 * 32 + 7
    deep = dt.attach(base("roberta"), dt.Tune(labels=("a", "b"))).state_dict()  # a dense layer comes before the last
    assert [tuple(t.shape) for t in deep.values()] == [(32, 32), (32,), (2, 32), (2,)]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def says(text: str, call: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(dt.DeltatuneError, match=text):
            call(*args, **kwargs)

    for name, inner in (("peft", dt.LoRA(r=2)), ("own", dt.Houlsby(size=4))):
        folder = dt.attach(base(), method(NAMES, inner)).save(tmp_path / name)
        for bare in (AutoModel.from_config(base().config), tiny("bert")):
            before = {k: v.clone() for k, v in bare.state_dict().items()}
            says(r"has no head that tells classes \(good, bad, odd\) apart", dt.load, bare, folder)
            assert not dt.adapters(bare) and all(torch.equal(before[k], v) for k, v in bare.state_dict().items())
        wide = tiny("bert", "classification", hidden_size=64)
        says("shape", dt.load, wide, folder)
        assert not dt.adapters(wide) and named(wide) == ("LABEL_0", "LABEL_1", "LABEL_2")
    says("LlamaForCausalLM has no head that tells", dt.attach, tiny("llama"), dt.Tune(labels=("a", "b")))
    says("a list of different names", dt.Tune, labels=("a", "a"))
    says("a list of different names", dt.Tune, labels="ab")
    stray = dt.Tune(targets="query", labels=("a", "b"))
    says("labels are those of 'classifier', which", dt.attach, base(), stray)


def _rows(path: Path, task: str) -> str:
    if task == "classification":
        rows: list[Any] = [{"text": f"{word} {i}", "label": word} for i in range(6) for word in NAMES]
    else:
        rows = [{"tokens": [w, "thing", str(i)], "tags": [w, "none", "none"]} for i in range(6) for w in NAMES]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _folder(path: Path, family: str) -> Path:
    """A language model, so that neither a head nor BERT's pooler is there."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tiny(family, vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("family", "task", "own"),
    [("bert", "classification", "lora"), ("llama", "classification", "houlsby"), ("bert", "tagging", "lora")],
)
def test_a_run_is_answered_with_on_a_fresh_base(family: str, task: str, own: str, tmp_path: Path) -> None:
    folder, file = _folder(tmp_path / "base", family), _rows(tmp_path / "rows.jsonl", task)
    outcome = run(Recipe.of({
        "base": str(folder), "output": str(tmp_path / "run"), "data": {"train": file}, "method": own,
        "train": {"epochs": 14, "lr": 2e-2, "batch_size": 9},
    }))  # fmt: skip
    auto: Any = AutoModelForSequenceClassification if task == "classification" else AutoModelForTokenClassification
    tokenizer, answers = tiny_tokenizer(), []
    for seed in (1, 2):
        torch.manual_seed(seed)  # whatever the base lacks is drawn anew
        model = auto.from_pretrained(folder).eval()
        adapter = dt.load(model, outcome.saved)
        assert set(adapter.labels) == {*NAMES, *(["none"] if task == "tagging" else [])}
        answers.append([])
        for word in NAMES:
            given = tokenizer(f"{word} 3" if task == "classification" else f"{word} thing 3", return_tensors="pt")
            out = logits(model, {k: given[k] for k in ("input_ids", "attention_mask")})
            answers[-1].append(out)
            assert named(model)[int(out[0].argmax(-1).flatten()[0])] == word
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_the_same_recipe_draws_the_same_head(tmp_path: Path) -> None:
    folder, file = _folder(tmp_path / "base", "bert"), _rows(tmp_path / "rows.jsonl", "classification")
    files = []
    for name in ("one", "two"):
        torch.manual_seed(len(files))
        told = {"base": str(folder), "output": str(tmp_path / name), "data": {"train": file}, "train": {"max_steps": 1}}
        files.append((run(Recipe.of(told)).saved / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_adapters_trained_one_after_another_on_one_model_merge_into_files(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "base", "llama")
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, pad_token_id=0).eval()
    tokenizer = tiny_tokenizer()
    tasks = {"mood": NAMES, "sign": ("plus", "minus")}
    for name, labels in tasks.items():
        adapter = dt.attach(model, method(labels), name)
        rows = [{"text": f"{word} {i}", "label": word} for i in range(6) for word in reversed(labels)]
        dt.train(model, adapter, rows, tokenizer=tokenizer, epochs=14, lr=2e-2, batch_size=6)
    for name, labels in tasks.items():
        dt.activate(model, name)
        for word in labels:
            out = logits(model, {"input_ids": tokenizer(f"{word} 3", return_tensors="pt")["input_ids"]})
            assert named(model)[int(out.argmax())] == word
        dt.adapters(model)[name].save(tmp_path / name)
    config = json.loads((tmp_path / "mood" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    given = inputs(model)
    dt.activate(model, "mood")
    want = logits(model, given)
    done = write_merged(folder, [tmp_path / "mood"], tmp_path / "merged")
    written: Any = AutoModelForSequenceClassification.from_pretrained(done.folder)
    assert named(written) == NAMES
    torch.testing.assert_close(logits(written, given), want, rtol=1e-4, atol=1e-4)
