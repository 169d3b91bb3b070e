"""sentence-transformers with adapters, for test_libraries.py."""

from __future__ import annotations

import json
from typing import Any

from sides import FOLDER, FOUND, check, drawn, fill, numbers, page, raised, report, tensors_of

import datasets  # isort: skip
import peft
import torch
import transformers
from peft import IA3Config, LoraConfig, TaskType
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    losses,
)
from sentence_transformers.base.peft_mixin import PeftAdapterMixin
from sentence_transformers.cross_encoder import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from train import toys

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
BASE = str(toys.bert(FOLDER / "base"))
TEXTS = ["good film", "the plot was awful and dull", "a lovely actor", "sad"]
PAIRS = datasets.Dataset.from_dict(
    {
        "sentence1": [text for text, _ in toys.reviews(16)],
        "sentence2": [text for text, _ in toys.reviews(16, seed=1)],
        "label": [
            float(a == b)
            for (_, a), (_, b) in zip(toys.reviews(16), toys.reviews(16, seed=1), strict=True)
        ],
    }
)


def base() -> Any:
    return SentenceTransformer(BASE, device="cpu")


def lora(**options: Any) -> Any:
    kind = TaskType.FEATURE_EXTRACTION
    return LoraConfig(
        **{"r": 4, "target_modules": ["query", "value"], "task_type": kind, **options}
    )


def inner(model: Any) -> Any:
    return model.transformers_model


def embed(model: Any) -> list[float]:
    return numbers(model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False), 24)


def arguments(kind: Any, name: str, **changes: Any) -> Any:
    return kind(
        output_dir=str(FOLDER / name), per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], logging_steps=1, use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, **{"max_steps": 3, "save_strategy": "no", **changes},
    )  # fmt: skip


def losses_of(trainer: Any) -> list[Any]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@check
def added_switched_deleted() -> Any:
    model, found = base(), {}
    found["base"] = embed(model)
    model.add_adapter(lora())
    found["names"] = model.active_adapters()
    fill(inner(model))
    found["one"] = embed(model)
    model.add_adapter(IA3Config(target_modules=["key"], feedforward_modules=[]), "two")
    fill(inner(model), "two", size=1.0)
    found["second"] = model.active_adapters(), embed(model)
    model.set_adapter("default")
    found["first"] = embed(model)
    model.set_adapter(["default", "two"])
    found["both"] = embed(model)
    model.disable_adapters()
    found["off"] = embed(model)
    model.enable_adapters()
    found["on"] = embed(model)
    tensors = model.get_adapter_state_dict("default")
    found["tensors"] = {name: numbers(t, 2) for name, t in sorted(tensors.items())}
    found["unknown"] = raised(lambda: model.set_adapter("three"))
    found["twice"] = raised(lambda: model.add_adapter(lora()))
    found["no config"] = raised(lambda: model.add_adapter({"r": 4}, "plain"))
    model.delete_adapter("two")
    found["deleted"] = sorted(inner(model).peft_config), model.active_adapters(), embed(model)
    model.delete_adapter("default")
    found["none"] = embed(model), raised(lambda: model.active_adapters())
    found["compatible"] = model.has_peft_compatible_model(), isinstance(model, PeftAdapterMixin)
    return found


@check
def trained_saved_loaded() -> Any:
    """The library's Trainer; the folder is the adapter's with the other modules beside it."""
    torch.manual_seed(0)
    model = base()
    model.add_adapter(lora(modules_to_save=["pooler"], lora_alpha=8))
    fill(inner(model))
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments(SentenceTransformerTrainingArguments, "run"),
        train_dataset=PAIRS, loss=losses.CosineSimilarityLoss(model),
    )  # fmt: skip
    trainer.train()
    model.eval()
    model.save_pretrained(str(FOLDER / "saved"))
    want = embed(model)
    again = SentenceTransformer(str(FOLDER / "saved"), device="cpu")
    other = base()
    other.load_adapter(str(FOLDER / "saved"), "mine")
    files = sorted(p.name for p in (FOLDER / "saved").iterdir() if p.name != "README.md")
    config = json.loads((FOLDER / "saved" / "adapter_config.json").read_text())
    again.save_pretrained(str(FOLDER / "resaved"))
    FOUND["trains_after_loading"] = sum(p.requires_grad for p in again.parameters())
    FOUND["resaved"] = embed(SentenceTransformer(str(FOLDER / "resaved"), device="cpu")) == want
    return {
        "losses": losses_of(trainer),
        "same": [want, embed(again), embed(other)],
        "active": [again.active_adapters(), other.active_adapters()],
        "files": files,
        "tensors": tensors_of(FOLDER / "saved" / "adapter_model.safetensors"),
        "config": {k: config[k] for k in ("r", "lora_alpha", "task_type", "modules_to_save")},
        "trainable": sum(p.requires_grad for p in model.parameters()),
    }


