"""Tests of the networks that load public weight files: LPIPS, DINOv2, weight selection, FID's
InceptionV3. Nothing is fetched. The files are small and random, but of the published format."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import fails, random_images
from kills import difference
from test_tokenizer import flags, result, small_config

import tokenizer
from data import UserError, seeded
from eval import FIDInception, load_inception
from tokenizer import Encoder, MergeVQ, TokenizerConfig, load_dinov2, load_lpips, select_weights

VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # in torchvision's vgg16.features
SMALL_VGG = ((4, 4), (5, 5), (6, 6, 6), (7, 7, 7), (8, 8, 8))
SMALL_DINO = TokenizerConfig(size=224, patch=14, width=48, depth=4, heads=4)

def random_tensors(shapes, seed=0):
    """{name: shape} -> {name: tensor} that neither vanish nor explode; variances are positive."""
    g = seeded(seed)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(("var", "bn.weight")) or name.startswith("lin"):
            tensors[name] = torch.rand(shape, generator=g) + 0.5
        else:
            fan = math.prod(shape[1:]) if len(shape) > 1 and shape[0] > 1 else 2
            scale = 0.5 if len(shape) < 2 else (2 / fan) ** 0.5
            tensors[name] = torch.randn(shape, generator=g) * scale
    return tensors

def vgg_shapes(widths):
    shapes, c = {}, 3
    for i, w in zip(VGG_CONVS, [w for stage in widths for w in stage]):
        shapes[f"features.{i}.weight"] = (w, c, 3, 3)
        shapes[f"features.{i}.bias"] = (w,)
        c = w
    return shapes

def head_shapes(widths):
    return {f"lin{i}.model.1.weight": (1, stage[-1], 1, 1) for i, stage in enumerate(widths)}

def dino_shapes(config, grid):
    W, patch = config.width, config.patch
    shapes = {"norm.weight": (W,), "norm.bias": (W,),
              "cls_token": (1, 1, W), "pos_embed": (1, 1 + grid * grid, W), "mask_token": (1, W),
              "patch_embed.proj.weight": (W, 3, patch, patch), "patch_embed.proj.bias": (W,)}
    block = {"norm1.weight": (W,), "norm1.bias": (W,), "attn.qkv.weight": (3 * W, W),
             "attn.qkv.bias": (3 * W,), "attn.proj.weight": (W, W), "attn.proj.bias": (W,),
             "ls1.gamma": (W,), "norm2.weight": (W,), "norm2.bias": (W,),
             "mlp.fc1.weight": (4 * W, W), "mlp.fc1.bias": (4 * W,),
             "mlp.fc2.weight": (W, 4 * W), "mlp.fc2.bias": (W,), "ls2.gamma": (W,)}
    for i in range(config.depth):
        shapes.update({f"blocks.{i}.{name}": shape for name, shape in block.items()})
    return shapes

@pytest.fixture
def files(tmp_path, monkeypatch):
    """The networks made small, and a random file for each: {kind: path}."""
    monkeypatch.setattr(tokenizer, "VGG16", SMALL_VGG)
    monkeypatch.setattr(tokenizer, "DINOV2", SMALL_DINO)
    vgg = {**vgg_shapes(SMALL_VGG), "classifier.0.weight": (9, 8)}
    with torch.device("meta"):
        inception = FIDInception().state_dict()
    inception = {name: w.shape for name, w in inception.items() if "tracked" not in name}
    content = dict(vgg16=vgg, lpips=head_shapes(SMALL_VGG), dinov2=dino_shapes(SMALL_DINO, 5),
                   inception=inception)
    paths = {kind: str(tmp_path / f"{kind}.pth") for kind in content}
    for kind, shapes in content.items():
        torch.save(random_tensors(shapes), paths[kind])
    return paths

# Files

def test_the_published_names_and_shapes():
    """A network that differs from the published one: seen only with 350 MB of files at hand."""
    full = tokenizer.VGG16
    with torch.device("meta"):
        vgg = tokenizer.LPIPS()
        dino = Encoder(tokenizer.DINOV2)
        inception = FIDInception()
    shapes = {name: tuple(w.shape) for name, w in vgg.state_dict().items()}
    features = {name: shape for name, shape in shapes.items() if name.startswith("features")}
    assert features == vgg_shapes(full)
    assert [shapes[f"heads.{i}"] for i in range(5)] == list(head_shapes(full).values())

    published = dino_shapes(tokenizer.DINOV2, 37)
    assert sum(map(math.prod, published.values())) == 86_580_480
    converted = tokenizer.dinov2_names({n: torch.zeros(s) for n, s in published.items()})
    assert ({name: w.shape for name, w in converted.items()}
            == {name: w.shape for name, w in dino.state_dict().items() if "to_bits" not in name})

    shapes = {name: tuple(w.shape) for name, w in inception.state_dict().items()}
    count = sum(math.prod(shape) for name, shape in shapes.items()
                if "running" not in name and "tracked" not in name)
    assert count == 23_834_568 + 8 * 2049  # torchvision's without its second head; 1,008 classes
    some = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "fc.weight": (1008, 2048),
            "Mixed_5b.branch_pool.bn.running_var": (32,), "fc.bias": (1008,),
            "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
            "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
            "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
            "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
            "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1)}
    assert {name: shapes[name] for name in some} == some

def damage(path, how):
    """Write a wrong file over a good one."""
    content, state = path.read_bytes(), torch.load(path)
    first, second, *_ = state
    if how == "lacks one":
        del state[second]
    elif how == "one too many":
        state["extra.weight"] = torch.zeros(3)
    elif how == "wrong shape":
        state[first] = state[first].repeat_interleave(2, dim=-1)
    torch.save(state, path)
    if how == "truncated":
        path.write_bytes(content[:len(content) // 2])
    elif how == "text":
        path.write_bytes(b"<html>404</html>")
    elif how == "not there":
        path.unlink()

def small_lpips(files):
    return load_lpips(files["lpips"], files["vgg16"], widths=SMALL_VGG)

LOADERS = dict(dinov2=lambda files: load_dinov2(files["dinov2"]), vgg16=small_lpips,
               lpips=small_lpips,
               inception=lambda files: load_inception(files["inception"]))

@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("how, word", (("truncated", ""), ("text", ""), ("lacks one", "Missing"),
                                       ("one too many", "extra.weight"), ("wrong shape", "shape"),
                                       ("not there", "No such file")))
def test_wrong_files_are_refused(files, kind, how, word, capsys):
    """A half-loaded network, or a traceback; an error without the file and the flag."""
    damage(Path(files[kind]), how)
    line = fails(LOADERS[kind], files, capsys)
    for expected in (word, files[kind], tokenizer.OFFICIAL[kind][0], "download"):
        assert expected in line

def test_download_only_when_asked(files, monkeypatch):
    """A network fetched unasked or from elsewhere, pickled code, a hash in its name unchecked."""
    asked = []

    def fetch(url, **settings):
        asked.append(url)
        assert settings["check_hash"] and settings["weights_only"]
        return torch.load(files["dinov2"])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    given = load_dinov2(files["dinov2"])
    assert not asked
    assert not difference(load_dinov2("download").state_dict(), given.state_dict())
    assert asked == [tokenizer.OFFICIAL["dinov2"][1]]

    def refuse(url, **settings):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match="--vgg-weights .*unreachable.*download"):
        load_lpips("", "download")

# LPIPS

def test_lpips_as_published(files):
    """A tap before the ReLU or after the pooling, a head at the wrong stage, [0,1] for [-1,1]."""
    file = {**torch.load(files["vgg16"]), **torch.load(files["lpips"])}
    a, b = random_images(2, 33, 47), random_images(2, 33, 47, seed=1)
    shift = torch.tensor([-.030, -.088, -.188]).view(3, 1, 1)
    scale = torch.tensor([.458, .448, .450]).view(3, 1, 1)
    x, expected = torch.cat([(a - shift) / scale, (b - shift) / scale]), 0
    taps = (2, 7, 14, 21, 28)
    for i in VGG_CONVS:
        x = F.conv2d(x, file[f"features.{i}.weight"], file[f"features.{i}.bias"], padding=1)
        x = x.relu()
        if i in taps:
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weight = file[f"lin{taps.index(i)}.model.1.weight"]
            expected = expected + F.conv2d((unit[:2] - unit[2:]) ** 2, weight).mean((1, 2, 3))
            x = F.max_pool2d(x, 2, 2)
    net = small_lpips(files)
    torch.testing.assert_close(net(a, b), expected, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(a.bfloat16().float(), b), net(b, a.bfloat16().float()))
        torch.testing.assert_close(net(a, b), expected, rtol=1e-4, atol=1e-6)
    assert net(a, a).tolist() == [0, 0]

def test_lpips_gradient(files):
    """Weights that gather gradients, a gradient that stops, 0 / 0 where every channel is dead."""
    net = small_lpips(files)
    a, b = random_images(2, 16, 16).requires_grad_(), random_images(2, 16, 16, seed=1)
    net(a, b).sum().backward()
    assert a.grad.abs().amax((1, 2, 3)).min() > 0
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net.features[0].bias.fill_(-1e3)
        net.features[2].bias.fill_(-1e3)
    a.grad = None
    distance = net(a, b)
    distance.sum().backward()
    assert distance.isfinite().all() and a.grad.isfinite().all()

# DINOv2

def reference_dinov2(file, x, config, grid):
    """DINOv2 from the names in its file: x (B,3,H,W) in [0,1] -> class token (B,D)."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ file[f"{name}.weight"].T + file[f"{name}.bias"]

    patch, heads = config.patch, config.heads
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    x = (x - mean) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    (B, _, H, W), D = x.shape, file["cls_token"].shape[-1]
    h, w = H // patch, W // patch
    x = x.view(B, 3, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1)
    x = x @ file["patch_embed.proj.weight"].flatten(1).T + file["patch_embed.proj.bias"]
    table = file["pos_embed"][0, 1:].T.reshape(1, D, grid, grid)
    scale = (h + 0.1) / grid, (w + 0.1) / grid
    table = F.interpolate(table, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
    x = torch.cat([file["cls_token"].expand(B, -1, -1), x], 1)
    x = x + torch.cat([file["pos_embed"][:, :1], table], 1)
    for i in range(config.depth):
        y = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = y.view(B, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) / (D // heads) ** 0.5).softmax(-1) @ v
        y = linear(y.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        x = x + file[f"blocks.{i}.ls1.gamma"] * y
        y = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + file[f"blocks.{i}.ls2.gamma"] * linear(y, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]

@pytest.mark.parametrize("side", (42, 224))
def test_dinov2_as_published(files, monkeypatch, side):
    """ls1 for ls2, another LayerNorm eps, heads mixed up, the 0.1 of the published position
    table left out, images not normalised, a key bias that matters."""
    config, x = dataclasses.replace(SMALL_DINO, size=side), random_images(2, side, side)
    monkeypatch.setattr(tokenizer, "DINOV2", config)
    expected = reference_dinov2(torch.load(files["dinov2"]), (x + 1) / 2, config, 5)
    net = load_dinov2(files["dinov2"])
    found = net(x, config.length)[2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not net.training and not any(p.requires_grad for p in net.parameters())

def test_selection_takes_spaced_elements(files):
    """q filled from k or v, heads cut across, rows and columns that no longer match; a parameter
    left at random, or one that is not the transformer's overwritten."""
    large, encoder = load_dinov2(files["dinov2"]), Encoder(small_config())
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    before = {name: p.clone() for name, p in encoder.named_parameters()}
    select_weights(encoder, large)                                   # 48, 4 heads, 4 blocks
    every = {16: [3 * i for i in range(16)], 64: [3 * i for i in range(64)], 1: [0]}
    heads = [h * 12 + j for h in (0, 2) for j in (0, 1, 3, 4, 6, 7, 9, 10)]  # -> 16, 2 heads
    for name, p in encoder.named_parameters():
        if name.startswith(("stem", "to_bits")):
            assert torch.equal(p, before[name]), name
            continue
        expected = large.get_parameter(name)  # three blocks of four: 0, 1, 2
        for dim, size in enumerate(p.shape):
            of_heads = ".attn.to_" in name and dim == 0 or name.endswith("attn.proj.weight") and dim
            places = heads if of_heads else every[size]
            expected = expected.index_select(dim, torch.tensor(places))
        assert torch.equal(p, expected) and p.requires_grad, name

# InceptionV3

def test_inception_convention(files):
    """Features under autocast, statistics of the batch, another resize, a bias in the logits."""
    net, x = load_inception(files["inception"]), random_images(3, 40, 61)
    features, logits = net(x)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    with torch.autocast("cpu", torch.bfloat16):
        again = net(x[:1])
    torch.testing.assert_close(again, (features[:1], logits[:1]), rtol=1e-4, atol=1e-6)
    resized = F.interpolate((x + 1) / 2, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net(resized * 2 - 1)[0], features, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits, features @ net.fc.weight.T)
    assert not net.training and not features.requires_grad
    assert (features.std(0) > 0).float().mean() > 0.5, "the images make no difference"

# Training with all of them

def test_training_with_the_full_versions(files, tmp_path, monkeypatch):
    """A teacher or LPIPS inside the checkpoint, the optimizer or the EMA; a resume that selects
    weights anew."""
    load = tokenizer.load_lpips
    monkeypatch.setattr(tokenizer, "load_lpips", lambda *args: load(*args, widths=SMALL_VGG))
    full = dict(perceptual="lpips", lpips_weights=files["lpips"], vgg_weights=files["vgg16"],
                align="dinov2", init="dinov2", teacher_weights=files["dinov2"], disc_start=100)
    tokenizer.main(flags(tmp_path / "whole", max_steps=3, **full))
    state, rows = result(tmp_path / "whole")
    assert all(math.isfinite(row[name]) for row in rows for name in ("perceptual", "align"))
    alone = MergeVQ(TokenizerConfig(**state["config"]))
    assert list(state["model"]) == list(state["ema"]) == list(alone.state_dict())
    owned = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    assert sum(owned) == len(list(alone.parameters()))
    assert state["model"]["align_head.2.bias"].shape == (48,), "as many outputs as the teacher"
    selected = torch.load(files["dinov2"])["norm.weight"][::3]
    assert (state["model"]["encoder.norm.weight"] - selected).abs().max() < 0.02

    tokenizer.main(flags(tmp_path / "parts", max_steps=1, **full))
    tokenizer.main(flags(tmp_path / "parts", max_steps=3, **full, resume=True))
    assert not difference(result(tmp_path / "parts")[0]["model"], state["model"])
