"""Measure what the other scripts made. One command each:

    python eval.py train-classifier           # a small CNN that knows the classes
    python eval.py recon --keep 16,36,64      # PSNR, SSIM, r-Frechet, code usage on val
    python eval.py maps                       # a picture: which patches became one token
    python eval.py stats                      # mu and sigma of the training images
    python eval.py gen --cfg 1,2,3            # samples: Frechet, IS, precision, recall, class
    python eval.py gen --samples samples.npz  # the same for images drawn before
    python eval.py probe                      # linear probe, next to a random encoder
    python eval.py finetune                   # the whole encoder, trained as a classifier
    python eval.py sweep                      # quality and probe against K (Table 4)
    python eval.py ablate-source              # true or predicted source (Table 5)
    python eval.py speed                      # decoding in the three modes, as ratios
    torchrun --nproc_per_node=8 -- eval.py recon --features inception

--ckpt takes a tokenizer's checkpoint or a generator's, which holds its tokenizer. Each command
but maps writes a JSON file to --out. Metrics are summed in float64 over all images, so batch size
and number of processes change them by rounding only. But one rounded code changes all that follow:
gen may draw other samples at another --batch-size.

The Frechet distance compares what a fixed network sees in two sets of images. With Inception it
is called FID, and compares with published numbers. With the network of train-classifier it is
called fd, and compares within one data set. FID is defined on 50,000 images; another number is
part of the name: FID-10k, fd-1000.

Axis letters: B batch, N images, L full tokens, K kept tokens, D width, d code bits, C classes.
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

import numpy as np
import scipy.ndimage
import scipy.optimize
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (ImageDataset, Metrics, Parser, RunConfig, UserError, arg, batches, build_dataset,
                  catch_signals, end_run, from_uint8, gather_rows, image_grid, load_checkpoint,
                  load_parts, loader_workers, micro_batch, open_data, open_out, parallel,
                  parse_config, plot_rows, presets, resume_run, run_main, save_run, seeded,
                  set_learning_rate, start_run, step_if_finite, subset, to_uint8, update_ema,
                  val_batches, weights_hash)
from mergear import GPT, MODES, GPTConfig, draw_images, load_generator, sample_codes
from tokenizer import (MergeVQ, ResBlock, bit_balance, code_statistics, first_position_of_token,
                       load_lpips, load_tokenizer, load_weights, merge_schedule, nearest_first,
                       psnr)

# -----------------------------------------------------------------------------
# Metrics: plain functions of tensors or arrays

def check_finite(name, values):
    """The values as a float64 tensor. Raises UserError: a metric never hides a NaN."""
    values = torch.as_tensor(values).double()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise UserError(f"{name}: {bad} of {values.numel()} are not finite: a damaged file, or a "
                        "run that diverged")
    return values

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Frechet distance of two Gaussians, the F of FID (1706.08500), of mu (D,) and sigma (D,D):
    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). Raises UserError."""
    mu1, sigma1, mu2, sigma2 = (check_finite("mu or sigma", x).cpu().numpy()
                                for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise UserError("the two sides of the Frechet distance are not of the same network")
    # The trace of the root is the sum of the square roots of the eigenvalues of sigma1 sigma2.
    # Write sigma1 = A A^T. As X Y and Y X have the same eigenvalues but for zeros, sigma1 sigma2
    # has those of A^T sigma2 A, which is positive semidefinite: real and not negative. No root of a
    # singular matrix is taken, so there may be fewer images than features.
    values, vectors = np.linalg.eigh(sigma1)
    kept = values > values.max() * len(values) * np.finfo(np.float64).eps  # not mere rounding
    A = vectors[:, kept] * np.sqrt(values[kept])  # (D,rank)
    roots = np.sqrt(np.linalg.eigvalsh(A.T @ sigma2 @ A).clip(0))
    traces = np.trace(sigma1) + np.trace(sigma2)
    return float(np.square(mu1 - mu2).sum() + traces - 2 * roots.sum())

class Moments:
    """Mean and covariance of rows that come in batches (B,D), as float64 sums."""

    def __init__(self, parts=()):
        self.num, self.sum, self.outer = 0, 0.0, 0.0
        for rows in parts:
            self.add(rows)

    def add(self, rows):
        self.num += len(rows)
        self.sum += rows.sum(0)
        self.outer += rows.T @ rows

    def statistics(self, run):
        """Over the rows of all ranks: mu (D,), sigma (D,D). sigma divides by N - 1."""
        parts = [torch.as_tensor(x) for x in (self.num, self.sum, self.outer)]
        num, total, outer = (gather_rows(x[None], run).sum(0) for x in parts)
        if num < 2:
            raise UserError("1 image has no covariance: pass a larger --num, or --features none")
        mu = total / num
        # the sum of (x - mu) (x - mu)^T is that of x x^T, less N mu mu^T
        return mu, (outer - num * torch.outer(mu, mu)) / (num - 1)

def inception_score(probs, splits=10, seed=0):
    """Inception Score (1606.03498), exp of the mean KL(p(class|image) || p(class)), of probs
    (N,C) -> (mean, std) over `splits` parts of the images."""
    p = check_finite("probs", probs).cpu()
    # A part of few classes scores too low, and files are often sorted by class: shuffle. Sorting
    # by value before makes the score independent of the order of the file.
    p = p[np.lexsort(p.numpy().T[::-1])]  # lexsort's main key is the last
    p = p[torch.randperm(len(p), generator=seeded(seed))]
    scores = []
    for part in p.tensor_split(splits):
        # xlogy(p, q) is p log q, and 0 where p is 0
        divergence = torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))
        scores.append(math.exp(divergence.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))

def share_in_manifold(x, centres, k, chunk):
    """Share of the rows of x (M,D) in the manifold of centres (N,D): the union of balls, one
    around each centre, that just reach its k-th nearest other centre (Eq. 1 of 1904.06991)."""
    # each row is its own nearest neighbour, so one more is asked for
    nearest = [torch.cdist(part, centres).topk(k + 1, largest=False).values
               for part in centres.split(chunk)]
    radius = torch.cat(nearest)[:, -1]  # (N,)
    inside = [(torch.cdist(part, centres) <= radius).any(1) for part in x.split(chunk)]
    return torch.cat(inside).double().mean().item()

