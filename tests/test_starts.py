"""Starts that data or a quantiser decide: PEFT's numbers, and the base weight untouched."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftwork
from graftwork import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    preprocess_corda,
    preprocess_loraga,
)
from graftwork.engine.site import as_factors
from graftwork.errors import FileError, PeftWarning, StateError, TrainingError
from graftwork.inits.loftq import NF4, int8, nf4
from graftwork.testing.bench import shake
from tiny import build, run

TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
SENTENCES = torch.randint(3, 64, (6, 1, 40), generator=torch.Generator().manual_seed(0))
BATCH = torch.randint(3, 64, (4, 30), generator=torch.Generator().manual_seed(1))
quiet = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real peft; its CorDA needs a package that it does not ask for."""
    stand_in: Any = SimpleNamespace(dataclass=dataclasses.dataclass)
    monkeypatch.setitem(sys.modules, "attr", stand_in)
    return pytest.importorskip("peft", reason="the real peft is the oracle")


def config(library: Any, name: str, how: str, **options: Any) -> Any:
    return library.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS[name], init_lora_weights=how, **options
    )


def same_tensors(library: Any, theirs: nn.Module, ours: nn.Module) -> None:
    want, got = library.get_peft_model_state_dict(theirs), get_peft_model_state_dict(ours)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=name)


def passes(model: nn.Module) -> Any:
    def train_step() -> None:
        torch.manual_seed(2)  # of dropout
        for _ in range(2):
            model(input_ids=BATCH, labels=BATCH).loss.backward()

    return train_step


def sentences(model: nn.Module) -> Any:
    return lambda: [model(input_ids=s) for s in SENTENCES]


def prepare(how: str, model: nn.Module, wishes: Any, **options: Any) -> None:
    if how == "corda":
        preprocess_corda(model, wishes, sentences(model), **options)
    else:
        preprocess_loraga(model, wishes, passes(model), **options)


# -- CorDA and LoRA-GA


@quiet
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(name: str, method: str, peft: Any) -> None:
    from peft.tuners.lora.config import CordaConfig as Theirs
    from peft.tuners.lora.corda import preprocess_corda as prepare_theirs

    theirs, ours = build(name), build(name)
    wishes = config(peft, name, "corda", corda_config=Theirs(corda_method=method))
    prepare_theirs(theirs, wishes, sentences(theirs))
    mine = config(graftwork, name, "corda", corda_config=CordaConfig(corda_method=method))
    preprocess_corda(ours, mine, sentences(ours))
    same_tensors(peft, peft.get_peft_model(theirs, wishes), get_peft_model(ours, mine))


@quiet
@pytest.mark.parametrize(
    ("name", "direction", "scale"),
    [
        ("llama", "ArB2r", "stable"),  # peft scales by the inputs of GPT-2's Conv1D
        *[("llama", d, s) for d, s in [("A2rBr", "weight_svd"), ("ArBr", "gd_scale")]],
        *[("gpt2", d, s) for d, s in [("ArB2r", "weight_svd"), ("A2rBr", "unit")]],
    ],
)
def test_lora_ga_is_pefts(
    name: str, direction: str, scale: str, peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # peft draws its approximate SVDs from the program's generator; ours can be repeated
    monkeypatch.setattr(torch, "svd_lowrank", seeded(torch.svd_lowrank))
    options = {"direction": direction, "scale": scale}
    theirs, ours = build(name), build(name)
    wishes = config(peft, name, "lora_ga", lora_ga_config=peft.LoraGAConfig(**options))
    peft.preprocess_loraga(theirs, wishes, passes(theirs))
    mine = config(graftwork, name, "lora_ga", lora_ga_config=LoraGAConfig(**options))
    preprocess_loraga(ours, mine, passes(ours))
    same_tensors(peft, peft.get_peft_model(theirs, wishes), get_peft_model(ours, mine))


def seeded(svd: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return svd(*args, **options)

    return call


def test_a_random_choice_of_directions_is_the_same_each_time() -> None:
    wishes = config(graftwork, "llama", "lora_ga", lora_ga_config={"direction": "random"})
    states = []
    for seed in (0, 1):
        model = build("llama")
        prepare("lora_ga", model, wishes)
        torch.manual_seed(seed)
        states.append(get_peft_model_state_dict(get_peft_model(model, wishes)))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.fault("C14")
@quiet
@pytest.mark.parametrize("how", ["corda", "lora_ga"])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_base_model_stays_as_it_is(how: str, more: dict[str, Any], tmp_path: Path) -> None:
    """It begins as the base, gives the base back, and loads without the data."""
    wishes, base = config(graftwork, "llama", how, **more), build("llama")
    weights, modes = copy.deepcopy(base.state_dict()), base.training
    grads = [p.requires_grad for p in base.parameters()]
    before = run(base, "llama")
    prepare(how, base, wishes)
    assert [p.requires_grad for p in base.parameters()] == grads and base.training == modes
    assert all(p.grad is None for p in base.parameters())
    model = get_peft_model(base, wishes).eval()
    torch.testing.assert_close(run(model, "llama"), before, rtol=1e-4, atol=1e-5)
    assert max(t.abs().max() for n, t in get_peft_model_state_dict(model).items() if "_B" in n) > 0
    shake(model)
    after = run(model, "llama")
    assert (after - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), before)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(again, "llama"), after)
    start_of(tmp_path).unlink()  # as in a folder of PEFT's
    with pytest.raises(StateError, match=f"init_lora_weights='{how}' starts from data"):
        PeftModel.from_pretrained(build("llama"), tmp_path)
    other = build("llama")
    prepare(how, other, wishes)
    again = PeftModel.from_pretrained(other, tmp_path)
    torch.testing.assert_close(run(again, "llama"), after, rtol=1e-4, atol=1e-4)
    plain = model.unload()
    assert all(torch.equal(weights[name], t) for name, t in plain.state_dict().items())


