"""Source recovery (paper Eq. 8-9), fine-tuned on what a generator produces: where does each merged token belong?

    python recovery.py                                       # for out/randar/ckpt.pt, two CPU cores
    python recovery.py --generator out/l/ckpt.pt --batch-size 256 --max-steps 0 --epochs 5       # the paper's, one GPU
    torchrun --nproc_per_node=8 recovery.py --generator out/l/ckpt.pt --batch-size 256 --max-steps 0 --epochs 5
    python recovery.py --resume                              # go on where the run in --out stopped

The tokenizer turns an image into K codes and `source`, which says for each of the L positions which code stands there.
A RandAR generator draws only the codes; the small network that tokenizer.py trains beside itself predicts their source.
That network has only seen codes of real images. Here it is trained on, with the generator's among them: a share of the
codes of a real image is drawn anew from what the generator predicts given the true codes before (teacher forcing), so the
true source is still known. Of many drawn codes it no longer is. Nothing but this network is trained. generate.py finds
OUT/ckpt.pt and uses it.

Reported before and after, on validation images: how often it names the right token, and how good the reconstruction
is with the predicted source in place of the true one (the paper's Table 5 asks the same with rFID; eval.py ablate-source).
Two guesses that never look at the codes stand beside it, because half of the answer can be had for nothing.

Writes OUT/ckpt.pt, metrics.jsonl, recovery.json and recovery.png. The flags, the pictures of merge maps and the record
that goes beside every measured number are defined here too, and eval.py imports them.
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import shlex
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import UserError, build_dataset, image_grid, run_main
from mergear import code_batches, draw, draw_orders, join_codes, load_generator, open_codes
from tokenizer import (RunConfig, Stop, adamw, any_rank, append_metrics, arg, check_bad, check_batch, check_trained,
                       codes_to_bits, disk_may_fail, dry_run, learning_rate, load_checkpoint, load_tokenizer, loader_workers,
                       mean_over_ranks, merge_schedule, most_likely_source, no_sync, parallel, parse_config, plot_curves,
                       prepare_out, psnr, reading, resume_command, save_checkpoint, seeded, start_run, subset, trim_metrics,
                       weights_hash, zero_rounding)


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
    model = load_tokenizer(args.ckpt)
    args.data = args.data or model.config.data
    args.seed = model.config.seed if args.seed is None else args.seed
    dataset = build_dataset(args.data, "val", model.config.size, train=False)
    args.num = min(args.num, len(dataset)) or len(dataset)
    for keep in args.keep or ():
        merge_schedule(model.config.length, keep, model.config.depth)  # raises UserError on a K that cannot be reached
    run = start_run(args)
    return model.to(run.device), dataset, run


def share(num, run):
    """The block of 0 ... num - 1 that is this rank's, as a range: the blocks of all ranks, one after the other, are the whole."""
    if num < run.world:
        raise UserError(f"{num} images are fewer than {run.world} processes: pass a larger --num, or start fewer")
    return range(num * run.rank // run.world, num * (run.rank + 1) // run.world)


def gather(rows, run):
    """Rows (n,...) of this rank's share, a CPU tensor -> (N,...) rows of all ranks in the order of the images."""
    if run.world == 1:
        return rows
    parts = [None] * run.world
    dist.all_gather_object(parts, rows)
    return torch.cat(parts)


def val_batches(dataset, num, args, title, run=None):
    """`num` images, the same at every call, or those of a list; with `run` this rank's share. Yields (images, labels)."""
    rows = subset(len(dataset), num) if isinstance(num, int) else num
    if run is not None:
        rows = [rows[i] for i in share(len(rows), run)]
    loader = DataLoader(Subset(dataset, rows), batch_size=args.batch_size, num_workers=loader_workers(args))
    yield from tqdm(loader, title, dynamic_ncols=True, leave=False, disable=run is not None and not run.main)
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
def measure(model, dataset, args, run, keep, recoveries):
    """Accuracy and PSNR on --num images with each way to get a source: {name: dict(accuracy, psnr)}.

    recoveries: {name: SourceRecovery}. Beside them the true source, and two guesses that do not look at the codes.
    """
    codes, source, predicted = [], [], {name: [] for name in recoveries}
    for images, _ in val_batches(dataset, args.num, args, f"K = {keep}: encode"):
        with run.autocast():
            encoded = model.encode(images.to(run.device), keep)
            for name, recovery in recoveries.items():
                predicted[name].append(recover(recovery, encoded.codes, model.config.bits).cpu())
        codes.append(encoded.codes.cpu())
        source.append(encoded.source.cpu())
    codes, source = torch.cat(codes), torch.cat(source)                        # (N,K), (N,L)
    L = source.shape[1]
    sources = {
        "true": source,
        **{name: torch.cat(parts) for name, parts in predicted.items()},       # (N,L) each
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
        raise UserError(f"PSNR at K = {keep} is not finite ({results}): the weights may be damaged")
    return results


@torch.no_grad()
def draw_maps(model, images, keep, run, path, recoveries):
    """PNG: image, true map, each recovery's map, and the reconstruction from each; one column an image."""
    with run.autocast():
        encoded = model.encode(images.to(run.device), keep)
        sources = {"true": encoded.source,
                   **{name: recover(recovery, encoded.codes, model.config.bits) for name, recovery in recoveries.items()}}
        decoded = {name: model.decode(encoded.codes, source).cpu() for name, source in sources.items()}
    scale = map_scale(images.shape[-1])
    rows, titles = [enlarge(images, scale)], ["image"]
    for name, source in sources.items():
        rows += [merge_map(images, source.cpu(), scale), enlarge(decoded[name], scale)]
        titles += [f"{name}: map", "its image"]
    image_grid(rows, path, scale=1, row_titles=titles)


def recover(recovery, codes, bits):
    """codes (B,K) -> source (B,L), the most likely one."""
    return most_likely_source(recovery(codes_to_bits(codes, bits)))


# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning

@dataclasses.dataclass
class RecoveryConfig(RunConfig):
    """Defaults suit the tiny generator; the paper's are in the second command above."""
    generator: str = arg("out/randar/ckpt.pt", "checkpoint of mergear.py --mode randar; the tokenizer is in it")
    data: str = arg("", "data to train on; empty: what the generator was trained on")
    out: str = arg("out/recovery", "folder for checkpoint, metrics and pictures")
    cache: str = arg("", "folder of the code cache; empty: the generator's, codes/ beside its checkpoint")
    batch_size: int = arg(64, "images an optimizer step, over all ranks and micro-batches", low=1, high=1000000)
    max_steps: int = arg(600, "optimizer steps; 0: as many as --epochs makes", low=0)
    epochs: int = arg(5, "passes over the data, when --max-steps is 0", low=1)
    lr: float = arg(3e-4, "peak learning rate", low=0.0)
    lr_schedule: str = arg("cosine", "after warm-up: step (x0.1 at 80 and 95 %%), cosine (to 1 %%), constant",
                           choices=("step", "cosine", "constant"))
    warmup: int = arg(50, "linear warm-up steps", low=0)
    weight_decay: float = arg(1e-2, "AdamW weight decay of matrices (Table A2)", low=0.0)
    clip: float = arg(1.0, "gradient norm is clipped to this", low=1e-9)
    drawn: float = arg(0.1, "share of an image's codes that are drawn from the generator; the others are its own",
                       low=0.0, high=1.0)
    keep: int = arg(0, "K of the measurements; 0: the tokenizer's target", low=0)
    save_every: int = arg(300, "steps between checkpoints", low=1)


@torch.no_grad()
def teacher_forced(gpt, codes, labels, keep, order, generator):
    """Codes that the generator would draw in place of each true one, given the true ones before it: (B,K) -> (B,K).
    codes and result by rank; order (B,K) of mergear.py; randomness from a CPU generator."""
    c = gpt.config
    logits = gpt(codes.gather(1, order), labels, torch.full_like(labels, keep), order=order)
    subs = []
    for part in logits:                                                        # (B,K,2^n) each
        u = torch.rand(len(codes) * keep, dtype=torch.float64, generator=generator)
        u = u.float() if part.device.type == "mps" else u  # which has no float64
        subs.append(draw(part.flatten(0, 1), u.to(part.device)).view(codes.shape))
    return torch.empty_like(codes).scatter_(1, order, join_codes(torch.stack(subs, -1), c.sub_bits))


def load_recovery(path, tokenizer):
    """The SourceRecovery of a checkpoint of this script, frozen. path "auto": out/recovery/ckpt.pt, if it is there and was made
    for this tokenizer, else, as for "none", the tokenizer's own. Raises UserError when a named one does not fit."""
    found = "out/recovery/ckpt.pt" if path == "auto" else path
    if path == "none" or path == "auto" and not os.path.exists(found):
        return tokenizer.recovery
    recovery = copy.deepcopy(tokenizer.recovery)
    state = load_checkpoint(found, "recovery", next(recovery.parameters()).device)
    if state.get("tokenizer") != weights_hash(tokenizer.state_dict()):
        if path == "auto":
            print(f"{found} was made for another tokenizer: not used")
            return tokenizer.recovery
        raise UserError(f"--recovery {path} was made for another tokenizer: pass the generator's, or none")
    with reading(found):
        recovery.load_state_dict(state["model"])
    print(f"source recovery from {found}")
    return recovery.eval().requires_grad_(False)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    config = parse_config(RecoveryConfig, __doc__, argv=argv)
    gpt, tokenizer = load_generator(config.generator)
    if gpt.config.mode != "randar":
        raise UserError(f"--generator {config.generator} is a {gpt.config.mode} model, which needs no source recovery: pass "
                        "one of mergear.py --mode randar")
    t = tokenizer.config
    config.data, config.keep = config.data or gpt.config.data, config.keep or t.keep
    if config.keep not in gpt.config.keeps:
        raise UserError(f"--keep {config.keep} is not one of the generator's; pass {', '.join(map(str, gpt.config.keeps))}")
    train_set = build_dataset(config.data, "train", t.size, train=True, seed=config.seed)
    val_set = build_dataset(config.data, "val", t.size, train=False)
    config.max_steps = config.max_steps or max(1, config.epochs * len(train_set) // config.batch_size)
    config.workers = loader_workers(config)
    run = start_run(config)
    check_batch(config, run)
    resume_from = prepare_out(config, run)
    gpt, tokenizer = gpt.to(run.device), tokenizer.to(run.device)
    cache = config.cache or os.path.join(os.path.dirname(config.generator), "codes")
    codes_set = open_codes(os.path.join(cache, "train"), train_set, tokenizer, config, run, gpt.config.views, True)
    dry_run("recovery", train, config, run, codes_set, gpt, tokenizer, Stop())
    with Stop() as stop:
        step, trained = train(config, run, codes_set, gpt, tokenizer, stop, resume_from)
    if run.main and step < config.max_steps:
        print(f"stopped and saved at step {step}; to go on: {resume_command('recovery.py', argv, run.world)}")
    elif run.main:
        recoveries = {"before": tokenizer.recovery, "after": trained.eval()}
        args = argparse.Namespace(**vars(config), num=min(config.eval_num, len(val_set)), ckpt=config.generator)
        results = measure(tokenizer, val_set, args, run, config.keep, recoveries)
        print(f"{args.num} val images, K = {config.keep}\n{'source':<14} {'accuracy':>8} {'PSNR':>8}")
        for name, row in results.items():
            print(f"{name:<14} {row['accuracy']:8.2%} {row['psnr']:8.2f}")
        draw_maps(tokenizer, pick_images(val_set, 8, config.seed), config.keep, run, os.path.join(config.out, "recovery.png"),
                  recoveries)
        write_results(os.path.join(config.out, "recovery.json"), "recovery.py", argv, args, run, keep=config.keep,
                      tokenizer=weights_hash(tokenizer.state_dict()), generator=weights_hash(gpt.state_dict()), results=results)
        plot_curves(os.path.join(config.out, "metrics.jsonl"), os.path.join(config.out, "curves.png"),
                    ("loss", "accuracy", "codes_kept"))
        print(f"done: {config.out}/ckpt.pt, recovery.png, recovery.json; next: python generate.py --ckpt {config.generator}")
    if run.world > 1:
        dist.destroy_process_group()


def train(config, run, codes_set, gpt, tokenizer, stop, resume_from=None):
    """Fine-tune a copy of tokenizer.recovery until --max-steps or stop.asked. Returns (step reached, the copy)."""
    t = tokenizer.config
    raw_model = copy.deepcopy(tokenizer.recovery).train().requires_grad_(True)
    optimizer = adamw(raw_model.named_parameters(), config, (0.9, 0.95), config.weight_decay, run.device)
    step, skipped = 0, 0
    if resume_from:
        state = load_checkpoint(resume_from, "recovery", run.device)
        if state.get("tokenizer") != weights_hash(tokenizer.state_dict()):
            raise UserError(f"--resume: {resume_from} was made for another tokenizer; pass the --generator of that run")
        with reading(f"--resume: {resume_from}"):
            raw_model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            step, skipped = state["step"], state["skipped"]
    model = parallel(raw_model, run)
    stream = code_batches(codes_set, t, config.batch_size, config.seed, step, True, config.accum, run.rank, run.world)
    micro = config.batch_size // (run.world * config.accum)
    if run.main:
        print(f"source recovery: {sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f}M parameters; {len(codes_set)} images "
              f"of {config.data}, {config.max_steps} steps of {config.batch_size}")

    ckpt_path, metrics_path = (os.path.join(config.out, name) for name in ("ckpt.pt", "metrics.jsonl"))
    hashes = dict(tokenizer=weights_hash(tokenizer.state_dict()), generator=weights_hash(gpt.state_dict()))
    if run.main:
        trim_metrics(metrics_path, step)
    bar = tqdm(total=config.max_steps, initial=step, disable=not run.main, dynamic_ncols=True)
    unsaved, stopping, streak = False, False, 0
    while True:
        last = step == config.max_steps
        if last or stopping or step > 0 and step % config.save_every == 0 or unsaved and step % config.log_every == 0:
            unsaved = True  # until it is done: then it is tried again with the next line of the log
            with disk_may_fail(must=last or stopping):
                if run.main:
                    save_checkpoint(ckpt_path, "recovery", config.keep_last, step=step, skipped=skipped,
                                    config=dataclasses.asdict(config), model=raw_model.state_dict(),
                                    optimizer=optimizer.state_dict(), **hashes)
                unsaved = False
        if last or stopping:
            break

        lr, logs = learning_rate(step, config), {}
        for group in optimizer.param_groups:
            group["lr"] = lr
        # randomness of the whole batch, of which this rank uses its rows
        replaced = torch.rand(config.batch_size, t.length, generator=seeded(config.seed, step, 1)) < config.drawn
        for m in range(config.accum):
            *batch, keep = next(stream)
            codes, source, labels = (x.to(run.device) for x in batch)
            first = (m * run.world + run.rank) * micro
            orders = draw_orders(gpt.config, config.batch_size, keep, seeded(config.seed, step, 2))[first:first + micro]
            with run.autocast():
                own = torch.zeros(micro, keep, dtype=torch.long, device=run.device).scatter_(1, source, codes)    # (B,K)
                drawn = teacher_forced(gpt, own, labels, keep, orders.to(run.device), seeded(config.seed, step, first, 3))
                codes = torch.where(replaced[first:first + micro, :keep].to(run.device), drawn, own)
                with no_sync(m < config.accum - 1, model):
                    logits = model(codes_to_bits(codes, t.bits)).float()                                          # (B,L,K)
                    loss = F.cross_entropy(logits.flatten(0, 1), source.flatten())
                    (loss / config.accum).backward()
            values = dict(loss=loss, accuracy=(logits.argmax(-1) == source).float().mean(),
                          codes_kept=(drawn == own).float().mean())
            for name, value in values.items():
                logs[name] = logs.get(name, 0.0) + value.detach() / config.accum
        if step == 0:
            check_trained(raw_model.named_parameters(), optimizer)
        zero_rounding(raw_model)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        bad, stopping = any_rank(run, ~torch.isfinite(norm + sum(logs.values())), stop.asked)
        if not bad:
            streak = 0
            optimizer.step()
        else:  # a bad step changes nothing
            skipped, streak = skipped + 1, streak + 1
            check_bad(streak, step, config)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)
        if step % config.log_every == 0 or step == config.max_steps:
            logs = {name: mean_over_ranks(value).item() for name, value in logs.items()}
            if run.main:
                append_metrics(metrics_path, step=step, **logs, grad_norm=norm, lr=lr, keep=keep, skipped=skipped)
                bar.set_postfix(loss=f"{logs['loss']:.3f}", accuracy=f"{logs['accuracy']:.3f}", skipped=skipped)
    bar.close()
    return step, raw_model


if __name__ == "__main__":
    run_main(main)
