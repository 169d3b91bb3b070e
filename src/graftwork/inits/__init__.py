"""How a LoRA's factors start: A and B of one adapter at one site, in the shapes in which they are
stored.

The base weight is never touched. A start whose product is not zero (PiSSA, OLoRA, CorDA, LoRA-GA)
is marked ``subtract``: its product is taken away again, so that the adapted layer begins as the
base layer, and disabling gives the base layer exactly.

A start from the user's data is computed by a function of PEFT's name in a file of its own, before
there are adapters or after (``noted.py``); ``files/starts.py`` saves it beside its adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..engine.site import Conv1D, Embedding, Site
from ..errors import did_you_mean, warn
from . import loftq, plain, svd
from .noted import noted, waiting

Factors = Callable[[Any, Site], tuple[Tensor, Tensor]]


class Start(NamedTuple):
    """A way to start; ``factors(adapter, site)`` gives A and B."""

    factors: Factors
    subtract: bool = False
    taken: Factors | None = None  # what is subtracted, if not ``factors`` itself
    data: bool = False  # it follows from data, so that a reader of a file cannot compute it


STARTS = {
    "true": Start(plain.kaiming),
    "false": Start(plain.random),
    "gaussian": Start(plain.gaussian),
    "orthogonal": Start(plain.orthogonal),
    "pissa": Start(svd.pissa, subtract=True),
    "olora": Start(svd.olora, subtract=True),
    "mica": Start(svd.mica),
    "eva": Start(waiting),  # for initialize_lora_eva_weights
    "corda": Start(partial(noted, "corda"), subtract=True, data=True),
    "lora_ga": Start(partial(noted, "lora_ga"), subtract=True, data=True),
    "loftq": Start(loftq.factors, subtract=True, taken=loftq.taken),
}
MATRICES = (Site, Conv1D)  # the sites at which starts from data are known


def start_of(how: bool | str, site: Site) -> Start:
    """The start that ``init_lora_weights`` names, for a site.

    Raises:
        ValueError: no start has that name.
    """
    name = str(how).lower()
    table = isinstance(site, Embedding) and name.startswith(("pissa", "olora", "loftq"))
    if table or (name in ("corda", "lora_ga") and type(site) not in MATRICES):
        warn(
            f"init_lora_weights={how!r} has no meaning at {site.path} {site.describe()}; as in "
            "PEFT, B A starts at 0 there"
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
