"""
Data: every image that MergeVQ trains on or is measured with comes through this file.

    python data.py --data shapes                             # look at a data set: counts, names, out/data/preview.png
    python data.py --data imagenet --split val --size 256    # any folder of class folders, with or without train/ val/
    python data.py --data imagenet --pack packed --size 256  # shrink it once into tar shards, then use --data packed
    python data.py --data "packed/*.tar" --size 256          # a .tar or a quoted glob of tars; nothing is unpacked

`--data` (the `spec` of build_dataset) is one of
    shapes           ten classes of drawings, made on the fly: nothing to download, any size
    FOLDER           class folders (cat/1.jpg), below train/ and val/ (or validation/, test/) where those exist.
                     Without a val folder every 20th image or so, by a hash of its path, is the val split.
                     Images without class folders are an unlabelled data set: num_classes = 0, every label 0.
                     A flat val/ beside a labelled train/ needs val_labels.txt with lines "filename class".
    FILE.tar, GLOB   the same layouts inside tar files, or WebDataset pairs (key.jpg + key.cls)

Images are float32 (3, size, size) in [-1, 1]. Nothing here depends on a global random state: which image comes at
which step, and how it is augmented, are functions of (seed, epoch, index), so a run that resumes at step 1,000, or
moves to another number of GPUs or workers, sees exactly the images it would have seen.
"""

import argparse
import contextlib
import errno
import functools
import glob
import hashlib
import io
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# -----------------------------------------------------------------------------
# mistakes of the user's: one line that names the value and the remedy, not a traceback


class UserError(ValueError):
    """Something the user can put right. The message is one line: what was wrong, and what to do."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Unfailing:
    """A stream that lets a full disk pass: a log on it must not end the run that it tells of. A closed pipe ends it."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            if error.errno not in FULL:
                raise


def run_main(main):
    """Every script ends with this, after it has set the allocator: a UserError becomes one line on stderr and exit code 2. So
    does what is no fault of the script's: a disk that is full or write-protected, and another process that has ended."""
    # glibc gives the memory of a large tensor back at once, and has it mapped anew, page by page, for the next one: until a
    # block of its limit, 32 MB, has been freed. That was a fifth of a decoding step on a CPU
    torch.empty(2 ** 25 - 2 ** 16, dtype=torch.uint8)
    try:
        with contextlib.redirect_stdout(Unfailing(sys.stdout)), contextlib.redirect_stderr(Unfailing(sys.stderr)):
            main()
    except UserError as error:
        text = str(error)
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS, errno.EACCES):
            raise
        text = f"{error}: make room, mend the permissions, or pass another folder"
    except RuntimeError as error:  # gloo has no type of its own for a connection that is lost
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        text = ("the processes of this run cannot reach each other; if one has ended, what it said before tells why. A training "
                f"run goes on from its last checkpoint: start all its processes again, with --resume ({error})")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print("error: " + " ".join(text.split()), file=Unfailing(sys.stderr))
    sys.exit(2)


def make_folder(path, flag="--out"):
    """Make a folder for results, if need be. Raises UserError."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be made ({error.strerror}); pass another folder")


def new_array(path, dtype, shape):
    """A new .npy file of zeros to be mapped into memory, its space on the disk taken. Raises OSError where there is too little
    of it: later, writing to a mapped page that has no place on the disk ends a process by SIGBUS, without a word."""
    try:
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with open(path, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    except OSError:
        with contextlib.suppress(OSError):  # it may not be there
            os.remove(path)
        raise


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a UserError: one line on stderr, exit code 2."""
    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)")


# -----------------------------------------------------------------------------
# one image: file -> PIL RGB -> crop -> tensor

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")  # the decoders we let near a downloaded file


def load_image(file, draft_size=None):
    """A path or the bytes of an image file -> PIL RGB, upright. Raises on anything damaged or suspicious.

    draft_size: the short side that the caller needs. A JPEG much larger than that is decoded at 1/2, 1/4 or 1/8 of
    its size, which libjpeg does for a fraction of the work; the result is never smaller than draft_size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF blocks and the like: PIL is chatty, the pixels are fine
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # a tiny file that unpacks to gigabytes
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=IMAGE_FORMATS) as image:
            if draft_size is not None:
                image.draft(None, (draft_size, draft_size))  # square, so that it does not matter how EXIF turns it
            image.load()
            try:
                image = ImageOps.exif_transpose(image)  # phones store photos sideways and say so in a tag
            except Exception:
                pass  # an unreadable tag: take the pixels as they are
            return to_rgb(image)


def to_rgb(image):
    """Any PIL mode -> RGB. Transparency is laid on white; 16-bit grey is scaled to 8 bits (PIL's convert clips it)."""
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which is how PIL has opened 16-bit PNGs
        values = np.asarray(image).astype(np.float32) / 257  # 65535 -> 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # float TIFFs hold either 0..1 or 0..255
        values = np.nan_to_num(np.asarray(image))
        values = values * 255 if values.max() <= 1 else values
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image, size):
    """The central square, resized to size x size: the one crop of validation, code extraction and evaluation.

    One antialiased resize out of the exact central box, whose edges may lie on half pixels. Small images are enlarged.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return resize(to_rgb(image), (size, size), (left, top, left + side, top + side))


def resize(image, size, box):
    # reducing_gap: average whole blocks of pixels down to 3x the target first, then one bicubic step. On large
    # photos that is several times faster, and no difference can be seen
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def random_box(size, draws, scale):
    """RandomResizedCrop's box from 4 uniform draws: `scale` of the area, aspect 3/4 to 4/3, anywhere."""
    width, height = size
    area, ratio = crop_shape(draws, scale)
    h = min(math.sqrt(area * width * height / ratio), height, width / ratio)  # a panorama is too thin for the area:
    w = h * ratio  # then the crop shrinks and keeps its aspect
    left, top = draws[2] * (width - w), draws[3] * (height - h)
    left, top = max(left, 0), max(top, 0)  # the last bit of a float may lie outside
    return left, top, min(left + w, width), min(top + h, height)


