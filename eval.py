"""Measure what the other scripts made. One command each:

    python eval.py train-classifier                # a small CNN that knows the classes
    python eval.py recon                           # PSNR, SSIM, r-Frechet, code usage on val
    python eval.py recon --keep 16,36,64 --num 200 # several K, 200 of the images
    python eval.py maps                            # pictures: which patches became one token
    python eval.py gen --cfg 1,2,3                 # generator against training images: Frechet,
                                                   # IS, precision, recall, class agreement
    python eval.py gen --samples samples.npz       # the same for images drawn before
    python eval.py stats                           # mu and sigma of the training images
    python eval.py probe                           # linear probe, next to a random encoder
    python eval.py finetune                        # the whole encoder, trained as a classifier
    python eval.py sweep                           # quality and probe against K (Table 4)
    python eval.py ablate-source                   # true or predicted source (Table 5)
    python eval.py speed                           # decoding in the three modes, as ratios

    torchrun --nproc_per_node=8 -- eval.py recon --ckpt out/g/ckpt.pt --num 50000 \\
        --features inception --inception-weights download

The Frechet distance compares the features that a fixed network sees in two sets of images. Which
network, says --features. With `inception` the distance has the name FID and compares with
published numbers. With `classifier` (a network of train-classifier) it has the name fd and
compares within one data set only. FID is defined on 50,000 images; another number is part of the
name: FID-10k, fd-1000.

--ckpt takes a tokenizer's checkpoint or a generator's, which holds its tokenizer. Each command
writes a JSON file to --out with the numbers and what one must know to compare them. All metrics
are float64 sums over images: they do not depend on the batch size or the number of processes.

In reading order: metrics, Inception, features, recon and maps, stats and gen, probe, finetune,
sweep and ablate-source, speed, flags. Axis letters: B batch, N images, L full tokens, K kept
tokens, D width, d code bits, C classes.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections import defaultdict
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (Metrics, Parser, RunConfig, UserError, adamw, arg, batches, build_dataset,
                  catch_signals, end_run, from_uint8, gather_rows, image_grid, learning_rate,
                  load_checkpoint, load_parts, loader_workers, make_folder, micro_batch, open_out,
                  parallel, parse_config, plot_rows, presets, run_main, save_checkpoint, seeded,
                  start_run, step_if_finite, subset, to_uint8, update_ema, val_batches,
                  weights_hash)
from mergear import GPT, MODES, GPTConfig, draw_images, load_generator, sample_codes
from tokenizer import (MergeVQ, ResBlock, TokenizerConfig, bit_balance, code_statistics,
                       codes_to_bits, first_position_of_token, lfq_entropy, load_lpips,
                       load_tokenizer, load_weights, merge_schedule, nearest_first, psnr)

# -----------------------------------------------------------------------------
# Metrics: plain functions of tensors or arrays

def check_finite(name, values):
    """The values as a float64 tensor. Raises UserError: a metric never hides a NaN."""
    values = torch.as_tensor(values).double()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise UserError(f"{name}: {bad} of {values.numel()} values are not finite: the weights, "
                        "the images or the reference may be damaged")
    return values

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, the F of FID (1706.08500). mu (D,), sigma (D,D).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). Raises UserError on values that
    are not finite, or on sides of different networks.
    """
    parts = dict(mu1=mu1, sigma1=sigma1, mu2=mu2, sigma2=sigma2)
    parts = [check_finite(name, x).cpu().numpy() for name, x in parts.items()]
    mu1, sigma1, mu2, sigma2 = parts
    if mu1.shape != mu2.shape:
        raise UserError(f"Frechet distance of {len(mu1)} and {len(mu2)} features: make both sides "
                        "with the same network")
    # The trace of the root is the sum of the roots of the eigenvalues of sigma1 sigma2. With
    # sigma1 = A A^T they are those of the symmetric A^T sigma2 A: real and not negative. No root
    # of a singular matrix is taken, so fewer images than features are no problem.
    values, vectors = scipy.linalg.eigh(sigma1)
    rounding = values.max() * len(values) * np.finfo(np.float64).eps
    kept = values > rounding
    A = vectors[:, kept] * np.sqrt(values[kept])                              # (D,rank)
    cross = 0.0
    if kept.any():
        cross = np.sqrt(scipy.linalg.eigvalsh(A.T @ sigma2 @ A).clip(0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return float(distance)

class Moments:
    """Mean and covariance of rows that come in batches. float64 sums over rows, so neither the
    batch size nor the number of processes matters."""

    def __init__(self):
        self.num, self.sum, self.outer = 0, 0.0, 0.0

    def add(self, rows):  # (B,D) float64
        self.num += len(rows)
        self.sum += rows.sum(0)
        self.outer += rows.T @ rows

    def statistics(self, run):
        """Over the rows of all ranks: mu (D,), sigma (D,D). sigma divides by N - 1."""
        parts = [torch.as_tensor(x) for x in (self.num, self.sum, self.outer)]
        num, total, outer = (gather_rows(x[None], run).sum(0) for x in parts)
        if num < 2:
            raise UserError("the covariance of 1 image is not defined: pass a larger --num, or "
                            "--features none")
        mu = total / num
        return mu, (outer - num * torch.outer(mu, mu)) / (num - 1)

def inception_score(probs, splits=10, seed=0):
    """Inception Score (1606.03498): exp of the mean KL(p(class|image) || p(class)).

    probs (N,C), one class distribution per image. Returns (mean, std) over `splits` parts.
    """
    p = check_finite("probs", probs).cpu()
    if not 1 <= splits <= len(p):
        raise UserError(f"Inception Score of {len(p)} images in {splits} splits: pass more images")
    assert p.min() >= 0 and (p.sum(1) - 1).abs().max() < 1e-3, "rows must be distributions"
    # Samples often lie sorted by class, and a part of few classes scores too low. Sorting by
    # value before the shuffle makes the score independent of the order of the file.
    keys = [row.tobytes() for row in p.numpy().astype(">f8")]  # big-endian bytes sort as numbers
    p = p[sorted(range(len(p)), key=keys.__getitem__)]
    p = p[torch.randperm(len(p), generator=seeded(seed))]
    scores = []
    for part in p.tensor_split(splits):
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()

def neighbour_radius(x, k, chunk):
    """Distance of each row of x (N,D) to its k-th nearest other row. (N,)"""
    distances = [torch.cdist(part, x) for part in x.split(chunk)]
    # each row is its own nearest neighbour, so one more is asked for
    return torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in distances])

def covered(x, centres, k, chunk):
    """Share of the rows of x that lie in the ball of at least one centre."""
    radius = neighbour_radius(centres, k, chunk)
    inside = [(torch.cdist(part, centres) <= radius).any(1) for part in x.split(chunk)]
    return torch.cat(inside).double().mean().item()

def precision_recall(real, fake, k=3, chunk=1000):
    """Improved precision and recall (1904.06991): features real (N,D), fake (M,D) -> two floats.

    Precision: the share of fakes inside a ball around a real image, whose radius reaches its k-th
    nearest real neighbour. Recall: the same with the roles exchanged. Both grow with the number
    of balls: compare at equal N and M.
    """
    real = check_finite("real features", real)
    fake = check_finite("fake features", fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall of {len(real)} and {len(fake)} images: {k} "
                        f"neighbours need at least {k + 1} images")
    return covered(fake, real, k, chunk), covered(real, fake, k, chunk)

def ssim(a, b):
    """Structural similarity of each image: (B,3,H,W) in [-1,1] twice -> (B,) float64.

    As in Wang et al. 2004: Gaussian windows of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, the mean
    over the windows inside the image.
    """
    assert a.shape == b.shape, f"{tuple(a.shape)}, {tuple(b.shape)}"
    if min(a.shape[-2:]) < 11:
        raise UserError(f"SSIM of images of {tuple(a.shape[-2:])}: pass at least 11 px per side")
    a = a.double().clamp(-1, 1).cpu().numpy()
    b = b.double().clamp(-1, 1).cpu().numpy()
    moments = np.stack([a, b, a * a, b * b, a * b])                           # (5,B,3,H,W)
    blurred = scipy.ndimage.gaussian_filter(moments, sigma=1.5, radius=5, axes=(-2, -1))
    mean_a, mean_b, aa, bb, ab = blurred[..., 5:-5, 5:-5]
    var_a, var_b, cov = aa - mean_a ** 2, bb - mean_b ** 2, ab - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the values span 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    contrast = (2 * cov + c2) / (var_a + var_b + c2)
    return torch.from_numpy((luminance * contrast).mean((1, 2, 3)))

