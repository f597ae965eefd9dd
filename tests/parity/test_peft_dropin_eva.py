"""`init_lora_weights="eva"` and `initialize_lora_eva_weights` of the drop-in."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from peft_pairs import base, close, outputs, perturb

from deltatune.core import DeltatuneError
from deltatune.interop import peft as dropin
from deltatune.models.tiny import inputs

GIVEN = inputs(base("llama"))


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _started(rho: float = 2.0, **options: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    config = dropin.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="eva", target_modules=["q_proj", "up_proj", "down_proj"],
        eva_config=dropin.EvaConfig(rho=rho, **options),
    )  # fmt: skip
    net = base("llama")
    return dropin.get_peft_model(net, config), [inputs(net, 4, 24, seed=i) for i in range(3)]


def test_it_starts_from_the_directions_of_the_inputs(tmp_path: Any) -> None:
    model, batches = _started(rho=1.0)
    before = outputs(base("llama"), GIVEN)
    close(outputs(model, GIVEN), before)
    seen: list[torch.Tensor] = []
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    dropin.initialize_lora_eva_weights(model, batches * 2)
    close(outputs(model, GIVEN), before)
    a = module.adapters.units["default"][0].a
    want = torch.linalg.svd(torch.cat(seen), full_matrices=False).Vh[:2]
    cosines = (a[:2] * want).sum(1).abs()
    assert a.shape[0] == 4 and bool((cosines > 0.9).all()), cosines
    assert not model.peft_config["default"].rank_pattern


def test_ranks_move_and_both_files_hold_them(tmp_path: Any) -> None:
    model, batches = _started()
    dropin.initialize_lora_eva_weights(model, batches)
    ranks = {n: t.shape[0] for n, t in dropin.get_peft_model_state_dict(model).items() if "lora_A" in n}
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1
    config = model.peft_config["default"]
    assert sorted(config.rank_pattern.values()) == sorted(r for r in ranks.values() if r != 4)
    perturb(p for p in model.parameters() if p.requires_grad)
    want = outputs(model, GIVEN)
    model.save_pretrained(tmp_path)
    close(outputs(peft.PeftModel.from_pretrained(base("llama"), tmp_path).eval(), GIVEN), want)
    again = dropin.PeftModel.from_pretrained(base("llama"), tmp_path)
    close(outputs(again, GIVEN), want)
    held = {k: t.clone() for k, t in dropin.get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
    dropin.set_peft_model_state_dict(model, held)
    close(outputs(model, GIVEN), want)


def test_labels_that_hide_no_more_than_the_mask() -> None:
    model, batches = _started()
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
    dropin.initialize_lora_eva_weights(model, batches)
    model, _ = _started()
    batches[0]["labels"][:, :3] = -100
    with pytest.raises(DeltatuneError, match="use_label_mask=True: the labels hide tokens"):
        dropin.initialize_lora_eva_weights(model, batches)
    model, _ = _started(use_label_mask=False)
    dropin.initialize_lora_eva_weights(model, batches)


def test_what_is_not_offered() -> None:
    for option in ({"whiten": True}, {"adjust_scaling_factors": False}):
        with pytest.raises(DeltatuneError, match=f"EvaConfig.{next(iter(option))}="):
            _started(**option)
    model, batches = _started()
    with pytest.raises(DeltatuneError, match="eva_state_dict is not offered"):
        dropin.initialize_lora_eva_weights(model, eva_state_dict={})
    with pytest.raises(DeltatuneError, match="prepare_layer_inputs_fn is not offered"):
        dropin.initialize_lora_eva_weights(model, batches, prepare_layer_inputs_fn=print)
    with pytest.raises(DeltatuneError, match="give dataloader"):
        dropin.initialize_lora_eva_weights(model)
    plain = dropin.get_peft_model(base("llama"), dropin.LoraConfig())
    with pytest.raises(DeltatuneError, match="init_lora_weights='eva'"):
        dropin.initialize_lora_eva_weights(plain, batches)


def test_fields_and_names() -> None:
    ours, theirs = (p.LoraConfig(init_lora_weights="eva", eva_config=p.EvaConfig(rho=1.5)) for p in (dropin, peft))
    assert ours.to_dict()["eva_config"] == theirs.to_dict()["eva_config"]
    assert dropin.LoraConfig(eva_config={"rho": 1.0}).eva_config == dropin.EvaConfig(rho=1.0)
    assert dropin.LoraConfig(init_lora_weights="eva").eva_config == dropin.EvaConfig()
