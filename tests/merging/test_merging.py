"""Merging into a model's files: the bits of a merge in memory, and nothing lost on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graftwork as g
from graftwork import FileError, MergeError, PeftModel, get_peft_model
from graftwork.cli.app import build as application
from graftwork.merging import Merged, merge, merge_files
from graftwork.merging.shards import SINGLE, Piece, Shard, write
from graftwork.testing.bench import shake
from tiny import build, llama

QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: g.LoraConfig(r=2, target_modules="all-linear"),
    "rslora, patterns": lambda: g.LoraConfig(use_rslora=True, rank_pattern={"v_proj": 3}, **QV),
    "dora": lambda: g.LoraConfig(r=2, use_dora=True, target_modules="all-linear"),
    "pissa": lambda: g.LoraConfig(r=2, init_lora_weights="pissa", **QV),
    "lora and embedding": lambda: g.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "lora and output": lambda: g.LoraConfig(target_modules=["q_proj", "lm_head"]),
    "saved output": lambda: g.LoraConfig(modules_to_save=["lm_head"], **QV),
    "saved block": lambda: g.LoraConfig(modules_to_save=["mlp"], **QV),
    "tokens": lambda: g.LoraConfig(trainable_token_indices=[3, 5], **QV),
    "adalora": lambda: g.AdaLoraConfig(init_r=2, total_step=9, **QV),
    "ia3": lambda: g.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
    "vera": lambda: g.VeraConfig(r=4, save_projection=False, target_modules=["q_proj", "o_proj"]),
    "randlora": lambda: g.RandLoraConfig(r=4, **QV),
    "loha": lambda: g.LoHaConfig(r=2, **QV),
    "lokr": lambda: g.LoKrConfig(r=2, **QV),
    "oft": lambda: g.OFTConfig(r=0, oft_block_size=4, **QV),
    "boft": lambda: g.BOFTConfig(boft_block_size=4, **QV),
    "hra": lambda: g.HRAConfig(r=2, **QV),
    "fourierft": lambda: g.FourierFTConfig(n_frequency=9, **QV),
    "miss": lambda: g.MissConfig(r=2, **QV),
    "delora": lambda: g.DeloraConfig(r=2, **QV),
    "ln tuning": lambda: g.LNTuningConfig(target_modules=["input_layernorm"]),
}


def base(folder: Path, model: Any = None, size: str = "20KB") -> Path:
    """A base model's files, in several shards."""
    (model or build("llama")).save_pretrained(folder, max_shard_size=size)
    return folder


def adapter(folder: Path, of: Path, config: Any, kind: Any, **options: Any) -> Path:
    """A trained adapter for it."""
    model = get_peft_model(kind.from_pretrained(of, dtype="auto", **options), config)
    shake(model, seed=3)
    model.save_pretrained(folder)
    return folder


def config_of(folder: Path, **changes: Any) -> Any:
    return transformers.AutoConfig.from_pretrained(folder, **changes)


def in_memory(of: Path, where: Path, kind: Any, **options: Any) -> Any:
    loaded = kind.from_pretrained(of, dtype="auto", **options)
    return PeftModel.from_pretrained(loaded, where).merge_and_unload().eval()


def check(out: Path, wanted: Any, kind: Any) -> Any:
    """The folder holds a model with just these bits, and lacks nothing."""
    found, told = kind.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not told["missing_keys"] and not told["mismatched_keys"]
    have, want = found.state_dict(), wanted.state_dict()
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert tensor.dtype == have[name].dtype and torch.equal(tensor, have[name]), name
    return found.eval()


