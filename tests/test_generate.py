"""Tests of generate.py: one property each. A docstring names the bug that its test catches."""

import os

import numpy as np
import pytest
import torch
from conftest import save_generator, save_tokenizer, two_ranks
from kills import ROOT
from PIL import Image

import generate
from data import UserError, to_uint8
from generate import choose_classes, read_sweep
from mergear import MODES, GPTConfig, load_generator, sample_codes

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A generator of each mode, and one without classes."""
    folder = tmp_path_factory.mktemp("generate")
    save_tokenizer(folder / "tok.pt", bits=11, align="none")
    settings = dict(bits=11, keep=6, keeps=(4, 6, 16))
    for mode in MODES:
        save_generator(folder / f"{mode}.pt", folder / "tok.pt", mode=mode, **settings,
                       class_names=("cat", "dog", "7"))
    save_generator(folder / "unlabelled.pt", folder / "tok.pt", num_classes=0, **settings)
    return folder

def flags(place, out, *more, ckpt="mergear"):
    out = str(place / out)
    return ["--ckpt", str(place / f"{ckpt}.pt"), "--device", "cpu", "--num", "7", "--out", out,
            "--npz", f"{out}/all.npz", *more]

def run(place, out, *more, ckpt="mergear"):
    """generate.py in this process -> images (N,H,W,3) uint8 and labels (N,) of its npz."""
    generate.main(flags(place, out, *more, ckpt=ckpt))
    with np.load(place / out / "all.npz") as file:
        return file["arr_0"], file["arr_1"]

def test_two_processes_make_the_same_images(place):
    """Noise seeded by batch (VAR #69). Ranks that repeat each other's samples or write them in
    the wrong places."""
    more = ("--num", "21", "--batch-size", "4", "--png-dir")
    images, labels = run(place, "one", *more, str(place / "png1"))
    assert images.shape == (21, 8, 8, 3) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 21
    argv = flags(place, "two", *more, str(place / "png2"))
    two_ranks(f"{ROOT}/generate.py", argv)
    with np.load(place / "two/all.npz") as file:
        assert np.array_equal(file["arr_0"], images) and np.array_equal(file["arr_1"], labels)
    assert sorted(os.listdir(place / "two")) == ["all.npz", "samples.png"]
    names = sorted(os.listdir(place / "png1"))
    assert names == sorted(os.listdir(place / "png2")) == [f"{n:06d}.png" for n in range(21)]
    for folder in ("png1", "png2"):
        pictures = np.stack([np.array(Image.open(place / folder / name)) for name in names])
        assert np.array_equal(pictures, images)

@pytest.mark.parametrize("ckpt", MODES)
def test_images_are_the_decoded_codes(place, ckpt):
    """Codes that go through the wrong source on their way to pixels; an npz without its models."""
    images, labels = run(place, f"decoded-{ckpt}", "--cfg", "1.5", "--seed", "3", ckpt=ckpt)
    assert labels.tolist() == [n % 3 for n in range(7)] and labels.dtype == np.int64
    gpt, tokenizer = load_generator(place / f"{ckpt}.pt")
    padded = torch.zeros(32, dtype=torch.long)
    padded[:7] = torch.from_numpy(labels)
    codes, first = sample_codes(gpt, padded, cfg=1.5, seed=3)
    decoded = tokenizer.decode(codes, tokenizer.recover(codes, first))[:7]
    assert np.array_equal(images, to_uint8(decoded))
    with np.load(place / f"decoded-{ckpt}/all.npz") as file:
        assert {"tokenizer", "generator"} < set(file.files)

@pytest.mark.parametrize("flag", ["--cfg 1", "--temperature 0.5", "--top-k 2", "--top-p 0.3",
                                  "--keep 4", "--classes dog", "--seed 9", "--dtype bfloat16",
                                  "--cfg-schedule linear", "--steps 2",
                                  "--position-temperature 2"])
def test_every_flag_changes_the_images(place, flag):
    """A flag that is parsed and never used."""
    base, _ = run(place, "base", ckpt="randar")
    assert not np.array_equal(base, run(place, "flag", *flag.split(), ckpt="randar")[0])

def test_class_choice():
    """Names read as ids: a class called 1 is meant by 1, other numbers are ids."""
    config = GPTConfig(num_classes=3, class_names=("cat", "dog", "1"))
    assert choose_classes("dog, 0,1", config) == [1, 0, 2]
    assert choose_classes("", config) == [0, 1, 2]

def test_a_model_without_labels(place):
    """A label of a model that has no classes, or a name that it does not have."""
    _, labels = run(place, "free", "--cfg", "3", ckpt="unlabelled")
    assert not labels.any()
    with pytest.raises(UserError, match="no class"):
        generate.main(flags(place, "free2", "--classes", "0", ckpt="unlabelled"))
    with pytest.raises(UserError, match="--cfg-sweep"):
        generate.main(flags(place, "free3", "--cfg-sweep", "1:2:1", ckpt="unlabelled"))
    with pytest.raises(UserError, match="leave --keep out"):
        generate.main(flags(place, "free4", "--keep", "6", ckpt="raster"))

def test_sweep(place):
    """Scales that are lost to rounding; a sweep that forgets a line."""
    assert read_sweep("1.0:4.0:0.5") == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert len(read_sweep("0:1:0.1")) == 11
    generate.main(flags(place, "sweep", "--cfg-sweep", "1:3:1", "--num", "2"))
    with Image.open(place / "sweep/sweep.png") as picture:
        assert picture.height > 3 * 96 and picture.width > 2 * 96
