"""Tests of eval.py and recovery.py: one property each, on the CPU. The docstring of a test names the bug it catches.

    python -m pytest -q tests/test_eval.py
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import eval as evaluation  # the name of the script is also that of a builtin
import recovery
from data import UserError, run_main
from eval import (Classifier, FinetuneConfig, FineTuned, Moments, bit_balance, eight_bit, erase, frechet_distance, from_uint8,
                  inception_score, labelled, layer_groups, linear_probe, load_classifier, mix, multiply_adds, precision_recall,
                  psnr, read_samples, ssim)
from mergear import GPT, GPTConfig
from recovery import merge_map, source_accuracy
from tokenizer import (Encoded, MergeVQ, Run, TokenizerConfig, bit_statistics, load_tokenizer, merge_schedule, plot_rows,
                       save_checkpoint, subset, val_loader, weights_hash)

torch.set_num_threads(1)
ONE = Run(0, 1, torch.device("cpu"), torch.float32)


def random_images(num, size=16, seed=0):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_covariance(D, rank, seed):
    A = np.random.default_rng(seed).standard_normal((D, rank))
    return A @ A.T


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance

def test_frechet_of_known_gaussians():
    """A missing factor 2, a root left out, the mean term not squared: compared with answers worked out by hand."""
    assert frechet_distance([1.0], [[4.0]], [4.0], [[9.0]]) == pytest.approx(9 + (3 - 2) ** 2)
    mu, s1, s2 = np.zeros(3), np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    assert frechet_distance(mu, np.diag(s1), mu + 2, np.diag(s2)) == pytest.approx(12 + ((s1 ** 0.5 - s2 ** 0.5) ** 2).sum())
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))  # commuting: the same axes, turned
    assert frechet_distance(mu, Q @ np.diag(s1) @ Q.T, mu, Q @ np.diag(s2) @ Q.T) == pytest.approx(1 + 0 + 4)


def test_frechet_of_two_by_two():
    """The root of the product taken element by element: in two dimensions tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M))."""
    a, b = random_covariance(2, 2, 1), random_covariance(2, 2, 2)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    found = frechet_distance(np.zeros(2), a, np.zeros(2), b)
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)
    assert found == pytest.approx(frechet_distance(np.zeros(2), b, np.zeros(2), a), rel=1e-10)


def test_frechet_of_singular_covariances():
    """Fewer images than dimensions: a root of rounding errors below 0 is NaN, and adding eps I changes the answer."""
    mu, a = np.zeros(40), random_covariance(40, 5, 1)
    b = np.zeros((40, 40))
    b[:3, :3] = np.eye(3)
    assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-6 * np.trace(a))
    assert frechet_distance(mu, a, mu, 0 * a) == pytest.approx(np.trace(a))
    assert frechet_distance(mu, 0 * a, mu, 0 * a) == 0
    root = np.sqrt(np.clip(np.linalg.eigvalsh(a[:3, :3]), 0, None)).sum()  # b projects on the first three axes
    for pair in ((a, b), (b, a)):
        assert frechet_distance(mu, pair[0], mu, pair[1]) == pytest.approx(np.trace(a) + 3 - 2 * root, rel=1e-6)


def test_frechet_of_identical_gaussians_is_zero():
    """A distance that is not one."""
    mu, a = np.arange(30.0), random_covariance(30, 100, 0)
    assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-9 * np.trace(a))
    assert isinstance(frechet_distance(torch.from_numpy(mu), torch.from_numpy(a), mu + 1, a), float)


def test_frechet_of_other_features_is_refused():
    """2048 features of a file against 128 of a classifier: a broadcast that gives a number, or a traceback."""
    with pytest.raises(UserError, match="same network"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(1), np.eye(1))


def test_moments_are_those_of_all_rows():
    """Means over batches, sums in float32 (features far from 0 lose their covariance), N in place of N - 1."""
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.rand(6, 6).double() + 1000
    for sizes in ([50], [1, 20, 29], [7] * 7 + [1]):
        moments = Moments()
        for part in rows.split(sizes):
            moments.add(part)
        mu, sigma = moments.statistics(ONE)
        np.testing.assert_allclose(mu, rows.numpy().mean(0), rtol=1e-13)
        np.testing.assert_allclose(sigma, np.cov(rows.numpy(), rowvar=False), rtol=1e-6, atol=1e-8)
    moments = Moments()
    moments.add(rows[:1])
    with pytest.raises(UserError, match="--num"):
        moments.statistics(ONE)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall

def slow_precision(real, fake, k):
    """Share of fakes that lie within the k-th neighbour distance of some real point."""
    distance = lambda a, b: math.dist(a.tolist(), b.tolist())
    radius = [sorted(distance(a, b) for j, b in enumerate(real) if j != i)[k - 1] for i, a in enumerate(real)]
    return sum(any(distance(f, r) <= radius[i] for i, r in enumerate(real)) for f in fake) / len(fake)


def test_precision_and_recall_against_the_definition():
    """An image counted among its own neighbours, the two swapped, the ball around the wrong set, a chunk that is lost."""
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(40, 5, generator=g), torch.randn(30, 5, generator=g) * 0.8 + 0.5
    for k in (1, 3):
        expected = slow_precision(real, fake, k), slow_precision(fake, real, k)
        assert expected[0] != expected[1] and 0 < min(expected) and max(expected) < 1
        for chunk in (1000, 7):
            assert precision_recall(real, fake, k, chunk) == pytest.approx(expected)


def test_precision_and_recall_of_known_cases():
    """Samples that are the data, noise far away, and a generator that draws one mode only."""
    real = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    precision, recall = precision_recall(torch.cat([real, real + 100]), real + 0.01)
    assert precision == 1 and recall == pytest.approx(0.5, abs=0.05)
    with pytest.raises(UserError, match="neighbours"):
        precision_recall(real, real[:3])


# ---------------------------------------------------------------------------------------------------------------------
# Inception Score

def test_inception_score_known_values():
    """exp of the entropy in bits, or a mean outside the exponential: the extremes are 1 and the number of classes."""
    one_hot = np.eye(7).repeat(20, 0)
    assert inception_score(one_hot, splits=1, seed=0) == pytest.approx((7, 0))
    assert inception_score(np.full((50, 7), 1 / 7), splits=5, seed=0) == pytest.approx((1, 0))
    half = np.array([[0.75, 0.25], [0.25, 0.75]])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert inception_score(half, splits=1, seed=0)[0] == pytest.approx(math.exp(divergence))


def test_inception_score_ignores_the_order_of_files():
    """guided-diffusion #165: 62 or 298 for the same images, as the parts held a few classes each when sorted by class."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(100)
    logits = torch.randn(1000, 10, generator=g) + 6 * torch.eye(10)[labels]
    probs = logits.softmax(1)
    by_class = inception_score(probs, 10, 3)
    assert by_class == inception_score(probs[torch.randperm(1000, generator=g)], 10, 3)
    whole, _ = inception_score(probs, 1, 3)
    assert by_class[0] == pytest.approx(whole, rel=0.05)
    assert by_class != inception_score(probs, 10, 4)
    noise = 1e-12 * torch.rand(1000, 10, generator=g)  # of another batch size
    assert inception_score(probs + noise, 10, 3) == pytest.approx(by_class, rel=1e-6), "rounding decides who is in which part"
    one_hot = torch.eye(10)[labels]  # rows that tie
    assert inception_score(one_hot, 10, 0)[0] > 9