def start_of(folder: Path) -> Path:
    (found,) = folder.glob("graftwork_start-*.safetensors")
    return found


@quiet
@pytest.mark.parametrize("how", ["corda", "lora_ga"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_start_stays_with_its_adapter(
    how: str, name: str, peft: Any, tmp_path: Path
) -> None:
    """PEFT's files are as ever; ours load again, into other names and other starts too."""
    wishes, base = config(graftwork, name, how), build(name)
    prepare(how, base, wishes)
    model = get_peft_model(base, wishes).eval()
    shake(model)
    state, after = get_peft_model_state_dict(model), run(model, name)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(state)
    plainly = peft.LoraConfig.from_pretrained(str(tmp_path))
    plainly.init_lora_weights = True  # else it wants the data
    theirs = peft.PeftModel.from_pretrained(build(name), str(tmp_path), config=plainly)
    read = peft.get_peft_model_state_dict(theirs)
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())

    other = build(name)  # whose own data say something else
    preprocess(how, other, wishes, (BATCH + 9) % 61 + 3)
    resumed = get_peft_model(other, wishes).eval()
    assert not torch.equal(run(resumed, name), after)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(run(resumed, name), after)
    resumed.save_pretrained(tmp_path / "again")
    assert start_of(tmp_path / "again").read_bytes() == start_of(tmp_path).read_bytes()
    assert start_of(tmp_path / "again").name == start_of(tmp_path).name

    resumed.add_adapter("plain", LoraConfig(target_modules=TARGETS[name]))
    for selected, folder in (("plain", tmp_path / "again" / "plain"), ("default", tmp_path)):
        resumed.save_pretrained(tmp_path / "again", selected_adapters=[selected])
        assert len(list(folder.glob("graftwork_start-*"))) == (selected == "default")
    resumed.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="any")
    assert not list(tmp_path.glob("graftwork_start-*")), "a plain LoRA has no start"


def preprocess(how: str, model: nn.Module, wishes: Any, ids: Tensor) -> None:
    if how == "corda":
        preprocess_corda(model, wishes, lambda: model(input_ids=ids))
    else:
        preprocess_loraga(model, wishes, lambda: model(input_ids=ids, labels=ids).loss.backward())


@quiet
def test_a_saved_start_follows_renamed_layers(tmp_path: Path) -> None:
    def net(name: str) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict({name: nn.Linear(8, 6)}))

    x = torch.randn(5, 8)
    wishes = LoraConfig(r=2, target_modules=["old"], init_lora_weights="corda")
    base = net("old")
    preprocess_corda(base, wishes, lambda: base(x))
    model = get_peft_model(base, wishes)
    model.save_pretrained(tmp_path)
    here = dataclasses.replace(wishes, target_modules=["new"])
    again = PeftModel.from_pretrained(
        net("new"), tmp_path, config=here, key_mapping={"^old": "new"}
    )
    assert torch.equal(again(x), model(x))


