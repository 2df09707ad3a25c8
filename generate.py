"""Draw images with a trained generator: class -> codes (mergear.py) -> image (the tokenizer in the same checkpoint).

    python generate.py                                                   # 40 images of out/mergear/ckpt.pt
    python generate.py --ckpt out/raster/ckpt.pt --classes star,heart --num 16 --cfg 3.0
    python generate.py --cfg-sweep 1.0:4.0:0.5 --num 10                  # the same samples at seven scales, one a line
    python generate.py --ckpt out/randar/ckpt.pt --steps 12 --cfg-schedule linear        # several codes a step
    python generate.py --num 50000 --npz out/samples.npz                 # for evaluation, ADM's layout
    torchrun --nproc_per_node=8 -- generate.py --ckpt out/l/ckpt.pt --num 50000 --npz out/samples.npz
                                                 # the -- keeps torchrun from reading --num as its own --numa-binding

Writes OUT/samples.png, the first images as a labelled grid. Image number i is a function of (--seed, i) and its class
alone: --batch-size and the number of processes change the speed, not the images.
"""

import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import UserError, image_grid, make_folder, new_array, run_main, to_uint8
from mergear import decode_codes, load_generator, sample_codes
from recovery import load_recovery
from tokenizer import Parser, start_run, weights_hash

IN_PICTURE = 200  # images in samples.png at most


def parse(argv=None):
    """Flags, each checked as far as it can be without the model. Raises UserError."""
    parser = Parser(description=__doc__)
    add = lambda name, default, help, **more: parser.add_argument(
        name, type=type(default), default=default, help=f"{help} (default {default})" if default != "" else help, **more)
    add("--ckpt", "out/mergear/ckpt.pt", "checkpoint of mergear.py")
    add("--cfg", 2.0, "guidance scale s: uncond + s (cond - uncond); 1: the conditional model, at half the cost")
    add("--cfg-schedule", "constant", "linear: the scale grows from 1 to --cfg as codes become known",
        choices=("constant", "linear"))
    add("--cfg-sweep", "", "FIRST:LAST:STEP, scales instead of --cfg: the same samples at each in OUT/sweep.png, a line each")
    add("--temperature", 1.0, "divides the logits; 0: always the most likely code")
    add("--top-k", 0, "sample among the k most likely sub-tokens; 0: all")
    add("--top-p", 1.0, "sample among the most likely sub-tokens that hold this much probability")
    add("--classes", "", "comma-separated class names or ids, used in turn; empty: all classes")
    add("--num", 40, "images")
    add("--keep", 0, "merge count K told to a mergear or randar model, one it was trained on; 0: the tokenizer's target")
    add("--steps", 0, "randar: steps of parallel decoding, K at most; 0: the paper's share of K")
    add("--recovery", "auto", "randar: checkpoint of recovery.py; auto: out/recovery/ckpt.pt if it fits; none: the tokenizer's")
    add("--npz", "", "also write all images to this file: arr_0 uint8 (N,H,W,3), arr_1 int64 labels")
    add("--out", "out/generate", "folder for samples.png")
    add("--seed", 0, "image i is a function of (seed, i)")
    add("--device", "auto", "auto (cuda > mps > cpu) or a torch device")
    add("--dtype", "auto", "of the generator; auto is bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16"))
    add("--batch-size", 32, "images asked for at a time")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the decoding step: minutes at first, for many images on a GPU")
    args = parser.parse_args(argv)
    for name, fine, remedy in (("cfg", 0 <= args.cfg <= 1000, "at least 0 and at most 1000"),
                               ("temperature", args.temperature == 0 or 1e-3 <= args.temperature <= 1000,
                                "0, or from 0.001 to 1000"),
                               ("top_k", 0 <= args.top_k <= 10**9, "from 0 to 1000000000"),
                               ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
                               ("num", 1 <= args.num <= 10**7, "from 1 to 10000000"),
                               ("steps", 0 <= args.steps <= 10**9, "at least 0"),
                               ("batch_size", 1 <= args.batch_size <= 10**6, "from 1 to 1000000"),
                               ("seed", 0 <= args.seed < 2**31, "from 0 to 2147483647")):
        if not fine:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {remedy}")
    return args