CAUSAL = transformers.AutoModelForCausalLM


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of a new head."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextmanager
def _any_base() -> Iterator[None]:
    """Without the warning that an adapter was trained on another base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", g.PeftWarning)
        yield


def tiny_llama(tied: bool) -> Any:
    torch.manual_seed(0)
    return llama(tie_word_embeddings=tied)


CASES = [
    *((name, torch.float32, False) for name in METHODS),
    *((name, torch.bfloat16, False) for name in ("lora", "dora", "pissa", "saved output", "ia3")),
    *((name, torch.float32, True) for name in METHODS if set(name.split()) & {"output", "tokens"}),
    ("lora and embedding", torch.bfloat16, True),
]


@pytest.mark.fault("D6")
@pytest.mark.fault("D9")
@pytest.mark.parametrize(("name", "dtype", "tied"), CASES)
def test_the_files_have_the_bits_of_a_merge_in_memory(
    name: str, dtype: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    of = base(tmp_path / "base", tiny_llama(tied).to(dtype))
    where = adapter(tmp_path / "adapter", of, METHODS[name](), CAUSAL)
    found = merge_files(of, where, tmp_path / "out", CAUSAL, config_of(of))
    plain = in_memory(of, where, CAUSAL)
    merged = check(tmp_path / "out", plain, CAUSAL)
    assert found.changed and found.copied
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ids = torch.randint(64, (2, 7))
    with torch.no_grad():
        assert torch.equal(merged(input_ids=ids).logits, plain(input_ids=ids).logits)
        loaded = CAUSAL.from_pretrained(of, dtype="auto")
        adapted = PeftModel.from_pretrained(loaded, where).eval()(input_ids=ids).logits
    far = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted, rtol=far, atol=far)
    assert merged.config.tie_word_embeddings == plain.config.tie_word_embeddings


def test_a_classifier_on_the_files_of_its_encoder(tmp_path: Path) -> None:
    kind = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    of = base(tmp_path / "base", build("bert").bert, "1GB")  # names without "bert."
    config = g.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"])
    with quiet():
        where = adapter(tmp_path / "adapter", of, config, kind, num_labels=3)
        found = merge_files(of, where, tmp_path / "out", kind, config_of(of, num_labels=3))
        plain = in_memory(of, where, kind, num_labels=3)
    check(tmp_path / "out", plain, kind)
    assert found.added == ["classifier.bias", "classifier.weight"]
    with quiet(), pytest.raises(MergeError, match=r"neither .* nor the adapter hold classifier"):
        bare = g.LoraConfig(r=2, target_modules=["query"])
        where = adapter(tmp_path / "bare", of, bare, kind, num_labels=3)
        merge_files(of, where, tmp_path / "no", kind, config_of(of, num_labels=3))
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()


@pytest.mark.parametrize(
    ("name", "kind", "targets"),
    [("gpt2", CAUSAL, ["c_attn"]), ("t5", transformers.AutoModelForSeq2SeqLM, ["q", "v"])],
)
def test_other_families(name: str, kind: Any, targets: list[str], tmp_path: Path) -> None:
    of = base(tmp_path / "base", build(name))
    where = adapter(tmp_path / "adapter", of, g.LoraConfig(r=2, target_modules=targets), kind)
    merge_files(of, where, tmp_path / "out", kind, config_of(of))
    check(tmp_path / "out", in_memory(of, where, kind), kind)


def test_an_adapter_with_a_larger_vocabulary(tmp_path: Path) -> None:
    of = base(tmp_path / "base")
    model = CAUSAL.from_pretrained(of)
    model.resize_token_embeddings(70)
    model = get_peft_model(model, g.LoraConfig(r=2, **QV))
    shake(model, seed=3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    found = merge_files(of, tmp_path / "adapter", tmp_path / "out", CAUSAL, config_of(of))
    merged = check(tmp_path / "out", model.merge_and_unload(), CAUSAL)
    assert merged.config.vocab_size == 70 and len(merged.get_input_embeddings().weight) == 70
    assert "model.embed_tokens.weight" in found.changed
    where = adapter(tmp_path / "other", of, g.LoraConfig(r=2, **QV), CAUSAL)
    with (
        _any_base(),
        pytest.raises(MergeError, match=r"weight is \(64, 32\) .* \(99, 32\) by the"),
    ):
        merge_files(of, where, tmp_path / "no", CAUSAL, config_of(of, vocab_size=99))


def test_what_else_lies_in_the_folders_comes_along(tmp_path: Path) -> None:
    of = base(tmp_path / "base")
    where = adapter(tmp_path / "adapter", of, g.LoraConfig(r=2, **QV), CAUSAL)
    for folder, names in (
        (of, ("tokenizer.json", "notes.txt", "pytorch_model.bin", ".hidden")),
        (where, ("tokenizer.json", "chat_template.jinja", "optimizer.pt")),
    ):
        for name in names:
            (folder / name).write_text(folder.name)
    out = tmp_path / "out"
    merge_files(of, where, out, CAUSAL, config_of(of))
    names = {path.name for path in out.iterdir()}
    assert {"notes.txt", "chat_template.jinja", "generation_config.json"} <= names
    assert not names & {"pytorch_model.bin", ".hidden", "optimizer.pt", "merge.json", "README.md"}
    assert (out / "tokenizer.json").read_text() == "adapter"
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = base(tmp_path / "base", tiny_llama(True))
    where = adapter(tmp_path / "adapter", of, METHODS["lora and output"](), CAUSAL)
    out, seen = tmp_path / "out", []

    def run(stop: int) -> Merged:
        def tell(done: int, every: int) -> None:
            seen.append((done, every))
            if done == stop:
                raise KeyboardInterrupt

        return merge_files(of, where, out, CAUSAL, config_of(of), on_file=tell)

    with pytest.raises(KeyboardInterrupt):
        run(3)
    assert not out.exists() and (tmp_path / "out.partial").exists()
    written: list[str] = []
    real = merge.write
    monkeypatch.setattr(merge, "write", lambda p, *a: (written.append(p.name), real(p, *a))[1])
    found = run(0)
    assert found.resumed == 3 and len(written) == seen[-1][1] - 3 + 1  # and what is added
    check(out, in_memory(of, where, CAUSAL), CAUSAL)
    assert not (tmp_path / "out.partial").exists()


def test_another_adapter_starts_anew(tmp_path: Path) -> None:
    of = base(tmp_path / "base")
    first = adapter(tmp_path / "first", of, g.LoraConfig(r=2, **QV), CAUSAL)
    second = adapter(tmp_path / "second", of, g.LoraConfig(r=3, **QV), CAUSAL)
    out = tmp_path / "out"

    def stop(done: int, every: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(of, first, out, CAUSAL, config_of(of), on_file=stop)
    assert merge_files(of, second, out, CAUSAL, config_of(of)).resumed == 0
    check(out, in_memory(of, second, CAUSAL), CAUSAL)
    with pytest.raises(FileError, match="out is not empty; name another folder"):
        merge_files(of, first, out, CAUSAL, config_of(of))
    merge_files(of, first, out, CAUSAL, config_of(of), overwrite=True)
    check(out, in_memory(of, first, CAUSAL), CAUSAL)
    for folder in (of, first, tmp_path):
        with pytest.raises(FileError, match="holds what is to be merged; name another folder"):
            merge_files(of, first, folder, CAUSAL, config_of(of), overwrite=True)
    assert (of / "config.json").exists() and (first / "adapter_config.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file is a file; name a folder"):
        merge_files(of, first, tmp_path / "file", CAUSAL, config_of(of))
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("")
    with pytest.raises(FileError, match=r"new\.partial is not of a merge; remove it"):
        merge_files(of, first, tmp_path / "new", CAUSAL, config_of(of))
    assert (tmp_path / "new.partial" / "mine").exists()


def test_what_cannot_be_merged_leaves_nothing_behind(tmp_path: Path) -> None:
    of = base(tmp_path / "base")
    where = adapter(tmp_path / "adapter", of, g.LoraConfig(r=2, **QV), CAUSAL)
    path = where / "adapter_model.safetensors"
    tensors = load_file(path)
    last = [name for name in tensors if "layers.1" in name and "lora_B" in name][-1]
    save_file({**tensors, last: torch.full_like(tensors[last], torch.inf)}, path)
    prompt = adapter(tmp_path / "prompt", of, g.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2), CAUSAL)  # fmt: skip
    config = config_of(of)
    for folder, text in ((where, "not finite"), (prompt, "which no weight of a layer holds")):
        with pytest.raises((MergeError, FileError), match=text):
            merge_files(of, folder, tmp_path / "out", CAUSAL, config)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(MergeError, match=r"is quantised, .*take the model before"):
        merge_files(of, where, tmp_path / "out", CAUSAL, config)


def test_broken_bases(tmp_path: Path) -> None:
    of = base(tmp_path / "base")
    where = adapter(tmp_path / "adapter", of, g.LoraConfig(r=2, **QV), CAUSAL)
    config, index = config_of(of), of / "model.safetensors.index.json"

    def refused(text: str) -> None:
        with pytest.raises(FileError, match=text):
            merge_files(of, where, tmp_path / "out", CAUSAL, config)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    good = index.read_text()
    index.write_text(good.replace("model-00001-of", "../model-00001-of"))
    refused("names files outside of its folder")
    index.write_text("{")
    refused("is no index of shards")
    index.write_text(good)
    first = next(of.glob("*00001-of*.safetensors"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    refused("is damaged or no safetensors file")
    first.unlink()
    refused(f"lacks {first.name}, which its")
    index.unlink()
    refused("has neither model.safetensors nor .*--in-memory")


def test_a_model_whose_tensors_are_made_of_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
    ))  # fmt: skip
    of = base(tmp_path / "base", model, "1GB")
    assert any("experts.0." in name for name in Shard(of / SINGLE).entries)
    where = adapter(tmp_path / "adapter", of, g.LoraConfig(r=2, **QV), CAUSAL)
    merge_files(of, where, tmp_path / "out", CAUSAL, config_of(of))
    check(tmp_path / "out", in_memory(of, where, CAUSAL), CAUSAL)
    config = g.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"])
    where = adapter(tmp_path / "experts", of, config, CAUSAL)
    with pytest.raises(MergeError, match=r"no tensor .*experts.gate_up_proj: .*--in-memory"):
        merge_files(of, where, tmp_path / "no", CAUSAL, config_of(of))
    command = ["merge", str(where), "--model", str(of), "-o", str(tmp_path / "no"), "--in-memory"]
    done = CliRunner().invoke(application(command), command)
    assert done.exit_code == 0, done.output
    check(tmp_path / "no", in_memory(of, where, CAUSAL), CAUSAL)


def test_the_command(tmp_path: Path) -> None:
    of = base(tmp_path / "base")
    config = g.LoraConfig(r=2, task_type="CAUSAL_LM", **QV)
    where = adapter(tmp_path / "adapter", of, config, CAUSAL)

    def run(*more: str) -> Any:
        words = ["merge", str(where), "-o", str(tmp_path / "out"), *more]
        return CliRunner().invoke(application(words), words)

    done = run()
    assert done.exit_code == 0, done.output
    assert "out: 4 tensors merged, 17 as they were" in done.output
    check(tmp_path / "out", in_memory(of, where, CAUSAL), CAUSAL)
    assert run().exit_code == 1
    done = run("--overwrite", "--json")
    assert json.loads(done.stdout)["copied"] == 17
    assert len(json.loads(done.stdout)["changed"]) == 4


def test_tensors_that_lie_oddly_are_read(tmp_path: Path) -> None:
    values = {"a": torch.arange(3, dtype=torch.int8), "b": torch.randn(5), "c": torch.empty(0, 4)}
    pieces = [
        Piece(name, kind, tuple(values[name].shape), value=lambda name=name: values[name])
        for name, kind in (("a", "I8"), ("b", "F32"), ("c", "F32"))
    ]
    write(tmp_path / "x.safetensors", pieces, {"format": "pt"})
    shard = Shard(tmp_path / "x.safetensors")
    for name, value in values.items():
        assert torch.equal(shard.view(name), value)
    assert {k: v.tolist() for k, v in load_file(tmp_path / "x.safetensors").items()} == {
        k: v.tolist() for k, v in values.items()
    }


PROGRAM = Path(__file__).parent / "merge_program.py"


@pytest.mark.fault("D8")
@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    of = base(tmp_path / "base", size="8KB")
    where = adapter(tmp_path / "adapter", of, METHODS["lora"](), CAUSAL)
    out = tmp_path / "out"
    words = [sys.executable, str(PROGRAM), "merge", str(of), str(where), str(out)]
    kills = 0
    for wait in (0.0, 0.004, 0.008, 0.016, 0.03, 0.06):
        child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        child.stdout.close()
        if out.exists():  # it is whole, whenever it is there
            break
    assert kills
    if not out.exists():
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    check(out, in_memory(of, where, CAUSAL), CAUSAL)


@pytest.mark.fault("D8")
@pytest.mark.slow
def test_two_gigabytes_take_the_memory_of_a_part(tmp_path: Path) -> None:
    """Peak memory over what the program takes anyhow: below 1.2 of the largest file, and the
    adapter."""
    words = [sys.executable, str(PROGRAM), "large", str(tmp_path)]
    try:
        told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        assert (tmp_path / "out" / "config.json").is_file()
    finally:
        for name in ("base", "out", "out.partial"):  # pytest keeps what is left
            shutil.rmtree(tmp_path / name, ignore_errors=True)
    size, largest, held, peak = map(int, told.split()[-4:])
    assert size >= 2 * 2**30
    assert peak < 1.2 * largest + held, told
