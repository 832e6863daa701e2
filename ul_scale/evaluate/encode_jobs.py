"""Which shards of latents a run's data become, what they hold, and which of them are there already."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ul_scale.checkpoint import files
from ul_scale.data.config import DataConfig
from ul_scale.data.index import Index, open_index
from ul_scale.data.latents import DTYPES, Summary, is_complete, shard_name
from ul_scale.models.text import PRECISIONS, TextConfig, read_text_config
from ul_scale.train.conditions import text_facts
from ul_scale.train.prepare import latents_dir

SPLITS = ("train", "val")
RECORDS = "_encoding"
FORMAT_VERSION = 1

BATCHES_AHEAD = 2
"""Of each shard, read and decoded while one is encoded."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How latents are made and stored."""

    dtype: str = "fp32"
    """Of what is stored, fp32 or fp16; the statistics are of what is stored."""
    flipped: bool = False
    """Also store the latents of the mirror images, from which ``data.horizontal_flip`` then chooses."""
    captions: bool | None = None
    """Keep captions; by default, if the source has them. A sample without one is then left out."""
    text_encoder: str | None = None
    """Also store the embeddings of captions, in fp16, by this transformers model: a folder, or a hub name."""
    max_tokens: int = 77
    """Of a caption; longer ones are cut."""
    text_precision: str = "fp32"
    """Of the text encoder's weights and activations, fp32 or bf16."""
    given_frames: int | None = None
    """Also store the latents of each clip's first so many frames, encoded alone, for base models that are
    conditioned on them: a clip's own latent frames also know of later ones."""
    batch_size: int = 100
    """Images that are encoded at a time, which may decide last bits."""
    samples_per_shard: int = 1000
    """Of the source, also where some of them are left out."""
    max_bad_fraction: float | None = None
    """Share of the samples that may be left out; ``data.max_bad_fraction`` of the run by default."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype is {self.dtype}; expected one of {', '.join(DTYPES)} (.npy files hold no bf16)"
            )
        if self.text_precision not in PRECISIONS:
            raise ValueError(
                f"text_precision is {self.text_precision}; expected one of {', '.join(PRECISIONS)}"
            )
        if self.text_encoder is not None and self.captions is False:
            raise ValueError("text_encoder is set and captions are left out; expected captions with it")
        for name in ("batch_size", "samples_per_shard", "max_tokens", "given_frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.max_bad_fraction is not None and not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; expected 0 to 1")
        for name in ("max_tokens", "text_precision") if self.text_encoder is None else ():
            if getattr(self, name) != getattr(EncodeConfig, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} and text_encoder is not set; expected both"
                )

    def stored(self) -> dict[str, Any]:
        """Return what a base model is told apart by: settings of what is stored that are not the default."""
        names = ("dtype", "flipped", "samples_per_shard")
        return {
            name: getattr(self, name) for name in names if getattr(self, name) != getattr(EncodeConfig, name)
        }


@dataclass(frozen=True)
class Job:
    """The encoding of one split, as every rank knows it.

    Attributes:
        split: its name.
        index: of the images.
        data: how they are read.
        folder: of the latents.
        config: how latents are made and stored.
        settings: all that decides what the shards hold, as it is written down beside them.
        further: those of them that base models are told: what there is beside latents and captions, and what
            is stored otherwise than by default.
        max_left_out: so many samples may be left out.
    """

    split: str
    index: Index
    data: DataConfig
    folder: Path
    config: EncodeConfig
    settings: dict[str, Any]
    further: dict[str, Any]
    max_left_out: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.index) // self.config.samples_per_shard)

    def span(self, number: int) -> tuple[int, int]:
        """Return the first and one past the last sample of a shard."""
        samples = self.config.samples_per_shard
        return number * samples, min((number + 1) * samples, len(self.index))

    def check_left_out(self, count: int, reason: str) -> None:
        """Raise ``ValueError`` if so many samples are too many to leave out."""
        if count > self.max_left_out:
            raise ValueError(
                f"{self.index.url}: {count} of {len(self.index)} samples cannot be used and at most "
                f"{self.max_left_out} may be left out (raise --max-bad-fraction, or mend them), such as "
                f"{reason}"
            )


def text_config(config: EncodeConfig) -> TextConfig | None:
    """Return the config of the text encoder whose embeddings are stored, if any; as ``read_text_config``."""
    if config.text_encoder is None:
        return None
    return read_text_config(
        config.text_encoder, max_tokens=config.max_tokens, precision=config.text_precision
    )


def make_job(
    run_dir: Path, step: int, data: DataConfig, split: str, config: EncodeConfig, text: TextConfig | None
) -> Job:
    """Return the encoding of one split of a run's data, whose index is opened.

    Args:
        run_dir: of the autoencoder; need not be there yet.
        step: its checkpoint.
        data: of the autoencoder's config.
        split: ``train`` or ``val``.
        config: how latents are stored.
        text: of ``text_config``.

    Raises:
        ValueError: if the data are not there or do not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split}; expected one of {', '.join(SPLITS)}")
    url = getattr(data, split)
    if url is None:
        raise ValueError(f"{run_dir}: data.{split} is not set, so there is nothing to encode")
    index = open_index(url)
    usual = data.captions or text is not None or "txt" in index.parts
    captions = usual if config.captions is None else config.captions
    stored = config.stored() | ({} if captions == usual else {"captions": captions})
    further = dict[str, Any]()
    if text is not None:
        further["text"] = text_facts(text)
    if config.given_frames is not None:
        if config.given_frames >= (data.clip_frames or 1):
            what = f"clips of {data.frames} frames" if data.clip_frames else "images"
            raise ValueError(f"given_frames is {config.given_frames}, but {run_dir} encodes {what}")
        further["given_frames"] = config.given_frames
    if stored:
        further["stored"] = stored
    limit = data.max_bad_fraction if config.max_bad_fraction is None else config.max_bad_fraction
    return Job(
        split=split,
        index=index,
        # Read in the encoding process, whose one other task is to feed the device.
        data=replace(
            data, captions=captions, workers=0, prefetch_steps=min(data.prefetch_steps, BATCHES_AHEAD)
        ),
        folder=latents_dir(str(run_dir.parent), run_dir.name, step, split),
        config=config,
        settings={
            "format_version": FORMAT_VERSION,
            "run": run_dir.name,
            "step": step,
            "source": index.identity,
            "dtype": config.dtype,
            "flipped": config.flipped,
            "captions": captions,
            "samples_per_shard": config.samples_per_shard,
            "batch_size": config.batch_size,
            **further,
        },
        further=further,
        max_left_out=int(limit * len(index)),
    )


