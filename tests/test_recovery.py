"""Tests of recovery.py: one property each, on the CPU. The docstring of a test names the bug that it catches.

    python -m pytest -q tests/test_recovery.py
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import generate
import mergear
import recovery
from data import UserError
from mergear import load_generator
from recovery import load_recovery, teacher_forced
from test_mergear import metrics, same, train, write_images, write_tokenizer
from tokenizer import weights_hash

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images/, a tokenizer tok.pt, and a randar and a raster generator."""
    folder = tmp_path_factory.mktemp("recovery")
    write_images(folder / "images")
    write_tokenizer(folder / "tok.pt", str(folder / "images"))
    train(folder, "randar", "--mode", "randar", "--max-steps", "2")
    train(folder, "raster", "--mode", "raster", "--max-steps", "1")
    return folder


def flags(place, out, *more):
    return ["--generator", str(place / "randar/ckpt.pt"), "--device", "cpu", "--out", str(place / out), "--batch-size", "8",
            "--max-steps", "4", "--warmup", "2", "--log-every", "1", "--save-every", "100", *more]


def finetune(place, out, *more):
    recovery.main(flags(place, out, *more))
    return torch.load(place / out / "ckpt.pt", weights_only=True)


def test_only_recovery_is_trained(place):
    """Catches fine-tuning that moves the tokenizer or the generator, or stores more of them than their hashes."""
    gpt, tokenizer = load_generator(place / "randar/ckpt.pt")
    saved = finetune(place, "only", "--lr-schedule", "constant")
    assert set(saved["model"]) == set(tokenizer.recovery.state_dict()) and not same(saved["model"], tokenizer.recovery.state_dict())
    assert saved["tokenizer"] == weights_hash(tokenizer.state_dict()) and saved["generator"] == weights_hash(gpt.state_dict())
    assert len(saved["optimizer"]["state"]) == len(list(tokenizer.recovery.parameters()))
    before = weights_hash(tokenizer.state_dict())
    tuned = load_recovery(str(place / "only/ckpt.pt"), tokenizer)
    assert weights_hash(tokenizer.state_dict()) == before and same(saved["model"], tuned.state_dict())
    assert not any(p.requires_grad for p in tuned.parameters()) and load_recovery("none", tokenizer) is tokenizer.recovery


def test_accuracy_rises(place):
    """Catches targets of other images or of another numbering: on data seen often, recovery must learn its source; and the
    table must hold what the picture and the JSON hold."""
    finetune(place, "long", "--max-steps", "150", "--lr", "3e-3", "--drawn", "0", "--eval-num", "6")
    log = metrics(place, "long")
    assert log[-1]["accuracy"] > log[0]["accuracy"] + 0.3 and log[-1]["loss"] < log[0]["loss"]
    with open(place / "long/recovery.json") as f:
        results = json.load(f)["results"]
    assert results["true"]["accuracy"] == 1 and set(results) == {"true", "before", "after", "best constant", "even spread"}
    assert Image.open(place / "long/recovery.png").height >= 7 * 128


def test_measurements_equal_the_definition(place):
    """Catches a predicted source measured with another batch's codes: --batch-size must not matter."""
    rows = []
    for size in ("4", "8"):
        finetune(place, "measure", "--max-steps", "0", "--epochs", "1", "--batch-size", size, "--lr", "0", "--overwrite")
        with open(place / "measure/recovery.json") as f:
            rows.append(json.load(f)["results"])
    _, tokenizer = load_generator(place / "randar/ckpt.pt")
    dataset = recovery.build_dataset(str(place / "images"), "val", 8, train=False)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    e = tokenizer.encode(images)
    expected = recovery.source_accuracy(tokenizer.recover(e.codes), e.source)
    for row in rows:
        assert row["before"] == row["after"] and row["before"]["accuracy"] == pytest.approx(expected)
        assert row["true"]["psnr"] == pytest.approx(recovery.psnr(tokenizer.decode(e.codes, e.source), images).mean().item(), rel=1e-5)


