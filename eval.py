"""Measure what the other scripts made, and see it. One command each:

    python eval.py train-classifier                        # a small CNN that knows the classes, about a minute
    python eval.py recon                                   # r-Frechet, PSNR, SSIM, code usage of out/tokenizer/ckpt.pt on val
    python eval.py recon --keep 16,36,64 --num 200         # several K, 200 of the images
    python eval.py maps --keep 16,36,64                    # a picture of which patches merge
    python eval.py gen --cfg 1,1.5,2,3                     # samples against training images: Frechet, IS, precision, recall,
                                                           # and how many of them the CNN assigns to the asked class
    python eval.py gen --samples samples.npz               # the same for images drawn before (arr_0 uint8, arr_1 labels)
    python eval.py stats                                   # the training images' mu and sigma, for gen --reference
    python eval.py probe                                   # linear probe: tokens, random encoder, pixels
    python eval.py finetune                                # the whole encoder trained as a classifier
    python eval.py sweep                                   # reconstruction, probe and cost against K: paper Table 4
    python eval.py ablate-source                           # true against predicted source: paper Table 5
    python eval.py speed                                   # decoding of the three modes and more, as ratios within one run

    torchrun --nproc_per_node=8 -- eval.py recon --ckpt out/g/ckpt.pt --data data/imagenet --features inception --num 50000

What a Frechet distance looks at is --features: the CNN of train-classifier, whose numbers are called fd and is-clf and mean
something within one project only, or the Inception network, whose numbers are called FID and IS. Other than 50,000 images
are part of the name: FID-10k, fd-1000. Reconstructions are compared with the same val crops, samples with training images.

What measures a checkpoint writes its numbers to a JSON file in --out, beside what one must know to compare them: the command,
hashes of the weights and of the reference, the number of images, the data, the dtype, the seed. The metrics are plain functions
at the top. They are computed in float64 from sums over images, so that no number depends on the batch size or on the number
of processes beyond the rounding of the networks.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import time
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import UserError, batches, build_dataset, image_grid, make_folder, run_main, to_uint8
from generate import check_keep
from mergear import (GPT, MODES, GPTConfig, arccos_steps, decode_codes, decode_in_turn, decode_parallel, load_generator,
                     pick_codes, sample_codes)
from recovery import (common_flags, enlarge, gather, load_recovery, map_scale, merge_map, number, numbers,
                      open_tokenizer, pick_images, recover, share, val_batches, write_results)
from tokenizer import (MergeVQ, Parser, ResBlock, Run, RunConfig, TokenizerConfig, adamw, any_rank, append_metrics, arg,
                       canonical_source, check_bad, check_batch, code_statistics, codes_to_bits, disk_may_fail, learning_rate,
                       lfq_entropy, load_checkpoint, load_lpips, load_tokenizer, load_weights, loader_workers, match_tokens,
                       mean_over_ranks, merge_schedule, merge_tokens, no_sync, parallel, parse_config, pick_device, plot_curves,
                       plot_rows, prepare_out, psnr, reading, save_checkpoint, seeded, start_run, subset, trim_metrics,
                       update_ema, weights_hash)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: plain functions of tensors or arrays. psnr(a, b) is tokenizer.py's.

def check_finite(name, values):
    """The values as float64, or an error: a metric never hides a NaN."""
    values = torch.as_tensor(values).double()
    if not values.isfinite().all():
        raise UserError(f"{name}: {int((~values.isfinite()).sum())} of {values.numel()} values are not finite: "
                        "the weights, the images or the reference may be damaged")
    return values


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Distance of two Gaussians, the F in FID: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). Float.

    The trace of that root is the sum of the square roots of the eigenvalues of sigma1 sigma2. With sigma1 = A A^T these
    are the eigenvalues of the symmetric A^T sigma2 A: real, not negative, and no root of a singular matrix is taken,
    which matters with fewer images than dimensions.
    """
    mu1, sigma1, mu2, sigma2 = (check_finite(name, x) for name, x in
                                dict(mu1=mu1, sigma1=sigma1, mu2=mu2, sigma2=sigma2).items())
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1]:
        raise UserError(f"Frechet distance of {len(mu1)} and {len(mu2)} features: both sides must be made with the same network")
    values, vectors = torch.linalg.eigh(sigma1)
    in_range = values > values.max() * len(values) * torch.finfo(values.dtype).eps    # the others are rounding errors of 0
    A = vectors[:, in_range] * values[in_range].sqrt()                                # (D,rank)
    cross = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp_min(0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


class Moments:
    """Mean and covariance of rows that come in batches, for a Frechet distance. Sums in float64 over images, not means
    over batches: neither the batch size nor the number of processes changes the result beyond the last digits."""
    def __init__(self):
        self.num, self.sum, self.outer = 0, 0.0, 0.0

    def add(self, rows):  # (B,D) float64
        self.num += len(rows)
        self.sum += rows.sum(0)
        self.outer += rows.T @ rows

    def statistics(self, run):
        """-> (mu (D,), sigma (D,D)) over the rows of all ranks; sigma divides by N - 1, as np.cov does."""
        num, total, outer = (gather(torch.as_tensor(x)[None], run).sum(0) for x in (self.num, self.sum, self.outer))
        if num < 2:
            raise UserError("the covariance of 1 image is not defined: pass a larger --num, or --features none")
        mu = total / num
        return mu, (outer - num * torch.outer(mu, mu)) / (num - 1)


def inception_score(probs, splits=10, seed=0):
    """probs (N,C), a class distribution a sample -> (mean, std) over `splits` parts of exp(mean KL(p || mean p)).

    Files often lie sorted by class, and a part that holds a few classes only scores far too low. So the rows are
    shuffled, and before that sorted by value, or the result would still depend on the order they came in.
    """
    p = check_finite("probs", probs).cpu()
    if p.dim() != 2 or not 1 <= splits <= len(p):
        raise UserError(f"probs has shape {tuple(p.shape)}: pass (N,C) with N at least the {splits} splits")
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise UserError("probs must be class distributions: each row at least 0 with sum 1; pass them through a softmax")
    rows = [row.tobytes() for row in p.numpy().astype(">f8")]  # big-endian: the bytes sort as the numbers, rounding last
    p = p[sorted(range(len(rows)), key=rows.__getitem__)]
    p = p[torch.randperm(len(p), generator=seeded(seed))]
    scores = []
    for part in p.tensor_split(splits):
        divergence = (torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3, chunk=1000):
    """Improved precision and recall (1904.06991) of features real (N,D), fake (M,D) -> (precision, recall).

    Precision: the share of fakes that lie in a ball around some real image, whose radius is the distance from that image
    to its k-th nearest other real image. Recall: the same with the roles exchanged. Both grow with the number of images
    that the balls are drawn around, so compare at equal N and M.
    """
    real, fake = check_finite("real features", real), check_finite("fake features", fake)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"precision and recall of {len(real)} and {len(fake)} images: {k} neighbours need {k + 1} at least")

    def radii(x):  # an image is its own nearest neighbour, so one more is asked for
        return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, -1] for part in x.split(chunk)])

    def covered(x, centers):
        radius = radii(centers)
        return torch.cat([(torch.cdist(part, centers) <= radius).any(1) for part in x.split(chunk)]).double().mean().item()

    return covered(fake, real), covered(real, fake)


SSIM_WINDOW = 11


def ssim(a, b):
    """Structural similarity of each image: (B,C,H,W) in [-1,1] twice -> (B,) float64; 1 for equal images.

    As in the 2004 paper and scikit-image's gaussian_weights=True, use_sample_covariance=False: windows of 11 x 11 with
    sigma 1.5, K1 = 0.01, K2 = 0.03, the mean over all windows that lie inside the image. Values are clamped first.
    """
    if a.shape != b.shape or min(a.shape[-2:]) < SSIM_WINDOW:
        raise UserError(f"SSIM of {tuple(a.shape)} and {tuple(b.shape)}: pass equal shapes of at least {SSIM_WINDOW} px a side")
    a, b = a.double().clamp(-1, 1), b.double().clamp(-1, 1)
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * 1.5 ** 2))
    weights = (weights / weights.sum()).tolist()

    def blur(x):  # the window is separable: first down, then across
        H, W = x.shape[-2] - SSIM_WINDOW + 1, x.shape[-1] - SSIM_WINDOW + 1
        x = sum(w * x[..., i:i + H, :] for i, w in enumerate(weights))
        return sum(w * x[..., i:i + W] for i, w in enumerate(weights))

    mean_a, mean_b, square_a, square_b, product = blur(torch.stack([a, b, a * a, b * b, a * b]))
    var_a, var_b, cov = square_a - mean_a ** 2, square_b - mean_b ** 2, product - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2                                         # the values span 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1)


