"""transformers' own adapter methods, Auto classes and pipelines, for test_libraries.py."""

from __future__ import annotations

from typing import Any

from sides import FOLDER, FOUND, SIDE, check, fill, numbers, page, raised, report, tensors_of

import datasets  # isort: skip
import peft
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from train import toys

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
BASE = str(toys.llama(FOLDER / "base"))
WORDS = toys.tokenizer("llama")
WORDS.pad_token = "</s>"
IDS = torch.tensor([[1, 5, 9, 7, 12, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, **options)


def lora(**options: Any) -> Any:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, **options})


@torch.no_grad()
def logits(model: Any) -> list[float]:
    return numbers(model.eval()(input_ids=IDS).logits)


def trains(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@check
def two_adapters() -> Any:
    model, found = base(), {}
    model.add_adapter(lora())
    fill(model)
    found["one"] = logits(model), model.active_adapters(), trains(model)
    model.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "two")
    fill(model, "two", size=1.0)
    found["two"] = logits(model), model.active_adapters(), trains(model)
    model.set_adapter(["default", "two"])
    found["both"] = logits(model), model.active_adapters()
    model.disable_adapters()
    found["off"] = logits(model)
    model.enable_adapters()
    found["on"] = logits(model)
    model.set_adapter("default")
    found["first"] = logits(model), trains(model)
    tensors = model.get_adapter_state_dict()
    found["state"] = {name: numbers(t, 2) for name, t in sorted(tensors.items())}
    found["errors"] = [
        raised(lambda: model.set_adapter("three")),
        raised(lambda: model.set_adapter(["default", "three"])),
        raised(lambda: model.add_adapter(lora())),
        raised(lambda: model.add_adapter("lora")),
        raised(lambda: model.delete_adapter("three")),
        raised(lambda: base().set_adapter("default")),
        raised(lambda: base().disable_adapters()),
    ]
    model.delete_adapter("default")
    found["deleted"] = logits(model), sorted(model.peft_config)
    model.delete_adapter(["two"])
    found["none"] = logits(model), hasattr(model, "peft_config")
    model.add_adapter(lora(), "again")
    fill(model, "again")
    found["again"] = logits(model)
    return found


@check
def saved_and_loaded() -> Any:
    """Folders, and everything that takes one for a model."""
    model = base()
    model.add_adapter(lora(rank_pattern={"down_proj": 2}, modules_to_save=["lm_head"]))
    fill(model)
    folder = FOLDER / "saved"
    model.save_pretrained(folder)
    fill(model, salt="x").save_pretrained(folder / "inside")
    other = logits(model)
    WORDS.save_pretrained(folder)
    first = base()
    info = first.load_adapter(str(folder))
    FOUND["trains_after_loading"] = trains(first)
    second = base()
    second.load_adapter(str(folder), "a", is_trainable=True)
    third = base()
    third.load_adapter(str(folder), adapter_kwargs={"subfolder": "inside"})
    auto = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pipe = transformers.pipeline("text-generation", str(folder), dtype=torch.float32)
    plain = transformers.pipeline("text-generation", BASE, dtype=torch.float32)
    options: Any = {"max_new_tokens": 5, "do_sample": False, "return_tensors": True}
    wrapped = peft.PeftModel.from_pretrained(base(), folder)
    state = peft.load_peft_weights(str(folder))
    fourth = base()
    fourth.load_adapter(
        adapter_name="s", peft_config=peft.PeftConfig.from_pretrained(str(folder)),
        adapter_state_dict=state,
    )  # fmt: skip
    auto.save_pretrained(FOLDER / "again")
    texts = [p("say good", **options)[0]["generated_token_ids"] for p in (pipe, plain)]
    return {
        "logits": [logits(m) for m in (first, second, auto, wrapped, fourth, pipe.model)],
        "inside": [other, logits(third)],
        "info": [sorted(info.missing_keys), sorted(info.unexpected_keys)],
        "trainable": trains(second),
        "files": tensors_of(folder / "adapter_model.safetensors"),
        "again": tensors_of(FOLDER / "again" / "adapter_model.safetensors"),
        "texts": [list(map(int, t)) for t in texts],
        "taken": raised(lambda: first.load_adapter(str(folder))),
        "nowhere": "" != raised(lambda: first.load_adapter(str(FOLDER / "nowhere"), "b")),
        "nothing": raised(lambda: first.load_adapter(adapter_name="b")),
    }


