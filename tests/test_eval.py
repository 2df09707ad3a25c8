"""Tests of eval.py and recovery.py: one property each, on the CPU. The docstring of a test names the bug it catches.

    python -m pytest -q tests/test_eval.py
"""

import json
import math
import os
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
from eval import (Classifier, bit_balance, eight_bit, frechet_distance, from_uint8, inception_score, load_classifier, psnr,
                  read_samples, ssim)
from mergear import GPT, GPTConfig
from recovery import merge_map, source_accuracy
from tokenizer import MergeVQ, TokenizerConfig, bit_statistics, load_tokenizer, save_checkpoint, weights_hash

torch.set_num_threads(1)


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
        torch.testing.assert_close(torch.cat([metric(a[i:i + 1], b[i:i + 1]) for i in range(4)]), metric(a, b), rtol=1e-12, atol=0)
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


def read_json(*path):
    with open(os.path.join(*path)) as f:
        return json.load(f)


def test_recon_writes_what_it_says(checkpoint, tmp_path, capsys):
    """A table that differs from the file, a record that lacks what one needs to compare, a batch that is dropped."""
    results = []
    for batch_size in (20, 7):
        out = str(tmp_path / str(batch_size))
        evaluation.main(["recon", "--ckpt", checkpoint, "--num", "20", "--keep", "16,64", "--batch-size", str(batch_size),
                         "--device", "cpu", "--out", out])
        record = read_json(out, "recon.json")
        results.append(record["results"])
        assert Image.open(os.path.join(out, "recon.png")).width > 100
        text = capsys.readouterr().out
        for row in record["results"]:
            assert f"{row['psnr']:.2f}" in text and f"{row['perplexity']:.1f}" in text
    assert record["num"] == 20 and record["size"] == 16 and record["data"] == "shapes" and record["dtype"] == "float32"
    assert record["seed"] == 0 and record["weights"] == "ema" and "--keep 16,64" in record["command"]
    assert record["tokenizer"] == weights_hash(torch.load(checkpoint)["ema"])
    assert [row["keep"] for row in results[0]] == [16, 64]
    for a, b in zip(*results):
        assert a == pytest.approx(b, rel=1e-4), "the numbers depend on the batch size"
        assert a["codes_seen"] == 20 * a["keep"] and 0 < a["usage"] <= 1 and 0 <= a["recovery_accuracy"] <= 1


def test_recon_equals_the_definition(checkpoint, tmp_path):
    """Usage of the last batch only, metrics of other images than the centre crops, an unweighted mean over batches."""
    evaluation.main(["recon", "--ckpt", checkpoint, "--num", "10", "--keep", "25", "--batch-size", "4", "--device", "cpu",
                     "--out", str(tmp_path)])
    row, = read_json(tmp_path, "recon.json")["results"]
    model = load_tokenizer(checkpoint)
    dataset = evaluation.build_dataset("shapes", "val", 16, train=False, seed=0)
    images = torch.stack([dataset[i][0] for i in range(10)])
    with torch.no_grad():
        encoded = model.encode(images)
        decoded = model.decode(encoded.codes, encoded.source)
    assert row["psnr"] == pytest.approx(psnr(decoded, images).mean().item(), rel=1e-4)
    assert row["ssim"] == pytest.approx(ssim(decoded, images).mean().item(), rel=1e-4)
    assert row["usage"] == pytest.approx(len(encoded.codes.unique()) / 64)
    assert row["recovery_accuracy"] == pytest.approx(source_accuracy(model.recover(encoded.codes), encoded.source))
    assert (row["bit_imbalance"], row["dead_bits"]) == pytest.approx(bit_statistics(encoded.codes, 6))


def test_maps_writes_a_picture(checkpoint, tmp_path):
    """Rows or columns left out, small images not enlarged."""
    evaluation.main(["maps", "--ckpt", checkpoint, "--keep", "16,64", "--num", "3", "--device", "cpu", "--out", str(tmp_path)])
    picture = Image.open(tmp_path / "maps.png")
    assert picture.width >= 3 * 128 and picture.height >= 3 * 128  # the images and two maps of each
    assert len(np.unique(np.asarray(picture))) > 10


def test_classifier_learns_and_loads(tmp_path, capsys):
    """A checkpoint that lacks the class names, a load that leaves it in training mode, labels shifted by one."""
    out = str(tmp_path / "classifier")
    evaluation.main(["train-classifier", "--size", "16", "--max-steps", "30", "--batch-size", "32", "--device", "cpu", "--out", out])
    model, state = load_classifier(os.path.join(out, "ckpt.pt"))
    assert not model.training and state["class_names"][3] == "star" and state["config"]["num_classes"] == 10
    assert state["val_accuracy"] > 0.15, "no better than chance"
    dataset = evaluation.build_dataset("shapes", "val", 16, train=False)
    images = torch.stack([dataset[i][0] for i in range(200)])
    np.savez(tmp_path / "samples.npz", evaluation.to_uint8(images), np.arange(200) % 10)
    evaluation.main(["gen", "--samples", str(tmp_path / "samples.npz"), "--num", "0", "--classifier", f"{out}/ckpt.pt",
                     "--device", "cpu", "--out", str(tmp_path / "gen")])
    record = read_json(tmp_path, "gen", "gen.json")
    with torch.no_grad():
        expected = (model(images).argmax(1) == torch.arange(200) % 10).double().mean().item()
    assert record["num"] == 200 and record["val_accuracy"] == state["val_accuracy"]
    assert record["results"][0]["agreement"] == pytest.approx(expected, abs=0.011)  # 8 bits may move an image over a border
    assert set(record["results"][0]["per_class"]) == set(state["class_names"])


