"""Saving where the system refuses: "full" past a limit of the size of files, "readonly" without the
right to write; and "writers", two processes at once, so many ROUNDS. Prints JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")

from kill_program import Tried, forked, listed  # noqa: E402
from shapes import SHAPES, base, told  # noqa: E402

from graftwork import FileError, PeftConfig, PeftModel  # noqa: E402


def refused(tried: Tried, where: Path, prepare: Any) -> dict[str, Any]:
    """What a save says in a child that ``prepare`` has limited, and what is there afterwards."""
    before, text = listed(where), where / "text"
    with open(text, "w") as told:

        def run() -> None:
            os.chdir(where)
            prepare()
            try:
                tried.savers[1](Path("adapter"))
            except FileError as error:
                os.write(told.fileno(), str(error).encode())
            os._exit(0)

        _, status = os.waitpid(forked(run), 0)
    said = text.read_text()
    text.unlink()
    same = tried.read() == tried.found[0]
    return {"status": status, "error": said, "old": same, "left": sorted(listed(where) ^ before)}


def small() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))


def powerless() -> None:
    Path().chmod(0o755)
    for path in (Path("adapter"), *Path("adapter").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.getuid() == 0:  # who may do everything
        os.setgid(65534)
        os.setuid(65534)


def alone(tried: Tried) -> str:
    """What one call of loading finds."""
    if tried.name == "config":
        return str(PeftConfig.from_pretrained(tried.folder).to_json())
    model = PeftModel.from_pretrained(base(), tried.folder, is_trainable=True)
    schedule = model.base_model.switch.schedules.get("default")
    return repr((told(model), schedule and schedule.step))


def writers(tried: Tried, rounds: int) -> dict[str, Any]:
    """Two processes save, a third one reads meanwhile."""

    def run(which: int) -> None:
        for _ in range(rounds):
            tried.savers[which](tried.folder)
        os._exit(0)

    wanted = []
    for which in (1, 0):
        tried.savers[which](tried.folder)
        wanted.insert(0, alone(tried))
    assert wanted[0] != wanted[1]
    children = [forked(lambda which=which: run(which)) for which in (0, 1)]  # type: ignore[misc]
    found: dict[str, int] = {"first": 0, "second": 0, "mixed": 0}
    ended: dict[int, int] = {}
    while len(ended) < 2:
        for child in children:
            if child not in ended and (status := os.waitpid(child, os.WNOHANG))[0]:
                ended[child] = status[1]
        seen = alone(tried)
        known = wanted.index(seen) if seen in wanted else 2
        found[list(found)[known]] += 1
        time.sleep(0.001)
    left = sorted(listed(tried.folder) - tried.names[0] - tried.names[1])
    return {"statuses": list(ended.values()), **found, "left": left}


def main(rounds: int) -> Any:
    report: dict[str, Any] = {"full": {}, "readonly": {}, "writers": {}}
    for name in ("several", "X-LoRA", "in training", "config"):
        with tempfile.TemporaryDirectory() as where:
            tried = Tried(name, SHAPES[name], Path(where))
            report["full"][name] = refused(tried, Path(where), small)
            report["writers"][name] = writers(tried, rounds)
            tried.savers[0](tried.folder)
            report["readonly"][name] = refused(tried, Path(where), powerless)
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(int(sys.argv[1]))))
