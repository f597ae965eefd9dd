"""The positions that a prompt was trained with are told by its file."""

import json

import pytest

import deltatune as dt
from deltatune.methods.prompt import PromptTuning
from deltatune.models.tiny import tiny


@pytest.mark.parametrize("method", (
    PromptTuning(length=3), dt.PTuning(length=3), dt.PTuning(length=3, token=98), dt.MultitaskPrompt(length=3),
    dt.PrefixTuning(length=3), dt.PTuningV2(length=3), dt.MAM(length=3, size=4), dt.UniPELT(length=3),
    dt.Union(methods=(dt.LoRA(r=2), dt.PrefixTuning(length=3))),
), ids=lambda m: type(m).__name__)  # fmt: skip
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_files_say_which_positions_they_were_trained_with(family, method, tmp_path):
    """In PEFT's layout, too; those of another convention would be another model, and are refused."""
    dt.attach(tiny(family), method).save(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    own = config["deltatune"]["method"]
    own = own if "methods" not in own else own["methods"][-1]
    assert own["positions"] == ("counted" if isinstance(method, (PromptTuning, dt.PTuning)) else "kept")
    own["positions"] = "shifted"
    path.write_text(json.dumps(config))
    with pytest.raises(dt.DeltatuneError, match="adapter_config.json.* positions = 'shifted', .*train it anew"):
        dt.load(tiny(family), tmp_path)
    del own["positions"]  # of a file from before they were said
    path.write_text(json.dumps(config))
    assert dt.load(tiny(family), tmp_path).method.flat() == method.flat()


@pytest.mark.parametrize("family", ("vit", "clip"))
def test_backbones_without_tokens_are_refused(family):
    for method in (dt.PTuning(), dt.PTuning(token=3)):
        with pytest.raises(dt.DeltatuneError, match="takes no embedded tokens"):
            dt.attach(tiny(family), method)
