"""Tests of eval.py: one property each. A docstring names the bug that its test catches."""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE_16, random_images, save_generator, save_tokenizer, two_ranks
from kills import ROOT, difference, read
from PIL import Image

import eval as evaluation  # the script has the name of a builtin
from data import (Run, UserError, build_dataset, save_checkpoint, seeded, set_learning_rate, subset,
                  to_uint8, weights_hash)
from eval import (Classifier, FinetuneConfig, FineTuned, Moments, eight_bit, fit_to_convergence,
                  frechet_distance, inception_score, labelled, layer_groups, linear_probe,
                  load_classifier, merge_map, mix, multiply_adds, precision_recall,
                  ssim)
from tokenizer import MergeVQ, TokenizerConfig, first_position_of_token, load_tokenizer, psnr

ONE = Run(0, 1, torch.device("cpu"), torch.float32)

def random_covariance(D, rank, seed):
    A = np.random.default_rng(seed).standard_normal((D, rank))
    return A @ A.T

def read_json(*path):
    with open(os.path.join(*path)) as file:
        return json.load(file)

def run(command, out, *flags):
    """A command on the CPU without loader processes -> its result file."""
    argv = [command, "--out", out, *flags, "--device", "cpu", "--workers", "0"]
    evaluation.main([str(part) for part in argv])
    return read_json(out, f"{command}.json") if command != "maps" else None

# Metrics

def test_frechet_of_known_gaussians():
    """A missing factor 2, a root left out, the mean not squared: against answers by hand."""
    assert frechet_distance([1.0], [[4.0]], [4.0], [[9.0]]) == pytest.approx(9 + (3 - 2) ** 2)
    mu, s1, s2 = np.zeros(3), np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert frechet_distance(mu, s1, mu + 2, s2) == pytest.approx(12 + 1 + 0 + 4)
    a, b = random_covariance(2, 2, 1), random_covariance(2, 2, 2)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))  # in 2 dimensions
    expected = np.trace(a + b) - 2 * root
    assert frechet_distance(mu[:2], a, mu[:2], b) == pytest.approx(expected, rel=1e-10)

def test_frechet_of_singular_covariances():
    """Fewer images than features: NaN roots of rounding errors, or an added eps I."""
    mu, a, b = np.zeros(40), random_covariance(40, 5, 1), np.diag([1.0] * 3 + [0.0] * 37)
    assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-6 * np.trace(a))
    assert frechet_distance(mu, a, mu, 0 * a) == pytest.approx(np.trace(a))
    assert frechet_distance(mu, 0 * a, mu, 0 * a) == 0
    root = np.sqrt(np.linalg.eigvalsh(a[:3, :3]).clip(0)).sum()  # b projects on three axes
    for pair in ((a, b), (b, a)):
        found = frechet_distance(mu, pair[0], mu, pair[1])
        assert found == pytest.approx(np.trace(a) + 3 - 2 * root, rel=1e-6)

def test_moments_are_of_all_rows():
    """Means over batches, sums in float32, N for N - 1."""
    rows = torch.randn(50, 6, generator=seeded(0), dtype=torch.float64) + 1000
    for size in (50, 7, 1):
        mu, sigma = Moments(rows.split(size)).statistics(ONE)
        torch.testing.assert_close(mu, rows.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(sigma, rows.T.cov(), rtol=1e-6, atol=1e-8)

def test_precision_and_recall_of_points_on_a_line():
    """An image counted among its own neighbours, the two swapped, a chunk that is lost."""
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # radius 1, 1, 2, 4; with k = 2: 3, 2, 3, 6
    fake = torch.tensor([[1.5], [4.5], [-2.0], [12.0], [40.0]])  # 3, 3, 3.5, 7.5, 28
    for chunk in (1000, 3):
        assert precision_recall(real, fake, 1, chunk) == (pytest.approx(2 / 5), 1)
        assert precision_recall(real, fake, 2, chunk) == (pytest.approx(4 / 5), 1)
        assert precision_recall(fake, real, 1, chunk) == (1, pytest.approx(2 / 5))
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)

