"""Tensors of adapters as PEFT shows them: modules by adapter, which hold the very parameters.

Nothing here owns anything. A value that is set goes to the part that owns it, and what could only
be forgotten, a hook on a module that never runs, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..model.scales import put

Home = tuple[nn.Module, str]  # the module that owns a tensor, and its name there


def settle(home: Home, value: Any) -> Any:
    """Put a tensor in its owner's place and give back what stands there now.

    Raises:
        StateError: its shape is another.
    """
    owner, name = home
    module, _, leaf = name.rpartition(".")
    owner = owner.get_submodule(module)
    old: Any = getattr(owner, leaf)
    if not isinstance(value, Tensor) or value.shape != old.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise StateError(
            f"{type(owner).__name__}.{leaf} has the shape {tuple(old.shape)}, not {shape}; an "
            "adapter of another shape is another adapter: add_adapter(name, config)"
        )
    if isinstance(old, nn.Parameter):
        value = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
    return value


class Shown(nn.Module):
    """A module of PEFT's shape around parameters that a part owns."""

    homes: dict[str, Home]

    def hold(self, name: str, tensor: Tensor, home: Home | None) -> None:
        """Show a tensor under a name of this module."""
        self.__dict__.setdefault("homes", {})
        if home is not None:
            self.homes[name] = home
        own = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
        own[name] = tensor  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        home = self.__dict__.get("homes", {}).get(name)
        if home is not None:
            value = settle(home, value)
            own = self._parameters if isinstance(value, nn.Parameter) else self._buffers
            own[name] = value
        else:
            super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, str(key))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StateError(
            "this module only shows an adapter's tensors and does not run by itself, so a hook on "
            "it would never be called; put the hook on the layer that has the adapter"
        )

    register_forward_hook = register_forward_pre_hook = _refuse
    register_full_backward_hook = register_full_backward_pre_hook = _refuse