def precision_recall(real, fake, k=3, chunk=1000):
    """Improved precision and recall (1904.06991): features real (N,D), fake (M,D) -> two floats.
    Precision: the share of fakes inside a ball around a real image. Recall: the same with the
    roles exchanged. Both grow with the number of balls: compare at equal N and M. The features
    are Inception's, as in ADM (2105.05233), or the classifier's. 1904.06991 has those of a VGG."""
    real, fake = check_finite("real features", real), check_finite("fake features", fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall need at least {k + 1} images of each kind")
    precision = share_in_manifold(fake, real, k, chunk)
    return precision, share_in_manifold(real, fake, k, chunk)

def ssim(a, b):
    """Structural similarity of each image: (B,3,H,W) in [-1,1] twice -> (B,) float64. As in Wang
    et al. 2004: the mean over all Gaussian windows of 11 x 11, sigma 1.5, inside the image. Theirs
    is for grey images; of the three colours this is the mean."""
    if min(a.shape[-2:]) < 11:
        raise UserError("SSIM needs images of 11 px per side or more")
    a, b = (x.cpu().double().clamp(-1, 1).numpy() for x in (a, b))
    moments = np.stack([a, b, a * a, b * b, a * b])  # (5,B,3,H,W)
    blurred = scipy.ndimage.gaussian_filter(moments, sigma=1.5, radius=5, axes=(-2, -1))
    mean_a, mean_b, aa, bb, ab = blurred[..., 5:-5, 5:-5]
    var_a, var_b, cov = aa - mean_a ** 2, bb - mean_b ** 2, ab - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # K1, K2, and values that span 2
    # their Eq. 13: luminance times contrast and structure, 1 each for equal means and patterns
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    contrast_structure = (2 * cov + c2) / (var_a + var_b + c2)
    return torch.from_numpy((luminance * contrast_structure).mean((1, 2, 3)))

def source_accuracy(predicted, source):
    """Share of positions given to the right token: (B,L) int64 twice -> (B,) float64."""
    return (predicted == source).cpu().double().mean(1)

# -----------------------------------------------------------------------------
# FID's network: the InceptionV3 (1512.00567) that TensorFlow published in 2015. Modules have the
# names of pytorch-fid's weight file.

class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. With stride 2 nothing is padded."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding="same"):
        super().__init__()
        padding = padding if stride == 1 else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))

# as in TensorFlow, the average leaves the padding out
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

class Mixed(nn.Module):
    """Branches side by side, joined along the channels: (B,c,h,w) -> (B,*,h',w'). branches:
    {name: [(width, kernel), ...]}, one convolution after the other. The last may be a fork
    (width, kernel, kernel): two convolutions, a and b, that read the same input. branch_pool reads
    the pooled input. With reduce each branch ends with stride 2, and one more branch is the
    maximum of the input."""

    def __init__(self, c, branches, reduce=False, pool=AVERAGE):
        super().__init__()
        self.reduce, self.pool = reduce, pool
        self.branches = {branch: [] for branch in branches}  # the names of each step
        for branch, convs in branches.items():
            width_in = c
            for i, (width, *kernels) in enumerate(convs, start=1):
                name = f"{branch}_{i}" if len(convs) > 1 else branch
                names = [name] if len(kernels) == 1 else [name + "a", name + "b"]
                stride = 2 if reduce and i == len(convs) else 1
                for name, kernel in zip(names, kernels):
                    self.add_module(name, ConvNorm(width_in, width, kernel, stride))
                self.branches[branch].append(names)
                width_in = width

    def forward(self, x):
        joined = []
        for branch, steps in self.branches.items():
            outputs = [self.pool(x) if branch == "branch_pool" else x]
            for names in steps:  # two names only in the last step: one input is enough
                outputs = [self.get_submodule(name)(outputs[0]) for name in names]
            joined += outputs
        if self.reduce:
            joined.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(joined, dim=1)

def mixed_a(pool):  # 35 x 35
    return dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool, 1)])

def mixed_c(c):  # 17 x 17: 7x7 convolutions as pairs of 1x7 and 7x1
    across, down = (1, 7), (7, 1)
    return dict(branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, across), (192, down)],
                branch7x7dbl=[(c, 1), (c, down), (c, across), (c, down), (192, across)],
                branch_pool=[(192, 1)])

MIXED_B = dict(branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])  # to 17 x 17
MIXED_D = dict(branch3x3=[(192, 1), (320, 3)],  # to 8 x 8
               branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
MIXED_E = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, (1, 3), (3, 1))],  # 8 x 8
               branch3x3dbl=[(448, 1), (384, 3), (384, (1, 3), (3, 1))], branch_pool=[(192, 1)])

class FIDInception(nn.Module):
    """images (B,3,H,W) in [-1,1] of any size -> features (B,2048), logits (B,1008), float32. As in
    pytorch-fid the images are resized to 299 x 299, bilinear, without antialias. The logits leave
    out the last bias, as the Inception Score's first code does."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.pool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padding=0)
        self.pool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = Mixed(192, mixed_a(32))
        self.Mixed_5c = Mixed(256, mixed_a(64))
        self.Mixed_5d = Mixed(288, mixed_a(64))
        self.Mixed_6a = Mixed(288, MIXED_B, reduce=True)
        self.Mixed_6b = Mixed(768, mixed_c(128))
        self.Mixed_6c = Mixed(768, mixed_c(160))
        self.Mixed_6d = Mixed(768, mixed_c(160))
        self.Mixed_6e = Mixed(768, mixed_c(192))
        self.Mixed_7a = Mixed(768, MIXED_D, reduce=True)
        self.Mixed_7b = Mixed(1280, MIXED_E)
        # here the network of 2015 takes the maximum
        self.Mixed_7c = Mixed(2048, MIXED_E, pool=nn.MaxPool2d(3, 1, padding=1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images):
        *layers, fc = self.children()
        with torch.autocast(images.device.type, enabled=False):
            x = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
            for layer in layers:
                x = layer(x)  # in the end (B,2048,8,8)
            features = x.mean((2, 3))
            return features, features @ fc.weight.T

def load_inception(path, device="cpu"):
    """pytorch-fid's weight file, or `download` -> FIDInception, frozen. Raises UserError."""
    return load_weights("inception", path, FIDInception()).to(device)

# -----------------------------------------------------------------------------
# Features: what a fixed network sees in an image, and all that distances and scores look at

CLASSIFIER = "out/classifier/ckpt.pt"