def crop_shape(draws, scale):
    return scale[0] + draws[0] * (scale[1] - scale[0]), (4 / 3) ** (2 * draws[1] - 1)  # area, width / height


def to_tensor(image):
    """PIL RGB or (H,W,3) uint8 -> float32 (3,H,W) in [-1,1]."""
    pixels = np.array(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
    return torch.from_numpy(np.ascontiguousarray(pixels))  # in numpy: torch would wake its threads for every image


def to_uint8(images):
    """(N,3,H,W) in [-1,1] -> (N,H,W,3) numpy uint8, rounded to the nearest; undoes to_tensor exactly."""
    images = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255)
    return images.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def uniform(count, *key):
    """`count` uniform draws in [0,1) that depend on the integers of `key` alone."""
    return np.random.default_rng([int(k) for k in key]).random(count).tolist()


# -----------------------------------------------------------------------------
# data sets. Both kinds are an ImageDataset: they differ in where load(i) finds the pixels

AUGMENT_STREAM, VIEW_STREAM, ORDER_STREAM, SHAPES_STREAM = 1, 2, 3, 4  # so that no two uses share random numbers


class ImageDataset(Dataset):
    """(image (3,size,size) in [-1,1], label int). ds[i], or ds[(epoch, i)] for that epoch's augmentation."""

    crop_scale = (0.5, 1.0)  # how much of the picture a training crop keeps, by area

    def __init__(self, labels, class_names, size, train, seed, note=""):
        self.labels, self.class_names, self.num_classes = labels, class_names, len(class_names)
        self.size, self.train, self.seed, self.note = size, train, seed, note
        # in shared memory: what a worker process finds out, the training process can read
        self.bad = torch.zeros(len(labels), dtype=torch.uint8).share_memory_()
        self.reported = set()

    def __len__(self):
        return len(self.labels)

    def load(self, index, draft_size=None):
        """The whole picture as PIL RGB; raises if it cannot be read."""
        raise NotImplementedError

    def raw(self, index):
        """The bytes of the image file; None for what was drawn, not read."""
        return None

    def name(self, index):
        raise NotImplementedError

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        if not self.train:
            return self.crop(index, None, flip=False)
        draws = uniform(5, self.seed, AUGMENT_STREAM, epoch, index)
        return self.crop(index, self.crop_scale, draws[4] < 0.5, draws)

    def view(self, index, v):
        """View v of an image, for extracting codes: 0 the centre crop, 1 its mirror image, more: mild random crops."""
        if v < 2:
            return self.crop(index, None, flip=v == 1)
        draws = uniform(5, self.seed, VIEW_STREAM, v, index)
        return self.crop(index, (0.8, 1.0), draws[4] < 0.5, draws)

    def crop(self, index, scale, flip, draws=None):
        """scale None: the centre crop; else a random resized crop that keeps a share in `scale` of the area."""
        if scale is None:
            draft_size = 2 * self.size  # leaves the resize some pixels to average
        else:
            area, ratio = crop_shape(draws, scale)  # enough for the crop's own short side to have `size` pixels
            ratio = min(ratio, 1 / ratio)
            draft_size = math.ceil(self.size / min(ratio, math.sqrt(area * ratio)))
        image, label = self.read(index, draft_size)
        if scale is None:
            image = center_crop(image, self.size)
        else:
            image = resize(image, (self.size, self.size), random_box(image.size, draws, scale))
        return to_tensor(ImageOps.mirror(image) if flip else image), label

    def read(self, index, draft_size):
        """An unreadable image gives its place, always, to the next readable one, and is marked in self.bad."""
        for step in range(len(self)):
            i = (index + step) % len(self)
            if not self.bad[i]:
                try:
                    return self.load(i, draft_size), int(self.labels[i])
                except Exception:  # decoders meet broken files with a dozen kinds of exception
                    self.bad[i] = 1
        raise UserError(f"none of the {len(self)} images can be read, for instance {self.name(index)}: "
                        "check that the files are complete images")

    def skipped(self):
        """Names of the unreadable images met so far, by any worker."""
        return [self.name(i) for i in self.bad.nonzero().flatten().tolist()]

    def check_skipped(self, limit=0.01):
        """Names newly skipped since the last call, for the log; an error once more than `limit` of all images are
        unreadable. One bad image is let pass in a data set of any size."""
        bad = self.bad.nonzero().flatten().tolist()
        if len(bad) > max(1, int(limit * len(self))):
            names = ", ".join(self.name(i) for i in bad[:20]) + (", ..." if len(bad) > 20 else "")
            raise UserError(f"{len(bad)} of {len(self)} images are unreadable, more than {limit:.1%}: repair or delete "
                            f"them. {names}")
        new = [i for i in bad if i not in self.reported]
        self.reported.update(new)
        return [self.name(i) for i in new]

    def describe(self):
        classes = f"{self.num_classes} classes" if self.num_classes else "unlabelled"
        return f"{len(self):,} images, {classes}, {self.size}px" + (f" ({self.note})" if self.note else "")