@quiet
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    wishes, base = config(graftwork, "llama", "corda"), build("llama")
    prepare("corda", base, wishes)
    model = get_peft_model(base, wishes).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    start = start_of(tmp_path)
    good, want = load_file(start), run(model, "llama")
    first = next(iter(good))
    assert len(good) == 2 * len(model.base_model.hosts())

    def load(**options: Any) -> Any:
        other = build("llama")
        before = {name: t.clone() for name, t in other.state_dict().items()}
        try:
            return PeftModel.from_pretrained(other, tmp_path, **options)
        except (graftwork.FileError, StateError):
            assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())
            raise

    save_file({**good, first: torch.zeros(3, 32)}, start)
    with pytest.raises(
        graftwork.FileError, match=r"(?s)the start in .* with another shape"
    ) as told:
        load()
    assert f"{first}: (3, 32) in the file" in str(told.value)
    save_file({**good, "base_model.model.model.embed_tokens.weight": torch.zeros(64, 32)}, start)
    with pytest.raises(graftwork.FileError, match="1 in the file, but not in the adapter"):
        load()
    with pytest.warns(PeftWarning, match="Those tensors did not take effect"):
        assert torch.equal(run(load(strict="warn"), "llama"), want)
    save_file({key: tensor for key, tensor in good.items() if key != first}, start)
    with pytest.raises(graftwork.FileError, match=f"(?s)1 missing in the file.*{first}"):
        load()
    with (
        pytest.warns(PeftWarning, match="missing in the file"),
        pytest.raises(StateError, match="starts from data, and nothing was noted at"),
    ):
        load(strict="warn")
    start.write_bytes(b"no tensors at all")
    with pytest.raises(graftwork.FileError, match="is damaged or no safetensors file"):
        load()
    save_file(good, start)
    weights = tmp_path / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        note = file.metadata()["graftwork"].replace(start.name, f"../{tmp_path.name}/{start.name}")
    save_file(load_file(weights), weights, {"format": "pt", "graftwork": note})
    with pytest.raises(StateError, match="nothing was noted at"):  # no other folder is looked into
        load()


@quiet
@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_plain_lora_of_twice_the_rank_needs_no_data(how: str, peft: Any, tmp_path: Path) -> None:
    wishes, base = config(graftwork, "llama", how), build("llama")
    prepare(how, base, wishes)
    model = get_peft_model(base, wishes).eval()
    shake(model)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="any")
    for library in (peft, graftwork):
        loaded = library.PeftModel.from_pretrained(build("llama"), str(tmp_path)).eval()
        torch.testing.assert_close(run(loaded, "llama"), run(model, "llama"), rtol=1e-4, atol=1e-4)


@quiet
@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_file_of_pefts_means_the_same(how: str, peft: Any, tmp_path: Path) -> None:
    """Trained beside PEFT's changed base weight, loaded beside the true one."""
    from peft.tuners.lora.config import CordaConfig as Theirs
    from peft.tuners.lora.corda import preprocess_corda as prepare_theirs

    theirs = build("llama")
    if how == "corda":
        wishes = config(peft, "llama", how, corda_config=Theirs())
        prepare_theirs(theirs, wishes, sentences(theirs))
    else:
        wishes = config(peft, "llama", how, lora_ga_config=peft.LoraGAConfig())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "svd_lowrank", seeded(torch.svd_lowrank))
            peft.preprocess_loraga(theirs, wishes, passes(theirs))
            theirs = peft.get_peft_model(theirs, wishes)
    if how == "corda":
        theirs = peft.get_peft_model(theirs, wishes)
    theirs.eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = build("llama")
    prepare(how, ours, config(graftwork, "llama", how))
    loaded = PeftModel.from_pretrained(ours, tmp_path)
    torch.testing.assert_close(run(loaded, "llama"), run(theirs, "llama"), rtol=1e-4, atol=1e-4)