def test_metrics_refuse_what_is_not_finite():
    """A NaN that becomes a 0 or is dropped: the number looks good and means nothing."""
    bad = np.eye(3)
    bad[1, 1] = math.nan
    with pytest.raises(UserError, match="not finite"):
        inception_score(bad, 1, 0)
    for i in range(4):
        arguments = [np.zeros(3), np.eye(3), np.zeros(3), np.eye(3)]
        arguments[i] = arguments[i] + math.inf
        with pytest.raises(UserError, match="not finite"):
            frechet_distance(*arguments)
    with pytest.raises(UserError, match="softmax"):
        inception_score(np.full((4, 3), 2.0), 1, 0)
    with pytest.raises(UserError, match="splits"):
        inception_score(np.eye(3), 4, 0)


# ---------------------------------------------------------------------------------------------------------------------
# PSNR and SSIM

def test_psnr_known_value():
    """The peak of images in [-1,1] is 2: with 1 every value is 6 dB too low. And each image has its own value."""
    a = torch.zeros(2, 3, 16, 16)
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(psnr(a, b), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert psnr(a, a).isinf().all()


def slow_ssim_at(a, b, y, x):
    """SSIM of two (H,W) images in the one 11 x 11 window with its corner at (y, x), as the formula is printed."""
    weight = {(i, j): math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5 ** 2)) for i in range(11) for j in range(11)}
    total = sum(weight.values())
    mean = lambda f: sum(w / total * f(y + i, x + j) for (i, j), w in weight.items())
    a, b = a.tolist(), b.tolist()
    ma, mb = mean(lambda i, j: a[i][j]), mean(lambda i, j: b[i][j])
    va, vb = mean(lambda i, j: (a[i][j] - ma) ** 2), mean(lambda i, j: (b[i][j] - mb) ** 2)
    cov = mean(lambda i, j: (a[i][j] - ma) * (b[i][j] - mb))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))


def test_ssim_against_a_double_loop():
    """A window of another size or sigma, a data range of 1, the border counted in, a sample covariance."""
    a, b = random_images(1, 12, seed=1).double(), random_images(1, 12, seed=2).double()
    b = 0.5 * a + 0.5 * b
    assert ssim(a[..., :11, :11], b[..., :11, :11]).item() == pytest.approx(
        sum(slow_ssim_at(a[0, c], b[0, c], 0, 0) for c in range(3)) / 3, rel=1e-9)
    windows = [slow_ssim_at(a[0, c], b[0, c], y, x) for c in range(3) for y in range(2) for x in range(2)]
    assert ssim(a, b).item() == pytest.approx(sum(windows) / len(windows), rel=1e-9)


def test_ssim_properties():
    """Anything but 1 for equal images, or a result that depends on which image comes first or on the batch."""
    a, b = random_images(4, 20, seed=1), random_images(4, 20, seed=2)
    torch.testing.assert_close(ssim(a, a), torch.ones(4, dtype=torch.float64))
    flat = torch.full_like(a, 0.5)
    torch.testing.assert_close(ssim(flat, flat), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(ssim(a, b), ssim(b, a), rtol=1e-12, atol=0)
    assert (ssim(a, b) < 0.2).all() and (ssim(a, 0.9 * a) > 0.9).all()
    for metric in (ssim, psnr):
        alone = torch.cat([metric(a[i:i + 1], b[i:i + 1]) for i in range(4)])
        torch.testing.assert_close(alone, metric(a, b), rtol=1e-12, atol=0)
        assert metric(a, b).dtype == torch.float64
    with pytest.raises(UserError, match="11 px"):
        ssim(a[..., :10, :10], b[..., :10, :10])


def test_bit_balance_from_a_histogram():
    """Bits counted in the histogram in another order than in the codes."""
    codes = torch.randint(0, 200, (5, 30), generator=torch.Generator().manual_seed(0))  # bit 8 of 9 is never set
    counts = torch.bincount(codes.flatten(), minlength=512)
    assert bit_balance(counts, 9) == pytest.approx(bit_statistics(codes, 9))
    assert bit_balance(counts, 9)[1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Source maps

def test_source_accuracy():
    """A share of images and not of positions, or an integer division."""
    source = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 2]])
    assert source_accuracy(source, source) == 1.0
    assert source_accuracy(source + 1, source) == 0.0
    assert source_accuracy(torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]), source) == 0.5
    with pytest.raises(AssertionError):
        source_accuracy(source[:1], source)


def test_merge_map():
    """Regions transposed or shifted, a mean over the wrong pixels, borders inside a region."""
    image = torch.full((1, 3, 4, 4), -1.0)
    image[:, 0, :2] = torch.tensor([0.0, 0.5, 0.2, 0.3])     # the upper half: red 0 to 0.5, mean 0.25
    picture = merge_map(image, torch.tensor([[0, 0, 1, 2]]), scale=8)
    assert picture.shape == (1, 3, 32, 32)
    color = lambda y, x: [round(v, 4) for v in picture[0, :, y, x].tolist()]
    assert color(1, 1) == color(15, 30) == [0.25, -1, -1]
    assert color(8, 15) == color(8, 16) == [0.25, -1, -1], "a border inside the region"
    assert color(30, 1) == color(30, 30) == [-1, -1, -1]
    assert color(16, 1) != [-1, -1, -1] and color(30, 16) != [-1, -1, -1], "no border between regions"


def test_weights_hash():
    """A hash that misses a changed value, name or dtype lets codes of another tokenizer pass as this one's."""
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1)}
    base = weights_hash(state)
    assert base == weights_hash({"b": state["b"].clone(), "a": state["a"].t().contiguous().t()}), "order and strides do not count"
    for other in ({**state, "a": state["a"] + 1e-6}, {**state, "a": state["a"].view(3, 2)}, {**state, "b": torch.tensor(1.0)},
                  {"a": state["a"], "c": state["b"]}, {**state, "a": state["a"].bfloat16()}):
        assert weights_hash(other) != base


# ---------------------------------------------------------------------------------------------------------------------
# Commands, end to end on a random tokenizer

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    config = TokenizerConfig(size=16, base=8, norm_groups=4, mult=(1, 2), width=16, dec_width=16, depth=3, heads=2, dec_depth=1,
                             dec_heads=2, keep=25, keeps=(16, 25, 36), bits=6, recovery_width=16, recovery_heads=2, align_dim=8,
                             data="shapes", patch=0, res_blocks=1, seed=0)
    path = tmp_path_factory.mktemp("tokenizer") / "ckpt.pt"
    save_checkpoint(path, "tokenizer", config=vars(config), ema=MergeVQ(config).state_dict())
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 training and 18 val images of 16 px, noise around the colour of their class."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, num in (("train", 12), ("val", 6)):
        for c, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(num):
                pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[..., c] += 90
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return str(root)


