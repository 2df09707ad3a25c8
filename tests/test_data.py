"""Tests of data.py: python -m pytest tests/test_data.py. Each docstring names the bug that the test would catch."""

import io
import itertools
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import UserError, batches, build_dataset, center_crop, load_image  # noqa: E402

# -----------------------------------------------------------------------------
# helpers


def picture(number, size=(20, 16)):
    """A picture that tells its number by its colour, in every pixel."""
    return Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, 200))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(root, path, image=None, **options):
    path = root / path
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture(sum(path.name.encode()))).save(path, **options)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """train/ with class folders of 4, 3 and 2 images, in ImageNet's layout, and val/ with one each."""
    number = itertools.count()
    for name, count in (("n02", 4), ("n01", 3), ("n10", 2)):
        for i in range(count):
            write(tmp_path, f"train/{name}/{name}_{i}.JPEG", picture(next(number)), quality=90)
        write(tmp_path, f"val/{name}/v.png", picture(next(number)))
    return tmp_path


def contents(dataset):
    """What a data set holds, whatever its files are called: [(class name, colour)], sorted."""
    pairs = [dataset[i] for i in range(len(dataset))]
    return sorted((dataset.class_names[label], tuple(data.to_uint8(image[None])[0, 0, 0])) for image, label in pairs)


class Numbers(data.ImageDataset):
    """n images whose label is their index: to see which image came when."""

    def __init__(self, n):
        super().__init__(np.arange(n), [str(i) for i in range(n)], 4, True, 0)

    def load(self, index, draft_size=None):
        return picture(index)


def labels_of(stream, count):
    return [next(stream)[1].tolist() for _ in range(count)]


# -----------------------------------------------------------------------------
# the order of the samples


def test_each_epoch_is_a_permutation_of_seed_and_epoch():
    """Samples repeated or lost inside an epoch; the same order every epoch; an order that ignores the seed."""
    stream = sum(labels_of(batches(Numbers(10), 4, seed=0), 5), [])
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert stream == sum(labels_of(batches(Numbers(10), 4, seed=0), 5), [])
    assert stream != sum(labels_of(batches(Numbers(10), 4, seed=1), 5), [])


@pytest.mark.parametrize("world, accum", [(2, 1), (1, 3), (2, 3)])
def test_ranks_and_accumulation_partition_the_global_batch(world, accum):
    """Ranks that train on the same images, or a run on 2 GPUs that sees other data than a run on 1."""
    whole = labels_of(batches(Numbers(30), 12, seed=3), 4)
    streams = [batches(Numbers(30), 12, seed=3, accum=accum, rank=rank, world=world) for rank in range(world)]
    for step in whole:
        micro = [[next(stream)[1].tolist() for stream in streams] for _ in range(accum)]
        assert sum(sum(micro, []), []) == step


def test_resume_in_the_middle_of_an_epoch():
    """A resumed run that starts its epoch over, or augments its images differently."""
    straight = batches(Numbers(10), 4, seed=5, accum=2)
    for _ in range(2 * 3):
        next(straight)
    resumed = batches(Numbers(10), 4, seed=5, step=3, accum=2)
    for _ in range(6):
        (a, la), (b, lb) = next(straight), next(resumed)
        assert torch.equal(a, b) and torch.equal(la, lb)