@quiet
def test_caches_spare_the_data_and_are_pefts(peft: Any, tmp_path: Path) -> None:
    from peft.tuners.lora.config import CordaConfig as Theirs
    from peft.tuners.lora.corda import preprocess_corda as prepare_theirs

    files = {n: str(tmp_path / "new" / f"{n}.pt") for n in ("cache_file", "covariance_file")}
    wishes, first = config(peft, "llama", "corda", corda_config=Theirs(**files)), build("llama")
    prepare_theirs(first, wishes, sentences(first))
    want = get_peft_model_state_dict(peft_free(first, "corda"))
    for used in files:
        mine = config(graftwork, "llama", "corda", corda_config={used: files[used]})
        model = build("llama")
        preprocess_corda(model, mine)
        got = get_peft_model_state_dict(get_peft_model(model, mine))
        assert all(torch.allclose(got[n], want[n], atol=1e-5) for n in want), used
    gradients = str(tmp_path / "gradients.pt")
    ga = config(graftwork, "llama", "lora_ga")
    states = []
    for _ in range(2):  # the second time from the file
        model = build("llama")
        step = passes(model) if not states else lambda: None
        preprocess_loraga(model, ga, step, gradients)
        states.append(get_peft_model_state_dict(get_peft_model(model, ga)))
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    theirs = build("llama")
    options = config(peft, "llama", "lora_ga", lora_ga_config=peft.LoraGAConfig())
    peft.preprocess_loraga(theirs, options, passes(theirs), gradients)


def peft_free(model: nn.Module, how: str) -> nn.Module:
    """A model of ours that starts as one that PEFT has prepared would."""
    wishes, ours = config(graftwork, "llama", how), build("llama")
    prepare(how, ours, wishes)
    return get_peft_model(ours, wishes)


