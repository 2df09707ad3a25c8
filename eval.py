"""Measure what the other scripts made, and see it. One command each:

    python eval.py recon                                   # PSNR, SSIM, code usage of out/tokenizer/ckpt.pt on val
    python eval.py recon --keep 16,36,64 --num 200         # several K, the first 200 images
    python eval.py maps --keep 16,36,64                    # a picture of which patches merge
    python eval.py train-classifier                        # a small CNN that knows the classes, about a minute
    python eval.py gen --cfg 1,1.5,2,3                     # how many samples the CNN assigns to the asked class
    python eval.py gen --samples samples.npz               # the same for images drawn before (arr_0 uint8, arr_1 labels)

    python eval.py recon --ckpt out/g/ckpt.pt --data data/imagenet --batch-size 64     # full size, one GPU

Every command writes its numbers to a JSON file in --out, beside what one must know to compare them: the command, the
hash of the weights, the number of images, the data, the dtype. The metrics are plain functions at the top. They are
computed in float64 image by image, so no number depends on the batch size.
"""

import math
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import UserError, batches, build_dataset, image_grid, run_main, to_uint8
from generate import check_keep
from mergear import decode_codes, load_generator, sample_codes
from recovery import (common_flags, enlarge, make_folder, map_scale, merge_map, number, numbers,
                      open_tokenizer, pick_images, val_batches, write_results)
from tokenizer import (Parser, ResBlock, Run, adamw, code_statistics, load_checkpoint, loader_workers, pick_device, prepare_out, psnr,
                       reading, save_checkpoint, seeded, weights_hash)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: plain functions of tensors or arrays. psnr(a, b) is tokenizer.py's.

