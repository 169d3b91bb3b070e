"""The operations: each is done on a model and on its reference, and compared."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checks import DivergenceError, need, plain, same_bits, verify
from ground import RATE, Ground
from reference import Record, Refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import IDS, PATHS, ZOO

from graftwork import GraftworkError, MergeError, PeftModel, get_peft_model


class World(Ground):
    """Every operation that a sequence may have."""

    def attach(self, label: str, name: str, inference: bool) -> None:
        config = ZOO[label]()
        config.inference_mode = inference
        if self.reference.wrapped:
            return self.again(lambda: get_peft_model(self.model, config, name))
        record = Record(label, config, inference=inference)

        def real() -> None:
            self.model = get_peft_model(self.net, config, name)

        if self.both(lambda: self.reference.enter(name, record), real):
            self.shake(name)

    def attach_saved(self, slot: str, old: str, name: str, trainable: bool) -> None:
        def real() -> None:
            options = {"adapter_name": name, "is_trainable": trainable}
            self.model = PeftModel.from_pretrained(self.net, self.path(slot, old), **options)

        if self.reference.wrapped:
            return self.again(real)
        self.both(lambda: self.loaded(slot, old, name, trainable), real)
        if self.reference.wrapped:
            self.adopt(name)

    def attach_broken(self, slot: str, old: str, name: str, trainable: bool) -> None:
        """A file that lacks a tensor is refused as a whole."""
        if (saved := self.files.get((slot, old))) is None:
            return
        folder = self.folder / "broken"
        shutil.copytree(self.path(slot, old), folder)
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        with safe_open(file, "pt") as old_file:
            note = old_file.metadata()
        # without the copy at the other end of a tied weight it is a file of a model that ties none
        spare = set() if self.reference.tied else saved.shared.keys()
        lost = [n for n, short in zip(tensors, plain(tensors), strict=True) if short not in spare]
        del tensors[sorted(lost)[len(self.counts) % len(lost)]]
        save_file(tensors, file, note)

        def real() -> None:
            if self.reference.wrapped:
                self.model.load_adapter(folder, name, is_trainable=trainable)
            else:
                options = {"adapter_name": name, "is_trainable": trainable}
                PeftModel.from_pretrained(self.net, folder, **options)

        self.both(lambda: raising(Refused("")), real)
        shutil.rmtree(folder)

    def again(self, real: Callable[[], Any]) -> None:
        def expected() -> None:
            raise Refused("already has the adapters" if self.reference.adapters else "")

        if self.reference.adapters:
            self.both(expected, real)

    def add(self, label: str, name: str, inference: bool) -> None:
        config = ZOO[label]()
        config.inference_mode = inference
        record = Record(label, config, inference=inference)
        real = lambda: self.model.add_adapter(name, config)  # noqa: E731
        if self.both(lambda: self.reference.enter(name, record), real):
            self.shake(name)

    def load(self, slot: str, old: str, name: str, trainable: bool) -> None:
        if name in self.reference.adapters and (file := self.files.get((slot, old))):
            record = self.reference.adapters[name]
            fits = record.fits(file, trainable)
            expected = lambda: self.filled(fits, name, file, trainable)  # noqa: E731
        else:
            expected = lambda: self.loaded(slot, old, name, trainable)  # noqa: E731
        real = lambda: self.model.load_adapter(  # noqa: E731
            self.path(slot, old), name, is_trainable=trainable
        )
        if self.both(expected, real):
            self.adopt(name)

    def loaded(self, slot: str, old: str, name: str, trainable: bool) -> None:
        if (file := self.files.get((slot, old))) is None:
            raise Refused("there is no folder|so it is no adapter folder")
        record = Record(file.label, file.config, inference=not trainable)
        if record.ties and file.tied != self.reference.tied:
            self.reference.free(name)
            self.reference.tell(record)
            raise Refused("")
        self.reference.enter(name, record)
        record.take(file.tensors)
        record.steps = file.steps if trainable and file.resumes else 0
        self.reference.training &= trainable

    def filled(self, fits: bool, name: str, file: Record, trainable: bool) -> None:
        self.reference.fill(name, file, fits, swap=False)
        if trainable and file.resumes:
            self.reference.adapters[name].steps = file.steps
        self.reference.training &= trainable

    def swap(self, slot: str, old: str, name: str) -> None:
        if (file := self.files.get((slot, old))) is None:
            return
        record = self.reference.adapters.get(name)
        alike = record is not None and record.config.method == file.config.method
        good = record is not None and record.fits(file, False)
        if alike and (not good or file.config.method == "ADALORA"):
            return  # which of these differ in tensors alone is told in tests/test_updates.py
        expected = lambda: self.reference.fill(name, file, good, swap=True)  # noqa: E731
        if self.both(expected, lambda: self.model.hotswap_adapter(self.path(slot, old), name)):
            self.adopt(name)

    def choose(self, names: list[str], inference: bool) -> None:
        expected = lambda: self.reference.choose(names, inference)  # noqa: E731
        self.both(expected, lambda: self.model.set_adapter(one(names), inference_mode=inference))

    def require(self, names: list[str], on: bool) -> None:
        expected = lambda: self.reference.require(names, on)  # noqa: E731
        self.both(expected, lambda: self.model.set_requires_grad(one(names), on))

    def enable(self, on: bool) -> None:
        self.reference.enabled = on
        call = "enable_adapter_layers" if on else "disable_adapter_layers"
        getattr(self.model.base_model, call)()

    def mode(self, training: bool) -> None:
        self.reference.training = training
        self.model.train(training)

    def rename(self, old: str, new: str) -> None:
        real = lambda: self.model.rename_adapter(old, new)  # noqa: E731
        if self.both(lambda: self.reference.rename(old, new), real):
            front, mine = f".adapters.{old}.", self.raw.pop(old)
            self.raw[new] = {k.replace(front, f".adapters.{new}.", 1): t for k, t in mine.items()}

    def delete(self, names: list[str]) -> None:
        real = lambda: self.model.delete_adapter(one(names))  # noqa: E731
        mine = [p for n in set(names) for p in self.parameters(n)]
        if self.both(lambda: self.reference.delete(names), real):
            self.gone = [weakref.ref(p) for p in mine]
            self.raw = {n: t for n, t in self.raw.items() if n not in names}

    def merge(self, names: list[str] | None, keep: Any) -> None:
        real = lambda: self.model.merge_adapter(names, keep=keep)  # noqa: E731
        if self.both(lambda: self.reference.merge(names, keep), real):
            self.take_written()

    def spoilt(self, name: str) -> None:
        """An adapter with a number that is none cannot be merged."""
        record = self.reference.adapters.get(name)
        if record is None or name in self.reference.merged or not self.reference.kept:
            return
        p = self.parameters(name)[-1]
        before = p.detach().clone()
        with torch.no_grad():
            p.view(-1)[0] = float("nan")
        try:
            self.model.merge_adapter([name])
            raise DivergenceError("merged what is not finite")
        except MergeError:
            self.counts["refused"] += 1
        except GraftworkError:  # it cannot be merged for another reason
            self.counts["refused"] += 1
        finally:
            with torch.no_grad():
                p.copy_(before)

    def unmerge(self) -> None:
        self.both(self.reference.unmerge, self.model.unmerge_adapter)

    def combine(self, names: list[str], weights: list[float], new: str, how: str) -> None:
        total: dict[str, Tensor] = {}

        def expected() -> None:
            total.update(self.reference.combined(names, weights, new, how))

        real = lambda: self.model.add_weighted_adapter(names, weights, new, how)  # noqa: E731
        if not self.both(expected, real):
            return
        config = copy.deepcopy(self.model.peft_config[new])
        self.reference.enter(new, Record("combined", config, inference=True))
        self.adopt(new, fresh=True)
        record = self.reference.adapters[new]
        if record.prompt:
            self.near(record.tensors["prompt_embeddings"], total["rows"], "the combined rows")
        for path in () if record.prompt else PATHS:
            mine = self.reference.place(path, (new,) if path in record.at else (), {new: record})
            for key, value in mine.items():
                want = total.get(key, torch.zeros_like(value))
                self.near(value, want, f"{key} of the combination")

    def save(self, slot: str, names: list[str] | None) -> None:
        target = self.folder / slot

        def expected() -> None:
            self.reference.saved(names)

        real = lambda: self.model.save_pretrained(target, selected_adapters=names)  # noqa: E731
        if not self.both(expected, real):
            return
        for name in self.reference.adapters if names is None else names:
            record = self.reference.adapters[name]
            tensors = load_file(self.path(slot, name) / "adapter_model.safetensors")
            same_bits(plain(tensors), record.tensors, f"the file of {name!r}")
            file = Record(record.label, copy.deepcopy(self.model.peft_config[name]))
            file.tensors, file.room, file.tied = record.tensors, record.room, record.tied
            stepped = record.trains or record.steps
            file.resumes = record.config.method == "ADALORA" and bool(stepped)
            file.steps = record.steps
            found = any(self.path(slot, name).glob("training_state-*"))
            need(found == file.resumes, f"a training state of {name!r}: {found}")
            self.files[slot, name] = file

    def path(self, slot: str, name: str) -> Path:
        return self.folder / slot if name == "default" else self.folder / slot / name

    def double(self, follow: bool) -> None:
        """Go on with a copy of the model, or with the model; what is left must stay as it is."""
        self.check_twin()
        self.reference.cache.clear()
        other = copy.deepcopy(self.model), copy.deepcopy(self.reference), copy.deepcopy(self.raw)
        mine = self.model, self.reference, self.raw
        self.twin = mine if follow else other
        self.model, self.reference, self.raw = other if follow else mine
        if follow:
            self.net = self.model.get_base_model()
            self.modules = {}

    def check_twin(self) -> None:
        if self.twin is not None:
            verify(*self.twin, self.tolerance)

    def train(self, seed: int) -> None:
        """A step of SGD on the mean square."""
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(*IDS.shape, 8, generator=generator)
        reference, y = self.reference, None
        try:
            new = reference.step(target, RATE)
        except Refused as error:
            refused = error
            self.both(lambda: raising(refused), lambda: self.model(IDS))
            return
        y = self.model(IDS)
        need(y.requires_grad == (new is not None), f"the outputs' gradient: {y.requires_grad}")
        if new is None:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=RATE)
        nn.functional.mse_loss(y, target.to(y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, tensors in new.items():
            record = reference.adapters[name]
            record.steps += 1
            self.adopt(name, fresh=True)
            if record.config.method != "ADALORA":  # which has a penalty and a schedule
                for key, want in tensors.items():
                    self.near(record.tensors[key], want, f"{key} of {name!r} after a step")

    def unload(self) -> None:
        if self.both(lambda: self.reference.leave(False), lambda: self.set_bare("unload")):
            self.raw = {}

    def finish(self, names: list[str] | None) -> None:
        """``merge_and_unload``."""
        real = lambda: self.set_bare("merge_and_unload", adapter_names=names)  # noqa: E731
        if self.both(lambda: self.reference.leave(True, names), real):
            self.raw, base = {}, self.reference.base
            for key, tensor in self.model.state_dict().items():
                self.near(tensor, base[key], f"{key} after merge_and_unload")
                base[key] = tensor.detach().clone()
            if self.reference.tied and self.net.embed.weight is not self.net.head.weight:
                self.reference.tied = False
                self.reference.trainable |= {"head.weight"} & {
                    n.replace("embed", "head") for n in self.reference.trainable
                }

    def set_bare(self, call: str, **options: Any) -> None:
        self.model = getattr(self.model, call)(**options)
        need(self.model is self.net, "the user's own model is given back")

    def using(self, names: list[str]) -> None:
        """The outputs of a scope with these adapters; none: of the base."""
        wanted: list[Tensor] = []

        def expected() -> None:
            known = self.reference.known(names)
            self.reference.together(known)
            wanted.append(self.reference.output(known))

        def real() -> None:
            with self.model.using(*names) if names else self.model.disable_adapter():
                y = self.model(IDS)
            for want in wanted:
                self.near(y, want, f"the output of {names}")

        self.both(expected, real)

    def rows(self, names: list[str]) -> None:
        """A mixed batch."""
        wanted: list[Tensor] = []

        def expected() -> None:
            own = [n for n in names if n != "__base__"]
            self.reference.known(own)
            if len(names) != len(IDS):
                raise Refused(f"has {len(names)} entries for a batch of {len(IDS)} rows")
            each = [self.reference.output(() if n == "__base__" else (n,)) for n in names]
            wanted.extend(y[i] for i, y in enumerate(each))

        def real() -> None:
            y = self.model(IDS, adapter_names=names)
            for i, want in enumerate(wanted):
                self.near(y[i], want, f"row {i} of {names}")

        self.both(expected, real)


def one(names: list[str]) -> Any:
    """A single name as it is, as users give it."""
    return names[0] if len(names) == 1 else names


def raising(error: Exception) -> None:
    raise error
