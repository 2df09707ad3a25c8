"""Source recovery (paper Eq. 8-9): guess the merge map from the merged tokens alone, and see what the guess costs.

    python recovery.py                                       # out/tokenizer/ckpt.pt on its own validation images
    python recovery.py --keep 25,36,49 --num 200             # several K, the first 200 images
    python recovery.py --ckpt out/g/ckpt.pt --data data/imagenet --batch-size 64 --dtype bfloat16        # one GPU

The tokenizer turns an image into K codes and `source`, which says for each of the L positions which code stands there.
A generator that draws only the codes has no source, so tokenizer.py trains a small network beside it that predicts
one. This script measures that network on validation images: how often it names the right token, and how good the
reconstruction is with the predicted source in place of the true one (the paper's Table 5 asks the same with rFID).
Two guesses that never look at the codes stand beside it, because half of the answer can be had for nothing.

Writes OUT/recovery.json and OUT/recovery.png. The flags, the pictures of merge maps and the record that goes beside
every measured number are defined here, and eval.py imports them.
"""

import argparse
import json
import math
import os
import shlex
import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import UserError, build_dataset, image_grid, run_main
from tokenizer import Parser, Run, load_tokenizer, loader_workers, merge_schedule, pick_device, psnr, weights_hash


# ---------------------------------------------------------------------------------------------------------------------
# What every measuring command needs: flags, the tokenizer with its validation images, a record beside the numbers.

