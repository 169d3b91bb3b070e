"""Runs that are trained together end as they do alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftwork import (
    AdaLoraConfig,
    CPTConfig,
    EarlyStop,
    IA3Config,
    LilyConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PveraConfig,
    Run,
    RunResults,
    StateError,
    TrainingError,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    train_together,
)
from graftwork.together.optimizers import Moments
from tiny import build, enable_checkpointing

CAUSAL = "CAUSAL_LM"
Batches = list[dict[str, Tensor]]


def texts(count: int, rows: int = 2, length: int = 8, seed: int = 0) -> Batches:
    """Batches for a causal language model."""
    generator = torch.Generator().manual_seed(seed)
    every = [torch.randint(3, 64, (rows, length), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in every]


def padded(count: int, length: int, seed: int = 0) -> Batches:
    """Batches of which one row is shorter."""
    every = texts(count, 3, length, seed)
    for batch in every:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, length - 3 :] = 0
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return every


def classified(count: int, length: int = 6, seed: int = 0) -> Batches:
    """Batches for a classifier of three classes."""
    generator = torch.Generator().manual_seed(seed)
    every = [torch.randint(3, 64, (4, length), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids[:, 0] % 3} for ids in every]


def still(model: Any) -> None:
    """Training mode for adapters, none for the base."""
    model.train()
    for name, module in model.base_model.model.named_modules():
        module.training = ".adapters." in name


def alone(
    run: Run,
    data: Batches,
    kind: str = "llama",
    loss: Callable[[Any, Any], Tensor] | None = None,
    after: Callable[[Any, int], None] | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """A plain loop: the adapter's tensors, and the losses."""
    base = build(kind)
    torch.manual_seed(run.seed)
    model: Any = get_peft_model(base, run.config, run.name)
    still(model)
    every = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    heads = [p for n, p in every if ".module." in n]
    own = [p for n, p in every if ".module." not in n]
    groups = [
        {"params": own, "lr": run.learning_rate, "weight_decay": run.weight_decay},
        {
            "params": heads,
            "lr": run.head_learning_rate or run.learning_rate,
            "weight_decay": run.weight_decay,
        },
    ]
    optimizer = (run.optimizer or torch.optim.AdamW)([g for g in groups if g["params"]])
    steps, losses, peaks = run.steps or len(data), [], [g["lr"] for g in optimizer.param_groups]
    for step in range(steps):
        rising = round(run.warmup * steps)
        total = 0.0
        for i in range(run.accumulation):
            batch = data[(step * run.accumulation + i) % len(data)]
            found = model(**batch).loss if loss is None else loss(model(batch["x"]), batch)
            (found / run.accumulation).backward()
            total += float(found.detach()) / run.accumulation
        losses.append(total)
        if run.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for _, p in every], run.max_grad_norm)
        done = (step - rising) / max(1, steps - rising)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + _cos(done)) / 2}
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            scale = step / rising if step < rising else factor[str(run.schedule)]
            group["lr"] = peak * scale
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(model, step + 1)
    return get_peft_model_state_dict(model, adapter_name=run.name), losses


def _cos(share: float) -> float:
    return float(torch.cos(torch.tensor(share, dtype=torch.float64) * torch.pi))


def same(results: RunResults, run: Run, found: tuple[dict[str, Tensor], list[float]]) -> None:
    """The adapter and the losses are those of the run alone."""
    tensors, losses = found
    own = get_peft_model_state_dict(results.model, adapter_name=run.name)
    assert own.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(own[key], tensor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[run.name].losses, losses, rtol=1e-5, atol=1e-5)