class Classifier(nn.Module):
    """Small residual CNN: images (B,3,size,size) -> features (B,D), logits (B,C)."""
    depth = 0  # transformer blocks, for layer_groups

    def __init__(self, size, num_classes, width=32, stride=2):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 3, stride=stride, padding=1)], width
        for i in range(max(2, round(math.log2(size / stride / 2)))):  # the last one: about 4 x 4
            c_out = width * min(2 ** i, 8 // stride)
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
    model = Classifier(config["size"], len(state["class_names"]), config["width"],
                       config["stride"])
    load_parts(path, state, ema=model)
    if state["step"] < config["max_steps"]:
        raise UserError(f"{path} is half trained, at step {state['step']} of "
                        f"{config['max_steps']}: python eval.py train-classifier --resume")
    return model.to(device).eval().requires_grad_(False), state

class Features:
    """The frozen network of --features, for images of `size` px (0: any). record: for the result
    file."""

    def __init__(self, args, size, run):
        # frechet, score: the names of its columns in the table of results
        if args.features == "inception":
            self.frechet, self.score = "FID", "IS"
            self.network = load_inception(args.inception_weights, run.device)
            self.judge = {}  # the classifier's checkpoint, with its classes; here there is none
        else:
            self.frechet, self.score = "fd", "is-clf"
            self.network, self.judge = load_classifier(args.classifier, run.device)
        self.config = self.judge.get("config", {})
        seen = self.config.get("size", size)
        if size not in (0, seen):
            raise UserError(f"--classifier {args.classifier} judges images of {seen} px, not of "
                            f"{size}: train one on the same --data and --size")
        self.record = dict(features_hash=weights_hash(self.network.state_dict()))
        if self.judge:
            self.record["val_accuracy"] = self.judge["val_accuracy"]

    def __call__(self, images):
        """images on any device -> features (B,D), logits (B,C): float64 on the CPU."""
        device = next(self.network.parameters()).device
        features, logits = self.network(images.to(device).float())
        return check_finite("features", features.cpu()), check_finite("logits", logits.cpu())

def open_features(args, size, run):
    """Features. None for `none`, and where nobody has trained the default classifier."""
    missing = args.classifier == CLASSIFIER and not os.path.exists(CLASSIFIER)
    if args.features == "classifier" and missing:
        print(f"no Frechet distance, as there is no {CLASSIFIER}: python eval.py train-classifier")
        return None
    return None if args.features == "none" else Features(args, size, run)

def labelled(name, num):
    """FID of 10,000 images -> "FID-10k". Only the customary 50,000 have the bare name."""
    if num == 50_000:
        return name
    return f"{name}-{num // 1000}k" if num >= 10_000 and num % 1000 == 0 else f"{name}-{num}"

def eight_bit(images):
    """Images as a file would hold them: (B,3,H,W) rounded to 8 bits, on the CPU."""
    check_finite("images", images.cpu())
    return from_uint8(to_uint8(images))

# -----------------------------------------------------------------------------
# What the measuring commands share

def open_tokenizer(args):
    """--ckpt, of a tokenizer or a generator -> (MergeVQ, val data set, Run)."""
    kind = ""
    with contextlib.suppress(Exception):  # of a bad file load_tokenizer says what is wrong
        kind = torch.load(args.ckpt, mmap=True, weights_only=True)["kind"]
    model = load_generator(args.ckpt)[1] if kind == "generator" else load_tokenizer(args.ckpt)
    config = model.config
    args.tokenizer = weights_hash(model.state_dict())
    args.data = args.data or config.data
    dataset = build_dataset(args.data, "val", config.size, train=False, labels=args.labels)
    args.num = len(subset(len(dataset), args.num))
    run = start_run(args)
    return model.to(run.device), dataset, run

def images_of(dataset, num, args, run, title=""):
    """(images, labels) of `num` images drawn by --seed (0: all): this rank's share, in batches."""
    rows = subset(len(dataset), num, args.seed)
    if len(rows) < run.world:
        raise UserError(f"{len(rows)} images for {run.world} processes: pass a larger --num")
    # they are in memory already
    workers = 0 if isinstance(dataset, Pixels) else loader_workers(args)
    return val_batches(dataset, rows, args.batch_size, run, workers, title)

def float64_device(run):
    return "cpu" if run.device.type == "mps" else run.device  # MPS has no float64

def write_results(args, run, rows=(), datasets=(), **more):
    """Rank 0 prints `rows` as a table, and writes OUT/COMMAND.json: the rows, all flags, and what
    one must know to compare them."""
    if not run.main:
        return
    unreadable = sum(len(dataset.faults) for dataset in datasets if dataset)
    record = dict(vars(args), **more, device=str(run.device), dtype=str(run.dtype),
                  torch=torch.__version__, unreadable=unreadable, results=rows)
    record["command"] = shlex.join(["python", "eval.py", *record.pop("argv")])
    print_table(rows)
    text = json.dumps(record, indent=1, allow_nan=False)  # before an older file is lost
    path = f"{args.out}/{args.command}.json"
    with open(path, "w") as file:
        file.write(text)
    print(f"wrote {path}")

def print_table(rows):
    """Dicts of equal keys -> aligned columns. Values that are dicts are left out."""
    rows = [{key: x for key, x in row.items() if not isinstance(x, dict)} for row in rows]
    lines = [[key.replace("_", " ") for key in row] for row in rows[:1]]
    for row in rows:
        lines.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))

# -----------------------------------------------------------------------------
# recon, ablate-source, maps: how well images come back, and which patches merge

def source_maps(model, encoded):
    """{name: source (B,L)}: the true map, the predicted one (Eq. 8), and one without a network."""
    first = first_position_of_token(encoded.source, encoded.codes.shape[1])  # (B,K)
    return {"true": encoded.source, "predicted": model.recover(encoded.codes, first),
            "nearest first": nearest_first(first, encoded.source.shape[1])}

def reconstruct(model, dataset, keeps, args, run, names=("true",)):
    """Encode and decode --num val images at each K, with each source map of `names` -> (a dict of
    measures per K and map, what to record with them), over all ranks. The reference of the
    Frechet distance are the same crops."""
    bits = model.config.bits
    features = open_features(args, model.config.size, run)
    lpips = None
    if args.lpips_weights:
        lpips = load_lpips(args.lpips_weights, args.vgg_weights, run.device)
    real, moments = Moments(), defaultdict(Moments)
    values, counts = defaultdict(list), defaultdict(int)
    for images, labels in images_of(dataset, args.num, args, run, "reconstruct"):
        if features:
            real.add(features(images)[0])
        # image -> codes and source -> image, at each K
        for keep in keeps:
            with run.autocast():
                encoded = model.encode(images, keep)
                sources = source_maps(model, encoded)
            counts[keep] += torch.bincount(encoded.codes.flatten().cpu(), minlength=2 ** bits)
            for name in names:
                with run.autocast():
                    decoded = model.decode(encoded.codes, sources[name])
                # one column of the table each. recovery: is the predicted map right? accuracy:
                # is the map that was decoded here?
                measures = dict(
                    psnr=psnr(decoded, images).clamp(max=999),  # JSON has no infinity
                    ssim=ssim(decoded, images),
                    recovery=source_accuracy(sources["predicted"], encoded.source),
                    accuracy=source_accuracy(sources[name], encoded.source))
                if lpips:
                    measures["lpips"] = lpips(decoded.clamp(-1, 1), images)
                if features:
                    seen, logits = features(eight_bit(decoded))
                    moments[keep, name].add(seen)
                    # for samples to compare with: how often reconstructions keep their class
                    if features.judge and dataset.num_classes > 1:
                        measures["agreement"] = logits.argmax(1) == labels.cpu()
                columns = [column.cpu().double() for column in measures.values()]
                values[keep, name].append(torch.stack(columns, dim=1))  # (B,measures)

    # from the images of all ranks to one row for each K and map
    rows, record = [], {}
    if features:
        mu, sigma = real.statistics(run)
        record = dict(features.record, reference="the same val crops",
                      reference_hash=weights_hash(dict(mu=mu, sigma=sigma)))
    for (keep, name), parts in values.items():
        table = check_finite(f"measures at K = {keep}", gather_rows(torch.cat(parts), run))
        row = dict(keep=keep, source=name, **dict(zip(measures, table.mean(0).tolist())))
        used = gather_rows(counts[keep][None], run).sum(0)  # (2^d,)
        usage = torch.stack([*code_statistics(used), *bit_balance(used, bits)]).tolist()
        row.update(zip(("usage", "perplexity", "bit_imbalance", "dead_bits"), usage))
        if features:
            frechet = labelled("r" + features.frechet, args.num)  # rFID, rfd-1000
            row[frechet] = frechet_distance(mu, sigma, *moments[keep, name].statistics(run))
        rows.append(row)
    return rows, record

def recon(args):
    model, dataset, run = open_tokenizer(args)
    keeps = args.keep or sorted({model.config.keep, model.config.length})
    rows, record = reconstruct(model, dataset, keeps, args, run)
    write_results(args, run, rows, [dataset], **record)
    if run.main:
        draw(model, dataset, 8, keeps, args, run)

