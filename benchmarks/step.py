"""A training step against its floor: frozen, full fine-tuning, the real peft, and graftwork.

    python benchmarks/step.py [--width 512] [--dtype float32 bfloat16] [--variants floor,ours]

The floor is the frozen model's forward and the gradient of its input embeddings: what every step
with adapters must compute at least. All variants run in one process on one batch; in each round
each runs once, in an order that rotates, and a ratio is the median over the rounds of the ratio
within a round, so that whatever else the machine does meets both sides. The loss is computed from
the logits outside of the models, alike for all. It needs torch, transformers and graftwork; where
peft is not installed, its column is left out and the table says so. With ``--device cuda`` the
clock waits for the device.

The bytes that a step saves for its backward are counted after the forward: storages that the graph
holds, and those of tensors that appeared in the forward and still live behind it (what a function
keeps beside autograd), each once, without parameters, buffers and the loss.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from graftwork.fast import heap

RANK, DROPOUT, RATE, SEED = 8, 0.05, 1e-4, 0
LAYERS = {256: 32, 512: 8, 1024: 4, 2048: 4}  # by width, where nothing else is said


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch."""

    width: int = 512
    layers: int = 8
    mlp: int = 1376
    vocabulary: int = 4096
    heads: int = 8
    rows: int = 8
    length: int = 128  # tokens a row
    dtype: str = "float32"
    device: str = "cpu"

    def base(self) -> Any:
        """A new model, the same every time."""
        torch.manual_seed(SEED)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.mlp,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            max_position_embeddings=max(2048, self.length), attn_implementation="sdpa",
            use_cache=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).to(self.device, getattr(torch, self.dtype))

    def batch(self, seed: int = SEED) -> Tensor:
        """Token ids, (rows, length)."""
        gen = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocabulary, (self.rows, self.length), generator=gen)
        return ids.to(self.device)

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.layers} layers, MLP {self.mlp}, "
            f"{self.rows} x {self.length} tokens, {self.dtype}, {self.device}"
        )


