"""Every test. `pytest -q -n 2 test_all.py` takes minutes on two CPU cores and needs neither a GPU nor a network."""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import skimage.data
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from torchvision.transforms import v2

import common
import data
import mae
import maskfeat
import vjepa

os.environ["OMP_NUM_THREADS"] = "1"  # the processes that share the tests (-n 2) share the cores too
torch.set_num_threads(1)
HERE = Path(__file__).parent
TINY = dict(size="nano", image_size=32, patch_size=8, decoder_dim=32, decoder_depth=1, decoder_heads=2)
TINY_FLAGS = ["--recipe", "demo", "--image-size", "32", "--decoder-dim", "32", "--decoder-depth", "1",
              "--decoder-heads", "2", "--batch-size", "8", "--workers", "0", "--log-every", "1", "--device", "cpu"]


def tiny_mae(**changes):
    torch.manual_seed(0)
    return mae.MAE(**{**TINY, **changes})


def tiny_satmae(**changes):
    torch.manual_seed(0)
    return mae.SatMAE("nano", 32, 8, 5 if "bands" in changes else 3, decoder_dim=48, decoder_depth=1, decoder_heads=2,
                      **changes)


def tiny_maskfeat(**changes):
    torch.manual_seed(0)
    return maskfeat.MaskFeat(**{**dict(size="nano", image_size=32, patch_size=8), **changes})


def tiny_vjepa(**changes):
    torch.manual_seed(0)
    tiny = dict(size="nano", image_size=32, patch_size=8, frames=4, predictor_dim=32, predictor_depth=2)
    return vjepa.VJEPA(**{**tiny, **changes})


def random_masks(batch, grid=(4, 4), ratio=0.75):
    """Indices (visible, masked), at random and in random order."""
    return mae.random_mask(batch, grid, ratio, None, "cpu")


def mask_args(**changes):
    args = dict(masking="multiblock", mask_ratio=0.5, context_frames=None, mask_group=4, batch_size=4, seed=0,
                tubelet=2)
    return _args(**{**args, **changes})


def tiny_masks(batch=4, grid=(2, 4, 4), step=0):
    """V-JEPA's: a list of visible and one of masked indices, an entry for each of the two kinds."""
    return vjepa.draw_masks(mask_args(batch_size=batch, mask_group=batch), grid, step, slice(0, batch), "cpu")


def mask_of(masked, length):
    """Indices (B, M) -> mask (B, length), 1 = masked."""
    return torch.zeros(len(masked), length).scatter(1, masked, 1.0)


GROUPS = ((0, 3), (2,), (1, 4))
CASES = {  # name: (model, shape of its pixels, slice of each channel: groups of bands have tokens of their own)
    "mae": (tiny_mae, (3, 32, 32), [0]),
    "mae with mask tokens": (functools.partial(tiny_mae, encode_mask_tokens=True), (3, 32, 32), [0]),
    "satmae": (functools.partial(tiny_satmae, bands=GROUPS), (5, 32, 32), [0, 2, 1, 0, 2]),
    "maskfeat": (tiny_maskfeat, (3, 32, 32), [0]),
    "maskfeat of clips": (functools.partial(tiny_maskfeat, frames=4, tubelet=2), (3, 4, 32, 32), [0]),
    "vjepa": (tiny_vjepa, (3, 4, 32, 32), [0]),
}


def case(name, batch=4):
    """A tiny model, a batch for it, and the indices (for V-JEPA, lists of them): (model, pixels, visible, masked)."""
    make, shape, slices = CASES[name]
    masks = tiny_masks(batch) if name == "vjepa" else random_masks(batch, (max(slices) + 1 + len(shape) % 3, 4, 4))
    return make(), torch.randn(batch, *shape), *masks


def forward(model, pixels, visible, masked):
    return model(pixels, masked) if isinstance(model, maskfeat.MaskFeat) else model(pixels, visible, masked)


def inputs_of(module, run):
    """The inputs of each call of a module while `run()` runs."""
    found = []
    handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs))
    run()
    handle.remove()
    return found


MASKFEAT_FLAGS = ["--recipe", "demo", "--image-size", "32", "--batch-size", "8", "--workers", "0", "--log-every", "1",
                  "--device", "cpu"]
VJEPA_FLAGS = ["--recipe", "demo", "--image-size", "32", "--patch-size", "8", "--frames", "4", "--predictor-dim", "32",
               "--predictor-depth", "1", "--batch-size", "8", "--workers", "0", "--log-every", "1", "--device", "cpu",
               "--masking", "multiblock", "--context-frames", "4"]
STRONG_FLAGS = ["--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1"]
FINETUNE_FLAGS = ["finetune", *MASKFEAT_FLAGS, *STRONG_FLAGS]
CLIPS_FLAGS = ["--still", "--frames", "4", "--patch-size", "8"]

RUNS = [(mae, TINY_FLAGS, "folder"), (maskfeat, MASKFEAT_FLAGS, "folder"),
        (maskfeat, [*MASKFEAT_FLAGS, "--frames", "4", "--patch-size", "8"], "videos"),
        (vjepa, [*VJEPA_FLAGS, "--probe-every", "3"], "videos")]
SATELLITE_RUNS = [(mae, [*TINY_FLAGS, "--bands", "0,1/2"], "folder"),
                  (mae, [*TINY_FLAGS, "--channels", "5", "--dates", "3"], "places")]
CLASSIFIERS = [(mae, FINETUNE_FLAGS, "folder"), (mae, ["linprobe", *MASKFEAT_FLAGS], "folder"),
               (maskfeat, FINETUNE_FLAGS, "folder"), (vjepa, ["probe", *CLIPS_FLAGS, *MASKFEAT_FLAGS], "folder")]
TASKS = {  # of all scripts, without what is drawn by process: (method, flags, fixture with the data)
    "mae": RUNS[0], "maskfeat": RUNS[1], "vjepa": (vjepa, VJEPA_FLAGS, "videos"),
    "mae finetune": (mae, ["finetune", *MASKFEAT_FLAGS], "folder"),
    "mae linprobe": (mae, ["linprobe", *MASKFEAT_FLAGS], "folder"),
    "maskfeat finetune": (maskfeat, ["finetune", *MASKFEAT_FLAGS], "folder"),
    "vjepa probe": (vjepa, ["probe", *CLIPS_FLAGS, *MASKFEAT_FLAGS], "folder"),
    "vjepa finetune": (vjepa, ["finetune", *CLIPS_FLAGS, *MASKFEAT_FLAGS], "folder")}


def start(*arguments, processes=None, restarts=0):
    """Start a script as a user does, as the leader of a group of processes, as a shell does; its output is text."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    f"--max-restarts={restarts}"]
    return subprocess.Popen([*command, *map(str, arguments)], cwd=HERE, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """Wait for the end of a process; stdout and stderr become what it has printed."""
    process.stdout, process.stderr = process.communicate()
    return process


def run(*arguments, processes=None):
    return finish(start(*arguments, processes=processes))


def wait_for_step(out, step, process):
    """Wait until a running process has logged a step."""
    while not Path(out, "log.jsonl").exists() or len(losses(out)) < step:
        assert process.poll() is None, finish(process).stderr
        time.sleep(0.01)


def main(monkeypatch, *arguments, method=mae):
    """The same in this process, which saves the seconds of importing torch. A task may stand anywhere."""
    arguments = sorted(map(str, arguments), key=lambda word: word not in ("finetune", "linprobe", "probe", "show"))
    monkeypatch.setattr(sys, "argv", [f"{method.__name__}.py", *map(str, arguments)])
    method.main()


def records(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def parsed(monkeypatch, method, *words):
    """What a script makes of a command line."""
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(method, "TASKS", {task: (kept.append, *others) for task, (_, *others) in method.TASKS.items()})
        main(patch, *words, "--device", "cpu", method=method)
    return kept.pop()


def losses(out):
    return [record["loss"] for record in records(out)]


def gradients(out):
    """What the optimizer has averaged at the end of a run: of a single step the gradient, for AdamW a tenth of it."""
    states = common.read_checkpoint(Path(out, "last.pt"))["optimizer"]["state"].values()
    return torch.cat([state["exp_avg" if "exp_avg" in state else "momentum_buffer"].flatten() for state in states])


@pytest.fixture
def no_probe(monkeypatch):
    """Leave out what follows on pre-training, probe and picture, which take as long as a few steps."""
    monkeypatch.setattr(data, "print_probe", lambda *_: None)
    for method in (mae, maskfeat, vjepa):
        monkeypatch.setattr(method, "save_picture", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def photographs_are_read_once():
    """In each process of the tests, where most runs would read all of them, twice."""
    for name in data.Photographs.classes:
        setattr(skimage.data, name, functools.cache(getattr(skimage.data, name)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A labelled folder: 2 classes, 12 training and 6 test images each; one is grey, one transparent, one broken."""
    root = tmp_path_factory.mktemp("images")
    source = data.Photographs(True)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in ((0, "astronaut"), (4, "coffee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = source[label * 400 + i + (100 if split == "test" else 0)][0]
                image = image.convert("L") if i == 0 else image.convert("RGBA") if i == 1 else image
                image.save(root / split / name / f"{i}.png")
    (root / "train/coffee/7.png").write_bytes((root / "train/coffee/8.png").read_bytes()[:2000])
    return root


@pytest.fixture(scope="session")
def seven(tmp_path_factory):
    """Seven classes, told by the colour of training images; validation images have the colour of any class."""
    root, generator = tmp_path_factory.mktemp("seven"), np.random.default_rng(0)
    colours = np.array(list(itertools.product((60, 190), repeat=3)))
    for split, count in (("train", 12), ("val", 4)):
        for label, i in itertools.product(range(7), range(count)):
            colour = colours[label if split == "train" else generator.integers(7)]
            pixels = colour + generator.normal(0, 20, (40, 40, 3))
            path = root / split / f"class {label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def checkpoint(folder, tmp_path_factory):
    """A pre-trained checkpoint, made by the command line."""
    out = tmp_path_factory.mktemp("run") / "mae"
    done = run("mae.py", "--data", folder, "--out", out, "--steps", 3, *TINY_FLAGS)
    assert done.returncode == 0, done.stderr
    assert (out / "reconstruction.png").exists() and len(losses(out)) == 3
    assert done.stderr.count("coffee/7.png") == 1 and "1 of 24 files could not be read" in done.stderr
    assert "before training" in done.stdout and str(out / "last.pt") in done.stdout
    return out / "last.pt"


# -------------------------------------------------------------------------------------------------------------- blocks


def test_patchify_orders_by_row_column_channel_and_comes_back():
    images = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    patches = common.patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for row, column, channel in [(0, 0, 0), (1, 3, 2), (3, 2, 1)]:  # within patch 4: the second row, the second column
        assert patches[1, 4, (row * 4 + column) * 3 + channel] == images[1, channel, 4 + row, 4 + column]
    assert torch.equal(common.unpatchify(patches, 4, (2, 3)), images)


def test_sincos_positions_against_numbers_by_hand():
    table = common.sincos(8, (2, 3))
    assert table.shape == (6, 8)
    # Row 1, column 2. Width 8: 4 numbers for the column, then 4 for the row, with the frequencies 1 and 1/100.
    by_hand = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02),
               math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    assert torch.allclose(table[5], torch.tensor(by_hand), atol=1e-7)

    table = common.sincos(16, (2, 2, 3))  # 6 numbers for each of time, row, column, cut to 16
    code = lambda x: [f(x / 10000 ** (i / 3)) for f in (math.sin, math.cos) for i in range(3)]
    assert torch.allclose(table[11], torch.tensor((code(1) + code(1) + code(2))[:16]), atol=1e-7)


def test_positions_are_interpolated_and_the_class_row_is_kept():
    table = F.pad(common.sincos(16, (4, 4)), (0, 0, 1, 0))[None]
    assert common.resize_positions(table, (4, 4), (4, 4)) is table
    larger = common.resize_positions(table, (4, 4), (6, 8))
    by_hand = F.interpolate(table[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2), size=(6, 8), mode="bicubic")
    assert torch.allclose(larger[0, 1:], by_hand[0].flatten(1).T) and torch.equal(larger[:, 0], table[:, 0])
    times = torch.linspace(0, 1, 4).repeat_interleave(4)[None, :, None]  # (1, 4 times of 2 x 2, 1)
    assert torch.allclose(common.resize_positions(times, (4, 2, 2), (2, 2, 2))[0, ::4, 0], torch.tensor([1 / 6, 5 / 6]))


@pytest.mark.parametrize("size, patch, encoder, whole", [
    ("base", 16, 85.80, 111.91), ("large", 16, 303.30, 329.54), ("huge", 14, 630.76, 657.07)])
def test_parameter_counts_of_the_published_models(size, patch, encoder, whole):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in model(size, patch_size=patch).parameters()) for model in (common.ViT, mae.MAE)]
    assert [round(count / 1e6, 2) for count in counts] == pytest.approx([encoder, whole], abs=0.011)


def test_video_vit_has_a_token_per_tubelet():
    vit = common.ViT("nano", 32, 8, frames=4, tubelet=2, class_token=False, pool="mean", num_classes=3)
    assert vit.patch_embed.proj.weight.shape == (128, 3, 2, 8, 8)
    assert vit.tokens(torch.randn(2, 3, 4, 32, 32)).shape == (2, 2 * 4 * 4, 128)
    assert vit(torch.randn(2, 3, 4, 32, 32)).shape == (2, 3)


def test_drop_path_skips_whole_samples_and_only_in_training():
    block, x = common.Block(16, 2, drop_path=0.9), torch.randn(64, 3, 16)
    unchanged = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.6 < unchanged < 0.95  # 0.9 squared, since both branches have to be skipped
    assert not (block.eval()(x) == x).flatten(1).all(1).any()
    rates = [block.drop_path.p for block in common.ViT("nano", 32, 8, drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# ------------------------------------------------------------------------------- the forward passes, in plain functions
# Of a state dict w with the published names; nothing of the modules under test is used.


def layer(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w, name, x, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(q, k, v, heads):
    """q (B, N, D), k and v (B, M, D) -> (B, N, D), a head at a time."""
    outputs = []
    for query, key, value in zip(*(x.chunk(heads, dim=2) for x in (q, k, v))):
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[2])).softmax(dim=2)
        outputs.append(weights @ value)
    return torch.cat(outputs, dim=2)


def plain_blocks(w, name, x, heads):
    depth = len([key for key in w if re.fullmatch(rf"{name}\.\d+\.norm1\.weight", key)])
    for block in (f"{name}.{i}" for i in range(depth)):
        q, k, v = layer(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x)).chunk(3, dim=2)
        x = x + layer(w, f"{block}.attn.proj", attention(q, k, v, heads))
        x = x + layer(w, f"{block}.mlp.fc2", F.gelu(layer(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x))))
    return x


def rows_of(x, indices):
    """x (1 or B, L, D) at the indices (B, N) -> (B, N, D)."""
    return torch.stack([row[i] for row, i in zip(x.expand(len(indices), -1, -1), indices)])