def bit_balance(counts, d):
    """Histogram of codes (2^d) -> (largest distance of a bit's mean from even, number of bits that never change)."""
    code = torch.arange(2 ** d)
    on = torch.stack([counts[code >> j & 1 == 1].sum() for j in range(d)]).double() / counts.sum()
    return (on - 0.5).abs().max().item(), int(((on == 0) | (on == 1)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# FID's network: the InceptionV3 (1512.00567) that TensorFlow published in 2015, in the file format of pytorch-fid

def inception_blocks():
    """{block: {branch: its convolutions}}; a convolution is (width, height, width of its kernel), a list of two forks."""
    def a(pool):
        return dict(branch1x1=[(64, 1, 1)], branch5x5=[(48, 1, 1), (64, 5, 5)],
                    branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)], branch_pool=[(pool, 1, 1)])

    def c(w):
        return dict(branch1x1=[(192, 1, 1)], branch7x7=[(w, 1, 1), (w, 1, 7), (192, 7, 1)],
                    branch7x7dbl=[(w, 1, 1), (w, 7, 1), (w, 1, 7), (w, 7, 1), (192, 1, 7)], branch_pool=[(192, 1, 1)])

    fork = [(384, 1, 3), (384, 3, 1)]
    e = dict(branch1x1=[(320, 1, 1)], branch3x3=[(384, 1, 1), fork], branch3x3dbl=[(448, 1, 1), (384, 3, 3), fork],
             branch_pool=[(192, 1, 1)])
    return {"Mixed_5b": a(32), "Mixed_5c": a(64), "Mixed_5d": a(64),
            "Mixed_6a": dict(branch3x3=[(384, 3, 3)], branch3x3dbl=[(64, 1, 1), (96, 3, 3), (96, 3, 3)]),
            "Mixed_6b": c(128), "Mixed_6c": c(160), "Mixed_6d": c(160), "Mixed_6e": c(192),
            "Mixed_7a": dict(branch3x3=[(192, 1, 1), (320, 3, 3)],
                             branch7x7x3=[(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)]),
            "Mixed_7b": e, "Mixed_7c": e}


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""
    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)
        self.relu = nn.ReLU()


