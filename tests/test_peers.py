"""The networks of public weight files against the public packages, at full size and random
weights. Skipped where these are not installed. None of them is needed to run anything here:

    pip install torchvision lpips pytorch-fid "transformers>=5"
    python -m pytest -q -s tests/test_peers.py
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_images as images

import tokenizer
from eval import FIDInception, frechet_distance, load_inception
from test_weights import dino_shapes, random_tensors
from tokenizer import load_dinov2, load_lpips

def assert_equal(a, b):
    """To 1e-4 of the largest value; -s shows how near they are."""
    assert a.shape == b.shape
    apart = ((a - b).abs().max() / b.abs().max()).item()
    print(f" {apart:.0e}", end="")
    assert apart < 1e-4  # nan fails

@torch.no_grad()
def test_lpips(tmp_path):
    """A distance unlike published LPIPS. The heads are the package's own file, v0.1."""
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = {f"features.{name}": w for part in theirs.net.children()
             for name, w in part.state_dict().items()}
    torch.save(trunk, tmp_path / "vgg16.pth")
    heads = os.path.join(os.path.dirname(lpips.__file__), "weights/v0.1/vgg.pth")
    ours = load_lpips(heads, tmp_path / "vgg16.pth")
    for size in ((64, 64), (47, 81), (33, 16)):
        a, b = images(2, *size), images(2, *size, seed=1)
        assert_equal(ours(a, b), theirs(a, b).flatten())

@torch.no_grad()
def test_inception(tmp_path, monkeypatch):
    """Features or logits unlike pytorch-fid's. It loads the same file; its fc layer adds a bias."""
    package = pytest.importorskip("pytorch_fid.inception")
    state = FIDInception().state_dict()
    state.update(random_tensors({name: w.shape for name, w in state.items() if w.dim() > 0}))
    torch.save(state, tmp_path / "inception.pth")
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *a, **k: state)
    ours = load_inception(tmp_path / "inception.pth")
    theirs, fc = package.InceptionV3([3]).eval(), package.fid_inception_v3().fc
    for size in ((64, 64), (211, 333)):
        x = images(2, *size)
        features, logits = ours(x)
        expected = theirs((x + 1) / 2)[0].flatten(1)
        assert_equal(features, expected)
        assert_equal(logits + fc.bias, fc(expected))

@torch.no_grad()
@pytest.mark.parametrize("side", (518, 98, 28))
def test_dinov2(tmp_path, monkeypatch, side):
    """A teacher that is not DINOv2. transformers stretches the position table by the size, the
    published models by the size + 0.1, which this test puts into it."""
    package = pytest.importorskip("transformers")
    width, heads = 192, 3  # of ViT-Ti: an eighth of the time
    small = dataclasses.replace(tokenizer.DINOV2, size=side, width=width, heads=heads)
    monkeypatch.setattr(tokenizer, "DINOV2", small)
    state = random_tensors(dino_shapes(small, 37))
    torch.save(state, tmp_path / "dinov2.pth")
    config = package.Dinov2Config(hidden_size=width, num_hidden_layers=12, image_size=518,
                                  num_attention_heads=heads, patch_size=14)
    theirs, renamed = package.Dinov2Model(config).eval(), {}
    for name, w in state.items():
        for a, b in (("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
                     ("pos_embed", "embeddings.position_embeddings"),
                     ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
                     ("blocks.", "encoder.layer."), ("attn.proj", "attention.o_proj"),
                     ("attn.", "attention."),
                     ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")):
            name = name.replace(a, b)
        name = "layer" + name if name.startswith("norm.") else name
        parts = w.chunk(3) if ".qkv." in name else [w]
        renamed.update({name.replace("qkv", f"{n}_proj"): part for n, part in zip("qkv", parts)})
    if "encoder.layer.0.attention.attention.query.weight" in theirs.state_dict():  # in 5.17
        for a, b in (("q_proj", "attention.query"), ("k_proj", "attention.key"),
                     ("v_proj", "attention.value"), ("o_proj", "output.dense")):
            renamed = {name.replace(a, b): w for name, w in renamed.items()}
    theirs.load_state_dict(renamed)

    def stretch(embeddings, height, width):
        position = state["pos_embed"]
        if (height, width) == (518, 518):
            return position
        table = position[:, 1:].transpose(1, 2).unflatten(2, (37, 37))
        scale = (height // 14 + 0.1) / 37, (width // 14 + 0.1) / 37
        table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        return torch.cat([position[:, :1], table.flatten(2).transpose(1, 2)], 1)

    theirs.embeddings.interpolate_pos_encoding = stretch
    x = images(1, side, side)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    expected = theirs(((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    ours = load_dinov2(tmp_path / "dinov2.pth")
    assert_equal(ours(x, small.length)[2], expected.last_hidden_state[:, 0])

@pytest.mark.parametrize("num", (1000, 40))
def test_frechet(num):
    """A distance that is not pytorch-fid's, also where the covariances are singular (40 < 64)."""
    package, rng = pytest.importorskip("pytorch_fid.fid_score"), np.random.default_rng(0)
    a, b = (rng.standard_normal((num, 64)) @ rng.standard_normal((64, 64)) for _ in range(2))
    statistics = [m for x in (a, b + 0.1) for m in (x.mean(0), np.cov(x, rowvar=False))]
    theirs = package.calculate_frechet_distance(*statistics)
    assert frechet_distance(*statistics) == pytest.approx(theirs, rel=1e-6)