def plain_encoder(w, pixels, visible=None, masked=None, mask_token="mask_token", heads=4):
    """All encoded tokens, of the visible patches alone, or with a mask token at the masked ones: (B, [1 +] N, D)."""
    kernel = w["patch_embed.proj.weight"]
    convolution = F.conv3d if kernel.ndim == 5 else F.conv2d
    x = convolution(pixels, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    for b, indices in enumerate([] if masked is None else masked):
        x[b, indices] = w[mask_token][0]
    x = x + w["pos_embed"][:, -x.shape[1]:]
    x = x if visible is None else rows_of(x, visible)
    if "cls_token" in w:
        x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
    x = plain_blocks(w, "blocks", x, heads)
    return norm(w, "norm", x) if "norm.weight" in w else x


def plain_decoder(w, latent, visible, heads=2):
    """MAE's: encoded tokens, the class token first (B, 1 + N, D) -> the pixels of all patches (B, L, P*P*C)."""
    latent = layer(w, "decoder_embed", latent)
    x = w["mask_token"].repeat(len(latent), w["decoder_pos_embed"].shape[1] - 1, 1)
    for b, indices in enumerate(visible):
        x[b, indices] = latent[b, 1:]
    x = torch.cat([latent[:, :1], x], dim=1) + w["decoder_pos_embed"]
    x = norm(w, "decoder_norm", plain_blocks(w, "decoder_blocks", x, heads))
    return layer(w, "decoder_pred", x[:, 1:])


def plain_predictor(w, context, visible, masked, kind, heads=4):
    """V-JEPA's: encoded context (B, N, D) -> the features at the masked indices (B, M, D)."""
    positions = w["predictor_pos_embed"]
    context = layer(w, "predictor_embed", context) + rows_of(positions, visible)
    x = torch.cat([context, w[f"mask_tokens.{kind}"] + rows_of(positions, masked)], dim=1)
    x = norm(w, "predictor_norm", plain_blocks(w, "predictor_blocks", x, heads))
    return layer(w, "predictor_proj", x[:, context.shape[1]:])


def plain_probe(w, x, heads=4):
    """The attentive probe: all tokens (B, N, D) -> logits (B, classes)."""
    block = "pooler.cross_attention_block"
    query = w["pooler.query_tokens"].expand(len(x), -1, -1)
    k, v = layer(w, f"{block}.xattn.kv", norm(w, f"{block}.norm1", x, 1e-5)).chunk(2, dim=2)
    query = query + attention(layer(w, f"{block}.xattn.q", query), k, v, heads)
    between = F.gelu(layer(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", query, 1e-5)))
    return layer(w, "linear", (query + layer(w, f"{block}.mlp.fc2", between))[:, 0])


def part_of(weights, prefix):
    """Of the weights whose names begin so, the rest of the name."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def noisy(model):
    """The model in float64, where the eps of a norm counts, with other numbers in every weight, tables too."""
    for parameter in model.double().parameters():
        parameter.data = 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", [name for name in CASES if name != "satmae"])
def test_forward_passes_equal_the_plain_ones(name):
    model, pixels, visible, masked = case(name)
    model, pixels = noisy(model), pixels.double()
    w = model.state_dict()
    if name == "vjepa":
        predictions = []
        model.predictor.register_forward_hook(lambda *hook: predictions.append(hook[-1]))
        forward(model, pixels, visible, masked)
        for kind in (0, 1):
            context = plain_encoder(part_of(w, "encoder."), pixels, visible[kind])
            expected = plain_predictor(part_of(w, "predictor."), context, visible[kind], masked[kind], kind)
            assert torch.allclose(predictions[kind], expected, rtol=0, atol=1e-9)
        return
    if name == "mae":
        expected = plain_decoder(w, plain_encoder(w, pixels, visible), visible)
    elif name == "mae with mask tokens":
        latent = plain_encoder(w, pixels, masked=masked, mask_token="encoder_mask_token")
        expected = plain_decoder(w, latent, torch.arange(16).expand(4, -1))
    else:
        latent = rows_of(plain_encoder(w, pixels, masked=masked)[:, 1:], masked)
        expected = layer(w, "pred_head.1", norm(w, "pred_head.0", latent))
    assert torch.allclose(forward(model, pixels, visible, masked)[1], expected, rtol=0, atol=1e-9)


def test_the_attentive_probe_equals_the_plain_one():
    probe, x = noisy(vjepa.AttentiveClassifier(128, 4, 3)), torch.randn(2, 7, 128).double()
    assert torch.allclose(probe(x), plain_probe(probe.state_dict(), x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_classifiers_pool_the_tokens(pool):
    vit, images = noisy(common.ViT("nano", 32, 8, pool=pool, num_classes=7)), torch.randn(2, 3, 32, 32).double()
    w = vit.state_dict()
    x = plain_encoder(w, images)
    x = norm(w, "fc_norm", x[:, 1:].mean(1)) if pool == "mean" else x[:, 0]
    assert torch.allclose(vit(images), layer(w, "head", x), rtol=0, atol=1e-9)


def encoded(model, pixels, visible, masked):
    """What the encoder hands on, for each mask: the input of the first layer after it."""
    after, = (module for name, module in model.named_modules()
              if name.endswith(("decoder_embed", "pred_head", "predictor_embed")))
    return [tokens for tokens, in inputs_of(after, lambda: forward(model, pixels, visible, masked))]


@pytest.mark.parametrize("name", CASES)
def test_the_encoder_never_sees_a_masked_patch(name):
    model, pixels, visible, masked = case(name)
    slices, grid = CASES[name][2], (2, 4, 4) if pixels.ndim == 5 else (4, 4)
    before = encoded(model, pixels, visible, masked)
    for i, indices in enumerate(masked if name == "vjepa" else [masked]):
        mask = mask_of(indices, (max(slices) + 1) * math.prod(grid)).view(4, -1, *grid)
        mask = F.interpolate(mask, pixels.shape[2:])[:, slices]  # of pixels
        after = encoded(model, pixels + 100 * mask * torch.randn_like(pixels), visible, masked)
        assert torch.equal(before[i], after[i])
        assert not torch.allclose(before[i], encoded(model, pixels + (1 - mask), visible, masked)[i])
        lengths = {"mae": 1 + 4, "mae with mask tokens": 1 + 16, "satmae": 1 + 12, "maskfeat": 12,
                   "maskfeat of clips": 24, "vjepa": visible[i].shape[-1]}
        assert before[i].shape == (4, lengths[name], 128)


@pytest.mark.parametrize("name", CASES)
def test_gradient_reaches_every_parameter_that_is_trained(name):
    model, pixels, visible, masked = case(name)
    loss = forward(model, pixels, visible, masked)
    (loss if name == "vjepa" else loss[0]).backward()
    tables = () if name.startswith("maskfeat") else ("pos_embed", "channel_embed")  # MaskFeat learns its positions
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith("target_encoder") or parameter_name.endswith(tables):
            assert not parameter.requires_grad and parameter.grad is None
        else:
            unused = (name, parameter_name) == ("mae with mask tokens", "mask_token")  # none is left for the decoder
            assert parameter.grad is not None and parameter.grad.any() != unused, parameter_name


# ---------------------------------------------------------------------------------------------------- masking and loss


def test_tokens_are_taken_and_put_back():
    x, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 3]])
    taken = common.take(x, ids)
    assert all(torch.equal(taken[b, n], x[b, ids[b, n]]) for b in range(2) for n in range(2))
    changed = common.put(x, ids, taken + 1)
    assert torch.equal(common.take(changed, ids), taken + 1) and (changed == x).all(-1).sum() == 6
    one = common.put(x, ids, torch.full((1, 1, 3), 7.0))
    assert (common.take(one, ids) == 7).all() and torch.equal(x, common.put(one, ids, taken))


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
@pytest.mark.parametrize("ratio, kept", [(0.75, 49), (0.5, 98), (0.4, 117)])
def test_masks_have_the_asked_number(masking, ratio, kept):
    visible, masked = mae.MASKS[masking](64, (14, 14), ratio, torch.Generator().manual_seed(0), "cpu")
    assert visible.shape == (64, kept) and visible.dtype == torch.int64
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1).values, torch.arange(196).expand(64, -1))
    if masking == "grid":  # a regular pattern
        keeps = torch.zeros(64, 196).scatter(1, visible, 1).view(64, 7, 2, 7, 2).sum((2, 4))
        assert ratio == 0.4 or torch.equal(keeps, torch.full_like(keeps, {0.75: 1, 0.5: 2}[ratio]))
    else:  # each sample has its own
        assert len({tuple(sorted(row)) for row in visible.tolist()}) == 64
    again = mae.MASKS[masking](64, (14, 14), ratio, torch.Generator().manual_seed(0), "cpu")
    assert torch.equal(visible, again[0]) and torch.equal(masked, again[1])


def test_the_patches_with_the_least_noise_are_visible():
    visible, masked = mae.split(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 0.5)
    assert visible.tolist() == [[1, 3]] and masked.tolist() == [[0, 2]]


@pytest.mark.parametrize("method", [mae, maskfeat])
def test_block_masks_are_blocks_and_reach_all_edges(method):
    def draw(masking):
        _, masked = method.MASKS[masking](1024, (14, 14), 0.4, torch.Generator().manual_seed(0), "cpu")
        return mask_of(masked, 196).view(1024, 14, 14)
    blocks, ratio_of = draw("block"), draw("block").mean(dim=0)
    for d in (0, 1):
        assert blocks.diff(dim=d + 1).abs().sum() < 0.5 * draw("random").diff(dim=d + 1).abs().sum()
        for near, far in ((0, 13), (1, 12)):  # as much is masked at one edge as at the other
            assert abs(ratio_of.select(d, near).mean() - ratio_of.select(d, far).mean()) < 0.03


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_equals_the_obvious_computation_and_ignores_visible_patches(norm_pix_loss):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), torch.randn(3, 3, 32, 32)
    visible, masked = random_masks(3)
    loss, pred = model(images, visible, masked)
    mask = mask_of(masked, 16)
    assert mask.sum(1).tolist() == [12] * 3
    errors = []
    for b in range(3):
        for patch in range(16):
            if mask[b, patch]:
                top, left = patch // 4 * 8, patch % 4 * 8
                target = images[b, :, top:top + 8, left:left + 8].permute(1, 2, 0).flatten()
                if norm_pix_loss:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append(((pred[b, patch] - target) ** 2).mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), atol=1e-6)
    visible = pred * (1 - mask[..., None])
    assert torch.autograd.grad(loss, pred)[0].mul(1 - mask[..., None]).abs().max() == 0 and visible.abs().max() > 0


def test_initialisation():
    model = mae.MAE("base")
    bound = math.sqrt(6 / (768 + 3 * 256))  # xavier-uniform of the flattened patch projection
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.pos_embed[:, 0].abs().max() == 0 and model.blocks[3].attn.qkv.bias.abs().max() == 0


def test_images_of_any_shape_and_channels():
    model = tiny_mae(image_size=(32, 48), channels=5)
    loss, pred = model(torch.randn(2, 5, 32, 48), *random_masks(2, (4, 6)))
    assert pred.shape == (2, 24, 320) and torch.isfinite(loss)


# ------------------------------------------------------------------------------------------------- schedule, optimizer


def test_layer_decay_and_weight_decay():
    vit = common.ViT("nano", 32, 8, pool="mean", num_classes=3)
    vit.pos_embed.requires_grad_(True)
    groups = common.parameter_groups(vit, 0.05, 0.5, no_decay=("cls_token", "pos_embed"))
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: scale[id(p)] for name, p in vit.named_parameters()}
    assert len(scale) == len(found)
    assert found["patch_embed.proj.weight"] == (0.5 ** 5, 0.05)
    assert found["pos_embed"] == found["cls_token"] == (0.5 ** 5, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == (0.5 ** 4, 0.05) and found["blocks.3.mlp.fc1.bias"] == (0.5, 0.0)
    assert found["head.weight"] == (1.0, 0.05) and found["fc_norm.weight"] == (1.0, 0.0)
    for group in common.parameter_groups(vit, 0.0):  # weight decay may rise later
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["decays"]}


PAPERS = [  # Tables 8 to 10 of MAE, 8 and 9 of MaskFeat (images, clips), the configuration of V-JEPA's ViT-L
    (mae, [], dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup=0.05, weight_decay=0.05, clip_grad=None,
                   mask_ratio=0.75, masking="random", decoder_dim=512, decoder_depth=8, decoder_heads=16,
                   norm_pix_loss=True, size="base", image_size=224, patch_size=16)),
    (mae, ["finetune"], dict(epochs=100, batch_size=1024, base_lr=5e-4, warmup=0.05, weight_decay=0.05, min_lr=1e-6,
                             layer_decay=0.65, drop_path=0.1, smoothing=0.1, randaugment=9, mixup=0.8, cutmix=1,
                             erasing=0.25, pool="mean")),
    (mae, ["finetune", "--size", "large"], dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)),
    (mae, ["linprobe"], dict(epochs=90, batch_size=16384, base_lr=0.1, weight_decay=0, min_lr=0, pool="class")),
    (maskfeat, [], dict(epochs=300, batch_size=2048, base_lr=2e-4, min_lr=1e-6, warmup=0.1, weight_decay=0.05,
                        clip_grad=0.02, mask_ratio=0.4, masking="block", target="hog", cell=8)),
    (maskfeat, ["--frames", 16], dict(batch_size=512, base_lr=8e-4, masking="cube", mask_ratio=0.4, tubelet=2)),
    (maskfeat, ["finetune"], dict(epochs=100, base_lr=2.5e-4, layer_decay=0.65, drop_path=0.1, warmup=0.2)),
    (vjepa, [], dict(steps=90_000, batch_size=3072, base_lr=6.25e-4 * 256 / 3072, start_lr=0.32, min_lr=1e-6,
                     weight_decay=0.04, final_weight_decay=0.4, momentum=0.998, final_momentum=1, stretch=1.25,
                     clip_grad=10, masking="multiblock", predictor_dim=384, predictor_depth=12, frames=16, tubelet=2,
                     size="large", target="latent", context_frames=None)),
    (vjepa, ["probe"], dict(epochs=20, batch_size=256, base_lr=1e-3, weight_decay=0.01, segments=8, views=3, warmup=0)),
]


@pytest.mark.parametrize("method, words, values", PAPERS)
def test_with_data_the_values_are_those_of_the_paper(method, words, values, monkeypatch):
    args = vars(parsed(monkeypatch, method, *words, "--data", "DIR"))
    assert {name: args[name] for name in values} == pytest.approx(values)


def falling(progress):
    """Half a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


RISES_FROM_0, RISES_FROM_HALF = [0, 0.5, 1, 0.6], [0.5, 1, 0.6, 0.2]


@pytest.mark.parametrize("task, rates, betas, weight_decay", [
    ("mae", [0, 0.5, 1, 0.5], (0.9, 0.95), 0.1), ("maskfeat", RISES_FROM_0, (0.9, 0.999), 0.1),
    ("vjepa", [0.75, 1, 0.2 + 0.8 * falling(1 / 14), 0.2 + 0.8 * falling(2 / 14)], (0.9, 0.999),
     0.3 - 0.2 * falling(4 / 16)),
    ("mae finetune", RISES_FROM_0, (0.9, 0.999), 0.1), ("mae linprobe", RISES_FROM_0, None, 0.1),
    ("maskfeat finetune", RISES_FROM_0, (0.9, 0.999), 0.1), ("vjepa probe", RISES_FROM_HALF, (0.9, 0.999), 0.3),
    ("vjepa finetune", RISES_FROM_HALF, (0.9, 0.999), 0.3)])
def test_schedules_and_the_optimizer_of_each_task(task, rates, betas, weight_decay, request, tmp_path, monkeypatch,
                                                  no_probe):
    method, tiny, where = TASKS[task]
    flags = ["--steps", 4, "--warmup", 0.5, "--base-lr", 32e-4, "--weight-decay", 0.1]  # peak: 1e-4 for a batch of 8
    flags += ["--min-lr", 2e-5] if task != "mae" else []
    flags += ["--final-weight-decay", 0.3] if method is vjepa else []
    flags += ["--layer-decay", 0.5] if "finetune" in task else []
    if task == "vjepa":
        flags += ["--start-lr", 0.5, "--stretch", 4, "--momentum", 0.5, "--final-momentum", 0.9]
    main(monkeypatch, "--data", request.getfixturevalue(where), *tiny, *flags, "--out", tmp_path, method=method)
    assert [record["lr"] for record in records(tmp_path)] == pytest.approx([1e-4 * rate for rate in rates])
    if task == "vjepa":
        momenta = [record["momentum"] for record in records(tmp_path)]
        assert momenta == pytest.approx([0.5, 0.525, 0.55, 0.575])

    optimizer = common.read_checkpoint(tmp_path / "last.pt")["optimizer"]
    for group in optimizer["param_groups"]:
        assert group["momentum"] == 0.9 if betas is None else tuple(group["betas"]) == betas
        for number in group["params"]:
            state = optimizer["state"][number]
            shape = state["momentum_buffer" if betas is None else "exp_avg"].shape
            decays = len(shape) > 1 and not (task == "mae finetune" and shape[0] == 1)  # nor class token and positions
            assert group["weight_decay"] == pytest.approx(weight_decay * decays)
            assert shape[0] != 2 or group["lr"] == pytest.approx(records(tmp_path)[-1]["lr"])  # the head of two classes
    layers = range(6) if "finetune" in task else [0]  # head, four blocks, embedding
    rates = {group["lr"] for group in optimizer["param_groups"]}
    last = records(tmp_path)[-1]["lr"]
    assert sorted(rates, reverse=True) == pytest.approx([last * 0.5 ** layer for layer in layers])


def test_ridge_probe_and_exact_accuracy():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)
    labels = torch.arange(300) % 3
    x = centres[labels] + 0.1 * torch.randn(300, 8, generator=generator)
    assert data.ridge_probe(x[:150], labels[:150], x[150:], labels[150:]) == 100
    noise = torch.randn(300, 8, generator=generator)
    assert data.ridge_probe(noise[:150], labels[:150], noise[150:], labels[150:]) < 60

    logits = torch.arange(7.0).expand(5, -1)  # class 6 is the first and class 2 the fifth
    batches = [(logits[:2], torch.tensor([6, 2])), (logits[2:], torch.tensor([1, -1, 0]))]
    found = accuracy_of(lambda x: x, batches)
    assert (found["top1"], found["top5"]) == (25, 50)  # of the four that count


def accuracy_of(function, batches):
    """`common.accuracy` of a function that has no parameters of its own."""
    model = torch.nn.Linear(1, 1)
    model.forward = function
    return common.accuracy(_args(), model, batches, last=False)


def _args(**values):
    """What the command line gives and `join_processes` adds, as far as the parts under test need it."""
    return argparse.Namespace(**{**dict(benchmark=None, rank=0, processes=1, accumulate=1, workers=0, device="cpu",
                                        precision="fp32", mean=list(data.IMAGENET_MEAN), std=list(data.IMAGENET_STD),
                                        channels=3, image_size=32), **values})


# ---------------------------------------------------------------------------------------------------------------- data


def test_every_epoch_has_each_image_once_and_processes_share_each_batch():
    args = dict(batch_size=8, steps=15, seed=3)
    parts = [list(data.step_batches(20, _args(**args, accumulate=2, rank=rank, processes=2), 0)) for rank in (0, 1)]
    whole = list(data.step_batches(20, _args(**args), 0))
    assert len(whole) == 15 and all(len(batch) == 8 for batch in whole)
    drawn = [index for batch in whole for index, _ in batch]
    assert all(sorted(drawn[i:i + 20]) == list(range(20)) for i in range(0, 120, 20))
    assert drawn[:20] != drawn[20:40] and whole != list(data.step_batches(20, _args(**{**args, "seed": 4}), 0))
    for step, batch in enumerate(whole):  # two processes with two passes each see the same batch
        assert [x for part in (2 * step, 2 * step + 1) for rank in (0, 1) for x in parts[rank][part]] == batch
    assert list(data.step_batches(20, _args(**args), 6)) == whole[6:]


def test_augmentation_depends_on_the_seed_alone():
    source = data.Photographs(True)
    args = _args(batch_size=6, steps=2, seed=1, randaugment=9.0, erasing=0.25)
    first = data.Samples(source, data.strong_augmentation(args), seed=1)
    runs = []
    for args.workers in (0, 2):
        torch.manual_seed(args.workers)
        runs.append(torch.cat([x for x, _ in data.training_loader(first, args, torch.device("cpu"), 0)]))
    assert torch.equal(*runs)
    other = data.Samples(source, data.strong_augmentation(args), seed=2)
    assert not torch.equal(first[0, 5][0], first[0, 6][0]) and not torch.equal(first[0, 5][0], other[0, 5][0])
    magnitudes = [t.magnitude for t in data.strong_augmentation(args).transforms if hasattr(t, "magnitude")]
    assert magnitudes == [27]  # of 30, as 9 of 10


@pytest.mark.parametrize("frames", [1, 4])
def test_bytes_are_normalised_on_the_device(frames):
    """With the mean and std of each channel, to the last bit as by hand; also beside files that are floats."""
    source = data.Photographs(True) if frames == 1 else data.Clips(True, frames)
    args = _args(batch_size=6, steps=1, seed=1)
    samples = data.Samples(source, data.crop_and_flip(32, (0.2, 1.0)), seed=1)
    (batch, _), = data.training_loader(samples, args, torch.device("cpu"), 0)
    (rows,), mean, std = data.step_batches(len(source), args, 0), torch.tensor(args.mean), torch.tensor(args.std)
    pixels = torch.stack([samples[row][0] for row in rows])
    assert pixels.dtype == torch.uint8 and batch.is_contiguous() and batch.dtype == torch.float32
    assert batch.shape == ((6, 3, 32, 32) if frames == 1 else (6, 1, 1, 3, 4, 32, 32))
    by_hand = (pixels.movedim(-3 if frames == 1 else -4, -1) / 255 - mean) / std
    assert torch.equal(batch.movedim(-3 if frames == 1 else -4, -1), by_hand)
    mixed, _ = data.collate([(pixels[0], 0), (pixels[1] / 255, 0)])  # files of both kinds in a batch
    assert torch.equal(mixed, pixels[:2] / 255) and data.collate([(pixels[0], 0)])[0].dtype == torch.uint8


def test_a_rectangle_is_erased_by_noise_of_the_normalised_image():
    torch.manual_seed(0)
    image, args = torch.full((3, 64, 64), 100, dtype=torch.uint8), _args(erasing=1.0)
    erased = data.Erasing(args)(image)
    changed = (erased - 100 / 255).abs().amax(0) > 1e-5
    assert 0.02 < changed.float().mean() < 0.35 and erased.dtype == torch.float32
    normalised, _ = data.examples(data.Samples([(image, 0)], lambda _: erased), [0], args, torch.device("cpu"))
    assert normalised[0][:, changed].std() == pytest.approx(1, abs=0.1)
    assert data.Erasing(_args(erasing=0.0))(image).sub(100 / 255).abs().max() < 1e-6


def test_training_and_validation_pictures_are_disjoint_regions():
    train, val = data.Photographs(True), data.Photographs(False)
    for name, a, b in zip(train.classes, train.regions, val.regions):
        whole = getattr(skimage.data, name)()
        height, width = (whole[0] if isinstance(whole, tuple) else whole).shape[:2]
        sums = (a.width + b.width, a.height) if width >= height else (a.width, a.height + b.height)
        assert sums == (width, height) and a.width * a.height > b.width * b.height
    assert train[2999][1] == 7 and np.array_equal(np.asarray(train[7][0]), np.asarray(train[7][0]))


def test_centre_crop():
    image = Image.fromarray(np.arange(3 * 64 * 96, dtype=np.uint8).reshape(64, 96, 3))
    assert data.CentreCrop((32, 40))(image).shape == (3, 32, 40)
    assert torch.equal(data.CentreCrop((64, 96))(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    image = torch.randint(0, 255, (3, 256, 256), dtype=torch.uint8)
    crop = data.CentreCrop(224)(Image.fromarray(image.permute(1, 2, 0).numpy()))
    assert torch.equal(crop, image[:, 16:240, 16:240])


def test_unreadable_images_are_replaced_in_training_and_left_out_of_tests(tmp_path, capsys):
    for i, name in enumerate(("a", "b", "c")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / name / "0.png")
    (tmp_path / "b/0.png").write_bytes((tmp_path / "a/0.png").read_bytes()[:40])
    source = data.Files(data.find_files(tmp_path, ["a", "b", "c"]))
    train, test = (data.Samples(source, data.CentreCrop(40), replace_unreadable=r) for r in (True, False))
    assert train.example(1)[0].max() == train.example(1)[1] == 2  # another image, with its own label
    assert [test.example(i)[1] for i in range(3)] == [0, -1, 2]
    train[1, 1]
    data.report_unreadable(_args(), source)
    error = capsys.readouterr().err
    assert error.count("skipped, since") == 1 and "1 of 3 files" in error


def test_many_channels_from_numpy_files(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", generator.normal(5.0, 2.0, (40, 40, 5)).astype(np.float32))
    out = tmp_path / "run"
    main(monkeypatch, "--data", tmp_path, "--channels", 5, "--out", out, "--steps", 2, *TINY_FLAGS)
    settings = common.read_checkpoint(out / "last.pt")["settings"]  # measured and stored with the run
    assert settings["mean"] == pytest.approx([5.0] * 5, abs=0.2) and settings["std"][0] < 2.5


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_learned_positions_are_interpolated_for_another_size(folder, tmp_path, monkeypatch, no_probe):
    old = tiny_maskfeat()
    torch.save({"model": old.state_dict()}, tmp_path / "old.pth")
    main(monkeypatch, "--data", folder, "--init", tmp_path / "old.pth", *MASKFEAT_FLAGS, "--image-size", 48,
         "--base-lr", 0, "--min-lr", 0, "--steps", 1, "--out", tmp_path / "new", method=maskfeat)
    table = common.read_checkpoint(tmp_path / "new/last.pt")["model"]["pos_embed"]
    assert torch.equal(table, common.resize_positions(old.pos_embed, (4, 4), (6, 6)))


def test_vit_takes_a_checkpoint_at_other_sizes_and_with_a_new_head(checkpoint):
    vit = common.ViT.load(checkpoint)
    images = torch.randn(2, 3, 32, 32)
    model = tiny_mae()
    model.load_state_dict(common.read_weights(checkpoint)[0])
    assert torch.equal(vit.tokens(images), model.tokens(images)) and vit(images).shape == (2, 128)
    classifier = common.ViT.load(checkpoint, image_size=(48, 64), pool="mean", num_classes=7)
    assert classifier(torch.randn(2, 3, 48, 64)).shape == (2, 7)
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"model": Hostile(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(common.UserError, match="evil.pt"):
        common.ViT.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------- published weights


def block_table(name, dim):
    shapes = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,),
              "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()} | {
        f"{name}.{part}.bias": shape[:1] for part, shape in shapes.items()}


def layer_table(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def vit_table(dim=128, depth=4, kernel=(8, 8), tokens=17, norm="norm"):
    """{name: shape} of a published encoder, with a class token if the number of tokens is odd."""
    table = {"pos_embed": (1, tokens, dim), **layer_table("patch_embed.proj", dim, 3, *kernel)} | layer_table(norm, dim)
    table |= {"cls_token": (1, 1, dim)} if tokens % 2 else {}
    for i in range(depth):
        table |= block_table(f"blocks.{i}", dim)
    return table


def decoder_table(dim=128, patch_size=8, tokens=17):
    """Of the decoder in mae_visualize_vit_*.pth."""
    table = {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, tokens, 512), **layer_table("decoder_embed", 512, dim),
             **layer_table("decoder_norm", 512), **layer_table("decoder_pred", 3 * patch_size ** 2, 512)}
    for i in range(8):
        table |= block_table(f"decoder_blocks.{i}", 512)
    return table


def predictor_table(dim=128, tokens=128):
    """Of the predictor in vit*.pth.tar of V-JEPA."""
    table = {"mask_tokens.0": (1, 1, 384), "mask_tokens.1": (1, 1, 384), "predictor_pos_embed": (1, tokens, 384),
             **layer_table("predictor_embed", 384, dim), **layer_table("predictor_norm", 384),
             **layer_table("predictor_proj", dim, 384)}
    for i in range(12):
        table |= block_table(f"predictor_blocks.{i}", 384)
    return table


def probe_table(dim=128, classes=2):
    """Of the attentive probes of V-JEPA."""
    block = "pooler.cross_attention_block"
    table = {"pooler.query_tokens": (1, 1, dim), **layer_table("linear", classes, dim)}
    for part, shape in {"norm1": (dim,), "xattn.q": (dim, dim), "xattn.kv": (2 * dim, dim), "xattn.proj": (dim, dim),
                        "norm2": (dim,), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}.items():
        table |= layer_table(f"{block}.{part}", *shape)
    return table


def filled(table, prefix=""):
    generator = torch.Generator().manual_seed(0)
    return {prefix + name: 0.02 * torch.randn(shape, generator=generator) for name, shape in table.items()}


def shapes(model):
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("size, dim, depth, patch", [("base", 768, 12, 16), ("large", 1024, 24, 16),
                                                     ("huge", 1280, 32, 14)])
def test_the_models_have_the_published_names_and_shapes(size, dim, depth, patch):
    tokens = 1 + (224 // patch) ** 2
    with torch.device("meta"):
        encoder, mean = vit_table(dim, depth, (patch, patch), tokens), vit_table(dim, depth, (patch, patch), tokens,
                                                                                 "fc_norm")
        assert shapes(mae.MAE(size, 224, patch)) == encoder | decoder_table(dim, patch, tokens)
        assert shapes(common.ViT(size, 224, patch, pool="mean", num_classes=1000)) == mean | layer_table(
            "head", 1000, dim)
        video = vit_table(dim, depth, (2, 16, 16), 1568)
        model = vjepa.VJEPA(size)
        assert shapes(model.encoder) == shapes(model.target_encoder) == video
        assert shapes(model.predictor) == predictor_table(dim, 1568)
        assert shapes(vjepa.AttentiveClassifier(dim, 16, 400)) == probe_table(dim, 400)


def test_published_mae_files(folder, tmp_path, monkeypatch, capsys):
    encoder, whole, tuned = (tmp_path / f"mae_{kind}_vit_nano.pth" for kind in ("pretrain", "visualize", "finetuned"))
    torch.save({"model": filled(vit_table())}, encoder)
    torch.save({"model": filled(vit_table() | decoder_table())}, whole)
    torch.save({"model": filled(vit_table(norm="fc_norm") | layer_table("head", 2, 128)),
                "args": argparse.Namespace(model="vit"), "epoch": 99}, tuned)
    vit, images, weights = common.ViT.load(encoder), torch.randn(2, 3, 32, 32), filled(vit_table())
    assert all(torch.equal(weight, weights[name]) for name, weight in vit.state_dict().items())
    assert common.ViT.load(encoder, image_size=(48, 64))(torch.randn(2, 3, 48, 64)).shape == (2, 128)
    head = filled(vit_table(norm="fc_norm") | layer_table("head", 2, 128))
    assert all(torch.equal(weight, head[name]) for name, weight in common.ViT.load(tuned).state_dict().items())

    image = next((folder / "test/coffee").glob("*.png"))
    main(monkeypatch, "show", "--init", whole, "--image", image, "--out", tmp_path / "show")
    assert (tmp_path / "show/reconstruction.png").exists()
    assert "taken for plain pixels" in capsys.readouterr().out
    main(monkeypatch, "show", "--init", whole, "--image", image, "--out", tmp_path / "show", "--norm-pix-loss")
    assert "taken for normalised pixels" in capsys.readouterr().out
    main(monkeypatch, "finetune", "--eval-only", "--init", tuned, "--data", folder, "--workers", 0, "--device", "cpu")
    assert "of 12 validation samples" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="mae_pretrain_vit_nano.pth holds an encoder alone: show needs"):
        main(monkeypatch, "show", "--image", image, "--init", encoder, "--out", tmp_path / "none")


@pytest.mark.parametrize("method, where, kernel, tokens, flags", [
    (mae, "folder", (8, 8), 17, []), (mae, "folder", (8, 8), 17, ["--encode-mask-tokens"]),
    (maskfeat, "folder", (8, 8), 17, []), (vjepa, "videos", (2, 8, 8), 128, [])])
def test_pretraining_goes_on_from_an_encoder(method, where, kernel, tokens, flags, request, tmp_path, monkeypatch,
                                             capsys, no_probe):
    """Its weights are taken, the rest is that of a new model; of V-JEPA, the target encoder is a copy."""
    weights = filled(vit_table(kernel=kernel, tokens=tokens))
    torch.save({"target_encoder" if method is vjepa else "model": weights}, tmp_path / "encoder.pth")
    main(monkeypatch, "--data", request.getfixturevalue(where), "--init", tmp_path / "encoder.pth", "--recipe", "demo",
         *flags, "--batch-size", 4, "--base-lr", 0, "--steps", 1, "--workers", 0, "--device", "cpu", "--out",
         tmp_path / "run", method=method)
    assert "encoder.pth holds an encoder alone" in capsys.readouterr().out
    after = common.read_weights(tmp_path / "run/last.pt")[0]
    for name in ("blocks.2.mlp.fc1.weight", "patch_embed.proj.bias"):
        for part in ("encoder.", "target_encoder.") if method is vjepa else ("",):
            assert torch.allclose(after[part + name], weights[name], atol=1e-6)


def test_published_vjepa_files(videos, tmp_path, monkeypatch, capsys):
    table, prefix = vit_table(kernel=(2, 8, 8), tokens=128), "module.backbone."
    torch.save({"encoder": filled(table, prefix), "predictor": filled(predictor_table(), prefix), "opt": {"state": {}},
                "target_encoder": {name: weight + 1 for name, weight in filled(table, prefix).items()},
                "scaler": None, "epoch": 300, "loss": 0.4, "batch_size": 24, "world_size": 16, "lr": 6e-4},
               tmp_path / "vit.pth.tar")
    torch.save({"classifier": filled(probe_table(), "module."), "epoch": 20}, tmp_path / "probe.pth.tar")
    target_encoder, weights = common.ViT.load(tmp_path / "vit.pth.tar").state_dict(), filled(table)
    assert all(torch.equal(weight, weights[name] + 1) for name, weight in target_encoder.items())

    monkeypatch.setattr(sys, "argv", ["vjepa.py", "--init", str(tmp_path / "vit.pth.tar")])
    args = common.parse_command_line("vjepa", None, vjepa.TASKS, vjepa.MODEL | vjepa.MASKING | vjepa.PREDICTOR)
    assert (args.predictor_dim, args.masking, args.context_frames, args.mask_group) == (384, "multiblock", None, 24)
    predictor, weights = vjepa.new_model(args).predictor.state_dict(), filled(predictor_table())
    assert all(torch.equal(weight, weights[name]) for name, weight in predictor.items())

    flags = ["--init", tmp_path / "vit.pth.tar", "--device", "cpu", "--workers", 0]
    main(monkeypatch, "show", *flags, "--image", videos / "val/darker/clip0", "--out", tmp_path, method=vjepa)
    assert (tmp_path / "tokens.png").exists()
    main(monkeypatch, "probe", "--eval-only", *flags, "--classifier", tmp_path / "probe.pth.tar", "--data", videos,
         "--segments", 2, method=vjepa)
    assert "validation samples" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="lacks pooler.query_tokens, pooler.cross"):
        main(monkeypatch, "probe", "--eval-only", *flags, "--data", videos, method=vjepa)


def test_published_maskfeat_files(folder, tmp_path, monkeypatch):
    path = tmp_path / "in1k_VIT_MaskFeat_PT_epoch_01600.pyth"
    table = vit_table(norm="pred_head.transforms.0.0") | {"mask_token": (1, 1, 128)} | layer_table(
        "pred_head.projections.0", 27, 128)
    hogs = {"hogs.0.weight_x": torch.zeros(3, 1, 3, 3), "hogs.0.weight_y": torch.zeros(3, 1, 3, 3)}
    torch.save({"epoch": 1599, "model_state": filled(table) | hogs, "optimizer_state": {}, "cfg": "TRAIN:\n"}, path)
    vit = common.ViT.load(path, pool="mean", num_classes=3, image_size=48)
    assert torch.equal(vit.blocks[3].mlp.fc2.weight, filled(table)["blocks.3.mlp.fc2.weight"])
    image = next((folder / "test/coffee").glob("*.png"))
    main(monkeypatch, "show", "--init", path, "--image", image, "--out", tmp_path / "show", method=maskfeat)
    assert (tmp_path / "show/prediction.png").exists()
    main(monkeypatch, "--init", path, "--steps", 1, *MASKFEAT_FLAGS, "--out", tmp_path / "on", "--data", folder,
         method=maskfeat)
    assert "pred_head.1.weight" in common.read_weights(tmp_path / "on/last.pt")[0]


@pytest.mark.parametrize("change, message", [
    ({"blocks.2.norm1.weight": None}, "it lacks blocks.2.norm1.weight$"),
    ({"blocks.2.gamma": (3,)}, "it has the unexpected blocks.2.gamma$"),
    ({"blocks.2.norm1.weight": (3,), "a": (1,), "b": (1,), "c": (1,), "d": (1,)},
     "the unexpected a, b, c and 1 more; it has another shape for blocks.2.norm1.weight$"),
    ({"patch_embed.proj.weight": None}, "lacks patch_embed.proj.weight and has pos_embed, patch_embed.proj.bias"),
    ({"blocks.9.norm1.weight": (128,)}, "of a size known here: it has pos_embed"),
    ({"pos_embed": None}, "has rotary positions .no pos_embed., as V-JEPA 2"),
])
def test_a_file_that_does_not_fit_is_named_in_one_sentence(change, message, tmp_path):
    table = {name: shape for name, shape in (vit_table() | change).items() if shape}
    torch.save({"model": filled(table)}, tmp_path / "other.pth")
    with pytest.raises(common.UserError, match=message):
        common.ViT.load(tmp_path / "other.pth")


# -------------------------------------------------------------------------------------------------------------- SatMAE

def series(batch=2):
    generator = torch.Generator().manual_seed(0)
    stamps = torch.tensor([[[3.0, 4, 10], [3, 5, 11], [9, 0, 23]]]).expand(batch, -1, -1)
    return torch.randn(batch, 3, 3, 32, 32, generator=generator), stamps


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_satmae_loss_equals_the_obvious_computation(norm_pix_loss):
    """In the published order of predictions: the k-th predicted band, in the order of the groups, is band k."""
    model, images = tiny_satmae(bands=GROUPS, norm_pix_loss=norm_pix_loss), torch.randn(2, 5, 32, 32)
    visible, masked = random_masks(2, (3, 4, 4))
    loss, pred = model(images, visible, masked)
    embedded = model.embed(images)
    latent = model.decoder_embed(model.encode(torch.stack([embedded[b, visible[b]] for b in range(2)])))
    x = model.mask_token.repeat(2, 48, 1)
    for b in range(2):
        x[b, visible[b]] = latent[b, 1:]
    mask = mask_of(masked, 48)
    x = torch.cat([latent[:, :1], x], dim=1) + model.decoder_positions(None)
    w = model.state_dict()
    x = norm(w, "decoder_norm", plain_blocks(w, "decoder_blocks", x, heads=2))[:, 1:].view(2, 3, 16, 48)
    outputs = [layer(w, f"decoder_pred.{g}", x[:, g]).view(2, 16, -1, 64) for g in range(3)]
    predicted = torch.cat(outputs, dim=2)  # (2, 16, 5, 64)
    total, removed = 0.0, 0
    for b in range(2):
        for token in range(16):
            row, column = 8 * (token // 4), 8 * (token % 4)
            patch = images[b, :, row:row + 8, column:column + 8].reshape(5, 64)
            if norm_pix_loss:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()  # of all bands together
            for g, group in enumerate(GROUPS):
                if mask[b, 16 * g + token]:
                    total += np.mean([(predicted[b, token, k] - patch[k]).square().mean().item() for k in group])
                    removed += 1
    assert removed == 72 and loss.item() == pytest.approx(total / removed, rel=1e-5)
    assert [p.shape for p in pred] == [(2, 16, 128), (2, 16, 64), (2, 16, 128)]


@pytest.mark.parametrize("changes", [dict(bands=GROUPS), dict(dates=3)])
@pytest.mark.parametrize("consistent", [True, False])
def test_satmae_masks_and_gradients(changes, consistent):
    model, grid = tiny_satmae(**changes), (4, 4)
    inputs = series() if "dates" in changes else (torch.randn(2, 5, 32, 32),)
    for masking in ("random", "block", "grid"):
        generator = torch.Generator().manual_seed(0)
        visible, masked = mae.masks_of_slices(masking, 3, consistent, 2, grid, 0.75, generator, "cpu")
        assert visible.shape == (2, 12)
        both = torch.cat([visible, masked], dim=1).sort(dim=1).values
        assert torch.equal(both, torch.arange(48).expand(2, -1))
        slices = mask_of(masked, 48).view(2, 3, 16)
        assert (consistent or masking == "grid") == torch.equal(slices[:, 0], slices[:, 1])  # a grid is always the same
    loss, _ = model(inputs[0], visible, masked, *inputs[1:])
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_positions_end_with_the_code_of_group_or_date():
    model = tiny_satmae(bands=GROUPS)
    positions = mae.positions_of_slices(model.pos_embed, model.channel_embed).view(3, 16, 128)
    assert torch.equal(positions[1, :, :64], common.sincos(64, (4, 4)))
    assert torch.equal(positions[2, 5, 64:], common.sincos_1d(64, torch.tensor([2]))[0].float())
    images, stamps = series()
    codes = mae.codes_of_stamps(stamps, 20)
    assert torch.equal(codes[0, 2, 20:40], common.sincos_1d(20, torch.tensor([0]))[0].float())  # month
    assert torch.equal(codes[1, 0, 40:], common.sincos_1d(20, torch.tensor([10]))[0].float())  # hour
    model = tiny_satmae(dates=3).eval()
    later = stamps + torch.tensor([1.0, 0, 0])
    assert not torch.equal(model.tokens(images, stamps), model.tokens(images, later))


def test_published_satmae_files(tmp_path):
    """Names and shapes of the published group-channel and temporal models (ViT-L, 96 and 224 pixels)."""
    groups = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
    with torch.device("meta"):
        bands, dates = (mae.SatMAE("large", size, patch, channels, **kind) for size, patch, channels, kind in (
            (96, 8, 10, dict(bands=groups)), (224, 16, 3, dict(dates=3))))
    table = vit_table(1024, 24, (8, 8), 145) | decoder_table(1024, 8, 145)
    table = {name: shape for name, shape in table.items() if not name.startswith(("patch_embed", "decoder_pred"))}
    for i, group in enumerate(groups):
        table |= {f"patch_embed.{i}.proj.weight": (1024, len(group), 8, 8), f"patch_embed.{i}.proj.bias": (1024,)}
        table |= layer_table(f"decoder_pred.{i}", 64 * len(group), 512)
    table |= {"pos_embed": (1, 145, 768), "channel_embed": (1, 3, 256), "decoder_pos_embed": (1, 145, 384),
              "decoder_channel_embed": (1, 4, 128)}
    assert shapes(bands) == table
    table = vit_table(1024, 24, (16, 16), 197) | decoder_table(1024, 16, 197)
    assert shapes(dates) == table | {"pos_embed": (1, 197, 640), "decoder_pos_embed": (1, 197, 320)}

    torch.save({"model": tiny_satmae(bands=GROUPS).state_dict()}, tmp_path / "satmae.pth")
    vit = mae.SatelliteViT.load(tmp_path / "satmae.pth", bands=GROUPS, image_size=48, num_classes=2)
    assert vit(torch.randn(1, 5, 48, 48)).shape == (1, 2)
    torch.save({"model": tiny_satmae(dates=3).state_dict(), "settings": {"dates": 3}}, tmp_path / "ours.pt")
    assert mae.SatelliteViT.load(tmp_path / "ours.pt")(*series()).shape == (2, 128)


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """Two classes of places, each seen four times: folders of TIFF files of five channels, one of them broken."""
    root, generator = tmp_path_factory.mktemp("places"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("field", "town")):
            for place in range(3):
                folder = root / split / name / str(place)
                folder.mkdir(parents=True)
                for month in range(1, 5):
                    array = generator.integers(0, 30_000, (40, 40, 5)) + 20_000 * label
                    tifffile.imwrite(folder / f"2016-{month:02}-07T1{month}.tif", array.astype(np.uint16))
    (folder.parent.parent.parent / "train/town/2/2016-01-07T11.tif").write_bytes(b"II*")
    return root


@pytest.mark.parametrize("kind", [["--bands", "0,3/2/1,4"], ["--dates", 3]])
def test_satmae_by_command_line(kind, places, tmp_path, monkeypatch, capfd):
    flags = ["--data", places, "--channels", 5, *kind, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    pretrain = [*TINY_FLAGS, "--steps", 3, "--out", tmp_path / "run", "--consistent"]
    main(monkeypatch, *pretrain, *flags)
    settings = common.read_checkpoint(tmp_path / "run/last.pt")["settings"]
    assert len(settings["mean"]) == 5 and 0.3 < settings["mean"][0] < 0.45
    assert (tmp_path / "run/reconstruction.png").exists()
    trained = ["--recipe", "demo", "--init", tmp_path / "run/last.pt", *flags[:2], "--batch-size", 4, "--workers", 0]
    main(monkeypatch, "finetune", *trained, "--steps", 2, "--out", tmp_path / "f", "--mixup", 0.8)
    main(monkeypatch, "linprobe", *trained, "--steps", 2, "--out", tmp_path / "l")
    capfd.readouterr()
    main(monkeypatch, "finetune", "--eval-only", "--init", tmp_path / "f/last.pt", "--data", places, "--workers", 0)
    assert f"of {6 if '--dates' in kind else 24} validation samples" in capfd.readouterr().out
    image = places / "val/town/1" / ("" if "--dates" in kind else "2016-02-07T12.tif")
    main(monkeypatch, "show", "--init", tmp_path / "run/last.pt", "--image", image, "--out", tmp_path / "s")
    with Image.open(tmp_path / "s/reconstruction.png") as picture:
        assert picture.height > 2.5 * picture.width / 4  # a row for each group or date, of four columns


def test_scenes_of_bands_and_dates():
    train, val = data.Scenes(True, 6, 3), data.Scenes(False, 6)
    pixels, label, stamps = train[4000]
    assert pixels.shape[:2] == (3, 6) and label == 10 and stamps.shape == (3, 3) and stamps[:, 1].max() < 12
    assert torch.equal(pixels, train[4000][0]) and not torch.equal(pixels[0], pixels[1])
    assert len(val[0]) == 2 and val[0][0].shape[0] == 6


def test_best_is_chosen_by_training_samples(folder, tmp_path, monkeypatch, capsys):
    """In every script; without labels by the rank. And checkpoints are kept every so many steps."""
    shutil.copytree(folder / "train", tmp_path / "unlabelled")
    scores, watch = iter([1.0, 3.0, 2.0] * 3), data.watch
    monkeypatch.setattr(data, "watch", lambda *rest: {"score_knn": next(scores)} | {
        name: value for name, value in watch(*rest).items() if not name.startswith("score")})
    for method, tiny in ((mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS), (vjepa, [*VJEPA_FLAGS, "--still"])):
        out = tmp_path / method.__name__
        flags = ["--data", folder, *tiny, "--steps", 3, "--probe-every", 1, "--keep-every", 2, "--out", out]
        main(monkeypatch, *flags, method=method)
        record = records(out)[1]
        assert {"spread", "rank", "knn"} <= set(record)
        assert common.read_checkpoint(out / "best.pt")["step"] == 2
        kept = sorted(path.name for path in out.glob("step-*.pt"))
        assert kept == ["step-00002.pt"] and common.read_checkpoint(out / kept[0])["step"] == 2
    monkeypatch.undo()
    used, features = [], data.features
    monkeypatch.setattr(data, "features", lambda e, samples, *rest: used.append(samples.source) or features(e, samples,
                                                                                                          *rest))
    flags = [*TINY_FLAGS, "--steps", 2, "--probe-every", 1, "--out", tmp_path / "none"]
    main(monkeypatch, "--data", tmp_path / "unlabelled", *flags)
    assert "of the highest score_rank" in capsys.readouterr().out
    record = records(tmp_path / "none")[0]
    assert record["score_rank"] == pytest.approx(record["rank"]) and (tmp_path / "none/best.pt").exists()
    main(monkeypatch, "--data", folder, *flags, "--fresh", "--keep-every", 1)
    assert (tmp_path / "none/best.old.pt").exists()
    assert [len(source) for source in used[-6:-2]] == [12, 24] * 2  # held-out, and the training samples for the score


def test_a_file_of_a_model_hub(tmp_path, monkeypatch):
    """With timm's names, as vit_base_patch16_224.mae has them."""
    weights, header, body = filled(vit_table()), {}, b""
    for name, weight in weights.items():
        raw = weight.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    try:
        __import__("safetensors.torch")
    except ImportError:  # optional: a reader in its place
        module = type(sys)("safetensors.torch")
        module.load_file = lambda path: {name: torch.frombuffer(bytearray(
            body[x["data_offsets"][0]:x["data_offsets"][1]]), dtype=torch.float32).view(x["shape"])
            for name, x in header.items()}
        monkeypatch.setitem(sys.modules, "safetensors", type(sys)("safetensors"))
        monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    vit = common.ViT.load(tmp_path / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in vit.state_dict().items())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(common.UserError, match="model.safetensors, install safetensors"):
        common.ViT.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("method, tiny, where", [(mae, TINY_FLAGS, "folder"), (vjepa, VJEPA_FLAGS, "videos")])
def test_checkpointing_keeps_less_and_changes_nothing(method, tiny, where, request, tmp_path, monkeypatch, no_probe):
    flags = ["--data", request.getfixturevalue(where), "--steps", 3, *tiny]
    main(monkeypatch, "--out", tmp_path / "plain", *flags, method=method)
    main(monkeypatch, "--out", tmp_path / "twice", *flags, "--checkpointing", method=method)
    assert losses(tmp_path / "twice") == losses(tmp_path / "plain")
    kept, model = [], tiny_mae()
    for _ in range(2):
        kept.append(0)

        def note(tensor):
            kept[-1] += tensor.nbytes
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(8, 3, 32, 32), *random_masks(8))
        common.use_checkpointing(model)
    assert kept[1] < 0.5 * kept[0]


def test_out_of_memory_is_one_sentence(monkeypatch, capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(sys, "argv", ["mae.py"])
    with pytest.raises(SystemExit) as exit:
        common.run_main(full)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and len(error.splitlines()) == 1
    assert "--checkpointing" in error and "--accumulate" in error


def test_arrays_and_tiff_files_of_any_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 65535, (40, 48, 5)).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "b.npz", array)
    tifffile.imwrite(tmp_path / "c.tif", array)
    tifffile.imwrite(tmp_path / "d.tif", array.transpose(2, 0, 1))  # a page for each channel
    np.save(tmp_path / "e.npy", array.transpose(2, 0, 1))
    np.savez(tmp_path / "f.npz", array.transpose(2, 0, 1))
    expected = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 65535
    for name in ("a.npy", "b.npz", "c.tif", "d.tif", "e.npy", "f.npz"):
        assert torch.allclose(data.read_image(tmp_path / name, 5), expected)
    with pytest.raises(ValueError, match="not 4 channels"):
        data.read_image(tmp_path / "c.tif", 4)


def test_series_of_a_place(places, tmp_path):
    folder = places / "val/field/0"
    images, stamps = data.read_series(folder, 3, 5, chosen_at_random=False)
    assert images.shape == (3, 5, 40, 40) and stamps.tolist() == [[14, 0, 11], [14, 1, 12], [14, 2, 13]]
    shutil.copytree(folder, tmp_path / "place")
    tifffile.imwrite(tmp_path / "place/2016-02-07T12.tif", np.zeros((40, 48, 5), np.uint16))
    with pytest.raises(ValueError, match="differ in size"):
        data.read_series(tmp_path / "place", 4, 5, chosen_at_random=False)
    with pytest.raises(ValueError, match="4 images, fewer than 5 dates"):
        data.read_series(folder, 5, 5, chosen_at_random=False)
    for name in ("12345678.tif", "2016-13-01.tif", "x.tif"):
        (tmp_path / "place" / name).touch()
        with pytest.raises(ValueError, match=f"{name} has no date"):
            data.read_series(tmp_path / "place", 2, 5, chosen_at_random=False)
        (tmp_path / "place" / name).unlink()
    (tmp_path / "place/S2A_20160102T235959_7.tif").write_bytes((folder / "2016-01-07T11.tif").read_bytes())
    (tmp_path / "place/2016-02-07T12.tif").unlink()
    assert [14, 0, 23] in data.read_series(tmp_path / "place", 4, 5, chosen_at_random=False)[1].tolist()


# ------------------------------------------------------------------------------------------------------- MaskFeat: HOG


def photographs(size=96):
    """Real 8-bit photographs as the model gets them: (B, 3, size, size), normalised."""
    samples = data.Samples(data.Photographs(True), data.CentreCrop(size))
    return data.examples(samples, range(0, 6000, 400), _args(), torch.device("cpu"))[0]


def hog_by_convolution(images, cell=8):
    """The definition in the plainest words: two convolutions, an angle, a sum over each cell for each bin."""
    C = images.shape[1]
    sobel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]).expand(C, 1, 3, 3)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    gx, gy = F.conv2d(padded, sobel, groups=C), F.conv2d(padded, sobel.transpose(2, 3), groups=C)
    bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long() % 9
    length = (gx ** 2 + gy ** 2).sqrt()
    sums = [F.avg_pool2d(length * (bins == k), cell) * cell ** 2 for k in range(9)]
    return F.normalize(torch.stack(sums, dim=2), dim=2)


@pytest.mark.parametrize("cell", [4, 8])
def test_hog_equals_its_definition_on_photographs(cell):
    images = photographs()
    histograms = maskfeat.hog(images, cell=cell)
    assert histograms.shape == (15, 3, 9, 96 // cell, 96 // cell)
    assert (histograms - hog_by_convolution(images, cell)).abs().max() < 1e-5
    norm = histograms.norm(dim=2)  # 0 where a cell is flat, as in the night sky
    assert torch.minimum(norm.abs(), (norm - 1).abs()).max() < 1e-5 and norm.mean() > 0.9


def test_hog_equals_scikit_image(monkeypatch):
    """skimage takes centred differences: they are replaced by the Sobel filter. It averages lengths where we add them
    up, which the norm takes out, and has the axes the other way round, so it gets the transposed image."""
    import skimage.feature
    from scipy.ndimage import sobel
    monkeypatch.setattr("skimage.feature._hog._hog_channel_gradient", lambda channel: (
        sobel(channel, 0, mode="mirror"), sobel(channel, 1, mode="mirror")))
    grey = photographs()[:, 1] + 0.01 * torch.randn(15, 96, 96, generator=torch.Generator().manual_seed(0))  # no ties
    histograms = maskfeat.hog(grey[:, None])[:, 0]  # (15, 9, 12, 12)
    for image, ours in zip(grey.double().numpy(), histograms):
        theirs = skimage.feature.hog(image.T, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2",
                                     feature_vector=False)[:, :, 0, 0]  # (columns, rows, bins)
        # A gradient at the very edge between two bins may go to either, as float32 or float64 rounds it.
        assert ((torch.from_numpy(theirs).permute(2, 1, 0) - ours).abs() > 1e-4).float().mean() < 0.005


def test_hog_targets_are_ordered_by_channel_bin_and_cell():
    images = photographs()[:2]
    targets, histograms = maskfeat.hog_targets(images), maskfeat.hog(images)
    assert targets.shape == (2, 36, 108)
    for patch, channel, bin, row, column in [(0, 0, 0, 0, 0), (8, 1, 3, 1, 0), (35, 2, 8, 0, 1)]:
        number = ((channel * 9 + bin) * 2 + row) * 2 + column
        assert torch.equal(targets[:, patch, number],
                           histograms[:, channel, bin, patch // 6 * 2 + row, patch % 6 * 2 + column])


def test_hog_under_autocast_and_compile_and_its_memory():
    images = photographs().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        histograms = maskfeat.hog(images)
    assert histograms.dtype == torch.float32 and not histograms.requires_grad
    assert torch.equal(histograms, maskfeat.hog(images.detach()))
    assert (torch.compile(maskfeat.hog)(images.detach()) - histograms).abs().max() < 1e-5

    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    code = r"""if True:
        import re, torch, maskfeat
        peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
        images = torch.randn(128, 3, 224, 224)
        maskfeat.hog(images[:1])
        before = peak()
        maskfeat.hog(images)
        print((peak() - before) / images.nbytes)"""
    done = run("-c", code)
    assert 1 < float(done.stdout) <= 4, done.stdout + done.stderr

    kept = {}  # what a step of ViT-B keeps for the backward pass: address, bytes
    model, image = maskfeat.MaskFeat("base"), images[:1].detach()

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = model(F.interpolate(image, 224), torch.arange(78)[None])
    for parameter in model.parameters():
        kept.pop(parameter.data_ptr(), None)
    assert 4 * 3 * 224 ** 2 * 4 < 0.05 * sum(kept.values())


# -------------------------------------------------------------------------------------------- MaskFeat: masks and model


@pytest.mark.parametrize("masking, grid", [("block", (14, 14)), ("random", (14, 14)), ("cube", (8, 14, 14)),
                                           ("tube", (8, 14, 14)), ("frame", (8, 14, 14)), ("random", (8, 14, 14))])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.8])
def test_maskfeat_masks_have_the_asked_number(masking, grid, ratio):
    draw = lambda seed: maskfeat.MASKS[masking](32, grid, ratio, torch.Generator().manual_seed(seed), "cpu")
    (visible, masked), L = draw(0), math.prod(grid)
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1).values, torch.arange(L).expand(32, -1))
    step = {"frame": L / 8, "tube": 8}.get(masking, 1)  # tokens that are masked together
    assert masked.dtype == torch.int64 and abs(masked.shape[1] - ratio * L) <= 0.5 * step
    assert torch.equal(masked, draw(0)[1]) and not torch.equal(masked, draw(1)[1])
    mask = mask_of(masked, L)
    assert len({tuple(row) for row in mask.tolist()}) > (1 if masking == "frame" else 30)
    by_time = mask.view(32, -1, 14 * 14)
    if masking == "tube":
        assert (by_time == by_time[:, :1]).all()
    if masking == "frame":
        assert (by_time == by_time[:, :, :1]).all()