class Linear(Shown, nn.Linear):
    """A factor at a linear layer."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self._parameters["bias"] = None


class _Conv(Shown):
    def __init__(self, weight: Tensor, down: bool, layer: Any) -> None:
        nn.Module.__init__(self)
        self.out_channels, self.in_channels = weight.shape[:2]
        ones, zeros = (1,) * (weight.ndim - 2), (0,) * (weight.ndim - 2)
        self.kernel_size = tuple(weight.shape[2:])
        self.stride = layer.stride if down else ones
        self.padding = layer.padding if down else zeros
        self.dilation, self.transposed, self.output_padding = ones, False, zeros
        self.groups = 1
        self.__dict__["padding_mode"] = "zeros"
        self._reversed_padding_repeated_twice = [0] * (2 * len(ones))
        self._parameters["bias"] = None


class Conv1d(_Conv, nn.Conv1d):
    """A factor at a convolution."""


class Conv2d(_Conv, nn.Conv2d):
    """A factor at a convolution."""


class Conv3d(_Conv, nn.Conv3d):
    """A factor at a convolution."""


CONVOLUTIONS = {3: Conv1d, 4: Conv2d, 5: Conv3d}


def factor(attribute: str, tensors: Mapping[str, tuple[Tensor, Home | None]], layer: Any) -> Shown:
    """The module of one adapter in a ModuleDict; ``tensors`` by their names in it."""
    weight = tensors["weight"][0] if "weight" in tensors else None
    single = tensors.keys() <= {"weight", "bias"} and weight is not None
    module: Shown
    if single and weight is not None and weight.ndim == 2:
        module = Linear(weight)
    elif single and weight is not None and weight.ndim in CONVOLUTIONS and hasattr(layer, "stride"):
        module = CONVOLUTIONS[weight.ndim](weight, attribute.endswith("A"), layer)
    else:
        module = Shown()
    for name, (tensor, home) in tensors.items():
        _hold(module, name, tensor, home)
    return module


def _hold(module: Shown, name: str, tensor: Tensor, home: Home | None) -> None:
    first, _, rest = name.partition(".")
    if not rest:
        return module.hold(name, tensor, home)
    inner = module._modules.setdefault(first, Shown())
    assert isinstance(inner, Shown)
    _hold(inner, rest, tensor, home)


def _removal(attribute: str, name: object) -> StateError:
    return StateError(
        f"{attribute}[{name!r}] is part of an adapter and cannot be taken out or put in by itself; "
        "delete_adapter(name) takes the adapter out, add_adapter(name, config) adds one"
    )


class Modules(nn.ModuleDict):
    """What a layer's adapters have under one name, as modules."""

    def __init__(self, attribute: str, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.attribute = attribute
        self._modules.update(modules)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        mine = self._modules.get(key)
        if not isinstance(mine, Shown):
            raise _removal(self.attribute, key)
        for name in mine.homes:
            setattr(mine, name, getattr(module, name))

    def __delitem__(self, key: str) -> None:
        raise _removal(self.attribute, key)


class Parameters(nn.ParameterDict):
    """What a layer's adapters have under one name, as parameters."""

    attribute: str
    homes: dict[str, Home | None]

    def __init__(self, attribute: str, tensors: Mapping[str, tuple[Tensor, Home | None]]) -> None:
        super().__init__()
        self.__dict__["attribute"] = attribute
        self.__dict__["homes"] = {n: home for n, (_, home) in tensors.items()}
        for name, (tensor, _) in tensors.items():
            self._show(name, tensor)

    def _show(self, name: str, tensor: Tensor) -> None:
        self._keys[name] = None
        own = self._parameters if isinstance(tensor, nn.Parameter) else self._buffers
        own[name] = tensor  # type: ignore[assignment]

    def __setitem__(self, key: str, value: Any) -> None:
        home = self.homes.get(key)
        if home is None:
            raise _removal(self.attribute, key)
        self._show(key, settle(home, value))

    def __delitem__(self, key: str) -> None:
        raise _removal(self.attribute, key)


class Buffers(Shown):
    """What a layer's adapters have under one name, as buffers (PEFT's ``BufferDict``)."""

    attribute: str

    def __init__(
        self, attribute: str = "", tensors: Mapping[str, tuple[Tensor, Home | None]] | None = None
    ) -> None:
        super().__init__()
        self.__dict__["attribute"] = attribute
        for name, (tensor, home) in (tensors or {}).items():
            _hold(self, name, tensor.detach(), home)

    def __setitem__(self, key: str, value: Tensor) -> None:
        if key not in self._buffers:
            raise _removal(self.attribute, key)
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        raise _removal(self.attribute, key)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> Iterable[str]:
        """The adapters' names."""
        return self._buffers.keys()

    def values(self) -> Iterable[Any]:
        """The tensors."""
        return self._buffers.values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Both."""
        return self._buffers.items()


class Values(dict[str, Any]):
    """A value by adapter: what can be set goes to the part, the rest says where it comes from."""

    def __init__(self, attribute: str, values: Mapping[str, Any], owners: Mapping[str, Any]):
        super().__init__(values)
        self.attribute, self.owners = attribute, owners

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.owners:
            raise StateError(
                f"{self.attribute}[{key!r}] only shows what the adapter was made with; set it in "
                "the config, before the adapter is made"
            )
        part, times = self.owners[key]
        put(part, value / times)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        raise _removal(self.attribute, key)


def changed(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    children: Mapping[str, nn.Module],
) -> nn.Module:
    """A view of a module with some parameters and children in place of its own."""
    if not parameters and not children:
        return module
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_parameters"] = {**module._parameters, **parameters}
    view.__dict__["_modules"] = {**module._modules, **children}
    return view


def container(
    kind: str,
    attribute: str,
    found: Mapping[str, Mapping[str, tuple[Tensor, Home | None]]],
    layer: Any,
) -> nn.Module:
    """A ModuleDict, ParameterDict or BufferDict of what the adapters have under one name."""
    if kind == "M":
        modules = {n: factor(attribute, tensors, layer) for n, tensors in found.items()}
        return Modules(attribute, modules)
    flat = {
        f"{n}.{rest}" if rest else n: pair for n, own in found.items() for rest, pair in own.items()
    }
    return Parameters(attribute, flat) if kind == "P" else Buffers(attribute, flat)


def letter(tensor: Tensor, rest: str) -> str:
    """How a name is shown of which PEFT's table says nothing."""
    if rest:
        return "M"
    return "P" if isinstance(tensor, nn.Parameter) else "B"


def ranknum(part: Any) -> nn.Parameter:
    """AdaLoRA's count of triplets as PEFT has it, a tensor of one number."""
    return nn.Parameter(torch.full((1,), float(len(part.E))), requires_grad=False)
