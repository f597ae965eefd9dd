"""loralib's checkpoints, read: `torch.save(lora.lora_state_dict(model), path)` of microsoft/LoRA.

    Linear         lora_A (r, in),         lora_B (out, r)              dW = B A
    MergedLinear   lora_A (r e, in),       lora_B (e out / K, r)        dW = B_j A_j on the rows of the j-th of e pieces
    Embedding      lora_A (r, tokens),     lora_B (dim, r)              dW = (B A)'
    Conv2d         lora_A (r k, in k),     lora_B (out k, r k)          dW = B A read as (out, in, k, k)

times alpha / r, beside each module's own name. What the file does not hold must be told: alpha, and which of the K
pieces of a MergedLinear are adapted (`enable_lora`), unless all are. Biases that were trained are read as well.

The file is a pickle. It is read with `weights_only=True`, which builds tensors and dictionaries and calls nothing else,
rather than asking for a conversion that would have to trust it; a safetensors file with the same names does as well.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deltatune.core import Adapter, DeltatuneError, Fused, Method
from deltatune.core.checkpoint import register_decoder, restore
from deltatune.interop.peft_format_common import Piece, Stored, Tensors, assemble, exact_targets, frozen
from deltatune.interop.peft_format_saved import decode_saved
from deltatune.methods.lora import LoRA
from deltatune.storage import layers

FORMAT = "loralib"  # the key of a configuration that says so
Pieces = tuple[int, tuple[int, ...]] | None  # (K, those adapted) of a fused projection; None for a whole module


def load_loralib(model: nn.Module, path: str | Path, *, alpha: float, enable_lora: Sequence[bool] | None = None,
                 name: str | None = None, dtype: torch.dtype | None = None) -> Adapter:  # fmt: skip
    """Attach the LoRA of a loralib checkpoint and activate it. `alpha` is the `lora_alpha` it was trained with.

    Raises DeltatuneError, and leaves the model as it was, when the file is no such checkpoint or does not fit.
    """
    config = {FORMAT: {"lora_alpha": alpha, "enable_lora": None if enable_lora is None else list(enable_lora)}}
    return restore(model, config, _read(Path(path)), path, name, dtype=dtype)


def _read(path: Path) -> Tensors:
    if not path.is_file():
        raise DeltatuneError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as e:
        reason = str(e).split("\n")[0]
        raise DeltatuneError(f"{path}: not a file of tensors alone, or damaged ({reason})") from e
    if isinstance(state, Mapping):
        state = state.get("model_state_dict", state)  # as the examples of loralib save it
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise DeltatuneError(f"{path}: not a state dict; save `lora.lora_state_dict(model)` alone")
    return dict(state)


def decode(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Method, Tensors]:
    """The method and its tensors, by our names: as few LoRAs as there are ways to be fused."""
    own = config[FORMAT]
    stored = Stored(model, tensors, "" if hasattr(model, "module") else "module.")  # DistributedDataParallel's
    down, up = stored.take("lora_A"), stored.take("lora_B")
    if not down or down.keys() != up.keys():
        odd = next(iter(down.keys() ^ up.keys()), None)
        raise DeltatuneError("no lora_A in it" if odd is None else f"{odd}: lora_A or lora_B is missing")
    groups: dict[Pieces, dict[str, list[Tensors]]] = {}
    times: dict[str, int] = {}
    for path, a in down.items():
        module: Any = stored.modules[path]
        pieces, units, times[path] = _units(path, module, a, up[path], own["enable_lora"])
        groups.setdefault(pieces, {})[path] = units
        for param in ("weight", "bias"):  # of a convolution, which loralib keeps one level deeper
            if (t := stored.left.pop(f"{path}.conv.{param}", None)) is not None:
                stored.left[f"{path}.{param}"] = t
        weight = stored.left.get(f"{path}.weight")
        if weight is not None and not torch.equal(weight, module.weight.to(weight)):
            raise DeltatuneError(f"{path}: its weight is not the base's; if merged, save `lora.lora_state_dict(model)`")
    main = [
        Piece(_method(model, pieces, found, times, own["lora_alpha"]), [(p, u) for p, us in found.items() for u in us])
        for pieces, found in groups.items()
    ]
    inside, beside = decode_saved(model, {"peft_type": "loralib's LoRA"}, stored)
    return assemble([*inside, *main, *beside])


def _units(path: str, module: Any, a: Tensor, b: Tensor,
           enabled: Sequence[bool] | None) -> tuple[Pieces, list[Tensors], int]:  # fmt: skip
    """What is fused, the factors of each unit, and how often loralib's r its rank is."""
    out, in_ = frozen(module, "weight").shape
    r = b.shape[1]
    if isinstance(module, nn.Embedding) and (a.shape, len(b)) == ((r, out), in_):
        return None, [{"a": b.T, "b": a.T}], 1
    if isinstance(module, nn.Conv2d):
        k = module.kernel_size[0]
        if module.groups == 1 and (len(b), a.shape) == (out * k, (r, in_ // k)):
            # row (o, i) of B A holds the i-th line of the kernels of output o: A acts on each of the k lines
            return None, [{"a": torch.block_diag(*[a] * k), "b": b.reshape(out, k * r)}], k * k
    if layers.is_linear(module):
        if (a.shape, len(b)) == ((r, in_), out):
            return None, [{"a": a, "b": b}], 1
        e, k = len(a) // r, out * (len(a) // r) // len(b)
        if (a.shape, len(b) * k) == ((r * e, in_), out * e) and 0 < e <= k and out % k == 0:
            take = tuple(range(k)) if e == k else tuple(i for i, on in enumerate(enabled or ()) if on)
            if len(take) != e or (e < k and len(enabled or ()) != k):
                raise DeltatuneError(
                    f"{path}: {e} of {k} pieces of it are adapted, which enable_lora={enabled} does not tell; "
                    f"give {k} values, {e} of them true, such as the layer was made with"
                )
            parts = zip(a.split(r), b.split(out // k), strict=True)
            return (k, take), [{"inner.a": down, "inner.b": up} for down, up in parts], 1
    kind = layers.plain_class(type(module)).__name__
    raise DeltatuneError(
        f"{path}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit this {kind} with "
        f"a weight of {tuple(module.weight.shape)}; is it another base, or a convolution in groups?"
    )


def _method(model: nn.Module, pieces: Pieces, found: Mapping[str, list[Tensors]], times: Mapping[str, int],
            alpha: float) -> LoRA:  # fmt: skip
    ranks = {path: next(len(t) for n, t in units[0].items() if n.endswith("a")) for path, units in found.items()}
    alphas = {path: alpha * times[path] for path in found}
    targets: Any = exact_targets(model, found)
    if pieces is not None:
        targets = Fused(targets=targets, sizes=(1,) * pieces[0], take=pieces[1])
    (r, ranks_), (alpha, alphas_) = _pattern(ranks), _pattern(alphas)
    return LoRA(targets=targets, r=r, ranks=ranks_, alpha=alpha, alphas=alphas_)


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """One of the values, and those that differ from it by the whole path of their module."""
    usual = next(iter(values.values()))
    return usual, {f"^{re.escape(path)}": v for path, v in values.items() if v != usual}


register_decoder(decode, lambda config: FORMAT in config)
