"""Fields of configs: what they refuse, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from graftwork import C3AConfig, EvaConfig, LoraConfig, TinyLoraConfig, VeraConfig
from graftwork.methods.lora_options import BdLoraConfig, MontecloraConfig


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: VeraConfig(r=256.0), ValueError, r"r must be a whole number, not 256\.0"),
        (lambda: VeraConfig(r=True), ValueError, "r must be a whole number, not True"),
        (lambda: VeraConfig(r=0), ValueError, "r must be at least 1, not 0"),
        (lambda: VeraConfig(vera_dropout=1.0), ValueError, "vera_dropout is a probability"),
        (lambda: C3AConfig(init_weights=1), ValueError, "init_weights=1 is not known"),
        (lambda: C3AConfig(init_weights="gausian"), ValueError, "did you mean 'gaussian'"),
        (lambda: EvaConfig(rho="2"), ValueError, "rho must be a number, not '2'"),
        (lambda: EvaConfig(tau=float("nan")), ValueError, "tau=nan is not between 0 and 1"),
        (lambda: TinyLoraConfig(weight_tying=-0.1), ValueError, "weight_tying=-0.1 is not between"),
        (lambda: LoraConfig(use_bdlora=False), TypeError, "False stands where a BdLoraConfig"),
        (lambda: LoraConfig(kasa_config=0), TypeError, "0 stands where a KasaConfig is expected"),
        (lambda: LoraConfig(eva_config={"roh": 5.0}), ValueError, "no roh; did you mean 'rho'"),
        (
            lambda: LoraConfig(monteclora_config={"num_sampels": 3}),
            ValueError,
            "MontecloraConfig has no num_sampels; did you mean 'num_samples'",
        ),
    ],
)
def test_what_a_field_may_not_be_is_refused(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        make()


def test_options_are_read_from_dictionaries_and_from_nothing() -> None:
    data = {"num_samples": 3, "from_a_newer_version": None}
    assert LoraConfig(monteclora_config=data).monteclora_config == MontecloraConfig(num_samples=3)
    assert LoraConfig(use_bdlora={}).use_bdlora == BdLoraConfig()
    assert LoraConfig(use_bdlora=None).use_bdlora is None
    assert EvaConfig.of(None) == EvaConfig()


def test_the_default_is_always_allowed() -> None:
    """Also where it means that there is none: -1, 0, None."""
    from graftwork import GraloraConfig, LoKrConfig, SupertuningConfig

    assert LoKrConfig(decompose_factor=-1).decompose_factor == -1
    assert GraloraConfig(hybrid_r=0).hybrid_r == 0
    assert SupertuningConfig(r=None).r is None
    with pytest.raises(ValueError, match="hybrid_r must be at least 1, not -1"):
        GraloraConfig(hybrid_r=-1)
