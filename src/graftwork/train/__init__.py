"""Training from a recipe: data, plan, run, and the folder that needs nothing else afterwards."""

import os

# In bf16 on a CPU, PyTorch keeps a compiled kernel for each shape that it meets, 1,024 of them in
# two caches: with sequences of many lengths that is gigabytes. 64 hold the shapes of one step.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")
