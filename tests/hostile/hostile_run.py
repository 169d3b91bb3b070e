"""Tries hostile folders in a process of its own: what happens, under a hook that sees everything
that Python does outside of it, and how much memory that takes. The folders are arguments.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

HARM = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "socket.getaddrinfo", "socket.bind", "ctypes.dlopen", "os.remove", "os.rename", "os.mkdir",
    "os.rmdir", "shutil.rmtree", "urllib.Request", "webbrowser.open", "exec", "import",
)  # fmt: skip
CODE = (".py", ".pyc", ".so")
SEEN: list[str] = []


def watch(folder: Path) -> None:
    """Note each import, each command, and each file that is opened elsewhere."""
    code = [os.path.realpath(one) for one in sys.path if one]

    def hook(event: str, args: Any) -> None:
        if event in HARM:
            SEEN.append(f"{event} {str(args)[:200]}")
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            ours = path.startswith(tuple(code)) and path.endswith(CODE)
            if not ours and not path.startswith(os.path.realpath(folder)):
                SEEN.append(f"open {path}")

    sys.addaudithook(hook)


def peak() -> int:
    """MiB that this process has held at most."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Print a line for each folder: how it ended, CPU seconds, what was seen, and MiB so far."""
    import torch

    from graftwork import METHODS, PeftModel
    from graftwork.cli import inspect as shown
    from graftwork.errors import GraftworkError
    from graftwork.files.hub import Source
    from graftwork.table import method
    from graftwork.testing.entry import Small

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    good, every = Path(sys.argv[1]), Path(sys.argv[2])
    for name in METHODS:  # what is imported once is imported before
        assert method(name).config
    import_module("graftwork.files.readings")  # of a file that does not fit as it is
    shown._found(str(good))
    for options in ({}, {"allow_pickle": True}, {"is_trainable": True}):
        PeftModel.from_pretrained(Small(), good, **options)
    for warm in sorted((every / "warm").iterdir()):
        try:
            PeftModel.from_pretrained(Small(), warm, allow_pickle=True)
        except GraftworkError:
            pass
    watch(every)
    before = peak()
    for folder in sorted((every / "cases").iterdir()):
        for how in ("load", "trust", "inspect"):
            base, ended = Small(), "read"
            names = [name for name, _ in base.named_modules()]
            SEEN.clear()
            start = time.process_time()
            try:
                if how == "inspect":
                    shown._found(str(folder))
                else:
                    PeftModel.from_pretrained(base, folder, allow_pickle=how == "trust")
            except GraftworkError as error:
                ended = f"refused {error}"
                if [name for name, _ in base.named_modules()] != names:
                    ended = "changed the model"
            except BaseException as error:
                ended = f"raised {error!r}"
            seconds = time.process_time() - start
            line = [folder.name, how, ended[:6000], seconds, list(SEEN), peak() - before]
            print(json.dumps(line), flush=True)
    assert Source(good).find("adapter_config.json")


if __name__ == "__main__":
    main()
