"""
Everything around the models: images in, runs out.

    python data.py --data shapes                             # look at a data set
    python data.py --data imagenet --split val --size 256    # counts, names, preview.png
    python data.py --data imagenet --pack packed --size 256  # shrink it once into tar shards

--data (the `spec` of build_dataset) is one of
    shapes             ten classes of drawings, made on the fly at any size
    FOLDER             class folders (cat/1.jpg), or images without labels (1.jpg)
    FILE.tar           the same paths in tars, which are not unpacked; or WebDataset samples:
    "w/*.tar"          key.jpg with key.cls or key.json ("label" or "cls"), where a key ends at
    w/{000..146}.tar   the first dot; or one tar per class (cat.tar). Names of tars that differ
    FOLDER of tars     only in a number are shards
The split is read off a folder above the class folders, the folder of a tar or a word of its name:
train or training; the first of val, valid, validation, dev, test, testing that is there. With
neither, 1 image in 20 is val. A flat val/1.jpg needs val_labels.txt, val_annotations.txt or
labels.txt in val/ or next to it, with lines "filename class". Without class folders, or with
--no-labels, every label is 0. What is left out is counted and named: describe(), unreadable().
"""

import argparse
import atexit
import collections
import contextlib
import dataclasses
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import warnings
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

class UserError(ValueError):
    """A mistake that the user can put right: one line, what is wrong and what to do."""

def run_main(main):
    """Run a script's main(). Exit code 0 when done, 2 with one line for a UserError or OSError, 1
    with a traceback for a bug, 130 for Ctrl-C."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None without a terminal
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    # freeing one large block makes glibc keep those that come after it, which decoding on a CPU
    # frees and takes at every step
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    except UserError as error:
        code, text = 2, f"error: {error}"
    except BrokenPipeError:  # whoever read our output has left, as in `| head -1`
        code, text = 1, ""
        sys.stdout = open(os.devnull, "w")  # which Python flushes when it exits
    except OSError as error:  # a full disk, a folder that has gone
        code, text = 2, f"error: {error}: make room, or pass a folder that can be written"
    if text:
        print(" ".join(text.split()), file=sys.stderr)
    sys.exit(code)

@atexit.register
def kill_children():
    """End the loader processes. They ignore SIGTERM, so Python would wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch's handler raises
    for child in multiprocessing.active_children():
        child.kill()

# ------------------------------------------------------------------------------
# One image: bytes -> PIL RGB -> crop -> tensor

MAX_PIXELS = 500_000_000  # of one image: a small file may unpack to all of the memory
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses above twice this number
PngImagePlugin.MAX_TEXT_CHUNK = 2**28  # bytes of one text or colour profile of a PNG
PngImagePlugin.MAX_TEXT_MEMORY = 2**30
Image.init()
# EPS would start Ghostscript; the others are names for which Pillow has no decoder
FORMATS = [name for name in Image.OPEN
           if name not in ("EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF")]
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items()
              if name in FORMATS or name == "MPO"}

class Unreadable(Exception):
    """An image file that cannot be decoded. The message is the reason."""

def load_image(content, draft_size=None):
    """The bytes of an image file -> PIL RGB, upright. Raises Unreadable. draft_size: the short
    side that is needed; libjpeg decodes a large JPEG at 1/2, 1/4 or 1/8 for less work."""
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            if draft_size is not None:
                image.draft(None, (draft_size, draft_size))
            image.load()
    except UnidentifiedImageError:
        raise Unreadable("not an image that Pillow reads" if content else "an empty file") from None
    except Image.DecompressionBombError as error:
        raise Unreadable(f"{error} To read it, raise MAX_PIXELS in data.py") from None
    except Exception as error:  # decoders raise many types
        raise Unreadable(str(error) or type(error).__name__) from None
    with contextlib.suppress(Exception):  # a damaged tag: the pixels as stored
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)

def to_rgb(image):
    """Any PIL mode -> RGB. Transparency is laid on white, and deep greys become 8 bits. Raises
    Unreadable."""
    low, high = image.getextrema() if image.mode == "I" else (0, 65535)
    if image.mode == "F" or low < 0 or not 255 < high <= 65535:
        raise Unreadable("it does not say which value is white: convert it to 8 bits")
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def center_crop(image, size):
    """The central square, resized to size x size: the one crop of validation, code extraction
    and evaluation. Its edges may lie on half pixels. Small images are enlarged."""
    side = min(image.size)
    left, top = [(extent - side) / 2 for extent in image.size]
    return resize(image, (size, size), (left, top, left + side, top + side))

def resize(image, size, box):
    """Antialiased. reducing_gap averages whole blocks first: several times faster on photos."""
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)

def random_box(size, draws, scale):
    """RandomResizedCrop's box: share of the area within `scale`, aspect from 3/4 to 4/3."""
    width, height = size
    area = scale[0] + draws[0] * (scale[1] - scale[0])
    ratio = (4 / 3) ** (2 * draws[1] - 1)
    # a panorama is too thin for the area: there the crop shrinks and keeps its aspect
    h = min(math.sqrt(area * width * height / ratio), height, width / ratio)
    w = min(h * ratio, width)
    left, top = draws[2] * (width - w), draws[3] * (height - h)
    return left, top, min(left + w, width), min(top + h, height)

def from_uint8(pixels):
    """(N,H,W,3) uint8, numpy or torch -> (N,3,H,W) float32 in [-1,1]."""
    pixels = torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous()  # planes of one colour
    return pixels.float() / 127.5 - 1

def to_uint8(images):
    """(N,3,H,W) in [-1,1] -> (N,H,W,3) numpy uint8, rounded to the nearest."""
    images = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return images.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

def uniform(count, *key):
    """`count` uniform draws in [0,1), a function of the integers of `key`."""
    return np.random.default_rng([int(k) for k in key]).random(count).tolist()

# ------------------------------------------------------------------------------
# Data sets: an ImageDataset. They differ in where load(i) finds the pixels

# a number per use of randomness, so that no two share their draws
AUGMENT_STREAM, VIEW_STREAM, ORDER_STREAM, SHAPES_STREAM, SUBSET_STREAM = 1, 2, 3, 4, 5

class View(NamedTuple):
    """Key of an ImageDataset: view v of image i. 0: centre crop, 1: its mirror, more: crops."""
    i: int
    v: int

