"""Draw images with a trained generator: class -> codes -> source -> image.

    python generate.py  # 40 images of out/mergear/ckpt.pt
    python generate.py --ckpt out/randar/ckpt.pt --classes star,heart --num 16 --steps 12
    python generate.py --cfg-sweep 1.0:4.0:0.5 --num 10  # the same seeds at seven scales
    python generate.py --num 50000 --npz out/samples.npz  # for eval.py gen, ADM's layout
    python generate.py --num 50000 --png-dir out/samples  # for pytorch-fid, torch-fidelity
    torchrun --nproc_per_node=8 -- generate.py --num 50000 --npz out/samples.npz

The checkpoint of mergear.py or recovery.py holds both models. Image i is a function of its class
and of (--seed, i), on any number of processes. Another --batch-size may change the rounding.
"""

import dataclasses
import functools
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import (UserError, arg, from_uint8, image_grid, new_array, parse_config,
                  run_main, start_run, to_uint8, weights_hash)
from mergear import POSITION_TEMPERATURE, draw_images, load_generator

IN_PICTURE = 200  # images in samples.png

@dataclasses.dataclass
class SampleConfig:
    ckpt: str = arg("out/mergear/ckpt.pt", help="checkpoint of mergear.py or recovery.py")
    cfg: float = arg(2.0, help="guidance scale s: uncond + s (cond - uncond)", low=0, high=1000)
    cfg_schedule: str = arg("constant", help="linear: the scale grows from 1 to --cfg with the "
                            "share of known codes", choices=("constant", "linear"))
    cfg_sweep: str = arg("", help="FIRST:LAST:STEP, draw OUT/sweep.png with these scales")
    temperature: float = arg(-1.0, help="divides the logits of codes; 0: the likeliest code; "
                             "-1: 0.2 for randar, else 1", low=-1)
    position_temperature: float = arg(POSITION_TEMPERATURE, low=0.01,
                                      help="randar: divides the logits of positions")
    top_k: int = arg(0, help="sample among the k likeliest sub-tokens; 0: all", low=0)
    top_p: float = arg(1.0, help="sample among the likeliest sub-tokens of this total probability",
                       low=1e-9, high=1)
    classes: str = arg("", help="names or ids, separated by commas, used in turn; empty: all")
    num: int = arg(40, help="images", low=1, high=10**7)
    keep: int = arg(0, help="merge count K; 0: the tokenizer's target", low=0)
    steps: int = arg(0, help="randar: decoding steps; 0: the paper's share of K", low=0)
    npz: str = arg("", help="write all images and labels to this file, in ADM's layout")
    png_dir: str = arg("", help="write each image to this folder, 000000.png and so on")
    out: str = arg("out/generate", help="folder for the picture")
    seed: int = arg(0, help="image i is a function of (seed, i)", low=0, high=2**31 - 1)
    device: str = arg("auto")
    dtype: str = arg("auto", help="type of the generator; auto: bfloat16 on CUDA, else float32",
                     choices=("auto", "float32", "bfloat16"))
    batch_size: int = arg(0, help="images per batch; 0: 32 on a CPU, else 256", low=0, high=10**6)
    compile: bool = arg(False, help="torch.compile the decoding step")

def choose_classes(text, config):
    """"star,7" -> class ids, by name or id. Empty: all classes. Raises UserError."""
    if not text:
        return list(range(max(1, config.num_classes)))  # an unlabelled model has class 0 only
    names = list(config.class_names)
    ids = [str(n) for n in range(config.num_classes)]
    classes = []
    for word in map(str.strip, text.split(",")):
        if word not in names + ids:
            raise UserError(f"--classes: no class {word!r}: pass names, as in "
                            f"{','.join(names[:3])}, or ids below {len(names)}")
        # a class that is called "7" beats the id 7
        classes.append(names.index(word) if word in names else int(word))
    return classes

def read_sweep(text):
    """"1.0:4.0:0.5" -> [1.0, 1.5, ..., 4.0]. Raises UserError."""
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = math.floor((last - first) / step + 1e-6) + 1
        if not 0 <= first <= last <= 1000 or not 1 <= count <= IN_PICTURE:
            raise ValueError
    except (ArithmeticError, ValueError):
        raise UserError(f"--cfg-sweep {text}: pass FIRST:LAST:STEP, as in 1.0:4.0:0.5")
    return [first + n * step for n in range(count)]

