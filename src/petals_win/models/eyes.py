"""Models whose part for images needs a package of its own are built without it, since only their text is served.

Knows the one family of this kind, Gemma 3n, and how transformers builds models of several parts.
"""

from __future__ import annotations

from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedConfig, PreTrainedModel


class _NoEyesConfig(Gemma3nVisionConfig):
    """As it is, for what embeds the ids of image tokens asks it for sizes."""


class _NoEyes(PreTrainedModel):
    """Without modules."""

    config_class = _NoEyesConfig


AutoModel.register(_NoEyesConfig, _NoEyes, exist_ok=True)


def without_eyes(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration itself, which is changed so that a model of it is built without the part for images."""
    if config.model_type == "gemma3n":
        config.vision_config.__class__ = _NoEyesConfig  # pyright: ignore[reportAttributeAccessIssue]
    return config
