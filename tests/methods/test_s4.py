"""S4: which block has what, in what number, and that each component is the ordinary one."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

import deltatune as dt
from deltatune.core.units import Sliced
from deltatune.methods.lora import LowRank
from deltatune.methods.pfeiffer import Bottleneck
from deltatune.methods.tune import Copy
from deltatune.models.prefixing import Prefix
from deltatune.models.tiny import inputs, tiny

NO_BIAS = (("adapter", "lora"), ("adapter", "prefix"), ("adapter", "prefix"), ("prefix", "lora"))
STRATEGIES = ({"adapter", "lora"}, {"adapter", "prefix"}, {"adapter", "prefix", "bitfit"}, {"prefix", "bitfit", "lora"})
DEEP = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_layers"}


def deep(family, blocks=12, **options):
    torch.manual_seed(0)
    return tiny(family, **{DEEP.get(family, "num_hidden_layers"): blocks}, **options)


def components(adapter):
    """Block -> the kinds of its units."""
    found = defaultdict(set)
    for path, _, unit, _ in adapter.sites():
        unit = unit.inner if isinstance(unit, Sliced) else unit
        kinds = {Bottleneck: "adapter", LowRank: "lora", Prefix: "prefix", Copy: "bitfit"}
        if kind := next((k for c, k in kinds.items() if isinstance(unit, c)), None):
            parts = path.split(".")
            at = next(i for i, p in enumerate(parts) if p.isdigit())
            found[".".join(parts[: at + 1])].add(kind)
    return found


@pytest.mark.parametrize("blocks", range(6, 50))
def test_the_groups_are_a_spindle(blocks):
    first, second, third, fourth = dt.S4().sizes(blocks)
    assert first + second + third + fourth == blocks
    assert 0 < first < second and third > fourth > 0 and abs(second - third) <= 1
    assert dt.S4().sizes(12) == (2, 4, 4, 2)


@pytest.mark.parametrize("family", ["gpt2", "bert", "bloom"])
def test_each_group_has_the_components_of_its_strategy(family):
    found = components(dt.attach(deep(family), dt.S4(budget=1500)))
    assert list(found) == sorted(found, key=lambda path: int(path.rpartition(".")[2])) and len(found) == 12
    want = [STRATEGIES[g] for g, n in enumerate((2, 4, 4, 2)) for _ in range(n)]
    assert [found[path] for path in found] == want


def trained(method, model):
    """Block -> how many parameters `plan` says it trains."""
    numbers = Counter()
    for site in dt.plan(model, method).sites:
        parts = site.path.split(".")
        if (at := next((i for i, p in enumerate(parts) if p.isdigit()), None)) is not None:
            numbers[".".join(parts[: at + 1])] += site.parameters
    return numbers


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "t5"])
@pytest.mark.parametrize("budget", [1500, 5000])
def test_every_block_trains_as_many(family, budget):
    strategies = {"strategies": NO_BIAS} if family in ("llama", "t5") else {}
    model = deep(family)
    numbers = trained(dt.S4(budget=budget, **strategies), model)
    assert len(numbers) == (24 if family == "t5" else 12)
    # the finest of a block's steps: 2 d + 1 of an adapter, 2 D for each attention of a prefix
    finest = {"llama": (65, 32), "t5": (65, 128)}.get(family, (65, 64))
    assert max(abs(n - budget) for n in numbers.values()) <= max(finest) / 2
    mean = sum(numbers.values()) / len(numbers)
    assert max(abs(n - mean) for n in numbers.values()) <= max(finest)


def test_a_budget_below_one_is_a_share_of_the_model():
    model = deep("bert")
    plan = dt.plan(model, dt.S4(budget=0.1))
    assert abs(plan.trained - 0.1 * plan.total) <= 12 * 65 / 2
    assert plan.trained == sum(p.numel() for p in dt.attach(model, dt.S4(budget=0.1)).parameters())


def test_an_encoder_and_a_decoder_are_grouped_each_by_itself():
    torch.manual_seed(0)
    model = tiny("bart", encoder_layers=6, decoder_layers=8)
    found = components(dt.attach(model, dt.S4(budget=3000)))
    sizes = {"model.encoder": (1, 2, 2, 1), "model.decoder": (1, 3, 3, 1)}
    for stack, groups in sizes.items():
        want = [STRATEGIES[g] for g, n in enumerate(groups) for _ in range(n)]
        assert [found[f"{stack}.layers.{i}"] for i in range(len(want))] == want


def test_components_that_start_at_zero_leave_the_base():
    """All but the prefixes, which are never neutral, do."""
    model = deep("gpt2", 6)
    given = inputs(model)
    want = model(**given).logits
    strategies = (("adapter", "lora"), ("adapter",), ("adapter", "bitfit"), ("bitfit", "lora"))
    adapter = dt.attach(model, dt.S4(budget=1500, strategies=strategies))
    assert set().union(*components(adapter).values()) == {"adapter", "lora", "bitfit"}
    torch.testing.assert_close(model(**given).logits, want)


def test_components_are_the_methods_of_that_name():
    """The fourth group, alone, is a prefix, LoRA and BitFit of the sizes that the plan shows."""
    torch.manual_seed(0)
    model = tiny("bert").double()
    given = inputs(model)
    adapter = dt.attach(model, dt.S4(budget=1000, groups=(0, 0, 0, 2)), "s4")
    ranks = {unit.a.shape[0] for _, unit in adapter.units() if isinstance(unit, LowRank)}
    lengths = {unit.source.k.shape[1] for _, unit in adapter.units() if isinstance(unit, Prefix)}
    (r,), (p,) = ranks, lengths
    assert abs(288 + r * 128 + p * 64 - 1000) <= 32  # nine biases of d and 2 d, 4 d r, and 2 d p
    assert {unit.s for _, unit in adapter.units() if isinstance(unit, LowRank)} == {2.0}
    parts = dt.LoRA(r=r, alpha=2 * r, targets=dt.Part("q", "v")), dt.PrefixTuning(length=p)
    biases = dt.BitFit(targets=dt.Layers(targets="all-layers"))
    other = dt.attach(model, dt.Union(methods=(*parts, biases)), "union")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for q in adapter.parameters():
            q.add_(torch.randn(q.shape, generator=generator) * 0.1)
    for kind in (LowRank, Prefix, Copy):
        pairs = zip(*([u for _, u in a.units() if isinstance(u, kind)] for a in (adapter, other)), strict=True)
        for mine, plain in pairs:
            plain.load_state_dict(mine.state_dict())
    got = model(**given).logits
    dt.activate(model, "s4")
    torch.testing.assert_close(model(**given).logits, got)
    with dt.using(model):
        assert (model(**given).logits - got).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_without_biases_needs_other_strategies(family, tmp_path):
    model = deep(family, 6)
    with pytest.raises(dt.DeltatuneError, match="no bias vectors for BitFit; give `strategies`"):
        dt.attach(model, dt.S4(budget=3000))
    method = dt.S4(budget=3000, strategies=[list(s) for s in NO_BIAS])
    given = inputs(model)
    adapter = dt.attach(model, method)
    want = model(**given).logits
    adapter.save(tmp_path)
    dt.detach(model)
    assert dt.load(model, tmp_path).method == dt.S4(budget=3000, strategies=NO_BIAS)
    assert torch.equal(model(**given).logits, want)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@torch.no_grad()
def test_padding_on_the_left_moves_no_token_away_from_a_prefix(family):
    model = tiny(family)
    dt.attach(model, dt.S4(budget=1500))
    ids = torch.tensor([[0, 0, 5, 9, 7]])
    got = model(input_ids=ids, attention_mask=(ids > 0).long()).logits[0, 2:]
    torch.testing.assert_close(got, model(input_ids=ids[:, 2:]).logits[0], atol=1e-5, rtol=1e-5)


def test_the_spindle_is_narrow_at_both_ends():
    """As many blocks in G1 as in G4; groups of the user's own are taken as they are."""
    for blocks in (6, 12, 17, 24, 40):
        first, _, _, fourth = dt.S4().sizes(blocks)
        assert first == fourth == blocks // 6
    assert dt.S4().sizes(17) == (2, 7, 6, 2)  # files hold no sizes, so they must stay as they are
    assert dt.S4(groups=(1, 2, 3, 4)).sizes(10) == (1, 2, 3, 4)


def test_fewer_than_six_blocks_have_no_outer_groups():
    found = components(dt.attach(tiny("gpt2"), dt.S4(budget=1500)))
    assert list(found.values()) == [STRATEGIES[1], STRATEGIES[2]]


def test_wrong_options_are_named():
    with pytest.raises(dt.DeltatuneError, match="too few for one of each component"):
        dt.plan(tiny("gpt2"), dt.S4(budget=100))
    with pytest.raises(dt.DeltatuneError, match="12 blocks, and the model has 2"):
        dt.plan(tiny("gpt2"), dt.S4(budget=1500, groups=(3, 3, 3, 3)))
    for wrong in ({"budget": 0}, {"groups": (1, 1)}, {"targets": "q_proj"}, {"strategies": (("adapter",),) * 3},
                  {"strategies": (("bitfit",),) * 4}, {"strategies": (("adapter", "ia3"),) * 4}):  # fmt: skip
        with pytest.raises(dt.DeltatuneError, match=f"S4: .*{next(iter(wrong))}"):
            dt.S4(**wrong)