def build_dataset(spec, split, size, train, seed=0):
    """spec: see the top of this file. split: "train" or "val". train: augment (else the centre crop)."""
    if split not in ("train", "val"):
        raise UserError(f"split {split!r} does not exist: pass train or val")
    if not 1 <= size <= 8192:
        raise UserError(f"size {size} is no image size: pass 1 to 8192 pixels")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: pass 0 or more")
    if "\0" in str(spec):
        raise UserError(f"--data {spec!r} is no path: pass shapes, a folder, a .tar file or a quoted glob")
    if spec == "shapes":
        return Shapes(split, size, train, seed)
    return ImageFiles(spec, split, size, train, seed)


# -----------------------------------------------------------------------------
# the embedded data set: one coloured shape on a quiet background


def _ngon(n, radius=1.0, turn=0.0):
    angle = 2 * math.pi * (np.arange(n) / n + turn)
    return np.stack([np.sin(angle), -np.cos(angle)], 1) * radius


def _star():
    points = _ngon(10)
    points[1::2] *= 0.42
    return points


def _heart():
    t = 2 * math.pi * np.arange(64) / 64
    x, y = 16 * np.sin(t) ** 3, -13 * np.cos(t) + 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t)
    return np.stack([x, y + 1], 1) / 17


# name -> outlines in the unit disc (x right, y down), each drawn (1) or cut out again (0)
SHAPES = {
    "circle": [(_ngon(64), 1)],
    "square": [(_ngon(4, turn=1 / 8), 1)],
    "triangle": [(_ngon(3), 1)],
    "star": [(_star(), 1)],
    "plus": [(np.array([(-.95, -.3), (.95, -.3), (.95, .3), (-.95, .3)]), 1),
             (np.array([(-.3, -.95), (.3, -.95), (.3, .95), (-.3, .95)]), 1)],
    "ring": [(_ngon(64), 1), (_ngon(64, 0.55), 0)],
    "heart": [(_heart(), 1)],
    "moon": [(_ngon(64), 1), (_ngon(64, 0.85) + (0.5, 0), 0)],
    "arrow": [(np.array([(0, -1), (.75, -.1), (.28, -.1), (.28, .95), (-.28, .95), (-.28, -.1), (-.75, -.1)]), 1)],
    "hourglass": [(np.array([(-.65, -.76), (.65, -.76), (.1, 0), (.65, .76), (-.65, .76), (-.1, 0)]), 1)],
}


class Shapes(ImageDataset):
    """Ten classes, recognisable at 32 px, that a tokenizer of 64 tokens can learn to draw: no texture, no noise.

    Image i of a split is drawn from (seed, split, i): one shape of class i % 10, wholly visible, at any place, angle
    and size, in a saturated colour on a plain, graded or divided background that is clearly lighter or darker.
    """

    lengths = {"train": 20_000, "val": 1_000}
    crop_scale = None  # the drawing varies place and size itself: training only adds the mirror image

    def __init__(self, split, size, train, seed):
        labels = np.arange(self.lengths[split]) % len(SHAPES)
        super().__init__(labels, list(SHAPES), size, train, seed)
        self.split = split
        self.cache = {}  # small drawings are kept, so that every epoch after the first is free

    def __getstate__(self):  # a worker process that is sent a copy starts with an empty cache
        return {**self.__dict__, "cache": {}}

    def name(self, index):
        return f"shapes/{self.split}/{index}"

    def load(self, index, draft_size=None):
        pixels = self.cache.get(index)
        if pixels is None:
            draws = uniform(20, self.seed, SHAPES_STREAM, self.split == "val", index)
            pixels = draw_shape(list(SHAPES)[index % len(SHAPES)], self.size, draws)
            if self.size <= 64:
                self.cache[index] = pixels
        return Image.fromarray(pixels)


def draw_shape(name, size, draws):
    """One shape from 20 uniform draws -> (size,size,3) uint8."""
    u = iter(draws)
    # object: colour, radius, centre and angle; as fractions of the image's side
    color = OBJECT_COLORS[int(6 * next(u))]
    radius = (0.55 + 0.3 * next(u)) / 2
    center = radius + np.array([next(u), next(u)]) * (1 - 2 * radius)
    angle = (next(u) - 0.5) * math.pi / 4  # up to 22.5 degrees either way
    # its outline at 4x, then averaged down: smooth edges
    canvas = Image.new("L", (4 * size, 4 * size))
    pen = ImageDraw.Draw(canvas)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for points, fill in SHAPES[name]:
        pen.polygon((4 * size * (points @ turn * radius + center)).ravel().tolist(), fill=255 * fill)
    mask = np.asarray(canvas.reduce(4), dtype=np.float32)[..., None] / 255  # (size,size,1)
    # background: two colours, both dark or both light, far from the object's; `mix` (size,size,1) of them
    light = luminance(color) < 0.58
    at = int(4 * next(u))
    first, second = (BACKGROUND_COLORS[(at + n) % 4 + 4 * light] for n in (0, 1))
    kind, horizon = next(u), 0.25 + 0.5 * next(u)
    down = ((np.arange(size, dtype=np.float32) + 0.5) / size)[:, None, None]  # 0 at the top, 1 at the bottom
    if kind < 0.34:
        mix = np.float32(0)  # plain
    elif kind < 0.67:
        mix = down  # a gradient
    else:
        mix = np.clip((down - horizon) * size + 0.5, 0, 1)  # a horizon, one pixel soft
    image = first + mix * (second - first)
    image = image + mask * (color - image)
    return (image * 255 + 0.5).astype(np.uint8)