def test_inception_score_of_known_distributions():
    """A mean outside the exponential: the extremes are 1 and the number of classes."""
    assert inception_score(np.eye(7).repeat(20, 0), splits=1) == pytest.approx((7, 0))
    assert inception_score(np.full((50, 7), 1 / 7), splits=5) == pytest.approx((1, 0))
    probs = np.array([[0.9, 0.1], [0.5, 0.5]])
    divergence = (probs * np.log(probs / [0.7, 0.3])).sum(1)
    assert inception_score(probs, splits=1)[0] == pytest.approx(math.exp(divergence.mean()))

def test_inception_score_ignores_the_order_of_files():
    """A file sorted by class: parts of few classes each, and a score far too low."""
    generator, labels = seeded(0), torch.arange(10).repeat_interleave(100)
    probs = (torch.randn(1000, 10, generator=generator) + 6 * torch.eye(10)[labels]).softmax(1)
    by_class = inception_score(probs, 10, 3)
    assert by_class == inception_score(probs[torch.randperm(1000, generator=generator)], 10, 3)
    assert by_class[0] == pytest.approx(inception_score(probs, 1, 3)[0], rel=0.05)
    assert inception_score(torch.eye(10)[labels], 10, 0)[0] > 9

def test_metrics_refuse_what_is_not_finite():
    """A NaN that becomes a 0 or is dropped: the number looks good and means nothing."""
    with pytest.raises(UserError, match="not finite"):
        inception_score(np.eye(3) + np.nan, 1)
    for i in range(4):
        sides = [np.zeros(3), np.eye(3)] * 2
        sides[i] = sides[i] + math.inf
        with pytest.raises(UserError, match="not finite"):
            frechet_distance(*sides)
    with pytest.raises(UserError, match="same network"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(1), np.eye(1))

def slow_ssim(a, b):
    """SSIM of two (H,W) images in one 11 x 11 window, as the formula is printed."""
    y, x = np.mgrid[-5:6, -5:6]
    weight = np.exp(-(y ** 2 + x ** 2) / (2 * 1.5 ** 2)).flatten()
    a, b = a.flatten(), b.flatten()
    ma, mb = np.average([a, b], 1, weight)
    va, cov, _, vb = np.cov(a, b, aweights=weight, ddof=0).flatten()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    return (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))

