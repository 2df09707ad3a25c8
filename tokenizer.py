"""Stage 1 of MergeVQ (arXiv 2504.00999): the tokenizer. Merge tokens, quantise them, remember where they came from.

    python tokenizer.py                                          # tiny, embedded `shapes`, two CPU cores
    python tokenizer.py --data path/to/folder --max-steps 5000   # tiny, your images
    python tokenizer.py --variant g --data data/imagenet --batch-size 16 --grad-ckpt        # one GPU
    torchrun --nproc_per_node=8 tokenizer.py --variant g --data data/imagenet               # eight GPUs
    python tokenizer.py --resume                                 # go on where the run in --out stopped
    python tokenizer.py --variant gr --perceptual lpips --lpips-weights download --vgg-weights download --align dinov2 \\
        --init dinov2 --teacher-weights download                 # the full versions; a path instead of download works too

An image becomes L tokens (a CNN or patch grid), a transformer merges them to K while it runs (ToMe), each merged token
becomes d bits (LFQ), and `source` says for each of the L positions which of the K tokens stands for it:

    image (B,3,H,W) -> CNN -> (B,L,D) -> 12 x [attention, merge, MLP] -> (B,K,D) -> d signs -> codes (B,K)
                                              `-> source (B,L) in [0,K)
    codes, source -> bits (B,K,d) -> one gather -> (B,L,d) -> transformer + CNN decoder -> image

Read top to bottom: shared helpers, config, merging, quantiser, encoder, decoder, recovery, the model, losses, main.
Axis letters: B batch, L full tokens, K kept tokens, D width, d code bits, N tokens at this layer, C any channels.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import errno
import glob
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import (AUGMENT_DRAWS, Parser, UserError, augment, batches, build_dataset, ignore_signals, image_grid, run_main)


# ---------------------------------------------------------------------------------------------------------------------
# What every stage shares: config -> flags, process group, checkpoints, EMA, learning rate, logs. Later stages import it.

def arg(default, help, choices=None, low=None, high=None):
    """A dataclass field that is also a flag: its default, help text, and the values it may take."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclasses.dataclass
class RunConfig:
    """The flags that every training script shares."""
    data: str = arg("", "shapes | image folder | .tar or quoted glob of tar shards")
    out: str = arg("", "folder for checkpoint, metrics and pictures")
    seed: int = arg(0, "all randomness is a function of this and the step", low=0, high=2**31 - 1)
    device: str = arg("auto", "auto (cuda > mps > cpu) or a torch device")
    dtype: str = arg("auto", "autocast type; auto is bfloat16 on CUDA, else float32", choices=("auto", "float32", "bfloat16"))
    batch_size: int = arg(256, "images an optimizer step, over all ranks and micro-batches", low=1, high=1000000)
    accum: int = arg(1, "micro-batches a rank adds up for one step", low=1, high=1000000)
    max_steps: int = arg(0, "optimizer steps; 0: as many as --epochs makes", low=0)
    epochs: int = arg(270, "passes over the data, when --max-steps is 0", low=1)
    lr: float = arg(1e-4, "peak learning rate", low=0.0)
    lr_schedule: str = arg("step", "after warm-up: step (x0.1 at 80 and 95 %%), cosine (to 1 %%), constant",
                           choices=("step", "cosine", "constant"))
    warmup: int = arg(1000, "linear warm-up steps", low=0)
    workers: int = arg(-1, "data loader processes a rank; -1: none for shapes, else up to 8", low=-1, high=256)
    log_every: int = arg(10, "steps between lines in metrics.jsonl", low=1)
    eval_every: int = arg(1000, "steps between evaluations with pictures", low=1)
    eval_num: int = arg(1000, "validation images an evaluation looks at", low=1)
    save_every: int = arg(1000, "steps between checkpoints", low=1)
    keep_last: int = arg(1, "how many checkpoints stay; beyond 1 also as ckpt_STEP.pt", low=1)
    resume: bool = arg(False, "continue the run in --out")
    overwrite: bool = arg(False, "replace the run in --out")
    compile: bool = arg(False, "torch.compile the parts of static shape")


def parse_config(config_class, doc, presets=None, flag="", argv=None):
    """Flags from a config dataclass. `presets[name]` (chosen by --flag) replaces defaults; a typed flag beats both.

    Raises UserError (one line, exit code 2) on an unknown flag or a value out of range.
    """
    def ints(text):
        return tuple(int(v) for v in text.split(","))

    def build(defaults):
        parser = Parser(description=doc)
        for f in dataclasses.fields(config_class):
            name, default, meta = "--" + f.name.replace("_", "-"), defaults.get(f.name, f.default), f.metadata
            text = meta["help"] + (f" (default {default})" if default != "" else "")
            if f.type is bool:
                parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=text)
            elif f.type is tuple:
                parser.add_argument(name, type=ints, default=default,
                                    metavar="INT,INT,...", help=text)
            else:
                parser.add_argument(name, type=f.type, default=default, choices=meta["choices"], help=text)
        return parser

    defaults = {}
    if presets:
        first = Parser(add_help=False)
        first.add_argument("--" + flag, default=next(f.default for f in dataclasses.fields(config_class) if f.name == flag))
        name = getattr(first.parse_known_args(argv)[0], flag)
        if name not in presets:
            raise UserError(f"--{flag} {name} is not one of {', '.join(presets)}")
        defaults = presets[name]
    config = config_class(**vars(build(defaults).parse_args(argv)))
    check_ranges(config)
    return config


def check_ranges(config):
    """Every number within the bounds its field states, or within a billion either way; raises UserError."""
    for f in dataclasses.fields(config):
        value, low, high = getattr(config, f.name), f.metadata.get("low"), f.metadata.get("high")
        low, high = -10**9 if low is None else low, 10**9 if high is None else high
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, (int, float)) and not low <= v <= high:  # a nan fails the comparison
                raise UserError(f"--{f.name.replace('_', '-')} {v} must be at least {low} and at most {high}")


class Run(NamedTuple):
    """Where this process stands: rank of world, device, autocast dtype."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def main(self):
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def pick_device(name, dtype="auto", rank=0):
    """Flags --device and --dtype -> (torch.device, torch.dtype); raises UserError when the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{rank}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not usable here ({str(e).splitlines()[0]}); try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    return device, getattr(torch, dtype)


def start_run(config):
    """Join the process group when torchrun started us, pick device and dtype, print them. Returns Run."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, dtype = pick_device(config.device, config.dtype, int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    torch.manual_seed(config.seed)
    run = Run(rank, world, device, dtype)
    if run.main:
        print(f"torch {torch.__version__}, device {device}, {dtype}, {world} process(es)")
    return run


class MeanOverRanks(torch.autograd.Function):
    """all_reduce-mean whose backward is an all_reduce-mean too, so that DDP's gradient is that of one big batch."""
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()


def mean_over_ranks(x):
    """Mean of a tensor over all ranks, differentiable; the tensor itself on one process."""
    return MeanOverRanks.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def parallel(module, run):
    """DDP around a module when there are several ranks, which averages its gradients. None stays None."""
    if run.world == 1 or module is None:
        return module
    ids = [run.device.index] if run.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def no_sync(on, *modules):
    """A context in which, if `on`, gradients add up on each rank and are not averaged: all micro-batches but the last."""
    stack = contextlib.ExitStack()
    for module in modules:
        if on and isinstance(module, nn.parallel.DistributedDataParallel):
            stack.enter_context(module.no_sync())
    return stack


def check_batch(config, run):
    """--batch-size must divide into ranks and micro-batches; raises UserError before anything is written."""
    if config.batch_size % (run.world * config.accum):
        raise UserError(f"--batch-size {config.batch_size} does not divide into {run.world} processes x --accum {config.accum}: "
                        f"pass a multiple of {run.world * config.accum}")


def prepare_out(config, run):
    """Make --out. An existing run there needs --resume or --overwrite. Returns the checkpoint to resume from, or None."""
    path = os.path.join(config.out, "ckpt.pt")
    if config.resume:
        if not os.path.exists(path):
            raise UserError(f"--resume: there is no {path}; leave --resume out to start a run there")
        return path
    if (os.path.exists(path) or numbered_checkpoints(path)) and not config.overwrite:
        raise UserError(f"--out {config.out} holds a run already: pass --resume to continue it or --overwrite to replace it")
    if run.main:
        try:
            os.makedirs(config.out, exist_ok=True)
            for old in (path, os.path.join(config.out, "metrics.jsonl"), *numbered_checkpoints(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(old)
        except OSError as e:
            raise UserError(f"--out {config.out} cannot be written ({e.strerror}); pass another folder")
    if run.world > 1:
        dist.barrier()
    return None


def loader_workers(config):
    """Flag --workers -> data loader processes of a rank. Raises UserError on a number that no machine has room for."""
    if config.workers > 256:
        raise UserError(f"--workers {config.workers} must be at most 256")
    return config.workers if config.workers >= 0 else 0 if config.data == "shapes" else min(8, os.cpu_count() or 1)


CHECKPOINT_VERSION = 2  # 2: ranks of source recovery are stretched to the image


def save_checkpoint(path, kind, keep_last=1, **state):
    """Write one dict of tensors and primitives to a temporary name, then rename: a reader never sees half a file.

    With keep_last > 1 the last so many stay beside it as ckpt_STEP.pt. Raises UserError when it cannot be written (a full
    disk, no permission); what was there before is untouched then.
    """
    temporary, metrics = f"{path}.tmp", os.path.join(os.path.dirname(path), "metrics.jsonl")
    if metrics in UNWRITTEN:  # a run that is resumed from here should not lack these lines
        append_metrics(metrics)
    try:
        with open(temporary, "wb") as f:
            torch.save(dict(kind=kind, version=CHECKPOINT_VERSION, **state), f)
            f.flush()
            os.fsync(f.fileno())  # or a power cut could leave the new name with nothing behind it
        if keep_last > 1:  # the newest has two names and needs its space once
            numbered = f"{os.path.splitext(path)[0]}_{state['step']:07d}.pt"
            with contextlib.suppress(FileNotFoundError):
                os.remove(numbered)
            try:
                os.link(temporary, numbered)
            except OSError:  # a file system without links
                shutil.copyfile(temporary, numbered)
        os.replace(temporary, path)
        if keep_last > 1:  # who went back to an older one keeps those of later steps
            for old in [name for name in numbered_checkpoints(path) if name <= numbered][:-keep_last]:
                os.remove(old)
    except (OSError, RuntimeError) as e:  # torch.save wraps the first in the second
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = e.strerror if isinstance(e, OSError) else f"{e.__context__ or e}".splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}): make room or mend the folder; the checkpoint before is kept")


