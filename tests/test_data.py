"""Tests of the image half of data.py. Each docstring names the bug that the test would catch."""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import random_images
from kills import ROOT
from PIL import Image, PngImagePlugin

import data
from data import UserError, batches, build_dataset, center_crop, load_image, seeded

ONE = data.Run(0, 1, torch.device("cpu"), torch.float32)

def config(**changes):
    values = dict(batch_size=4, accum=1, seed=0, workers=0, data="")
    return types.SimpleNamespace(**{**values, **changes})

def picture(number, size=(20, 16)):
    """A picture that tells its number by its colour, in every pixel."""
    return Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, 200))

def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

def png(number):
    return encoded(picture(number))

def write(root, files):
    """{path: content}. x.tar/a/1.png is a member of a tar; text is a link to what it names."""
    for path, content in files.items():
        archive, inside, name = path.partition(".tar/")
        file = root / (archive + ".tar" if inside else path)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not inside:
            file.write_bytes(content)
            continue
        info = tarfile.TarInfo(name)
        if isinstance(content, str):
            info.type = tarfile.SYMTYPE if content.startswith("../") else tarfile.LNKTYPE
            info.linkname, content = content, b""
        elif name.endswith("/"):
            info.type = tarfile.DIRTYPE
        info.size = len(content)
        with tarfile.open(file, "a") as tar:
            tar.addfile(info, io.BytesIO(content))

# split and class of each image
IMAGES = [("train", "n02")] * 4 + [("train", "n01")] * 3 + [("train", "n10")] * 2
IMAGES += [("val", "n02"), ("val", "n01"), ("val", "n10")]

def lay_out(root, place, more={}):
    """Write IMAGES where place(split, class, number) says, and more files."""
    jpegs = [encoded(picture(i), "JPEG", quality=90) for i in range(12)]
    write(root, {place(*IMAGES[i], i): jpegs[i] for i in range(12)} | more)

@pytest.fixture
def folder(tmp_path):
    """train/ and val/ with class folders."""
    lay_out(tmp_path, lambda split, name, i: f"{split}/{name}/{i}.jpg")
    return tmp_path

def build(spec, split="train", size=8, train=False, **more):
    return build_dataset(str(spec), split, size, train, **more)

def contents(dataset):
    """What a data set holds: [(class name, colour)], sorted."""
    pairs = [dataset[i] for i in range(len(dataset))]
    return sorted((dataset.class_names[label], tuple(data.to_uint8(image[None])[0, 0, 0]))
                  for image, label in pairs)

def sizes(spec, **more):
    return [len(build(spec, split, **more)) for split in ("train", "val")]

class Numbers(data.ImageDataset):
    """n images whose label is their index: to see which image came when."""

    def __init__(self, n):
        super().__init__(np.arange(n), [str(i) for i in range(n)], 4, True, 0)

    def load(self, index, draft_size=None):
        return picture(index)

def labels_of(stream, count):
    return [next(stream)[1].tolist() for _ in range(count)]

def test_each_epoch_is_a_permutation_of_seed_and_epoch():
    """Samples repeated or lost inside an epoch; an order that ignores seed or epoch."""
    stream, again, other = [sum(labels_of(batches(Numbers(10), config(seed=seed), ONE), 5), [])
                            for seed in (0, 0, 1)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:] and stream == again != other

@pytest.mark.parametrize("world, accum", [(2, 1), (1, 3), (2, 3)])
def test_ranks_and_accumulation_partition_the_global_batch(world, accum):
    """Two GPUs that see other data than one; a resumed run that starts over."""
    settings = config(batch_size=12, accum=accum)
    whole = labels_of(batches(Numbers(30), config(batch_size=12), ONE), 4)
    for start in (0, 3):  # the middle of an epoch
        streams = [batches(Numbers(30), settings, ONE._replace(rank=rank, world=world), start)
                   for rank in range(world)]
        for step in whole[start:]:
            micro = [next(stream)[1].tolist() for _ in range(accum) for stream in streams]
            assert sum(micro, []) == step

