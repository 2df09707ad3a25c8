"""Tests of recovery.py: one property each. A docstring names the bug that its test catches."""

import pytest
import torch
import torch.nn.functional as F
from conftest import save_generator, save_tokenizer, two_ranks
from kills import RECOVERY, ROOT, command, difference, read, write_images

import mergear
import recovery
import tokenizer
from data import seeded

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """images/, a tokenizer, and a randar generator."""
    folder = tmp_path_factory.mktemp("recovery")
    write_images(folder / "images")
    save_tokenizer(folder / "tok.pt", data=str(folder / "images"))
    save_generator(folder / "gpt.pt", folder / "tok.pt", mode="randar", bits=6, keep=6,
                   keeps=(4, 6, 16), num_classes=2, class_names=("a", "b"),
                   data=str(folder / "images"), cache=str(folder / "codes"))
    return folder

def flags(place, out, **changes):
    settings = {"generator": place / "gpt.pt", "max_steps": 4, "eval_every": 100, **changes}
    return command(RECOVERY, str(place / out), **settings)

def finetune(place, out, **changes):
    recovery.main(flags(place, out, **changes))
    return read(place / out)

def test_only_recovery_changes(place):
    """Fine-tuning that moves the tokenizer or the generator; old weights in the new file, or a
    file that generate.py cannot read."""
    finetune(place, "only", max_steps=30, lr=1e-2)
    gpt, old = mergear.load_generator(place / "gpt.pt")
    same, new = mergear.load_generator(place / "only/ckpt.pt")
    assert difference(gpt.state_dict(), same.state_dict()) is None
    assert vars(gpt.config) | {"out": None} == vars(same.config) | {"out": None}
    changed = {name for name, w in old.state_dict().items()
               if not torch.equal(w, new.state_dict()[name])}
    assert changed == {f"recovery.{name}" for name in new.recovery.state_dict()}
    codes, first = mergear.sample_codes(gpt, torch.zeros(8, dtype=torch.long))
    assert not torch.equal(old.recover(codes, first), new.recover(codes, first))

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
    dice = seeded(0)
    B, K, L = 200, 6, 16
    first = torch.arange(K)
    source = torch.cat([first, first.new_full((L - K,), K - 1)]).expand(B, L)
    codes = torch.randint(2 ** 11, (B, K), generator=dice)
    order = mergear.draw_orders(B, K, dice)
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

def test_two_processes_equal_one(place):
    """Ranks that see the same images or draw other codes; gradients averaged wrongly."""
    one, rows_one = finetune(place, "one", lr_schedule="constant", max_steps=3)
    two_ranks(f"{ROOT}/recovery.py", flags(place, "two", lr_schedule="constant", max_steps=3))
    two, rows_two = read(place / "two")
    for name, value in one["recovery"].items():
        torch.testing.assert_close(two["recovery"][name], value, rtol=0, atol=2e-5)
    for a, b in zip(rows_one, rows_two, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