def luminance(color):
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


# few colours, so that a code of eight bits can hold one: red, orange, yellow, green, blue, purple on four dark and four
# light backgrounds
OBJECT_COLORS = np.array([(.90, .15, .15), (1.0, .55, .10), (1.0, .90, .15),
                          (.15, .70, .25), (.15, .30, .90), (.55, .20, .75)])
BACKGROUND_COLORS = np.array([(.08, .09, .14), (.22, .12, .10), (.08, .20, .15), (.22, .18, .30),
                              (.95, .93, .88), (.80, .88, .97), (.84, .95, .82), (.97, .84, .82)])


# -----------------------------------------------------------------------------
# image files: first find them (a list of paths, in folders or in tars), then read labels and splits off the paths

VAL_FOLDERS = ("val", "validation", "test")  # the first that exists is the val split
SPLIT_FOLDERS = {"train", *VAL_FOLDERS}
LABEL_FILES = ("val_labels.txt", "labels.txt")
VAL_EVERY = 20  # without one: one image in so many


class ImageFiles(ImageDataset):
    """Images in folders or in tar files. The pixels stay where they are; only paths and offsets are held."""

    def __init__(self, spec, split, size, train, seed):
        spec = os.path.expanduser(str(spec))
        found = find_images(spec)
        picked, class_names, labels, note = split_and_label(spec, split, found)
        super().__init__(labels, class_names, size, train, seed, note)
        # compact arrays, not lists of Python strings: ImageNet has 1.3 million, and every worker would copy them
        self.names = np.array([os.fsencode(found.names[i]) for i in picked])
        self.root, self.shards = spec, found.shards
        if self.shards is not None:
            self.where = np.array([found.where[i] for i in picked], dtype=np.int64)  # (n,3) shard, offset, bytes

    def name(self, index):
        name = self.names[index].decode(errors="backslashreplace")
        return os.path.join(self.root if self.shards is None else self.shards[self.where[index, 0]], name)

    def raw(self, index):
        """The bytes of the image file."""
        if self.shards is None:
            with open(os.path.join(self.root, os.fsdecode(self.names[index])), "rb") as file:
                return file.read()
        shard, offset, length = self.where[index].tolist()
        with open(self.shards[shard], "rb", buffering=0) as file:  # a tar is a file of files: read the part we want
            return os.pread(file.fileno(), length, offset)

    def load(self, index, draft_size=None):
        return load_image(self.raw(index), draft_size)


class Found:
    """What find_images returns: sorted paths with "/"; for tars also where each image lies and what its class is."""

    def __init__(self, paths, shards=None, where=None, names=None, tags=None, class_names=None):
        self.paths, self.shards, self.where = paths, shards, where
        self.names = names or paths  # as they stand in the tar
        self.tags = tags  # WebDataset: the text of each image's .cls
        self.class_names = class_names  # packs made by this file name their classes, in order


def find_images(spec):
    if os.path.isdir(spec):
        found = Found(list(walk_images(spec)))
        shards = [] if found.paths else sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        found = find_in_tars(shards) if shards else found
    elif os.path.isfile(spec) and spec.lower().endswith(".tar"):
        found = find_in_tars([spec])
    elif os.path.exists(spec):
        raise UserError(f"{spec} is neither a folder nor a .tar file: pass shapes, a folder of images, or .tar files "
                        "(uncompressed)")
    else:
        shards = sorted(glob.glob(spec, recursive=True))
        if not shards:
            raise UserError(f"--data {spec} does not exist: pass shapes, a folder of class folders, a .tar file or a "
                            "quoted glob of .tar files")
        if not all(shard.lower().endswith(".tar") for shard in shards):
            raise UserError(f"the glob {spec} matches files that are no .tar: pass one that matches tar shards only, "
                            "or a folder of images")
        found = find_in_tars(shards)
    if not found.paths:
        raise UserError(f"{spec} holds no images ({' '.join(IMAGE_EXTENSIONS)}): pass a folder of class folders, or "
                        "shapes")
    return found


