"""Image folders: one folder below the root for every class, unpacked or inside a zip file."""

import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as pil
from PIL import UnidentifiedImageError

from common.errors import UserError
from edge.data.source import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Other files are passed over, as torchvision's ImageFolder does."""

Read: TypeAlias = Callable[[str], bytes]


class FolderSource:
    """Images of a folder or zip file, read and decoded when they are asked for.

    Args:
        where: the folder or zip file, for messages.
        names: paths of the images below it, with `/` between parts, the first of which is the class.
        classes: names of the classes; their order numbers them.
        read: reads a named file; called from several threads at once.
    """

    def __init__(self, where: Path, names: list[str], classes: tuple[str, ...], read: Read) -> None:
        number = {name: i for i, name in enumerate(classes)}
        self.where = where
        self.classes = classes
        self.labels: NDArray[np.int64] = np.array([number[n.partition("/")[0]] for n in names], np.int64)
        self._names = names
        self._read = read

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self, indices: NDArray[np.int64], size: int) -> list[Image]:
        """Read and decode; see `edge.data.source.ImageSource.fetch`."""
        return [self._decode(self._names[i], size) for i in indices]

    def _decode(self, name: str, size: int) -> Image:
        try:
            return _square(self._read(name), size)
        except MemoryError:
            raise
        except Exception as error:  # what a damaged file makes of PIL's parsers is anyone's guess
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                reason = "no image format is recognised in it"
            raise UserError(
                f"cannot read the image {self.where / name} ({' '.join(reason.split())}); repair or remove it"
            ) from error


def open_folder(path: Path, split: str) -> FolderSource:
    """Open one split of an image folder.

    Args:
        path: holds the folder ``<split>/<class>/...`` or the file ``<split>.zip`` with the same inside.
        split: ``train`` or ``test``.

    Raises:
        UserError: there is neither, it holds no classes, or a class holds no images.
    """
    folder, archive = path / split, path / f"{split}.zip"
    if folder.is_dir():
        found, read = _list_folder(folder), lambda name: (folder / name).read_bytes()
        return _source(folder, found, read)
    if archive.is_file():
        return _open_zip(archive, split)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    raise UserError(
        f"{path} has no {split}/ (nor {split}.zip): put one folder for each class into {path}/{split}/"
    )


def _open_zip(archive: Path, split: str) -> FolderSource:
    try:
        opened = zipfile.ZipFile(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {archive} ({error}); pack it anew") from error
    members = [name for name in opened.namelist() if not name.startswith("__MACOSX/")]
    prefix = f"{split}/"
    if not all(name.startswith(prefix) for name in members):
        prefix = ""
    inside = [name.removeprefix(prefix) for name in members]
    found: dict[str, list[str]] = {}
    for name in sorted(inside):
        label, slash, rest = name.partition("/")
        if slash and label:
            found.setdefault(label, []).extend([name] if rest else [])
    lock = threading.Lock()

    def read(name: str) -> bytes:
        with lock:
            return opened.read(prefix + name)

    return _source(archive, found, read)


def _list_folder(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for label in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        names: list[str] = []
        for parent, _, files in os.walk(folder / label, followlinks=True):
            below = Path(parent).relative_to(folder).as_posix()
            names += [f"{below}/{file}" for file in files]
        found[label] = sorted(names)
    return found


def _source(where: Path, found: dict[str, list[str]], read: Read) -> FolderSource:
    classes = tuple(sorted(label for label in found if not label.startswith(".")))
    if not classes:
        raise UserError(f"{where} holds no classes: put one folder of images for each class into it")
    names: list[str] = []
    for label in classes:
        images = [name for name in found[label] if _is_image(name)]
        if not images:
            raise UserError(
                f"the class {where / label} holds no images (looked for {', '.join(IMAGE_SUFFIXES)}): "
                "add some or remove the folder"
            )
        names += images
    return FolderSource(where, names, classes, read)


def _is_image(name: str) -> bool:
    file = name.rpartition("/")[2]
    return not file.startswith(".") and file.lower().endswith(IMAGE_SUFFIXES)


def _square(data: bytes, size: int) -> Image:
    """Decode the middle square of an image, reduced to `size` where it is larger."""
    with pil.open(io.BytesIO(data)) as opened:
        opened.draft(None, (size, size))  # lets the JPEG decoder skip detail that goes anyway
        image = _eight_bit(opened)
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    if side > size:
        image = image.resize((size, size), pil.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    elif width != height:
        image = image.crop(box)
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _eight_bit(image: pil.Image) -> pil.Image:
    if image.mode.startswith("I;16"):  # PIL would clip 16-bit grey to white instead of scaling it
        return pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def match_classes(train: FolderSource, test: FolderSource) -> tuple[str, ...]:
    """Check that both splits have the same classes, and give them.

    Raises:
        UserError: they differ; says in what.
    """
    if train.classes == test.classes:
        return train.classes
    missing = _some(set(train.classes) - set(test.classes))
    extra = _some(set(test.classes) - set(train.classes))
    differences = [f"only in {train.where}: {missing}"] * bool(missing) + [
        f"only in {test.where}: {extra}"
    ] * bool(extra)
    raise UserError(f"the classes of the training and the test set differ ({'; '.join(differences)})")


def _some(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")
