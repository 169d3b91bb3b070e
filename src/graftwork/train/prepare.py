"""Everything up to the first step: examples, tokenizer, samples, the model with its adapter, and
the plan. Mistakes in the recipe or the data end here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import GraftworkError
from ..model.peft_model import PeftModel
from ..model.tasks import get_peft_model
from ..parts.whole import Copy
from ..prompts.config import PromptConfig
from ..prompts.tokens import TokensConfig
from . import base, corpus, options, plan
from .corpus import Corpus
from .defaults import defaults
from .plan import Plan
from .recipe import Recipe, RecipeError
from .tasks import Encoded, Spec, Task
from .ways import Ways, choose

Say = Callable[[str], None]
SHORTEST = 4  # tokens that a text may be cut to


@dataclass(frozen=True)
class Prepared:
    """All that a training needs.

    Args:
        recipe: with absolute paths.
        corpus: the examples.
        spec: what the adapter's user must know.
        tokenizer: the base model's.
        model: with the adapter in it.
        train: samples to train on.
        test: samples held out.
        plan: what is going to happen.
        precision: in which it computes.
        remarks: what the user should know.
        ways: how it computes.
    """

    recipe: Recipe
    corpus: Corpus
    spec: Spec
    tokenizer: Any
    model: PeftModel
    train: Encoded
    test: Encoded
    plan: Plan
    precision: str
    remarks: list[str]
    ways: Ways


def settle(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths and a name for the output."""
    changes: dict[str, Any] = {"model": base.resolve(recipe.model)}
    for key in ("data", "test_data"):
        path = getattr(recipe, key)
        if path is not None and Path(path).expanduser().exists():
            changes[key] = str(Path(path).expanduser().resolve())
    changes["output"] = output_of(recipe.output, changes.get("data", recipe.data), recipe.method)
    return recipe.model_copy(update=changes)


def output_of(output: str | None, data: str, method: str) -> str:
    """The folder to write, as an absolute path; by default named after the data and the method."""
    path = Path(data).expanduser()
    stem = path.resolve().parent.name if path.stem.lower() in ("train", "data") else path.stem
    return str(Path(output or f"{stem or 'graft'}-{method.lower()}").expanduser().resolve())


def prepare(recipe: Recipe, say: Say) -> Prepared:
    """Make ready for a training.

    Args:
        recipe: what to train.
        say: told what is being done.

    Raises:
        RecipeError: something in the recipe or the data does not fit.
    """
    recipe = settle(recipe)
    say("reading the data")
    found = corpus.gather(recipe)
    task = found.task
    say("loading the tokenizer")
    tokenizer = base.load_tokenizer(recipe.model, recipe.revision)
    spec = task.spec(found.columns, recipe, tokenizer, found.train)
    config = base.load_config(recipe.model, recipe.revision, **task.config(spec, tokenizer))
    _check_base(task, config, recipe, found)
    method = _method(recipe, task, spec)
    virtual = _virtual(method, task, recipe, config)
    _set_dropout(recipe, config)
    limit = _limit(recipe, task, base.longest(tokenizer, config), virtual)
    spec = replace(spec, max_length=limit)
    say("encoding the data")
    train = task.encode(found.train, spec, tokenizer, corpus.short(recipe.data))
    test = task.encode(found.test, spec, tokenizer, found.held)
    steps, epochs = plan.count_steps(recipe, len(train.samples))
    say("loading the base model")
    precision = base.choose_precision(recipe.precision)
    keys = max(train.samples.lengths()) + (method.n if method.is_prompt_learning else 0)
    recipe = _with_attention(recipe, config, keys)
    model = adapted(recipe, task, spec, config, steps)
    say("trying the model")
    pad = tokenizer.pad_token_id
    ways = choose(recipe, task, model, train.samples, pad, precision, epochs)
    say("estimating the memory")
    with ways.computing(model):
        made = _plan(recipe, task, model, train, steps, epochs, precision, pad)
    remarks = [
        *found.remarks,
        *_long(train, spec, task, "training"),
        *_long(test, spec, task, "held-out"),
        *_tight(made),
        *_random(recipe),
    ]
    return Prepared(
        recipe, found, spec, tokenizer, model, train, test, made, precision, remarks, ways
    )


def _set_dropout(recipe: Recipe, config: Any) -> None:
    """The base's dropout: the user's, or the method's where the model has any."""
    usual = defaults(recipe.method).base_dropout if base.dropouts(config) else None
    dropout = usual if recipe.base_dropout is None else recipe.base_dropout
    if dropout is not None:
        base.set_dropout(config, dropout)


def _with_attention(recipe: Recipe, config: Any, keys: int) -> Recipe:
    """The recipe with the kernel that is used for so many keys, which the config notes too."""
    kernel = base.choose_attention(recipe.attention, keys)
    base.set_attention(config, kernel)
    return recipe.model_copy(update={"attention": kernel})


def _check_base(task: Task, config: Any, recipe: Recipe, found: Corpus) -> None:
    try:
        task.check_base(config, recipe.model)
    except RecipeError as error:
        if recipe.task != "auto":
            raise
        raise RecipeError(
            f"{error}. The task was chosen by the columns of {corpus.short(recipe.data)} "
            f"({', '.join(found.present)}); to classify, say which of them is the label: "
            "--label-column ..."
        ) from error


