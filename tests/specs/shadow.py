"""Shadow, which follows the blocks of a transformer; more is in tests/test_shadow.py."""

from __future__ import annotations

from graftwork import ShadowConfig
from graftwork.testing.blocks import blocks
from specs import Case

CASES = {
    "shadow": Case(
        lambda: ShadowConfig(r=2, shadow_alpha=0.7), row="SHADOW", needs="blocks", alone=False,
        other=lambda: ShadowConfig(r=3, shadow_alpha=0.5), model=blocks,
        ends=("embed_tokens", "lm_head"),
    ),
}  # fmt: skip
