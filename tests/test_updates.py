"""Updates: combined, converted to LoRA, resized, extracted, hot-swapped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from combine import Largest
from graftwork import (
    FileError,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    StateError,
    TrainableTokensConfig,
    VeraConfig,
    extract,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)
from graftwork.testing.bench import shake
from graftwork.updates.factored import Factored, of_dense
from tiny import IDS, build, run

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}


def adapted(*configs: Any, model: str = "llama") -> Any:
    wrapped = get_peft_model(build(model), configs[0], "x").eval()
    for name, config in zip("yz", configs[1:], strict=False):
        wrapped.add_adapter(name, config)
    for name in list(wrapped.peft_config):
        wrapped.set_adapter(name)
        shake(wrapped, seed=ord(name))
    wrapped.set_adapter("x")
    return wrapped


def answer(model: Any, *names: str, kind: str = "llama") -> Tensor:
    with model.using(*names):
        return run(model, kind)


def update(model: Any, name: str) -> dict[str, Tensor]:
    """The dense update of each layer."""
    out = {}
    for path, host in model.base_model.hosts().items():
        for key, part in host.parts_of(name):
            if (site := host.site_of(key)) is not None and part.instead() is None:
                w = site.weight.double()
                part = copy.deepcopy(part).double()
                out[f"{path}.{site.parameter}"] = (part.fold(w, None)[0] - w).detach()
    return out


def combined(
    how: str, weights: list[float], *configs: Any, **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    model = adapted(*configs)
    names = list("xyz")[: len(weights)]
    names = [n if n in model.peft_config else "x" for n in names]
    model.add_weighted_adapter(names, weights, "new", how, **options)
    return model, update(model, "new")


@pytest.mark.fault("E1")
def test_averaging_an_adapter_with_itself_gives_it_back() -> None:
    model, new = combined("linear", [0.5, 0.5], LoraConfig(**LORA))
    want = update(model, "x")
    assert new.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(new[name], want[name], rtol=1e-6, atol=1e-6)
    assert model.peft_config["new"].r == 4, "the rank is that of the update"
    assert model.active_adapters == ["x"]
    torch.testing.assert_close(answer(model, "new"), answer(model, "x"))


@pytest.mark.fault("E1")
def test_differences_and_sums_of_any_methods() -> None:
    configs = [
        LoraConfig(**LORA),
        LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ]
    for weights in ([1.0, -1.0], [0.3, 2.0, -0.7]):
        model, new = combined("linear", weights, *configs)
        names = "xyz"[: len(weights)]
        parts = [update(model, n) for n in names]
        places = {p for part in parts for p in part}
        assert places == set(new)
        for place in places:
            want = sum(
                w * part[place] for w, part in zip(weights, parts, strict=True) if place in part
            )
            torch.testing.assert_close(new[place], want, rtol=1e-5, atol=1e-6)
    model, new = combined("cat", [1.0, -1.0], *configs[:2])
    assert model.peft_config["new"].rank_pattern or model.peft_config["new"].r == 6


def test_the_rank_of_a_sum_can_be_bounded() -> None:
    model, new = combined("svd", [1.0, 1.0], LoraConfig(**LORA), LoraConfig(**{**LORA, "r": 3}))
    whole = {n: update(model, "x")[n] + update(model, "y")[n] for n in new}
    lost = model.add_weighted_adapter(["x", "y"], [1, 1], "two", "svd", svd_rank=2)
    for name, delta in update(model, "two").items():
        u, s, vh = torch.linalg.svd(whole[name], full_matrices=False)
        torch.testing.assert_close(delta, u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-5)
        share = float(s[2:].norm() / s.norm())
        assert lost[name.removesuffix(".weight")] == pytest.approx(share, abs=1e-4)
    model.add_weighted_adapter(["x", "y"], [1, 1], "most", "linear", energy=0.5)
    assert max(row.rank for row in model.adapters() if row.adapter == "most") < 7


def test_pruning_and_ties_act_on_the_update_and_not_on_its_factors() -> None:
    """Splitting the same update otherwise into A and B changes nothing."""
    for how in ("ties", "magnitude_prune", "ties_svd"):
        results = []
        for turned in (False, True):
            model = adapted(LoraConfig(**LORA), LoraConfig(**LORA))
            if turned:
                g = (
                    torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[
                        0
                    ]
                    * 3
                )
                for host in model.base_model.hosts().values():
                    for _, part in host.parts_of("x"):
                        part.A.data, part.B.data = (
                            g @ part.A.data,
                            part.B.data @ torch.linalg.inv(g),
                        )
            model.add_weighted_adapter(["x", "y"], [1.0, 0.5], "new", how, density=0.3)
            results.append(update(model, "new"))
        for name in results[0]:
            torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-4)
        sizes = update(model, "x")
        assert all(results[0][n].norm() < 2 * sizes[n].norm() for n in results[0])
    model, new = combined("ties", [1.0, 1.0], LoraConfig(**LORA), density=1.0)
    for name, delta in update(model, "x").items():
        torch.testing.assert_close(new[name], delta, rtol=1e-4, atol=1e-5)


def test_dare_keeps_the_mean() -> None:
    model = adapted(LoraConfig(**LORA), LoraConfig(**LORA))
    want = update(model, "x")
    torch.manual_seed(0)
    seen: list[dict[str, Tensor]] = []
    for i in range(40):
        model.add_weighted_adapter(["x"], [1.0], f"n{i}", "dare_linear", density=0.5)
        seen.append(update(model, f"n{i}"))
        model.delete_adapter(f"n{i}")
    for name in want:
        mean = torch.stack([s[name] for s in seen]).mean(0)
        assert (mean - want[name]).norm() < 0.35 * want[name].norm()
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "t", "dare_ties", density=0.5)


def test_what_is_trained_as_a_whole_is_combined_too() -> None:
    first = LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    second = LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[5, 7])
    model = adapted(first, second)
    base = build("llama")
    model.add_weighted_adapter(["x", "y"], [0.25, 0.75], "new", "linear")
    host = model.base_model.hosts()["lm_head"]
    x, y, new = (dict(host.parts_of(n))["copy"].module.weight for n in ("x", "y", "new"))
    torch.testing.assert_close(new, 0.25 * x + 0.75 * y)
    tokens = dict(model.base_model.hosts()["model.embed_tokens"].parts_of("new"))[
        "trainable_tokens"
    ]
    assert tokens.indices.tolist() == [3, 5, 7]
    w = base.model.embed_tokens.weight
    old = dict(model.base_model.hosts()["model.embed_tokens"].parts_of("x"))["trainable_tokens"]
    torch.testing.assert_close(tokens.rows[0], 0.25 * old.rows[0] + 0.75 * w[3])


def test_what_is_combined_of_zeros_can_be_trained() -> None:
    """Where both factors are 0, as where a rank is filled up, no step would change anything."""
    first = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    second = LoraConfig(r=3, target_modules=["down_proj", "embed_tokens"])
    model = get_peft_model(build("llama"), first, "x").eval()
    model.add_adapter("y", second)
    before = run(model, "llama")
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "linear")
    model.set_adapter("new")
    assert torch.equal(run(model, "llama"), before)
    model(IDS).logits.square().mean().backward()
    assert model.peft_config["new"].rank_pattern == {}
    learns = [p.grad for n, p in model.named_parameters() if n.endswith("new.lora.B")]
    assert len(learns) == 5 and all(g is not None and (g.norm(dim=0) > 0).all() for g in learns)


EMBEDDING, HEAD = ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]
ROWS = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}
SAVED = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
SHARED = {"ensure_weight_tying": True}


def ends(model: Any, name: str) -> list[Tensor]:
    """The weights at the two ends of the tied one with an adapter."""
    model = copy.deepcopy(model)
    model.set_adapter(name)
    plain = model.merge_and_unload()
    return [plain.model.embed_tokens.weight.detach(), plain.lm_head.weight.detach()]


@pytest.mark.fault("A5")
@pytest.mark.parametrize(
    "options",
    [
        [{"target_modules": HEAD}, ROWS],
        [{"target_modules": HEAD, "trainable_token_indices": [3]}, ROWS],
        [{"target_modules": EMBEDDING, **SHARED}, ROWS],
        [{"target_modules": EMBEDDING, **SHARED, "trainable_token_indices": [3]}, ROWS],
        [{**SAVED, **SHARED}, ROWS],
        [{"target_modules": EMBEDDING, "trainable_token_indices": [3]}],
        [{"target_modules": EMBEDDING, "trainable_token_indices": [3, 5]}, ROWS],
        [{"target_modules": EMBEDDING}, {"target_modules": HEAD}],
    ],
    ids=str,
)
def test_both_ends_of_a_tied_weight_are_combined(options: list[dict[str, Any]]) -> None:
    model = adapted(*(LoraConfig(r=2, **o) for o in options), model="llama_tied")
    names = list(model.peft_config)
    weights = [0.5, -1.5][: len(names)]
    model.add_weighted_adapter(names, weights, "new", "linear")
    base = build("llama_tied").model.embed_tokens.weight.detach()
    each = [ends(model, n) for n in names]
    for i, got in enumerate(ends(model, "new")):
        want = base + sum(w * (one[i] - base) for w, one in zip(weights, each, strict=True))
        torch.testing.assert_close(got, want)


@pytest.mark.fault("A5")
@pytest.mark.parametrize(
    "options",
    [
        [{"target_modules": EMBEDDING}, ROWS],
        [{"target_modules": EMBEDDING, "trainable_token_indices": [3]}, ROWS],
        [{"target_modules": EMBEDDING}, {"target_modules": EMBEDDING, **SHARED}],
        [SAVED, ROWS],
        [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, ROWS],
        [{"target_modules": HEAD}, {**SAVED, **SHARED}],
    ],
    ids=str,
)
def test_one_end_of_a_tied_weight_and_both_are_not_one_adapter(
    options: list[dict[str, Any]],
) -> None:
    model = adapted(*(LoraConfig(r=2, **o) for o in options), model="llama_tied")
    with pytest.raises(StateError, match=r"'x' changes .* alone, and 'y' also the other end"):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "linear")
    assert list(model.peft_config) == ["x", "y"]


@pytest.mark.fault("A5")
def test_an_adapter_that_does_both_itself_is_not_one_lora() -> None:
    model = adapted(LoraConfig(r=2, **SAVED, trainable_token_indices=[3]), model="llama_tied")
    with pytest.raises(StateError, match=r"'x' changes .* alone, and 'x' also the other end"):
        model.add_weighted_adapter(["x"], [1.0], "new", "linear")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"adapters": ["x", "q"]}, "no adapter 'q'"),
        ({"weights": [1.0]}, "a weight for each of 2 adapters, not 1"),
        ({"weights": [1.0, float("nan")]}, "a finite number, not nan"),
        ({"adapter_name": "y"}, "there is an adapter 'y' already"),
        ({"combination_type": "tees"}, "did you mean 'ties'"),
        ({"combination_type": "ties"}, "give density"),
        ({"combination_type": "ties", "density": 1.5}, "give density"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    model = adapted(LoraConfig(**LORA), LoraConfig(**LORA))
    good = {"adapters": ["x", "y"], "weights": [1.0, 1.0], "adapter_name": "new"}
    with pytest.raises(StateError, match=text):
        model.add_weighted_adapter(**{**good, **options})
    assert list(model.peft_config) == ["x", "y"]


@pytest.mark.fault("E2")
def test_rank_64_at_4096_never_makes_the_product() -> None:
    size, r = 4096, 64
    g = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(size, size, bias=False))
    model = get_peft_model(base, LoraConfig(r=r, target_modules=["0"]), "x")
    model.add_adapter("y", LoraConfig(r=r, target_modules=["0"]))
    for host in model.base_model.hosts().values():
        for name in "xy":
            for _, part in host.parts_of(name):
                part.B.data.normal_(generator=g)
    with Largest() as made:
        model.add_weighted_adapter(["x", "y"], [1, -1], "new", "linear")
        model.add_weighted_adapter(["x", "y"], [1, -1], "ties", "ties", density=0.2)
    assert made.size < 4 * size**2


# -- conversion


@pytest.mark.fault("E4")
@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=2, target_modules=["q_proj", "down_proj"]),
        VeraConfig(r=4, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], bias="lora_only"),
    ],
)
def test_any_adapter_becomes_a_lora(config: Any, tmp_path: Path) -> None:
    model = adapted(config)
    done = model.to_lora("x", "l")
    assert done.worst < 1e-4, str(done)
    torch.testing.assert_close(answer(model, "l"), answer(model, "x"), rtol=1e-3, atol=1e-4)
    small = model.to_lora("x", "s", rank=2)
    assert set(small.ranks.values()) == {2} and small.worst >= done.worst
    assert "relative error at most" in str(small)
    with pytest.raises(StateError, match="there is an adapter 's' already"):
        model.to_lora("x", "s")
    model.save_pretrained(tmp_path, selected_adapters=["l"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "l", adapter_name="l")
    torch.testing.assert_close(run(loaded, "llama"), answer(model, "l"))


def test_biases_and_other_layers_become_a_lora_too() -> None:
    for kind, config in (
        ("plain", IA3Config(target_modules=["lin0", "conv2"], feedforward_modules=[])),
        ("plain", LoHaConfig(r=2, target_modules=["conv1", "conv3", "emb"])),
        ("gpt2", LoHaConfig(r=2, target_modules=["c_attn"])),
        ("attention", LoHaConfig(r=2, target_modules=["mha"])),
        ("mixtral", LoHaConfig(r=2, target_parameters=["experts.down_proj"], target_modules=[])),
    ):
        model = adapted(config, model=kind)
        model.to_lora("x", "l")
        want = answer(model, "x", kind=kind)
        torch.testing.assert_close(answer(model, "l", kind=kind), want, rtol=1e-3, atol=1e-4)


@pytest.mark.fault("E4")
def test_an_adapter_gets_another_rank_under_its_name() -> None:
    model = adapted(LoraConfig(**LORA), IA3Config())
    want = answer(model, "x")
    model.set_adapter(["y", "x"])
    done = model.resize_adapter("x", energy=0.999999)
    assert done.worst < 2e-3 and model.active_adapters == ["y", "x"]
    torch.testing.assert_close(answer(model, "x"), want, rtol=1e-2, atol=1e-2)
    model.resize_adapter("x", rank=1)
    assert model.peft_config["x"].r == 1
    with pytest.raises(ValueError, match="give rank= or energy="):
        model.resize_adapter("x")


@pytest.mark.fault("E4")
def test_a_lora_is_extracted_from_a_full_fine_tune() -> None:
    base, tuned = build("llama"), build("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "q_proj" in name or "up_proj" in name or name == "model.norm.weight":
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    want = run(tuned, "llama")
    model, done = extract(base, tuned)
    assert done.worst < 1e-4 and isinstance(model, PeftModel)
    torch.testing.assert_close(run(model, "llama"), want, rtol=1e-3, atol=1e-4)
    assert set(model.peft_config["default"].modules_to_save) == {"model.norm"}
    model, done = extract(build("llama"), tuned, rank=2)
    assert 0.5 < done.worst < 1 and set(done.ranks.values()) == {2}
    with pytest.raises(StateError, match="no matrix differs"):
        extract(build("llama"), build("llama"))
    with pytest.raises(StateError, match="differ in more than the values"):
        extract(build("llama"), build("gpt2"))


def test_factored_updates() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 4, 9, generator=g), torch.randn(3, 7, 4, generator=g)
    u = Factored(a, b)
    torch.testing.assert_close(u.norm().float(), (b @ a).norm())
    small = Factored(torch.cat([a, a], -2), torch.cat([b, b], -1)).compressed()
    assert small.rank == 4
    torch.testing.assert_close(small.b @ small.a, 2 * b @ a, rtol=1e-4, atol=1e-5)
    dense = of_dense(b @ a)
    torch.testing.assert_close(dense.b @ dense.a, b @ a, rtol=1e-4, atol=1e-5)
    wide = torch.randn(1100, 5, generator=g) @ torch.randn(5, 1200, generator=g)
    few = of_dense(wide, rank=5)
    torch.testing.assert_close(few.b @ few.a, wide, rtol=1e-3, atol=1e-3)


# -- hot-swapping


def saved(folder: Path, config: Any, seed: int) -> Tensor:
    model = get_peft_model(build("llama"), config).eval()
    shake(model, seed=seed)
    model.save_pretrained(folder)
    return run(model, "llama")


@pytest.mark.fault("F7")
@pytest.mark.parametrize(
    "config",
    [
        lambda r: LoraConfig(r=r, lora_alpha=3 * r, target_modules=["q_proj", "v_proj"]),
        lambda r: LoraConfig(r=r, use_dora=True, target_modules=["q_proj", "embed_tokens"]),
        lambda r: LoraConfig(r=r, modules_to_save=["lm_head"], use_rslora=r > 4),
        lambda r: IA3Config(),
        lambda r: LoHaConfig(r=3, target_modules=["q_proj"]),
        lambda r: VeraConfig(r=4, target_modules=["q_proj"], projection_prng_key=r),
        lambda r: TrainableTokensConfig(token_indices=[r, r + 1]),
    ],
)
def test_swapping_needs_no_recompilation(config: Any, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "4", config(4), 1), saved(tmp_path / "7", config(7), 2)
    third = saved(tmp_path / "2", config(2), 3)
    model = PeftModel.from_pretrained(build("llama"), tmp_path / "4")
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(run(model, "llama"), first)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.testing.assert_close(run(compiled, "llama"), first)
    frames = counter.frame_count
    for folder, want in (("7", second), ("2", third), ("4", first)):
        assert hotswap_adapter(model, tmp_path / folder, "default").ok
        torch.testing.assert_close(run(compiled, "llama"), want)
    assert counter.frame_count == frames, "it was compiled again"
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "again")
    torch.testing.assert_close(run(again, "llama"), first)
    with pytest.raises(StateError, match="compiled already"):
        compiled2 = build("llama")
        compiled2.compile(backend="eager")
        prepare_model_for_compiled_hotswap(get_peft_model(compiled2, config(4)))


@pytest.mark.fault("F7")
def test_what_cannot_be_swapped_is_said(tmp_path: Path) -> None:
    saved(tmp_path / "large", LoraConfig(r=9, target_modules=["q_proj"]), 1)
    saved(tmp_path / "few", LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]), 1)
    saved(tmp_path / "more", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), 1)
    saved(tmp_path / "dora", LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), 1)
    saved(tmp_path / "ia3", IA3Config(), 1)
    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    shake(model)
    before = run(model, "llama")
    for folder, error, text in (
        ("large", FileError, "there is room for"),
        ("more", FileError, "also sits at"),
        ("dora", StateError, "use_dora: True there"),
        ("ia3", StateError, "of the method IA3"),
    ):
        with pytest.raises(error, match=text):
            model.hotswap_adapter(tmp_path / folder)
        assert torch.equal(run(model, "llama"), before)
    model.hotswap_adapter(tmp_path / "few")
    few = PeftModel.from_pretrained(build("llama"), tmp_path / "few")
    torch.testing.assert_close(run(model, "llama"), run(few, "llama"))
    model.merge_adapter()
    with pytest.raises(StateError, match="is merged"):
        model.hotswap_adapter(tmp_path / "few")
    assert IDS is not None


# -- sizes


@pytest.mark.fault("E2")
def test_no_update_is_ever_multiplied_out() -> None:
    size = 512
    configs = [LoraConfig(r=r, target_modules=["0"]) for r in (8, 12)]
    model = get_peft_model(nn.Sequential(nn.Linear(size, size)), configs[0], "x")
    model.add_adapter("y", configs[1])
    for name in "xy":
        model.set_adapter(name)
        shake(model)
    with Largest() as made:
        for how in ("linear", "cat", "svd", "ties", "magnitude_prune", "dare_linear"):
            model.add_weighted_adapter(["x", "y"], [1, -0.5], how, how, density=0.2)
        model.add_weighted_adapter(["x", "y"], [1, -0.5], "small", "svd", svd_rank=4)
        model.to_lora("x", "lora", rank=4)
        model.resize_adapter("y", energy=0.9)
        model.resize_adapter("x", rank=3)
    assert made.size < 4 * size**2
    with Largest() as made:
        model.add_weighted_adapter(["x", "y"], [1, 1], "dense", "svd", compat="peft")
    assert made.size >= 4 * size**2, "nothing would be noticed"
