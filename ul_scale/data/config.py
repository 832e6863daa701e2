"""Section ``data``: what is read, in which order, and how."""

from dataclasses import dataclass, field
from typing import Any

NOT_IDENTITY: dict[str, Any] = {"identity": False}
CROPS = ("center", "random")
CLIP_STARTS = ("random", "center")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in which order."""

    train: str | None = field(default=None, metadata=NOT_IDENTITY)
    """URL of the folder of training shards; enters a run's identity by its fingerprint."""
    val: str | None = field(default=None, metadata=NOT_IDENTITY)
    """URL of the folder of held-out shards."""
    image_size: int | None = None
    """Height and width of images, pixels; none for latents."""
    channels: int = 3
    """Channels of images: 1 (grey) or 3 (RGB)."""
    crop: str = field(default="center", metadata={"legacy": "center"})
    """Of training images: center, or random (a square between the shorter side and 4/5 of it, anywhere)."""
    horizontal_flip: bool = False
    """Mirror half of the training images or clips, chosen anew each epoch."""
    fast_jpeg: bool = field(default=True, metadata={"legacy": True})
    """Decode large JPEGs at a smaller size, where the difference is small; false: exactly."""
    captions: bool = field(default=False, metadata={"legacy": False})
    """Deliver each sample's caption; one without is a bad sample."""
    embeddings: bool = field(default=False, metadata={"legacy": False})
    """Deliver the embedding of each sample's caption, as ``ul-scale encode --text-encoder`` stores it."""
    frames: int | None = field(default=None, metadata={"legacy": None})
    """Frames of a clip; 1 takes single frames, as images. None for data that is no video."""
    frame_rate: float | None = field(default=None, metadata={"legacy": None})
    """Frames per second that a clip is sampled at; by default every frame_stride-th frame is taken."""
    frame_stride: int = field(default=1, metadata={"legacy": 1})
    """Frames of the file from one of a clip to the next, where no frame_rate is set."""
    clip_start: str = field(default="random", metadata={"legacy": "random"})
    """Of training clips: random, anew each epoch, or center. Held-out clips are the centre."""
    lanes: int | None = None
    """Lanes that the order is made of; by default the largest divisor of the batch that is at most 64."""
    chunk_bytes: int = 1_000_000
    """Longest run of samples that is read by one request, bytes."""
    window_chunks: int = 32
    """Chunks over which a lane's samples are shuffled."""
    workers: int = field(default=1, metadata=NOT_IDENTITY)
    """Processes of a rank that read and decode; 0: threads of the training process, for small data."""
    threads: int = field(default=2, metadata=NOT_IDENTITY)
    """Decoding threads of each worker."""
    prefetch_steps: int = field(default=4, metadata=NOT_IDENTITY)
    """Batches that are held ready."""
    max_bad_fraction: float = field(default=0.001, metadata=NOT_IDENTITY)
    """Share of samples that may be unreadable and replaced by a neighbour, before the run stops."""
    read_timeout_s: float = field(default=30.0, metadata=NOT_IDENTITY)
    """Seconds after which a range request is given up, and sent again."""
    read_attempts: int = field(default=8, metadata=NOT_IDENTITY)
    """How often a range is asked for before the run stops."""
    read_budget_s: float = field(default=300.0, metadata=NOT_IDENTITY)
    """Seconds after which a range is not asked for again."""
    max_window_bytes: int = field(default=5_000_000_000, metadata=NOT_IDENTITY)
    """Memory for the windows of a rank's lanes, those in use and those read ahead, bytes."""

    @property
    def clip_frames(self) -> int | None:
        """Frames of a video sample; None for images, which single frames of videos are too."""
        return self.frames if self.frames is not None and self.frames > 1 else None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"data.channels is {self.channels}; expected 1 (grey) or 3 (RGB)")
        for name, choices in {"crop": CROPS, "clip_start": CLIP_STARTS}.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}"
                )
        for name in ("image_size", "lanes", "frames"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least 1, or none")
        for name in ("chunk_bytes", "window_chunks", "threads", "prefetch_steps", "max_window_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least 1")
        if self.workers < 0:
            raise ValueError(f"data.workers is {self.workers}; expected 0 or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is {self.max_bad_fraction}; expected 0 to 1")
        if self.frame_rate is not None and (self.frame_rate <= 0 or self.frame_stride != 1):
            raise ValueError(
                f"data.frame_rate is {self.frame_rate} and data.frame_stride {self.frame_stride}; "
                "expected a positive rate, or a stride"
            )
        for name in ("frame_stride", "read_timeout_s", "read_attempts", "read_budget_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected more than 0")