MIXED = [
    Run("lora", LoraConfig(r=4), learning_rate=2e-3, seed=1, steps=12),
    Run(
        "all",
        LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", lora_dropout=0.1),
        learning_rate=5e-3, seed=2, steps=9, schedule="cosine", warmup=0.2, weight_decay=0.1,
    ),
    Run("rs", LoraConfig(r=2, use_rslora=True, bias="all"), seed=2, steps=7, max_grad_norm=None),
    Run("dora", LoraConfig(r=4, use_dora=True, lora_dropout=0.2), seed=3, steps=12,
        schedule="linear"),
    Run("ia3", IA3Config(), learning_rate=1e-2, seed=3, steps=12),
    Run(
        "adalora",
        AdaLoraConfig(init_r=6, target_r=3, total_step=12, tinit=2, tfinal=3, deltaT=2),
        learning_rate=1e-2, seed=5, steps=12,
    ),
    Run("vera", VeraConfig(r=8, vera_dropout=0.2), learning_rate=1e-2, seed=5, steps=8),
    Run("oft", OFTConfig(r=0, oft_block_size=8), seed=6, steps=8),
    Run("tokens", PromptTuningConfig(num_virtual_tokens=3, task_type=CAUSAL), seed=7, steps=8,
        learning_rate=1e-2),
    Run("prefix", PrefixTuningConfig(num_virtual_tokens=2, task_type=CAUSAL), seed=8, steps=8,
        learning_rate=1e-2),
    Run("head", LoraConfig(r=4, modules_to_save=["lm_head"]), seed=9, steps=8,
        head_learning_rate=1e-3),
    Run("sgd", LoraConfig(r=4), seed=9, steps=8, optimizer=torch.optim.SGD, learning_rate=0.5),
    Run("three", LoraConfig(r=3, lora_dropout=0.3), seed=10, steps=4, accumulation=3),
]  # fmt: skip


@pytest.fixture(scope="module")
def together() -> RunResults:
    return train_together(build("llama"), MIXED, texts(5))


@pytest.mark.parametrize("run", MIXED, ids=lambda run: run.name)
def test_every_method_learns_what_it_learns_alone(together: RunResults, run: Run) -> None:
    assert together[run.name].ended == "finished"
    assert together[run.name].steps == run.steps
    same(together, run, alone(run, texts(5)))


def test_a_drawn_dropout_is_another_for_another_seed() -> None:
    one = Run("one", LoraConfig(r=4, lora_dropout=0.5), seed=1, steps=3)
    runs = [one, replace(one, name="same"), replace(one, name="other", seed=2)]
    found = train_together(build("llama"), runs, texts(3))
    assert found["one"].losses == pytest.approx(found["same"].losses, abs=1e-6)
    assert found["one"].losses != pytest.approx(found["other"].losses, abs=1e-4)


def test_rows_of_other_lengths_are_padded() -> None:
    data = {"short": texts(3, 2, 5), "long": padded(4, 11), "middle": padded(2, 8, seed=3)}
    runs = [
        Run(name, LoraConfig(r=2 + i, lora_dropout=0.1, target_modules="all-linear"), seed=i,
            steps=5, data=own)
        for i, (name, own) in enumerate(data.items())
    ]  # fmt: skip
    tokens = PromptTuningConfig(num_virtual_tokens=3, task_type=CAUSAL)
    runs.append(Run("tokens", tokens, steps=5, data=data["middle"]))
    found = train_together(build("llama"), runs)
    for run in runs:
        same(found, run, alone(run, run.data))


def test_a_function_of_the_run_gives_it_an_order_of_its_own() -> None:
    every, asked = texts(4), []

    def order(run: Run) -> Iterator[dict[str, Tensor]]:
        asked.append(run.name)
        for i in torch.randperm(4, generator=torch.Generator().manual_seed(run.seed)):
            yield every[i]

    runs = [Run(f"r{i}", LoraConfig(r=4), seed=i, steps=6) for i in range(2)]
    found = train_together(build("llama"), runs, order)
    assert sorted(asked) == ["r0", "r0", "r1", "r1"]  # twice through four batches
    for run in runs:
        same(found, run, alone(run, list(order(run))))


def test_what_an_adapter_reads_of_a_call_is_its_own_rows() -> None:
    alora = LoraConfig(r=4, alora_invocation_tokens=[5])
    invoked = texts(3, 2, 7)
    for batch in invoked:
        batch["input_ids"][:, 3] = 5
    runs = [
        Run("lora", LoraConfig(r=4), seed=2, steps=4, data=texts(3)),
        Run("alora", alora, seed=3, steps=4, data=invoked),
    ]
    found = train_together(build("llama"), runs)
    for run in runs:
        same(found, run, alone(run, run.data))