def test_teacher_forced_codes_are_by_rank():
    """Catches codes left in the order of the sequence: a generator that is sure of the true codes must give them back; and
    one that knows nothing must draw all codes equally often."""
    class Sure(torch.nn.Module):
        config = mergear.GPTConfig(mode="randar", bits=11, length=16)

        def forward(self, codes, labels, keep, order):
            return [F.one_hot(sub, 2 ** n) * 1e3 * self.certainty
                    for sub, n in zip(mergear.split_codes(codes, self.config.sub_bits).unbind(-1), self.config.sub_bits)]

    gpt, g = Sure(), torch.Generator().manual_seed(0)
    codes, labels = torch.randint(2 ** 11, (200, 6), generator=g), torch.zeros(200, dtype=torch.long)
    order = mergear.draw_orders(gpt.config, 200, 6, g)
    gpt.certainty = 1
    assert torch.equal(teacher_forced(gpt, codes, labels, 6, order, g), codes)
    gpt.certainty = 0
    drawn = teacher_forced(gpt, codes, labels, 6, order, g)
    assert (drawn != codes).float().mean() > 0.99 and abs(drawn.float().mean() / 2 ** 10 - 1) < 0.1
    assert drawn.min() >= 0 and drawn.max() < 2 ** 11


def test_resumed_run_is_the_same_run(place):
    """Catches state that a checkpoint forgets: 4 steps must equal 2 + resume + 2 bit for bit."""
    straight = finetune(place, "straight", "--lr-schedule", "constant")
    finetune(place, "broken", "--lr-schedule", "constant", "--max-steps", "2")
    resumed = finetune(place, "broken", "--lr-schedule", "constant", "--resume")
    assert same(straight["model"], resumed["model"])


def test_two_processes_equal_one(place):
    """Catches ranks that see the same images or draw the same codes for theirs, and gradients averaged wrongly."""
    one = finetune(place, "one", "--lr-schedule", "constant", "--drawn", "0", "--max-steps", "2")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           os.path.join(ROOT, "recovery.py"), *flags(place, "two", "--lr-schedule", "constant", "--drawn", "0", "--max-steps", "2")],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(place / "two/ckpt.pt", weights_only=True)
    for name, p in one["model"].items():
        assert torch.allclose(p, two["model"][name], atol=2e-5), name


def test_generate_uses_the_fine_tuned_recovery(place, tmp_path, monkeypatch, capsys):
    """Catches a --recovery that is read and not used, one of another tokenizer taken silently, and a default that only
    works where it was trained."""
    finetune(place, "use", "--max-steps", "60", "--lr", "3e-3")
    monkeypatch.chdir(tmp_path)
    pictures = []
    for n, flag in enumerate(("none", "auto", str(place / "use/ckpt.pt"))):
        generate.main(["--ckpt", str(place / "randar/ckpt.pt"), "--num", "4", "--device", "cpu", "--recovery", flag, "--out", f"g{n}",
                       "--npz", f"g{n}.npz"])
        with open(f"g{n}.npz", "rb") as f:
            pictures.append(f.read())
    assert pictures[0] == pictures[1] != pictures[2] and "source recovery from" in capsys.readouterr().out
    os.makedirs("out/recovery")
    os.symlink(place / "use/ckpt.pt", "out/recovery/ckpt.pt")
    generate.main(["--ckpt", str(place / "randar/ckpt.pt"), "--num", "4", "--device", "cpu", "--out", "g3", "--npz", "g3.npz"])
    with open("g3.npz", "rb") as f:
        assert f.read() == pictures[2]
    write_tokenizer(place / "other.pt", str(place / "images"), seed=1)
    train(place, "other", "--mode", "randar", "--max-steps", "1", tokenizer="other.pt")
    generate.main(["--ckpt", str(place / "other/ckpt.pt"), "--num", "4", "--device", "cpu", "--out", "g4"])
    assert "another tokenizer: not used" in capsys.readouterr().out
    with pytest.raises(UserError, match="another tokenizer"):
        generate.main(["--ckpt", str(place / "other/ckpt.pt"), "--num", "4", "--recovery", str(place / "use/ckpt.pt")])


@pytest.mark.parametrize("more, message", [(("--generator", "none.pt"), "no checkpoint at none.pt"), (("--keep", "5"), "not one of the generator's"),
                                           (("--drawn", "1.5"), "at most 1"), (("--nope",), "unrecognized")])
def test_bad_flags(place, more, message):
    """Catches a bad flag that ends in a traceback, or that leaves a folder behind."""
    with pytest.raises(UserError, match=message):
        recovery.main(flags(place, "bad", *more))
    with pytest.raises(UserError, match="raster model, which needs no source recovery"):
        recovery.main(flags(place, "bad", "--generator", str(place / "raster/ckpt.pt")))
    assert not (place / "bad").exists()
