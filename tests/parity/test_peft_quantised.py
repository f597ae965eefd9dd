"""LoRA and DoRA on bases that bitsandbytes stores: the outputs and gradients of PEFT's own layers."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft_pairs import from_peft, outputs, perturb

import deltatune as dt
from deltatune.models.loading import load_base
from deltatune.models.tiny import inputs, tiny

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_the_tutorial_of_four_bits_runs_on_the_drop_in(kind, tmp_path):
    from deltatune.interop.peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(0)
    tiny("llama").save_pretrained(tmp_path)
    net = prepare_model_for_kbit_training(load_base(tmp_path, quantize=kind, dtype=torch.bfloat16))
    assert net.model.norm.weight.dtype == torch.float32
    net = get_peft_model(net, LoraConfig(r=4, task_type="CAUSAL_LM"))
    trained, every = net.get_nb_trainable_parameters()
    assert every - trained == sum(p.numel() for p in tiny("llama").parameters())
    given = inputs(net)
    losses = []
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(6):
        losses.append(net.train()(**given, labels=given["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind,dora", [("nf4", False), ("nf4", True), ("int8", False)])  # PEFT's own DoRA fails on int8
def test_files_written_here_give_the_same_outputs_there(kind, dora, tmp_path):
    torch.manual_seed(0)
    tiny("llama", attention_bias=True).save_pretrained(tmp_path / "base")
    ours = load_base(tmp_path / "base", quantize=kind, dtype=torch.float32)
    theirs = copy.deepcopy(ours)
    method = dt.LoRA(r=4, alpha=12, targets=("q_proj", "down_proj"))
    adapter = dt.attach(ours, dt.DoRA(inner=method, targets=method.targets) if dora else method)
    perturb(adapter.parameters())
    adapter.save(tmp_path / "a")
    theirs = from_peft(theirs, tmp_path / "a")
    given = inputs(ours)
    torch.testing.assert_close(outputs(ours, given), outputs(theirs, given), atol=1e-5, rtol=1e-5)
    for net in (ours, theirs):
        net.train()  # on a CPU, LLM.int8() rounds its inputs in evaluation alone
    grads = []
    for p in (*adapter.parameters(), *(q for n, q in theirs.named_parameters() if "lora" in n)):
        p.requires_grad_(True)
    ours(**given).logits.square().mean().backward()
    theirs(**given).logits.square().mean().backward()
    stored = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in theirs.named_parameters()}
    for path, _, unit, _ in adapter.sites():
        inner = unit.inner if dora else unit
        for name, p in (("lora_A.weight", inner.a), ("lora_B.weight", inner.b)):
            grads.append(p.grad)
            torch.testing.assert_close(p.grad, stored[f"{path}.{name}"].grad, atol=1e-6, rtol=1e-3)
    assert len(grads) == 8 and all(g.any() for g in grads)
    assert isinstance(theirs, peft.PeftModel)
