"""TRL's trainers with adapters, for test_libraries.py."""

from __future__ import annotations

from typing import Any

from sides import FOLDER, FOUND, SIDE, check, drawn, fill, numbers, page, raised, report, tensors_of

import datasets  # isort: skip
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from train import toys

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
BASE = str(toys.llama(FOLDER / "base"))
WORDS = toys.tokenizer("llama")
WORDS.pad_token = "</s>"
IDS = torch.tensor([[1, 5, 9, 7, 12, 3]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
TEXTS = datasets.Dataset.from_list([{"text": text} for text, _ in toys.reviews(16)])
PAIRS = datasets.Dataset.from_list(
    [
        {"prompt": "say good : ", "chosen": good, "rejected": bad}
        for (good, _), (bad, _) in zip(toys.reviews(8), toys.reviews(8, seed=1), strict=True)
    ]
)
TEXTS.to_json(FOLDER / "reviews.jsonl")


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def lora(**options: Any) -> Any:
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def options(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(FOLDER / name), "max_steps": 3, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "report_to": [], "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
        "lr_scheduler_type": "constant", "dataloader_pin_memory": False, **changes,
    }  # fmt: skip


def losses(trainer: Any) -> list[Any]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def logits(model: Any) -> list[float]:
    return numbers(model.eval()(input_ids=IDS).logits)


def sft(model: Any, name: str, config: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return SFTTrainer(
        model=model, args=SFTConfig(**options(name, max_length=16, **changes)),
        train_dataset=TEXTS, eval_dataset=TEXTS.select(range(4)), processing_class=WORDS,
        peft_config=config,
    )  # fmt: skip


@check
def sft_with_a_config() -> Any:
    """The base model by its path, an adapter by its config; saved and loaded again."""
    trainer = sft(BASE, "sft", lora(), model_init_kwargs={"dtype": "float32"})
    model = trainer.model
    wrapped = type(model).__name__, isinstance(model, PeftModel)
    fill(model)
    trainer.train()
    trainer.save_model()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER / "sft", dtype=torch.float32)
    metrics = trainer.evaluate()
    again = PeftModel.from_pretrained(base(), FOLDER / "sft")
    return {
        "wrapped": wrapped, "losses": losses(trainer), "eval": metrics["eval_loss"],
        "logits": [logits(model), logits(loaded), logits(again), logits(again.merge_and_unload())],
        "files": tensors_of(FOLDER / "sft" / "adapter_model.safetensors"),
        "trainable": model.get_nb_trainable_parameters(),
    }  # fmt: skip


@check
def sft_with_a_model() -> Any:
    """A model that is adapted already, in bf16 with checkpointing, packed."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    model = fill(get_peft_model(model, lora()))
    trainer = sft(model, "ready", gradient_checkpointing=True, packing=True, max_steps=2)
    trainable = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
    trainer.train()
    both = raised(lambda: sft(model, "both", lora()))
    return trainable, [round(loss, 1) for loss in losses(trainer)], both


@check
def sft_with_a_head() -> Any:
    """TRL computes the loss from ``lm_head.weight`` itself, without calling the head."""
    model = fill(get_peft_model(base(), lora(modules_to_save=["lm_head"])), size=0.3)
    trainer = sft(model, "head", max_steps=2)
    trainer.train()
    trained = numbers(peft.get_peft_model_state_dict(model)["base_model.model.lm_head.weight"])
    with model.disable_adapter():
        off = float(trainer.evaluate()["eval_loss"])
    on = float(trainer.evaluate()["eval_loss"])
    targeted = get_peft_model(base(), lora(target_modules=["q_proj", "lm_head"]))
    return losses(trainer), trained, [on, off], raised(lambda: sft(targeted, "targeted"))


@check
def sft_with_new_tokens() -> Any:
    """Rows of the embedding and the tied head, as TRL asks for them after a chat template."""
    model = base()
    config = lora(trainable_token_indices={"embed_tokens": [3, 30]}, modules_to_save=["lm_head"])
    trainer = sft(model, "tokens", config, max_steps=2)
    fill(trainer.model, size=0.2)
    trainer.train()
    rows = peft.get_peft_model_state_dict(trainer.model)
    return losses(trainer), {k: numbers(v, 4) for k, v in sorted(rows.items())}


@check
def sft_with_other_methods() -> Any:
    found = {}
    for name, config in {
        "dora": lora(use_dora=True),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }.items():
        trainer = sft(base(), name, config, max_steps=2)
        fill(trainer.model, size=0.5)
        trainer.train()
        found[name] = losses(trainer), trainer.evaluate()["eval_loss"]
    return found


@check
def sft_resumed() -> Any:
    """Checkpoints, resuming, the best model at the end."""
    trainer = sft(fill(get_peft_model(base(), lora())), "whole", max_steps=4)
    trainer.train()
    want = logits(trainer.model)
    kept = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    first = sft(fill(get_peft_model(base(), lora())), "parts", max_steps=2, **kept)
    first.train()
    second = sft(
        fill(get_peft_model(base(), lora()), salt="other"), "parts", max_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", **kept,
    )  # fmt: skip
    second.train(resume_from_checkpoint=True)
    got = logits(second.model)
    FOUND["resumed_as_one"] = max(abs(a - b) for a, b in zip(want, got, strict=True))
    return losses(second), got, str(second.state.best_model_checkpoint)[-12:]


@check
def dpo_against_the_base() -> Any:
    """The reference is the model without its adapter."""
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=base(), args=DPOConfig(**options("dpo")), train_dataset=PAIRS,
        processing_class=WORDS, peft_config=lora(),
    )  # fmt: skip
    fill(trainer.model)
    trainer.train()
    rows = trainer.state.log_history[:3]
    keys = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen")
    return [[row.get(key) for key in keys] for row in rows], logits(trainer.model)


@check
def dpo_against_an_adapter() -> Any:
    """The reference is the adapter as it was; at the start they agree, so the loss is ln 2."""
    folder = FOLDER / "tuned"
    fill(get_peft_model(base(), lora())).save_pretrained(folder)
    model = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=model, args=DPOConfig(**options("dpo_ref")), train_dataset=PAIRS,
        processing_class=WORDS,
    )  # fmt: skip
    names = sorted(model.peft_config), model.active_adapter
    frozen = not any(p.requires_grad for n, p in model.named_parameters() if ".ref." in n)
    trainer.train()
    model.set_adapter("ref")
    ref = logits(model)
    return losses(trainer), names, frozen, ref, logits(PeftModel.from_pretrained(base(), folder))


@check
def dpo_with_two_loaded_adapters() -> Any:
    """As in TRL's guide: one copy to train, one as the reference."""
    model = PeftModel.from_pretrained(
        base(), FOLDER / "tuned", is_trainable=True, adapter_name="default"
    )
    model.load_adapter(FOLDER / "tuned", adapter_name="ref")
    model.set_adapter("default")
    from trl.trainer.utils import use_adapter

    fill(model, salt="moved")
    before = logits(model)
    with use_adapter(model, adapter_name="ref"):
        ref = logits(model)
    with use_adapter(model, adapter_name=None):
        off = logits(model)
    trains = sum(p.requires_grad for p in model.parameters())
    return before, ref, off, logits(model), logits(base()), trains


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@check
def grpo() -> Any:
    """Generation, the reference without the adapter, and weights for an engine beside it."""
    torch.manual_seed(0)
    prompts = datasets.Dataset.from_list([{"prompt": "say good fine"}] * 8)
    trainer = GRPOTrainer(
        model=base(), reward_funcs=reward, train_dataset=prompts, processing_class=WORDS,
        args=GRPOConfig(**options("grpo", per_device_train_batch_size=4, max_steps=2,
                                  num_generations=4, max_completion_length=6, beta=0.1)),
        peft_config=lora(),
    )  # fmt: skip
    fill(trainer.model)
    trainer.train()
    rows = trainer.state.log_history[:2]
    return [[row.get(key) for key in ("loss", "reward", "kl")] for row in rows]


@check
def weights_for_an_engine() -> Any:
    """What TRL sends to vLLM: merged, under the base model's names, unmerged again."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    from trl.generation.vllm_generation import VLLMGeneration as Engine

    model = fill(get_peft_model(base(), lora(modules_to_save=["lm_head"])))
    before = {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()}
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    rank = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    self = SimpleNamespace(model=model, _dist=rank)
    self._fix_param_name_to_vllm = lambda *args, **kwargs: Engine._fix_param_name_to_vllm(
        self, *args, **kwargs
    )
    sent = {name: numbers(value, 3) for name, value in Engine._iter_named_params(self)}
    FOUND["untouched_by_sending"] = all(
        torch.equal(p, bits[n]) and (SIDE == "peft" or before[n] == (p.data_ptr(), p._version))
        for n, p in model.named_parameters()
    )
    return dict(sorted(sent.items()))


@check
def grpo_against_an_adapter() -> Any:
    """A tuned adapter is its own reference, so nothing diverges at the first step."""
    torch.manual_seed(0)
    prompts = datasets.Dataset.from_list([{"prompt": "say good fine"}] * 8)
    model = PeftModel.from_pretrained(base(), FOLDER / "tuned", is_trainable=True)
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, train_dataset=prompts, processing_class=WORDS,
        args=GRPOConfig(**options("grpo_ref", per_device_train_batch_size=4, max_steps=2,
                                  num_generations=4, max_completion_length=6, beta=0.1)),
    )  # fmt: skip
    trainer.train()
    rows = trainer.state.log_history[:2]
    FOUND["first_divergence"] = rows[0]["kl"]
    return [[row.get(key) for key in ("loss", "reward", "kl")] for row in rows]


@check
def reward_model() -> Any:
    """A head that is trained and saved as a whole."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        model.score.weight.copy_(drawn(model.score.weight.shape, "score"))
    trainer = RewardTrainer(
        model=model, args=RewardConfig(**options("reward")), train_dataset=PAIRS,
        processing_class=WORDS,
        peft_config=lora(task_type=TaskType.SEQ_CLS, modules_to_save=["score"]),
    )  # fmt: skip
    fill(trainer.model)
    trainer.train()
    trainer.save_model()
    fresh = AutoModelForSequenceClassification.from_pretrained(
        BASE, num_labels=1, dtype=torch.float32
    )
    fresh.config.pad_token_id = 2
    loaded = PeftModel.from_pretrained(fresh, FOLDER / "reward")
    trainer.model.config.pad_token_id = 2
    names = sorted(tensors_of(FOLDER / "reward" / "adapter_model.safetensors"))
    return losses(trainer), logits(trainer.model), logits(loaded), names[-1]


@check
def accelerate_by_hand() -> Any:
    """prepare, unwrap_model, save_state, load_state, save_model, get_state_dict."""
    import accelerate
    from accelerate.utils import extract_model_from_parallel, is_peft_model
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    hand = accelerate.Accelerator(cpu=True)
    model = fill(get_peft_model(base(), lora()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = hand.prepare(model, optimizer)

    def step() -> float:
        loss = model(input_ids=IDS, labels=IDS).loss
        hand.backward(loss)
        hand.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    first = [step(), step()]
    hand.save_state(str(FOLDER / "state"))
    after = [step(), step()]
    hand.load_state(str(FOLDER / "state"))
    again = [step(), step()]
    FOUND["state_restored"] = after == again
    inner = hand.unwrap_model(model)
    inner.save_pretrained(FOLDER / "hand", state_dict=hand.get_state_dict(model))
    loaded = PeftModel.from_pretrained(base(), FOLDER / "hand")
    hand.save_model(model, str(FOLDER / "flat"))
    tensors = _get_model_state_dict(inner, adapter_only=True)
    twin = get_peft_model(base(), lora())
    _set_model_state_dict(twin, tensors, adapter_only=True)
    FOUND["recognised"] = is_peft_model(model), extract_model_from_parallel(model) is inner
    return first, after, logits(inner), logits(loaded), logits(twin), len(tensors)


page("TRL", {"meta-llama/Llama-3.2-1B": BASE, "reviews.jsonl": str(FOLDER / "reviews.jsonl")})
report()