def ablate_source(args):
    # what it costs to predict the merge map (Table 5)
    model, dataset, run = open_tokenizer(args)
    keeps = args.keep or [model.config.keep]
    names = ("true", "predicted", "nearest first")
    rows, record = reconstruct(model, dataset, keeps, args, run, names)
    write_results(args, run, rows, [dataset], **record)

def maps(args):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    keeps = args.keep or sorted({min(config.keeps), config.keep, config.length})
    if run.main:
        draw(model, dataset, args.num, keeps, args, run)

def draw(model, dataset, num, keeps, args, run):
    """OUT/COMMAND.png: val images, at each K their reconstructions, and which patches became one
    token: the true map and the predicted one."""
    chosen = subset(len(dataset), num, args.seed)
    images = torch.stack([dataset[i][0] for i in chosen]).to(run.device)
    scale = math.ceil(128 / images.shape[-1])
    rows = {"original": enlarge(images, scale)}
    for keep in keeps:
        with run.autocast():
            encoded = model.encode(images, keep)
            decoded = model.decode(encoded.codes, encoded.source)
            sources = source_maps(model, encoded)
        rows[f"K = {keep}"] = enlarge(decoded, scale)
        for name in ("true", "predicted"):
            rows[f"K = {keep}, {name}"] = merge_map(images, sources[name], scale)
    path = f"{args.out}/{args.command}.png"
    image_grid(list(rows.values()), path, row_titles=list(rows), scale=1)
    print(f"wrote {path}")

def enlarge(x, scale):
    """(B,C,H,W) with every pixel `scale` times in both directions."""
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

def merge_map(images, source, scale=1):
    """Which positions one token stands for: images (B,3,H,W), source (B,L) -> pictures
    (B,3,H*scale,W*scale). Each token's region has the mean colour of its pixels and a border."""
    B, _, H, _ = images.shape
    side = math.isqrt(source.shape[1])
    cell = H // side * scale
    # a mean per position, then per token, which each of its positions takes
    S = F.one_hot(source).to(images.dtype)  # (B,L,K), 1 where position l has token k
    mean = F.adaptive_avg_pool2d(images, side).flatten(2) @ S  # (B,3,K)
    mean = mean / S.sum(1, keepdim=True).clamp_min(1)
    fill = enlarge((mean @ S.transpose(1, 2)).view(B, 3, side, side), cell)
    token = enlarge(source.view(B, 1, side, side), cell)
    border = torch.zeros_like(token, dtype=torch.bool)
    border[..., 1:, :] |= token[..., 1:, :] != token[..., :-1, :]
    border[..., :, 1:] |= token[..., :, 1:] != token[..., :, :-1]
    # a border is darker than a light region, and lighter than a dark one
    light = fill.mean(1, keepdim=True) > -0.3
    shade = torch.where(light, fill * 0.4 - 0.6, fill * 0.5 + 0.5)
    return torch.where(border, shade, fill)

# -----------------------------------------------------------------------------
# stats and gen: are the samples like the training images, and what they were asked to be?

def collect(stream, features, run):
    """Show batches (images, labels) to a network -> features (N,D), logits (N,C), labels (N,) of
    all ranks, and the first 40 images of this one."""
    parts, shown = [], []
    for images, labels in stream:
        images = eight_bit(images)
        parts.append((*features(images), labels))
        shown.extend(images[:40 - len(shown)])
    return *(gather_rows(torch.cat(part), run) for part in zip(*parts)), shown

def statistics(dataset, features, args, run):
    """mu (D,) and sigma (D,D) of the features of all images, of which none is kept."""
    stream = images_of(dataset, 0, args, run, "stats")
    return Moments(features(images)[0] for images, _ in stream).statistics(run)

def stats(args):
    if args.features == "inception" and not args.size:
        raise UserError("--features inception needs --size, that of the images to compare")
    run = start_run(args)
    features = Features(args, args.size, run)
    size = args.size or features.config["size"]
    dataset = build_dataset(args.data, "train", size, train=False, labels=args.labels)
    args.num = len(dataset)
    mu, sigma = statistics(dataset, features, args, run)
    if run.main:
        np.savez(f"{args.out}/stats.npz", mu=mu, sigma=sigma, size=size, num=args.num,
                 **features.record)
        print(f"python eval.py gen --features {args.features} --reference {args.out}/stats.npz")
    write_results(args, run, datasets=[dataset], size=size, split="train",
                  reference_hash=weights_hash(dict(mu=mu, sigma=sigma)), **features.record)

class Pixels(ImageDataset):
    """The images of an npz file, arr_0 (N,H,H,3) uint8, and their labels: arr_1 (N,), or -1."""

    def __init__(self, file):
        self.array = file["arr_0"]
        shape = self.array.shape
        right = self.array.dtype == np.uint8 and shape[1:] == (shape[1], shape[1], 3)
        assert right, f"arr_0 must be (N,H,H,3) uint8, not {shape} {self.array.dtype}"
        labels = file.get("arr_1", np.full(len(self.array), -1))
        assert labels.shape == shape[:1] != (0,), f"arr_1 is {labels.shape} for {shape[0]} images"
        super().__init__(labels, (), self.array.shape[1], train=False, seed=0)

    def pixels(self, key):
        return self.array[key], int(self.labels[key])

def read_npz(flag, path, *needed):
    """An npz file -> (its arrays as a dict, its images as Pixels or None). Raises UserError."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        for name in needed:
            assert name in arrays, f"it has no {name}"
        return arrays, Pixels(arrays) if "arr_0" in arrays else None
    except Exception as error:  # a damaged zip raises many types
        raise UserError(f"{flag} {path} cannot be read ({error}): pass another npz")

def open_reference(args, features, size, run):
    """What samples are compared with: --reference, made by stats or by ADM, or else the training
    images -> mu (D,), sigma (D,D), a data set of real images or None. Raises UserError. ADM's
    statistics rest on TensorFlow's way of resizing: near to ours, not equal."""
    args.data = args.data or features.config.get("data", "")
    images = None
    if args.reference:
        file, images = read_npz("--reference", args.reference, "mu", "sigma")
    if images is None and args.data:
        images = build_dataset(args.data, "train", size, train=False, labels=args.labels)
    if not args.reference:
        if images is None:
            raise UserError("there is nothing to compare with: pass --reference, or --data")
        return *statistics(images, features, args, run), images
    mu, sigma = (check_finite(args.reference, file[name]) for name in ("mu", "sigma"))
    ours = features.record["features_hash"]
    # ADM's files name no network: it was Inception. Their size is that of the images in them
    made_with = file.get("features_hash", "" if features.judge else ours)
    made_size = file.get("size", images.size if images else size)
    D = features(torch.zeros(1, 3, size, size))[0].shape[1]
    fits = mu.shape == (D,) and sigma.shape == (D, D)
    if made_with != ours or made_size != size or not fits:
        raise UserError(f"--reference {args.reference} is of another network or image size than "
                        f"{size} px: make one by `python eval.py stats`")
    return mu, sigma, images

