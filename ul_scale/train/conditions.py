"""Captions of batches become embeddings on their way into the loop, which then sees tensors alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from ul_scale.data.config import DataConfig
from ul_scale.data.stream import Batch
from ul_scale.models.text import TextConfig, TextEncoder, text_identity


def with_conditions(
    batches: Iterator[Batch], text_encoder: TextEncoder | None, device: torch.device
) -> Iterator[Batch]:
    """Yield batches with ``text_embedding`` and ``text_mask`` on the device, made when they are asked for.

    Args:
        batches: with ``text``, where there is an encoder.
        text_encoder: None if there is no text, or if its embeddings are in the data.
        device: where the embeddings go.

    Raises:
        ValueError: if there is an encoder, and no text.
    """
    for batch in batches:
        if text_encoder is not None:
            if "text" not in batch:
                raise ValueError("model.text names an encoder, but the data are read without captions")
            embedding, mask = text_encoder.encode(batch["text"])
            batch["text_embedding"], batch["text_mask"] = embedding.to(device), mask.to(device)
        yield batch


def reading_text(data: DataConfig, text: TextConfig | None) -> DataConfig:
    """Return how data are read for a run with this text: ``model.text`` alone says what it takes."""
    if text is None:
        return data
    stored = text.encoder is None
    return replace(data, captions=data.captions or not stored, embeddings=data.embeddings or stored)


def check_embeddings(text: TextConfig | None, facts: dict[str, Any], url: str) -> None:
    """Check the embeddings of a set against the config of a run that is to take them from there.

    Args:
        text: of the run.
        facts: what the set's index says, its ``extra``.
        url: of the set.

    Raises:
        ValueError: if it has none, or of another width, or longer ones.
    """
    if text is None or text.encoder is not None:
        return
    found = facts.get("text")
    if found is None:
        raise ValueError(
            f"model.text.encoder is null, but {url} has no embeddings of captions; run ul-scale encode with "
            "--text-encoder, or name the encoder"
        )
    if found["width"] != text.width or found["max_tokens"] > text.max_tokens:
        raise ValueError(
            f"model.text has width {text.width} and max_tokens {text.max_tokens}, but the embeddings of "
            f"{url} (by {found['encoder']}) have {found['width']} and {found['max_tokens']}"
        )


def text_facts(text: TextConfig) -> dict[str, Any]:
    """Return what a set says of embeddings that it stores: which encoder made them, and their shape."""
    return {
        "encoder": text_identity(text),
        "width": text.width,
        "max_tokens": text.max_tokens,
        "precision": text.precision,
    }
