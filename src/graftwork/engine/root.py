"""Grafted: the thin root over a user's model; every verb about its adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import PeftConfig, TargetConfig
from ..errors import StateError, warn
from ..fast import choose
from ..fast.rows import tensors_in
from ..fast.turns import alone, ordered
from ..targets import replicas
from . import inject as injection
from . import ties
from .forwards import each_forward
from .host import Host
from .schedule import add_to_loss
from .switch import BASE, Switch
from .tree import hosts, parameters, parts, put, walk


class Grafted(nn.Module):
    """A model with adapters, in place.

    Args:
        model: the user's model; its layers get hosts around them.
        peft_config: the first adapter's config.
        adapter_name: its name.
        low_cpu_mem_usage: leave its tensors on the meta device, for a file that follows.
        **options: ``start``, ``autocast``; see ``engine.inject.inject``.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.switch = injection.switch_of(model) or Switch()
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        self.add_adapter(adapter_name, config, low_cpu_mem_usage, **options)

    @classmethod
    def around(cls, model: nn.Module) -> Grafted:
        """The root of a model that has adapters already."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.model, self.switch = model, injection.switch_of(model) or Switch()
        return self

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.switch.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.switch.active)

    active_adapter = active_adapters

    def hosts(self) -> dict[str, Host]:
        """The hosts by original path."""
        return hosts(self.model)

    def merged(self) -> set[str]:
        """The adapters that are merged into some layer."""
        return {name for host in self.hosts().values() for name in host.merged_adapters}

    # -- calling

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's forward; ``adapter_names``: one for each row, ``"__base__"`` for none."""
        with self.switch.turn(adapter_names), self.calling(adapter_names, args, kwargs):
            return self._forward(self.switch, args, kwargs)

    def calling(
        self, names: Sequence[str] | None, args: Any, kwargs: dict[str, Any], once: bool = True
    ) -> Any:
        """A context for one call; takes from ``kwargs`` what adapters read. ``once``: it is one
        forward.
        """
        switch = self.switch
        now = switch.current()
        context = {key: kwargs.pop(key) for key in switch.reads if key in kwargs}
        for name in self.preparing(names or now.active) if once and switch.busy else ():
            context |= switch.configs[name].before(self, name, args, kwargs)
        if names is None and not context and once:
            return nullcontext()
        rows = now.rows if names is None else self.rows(names, (args, kwargs))
        return switch.call(now.active, rows, **{**now.context, **context})

    def preparing(self, names: Iterable[str]) -> list[str]:
        """The adapters that compute something before each forward."""
        configs = self.switch.configs
        return [n for n in dict.fromkeys(names) if n in configs and configs[n].prepares()]

    @contextmanager
    def generating(
        self, names: Sequence[str] | None, inputs: Any, kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """A context for a call that runs the user's model many times by itself."""
        switch = self.switch
        with switch.turn(names), ExitStack() as stack:
            preparing = self.preparing(names or switch.current().active)
            lasting = [name for name in preparing if switch.configs[name].LASTS]
            preparing = [name for name in preparing if name not in lasting]
            stack.enter_context(self.calling(names, inputs, kwargs, once=False))
            call = switch.current()
            for name in lasting:
                call.context.update(switch.configs[name].before(self, name, inputs, kwargs))
            if preparing:  # each forward sees the whole sequence
                kwargs["use_cache"] = False
            stack.enter_context(each_forward(self, preparing))
            yield

    def _forward(self, switch: Switch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choose.link(switch, self.hosts)
        learning = self.training and torch.is_grad_enabled()
        active = switch.current().active
        followed = [switch.schedules[n] for n in active if n in switch.schedules]
        for schedule in followed if learning else ():
            schedule.check()
        outputs = self.model(*args, **kwargs)
        call = switch.current()
        known = [n for n in call.active if n in switch.configs] if switch.busy else []
        for name in known if call.rows is None else ():
            outputs = switch.configs[name].after(self, name, outputs, args, kwargs)
        if learning:
            outputs = add_to_loss(outputs, followed)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            switch.remember(outputs)
        return outputs

    def rows(self, names: Sequence[str], inputs: Any = ()) -> tuple[str, ...]:
        """``names`` checked against the adapters and the batch."""
        rows = tuple(names)
        self.switch.check(tuple(n for n in rows if n != BASE))
        lengths = [len(tensor) for tensor in tensors_in(inputs) if tensor.ndim]
        if not rows or (lengths and not any(n == len(rows) for n in lengths)):
            raise StateError(
                f"adapter_names has {len(rows)} entries for a batch of {next(iter(lengths), 0)} "
                "rows; give one name for each row"
            )
        if any(getattr(m, "batch_first", True) is False for _, m in walk(self.model)):
            raise StateError(
                "this model takes the sequence first (batch_first=False), so adapter_names cannot "
                "be applied to its rows; run one adapter at a time"
            )
        return rows

    @contextmanager
    def using(
        self, *names: str, rows: Sequence[str] | None = None, **context: Any
    ) -> Iterator[None]:
        """Within the block, in this thread, these adapters are active; none: the base model.

        Args:
            *names: adapters, the lowest first.
            rows: one adapter name for each row of the batch instead.
            **context: values for methods that route by them.
        """
        own = None if rows is None else self.rows(rows)
        with self.switch.call(self.together(names), own, **context):
            yield

    # -- adapters

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        """Add one more adapter; it is active only where it is the first."""
        if not isinstance(peft_config, TargetConfig):
            raise TypeError(
                f"a {type(peft_config).__name__} does not say which layers to adapt; give a "
                "method's own config, such as LoraConfig(r=8)"
            )
        injection.inject(
            self.model, peft_config, adapter_name, self.switch, meta=low_cpu_mem_usage, **options
        )

    @ordered
    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, the lowest first; unless ``inference_mode``, they alone train.

        Raises:
            StateError: a name is unknown, or two of them replace the same module.
        """
        names, switch = self.together(adapter_name), self.switch
        switch.activate(names)
        switch.before_merge = names
        switch.flags.choose(names, not inference_mode, partial(parts, self.model))

    def together(self, adapter_names: str | Sequence[str]) -> tuple[str, ...]:
        """Adapters' names where each of them has an effect beside the others."""
        names, flags = self.switch.check(adapter_names), self.switch.flags
        every = self.hosts().values() if len(names) > 1 and flags.hide(names) else ()
        if reason := next(filter(None, (host.hidden(names) for host in every)), None):
            raise StateError(f"these adapters cannot be active together: {reason}; leave one out")
        return names

    @ordered
    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Freeze or unfreeze adapters, whether active or not."""
        names = self.switch.check(adapter_names)
        self.switch.flags.write(names, requires_grad, partial(parts, self.model))

    def enable_adapter_layers(self) -> None:
        """Switch all adapters on again."""
        self.switch.activate(enabled=True)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off, until ``enable_adapter_layers``."""
        self.switch.activate(enabled=False)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Drop adapters; layers without any other get back their place in the model."""
        injection.delete(self.model, self.switch, self.switch.check(adapter_name))

    @alone
    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        switch = self.switch
        switch.check((old,))
        injection.check_name(new, switch.configs)

        def named(names: Iterable[str]) -> tuple[str, ...]:
            return tuple(new if n == old else n for n in names)

        tables: list[Any] = [switch.configs, switch.schedules, switch.shared]
        for host in self.hosts().values():
            tables.append(host.adapters._modules)
            host.merged_adapters = named(host.merged_adapters)
        for table in tables:  # in place, and in the same order
            kept = dict(zip(named(table), table.values(), strict=True))
            table.clear()
            table.update(kept)
        switch.flags.rename(old, new)
        switch.merged, switch.before_merge = named(switch.merged), named(switch.before_merge)
        switch.activate(named(switch.active))

    def update_and_allocate(self, global_step: int) -> None:
        """PEFT's manual call of AdaLoRA's schedule; not needed: the optimizer's step drives it."""

    # -- merging

    @alone
    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        keep: bool | str = True,
    ) -> None:
        """Write adapters into the weights; the whole model is checked before anything is changed.

        Args:
            adapter_names: which, the lowest first; those that are active by default.
            safe_merge: PEFT's name for the check, which is always made.
            keep: what becomes of the original weights: True keeps them where they are, ``"cpu"`` in
                main memory, False drops them, so that it cannot be undone.

        Raises:
            MergeError: an update is not finite, or a layer has no place for it.
        """
        switch, every = self.switch, list(self.hosts().values())
        wanted = switch.check(adapter_names or switch.active)
        names = self.together(switch.merged + wanted)
        if names == switch.merged:
            why = f"{list(wanted)} are merged already" if wanted else "no adapter is active"
            return warn(f"{why}; nothing to merge")
        if keep:
            prepared = [(host, host.prepare(names)) for host in every]
        else:  # twice, so that no second copy of the model is ever held
            for host in every:
                host.prepare(names)
            prepared = ((host, host.prepare(names)) for host in every)  # type: ignore[assignment]
        ties.commit(self.model, names, prepared, keep, switch)
        if not switch.merged:
            switch.before_merge = switch.active
        switch.merged = names
        switch.activate(names)

    @alone
    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        switch, every = self.switch, self.hosts().values()
        if not self.merged():
            return warn("no adapter is merged; nothing to undo")
        for host in every:
            host.restore()
        ties.restore(self.model, switch)
        if switch.active == switch.merged:
            switch.activate(switch.before_merge)
        switch.merged = ()

    @alone
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Write adapters into the weights for good, and give back the plain model."""
        if not self.merged().issuperset(self.switch.check(adapter_names or self.switch.active)):
            self.merge_adapter(adapter_names, keep=False)
        return self._bare()

    @alone
    def unload(self) -> nn.Module:
        """Give back the user's own model: its objects, its classes, its hooks and its bits."""
        if self.merged():
            self.unmerge_adapter()
        return self._bare()

    def _bare(self) -> nn.Module:
        trainable, merged = self.switch.trainable, self.merged()
        for path, module in list(walk(self.model)):
            if isinstance(module, Host):
                put(self.model, path, module.base_layer)
        repeated = replicas.restore(self.model)
        for name, parameter in parameters(self.model):
            parameter.requires_grad_(name in trainable)
        for path, blocks in repeated.items() if merged else ():
            put(self.model, path, blocks.parted())
        for config in self.switch.configs.values():
            config.detached(self.model, self.switch)
        self.switch.flags.forget()
        injection.changed(self.model, self.switch, False)
        self.model.__dict__.pop("peft_config", None)
        return self.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            switch: Switch = self.__dict__["switch"]
            for own in (*switch.active, *switch.configs):
                if own in switch.configs and name in switch.configs[own].OFFERS:
                    return switch.configs[own].offer(self, own, name)
            return getattr(self.model, name)