def open_samples(args, run):
    """--samples -> (asked classes (N,), image size, {"-": batches}, record)."""
    file, samples = read_npz("--samples", args.samples, "arr_0")
    args.ckpt, args.num = args.samples, len(subset(len(samples), args.num))
    images, labels = torch.from_numpy(samples.array), torch.from_numpy(samples.labels)
    record = {name: str(file[name]) for name in ("tokenizer", "generator") if name in file}
    record["samples_hash"] = weights_hash(dict(images=images, labels=labels))
    stream = images_of(samples, args.num, args, run, "samples")
    return labels, samples.size, {"-": stream}, record

def open_generator(args, run):
    """--ckpt -> (asked classes (N,), image size, {cfg: batches}, record)."""
    gpt, tokenizer = load_generator(args.ckpt)
    args.num = args.num or 500
    args.data = args.data or tokenizer.config.data
    record = dict(tokenizer=weights_hash(tokenizer.state_dict()),
                  generator=weights_hash(gpt.state_dict()))
    gpt.to(run.device, run.dtype)
    tokenizer.to(run.device)
    classes = gpt.config.num_classes
    if classes:  # in turn
        labels, scales = torch.arange(args.num) % classes, args.cfg
    else:  # there is nothing to guide, and no label
        labels, scales = torch.full((args.num,), -1), [1.0]
    first, end = (args.num * rank // run.world for rank in (run.rank, run.rank + 1))
    starts = range(first, end, args.batch_size)  # this rank's block

    def batches_at(cfg):  # sample i is a function of (seed, i) and its label
        for start in tqdm(starts, "draw", leave=False, disable=not run.main):
            asked = labels[start:min(start + args.batch_size, end)]
            yield draw_images(gpt, tokenizer, asked.clamp(min=0), args.batch_size, start,
                              cfg=cfg, seed=args.seed), asked

    return labels, tokenizer.config.size, {cfg: batches_at(cfg) for cfg in scales}, record

def gen(args):
    run = start_run(args)
    opened = open_samples if args.samples else open_generator
    asked, size, streams, record = opened(args, run)
    features = Features(args, size, run)
    # Inception knows no names of our classes: there a class is called by its id
    names = features.judge.get("class_names", range(10 ** 9))
    if asked.max() >= len(names):
        raise UserError(f"--classifier {args.classifier} has no class {int(asked.max())}: train "
                        "one on the same --data")
    mu, sigma, real_set = open_reference(args, features, size, run)
    record.update(features.record, reference=args.reference or f"train split of {args.data}",
                  reference_hash=weights_hash(dict(mu=mu, sigma=sigma)))
    real = None
    if real_set:
        stream = images_of(real_set, args.num, args, run, "real images")
        real, *_ = collect(stream, features, run)
        record["real_images"] = len(real)
    device = float64_device(run)
    results = []
    for cfg, stream in streams.items():  # the images are drawn here, batch by batch
        fake, logits, labels, shown = collect(stream, features, run)
        if not run.main:
            continue
        probs = logits.softmax(1)
        frechet, score = labelled(features.frechet, args.num), labelled(features.score, args.num)
        row = {"cfg": cfg, frechet: frechet_distance(mu, sigma, fake.mean(0), fake.T.cov())}
        row[score], row[f"{score}_std"] = inception_score(probs, min(10, len(probs)), args.seed)
        if real is not None:
            row["precision"], row["recall"] = precision_recall(real.to(device), fake.to(device))
        asked_for = labels[0] >= 0  # -1: a file without labels
        titles = [str(names[c]) for c in labels[:40]] if asked_for else None
        if features.judge and asked_for:
            hits = (probs.argmax(1) == labels).double()
            row["agreement"] = hits.mean().item()
            row["per_class"] = {names[c]: hits[labels == c].mean().item()
                                for c in labels.unique()}
        results.append(row)
        picture = f"{args.out}/samples{'' if cfg == '-' else f'_cfg{cfg:g}'}.png"
        image_grid(torch.stack(shown), picture, labels=titles, columns=10)
    write_results(args, run, results, [real_set], size=size, **record)

# -----------------------------------------------------------------------------
# probe: what a linear classifier reads off the frozen encoder (paper A.4)

def pooled(model, images, keep, run):
    """Frozen encoder: mean of the K tokens, class token, (B,D) each, float32 on the CPU."""
    with run.autocast():
        _, _, cls, tokens = model.encoder(images, keep)
    return tokens.float().mean(1).cpu(), cls.float().cpu()

def normaliser(x, protocol, run):
    """x (N,D) -> mean (D,), matrix (D,D) float64: a probe reads (x - mean) @ matrix. paper: unit
    variance, as of BatchNorm. whitened: unit covariance. Most of the variance of tokens lies in
    a few directions, and on such features an optimizer measures its own slowness."""
    moments = Moments(part.double() for part in x.split(8192))
    # x is of all ranks already: nothing is gathered
    mean, covariance = moments.statistics(run._replace(world=1))
    if protocol == "paper":
        return mean, torch.diag(1 / (covariance.diagonal().clamp_min(0).sqrt() + 1e-5))
    values, vectors = torch.linalg.eigh(covariance)
    # each eigenvalue grows by a little of their mean (a ridge), so that directions of mere
    # rounding are not blown up. Where nothing varies all of them are 0
    ridged = values.clamp_min(0) + 1e-4 * values.mean()
    return mean, vectors / ridged.clamp_min(1e-300).sqrt()

@torch.enable_grad()
def fit_to_convergence(x, y, num_classes, l2=1e-4, max_steps=2000):
    """Softmax regression by full-batch L-BFGS: x (N,D+1) with a last column of ones, y (N,) ->
    weights and bias (C,D+1); "" or why it ended before it converged."""
    def loss_and_gradient(flat):
        theta = torch.from_numpy(flat).to(x).view(num_classes, -1).requires_grad_()
        # the bias, in the last column, is not penalised
        loss = F.cross_entropy(x @ theta.T, y) + l2 / 2 * theta[:, :-1].square().sum()
        loss.backward()
        return loss.item(), theta.grad.flatten().double().cpu().numpy()

    start = np.zeros(num_classes * x.shape[1])
    # of many classes each has a small share of the gradient
    options = dict(maxiter=max_steps, gtol=1e-4 / max(10, num_classes))
    found = scipy.optimize.minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B",
                                    options=options)
    fault = "" if found.success else found.message
    return torch.from_numpy(found.x).to(x).view(num_classes, -1), fault

