"""The loop: each step runs the base once for the batches of all runs that are still learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.root import Grafted
from ..errors import TrainingError
from .batches import Item, Joined, Spec, join, pack
from .feeds import Feed, length_of, moved, source_of
from .losses import Given, Own, own_loss
from .optimizers import Stepper, norms
from .runs import FAILED, FINISHED, STOPPED, Run, RunResult
from .state import Held, Lying, learning, resting
from .streams import Stream, drawing


@dataclass(frozen=True)
class Options:
    """What holds for all runs; see ``train_together``."""

    data: Any = None
    loss: Callable[[Any, Any], Any] | None = None
    evaluate: Any = None
    evaluate_every: int | None = None
    metric: Callable[[Any, Any], Any] | None = None
    greater_is_better: bool = False
    rows_at_once: int | None = None
    padding: Mapping[str, float] | None = None
    base_dropout: bool = False
    on_step: Callable[[int, Mapping[str, float]], None] | None = None

    def check(self, runs: Sequence[Run]) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: it cannot.
        """
        for name in ("evaluate_every", "rows_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; it must be 1 or more, or None")
        nothing = self.evaluate is None and all(run.evaluate is None for run in runs)
        if self.metric is not None and nothing:
            raise ValueError("metric= is for evaluations, and there is nothing to evaluate")


class Learner:
    """One run while it learns.

    Args:
        run: what was asked for.
        root: the model's root.
        stream: its random numbers.
        place: its number among the runs.
    """

    def __init__(self, run: Run, root: Grafted, stream: Stream, place: int) -> None:
        self.run, self.place, self.stream = run, place, stream
        self.held = Held(root, run.name)
        self.schedule = root.switch.schedules.get(run.name)
        self.stepper = Stepper(run, self.held, self.schedule is not None)
        shared: Any = root.switch.shared.get(run.name)
        tokens = getattr(root.switch.configs[run.name], "is_prompt_learning", False)
        self.virtual = int(shared.n) if tokens and not shared.inside else 0
        parts = [p for h in root.hosts().values() for _, p in h.parts_of(run.name)]
        self.alike = any(part.together for part in parts)
        self.result = RunResult(run)
        self.steps = 0  # how many there are to be
        self.feed: Feed
        self.bad = 0  # evaluations since the best
        self.kept: dict[str, Any] | None = None

    def item(self, batch: dict[str, Any]) -> Item:
        """A batch of this run."""
        return Item(self.run.name, batch, self.virtual, self.alike, self.place)

    def items(self) -> list[Item]:
        """The batches of the next step."""
        first, n = self.result.steps * self.run.accumulation, self.run.accumulation
        return [self.item(self.feed.get(i)) for i in range(first, first + n)]

    def fail(self, why: str) -> None:
        """Stop for a reason; the adapter is as after the step before."""
        self.result.ended, self.result.error = FAILED, why
        self.stepper.forget()