def number(kind, low, high=10**9):
    """An argparse type: an int or float from `low` to `high`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # a nan fails the comparison
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and at most {high}")
        return value
    parse.__name__ = kind.__name__  # argparse names it when the text is no number at all
    return parse


def numbers(kind, low):
    """An argparse type: numbers separated by commas, as in --keep 36,64."""
    parse = lambda text: [number(kind, low)(part) for part in text.split(",")]
    parse.__name__ = f"{kind.__name__},{kind.__name__},..."
    return parse


def common_flags(parser, ckpt, out, num):
    """The flags that all measuring and sampling commands share."""
    add = parser.add_argument
    add("--ckpt", default=ckpt, help=f"checkpoint to measure (default {ckpt})")
    add("--data", default="", help="data set to measure on (default: what the checkpoint was trained on)")
    add("--num", type=number(int, 0), default=num, help=f"number of images, 0: all of them (default {num})")
    add("--batch-size", type=number(int, 1), default=32, help="images at a time (default 32); no result depends on it")
    add("--workers", type=number(int, -1), default=-1, help="loader processes, -1: none for shapes, else up to 8")
    add("--seed", type=number(int, 0), help="of the choice of pictures (default: the checkpoint's), or of samples (default 0)")
    add("--device", default="auto", help="auto (cuda > mps > cpu) or a torch device")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="autocast type; auto is bfloat16 on CUDA, else float32")
    add("--out", default=out, help=f"folder for results (default {out})")


def open_tokenizer(args):
    """Flags -> (MergeVQ with EMA weights, val data set, Run). Fills in the flags whose default the checkpoint knows."""
    device, dtype = pick_device(args.device, args.dtype)
    model = load_tokenizer(args.ckpt, device)
    args.data = args.data or model.config.data
    args.seed = model.config.seed if args.seed is None else args.seed
    dataset = build_dataset(args.data, "val", model.config.size, train=False)
    args.num = min(args.num, len(dataset)) or len(dataset)
    for keep in args.keep or ():
        merge_schedule(model.config.length, keep, model.config.depth)  # raises UserError on a K that cannot be reached
    make_folder(args.out)
    return model, dataset, Run(0, 1, device, dtype)


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {path} cannot be made ({e.strerror}); pass another folder")


def val_batches(dataset, num, args, title):
    """The first `num` images in order, with a progress bar: yields (images, labels)."""
    subset = Subset(dataset, range(min(num, len(dataset))))
    loader = DataLoader(subset, batch_size=args.batch_size, num_workers=loader_workers(args))
    yield from tqdm(loader, title, dynamic_ncols=True, leave=False)
    for name in dataset.check_skipped():
        print(f"unreadable, the next image was measured in its place: {name}", file=sys.stderr)


def pick_images(dataset, num, seed):
    """`num` images for a picture, drawn by the seed (the first ones of a folder are all of one class). (num,3,H,W)"""
    order = np.random.default_rng(seed).permutation(len(dataset))
    return torch.stack([dataset[int(i)][0] for i in order[:num]])


def write_results(path, script, argv, args, run, **results):
    """JSON of the results together with what one must know to compare them with others."""
    record = dict(command=shlex.join(["python", script, *argv]), checkpoint=args.ckpt, data=args.data, num=args.num,
                  seed=args.seed, device=str(run.device), dtype=str(run.dtype).removeprefix("torch."), torch=torch.__version__)
    with open(f"{path}.tmp", "w") as f:
        json.dump({**record, **results}, f, indent=1, allow_nan=False)
        f.write("\n")
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------------------------------
# Merge maps as pictures

def map_scale(size):
    """Screen pixels a pixel, so that small images become large enough to outline regions in."""
    return max(1, math.ceil(128 / size))


def merge_map(images, source, scale=1):
    """Which positions one token stands for: images (B,3,H,W), source (B,L) -> pictures (B,3,H*scale,W*scale).

    Each token's region has the mean colour of its pixels in `images`, and a line where the next region begins: dark on
    light regions, light on dark ones.
    """
    B, _, H, W = images.shape
    side = math.isqrt(source.shape[1])
    cell = H // side * scale                                                   # screen pixels a position
    S = F.one_hot(source).to(images.dtype)                                     # (B,L,K), the paper's S transposed
    mean = F.adaptive_avg_pool2d(images, side).flatten(2) @ S / S.sum(1, keepdim=True).clamp_min(1)     # (B,3,K)
    fill = enlarge((mean @ S.transpose(1, 2)).view(B, 3, side, side), cell)    # (B,3,H*scale,W*scale)
    token = enlarge(source.view(B, 1, side, side), cell)
    border = torch.zeros_like(token, dtype=torch.bool)
    border[..., 1:, :] |= token[..., 1:, :] != token[..., :-1, :]
    border[..., :, 1:] |= token[..., :, 1:] != token[..., :, :-1]
    light = fill.mean(1, keepdim=True) > -0.3
    return torch.where(border, torch.where(light, fill * 0.4 - 0.6, fill * 0.5 + 0.5), fill)


def enlarge(x, scale):
    """(B,C,H,W) with every pixel `scale` times in both directions; any dtype."""
    return x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring recovery

def source_accuracy(predicted, source):
    """Share of positions given to the right token: (B,L) int64 twice -> fraction in [0,1]."""
    assert predicted.shape == source.shape, f"{tuple(predicted.shape)} against {tuple(source.shape)}: pass two (B,L) maps"
    return (predicted == source).double().mean().item()


@torch.no_grad()
def measure(model, dataset, keep, args, run):
    """Accuracy and PSNR with each way to get a source: {"true" | "predicted" | ...: dict(accuracy, psnr)}."""
    codes, source, predicted = [], [], []
    for images, _ in val_batches(dataset, args.num, args, f"K = {keep}: encode"):
        with run.autocast():
            encoded = model.encode(images.to(run.device), keep)
            predicted.append(model.recover(encoded.codes).cpu())
        codes.append(encoded.codes.cpu())
        source.append(encoded.source.cpu())
    codes, source, predicted = torch.cat(codes), torch.cat(source), torch.cat(predicted)     # (N,K), (N,L), (N,L)
    L = source.shape[1]
    sources = {
        "true": source,
        "predicted": predicted,
        "best constant": source.mode(0).values.expand_as(source),     # the commonest token of each position, on these images
        "even spread": (torch.arange(L) * keep // L).expand_as(source),
    }
    total, start = dict.fromkeys(sources, 0.0), 0
    for images, _ in val_batches(dataset, args.num, args, f"K = {keep}: decode"):
        rows = slice(start, start + len(images))
        start += len(images)
        for name, guess in sources.items():
            with run.autocast():
                decoded = model.decode(codes[rows].to(run.device), guess[rows].to(run.device))
            total[name] += psnr(decoded.cpu(), images).sum().item()
    results = {name: dict(accuracy=source_accuracy(guess, source), psnr=total[name] / len(source))
               for name, guess in sources.items()}
    if not all(math.isfinite(row["psnr"]) for row in results.values()):
        raise UserError(f"PSNR at K = {keep} is not finite ({results}): the weights of {args.ckpt} may be damaged")
    return results


@torch.no_grad()
def draw(model, images, keep, run, path):
    """PNG: image, true map, predicted map, and the reconstruction from each; one column an image."""
    with run.autocast():
        encoded = model.encode(images.to(run.device), keep)
        predicted = model.recover(encoded.codes)
        decoded = [model.decode(encoded.codes, source).cpu() for source in (encoded.source, predicted)]
    scale = map_scale(images.shape[-1])
    maps = [merge_map(images, source.cpu(), scale) for source in (encoded.source, predicted)]
    rows = [enlarge(images, scale), *maps, *(enlarge(image, scale) for image in decoded)]
    image_grid(rows, path, scale=1, row_titles=["image", f"true map, K = {keep}", "predicted map", "from true", "from predicted"])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__)
    common_flags(parser, "out/tokenizer/ckpt.pt", "out/recovery", 0)
    parser.add_argument("--keep", type=numbers(int, 1), help="values of K to measure (default: the checkpoint's target)")
    args = parser.parse_args(argv)
    model, dataset, run = open_tokenizer(args)
    keeps = args.keep or [model.config.keep]
    print(f"{args.ckpt} on {args.num} val images of {args.data}, L = {model.config.length}, {run.dtype} on {run.device}")
    print(f"{'K':>5}  {'source':<14} {'accuracy':>8} {'PSNR':>8}")
    results = []
    for keep in keeps:
        for name, row in measure(model, dataset, keep, args, run).items():
            print(f"{keep:5}  {name:<14} {row['accuracy']:8.2%} {row['psnr']:8.2f}")
            results.append(dict(keep=keep, source=name, **row))
    picture = os.path.join(args.out, "recovery.png")
    draw(model, pick_images(dataset, 8, args.seed), keeps[0], run, picture)
    write_results(os.path.join(args.out, "recovery.json"), "recovery.py", argv, args, run, size=model.config.size,
                  tokenizer=weights_hash(model.state_dict()), weights="ema", results=results)
    print(f"wrote {args.out}/recovery.json and {picture}")


if __name__ == "__main__":
    run_main(main)