def source_accuracy(predicted, source):
    """Share of positions given to the right token: (B,L) int64 twice -> (B,) float64."""
    assert predicted.shape == source.shape, f"{tuple(predicted.shape)}, {tuple(source.shape)}"
    return (predicted == source).double().mean(1)

# -----------------------------------------------------------------------------
# FID's network: the InceptionV3 (1512.00567) that TensorFlow published in 2015. Modules have the
# names of pytorch-fid's weight file.

class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. Stride 1 keeps the size unless a
    padding is given."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = (kernel[0] // 2, kernel[1] // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

def average_pool(x):  # as in TensorFlow, the average leaves the padding out
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

class Mixed(nn.Module):
    """Branches side by side, joined along the channels: (B,c,h,w) -> (B,*,h',w').

    branches: {name: [(width, kernel), ...]}, one convolution after the other. A list of kernels
    is a fork: its convolutions read the same input. branch_pool reads the pooled input. With
    reduce each branch ends with stride 2, and one more branch is the maximum of the input.
    """

    def __init__(self, c, branches, shrink, reduce=False, pool=average_pool):
        super().__init__()
        self.reduce, self.pool, self.branches = reduce, pool, {}
        for branch, convs in branches.items():
            width_in, self.branches[branch] = c, []
            for i, (width, kernels) in enumerate(convs):
                width = width // shrink
                kernels = kernels if isinstance(kernels, list) else [kernels]
                stride = 2 if reduce and i == len(convs) - 1 else 1
                names = []
                for letter, kernel in zip("ab", kernels):
                    name = f"{branch}_{i + 1}" if len(convs) > 1 else branch
                    name += letter if len(kernels) > 1 else ""
                    self.add_module(name, ConvNorm(width_in, width, kernel, stride))
                    names.append(name)
                self.branches[branch].append(names)
                width_in = width

    def forward(self, x):
        joined = [F.max_pool2d(x, 3, stride=2)] if self.reduce else []
        outputs = []
        for branch, steps in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for names in steps[:-1]:
                y = self.get_submodule(names[0])(y)
            outputs += [self.get_submodule(name)(y) for name in steps[-1]]
        return torch.cat(outputs + joined, dim=1)

def mixed_a(pool):  # 35 x 35
    return dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool, 1)])

def mixed_c(c):  # 17 x 17: 7x7 convolutions as pairs of 1x7 and 7x1
    across, down = (1, 7), (7, 1)
    return dict(branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, across), (192, down)],
                branch7x7dbl=[(c, 1), (c, down), (c, across), (c, down), (192, across)],
                branch_pool=[(192, 1)])

FORK = [(1, 3), (3, 1)]
MIXED_B = dict(branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])  # to 17 x 17
MIXED_D = dict(branch3x3=[(192, 1), (320, 3)],                                  # to 8 x 8
               branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
MIXED_E = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, FORK)],         # 8 x 8
               branch3x3dbl=[(448, 1), (384, 3), (384, FORK)], branch_pool=[(192, 1)])

