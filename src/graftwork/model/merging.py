"""Merging as a ``PeftModel`` does it: counted, probed, and told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.host import Host
from ..engine.root import Grafted
from ..errors import MergeError
from ..fast.rows import tensors_in
from .probe import MergeReport, reporting, tolerance


class Merging(nn.Module):
    """The verbs of a ``PeftModel`` about merging, as its methods."""

    base_model: Grafted
    merge_report: MergeReport | None = None  # on the last merge

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = True,
        keep: bool | str = True,
        probe: Any = None,
    ) -> None:
        """Write adapters into the weights; ``merge_report`` tells what was done.

        Each layer is tried: its new weight has to give what the adapters give, but for the
        rounding. The whole model is checked before anything is changed.

        Args:
            adapter_names: which, the lowest first; those that are active by default.
            safe_merge: PEFT's name for the check, which is always made.
            keep: what becomes of the original weights: True keeps them where they are, ``"cpu"`` in
                main memory, False drops them, so that it cannot be undone.
            probe: a batch, whose outputs before and after are compared as well.

        Raises:
            MergeError: an update is not finite, a layer has no place for it, or the merged weights
                do something else than the adapters; the model is as it was.
        """
        root = self.base_model
        if probe is None:
            self._merge(root, adapter_names, safe_merge, keep)
            return
        names = tuple(dict.fromkeys((*root.switch.merged, *(adapter_names or root.switch.active))))
        with root.using(*names):
            before = _outputs(self, probe)
        self._merge(root, adapter_names, safe_merge, keep or True)
        after, report = _outputs(self, probe), self.merge_report
        assert report is not None
        pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True)]
        report.outputs = max(float((a - b).abs().max()) for a, b in pairs)
        far = max(float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in pairs)
        if not far <= (limit := tolerance(root.model)):
            root.unmerge_adapter()
            raise MergeError(
                f"merging {list(names)} would change what the model computes: outputs for the "
                f"probe differ by {far:.3g} of their norm, and {limit:.3g} is what the dtype "
                "allows. Nothing was changed; run it unmerged, or load the base in fp32"
            )
        for host in root.hosts().values() if not keep else ():
            host.kept, host.originals = not host.originals, {}
        root.switch.tied = root.switch.tied if keep else None

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        probe: Any = None,
    ) -> nn.Module:
        """Write adapters into the weights for good, and give back the plain model;
        ``merge_report`` tells what was done.

        Args:
            progressbar: PEFT's option.
            safe_merge: PEFT's name for the check, which is always made.
            adapter_names: which, the lowest first; those that are active by default.
            probe: a batch, whose outputs before and after are compared as well.
        """
        if not self.base_model.merged().issuperset(adapter_names or self.base_model.switch.active):
            self.merge_adapter(adapter_names, safe_merge, False, probe)
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def _merge(
        self, root: Grafted, names: Sequence[str] | None, safe: bool, keep: bool | str
    ) -> None:
        with root.switch.turns.change(None):  # no other thread unmerges what is not yet counted
            self._merge_alone(root, names, safe, keep)

    def _merge_alone(
        self, root: Grafted, names: Sequence[str] | None, safe: bool, keep: bool | str
    ) -> None:
        before = root.switch.merged
        with reporting() as report:
            root.merge_adapter(names, safe, keep)
        merged = root.switch.merged
        if merged == before:
            return
        report.adapters = list(merged)
        every = {path: host for path, host in root.hosts().items() if host.present(merged)}
        if lost := [path for path, host in every.items() if not _done(host, merged, report)]:
            undone = "the model is as it was before any merge"
            if keep:
                root.unmerge_adapter()
            else:
                undone = "the originals are gone: load the base model again"
            raise MergeError(
                f"merging {list(merged)} left out {len(lost)} of {len(every)} layers, {lost[0]} "
                f"among them, so the result would be partly the base model; {undone}"
            )
        self.merge_report = report


def _done(host: Host, names: tuple[str, ...], report: MergeReport) -> bool:
    return host.path in report.ratios and host.merged_adapters == host.present(names)


def _outputs(model: Any, batch: Any) -> list[Tensor]:
    """What a model gives for a batch, without dropout and without any trace."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    args = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    kwargs = batch if isinstance(batch, Mapping) else {}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            found = tensors_in(model(*args, **kwargs))
    finally:
        for module in training:
            module.training = True
    return [t.detach().clone() for t in found if t.is_floating_point()]
