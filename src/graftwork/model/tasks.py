"""The task classes: they differ in the heads that are saved with the adapter."""

from __future__ import annotations

from ..config import PeftConfig, TaskType
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


MixedModel = PeftMixedModel

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
