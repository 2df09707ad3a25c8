"""Tests of generate.py: one property each. The docstring of a test names the bug it catches.

    python -m pytest -q tests/test_generate.py
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import generate
from data import UserError, save_checkpoint, to_uint8
from generate import choose_classes, read_sweep
from mergear import GPT, GPTConfig, load_generator, sample_codes
from tokenizer import MergeVQ, TokenizerConfig

torch.set_num_threads(1)
SMALL = dict(size=8, base=8, mult=(1, 2), width=16, heads=2, depth=2, dec_width=16, dec_heads=2,
             dec_depth=1, keep=6, keeps=(4, 6, 16), bits=11, recovery_width=16, align="none")


def write_generator(path, mode, classes=("cat", "dog", "7")):
    """A checkpoint as mergear.py writes it, with weights far from their initial values."""
    torch.manual_seed(0)
    t = TokenizerConfig(**SMALL)
    g = GPTConfig(mode=mode, width=32, heads=2, depth=2, bits=11, length=16, keep=6,
                  keeps=(4, 6, 16), window=2, num_classes=len(classes), class_names=classes)
    tokenizer, gpt = MergeVQ(t), GPT(g)
    with torch.no_grad():
        for p in gpt.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p)
    made = dict(config=dataclasses.asdict(t), ema=tokenizer.state_dict())
    save_checkpoint(path, "generator", step=0, config=dataclasses.asdict(g),
                    ema=gpt.state_dict(), class_names=list(classes), tokenizer=made)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    for mode in ("raster", "mergear", "randar"):
        write_generator(folder / f"{mode}.pt", mode)
    write_generator(folder / "unlabelled.pt", "mergear", ())
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


@pytest.mark.parametrize("ckpt", ["raster", "mergear", "randar"])
def test_image_i_depends_on_seed_and_i(place, ckpt):
    """Noise seeded by batch (VAR #69): a shorter run must give the first images of a longer."""
    more = ("--batch-size", "4", "--classes", "dog", "--num")
    images, _ = run(place, f"long-{ckpt}", *more, "11", ckpt=ckpt)
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 11
    short, _ = run(place, f"short-{ckpt}", *more, "5", ckpt=ckpt)
    assert np.array_equal(images[:5], short)


def test_two_processes_make_the_same_images(place):
    """Ranks that repeat each other's samples or write them in the wrong places."""
    more = ("--num", "21", "--batch-size", "4", "--png-dir")
    images, labels = run(place, "one", *more, str(place / "png1"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    argv = flags(place, "two", *more, str(place / "png2"))
    done = subprocess.run([sys.executable, *launch, f"{ROOT}/generate.py", *argv],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(place / "two/all.npz") as file:
        assert np.array_equal(file["arr_0"], images) and np.array_equal(file["arr_1"], labels)
    assert sorted(os.listdir(place / "two")) == ["all.npz", "samples.png"]
    names = sorted(os.listdir(place / "png1"))
    assert names == sorted(os.listdir(place / "png2")) == [f"{n:06d}.png" for n in range(21)]
    for folder in ("png1", "png2"):
        pictures = np.stack([np.array(Image.open(place / folder / name)) for name in names])
        assert np.array_equal(pictures, images)


@pytest.mark.parametrize("ckpt", ["mergear", "randar"])
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
    """Names read as ids: a class called 7 is meant by 7, other numbers are ids."""
    config = GPTConfig(num_classes=3, class_names=("cat", "dog", "7"))
    assert choose_classes("dog, 0,7", config) == [1, 0, 2]
    assert choose_classes("", config) == [0, 1, 2]
    with pytest.raises(UserError, match="no class 'bird'"):
        choose_classes("bird", config)


def test_a_model_without_labels(place):
    """Guidance of a model that has no classes, or a name that it does not have."""
    images, labels = run(place, "free", "--cfg", "3", ckpt="unlabelled")
    assert not labels.any()
    assert np.array_equal(images, run(place, "free1", "--cfg", "1", ckpt="unlabelled")[0])
    with pytest.raises(UserError, match="no class"):
        generate.main(flags(place, "free2", "--classes", "0", ckpt="unlabelled"))
    with pytest.raises(UserError, match="--cfg-sweep"):
        generate.main(flags(place, "free3", "--cfg-sweep", "1:2:1", ckpt="unlabelled"))


def test_sweep(place):
    """Scales that are lost to rounding; a sweep that forgets a line."""
    assert read_sweep("1.0:4.0:0.5") == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    assert len(read_sweep("0:1:0.1")) == 11
    generate.main(flags(place, "sweep", "--cfg-sweep", "1:3:1", "--num", "2"))
    with Image.open(place / "sweep/sweep.png") as picture:
        assert picture.height > 3 * 96 and picture.width > 2 * 96


@pytest.mark.parametrize("ckpt, wrong, message", [
    ("mergear", "--keep 5", "not trained on it"), ("raster", "--keep 6", "leave --keep out"),
    ("mergear", "--steps 3", "only randar"), ("randar", "--steps 7", "2 to K = 6"),
    ("mergear", "--cfg-sweep 2:1:1", "FIRST:LAST:STEP"), ("mergear", "--classes bird", "no class"),
    ("mergear", "--cfg-sweep 1:nan:1", "FIRST:LAST:STEP"), ("mergear", "--out /dev/null", "--out")])
def test_mistakes(place, ckpt, wrong, message):
    """A traceback, or minutes of work before it."""
    with pytest.raises(UserError, match=message):
        generate.main(flags(place, "wrong", *wrong.split(), ckpt=ckpt))
