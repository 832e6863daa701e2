"""Tiny text encoders with random weights and a tokenizer of a dozen words, as transformers saves them."""

from pathlib import Path

import torch

_VOCABULARY = "[PAD] [UNK] [CLS] [SEP] a red green cat dog on the moon"
WORDS = {word: number for number, word in enumerate(_VOCABULARY.split())}
WIDTH, POSITIONS = 8, 16
KINDS = ("bert", "t5", "clip", "clip text", "llama", "bart")


def build(kind: str):
    """Return a tiny model; of CLIP, T5 and BART with the half that embeds no text."""
    import transformers as hf

    layers = {"vocab_size": len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = {"hidden_size": WIDTH, "intermediate_size": 16, "max_position_embeddings": POSITIONS, **layers}
    clip = {**shape, "eos_token_id": WORDS["[SEP]"], "bos_token_id": WORDS["[CLS]"], "pad_token_id": 0}
    pixels = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**shape))
    if kind == "t5":
        t5 = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=len(WORDS), **t5))
    if kind == "clip":
        images = {"image_size": 8, "patch_size": 4, **pixels}
        return hf.CLIPModel(hf.CLIPConfig(text_config=clip, vision_config=images))
    if kind == "clip text":
        return hf.CLIPTextModel(hf.CLIPTextConfig(**clip))
    if kind == "llama":
        return hf.LlamaModel(hf.LlamaConfig(**shape))
    half = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    size = {"d_model": WIDTH, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    return hf.BartModel(
        hf.BartConfig(vocab_size=len(WORDS), max_position_embeddings=POSITIONS, **half, **size)
    )


def save_text_model(folder: Path, kind: str = "bert", *, special: bool = True, **options) -> Path:
    """Save a tiny model and its tokenizer, which with ``special`` puts texts between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        ends = [("[CLS]", WORDS["[CLS]"]), ("[SEP]", WORDS["[SEP]"])]
        words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", **{"pad_token": "[PAD]", **options}
    )
    build(kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