@torch.enable_grad()
def fit_as_in_the_paper(x, y, num_classes, args):
    """The same by the paper's protocol (A.4): AdamW, cosine, batches of 1,024. It needs many
    passes, and suits a data set too large for full batches. MAE (2111.06377) has LARS, warm-up and
    random crops; here the features of centre crops are computed once."""
    theta = torch.zeros(num_classes, x.shape[1]).to(x).requires_grad_()
    batch = min(1024, len(x))
    whole = len(x) // batch * batch
    optimizer = torch.optim.AdamW([theta], lr=args.lr, weight_decay=0.0)
    steps = whole // batch * args.epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(args.epochs):
        order = torch.randperm(len(x), generator=seeded(args.seed, epoch)).to(x.device)
        for rows in order[:whole].split(batch):
            F.cross_entropy(x[rows] @ theta.T, y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return theta.detach()

def linear_probe(train, val, num_classes, args, run):
    """A linear classifier on features (N,D) with labels (N,) -> train and val top-1; "" or why it
    has not converged."""
    mean, matrix = normaliser(train[0], args.protocol, run)

    def prepare(x, y):
        """Normalised features, with a last column of ones for the bias: (N,D+1), and labels."""
        parts = [((part.double() - mean) @ matrix).float() for part in x.split(8192)]
        x = F.pad(torch.cat(parts), (0, 1), value=1.0)
        return x.to(float64_device(run)), y.to(float64_device(run))

    train, val = prepare(*train), prepare(*val)
    if args.protocol == "paper":
        theta, fault = fit_as_in_the_paper(*train, num_classes, args), ""
    else:
        theta, fault = fit_to_convergence(*train, num_classes)
    check_finite("weights of the probe", theta.cpu())
    top1 = [((x @ theta.T).argmax(1) == y).double().mean().item() for x, y in (train, val)]
    return *top1, fault

def open_probe(args, model):
    """Training images of the probe, as centre crops. Raises UserError where they are too few."""
    dataset = build_dataset(args.data, "train", model.config.size, train=False)
    chosen = subset(len(dataset), args.train_num, args.seed)
    if len(set(dataset.labels[chosen].tolist())) < 2:
        raise UserError(f"the probe needs images of two classes, and {args.data} gives it one: "
                        "pass class folders, or a larger --train-num")
    args.train_num = len(chosen)
    return dataset

def probe_all(represent, train_set, val_set, args, run):
    """A linear probe for each key of represent(images) -> {key: (B,D)}, on --train-num and --num
    images -> {key: its row of the table}."""
    splits = []
    for dataset, num in ((train_set, args.train_num), (val_set, args.num)):
        parts = defaultdict(list)
        for images, labels in images_of(dataset, num, args, run, "encode"):
            for key, x in {**represent(images), "labels": labels.cpu()}.items():
                check_finite("features of the probe", x)
                parts[key].append(x)
        splits.append({key: gather_rows(torch.cat(part), run) for key, part in parts.items()})
    train, val = splits
    y, val_y = train.pop("labels"), val.pop("labels")
    results = {}
    for key, x in train.items():
        train_top1, val_top1, fault = linear_probe((x, y), (val[key], val_y),
                                                   train_set.num_classes, args, run)
        if fault and run.main:
            print(f"the probe of {key} has not converged: {fault}")
        results[key] = dict(dimensions=x.shape[1], train_top1=train_top1, val_top1=val_top1)
    return results

def probe(args):
    model, val_set, run = open_tokenizer(args)
    config, keeps = model.config, args.keep or (model.config.length,)
    train_set = open_probe(args, model)
    encoders = {"trained": model}
    # the control: the network before training. With the seed of a run it is where that run began,
    # but for --init dinov2
    for n in range(args.seeds):
        torch.manual_seed(args.seed + n)
        encoders[f"random {n}"] = MergeVQ(config).eval().to(run.device)

    def represent(images):
        found = {}
        for name, encoder in encoders.items():
            for keep in keeps:
                tokens, cls = pooled(encoder, images, keep, run)
                found[name, "tokens", keep] = tokens
                found[name, "class token", keep] = cls
                # as in DINOv2's linear probe (2304.07193)
                found[name, "both", keep] = torch.cat([cls, tokens], dim=1)
        pixels = F.adaptive_avg_pool2d(images, min(config.size, 32))
        found["-", "pixels", "-"] = torch.from_numpy(to_uint8(pixels)).flatten(1)
        return found

    results = probe_all(represent, train_set, val_set, args, run)
    names = ("encoder", "features", "keep")
    rows = [dict(zip(names, key), **row) for key, row in results.items()]
    write_results(args, run, rows, [train_set, val_set], align=config.align)

# -----------------------------------------------------------------------------
# train-classifier: the CNN that judges samples. finetune: the encoder of a tokenizer, trained as
# a classifier (paper A.4, after MAE)

@dataclasses.dataclass
class ClassifierConfig(RunConfig):
    """The defaults suit shapes. ImageNet takes --max-steps 0 --width 64."""
    # what fit() reads too. Without a type they are no fields, and so no flags
    mixup, smoothing, layer_decay, beta2, num = 0.0, 0.1, 1.0, 0.99, 0
    data: str = arg("shapes")
    out: str = arg("out/classifier")
    size: int = arg(32, help="image side in pixels", low=8)
    width: int = arg(32, help="channels of the first stage; 64 suits photographs", low=8)
    stride: int = arg(2, help="of the first convolution; 1 keeps the detail of small photographs",
                      low=1, high=2)
    batch_size: int = arg(64)
    max_steps: int = arg(600)
    epochs: int = arg(30)
    lr: float = arg(3e-3)
    warmup: int = arg(60)
    weight_decay: float = arg(0.05)
    clip: float = arg(100.0)
    ema: float = arg(0.0)

@dataclasses.dataclass
class FinetuneConfig(RunConfig):
    """tiny suits the default tokenizer. paper: 100 epochs of batch 1,024, the rest as in MAE, but
    without CutMix, RandAugment and random erasing, and with an average of the weights."""
    #                      tiny    paper
    recipe: str = arg(     "tiny", "paper", help="preset: tiny or paper")
    ckpt: str = arg("out/tokenizer/ckpt.pt", help="tokenizer whose encoder is fine-tuned")
    out: str = arg("out/finetune")
    data: str = arg("", help="data with classes; empty: what the tokenizer was trained on")
    keep: int = arg(0, help="tokens K; 0: all L, nothing merges", low=0)
    num: int = arg(0, help="validation images, 0: all", low=0)
    layer_decay: float = arg(0.8, 0.65, help="rate of a layer / of the next", low=0, high=1)
    mixup: float = arg(    0.2,    0.8, help="Beta of mixup (1710.09412); 0: off", low=0)
    smoothing: float = arg(0.1,    0.1, help="label smoothing", low=0, high=1)
    drop_path: float = arg(0.0,    0.1, low=0, high=0.99,
                           help="chance to skip a branch, in the last block")
    batch_size: int = arg( 64,     1024)
    max_steps: int = arg(  600,    0)
    epochs: int = arg(     100,    100)
    lr: float = arg(       1e-3,   2e-3)
    warmup: int = arg(     50,     6250)
    weight_decay: float = arg(0.05)
    beta2: float = arg(    0.99,   0.999, help="AdamW beta 2", low=0, high=0.99999)
    clip: float = arg(5.0)
    ema: float = arg(      0.99,   0.9999)
    eval_every: int = arg( 300,    5000)
    save_every: int = arg( 300,    5000)

RECIPES = presets(FinetuneConfig, ("tiny", "paper"))

def drop_path(rate, module, inputs, branch):
    """Forward hook of a residual branch (B,N,D): in training it is left out for an image with
    chance `rate`, and scaled up otherwise (1603.09382)."""
    if not module.training:
        return branch
    stays = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    return branch * stays / (1 - rate)

class FineTuned(nn.Module):
    """A tokenizer's encoder, and a linear layer on the mean of its tokens."""

    def __init__(self, encoder, keep, num_classes, rate):
        super().__init__()
        self.keep, self.depth = keep, len(encoder.blocks)
        self.encoder = encoder.requires_grad_(True)
        self.encoder.to_bits = nn.Identity()  # a classifier needs no codes
        self.head = nn.Linear(encoder.norm.weight.shape[0], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for i, block in enumerate(encoder.blocks if rate else ()):  # the chance rises from 0
            hook = partial(drop_path, rate * i / max(1, self.depth - 1))
            block.attn.proj.register_forward_hook(hook)
            block.mlp.register_forward_hook(hook)

    def forward(self, images):
        """images (B,3,H,W) -> mean token (B,D), logits (B,C)."""
        mean = self.encoder(images, self.keep)[3].mean(1)
        return mean, self.head(mean)

def layer_groups(model, config):
    """Optimizer groups with a `scale` of the rate: layer_decay^(layers above). Layer 0 is the
    stem, i + 1 block i, the last one norm and head."""
    groups, last = [], model.depth + 1
    for name, p in model.named_parameters():
        part, *rest = name.removeprefix("encoder.").split(".")
        layer = last if part in ("norm", "head") else 0
        layer = int(rest[0]) + 1 if part == "blocks" else layer
        # as everywhere, vectors do not decay; nor do these two tables
        decays = p.dim() >= 2 and part not in ("cls", "position")
        groups.append(dict(params=[p], scale=config.layer_decay ** (last - layer),
                           weight_decay=config.weight_decay * decays))
    return groups

def mix(images, targets, alpha, *key):
    """Mixup (1710.09412) with the batch in reverse order: images (B,3,H,W), targets (B,C)."""
    if not alpha:
        return images, targets
    share = np.random.default_rng(key).beta(alpha, alpha)
    return images.lerp(images.flip(0), share), targets.lerp(targets.flip(0), share)

@torch.no_grad()
def accuracy(model, dataset, config, batch_size, run):
    """Share of config.num val images (0: all; the same for each seed) whose label is the highest
    logit."""
    rows = subset(len(dataset), config.num)
    hits = [torch.zeros(0, dtype=torch.bool)]  # a rank may have no image
    for images, labels in val_batches(dataset, rows, batch_size, run, loader_workers(config)):
        logits = check_finite("logits", model(images)[1].cpu())
        hits.append(logits.argmax(1) == labels.cpu())
    return gather_rows(torch.cat(hits), run).double().mean().item()

def train_classifier(argv):
    config = parse_config(ClassifierConfig, "A small CNN that knows the classes.", argv[1:])
    fit(config, argv, "classifier", config.size,
        lambda classes: Classifier(config.size, classes, config.width, config.stride),
        fixed=("size", "stride"))

def finetune(argv):
    config = parse_config(FinetuneConfig, "A tokenizer's encoder as a classifier.", argv[1:],
                          RECIPES, "recipe")
    tokenizer = load_tokenizer(config.ckpt)
    t, encoder = tokenizer.config, tokenizer.encoder
    config.data, config.keep = config.data or t.data, config.keep or t.length
    merge_schedule(t.length, config.keep, t.depth)  # raises UserError on a K out of reach
    fit(config, argv, "finetuned", t.size,
        lambda classes: FineTuned(encoder, config.keep, classes, config.drop_path), ("keep",),
        tokenizer=weights_hash(tokenizer.state_dict()))

def fit(config, argv, kind, size, make_model, fixed, **record):
    """Train make_model(number of classes): images (B,3,size,size) -> features, logits (B,C).
    fixed: flags that a resumed run must keep."""
    config.command, config.argv = argv[0], argv
    train_set, val_set = open_data(config, size)
    classes = train_set.num_classes
    if classes < 2:
        raise UserError(f"--data {config.data} has no classes to tell apart: pass class folders")
    config.warmup = min(config.warmup, config.max_steps // 10)  # for short runs
    run = start_run(config)
    micro = micro_batch(config, run)
    state = open_out(config, run, kind, fixed)
    torch.manual_seed(config.seed)  # the same weights on every rank
    raw_model = make_model(classes).to(run.device)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    groups = layer_groups(raw_model, config)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, config.beta2), fused=True)
    parts = dict(model=raw_model, ema=ema, optimizer=optimizer)
    step, skipped = resume_run(config, state, run, parts)
    val_accuracy = state["val_accuracy"] if state else 0.0
    if config.compile:
        (raw_model.features if kind == "classifier" else raw_model.encoder.stem).compile()
    model = parallel(raw_model, run)
    stream = batches(train_set, config, run, step)
    metrics = Metrics(config, run, step, ("loss", "val_accuracy", "lr"))
    stop, stopping = catch_signals(), False
    while True:
        # N steps make N + 1 passes. Step 0 counts: a broken evaluation shows at once
        last = step >= config.max_steps
        if last or stopping or step % config.eval_every == 0:
            val_accuracy = accuracy(ema, val_set, config, micro, run)
            metrics.scores(step, dict(val_accuracy=val_accuracy))
        if run.main and (last or stopping or step % config.save_every == 0):
            save_run(config, kind, step, skipped, parts, val_accuracy=val_accuracy,
                     class_names=list(train_set.class_names))
        if last or stopping:
            break

        lr = set_learning_rate(step, config, optimizer)
        # drop path draws from torch's generator: the same after a resume
        torch.manual_seed(seeded(config.seed, step, 3, run.rank).initial_seed())
        raw_model.train()
        logs = defaultdict(float)
        for micro_step in range(config.accum):
            # DDP averages the gradients in the last backward pass only
            model.require_backward_grad_sync = micro_step == config.accum - 1
            images, labels = next(stream)
            targets = F.one_hot(labels, classes).float()  # (B,C)
            images, targets = mix(images, targets, config.mixup, config.seed, 3, step, micro_step)
            with run.autocast():
                _, logits = model(images)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.smoothing)
            (loss / config.accum).backward()
            logs["loss"] += loss.detach() / config.accum
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        finite = step_if_finite(norm, optimizer)
        update_ema(ema, raw_model, config.ema, step, finite)
        skipped += ~finite
        step += 1
        if step % config.log_every == 0 or step == config.max_steps:
            logs.update(grad_norm=norm, skipped=skipped)
            stopping = metrics.log(step, logs, stop, ("loss",), lr=lr)
    metrics.bar.close()
    if last:
        config.num = config.num or len(val_set)
        write_results(config, run, datasets=[train_set, val_set], size=size, steps=step,
                      skipped=int(skipped), val_top1=val_accuracy, **record)
    end_run(config, run, step,
            f"done: {config.out}/ckpt.pt; {val_accuracy:.2%} of the val images right")

