"""Text encoders against transformers' own models, text by text without padding."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import KINDS, POSITIONS, WIDTH, WORDS, build, save_text_model

from ul_scale.models.text import TextConfig, load_text_encoder, read_text_config, text_identity

pytest.importorskip("transformers", reason="text encoders need transformers")
TEXTS = ["a red cat", "the dog on the moon", "green"]


@pytest.fixture
def bert(tmp_path) -> Path:
    return save_text_model(tmp_path / "bert")


def config(folder: Path, **options) -> TextConfig:
    return TextConfig(**{"encoder": str(folder), "width": WIDTH, "max_tokens": POSITIONS, **options})


@torch.no_grad()
def truth(kind: str, text: str) -> torch.Tensor:
    """Return the embeddings of one text by a model as it was built, not loaded."""
    model = build(kind).eval()
    ids = torch.tensor([[WORDS["[CLS]"], *(WORDS[word] for word in text.split()), WORDS["[SEP]"]]])
    half = {"clip": "text_model", "t5": "encoder", "bart": "encoder"}.get(kind)
    return (getattr(model, half) if half else model)(input_ids=ids).last_hidden_state[0]


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_models_own(kind, tmp_path):
    folder = save_text_model(tmp_path / "model", kind)
    embedding, mask = load_text_encoder(config(folder)).encode(TEXTS)
    assert embedding.shape == (3, 7, WIDTH) and embedding.dtype == torch.float32
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [5, 7, 3]
    for text, tokens, real in zip(TEXTS, embedding, mask):
        torch.testing.assert_close(tokens[real], truth(kind, text), rtol=1e-5, atol=1e-6)
        assert not tokens[~real].any()
    assert read_text_config(str(folder), max_tokens=POSITIONS, precision="fp32") == config(folder)


def test_encoders_are_frozen_quiet_and_leave_the_seed_alone(bert, capfd):
    torch.manual_seed(3)
    encoder = load_text_encoder(config(bert))
    embedding, _ = encoder.encode(TEXTS)
    again, _ = encoder.encode(TEXTS)
    assert torch.equal(embedding, again) and not embedding.requires_grad  # no dropout
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert capfd.readouterr() == ("", "")


def test_long_texts_are_cut(bert):
    encoder = load_text_encoder(config(bert, max_tokens=4))
    embedding, mask = encoder.encode(["the dog on the moon", "a"])
    assert embedding.shape == (2, 4, WIDTH) and mask.sum(1).tolist() == [4, 3]
    torch.testing.assert_close(embedding[0], truth("bert", "the dog"), rtol=1e-5, atol=1e-6)


def test_empty_texts_have_no_tokens_unless_the_tokenizer_adds_some(bert, tmp_path):
    assert load_text_encoder(config(bert)).encode([""])[1].tolist() == [[True, True]]
    bare = save_text_model(tmp_path / "bare", "llama", special=False)
    encoder = load_text_encoder(config(bare))
    for texts, tokens in ((["", ""], [0, 0]), (["", "a cat"], [0, 2])):
        embedding, mask = encoder.encode(texts)
        assert mask.sum(1).tolist() == tokens and torch.isfinite(embedding).all()


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    folder = save_text_model(tmp_path / "model", pad_token=None, eos_token="[SEP]")
    assert load_text_encoder(config(folder)).encode(TEXTS)[1].sum(1).tolist() == [5, 7, 3]
    folder = save_text_model(tmp_path / "other", pad_token=None)
    with pytest.raises(ValueError, match="other: cannot be loaded: its tokenizer has neither padding"):
        load_text_encoder(config(folder))


def test_bf16_is_near_and_leaves_in_fp32(bert):
    exact, _ = load_text_encoder(config(bert)).encode(TEXTS)
    rough, _ = load_text_encoder(config(bert, precision="bf16")).encode(TEXTS)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.05)


def test_threads_may_share_an_encoder(bert):
    encoder = load_text_encoder(config(bert))
    texts = [[" ".join(["cat"] * (1 + n % 9))] for n in range(200)]
    ready = threading.Barrier(4)

    def work(first: int) -> list[int]:
        ready.wait()
        return [int(encoder.encode(text)[1].sum()) for text in texts[first::4]]

    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(work, range(4)))
    assert counts == [[3 + n % 9 for n in range(first, 200, 4)] for first in range(4)]


def test_weights_in_several_files_are_the_same_model(bert):
    whole, _ = load_text_encoder(config(bert)).encode(TEXTS)
    state = load_file(bert / "model.safetensors")
    names = {key: f"model-{number % 2}.safetensors" for number, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: value for key, value in state.items() if names[key] == name}, bert / name)
    (bert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (bert / "model.safetensors").unlink()
    assert torch.equal(load_text_encoder(config(bert)).encode(TEXTS)[0], whole)
    (bert / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no whole model\.safetensors"):
        load_text_encoder(config(bert))


def test_an_identity_is_of_content_and_of_no_place(bert, tmp_path):
    def identity() -> str | None:
        return text_identity(config(bert))

    first = identity()
    assert first is not None and first.startswith("bert-")
    moved = save_text_model(tmp_path / "elsewhere" / "bert")
    assert text_identity(config(moved)) == first
    state = load_file(moved / "model.safetensors")
    state["encoder.layer.1.output.dense.bias"][3] += 1e-3  # same header, same size
    save_file(state, moved / "model.safetensors", metadata={"format": "pt"})
    assert text_identity(config(moved)) != first
    tokenizer = bert / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"moon"', '"noon"'))
    assert identity() != first
    assert (
        text_identity(TextConfig(encoder="google/t5-v1_1-xxl@main", width=4096)) == "google/t5-v1_1-xxl@main"
    )
    assert text_identity(TextConfig(width=8)) is None


def test_pickled_weights_and_code_are_not_loaded(bert):
    ran = bert / "ran"
    source = f"open({str(ran)!r}, 'w')\nfrom transformers import BertConfig, BertModel\n"
    (bert / "mine.py").write_text(source)
    values = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(
        json.dumps(values | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.BertConfig"}})
    )
    with pytest.raises(ValueError, match=r"bert: has no usable config\.json"):
        load_text_encoder(config(bert))
    (bert / "config.json").write_text(json.dumps(values))
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no whole model\.safetensors \(pickled weights are not loaded"):
        load_text_encoder(config(bert))
    assert not ran.exists()


def test_there_may_be_nothing_to_load():
    assert load_text_encoder(None) is None and load_text_encoder(TextConfig(width=8)) is None


def test_what_does_not_fit_is_named(bert):
    with pytest.raises(ValueError, match=r"model\.text\.width is 16, but .*bert has 8"):
        load_text_encoder(config(bert, width=16))
    with pytest.raises(ValueError, match="max_tokens is 77 .*, but .*bert takes 16"):
        load_text_encoder(config(bert, max_tokens=77))
    with pytest.raises(ValueError, match="max_tokens is 77 .*, but .*bert takes 16"):
        read_text_config(str(bert), max_tokens=77, precision="fp32")
    with pytest.raises(ValueError, match=r"model\.text\.max_tokens is 0; expected 1 or more"):
        config(bert, max_tokens=0)
    with pytest.raises(ValueError, match=r"model\.text\.precision is 'fp8'; expected one of fp32, bf16"):
        config(bert, precision="fp8")


def test_what_is_not_there_is_named(bert, monkeypatch):
    with pytest.raises(ValueError, match="text encoder ../gone: is no folder, nor can the hub give it"):
        load_text_encoder(config(Path("../gone")))
    state = load_file(bert / "model.safetensors")
    del state["encoder.layer.0.output.dense.bias"]
    save_file(state, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, such as encoder\.layer\.0\.output"):
        load_text_encoder(config(bert))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'ul-scale\[text\]'"):
        load_text_encoder(config(bert))


def test_a_folder_without_a_tokenizer_is_named(bert):
    (bert / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="bert: cannot be loaded"):
        load_text_encoder(config(bert))
