"""LoftQ against PEFT's, which runs on a GPU alone: here its "cuda" is the CPU, and nothing else of it is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.loftq_utils import loftq_init, replace_lora_weights_loftq
from peft_pairs import outputs
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import deltatune as dt
from deltatune.models.loading import load_base
from deltatune.models.tiny import inputs, tiny
from deltatune.storage import layers

pytest.importorskip("bitsandbytes")

R = 8
TARGETS = ("q_proj", "down_proj")
PLAIN = "nf4, scales in fp32"


class OnCPU(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(v: Any) -> Any:
            return "cpu" if isinstance(v, str | torch.device) and str(v).startswith(("cuda", "xpu")) else v

        return func(*map(here, args), **{k: here(v) for k, v in (kwargs or {}).items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base")
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def loaded(folder: Path, kind: str) -> Any:
    if kind != PLAIN:
        return load_base(folder, quantize=kind, dtype=torch.float32)  # type: ignore[arg-type]
    stored = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=stored, dtype=torch.float32)


def left(w: Tensor, q: Tensor, product: Tensor) -> float:
    return torch.linalg.matrix_norm(w - q - product).item()


@pytest.mark.parametrize("kind,bits", [(PLAIN, 4), ("nf4", 4), ("int8", 8)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_the_alternation_is_peft_s(kind: str, bits: int, iterations: int, folder: Path) -> None:
    """PEFT's four bits have scales in fp32. On a base stored so, Q and B A are the same; on one whose scales are
    quantised again, as QLoRA has it, what is left of W is. PEFT leaves out s, which is 1 here."""
    whole, net = load_base(folder, dtype=torch.float32), loaded(folder, kind)
    adapter = dt.attach(net, dt.LoRA(r=R, alpha=R, init=dt.LoftQ(iterations=iterations), targets=TARGETS))
    for path, module, unit, _ in adapter.sites():
        w, q = whole.get_submodule(path).weight.detach(), layers.read(module, "weight")
        with OnCPU():
            other, a, b = loftq_init(w, bits, R, iterations)
        reference = left(w, other, b @ a)
        assert left(w, q, unit.b @ unit.a) == pytest.approx(reference, rel=5e-3 if kind == "nf4" else 1e-4)
        assert 0 < reference < 0.9 * left(w, other, torch.zeros_like(w))
        if kind != "nf4":
            torch.testing.assert_close(q, other, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(unit.b @ unit.a, b @ a, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [R, 2 * R])
def test_factors_for_a_base_that_is_quantised_already(alpha: int, folder: Path) -> None:
    """`replace_lora_weights_loftq` is one iteration, and B A whatever s is; here s B A is."""
    ours, theirs = (loaded(folder, "nf4") for _ in range(2))
    adapter = dt.attach(ours, dt.LoRA(r=R, alpha=alpha, init=dt.LoftQ(), targets=TARGETS))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=R, lora_alpha=alpha, target_modules=list(TARGETS)))
    with OnCPU():
        replace_lora_weights_loftq(theirs, str(folder))
    whole = load_base(folder, dtype=torch.float32)
    for path, module, unit, _ in adapter.sites():
        w, q = whole.get_submodule(path).weight, layers.read(module, "weight")
        other = theirs.get_submodule(f"base_model.model.{path}")
        b, a = other.lora_B["default"].weight, other.lora_A["default"].weight
        product = unit.s * unit.b @ unit.a
        torch.testing.assert_close(product, b @ a, rtol=1e-3, atol=1e-6)
        if unit.s != 1:
            assert left(w, q, product) < left(w, q, unit.s * b @ a)
    if alpha == R:
        torch.testing.assert_close(outputs(ours, inputs(ours)), outputs(theirs, inputs(ours)), rtol=1e-4, atol=1e-5)