def split_of(folder, split):
    dataset = evaluation.build_dataset(folder, split, 16, train=False)
    images, labels = zip(*dataset)
    return torch.stack(images), np.array(labels)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Checkpoint of an untrained classifier for 16 px and ten classes."""
    torch.manual_seed(1)
    path = str(tmp_path_factory.mktemp("judge") / "ckpt.pt")
    save_checkpoint(path, "classifier", model=Classifier(16, 10).state_dict(), class_names=list("abcdefghij"), val_accuracy=0.1,
                    val_num=1000, config=dict(size=16, num_classes=10, data="shapes"))
    return path


def read_json(*path):
    with open(os.path.join(*path)) as f:
        return json.load(f)


def test_recon_writes_what_it_says(checkpoint, judge, tmp_path, capsys):
    """A table that differs from the file, a record that lacks what one needs to compare, a batch that is dropped."""
    results = []
    for batch_size in (20, 7):
        out = str(tmp_path / str(batch_size))
        evaluation.main(["recon", "--ckpt", checkpoint, "--num", "20", "--keep", "16,64", "--batch-size", str(batch_size),
                         "--device", "cpu", "--classifier", judge, "--out", out])
        record = read_json(out, "recon.json")
        results.append(record["results"])
        assert Image.open(os.path.join(out, "recon.png")).width > 100
        text = capsys.readouterr().out
        for row in record["results"]:
            assert f"{row['psnr']:.2f}" in text and f"{row['perplexity']:.1f}" in text and f"{row['rfd-20']:.4f}" in text
    assert record["num"] == 20 and record["size"] == 16 and record["data"] == "shapes" and record["dtype"] == "float32"
    assert record["seed"] == 0 and record["weights"] == "ema" and "--keep 16,64" in record["command"]
    assert record["tokenizer"] == weights_hash(torch.load(checkpoint)["ema"]) and record["reference"] == "the same val crops"
    assert record["features"] == "classifier" and record["features_hash"] == weights_hash(torch.load(judge)["model"])
    assert [row["keep"] for row in results[0]] == [16, 64]
    for a, b in zip(*results):
        assert a == pytest.approx(b, rel=1e-4), "the numbers depend on the batch size"
        assert a["codes_seen"] == 20 * a["keep"] and 0 < a["usage"] <= 1 and 0 <= a["recovery_accuracy"] <= 1


def test_recon_equals_the_definition(checkpoint, tmp_path):
    """Usage of the last batch only, metrics of other images than the centre crops, an unweighted mean over batches."""
    evaluation.main(["recon", "--ckpt", checkpoint, "--num", "10", "--keep", "25", "--batch-size", "4", "--device", "cpu",
                     "--features", "none", "--out", str(tmp_path)])
    row, = read_json(tmp_path, "recon.json")["results"]
    model = load_tokenizer(checkpoint)
    dataset = evaluation.build_dataset("shapes", "val", 16, train=False, seed=0)
    images = torch.stack([dataset[i][0] for i in subset(len(dataset), 10)])
    with torch.no_grad():
        encoded = model.encode(images)
        decoded = model.decode(encoded.codes, encoded.source)
    assert row["psnr"] == pytest.approx(psnr(decoded, images).mean().item(), rel=1e-4)
    assert row["ssim"] == pytest.approx(ssim(decoded, images).mean().item(), rel=1e-4)
    assert row["usage"] == pytest.approx(len(encoded.codes.unique()) / 64)
    assert row["recovery_accuracy"] == pytest.approx(source_accuracy(model.recover(encoded.codes), encoded.source))
    assert (row["bit_imbalance"], row["dead_bits"]) == pytest.approx(bit_statistics(encoded.codes, 6))


class Identity(torch.nn.Module):
    """A tokenizer that gives every image back."""
    def __init__(self, config):
        super().__init__()
        self.config = config

    def encode(self, images, keep):
        self.images = images
        codes = torch.zeros(len(images), keep, dtype=torch.long)
        return Encoded(codes, torch.arange(64).expand(len(images), 64), None, None)

    def recover(self, codes):
        return torch.arange(64).expand(len(codes), 64)

    def decode(self, codes, source):
        return self.images


def test_a_perfect_tokenizer_measures_perfect(judge, folder, tmp_path, monkeypatch, capsys):
    """A reference of other crops, of raw files or not rounded alike (D-AR #3), an infinite PSNR that is refused or hidden."""
    config = TokenizerConfig(size=16, mult=(1, 2), width=32, dec_width=32, base=16, data=folder)
    monkeypatch.setattr(recovery, "load_tokenizer", lambda path: Identity(config))
    evaluation.main(["recon", "--keep", "64", "--classifier", judge, "--device", "cpu", "--out", str(tmp_path)])
    row, = read_json(tmp_path, "recon.json")["results"]
    assert row["psnr"] == "inf" and row["ssim"] == pytest.approx(1) and row["recovery_accuracy"] == 1
    features, _ = load_classifier(judge)[0](split_of(folder, "val")[0])
    assert row["rfd-18"] == pytest.approx(0, abs=1e-9 * features.var(0).sum().item())
    assert " inf " in capsys.readouterr().out


def test_a_shifted_reconstruction_has_the_distance_of_its_means(judge, folder, tmp_path, monkeypatch):
    """A distance between the wrong two sets: brighter images move the features, and the distance is that of numpy's moments."""
    config = TokenizerConfig(size=16, mult=(1, 2), width=32, dec_width=32, base=16, data=folder)

    class Brighter(Identity):
        def decode(self, codes, source):
            return (self.images + 16 / 127.5).clamp(-1, 1)

    monkeypatch.setattr(recovery, "load_tokenizer", lambda path: Brighter(config))
    evaluation.main(["recon", "--keep", "64", "--classifier", judge, "--batch-size", "5", "--device", "cpu",
                     "--out", str(tmp_path)])
    row, = read_json(tmp_path, "recon.json")["results"]
    images = split_of(folder, "val")[0]
    network = load_classifier(judge)[0]
    a, b = (network(x)[0].double().numpy() for x in (images, eight_bit((images + 16 / 127.5).clamp(-1, 1))))
    expected = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert expected > 1e-4 and row["rfd-18"] == pytest.approx(expected, rel=1e-4)


def test_some_images_are_of_all_classes(folder):
    """The first ones of a folder, which are all of one class: a probe measured on it alone, an rFID-10k of 200 classes."""
    dataset = evaluation.build_dataset(folder, "val", 16, train=False)
    args = argparse.Namespace(batch_size=4, workers=0)
    for loader in (recovery.val_batches(dataset, 9, args, ""), val_loader(dataset, args, ONE, 9)):
        labels = torch.cat([labels for _, labels in loader])
        assert len(labels) == 9 and set(labels.tolist()) == {0, 1, 2}
    for total, num in ((18, 9), (10**6, 1000)):
        rows = subset(total, num)
        assert rows == sorted(set(rows)) == subset(total, num) and len(rows) == num and rows[-1] > 0.8 * total
    parts = [subset(18, 9)[rank::2] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == subset(18, 9) and subset(18, 0) == subset(18, 99) == list(range(18))


def test_a_plot_leaves_infinite_values_out(tmp_path):
    """A sweep that ends in a traceback because a tokenizer without loss has the PSNR "inf"."""
    rows = [dict(keep=keep, psnr=psnr) for keep, psnr in ((1, 20.0), (2, 21.5), (4, "inf"))]
    plot_rows(rows, tmp_path / "rows.png", ["psnr"], x="keep")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "rows.png")))) > 10


