"""Tests of recovery.py: one property each. The docstring of a test names the bug it catches.

    python -m pytest -q tests/test_recovery.py
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import mergear
import recovery
import tokenizer
from data import UserError
from kills import MERGEAR, RECOVERY, ROOT, TOKENIZER, command, difference, read, write_images

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/, a tokenizer, and a randar and a raster generator."""
    folder = tmp_path_factory.mktemp("recovery")
    write_images(folder / "images")
    argv = dict(data=folder / "images", max_steps=2)
    tokenizer.main(command(TOKENIZER, str(folder / "tokenizer"), **argv))
    for mode in ("randar", "raster"):
        argv = dict(tokenizer=folder / "tokenizer/ckpt.pt", mode=mode, max_steps=2)
        mergear.main(command(MERGEAR, str(folder / mode), **argv))
    return folder


def flags(place, out, **changes):
    generator = place / "randar/ckpt.pt"
    settings = {"generator": generator, "max_steps": 4, "eval_every": 100, **changes}
    return command(RECOVERY, str(place / out), **settings)


def finetune(place, out, **changes):
    recovery.main(flags(place, out, **changes))
    return read(place / out)


def test_only_recovery_changes(place):
    """Fine-tuning that moves the tokenizer or the generator; old weights in the new file."""
    state, _ = finetune(place, "only")
    source = torch.load(place / "randar/ckpt.pt", weights_only=True)
    assert difference(state["ema"], source["ema"]) is None
    old, new = source["tokenizer"]["ema"], state["tokenizer"]["ema"]
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    parameters = {f"recovery.{name}" for name in state["recovery"]}
    assert changed == parameters and old.keys() == new.keys()


def test_nothing_is_read_back_from_the_device():
    """A value read back, or a CPU tensor mixed in: on the meta device both raise."""
    with torch.device("meta"):
        t = tokenizer.TokenizerConfig(bits=11)
        net = tokenizer.SourceRecovery(t)
        gpt = mergear.GPT(mergear.GPTConfig(mode="randar", width=32, heads=2, depth=1, bits=11))
        codes = torch.empty(2, 64, dtype=torch.long)
        order, noise = torch.empty(2, 36, dtype=torch.long), torch.empty(2, 36, 2)
    drawn = recovery.teacher_forced(gpt, codes, codes, codes[:, 0], 36, order, noise)
    logits = net(tokenizer.codes_to_bits(drawn, 11), order)
    F.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
    assert drawn.is_meta and all(p.grad is not None for p in net.parameters())


def test_its_checkpoint_is_a_generator(place):
    """A checkpoint that generate.py cannot read, or whose recovery is the old one."""
    finetune(place, "used", max_steps=30, lr=1e-2)
    gpt, old = mergear.load_generator(place / "randar/ckpt.pt")
    same, new = mergear.load_generator(place / "used/ckpt.pt")
    assert difference(gpt.state_dict(), same.state_dict()) is None
    assert gpt.config == same.config
    codes, first = mergear.sample_codes(gpt, torch.zeros(8, dtype=torch.long))
    assert not torch.equal(old.recover(codes, first), new.recover(codes, first))


def test_accuracy_rises(place, capsys):
    """Targets of another numbering: what is seen often must be learnt; a "before" in the table
    that is the new recovery."""
    _, rows = finetune(place, "long", max_steps=200, lr=3e-2, drawn=0, batch_size=16)
    start, *_, end = [row["val_accuracy"] for row in rows if "val_psnr" in row]
    rows = [row for row in rows if "loss" in row]
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.2
    assert rows[-1]["loss"] < rows[0]["loss"]
    output = capsys.readouterr().out
    assert "source true     100.0%" in output
    assert f"source before   {start:6.1%}" in output and "source nearest" in output
    assert f"source after    {end:6.1%}" in output and start != end


class Oracle(torch.nn.Module):
    """A generator that is sure of the true codes, or knows nothing."""
    config = mergear.GPTConfig(mode="randar", bits=11, length=16)

    def __init__(self, certainty):
        super().__init__()
        self.certainty = certainty

    def forward(self, codes, labels, keep, first):
        subs = mergear.split_codes(codes, self.config.sub_bits).unbind(-1)
        logits = [F.one_hot(sub, 2 ** n) for sub, n in zip(subs, self.config.sub_bits)]
        return [part * self.certainty for part in logits], None


def test_teacher_forced_codes_are_by_position():
    """Codes that stay in the order of the sequence; codes that are copied instead of drawn."""
    dice = torch.Generator().manual_seed(0)
    B, K, L = 200, 6, 16
    first = torch.arange(K)
    source = torch.cat([first, first.new_full((L - K,), K - 1)]).expand(B, L)
    codes = torch.randint(2 ** 11, (B, K), generator=dice)
    order = mergear.draw_orders(Oracle.config, B, K, dice)
    noise = torch.rand(B, K, len(Oracle.config.sub_bits), generator=dice)
    labels = torch.zeros(B, dtype=torch.long)
    inputs = codes.gather(1, source), source, labels, K, order, noise
    assert torch.equal(recovery.teacher_forced(Oracle(1e3), *inputs), codes)
    drawn = recovery.teacher_forced(Oracle(0.0), *inputs)
    assert (drawn != codes).float().mean() > 0.99
    assert abs(drawn.float().mean() / 2 ** 10 - 1) < 0.1


def test_nearest_first_position():
    """Distances along the raster line instead of on the grid; a token that starts later."""
    first = torch.tensor([[0, 3, 9]])
    source = recovery.nearest_first(first, 16)
    assert source[0, :11].tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 0, 2, 2]
    assert source[0, 12:].tolist() == [2, 2, 2, 2]


def test_the_drawn_codes_matter(place):
    """A --drawn that is parsed and never used."""
    none, all_of_them = finetune(place, "d0", drawn=0), finetune(place, "d1", drawn=1)
    assert difference(none[0]["recovery"], all_of_them[0]["recovery"])


def test_resumed_run_is_the_same_run(place):
    """State that a checkpoint forgets: 4 steps must equal 2 + resume + 2 bit for bit."""
    constant = dict(lr_schedule="constant")
    straight = finetune(place, "straight", **constant)
    finetune(place, "broken", max_steps=2, **constant)
    resumed = finetune(place, "broken", resume=True, **constant)
    assert difference(straight[0], resumed[0]) is None


def test_two_processes_equal_one(place):
    """Ranks that see the same images or draw other codes; gradients averaged wrongly."""
    one, rows_one = finetune(place, "one", lr_schedule="constant", max_steps=3)
    argv = flags(place, "two", lr_schedule="constant", max_steps=3)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([sys.executable, *launch, f"{ROOT}/recovery.py", *argv],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    two, rows_two = read(place / "two")
    for name, value in one["recovery"].items():
        torch.testing.assert_close(two["recovery"][name], value, rtol=0, atol=2e-5)
    for a, b in zip(rows_one, rows_two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name


def test_another_mode_is_refused(place):
    """A traceback, or a run that trains what raster generation never uses."""
    with pytest.raises(UserError, match="raster model, which needs no recovery"):
        recovery.main(flags(place, "bad", generator=place / "raster/ckpt.pt"))