@dataclass(frozen=True)
class Left:
    """What there is still to do.

    Attributes:
        shards: numbers of those that are not whole.
        left_out: samples that the others leave out.
        torn: names of half-written files; they stay to the end, for another encoder may be writing them.
        complete: whether there is nothing to do at all.
    """

    shards: list[int]
    left_out: int
    torn: list[str]
    complete: bool


def begin(job: Job) -> Left:
    """Write down how the set is encoded, or compare; return what is left to do.

    Raises:
        ValueError: if the folder holds other shards, or latents that were made otherwise.
    """
    path = job.folder / RECORDS / "settings.json"
    if files.read(path) is None:
        if any(name.endswith(".tar") for name in files.list_names(job.folder)):
            raise ValueError(f"{job.folder}: holds shards that are not from encoding; move them elsewhere")
        files.make_dirs(path.parent)
        files.create_exclusive(path, files.encode(job.settings))
    check_settings(job)
    records = read_records(job)
    shards = [number for number in range(job.num_shards) if number not in records]
    torn = [name for name in files.sizes(job.folder) if name.endswith((files.TEMP_SUFFIX, ".partial"))]
    left_out = sum(len(reasons) for _, reasons in records.values())
    return Left(shards, left_out, torn, complete=not shards and is_complete(str(job.folder)))


def check_settings(job: Job) -> None:
    """Raise ``ValueError`` if the folder holds latents that were made otherwise."""
    data = files.read(job.folder / RECORDS / "settings.json")
    if data is None:
        return
    found = files.decode(data)
    for key in {**job.settings, **found}:
        was, value = found.get(key), job.settings.get(key)
        if was != value:
            raise ValueError(
                f"{job.folder}: holds latents with {key} {was}, and {value} is asked for; "
                "delete that folder to encode anew"
            )


def read_records(job: Job) -> dict[int, tuple[Summary, dict[str, str]]]:
    """Return, for each shard that is whole, what it holds, and the samples left out with the reasons."""
    sizes = files.sizes(job.folder)
    numbers = [n for n in range(job.num_shards) if f"{RECORDS}/{shard_name(n)}.json" in sizes]
    texts = files.read_all(job.folder / RECORDS / f"{shard_name(n)}.json" for n in numbers)
    records = {}
    for number, record in zip(numbers, map(files.decode, texts)):
        if record and record["summary"]["size"] == sizes.get(f"{shard_name(number)}.tar"):
            records[number] = Summary(**record["summary"]), record["left_out"]
    return records


def is_encoded(run_dir: Path, step: int, split: str) -> bool:
    """Return whether the latents of a split are whole."""
    return is_complete(str(latents_dir(str(run_dir.parent), run_dir.name, step, split)))