def choose_classes(text, config):
    """"star,7" -> class ids, by name or id; all classes for an empty text, [0] for an unconditional model."""
    if not text:
        return list(range(max(1, config.num_classes)))
    if not config.num_classes:
        raise UserError(f"--classes {text}: this model was trained without labels; leave --classes out")
    ids = {name: n for n, name in reversed(list(enumerate(config.class_names)))}
    ids = {**{str(n): n for n in range(config.num_classes)}, **ids}  # a class that is called "7" is meant by 7
    for name in text.split(","):
        if name.strip() not in ids:
            some = ", ".join(config.class_names[:5])
            raise UserError(f"--classes: there is no class {name.strip()!r}; pass names ({some}, ...) or ids "
                            f"0 to {config.num_classes - 1}")
    return [ids[name.strip()] for name in text.split(",")]


def check_keep(keep, config):
    """The --keep that sample_codes takes: None for the default."""
    if keep and config.mode == "raster":
        raise UserError(f"--keep {keep}: this {config.mode} model has no merge instruction; leave --keep out")
    if keep and keep not in config.keeps:
        raise UserError(f"--keep {keep} is not one of the merge counts this model was trained on: "
                        f"{', '.join(map(str, config.keeps))}")
    return keep or None


def check_steps(steps, keep, config):
    """The --steps that sample_codes takes: None for the default."""
    if steps and config.mode != "randar":
        raise UserError(f"--steps {steps}: this {config.mode} model draws one code at a time; leave --steps out")
    if steps > (keep or config.keep):
        raise UserError(f"--steps {steps} is more than the {keep or config.keep} codes of an image: pass at most that, "
                        "which draws one code a step")
    return steps or None


def read_sweep(text):
    """"1.0:4.0:0.5" -> [1.0, 1.5, ..., 4.0]."""
    try:
        first, last, step = (float(part) for part in text.split(":"))
        count = int((last - first) / step + 1e-6) + 1
        if not (0 <= first <= last <= 1000 and step > 0 and count <= IN_PICTURE):
            raise ValueError
        scales = [first + n * step for n in range(count)]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"--cfg-sweep {text} must be FIRST:LAST:STEP with 0 <= FIRST <= LAST <= 1000 and STEP > 0, at most "
                        f"{IN_PICTURE} scales, as in 1.0:4.0:0.5")
    return scales


def draw_sweep(scales, gpt, tokenizer, labels, names, sample, path):
    """PNG: the same seeds and classes at each scale, one line a scale."""
    rows = [decode_codes(gpt, tokenizer, sample(labels, scale)).cpu()
            for scale in tqdm(scales, "guidance scales", dynamic_ncols=True)]
    image_grid(rows, path, labels=names and names * len(scales), row_titles=[f"cfg {scale:g}" for scale in scales])


def open_images(args, run, side):
    """A memory-mapped uint8 (N,H,W,3) file that all ranks write to: 50,000 images need not fit in memory."""
    path = os.path.join(args.out, "images.npy.tmp")
    if run.main:
        try:
            os.makedirs(args.out, exist_ok=True)
            os.makedirs(os.path.dirname(os.path.abspath(args.npz or path)), exist_ok=True)
            if args.npz:  # or it would fail when all images are drawn
                if os.path.isdir(args.npz):
                    raise UserError(f"--npz {args.npz} is a folder; pass the name of a file")
                open(args.npz + ".tmp.npz", "wb").close()
                os.remove(args.npz + ".tmp.npz")
            new_array(path, np.uint8, (args.num, side, side, 3))
        except OSError as e:
            raise UserError(f"--out {args.out} or --npz {args.npz} cannot be written ({e.strerror}); pass another place")
    if run.world > 1:
        dist.barrier()
    return np.lib.format.open_memmap(path, "r+"), path