def shape(width: int, dtype: str, device: str = "cpu", **more: Any) -> Shape:
    """A shape by its width; wider heads and longer rows on a GPU, where small ones only wait."""
    usual: dict[str, Any] = {
        "layers": LAYERS.get(width, 4),
        "mlp": -(-width * 43 // 16) if width % 16 == 0 else width * 8 // 3,  # 1376 of 512
    }
    if device != "cpu":
        usual |= {"layers": 8, "heads": max(1, width // 128), "length": 512}
    return Shape(width=width, dtype=dtype, device=device, **usual | more)


class Plain(nn.Module):
    """LoRA as one would write it: ``y = W x + s B A dropout(x)``, the adapter in fp32."""

    def __init__(self, base: nn.Linear, dropout: float, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.dropout, self.scale = base, nn.Dropout(dropout), scale
        where = base.weight.device
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False, device=where)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False, device=where)

    def forward(self, x: Tensor) -> Tensor:
        delta = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        y: Tensor = self.base(x)
        return (y + self.scale * delta).to(y.dtype)


def plain(model: Any, dropout: float = 0.0) -> Any:
    """A model with plain LoRA on all linear layers but the output layer."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, Plain(module, dropout))
    return model


def adapted(library: str, model: Any, dropout: float = 0.0, dora: bool = False) -> Any:
    """A model with a library's LoRA on all linear layers, in that library's default settings."""
    module = importlib.import_module(library)
    config = module.LoraConfig(
        r=RANK, lora_alpha=RANK, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM", use_dora=dora,
    )  # fmt: skip
    return module.get_peft_model(model, config)


def unfrozen(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def awake(model: Any) -> Any:
    """The model in training; what starts at zero gets values, so that all gradients flow."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        for p in unfrozen(model):
            if not p.any():
                p.normal_(std=0.02)
    return model.train()


MODELS: dict[str, Callable[[Any], Any]] = {
    "floor": lambda m: m.requires_grad_(False),
    "full": lambda m: m,
    "plain": plain,
    "plain-dropout": lambda m: plain(m, DROPOUT),
    "peft": lambda m: adapted("peft", m),
    "peft-dropout": lambda m: adapted("peft", m, DROPOUT),
    "peft-dora": lambda m: adapted("peft", m, dora=True),
    "ours": lambda m: adapted("graftwork", m),
    "ours-dropout": lambda m: adapted("graftwork", m, DROPOUT),
    "ours-dora": lambda m: adapted("graftwork", m, dora=True),
}
OPTIMIZED = ("full", "plain", "peft", "ours")  # these also run as NAME+adamw
VARIANTS = [*MODELS, *(f"{name}+adamw" for name in OPTIMIZED)]
USUAL = [v for v in VARIANTS if not v.startswith("plain")]
SAVING = ("floor", "full", "peft", "peft-dropout", "ours", "ours-dropout", "ours-dora")


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def possible(variants: Iterable[str]) -> list[str]:
    """Those of the variants that this environment can run."""
    chosen = list(variants)
    if unknown := sorted(set(chosen) - set(VARIANTS)):
        raise SystemExit(f"--variants: no {unknown}; there are {', '.join(VARIANTS)}")
    if not has_peft() and any(v.startswith("peft") for v in chosen):
        print("peft is not installed: its variants are left out")
        chosen = [v for v in chosen if not v.startswith("peft")]
    return chosen


def loss_of(model: Any, ids: Tensor, embeds: Tensor | None = None) -> Tensor:
    """The mean cross entropy of the next token in fp32, as transformers computes it."""
    given = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    logits = model(**given, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclass
class Runner:
    """One variant: a model and what a step of it is."""

    model: Any
    ids: Tensor
    embeds: Tensor | None = None  # of the floor, which ends in their gradient
    optimizer: torch.optim.Optimizer | None = None
    leaves: list[Tensor] = field(default_factory=list)

    def loss(self) -> Tensor:
        return loss_of(self.model, self.ids, self.embeds)

    def __call__(self) -> None:
        """Forward, backward, and the optimizer's step where there is one."""
        self.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        for leaf in self.leaves:
            leaf.grad = None

    def check(self) -> None:
        """Every tensor that should train gets a finite gradient.

        Raises:
            SystemExit: one does not.
        """
        self.loss().backward()
        for leaf in self.leaves:
            if leaf.grad is None or not leaf.grad.isfinite().all():
                raise SystemExit(f"a tensor of shape {tuple(leaf.shape)} has no finite gradient")
            leaf.grad = None


def runners(chosen: Iterable[str], at: Shape) -> dict[str, Runner]:
    """What runs each variant; a variant with an optimizer shares the model without it."""
    chosen, ids, models = list(chosen), at.batch(), {}
    found: dict[str, Runner] = {}
    for name in chosen:
        kind, _, optimizer = name.partition("+")
        if kind not in models:
            models[kind] = awake(MODELS[kind](at.base()))
        model = models[kind]
        if kind == "floor":
            embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
            found[name] = Runner(model, ids, embeds, leaves=[embeds])
        else:
            leaves: list[Tensor] = list(unfrozen(model))
            adamw = torch.optim.AdamW(leaves, lr=RATE, fused=True) if optimizer else None
            found[name] = Runner(model, ids, optimizer=adamw, leaves=leaves)
        found[name].check()
    return found


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each run in each round; the order rotates.

    Args:
        runs: what to time, by name.
        rounds: how often each.
        device: "cpu" or "cuda".
        warm: rounds before, which do not count.
    """
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()  # a collection would fall on whoever runs just then
    try:
        for turn in range(-warm, rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                seconds = clock(runs[name], device)
                if turn >= 0:
                    times[name].append(seconds)
            gc.collect()
    finally:
        gc.enable()
    return times


def ratio(times: dict[str, list[float]], of: str, to: str) -> float | None:
    """The median of the ratios within a round; None where one of the two did not run."""
    if of not in times or to not in times:
        return None
    return median(a / b for a, b in zip(times[of], times[to], strict=True))


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address."""
    found = {}
    for tensor in tensors:
        for part in inner(tensor):
            kept = part.untyped_storage()
            found[kept.data_ptr()] = kept.nbytes()
    return found


def inner(tensor: Tensor) -> list[Tensor]:
    """What a wrapper such as a quantised tensor holds; of a plain tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [p for n in tensor.__tensor_flatten__()[0] for p in inner(getattr(tensor, n))]


def living() -> list[Tensor]:
    """Every dense tensor that Python knows."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # those have no storage
    return [t for t in found if t.layout is torch.strided and not wrapped(t)]


def saved_bytes(runner: Runner) -> int:
    """What a forward keeps for its backward, in bytes (the module's docstring says how)."""
    runner.loss()  # what is made once, a table of positions or a pool of bits, is no step's
    there = living()  # kept alive, so that nothing new comes to lie where they do
    before = storages(there)
    loss = runner.loss()
    own = storages([loss, *runner.model.parameters(), *runner.model.buffers(), *runner.leaves])
    new = {a: n for a, n in storages(living()).items() if a not in before}
    kept = storages(held(loss)) | new
    del loss, there
    return sum(n for a, n in kept.items() if a not in own)


def held(loss: Tensor) -> list[Tensor]:
    """What the nodes of a graph hold, of torch's own and of those written in Python. No hook is set
    for it: code that keeps less may stand back where a hook watches what is saved.
    """
    found: list[Tensor] = []
    todo: list[Any] = [loss.grad_fn]
    seen = set(todo)
    for node in todo:
        more = [below for below, _ in node.next_functions if below is not None]
        todo += [below for below in dict.fromkeys(more) if below not in seen]
        seen.update(more)
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [getattr(node, name) for name in names]
        for value in (*values, getattr(node, "saved_tensors", ())):
            many = value if isinstance(value, (list, tuple)) else [value]
            found += [t for t in many if isinstance(t, Tensor)]
    return found


@dataclass
class Result:
    """What was measured at one shape."""

    shape: Shape
    seconds: dict[str, list[float]]
    saved: dict[str, int]  # bytes, by variant

    def of(self, name: str, to: str = "floor") -> float | None:
        return ratio(self.seconds, name, to)

    def saved_ratio(self, name: str) -> float | None:
        return self.saved[name] / self.saved["floor"] if name in self.saved else None


def measure(
    at: Shape, rounds: int, variants: Iterable[str] = tuple(USUAL), bytes_too: bool = True
) -> Result:
    """Run everything at one shape."""
    runs = runners(possible(variants), at)
    if bytes_too and "floor" in runs:
        saved = {name: saved_bytes(runs[name]) for name in runs if name in SAVING}
    else:
        saved = {}
    return Result(at, interleaved(dict(runs), rounds, at.device) if rounds else {}, saved)


def table(result: Result) -> str:
    """The result as text."""
    lines = [str(result.shape)]
    lines += [f"{'':<16}{'ms':>9}{'/ floor':>9}{'quartiles':>14}{'saved MB':>10}{'/ floor':>9}"]
    floor = result.seconds.get("floor")
    for name in result.seconds or result.saved:
        seconds = result.seconds.get(name, [])
        line = f"{name:<16}" + (f"{1e3 * median(seconds):>9.1f}" if seconds else " " * 32)
        if floor:
            each = [a / b for a, b in zip(seconds, floor, strict=True)]
            low, _, high = quantiles(each, n=4) if len(each) > 1 else each * 3
            line += f"{median(each):>9.3f}{f'{low:.2f}-{high:.2f}':>14}"
        if name in result.saved:
            share = result.saved_ratio(name)
            line += f"{result.saved[name] / 1e6:>10.1f}{share:>9.2f}"
        lines.append(line)
    for of, to in PAIRS:
        if (value := result.of(of, to)) is not None:
            lines.append(f"{f'{of} / {to}':<40}{value:.3f}")
    return "\n".join(lines)


PAIRS = [
    ("peft", "full"), ("ours", "full"), ("peft+adamw", "full+adamw"),
    ("ours+adamw", "full+adamw"), ("peft-dora", "peft"), ("ours-dora", "ours"),
    ("ours", "peft"), ("ours-dropout", "peft-dropout"),
]  # fmt: skip


def processor() -> str:
    """The CPU's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.M)
    return names[0].strip() if names else platform.machine()


def bf16_units() -> list[str]:
    """The units of this CPU that multiply bf16; without one, ratios in bf16 mean nothing."""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "Arm BF16"}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux: torch knows, in newer versions
        asked = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
        return [unit for unit, name in asked.items() if getattr(torch.cpu, name, bool)()]
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = set(" ".join(lines).split())
    return [unit for flag, unit in known.items() if flag in flags]


def warn_of_bf16(shapes: Iterable[Shape]) -> None:
    """Say where a ratio would mean nothing."""
    if any(s.dtype == "bfloat16" and s.device == "cpu" for s in shapes) and not bf16_units():
        print(
            "WARNING: this CPU has no unit for bf16 (AMX, AVX512-BF16): its products in bf16 are "
            "emulated, many times slower than in fp32, and these ratios mean nothing",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    text, how = __doc__ or "", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=how)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--width", type=int, nargs="+", help="512 and 1024; on cuda 2048")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--mlp", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--length", type=int, help="tokens a row")
    parser.add_argument("--rounds", type=int, default=9, help="0: only count bytes")
    parser.add_argument("--variants", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--no-bytes", action="store_true", help="do not count what is saved")
    parser.add_argument("--json", type=Path, help="write all times there")
    return parser.parse_args()


def main() -> None:
    """Measure what the command line asks for, and print it."""
    args = arguments()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    heap.keep()  # for all variants; docs/performance.md says why
    names = ("layers", "mlp", "heads", "vocabulary", "rows", "length")
    more = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    widths = args.width or ([512, 1024] if args.device == "cpu" else [2048])
    dtypes = args.dtype or (["float32", "bfloat16"] if args.device == "cpu" else ["bfloat16"])
    shapes = [shape(width, dtype, args.device, **more) for width in widths for dtype in dtypes]
    where = processor() if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}, {args.threads} threads, {args.rounds} rounds")
    warn_of_bf16(shapes)
    results = []
    for at in shapes:
        chosen = args.variants.split(",") if args.variants else USUAL
        results.append(measure(at, args.rounds, chosen, not args.no_bytes))
        print(f"\n{table(results[-1])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
