"""Runs atheris on every loader: ``python fuzz/run.py --seconds 60`` or ``--inputs 100000``.

Each runs in a process of its own, with 256 MiB above what importing takes and a minute for an
input. What breaks a loader is left in ``--crashes`` (by default ``fuzz/crashes``).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MORE = 256  # MiB above what importing takes
PER_INPUT = 60  # seconds of the clock after which an input hangs, on a busy machine too


def child(name: str, options: list[str]) -> None:
    """One loader, until libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["graftwork", "fuzz_targets"]):
        import fuzz_targets
    import resource

    warnings.simplefilter("ignore")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"imported {peak}", file=sys.stderr, flush=True)

    def one(data: bytes) -> None:
        fuzz_targets.survive(name, data)

    atheris.Setup([sys.argv[0], *options, f"-rss_limit_mb={peak + MORE}"], one)
    atheris.Fuzz()


def fuzz(name: str, limit: list[str], crashes: Path) -> dict[str, Any]:
    """Fuzz one loader; the figures."""
    crashes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        shutil.copytree(HERE / "corpus" / name, work, dirs_exist_ok=True)
        options = [
            work, *limit, f"-timeout={PER_INPUT}", "-max_len=4096", "-print_final_stats=1",
            "-reload=0", "-verbosity=1", f"-artifact_prefix={crashes}/{name}-",
        ]  # fmt: skip
        start = time.monotonic()
        command = [sys.executable, __file__, "--child", name, *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        seconds = time.monotonic() - start
    said = done.stderr
    found = {
        key: int(match[1]) if (match := re.search(pattern, said, re.M)) else 0
        for key, pattern in {
            "inputs": r"stat::number_of_executed_units: *(\d+)",
            "peak": r"stat::peak_rss_mb: *(\d+)",
            "imported": r"^imported (\d+)",
        }.items()
    }
    crashed = done.returncode != 0
    if crashed:
        print(said[-4000:], file=sys.stderr)
    return {
        "inputs": found["inputs"],
        "crashes": int(crashed),
        "seconds": round(seconds, 1),
        "peak_mib": max(0, found["peak"] - found["imported"]),
    }


def main() -> int:
    """Fuzz all loaders, or some, and write the figures."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each loader")
    parser.add_argument("--inputs", type=int, help="for each loader, instead of seconds")
    parser.add_argument("--json", type=Path, help="where figures go; added to those there")
    parser.add_argument("--only", nargs="*", help="loaders")
    parser.add_argument("--crashes", type=Path, default=HERE / "crashes")
    asked = parser.parse_args()
    limit = [f"-runs={asked.inputs}"] if asked.inputs else [f"-max_total_time={asked.seconds}"]
    known = sorted(path.name for path in (HERE / "corpus").iterdir())
    figures: dict[str, Any] = {}
    if asked.json and asked.json.is_file():
        figures = json.loads(asked.json.read_text())
    failed = 0
    for name in asked.only or known:
        now = fuzz(name, limit, asked.crashes)
        failed += now["crashes"]
        before = figures.get(name, dict.fromkeys(now, 0))
        figures[name] = {key: before[key] + now[key] for key in ("inputs", "crashes")} | {
            "seconds": round(before["seconds"] + now["seconds"], 1),
            "peak_mib": max(before["peak_mib"], now["peak_mib"]),
        }
        print(name, now, flush=True)
        if asked.json:
            asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{sum(one['inputs'] for one in figures.values()):,} inputs")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