def walk_images(folder, prefix="", above=()):
    """Yields the relative path of every image below a folder, in sorted order. Links are followed, but never back up
    into a folder that we are inside of; hidden files are none of ours."""
    try:
        info = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder} ({error.strerror}): check its permissions") from None
    here = (info.st_dev, info.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            is_folder = is_file = False
        lost = entry.is_symlink() and not os.path.exists(entry.path)  # counted as unreadable; a pipe or a device is no image
        if is_folder:
            yield from walk_images(entry.path, f"{prefix}{entry.name}/", (*above, here))
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and (is_file or lost):
            yield prefix + entry.name


def find_in_tars(shards):
    """The images in tar shards, under the paths that they would have if all shards were unpacked in one folder."""
    images, texts, class_names = [], {}, None  # images: (path, (shard number, offset, bytes), name in the tar)
    for number, shard in enumerate(tqdm(shards, "reading tar headers", leave=False, disable=len(shards) < 8)):
        status = os.stat(shard)
        members, texts[number], shard_classes = index_tar(shard, status.st_mtime_ns, status.st_size)
        images += [(path, (number, *where), path) for path, where in members.items()]
        class_names = class_names or shard_classes

    heads = {path.split("/")[0].lower() for path, *_ in images}
    # an archive of one folder (imagenet/train/...) stands for the folder; class folders are never one inside another
    while len(heads) == 1 and not heads & SPLIT_FOLDERS and min(path.count("/") for path, *_ in images) > 1:
        images = [(path.split("/", 1)[1], where, name) for path, where, name in images]
        heads = {path.split("/")[0].lower() for path, *_ in images}
    if not heads & SPLIT_FOLDERS:  # then train-000000.tar and imagenet-val-07.tar tell the split
        words = [re.split("[^a-z]+", os.path.basename(shard).lower()) for shard in shards]
        folders = [next((name + "/" for name in ("train", *VAL_FOLDERS) if name in found), "") for found in words]
        images = [(folders[where[0]] + path, where, name) for path, where, name in images]
    images.sort(key=lambda image: (image[0].split("/"), image[1]))
    paths, where, names = ([image[k] for image in images] for k in range(3))

    tags = None
    if any(texts.values()):  # WebDataset: key.jpg and key.cls, in one shard, are one sample
        tags = [texts[number].get(os.path.splitext(name)[0]) for (number, _, _), name in zip(where, names)]
        if None in tags:
            k = tags.index(None)
            raise UserError(f"{names[k]} in {shards[where[k][0]]} has no .cls beside it though others have: add it, or "
                            "leave the image out")
    return Found(paths, shards, where, names, tags, class_names)


@functools.lru_cache(maxsize=None)  # the train and the val split look through the same shards
def index_tar(shard, mtime, size):
    """One pass over a tar -> ({image: (offset, bytes)}, {key: text of key.cls}, class names of a pack or None)."""
    members, texts, class_names = {}, {}, None
    try:
        with tarfile.open(shard, "r:") as tar:
            end = -1
            for member in tar:
                if member.offset <= end:  # a size below 0 leads back, for ever
                    raise tarfile.ReadError("a member of negative size")
                end = member.offset
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                path, lower = "/".join(parts), member.name.lower()
                # only plain files under plain relative names: no links, no way out of the archive, nothing hidden
                if (not member.isreg() or member.issparse() or member.name.startswith("/")
                        or any(part.startswith(".") for part in parts)):  # ".." among them
                    continue
                if lower.endswith(".cls"):
                    texts[path[:-4]] = tar.extractfile(member).read(1000).decode().strip()
                elif path == CLASS_LIST:
                    class_names = tar.extractfile(member).read(10**8).decode().splitlines()
                elif lower.endswith(IMAGE_EXTENSIONS):
                    members[path] = member.offset_data, member.size
    except Exception as error:  # a damaged header can raise anything
        raise UserError(f"{shard} is no intact, uncompressed tar file ({error}): decompress it, fetch it again, or "
                        "leave it out") from None
    return members, texts, class_names


def split_and_label(spec, split, found):
    """-> (indices into found.paths that make up the split, class names, labels (n,) int64, note for the user)."""
    members, notes = divide(found.paths)
    if split == "train" and not members["train"]:
        raise UserError(f"{spec} has validation images but no train/: pass a data set with training images")

    def tag(i, path):  # what tells the class: the first folder, or the .cls file; None for an image in no class folder
        return found.tags[i] if found.tags else path.split("/")[0] if "/" in path else None

    # The classes are those of the training images; a class id is a place in their sorted list
    source = members["train"] or members["val"]
    names = {tag(i, path) for i, path in source} - {None}
    if names and found.class_names is not None and names <= set(found.class_names):
        names = found.class_names
    elif names and found.tags and all(name.isdecimal() for name in names):  # a .cls file can give the id itself
        highest = max(map(int, names))
        if highest >= 1_000_000:
            raise UserError(f"{spec} has the class id {highest}: ids in .cls files must be below a million")
        names = [str(number) for number in range(highest + 1)]
    names = list(names) if isinstance(names, list) else sorted(names)
    ids = {name: number for number, name in enumerate(names)}
    if names:
        labelled = [(i, path) for i, path in source if tag(i, path) is not None]
        if len(labelled) < len(source):
            notes.append(f"{len(source) - len(labelled)} images outside class folders left out")
        source = labelled

    if members["train"] and members["val"]:
        picked = source if split == "train" else members["val"]
    elif members["train"]:
        notes.append(f"no val folder: about 1 image in {VAL_EVERY}, by a hash of its path, is the val split")
        picked = hold_out(source, split)
    else:
        picked = source
    tags = [tag(i, path) for i, path in picked]
    if names and None in tags:  # a flat val folder beside class folders
        folder = os.path.join(spec, found.paths[picked[0][0]].split("/")[0])
        listed = read_label_file(os.path.dirname(found.shards[0]) if found.shards else folder, ids)
        missing = next((path for (_, path), t in zip(picked, tags) if t is None and path not in listed), None)
        if missing:
            raise UserError(f"the label file of {folder} has no line for {missing}: add one, 'filename class'")
        tags = [listed[path] if t is None else t for (_, path), t in zip(picked, tags)]
    unknown = next((k for k, t in enumerate(tags) if names and t not in ids), None)
    if unknown is not None:
        raise UserError(f"class {tags[unknown]!r} of {found.paths[picked[unknown][0]]} does not occur in the training "
                        "images: train and val must have the same classes")
    labels = np.array([ids[t] if names else 0 for t in tags], dtype=np.int64)
    return [i for i, _ in picked], names, labels, "; ".join(notes)


def divide(paths):
    """-> ({"train": [(index, path below the split's folder), ...], "val": [...]}, notes)."""
    heads = [path.split("/")[0].lower() if "/" in path else "" for path in paths]
    present = set(heads)
    others = present - SPLIT_FOLDERS - {""}
    val_folder = next((name for name in VAL_FOLDERS if name in present), None)
    if "train" in present:  # a class may be called train: then it holds no folders and stands among other classes
        nested = any(head == "train" and path.count("/") > 1 for head, path in zip(heads, paths))
        divided = bool(val_folder) or nested or not others
    else:
        divided = bool(val_folder) and not others
    if not divided:
        return {"train": list(enumerate(paths)), "val": []}, []
    below = [(i, path.partition("/")[2]) for i, path in enumerate(paths)]
    members = {"train": [below[i] for i, head in enumerate(heads) if head == "train"],
               "val": [below[i] for i, head in enumerate(heads) if head == val_folder]}
    return members, [f"{len(others)} folders beside train and val left out"] if others else []


def hold_out(source, split):
    """The images of a split when the data set has none: by a hash of the path, so that new images move no old one."""
    digests = [int.from_bytes(hashlib.sha1(os.fsencode(path)).digest()[:8], "big") for _, path in source]
    val = [digest % VAL_EVERY == 0 for digest in digests]
    if all(val) or not any(val):  # very few images: one is the val split, and a single image is both splits
        lowest = min(digests)
        val = [digest == lowest for digest in digests]
    return [pair for pair, out in zip(source, val) if out == (split == "val") or len(source) == 1]


def read_label_file(folder, ids):
    """The label file in or beside a flat folder, lines "filename class (name or id)" -> {filename: class name}."""
    places = [os.path.join(where, name) for where in (folder, os.path.dirname(folder)) for name in LABEL_FILES]
    place = next((path for path in places if os.path.isfile(path)), None)
    if place is None:
        raise UserError(f"{folder} has no class folders, though the training images do: sort its images into class "
                        f"folders, or write {places[0]} with lines 'filename class'")
    named, listed = {**{str(number): name for name, number in ids.items()}, **{name: name for name in ids}}, {}
    with open(place, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            line = line.strip()
            if not line:
                continue
            # file names and class names may both hold blanks: cut where what follows is a class
            cut = next((gap for gap in re.finditer(r"\s+", line) if line[gap.end():] in named), None)
            if cut is None:
                raise UserError(f"{place} line {number}: {line!r} is not 'filename class' with a class (or its id, "
                                f"0 to {len(ids) - 1}) of the training images")
            listed[line[:cut.start()]] = named[line[cut.end():]]
    return listed


# -----------------------------------------------------------------------------
# batches


def batches(dataset, batch_size, seed, step=0, accum=1, rank=0, world=1, workers=0):
    """Endless micro-batches (images (b,3,H,W), labels (b,)) of this rank, from optimizer step `step` on.

    batch_size is the global batch of one optimizer step: b = batch_size / (world * accum), and `accum` micro-batches
    are one step. Sample number p of the run is image order(epoch)[p % n] of epoch p // n, whatever the number of
    ranks, micro-batches and workers.
    """
    share = batch_size // (world * accum)
    if batch_size < 1 or share * world * accum != batch_size:
        raise UserError(f"batch size {batch_size} does not divide into {world} processes x {accum} accumulation steps: "
                        f"pass --batch-size a multiple of {world * accum}")
    n = len(dataset)

    @functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
    def order(epoch):
        return np.random.default_rng([seed, ORDER_STREAM, epoch]).permutation(n)

    def sampler():
        at = step
        while True:
            for micro in range(accum):
                start = at * batch_size + (micro * world + rank) * share
                yield [(p // n, int(order(p // n)[p % n])) for p in range(start, start + share)]
            at += 1

    # The loader seeds each worker and gives it one thread. Its own generator: the global random state stays untouched
    loader = DataLoader(dataset, batch_sampler=sampler(), num_workers=workers, persistent_workers=workers > 0,
                        worker_init_fn=ignore_signals, generator=torch.Generator().manual_seed(seed))
    try:
        yield from loader
    except UserError as error:  # from a worker it arrives wrapped in a traceback, with the message on the last line
        error.__traceback__ = None  # it holds on to the loader, whose workers are to end now
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None


def ignore_signals(worker):
    """For DataLoader workers: Ctrl-C and SIGTERM reach a whole group of processes, but to stop is for the trainer to do.
    The workers end when it does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# -----------------------------------------------------------------------------
# pictures of images


def image_grid(rows, path, labels=None, columns=8, row_titles=None, scale=None):
    """Writes a PNG of (N,3,H,W) images in [-1,1], `columns` a line; or of a list of such rows, one a line.

    labels: a text for each image, in reading order; row_titles: a text for each line; scale: screen pixels a pixel.
    """
    if isinstance(rows, torch.Tensor):
        rows = list(rows.split(columns))
    labels = [str(text) for text in labels] if labels is not None else None
    height, width = rows[0].shape[-2:]
    scale = scale or max(1, math.ceil(96 / height))
    cell_h, cell_w, gap = height * scale, width * scale, 4
    font = ImageFont.load_default()
    head = 14 if labels else 0
    side = max((int(font.getlength(_plain(t))) for t in row_titles), default=0) + 8 if row_titles else 0
    sheet = Image.new("RGB", (side + gap + max(len(row) for row in rows) * (cell_w + gap),
                              gap + len(rows) * (head + cell_h + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    count = 0
    for r, row in enumerate(rows):
        top = gap + r * (head + cell_h + gap)
        if row_titles:
            pen.text((4, top + head + cell_h // 2 - 6), _plain(row_titles[r]), fill="black", font=font)
        for c, pixels in enumerate(to_uint8(row)):
            left = side + gap + c * (cell_w + gap)
            cell = Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            sheet.paste(cell, (left, top + head))
            if labels and count < len(labels):
                text = _plain(labels[count])
                while font.getlength(text) > cell_w and len(text) > 1:
                    text = text[:-1]
                pen.text((left, top), text, fill="black", font=font)
            count += 1
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    partial = f"{path}.{os.getpid()}.tmp"
    sheet.save(partial, format="PNG")
    os.replace(partial, path)  # whoever looks sees the old picture or the new one, never half of it


def _plain(text):
    return str(text).encode("ascii", "replace").decode()  # the built-in font has no other letters


# -----------------------------------------------------------------------------
# the strong augmentation of the alignment loss, on whatever device the images are

AUGMENT_DRAWS = 16


@torch.no_grad()
def augment(images, draws):
    """A strongly changed view of each image (DINO 2104.14294): images (B,3,H,W) in [-1,1], draws (B,16) uniform in
    [0,1). Row i of the result depends on row i of both inputs alone, not on the rest of the batch."""
    B, _, H, W = images.shape
    x = images.float()
    u = iter(draws.to(x).unbind(1))  # each next(u): (B,)

    # random resized crop with a mirror image in half of the cases: one affine map, sampled bilinearly
    area, ratio = 0.4 + 0.6 * next(u), (4 / 3) ** (2 * next(u) - 1)
    h, w = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
    down, right = (2 * next(u) - 1) * (1 - h), (2 * next(u) - 1) * (1 - w)  # the crop's centre, in [-1,1]
    theta = x.new_zeros(B, 2, 3)
    theta[:, 0, 0] = torch.where(next(u) < 0.5, -w, w)
    theta[:, 1, 1] = h
    theta[:, 0, 2], theta[:, 1, 2] = right, down
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="border", align_corners=False)

    # colour jitter (p = 0.8): brightness and contrast +-40 %, saturation +-20 %, hue +-36 degrees; grey (p = 0.2)
    x = (x + 1) / 2  # [0,1] from here on
    strength = (next(u) < 0.8).to(x)
    brightness, contrast, saturation, hue = (strength * (2 * next(u) - 1) * s for s in (0.4, 0.4, 0.2, 0.1))
    saturation = torch.where(next(u) < 0.2, torch.zeros_like(saturation), 1 + saturation)  # grey: no saturation at all
    x = (x * (1 + brightness).view(B, 1, 1, 1)).clamp(0, 1)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * (1 + contrast).view(B, 1, 1, 1)).clamp(0, 1)
    # In YIQ, saturation scales the chroma plane and hue turns it: one 3x3 matrix an image
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    to_yiq, from_yiq = to_yiq.to(x), to_yiq.inverse().to(x)
    cos, sin = saturation * (2 * math.pi * hue).cos(), saturation * (2 * math.pi * hue).sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(B, 3, 3)
    x = (from_yiq @ turn @ to_yiq @ x.flatten(2)).view(B, 3, H, W).clamp(0, 1)

    # blur (p = 0.5): DINO's sigma, 0.1 to 2 pixels at 224; small images count as 96 px or no blur would be seen
    blurred, unit = next(u) < 0.5, max(H, W, 96) / 224
    sigma = ((0.1 + 1.9 * next(u)) * unit)[:, None]
    reach = math.ceil(3 * 2.0 * unit)
    taps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)  # (T,)
    kernel = torch.where(blurred[:, None], torch.exp(-0.5 * (taps / sigma) ** 2), (taps == 0).to(x))  # (B,T)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # (B*3,T)
    x = F.pad(x, (reach,) * 4, mode="replicate").view(1, B * 3, H + 2 * reach, W + 2 * reach)
    x = F.conv2d(x, kernel[:, None, :, None], groups=B * 3)
    x = F.conv2d(x, kernel[:, None, None, :], groups=B * 3).view(B, 3, H, W)

    x = torch.where((next(u) < 0.2).view(B, 1, 1, 1) & (x >= 0.5), 1 - x, x)  # solarise (p = 0.2)
    return (x * 2 - 1).to(images.dtype)


# -----------------------------------------------------------------------------
# packing: photos are mostly far larger than the crops we train on, and decoding them is what costs

CLASS_LIST = "classes.txt"  # in every shard: the class names in the order of their ids


class Packed(Dataset):
    """Item i -> the bytes of a JPEG of image i, its short side at most 1.125 `size`; None if it cannot be read.

    Uncropped, for random crops and the centre crop alike; quality 95. A JPEG that is small already is kept as it is.
    """

    def __init__(self, dataset, size):
        self.dataset, self.short = dataset, round(1.125 * size)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, raw = self.dataset.load(index, 2 * self.short), self.dataset.raw(index)
        except Exception:
            return None
        width, height = image.size
        if min(width, height) > self.short:
            scale = self.short / min(width, height)
            image = resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), (0, 0, width, height))
        elif raw is not None and raw.startswith(b"\xff\xd8"):
            return raw
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        return buffer.getvalue()


def pack(spec, out, size, shard_size=10_000, workers=0, seed=0):
    """Writes OUT/train-000000.tar, ..., OUT/val-000000.tar, ... with class folders inside, then times both."""
    if os.path.exists(out) and (not os.path.isdir(out) or os.path.samefile(out, ".") or os.listdir(out)):
        raise UserError(f"--pack {out} exists already: pass a new folder, or delete it first")
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: pass at least 1 image a shard")
    datasets = {split: build_dataset(spec, split, size, train=False, seed=seed) for split in ("train", "val")}
    partial = out.rstrip("/") + ".partial"  # becomes OUT in one step at the end: there is no half a pack
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial, "--pack")
    for split, dataset in datasets.items():
        print(f"{split}: {dataset.describe()}")
        skipped = []
        images = DataLoader(Packed(dataset, size), batch_size=None, num_workers=workers)
        tar = None
        for index, jpeg in enumerate(tqdm(images, split)):
            if index % shard_size == 0:
                if tar:
                    tar.close()
                tar = tarfile.open(os.path.join(partial, f"{split}-{index // shard_size:06d}.tar"), "w")
                if dataset.num_classes:
                    add_to_tar(tar, CLASS_LIST, "".join(name + "\n" for name in dataset.class_names).encode())
            if jpeg is None:
                skipped.append(dataset.name(index))
                continue
            stem = os.path.splitext(os.path.basename(dataset.name(index)))[0]
            folder = dataset.class_names[dataset.labels[index]] + "/" if dataset.num_classes else ""
            add_to_tar(tar, f"{folder}{index:08d}_{stem}.jpg", jpeg)
        tar.close()
        if skipped:
            print(f"{split}: left out {len(skipped)} unreadable images: {', '.join(skipped[:20])}"
                  + (", ..." if len(skipped) > 20 else ""))
    os.replace(partial, out)
    # both were read or written just now, so this times decoding more than the disk
    rates = [read_rate(build_dataset(data, "train", size, train=True, seed=seed)) for data in (spec, out)]
    print(f"reading {size}px training crops, one process: {rates[0]:.0f} images/s from {spec}, "
          f"{rates[1]:.0f} images/s from {out} ({rates[1] / rates[0]:.1f}x)")


def add_to_tar(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)  # no time or owner: the same images give the same tar
    tar.addfile(info, io.BytesIO(content))


def read_rate(dataset, seconds=4.0):
    """Images read, decoded and cropped a second, in random order, by one process."""
    start, count = time.perf_counter(), 0
    for index in np.random.default_rng(0).permutation(len(dataset)):
        dataset[0, index]
        count += 1
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


# -----------------------------------------------------------------------------
# look at a data set


def preview(dataset, path, num, seed):
    """A labelled grid of `num` images, taken from all classes in turn."""
    order = np.random.default_rng([seed, ORDER_STREAM]).permutation(len(dataset))
    seen, turn = {}, []  # turn: how many of its class came before
    for label in dataset.labels[order].tolist():
        turn.append(seen.get(label, 0))
        seen[label] = turn[-1] + 1
    order = order[np.lexsort((dataset.labels[order], turn))][:num]
    pairs = [dataset[i] for i in order]
    texts = [dataset.class_names[label] if dataset.class_names else os.path.basename(dataset.name(i))
             for i, (_, label) in zip(order, pairs)]
    image_grid(torch.stack([image for image, _ in pairs]), path, labels=texts, columns=10)
    return order


def main(argv=None):
    parser = Parser(description="Look at a data set, or pack it into tar shards.")
    parser.add_argument("--data", default="shapes", help="shapes, a folder, a .tar or a quoted glob of tars (default shapes)")
    parser.add_argument("--split", default="train", choices=["train", "val"])
    parser.add_argument("--size", type=int, default=32, help="pixels of the square images (default 32)")
    parser.add_argument("--out", default="out/data", help="where preview.png goes (default out/data)")
    parser.add_argument("--num", type=int, default=40, help="images in the preview (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack", metavar="OUT", help="write tar shards of both splits for images of --size to OUT")
    parser.add_argument("--shard-size", type=int, default=10_000, help="images a shard (default 10000)")
    parser.add_argument("--workers", type=int, default=0, help="processes that shrink images while packing (default 0)")
    args = parser.parse_args(argv)
    for name, low, high in (("size", 1, 8192), ("num", 1, 10_000), ("seed", 0, 2**31 - 1), ("shard_size", 1, 10**9),
                            ("workers", 0, 256)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be from {low} to {high}")
    if args.pack:
        pack(args.data, args.pack, args.size, args.shard_size, args.workers, args.seed)
        return

    dataset = build_dataset(args.data, args.split, args.size, train=False, seed=args.seed)
    print(f"{args.data} {args.split}: {dataset.describe()}")
    if dataset.num_classes:
        counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
        shown = [f"{name} {count}" for name, count in zip(dataset.class_names, counts)][:100]
        more = dataset.num_classes - len(shown)
        print("images a class: " + ", ".join(shown) + (f", ... {more} more" if more else "")
              + f" (smallest {counts.min()}, largest {counts.max()})")
    make_folder(args.out)
    path = os.path.join(args.out, "preview.png")
    order = preview(dataset, path, args.num, args.seed)
    for index in order[:3]:
        label = int(dataset.labels[index])
        print(f"{dataset.name(index)}  class {label}  {dataset.class_names[label] if dataset.num_classes else '-'}")
    for name in dataset.check_skipped():
        print(f"unreadable, skipped: {name}")
    print(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)
