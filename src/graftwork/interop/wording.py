"""What programs match in PEFT's errors and warnings, said in front of this library's own words."""

from __future__ import annotations

import re

from ..errors import PeftWarning, TargetError


class PeftRuntimeWarning(PeftWarning, RuntimeWarning):
    """A warning of this library that is a RuntimeWarning in PEFT."""


# this library's words -> PEFT's, and of which classes its error or warning is besides
_WORDS: list[tuple[str, str, tuple[type, ...]]] = [
    (r"there is an adapter '(?P<a>.+?)' already", "Adapter with name {a} already exists", ()),
    (
        r"there is no adapter '(?P<a>.+?)'; this model",
        "Adapter {a} not found, Adapter {a} does not exist",
        (),
    ),
    (
        r"what target_modules=(?P<a>.+?) names is not in the model",
        "Target modules {a} not found in the base model. Please check the target modules and try "
        "again",
        (),
    ),
    (
        r"names is excluded or saved as a whole",
        "No modules were targeted for adaptation. This might be caused by a combination of "
        "mismatched target modules and excluded modules",
        (),
    ),
    (
        r"so it is not known which layers to adapt",
        "Please specify `target_modules` in `peft_config`",
        (),
    ),
    (r"(?s)does not fit this adapter and model.*with another shape", "size mismatch", ()),
    (
        r"merging \[(?P<a>.*?)\] would make .* not finite",
        "NaNs detected in the merged weights. The adapter {a} seems to be broken",
        (),
    ),
    (r"(?P<a>\S+) has no adapter_config.json", "Can't find 'adapter_config.json' at '{a}'",
     (ValueError,)),
    (
        r"sets (?P<a>\w+)=.*?, which (?P<b>\w+) does not have",
        "Unexpected keyword arguments ['{a}'] for class {b}, these are ignored",
        (),
    ),
    (r"graftwork has no method '(?P<a>.+?)'", "{a}", (KeyError,)),
    (r"'(?P<a>.*?)' cannot be an adapter's name", 'module name can\'t contain "."', (KeyError,)),
    (
        r"adapter_names has (?P<b>\d+) entries for a batch of (?P<a>\d+)",
        "Length of `adapter_names` should be the same as the number of inputs, but got {b} and {a} "
        "respectively",
        (),
    ),
    (
        r"selected_adapters names .*; this model has (?P<a>\[.*?\])",
        "You passed an invalid `selected_adapters` arguments, current supported adapter names are "
        "{a}",
        (),
    ),
    (
        r"(?P<a>\S+) is a file; give a folder",
        "Provided path ({a}) should be a directory, not a file",
        (ValueError,),
    ),
    (
        r"target_modules names \S+ an? (?P<a>\w+), which is no known weighted layer",
        "Target module {a}() is not supported. Currently, only the following modules are "
        "supported: `torch.nn.Linear`, `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
        "`torch.nn.Conv3d`, `transformers.pytorch_utils.Conv1D`, `torch.nn.MultiheadAttention.`",
        (TargetError,),
    ),
    (
        r"is of the method (?P<a>\w+), the adapter there (?P<b>\w+)",
        "Incompatible PEFT types found: {b} and {a}",
        (),
    ),
    (r"cannot be hot-swapped in, since it computes otherwise", "Configs are incompatible", ()),
    (
        r"the active adapter '(?P<a>.+?)' was deleted; '(?P<b>.+?)' is active",
        "Adapter {a} was active which is now deleted. Setting active adapter to {b}.",
        (),
    ),
    (
        r"are merged already; nothing to merge",
        "All adapters are already merged, nothing to do.",
        (),
    ),
    (r"no adapter is merged; nothing to undo", "Already unmerged. Nothing to do.", ()),
    (r"(?P<a>(rank|alpha)_pattern) .*matches", "{a} does not match any of the target modules",
     (PeftRuntimeWarning,)),
    (
        r"r must be at least 1, not (?P<a>-?\d+)",
        "`r` should be a positive integer value but the value passed is {a}",
        (),
    ),
    (
        r"needs adapters of one rank",
        "All adapters must have the same r value when using combination_type linear, ties, "
        "dare_ties or dare_linear.",
        (),
    ),
    (r"combination_type='(?P<a>\w+)' is not known", "Invalid combination_type: {a}", ()),
]  # fmt: skip
_TABLE = [(re.compile(ours), theirs, kinds) for ours, theirs, kinds in _WORDS]


def worded(text: str) -> tuple[str, tuple[type, ...]]:
    """A message with PEFT's words in front, and the classes that PEFT's has."""
    for pattern, theirs, kinds in _TABLE:
        if found := pattern.search(text):
            return f"{theirs.format(**found.groupdict())}: {text}", kinds
    return text, ()
