"""Hostile files: what every loader makes of files that are damaged, mutated, or made to do harm.

    python tests/fuzz.py --num 300        # seconds; the suite runs the same with fewer

Each file must load, be counted as unreadable, or end in one UserError of one line: nothing else may be raised, nothing may
take longer than `LIMIT` seconds, no code from a file may run, and no file may appear outside the output folder.
"""

import argparse
import dataclasses
import io
import json
import os
import pickle
import random
import signal
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageCms

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import data
import eval as evaluation
import mergear
import tokenizer
from data import UserError

LIMIT = 20  # seconds a loader may take; a normal one takes milliseconds


# ---------------------------------------------------------------------------------------------------------------------
# Files

def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG whose header promises width x height pixels, in a few bytes."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def whole_images():
    """name -> bytes of images that are unusual but in order: all of them must be read."""
    dice = np.random.default_rng(0)
    picture = Image.fromarray(dice.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = Image.fromarray(dice.integers(0, 2**16, (9, 9), dtype=np.uint16))
    return {
        "rgb.jpg": encoded(picture, "JPEG"), "rgb.png": encoded(picture), "rgb.bmp": encoded(picture, "BMP"),
        "rgb.webp": encoded(picture, "WEBP"), "rgb.tif": encoded(picture, "TIFF"),
        "cmyk_icc.jpg": encoded(picture.convert("CMYK"), "JPEG", icc_profile=profile), "grey16.png": encoded(deep),
        "one.png": encoded(picture.resize((1, 1))), "wide.png": encoded(picture.resize((20_000, 1))),
        "tall.png": encoded(picture.resize((1, 20_000))), "palette.png": encoded(picture.convert("P")),
        "animated.gif": encoded(picture.convert("P"), "GIF", save_all=True, append_images=[picture.rotate(90).convert("P")] * 3),
        "unicode \u00e9\u4e2d\U0001f600.png": encoded(picture), "new\nline.png": encoded(picture), "-rf.png": encoded(picture),
        "sp ace'\"$(touch pwned).png": encoded(picture),
    }


def broken_images():
    """name -> bytes that no image can be read from, or that must not be unpacked."""
    whole = whole_images()
    return {
        "zero.jpg": b"", "text.jpg": b"this is not a JPEG\n" * 50, "truncated.jpg": whole["rgb.jpg"][:300],
        "truncated.png": whole["rgb.png"][:200], "bomb.png": png_of_size(60_000, 60_000),
        "negative.png": png_of_size(2**31 - 1, 1),
        "html.png": b"<html><body>404</body></html>", "zip.png": b"PK\x03\x04" + bytes(100),
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    }


def mutate(content, dice):
    """Some bytes changed, cut out, repeated, or the end cut off."""
    content = bytearray(content)
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(len(content) + 1)
        kind = dice.randrange(5)
        if kind == 0:
            content[at:at + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            content[at:at + dice.randint(1, 64)] = b""
        elif kind == 2:
            content[at:at] = content[at:at + dice.randint(1, 64)]
        elif kind == 3:
            content[at:at + 4] = dice.choice([b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00"])
        else:
            content = content[:at] if dice.random() < 0.3 else content
    return bytes(content)


def write_tar(path, members):
    """members: (TarInfo or name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for info, content in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def wicked_tar(path):
    """Two good images among ../ members, absolute paths, links, devices, and a member that is hidden."""
    image = encoded(Image.new("RGB", (8, 8), "red"))
    device = tarfile.TarInfo("a/device.png")
    device.type = tarfile.CHRTYPE
    write_tar(path, [("a/1.png", image), ("b/2.png", image), ("../escape.png", image), ("a/../../escape2.png", image),
                     ("/tmp/absolute.png", image), link("a/link.png", "/etc/passwd", tarfile.SYMTYPE),
                     link("a/hard.png", "../../etc/passwd", tarfile.LNKTYPE), (device, b""), ("a/.hidden.png", image)])


class Bomb:
    """Unpickled, it would create a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def hostile_checkpoints(folder, good):
    """name -> path, for a good checkpoint (bytes): none of them may load."""
    state = torch.load(io.BytesIO(good), weights_only=True)
    config = state.get("config", {})
    variants = {
        "wrong kind": {**state, "kind": "cake"}, "wrong version": {**state, "version": 99},
        "strange version": {**state, "version": torch.ones(2)},
        "list": [1, 2, 3], "tensor": torch.zeros(3), "no entries": dict(kind=state["kind"], version=state["version"]),
        "no config": {**state, "config": None}, "unknown field": {**state, "config": {**config, "no_such_field": 1}},
        "text in a number": {**state, "config": {**config, "width": "wide", "size": "big"}},
        "huge": {**state, "config": {**config, "width": 10**12, "size": 10**12}},
        "negative": {**state, "config": {**config, "width": -4, "size": -1}},
    }
    if "bits" not in config:  # a classifier's config is a record, it may say more
        del variants["unknown field"]
    for name in ("ema", "model"):
        if name in state:
            weights = dict(state[name])
            first = next(iter(weights))
            variants["a weight is missing"] = {**state, name: {k: v for k, v in weights.items() if k != first}}
            variants["a weight too many"] = {**state, name: {**weights, "extra": torch.zeros(1)}}
            variants["another shape"] = {**state, name: {**weights, first: torch.zeros(7, 7)}}
            variants["text for a weight"] = {**state, name: {**weights, first: "0"}}
            break
    paths = {}
    for name, value in variants.items():
        paths[name] = os.path.join(folder, f"{name}.pt")
        torch.save(value, paths[name])
    archive = io.BytesIO()  # a real checkpoint with its pickle exchanged
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(archive, "w") as new:
        for item in old.namelist():
            new.writestr(item, pickle.dumps(Bomb(os.path.join(folder, "pwned"))) if item.endswith("data.pkl") else old.read(item))
    for name, content in {"empty": b"", "text": b"hello", "truncated": good[:len(good) // 2], "cut at the end": good[:-100],
                          "pickle bomb": pickle.dumps(Bomb(os.path.join(folder, "pwned"))), "bomb in a zip": archive.getvalue(),
                          "zip without content": b"PK\x05\x06" + bytes(18)}.items():
        paths[name] = os.path.join(folder, f"{name}.pt")
        with open(paths[name], "wb") as f:
            f.write(content)
    paths["folder"] = os.path.join(folder, "folder.pt")
    os.makedirs(paths["folder"])
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# Loaders

class Hang(BaseException):
    pass


def attempt(what, function, *args):
    """function(*args) within LIMIT seconds -> its result, or the UserError that it raised."""
    def too_long(number, frame):
        raise Hang(f"{what}: {function} did not come back within {LIMIT} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        return function(*args)
    except UserError as error:
        assert str(error).strip(), f"{what}: an empty message"
        return error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_all(spec, split="train"):
    """Every image of a data set, by the crops of training and of validation -> (images read, images skipped)."""
    for train in (True, False):
        dataset = data.build_dataset(str(spec), split, 8, train=train)
        for i in range(len(dataset)):
            image, label = dataset[3, i]
            assert image.shape == (3, 8, 8) and image.isfinite().all() and 0 <= label <= max(0, dataset.num_classes - 1)
    return len(dataset) - len(dataset.skipped()), len(dataset.skipped())


def make_folder(folder, files):
    os.makedirs(folder)
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(content)
    return folder


def fuzz_images(folder, num, dice):
    """Mutated images, one data set of each ten -> (files, of which unreadable)."""
    whole, files, skipped = list(whole_images().items()), 0, 0
    while files < num:
        part = {}
        for n in range(10):
            name, content = dice.choice(whole)
            part[f"{n}{os.path.splitext(name)[1]}"] = mutate(content, dice)
        part["good.png"] = whole[1][1]
        read = attempt("mutated images", read_all, make_folder(os.path.join(folder, f"images{files}"), part))
        files, skipped = files + 10, skipped + read[1]
    return files, skipped


def fuzz_tars(folder, num, dice):
    """Mutated tar files -> (files, of which refused)."""
    path = os.path.join(folder, "good.tar")
    wicked_tar(path)
    with open(path, "rb") as f:
        good, refused = f.read(), 0
    for n in range(num):
        path = os.path.join(folder, f"mutated{n}.tar")
        content = bytearray(good)
        for _ in range(dice.randint(1, 20)):  # in the headers, where it matters
            at = dice.randrange(len(good) // 512) * 512 + dice.randrange(160)
            content[at] = dice.choice([0, 255, 128, dice.randrange(256), 0x2D])
        if dice.random() < 0.7:  # with checksums that are right again, or hardly anything would be read at all
            for at in range(0, len(content) - 511, 512):
                if content[at + 257:at + 262] == b"ustar":
                    content[at + 148:at + 156] = b" " * 8
                    content[at + 148:at + 156] = b"%06o\x00 " % sum(content[at:at + 512])
        with open(path, "wb") as f:
            f.write(content if dice.random() < 0.7 else content[:dice.randrange(len(content))])
        refused += isinstance(attempt(path, read_all, path), UserError)
    return num, refused


def fuzz_checkpoints(folder, num, dice, good, load):
    """Mutated checkpoints -> (files, of which refused). Those that load have whole headers and a changed weight."""
    refused = 0
    for n in range(num):
        path = os.path.join(folder, f"mutated{n}.pt")
        with open(path, "wb") as f:
            f.write(mutate(good, dice))
        refused += isinstance(attempt(path, load, path), UserError)
    return num, refused


def fuzz_samples(folder, num, dice):
    """Mutated npz files -> (files, of which refused)."""
    buffer, refused = io.BytesIO(), 0
    np.savez(buffer, arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.arange(4), mu=np.zeros(4), sigma=np.eye(4))
    features = SimpleNamespace(record=dict(features_hash="", features="pixels"), judge=None)
    for n in range(num):
        path = os.path.join(folder, f"mutated{n}.npz")
        with open(path, "wb") as f:
            f.write(mutate(buffer.getvalue(), dice) if n else pickle.dumps(Bomb(os.path.join(folder, "pwned"))))
        refused += isinstance(attempt(path, evaluation.read_samples, path, 0), UserError)
        attempt(path, evaluation.read_reference, path, features, 8)
    return num, refused


def fuzz_code_caches(folder, num, dice):
    """Code caches with a mutated file -> (files, of which refused)."""
    rows = {name: np.zeros((6, 16) if name in ("codes", "source") else 6, dtype) for name, dtype in mergear.COLUMNS.items()}
    refused = 0
    for n in range(num):
        place = os.path.join(folder, f"codes{n}")
        os.makedirs(place)
        for name, column in rows.items():
            np.save(os.path.join(place, f"{name}.npy"), column)
        with open(os.path.join(place, "meta.json"), "w") as f:
            json.dump(dict(images=3, views=2), f)
        victim = os.path.join(place, dice.choice(["meta.json", "codes.npy", "source.npy", "labels.npy", "keep.npy"]))
        with open(victim, "rb") as f:
            content = f.read()
        with open(victim, "wb") as f:
            f.write(mutate(content[:130], dice) + content[130:])
        refused += isinstance(attempt(victim, mergear.CodeDataset, place), UserError)
    return num, refused


def trained(folder):
    """{loader: bytes of a checkpoint that it reads}, for tokenizer, generator and classifier."""
    config = tokenizer.TokenizerConfig(size=8, base=8, mult=(1, 2), width=16, heads=2, depth=2, dec_width=16, dec_heads=2,
                                       dec_depth=1, keep=6, keeps=(4, 6, 16), bits=6, norm_groups=4, recovery_width=16,
                                       recovery_heads=2, disc_base=4, disc_layers=1, align="none")
    ema = tokenizer.MergeVQ(config).state_dict()
    gpt_config = mergear.GPTConfig(width=16, heads=2, depth=1, bits=6, length=16, keep=6, keeps=(4, 6, 16), window=2,
                                   num_classes=2)
    classifier = evaluation.Classifier(8, 2)
    files = {}
    for kind, load, state in (
            ("tokenizer", tokenizer.load_tokenizer, dict(step=0, config=dataclasses.asdict(config), ema=ema)),
            ("generator", mergear.load_generator, dict(
                step=0, config=dataclasses.asdict(gpt_config), ema=mergear.GPT(gpt_config).state_dict(),
                tokenizer=dict(config=dataclasses.asdict(config), ema=ema))),
            ("classifier", evaluation.load_classifier, dict(config=dict(size=8, num_classes=2), model=classifier.state_dict()))):
        path = os.path.join(folder, f"{kind}.pt")
        tokenizer.save_checkpoint(path, kind, **state)
        with open(path, "rb") as f:
            files[load] = f.read()
    return files


def listing(folder):
    """Every path below a folder."""
    return {os.path.join(where, name) for where, folders, names in os.walk(folder) for name in [*folders, *names]}


def fuzz(folder, num, seed):
    """About `num` mutated files through all loaders. Prints what became of them; returns how many there were."""
    dice, total = random.Random(seed), 0
    share = max(4, num // 10)
    counts = {"images": fuzz_images(make_folder(os.path.join(folder, "i"), {}), 4 * share, dice),
              "tar files": fuzz_tars(make_folder(os.path.join(folder, "t"), {}), 2 * share, dice),
              "npz files": fuzz_samples(make_folder(os.path.join(folder, "n"), {}), share, dice),
              "code caches": fuzz_code_caches(make_folder(os.path.join(folder, "c"), {}), share, dice)}
    for load, good in trained(make_folder(os.path.join(folder, "k"), {})).items():
        place = make_folder(os.path.join(folder, "k", load.__name__), {})
        counts[load.__name__] = fuzz_checkpoints(place, share, dice, good, load)
    for name, (files, refused) in counts.items():
        print(f"{name}: {files} files, {refused} refused or skipped")
        total += files
    assert not any(path.endswith("pwned") for path in listing(folder)), "code from a file was run"
    return total


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{fuzz(folder, args.num, args.seed)} files: no crash, no hang, nothing executed")


if __name__ == "__main__":
    main()