def test_ssim_against_the_formula():
    """Another window, sigma or data range, the border counted in, a sample covariance."""
    a = random_images(1, 12, 12, seed=1).double()
    b = 0.5 * a + 0.5 * random_images(1, 12, 12, seed=2).double()
    p, q = a.numpy()[0], b.numpy()[0]
    windows = [slow_ssim(p[c, y:y + 11, x:x + 11], q[c, y:y + 11, x:x + 11])
               for c in range(3) for y in range(2) for x in range(2)]
    assert ssim(a, b).item() == pytest.approx(np.mean(windows), rel=1e-9)
    assert ssim(a, a).item() == pytest.approx(1)
    a, b = random_images(4, 20, 20, seed=1), random_images(4, 20, 20, seed=2)
    alone = torch.cat([ssim(a[i:i + 1], b[i:i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, ssim(b, a), rtol=1e-12, atol=0)
    with pytest.raises(UserError, match="11 px"):
        ssim(a[..., :10, :10], b[..., :10, :10])

def test_names_say_how_many_images():
    """An "FID" of 1,000 images that someone compares with one of 50,000."""
    names = [labelled("FID", n) for n in (50_000, 10_000, 5_000, 49_999)]
    assert names == ["FID", "FID-10k", "FID-5000", "FID-49999"]

def test_merge_map():
    """Regions transposed or shifted, a mean over the wrong pixels, borders inside a region."""
    image = torch.full((1, 3, 4, 4), -1.0)
    image[:, 0, :2] = torch.tensor([0.0, 0.5, 0.2, 0.3])  # the upper half: mean 0.25
    picture = merge_map(image, torch.tensor([[0, 0, 1, 2]]), scale=8)
    assert picture.shape == (1, 3, 32, 32)
    red = {place: round(picture[0, 0][place].item(), 4) for place in np.ndindex(32, 32)}
    assert red[1, 1] == red[8, 16] == red[15, 30] == 0.25
    assert red[30, 1] == red[30, 30] == -1 == picture[:, 1:, :15].max()
    assert red[16, 1] != -1 and red[30, 16] != -1, "no border"

# Files for the commands

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "ckpt.pt"
    save_tokenizer(path, **SIZE_16, data="shapes")
    return str(path)

@pytest.fixture(scope="module")
def generator(checkpoint):
    """A randar generator on the tokenizer."""
    path = checkpoint.replace("ckpt.pt", "gpt.pt")
    save_generator(path, checkpoint, mode="randar", bits=6, length=64, num_classes=10, keep=25,
                   keeps=(16, 25, 36))
    return path

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """36 training and 18 val images of 16 px, noise around the colour of their class."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for split, num in (("train", 36), ("val", 18)):
        for i in range(num):
            place = root / split / ("blue", "green", "red")[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 160, (16, 16, 3), dtype=np.uint8)
            pixels[..., i % 3] += 90
            Image.fromarray(pixels).save(place / f"{i}.png")
    return str(root)

@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """An untrained classifier for 16 px and ten classes."""
    torch.manual_seed(1)
    path = str(tmp_path_factory.mktemp("judge") / "ckpt.pt")
    save_checkpoint(path, "classifier", ema=Classifier(16, 10).state_dict(), val_accuracy=0.1,
                    step=2, config=dict(size=16, width=32, stride=2, data="shapes", max_steps=2),
                    class_names=list("abcdefghij"))
    return path

def split_of(folder, split):
    images, labels = zip(*build_dataset(folder, split, 16, train=False))
    return torch.stack(images), np.array(labels)

# recon, maps, ablate-source

def test_recon_equals_the_definition(checkpoint, judge, folder, tmp_path):
    """Statistics of the last batch only, an unweighted mean over batches, other images than the
    centre crops, a record that lacks what one needs to compare, --no-labels that changes more."""
    flags = ["--ckpt", checkpoint, "--data", folder, "--classifier", judge, "--num", "13"]
    flags += ["--keep", "25,64", "--batch-size"]
    record = run("recon", tmp_path, *flags, "13")
    small = run("recon", tmp_path, *flags, "5", "--no-labels")
    agreement = [row.pop("agreement") for row in record["results"]]  # needs labels
    for a, b in zip(record["results"], small["results"], strict=True):
        assert a.pop("source") == b.pop("source") == "true"
        assert a == pytest.approx(b, rel=1e-4), "the numbers depend on the batch size"
    row = record["results"][0]
    expected = dict(num=13, data=folder, seed=0, dtype="torch.float32", ckpt=checkpoint,
                    reference="the same val crops", unreadable=0,
                    tokenizer=weights_hash(torch.load(checkpoint)["ema"]),
                    features_hash=weights_hash(torch.load(judge)["ema"]))
    assert {key: record[key] for key in expected} == expected
    assert "--keep 25,64" in record["command"]
    model = load_tokenizer(checkpoint)
    images, labels = (part[subset(18, 13, 0)] for part in split_of(folder, "val"))
    encoded = model.encode(images)
    decoded = model.decode(encoded.codes, encoded.source)
    predicted = model.recover(encoded.codes, first_position_of_token(encoded.source))
    network = load_classifier(judge)[0]
    (a, _), (b, logits) = (network(x) for x in (images, eight_bit(decoded)))
    a, b = a.double(), b.double()
    assert agreement[0] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    distance = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    expected = {"psnr": psnr(decoded, images).mean(), "ssim": ssim(decoded, images).mean(),
                "recovery": (predicted == encoded.source).double().mean(),
                "usage": len(encoded.codes.unique()) / 64, "rfd-13": distance}
    for key, value in expected.items():
        assert row[key] == pytest.approx(float(value), rel=1e-4), key

def test_a_generator_checkpoint_measures_its_tokenizer(checkpoint, generator, folder, tmp_path):
    """Recovery's checkpoint refused, or its source ablation without the network-free control."""
    flags = ["--data", folder, "--features", "none", "--ckpt"]
    results = [run("ablate-source", tmp_path, *flags, path)["results"]
               for path in (checkpoint, generator)]
    assert results[0] == results[1]
    rows = {row["source"]: row for row in results[0]}
    assert list(rows) == ["true", "predicted", "nearest first"]
    assert rows["true"]["accuracy"] == 1 > rows["nearest first"]["accuracy"] > 0
    assert rows["predicted"]["accuracy"] == rows["predicted"]["recovery"] < 1
    assert len({row["psnr"] for row in rows.values()}) == 3

def test_a_damaged_model_is_an_error(checkpoint, judge, folder, tmp_path):
    """NaN weights that give a table of nan, or a JSON file with numbers in it."""
    for flag, part, name in (("--ckpt", "ema", "decoder.conv_out.bias"),
                             ("--classifier", "ema", "features.0.bias")):
        paths = {"--ckpt": checkpoint, "--classifier": judge}
        state = torch.load(paths[flag])
        state[part][name].fill_(math.nan)
        paths[flag] = tmp_path / "bad.pt"
        torch.save(state, paths[flag])
        with pytest.raises(UserError, match="not finite"):
            run("recon", tmp_path, "--data", folder, *sum(paths.items(), ()))
    assert not list(tmp_path.glob("*.json"))

def test_maps_writes_a_picture(checkpoint, tmp_path):
    """Rows or columns left out, small images not enlarged."""
    run("maps", tmp_path, "--ckpt", checkpoint, "--keep", "16,64", "--num", "3")
    picture = Image.open(tmp_path / "maps.png")
    # the images, and for each K the reconstruction, the true map and the predicted one
    assert picture.width >= 3 * 128 and picture.height >= 7 * 128

# stats and gen

def test_stats_and_gen_agree(judge, folder, tmp_path):
    """Statistics of other images than the training set's, a file measured unlike the folder, a
    reference of another network or size that is taken without a word."""
    images, labels = split_of(folder, "train")
    common = ["--classifier", judge, "--data", folder]
    made = run("stats", tmp_path, *common)
    features = load_classifier(judge)[0](images)[0].double().numpy()
    arrays = dict(np.load(tmp_path / "stats.npz"))
    np.testing.assert_allclose(arrays["mu"], features.mean(0), rtol=1e-5)
    np.savez(tmp_path / "samples.npz", to_uint8(images), labels)
    flags = [*common, "--samples", tmp_path / "samples.npz"]
    rows = []
    for reference in ([], ["--reference", tmp_path / "stats.npz"]):
        record = run("gen", tmp_path, *flags, *reference)
        rows.append(record["results"][0])
        assert record["reference_hash"] == made["reference_hash"]
        assert record["real_images"] == record["num"] == 36
    assert rows[0] == rows[1] and rows[0]["precision"] == rows[0]["recall"] == 1
    assert rows[0]["fd-36"] == pytest.approx(0, abs=1e-6 * features.var(0).sum())
    for change in (dict(features_hash="other"), dict(size=32), dict(mu=np.zeros(63)),
                   dict(arr_0=np.zeros((4, 16))), dict(arr_0=np.zeros((4, 16, 8, 3), np.uint8)),
                   dict(arr_0=np.zeros((4, 16, 16, 3), np.uint8), arr_1=np.zeros(3, int))):
        np.savez(tmp_path / "other.npz", **{**arrays, **change})
        with pytest.raises(UserError, match="--reference"):
            run("gen", tmp_path, *flags, "--reference", tmp_path / "other.npz")

def test_part_of_a_file_is_a_seeded_draw(judge, folder, tmp_path):
    """The first --num of a file sorted by class; a file without labels refused."""
    images, labels = split_of(folder, "train")
    np.savez(tmp_path / "samples.npz", to_uint8(images), labels)
    np.savez(tmp_path / "bare.npz", to_uint8(images))
    common = ["--classifier", judge, "--data", folder, "--num", "12", "--samples"]
    row, bare = (run("gen", tmp_path, *common, tmp_path / f"{name}.npz")["results"][0]
                 for name in ("samples", "bare"))
    assert len(row["per_class"]) == 3, "all classes of the file"
    assert bare == {key: row[key] for key in bare} and "agreement" not in bare

def test_gen_draws_and_judges(generator, judge, folder, tmp_path, monkeypatch):
    """A cfg that is recorded but not used, a picture without the names of its classes."""
    titles, draw = [], evaluation.image_grid
    monkeypatch.setattr(evaluation, "image_grid", lambda *args, labels, **kwargs:
                        titles.append(labels) or draw(*args, labels=labels, **kwargs))
    flags = ["--ckpt", generator, "--classifier", judge, "--num", "12", "--cfg", "1,2.5"]
    record = run("gen", tmp_path, *flags, "--data", folder, "--batch-size", "5")
    first, second = record["results"]
    assert first["fd-12"] != second["fd-12"]
    assert record["generator"] == weights_hash(torch.load(generator)["ema"])
    assert {"samples_cfg1.png", "samples_cfg2.5.png"} < set(os.listdir(tmp_path))
    assert titles[0] == list("abcdefghijab")

def test_gen_with_inception(folder, tmp_path, monkeypatch):
    """Class ids without names, which a picture cannot show; FID called fd. ADM's reference holds
    its own images: no training set is looked for."""
    stub = Classifier(16, 5).eval().requires_grad_(False)
    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: stub)
    images, labels = split_of(folder, "train")
    np.savez(tmp_path / "samples.npz", to_uint8(images), labels)
    flags = ["--features", "inception", "--data", folder, "--samples", tmp_path / "samples.npz"]
    row, = run("gen", tmp_path, *flags)["results"]
    assert {"FID-36", "IS-36"} < set(row) and "agreement" not in row
    assert os.path.exists(tmp_path / "samples.png")
    seen = stub(images)[0].numpy()
    np.savez(tmp_path / "adm.npz", to_uint8(images), mu=seen.mean(0) + 1, sigma=np.cov(seen.T))
    again, = run("gen", tmp_path, *flags[:2], "--data", "nowhere", *flags[4:],
                 "--reference", tmp_path / "adm.npz")["results"]
    moved = row["FID-36"] + seen.shape[1]
    assert again["precision"] == 1 and again["FID-36"] == pytest.approx(moved, rel=1e-4)

def test_classifier_learns_resumes_and_loads(folder, tmp_path):
    """A checkpoint without class names, a load in training mode, labels shifted by one."""
    flags = ["--data", folder, "--size", "16", "--batch-size", "12", "--warmup", "4",
             "--stride", "1"]
    run("train-classifier", tmp_path, *flags, "--max-steps", "20")
    run("train-classifier", tmp_path, *flags, "--max-steps", "40", "--resume")
    model, state = load_classifier(f"{tmp_path}/ckpt.pt")
    assert not model.training and state["class_names"] == ["blue", "green", "red"]
    assert state["val_accuracy"] > 0.6, "colours are easy"
    with pytest.raises(UserError, match="stride"):
        run("train-classifier", tmp_path, *flags[:-2], "--max-steps", "60", "--resume")
    for size, stride in itertools.product((8, 96), (1, 2)):
        features, logits = Classifier(size, 7, 24, stride)(torch.zeros(2, 3, size, size))
        assert features.dim() == 2 and logits.shape == (2, 7)

# probe and sweep

def probe_accuracy(x, labels, protocol="whitened"):
    args = argparse.Namespace(epochs=60, lr=0.01, seed=0, protocol=protocol)
    return linear_probe((x[:1000], labels[:1000]), (x[1000:], labels[1000:]), 10, args, ONE)[:2]

def clusters(spread):
    generator, labels = seeded(0), torch.arange(1500) % 10
    centres = torch.randn(10, 16, generator=generator) * 50 + 300
    return centres[labels] + spread * torch.randn(1500, 16, generator=generator), labels

@pytest.mark.parametrize("protocol", ("whitened", "paper"))
def test_probe_measures_what_is_there(protocol):
    """A probe that is not trained, or accuracy that comes from labels that leak."""
    x, labels = clusters(20)
    assert min(probe_accuracy(x, labels, protocol)) > 0.95
    shuffled = labels[torch.randperm(1500, generator=seeded(0))]
    assert probe_accuracy(x, shuffled, protocol)[1] < 0.2

def test_whitened_probe_is_the_converged_fit():
    """A probe that measures conditioning: against L-BFGS on the features as they are."""
    x, labels = clusters(90)
    x = (x - 300) @ torch.diag(torch.logspace(-1, 0.5, 16))
    found = probe_accuracy(x, labels)[1]
    mean, matrix = evaluation.normaliser(x, "whitened", ONE)
    white = (x.double() - mean) @ matrix
    torch.testing.assert_close(white.T.cov(), torch.eye(16).double(), rtol=0, atol=0.05)
    x = F.pad(x, (0, 1), value=1.0).double()
    theta, fault = fit_to_convergence(x[:1000], labels[:1000], 10, 0.0, 5000)
    assert not fault
    expected = (x[1000:] @ theta.T).argmax(1) == labels[1000:]
    assert 0.2 < found < 0.95 and abs(found - expected.double().mean().item()) < 0.01

def test_probe_and_sweep_report_all_features(checkpoint, judge, folder, tmp_path):
    """A missing control, a random encoder at another K, a sweep unlike recon and probe."""
    flags = ["--ckpt", checkpoint, "--data", folder, "--keep", "16,64"]
    probed = run("probe", tmp_path, *flags, "--seeds", "2")["results"]
    recon, swept = (run(name, tmp_path, *flags, "--classifier", judge)["results"]
                    for name in ("recon", "sweep"))
    rows = {(row["encoder"], row["features"], row["keep"]): row for row in probed}
    assert len(rows) == 3 * 3 * 2 + 1 and ("random 1", "class token", 16) in rows
    assert rows["-", "pixels", "-"]["val_top1"] == 1, "the classes of this folder are colours"
    for row, other in zip(swept, recon, strict=True):
        assert {key: row[key] for key in other} == other
        assert row["probe_top1"] == rows["trained", "tokens", row["keep"]]["val_top1"]
    assert swept[0]["encoder_gmacs"] < swept[1]["encoder_gmacs"]
    assert Image.open(tmp_path / "sweep.png").width > 100
    with pytest.raises(UserError, match="--train-num"):
        run("probe", tmp_path, *flags, "--train-num", "1")

def test_multiply_adds_count_attention(checkpoint):
    """Attention that is not counted, FLOPs for multiply-adds."""
    encoder, conv = load_tokenizer(checkpoint).encoder, torch.nn.Conv2d(3, 5, 3, padding=1)
    q = torch.ones(1, 2, 7, 4)
    encoder.forward = lambda images, keep: (conv(images), F.scaled_dot_product_attention(q, q, q))
    assert multiply_adds(encoder, 8, 1) == 8 * 8 * 9 * 3 * 5 + 2 * 2 * 7 * 7 * 4

# finetune

def finetuned(checkpoint, folder, out, *more):
    record = run("finetune", out, "--ckpt", checkpoint, "--data", folder, "--batch-size", "12",
                 "--log-every", "1", *more)
    state, rows = read(out)
    return record, state, [row["loss"] for row in rows if "loss" in row]

def test_every_layer_has_its_learning_rate(checkpoint):
    """A parameter in no group or in two, the decay counted from the wrong end."""
    model = FineTuned(load_tokenizer(checkpoint).encoder, 64, 3, 0.1)
    groups = layer_groups(model, FinetuneConfig(layer_decay=0.5, weight_decay=0.1))
    group_of = {id(p): group for group in groups for p in group["params"]}
    total = sum(len(group["params"]) for group in groups)
    assert total == len(group_of) == len(list(model.parameters()))
    weights = [model.encoder.cls, *(block.mlp.up.weight for block in model.encoder.blocks),
               model.head.weight]
    scales = [group_of[id(weight)]["scale"] for weight in weights]
    assert scales == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(5, FinetuneConfig(lr=0.1, warmup=10), optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.06 * group["scale"] for group in groups])
    assert group_of[id(model.head.weight)]["weight_decay"] == 0.1
    assert group_of[id(model.head.bias)]["weight_decay"] == 0

def test_drop_path_skips_whole_branches():
    """Single values dropped, no scaling, a model that still drops in evaluation."""
    branch, x = torch.nn.Identity(), torch.ones(2000, 3, 2)
    branch.register_forward_hook(functools.partial(evaluation.drop_path, 0.25))
    torch.manual_seed(0)
    out = branch(x)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(out, out[:, :1, :1].expand_as(x))
    assert out.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(branch.eval()(x), x)

def test_mixup_keeps_images_and_labels_together():
    """A label share that is not the share of the picture, or of the wrong partner."""
    images = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    shares = set()
    for seed in range(20):
        mixed, targets = mix(images, torch.eye(2), 1.0, seed)
        torch.testing.assert_close((mixed.mean((1, 2, 3)) + 1) / 2, targets[:, 1])
        torch.testing.assert_close(targets.sum(1), torch.ones(2))
        shares.add(round(targets[0, 0].item(), 3))
    assert len(shares) > 10 and mix(images, torch.eye(2), 0.0, 0)[0] is images

def test_finetuning_reads_nothing_back(monkeypatch):
    """A value read back, or a CPU tensor mixed in: on the meta device both raise."""
    monkeypatch.setattr(MergeVQ, "init_weights", lambda self: None)
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: contextlib.nullcontext())
    with torch.device("meta"):
        encoder = MergeVQ(TokenizerConfig()).encoder
        model = FineTuned(encoder, 36, 10, 0.5)
        images, targets = torch.empty(4, 3, 32, 32), torch.empty(4, 10)
    images, targets = evaluation.mix(images, targets, 0.2, 0)
    F.cross_entropy(model(images)[1], targets).backward()
    assert all(p.grad is not None for p in model.parameters())

