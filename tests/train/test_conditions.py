"""Captions on their way into the loop."""

import pytest
import torch
from text_models import POSITIONS, WIDTH, save_text_model

from ul_scale.data.config import DataConfig
from ul_scale.models.text import TextConfig, load_text_encoder, text_identity
from ul_scale.train.conditions import check_embeddings, reading_text, text_facts, with_conditions

CPU = torch.device("cpu")
FACTS = {"encoder": "bert-0123456789", "width": 8, "max_tokens": 16, "precision": "fp32"}


@pytest.fixture
def text(tmp_path) -> TextConfig:
    pytest.importorskip("transformers", reason="text encoders need transformers")
    return TextConfig(encoder=str(save_text_model(tmp_path / "bert")), width=WIDTH, max_tokens=POSITIONS)


def test_captions_become_embeddings_when_their_batch_is_asked_for(text):
    encoder, made = load_text_encoder(text), []

    def batches():
        for texts in (["a cat", "the red dog on the moon"], ["green", "a"]):
            made.append(texts)
            yield {"text": texts, "label": torch.tensor([1, 2])}

    found = with_conditions(batches(), encoder, CPU)
    assert made == []
    for batch in found:
        assert made[-1] == batch["text"] and batch["label"].tolist() == [1, 2]
        embedding, mask = encoder.encode(batch["text"])
        assert torch.equal(batch["text_embedding"], embedding) and torch.equal(batch["text_mask"], mask)
    assert len(made) == 2


def test_without_an_encoder_batches_are_what_they_were():
    batch = {"text": ["a"], "label": torch.tensor([1])}
    [found] = with_conditions(iter([batch]), None, CPU)
    assert found is batch and set(found) == {"text", "label"}


def test_an_encoder_needs_captions(text):
    with pytest.raises(ValueError, match=r"model\.text names an encoder, but the data are read without"):
        next(with_conditions(iter([{"label": torch.tensor([1])}]), load_text_encoder(text), CPU))


def test_a_runs_text_says_what_it_takes_of_its_data():
    data = DataConfig(image_size=8)
    assert reading_text(data, None) == data
    named = reading_text(data, TextConfig(encoder="org/model", width=8))
    stored = reading_text(data, TextConfig(width=8))
    assert (named.captions, named.embeddings) == (True, False)
    assert (stored.captions, stored.embeddings) == (False, True)
    assert reading_text(DataConfig(captions=True), TextConfig(width=8)).captions


def test_stored_embeddings_are_compared_with_the_config(text):
    assert text_facts(text) == FACTS | {"encoder": text_identity(text)}
    check_embeddings(TextConfig(width=8), {"text": FACTS}, "set")
    check_embeddings(TextConfig(encoder="org/model", width=8), {}, "set")
    check_embeddings(None, {}, "set")
    with pytest.raises(ValueError, match=r"model\.text\.encoder is null, but set has no embeddings"):
        check_embeddings(TextConfig(width=8), {"std": 1.0}, "set")
    for other in ({"width": 16}, {"width": 8, "max_tokens": 4}):
        with pytest.raises(ValueError, match=r"of set \(by bert-0123456789\) have 8 and 16"):
            check_embeddings(TextConfig(**other), {"text": FACTS}, "set")
