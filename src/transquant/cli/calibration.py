"""Calibration and test data named on the command line: image folders, .npz files, functions."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transquant.cli.models import call
from transquant.errors import InputError, MissingDependency

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
_log = logging.getLogger("transquant")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Pixels to inputs: resize the shorter side, crop the centre, divide by `scale`, subtract mean, divide by std."""

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 255.0
    limit: int | None = None
    batch: int = 100
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Data:
    """Batches of inputs, and labels int64 (N,) where the source has them."""

    batches: Iterable[Any]
    labels: Tensor | None


def numbers(text: str, option: str) -> tuple[float, ...]:
    """ "0.4,0.5,0.6" as numbers. Raises InputError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} is {text!r}, expected numbers with commas between them") from None


def load_data(source: str, option: str, how: Preprocessing) -> Data:
    """Data from DIR, FILE.npz or FILE.py:FUNCTION. Raises InputError."""
    path = Path(source)
    if path.is_dir():
        return _folder(path, option, how)
    if path.suffix == ".npz":
        return _npz(path, option, how)
    if ".py:" in source:
        return _function(source, option)
    if not path.exists():
        raise InputError(f"{option}: there is no file or folder {source}")
    raise InputError(f"{option} is {source}, expected an image folder, FILE.npz, or FILE.py:FUNCTION")


def _function(source: str, option: str) -> Data:
    """What a function returns: batches; pairs whose second element is an integer vector give the labels too."""
    try:
        batches = call(source, option)
        if batches is None:
            raise InputError(f"{option}: {source} returned nothing, expected an iterable of batches")
        batches = [batches] if isinstance(batches, Tensor) else list(batches)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{option}: the function of {source} failed: {type(error).__name__}: {error}") from error
    pairs = [b for b in batches if isinstance(b, tuple | list) and len(b) == 2 and _are_labels(b[1])]
    if batches and len(pairs) == len(batches):
        return Data([b[0] for b in pairs], torch.cat([b[1] for b in pairs]).long())
    return Data(batches, None)


def _are_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and not value.is_floating_point() and not value.is_complex()


def _npz(path: Path, option: str, how: Preprocessing) -> Data:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            if "x" not in names and len(names) != 1:
                raise InputError(
                    f"{option}: {path} has {', '.join(names) or 'no arrays'}, expected x (samples) and, to score on, y"
                )
            inputs = archive["x" if "x" in names else names[0]]
            labels = archive["y"] if "y" in names else None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{option}: {path} is no .npz file that can be read ({type(error).__name__})") from None
    if inputs.ndim == 0 or len(inputs) == 0 or inputs.dtype.kind not in "fiub":
        raise InputError(
            f"{option}: x in {path} is {inputs.dtype} of shape {inputs.shape}, expected numbers with the samples first"
        )
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != inputs.shape[:1]):
        raise InputError(f"{option}: y in {path} is {labels.dtype} of shape {labels.shape}, expected {len(inputs)} class numbers")
    inputs = inputs[: how.limit]
    tensor = torch.from_numpy(inputs.astype(np.float32) if inputs.dtype.kind == "f" else inputs)
    return Data(_batches(tensor, how.batch), None if labels is None else torch.from_numpy(labels[: how.limit].astype(np.int64)))


def _folder(folder: Path, option: str, how: Preprocessing) -> Data:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependency('reading images needs Pillow: pip install "transquant[images]"') from None
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [(f, k) for k, c in enumerate(classes) for f in sorted(c.rglob("*")) if f.suffix.lower() in SUFFIXES]
    if not classes:
        files = [(f, -1) for f in sorted(folder.iterdir()) if f.suffix.lower() in SUFFIXES]
    if not files:
        raise InputError(f"{option}: {folder} has no images; expected one folder of images for each class")
    order = np.random.default_rng(how.seed).permutation(len(files))
    images: list[np.ndarray] = []
    labels: list[int] = []
    skipped = 0
    for k in order:
        if how.limit is not None and len(images) == how.limit:
            break
        file, label = files[k]
        try:
            with Image.open(file) as image:
                pixels = _pixels(image.convert("L" if len(how.mean) == 1 and image.mode == "L" else "RGB"), how)
        except Exception as error:
            skipped += 1
            _log.warning("skipped %s: %s", file, error)
            continue
        images.append(pixels)
        labels.append(label)
    if skipped:
        _log.warning("%d of %d images could not be read and were skipped", skipped, skipped + len(images))
    if not images:
        raise InputError(f"{option}: none of the {skipped} images in {folder} can be read")
    shapes = {i.shape for i in images}
    if len(shapes) > 1:
        raise InputError(f"{option}: images in {folder} differ in size; give --resize and --crop")
    if not all(v > 0 for v in how.std) or not how.scale > 0:
        raise InputError(f"--std is {how.std} and --scale {how.scale}, allowed are positive numbers")
    try:
        batch = (np.stack(images) / how.scale - np.reshape(how.mean, (-1, 1, 1))) / np.reshape(how.std, (-1, 1, 1))
    except ValueError:
        raise InputError(f"--mean and --std have {len(how.mean)} and {len(how.std)} values, the images 3 channels") from None
    known = torch.tensor(labels) if classes else None
    return Data(_batches(torch.from_numpy(batch.astype(np.float32)), how.batch), known)


def _batches(tensor: Tensor, size: int) -> list[Tensor]:
    return [tensor[a : a + size] for a in range(0, len(tensor), size)]


def _pixels(image: Any, how: Preprocessing) -> np.ndarray:
    """float32 (C, H, W), 0 ... 255."""
    if how.resize is not None:
        ratio = how.resize / min(image.size)
        image = image.resize((max(round(image.width * ratio), 1), max(round(image.height * ratio), 1)))
    if how.crop is not None:
        left, top = (image.width - how.crop) // 2, (image.height - how.crop) // 2
        image = image.crop((left, top, left + how.crop, top + how.crop))
    pixels = np.asarray(image, np.float32)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