class ImageDataset(Dataset):
    """ds[i] or ds[(epoch, i)] -> (image float32 (3,size,size) in [-1,1], label int).
    The crop is a function of (seed, epoch, i). The next readable image takes the place of an
    unreadable one. Raises UserError when more than 1 %, and more than one, are unreadable.
    A subclass has name(i), stamp(i), and raw(i) or load(i)."""
    crop_scale = (0.5, 1.0)  # the share of the picture's area that a training crop keeps

    def __init__(self, labels, class_names, size, train, seed, note=""):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names, self.num_classes = class_names, len(class_names)
        self.size, self.train, self.seed, self.note = size, train, seed, note
        self.faults = {}  # index -> why this image is unreadable

    def __len__(self):
        return len(self.labels)

    def load(self, index, draft_size=None):
        """The whole picture as PIL RGB. Raises Unreadable."""
        return load_image(self.raw(index), draft_size)

    def raw(self, index):
        """The bytes of the image file; None for a drawing. Raises Unreadable."""

    def __getitem__(self, key):
        pixels, label = self.pixels(key)
        return from_uint8(pixels[None])[0], label

    def __getitems__(self, keys):
        """For a loader: keys -> (images (n,H,W,3) uint8, labels (n,), unreadable ones found)."""
        known = len(self.faults)
        images, labels = zip(*map(self.pixels, keys))
        return np.stack(images), np.array(labels), list(self.faults.items())[known:]

    def pixels(self, key):
        """ds[key] before it becomes a tensor -> ((size,size,3) uint8, label)."""
        if isinstance(key, View):
            i, number = key
            stream, scale, random = VIEW_STREAM, (0.8, 1.0), number > 1
        else:
            number, i = key if isinstance(key, tuple) else (0, key)  # number: the epoch
            stream, scale, random = AUGMENT_STREAM, self.crop_scale, self.train
        i = range(len(self))[i]  # -1 is the last one, and there is an end
        image, label = self.read(i)
        draws = uniform(5, self.seed, stream, number, i)
        if random and scale:
            box = random_box(image.size, draws, scale)
            image = resize(image, (self.size, self.size), box)
        else:
            image = center_crop(image, self.size)
        mirror = draws[4] < 0.5 if random else isinstance(key, View) and number == 1
        return np.array(ImageOps.mirror(image) if mirror else image), label

    def read(self, index):
        """The first readable image from `index` on -> (PIL image, label)."""
        for i in itertools.chain(range(index, len(self)), range(index)):
            if i not in self.faults:
                try:
                    # twice the size: even the smallest crop keeps more pixels than the result has
                    return self.load(i, 2 * self.size), int(self.labels[i])
                except Unreadable as error:
                    self.add_fault(i, str(error))
        raise UserError(f"none of the {len(self)} images can be read, for instance "
                        f"{self.unreadable()[0]}: check that the files are complete images")

    def add_fault(self, index, reason):
        """Remember an unreadable image. The main process names it, and stops at too many."""
        if index in self.faults:
            return
        self.faults[index] = reason
        if get_worker_info() is not None:
            return
        names = self.unreadable()
        tqdm.write(f"unreadable, left out: {names[-1]}", file=sys.stderr)
        if len(names) > max(1, 0.01 * len(self)):
            raise UserError(f"{len(names)} of {len(self)} images are unreadable, more than 1 %: "
                            f"{', '.join(names[:20])}; replace or remove these files")

    def unreadable(self):
        """'name (reason)' of the unreadable images met so far, also by loader processes."""
        return [f"{self.name(i)} ({reason})" for i, reason in self.faults.items()]

    def digest(self):
        """sha256 of paths, file sizes and dates, labels and class names, as hex digits."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        digest.update(self.labels.tobytes())
        for i in range(len(self)):
            digest.update(os.fsencode(self.stamp(i)) + b"\0")
        return digest.hexdigest()

    def describe(self):
        classes = f"{self.num_classes} classes" if self.num_classes else "unlabelled"
        note = f" ({self.note})" if self.note else ""
        return f"{len(self):,} images, {classes}, {self.size}px{note}"

def build_dataset(spec, split, size, train, seed=0, labels=True):
    """--data -> ImageDataset of the split "train" or "val". train: random crops, else the centre
    crop. labels False: folders are not classes. Raises UserError."""
    assert split in ("train", "val") and size > 0, f"{split} {size}"
    kind = Shapes if spec == "shapes" else ImageFiles
    return kind(spec, split, size, train, seed, labels)

def open_data(config, size):
    """The data set of a training run -> (training images, random crops; validation images, centre
    crops). With --max-steps 0 the config gets the steps that --epochs needs."""
    train_set = build_dataset(config.data, "train", size, True, config.seed, config.labels)
    # seed 0: runs of all seeds are measured on the same images
    val_set = build_dataset(config.data, "val", size, False, labels=config.labels)
    steps = config.epochs * len(train_set) // config.batch_size
    config.max_steps = config.max_steps or max(1, steps)
    return train_set, val_set

# The embedded data set: one coloured shape on a quiet background

def _ngon(n, radius=1.0, turn=0.0):
    angle = 2 * math.pi * (np.arange(n) / n + turn)
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * np.resize(radius, (n, 1))

def _heart():
    t = 2 * math.pi * np.arange(64) / 64
    x = 16 * np.sin(t) ** 3
    y = -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    return np.stack([x, y + 1], 1) / 17

_BAR = np.array([(-.95, -.3), (.95, -.3), (.95, .3), (-.95, .3)])
_ARROW = np.array([(0, -1), (.75, -.1), (.28, -.1), (.28, .95), (-.28, .95), (-.28, -.1),
                   (-.75, -.1)])
_HOURGLASS = np.array([(-.65, -.76), (.65, -.76), (.1, 0), (.65, .76), (-.65, .76), (-.1, 0)])

# name -> outlines in the unit disc (x right, y down), each drawn (1) or cut out again (0)
SHAPES = {
    "circle": [(_ngon(64), 1)],
    "square": [(_ngon(4, turn=1 / 8), 1)],
    "triangle": [(_ngon(3), 1)],
    "star": [(_ngon(10, (1, 0.42)), 1)],
    "plus": [(_BAR, 1), (_BAR[:, ::-1], 1)],
    "ring": [(_ngon(64), 1), (_ngon(64, 0.55), 0)],
    "heart": [(_heart(), 1)],
    "moon": [(_ngon(64), 1), (_ngon(64, 0.85) + (0.5, 0), 0)],
    "arrow": [(_ARROW, 1)],
    "hourglass": [(_HOURGLASS, 1)],
}
# few colours, so that a code of eight bits can hold one. Backgrounds: four dark, four light
OBJECT_COLORS = np.array([(.90, .15, .15), (1.0, .55, .10), (1.0, .90, .15),
                          (.15, .70, .25), (.15, .30, .90), (.55, .20, .75)])
BACKGROUND_COLORS = np.array([(.08, .09, .14), (.22, .12, .10), (.08, .20, .15), (.22, .18, .30),
                              (.95, .93, .88), (.80, .88, .97), (.84, .95, .82), (.97, .84, .82)])

class Shapes(ImageDataset):
    """Drawing i of a split is a function of (seed, split, i) and shows class i % 10, wholly
    visible, at any place, angle and size."""

    crop_scale = None  # place and size vary already: training only adds the mirror image

    def __init__(self, spec, split, size, train, seed, labelled=True):
        count = 20_000 if split == "train" else 1_000
        names = list(SHAPES) if labelled else []
        super().__init__(np.arange(count) % 10 * labelled, names, size, train, seed)
        self.split = split
        self.cache = {}  # small drawings are kept: every epoch after the first is free

    def name(self, index):
        return f"shapes/{self.split}/{index}"

    def stamp(self, index):
        return f"{self.name(index)} {self.size} {self.seed}"

    def load(self, index, draft_size=None):
        pixels = self.cache.get(index)
        if pixels is None:
            draws = uniform(8, self.seed, SHAPES_STREAM, self.split == "val", index)
            pixels = draw_shape(list(SHAPES)[index % 10], self.size, draws)
        if self.size <= 64:
            self.cache[index] = pixels
        return Image.fromarray(pixels)

def draw_shape(name, size, draws):
    """One shape from 8 uniform draws -> (size,size,3) uint8."""
    u = iter(draws)
    color = OBJECT_COLORS[int(6 * next(u))]
    radius = (0.55 + 0.3 * next(u)) / 2  # as a fraction of the image's side
    center = radius + np.array([next(u), next(u)]) * (1 - 2 * radius)
    angle = (next(u) - 0.5) * math.pi / 4  # up to 22.5 degrees either way
    cos, sin = math.cos(angle), math.sin(angle)
    # the outline at 4 times the size, averaged down: smooth edges
    canvas = Image.new("L", (4 * size, 4 * size))
    pen = ImageDraw.Draw(canvas)
    for points, fill in SHAPES[name]:
        points = points @ np.array([[cos, sin], [-sin, cos]]) * radius + center
        pen.polygon((4 * size * points).ravel().tolist(), fill=255 * fill)
    mask = np.asarray(canvas.reduce(4), dtype=np.float32)[..., None] / 255  # (size,size,1)
    # two background colours, both dark behind a light object or both light behind a dark one
    light = 4 * (color @ (0.299, 0.587, 0.114) < 0.58)
    place = int(4 * next(u))
    first = BACKGROUND_COLORS[place + light]
    second = BACKGROUND_COLORS[(place + 1) % 4 + light]
    kind, horizon = next(u), 0.25 + 0.5 * next(u)
    mix = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None, None]  # 0 top, 1 bottom
    if kind < 0.34:
        mix = np.float32(0)  # plain
    elif kind >= 0.67:
        mix = np.clip((mix - horizon) * size + 0.5, 0, 1)  # a horizon, one pixel soft
    image = first + mix * (second - first)
    image = image + mask * (color - image)
    return (image * 255 + 0.5).astype(np.uint8)

# ------------------------------------------------------------------------------
# Image files: find them in folders or tars, then read split and class off their paths

TRAIN_WORDS = ("train", "training")
VAL_WORDS = ("val", "valid", "validation", "dev", "test", "testing")  # the first one wins
SPLIT_WORDS = TRAIN_WORDS + VAL_WORDS
LABEL_FILES = ("val_labels.txt", "val_annotations.txt", "labels.txt")
CLASS_LIST = "classes.txt"  # in the shards of a pack: class names in the order of their ids
STRAY = ("lost+found", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")

class Entry(NamedTuple):
    """An image, or a folder, whose path ends with "/". A folder may be a class without images."""
    path: str  # train/cat/1.jpg: split and class are read off it
    name: str  # the same below --data or inside the tar
    where: tuple = ()  # in a tar: (number of the tar, offset, bytes)
    label: str = ""  # from key.cls or key.json of WebDataset

    def top(self):
        return self.path.split("/")[0] if "/" in self.path else ""

    def class_name(self):
        return self.label or self.top()

def images_of(entries):
    return [entry for entry in entries if not entry.path.endswith("/")]

def below(entries, top):
    """The entries in the folder `top`, which is cut off their paths."""
    found = [entry for entry in entries if entry.top().lower() == top]
    cut = [entry._replace(path=entry.path.partition("/")[2]) for entry in found]
    return [entry for entry in cut if entry.path]

class Found:
    """What lies at --data."""

    def __init__(self):
        self.entries, self.shards, self.class_list = [], [], []
        self.left_out = collections.Counter()  # kind -> number of files

    def take(self, path):
        """Does Pillow read files of this kind? If not, count one as left out."""
        name = os.path.basename(path)
        kind = os.path.splitext(name)[1].lower() or "without extension"
        kind = "hidden" if name.startswith(".") else kind
        if kind not in EXTENSIONS:
            self.left_out[kind] += 1
        return kind in EXTENSIONS

    def omitted(self):
        most = (+self.left_out).most_common(10)  # without zeros
        return ", ".join(f"{number} {kind}" for kind, number in most)

class ImageFiles(ImageDataset):
    """Images in folders or tars. The pixels stay there; paths and offsets are held."""

    def __init__(self, spec, split, size, train, seed, labelled=True):
        self.root = os.path.expanduser(str(spec))
        found = find_images(self.root)
        images, class_names, labels, notes = select(found, self.root, split, labelled)
        super().__init__(labels, class_names, size, train, seed, "; ".join(notes))
        # compact arrays: every loader process would copy a million Python objects
        self.names = np.array([os.fsencode(image.name) for image in images])
        self.places = np.array([image.where for image in images])
        self.shards = found.shards

    def file(self, index):
        """The image's own file, or the tar that it lies in."""
        return self.shards[self.places[index, 0]] if self.shards else self.name(index)

    def name(self, index):
        folder = self.file(index) if self.shards else self.root
        return os.path.join(folder, os.fsdecode(self.names[index]))

    def raw(self, index):
        try:
            with open(self.file(index), "rb", buffering=0) as file:
                if not self.shards:
                    return file.read()
                _, offset, length = self.places[index].tolist()
                return os.pread(file.fileno(), length, offset)
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None

    def stamp(self, index):
        """A text that changes when the file does, for digest()."""
        status = None
        with contextlib.suppress(OSError):
            status = os.stat(self.file(index))
            status = status.st_size, status.st_mtime_ns
        return f"{self.names[index]} {self.places[index]} {status}"