@check
def resumed() -> Any:
    """A run in two halves is the run in one."""
    runs = {}
    for name, steps in (("whole", [4]), ("parts", [2, 4])):
        for stop in steps:
            torch.manual_seed(0)
            model = base()
            model.add_adapter(lora())
            fill(inner(model))
            saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
            trainer = SentenceTransformerTrainer(
                model=model,
                args=arguments(
                    SentenceTransformerTrainingArguments, name, **saving | {"max_steps": stop}
                ),
                train_dataset=PAIRS, loss=losses.CosineSimilarityLoss(model),
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=stop == 4 and len(steps) > 1)
        tensors = peft.get_peft_model_state_dict(inner(model))
        runs[name] = {key: numbers(t, 4) for key, t in sorted(tensors.items())}
    FOUND["resumed_as_one"] = max(
        abs(a - b)
        for key, row in runs["whole"].items()
        for a, b in zip(row, runs["parts"][key], strict=True)
    )
    return runs["whole"]


@check
def loaded_from_a_wrapped_model() -> Any:
    """A folder that PeftModel wrote, and a SentenceTransformer around a PeftModel."""
    wrapped = peft.get_peft_model(transformers.AutoModel.from_pretrained(BASE), lora())
    fill(wrapped).save_pretrained(FOLDER / "wrapped")
    toys.tokenizer("bert").save_pretrained(FOLDER / "wrapped")
    model = SentenceTransformer(str(FOLDER / "wrapped"), device="cpu")
    beside = base()
    beside[0].model = peft.PeftModel.from_pretrained(beside[0].model, FOLDER / "wrapped")
    got = embed(beside)
    beside[0].model = beside[0].model.merge_and_unload()
    beside.save_pretrained(str(FOLDER / "merged"))
    merged = SentenceTransformer(str(FOLDER / "merged"), device="cpu")
    return embed(model), got, embed(beside), embed(merged)


@check
def cross_encoder() -> Any:
    """A head of its own, trained and saved as a whole."""
    torch.manual_seed(0)
    model = CrossEncoder(BASE, num_labels=1, device="cpu")
    head = inner(model).classifier
    with torch.no_grad():
        head.weight.copy_(drawn(head.weight.shape, "head"))
    model.add_adapter(lora(task_type=TaskType.SEQ_CLS, modules_to_save=["classifier"]))
    fill(inner(model))
    trainer = CrossEncoderTrainer(
        model=model, args=arguments(CrossEncoderTrainingArguments, "cross"), train_dataset=PAIRS,
        loss=BinaryCrossEntropyLoss(model),
    )  # fmt: skip
    trainer.train()
    pairs = [("good film", "sad"), ("a lovely actor", "fine")]
    want = model.predict(pairs, convert_to_tensor=True, show_progress_bar=False)
    model.save_pretrained(str(FOLDER / "cross_saved"))
    again = CrossEncoder(str(FOLDER / "cross_saved"), device="cpu", num_labels=1)
    got = again.predict(pairs, convert_to_tensor=True, show_progress_bar=False)
    names = sorted(tensors_of(FOLDER / "cross_saved" / "adapter_model.safetensors"))
    return losses_of(trainer), numbers(want), numbers(got), names[:2]


@check
def sparse_encoder() -> Any:
    config = transformers.AutoConfig.from_pretrained(BASE)
    torch.manual_seed(0)
    transformers.BertForMaskedLM(config).save_pretrained(FOLDER / "masked")
    toys.tokenizer("bert").save_pretrained(FOLDER / "masked")
    model = SparseEncoder(str(FOLDER / "masked"), device="cpu")

    def sparse(model: Any) -> list[float]:
        found = model.encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False)
        return numbers(torch.stack(list(found)) if isinstance(found, list) else found, 24)

    before = sparse(model)
    model.add_adapter(lora(target_modules=["query", "value", "decoder"]), "sparse")
    fill(inner(model), "sparse")
    on = sparse(model)
    model.save_pretrained(str(FOLDER / "sparse_saved"))
    again = SparseEncoder(str(FOLDER / "sparse_saved"), device="cpu")
    model.disable_adapters()
    return before, on, sparse(again), sparse(model)


page("sentence-transformers", {"sentence-transformers/all-MiniLM-L6-v2": BASE})
report()