# -----------------------------------------------------------------------------
# sweep: reconstruction against representation (Table 4, Figure 3)

def multiply_adds(encoder, size, keep):
    """Multiply-adds that encode one image: what the paper's tables call FLOPs."""
    images = torch.zeros(1, 3, size, size, device=next(encoder.parameters()).device)
    # the math backend: attention is two products that the counter sees
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(images, keep)
    return counter.get_total_flops() // 2

def sweep(args):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    keeps = args.keep or sorted({*config.keeps, config.keep, config.length})
    train_set = open_probe(args, model)
    rows, record = reconstruct(model, dataset, keeps, args, run)
    for row in rows:  # one K after the other: the features of all would not fit in memory
        keep = row["keep"]
        found = probe_all(lambda images: {keep: pooled(model, images, keep, run)[0]},
                          train_set, dataset, args, run)
        row["probe_top1"] = found[keep]["val_top1"]
        row["encoder_gmacs"] = multiply_adds(model.encoder, config.size, keep) / 1e9
    write_results(args, run, rows, [train_set, dataset], **record)
    if run.main:
        names = ("psnr", "rfd", "rFID", "probe_top1", "encoder_gmacs")
        columns = [name for name in rows[0] if name.startswith(names)]
        plot_rows(rows, f"{args.out}/sweep.png", columns, x="keep")