def test_gen_draws_and_judges(checkpoint, tmp_path):
    """Labels of another batch beside the images, images that depend on --batch-size, a cfg that is recorded but not used."""
    torch.manual_seed(0)
    path, judge = str(tmp_path / "gpt.pt"), str(tmp_path / "classifier.pt")
    config = GPTConfig(mode="raster", width=16, depth=1, heads=2, bits=6, length=64, num_classes=10, keep=25, keeps=(16, 25, 36))
    state = torch.load(checkpoint)
    gpt = GPT(config)
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    save_checkpoint(path, "generator", config=vars(config), ema=gpt.state_dict(), tokenizer=dict(config=state["config"], ema=state["ema"]))
    save_checkpoint(judge, "classifier", model=Classifier(16, 10).state_dict(), class_names=list("abcdefghij"), val_accuracy=0.1,
                    val_num=1000, config=dict(size=16, num_classes=10))
    records = []
    for batch_size in (12, 5):
        out = str(tmp_path / str(batch_size))
        evaluation.main(["gen", "--ckpt", path, "--classifier", judge, "--num", "12", "--cfg", "1,2.5", "--batch-size", str(batch_size),
                         "--device", "cpu", "--out", out])
        records.append(read_json(out, "gen.json"))
        assert {"samples_cfg1.png", "samples_cfg2.5.png"} < set(os.listdir(out))
    assert records[0]["results"] == records[1]["results"]
    assert [row["cfg"] for row in records[0]["results"]] == [1.0, 2.5] and records[0]["seed"] == 0
    assert records[0]["generator"] == weights_hash(gpt.state_dict()) and records[0]["tokenizer"] == weights_hash(state["ema"])
    with open(tmp_path / "12" / "samples_cfg1.png", "rb") as a, open(tmp_path / "12" / "samples_cfg2.5.png", "rb") as b:
        assert a.read() != b.read()


@pytest.mark.parametrize("size", (8, 16, 32, 64, 96, 256))
def test_classifier_at_any_size(size):
    """A stage too many: pooling a map of one pixel fails only for small images."""
    assert Classifier(size, 7)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_eight_bit_round_trip(tmp_path):
    """Channels last, the range, or a float left unrounded: samples from memory and from a file would be judged apart."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), dtype=np.uint8)
    assert np.array_equal(evaluation.to_uint8(from_uint8(pixels)), pixels)
    images = random_images(2)
    rounded = eight_bit(images)
    assert (rounded - images).abs().max() <= 1 / 255 + 1e-6
    np.savez(tmp_path / "s.npz", evaluation.to_uint8(images), np.array([4, 2]))
    read, labels = read_samples(tmp_path / "s.npz", 0)
    assert torch.equal(read, rounded) and labels.tolist() == [4, 2]
    assert len(read_samples(tmp_path / "s.npz", 1)[0]) == 1


MISTAKES = {
    "no command": (evaluation, [], "recon"),
    "unknown command": (evaluation, ["frobnicate"], "frobnicate"),
    "unknown flag": (evaluation, ["recon", "--kep", "3"], "--kep"),
    "no checkpoint": (evaluation, ["recon", "--ckpt", "no/where.pt"], "no/where.pt"),
    "other kind": (evaluation, ["gen", "--classifier", "CKPT"], "classifier"),
    "keep > L": (evaluation, ["maps", "--ckpt", "CKPT", "--keep", "65"], "--keep"),
    "keep is no number": (evaluation, ["recon", "--ckpt", "CKPT", "--keep", "16,many"], "--keep"),
    "negative number": (evaluation, ["recon", "--ckpt", "CKPT", "--num", "-3"], "--num"),
    "cfg is nan": (evaluation, ["gen", "--cfg", "nan"], "--cfg"),
    "top-p above 1": (evaluation, ["gen", "--top-p", "1.5"], "--top-p"),
    "no such data": (evaluation, ["recon", "--ckpt", "CKPT", "--data", "no/such"], "no/such"),
    "no such device": (evaluation, ["recon", "--ckpt", "CKPT", "--device", "cuda:99"], "cuda:99"),
    "recovery: keep > L": (recovery, ["--ckpt", "CKPT", "--keep", "65"], "--keep"),
    "recovery: no checkpoint": (recovery, ["--ckpt", "no/where.pt"], "no/where.pt"),
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


def test_a_damaged_model_is_an_error(checkpoint, tmp_path):
    """NaN weights that give a table of nan, or worse a JSON file with numbers in it."""
    state = torch.load(checkpoint)
    state["ema"]["decoder.conv_out.bias"].fill_(math.nan)
    torch.save(state, tmp_path / "ckpt.pt")
    for module, argv in ((evaluation, ["recon"]), (recovery, [])):
        with pytest.raises(UserError, match="not finite"):
            module.main([*argv, "--ckpt", str(tmp_path / "ckpt.pt"), "--num", "4", "--device", "cpu", "--out", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("module,argv", [(evaluation, ["--help"]), (evaluation, ["gen", "--help"]), (recovery, ["--help"])])
def test_help(module, argv, capsys):
    """A % in a help text."""
    with pytest.raises(SystemExit) as stop:
        module.main(argv)
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
