"""Frozen text encoders: any text model of transformers, from a folder or the hub, as embeddings of tokens.

The paper does not say which it uses. A base model sees the last hidden state of each token and a mask, so
that encoders differ in nothing but their width.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.txt", "*.model", "model*.safetensors")
"""What is fetched from the hub: tokenizer, config and weights that hold no code."""

# Of each file of weights: what is hashed beside its header, evenly spaced, so that large models take no time.
_PROBES, _PROBE_BYTES = 64, 4096


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Section ``model.text`` of a base model: where embeddings of captions come from, and their shape."""

    encoder: str | None = field(default=None, metadata={"identity": False})
    """Folder of a transformers model with its tokenizer, or its name on the hub (``NAME@REVISION`` pins it);
    enters a run's identity by ``text_identity``. null: the data have embeddings, see ``ul-scale encode``."""
    width: int
    """Of an embedding; must be the encoder's hidden size."""
    max_tokens: int = 77
    """Longer texts are cut."""
    precision: str = "fp32"
    """Of the encoder's weights and activations, fp32 or bf16. Embeddings leave it in fp32."""

    def __post_init__(self) -> None:
        for name in ("width", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.text.{name} is {getattr(self, name)}; expected 1 or more")
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"model.text.precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}"
            )


class TextEncoder:
    """A frozen text model with its tokenizer. May be used from several threads.

    Attributes:
        width: of an embedding.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int, width: int) -> None:
        self.width = width
        self._model = model.eval().requires_grad_(False)
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._device = next(model.parameters()).device
        self._lock = threading.Lock()  # fast tokenizers fail where two threads use one

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of texts' tokens, and where there are tokens.

        Args:
            texts: b of them.

        Returns:
            float32 (b, n, width), 0 where there is no token, and bool (b, n); n is the length of the longest.
        """
        with self._lock:
            tokens = self._tokenizer(
                list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
            )
        ids, mask = (tokens[name].to(self._device) for name in ("input_ids", "attention_mask"))
        if not mask.any():  # all texts are empty, and the tokenizer adds nothing of its own
            ids, mask = ids.new_zeros(len(texts), 1, dtype=torch.long), mask.new_zeros(len(texts), 1)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Where a text has no token at all, attention is undefined.
        return hidden.float().masked_fill(mask[..., None] == 0, 0.0), mask.bool()


def load_text_encoder(config: TextConfig | None, device: torch.device | str = "cpu") -> TextEncoder | None:
    """Load a frozen text encoder; what is not on this machine is downloaded.

    Nothing that is loaded can run code: weights are safetensors, and a model's own code is never trusted.

    Args:
        config: which.
        device: where it is to run.

    Returns:
        None where there is nothing to load: no text, or embeddings that are in the data.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if there is no such model, if it has no safetensors or no tokenizer, or does not fit.
    """
    if config is None or config.encoder is None:
        return None
    name, folder = config.encoder, _folder(config.encoder)
    shape = _model_config(name, folder)
    if shape.hidden_size != config.width:
        raise ValueError(f"model.text.width is {config.width}, but {name} has {shape.hidden_size}")
    files = _weight_files(name, folder)
    with _quiet():
        try:
            tokenizer = _load_tokenizer(folder)
            model = _load_model(shape, files, PRECISIONS[config.precision])
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise ValueError(f"text encoder {name}: cannot be loaded: {_line(error)}") from error
    # Some models, as T5, know no positions and take texts of any length.
    if positions := getattr(shape, "max_position_embeddings", None):
        _check_length(name, config.max_tokens, min(positions, tokenizer.model_max_length))
    return TextEncoder(model.to(device), tokenizer, config.max_tokens, config.width)


def check_text_encoder(config: TextConfig | None) -> None:
    """Check a text encoder's folder against the config, weights unread; one of the hub may not be here yet.

    Raises:
        ImportError: as ``load_text_encoder``.
        ValueError: as ``load_text_encoder``.
    """
    if config is None or config.encoder is None or not Path(config.encoder).expanduser().is_dir():
        return
    found = read_text_config(config.encoder, max_tokens=config.max_tokens, precision=config.precision)
    if found.width != config.width:
        raise ValueError(f"model.text.width is {config.width}, but {config.encoder} has {found.width}")


