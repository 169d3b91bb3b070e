"""How a LoRA's factors start: A and B of one adapter at one site, in the shapes in which they are
stored.

The base weight is never touched. A start whose product is not zero (PiSSA, OLoRA) is marked
``subtract``: its product is taken away again, so that the adapted layer begins as the base layer,
and disabling gives the base layer exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..engine.site import Embedding
from ..errors import did_you_mean, warn
from . import plain, svd

if TYPE_CHECKING:
    from ..engine.site import Site


class Start(NamedTuple):
    """A way to start; ``factors(adapter, site)`` gives A and B."""

    factors: Callable[[Any, Site], tuple[Tensor, Tensor]]
    subtract: bool = False


STARTS = {
    "true": Start(plain.kaiming),
    "false": Start(plain.random),
    "gaussian": Start(plain.gaussian),
    "orthogonal": Start(plain.orthogonal),
    "pissa": Start(svd.pissa, subtract=True),
    "olora": Start(svd.olora, subtract=True),
}


def start_of(how: bool | str, site: Site) -> Start:
    """The start that ``init_lora_weights`` names, for a site.

    Raises:
        ValueError: no start has that name.
    """
    name = str(how).lower()
    if isinstance(site, Embedding) and name.startswith(("pissa", "olora")):
        warn(
            f"init_lora_weights={how!r} has no meaning at the embedding {site.path}; as in PEFT, "
            "B A starts at 0 there"
        )
        name = "true"
    if name.startswith("pissa_niter_"):
        return Start(svd.fast_pissa(name), subtract=True)
    if name not in STARTS:
        raise ValueError(
            f"init_lora_weights={how!r} is not known{did_you_mean(name, STARTS)} It is one of "
            f"{list(STARTS)}"
        )
    return STARTS[name]
