"""The task classes, which differ in the heads that are saved, and ``get_peft_model``."""

from __future__ import annotations

from copy import copy

from torch import nn

from ..config import PeftConfig, TaskType
from ..errors import warn
from .peft_model import PeftModel


class PeftModelForSequenceClassification(PeftModel):
    """A classifier; its head, ``classifier`` or ``score``, is trained and saved as a whole."""

    TASK = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """A tagger; its head, ``classifier`` or ``score``, is trained and saved as a whole."""

    TASK = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """Extractive question answering; its head, ``qa_outputs``, is trained and saved as a whole."""

    TASK = TaskType.QUESTION_ANS


class PeftModelForCausalLM(PeftModel):
    """A causal language model."""

    TASK = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""

    TASK = TaskType.SEQ_2_SEQ_LM


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder that gives features."""

    TASK = TaskType.FEATURE_EXTRACTION


class PeftMixedModel(PeftModel):
    """PEFT's class for models that mix methods; every model here may, and can be saved."""


TASK_CLASSES: dict[str, type[PeftModel]] = {
    cls.TASK.value: cls
    for cls in (
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        PeftModelForQuestionAnswering,
        PeftModelForCausalLM,
        PeftModelForSeq2SeqLM,
        PeftModelForFeatureExtraction,
    )
    if cls.TASK
}


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The wrapper's class for a config's task."""
    return TASK_CLASSES.get(getattr(config.task_type, "value", ""), PeftModel)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put an adapter into a model, in place, and freeze the rest.

    Args:
        model: the model to adapt.
        peft_config: the method, such as ``LoraConfig(r=8)``.
        adapter_name: the adapter's name.
        mixed: PEFT's option for models that mix methods; every model here may.
        autocast_adapter_dtype: keep the adapter in fp32 where the model is in fp16 or bf16.
        revision: the base model's revision on the hub, noted in the config.
        low_cpu_mem_usage: leave the adapter on the meta device, for a file that follows.

    Raises:
        StateError: the model has adapters already.
        TargetError: the config means layers that the model does not have.
    """
    peft_config = copy(peft_config)
    peft_config.base_model_name_or_path = (
        model.__dict__.get("name_or_path") or peft_config.base_model_name_or_path
    )
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warn(f"revision={revision!r} replaces the config's {peft_config.revision!r}")
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else class_for(peft_config)
    return cls(
        model,
        peft_config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