def test_another_model_may_be_watched() -> None:
    wishes, model = config(graftwork, "llama", "corda"), build("llama")
    other = copy.deepcopy(model)
    preprocess_corda(model, wishes, sentences(other), hooked_model=other)
    got = get_peft_model_state_dict(get_peft_model(model, wishes))
    want = get_peft_model_state_dict(peft_free(model, "corda"))
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("how", ["corda", "lora_ga", "eva"])
def test_other_layers_start_plainly_and_it_is_said(how: str) -> None:
    wishes = LoraConfig(r=4, target_modules=["lin0", "conv1", "emb"], init_lora_weights=how)
    model = build("plain")
    ids = torch.randint(0, 10, (8, 6))
    if how == "corda":
        preprocess_corda(model, wishes, lambda: model(ids))
    elif how == "lora_ga":
        preprocess_loraga(model, wishes, lambda: model(ids).square().mean().backward())
    before = run(model, "plain")
    if how == "eva":
        model = get_peft_model(model, wishes)
        with pytest.warns(PeftWarning, match=r"EVA says nothing about \['conv1', 'emb'\]"):
            graftwork.initialize_lora_eva_weights(
                model, [ids], forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
            )  # fmt: skip
    else:
        with pytest.warns(PeftWarning, match=r"no meaning at (conv1 Conv1d|emb Embedding)\(") as w:
            model = get_peft_model(model, wishes)
        assert {str(x.message).split()[5] for x in w} == {"conv1", "emb"}
    torch.testing.assert_close(run(model, "plain"), before, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_with_data_is_told(tmp_path: Path) -> None:
    model = build("llama")
    corda, ga = (config(graftwork, "llama", how) for how in ("corda", "lora_ga"))
    with pytest.raises(StateError, match=r"Call preprocess_corda\(model, config, run_model\) on"):
        get_peft_model(model, corda)
    with pytest.raises(StateError, match=r"Call preprocess_loraga\(model, config, train_step\)"):
        get_peft_model(model, ga)
    with pytest.raises(ValueError, match="has init_lora_weights=True, so what is computed here"):
        preprocess_corda(model, LoraConfig(target_modules=["q_proj"]), sentences(model))
    with pytest.raises(ValueError, match="CorDA needs data: give run_model"):
        preprocess_corda(model, corda)
    with pytest.raises(StateError, match=r"no input reached model.layers.0.self_attn.q_proj"):
        preprocess_corda(model, corda, lambda: None)
    with pytest.raises(StateError, match=r"no gradient reached the weight of model.layers.0"):
        preprocess_loraga(model, ga, lambda: None)
    convolutions = LoraConfig(target_modules=["conv1"], init_lora_weights="corda")
    with pytest.raises(ValueError, match=r"none of \['conv1'\] is a linear layer or a Conv1D"):
        preprocess_corda(build("plain"), convolutions, lambda: None)
    prepare("corda", model, corda)
    with pytest.raises(StateError, match=r"was computed for rank 4 at .* has r=3 there"):
        get_peft_model(model, dataclasses.replace(corda, r=3))
    with pytest.raises(ValueError, match=r"LoRA-GA takes 2 r = 34 directions, and .* use r<=16"):
        prepare("lora_ga", model, dataclasses.replace(ga, r=17))
    with pytest.raises(ValueError, match="r=40 is more than the 32 directions of"):
        prepare("corda", model, dataclasses.replace(corda, r=40))
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"inputs of model.layers.1.self_attn.q_proj are not fin"):
        prepare("corda", model, corda)
    assert not any(m._forward_hooks for m in model.modules()), "nothing is left at the model"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EvaConfig(rho=0.5), "rho=0.5 is not at least 1"),
        (lambda: EvaConfig(tau=1.5), "tau=1.5 is not between 0 and 1"),
        (lambda: CordaConfig(corda_method="ipn"), "did you mean 'ipm'"),
        (lambda: LoraGAConfig(direction="ArB"), "did you mean 'ArBr'"),
        (lambda: LoraGAConfig(scale="stabel"), "did you mean 'stable'"),
        (lambda: LoraGAConfig(stable_gamma=0), "stable_gamma=0 must be a number above zero"),
        (lambda: LoftQConfig(loftq_bits=3), r"loftq_bits=3 is not known; it is one of \[4, 8\]"),
        (lambda: LoftQConfig(loftq_iter=0), "loftq_iter must be at least 1"),
    ],
)
def test_options_are_checked(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_options_have_pefts_names_and_defaults(peft: Any) -> None:
    from peft.tuners.lora.config import CordaConfig as Theirs

    pairs = [(CordaConfig, Theirs)]
    pairs += [(c, getattr(peft, c.__name__)) for c in (EvaConfig, LoraGAConfig, LoftQConfig)]
    for ours, theirs in pairs:
        assert dataclasses.asdict(ours()) == dataclasses.asdict(theirs()), ours.__name__


# -- EVA

MASK = torch.ones(4, 30, dtype=torch.long)
MASK[0, 20:] = 0
LABELS = BATCH.clone()
LABELS[1, :10] = -100
DATA: list[dict[str, Tensor]] = [
    {"input_ids": (BATCH + 7 * i) % 61 + 3, "attention_mask": MASK, "labels": LABELS}
    for i in range(3)
]


@quiet
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [{}, {"rho": 1.0}, {"adjust_scaling_factors": False}, {"use_label_mask": False}]
)
def test_eva_is_pefts(name: str, options: dict[str, Any], peft: Any, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {TARGETS[name][0]: 6}}
    wishes = config(peft, name, "eva", eva_config=peft.EvaConfig(**options), **patterns)
    theirs = peft.get_peft_model(build(name), wishes)
    peft.initialize_lora_eva_weights(theirs, DATA, show_progress_bar=False)
    wishes = config(graftwork, name, "eva", eva_config=EvaConfig(**options), **patterns)
    ours = get_peft_model(build(name), wishes).eval()
    before = run(ours, name)
    graftwork.initialize_lora_eva_weights(ours, DATA)
    same_tensors(peft, theirs, ours)
    torch.testing.assert_close(run(ours, name), before)
    for field in ("rank_pattern", "alpha_pattern"):
        assert getattr(ours.peft_config["default"], field) == getattr(
            theirs.peft_config["default"], field
        )
    want = peft.tuners.lora.get_eva_state_dict(theirs, DATA, show_progress_bar=False)
    assert list(graftwork.get_eva_state_dict(ours, DATA)) == list(want)
    trained = [p.shape for p in theirs.parameters() if p.requires_grad]
    assert sorted(trained) == sorted(p.shape for p in ours.parameters() if p.requires_grad)
    shake(ours)
    ours.save_pretrained(tmp_path)
    for library in (peft, graftwork):
        loaded = library.PeftModel.from_pretrained(build(name), str(tmp_path)).eval()
        torch.testing.assert_close(run(loaded, name), run(ours, name), rtol=1e-4, atol=1e-5)


@quiet
def test_a_layer_that_gets_no_rank_loses_its_adapter(peft: Any, tmp_path: Path) -> None:
    options = {"r": 1, "target_modules": "all-linear", "init_lora_weights": "eva"}
    model = get_peft_model(build("llama"), LoraConfig(**options, eva_config=EvaConfig(rho=6.0)))
    before = len(model.base_model.hosts())
    graftwork.initialize_lora_eva_weights(model, DATA)
    left, wishes = model.base_model.hosts(), model.peft_config["default"]
    assert 0 < len(left) < before
    ranks = {path: host.parts_of("default")[0][1].rank() for path, host in left.items()}
    assert sum(ranks.values()) == before and max(ranks.values()) <= 6
    assert {p: r for p, r in ranks.items() if r != 1} == wishes.rank_pattern
    shake(model)
    model.save_pretrained(tmp_path)
    for library in (peft, graftwork):
        loaded = library.PeftModel.from_pretrained(build("llama"), str(tmp_path)).eval()
        assert sum("lora_A" in n for n, _ in loaded.named_parameters()) in (0, len(left))
        torch.testing.assert_close(
            run(loaded, "llama"), run(model.eval(), "llama"), rtol=1e-4, atol=1e-5
        )