def numbered_checkpoints(path):
    """The files ckpt_STEP.pt that --keep-last left beside ckpt.pt, oldest first."""
    stem = os.path.splitext(path)[0]
    return sorted(name for name in glob.glob(f"{glob.escape(stem)}_*.pt") if name[len(stem) + 1:-3].isdecimal())


@contextlib.contextmanager
def disk_may_fail(must=False):
    """What is written inside may fail without ending the run: the error is printed. `must`: it ends the run after all."""
    try:
        yield
    except (UserError, OSError) as e:
        if must:
            raise
        tqdm.write(f"warning: {e}", file=sys.stderr)


def load_checkpoint(path, kind, device="cpu"):
    """Read a checkpoint of the given kind. Raises UserError when it is missing, unreadable, or of another kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on strange files; the one line below says enough
            state = torch.load(path, map_location=device, weights_only=True)
            found = state["kind"], state["version"]
            fits = found == (kind, CHECKPOINT_VERSION)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: train one first, or pass its path")
    except Exception as e:  # a damaged or malicious file raises many types; each means the same to the user
        older = numbered_checkpoints(path)
        remedy = f"copy {older[-1]} over it" if older else "train again or pass another"
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__}): it may be damaged; {remedy}")
    if not fits:
        raise UserError(f"{path} is a checkpoint of kind {found[0]}, version {found[1]}, but {kind}, version "
                        f"{CHECKPOINT_VERSION} is needed: pass another, or train again")
    return state


@contextlib.contextmanager
def reading(path):
    """While the content of a checkpoint is put to use: whatever is missing or does not fit becomes one line."""
    try:
        yield
    except Exception as e:  # wrong shapes, names, types: nothing else can go wrong inside
        raise UserError(f"{path} does not hold what it should ({type(e).__name__}: {' '.join(str(e).split())[:200]}): "
                        "pass the flags it was made with, or another file") from None


def weights_hash(state_dict):
    """sha256 of a state dict's names, types, shapes and values: two equal hashes mean the same model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay * ema + (1 - decay) * model, the decay rising from 0 in the first steps; buffers are copied."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


def learning_rate(step, config):
    """Learning rate of a step: linear warm-up, then the schedule (Table A1: `step` for G and G+R, `cosine` for R)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    if config.lr_schedule == "cosine":
        return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    if config.lr_schedule == "step":
        return config.lr * (1.0 if done < 0.8 else 0.1 if done < 0.95 else 0.01)
    return config.lr


def adamw(named_parameters, config, betas, weight_decay, device):
    """AdamW, fused where there is a fused one; matrices decay, vectors (biases, norms, scales) do not."""
    params = [p for _, p in named_parameters if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=device.type in ("cuda", "cpu"))


UNWRITTEN = {}  # metrics path -> lines that wait for a disk with room


def append_metrics(path, **values):
    """One JSON line more in a metrics file; tensors become numbers. What a full disk refuses goes out with a later line, or
    when this is called without values."""
    values = {k: round(float(v), 7) if isinstance(v, (float, torch.Tensor)) else v for k, v in values.items()}
    text = UNWRITTEN.pop(path, "") + (json.dumps(values) + "\n" if values else "")
    try:
        with open(path, "ab", buffering=0) as f:
            size = f.tell()
            if f.write(text.encode()) < len(text):  # the part that fitted would be half a line
                f.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
        if text.count("\n") == 1:
            tqdm.write(f"warning: {path} not written ({e.strerror}): its lines wait in memory", file=sys.stderr)
        UNWRITTEN[path] = text


def trim_metrics(path, step):
    """Drop what comes after the checkpoint of `step` from a metrics file: a resumed run writes these lines again, and the
    evaluation at `step` too. Half a line, left by a kill, goes with them."""
    kept = []
    with contextlib.suppress(FileNotFoundError), open(path) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row["step"] < step or row["step"] == step and "lr" in row:  # evaluations have no learning rate
                    kept.append(line)
    with open(f"{path}.tmp", "w") as f:
        f.writelines(kept)
    os.replace(f"{path}.tmp", path)


class Stop:
    """`with Stop() as stop`: SIGTERM and Ctrl-C only set stop.asked, for the training loop to save and end after its step.
    The second one ends the process at once, as if this were not here."""
    asked = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def resume_command(script, argv, world):
    """The command line that continues a run which `script argv` started."""
    start = ["python"] if world == 1 else ["torchrun", f"--nproc_per_node={world}", "--"]
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if a not in ("--overwrite", "--resume")]
    return shlex.join([*start, script, *argv, "--resume"])


def any_rank(run, *flags):
    """Flags (bool or 0-d tensor) -> list of bool: is each on, on any rank? What all must do alike is decided here."""
    flags = torch.stack([torch.as_tensor(flag, device=run.device).float() for flag in flags])
    if run.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]


MAX_BAD = 20  # this many steps in a row without a finite loss and gradient: the run is lost, not unlucky


def check_bad(streak, step, config):
    """Raises UserError when too many steps in a row were bad."""
    if streak >= MAX_BAD:
        raise UserError(f"{streak} steps in a row up to step {step} had a loss or gradient that is not finite; the weights in "
                        f"{config.out} are from before: pass --resume with a lower --lr than {config.lr}, or --dtype float32")


def dry_run(kind, train, config, run, *inputs, **changes):
    """One step of `train(config, run, *inputs)`, with evaluation, pictures and checkpoint, in a folder that goes again.

    What would end a long run at its first evaluation or save (memory, disk, a wrong path) ends it here instead.
    """
    began, folder = time.time(), os.path.join(config.out, "dry_run")
    if run.main:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.makedirs(folder)
        except OSError as e:
            raise UserError(f"--out {config.out} cannot be written ({e.strerror}); pass another folder")
    if run.world > 1:
        dist.barrier()
    changes = dict(dict(out=folder, max_steps=1, eval_num=min(16, config.eval_num), log_every=1, resume=False, keep_last=2),
                   **changes)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(dataclasses.replace(config, **changes), run, *inputs)
        if run.main and load_checkpoint(os.path.join(folder, "ckpt.pt"), kind)["skipped"]:
            raise UserError("the first step gave a loss or gradient that is not finite: check --data, or pass --dtype float32")
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e):
            raise UserError("a training step does not fit in memory: pass a smaller --batch-size, or a larger --accum") from None
        raise
    finally:
        if run.main:
            shutil.rmtree(folder, ignore_errors=True)
    if run.main:
        print(f"dry run: a step, an evaluation and a checkpoint work ({time.time() - began:.1f} s)")


def check_trained(named_parameters, optimizer):
    """Every trainable parameter is in the optimizer, once, and has a gradient."""
    owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
    for name, p in named_parameters:
        if p.requires_grad:
            assert owned.count(id(p)) == 1, f"parameter {name} is {owned.count(id(p))} times in the optimizer"
            assert p.grad is not None, f"parameter {name} got no gradient"


def plot_curves(metrics_path, png_path, panels):
    """Draw the metrics file as small line charts. panels: list of metric names, one chart each; x is the step."""
    with open(metrics_path) as f:
        every = sum(1 for _ in f) // 500 + 1  # a chart is 240 pixels wide: memory must not grow with the run
        f.seek(0)
        plot_rows([json.loads(line) for n, line in enumerate(f) if n % every == 0 or '"lr"' not in line], png_path, panels)


def plot_rows(rows, png_path, panels, x="step"):
    """Draw a list of dicts as small line charts over its key `x`: one chart for each key in `panels`."""
    w, h, columns = 300, 170, 3
    sheet = Image.new("RGB", (w * columns, h * math.ceil(len(panels) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, name in enumerate(panels):
        points = [(r[x], r[name]) for r in rows if name in r and math.isfinite(float(r[name]))]   # "inf" too
        x0, y0 = 48 + w * (n % columns), 22 + h * (n // columns)
        x1, y1 = x0 + w - 62, y0 + h - 42
        draw.text((x0, y0 - 16), name, fill="black")
        draw.rectangle((x0, y0, x1, y1), outline="gray")
        if len(points) < 2:
            continue
        first, last = points[0][0], points[-1][0]
        low, high = min(v for _, v in points), max(v for _, v in points)
        to_pixel = lambda s, v: (x0 + (x1 - x0) * (s - first) / max(1, last - first),
                                 y1 - (y1 - y0) * (v - low) / max(1e-12, high - low))
        draw.line([to_pixel(*p) for p in points], fill=(200, 60, 40), width=1)
        for px, py in [to_pixel(*p) for p in points] * (len(points) < 20):  # so few that each is worth a dot
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), fill=(200, 60, 40))
        draw.text((x0 - 44, y0 - 2), f"{high:.3g}", fill="gray")
        draw.text((x0 - 44, y1 - 10), f"{low:.3g}", fill="gray")
        draw.text((x0, y1 + 3), f"{x} {first}", fill="gray")
        draw.text((x1 - draw.textlength(f"{last}"), y1 + 3), f"{last}", fill="gray")
    sheet.save(png_path)


def seeded(*key):
    """A CPU generator that is a function of the key alone, e.g. (seed, step)."""
    state = 0x9E3779B97F4A7C15
    for k in key:  # splitmix64 of each part in turn: near keys give unrelated streams
        state = (state ^ (int(k) + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 31)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 29
    return torch.Generator().manual_seed(state & (2**63 - 1))


# ---------------------------------------------------------------------------------------------------------------------
# Config: the paper's Table A1 as data. Every field is a flag.

@dataclasses.dataclass
class TokenizerConfig(RunConfig):
    """Defaults are the tiny variant's; VARIANTS lists what the others change (design of Table A1)."""
    variant: str = arg("tiny", "preset: tiny, g, gr or r", choices=("tiny", "g", "gr", "r"))
    data: str = arg("shapes", "shapes | image folder | .tar or quoted glob of tar shards")
    out: str = arg("out/tokenizer", "folder for checkpoint, metrics and pictures")
    size: int = arg(32, "image side in pixels", low=8, high=8192)
    # encoder: a CNN halving the image between stages, or one patch convolution; then a transformer that merges
    patch: int = arg(0, "side of ViT patches (variant r); 0: CNN stages", low=0, high=8192)
    base: int = arg(16, "CNN width at full resolution, encoder and decoder", low=1, high=8192)
    mult: tuple = arg((1, 2, 6), "CNN width of each stage, in units of --base", low=1, high=1024)
    res_blocks: int = arg(1, "residual blocks a stage", low=1, high=256)
    norm_groups: int = arg(8, "groups of the CNN's GroupNorm", low=1, high=8192)
    width: int = arg(96, "encoder transformer width D", low=8, high=32768)
    depth: int = arg(3, "encoder transformer blocks", low=1, high=256)
    heads: int = arg(4, "encoder attention heads", low=1, high=1024)
    dec_width: int = arg(96, "decoder transformer width", low=8, high=32768)
    dec_depth: int = arg(2, "decoder transformer blocks", low=1, high=256)
    dec_heads: int = arg(4, "decoder attention heads", low=1, high=1024)
    layer_scale: float = arg(0.1, "initial LayerScale of the transformer blocks", low=0.0)
    # merging and quantisation
    keep: int = arg(36, "target number of merged tokens K", low=1)
    keeps: tuple = arg((16, 25, 36, 49, 64), "values of K drawn in training", low=1)
    keep_sampling: str = arg("exponential", "how K is drawn (A.3): exponential, gaussian, or fixed at --keep",
                             choices=("exponential", "gaussian", "fixed"))
    bits: int = arg(8, "code bits d; the vocabulary has 2^d codes", low=1, high=24)
    bit_norm: bool = arg(True, "batch-normalise each bit before the sign, which prevents codebook collapse")
    tau: float = arg(1.0, "temperature of the entropy's soft assignment", low=1e-3)
    recovery_width: int = arg(96, "source recovery width", low=8, high=32768)
    recovery_heads: int = arg(4, "source recovery attention heads", low=1, high=1024)
    # losses; the weights of Table A1 are in PAPER below
    perceptual: str = arg("stub", "perceptual loss: stub (fixed edge filters), lpips (needs two weight files), none",
                          choices=("stub", "lpips", "none"))
    lpips_weights: str = arg("", "--perceptual lpips: path of its v0.1 vgg.pth, or download")
    vgg_weights: str = arg("", "--perceptual lpips: path of torchvision's vgg16-397923af.pth, or download")
    align: str = arg("ema", "teacher of the class token: ema (self-distillation), label, dinov2, none",
                     choices=("ema", "label", "dinov2", "none"))
    align_dim: int = arg(256, "outputs of the alignment head; label sets it to the class count, dinov2 to 768",
                         low=2, high=1000000)
    teacher_weights: str = arg("", "--align and --init dinov2: path of dinov2_vitb14_pretrain.pth, or download")
    teacher_size: int = arg(224, "--align dinov2: side of what it sees in pixels, a multiple of 14", low=14, high=8192)
    init: str = arg("random", "encoder transformer: random, or dinov2 by weight selection", choices=("random", "dinov2"))
    w_rec: float = arg(10.0, "weight of L2 reconstruction", low=0.0)
    w_perceptual: float = arg(1.0, "weight of the perceptual loss", low=0.0)
    w_disc: float = arg(0.1, "weight of the adversarial loss, times the adaptive weight", low=0.0)
    w_lecam: float = arg(0.01, "weight of LeCam regularisation of the discriminator", low=0.0)
    w_commit: float = arg(0.25, "weight of the commitment loss", low=0.0)
    w_entropy: float = arg(0.015, "weight of the LFQ entropy loss", low=0.0)
    w_recovery: float = arg(0.01, "weight of source recovery", low=0.0)
    w_align: float = arg(0.1, "weight of global alignment", low=0.0)
    disc_start: int = arg(4000, "step at which the discriminator starts; tiny: after its default run", low=0)
    disc_ramp: int = arg(1000, "steps over which the adversarial weight rises to --w-disc", low=0)
    disc_base: int = arg(16, "discriminator width", low=1, high=8192)
    disc_layers: int = arg(2, "strided layers of the PatchGAN", low=1, high=10)
    # optimisation
    batch_size: int = arg(8, "images an optimizer step, over all ranks and micro-batches", low=1, high=1000000)
    max_steps: int = arg(2500, "optimizer steps; 0: as many as --epochs makes", low=0)
    epochs: int = arg(2, "passes over the data, when --max-steps is 0", low=1)
    lr: float = arg(2e-3, "peak learning rate", low=0.0)
    lr_schedule: str = arg("cosine", "after warm-up: step (x0.1 at 80 and 95 %%), cosine (to 1 %%), constant",
                           choices=("step", "cosine", "constant"))
    warmup: int = arg(50, "linear warm-up steps", low=0)
    eval_every: int = arg(1250, "steps between evaluations with pictures", low=1)
    save_every: int = arg(500, "steps between checkpoints", low=1)
    beta1: float = arg(0.9, "AdamW beta 1", low=0.0, high=0.9999)
    beta2: float = arg(0.95, "AdamW beta 2", low=0.0, high=0.99999)
    clip: float = arg(5.0, "gradient norm is clipped to this", low=1e-9)
    ema: float = arg(0.999, "decay of the weight average that every later stage uses", low=0.0, high=1.0)
    grad_ckpt: bool = arg(False, "recompute activations in the backward pass: less memory, about a third slower")

    @property
    def factor(self):  # the downsampling ratio f
        return self.patch or 2 ** (len(self.mult) - 1)

    @property
    def grid(self):  # the side of the token grid
        return self.size // self.factor

    @property
    def length(self):  # L
        return self.grid ** 2


