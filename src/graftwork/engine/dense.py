"""Read a weight as a dense tensor: the only door to packed (quantised) weights.

A packed weight is recognised by the name of its type along the MRO, so no optional library is
imported. Quantised bases register their reader with ``DENSE["TypeName"] = function``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..fast.shards import in_parts, split

DENSE: dict[str, Callable[[Tensor], Tensor]] = {}


def dense(weight: Tensor, where: str = "") -> Tensor:
    """``weight`` as a floating-point tensor of its logical shape.

    Raises:
        TypeError: the weight is packed and no reader is registered for its type.
        StateError: processes hold it in parts.
    """
    if how := split(weight):
        raise in_parts(where or "a layer", f"its weight is {how}", "read")
    if type(weight) not in (Tensor, nn.Parameter):
        for cls in type(weight).__mro__:
            if reader := DENSE.get(cls.__name__):
                return reader(weight)
    if not weight.is_floating_point():
        raise TypeError(
            f"{where or 'a layer'} holds a packed weight ({type(weight).__name__}, "
            f"{weight.dtype}), which only methods that leave the weight alone can adapt (LoRA "
            "without DoRA); to merge, or for methods that read the weight, register a reader: "
            f"graftwork.engine.dense.DENSE[{type(weight).__name__!r}] = lambda w: ..."
        )
    return weight