def read_text_config(encoder: str, *, max_tokens: int, precision: str) -> TextConfig:
    """Return the config of a text encoder, its width read from its config.json; weights are not loaded.

    Raises:
        ImportError, ValueError: as ``load_text_encoder``.
    """
    shape = _model_config(encoder, _folder(encoder))
    _check_length(encoder, max_tokens, getattr(shape, "max_position_embeddings", None))
    return TextConfig(encoder=encoder, width=shape.hidden_size, max_tokens=max_tokens, precision=precision)


def text_identity(config: TextConfig) -> str | None:
    """Return what a run depends on: which encoder makes the embeddings, wherever it lies.

    A folder's is its base name and a hash of its config, its tokenizer and (header, size and samples of) its
    weights; a hub model's is its name, for it may not be here yet; of embeddings in the data it is None.

    Raises:
        ValueError: if the folder holds no model.
    """
    if config.encoder is None:
        return None
    folder = Path(config.encoder).expanduser()
    if not folder.is_dir():
        return config.encoder
    digest = hashlib.sha256()
    weights = _weight_files(config.encoder, folder)
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model")):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    for path in weights:
        with path.open("rb") as file:
            size, header = path.stat().st_size, int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} ".encode() + file.read(min(header, size)))
            for probe in range(_PROBES):
                file.seek(probe * max(size - _PROBE_BYTES, 0) // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return f"{folder.resolve().name}-{digest.hexdigest()[:10]}"


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("text encoders need transformers: pip install 'ul-scale[text]'") from error
    return transformers


def _folder(encoder: str) -> Path:
    """Return the folder of a model, downloaded if it is none of this machine's."""
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        return folder
    _import_transformers()
    from huggingface_hub import snapshot_download

    name, _, revision = encoder.partition("@")
    options: dict[str, Any] = {"allow_patterns": DOWNLOADED, "ignore_patterns": "*/*"}
    try:
        return Path(snapshot_download(name, revision=revision or None, **options))
    except Exception as error:  # of validation, of HTTP and of the network, each of classes of its own
        raise ValueError(
            f"text encoder {encoder}: is no folder, nor can the hub give it ({_line(error)})"
        ) from error


def _model_config(name: str, folder: Path) -> Any:
    transformers = _import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        return config.get_text_config()  # of a model of text and images, the part of text
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"text encoder {name}: has no usable config.json ({_line(error)})") from error


def _check_length(name: str, max_tokens: int, limit: int | None) -> None:
    if limit is not None and max_tokens > limit:
        raise ValueError(
            f"max_tokens is {max_tokens} (--max-tokens, model.text.max_tokens), but {name} takes {limit}"
        )


def _load_tokenizer(folder: Path) -> Any:
    tokenizer = _import_transformers().AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, padding_side="right"
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("its tokenizer has neither padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(shape: Any, files: list[Path], dtype: torch.dtype) -> nn.Module:
    state: dict[str, Tensor] = {}
    for path in files:
        state |= load_file(path)
    # Given no path, it looks for no files of other formats.
    model, loaded = _model_class(shape).from_pretrained(
        None, config=shape, state_dict=state, dtype=dtype, output_loading_info=True
    )
    # What is missing would be drawn at random. Poolers are not used.
    if missing := sorted(key for key in loaded["missing_keys"] if "pooler" not in key):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")
    return model.get_encoder() if model.config.is_encoder_decoder else model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting weights that are not used, as of a decoder."""
    logging = _import_transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _model_class(shape: Any) -> Any:
    """Return the class of a text encoder, without a decoder where there is one without."""
    auto = _import_transformers().models.auto.modeling_auto
    for mapping in (auto.MODEL_FOR_TEXT_ENCODING_MAPPING, auto.MODEL_MAPPING):
        if (found := mapping.get(type(shape), None)) is not None:
            return found
    raise ValueError(f"there is no text encoder of type {shape.model_type}")


def _weight_files(name: str, folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = set(json.loads((folder / WEIGHTS_INDEX).read_bytes())["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError):
        names = set()
    files = [folder / Path(file).name for file in sorted(names)]
    if not files or not all(path.is_file() and path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"text encoder {name}: its folder has no whole {WEIGHTS} (pickled weights are not loaded, for "
            "they can run code); convert them with transformers' save_pretrained"
        )
    return files


def _line(error: BaseException) -> str:
    """Return the first line of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