def test_eva_before_the_adapter_and_beside_others() -> None:
    wishes, base = config(graftwork, "llama", "eva"), build("llama")
    grads = [p.requires_grad for p in base.parameters()]
    found = graftwork.get_eva_state_dict(base, DATA, wishes)
    assert next(iter(found)) == "model.layers.0.self_attn.q_proj"
    model = get_peft_model(base, LoraConfig(target_modules=["o_proj"]), "first")
    model.add_adapter("second", wishes)
    model.set_adapter("second")
    graftwork.initialize_lora_eva_weights(model, eva_state_dict=found, adapter_name="second")
    assert model.active_adapters == ["second"] and set(model.peft_config) == {"first", "second"}
    assert {n.split(".lora_")[1][0] for n in get_peft_model_state_dict(model, None, "second")} == {
        *"AB"
    }
    assert [p.requires_grad for p in model.unload().parameters()] == grads


def test_training_that_eva_never_came_to_is_told_once(tmp_path: Path) -> None:
    ids = torch.randint(0, 10, (8, 6))
    wishes = LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights="eva")
    rows: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}

    def steps(model: nn.Module, count: int = 2) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(count):
            model(ids).square().mean().backward()
            optimizer.step()

    text = r"initialize_lora_eva_weights was not called, so its 2 layers, such as lin0"
    plain = get_peft_model(build("plain"), wishes)
    with pytest.warns(PeftWarning, match=text) as told:
        steps(plain, 3)
    assert len(told) == 1
    steps(plain)  # any other warning would be an error

    started = get_peft_model(build("plain"), wishes)
    graftwork.initialize_lora_eva_weights(started, [ids], forward_fn=lambda m, x: m(x), **rows)
    steps(started)
    started.save_pretrained(tmp_path)
    steps(PeftModel.from_pretrained(build("plain"), tmp_path, is_trainable=True))
    filled = get_peft_model(build("plain"), wishes)
    graftwork.set_peft_model_state_dict(filled, get_peft_model_state_dict(plain))
    steps(filled)

    beside = get_peft_model(build("plain"), LoraConfig(target_modules=["lin0"]), "other")
    beside.add_adapter("default", wishes)
    steps(beside)  # it does not train
    beside.set_adapter("default")
    with pytest.warns(PeftWarning, match=text):
        steps(beside)