def test_names_say_how_many_images():
    """An "FID" of 1,000 images that someone compares with one of 50,000."""
    assert [labelled("FID", n) for n in (50_000, 10_000, 5_000, 49_999)] == ["FID", "FID-10k", "FID-5000", "FID-49999"]


def test_a_damaged_judge_is_an_error(checkpoint, judge, tmp_path):
    """NaN features that end as a distance of 0 or nan."""
    state = torch.load(judge)
    state["model"]["features.0.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "judge.pt")
    with pytest.raises(UserError, match="not finite"):
        evaluation.main(["recon", "--ckpt", checkpoint, "--num", "4", "--classifier", str(tmp_path / "judge.pt"),
                         "--device", "cpu", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


def test_stats_and_gen_agree(judge, folder, tmp_path):
    """Statistics of other images than the training set's, or of augmented ones; a file that is measured unlike the folder;
    files of another network or size that are taken without a word."""
    images, labels = split_of(folder, "train")
    common = ["--classifier", judge, "--device", "cpu", "--data", folder, "--out", str(tmp_path)]
    evaluation.main(["stats", *common, "--batch-size", "32"])  # as gen: equal to the last digit
    features = load_classifier(judge)[0](images)[0].double().numpy()
    with np.load(tmp_path / "stats.npz") as file:
        np.testing.assert_allclose(file["mu"], features.mean(0), rtol=1e-5)
        np.testing.assert_allclose(file["sigma"], np.cov(features, rowvar=False), atol=1e-5 * features.var(0).max())
        arrays = dict(file)
    samples, other = str(tmp_path / "samples.npz"), str(tmp_path / "other.npz")
    np.savez(samples, evaluation.to_uint8(images), labels)
    rows = []
    for reference in ([], ["--reference", str(tmp_path / "stats.npz")]):
        evaluation.main(["gen", *common, "--samples", samples, "--num", "0", *reference])
        record = read_json(tmp_path, "gen.json")
        rows.append(record["results"][0])
        assert record["reference_hash"] == read_json(tmp_path, "stats.json")["reference_hash"]
    assert rows[0] == rows[1] and rows[0]["precision"] == rows[0]["recall"] == 1
    assert rows[0]["fd-36"] == pytest.approx(0, abs=1e-6 * features.var(0).sum())
    for change, word in ((dict(features_hash="of another"), "not made with these"), (dict(size=32), "--size 16")):
        np.savez(other, **{**arrays, **change})
        with pytest.raises(UserError, match=word):
            evaluation.main(["gen", *common, "--samples", samples, "--reference", other])


# ---------------------------------------------------------------------------------------------------------------------
# Linear probe, sweep, source ablation

def probe_accuracy(shuffled, seed=0, val_classes=10):
    g = torch.Generator().manual_seed(seed)
    centers, labels = torch.randn(10, 16, generator=g) * 50 + 300, torch.arange(1500) % 10      # far from 0: the norm must help
    x = centers[labels] + 20 * torch.randn(1500, 16, generator=g)
    given = labels[torch.randperm(1500, generator=g)] if shuffled else labels
    args = argparse.Namespace(epochs=60, lr=0.01, seed=0)
    val = torch.arange(1500)[1000:][labels[1000:] < val_classes]
    return linear_probe((x[:1000], given[:1000]), (x[val], labels[val]), 10, args, "cpu")


def test_probe_learns_what_is_there():
    """A probe that is not trained, in training mode when measured, or measured on other labels."""
    train, val = probe_accuracy(shuffled=False)
    assert train > 0.95 and val > 0.95
    assert probe_accuracy(shuffled=False, val_classes=1)[1] > 0.95, "normalised by the images that are measured"


def test_probe_of_shuffled_labels_is_chance():
    """Accuracy that comes from the probe and not from the features: val images or labels that leak into training."""
    accuracies = [probe_accuracy(shuffled=True, seed=seed)[1] for seed in range(6)]  # a cluster is right or wrong as a whole
    assert sum(accuracies) / 6 < 0.1 + 3 * (0.09 / 60) ** 0.5, accuracies


def test_probe_reports_the_encoder_beside_its_controls(checkpoint, folder, tmp_path):
    """Features of merged tokens where all were asked for, features of the wrong images, a missing control."""
    rows = []
    for batch_size in (32, 7):
        evaluation.main(["probe", "--ckpt", checkpoint, "--data", folder, "--keep", "64,16", "--epochs", "3", "--device", "cpu",
                         "--batch-size", str(batch_size), "--out", str(tmp_path)])
        record = read_json(tmp_path, "probe.json")
        rows.append({row.pop("features"): row for row in record["results"]})
    assert list(rows[0]) == ["tokens, K = 64", "class token, K = 64", "tokens, K = 16", "class token, K = 16",
                             "random encoder, K = 64", "pixels, 16 px"]
    for name, row in rows[0].items():
        assert row == pytest.approx(rows[1][name], abs=0.06), name  # one val image of 18: rounding may move one over a border
    assert [row["dimensions"] for row in rows[0].values()] == [16] * 5 + [3 * 16 * 16]
    assert rows[0]["pixels, 16 px"]["val_top1"] == 1, "the classes of this folder are colours"
    assert record["train_num"] == 36 and record["num"] == 18

    model, images = load_tokenizer(checkpoint), split_of(folder, "val")[0]
    with torch.no_grad():
        mean, cls = evaluation.pooled(model, images, 64, ONE)
        assert torch.equal(mean, model.encoder(images, 64)[3].mean(1)) and torch.equal(cls, model.encode(images, 64).cls)


def hand_count(c, keep):
    """Multiply-adds of the tests' encoder (two CNN stages of one residual block), by the formulas."""
    side, a, b = c.size, c.base * c.mult[0], c.base * c.mult[1]
    total = side ** 2 * 9 * (3 * a + 2 * a * a)                                # first conv, first stage
    side //= 2
    total += side ** 2 * (9 * (a * a + a * b + b * b) + a * b)                 # strided conv, second stage with its 1x1 skip
    N, D = side ** 2 + 1, c.width
    for r in merge_schedule(c.length, keep, c.depth):
        total += 4 * N * D * D + 2 * N * N * D                                 # qkv and proj, QK^T and AV
        total += (N + 1) // 2 * (N // 2) * D // c.heads if r else 0            # similarities of the matching
        N -= r
        total += 8 * N * D * D                                                 # MLP
    return total + (N - 1) * D * c.bits


def test_multiply_adds_by_hand(checkpoint):
    """Attention that is not counted, FLOPs in place of multiply-adds, the cost at another K."""
    model = load_tokenizer(checkpoint)
    counts = [multiply_adds(model.encoder, 16, keep) for keep in (16, 25, 64)]
    assert counts == [hand_count(model.config, keep) for keep in (16, 25, 64)]
    assert counts == sorted(counts)


def test_sweep_writes_table_and_plot(checkpoint, judge, folder, tmp_path, capsys):
    """A column of another K, numbers unlike those of recon and probe."""
    flags = ["--ckpt", checkpoint, "--data", folder, "--device", "cpu", "--keep", "16,64"]
    evaluation.main(["sweep", *flags, "--classifier", judge, "--epochs", "3", "--out", str(tmp_path)])
    evaluation.main(["recon", *flags, "--classifier", judge, "--out", str(tmp_path)])
    evaluation.main(["probe", *flags, "--epochs", "3", "--out", str(tmp_path)])
    swept, recon, probed = (read_json(tmp_path, f"{name}.json")["results"] for name in ("sweep", "recon", "probe"))
    probed = {row["features"]: row["val_top1"] for row in probed}
    for row, other in zip(swept, recon, strict=True):
        assert {key: row[key] for key in other} == other
        assert row["probe_top1"] == probed[f"tokens, K = {row['keep']}"]
    assert swept[0]["encoder_gmacs"] < swept[1]["encoder_gmacs"]
    assert f"{swept[0]['rfd-18']:.4f}" in capsys.readouterr().out
    assert len(np.unique(np.asarray(Image.open(tmp_path / "sweep.png")))) > 10


def test_ablate_source_compares_sources(checkpoint, judge, folder, tmp_path):
    """The true source in the predicted row, a fine-tuned model that is loaded but not used, numbers unlike recon's."""
    state = torch.load(checkpoint)
    prefix = "recovery."
    same = {name.removeprefix(prefix): value for name, value in state["ema"].items() if name.startswith(prefix)}
    other = {name: value + 0.3 * torch.randn(value.shape) for name, value in same.items()}
    flags = ["--ckpt", checkpoint, "--data", folder, "--device", "cpu", "--classifier", judge, "--out", str(tmp_path)]
    rows = {}
    for name, weights in (("same", same), ("other", other)):
        save_checkpoint(tmp_path / f"{name}.pt", "recovery", model=weights, tokenizer=weights_hash(state["ema"]))
        evaluation.main(["ablate-source", *flags, "--recovery", str(tmp_path / f"{name}.pt")])
        rows[name] = {row.pop("source"): row for row in read_json(tmp_path, "ablate_source.json")["results"]}
    assert rows["same"]["fine-tuned"] == rows["same"]["predicted"] != rows["other"]["fine-tuned"]
    assert rows["other"]["true"]["accuracy"] == 1 and rows["other"]["predicted"]["accuracy"] < 1
    evaluation.main(["recon", *flags, "--keep", "25"])
    row, = read_json(tmp_path, "recon.json")["results"]
    for key in ("psnr", "rfd-18"):
        assert rows["same"]["true"][key] == pytest.approx(row[key])
    assert rows["same"]["predicted"]["accuracy"] == pytest.approx(row["recovery_accuracy"])


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

def test_every_layer_has_its_learning_rate(checkpoint):
    """A parameter in no group or in two, the decay counted from the wrong end, weight decay on biases."""
    model = FineTuned(load_tokenizer(checkpoint).encoder, 64, 3, 0.1)
    groups = layer_groups(model, FinetuneConfig(layer_decay=0.5, weight_decay=0.1))
    of = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(of) == len(list(model.parameters()))
    scale = lambda p: of[id(p)]["scale"]
    assert scale(model.head.weight) == scale(model.encoder.norm.weight) == 1
    assert [scale(block.mlp.up.weight) for block in model.encoder.blocks] == [1 / 8, 1 / 4, 1 / 2]
    assert scale(model.encoder.stem.blocks[0].weight) == scale(model.encoder.cls) == 1 / 16
    assert of[id(model.head.weight)]["weight_decay"] == 0.1
    assert of[id(model.head.bias)]["weight_decay"] == of[id(model.encoder.cls)]["weight_decay"] == 0


def test_drop_path_skips_whole_branches():
    """Single values dropped in place of an image's branch, no scaling, a model that still drops in evaluation."""
    branch = torch.nn.Identity()
    branch.register_forward_hook(functools.partial(evaluation.drop_path, 0.25))
    torch.manual_seed(0)
    x = torch.ones(2000, 3, 2)
    out = branch(x)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75]) and torch.equal(out, out[:, :1, :1].expand_as(x))
    assert out.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(branch.eval()(x), x)


@pytest.mark.parametrize("kind", ("mixup", "cutmix"))
def test_mixing_keeps_images_and_labels_together(kind):
    """A label share that is not the share of the picture, or that of the wrong partner."""
    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    config = FinetuneConfig(**{**dict(mixup=0.0, cutmix=0.0), kind: 1.0})
    shares = set()
    for seed in range(20):
        mixed, targets = mix(images, torch.eye(2), config, np.random.default_rng(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        torch.testing.assert_close((mixed.mean((1, 2, 3)) + 1) / 2, targets[:, 1])     # the share of white is class 1's
        shares.add(round(targets[0, 0].item(), 3))
        assert len(mixed.unique()) == 2 or kind == "mixup"
    assert len(shares) > 10
    assert torch.equal(mix(images, torch.eye(2), FinetuneConfig(mixup=0.0, cutmix=0.0), np.random.default_rng(0))[0], images)


def test_erasing():
    """All images erased, or none; the data set's own tensor overwritten."""
    images = torch.zeros(200, 3, 16, 16)
    out = erase(images, 0.25, np.random.default_rng(0))
    touched = (out != 0).flatten(1).double().mean(1)
    assert 0.15 < (touched > 0).double().mean() < 0.35 and 0 < touched.max() <= 0.4 and images.abs().sum() == 0


def one_step(checkpoint, folder, monkeypatch, out, *more):
    """Fine-tune for a step -> (what the encoder was shown (B,3,H,W), targets of the loss (B,C), checkpoint)."""
    seen, forward, loss = [], FineTuned.forward, torch.nn.functional.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(FineTuned, "forward", lambda self, x: (seen.append(x), forward(self, x))[1])
        patch.setattr(evaluation.F, "cross_entropy", lambda x, y: (seen.append(y), loss(x, y))[1])
        off = "--mixup 0 --cutmix 0 --smoothing 0 --erasing 0 --warmup 0 --max-steps 1".split()
        state, _ = finetuned(checkpoint, folder, out, *off, *more)
    return seen[0], seen[1], state


def test_each_regulariser_acts(checkpoint, folder, tmp_path, monkeypatch):
    """A flag that is read and not used: what the encoder is shown and what the loss compares with, all off and one on."""
    step = functools.partial(one_step, checkpoint, folder, monkeypatch)
    images, targets, plain = step(tmp_path / "plain")
    assert sorted(targets.unique().tolist()) == [0, 1]
    for n, flag in enumerate(("--mixup 1", "--cutmix 1", "--erasing 1", "--smoothing 0.3", "--drop-path 0.9", "--layer-decay 0")):
        other, mixed, state = step(tmp_path / str(n), *flag.split())
        changed = (other != images).flatten(1).double().mean(1)                                   # share of each image
        if "mix" in flag:
            assert (mixed.count_nonzero(1) == 2).any() and torch.allclose(mixed.sum(1), torch.ones(len(mixed)))
            assert changed.max() > 0.99 if flag == "--mixup 1" else 0 < changed.max() < 1
        elif flag == "--smoothing 0.3":
            torch.testing.assert_close(mixed, targets * 0.7 + 0.1)
        else:
            assert torch.equal(mixed, targets)
        if "erasing" in flag:
            assert 0 < changed.min() and changed.max() < 0.5
        elif "mix" not in flag:
            assert changed.max() == 0
        moved = lambda name: not torch.equal(state["model"][name], torch.load(checkpoint)["ema"][name])
        for name in ("encoder.stem.blocks.0.weight", "encoder.blocks.2.mlp.up.weight"):
            assert moved(name) == (flag != "--layer-decay 0"), (flag, name)
        if "drop-path" in flag:
            assert not torch.equal(state["model"]["head.weight"], plain["model"]["head.weight"])


def test_drop_path_is_on_every_block_but_the_first(checkpoint):
    """Hooks on one kind of branch only, a chance that does not rise, a first block that is skipped."""
    torch.manual_seed(0)
    model, dropped = FineTuned(load_tokenizer(checkpoint).encoder, 64, 3, 0.8).train(), {}
    for i, block in enumerate(model.encoder.blocks):
        for name in ("attn", "mlp"):
            look = lambda module, inputs, out, key=(i, name): dropped.setdefault(key, []).append(
                (out[0] if isinstance(out, tuple) else out).flatten(1).abs().amax(1) == 0)
            getattr(block, name).register_forward_hook(look)
    with torch.no_grad():
        model(random_images(400))
        share = {key: torch.cat(found).double().mean().item() for key, found in dropped.items()}
        expected = {(i, name): chance for i, chance in enumerate((0, 0.4, 0.8)) for name in ("attn", "mlp")}
        assert share == pytest.approx(expected, abs=0.1)
        x = random_images(3)
        assert torch.equal(model.eval()(x)[1], model(x)[1])


def test_finetune_measures_the_average(checkpoint, folder, tmp_path, monkeypatch):
    """An average that does not follow or is not an average, or an accuracy of the raw weights."""
    flags = "--max-steps 3 --warmup 0 --lr 0.01 --ema".split()
    state, _ = finetuned(checkpoint, folder, tmp_path / "0", *flags, "0")
    assert all(torch.equal(value, state["ema"][name]) for name, value in state["model"].items())
    measured = []
    monkeypatch.setattr(evaluation, "accuracy", lambda model, *rest: measured.append(weights_hash(model.state_dict())) or 0.5)
    state, _ = finetuned(checkpoint, folder, tmp_path / "9", *flags, "0.9")
    name, before = "encoder.blocks.0.mlp.up.weight", torch.load(checkpoint)["ema"]
    apart = lambda a, b: (a[name] - b[name]).norm()
    assert 0 < apart(state["ema"], before) < apart(state["model"], before)
    assert measured == [weights_hash(state["ema"])] and read_json(tmp_path, "9", "finetune.json")["val_top1"] == 0.5


def finetuned(checkpoint, folder, out, *more):
    evaluation.main(["finetune", "--ckpt", checkpoint, "--data", folder, "--device", "cpu", "--batch-size", "12",
                     "--log-every", "1", "--workers", "0", "--out", str(out), *more])
    with open(out / "metrics.jsonl") as f:
        return torch.load(out / "ckpt.pt"), [json.loads(line) for line in f]


def test_finetune_learns_and_resumes(checkpoint, folder, tmp_path):
    """Labels that do not belong to their images, a head alone that trains, random numbers that a resumed run draws anew."""
    flags = "--drop-path 0.2 --mixup 1 --cutmix 1 --erasing 0.5 --lr-schedule constant --max-steps".split()
    whole, rows = finetuned(checkpoint, folder, tmp_path / "whole", *flags, "4")
    finetuned(checkpoint, folder, tmp_path / "parts", *flags, "2")
    parts, rows_parts = finetuned(checkpoint, folder, tmp_path / "parts", *flags, "4", "--resume")
    for part in ("model", "ema"):
        assert all(torch.equal(value, parts[part][name]) for name, value in whole[part].items())
    assert [row for row in rows if "loss" in row] == [row for row in rows_parts if "loss" in row]

    finetuned(checkpoint, folder, tmp_path / "plain", *"--max-steps 40 --lr 3e-3 --warmup 5 --ema 0.9".split())
    record = read_json(tmp_path, "plain", "finetune.json")
    assert record["val_top1"] > 0.9 and record["num"] == 18 and record["keep"] == 64, "colours are easy"
    before, after = torch.load(checkpoint)["ema"], torch.load(tmp_path / "plain" / "ckpt.pt")["model"]
    assert record["tokenizer"] == weights_hash(before)
    assert not torch.equal(before["encoder.stem.blocks.0.weight"], after["encoder.stem.blocks.0.weight"])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

RANKS = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
import eval as evaluation
end, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # one process group for all the commands
for argv in {commands!r}:
    evaluation.main(argv)
end()
"""


@pytest.fixture(scope="module")
def measured(checkpoint, judge, folder, tmp_path_factory):
    """Every measuring command, on one process -> (folder of the results, a function that makes the commands for another)."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("measured")
    config = GPTConfig(mode="randar", width=16, depth=1, heads=2, bits=6, length=64, num_classes=10, keep=25, keeps=(25,))
    state, gpt, other = torch.load(checkpoint), GPT(config).state_dict(), load_tokenizer(checkpoint).recovery.state_dict()
    save_checkpoint(place / "gpt.pt", "generator", config=vars(config), ema=gpt,
                    tokenizer=dict(config=state["config"], ema=state["ema"]))
    save_checkpoint(place / "recovery.pt", "recovery", model={name: value + 0.1 for name, value in other.items()},
                    tokenizer=weights_hash(state["ema"]))
    images, labels = split_of(folder, "train")
    np.savez(place / "samples.npz", evaluation.to_uint8(images), labels, tokenizer="t", generator="g", weights="ema")

    def commands(out):
        common = ["--device", "cpu", "--data", folder, "--batch-size"]
        measured, given = ["--classifier", judge, "--out", str(out)], ["--ckpt", checkpoint]
        recovered = ["--recovery", str(place / "recovery.pt")]
        return [["recon", *given, *common, "5", "--num", "13", *measured],
                ["stats", *common, "5", *measured],
                ["gen", "--samples", str(place / "samples.npz"), "--num", "11", *common, "4", *measured,
                 "--out", str(out / "file")],
                ["gen", "--ckpt", str(place / "gpt.pt"), *recovered, "--num", "11", "--cfg", "2", *common, "4", *measured,
                 "--out", str(out / "drawn")],
                ["ablate-source", *given, *common, "5", *measured, *recovered],
                ["probe", *given, *common, "5", "--epochs", "2", "--out", str(out)],
                ["sweep", *given, *common, "5", "--epochs", "2", "--keep", "16,64", *measured],
                ["finetune", *given, *common, "8", "--max-steps", "3", "--mixup", "0", "--cutmix", "0",
                 "--erasing", "0", "--log-every", "1", "--workers", "0", "--out", str(out / "finetune")]]

    for argv in commands(place / "one"):
        evaluation.main(argv)
    return place, commands


def test_every_result_says_how_it_was_made(measured, checkpoint, judge):
    """A number that nobody can compare: the recovery model's hash in place of the tokenizer's, a file of samples without one."""
    place, _ = measured
    tokenizer, gpt = weights_hash(torch.load(checkpoint)["ema"]), weights_hash(torch.load(place / "gpt.pt")["ema"])
    recovery_hash = weights_hash(torch.load(place / "recovery.pt")["model"])
    network, compared = {"features_hash": weights_hash(torch.load(judge)["model"])}, {"reference", "reference_hash"}
    of_tokenizer = dict(tokenizer=tokenizer, weights="ema", checkpoint=checkpoint)
    for name, num, values, keys in (
            ("recon", 13, {**of_tokenizer, **network}, compared),
            ("stats", 36, network, {"reference_hash", "split"}),
            ("file/gen", 11, dict(tokenizer="t", generator="g", weights="ema", **network), compared | {"samples_hash"}),
            ("drawn/gen", 11, dict(tokenizer=tokenizer, generator=gpt, recovery=recovery_hash, weights="ema", **network),
             compared),
            ("ablate_source", 18, {**of_tokenizer, **network, "recovery": recovery_hash}, compared),
            ("probe", 18, of_tokenizer, {"train_num", "epochs", "lr"}),
            ("sweep", 18, {**of_tokenizer, **network}, compared | {"train_num", "epochs", "lr"}),
            ("finetune/finetune", 18, of_tokenizer, {"steps", "keep"})):
        record = read_json(place, "one", f"{name}.json")
        expected = dict(values, num=num, seed=0, dtype="float32", device="cpu")
        assert {key: record.get(key) for key in expected} == expected, name
        assert keys < set(record) and record["command"].startswith("python eval.py "), name


def test_two_ranks_equal_one_process(measured, tmp_path):
    """Images that two ranks measure or none does, means of means, moments of one rank, samples seeded by their rank."""
    place, commands = measured
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=ROOT, commands=commands(tmp_path / "two")))
    ranks = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    try:
        output, _ = ranks.communicate(timeout=600)
    finally:
        ranks.terminate()
    assert ranks.returncode == 0, output
    for name in ("recon", "file/gen", "drawn/gen", "ablate_source", "probe", "sweep"):
        one, two = (read_json(folder, f"{name}.json")["results"] for folder in (place / "one", tmp_path / "two"))
        for a, b in zip(one, two, strict=True):
            for key in ("cfg", "per_class", "source", "features"):
                assert a.pop(key, 0) == b.pop(key, 0), (name, key)
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9), name
    with np.load(place / "one" / "stats.npz") as one, np.load(tmp_path / "two" / "stats.npz") as two:
        np.testing.assert_allclose(one["sigma"], two["sigma"], atol=1e-6 * one["sigma"].max())  # float32 features
    one, two = ([json.loads(line) for line in open(path / "finetune" / "metrics.jsonl")]
                for path in (place / "one", tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_maps_writes_a_picture(checkpoint, tmp_path):
    """Rows or columns left out, small images not enlarged."""
    evaluation.main(["maps", "--ckpt", checkpoint, "--keep", "16,64", "--num", "3", "--device", "cpu", "--out", str(tmp_path)])
    picture = Image.open(tmp_path / "maps.png")
    assert picture.width >= 3 * 128 and picture.height >= 3 * 128  # the images and two maps of each
    assert len(np.unique(np.asarray(picture))) > 10


def test_classifier_learns_and_loads(tmp_path, capsys):
    """A checkpoint that lacks the class names, a load that leaves it in training mode, labels shifted by one."""
    out = str(tmp_path / "classifier")
    evaluation.main(["train-classifier", "--size", "16", "--max-steps", "30", "--batch-size", "32", "--device", "cpu",
                     "--out", out])
    model, state = load_classifier(os.path.join(out, "ckpt.pt"))
    assert not model.training and state["class_names"][3] == "star" and state["config"]["num_classes"] == 10
    assert state["val_accuracy"] > 0.15, "no better than chance"
    dataset = evaluation.build_dataset("shapes", "val", 16, train=False)
    images = torch.stack([dataset[i][0] for i in range(200)])
    np.savez(tmp_path / "samples.npz", evaluation.to_uint8(images), np.arange(200) % 10)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(64), sigma=np.eye(64), arr_0=evaluation.to_uint8(images[:50]),
             features_hash=weights_hash(model.state_dict()))
    evaluation.main(["gen", "--samples", str(tmp_path / "samples.npz"), "--num", "0", "--classifier", f"{out}/ckpt.pt",
                     "--reference", str(tmp_path / "reference.npz"), "--device", "cpu", "--out", str(tmp_path / "gen")])
    record = read_json(tmp_path, "gen", "gen.json")
    with torch.no_grad():
        expected = (model(images)[1].argmax(1) == torch.arange(200) % 10).double().mean().item()
    assert record["num"] == 200 and record["val_accuracy"] == state["val_accuracy"] and record["real_images"] == 50
    assert record["results"][0]["agreement"] == pytest.approx(expected, abs=0.011)  # 8 bits may move an image over a border
    assert set(record["results"][0]["per_class"]) == set(state["class_names"])


def test_gen_draws_and_judges(checkpoint, judge, tmp_path):
    """Labels of another batch beside the images, images that depend on --batch-size, a cfg that is recorded but not used."""
    torch.manual_seed(0)
    path = str(tmp_path / "gpt.pt")
    config = GPTConfig(mode="raster", width=16, depth=1, heads=2, bits=6, length=64, num_classes=10, keep=25, keeps=(16, 25, 36))
    state = torch.load(checkpoint)
    gpt = GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(path, "generator", config=vars(config), ema=gpt.state_dict(),
                    tokenizer=dict(config=state["config"], ema=state["ema"]))
    reference = str(tmp_path / "reference.npz")
    images = random_images(20)
    with torch.no_grad():
        mu, sigma = load_classifier(judge)[0](images)[0].mean(0), torch.eye(64)
    np.savez(reference, mu=mu, sigma=sigma, arr_0=evaluation.to_uint8(images),
             features_hash=weights_hash(torch.load(judge)["model"]))
    records = []
    for batch_size in (12, 5):
        out = str(tmp_path / str(batch_size))
        evaluation.main(["gen", "--ckpt", path, "--classifier", judge, "--num", "12", "--cfg", "1,2.5",
                         "--batch-size", str(batch_size), "--reference", reference, "--device", "cpu", "--out", out])
        records.append(read_json(out, "gen.json"))
        assert {"samples_cfg1.png", "samples_cfg2.5.png"} < set(os.listdir(out))
    for a, b in zip(*(record["results"] for record in records)):
        assert a.pop("per_class") == b.pop("per_class") and a == pytest.approx(b, rel=1e-6)
        assert {"fd-12", "is-clf-12", "precision", "recall", "agreement"} < set(a)
    assert [row["cfg"] for row in records[0]["results"]] == [1.0, 2.5] and records[0]["seed"] == 0
    assert records[0]["generator"] == weights_hash(gpt.state_dict()) and records[0]["tokenizer"] == weights_hash(state["ema"])
    with open(tmp_path / "12" / "samples_cfg1.png", "rb") as a, open(tmp_path / "12" / "samples_cfg2.5.png", "rb") as b:
        assert a.read() != b.read()


@pytest.mark.parametrize("size", (8, 16, 32, 64, 96, 256))
def test_classifier_at_any_size(size):
    """A stage too many: pooling a map of one pixel fails only for small images."""
    features, logits = Classifier(size, 7)(torch.zeros(2, 3, size, size))
    assert len(features) == 2 and features.dim() == 2 and logits.shape == (2, 7)


def test_eight_bit_round_trip(tmp_path):
    """Channels last, the range, or a float left unrounded: samples from memory and from a file would be judged apart."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    assert np.array_equal(evaluation.to_uint8(from_uint8(pixels)), pixels)
    images = random_images(2)
    rounded = eight_bit(images)
    assert (rounded - images).abs().max() <= 1 / 255 + 1e-6
    np.savez(tmp_path / "s.npz", evaluation.to_uint8(images), np.array([4, 2]))
    read, labels, made_by = read_samples(tmp_path / "s.npz", 0)
    assert torch.equal(from_uint8(read), rounded) and labels.tolist() == [4, 2] and made_by == {}
    assert len(read_samples(tmp_path / "s.npz", 1)[0]) == 1


MISTAKES = {
    "no command": (evaluation, [], "recon"),
    "unknown command": (evaluation, ["frobnicate"], "frobnicate"),
    "unknown flag": (evaluation, ["recon", "--kep", "3"], "--kep"),
    "no checkpoint": (evaluation, ["recon", "--ckpt", "no/where.pt"], "no/where.pt"),
    "other kind": (evaluation, ["recon", "--ckpt", "CKPT", "--classifier", "CKPT"], "classifier"),
    "keep > L": (evaluation, ["maps", "--ckpt", "CKPT", "--keep", "65"], "--keep"),
    "keep is no number": (evaluation, ["recon", "--ckpt", "CKPT", "--keep", "16,many"], "--keep"),
    "negative number": (evaluation, ["recon", "--ckpt", "CKPT", "--num", "-3"], "--num"),
    "cfg is nan": (evaluation, ["gen", "--cfg", "nan"], "--cfg"),
    "top-p above 1": (evaluation, ["gen", "--top-p", "1.5"], "--top-p"),
    "inception is not there": (evaluation, ["recon", "--ckpt", "CKPT", "--features", "inception"], "inception"),
    "no such recovery": (evaluation, ["ablate-source", "--ckpt", "CKPT", "--recovery", "no/where.pt"], "no/where.pt"),
    "finetune: unknown flag": (evaluation, ["finetune", "--mixdown", "1"], "--mixdown"),
    "finetune: keep > L": (evaluation, ["finetune", "--ckpt", "CKPT", "--keep", "65"], "--keep"),
    "probe: no epochs": (evaluation, ["probe", "--ckpt", "CKPT", "--epochs", "0"], "--epochs"),
    "no samples": (evaluation, ["gen", "--samples", "no/where.npz"], "no/where.npz"),
    "stats: no size": (evaluation, ["stats", "--features", "inception"], "--size"),
    "no such data": (evaluation, ["recon", "--ckpt", "CKPT", "--data", "no/such"], "no/such"),
    "no such device": (evaluation, ["recon", "--ckpt", "CKPT", "--device", "cuda:99"], "cuda:99"),
    "recovery: no checkpoint": (recovery, ["--generator", "no/where.pt"], "no/where.pt"),
    "speed: L is no square": (evaluation, ["speed", "--length", "60"], "--length"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake, checkpoint, tmp_path, monkeypatch, capfd):
    """A traceback where one line would do, or an error that ends with exit code 0."""
    monkeypatch.chdir(tmp_path)
    module, argv, word = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: module.main([checkpoint if part == "CKPT" else part for part in argv]))
    error = capfd.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1 and word in error, error


REFERENCES = {  # what stands in the file -> a word of the error
    "nothing there": (None, "No such file"), "text": (b"<html>404: Not Found</html>", "cannot be read"),
    "truncated": (dict(mu=np.zeros(64), sigma=np.eye(64)), "cannot be read"), "no sigma": (dict(mu=np.zeros(64)), "sigma"),
    "wrong shape": (dict(mu=np.zeros(64), sigma=np.eye(63)), "(63, 63)"),
    "words": (dict(mu=["a"], sigma=["b"]), "cannot be read"),
    "other features": (dict(mu=np.zeros(2048), sigma=np.eye(2048)), "2048"),
    "nan": (dict(mu=np.zeros(64), sigma=np.full((64, 64), np.nan)), "4096"),
    "no pictures": (dict(mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((4, 16))), "arr_0"),
    "other size": (dict(mu=np.zeros(64), sigma=np.eye(64), arr_0=np.zeros((4, 32, 32, 3), np.uint8)), "32 px")}


@pytest.mark.parametrize("damage", REFERENCES)
def test_wrong_references_get_one_line(damage, judge, tmp_path, capfd):
    """A traceback; statistics of other images or features that are noticed when 50,000 samples have been drawn, or never."""
    content, word = REFERENCES[damage]
    reference, samples = tmp_path / "reference.npz", str(tmp_path / "samples.npz")
    if isinstance(content, dict):
        np.savez(reference, **content, features_hash=weights_hash(torch.load(judge)["model"]))
    elif content:
        reference.write_bytes(content)
    if damage == "truncated":
        reference.write_bytes(reference.read_bytes()[:20_000])
    np.savez(samples, np.zeros((12, 16, 16, 3), np.uint8), np.zeros(12, int))
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: evaluation.main(["gen", "--samples", samples, "--reference", str(reference), "--classifier", judge,
                                          "--device", "cpu", "--out", str(tmp_path / "out")]))
    output, error = capfd.readouterr()
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1 and word in error and str(reference) in error, error
    assert "precision" not in output, "the header of the table was printed already"
    assert not (tmp_path / "out").exists(), "the output folder was made before the reference was looked at"


def test_a_damaged_model_is_an_error(checkpoint, tmp_path):
    """NaN weights that give a table of nan, or worse a JSON file with numbers in it."""
    state = torch.load(checkpoint)
    state["ema"]["decoder.conv_out.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="not finite"):
        evaluation.main(["recon", "--features", "none", "--ckpt", str(tmp_path / "ckpt.pt"), "--num", "4", "--device", "cpu",
                         "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("module,argv", [(recovery, ["--help"]), (evaluation, ["--help"]), *(
    (evaluation, [name, "--help"]) for name in ("recon", "gen", "stats", "probe", "finetune", "sweep", "ablate-source"))])
def test_help(module, argv, capsys):
    """A % in a help text."""
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