def test_what_is_drawn_by_other_means_is_drawn_too() -> None:
    tasks = [{**batch, "task_ids": torch.tensor([i % 2, 1])} for i, batch in enumerate(texts(3))]
    runs = [
        Run("poly", PolyConfig(r=4, n_tasks=2, n_skills=2), seed=1, steps=3, data=tasks),
        Run("pvera", PveraConfig(r=8), seed=1, steps=3),
        Run("loha", LoHaConfig(r=4, module_dropout=0.5, rank_dropout=0.5), seed=2, steps=3),
    ]
    first, second = (train_together(build("llama"), runs, texts(3)) for _ in range(2))
    for name, one in first.items():  # build() sets torch's own generator
        assert one.ended == "finished"
        assert one.losses == second[name].losses


class Reader:
    """Batches that count how often they are read."""

    def __init__(self, every: Batches) -> None:
        self.every, self.read = every, 0

    def __len__(self) -> int:
        return len(self.every)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self.every:
            self.read += 1
            yield batch


def test_a_loader_is_read_once_for_all_runs() -> None:
    data = Reader(texts(4))
    runs = [Run(f"r{i}", LoraConfig(r=2), seed=i) for i in range(3)]
    found = train_together(build("llama"), runs, data)
    assert data.read == 4
    assert [one.steps for one in found.values()] == [4, 4, 4]  # once through the data


def test_a_run_that_fails_does_not_touch_the_others() -> None:
    good = [Run(f"r{i}", LoraConfig(r=4), seed=i, steps=8) for i in range(2)]
    head = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    wild = Run("wild", head, learning_rate=1e30, steps=8, max_grad_norm=None)
    found = train_together(build("llama"), [good[0], wild, good[1]], texts(4))
    assert found["wild"].ended == "failed"
    assert "became" in str(found["wild"].error) and "learning_rate" in str(found["wild"].error)
    assert 0 < found["wild"].steps < 8
    assert f"failed: {found['wild'].error}" in str(found)
    own = get_peft_model_state_dict(found.model, adapter_name="wild")
    assert all(torch.isfinite(t).all() for t in own.values())
    for run in good:
        same(found, run, alone(run, texts(4)))


