"""The training loop: transformers' Trainer with two learning rates, an order that a resumed run can
repeat, a stop on a loss that is no number, and a stop on Ctrl-C that loses nothing.
"""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import TrainingError
from ..parts.whole import Copy
from . import base
from .packing import pack, packed
from .prefix import GB, Cache
from .recipe import Recipe
from .samples import ByLength, Sample, Samples, collate
from .ways import PLAIN, Ways, order_of


@dataclass(frozen=True)
class Settings:
    """What the loop needs beyond the recipe.

    Args:
        steps: optimizer steps of the whole training.
        rate: peak learning rate of the adapter.
        head_rate: that of new modules.
        precision: in which it computes.
        folder: where checkpoints go.
    """

    steps: int
    rate: float
    head_rate: float
    precision: str
    folder: Path


class Loop(transformers.Trainer):  # type: ignore[misc]
    """The Trainer, with this package's order, precision and checks."""

    def __init__(
        self, recipe: Recipe, settings: Settings, model: nn.Module, samples: Samples, pad: int,
        ways: Ways = PLAIN,
    ) -> None:  # fmt: skip
        self.recipe, self.settings, self.ways = recipe, settings, ways
        self.samples, self.pad = samples, pad
        self.cache: Cache | None = None
        super().__init__(
            model=model,
            args=_arguments(recipe, settings),
            train_dataset=Numbered(samples),
            data_collator=partial(together, packed=ways.packed, pad=pad),
            optimizers=(optimizer(model, settings, recipe.weight_decay), None),
        )
        self.remove_callback(transformers.PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> ByLength:
        return order_of(self.recipe, self.samples)

    def keep(self) -> None:
        """Run the frozen blocks on all samples, where the recipe wants that."""
        if (prefix := self.ways.prefix) is None:
            return
        most = int(self.recipe.cache_prefix_gb * GB)
        self.cache = Cache(prefix, self.samples, most, self.settings.folder)
        with base.autocast(self.settings.precision, self.args.device):
            self.cache.fill(self.model, self.recipe.batch_size, self.pad)

    def close(self) -> None:
        """Drop what ``keep`` made."""
        if self.cache is not None:
            self.cache.close()

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, in the chosen precision and way."""
        fused = self.ways.computing(model)
        with base.autocast(self.settings.precision, self.args.device), fused:
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextmanager
    def _within(self, inputs: dict[str, Any]) -> Iterator[None]:
        """What a step's forward and backward pass need around them."""
        rows, lengths = inputs.pop("rows"), inputs.pop("lengths", None)
        cache, is_packed = self.cache, lengths is not None
        with ExitStack() as stack:
            if is_packed:
                stack.enter_context(packed(self.model, lengths))
            if cache is not None:
                if not cache.checked:
                    given = {k: t.to(self.args.device) for k, t in inputs.items()}
                    with base.autocast(self.settings.precision, self.args.device):
                        cache.check(self.model, given, rows, is_packed)
                stack.enter_context(cache.used(self.model, rows, is_packed))
            yield

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward pass.

        Raises:
            TrainingError: the loss is no number; nothing was changed by this step.
        """
        with self._within(inputs):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss).all():
            step = self.state.global_step + 1
            raise TrainingError(not_a_number(float(loss), step, self.settings, self.recipe))
        return loss


class Numbered(Dataset[tuple[int, Sample]]):
    """Samples with their numbers."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.samples[index]


def together(batch: Sequence[tuple[int, Sample]], packed: bool, pad: int) -> dict[str, Any]:
    """A batch's tensors, and ``rows``: the numbers of its samples.

    Args:
        batch: the samples with their numbers.
        packed: in one row, without padding.
        pad: the padding token.
    """
    samples = [sample for _, sample in batch]
    made: dict[str, Any] = pack(samples) if packed else collate(samples, pad)
    return {**made, "rows": torch.tensor([number for number, _ in batch])}


def not_a_number(loss: float, step: int, settings: Settings, recipe: Recipe) -> str:
    """What to tell where the loss is not finite."""
    tries = [f"a lower rate, e.g. --learning-rate {settings.rate / 5:.1g}"]
    if recipe.warmup < 0.1:
        tries.append("a slower start, --warmup 0.1")
    if settings.precision == "fp16":
        tries.insert(0, "a wider range of numbers, --precision bf16 or fp32")
    elif settings.precision == "bf16":
        tries.append("full precision, --precision fp32")
    return (
        f"the loss became {loss} at step {step} of {settings.steps}, with the learning rate "
        f"{settings.rate:g}. Try, in this order: {'; '.join(tries)}"
    )


def optimizer(model: nn.Module, settings: Settings, decay: float) -> torch.optim.Optimizer:
    """AdamW over the trainable tensors; modules that start from noise have a rate of their own."""
    new = {id(p) for m in model.modules() if isinstance(m, Copy) for p in m.parameters()}
    every = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in every if id(p) not in new], "lr": settings.rate},
        {"params": [p for p in every if id(p) in new], "lr": settings.head_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=decay)


def _arguments(recipe: Recipe, settings: Settings) -> transformers.TrainingArguments:
    schedule = {"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule)
    return transformers.TrainingArguments(
        output_dir=str(settings.folder),
        max_steps=settings.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=settings.rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(recipe.warmup * settings.steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        seed=recipe.seed,
        fp16=settings.precision == "fp16",  # for the scaler of the gradients
        use_cpu=not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        save_strategy="steps",
        save_steps=recipe.checkpoint_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=max(1, settings.steps // 500),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """Ctrl-C finishes the step and saves a checkpoint; a second one breaks off."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.told, self.asked = told, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop where that was asked for; the last step needs neither."""
        if self.asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, SIGINT and SIGTERM ask for a stop."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {s: signal.getsignal(s) for s in signals}

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            for s in signals:
                signal.signal(s, before[s])
            self.told()

        try:
            for s in signals:
                signal.signal(s, ask)
        except ValueError:  # not in the main thread, where signals do not arrive
            yield
            return
        try:
            yield
        finally:
            for s in signals:
                signal.signal(s, before[s])


class Meter(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells how far training is.

    Args:
        report: called after each step with its number and the last known loss.
    """

    def __init__(self, report: Callable[[int, float | None], None]) -> None:
        self.report = report
        self.loss: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss; the summary at the end has none."""
        self.loss = float(logs["loss"]) if logs and "loss" in logs else self.loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        self.report(state.global_step, self.loss)


def run(loop: Loop, stop: Stop, checkpoint: Path | None) -> bool:
    """Train; True where all steps were done, False where it was stopped before.

    Args:
        loop: the loop.
        stop: listens to Ctrl-C.
        checkpoint: a checkpoint to go on from.
    """
    loop.add_callback(stop)
    with stop.listening(), warnings.catch_warnings():
        # the scheduler of a resumed run is stepped before the optimizer, on purpose
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        loop.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return bool(loop.state.global_step >= loop.settings.steps)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder; the state is what is written last."""
    found = [p for p in folder.glob("checkpoint-*") if _whole(p / "trainer_state.json")]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _whole(state: Path) -> bool:
    """Whether a file of JSON is there, and was written to its end."""
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
