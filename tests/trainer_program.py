"""A program that trains with transformers' Trainer, run by test_trainer.py on its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

first, method, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if first == "graftwork":
    import graftwork
    from graftwork import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
else:
    import transformers.trainer  # noqa: F401

import torch  # noqa: E402

from tiny import build  # noqa: E402

if first != "graftwork":
    import graftwork
    from graftwork import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_dropout=0.1, task_type="SEQ_CLS"),
    "adalora": lambda: AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tinit=2, tfinal=4, task_type="SEQ_CLS"
    ),
    "ia3": lambda: IA3Config(task_type="SEQ_CLS"),
}


class Data(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 64, (n, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.ids[i], "labels": int(self.ids[i].sum()) % 3}


def trainer(output: Path, steps: int, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model = get_peft_model(build("bert"), CONFIGS[method]())
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Data(48, 1), eval_dataset=Data(16, 2))


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in graftwork.get_peft_model_state_dict(model).items()}


whole = trainer(folder / "whole", 20, load_best_model_at_end=True, metric_for_best_model="loss")
whole.train()
best = Path(whole.state.best_model_checkpoint)
with torch.no_grad():
    loss = whole.evaluate()["eval_loss"]
logged = [e["loss"] for e in whole.state.log_history if "loss" in e]

straight = trainer(folder / "straight", 20)
straight.train()
halved = trainer(folder / "halved", 20, load_best_model_at_end=False)
halved.args.max_steps = 10
halved.train()
resumed = trainer(folder / "halved", 20)
resumed.train(resume_from_checkpoint=str(folder / "halved" / "checkpoint-10"))
a, b = tensors(straight.model), tensors(resumed.model)
print(
    json.dumps(
        {
            "loss": loss,
            "best": best.name,
            "best_loss": min(e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e),
            "first": logged[0],
            "last": logged[-1],
            "equal": sorted(a) == sorted(b) and all(torch.equal(a[n], b[n]) for n in a),
            "files": {
                p.name: p.stat().st_size for p in (folder / "straight" / "checkpoint-20").iterdir()
            },
            "peft": "peft" in sys.modules,
        }
    )
)
