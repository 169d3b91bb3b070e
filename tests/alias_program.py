"""Programs against the name ``peft``, run by test_alias.py in a process of their own."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

first, folder = sys.argv[1], Path(sys.argv[2])
if first == "transformers":
    import transformers
    import transformers.modeling_utils  # noqa: F401

import graftwork  # noqa: E402

graftwork.as_peft()

import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402

import peft  # noqa: E402
import peft.tuners.lora.layer  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.helpers import MontecloraTrainerMixin  # noqa: E402, F401
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: E402

from graftwork.testing.bench import shake  # noqa: E402
from tiny import build, run  # noqa: E402

report: dict[str, Any] = {
    "spec": importlib.util.find_spec("peft") is not None,
    "same": peft.PeftModel is graftwork.PeftModel is PeftModel is peft.peft_model.PeftModel,
    "is_lora": peft.tuners.lora.layer.LoraLayer is LoraLayer,
}

from transformers.utils import is_peft_available  # noqa: E402

report["available"] = is_peft_available()

CONFIGS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "dora": lambda: LoraConfig(r=4, use_dora=True),
    "ia3": peft.IA3Config,
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 60]),
    "lora_tokens": lambda: LoraConfig(r=4, trainable_token_indices=[5, 60]),
    "saved": lambda: LoraConfig(r=4, modules_to_save=["lm_head"]),
    "experts": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]
    ),
    "conv": lambda: LoraConfig(r=2, target_modules=["projection", "q_proj"]),
    "embedding": lambda: LoraConfig(r=2, target_modules=["wte", "c_attn"]),
}
MODELS = {"experts": "mixtral", "conv": "vit", "embedding": "gpt2"}
differences = {}
for name, config in CONFIGS.items():
    kind = MODELS.get(name, "llama")
    base = run(build(kind), kind)
    model = build(kind)
    model.add_adapter(config(), "one")
    assert any(isinstance(m, BaseTunerLayer) for m in model.modules())
    assert any(isinstance(m, LoraLayer) for m in model.modules()) == (name not in ("ia3", "tokens"))
    assert any(isinstance(m, ModulesToSaveWrapper) for m in model.modules()) == (name == "saved")
    assert any(isinstance(m, AuxiliaryTrainingWrapper) for m in model.modules()) == (
        name in ("saved", "lora_tokens")
    )
    shake(model)
    model.eval()
    want = run(model, kind)
    model.save_pretrained(folder / name)
    loaded = build(kind)
    info = loaded.load_adapter(str(folder / name), "two")
    got = run(loaded.eval(), kind)
    wrapped = run(PeftModel.from_pretrained(build(kind), folder / name), kind)
    loaded.disable_adapters()
    off = run(loaded, kind)
    differences[name] = [
        float((want - base).abs().max()),
        float((got - want).abs().max()),
        float((wrapped - want).abs().max()),
        float((off - base).abs().max()),
        sorted(info.missing_keys) + sorted(info.unexpected_keys),
    ]
report["native"] = differences

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj", "v_porj"]))
    report["lenient"] = [str(w.message) for w in caught if "v_porj" in str(w.message)]

report["version"] = importlib.metadata.version("peft")
report["module_version"] = peft.__version__
from accelerate.utils import extract_model_from_parallel  # noqa: E402, F401
from accelerate.utils.imports import is_peft_available as accelerates  # noqa: E402

report["accelerate"] = accelerates() if callable(accelerates) else False
try:
    from peft import ConfigOfTheNextRelease  # noqa: F401
except ImportError as error:
    report["absent"] = str(error)
try:
    import peft.tuners.of_the_next_release
except ModuleNotFoundError as error:
    report["absent_module"] = str(error)
print(json.dumps(report))