def main(argv=None):
    args = parse_config(SampleConfig, __doc__, argv)
    gpt, tokenizer = load_generator(args.ckpt)
    config = gpt.config
    keep = args.keep or config.keep
    if args.keep and (config.mode == "raster" or keep not in config.keeps):
        raise UserError(f"--keep {keep}: this {config.mode} model was not trained on it; pass one "
                        f"of {config.keeps}, or leave --keep out for raster")
    if args.steps and (config.mode != "randar" or not min(2, keep) <= args.steps <= keep):
        raise UserError(f"--steps {args.steps}: only randar draws several codes per step, in 2 to "
                        f"K = {keep} steps; this is a {config.mode} model")
    classes = choose_classes(args.classes, config)
    scales = read_sweep(args.cfg_sweep) if args.cfg_sweep else []
    # which weights made the images, taken before a cast to bfloat16
    made_by = dict(tokenizer=weights_hash(tokenizer.state_dict()),
                   generator=weights_hash(gpt.state_dict()))
    run = start_run(args)
    gpt.to(run.device, run.dtype)
    tokenizer.to(run.device)
    if args.compile:  # every step has the same shapes
        gpt.run_blocks = torch.compile(gpt.run_blocks)
    size = args.batch_size or (32 if run.device.type == "cpu" else 256)
    # the classes in turn
    labels = torch.tensor(classes).repeat(math.ceil(args.num / len(classes)))[:args.num]  # (N,)
    names = [config.class_names[n] for n in labels[:IN_PICTURE]] if config.num_classes else None
    cfg = args.cfg if names else 1.0  # without classes there is nothing to guide
    sample = functools.partial(
        draw_images, gpt, tokenizer, batch_size=size, temperature=args.temperature,
        position_temperature=args.position_temperature, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, steps=args.steps or None, cfg_schedule=args.cfg_schedule,
        keep=None if config.mode == "raster" else keep)
    for folder in (args.out, os.path.dirname(args.npz), args.png_dir):
        os.makedirs(folder or ".", exist_ok=True)
    if os.path.isdir(args.npz):
        raise UserError(f"--npz {args.npz} is a folder: pass the name of a file")
    if run.main and args.png_dir and os.listdir(args.png_dir):
        raise UserError(f"--png-dir {args.png_dir} is not empty: a tool that counts its images "
                        "would count the old ones")

    # the same noise and classes at every scale: what differs is guidance alone
    if scales:
        if not names or run.world > 1:
            raise UserError("--cfg-sweep needs a model with classes, and one process")
        shown = labels[:min(size, IN_PICTURE)]
        rows = [sample(shown, cfg=scale).cpu() for scale in tqdm(scales)]
        titles = [f"cfg {scale:g}" for scale in scales]
        names = names[:len(shown)] * len(scales)
        image_grid(rows, f"{args.out}/sweep.png", names, row_titles=titles)
        print(f"wrote {args.out}/sweep.png")
        return

    # all ranks write to one memory-mapped file: 50,000 images need not fit in memory
    path, side = f"{args.out}/images.npy.tmp", tokenizer.config.size
    if run.main:
        new_array(path, np.uint8, (args.num, side, side, 3))
    run.barrier()
    images = np.lib.format.open_memmap(path, "r+")
    began = time.time()
    starts = range(run.rank * size, args.num, run.world * size)  # batch r, r + world, ...
    for start in tqdm(starts, unit="batch", disable=not run.main, dynamic_ncols=True):
        # the noise of sample i is seeded by (seed, i), so the ranks need not talk
        batch = to_uint8(sample(labels[start:start + size], start=start, cfg=cfg))  # (n,H,W,3)
        images[start:start + len(batch)] = batch
        for i, pixels in enumerate(batch if args.png_dir else (), start):
            Image.fromarray(pixels).save(f"{args.png_dir}/{i:06d}.png")
    images.flush()
    run.barrier()
    if run.world > 1:
        dist.destroy_process_group()
    if not run.main:
        return

    speed = args.num / (time.time() - began)
    columns = len(classes) if 1 < len(classes) <= 12 else 8  # a column per class
    image_grid(from_uint8(np.array(images[:IN_PICTURE])), f"{args.out}/samples.png", names, columns)
    cache = gpt.new_cache(1 if cfg == 1.0 else 2, keep)
    codes = keep if config.mode == "randar" else config.length
    print(f"{speed:.2f} images/s, {speed * codes:.0f} codes/s; {config.mode} cache of an image: "
          f"{cache.rows} rows, {cache.nbytes:,} bytes")
    if args.npz:
        np.savez(f"{args.npz}.tmp.npz", arr_0=images, arr_1=labels.numpy(), **made_by)
        os.replace(f"{args.npz}.tmp.npz", args.npz)
    os.remove(path)
    print("wrote", *filter(None, (f"{args.out}/samples.png", args.npz, args.png_dir)))

if __name__ == "__main__":
    run_main(main)