def find_images(spec):
    """--data -> Found: images and folders of all splits, sorted. Raises UserError."""
    found = Found()
    if os.path.isdir(spec):
        root, paths = spec, list(walk(spec, found))
        found.entries = [Entry(p, p) for p in paths if p.endswith("/") or found.take(p)]
        tars = [os.path.join(spec, path) for path in paths if path.lower().endswith(".tar")]
    else:
        root, tars = os.path.dirname(re.split(r"[*?\[{]", spec)[0]), find_tars(spec)
    if not images_of(found.entries):
        del found.left_out[".tar"]  # they are read after all
        found.shards = tars
        found.entries = name_by_tar(read_tars(found), found, root)
    if not images_of(found.entries):
        raise UserError(f"{spec} holds no images (left out: {found.omitted() or 'nothing'})")
    found.entries.sort(key=lambda entry: (entry.path.split("/"), entry.where))
    return found

def walk(root, found, prefix="", above=()):
    """Yield the paths in a folder; a folder's ends with "/". No link leads back up."""
    top = os.path.join(root, prefix).rstrip("/") or "/"
    above = (*above, os.path.realpath(top))
    try:
        items = sorted(os.scandir(top), key=lambda item: item.name)
    except OSError as error:  # a folder that cannot be listed costs itself alone
        found.left_out[f"{top}/ ({error.strerror})"] += 1
        return
    if prefix:
        yield prefix
    for item in items:
        if not (os.path.isdir(item.path) if item.is_symlink() else item.is_dir()):
            yield prefix + item.name
        elif item.name[0] == "." or item.name in STRAY or os.path.realpath(item.path) in above:
            found.left_out[f"{item.path}/"] += 1
        else:
            yield from walk(root, found, f"{prefix}{item.name}/", above)

