"""Configs: plain dataclasses with PEFT's names that round-trip PEFT's ``adapter_config.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import FileError, did_you_mean, warn
from .fields import check_choice, check_fields, set_beyond
from .hooks import Hooks
from .patterns import pattern_matches as pattern_matches
from .patterns import patterns
from .types import OwnType
from .types import PeftType as PeftType
from .types import TaskType as TaskType

if TYPE_CHECKING:
    from torch import Tensor

    from .engine.adapter import Adapter, Shared
    from .engine.host import Host
    from .engine.site import Site
    from .targets.match import Match
    from .targets.offer import Offer, Target
    from .targets.plan import Slot

CONFIG_NAME = "adapter_config.json"
FORMAT_VERSION = "0.21.2"  # the PEFT release whose file format is written

C = TypeVar("C", bound="PeftConfig")


@dataclass
class PeftConfig(Hooks):
    """What every method's config has.

    Args:
        task_type: what the model is for, a ``TaskType`` or its name.
        peft_type: the method; each config class sets its own.
        base_model_name_or_path: where the base model came from; filled in by ``get_peft_model``.
        revision: the base model's revision on the hub.
        peft_version: the PEFT release whose file format is written.
        inference_mode: whether the adapter's tensors are frozen.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None  # class and library of a base model without a task
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    METHOD: ClassVar[PeftType | str | None] = None  # a str for a method that PEFT does not have
    ADAPTER: ClassVar[Any] = None  # set by ``class X(Adapter, config=XConfig)``
    PATTERNS: ClassVar[dict[str, str]] = {}  # field with values per path -> the field it overrides
    BEYOND: ClassVar[frozenset[str]] = frozenset()  # fields beyond PEFT's: written only where set
    CONTEXT: ClassVar[tuple[str, ...]] = ()  # arguments of a call that the adapters read
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False

    def __init_subclass__(cls, method: str = "", peft: str | None = None, **kwargs: Any) -> None:
        """A config's class.

        Args:
            method: the name of its method, as in files.
            peft: which of the optional fields PEFT's config has, see ``beyond``.
            **kwargs: none.
        """
        super().__init_subclass__(**kwargs)
        if method:
            cls.METHOD = PeftType.__members__.get(method, method)
        if peft is not None:
            cls.BEYOND = beyond(peft)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.METHOD is not None:
            own = isinstance(self.METHOD, PeftType)
            self.peft_type = self.METHOD if own else OwnType(self.METHOD)
        elif self.peft_type is not None:
            self.peft_type = _member(PeftType, self.peft_type, "peft_type")
        if self.task_type is not None:
            self.task_type = _member(TaskType, self.task_type, "task_type")
        self.peft_version = self.peft_version or FORMAT_VERSION

    @property
    def method(self) -> str:
        """The method's name, as in files and in the table of methods."""
        return str(getattr(self.peft_type, "value", self.peft_type))

    def adapter(self) -> type[Adapter]:
        """The class of this config's adapters."""
        if self.ADAPTER is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no adapter; use a method's own config, and in a method "
                f"of your own write class Mine(LowRank, config={type(self).__name__})"
            )
        found: type[Adapter] = self.ADAPTER
        return found

    def share(self, sites: Sequence[Site]) -> Shared | None:
        """What the adapters at these sites have in common, built once."""
        return None

    def build(self, host: Host, key: str, shared: Shared | None) -> Adapter:
        """The adapter at one place of a host; one for each slice of a stacked weight."""
        site, cls = host.need_site(key), self.adapter()
        config = self.at(site.path, site.parameter)
        if site.lead and not cls.stacked:
            from .parts.stack import Stack

            return Stack(cls, config, site, shared)
        return cls(config, site) if shared is None else cls(config, site, shared)

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """A term of the training loss, from one name's adapters by path; the engine adds it."""
        return None

    def after_step(self, adapters: Mapping[str, Adapter], step: int) -> None:
        """Called after the optimizer's ``step``-th step (1-based), while gradients are there."""

    def has_penalty(self) -> bool:
        """Whether ``penalty`` adds something."""
        return type(self).penalty is not PeftConfig.penalty

    def has_schedule(self) -> bool:
        """Whether training goes wrong where ``after_step`` is not called."""
        return type(self).after_step is not PeftConfig.after_step

    def at(self: C, path: str, parameter: str = "weight") -> C:
        """This config with the values that hold at one path."""
        changes = self.changes(path, parameter)
        return replace(self, **changes) if changes else self

    def changes(self, path: str, parameter: str) -> dict[str, Any]:
        """The fields that have another value at a path, by the patterns."""
        found: dict[str, Any] = {}
        for name, target in self.PATTERNS.items():
            if values := getattr(self, name):
                for key in patterns(*values).meaning(path, parameter):
                    found.setdefault(target, values[key])
        return found

    # -- PEFT's JSON

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as PEFT writes them."""
        out = {}
        for f in fields(self):
            value = getattr(self, f.name)
            unset = f.default if f.default_factory is MISSING else f.default_factory()
            if f.name not in self.BEYOND or value != unset:
                out[f.name] = (
                    asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                )
        return out

    def to_json(self) -> str:
        """The text of ``adapter_config.json``."""
        # fields in order; inside a pattern the user's order says which entry comes first
        return json.dumps(dict(sorted(_plain(self.to_dict()).items())), indent=2)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into a folder, made where it is missing."""
        from .files.atomic import Saving

        folder = Path(save_directory)
        if os.path.isfile(folder):
            raise FileError(f"{folder} is a file; give a folder for the config")
        with Saving(folder).begun() as saving:
            saving.put(CONFIG_NAME, self.to_json().encode())

    @classmethod
    def from_pretrained(
        cls: type[C],
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> C:
        """Read the config of an adapter, in the class of its method.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            subfolder: a folder inside it.
            **kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ... of the hub;
                other names are fields of the config, which the file overrides.

        Raises:
            FileError: no such adapter, or its config cannot be used.
        """
        from .files.folder import read_config

        return read_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)  # type: ignore[return-value]

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        """The content of a config file as a dictionary."""
        data: dict[str, Any] = json.loads(Path(path_json_file).read_text(encoding="utf-8"))
        return data

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """A config from its fields; ``peft_type`` among them decides its class."""
        from .table import method

        target = method(str(kwargs["peft_type"])).config if kwargs.get("peft_type") else cls
        return target.from_fields(kwargs)

    @classmethod
    def from_fields(cls: type[C], data: Mapping[str, Any], where: str = "the config") -> C:
        """A config from the fields of a file.

        Raises:
            FileError: an unknown field is set, so the file asks for something that this version
                does not do.
        """
        known = {f.name for f in fields(cls)}
        if asked := set_beyond(data, known):
            from .errors import POLICY

            name = next(iter(asked))
            every = ", ".join(f"{k}={v!r}"[:200] for k, v in asked.items())
            text = (
                f"{where} sets {every[:1000]}, which "
                f"{cls.__name__} does not have{did_you_mean(name, known)}. It was saved by a newer "
                "version, or by hand: upgrade, or remove the field"
            )
            if not POLICY.lenient:
                raise FileError(text)
            warn(f"{text}. It is ignored")
        return cls(**{k: v for k, v in data.items() if k in known and k != "runtime_config"})