class InceptionBlock(nn.ModuleDict):
    """Branches side by side, concatenated. One without a branch_pool halves the grid: stride 2 at each branch's end."""
    def __init__(self, c_in, branches, shrink, max_pool):
        super().__init__()
        self.max_pool, self.halves = max_pool, "branch_pool" not in branches
        self.branches, self.width = [], c_in if self.halves else 0          # branches: names, in steps, of which some fork
        for branch, convs in branches.items():
            steps, c = [], c_in
            for i, conv in enumerate(convs):
                forks, names = conv if isinstance(conv, list) else [conv], []
                for letter, (w, kh, kw) in zip("ab", forks):
                    names.append(branch + f"_{i + 1}" * (len(convs) > 1) + letter * (len(forks) > 1))
                    last = self.halves and i == len(convs) - 1
                    self[names[-1]] = ConvNorm(c, w // shrink, (kh, kw), 2 if last else 1, 0 if last else (kh // 2, kw // 2))
                steps, c = steps + [names], len(forks) * (w // shrink)
            self.branches.append(steps)
            self.width += c

    def forward(self, x):  # (B,C,H,W) -> (B,self.width,H,W) or half of H and W
        outputs = []
        for steps in self.branches:
            h = x
            if steps[0] == ["branch_pool"]:  # TensorFlow's average leaves the padding out
                h = F.max_pool2d(x, 3, 1, 1) if self.max_pool else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            for names in steps:
                h = torch.cat([self[name](h) for name in names], 1)
            outputs.append(h)
        if self.halves:
            outputs.append(F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)


class FIDInception(nn.Module):
    """images (B,3,H,W) in [-1,1] of any size -> (features (B,2048), logits (B,1008)), float32 whatever the autocast.

    As pytorch-fid does, the images are resized to 299 x 299, bilinear, align_corners=False, without antialias. (TensorFlow's
    resize differs a little, so FID against ADM's own statistics does too.) The logits leave the last layer's bias out, as the
    Inception Score's first code, ADM's evaluator and torch-fidelity do. shrink divides every width (tests).
    """
    def __init__(self, shrink=1):
        super().__init__()
        stem, c = [], 3
        for name, w, kernel, stride, padding in (
                ("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3, 1, 1),
                ("pool1", 0, 3, 2, 0), ("Conv2d_3b_1x1", 80, 1, 1, 0), ("Conv2d_4a_3x3", 192, 3, 1, 0), ("pool2", 0, 3, 2, 0)):
            stem.append((name, ConvNorm(c, w // shrink, kernel, stride, padding) if w else nn.MaxPool2d(kernel, stride)))
            c = w // shrink or c
        self.trunk = nn.Sequential(OrderedDict(stem))
        for name, branches in inception_blocks().items():
            self.trunk.add_module(name, InceptionBlock(c, branches, shrink, max_pool=name == "Mixed_7c"))
            c = self.trunk[-1].width
        self.fc = nn.Linear(c, 1008)

    @torch.no_grad()
    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            x = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
            features = self.trunk(x).mean((2, 3))
            return features, features @ self.fc.weight.T


def load_inception(path, device="cpu", shrink=1):
    """pytorch-fid's weight file, or `download` -> FIDInception in eval mode, frozen. Raises UserError."""
    net = FIDInception(shrink)
    shapes = {name.removeprefix("trunk."): w.shape for name, w in net.state_dict().items() if not name.endswith("tracked")}
    state = load_weights("inception", path, shapes, unused=("num_batches_tracked",))
    net.load_state_dict({name if name.startswith("fc.") else f"trunk.{name}": w for name, w in state.items()})
    return net.to(device).eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Features: what a fixed network sees in an image. Frechet distance, Inception Score, precision and recall look at nothing else

CLASSIFIER = "out/classifier/ckpt.pt"  # where train-classifier writes


class Features(NamedTuple):
    """A frozen network with what its numbers are called, and what to record beside them."""
    network: nn.Module  # images (B,3,H,W) float32 in [-1,1] -> features (B,D), logits (B,C)
    frechet: str        # fd, or FID for the Inception network that the name stands for
    score: str          # is-clf, or IS
    judge: dict         # the classifier's checkpoint: config, class_names, val_accuracy; empty for Inception
    record: dict        # for the result file

    def r_name(self, num):
        """Name of the distance between reconstructions and their originals: rFID, rfd-1000."""
        return labelled("r" + self.frechet, num)

    @torch.no_grad()
    def __call__(self, images):
        """Images on any device -> features (B,D), logits (B,C), float64 on the CPU; computed in float32, never autocast."""
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, enabled=False):
            features, logits = self.network(images.to(device).float())
        return check_finite("features", features.cpu()), check_finite("logits", logits.cpu())


def open_features(args, size, run, required=True):
    """--features for images of `size` px (0: any) -> Features. None for `none`, and where neither a classifier was named nor
    the default one exists, unless `required`."""
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the features: it moves them in the third digit, and
    torch.backends.cudnn.allow_tf32 = False        # numbers are compared with those of other machines
    if args.features == "none":
        return None
    if args.features == "inception":
        network, judge, names = load_inception(args.inception_weights, run.device), {}, ("FID", "IS")
    elif not required and args.classifier == CLASSIFIER and not os.path.exists(CLASSIFIER):
        print(f"there is no {CLASSIFIER}, so no Frechet distance is measured: `python eval.py train-classifier` makes one",
              file=sys.stderr)
        return None
    else:
        network, judge = load_classifier(args.classifier, run.device)
        names = ("fd", "is-clf")
        if size and judge["config"]["size"] != size:
            raise UserError(f"--classifier {args.classifier} judges images of {judge['config']['size']} px, but these have "
                            f"{size} px: train one on the same --data and --size")
    record = dict(features=args.features, features_hash=weights_hash(network.state_dict()))
    if judge:
        record.update(classifier=args.classifier, val_accuracy=judge["val_accuracy"])
    return Features(network, *names, judge, record)


def reference_hash(mu, sigma):
    """Two equal hashes: the same statistics, to the last digit."""
    return weights_hash(dict(mu=torch.as_tensor(mu), sigma=torch.as_tensor(sigma)))


def labelled(name, num):
    """FID of 10,000 images -> "FID-10k": whatever was not measured on the customary 50,000 says so in its name."""
    if num == 50_000:
        return name
    return f"{name}-{num // 1000}k" if num >= 10_000 and num % 1000 == 0 else f"{name}-{num}"


# ---------------------------------------------------------------------------------------------------------------------
# recon: how well the tokenizer gives images back

@torch.no_grad()
def reconstruct(model, dataset, keeps, features, lpips, args, run, sources=None):
    """Encode and decode --num val images at each K -> (a dict of measures for each K, what to record beside them).

    Over all ranks. The reference of the Frechet distance are the very crops that were encoded; features and lpips may be None.
    sources {name: Encoded -> source (b,L)}: other merge maps to decode with than the true one, each of them in its own row.
    """
    bits, ways = model.config.bits, sources or {"true": lambda encoded: encoded.source}
    cases = [(keep, name) for keep in keeps for name in ways]
    values, counts = {case: [] for case in cases}, {keep: torch.zeros(2 ** bits, dtype=torch.long) for keep in keeps}
    real, moments = Moments(), {case: Moments() for case in cases}
    for images, _ in val_batches(dataset, args.num, args, "reconstruct", run):
        images = images.to(run.device)
        if features:
            real.add(features(images)[0])
        for keep in keeps:
            with run.autocast():
                encoded = model.encode(images, keep)
                predicted = model.recover(encoded.codes)
            counts[keep] += torch.bincount(encoded.codes.flatten().cpu(), minlength=2 ** bits)
            for name, way in ways.items():
                with run.autocast():
                    source = way(encoded)
                    decoded = model.decode(encoded.codes, source)
                pair = (decoded, images) if run.device.type != "mps" else (decoded.cpu(), images.cpu())     # MPS has no float64
                columns = [psnr(*pair), ssim(*pair), *((s == encoded.source).float().mean(1) for s in (source, predicted))]
                if lpips:
                    columns.append(lpips(decoded.clamp(-1, 1), images))
                values[keep, name].append(torch.stack([column.double().cpu() for column in columns], 1))      # (b,4 or 5)
                if features:
                    moments[keep, name].add(features(eight_bit(decoded))[0])

    rows, reference = [], real.statistics(run) if features else None
    seen = {keep: gather(counts[keep][None], run).sum(0) for keep in keeps}
    for keep, name in cases:
        table = gather(torch.cat(values[keep, name]), run)
        check_finite(f"PSNR, SSIM, LPIPS at K = {keep}", table.masked_fill(table == math.inf, 0))      # equal images: PSNR inf
        p, s, right, hits, *distance = table.mean(0).tolist()
        usage, perplexity = code_statistics(seen[keep])
        imbalance, dead = bit_balance(seen[keep], bits)
        row = dict(keep=keep, psnr=p if p < math.inf else "inf", ssim=s, usage=usage, perplexity=perplexity,
                   bit_imbalance=imbalance, dead_bits=dead, recovery_accuracy=hits, codes_seen=int(seen[keep].sum()))
        if sources:
            row.update(source=name, accuracy=right)
        if lpips:
            row["lpips"] = distance[0]
        if features:
            row[features.r_name(args.num)] = frechet_distance(*reference, *moments[keep, name].statistics(run))
        rows.append(row)
    if not features:
        return rows, {}
    return rows, dict(features.record, reference="the same val crops", reference_hash=reference_hash(*reference))


@torch.no_grad()
def recon(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    lpips = load_lpips(args.lpips_weights, args.vgg_weights, run.device) if args.lpips_weights else None
    features = open_features(args, config.size, run, required=False)
    make_folder(args.out)
    keeps = args.keep or sorted({config.keep, config.length})
    rows, record = reconstruct(model, dataset, keeps, features, lpips, args, run)
    if lpips:
        record["lpips_hash"] = weights_hash(lpips.state_dict())
    unreadable = int(gather(torch.tensor([len(dataset.skipped())]), run).sum())
    if not run.main:
        return
    print(f"{args.ckpt} on {args.num} val images of {args.data}, {config.size} px, L = {config.length}, "
          f"{run.dtype} on {run.device}")
    more = ["lpips"] * bool(lpips) + ([features.r_name(args.num)] if features else [])
    print(f"{'K':>5} {'PSNR':>7} {'SSIM':>7} {'usage':>7} {'perplexity':>11} {'bit imbalance':>14} {'dead bits':>10} "
          f"{'recovery':>9}" + "".join(f" {key:>10}" for key in more))
    for row in rows:
        print(f"{row['keep']:5} {float(row['psnr']):7.2f} {row['ssim']:7.4f} {row['usage']:7.1%} {row['perplexity']:11.1f} "
              f"{row['bit_imbalance']:14.3f} {row['dead_bits']:10} {row['recovery_accuracy']:9.2%}"
              + "".join(f" {row[key]:10.4f}" for key in more))
    write_results(os.path.join(args.out, "recon.json"), "eval.py", argv, args, run, size=config.size, bits=config.bits,
                  tokenizer=weights_hash(model.state_dict()), weights="ema", **record, unreadable=unreadable, results=rows)

    images = pick_images(dataset, 8, args.seed)
    rows = [images]
    for keep in keeps:
        with run.autocast():
            encoded = model.encode(images.to(run.device), keep)
            rows.append(model.decode(encoded.codes, encoded.source).cpu())
    picture = os.path.join(args.out, "recon.png")
    image_grid(rows, picture, row_titles=["original"] + [f"K = {keep}" for keep in keeps])
    print(f"wrote {args.out}/recon.json and {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# maps: which patches became one token

@torch.no_grad()
def maps(args, argv):
    model, dataset, run = open_tokenizer(args)
    if not run.main:  # one picture needs one process
        return
    make_folder(args.out)
    images = pick_images(dataset, args.num, args.seed)
    scale = map_scale(images.shape[-1])
    rows, titles = [enlarge(images, scale)], ["image"]
    for keep in args.keep or sorted({min(model.config.keeps), model.config.keep, model.config.length}):
        with run.autocast():
            source = model.encode(images.to(run.device), keep).source.cpu()
        rows.append(merge_map(images, source, scale))
        titles.append(f"K = {keep}")
    picture = os.path.join(args.out, "maps.png")
    image_grid(rows, picture, scale=1, row_titles=titles)
    print(f"wrote {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# train-classifier: a judge for class-conditional samples that needs no download

class Classifier(nn.Module):
    """Small residual CNN: (B,3,size,size) -> pooled features (B,c), logits (B,num_classes). 0.3M parameters at 32 px."""
    def __init__(self, size, num_classes):
        super().__init__()
        stages = max(2, round(math.log2(size / 4)))           # the last one works on 4 x 4 or so
        widths = [min(32 * 2 ** i, 128) for i in range(stages)]
        layers, c = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1)], widths[0]
        for i, w in enumerate(widths):
            layers += [nn.AvgPool2d(2)] * (i > 0) + [ResBlock(c, w, groups=8)]
            c = w
        self.features = nn.Sequential(*layers, nn.GroupNorm(8, c), nn.SiLU())
        self.to_logits = nn.Linear(c, num_classes)

    def forward(self, images):
        pooled = self.features(images).mean((2, 3))
        return pooled, self.to_logits(pooled)


@torch.no_grad()
def accuracy(model, labelled_batches, run):
    """Share of images that the classifier assigns to their label, over batches of (images, labels)."""
    hits = []
    for images, labels in labelled_batches:
        _, logits = model(images.to(run.device))
        hits.append(check_finite("logits", logits.cpu()).argmax(1) == labels)
    return gather(torch.cat(hits), run).double().mean().item()


def train_classifier(args, argv):
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("train-classifier runs on one process: start it with python, not torchrun")
    device, dtype = pick_device(args.device, args.dtype)
    run, args.resume = Run(0, 1, device, dtype), False
    train_set = build_dataset(args.data, "train", args.size, train=True, seed=args.seed)
    val_set = build_dataset(args.data, "val", args.size, train=False)
    if train_set.num_classes < 2:
        raise UserError(f"--data {args.data} has no classes to tell apart: pass images in class folders")
    prepare_out(args, run)
    torch.manual_seed(args.seed)
    model = Classifier(args.size, train_set.num_classes).to(device)
    optimizer = adamw(model.named_parameters(), args, (0.9, 0.99), 0.05, device)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.max_steps + 1)
    stream = batches(train_set, args.batch_size, args.seed, workers=loader_workers(args))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {train_set.num_classes} classes, {args.size} px")
    bar = tqdm(range(args.max_steps), dynamic_ncols=True)
    for step in bar:
        images, labels = next(stream)
        with run.autocast():
            _, logits = model(images.to(device))
        loss = F.cross_entropy(logits.float(), labels.to(device), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{check_finite('loss', loss.detach()).item():.3f}")
    val = accuracy(model.eval(), val_batches(val_set, len(val_set), args, "val"), run)
    path = os.path.join(args.out, "ckpt.pt")
    config = dict(size=args.size, num_classes=train_set.num_classes, data=args.data, seed=args.seed,
                  max_steps=args.max_steps, batch_size=args.batch_size, lr=args.lr)
    save_checkpoint(path, "classifier", model=model.state_dict(), class_names=list(train_set.class_names),
                    val_accuracy=val, val_num=len(val_set), config=config)
    print(f"{val:.2%} of {len(val_set)} val images right; wrote {path}")


def load_classifier(path, device="cpu"):
    """Checkpoint of train-classifier -> (Classifier in eval mode, dict of config, class_names, val_accuracy)."""
    state = load_checkpoint(path, "classifier")
    with reading(path):
        model = Classifier(state["config"]["size"], state["config"]["num_classes"])
        model.load_state_dict(state.pop("model"))
    return model.to(device).eval().requires_grad_(False), state


# ---------------------------------------------------------------------------------------------------------------------
# stats: what generated images are compared with

def statistics_of(dataset, features, args, run):
    """mu (D,), sigma (D,D) of the features of all centre crops of a data set."""
    moments = Moments()
    for images, _ in val_batches(dataset, len(dataset), args, "reference", run):
        moments.add(features(images)[0])
    return moments.statistics(run)


def stats(args, argv):
    if args.features == "inception" and not args.size:
        raise UserError("--features inception takes any image size: pass --size, that of the images which you will compare")
    run = start_run(args)
    features = open_features(args, args.size, run)
    args.size = args.size or features.judge["config"]["size"]
    dataset = build_dataset(args.data, "train", args.size, train=False)
    args.num = len(dataset)
    make_folder(args.out)
    mu, sigma = statistics_of(dataset, features, args, run)
    if not run.main:
        return
    path = os.path.join(args.out, "stats.npz")
    np.savez(f"{path}.tmp.npz", mu=mu, sigma=sigma, features_hash=features.record["features_hash"], size=args.size, num=args.num)
    os.replace(f"{path}.tmp.npz", path)
    write_results(os.path.join(args.out, "stats.json"), "eval.py", argv, args, run, size=args.size, split="train",
                  reference_hash=reference_hash(mu, sigma), unreadable=len(dataset.skipped()), **features.record)
    print(f"{args.num} training images of {args.data}, {args.size} px, {len(mu)} features; wrote {path}: "
          f"python eval.py gen --features {args.features} --reference {path}")


class Reference(NamedTuple):
    mu: torch.Tensor     # (D,)
    sigma: torch.Tensor  # (D,D)
    rows: torch.Tensor   # (M,D) features of real images, for precision and recall; None when there are no images at hand
    record: dict


def read_reference(path, features, size):
    """npz of `stats`, or ADM's -> (mu (D,), sigma (D,D), real images (M,H,W,3) uint8 or None). Raises UserError."""
    try:
        with np.load(path) as file:
            mu, sigma = (torch.as_tensor(file[name]).double() for name in ("mu", "sigma"))
            made_with, pixels = str(file.get("features_hash", "")), file.get("arr_0")
            made_size = int(file.get("size", size if pixels is None else pixels.shape[1]))
    except Exception as e:  # a damaged zip can raise anything
        raise UserError(f"--reference {path} cannot be read ({e}): pass an npz with mu and sigma, as `eval.py stats` writes it")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or pixels is not None and not are_pictures(pixels):
        raise UserError(f"--reference {path}: mu is {tuple(mu.shape)}, sigma {tuple(sigma.shape)}; (D,), (D,D) are needed, and "
                        "uint8 (N,H,W,3) where there is an arr_0")
    if made_with != features.record["features_hash"] and (made_with or features.judge):  # ADM's files name no network
        raise UserError(f"--reference {path} was not made with these {features.record['features']} features: "
                        "make another one by `python eval.py stats`")
    if made_size != size:
        raise UserError(f"--reference {path} was made of images of {made_size} px, but these have {size} px: "
                        f"make another one by `python eval.py stats --size {size}`")
    check_finite(f"--reference {path}", torch.cat([mu[None], sigma]))
    return mu, sigma, pixels


def are_pictures(array):
    return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3


def open_reference(args, features, size, run):
    """--reference, or else all training images of --data -> Reference. The real images beside it: those in the file, or as
    many as --num, drawn from the training images by the seed."""
    if not args.reference and not args.data:
        raise UserError("there is nothing to compare with: pass --reference, or --data with the training images")
    dataset = build_dataset(args.data, "train", size, train=False) if args.data else None
    pixels = None
    if args.reference:
        mu, sigma, pixels = read_reference(args.reference, features, size)
        seen = features(torch.zeros(1, 3, size, size))[0].shape[1]
        if len(mu) != seen:  # said now, and not after 50,000 images have been drawn
            raise UserError(f"--reference {args.reference} has {len(mu)} features, {features.record['features']} has {seen}")
    make_folder(args.out)  # after all checks, before the long work
    if not args.reference:
        mu, sigma = statistics_of(dataset, features, args, run)
    rows = None
    if pixels is not None:
        rows = torch.cat([features(images)[0] for images, _ in file_batches(pixels, args, run)])
    elif dataset is not None:
        chosen = subset(len(dataset), args.num, args.seed)
        rows = torch.cat([features(images)[0] for images, _ in val_batches(dataset, chosen, args, "real images", run)])
    return Reference(mu, sigma, None if rows is None else gather(rows, run),
                     dict(reference=args.reference or f"train split of {args.data}", reference_hash=reference_hash(mu, sigma)))


# ---------------------------------------------------------------------------------------------------------------------
# gen: are the samples like the training images, and what they were asked to be?

def eight_bit(images):
    """Images as a file would hold them: (B,3,H,W) in [-1,1] -> the same rounded to 8 bits, on the CPU."""
    check_finite("images", images.cpu())
    return from_uint8(to_uint8(images))


def from_uint8(pixels):
    """(B,H,W,3) numpy uint8 -> (B,3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Drawn(NamedTuple):
    """Generated images, however they come."""
    labels: torch.Tensor  # (N,) asked classes
    size: int
    num_classes: int      # of the generator; of a file, the highest label + 1
    streams: object       # yields (cfg, batches), and batches yields (images (b,3,H,W), place of the first)
    tokenizer: object     # MergeVQ; None for a file
    record: dict


def read_samples(path, num):
    """npz of images (arr_0, uint8 NHWC) and asked classes (arr_1) -> both as arrays, the first num; 0: all. And what a file
    of generate.py says about the models that it comes from."""
    try:
        with np.load(path) as file:
            pixels, labels = file["arr_0"], file["arr_1"]
            made_by = {key: str(file[key]) for key in ("tokenizer", "generator", "weights") if key in file}
    except Exception as e:  # a damaged zip can raise anything
        raise UserError(f"--samples {path} cannot be read ({e}): pass an npz with images in arr_0 and labels in arr_1")
    fits = are_pictures(pixels) and labels.shape == pixels.shape[:1] and labels.dtype.kind in "iu"
    if not fits or not len(labels) or labels.min() < 0:
        raise UserError(f"--samples {path}: arr_0 is {pixels.dtype} {pixels.shape}, arr_1 {labels.shape}; "
                        "uint8 (N,H,W,3) and (N,) class ids are needed")
    num = num or len(labels)
    return pixels[:num], labels[:num].astype(np.int64), made_by


def file_batches(pixels, args, run):
    """Images of a file, this rank's share: yields (images, place of the first)."""
    rows = share(len(pixels), run)
    for start in range(rows.start, rows.stop, args.batch_size):
        yield from_uint8(pixels[start:min(start + args.batch_size, rows.stop)]), start


@torch.no_grad()
def drawn_batches(gpt, tokenizer, labels, cfg, args, run):
    """Draw images as generate.py does, image i a function of (seed, i) and its class; this rank's share."""
    rows, keep = share(len(labels), run), check_keep(args.keep, gpt.config)
    starts = range(rows.start, rows.stop, args.batch_size)
    for start in tqdm(starts, f"cfg {cfg}", dynamic_ncols=True, leave=False, disable=not run.main):
        wanted = labels[start:min(start + args.batch_size, rows.stop)]
        codes = sample_codes(gpt, wanted, cfg, args.temperature, args.top_k, args.top_p, args.seed, start, keep)
        yield decode_codes(gpt, tokenizer, codes, start).float(), start


def open_samples(args, run):
    """--samples -> Drawn."""
    pixels, labels, made_by = read_samples(args.samples, args.num)
    args.ckpt, args.num = args.samples, len(pixels)
    labels, streams = torch.from_numpy(labels), [(None, file_batches(pixels, args, run))]
    record = dict(made_by, samples_hash=weights_hash(dict(images=torch.from_numpy(pixels), labels=labels)))
    return Drawn(labels, pixels.shape[1], int(labels.max()) + 1, streams, None, record)


def open_generator(args, run):
    """--ckpt -> Drawn, one stream for each --cfg."""
    gpt, tokenizer = load_generator(args.ckpt, run.device)
    if args.num < 1:
        raise UserError("--num 0 means all of --samples; pass how many images the generator shall draw")
    keep, num_classes = check_keep(args.keep, gpt.config), gpt.config.num_classes
    record = dict(tokenizer=weights_hash(tokenizer.state_dict()), generator=weights_hash(gpt.state_dict()), weights="ema",
                  temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, keep=keep)
    if gpt.config.mode == "randar":
        tokenizer.recovery = load_recovery(args.recovery, tokenizer)
        record["recovery"] = weights_hash(tokenizer.recovery.state_dict())
    args.data = args.data or tokenizer.config.data
    gpt, labels = gpt.to(run.dtype), torch.arange(args.num) % max(1, num_classes)
    scales = args.cfg if num_classes else [1.0]  # without classes there is nothing to guide
    streams = ((cfg, drawn_batches(gpt, tokenizer, labels, cfg, args, run)) for cfg in scales)
    return Drawn(labels, tokenizer.config.size, num_classes, streams, tokenizer, record)


@torch.no_grad()
def gen(args, argv):
    run = start_run(args)
    drawn = open_samples(args, run) if args.samples else open_generator(args, run)
    if args.num < 10:
        raise UserError(f"{args.num} samples are too few for any of the measures: pass --num of at least 10")
    features = open_features(args, drawn.size, run)
    record, judge = {**drawn.record, **features.record}, features.judge
    if judge:
        classes = judge["config"]["num_classes"]
        if classes < drawn.num_classes or drawn.tokenizer and classes != drawn.num_classes:
            raise UserError(f"{args.ckpt} has samples of {drawn.num_classes} classes, but --classifier {args.classifier} judges "
                            f"{classes}: train one on the same --data")
        args.data = args.data or judge["config"].get("data", "")
    reference = open_reference(args, features, drawn.size, run)
    if judge and drawn.tokenizer:
        record["reconstructed_accuracy"] = reconstructed_accuracy(features.network, drawn.tokenizer, args, run)
    device = run.device if run.device.type == "cuda" else "cpu"  # MPS has no float64
    fd, score = labelled(features.frechet, args.num), labelled(features.score, args.num)
    if run.main:
        if judge:
            print(f"the classifier is right on {judge['val_accuracy']:.1%} of {judge['val_num']} real val images")
        if "reconstructed_accuracy" in record:
            print(f"and on {record['reconstructed_accuracy']:.1%} of {args.num} that went through the tokenizer")
        print(f"{args.num} samples against {reference.record['reference']}")
        print(f"{'cfg':>6} {fd:>10} {score:>16} {'precision':>9} {'recall':>7} {'judged as asked':>16}")

    results = []
    for cfg, stream in drawn.streams:
        moments, rows, logits, shown = Moments(), [], [], []
        for images, start in stream:
            seen, guess = features(eight_bit(images))
            moments.add(seen)
            rows.append(seen)
            logits.append(guess)
            shown += images.cpu() if run.main and start < 40 else []
        mu, sigma = moments.statistics(run)
        rows, probs = gather(torch.cat(rows), run), gather(torch.cat(logits), run).softmax(1)
        if not run.main:
            continue
        mean, std = inception_score(probs, 10, args.seed)
        row = {"cfg": cfg, fd: frechet_distance(reference.mu, reference.sigma, mu, sigma), score: mean, f"{score}_std": std}
        if reference.rows is not None:
            row["precision"], row["recall"] = precision_recall(reference.rows.to(device), rows.to(device))
        if judge:
            hits, names = (probs.argmax(1) == drawn.labels).double(), judge["class_names"]
            row["agreement"] = hits.mean().item()
            row["per_class"] = {names[c]: hits[drawn.labels == c].mean().item() for c in drawn.labels.unique()}
        cell = lambda key, form: format(row[key], form) if key in row else "-"
        print(f"{'-' if cfg is None else cfg:>6} {row[fd]:10.3f} {mean:8.3f} +- {std:4.2f} {cell('precision', '.3f'):>9} "
              f"{cell('recall', '.3f'):>7} {cell('agreement', '.1%'):>16}")
        results.append(row)
        picture = os.path.join(args.out, "samples.png" if cfg is None else f"samples_cfg{cfg:g}.png")
        titles = [judge["class_names"][c] if judge else int(c) for c in drawn.labels[:40]]
        image_grid(torch.stack(shown[:40]), picture, labels=titles, columns=10)
    if run.main:
        write_results(os.path.join(args.out, "gen.json"), "eval.py", argv, args, run, size=drawn.size, **record,
                      **reference.record, real_images=0 if reference.rows is None else len(reference.rows), results=results)
        print(f"wrote {args.out}/gen.json and pictures")


def reconstructed_accuracy(classifier, tokenizer, args, run):
    """What the classifier makes of val images that went through the tokenizer: the ceiling for any generator on it."""
    dataset = build_dataset(args.data, "val", tokenizer.config.size, train=False)

    def reconstructions():
        for images, labels in val_batches(dataset, args.num, args, "reconstruct", run):
            with run.autocast():
                encoded = tokenizer.encode(images.to(run.device))
                decoded = tokenizer.decode(encoded.codes, encoded.source)
            yield eight_bit(decoded), labels

    return accuracy(classifier, reconstructions(), run)


# ---------------------------------------------------------------------------------------------------------------------
# probe: what a linear layer reads off the frozen tokens (paper A.4, after MAE 2111.06377)

PROBE_BATCH = 1024


def pooled(model, images, keep, run):
    """Frozen encoder: images -> (mean of the K latent tokens (B,D), class token (B,D)), float32 on the CPU."""
    with run.autocast():
        _, _, cls, tokens = model.encoder(images.to(run.device), keep)
    return tokens.float().mean(1).cpu(), cls.float().cpu()


@torch.no_grad()
def cached(represent, dataset, rows, args, run, title):
    """Run `represent`: images -> {name: (b,D)}, once over the images `rows` -> ({name: (N,D)}, labels (N,)), on all ranks.

    In memory, in the type that `represent` gives. The crop is the centre crop: a cache has no room for augmentation.
    """
    parts, labels = {}, []
    for images, label in val_batches(dataset, rows, args, title, run):
        for name, x in represent(images).items():
            check_finite(f"features of {name}", x)
            parts.setdefault(name, []).append(x)
        labels.append(label)
    return {name: gather(torch.cat(part), run) for name, part in parts.items()}, gather(torch.cat(labels), run)


def linear_probe(train, val, num_classes, args, device):
    """Train BatchNorm without parameters and a linear layer on features (N,D) with labels (N,) -> (train, val) accuracy.

    AdamW, cosine, batches of 1,024 (all images where there are fewer). The layer starts at zero: --seed orders the images only.
    The rate is far above what trains a network: half of the variance of the tokens lies in one direction, and at 0.001 all
    that 90 passes over the 20,000 drawings reach is 30 % where 0.1 reaches 44 %, a random encoder 20 % and 32 %.
    """
    x, y = (t.to(device) for t in train)
    head = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), nn.Linear(x.shape[1], num_classes)).to(device)
    nn.init.zeros_(head[1].weight)
    nn.init.zeros_(head[1].bias)
    batch = min(PROBE_BATCH, len(x))
    steps = len(x) // batch * args.epochs
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for epoch in range(args.epochs):
            order = torch.randperm(len(x), generator=seeded(args.seed, epoch)).to(device)
            for rows in order[:len(x) // batch * batch].split(batch):
                loss = F.cross_entropy(head(x[rows].float()), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    check_finite("weights of the probe", head[1].weight.detach().cpu())
    head.eval()

    def top1(x, y):
        predicted = torch.cat([head(part.to(device).float()).argmax(1).cpu() for part in x.split(8192)])
        return (predicted == y.cpu()).double().mean().item()

    return top1(x, y), top1(*val)


def open_probe(args, model, run):
    """-> (training images as centre crops, places of those to use). Raises UserError when there is nothing to classify."""
    dataset = build_dataset(args.data, "train", model.config.size, train=False)
    if dataset.num_classes < 2:
        raise UserError(f"--data {args.data} has no classes to tell apart: pass images in class folders")
    return dataset, subset(len(dataset), args.train_num, args.seed)


@torch.no_grad()
def probe(args, argv):
    model, val_set, run = open_tokenizer(args)
    config, keeps = model.config, args.keep or [model.config.length]
    train_set, rows = open_probe(args, model, run)
    make_folder(args.out)
    torch.manual_seed(args.seed)
    untrained = MergeVQ(config).eval().to(run.device)

    def represent(images):
        found = {}
        for keep in keeps:
            found[f"tokens, K = {keep}"], found[f"class token, K = {keep}"] = pooled(model, images, keep, run)
        found[f"random encoder, K = {config.length}"] = pooled(untrained, images, config.length, run)[0]
        pixels = F.adaptive_avg_pool2d(images, min(config.size, 32))
        found[f"pixels, {pixels.shape[-1]} px"] = torch.from_numpy(to_uint8(pixels)).flatten(1)        # uint8: no fourfold memory
        return found

    train, train_labels = cached(represent, train_set, rows, args, run, "training images")
    val, val_labels = cached(represent, val_set, args.num, args, run, "val images")
    if not run.main:
        return
    print(f"{args.ckpt}: linear probe on {len(train_labels)} training images, measured on {args.num} val images of {args.data}; "
          f"{train_set.num_classes} classes")
    print(f"{'features':<26} {'dimensions':>10} {'train top-1':>12} {'val top-1':>10}")
    results = []
    for name in train:
        top1 = linear_probe((train[name], train_labels), (val[name], val_labels), train_set.num_classes, args, run.device)
        results.append(dict(features=name, dimensions=train[name].shape[1], train_top1=top1[0], val_top1=top1[1]))
        print(f"{name:<26} {train[name].shape[1]:10} {top1[0]:12.2%} {top1[1]:10.2%}")
    write_results(os.path.join(args.out, "probe.json"), "eval.py", argv, args, run, size=config.size, weights="ema",
                  tokenizer=weights_hash(model.state_dict()), align=config.align, train_num=len(train_labels), epochs=args.epochs,
                  lr=args.lr, results=results)
    print(f"wrote {args.out}/probe.json")


# ---------------------------------------------------------------------------------------------------------------------
# finetune: the whole encoder trained on the labels (paper A.4, after SimMIM 2111.09886 and MAE)

@dataclasses.dataclass
class FinetuneConfig(RunConfig):
    """Defaults are for the tiny variant; RECIPES lists what the paper's setting changes."""
    recipe: str = arg("tiny", "preset: tiny or paper", choices=("tiny", "paper"))
    ckpt: str = arg("out/tokenizer/ckpt.pt", "tokenizer whose encoder is fine-tuned")
    out: str = arg("out/finetune", "folder for checkpoint, metrics and result")
    data: str = arg("", "data set with classes (default: what the tokenizer was trained on)")
    keep: int = arg(0, "tokens K; 0: all L, nothing merges", low=0)
    layer_decay: float = arg(0.8, "learning rate of each layer, as a share of the next layer's", low=0.0, high=1.0)
    weight_decay: float = arg(0.05, "AdamW weight decay", low=0.0)
    beta2: float = arg(0.99, "AdamW beta 2", low=0.0, high=0.99999)
    mixup: float = arg(0.2, "mixup's Beta parameter (1710.09412); 0: off", low=0.0)
    cutmix: float = arg(0.2, "CutMix's Beta parameter (1905.04899); 0: off. With both on, each batch takes one of them", low=0.0)
    smoothing: float = arg(0.1, "label smoothing", low=0.0, high=1.0)
    drop_path: float = arg(0.0, "stochastic depth (1603.09382): chance to skip a branch of the last block", low=0.0, high=0.99)
    erasing: float = arg(0.1, "chance that a rectangle of an image is erased (1708.04896)", low=0.0, high=1.0)
    clip: float = arg(5.0, "gradient norm is clipped to this", low=1e-9)
    ema: float = arg(0.99, "decay of the weight average that is evaluated and saved", low=0.0, high=1.0)
    batch_size: int = arg(64, "images an optimizer step, over all ranks and micro-batches", low=1)
    max_steps: int = arg(600, "optimizer steps; 0: as many as --epochs makes", low=0)
    epochs: int = arg(100, "passes over the data, when --max-steps is 0", low=1)
    lr: float = arg(1e-3, "peak learning rate, of the last layer", low=0.0)
    lr_schedule: str = arg("cosine", "after warm-up: step (x0.1 at 80 and 95 %%), cosine (to 1 %%), constant",
                           choices=("step", "cosine", "constant"))
    warmup: int = arg(50, "linear warm-up steps", low=0)
    eval_num: int = arg(50_000, "validation images an evaluation looks at", low=1)


RECIPES = {  # ImageNet, batch 1,024 for 100 epochs; the paper gives these two numbers, the others are MAE's for ViT-B
    "tiny": {},
    "paper": dict(recipe="paper", layer_decay=0.65, beta2=0.999, mixup=0.8, cutmix=1.0, drop_path=0.1, erasing=0.25, ema=0.9999,
                  batch_size=1024, max_steps=0, epochs=100, lr=2e-3, warmup=6250, eval_every=5000, save_every=5000),
}


def drop_path(rate, module, inputs, output):
    """Forward hook: while training, leave a residual branch out for each image with this chance, and scale it up otherwise."""
    if not module.training:
        return output
    branch, *rest = output if isinstance(output, tuple) else (output,)
    stays = torch.rand(len(branch), 1, 1, device=branch.device) >= rate
    branch = branch * stays / (1 - rate)
    return (branch, *rest) if rest else branch


class FineTuned(nn.Module):
    """A tokenizer's encoder with a linear layer on the mean of its tokens: images -> (mean (B,D), logits (B,C))."""
    def __init__(self, encoder, keep, num_classes, rate):
        super().__init__()
        self.keep, self.encoder = keep, encoder.requires_grad_(True)
        self.encoder.to_bits = nn.Identity()  # classification needs no codes
        self.head = nn.Linear(encoder.norm.weight.shape[0], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        for i, block in enumerate(encoder.blocks):  # the chance rises linearly from 0 at the first block
            for branch in (block.attn, block.mlp) if rate else ():
                branch.register_forward_hook(functools.partial(drop_path, rate * i / max(1, len(encoder.blocks) - 1)))

    def forward(self, images):
        mean = self.encoder(images, self.keep)[3].mean(1)
        return mean, self.head(mean)


def layer_groups(model, config):
    """Optimizer groups with a "scale" of the learning rate: layer_decay^(layers above). Stem: 0, block i: i + 1, head: last."""
    last, groups = len(model.encoder.blocks) + 1, {}
    for name, p in model.named_parameters():
        part = name.removeprefix("encoder.").split(".")
        layer = int(part[1]) + 1 if part[0] == "blocks" else last if part[0] in ("norm", "head") else 0
        decay = config.weight_decay if p.dim() >= 2 and part[0] not in ("cls", "position") else 0.0
        group = groups.setdefault((layer, decay), dict(params=[], weight_decay=decay, scale=config.layer_decay ** (last - layer)))
        group["params"].append(p)
    return list(groups.values())


def mix(images, targets, config, rng):
    """Mixup or CutMix of each image with one other of the batch: images (B,3,H,W), targets (B,C) distributions -> the same."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind) > 0]
    if not kinds:
        return images, targets
    chosen = kinds[rng.integers(len(kinds))]
    own, (H, W) = float(rng.beta(getattr(config, chosen), getattr(config, chosen))), images.shape[2:]  # share that stays
    if chosen == "mixup":
        images = own * images + (1 - own) * images.flip(0)
    else:
        y0, y1, x0, x1 = rectangle(H, W, math.sqrt(1 - own) * H, math.sqrt(1 - own) * W, rng)
        other, images = images.flip(0), images.clone()
        images[:, :, y0:y1, x0:x1] = other[:, :, y0:y1, x0:x1]
        own = 1 - (y1 - y0) * (x1 - x0) / (H * W)  # the border may have cut the box
    return images, own * targets + (1 - own) * targets.flip(0)


def erase(images, chance, rng):
    """Random erasing: in some images a rectangle of 2 to 33 % of the area becomes noise. (B,3,H,W) -> the same."""
    images, (H, W) = images.clone(), images.shape[2:]
    for image in images:
        if rng.random() < chance:
            area, ratio = rng.uniform(0.02, 0.33) * H * W, math.exp(rng.uniform(-1, 1) * math.log(3.3))
            y0, y1, x0, x1 = rectangle(H, W, math.sqrt(area * ratio), math.sqrt(area / ratio), rng)
            image[:, y0:y1, x0:x1] = torch.from_numpy(rng.standard_normal((3, y1 - y0, x1 - x0), np.float32))
    return images


def rectangle(H, W, height, width, rng):
    """A box of this size around a random pixel, cut off at the image's border -> y0, y1, x0, x1."""
    y, x = rng.integers(H), rng.integers(W)
    low = lambda centre, side: max(0, round(centre - side / 2))
    return low(y, height), min(H, round(y + height / 2)), low(x, width), min(W, round(x + width / 2))


def finetune(argv):
    config = parse_config(FinetuneConfig, "Fine-tune the encoder of a tokenizer as a classifier.", RECIPES, "recipe", argv)
    tokenizer = load_tokenizer(config.ckpt)
    t, tokenizer_hash = tokenizer.config, weights_hash(tokenizer.state_dict())
    config.data, config.keep = config.data or t.data, config.keep or t.length
    merge_schedule(t.length, config.keep, t.depth)  # raises UserError on a K that cannot be reached
    train_set = build_dataset(config.data, "train", t.size, train=True, seed=config.seed)
    val_set = build_dataset(config.data, "val", t.size, train=False)
    if train_set.num_classes < 2:
        raise UserError(f"--data {config.data} has no classes to tell apart: pass images in class folders")
    config.max_steps = config.max_steps or max(1, config.epochs * len(train_set) // config.batch_size)
    config.workers = loader_workers(config)
    run = start_run(config)
    check_batch(config, run)
    resume_from = prepare_out(config, run)
    raw_model = FineTuned(tokenizer.encoder, config.keep, train_set.num_classes, config.drop_path).to(run.device)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(layer_groups(raw_model, config), betas=(0.9, config.beta2))
    step, skipped = 0, 0
    if resume_from:
        state = load_checkpoint(resume_from, "finetuned", run.device)
        with reading(f"--resume: {resume_from}"):
            for module, name in ((raw_model, "model"), (ema, "ema"), (optimizer, "optimizer")):
                module.load_state_dict(state[name])
            step, skipped = state["step"], state["skipped"]
    if config.compile:
        raw_model.encoder.stem.compile()
    model = parallel(raw_model, run)
    stream = batches(train_set, config.batch_size, config.seed, step, config.accum, run.rank, run.world, config.workers)
    off = config.smoothing / train_set.num_classes
    metrics_path, val_accuracy, unsaved, streak = os.path.join(config.out, "metrics.jsonl"), math.nan, False, 0
    if run.main:
        trim_metrics(metrics_path, step)
    bar = tqdm(total=config.max_steps, initial=step, disable=not run.main, dynamic_ncols=True)
    while True:
        last = step == config.max_steps
        if step % config.eval_every == 0 and step > 0 or last:
            val_accuracy = accuracy(ema, val_batches(val_set, config.eval_num, config, "val", run), run)
            if run.main:
                append_metrics(metrics_path, step=step, val_accuracy=val_accuracy)
        if last or step > 0 and step % config.save_every == 0 or unsaved and step % config.log_every == 0:
            unsaved = True  # until it is done: then it is tried again with the next line of the log
            with disk_may_fail(must=last):
                if run.main:
                    save_checkpoint(os.path.join(config.out, "ckpt.pt"), "finetuned", config.keep_last, step=step,
                                    skipped=skipped, config=dataclasses.asdict(config), class_names=list(train_set.class_names),
                                    model=raw_model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict())
                unsaved = False
        if last:
            break
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        torch.manual_seed(seeded(config.seed, step, 3, run.rank).initial_seed())  # of drop path: a resumed run draws the same
        rng, total = np.random.default_rng([config.seed, 3, step, run.rank]), 0.0
        raw_model.train()
        for m in range(config.accum):
            images, labels = next(stream)
            targets = F.one_hot(labels, train_set.num_classes) * (1 - config.smoothing) + off                # (b,C)
            images, targets = mix(erase(images, config.erasing, rng), targets, config, rng)
            with no_sync(m < config.accum - 1, model):
                with run.autocast():
                    _, logits = model(images.to(run.device))
                loss = F.cross_entropy(logits.float(), targets.to(run.device))
                (loss / config.accum).backward()
            total += loss.detach() / config.accum
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        bad, = any_rank(run, ~torch.isfinite(norm + total))
        if not bad:
            streak = 0
            optimizer.step()
            update_ema(ema, raw_model, config.ema, step)
        else:  # a bad step changes nothing
            skipped, streak = skipped + 1, streak + 1
            check_bad(streak, step, config)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)
        if step % config.log_every == 0 or step == config.max_steps:
            for name in train_set.check_skipped():
                bar.write(f"unreadable image skipped: {name}")
            total = mean_over_ranks(total)
            if run.main:
                append_metrics(metrics_path, step=step, loss=total, grad_norm=norm, lr=lr, skipped=skipped)
                bar.set_postfix(loss=f"{total.item():.3f}", skipped=skipped)
    bar.close()
    if not run.main:
        return
    plot_curves(metrics_path, os.path.join(config.out, "curves.png"), ("loss", "val_accuracy", "lr"))
    config.num = min(config.eval_num, len(val_set))
    write_results(os.path.join(config.out, "finetune.json"), "eval.py", ["finetune", *argv], config, run, size=t.size,
                  keep=config.keep, tokenizer=tokenizer_hash, weights="ema", steps=step, skipped=skipped, val_top1=val_accuracy)
    print(f"{val_accuracy:.2%} of {config.num} val images right (EMA weights, K = {config.keep}); wrote {config.out}/ckpt.pt")


# ---------------------------------------------------------------------------------------------------------------------
# sweep: reconstruction against representation as K changes (paper Table 4, Figure 3)

@torch.no_grad()
def multiply_adds(encoder, size, keep):
    """Multiply-adds of the matrix products and convolutions that encode one image: what the paper's tables call FLOPs."""
    images = torch.randn(1, 3, size, size, generator=seeded(0)).to(next(encoder.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:      # math: attention as two counted products
        encoder(images, keep)
    return counter.get_total_flops() // 2


@torch.no_grad()
def sweep(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    keeps = args.keep or sorted({*config.keeps, config.keep, config.length})
    train_set, chosen = open_probe(args, model, run)
    features = open_features(args, config.size, run, required=False)
    make_folder(args.out)
    rows, record = reconstruct(model, dataset, keeps, features, None, args, run)
    for row in rows:  # one K after the other: ImageNet's features at all of them would not fit in memory
        represent = lambda images: {"tokens": pooled(model, images, row["keep"], run)[0]}
        train, train_labels = cached(represent, train_set, chosen, args, run, f"K = {row['keep']}: training images")
        val, val_labels = cached(represent, dataset, args.num, args, run, f"K = {row['keep']}: val images")
        if run.main:
            pairs = (train["tokens"], train_labels), (val["tokens"], val_labels)
            row["probe_top1"] = linear_probe(*pairs, train_set.num_classes, args, run.device)[1]
            row["encoder_gmacs"] = multiply_adds(model.encoder, config.size, row["keep"]) / 1e9
    if not run.main:
        return
    fd = [features.r_name(args.num)] if features else []
    print(f"{args.ckpt} on {args.num} val images of {args.data}; probe trained on {len(train_labels)} images")
    print(f"{'K':>5} {'PSNR':>7} {'probe top-1':>12} {'multiply-adds':>15}" + "".join(f" {name:>10}" for name in fd))
    for row in rows:
        print(f"{row['keep']:5} {float(row['psnr']):7.2f} {row['probe_top1']:12.2%} {row['encoder_gmacs']:14.4g}G"
              + "".join(f" {row[name]:10.4f}" for name in fd))
    picture = os.path.join(args.out, "sweep.png")
    plot_rows(rows, picture, [*fd, "psnr", "probe_top1", "encoder_gmacs"], x="keep")
    write_results(os.path.join(args.out, "sweep.json"), "eval.py", argv, args, run, size=config.size, weights="ema",
                  tokenizer=weights_hash(model.state_dict()), **record, train_num=len(train_labels), epochs=args.epochs,
                  lr=args.lr, results=rows)
    print(f"wrote {args.out}/sweep.json and {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# ablate-source: what it costs to predict the merge map (paper Table 5)

@torch.no_grad()
def ablate_source(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    sources = {"true": lambda e: e.source, "predicted": lambda e: model.recover(e.codes)}
    tuned = load_recovery(args.recovery, model)
    if tuned is not model.recovery:
        sources["fine-tuned"] = lambda e: recover(tuned, e.codes, config.bits)
    features = open_features(args, config.size, run, required=False)
    make_folder(args.out)
    rows, record = reconstruct(model, dataset, args.keep or [config.keep], features, None, args, run, sources)
    if not run.main:
        return
    fd = [features.r_name(args.num)] if features else []
    print(f"{args.ckpt} on {args.num} val images of {args.data}, L = {config.length}")
    print(f"{'K':>5}  {'source':<11} {'accuracy':>8} {'PSNR':>7}" + "".join(f" {name:>10}" for name in fd))
    for row in rows:
        print(f"{row['keep']:5}  {row['source']:<11} {row['accuracy']:8.2%} {float(row['psnr']):7.2f}"
              + "".join(f" {row[name]:10.4f}" for name in fd))
    write_results(os.path.join(args.out, "ablate_source.json"), "eval.py", argv, args, run, size=config.size, weights="ema",
                  tokenizer=weights_hash(model.state_dict()), recovery=weights_hash(tuned.state_dict()), **record, results=rows)
    print(f"wrote {args.out}/ablate_source.json")


# ---------------------------------------------------------------------------------------------------------------------
# speed: every figure beside the one it replaces, measured in turns in one run, as times alone say little about another machine

def fastest(functions, repeats, device):
    """{name: function} -> {name: seconds of the fastest of `repeats` calls}, after one to warm up; they take turns."""
    seconds = dict.fromkeys(functions, math.inf)
    for turn in tqdm(range(repeats + 1), ", ".join(functions), dynamic_ncols=True, leave=False):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def smooth_tokens(batch, length, width, generator):
    """Tokens as similar to their neighbours as those of images are: smooth noise. (B,L,C)"""
    side = math.isqrt(length)
    field = F.interpolate(torch.randn(batch, width, 8, 8, generator=generator), size=side, mode="bicubic")
    return field.flatten(2).transpose(1, 2).contiguous()


def merge_by_index(x, schedule):
    """The tokenizer's merging of x (B,L,C) -> source (B,L)."""
    source, size = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), torch.ones(x.shape[:2], device=x.device)
    for r in schedule:
        index = match_tokens(x, r, protected=0)
        x, size = merge_tokens(x, size, index)
        source = index.gather(1, source)
    return canonical_source(source)


def merge_by_matrix(x, schedule):
    """The same with matrices, as the paper writes it: S (B,L,K) is a product of one-hot matrices, a merge is S^T x."""
    S, size = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1), torch.ones(*x.shape[:2], 1, device=x.device)
    for r in schedule:
        step = F.one_hot(match_tokens(x, r, protected=0)).to(x.dtype)                      # (B,N,N-r)
        total, S = step.transpose(1, 2) @ (x * size), S @ step
        size = step.transpose(1, 2) @ size
        x = total / size
    return canonical_source(S.argmax(-1))


def entropy_of_all_codes(z, tau=1.0):
    """lfq_entropy as it is defined, with the (N, 2^d) matrix of probabilities."""
    d = z.shape[-1]
    codebook = codes_to_bits(torch.arange(2 ** d, device=z.device), d)                     # (2^d,d)
    p = (2 * z.reshape(-1, d) @ codebook.T / tau).softmax(-1)                              # (N,2^d)
    return torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()


@torch.no_grad()
def decode_recorded(gpt, codes, source, order, keep):
    """One guided pass of generation, continued with the recorded codes (B,K): so each cache is what a trained model has."""
    B, c = len(codes), gpt.config
    full = codes.gather(1, order) if c.mode == "randar" else codes.gather(1, source)       # (B,N) as they are drawn
    wide = torch.float32 if codes.device.type == "mps" else torch.float64
    noise, known = torch.rand(B, c.length, len(c.sub_bits), dtype=wide, device=codes.device), 0

    def pick(h, noise, share):
        nonlocal known
        pick_codes(gpt, h, noise, 2, 2.0)
        known += h.shape[1]
        return full[:, known - h.shape[1]:known]

    labels = torch.zeros(2 * B, dtype=torch.long, device=codes.device)
    cache = gpt.new_cache(2 * B, keep)
    h = gpt.prefill(labels, torch.full_like(labels, keep), cache)
    if c.mode == "randar":
        decode_parallel(gpt, cache, noise, order, arccos_steps(keep), 2, pick)
    else:
        decode_in_turn(gpt, cache, h, noise, 2, pick)
    return cache


def speed(args, argv):
    """Table and JSON of decoding, stage-1 training, entropy and merging, each against its plain form."""
    device, dtype = pick_device(args.device, args.dtype)
    if math.isqrt(args.length) ** 2 != args.length or args.keep > args.length:
        raise UserError(f"--length {args.length} must be a square, and --keep {args.keep} at most that")
    if args.bits > 20 or args.keep > 2 ** args.bits:
        raise UserError(f"--bits {args.bits} must be at most 20, and --keep {args.keep} at most 2^bits")
    if args.width % (4 * args.heads):
        raise UserError(f"--width {args.width} must be a multiple of 4 x --heads {args.heads}")
    g, table = seeded(args.seed), []
    add = lambda what, unit, values, against: table.extend(
        dict(what=what, name=name, value=value, unit=unit, ratio=value / values[against]) for name, value in values.items())

    schedule = merge_schedule(args.length, args.keep, 12)
    x = smooth_tokens(args.batch_size, args.length, 64, g).to(device)
    by_index, by_matrix = merge_by_index(x, schedule), merge_by_matrix(x, schedule)
    assert (by_index == by_matrix).float().mean() > 0.99, "the two ways to merge disagree by more than rounding"
    forms = dict(index=lambda: merge_by_index(x, schedule), matrix=lambda: merge_by_matrix(x, schedule))
    add("merging", "images/s", {n: args.batch_size / s for n, s in fastest(forms, args.repeats, device).items()}, "matrix")

    z = torch.randn(1024, 12, generator=g).to(device).requires_grad_()
    forms = {"factorised": lambda: sum(lfq_entropy(z)).backward(),
             "materialised": lambda: sum(entropy_of_all_codes(z)).backward()}
    add("LFQ entropy, 1,024 tokens of 12 bits", "tokens/s",
        {n: len(z) / s for n, s in fastest(forms, args.repeats, device).items()}, "materialised")

    torch.manual_seed(args.seed)
    t = TokenizerConfig()
    model, images = MergeVQ(t).to(device).train(), torch.rand(t.batch_size, 3, t.size, t.size, generator=g).to(device) * 2 - 1

    def train_step(keep):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = model(images, keep)
        (F.mse_loss(out.images, images) + sum(lfq_entropy(out.encoded.z)) + out.recovery.mean() + out.align.mean()).backward()

    forms = {f"K = {keep}": lambda keep=keep: train_step(keep) for keep in (t.keep, t.length)}
    add("stage 1 forward and backward, tiny", "images/s",
        {n: len(images) / s for n, s in fastest(forms, 5 * args.repeats, device).items()}, f"K = {t.length}")

    source = by_index
    codes = torch.stack([torch.randperm(2 ** args.bits, generator=g)[:args.keep] for _ in range(args.batch_size)]).to(device)
    order = torch.rand(args.batch_size, args.keep, generator=g).argsort(1).to(device)
    gpts = {mode: GPT(GPTConfig(mode=mode, width=args.width, depth=args.depth, heads=args.heads, head_depth=2, window=args.window,
                                bits=args.bits, length=args.length, keep=args.keep, keeps=(args.keep,))).to(device, dtype).eval()
            for mode in MODES}
    decode = {mode: lambda gpt=gpt: decode_recorded(gpt, codes, source, order, args.keep) for mode, gpt in gpts.items()}
    seconds = fastest(decode, args.repeats, device)
    add("decoding, guided", "images/s", {mode: args.batch_size / s for mode, s in seconds.items()}, "raster")
    drawn = {mode: args.batch_size * (args.keep if mode == "randar" else args.length) for mode in MODES}
    add("decoding, guided", "codes/s", {mode: drawn[mode] / s for mode, s in seconds.items()}, "raster")
    add("KV cache", "bytes", {mode: gpt.new_cache(2 * args.batch_size, args.keep).nbytes for mode, gpt in gpts.items()},
        "raster")

    record = dict(command=shlex.join(["python", "eval.py", *argv]), device=str(device), dtype=str(dtype), torch=torch.__version__,
                  threads=torch.get_num_threads(), steps=len(arccos_steps(args.keep)), **{
                      name: getattr(args, name) for name in ("length", "keep", "window", "width", "depth", "batch_size", "bits")})
    if args.json:
        print(json.dumps(dict(record, results=table)))
        return
    print(f"L = {args.length}, K = {args.keep}, window {args.window}, width {args.width} x {args.depth} blocks, "
          f"batch {args.batch_size}, {dtype} on {device}, {record['threads']} threads; randar draws {args.keep} codes in "
          f"{record['steps']} steps")
    for row in table:
        print(f"{row['what']:<38} {row['name']:<13} {row['value']:>14,.1f} {row['unit']:<9} x {row['ratio']:.2f}")


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__)
    names = "recon maps train-classifier stats gen probe finetune sweep ablate-source speed"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names.replace(" ", " | "))

    def command(name, function, help, ckpt, out, num):
        p = commands.add_parser(name, description=help)
        p.set_defaults(function=function)
        common_flags(p, ckpt, out, num)
        return p

    def feature_flags(p, choices):
        p.add_argument("--features", default="classifier", choices=choices, help="what is compared (default classifier)")
        p.add_argument("--classifier", default=CLASSIFIER, help=f"checkpoint of train-classifier (default {CLASSIFIER})")
        p.add_argument("--inception-weights", default="", help="pytorch-fid's weight file, or download, for --features inception")

    tokenizer, some = "out/tokenizer/ckpt.pt", ("classifier", "inception")
    p = command("recon", recon, "Reconstruction quality and code usage on val.", tokenizer, "out/recon", 0)
    p.add_argument("--keep", type=numbers(int, 1), help="values of K (default: the checkpoint's target, and L)")
    p.add_argument("--lpips-weights", default="", help="LPIPS' v0.1 vgg.pth, or download: also report LPIPS")
    p.add_argument("--vgg-weights", default="", help="torchvision's VGG16 file, or download, which LPIPS needs")
    feature_flags(p, (*some, "none"))
    p = command("maps", maps, "Picture of which patches merge.", tokenizer, "out/maps", 8)
    p.add_argument("--keep", type=numbers(int, 1), help="values of K (default: the checkpoint's smallest and target, and L)")

    p = commands.add_parser("train-classifier", description="Train a small CNN that judges the samples of `gen`.")
    p.set_defaults(function=train_classifier)
    p.add_argument("--data", default="shapes", help="data set with classes (default shapes)")
    p.add_argument("--size", type=number(int, 8), default=32, help="image side in pixels (default 32)")
    p.add_argument("--out", default="out/classifier", help="folder for the checkpoint (default out/classifier)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of data and weights (default 0)")
    p.add_argument("--device", default="auto", help="auto (cuda > mps > cpu) or a torch device")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="autocast type")
    p.add_argument("--batch-size", type=number(int, 1), default=64, help="images a step (default 64)")
    p.add_argument("--max-steps", type=number(int, 1), default=600, help="optimizer steps (default 600)")
    p.add_argument("--lr", type=number(float, 0), default=3e-3, help="peak learning rate (default 0.003)")
    p.add_argument("--workers", type=number(int, -1), default=-1, help="loader processes, -1: none for shapes, else up to 8")
    p.add_argument("--overwrite", action="store_true", help="replace the classifier in --out")

    def probe_flags(p):
        p.add_argument("--train-num", type=number(int, 0), default=0, help="training images of the probe, 0: all (default 0)")
        p.add_argument("--epochs", type=number(int, 1), default=90, help="passes over them (default 90)")
        p.add_argument("--lr", type=number(float, 0), default=0.1, help="initial learning rate (default 0.1)")

    p = command("probe", probe, "Linear probe on frozen tokens, beside a random encoder and pixels.", tokenizer, "out/probe", 0)
    p.add_argument("--keep", type=numbers(int, 1), help="values of K (default: all L tokens, nothing merges)")
    probe_flags(p)
    p = command("sweep", sweep, "Reconstruction, linear probe and cost of the encoder against K.", tokenizer, "out/sweep", 0)
    p.add_argument("--keep", type=numbers(int, 1), help="values of K (default: those of training, and L)")
    probe_flags(p)
    feature_flags(p, (*some, "none"))
    p = command("ablate-source", ablate_source, "Reconstruction from true and from predicted source.", tokenizer, "out/ablate", 0)
    p.add_argument("--keep", type=numbers(int, 1), help="values of K (default: the checkpoint's target)")
    p.add_argument("--recovery", default="auto", help="checkpoint of recovery.py: a third row; auto: out/recovery/ckpt.pt if it "
                   "fits; none")
    feature_flags(p, (*some, "none"))

    p = commands.add_parser("stats", description="Feature statistics of all training images, for gen --reference.")
    p.set_defaults(function=stats, ckpt=None, seed=0, dtype="float32")
    p.add_argument("--data", default="shapes", help="data set (default shapes)")
    p.add_argument("--size", type=number(int, 0), default=0, help="image side in pixels (default: the classifier's)")
    p.add_argument("--out", default="out/stats", help="folder for stats.npz (default out/stats)")
    p.add_argument("--device", default="auto", help="auto (cuda > mps > cpu) or a torch device")
    p.add_argument("--batch-size", type=number(int, 1), default=64, help="images at a time (default 64); no result depends on it")
    p.add_argument("--workers", type=number(int, -1), default=-1, help="loader processes, -1: none for shapes, else up to 8")
    feature_flags(p, some)

    p = command("gen", gen, "Compare samples with training images, and with the classes that were asked for.",
                "out/mergear/ckpt.pt", "out/gen", 500)
    p.set_defaults(seed=0)
    feature_flags(p, some)
    p.add_argument("--reference", default="", help="npz with mu and sigma (stats writes one; ADM's fits --features inception); "
                   "default: all training images of --data")
    p.add_argument("--samples", default="", help="judge this npz (arr_0 uint8 NHWC, arr_1 labels) and not --ckpt")
    p.add_argument("--cfg", type=numbers(float, 0), default=[1.0, 1.5, 2.0, 3.0], help="guidance scales (default 1,1.5,2,3)")
    p.add_argument("--temperature", type=number(float, 0), default=1.0, help="of the sampler (default 1)")
    p.add_argument("--top-k", type=number(int, 0), default=0, help="sample among the k likeliest sub-tokens, 0: all (default 0)")
    p.add_argument("--top-p", type=number(float, 1e-6, 1), default=1.0, help="sample among this share of probability (default 1)")
    p.add_argument("--keep", type=number(int, 1), help="merge count told to a mergear or randar model (default: its own)")
    p.add_argument("--recovery", default="auto", help="randar: checkpoint of recovery.py; auto: out/recovery/ckpt.pt if it fits; "
                   "none")
    p = commands.add_parser("speed", description="Decoding, training, entropy and merging, as ratios within one run.")
    p.set_defaults(function=speed)
    for name, default, help in (("length", 256, "codes of an image L, a square"), ("keep", 64, "merge count K"),
                                ("window", 16, "of mergear"), ("bits", 18, "code bits d"), ("width", 256, "of the generators"),
                                ("depth", 4, "blocks"), ("heads", 8, "heads"), ("batch-size", 8, "images at a time"),
                                ("repeats", 2, "measurements, of which the fastest counts")):
        p.add_argument(f"--{name}", type=number(int, 1), default=default, help=f"{help} (default {default})")
    p.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of weights, codes and order (default 0)")
    p.add_argument("--device", default="auto", help="auto (cuda > mps > cpu) or a torch device")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on CUDA")
    commands.add_parser("finetune", add_help=False)
    if argv[:1] == ["finetune"]:  # a training command: its flags come from its config, as in the training scripts
        finetune(argv[1:])
    else:
        args = parser.parse_args(argv)
        args.function(args, argv)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