def test_cube_masks_have_few_edges():
    def edges(masking, grid=(8, 14, 14)):
        _, masked = maskfeat.MASKS[masking](64, grid, 0.4, torch.Generator().manual_seed(0), "cpu")
        return [mask_of(masked, math.prod(grid)).view(64, *grid).diff(dim=d).abs().sum().item() for d in (1, 2, 3)]
    assert all(few < 0.5 * many for few, many in zip(edges("cube"), edges("random")))
    # A cube has sides in space, which frames have not, and in time, which tubes have not.
    assert edges("frame")[1] == 0 == edges("tube")[0] < min(edges("cube"))


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("target", ["hog", "pixels"])
def test_maskfeat_loss_equals_the_obvious_computation(frames, target):
    model = tiny_maskfeat(frames=frames, tubelet=2 if frames > 1 else 1, target=target, cell=4)
    pixels = torch.randn(3, 3, frames, 32, 32)
    masking = "cube" if frames > 1 else "block"
    _, masked = maskfeat.MASKS[masking](3, model.grid, 0.4, torch.Generator().manual_seed(0), "cpu")
    loss, pred = model(pixels if frames > 1 else pixels[:, :, 0], masked)
    errors = []
    for b in range(3):
        for n, token in enumerate(masked[b].tolist()):
            time, row, column = token // 16, token % 16 // 4, token % 4
            frame = pixels[b, :, 2 * time]  # the first of the tubelet
            if target == "hog":
                cells = hog_by_convolution(frame[None], 4)[0, :, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
                values = cells.flatten()
            else:
                patch = frame[:, 8 * row:8 * row + 8, 8 * column:8 * column + 8].permute(1, 2, 0).flatten()
                values = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((pred[b, n] - values).square().mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), atol=1e-6)


