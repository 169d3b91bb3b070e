"""Which operation comes next: mostly what makes sense, and sometimes what must be refused."""

from __future__ import annotations

import random
from typing import Any

from ground import Op
from world import World
from zoo import IDS, ZOO

NAMES = ["a", "default", "lora_A", "weight", "base_layer", "keys", "aa"]
BAD = ["", "a.b", "__base__", "nobody"]
SLOTS = ["s0", "s1"]
MOST = 5  # adapters in one model
WEIGHTS = {
    "add": 10, "load": 8, "swap": 2, "choose": 12, "require": 3, "enable": 4, "mode": 3,
    "rename": 4, "delete": 7, "merge": 10, "unmerge": 7, "spoilt": 2, "combine": 4, "save": 6,
    "double": 2, "train": 12, "unload": 1, "finish": 1, "using": 6, "rows": 6, "attach": 1,
    "attach_broken": 2,
}  # fmt: skip


def propose(drawn: random.Random, world: World) -> Op:
    """The next operation, with all its arguments."""
    reference, files = world.reference, list(world.files)
    if not reference.wrapped:
        if files and drawn.random() < 0.4:
            kind = drawn.choice(["attach_saved", "attach_saved", "attach_broken"])
            return (kind, *drawn.choice(files), name(drawn, world, 0), coin(drawn))
        return ("attach", drawn.choice(list(ZOO)), name(drawn, world, 0), coin(drawn, 0.1))
    kind = drawn.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if reference.merged and coin(drawn, 0.2):  # while it lasts, much is refused
        kind = "unmerge"
    if kind in ("add", "load", "combine") and len(reference.adapters) >= MOST:
        kind = "delete"
    return PROPOSALS[kind](drawn, world)


def coin(drawn: random.Random, p: float = 0.5) -> bool:
    return drawn.random() < p


def name(drawn: random.Random, world: World, taken: float = 0.1) -> str:
    """A name for something new, which with some probability cannot be had."""
    here = list(world.reference.adapters)
    if here and coin(drawn, taken):
        return drawn.choice([*here, *BAD[:3]])
    return drawn.choice([n for n in NAMES if n not in here])


def some(drawn: random.Random, world: World, most: int = 3, wrong: float = 0.06) -> list[str]:
    """Names of adapters, seldom one that nobody has or one twice."""
    here = list(world.reference.adapters)
    if coin(drawn, wrong) or not here:
        return [*drawn.sample(here, min(len(here), 1)), drawn.choice([*BAD[1:], *here])]
    return drawn.sample(here, drawn.randint(1, min(most, len(here))))


def add(drawn: random.Random, world: World) -> Op:
    return "add", drawn.choice(list(ZOO)), name(drawn, world), coin(drawn, 0.2)


def attach(drawn: random.Random, world: World) -> Op:
    return "attach", drawn.choice(list(ZOO)), name(drawn, world), False


def file(drawn: random.Random, world: World) -> tuple[str, str]:
    if not world.files or coin(drawn, 0.05):
        return drawn.choice(SLOTS), "nobody"
    return drawn.choice(list(world.files))


def load(drawn: random.Random, world: World) -> Op:
    slot, old = file(drawn, world)
    have = world.files.get((slot, old))
    alike = [n for n, r in world.reference.adapters.items() if have and r.label == have.label]
    new = drawn.choice(alike) if alike and coin(drawn, 0.5) else name(drawn, world, 0.2)
    return "load", slot, old, new, coin(drawn)


def swap(drawn: random.Random, world: World) -> Op:
    _, slot, old, new, _ = load(drawn, world)
    return "swap", slot, old, new


def merge(drawn: random.Random, world: World) -> Op:
    names = None if coin(drawn, 0.4) else some(drawn, world)
    return "merge", names, drawn.choices([True, "cpu", False], [6, 2, 1])[0]


def combine(drawn: random.Random, world: World) -> Op:
    names = some(drawn, world)
    weights = [drawn.choice([0.5, -0.5, 1.0]) for _ in names]
    return "combine", names, weights, name(drawn, world), drawn.choice(["linear", "cat"])


def save(drawn: random.Random, world: World) -> Op:
    names = None if coin(drawn, 0.3) else some(drawn, world)
    return "save", drawn.choice(SLOTS), names


def rows(drawn: random.Random, world: World) -> Op:
    pool = [*world.reference.adapters, "__base__"]
    names = [drawn.choice(pool) for _ in IDS]
    if coin(drawn, 0.1):
        names = names[1:] if coin(drawn) else ["nobody", *names[1:]]
    return "rows", names


PROPOSALS: dict[str, Any] = {
    "add": add, "attach": attach, "load": load, "swap": swap, "merge": merge, "combine": combine,
    "save": save, "rows": rows,
    "choose": lambda d, w: ("choose", [] if coin(d, 0.03) else some(d, w), coin(d, 0.2)),
    "require": lambda d, w: ("require", some(d, w), coin(d)),
    "enable": lambda d, w: ("enable", coin(d, 0.6)),
    "mode": lambda d, w: ("mode", coin(d)),
    "rename": lambda d, w: ("rename", some(d, w, 1)[-1], name(d, w)),
    "delete": lambda d, w: ("delete", some(d, w, 2)),
    "unmerge": lambda d, w: ("unmerge",),
    "spoilt": lambda d, w: ("spoilt", some(d, w, 1)[-1]),
    "double": lambda d, w: ("double", coin(d)),
    "train": lambda d, w: ("train", d.randrange(1000)),
    "unload": lambda d, w: ("unload",),
    "finish": lambda d, w: ("finish", None if coin(d) else some(d, w)),
    "attach_broken": lambda d, w: ("attach_broken", *load(d, w)[1:]),
    "using": lambda d, w: ("using", [] if coin(d, 0.2) else some(d, w)),
}  # fmt: skip