def check_finite(name, values):
    """The values as float64, or an error: a metric never hides a NaN."""
    values = torch.as_tensor(values).double()
    if not values.isfinite().all():
        raise UserError(f"{name}: {int((~values.isfinite()).sum())} of {values.numel()} values are not finite: "
                        "the weights or the images may be damaged")
    return values


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Distance of two Gaussians, the F in FID: |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). Float.

    The trace of that root is the sum of the square roots of the eigenvalues of sigma1 sigma2. With sigma1 = A A^T these
    are the eigenvalues of the symmetric A^T sigma2 A: real, not negative, and no root of a singular matrix is taken,
    which matters with fewer images than dimensions.
    """
    mu1, sigma1, mu2, sigma2 = (check_finite(name, x) for name, x in
                                dict(mu1=mu1, sigma1=sigma1, mu2=mu2, sigma2=sigma2).items())
    values, vectors = torch.linalg.eigh(sigma1)
    in_range = values > values.max() * len(values) * torch.finfo(values.dtype).eps    # the others are rounding errors of 0
    A = vectors[:, in_range] * values[in_range].sqrt()                                # (D,rank)
    cross = torch.linalg.eigvalsh(A.T @ sigma2 @ A).clamp_min(0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross).item()


def inception_score(probs, splits=10, seed=0):
    """probs (N,C), a class distribution a sample -> (mean, std) over `splits` parts of exp(mean KL(p || mean p)).

    Files often lie sorted by class, and a part that holds a few classes only scores far too low. So the rows are
    shuffled, and before that sorted by their bytes, or the result would still depend on the order they came in.
    """
    p = check_finite("probs", probs).cpu()
    if p.dim() != 2 or not 1 <= splits <= len(p):
        raise UserError(f"probs has shape {tuple(p.shape)}: pass (N,C) with N at least the {splits} splits")
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise UserError("probs must be class distributions: each row at least 0 with sum 1; pass them through a softmax")
    rows = [row.tobytes() for row in p.numpy()]
    p = p[sorted(range(len(rows)), key=rows.__getitem__)]
    p = p[torch.randperm(len(p), generator=seeded(seed))]
    scores = []
    for part in p.tensor_split(splits):
        divergence = (torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1)
        scores.append(divergence.mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


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
# recon: how well the tokenizer gives images back

@torch.no_grad()
def recon(args, argv):
    model, dataset, run = open_tokenizer(args)
    config = model.config
    keeps = args.keep or sorted({config.keep, config.length})
    counts = {keep: torch.zeros(2 ** config.bits, dtype=torch.long) for keep in keeps}
    values = {keep: [] for keep in keeps}                                             # (b,3) each: psnr, ssim, recovery
    for images, _ in val_batches(dataset, args.num, args, "recon"):
        images = images.to(run.device)
        for keep in keeps:
            with run.autocast():
                encoded = model.encode(images, keep)
                predicted, decoded = model.recover(encoded.codes), model.decode(encoded.codes, encoded.source)
            pair = (decoded, images) if run.device.type != "mps" else (decoded.cpu(), images.cpu())     # MPS has no float64
            hits = (predicted == encoded.source).cpu().double().mean(1)
            values[keep].append(torch.stack([psnr(*pair).cpu(), ssim(*pair).cpu(), hits], 1))
            counts[keep] += torch.bincount(encoded.codes.flatten().cpu(), minlength=2 ** config.bits)

    print(f"{args.ckpt} on {args.num} val images of {args.data}, {config.size} px, L = {config.length}, "
          f"{run.dtype} on {run.device}")
    print(f"{'K':>5} {'PSNR':>7} {'SSIM':>7} {'usage':>7} {'perplexity':>11} {'bit imbalance':>14} {'dead bits':>10} "
          f"{'recovery':>9}")
    results = []
    for keep in keeps:
        p, s, hits = check_finite(f"PSNR, SSIM at K = {keep}", torch.cat(values[keep])).mean(0).tolist()
        usage, perplexity = code_statistics(counts[keep])
        imbalance, dead = bit_balance(counts[keep], config.bits)
        print(f"{keep:5} {p:7.2f} {s:7.4f} {usage:7.1%} {perplexity:11.1f} {imbalance:14.3f} {dead:10} {hits:9.2%}")
        results.append(dict(keep=keep, psnr=p, ssim=s, usage=usage, perplexity=perplexity, bit_imbalance=imbalance,
                            dead_bits=dead, recovery_accuracy=hits, codes_seen=int(counts[keep].sum())))
    write_results(os.path.join(args.out, "recon.json"), "eval.py", argv, args, run, size=config.size, bits=config.bits,
                  tokenizer=weights_hash(model.state_dict()), weights="ema", unreadable=len(dataset.skipped()), results=results)

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
    """Small residual CNN: (B,3,size,size) -> (B,num_classes) logits. 0.3M parameters at 32 px."""
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
        return self.to_logits(self.features(images).mean((2, 3)))


@torch.no_grad()
def accuracy(model, labelled_batches, run):
    """Share of images that the classifier assigns to their label, over batches of (images, labels)."""
    hits = [model(images.to(run.device)).argmax(1).cpu() == labels for images, labels in labelled_batches]
    return torch.cat(hits).double().mean().item()


def train_classifier(args, argv):
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
            logits = model(images.to(device))
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
# gen: does the generator draw what it was asked for?

def eight_bit(images):
    """Images as a file would hold them: (B,3,H,W) in [-1,1] -> the same rounded to 8 bits."""
    return from_uint8(to_uint8(images))


def from_uint8(pixels):
    """(B,H,W,3) numpy uint8 -> (B,3,H,W) float32 in [-1,1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_samples(path, num):
    """npz of images (arr_0, uint8 NHWC) and asked classes (arr_1) -> (images in [-1,1], labels), the first num; 0: all."""
    try:
        with np.load(path) as file:
            pixels, labels = file["arr_0"], file["arr_1"]
    except Exception as e:  # a damaged zip can raise anything
        raise UserError(f"--samples {path} cannot be read ({e}): pass an npz with images in arr_0 and labels in arr_1")
    fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3 and labels.shape == pixels.shape[:1]
    if not fits or not len(labels):
        raise UserError(f"--samples {path}: arr_0 is {pixels.dtype} {pixels.shape}, arr_1 {labels.shape}; "
                        "uint8 (N,H,W,3) and (N,) are needed")
    num = num or len(labels)
    return from_uint8(pixels[:num]), torch.from_numpy(labels[:num].astype(np.int64))


def class_agreement(classifier, images, labels, batch_size, run):
    """Images, asked classes -> (share that the classifier assigns to its asked class, the share of each class)."""
    predicted = torch.cat([classifier(part.to(run.device)).argmax(1).cpu() for part in images.split(batch_size)])
    hits = (predicted == labels).double()
    return hits.mean().item(), {int(c): hits[labels == c].mean().item() for c in labels.unique()}


def open_file(args, judge):
    """--samples -> (labels (N,), [(None, images)], what to record)."""
    images, labels = read_samples(args.samples, args.num)
    size, classes = judge["config"]["size"], judge["config"]["num_classes"]
    if images.shape[2:] != (size, size) or not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"--samples {args.samples} has images of {tuple(images.shape[2:])} px and classes {int(labels.min())} to "
                        f"{int(labels.max())}, but --classifier {args.classifier} judges {size} px and {classes} classes")
    args.ckpt, args.num = args.samples, len(images)
    return labels, [(None, images)], {}


def open_generator(args, judge, classifier, run):
    """--ckpt -> (labels (N,), iterator over (cfg, images), what to record). Measures the tokenizer's part on the way."""
    gpt, tokenizer = load_generator(args.ckpt, run.device)
    size, classes = judge["config"]["size"], judge["config"]["num_classes"]
    if gpt.config.num_classes != classes or tokenizer.config.size != size:
        raise UserError(f"--ckpt {args.ckpt} draws {gpt.config.num_classes} classes at {tokenizer.config.size} px, but "
                        f"--classifier {args.classifier} judges {classes} at {size} px: train one on the same --data, --size")
    if args.num < 1:
        raise UserError("--num 0 means all of --samples; pass how many images the generator shall draw")
    args.data = args.data or tokenizer.config.data
    reconstructed = reconstructed_accuracy(classifier, tokenizer, args, run)
    print(f"the classifier is right on {reconstructed:.1%} of val images that went through the tokenizer")
    record = dict(tokenizer=weights_hash(tokenizer.state_dict()), generator=weights_hash(gpt.state_dict()), weights="ema",
                  reconstructed_accuracy=reconstructed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                  keep=check_keep(args.keep, gpt.config))
    gpt = gpt.to(run.dtype)
    labels = torch.arange(args.num) % classes
    return labels, ((cfg, draw_images(gpt, tokenizer, labels, cfg, args)) for cfg in args.cfg), record


