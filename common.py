"""What the three methods share: the blocks of a Vision Transformer, and the plumbing of a run.

The first half is the model (Dosovitskiy et al. 2021, arXiv 2010.11929). Its parameters carry the names of timm and of
the published MAE code, so that weights travel both ways. The second half has nothing to teach about any method:
process group, seeds, schedule, parameter groups, checkpoints, log, command line.

Shapes: B images in the batch, L patches of one image, N tokens in a sequence, D the width of a token, C channels,
P the side of a patch in pixels, T frames of a clip.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------- the Vision Transformer

SIZES = {  # width D, blocks, heads
    "nano": (128, 4, 4),  # not from any paper: for the demos on a CPU
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, L, P*P*C): patches in raster order, each flattened as (row, column, channel)."""
    B, C, H, W = images.shape
    P = patch_size
    patches = images.reshape(B, C, H // P, P, W // P, P)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // P) * (W // P), P * P * C)


def unpatchify(patches, patch_size, grid):
    """The inverse of `patchify`: (B, L, P*P*C) -> (B, C, H, W), where grid = (H/P, W/P)."""
    B, P, (rows, columns) = len(patches), patch_size, grid
    images = patches.reshape(B, rows, columns, P, P, -1)
    return images.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * P, columns * P)


def take(x, ids):
    """The tokens of x (B, L, D) at the places ids (B, N): (B, N, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


def put(x, ids, tokens):
    """x (B, L, D) with other tokens at the places ids (B, N): tokens are (B, N, D), or one for all, (1, 1, D)."""
    index = ids[..., None].expand(-1, -1, x.shape[2])
    return x.scatter(1, index, tokens.to(x.dtype).expand_as(index))


def sincos_1d(dim, positions):
    """Sine-cosine code of numbers, (N,) -> (N, dim) in float64: sines in the first half, cosines in the second."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64  # which MPS does not have
    frequencies = 1 / 10000 ** (torch.arange(dim // 2, dtype=dtype, device=positions.device) / (dim // 2))
    angles = positions.to(dtype)[:, None] * frequencies  # (N, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(dim, grid):
    """Position table (L, dim) of a grid (rows, columns); dim is a multiple of 4.

    The *column* is coded in the first half and the row in the second, as in the published MAE table.
    """
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return torch.cat([sincos_1d(dim // 2, column.flatten()), sincos_1d(dim // 2, row.flatten())], dim=1).float()


def sincos_3d(dim, grid):
    """Position table (L, dim) of a grid (times, rows, columns).

    Time, row and column get the same share of the vector, rounded up to an even number and cut to dim at the end
    ("uniform_power" in the published V-JEPA configurations).
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    share = math.ceil(dim / 6) * 2
    return torch.cat([sincos_1d(share, axis.flatten()) for axis in axes], dim=1)[:, :dim].float()


def resize_positions(table, old_grid, new_grid):
    """Interpolate a position table (1, [1 +] L, D) to another grid: bicubic in space, linear in time.

    A row for the class token, if there is one, stays as it is. Grids are (rows, columns) or (times, rows, columns).
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    extra, table = table.split([table.shape[1] - math.prod(old_grid), math.prod(old_grid)], dim=1)
    table = table.reshape(-1, *old_grid[-2:], table.shape[-1]).permute(0, 3, 1, 2)  # (times, D, rows, columns)
    table = F.interpolate(table, size=tuple(new_grid[-2:]), mode="bicubic", align_corners=False)
    if len(old_grid) == 3 and old_grid[0] != new_grid[0]:
        by_place = table.permute(2, 3, 1, 0).flatten(0, 1)  # (rows*columns, D, times)
        by_place = F.interpolate(by_place, size=new_grid[0], mode="linear", align_corners=False)
        table = by_place.unflatten(0, tuple(new_grid[-2:])).permute(3, 2, 0, 1)
    return torch.cat([extra, table.permute(0, 2, 3, 1).reshape(1, -1, table.shape[1])], dim=1)


class PatchEmbed(nn.Module):
    """Linear projection of patches, or of tubelets (`tubelet` frames of a patch) where frames > 1.

    (B, C, H, W) or (B, C, T, H, W) -> (B, L, D), in raster order with time first.
    """

    def __init__(self, patch_size, channels, dim, frames=1, tubelet=1):
        super().__init__()
        if frames > 1:
            kernel = (tubelet, patch_size, patch_size)
            self.proj = nn.Conv3d(channels, dim, kernel_size=kernel, stride=kernel)
        else:
            self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise UserError(f"a width of {dim} is not a multiple of {heads} attention heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. `drop_path` is the chance that a sample skips a branch (stochastic depth)."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Vision Transformer: the encoder of all three methods, and the classifier that fine-tuning makes of it.

    size: a key of SIZES; image_size: pixels, an int or (H, W), a multiple of patch_size.
    frames > 1 makes it a video model whose tokens span `tubelet` frames.
    class_token: put a learned token before the patches; learned_positions: else the fixed sine-cosine table.
    pool: "class" (final `norm`, then the class token, or where there is none the mean of the patch tokens) or "mean"
    (mean of the patch tokens, then `fc_norm`).
    num_classes: 0 returns the pooled features (B, D), else logits (B, num_classes).
    drop_path: rate of the last block; it rises linearly from 0 at the first.
    """

    def __init__(self, size="base", image_size=224, patch_size=16, channels=3, frames=1, tubelet=1, class_token=True,
                 learned_positions=False, pool="class", num_classes=0, drop_path=0.0):
        super().__init__()
        dim, depth, heads = SIZES[size]
        self.grid = grid_of(image_size, patch_size, frames, tubelet)
        self.patch_size, self.pool, self.dim = patch_size, pool, dim

        self.patch_embed = PatchEmbed(patch_size, channels, dim, frames, tubelet)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        table = sincos_3d(dim, self.grid) if frames > 1 else sincos_2d(dim, self.grid)
        table = F.pad(table, (0, 0, int(class_token), 0))[None]  # the class token's position is a row of zeros
        self.pos_embed = nn.Parameter(table, requires_grad=learned_positions)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth))
        self.norm = nn.Identity() if pool == "mean" else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.pos_embed):
            if token is not None and token.requires_grad:
                nn.init.trunc_normal_(token, std=0.02)

    def embed(self, pixels):
        """Patch tokens with their positions, without the class token: (B, C, [T,] H, W) -> (B, L, D)."""
        return self.patch_embed(pixels) + self.pos_embed[:, -math.prod(self.grid):]

    def encode(self, x):
        """Put the class token, if there is one, before some embedded tokens; blocks; `norm`: (B, [1 +] N, D)."""
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens(self, pixels):
        """All encoded tokens, the class token first: (B, C, [T,] H, W) -> (B, [1 +] L, D)."""
        return self.encode(self.embed(pixels))

    def classify(self, x):
        """Pool all encoded tokens; `head`: (B, [1 +] L, D) -> (B, D), or logits (B, num_classes)."""
        class_tokens = int(self.cls_token is not None)
        x = x[:, 0] if self.pool == "class" and class_tokens else x[:, class_tokens:].mean(dim=1)
        return self.head(self.fc_norm(x))

    def forward(self, pixels):
        return self.classify(self.tokens(pixels))

    @classmethod
    def load(cls, path, **changes):
        """Build a ViT from a checkpoint of ours or a published one, and load its weights.

        The architecture is read off the file; `changes` overrides what a ViT takes, for instance num_classes=10,
        pool="mean", drop_path=0.1 or image_size=(192, 256). Positions are interpolated to another size; a head, and
        the norm before it, start anew where the file has none that fits. Raises UserError if the file does not fit.
        """
        weights, settings = read_weights(path)
        old, weights = describe(weights, settings, path), encoder_of(weights)
        vit = cls(**{**old, **changes})
        own = vit.state_dict()
        old_grid = grid_of(old["image_size"], old["patch_size"], old["frames"], old["tubelet"])
        weights["pos_embed"] = resize_positions(weights["pos_embed"], old_grid, vit.grid)
        for name in [name for name in own if name.split(".")[0] in ("norm", "fc_norm", "head")]:
            if name not in weights or weights[name].shape != own[name].shape:
                weights[name] = own[name]
        # A checkpoint of a whole method holds more than its encoder; everything that the encoder has must be there.
        extra = ("decoder", "mask_token", "encoder_mask_token", "pred_head.", "norm.", "fc_norm.", "head.")
        weights = {name: w for name, w in weights.items() if name in own or not name.startswith(extra)}
        load_strictly(vit, weights, path)
        return vit


def height_and_width(image_size):
    """An image size, which is an int or (H, W), as (H, W)."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def grid_of(image_size, patch_size, frames=1, tubelet=1):
    """The grid of tokens: (rows, columns), led by the time steps where frames > 1."""
    height, width = height_and_width(image_size)
    if height % patch_size or width % patch_size or min(height, width) <= 0:
        raise UserError(f"image size {height}x{width} is not a multiple of the patch size {patch_size}")
    if frames % tubelet:
        raise UserError(f"{frames} frames are not a multiple of the tubelet of {tubelet}")
    times = (frames // tubelet,) if frames > 1 else ()
    return *times, height // patch_size, width // patch_size


# ------------------------------------------------------------------------------------------------ weights, checkpoints


class UserError(Exception):
    """Something that the user gave is wrong: `run_main` prints the sentence, without a traceback, and exits with 2."""


class BrokenCheckpoint(UserError):
    """A checkpoint is damaged, or is none."""


def read_checkpoint(path):
    """The dictionary in a checkpoint file. Only tensors and plain values are read: nothing in the file is executed."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold their arguments in one
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # the check sums, which torch.load leaves aside
                if archive.testzip():
                    raise ValueError("a wrong check sum")
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except (PermissionError, MemoryError) as error:
        raise UserError(f"{path} could not be read: {error}") from None
    except Exception:  # a damaged file makes the reader fail in many ways
        raise BrokenCheckpoint(f"{path} is broken or is not a checkpoint of tensors and plain values") from None
    nested = ("model", "model_state", "encoder", "predictor", "target_encoder", "classifier")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name, {}), dict) for name in nested):
        raise UserError(f"{path} holds no weights by name")
    return checkpoint


PUBLISHED_NAMES = {  # parts of names in published files: ours
    "module.": "", "backbone.": "",  # V-JEPA
    "pred_head.transforms.0.0.": "pred_head.0.", "pred_head.projections.0.": "pred_head.1.",  # MaskFeat
}


def read_weights(path):
    """(weights by name, settings of the run or {}) of a checkpoint of ours or a published one.

    The weights are under "model" (ours, MAE), "model_state" (MaskFeat), or in a dictionary for each network (V-JEPA).
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("model", checkpoint.get("model_state", checkpoint))
    networks = [name for name in ("encoder", "predictor", "target_encoder", "classifier") if name in checkpoint]
    if networks:
        weights = {f"{network}.{name}": w for network in networks for name, w in checkpoint[network].items()}
    named = {}
    for name, weight in weights.items():
        for published, ours in PUBLISHED_NAMES.items():
            name = name.replace(published, ours)
        if not name.startswith("hogs."):  # fixed filters of the published MaskFeat
            named[name] = weight
    return named, checkpoint.get("settings", {})


def encoder_of(weights):
    """The weights of the encoder alone: of a V-JEPA its y-encoder, of a probe the encoder under it."""
    for prefix in ("target_encoder.", "encoder."):
        if any(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    return weights


def describe(weights, settings, path):
    """The arguments of the ViT that `weights` belong to, read off names and shapes (settings: see `read_weights`)."""
    try:
        weights = encoder_of(weights)
        groups = [w for name, w in weights.items() if re.fullmatch(r"patch_embed\.(\d+\.)?proj\.weight", name)]
        dim, channels, *tubelet, _, patch_size = groups[0].shape  # a tubelet if it is video
        channels = settings.get("channels") or sum(group.shape[1] for group in groups)  # groups of bands: SatMAE
        frames, tubelet = (settings.get("frames", 16), tubelet[0]) if tubelet else (1, 1)
        class_token = "cls_token" in weights
        patches = (weights["pos_embed"].shape[1] - class_token) // (frames // tubelet)  # of one time step
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        size = next(size for size, (width, blocks, _) in SIZES.items() if (width, blocks) == (dim, depth))
    except (KeyError, IndexError, AttributeError, ValueError, StopIteration):
        needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight")
        lacks = [name for name in needed if name not in weights]
        raise UserError(f"{path} is not a checkpoint of a Vision Transformer of a size known here: it "
                        + (f"lacks {', '.join(lacks)} and " if lacks else "")
                        + f"has {', '.join(list(weights)[:3]) or 'no weights'}") from None
    return {
        "size": size, "channels": channels, "patch_size": patch_size, "frames": frames, "tubelet": tubelet,
        "class_token": class_token,
        "image_size": settings.get("image_size") or patch_size * math.isqrt(patches),
        "pool": "mean" if "fc_norm.weight" in weights else "class",
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
    }


def load_strictly(model, weights, path):
    """Load every parameter, or raise a UserError that names the first missing and unexpected ones."""
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    misshaped = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if missing or unexpected or misshaped:
        faults = [(missing, "lacks"), (unexpected, "has the unexpected"), (misshaped, "has another shape for")]
        raise UserError(f"{path} does not fit this model: it " + "; it ".join(
            f"{fault} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for names, fault in faults if names))
    model.load_state_dict(weights)


def settings_of(args):
    """What a run depends on, as plain values: all flags but those on where and how it runs."""
    technical = ("task", "recipe", "out", "fresh", "device", "compile", "workers", "log_every", "save_every", "epochs",
                 "measure", "eval_only", "image", "views", "accumulate", "precision", "probe_every", "probe_labels",
                 "benchmark", "classifier")
    settings = {name: value for name, value in vars(args).items() if name not in technical and value is not None}
    if args.data and args.data != "cifar10":
        settings["data"] = str(Path(args.data).resolve())
    return settings


def write_whole(path, write):
    """Fill a file by `write(file)` under another name, then rename it: under its own it is whole at every moment."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == "last.pt" and path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}); what stood there before is untouched") from None


def save_run(args, settings, step, model, optimizer, scaler, name="last.pt"):
    """Rank 0 writes the checkpoint DIR/`name`; the last.pt of before is kept as previous.pt.

    A UserError if it cannot: for last.pt in all processes, which all have to call this.
    """
    failure = None
    if is_rank_0():
        weights = model.state_dict()
        checkpoint = {"settings": settings, "step": step, "model": weights, "optimizer": optimizer.state_dict(),
                      "scaler": scaler.state_dict(), "processes": number_of_processes()}
        try:
            if not torch.stack([weight.isfinite().all() for weight in weights.values()]).all():
                raise UserError(f"step {step} made weights that are not finite, so they are not saved: lower --base-lr")
            write_whole(Path(args.out, name), lambda file: torch.save(checkpoint, file))
        except UserError as error:
            failure = error
    if name == "last.pt" and sum_over_processes(torch.tensor(int(failure is not None))):
        failure = failure or UserError("rank 0 could not save the run")
    if failure:
        raise failure


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder --out {path} cannot be made: {error.strerror}") from None


def open_run(args, model, optimizer, scaler):
    """Make the folder --out ready, go on with the run in it if there is one, and return the step to start from.

    A broken last.pt is put aside as last.broken.pt and previous.pt is used. A folder with a run of other settings is
    left alone with a UserError, unless --fresh.
    """
    if args.benchmark:
        return 0
    settings = settings_of(args)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        args.fresh = False  # torchrun has started it again after a crash
    out, first_step, broken = Path(args.out), 0, False
    found = [] if args.fresh else [path for path in (out / "last.pt", out / "previous.pt") if path.exists()]
    if found:
        try:
            checkpoint = read_checkpoint(found[0])
        except BrokenCheckpoint as error:
            if len(found) == 1:
                raise UserError(f"{error}, and there is no other to go on from: --fresh starts over") from None
            if is_rank_0():
                print(f"{error}: going on from {found[1]}", file=sys.stderr)
            checkpoint, broken = read_checkpoint(found[1]), True
        old = checkpoint.get("settings", {})
        changed = [f"{name} {old.get(name)} there, {settings.get(name)} now" for name in {**old, **settings}
                   if old.get(name) != settings.get(name)]
        if changed:
            raise UserError(f"{out} holds a run with other settings ({'; '.join(changed[:5])}): "
                            "give another --out, or --fresh to start over")
        load_strictly(model, checkpoint["model"], found[broken])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:  # it is empty unless the run was in fp16
            scaler.load_state_dict(checkpoint["scaler"])
        first_step, before, now = checkpoint["step"], checkpoint["processes"], number_of_processes()
        if before != now and is_rank_0():
            print(f"so far {before} processes made this run, now {now}: sums round differently, and drop path, MixUp "
                  "and CutMix are drawn by process", file=sys.stderr)
    make_folder(out)
    if sum_over_processes(torch.tensor(first_step)) != first_step * number_of_processes():
        raise UserError(f"not all processes see the same {out}/last.pt: --out must be a folder that all machines share")
    if is_rank_0():
        for path in (out / "last.pt", out / "previous.pt", out / "best.pt") if args.fresh else ():
            if path.exists():
                os.replace(path, path.with_suffix(".old.pt"))
        if broken:
            os.replace(found[0], out / "last.broken.pt")
        log = out / "log.jsonl"  # the steps after the checkpoint are written anew
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
        lines = [line + "\n" for line in lines if json.loads(line)["step"] <= first_step]
        write_whole(log, lambda file: file.write("".join(lines).encode()))
        print(f"step {first_step} of {args.steps} in {out}; " + ", ".join(f"{n}={v}" for n, v in settings.items()))
    return first_step


# -------------------------------------------------------------------------------------------------- processes, seeds


def join_processes(device=None):
    """Join the process group that torchrun's environment describes, or stay alone. Returns (device, rank, processes).

    device: "cuda", "cpu", "mps" or None for the best one there is. NCCL joins the GPUs, gloo the CPUs.
    """
    device = device or ("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")
    if not {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device, lambda: True)():
        raise UserError(f"this machine has no device {device}")
    torch.backends.cudnn.allow_tf32 = False  # with --precision fp32, convolutions too are in float32
    if "RANK" not in os.environ:
        return torch.device(device), 0, 1
    store, rank, processes = next(dist.rendezvous("env://"))
    # When torchrun starts all processes again after a crash, the store still has the addresses of the dead ones.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    patience = datetime.timedelta(minutes=30)  # while rank 0 draws the picture and runs the probe
    named = {"store": store, "rank": rank, "world_size": processes, "timeout": patience}
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device(device), **named)
    else:
        dist.init_process_group("gloo", **named)
    return torch.device(device), dist.get_rank(), dist.get_world_size()


def leave_processes():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        # Before PyTorch 2.8 its destructor keeps Python locked while it waits for a thread of gloo, which may wait for
        # Python to free the tensors of the last operation. Asleep, Python is not locked.
        time.sleep(0.5)
        dist.destroy_process_group()


def is_rank_0():
    return not dist.is_initialized() or dist.get_rank() == 0


def number_of_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mix_seed(*numbers):
    """One 32-bit seed from several non-negative integers, such as (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def precision_of(args, device):
    """(autocast context, GradScaler) for --precision: by default bf16 if the GPU has it, else fp16; fp32 on a CPU."""
    if args.precision is None:
        args.precision = "fp32" if device.type != "cuda" else \
            "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def no_sync(model, last):
    """Only the last micro-batch of a step averages the gradients over the processes."""
    return contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


# ------------------------------------------------------------------------------------------------ schedule, optimizer


def cosine(step, steps, warmup, peak, final=0.0, start=0.0):
    """Linear warm-up from `start` to `peak` over `warmup` steps, then half a cosine to `final` at `steps`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, weight_decay, layer_decay=1.0, no_decay=()):
    """Parameter groups for AdamW: no weight decay on 1-D parameters nor on those named in `no_decay`.

    With layer_decay, the group of layer l has lr_scale = layer_decay^(depth + 1 - l): the embedding is layer 0, block i
    is layer i + 1, what follows the blocks is layer depth + 1 (BEiT, arXiv 2106.08254). A step's learning rate is the
    schedule's times lr_scale.
    """
    depth, groups = len(getattr(model, "encoder", model).blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("encoder.")
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            layer = depth + 1
        scale = layer_decay ** (depth + 1 - layer)
        decays = parameter.ndim > 1 and name not in no_decay
        new = {"params": [], "lr_scale": scale, "weight_decay": weight_decay * decays, "decays": decays}
        group = groups.setdefault((scale, decays), new)
        group["params"].append(parameter)
    return list(groups.values())


# -------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def accuracy(model, batches, device, autocast):
    """(top-1, top-5) in percent over the batches of all processes; samples with the label -1 do not count.

    Of several clips of a video, (B, views, C, T, H, W), the logits are averaged.
    """
    hits = torch.zeros(3, device=device)  # in the first 1, in the first 5, samples
    model.eval()
    for buffer in model.buffers() if dist.is_initialized() else ():  # BatchNorm's statistics: those of the checkpoint
        dist.broadcast(buffer, 0)
    for batch in batches:
        pixels, labels, *dates = (x.to(device, non_blocking=True) for x in batch)  # dates: of SatMAE
        labels = labels[:, None]
        with autocast:
            if pixels.ndim == 6:
                logits = model(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).mean(dim=1)
            else:
                logits = model(pixels, *dates)
        correct = logits.topk(min(5, logits.shape[1])).indices == labels  # (B, 5)
        hits += torch.stack([correct[:, 0].sum(), correct.sum(), (labels >= 0).sum()])
    top1, top5, count = sum_over_processes(hits).tolist()
    return 100 * top1 / max(1, count), 100 * top5 / max(1, count)


def ridge_probe(train_features, train_labels, features, labels, penalty=1e-4):
    """Accuracy in percent of a linear classifier on frozen features: ridge regression to one-hot labels.

    features (N, D), labels (N,). Closed form, so it needs no tuning and costs no training. Features are standardised
    by the training set; `penalty` is relative to the number of training samples.
    """
    mean, std = train_features.double().mean(0), train_features.double().std(0) + 1e-6
    x, x_test = ((f.double() - mean) / std for f in (train_features, features))
    y = F.one_hot(train_labels.long()).double()
    bias = y.mean(0)
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (y - bias))
    return 100 * ((x_test @ weights + bias).argmax(1) == labels).double().mean().item()


# --------------------------------------------------------------------------------------------------- log, command line


WARM_STEPS = 5  # of a benchmark
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12,  # dense bf16, from NVIDIA's data sheets
              "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12}


class Benchmark:
    """Times the steps of the training loop after `WARM_STEPS` and prints one line of JSON.

    The floating-point operations of the matrix products and of attention, forward and backward (with its scores
    computed once more), are counted in the first step, without torch.compile. The memory is that of the device, or on a
    CPU of the whole process.
    """

    def __init__(self, args, unit):
        self.args, self.unit = args, unit
        self.counting = contextlib.ExitStack()  # open during the first step
        self.counting.enter_context(torch.compiler.set_stance("force_eager"))
        self.counter = self.counting.enter_context(FlopCounterMode(display=False))

    def step_done(self, step):
        if step == 1:
            self.counting.close()
        cuda = torch.cuda.is_available() and self.args.device != "cpu"
        if step in (WARM_STEPS, self.args.steps) and cuda:
            torch.cuda.synchronize()
        if step == WARM_STEPS:
            self.start = time.perf_counter()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        if step == self.args.steps:
            seconds = (time.perf_counter() - self.start) / self.args.benchmark
            flops = self.counter.get_total_flops() * number_of_processes()
            device = torch.cuda.get_device_name() if cuda and self.args.precision != "fp32" else ""
            peak = PEAK_FLOPS.get(device, 0) * number_of_processes()
            if cuda:
                memory = torch.cuda.max_memory_allocated()
            else:
                import resource  # not on Windows; in KiB, on macOS in bytes
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            if is_rank_0():
                print(json.dumps({
                    f"{self.unit}_per_second": round(self.args.batch_size / seconds, 2),
                    "ms_per_step": round(1000 * seconds, 2), "gflop_per_step": round(flops / 1e9, 3),
                    "mfu": round(flops / seconds / peak, 3) if peak else None,
                    "peak_memory_gib": round(memory / 2 ** 30, 2), "precision": self.args.precision,
                    "compile": self.args.compile, "processes": number_of_processes()}))


class Log:
    """Of a training loop: a progress bar, a line per record in DIR/log.jsonl, TensorBoard if installed; rank 0 only.

    And the signals that end a run early: until `close`, SIGINT and SIGTERM are only noted, in `stopping`, so that the
    loop can save first. A second SIGINT ends the process at once.
    """

    def __init__(self, args, first_step, unit):
        self.step = self.step_at_mark = first_step
        self.unit, self.args, self.time = unit, args, time.perf_counter()
        self.losses = []  # of all passes since the last mean_loss(); on the device, so that no step waits for the GPU
        self.signal = self.stopping = 0
        self.old_handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(initial=first_step, total=args.steps, unit="step", disable=not is_rank_0(),
                        mininterval=0.1 if sys.stderr.isatty() else 30)
        self.file, self.board = Path(args.out, "log.jsonl"), None
        if args.benchmark:
            self.benchmark = Benchmark(args, unit)
        elif is_rank_0():
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(Path(args.out, "tensorboard"), purge_step=first_step)

    def note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def lines(self):
        """The records of the run so far."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def step_done(self):
        """Count a step: is the log `due`, is it `saving`, and `stopping`, by a signal to any of the processes?"""
        self.step += 1
        self.bar.update()
        stopping = torch.tensor(self.signal)  # on the CPU, so no GPU is waited for
        if dist.is_initialized():
            dist.all_reduce(stopping, dist.ReduceOp.MAX)
        self.stopping = int(stopping)
        self.saving = self.stopping or self.step % self.args.save_every == 0 or self.step == self.args.steps
        self.due = self.saving or self.step % self.args.log_every == 0
        if self.args.benchmark:
            self.benchmark.step_done(self.step)
            if self.stopping or self.step == self.args.steps:
                self.leave()

    def mean_loss(self, lr, scaler):
        """The mean, over all processes, of the losses since the last call; a UserError if one is not finite.

        In fp16 such steps were skipped and do not count, unless the scale has fallen so low that it cannot help.
        """
        losses, self.losses = sum_over_processes(torch.stack(self.losses).float()) / number_of_processes(), []
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad) and not (scaler.is_enabled() and scaler.get_scale() >= 1):
            step = self.step - (len(losses) - 1 - int(bad[0])) // self.args.accumulate
            raise UserError(f"the loss of step {step} is not finite, at a learning rate of about {lr:.2g}: "
                            "lower --base-lr, or use --precision bf16 or fp32")
        return losses[losses.isfinite()].mean().item()

    def write(self, **values):
        """Record numbers at this step, with the speed since the last record in samples per second."""
        now = time.perf_counter()
        speed = (self.step - self.step_at_mark) * self.args.batch_size / (now - self.time)
        values[f"{self.unit}_per_second"] = round(speed, 1)
        self.step_at_mark, self.time = self.step, now
        if is_rank_0():
            self.bar.set_postfix({name.replace("_per_second", "/s"): f"{value:.4g}" for name, value in values.items()})
            size = self.file.stat().st_size
            record = {name: value if math.isfinite(value) else None for name, value in values.items()}  # NaN is no JSON
            try:
                with open(self.file, "a") as file:
                    file.write(json.dumps({"step": self.step, **record}) + "\n")
            except OSError as error:
                os.truncate(self.file, size)  # no half line
                raise UserError(f"{self.file} could not be written ({error.strerror})") from None
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, self.step)

    def save_or_leave(self, model, optimizer, scaler):
        """At the end of a step: save the run where it is due, and end it after a signal."""
        if self.saving:
            save_run(self.args, settings_of(self.args), self.step, model, optimizer, scaler)
        if self.stopping:
            self.leave()

    def close(self):
        self.bar.close()
        if self.board:
            self.board.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def leave(self):
        """End all processes, after a signal with the exit code that a shell gives it."""
        self.close()
        if self.args.benchmark:
            self.benchmark.counting.close()
        barrier()  # rank 0 has saved
        if is_rank_0() and self.stopping and not self.args.benchmark:
            print(f"stopped at step {self.step} by {signal.Signals(self.stopping).name}; the same command, without "
                  f"--fresh, goes on from {self.args.out}/last.pt", file=sys.stderr)
        leave_processes()
        sys.exit(128 + self.stopping if self.stopping else 0)


def save_pictures(columns, out, name):
    """Write columns of pictures (rows, C, H, W) in [0, 1] side by side to DIR/`name`, enlarged to about 224 pixels."""
    columns = [x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1) for x in columns]
    columns = [F.interpolate(x.clamp(0, 1), scale_factor=max(1, 224 // x.shape[-1])) for x in columns]
    make_folder(out)
    picture = make_grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns), padding=4, pad_value=1.0)
    save_image(picture, Path(out, name))
    print(f"picture {Path(out, name)}")


def size_in_pixels(text):
    """'224' -> 224, '192x256' -> (192, 256): height x width."""
    numbers = tuple(int(number) for number in text.lower().split("x"))
    if len(numbers) > 2:
        raise ValueError(text)
    return numbers if len(numbers) == 2 else numbers[0]


FLAGS = {  # of all three scripts: type (a list names the choices), help
    "data": (str, "folder of images or videos, list of paths, or cifar10 (default: what ships with scikit-image)"),
    "recipe": (["paper", "demo"], "default values of the other flags (default: paper with --data, else demo)"),
    "init": (str, "checkpoint to start from, of this project or published"),
    "out": (str, "folder of the run"),
    "fresh": (bool, "start over in --out instead of going on with the run in it (default: no)"),
    "device": (["cuda", "cpu", "mps"], "where to compute (default: the best there is)"),
    "precision": (["bf16", "fp16", "fp32"], "of the matrix products (default: bf16 or fp16 on CUDA, else fp32)"),
    "compile": (bool, "use torch.compile (default: yes on CUDA)"),
    "workers": (int, "data loading processes per GPU (default: the CPU cores, 16 at most)"),
    "seed": (int, "of everything random (default: 0)"),
    "benchmark": (int, "only time so many training steps, on random tensors, and print a line of JSON"),
    "log_every": (int, "steps between two lines of log.jsonl (default: 50, in the demo 20)"),
    "save_every": (int, "steps between two checkpoints (default: 1000, in the demo 300)"),
    "size": (list(SIZES), "of the encoder"),
    "image_size": (size_in_pixels, "pixels, a number or HEIGHTxWIDTH"),
    "patch_size": (int, "side of a patch, pixels"),
    "channels": (int, "of the images (default: 3)"),
    "mean": (float, "of each channel, in [0, 1] (default: ImageNet's, or measured if there are not 3 channels)"),
    "std": (float, "standard deviation of each channel, likewise"),
    "measure": (bool, "measure --mean and --std on 1,000 training images (default: no)"),
    "steps": (int, "length of the training, optimizer steps"),
    "epochs": (float, "length of the training, passes over the data (if --steps is not given)"),
    "batch_size": (int, "global batch: samples per optimizer step on all GPUs together"),
    "accumulate": (int, "split the batch of each GPU into this many passes, to save memory (default: 1)"),
    "base_lr": (float, "learning rate per 256 samples of the global batch"),
    "warmup": (float, "share of the steps in which the learning rate rises"),
    "weight_decay": (float, "of AdamW"),
    "clip_grad": (float, "largest L2 norm of the gradient (default: no limit)"),
}
TASK_FLAGS = {  # of those tasks, in any of the scripts, whose recipes name them
    "frames": (int, "of a clip; 1 means images, except in vjepa.py"),
    "tubelet": (int, "frames that one token spans"),
    "stride": (int, "frames of a video from one frame of the clip to the next"),
    "min_lr": (float, "learning rate at the end of the schedule"),
    "flip": (bool, "mirror half of the training samples (never with --label motion)"),
    "label": (["photograph", "motion"], "what to classify in the built-in clips"),
    "layer_decay": (float, "factor on the learning rate from one block to the block below"),
    "drop_path": (float, "chance to skip a branch of the last block; rises linearly from the first"),
    "randaugment": (float, "magnitude of RandAugment, 0 to 10"),
    "erasing": (float, "probability of random erasing"),
    "mixup": (float, "alpha of MixUp"),
    "cutmix": (float, "alpha of CutMix"),
    "smoothing": (float, "label smoothing"),
    "eval_only": (bool, "only test the classifier in --init"),
}


def parse_command_line(method, description, recipes, flags):
    """Read `method.py [task] [flags]`. recipes: {task: {flag: (paper's value, demo's value)}}, where a dictionary gives
    the value by model size, or for "image" and "video"; flags: the method's own, as in FLAGS. What --init holds about
    the model comes before the recipe, and a flag before both.
    """
    used = set().union(*recipes.values())
    flags = {**FLAGS, **{name: flag for name, flag in TASK_FLAGS.items() if name in used}, **flags}
    parser = argparse.ArgumentParser(f"{method}.py", usage="%(prog)s [task] [flags]", description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("task", nargs="?", default="pretrain", choices=recipes, help="(default: pretrain)")
    for name, (kind, text) in flags.items():
        options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"choices": kind} \
            if isinstance(kind, list) else {"type": kind, "metavar": kind.__name__.upper()}
        if name in ("mean", "std"):
            options["nargs"] = "+"
        defaults = "; ".join(f"{task} {recipe[name][0]}, {recipe[name][1]}"
                             for task, recipe in recipes.items() if name in recipe)
        text += f" (paper, demo: {defaults})" if defaults else ""
        parser.add_argument("--" + name.replace("_", "-"), help=text.replace("%", "%%"), **options)
    args = parser.parse_args()
    for name, value in vars(args).items():
        if name in flags and value is not None:
            written = f"--{name.replace('_', '-')}"
            least = 1 if flags[name][0] is int and name not in ("seed", "workers") or name == "stretch" else 0
            most = 10 if name == "randaugment" else 1 if name in (
                "mask_ratio", "warmup", "drop_path", "erasing", "smoothing", "momentum", "start_lr",
                "probe_labels") else math.inf
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise UserError(f"{written} {value} is not a number from {least} to {most}")
            if name not in FLAGS and name not in recipes[args.task]:
                raise UserError(f"{args.task} does not use {written}")

    if not args.init and (args.task == "show" or args.eval_only):
        raise UserError(f"{args.task}{' --eval-only' * bool(args.eval_only)} needs --init, a checkpoint")
    if args.benchmark:
        if args.task != "pretrain":
            raise UserError("--benchmark is for pretrain")
        args.steps = WARM_STEPS + args.benchmark
        args.log_every = args.save_every = args.probe_every = sys.maxsize
    demo = (args.recipe or ("paper" if args.data else "demo")) == "demo"
    values = {"seed": 0, "channels": 3, "accumulate": 1, "fresh": False, "measure": False,
              "log_every": 20 if demo else 50, "save_every": 300 if demo else 1000,
              "out": f"runs/{method}" + (f"-{args.task}" if args.task != "pretrain" else "")}
    if args.steps is None and args.epochs is not None:
        values["steps"] = None
    if args.init:
        weights, settings = read_weights(args.init)
        model = describe(weights, settings, args.init)
        for name in ("size", "patch_size", "channels", "tubelet"):
            if getattr(args, name, None) not in (None, model[name]):
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} does not fit {args.init}, "
                                f"which has {model[name]}")
        values |= {name: model[name] for name in ("size", "patch_size", "channels", "image_size", "frames", "tubelet")}
        if args.eval_only:
            values["pool"] = model["pool"]
        kept = ["mean", "std", "norm_pix_loss", "decoder_dim", "decoder_depth", "decoder_heads", "target", "cell",
                "stride", "predictor_dim", "predictor_depth", "encode_mask_tokens", "bands", "dates", "consistent"]
        if args.task == "show" or "predictor.predictor_embed.weight" in weights:
            kept += ["masking", "mask_ratio", "mask_group", "context_frames"]  # the masks that it was trained with
        # Settings leave out what is None. A published file has none: there the paper's values hold.
        values |= {name: settings.get(name) for name in kept
                   if settings and (name in FLAGS or name in recipes[args.task])
                   and (name in settings or name == "context_frames")}
        if not settings:
            values |= {name: recipes[args.task][name][0] for name in kept if name in recipes[args.task]}
    size = args.size or values.get("size") or recipes[args.task]["size"][demo]
    video = (getattr(args, "frames", None) or values.get("frames", 1)) > 1
    for name, recipe in recipes[args.task].items():
        values.setdefault(name, recipe[demo])
    for name, value in values.items():
        while isinstance(value, dict):
            value = value["video" if video else "image"] if "image" in value else value.get(size, value["base"])
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    return args


def run_main(main):
    """Run a script's `main`; what the user got wrong is one sentence on stderr and exit code 2."""
    try:
        main()
        leave_processes()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # where rank 0 says the same, torchrun ends the others before they repeat it
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
