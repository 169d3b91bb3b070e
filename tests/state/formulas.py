"""What each method makes of a weight and a bias, written down from the papers.

Only the tensors of a saved file and the config go in: nothing of the library computes here. They
are differentiable, so that a step of training can be predicted too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # of one layer, under the names of a file without the layer's path
Folded = tuple[Tensor, Tensor | None]
RULES: dict[str, Callable[..., Folded]] = {}


def rule(method: str) -> Callable[..., Any]:
    """Give a method its formula: (tensors, config, w, b, base weight) -> the new w and b."""

    def keep(formula: Callable[..., Any]) -> Any:
        RULES[method] = formula
        return formula

    return keep


def factors(t: Tensors) -> tuple[Tensor, Tensor]:
    if "lora_embedding_A" in t:
        return t["lora_embedding_A"], t["lora_embedding_B"]
    return t["lora_A.weight"], t["lora_B.weight"]


@rule("LORA")
def lora(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    a, up = factors(t)
    r = len(a)
    alpha = r if config.alpha_pattern else config.lora_alpha  # patterns: only combined ones here
    scale = alpha / (r**0.5 if config.use_rslora else r)
    if (shift := t.get("lora_B.bias")) is not None:
        b = scale * shift if b is None else b + scale * shift
    new = w + scale * up @ a
    if config.init_lora_weights == "pissa":  # the start, which was taken away
        u, s, v = torch.linalg.svd(base.float())  # it is found in fp32, and need not be exact
        new = new - ((u[:, :r] * s[:r]) @ v[:r]).to(new)
    if config.use_dora:
        norm = new.norm(dim=1, keepdim=True).detach()  # a constant, says the paper
        new = t["lora_magnitude_vector"].reshape(-1, 1) * new / norm
    return new, b


@rule("ADALORA")
def adalora(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    return w + config.lora_alpha / (config.init_r + 1e-5) * t["lora_B"] @ (
        t["lora_E"] * t["lora_A"]
    ), b


@rule("LOHA")
def loha(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    first, second = t["hada_w1_a"] @ t["hada_w1_b"], t["hada_w2_a"] @ t["hada_w2_b"]
    return w + config.alpha / config.r * first * second, b


@rule("LOKR")
def lokr(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    one, two = (
        t[f"lokr_w{i}"] if f"lokr_w{i}" in t else t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"]
        for i in (1, 2)
    )
    return w + config.alpha / config.r * torch.kron(one.contiguous(), two.contiguous()), b


@rule("IA3")
def ia3(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    gains = t["ia3_l"]
    if gains.shape[0] == 1:  # of the inputs
        return w * gains, b
    return w * gains, b if b is None else b * gains[:, 0]


@rule("VERA")
def vera(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    (out, in_), r = w.shape, config.r
    a, up = t["vera_A"][:r, :in_], t["vera_B"][:out, :r]
    return w + t["vera_lambda_b"][:, None] * up @ (t["vera_lambda_d"][:, None] * a), b


def cayley(q: Tensor) -> Tensor:
    one = torch.eye(q.shape[-1]).to(q)
    return (one - q) @ torch.linalg.inv(one + q)


@rule("OFT")
def oft(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    k = config.oft_block_size
    rows, columns = torch.triu_indices(k, k, 1)
    q = w.new_zeros(len(t["oft_R.weight"]), k, k)
    q = q.index_put((torch.arange(len(q))[:, None], rows, columns), t["oft_R.weight"])
    return w @ torch.block_diag(*cayley(q - q.mT)).mT, b


@rule("BOFT")
def boft(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    (r,) = t["boft_R"]  # one factor
    return t["boft_s"] * (w @ torch.block_diag(*cayley((r - r.mT) / 2)).mT), b


@rule("HRA")
def hra(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    for u in t["hra_u"].T:
        w = w - 2 * torch.outer(w @ u, u) / (u @ u)
    return w, b


@rule("FOURIERFT")
def fourier(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    drawn = torch.Generator().manual_seed(config.random_loc_seed)
    at = torch.randperm(w.numel(), generator=drawn)[: config.n_frequency]
    spectrum = w.new_zeros(w.numel()).index_put((at,), t["fourierft_spectrum"]).reshape(w.shape)
    return w + config.scaling * torch.fft.ifft2(spectrum).real, b


@rule("DELORA")
def delora(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    a, up = t["delora_A"], t["delora_B"]
    a, up = a / a.norm(dim=1, keepdim=True), up / up.norm(dim=0)
    return w + t["delora_lambda"] / config.r * up @ a * t["delora_w_norm"], b


@rule("MISS")
def miss(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    return w + t["miss_block"].T.repeat(1, w.shape[1] // config.r), b


@rule("HIRA")
def hira(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    return w + w * (t["hira_B"] @ t["hira_A"]), b


@rule("ROAD")
def road(t: Tensors, config: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    cos, sin = (t["road_alpha"] * f(t["road_theta"]) for f in (torch.cos, torch.sin))
    half = config.group_size // 2
    rows = torch.arange(len(w)).reshape(-1, 2, half)
    r = w.new_zeros(len(w), len(w))
    for first, second, c, s in zip(
        rows[:, 0].flatten(), rows[:, 1].flatten(), cos, sin, strict=True
    ):
        r[first, first], r[first, second] = c, -s
        r[second, second], r[second, first] = c, s
    return r @ w, b if b is None else r @ b


@rule("TRAINABLE_TOKENS")
def tokens(t: Tensors, ids: Any, w: Tensor, b: Tensor | None, base: Tensor) -> Folded:
    ids = getattr(ids, "token_indices", ids)
    return w.index_copy(1, torch.tensor(ids), t["trainable_tokens_delta"].T), b