PAPER = dict(data="data/imagenet", size=256, base=64, res_blocks=4, norm_groups=32, width=512, depth=12, heads=8,
             dec_width=512, dec_depth=12, dec_heads=8, layer_scale=1e-5, bits=18, recovery_width=384, recovery_heads=8,
             w_rec=1.0, w_perceptual=0.7, w_disc=0.8, w_recovery=0.5, align_dim=4096,
             disc_start=20_000, disc_ramp=5_000, disc_base=64, disc_layers=3, w_entropy=0.1, batch_size=256, max_steps=0,
             epochs=270, lr=1e-4, lr_schedule="step", warmup=1000, beta1=0.5, beta2=0.9, eval_every=5000, save_every=5000)

VARIANTS = {  # encoder + decoder parameters, without recovery and heads
    "tiny": {},                                                                                        # 0.5 + 1.0M
    "g": dict(PAPER, variant="g", mult=(1, 2, 4, 8), keep=256, keeps=tuple(s * s for s in range(15, 24))),   # 62 + 83M
    "gr": dict(PAPER, variant="gr", mult=(1, 1, 2, 4, 8), keep=144, keeps=tuple(s * s for s in range(11, 17)),
               keep_sampling="gaussian", w_align=1.0),                                       # 63 + 83M
    "r": dict(PAPER, variant="r", mult=(1, 1, 2, 4, 8), patch=16, width=768, heads=12, keep=36,
              keeps=tuple(s * s for s in range(7, 13)) + (36,), w_recovery=1.0, w_align=1.0, epochs=300,
              lr_schedule="cosine"),                                                         # 86 + 83M
}


