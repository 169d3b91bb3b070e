"""AutoPeftModel: the base model and its adapter from the adapter's folder alone."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..errors import FileError
from ..files.codec import PREFIX
from ..files.folder import config_of, read_tensors
from ..files.hub import Source
from . import vocabulary
from .peft_model import PeftModel
from .tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)


class AutoPeftModel:
    """Loads the base model that an adapter's config names, then the adapter."""

    BASE: str | None = (
        None  # the class of transformers that loads the base model; None: what the config says
    )
    WRAPPER: type[PeftModel] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is used as {type(self).__name__}.from_pretrained(folder)"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter in it.

        Args:
            pretrained_model_name_or_path: the adapter's folder or hub id.
            adapter_name: the name that the adapter gets.
            is_trainable: whether it will be trained on.
            config: used instead of the folder's config.
            revision: the adapter's revision on the hub.
            **kwargs: the base model's options, such as ``dtype`` and ``device_map``; ``subfolder``,
                ``token`` and the like are the adapter's.

        Raises:
            FileError: the folder names no base model, or one of a class that is not transformers'.
        """
        loading = ("subfolder", "strict", "allow_pickle", "key_mapping")
        own: dict[str, Any] = {k: kwargs.pop(k) for k in loading if k in kwargs}
        both = ("token", "cache_dir", "local_files_only", "force_download")
        hub: dict[str, Any] = {k: kwargs[k] for k in both if k in kwargs}
        if revision is not None:
            hub["revision"] = revision
        source = Source(pretrained_model_name_or_path, own.get("subfolder"), **hub)
        given, config = config, config or config_of(source)
        if not config.base_model_name_or_path:
            raise FileError(
                f"{source} does not say which base model it is for; load that model yourself and "
                "use PeftModel.from_pretrained(model, folder)"
            )
        loader = cls._loader(config, str(source))
        base: nn.Module = loader.from_pretrained(
            config.base_model_name_or_path, revision=config.revision or "main", **kwargs
        )
        tensors = read_tensors(source, allow_pickle=bool(own.get("allow_pickle")))
        vocabulary.grow(base, config, tensors, PREFIX)
        wrapper = cls.WRAPPER
        return wrapper.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, given, **own, **hub
        )

    @classmethod
    def _loader(cls, config: PeftConfig, where: str) -> Any:
        import transformers

        if cls.BASE is not None:
            return getattr(transformers, cls.BASE)
        task = getattr(config.task_type, "value", None)
        if task is not None:
            return getattr(transformers, _BASES[task])
        mapping = config.auto_mapping or {}
        name, library = mapping.get("base_model_class"), str(mapping.get("parent_library"))
        if (
            name
            and library.partition(".")[0] == "transformers"
            and isinstance(getattr(transformers, name, None), type)
        ):
            return getattr(transformers, name)
        raise FileError(
            f"{where} was trained on a {name} of {library}, which is not loaded from a file's "
            "word; build the base model yourself and use PeftModel.from_pretrained(model, folder)"
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model with its adapter."""

    BASE, WRAPPER = "AutoModelForCausalLM", PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder language model with its adapter."""

    BASE, WRAPPER = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier with its adapter."""

    BASE, WRAPPER = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A tagger with its adapter."""

    BASE, WRAPPER = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Extractive question answering with its adapter."""

    BASE, WRAPPER = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """An encoder with its adapter."""

    BASE, WRAPPER = "AutoModel", PeftModelForFeatureExtraction


_BASES = {
    cls.WRAPPER.TASK.value: cls.BASE
    for cls in (
        AutoPeftModelForCausalLM,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForFeatureExtraction,
    )
    if cls.WRAPPER.TASK and cls.BASE
}
