"""Source recovery (MergeVQ, arXiv 2504.00999, Eq. 8-9), trained further for a RandAR generator.

    python recovery.py  # for out/randar/ckpt.pt, on a CPU
    python recovery.py --generator out/l/ckpt.pt --batch-size 256 --max-steps 0  # 5 epochs
    torchrun --nproc_per_node=8 recovery.py --generator out/l/ckpt.pt --batch-size 256
    python recovery.py --resume  # continue the run in --out

A RandAR generator draws K codes and the first position of each. Recovery says which code stands
at each of the L positions:

    codes (B,K), first (B,K) -> logits (B,L,K) -> argmax: source (B,L) -> decoder -> image

tokenizer.py trains this network together with all others. Here the others are frozen. The input
is the codes of real images, from the generator's code cache; the target is their true source. A
generator makes mistakes, so a share (--drawn) of the codes is replaced by what it draws at the
same place, given the true codes before (teacher forcing).

OUT/ckpt.pt is a generator checkpoint whose tokenizer has the new weights. generate.py and eval.py
take it as --ckpt.
"""

import copy
import dataclasses
from collections import defaultdict

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (Metrics, RunConfig, UserError, adamw, arg, catch_signals, end_run, gather_rows,
                  load_parts, loader_workers, micro_batch, open_data, open_out, parallel,
                  parse_config, resume_run, run_main, save_run, seeded, set_learning_rate,
                  start_run, step_if_finite, update_ema, val_batches)
from mergear import (code_batches, draw, draw_orders, join_codes, load_generator, open_codes,
                     sequence)
from tokenizer import codes_to_bits, first_position_of_token, nearest_first, psnr

@dataclasses.dataclass
class RecoveryConfig(RunConfig):
    """Defaults suit the tiny generator. The paper trains 5 epochs of batch 256 (Table A2)."""
    generator: str = arg("out/randar/ckpt.pt", help="checkpoint of mergear.py --mode randar")
    drawn: float = arg(0.1, help="share of the codes that the generator redraws", low=0, high=1)
    data: str = arg("", help="data to train on; empty: what the generator was trained on")
    out: str = arg("out/recovery")
    cache: str = arg("", help="folder of the code cache; empty: the generator's")
    batch_size: int = arg(64)
    max_steps: int = arg(600)
    epochs: int = arg(5)
    lr: float = arg(1e-3)
    warmup: int = arg(50)
    weight_decay: float = arg(1e-2)
    eval_every: int = arg(300)
    save_every: int = arg(300)

@torch.no_grad()
def teacher_forced(gpt, codes, source, labels, keep, order, noise):
    """Codes that a RandAR generator draws at their true first positions -> (B,K), by position.

    codes, source (B,L) of real images; labels (B,). order (B,K): the tokens as the generator
    meets them; the true ones before a code are given. noise (B,K,S): uniform, per sub-token.
    """
    # one pass over the true sequence gives the distribution of every code
    inputs, kwargs = sequence(gpt.config, codes, source, keep, order)
    logits, _ = gpt(inputs, labels, **kwargs)  # S times (B,K,2^n)
    # at temperature 1, unlike generate.py: the network is to meet unlikely codes
    subs = [draw(part.flatten(0, 1), noise[..., s].flatten()).view_as(order)
            for s, part in enumerate(logits)]
    drawn = join_codes(torch.stack(subs, dim=-1), gpt.config.sub_bits)  # (B,K), by order
    return torch.empty_like(drawn).scatter_(1, order, drawn)  # by position

@torch.no_grad()
def evaluate(tokenizer, before, dataset, config, run):
    """{where the source is from: (share of right positions, PSNR in dB)} on validation images."""
    # Table 5 of the paper asks the same with rFID: how much is lost without the true source?
    t, results = tokenizer.config, []
    for images, _ in val_batches(dataset, 1000, 64, run, loader_workers(config)):
        with run.autocast():
            codes, source, *_ = tokenizer.encode(images)
            first = first_position_of_token(source, t.keep)  # (B,K)
            sources = dict(true=source, nearest=nearest_first(first, t.length),
                           before=before(codes_to_bits(codes, t.bits), first).argmax(dim=-1),
                           after=tokenizer.recover(codes, first))
            decoded = [tokenizer.decode(codes, guess) for guess in sources.values()]
        accuracy = [(guess == source).float().mean(1) for guess in sources.values()]
        quality = [psnr(picture, images).float() for picture in decoded]
        results.append(torch.stack(accuracy + quality, dim=1).cpu())  # (B,8)
    means = gather_rows(torch.cat(results), run).mean(0).tolist()
    return dict(zip(sources, zip(means[:4], means[4:])))