def test_workers_change_nothing(folder):
    """Augmentation drawn from a worker's own random state; batches that arrive in the order they were finished."""
    dataset = build_dataset(str(folder), "train", 8, True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    streams = [batches(dataset, 4, seed=0, workers=workers) for workers in (0, 2)]
    for _ in range(6):
        (a, la), (b, lb) = next(streams[0]), next(streams[1])
        assert torch.equal(a, b) and torch.equal(la, lb)
    assert torch.equal(state, torch.get_rng_state())  # and the global random state is left alone


def test_a_batch_larger_than_the_data_set():
    """A loader that yields nothing, and hangs, when the data set is smaller than a batch."""
    stream = batches(Numbers(3), 8, seed=0)
    counts = np.bincount(sum(labels_of(stream, 3), []))
    assert counts.tolist() == [8, 8, 8]


def test_a_batch_that_does_not_divide_is_refused():
    """A global batch silently rounded down: the learning rate would no longer fit it."""
    with pytest.raises(UserError, match="--batch-size a multiple of 8"):
        next(batches(Numbers(9), 12, seed=0, accum=2, world=4))


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    """Frozen augmentation (the same crop every epoch), or crops that depend on what was loaded before."""
    write(folder, "train/n01/n01_0.JPEG", Image.radial_gradient("L").convert("RGB"))
    dataset = build_dataset(str(folder), "train", 16, True)
    first = dataset[0, 0][0]
    assert not torch.equal(first, dataset[1, 0][0])
    assert torch.equal(first, dataset[0][0])
    assert torch.equal(first, build_dataset(str(folder), "train", 16, True)[0, 0][0])
    assert not torch.equal(first, build_dataset(str(folder), "train", 16, True, seed=1)[0, 0][0])


def test_views(folder):
    """Codes extracted from crops that validation never sees, or a mirror image that is none."""
    write(folder, "train/n01/n01_0.JPEG", Image.linear_gradient("L").rotate(90).convert("RGB"))
    dataset = build_dataset(str(folder), "train", 16, True)
    centre = build_dataset(str(folder), "train", 16, False)[0]
    assert torch.equal(dataset.view(0, 0)[0], centre[0]) and dataset.view(0, 0)[1] == centre[1]
    assert torch.equal(dataset.view(0, 1)[0], centre[0].flip(2))
    assert not torch.equal(dataset.view(0, 2)[0], dataset.view(0, 3)[0])
    assert torch.equal(dataset.view(0, 2)[0], dataset.view(0, 2)[0])


# -----------------------------------------------------------------------------
# decoding


def modes():
    grey16 = Image.fromarray(np.full((4, 6), 25700, dtype=np.uint16))
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    half = Image.new("RGBA", (6, 4), (0, 0, 0, 128))
    return {
        "RGB": (encoded(Image.new("RGB", (6, 4), (10, 20, 30))), (10, 20, 30)),
        "L": (encoded(Image.new("L", (6, 4), 77)), (77, 77, 77)),
        "1": (encoded(Image.new("1", (6, 4), 1)), (255, 255, 255)),
        "LA": (encoded(Image.new("LA", (6, 4), (0, 128))), (127, 127, 127)),
        "RGBA half transparent on white": (encoded(half), (127, 127, 127)),
        "P": (encoded(palette), (0, 0, 255)),
        "P transparent": (encoded(palette, transparency=1), (255, 255, 255)),
        "GIF transparent": (encoded(palette, "GIF", transparency=1), (255, 255, 255)),
        "RGB transparent colour": (encoded(Image.new("RGB", (6, 4), (9, 9, 9)), transparency=(9, 9, 9)), (255,) * 3),
        "16-bit PNG": (encoded(grey16), (100, 100, 100)),
        "16-bit TIFF": (encoded(grey16, "TIFF"), (100, 100, 100)),
        "32-bit TIFF": (encoded(Image.new("I", (6, 4), 25700), "TIFF"), (100, 100, 100)),
        "float TIFF": (encoded(Image.new("F", (6, 4), 0.2), "TIFF"), (51, 51, 51)),
        "CMYK": (encoded(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
        "BMP": (encoded(Image.new("RGB", (6, 4), (1, 2, 3)), "BMP"), (1, 2, 3)),
    }


@pytest.mark.parametrize("mode", modes())
def test_every_mode_becomes_rgb(mode):
    """16-bit grey clipped to white; transparency turned into arbitrary colours; modes that crash the training."""
    content, color = modes()[mode]
    image = load_image(content)
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 1


def test_exif_orientation_survives_draft_decoding():
    """Photos of phones trained on sideways; or turned before the large JPEG is reduced, with sides exchanged."""
    image = Image.new("RGB", (800, 400), "blue")
    image.paste("red", (0, 0, 400, 400))  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show: left becomes top
    upright = load_image(encoded(image, "JPEG", exif=exif), draft_size=100)
    assert upright.size == (100, 200)
    top, bottom = upright.getpixel((50, 20)), upright.getpixel((50, 180))
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]


def test_damaged_and_malicious_files_are_errors(monkeypatch):
    """Half images trained on as grey ones; a bomb that eats the machine's memory; decoders that nobody asked for."""
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    other_format = encoded(picture(1), "PPM")
    for content in (whole[: len(whole) // 2], b"", b"no image", encoded(picture(1))[:40], other_format):
        with pytest.raises(Exception):
            load_image(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Exception, match="bomb"):
        load_image(encoded(Image.new("L", (12, 12))))


@pytest.mark.parametrize("size", [(33, 50), (50, 33), (7, 5), (1, 9), (32, 32), (401, 300)])
def test_center_crop(size):
    """Squeezed pictures, crops off the centre by more than half a pixel, images smaller than the crop refused."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    ramp = Image.fromarray((np.stack([x, y, y], 2) * 255).astype(np.uint8))
    crop = np.asarray(center_crop(ramp, 32)).astype(float) / 255
    assert crop.shape == (32, 32, 3)
    if min(size) > 1:
        inside = np.arange(4, 28)  # the ramp at these columns and rows, away from the border
        for axis, extent in ((0, width), (1, height)):
            expected = 0.5 + ((inside + 0.5) / 32 - 0.5) * min(size) / extent
            assert np.abs(crop[..., axis].mean(axis)[inside] - expected).max() < 0.02
    if size == (32, 32):
        assert np.array_equal(np.asarray(center_crop(ramp, 32)), np.asarray(ramp))


@pytest.mark.parametrize("size", [(1000, 1000), (1000, 100), (90, 1000)])
def test_training_crops(monkeypatch, size):
    """Panoramas squeezed into squares; crops outside the picture; photos decoded so small that crops are enlarged."""
    drafted, boxes = [], []

    class Photos(Numbers):
        def load(self, index, draft_size=None):
            drafted.append([max(1, side * draft_size // min(size)) for side in size])  # as small as is allowed
            return Image.new("RGB", drafted[-1])

    original = data.resize
    monkeypatch.setattr(data, "resize", lambda image, to, box: boxes.append(box) or original(image, to, box))
    photos = Photos(50)
    for i in range(50):
        photos[i]
    for (width, height), (left, top, right, bottom) in zip(drafted, boxes, strict=True):
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0.74 < (right - left) / (bottom - top) < 1.34
        assert min(right - left, bottom - top) > 0.98 * photos.size


def test_uint8_roundtrip():
    """Truncation instead of rounding: every picture a shade darker, and rFID with it."""
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    assert np.array_equal(data.to_uint8(data.to_tensor(pixels)[None])[0], pixels)


# -----------------------------------------------------------------------------
# unreadable images


def test_unreadable_images_are_replaced_counted_and_named(folder):
    """A run that dies of one broken file; a replacement drawn at random; finds of workers that get lost."""
    (folder / "train/n01/n01_1.JPEG").write_bytes(b"broken")
    dataset = build_dataset(str(folder), "train", 8, False)
    stream = batches(dataset, 9, seed=0, workers=2)
    images, labels = next(stream)
    assert dataset.skipped() == [str(folder / "train/n01/n01_1.JPEG")]
    assert dataset.check_skipped() == dataset.skipped()
    assert dataset.check_skipped() == []  # named once
    again = build_dataset(str(folder), "train", 8, False)
    assert torch.equal(again[1][0], again[2][0]) and again[1][1] == again[2][1]

    (folder / "train/n02/n02_3.JPEG").write_bytes(b"broken")  # the last but two: 2 of 9 are too many
    again[6]
    with pytest.raises(UserError, match="2 of 9 images .*n01_1.JPEG, .*n02_3.JPEG"):
        again.check_skipped()


def test_nothing_readable_is_one_clear_error(tmp_path):
    """An endless search for a readable image; a multi-line traceback out of a worker process."""
    for i in range(3):
        write(tmp_path, f"a/{i}.png")
        (tmp_path / f"a/{i}.png").write_bytes(b"")
    dataset = build_dataset(str(tmp_path), "train", 8, True)
    for workers in (0, 1):
        try:
            next(batches(dataset, 2, seed=0, workers=workers))
            message = ""
        except UserError as error:  # pytest.raises would keep the loader alive, and its workers cost 5 s to collect
            message = str(error)
        assert "can be read" in message and "\n" not in message


# -----------------------------------------------------------------------------
# layouts


def as_folder(folder):
    return folder


def as_tar(folder):
    with tarfile.open(folder / "all.tar", "w") as tar:
        tar.add(folder / "train", "imagenet/train")
        tar.add(folder / "val", "./imagenet/val")
        link = tarfile.TarInfo("imagenet/train/n00/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("/train/n00/absolute.jpg", "imagenet/train/n00/../../../up.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    return folder / "all.tar"


def as_shards(folder):
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.*"), key=lambda path: path.name)  # classes scattered over shards
        for number in range(2):
            write_tar(folder / f"in-{split}-{number:03d}.tar",
                      [(f"{path.parent.name}/{path.name}", path.read_bytes()) for path in files[number::2]])
    return f"{folder}/in-*.tar"


def as_webdataset(folder):
    classes = sorted(os.listdir(folder / "train"))
    for split in ("train", "val"):
        members = []
        for number, path in enumerate(sorted((folder / split).rglob("*.*"))):
            members += [(f"{number:06d}.jpg", path.read_bytes()), (f"{number:06d}.json", b"{}"),
                        (f"{number:06d}.cls", str(classes.index(path.parent.name)).encode())]
        write_tar(folder / f"wds-{split}-000.tar", members)
    return f"{folder}/wds-*.tar"


def as_flat_val(folder):
    lines = []
    for path in sorted((folder / "val").rglob("*.png")):
        path.rename(folder / "val" / f"my {path.parent.name}.png")
        lines.append(f"my {path.parent.name}.png {path.parent.name}\n")
    (folder / "val_labels.txt").write_text("".join(lines))
    return folder


def as_pack(folder):
    data.pack(str(folder), str(folder / "packed"), 16, shard_size=4)
    return folder / "packed"


@pytest.mark.parametrize("layout", [as_folder, as_tar, as_shards, as_webdataset, as_flat_val, as_pack])
def test_all_layouts_are_the_same_data_set(folder, layout, capsys):
    """Class ids that differ between a folder and its tar; class n10 before n02; a split that leaks into the other."""
    expected = [contents(build_dataset(str(folder), split, 8, False)) for split in ("train", "val")]
    assert [len(split) for split in expected] == [9, 3]
    spec = str(layout(folder))
    for split, wanted in zip(("train", "val"), expected):
        dataset = build_dataset(spec, split, 8, False)
        assert dataset.num_classes == 3
        if layout is as_webdataset:  # a .cls file holds an id, and no name
            assert dataset.class_names == ["0", "1", "2"]
            dataset.class_names = ["n01", "n02", "n10"]
        else:  # class by class, in whatever shard they lie
            assert dataset.labels.tolist() == sorted(dataset.labels)
        assert dataset.class_names == ["n01", "n02", "n10"]
        got = contents(dataset)
        assert [name for name, _ in got] == [name for name, _ in wanted]
        tolerance = 4 if layout is as_pack else 0  # val's PNGs became JPEGs
        assert np.abs(np.array([c for _, c in got], int) - np.array([c for _, c in wanted], int)).max() <= tolerance


def test_pack_keeps_small_jpegs_and_names_what_it_leaves_out(folder, capsys):
    """Small photos compressed a second time; an unreadable one that goes unreported; half a pack."""
    (folder / "train/n02/n02_3.JPEG").write_bytes(b"broken")
    wds = as_webdataset(folder)
    data.pack(wds, str(folder / "packed"), 16)
    assert "left out 1 unreadable" in capsys.readouterr().out
    assert sorted(os.listdir(folder / "packed")) == ["train-000000.tar", "val-000000.tar"]
    assert not (folder / "packed.partial").exists()
    packed = build_dataset(f"{folder}/packed/*.tar", "train", 16, False)
    assert len(packed) == 8 and packed.class_names == ["0", "1", "2"]
    assert packed.raw(0) == (folder / "train/n01/n01_0.JPEG").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        data.pack(wds, str(folder / "packed"), 16)


def test_pack_keeps_class_ids(tmp_path, capsys):
    """Ids 2 and 10 of eleven classes renumbered to 1 and 0, since a pack has a folder for each class met, by name."""
    members = [(f"{i}.png", encoded(picture(i))) for i in range(40)] + [
        (f"{i}.cls", str(2 + 8 * (i % 2)).encode()) for i in range(40)]
    write_tar(tmp_path / "ids.tar", members)
    data.pack(str(tmp_path / "ids.tar"), str(tmp_path / "packed"), 16)
    for spec in ("ids.tar", "packed"):
        dataset = build_dataset(str(tmp_path / spec), "train", 16, False)
        assert dataset.num_classes == 11 and set(dataset.labels) == {2, 10}


def test_pack_shrinks_large_images(tmp_path, capsys):
    """A pack that crops, squeezes or enlarges; a short side too small for the centre crop."""
    for i, size in enumerate([(90, 60), (60, 120), (10, 8)]):
        write(tmp_path, f"a/{i}.png", picture(i, size))
    data.pack(str(tmp_path), str(tmp_path / "packed"), 32)
    sizes = {}
    for split in ("train", "val"):
        packed = build_dataset(str(tmp_path / "packed"), split, 32, False)
        sizes.update({packed.name(i)[-5]: packed.load(i).size for i in range(len(packed))})
    assert sizes == {"0": (54, 36), "1": (36, 72), "2": (10, 8)}


def test_flat_folder_is_unlabelled_and_split_by_hash(tmp_path):
    """Train and val images that overlap; a split that moves when images are added; a label made up for no class."""
    for i in range(60):
        write(tmp_path, f"{i}.PNG", picture(i))
    splits = {split: build_dataset(str(tmp_path), split, 8, False) for split in ("train", "val")}
    names = {split: {dataset.name(i) for i in range(len(dataset))} for split, dataset in splits.items()}
    assert len(names["train"]) + len(names["val"]) == 60 and not names["train"] & names["val"]
    assert 1 <= len(names["val"]) <= 12
    assert splits["train"].num_classes == 0 and splits["train"].class_names == [] and splits["train"][5][1] == 0
    assert "val split" in splits["train"].describe()  # the user is told
    for i in range(60, 80):
        write(tmp_path, f"{i}.PNG", picture(i))
    more = build_dataset(str(tmp_path), "val", 8, False)
    assert names["val"] <= {more.name(i) for i in range(len(more))}


def test_no_split_is_empty(tmp_path):
    """An empty split when somebody overfits one picture, or four, to try the code."""
    for count, expected in enumerate([[1, 1], [1, 1], [2, 1], [3, 1]], 1):
        write(tmp_path, f"{count}.png")
        assert [len(build_dataset(str(tmp_path), split, 8, True)) for split in ("train", "val")] == expected


def test_a_class_called_train(tmp_path):
    """Class folders airplane, bird, train mistaken for a data set with a train/ split."""
    for name in ("airplane", "bird", "train"):
        write(tmp_path, f"{name}/1.jpg")
    assert build_dataset(str(tmp_path), "train", 8, False).class_names == ["airplane", "bird", "train"]


def test_symlink_loops_end(folder):
    """An endless walk through a link that leads back up."""
    (folder / "train/n01/loop").symlink_to(folder, target_is_directory=True)
    (folder / "train/self").symlink_to("self")
    assert len(build_dataset(str(folder), "train", 8, False)) == 9


def broken_layouts(root):
    """(name, what is wrong) -> the data set that is wrong in this way."""
    write(root, "unknown/train/cat/1.jpg"), write(root, "unknown/val/dog/1.jpg")
    write(root, "unlabelled/train/cat/1.jpg"), write(root, "unlabelled/val/1.jpg")
    write(root, "badlabel/train/cat/1.jpg"), write(root, "badlabel/val/1.jpg")
    (root / "badlabel/val/labels.txt").write_text("1.jpg dog\n")
    (root / "empty").mkdir()
    write_tar(root / "empty.tar", [("readme.txt", b"")])
    write_tar(root / "cut.tar", [("a/1.png", encoded(Image.effect_noise((64, 64), 50)))])
    (root / "cut.tar").write_bytes((root / "cut.tar").read_bytes()[:1500])
    write_tar(root / "half.tar", [("1.png", encoded(picture(1))), ("1.cls", b"0"), ("2.png", encoded(picture(2)))])
    (root / "packed.tar.gz").write_bytes(b"")


@pytest.mark.parametrize("spec, message", [
    ("missing", "does not exist: pass shapes"), ("*.jpg", "does not exist"), ("empty", "no images"),
    ("empty.tar", "no images"), ("unknown", "'dog'"), ("unlabelled", "val_labels.txt"), ("badlabel", "line 1"),
    ("cut.tar", "no intact"), ("half.tar", "2.png .* no .cls"), ("packed.tar.gz", "neither"),
])
def test_mistakes_in_the_data_are_user_errors(tmp_path, spec, message):
    """A traceback, or worse a wrong data set, where one line could tell the user what to do."""
    broken_layouts(tmp_path)
    with pytest.raises(UserError, match=message):
        build_dataset(str(tmp_path / spec), "val", 8, False)


# -----------------------------------------------------------------------------
# shapes


def test_shapes_are_deterministic_balanced_and_disjoint():
    """Validation images that occur in training; pictures that depend on the order of access, or on the cache."""
    train, val = (build_dataset("shapes", split, 32, False) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (20_000, 1_000, 10)
    assert np.bincount(train.labels).tolist() == [2000] * 10
    assert train.name(123) == "shapes/train/123"
    first = [train[i][0] for i in range(40)]
    assert all(torch.equal(first[i], train[i][0]) for i in reversed(range(40)))  # from the cache
    fresh = build_dataset("shapes", "train", 32, False)
    assert torch.equal(first[39], fresh[39][0])
    assert not torch.equal(first[0], build_dataset("shapes", "train", 32, False, seed=1)[0][0])
    seen = {image.numpy().tobytes() for image in first}
    assert len(seen) == 40 and not seen & {val[i][0].numpy().tobytes() for i in range(40)}


def test_shapes_training_only_mirrors():
    """A second random crop that cuts the object off; a flip that never happens."""
    train, plain = (build_dataset("shapes", "train", 32, augment) for augment in (True, False))
    flipped = [torch.equal(train[e, i][0], plain[i][0].flip(2)) for e in range(2) for i in range(20)]
    kept = [torch.equal(train[e, i][0], plain[i][0]) for e in range(2) for i in range(20)]
    assert all(a or b for a, b in zip(flipped, kept)) and 5 < sum(flipped) < 35


@pytest.mark.parametrize("name", data.SHAPES)
def test_shapes_can_be_seen(name, monkeypatch):
    """An object in the colour of its background, or one that leaves the picture: a class nobody could recognise."""
    draws = [data.uniform(20, number) for number in range(20)]
    pictures = [data.draw_shape(name, 32, u).astype(int) for u in draws]
    monkeypatch.setitem(data.SHAPES, name, [])  # no outline: the background alone
    for picture, u in zip(pictures, draws):
        change = picture - data.draw_shape(name, 32, u)
        seen = np.abs(change).sum(2) > 60
        rows, columns = seen.any(1).sum(), seen.any(0).sum()
        assert seen.sum() > 20 and 10 <= max(rows, columns) <= 29
        assert name not in ("circle", "ring") or abs(rows - columns) <= 1  # or a side would be cut off
        assert np.median(np.abs(change[seen] @ [0.299, 0.587, 0.114])) > 0.25 * 255


# -----------------------------------------------------------------------------
# the strong augmentation, the pictures, the command line


def test_augment_treats_each_image_by_itself():
    """Statistics or kernels shared over the batch: a view would depend on its neighbours, and on the number of GPUs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
    draws = torch.rand(8, data.AUGMENT_DRAWS, generator=generator)
    views = data.augment(images, draws)
    assert views.shape == images.shape and -1 <= views.min() and views.max() <= 1
    for i in range(8):
        assert torch.allclose(views[i : i + 1], data.augment(images[i : i + 1], draws[i : i + 1]), atol=1e-5)
    assert not torch.allclose(views, data.augment(images, draws.flip(0)), atol=0.1)


def test_augment_can_be_the_identity():
    """A crop off by a pixel, a blur or a colour shift where the draws ask for none."""
    image = data.to_tensor(np.asarray(Image.radial_gradient("L").resize((32, 32)).convert("RGB")))[None]
    draws = torch.full((1, data.AUGMENT_DRAWS), 0.999999)  # whole area, every coin says no
    draws[0, 1] = 0.5  # square
    assert torch.allclose(data.augment(image, draws), image, atol=1e-3)


def test_image_grid(tmp_path):
    """Pictures too small to see, rows out of order, a half-written file where the old one was."""
    images = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, 0.0, 1.0)])
    path = tmp_path / "new" / "grid.png"
    data.image_grid(images, path, labels=["a", "b", "ünï"], columns=2)
    sheet = Image.open(path)
    assert sheet.width >= 2 * 96 and sheet.height >= 2 * 96
    assert sheet.getpixel((50, 60)) == (0, 0, 0) and sheet.getpixel((150, 60)) == (128, 128, 128)
    data.image_grid([images[:1], images[1:]], str(path), row_titles=["one", "two"], scale=1)
    assert Image.open(path).height < 96
    assert os.listdir(path.parent) == ["grid.png"]


def command(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *arguments], capture_output=True, text=True)


def test_command_line(tmp_path):
    """A traceback for a mistyped path; a wrong exit code; a preview that is not written."""
    failed = command("--data", str(tmp_path / "nothing"))
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    shown = command("--split", "val", "--out", str(tmp_path))
    assert shown.returncode == 0 and "circle 100" in shown.stdout and "shapes/val/" in shown.stdout
    assert (tmp_path / "preview.png").exists()
