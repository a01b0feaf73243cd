import io
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from edge.data.folder import match_classes, open_folder


def encoded(colour=(200, 100, 50), size=(12, 12), kind="PNG", mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded() if data is None else data)


@pytest.fixture(params=["folder", "zip", "zip without the split's name"])
def lay_out(request, tmp_path):
    """Writes a mapping of paths to bytes as a split, unpacked or packed."""

    def lay(files, split="train"):
        if request.param == "folder":
            (tmp_path / split).mkdir(exist_ok=True)
            for name, data in files.items():
                if name.endswith("/"):
                    (tmp_path / split / name).mkdir(parents=True)
                else:
                    write(tmp_path / split / name, data)
        else:
            prefix = f"{split}/" if request.param == "zip" else ""
            with zipfile.ZipFile(tmp_path / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as packed:
                for name, data in files.items():
                    packed.writestr(prefix + name, data)
        return tmp_path

    return lay


def test_classes_are_the_folders_in_alphabetical_order(lay_out):
    path = lay_out(
        {"b/2.png": encoded((2, 2, 2)), "b/1.png": encoded((1, 1, 1)), "a/sub/3.png": encoded((3, 3, 3))}
    )
    source = open_folder(path, "train")
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 1, 1]
    assert [image[0, 0, 0] for image in source.fetch(np.arange(3), 12)] == [3, 1, 2]


def test_files_that_are_no_images_are_passed_over(lay_out):
    path = lay_out({"a/1.png": encoded(), "a/notes.txt": b"hello", "a/.hidden.png": b"", ".git/x.png": b""})
    source = open_folder(path, "train")
    assert source.classes == ("a",)
    assert len(source) == 1


def test_folder_without_classes_is_refused(lay_out):
    path = lay_out({"lonely.png": encoded()})
    with pytest.raises(UserError, match="holds no classes: put one folder of images for each class into it"):
        open_folder(path, "train")


def test_class_without_images_is_refused_by_name(lay_out):
    path = lay_out({"a/1.png": encoded(), "b/": b""})
    with pytest.raises(UserError, match=r"the class .*b holds no images"):
        open_folder(path, "train")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_image_is_named(lay_out, kind):
    whole = encoded(size=(64, 64), kind=kind)
    path = lay_out({"a/good.png": encoded(), "a/half.png": whole[: len(whole) * 2 // 3]})
    source = open_folder(path, "train")
    with pytest.raises(
        UserError, match=r"cannot read the image .*a/half.png \(.*\); repair or remove it"
    ) as caught:
        source.fetch(np.arange(2), 12)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"this is no image", b"\xff\xd8\xff"])
def test_file_that_is_no_image_is_named(lay_out, data):
    path = lay_out({"a/fake.jpg": data})
    with pytest.raises(UserError, match=r"a/fake.jpg \("):
        open_folder(path, "train").fetch(np.array([0]), 12)


def test_missing_split_says_what_belongs_there(tmp_path):
    with pytest.raises(UserError, match=r"has no test/ \(nor test.zip\): put one folder for each class into"):
        open_folder(tmp_path, "test")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        open_folder(tmp_path / "nowhere", "train")


def test_damaged_zip_is_refused(tmp_path):
    (tmp_path / "train.zip").write_bytes(b"PK but no more")
    with pytest.raises(UserError, match=r"cannot read .*train.zip .*; pack it anew"):
        open_folder(tmp_path, "train")


def test_zip_with_a_damaged_member_names_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_STORED) as packed:
        packed.writestr("train/a/1.png", encoded())
    data = bytearray((tmp_path / "train.zip").read_bytes())
    data[60] ^= 0xFF  # inside the member's data
    (tmp_path / "train.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"train.zip/a/1.png \(BadZipFile: Bad CRC-32"):
        open_folder(tmp_path, "train").fetch(np.array([0]), 12)


def test_classes_that_differ_between_splits_are_named(lay_out):
    lay_out({"a/1.png": encoded(), "b/1.png": encoded()}, "train")
    path = lay_out({"a/1.png": encoded(), "c/1.png": encoded()}, "test")
    with pytest.raises(UserError, match=r"differ \(only in .*train.*: b; only in .*test.*: c\)"):
        match_classes(open_folder(path, "train"), open_folder(path, "test"))


def test_many_missing_classes_are_not_all_listed(lay_out):
    lay_out({f"{i}/1.png": encoded() for i in range(9)}, "train")
    path = lay_out({"0/1.png": encoded()}, "test")
    with pytest.raises(UserError, match=r"only in .*train.*: 1, 2, 3, 4, 5 and 3 more\)"):
        match_classes(open_folder(path, "train"), open_folder(path, "test"))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 20)])
@pytest.mark.parametrize(("wanted", "side"), [(16, 16), (20, 20), (100, 20)])
def test_large_image_is_reduced_and_a_small_one_left(tmp_path, size, wanted, side):
    write(tmp_path / "train/a/1.png", encoded(size=size))
    image = open_folder(tmp_path, "train").fetch(np.array([0]), wanted)[0]
    assert image.shape == (side, side, 3)
    assert (image == np.array([200, 100, 50], np.uint8)).all()


def test_middle_of_an_oblong_image_is_taken(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    write(tmp_path / "train/a/1.png", file.getvalue())
    assert (open_folder(tmp_path, "train").fetch(np.array([0]), 8)[0] == 255).all()


@pytest.mark.parametrize(
    ("mode", "colour", "channels", "value"),
    [
        ("L", 70, 1, 70),
        ("1", 1, 1, 255),
        ("RGBA", (70, 70, 70, 255), 3, 70),
        ("CMYK", (0, 0, 0, 255), 3, 0),
        ("I;16", 70 * 256, 1, 70),
    ],
)
def test_every_mode_becomes_eight_bit_grey_or_colour(tmp_path, mode, colour, channels, value):
    write(tmp_path / "train/a/1.tiff", encoded(colour, kind="TIFF", mode=mode))
    image = open_folder(tmp_path, "train").fetch(np.array([0]), 12)[0]
    assert image.dtype == np.uint8
    assert image.shape == (12, 12, channels)
    assert (image == value).all()


def test_transparent_palette_is_read_without_a_warning(tmp_path):
    file = io.BytesIO()
    palette = Image.new("P", (12, 12), 5)
    palette.putpalette([9] * 768)
    palette.save(file, "PNG", transparency=bytes(range(256)))
    write(tmp_path / "train/a/1.png", file.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (open_folder(tmp_path, "train").fetch(np.array([0]), 12)[0] == 9).all()