def main(argv=None):
    config = parse_config(RecoveryConfig, __doc__, argv)
    gpt, tokenizer = load_generator(config.generator)
    g, t = gpt.config, tokenizer.config
    if g.mode != "randar":
        raise UserError(f"--generator {config.generator} is a {g.mode} model, which needs no "
                        "recovery: pass one of mergear.py --mode randar")
    config.data = config.data or g.data
    config.cache = config.cache or g.cache
    # images and codes as the generator saw them, so that its code cache is found. open_data gives
    # this config its --max-steps
    as_before = dataclasses.replace(config, seed=g.seed, labels=g.labels)
    train_set, val_set = open_data(as_before, t.size)
    config.max_steps = as_before.max_steps
    run = start_run(config)
    micro = micro_batch(config, run)
    state = open_out(config, run, "generator")
    gpt.to(run.device)
    tokenizer.to(run.device)
    codes = open_codes(train_set, tokenizer, as_before, run, g.views, True)

    # the tokenizer's own recovery becomes the average of the weights that are trained
    ema = tokenizer.recovery
    before = copy.deepcopy(ema)
    raw_model = copy.deepcopy(ema).train().requires_grad_(True)
    optimizer = adamw(raw_model.parameters(), config, betas=(0.9, 0.95))
    # load_generator reads the generator from "ema"
    parts = dict(ema=gpt, recovery=raw_model, recovery_optimizer=optimizer)
    step, skipped = resume_run(config, state, run, parts)
    if state:
        load_parts(f"{config.out}/ckpt.pt", state["tokenizer"], ema=tokenizer)
    if config.compile:
        raw_model.compile()
    model = parallel(raw_model, run)
    stream = code_batches(*codes, t, config, run, step, True)
    metrics = Metrics(config, run, step, ("loss", "accuracy", "val_accuracy", "val_psnr"))
    stop, stopping = catch_signals(), False
    while True:
        # N steps make N + 1 passes. Step 0 counts: it is the tokenizer's own recovery
        last = step >= config.max_steps
        if last or (step % config.eval_every == 0 and not stopping):
            scores = evaluate(tokenizer, before, val_set, config, run)
            accuracy, quality = scores["after"]
            metrics.scores(step, dict(val_accuracy=accuracy, val_psnr=quality))
        if run.main and (last or stopping or step % config.save_every == 0):
            made = dict(config=dataclasses.asdict(t), ema=tokenizer.state_dict())
            generator = dataclasses.replace(g, out=config.out)  # save_run writes to its out
            save_run(generator, "generator", step, skipped, parts, tokenizer=made)
        if last or stopping:
            break

        # one optimizer step
        lr = set_learning_rate(step, config, optimizer)
        logs = defaultdict(float)
        for micro_step in range(config.accum):
            # DDP averages the gradients in the last backward pass only
            model.require_backward_grad_sync = micro_step == config.accum - 1
            codes, source, labels, keep = next(stream)  # codes, source (B,L)
            # random numbers for the global batch, of which this rank takes its rows. 8: this use
            # of randomness; mergear.py lists the others
            shape, dice = (config.batch_size, keep), seeded(config.seed, step, 8)
            draws = (draw_orders(*shape, dice), torch.rand(shape, generator=dice),
                     torch.rand(*shape, len(g.sub_bits), generator=dice))
            start = (micro_step * run.world + run.rank) * micro
            draws = [x[start:start + micro].to(run.device, non_blocking=True) for x in draws]
            order, u, noise = draws
            first = first_position_of_token(source, keep)  # (B,K)
            real = codes.gather(1, first)  # (B,K)
            # with its mistakes or without, the code of token k stands at the same positions
            with run.autocast():
                drawn = teacher_forced(gpt, codes, source, labels, keep, order, noise)
                mixed = torch.where(u < config.drawn, drawn, real)
                logits = model(codes_to_bits(mixed, t.bits), first)  # (B,L,K)
            # Eq. 9, finite because the true token is always possible
            loss = F.cross_entropy(logits.flatten(0, 1), source.flatten())
            (loss / config.accum).backward()
            values = dict(loss=loss, codes_kept=(drawn == real).float().mean(),
                          accuracy=(logits.argmax(dim=-1) == source).float().mean())
            for name, value in values.items():
                logs[name] += value.detach() / config.accum
        # all ranks have the same gradients. A step that is not finite changes nothing
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        finite = step_if_finite(norm, optimizer)
        update_ema(ema, raw_model, config.ema, step, finite)
        skipped += ~finite
        step += 1
        if step % config.log_every == 0 or step == config.max_steps:
            logs.update(grad_norm=norm, skipped=skipped)
            stopping = metrics.log(step, logs, stop, ("loss", "accuracy"), lr=lr)
    metrics.bar.close()
    if run.main and last:
        for name, (accuracy, quality) in scores.items():
            print(f"source {name:<8} {accuracy:6.1%} of positions right, {quality:5.2f} dB")
    end_run(config, run, step,
            f"done: {config.out}/ckpt.pt; next: python generate.py --ckpt {config.out}/ckpt.pt")

if __name__ == "__main__":
    run_main(main)
