"""The drop-in's VeraConfig, LoHaConfig and LoKrConfig: where PEFT starts, what it computes, and the files of both."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from peft_pairs import base, close, outputs, perturb
from torch import nn

from deltatune.core import DeltatuneError
from deltatune.interop import peft as dropin
from deltatune.models.tiny import inputs


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vera": ("llama", "VeraConfig", {"r": 6, "projection_prng_key": 3}),
    "vera without its pair": (
        "llama",
        "VeraConfig",
        {"r": 6, "save_projection": False, "target_modules": "all-linear"},
    ),
    "vera of (in, out)": ("gpt2", "VeraConfig", {"r": 6, "d_initial": 0.4}),
    "vera, its biases": ("gpt2", "VeraConfig", {"r": 6, "bias": "vera_only", "modules_to_save": ["ln_f"]}),
    "vera, all biases": ("t5", "VeraConfig", {"r": 6, "bias": "all"}),
    "loha": ("llama", "LoHaConfig", {"r": 3, "alpha": 5}),
    "loha patterns": ("llama", "LoHaConfig", {"r": 3, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 4}}),
    "loha saved": ("t5", "LoHaConfig", {"target_modules": ["q", "wo"], "modules_to_save": ["final_layer_norm"]}),
    "lokr": ("llama", "LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr both": ("llama", "LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4}),
    "lokr patterns": ("t5", "LoKrConfig", {"r": 2, "rank_pattern": {"v": 1}, "target_modules": "all-linear"}),
    "lokr whole": ("bert", "LoKrConfig", {"r": 16, "layers_to_transform": [0], "target_modules": ["query"]}),
}


def _both(case: str) -> tuple[Any, Any, str]:
    family, name, options = CASES[case]
    ours, theirs = (getattr(package, name)(**copy.deepcopy(options)) for package in (dropin, peft))
    return ours, theirs, family


@pytest.mark.parametrize("case", CASES)
def test_same_output_from_the_same_tensors_and_both_files(case: str, tmp_path: Any) -> None:
    mine, yours, family = _both(case)
    given = inputs(base(family))
    before = outputs(base(family), given)
    ref = peft.get_peft_model(base(family), yours).eval()
    model = dropin.get_peft_model(base(family), mine)
    close(outputs(model, given), before)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(
        p.numel() for p in ref.parameters() if p.requires_grad
    )
    if CASES[case][2].get("target_modules") != "all-linear":  # PEFT shortens these names
        assert set(mine.target_modules) == set(yours.target_modules)
    perturb(p for p in ref.parameters() if p.requires_grad)
    want, tensors = outputs(ref, given), peft.get_peft_model_state_dict(ref)
    assert (want - before).abs().max() > 1e-3
    dropin.set_peft_model_state_dict(model, tensors)
    close(outputs(model, given), want)
    held = dropin.get_peft_model_state_dict(model)
    assert all(torch.equal(held[key], t) for key, t in tensors.items() if "bias" not in key)
    model.save_pretrained(tmp_path / "ours")
    close(outputs(peft.PeftModel.from_pretrained(base(family), tmp_path / "ours").eval(), given), want)
    ref.save_pretrained(tmp_path / "theirs")
    again = dropin.PeftModel.from_pretrained(base(family), tmp_path / "theirs")
    close(outputs(again, given), want)
    assert type(again.peft_config["default"]) is type(mine)
    close(outputs(again.merge_and_unload(), given), want)


@pytest.mark.parametrize("case", ["vera", "vera of (in, out)", "vera without its pair"])
def test_vera_draws_the_same_pair(case: str) -> None:
    mine, yours, family = _both(case)
    ref = peft.get_peft_model(base(family), yours).base_model
    pair: Any = dropin.get_peft_model(base(family), mine)
    held = dropin.get_peft_model_state_dict(pair)
    assert torch.equal(held["base_model.vera_A"], ref.vera_A["default"])
    assert torch.equal(held["base_model.vera_B"], ref.vera_B["default"])


STARTS: list[tuple[str, dict[str, Any]]] = [
    ("LoHaConfig", {}), ("LoHaConfig", {"init_weights": False}), ("LoKrConfig", {}),
    ("LoKrConfig", {"init_weights": False}), ("LoKrConfig", {"init_weights": "lycoris"}),
    ("LoKrConfig", {"decompose_both": True}), ("LoKrConfig", {"r": 64}),
]  # fmt: skip


@pytest.mark.parametrize("name,options", STARTS)
def test_it_starts_where_peft_does(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    pair = []
    for package in (dropin, peft):
        net = nn.Sequential(nn.Linear(1024, 1024))
        model = package.get_peft_model(net, getattr(package, name)(target_modules=["0"], **options))
        pair.append(package.get_peft_model_state_dict(model))
    assert pair[0].keys() == pair[1].keys()
    for key, t in pair[0].items():
        assert t.std().item() == pytest.approx(pair[1][key].std().item(), rel=0.15, abs=1e-9), key


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.out = nn.Conv2d(4, 8, 3), nn.Embedding(4, 4), nn.Linear(8, 8)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("LoHaConfig", {"rank_dropout": 0.1}, "LoHaConfig.rank_dropout=0.1 is not offered"),
    ("LoKrConfig", {"module_dropout": 0.2}, "LoKrConfig.module_dropout=0.2"),
    ("LoKrConfig", {"rank_dropout_scale": True}, "rank_dropout_scale=True"),
    ("LoKrConfig", {"decompose_factor": 4}, r"out: decompose_factor = 4 splits 8 into \(4, 2\).*up to 2"),
    ("LoHaConfig", {"use_effective_conv2d": True, "target_modules": ["conv"]}, "use_effective_conv2d=True: 'conv'"),
    ("LoKrConfig", {"target_modules": ["table"]}, "'table' is a Embedding, and PEFT's LoKr has no such layer"),
    ("VeraConfig", {"target_modules": ["conv"]}, "target 'conv' is a Conv2d"),
    ("VeraConfig", {"init_weights": False}, "VeraConfig.init_weights=False"),
]


@pytest.mark.parametrize("name,options,words", REFUSED)
def test_what_is_not_offered_is_refused_by_name(name: str, options: dict[str, Any], words: str) -> None:
    net = Net()
    with pytest.raises(DeltatuneError, match=words):
        dropin.get_peft_model(net, getattr(dropin, name)(**{"target_modules": ["out"], **options}))
    assert type(net) is Net and not hasattr(net, "peft_config")


@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig"])
def test_gpt2_is_refused_as_peft_does(name: str) -> None:
    with pytest.raises(TypeError, match="not supported"):
        peft.get_peft_model(base("gpt2"), getattr(peft, name)())
    with pytest.raises(DeltatuneError, match="is a Conv1D, and PEFT's Lo.. has no such layer; .*deltatune"):
        dropin.get_peft_model(base("gpt2"), getattr(dropin, name)())


@pytest.mark.parametrize("name,options", [
    ("VeraConfig", {"bias": "lora_only"}), ("LoKrConfig", {"init_weights": "kaiming"}),
    ("LoHaConfig", {"layers_pattern": "h"}), ("VeraConfig", {"layers_pattern": "h"}),
])  # fmt: skip
def test_wrong_configurations(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(DeltatuneError, match=next(iter(options))):
        getattr(dropin, name)(**options)


@pytest.mark.parametrize("case", ["vera", "loha patterns", "lokr both"])
def test_configuration_files(case: str, tmp_path: Any) -> None:
    mine, _, _ = _both(case)
    mine.save_pretrained(tmp_path)
    assert dropin.PeftConfig.from_pretrained(tmp_path) == mine
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert {k: v for k, v in theirs.to_dict().items() if k != "runtime_config"} == mine.to_dict()


def test_an_adapter_trains_beside_another() -> None:
    model = dropin.get_peft_model(base("llama"), dropin.VeraConfig(r=4))
    model.add_adapter("second", dropin.LoHaConfig(r=2))
    model.set_adapter("second")
    ids = torch.randint(1, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all("second" in name for name in moved)
