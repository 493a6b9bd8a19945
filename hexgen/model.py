"""Models: their shapes (``ModelSpec``), and where a shape is read from.

``load_model`` takes what a person writes: a built-in name, a Hugging Face directory, or the id of a model whose
files are already in the local Hugging Face cache. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import json
import struct
from pathlib import Path
from typing import Any

from hexgen.builtin_models import BUILTIN_CONFIGS
from hexgen.errors import CheckpointError, SpecError
from hexgen.model_config import model_from_config
from hexgen.model_spec import DTYPE_BYTES, DType, Family, ModelSpec, RopeSpec

__all__ = [
    "BUILTIN_CONFIGS",
    "BUNDLED_MODELS",
    "DTYPE_BYTES",
    "DType",
    "Family",
    "ModelSpec",
    "RopeSpec",
    "find_checkpoint",
    "load_model",
    "model_from_config",
]

_MAX_CONFIG_BYTES = 16 * 1024 * 1024
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors format
_BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_MODELS = ("demo", "demo-draft")  # shipped with the package, by name


def load_model(ref: str | Path, where: str | None = None, base_dir: Path | None = None) -> ModelSpec:
    """The shape of the model ``ref``.

    ``where`` names the place that ``ref`` was written in, for errors; a relative directory is looked for beside
    that file (``base_dir``) first, then in the working directory. Raises ``SpecError``.
    """
    directory = find_checkpoint(ref, base_dir)
    if directory is not None:
        return _from_directory(directory)
    name = str(ref)
    if name in BUILTIN_CONFIGS:
        return model_from_config(BUILTIN_CONFIGS[name], name, f"built-in model {name}")
    close = difflib.get_close_matches(name.lower(), [*BUILTIN_CONFIGS, *BUNDLED_MODELS], n=1)
    raise SpecError(
        f"no model {name!r}: neither a built-in name, nor a directory with a config.json, nor a model in the "
        "local Hugging Face cache",
        where=where,
        remedy=f"did you mean {close[0]}?" if close else f"built-in: {', '.join(BUILTIN_CONFIGS)}",
    )


def find_checkpoint(ref: str | Path, base_dir: Path | None = None) -> Path | None:
    """The directory of the checkpoint ``ref``, or None where it is only a name (or nothing at all)."""
    name = str(ref)
    if not name or "\0" in name or len(name) > 4096:
        return None
    if name in BUNDLED_MODELS and (_BUNDLED / name / "config.json").is_file():
        return _BUNDLED / name
    if name in BUILTIN_CONFIGS:
        return None
    for candidate in ([base_dir / name] if base_dir is not None else []) + [Path(name).expanduser()]:
        if (candidate / "config.json").is_file():
            return candidate.resolve()
    return _in_hub_cache(name)


def _in_hub_cache(name: str) -> Path | None:
    if name.count("/") != 1:
        return None
    # Lazily: importing the hub's client takes long, and most callers never need it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _from_directory(directory: Path) -> ModelSpec:
    path = directory / "config.json"
    config = _read_json(path)
    generation = directory / "generation_config.json"
    if generation.is_file():
        # What ends a text is the generation config's word where it has one: chat models add their own ids there.
        eos = _read_json(generation).get("eos_token_id")
        if eos is not None:
            config["eos_token_id"] = eos
    if not (config.get("dtype") or config.get("torch_dtype")):
        stored = _stored_dtype(directory)
        if stored is not None:
            config["dtype"] = stored
    return model_from_config(config, str(directory), str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise SpecError(f"is larger than {_MAX_CONFIG_BYTES} bytes: not a model's config", where=str(path))
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise SpecError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise SpecError("must be a JSON object", where=str(path))
    return value


def _stored_dtype(directory: Path) -> str | None:
    """The dtype of the first floating-point tensor of a checkpoint whose config does not say."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    for path in sorted(directory.glob("*.safetensors"))[:1]:
        with path.open("rb") as file:
            length = file.read(8)
            size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
            if not 0 < size <= min(_MAX_HEADER_BYTES, path.stat().st_size):
                raise CheckpointError("is not a safetensors file, or is truncated", where=str(path))
            try:
                header = json.loads(file.read(size))
            except ValueError as error:
                raise CheckpointError(f"has a broken header: {error}", where=str(path)) from error
        for entry in header.values() if isinstance(header, dict) else ():
            if isinstance(entry, dict) and entry.get("dtype") in names:
                return names[entry["dtype"]]
    return None