@torch.no_grad()
def gen(args, argv):
    device, dtype = pick_device(args.device, args.dtype)
    run = Run(0, 1, device, dtype)
    classifier, judge = load_classifier(args.classifier, device)
    make_folder(args.out)
    labels, draws, record = open_file(args, judge) if args.samples else open_generator(args, judge, classifier, run)
    print(f"the classifier is right on {judge['val_accuracy']:.1%} of {judge['val_num']} real val images")
    print(f"{'cfg':>6} {'samples':>8} {'judged as asked':>16}")
    names, results = judge["class_names"], []
    for cfg, images in draws:
        share, per_class = class_agreement(classifier, eight_bit(images), labels, args.batch_size, run)
        print(f"{'-' if cfg is None else cfg:>6} {len(images):8} {share:16.1%}")
        results.append(dict(cfg=cfg, agreement=share, per_class={names[c]: v for c, v in per_class.items()}))
        picture = os.path.join(args.out, "samples.png" if cfg is None else f"samples_cfg{cfg:g}.png")
        image_grid(images[:40], picture, labels=[names[c] for c in labels[:40]], columns=10)
    write_results(os.path.join(args.out, "gen.json"), "eval.py", argv, args, run, size=judge["config"]["size"],
                  classifier=args.classifier, classifier_hash=weights_hash(classifier.state_dict()),
                  val_accuracy=judge["val_accuracy"], **record, results=results)
    print(f"wrote {args.out}/gen.json and pictures")


def draw_images(gpt, tokenizer, labels, cfg, args):
    """Class ids (N,) -> images (N,3,H,W), as generate.py draws them: image i depends on (seed, i) and its class alone."""
    images, keep = [], check_keep(args.keep, gpt.config)
    for start in tqdm(range(0, len(labels), args.batch_size), f"cfg {cfg}", dynamic_ncols=True, leave=False):
        codes = sample_codes(gpt, labels[start:start + args.batch_size], cfg, args.temperature, args.top_k, args.top_p,
                             args.seed, start, keep)
        images.append(decode_codes(gpt, tokenizer, codes, start).cpu())
    return check_finite("samples", torch.cat(images)).float()


def reconstructed_accuracy(classifier, tokenizer, args, run):
    """What the classifier makes of val images that went through the tokenizer: the ceiling for any generator on it."""
    dataset = build_dataset(args.data, "val", tokenizer.config.size, train=False)

    def reconstructions():
        for images, labels in val_batches(dataset, args.num, args, "reconstruct"):
            with run.autocast():
                encoded = tokenizer.encode(images.to(run.device))
                decoded = tokenizer.decode(encoded.codes, encoded.source)
            yield eight_bit(decoded), labels

    return accuracy(classifier, reconstructions(), run)


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="recon | maps | train-classifier | gen")

    def command(name, function, help, ckpt, out, num):
        p = commands.add_parser(name, description=help)
        p.set_defaults(function=function)
        common_flags(p, ckpt, out, num)
        return p

    tokenizer = "out/tokenizer/ckpt.pt"
    p = command("recon", recon, "Reconstruction quality and code usage on val.", tokenizer, "out/recon", 0)
    p.add_argument("--keep", type=numbers(int, 1), help="values of K (default: the checkpoint's target, and L)")
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

    p = command("gen", gen, "Share of samples that the classifier assigns to the asked class.", "out/mergear/ckpt.pt",
                "out/gen", 500)
    p.set_defaults(seed=0)
    p.add_argument("--classifier", default="out/classifier/ckpt.pt", help="checkpoint of train-classifier")
    p.add_argument("--samples", default="", help="judge this npz (arr_0 uint8 NHWC, arr_1 labels) and not --ckpt")
    p.add_argument("--cfg", type=numbers(float, 0), default=[1.0, 1.5, 2.0, 3.0], help="guidance scales (default 1,1.5,2,3)")
    p.add_argument("--temperature", type=number(float, 0), default=1.0, help="of the sampler (default 1)")
    p.add_argument("--top-k", type=number(int, 0), default=0, help="sample among the k likeliest sub-tokens, 0: all (default 0)")
    p.add_argument("--top-p", type=number(float, 1e-6, 1), default=1.0, help="sample among this share of probability (default 1)")
    p.add_argument("--keep", type=number(int, 1), help="merge count told to a mergear model (default: its own)")
    args = parser.parse_args(argv)
    args.function(args, argv)


if __name__ == "__main__":
    run_main(main)