def check_config(config):
    """Combinations that cannot work, each with its remedy. Raises UserError."""
    c = config
    if c.size % c.factor or c.size % 2 ** (len(c.mult) - 1):
        raise UserError(f"--size {c.size} is not divisible by the downsampling ratio {c.factor}; pass a multiple of it")
    if c.patch and c.patch != 2 ** (len(c.mult) - 1):
        raise UserError(f"--patch {c.patch} does not fit the decoder's {len(c.mult)} stages; pass --patch "
                        f"{2 ** (len(c.mult) - 1)}")
    for k in (c.keep, *c.keeps):
        if k > c.length:
            raise UserError(f"--keep {k} is more than the L = {c.length} tokens of a {c.size} px image; pass at most {c.length}")
        merge_schedule(c.length, k, c.depth)
    for width, heads, names in ((c.width, c.heads, "--width/--heads"), (c.dec_width, c.dec_heads, "--dec-width/--dec-heads"),
                                (c.recovery_width, c.recovery_heads, "--recovery-width/--recovery-heads")):
        if width % heads:
            raise UserError(f"{names}: {width} is not divisible by {heads}; pass a number of heads that divides the width")
    if not c.patch and c.base * c.mult[-1] != c.width or c.base * c.mult[-1] != c.dec_width:
        raise UserError(f"--base {c.base} times the last --mult {c.mult[-1]} must equal --width and --dec-width ({c.width}, "
                        f"{c.dec_width}); pass --width {c.base * c.mult[-1]} --dec-width {c.base * c.mult[-1]}")
    if c.align == "dinov2" and c.teacher_size % DINOV2["patch"]:
        raise UserError(f"--teacher-size {c.teacher_size} is not a multiple of the patch, {DINOV2['patch']}; pass one that is")
    if c.init == "dinov2":
        head = DINOV2["width"] // DINOV2["heads"]
        for name, value, most in (("--width", c.width, DINOV2["width"]), ("--depth", c.depth, DINOV2["depth"]),
                                  ("--heads", c.heads, DINOV2["heads"]), ("--width / --heads", c.width // c.heads, head)):
            if value > most:
                raise UserError(f"{name} {value} is more than DINOv2's {most}: --init dinov2 selects from a larger network; "
                                f"pass at most {most}, or --init random")
    if any(c.base * m % c.norm_groups for m in c.mult):
        raise UserError(f"--norm-groups {c.norm_groups} does not divide every CNN width {[c.base * m for m in c.mult]}; pass "
                        f"{math.gcd(*(c.base * m for m in c.mult))} or a divisor of it")


# ---------------------------------------------------------------------------------------------------------------------
# Token merging (ToMe, arXiv 2210.09461). Pure functions; the map from old to new tokens is a value that is returned.

def merge_schedule(full, keep, depth):
    """How many tokens each block merges: r_i ~ (depth - i)^2, each at most half of what is left, summing to full - keep.

    Square decreasing (paper A.1). What a block cannot take is carried to the next. Raises UserError when depth halvings
    cannot reach keep.
    """
    squares = [(depth - i) ** 2 for i in range(depth)]
    schedule, merged = [], 0
    for i in range(depth):
        aim = round((full - keep) * sum(squares[:i + 1]) / sum(squares))
        schedule.append(min(aim - merged, (full - merged) // 2))
        merged += schedule[-1]
    if keep > full or keep < 1 or merged != full - keep:
        raise UserError(f"{depth} blocks cannot merge {full} tokens to {keep}: pass --keep from "
                        f"{math.ceil(full / 2 ** depth)} to {full}")
    return schedule


@torch.no_grad()
def match_tokens(metric, r, protected=1):
    """Bipartite soft matching (2210.09461 section 3): merge the r most similar pairs of an even and an odd token.

    metric (B,N,C): attention keys, averaged over heads. The first `protected` tokens neither merge nor are merged into.
    Returns new_index (B,N) int64: where each token goes among the N - r that remain; order is kept.
    """
    B, N, _ = metric.shape
    most = (N + 1) // 2 - (protected + 1) // 2
    assert 0 <= r <= most, f"r = {r} pairs of {N} tokens, {protected} protected: at most {most} can merge"
    metric = F.normalize(metric.float(), dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)              # (B,Na,Nb): A even, B odd
    similarity[:, :(protected + 1) // 2] = -math.inf
    similarity[:, :, :protected // 2] = -math.inf
    score, partner = similarity.max(dim=-1)                                    # (B,Na): best b for each a
    merged = score.argsort(dim=1, descending=True, stable=True)[:, :r]         # (B,r): which a merge
    remains = torch.ones(B, N, dtype=torch.bool, device=metric.device).scatter_(1, 2 * merged, False)
    new_index = remains.cumsum(1) - 1
    into = new_index.gather(1, 2 * partner + 1)                                # every b remains
    new_index[:, ::2] = torch.where(remains[:, ::2], new_index[:, ::2], into)
    return new_index


def merge_tokens(x, size, new_index):
    """Size-weighted means of the tokens that share a new index. x (B,N,C), size (B,N) float -> (B,M,C), (B,M)."""
    B, N, C = x.shape
    M = int(new_index[0].max()) + 1
    slot = (new_index + M * torch.arange(B, device=x.device)[:, None]).flatten()           # (B*N)
    total = torch.zeros(B * M, C, device=x.device).index_add(0, slot, (x * size[..., None]).flatten(0, 1).float())
    new_size = torch.zeros(B * M, device=x.device).index_add(0, slot, size.flatten())
    return (total / new_size[:, None]).to(x.dtype).view(B, M, C), new_size.view(B, M)


def first_positions(source):
    """(B,L) source -> (B,K) first raster position of each token, in the tokens' own numbering."""
    B, L = source.shape
    position = torch.arange(L, device=source.device).expand(B, L)
    first = torch.full((B, int(source.max()) + 1), L, device=source.device)
    return first.scatter_reduce(1, source, position, "amin")


def canonical_source(source):
    """Relabel (B,L) source so that tokens are numbered by the raster order of their first position."""
    rank = first_positions(source).argsort(dim=1).argsort(dim=1)                           # (B,K): old label -> new
    return rank.gather(1, source)


def unmerge(x, source):
    """Give every position its token (paper Eq. 11): x (B,K,C), source (B,L) -> (B,L,C)."""
    return x.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------------
# Lookup-free quantisation (LFQ, MAGVIT-v2 2310.05737). Its codebook is {-1,+1}^d and is never built.

def codes_to_bits(codes, d):
    """int64 codes (...) -> (...,d) in {-1,+1}; bit j is worth 2^j."""
    return (codes[..., None] >> torch.arange(d, device=codes.device) & 1).float() * 2 - 1


def bits_to_codes(bits):
    """(...,d) numbers -> int64 codes (...): sum of 2^j where bit j is positive."""
    return ((bits > 0).long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def quantise(z):
    """sign(z) with the straight-through gradient: forward q in {-1,+1}, backward the identity."""
    q = torch.where(z > 0, 1.0, -1.0)
    return z + (q - z).detach()


def lfq_entropy(z, tau=1.0):
    """Exact entropies of the soft assignment p(c|z) = softmax over all 2^d codes of 2 z.c / tau, in nats.

    z (...,d) -> (per_sample, codebook), both 0-d: mean_n H(p(.|z_n)) and H(mean_n p(.|z_n)); the mean is over all ranks.
    Given z the bits are independent with p(bit_j = 1) = sigmoid(4 z_j / tau). So the first is a sum of d binary
    entropies, and the mean distribution is one matmul of two (N, 2^(d/2)) tables: exact, without the (N, 2^d) matrix.
    """
    d = z.shape[-1]
    logit = 4 * z.reshape(-1, d).to(torch.promote_types(z.dtype, torch.float32)) / tau     # (N,d)
    p1, p0 = logit.sigmoid(), (-logit).sigmoid()
    per_sample = -(p1 * F.logsigmoid(logit) + p0 * F.logsigmoid(-logit)).sum(-1).mean()

    def table(bits):  # (N, 2^len(bits)): probability of every combination of these bits
        p = torch.ones_like(logit[:, :1])
        for j in bits:
            p = torch.cat([p * p0[:, j:j + 1], p * p1[:, j:j + 1]], dim=1)
        return p

    low, high = table(range(d // 2)), table(range(d // 2, d))
    mean = mean_over_ranks(high.T @ low / len(logit))                                      # (2^(d-d/2), 2^(d/2))
    codebook = -(mean * mean.clamp_min(1e-30).log()).sum()
    return mean_over_ranks(per_sample), codebook


class BitNorm(nn.Module):
    """Batch normalisation of each bit, without affine: zero mean keeps every bit balanced, so codes cannot collapse.

    Statistics are those of the global batch (all ranks) in training, running ones in evaluation. Design decision, not
    in the paper; --no-bit-norm turns it off.
    """
    def __init__(self, d, momentum=0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("var", torch.ones(d))

    def forward(self, z):  # (B,K,d)
        if not self.training:
            return (z - self.mean) * (self.var + 1e-5).rsqrt()
        mean, square = mean_over_ranks(torch.stack([z.mean((0, 1)), z.square().mean((0, 1))]))
        var = (square - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.var.lerp_(var, self.momentum)
        return (z - mean) * (var + 1e-5).rsqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Networks, in the order an image meets them.

class ResBlock(nn.Module):
    """GroupNorm - SiLU - conv 3x3, twice, plus the input (through a 1x1 conv where the width changes)."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def run_block(block, grad_ckpt, *inputs):
    """Call a block, recomputing it in the backward pass when --grad-ckpt is on."""
    if grad_ckpt and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class CNN(nn.Module):
    """(B,3,H,W) -> (B,D,H/f,W/f): stages of residual blocks, a strided conv between them (MAGVIT-v2's encoder)."""
    def __init__(self, config):
        super().__init__()
        self.grad_ckpt = config.grad_ckpt
        widths = [config.base * m for m in config.mult]
        blocks, c = [nn.Conv2d(3, widths[0], 3, padding=1)], widths[0]
        for i, w in enumerate(widths):
            if i > 0:
                blocks.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
            for _ in range(config.res_blocks):
                blocks.append(ResBlock(c, w, config.norm_groups))
                c = w
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = run_block(block, self.grad_ckpt, x)
        return x


class Attention(nn.Module):
    """Multi-head self-attention. With log_size it is proportional: softmax(QK^T / sqrt(d_h) + log s) (2210.09461)."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, log_size=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (B,h,N,D/h) each
        bias = None if log_size is None else log_size[:, None, None].to(q.dtype)                   # (B,1,1,N)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(B, N, D)), k.mean(1)                          # keys: (B,N,D/h)


class MixFFN(nn.Module):
    """MLP with an optional 3x3 depthwise conv between its layers (MixFFN, 2105.15203), which the decoder has."""
    def __init__(self, width, mix):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mix = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width) if mix else None

    def forward(self, x):
        x = self.up(x)
        if self.mix is not None:
            B, N, C = x.shape
            side = math.isqrt(N)
            image = x.transpose(1, 2).view(B, C, side, side)
            x = x + self.mix(image).flatten(2).transpose(1, 2)
        return self.down(F.gelu(x))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale. Merges r pairs of tokens between attention and MLP (paper Eq. 7)."""
    def __init__(self, width, heads, mix=False):
        super().__init__()
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(width), Attention(width, heads), nn.Parameter(torch.empty(width))
        self.norm2, self.mlp, self.scale2 = nn.LayerNorm(width), MixFFN(width, mix), nn.Parameter(torch.empty(width))

    def forward(self, x, size=None, r=0):
        """x (B,N,D), size (B,N) or None while nothing has merged -> x (B,N-r,D), size, new_index (B,N) or None."""
        h, keys = self.attn(self.norm1(x), None if size is None else size.log())
        x, new_index = x + self.scale1 * h, None
        if r > 0:
            new_index = match_tokens(keys, r)
            size = torch.ones(x.shape[:2], device=x.device) if size is None else size
            x, size = merge_tokens(x, size, new_index)
        return x + self.scale2 * self.mlp(self.norm2(x)), size, new_index


class Encoder(nn.Module):
    """Image -> K merged tokens of d real numbers (before BitNorm), source, class token.

    The hybrid encoders have no position table: the CNN's padding tells position (design.md section 3).
    """
    def __init__(self, config):
        super().__init__()
        self.grad_ckpt, D = config.grad_ckpt, config.width
        self.stem = nn.Conv2d(3, D, config.patch, stride=config.patch) if config.patch else CNN(config)
        self.position = nn.Parameter(torch.empty(1, D, config.grid, config.grid)) if config.patch else None
        self.cls = nn.Parameter(torch.empty(1, 1, D))
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        self.to_bits = nn.Linear(D, config.bits)

    def forward(self, images, keep):
        """images (B,3,H,W) -> bits before normalisation (B,K,d), source (B,L), cls (B,D), tokens (B,K,D)."""
        x = self.stem(images)                                                              # (B,D,H/f,W/f)
        if self.position is not None:
            x = x + F.interpolate(self.position, x.shape[2:], mode="bicubic", antialias=True)
        x = x.flatten(2).transpose(1, 2)                                                   # (B,L,D)
        B, L, _ = x.shape
        x = torch.cat([self.cls.expand(B, -1, -1).to(x.dtype), x], dim=1)                  # (B,1+L,D)
        size, source = None, torch.arange(1, L + 1, device=x.device).expand(B, L)
        for block, r in zip(self.blocks, merge_schedule(L, keep, len(self.blocks))):
            x, size, new_index = run_block(block, self.grad_ckpt, x, size, r)              # (B,1+N-r,D)
            if new_index is not None:
                source = new_index.gather(1, source)
        source, tokens = source - 1, self.norm(x)                                          # the class token was 0
        ordered = canonical_source(source)
        old_label = torch.zeros(B, keep, dtype=torch.long, device=x.device).scatter_(1, ordered, source)
        cls, tokens = tokens[:, 0], unmerge(tokens[:, 1:], old_label)                      # (B,D), (B,K,D)
        return self.to_bits(tokens), ordered, cls, tokens


class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and shift come from the std and mean of the code map over the image (Open-MAGVIT2)."""
    def __init__(self, d, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, affine=False)
        self.scale, self.shift = nn.Linear(d, c), nn.Linear(d, c)

    def forward(self, x, code_map):
        scale = self.scale(code_map.var((2, 3)).add(1e-6).sqrt())[..., None, None]
        return self.norm(x) * scale + self.shift(code_map.mean((2, 3)))[..., None, None]


class Upsample(nn.Module):
    """Twice the resolution: a convolution to four times the channels, then depth to space."""
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, 4 * c, 3, padding=1)

    def forward(self, x):  # (B,C,h,w) -> (B,C,2h,2w)
        return F.pixel_shuffle(self.conv(x), 2)


class Decoder(nn.Module):
    """(B,L,d) bits at every position -> (B,3,H,W). Mirror of the encoder: transformer with MixFFN, then CNN."""
    def __init__(self, config):
        super().__init__()
        self.grad_ckpt, groups = config.grad_ckpt, config.norm_groups
        widths = [config.base * m for m in config.mult]
        c = config.dec_width
        self.conv_in = nn.Conv2d(config.bits, c, 3, padding=1)
        self.position = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.blocks = nn.ModuleList(Block(c, config.dec_heads, mix=True) for _ in range(config.dec_depth))
        self.norm = nn.LayerNorm(c)
        self.adaptive, self.stages = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            self.adaptive.append(AdaptiveNorm(config.bits, c, groups))
            stage = []
            for _ in range(config.res_blocks + (i > 0)):
                stage.append(ResBlock(c, widths[i], groups))
                c = widths[i]
            if i > 0:
                stage.append(Upsample(c))
            self.stages.append(nn.ModuleList(stage))
        self.norm_out, self.conv_out = nn.GroupNorm(groups, c), nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, bits):
        B, L, d = bits.shape
        side = math.isqrt(L)
        code_map = bits.transpose(1, 2).reshape(B, d, side, side)                          # (B,d,h,w)
        x = self.conv_in(code_map)
        x = (x + self.position(x)).flatten(2).transpose(1, 2)                              # (B,L,D)
        for block in self.blocks:
            x, _, _ = run_block(block, self.grad_ckpt, x)
        x = self.norm(x).transpose(1, 2).reshape(B, -1, side, side)                        # (B,D,h,w)
        for adaptive, stage in zip(self.adaptive, self.stages):
            x = adaptive(x, code_map)
            for block in stage:
                x = run_block(block, self.grad_ckpt, x)
        return self.conv_out(F.silu(self.norm_out(x)))                                     # (B,3,H,W)


class SourceRecovery(nn.Module):
    """Predicts source from the K quantised tokens alone (paper Eq. 8, Table A2).

    L learnable queries go through a standard 2-layer transformer decoder over the K tokens, then each query is
    classified among the tokens by a dot product. Tokens carry an embedding of their rank: equal codes stay distinct. It is
    stretched so that the first and the last rank meet the first and the last query: rank k of K is near position k L / K.
    """
    def __init__(self, config):
        super().__init__()
        D = config.recovery_width
        self.queries = nn.Parameter(torch.empty(1, config.length, D))
        self.rank = nn.Parameter(torch.empty(1, config.length, D))
        self.embed = nn.Linear(config.bits, D)
        layer = nn.TransformerDecoderLayer(D, config.recovery_heads, 4 * D, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(D))
        self.keys = nn.Linear(D, D)

    def forward(self, bits):
        """bits (B,K,d) in {-1,+1} -> logits (B,L,K)."""
        B, K, _ = bits.shape
        rank = F.interpolate(self.rank.transpose(1, 2), K, mode="linear", align_corners=True).transpose(1, 2)   # (1,K,D)
        tokens = self.embed(bits) + rank                                                   # (B,K,D)
        queries = self.layers(self.queries.expand(B, -1, -1), tokens)                      # (B,L,D)
        return queries @ self.keys(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5       # (B,L,K)


@torch.no_grad()
def most_likely_source(logits):
    """Finite logits (B,L,K) of source -> the source (B,L) of largest sum of logits among those that can be.

    Tokens are numbered by first position. So a position either opens the next token or belongs to one that is open, and the
    last position has seen all K. best[k] is the largest sum so far with tokens 0 ... k open (Viterbi's recursion).
    """
    B, L, K = logits.shape
    logits = logits.float()
    open_score, open_token = logits.cummax(-1)                                 # (B,L,K): the best of tokens 0 ... k
    best = torch.full((B, K), -torch.inf, device=logits.device)
    best[:, 0] = logits[:, 0, 0]
    opens = torch.zeros(B, L, K, dtype=torch.bool, device=logits.device)
    for l in range(1, L):
        opened, stayed = F.pad(best[:, :-1], (1, 0), value=-torch.inf) + logits[:, l], best + open_score[:, l]
        opens[:, l] = opened > stayed
        best = torch.maximum(opened, stayed)
    source = torch.zeros(B, L, dtype=torch.long, device=logits.device)
    k = torch.full((B, 1), K - 1, device=logits.device)                        # back from the end, where all are open
    for l in range(L - 1, 0, -1):
        opened = opens[:, l].gather(1, k)
        source[:, l:l + 1] = torch.where(opened, k, open_token[:, l].gather(1, k))
        k = k - opened.long()
    return source


class Encoded(NamedTuple):
    codes: torch.Tensor   # (B,K) int64 in [0,2^d)
    source: torch.Tensor  # (B,L) int64 in [0,K): the token of each position, numbered by first position
    z: torch.Tensor       # (B,K,d) what the sign is taken of
    cls: torch.Tensor     # (B,D) class token


class Forward(NamedTuple):
    images: torch.Tensor    # (B,3,H,W) reconstruction
    encoded: Encoded
    recovery: torch.Tensor  # (B,L,K) logits of source
    align: torch.Tensor     # (B,align_dim) logits of the class token; None without alignment


class MergeVQ(nn.Module):
    """The tokenizer (paper section 3). encode and decode are pure: codes and source are all that goes between them."""
    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config = config
        self.encoder = Encoder(config)
        self.bit_norm = BitNorm(config.bits) if config.bit_norm else nn.Identity()
        self.decoder = Decoder(config)
        self.recovery = SourceRecovery(config)
        D = config.width
        self.align_head = None if config.align == "none" else nn.Sequential(
            nn.Linear(D, D), nn.GELU(), nn.Linear(D, config.align_dim))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Xavier for linear layers, fan-in for convolutions; convolutional residual branches start at zero, and the four
        pixels that a depth-to-space makes of one start equal (ICNR, 1707.02937), which avoids a checkerboard."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Block):
                nn.init.constant_(m.scale1, self.config.layer_scale)
                nn.init.constant_(m.scale2, self.config.layer_scale)
            elif isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.weight)
            elif isinstance(m, Upsample):
                m.conv.weight.copy_(m.conv.weight[::4].repeat_interleave(4, dim=0))
            elif isinstance(m, AdaptiveNorm):  # starts as a plain GroupNorm
                nn.init.zeros_(m.scale.weight)
                nn.init.ones_(m.scale.bias)
                nn.init.zeros_(m.shift.weight)
            elif isinstance(m, SourceRecovery):
                L, D = m.queries.shape[1:]
                angle = torch.outer(torch.arange(L), L ** -torch.linspace(0, 1, (D + 1) // 2))
                m.queries.copy_(torch.cat([angle.sin(), angle.cos()], -1)[:, :D] / 2)
                m.rank.copy_(m.queries)
            elif isinstance(m, Encoder):
                nn.init.trunc_normal_(m.cls, std=0.02)
                if m.position is not None:
                    nn.init.trunc_normal_(m.position, std=0.02)

    def encode(self, images, keep=None):
        """images (B,3,H,W) in [-1,1], keep K (default: the config's target) -> Encoded."""
        keep = self.config.keep if keep is None else keep
        z, source, cls, _ = self.encoder(images, keep)
        with torch.autocast(images.device.type, enabled=False):
            z = self.bit_norm(z.float())
        return Encoded(bits_to_codes(z), source, z, cls.float())

    def decode(self, codes, source):
        """codes (B,K) int64, source (B,L) int64 -> images (B,3,H,W); nothing else is needed."""
        return self.decoder(unmerge(codes_to_bits(codes, self.config.bits), source)).float()

    def recover(self, codes):
        """codes (B,K) -> source (B,L) predicted by source recovery."""
        return most_likely_source(self.recovery(codes_to_bits(codes, self.config.bits)))

    def forward(self, images, keep):
        """The training pass: gradients cross the quantiser straight through. Returns Forward."""
        e = self.encode(images, keep)
        q = quantise(e.z)                                                                  # (B,K,d)
        images = self.decoder(unmerge(q, e.source)).float()
        align = None if self.align_head is None else self.align_head(e.cls).float()
        return Forward(images, e, self.recovery(q).float(), align)


def zero_rounding(model):
    """Set gradients to 0 that are 0 but for rounding: what is added to all keys alike cancels in the softmax, what is added
    to a bit of all tokens in BitNorm. AdamW scales any gradient to steps of full size, noise too, and keys decide what merges."""
    for m in model.modules():
        if isinstance(m, Attention):
            m.qkv.bias.grad.view(3, -1)[1] = 0                                             # of query, key and value
        elif isinstance(m, nn.MultiheadAttention):
            m.in_proj_bias.grad.view(3, -1)[1] = 0
        elif isinstance(m, SourceRecovery):
            m.keys.bias.grad.zero_()
        elif isinstance(m, MergeVQ) and m.config.bit_norm:
            m.encoder.to_bits.bias.grad.zero_()


class Discriminator(nn.Module):
    """PatchGAN (1611.07004): strided 4x4 convolutions, one logit a patch. GroupNorm, so that no statistic is shared."""
    def __init__(self, config):
        super().__init__()
        c = config.disc_base
        layers = [nn.Conv2d(3, c, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.disc_layers + 1):
            w = config.disc_base * min(2 ** i, 8)
            stride = 2 if i < config.disc_layers else 1
            layers += [nn.Conv2d(c, w, 4, stride, 1), nn.GroupNorm(config.norm_groups, w), nn.LeakyReLU(0.2)]
            c = w
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for m in self.layers:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, images):  # (B,3,H,W) -> (B,1,h,w)
        return self.layers(images).float()


def tokenizer_from_state(state, device="cpu"):
    """{"config": dict, "ema": state_dict} -> MergeVQ in eval mode, frozen."""
    config = TokenizerConfig(**state["config"])
    check_ranges(config)
    model = MergeVQ(config)
    model.load_state_dict(state["ema"])
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path, device="cpu"):
    """Checkpoint of this script -> MergeVQ in eval mode with EMA weights. Raises UserError on a bad file."""
    state = load_checkpoint(path, "tokenizer")
    with reading(path):
        return tokenizer_from_state(state, device)


# ---------------------------------------------------------------------------------------------------------------------
# Full versions: networks that others trained, from their own public weight files. Frozen, in eval mode, outside DDP, the
# optimizers, EMA and checkpoints. Nothing is fetched unless a flag says `download`.

OFFICIAL = {  # what it is, the flag that takes its path, where it is published, first digits of its sha256. Two of the files
    # carry these digits in their names; those of DINOv2 and LPIPS are what others recorded who pinned them.
    "dinov2": ("DINOv2 ViT-B/14", "--teacher-weights",
               "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f85de91b42"),
    "vgg16": ("torchvision's VGG16", "--vgg-weights", "https://download.pytorch.org/models/vgg16-397923af.pth", "397923af"),
    "lpips": ("LPIPS v0.1 for VGG16", "--lpips-weights",
              "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
              "a78928a0af1e5f0f"),
    "inception": ("pytorch-fid's InceptionV3", "--inception-weights",
                  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
                  "6726825d"),
}


def load_weights(kind, path, shapes, unused=()):
    """A public weight file -> {name: tensor}, exactly the names of `shapes` (name -> shape) in exactly these shapes.

    kind is a key of OFFICIAL; path a file, or `download` for the official one, which is kept where torch.hub keeps its files.
    Names that start or end with one of `unused` may be there besides. A file of the right format that is not the official one
    is used, and that is said. Raises UserError on a missing, truncated or wrong file and on a download that failed.
    """
    what, flag, url, digits = OFFICIAL[kind]
    remedy = f"pass {flag} with the path of {os.path.basename(url)}, or {flag} download to fetch {url}"
    if not path:
        raise UserError(f"{what} is needed: {remedy}")
    download, local_rank = path == "download", int(os.environ.get("LOCAL_RANK", 0))
    if download:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        if dist.is_initialized() and local_rank > 0:
            dist.barrier()                                    # the node's first process fetches for all
        try:
            if not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(url, path, hash_prefix=digits)
        except (OSError, RuntimeError) as e:                  # no connection, no space, another sha256
            raise UserError(f"{flag} download: {url} could not be fetched to {path} ({e}); pass the path of a copy")
        if dist.is_initialized() and local_rank == 0:
            dist.barrier()
    try:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()[:len(digits)]
    except OSError as e:
        raise UserError(f"{flag} {path} cannot be read ({e.strerror}): {remedy}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises many types on a damaged file; each means the same to the user
        raise UserError(f"{flag} {path} is not a readable weight file ({type(e).__name__}), it may be truncated: {remedy}")
    state = state if isinstance(state, dict) else {}
    wrong = [f"{name} is missing" for name in shapes if not isinstance(state.get(name), torch.Tensor)]
    wrong += [f"{name} is unknown" for name in map(str, state)
              if name not in shapes and not name.startswith(unused) and not name.endswith(unused)]
    wrong += [f"{name} has shape {tuple(state[name].shape)}, not {tuple(shape)}" for name, shape in shapes.items()
              if not wrong and state[name].shape != shape]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{flag} {path} does not hold {what} ({wrong[0]}{more}): {remedy}")
    if found != digits:
        message = f"{flag} {path} has sha256 {found}..., the official file {digits}..."
        if download:
            raise UserError(f"{message}: delete it and it will be fetched anew")
        if local_rank == 0:
            print(f"note: {message}; results may not compare with others'")
    return {name: state[name] for name in shapes}


VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))      # widths; max pooling between the tuples


class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (1801.03924) on VGG16: images a, b (B,3,H,W) in [-1,1], 16 px or more -> (B,).

    The unit-normalised features of both images after the last ReLU of each stage are compared: squared difference, weighted
    by channel, averaged over positions, summed over stages. Float32 also under autocast; gradients reach the images only.
    """
    def __init__(self):
        super().__init__()
        layers, c = [], 3
        for i, widths in enumerate(VGG16):
            layers += [nn.MaxPool2d(2)] if i > 0 else []
            for w in widths:
                layers += [nn.Conv2d(c, w, 3, padding=1), nn.ReLU()]
                c = w
        self.features = nn.Sequential(*layers)                                 # torchvision's names
        self.heads = nn.ParameterList(torch.empty(1, widths[-1], 1, 1) for widths in VGG16)
        # upstream's constants: the ImageNet mean and std in [-1,1], rounded
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            a, b = ((x.float() - self.shift) / self.scale for x in (a, b))
            distance, heads = 0.0, iter(self.heads)
            for layer, following in zip(self.features, [*self.features[1:], None]):
                a, b = layer(a), layer(b)
                if following is None or isinstance(following, nn.MaxPool2d):   # the end of a stage
                    unit_a, unit_b = (x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10) for x in (a, b))
                    distance = distance + ((unit_a - unit_b).square() * next(heads)).sum(1).mean((1, 2))
            return distance


def load_lpips(lpips_path, vgg_path, device="cpu"):
    """The heads' file (lpips' v0.1/vgg.pth) and torchvision's VGG16 file, or `download` -> LPIPS, frozen. Raises UserError."""
    net = LPIPS()
    vgg = load_weights("vgg16", vgg_path, {k: v.shape for k, v in net.state_dict().items() if k.startswith("features.")},
                       unused=("classifier.",))
    heads = load_weights("lpips", lpips_path, {f"lin{i}.model.1.weight": w.shape for i, w in enumerate(net.heads)})
    net.load_state_dict({**vgg, **{f"heads.{i}": w for i, w in enumerate(heads.values())}})
    return net.to(device).eval().requires_grad_(False)


DINOV2 = dict(width=768, depth=12, heads=12, patch=14, grid=37)   # ViT-B/14; its position table was trained at 37 x 14 = 518 px


class DINOv2(nn.Module):
    """Class token of DINOv2 (2304.07193): images (B,3,H,W) in [-1,1] of any size -> (B,width), after the last LayerNorm.

    `side` resizes to that many pixels a side (bicubic, antialiased), a multiple of the patch; 0: to the nearest multiples.
    """
    def __init__(self, width, depth, heads, patch, grid):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.stem = nn.Conv2d(3, width, patch, stride=patch)
        self.cls, self.position = nn.Parameter(torch.empty(1, 1, width)), nn.Parameter(torch.empty(1, 1 + grid * grid, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for m in self.modules():
            if isinstance(m, nn.LayerNorm):
                m.eps = 1e-6
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)  # ImageNet's, in [0,1]
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, images, side=0):
        x, p = (images.float() + 1) / 2, self.patch
        size = (side, side) if side else tuple(max(1, round(n / p)) * p for n in x.shape[2:])
        if size != x.shape[2:]:
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        x = self.stem((x - self.mean) / self.std)                                          # (B,D,h,w)
        position, (h, w) = self.position[:, 1:], x.shape[2:]
        if (h, w) != (self.grid, self.grid):  # the published models stretch the table by (h + 0.1) / grid, not h / grid
            table = position.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            table = F.interpolate(table, scale_factor=((h + 0.1) / self.grid, (w + 0.1) / self.grid), mode="bicubic")
            position = table.flatten(2).transpose(1, 2)                                    # (1,h*w,D)
        x = x.flatten(2).transpose(1, 2) + position
        x = torch.cat([(self.cls + self.position[:, :1]).expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x, _, _ = block(x)
        return self.norm(x[:, 0])


def load_dinov2(path, device="cpu"):
    """The published file, or `download` -> DINOv2, frozen. Raises UserError."""
    net, theirs = DINOv2(**DINOV2), {}
    for name, tensor in net.state_dict().items():
        file_name = name
        for a, b in (("stem", "patch_embed.proj"), ("cls", "cls_token"), ("position", "pos_embed"), ("scale1", "ls1.gamma"),
                     ("scale2", "ls2.gamma"), ("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2")):
            file_name = file_name.replace(a, b)
        theirs[name] = file_name
    state = load_weights("dinov2", path, {theirs[name]: w.shape for name, w in net.state_dict().items()}, unused=("mask_token",))
    net.load_state_dict({name: state[file_name] for name, file_name in theirs.items()})
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def select_weights(encoder, larger):
    """Weight selection (2311.18823): the encoder's transformer takes uniformly spaced elements of a larger one's.

    Along every dimension of m elements, element i is element floor(i n / m) of the larger one's n; likewise blocks along the
    depth. Rows of qkv and columns of proj are (head, element of the head), so q stays q and a head's elements stay together.
    """
    def select(target, source):
        for dim, (m, n) in enumerate(zip(target.shape, source.shape)):
            source = source.index_select(dim, torch.arange(m, device=source.device) * n // m)
        target.copy_(source)

    select(encoder.cls, larger.cls)
    for i, block in enumerate(encoder.blocks):
        other = larger.blocks[i * len(larger.blocks) // len(encoder.blocks)]
        for (name, target), source in zip(block.named_parameters(), other.parameters()):
            heads = block.attn.heads, other.attn.heads
            if name.startswith("attn.qkv"):                                                # (3 h D/h, ...) -> (3,h,D/h,...)
                target, source = (w.unflatten(0, (3, h, -1)) for w, h in zip((target, source), heads))
            elif name == "attn.proj.weight":                                               # (D, h D/h) -> (D,h,D/h)
                target, source = (w.unflatten(1, (h, -1)) for w, h in zip((target, source), heads))
            select(target, source)
    for target, source in zip(encoder.norm.parameters(), larger.norm.parameters()):
        select(target, source)


# ---------------------------------------------------------------------------------------------------------------------
# Losses: plain functions, float32, names as in the paper. main() logs each unweighted and weighted.

def perceptual_stub(a, b):
    """L1 distance of oriented derivatives and a Laplacian at three scales. (B,3,H,W) twice -> 0-d.

    A stand-in for LPIPS that needs no weights. L2 forgives a blurred edge, since few pixels are wrong and each by
    little; its derivatives are wrong by much. So this term asks for edges of the right place, direction and strength.
    """
    filters = torch.tensor([[[0, 0, 0], [-1, 0, 1], [0, 0, 0]], [[0, -1, 0], [0, 0, 0], [0, 1, 0]],
                            [[-1, 0, 0], [0, 0, 0], [0, 0, 1]], [[0, 0, -1], [0, 0, 0], [1, 0, 0]],
                            [[0, 1, 0], [1, -4, 1], [0, 1, 0]]], device=a.device, dtype=torch.float32) / 2
    weight, difference, loss = filters[:, None].repeat(3, 1, 1, 1), (a - b).float(), 0.0
    for _ in range(3 if min(a.shape[2:]) >= 12 else 1):  # the third scale has a quarter of the pixels, a filter needs 3
        loss = loss + F.conv2d(difference, weight, groups=3).abs().mean() / 3
        difference = F.avg_pool2d(difference, 2)
    return loss


def generator_loss(fake_logits):
    """Hinge adversarial loss of the tokenizer: raise the discriminator's logits."""
    return -fake_logits.mean()


def discriminator_loss(real_logits, fake_logits):
    """Hinge loss of the discriminator (1705.02894)."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def lecam_loss(real_logits, fake_logits, average):
    """LeCam regularisation (2104.03310): stay near the running means of the opposite logits. average: (real, fake)."""
    return F.relu(real_logits - average[1]).square().mean() + F.relu(average[0] - fake_logits).square().mean()


def last_layer_gradients(rec_loss, gan_loss, last_layer):
    """Gradient of each loss at the decoder's last layer: (2, *last_layer.shape)."""
    return torch.stack([torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (rec_loss, gan_loss)])


def adaptive_weight(gradients):
    """VQGAN's balance (2012.09841 eq. 7): |grad of rec| / |grad of gan| at the last layer, over all ranks, at most 1e4."""
    rec, gan = mean_over_ranks(gradients)
    return (rec.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4)


def align_loss(student, teacher, center):
    """Eq. 10 against the EMA teacher: cross-entropy of its sharpened and centred distribution (DINO 2104.14294 temperatures)."""
    target = ((teacher - center) / 0.04).softmax(-1)
    return -(target * (student / 0.1).log_softmax(-1)).sum(-1).mean()


def distill_loss(student, teacher, T=4.0):
    """Eq. 10 against DINOv2, as the release has it: T^2 KL(softmax(teacher / T) || softmax(student / T)), (B,C) twice -> 0-d.

    Eq. 10 is the cross-entropy of the two: the KL plus the teacher's entropy, which has no gradient.
    """
    log_p, log_q = (teacher / T).log_softmax(-1), (student / T).log_softmax(-1)
    return T ** 2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def keep_distribution(config):
    """The values of K drawn in training and their probabilities (paper A.3, Eq. 15-16): (list, (n,) tensor)."""
    candidates = sorted(set(config.keeps) | {config.keep})
    i = torch.arange(len(candidates)) - candidates.index(config.keep)      # 0 at the target
    if config.keep_sampling == "fixed":
        p = (i == 0).double()
    elif config.keep_sampling == "gaussian":
        p = torch.exp(-i.double().square() / (2 * 0.5 ** 2)) + 0.05
    else:
        p = 2 * torch.exp(-2.0 * i.abs().double()) + 0.1
    return candidates, p / p.sum()


def sample_keep(config, seed, step):
    """K of a training step: a function of (seed, step), so all ranks agree and a resumed run draws the same."""
    candidates, p = keep_distribution(config)
    return candidates[int(torch.multinomial(p, 1, generator=seeded(seed, step, 1)))]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def psnr(a, b):
    """Peak signal-to-noise ratio of each image, dB: (B,C,H,W) in [-1,1] twice -> (B,). Values are clamped first."""
    mse = ((a.clamp(-1, 1) - b.clamp(-1, 1)).double() / 2).square().flatten(1).mean(1)
    return -10 * mse.log10()


def code_statistics(counts):
    """Histogram of codes (2^d) -> (usage: share of codes met at least once, perplexity: exp of its entropy)."""
    p = counts.double() / counts.sum()
    return (counts > 0).double().mean().item(), torch.special.entr(p).sum().exp().item()


def bit_statistics(codes, d):
    """codes (B,K) -> (largest distance of a bit's mean from even, number of bits that never change)."""
    on = (codes_to_bits(codes, d) > 0).double().mean((0, 1))
    return (on - 0.5).abs().max().item(), int(((on == 0) | (on == 1)).sum())


def subset(total, num, seed=0):
    """`num` places of 0 ... total - 1 drawn by the seed, in order; all of them when num is 0 or more than there are. The first
    ones would be of a few classes only, as class folders are read one after the other."""
    if num == 0 or num >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, num, replace=False).tolist())


def val_loader(dataset, config, run, num):
    """This rank's share of `num` validation images, the same at every call: yields (images, labels)."""
    share = torch.utils.data.Subset(dataset, subset(len(dataset), num)[run.rank::run.world])
    return torch.utils.data.DataLoader(share, batch_size=min(64, max(16, config.batch_size)), num_workers=max(0, config.workers),
                                       worker_init_fn=ignore_signals)


@torch.no_grad()
def evaluate(model, dataset, config, run):
    """PSNR at the target K and at K = L, code usage and perplexity at the target, recovery accuracy; over all ranks."""
    counts = torch.zeros(2 ** config.bits, device=run.device)
    sums = torch.zeros(4, device=run.device, dtype=torch.float64 if run.device.type != "mps" else torch.float32)
    for images, _ in val_loader(dataset, config, run, config.eval_num):
        images = images.to(run.device)
        with run.autocast():
            encoded, full = model.encode(images), model.encode(images, config.length)
            recovered = (model.recover(encoded.codes) == encoded.source).float().mean(1)
            at_target, at_full = model.decode(encoded.codes, encoded.source), model.decode(full.codes, full.source)
        counts += torch.bincount(encoded.codes.flatten(), minlength=len(counts))
        sums += torch.stack([v.sum().to(sums.dtype) for v in
                             (psnr(at_target, images), psnr(at_full, images), recovered, torch.ones(len(images), device=images.device))]).to(sums)
    if run.world > 1:
        dist.all_reduce(counts)
        dist.all_reduce(sums)
    usage, perplexity = code_statistics(counts)
    p, p_full, accuracy = (sums[:3] / sums[3]).tolist()
    return dict(val_psnr=p, val_psnr_full=p_full, val_usage=usage, val_perplexity=perplexity, val_recovery=accuracy)


@torch.no_grad()
def draw_reconstructions(model, dataset, config, run, path, num=8):
    """PNG: originals, then reconstructions at several K, one row each."""
    chosen = torch.randperm(len(dataset), generator=seeded(0))[:num].tolist()  # the first of a folder are all of one class
    images = torch.stack([dataset[i][0] for i in chosen])
    rows, titles = [images], ["original"]
    for keep in sorted({min(config.keeps), config.keep, max(config.keeps), config.length}):
        e = model.encode(images.to(run.device), keep)
        rows.append(model.decode(e.codes, e.source).cpu())
        titles.append(f"K = {keep}")
    image_grid(torch.cat(rows), path, columns=len(images), row_titles=titles)


# ---------------------------------------------------------------------------------------------------------------------
# Training

CURVES = ("rec", "perceptual", "gan", "commit", "entropy", "recovery", "align", "disc", "lecam", "val_psnr",
          "val_psnr_full", "perplexity", "bit_imbalance", "keep", "lr")


def main(argv=None):
    config = parse_config(TokenizerConfig, __doc__, VARIANTS, "variant", argv)
    check_config(config)
    widths = [config.disc_base * min(2 ** i, 8) for i in range(1, config.disc_layers + 1)]
    if any(w % config.norm_groups for w in widths):
        raise UserError(f"--disc-base {config.disc_base}: --norm-groups {config.norm_groups} does not divide the widths "
                        f"{widths}; pass a --disc-base that is a multiple of it")
    if config.size // 2 ** config.disc_layers < 3:
        raise UserError(f"--disc-layers {config.disc_layers} leave nothing of a {config.size} px image: pass fewer")
    train_set = build_dataset(config.data, "train", config.size, train=True, seed=config.seed)
    val_set = build_dataset(config.data, "val", config.size, train=False)
    if config.align == "label":
        if train_set.num_classes < 2:
            raise UserError(f"--align label needs class folders, but --data {config.data} has "
                            f"{train_set.num_classes} classes; pass --align ema")
        config.align_dim = train_set.num_classes
    elif config.align == "dinov2":
        config.align_dim = DINOV2["width"]
    config.max_steps = config.max_steps or max(1, config.epochs * len(train_set) // config.batch_size)
    config.workers = loader_workers(config)
    run = start_run(config)
    check_batch(config, run)
    perceptual, dinov2 = perceptual_stub, None
    if config.perceptual == "lpips":
        perceptual = load_lpips(config.lpips_weights, config.vgg_weights, run.device).to(memory_format=torch.channels_last)
    if "dinov2" in (config.align, config.init):
        dinov2 = load_dinov2(config.teacher_weights, run.device)
    resume_from = prepare_out(config, run)
    dry_run("tokenizer", train, config, run, train_set, val_set, perceptual, dinov2, Stop(), disc_start=0, keep_sampling="fixed",
            keep=max(*config.keeps, config.keep))  # the K that needs most memory
    with Stop() as stop:
        step = train(config, run, train_set, val_set, perceptual, dinov2, stop, resume_from)
    if run.main:
        if step < config.max_steps:
            print(f"stopped and saved at step {step}; to go on: {resume_command('tokenizer.py', argv, run.world)}")
        else:
            print(f"done: {config.out}/ckpt.pt, recon_{step:07d}.png, curves.png; next: python mergear.py")
    if run.world > 1:
        dist.destroy_process_group()


def train(config, run, train_set, val_set, perceptual, dinov2, stop, resume_from=None):
    """Train until --max-steps or stop.asked, from the start or from a checkpoint. Returns the step that was reached.
    perceptual: a loss of two batches of images; dinov2: the frozen teacher, if a flag asks for it."""
    torch.manual_seed(config.seed)  # the same weights on every rank

    raw_model = MergeVQ(config).to(run.device, memory_format=torch.channels_last)
    if config.init == "dinov2" and not resume_from:
        select_weights(raw_model.encoder, dinov2)
    discriminator = Discriminator(config).to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    optimizer = adamw(raw_model.named_parameters(), config, (config.beta1, config.beta2), 0.0, run.device)
    disc_optimizer = adamw(discriminator.named_parameters(), config, (config.beta1, config.beta2), 0.0, run.device)
    lecam = torch.zeros(2, device=run.device)                          # running mean logit of real, of fake
    center = torch.zeros(config.align_dim, device=run.device)          # of the ema teacher's outputs
    step, skipped = 0, 0
    if resume_from:
        state = load_checkpoint(resume_from, "tokenizer", run.device)
        with reading(f"--resume: {resume_from}"):
            for module, name in ((raw_model, "model"), (ema, "ema"), (discriminator, "disc"), (optimizer, "optimizer"),
                                 (disc_optimizer, "disc_optimizer")):
                module.load_state_dict(state[name])
            lecam.copy_(state["lecam"])
            center.copy_(state["center"])
            step, skipped = state["step"], state["skipped"]
        del state

    if config.compile:
        for part in (raw_model.encoder.stem, raw_model.decoder, discriminator):
            part.compile()
    encoder, decoder, recovery, align_head, disc = (parallel(part, run) for part in (
        raw_model.encoder, raw_model.decoder, raw_model.recovery, raw_model.align_head, discriminator))
    stream = batches(train_set, config.batch_size, config.seed, step, config.accum, run.rank, run.world, config.workers)
    micro = config.batch_size // (run.world * config.accum)
    if run.main:
        count = lambda m: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f}M"
        print(f"{config.variant}: encoder {count(raw_model.encoder)}, decoder {count(raw_model.decoder)}, source recovery "
              f"{count(raw_model.recovery)}, discriminator {count(discriminator)} parameters")
        print(f"{config.size} px, f = {config.factor}, L = {config.length}, K = {config.keep} of {keep_distribution(config)[0]}, "
              f"d = {config.bits}; {config.max_steps} steps of {config.batch_size}")
        print(f"{config.data}: train {train_set.describe()}; val {val_set.describe()}")

    metrics_path = os.path.join(config.out, "metrics.jsonl")
    if run.main:
        trim_metrics(metrics_path, step)
    bar = tqdm(total=config.max_steps, initial=step, disable=not run.main, dynamic_ncols=True)
    logged_at, logged_step, unsaved, stopping, streak = time.time(), step, False, False, 0
    while True:
        # evaluate, draw, save: N steps make N + 1 passes here, so that the end is no special case
        last = step == config.max_steps
        if last or step % config.eval_every == 0 and step > 0 and not stopping:
            scores = evaluate(ema, val_set, config, run)
            if run.main:
                append_metrics(metrics_path, step=step, **scores)
                with disk_may_fail():
                    draw_reconstructions(ema, val_set, config, run, os.path.join(config.out, f"recon_{step:07d}.png"))
                    plot_curves(metrics_path, os.path.join(config.out, "curves.png"), CURVES)
                bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if last or stopping or step > 0 and step % config.save_every == 0 or unsaved and step % config.log_every == 0:
            unsaved = True  # until it is done: then it is tried again with the next line of the log
            with disk_may_fail(must=last or stopping):
                if run.main:
                    save_checkpoint(os.path.join(config.out, "ckpt.pt"), "tokenizer", config.keep_last, step=step,
                                    skipped=skipped, config=dataclasses.asdict(config), class_names=list(train_set.class_names),
                                    model=raw_model.state_dict(), ema=ema.state_dict(), disc=discriminator.state_dict(),
                                    optimizer=optimizer.state_dict(), disc_optimizer=disc_optimizer.state_dict(),
                                    lecam=lecam, center=center)
                unsaved = False
        if last or stopping:
            break

        # one optimizer step of both networks, side by side
        lr, keep = learning_rate(step, config), sample_keep(config, config.seed, step)
        for group in optimizer.param_groups + disc_optimizer.param_groups:
            group["lr"] = lr
        gan_on = config.w_disc > 0 and step >= config.disc_start
        ramp = min(1.0, (step - config.disc_start + 1) / max(1, config.disc_ramp)) if gan_on else 0.0
        draws = torch.rand(config.batch_size, AUGMENT_DRAWS, generator=seeded(config.seed, step, 2))
        raw_model.train()
        new_lecam, new_center = torch.zeros_like(lecam), torch.zeros_like(center)
        buffers = [b.clone() for b in raw_model.buffers()]  # running statistics, which the forward pass moves
        weights = dict(rec=config.w_rec, perceptual=config.w_perceptual, commit=config.w_commit, entropy=config.w_entropy,
                       recovery=config.w_recovery, align=config.w_align)
        parts = [(images.to(run.device, non_blocking=True).contiguous(memory_format=torch.channels_last), labels)
                 for images, labels in (next(stream) for _ in range(config.accum))]
        each = [slice(m * micro, (m + 1) * micro) for m in range(config.accum)]            # rows of a micro-batch

        # 1. bits. BitNorm, entropy and adaptive weight look at all images of the step. So with --accum all of them are
        # encoded here without a graph, and again in 3., when the gradient of their bits is known (GradCache, 2101.06983)
        with torch.set_grad_enabled(config.accum == 1), run.autocast():
            encoded = [encoder(images, keep) for images, _ in parts]
        bits = torch.cat([part[0] for part in encoded]).detach().float().requires_grad_()  # (accum b,K,d)
        z = raw_model.bit_norm(bits)
        q = quantise(z.detach()).requires_grad_()                                          # collects the decoder's gradient
        sample_entropy, codebook_entropy = lfq_entropy(z, config.tau)
        losses = dict(commit=F.mse_loss(z, z.detach().sign()), entropy=sample_entropy - codebook_entropy)
        z_loss = sum(weights[name] * loss for name, loss in losses.items())
        logs = {name: loss.detach() for name, loss in
                dict(losses, entropy_sample=sample_entropy, entropy_codebook=codebook_entropy).items()}

        # 2. decode, micro-batch by micro-batch. The adaptive weight needs the gradients of all: with --accum a sweep before
        last_gradients = 0.0
        for training in (False, True) if gan_on and config.accum > 1 else (True,):
            for m, (images, _) in enumerate(parts):
                with no_sync(not training or m < config.accum - 1, decoder, recovery, disc):
                    source = encoded[m][1]
                    with run.autocast():
                        out, guess = decoder(unmerge(q[each[m]], source)).float(), recovery(q[each[m]]).float()
                    losses = dict(rec=F.mse_loss(out, images), recovery=F.cross_entropy(guess.flatten(0, 1), source.flatten()))
                    if config.perceptual != "none":
                        losses["perceptual"] = perceptual(out, images).mean()
                    if gan_on:
                        discriminator.requires_grad_(False)
                        with run.autocast():
                            losses["gan"] = generator_loss(discriminator(out))
                        discriminator.requires_grad_(True)
                    if gan_on and not (training and config.accum > 1):
                        pixel = config.w_rec * losses["rec"] + config.w_perceptual * losses.get("perceptual", 0.0)
                        last_layer = raw_model.decoder.conv_out.weight
                        last_gradients += last_layer_gradients(pixel, losses["gan"], last_layer) / config.accum
                        weights["gan"] = config.w_disc * ramp * adaptive_weight(last_gradients)
                    if not training:
                        continue
                    (sum(weights[name] * loss for name, loss in losses.items()) / config.accum).backward()
                    if gan_on:
                        with run.autocast():
                            real, fake = disc(torch.cat([images, out.detach()])).chunk(2)
                        losses["disc"], losses["lecam"] = discriminator_loss(real, fake), lecam_loss(real, fake, lecam)
                        ((losses["disc"] + config.w_lecam * losses["lecam"]) / config.accum).backward()
                        new_lecam += mean_over_ranks(torch.stack([real.detach().mean(), fake.detach().mean()])) / config.accum
                    for name, loss in losses.items():
                        logs[name] = logs.get(name, 0.0) + loss.detach() / config.accum

        # 3. back through BitNorm and the encoder
        torch.autograd.backward([z_loss, z], [None, q.grad])
        for m, (images, labels) in enumerate(parts):
            with no_sync(m < config.accum - 1, encoder, align_head):
                with run.autocast():
                    part = encoded[m] if config.accum == 1 else encoder(images, keep)
                    student = None if align_head is None else align_head(part[2].float()).float()
                loss = (part[0].float() * bits.grad[each[m]]).sum()                        # its gradient is bits.grad
                if config.align == "label":
                    align = F.cross_entropy(student, labels.to(run.device))
                elif config.align != "none":  # view u is the training crop, view v is augmented strongly
                    rows = slice((m * run.world + run.rank) * micro, (m * run.world + run.rank + 1) * micro)
                    view = augment(images, draws[rows].to(run.device))
                    with torch.no_grad(), run.autocast():
                        teacher = (dinov2(view, config.teacher_size) if config.align == "dinov2"
                                   else ema.align_head(ema.encode(view, keep).cls))
                        teacher = teacher.float()
                    if config.align == "dinov2":
                        align = distill_loss(student, teacher)
                    else:
                        align = align_loss(student, teacher, center)
                        new_center += mean_over_ranks(teacher.mean(0)) / config.accum
                if config.align != "none":
                    loss = loss + config.w_align * align / config.accum
                    logs["align"] = logs.get("align", 0.0) + align.detach() / config.accum
                loss.backward()
        weighted = {"weighted_" + name: w * logs[name] for name, w in weights.items() if name in logs}
        logs = dict(loss=sum(weighted.values()), **logs, **weighted)

        if step == 0:  # in the dry run, with the discriminator
            check_trained(raw_model.named_parameters(), optimizer)
            if gan_on:
                check_trained(discriminator.named_parameters(), disc_optimizer)
        zero_rounding(raw_model)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        disc_norm = nn.utils.clip_grad_norm_(discriminator.parameters(), config.clip) if gan_on else norm
        bad, stopping = any_rank(run, ~torch.isfinite(norm + disc_norm + sum(logs.values())), stop.asked)
        if not bad:
            streak = 0
            optimizer.step()
            update_ema(ema, raw_model, config.ema, step)
            if config.align == "ema":
                center.lerp_(new_center, 0.1)
            if gan_on:
                lecam.lerp_(new_lecam, 0.01 if disc_optimizer.state else 1.0)  # the first values are taken as they are
                disc_optimizer.step()
        else:  # a bad step changes nothing
            skipped, streak = skipped + 1, streak + 1
            check_bad(streak, step, config)
            for buffer, before in zip(raw_model.buffers(), buffers):
                buffer.copy_(before)
        optimizer.zero_grad(set_to_none=True)
        disc_optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)

        if step % config.log_every == 0 or step == config.max_steps:
            logs = {name: mean_over_ranks(value).item() for name, value in logs.items()}
            for name in train_set.check_skipped():
                bar.write(f"unreadable image skipped: {name}")
            speed = (step - logged_step) * config.batch_size / (time.time() - logged_at)
            logged_at, logged_step = time.time(), step
            if run.main:
                codes = bits_to_codes(z)
                usage, perplexity = code_statistics(torch.bincount(codes.flatten(), minlength=2 ** config.bits))
                imbalance, dead = bit_statistics(codes, config.bits)
                append_metrics(metrics_path, step=step, **logs, grad_norm=norm, lr=lr, keep=keep, usage=usage,
                               perplexity=perplexity, bit_imbalance=imbalance, dead_bits=dead, images_per_s=speed,
                               skipped=skipped)
                bar.set_postfix(rec=f"{logs['rec']:.4f}", perp=f"{perplexity:.0f}", K=keep, im_s=f"{speed:.0f}", skipped=skipped)
    bar.close()
    return step


if __name__ == "__main__":
    run_main(main)