class FIDInception(nn.Module):
    """images (B,3,H,W) in [-1,1] of any size -> features (B,2048), logits (B,1008), float32.

    As in pytorch-fid the images are resized to 299 x 299, bilinear, without antialias. The logits
    leave out the bias of the last layer, as the Inception Score's first code does. shrink divides
    all widths, for tests.
    """

    def __init__(self, shrink=1):
        super().__init__()
        w = shrink
        self.Conv2d_1a_3x3 = ConvNorm(3, 32 // w, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32 // w, 32 // w, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32 // w, 64 // w, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64 // w, 80 // w, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80 // w, 192 // w, 3, padding=0)
        max_pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.Mixed_5b = Mixed(192 // w, mixed_a(32), w)
        self.Mixed_5c = Mixed(256 // w, mixed_a(64), w)
        self.Mixed_5d = Mixed(288 // w, mixed_a(64), w)
        self.Mixed_6a = Mixed(288 // w, MIXED_B, w, reduce=True)
        self.Mixed_6b = Mixed(768 // w, mixed_c(128), w)
        self.Mixed_6c = Mixed(768 // w, mixed_c(160), w)
        self.Mixed_6d = Mixed(768 // w, mixed_c(160), w)
        self.Mixed_6e = Mixed(768 // w, mixed_c(192), w)
        self.Mixed_7a = Mixed(768 // w, MIXED_D, w, reduce=True)
        self.Mixed_7b = Mixed(1280 // w, MIXED_E, w)
        self.Mixed_7c = Mixed(2048 // w, MIXED_E, w, pool=max_pool)
        self.fc = nn.Linear(2048 // w, 1008)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            x = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = F.max_pool2d(x, 3, stride=2)
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
            x = F.max_pool2d(x, 3, stride=2)                                  # (B,192,35,35)
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            x = self.Mixed_6e(self.Mixed_6d(x))                               # (B,768,17,17)
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                # (B,2048,8,8)
            features = x.mean((2, 3))
            return features, features @ self.fc.weight.T

def load_inception(path, device="cpu", shrink=1):
    """pytorch-fid's weight file, or `download` -> FIDInception, frozen. Raises UserError."""
    net = FIDInception(shrink)
    return load_weights("inception", path, net, unused=("num_batches_tracked",)).to(device)

# -----------------------------------------------------------------------------
# Features: what a fixed network sees in an image. Frechet distance, IS, precision and recall
# look at nothing else.

CLASSIFIER = "out/classifier/ckpt.pt"

class Classifier(nn.Module):
    """Small residual CNN: images (B,3,size,size) -> features (B,D), logits (B,C)."""

    def __init__(self, size, num_classes, width=32):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 3, stride=2, padding=1)], width
        for i in range(max(2, round(math.log2(size / 4)))):  # the last stage: about 4 x 4
            c_out = width * min(2 ** i, 4)
            layers += [nn.AvgPool2d(2)] * (i > 0) + [ResBlock(c, c_out, groups=8)]
            c = c_out
        self.features = nn.Sequential(*layers, nn.GroupNorm(8, c), nn.SiLU())
        self.to_logits = nn.Linear(c, num_classes)

    def forward(self, images):
        pooled = self.features(images).mean((2, 3))
        return pooled, self.to_logits(pooled)

def load_classifier(path, device="cpu"):
    """Checkpoint of train-classifier -> (Classifier, frozen, in eval mode; its other entries)."""
    state = load_checkpoint(path, "classifier")
    config = state["config"]
    model = Classifier(config["size"], config["num_classes"], config.get("width", 32))
    load_parts(path, state, model=model)
    return model.to(device).eval().requires_grad_(False), state

@torch.no_grad()
def accuracy(model, labelled, run):
    """Share of images whose label is the highest logit, over batches (images, labels)."""
    hits = []
    for images, labels in labelled:
        logits = check_finite("logits", model(images)[1].cpu())
        hits.append(logits.argmax(1) == labels.cpu())
    return gather_rows(torch.cat(hits), run).double().mean().item()

class Features(NamedTuple):
    """A frozen network, and how the numbers that come from it are called."""
    network: nn.Module  # images (B,3,H,W) -> features (B,D), logits (B,C)
    frechet: str        # fd, or FID for Inception
    score: str          # is-clf, or IS
    judge: dict         # checkpoint of the classifier; empty for Inception
    record: dict        # for the result file

    def r_name(self, num):  # of reconstructions: rFID, rfd-1000
        return labelled("r" + self.frechet, num)

    @torch.no_grad()
    def __call__(self, images):
        """images on any device -> features (B,D), logits (B,C): float64 on the CPU."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            features, logits = self.network(images.to(device).float())
        return check_finite("features", features.cpu()), check_finite("logits", logits.cpu())

def open_features(args, size, run, required=False):
    """--features for images of `size` px (0: any) -> Features. None for `none`, and where nobody
    has trained the default classifier, unless `required`."""
    # TF32 moves the features in the third digit
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if args.features == "none":
        return None
    judge, names = {}, ("FID", "IS")
    if args.features == "inception":
        network = load_inception(args.inception_weights, run.device)
    elif not required and args.classifier == CLASSIFIER and not os.path.exists(CLASSIFIER):
        print(f"no Frechet distance, as there is no {CLASSIFIER}: python eval.py train-classifier")
        return None
    else:
        network, judge = load_classifier(args.classifier, run.device)
        names, seen = ("fd", "is-clf"), judge["config"]["size"]
        if size not in (0, seen):
            raise UserError(f"--classifier {args.classifier} judges images of {seen} px, but these "
                            f"have {size} px: train one on the same --data and --size")
    record = dict(features=args.features, features_hash=weights_hash(network.state_dict()))
    if judge:
        record.update(classifier=args.classifier, val_accuracy=judge["val_accuracy"])
    return Features(network, *names, judge, record)

def labelled(name, num):
    """FID of 10,000 images -> "FID-10k". Only the customary 50,000 have the bare name."""
    if num == 50_000:
        return name
    return f"{name}-{num // 1000}k" if num >= 10_000 and num % 1000 == 0 else f"{name}-{num}"

def eight_bit(images):
    """Images as a file would hold them: (B,3,H,W) rounded to 8 bits, on the CPU."""
    check_finite("images", images.cpu())
    return from_uint8(to_uint8(images))

def train_classifier(args, argv):
    args.resume, args.accum, args.lr_schedule, args.weight_decay = False, 1, "cosine", 0.05
    run = start_run(args)
    if run.world > 1:
        raise UserError("train-classifier runs on one process: start it without torchrun")
    train_set = build_dataset(args.data, "train", args.size, train=True, seed=args.seed)
    val_set = build_dataset(args.data, "val", args.size, train=False)
    need_classes(train_set, args)
    passes = args.epochs * len(train_set) // args.batch_size
    args.max_steps = args.max_steps or max(1, passes)
    args.warmup = args.max_steps // 10
    open_out(args, run, "classifier")
    torch.manual_seed(args.seed)
    model = Classifier(args.size, train_set.num_classes, args.width).to(run.device)
    optimizer = adamw(model.parameters(), args, betas=(0.9, 0.99))
    stream = batches(train_set, args, run)
    bar = tqdm(range(args.max_steps), dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        images, labels = next(stream)
        with run.autocast():
            _, logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{check_finite('loss', loss.detach()).item():.3f}")
    val = accuracy(model.eval(), images_of(val_set, 0, args, run, "val"), run)
    config = dict(vars(args), num_classes=train_set.num_classes)
    save_checkpoint(f"{args.out}/ckpt.pt", "classifier", config=config, model=model.state_dict(),
                    class_names=list(train_set.class_names), val_accuracy=val, val_num=len(val_set))
    print(f"{val:.2%} of {len(val_set)} val images right; wrote {args.out}/ckpt.pt")

# -----------------------------------------------------------------------------
# What the measuring commands share

def need_classes(dataset, args):
    if dataset.num_classes < 2:
        raise UserError(f"--data {args.data} has no classes to tell apart: pass class folders")

def open_tokenizer(args):
    """--ckpt, of a tokenizer or a generator -> (MergeVQ, val data set, Run).

    Fills in the flags whose default the checkpoint knows.
    """
    kind = ""
    with contextlib.suppress(Exception):  # load_tokenizer says what is wrong with the file
        kind = torch.load(args.ckpt, mmap=True, weights_only=True)["kind"]
    generator = kind == "generator"
    model = load_generator(args.ckpt)[1] if generator else load_tokenizer(args.ckpt)
    config = model.config
    args.data = args.data or config.data
    dataset = build_dataset(args.data, "val", config.size, train=False)
    args.num = min(args.num, len(dataset)) or len(dataset)
    for keep in args.keep:
        merge_schedule(config.length, keep, config.depth)  # UserError on a K out of reach
    run = start_run(args)
    return model.to(run.device), dataset, run

def images_of(dataset, num, args, run, title=""):
    """(images, labels) of `num` images drawn by --seed (0: all): this rank's share, in batches."""
    rows = subset(len(dataset), num, args.seed)
    return val_batches(dataset, rows, args.batch_size, run, loader_workers(args), title)

def write_results(args, argv, run, unreadable=(), **results):
    """OUT/COMMAND.json: the results, and what one must know to compare them with others."""
    dtype = str(run.dtype).removeprefix("torch.")
    record = dict(command=shlex.join(["python", "eval.py", *argv]), checkpoint=args.ckpt,
                  data=args.data, num=args.num, seed=args.seed, device=str(run.device),
                  dtype=dtype, torch=torch.__version__, unreadable=len(unreadable))
    path = f"{args.out}/{args.command}.json"
    with open(f"{path}.tmp", "w") as file:
        json.dump({**record, **results}, file, indent=1, allow_nan=False)
    os.replace(f"{path}.tmp", path)
    print(f"wrote {path}")

def print_table(rows):
    """Dicts -> aligned columns, in the order of the keys. A missing key is printed as -."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row)
               if not any(isinstance(row.get(key), dict) for row in rows)]
    lines = [[key.replace("_", " ") for key in columns]]
    for row in rows:
        values = [row.get(key, "-") for key in columns]
        lines.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in values])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))

# -----------------------------------------------------------------------------
# recon and maps: how well the tokenizer gives images back, and which patches merge

def source_maps(model, encoded):
    """{name: source (B,L)}: the true map, the predicted one (Eq. 8), and one without a network."""
    first = first_position_of_token(encoded.source, encoded.codes.shape[1])   # (B,K)
    return {"true": encoded.source, "predicted": model.recover(encoded.codes, first),
            "nearest first": nearest_first(first, encoded.source.shape[1])}

@torch.no_grad()
def reconstruct(model, dataset, keeps, args, run, features=None, lpips=None, names=("true",)):
    """Encode and decode --num val images at each K, with each source map of `names`.

    Returns (a dict of measures per K and map, what to record with them), over all ranks. The
    reference of the Frechet distance are the same crops.
    """
    bits, cases = model.config.bits, [(keep, name) for keep in keeps for name in names]
    values, moments, real = defaultdict(list), defaultdict(Moments), Moments()
    counts = {keep: torch.zeros(2 ** bits, dtype=torch.long) for keep in keeps}
    for images, _ in images_of(dataset, args.num, args, run, "reconstruct"):
        if features:
            real.add(features(images)[0])
        for keep in keeps:
            with run.autocast():
                encoded = model.encode(images, keep)
                sources = source_maps(model, encoded)
            codes = encoded.codes.flatten().cpu()
            counts[keep] += torch.bincount(codes, minlength=2 ** bits)
            predicted = source_accuracy(sources["predicted"], encoded.source)
            for name in names:
                with run.autocast():
                    decoded = model.decode(encoded.codes, sources[name]).float()
                pair = decoded.cpu(), images.cpu()
                columns = [psnr(*pair), ssim(*pair), predicted,
                           source_accuracy(sources[name], encoded.source)]
                if lpips:
                    columns.append(lpips(decoded.clamp(-1, 1), images))
                columns = [column.double().cpu() for column in columns]
                values[keep, name].append(torch.stack(columns, dim=1))        # (B,4 or 5)
                if features:
                    moments[keep, name].add(features(eight_bit(decoded))[0])

    rows, record = [], {}
    if features:
        reference = real.statistics(run)
        record = dict(features.record, reference="the same val crops",
                      reference_hash=reference_hash(*reference))
    for keep, name in cases:
        table = gather_rows(torch.cat(values[keep, name]), run)
        # equal images have an infinite PSNR, which JSON cannot hold
        check_finite(f"measures at K = {keep}", table.masked_fill(table == math.inf, 0))
        means = dict(zip(("psnr", "ssim", "recovery", "accuracy", "lpips"), table.mean(0).tolist()))
        means["psnr"] = min(means["psnr"], PSNR_OF_EQUAL)
        seen = gather_rows(counts[keep][None], run).sum(0)
        usage, perplexity = code_statistics(seen)
        imbalance, dead = bit_balance(seen, bits)
        row = dict(keep=keep, source=name, **means, usage=float(usage),
                   perplexity=float(perplexity), bit_imbalance=float(imbalance),
                   dead_bits=int(dead), codes_seen=int(seen.sum()))
        if features:
            generated = moments[keep, name].statistics(run)
            row[features.r_name(args.num)] = frechet_distance(*reference, *generated)
        rows.append(row)
    return rows, record

PSNR_OF_EQUAL = 999.0

def recon(args, argv):
    model, dataset, run = open_tokenizer(args)
    config, lpips = model.config, None
    if args.lpips_weights:
        lpips = load_lpips(args.lpips_weights, args.vgg_weights, run.device)
    features = open_features(args, config.size, run)
    make_folder(args.out)
    keeps = args.keep or sorted({config.keep, config.length})
    rows, record = reconstruct(model, dataset, keeps, args, run, features, lpips)
    if not run.main:
        return
    print_table(rows)
    write_results(args, argv, run, dataset.unreadable(), size=config.size, bits=config.bits,
                  tokenizer=weights_hash(model.state_dict()), **record, results=rows)
    images, rows = pick_images(dataset, 8, args.seed), []
    with torch.no_grad(), run.autocast():
        for keep in keeps:
            encoded = model.encode(images.to(run.device), keep)
            rows.append(model.decode(encoded.codes, encoded.source).float().cpu())
    titles = ["original", *(f"K = {keep}" for keep in keeps)]
    image_grid([images, *rows], f"{args.out}/recon.png", row_titles=titles)

def pick_images(dataset, num, seed):
    """`num` images for a picture, drawn by the seed. (num,3,H,W)"""
    order = np.random.default_rng(seed).permutation(len(dataset))
    return torch.stack([dataset[int(i)][0] for i in order[:num]])

def enlarge(x, scale):
    """(B,C,H,W) with every pixel `scale` times in both directions."""
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

def merge_map(images, source, scale=1):
    """Which positions one token stands for: images (B,3,H,W), source (B,L) -> pictures
    (B,3,H*scale,W*scale). Each token's region has the mean colour of its pixels and a border.
    """
    B, _, H, _ = images.shape
    side = math.isqrt(source.shape[1])
    cell = H // side * scale
    S = F.one_hot(source).to(images.dtype)                                    # (B,L,K), S^T
    mean = F.adaptive_avg_pool2d(images, side).flatten(2) @ S                 # (B,3,K)
    mean = mean / S.sum(1, keepdim=True).clamp_min(1)
    fill = enlarge((mean @ S.transpose(1, 2)).view(B, 3, side, side), cell)
    token = enlarge(source.view(B, 1, side, side), cell)
    border = torch.zeros_like(token, dtype=torch.bool)
    border[..., 1:, :] |= token[..., 1:, :] != token[..., :-1, :]
    border[..., :, 1:] |= token[..., :, 1:] != token[..., :, :-1]
    light = fill.mean(1, keepdim=True) > -0.3
    line = torch.where(light, fill * 0.4 - 0.6, fill * 0.5 + 0.5)
    return torch.where(border, line, fill)

@torch.no_grad()
def maps(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    make_folder(args.out)
    images = pick_images(dataset, args.num, args.seed)
    scale = math.ceil(128 / config.size)
    rows, titles = [enlarge(images, scale)], ["image"]
    for keep in args.keep or sorted({min(config.keeps), config.keep, config.length}):
        with run.autocast():
            sources = source_maps(model, model.encode(images.to(run.device), keep))
        for name in ("true", "predicted"):
            rows.append(merge_map(images, sources[name].cpu(), scale))
            titles.append(f"K = {keep}, {name}")
    if run.main:
        image_grid(rows, f"{args.out}/maps.png", scale=1, row_titles=titles)
        print(f"wrote {args.out}/maps.png")

# -----------------------------------------------------------------------------
# stats and gen: are the samples like the training images, and what they were asked to be?

def reference_hash(mu, sigma):
    return weights_hash(dict(mu=torch.as_tensor(mu), sigma=torch.as_tensor(sigma)))

def statistics_of(dataset, features, args, run):
    """mu (D,), sigma (D,D) of the features of all centre crops of a data set."""
    moments = Moments()
    for images, _ in images_of(dataset, 0, args, run, "reference"):
        moments.add(features(images)[0])
    return moments.statistics(run)

def stats(args, argv):
    if args.features == "inception" and not args.size:
        raise UserError("--features inception takes any image size: pass --size, that of the "
                        "images to compare")
    run = start_run(args)
    features = open_features(args, args.size, run, required=True)
    args.size = args.size or features.judge["config"]["size"]
    dataset = build_dataset(args.data, "train", args.size, train=False)
    args.num, args.ckpt = len(dataset), ""
    make_folder(args.out)
    mu, sigma = statistics_of(dataset, features, args, run)
    if run.main:
        np.savez(f"{args.out}/stats.npz", mu=mu, sigma=sigma, size=args.size, num=args.num,
                 features_hash=features.record["features_hash"])
        write_results(args, argv, run, dataset.unreadable(), size=args.size, split="train",
                      reference_hash=reference_hash(mu, sigma), **features.record)
        print(f"python eval.py gen --features {args.features} --reference {args.out}/stats.npz")

def read_npz(flag, path, *names):
    """{name: array} of an npz file; the first of `names` must be there. Raises UserError."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in names if name in file}
            need = arrays[names[0]]
    except Exception as error:  # a damaged zip raises many types
        raise UserError(f"{flag} {path} cannot be read ({error}): pass an npz with {names[0]}")
    pictures = arrays.get("arr_0", np.zeros((1, 1, 1, 3), np.uint8))
    if not len(need) or pictures.dtype != np.uint8 or pictures.shape[3:] != (3,):
        raise UserError(f"{flag} {path}: arr_0 is {pictures.dtype} {pictures.shape}, and uint8 "
                        "(N,H,W,3) is needed")
    return arrays

def open_reference(args, features, size, run):
    """--reference (ours or ADM's), else all training images of --data.

    Returns mu, sigma, batches of real images for precision and recall, the record.
    """
    hash_here, real, unreadable = features.record["features_hash"], None, ()
    if args.reference:
        file = read_npz("--reference", args.reference, "mu", "sigma", "arr_0", "features_hash",
                        "size")
        mu, sigma, pixels = file["mu"], file.get("sigma"), file.get("arr_0")
        made_with = str(file.get("features_hash", ""))
        made_size = int(file.get("size", size if pixels is None else pixels.shape[1]))
        seen = features(torch.zeros(1, 3, size, size))[0].shape[1]
        # ADM's files do not name a network: they are Inception's
        foreign = made_with != hash_here and (made_with or features.judge)
        shapes = mu.shape == (seen,) and sigma is not None and sigma.shape == (seen, seen)
        if foreign or made_size != size or not shapes:
            raise UserError(f"--reference {args.reference} has {mu.shape} features of images of "
                            f"{made_size} px, perhaps of another network; {seen} features of "
                            f"{size} px are needed: make one by `python eval.py stats`")
        mu, sigma = check_finite(args.reference, mu), check_finite(args.reference, sigma)
        if pixels is not None:
            real = pixel_batches(pixels, subset(len(pixels), args.num, args.seed), args, run)
    dataset = build_dataset(args.data, "train", size, train=False) if args.data else None
    if not args.reference and not dataset:
        raise UserError("there is nothing to compare with: pass --reference, or --data")
    make_folder(args.out)  # after all checks, before the long work
    if not args.reference:
        mu, sigma = statistics_of(dataset, features, args, run)
    if real is None and dataset:
        real = images_of(dataset, args.num, args, run, "real images")
        unreadable = dataset.unreadable()
    name = args.reference or f"train split of {args.data}"
    return mu, sigma, real, dict(reference=name, reference_hash=reference_hash(mu, sigma),
                                 unreadable=unreadable)

def block_of(num, run):
    """The contiguous block of 0 ... num - 1 that is this rank's, as a range."""
    return range(num * run.rank // run.world, num * (run.rank + 1) // run.world)

def pixel_batches(pixels, rows, args, run):
    """This rank's share of the images `rows` of an array (N,H,W,3): (images, places)."""
    mine = [rows[i] for i in block_of(len(rows), run)]
    for start in range(0, len(mine), args.batch_size):
        chosen = mine[start:start + args.batch_size]
        yield from_uint8(pixels[chosen]), chosen

def drawn_batches(gpt, tokenizer, labels, args, run, **sampling):
    """Draw this rank's share of the samples: (images, None). Sample i depends on (seed, i)."""
    mine = block_of(len(labels), run)
    for start in tqdm(mine[::args.batch_size], "draw", leave=False, disable=not run.main):
        wanted = labels[start:min(start + args.batch_size, mine.stop)]
        images = draw_images(gpt, tokenizer, wanted, args.batch_size, start, **sampling)
        yield images, None

def open_samples(args, run):
    """--samples -> (asked classes (N,) or None, size, {"-": batches}, record, None)."""
    file = read_npz("--samples", args.samples, "arr_0", "arr_1", "tokenizer", "generator")
    pixels, labels = file.pop("arr_0"), file.pop("arr_1", None)
    rows = subset(len(pixels), args.num, args.seed)
    args.ckpt, args.num = args.samples, len(rows)
    parts = dict(images=torch.from_numpy(pixels))
    if labels is not None:
        labels = torch.from_numpy(labels.astype(np.int64))
        parts["labels"], labels = labels, labels[rows]
    record = {name: str(value) for name, value in file.items()}
    record["samples_hash"] = weights_hash(parts)
    return labels, pixels.shape[1], {"-": pixel_batches(pixels, rows, args, run)}, record, None

def open_generator(args, run):
    """--ckpt -> (asked classes (N,), size, {cfg: batches}, record, tokenizer)."""
    gpt, tokenizer = load_generator(args.ckpt)
    c, keep = gpt.config, args.keep or None
    if keep and (c.mode == "raster" or keep not in c.keeps):
        raise UserError(f"--keep {keep}: this {c.mode} model was not trained on it; pass one of "
                        f"{c.keeps}, or leave --keep out for raster")
    try:
        scales = [float(scale) for scale in args.cfg.split(",")]
    except ValueError:
        scales = [math.nan]
    if not all(0 <= scale < 1000 for scale in scales):
        raise UserError(f"--cfg {args.cfg}: pass numbers from 0, as in 1,1.5,2")
    args.num, args.data = args.num or 500, args.data or tokenizer.config.data
    gpt.to(run.device, run.dtype)
    tokenizer.to(run.device)
    sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                    seed=args.seed, keep=keep)
    record = dict(sampling, tokenizer=weights_hash(tokenizer.state_dict()),
                  generator=weights_hash(gpt.state_dict()))
    labels = torch.arange(args.num) % max(1, c.num_classes)
    streams = {}
    for cfg in scales if c.num_classes else [1.0]:  # without classes there is nothing to guide
        streams[cfg] = drawn_batches(gpt, tokenizer, labels, args, run, cfg=cfg, **sampling)
    return labels, tokenizer.config.size, streams, record, tokenizer

@torch.no_grad()
def gen(args, argv):
    run = start_run(args)
    opened = open_samples if args.samples else open_generator
    labels, size, streams, record, tokenizer = opened(args, run)
    features = open_features(args, size, run, required=True)
    judge = features.judge
    if judge and labels is not None and labels.max() >= judge["config"]["num_classes"]:
        raise UserError(f"{args.ckpt} has class {int(labels.max())}, but --classifier knows "
                        f"{judge['config']['num_classes']} classes: train one on the same --data")
    args.data = args.data or judge.get("config", {}).get("data", "")
    mu, sigma, real, reference = open_reference(args, features, size, run)
    if real is not None:
        real = gather_rows(torch.cat([features(images)[0] for images, _ in real]), run)
        record["real_images"] = len(real)
    if judge and tokenizer:  # the ceiling for any generator that uses this tokenizer
        passed = reconstructions(tokenizer, args, run)
        record["reconstructed_accuracy"] = accuracy(features.network, passed, run)
    fd, score = labelled(features.frechet, args.num), labelled(features.score, args.num)
    results = []
    for cfg, stream in streams.items():
        moments, rows, logits, shown = Moments(), [], [], []
        for images, _ in stream:
            seen, guess = features(eight_bit(images))
            moments.add(seen)
            rows.append(seen)
            logits.append(guess)
            shown.extend(images[:max(0, 40 - len(shown))].cpu())
        fake = moments.statistics(run)
        rows, probs = gather_rows(torch.cat(rows), run), gather_rows(torch.cat(logits), run)
        if not run.main:
            continue
        probs = probs.softmax(1)
        mean, std = inception_score(probs, min(10, len(probs)), args.seed)
        row = {"cfg": cfg, fd: frechet_distance(mu, sigma, *fake), score: mean,
               f"{score}_std": std}
        if real is not None:
            pair = (x if run.device.type == "mps" else x.to(run.device) for x in (real, rows))
            row["precision"], row["recall"] = precision_recall(*pair)
        if judge and labels is not None:
            hits = (probs.argmax(1) == labels).double()
            row["agreement"] = hits.mean().item()
            row["per_class"] = {judge["class_names"][c]: hits[labels == c].mean().item()
                                for c in labels.unique()}
        results.append(row)
        titles = None if labels is None else labels[:len(shown)].tolist()
        picture = f"{args.out}/samples{'' if cfg == '-' else f'_cfg{cfg:g}'}.png"
        image_grid(torch.stack(shown), picture, labels=titles, columns=10)
    if run.main:
        for name in ("val_accuracy", "reconstructed_accuracy"):
            accurate = {**features.record, **record}.get(name)
            if accurate is not None:
                print(f"{name.replace('_', ' ')} of the classifier: {accurate:.1%}")
        print_table(results)
        write_results(args, argv, run, size=size, **record, **features.record, **reference,
                      results=results)

def reconstructions(tokenizer, args, run):
    """Val images that went through the tokenizer: batches (images, labels)."""
    dataset = build_dataset(args.data, "val", tokenizer.config.size, train=False)
    for images, labels in images_of(dataset, args.num, args, run, "reconstruct"):
        with run.autocast():
            encoded = tokenizer.encode(images)
            decoded = tokenizer.decode(encoded.codes, encoded.source)
        yield eight_bit(decoded).to(run.device), labels

# -----------------------------------------------------------------------------
# probe: what a linear classifier reads off the frozen encoder (paper A.4)

def pooled(model, images, keep, run):
    """Frozen encoder: mean of the K tokens (B,D), class token (B,D), float32 on the CPU."""
    with run.autocast():
        _, _, cls, tokens = model.encoder(images, keep)
    return tokens.float().mean(1).cpu(), cls.float().cpu()

@torch.no_grad()
def extract(represent, dataset, num, args, run):
    """Apply `represent` (images -> {key: (B,D)}) to `num` drawn images (0: all), centre crops.

    Returns {key: (N,D)} and labels (N,), of all ranks, in memory.
    """
    parts, labels = defaultdict(list), []
    for images, label in images_of(dataset, num, args, run, "encode"):
        for key, x in represent(images).items():
            check_finite(f"features of {key}", x)
            parts[key].append(x)
        labels.append(label.cpu())
    labels = gather_rows(torch.cat(labels), run)
    return {key: gather_rows(torch.cat(part), run) for key, part in parts.items()}, labels

def whitening(x, run):
    """x (N,D) -> mean (D,), matrix (D,D) float64: (x - mean) @ matrix has unit covariance.

    It has no parameters. Most of the variance of tokens lies in a few directions, and on such
    features an optimizer measures its own slowness. Small eigenvalues are shrunk towards the
    mean one, so that directions of mere rounding are not blown up.
    """
    moments = Moments()
    for part in x.split(8192):
        moments.add(part.double())
    mean, covariance = moments.statistics(run._replace(world=1))  # x holds the rows of all ranks
    values, vectors = torch.linalg.eigh(covariance)
    shrunk = values.clamp_min(0) + 1e-4 * values.mean()
    return mean, vectors / shrunk.clamp_min(1e-300).sqrt()

def cross_entropy_of(flat, x, y, num_classes, l2):
    """Loss and gradient of a linear classifier with an L2 penalty, for scipy.

    flat: its weights (C,D) and bias (C,) as one float64 array. x (N,D), y (N,).
    """
    theta = torch.from_numpy(flat).to(x).view(num_classes, -1)                # (C,D+1)
    weight, bias = theta[:, :-1], theta[:, -1]
    log_p = (x @ weight.T + bias).log_softmax(1)                              # (N,C)
    loss = F.nll_loss(log_p, y) + l2 / 2 * weight.square().sum()
    error = (log_p.exp() - F.one_hot(y, num_classes)) / len(x)                # d loss / d logits
    grad = torch.cat([error.T @ x + l2 * weight, error.sum(0)[:, None]], dim=1)
    return loss.item(), grad.flatten().double().cpu().numpy()

def fit_to_convergence(x, y, num_classes, l2=1e-4, max_steps=2000):
    """Softmax regression by full-batch L-BFGS: x (N,D), y (N,) -> weights (C,D), bias (C,)."""
    start = np.zeros(num_classes * (x.shape[1] + 1))
    found = scipy.optimize.minimize(cross_entropy_of, start, (x, y, num_classes, l2), jac=True,
                                    method="L-BFGS-B", options=dict(maxiter=max_steps))
    theta = torch.from_numpy(found.x).to(x).view(num_classes, -1)
    return theta[:, :-1], theta[:, -1]

def fit_as_in_the_paper(x, y, num_classes, args):
    """The paper's protocol (A.4, after MAE 2111.06377) on normalised features: AdamW, cosine,
    batches of 1,024. It needs many passes, and suits a data set too large for full batches."""
    head = nn.Linear(x.shape[1], num_classes).to(x)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    batch = min(1024, len(x))
    steps = len(x) // batch * args.epochs
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(args.epochs):
        order = torch.randperm(len(x), generator=seeded(args.seed, epoch)).to(x.device)
        for rows in order[:len(x) // batch * batch].split(batch):
            with torch.enable_grad():
                F.cross_entropy(head(x[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return head.weight.detach(), head.bias.detach()

def linear_probe(train, val, num_classes, args, run):
    """A linear classifier on features (N,D) with labels (N,) -> (train, val) top-1.

    --protocol whitened: whitening, then L-BFGS until nothing improves. paper: as in the paper.
    """
    device = "cpu" if run.device.type == "mps" else run.device  # MPS has no float64
    if args.protocol == "paper":
        mean, std = train[0].float().mean(0), train[0].float().std(0)
        matrix = torch.diag(1 / (std + 1e-5))  # BatchNorm without parameters
    else:
        mean, matrix = whitening(train[0], run)
    sides = []
    for x, y in (train, val):
        parts = [((part - mean) @ matrix).float() for part in x.to(mean.dtype).split(8192)]
        sides.append((torch.cat(parts).to(device), y.to(device)))
    if args.protocol == "paper":
        weight, bias = fit_as_in_the_paper(*sides[0], num_classes, args)
    else:
        weight, bias = fit_to_convergence(*sides[0], num_classes)
    check_finite("weights of the probe", weight.cpu())
    return [((x @ weight.T + bias).argmax(1) == y).double().mean().item() for x, y in sides]

def open_probe(args, model):
    """Training images of the probe, as centre crops. Raises UserError where they are too few."""
    dataset = build_dataset(args.data, "train", model.config.size, train=False)
    need_classes(dataset, args)
    chosen = subset(len(dataset), args.train_num, args.seed)
    if len(set(dataset.labels[chosen].tolist())) < 2:
        raise UserError(f"--train-num {args.train_num} draws images of one class only: pass a "
                        "larger number")
    return dataset

@torch.no_grad()
def probe(args, argv):
    model, val_set, run = open_tokenizer(args)
    config, keeps = model.config, args.keep or (model.config.length,)
    train_set = open_probe(args, model)
    make_folder(args.out)
    encoders = {"trained": model}
    for n in range(args.seeds):  # the control: what the architecture gives without training
        torch.manual_seed(args.seed + n)
        encoders[f"random {n}"] = MergeVQ(config).eval().to(run.device)

    def represent(images):
        found = {}
        for name, encoder in encoders.items():
            for keep in keeps:
                tokens, cls = pooled(encoder, images, keep, run)
                found[name, "tokens", keep], found[name, "class token", keep] = tokens, cls
        pixels = F.adaptive_avg_pool2d(images, min(config.size, 32))
        found["-", "pixels", "-"] = torch.from_numpy(to_uint8(pixels)).flatten(1)
        return found

    train, train_labels = extract(represent, train_set, args.train_num, args, run)
    val, val_labels = extract(represent, val_set, args.num, args, run)
    if not run.main:
        return
    results = []
    for key, x in train.items():
        top1 = linear_probe((x, train_labels), (val[key], val_labels), train_set.num_classes,
                            args, run)
        results.append(dict(zip(("encoder", "features", "keep"), key), dimensions=x.shape[1],
                            train_top1=top1[0], val_top1=top1[1]))
    print(f"linear probe ({args.protocol}) of {train_set.num_classes} classes: "
          f"{len(train_labels)} training and {args.num} val images")
    print_table(results)
    unreadable = {*train_set.unreadable(), *val_set.unreadable()}
    write_results(args, argv, run, unreadable, size=config.size, align=config.align,
                  tokenizer=weights_hash(model.state_dict()), train_num=len(train_labels),
                  protocol=args.protocol, epochs=args.epochs, lr=args.lr, results=results)

# -----------------------------------------------------------------------------
# finetune: the whole encoder trained on the labels (paper A.4, after MAE)

@dataclasses.dataclass
class FinetuneConfig(RunConfig):
    """tiny suits the default tokenizer. paper: 100 epochs of batch 1,024, the rest as in MAE."""
    #                       tiny    paper
    recipe: str = arg(      "tiny", "paper", help="preset: tiny or paper")
    ckpt: str = arg("out/tokenizer/ckpt.pt", help="tokenizer whose encoder is fine-tuned")
    out: str = arg("out/finetune")
    data: str = arg("", help="data with classes; empty: what the tokenizer was trained on")
    keep: int = arg(0, help="tokens K; 0: all L, nothing merges", low=0)
    num: int = arg(0, help="validation images, 0: all", low=0)
    layer_decay: float = arg(0.8, 0.65, help="rate of a layer / of the next", low=0, high=1)
    mixup: float = arg(     0.2,    0.8, help="Beta of mixup (1710.09412); 0: off", low=0)
    smoothing: float = arg( 0.1,    0.1, help="label smoothing", low=0, high=1)
    drop_path: float = arg( 0.0,    0.1, help="chance to skip a branch of the last block "
                            "(1603.09382)", low=0, high=0.99)
    batch_size: int = arg(  64,     1024)
    max_steps: int = arg(   600,    0)
    epochs: int = arg(      100,    100)
    lr: float = arg(        1e-3,   2e-3)
    warmup: int = arg(      50,     6250)
    weight_decay: float = arg(0.05)
    beta2: float = arg(     0.99,   0.999, help="AdamW beta 2", low=0, high=0.99999)
    clip: float = arg(5.0)
    ema: float = arg(       0.99,   0.9999)
    eval_every: int = arg(  300,    5000)
    save_every: int = arg(  300,    5000)

RECIPES = presets(FinetuneConfig, ("tiny", "paper"))

def drop_path(rate, module, inputs, output):
    """Forward hook of a residual branch: in training it is left out for an image with chance
    `rate`, and scaled up otherwise."""
    if not module.training:
        return output
    branch, *rest = output if isinstance(output, tuple) else (output,)
    stays = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    branch = branch * stays / (1 - rate)
    return (branch, *rest) if rest else branch

class FineTuned(nn.Module):
    """A tokenizer's encoder, and a linear layer on the mean of its tokens."""

    def __init__(self, encoder, keep, num_classes, rate):
        super().__init__()
        self.keep = keep
        self.encoder = encoder.requires_grad_(True)
        self.encoder.to_bits = nn.Identity()  # a classifier needs no codes
        self.head = nn.Linear(encoder.norm.weight.shape[0], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for i, block in enumerate(encoder.blocks if rate else ()):  # the chance rises from 0
            hook = partial(drop_path, rate * i / max(1, len(encoder.blocks) - 1))
            block.attn.register_forward_hook(hook)
            block.mlp.register_forward_hook(hook)

    def forward(self, images):
        """images (B,3,H,W) -> mean token (B,D), logits (B,C)."""
        mean = self.encoder(images, self.keep)[3].mean(1)
        return mean, self.head(mean)

def layer_groups(model, config):
    """Optimizer groups with a `scale` of the learning rate: layer_decay^(layers above).
    Layer 0 is the stem, i + 1 block i, the last one norm and head."""
    last, groups = len(model.encoder.blocks) + 1, {}
    for name, p in model.named_parameters():
        part = name.removeprefix("encoder.").split(".")
        top = last if part[0] in ("norm", "head") else 0
        layer = int(part[1]) + 1 if part[0] == "blocks" else top
        matrix = p.dim() >= 2 and part[0] not in ("cls", "position")
        decay = config.weight_decay if matrix else 0.0
        scale = config.layer_decay ** (last - layer)
        group = groups.setdefault((layer, decay), dict(params=[], weight_decay=decay, scale=scale))
        group["params"].append(p)
    return list(groups.values())

def mix(images, targets, alpha, *key):
    """Mixup (1710.09412) with the batch in reverse order: images (B,3,H,W), targets (B,C)."""
    if not alpha:
        return images, targets
    share = np.random.default_rng(key).beta(alpha, alpha)
    return images.lerp(images.flip(0), share), targets.lerp(targets.flip(0), share)

def finetune(argv):
    config = parse_config(FinetuneConfig, "Fine-tune the encoder of a tokenizer as a classifier.",
                          argv, RECIPES, "recipe")
    config.command = "finetune"
    tokenizer = load_tokenizer(config.ckpt)
    t, made_from = tokenizer.config, weights_hash(tokenizer.state_dict())
    config.data, config.keep = config.data or t.data, config.keep or t.length
    merge_schedule(t.length, config.keep, t.depth)  # UserError on a K out of reach
    train_set = build_dataset(config.data, "train", t.size, True, config.seed, config.labels)
    val_set = build_dataset(config.data, "val", t.size, False, labels=config.labels)
    need_classes(train_set, config)
    passes = config.epochs * len(train_set) // config.batch_size
    config.max_steps = config.max_steps or max(1, passes)
    run = start_run(config)
    micro_batch(config, run)  # UserError on a batch that does not divide
    state = open_out(config, run, "finetuned")
    torch.manual_seed(config.seed)
    classes, path = train_set.num_classes, f"{config.out}/ckpt.pt"
    raw_model = FineTuned(tokenizer.encoder, config.keep, classes, config.drop_path).to(run.device)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    betas = (0.9, config.beta2)
    optimizer = torch.optim.AdamW(layer_groups(raw_model, config), betas=betas, fused=True)
    step, skipped = 0, torch.zeros((), device=run.device)
    if state:
        load_parts(path, state, model=raw_model, ema=ema, optimizer=optimizer)
        step, skipped = state["step"], skipped + state["skipped"]
    if config.compile:
        raw_model.encoder.stem.compile()
    model = parallel(raw_model, run)
    stream = batches(train_set, config, run, step)
    metrics = Metrics(config, run, step, ("loss", "val_accuracy", "lr"))
    stop, stopping = catch_signals(), False
    while True:
        # N steps make N + 1 passes. Step 0 counts: a broken evaluation shows at once
        last = step >= config.max_steps
        if last or step % config.eval_every == 0 and not stopping:
            val = images_of(val_set, config.num, config, run)
            val_accuracy = accuracy(ema, val, run)
            metrics.scores(step, dict(val_accuracy=val_accuracy))
        if run.main and (last or stopping or step % config.save_every == 0):
            save_checkpoint(path, "finetuned", step=step, config=dataclasses.asdict(config),
                            skipped=int(skipped), class_names=list(train_set.class_names),
                            model=raw_model.state_dict(), ema=ema.state_dict(),
                            optimizer=optimizer.state_dict())
        if last or stopping:
            break

        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        # drop path draws from torch's generator: the same after a resume
        torch.manual_seed(seeded(config.seed, step, 3, run.rank).initial_seed())
        raw_model.train()
        logs = defaultdict(float)
        for micro_step in range(config.accum):
            # DDP averages the gradients in the last backward pass only
            model.require_backward_grad_sync = micro_step == config.accum - 1
            images, labels = next(stream)
            targets = F.one_hot(labels, classes) * (1 - config.smoothing)
            targets = targets + config.smoothing / classes                    # (B,C)
            images, targets = mix(images, targets, config.mixup, config.seed, 3, step, micro_step)
            with run.autocast():
                _, logits = model(images)
            loss = F.cross_entropy(logits.float(), targets)
            (loss / config.accum).backward()
            logs["loss"] += loss.detach() / config.accum
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        finite = step_if_finite(norm, optimizer)
        update_ema(ema, raw_model, config.ema, step, finite)
        skipped += ~finite
        step += 1
        if step % config.log_every == 0 or step == config.max_steps:
            values = dict(logs, grad_norm=norm, skipped=skipped)
            stopping = metrics.log(step, values, stop, show=("loss",), lr=lr)
    metrics.bar.close()
    if run.main and last:
        config.num = config.num or len(val_set)
        unreadable = {*train_set.unreadable(), *val_set.unreadable()}
        write_results(config, ["finetune", *argv], run, unreadable, size=t.size, keep=config.keep,
                      tokenizer=made_from, steps=step, skipped=int(skipped),
                      val_top1=val_accuracy)
    done = f"{val_accuracy:.2%} of the val images right (EMA weights, K = {config.keep})"
    end_run(config, run, step, "eval.py", ["finetune", *argv], done)

# -----------------------------------------------------------------------------
# sweep: reconstruction against representation (Table 4, Figure 3). ablate-source: what it costs
# to predict the merge map (Table 5)

@torch.no_grad()
def multiply_adds(encoder, size, keep):
    """Multiply-adds that encode one image: what the paper's tables call FLOPs."""
    images = torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)
    # the math backend: attention is two products that the counter sees
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(images, keep)
    return counter.get_total_flops() // 2

@torch.no_grad()
def sweep(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    keeps = args.keep or sorted({*config.keeps, config.keep, config.length})
    train_set = open_probe(args, model)
    features = open_features(args, config.size, run)
    make_folder(args.out)
    rows, record = reconstruct(model, dataset, keeps, args, run, features)
    for row in rows:  # one K after the other: the features of all would not fit in memory
        def represent(images):
            return {"tokens": pooled(model, images, row["keep"], run)[0]}

        train, train_labels = extract(represent, train_set, args.train_num, args, run)
        val, val_labels = extract(represent, dataset, args.num, args, run)
        if run.main:
            pairs = (train["tokens"], train_labels), (val["tokens"], val_labels)
            row["probe_top1"] = linear_probe(*pairs, train_set.num_classes, args, run)[1]
            row["encoder_gmacs"] = multiply_adds(model.encoder, config.size, row["keep"]) / 1e9
    if not run.main:
        return
    print_table(rows)
    columns = ["psnr", *([features.r_name(args.num)] if features else [])]
    columns += ["probe_top1", "encoder_gmacs"]
    plot_rows(rows, f"{args.out}/sweep.png", columns, x="keep")
    write_results(args, argv, run, dataset.unreadable(), size=config.size, protocol=args.protocol,
                  tokenizer=weights_hash(model.state_dict()), **record, epochs=args.epochs,
                  lr=args.lr, train_num=len(train_labels), results=rows)

def ablate_source(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    features = open_features(args, config.size, run)
    make_folder(args.out)
    rows, record = reconstruct(model, dataset, args.keep or [config.keep], args, run, features,
                               names=("true", "predicted", "nearest first"))
    if run.main:
        print_table(rows)
        write_results(args, argv, run, dataset.unreadable(), size=config.size,
                      tokenizer=weights_hash(model.state_dict()), **record, results=rows)

# -----------------------------------------------------------------------------
# speed: ratios within one run. Times alone say little about another machine

def fastest(functions, repeats, device):
    """{name: function} -> {name: seconds of the fastest of `repeats` calls}, in turns."""
    seconds = dict.fromkeys(functions, math.inf)
    for turn in range(repeats + 1):  # the first turn warms up
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds

def entropy_of_all_codes(z):
    """lfq_entropy by its definition, with the (N,2^d) matrix of probabilities."""
    d = z.shape[-1]
    codebook = codes_to_bits(torch.arange(2 ** d, device=z.device), d)        # (2^d,d)
    p = (2 * z @ codebook.T).softmax(-1)                                      # (N,2^d)
    return torch.special.entr(p).sum(-1).mean() + torch.special.entr(p.mean(0)).sum()

def stage1_step(model, images, keep, run):
    with run.autocast():
        out = model(images, keep)
    loss = F.mse_loss(out.images, images) + sum(lfq_entropy(out.z))
    loss.backward()

@torch.no_grad()
def cache_rows(gpt, args, generator):
    """Rows of the compact cache that hold something, on average over an image.

    A random model repeats no code, so the codes are recorded ones: K tokens whose positions lie
    together, as in images.
    """
    B, L, K = args.batch_size, args.length, args.keep
    first = torch.rand(B, L - 1, generator=generator).argsort(1)[:, :K - 1] + 1
    first = F.pad(first.sort(1).values, (1, 0))                               # (B,K)
    codes = first.gather(1, nearest_first(first, L)).to(gpt.mask_embed.device)  # (B,L)
    cache, prefix, used = gpt.new_cache(B, K), gpt.config.prefix, []
    for t in range(prefix + L - 1):
        cache.begin(t, codes[:, t - prefix] if t >= prefix else None)
        used.append(cache.rows_in_use().double().mean())
    return torch.stack(used).mean().item()

def speed(args, argv):
    run, rows = start_run(args), []
    L, K, B, generator = args.length, args.keep, args.batch_size, seeded(args.seed)
    if math.isqrt(L) ** 2 != L or K > L:
        raise UserError(f"--length {L} must be a square, and --keep {K} at most that")
    if args.width % (4 * args.heads):
        raise UserError(f"--width {args.width} must be a multiple of 4 x --heads {args.heads}")
    make_folder(args.out)

    def measure(what, unit, amounts, functions, repeats=args.repeats):
        seconds = fastest(functions, repeats, run.device)
        values = {name: amounts[name] / s for name, s in seconds.items()}
        slowest = next(iter(values.values()))  # the first function is the reference
        rows.extend(dict(what=what, name=name, value=value, unit=unit, ratio=value / slowest)
                    for name, value in values.items())

    z = torch.randn(1024, 12, generator=generator).to(run.device).requires_grad_()
    measure("LFQ entropy, 12 bits", "tokens/s", dict(materialised=1024, factorised=1024),
            dict(materialised=lambda: entropy_of_all_codes(z).backward(),
                 factorised=lambda: sum(lfq_entropy(z)).backward()))

    torch.manual_seed(args.seed)
    t = TokenizerConfig()
    model = MergeVQ(t).to(run.device).train()
    images = torch.rand(t.batch_size, 3, t.size, t.size, generator=generator).to(run.device)
    steps = {f"K = {keep}": partial(stage1_step, model, images, keep, run)
             for keep in (t.length, t.keep)}
    amounts = dict.fromkeys(steps, t.batch_size)
    measure("stage-1 step, tiny", "images/s", amounts, steps, 5 * args.repeats)

    sizes = dict(width=args.width, depth=args.depth, heads=args.heads, window=args.window,
                 head_depth=2, bits=args.bits, length=L, keep=K, keeps=(K,))
    gpts = {mode: GPT(GPTConfig(mode=mode, **sizes)).to(run.device, run.dtype).eval()
            for mode in MODES}
    labels = torch.zeros(B, dtype=torch.long)
    # a step costs the same whatever is drawn: all rows of a cache take part, under a mask
    decode = {mode: partial(sample_codes, gpt, labels, cfg=2.0) for mode, gpt in gpts.items()}
    measure("decoding, guided", "images/s", dict.fromkeys(MODES, B), decode)
    size = {mode: gpt.new_cache(2 * B, K).nbytes for mode, gpt in gpts.items()}
    rows.extend(dict(what="KV cache", name=mode, value=size[mode], unit="bytes",
                     ratio=size[mode] / size["raster"]) for mode in MODES)
    used, full = cache_rows(gpts["mergear"], args, generator), gpts["raster"].new_cache(1).rows
    rows.append(dict(what="KV cache, rows seen", name="mergear", value=used, unit="rows",
                     ratio=2 * used / full))  # raster sees half of its rows on average
    if run.main:
        print_table(rows)
        args.ckpt, args.data, args.num = "", "", B
        write_results(args, argv, run, threads=torch.get_num_threads(), **sizes, results=rows)

# -----------------------------------------------------------------------------
# Commands and flags

COMMANDS = {"recon": recon, "maps": maps, "train-classifier": train_classifier, "stats": stats,
            "gen": gen, "probe": probe, "finetune": finetune, "sweep": sweep,
            "ablate-source": ablate_source, "speed": speed}
VAL = "recon probe sweep ablate-source"      # commands that measure a tokenizer on val
JUDGED = "recon stats gen sweep ablate-source"
DATA = f"{VAL} maps train-classifier stats gen"
FLAGS = [  # name, type, default, help, commands, then choices or range
    ("ckpt", str, "out/tokenizer/ckpt.pt", "tokenizer, or generator with one in it", f"{VAL} maps"),
    ("ckpt", str, "out/mergear/ckpt.pt", "generator to measure", "gen"),
    ("data", str, "", "data set; empty: what the checkpoint was trained on", f"{VAL} maps gen"),
    ("data", str, "shapes", "data set", "train-classifier stats"),
    ("num", int, 0, "number of images, 0: all", VAL, dict(low=0)),
    ("num", int, 8, "number of images", "maps", dict(low=1)),
    ("num", int, 0, "samples; 0: all of --samples, or 500 drawn", "gen", dict(low=0)),
    ("keep", tuple, (), "values of K; empty: the usual ones", f"{VAL} maps", dict(low=1)),
    ("keep", int, 0, "merge count K; 0: the tokenizer's target", "gen", dict(low=0)),
    ("batch_size", int, 32, "images at a time; no result depends on it", f"{VAL} maps stats gen",
     dict(low=1)),
    ("batch_size", int, 64, "images per step", "train-classifier", dict(low=1)),
    ("workers", int, -1, "loader processes; -1: none for shapes, else up to 8", DATA,
     dict(low=-1, high=256)),
    ("features", str, "classifier", "network of the Frechet distance", "recon sweep ablate-source",
     dict(choices=("classifier", "inception", "none"))),
    ("features", str, "classifier", "network of the Frechet distance", "stats gen",
     dict(choices=("classifier", "inception"))),
    ("classifier", str, CLASSIFIER, "checkpoint of train-classifier", JUDGED),
    ("inception_weights", str, "", "pytorch-fid's weight file, or download", JUDGED),
    ("lpips_weights", str, "", "LPIPS' v0.1 vgg.pth, or download: LPIPS too", "recon"),
    ("vgg_weights", str, "", "torchvision's VGG16 file, or download, for LPIPS", "recon"),
    ("reference", str, "", "npz with mu and sigma, of stats or ADM; empty: --data", "gen"),
    ("samples", str, "", "judge this npz (arr_0 uint8 NHWC, arr_1 labels), not --ckpt", "gen"),
    ("cfg", str, "1,1.5,2,3", "guidance scales", "gen"),
    ("temperature", float, 1.0, "of the sampler", "gen", dict(low=0)),
    ("top_k", int, 0, "sample among the k likeliest sub-tokens, 0: all", "gen", dict(low=0)),
    ("top_p", float, 1.0, "sample among this share of probability", "gen", dict(low=1e-6, high=1)),
    ("protocol", str, "whitened", "whitened: L-BFGS to convergence; paper: AdamW", "probe sweep",
     dict(choices=("whitened", "paper"))),
    ("train_num", int, 0, "training images of the probe, 0: all", "probe sweep", dict(low=0)),
    ("seeds", int, 1, "random encoders next to the trained one", "probe", dict(low=0, high=100)),
    ("epochs", int, 90, "passes of --protocol paper", "probe sweep", dict(low=1)),
    ("lr", float, 0.1, "initial rate of --protocol paper", "probe sweep", dict(low=0)),
    ("size", int, 32, "image side in pixels", "train-classifier", dict(low=8)),
    ("size", int, 0, "image side in pixels; 0: the classifier's", "stats", dict(low=0)),
    ("max_steps", int, 600, "optimizer steps; 0: --epochs", "train-classifier", dict(low=0)),
    ("epochs", int, 30, "passes over the data", "train-classifier", dict(low=1)),
    ("lr", float, 3e-3, "peak learning rate", "train-classifier", dict(low=0)),
    ("width", int, 32, "channels of the first stage; 64 suits photographs", "train-classifier",
     dict(low=8)),
    ("overwrite", bool, False, "replace the classifier in --out", "train-classifier"),
    ("length", int, 256, "codes of an image L, a square", "speed", dict(low=4)),
    ("keep", int, 64, "merge count K", "speed", dict(low=2)),
    ("window", int, 16, "of mergear", "speed", dict(low=0)),
    ("bits", int, 18, "code bits d", "speed", dict(low=1, high=24)),
    ("width", int, 256, "of the generators", "speed", dict(low=4)),
    ("depth", int, 4, "blocks", "speed", dict(low=1)),
    ("heads", int, 8, "attention heads", "speed", dict(low=1)),
    ("batch_size", int, 8, "images at a time", "speed", dict(low=1)),
    ("repeats", int, 2, "measurements; the fastest counts", "speed", dict(low=1)),
    ("seed", int, 0, "of what is drawn", f"{DATA} speed", dict(low=0, high=2**31 - 1)),
    ("device", str, "auto", "auto (cuda > mps > cpu) or a torch device", f"{DATA} speed"),
    ("dtype", str, "auto", "autocast type; auto: bfloat16 on CUDA", f"{DATA} speed",
     dict(choices=("auto", "float32", "bfloat16"))),
    ("out", str, "", "folder for results; empty: out/COMMAND", f"{DATA} speed"),
]

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["finetune"]:  # a training script: its flags are the fields of its config
        return finetune(argv[1:])
    parser = Parser(description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for command in COMMANDS:
        p = parsers.add_parser(command)
        for name, kind, default, help, commands, *limits in FLAGS:
            if command in commands.split():
                p.flag(name, kind, default, help, **(limits[0] if limits else {}))
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{args.command.removeprefix('train-')}"
    COMMANDS[args.command](args, argv)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main)