@pytest.mark.parametrize("frames", [1, 4])
def test_targets_belong_to_their_own_cell_alone(frames):
    """Change one cell, its rim aside, which the gradients of its neighbours see: only its own target changes."""
    model = tiny_maskfeat(frames=frames, tubelet=2 if frames > 1 else 1, cell=8)
    pixels = torch.randn(1, 3, *([frames] if frames > 1 else []), 32, 32)
    before = model.targets(pixels)
    for token in range(math.prod(model.grid)):
        time, row, column = token // 16, token % 16 // 4, token % 4
        changed = pixels.clone()
        frame = changed[0, :, 2 * time] if frames > 1 else changed[0]
        frame[:, 8 * row + 1:8 * row + 7, 8 * column + 1:8 * column + 7] += torch.randn(3, 6, 6)
        differs = (model.targets(changed) != before).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == [token]


# ---------------------------------------------------------------------------------------------------------------- clips

NUMBERS = [20 * i for i in range(12)]  # the shades of the frames of the test videos


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Two classes of frame folders, each with the mean shades in NUMBERS; a frame is darker on the left."""
    root = tmp_path_factory.mktemp("videos")
    for split in ("train", "val"):
        for name, shades in (("brighter", NUMBERS), ("darker", NUMBERS[::-1])):
            for copy in range(3):
                folder = root / split / name / f"clip{copy}"
                folder.mkdir(parents=True)
                for i, shade in enumerate(shades):
                    row = np.linspace(shade - 8, shade + 8, 48).clip(0, 255).astype(np.uint8)
                    Image.fromarray(np.tile(row[:, None], (40, 1, 3))).save(folder / f"frame{i}.png")
    return root


def make_video(path, frames, *options):
    """A video file of a folder of frames, 10 a second."""
    if not shutil.which("ffmpeg"):
        pytest.skip("needs ffmpeg")
    pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError))
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-framerate", "10", "-i", frames / "frame%d.png", "-qscale:v", "2",
                    *options, path], check=True)
    return path


def shades(clip):
    """The mean shade of each frame in steps of NUMBERS."""
    return (clip.float().mean((-3, -2, -1)) / 20).round().int().tolist()


@pytest.mark.parametrize("suffix", [None, "mp4", "avi", "mkv"])
def test_clips_of_videos_and_of_folders_of_frames(videos, tmp_path, suffix):
    path = videos / "train/brighter/clip0"
    if suffix:
        path = make_video(tmp_path / f"video.{suffix}", path)
    assert shades(data.read_clips(path, 4, 2, 1)[0]) == [2, 4, 6, 8]  # the middle of 12 frames
    assert shades(data.read_clips(path, 4, 2, 3)) == [[0, 2, 4, 6], [2, 4, 6, 8], [5, 7, 9, 11]]
    assert shades(data.read_clips(path, 8, 2, 1)[0]) == [0, 2, 4, 6, 8, 10, 11, 11]  # the last one is repeated
    clip = data.read_clips(path, 4, 2)
    assert clip.shape == (1, 4, 3, 40, 48) and clip.dtype == torch.uint8
    starts = {shades(data.read_clips(path, 4, 2)[0])[0] for _ in range(50)}
    assert starts == {0, 1, 2, 3, 4, 5}
    assert data.read_clips(path, 4, 2, channels=1).shape == (1, 4, 1, 40, 48)


def test_a_variable_frame_rate_keeps_the_speed(videos, tmp_path):
    """The first half of the video at 10 frames a second, the second half at 5: its frames count twice."""
    path = make_video(tmp_path / "vfr.mkv", videos / "train/brighter/clip0", "-vf",
                      "settb=1/1000,setpts='if(lt(N,6),N*100,600+(N-6)*200)'", "-fps_mode", "vfr")
    found = shades(data.read_clips(path, 6, 2, 1)[0])
    at_equal_times = [0, 2, 5, 7, 8, 9]  # of 1.8 seconds
    assert all(abs(a - b) <= 1 for a, b in zip(found, at_equal_times)), found


def test_folders_of_frames_with_gaps_grey_and_alpha(tmp_path):
    for number in (1, 2, 3, 9, 10, 11):  # a gap, and numbers that do not sort as text
        mode = {2: "L", 3: "RGBA", 9: "P"}.get(number, "RGB")
        Image.new("RGB", (40, 40), (20 * number,) * 3).convert(mode).save(tmp_path / f"{number}.png")
    assert shades(data.read_clips(tmp_path, 6, 1, 1)[0]) == [1, 2, 3, 9, 10, 11]
    Image.fromarray(np.full((40, 40), 20 * 256 + 20, np.uint16)).save(tmp_path / "1.png")  # one frame of 16 bits
    clip = data.read_clips(tmp_path, 6, 1, 1)[0]
    assert clip.dtype == torch.float32 and clip[:2].mean((1, 2, 3)).tolist() == pytest.approx([20 / 255, 40 / 255])
    (tmp_path / "3.png").write_bytes(b"broken")
    with pytest.raises(common.UserError, match="none of the files can be read"):
        data.Samples(data.Files([(tmp_path, 0)], frames=6), lambda clip: clip)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_video_is_skipped_and_named(videos, tmp_path, damage, capsys):
    make_video(tmp_path / "a.mp4", videos / "train/brighter/clip0")
    good = make_video(tmp_path / "b.mp4", videos / "train/darker/clip0").read_bytes()
    (tmp_path / "b.mp4").write_bytes({"truncated": good[:len(good) // 2], "text": b"no video", "empty": b""}[damage])
    samples = data.Samples(data.Files(data.find_files(tmp_path, clips=True), frames=4), lambda clips: clips)
    assert samples.example(1)[0].shape == (1, 1, 3, 4, 40, 48)  # the other one takes its place
    assert "b.mp4" in capsys.readouterr().err
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(common.UserError, match="none of the files can be read.*b.mp4"):
        data.Samples(data.Files(data.find_files(tmp_path, clips=True), frames=4), lambda clips: clips)


@pytest.mark.parametrize("missing", ["torchcodec", "ffmpeg"])
def test_without_torchcodec_or_ffmpeg_only_video_files_fail(videos, tmp_path, monkeypatch, missing):
    def decoder_without_ffmpeg(path):
        raise RuntimeError("Could not load libtorchcodec. Likely causes: ...")
    module = None if missing == "torchcodec" else type(sys)("torchcodec.decoders")
    if module:
        module.VideoDecoder = decoder_without_ffmpeg
    monkeypatch.setitem(sys.modules, "torchcodec", module)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(common.UserError, match="a.mp4, install torchcodec .* and FFmpeg"):
        data.Samples(data.Files([(tmp_path / "a.mp4", 0)], frames=4), lambda clips: clips)
    assert data.read_clips(videos / "train/brighter/clip0", 4, 1).shape == (1, 4, 3, 40, 48)


def test_lists_of_paths_and_labels(videos, tmp_path):
    for name in ("train", "val"):
        lines = [f"{videos}/{name}/{label}/clip{i} {label}" for label in ("darker", "brighter") for i in range(3)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    train, val, classes = data.open_sources(tmp_path, frames=4)
    assert classes == ["brighter", "darker"] and train.labels.tolist() == [1, 1, 1, 0, 0, 0] and val.segments == 1
    assert shades(val[0][0][0]) == [7, 6, 5, 4] and val[0][1] == 1
    (tmp_path / "paths.txt").write_text("a b.mp4\nc.mp4\n")
    assert [p for p, _ in data.read_list(tmp_path / "paths.txt")] == [f"{tmp_path}/a b.mp4", f"{tmp_path}/c.mp4"]
    assert data.open_sources(videos, frames=4)[2] == ["brighter", "darker"]
    assert data.open_sources(tmp_path, labelled=False, frames=4)[2] == ["brighter", "darker"]  # for the probes
    (tmp_path / "val.txt").write_text("a.mp4\n")
    assert data.open_sources(tmp_path, labelled=False, frames=4)[1:] == (None, None)
    (tmp_path / "numbers.txt").write_text("a.mp4 10\nb.mp4 9\n")
    assert data.class_names(tmp_path / "numbers.txt") == ["9", "10"]


def test_built_in_clips():
    train, val = data.Clips(True, 8), data.Clips(False, 8, length=1500)
    labels = [train[i][1] for i in range(0, 6000, 20)]
    assert len(train) == 6000 and set(labels) == set(range(len(train.classes))) == set(range(12))
    clip = train[17][0]
    assert torch.equal(clip, train[17][0]) and clip.shape == (1, 8, 3, 64, 64)
    assert not torch.equal(clip, train[18][0]) and not torch.equal(clip, val[17][0])  # a collage each
    assert data.Clips(True, 2, channels=1)[17][0].shape == (1, 2, 1, 64, 64)
    val.pictures = [Image.new("RGB", picture.size, "white") for picture in val.pictures]
    for val.speed in (1, 2):  # the camera never leaves the collage: no black corner comes in
        assert min(val[i][0].min() for i in range(0, 1500, 14)) == 255

    def change(clips):
        some = [clips[i][0][0].float() for i in range(0, 6000, 60)]
        return np.mean([(clip[0] - clip[-1]).abs().mean() for clip in some])
    assert change(data.Clips(True, 8, stride=8)) > change(train)  # the camera goes farther
    shift = {}  # a pan to the right moves the picture to the left
    for i in range(400):
        clip, label = train[i]
        clip = clip[0].float().mean(1)
        errors = [(clip[1, :, 8:-8] - clip[0, :, 8 + s:56 + s]).abs().mean() for s in range(-6, 7)]
        shift.setdefault(train.classes[label], []).append(int(torch.stack(errors).argmin()) - 6)
    assert np.median(shift["pan right"]) > 0 > np.median(shift["pan left"])


def test_labels_of_built_in_clips_cannot_be_told_from_colours():
    """Mean and std of each colour say as little of the motion as chance does, 8.3 %."""
    moments = []
    for clips in (data.Clips(True, 8, length=1200, stride=8), data.Clips(False, 8, length=600, stride=8)):
        pixels, labels = zip(*(clips[i] for i in range(len(clips))))
        pixels = torch.stack(pixels).float().transpose(2, 3).flatten(3)  # (N, 1, C, everything else)
        moments += [torch.cat([pixels.mean(3), pixels.std(3)], dim=2)[:, 0], torch.tensor(labels)]
    assert data.ridge_probe(*moments) < 12.5  # chance and four std


def test_logits_of_several_clips_are_averaged():
    torch.manual_seed(0)
    model = maskfeat.Classifier("nano", 32, 8, frames=4, tubelet=2, num_classes=6, pool="mean")
    clips = torch.randn(2, 1, 5, 3, 4, 32, 32)
    each = [model(clips[:, 0, segment]) for segment in range(5)]
    assert torch.allclose(model(clips), sum(each) / 5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- V-JEPA


def literal_masks(batch, grid, blocks, scale, seed, context_times):
    """The published rule, a clip and a block at a time, with the random numbers that ours takes."""
    times, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    aspect = 0.75 + torch.rand((), generator=generator).item() * (1.5 - 0.75)
    area = int(rows * columns * scale)
    height = min(int(round(math.sqrt(area * aspect))), rows)
    width = min(int(round(math.sqrt(area / aspect))), columns)
    clips = [None] * batch
    while None in clips:
        place = torch.rand(2, batch, blocks, 1, 1, generator=generator)
        for b in range(batch):
            if clips[b] is None:
                context = np.ones(grid, bool)
                for k in range(blocks):
                    top, left = (int(u * (n - side + 1)) for u, n, side in zip(
                        place[:, b, k, 0, 0].tolist(), (rows, columns), (height, width)))
                    context[:, top:top + height, left:left + width] = False
                context[context_times:] = False
                if context.any():
                    clips[b] = [np.flatnonzero(context), np.flatnonzero(~context)]
    return [np.stack([ids[:min(map(len, lists))] for ids in lists]) for lists in zip(*clips)]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("context_times", [8, 3])
def test_vjepa_masks_equal_the_published_rule(kind, context_times):
    """Equal lists in every batch, so their lengths have the same mean and spread too."""
    blocks, scale = vjepa.MASKS["multiblock"][kind]
    lengths = []
    for step in range(1000):
        seed, grid = common.derive_seed(0, common.MASK_SEED, step), (8, 14, 14)
        literal = literal_masks(4, grid, blocks, scale, seed, context_times)
        generator = torch.Generator().manual_seed(seed)
        size = vjepa.block_size(grid, scale, generator)
        ours = vjepa.multiblock_mask(4, grid, blocks, size, generator, "cpu", context_times)
        assert all(np.array_equal(a, b) for a, b in zip(ours, literal))
        lengths.append([ids.shape[1] for ids in ours])
    assert np.std(lengths, axis=0).min() > 10  # the lengths do change


@pytest.mark.parametrize("masking", ["multiblock", "block", "tube"])
@pytest.mark.parametrize("context_frames", [None, 6])
def test_vjepa_masks_are_pairs_in_raster_order(masking, context_frames):
    grid, args = (8, 6, 6), mask_args(masking=masking, mask_ratio=0.9, context_frames=context_frames, batch_size=16,
                                      mask_group=16)
    for step in range(20):
        lists = vjepa.draw_masks(args, grid, step, slice(0, 16), "cpu")
        assert len(lists[0]) == len(lists[1]) == (2 if masking == "multiblock" else 1)
        for visible, masked in zip(*lists):
            assert (visible.diff(dim=1) > 0).all() and (masked.diff(dim=1) > 0).all()
            assert visible.shape[1] > 0
            both = torch.cat([visible, masked], dim=1)
            assert all(len(set(row)) == len(row) for row in both.tolist()) and both.max() < 8 * 36
            assert len({tuple(row) for row in visible.tolist()}) > 1  # blocks are drawn for each clip
            assert (visible < 3 * 36).all() or not context_frames
            assert masking != "tube" or visible.shape[1] == 3 * (context_frames or 16) // 2  # of 36 patches a frame


def test_vjepa_masks_do_not_depend_on_the_processes():
    args = mask_args(batch_size=16, mask_group=8)
    for groups in (mask_args(batch_size=16, mask_group=8), mask_args(batch_size=16, mask_group=11)):
        visible, masked = vjepa.draw_masks(groups, (4, 6, 6), 3, slice(8, 16), "cpu")
        for start in (8, 12):  # two processes share a group
            rows = vjepa.draw_masks(args, (4, 6, 6), 3, slice(start, start + 4), "cpu")
            for mine, whole in zip(rows[0] + rows[1], visible + masked):
                assert torch.equal(mine, whole[start - 8:start - 4])
    first, second = (vjepa.draw_masks(args, (4, 6, 6), 3, slice(start, start + 8), "cpu")[0][0] for start in (0, 8))
    assert first.shape != second.shape or not torch.equal(first, second)  # other groups have other masks
    heights = {vjepa.draw_masks(mask_args(batch_size=64, mask_group=1, masking="block"), (2, 9, 9), 0, slice(i, i + 1),
                                "cpu")[1][0].shape[1] for i in range(32)}
    assert len(heights) == 1  # a single block: its size is that of the step, also in other groups


@pytest.mark.parametrize("target", ["latent", "pixels"])
def test_vjepa_loss_equals_the_obvious_computation(target):
    model, clips = noisy(tiny_vjepa(target=target)), torch.randn(3, 3, 4, 32, 32).double()
    (visible, masked), w = tiny_masks(3), model.state_dict()
    features = plain_encoder(part_of(w, "target_encoder."), clips)
    by_kind = []
    for kind in (0, 1):
        context = plain_encoder(part_of(w, "encoder."), clips, visible[kind])
        pred = plain_predictor(part_of(w, "predictor."), context, visible[kind], masked[kind], kind)
        errors = []
        for b in range(3):
            for token, value in zip(masked[kind][b].tolist(), pred[b]):
                if target == "latent":
                    wanted = features[b, token]
                    errors.append(((wanted - wanted.mean()) / (wanted.var(unbiased=False) + 1e-5).sqrt() - value).abs())
                else:
                    time, row, column = token // 16, token % 16 // 4, token % 4
                    wanted = clips[b, :, 2 * time:2 * time + 2, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
                    wanted = wanted.permute(1, 2, 3, 0).flatten()
                    errors.append(((wanted - wanted.mean()) / (wanted.var() + 1e-6).sqrt() - value) ** 2)
        by_kind.append(torch.stack(errors).mean())
    assert model(clips, visible, masked).item() == pytest.approx(sum(by_kind).item() / 2, rel=1e-5)
    targets = model.targets(clips)
    assert targets.mean(-1).abs().max() < 1e-5 and targets.var(-1).sub(1).abs().max() < 0.02


def test_the_target_encoder_follows_in_the_run_and_its_features_are_evaluated(videos, tmp_path, monkeypatch, no_probe):
    ends, logs = {}, {}
    for momentum in (0, 0.5, 1):
        out = tmp_path / str(momentum)
        flags = ["--momentum", momentum, "--final-momentum", momentum, "--steps", 3 if momentum == 1 else 1]
        main(monkeypatch, "--data", videos, *VJEPA_FLAGS, *flags, "--warmup", 0, "--probe-every", 1, "--out", out,
             method=vjepa)
        weights, logs[momentum] = common.read_checkpoint(out / "last.pt")["model"], records(out)
        parts = [part_of(weights, name).values() for name in ("encoder.", "target_encoder.")]
        ends[momentum] = [torch.cat([weight.flatten() for weight in part]) for part in parts]
    start = ends[1][1]
    assert torch.equal(*ends[0]) and not torch.allclose(ends[0][0], start)
    assert torch.allclose(ends[0.5][1], (start + ends[0.5][0]) / 2, atol=1e-7)
    assert len({record["spread"] for record in logs[1]}) == 1  # where it stays, so do the metrics
    assert logs[1][0]["spread"] != logs[0][0]["spread"]


def test_segments_are_attended_together_and_views_averaged():
    torch.manual_seed(0)
    model = vjepa.Classifier(common.ViT("nano", 32, 8, frames=4, tubelet=2, class_token=False), 5)
    clips = torch.randn(2, 3, 4, 3, 4, 32, 32)  # (B, views, segments, C, T, H, W)
    logits = [model.classifier(torch.cat([model.encoder.tokens(clips[:, view, s]) for s in range(4)], dim=1))
              for view in range(3)]
    probabilities = sum(x.softmax(-1) for x in logits) / 3
    assert torch.allclose(model(clips).exp(), probabilities, atol=1e-6)
    assert torch.allclose(model(clips[:, :1]), logits[0], atol=1e-6)


def test_views_cover_the_longer_side_and_stills_repeat():
    clip = torch.arange(48).repeat(3, 2, 3, 32, 1).byte()  # (segments, T, C, 32, 48): the column is the value
    views = data.CentreCrop(32, views=3)(clip)
    assert views.shape == (3, 3, 2, 3, 32, 32)
    assert views[:, 0, 0, 0, 0, 0].tolist() == [0, 8, 16]
    assert data.CentreCrop(32)(clip).shape == (3, 2, 3, 32, 32)
    still = data.repeated(data.CentreCrop(32)(Image.new("RGB", (40, 40), (255, 0, 0))), 4)
    assert still.shape == (1, 4, 3, 32, 32) and (still[:, :, 0] == 255).all()


def test_neighbours_spread_and_rank():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    centres = 3 * torch.randn(3, 8, generator=generator)
    x = centres[labels] + 0.1 * torch.randn(90, 8, generator=generator)
    assert data.nearest_neighbours(x, labels) == 100
    assert data.nearest_neighbours(torch.randn(90, 8, generator=generator), labels) < 60
    pairs = torch.tensor([[1.0, 0], [1.01, 0.1], [-1, 0], [-1.01, 0.1]])
    assert data.nearest_neighbours(pairs, torch.tensor([0, 1, 0, 1]), neighbours=1) == 0  # the sample itself is none
    flat = torch.randn(4000, 3, generator=generator) @ torch.linalg.qr(torch.randn(8, 3, generator=generator))[0].T
    spread, rank = data.spread_and_rank(flat)
    assert rank == pytest.approx(3, rel=0.01) and spread == pytest.approx(1, rel=0.01)
    assert data.spread_and_rank(100 * (flat + 3))[0] == pytest.approx(math.sqrt(3 / 8 / (3 / 8 + 9)), rel=0.05)
    spread, rank = data.spread_and_rank(torch.ones(50, 8))
    assert spread == 0 and rank < 1.01


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alike_blocks_share_a_graph_for_all_lengths(checkpointing, monkeypatch):
    torch.compiler.reset()
    graphs, lengths, model = [], set(), tiny_vjepa()

    def count(graph, inputs):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    names = list(model.state_dict())
    common.compile_blocks(model)
    if checkpointing:
        common.use_checkpointing(model)
    assert list(model.state_dict()) == names
    for step in range(8):
        masks = tiny_masks(4, step=step)
        lengths.add(tuple(ids.shape[1] for ids in masks[0] + masks[1]))
        with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
            model(torch.randn(4, 3, 4, 32, 32), *masks).backward()
    assert len(lengths) > 4 and 3 <= len(graphs) <= 5  # of both encoders and the predictor, some twice


def test_a_collapse_is_noticed(tmp_path, monkeypatch, capsys):
    """Momentum 0 and a predictor that learns nothing: all features become the same."""
    new_model = vjepa.new_model

    def without_predictor(args):
        model = new_model(args)
        model.predictor.requires_grad_(False)
        return model
    monkeypatch.setattr(vjepa, "new_model", without_predictor)
    flags = ["--momentum", 0, "--stretch", 1000, "--steps", 120, "--probe-every", 40, "--probe-samples", 20]
    main(monkeypatch, *flags, "--base-lr", 4, *VJEPA_FLAGS, "--out", tmp_path / "run", method=vjepa)
    error = capsys.readouterr().err
    assert "the features collapse" in error and "raise --momentum" in error


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("method, tiny", [(mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS)])
def test_tasks_on_images_by_command_line(method, tiny, folder, tmp_path, monkeypatch, capsys):
    def printed(*arguments):
        main(monkeypatch, *arguments, "--device", "cpu", "--workers", 0, method=method)
        return "".join(capsys.readouterr())

    init = tmp_path / "run/last.pt"
    report = printed("--data", folder, "--out", tmp_path / "run", "--steps", 2, *tiny, "--masking", "block")
    assert "before training" in report and "1 of 24 files" in report and len(losses(tmp_path / "run")) == 2
    flags = ["--recipe", "demo", "--data", folder, "--init", init, "--batch-size", 8]
    strong = ["--mixup", 0.8, "--cutmix", 1, "--randaugment", 9, "--erasing", 0.25, "--drop-path", 0.1]
    report = printed("finetune", *flags, *strong, "--out", tmp_path / "f", "--epochs", 1, "--image-size", "32x40")
    record = records(tmp_path / "f")[-1]
    assert {"step", "loss", "lr", "top1", "top5"} <= set(record) and f"top-1 {record['top1']:.2f}" in report
    report = printed("finetune", "--eval-only", "--data", folder, "--init", tmp_path / "f/last.pt")
    assert f"top-1 {record['top1']:.2f}" in report

    image = next((folder / "test/coffee").glob("*.png"))
    printed("show", "--init", init, "--image", image, "--out", tmp_path / "s")
    picture, = (tmp_path / "s").glob("*.png")
    assert Image.open(picture).size == (4 * 224 + 5 * 4, 224 + 2 * 4)
    if method is mae:
        printed("linprobe", *flags, "--out", tmp_path / "l", "--steps", 3)
        before, after = common.read_weights(init)[0], common.read_weights(tmp_path / "l/last.pt")[0]
        assert torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])  # frozen
        names = {name for name in after if name.startswith("head.0")}  # nothing of BatchNorm is learned
        assert names == {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        assert after["head.1.weight"].shape == (2, 128)


@pytest.mark.parametrize("method, tiny, where", [
    *RUNS, (mae, FINETUNE_FLAGS, "folder"), (mae, [*TINY_FLAGS, "--precision", "fp16"], "folder")])
def test_a_run_goes_on_where_a_signal_stopped_it_and_ends_the_same(method, tiny, where, request, tmp_path, monkeypatch):
    flags = ["--data", request.getfixturevalue(where), "--steps", 5, "--save-every", 10, *tiny]
    main(monkeypatch, "--out", tmp_path / "whole", *flags, method=method)
    log = common.Run.log

    def interrupt(run, **values):
        log(run, **values)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(common.Run, "log", interrupt)
        main(patch, "--out", tmp_path / "parts", *flags, method=method)
    assert exit.value.code == 143 and common.read_checkpoint(tmp_path / "parts/last.pt")["step"] == 3
    main(monkeypatch, "--out", tmp_path / "parts", *flags, method=method)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5
    ends = [common.read_weights(tmp_path / name / "last.pt")[0] for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_best_score_and_the_scale_of_fp16_survive_a_restart(folder, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(data, "watch", lambda *rest: {"score_knn": next(scores)})
    flags = ["--data", folder, "--probe-every", 1, "--save-every", 1, "--steps", 3, *TINY_FLAGS, "--precision", "fp16",
             "--out", tmp_path]
    main(monkeypatch, *flags)
    (tmp_path / "last.pt").unlink()  # what is left, previous.pt, is of step 2
    before = common.read_checkpoint(tmp_path / "previous.pt")
    before["scaler"]["scale"] = 1024.0
    torch.save(before, tmp_path / "previous.pt")
    main(monkeypatch, *flags)
    assert common.read_checkpoint(tmp_path / "best.pt")["step"] == 1
    assert common.read_checkpoint(tmp_path / "last.pt")["scaler"]["scale"] == 1024


@pytest.mark.parametrize("method, flags", [
    (mae, TINY_FLAGS), (maskfeat, [*MASKFEAT_FLAGS, "--min-lr", 0]),
    (vjepa, [*VJEPA_FLAGS, "--still", "--min-lr", 0, "--momentum", 1])])
def test_masks_go_by_seed_and_step(method, flags, tmp_path, monkeypatch, no_probe):
    """Of one grey picture and a model that does not learn, the losses differ by the masks alone."""
    (tmp_path / "grey").mkdir()
    for i in range(8):
        Image.new("RGB", (40, 40), (100,) * 3).save(tmp_path / f"grey/{i}.png")
    flags = ["--data", tmp_path / "grey", *flags, "--base-lr", 0]
    main(monkeypatch, *flags, "--steps", 1, "--out", tmp_path / "start", method=method)
    flags += ["--init", tmp_path / "start/last.pt", "--steps", 9]
    for seed in (0, 1):
        main(monkeypatch, *flags, "--seed", seed, "--out", tmp_path / str(seed), method=method)
    assert len(set(losses(tmp_path / "0") + losses(tmp_path / "1"))) == 18


FINETUNES = ["--smoothing 0.5", "--erasing 1", "--randaugment 9", "--drop-path 0.5"]


@pytest.mark.parametrize("task, flags", [  # those that the other tests of runs do not see
    ("mae", ["--masking block", "--mask-ratio 0.5", "--no-norm-pix-loss", "--encode-mask-tokens", "--measure",
             "--mean 0 0 0 --std 1 1 1"]),
    ("maskfeat", ["--masking block", "--mask-ratio 0.5", "--target pixels", "--cell 4", "--no-flip"]),
    ("vjepa", ["--masking tube", "--context-frames 2", "--target pixels", "--no-flip", "--stride 1"]),
    ("mae finetune", [*FINETUNES, "--pool class", "--mixup 0.8", "--cutmix 1"]), ("mae linprobe", ["--pool class"]),
    ("maskfeat finetune", [*FINETUNES, "--mixup 0.8", "--no-flip"]), ("vjepa probe", ["--flip", "--randaugment 9"]),
    ("vjepa finetune", FINETUNES)])
def test_flags_change_the_run(task, flags, request, tmp_path, monkeypatch, no_probe):
    method, tiny, where = TASKS[task]
    ends = []
    for flag in ["", *flags]:
        main(monkeypatch, "--data", request.getfixturevalue(where), *tiny, "--steps", 2, "--warmup", 0, *flag.split(),
             "--out", tmp_path, "--fresh", method=method)
        weights = common.read_checkpoint(tmp_path / "last.pt")["model"]
        ends.append(torch.cat([weights[name].flatten() for name in sorted(weights)]))
    for flag, end in zip(flags, ends[1:]):
        assert end.shape != ends[0].shape or not torch.equal(end, ends[0]), flag


@pytest.mark.parametrize("task", [task for task in TASKS if " " in task])
def test_the_accuracy_of_a_classifier_is_that_of_its_weights(task, seven, tmp_path, monkeypatch):
    """By plain functions, on training images, which it learns, and on validation images, which no one could."""
    method, tiny, _ = TASKS[task]
    flags = ["--drop-path", 0.3] if "finetune" in task else []  # not in tests
    main(monkeypatch, "--data", seven, *tiny, *flags, "--steps", 40, "--out", tmp_path, method=method)
    w = common.read_checkpoint(tmp_path / "last.pt")["model"]

    def accuracies(split):
        paths = sorted(seven.glob(f"{split}/*/*.png"))
        labels = torch.tensor([int(path.parent.name[-1]) for path in paths])
        pixels = torch.stack([data.CentreCrop(32)(Image.open(path)) for path in paths]) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (data.IMAGENET_MEAN, data.IMAGENET_STD))
        pixels = (pixels - mean) / std
        if method is vjepa:
            clips = pixels[:, :, None].expand(-1, -1, 4, -1, -1)
            logits = plain_probe(part_of(w, "classifier."), plain_encoder(part_of(w, "encoder."), clips))
        else:
            x = norm(w, "fc_norm", plain_encoder(w, pixels)[:, 1:].mean(dim=1))
            if task == "mae linprobe":
                x = (x - w["head.0.running_mean"]) / (w["head.0.running_var"] + 1e-6).sqrt()
            logits = layer(w, "head.1" if task == "mae linprobe" else "head", x)
        right = logits.topk(5).indices == labels[:, None]
        return [100 * right[:, :k].any(dim=1).double().mean().item() for k in (1, 5)]
    assert accuracies("train")[0] > 70
    assert accuracies("val") == pytest.approx([records(tmp_path)[-1][name] for name in ("top1", "top5")])


@pytest.mark.parametrize("method, tiny", [(mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS),
                                          (vjepa, [*VJEPA_FLAGS, "--still"])])
def test_probes_are_fitted_on_training_images_and_tested_on_others(method, tiny, seven, tmp_path, monkeypatch, capsys):
    """Training images are told by their colour, validation images cannot be told."""
    encoders, print_probe = {}, data.print_probe
    monkeypatch.setattr(data, "print_probe", lambda found, *rest: encoders.update(found) or print_probe(found, *rest))
    main(monkeypatch, "--data", seven, *tiny, "--steps", 1, "--warmup", 0, "--out", tmp_path, method=method)
    batch = torch.randn(2, 3, *[4] * (method is vjepa), 32, 32)
    assert not torch.equal(*(encode(batch) for encode in encoders.values()))
    accuracy = re.search(r"chance 14.3 %, .* % before training, (.*) % after", capsys.readouterr().out)[1]
    assert float(accuracy) < 40
    assert records(tmp_path)[0]["knn"] < 40 and records(tmp_path)[0]["score_knn"] > 90


@pytest.mark.parametrize("task", TASKS)
def test_augmentation_goes_by_the_seed(task, folder, tmp_path, monkeypatch, no_probe):
    """All images are the same one, so that batches differ by the augmentation alone."""
    for name, i in itertools.product(("train/a", "train/b", "val/a", "val/b"), range(4)):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "test/coffee/4.png", tmp_path / "images" / name / f"{i}.png")
    method, tiny, _ = TASKS[task]
    seen, patch_embed = {0: [], 1: []}, common.PatchEmbed.forward
    monkeypatch.setattr(common.PatchEmbed, "forward", lambda embed, pixels: (
        seen[seed].append(pixels) or patch_embed(embed, pixels)))
    for seed in seen:
        main(monkeypatch, "--data", tmp_path / "images", *tiny, *["--still"] * (task == "vjepa"), "--steps", 1,
             "--seed", seed, "--out", tmp_path / str(seed), method=method)
    assert seen[0][0].shape == seen[1][0].shape and not torch.equal(seen[0][0], seen[1][0])


def test_drop_path_and_mixup_are_drawn_by_process(folder, tmp_path, monkeypatch):
    seeds, join_processes, forward = {0: set(), 1: set()}, mae.join_processes, common.ViT.forward

    def note(model, pixels):
        seeds[rank].update([torch.initial_seed()] * model.training)
        return forward(model, pixels)
    monkeypatch.setattr(common.ViT, "forward", note)
    for rank in seeds:
        def join(args):
            device, args.rank = join_processes(args), rank
            return device
        monkeypatch.setattr(mae, "join_processes", join)
        main(monkeypatch, "--data", folder, "--steps", 2, "--out", tmp_path, "--fresh", *FINETUNE_FLAGS)
    assert len(seeds[0]) == len(seeds[1]) == 2 and len(seeds[0] | seeds[1]) == 4  # and each step has its own


def test_signals_crashes_and_a_full_disk_lose_nothing(folder, tmp_path, monkeypatch):
    """A run of 60 steps, in epochs of 3, with two workers, stopped in four ways and each time started again."""
    flags = ["--data", folder, "--steps", 60, "--save-every", 4, *TINY_FLAGS, "--workers", 2]
    main(monkeypatch, "--out", tmp_path / "whole", *flags)
    out = tmp_path / "parts"
    for number, code, step in ((signal.SIGTERM, 143, 5), (signal.SIGKILL, -9, 20), (signal.SIGINT, 130, 30)):
        process = start("mae.py", "--out", out, *flags)
        wait_for_step(out, step, process)
        os.killpg(process.pid, number)  # the workers get it as well, as from a terminal or a cluster
        finish(process)
        assert process.returncode == code, process.stderr
        saved = common.read_checkpoint(out / "last.pt")["step"]
        assert saved == len(losses(out)) if code > 0 else saved % 4 == 0
        assert "Traceback" not in process.stderr and ("goes on from" in process.stderr) == (code > 0)

    before, size = (out / "last.pt").read_bytes(), (out / "last.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # no file may grow beyond half a checkpoint
    with pytest.raises(common.UserError, match="last.pt could not be written"):
        main(monkeypatch, "--out", out, *flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.partial"))

    main(monkeypatch, "--out", out, *flags)
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 60
    ends = [common.read_weights(path / "last.pt")[0] for path in (tmp_path / "whole", out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_second_interrupt_ends_a_run_at_once(tmp_path):
    code = ("import common, sys, time, torch; from argparse import Namespace\n"
            "args = Namespace(benchmark=None, steps=9, batch_size=1, rank=0, processes=1, fresh=False, data=None,\n"
            f"                 settings=[], out={str(tmp_path)!r})\n"
            "model = torch.nn.Linear(1, 1)\n"
            "run = common.Run(args, model, torch.optim.AdamW(model.parameters()), None)\n"
            "print('ready', flush=True)\n"
            "while not run.signal: time.sleep(0.01)\n"
            "print('noted', flush=True)\n"
            "while True: time.sleep(0.01)")  # a step without an end
    process = start("-c", code)
    assert process.stdout.readline().startswith("step 0 of 9")
    for line in ("ready\n", "noted\n"):
        assert process.stdout.readline() == line
        os.killpg(process.pid, signal.SIGINT)
    assert finish(process).returncode == -signal.SIGINT


def test_an_unexpected_error_ends_the_workers_too(tmp_path):
    code = ("import common, mae, sys\n"
            f"sys.argv = ['mae.py', '--steps', '9', '--workers', '2', '--device', 'cpu', '--out', {str(tmp_path)!r}]\n"
            "common.Run.step_done = lambda *_: 1 / 0\n"
            "common.run_main(mae.main)")
    done = run("-c", code)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("damage", ["cut", "one bit", "hostile", "missing"])
def test_a_broken_checkpoint_is_put_aside_and_the_one_before_used(damage, checkpoint, folder, tmp_path, monkeypatch,
                                                                  capsys):
    out = tmp_path / "run"
    flags = ["--data", folder, "--steps", 3, "--save-every", 1, *TINY_FLAGS, "--out", out]
    main(monkeypatch, *flags)
    before, whole = losses(out), (out / "last.pt").read_bytes()
    assert common.read_checkpoint(out / "previous.pt")["step"] == 2
    if damage == "cut":
        (out / "last.pt").write_bytes(whole[:len(whole) // 2])
    elif damage == "one bit":
        middle = len(whole) // 2
        (out / "last.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    elif damage == "hostile":
        torch.save({"model": Hostile(tmp_path / "executed")}, out / "last.pt")
    else:
        (out / "last.pt").unlink()
    damaged = (out / "last.pt").read_bytes() if damage != "missing" else None
    capsys.readouterr()
    main(monkeypatch, *flags)
    printed = capsys.readouterr()
    assert "step 2 of 3" in printed.out and losses(out) == before and not (tmp_path / "executed").exists()
    assert common.read_checkpoint(out / "last.pt")["step"] == 3
    if damaged:
        assert "last.pt is broken" in printed.err and "previous.pt" in printed.err
        assert (out / "last.broken.pt").read_bytes() == damaged
        for name in ("last.pt", "previous.pt"):
            (out / name).write_bytes(damaged)
        with pytest.raises(common.UserError, match="no other to go on from|previous.pt is broken"):
            main(monkeypatch, *flags)


def test_fresh_keeps_the_old_run(folder, tmp_path, monkeypatch):
    flags = ["--data", folder, "--save-every", 1, *TINY_FLAGS, "--out", tmp_path]
    main(monkeypatch, *flags, "--steps", 3)
    old = {name: (tmp_path / f"{name}.pt").read_bytes() for name in ("last", "previous")}
    main(monkeypatch, *flags, "--steps", 2, "--fresh")
    assert len(losses(tmp_path)) == 2
    assert {name: (tmp_path / f"{name}.old.pt").read_bytes() for name in old} == old


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite(precision, folder, tmp_path, monkeypatch):
    """It stops a run before anything is saved; in fp16 the step is skipped."""
    forward, steps = mae.MAE.forward, []

    def overflow(model, *arguments, **options):
        loss, pred = forward(model, *arguments, **options)
        steps.append(loss)
        return loss * (math.inf if len(steps) == 4 else 1), pred
    monkeypatch.setattr(mae.MAE, "forward", overflow)
    flags = ["--data", folder, "--steps", 8, "--save-every", 3, *TINY_FLAGS, "--log-every", 2, "--out", tmp_path]
    if precision == "fp16":
        main(monkeypatch, *flags, "--precision", "fp16")
        checkpoint = common.read_checkpoint(tmp_path / "last.pt")
        logged = losses(tmp_path)  # at the steps 2, 3, 4, 6, 8
        assert checkpoint["step"] == 8 and logged.pop(2) is None and np.isfinite(logged).all() and len(logged) == 4
        assert checkpoint["scaler"]["scale"] == 2.0 ** 15  # halved once
        assert checkpoint["optimizer"]["state"][0]["step"] == 7
    else:
        with pytest.raises(common.UserError, match="the loss of step 4 is not finite, at a learning rate of about 0.0"):
            main(monkeypatch, *flags)
        assert common.read_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    main(monkeypatch, "--data", folder, "--out", tmp_path, "--steps", 2, *TINY_FLAGS)
    before, step_done = (tmp_path / "last.pt").read_bytes(), common.Run.step_done

    def spoil(self, *arguments, **values):
        torch.nn.init.constant_(self.model.norm.bias, math.nan)
        step_done(self, *arguments, **values)
    monkeypatch.setattr(common.Run, "step_done", spoil)
    with pytest.raises(common.UserError, match="step 1 made weights that are not finite"):
        main(monkeypatch, "--data", folder, "--out", tmp_path / "other", "--steps", 1, *TINY_FLAGS)
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "other/last.pt").exists()


@pytest.mark.parametrize("task", TASKS)
def test_processes_and_accumulation_do_not_change_the_run(task, request, tmp_path, monkeypatch, no_probe):
    """Nor both together. The gradients are compared too, since AdamW makes the same step of twice the gradient."""
    method, tiny, where = TASKS[task]
    flags = ["--data", request.getfixturevalue(where), "--steps", 4, *tiny, "--clip-grad", 1000]
    main(monkeypatch, "--out", tmp_path / "one", *flags, method=method)
    main(monkeypatch, "--out", tmp_path / "four", "--accumulate", 4, *flags, method=method)
    names = ["four"] if task != "mae linprobe" else []  # whose BatchNorm sees a micro-batch
    if task in ("mae", "maskfeat", "vjepa", "mae finetune"):
        words = [task.split()[-1]] if " " in task else []
        flags = ["--accumulate", 2, "--out", tmp_path / "two", *[word for word in flags if word not in words]]
        done = run(f"{method.__name__}.py", *words, *flags, processes=2)
        assert done.returncode == 0, done.stderr
        names.append("two")
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        wanted = gradients(tmp_path / "one")
        assert (gradients(tmp_path / name) - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_is_clipped(task, precision, request, tmp_path, monkeypatch, no_probe):
    """Of V-JEPA that of the encoder and of the predictor, each by itself; in fp16 without its scale."""
    method, tiny, where = TASKS[task]
    main(monkeypatch, "--data", request.getfixturevalue(where), "--steps", 1, *tiny, "--warmup", 0, "--clip-grad", 1e-4,
         "--precision", precision, "--out", tmp_path, method=method)
    average = {"vjepa": 0.1 * math.sqrt(2), "mae linprobe": 1}.get(task, 0.1)
    assert gradients(tmp_path).norm().item() == pytest.approx(1e-4 * average, rel=0.01)


def test_torchrun_starts_a_killed_process_again(folder, tmp_path, monkeypatch, capsys):
    """Two processes, one of them killed in the middle, give the losses of one process, each step written once."""
    flags = ["--data", folder, "--steps", 30, "--save-every", 4, *TINY_FLAGS]
    main(monkeypatch, "--out", tmp_path / "one", *flags)
    process = start("mae.py", "--out", tmp_path / "two", *flags, processes=2, restarts=2)
    wait_for_step(tmp_path / "two", 9, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert finish(process).returncode == 0 and len(children) == 2, process.stderr
    assert process.stdout.count("step 0 of 30") == 1
    assert [step for step in (8, 12, 16) if f"step {step} of 30" in process.stdout]  # it went on, and not from 0
    assert process.stdout.count("before training") == 1
    log = records(tmp_path / "two")
    assert [record["step"] for record in log] == list(range(1, 31))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)

    capsys.readouterr()
    main(monkeypatch, "--out", tmp_path / "two", *flags)  # finished; now by one process
    assert "2 processes made this run, now 1" in capsys.readouterr().err


def test_the_accuracy_of_two_processes_is_exact(folder, tmp_path, monkeypatch, capsys):
    """On 11 validation images."""
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/test/coffee/3.png").unlink()
    main(monkeypatch, "--data", tmp_path / "images", "--out", tmp_path, "--steps", 2, *FINETUNE_FLAGS)
    flags = ["finetune", "--eval-only", "--data", tmp_path / "images", "--init", tmp_path / "last.pt", "--workers", 0]
    capsys.readouterr()
    main(monkeypatch, *flags)
    one = capsys.readouterr().out
    two = run("mae.py", *flags, processes=2)
    assert two.returncode == 0 and two.stdout == one and "of 11 validation samples" in one, two.stderr


def test_processes_evaluate_the_features_together(folder, tmp_path, monkeypatch, capsys):
    """Each sample is encoded by one of them, and all find what one process finds, to the last digit printed."""
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images/test/coffee/3.png").unlink()  # 11 validation images
    flags = ["--data", tmp_path / "images", "--steps", 2, "--probe-every", 2, "--probe-samples", 11, *TINY_FLAGS]
    main(monkeypatch, "--out", tmp_path / "one", *flags)
    printed = [line for line in capsys.readouterr().out.splitlines() if "before training" in line]
    two = run("mae.py", "--out", tmp_path / "two", *flags, processes=2)
    assert two.returncode == 0 and printed[0] in two.stdout, two.stderr
    one, two = (records(tmp_path / name)[-1] for name in ("one", "two"))
    for name in ("knn", "score_knn", "rank", "spread"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)

    source = data.open_sources(tmp_path / "images")[1]  # 3 samples for 5 processes, one after the other
    source.names, source.labels = source.names[:3], source.labels[:3]
    samples, sums = data.Samples(source, data.CentreCrop(32)), []
    monkeypatch.setattr(data, "sum_over_processes", lambda x: sums.append(x) or x)
    for rank in range(5):
        data.features([lambda x: x.flatten(1)], samples, _args(rank=rank, processes=5), torch.device("cpu"), 20)
    whole = data.features([lambda x: x.flatten(1)], samples, _args(), torch.device("cpu"), 20)
    assert torch.equal(sum(sums[:10:2]), whole[0][0]) and torch.equal(sum(sums[1:10:2]), whole[1])


def test_workers_hand_over_chunks_of_a_batch(folder, monkeypatch):
    """So the shared memory that they need does not go by the size of a batch; what comes out is the same."""
    source = data.open_sources(folder)[0]
    crop, erase = data.CentreCrop(32), data.Erasing(_args(erasing=0.5))
    samples = data.Samples(source, lambda image: erase(crop(image)))
    batches = [[(i, i) for i in range(12)], [(i, 7) for i in range(5)]]
    once = list(data.loader(samples, batches, _args(), torch.device("cpu"), 0))
    monkeypatch.setattr(data, "CHUNK", 4 * 4 * 3 * 32 ** 2)  # of 4 images
    sizes, collate = [], data.collate
    monkeypatch.setattr(data, "collate", lambda chunk: sizes.append(len(chunk)) or collate(chunk))
    for workers in (0, 2):
        again = list(data.loader(samples, iter(batches), _args(), torch.device("cpu"), workers))
        for old, new in zip(once, again, strict=True):
            assert all(map(torch.equal, old, new))
    assert sizes == [4, 4, 4, 4, 1]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)  # there torch.cuda's streams fail
    assert torch.equal(data.examples(samples, [0], _args(), torch.device("cpu"))[0], once[0][0][:1])


def test_broken_files_among_many(tmp_path, monkeypatch, capfd):
    """1 % of a folder is damaged or unusual: it trains to the end, each is skipped and named once, or converted."""
    images, generator = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for i in range(700):
        picture = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((40, 40))
        picture.save(images / f"{i:03}.jpg")
    whole = (images / "000.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_text("no image")
    (images / "text.heic").write_text("no image")
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00", b"IDAT"):  # 60,000 x 60,000
        png += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (images / "bomb.png").write_bytes(png)
    picture.convert("CMYK").save(images / "cmyk.jpg")
    if features.check("avif"):
        picture.save(images / "000.avif")
        assert data.read_image(images / "000.avif").size == (40, 40)
        (images / "000.avif").unlink()
    picture.convert("P").save(images / "palette.png")
    Image.fromarray(generator.integers(0, 65535, (40, 40), dtype=np.uint16)).save(images / "16 bit.png")
    flags = ["--data", images, "--epochs", 2, *TINY_FLAGS, "--batch-size", 64, "--out", tmp_path / "run"]
    main(monkeypatch, *flags, "--workers", 2)
    error = capfd.readouterr().err
    assert len(losses(tmp_path / "run")) == 23
    for name in ("truncated.jpg", "empty.jpg", "text.jpg", "text.heic", "bomb.png"):
        assert error.count(f"read: {images / name} (") == 1
    assert "decompression bomb" in error and error.count("skipped, since") == 5 and "5 of 708 files" in error
    for name in ("cmyk.jpg", "palette.png", "16 bit.png"):
        assert data.CentreCrop(32)(data.read_image(images / name)).shape == (3, 32, 32)


def test_an_array_that_claims_to_be_huge_is_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((40, 40, 5), np.uint8))
    claim = (tmp_path / "a.npy").read_bytes().replace(b"(40, 40, 5), }        ", b"(4000000, 400000, 5), }")
    (tmp_path / "a.npy").write_bytes(claim)
    with pytest.raises(ValueError):
        data.read_image(tmp_path / "a.npy", 5)


def test_maskfeat_on_videos_by_command_line(videos, tmp_path, monkeypatch, capsys):
    def maskfeat_main(*arguments):
        main(monkeypatch, *arguments, "--device", "cpu", "--workers", 0, method=maskfeat)
        return capsys.readouterr().out

    out = tmp_path / "run"
    flags = ["--recipe", "demo", "--data", videos, "--batch-size", 4, "--stride", 2]
    printed = maskfeat_main(*flags, "--frames", 4, "--image-size", 32, "--patch-size", 8, "--steps", 2,
                            "--target", "pixels", "--out", out)
    assert "validation samples: chance " in printed and Image.open(out / "prediction.png").height == 2 * 224 + 3 * 4
    flags += ["--init", out / "last.pt"]
    segments, read_clips = [], data.read_clips
    monkeypatch.setattr(data, "read_clips", lambda *inputs: segments.append(inputs[3]) or read_clips(*inputs))
    printed = maskfeat_main("finetune", *flags, "--views", 3, "--steps", 2, "--randaugment", 7, "--mixup", 0.8,
                            "--out", tmp_path / "f")
    assert [count for count, _ in itertools.groupby(filter(None, segments))] == [1, 3]  # more in the last test alone
    top1, _ = printed.splitlines()[-2:]
    assert "top-1" in top1
    flags = ["--recipe", "demo", "--data", videos, "--init", tmp_path / "f/last.pt", "--stride", 2]
    assert maskfeat_main("finetune", *flags, "--views", 3, "--eval-only").splitlines()[-1] == top1
    maskfeat_main("show", "--init", out / "last.pt", "--image", videos / "val/darker/clip1", "--out", tmp_path / "s")
    assert (tmp_path / "s/prediction.png").exists()
    # Another number of frames: the positions are interpolated in time.
    maskfeat_main("finetune", "--recipe", "demo", "--data", videos, "--init", out / "last.pt", "--frames", 8,
                  "--steps", 1, "--batch-size", 4, "--out", tmp_path / "longer")
    assert common.ViT.load(tmp_path / "longer/last.pt").grid == (4, 4, 4)


def test_vjepa_by_command_line(videos, folder, checkpoint, tmp_path, monkeypatch, capsys):
    def vjepa_main(*arguments):
        main(monkeypatch, *arguments, "--recipe", "demo", "--device", "cpu", "--workers", 0, method=vjepa)
        return capsys.readouterr().out

    out = tmp_path / "run"
    flags = ["--data", videos, "--stride", 2, "--batch-size", 4]
    printed = vjepa_main(*VJEPA_FLAGS, *flags, "--steps", 3, "--probe-every", 2, "--out", out)
    assert "validation samples: chance " in printed and str(out / "best.pt") in printed
    log = records(out)
    assert {"step", "loss", "lr", "momentum", "knn", "spread", "rank", "score_knn"} <= set(log[1])
    assert "rank" not in log[0]
    best, last = (common.read_checkpoint(out / name) for name in ("best.pt", "last.pt"))
    assert best["step"] in (2, 3) and last["step"] == 3
    assert Image.open(out / "tokens.png").size == (4 * 224 + 5 * 4, 2 * 224 + 3 * 4)
    encoder = common.ViT.load(out / "last.pt")  # the target encoder
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, last["model"]["target_encoder.blocks.0.attn.qkv.weight"])

    limits, features = [], data.features
    monkeypatch.setattr(data, "features", lambda *rest: limits.append(rest[-1]) or features(*rest))
    again = vjepa_main(*VJEPA_FLAGS, *flags, "--steps", 3, "--probe-every", 2, "--probe-labels", 0.01, "--out", out)
    assert "validation samples: chance " in again and limits == [60, 6000]  # the finished run is only probed again

    vjepa_main(*flags, "--init", out / "last.pt", "--steps", 1, "--out", tmp_path / "more")  # the same model and masks
    assert common.read_checkpoint(tmp_path / "more/last.pt")["settings"]["masking"] == "multiblock"
    one_sentence(vjepa, [*flags, "--init", checkpoint], "needs clips", tmp_path, monkeypatch, capsys)  # of images

    frozen = ["--init", out / "last.pt", "--segments", 2, "--views", 3]
    printed = vjepa_main("probe", *flags, *frozen, "--steps", 3, "--out", tmp_path / "p").splitlines()[-2]
    assert "top-1" in printed
    after = common.read_weights(tmp_path / "p/last.pt")[0]
    assert torch.equal(after["encoder.blocks.0.attn.qkv.weight"], encoder.blocks[0].attn.qkv.weight)
    again = vjepa_main("probe", "--data", videos, "--stride", 2, "--eval-only", "--init", tmp_path / "p/last.pt",
                       "--segments", 2, "--views", 3)
    assert again.splitlines()[-1] == printed
    vjepa_main("finetune", *flags, "--init", out / "best.pt", "--steps", 2, "--drop-path", 0.1, "--randaugment", 7,
               "--erasing", 0.25, "--out", tmp_path / "f")
    after = common.read_weights(tmp_path / "f/last.pt")[0]
    assert not torch.equal(after["encoder.blocks.0.attn.qkv.weight"], encoder.blocks[0].attn.qkv.weight)

    image = next((folder / "test/coffee").glob("*.png"))
    for path in (image, videos / "val/darker/clip1"):
        vjepa_main("show", "--init", out / "last.pt", "--image", path, "--out", tmp_path / "s", "--masking", "tube")
        assert Image.open(tmp_path / "s/tokens.png").size == (3 * 224 + 4 * 4, 2 * 224 + 3 * 4)
    stills = ["probe", "--data", folder, "--still", "--init", out / "last.pt", "--steps", 2, "--batch-size", 4]
    assert "top-1" in vjepa_main(*stills, "--out", tmp_path / "i")
    stills = ["--data", folder, "--still", *VJEPA_FLAGS, "--steps", 1]
    assert "validation samples: chance " in vjepa_main(*stills, "--out", tmp_path / "still")


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--compile"]])
def test_bf16_and_compile_agree_with_float32(flags, folder, tmp_path, monkeypatch, no_probe):
    """The graph is traced and run without code being generated for it, which takes a minute."""
    same = ["--data", folder, "--steps", 2, *TINY_FLAGS]
    main(monkeypatch, "--out", tmp_path / "plain", *same)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    main(monkeypatch, "--out", tmp_path / "other", *same, *flags)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


@pytest.mark.parametrize("method, tiny, where", RUNS + SATELLITE_RUNS)
def test_benchmark(method, tiny, where, request, tmp_path, monkeypatch, capsys):
    """A line of JSON, nothing written; the operations of MAE are those of the formula."""
    flags = ["--benchmark", 2, *tiny, "--data", request.getfixturevalue(where), "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as exit:
        main(monkeypatch, *flags, method=method)
    found = json.loads(capsys.readouterr().out)
    assert exit.value.code == 0 and not (tmp_path / "run").exists()
    unit = "clips" if where == "videos" else "images"
    assert found[f"{unit}_per_second"] * found["ms_per_step"] == pytest.approx(8000, rel=0.01)
    assert found["peak_memory_gib"] > 0.1 and found["mfu"] is None and found["processes"] == 1
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:  # a signal does not make it write either
        patch.setattr(common.Run, "time_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        main(patch, *flags, method=method)
    assert exit.value.code == 143 and not (tmp_path / "run").exists()
    assert not torch.nn.modules.module._global_forward_pre_hooks  # those of the counter are gone
    if tiny is TINY_FLAGS:  # 16 patches, 4 of them and the class token in the encoder, 17 tokens in the decoder
        products = 16 * 192 * 128 + 5 * 4 * 12 * 128 ** 2 + 5 * 128 * 32 + 17 * 12 * 32 ** 2 + 17 * 32 * 192
        attention = 4 * 2 * 5 ** 2 * 128 + 2 * 17 ** 2 * 32
        forward = 2 * 8 * (products + attention) / 1e9
        assert 2.7 * forward < found["gflop_per_step"] < 3 * forward + 0.001


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method, tiny, where", [*RUNS, *SATELLITE_RUNS, *CLASSIFIERS])
def test_steps_on_a_gpu(method, tiny, where, precision, compiled, request, tmp_path, monkeypatch):
    flags = [*tiny, "--device", "cuda", "--precision", precision, compiled, "--out", tmp_path]
    main(monkeypatch, "--data", request.getfixturevalue(where), "--steps", 4, *flags, method=method)
    assert len(losses(tmp_path)) == 4 and np.isfinite(losses(tmp_path)).all()


@needs_gpu
@pytest.mark.parametrize("name", CASES)
def test_bf16_on_a_gpu_agrees_with_float32_on_a_cpu(name):
    model, *inputs = case(name, batch=8)
    with torch.no_grad():
        plain = forward(model, *inputs)
        moved = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, inputs)
        with torch.autocast("cuda", torch.bfloat16):
            fast = forward(model.cuda(), *moved)
    plain, fast = (x[0] if isinstance(x, tuple) else x for x in (plain, fast))
    assert fast.item() == pytest.approx(plain.item(), rel=0.02)


@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method, tiny, where", RUNS + SATELLITE_RUNS)
def test_no_step_waits_for_the_gpu(method, tiny, where, precision, request, tmp_path, monkeypatch):
    step_done = common.Run.step_done

    def watched(run, *arguments, **values):
        step_done(run, *arguments, **values)
        torch.cuda.set_sync_debug_mode("error" if 2 <= run.step < 6 else "default")
    monkeypatch.setattr(common.Run, "step_done", watched)
    flags = [*tiny, "--device", "cuda", "--precision", precision, "--no-compile", "--log-every", 100]
    flags += ["--probe-every", 100] if method is vjepa else []
    flags += ["--data", request.getfixturevalue(where), "--steps", 7, "--out", tmp_path]
    try:
        main(monkeypatch, *flags, method=method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_torchrun_on_gpus_goes_on(folder, tmp_path):
    """With as many GPUs as there are (a power of two, up to 8): resumed, and the losses those of one GPU."""
    processes = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    command = ["mae.py", *TINY_FLAGS, "--device", "cuda", "--data", folder, "--steps", 4, "--save-every", 2]
    done = run(*command, "--out", tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr
    whole = losses(tmp_path)
    (tmp_path / "last.pt").unlink()  # what is left, previous.pt, is of step 2
    done = run(*command, "--out", tmp_path, processes=processes)
    assert done.returncode == 0 and "step 2 of 4" in done.stdout, done.stderr
    assert losses(tmp_path) == pytest.approx(whole, rel=0.01)
    if processes > 1:
        done = run(*command, "--out", tmp_path / "one", processes=1)
        assert done.returncode == 0 and losses(tmp_path / "one") == pytest.approx(whole, rel=0.01), done.stderr


@needs_gpu
def test_hog_on_a_gpu_is_that_on_a_cpu():
    """From bytes on, since the last bit of a pixel decides over bins."""
    samples = data.Samples(data.Photographs(True), data.CentreCrop(96))
    images, _ = data.examples(samples, range(0, 6000, 400), _args(), torch.device("cuda"))
    with torch.autocast("cuda", torch.bfloat16):
        found = maskfeat.hog(images).cpu()
    assert ((found - maskfeat.hog(photographs())).abs() > 1e-5).float().mean() < 1e-3


def fake_cuda_works():
    """Older versions of PyTorch ask the driver even for a fake tensor."""
    with contextlib.suppress(RuntimeError), FakeTensorMode():
        torch.empty(1, device="cuda:0").uniform_()
        return True
    return False


class FakeGPU(TorchDispatchMode):
    """Notes what lives on a GPU that is not there, {storage: bytes}; in a step, what makes the CPU wait is an error."""

    def __torch_dispatch__(self, op, types, inputs=(), options=None):
        results = op(*inputs, **(options or {}))  # FakeTensorMode stops at mixed devices and at .item()
        for x in filter(torch.is_tensor, torch.utils._pytree.tree_leaves(results)):
            source = inputs[0] if inputs and torch.is_tensor(inputs[0]) else x
            assert not self.stepping or source.device == x.device, f"{op} goes to {x.device}: the CPU waits"
            assert op.overloadpacket not in (torch.ops.aten.addmm, torch.ops.aten.convolution) or x.dtype == self.dtype
            if x.is_cuda:
                self.storages[x.untyped_storage()] = x.untyped_storage().nbytes()
        return results


MEMORY = [  # GiB, as in the README
    (mae, "--batch-size 512", 25.8), (mae, "--size large --batch-size 512 --precision fp16", 42.0),
    (mae, "--size huge --batch-size 512 --accumulate 2", 44.7), (mae, "--dates 3 --batch-size 64", 10.6),
    (mae, "--channels 6 --bands 0,1,2/3,4/5 --batch-size 64 --precision fp16", 10.5),
    (maskfeat, "--batch-size 256", 17.8), (maskfeat, "--frames 16 --batch-size 64 --precision fp16", 34.9),
    (vjepa, "--batch-size 24", 27.5), (vjepa, "--batch-size 48 --accumulate 2 --precision fp16", 27.5)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests do it with numbers")
@pytest.mark.skipif(not fake_cuda_works(), reason="this PyTorch needs a driver")
@pytest.mark.parametrize("method, flags, gib", MEMORY)
def test_steps_on_fake_cuda_tensors(method, flags, gib, monkeypatch):
    """Three steps of a paper, as one of 8 GPUs takes them: devices and dtypes fit, nothing waits, and what lives after
    the forward pass is 90 to 100 % of the README's memory. The backward pass, for which autograd would ask the driver,
    the run and the data have stand-ins.
    """
    gpu, models, peaks, stack = FakeGPU(), [], [], contextlib.ExitStack()
    gpu.storages, gpu.stepping, new_model, draw_masks = WeakIdKeyDictionary(), False, method.new_model, vjepa.draw_masks
    gpu.dtype = torch.half if "fp16" in flags else torch.bfloat16
    run = MagicMock(step=1, losses=[], **{"step_done.side_effect": [None, None, EOFError]})
    fake = lambda *shape, dtype=None: torch.empty(shape, dtype=dtype, device="cuda:0")

    def join(args):
        args.device, args.rank, args.processes = "cuda", 0, 1
        return torch.device("cuda:0")

    def model(args):
        stack.enter_context(FakeTensorMode()), stack.enter_context(gpu)
        with torch.device("cuda:0"):  # where it is made, as a fake model cannot move
            return models.append(new_model(args)) or models[0]

    def batches(_, args, *__):
        gpu.stepping, dates, frames = True, getattr(args, "dates", 1), getattr(args, "frames", 1)
        B, times = args.batch_size // args.accumulate, [dates] if dates > 1 else [frames] if frames > 1 else []
        pixels = fake(B, *[1, 1] * (frames > 1), args.channels, *times, args.image_size, args.image_size)
        return itertools.repeat((pixels, fake(B), *[fake(B, dates, 3)] * (dates > 1)))

    def masks(*arguments):
        with unset_fake_temporarily(), torch.device("cpu"):
            ids = draw_masks(*arguments[:-1], "cpu")
        return [[fake(*x.shape, dtype=x.dtype) if gpu.stepping else x for x in kind] for kind in ids]

    def backward(_):
        peaks.append(sum(gpu.storages.values()) / 2 ** 30)
        for parameter in models[0].parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    flash = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]  # the choice asks the driver
    for name, stand_in in {
            "new_model": model, "Run": lambda *_: run, "join_processes": join, "data.training_loader": batches,
            "torch.Tensor.backward": backward, "vjepa.draw_masks": masks,
            "torch.nn.functional.scaled_dot_product_attention": flash, "torch.nn.Module.to": lambda module, _: module,
            "torch.nn.init.trunc_normal_": lambda x, **_: x,
            "torch.Generator": lambda _=None, kind=torch.Generator: kind(),
            "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False}.items():
        monkeypatch.setattr(name if "." in name else f"{method.__name__}.{name}", stand_in)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)  # of the target encoder
    with stack, pytest.raises(EOFError):
        main(monkeypatch, *"--recipe paper --no-compile --steps 1000 --warmup 0 --workers 0 --precision bf16".split(),
             *flags.split(), method=method)
    assert 0.9 * gib < max(peaks) < gib


def test_batches_are_not_divided_by_numbers():
    """On CUDA that is a product with the reciprocal, which has another last bit, and so HOG other bins."""
    class Division(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if "div" in getattr(function, "__name__", ""):
                divisions.append(torch.is_tensor(arguments[1]))
            return function(*arguments, **(options or {}))
    divisions, samples = [], data.Samples(data.Photographs(True), data.CentreCrop(96))
    with Division():
        images, _ = data.examples(samples, range(0, 6000, 400), _args(), torch.device("cpu"))
    assert len(divisions) >= 2 and all(divisions)
    byte = torch.arange(256.0)
    assert (byte / 255 != byte * (1 / 255)).sum() > 100 and torch.equal(images, photographs())


def test_the_demo_of_vjepa_does_not_collapse(tmp_path):
    """A part of the demo: no warning, as long as the loss falls; the whole one is in the README."""
    flags = ["--steps", 60, "--log-every", 5, "--probe-every", 30, "--probe-samples", 30, "--device", "cpu"]
    done = run("vjepa.py", *flags, "--out", tmp_path / "run")
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    log = records(tmp_path / "run")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert all(record["spread"] > 0.2 and record["rank"] > 4 for record in log if "rank" in record)


def test_the_frozen_features_improve(tmp_path, monkeypatch, capsys):
    """The demo of MAE on small images and a small budget; the whole one gains several times as much."""
    main(monkeypatch, "--image-size", 32, "--batch-size", 32, "--steps", 150, "--log-every", 10, "--workers", 0,
         "--device", "cpu", "--out", tmp_path)
    before, after = re.findall(r"([\d.]+) %", capsys.readouterr().out.splitlines()[-1])[1:]
    assert float(after) > float(before) + 3 and losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


def test_maskfeat_learns(folder, tmp_path, monkeypatch):
    main(monkeypatch, "--data", folder, "--out", tmp_path, "--steps", 60, *MASKFEAT_FLAGS, method=maskfeat)
    assert np.mean(losses(tmp_path)[-10:]) < 0.75 * losses(tmp_path)[0]


# ------------------------------------------------------------------------------------------------------------ bad input


def written(name, content):
    """A function that writes a file into a folder, bytes or a checkpoint, and returns its path."""
    def write(folder):
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            torch.save(content, folder / name)
        return folder / name
    return write


broken_checkpoint = written("broken.pt", b"not a checkpoint")
other_checkpoint = written("other.pt", {"model": {"fc.weight": torch.zeros(2, 2)}})
checkpoint_of_images = written("images.pt", {"model": filled(vit_table())})
broken_list = written("list.bin", bytes(range(256)))


def empty_folder(path):
    (path / "empty").mkdir()
    return path / "empty"


def undated(path):
    (path / "places/a").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (40, 40)).save(path / f"places/a/{i}.png")
    return path / "places"


def unreadable_folder(path):
    (path / "unreadable").mkdir()
    (path / "unreadable/a.jpg").write_text("no image")
    return path / "unreadable"


def unknown_class(path):
    for name in ("train/cat", "val/cat", "val/dog"):
        (path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(path / "classes" / name / "a.png")
    return path / "classes"


BAD_MAE = [
    (["--data", "nowhere"], "there is no file or folder nowhere"),
    (["--data", empty_folder], "no image below"),
    (["--data", unreadable_folder], "none of the files can be read"),
    (["finetune", "--data", empty_folder], "needs the folders train/"),
    (["finetune", "--data", unknown_class], "class folder dog"),
    (["--image-size", "65"], "not a multiple of the patch size"),
    (["--mask-ratio", "1"], "none or all"),
    (["--mask-ratio", "-0.1"], "is not a number from 0 to 1"),
    (["--batch-size", "0"], "is not a number from 1"),
    (["--mask-ratio", "0"], "none or all"),
    (["--mask-ratio", "0.99"], "none or all"),
    (["--init", "nowhere.pt"], "there is no checkpoint"),
    (["--init", broken_checkpoint], "is broken"),
    (["finetune", "--init", other_checkpoint], "not a checkpoint of a Vision Transformer"),
    (["--mean", "0.5"], "give both"),
    (["--batch-size", "7", "--accumulate", "2"], "cannot be shared"),
    (["--channels", "4"], "1 or 3 channels"),
    (["show"], "needs --init"),
    (["--mean", "0.5", "--std", "0.5"], "need 3 numbers"),
    (["--mixup", "0.8"], "unrecognized arguments: --mixup"),
    (["--decoder-heads", "3"], "not a multiple of 3 attention heads"),
    (["--epochs", "nan"], "is not a number"),
    (["finetune", "--randaugment", "40"], "is not a number from 0 to 10"),
    (["finetune", "--eval-only"], "needs --init"),
    (["linprobe", "--batch-size", "1", "--steps", "1"], "at least 2 images"),
    (["--bands", "0,1/1,2"], "has a band twice"),
    (["--bands", "0,a"], "is not a list of groups"),
    (["--bands", "0,1", "--dates", "2"], "not both"),
    (["--bands", "0,5", "--data", undated], "not among the 3 channels"),
    (["--dates", "2", "--data", undated], "none of the files can be read"),
    (["--dates", "2", "--data", empty_folder], "no folder of images"),
    (["--sizes=base"], "unrecognized arguments"),
]
BAD_MASKFEAT = [
    (["--masking", "cube"], "--masking cube is for clips"),
    (["--frames", "8", "--masking", "block"], "--masking block is for images"),
    (["--frames", "7"], "7 frames are not a multiple of the tubelet of"),
    (["--cell", "3"], "whole cells of 3"),
    (["--mask-ratio", "0.005"], "hides none or all"),
    (["--frames", "8", "--masking", "frame", "--mask-ratio", "0.95"], "hides none or all"),
    (["--data", "cifar10", "--frames", "8"], "no clips"),
    (["--data", empty_folder, "--frames", "8"], "no video and no folder of frames"),
    (["--data", unreadable_folder, "--frames", "8"], "none of the files can be read"),
    (["--frames", "8", "--channels", "4"], "clips have 1 or 3 channels"),
    (["--views", "2"], "unrecognized arguments: --views"),
    (["--data", broken_list, "--frames", "8"], "neither a folder nor a list"),
    (["show"], "needs --init"),
    (["finetune", "--eval-only"], "needs --init"),
    (["finetune", "--init", checkpoint_of_images, "--frames", "8"], "another shape for"),
]
BAD_VJEPA = [
    (["--frames", "7"], "7 frames are not a multiple of the tubelet of"),
    (["--frames", "1"], "needs clips of several frames"),
    (["--masking", "tube", "--mask-ratio", "0", "--context-frames", "8"], "hides none of the"),
    (["--masking", "multiblock", "--context-frames", "8", "--image-size", "24"], "hides none of the 4 patches"),
    (["--momentum", "1.5"], "is not a number from 0 to 1"),
    (["--predictor-dim", "66"], "not a multiple of 4 attention heads"),
    (["--data", empty_folder], "no video and no folder of frames"),
    (["probe", "--eval-only"], "needs --init"),
    (["probe", "--target", "latent"], "unrecognized arguments: --target"),
    (["show"], "needs --init"),
    (["show", "--init", other_checkpoint], "not a checkpoint of a Vision Transformer"),
]


@pytest.mark.parametrize("method, arguments, message", [
    (method, *case) for method, cases in ((mae, BAD_MAE), (maskfeat, BAD_MASKFEAT), (vjepa, BAD_VJEPA))
    for case in cases])
def test_bad_input_gets_one_sentence(method, arguments, message, tmp_path, monkeypatch, capsys):
    one_sentence(method, arguments, message, tmp_path, monkeypatch, capsys)


def test_a_run_does_not_overwrite_the_checkpoint_that_it_starts_from(tmp_path, monkeypatch):
    torch.save(filled(vit_table()), tmp_path / "last.pt")
    for task in ([], ["finetune"], ["--fresh"]):
        with pytest.raises(common.UserError, match="give another --out"):
            main(monkeypatch, *task, "--init", tmp_path / "last.pt", "--steps", 1, "--out", tmp_path)
    with pytest.raises(SystemExit, match="^0$"):  # a benchmark writes nothing
        main(monkeypatch, "--init", tmp_path / "last.pt", "--benchmark", 1, "--out", tmp_path, "--device", "cpu",
             "--batch-size", 2)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_an_encoder_without_its_last_norm_can_go_on_as_mae(folder, tmp_path, monkeypatch, capsys):
    """A MaskFeat, whose norm belongs to the prediction head: the norm starts anew, the blocks are its own."""
    before = tiny_maskfeat().state_dict()
    torch.save({"model": before}, tmp_path / "maskfeat.pth")
    flags = ["--data", folder, "--init", tmp_path / "maskfeat.pth", "--image-size", 32, "--batch-size", 4, "--steps", 1,
             "--base-lr", 0, "--recipe", "demo", "--device", "cpu", "--workers", 0, "--out", tmp_path / "run"]
    main(monkeypatch, *flags)
    after = common.read_weights(tmp_path / "run/last.pt")[0]
    assert "holds an encoder alone" in capsys.readouterr().out and (after["norm.weight"] == 1).all()
    assert torch.equal(after["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("labelled", [False, True])
def test_a_single_sample_to_look_at_does_not_end_the_run(labelled):
    samples = data.Samples(data.Photographs(True, length=1), data.CentreCrop(32))
    args = _args(probe_samples=10)
    assert data.watch(lambda x: x.flatten(1), samples, samples, args, torch.device("cpu"), labelled) == {}


def test_where_a_checkpoint_cannot_be_written_all_processes_say_so(folder, tmp_path, monkeypatch):
    flags = [*TINY_FLAGS, "--data", folder, "--steps", 2, "--keep-every", 2, "--out"]
    for name in ("last", "step-00002"):
        (tmp_path / name / f"{name}.partial").mkdir(parents=True)  # is in the way
    with pytest.raises(common.UserError, match="last.pt could not be written"):
        main(monkeypatch, *flags, tmp_path / "last")
    done = run("mae.py", *flags, tmp_path / "step-00002", processes=2)
    assert done.returncode and "step-00002.pt could not be written" in done.stderr
    assert 'common.py", line' not in done.stderr  # no traceback but torchrun's own


def test_what_a_checkpoint_says_of_the_flags(tmp_path, monkeypatch):
    """Of the method's own file also the masks, the decoder and --still, of another method's the encoder alone."""
    parse = functools.partial(parsed, monkeypatch)

    def write(name, flags, weights, **changes):
        torch.save({"model": weights, "settings": {name: flag.value for name, flag in flags.items()} | changes},
                   tmp_path / name)
        return tmp_path / name

    images = write("mae.pt", mae.MODEL | mae.AUTOENCODER, filled(vit_table()), size="nano", image_size=32, patch_size=8,
                   masking="grid", mask_ratio=0.5, decoder_dim=96)
    own, other = parse(mae, "--init", images), parse(maskfeat, "--init", images)
    assert (own.masking, own.mask_ratio, own.decoder_dim, own.image_size) == ("grid", 0.5, 96, 32)
    assert (other.size, other.patch_size, other.image_size) == ("nano", 8, 32)
    assert (other.masking, other.mask_ratio, other.target) == ("random", 0.75, "hog")  # of the recipe, here the demo
    assert parse(maskfeat, "--init", images, "--data", "DIR").masking == "block"
    torch.save(filled(vit_table(kernel=(2, 8, 8), tokens=128)), tmp_path / "clips.pth")  # without settings
    assert parse(maskfeat, "--init", tmp_path / "clips.pth", "--data", "DIR").masking == "cube"

    stills = write("vjepa.pt", vjepa.MODEL | vjepa.STILL | vjepa.MASKING | vjepa.PREDICTOR,
                   filled(vit_table(kernel=(2, 8, 8), tokens=128), "target_encoder."), size="nano", image_size=32,
                   patch_size=8, still=True)
    assert parse(vjepa, "probe", "--init", stills).still
    assert not parse(vjepa, "probe", "--init", stills, "--no-still").still


def one_sentence(method, arguments, message, tmp_path, monkeypatch, capsys):
    """What is not refused ends after a step, and not after a whole demo."""
    arguments = [a(tmp_path) if callable(a) else a for a in arguments]
    if "show" not in arguments and "--steps" not in arguments:
        arguments += ["--steps", 1]
    monkeypatch.setattr(sys, "argv", [f"{method.__name__}.py", *map(str, arguments), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        common.run_main(method.main)
    error = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and message in error[-1] and error[-1].startswith(f"{method.__name__}.py: error:")
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_not_overwritten(checkpoint, folder, monkeypatch):
    before = checkpoint.read_bytes()
    with pytest.raises(common.UserError, match="steps 3 there, 4 now.*--fresh"):
        main(monkeypatch, "--data", folder, "--out", checkpoint.parent, "--steps", 4, *TINY_FLAGS)
    with pytest.raises(common.UserError, match=f"data {folder} there, None now"):
        main(monkeypatch, "--out", checkpoint.parent, "--steps", 3, *TINY_FLAGS)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("normalised", [True, False])
def test_the_picture_shows_what_the_prediction_gets_back(normalised, folder, tmp_path, monkeypatch):
    """Before the reconstruction, the true means alone: what is more in the reconstruction was predicted."""
    flags = ["--data", folder, *TINY_FLAGS, "--steps", 1, "--mean", *[0] * 3, "--std", *[1] * 3, "--out", tmp_path]
    shown = []
    monkeypatch.setattr(mae, "save_pictures", lambda columns, *_: shown.extend(common.patchify(x, 8) for x in columns))
    main(monkeypatch, *flags, "--norm-pix-loss" if normalised else "--no-norm-pix-loss")
    original, seen, *between, reconstruction = shown  # (B, L, P*P*C) each
    masked = (seen == 0).all(dim=2)
    assert len(between) == normalised and 0.7 < masked.float().mean() < 0.8
    assert all(torch.allclose(x[~masked], original[~masked], atol=1e-5) for x in (seen, *between, reconstruction))
    if normalised:
        means = original.mean(dim=2, keepdim=True).expand_as(original)
        assert torch.allclose(between[0][masked], means[masked], atol=1e-5)
        assert not torch.allclose(between[0][masked], reconstruction[masked], atol=1e-3)


@pytest.mark.parametrize("method, model", [
    (mae, functools.partial(tiny_mae, decoder_dim=512, decoder_depth=8, decoder_heads=16)),
    (maskfeat, tiny_maskfeat), (vjepa, tiny_vjepa)])
def test_pictures_show_the_image_whatever_its_normalisation(method, model, folder, tmp_path, monkeypatch):
    weights = model().state_dict()
    torch.save({"model": weights}, tmp_path / "last.pth")
    image = folder / "test/coffee/4.png"
    flags = ["--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6, "--image", image, "--out", tmp_path]
    flags += ["--frames", 4, "--image-size", 32] if method is vjepa else []
    main(monkeypatch, "show", "--init", tmp_path / "last.pth", *flags, method=method)
    picture, = tmp_path.glob("*.png")
    shown = torch.from_numpy(np.array(Image.open(picture)))[4:228, 4:228].permute(2, 0, 1)
    original = data.CentreCrop(32)(Image.open(image).convert("RGB"))
    assert (shown[:, 3::7, 3::7].int() - original.int()).abs().max() <= 1  # each pixel enlarged to 7 x 7


def readme_commands():
    """[(method, words)] of the README: in indented lines, between backticks, and of each row of an experiment's table,
    whose first column has a command in its head and more flags in its rows.
    """
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    script = r"(?:python|torchrun [^`]*?)\s+(mae|maskfeat|vjepa)\.py"
    found = re.findall(rf"^    .*?{script}(.*?)(?:  #.*)?$", text, re.M)
    found += [(method, flags) for method, flags in re.findall(rf"`{script}([^`]*)`", text) if "--help" not in flags]
    for method, flags, rows in re.findall(rf"^\| `{script}([^`]*)` \|.*\n\|-.*\n((?:\|.*\n)+)", text, re.M):
        found += [(method, f"{flags} {row}") for row in re.findall(r"^\| `(--[^`]*)`", rows, re.M)]
    return [(method, flags.split()) for method, flags in dict.fromkeys(found)]  # each once


def test_every_command_of_the_readme_runs(folder, videos, places, tmp_path, monkeypatch, capsys):
    """Each with its own flags, on a tiny model and a few samples, for one step, in one process without torchrun."""
    commands = readme_commands()
    assert len(commands) > 25 and {method for method, _ in commands} == {"mae", "maskfeat", "vjepa"}
    monkeypatch.chdir(tmp_path)
    open_sources = data.open_sources

    def open_short_sources(*arguments, **named):
        found = open_sources(*arguments, **named)
        for source in found[:2]:
            if hasattr(source, "length"):  # it is built in
                source.length = 45
        return found

    monkeypatch.setattr(data, "open_sources", open_short_sources)
    image, clip = next((folder / "test/coffee").glob("*.png")), videos / "val/darker/clip0"
    stands_for = {"photo.jpg": image, "clip.mp4": clip, "IMAGES": folder, "/shared/runs/mae": "runs/shared"}
    generator = np.random.default_rng(0)
    for channels, split in itertools.product((8, 10), ("train", "val")):
        for name in ("field", "lake"):
            Path(f"bands{channels}", split, name).mkdir(parents=True)
            np.save(Path(f"bands{channels}", split, name, "0.npy"), generator.random((40, 40, channels)))
    video, prefix = filled(vit_table(kernel=(2, 8, 8), tokens=128), "module.backbone."), "module.backbone."
    published = {
        "mae_pretrain_vit_base.pth": {"model": filled(vit_table())},
        "mae_visualize_vit_large.pth": {"model": filled(vit_table() | decoder_table())},
        "mae_finetuned_vit_base.pth": {"model": filled(vit_table(norm="fc_norm") | layer_table("head", 2, 128))},
        "in1k_VIT_B_MaskFeat_PT_epoch_01600.pyth": {"model_state": filled(
            vit_table(norm="pred_head.transforms.0.0") | {"mask_token": (1, 1, 128)} | layer_table(
                "pred_head.projections.0", 27, 128))},
        "vitl16.pth.tar": {"encoder": video, "target_encoder": video, "predictor": filled(predictor_table(), prefix)},
        "k400-probe.pth.tar": {"classifier": filled(probe_table(), "module.")}}
    for name, weights in published.items():
        torch.save(weights, name)
    small = {"size": "nano", "image_size": 32, "patch_size": 8, "predictor_depth": 1, "decoder_depth": 1, "steps": 1,
             "cell": 8, "batch_size": 4, "accumulate": 1, "mask_group": 4, "probe_samples": 4, "workers": 0,
             "device": "cpu"}
    for method, words in commands:
        script = {"mae": mae, "maskfeat": maskfeat, "vjepa": vjepa}[method]
        task = words[0] if words and words[0] in script.TASKS else "pretrain"
        moving = method == "vjepa" and "--still" not in words or "--frames" in words or "runs/video/last.pt" in words
        channels = words[words.index("--channels") + 1] if "--channels" in words else 8
        tiles = "--channels" in words or "runs/tiles/last.pt" in words
        stands_for["DIR"] = f"bands{channels}" if tiles else videos if moving else folder
        words = [str(stands_for.get(word, word)) for word in words]
        known = common.MACHINE.keys() | script.TASKS[task][1].keys() | script.TASKS[task][2].keys()
        if "--init" in words:  # the model is that of the checkpoint, and so are its decoder and predictor
            known -= {"size", "patch_size", "predictor_depth", "decoder_depth"}
        for name, value in small.items():
            if name in known and not (task == "show" and name == "image_size"):
                words += [f"--{name.replace('_', '-')}", str(value)]
        if task != "show" and "--eval-only" not in words and "--benchmark" not in words:
            words.append("--fresh")  # several commands share the default folder
        with pytest.raises(SystemExit, match="^0$") if "--benchmark" in words else contextlib.nullcontext():
            main(monkeypatch, *words, method=script)
    printed = capsys.readouterr().out
    assert printed.count("validation") > 15 and printed.count("picture") > 15

    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    monkeypatch.setitem(sys.modules, "timm", MagicMock())  # a tool of the README and not a dependency
    frames = common.read_weights("runs/vjepa/best.pt")[1]["frames"]  # several commands write it
    found = {"images": torch.randn(2, 3, 32, 32), "clips": torch.randn(2, 3, frames, 32, 32)}
    for block in blocks:
        exec(block, found)
    assert found["features"].shape == (2, 128) and found["trained"](found["images"]).shape == (2, 2)


def test_workers_and_threads_share_the_cores(monkeypatch):
    """Of a CPU: with more than cores a step took twice as long. What the user or torchrun sets is left alone."""
    def workers_and_threads(*flags):
        monkeypatch.setattr(sys, "argv", ["mae.py", *flags, "--device", "cpu"])
        return common.parse_command_line("mae", None, mae.TASKS, mae.MODEL).workers, torch.get_num_threads()

    monkeypatch.setattr(common, "CORES", 8)
    assert workers_and_threads() == (4, 1) and workers_and_threads("--benchmark", "9") == (0, 1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(8)
        assert workers_and_threads("--workers", "1") == (1, 7) and workers_and_threads() == (4, 4)
        assert workers_and_threads("--workers", "0") == (0, 4)  # never more than PyTorch itself would take
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert workers_and_threads() == (1, 1)
    finally:
        torch.set_num_threads(1)


def test_a_wrong_command_exits_with_2_and_no_traceback():
    done = run("mae.py", "--data", "nowhere")
    assert done.returncode == 2 and done.stderr == "mae.py: error: there is no file or folder nowhere\n"


# ------------------------------------------------------------------------------------------ what people run into


FAILING = """
import sys
sys.path.insert(0, {here!r})
import torch
import common, data, mae
print("started", flush=True)
original = data.Samples.__getitem__