def test_a_loss_that_is_no_number_is_that_runs_alone() -> None:
    seen = {"one": 0}

    def loss(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        value = outputs.logits.square().mean()
        if "bad" in batch:
            seen["one"] += 1
            return value * float("nan") if seen["one"] > 2 else value
        return value

    bad = [{**batch, "bad": torch.ones(2)} for batch in texts(4)]
    runs = [Run("good", LoraConfig(r=4), steps=6), Run("bad", LoraConfig(r=4), steps=6, data=bad)]
    found = train_together(build("llama"), runs, texts(4), loss=loss)
    assert (found["good"].ended, found["good"].steps) == ("finished", 6)
    assert (found["bad"].ended, found["bad"].steps) == ("failed", 2)
    assert "loss became nan in step 3 of 6" in str(found["bad"].error)


def calm(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW that does not make steps of gradients which are rounding alone."""
    return torch.optim.AdamW(groups, eps=1e-4)


def test_early_stop_keeps_the_best_state() -> None:
    data, held = texts(4), texts(2, seed=9)
    steady = Run("steady", LoraConfig(r=4), seed=1, steps=12)
    hasty = Run("hasty", LoraConfig(r=8, target_modules="all-linear"), learning_rate=1e-2, seed=2,
                steps=12, stop=EarlyStop(patience=2), optimizer=calm)  # fmt: skip
    found = train_together(build("llama"), [steady, hasty], data, evaluate=held, evaluate_every=1)
    values: list[float] = []
    states = []

    def after(model: Any, step: int) -> None:
        model.eval()
        with torch.no_grad():
            values.append(float(torch.stack([model(**b).loss for b in held]).mean()))
        states.append({k: t.clone() for k, t in get_peft_model_state_dict(
            model, adapter_name="hasty").items()})  # fmt: skip
        still(model)

    _, losses = alone(hasty, data, after=after)
    best = next(
        i for i in range(12) if i + 2 < 12 and all(v >= values[i] for v in values[i + 1 : i + 3])
    )
    one = found["hasty"]
    assert one.ended == "stopped early"
    assert one.steps == best + 3 < 12
    assert one.best is not None and one.best[0] == best + 1
    assert [v for _, v in one.evaluations] == pytest.approx(values[: best + 3], abs=1e-5)
    same(found, hasty, (states[best], losses[: best + 3]))
    assert found["steady"].steps == 12 and len(found["steady"].evaluations) == 12
    same(found, steady, alone(steady, data))
    least = min(found.values(), key=lambda r: min(v for _, v in r.evaluations))
    assert found.best() is least


def test_the_best_state_of_a_schedule_is_whole() -> None:
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=10, tinit=1, tfinal=2, deltaT=1)
    stop = EarlyStop(patience=20)
    run = Run("a", config, learning_rate=1e-2, steps=10, stop=stop)
    at: dict[int, dict[str, Tensor]] = {}

    def worse(model: Any, name: str) -> float:
        step = len(at) + 1
        own = get_peft_model_state_dict(model, adapter_name=name)
        at[step] = {key: tensor.clone() for key, tensor in own.items()}
        return 0.0 if step == 4 else 1.0

    found = train_together(build("llama"), [run], texts(4), evaluate=worse, evaluate_every=1)
    assert found["a"].best == (4, 0.0) and found["a"].steps == 10
    own = get_peft_model_state_dict(found.model, adapter_name="a")
    assert {k: tuple(t.shape) for k, t in own.items()} != {
        k: tuple(t.shape) for k, t in at[10].items()
    }
    for key, tensor in at[4].items():
        assert torch.equal(own[key], tensor)


def accuracy(outputs: Any, batch: dict[str, Tensor]) -> Tensor:
    return (outputs.logits.argmax(-1) == batch["labels"]).float().mean()


def test_classifiers_have_heads_of_their_own() -> None:
    heads = LoraConfig(r=4, task_type="SEQ_CLS", lora_dropout=0.1)
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    runs = [
        Run("a", heads, seed=1, steps=8, head_learning_rate=1e-2),
        Run("b", replace(heads, r=8), seed=2, steps=8, data=classified(3, 9)),
        Run("prefix", prefix, seed=3, steps=8, learning_rate=1e-2),
    ]
    found = train_together(
        build("bert"), runs, classified(4), evaluate=classified(2, seed=5), metric=accuracy,
        greater_is_better=True,
    )  # fmt: skip
    for run in runs:
        same(found, run, alone(run, run.data or classified(4), "bert"))
    held = classified(2, seed=5)
    model = found.model.eval()
    for name, one in found.items():
        with model.using(name), torch.no_grad():
            value = float(torch.stack([accuracy(model(**b), b) for b in held]).mean())
        assert one.evaluations == [(8, pytest.approx(value))]
    assert found.best().evaluations[0][1] == max(r.evaluations[0][1] for r in found.values())


def seq2seq(length: int, answer: int) -> Batches:
    return [
        {"input_ids": b["input_ids"], "labels": b["labels"][:, :answer].contiguous()}
        for b in texts(3, 2, length)
    ]


def images(length: int, _: int) -> Batches:
    generator = torch.Generator().manual_seed(length)
    return [
        {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator),
         "labels": torch.tensor([0, 1, 2])}
        for _ in range(3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "make"), [("t5", seq2seq), ("vit", images), ("gpt2", lambda n, _: texts(3, 2, n))]
)
def test_the_loss_of_a_model_is_found(kind: str, make: Callable[[int, int], Batches]) -> None:
    runs = [
        Run("a", LoraConfig(r=4), seed=1, steps=4, data=make(8, 5)),
        Run("b", LoraConfig(r=2, lora_alpha=16), seed=2, steps=4, data=make(6, 4)),
    ]
    found = train_together(build(kind), runs)
    for run in runs:
        same(found, run, alone(run, run.data, kind))


def test_a_plain_model_needs_a_loss() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))

    generator = torch.Generator().manual_seed(0)
    data = [{"input": torch.randn(5, 4, generator=generator), "y": torch.randn(5, 2)}
            for _ in range(3)]  # fmt: skip
    runs = [Run(f"r{r}", LoraConfig(r=r, target_modules=["0", "3"]), seed=r) for r in (1, 2)]

    def loss(y: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (y - batch["y"]).square().mean()

    with pytest.raises(TrainingError, match=r"Sequential gives no loss .*train_together\(loss="):
        train_together(base := model(), runs, data)
    assert not any("adapters" in name for name, _ in base.named_modules())  # as it was
    found = train_together(base, runs, data, loss=loss)
    for run in runs:
        bare = model()
        torch.manual_seed(run.seed)
        one: Any = get_peft_model(bare, run.config, run.name)
        still(one)
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-3)
        for batch in data:
            loss(one(batch["input"]), batch).backward()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        same(found, run, (get_peft_model_state_dict(one, adapter_name=run.name),
                          found[run.name].losses))  # fmt: skip


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows in each pass of a Llama."""
    from transformers.models.llama.modeling_llama import LlamaModel

    seen: list[int] = []
    forward = LlamaModel.forward

    def counted(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    return seen


def test_the_base_runs_once_a_step(passes: list[int]) -> None:
    runs = [Run(f"r{i}", LoraConfig(r=2 + i), seed=i, steps=2 + i) for i in range(4)]
    train_together(build("llama"), runs, texts(3))
    assert passes == [2, 8, 8, 6, 4, 2]  # the first one asks for the loss; then runs leave


def test_a_layer_of_the_base_runs_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    base, seen = build("llama"), Counter[int]()
    watched = base.get_submodule("model.layers.0.self_attn.q_proj")
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        seen[len(x)] += self is watched
        return forward(self, x)

    runs = [
        Run("four", LoraConfig(r=4), steps=3),
        Run("dropped", LoraConfig(r=8, lora_dropout=0.1), steps=3),
        Run("vera", VeraConfig(r=4), steps=3),
        Run("gains", IA3Config(target_modules=["q_proj"], feedforward_modules=[]), steps=3),
        Run("adalora", AdaLoraConfig(init_r=4, total_step=3), steps=3),
    ]
    monkeypatch.setattr(nn.Linear, "forward", counted)
    train_together(base, runs, texts(3))
    # the pass that asks for the loss has one adapter, whose rows take base and factors in one node
    assert {n: count for n, count in seen.items() if count} == {10: 3}


def test_rows_at_once_bounds_a_pass(passes: list[int]) -> None:
    runs = [Run(f"r{i}", LoraConfig(r=4, lora_dropout=0.2), seed=i, steps=3) for i in range(4)]
    found = train_together(build("llama"), runs, texts(3), rows_at_once=5)
    assert passes == [2, *[4, 4] * 3]
    passes.clear()
    for run in runs:
        same(found, run, alone(run, texts(3)))
    one = train_together(build("llama"), runs[:1], texts(3), rows_at_once=1)  # stays whole
    assert one["r0"].losses == pytest.approx(found["r0"].losses, abs=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_again(reentrant: bool) -> None:
    runs = [Run(f"r{i}", LoraConfig(r=4, lora_dropout=0.3), seed=i, steps=3) for i in range(3)]
    base = build("llama")
    base.train()
    enable_checkpointing(base, {"use_reentrant": reentrant})
    found = train_together(base, runs, texts(3))
    for run in runs:
        same(found, run, alone(run, texts(3)))


def test_checkpointing_beside_dropout_of_the_base_is_refused() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    base = BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                   decoder_ffn_dim=16, dropout=0.1)
    )  # fmt: skip
    enable_checkpointing(base, {"use_reentrant": False})
    runs = [Run("a", LoraConfig(r=2), steps=1)]
    with pytest.raises(TrainingError, match=r"dropout=0\.1 and gradient checkpointing"):
        train_together(base, runs, seq2seq(6, 4))
    assert train_together(base, runs, seq2seq(6, 4), base_dropout=True)["a"].steps == 1


def test_the_dropout_of_the_base_is_off_unless_asked_for() -> None:
    run = Run("a", LoraConfig(r=4, task_type="SEQ_CLS"), steps=3)
    first, second = (train_together(build("bert"), [run], classified(3)) for _ in range(2))
    assert first["a"].losses == second["a"].losses
    dropped = train_together(build("bert"), [run], classified(3), base_dropout=True)
    assert dropped["a"].losses != first["a"].losses
    assert not any(m.training for m in first.model.modules())  # as build() gave it


def test_adapters_of_a_model_are_trained_on(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=4), "old")
    runs = [Run("old", steps=2), Run("new", IA3Config(), steps=2, learning_rate=1e-2)]
    before = get_peft_model_state_dict(model, adapter_name="old")
    before = {key: tensor.clone() for key, tensor in before.items()}
    found = train_together(model, runs, texts(2))
    assert found.model is model and model.active_adapters == ["old"]
    after = get_peft_model_state_dict(model, adapter_name="old")
    assert any(not torch.equal(before[key], after[key]) for key in before)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "new")
    batch = texts(1)[0]["input_ids"]
    with torch.no_grad(), model.eval().using("new"):
        torch.testing.assert_close(again(input_ids=batch).logits, model(input_ids=batch).logits)


