"""A tiny base twice, once for us and once for PEFT, and how their outputs are compared."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file

import deltatune as dt
from deltatune.interop import peft_format  # noqa: F401  registers PEFT's layout
from deltatune.models.tiny import inputs, tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@cache
def _state(family, task):
    torch.manual_seed(0)
    return tiny(family, task).state_dict()


def base(family, task="lm", **config):
    if config:
        torch.manual_seed(0)
        return tiny(family, task, **config)
    net = tiny(family, task)
    net.load_state_dict(_state(family, task))
    return net


@torch.no_grad()
def outputs(net, given=None):
    """The logits, or the states of a model without a head."""
    out = net(**(given or inputs(getattr(net, "base_model", net) if not hasattr(net, "config") else net)))
    return out.logits if hasattr(out, "logits") else out[0]


@torch.no_grad()
def perturb(parameters, scale=0.05, seed=1):
    """Noise on every trained parameter, so that none is at a value that hides it."""
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(torch.randn(p.shape, generator=g) * scale)


def from_peft(net, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(net, folder).eval()


def save_peft(net, config, folder, seed=1):
    """A PEFT adapter on `net`, perturbed and saved -> (the PeftModel, its outputs)."""
    given = inputs(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(net, config).eval()
        perturb((p for p in model.parameters() if p.requires_grad), seed=seed)
        model.save_pretrained(folder)
    return model, outputs(model, given)


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=1e-5)


def edit(folder, **fields):
    """Change the configuration in `folder`; a field that is `...` is taken out."""
    path = Path(folder) / CONFIG
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def tensors_of(folder):
    return load_file(Path(folder) / TENSORS)


def write_tensors(folder, tensors):
    save_file({k: t.contiguous() for k, t in tensors.items()}, Path(folder) / TENSORS, metadata={"format": "pt"})


def config_of(folder):
    return json.loads((Path(folder) / CONFIG).read_text())


def saved(net, method, folder, dtype=None):
    """`method` on `net`, perturbed and saved in PEFT's layout -> (its outputs, the base's)."""
    given = inputs(net)
    plain = outputs(net, given)
    adapter = dt.attach(net, method, dtype=dtype)
    perturb(adapter.parameters())
    moved = outputs(net, given)
    assert (moved - plain).abs().max() > 1e-3
    adapter.save(folder)
    assert config_of(folder)["deltatune"]["tensors"] == "peft"
    return moved, plain