def test_workers_change_nothing(folder):
    """A worker's own random state; uint8 transport that changes a pixel."""
    dataset = build(folder, train=True)
    state = torch.get_rng_state()
    streams = [batches(dataset, config(workers=workers), ONE) for workers in (0, 2)]
    for step in range(6):
        (a, la), (b, lb) = map(next, streams)
        assert torch.equal(a, b) and torch.equal(la, lb)
        epoch, place = divmod(step * 4, 9)
        assert torch.equal(a[0], dataset[epoch, int(data.epoch_order(9, 0, epoch)[place])][0])
    assert torch.equal(state, torch.get_rng_state())
    assert a.dtype == torch.float32 and a.is_contiguous()

def test_crops_and_views(folder):
    """Frozen crops, or crops that depend on what came before; codes of other crops."""
    gradient = Image.linear_gradient("L").rotate(90)
    write(folder, {"train/n01/4.jpg": encoded(gradient, "JPEG")})
    dataset, again, other = [build(folder, size=16, train=True, seed=s) for s in (0, 0, 1)]
    first = dataset[0, 0][0]
    assert torch.equal(first, dataset[0][0]) and torch.equal(first, again[0, 0][0])
    assert not torch.equal(first, dataset[1, 0][0]) and not torch.equal(first, other[0, 0][0])
    centre, _ = build(folder, size=16)[0]
    views = [dataset[data.View(0, v)][0] for v in range(4)]
    assert torch.equal(views[0], centre) and torch.equal(views[1], centre.flip(2))
    assert not torch.equal(views[2], views[3])
    keys = [[data.View(0, 2), data.View(3, 1)]]
    (images, labels), = data.load_batches(dataset, keys, ONE)
    assert torch.equal(images[0], views[2]) and labels[1] == dataset.labels[3]

def test_val_batches_and_subset():
    """The first N of a sorted file; ranks that overlap or lose rows."""
    rows = data.subset(100, 20)
    assert len(rows) == 20 and rows == sorted(set(rows)) != list(range(20))
    assert rows != data.subset(100, 20, seed=1)
    assert data.subset(5, 0) == data.subset(5, 9) == list(range(5))
    labels = []
    for rank in range(3):
        part = data.val_batches(Numbers(50), 13, 4, ONE._replace(rank=rank, world=3))
        labels += sum((labels.tolist() for _, labels in part), [])
    assert labels == data.subset(50, 13)

def plain(mode, value):
    return Image.new(mode, (6, 4), value)

GREY16 = Image.fromarray(np.full((4, 6), 25700, dtype=np.uint16))
PALETTE = plain("P", 1)
PALETTE.putpalette([255, 0, 0, 0, 0, 255])
MODES = [
    (plain("RGB", (9, 8, 7)), "PNG", {}, (9, 8, 7)),
    (plain("RGB", (9, 9, 9)), "PNG", dict(transparency=(9, 9, 9)), 255),
    (plain("L", 77), "PNG", {}, 77),
    (plain("1", 1), "PNG", {}, 255),
    (plain("LA", (0, 128)), "PNG", {}, 127),
    (plain("RGBA", (0, 0, 0, 128)), "PNG", {}, 127),
    (PALETTE, "PNG", {}, (0, 0, 255)),
    (PALETTE, "PNG", dict(transparency=1), 255),
    (PALETTE, "GIF", dict(transparency=1), 255),
    (GREY16, "PNG", {}, 100),
    (Image.fromarray(np.full((4, 6), 200, dtype=np.uint16)), "PNG", {}, 1),
    (Image.fromarray(np.full((4, 6), 65535, dtype=np.uint16)), "PNG", {}, 255),
    (GREY16, "TIFF", {}, 100),
    (plain("I", 25700), "PPM", {}, 100),
    (plain("CMYK", (0, 255, 255, 0)), "JPEG", dict(quality=100), (255, 0, 0)),
]

@pytest.mark.parametrize("image, kind, options, color", MODES)
def test_every_mode_becomes_rgb(image, kind, options, color):
    """16-bit grey clipped to white; transparency as arbitrary colours; no rounding."""
    image = load_image(encoded(image, kind, **options))
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - color).max() <= 1

def test_eight_bits_round_trip():
    """Channels last, another range, or a float that is cut off, not rounded."""
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
    assert np.array_equal(data.to_uint8(data.from_uint8(pixels)), pixels)
    images = random_images(2)
    assert (data.from_uint8(data.to_uint8(images)) - images).abs().max() <= 1 / 255 + 1e-6

