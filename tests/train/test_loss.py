"""The loss without whole logits: the model's own loss and gradients, in less memory, or the plain
one with the reason.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftwork
from graftwork import LoraConfig, PrefixTuningConfig, PromptTuningConfig, fused_loss, get_peft_model
from graftwork.errors import StateError
from graftwork.loss import parts
from prompts.families import DECODERS, FAMILIES

HAS = hasattr(functional, "linear_cross_entropy")
BEST = "torch" if HAS else "parts"
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))


def batch() -> dict[str, Tensor]:
    """Rows with padding, and with a part that is not learnt."""
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[1, -3:], labels[1, -3:], labels[0, :4] = 0, -100, -100
    return {"input_ids": IDS, "attention_mask": mask, "labels": labels}


def adapted(name: str, config: Any = None) -> Any:
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=r".*(q_proj|o_proj|c_attn)", init_lora_weights=False)
    return get_peft_model(FAMILIES[name].build(), config or lora)


@contextmanager
def allowed(model: nn.Module, fused: bool) -> Iterator[Any]:
    if not fused:
        yield None
        return
    with fused_loss(model, fallback=True) as how:
        yield how


def both(model: Any, **inputs: Any) -> tuple[Any, Any]:
    """The plain output, and the fused one with how it was made; losses and gradients agree."""
    model.train()
    found = []
    for fused in (False, True):
        model.zero_grad()
        with allowed(model, fused) as how:
            out = model(**inputs)
        out.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((out, how, grads))
    (plain, _, want), (out, how, grads) = found
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=1e-5)
    assert grads.keys() == want.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-5, msg=name)
    return out, how


WHOLE = {"gemma2": "final_logit_softcapping=30", "gemma3n": "softcapping", "gemma4": ""}


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("count", [None, 40], ids=["mean", "counted"])
def test_it_is_the_loss_of_every_family(name: str, count: int | None) -> None:
    more = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    out, how = both(adapted(name), **batch(), **more)
    if name in WHOLE and how.reason:
        assert WHOLE[name] in how.reason and out.logits is not None
        assert str(how).startswith("from whole logits: ")
    else:
        assert how and how.kernel == BEST and out.logits is None
        assert "without whole logits" in str(how)


def config_of(name: str) -> Any:
    given: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    return {
        "prompt": PromptTuningConfig(**given),
        "prefix": PrefixTuningConfig(**given),
        "embedding": LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
        "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    }[name]


@pytest.mark.parametrize("name", ["prompt", "prefix", "embedding", "tokens"])
def test_adapters_may_be_anywhere_below(name: str) -> None:
    out, how = both(adapted("llama", config_of(name)), **batch())
    assert how and out.logits is None


def tied(**changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {**FAMILIES["llama"].fields, "tie_word_embeddings": True, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def test_ends_that_are_tied_and_train() -> None:
    base = tied()
    _, how = both(base, **batch())
    assert how.kernel == BEST
    base.lm_head.bias = nn.Parameter(torch.randn(64))
    _, how = both(base, **batch())
    assert how.kernel == BEST


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=["lm_head"]), "the output layer has an adapter"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "has an adapter"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), "has an adapter"),
        (
            graftwork.CPTConfig(
                cpt_token_ids=[5, 6], cpt_tokens_type_mask=[1, 2], task_type="CAUSAL_LM"
            ),
            "'default' computes a loss of its own",
        ),
    ],
    ids=["lora", "saved", "tied tokens", "cpt"],
)
def test_what_the_output_layer_or_the_logits_are_needed_for(config: Any, reason: str) -> None:
    model = get_peft_model(tied(), config)
    with pytest.raises(StateError, match=rf"(?s){reason}.*fallback=True"), fused_loss(model):
        raise AssertionError("the block was entered")
    out, how = both(model, **batch())
    assert reason in how.reason and out.logits is not None


def test_models_of_another_kind() -> None:
    import transformers

    bert = transformers.BertForMaskedLM(transformers.BertConfig(**FAMILIES["bert"].fields))
    granite = transformers.GraniteConfig(**FAMILIES["llama"].fields, logits_scaling=2.0)
    cohere = transformers.CohereConfig(**FAMILIES["llama"].fields, logit_scale=0.5)
    for model, reason in [
        (bert, "is not that of causal language models"),
        (FAMILIES["t5"].build(), "is not that of causal language models"),
        (FAMILIES["bart"].build(), "is not that of causal language models"),
        (transformers.GraniteForCausalLM(granite), "logits_scaling=2"),
        (transformers.CohereForCausalLM(cohere), "logit_scale=0.5"),
        (nn.Linear(2, 2), "no language model of transformers"),
    ]:
        with pytest.raises(StateError, match=reason), fused_loss(model):
            raise AssertionError("the block was entered")


def test_a_model_that_changes_its_logits_unseen_is_run_as_it_is() -> None:
    model = tied(tie_word_embeddings=False)
    plain, calls = model.loss_function, []

    def doubled(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        out = forward(*args, **{**kwargs, "labels": None})
        loss = model.loss_function(logits=2 * out.logits, labels=kwargs["labels"], vocab_size=64)
        return type(out)(loss=loss, logits=out.logits)

    forward = model.forward
    model.forward = doubled
    want = model(**batch()).loss
    with fused_loss(model, fallback=True) as how:
        torch.testing.assert_close(model(**batch()).loss, want)
        assert "does not hand what its output layer gives to its loss function" in how.reason
        torch.testing.assert_close(model(**batch()).loss, want)  # without a second try
    assert len(calls) == 4
    with pytest.raises(StateError, match="does not hand"), fused_loss(model):
        model(**batch())
    assert model.forward is doubled and model.loss_function is plain


def test_a_loss_that_the_model_computes_by_itself() -> None:
    model = tied(tie_word_embeddings=False)
    plain = type(model).forward

    def own(self: Any, labels: Any = None, **kwargs: Any) -> Any:
        out = plain(self, **kwargs)
        out.loss = functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        return out

    model.forward = types.MethodType(own, model)
    want = model(**batch()).loss
    with fused_loss(model, fallback=True) as how:
        torch.testing.assert_close(model(**batch()).loss, want)
    assert "does not hand" in how.reason


def test_nothing_is_left_behind_and_other_forwards_are_as_ever() -> None:
    model = adapted("llama")
    base = model.get_base_model()
    with fused_loss(model) as how:
        assert not how.kernel and "not computed" in str(how)
        assert model(input_ids=IDS).logits.shape == (3, 9, 64)
        loss, logits = model(**batch(), return_dict=False)[:2]
        assert logits is None and loss.ndim == 0
        assert model.generate(input_ids=IDS, max_new_tokens=2, pad_token_id=0).shape == (3, 11)
        with fused_loss(model) as within:  # one within the other is the same
            assert within is how
        assert model(**batch()).logits is None
    for module in (base, base.lm_head):
        assert not {"forward", "_loss_function"} & module.__dict__.keys()
    with pytest.raises(RuntimeError, match="wrong"), fused_loss(model):
        base.model.register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("wrong"))
        )
        model(**batch())
    assert "forward" not in base.__dict__


def test_output_layers_that_are_something_else() -> None:
    class Own(nn.Linear):
        """A layer that may compute anything."""

    model = tied(tie_word_embeddings=False)
    model.lm_head = Own(32, 64, bias=False)
    with fused_loss(model, fallback=True) as how:
        assert "test_loss.Own" in how.reason
    model.lm_head = nn.Linear(32, 64, bias=False)
    model.lm_head.register_forward_hook(lambda *_: None)
    with fused_loss(model, fallback=True) as how:
        assert "hooked to the output layer" in how.reason


def test_a_compiled_model_is_run_as_it_is() -> None:
    model = torch.compile(adapted("llama"), backend="eager")
    with fused_loss(model, fallback=True) as how:
        assert "is compiled" in how.reason


def largest(step: Callable[[], Any]) -> int:
    """The most bytes that are allocated at once within ``step``, inside of any operation."""
    with torch.profiler.profile(profile_memory=True) as watched:
        step()
    events = watched.profiler.kineto_results.events()
    return max(e.nbytes() for e in events if e.name() == "[memory]")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kernel", ["torch", "parts"])
def test_no_tensor_of_a_step_is_as_large_as_the_logits(
    fused: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch" and not HAS:
        pytest.skip("torch has no linear_cross_entropy")
    monkeypatch.setattr(parts, "kernel_for", lambda *_: kernel)
    base = tied(vocab_size=3000, tie_word_embeddings=False)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear")).train()
    ids = torch.randint(3, 3000, (4, 150))
    logits = ids.numel() * 3000 * 4
    with allowed(model, fused):
        found = largest(lambda: model(input_ids=ids, labels=ids).loss.backward())
    assert (found < 0.6 * logits) if fused else (found >= logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_plain_loss_to_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    h, w, b = torch.randn(40, 16), torch.randn(700, 16), torch.randn(700)
    t = torch.randint(0, 700, (40,))
    found = {}
    for way in ("plain", "parts", "exact"):
        kind = torch.float64 if way == "exact" else dtype
        x, u, c = (a.to(dtype).to(kind).requires_grad_() for a in (h, w, b))
        if way == "parts":
            loss, kernel = parts.loss_of(x, u, c, t)
            assert kernel == "parts" and loss.dtype == torch.float32
        else:
            y = functional.linear(x, u, c)
            loss = functional.cross_entropy(y if way == "exact" else y.float(), t)
        loss.backward()
        found[way] = [loss.detach(), *(a.grad for a in (x, u, c))]
    for ours, plain, exact in zip(*(found[w] for w in ("parts", "plain", "exact")), strict=True):
        assert (ours - exact).norm() <= 1.1 * (plain - exact).norm() + 1e-5 * exact.norm()


def test_autocast_computes_in_its_dtype() -> None:
    model = adapted("llama").train()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**batch()).loss
        with fused_loss(model) as how:
            loss = model(**batch()).loss
    assert how.kernel == "parts" and loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-3)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_kernel_of_the_parts_has_the_gradients_of_the_formula() -> None:
    torch.manual_seed(0)
    h, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((11, 5), (30, 5), (30,)))
    t = torch.randint(0, 30, (11,))
    for trained in range(8):
        found = []
        for way in (True, False):
            given = [
                a.clone().requires_grad_(bool(trained >> i & 1)) for i, a in enumerate((h, w, b))
            ]
            plain = functional.cross_entropy(functional.linear(*given), t, reduction="sum")
            loss = parts.with_sum(*given, t) if way else plain
            (3 * loss).backward() if trained else None
            found.append([loss.detach(), *(a.grad for a in given)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        x = h.requires_grad_()
        torch.autograd.grad(parts.with_sum(x, w, b, t), x, create_graph=True)


def test_rows_without_a_label_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(
        parts.KERNELS, BEST, lambda h, w, b, t: seen.append(len(h)) or parts.with_sum(h, w, b, t)
    )
    h, w, labels = torch.randn(2, 5, 4), torch.randn(9, 4), torch.full((2, 5), -100)
    labels[0, 2] = labels[1, 4] = 3
    loss, _ = parts.loss_of(h, w, None, labels)
    want = functional.cross_entropy((h @ w.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, want)
    assert seen == [2]
    nothing = torch.full((2, 5), -100)
    loss, _ = parts.loss_of(h.requires_grad_(), w, None, nothing, count=7)
    loss.backward()
    assert loss == 0 and not h.grad.any() and seen == [2]
    assert parts.loss_of(h, w, None, nothing)[0].isnan()  # as of cross_entropy


def test_steps_of_several_batches_are_exact() -> None:
    model = adapted("llama").train()
    whole = batch()
    count = int((whole["labels"][:, 1:] != -100).sum())
    found = []
    for pieces in ([slice(0, 3)], [slice(0, 1), slice(1, 3)]):
        model.zero_grad()
        with fused_loss(model):
            for rows in pieces:
                piece = {key: tensor[rows] for key, tensor in whole.items()}
                model(**piece, num_items_in_batch=count).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_older_torch_has_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "linear_cross_entropy", raising=False)
    _, how = both(adapted("llama"), **batch())
    assert how.kernel == "parts"


def test_labels_that_are_shifted_already() -> None:
    model = adapted("llama")
    labels = functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    out, how = both(model, **batch(), shift_labels=labels)
    assert how and out.logits is None


def test_liger_computes_on_cuda_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand(nn.Module):
        """With the signature of liger-kernel's own."""

        def __init__(self, reduction: str = "mean") -> None:
            super().__init__()
            self.reduction = reduction

        def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Any) -> Tensor:
            y = functional.linear(_input, lin_weight, bias)
            return functional.cross_entropy(y, target, reduction=self.reduction)

    module = types.ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Stand  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(parts, "has_liger", lambda: True)
    cuda = torch.device("cuda")
    assert parts.kernel_for(cuda, torch.bfloat16) == "liger"
    assert parts.kernel_for(torch.device("cpu"), torch.float32) == BEST
    choose = parts.kernel_for
    monkeypatch.setattr(parts, "kernel_for", lambda _, dtype: choose(cuda, dtype))
    out, how = both(adapted("llama"), **batch())
    assert how.kernel == "liger" and "liger" in str(how) and out.logits is None


@pytest.mark.parametrize(
    ("rows", "words"), [(1, 5), (2, 5), (600, 50000), (1024, 4096), (9, 10**6)]
)
def test_parts_are_at_least_two_and_none_too_small(rows: int, words: int) -> None:
    part = parts.rows_of(rows, words)
    assert 1 <= part <= max(1, (rows + 1) // 2)
    assert part * words * 4 <= parts.BYTES or part <= parts.ROWS
