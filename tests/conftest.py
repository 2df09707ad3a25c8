"""What several test files share. pytest puts this folder on sys.path; kills.py, which comes first,
adds that of the scripts."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from kills import TOKENIZER

from data import run_main, save_checkpoint, seeded
from mergear import GPT, GPTConfig
from tokenizer import MergeVQ, TokenizerConfig

torch.set_num_threads(1)  # the models are too small for more, and sums then have one order
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SIZE_16 = dict(size=16, depth=3, keep=25, keeps=(16, 25, 36))  # TOKENIZER at L = 64

@pytest.fixture(autouse=True)
def own_signals():
    """Training loops catch Ctrl-C; pytest wants it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)

def random_images(num, *size, seed=0):
    """(num,3,H,W) in [-1,1], 16 x 16 by default."""
    return torch.rand(num, 3, *(size or (16, 16)), generator=seeded(seed)) * 2 - 1

def small_gpt(**changes):
    """A GPT whose weights are far from their initial values, so that every part matters."""
    settings = dict(width=32, heads=2, depth=2, bits=4, length=16, keep=4, keeps=(2, 4, 16),
                    window=2, num_classes=3)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p)
    return gpt.requires_grad_(False)

def save_tokenizer(path, seed=0, **changes):
    """A checkpoint of an untrained tokenizer: 8 px, L = 16, K = 6."""
    torch.manual_seed(seed)
    model = MergeVQ(TokenizerConfig(**{**TOKENIZER, **changes}))
    save_checkpoint(path, "tokenizer", step=0, config=vars(model.config), ema=model.state_dict())

def save_generator(path, tokenizer, **changes):
    """A checkpoint as mergear.py writes it, for the tokenizer of another checkpoint."""
    made, gpt = torch.load(tokenizer), small_gpt(**changes)
    save_checkpoint(path, "generator", step=0, config=vars(gpt.config), ema=gpt.state_dict(),
                    tokenizer=dict(config=made["config"], ema=made["ema"]))

def two_ranks(script, argv):
    """Run a script by torchrun on two processes. It must succeed."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    done = subprocess.run([sys.executable, *launch, str(script), *argv], env=ENV, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

def fails(main, argv, capsys):
    """The one line with which a script refuses its flags; its exit code must be 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.strip() and "it/s" not in line]  # progress bars
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