def fail_in_a_worker(samples, item):
    if torch.utils.data.get_worker_info() and samples.replace_unreadable == {training}:
        raise {error}
    return original(samples, item)

data.Samples.__getitem__ = fail_in_a_worker
common.run_main(mae.main)
"""


@pytest.mark.parametrize("training, error, code, processes, workers", [
    (True, "RuntimeError('of the test')", 1, None, 1), (False, "RuntimeError('of the test')", 1, None, 2),
    (True, "common.UserError('a sentence: of the test')", 2, None, 2),
    (True, "MemoryError('of the test')", 1, 1, 2)])
def test_an_error_in_a_worker_ends_the_run(training, error, code, processes, workers, folder, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(here=str(HERE), training=training, error=error))
    process = start(script, "--data", folder, "--out", tmp_path / "run", "--steps", 3, *TINY_FLAGS, "--workers",
                    workers, processes=processes, restarts=int(processes is not None))
    try:
        out, text = process.communicate(timeout=120)  # without the timeout a fault would keep the tests for ever
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (code if processes is None else 1)
    assert out.count("started") == (1 if processes is None else 2)  # torchrun starts it again
    if code == 2:
        assert any(line.endswith("failing.py: error: a sentence: of the test") for line in text.splitlines())
        assert "Traceback" not in text
    else:
        assert "of the test" in text


@pytest.mark.parametrize("scale", [1, 3000])
def test_randaugment_fills_with_the_mean_in_the_unit_of_the_picture(scale):
    augment = data.RandAugment([0.25 * scale], 2, 27)
    torch.manual_seed(0)
    image = scale * (0.5 + 0.5 * torch.rand(1, 32, 32))  # heights of 1,500 to 3,000, or a picture
    changed = torch.stack([augment(image) for _ in range(100)])
    assert changed.min() >= 0 and changed.max() <= scale
    assert (changed == 0.25 * scale).any()  # a corner
    if scale > 1:  # only the geometry
        assert (changed > 100).all()
    bytes_changed = [data.RandAugment([0.25], 2, 27)(Image.new("L", (32, 32), 200)) for _ in range(60)]
    assert any(63 in np.asarray(image) for image in bytes_changed)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("options", [
    dict(photometric="rgb"), dict(photometric="minisblack", planarconfig="contig"),
    dict(photometric="rgb", planarconfig="separate"), dict(photometric="minisblack", planarconfig="separate"),
    dict(photometric="minisblack")])
def test_a_tiff_file_equals_the_same_array(dtype, options, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 16, 3)) * (1 if dtype == np.uint8 else 11)
    array = (array / 300 if dtype == np.float32 else array).astype(dtype)
    first = options.get("planarconfig") == "separate" or "photometric" in options and len(options) == 1 and (
        options["photometric"] == "minisblack")  # bands as planes or as pages
    np.save(tmp_path / "x.npy", array)
    tifffile.imwrite(tmp_path / "x.tif", array.transpose(2, 0, 1) if first else array, **options)
    of_array, of_tiff = (v2.functional.to_dtype(v2.functional.to_image(data.read_image(tmp_path / name)), scale=True)
                         for name in ("x.npy", "x.tif"))
    assert torch.equal(of_array, of_tiff) or dtype == np.uint8 and torch.allclose(of_array, of_tiff, atol=1e-6)
    assert np.allclose(of_array.permute(1, 2, 0) * {np.uint8: 255, np.uint16: 65535}.get(dtype, 1), array, atol=1e-3)


def test_integers_of_unknown_range_are_measured(tmp_path, monkeypatch, capsys):
    draw = np.random.default_rng(0)
    for i in range(6):
        np.save(tmp_path / f"{i}.npy", draw.integers(0, 256, (40, 40, 3)))  # int64
    assert data.read_image(tmp_path / "0.npy").max() > 200
    main(monkeypatch, "--data", tmp_path, "--out", tmp_path / "run", "--steps", 2, *TINY_FLAGS)
    settings = torch.load(tmp_path / "run/last.pt", weights_only=True)["settings"]
    assert np.allclose(settings["mean"], 127, atol=5) and min(settings["std"]) > 30
    assert "6 images for training" in capsys.readouterr().out


def test_a_constant_channel_is_refused_and_missing_data_are_noticed(tmp_path, monkeypatch, capsys):
    draw = np.random.default_rng(0)
    for i in range(4):
        bands = draw.random((32, 32, 4), np.float32)
        bands[..., 3] = 7
        np.save(tmp_path / f"{i}.npy", bands)
    with pytest.raises(common.UserError, match="channel 3 is 7 in all"):
        main(monkeypatch, "--data", tmp_path, "--out", tmp_path / "run", "--channels", 4, "--steps", 1, *TINY_FLAGS)
    for i in range(4):
        bands[..., 3] = draw.random((32, 32))
        bands[:16, :, 2] = -9999
        np.save(tmp_path / f"{i}.npy", bands)
    main(monkeypatch, "--data", tmp_path, "--out", tmp_path / "run", "--channels", 4, "--steps", 1, *TINY_FLAGS)
    warnings = capsys.readouterr().err
    assert "in channel 2 the value -9999" in warnings and warnings.count("in channel") == 1


def test_system_files_and_links_are_no_data(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    root = tmp_path / "copy/train"
    before = data.find_files(root, ["astronaut", "coffee"])
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
        for parent in (root, root / "coffee"):
            (parent / name).mkdir()
            shutil.copy(root / "coffee/0.png", parent / name / "0.png")
    (root / "coffee/._0.png").write_bytes(b"Mac OS X")
    (root / "astronaut/self").symlink_to(root / "astronaut")
    (root / "astronaut/up").symlink_to(root)
    assert data.class_names(root) == ["astronaut", "coffee"]
    assert data.find_files(root, ["astronaut", "coffee"]) == before
    assert data.find_files(root, clips=True) == [(str(root / name), 0) for name in ("astronaut", "coffee")]
    assert not any(name.startswith(".") for name in data.image_names(root / "coffee"))


@pytest.mark.parametrize("text, message", [
    ("path label\n{}", "line 1 .* names no image, video or folder: path label"), ("# mine\n{}", "line 1 .* names no"),
    ("{}c.png -1\n", "the label -1 among labels that are numbers"), ("a.png,0\nb.png,1\n", "line 1 .* names no"),
    ("\ufeff{}", None)])
def test_lists_as_other_programs_write_them(text, message, tmp_path):
    (tmp_path / "list.txt").write_text(text.format("a.png 0\nb.png 1\n"), encoding="utf-8")
    if message:
        with pytest.raises(common.UserError, match=message):
            data.read_list(tmp_path / "list.txt")
    else:
        assert data.read_list(tmp_path / "list.txt") == [(str(tmp_path / "a.png"), "0"), (str(tmp_path / "b.png"), "1")]


def test_one_class_and_other_class_names(folder, tmp_path, monkeypatch, capsys):
    flags = ["--recipe", "demo", "--image-size", 32, "--batch-size", 8, "--workers", 0, "--device", "cpu"]
    shutil.copytree(folder / "train/coffee", tmp_path / "one/train/coffee")
    shutil.copytree(folder / "test", tmp_path / "one/val")
    shutil.rmtree(tmp_path / "one/val/astronaut")
    with pytest.raises(common.UserError, match="has one class, coffee"):
        main(monkeypatch, "finetune", "--data", tmp_path / "one", *flags)
    (tmp_path / "one/val/coffee").rename(tmp_path / "one/val/2020")  # names are no labels when there is no classifier
    main(monkeypatch, "--data", tmp_path / "one", "--out", tmp_path / "pre", "--steps", 1, *TINY_FLAGS)
    assert "12 images for training, 6 for validation; 1 steps of 8 are 0.667 passes" in capsys.readouterr().out

    main(monkeypatch, "finetune", "--data", folder, "--out", tmp_path / "run", "--steps", 2, *flags)
    assert "24 images in 2 classes for training, 12 for validation" in capsys.readouterr().out
    shutil.copytree(folder / "test", tmp_path / "alone/val")  # no training images
    shutil.rmtree(tmp_path / "alone/val/astronaut")
    test = ["finetune", "--data", tmp_path / "alone", "--init", tmp_path / "run/last.pt", "--eval-only", *flags]
    main(monkeypatch, *test)
    assert "of 6 validation samples" in capsys.readouterr().out
    (tmp_path / "alone/val/coffee").rename(tmp_path / "alone/val/tea")
    with pytest.raises(common.UserError, match="classes astronaut, coffee.* but .* has tea"):
        main(monkeypatch, *test)


def test_a_very_long_picture_is_cut_before_it_is_enlarged(monkeypatch):
    sizes, resize = [], v2.functional.resize
    monkeypatch.setattr(v2.functional, "resize", lambda image, size, *rest: sizes.append(size) or resize(image, size,
                                                                                                        *rest))
    image = Image.fromarray(np.arange(20000, dtype=np.uint16).astype(np.uint8)[None])
    assert data.CentreCrop(64)(image).shape == (1, 64, 64)
    assert data.CentreCrop(64)(image.transpose(Image.Transpose.TRANSPOSE)).shape == (1, 64, 64)
    assert math.prod(sizes[0]) <= 10 * 73 ** 2 and math.prod(sizes[1]) <= 10 * 73 ** 2
    assert data.CentreCrop(64)(Image.new("L", (600, 100), 9)).unique().tolist() == [9]


def test_what_a_transform_cannot_cope_with_is_skipped(tmp_path, capfd):
    for i in range(40):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image")
    np.save(tmp_path / "empty.npy", np.zeros((0, 40, 3), np.uint8))
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "z.png")
    samples = data.Samples(data.Files(data.find_files(tmp_path)), lambda image: torch.ones(3, 4, 4))
    assert samples[0, 0][0].shape == (3, 4, 4) and samples.source.unreadable.sum() == 41
    text = capfd.readouterr().err
    assert text.count("skipped") == 10 and "only counted" in text

    def fail(image):
        raise MemoryError
    with pytest.raises(common.UserError, match="none of the files can be read"):
        data.Samples(samples.source, fail)
    with pytest.raises(MemoryError):  # a fault of the program and not of a file
        data.Samples(data.Photographs(True), fail)


@pytest.mark.parametrize("damage", ["\0\0\0\0\n", '{"note": 1}\n', "[]\n", '{"step": 1, "lo'])
def test_damaged_lines_of_the_log_are_dropped(damage, folder, tmp_path, monkeypatch, capsys):
    flags = ["--data", folder, "--out", tmp_path / "run", "--steps", 2, *TINY_FLAGS]
    main(monkeypatch, *flags)
    log = tmp_path / "run/log.jsonl"
    lines = log.read_text()
    log.write_text(lines + damage)
    main(monkeypatch, *flags)
    assert log.read_text() == lines and "1 damaged lines are dropped" in capsys.readouterr().err


def test_names_in_checkpoints(checkpoint, tmp_path):
    for content in ({"model": {1: torch.ones(2)}}, {3: torch.ones(2)}):
        torch.save(content, tmp_path / "numbers.pt")
        with pytest.raises(common.UserError, match="no weights by name"):
            common.read_weights(tmp_path / "numbers.pt")
    content = torch.load(checkpoint, weights_only=True)
    content["model"] = {f"_orig_mod.module.{name}": weight for name, weight in content["model"].items()}
    torch.save(content, tmp_path / "compiled.pt")
    assert common.ViT.load(tmp_path / "compiled.pt").dim == 128


def test_a_large_file_is_no_list(tmp_path):
    with open(tmp_path / "large.zip", "wb") as file:
        file.truncate(6 * 2 ** 30)  # takes no room on the disk
    with pytest.raises(common.UserError, match="neither a folder nor a list"):
        data.open_sources(tmp_path / "large.zip", labelled=False)


def test_draws_of_different_purposes_are_independent():
    """The size of V-JEPA's blocks and the corner of the first block, as the training loop draws them."""
    args = mask_args(masking="block", mask_ratio=0.3, mask_group=1)
    heights, tops = [], []
    for step in range(600):
        _, (hidden,) = vjepa.draw_masks(args, (1, 14, 14), step, slice(0, 1), "cpu")
        rows = hidden[0] // 14
        heights.append(int(rows.max() - rows.min()))
        tops.append(int(rows.min()) / (14 - int(rows.max() - rows.min())))
    assert abs(np.corrcoef(heights, tops)[0, 1]) < 0.2
    seeds = {common.derive_seed(*numbers) for numbers in itertools.product(range(3), range(4), range(3), range(3))}
    seeds |= {common.derive_seed(*numbers) for numbers in itertools.product(range(3), range(4), range(3))}
    assert len(seeds) == 3 * 4 * 9 + 3 * 4 * 3