# fields that every config has here, and some have in PEFT
OPTIONAL = frozenset(
    "exclude_modules layers_to_transform layers_pattern bias fan_in_fan_out modules_to_save "
    "target_parameters trainable_token_indices overrides allow_unmatched".split()
)


def beyond(peft: str) -> frozenset[str]:
    """The optional fields that a config of PEFT lacks; ``peft`` are those that it has.

    "layers" stands for ``layers_to_transform`` and ``layers_pattern``, "exclude" for
    ``exclude_modules``, "save" for ``modules_to_save``, "fan" for ``fan_in_fan_out``; "all" for
    every one that any config of PEFT has.
    """
    words = {
        "layers": "layers_to_transform layers_pattern",
        "exclude": "exclude_modules",
        "save": "modules_to_save",
        "fan": "fan_in_fan_out",
    }
    if peft == "all":
        return frozenset({"overrides", "allow_unmatched"})
    return OPTIONAL.difference(*(words.get(word, word).split() for word in peft.split()))


@dataclass
class TargetConfig(PeftConfig):
    """A config of a method that sits at layers; see ``targets/match.py`` for how they are chosen.

    Args:
        target_modules: names that a layer's path ends with, or a regex for the whole path, or
            ``"all-linear"``; None takes PEFT's choice for a known architecture, and the repeated
            blocks' linear layers for others.
        exclude_modules: names or a regex of layers to leave out.
        modules_to_save: modules that are trained as a whole and saved with the adapter.
        layers_to_transform: indices of the blocks to adapt.
        layers_pattern: the name in front of those indices, e.g. ``"layers"``.
        bias: biases that train too: "none", "all", or those of the adapted layers, "<method>_only".
        fan_in_fan_out: PEFT's note of transposed weights; here the layer's type says so.
        target_parameters: names of bare parameters to adapt, such as stacked expert weights.
        trainable_token_indices: ids, or {embedding: ids}, of tokens whose rows train.
        overrides: {regex for the end of a path: {field: value there}}, of any of the method's own
            fields.
        allow_unmatched: whether a pattern that matches nothing is only a warning.
    """

    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    bias: str = field(default="none", kw_only=True)
    fan_in_fan_out: bool = field(default=False, kw_only=True)
    target_parameters: Any = field(default=None, kw_only=True)
    trainable_token_indices: Any = field(default=None, kw_only=True)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict, kw_only=True)
    allow_unmatched: bool = field(default=False, kw_only=True)

    BEYOND = beyond("exclude layers save")
    SUBSETS: ClassVar[tuple[str, ...]] = ()  # fields whose entries mean some of the adapted layers
    EMBEDDINGS: ClassVar[bool] = False  # without target_modules, the input embedding is meant

    def prepare(self, offer: Offer) -> None:
        """Spell out what the config means in this model."""
        from .parts.companions import prepare

        prepare(self, offer)

    def companions(self, match: Match, targets: list[Target]) -> Iterable[Slot]:
        """What is to be built beside the method's own adapters at ``targets``."""
        from .parts.companions import companions

        return companions(match, targets)

    def changes(self, path: str, parameter: str) -> dict[str, Any]:
        found = super().changes(path, parameter)
        for key in patterns(*self.overrides).meaning(path, parameter) if self.overrides else ():
            found |= self.overrides[key]
        return found

    def places(self, offer: Offer, path: str) -> list[Target]:
        """The places that a path in ``target_modules`` stands for; none: it cannot sit there."""
        return offer.targets(path)

    def usual(self, offer: Offer) -> Any:
        """``target_modules`` where the user gives none: PEFT's choice, or the repeated blocks.

        Raises:
            TargetError: the model does not show it.
        """
        from .targets.match import usual

        return usual(offer, self)

    def settle(self, model_type: str, paths: Sequence[str]) -> None:
        """Fill in what depends on the architecture, once the adapted layers are known."""

    def means(self, entry: str, path: str) -> bool:
        """Whether an entry of a field in SUBSETS means the layer at ``path``."""
        return path == entry or path.endswith(f".{entry}")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in ("none", "all") and not str(self.bias).endswith("_only"):
            only = f"{self.method.lower()}_only"
            check_choice(self.bias, "bias", ("none", "all", only))
        own = {f.name for f in fields(self)} - OPTIONAL - {f.name for f in fields(PeftConfig)}
        for pattern, values in self.overrides.items():
            for name in values:
                check_choice(name, f"overrides[{pattern!r}]", sorted(own - {"target_modules"}))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "layers_pattern says where block indices stand; give layers_to_transform=[...] too"
            )
        if (
            isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
            and self.layers_to_transform
        ):
            raise ValueError(
                "target_modules is a regex, which can name the blocks itself; remove "
                "layers_to_transform and layers_pattern, or give target_modules as a list"
            )


def _member(enum: type[Any], value: Any, name: str) -> Any:
    try:
        return enum(value)
    except ValueError:
        names = [m.value for m in enum]
        raise ValueError(
            f"{name}={value!r} is not known{did_you_mean(str(value), names)} It is one of {names}"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