def find_tars(spec):
    """A tar, a glob, w-{000..146}.tar or w-{train,val}.tar -> paths. Raises UserError."""
    brace = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", spec)
    if brace:
        first, last, words = brace.groups()
        if first:
            words = ",".join(f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
        start, end = spec[:brace.start()], spec[brace.end():]
        return [path for word in words.split(",") for path in find_tars(start + word + end)]
    paths = [spec] if os.path.isfile(spec) else sorted(glob.glob(spec, recursive=True))
    paths = [path for path in paths if path.lower().endswith(".tar")]
    if not paths:
        raise UserError(f"there is no folder and no .tar file {spec}: pass one, or shapes")
    return paths

def read_tars(found):
    """The entries of all tars of `found`. Raises UserError when only some have labels."""
    entries = []
    for number, tar in enumerate(tqdm(found.shards, "tars", disable=len(found.shards) < 8)):
        status = os.stat(tar)
        inside = read_tar(tar, status.st_mtime_ns, status.st_size)
        entries += [entry._replace(where=(number, *entry.where)) for entry in inside.entries]
        found.left_out.update(inside.left_out)
        found.class_list = found.class_list or inside.class_list
    images = images_of(entries)
    bare = [f"{found.shards[i.where[0]]}/{i.name}" for i in images if not i.label]
    if 0 < len(bare) < len(images):
        raise UserError(f"{bare[0]} has no .cls and no label in a .json: add it, as for others")
    return entries if bare else images  # with labels a folder is no class

@functools.lru_cache(maxsize=None)  # both splits read the same tars; another date, read again
def read_tar(path, mtime, size):
    """Headers of one tar -> Found. Raises UserError."""
    found, files, texts = Found(), {}, {}
    try:
        with tarfile.open(path, "r:", encoding="utf-8") as tar:
            for member in tar:
                name = os.path.normpath(member.name).lstrip("/")
                if any(part[0] == "." or part in STRAY for part in name.split("/")):
                    found.left_out["hidden"] += not member.isdir()
                elif member.isdir():
                    found.entries.append(Entry(name + "/", name + "/"))
                elif name == CLASS_LIST or name.endswith((".cls", ".json")):
                    text = tar.extractfile(member).read()
                    texts[name] = text.decode("utf-8", "surrogateescape")
                elif found.take(name):
                    found.left_out["replaced by a later one of the same name"] += name in files
                    files[name] = member.offset_data, member.size
                    if member.issym() or member.islnk():
                        # a symbolic link starts at its own folder, a hard link at the top
                        folder = os.path.dirname(name) if member.issym() else ""
                        link = os.path.join(folder, member.linkname)
                        files[name] = os.path.normpath(link).lstrip("/")
            # tarfile stops at a damaged header without a word; zeros close an archive
            tar.fileobj.seek(tar.offset)
            blocks = iter(functools.partial(tar.fileobj.read, 2**20), b"")
            stray = [bool(block.strip(b"\0")) for block in blocks]
            if any(stray) or not stray:
                raise tarfile.ReadError(f"damaged, cut or a second archive, at byte {tar.offset}")
    except (tarfile.TarError, LookupError, ValueError, OSError) as error:
        raise UserError(f"{path} is no intact, uncompressed tar file ({error}): fetch it again")
    found.class_list = texts.get(CLASS_LIST, "").splitlines()
    for name, where in files.items():
        for _ in range(8):  # links to links, but not around a ring
            where = files.get(where, where)
        if isinstance(where, str):
            found.left_out["links to no image"] += 1
        else:
            found.entries.append(Entry(name, name, where, label_of(name, texts)))
    return found

def label_of(name, texts):
    """The label of a WebDataset image, whose key ends before the extension or at the first dot."""
    for key in (os.path.splitext(name)[0], re.match(r"(.*/)?[^/.]*", name)[0]):
        label = texts.get(f"{key}.cls", "").strip()
        with contextlib.suppress(ValueError, TypeError):  # JSON of another kind
            record = dict(json.loads(texts.get(f"{key}.json", "{}")))
            value = record.get("label")
            value = record.get("cls") if value is None else value
            label = label or ("" if value is None else str(value))
        if label:
            return label
    return ""

def name_by_tar(entries, found, root):
    """Paths as if all tars were unpacked below `root`: the names of tars tell split and class."""
    # imagenet/train/cat/1.jpg: an archive of one folder stands for that folder
    while images := images_of(entries):
        tops = {image.top().lower() for image in images}
        depth = min(image.path.count("/") for image in images)
        if depth < 2 or len(tops) > 1 or tops & set(SPLIT_WORDS):
            break
        entries = below(entries, *tops)
    # where the tars hold folders of splits, their names tell nothing. The folders of a pack are
    # classes, even those called train and val
    classes = {name.lower() for name in found.class_list}
    if not images or divide(entries)[0] is not entries and not tops <= classes:
        return entries
    names = [os.path.relpath(tar, root or ".")[:-len(".tar")] for tar in found.shards]
    splits, classes = zip(*map(read_tar_name, names))
    # next to val.tar a tar without a word holds the training images
    if any(splits) and not set(splits) & set(TRAIN_WORDS):
        splits = [word or "train" for word in splits]
    # a tar's name is a class where nothing inside tells one
    if tops != {""} or len(set(classes)) == 1 or images[0].label:
        classes = [""] * len(names)
    folders = [os.path.join(*parts, "") for parts in zip(splits, classes)]
    return [entry._replace(path=folders[entry.where[0]] + entry.path) for entry in entries]

def read_tar_name(name):
    """val/cat-000 -> ("val", "cat"): split and class, or "", where each class has its own tar."""
    # cat_part3 and cat-train-0001 are parts of one class, cat
    folder, name = os.path.split(name)
    words = folder.lower().split("/") + re.split("[^a-z]+", name.lower())
    split = next((word for word in SPLIT_WORDS if word in words), "")
    noise = rf"{'|'.join(SPLIT_WORDS)}|(shard|part|chunk|data)?[-_]?\d+"
    name = re.sub(rf"(?i)(?<![a-z\d])({noise})(?![a-z\d])", "", name)
    return split, name.strip("-_. ")

def select(found, spec, split, labelled):
    """-> (images of the split, class names, labels, notes). Raises UserError."""
    entries, notes = found.entries, []
    if not labelled:
        entries = [entry._replace(label="") for entry in entries]
    train, val = divide(entries)
    if split == "train" and not train:
        raise UserError(f"{spec} has validation images only: pass a data set with train images")
    # the classes are those of the training images; a class id is a place in their list
    names = class_names(train or val, found, notes) if labelled else []
    source = images_of(train or val)
    images = [image for image in source if image.class_name() or not names]
    outside = len(images_of(entries)) - len(images_of(train + val))
    if outside:
        notes.append(f"{outside} images outside the folders of train and val left out")
    if len(images) < len(source):
        notes.append(f"{len(source) - len(images)} images without a class left out")
    if not images_of(val):
        notes.append("no val images of its own: one in 20, drawn at random, is val")
        # a lone image is in both
        held = set(subset(len(images), math.ceil(len(images) / 20)))
        images = [image for number, image in enumerate(images)
                  if (number in held) == (split == "val") or len(images) == 1]
    elif train and split == "val":
        images = images_of(val)
    if found.omitted():
        notes.append(f"left out: {found.omitted()}")
    ids = {name: number for number, name in enumerate(names)}
    labels = [ids.get(image.class_name()) if names else 0 for image in images]
    if None in labels:
        read_label_file(found, spec, images, labels, ids)
    return images, names, labels, notes

def divide(entries):
    """-> (train, val): entries by the split word in front of their paths, which is cut off."""
    images = images_of(entries)
    tops = {image.top().lower() for image in images}
    train = next((word for word in TRAIN_WORDS if word in tops), None)
    val = next((word for word in VAL_WORDS if word in tops), None)
    # a class may be called train: then it holds no folders and stands next to other classes
    classes = tops - {"", *SPLIT_WORDS}
    nested = any(image.path.count("/") > 1 and image.top().lower() in SPLIT_WORDS
                 for image in images)
    if not (train or val) or (classes and not nested and not (train and val)):
        return entries, []
    # no folder is called None: that part is empty
    return below(entries, train), below(entries, val)

def class_names(entries, found, notes):
    """The classes of the training entries in the order of their ids; [] without labels."""
    images = images_of(entries)
    names = {image.class_name() for image in images} - {""}
    if not names:
        return []
    if names <= set(found.class_list):
        return found.class_list
    ids = all(name.isdecimal() and len(name) < 7 and name == str(int(name)) for name in names)
    if images[0].label and ids:
        return [str(number) for number in range(max(map(int, names)) + 1)]
    empty = {entry.top() for entry in entries} - names - {""}
    if empty:
        notes.append(f"{len(empty)} classes without images: {', '.join(sorted(empty)[:20])}")
    return sorted(names | empty)

def read_label_file(found, spec, images, labels, ids):
    """Put the labels of a flat val/ where `labels` holds None. They are in val/ or next to it."""
    wrong = images[labels.index(None)]
    folders = [os.path.join(spec, wrong.name.split("/")[0]), spec]
    if found.shards:
        folders = [os.path.dirname(found.shards[0])]
    files = [os.path.join(folder, name) for folder in folders for name in LABEL_FILES]
    file = next(filter(os.path.isfile, files), None)
    if file is None:
        raise UserError(f"{wrong.path} of val is of class {wrong.class_name()!r}, not in train: "
                        f"sort val as train, or write {files[0]} with lines 'filename class'")
    numbers = {str(number): number for number in ids.values()} | ids
    listed = {}
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            # more fields may follow between tabs; without tabs a filename may hold spaces
            fields = line.strip().split("\t") if "\t" in line else line.rsplit(maxsplit=1)
            if len(fields) < 2 or fields[1] not in numbers:
                raise UserError(f"{file} line {number} is not 'filename class of train': {line}")
            listed[fields[0]] = numbers[fields[1]]
    for i, image in enumerate(images):
        if labels[i] is None:
            labels[i] = listed.get(image.path, listed.get(os.path.basename(image.path)))
        if labels[i] is None:
            raise UserError(f"{file} has no line for {image.path}: add one, 'filename class'")

# ------------------------------------------------------------------------------
# Batches

def subset(total, num, seed=0):
    """`num` places of range(total), a seeded draw, ascending; all when num is 0 or >= total."""
    num = min(num or total, total)
    draw = np.random.default_rng([seed, SUBSET_STREAM]).choice(total, num, replace=False)
    return sorted(draw.tolist())

def loader_workers(config):
    """--workers -> loader processes of this rank."""
    default = 0 if config.data == "shapes" else min(8, os.cpu_count() or 1)
    return default if config.workers < 0 else config.workers

def ignore_signals(worker):
    """Loader processes get Ctrl-C and SIGTERM too, but the training loop decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def load_batches(dataset, keys, run, workers=0):
    """Lists of keys (i, (epoch, i) or View(i, v)) -> (images (n,3,H,W) in [-1,1], labels (n,))
    on run.device, in the order of the lists."""
    # its own generator leaves the global random state untouched. Images go as uint8 in numpy
    # arrays, which travel through pipes; tensors would fill /dev/shm. __getitems__ makes whole
    # batches, which collate_fn leaves as they are
    loader = DataLoader(dataset, batch_sampler=keys, num_workers=workers, collate_fn=tuple,
                        worker_init_fn=ignore_signals, generator=torch.Generator())
    try:
        for *arrays, faults in loader:
            for index, reason in faults:
                dataset.add_fault(index, reason)
            tensors = [torch.from_numpy(array) for array in arrays]
            if run.device.type == "cuda":  # only from pinned memory is a copy asynchronous
                tensors = [tensor.pin_memory() for tensor in tensors]
            images, labels = [t.to(run.device, non_blocking=True) for t in tensors]
            yield from_uint8(images), labels
    except UserError as error:  # from a loader process its message is the end of a traceback
        message = str(error).strip().splitlines()[-1].split("UserError: ")[-1]
        error.__traceback__ = None  # it holds the loader, whose processes are to end now
        raise UserError(message) from None
    except (OSError, RuntimeError) as error:
        signs = ("shared memory", "Bus error", "/torch_", "shm", "SemLock", "/psm_")
        if workers == 0 or not any(sign in str(error) for sign in signs):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"/dev/shm is too small ({reason}): enlarge it, or pass --workers 0")

@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(n, seed, epoch):
    return np.random.default_rng([seed, ORDER_STREAM, epoch]).permutation(n)

def training_keys(n, config, run, step):
    """Sample p of the run is image order(epoch)[p % n] of epoch p // n, however many ranks,
    micro-batches and workers there are. Yields the keys of this rank's micro-batches."""
    share = micro_batch(config, run)
    for place in itertools.count(step * config.accum):
        start = (place * run.world + run.rank) * share
        yield [(p // n, int(epoch_order(n, config.seed, p // n)[p % n]))
               for p in range(start, start + share)]

def batches(dataset, config, run, step=0):
    """Endless micro-batches (images (b,3,H,W), labels (b,)) of this rank on run.device, from
    optimizer step `step` on: b = batch_size / (world * accum)."""
    keys = training_keys(len(dataset), config, run, step)
    return load_batches(dataset, keys, run, loader_workers(config))

def val_batches(dataset, rows, batch_size, run, workers=0, title=""):
    """(images, labels) on run.device of this rank's block of `rows`: a list of places, or how
    many to draw. With a progress bar when there is a title."""
    rows = subset(len(dataset), rows) if isinstance(rows, int) else rows
    block = rows[len(rows) * run.rank // run.world:len(rows) * (run.rank + 1) // run.world]
    keys = [block[i:i + batch_size] for i in range(0, len(block), batch_size)]
    stream = load_batches(dataset, keys, run, workers)
    yield from tqdm(stream, title, total=len(keys), disable=not title or not run.main, leave=False)

# ------------------------------------------------------------------------------
# Pictures of images

def image_grid(rows, path, labels=None, columns=8, row_titles=None, scale=None):
    """Write a PNG of (N,3,H,W) images in [-1,1], `columns` per line; or of a list of such rows.
    labels: a text per image; row_titles: a text per line; scale: screen pixels per pixel."""
    rows = list(rows.split(columns)) if isinstance(rows, torch.Tensor) else rows
    texts, titles = iter(labels or []), row_titles or [""] * len(rows)
    font = ImageFont.load_default()
    height, width = rows[0].shape[-2:]
    scale = scale or math.ceil(96 / height)
    cell, gap, head = (width * scale, height * scale), 4, 14 if labels else 0
    side = int(max(map(font.getlength, titles))) + 8 if row_titles else 0
    step_x, step_y = cell[0] + gap, cell[1] + gap + head
    size = (side + gap + max(map(len, rows)) * step_x, gap + len(rows) * step_y)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = gap + r * step_y
        pen.text((4, top + step_y // 2), titles[r], "black", font)
        for c, pixels in enumerate(to_uint8(row)):
            left = side + gap + c * step_x
            image = Image.fromarray(pixels).resize(cell, Image.Resampling.NEAREST)
            sheet.paste(image, (left, top + head))
            text = next(texts, "")
            while font.getlength(text) > cell[0]:
                text = text[:-1]
            pen.text((left, top), text, "black", font)
    sheet.save(path)

# ------------------------------------------------------------------------------
# The strong augmentation of the alignment loss, on the device of the images

AUGMENT_DRAWS = 14

@torch.no_grad()
def augment(images, draws, view="color"):
    """A strongly changed view of each image: images (B,3,H,W) in [-1,1], draws (B,14) uniform in
    [0,1) -> (B,3,H,W). Row i depends on row i of both alone.

    color: crop, colour jitter, blur, solarisation as in DINO (arXiv 2104.14294). grey: crop, then
    no colour at all, mean 0, one contrast, and light and dark exchanged in half of the cases. Flat
    drawings differ most in colour: jittered, it still tells more than their shape.
    """
    B, _, H, W = images.shape
    x = images.float()
    draws = draws.to(device=x.device, dtype=x.dtype, non_blocking=True)
    u = iter(draws.view(B, -1, 1, 1, 1).unbind(1))  # each next(u): (B,1,1,1)
    # random resized crop, mirrored in half of the cases: one affine map
    area, ratio = 0.4 + 0.6 * next(u), (4 / 3) ** (2 * next(u) - 1)
    h, w = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    down, right = (2 * next(u) - 1) * (1 - h), (2 * next(u) - 1) * (1 - w)  # centre, in [-1,1]
    w = torch.where(next(u) < 0.5, -w, w)
    zero = torch.zeros_like(h)
    theta = torch.cat([w, zero, right, zero, h, down], 1).view(B, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    luma = torch.tensor([0.299, 0.587, 0.114]).to(x.device, non_blocking=True).view(3, 1, 1)
    if view == "grey":
        x = (x * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        deviation, mean = torch.std_mean(x, (1, 2, 3), keepdim=True)
        x = (x - mean) / (deviation + 0.05)
        return torch.where(next(u) < 0.5, -x, x).to(images.dtype)
    # colour jitter (p = 0.8): brightness and contrast +-40 %; saturation, hue; grey (p = 0.2)
    x = (x + 1) / 2  # [0,1] from here on
    strength = (next(u) < 0.8).float()
    x = (x * (1 + strength * 0.4 * (2 * next(u) - 1))).clamp(0, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * (1 + strength * 0.4 * (2 * next(u) - 1))).clamp(0, 1)
    saturation = 1 + strength * 0.2 * (2 * next(u) - 1)
    saturation = torch.where(next(u) < 0.2, zero, saturation)
    grey = (x * luma).sum(1, keepdim=True)
    chroma = (x - grey) * saturation
    # the hue turns around the grey axis (1,1,1), by at most a tenth of half a turn
    angle = strength * 0.1 * math.pi * (2 * next(u) - 1)
    mean = chroma.mean(1, keepdim=True)
    across = (chroma.roll(1, 1) - chroma.roll(2, 1)) / math.sqrt(3)
    x = grey + mean + (chroma - mean) * angle.cos() + across * angle.sin()
    x = x.clamp(0, 1)
    # blur (p = 0.5): sigma 0.1 to 2 pixels at 224; a small image counts as one of 96 pixels
    unit = max(H, W, 96) / 224
    blurred = next(u) < 0.5
    sigma = (0.1 + 1.9 * next(u)) * unit
    reach = math.ceil(3 * 2.0 * unit)
    taps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)  # (T,)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)  # (B,1,1,T)
    kernel = torch.where(blurred, kernel, (taps == 0).to(x))
    kernel = (kernel / kernel.sum(3, keepdim=True)).repeat_interleave(3, 0)  # (3B,1,1,T)
    x = F.pad(x, (reach,) * 4, mode="replicate").flatten(0, 1)[None]  # (1,3B,H+T-1,W+T-1)
    x = F.conv2d(x, kernel.transpose(2, 3), groups=B * 3)
    x = F.conv2d(x, kernel, groups=B * 3).view(B, 3, H, W)
    x = torch.where((next(u) < 0.2) & (x >= 0.5), 1 - x, x)  # solarise (p = 0.2)
    return (x * 2 - 1).to(images.dtype)

# ------------------------------------------------------------------------------
# Packing: photos are far larger than the crops we train on, and decoding them costs most

def shrink(dataset, size, index):
    """-> (JPEG bytes of image `index`, ""), or (None, why it cannot be packed). The short side
    is at most 1.5 times `size`: crops of 45 % of the area or more are not enlarged."""
    short, buffer = round(1.5 * size), io.BytesIO()
    try:
        image, raw = dataset.load(index, 2 * short), dataset.raw(index)
        scale = short / min(image.size)
        if scale >= 1 and raw and raw.startswith(b"\xff\xd8"):
            return raw, ""  # a JPEG that is small already stays as it is
        if scale < 1:
            small = tuple(max(1, round(side * scale)) for side in image.size)
            image = resize(image, small, (0, 0, *image.size))
        image.save(buffer, "JPEG", quality=95)
    except Unreadable as error:
        return None, str(error)
    except (OSError, ValueError) as error:  # for instance a side above JPEG's 65,535
        return None, f"as JPEG of {image.size[0]} x {image.size[1]}: {error}"
    return buffer.getvalue(), ""

def pack(spec, out, size, shard_size=10_000, workers=0, seed=0, labels=True):
    """Write OUT/train-000000.tar, ..., OUT/val-000000.tar, ... with class folders inside. An
    image that cannot be packed is named and left out. Raises UserError."""
    if os.path.exists(out) and os.listdir(out):
        raise UserError(f"--pack {out} exists already: pass a new folder, or delete it first")
    splits = ("train", "val")
    datasets = [build_dataset(spec, split, size, False, seed, labels) for split in splits]
    partial = f"{out.rstrip('/')}.partial{os.getpid()}"  # becomes OUT at the end
    os.makedirs(partial)
    try:
        for split, dataset in zip(splits, datasets):
            print(f"{split}: {dataset.describe()}")
            pack_split(dataset, f"{partial}/{split}", size, shard_size, workers)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

def pack_split(dataset, prefix, size, shard_size, workers):
    names = [name.replace("/", "_") for name in dataset.class_names]
    rows, skipped = range(len(dataset)), []
    # the loader maps shrink() over the rows, in order
    images = DataLoader(rows, batch_size=None, collate_fn=functools.partial(shrink, dataset, size),
                        num_workers=workers, worker_init_fn=ignore_signals)
    images = iter(tqdm(images, os.path.basename(prefix)))
    for start in rows[::shard_size]:
        path = f"{prefix}-{start // shard_size:06d}.tar"
        with tarfile.open(path, "w", encoding="utf-8") as tar:
            if names:
                add_to_tar(tar, CLASS_LIST, os.fsencode("\n".join(names)))
            # rows first: at their end zip has not taken an image of the next shard
            for index, (jpeg, reason) in zip(rows[start:start + shard_size], images):
                name = dataset.name(index)
                stem = f"{index:08d}_{os.path.splitext(os.path.basename(name))[0]}"
                folder = names[dataset.labels[index]] if names else ""
                if jpeg:
                    add_to_tar(tar, os.path.join(folder, f"{stem}.jpg"), jpeg)
                else:
                    skipped.append(f"{name} ({reason})")
    if len(skipped) == len(dataset):
        raise UserError(f"none of the images can be packed, for instance {skipped[0]}")
    if skipped:
        print(f"left out {len(skipped)} images that cannot be packed: {', '.join(skipped)}")

def add_to_tar(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)  # no time or owner: the same images give the same tar
    tar.addfile(info, io.BytesIO(content))

# ------------------------------------------------------------------------------
# Runs: what surrounds a model in every training script. Flags, processes, the output
# folder, checkpoints, metrics, learning rate, weight averages. None of it is about MergeVQ

def arg(*values, help="", choices=None, low=-1e9, high=1e9):
    """A config field that is a flag too: one value, or one for each preset of the class. A
    field without `help` takes help, choices and range of RunConfig's."""
    meta = dict(help=help, choices=choices, low=low, high=high)
    return dataclasses.field(default=values[0], metadata=dict(values=values, flag=meta))

@dataclasses.dataclass
class RunConfig:
    """The flags that all training scripts share. Subclasses give them other values."""
    data: str = arg("", help="shapes | image folder | .tar or quoted glob of tar shards")
    out: str = arg("", help="folder for checkpoint, metrics and pictures")
    seed: int = arg(0, help="of all randomness", low=0, high=2**31 - 1)
    device: str = arg("auto", help="auto (cuda > mps > cpu) or a torch device")
    dtype: str = arg("auto", help="auto: bfloat16 on CUDA", choices=("auto", "float32", "bfloat16"))
    batch_size: int = arg(256, help="images per optimizer step, over all ranks", low=1)
    accum: int = arg(1, help="micro-batches per optimizer step and rank", low=1)
    max_steps: int = arg(0, help="optimizer steps; 0: as many as --epochs needs", low=0)
    epochs: int = arg(1, help="passes over the data, when --max-steps is 0", low=1)
    lr: float = arg(1e-4, help="peak learning rate", low=0)
    lr_schedule: str = arg("cosine", help="after the warm-up: step (x0.1 at 80 and 95 %%), "
                           "cosine (to 1 %%) or constant", choices=("step", "cosine", "constant"))
    warmup: int = arg(0, help="linear warm-up steps", low=0)
    weight_decay: float = arg(0.0, help="AdamW weight decay of matrices", low=0)
    clip: float = arg(1.0, help="the gradient norm is clipped to this", low=1e-9)
    ema: float = arg(0.999, help="decay of the weight average that later stages use", low=0, high=1)
    workers: int = arg(-1, help="loader processes; -1: up to 8, none for shapes", low=-1, high=256)
    log_every: int = arg(10, help="steps between logs; Ctrl-C and SIGTERM are seen then", low=1)
    eval_every: int = arg(1000, help="steps between evaluations with pictures", low=1)
    save_every: int = arg(1000, help="steps between checkpoints", low=1)
    labels: bool = arg(True, help="class folders are classes; --no-labels: no labels")
    resume: bool = arg(False, help="continue the run in --out")
    overwrite: bool = arg(False, help="replace the run in --out")
    compile: bool = arg(False, help="torch.compile the parts of static shape")

def presets(config_class, names):
    """{preset name: {field: value}} of a class whose fields have one value for each name."""
    table = {f.name: f.metadata.get("values", ()) for f in dataclasses.fields(config_class)}
    return {name: {field: values[i] for field, values in table.items() if len(values) > 1}
            for i, name in enumerate(names)}

class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a UserError: one line on stderr, exit code 2."""

    def __init__(self, **kwargs):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=style, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")

    def flag(self, name, kind, default, help, choices=None, low=-1e9, high=1e9):
        """Add --name of type `kind`: str, bool, int, float, tuple for ints, list for floats."""
        options = dict(type=functools.partial(parse_value, kind, low, high), choices=choices)
        if kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        shown = "" if default == "" else f" (default {default})"
        name = "--" + name.replace("_", "-")
        self.add_argument(name, default=default, help=help + shown, **options)

def parse_value(kind, low, high, text):
    """The text of a flag -> its value. The one place where the range of a flag is checked."""
    if kind is str:
        return os.path.expanduser(text)
    scalar = {tuple: int, list: float}.get(kind, kind)
    try:
        values = [scalar(part) for part in text.split(",")]
        if not all(low <= value <= high for value in values) or values[1:] and kind is scalar:
            raise ValueError
    except ValueError:
        wanted = f"{scalar.__name__} from {low:g} to {high:g}"
        raise argparse.ArgumentTypeError(f"{text} is not of type {wanted}") from None
    return values[0] if kind is scalar else kind(values)

def parse_config(config_class, doc, argv=None, presets=None, flag=""):
    """Command line -> config. --flag chooses one of `presets`; a typed flag beats it."""
    chosen = {}
    if presets:
        first = Parser(add_help=False)
        first.add_argument("--" + flag, default=next(iter(presets)), choices=presets)
        chosen = presets[getattr(first.parse_known_args(argv)[0], flag)]
    parser = Parser(description=doc)
    shared = RunConfig.__dataclass_fields__
    for f in dataclasses.fields(config_class):
        if not f.metadata:  # no flag
            continue
        # restated only for its value, a field has no help
        meta = f.metadata["flag"] if f.metadata["flag"]["help"] else shared[f.name].metadata["flag"]
        parser.flag(f.name, f.type, chosen.get(f.name, f.default), **meta)
    return config_class(**vars(parser.parse_args(argv)))

# Processes and devices

class Run(NamedTuple):
    """Where this process stands among those of the run."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of autocast

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

def start_run(config):
    """Pick device and dtype, print them, join torchrun's process group. Raises UserError."""
    # blocks of a GPU's memory that can grow: less of it is lost between them
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    name = config.device
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":  # one GPU per process of this machine
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not usable here ({reason}); try --device cpu")
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    default = "bfloat16" if cuda else "float32"
    dtype = default if config.dtype == "auto" else config.dtype
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        timeout = datetime.timedelta(minutes=30)  # rank 0 draws pictures, the others wait
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    if rank == 0:
        print(f"torch {torch.__version__}, device {device}, {dtype}, {world} process(es)")
    return Run(rank, world, device, getattr(torch, dtype))

class MeanOverRanks(torch.autograd.Function):
    """all_reduce-mean whose backward is one too: DDP's gradient is that of one large batch."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad):
        return MeanOverRanks.forward(ctx, grad.contiguous())

def mean_over_ranks(x):
    """Mean of a tensor over all ranks, differentiable; x itself on one process."""
    return MeanOverRanks.apply(x) if dist.is_initialized() else x

def gather_rows(rows, run):
    """Rows (n,...) of this rank's block -> (N,...) of all ranks in order, on the CPU."""
    if run.world == 1:
        return rows.cpu()
    parts = [None] * run.world
    dist.all_gather_object(parts, rows.cpu())
    return torch.cat(parts)

def parallel(module, run):
    """DDP around a module when there are several ranks: it averages the gradients."""
    if run.world == 1:
        return module
    # buffers are moved by means over all ranks, and so are equal already
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

def micro_batch(config, run):
    """Images per micro-batch and rank. Raises UserError where --batch-size does not divide."""
    parts = run.world * config.accum
    if config.batch_size % parts:
        raise UserError(f"--batch-size {config.batch_size}: pass a multiple of {parts}, which is "
                        f"processes {run.world} x --accum {config.accum}")
    return config.batch_size // parts

def seeded(*key):
    """A CPU torch.Generator that is a function of the integers of `key`, e.g. (seed, step)."""
    state = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

def catch_signals():
    """A list to which SIGTERM and Ctrl-C are added, for the training loop to stop after its step.
    A second one ends the process at once."""
    asked = []

    def note(number, frame):
        if asked:
            sys.exit(130)
        asked.append(number)

    if threading.current_thread() is threading.main_thread():  # Python allows no other
        signal.signal(signal.SIGINT, note)
        signal.signal(signal.SIGTERM, note)
    return asked

# The output folder and what is in it

# counted up where an older file of that kind would be misread, or lacks what is read now
VERSIONS = dict(tokenizer=7, generator=8, classifier=7, finetuned=6)
LOCKS = []  # open files: the lock on a run's folder ends with this process, however it ends

def open_out(config, run, kind, fixed=()):
    """Claim --out -> the state of its checkpoint with --resume, else None. A field of `fixed`
    changes the model but no shape of its tensors: a resumed run must keep it. Exits when that run
    is at --max-steps. Raises UserError."""
    path = f"{config.out}/ckpt.pt"
    if run.main:
        old = [f for f in (path, f"{config.out}/metrics.jsonl") if os.path.exists(f)]
        if config.resume and path not in old:
            raise UserError(f"--resume: there is no {path}; leave --resume out to start a run")
        if old and not (config.resume or config.overwrite):
            raise UserError(f"--out {config.out} holds a run already: pass --resume to continue "
                            "it, --overwrite to replace it, or another --out")
        os.makedirs(config.out, exist_ok=True)
        if fcntl is not None:
            LOCKS.append(open(f"{config.out}/lock", "w"))
            try:
                fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process trains in {config.out}: pass another --out")
        if not config.resume:
            for file in old:
                os.remove(file)
    run.barrier()
    if not config.resume:
        return None
    state = load_checkpoint(path, kind, run.device)
    for name in fixed:
        old, new = state["config"][name], getattr(config, name)
        if old != new:
            raise UserError(f"--resume: {config.out} has {name} {old}, not {new}: pass its flags")
    if state["step"] >= config.max_steps:
        if run.main:
            print(f"{config.out} is at step {state['step']} already: raise --max-steps to go on")
        sys.exit(0)
    return state

def new_array(path, dtype, shape):
    """A .npy file of zeros to be mapped into memory. Its space is taken now, where the system can:
    a full disk would otherwise end the process by a signal, without a word. Raises OSError."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))

def save_checkpoint(path, kind, **state):
    """Write one dict of tensors and primitives under a temporary name, then rename it: a reader
    sees the old file or the new one. Raises UserError when it cannot be written."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(dict(kind=kind, version=VERSIONS[kind], **state), file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut leaves the new name with nothing behind it
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save wraps the first in the second
        reason = str(error.__context__ or error).splitlines()[0]
        raise UserError(f"{path} was not written ({reason}), the one before is whole: make room, "
                        "then pass --resume")

def load_checkpoint(path, kind, device="cpu"):
    """Read a checkpoint. Raises UserError when it is missing, unreadable or of another kind."""
    if not os.path.exists(path):
        raise UserError(f"no checkpoint at {path}: train one first, or pass its path")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = f"{state['kind']} checkpoint of version {state['version']}"
    except Exception as error:  # a damaged or foreign file raises many types
        raise UserError(f"{path} is no readable checkpoint ({type(error).__name__}): pass another")
    wanted = f"{kind} checkpoint of version {VERSIONS[kind]}"
    if found != wanted:
        raise UserError(f"{path} is a {found}, not a {wanted}: pass another, or train it again")
    return state

def load_parts(path, state, **parts):
    """state[name] -> part, strictly, for each part. Raises UserError where one does not fit."""
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{name} of {path} does not fit ({reason}): pass the flags of that "
                            "run, or train it again")

def save_run(config, kind, step, skipped, parts, **more):
    """Write OUT/ckpt.pt. No random state is in it: all randomness is a function of seed, step and
    rank."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(f"{config.out}/ckpt.pt", kind, config=dataclasses.asdict(config), step=step,
                    skipped=int(skipped), **states, **more)

def resume_run(config, state, run, parts):
    """Give `parts` their states -> (step, number of skipped steps as a 0-d tensor). A new run has
    no state and starts at 0."""
    if not state:
        return 0, torch.zeros((), device=run.device)
    load_parts(f"{config.out}/ckpt.pt", state, **parts)
    return state["step"], torch.tensor(float(state["skipped"]), device=run.device)

def weights_hash(state_dict):
    """sha256 of names, types, shapes and values: two equal hashes mean the same model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

class Metrics:
    """The log of a run: OUT/metrics.jsonl, OUT/curves.png, a progress bar. Rank 0 writes."""

    def __init__(self, config, run, step, curves):
        self.config, self.run, self.curves = config, run, curves
        self.path = f"{config.out}/metrics.jsonl"
        self.bar = tqdm(total=config.max_steps, initial=step, disable=not run.main,
                        dynamic_ncols=True)
        self.time, self.step = time.time(), step
        if run.main and os.path.exists(self.path):
            # the resumed run writes all later lines again, and first the evaluation at `step`
            kept = [row for row in self.rows()
                    if row["step"] < step or row["step"] == step and "lr" in row]
            with open(f"{self.path}.tmp", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
            os.replace(f"{self.path}.tmp", self.path)

    def rows(self):
        with open(self.path) as file:  # a kill may leave half a line at the end
            return [json.loads(line) for line in file if line.endswith("\n")]

    def write(self, **values):
        """One JSON line, numbers rounded."""
        values = {k: round(v, 7) if isinstance(v, float) else v for k, v in values.items()}
        if self.run.main:
            with open(self.path, "a") as file:
                file.write(json.dumps(values) + "\n")

    def scores(self, step, scores):
        """The line of an evaluation, printed too; and the curves so far."""
        self.write(step=step, **scores)
        if self.run.main:
            text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self.bar.write(f"step {step}: {text}")
            plot_rows(self.rows(), f"{self.config.out}/curves.png", self.curves)

    def log(self, step, values, stop, show, **more):
        """The line of training step `step`: 0-d tensors `values`, averaged over all ranks and read
        at once; `more` are numbers; the bar shows those named in `show`. -> is any rank to stop?"""
        asked = torch.tensor(float(bool(stop)), device=self.run.device)
        numbers = torch.stack([asked, *(v.detach().float() for v in values.values())])
        asked, *numbers = mean_over_ranks(numbers).tolist()
        values = dict(zip(values, numbers), **more)
        speed = (step - self.step) * self.config.batch_size / (time.time() - self.time)
        self.bar.update(step - self.step)
        self.time, self.step = time.time(), step
        self.write(step=step, **values, images_per_s=speed)
        shown = {name: f"{values[name]:.4g}" for name in show}
        self.bar.set_postfix(**shown, im_s=f"{speed:.0f}")
        return asked > 0

def plot_rows(rows, path, panels, x="step"):
    """Draw a list of dicts as small line charts over its key `x`, one for each of `panels` that
    any row has."""
    w, h, columns = 300, 170, 3
    panels = [name for name in panels if any(name in row for row in rows)] or panels
    sheet = Image.new("RGB", (w * columns, h * math.ceil(len(panels) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, name in enumerate(panels):
        left, top = 48 + w * (n % columns), 22 + h * (n // columns)
        right, bottom = left + w - 62, top + h - 42
        draw.text((left, top - 16), name, fill="black")
        draw.rectangle((left, top, right, bottom), outline="gray")
        points = [(row[x], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        if len(points) < 2:
            continue
        xs, ys = np.array(points[::len(points) // 500 + 1]).T
        px = np.interp(xs, (xs.min(), xs.max()), (left, right))
        py = np.interp(ys, (ys.min(), ys.max()), (bottom, top))
        draw.line(list(zip(px, py)), fill=(200, 60, 40))
        draw.text((left - 44, top - 2), f"{ys.max():.3g}", fill="gray")
        draw.text((left - 44, bottom - 10), f"{ys.min():.3g}", fill="gray")
        draw.text((left, bottom + 3), f"{x} {xs[0]:g} to {xs[-1]:g}", fill="gray")
    sheet.save(path)

def end_run(config, run, step, done):
    """Say how the run ended, by `done` when it is complete; leave the process group."""
    if step < config.max_steps:
        done = f"stopped and saved at step {step}; to go on: the same command with --resume"
    if run.main:
        print(done)
    if run.world > 1:
        dist.destroy_process_group()

# Optimisation

def learning_rate(step, config):
    """Learning rate of a step: linear warm-up, then --lr-schedule (Table A1)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    if config.lr_schedule == "cosine":
        return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.lr_schedule == "step":
        return config.lr * (1.0 if done < 0.8 else 0.1 if done < 0.95 else 0.01)
    return config.lr

def set_learning_rate(step, config, *optimizers):
    """-> the rate of this step, which all parameter groups get: those with a `scale` times it."""
    lr = learning_rate(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1)
    return lr

def adamw(parameters, config, betas):
    """Fused AdamW over the trainable parameters; matrices decay, vectors do not."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() >= 2]),
              dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas,
                             weight_decay=config.weight_decay, fused=True)

def step_if_finite(norm, *optimizers):
    """Step and clear the optimizers unless the gradient norm is not finite. -> 0-d bool: did
    they step? All ranks agree, as DDP has averaged the gradients."""
    finite = torch.isfinite(norm)
    for optimizer in optimizers:
        # fused AdamW looks at `found_inf` on the device, so nothing waits for the GPU
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return finite

@torch.no_grad()
def update_ema(ema, model, decay, step, finite):
    """ema <- decay ema + (1 - decay) model where `finite`; the decay rises from 0 at first."""
    rate = (1 - min(decay, (1 + step) / (10 + step))) * finite
    for average, value in zip(ema.parameters(), model.parameters()):
        average.lerp_(value, rate)
    for average, buffer in zip(ema.buffers(), model.buffers()):
        average.copy_(buffer)

def main(argv=None):
    parser = Parser(description=__doc__)
    parser.flag("data", str, "shapes", "shapes, a folder, a .tar or a quoted glob of tars")
    parser.flag("split", str, "train", "which images to look at", choices=("train", "val"))
    parser.flag("size", int, 32, "pixels of the square images", low=1, high=8192)
    parser.flag("out", str, "out/data", "folder for preview.png")
    parser.flag("num", int, 40, "images in the preview", low=1, high=10_000)
    parser.flag("seed", int, 0, "of the drawings and the preview", low=0, high=2**31 - 1)
    parser.flag("labels", bool, True, "class folders are classes")
    parser.flag("pack", str, "", "write tar shards of both splits to this folder")
    parser.flag("shard_size", int, 10_000, "images per shard", low=1)
    parser.flag("workers", int, 0, "processes that shrink images for --pack", low=0, high=256)
    args = parser.parse_args(argv)
    if args.pack:
        return pack(args.data, args.pack, args.size, args.shard_size, args.workers, args.seed,
                    args.labels)
    dataset = build_dataset(args.data, args.split, args.size, False, args.seed, args.labels)
    print(f"{args.data} {args.split}: {dataset.describe()}")
    os.makedirs(args.out, exist_ok=True)
    rows = subset(len(dataset), args.num, args.seed)
    names = [os.path.basename(dataset.name(i)) for i in rows]
    if dataset.num_classes:
        names = [dataset.class_names[dataset.labels[i]] for i in rows]
        counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
        texts = [f"{name} {count}" for name, count in zip(dataset.class_names, counts)]
        print(f"images per class: {', '.join(texts[:100])} ({len(texts)} classes)")
    images = torch.stack([dataset[i][0] for i in rows])
    image_grid(images, f"{args.out}/preview.png", labels=names, columns=10)
    print(f"wrote {args.out}/preview.png")

if __name__ == "__main__":
    run_main(main)
