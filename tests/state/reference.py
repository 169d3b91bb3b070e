"""A small model of a model with adapters: what must be true after each operation.

It knows the bits of the base and of each adapter's file, and which adapters are active, merged,
frozen. Operations that the library must refuse raise ``Refused`` here, and change nothing. Outputs
are computed from dense weights, by formulas that share no code with the library.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from record import BIAS, COPIES, FROZEN, ROWS, TIED, Record, frozen
from torch import Tensor, nn
from torch.func import functional_call
from zoo import IDS, PATHS, Net

Names = tuple[str, ...]
NO_NAME = {"", "a.b", "__base__"}


class Refused(Exception):  # noqa: N818 - what the library must answer with one of its errors
    """The operation must fail with an error that says this, or one of several texts with "|"
    between them, and change nothing.
    """


class Reference:
    """The state of a model with adapters, and what its operations do to it."""

    def __init__(self, base: dict[str, Tensor], trainable: set[str], tied: bool) -> None:
        self.base, self.trainable, self.base_id = base, trainable, 0
        self.tied = tied  # whether the head has the weight of the embedding
        first = next(iter(base.values())).dtype
        self.dtype = torch.float32 if first == torch.bfloat16 else first
        self.net = (
            Net(bias=True).to(self.dtype).requires_grad_(False)
        )  # some adapters have one where the layer has none
        nn.init.zeros_(self.net.down_proj.bias)
        self.training = False
        self.cache: dict[Any, Any] = {}
        self.warns: list[str] = []
        self.bare()

    def bare(self) -> None:
        """No adapter, no wrapper."""
        self.adapters: dict[str, Record] = {}
        self.active: Names = ()
        self.chosen: Names = ()  # what is active as soon as nothing is merged any more
        self.merged: Names = ()
        self.written: dict[str, dict[str, Tensor]] = {}  # the weights that merging wrote
        self.kept = self.enabled = True
        self.wrapped = False

    # -- what is where

    def here(self, path: str, names: Sequence[str]) -> Names:
        """Those of the adapters that sit at a path."""
        return tuple(n for n in names if path in self.adapters[n].at)

    def known(self, names: Sequence[str]) -> Names:
        """The names, each once."""
        for name in names:
            if name not in self.adapters:
                raise Refused("no adapter")
        return tuple(dict.fromkeys(names))

    def named(self, name: str) -> None:
        """A name that an adapter can get."""
        if name in NO_NAME:
            raise Refused("cannot be an adapter's name")
        if name in self.adapters:
            raise Refused("there is an adapter")

    def together(self, names: Names) -> None:
        """Adapters of which each has an effect."""
        for low, high in itertools.combinations(names, 2):
            under, over = self.adapters[low], self.adapters[high]
            for path in under.at.keys() & over.at.keys():
                if over.copies(path) or under.ids(path) & over.ids(path):
                    raise Refused("cannot be active together")

    # -- what comes out

    def place(self, path: str, names: Names, values: dict[str, Record]) -> dict[str, Tensor]:
        """The parameters at a path with adapters, the lowest first."""
        key = (path, *((n, values[n].version) for n in names))
        if key not in self.cache or any(values[n].version < 0 for n in names):
            base = {k: t.to(self.dtype) for k, t in self.base.items()}
            w, b = base[f"{path}.weight"], base.get(f"{path}.bias")
            for name in names:
                w, b = values[name].fold(path, w, b, base)
            named = {f"{path}.weight": w, f"{path}.bias": b}
            self.cache[key] = {k: t for k, t in named.items() if t is not None}
        found: dict[str, Tensor] = self.cache[key]
        return found

    def weights(
        self, names: Sequence[str] | None = None, values: dict[str, Record] | None = None
    ) -> dict[str, Tensor]:
        """The weights that a forward uses; by default with what is active."""
        if names is None:
            names = self.active if self.enabled else ()
        found: dict[str, Tensor] = {}
        for path in PATHS:
            mine, merged = self.here(path, names), self.here(path, self.merged)
            if merged and mine == merged:
                found |= {k: t.to(self.dtype) for k, t in self.written[path].items()}
            elif merged and not self.kept:
                raise Refused("keep=False")
            else:
                found |= self.place(path, mine, values or self.adapters)
        every = [(values or self.adapters)[n] for n in names]
        rows = [record.tensors["prompt_embeddings"] for record in every if record.prompt]
        if rows:
            found["rows"] = torch.cat(rows).to(self.dtype)
        return found

    def output(self, names: Sequence[str] | None = None) -> Tensor:
        """What the model gives for IDS."""
        with torch.no_grad():
            return self.run(self.weights(names))

    def run(self, weights: dict[str, Tensor]) -> Tensor:
        """The output with dense weights."""
        x = weights["embed.weight"][IDS]
        if (rows := weights.pop("rows", None)) is not None:
            x = torch.cat([rows.expand(len(x), -1, -1), x], dim=1)
        return functional_call(self.net, weights, kwargs={"inputs_embeds": x})  # type: ignore[no-any-return]

    # -- operations

    def free(self, name: str) -> None:
        """A name that an adapter can get now."""
        self.named(name)
        if self.merged:
            raise Refused("adapters are merged")

    def tell(self, record: Record) -> None:
        """What a new adapter wishes in vain."""
        if getattr(record.config, "ensure_weight_tying", False) and not self.tied:
            self.warns.append("ensure_weight_tying has no effect")

    def enter(self, name: str, record: Record) -> None:
        """One more adapter."""
        self.free(name)
        first = not self.adapters
        self.adapters[name], record.tied = record, self.tied
        if first:
            self.active = self.chosen = (name,)
        record.trains = first and not record.inference
        self.tell(record)
        self.wrapped = True

    def choose(self, names: Sequence[str], inference: bool) -> None:
        """``set_adapter``."""
        names = self.known(names)
        self.together(names)
        self.active = self.chosen = names
        for name, record in self.adapters.items():
            record.trains = name in names and not inference

    def require(self, names: Sequence[str], on: bool) -> None:
        """``set_requires_grad``."""
        for name in self.known(names):
            self.adapters[name].trains = on

    def rename(self, old: str, new: str) -> None:
        """``rename_adapter``."""
        self.known((old,))
        self.named(new)

        def named(names: Names) -> Names:
            return tuple(new if n == old else n for n in names)

        self.adapters = {new if n == old else n: r for n, r in self.adapters.items()}
        self.active, self.chosen, self.merged = map(named, (self.active, self.chosen, self.merged))

    def delete(self, names: Sequence[str]) -> None:
        """``delete_adapter``: the first that is left becomes active where none would be."""
        names = self.known(names)
        if set(names) & set(self.merged):
            raise Refused("is merged into")
        for name in names:
            del self.adapters[name]
        left = tuple(n for n in self.active if n in self.adapters)
        if self.active and not left and self.adapters:
            left = (next(iter(self.adapters)),)
            record = self.adapters[left[0]]
            record.trains = not record.inference
            self.warns.append("was deleted")
        self.active = left
        kept = tuple(n for n in self.chosen if n in self.adapters)
        self.chosen = left if self.chosen and not kept else kept

    def merge(self, names: Sequence[str] | None, keep: Any) -> None:
        """``merge_adapter``."""
        wanted = self.known(names) if names else self.active
        new = tuple(n for n in wanted if n not in self.merged)
        if not new:
            self.warns.append("nothing to merge")
            return
        every = self.merged + new
        self.together(every)
        why = ["keep=False"] * bool(self.merged and not self.kept)
        why += ["cannot be merged into"] * any(self.adapters[n].prompt for n in every)
        written = {p: self.place(p, h, self.adapters) for p in PATHS if (h := self.here(p, every))}
        if any(f"{path}.bias" not in self.base for path in written if path == "down_proj"):
            biased = written["down_proj"].get("down_proj.bias")
            if biased is not None:
                why.append("has a bias and the layer has none")
        if why:
            raise Refused("|".join(why))
        first = next(iter(self.base.values())).dtype
        self.written = {
            p: {k: t.detach().to(first) for k, t in ts.items()} for p, ts in written.items()
        }
        self.merged = self.active = every
        self.kept = bool(keep)

    def unmerge(self) -> None:
        """``unmerge_adapter``."""
        if not self.merged:
            self.warns.append("nothing to undo")
        elif not self.kept:
            raise Refused("keep=False")
        else:
            self.active, self.merged, self.written = self.chosen, (), {}

    def fill(self, name: str, file: Record, fits: bool, swap: bool) -> None:
        """Other values for an adapter that is there."""
        if swap:
            self.known((name,))
        if not fits:
            raise Refused("")  # for one of many reasons
        if name in self.merged:
            raise Refused("is merged")
        record = self.adapters[name]
        record.take(file.tensors)
        if swap:
            record.config, record.inference = file.config, True

    def combined(
        self, names: Sequence[str], weights: Sequence[float], new: str, how: str
    ) -> dict[str, Tensor]:
        """``add_weighted_adapter``: what the dense weights with the new adapter alone must be."""
        self.known(names)
        every = [self.adapters[n] for n in names]
        matrices = [n for n in names for p in self.adapters[n].at if not self.whole(n, p)]
        why = ["cannot be an adapter's name"] * (new in NO_NAME)
        why += ["there is an adapter"] * (new in self.adapters)
        why += ["adapters are merged"] * bool(self.merged)
        kinds, sizes = ({r.prompt for r in every}, {r.config.n for r in every if r.prompt})
        if len(kinds) > 1:
            why += ["consist of different things"]
        elif True in kinds:
            why += ["have no meaning with 'cat'"] * (how == "cat" and set(weights) != {1})
            why += ["prompts of one length"] * (how == "linear" and len(sizes) > 1)
        elif not matrices:
            why += ["no LoRA in it"]
        if self.apart(every):
            why += ["the other end of the tied weight"]
        if why:
            raise Refused("|".join(why))
        base = {k: t.to(self.dtype) for k, t in self.base.items()}
        if True in kinds:
            rows = [r.tensors["prompt_embeddings"].to(self.dtype) for r in every]
            scaled = [w * row for w, row in zip(weights, rows, strict=True)]
            return {"rows": torch.cat(rows) if how == "cat" else sum(scaled, rows[0] * 0)}
        total = dict(base)
        for name, weight in zip(names, weights, strict=True):
            for path in self.adapters[name].at:
                for key, value in self.place(path, (name,), self.adapters).items():
                    before = base.get(key, torch.zeros_like(value))
                    total[key] = total.get(key, torch.zeros_like(value)) + weight * (value - before)
        return total

    @staticmethod
    def apart(every: Sequence[Record]) -> bool:
        """Whether some change both ends of the tied weight and others change one of them."""
        both = set().union(*(record.both for record in every))
        ids = set().union(*(r.ids("embed") for r in every if "rows" in r.both))
        for record in every if both else ():
            one, other = record.ways("embed") - record.both, record.ways("head")
            if both == {"rows"}:  # which are beneath what is at the head
                other -= {"matrix"}
                if ids <= record.ids("embed"):  # and hide what is at the embedding
                    one -= {"matrix"}
            if one or other:
                return True
        return False

    def whole(self, name: str, path: str) -> bool:
        """Whether all that an adapter does at a path is in place of what is there."""
        keys = self.adapters[name].at[path].keys() - set(FROZEN)
        return all(key in (*COPIES, BIAS, ROWS, TIED) for key in keys)

    def saved(self, names: Sequence[str] | None) -> None:
        """``save_pretrained``."""
        if names is None and not self.adapters:
            raise Refused("no adapter any more")
        if unknown := [n for n in names or () if n not in self.adapters]:
            raise Refused(f"selected_adapters names {unknown}")

    def leave(self, merge: bool, names: Sequence[str] | None = None) -> None:
        """``unload`` and ``merge_and_unload``."""
        if merge:
            wanted = self.known(names) if names else self.active
            if not set(wanted) <= set(self.merged):
                self.merge(names, False)
            for tensors in self.written.values():
                self.base = self.base | tensors
            self.base_id += bool(self.written)
            self.cache.clear()
        elif self.merged:
            self.unmerge()
        self.bare()

    def step(self, target: Tensor, rate: float) -> dict[str, dict[str, Tensor]] | None:
        """The tensors after one step of SGD on the mean square; None: nothing can be learned."""
        values = dict(self.adapters)
        leaves: dict[str, dict[str, Tensor]] = {}
        for name in self.active if self.enabled else ():
            record = self.adapters[name]
            if record.trains:
                own = {k: t.clone().to(self.dtype) for k, t in record.tensors.items()}
                leaves[name] = {k: t.requires_grad_() for k, t in own.items() if not frozen(k)}
                for key, (first, turned) in record.shared.items():
                    leaves[name].pop(key)
                    own[key] = own[first].T if turned else own[first]
                values[name] = Record(
                    record.label, record.config, tensors=own, version=-1, tied=record.tied
                )
        y = self.run(self.weights(None, values))
        if not y.requires_grad:
            return None
        nn.functional.mse_loss(y, target.to(y)).backward()
        return {
            name: {k: (t if t.grad is None else t - rate * t.grad).detach() for k, t in own.items()}
            for name, own in leaves.items()
        }