def test_finetune_learns_and_resumes(checkpoint, folder, tmp_path):
    """A head alone that trains, random numbers that a resumed run draws anew."""
    flags = "--drop-path 0.2 --mixup 1 --lr-schedule constant --max-steps".split()
    _, whole, losses = finetuned(checkpoint, folder, tmp_path / "whole", *flags, "4")
    finetuned(checkpoint, folder, tmp_path / "parts", *flags, "2")
    resumed = finetuned(checkpoint, folder, tmp_path / "parts", *flags, "4", "--resume")
    for part in ("model", "ema"):
        assert not difference(whole[part], resumed[1][part])
    assert losses == resumed[2] and len(losses) == 4
    flags = "--max-steps 40 --lr 3e-3 --warmup 5 --ema 0.9".split()
    record, state, _ = finetuned(checkpoint, folder, tmp_path / "plain", *flags)
    assert record["val_top1"] > 0.9 and record["num"] == 18 and record["keep"] == 64
    before, name = torch.load(checkpoint)["ema"], "encoder.stem.blocks.0.weight"
    assert record["tokenizer"] == weights_hash(before)
    assert not torch.equal(before[name], state["model"][name])

# speed, two processes

def test_speed_runs_all_modes(tmp_path):
    """A cache whose interface has changed, a ratio against the wrong reference."""
    flags = "--length 16 --keep 4 --width 16 --depth 1 --heads 2 --batch-size 2 --repeats 1"
    evaluation.main(["speed", "--device", "cpu", "--out", str(tmp_path), *flags.split()])
    rows = read_json(tmp_path, "speed.json")["results"]
    assert [row["mode"] for row in rows] == ["raster", "mergear", "randar"]
    raster, mergear, _ = rows
    assert raster["speedup"] == raster["cache_ratio"] == 1
    ratio = mergear["images_per_s"] / raster["images_per_s"]
    assert mergear["speedup"] == pytest.approx(ratio) and mergear["cache_ratio"] != 1