def _method(recipe: Recipe, task: Task, spec: Spec) -> Any:
    """The method's config, as far as it is known before the training data is encoded.

    Raises:
        RecipeError: the method cannot learn this task, or not from such data.
    """
    values, name = recipe.method_options, recipe.method
    tasks = options.TASKS.get(name, "")
    if (values.get(tasks) or 1) > 1:
        raise RecipeError(
            f"--{tasks.replace('_', '-')}: each row would need the number of its task, which no "
            "column gives here; leave it out, or train in Python with model(..., task_ids=)"
        )
    try:
        method = make(recipe, task, spec, 10**6)
    except options.OptionError as error:
        raise RecipeError(
            f"--method: {name} does not learn the task {task.name} like this: {error.__cause__}"
        ) from error
    if name == "CPT" and not values.get("cpt_token_ids"):
        raise RecipeError(
            "--cpt-token-ids is missing: CPT begins at the embeddings of examples; give the "
            "numbers of their tokens, as in --cpt-token-ids 5,17,3, and with "
            "--cpt-tokens-type-mask what each of them is"
        )
    return method


def make(recipe: Recipe, task: Task, spec: Spec, steps: int, **more: Any) -> Any:
    """The method's config for this task; ``more``: values beside the user's."""
    values = {**recipe.method_options, **more}
    values |= options.filled(recipe.method, values, recipe.model, spec.labels)
    return options.make(recipe.method, values, steps, task_type=task.kind)


def _virtual(method: Any, task: Task, recipe: Recipe, config: Any) -> int:
    """How many positions of the base model are not there for the text."""
    if not method.is_prompt_learning:
        return 0
    return base.taken(method, base.model_class(task.model_class, recipe.model, config))


def _limit(recipe: Recipe, task: Task, most: int | None, virtual: int) -> int:
    room, wanted = None if most is None else most - virtual, recipe.max_length
    if room is not None and room < SHORTEST:
        raise RecipeError(
            f"{virtual} virtual tokens leave {max(0, room)} of the base model's {most} positions "
            "for a text; use fewer of them"
        )
    if wanted is None:
        return min(task.length, room or task.length)
    if room is not None and wanted > room:
        rest = f", {virtual} of them virtual, so {room} of a text" if virtual else ""
        raise RecipeError(
            f"--max-length: the base model takes at most {most} tokens{rest}, not {wanted}"
        )
    return wanted


def adapted(recipe: Recipe, task: Task, spec: Spec, config: Any, steps: int) -> PeftModel:
    """The base model with a new adapter in it.

    Modules that the base model's files lack start from noise, so they are trained as a whole.
    """
    model, new = base.load_model(
        task.model_class, recipe.model, config, recipe.precision, recipe.revision, recipe.seed
    )
    more: dict[str, Any] = {}
    if new and task.model_class == "AutoModelForCausalLM":
        raise RecipeError(
            f"--model: {recipe.model} lacks the weights of {', '.join(new[:3])}, which a "
            f"{type(model).__name__} needs, so it would write noise; is it a language model?"
        )
    if new and options.is_targeted(recipe.method):
        own = recipe.method_options.get("modules_to_save") or []
        more["modules_to_save"] = sorted({*own, *new})
    method = make(recipe, task, spec, steps, **more)
    model.config.use_cache = False  # nothing is generated in training
    if recipe.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        # transformers made the embeddings' output ask for a gradient, for reentrant checkpointing:
        # then every block below the adapters would compute one
        model.disable_input_require_grads()
    try:
        return get_peft_model(model, method, revision=recipe.revision)
    except GraftworkError:
        raise
    except ValueError as error:  # an option that does not fit this base model
        raise options.refused(recipe.method, error) from error


def _plan(
    recipe: Recipe, task: Task, model: PeftModel, train: Encoded, steps: int, epochs: float,
    precision: str, pad: int,
) -> Plan:  # fmt: skip
    trainable, every = model.get_nb_trainable_parameters()
    rates = defaults(recipe.method)
    usual = rates.rate if task.higher_is_better else rates.language_rate
    has_head = any(isinstance(m, Copy) for m in model.modules())
    config = model.active_peft_config
    virtual = config.n if isinstance(config, PromptConfig) else 0
    longer = virtual if isinstance(config, TokensConfig) else 0
    sites = {row.site: row.method for row in model.adapters()}
    own = [site for site, method in sites.items() if method != Copy.__name__]  # not the new head
    return Plan(
        trainable,
        every,
        1 if longer else len(own or sites),
        steps,
        epochs,
        recipe.learning_rate or usual,
        (recipe.head_learning_rate or rates.head_rate) if has_head else None,
        plan.estimate(model, train.samples, recipe, pad, precision, longer),
        plan.available(model.get_base_model().device),  # type: ignore[arg-type]
        virtual,
    )


def _long(found: Encoded, spec: Spec, task: Task, what: str) -> Sequence[str]:
    if not found.long:
        return ()
    return (
        f"{found.long:,} {what} texts are longer than {spec.max_length} tokens (the longest has "
        f"{found.longest:,}) and are {task.cutting}; --max-length sets the limit",
    )


def _random(recipe: Recipe) -> Sequence[str]:
    if recipe.method != "CARTRIDGE":
        return ()
    return (
        "a cartridge is meant to begin as the keys and values of a text, and here it begins at "
        "random; in Python, initialize_kv_prefix_from_text gives it a text",
    )


def _tight(made: Plan) -> Sequence[str]:
    if made.memory.total < made.available:
        return ()
    return (
        "the estimate exceeds the free memory; halve --batch-size and double "
        "--gradient-accumulation, or use --gradient-checkpointing",
    )