def test_equal_inputs_are_whitened_once() -> None:
    """(PEFT whitens the directions that layers share once for each of them.)"""
    wishes = config(graftwork, "llama", "eva", eva_config=EvaConfig(whiten=True, rho=1.0))
    white = graftwork.get_eva_state_dict(build("llama"), DATA, wishes)
    q, k = (white[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert torch.equal(q[: len(k)], k[: len(q)])


def test_rows_are_chosen_by_the_users_functions() -> None:
    wishes = LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights="eva")
    model, seen = get_peft_model(build("plain"), wishes), []

    def rows(given: Any, hint: Any, name: str) -> Tensor:
        seen.append((hint, name))
        return given[0].flatten(0, -2)

    graftwork.initialize_lora_eva_weights(
        model,
        [torch.randint(0, 10, (8, 6))],
        forward_fn=lambda m, x: m(x),
        prepare_model_inputs_fn=lambda batch, c: c.eva_config.tau,
        prepare_layer_inputs_fn={"base_model.model.lin0": rows, "lin1": rows},
    )
    assert set(seen) == {(0.99, "base_model.model.lin0"), (0.99, "base_model.model.lin1")}


def test_what_is_wrong_with_eva_is_told() -> None:
    start, data = graftwork.initialize_lora_eva_weights, [torch.randint(0, 10, (2, 6))]
    take: Any = {
        "forward_fn": lambda m, x: m(x),
        "prepare_model_inputs_fn": None,
        "prepare_layer_inputs_fn": None,
    }

    def model(**options: Any) -> Any:
        return get_peft_model(
            build("plain"),
            LoraConfig(target_modules=["lin0", "lin1"], init_lora_weights="eva", **options),
        )

    with pytest.raises(StateError, match="has no adapters"):
        start(build("plain"), data)
    with pytest.raises(ValueError, match="give peft_config, or a model that has the adapter"):
        graftwork.get_eva_state_dict(build("plain"), data)
    with pytest.raises(ValueError, match="give dataloader, or the eva_state_dict"):
        start(model())
    with pytest.raises(ValueError, match="the dataloader is empty"):
        start(model(), [], **take)
    with pytest.raises(TypeError, match="the dataloader gives a Tensor, not a dictionary"):
        start(model(), data, forward_fn=take["forward_fn"])
    with pytest.raises(ValueError, match=r"no batch has as many rows as lin0 may .*\(16, its rank"):
        start(model(), data, **take)
    with pytest.raises(ValueError, match="lin0 is not called by forward_fn"):
        start(model(), data, **{**take, "forward_fn": lambda m, x: None})
    with pytest.raises(ValueError, match="prepare_layer_inputs_fn names lin7, which is none"):
        start(model(), data, **{**take, "prepare_layer_inputs_fn": {"lin7": None}})
    noise = (torch.randn(64, 16) for _ in range(1000))
    only = {**take, "forward_fn": lambda m, x: m.base_model.model.lin0(next(noise))}
    one = get_peft_model(
        build("plain"), LoraConfig(r=4, target_modules=["lin0"], init_lora_weights="eva")
    )
    one.peft_config["default"].eva_config = EvaConfig(tau=1.0)
    with pytest.raises(TrainingError, match=r"after 100 passes .* of lin0 still turn"):
        start(one, data, **only)
    with pytest.raises(ValueError, match="eva_state_dict has lin9, where 'default' has no LoRA"):
        start(model(), eva_state_dict={"lin9": torch.zeros(2, 16)})
    with pytest.raises(ValueError, match="has init_lora_weights=True; EVA is for an adapter"):
        start(get_peft_model(build("plain"), LoraConfig(target_modules=["lin0"])), data)
    two = model()
    two.add_adapter("b", LoraConfig(target_modules=["lin0"]))
    two.base_model.set_adapter(["default", "b"])
    with pytest.raises(StateError, match=r"one active adapter, not \['default', 'b'\]"):
        start(two, data)


# -- LoftQ


@pytest.mark.parametrize("shape", [(32, 64), (7, 13), (5,), (4, 3, 2)])
def test_nf4_takes_the_nearest_of_its_values_block_by_block(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = nf4(w)
    for block, near in zip(w.flatten().split(64), got.flatten().split(64), strict=True):
        code = torch.tensor(NF4) * block.abs().max()
        best = code[(block[:, None] - code).abs().argmin(1)]
        torch.testing.assert_close(near, best)
    assert got.shape == w.shape and torch.equal(nf4(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_int8_takes_the_nearest_of_its_values_row_by_row() -> None:
    w = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((int8(w) - w).abs() <= step / 2 + 1e-7).all()
    torch.testing.assert_close(int8(w) / step, (int8(w) / step).round(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_quantised_model_gets_back_what_it_lost(sharded: bool, tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == sharded
    want = run(base, "llama")
    quantised = build("llama")
    with torch.no_grad():
        for name, p in quantised.named_parameters():
            if name.endswith(("q_proj.weight", "down_proj.weight")):
                p.copy_(nf4(p))
    lost = (run(quantised, "llama") - want).abs().mean()
    wishes = LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj", "down_proj", "o_proj"])
    model, seen = get_peft_model(quantised, wishes).eval(), []
    graftwork.replace_lora_weights_loftq(model, str(tmp_path))
    assert (run(model, "llama") - want).abs().mean() < lost / 2
    state = get_peft_model_state_dict(model)
    assert not any(t.any() for n, t in state.items() if "o_proj.lora_B" in n), "nothing was lost"
    kept = {n: t.clone() for n, t in state.items()}
    shake(model)
    shaken = {n: t.clone() for n, t in get_peft_model_state_dict(model).items()}

    def callback(whole: nn.Module, path: str) -> bool:
        seen.append(path)
        return "layers.0" in path

    graftwork.replace_lora_weights_loftq(model, str(tmp_path), callback=callback)
    assert len(seen) == 4
    for name, tensor in get_peft_model_state_dict(model).items():
        wanted = kept if "layers.0" in name and "o_proj" not in name else shaken
        torch.testing.assert_close(tensor, wanted[name])


def test_what_is_wrong_with_the_originals_is_told(tmp_path: Path) -> None:
    model = get_peft_model(build("plain"), LoraConfig(target_modules=["lin0"]))
    put_back = graftwork.replace_lora_weights_loftq
    with pytest.raises(graftwork.FileError, match="give model_path: this model does not say"):
        put_back(model)
    with pytest.raises(graftwork.FileError, match=r"has no model.safetensors on this machine"):
        put_back(model, str(tmp_path))
    save_file({"lin1.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(graftwork.FileError, match=r"has no weight lin0.weight; is it this model"):
        put_back(model, str(tmp_path / "model.safetensors"))
    save_file({"lin0.weight": build("plain").lin0.weight}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="LoftQ has nothing to make up for; give a quantised"):
        put_back(model, str(tmp_path))


@quiet
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"]), ("plain", ["lin0", "conv2"])],
)
def test_loftq_is_a_quantised_base_with_what_it_lost(
    name: str, targets: list[str], bits: int, rounds: int, tmp_path: Path
) -> None:
    """The same as a plain LoRA beside Q, which PEFT puts in the base weight's place."""
    options: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": targets}
    wishes = LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
    base = build(name)
    want = run(base, name)
    loftq = LoraConfig(**options, init_lora_weights="loftq", loftq_config=wishes)
    model = get_peft_model(base, loftq).eval()
    changed = build(name)
    for path, host in model.base_model.hosts().items():
        part, site = host.parts_of("default")[0][1], host.need_site("lora")
        a, b = as_factors(part.A, part.B, part.lead)
        w, q = site.weight, part.fold(site.weight, None)[0] - part.scale * b @ a
        assert (w - q - part.scale * b @ a).norm() < (w - q).norm() < 0.2 * w.norm()
        if rounds == 1:
            raw = (nf4 if bits == 4 else int8)(site.raw)
            torch.testing.assert_close(q, site.to_matrix(raw), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            changed.get_submodule(path).weight.copy_(site.from_matrix(q))
    beside = get_peft_model(changed, LoraConfig(**options)).eval()
    graftwork.set_peft_model_state_dict(beside, get_peft_model_state_dict(model))
    torch.testing.assert_close(run(model, name), run(beside, name), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, name), want)
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), tmp_path)
    torch.testing.assert_close(run(again, name), run(model, name), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes away a start of full rank"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="any")


def test_an_embedding_is_not_quantised() -> None:
    loftq = LoraConfig(target_modules=["emb"], init_lora_weights="loftq")
    with pytest.warns(PeftWarning, match="'loftq' has no meaning at emb Embedding"):
        model = get_peft_model(build("plain"), loftq)
    torch.testing.assert_close(run(model, "plain"), run(build("plain"), "plain"))


def test_a_file_with_another_start_is_not_read_into_an_adapter(tmp_path: Path) -> None:
    """Its B A stands beside a base from which its start was taken away, or was not."""
    first = get_peft_model(build("llama"), config(graftwork, "llama", "pissa"))
    first.save_pretrained(tmp_path)
    second = get_peft_model(build("llama"), config(graftwork, "llama", True))
    with pytest.raises(FileError, match="init_lora_weights: 'pissa' there, True here"):
        second.load_adapter(tmp_path, "default")
    second.load_adapter(tmp_path, "other")


@pytest.mark.parametrize(
    ("wishes", "where"),
    [
        (graftwork.FourierFTConfig(n_frequency=20), "graftwork.methods.fourierft.positions"),
        (graftwork.WaveFTConfig(n_frequency=20), "graftwork.methods.waveft.positions"),
        (graftwork.PsoftConfig(r=4, psoft_svd="lowrank"), "torch.svd_lowrank"),
    ],
    ids=["fourierft", "waveft", "psoft"],
)
def test_what_is_drawn_from_a_seed_is_kept_beside_the_file(
    wishes: Any, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of torch may draw otherwise; PEFT's file does not change."""
    wishes.target_modules = ["q_proj", "down_proj"]
    model = get_peft_model(build("llama"), wishes).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    module, _, name = where.rpartition(".")
    drawn = getattr(importlib.import_module(module), name)

    def otherwise(*args: Any, **kwargs: Any) -> Any:
        found = drawn(*args, **kwargs)
        return found.flip(0) if isinstance(found, Tensor) else [-found[0], *found[1:]]

    monkeypatch.setattr(where, otherwise)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(run(again, "llama"), run(model, "llama"))
    start_of(tmp_path).unlink()
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert not torch.equal(run(again, "llama"), run(model, "llama")), "it was drawn alike after all"