class Together:
    """All runs over one model.

    Args:
        model: the model with the adapters, a ``PeftModel``.
        runs: what to train.
        streams: the random numbers of each.
        options: the rest.
    """

    def __init__(
        self, model: Any, runs: Sequence[Run], streams: Mapping[str, Stream], options: Options
    ) -> None:
        self.model, self.root, self.options = model, model.base_model, options
        self.switch = self.root.switch
        inner: nn.Module = self.root.model
        self.device = next(inner.parameters()).device
        context = {key for c in self.switch.configs.values() for key in c.CONTEXT}
        self.spec = Spec(inner, sorted(context), options.padding)
        names = [run.name for run in runs]
        self.prepares = bool(self.root.preparing(names))
        self.known: set[tuple[str, ...]] = set()  # whose rows a pass had that was checked
        self.root.set_requires_grad(names)
        self.learners = [
            Learner(run, self.root, streams[run.name], i) for i, run in enumerate(runs)
        ]
        self.feeds: dict[int, Feed] = {}
        for learner in self.learners:
            self._supply(learner)
        self.loss: Given | Own = Given(options.loss) if options.loss else self._own_loss()
        self.step = 0
        self.live = len(self.learners)
        ours = [one for one in self.learners if one.stepper.own is None]
        self.lying = Lying(self.root, [p for one in ours for p in one.held.own])

    # -- what runs read

    def _supply(self, learner: Learner) -> None:
        run = learner.run
        data = self.options.data if run.data is None else run.data
        whose = f"the data of run {run.name!r}"
        if data is None:
            raise ValueError(
                f"run {run.name!r} has no data; give train_together(data=batches) or Run(data=...)"
            )
        source = source_of(data, run, whose)
        own = callable(data) and not hasattr(data, "__iter__")
        key = id(learner) if own else id(data)
        if key not in self.feeds:
            self.feeds[key] = Feed(source, self.device, whose)
        learner.feed = self.feeds[key]
        learner.steps = run.steps or math.ceil(length_of(data, run) / run.accumulation)
        if run.stop and self._evaluation(run) is None:
            raise ValueError(
                f"run {run.name!r} is to stop early, and there is nothing to evaluate; give "
                "train_together(evaluate=batches) or Run(evaluate=...)"
            )
        if run.stop and self.options.evaluate_every is None:
            raise ValueError(
                f"run {run.name!r} is to stop early; say after how many steps it is evaluated: "
                "train_together(evaluate_every=...)"
            )

    def _evaluation(self, run: Run) -> Any:
        return self.options.evaluate if run.evaluate is None else run.evaluate

    def _own_loss(self) -> Given | Own:
        """The model's own loss, from its outputs for the first batch of the first run."""
        first = self.learners[0]
        batch = first.feed.get(0)
        with resting([first.held]), torch.no_grad(), self.root.using(first.run.name):
            training, self.root.training = self.root.training, False
            modes = [(m, m.training) for m in self.root.model.modules() if m.training]
            try:
                for m, _ in modes:
                    m.training = False
                takes = {**self.spec.inputs(batch), **self.spec.fixed}
                labels = {k: v for k, v in batch.items() if k in self.spec.names}
                outputs = self.root(**{**takes, **labels})
            finally:
                self.root.training = training
                for m, _ in modes:
                    m.training = True
        return own_loss(outputs, batch, type(self.root.model).__name__)

    # -- passes

    def _forward(self, joined: Joined) -> Any:
        rows = joined.rows
        if self.prepares:
            return self.root(**joined.inputs, adapter_names=rows)
        if rows not in self.known:  # the look through all modules is for the first time alone
            self.known.add(self.root.rows(rows, joined.inputs))
        with self.switch.call((), rows):
            return self.root(**joined.inputs)

    def _learn(self, items: Iterable[Item], terms: dict[int, list[Tensor]]) -> None:
        """Forward and backward passes over the batches of one step."""
        for group in pack(list(items), self.options.rows_at_once):
            joined = join(group, self.spec)
            for i, (item, n) in enumerate(zip(group, joined.sizes, strict=True)):
                self.learners[item.place].stream.begin(n, partial(joined.own, i=i))
            losses = self.loss(self._forward(joined), joined)
            shares = [1 / self.learners[item.place].run.accumulation for item in group]
            scaled = losses * torch.tensor(shares, device=losses.device)
            finite = torch.isfinite(losses)
            if losses.requires_grad:
                # a loss that is no number takes no part, so that nothing of it reaches the others
                torch.where(finite, scaled, 0).sum().backward()  # type: ignore[no-untyped-call]
            for item, one in zip(group, scaled.detach().unbind(), strict=True):
                terms.setdefault(item.place, []).append(one)

    def _penalties(self, live: Iterable[Learner], terms: dict[int, list[Tensor]]) -> None:
        """What methods add to the loss; its gradient comes before the gradients are clipped."""
        for learner in live:
            term = None if learner.schedule is None else learner.schedule.penalty()
            if isinstance(term, Tensor) and term.requires_grad:
                term.backward()  # type: ignore[no-untyped-call]
                terms[learner.place].append(term.detach())

    def _part(self) -> list[Learner]:
        """The runs that are still learning; what the others have learned is their own."""
        live = [one for one in self.learners if not one.result.ended]
        gone = [one for one in self.learners if one.result.ended] if len(live) < self.live else []
        self.live = len(live)
        self.lying.release(p for one in gone for p in one.held.parameters)
        return live

    def advance(self) -> None:
        """One step of every run that is still learning."""
        live = self._part()
        terms: dict[int, list[Tensor]] = {}
        self._learn((item for one in live for item in one.items()), terms)
        self._penalties(live, terms)
        sums = torch.stack([torch.stack([t.float() for t in terms[one.place]]).sum()
                            for one in live])  # fmt: skip
        stacks = self.lying.stacks
        if stacks.changed:
            rows, stacks.changed = stacks.rows(), False
            for one in live:
                one.stepper.lie(rows)
        given = stacks.share()
        every = norms([one.stepper for one in live], stacks.made.values())
        found = torch.stack([sums, every.to(sums.device)]).tolist()
        self.step += 1
        for learner, loss, norm in zip(live, *found, strict=True):
            self._update(learner, loss, norm, given)
        stacks.forget()
        for feed in self.feeds.values():
            readers = [one for one in live if one.feed is feed and not one.result.ended]
            feed.forget(min((o.result.steps * o.run.accumulation for o in readers), default=0))
        if self.options.on_step is not None:
            last = {o.run.name: o.result.losses[-1] for o in live if o.result.ended != FAILED}
            self.options.on_step(self.step, last)

    def _update(
        self, learner: Learner, loss: float, norm: float, given: Mapping[int, Tensor]
    ) -> None:
        result, run = learner.result, learner.run
        step = result.steps
        for what, value in (("loss", loss), ("norm of its gradient", norm)):
            if not math.isfinite(value):
                rate = run.learning_rate * run.factor(step, learner.steps)
                return learner.fail(
                    f"the {what} became {value} in step {step + 1} of {learner.steps}, at the "
                    f"rate {rate:.3g}; try a lower learning_rate, or warmup"
                )
        learner.stepper.step(run.factor(step, learner.steps), norm, given)
        result.losses.append(loss)
        if result.steps == learner.steps:
            result.ended = FINISHED

    # -- evaluation

    def assess(self) -> None:
        """Evaluate the runs that are due, and end those that get no better."""
        every = self.options.evaluate_every
        due = []
        for one in self.learners:
            steps, known = one.result.steps, one.result.evaluations
            fresh = steps and (not known or known[-1][0] != steps)
            last = one.result.ended == FINISHED
            if fresh and one.result.ended in ("", FINISHED) and self._evaluation(one.run):
                due += [one] if last or (every and steps % every == 0) else []
        if not due:
            return
        for one, value in zip(due, self._values(due), strict=True):
            self._judge(one, value)

    def _judge(self, one: Learner, value: float) -> None:
        result, stop, steps = one.result, one.run.stop, one.result.steps
        result.evaluations.append((steps, value))
        sign = -1 if self.options.greater_is_better else 1
        delta = stop.min_delta if stop else 0.0
        if math.isnan(value):
            better = False
        else:
            better = result.best is None or sign * value < sign * result.best[1] - delta
        one.bad = 0 if better else one.bad + 1
        if better:
            result.best = steps, value
            one.kept = one.held.copy() if stop else None
        elif stop and one.bad >= stop.patience and not result.ended:
            result.ended = STOPPED

    def _values(self, due: list[Learner]) -> list[float]:
        """The value of each run, lower or greater being better."""
        with resting([one.held for one in due]), torch.no_grad():
            training, self.root.training = self.root.training, False
            try:
                called, batched = {}, []
                for one in due:
                    what = self._evaluation(one.run)
                    if callable(what) and not hasattr(what, "__iter__"):
                        with self.root.using(one.run.name):
                            called[one.place] = float(what(self.model, one.run.name))
                    else:
                        batched.append(one)
                values = {**called, **self._measured(batched)}
            finally:
                self.root.training = training
        return [values[one.place] for one in due]

    def _measured(self, due: list[Learner]) -> dict[int, float]:
        """The mean over batches, weighted by rows; the batches of all runs side by side."""
        reading = {}
        for one in due:
            whose = f"the evaluation of run {one.run.name!r}"
            reading[one.place] = iter(source_of(self._evaluation(one.run), one.run, whose)())
        sums, rows = dict.fromkeys(reading, 0.0), dict.fromkeys(reading, 0)
        score = Given(self.options.metric) if self.options.metric else self.loss
        while reading:
            items = []
            for place in list(reading):
                batch = next(reading[place], None)
                if batch is None:
                    del reading[place]
                    continue
                one = self.learners[place]
                whose = f"the evaluation of run {one.run.name!r}"
                items.append(one.item(moved(batch, self.device, whose)))
            for group in pack(items, self.options.rows_at_once):
                joined = join(group, self.spec)
                values = score(self._forward(joined), joined).tolist()
                for item, value in zip(group, values, strict=True):
                    sums[item.place] += value * item.rows
                    rows[item.place] += item.rows
        if empty := [self.learners[p].run.name for p, n in rows.items() if not n]:
            raise TrainingError(
                f"the evaluation of run {empty[0]!r} has no rows; give it a batch at least, or none"
            )
        return {place: sums[place] / rows[place] for place in sums}

    # -- all

    def train(self) -> dict[str, RunResult]:
        """Go on until every run has ended."""
        held = [one.held for one in self.learners]
        with ExitStack() as stack:
            stack.enter_context(learning(self.model, self.root, held, self.options.base_dropout))
            for one in self.learners:
                stack.enter_context(drawing(one.held.modules, one.stream))
            stack.enter_context(self.lying)
            while any(not one.result.ended for one in self.learners):
                self.advance()
                self.assess()
        for one in self.learners:
            one.stepper.forget()
            best = one.result.best
            if one.kept is not None and best is not None and best[0] != one.result.steps:
                one.held.restore(one.kept)
        return {one.run.name: one.result for one in self.learners}
