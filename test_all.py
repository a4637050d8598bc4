"""Every test. `pytest -q -n 2 test_all.py` takes minutes on two CPU cores and needs neither a GPU nor a network."""
import argparse
import ast
import collections
import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import logging
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
TINY_FLAGS = ["--preset", "demo", "--image-size", "32", "--decoder-dim", "32", "--decoder-depth", "1",
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


def indices_of(masks):
    """Masks (B, L), or (B, kinds, L), -> (visible, masked), as the loader makes them."""
    return data.Loader([0.0], [1.0], torch.device("cpu")).to_indices(masks)


def random_masks(batch, grid=(4, 4), ratio=0.75):
    """Indices (visible, masked) of random masks, in raster order."""
    return indices_of(torch.stack([mae.random_mask(grid, ratio) for _ in range(batch)]))


def config_of(**values):
    """A stand-in for a config, as far as the parts under test need it."""
    fields = dict(benchmark=None, accumulate=1, workers=0, device="cpu", precision="fp32", mean=None, std=None,
                  channels=3, image_size=32, seed=0)
    return argparse.Namespace(**{**fields, **values})


def plan_of(steps, accumulate=1):
    return common.Plan([0.5] * 3, [0.2] * 3, steps, 1, accumulate)


def mask_config(**changes):
    """What V-JEPA's masks depend on."""
    fields = dict(masking="multiblock", mask_ratio=0.5, context_frames=None, batch_size=4, seed=0, tubelet=2)
    return argparse.Namespace(**{**fields, **changes})


def tiny_masks(batch=4, grid=(2, 4, 4), step=0):
    """V-JEPA's: a list of visible and one of masked indices, an entry for each of the two kinds."""
    config = mask_config(batch_size=batch)
    return indices_of(torch.stack([vjepa.draw_masks(config, grid, step * batch + i) for i in range(batch)]))


def mask_of(masked, length):
    """Indices (B, M) -> mask (B, length), 1 = masked."""
    return torch.zeros(len(masked), length).scatter(1, masked, 1.0)


GROUPS = ((0, 3), (2,), (1, 4))
CASES = {  # name: (model, shape of its pixels, slice of each channel: groups of bands have tokens of their own)
    "mae": (tiny_mae, (3, 32, 32), [0]),
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


def inputs_of(module, run):
    """The inputs of each call of a module while `run()` runs."""
    found = []
    handle = module.register_forward_pre_hook(lambda _, inputs: found.append(inputs))
    run()
    handle.remove()
    return found


MASKFEAT_FLAGS = ["--preset", "demo", "--image-size", "32", "--batch-size", "8", "--workers", "0", "--log-every", "1",
                  "--device", "cpu"]
VJEPA_FLAGS = ["--preset", "demo", "--image-size", "32", "--patch-size", "8", "--frames", "4", "--predictor-dim", "32",
               "--predictor-depth", "1", "--batch-size", "8", "--workers", "0", "--log-every", "1", "--device", "cpu",
               "--masking", "multiblock", "--context-frames", "4"]
STRONG_FLAGS = ["--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1"]
FINETUNE_FLAGS = ["finetune", *MASKFEAT_FLAGS, *STRONG_FLAGS]
CLIPS_FLAGS = ["--still", "--frames", "4", "--patch-size", "8"]

RUNS = [(mae, TINY_FLAGS, "folder"), (maskfeat, MASKFEAT_FLAGS, "folder"),
        (maskfeat, [*MASKFEAT_FLAGS, "--frames", "4", "--patch-size", "8"], "videos"),
        (vjepa, [*VJEPA_FLAGS, "--evaluate-every", "3"], "videos")]
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


def parsed(monkeypatch, method, *words):
    """(task, config) that a script makes of a command line. A task may stand anywhere."""
    words = sorted(map(str, words), key=lambda word: word not in ("finetune", "linprobe", "probe", "show"))
    monkeypatch.setattr(sys, "argv", [f"{method.__name__}.py", *words])
    task, preset, given = common.parse_command_line(method.__doc__, method.TASKS, words)
    return task, method.configure(task, preset, **given)


def main(monkeypatch, *arguments, method=mae):
    """The same as `run` in this process, which saves the seconds of importing torch."""
    task, config = parsed(monkeypatch, method, *arguments)
    method.TASKS[task][0](config)


def records(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses(out):
    return [record["loss"] for record in records(out)]


def gradients(out):
    """What the optimizer has averaged at the end of a run: of a single step the gradient, for AdamW a tenth of it."""
    states = common.read_checkpoint(Path(out, "last.pt"))["optimizer"]["state"].values()
    return torch.cat([state["exp_avg" if "exp_avg" in state else "momentum_buffer"].flatten() for state in states])


@pytest.fixture
def no_probe(monkeypatch):
    """Leave out what follows on pre-training, probe and picture, which take as long as a few steps."""
    monkeypatch.setattr(data, "print_probes", lambda *_: None)
    for method in (mae, maskfeat, vjepa):
        monkeypatch.setattr(method, "save_picture", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def photographs_are_read_once():
    """In each process of the tests, where most runs would read all of them, twice."""
    for name in data.Photographs.classes:
        setattr(skimage.data, name, functools.cache(getattr(skimage.data, name)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A labeled folder: 2 classes, 12 training and 6 test images each; one is gray, one transparent, one broken."""
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
    """Seven classes, told by the color of training images; validation images have the color of any class."""
    root, generator = tmp_path_factory.mktemp("seven"), np.random.default_rng(0)
    colors = np.array(list(itertools.product((60, 190), repeat=3)))
    for split, count in (("train", 12), ("val", 4)):
        for label, i in itertools.product(range(7), range(count)):
            color = colors[label if split == "train" else generator.integers(7)]
            pixels = color + generator.normal(0, 20, (40, 40, 3))
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


def rows_of(x, indices):
    """x (1 or B, L, D) at the indices (B, N) -> (B, N, D)."""
    return torch.stack([row[i] for row, i in zip(x.expand(len(indices), -1, -1), indices)])


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


def plain_encoder(w, pixels, visible=None, masked=None, heads=4):
    """All encoded tokens, of the visible patches alone, or with a mask token at the masked ones: (B, [1 +] N, D)."""
    kernel = w["patch_embed.proj.weight"]
    convolution = F.conv3d if kernel.ndim == 5 else F.conv2d
    x = convolution(pixels, kernel, w["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    for b, indices in enumerate([] if masked is None else masked):
        x[b, indices] = w["mask_token"][0]
    x = x + w["pos_embed"][:, -x.shape[1]:]
    x = x if visible is None else rows_of(x, visible)
    if "cls_token" in w:
        x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
    x = plain_blocks(w, "blocks", x, heads)
    return norm(w, "norm", x) if "norm.weight" in w else x


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


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


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


def photographs(size=96, device="cpu"):
    """Real 8-bit photographs as the model gets them: (B, 3, size, size), normalized."""
    loader = data.Loader(data.IMAGENET_MEAN, data.IMAGENET_STD, torch.device(device))
    return loader.examples(data.Samples(data.Photographs(True), data.CenterCrop(size)), range(0, 6000, 400))[0]


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


def one_sentence(method, arguments, message, tmp_path, monkeypatch, capsys):
    """What is not refused ends after a step, and not after a whole demo."""
    arguments = [a(tmp_path) if callable(a) else a for a in arguments]
    if "show" not in arguments and "--steps" not in arguments:
        arguments += ["--steps", 1]
    monkeypatch.setattr(sys, "argv", [f"{method.__name__}.py", *map(str, arguments), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        common.main(method.__doc__, method.TASKS, method.configure)
    error = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and message in error[-1] and error[-1].startswith(f"{method.__name__}.py: error:")
    assert not (tmp_path / "out").exists()


def block_table(name, dim):
    shapes = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,),
              "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()} | {
        f"{name}.{part}.bias": shape[:1] for part, shape in shapes.items()}


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.randn(2, 3, 8, 12)
    assert torch.equal(common.unpatchify(common.patchify(images, 4), 4, (2, 3)), images)


def test_sincos_positions_and_their_interpolation():
    def code(x, width):
        return [f(x / 10000 ** (i / width)) for f in (math.sin, math.cos) for i in range(width)]
    table = common.sincos(8, (2, 3))
    assert table.shape == (6, 8)  # at the end row 1, column 2: 4 numbers for the column, then 4 for the row
    assert torch.allclose(table[5], torch.tensor(code(2, 2) + code(1, 2)), atol=1e-7)
    table = common.sincos(16, (2, 2, 3))  # 6 numbers for each of time, row, column, cut to 16
    assert torch.allclose(table[11], torch.tensor((code(1, 3) + code(1, 3) + code(2, 3))[:16]), atol=1e-7)

    table = F.pad(common.sincos(16, (4, 4)), (0, 0, 1, 0))[None]
    assert common.resize_positions(table, (4, 4), (4, 4)) is table
    larger = common.resize_positions(table, (4, 4), (6, 8))
    by_hand = F.interpolate(table[:, 1:].view(1, 4, 4, 16).permute(0, 3, 1, 2), size=(6, 8), mode="bicubic")
    assert torch.allclose(larger[0, 1:], by_hand[0].flatten(1).T) and torch.equal(larger[:, 0], table[:, 0])
    times = torch.linspace(0, 1, 4).repeat_interleave(4)[None, :, None]  # (1, 4 times of 2 x 2, 1)
    assert torch.allclose(common.resize_positions(times, (4, 2, 2), (2, 2, 2))[0, ::4, 0], torch.tensor([1 / 6, 5 / 6]))


def test_drop_path_skips_whole_samples_and_only_in_training():
    block, x = common.Block(16, 2, drop_path=0.9), torch.randn(64, 3, 16)
    unchanged = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.6 < unchanged < 0.95  # 0.9 squared, since both branches have to be dropped
    assert block.drop_path(torch.ones(64, 3, 16)).unique().tolist() == pytest.approx([0, 10])  # scaled up
    assert not common.Block(16, 2, drop_path=1.0).drop_path(x).any()
    assert not (block.eval()(x) == x).flatten(1).all(1).any()
    rates = [block.drop_path_rate for block in common.ViT("nano", 32, 8, drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# ------------------------------------------------------------------------------- the forward passes, in plain functions
# Of a state dict w with the published names; nothing of the modules under test is used.


def plain_decoder(w, x, visible, heads=2):
    """MAE's: encoded tokens, the class token first (B, 1 + N, D) -> the pixels of all patches (B, L, P*P*C)."""
    encoded = layer(w, "decoder_embed", x)
    x = w["mask_token"].repeat(len(encoded), w["decoder_pos_embed"].shape[1] - 1, 1)
    for b, indices in enumerate(visible):
        x[b, indices] = encoded[b, 1:]
    x = torch.cat([encoded[:, :1], x], dim=1) + w["decoder_pos_embed"]
    x = norm(w, "decoder_norm", plain_blocks(w, "decoder_blocks", x, heads))
    return layer(w, "decoder_pred", x[:, 1:])


@pytest.mark.parametrize("name", [name for name in CASES if name != "satmae"])
def test_forward_passes_equal_the_plain_ones(name):
    model, pixels, visible, masked = case(name)
    model, pixels, predictions = noisy(model), pixels.double(), []
    w = model.state_dict()
    if name == "vjepa":
        model.predictor.register_forward_hook(lambda *hook: predictions.append(hook[-1]))
        model(pixels, visible, masked)
        contexts = [plain_encoder(part_of(w, "encoder."), pixels, indices) for indices in visible]
        parts = zip(contexts, visible, masked, (0, 1), strict=True)
        expected = [plain_predictor(part_of(w, "predictor."), *part) for part in parts]
    else:
        predictions.append(model(pixels, visible, masked)[1])
        if name == "mae":
            expected = [plain_decoder(w, plain_encoder(w, pixels, visible), visible)]
        else:
            x = rows_of(plain_encoder(w, pixels, masked=masked)[:, 1:], masked)
            expected = [layer(w, "pred_head.1", norm(w, "pred_head.0", x))]
    for a, b in zip(predictions, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("frames", [1, 4])
def test_classifiers_pool_the_tokens(frames, pool, class_token):
    vit = noisy(common.ViT("nano", 32, 8, 3, frames, min(2, frames), class_token, pool=pool, num_classes=7))
    pixels = torch.randn(2, 3, *[4] * (frames > 1), 32, 32).double()
    w = vit.state_dict()
    x = plain_encoder(w, pixels)
    assert x.shape == (2, class_token + 16 * (2 if frames > 1 else 1), 128)
    x = x[:, 0] if pool == "class" and class_token else x[:, int(class_token):].mean(1)
    x = norm(w, "fc_norm", x) if pool == "mean" else x
    assert torch.allclose(vit(pixels), layer(w, "head", x), rtol=0, atol=1e-9)


def test_the_attentive_probe_equals_the_plain_one():
    probe, x = noisy(vjepa.AttentiveClassifier(128, 4, 3)), torch.randn(2, 7, 128).double()
    assert torch.allclose(probe(x), plain_probe(probe.state_dict(), x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_encoder_sees_the_visible_patches_alone_and_all_that_is_trained_has_a_gradient(name):
    model, pixels, visible, masked = case(name)
    slices, grid, results = CASES[name][2], (2, 4, 4) if pixels.ndim == 5 else (4, 4), []
    after, = (module for path, module in model.named_modules()
              if path.endswith(("decoder_embed", "pred_head", "predictor_embed")))  # the first layer after the encoder
    encoded = inputs_of(after, lambda: results.append(model(pixels.requires_grad_(), visible, masked)))
    for (x,), indices in zip(encoded, visible if name == "vjepa" else [visible], strict=True):  # for each mask
        seen = mask_of(indices, (max(slices) + 1) * math.prod(grid)).view(4, -1, *grid)
        seen = F.interpolate(seen, pixels.shape[2:])[:, slices].expand_as(pixels) > 0
        gradient, = torch.autograd.grad((x * torch.randn_like(x)).sum(), pixels, retain_graph=True)
        assert torch.equal(gradient != 0, seen)

    (results[0] if name == "vjepa" else results[0][0]).backward()
    tables = () if name.startswith("maskfeat") else ("pos_embed", "channel_embed")  # MaskFeat learns its positions
    for path, parameter in model.named_parameters():
        trained = not path.startswith("target_encoder") and not path.endswith(tables)
        assert parameter.requires_grad == trained == (parameter.grad is not None and bool(parameter.grad.any())), path


# ---------------------------------------------------------------------------------------------------- masking and loss


def masks_of(draw, *arguments, number=64):
    torch.manual_seed(0)
    return torch.stack([draw(*arguments) for _ in range(number)])


@pytest.mark.parametrize("masking", mae.MASKS)
@pytest.mark.parametrize("ratio, kept", [(0.75, 49), (0.5, 98), (0.4, 117)])
def test_masks_have_the_asked_number(masking, ratio, kept):
    masks = masks_of(mae.MASKS[masking], (14, 14), ratio)
    assert masks.shape == (64, 196) and masks.dtype == torch.bool and ((~masks).sum(1) == kept).all()
    assert torch.equal(masks, masks_of(mae.MASKS[masking], (14, 14), ratio))
    if masking == "grid":  # a regular pattern
        keeps = (~masks).view(64, 7, 2, 7, 2).sum((2, 4))
        assert ratio == 0.4 or (keeps == {0.75: 1, 0.5: 2}[ratio]).all()
    else:  # each sample has its own
        assert len(masks.unique(dim=0)) == 64
    visible, masked = indices_of(masks)
    assert torch.equal(mask_of(masked, 196), masks.float()) and torch.equal(mask_of(visible, 196), 1 - masks.float())
    assert (visible.diff() > 0).all() and (masked.diff() > 0).all()  # in raster order


@pytest.mark.parametrize("method", [mae, maskfeat])
def test_block_masks_are_blocks_and_reach_all_edges(method):
    blocks, random = (masks_of(method.MASKS[masking], (14, 14), 0.4, number=1024).view(-1, 14, 14).float()
                      for masking in ("block", "random"))
    for d in (0, 1):
        assert blocks.diff(dim=d + 1).abs().sum() < 0.5 * random.diff(dim=d + 1).abs().sum()
        for near, far in ((0, 13), (1, 12)):  # as much is masked at one edge as at the other
            assert abs(blocks.select(d + 1, near).mean() - blocks.select(d + 1, far).mean()) < 0.03


def test_cubes_reach_the_first_and_the_last_time():
    masks = masks_of(maskfeat.MASKS["cube"], (8, 14, 14), 0.4, number=1000).view(1000, 8, 196)
    at_times = masks.float().mean((0, 2))
    assert abs(at_times[0] - at_times[7]) < 0.05  # as much is masked at the first time as at the last


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_equals_the_obvious_computation_on_images_of_any_shape_and_channels(norm_pix_loss):
    model, images = tiny_mae(image_size=(32, 48), channels=5, norm_pix_loss=norm_pix_loss), torch.randn(3, 5, 32, 48)
    visible, masked = random_masks(3, (4, 6))
    loss, pred = model(images, visible, masked)
    errors = []
    for b, patch in [(b, patch) for b in range(3) for patch in masked[b].tolist()]:
        top, left = patch // 6 * 8, patch % 6 * 8
        target = images[b, :, top:top + 8, left:left + 8].permute(1, 2, 0).flatten()
        if norm_pix_loss:
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        errors.append(((pred[b, patch] - target) ** 2).mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), atol=1e-6) and len(errors) == 3 * 18


def test_initialization():
    model = mae.MAE("base")
    bound = math.sqrt(6 / (768 + 3 * 256))  # xavier-uniform of the flattened patch projection
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.pos_embed[:, 0].abs().max() == 0 and model.blocks[3].attn.qkv.bias.abs().max() == 0
    biases = {name: x.unique().tolist() for name, x in tiny_maskfeat().named_parameters() if name.endswith("bias")}
    assert biases["blocks.3.attn.qkv.bias"] == biases["blocks.0.norm1.bias"] == [pytest.approx(0.02)]  # as published
    assert biases["pred_head.1.bias"] == [0.0] and len(biases["patch_embed.proj.bias"]) > 100


def test_initialization_of_heads():
    heads = [method.new_classifier(method.configure(task), 1000).head
             for method, task in ((mae, "finetune"), (maskfeat, "finetune"), (mae, "linprobe"))]
    for head, std in zip((*heads[:2], heads[2][1]), (2e-5, 2e-5, 0.01)):
        assert head.weight.std().item() == pytest.approx(std, rel=0.1) and not head.bias.any()


# ------------------------------------------------------------------------------------------------- schedule, optimizer


def test_layer_decay_and_weight_decay():
    vit = common.ViT("nano", 32, 8, pool="mean", num_classes=3)
    vit.pos_embed.requires_grad_(True)
    groups = common.parameter_groups(vit, 0.05, 0.5, no_decay=("cls_token", "pos_embed"))
    scales = {p: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    values = {name: scales[p] for name, p in vit.named_parameters()}
    assert len(scales) == len(values)
    expected = {"patch_embed.proj.weight": (0.5 ** 5, 0.05), "pos_embed": (0.5 ** 5, 0), "cls_token": (0.5 ** 5, 0),
                "blocks.0.attn.qkv.weight": (0.5 ** 4, 0.05), "blocks.3.mlp.fc1.bias": (0.5, 0),
                "head.weight": (1, 0.05), "fc_norm.weight": (1, 0)}
    assert {name: values[name] for name in expected} == expected
    for group in common.parameter_groups(vit, 0.0):  # weight decay may rise later
        assert {parameter.ndim > 1 for parameter in group["params"]} == {group["decays"]}


PAPERS = [  # Tables 8 to 10 of MAE, 8 and 9 of MaskFeat (images, clips), the configuration of V-JEPA's ViT-L
    (mae, "", dict(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup=0.05, weight_decay=0.05, clip_grad=None,
                   mask_ratio=0.75, masking="random", decoder_dim=512, decoder_depth=8, decoder_heads=16,
                   norm_pix_loss=True, size="base", image_size=224, patch_size=16)),
    (mae, "finetune", dict(epochs=100, batch_size=1024, base_lr=5e-4, warmup=0.05, weight_decay=0.05, min_lr=1e-6,
                           layer_decay=0.65, drop_path=0.1, smoothing=0.1, randaugment=9, mixup=0.8, cutmix=1,
                           erasing=0.25, pool="mean")),
    (mae, "finetune --size large", dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)),
    (mae, "linprobe", dict(epochs=90, batch_size=16384, base_lr=0.1, weight_decay=0, min_lr=0, pool="class")),
    (maskfeat, "", dict(epochs=300, batch_size=2048, base_lr=2e-4, min_lr=1e-6, warmup=0.1, weight_decay=0.05,
                        clip_grad=0.02, mask_ratio=0.4, masking="block", target="hog", cell=8)),
    (maskfeat, "--frames 16", dict(batch_size=512, base_lr=8e-4, masking="cube", mask_ratio=0.4, tubelet=2)),
    (maskfeat, "finetune", dict(epochs=100, base_lr=2.5e-4, layer_decay=0.65, drop_path=0.1, warmup=0.2)),
    (vjepa, "", dict(steps=90_000, batch_size=3072, base_lr=6.25e-4 * 256 / 3072, start_lr=0.32, min_lr=1e-6,
                     weight_decay=0.04, final_weight_decay=0.4, momentum=0.998, final_momentum=1, schedule_scale=1.25,
                     clip_grad=10, masking="multiblock", predictor_dim=384, predictor_depth=12, frames=16, tubelet=2,
                     size="large", target="latent", context_frames=None)),
    (vjepa, "probe", dict(epochs=20, batch_size=256, base_lr=1e-3, weight_decay=0.01, segments=8, views=3, warmup=0))]


@pytest.mark.parametrize("method, words, values", PAPERS)
def test_with_data_the_values_are_those_of_the_paper(method, words, values, monkeypatch):
    _, config = parsed(monkeypatch, method, *words.split(), "--data", "DIR")
    assert {name: getattr(config, name) for name in values} == pytest.approx(values)


def falling(progress):  # half a cosine from 1 to 0
    return (1 + math.cos(math.pi * progress)) / 2


RATES = {name: [0.5, 1, 0.6, 0.2] if "vjepa" in name else [0, 0.5, 1, 0.6] for name in TASKS}  # of the peak
RATES |= {"mae": [0, 0.5, 1, 0.5], "vjepa": [0.75, 1, 0.2 + 0.8 * falling(1 / 14), 0.2 + 0.8 * falling(2 / 14)]}


@pytest.mark.parametrize("task", TASKS)
def test_schedules_and_the_optimizer_of_each_task(task, request, tmp_path, monkeypatch, no_probe):
    betas = {"mae": (0.9, 0.95), "mae linprobe": None}.get(task, (0.9, 0.999))
    weight_decay = {"vjepa": 0.3 - 0.2 * falling(4 / 16)}.get(task, 0.3 if "vjepa" in task else 0.1)
    method, tiny, fixture = TASKS[task]
    flags = ["--steps", 4, "--warmup", 0.5, "--base-lr", 32e-4, "--weight-decay", 0.1]  # peak: 1e-4 for a batch of 8
    flags += ["--min-lr", 2e-5] if task != "mae" else []
    flags += ["--final-weight-decay", 0.3] if method is vjepa else []
    flags += ["--layer-decay", 0.5] if "finetune" in task else []
    if task == "vjepa":
        flags += ["--start-lr", 0.5, "--schedule-scale", 4, "--momentum", 0.5, "--final-momentum", 0.9]
    main(monkeypatch, "--data", request.getfixturevalue(fixture), *tiny, *flags, "--out", tmp_path, method=method)
    log = records(tmp_path)
    last = log[-1]["lr"]
    assert [record["lr"] for record in log] == pytest.approx([1e-4 * rate for rate in RATES[task]])
    if task == "vjepa":
        assert [record["momentum"] for record in log] == pytest.approx([0.5, 0.525, 0.55, 0.575])

    optimizer = common.read_checkpoint(tmp_path / "last.pt")["optimizer"]
    for group in optimizer["param_groups"]:
        assert group["momentum"] == 0.9 if betas is None else tuple(group["betas"]) == betas
        for state in (optimizer["state"][number] for number in group["params"]):
            shape = state["momentum_buffer" if betas is None else "exp_avg"].shape
            decays = len(shape) > 1 and not (task == "mae finetune" and shape[0] == 1)  # nor class token and positions
            assert group["weight_decay"] == pytest.approx(weight_decay * decays)
            assert shape[0] != 2 or group["lr"] == pytest.approx(last)  # the head of two classes
    layers = range(6) if "finetune" in task else [0]  # head, four blocks, embedding
    rates = sorted({group["lr"] for group in optimizer["param_groups"]}, reverse=True)
    assert rates == pytest.approx([last * 0.5 ** layer for layer in layers])


@pytest.mark.parametrize("task", TASKS)
def test_crops_are_those_of_the_papers(task, of_task, tmp_path, monkeypatch):
    method, flags = of_task
    crop = MagicMock(wraps=v2.RandomResizedCrop)
    monkeypatch.setattr(v2, "RandomResizedCrop", crop)
    main(monkeypatch, *flags, "--steps", 1, "--out", tmp_path, method=method)
    (_, scale, *ratio), options = crop.call_args
    assert scale == ({"mae": 0.2, "maskfeat": 0.5, "vjepa": 0.3}.get(task, 0.08), 1) and crop.call_count == 1
    assert ratio == [(0.75, 1.35)] * (task == "vjepa")
    assert options.get("interpolation", data.BILINEAR) == (data.BILINEAR if task == "vjepa" else data.BICUBIC)


def test_ridge_probe_and_exact_accuracy():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(3, 8, generator=generator)
    labels, noise = torch.arange(300) % 3, torch.randn(300, 8, generator=generator)
    for x, lowest, highest in ((centers[labels] + 0.1 * noise, 100, 100), (noise, 0, 60)):
        assert lowest <= data.ridge_probe(x[:150], labels[:150], x[150:], labels[150:]) <= highest

    logits = torch.arange(7.0).expand(5, -1)  # class 6 is the first and class 2 the fifth
    batches = [(logits[:2], torch.tensor([6, 2])), (logits[2:], torch.tensor([1, -1, 0]))]
    metrics = common.accuracy(torch.nn.PReLU(), batches, contextlib.nullcontext(), verbose=False)
    assert metrics == {"top1": 25, "top5": 50}  # of the four that count


def test_all_processes_test_with_the_statistics_of_rank_0(monkeypatch):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4, affine=False), torch.nn.Linear(4, 3))
    monkeypatch.setattr(common, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, rank: buffer.fill_(7 + rank))
    common.accuracy(model, [], contextlib.nullcontext(), verbose=False)
    assert (model[0].running_mean == 7).all() and (model[0].running_var == 7).all()


# ---------------------------------------------------------------------------------------------------------------- data


def test_every_epoch_has_each_image_once_and_processes_share_each_batch(monkeypatch):
    def draw(start=0, seed=3, **values):
        plan = plan_of(15, **values)
        return list(data.training_batches(20, config_of(batch_size=8, seed=seed), plan, start))
    whole = draw()
    assert len(whole) == 15 and all(len(batch) == 8 for batch in whole)
    drawn = [index for batch in whole for index, _ in batch]
    assert all(sorted(drawn[i:i + 20]) == list(range(20)) for i in range(0, 120, 20))
    assert drawn[:20] != drawn[20:40] and whole != draw(seed=4) and draw(start=6) == whole[6:]
    monkeypatch.setattr(data, "get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(data, "get_rank", lambda: rank)
        parts.append(draw(accumulate=2))
    for step, batch in enumerate(whole):  # two processes with two micro-batches each see the same batch
        assert [x for micro in (2 * step, 2 * step + 1) for part in parts for x in part[micro]] == batch


def test_a_fraction_of_the_labels_is_a_random_draw_that_each_pass_repeats():
    def draw(seed=3, labels=0.25):
        config = config_of(batch_size=5, seed=seed, labels=labels)
        return [index for batch in data.training_batches(20, config, plan_of(12), 0) for index, _ in batch]
    drawn, used = draw(), sorted(draw()[:5])
    assert len(set(used)) == 5 and all(sorted(drawn[i:i + 5]) == used for i in range(0, 60, 5))
    assert used != list(range(5)) and used != sorted(draw(seed=4)[:5]) and set(draw(labels=0.01)) == {draw(labels=0.01)[0]}
    assert sorted(draw(labels=1.0)[:20]) == list(range(20))


MEAN, STD = data.IMAGENET_MEAN, data.IMAGENET_STD
cpu_loader = functools.partial(data.Loader, MEAN, STD, torch.device("cpu"))


def test_augmentation_depends_on_the_seed_alone():
    config = config_of(batch_size=6, randaugment=9.0, erasing=0.25)
    transform = data.finetuning_transform(config, MEAN, STD)
    first, other = (data.Samples(data.Photographs(True), transform, seed) for seed in (1, 2))
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        runs.append(torch.cat([x for x, _ in cpu_loader(workers=workers).train(first, config, plan_of(2), 0)]))
    assert torch.equal(*runs)
    assert not torch.equal(first[0, 5][0], first[0, 6][0]) and not torch.equal(first[0, 5][0], other[0, 5][0])
    magnitudes = [t.for_bytes.magnitude for t in transform.transforms if isinstance(t, data.RandAugment)]
    assert magnitudes == [27]  # of 30, as 9 of 10


@pytest.mark.parametrize("frames", [1, 4])
def test_bytes_are_normalized_on_the_device(frames):
    """With the mean and std of each channel, to the last bit as by hand; also beside files that are floats."""
    source = data.Photographs(True) if frames == 1 else data.Clips(True, frames)
    config, samples = config_of(batch_size=6), data.Samples(source, data.CenterCrop(32), seed=1)
    (batch, _), = cpu_loader().train(samples, config, plan_of(1), 0)
    rows, = data.training_batches(len(source), config, plan_of(1), 0)
    pixels = torch.stack([samples[row][0] for row in rows])
    assert pixels.dtype == torch.uint8 and batch.is_contiguous() and batch.dtype == torch.float32
    assert batch.shape == ((6, 3, 32, 32) if frames == 1 else (6, 1, 3, 4, 32, 32))
    channels = -3 if frames == 1 else -4
    by_hand = (pixels.movedim(channels, -1) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.equal(batch.movedim(channels, -1), by_hand)
    mixed, _ = data.collate([(pixels[0], 0), (pixels[1] / 255, 0)])  # files of both kinds in a batch
    assert torch.equal(mixed, pixels[:2] / 255) and data.collate([(pixels[0], 0)])[0].dtype == torch.uint8


def test_a_rectangle_is_erased_by_noise_of_the_normalized_image():
    torch.manual_seed(0)
    image = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    unchanged, erased = (data.RandomErasing(probability, MEAN, STD)(image) for probability in (0.0, 1.0))
    assert unchanged.sub(100 / 255).abs().max() < 1e-6 and erased.dtype == torch.float32
    changed = (erased - unchanged).abs().amax(0) > 1e-5
    normalized, _ = cpu_loader().examples(data.Samples([(image, 0)], lambda _: erased), [0])
    assert 0.02 < changed.float().mean() < 0.35 and normalized[0][:, changed].std() == pytest.approx(1, abs=0.1)


def test_training_and_validation_pictures_are_disjoint_regions():
    train, val = data.Photographs(True), data.Photographs(False)
    for name, a, b in zip(train.classes, train.regions, val.regions):
        whole = getattr(skimage.data, name)()
        height, width = (whole[0] if isinstance(whole, tuple) else whole).shape[:2]
        sums = (a.width + b.width, a.height) if width >= height else (a.width, a.height + b.height)
        assert sums == (width, height) and a.width * a.height > b.width * b.height
    assert train[2999][1] == 7 and np.array_equal(np.asarray(train[7][0]), np.asarray(train[7][0]))


def test_center_crop():
    image = torch.randint(0, 255, (3, 256, 256), dtype=torch.uint8)
    assert torch.equal(data.CenterCrop(224)(v2.functional.to_pil_image(image)), image[:, 16:240, 16:240])
    image = v2.functional.to_pil_image(image[:, :64, :96])
    assert data.CenterCrop((32, 40))(image).shape == (3, 32, 40)
    assert torch.equal(data.CenterCrop((64, 96))(image), v2.functional.pil_to_tensor(image))


def test_unreadable_images_are_replaced_in_training_and_left_out_of_tests(tmp_path, capsys):
    for i, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / name / "0.png")
    (tmp_path / "b/0.png").write_bytes((tmp_path / "a/0.png").read_bytes()[:40])
    source = data.Files(data.find_files(tmp_path, ["a", "b", "c"]))
    train, test = (data.Samples(source, data.CenterCrop(40), replace_unreadable=r) for r in (True, False))
    assert train.example(1)[0].max() == train.example(1)[1] == 2  # another image, with its own label
    assert [test.example(i)[1] for i in range(3)] == [0, -1, 2]
    data.report_unreadable(source)
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


# ------------------------------------------------------------------------------------ checkpoints, published weights


def test_vit_takes_a_checkpoint_at_other_sizes_and_with_a_new_head(checkpoint):
    vit, images, model = common.load_encoder(checkpoint), torch.randn(2, 3, 32, 32), tiny_mae()
    model.load_state_dict(common.read_weights(checkpoint)[0])
    assert torch.equal(vit.forward_features(images), model.forward_features(images)) and vit(images).shape == (2, 128)
    classifier = common.load_encoder(checkpoint, image_size=(48, 64), pool="mean", num_classes=7)
    assert classifier(torch.randn(2, 3, 48, 64)).shape == (2, 7)
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"model": Hostile(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(common.UserError, match="evil.pt"):
        common.load_encoder(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size, dim, depth, patch, encoder_count, mae_count", [
    ("base", 768, 12, 16, 85.80, 111.91), ("large", 1024, 24, 16, 303.30, 329.54),
    ("huge", 1280, 32, 14, 630.76, 657.07)])
def test_the_models_have_the_published_names_shapes_and_counts(size, dim, depth, patch, encoder_count, mae_count):
    tokens = 1 + (224 // patch) ** 2
    encoder, mean = (vit_table(dim, depth, (patch, patch), tokens, name) for name in ("norm", "fc_norm"))
    video = vit_table(dim, depth, (2, 16, 16), 1568)
    with torch.device("meta"):
        vit, whole, model = common.ViT(size, patch_size=patch), mae.MAE(size, patch_size=patch), vjepa.VJEPA(size)
        classifier = common.ViT(size, patch_size=patch, pool="mean", num_classes=1000)
        probe = vjepa.AttentiveClassifier(dim, 16, 400)
    for part, count in ((vit, encoder_count), (whole, mae_count)):
        assert sum(p.numel() for p in part.parameters()) / 1e6 == pytest.approx(count, abs=0.011)
    assert shapes(vit) == encoder and shapes(whole) == encoder | decoder_table(dim, patch, tokens)
    assert shapes(classifier) == mean | layer_table("head", 1000, dim)
    assert shapes(model.encoder) == shapes(model.target_encoder) == video
    assert shapes(model.predictor) == predictor_table(dim, 1568) and shapes(probe) == probe_table(dim, 400)


def has_weights(model, weights):
    return all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_published_mae_files(folder, tmp_path, monkeypatch, capsys):
    encoder, whole, tuned = (tmp_path / f"mae_{kind}_vit_nano.pth" for kind in ("pretrain", "visualize", "finetuned"))
    head = filled(vit_table(norm="fc_norm") | layer_table("head", 2, 128))
    torch.save({"model": filled(vit_table())}, encoder)
    torch.save({"model": filled(vit_table() | decoder_table())}, whole)
    torch.save({"model": head, "args": argparse.Namespace(model="vit"), "epoch": 99}, tuned)
    assert has_weights(common.load_encoder(encoder), filled(vit_table()))
    assert has_weights(common.load_encoder(tuned), head)

    show = ["show", "--image", folder / "test/coffee/2.png", "--out", tmp_path / "show", "--init"]
    for flags, pixels in (([], "plain"), (["--norm-pix-loss"], "normalized")):
        main(monkeypatch, *show, whole, *flags)
        assert f"taken to be {pixels} pixels" in capsys.readouterr().out
    assert (tmp_path / "show/reconstruction.png").exists()
    main(monkeypatch, "finetune", "--eval-only", "--init", tuned, "--data", folder, "--workers", 0, "--device", "cpu")
    assert "of 12 validation samples" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="mae_pretrain_vit_nano.pth is an encoder-only checkpoint"):
        main(monkeypatch, *show, encoder)


@pytest.mark.parametrize("method, fixture, kernel, tokens", [
    (mae, "folder", (8, 8), 17), (maskfeat, "folder", (8, 8), 17), (vjepa, "videos", (2, 8, 8), 128)])
def test_pretraining_starts_from_an_encoder(method, fixture, kernel, tokens, request, tmp_path, monkeypatch, capsys,
                                            no_probe):
    """Its weights are taken, the rest is randomly initialized; of V-JEPA, the target encoder is a copy."""
    weights = filled(vit_table(kernel=kernel, tokens=tokens))
    torch.save({"target_encoder" if method is vjepa else "model": weights}, tmp_path / "encoder.pth")
    main(monkeypatch, "--data", request.getfixturevalue(fixture), "--init", tmp_path / "encoder.pth", "--preset",
         "demo", "--batch-size", 4, "--base-lr", 0, "--steps", 1, "--workers", 0, "--device", "cpu", "--out",
         tmp_path / "run", method=method)
    assert "encoder.pth is an encoder-only checkpoint" in capsys.readouterr().out
    after = common.read_weights(tmp_path / "run/last.pt")[0]
    for part in ("encoder.", "target_encoder.") if method is vjepa else ("",):
        for name in ("blocks.2.mlp.fc1.weight", "patch_embed.proj.bias"):
            assert torch.allclose(after[part + name], weights[name], atol=1e-6)


def test_published_vjepa_files(videos, tmp_path, monkeypatch, capsys):
    table, prefix = vit_table(kernel=(2, 8, 8), tokens=128), "module.backbone."
    target = {name: weight + 1 for name, weight in filled(table).items()}
    torch.save({"encoder": filled(table, prefix), "predictor": filled(predictor_table(), prefix), "opt": {"state": {}},
                "target_encoder": {prefix + name: weight for name, weight in target.items()},
                "scaler": None, "epoch": 300, "loss": 0.4, "batch_size": 24, "world_size": 16, "lr": 6e-4},
               tmp_path / "vit.pth.tar")
    torch.save({"classifier": filled(probe_table(), "module."), "epoch": 20}, tmp_path / "probe.pth.tar")
    assert has_weights(common.load_encoder(tmp_path / "vit.pth.tar"), target)

    _, config = parsed(monkeypatch, vjepa, "--init", tmp_path / "vit.pth.tar")
    assert (config.predictor_dim, config.masking, config.context_frames) == (384, "multiblock", None)
    assert has_weights(vjepa.new_model(config).predictor, filled(predictor_table()))

    flags = ["--init", tmp_path / "vit.pth.tar", "--device", "cpu", "--workers", 0]
    show, margin = ["show", *flags, "--image", videos / "val/darker/clip0", "--out", tmp_path], 7 * 36  # 8 times
    main(monkeypatch, *show, method=vjepa)
    assert size_in_tiles(tmp_path / "tokens.png", margin) == (8, 7)
    torch.save({"target_encoder": target}, tmp_path / "encoder.pth")  # no predictor, so no predictions
    main(monkeypatch, *show, "--init", tmp_path / "encoder.pth", method=vjepa)
    assert size_in_tiles(tmp_path / "tokens.png", margin) == (8, 5)
    assert "encoder.pth is an encoder-only checkpoint" in capsys.readouterr().out
    test = ["probe", "--eval-only", *flags, "--data", videos]
    main(monkeypatch, *test, "--classifier", tmp_path / "probe.pth.tar", "--segments", 2, method=vjepa)
    assert "validation samples" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="missing keys pooler.query_tokens, pooler.cross"):
        main(monkeypatch, *test, method=vjepa)


def test_published_maskfeat_files(folder, tmp_path, monkeypatch):
    """Its weights are the start of a training at another size, with learned positions that are interpolated."""
    path = tmp_path / "in1k_VIT_MaskFeat_PT_epoch_01600.pyth"
    table = vit_table(norm="pred_head.transforms.0.0") | {"mask_token": (1, 1, 128)} | layer_table(
        "pred_head.projections.0", 27, 128)
    hogs = {"hogs.0.weight_x": torch.zeros(3, 1, 3, 3), "hogs.0.weight_y": torch.zeros(3, 1, 3, 3)}
    torch.save({"epoch": 1599, "model_state": filled(table) | hogs, "optimizer_state": {}, "cfg": "TRAIN:\n"}, path)
    vit, weights = common.load_encoder(path, pool="mean", num_classes=3, image_size=48), filled(table)
    assert torch.equal(vit.blocks[3].mlp.fc2.weight, weights["blocks.3.mlp.fc2.weight"])
    show = ["show", "--init", path, "--image", folder / "test/coffee/2.png", "--out", tmp_path / "show"]
    main(monkeypatch, *show, method=maskfeat)
    assert (tmp_path / "show/prediction.png").exists()
    main(monkeypatch, "--data", folder, "--init", path, *MASKFEAT_FLAGS, "--image-size", 48, "--base-lr", 0,
         "--min-lr", 0, "--steps", 1, "--out", tmp_path / "run", method=maskfeat)
    after = common.read_weights(tmp_path / "run/last.pt")[0]
    assert torch.equal(after["pos_embed"], common.resize_positions(weights["pos_embed"], (4, 4), (6, 6)))
    assert torch.equal(after["pred_head.1.weight"], weights["pred_head.projections.0.weight"])


@pytest.mark.parametrize("change, message", [
    ({"blocks.2.norm1.weight": None}, "this model: missing keys blocks.2.norm1.weight$"),
    ({"blocks.2.gamma": (3,)}, "this model: unexpected keys blocks.2.gamma$"),
    ({"blocks.2.norm1.weight": (3,), "a": (1,), "b": (1,), "c": (1,), "d": (1,)},
     "unexpected keys a, b, c and 1 more; shape mismatch of blocks.2.norm1.weight$"),
    ({"patch_embed.proj.weight": None},
     "missing keys patch_embed.proj.weight[,;].* keys .*pos_embed, patch_embed.proj.bias"),
    ({"blocks.9.norm1.weight": (128,)}, "of a known size: missing keys none[,;].* keys .*pos_embed"),
    ({"pos_embed": None}, "has rotary positions .no pos_embed., as V-JEPA 2"),
])
def test_a_file_that_does_not_fit_is_named_in_one_sentence(change, message, tmp_path):
    table = {name: shape for name, shape in (vit_table() | change).items() if shape}
    torch.save({"model": filled(table)}, tmp_path / "other.pth")
    with pytest.raises(common.UserError, match=f"other.pth .*{message}"):
        common.load_encoder(tmp_path / "other.pth")


# -------------------------------------------------------------------------------------------------------------- SatMAE


def series(batch=2):
    """Images of three dates, and their time stamps: year, month, hour."""
    stamps = torch.tensor([[[3.0, 4, 10], [3, 5, 11], [9, 0, 23]]]).expand(batch, -1, -1)
    return torch.randn(batch, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), stamps


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_satmae_loss_equals_the_obvious_computation(norm_pix_loss):
    """In the published order of predictions: the k-th predicted band, in the order of the groups, is band k."""
    model, images = tiny_satmae(bands=GROUPS, norm_pix_loss=norm_pix_loss), torch.randn(2, 5, 32, 32)
    visible, masked = random_masks(2, (3, 4, 4))
    loss, pred = model(images, visible, masked)
    w, sample = model.state_dict(), torch.arange(2)[:, None]
    latent = layer(w, "decoder_embed", model.encode(model.embed(images)[sample, visible]))
    x = model.mask_token.repeat(2, 48, 1)
    x[sample, visible] = latent[:, 1:]
    x = torch.cat([latent[:, :1], x], dim=1) + model.decoder_positions(None)
    x = norm(w, "decoder_norm", plain_blocks(w, "decoder_blocks", x, heads=2))[:, 1:].view(2, 3, 16, 48)
    outputs = [layer(w, f"decoder_pred.{g}", x[:, g]).view(2, 16, -1, 64) for g in range(3)]
    target = F.unfold(images, 8, stride=8).transpose(1, 2)  # (2, 16, 5 * 64)
    if norm_pix_loss:
        target = (target - target.mean(2, True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()  # all bands together
    errors = (torch.cat(outputs, dim=2) - target.view(2, 16, 5, 64)).square().mean(dim=3)  # (2, 16, 5)
    errors = torch.cat([errors[:, :, list(group)].mean(dim=2) for group in GROUPS], dim=1)  # (2, 48)
    assert masked.shape == (2, 36) and loss.item() == pytest.approx(errors[sample, masked].mean().item(), rel=1e-5)
    assert [p.shape for p in pred] == [(2, 16, 128), (2, 16, 64), (2, 16, 128)]


@pytest.mark.parametrize("kind, given", [("bands", "0,3/2/1,4"), ("dates", 3)])
@pytest.mark.parametrize("consistent", [True, False])
def test_satmae_masks_and_gradients(kind, given, consistent):
    for masking in ("random", "block", "grid"):
        config = mae.configure(masking=masking, consistent=consistent, **{kind: given})
        torch.manual_seed(0)
        mask = torch.stack([mae.draw_mask(config, (4, 4), position) for position in range(4)])
        slices = mask.view(4, 3, 16)
        assert (mask.sum(dim=1) == 36).all()
        assert (slices.sum(dim=2) == 12).all() == (consistent or masking != "random")
        assert torch.equal(slices[:, 0], slices[:, 1]) == (consistent or masking == "grid")  # which is always the same
    model = tiny_satmae(**({"bands": GROUPS} if kind == "bands" else {"dates": 3}))
    images, *stamps = series(4) if kind == "dates" else [torch.randn(4, 5, 32, 32)]
    model(images, *indices_of(mask), *stamps)[0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_positions_end_with_the_code_of_group_or_date():
    model = tiny_satmae(bands=GROUPS)
    positions = mae.slice_positions(model.pos_embed, model.channel_embed).view(3, 16, 128)
    assert torch.equal(positions[1, :, :64], common.sincos(64, (4, 4)))
    assert torch.equal(positions[2, 5, 64:], common.sincos_1d(64, torch.tensor([2]))[0].float())
    images, stamps = series()
    codes = mae.embed_stamps(stamps, 20)
    assert torch.equal(codes[0, 2, 20:40], common.sincos_1d(20, torch.tensor([0]))[0].float())  # month
    assert torch.equal(codes[1, 0, 40:], common.sincos_1d(20, torch.tensor([10]))[0].float())  # hour
    model = tiny_satmae(dates=3).eval()
    later = stamps + torch.tensor([1.0, 0, 0])
    assert not torch.equal(model.forward_features(images, stamps), model.forward_features(images, later))


def test_published_satmae_files(tmp_path):
    """Names and shapes of the published group-channel and temporal models (ViT-L, 96 and 224 pixels)."""
    groups = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
    with torch.device("meta"):
        bands, dates = mae.SatMAE("large", 96, 8, 10, bands=groups), mae.SatMAE("large", 224, 16, 3, dates=3)
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
    vit = mae.load_satellite_encoder(tmp_path / "satmae.pth", bands=GROUPS, image_size=48, num_classes=2)
    assert vit(torch.randn(1, 5, 48, 48)).shape == (1, 2)
    torch.save({"model": tiny_satmae(dates=3).state_dict(), "settings": {"dates": 3}}, tmp_path / "ours.pt")
    assert mae.load_satellite_encoder(tmp_path / "ours.pt")(*series()).shape == (2, 128)


@pytest.mark.parametrize("kind, samples", [(["--bands", "0,3/2/1,4"], 24), (["--dates", 3], 6)])
def test_satmae_by_command_line(kind, samples, places, tmp_path, monkeypatch, capfd):
    flags = ["--data", places, "--batch-size", 4, "--workers", 0]
    init = ["--init", tmp_path / "run/last.pt"]
    pretrain = [*TINY_FLAGS, *flags, *kind, "--channels", 5, "--steps", 3, "--out", tmp_path / "run"]
    main(monkeypatch, *pretrain, "--consistent")
    mean = common.read_checkpoint(init[1])["settings"]["mean"]
    assert len(mean) == 5 and 0.3 < mean[0] < 0.45 and (tmp_path / "run/reconstruction.png").exists()
    assert records(tmp_path / "run")[-1]["variance_left"] > 0
    for task in (["finetune", "--mixup", 0.8], ["linprobe"]):
        main(monkeypatch, *task, "--preset", "demo", *init, *flags, "--steps", 2, "--out", tmp_path / task[0])
    capfd.readouterr()
    main(monkeypatch, "finetune", "--eval-only", "--init", tmp_path / "finetune/last.pt", *flags)
    assert f"of {samples} validation samples" in capfd.readouterr().out
    image = places / "val/town/1" / ("" if "--dates" in kind else "2016-02-07T12.tif")
    main(monkeypatch, "show", *init, "--image", image, "--out", tmp_path / "s")
    with Image.open(tmp_path / "s/reconstruction.png") as picture:
        assert picture.height > 2.5 * picture.width / 4  # a row for each group or date, of four columns


def test_scenes_of_bands_and_dates():
    train, val = data.Scenes(True, 6, 3), data.Scenes(False, 6)
    pixels, label, stamps = train[4000]
    assert pixels.shape[:2] == (3, 6) and label == 10 and stamps.shape == (3, 3) and stamps[:, 1].max() < 12
    assert torch.equal(pixels, train[4000][0]) and not torch.equal(pixels[0], pixels[1])
    assert len(val[0]) == 2 and val[0][0].shape[0] == 6


@pytest.mark.parametrize("method, tiny", [(mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS),
                                          (vjepa, [*VJEPA_FLAGS, "--still"])])
def test_best_is_of_the_highest_score(method, tiny, folder, tmp_path, monkeypatch, no_probe):
    """And checkpoints are kept every so many steps."""
    scores, evaluate = iter([1.0, 3.0, 2.0]), data.evaluate_features
    monkeypatch.setattr(data, "evaluate_features", lambda *rest: evaluate(*rest) | {"score_knn": next(scores)})
    main(monkeypatch, "--data", folder, *tiny, "--steps", 3, "--evaluate-every", 1, "--keep-every", 2, "--out",
         tmp_path, method=method)
    assert {"feature_std", "effective_rank", "knn"} <= set(records(tmp_path)[1])
    steps = {path.name: common.read_checkpoint(path)["step"] for path in tmp_path.glob("*.pt")}
    assert steps == {"best.pt": 2, "step-00002.pt": 2, "last.pt": 3}


def test_the_score_is_of_training_samples(folder, tmp_path, monkeypatch, capsys, no_probe):
    """Without labels it is the rank."""
    shutil.copytree(folder / "train", tmp_path / "unlabeled")
    flags = [*TINY_FLAGS, "--steps", 2, "--evaluate-every", 1, "--out", tmp_path / "run"]
    main(monkeypatch, "--data", tmp_path / "unlabeled", *flags)
    assert "of the highest score_rank" in capsys.readouterr().out
    record = records(tmp_path / "run")[0]
    assert record["score_rank"] == pytest.approx(record["effective_rank"]) and (tmp_path / "run/best.pt").exists()
    extract = MagicMock(wraps=data.extract_features)
    monkeypatch.setattr(data, "extract_features", extract)
    main(monkeypatch, "--data", folder, *flags, "--fresh")
    assert (tmp_path / "run/best.old.pt").exists()
    # Held-out samples for the log, and the training samples for the score.
    assert [len(call.args[1].source) for call in extract.call_args_list] == [12, 24] * 2


def test_without_labels_the_score_is_the_rank_of_training_samples():
    train, val = (data.Samples(data.Photographs(part, length=60), data.CenterCrop(16)) for part in (True, False))
    inputs, loader = ([lambda x: x.flatten(1)], cpu_loader())
    metrics = data.evaluate_features(*inputs, train, val, loader, 20, False)
    ranks = [data.collapse_metrics(data.extract_features(inputs, samples, loader, 20)[0][0])["effective_rank"]
             for samples in (val, train)]
    assert [metrics["effective_rank"], metrics["score_rank"]] == pytest.approx(ranks) and ranks[0] != ranks[1]


def test_a_file_of_a_model_hub(tmp_path, monkeypatch):
    """With timm's names, as vit_base_patch16_224.mae has them."""
    path, weights = tmp_path / "model.safetensors", filled(vit_table())
    try:
        from safetensors.torch import save_file
        save_file(weights, path)
    except ImportError:  # optional: a reader in its place
        for name in ("safetensors", "safetensors.torch"):
            monkeypatch.setitem(sys.modules, name, argparse.Namespace(load_file=lambda _: dict(weights)))
    vit = common.load_encoder(path)
    assert all(torch.equal(weight, weights[name]) for name, weight in vit.state_dict().items())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(common.UserError, match="model.safetensors, install safetensors"):
        common.load_encoder(path)


@pytest.mark.parametrize("method, tiny, where", [(mae, TINY_FLAGS, "folder"), (vjepa, VJEPA_FLAGS, "videos")])
def test_checkpointing_changes_nothing(method, tiny, where, request, tmp_path, monkeypatch, no_probe):
    flags = ["--data", request.getfixturevalue(where), "--steps", 3, *tiny]
    main(monkeypatch, "--out", tmp_path / "plain", *flags, method=method)
    main(monkeypatch, "--out", tmp_path / "twice", *flags, "--checkpointing", method=method)
    assert losses(tmp_path / "twice") == losses(tmp_path / "plain")


def test_checkpointing_keeps_less():
    kept, model = [], tiny_mae()
    for checkpointing in (False, True):
        config, sizes = config_of(checkpointing=checkpointing, compile=False), []
        net = common.wrap_model(model, config, torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            net(torch.randn(8, 3, 32, 32), *random_masks(8))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_out_of_memory_is_one_sentence(monkeypatch, capsys):
    def full(config):
        """A task."""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(sys, "argv", ["mae.py"])
    with pytest.raises(SystemExit) as exit:
        common.main("", {"pretrain": (full, common.Task, {})}, lambda *_: None)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and len(error.splitlines()) == 1
    assert "--checkpointing" in error and "--accumulate" in error


def test_arrays_and_tiff_files_of_any_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 65535, (40, 48, 5)).astype(np.uint16)
    by_page = array.transpose(2, 0, 1)  # a page for each channel
    writers = {"npy": np.save, "npz": np.savez_compressed, "tif": tifffile.imwrite}
    expected = torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 65535
    for (suffix, write), pixels in itertools.product(writers.items(), (array, by_page)):
        write(tmp_path / f"a.{suffix}", pixels)
        assert torch.allclose(data.read_image(tmp_path / f"a.{suffix}", 5), expected)
    with pytest.raises(ValueError, match="not 4 channels"):
        data.read_image(tmp_path / "a.tif", 4)


def test_series_of_a_place(places, tmp_path):
    images, stamps = data.read_series(places / "val/field/0", 3, 5, at_random=False)
    assert images.shape == (3, 5, 40, 40) and stamps.tolist() == [[14, 0, 11], [14, 1, 12], [14, 2, 13]]
    place = shutil.copytree(places / "val/field/0", tmp_path / "place")
    with pytest.raises(ValueError, match="4 images, fewer than 5 dates"):
        data.read_series(place, 5, 5, at_random=False)
    for name, message in {"12345678.tif": "12345678.tif has no date", "2016-13-01.tif": "2016-13-01.tif has no date",
                          "x.tif": "x.tif has no date", "2016-02-07T12.tif": "differ in size"}.items():
        tifffile.imwrite(place / name, np.zeros((40, 48, 5), np.uint16))
        with pytest.raises(ValueError, match=message):
            data.read_series(place, 4, 5, at_random=False)
        (place / name).unlink()
    shutil.copy(place / "2016-01-07T11.tif", place / "S2A_20160102T235959_7.tif")
    assert [14, 0, 23] in data.read_series(place, 4, 5, at_random=False)[1].tolist()


# ------------------------------------------------------------------------------------------------------- MaskFeat: HOG


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


@pytest.mark.parametrize("hog, cell", [(maskfeat.hog, 4), (maskfeat.hog, 8), (torch.compile(maskfeat.hog), 8)])
def test_hog_equals_its_definition_on_photographs(hog, cell):
    """Under autocast too."""
    images = photographs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        histograms = hog(images.clone().requires_grad_(), cell=cell)
    assert histograms.shape == (15, 3, 9, 96 // cell, 96 // cell)
    assert histograms.dtype == torch.float32 and not histograms.requires_grad
    assert (histograms - hog_by_convolution(images, cell)).abs().max() < 1e-5


def test_hog_equals_scikit_image(monkeypatch):
    """skimage takes centered differences: they are replaced by the Sobel filter. It averages lengths where we add them
    up, which the norm takes out, and has the axes the other way round, so it gets the transposed image."""
    import skimage.feature
    from scipy.ndimage import sobel
    monkeypatch.setattr("skimage.feature._hog._hog_channel_gradient", lambda channel: (
        sobel(channel, 0, mode="mirror"), sobel(channel, 1, mode="mirror")))
    gray = photographs()[:, 1] + 0.01 * torch.randn(15, 96, 96, generator=torch.Generator().manual_seed(0))  # no ties
    histograms = maskfeat.hog(gray[:, None])[:, 0]  # (15, 9, 12, 12)
    for image, ours in zip(gray.double().numpy(), histograms):
        theirs = skimage.feature.hog(image.T, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2",
                                     feature_vector=False)[:, :, 0, 0]  # (columns, rows, bins)
        # A gradient at the very edge between two bins may go to either, as float32 or float64 rounds it.
        assert ((torch.from_numpy(theirs).permute(2, 1, 0) - ours).abs() > 1e-4).float().mean() < 0.005


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_of_hog():
    """Beside the images it takes less than four times what they do."""
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


# -------------------------------------------------------------------------------------------- MaskFeat: masks and model


def draw_masks(masking, grid, ratio=0.4, number=32, seed=0):
    torch.manual_seed(seed)
    return torch.stack([maskfeat.MASKS[masking](grid, ratio) for _ in range(number)])


@pytest.mark.parametrize("masking, grid", [("block", (14, 14)), ("random", (14, 14)), ("cube", (8, 14, 14)),
                                           ("tube", (8, 14, 14)), ("frame", (8, 14, 14)), ("random", (8, 14, 14))])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.8])
def test_maskfeat_masks_have_the_mask_ratio(masking, grid, ratio):
    mask, L = draw_masks(masking, grid, ratio), math.prod(grid)
    step = {"frame": L / 8, "tube": 8}.get(masking, 1)  # tokens that are masked together
    assert mask.dtype == torch.bool and mask.shape == (32, L)
    assert len(mask.sum(dim=1).unique()) == 1 and abs(mask[0].sum() - ratio * L) <= 0.5 * step
    assert torch.equal(mask, draw_masks(masking, grid, ratio))
    assert not torch.equal(mask, draw_masks(masking, grid, ratio, seed=1))
    assert len(mask.unique(dim=0)) > (1 if masking == "frame" else 30)


@pytest.mark.parametrize("masking, grid, edges", [
    ("block", (14, 14), (21, 21.2)), ("cube", (8, 14, 14), (234, 112, 111)), ("tube", (8, 14, 14), (0, 168, 169)),
    ("frame", (8, 14, 14), (735, 0, 0)), ("random", (8, 14, 14), (659, 699, 699))])
def test_masks_have_as_many_edges_as_by_the_published_rules(masking, grid, edges):
    """Along each axis: the mean of 4,000 masks by the rules, written in another way. One of 500 differs by 2 %."""
    mask = draw_masks(masking, grid, number=500).view(500, *grid).int()
    found = [mask.diff(dim=axis).abs().sum().item() / 500 for axis in range(1, mask.ndim)]
    assert found == pytest.approx(edges, rel=0.06)


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("target", ["hog", "pixels"])
def test_maskfeat_loss_equals_the_obvious_computation(frames, target):
    model = tiny_maskfeat(frames=frames, tubelet=min(frames, 2), target=target, cell=4)
    pixels = torch.randn(3, 3, frames, 32, 32)
    visible, masked = indices_of(draw_masks("cube" if frames > 1 else "block", model.grid, number=3))
    loss, pred = model(pixels.squeeze(2), visible, masked)
    images = pixels[:, :, ::2].transpose(1, 2).flatten(0, 1)  # the first frame of each tubelet
    if target == "hog":  # by channel, bin, cell row, cell column
        values = F.unfold(hog_by_convolution(images, 4).flatten(1, 2), 2, stride=2).transpose(1, 2)
    else:  # by row, column, channel
        patches = F.unfold(images, 8, stride=8).unflatten(1, (3, 64)).permute(0, 3, 2, 1).flatten(2)
        values = (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()
    values = values.reshape(3, -1, values.shape[2])[torch.arange(3)[:, None], masked]  # (B, M, K)
    assert torch.allclose(loss, (pred - values).square().mean(), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- clips


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


def clip_samples(files, frames=4):
    return data.Samples(data.Files(files, frames=frames), lambda clips: clips)


@pytest.mark.parametrize("suffix", [None, "mp4", "avi", "mkv"])
def test_clips_of_videos_and_of_folders_of_frames(videos, tmp_path, suffix):
    path = videos / "train/brighter/clip0"
    if suffix:
        path = make_video(tmp_path / f"video.{suffix}", path)
    assert shades(data.read_clips(path, 4, 2, 1)[0]) == [2, 4, 6, 8]  # the middle of 12 frames
    assert shades(data.read_clips(path, 4, 2, 3)) == [[0, 2, 4, 6], [2, 4, 6, 8], [5, 7, 9, 11]]
    assert shades(data.read_clips(path, 8, 2, 1)[0]) == [0, 2, 4, 6, 8, 10, 11, 11]  # the last one is repeated
    clips = [data.read_clips(path, 4, 2) for _ in range(50)]
    assert clips[0].shape == (1, 4, 3, 40, 48) and clips[0].dtype == torch.uint8
    assert {shades(clip[0])[0] for clip in clips} == {0, 1, 2, 3, 4, 5}
    assert data.read_clips(path, 4, 2, channels=1).shape == (1, 4, 1, 40, 48)


def test_a_variable_frame_rate_keeps_the_speed(videos, tmp_path):
    """The first half of the video at 10 frames a second, the second half at 5: its frames count twice."""
    path = make_video(tmp_path / "vfr.mkv", videos / "train/brighter/clip0", "-vf",
                      "settb=1/1000,setpts='if(lt(N,6),N*100,600+(N-6)*200)'", "-fps_mode", "vfr")
    found = shades(data.read_clips(path, 6, 2, 1)[0])
    at_equal_times = [0, 2, 5, 7, 8, 9]  # of 1.8 seconds
    assert all(abs(a - b) <= 1 for a, b in zip(found, at_equal_times)), found


def test_folders_of_frames_with_gaps_gray_and_alpha(tmp_path):
    for number in (1, 2, 3, 9, 10, 11):  # a gap, and numbers that do not sort as text
        mode = {2: "L", 3: "RGBA", 9: "P"}.get(number, "RGB")
        Image.new("RGB", (40, 40), (20 * number,) * 3).convert(mode).save(tmp_path / f"{number}.png")
    assert shades(data.read_clips(tmp_path, 6, 1, 1)[0]) == [1, 2, 3, 9, 10, 11]
    Image.fromarray(np.full((40, 40), 20 * 256 + 20, np.uint16)).save(tmp_path / "1.png")  # one frame of 16 bits
    clip = data.read_clips(tmp_path, 6, 1, 1)[0]
    assert clip.dtype == torch.float32 and clip[:2].mean((1, 2, 3)).tolist() == pytest.approx([20 / 255, 40 / 255])
    (tmp_path / "3.png").write_bytes(b"broken")
    with pytest.raises(common.UserError, match="none of the files can be read"):
        clip_samples([(tmp_path, 0)], frames=6)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_video_is_skipped_and_named(videos, tmp_path, damage, capsys):
    make_video(tmp_path / "a.mp4", videos / "train/brighter/clip0")
    good = make_video(tmp_path / "b.mp4", videos / "train/darker/clip0").read_bytes()
    (tmp_path / "b.mp4").write_bytes({"truncated": good[:len(good) // 2], "text": b"no video", "empty": b""}[damage])
    samples = clip_samples(data.find_files(tmp_path, clips=True))
    assert samples.example(1)[0].shape == (1, 3, 4, 40, 48)  # the other one takes its place
    assert "b.mp4" in capsys.readouterr().err
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(common.UserError, match="none of the files can be read.*b.mp4"):
        clip_samples(data.find_files(tmp_path, clips=True))


@pytest.mark.parametrize("missing", ["torchcodec", "ffmpeg"])
def test_without_torchcodec_or_ffmpeg_only_video_files_fail(videos, tmp_path, monkeypatch, missing):
    without_ffmpeg = MagicMock(side_effect=RuntimeError("Could not load libtorchcodec. Likely causes: ..."))
    module = argparse.Namespace(VideoDecoder=without_ffmpeg) if missing == "ffmpeg" else None
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(common.UserError, match="a.mp4, install torchcodec .* and FFmpeg"):
        clip_samples([(tmp_path / "a.mp4", 0)])
    assert data.read_clips(videos / "train/brighter/clip0", 4, 1).shape == (1, 4, 3, 40, 48)


def test_lists_of_paths_and_labels(videos, tmp_path):
    for name in ("train", "val"):
        lines = [f"{videos}/{name}/{label}/clip{i} {label}" for label in ("darker", "brighter") for i in range(3)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    train, val, classes = data.open_sources(tmp_path, frames=4)
    assert classes == ["brighter", "darker"] and train.labels.tolist() == [1, 1, 1, 0, 0, 0] and val.segments == 1
    assert shades(val[0][0][0]) == [7, 6, 5, 4] and val[0][1] == 1
    assert data.open_sources(videos, frames=4)[2] == classes
    assert data.open_sources(tmp_path, labeled=False, frames=4)[2] == classes  # for the probes
    (tmp_path / "val.txt").write_text("a.mp4\n")
    assert data.open_sources(tmp_path, labeled=False, frames=4)[1:] == (None, None)
    (tmp_path / "paths.txt").write_text("a b.mp4\nc.mp4\n")
    assert [p for p, _ in data.read_list(tmp_path / "paths.txt")] == [f"{tmp_path}/a b.mp4", f"{tmp_path}/c.mp4"]
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
    farther = data.Clips(True, 8, frame_stride=8)
    slow, fast = (torch.stack([clips[i][0][0].float() for i in range(0, 6000, 60)]) for clips in (train, farther))
    assert (fast[:, 0] - fast[:, -1]).abs().mean() > (slow[:, 0] - slow[:, -1]).abs().mean()
    shift = {}  # a pan to the right moves the picture to the left
    for i in range(400):
        clip, label = train[i]
        clip = clip[0].float().mean(1)
        errors = [(clip[1, :, 8:-8] - clip[0, :, 8 + s:56 + s]).abs().mean() for s in range(-6, 7)]
        shift.setdefault(train.classes[label], []).append(int(torch.stack(errors).argmin()) - 6)
    assert np.median(shift["pan right"]) > 0 > np.median(shift["pan left"])


def test_labels_of_built_in_clips_cannot_be_told_from_colors():
    """Mean and std of each color say as little of the motion as chance does, 8.3 %."""
    moments = []
    for clips in (data.Clips(True, 8, length=1200, frame_stride=8), data.Clips(False, 8, length=600, frame_stride=8)):
        pixels, labels = zip(*(clips[i] for i in range(len(clips))))
        pixels = torch.stack(pixels).float().transpose(2, 3).flatten(3)  # (N, 1, C, everything else)
        moments += [torch.cat([pixels.mean(3), pixels.std(3)], dim=2)[:, 0], torch.tensor(labels)]
    assert data.ridge_probe(*moments) < 12.5  # chance and four std


def test_logits_of_several_clips_are_averaged():
    torch.manual_seed(0)
    model = maskfeat.Classifier("nano", 32, 8, frames=4, tubelet=2, num_classes=6, pool="mean")
    clips = torch.randn(2, 5, 3, 4, 32, 32)  # (B, segments, C, T, H, W)
    each = [model(clips[:, segment]) for segment in range(5)]
    assert torch.allclose(model(clips), sum(each) / 5, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- V-JEPA


def drawn_masks(config, grid, positions):
    """V-JEPA's masks (B, kinds, L) of the samples at some positions of a run."""
    draw = functools.partial(vjepa.draw_masks, config, grid)
    samples = data.Samples([(torch.zeros(3, 1, 1), 0)], torch.clone, config.seed, draw)
    return torch.stack([samples[0, position][-1] for position in positions])


def literal_masks(blocks, grid, step, context_times):
    """The published rule for a step of four clips: visible and masked indices, of each kind of mask."""
    times, rows, columns = grid
    pairs = []
    generators = [torch.Generator().manual_seed(common.derive_seed(0, common.MASK, 4 * step + b)) for b in range(4)]
    for number, scale in blocks:
        generator = torch.Generator().manual_seed(common.derive_seed(0, common.BLOCK_SIZE, step))
        aspect = 0.75 + torch.rand((), generator=generator).item() * (1.5 - 0.75)
        area = int(rows * columns * scale)
        height = min(int(round(math.sqrt(area * aspect))), rows)
        width = min(int(round(math.sqrt(area / aspect))), columns)
        contexts = np.zeros((4, *grid), bool)
        for context, generator in zip(contexts, generators):
            while not context.any():
                context[:context_times] = True
                for _ in range(number):
                    top = int(torch.randint(0, rows - height + 1, (1,), generator=generator))
                    left = int(torch.randint(0, columns - width + 1, (1,), generator=generator))
                    context[:, top:top + height, left:left + width] = False
        for masks in (contexts, ~contexts):
            indices = [np.flatnonzero(mask) for mask in masks]
            pairs.append(np.stack([part[:min(map(len, indices))] for part in indices]))
    return pairs


@pytest.mark.parametrize("masking, blocks", [("multiblock", [(8, 0.15), (2, 0.7)]), ("block", [(1, 0.8)])])
@pytest.mark.parametrize("context_frames", [None, 6])
def test_vjepa_masks_equal_the_published_rule(masking, blocks, context_frames):
    """Equal indices in every batch, so their numbers have the same mean and spread too."""
    config = mask_config(masking=masking, mask_ratio=0.8, context_frames=context_frames)
    lengths = []
    for step in range(400):
        visible, masked = indices_of(drawn_masks(config, (8, 14, 14), range(4 * step, 4 * step + 4)))
        ours = [indices for pair in zip(visible, masked, strict=True) for indices in pair]
        literal = literal_masks(blocks, (8, 14, 14), step, (context_frames or 16) // 2)
        assert len(ours) == len(literal) and all(map(np.array_equal, ours, literal))
        lengths.append([indices.shape[1] for indices in ours])
    assert np.std(lengths, axis=0).min() > (10 if masking == "multiblock" else 3)  # the lengths do change


def test_the_size_of_the_blocks_depends_on_the_seed():
    heights = []
    for seed in range(20):
        mask, = vjepa.draw_masks(mask_config(masking="block", mask_ratio=0.3, seed=seed), (1, 14, 14), 0)
        heights.append(int(mask.view(14, 14).any(dim=1).sum()))
    assert len(set(heights)) > 2


@pytest.mark.parametrize("context_frames", [None, 6])
def test_vjepa_tubes_are_random_patches_at_all_times(context_frames):
    config = mask_config(masking="tube", mask_ratio=0.9, context_frames=context_frames)
    times = (context_frames or 16) // 2
    masks = drawn_masks(config, (8, 6, 6), range(320))[:, 0].unflatten(1, (8, 36))
    assert (masks[:, :times] == masks[:, :1]).all() and masks[:, times:].all()
    assert ((~masks[:, 0]).sum(dim=1) == 3).all()
    assert len(masks[:, 0].unique(dim=0)) > 300  # they are drawn for each clip
    assert (masks[:, 0].double().mean(dim=0) - 11 / 12).abs().max() < 0.06


@pytest.mark.parametrize("method, tiny, where", [RUNS[0], RUNS[1], RUNS[3]])
def test_masks_depend_on_seed_and_position_alone(method, tiny, where, request, seven, tmp_path, monkeypatch, no_probe):
    """Not on workers, augmentation, images, micro-batches, world size; equal micro-batches have equal indices."""
    model = {mae: mae.MAE, maskfeat: maskfeat.MaskFeat, vjepa: vjepa.VJEPA}[method]
    to_indices, forward, leaves = data.Loader.to_indices, model.forward, torch.utils._pytree.tree_leaves
    default = request.getfixturevalue(where)
    monkeypatch.setattr(data, "evaluate_features", lambda *_: {})
    monkeypatch.setattr(data, "evaluate_predictions", lambda *_: {"variance_left": 1, "variance_left_neighbors": 1})

    def seen(*flags, images=default, world_size=1, rank=0):
        """The masks that a run draws, and the indices that its model gets, an entry a micro-batch."""
        masks, indices = [], []
        monkeypatch.setattr(data.Loader, "to_indices", lambda loader, mask: (
            masks.append(mask.flatten(1).tolist()) or to_indices(loader, mask)))
        monkeypatch.setattr(model, "forward", lambda model, pixels, *rest: (
            indices.append([x.tolist() for x in leaves(rest)]) or forward(model, pixels, *rest)))
        monkeypatch.setattr(data, "get_world_size", lambda: world_size)
        monkeypatch.setattr(data, "get_rank", lambda: rank)
        main(monkeypatch, "--data", images, *tiny, "--steps", 2, "--out", tmp_path, "--fresh", *flags, method=method)
        return masks, indices
    masks, indices = seen()
    read_image = data.read_image
    monkeypatch.setattr(data, "read_image", lambda *inputs: torch.rand(1) is None or read_image(*inputs))  # a draw
    changes = {mae: [], maskfeat: ["--no-flip"], vjepa: ["--no-flip", "--still"]}[method]
    assert seen("--workers", 2, *changes, images=seven) == (masks, indices)
    micro_masks, micro_indices = seen("--accumulate", 2)
    assert sum(micro_masks, []) == sum(masks, [])
    for rank in (0, 1):
        assert seen(world_size=2, rank=rank) == (micro_masks[rank::2], micro_indices[rank::2])
    samples = sum(masks + seen("--seed", 1)[0], [])
    assert len(samples) == 32 and len(set(map(tuple, samples))) > 28  # other seeds and positions have other masks


@pytest.mark.parametrize("target", ["latent", "pixels"])
def test_vjepa_loss_equals_the_obvious_computation(target):
    model, clips = noisy(tiny_vjepa(target=target)), torch.randn(3, 3, 4, 32, 32).double()
    (visible, masked), w = tiny_masks(3), model.state_dict()
    features, by_kind = plain_encoder(part_of(w, "target_encoder."), clips), []
    for kind in (0, 1):
        context = plain_encoder(part_of(w, "encoder."), clips, visible[kind])
        pred = plain_predictor(part_of(w, "predictor."), context, visible[kind], masked[kind], kind)
        errors = []
        for b, k in itertools.product(range(3), range(masked[kind].shape[1])):
            token = int(masked[kind][b, k])
            time, row, column = token // 16, token % 16 // 4, token % 4
            wanted = clips[b, :, 2 * time:2 * time + 2, 8 * row:8 * row + 8, 8 * column:8 * column + 8]
            wanted = features[b, token] if target == "latent" else wanted.permute(1, 2, 3, 0).flatten()
            variance = wanted.var(unbiased=False) + 1e-5 if target == "latent" else wanted.var() + 1e-6
            error = (wanted - wanted.mean()) / variance.sqrt() - pred[b, k]
            errors.append(error.abs() if target == "latent" else error ** 2)
        by_kind.append(torch.stack(errors).mean().item())
    assert model(clips, visible, masked).item() == pytest.approx(sum(by_kind) / 2, rel=1e-5)
    targets = model.targets(clips)
    assert targets.mean(-1).abs().max() < 1e-5 and targets.var(-1).sub(1).abs().max() < 0.02


def test_the_target_encoder_follows_in_the_run_and_its_features_are_evaluated(videos, tmp_path, monkeypatch, no_probe):
    ends, logs = {}, {}
    for momentum in (0, 0.5, 1):
        out = tmp_path / str(momentum)
        flags = ["--momentum", momentum, "--final-momentum", momentum, "--steps", 3 if momentum == 1 else 1]
        main(monkeypatch, "--data", videos, *VJEPA_FLAGS, *flags, "--warmup", 0, "--evaluate-every", 1, "--out", out,
             method=vjepa)
        weights, logs[momentum] = common.read_checkpoint(out / "last.pt")["model"], records(out)
        parts = [part_of(weights, name).values() for name in ("encoder.", "target_encoder.")]
        ends[momentum] = [torch.cat([weight.flatten() for weight in part]) for part in parts]
    start = ends[1][1]
    assert torch.equal(*ends[0]) and not torch.allclose(ends[0][0], start)
    assert torch.allclose(ends[0.5][1], (start + ends[0.5][0]) / 2, atol=1e-7)
    assert len({record["feature_std"] for record in logs[1]}) == 1  # where it stays, so do the metrics
    assert logs[1][0]["feature_std"] != logs[0][0]["feature_std"]


def test_segments_are_attended_together_and_views_averaged():
    torch.manual_seed(0)
    model = vjepa.Classifier(common.ViT("nano", 32, 8, frames=4, tubelet=2, class_token=False), 5)
    clips = torch.randn(2, 3, 4, 3, 4, 32, 32)  # (B, views, segments, C, T, H, W)
    tokens = [[model.encoder.forward_features(clips[:, view, s]) for s in range(4)] for view in range(3)]
    logits = [model.classifier(torch.cat(parts, dim=1)) for parts in tokens]
    probabilities = sum(x.softmax(-1) for x in logits) / 3
    assert torch.allclose(model(clips).exp(), probabilities, atol=1e-6)
    assert torch.allclose(model(clips[:, 0]), logits[0], atol=1e-6)


def test_the_probe_gets_all_segments_and_in_a_test_all_views(videos, tmp_path, monkeypatch):
    shapes, forward = set(), vjepa.Classifier.forward
    monkeypatch.setattr(vjepa.Classifier, "forward", lambda model, clips: (
        shapes.add((model.training, clips.shape[1:-4])) or forward(model, clips)))
    main(monkeypatch, "probe", "--data", videos, *MASKFEAT_FLAGS, "--frames", 4, "--patch-size", 8, "--segments", 2,
         "--views", 3, "--steps", 1, "--out", tmp_path, method=vjepa)
    assert shapes == {(True, (2,)), (False, (3, 2))}


def test_views_cover_the_longer_side_and_stills_repeat():
    clip = torch.arange(48).repeat(3, 2, 3, 32, 1).byte()  # (segments, T, C, 32, 48): the column is the value
    views = data.CenterCrop(32, views=3)(clip)
    assert views.shape == (3, 3, 2, 3, 32, 32)
    assert views[:, 0, 0, 0, 0, 0].tolist() == [0, 8, 16]
    assert data.CenterCrop(32)(clip).shape == (3, 2, 3, 32, 32)
    still = data.repeat_in_time(data.CenterCrop(32)(Image.new("RGB", (40, 40), (255, 0, 0))), 4)
    assert still.shape == (1, 4, 3, 32, 32) and (still[:, :, 0] == 255).all()


def test_knn_accuracy_and_collapse_metrics():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    centers = 3 * torch.randn(3, 8, generator=generator)
    x = centers[labels] + 0.1 * torch.randn(90, 8, generator=generator)
    assert data.knn_accuracy(x, labels) == 100
    assert data.knn_accuracy(torch.randn(90, 8, generator=generator), labels) < 60
    pairs = torch.tensor([[1.0, 0], [1.01, 0.1], [-1, 0], [-1.01, 0.1]])
    assert data.knn_accuracy(pairs, torch.tensor([0, 1, 0, 1]), neighbors=1) == 0  # the sample itself is none
    train, classes = torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([3, 5, 4])
    assert data.knn_accuracy(2 * train[:2] + 1 / 3, torch.tensor([3, 4]), train, classes, neighbors=1) == 50
    flat = torch.randn(4000, 3, generator=generator) @ torch.linalg.qr(torch.randn(8, 3, generator=generator))[0].T
    assert data.collapse_metrics(flat) == pytest.approx({"feature_std": 1, "effective_rank": 3}, rel=0.01)
    moved = data.collapse_metrics(100 * (flat + 3))
    assert moved["feature_std"] == pytest.approx(math.sqrt(3 / 8 / (3 / 8 + 9)), rel=0.05)
    same = data.collapse_metrics(torch.ones(50, 8))
    assert same["feature_std"] == 0 and same["effective_rank"] < 1.01


def test_an_encoder_of_clips_encodes_images(tmp_path):
    """As it encodes a tubelet of equal frames; MAE's fine-tuning takes it."""
    model = noisy(tiny_vjepa())
    torch.save({"model": model.state_dict(), "settings": {"frames": 4, "image_size": 32}}, tmp_path / "last.pt")
    images = torch.randn(2, 3, 32, 32)
    clips = images[:, :, None].repeat(1, 1, 2, 1, 1)
    wanted = common.load_encoder(tmp_path / "last.pt", frames=2).forward_features(clips)
    found = common.load_encoder(tmp_path / "last.pt", frames=1)
    assert found.grid == (4, 4)
    torch.testing.assert_close(found.forward_features(images), wanted)
    config = mae.configure("finetune", "demo", data="DIR", init=str(tmp_path / "last.pt"), image_size=32)
    assert mae.new_classifier(config, 3)(images).shape == (2, 3)


@pytest.mark.parametrize("grid", [(2, 3), (4, 2, 2)])
def test_trivial_predictions_equal_the_obvious_computation(grid):
    torch.manual_seed(0)
    targets, visible = torch.randn(3, math.prod(grid), 5), torch.rand(3, math.prod(grid)) < 0.4
    visible[:, 0] = True
    found, places = data.trivial_predictions(targets, visible, grid), list(np.ndindex(grid))
    for i, place in itertools.product(range(3), places):
        seen = {other: x for other, x, v in zip(places, targets[i], visible[i]) if v}
        weights = {other: math.exp(-math.dist(place, other) ** 2 / 2) for other in seen}
        average = sum(weights[other] * x for other, x in seen.items()) + sum(seen.values()) / len(seen)
        average = average / (sum(weights.values()) + 1)
        neighbors, *last_time = (x[i, places.index(place)] for x in found.values())
        assert torch.allclose(neighbors, average, atol=1e-5) and len(last_time) == len(grid) - 2
        if last_time:
            before = [seen[t, *place[1:]] for t in range(place[0]) if (t, *place[1:]) in seen]
            assert torch.allclose(last_time[0], before[-1] if before else average, atol=1e-5)


def test_a_perfect_prediction_leaves_no_variance_and_the_mean_all():
    """Of two slices with other numbers of values; at tokens that are not masked a prediction does not count."""
    torch.manual_seed(0)
    targets, masked = [torch.randn(6, 4, k) + 3 for k in (2, 5)], torch.rand(2, 6, 4) < 0.5
    means = [t[m].mean(dim=0).expand_as(t) for t, m in zip(targets, masked)]
    for wanted, preds in ((0, targets), (1, means), (0.25, [(t + mean) / 2 for t, mean in zip(targets, means)])):
        slices = [(torch.where(m[..., None], p, math.nan), t, ~m, m) for p, t, m in zip(preds, targets, masked)]
        batches = [[tuple(x[k:k + 3] for x in parts) for parts in slices] for k in (0, 3)]
        assert data.variance_left(batches, (2, 2))["variance_left"] == pytest.approx(wanted, abs=1e-5)
    assert "with 0.61 of the variance left (visible neighbors 0.74, mean 1)" in data.describe_variance_left(
        {"variance_left": 0.612, "variance_left_neighbors": 0.738}, "HOG")


@pytest.mark.parametrize("method, tiny, where", [RUNS[0], RUNS[1], RUNS[3]])
def test_predictions_are_evaluated_on_the_same_masks_and_change_nothing(method, tiny, where, request, tmp_path,
                                                                        no_probe, monkeypatch, capsys):
    flags = ["--data", request.getfixturevalue(where), *tiny, "--steps", 3]
    flags += ["--momentum", 1, "--final-momentum", 1] if method is vjepa else []  # the same targets at all steps
    main(monkeypatch, *flags, "--evaluate-every", 5, "--out", tmp_path / "without", method=method)
    capsys.readouterr()
    main(monkeypatch, *flags, "--evaluate-every", 1, "--out", tmp_path / "with", method=method)
    log = records(tmp_path / "with")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert torch.equal(end_of(tmp_path / "with"), end_of(tmp_path / "without"))
    assert len({record["variance_left_neighbors"] for record in log}) == 1 == len(log) - 2
    assert len({record["variance_left"] for record in log}) == 3
    kind = {mae: "pixels", maskfeat: "HOG", vjepa: "features"}[method]
    line = f"predicts masked {kind} of held-out (images|clips) with {log[-1]['variance_left']:.2f} of the variance left"
    assert re.search(line, capsys.readouterr().out)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_blocks_share_a_graph_for_all_lengths(checkpointing, monkeypatch):
    torch.compiler.reset()
    graphs, lengths, model = [], set(), tiny_vjepa()
    names = list(model.state_dict())
    backend = functools.partial(torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph)
    monkeypatch.setattr(torch, "compile", backend)
    net = common.wrap_model(model, config_of(compile=True, checkpointing=checkpointing), torch.device("cpu"), True)
    assert list(model.state_dict()) == names
    for step in range(50):
        masks = tiny_masks(4, step=step)
        lengths.add(tuple(indices.shape[1] for indices in masks[0] + masks[1]))
        with torch.compiler.set_stance("default" if step < 2 else "fail_on_recompile"):
            net(torch.randn(4, 3, 4, 32, 32), *masks).backward()
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):  # an evaluation needs no more graphs
        vjepa.masked_predictions(model, contextlib.nullcontext())(torch.randn(1, 3, 4, 32, 32), None, *tiny_masks(1))
    assert len(lengths) > 4 and 3 <= len(graphs) <= 5  # of both encoders and the predictor, some twice


def test_a_collapse_is_noticed(tmp_path, monkeypatch, capsys):
    """Momentum 0 and a predictor that learns nothing: all features become the same."""
    new_model = vjepa.new_model

    def without_predictor(config):
        model = new_model(config)
        model.predictor.requires_grad_(False)
        return model
    monkeypatch.setattr(vjepa, "new_model", without_predictor)
    flags = ["--momentum", 0, "--schedule-scale", 1000, "--steps", 120, "--evaluate-every", 40, "--base-lr", 4]
    main(monkeypatch, *flags, *VJEPA_FLAGS, "--evaluate-samples", 20, "--out", tmp_path / "run", method=vjepa)
    error = capsys.readouterr().err
    assert "the features collapse" in error and "raise --momentum" in error


# -------------------------------------------------------------------------------------------------------------- runs


def size_in_tiles(path, margin=0):
    """(columns, rows) of a picture of tiles of 224 pixels, with white between them and around their titles."""
    width, height = Image.open(path).size
    assert (width - margin) % 228 == 4
    return (width - margin) // 228, height // 228


def end_of(out):
    """All weights at the end of a run."""
    weights = common.read_checkpoint(out / "last.pt")["model"]
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("method, tiny", [(mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS)])
def test_tasks_on_images_by_command_line(method, tiny, folder, tmp_path, monkeypatch, capsys):
    def printed(*arguments):
        main(monkeypatch, *arguments, "--device", "cpu", "--workers", 0, method=method)
        return "".join(capsys.readouterr())
    init = tmp_path / "run/last.pt"
    report = printed("--data", folder, "--out", tmp_path / "run", "--steps", 2, *tiny, "--masking", "block")
    assert "before training" in report and "1 of 24 files" in report and len(losses(tmp_path / "run")) == 2
    flags = ["--preset", "demo", "--data", folder, "--init", init, "--batch-size", 8]
    strong = ["--mixup", 0.8, "--cutmix", 1, "--randaugment", 9, "--erasing", 0.25, "--drop-path", 0.1]
    report = printed("finetune", *flags, *strong, "--out", tmp_path / "f", "--epochs", 1, "--image-size", "32x40")
    record = records(tmp_path / "f")[-1]
    assert {"step", "loss", "lr", "top1", "top5"} <= set(record) and f"top-1 {record['top1']:.2f}" in report
    tested = printed("finetune", "--eval-only", "--data", folder, "--init", tmp_path / "f/last.pt")
    assert f"top-1 {record['top1']:.2f}" in tested
    assert "of 12 validation samples" in printed(
        "finetune", "--eval-only", "--data", folder, "--init", tmp_path / "f/last.pt", "--image-size", 48)
    image = next((folder / "test/coffee").glob("*.png"))
    printed("show", "--init", init, "--image", image, "--out", tmp_path / "s")
    picture, = (tmp_path / "s").glob("*.png")
    assert size_in_tiles(picture) == (3 if method is mae else 4, 1)
    if method is mae:
        printed("linprobe", *flags, "--out", tmp_path / "l", "--steps", 3)
        before, after = common.read_weights(init)[0], common.read_weights(tmp_path / "l/last.pt")[0]
        assert torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])  # frozen
        names = {name for name in after if name.startswith("head.0")}  # nothing of BatchNorm is learned
        assert names == {f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        assert after["head.1.weight"].shape == (2, 128)


def test_a_classifier_is_tested_after_each_epoch_and_at_the_end(folder, tmp_path, monkeypatch):
    main(monkeypatch, "finetune", "--data", folder, "--steps", 8, *MASKFEAT_FLAGS, "--out", tmp_path)
    assert [record["step"] for record in records(tmp_path) if "top1" in record] == [3, 6, 8]  # 24 images: 3 steps


def test_runs_from_python_leave_their_config_and_the_process_as_they_were(videos, tmp_path):
    handlers, ends = (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)), []
    for out in (tmp_path / "first", tmp_path / "second"):
        config = vjepa.configure("pretrain", "demo", data=str(videos), out=str(out), steps=2, device="cpu", workers=0,
                                 batch_size=8, image_size=24, frames=4, log_every=1)
        before = dataclasses.asdict(config)
        vjepa.pretrain(config)
        assert dataclasses.asdict(config) == before
        ends.append(end_of(out))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    assert torch.equal(*ends) and losses(tmp_path / "first") == losses(tmp_path / "second")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize("method, tiny, where", [
    *RUNS, (mae, FINETUNE_FLAGS, "folder"), (mae, [*TINY_FLAGS, "--precision", "fp16"], "folder")])
def test_a_run_resumes_where_a_signal_stopped_it_and_ends_the_same(method, tiny, where, request, tmp_path, monkeypatch):
    flags = ["--data", request.getfixturevalue(where), "--steps", 5, "--save-every", 10, *tiny]
    main(monkeypatch, "--out", tmp_path / "whole", *flags, method=method)
    write = common.Log.write

    def interrupt(log, step, *rest, **values):
        write(log, step, *rest, **values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    out, board = tmp_path / "parts", MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with monkeypatch.context() as patch, pytest.raises(common.Stopped) as stopped:
        patch.setattr(common.Log, "write", interrupt)
        main(patch, "--out", out, *flags, method=method)
    assert stopped.value.number == signal.SIGTERM and common.read_checkpoint(out / "last.pt")["step"] == 3
    assert board.SummaryWriter().method_calls[-1][0] == "flush"  # else the last records are lost
    main(monkeypatch, "--out", out, *flags, method=method)
    assert board.SummaryWriter.call_args.kwargs == {"purge_step": 3}
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 5
    assert torch.equal(end_of(out), end_of(tmp_path / "whole"))


def test_the_best_score_and_the_scale_of_fp16_survive_a_restart(folder, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(data, "evaluate_features", lambda *rest: {"score_knn": next(scores)})
    flags = ["--data", folder, "--steps", 3, *TINY_FLAGS, "--precision", "fp16", "--out", tmp_path]
    flags += ["--evaluate-every", 1, "--save-every", 1]
    main(monkeypatch, *flags)
    (tmp_path / "last.pt").unlink()  # what is left, previous.pt, is of step 2
    before = common.read_checkpoint(tmp_path / "previous.pt")
    before["scaler"]["scale"] = 1024.0
    torch.save(before, tmp_path / "previous.pt")
    main(monkeypatch, *flags)
    assert common.read_checkpoint(tmp_path / "best.pt")["step"] == 1
    assert common.read_checkpoint(tmp_path / "last.pt")["scaler"]["scale"] == 1024


FINETUNES = ["--smoothing 0.5", "--erasing 1", "--randaugment 9", "--drop-path 0.5"]


@pytest.mark.parametrize("task, flags", [  # those that the other tests of runs do not see
    ("mae", ["--masking block", "--mask-ratio 0.5", "--norm-pix-loss", "--measure", "--mean 0 0 0 --std 1 1 1"]),
    ("maskfeat", ["--masking block", "--mask-ratio 0.5", "--target pixels", "--cell 4", "--no-flip"]),
    ("vjepa", ["--masking tube", "--context-frames 2", "--target pixels", "--no-flip", "--frame-stride 1"]),
    ("mae finetune", [*FINETUNES, "--pool class", "--mixup 0.8", "--cutmix 1"]), ("mae linprobe", ["--pool class"]),
    ("maskfeat finetune", [*FINETUNES, "--mixup 0.8", "--no-flip"]), ("vjepa probe", ["--flip", "--randaugment 9"]),
    ("vjepa finetune", FINETUNES)])
def test_flags_change_the_run(task, flags, request, tmp_path, monkeypatch, no_probe):
    method, tiny, where = TASKS[task]
    ends = []
    for flag in ["", *flags]:
        main(monkeypatch, "--data", request.getfixturevalue(where), *tiny, "--steps", 2, "--warmup", 0, *flag.split(),
             "--out", tmp_path, "--fresh", method=method)
        ends.append(end_of(tmp_path))
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
        pixels = torch.stack([data.CenterCrop(32)(Image.open(path)) for path in paths]) / 255
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
        correct = logits.topk(5).indices == labels[:, None]
        return [100 * correct[:, :k].any(dim=1).double().mean().item() for k in (1, 5)]
    assert accuracies("train")[0] > 70
    assert accuracies("val") == pytest.approx([records(tmp_path)[-1][name] for name in ("top1", "top5")])


@pytest.mark.parametrize("method, tiny", [(mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS),
                                          (vjepa, [*VJEPA_FLAGS, "--still"])])
def test_probes_are_fitted_on_training_images_and_tested_on_others(method, tiny, seven, tmp_path, monkeypatch, capsys):
    """Training images are told by their color, validation images cannot be told."""
    encoders, print_probe, knn_accuracy = {}, data.print_probes, data.knn_accuracy

    def knn(x, labels, train_x=None, *others, **options):
        assert train_x is None or not torch.equal(x, train_x)
        return knn_accuracy(x, labels, train_x, *others, **options)
    monkeypatch.setattr(data, "knn_accuracy", knn)
    monkeypatch.setattr(data, "print_probes", lambda *inputs: encoders.update(inputs[0]) or print_probe(*inputs))
    main(monkeypatch, "--data", seven, *tiny, "--steps", 1, "--warmup", 0, "--out", tmp_path, method=method)
    batch = torch.randn(2, 3, *[4] * (method is vjepa), 32, 32)
    assert not torch.equal(*(encode(batch) for encode in encoders.values()))
    pattern = r"chance 14.3 %; ridge .* training, (.*) % after; 20 .* training, (.*) % after"
    found = re.search(pattern, capsys.readouterr().out)
    assert float(found[1]) < 40 and float(found[2]) < 40
    assert records(tmp_path)[0]["knn"] < 40 and records(tmp_path)[0]["score_knn"] > 90


@pytest.mark.parametrize("task", TASKS)
def test_augmentation_depends_on_the_seed(task, folder, tmp_path, monkeypatch, no_probe):
    """All images are the same one, so that batches differ by the augmentation alone."""
    for name, i in itertools.product(("train/a", "train/b", "val/a", "val/b"), range(4)):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "test/coffee/4.png", tmp_path / "images" / name / f"{i}.png")
    method, tiny, _ = TASKS[task]
    still, seen, embed = ["--still"] * (task == "vjepa"), {0: [], 1: []}, common.PatchEmbed.forward
    monkeypatch.setattr(common.PatchEmbed, "forward", lambda *inputs: seen[seed].append(inputs[1]) or embed(*inputs))
    for seed in seen:
        main(monkeypatch, "--data", tmp_path / "images", *tiny, *still, "--steps", 1, "--seed", seed,
             "--out", tmp_path / str(seed), method=method)
    assert seen[0][0].shape == seen[1][0].shape and not torch.equal(seen[0][0], seen[1][0])


def test_drop_path_and_mixup_are_drawn_by_process(folder, tmp_path, monkeypatch):
    seeds, forward = {0: set(), 1: set()}, common.ViT.forward

    def spy(model, pixels):
        seeds[rank].update([torch.initial_seed()] * model.training)
        return forward(model, pixels)
    monkeypatch.setattr(common.ViT, "forward", spy)
    for rank in seeds:
        monkeypatch.setattr(common, "get_rank", lambda: rank)
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
        assert "Traceback" not in process.stderr and ("resumes from" in process.stderr) == (code > 0)

    before, size = (out / "last.pt").read_bytes(), (out / "last.pt").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))  # no file may grow beyond half a checkpoint
    with pytest.raises(common.UserError, match="last.pt could not be written"):
        main(monkeypatch, "--out", out, *flags)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "last.pt").read_bytes() == before and not list(out.glob("*.partial"))

    main(monkeypatch, "--out", out, *flags)
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 60
    assert torch.equal(end_of(out), end_of(tmp_path / "whole"))


def test_a_second_interrupt_ends_a_run_at_once():
    code = ("import common, time\n"
            "with common.StopSignals() as stop:\n"
            "    print('ready', flush=True)\n"
            "    while not stop.received(): time.sleep(0.01)\n"
            "    print('noted', flush=True)\n"
            "    while True: time.sleep(0.01)")  # a step without an end
    process = start("-c", code)
    for line in ("ready\n", "noted\n"):
        assert process.stdout.readline() == line
        os.killpg(process.pid, signal.SIGINT)
    assert finish(process).returncode == -signal.SIGINT


def test_a_signal_to_one_process_stops_all(tmp_path):
    """And the same signal to several processes is that signal."""
    script = tmp_path / "signals.py"
    script.write_text(f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport common\n"
                      "common.init_distributed('cpu')\n"
                      "with common.StopSignals() as stop:\n"
                      "    for rank in (1, 0):\n"
                      "        if common.get_rank() == rank:\n"
                      "            os.kill(os.getpid(), signal.SIGTERM)\n"
                      "        os.write(1, b'received %d\\n' % stop.received())\n")  # at once: two processes write
    done = run(script, processes=2)
    assert done.returncode == 0 and done.stdout.count("received 15\n") == 4, done.stdout + done.stderr


def test_an_unexpected_error_ends_the_workers_too(tmp_path):
    code = ("import common, mae, sys\n"
            f"sys.argv = ['mae.py', '--steps', '9', '--workers', '2', '--device', 'cpu', '--out', {str(tmp_path)!r}]\n"
            "common.Checkpoints.save = lambda *_, **__: 1 / 0\n"
            "common.main(mae.__doc__, mae.TASKS, mae.configure)")
    done = run("-c", code)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


@pytest.fixture
def saved_run(folder, tmp_path, monkeypatch):
    """(folder, flags) of a finished run of 3 steps, each saved."""
    flags = ["--data", folder, "--steps", 3, "--save-every", 1, *TINY_FLAGS, "--out", tmp_path]
    main(monkeypatch, *flags)
    return tmp_path, flags


@pytest.mark.parametrize("damage", ["cut", "one bit", "hostile", "missing"])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_used(damage, saved_run, monkeypatch, capsys):
    out, flags = saved_run
    before, whole = losses(out), (out / "last.pt").read_bytes()
    torch.save({"model": Hostile(out / "executed")}, out / "last.pt")
    start, bit, rest = whole[:len(whole) // 2], whole[len(whole) // 2], whole[len(whole) // 2 + 1:]
    damaged = {"cut": start, "one bit": start + bytes([bit ^ 1]) + rest, "missing": None,
               "hostile": (out / "last.pt").read_bytes()}[damage]
    (out / "last.pt").write_bytes(damaged) if damaged else (out / "last.pt").unlink()
    capsys.readouterr()
    main(monkeypatch, *flags)
    printed = capsys.readouterr()
    assert "step 2 of 3" in printed.out and losses(out) == before and not (out / "executed").exists()
    assert common.read_checkpoint(out / "last.pt")["step"] == 3
    if damaged:
        assert "last.pt is damaged" in printed.err and f"resuming from {out}/previous.pt" in printed.err
        assert (out / "last.broken.pt").read_bytes() == damaged
        (out / "last.pt").write_bytes(damaged)
        (out / "previous.pt").write_bytes(damaged)
        with pytest.raises(common.UserError, match="previous.pt is damaged"):
            main(monkeypatch, *flags)
        (out / "previous.pt").unlink()
        with pytest.raises(common.UserError, match="there is no previous.pt"):
            main(monkeypatch, *flags)


def test_fresh_keeps_the_old_run(saved_run, monkeypatch):
    out, flags = saved_run
    old = {name: (out / f"{name}.pt").read_bytes() for name in ("last", "previous")}
    main(monkeypatch, *flags, "--steps", 2, "--fresh")
    assert len(losses(out)) == 2 and {name: (out / f"{name}.old.pt").read_bytes() for name in old} == old


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite(precision, folder, tmp_path, monkeypatch):
    """It stops a run before anything is saved; in fp16 the step is skipped."""
    forward, calls, outcome = mae.MAE.forward, itertools.count(1), contextlib.nullcontext()

    def overflow(model, *inputs):
        loss, pred = forward(model, *inputs)
        return loss * (math.inf if next(calls) == 4 else 1), pred
    monkeypatch.setattr(mae.MAE, "forward", overflow)
    if precision == "fp32":
        message = "the loss of step 4 is not finite, at a learning rate of about 0.0"
        outcome = pytest.raises(common.UserError, match=message)
    with outcome:
        main(monkeypatch, "--data", folder, "--steps", 8, "--save-every", 3, *TINY_FLAGS, "--log-every", 2,
             "--precision", precision, "--out", tmp_path)
    checkpoint, logged = common.read_checkpoint(tmp_path / "last.pt"), losses(tmp_path)  # at the steps 2, 3, 4, 6, 8
    assert checkpoint["step"] == (3 if precision == "fp32" else 8)
    if precision == "fp16":
        assert logged.pop(2) is None and np.isfinite(logged).all() and len(logged) == 4
        assert checkpoint["scaler"]["scale"] == 2.0 ** 15  # halved once
        assert checkpoint["optimizer"]["state"][0]["step"] == 7


@pytest.mark.parametrize("task", ["mae", "maskfeat", "vjepa", "mae finetune"])
def test_a_record_is_written_before_the_checkpoint(task, of_task, tmp_path, monkeypatch):
    """A run that is killed between the two has no gap in its log."""
    method, flags = of_task
    save, seen = common.Checkpoints.save, []
    monkeypatch.setattr(common.Checkpoints, "save", lambda checkpoints, *rest, **named: (
        seen.append(records(tmp_path)[-1]["step"]), save(checkpoints, *rest, **named)))
    main(monkeypatch, *flags, "--steps", 2, "--out", tmp_path, method=method)
    assert seen == [1, 2]


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path, monkeypatch):
    update = torch.optim.AdamW.zero_grad
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self, **options: (
        self.param_groups[0]["params"][0].data.fill_(math.nan), update(self, **options)))
    with pytest.raises(common.UserError, match="the weights after step 1 are not finite"):
        main(monkeypatch, "--data", folder, "--out", tmp_path, "--steps", 1, *TINY_FLAGS, "--evaluate-samples", 1)
    assert not list(tmp_path.glob("*.pt"))


@pytest.fixture
def of_task(task, request, no_probe):
    """(method, flags with the data) of a task."""
    method, flags, where = TASKS[task]
    return method, [*flags, "--data", request.getfixturevalue(where)]


@pytest.mark.parametrize("task", TASKS)
def test_processes_and_accumulation_do_not_change_the_run(task, of_task, tmp_path, monkeypatch):
    """Nor both together. The gradients are compared too, since AdamW makes the same step of twice the gradient."""
    method, flags = of_task
    flags += ["--steps", 4, "--clip-grad", 1000]
    if task == "vjepa":
        flags += ["--masking", "block"]  # of one size in a step: else index tensors are cut by micro-batch
    main(monkeypatch, *flags, "--out", tmp_path / "one", method=method)
    main(monkeypatch, *flags, "--out", tmp_path / "four", "--accumulate", 4, method=method)
    names = ["four"] if task != "mae linprobe" else []  # whose BatchNorm sees a micro-batch
    if task in ("mae", "maskfeat", "vjepa", "mae finetune"):
        done = run(f"{method.__name__}.py", *flags, "--out", tmp_path / "two", "--accumulate", 2, processes=2)
        assert done.returncode == 0, done.stderr
        names.append("two")
    wanted = gradients(tmp_path / "one")
    for name in names:
        for key in ("variance_left", "variance_left_neighbors") if task in ("mae", "maskfeat", "vjepa") else ():
            one, more = (records(tmp_path / out)[-1][key] for out in ("one", name))
            assert more == pytest.approx(one, rel=1e-3)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        assert (gradients(tmp_path / name) - wanted).norm() < 0.01 * wanted.norm()


def limit_memory(samples, checkpointed=0, set_attribute=setattr):
    """A GPU, as far as the search for micro-batches asks for it, with memory for so many samples: the sizes tried."""
    tried, fits, plan = [], common.fits_in_memory, common.plan_micro_batches
    for name, value in {"mem_get_info": (2 ** 20, 2 ** 20), "max_memory_allocated": 2 ** 19, "current_device": 0,
                        "reset_peak_memory_stats": None, "empty_cache": None}.items():
        set_attribute(torch.cuda, name, lambda *_, value=value: value)
    fork, backward = torch.random.fork_rng, torch.Tensor.backward
    set_attribute(torch.random, "fork_rng", lambda devices, **options: fork(devices=[], **options))

    def limited(model, loader, source, autocast, size, margin):
        checkpointing = next(x.checkpointing for x in model.modules() if isinstance(x, common.Block))
        tried.append((size, checkpointing))

        def fail(loss):
            backward(loss)
            raise torch.OutOfMemoryError
        if size > (checkpointed if checkpointing else samples):
            set_attribute(torch.Tensor, "backward", fail)
        found = fits(model, loader, source, autocast, size, margin)
        set_attribute(torch.Tensor, "backward", backward)
        return found

    def on_a_gpu(config, before, model, loader, *others, **options):
        gpu = argparse.Namespace(device=argparse.Namespace(type="cuda"), random_batches=loader.random_batches,
                                 to_indices=loader.to_indices)
        state = torch.get_rng_state()
        found = plan(config, before, model, gpu, *others, **options)
        assert torch.equal(torch.get_rng_state(), state)
        return found
    set_attribute(common, "fits_in_memory", limited)
    set_attribute(common, "plan_micro_batches", on_a_gpu)
    return tried


@pytest.mark.parametrize("task", TASKS)
def test_micro_batches_are_found_without_a_trace(task, of_task, tmp_path, monkeypatch, capsys):
    """The run is, to the last bit, the one with their number given."""
    method, flags = of_task
    flags += ["--steps", 2, "--precision", "bf16"] + STRONG_FLAGS * ("finetune" in task and "vjepa" not in task)
    main(monkeypatch, *flags, "--accumulate", 2, "--out", tmp_path / "given", method=method)
    tried = limit_memory(5, set_attribute=monkeypatch.setattr)
    main(monkeypatch, *flags, "--accumulate", "auto", "--out", tmp_path / "found", method=method)
    assert tried == [(8, False), (4, False)]
    assert "batch of 8 in 2 micro-batches of 4 on 1 GPU, 0.0 of 0.0 GiB\n" in capsys.readouterr().err
    assert losses(tmp_path / "found") == losses(tmp_path / "given")
    assert torch.equal(end_of(tmp_path / "found"), end_of(tmp_path / "given"))


def test_micro_batches_of_little_memory(folder, videos, tmp_path, monkeypatch, capsys):
    """V-JEPA's have 24 clips at most; checkpointing helps, or a sentence; 20 steps later the end is known."""
    flags = ["--data", videos, *VJEPA_FLAGS, "--batch-size", 48, "--steps", 1, "--evaluate-samples", 4]
    tried = limit_memory(18, 18, monkeypatch.setattr)
    main(monkeypatch, *flags, "--out", tmp_path / "clips", method=vjepa)
    assert tried == [(24, False), (16, False)]
    assert "in 3 micro-batches of 16 on 1 GPU" in (error := capsys.readouterr().err) and "up to 24" in error
    tried = limit_memory(0, 1, monkeypatch.setattr)
    flags = ["--data", folder, *TINY_FLAGS, "--batch-size", 2, "--evaluate-samples", 4]
    main(monkeypatch, *flags, "--steps", 22, "--out", tmp_path / "one")
    assert tried == [(2, False), (1, False), (2, True), (1, True)]
    error = capsys.readouterr().err
    assert "not even one sample fits" in error and "s a step, 2 of 22 steps are left: 0 minutes, until " in error
    limit_memory(0, 0, monkeypatch.setattr)
    with pytest.raises(common.UserError, match="smaller --size"):
        main(monkeypatch, *flags, "--steps", 1, "--out", tmp_path / "none")


def test_the_trial_of_a_micro_batch_is_no_lighter_than_training(monkeypatch):
    """A margin and AdamW's state are reserved beside it, and V-JEPA's masks are the largest of many."""
    config, model = mask_config(), tiny_vjepa()
    draw = functools.partial(vjepa.draw_masks, config, model.grid)
    view = v2.Compose([data.CenterCrop(32), functools.partial(data.single_clip, frames=4)])
    samples, loader = data.Samples(data.Clips(True, 4), view, 0, draw), cpu_loader()
    empty, forward, reserved, lengths = torch.empty, model.forward, [], []
    monkeypatch.setattr(torch, "empty", lambda *size, **options: reserved.append(size[0]) or empty(*size, **options))
    monkeypatch.setattr(model, "forward", lambda clips, visible, masked: lengths.append(
        sum(indices.shape[1] for indices in visible)) or forward(clips, visible, masked))
    assert common.fits_in_memory(model, loader, samples, contextlib.nullcontext(), 4, 1000)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert 1000 + 2 * trained in reserved
    drawn = [sum(indices.shape[1] for indices in tiny_masks(4, step=step)[0]) for step in range(30)]
    assert lengths[0] >= np.quantile(drawn, 0.9) > np.mean(drawn)


def test_processes_agree_on_the_micro_batches(folder, tmp_path):
    """Though one of them has less memory."""
    script = tmp_path / "unequal.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport common, mae, test_all\n"
                      "tried = test_all.limit_memory(8 if os.environ['RANK'] == '0' else 3)\n"
                      "common.Log.close = lambda log: os.write(1, b'tried %s\\n' % str(tried).encode())\n"
                      "common.main(mae.__doc__, mae.TASKS, mae.configure)\n")
    done = run(script, "--data", folder, *TINY_FLAGS, "--batch-size", 16, "--steps", 1, "--out", tmp_path, processes=2)
    assert done.returncode == 0 and "micro-batches of 2 on each of 2 GPUs" in done.stderr, done.stderr
    assert done.stdout.count("tried [(8, False), (4, False), (2, False)]\n") == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_is_clipped(task, of_task, precision, tmp_path, monkeypatch):
    """Of V-JEPA that of the encoder and of the predictor, each by itself; in fp16 without its scale."""
    method, flags = of_task
    main(monkeypatch, *flags, "--steps", 1, "--warmup", 0, "--clip-grad", 1e-4, "--precision", precision,
         "--out", tmp_path, method=method)
    average = {"vjepa": 0.1 * math.sqrt(2), "mae linprobe": 1}.get(task, 0.1)
    assert gradients(tmp_path).norm().item() == pytest.approx(1e-4 * average, rel=0.01)


def test_torchrun_starts_a_killed_process_again(folder, tmp_path, monkeypatch, capsys):
    """Two processes, one of them killed in the middle, give the losses of one process, each step written once."""
    flags = ["--data", folder, "--steps", 30, "--save-every", 4, *TINY_FLAGS]
    one, two = tmp_path / "one", tmp_path / "two"
    main(monkeypatch, *flags, "--out", one)
    process = start("mae.py", *flags, "--out", two, processes=2, restarts=2)
    wait_for_step(two, 9, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert finish(process).returncode == 0 and len(children) == 2, process.stderr
    assert process.stdout.count("step 0 of 30") == process.stdout.count("ridge probe") == 1
    assert re.search("step (8|12|16) of 30", process.stdout)  # it resumed, and not from 0
    assert [record["step"] for record in records(two)] == list(range(1, 31))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)

    capsys.readouterr()
    main(monkeypatch, *flags, "--out", two)  # finished; now by one process
    assert "2 processes made this run, now 1" in capsys.readouterr().err


def test_two_processes_evaluate_as_one(folder, tmp_path, monkeypatch, capsys):
    """On 11 validation images: each is encoded by one process, and all get the same, to the last digit printed."""
    images = shutil.copytree(folder, tmp_path / "images")
    (images / "test/coffee/3.png").unlink()
    flags = ["--data", images, "--steps", 2, "--evaluate-every", 2, "--evaluate-samples", 11, *TINY_FLAGS]
    main(monkeypatch, *flags, "--out", tmp_path / "one")
    printed = [line for line in capsys.readouterr().out.splitlines() if "before training" in line]
    two = run("mae.py", *flags, "--out", tmp_path / "two", processes=2)
    assert two.returncode == 0 and printed[0] in two.stdout, two.stderr
    one, two = (records(tmp_path / name)[-1] for name in ("one", "two"))
    for name in ("knn", "score_knn", "effective_rank", "feature_std"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)

    main(monkeypatch, "--data", images, "--out", tmp_path, "--steps", 2, *FINETUNE_FLAGS)
    flags = ["finetune", "--eval-only", "--data", images, "--init", tmp_path / "last.pt", "--workers", 0]
    capsys.readouterr()
    main(monkeypatch, *flags)
    one = capsys.readouterr().out
    two = run("mae.py", *flags, processes=2)
    assert two.returncode == 0 and two.stdout == one and "of 11 validation samples" in one, two.stderr


def test_features_of_fewer_samples_than_processes(folder, monkeypatch):
    """3 samples for 5 processes, here one after the other."""
    source, sums = data.open_sources(folder)[1], []
    source.names, source.labels = source.names[:3], source.labels[:3]
    inputs = (data.Samples(source, data.CenterCrop(32)), data.Loader([0.0], [1.0], torch.device("cpu")), 20)
    (x,), labels = data.extract_features([lambda x: x.flatten(1)], *inputs)
    monkeypatch.setattr(data, "all_reduce", lambda x: sums.append(x) or x)
    monkeypatch.setattr(data, "get_world_size", lambda: 5)
    for rank in range(5):
        monkeypatch.setattr(data, "get_rank", lambda: rank)
        data.extract_features([lambda x: x.flatten(1)], *inputs)
    assert len(x) == 3 and torch.equal(sum(sums[:10:2]), x) and torch.equal(sum(sums[1:10:2]), labels)


def test_workers_hand_over_chunks_of_a_batch(folder, monkeypatch):
    """So the shared memory that they need does not grow with a batch; what comes out is the same."""
    crop, erase = data.CenterCrop(32), data.RandomErasing(0.5, [0.5] * 3, [0.5] * 3)
    samples = data.Samples(data.open_sources(folder)[0], lambda image: erase(crop(image)),
                           draw_mask=lambda position: mae.random_mask((4, 4), 0.75))
    batches = [[(i, i) for i in range(12)], [(i, 7) for i in range(5)]]
    loader = data.Loader([0.5] * 3, [0.5] * 3, torch.device("cpu"))
    once = list(loader.batches(samples, batches, 12, 0))
    monkeypatch.setattr(data, "CHUNK", 4 * 4 * 3 * 32 ** 2)  # of 4 images
    sizes, collate = [], data.collate
    monkeypatch.setattr(data, "collate", lambda chunk: sizes.append(len(chunk)) or collate(chunk))
    for workers in (0, 2):
        again = list(loader.batches(samples, iter(batches), 12, workers))
        for old, new in zip(once, again, strict=True):
            assert len(old) == 4 and all(map(torch.equal, old, new))
    assert sizes == [4, 4, 4, 4, 1]


def test_broken_files_among_many(tmp_path, monkeypatch, capfd):
    """1 % of a folder is damaged or unusual: it trains to the end, each is skipped and named once, or converted."""
    images, generator = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()
    for i in range(700):
        picture = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((40, 40))
        picture.save(images / f"{i:03}.jpg")
    whole, claim, png = (images / "000.jpg").read_bytes(), io.BytesIO(), b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00", b"IDAT"):  # 60,000 x 60,000
        png += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    np.save(claim, np.zeros((40, 40, 3), np.uint8))
    claim = claim.getvalue().replace(b"(40, 40, 3), }        ", b"(4000000, 400000, 3), }")
    broken = {"truncated.jpg": whole[:len(whole) // 2], "empty.jpg": b"", "text.jpg": b"no image",
              "text.heic": b"no image", "bomb.png": png, "huge.npy": claim}
    for name, content in broken.items():
        (images / name).write_bytes(content)
    picture.convert("CMYK").save(images / "cmyk.jpg")
    picture.convert("P").save(images / "palette.png")
    Image.fromarray(generator.integers(0, 65535, (40, 40), dtype=np.uint16)).save(images / "16 bit.png")
    if features.check("avif"):
        picture.save(tmp_path / "a.avif")
        assert data.read_image(tmp_path / "a.avif").size == (40, 40)
    main(monkeypatch, "--data", images, "--epochs", 2, *TINY_FLAGS, "--batch-size", 64, "--workers", 2,
         "--out", tmp_path / "run")
    error = capfd.readouterr().err
    assert len(losses(tmp_path / "run")) == 23
    assert all(error.count(f"read: {images / name} (") == 1 for name in broken)
    assert "decompression bomb" in error and error.count("skipped, since") == 6 and "6 of 709 files" in error
    for name in ("cmyk.jpg", "palette.png", "16 bit.png"):
        assert data.CenterCrop(32)(data.read_image(images / name)).shape == (3, 32, 32)


@pytest.fixture
def demo(monkeypatch, capsys):
    """A function of (method, *arguments): runs its demo in this process and returns what it prints."""
    def run_demo(method, *arguments):
        main(monkeypatch, *arguments, "--preset", "demo", "--device", "cpu", "--workers", 0, method=method)
        return capsys.readouterr().out
    return run_demo


def test_maskfeat_on_videos_by_command_line(demo, videos, tmp_path, monkeypatch):
    out, data_flags = tmp_path / "run", ["--data", videos, "--frame-stride", 2, "--batch-size", 4]
    printed = demo(maskfeat, *data_flags, "--frames", 4, "--image-size", 32, "--patch-size", 8, "--steps", 2,
                   "--target", "pixels", "--out", out)
    assert "validation samples: chance " in printed and size_in_tiles(out / "prediction.png") == (4, 2)
    assert {"variance_left", "variance_left_neighbors", "variance_left_last_time"} <= set(records(out)[-1])
    segments, read_clips = [], data.read_clips
    monkeypatch.setattr(data, "read_clips", lambda *inputs: segments.append(inputs[3]) or read_clips(*inputs))
    finetune = ["finetune", *data_flags, "--views", 3]
    printed = demo(maskfeat, *finetune, "--init", out / "last.pt", "--steps", 2, "--randaugment", 7, "--mixup", 0.8,
                   "--out", tmp_path / "f")
    assert [count for count, _ in itertools.groupby(filter(None, segments))] == [1, 3]  # more in the last test alone
    top1 = printed.splitlines()[-2]
    printed = demo(maskfeat, *finetune, "--init", tmp_path / "f/last.pt", "--eval-only")
    assert "top-1" in top1 and printed.splitlines()[-1] == top1
    demo(maskfeat, "show", "--init", out / "last.pt", "--image", videos / "val/darker/clip1", "--out", tmp_path / "s")
    assert (tmp_path / "s/prediction.png").exists()
    # Another number of frames: the positions are interpolated in time.
    demo(maskfeat, *finetune, "--init", out / "last.pt", "--frames", 8, "--frame-stride", 1, "--steps", 1,
         "--out", tmp_path / "longer")
    assert common.load_encoder(tmp_path / "longer/last.pt").grid == (4, 4, 4)


def test_vjepa_by_command_line(demo, videos, folder, checkpoint, tmp_path, monkeypatch, capsys):
    out, data_flags = tmp_path / "run", ["--data", videos, "--frame-stride", 2, "--batch-size", 4]
    pretraining = [*VJEPA_FLAGS, *data_flags, "--steps", 3, "--evaluate-every", 2, "--out", out]
    printed = demo(vjepa, *pretraining)
    assert "validation samples: chance " in printed and str(out / "best.pt") in printed
    log, last = records(out), common.read_checkpoint(out / "last.pt")
    assert {"step", "loss", "lr", "momentum", "knn", "feature_std", "effective_rank", "score_knn"} <= set(log[1])
    assert "effective_rank" not in log[0]
    assert last["step"] == 3 and common.read_checkpoint(out / "best.pt")["step"] in (2, 3)
    assert size_in_tiles(out / "tokens.png", 7 * 14) == (2, 7)  # two times; frames, and of each mask three rows
    name = "blocks.0.attn.qkv.weight"
    encoder = common.load_encoder(out / "last.pt").state_dict()[name]
    assert torch.equal(encoder, last["model"][f"target_encoder.{name}"])

    limits, extract = [], data.extract_features
    monkeypatch.setattr(data, "extract_features", lambda *rest: limits.append(rest[-1]) or extract(*rest))
    printed = demo(vjepa, *pretraining, "--probe-labels", 0.5)  # the finished run is only probed again
    assert "validation samples: chance " in printed and limits == [3, 6000]  # half of the six clips

    init = ["--init", out / "last.pt"]
    demo(vjepa, *data_flags, *init, "--steps", 1, "--out", tmp_path / "more")  # the same model and masks
    assert common.read_checkpoint(tmp_path / "more/last.pt")["settings"]["masking"] == "multiblock"
    for masking, other in (("tube", init), ("multiblock", ["--init", tmp_path / "tube/last.pt"])):  # other mask tokens
        demo(vjepa, *data_flags, *other, "--masking", masking, "--steps", 1, "--out", tmp_path / masking)
        weights = common.read_weights(tmp_path / masking / "last.pt")[0]
        assert sum("mask_tokens" in name for name in weights) == len(vjepa.MASKS[masking])
    one_sentence(vjepa, [*data_flags, "--init", checkpoint], "needs clips", tmp_path, monkeypatch, capsys)  # of images

    probe = ["probe", *data_flags, "--segments", 2, "--views", 3]
    top1 = demo(vjepa, *probe, *init, "--steps", 3, "--out", tmp_path / "p").splitlines()[-2]
    printed = demo(vjepa, *probe, "--init", tmp_path / "p/last.pt", "--eval-only")
    assert "top-1" in top1 and printed.splitlines()[-1] == top1
    demo(vjepa, "finetune", *data_flags, "--init", out / "best.pt", "--steps", 2, "--drop-path", 0.1,
         "--randaugment", 7, "--erasing", 0.25, "--out", tmp_path / "f")
    probed, tuned = (common.read_weights(tmp_path / f"{run}/last.pt")[0][f"encoder.{name}"] for run in "pf")
    assert torch.equal(probed, encoder) and not torch.equal(tuned, encoder)

    for path in (folder / "test/coffee/0.png", videos / "val/darker/clip1"):
        demo(vjepa, "show", *init, "--image", path, "--out", tmp_path / "s", "--masking", "tube")
        assert size_in_tiles(tmp_path / "s/tokens.png", 7 * 14) == (2, 4)
    stills = ["--data", folder, "--still", "--steps", 2, "--batch-size", 4]
    assert "top-1" in demo(vjepa, "probe", *stills, *init, "--out", tmp_path / "i")
    assert "validation samples: chance " in demo(vjepa, *VJEPA_FLAGS, *stills, "--out", tmp_path / "still")


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
    """A line of JSON, nothing written, nor by a signal; the operations of MAE are those of the formula."""
    flags = ["--benchmark", 2, *tiny, "--data", request.getfixturevalue(where), "--out", tmp_path]
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n')
    main(monkeypatch, *flags, method=method)
    found = json.loads(capsys.readouterr().out)
    unit = "clips" if where == "videos" else "images"
    assert found[f"{unit}_per_second"] * found["ms_per_step"] == pytest.approx(8000, rel=0.01)
    assert found["peak_memory_gib"] > 0.1 and found["mfu"] is None
    assert found["world_size"] == 1 and found["precision"] == "fp32" and not found["compile"]
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        main(monkeypatch, *flags, method=method)
    assert os.listdir(tmp_path) == ["log.jsonl"] and records(tmp_path) == [{"step": 7}]  # of a run before
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
    moved = torch.utils._pytree.tree_map(torch.Tensor.cuda, inputs)
    with torch.no_grad():
        plain = model(*inputs)
        with torch.autocast("cuda", torch.bfloat16):
            fast = model.cuda()(*moved)
    plain, fast = (x[0] if isinstance(x, tuple) else x for x in (plain, fast))
    assert fast.item() == pytest.approx(plain.item(), rel=0.02)


@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method, tiny, where", RUNS + SATELLITE_RUNS)
def test_no_step_waits_for_the_gpu(method, tiny, where, precision, request, tmp_path, monkeypatch):
    save = common.Checkpoints.save

    def watched(checkpoints, step, *arguments, **options):
        save(checkpoints, step, *arguments, **options)
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 6 else "default")
    monkeypatch.setattr(common.Checkpoints, "save", watched)
    flags = [*tiny, "--device", "cuda", "--precision", precision, "--no-compile", "--log-every", 100,
             "--evaluate-every", 100, "--data", request.getfixturevalue(where), "--steps", 7, "--out", tmp_path]
    try:
        main(monkeypatch, *flags, method=method)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_torchrun_on_gpus_resumes(folder, tmp_path):
    """With as many GPUs as there are (a power of two, up to 8), and the losses are those of one GPU."""
    processes = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    command = ["mae.py", *TINY_FLAGS, "--device", "cuda", "--data", folder, "--steps", 4, "--save-every", 2]

    def losses_of(name, processes):
        done = run(*command, "--out", tmp_path / name, processes=processes)
        assert done.returncode == 0, done.stderr
        return losses(tmp_path / name), done.stdout

    whole, _ = losses_of("all", processes)
    (tmp_path / "all/last.pt").unlink()  # what is left, previous.pt, is of step 2
    resumed, printed = losses_of("all", processes)
    assert resumed == pytest.approx(whole, rel=0.01) and "step 2 of 4" in printed
    if processes > 1:
        assert losses_of("one", 1)[0] == pytest.approx(whole, rel=0.01)


@needs_gpu
def test_hog_on_a_gpu_is_that_on_a_cpu():
    """From bytes on, since the last bit of a pixel decides over bins."""
    with torch.autocast("cuda", torch.bfloat16):
        found = maskfeat.hog(photographs(device="cuda")).cpu()
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


MEMORY = [  # GiB of a training step, of V-JEPA with the largest masks
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
    the forward pass, with the largest of 8 draws of masks, is 90 to 100 % of this memory. The backward pass,
    for which autograd would ask the driver, the data, the log and the checkpoints have stand-ins.
    """
    gpu, models, peaks, stack = FakeGPU(), [], [], contextlib.ExitStack()
    gpu.storages, gpu.stepping = WeakIdKeyDictionary(), False
    gpu.dtype = torch.half if "fp16" in flags else torch.bfloat16
    drawing, new_model = "draw_masks" if method is vjepa else "draw_mask", method.new_model
    draw, to_indices = getattr(method, drawing), data.Loader([0.0], [1.0], torch.device("cpu")).to_indices

    def model(config):
        stack.enter_context(FakeTensorMode()), stack.enter_context(gpu)
        with torch.device("cuda:0"):  # where it is made, as a fake model cannot move
            return models.append(new_model(config)) or models[0]

    def on_gpu(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda:0")

    def batches(samples, config, *_):
        B = config.batch_size // (config.accumulate or 1)
        dates, frames = (getattr(config, name, 1) for name in ("dates", "frames"))
        with unset_fake_temporarily():
            grid = getattr(models[0], "encoder", models[0]).grid
            drawn = [to_indices(torch.stack([draw(config, grid, step * B + i) for i in range(B)])) for step in range(8)]
            indices = max(drawn, key=lambda pair: sum(x.numel() for x in torch.utils._pytree.tree_leaves(pair[0])))
        times, gpu.stepping = [n for n in (dates, frames) if n > 1], True
        batch = [torch.empty(B, config.channels, *times, config.image_size, config.image_size), torch.empty(B)]
        batch += [torch.empty(B, dates, 3)] if dates > 1 else []
        return itertools.repeat(torch.utils._pytree.tree_map(on_gpu, (*batch, *indices)))

    def backward(_):
        peaks.append(sum(gpu.storages.values()) / 2 ** 30)
        for parameter in models[0].parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    flash = torch.ops.aten._scaled_dot_product_flash_attention  # the choice asks the driver
    checkpoints = MagicMock(**{"resume.return_value": 0, "save.side_effect": [None, None, EOFError]})
    for name, stand_in in {
            f"{method.__name__}.new_model": model, "common.init_distributed": lambda _: torch.device("cuda:0"),
            f"{method.__name__}.{drawing}": lambda *_: MagicMock(**{"all.return_value": False}),
            "common.Checkpoints": lambda *_: checkpoints, "common.StopSignals.received": lambda _: 0,
            "common.Log": lambda *_, **__: MagicMock(**{"steps.return_value": range(1, 9)}),
            "data.Samples": MagicMock(),
            "data.plan_training": lambda config, *_: plan_of(1000, config.accumulate or 1),
            "torch.Tensor.backward": backward,
            "data.Loader": lambda *_: MagicMock(train=batches), "torch.nn.Module.to": lambda module, _: module,
            "torch.nn.functional.scaled_dot_product_attention": lambda *qkv: flash(*qkv)[0],
            "torch.nn.init.trunc_normal_": lambda x, **_: x, "torch.cuda.is_bf16_supported": lambda *_, **__: True,
            "torch.cuda.amp.common.amp_definitely_not_available": lambda: False}.items():
        monkeypatch.setattr(name, stand_in)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, raising=False)  # of the target encoder
    with stack, pytest.raises(EOFError):
        main(monkeypatch, *"--preset paper --no-compile --steps 1000 --warmup 0 --workers 0 --precision bf16".split(),
             *flags.split(), method=method)
    assert 0.9 * gib < max(peaks) < gib


def test_batches_are_not_divided_by_numbers():
    """On CUDA that is a product with the reciprocal, which has another last bit, and so HOG other bins."""
    class Division(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            if "div" in getattr(function, "__name__", ""):
                divisors.append(arguments[1])
            return function(*arguments, **(options or {}))
    divisors = []
    with Division():
        photographs()
    assert len(divisors) >= 2 and all(map(torch.is_tensor, divisors))


def test_the_demo_of_vjepa_does_not_collapse(tmp_path):
    """A part of the demo: no warning, as long as the loss falls; the whole one is in the README."""
    flags = ["--steps", 60, "--log-every", 5, "--evaluate-every", 30, "--evaluate-samples", 30, "--device", "cpu"]
    done = run("vjepa.py", *flags, "--out", tmp_path)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    log = records(tmp_path)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    evaluations = [record for record in log if "effective_rank" in record]
    assert len(evaluations) == 2
    assert all(record["feature_std"] > 0.2 and record["effective_rank"] > 4 for record in evaluations)


def test_the_frozen_features_improve(demo, tmp_path):
    """The demo of MAE on small images and a small budget; the whole one gains several times as much."""
    printed = demo(mae, "--norm-pix-loss", "--image-size", 32, "--batch-size", 32, "--steps", 300, "--log-every", 10,
                   "--out", tmp_path)
    _, before, after = re.findall(r"([\d.]+) %", printed.splitlines()[-1])[:3]
    assert float(after) > float(before) + 3 and losses(tmp_path)[-1] < 0.8 * losses(tmp_path)[0]


def test_maskfeat_learns(folder, tmp_path, monkeypatch):
    main(monkeypatch, "--data", folder, "--out", tmp_path, "--steps", 60, *MASKFEAT_FLAGS, method=maskfeat)
    assert np.mean(losses(tmp_path)[-10:]) < 0.75 * losses(tmp_path)[0]


# ------------------------------------------------------------------------------------------------------- bad input

SCRIPTS = {"mae": mae, "maskfeat": maskfeat, "vjepa": vjepa}
ALL_TASKS = [(method, task) for method in SCRIPTS.values() for task in method.TASKS]


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    """Folders, lists and checkpoints, each with another fault."""
    root = tmp_path_factory.mktemp("bad")
    for name in ("empty", "unreadable", "undated/place", "classes/train/cat", "classes/val/cat", "classes/val/dog"):
        (root / name).mkdir(parents=True)
        for file in ("a.png", "b.png") if "/" in name else ():
            Image.new("RGB", (40, 40)).save(root / name / file)
    (root / "unreadable/a.jpg").write_text("no image")
    (root / "list.bin").write_bytes(bytes(range(256)))
    (root / "broken.pt").write_bytes(b"not a checkpoint")
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, root / "other.pt")
    torch.save({"model": filled(vit_table())}, root / "images.pt")
    return root


BAD_INPUT = {  # part of the sentence: commands
    "there is no file or folder nowhere": ["mae --data nowhere"],
    "no image below": ["mae --data empty"],
    "no folder of images": ["mae --dates 2 --data empty"],
    "no video and no folder of frames": ["maskfeat --data empty --frames 8", "vjepa --data empty"],
    "none of the files can be read": ["mae --data unreadable", "mae --dates 2 --data undated",
                                      "maskfeat --data unreadable --frames 8"],
    "needs the folders train/": ["mae finetune --data empty"],
    "class folder dog": ["mae finetune --data classes"],
    "neither a folder nor a list": ["maskfeat --data list.bin --frames 8"],
    "no clips": ["maskfeat --data cifar10 --frames 8"],
    "photographs have 1 or 3 channels": ["mae --channels 4"],
    "clips have 1 or 3 channels": ["maskfeat --frames 8 --channels 4"],
    "nowhere.pt cannot be read": ["mae --init nowhere.pt"],
    "is damaged": ["mae --init broken.pt"],
    "not a Vision Transformer": ["mae finetune --init other.pt", "vjepa show --init other.pt"],
    "shape mismatch of": ["maskfeat finetune --init images.pt --frames 8"],
    "needs --init": ["mae show", "mae finetune --eval-only", "maskfeat show", "maskfeat finetune --eval-only",
                     "vjepa show", "vjepa probe --eval-only"],
    "give both": ["mae --mean 0.5"],
    "need 3 numbers": ["mae --mean 0.5 --std 0.5"],
    "masks none or all": ["mae --mask-ratio 1", "mae --mask-ratio 0", "mae --mask-ratio 0.99",
                          "maskfeat --mask-ratio 0.005", "maskfeat --frames 8 --masking frame --mask-ratio 0.95"],
    "masks none of the 16 patches": ["vjepa --masking tube --mask-ratio 0 --context-frames 8"],
    "masks none of the 4 patches": ["vjepa --masking multiblock --context-frames 8 --image-size 24"],
    "--masking cube is for clips": ["maskfeat --masking cube"],
    "--masking block is for images": ["maskfeat --frames 8 --masking block"],
    "is not a number from 0 to 1": ["mae --mask-ratio -0.1", "vjepa --momentum 1.5"],
    "is not a number from 0 to 10": ["mae finetune --randaugment 40"],
    "is not a number of 0 or more": ["mae --epochs nan", "mae --epochs inf"],
    "is not a whole number of 1 or more": ["mae --batch-size 0", "mae --image-size 64x64x64"],
    "big is not a number or HEIGHTxWIDTH": ["mae --image-size big"],
    "is not a list of numbers": ["mae --mean 0 0 0 --std nan 1 1"],
    "not a multiple of the patch size": ["mae --image-size 65"],
    "not a multiple of 3 attention heads": ["mae --decoder-heads 3"],
    "not a multiple of 4 attention heads": ["vjepa --predictor-dim 66"],
    "7 frames are not a multiple of the tubelet of": ["maskfeat --frames 7", "vjepa --frames 7"],
    "needs clips of several frames": ["vjepa --frames 1"],
    "whole cells of 3": ["maskfeat --cell 3"],
    "cannot be split": ["mae --batch-size 7 --accumulate 2"],
    "at least 2 images": ["mae linprobe --batch-size 1"],
    "has a band twice": ["mae --bands 0,1/1,2"],
    "is not a list of groups": ["mae --bands 0,a"],
    "not both": ["mae --bands 0,1 --dates 2", "mae --steps 1 --epochs 1"],
    "not among the 3 channels": ["mae --bands 0,5 --data undated"],
    "unrecognized arguments: --mixup": ["mae --mixup 0.8"],
    "unrecognized arguments: --sizes": ["mae --sizes=base"],
    "unrecognized arguments: --views": ["maskfeat --views 2"],
    "unrecognized arguments: --target": ["vjepa probe --target latent"],
    "fit is not a task": ["mae fit"],
    "invalid choice: 'tiny'": ["vjepa --preset tiny"],
}


@pytest.mark.parametrize("message, command", [
    (message, command) for message, commands in BAD_INPUT.items() for command in commands])
def test_bad_input_gets_one_sentence(message, command, bad_files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(bad_files)
    script, *words = command.split()
    one_sentence(SCRIPTS[script], words, message, tmp_path, monkeypatch, capsys)


def test_a_wrong_command_exits_with_2_and_no_traceback():
    done = run("mae.py", "--data", "nowhere")
    assert done.returncode == 2 and done.stderr == "mae.py: error: there is no file or folder nowhere\n"


@pytest.mark.parametrize("method, task", ALL_TASKS)
def test_from_python_too_unknown_names_and_wrong_types_are_refused(method, task):
    wrong = [("task", "fit", "fit is not a task"), ("preset", "tiny", "tiny is not a preset"),
             ("stepz", 1, f"{task} has no stepz")]
    for name, *values in (("seed", True, 1.5, "1", -1), ("channels", None, (8, 8)), ("mean", 0.5), ("data", 5),
                          ("measure", 1), ("image_size", "64", (1, 2, 3)), ("size", "giant")):
        wrong += [(name, value, f"--{name.replace('_', '-')} ") for value in values]
    for field in dataclasses.fields(method.TASKS[task][1]):
        flag = f"--{field.name.replace('_', '-')} "
        wrong += [(field.name, value, flag) for value in (object(), [None], {"a": 1})]
    for name, value, message in wrong:
        with pytest.raises(common.UserError, match=message):
            method.configure(**{"task": task, name: value})
    assert method.configure(task, out=Path("runs/x")).out == "runs/x"  # a setting that a checkpoint can hold


def test_a_config_of_its_own_is_checked_too():
    with pytest.raises(ValueError, match="--batch-size 0 is not"):
        mae.Pretrain(data="DIR", batch_size=0)


# ------------------------------------------------------------------------------------------- configuration, precedence

SAVED = dict(  # in a checkpoint; hardly a value is that of a default or preset
    size="tiny", image_size=40, patch_size=10, channels=5, mean=(0.1,) * 5, std=(0.2,) * 5, frames=6, tubelet=3,
    frame_stride=2, bands="0,1/4", dates=1, decoder_dim=96, decoder_depth=3, decoder_heads=4, norm_pix_loss=False,
    consistent=True, cell=5, target={maskfeat: "pixels", vjepa: "pixels"}, mask_ratio=0.3, still=True,
    context_frames=3, predictor_dim=96, predictor_depth=2, masking={mae: "grid", maskfeat: "frame", vjepa: "block"})
GIVEN = dict(
    image_size=(20, 30), mean=(0.5,) * 5, std=(0.4,) * 5, frames=9, frame_stride=3, bands="0/1", decoder_dim=48,
    decoder_depth=2, decoder_heads=3, norm_pix_loss=True, consistent=False, cell=2, mask_ratio=0.2,
    target={maskfeat: "hog", vjepa: "latent"}, still=False, context_frames=6, predictor_dim=32, predictor_depth=1,
    masking={mae: "block", maskfeat: "tube", vjepa: "tube"}, steps=7, batch_size=3, base_lr=0.01, warmup=0.7)
SHAPES = dict(size="small", patch_size=5, channels=6, tubelet=1)  # do not fit the checkpoint


def values_for(method, names, table):
    """The values of a table for a method, of those names alone."""
    values = {name: value.get(method) if isinstance(value, dict) else value for name, value in table.items()}
    return {name: value for name, value in values.items() if name in names}


def as_flags(values):
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "image_size" and isinstance(value, tuple):
            words += [f"--{flag}", "x".join(map(str, value))]
        else:
            words += [f"--{flag}", *(value if isinstance(value, tuple) else [value])]
    return words


@pytest.mark.parametrize("method, task", ALL_TASKS)
def test_precedence_of_values(method, task, tmp_path, monkeypatch):
    """Given > the checkpoint's, of the model alone > the preset's > default, by command line and from Python alike.

    Of a checkpoint of another method, which has other fields, only the encoder counts.
    """
    _, config_class, presets = method.TASKS[task]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    encoder = {field.name for field in dataclasses.fields(method.EncoderConfig)}
    saved, given, shapes = (values_for(method, defaults, table) for table in (SAVED, GIVEN, SHAPES))
    weights = vit_table(192, 12, (10, 10) if method is mae else (3, 10, 10))
    weights = {name: torch.zeros(1).expand(shape) for name, shape in weights.items()}
    settings = values_for(method, SAVED, SAVED) | {"steps": 5, "seed": 5}
    torch.save({"model": weights, "settings": settings}, tmp_path / "own.pt")
    for name in ("decoder_dim", "cell", "predictor_dim"):
        del settings[name]
    torch.save({"model": weights, "settings": settings}, tmp_path / "other.pt")
    files = {None: {}, "own.pt": saved, "other.pt": values_for(method, encoder, saved)}

    for preset, file, flags in itertools.product(("paper", "demo"), files, ({}, given)):
        values = flags | ({"init": str(tmp_path / file)} if file else shapes if flags else {})
        config = method.configure(task, preset, **values)
        assert parsed(monkeypatch, method, task, "--preset", preset, *as_flags(values)) == (task, config)
        is_demo, is_video = preset == "demo", getattr(config, "frames", 1) > 1
        keys = [config.size, *["video"] * is_video, *["demo"] * is_demo, *["demo_video"] * (is_demo and is_video)]
        expected = defaults | {"epochs": None} if "steps" in values else defaults
        for layer in (*(presets.get(key, {}) for key in keys), files[file], values):
            expected = expected | layer
        assert vars(config) == expected | ({"epochs": None} if "steps" in values else {})
    for name, value in shapes.items():
        with pytest.raises(common.UserError, match=f"--{name.replace('_', '-')} {value} does not fit .*own.pt"):
            method.configure(task, init=str(tmp_path / "own.pt"), **{name: value})


def test_the_preset_of_the_size_in_a_checkpoint(tmp_path):
    weights = {name: torch.zeros(1).expand(shape) for name, shape in vit_table(1024, 24, (16, 16), 197).items()}
    torch.save({"model": weights}, tmp_path / "large.pth")
    config = mae.configure("finetune", data="DIR", init=tmp_path / "large.pth")
    assert (config.size, config.epochs, config.layer_decay, config.drop_path) == ("large", 50, 0.75, 0.2)


def test_a_checkpoint_without_settings_leaves_open_what_the_paper_says(tmp_path):
    torch.save(filled(vit_table(kernel=(2, 8, 8), tokens=128)), tmp_path / "clips.pth")
    for preset in ("paper", "demo"):
        config = maskfeat.configure("pretrain", preset, init=tmp_path / "clips.pth")
        assert (config.masking, config.mask_ratio, config.frames, config.image_size) == ("cube", 0.4, 16, 32)
        assert config.batch_size == {"paper": 512, "demo": 32}[preset]


def test_the_length_is_given_in_steps_or_epochs_and_the_preset_follows_from_the_data():
    assert vjepa.configure(data="DIR", epochs=0).steps is None and vjepa.configure(epochs=2.0).steps is None
    assert mae.configure(data="DIR", steps=5).epochs is None
    assert (mae.configure().size, mae.configure(data="DIR").size) == ("nano", "base")
    assert (mae.configure(bands="0,1").channels, mae.configure(bands="0/5").channels) == (3, 6)


def copied_out(*starts):
    """{(module, name)} of all that the code of some needs, across our modules; annotations do not count."""
    nodes, imports = {}, {}
    for module in ("common", "data", *SCRIPTS):
        tree = ast.parse((HERE / f"{module}.py").read_text())
        for node in ast.walk(tree):
            for annotation in {"returns", "annotation"} & set(node._fields):
                setattr(node, annotation, None)
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                nodes[module, node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    nodes |= {(module, name.id): node for name in ast.walk(target) if isinstance(name, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                imports |= {(module, name.asname or name.name): (node.module, name.name) for name in node.names}
    reached, todo = set(), [*starts]
    while todo:
        module, name = todo.pop()
        module, name = imports.get((module, name), (module, name))
        if (module, name) not in nodes or (module, name) in reached:
            continue
        reached.add((module, name))
        for node in ast.walk(nodes[module, name]):
            if isinstance(node, ast.Name):
                todo.append((module, node.id))
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                todo.append((node.value.id, node.attr))  # such as common.ViT
    return reached


@pytest.mark.parametrize("starts, most", [
    (["common.ViT"], 8), (["mae.MAE", "mae.random_mask"], 13), (["maskfeat.hog_targets"], 3),
    (["vjepa.VJEPA", "vjepa.multiblock_mask", "vjepa.sample_block_size"], 14)])
def test_copying_out_takes_little(starts, most):
    names = copied_out(*(tuple(start.split(".")) for start in starts))
    assert len(starts) < len(names) <= most, sorted(names)


# ---------------------------------------------------------------------------------------------- checkpoints, pictures


def test_a_run_does_not_overwrite_the_checkpoint_that_it_starts_from(tmp_path, monkeypatch):
    torch.save(filled(vit_table()), tmp_path / "last.pt")
    flags = ["--init", tmp_path / "last.pt", "--out", tmp_path, "--device", "cpu", "--batch-size", 2]
    for task in ([], ["finetune"], ["--fresh"]):
        with pytest.raises(common.UserError, match="give another --out"):
            main(monkeypatch, *task, *flags, "--steps", 1)
    main(monkeypatch, *flags, "--benchmark", 1)  # writes nothing
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_run_with_other_settings_is_not_overwritten(checkpoint, folder, monkeypatch):
    before = checkpoint.read_bytes()
    with pytest.raises(common.UserError, match="steps 3 there, 4 now.*--fresh"):
        main(monkeypatch, "--data", folder, "--out", checkpoint.parent, "--steps", 4, *TINY_FLAGS)
    with pytest.raises(common.UserError, match=f"data {folder} there, None now"):
        main(monkeypatch, "--out", checkpoint.parent, "--steps", 3, *TINY_FLAGS)
    assert checkpoint.read_bytes() == before


def test_a_run_of_epochs_is_not_resumed_with_more_data(folder, tmp_path, monkeypatch, no_probe):
    images = shutil.copytree(folder / "train", tmp_path / "images")
    flags = ["--data", images, "--epochs", 0.5, *TINY_FLAGS, "--out", tmp_path / "run"]
    main(monkeypatch, *flags)  # of 24 images
    shutil.copytree(folder / "test", images / "more")
    with pytest.raises(common.UserError, match="steps 2 there, 3 now"):
        main(monkeypatch, *flags)


def test_a_run_with_other_classes_is_not_resumed(folder, tmp_path, monkeypatch):
    images = shutil.copytree(folder, tmp_path / "images")
    flags = ["finetune", "--data", images, "--steps", 1, *MASKFEAT_FLAGS, "--out", tmp_path / "run"]
    main(monkeypatch, *flags)
    for split in ("train", "test"):
        (images / split / "coffee").rename(images / split / "tea")
    with pytest.raises(common.UserError, match="other classes"):
        main(monkeypatch, *flags)


def test_what_may_change_when_a_run_resumes(no_probe, saved_run, monkeypatch, capsys):
    """What tells how it is computed, logged and saved; no other setting."""
    out, flags = saved_run
    weights = end_of(out)
    harmless = {"accumulate": 2, "checkpointing": True, "compile": False, "log_every": 2, "save_every": 2,
                "keep_every": 2, "evaluate_every": 2, "evaluate_samples": 4, "precision": "bf16", "workers": 1,
                "device": "cpu"}
    main(monkeypatch, *flags, *as_flags(harmless))
    assert "step 3 of 3" in capsys.readouterr().out and torch.equal(end_of(out), weights)
    resumable = {*harmless, "out", "fresh", "benchmark", "probe_labels"}
    for method, task in ALL_TASKS:
        config_class = method.TASKS[task][1]
        fields = {field.name for field in dataclasses.fields(config_class)}
        assert fields & set(config_class.resumable) == fields & resumable
    with pytest.raises(common.UserError, match="seed 0 there, 1 now"):
        main(monkeypatch, *flags, "--seed", 1)


def test_a_setting_that_a_checkpoint_lacks_counts_with_its_default(folder, tmp_path, monkeypatch):
    flags, path = ["--data", folder, "--out", tmp_path, "--steps", 2, *TINY_FLAGS], tmp_path / "last.pt"
    main(monkeypatch, *flags)
    content = torch.load(path, weights_only=True)
    del content["settings"]["warmup"], content["classes"]  # as an older version would have written it
    torch.save(content, path)
    main(monkeypatch, *flags)
    with pytest.raises(common.UserError, match="warmup 0.05 there, 0.5 now"):
        main(monkeypatch, *flags, "--warmup", 0.5)


def test_an_encoder_without_its_last_norm_can_start_an_mae(folder, tmp_path, monkeypatch, capsys):
    """A MaskFeat, whose norm belongs to the prediction head: norm and decoder are randomly initialized."""
    before = tiny_maskfeat().state_dict()
    torch.save({"model": before}, tmp_path / "maskfeat.pth")
    main(monkeypatch, "--data", folder, *TINY_FLAGS, "--init", tmp_path / "maskfeat.pth", "--steps", 1, "--base-lr", 0,
         "--out", tmp_path / "run")
    after = common.read_weights(tmp_path / "run/last.pt")[0]
    assert "is an encoder-only checkpoint" in capsys.readouterr().out and (after["norm.weight"] == 1).all()
    assert torch.equal(after["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])


def test_where_a_checkpoint_cannot_be_written_all_processes_say_so(folder, tmp_path, monkeypatch):
    flags = [*TINY_FLAGS, "--data", folder, "--steps", 2, "--keep-every", 2, "--out"]
    for name in ("last", "step-00002"):
        (tmp_path / name / f"{name}.partial").mkdir(parents=True)  # is in the way
    with pytest.raises(common.UserError, match="last.pt could not be written"):
        main(monkeypatch, *flags, tmp_path / "last")
    done = run("mae.py", *flags, tmp_path / "step-00002", processes=2)
    assert done.returncode and "step-00002.pt could not be written" in done.stderr
    assert 'common.py", line' not in done.stderr  # no traceback but torchrun's own


def test_processes_that_see_different_folders_are_refused(saved_run, monkeypatch):
    """As on two machines without a shared disk, where the other one has no checkpoint."""
    _, flags = saved_run
    monkeypatch.setattr(common, "get_world_size", lambda: 2)
    monkeypatch.setattr(common, "all_reduce", lambda own, *_: own + 0)  # no step of the other one
    with pytest.raises(common.UserError, match="put --out on a shared disk"):
        main(monkeypatch, *flags)


def test_names_in_checkpoints(checkpoint, tmp_path):
    for content in ({"model": {1: torch.ones(2)}}, {3: torch.ones(2)}):
        torch.save(content, tmp_path / "numbers.pt")
        with pytest.raises(common.UserError, match="no weights by name"):
            common.read_weights(tmp_path / "numbers.pt")
    content = torch.load(checkpoint, weights_only=True)
    content["model"] = {f"_orig_mod.module.{name}": weight for name, weight in content["model"].items()}
    torch.save(content, tmp_path / "compiled.pt")
    assert common.load_encoder(tmp_path / "compiled.pt").dim == 128


@pytest.mark.parametrize("damage", ["\0\0\0\0\n", '{"note": 1}\n', "[]\n", '{"step": 1, "lo'])
def test_damaged_lines_of_the_log_are_dropped(damage, folder, tmp_path, monkeypatch, capsys):
    flags, log = ["--data", folder, "--out", tmp_path, "--steps", 2, *TINY_FLAGS], tmp_path / "log.jsonl"
    main(monkeypatch, *flags)
    lines = log.read_text()
    log.write_text(lines + damage)
    main(monkeypatch, *flags)
    assert log.read_text() == lines and "1 damaged lines are dropped" in capsys.readouterr().err


@pytest.mark.parametrize("normalized", [True, False])
def test_the_picture_shows_what_the_prediction_gets_back(normalized, folder, tmp_path, monkeypatch):
    """Before the reconstruction, the true means alone: what is more in the reconstruction was predicted."""
    shown = []
    monkeypatch.setattr(common, "save_pictures",
                        lambda columns, *_: shown.extend(common.patchify(x, 8) for x in columns.values()))
    main(monkeypatch, "--data", folder, *TINY_FLAGS, "--steps", 1, "--mean", *[0] * 3, "--std", *[1] * 3, "--out",
         tmp_path, "--norm-pix-loss" if normalized else "--no-norm-pix-loss")
    original, seen, *between, reconstruction = shown  # (B, L, P*P*C) each
    masked = (seen == 0).all(dim=2)
    assert len(between) == normalized and 0.7 < masked.float().mean() < 0.8
    assert all(torch.allclose(x[~masked], original[~masked], atol=1e-5) for x in (seen, *between, reconstruction))
    if normalized:
        means = original.mean(dim=2, keepdim=True).expand_as(original)
        assert torch.allclose(between[0][masked], means[masked], atol=1e-5)
        assert not torch.allclose(between[0][masked], reconstruction[masked], atol=1e-3)


def test_pictures_of_other_numbers_than_bytes_are_stretched(tmp_path, monkeypatch):
    generator, shown = np.random.default_rng(0), {}
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", generator.normal(3000, 500, (40, 40, 3)).astype(np.float32))
    monkeypatch.setattr(common, "save_pictures", lambda pictures, *_, **__: shown.update(pictures))
    for method, flags in ((mae, TINY_FLAGS), (maskfeat, MASKFEAT_FLAGS), (vjepa, [*VJEPA_FLAGS, "--still"])):
        shown.clear()
        main(monkeypatch, "--data", tmp_path, *flags, "--steps", 1, "--out", tmp_path / method.__name__, method=method)
        images = next(iter(shown.values()))
        assert images.min() < 0.01 and images.max() > 0.99 and 0.1 < images.std() < 0.3


@pytest.mark.parametrize("task", ["mae", "maskfeat", "vjepa"])
def test_the_picture_is_of_validation_samples(task, of_task, tmp_path, monkeypatch):
    (method, flags), shown = of_task, []
    monkeypatch.setattr(method, "save_picture", lambda model, samples, *_: shown.extend(samples.source.names))
    main(monkeypatch, *flags, "--steps", 1, "--out", tmp_path, method=method)
    assert shown and not any(b"/train/" in name for name in shown)


@pytest.mark.parametrize("method, model", [
    (mae, functools.partial(tiny_mae, decoder_dim=512, decoder_depth=8, decoder_heads=16)),
    (maskfeat, tiny_maskfeat), (vjepa, tiny_vjepa)])
def test_pictures_show_the_image_whatever_its_normalization(method, model, folder, tmp_path, monkeypatch):
    torch.save({"model": model().state_dict()}, tmp_path / "last.pth")
    image = folder / "test/coffee/4.png"
    flags = ["--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6, "--image", image, "--out", tmp_path]
    if method is vjepa:
        flags += ["--frames", 4, "--image-size", 32, "--predictor-dim", 32, "--predictor-depth", 2]
    main(monkeypatch, "show", "--init", tmp_path / "last.pth", *flags, method=method)
    picture, = tmp_path.glob("*.png")
    left, top = (7 * 14 + 4, 4) if method is vjepa else (4, 3 * 18 + 4 if method is maskfeat else 3 * 14 + 4)
    shown = torch.from_numpy(np.array(Image.open(picture)))[top:top + 224, left:left + 224].permute(2, 0, 1)
    original = data.CenterCrop(32)(Image.open(image).convert("RGB"))
    assert (shown[:, 3::7, 3::7].int() - original.int()).abs().max() <= 1  # each pixel enlarged to 7 x 7


# ------------------------------------------------------------------------------------------------------- the README


def readme_commands():
    """[(script, words)] of the README: of the fenced blocks of bash, and between backticks."""
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    script = r"(?:python|torchrun [^`]*?)\s+(mae|maskfeat|vjepa)\.py"
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        found += re.findall(rf"^.*?{script}(.*?)(?:  +#.*)?$", block, re.M)
    found += [(name, flags) for name, flags in re.findall(rf"`{script}([^`]*)`", text) if "--help" not in flags]
    return [(name, flags.split()) for name, flags in dict.fromkeys(found)]  # each once


@pytest.fixture
def published_files(tmp_path, monkeypatch):
    """A folder to work in, with tiny files in the published formats, of the names that the README has."""
    monkeypatch.chdir(tmp_path)
    video, prefix = filled(vit_table(kernel=(2, 8, 8), tokens=128), "module.backbone."), "module.backbone."
    maskfeat_head = {"mask_token": (1, 1, 128)} | layer_table("pred_head.projections.0", 27, 128)
    published = {
        "mae_pretrain_vit_base.pth": {"model": filled(vit_table())},
        "mae_visualize_vit_large.pth": {"model": filled(vit_table() | decoder_table())},
        "mae_finetuned_vit_base.pth": {"model": filled(vit_table(norm="fc_norm") | layer_table("head", 2, 128))},
        "in1k_VIT_B_MaskFeat_PT_epoch_01600.pyth": {
            "model_state": filled(vit_table(norm="pred_head.transforms.0.0") | maskfeat_head)},
        "vitl16.pth.tar": {"encoder": video, "target_encoder": video, "predictor": filled(predictor_table(), prefix)},
        "k400-probe.pth.tar": {"classifier": filled(probe_table(), "module.")}}
    for name, weights in published.items():
        torch.save(weights, name)


def test_every_command_of_the_readme_runs(folder, videos, published_files, monkeypatch, capsys):
    """Each with its own flags, on a tiny model and a few samples, for one step, in one process without torchrun."""
    commands = readme_commands()
    assert len(commands) > 25 and {script for script, _ in commands} == {*SCRIPTS}
    open_sources = data.open_sources

    def open_short_sources(*arguments, **named):
        found = open_sources(*arguments, **named)
        for source in found[:2]:
            if hasattr(source, "length"):  # it is built in
                source.length = 45
        return found

    monkeypatch.setattr(data, "open_sources", open_short_sources)
    image, clip = next((folder / "test/coffee").glob("*.png")), videos / "val/darker/clip0"
    stands_for = {"photo.jpg": image, "clip.mp4": clip, "IMAGES": folder, "PHOTOS": folder / "test",
                  "/shared/runs/mae": "runs/shared"}
    generator = np.random.default_rng(0)
    for channels, split, name in itertools.product((8, 10), ("train", "val"), ("field", "lake")):
        Path(f"bands{channels}", split, name).mkdir(parents=True)
        np.save(Path(f"bands{channels}", split, name, "0.npy"), generator.random((40, 40, channels)))
    small = {"size": "nano", "image_size": 32, "patch_size": 8, "predictor_depth": 1, "decoder_depth": 1, "steps": 1,
             "cell": 8, "batch_size": 4, "accumulate": 1, "evaluate_samples": 4, "workers": 0, "device": "cpu",
             "epochs": 0.01}

    def small_values(method, task, given):
        """Values that make a task tiny, beside or instead of those with the names `given`."""
        left_out = {"steps"} if "epochs" in given else {"epochs"}
        if "init" in given:  # the model is that of the checkpoint, and so are its decoder and predictor
            left_out |= {"size", "patch_size", "predictor_depth", "decoder_depth"}
        if task == "show":
            left_out.add("image_size")
        names = {field.name for field in dataclasses.fields(method.TASKS[task][1])}
        return values_for(method, names - left_out, small)

    for script, words in commands:
        method = SCRIPTS[script]
        task = words[0] if words and words[0] in method.TASKS else "pretrain"
        moving = script == "vjepa" and "--still" not in words or "--frames" in words or "runs/video/last.pt" in words
        channels = words[words.index("--channels") + 1] if "--channels" in words else 8
        tiles = "--channels" in words or "runs/tiles/last.pt" in words
        stands_for["DIR"] = f"bands{channels}" if tiles else videos if moving else folder
        words = [str(stands_for.get(word, word)) for word in words]
        given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        words += as_flags(small_values(method, task, given))
        if task != "show" and "--eval-only" not in words and "--benchmark" not in words:
            words.append("--fresh")  # several commands share the default folder
        main(monkeypatch, *words, method=method)
    printed = capsys.readouterr().out
    assert printed.count("validation") > 15 and printed.count("picture") > 15

    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    monkeypatch.setitem(sys.modules, "timm", MagicMock())  # a tool of the README and not a dependency
    shutil.copy(image, "photo.jpg")
    shutil.copytree(clip, "clip.mp4")  # a folder of frames is read as a video file is
    configure = mae.configure

    def configure_small(task, **given):
        configure(task, **given)  # can be made as it is written
        return configure(task, **given | {"data": str(folder)} | small_values(mae, task, given))

    monkeypatch.setattr(mae, "configure", configure_small)
    found = {}
    for block in blocks:
        exec(block, found)
    assert found["features"].shape == (1, 128) and found["video_tokens"].shape == (1, 128, 128)
    assert found["trained"](torch.randn(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("method, task", ALL_TASKS)
def test_help_lists_tasks_and_short_numbers(method, task, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(monkeypatch, *([] if task == "pretrain" else [task]), "--help", method=method)
    text = capsys.readouterr().out
    assert not re.search(r"\d\.\d{7,}|\d\.\d{6,}e", text)
    assert all(name in text for name in method.TASKS) and f"flags of {task}" in text


# ------------------------------------------------------------------------------------------ what people run into


def test_workers_and_threads_share_the_cores(monkeypatch):
    """Of a CPU: with more than cores a step took twice as long. What the user or torchrun sets is left alone."""
    def workers_and_threads(workers=None):
        return common.share_cores(workers, torch.device("cpu")), torch.get_num_threads()

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert workers_and_threads() == (4, 1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    try:
        torch.set_num_threads(8)
        assert workers_and_threads(1) == (1, 7) and workers_and_threads() == (4, 4)
        assert workers_and_threads(0) == (0, 4)  # never more than PyTorch itself would take
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        assert workers_and_threads() == (1, 1)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("method", [mae, maskfeat, vjepa])
def test_a_benchmark_leaves_no_cores_to_workers(method, monkeypatch):
    """It loads nothing; training has the default."""
    def stop(workers, device):
        raise common.UserError(f"workers: {workers}")

    monkeypatch.setattr(common, "share_cores", stop)
    for flags, workers in (["--benchmark", 1], 0), (["--steps", 1], None):
        with pytest.raises(common.UserError, match=f"workers: {workers}"):
            main(monkeypatch, *flags, "--device", "cpu", method=method)


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
common.main(mae.__doc__, mae.TASKS, mae.configure)
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


def test_torchrun_refuses_mps(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(common.UserError, match="not mps"):
        common.init_distributed("mps")


@pytest.mark.parametrize("labeled", [False, True])
def test_a_single_sample_to_evaluate_does_not_end_the_run(labeled):
    samples = data.Samples(data.Photographs(True, length=1), data.CenterCrop(32))
    loader = data.Loader([0.5] * 3, [0.5] * 3, torch.device("cpu"))
    assert data.evaluate_features(lambda x: x.flatten(1), samples, samples, loader, 10, labeled) == {}


def test_draws_of_different_purposes_are_independent():
    """The size of V-JEPA's blocks and the corner of the first block, as the training loop draws them."""
    draw = functools.partial(vjepa.draw_masks, mask_config(masking="block", mask_ratio=0.3, batch_size=1), (1, 14, 14))
    samples = data.Samples(data.Photographs(True, length=1), data.CenterCrop(32), draw_mask=draw)
    heights, tops = [], []
    for step in range(600):
        mask, = samples[0, step][-1]
        rows = mask.nonzero().flatten() // 14
        heights.append(int(rows.max() - rows.min()))
        tops.append(int(rows.min()) / (14 - heights[-1]))
    assert abs(np.corrcoef(heights, tops)[0, 1]) < 0.2
    seeds = {common.derive_seed(*numbers) for numbers in itertools.product(range(3), range(4), range(3), range(3))}
    seeds |= {common.derive_seed(*numbers) for numbers in itertools.product(range(3), range(4), range(3))}
    assert len(seeds) == 3 * 4 * 9 + 3 * 4 * 3


@pytest.mark.parametrize("compile", [True, False])
def test_a_copy_of_changed_blocks_has_its_own_weights(compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config = config_of(compile=compile, checkpointing=not compile)
    model = common.wrap_model(tiny_mae(), config, torch.device("cpu"), by_block=True)
    twin, x = copy.deepcopy(model), torch.randn(2, 5, 128)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
    assert torch.equal(model.blocks[0](x), x) and not torch.equal(twin.blocks[0](x), x)


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
@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
@pytest.mark.parametrize("planes", [None, "contig", "separate"])
def test_a_tiff_file_equals_the_same_array(dtype, photometric, planes, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 16, 3)) * (1 if dtype == np.uint8 else 11)
    array = (array / 300 if dtype == np.float32 else array).astype(dtype)
    bands_first = planes == "separate" or planes is None and photometric == "minisblack"  # as planes or as pages
    np.save(tmp_path / "x.npy", array)
    tifffile.imwrite(tmp_path / "x.tif", array.transpose(2, 0, 1) if bands_first else array, photometric=photometric,
                     planarconfig=planes)
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
    flags = ["--data", tmp_path, "--out", tmp_path / "run", "--channels", 4, "--steps", 1, *TINY_FLAGS]
    images = np.random.default_rng(0).random((4, 32, 32, 5), np.float32)
    images[:, :16, :, 2], images[..., 3] = -9999, 7
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image[..., [0, 1, 4, 3]])
    with pytest.raises(common.UserError, match="channel 3 is 7 in all"):
        main(monkeypatch, *flags)
    for i, image in enumerate(images):
        np.save(tmp_path / f"{i}.npy", image[..., [0, 1, 2, 4]])
    main(monkeypatch, *flags)
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
    with pytest.raises(common.UserError, match=message) if message else contextlib.nullcontext():
        pairs = data.read_list(tmp_path / "list.txt")
        assert pairs == [(str(tmp_path / "a.png"), "0"), (str(tmp_path / "b.png"), "1")]


def test_one_class_and_other_class_names(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "train/coffee", tmp_path / "one/train/coffee")
    shutil.copytree(folder / "test", tmp_path / "one/val")
    shutil.rmtree(tmp_path / "one/val/astronaut")
    with pytest.raises(common.UserError, match="has one class, coffee"):
        main(monkeypatch, "finetune", "--data", tmp_path / "one", *MASKFEAT_FLAGS)
    (tmp_path / "one/val/coffee").rename(tmp_path / "one/val/2020")  # names are no labels when there is no classifier
    main(monkeypatch, "--data", tmp_path / "one", "--out", tmp_path / "pre", "--steps", 1, *TINY_FLAGS)
    assert "12 images for training, 6 for validation; 1 steps of 8 are 0.667 passes" in capsys.readouterr().out

    main(monkeypatch, "finetune", "--data", folder, "--out", tmp_path / "run", "--steps", 2, *MASKFEAT_FLAGS)
    assert "24 images in 2 classes for training, 12 for validation" in capsys.readouterr().out
    shutil.copytree(folder / "test", tmp_path / "alone/val")  # no training images
    shutil.rmtree(tmp_path / "alone/val/astronaut")
    test = ["finetune", "--data", tmp_path / "alone", "--init", tmp_path / "run/last.pt", "--eval-only",
            *MASKFEAT_FLAGS]
    main(monkeypatch, *test)
    assert "of 6 validation samples" in capsys.readouterr().out
    (tmp_path / "alone/val/coffee").rename(tmp_path / "alone/val/tea")
    with pytest.raises(common.UserError, match="(?=.*last.pt)(?=.*astronaut, coffee)(?=.* has .*tea)"):
        main(monkeypatch, *test)


def test_a_very_long_picture_is_cut_before_it_is_enlarged(monkeypatch):
    resize = MagicMock(wraps=v2.functional.resize)
    monkeypatch.setattr(v2.functional, "resize", resize)
    image = Image.fromarray(np.arange(20000, dtype=np.uint16).astype(np.uint8)[None])
    for long in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        assert data.CenterCrop(64)(long).shape == (1, 64, 64)
        assert math.prod(resize.call_args.args[1]) <= 10 * 73 ** 2
    assert data.CenterCrop(64)(Image.new("L", (600, 100), 9)).unique().tolist() == [9]


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


def test_a_large_file_is_no_list(tmp_path):
    with open(tmp_path / "large.zip", "wb") as file:
        file.truncate(6 * 2 ** 30)  # takes no room on the disk
    with pytest.raises(common.UserError, match="neither a folder nor a list"):
        data.open_sources(tmp_path / "large.zip", labeled=False)


# ------------------------------------------------------------------------------------------- beside the published code
# PUBLISHED=DIR pytest -q test_all.py -k published_code
# runs the published code beside ours, on a CPU in float32, and prints the largest differences. DIR has git clones of
#     facebookresearch/mae         at commit efb2a80
#     facebookresearch/jepa                  51c59d5
#     facebookresearch/SlowFast              287ec00
#     sustainlab-group/SatMAE                e31c11f
# They need timm, fvcore, iopath, simplejson, psutil, einops, pandas and PyYAML. What else they import and is not there,
# such as pytorchvideo and torch._six, is replaced by mocks: nothing of it is used here.

# PUBLISHED=DIR PUBLISHED_STEPS=300 pytest -q test_all.py -k "published_code and (training or table)"
# trains for 300 steps instead of 20, and draws the losses of both in parity.png, which needs matplotlib (2 to 6 minutes).

PUBLISHED = os.environ.get("PUBLISHED")
STEPS = int(os.environ.get("PUBLISHED_STEPS", 20))  # of training: a multiple of 20
NEEDS = {"mae": ["timm"], "SatMAE": ["timm"], "jepa": ["yaml"], "SlowFast": ["fvcore", "iopath", "simplejson"]}
DIFFERENCES = {}  # of what: {part: the largest difference}
LOSSES = {}  # of a method: (ours, theirs) at each step


@pytest.fixture
def published_code(monkeypatch):
    """A function that imports modules of a checkout, which are forgotten after the test: others have the same names."""
    before = set(sys.modules)

    def load(checkout, *names):
        if not PUBLISHED:
            pytest.skip("set PUBLISHED to a folder with git clones of mae, jepa, SlowFast and SatMAE")
        if not Path(PUBLISHED, checkout).is_dir():
            pytest.skip(f"{PUBLISHED} has no folder {checkout}")
        for package in NEEDS[checkout]:
            pytest.importorskip(package, reason=f"{checkout} needs {package}")
        monkeypatch.syspath_prepend(Path(PUBLISHED, checkout).resolve())
        monkeypatch.setattr(np, "float", float, raising=False)  # of an older numpy
        monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # jepa's would write to a closed file of pytest's
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", MagicMock())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # which jepa sets, until the test ends
        if "timm" in NEEDS[checkout]:
            old_timm(monkeypatch)
        while True:
            try:
                return [importlib.import_module(name) for name in names]
            except ModuleNotFoundError as error:
                if error.name in sys.modules:
                    raise
                monkeypatch.setitem(sys.modules, error.name, MagicMock())

    yield load
    for name in set(sys.modules) - before:
        if any(file.name.removesuffix(".py") == name.split(".")[0] for file in Path(PUBLISHED or "").glob("*/*")):
            del sys.modules[name]


def old_timm(monkeypatch):
    """timm as in version 0.3.2: blocks with the argument qk_scale, and attention without PyTorch's own."""
    import timm.models.vision_transformer as timm_vit

    class Block(timm_vit.Block):
        def __init__(self, *arguments, qk_scale=None, **named):
            super().__init__(*arguments, **named)

    monkeypatch.setattr(timm_vit, "Block", Block)
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)


def note(what, limit=1e-5, **differences):
    """Keep differences for the table; none may exceed the limit."""
    for name, value in differences.items():
        known = DIFFERENCES.setdefault(what, {})
        known[name] = max(value, known.get(name, 0.0))
        assert value <= limit, f"{what}: {name} {value}"


def difference(a, b):
    """The largest of two tensors, or of lists of them."""
    if not torch.is_tensor(a):
        assert len(a) == len(b)
        return max(map(difference, a, b))
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def our_names(theirs):
    """The state dict of one of their models, in the same memory, with our names."""
    names = {"backbone.": "", "pred_head.transforms.0.0.": "pred_head.0.", "pred_head.projections.0.": "pred_head.1."}
    weights = {}
    for name, weight in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if not name.startswith("hogs."):
            weights[name] = weight
    return weights


@contextlib.contextmanager
def unfilled():
    """Models are made of zeros, since random weights take long: `fill` follows. (Left as they are, those of a normal
    distribution that PyTorch truncates may be drawn for ever: it repeats until all are within the limits.)
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("uniform_", "normal_", "erfinv_"):
            patch.setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor.zero_())
        yield


@torch.no_grad()
def fill(theirs, seed=0):
    """Other numbers in all weights that are trained, norms and biases too -> the state dict with our names."""
    torch.manual_seed(seed)
    for name, weight in theirs.named_parameters():
        if weight.requires_grad:
            weight.normal_(float("norm" in name and name.endswith("weight")), 0.1 if weight.ndim == 1 else 0.03)
    return our_names(theirs.eval())


def with_weights(make, weights):
    """Our model by `make()` with these weights, in the same memory; all names and shapes have to be the same."""
    with torch.device("meta"):
        model = make()
    model.load_state_dict(weights, assign=True)
    return model.eval()


def shuffled(tokens, repeat=1, unused=0):
    """What MAE draws for two images after `unused` numbers: (visible, masked), the same in `repeat` slices."""
    torch.manual_seed(1)
    torch.rand(2, unused)
    parts = torch.rand(2, tokens).argsort(dim=1).tensor_split([tokens // 4], dim=1)
    torch.manual_seed(1)
    return [torch.cat([part + i * tokens for i in range(repeat)], dim=1) for part in parts]


@pytest.mark.parametrize("size, patch", [("base", 16), ("large", 16), ("huge", 14)])
@torch.no_grad()
def test_published_code_of_mae(size, patch, published_code):
    models_mae, = published_code("mae", "models_mae")
    with unfilled():
        theirs = getattr(models_mae, f"mae_vit_{size}_patch{patch}")()
    weights, what = fill(theirs), f"MAE {size[0].upper()}/{patch}"
    ours = with_weights(lambda: mae.MAE(size, 224, patch), weights)
    for name, dim in (("pos_embed", ours.dim), ("decoder_pos_embed", 512)):
        note(what, 1e-7, positions=difference(weights[name][0, 1:], common.sincos(dim, ours.grid)))
    images = photographs(224)[:2]
    for normalized in (False, True)[size != "base":]:
        theirs.norm_pix_loss = ours.norm_pix_loss = normalized
        visible, masked = shuffled(math.prod(ours.grid))
        loss, pred, mask = theirs(images)
        our_loss, our_pred = ours(images, visible, masked)
        assert torch.equal(mask, mask_of(masked, mask.shape[1]))
        note(what, loss=difference(loss, our_loss), pred=difference(pred, our_pred))


@pytest.mark.parametrize("pool", ["class", "mean"])
@torch.no_grad()
def test_published_code_of_mae_fine_tuning(pool, published_code):
    models_vit, lr_decay = published_code("mae", "models_vit", "util.lr_decay")
    theirs = models_vit.vit_base_patch16(num_classes=10, global_pool=pool == "mean", drop_path_rate=0.1)
    ours = mae.new_classifier(mae.configure("finetune", "paper", pool=pool), 10).eval()
    ours.load_state_dict(fill(theirs))
    images = photographs(224)[:2]
    logits = theirs.head(theirs.forward_features(images))  # timm's newest forward would pool again
    note("MAE fine-tuning B/16", logits=difference(logits, ours(images)))
    found = []
    for model, groups in ((theirs, lr_decay.param_groups_lrd(theirs, 0.05, theirs.no_weight_decay(), 0.65)),
                          (ours, common.parameter_groups(ours, 0.05, 0.65, ("cls_token", "pos_embed")))):
        names = {parameter: name for name, parameter in model.named_parameters()}
        found.append({names[p]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]})
    assert found[0] == found[1] and len(found[0]) > 100


@pytest.mark.parametrize("same_mask", [False, True])
@torch.no_grad()
def test_published_code_of_satmae(same_mask, published_code):
    groups_of_bands, dates = published_code("SatMAE", "models_mae_group_channels", "models_mae_temporal")
    groups = ((0, 1, 2, 6), (3, 4, 5, 7), (8, 9))
    theirs = groups_of_bands.mae_vit_base_patch16(
        img_size=96, patch_size=8, in_chans=10, channel_groups=groups, spatial_mask=same_mask, norm_pix_loss=True)
    ours = with_weights(lambda: mae.SatMAE("base", 96, 8, 10, bands=groups), fill(theirs))
    visible, masked = shuffled(144, repeat=3) if same_mask else shuffled(3 * 144)
    images = torch.randn(2, 10, 96, 96, generator=torch.Generator().manual_seed(0))
    loss, pred, mask = theirs(images)
    our_loss, our_pred = ours(images, visible, masked)
    assert torch.equal(mask.flatten(1), mask_of(masked, 3 * 144))
    pred = [pred[:, group].permute(0, 2, 3, 1).flatten(2) for group in groups]  # each (B, L, P*P*C)
    note("SatMAE groups B/8, 96 px", loss=difference(loss, our_loss), pred=difference(pred, our_pred))

    theirs = dates.mae_vit_base_patch16(norm_pix_loss=True, same_mask=same_mask)
    ours = with_weights(lambda: mae.SatMAE("base", 224, 16, 3, dates=3), fill(theirs))
    visible, masked = shuffled(196, repeat=3, unused=3 * 196) if same_mask else shuffled(3 * 196)
    images, stamps = torch.randn(2, 3, 3, 224, 224), torch.tensor([[[15, 3, 11], [2, 11, 0], [9, 5, 23]]] * 2)
    stamps[1] += 1
    torch.manual_seed(1)
    loss, pred, mask = theirs(images.transpose(1, 2), stamps)
    our_loss, our_pred = ours(images, visible, masked, stamps)
    assert torch.equal(mask, mask_of(masked, 3 * 196))
    note("SatMAE dates B/16", loss=difference(loss, our_loss), pred=difference(pred, torch.cat(our_pred, dim=1)))


def moving_clips(frames):
    """Two clips of a camera that moves over a photograph, by a pixel a frame: (2, 3, frames, 224, 224)."""
    images = photographs(240)[:2]
    return torch.stack([images[:, :, t:t + 224, t // 2:t // 2 + 224] for t in range(frames)], dim=2)


def slowfast_config(defaults, **changes):
    """The published config of MaskFeat on images, with other values in some fields, on a CPU."""
    config = defaults.get_cfg()
    config.merge_from_file(str(Path(PUBLISHED, "SlowFast/configs/masked_ssl/in1k_VIT_B_MaskFeat_PT.yaml")))
    for name, value in {"NUM_GPUS": 0, **changes}.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(config, section) if section else config, field, value)
    return config


@torch.no_grad()
def test_published_code_of_hog(published_code):
    operators, = published_code("SlowFast", "slowfast.models.operators")
    theirs = operators.HOGLayerC(nbins=9, pool=8)
    loader = data.Loader(data.IMAGENET_MEAN, data.IMAGENET_STD, torch.device("cpu"))
    samples = data.Samples(data.Photographs(True), data.CenterCrop(224))
    for first in range(0, 400, 50):  # crops of each photograph
        images, _ = loader.examples(samples, range(first, 6000, 400))
        note("HOG of 120 photographs", 1e-4, cells=difference(theirs(images), maskfeat.hog(images)))


@pytest.mark.parametrize("frames", [1, 16])
@torch.no_grad()
def test_published_code_of_maskfeat(frames, published_code):
    defaults, masked_model, loss_functions = published_code(
        "SlowFast", "slowfast.config.defaults", "slowfast.models.masked", "slowfast.models.losses")
    clip = dict(DATA__NUM_FRAMES=16, MVIT__PATCH_2D=False, MVIT__PATCH_KERNEL=[2, 16, 16],
                MVIT__PATCH_STRIDE=[2, 16, 16], MVIT__PATCH_PADDING=[0, 0, 0])
    with unfilled():
        theirs = masked_model.MaskMViT(slowfast_config(defaults, **clip if frames > 1 else {}))
    ours = with_weights(lambda: maskfeat.MaskFeat("base", 224, 16, 3, frames, min(2, frames)), fill(theirs))
    pixels = photographs(224)[:2] if frames == 1 else moving_clips(frames)[:1]
    draw = maskfeat.block_mask if frames == 1 else maskfeat.cube_mask
    masks = torch.stack([draw(ours.grid, 0.4) for _ in pixels])
    visible, masked = indices_of(masks)
    preds, labels = theirs([pixels, None, masks.unflatten(1, ours.grid)])
    loss, _ = loss_functions.get_loss_func("multi_mse")(reduction="mean")(preds, labels)
    our_loss, our_pred = ours(pixels, visible, masked)
    our_target = common.gather_tokens(ours.targets(pixels), masked).flatten(0, 1)
    note(f"MaskFeat B/16, frames {frames}", loss=difference(loss, our_loss),
         pred=difference(preds[0], our_pred.flatten(0, 1)), targets=difference(labels[0][0], our_target))


def jepa_config():
    import yaml
    return yaml.safe_load(Path(PUBLISHED, "jepa/configs/pretrain/vitl16.yaml").read_text())


@torch.no_grad()
def test_published_code_of_vjepa(published_code):
    utils, collators, mask_utils = published_code(
        "jepa", "app.vjepa.utils", "src.masks.multiblock3d", "src.masks.utils")
    with unfilled():
        encoder, predictor = utils.init_video_model("cpu", model_name="vit_large", pred_depth=12, uniform_power=True,
                                                    use_mask_tokens=True)
    target_encoder, weights = copy.deepcopy(encoder), {}
    parts = dict(encoder=encoder, predictor=predictor, target_encoder=target_encoder)
    for seed, (name, part) in enumerate(parts.items()):
        weights |= {f"{name}.{key}": weight for key, weight in fill(part, seed).items()}
    ours = with_weights(lambda: vjepa.VJEPA("large"), weights)
    for name, dim in (("encoder.pos_embed", 1024), ("predictor.predictor_pos_embed", 384)):
        note("V-JEPA L/16", 1e-7, positions=difference(weights[name][0], common.sincos(dim, (8, 14, 14))))

    clips = moving_clips(16)[:1]
    _, visible, masked = collators.MaskCollator(jepa_config()["mask"], 224, 16, 16, 2)([torch.zeros(1)])
    targets = F.layer_norm(target_encoder(clips), (1024,))
    context = encoder(clips, visible)
    pred = predictor(context, mask_utils.apply_masks(targets, masked, concat=False), visible, masked)
    loss = sum((p - common.gather_tokens(targets, ids)).abs().mean() for p, ids in zip(pred, masked)) / 2

    our_targets = ours.targets(clips)
    ours.targets = lambda _: our_targets  # which takes long
    inputs = inputs_of(ours.predictor, lambda: note("V-JEPA L/16", loss=difference(loss, ours(clips, visible, masked))))
    note("V-JEPA L/16", context=difference(context, [values[0] for values in inputs]),
         targets=difference(targets, our_targets), pred=difference(pred, [ours.predictor(*x) for x in inputs]))


@torch.no_grad()
def test_published_code_of_the_attentive_probe(published_code):
    pooler, = published_code("jepa", "src.models.attentive_pooler")
    theirs = pooler.AttentiveClassifier(embed_dim=1024, num_heads=16, depth=1, num_classes=174)
    ours = with_weights(lambda: vjepa.AttentiveClassifier(1024, 16, 174), fill(theirs))
    tokens = torch.randn(2, 1568, 1024)
    note("V-JEPA probe L/16", logits=difference(theirs(tokens), ours(tokens)))


def test_published_code_of_vjepa_masks(published_code, monkeypatch):
    """2,000 draws: number of visible tokens, its square, and how often a place of the frame is masked."""
    collators, = published_code("jepa", "src.masks.multiblock3d")
    torch.manual_seed(0)
    sizes = [], []

    def recorded(sizes, draw):
        def draw_and_record(*arguments, **named):
            size = draw(*arguments, **named)
            sizes.append(size[-2:])  # (height, width)
            return size
        return draw_and_record
    for found, owner, name in zip(sizes, (collators._MaskGenerator, vjepa), ("_sample_block_size", "sample_block_size")):
        monkeypatch.setattr(owner, name, recorded(found, getattr(owner, name)))
    collator = collators.MaskCollator(jepa_config()["mask"], 224, 16, 16, 2)
    theirs, ours = [], []
    for position in range(2000):
        _, visible, masked = collator([torch.zeros(1)])
        theirs.append(torch.cat([mask_of(ids, 1568) for ids in masked]))
        with torch.random.fork_rng():
            torch.manual_seed(common.derive_seed(0, common.MASK, position))
            ours.append(vjepa.draw_masks(mask_config(batch_size=1), (8, 14, 14), position).float())
    for one, other in (sizes, sizes[::-1]):  # of small and large blocks, which share an aspect ratio
        pairs = [collections.Counter(zip(x[::2], x[1::2])) for x in (one, other)]
        assert all(pair in pairs[1] for pair, number in pairs[0].items() if number > 20)
    for kind in (0, 1):
        statistics = []
        for draws in (theirs, ours):
            masks = torch.stack(draws)[:, kind]  # (2000, L)
            length = (1 - masks).sum(dim=1, keepdim=True)
            statistics.append(torch.cat([length, length.square(), masks[:, :196]], dim=1).double())
        a, b = statistics
        errors = (a.mean(0) - b.mean(0)).abs() / ((a.var(0) + b.var(0)) / 2000).sqrt()
        errors.nan_to_num_(0)  # 0 / 0 in the middle, which large blocks always mask
        names = ("length", "its square", "positions")
        note("V-JEPA masks, standard errors", 4, **dict(zip(names, [*errors[:2].tolist(), errors[2:].max().item()])))


def recorded_run(monkeypatch, method, *words):
    """Pre-train by our command line: (config, batches, losses of each step, weights at the end)."""
    words = [*words, "--steps", STEPS, "--evaluate-samples", 8]
    config, batches, train = parsed(monkeypatch, method, *words)[1], [], data.Loader.train

    def recorded(*arguments):
        for batch in train(*arguments):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(data.Loader, "train", recorded)
    method.pretrain(config)
    return config, batches, losses(config.out), common.read_checkpoint(Path(config.out, "last.pt"))["model"]


def note_training(method, our_losses, their_losses, our_weights, their_weights):
    """The bias of keys adds the same to all products with a query, so that softmax takes it out again: its gradient
    is zero but for rounding, of which AdamW makes steps of up to the learning rate.

    Over more than 20 steps only losses are compared. V-JEPA's limit is wider: after 300 steps two runs of ours differ
    by 1.4e-4 if one weight starts with another last bit. In float64 both codes agree to 1e-12.
    """
    assert len(our_losses) == len(their_losses) == STEPS and our_weights.keys() == their_weights.keys()
    what, LOSSES[method] = f"{method}, {STEPS} steps", (our_losses, their_losses)
    limit = 1e-2 if method == "V-JEPA" and STEPS > 20 else 1e-5
    note(what, limit, loss=max(abs(a / b - 1) for a, b in zip(our_losses, their_losses)))
    if STEPS > 20:
        return
    for name, weight in our_weights.items():
        pairs = list(zip(weight.chunk(3), their_weights[name].chunk(3)))
        if name.endswith("attn.qkv.bias"):
            note(what, 1e-3, keys=difference(*pairs.pop(1)))
        note(what, 2e-6, weights=max(difference(*pair) for pair in pairs))  # weights near 1, in float32


def assert_loads(model, file, new, weights):
    """Their file into our model, and its encoder into our ViT."""
    common.load_model(model, file, new, encoder_alone=False)
    encoder = common.load_encoder(file)
    for loaded, wanted in ((model.state_dict(), weights), (encoder.state_dict(), common.encoder_weights(weights))):
        names = [name for name in loaded if name in wanted]
        assert len(names) > 40 and all(torch.equal(loaded[name], wanted[name]) for name in names)


def test_published_code_of_mae_training(tmp_path, monkeypatch, no_probe, published_code):
    models_mae, engine, misc = published_code("mae", "models_mae", "engine_pretrain", "util.misc")
    config, batches, our_losses, weights = recorded_run(
        monkeypatch, mae, "--out", tmp_path, *TINY_FLAGS, "--norm-pix-loss", "--warmup", 0.25)
    theirs = models_mae.MaskedAutoencoderViT(32, 8, 3, 128, 4, 4, 32, 1, 2, norm_pix_loss=True,
                                             norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    theirs.load_state_dict(mae.new_model(config).state_dict())
    their_losses, noise = [], []
    for _, _, visible, masked in batches:  # which sorts so
        order = torch.cat([visible, masked], dim=1)
        noise.append(torch.zeros(order.shape).scatter(1, order, torch.arange(16.0).expand_as(order)))
    monkeypatch.setattr(torch, "rand", lambda *shape, device: noise.pop(0))
    theirs.register_forward_hook(lambda *call: their_losses.append(call[2][0].item()))

    import timm.optim
    arguments = argparse.Namespace(accum_iter=1, mask_ratio=0.75, lr=config.base_lr * 8 / 256, min_lr=0.0,
                                   warmup_epochs=0.5, epochs=2, output_dir=str(tmp_path))
    groups = timm.optim.param_groups_weight_decay(theirs, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95))
    scaler = misc.NativeScalerWithGradNormCount()
    for epoch in (0, 1):
        loader = [(images, None) for images, *_ in batches[epoch * STEPS // 2:][:STEPS // 2]]
        engine.train_one_epoch(theirs, loader, optimizer, torch.device("cpu"), epoch, scaler, args=arguments)
    note_training("MAE", our_losses, their_losses, weights, theirs.state_dict())

    misc.save_model(arguments, 1, theirs, theirs, optimizer, scaler)
    assert_loads(mae.new_model(config), tmp_path / "checkpoint-1.pth", ("decoder_", "mask_token"), theirs.state_dict())
    misc.load_model(argparse.Namespace(resume=str(tmp_path / "last.pt")), theirs, optimizer, scaler)  # strictly
    assert all(torch.equal(weight, weights[name]) for name, weight in theirs.state_dict().items())


def test_published_code_of_maskfeat_training(tmp_path, monkeypatch, no_probe, published_code):
    defaults, masked_model, optim, checkpoint, train_net = published_code(
        "SlowFast", "slowfast.config.defaults", "slowfast.models.masked", "slowfast.models.optimizer",
        "slowfast.utils.checkpoint", "tools.train_net")
    flags = [*MASKFEAT_FLAGS, "--image-size", 64, "--patch-size", 16, "--clip-grad", 0.02]
    config, batches, our_losses, weights = recorded_run(
        monkeypatch, maskfeat, "--out", tmp_path, *flags, "--warmup", 0.25)
    theirs = masked_model.MaskMViT(slowfast_config(
        defaults, DATA__TRAIN_CROP_SIZE=64, DATA__TEST_CROP_SIZE=64, MVIT__EMBED_DIM=128, MVIT__NUM_HEADS=4,
        MVIT__DEPTH=4, MASK__PRETRAIN_DEPTH=[3], SOLVER__BASE_LR=config.base_lr * 8 / 256, SOLVER__MAX_EPOCH=2,
        SOLVER__WARMUP_EPOCHS=0.5, SOLVER__WARMUP_START_LR=0.0))
    named = our_names(theirs)
    for name, weight in maskfeat.new_model(config).state_dict().items():
        named.pop(name).copy_(weight)
    assert not named
    optimizer, meter = optim.construct_optimizer(theirs, theirs.cfg), MagicMock()
    for epoch in (0, 1):
        loader = [([pixels, None, mask_of(masked, 16).view(8, 4, 4)], torch.zeros(8), None, None, {})
                  for pixels, _, _, masked in batches[epoch * STEPS // 2:][:STEPS // 2]]
        train_net.train_epoch(loader, theirs, optimizer, torch.amp.GradScaler("cpu", enabled=False), meter, epoch,
                              theirs.cfg)
    their_losses = [call.args[2] for call in meter.update_stats.call_args_list]
    note_training("MaskFeat", our_losses, their_losses, weights, our_names(theirs))
    file = checkpoint.save_checkpoint(str(tmp_path), theirs, optimizer, 1, theirs.cfg)
    assert_loads(maskfeat.new_model(config), file, ("pred_head.", "mask_token"), our_names(theirs))


def test_published_code_of_vjepa_training(tmp_path, monkeypatch, no_probe, published_code):
    train, = published_code("jepa", "app.vjepa.train")
    flags = [*VJEPA_FLAGS, "--frames", 16, "--frame-stride", 1, "--context-frames", 16]
    # There the clipping begins an epoch, here of one step, after the warm-up.
    config, batches, our_losses, weights = recorded_run(
        monkeypatch, vjepa, "--out", tmp_path, *flags, "--warmup", 0.2 + 1e-12, "--clip-grad", 0.05,
        "--start-lr", 0.32, "--final-weight-decay", 0.4)
    ours, peak_lr = vjepa.new_model(config), config.base_lr * 8 / 256
    arguments = jepa_config()
    arguments["data"] |= dict(batch_size=8, num_frames=16, crop_size=32, patch_size=8)
    arguments["logging"]["folder"], arguments["meta"]["dtype"] = str(tmp_path), "float32"
    arguments["model"] |= dict(model_name="nano", pred_depth=1, pred_embed_dim=32)
    arguments["optimization"] |= dict(
        ipe=1, epochs=STEPS, warmup=STEPS // 5, clip_grad=0.05, lr=peak_lr, start_lr=0.32 * peak_lr,
        final_lr=config.min_lr, ema=[config.momentum, config.final_momentum])

    def with_our_weights(*arguments, **named):
        models = make_models(*arguments, **named)
        for model, own in zip(models, (ours.encoder, ours.predictor)):
            model.backbone.load_state_dict(own.state_dict())
        return models

    def timed(step):
        steps.append(step())
        return steps[-1], 0

    make_models, steps = train.init_video_model, []
    loader = [([[clips]], *masks) for clips, _, *masks in batches]
    fakes = dict(init_video_model=with_our_weights, gpu_timer=timed, mp=MagicMock(),
                 init_data=lambda **_: (loader, MagicMock()),
                 DistributedDataParallel=lambda model, **_: torch.nn.DataParallel(model))  # which on a CPU only wraps
    for name, fake in fakes.items():
        monkeypatch.setattr(train, name, fake)
    vision_transformer = sys.modules["src.models.vision_transformer"]
    vision_transformer.nano = functools.partial(
        vision_transformer.VisionTransformer, embed_dim=128, depth=4, num_heads=4, qkv_bias=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    train.main(arguments)
    file = tmp_path / "jepa-latest.pth.tar"
    theirs = common.read_weights(file)[0]
    note_training("V-JEPA", our_losses, [values[0] for values in steps], weights, theirs)
    assert_loads(vjepa.new_model(config), file, ("predictor.",), theirs)


def draw_parity():
    """The losses of both codes, one over the other, and below them their relative difference."""
    matplotlib = pytest.importorskip("matplotlib.figure", reason="parity.png needs matplotlib")
    figure = matplotlib.Figure((9, 4), layout="constrained")
    axes = figure.subplots(2, len(LOSSES), sharex=True, squeeze=False, height_ratios=[2, 1])
    for method, (upper, lower) in zip(LOSSES, axes.T):
        ours, theirs = LOSSES[method]
        upper.plot(ours, "orange", linewidth=3, label="this code")
        upper.plot(theirs, "b--", linewidth=0.8, label="published code")
        upper.set(title=method, ylabel="loss", ylim=0)
        lower.plot([abs(a / b - 1) for a, b in zip(ours, theirs)], "k.", markersize=2)
        lower.set(xlabel="step", ylabel="relative\ndifference", yscale="log", ylim=(1e-8, 1e-2))
    axes[0, 0].legend()
    figure.savefig("parity.png", dpi=150)


def test_published_code_table(capsys):
    """Prints the largest differences that the tests before have found."""
    if not DIFFERENCES:
        pytest.skip("none of the published code was run")
    with capsys.disabled():
        for what, parts in DIFFERENCES.items():
            print(f"\npublished code: {what}: " + ", ".join(f"{name} {x:.2g}" for name, x in parts.items()), end="")
        print()
    if STEPS > 20:
        draw_parity()