# -----------------------------------------------------------------------------
# speed: drawing the codes of an image in the three modes, without the tokenizer's decoder and
# source recovery. As ratios, since times alone say little about another machine

def speed(args):
    run, L, K, B = start_run(args), args.length, args.keep, args.batch_size
    if math.isqrt(L) ** 2 != L or K > L:
        raise UserError(f"--length {L} must be a square, and --keep {K} at most that")
    if args.width % (4 * args.heads):
        raise UserError(f"--width {args.width} must be a multiple of 4 x --heads {args.heads}")
    torch.manual_seed(args.seed)
    sizes = dict(width=args.width, depth=args.depth, heads=args.heads, window=16, head_depth=2,
                 bits=18, length=L, keep=K, keeps=(K,))
    gpts = {mode: GPT(GPTConfig(mode=mode, **sizes)).to(run.device, run.dtype).eval()
            for mode in MODES}
    labels, seconds = torch.zeros(B, dtype=torch.long), dict.fromkeys(MODES, math.inf)
    for turn in range(args.repeats + 1):  # they take turns, and the first turn warms up
        for mode, gpt in gpts.items():
            began = time.perf_counter()
            # a step costs the same whatever is drawn: all rows of a cache take part, under a mask
            sample_codes(gpt, labels, cfg=2.0)[0].cpu()  # waits for the device
            if turn:
                seconds[mode] = min(seconds[mode], time.perf_counter() - began)
    # guidance runs each image twice, with its class and without: 2 B rows
    cache = {mode: gpt.new_cache(2 * B, K).nbytes for mode, gpt in gpts.items()}
    rows = [dict(mode=mode, images_per_s=B / seconds[mode],
                 speedup=seconds["raster"] / seconds[mode],
                 cache_bytes=cache[mode], cache_ratio=cache[mode] / cache["raster"])
            for mode in MODES]
    write_results(args, run, rows, threads=torch.get_num_threads(), **sizes)

# -----------------------------------------------------------------------------
# Commands and flags

TRAINING = {"train-classifier": train_classifier, "finetune": finetune}
COMMANDS = {**TRAINING, "recon": recon, "maps": maps, "stats": stats, "gen": gen, "probe": probe,
            "sweep": sweep, "ablate-source": ablate_source, "speed": speed}
RECON = "recon sweep ablate-source"
VAL = f"{RECON} probe"  # commands that measure a tokenizer on val
JUDGED = f"{RECON} stats gen"
DATA = f"{VAL} maps stats gen"
NETWORKS = ("classifier", "inception")
FLAGS = [  # name, default, help, commands, then choices or range; numbers are 0 or more
    ("ckpt", "out/tokenizer/ckpt.pt", "tokenizer or generator", f"{VAL} maps"),
    ("ckpt", "out/mergear/ckpt.pt", "generator to measure", "gen"),
    ("data", "", "data set; empty: that of the checkpoint", f"{VAL} maps gen"),
    ("data", "shapes", "data set", "stats"),
    ("labels", True, "folders are classes", "recon maps ablate-source stats gen"),
    ("num", 0, "images; 0: all, or 500 to draw", f"{VAL} gen"),
    ("num", 8, "images", "maps", dict(low=1)),
    ("keep", (), "values of K; empty: the usual ones", f"{VAL} maps", dict(low=1)),
    ("keep", 64, "merge count K", "speed", dict(low=2)),
    ("batch_size", 32, "images at a time", f"{VAL} maps stats gen", dict(low=1)),
    ("batch_size", 8, "images at a time", "speed", dict(low=1)),
    ("features", "classifier", "network of the Frechet distance", RECON,
     dict(choices=(*NETWORKS, "none"))),
    ("features", "classifier", "network to judge with", "stats gen", dict(choices=NETWORKS)),
    ("classifier", CLASSIFIER, "checkpoint of train-classifier", JUDGED),
    ("inception_weights", "", "pytorch-fid's weight file, or download", JUDGED),
    ("lpips_weights", "", "LPIPS' v0.1 vgg.pth, or download", RECON),
    ("vgg_weights", "", "torchvision's VGG16, or download, for LPIPS", RECON),
    ("reference", "", "npz of stats or ADM; empty: --data", "gen"),
    ("samples", "", "npz (arr_0 uint8 NHWC, arr_1 labels) instead of --ckpt", "gen"),
    ("cfg", [1.0, 1.5, 2.0, 3.0], "guidance scales", "gen", dict(high=1000)),
    ("protocol", "whitened", "whitened: L-BFGS; paper: AdamW", "probe sweep",
     dict(choices=("whitened", "paper"))),
    ("train_num", 0, "training images of the probe; 0: all", "probe sweep"),
    ("seeds", 1, "random encoders to compare with", "probe", dict(high=100)),
    ("epochs", 90, "passes of --protocol paper", "probe sweep", dict(low=1)),
    ("lr", 0.1, "initial rate of --protocol paper", "probe sweep"),
    ("size", 0, "image side in pixels; 0: the classifier's", "stats"),
    ("length", 256, "codes of an image L, a square", "speed", dict(low=4)),
    ("width", 256, "of the generators", "speed", dict(low=4)),
    ("depth", 4, "blocks", "speed", dict(low=1)),
    ("heads", 8, "attention heads", "speed", dict(low=1)),
    ("repeats", 2, "measurements; the fastest counts", "speed", dict(low=1)),
    ("workers", -1, "loader processes; -1: automatic", DATA, dict(low=-1, high=256)),
    ("seed", 0, "of what is drawn", f"{DATA} speed", dict(high=2**31 - 1)),
    ("device", "auto", "auto, or a torch device", f"{DATA} speed"),
    ("dtype", "auto", "autocast type; auto: bfloat16 on CUDA", f"{DATA} speed",
     dict(choices=("auto", "float32", "bfloat16"))),
    ("out", "", "folder for results; empty: out/COMMAND", f"{DATA} speed"),
]

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TRAINING:  # flags are the fields of a config
        return TRAINING[argv[0]](argv)
    parser = Parser(description=__doc__)
    parsers = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for command in COMMANDS:
        p = parsers.add_parser(command)
        p.set_defaults(labels=True)  # probe and sweep need classes, and have no such flag
        for name, default, help, commands, *limits in FLAGS:
            limits = {"low": 0} | (limits[0] if limits else {})
            if command in commands.split():
                p.flag(name, type(default), default, help, **limits)
    args = parser.parse_args(argv)
    args.out = args.out or f"out/{args.command}"
    os.makedirs(args.out, exist_ok=True)
    args.argv = argv
    # full float32, as published features are: cuDNN's default for convolutions is TF32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():  # nothing trains but the probe, which says so
        COMMANDS[args.command](args)
    if dist.is_initialized():
        dist.destroy_process_group()

if __name__ == "__main__":
    run_main(main)
