"""What is saved of an AdaLoRA whose budget is met: the triplets that are left, and which they are, as PEFT does it."""

import warnings

import peft
import pytest
import torch
from peft_pairs import base, close, config_of, edit, from_peft, outputs, tensors_of, write_tensors
from runs_of import documents

import deltatune as dt
from deltatune.core import Run
from deltatune.data import Batches
from deltatune.interop import peft as dropin
from deltatune.methods.adalora import Triplets
from deltatune.models.tiny import inputs
from deltatune.train.loop import fit
from deltatune.train.options import TrainOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA tensor")  # PEFT, of modules that are left none, as it does
STEPS = 8
CASES = [
    ("llama", dt.Part("q", "v", "down")),
    ("gpt2", dt.Part("q", "v", "up")),  # two thirds of a fused projection, twice the triplets there
    ("gpt2", dt.Part("o", "down")),
    ("bloom", dt.Part("q")),
    ("bert", dt.Part("q", "v", "up")),
    ("t5", dt.Part("q", "o")),
]


def method(targets, **options):
    return dt.AdaLoRA(**{"target_r": 1, "init_r": 4, "t_init": 1, "t_final": 2, "alpha": 10} | options, targets=targets)


def allocated(net, given, method, until=STEPS):
    """An adapter on `net` that was trained for `until` of the steps of a run."""
    torch.manual_seed(0)
    adapter = dt.attach(net, method)
    run = Run(net, adapter, STEPS, optimizer=torch.optim.Adam(adapter.parameters(), lr=5e-2))
    (events,) = (c.start(run) for c in adapter.callbacks())
    for run.step in range(1, until + 1):
        events.on_loss(run, outputs.__wrapped__(net, given).square().mean()).backward()
        run.optimizer.step()
        events.on_step_end(run)
        run.optimizer.zero_grad()
    return adapter


def triplets(adapter):
    return [m for _, unit in adapter.units() for m in unit.modules() if isinstance(m, Triplets)]


def left(adapter):
    return sum(int((t.e != 0).sum()) for t in triplets(adapter))


def pattern_of(folder):
    return config_of(folder)["rank_pattern"]


@pytest.mark.parametrize("family,targets", CASES)
def test_the_final_ranks_are_saved(family, targets, tmp_path):
    net = base(family)
    given, plain = inputs(net), outputs(net)
    adapter = allocated(net, given, method(targets))
    want = outputs(net, given)
    assert (want - plain).abs().max() > 1e-3
    adapter.save(tmp_path / "a")

    budget = len(triplets(adapter))
    assert left(adapter) == budget
    pattern, stored = pattern_of(tmp_path / "a"), tensors_of(tmp_path / "a")
    assert sum(map(sum, pattern.values())) == budget
    assert {len(kept) for kept in pattern.values()} == {config_of(tmp_path / "a")["init_r"]}
    assert stored.keys() == {f"base_model.model.{k[:-1]}{n}" for k in pattern for n in "ABE"}
    for key, kept in pattern.items():
        a, b, e = (stored[f"base_model.model.{key[:-1]}{n}"] for n in "ABE")
        assert len(a) == b.shape[1] == len(e) == sum(kept) and bool(e.all())

    theirs = from_peft(base(family), tmp_path / "a")
    close(outputs(theirs, given), want)
    theirs.save_pretrained(tmp_path / "b")
    close(outputs(theirs.merge_and_unload(), given), want)
    for folder in ("a", "b"):
        ours = base(family)
        again = dt.load(ours, tmp_path / folder)
        close(outputs(ours, given), want)
        assert left(again) == budget
        again.save(tmp_path / "c")
        assert pattern_of(tmp_path / "c") == pattern
        assert all(torch.equal(t, stored[k]) for k, t in tensors_of(tmp_path / "c").items())