@check
def what_does_not_fit() -> Any:
    """In PEFT a tensor more or less is a line in a log, and the model is changed."""
    model = base()
    model.add_adapter(lora())
    fill(model)
    before = logits(model), model.active_adapters(), trains(model)
    wider = base()
    wider.add_adapter(lora(r=2), "w")
    state = peft.get_peft_model_state_dict(wider, adapter_name="w")
    error = raised(
        lambda: model.load_adapter(adapter_name="b", peft_config=lora(), adapter_state_dict=state)
    )
    after = logits(model), model.active_adapters(), trains(model)
    FOUND["refused"] = [bool(error), before == after, sorted(model.peft_config)]
    return before


@check
def hotswapped() -> Any:
    found = {}
    for name, rank, alpha in (("small", 2, 6), ("other", 2, 3), ("large", 6, 3)):
        model = base()
        model.add_adapter(lora(r=rank, lora_alpha=alpha))
        fill(model, salt=name).save_pretrained(FOLDER / name)
        found[name] = logits(model)
    model = base()
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(FOLDER / "small"), "default")
    run = torch.compile(model, backend="eager")
    found["first"] = logits(run)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if SIDE == "graftwork":  # this pair of transformers and peft cannot load another rank
        model.load_adapter(str(FOLDER / "large"), "default")
        FOUND["other_rank"] = logits(run) == pytest.approx(found["large"], abs=1e-5)
    model.load_adapter(str(FOLDER / "other"), "default")
    FOUND["other_alpha"] = logits(run) == pytest.approx(found["other"], abs=1e-5)
    FOUND["compilations"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    found["config"] = sorted(model.peft_config)
    found["unknown"] = raised(
        lambda: model.load_adapter(str(FOLDER / "small"), adapter_name="other", hotswap=True)
    )
    found["first of all"] = raised(lambda: base().load_adapter(str(FOLDER / "small"), hotswap=True))
    return found


@check
def trainer() -> Any:
    """The Trainer with an adapter that the model itself has, checkpoints included."""
    rows = [WORDS(text, padding="max_length", max_length=8) for text, _ in toys.reviews(8)]
    data = datasets.Dataset.from_list([{**dict(r), "labels": r["input_ids"]} for r in rows])
    model = base()
    model.add_adapter(lora())
    fill(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(FOLDER / "trainer"), max_steps=4, per_device_train_batch_size=2,
        learning_rate=1e-2, report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True,
        save_steps=2, eval_steps=2, eval_strategy="steps",
        gradient_checkpointing=True, dataloader_pin_memory=False,
    )  # fmt: skip
    run = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data.select(range(4))
    )
    run.train()
    loaded = base()
    loaded.load_adapter(str(FOLDER / "trainer" / "checkpoint-4"))
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    return losses, logits(model), logits(loaded)


@check
def classifier() -> Any:
    """A new head, saved beside the adapter and restored by the Auto class."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=3, pad_token_id=2, dtype=torch.float32
    )
    model.add_adapter(lora(task_type="SEQ_CLS", modules_to_save=["score"]))
    fill(model).save_pretrained(FOLDER / "classes")
    again = AutoModelForSequenceClassification.from_pretrained(
        FOLDER / "classes", num_labels=3, pad_token_id=2, dtype=torch.float32
    )
    return logits(model), logits(again)


page("transformers", {"meta-llama/Llama-3.2-1B": BASE})
report()