@pytest.mark.parametrize("change", [common.compile_blocks, common.use_checkpointing])
def test_a_copy_of_changed_blocks_has_its_own_weights(change, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = tiny_mae()
    change(model)
    twin, x = copy.deepcopy(model), torch.randn(2, 5, 128)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    assert torch.equal(model.blocks[0](x), x) and not torch.equal(twin.blocks[0](x), x)


def test_a_flag_that_a_checkpoint_lacks_counts_with_its_default(folder, tmp_path, monkeypatch):
    flags = ["--data", folder, "--out", tmp_path / "run", "--steps", 2, *TINY_FLAGS]
    main(monkeypatch, *flags)
    content = torch.load(tmp_path / "run/last.pt", weights_only=True)
    del content["settings"]["warmup"], content["classes"]  # as an older version would have written it
    torch.save(content, tmp_path / "run/last.pt")
    main(monkeypatch, *flags)
    with pytest.raises(common.UserError, match="warmup 0.05 there, 0.5 now"):
        main(monkeypatch, *flags, "--warmup", 0.5)


def test_torchrun_refuses_mps(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(common.UserError, match="not mps"):
        common.join_processes(argparse.Namespace(device="mps"))


@pytest.mark.parametrize("method", [mae, maskfeat, vjepa])
def test_help_lists_tasks_and_short_numbers(method, monkeypatch, capsys):
    for task in ([], ["finetune"]):
        with pytest.raises(SystemExit):
            main(monkeypatch, *task, "--help", method=method)
        text = capsys.readouterr().out
        assert not re.search(r"\d\.\d{7,}|\d\.\d{6,}e", text)
        assert all(name in text for name in method.TASKS) and f"flags of {(task or ['pretrain'])[0]}" in text