@pytest.mark.parametrize("mode, value", [("I", 100), ("I", 10 ** 6), ("I", -1), ("F", 0.2)])
def test_an_unknown_white_is_refused(mode, value):
    """A guess at which value is white: images that come out black or white."""
    image = plain(mode, value)
    if value < 0:
        image = Image.fromarray(np.array([[value, 300]], dtype=np.int32))
    with pytest.raises(data.Unreadable, match="convert it to 8 bits"):
        load_image(encoded(image, "TIFF"))

def test_exif_orientation_survives_draft_decoding():
    """Photos of phones trained on sideways."""
    image = Image.new("RGB", (800, 400), "blue")
    image.paste("red", (0, 0, 400, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show: left becomes top
    upright = load_image(encoded(image, "JPEG", exif=exif), draft_size=100)
    assert upright.size == (100, 200)
    top, bottom = upright.getpixel((50, 20)), upright.getpixel((50, 180))
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]

def test_damaged_files_say_why_and_large_ones_are_read(monkeypatch):
    """Half images trained on; a reason that helps nobody; large texts as broken."""
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    for content, reason in ((whole[:len(whole) // 2], "truncated"), (b"", "empty"),
                            (b"no image", "not an image"), (png(1)[:40], ".")):
        with pytest.raises(data.Unreadable, match=reason):
            load_image(content)
    assert load_image(encoded(Image.new("1", (12_000, 10_000)))).size == (12_000, 10_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "x" * 3_000_000, zip=True)
    content = encoded(picture(1), pnginfo=text, icc_profile=bytes(3_000_000))
    assert load_image(content).size == (20, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(data.Unreadable, match="bomb.*raise MAX_PIXELS in data.py"):
        load_image(encoded(Image.new("L", (18, 12))))

@pytest.mark.parametrize("size", [(33, 50), (50, 33), (7, 5), (32, 32), (401, 300)])
def test_center_crop(size):
    """Squeezed pictures, crops off the centre, small images refused."""
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    ramp = Image.fromarray((np.stack([x, y, y], 2) * 255).astype(np.uint8))
    crop = np.asarray(center_crop(ramp, 32)).astype(float) / 255
    assert crop.shape == (32, 32, 3)
    inside = np.arange(4, 28)  # the ramp at these columns and rows, away from the border
    for axis, extent in ((0, width), (1, height)):
        expected = 0.5 + ((inside + 0.5) / 32 - 0.5) * min(size) / extent
        assert np.abs(crop[..., axis].mean(axis)[inside] - expected).max() < 0.02

@pytest.mark.parametrize("size", [(1000, 1000), (1000, 100), (90, 1000)])
def test_training_crops(size):
    """Panoramas squeezed; crops outside the picture or enlarged."""
    width, height = [8 * side // min(size) for side in size]  # as decoded for crops of 4 pixels
    for i in range(50):
        left, top, right, bottom = data.random_box((width, height), data.uniform(4, i), (0.5, 1))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        assert 0.74 < (right - left) / (bottom - top) < 1.34
        assert min(right - left, bottom - top) > 0.98 * 4

def test_unreadable_images_are_replaced_counted_and_named(folder, capsys):
    """A run that dies of one broken file; finds of workers that get lost."""
    write(folder, {"train/n01/5.jpg": b"broken"})
    found = f"{folder}/train/n01/5.jpg (not an image that Pillow reads)"
    for workers in (0, 2):
        dataset = build(folder)
        stream = batches(dataset, config(batch_size=9, workers=workers), ONE)
        next(stream)
        next(stream)
        assert dataset.unreadable() == [found]
        assert capsys.readouterr().err.count(found) == 1
        stream.close()
    again = build(folder)
    assert torch.equal(again[1][0], again[2][0]) and again[1][1] == again[2][1]
    write(folder, {"train/n02/3.jpg": b"broken"})  # the last but two: 2 of 9 are too many
    write(folder, {"empty/a/1.png": b""})
    for workers in (0, 1):
        settings = config(batch_size=9, workers=workers)
        with pytest.raises(UserError, match="2 of 9 images .*5.jpg .*3.jpg"):
            next(batches(build(folder), settings, ONE))
        with pytest.raises(UserError, match=r"can be read.*empty file") as caught:
            next(batches(build(folder / "empty"), settings, ONE))
        assert "\n" not in str(caught.value)

def test_our_own_bugs_are_no_bad_data(folder, monkeypatch):
    """A missing os.pread reported as damaged files."""
    write(folder, {"x.tar/a/1.png": png(1)})
    dataset, files = build(folder / "x.tar"), build(folder)
    with monkeypatch.context() as patch:
        patch.delattr(os, "pread")
        with pytest.raises(AttributeError):
            dataset[0]
        patch.setattr(data, "to_rgb", lambda image: image.no_such_thing)
        with pytest.raises(AttributeError):
            files[0]
    os.remove(folder / "train/n01/4.jpg")  # but a file that has gone is the data's fault
    files[0]
    assert "No such file" in files.unreadable()[0]

def only_val_is_flat(split, name, i):
    return f"{split}/{name}/{i}.jpg" if split == "train" else f"val/my {i}.jpg"

def tiny_imagenet(split, name, i):
    return f"train/{name}/images/{i}.jpg" if split == "train" else f"val/images/{i}.jpg"

def webdataset_labels():
    """A label for each image, in one of three forms."""
    files = {}
    for i, (split, name) in enumerate(IMAGES):
        label = ("n01", "n02", "n10").index(name)
        record = json.dumps({("label", "cls")[i // 2 % 2]: label})
        kind, text = ("cls", str(label)) if i % 2 else ("json", record)
        files[f"w-{split}-000.tar/s{i}.{kind}"] = text.encode()
    return files

LAYOUTS = [  # --data, the place of an image, other files
    ("all.tar", lambda split, name, i: f"all.tar/./imagenet/{split}/{name}/{i}.jpg", {}),
    ("in-*.tar", lambda split, name, i: f"in-{split}-{i % 2:03d}.tar/{name}/{i}.jpg", {}),
    ("w-{train,val}-{000..000}.tar",
     lambda split, name, i: f"w-{split}-000.tar/s{i}.input.jpg", webdataset_labels()),
    ("", lambda split, name, i: f"{split}/{name}.tar/{i}.jpg", {}),
    ("", only_val_is_flat,
     {"val_labels.txt": b"my 9.jpg n02\nmy 10.jpg n01\nmy 11.jpg n10\n"}),
    ("", tiny_imagenet,
     {"val/val_annotations.txt": b"9.jpg\tn02\t0\t32\n10.jpg\tn01\t4\n11.jpg\tn10\t9\n",
      "test/images/test_0.JPEG": png(1)}),
    ("packed", None, {}),
]

@pytest.mark.parametrize("spec, place, more", LAYOUTS)
def test_all_layouts_are_the_same_data_set(folder, spec, place, more):
    """Class ids that differ between folder and tar."""
    root = folder / "other"
    if place:
        lay_out(root, place, more)
    else:
        data.pack(str(folder), str(root / spec), 16, shard_size=4)
    for split, count in (("train", 9), ("val", 3)):
        dataset, expected = build(root / spec, split), build(folder, split)
        if spec.startswith("w-"):  # WebDataset: a label is an id, and no name
            assert dataset.class_names == ["0", "1", "2"]
            dataset.class_names = ["n01", "n02", "n10"]
        assert dataset.class_names == expected.class_names == ["n01", "n02", "n10"]
        assert contents(dataset) == contents(expected) and len(dataset) == count
    unlabelled = build(root / spec, labels=False)
    assert (unlabelled.num_classes, unlabelled[0][1], len(unlabelled)) == (0, 0, 9)

@pytest.mark.parametrize("train", ["train", "training", "Train"])
@pytest.mark.parametrize("val", ["val", "valid", "validation", "dev", "test", "testing"])
def test_split_words(tmp_path, train, val):
    """A folder valid/ ignored, training/ a class, val shards in train."""
    for split, count in ((train, 30), (val, 1)):
        for place in ("inside.tar/x/SPLIT", "below/SPLIT/0.tar", "named/SPLIT_03.tar",
                      "folders/SPLIT"):
            place = place.replace("SPLIT", split)
            write(tmp_path, {f"{place}/cat/{i}.png": png(i) for i in range(count)})
    for spec in ("folders", "inside.tar", "below", "below/*/*.tar", "named", "named/*.tar"):
        assert sizes(tmp_path / spec) == [30, 1], spec
        assert build(tmp_path / spec).class_names == ["cat"]
    write(tmp_path, {f"folders/val/cat/{i}.png": png(i) for i in range(2)})
    assert sizes(tmp_path / "folders") == [30, 2]  # val before test

def test_what_is_left_out_is_said(tmp_path):
    """Empty classes that move ids; files not counted; a class train/ as a split."""
    kinds = {"cat/1.jfif": "JPEG", "cat/2.jpe": "JPEG", "cat/3.ppm": "PPM", "cat/4.jpg": "AVIF",
             "emu/1.avif": "AVIF", "dog/1.heic": "PNG", "cat/notes.txt": "PNG", "1.png": "PNG"}
    write(tmp_path, {f"all/{path}": encoded(picture(1), kind) for path, kind in kinds.items()})
    dataset = build(tmp_path / "all")
    everything = len(dataset) + len(build(tmp_path / "all", "val"))
    assert everything == 5 and dataset.class_names == ["cat", "dog", "emu"]
    for text in ("1 classes without images: dog", "1 .heic", "1 .txt", "1 images without a class"):
        assert text in dataset.describe()
    assert all(dataset[i][0].isfinite().all() for i in range(len(dataset)))
    assert not dataset.faults
    names = ["airplane", "bird", "train"]
    for place in ("folders/{}/1.jpg", "tars/{}.tar/1.png", "tars/{}.tar/2.png"):
        write(tmp_path, {place.format(name): png(1) for name in names})
    assert build(tmp_path / "folders").class_names == build(tmp_path / "tars").class_names == names

def test_stray_folders_cost_themselves(folder, monkeypatch):
    """An unreadable folder or a link back up ends the run."""
    write(folder, {"train/lost+found/1.png": png(1), "train/secret/1.png": png(1)})
    (folder / "train/n01/loop").symlink_to(folder, target_is_directory=True)
    (folder / "train/self").symlink_to("self")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    dataset = build(folder)
    assert len(dataset) == 9 and dataset.class_names == ["n01", "n02", "n10"]
    assert "lost+found" in dataset.describe()
    assert "secret/ (Permission denied)" in dataset.describe()

def test_tars_are_read_to_the_end(tmp_path):
    """A damaged header, a second archive, links or absolute names that drop images."""
    noise = [encoded(Image.effect_noise((30, 30), 50 + i)) for i in range(20)]
    write(tmp_path, {f"all.tar/{'ab'[i // 10]}/{i}.png": noise[i] for i in range(20)})
    assert sum(sizes(tmp_path / "all.tar")) == 20
    with tarfile.open(tmp_path / "all.tar") as tar:
        member = tar.getmembers()[5]
    whole = (tmp_path / "all.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[member.offset + 3] ^= 1
    ends = (member.offset_data + 100, member.offset, member.offset + 9)
    for bad in (damaged, *(whole[:end] for end in ends)):
        write(tmp_path, {"bad.tar": bytes(bad)})
        with pytest.raises(UserError, match="no intact, uncompressed tar"):
            build(tmp_path / "bad.tar")
    write(tmp_path, {"two.tar": whole + bytes(2 ** 21) + whole})
    with pytest.raises(UserError, match="a second archive"):
        build(tmp_path / "two.tar")
    members = {"/d/a/1.png": png(1), "/d/b/2.png": "/d/a/1.png", "/d/b/3.png": "d/gone.png",
               "/d/b/4.png": "../a/1.png", "/d/b/5.png": "d/a/1.png", "/d/b/6.png": "/d/b/4.png",
               "/d/c/": b""}
    write(tmp_path, {f"x.tar/{name}": content for name, content in members.items()})
    train, val = [build(tmp_path / "x.tar", split) for split in ("train", "val")]
    assert len(train) + len(val) == 5 and train.class_names == ["a", "b", "c"]
    assert torch.equal(train[0][0], val[0][0]) and torch.equal(train[1][0], val[0][0])
    for text in ("1 links to no image", "without images: c"):
        assert text in train.describe()

def test_digest(folder):
    """An image moved or replaced, and old codes reused."""
    seen = [build(folder).digest()]
    assert build(folder, train=True).digest() == seen[0]
    for moves in (["train/n01/4.jpg train/n02/4.jpg"],
                  ["train/n10 train/n11", "val/n10 val/n11"]):
        for old, new in map(str.split, moves):
            os.rename(folder / old, folder / new)
        seen.append(build(folder).digest())
    write(folder, {"train/n02/0.jpg": png(1), "x.tar/a/1.png": png(1)})
    others = [build(folder), build(folder, labels=False), build(folder / "x.tar"), build("shapes"),
              build("shapes", seed=1), build("shapes", size=16)]
    seen += [dataset.digest() for dataset in others]
    assert len(set(seen)) == len(seen) == 9

def test_a_split_without_val(tmp_path):
    """Splits that overlap or are empty; classes in turn, of which val gets a single one."""
    for count, expected in enumerate([[1, 1], [1, 1], [2, 1], [3, 1]], 1):
        write(tmp_path, {f"few/{count}.png": png(1)})
        assert sizes(tmp_path / "few") == expected
    write(tmp_path, {f"flat/{i}.PNG": png(i) for i in range(60)})
    train, val = [build(tmp_path / "flat", split) for split in ("train", "val")]
    names = [{part.name(i) for i in range(len(part))} for part in (train, val)]
    assert list(map(len, names)) == [57, 3] and not names[0] & names[1]
    write(tmp_path, {f"pairs.tar/{i:03d}.png": png(i) for i in range(100)})
    write(tmp_path, {f"pairs.tar/{i:03d}.cls": str(i % 10).encode() for i in range(100)})
    assert len(set(build(tmp_path / "pairs.tar", "val").labels.tolist())) > 2
    assert train.num_classes == 0 and train[5][1] == 0 and "is val" in train.describe()

def test_label_file_that_the_message_asks_for_works(tmp_path):
    """A remedy that does not work."""
    lay_out(tmp_path, tiny_imagenet)
    with pytest.raises(UserError, match="or write .*val_labels.txt") as caught:
        build(tmp_path, "val")
    place = str(caught.value).split("or write ")[1].split(" with lines")[0]
    lines = b"9.jpg 0\n10.jpg n02\n"
    write(tmp_path, {place: lines})
    with pytest.raises(UserError, match="no line for images/11.jpg"):
        build(tmp_path, "val")
    write(tmp_path, {place: lines + b"11.jpg 2\n"})
    assert sorted(build(tmp_path, "val").labels.tolist()) == [0, 1, 2]

@pytest.mark.parametrize("spec, message", [
    ("missing", "no folder and no .tar"), ("*.jpg", "no .tar"), ("empty", "holds no images"),
    ("w-{0..1}.tar", "no .tar file .*w-1.tar"), ("empty.tar", "no images .*1 .txt"),
    ("unknown", "'dog'"), ("badlabel", "line 3"), ("half.tar", "2.png .* no .cls"),
    ("packed.tar.gz", "no .tar file")])
def test_mistakes_in_the_data_are_user_errors(tmp_path, spec, message):
    """A traceback where one line could tell the user what to do."""
    images = ("unknown/train/cat/1.jpg", "unknown/val/dog/1.jpg", "badlabel/train/cat/1.jpg",
              "badlabel/val/1.jpg", "packed.tar.gz", "w-0.tar/1.png", "half.tar/1.png",
              "half.tar/2.png")
    write(tmp_path, {path: png(1) for path in images})
    write(tmp_path, {"badlabel/val/labels.txt": b"\n\n1.jpg dog\n", "empty.tar/readme.txt": b"",
                     "half.tar/1.cls": b"0"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        build(tmp_path / spec, "val")

def test_pack_names_what_it_leaves_out(folder, capsys, monkeypatch):
    """A pack lost to one picture; a partial folder."""
    write(folder, {"train/n02/3.jpg": b"broken",
                   "train/n02/2.jpg": encoded(Image.new("1", (1, 70_000)))})
    data.pack(str(folder), str(folder / "packed"), 16, workers=1)
    said = capsys.readouterr().out
    assert "left out 2" in said and "3.jpg (not an image" in said and "as JPEG" in said
    packed = build(f"{folder}/packed/*.tar")
    assert len(packed) == 7
    assert packed.raw(0) == (folder / "train/n01/4.jpg").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        data.pack(str(folder), str(folder / "packed"), 16)
    monkeypatch.setattr(data, "add_to_tar", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError):
        data.pack(str(folder), str(folder / "other"), 16)
    assert not list(folder.glob("other*"))

def test_pack_keeps_class_ids_and_shrinks(tmp_path, capsys):
    """Ids 2 and 10 renumbered; Latin-1 class names that end the pack."""
    write(tmp_path, {f"ids.tar/{i}.png": encoded(picture(i, (90, 60))) for i in range(40)})
    write(tmp_path, {f"ids.tar/{i}.cls": str(2 + 8 * (i % 2)).encode() for i in range(40)})
    data.pack(str(tmp_path / "ids.tar"), str(tmp_path / "packed"), 32)
    for spec in ("ids.tar", "packed"):
        dataset = build(tmp_path / spec)
        assert dataset.num_classes == 11 and set(dataset.labels) == {2, 10}
    assert dataset.load(0).size == (72, 48)
    for name in (os.fsdecode(b"caf\xe9"), "犬"):
        write(tmp_path, {f"latin/{name}/1.png": png(1)})
    data.pack(str(tmp_path / "latin"), str(tmp_path / "latin_packed"), 8)
    names = build(tmp_path / "latin").class_names
    assert build(tmp_path / "latin_packed").class_names == names and len(names) == 2
    # a class that is called as a split is
    write(tmp_path, {f"coco/{split}/{name}/{i}.png": png(i) for split in ("train", "val")
                     for name in ("bus", "train", "val") for i in range(3)})
    data.pack(str(tmp_path / "coco"), str(tmp_path / "coco_packed"), 8)
    assert sizes(tmp_path / "coco_packed") == sizes(tmp_path / "coco") == [9, 9]

@pytest.mark.parametrize("labels, names", [
    (['{"label": null}'] * 3, []), (['{"label": null, "cls": 0}'] * 3, ["0"]),
    (["000", "001", "010"], ["000", "001", "010"]),
    (["0", "2", "1"], ["0", "1", "2"])])
def test_webdataset_labels(tmp_path, labels, names):
    """A null that becomes a class; padded ids that are names and cannot be found as numbers."""
    for i, label in enumerate(labels * 10):
        kind = "json" if label[0] == "{" else "cls"
        write(tmp_path, {f"w.tar/{i}.png": png(i), f"w.tar/{i}.{kind}": label.encode()})
    for split in ("train", "val"):
        assert build(tmp_path / "w.tar", split).class_names == names

def test_shapes_are_deterministic_balanced_and_disjoint():
    """Val images that occur in training; an order of access that matters."""
    train, val = (build("shapes", split, 32) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (20_000, 1_000, 10)
    assert np.bincount(train.labels).tolist() == [2000] * 10
    first = [train[i][0] for i in range(40)]
    again = build("shapes", size=32)
    assert all(torch.equal(first[i], again[i][0]) for i in reversed(range(40)))
    assert not torch.equal(first[0], build("shapes", size=32, seed=1)[0][0])
    seen = {image.numpy().tobytes() for image in first}
    assert len(seen) == 40 and not seen & {val[i][0].numpy().tobytes() for i in range(40)}
    mirrored = build("shapes", size=32, train=True)
    pairs = [(mirrored[e, i][0], first[i]) for e in range(2) for i in range(20)]
    flip = [torch.equal(a, b.flip(2)) for a, b in pairs]
    assert all(f or torch.equal(a, b) for f, (a, b) in zip(flip, pairs)) and 5 < sum(flip) < 35

@pytest.mark.parametrize("name", data.SHAPES)
def test_shapes_can_be_seen(name, monkeypatch):
    """An object in the colour of its background, or one that leaves the picture."""
    draws = [data.uniform(20, number) for number in range(20)]
    pictures = [data.draw_shape(name, 32, u).astype(int) for u in draws]
    monkeypatch.setitem(data.SHAPES, name, [])  # no outline: the background alone
    for image, u in zip(pictures, draws):
        change = image - data.draw_shape(name, 32, u)
        seen = np.abs(change).sum(2) > 60
        assert 10 <= max(seen.any(1).sum(), seen.any(0).sum()) <= 29
        assert np.median(np.abs(change[seen] @ [0.299, 0.587, 0.114])) > 0.25 * 255

@pytest.mark.parametrize("view", ["color", "grey"])
def test_augment(view):
    """Statistics shared over the batch; a change where none is drawn; colour, brightness, contrast
    or the sign left in grey views."""
    images = random_images(8, 32, 32)
    draws = torch.rand(8, data.AUGMENT_DRAWS, generator=seeded(1))
    views = data.augment(images, draws, view)
    assert views.shape == images.shape
    alone = [data.augment(images[i:i + 1], draws[i:i + 1], view) for i in range(8)]
    assert torch.allclose(views, torch.cat(alone), atol=1e-5)
    used = []
    for i in range(data.AUGMENT_DRAWS):  # over the batch, each draw changes something
        other = draws.clone()
        other[:, i] = (other[:, i] + 0.5) % 1
        used.append(not torch.equal(views, data.augment(images, other, view)))
    assert used == [True] * sum(used) + [False] * (len(used) - sum(used))
    assert sum(used) == dict(color=data.AUGMENT_DRAWS, grey=6)[view]
    draws = torch.full((8, data.AUGMENT_DRAWS), 0.999999)  # whole area, every coin says no
    draws[:, 1] = 0.5  # square
    if view == "color":
        assert -1 <= views.min() and views.max() <= 1
        assert torch.allclose(data.augment(images, draws, view), images, atol=2e-3)
        return
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    deviation, mean = torch.std_mean(luma, (1, 2, 3), keepdim=True)
    wanted = ((luma - mean) / (deviation + 0.05)).expand(-1, 3, -1, -1)
    for coin, sign in ((0.999999, 1), (0, -1)):
        draws[:, 5] = coin
        assert torch.allclose(data.augment(images, draws, view), sign * wanted, atol=2e-3)

def test_image_grid(tmp_path):
    """Pictures too small to see, rows out of order."""
    images = torch.stack([torch.full((3, 32, 32), v) for v in (-1.0, 0.0, 1.0)])
    path = tmp_path / "grid.png"
    data.image_grid(images, path, labels=["a", "b", "ünï"], columns=2)
    sheet = Image.open(path)
    assert sheet.width >= 2 * 96 and sheet.height >= 2 * 96
    assert sheet.getpixel((50, 60)) == (0, 0, 0) and sheet.getpixel((150, 60)) == (128, 128, 128)
    data.image_grid([images[:1], images[1:]], str(path), row_titles=["one", "two"], scale=1)
    assert Image.open(path).height < 96

@pytest.mark.parametrize("error", [
    RuntimeError("unable to write to file </torch_12_3>: No space left on device (28)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."),
    OSError(30, "Read-only file system: '/dev/shm/x'")])
def test_a_small_shared_memory_names_the_remedy(folder, monkeypatch, error):
    """A bus error that says nothing about --workers 0."""
    monkeypatch.setattr(data.DataLoader, "__iter__", Mock(side_effect=error))
    with pytest.raises(UserError, match="--workers 0"):
        next(batches(build(folder), config(workers=2), ONE))
    assert not multiprocessing.active_children()

def test_command_line(tmp_path):
    """Names that a terminal cannot show, `| head`, no stdout, `~`."""
    write(tmp_path, {"犬/1.png": png(1), "犬/2.png": png(2)})
    start = f"{sys.executable} {ROOT}/data.py --data ~ --out ~/o --size 8"
    env = dict(os.environ, PYTHONIOENCODING="cp1252", HOME=str(tmp_path))
    for shell in (start, f"{start} | head -1", f"{start} 2>&- >&-"):
        done = subprocess.run(shell, shell=True, capture_output=True, text=True, env=env)
        assert done.returncode == 0 and "Traceback" not in done.stderr
        assert shell != start or "\\u72ac 1" in done.stdout
        assert "|" not in shell or done.stderr == ""
    assert (tmp_path / "o/preview.png").exists()