def main(argv=None):
    args = parse(argv)
    gpt, tokenizer = load_generator(args.ckpt)
    config = gpt.config
    made_by = dict(tokenizer=weights_hash(tokenizer.state_dict()), generator=weights_hash(gpt.state_dict()), weights="ema")
    classes, keep = choose_classes(args.classes, config), check_keep(args.keep, config)
    steps, scales = check_steps(args.steps, keep, config), read_sweep(args.cfg_sweep) if args.cfg_sweep else []
    if config.mode == "randar":
        tokenizer.recovery = load_recovery(args.recovery, tokenizer)
    run = start_run(args)
    gpt, tokenizer = gpt.to(run.device, run.dtype), tokenizer.to(run.device)
    if args.compile:
        gpt.run_blocks, gpt.next_sub = torch.compile(gpt.run_blocks), torch.compile(gpt.next_sub)
    labels = torch.tensor(classes).repeat(math.ceil(args.num / len(classes)))[:args.num]    # (N,)
    names = [config.class_names[n] for n in labels] if config.num_classes else None

    def sample(labels, cfg, start=0):
        cfg = cfg if config.num_classes else 1.0  # without classes there is nothing to guide
        return sample_codes(gpt, labels, cfg, args.temperature, args.top_k, args.top_p, args.seed, start, keep, steps,
                            args.cfg_schedule)

    if scales:
        if run.world > 1:
            raise UserError("--cfg-sweep draws one picture: run it in one process, without torchrun")
        path = os.path.join(args.out, "sweep.png")
        make_folder(args.out)
        draw_sweep(scales, gpt, tokenizer, labels[:IN_PICTURE], names, sample, path)
        print(f"wrote {path}")
        return
    images, path = open_images(args, run, tokenizer.config.size)

    # batch number n is made by rank n % world
    starts = range(run.rank * args.batch_size, args.num, run.world * args.batch_size)
    bar, began = tqdm(total=args.num, unit="image", disable=not run.main, dynamic_ncols=True), time.time()
    for start in starts:
        wanted = labels[start:start + args.batch_size]
        codes = sample(wanted, args.cfg, start)
        images[start:start + len(wanted)] = to_uint8(decode_codes(gpt, tokenizer, codes, start))
        bar.update(min(len(wanted) * run.world, args.num - bar.n))
    images.flush()
    if run.world > 1:
        dist.barrier()
    bar.close()

    if run.main:
        seconds = time.time() - began
        shown = torch.from_numpy(np.array(images[:IN_PICTURE])).permute(0, 3, 1, 2).float() / 127.5 - 1
        columns = len(classes) if 1 < len(classes) <= 12 else 8  # then each class has its column
        image_grid(shown, os.path.join(args.out, "samples.png"), labels=names and names[:len(shown)], columns=columns)
        cache = gpt.new_cache(1 if args.cfg == 1.0 or not names else 2, keep or config.keep)
        print(f"{args.num} images in {seconds:.1f} s: {args.num / seconds:.2f} images/s, "
              f"{args.num * codes.shape[1] / seconds:.0f} tokens/s; "
              f"{config.mode} KV cache: {cache.rows} rows, {cache.nbytes:,} bytes an image")
        print(f"wrote {os.path.join(args.out, 'samples.png')}" + (f" (the first {len(shown)})" if len(shown) < args.num else ""))
        if args.npz:
            partial = args.npz + ".tmp.npz"
            np.savez(partial, arr_0=images, arr_1=labels.numpy(), **made_by)   # ADM's names, and what eval.py records
            os.replace(partial, args.npz)
            print(f"wrote {args.npz}")
    del images
    if run.world > 1:
        dist.barrier()
    if run.main:
        os.remove(path)
    if run.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