def test_a_step_is_told() -> None:
    told: list[tuple[int, list[str]]] = []
    runs = [Run("a", LoraConfig(r=2), steps=1), Run("b", LoraConfig(r=2), steps=2)]
    train_together(
        build("llama"), runs, texts(2), on_step=lambda n, losses: told.append((n, list(losses)))
    )
    assert told == [(1, ["a", "b"]), (2, ["b"])]


def test_the_results_are_a_table(together: RunResults) -> None:
    lines = str(together).splitlines()
    assert lines[0].split() == "run method rate seed steps loss best ended".split()
    assert len(lines) == len(MIXED) + 1
    assert lines[2].startswith("all") and "LORA" in lines[2] and "0.005" in lines[2]
    assert list(together) == [run.name for run in MIXED]
    with pytest.raises(TrainingError, match="no run was evaluated; give"):
        together.best()


def test_moments_are_those_of_adamw() -> None:
    torch.manual_seed(0)
    first = [nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    ours = Moments(first, rate=1e-2, decay=0.1)
    theirs = torch.optim.AdamW(second, lr=0.7e-2, weight_decay=0.1)
    for step in range(20):
        for i, (p, q) in enumerate(zip(first, second, strict=True)):
            none = (i == 1 and step % 3 == 1) or step == 7  # its moments stay as they were
            p.grad = None if none else torch.randn(3, 4)
            q.grad = None if p.grad is None else p.grad / 2.5
        ours.step(0.7, shrink=2.5)
        theirs.step()
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


LORA = LoraConfig(r=2)


@pytest.mark.parametrize(
    ("runs", "options", "error"),
    [
        ([], {}, "got no runs"),
        ([Run("a", LORA), Run("a", LORA)], {}, "two runs are called 'a'"),
        ([Run("a", LORA)], {"data": None}, "run 'a' has no data; give"),
        ([Run("a", LORA)], {"data": 3}, "data of run 'a' is a int, which cannot be read again"),
        ([Run("a", LORA)], {"data": iter([])}, "cannot be read again"),
        ([Run("a", LORA)], {"data": lambda run: iter([1])}, "do not tell how many batches"),
        ([Run("a", LORA, steps=1)], {"data": [(1, 2)]}, "gave a tuple; a batch is a dictionary"),
        ([Run("a", LORA, steps=1)], {"data": []}, "gave no batch"),
        ([Run("a", LORA, stop=EarlyStop())], {}, "nothing to evaluate"),
        ([Run("a", LORA, stop=EarlyStop())], {"evaluate": texts(1)}, "evaluate_every="),
        ([Run("a", LORA)], {"metric": accuracy}, "nothing to evaluate"),
        ([Run("a", LORA)], {"rows_at_once": 0}, "rows_at_once=0; it must be 1 or more"),
        ([Run("a", LORA)], {"evaluate_every": 0}, "evaluate_every=0; it must be"),
        ([Run("a")], {}, "run 'a' has no config, and the model has no adapter of this name"),
        (
            [Run("a", LORA), Run("b", CPTConfig(cpt_token_ids=[3], task_type=CAUSAL))],
            {},
            "run 'b': CPT computes its loss from all rows",
        ),
        ([Run("a", LoraConfig(r=2, target_modules=["nowhere"]))], {}, "nowhere"),
        ([Run("a", LORA)], {"data": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]},
         "gives no loss for a batch with no labels"),
        ([Run("a", LORA)], {"loss": lambda outputs, batch: outputs.logits}, "the shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_the_start(
    runs: list[Run], options: dict[str, Any], error: str
) -> None:
    base = build("llama")
    names = list(dict(base.named_modules()))
    with pytest.raises((ValueError, TypeError, TrainingError), match=error):
        train_together(base, runs, **{"data": texts(2), **options})
    assert list(dict(base.named_modules())) == names


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"learning_rate": 0}, "learning_rate=0; it must be above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"steps": 0}, "steps=0; it must be 1 or more"),
        ({"warmup": 1.5}, "warmup=1.5 is a share of the steps"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"name": "a.b"}, "cannot be an adapter's name"),
        ({"config": {"r": 8}}, "config is a dict; give a method's own"),
    ],
)
def test_a_run_says_what_is_wrong_with_it(options: dict[str, Any], error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        Run(**{"name": "a", "config": LORA, **options})
    with pytest.raises(ValueError, match="patience is 1 or more"):
        EarlyStop(patience=0)


def test_batches_that_do_not_fit_say_why() -> None:
    def fails(first: Batches, second: Batches, error: str, **options: Any) -> None:
        runs = [Run("a", LORA, data=first), Run("b", LORA, data=second)]
        with pytest.raises(TrainingError, match=error):
            train_together(build("llama"), runs, loss=lambda o, b: o.logits.mean(), **options)

    plain = texts(1)
    fails(plain, [{**plain[0], "position_ids": torch.arange(8).repeat(2, 1)}],
          "run 'a' have no position_ids")  # fmt: skip
    fails([{**plain[0], "use_cache": False}], [{**plain[0], "use_cache": True}],
          "give use_cache other values")  # fmt: skip
    wide = [{"inputs_embeds": torch.randn(2, 8, 16)}]
    fails([{"inputs_embeds": torch.randn(2, 8, 32)}], wide, "inputs_embeds has other shapes")


def test_a_method_that_looks_at_all_rows_is_not_padded(passes: list[int]) -> None:
    lily = LilyConfig(r=4)
    runs = [
        Run("lily", lily, seed=1, steps=3, data=texts(3, 2, 5)),
        Run("long", LoraConfig(r=4), seed=2, steps=3, data=texts(3, 2, 8)),
        Run("like", LoraConfig(r=2), seed=2, steps=3, data=texts(3, 2, 5)),
    ]
    found = train_together(build("llama"), runs)
    assert passes == [2, *[4, 2] * 3]
    for run in runs:
        same(found, run, alone(run, run.data))


def test_a_model_that_takes_the_sequence_first_is_refused() -> None:
    base = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    runs = [Run("a", LoraConfig(r=2, target_modules=["linear1"]), steps=1)]
    data = [{"input": torch.randn(4, 3, 8)}]
    with pytest.raises(StateError, match="sequence first"):
        train_together(base, runs, data, loss=lambda y, batch: y.mean())
    assert not any("adapters" in name for name, _ in base.named_modules())