def finished_in_peft(net, given, folder):
    """The outputs of an adapter that PEFT trained, allocated and saved."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        target_modules=["q_proj", "down_proj"], init_r=4, target_r=1, tinit=1, tfinal=2, total_step=STEPS,
        lora_alpha=10, task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).eval()
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-2)
        for step in range(1, STEPS + 1):
            model(**given).logits.square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return outputs(model, given)


def test_a_file_of_pefts_is_written_as_it_was(tmp_path):
    net = base("llama")
    given = inputs(net)
    want = finished_in_peft(net, given, tmp_path / "theirs")
    ours = base("llama")
    adapter = dt.load(ours, tmp_path / "theirs")
    close(outputs(ours, given), want)
    adapter.save(tmp_path / "ours")
    assert pattern_of(tmp_path / "ours") == pattern_of(tmp_path / "theirs")
    stored = tensors_of(tmp_path / "theirs")
    assert any(not len(t) for t in stored.values())  # modules that are left none
    assert stored.keys() == tensors_of(tmp_path / "ours").keys()
    assert all(torch.equal(t, stored[k]) for k, t in tensors_of(tmp_path / "ours").items())


@pytest.mark.parametrize("until", [0, 1, 3])
def test_before_the_budget_is_met_all_triplets_are_saved(until, tmp_path):
    """None is left out while it may still grow; an untrained adapter, all of zeros, is whole."""
    net = base("llama")
    given = inputs(net)
    adapter = allocated(net, given, method(dt.Part("q", "down")), until)
    assert left(adapter) == 0 if until == 0 else left(adapter) > len(triplets(adapter))
    adapter.save(tmp_path)
    assert pattern_of(tmp_path) is None
    assert {len(t) for k, t in tensors_of(tmp_path).items() if k.endswith("lora_E")} == {4}
    close(outputs(from_peft(base("llama"), tmp_path), given), outputs(net, given))


def test_where_nothing_is_to_be_left_out_there_is_no_pattern(tmp_path):
    net = base("llama")
    allocated(net, inputs(net), method(dt.Part("q", "down"), target_r=4)).save(tmp_path)
    assert pattern_of(tmp_path) is None


def test_what_is_read_back_trains_on(tmp_path):
    """Triplets that a file leaves out begin anew, so that a module left none trains too, to be chosen again or not."""
    net = base("llama")
    given = inputs(net)
    adapter = allocated(net, given, method(dt.Part("q", "down"), t_final=0))
    adapter.save(tmp_path / "a")
    assert not all(map(any, pattern_of(tmp_path / "a").values()))
    ours = base("llama")
    again = dt.load(ours, tmp_path / "a")
    close(outputs(ours, given), outputs(net, given), atol=1e-6)
    before = {k: t.clone() for k, t in dt.load(base("llama"), tmp_path / "a").state_dict().items()}
    assert all(torch.equal(t, before[k]) for k, t in again.state_dict().items())  # read twice, the same

    outputs.__wrapped__(ours, given).square().mean().backward()
    assert all(bool(t.e.grad.all()) for t in triplets(again))
    ours.zero_grad()
    options = TrainOptions(max_steps=12, batch_size=4, lr=5e-2, precision="fp32")
    result = fit(ours, again, Batches(documents(), batch_size=4), options=options)
    assert result.proof is not None
    assert left(again) == len(triplets(again))
    want = outputs(ours, given)
    again.save(tmp_path / "b")
    assert sum(map(sum, pattern_of(tmp_path / "b").values())) == left(again)
    close(outputs(from_peft(base("llama"), tmp_path / "b"), given), want)


def test_the_drop_in_reads_its_own_tensors():
    """Whose live configuration has no pattern: the number of triplets says it all, as their order does not matter."""
    net = base("llama")
    given = inputs(net)
    config = dropin.AdaLoraConfig(
        target_modules=["q_proj", "down_proj"], init_r=4, target_r=1, tinit=1, tfinal=2, total_step=STEPS
    )
    model = dropin.get_peft_model(net, config).eval()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-2)
    for step in range(1, STEPS + 1):
        model(**given).logits.square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    want = outputs(model, given)
    state = {k: t.clone() for k, t in dropin.get_peft_model_state_dict(model).items()}
    assert sum(len(t) for k, t in state.items() if "lora_E" in k) == 4
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    dropin.set_peft_model_state_dict(model, state)
    close(outputs(model, given), want)


@pytest.mark.parametrize("which,cut", [("lora_A", 0), ("lora_B", 1), ("lora_E", 0)])
def test_tensors_that_disagree_are_refused(which, cut, tmp_path):
    net = base("llama")
    allocated(net, inputs(net), method(dt.Part("down"), target_r=3)).save(tmp_path)
    stored = tensors_of(tmp_path)
    key = next(k for k, t in stored.items() if k.endswith(which) and t.shape[cut])
    write_tensors(tmp_path, stored | {key: stored[key].narrow(cut, 0, stored[key].shape[cut] - 1)})
    with pytest.raises(dt.DeltatuneError, match="triplets"):
        dt.load(base("llama"), tmp_path)
    write_tensors(tmp_path, stored)
    edit(tmp_path, init_r=1)
    with pytest.raises(dt.DeltatuneError, match="triplets.*init_r=1"):
        dt.load(base("llama"), tmp_path)