RANKS = """import sys
sys.path.insert(0, {root!r})
import eval as evaluation
evaluation.dist.destroy_process_group = lambda: None  # the next command goes on with it
for argv in {commands!r}:
    evaluation.main(argv)
"""

def test_two_ranks_equal_one_process(checkpoint, generator, judge, folder, tmp_path):
    """Images that two ranks measure or none does, means of means, samples seeded by rank."""
    common = ["--device", "cpu", "--workers", "0", "--data", folder, "--classifier", judge]
    lines = (f"recon --ckpt {checkpoint} --num 13 --batch-size 5",
             f"gen --ckpt {generator} --num 11 --cfg 2", f"sweep --ckpt {checkpoint} --keep 16,64")
    one, two = ([[*line.split(), *common, "--out", str(tmp_path / part)] for line in lines]
                for part in ("one", "two"))
    for argv in one:
        evaluation.main(argv)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.format(root=ROOT, commands=two))
    two_ranks(script, [])
    for name in ("recon", "gen", "sweep"):
        results = [read_json(tmp_path, part, f"{name}.json")["results"] for part in ("one", "two")]
        for a, b in zip(*results, strict=True):
            assert a.pop("per_class", 0) == b.pop("per_class", 0)
            assert a.pop("source", 0) == b.pop("source", 0)
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9), name
