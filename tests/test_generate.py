"""Tests of generate.py: one property each, on the CPU. The docstring of a test names the bug that it catches.

    python -m pytest -q tests/test_generate.py
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import dataclasses

import generate
from data import UserError, run_main, to_uint8
from generate import choose_classes, sample_codes
from mergear import GPT, GPTConfig, load_generator
from tokenizer import MergeVQ, TokenizerConfig, save_checkpoint

torch.set_num_threads(1)


def write_generator(path, mode, num_classes=3):
    """A checkpoint as mergear.py writes it, with weights far from their initial values: 8 px, L = 16, d = 11."""
    torch.manual_seed(0)
    tokenizer_config = TokenizerConfig(size=8, base=8, mult=(1, 2), width=16, heads=2, depth=2, dec_width=16, dec_heads=2, dec_depth=1,
                                       keep=6, keeps=(4, 6, 16), bits=11, norm_groups=4, recovery_width=16, recovery_heads=2,
                                       align="none")
    names = ("cat", "dog", "7")[:num_classes]
    config = GPTConfig(mode=mode, width=32, heads=2, depth=2, bits=11, length=16, keep=6, keeps=(4, 6, 16), window=2,
                       num_classes=num_classes, class_names=names)
    tokenizer, gpt = MergeVQ(tokenizer_config), GPT(config)
    with torch.no_grad():
        for p in gpt.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p)
    save_checkpoint(path, "generator", step=0, config=dataclasses.asdict(config), ema=gpt.state_dict(), class_names=list(names),
                    tokenizer=dict(config=dataclasses.asdict(tokenizer_config), ema=tokenizer.state_dict()))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    for mode in ("raster", "mergear", "randar"):
        write_generator(folder / f"{mode}.pt", mode)
    write_generator(folder / "unlabelled.pt", "mergear", 0)
    return folder


def run(place, out, *flags, ckpt="mergear.pt"):
    """generate.py in this process -> the npz it wrote: images (N,H,W,3) uint8, labels (N,)."""
    generate.main(["--ckpt", str(place / ckpt), "--device", "cpu", "--out", str(place / out), "--npz", str(place / out / "all.npz"), *flags])
    with np.load(place / out / "all.npz") as file:
        return file["arr_0"], file["arr_1"]


@pytest.mark.parametrize("ckpt", ["raster.pt", "mergear.pt"])
def test_images_do_not_depend_on_the_batch_size(place, ckpt):
    """Catches noise seeded by batch (VAR #69): the same pixels at batch 1, 8 and 64, and another seed gives others."""
    images, labels = run(place, f"64-{ckpt}", "--batch-size", "64", "--num", "19", ckpt=ckpt)
    assert images.shape == (19, 8, 8, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert labels.tolist() == [n % 3 for n in range(19)] and len(np.unique(images, axis=0)) == 19
    for size in ("1", "8"):
        assert np.array_equal(images, run(place, f"{size}-{ckpt}", "--batch-size", size, "--num", "19", ckpt=ckpt)[0]), size
    assert np.array_equal(images[:5], run(place, f"5-{ckpt}", "--num", "5", ckpt=ckpt)[0])
    assert not np.array_equal(images[:5], run(place, f"seed-{ckpt}", "--num", "5", "--seed", "1", ckpt=ckpt)[0])


def test_two_processes_make_the_same_images(place):
    """Catches ranks that repeat each other's samples or write them in the wrong places."""
    images, labels = run(place, "one", "--num", "21", "--batch-size", "4")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                           os.path.join(ROOT, "generate.py"), "--ckpt", str(place / "mergear.pt"), "--device", "cpu", "--num", "21",
                           "--batch-size", "4", "--out", str(place / "two"), "--npz", str(place / "two/all.npz")],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(place / "two/all.npz") as file:
        assert np.array_equal(file["arr_0"], images) and np.array_equal(file["arr_1"], labels)
    assert sorted(os.listdir(place / "two")) == ["all.npz", "samples.png"]


def test_images_are_the_decoded_codes(place):
    """Catches codes that go through the wrong map on their way to pixels: every position has its own code."""
    images, labels = run(place, "decoded", "--num", "4", "--cfg", "1.5", "--seed", "3", "--top-k", "5", "--temperature", "0.9")
    gpt, tokenizer = load_generator(place / "mergear.pt")
    codes = sample_codes(gpt, torch.from_numpy(labels), cfg=1.5, seed=3, top_k=5, temperature=0.9)
    expected = to_uint8(tokenizer.decode(codes, torch.arange(16).expand(4, -1)))
    assert np.abs(images.astype(int) - expected).max() <= 1
    with Image.open(place / "decoded/samples.png") as picture:
        assert picture.width > 3 * 8 and picture.height > 2 * 8


def test_every_flag_changes_the_images(place):
    """Catches a flag that is parsed and never used."""
    base = run(place, "base", "--num", "6")[0]
    for n, flags in enumerate((("--cfg", "1"), ("--temperature", "0.5"), ("--top-k", "2"), ("--top-p", "0.3"), ("--keep", "4"),
                               ("--classes", "dog"), ("--seed", "9"), ("--dtype", "bfloat16"))):
        assert not np.array_equal(base, run(place, f"flag{n}", "--num", "6", *flags)[0]), flags


def test_keep_chooses_how_many_codes_randar_draws(place):
    """Catches a --keep that is refused, or not passed on."""
    base, four, same = (run(place, f"randar{n}", "--num", "4", *flags, ckpt="randar.pt")[0]
                        for n, flags in enumerate(((), ("--keep", "4", "--steps", "4"), ("--keep", "6"))))
    assert np.array_equal(base, same) and not np.array_equal(base, four)


def test_class_choice():
    """Catches names read as ids: a class that is called 7 is meant by 7, other numbers are ids."""
    config = GPTConfig(num_classes=3, class_names=("cat", "dog", "7"))
    assert choose_classes("", config) == [0, 1, 2]
    assert choose_classes("dog, 0,7", config) == [1, 0, 2]
    assert choose_classes("", GPTConfig(num_classes=0)) == [0]


def test_unlabelled_model(place):
    """Catches guidance or class names where there are no classes; --cfg then costs nothing and changes nothing."""
    images, labels = run(place, "unlabelled", "--num", "3", ckpt="unlabelled.pt")
    assert labels.tolist() == [0, 0, 0] and len(np.unique(images, axis=0)) == 3
    assert np.array_equal(images, run(place, "unguided", "--num", "3", "--cfg", "1", ckpt="unlabelled.pt")[0])


@pytest.mark.parametrize("ckpt, flags, message", [
    ("mergear.pt", "--cfg -1", "--cfg -1.0 must be at least 0"),
    ("mergear.pt", "--cfg nan", "--cfg nan"),
    ("mergear.pt", "--top-p 0", "above 0 and at most 1"),
    ("mergear.pt", "--top-p 1.1", "above 0 and at most 1"),
    ("mergear.pt", "--top-k -3", "--top-k -3 must be"),
    ("mergear.pt", "--temperature -0.1", "must be 0, or"),
    ("mergear.pt", "--num 0", "--num 0"),
    ("mergear.pt", "--batch-size 0", "--batch-size 0"),
    ("mergear.pt", "--classes cat,fox", "no class 'fox'; pass names .cat, dog, 7"),
    ("mergear.pt", "--classes 3", "ids 0 to 2"),
    ("mergear.pt", "--keep 5", "not one of the merge counts .*4, 6, 16"),
    ("raster.pt", "--keep 6", "raster model has no merge instruction"),
    ("unlabelled.pt", "--classes 0", "trained without labels"),
    ("nothing.pt", "", "no checkpoint at"),
    ("mergear.pt", "--wat 1", "unrecognized arguments"),
    ("mergear.pt", "--device warp", "--device warp is not usable"),
])
def test_bad_flags(place, capsys, ckpt, flags, message):
    """Catches a mistake that ends in a traceback, in more than one line, or after a folder was made."""
    argv = ["--ckpt", str(place / ckpt), "--out", str(place / "bad"), *flags.split()]
    with pytest.raises(UserError, match=message):
        generate.main(argv)
    assert not (place / "bad").exists()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: generate.main(argv))
    assert stop.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
