"""What the three methods share: the blocks of a Vision Transformer, and the plumbing of a run.

The first part is the model (Dosovitskiy et al. 2021, arXiv 2010.11929). Its parameters carry the names of timm and of
the published MAE code, so that weights travel both ways. The rest has nothing to teach about any method: weights,
processes, schedule, the run with its log and checkpoints, the supervised loop, the command line.

Shapes: B images in the batch, L patches of one image, N tokens in a sequence, D the width of a token, C channels,
P the side of a patch in pixels, T frames of a clip.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import signal
import sys
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
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
    patches = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, H/P, P, W/P, P)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, patch_size, grid):
    """The inverse of `patchify`: (B, L, P*P*C) -> (B, C, H, W), where grid = (H/P, W/P)."""
    images = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)  # (B, H/P, W/P, P, P, C)
    return images.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


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


def sincos(dim, grid):
    """Position table (L, dim) of a grid ([times,] rows, columns): each axis gets an equal share of the vector, rounded
    up to an even number, and all is cut to dim. As in the published code, an image's table begins with the *column*
    (MAE), a clip's with the time (V-JEPA, "uniform_power").
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    axes = axes[::-1] if len(grid) == 2 else axes
    width = 2 * math.ceil(dim / 2 / len(grid))
    return torch.cat([sincos_1d(width, axis.flatten()) for axis in axes], dim=1)[:, :dim].float()


def resize_positions(table, old_grid, new_grid):
    """Interpolate a position table (1, [1 +] L, D) to another grid, ([times,] rows, columns): bicubic in space, linear
    in time. The class token's row, if there is one, stays as it is.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    extra, table = table.split([table.shape[1] - math.prod(old_grid), math.prod(old_grid)], dim=1)
    table = table.reshape(-1, *old_grid[-2:], table.shape[-1]).permute(0, 3, 1, 2)  # (times, D, rows, columns)
    table = F.interpolate(table, size=tuple(new_grid[-2:]), mode="bicubic")
    if len(old_grid) == 3:
        by_place = F.interpolate(table.permute(2, 3, 1, 0).flatten(0, 1), size=new_grid[0], mode="linear")
        table = by_place.unflatten(0, tuple(new_grid[-2:])).permute(3, 2, 0, 1)
    return torch.cat([extra, table.permute(0, 2, 3, 1).reshape(1, -1, table.shape[1])], dim=1)


class PatchEmbed(nn.Module):
    """Linear projection of patches, or of tubelets: (B, C, [T,] H, W) -> (B, L, D), in raster order, time first."""

    def __init__(self, patch_size, channels, dim, frames=1, tubelet=1):
        super().__init__()
        conv, kernel = (nn.Conv3d, (tubelet, patch_size, patch_size)) if frames > 1 else (nn.Conv2d, patch_size)
        self.proj = conv(channels, dim, kernel_size=kernel, stride=kernel)

    def forward(self, pixels):
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D): self-attention, then two linear layers with a GELU between.

    drop_path: the chance that a sample skips a branch (stochastic depth).
    """

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        if dim % heads:
            raise UserError(f"a width of {dim} is not a multiple of {heads} attention heads")
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.checkpointing = False  # True: activations are computed again in the backward pass instead of kept

    def forward(self, x):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.residual, x, use_reentrant=False, preserve_rng_state=self.drop_path.p > 0)
        return self.residual(x)

    def residual(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        x = x + self.drop_path(self.attn["proj"](attended))
        return x + self.drop_path(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


def compile_blocks(model):
    """Use torch.compile for each block by itself: alike blocks share a graph, which takes seconds and not minutes."""
    for block in model.modules():
        if isinstance(block, Block):
            block.compile()  # and not block.forward = ..., which a copy of the block would still run with these weights


def use_checkpointing(model):
    """Let all blocks keep no activations for the backward pass, but compute them again there."""
    for block in model.modules():
        if isinstance(block, Block):
            block.checkpointing = True
    if torch.__version__ < (2, 13):  # DDP's splitting of a compiled graph refuses checkpoints (pytorch issue 104674)
        torch._dynamo.config.optimize_ddp = False


class ViT(nn.Module):
    """Vision Transformer: the encoder of all three methods, and the classifier that fine-tuning makes of it.

    size: a key of SIZES; image_size: an int or (H, W), pixels; frames > 1: a token spans `tubelet` frames of a clip.
    class_token: there is one, before the patches; learned_positions: else they are the fixed sine-cosine table.
    pool: "class" (`norm`, then the class token, or if there is none the mean of the patch tokens) or "mean" (the mean
    of the patch tokens, then `fc_norm`). num_classes: 0 returns these features (B, D), else logits (B, num_classes).
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
        table = F.pad(sincos(dim, self.grid), (0, 0, int(class_token), 0))[None]  # zeros for the class token
        self.pos_embed = nn.Parameter(table, requires_grad=learned_positions)
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path * i / (depth - 1)) for i in range(depth))
        self.norm = nn.Identity() if pool == "mean" else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

        initialise(self)
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
        """The ViT in a checkpoint of ours or a published one; a UserError if the file does not fit.

        The architecture is read off the file; `changes` overrides what a ViT takes, for instance num_classes=10,
        pool="mean" or image_size=(192, 256). Positions are interpolated to another size; a head, and the norm before
        it, start anew where the file has none that fits.
        """
        weights, settings = read_weights(path)
        old, weights = describe(weights, settings, path), encoder_of(weights)
        vit = cls(**{**old, **changes})
        own, after_blocks = vit.state_dict(), ("norm.", "fc_norm.", "head.")
        old_grid = grid_of(old["image_size"], old["patch_size"], old["frames"], old["tubelet"])
        weights["pos_embed"] = resize_positions(weights["pos_embed"], old_grid, vit.grid)
        for name, new in own.items():
            if name.startswith(after_blocks) and (name not in weights or weights[name].shape != new.shape):
                weights[name] = new
        # A checkpoint of a whole method holds more than its encoder; everything that the encoder has must be there.
        extra = ("decoder", "mask_token", "encoder_mask_token", "pred_head.", *after_blocks)
        load_strictly(vit, {k: w for k, w in weights.items() if k in own or not k.startswith(extra)}, path)
        return vit


def initialise(module):
    """Linear layers and convolutions: truncated normal of deviation 0.02, zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


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
    """Something that the user gave is wrong: `run_main` prints the sentence and exits with 2."""


NETWORKS = ("encoder", "predictor", "target_encoder", "classifier")  # a published V-JEPA has a dictionary for each


def read_checkpoint(path):
    """The dictionary in a checkpoint file. Only tensors and plain values are read: nothing in the file is executed."""
    try:
        if Path(path).suffix == ".safetensors":  # of the model hubs
            from safetensors.torch import load_file
            return {"model": load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold their arguments in one
            found = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load leaves the check sums aside
            raise ValueError("a wrong check sum")
    except (FileNotFoundError, PermissionError, MemoryError) as error:
        raise UserError(f"there is no checkpoint {path} that can be read: {error}") from None
    except ImportError:
        raise UserError(f"to read {path}, install safetensors (pip install safetensors)") from None
    except Exception:  # a damaged file makes the reader fail in many ways
        raise UserError(f"{path} is broken or is not a checkpoint of tensors and plain values") from None
    tables = [found, *(found.get(name, {}) for name in ("model", "model_state", *NETWORKS))] if isinstance(
        found, dict) else [found]
    if not all(isinstance(table, dict) and all(isinstance(name, str) for name in table) for table in tables):
        raise UserError(f"{path} holds no weights by name")
    return found


def read_weights(path):
    """(weights by name, settings of the run or {}) of a checkpoint of ours or a published one."""
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("model", checkpoint.get("model_state", checkpoint))  # ours and MAE's, MaskFeat's
    if any(network in checkpoint for network in NETWORKS):
        weights = {f"{part}.{name}": w for part in NETWORKS for name, w in checkpoint.get(part, {}).items()}
    named = {}
    for name, weight in weights.items():
        name = name.replace("_orig_mod.", "")  # torch.compile
        name = name.replace("module.", "").replace("backbone.", "")  # V-JEPA
        name = name.replace("head.transforms.0.0.", "head.0.").replace("head.projections.0.", "head.1.")  # MaskFeat
        if torch.is_tensor(weight) and not name.startswith("hogs."):  # fixed filters of the published MaskFeat
            named[name] = weight
    return named, checkpoint.get("settings", {})


def encoder_of(weights):
    """The weights of the encoder alone: of a V-JEPA its y-encoder, of a probe the encoder under it."""
    prefix = next((p for p in ("target_encoder.", "encoder.") if any(name.startswith(p) for name in weights)), "")
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def describe(weights, settings, path):
    """The arguments of the ViT that `weights` belong to, read off names and shapes (settings: see `read_weights`).

    A file of clips without settings is taken for one of 16 frames, as the published ones are.
    """
    try:
        weights = encoder_of(weights)
        groups = [w for name, w in weights.items() if name.startswith("patch_embed.") and name.endswith("proj.weight")]
        dim, channels, *tubelet, _, patch_size = groups[0].shape  # a tubelet if it is video
        channels = settings.get("channels") or sum(group.shape[1] for group in groups)  # groups of bands: SatMAE
        frames, tubelet = (settings.get("frames", 16), tubelet[0]) if tubelet else (1, 1)
        class_token = "cls_token" in weights
        patches = (weights["pos_embed"].shape[1] - class_token) // (frames // tubelet)  # of one time step
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        size = next(size for size, (width, blocks, _) in SIZES.items() if (width, blocks) == (dim, depth))
    except (KeyError, IndexError, AttributeError, ValueError, StopIteration):
        if "pos_embed" not in weights and "blocks.0.norm1.weight" in weights:
            raise UserError(f"{path} has rotary positions (no pos_embed), as V-JEPA 2 has: only V-JEPA (1) is read "
                            "here") from None
        needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight")
        lacks = "".join(f"lacks {name} and " for name in needed if name not in weights)
        raise UserError(f"{path} is not a checkpoint of a Vision Transformer of a size known here: it {lacks}has "
                        f"{', '.join(list(weights)[:3]) or 'no weights'}") from None
    return {"size": size, "image_size": settings.get("image_size") or patch_size * math.isqrt(patches),
            "patch_size": patch_size, "channels": channels, "frames": frames, "tubelet": tubelet,
            "class_token": class_token, "pool": "mean" if "fc_norm.weight" in weights else "class",
            "num_classes": len(weights.get("head.weight", ()))}


def load_strictly(model, weights, path):
    """Load every parameter, or raise a UserError that names the first ones that do not fit."""
    own = model.state_dict()
    faults = {"lacks": [name for name in own if name not in weights],
              "has the unexpected": [name for name in weights if name not in own],
              "has another shape for": [n for n in own if n in weights and weights[n].shape != own[n].shape]}
    if any(faults.values()):
        raise UserError(f"{path} does not fit this model: it " + "; it ".join(
            f"{fault} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            for fault, names in faults.items() if names))
    model.load_state_dict(weights)


def load_model(model, args, new):
    """Load --init into a whole model, strictly, but for position tables of another size: learned ones are interpolated.

    new: how the names of parts begin that an encoder alone lacks. They start anew, and a line says so.
    """
    weights, settings = read_weights(args.init)
    own, encoder = model.state_dict(), encoder_of(weights)
    if not any(name.startswith(new[0]) for name in weights):
        if args.task == "show":
            raise UserError(f"{args.init} holds an encoder alone: show needs a whole model, such as last.pt")
        if args.rank == 0:
            print(f"{args.init} holds an encoder alone: the rest of the model starts anew")
        weights = {name: weight for name, weight in own.items() if name.startswith(new)}
        in_file = {name: name.removeprefix("target_").removeprefix("encoder.") for name in own}
        weights |= {name: own[name] for name in own if name.startswith("norm.")}  # which a MaskFeat lacks
        weights |= {name: encoder[key] for name, key in in_file.items() if key in encoder and not name.startswith(new)}
    old = describe(weights, settings, args.init)
    old_grid = grid_of(old["image_size"], old["patch_size"], old["frames"], old["tubelet"])
    for name, table in model.named_parameters():
        if name.endswith("pos_embed") and name in weights and weights[name].shape != table.shape:
            weights[name] = resize_positions(weights[name], old_grid, model.grid) if table.requires_grad else table
    load_strictly(model, weights, args.init)


# -------------------------------------------------------------------------------- processes, seeds, schedule, optimizer


def join_processes(args):
    """Join the other processes of torchrun, if there are any: the device of this one; args get `rank`, `processes`."""
    torch.backends.cudnn.allow_tf32 = False  # with --precision fp32, convolutions too are in float32
    if "RANK" in os.environ and args.device == "mps":
        raise UserError("torchrun is for --device cuda or cpu, not mps")
    args.rank, args.processes, device = 0, 1, torch.device(args.device)
    if "RANK" in os.environ:
        store, args.rank, args.processes = next(dist.rendezvous("env://"))
        # When torchrun starts all processes again after a crash, the store still has the addresses of the dead ones.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        if args.device != "cpu":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend, of_gpu = ("gloo", None) if args.device == "cpu" else ("cpu:gloo,cuda:nccl", device)
        dist.init_process_group(backend, store=store, rank=args.rank, world_size=args.processes, device_id=of_gpu,
                                timeout=datetime.timedelta(minutes=30))  # for one process to draw the picture
    return device


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


BUILT_IN_SEED, EPOCH_SEED, AUGMENTATION_SEED, MASK_SEED, BLOCK_SEED, STEP_SEED, PICTURE_SEED = range(7)  # purposes


def derive_seed(seed, purpose, *numbers):
    """A 64-bit seed for one purpose, such as (seed, MASK_SEED, step): the draws of different purposes are independent.

    By numpy's spawn_key, which tells (1,) from (1, 0); its entropy does not, since that is padded with zeros.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


def precision_of(args):
    """(autocast context, GradScaler) for --precision; only fp16 needs the scaler."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    autocast = torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)


def no_sync(model, last):
    """Only the last micro-batch of a step averages the gradients over the processes."""
    return contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()


def cosine(step, steps, warmup, peak, final=0.0, start=0.0):
    """Linear warm-up from `start` to `peak` over `warmup` steps, then half a cosine to `final` at `steps`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, weight_decay, layer_decay=1.0, no_decay=()):
    """Parameter groups for the optimizer: no weight decay on 1-D parameters nor on those named in `no_decay`.

    The learning rate of layer l is the schedule's times lr_scale = layer_decay^(depth + 1 - l): the embedding is layer
    0, block i is layer i + 1, what follows the blocks is layer depth + 1 (BEiT, arXiv 2106.08254).
    """
    depth, groups = len(getattr(model, "encoder", model).blocks), {}
    for name, parameter in model.named_parameters():
        name, layer = name.removeprefix("encoder."), depth + 1
        if name.startswith(("patch_embed", "cls_token", "pos_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        if parameter.requires_grad:
            key = layer_decay ** (depth + 1 - layer), parameter.ndim > 1 and name not in no_decay
            groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr_scale": scale, "decays": decays, "weight_decay": weight_decay * decays}
            for (scale, decays), parameters in groups.items()]


# ------------------------------------------------------------------------------------------------------ a training run

WARM_STEPS = 5  # of a benchmark
PEAK_FLOPS = {  # dense bf16, from NVIDIA's data sheets
    "NVIDIA B200": 2250e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12,
    **dict.fromkeys(["NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe",
                     "NVIDIA A100-PCIE-40GB"], 312e12)}


class Run:
    """A training run: it goes on from the last checkpoint in --out, or starts there.

    The loop begins at `step`, appends the loss of each micro-batch to `losses` and calls `step_done` after each step,
    `close` after all. That makes the progress bar, a line per record in DIR/log.jsonl, TensorBoard's files if it is
    installed, and the checkpoints. Until `close`, SIGINT and SIGTERM are only noted, so that the step can be finished
    and saved; a second SIGINT ends the process at once. With --benchmark nothing is read or written: see `time_step`.
    """

    def __init__(self, args, model, optimizer, scaler, classes=None):
        self.classes = classes  # of a classifier, in the order of its outputs
        self.args, self.model, self.optimizer, self.scaler = args, model, optimizer, scaler
        self.file, self.unit = Path(args.out, "log.jsonl"), "clips" if getattr(args, "frames", 1) > 1 else "images"
        self.losses = []  # since the last record; on the device, so that no step waits for the GPU
        self.settings = {name: getattr(args, name) for name in args.settings}
        if args.data and args.data != "cifar10":
            self.settings["data"] = str(Path(args.data).resolve())
        self.best, self.score, self.signal, self.board = -math.inf, "score", 0, None
        self.step = 0 if args.benchmark else self.resume()
        self.time, self.step_at_time = time.perf_counter(), self.step
        self.opened = contextlib.ExitStack()  # what `close` ends
        for number in (signal.SIGINT, signal.SIGTERM):
            self.opened.callback(signal.signal, number, signal.signal(number, self.note))  # gives it back
        self.bar = self.opened.enter_context(tqdm(
            initial=self.step, total=args.steps, unit="step", disable=args.rank > 0,
            mininterval=0.1 if sys.stderr.isatty() else 30))
        if args.benchmark:
            self.counting = self.opened.enter_context(contextlib.ExitStack())  # open during the first step
            self.counting.enter_context(torch.compiler.set_stance("force_eager"))
            self.counter = self.counting.enter_context(FlopCounterMode(display=False))
        elif args.rank == 0:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(Path(args.out, "tensorboard"), purge_step=self.step)
                self.opened.callback(self.board.close)

    def note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def close(self):
        self.opened.close()
        if self.args.rank == 0 and self.step == self.args.steps and not self.args.benchmark:
            best = f", of the highest {self.score} {self.args.out}/best.pt" if self.best > -math.inf else ""
            print(f"checkpoint {self.args.out}/last.pt{best}, log {self.file}")

    def resume(self):
        """Go on with the run in --out, if there is one: the number of steps that it has done.

        A broken last.pt becomes last.broken.pt, and previous.pt is used. Other settings than now are a UserError.
        """
        args, out, step, broken = self.args, Path(self.args.out), 0, None
        fresh = args.fresh and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"  # not again after a crash
        found = [path for path in (out / "last.pt", out / "previous.pt") if path.exists() and not fresh]
        if found:
            try:
                checkpoint = read_checkpoint(found[0])
            except UserError as error:
                broken, *found = found
                if not found:
                    raise UserError(f"{error}, and there is no other to go on from: --fresh starts over") from None
                if args.rank == 0:
                    print(f"{error}: going on from {found[0]}", file=sys.stderr)
                checkpoint = read_checkpoint(found[0])
            old, new = args.defaults | checkpoint.get("settings", {}), self.settings
            changed = [f"{name} {old.get(name)} there, {new.get(name)} now" for name in {**old, **new}
                       if old.get(name) != new.get(name)]
            if changed:
                raise UserError(f"{out} holds a run with other settings ({'; '.join(changed[:5])}): "
                                "give another --out, or --fresh to start over")
            if checkpoint.get("classes", self.classes) != self.classes:
                raise UserError(f"{out} holds a classifier of other classes: give another --out, or --fresh to start over")
            load_strictly(self.model, checkpoint["model"], found[0])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:  # it is empty unless the run was in fp16
                self.scaler.load_state_dict(checkpoint["scaler"])
            step, self.best, before = checkpoint["step"], checkpoint["best"], checkpoint["processes"]
            if before != args.processes and args.rank == 0:
                print(f"so far {before} processes made this run, now {args.processes}: sums round differently, and "
                      "drop path, MixUp and CutMix are drawn by process", file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        if sum_over_processes(torch.tensor(step)) != step * args.processes:
            raise UserError(f"not all processes see the same {out}/last.pt: --out must be on a disk that they share")
        if args.rank == 0:
            for path in list(out.glob("*.pt")) if fresh else []:
                if not path.name.endswith(".old.pt"):
                    os.replace(path, path.with_suffix(".old.pt"))
            if broken:
                os.replace(broken, out / "last.broken.pt")
            lines = self.file.read_text(errors="replace").splitlines(True) if self.file.exists() else []
            steps = [step_of(line) for line in lines]
            kept = [line for line, at in zip(lines, steps) if at is not None and at <= step]  # others are written anew
            if None in steps:
                print(f"{self.file}: {steps.count(None)} damaged lines are dropped", file=sys.stderr)
            write_whole(self.file, lambda file: file.write("".join(kept).encode()))
            print(f"step {step} of {args.steps} in {out}; "
                  + ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None))
        return step

    def step_done(self, lr, found=None, **values):
        """The end of a step: counts it, logs and saves where that is due, and ends the run after a signal.

        values: numbers for the log. found: results of a test at this step, logged at once; if its "score_..." is the
        highest so far, the checkpoint is best.pt too. It is None in all processes or in none: logging is collective.
        """
        args, self.step = self.args, self.step + 1
        self.bar.update()
        stop = torch.tensor(self.signal)  # on the CPU, so no GPU is waited for
        if dist.is_initialized():
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        stop, last = int(stop), self.step == args.steps
        if args.benchmark:
            self.time_step()
        else:
            saving = stop or last or self.step % args.save_every == 0
            if saving or found is not None or self.step % args.log_every == 0:
                values |= found or {}
                self.log(lr=lr, **values)
                for name, value in values.items():
                    if name.startswith("score") and value > self.best:
                        self.best, self.score = value, name
                        self.save("best.pt")
            if saving:
                self.save("last.pt")
            if args.keep_every and self.step % args.keep_every == 0:
                self.save(f"step-{self.step:05}.pt")
        if stop or (last and args.benchmark):
            self.close()
            sum_over_processes(torch.zeros(1))  # all wait until rank 0 is ready
            if args.rank == 0 and stop and not args.benchmark:
                print(f"stopped at step {self.step} by {signal.Signals(stop).name}; the same command, without --fresh, "
                      f"goes on from {args.out}/last.pt", file=sys.stderr)
            sys.exit(128 + stop if stop else 0)  # after a signal the exit code that a shell gives it

    def log(self, lr, **values):
        """Record at this step some numbers, and since the last record the mean loss and the samples per second, with
        the time of tests and of saving.

        A UserError if the loss of a step is not finite. In fp16 such steps were skipped and do not count, unless the
        scale has fallen so low that it cannot help.
        """
        losses, self.losses = sum_over_processes(torch.stack(self.losses).float()) / self.args.processes, []
        bad = (~losses.isfinite()).nonzero().flatten()
        if len(bad) and not (self.scaler.is_enabled() and self.scaler.get_scale() >= 1):
            step = self.step - (len(losses) - 1 - int(bad[0])) // self.args.accumulate
            raise UserError(f"the loss of step {step} is not finite, at a learning rate of about {lr:.2g}: "
                            "lower --base-lr, or use --precision bf16 or fp32")
        now = time.perf_counter()
        speed = (self.step - self.step_at_time) * self.args.batch_size / (now - self.time)
        values = {"loss": losses[losses.isfinite()].mean().item(), "lr": lr, **values,
                  f"{self.unit}_per_second": round(speed, 1)}
        self.step_at_time, self.time = self.step, now
        if self.args.rank == 0:
            self.bar.set_postfix({name.replace("_per_second", "/s"): f"{value:.4g}" for name, value in values.items()})
            record = {name: value if math.isfinite(value) else None for name, value in values.items()}  # NaN is no JSON
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": self.step, **record}) + "\n")
            for name, value in values.items() if self.board else ():
                self.board.add_scalar(name, value, self.step)

    def save(self, name):
        """Rank 0 writes the checkpoint DIR/`name`; but for best.pt all call this, and all get its UserError."""
        failure, weights = None, self.model.state_dict()
        if self.args.rank == 0:
            checkpoint = {"settings": self.settings, "classes": self.classes, "step": self.step, "best": self.best, "model": weights,
                          "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                          "processes": self.args.processes}
            try:
                if not torch.stack([weight.isfinite().all() for weight in weights.values()]).all():
                    raise UserError(f"step {self.step} made weights that are not finite, so they are not saved: "
                                    "lower --base-lr")
                write_whole(Path(self.args.out, name), lambda file: torch.save(checkpoint, file))
            except UserError as error:
                failure = error
        failed = failure is not None
        if name != "best.pt":  # when that is due only rank 0 knows: scores may differ in the last digit between GPUs
            failed = sum_over_processes(torch.tensor(int(failed)))
        if failed:
            raise failure or UserError("rank 0 could not save the run")

    def time_step(self):
        """With --benchmark: time the steps after WARM_STEPS and print one line of JSON.

        The operations of matrix products and, on a GPU, of attention are counted in the first step, forward and
        backward, without torch.compile (torch's counter does not know the CPU's attention). The memory is that of the
        device, or on a CPU of the whole process.
        """
        args, cuda = self.args, self.args.device == "cuda"
        if self.step == 1:
            self.counting.close()
        if self.step in (WARM_STEPS, args.steps):
            torch.get_device_module(args.device).synchronize()
        if self.step == WARM_STEPS:
            self.time = time.perf_counter()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        if self.step == args.steps and args.rank == 0:
            seconds = (time.perf_counter() - self.time) / args.benchmark
            flops = self.counter.get_total_flops() * args.processes
            device = torch.cuda.get_device_name() if cuda and args.precision != "fp32" else ""
            peak = PEAK_FLOPS.get(device, 0) * args.processes
            if cuda:
                memory = torch.cuda.max_memory_allocated()
            else:
                import resource  # not on Windows; in KiB, on macOS in bytes
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            print(json.dumps({
                f"{self.unit}_per_second": round(args.batch_size / seconds, 2), "ms_per_step": round(1000 * seconds, 2),
                "gflop_per_step": round(flops / 1e9, 3), "mfu": round(flops / seconds / peak, 3) if peak else None,
                "peak_memory_gib": round(memory / 2 ** 30, 2), "precision": args.precision, "compile": args.compile,
                "processes": args.processes}))


def step_of(line):
    """The step of a line of log.jsonl, or None if it is damaged."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) and line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def write_whole(path, write):
    """Fill a file by `write(file)` under another name, then rename it: under its own it is always whole."""
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
        with contextlib.suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"{path} could not be written ({reason}); what stood there before is untouched") from None


def save_pictures(columns, out, name):
    """Write columns of pictures (rows, C, H, W) in [0, 1] side by side to DIR/`name`, enlarged to about 224 pixels."""
    columns = [x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1) for x in columns]
    columns = [F.interpolate(x.clamp(0, 1), scale_factor=max(1, 224 // x.shape[-1])) for x in columns]
    Path(out).mkdir(parents=True, exist_ok=True)
    picture = make_grid(torch.stack(columns, dim=1).flatten(0, 1), len(columns), padding=4, pad_value=1.0)
    save_image(picture, Path(out, name))
    print(f"picture {Path(out, name)}")


def train_classifier(args, model, optimizer, schedule, load, test, classes, mix=None):
    """Train a classifier by cross-entropy and test it after each epoch and at the end.

    schedule(step) -> (learning rate, weight decay); load(first_step) yields (pixels, labels, ...) on the device,
    `accumulate` of them a step; test(last) is an `accuracy`; classes: their names; mix: MixUp or CutMix of (pixels,
    labels).
    """
    autocast, scaler = precision_of(args)
    run = Run(args, model, optimizer, scaler, classes)
    if args.checkpointing:
        use_checkpointing(model)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = load(run.step)
    for step in range(run.step, args.steps):
        lr, weight_decay = schedule(step)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr * group["lr_scale"], weight_decay * group["decays"]

        model.train()
        torch.manual_seed(derive_seed(args.seed, STEP_SEED, step, args.rank))  # of drop path, MixUp and CutMix
        for part in range(args.accumulate):
            pixels, labels, *stamps = next(batches)
            pixels, labels = mix(pixels, labels) if mix else (pixels, labels)
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss = F.cross_entropy(net(pixels, *stamps), labels, label_smoothing=args.smoothing)
                scaler.scale(loss / args.accumulate).backward()
            run.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1 == args.steps
        run.step_done(lr, test(last) if last or (step + 1) % args.steps_per_epoch == 0 else None)
    run.close()


@torch.no_grad()
def accuracy(args, model, batches, last):
    """{"top1", "top5"}, in percent, of all processes' samples, but those with the label -1. last: print it too."""
    model.eval()
    for buffer in model.buffers() if args.processes > 1 else ():  # BatchNorm's statistics: those of the checkpoint
        dist.broadcast(buffer, 0)
    hits = torch.zeros(3, device=next(model.parameters()).device)  # in the first 1, in the first 5, samples
    for pixels, labels, *stamps in batches:
        with precision_of(args)[0]:
            logits = model(pixels, *stamps)
        correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        hits += torch.stack([correct[:, 0].sum(), correct.sum(), (labels >= 0).sum()])
    top1, top5, count = sum_over_processes(hits).tolist()
    top1, top5 = 100 * top1 / max(1, count), 100 * top5 / max(1, count)
    if last and args.rank == 0:
        print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {count:.0f} validation samples")
    return {"top1": top1, "top5": top5}


# -------------------------------------------------------------------------------------------------- the command line
# A recipe is a table of flags, {name: flag(...)}: each hyper-parameter is written once, where its value is.


def number(text, kind=float, least=0, most=math.inf):
    """The value of a flag that is a number from `least` to `most`."""
    with contextlib.suppress(ValueError):
        if least <= kind(text) <= most:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")


whole = functools.partial(number, kind=int)
count = functools.partial(number, kind=int, least=1)
share = functools.partial(number, most=1)


def height_x_width(text):
    """'224' -> 224, '192x256' -> (192, 256)."""
    sides = text.lower().split("x")
    return tuple(count(side) for side in sides) if len(sides) == 2 else count(text)


def flag(value, text, kind=None, **others):
    """A hyper-parameter: the paper's value (for ViT-B, V-JEPA's for ViT-L), what it means, and its kind where the
    value does not tell (a function of its text, `list` for numbers, a list of choices). others: its value by size, for
    `video`, in the `demo` or in that of video, `demo_video`.
    """
    kind = kind or {int: count, float: number}.get(type(value), type(value))
    options = {"choices": kind} if isinstance(kind, list) else {
        bool: {"action": argparse.BooleanOptionalAction}, list: {"nargs": "+", "type": float}}.get(kind, {"type": kind})
    values = ", ".join(f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}"
                       for key, x in {"default": value, **others}.items() if x is not None)
    options["help"] = (f"{text} ({values})" if values else text).replace("%", "%%")
    return argparse.Namespace(value=value, others=others, options=options)


DEVICES = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]  # the best first
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MACHINE = dict(  # where and how a run is made: no settings, so a run goes on although they change
    recipe=flag(None, "values of flags that are not given (default: paper with --data, else demo)", ["paper", "demo"]),
    out=flag(None, "folder of the run (default: runs/METHOD, or runs/METHOD-TASK)", str),
    fresh=flag(False, "start over in --out instead of going on with the run in it"),
    device=flag(DEVICES[0], "where to compute, of what this machine has", DEVICES),
    precision=flag(None, "of products (default: bf16 on CUDA, or else fp16; on others fp32)", ["bf16", "fp16", "fp32"]),
    compile=flag(None, "use torch.compile (default: on CUDA)", bool),
    workers=flag(None, "data loading processes per GPU (default: its share of the cores, at most 16; on a CPU half of "
                 "the cores, and the others compute)", whole),
    accumulate=flag(1, "micro-batches that the batch of each GPU is split into, to save memory"),
    log_every=flag(50, "steps between two lines of log.jsonl", demo=20),
    save_every=flag(1000, "steps between two checkpoints", demo=300),
    keep_every=flag(None, "steps between two checkpoints that are kept, as step-00500.pt (default: none)", count),
    checkpointing=flag(False, "compute activations of the blocks twice instead of keeping them, to save memory"),
    benchmark=flag(None, "only time so many training steps, on random tensors, and print a line of JSON", count),
)
WATCH = dict(  # of pre-training, no settings either
    probe_every=flag(1000, "steps between two looks at the features", demo=500),
    probe_samples=flag(1024, "samples of such a look", demo=400),
)
INPUT = dict(
    data=flag(None, "folder of images or videos, list of paths, cifar10 (default: what comes with scikit-image)", str),
    init=flag(None, "checkpoint to start from, of this project or published", str),
    seed=flag(0, "of everything random", whole),
    measure=flag(False, "measure --mean and --std on 1,000 training images"),
)
CHANNELS = dict(
    channels=flag(3, "of the images"),
    mean=flag(None, "of each channel, in [0, 1] (default: ImageNet's, or measured if there are not 3 channels)", list),
    std=flag(None, "standard deviation of each channel, likewise", list),
)
TRAINING = dict(
    steps=flag(None, "length of the training, optimizer steps; or --epochs", count),
    weight_decay=flag(0.05, "of AdamW"),
    clip_grad=flag(None, "largest L2 norm of the gradient (default: no limit)", number),
)
CLASSIFICATION = dict(
    min_lr=flag(1e-6, "learning rate at the end of the schedule"),
    smoothing=flag(0.1, "label smoothing", share),
    eval_only=flag(False, "only test the classifier in --init"),
)
AUGMENTATION = dict(
    randaugment=flag(9.0, "magnitude of RandAugment, 0 to 10", functools.partial(number, most=10), video=7.0, demo=0.0),
    erasing=flag(0.25, "probability of random erasing", share, demo=0.0),
    mixup=flag(0.8, "alpha of MixUp", demo=0.0),
    cutmix=flag(1.0, "alpha of CutMix", demo=0.0),
)


def parse_command_line(method, description, tasks, of_model):
    """Read `METHOD.py [task] [flags]`: the complete args, but for what depends on the data (`data.settle`).

    tasks: {name: (function, recipe, other flags, which are no settings)}. A flag that is given beats what the
    checkpoint in --init says of the flags `of_model`, and that beats the recipe.
    """
    words = sys.argv[1:]
    task = words.pop(0) if words and not words[0].startswith("-") else "pretrain"
    if task not in tasks:
        raise UserError(f"there is no task {task}, only {', '.join(tasks)}")
    _, recipe, others = tasks[task]
    flags = {**recipe, **others, **MACHINE}
    parser = argparse.ArgumentParser(
        f"{method}.py {task}", usage=f"{method}.py [{'|'.join(tasks)}] [flags]", allow_abbrev=False,
        description=f"{description}\nTasks: {', '.join(tasks)}; pretrain if none is given. The flags of {task}:",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in flags:
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **flags[name].options)

    def fail(message):
        raise UserError(f"{message} (see {parser.prog} --help)")
    parser.error = fail
    given = vars(parser.parse_args(words))
    if "init" not in given and (task == "show" or given.get("eval_only")):
        raise UserError(f"{task}{' --eval-only' * (task != 'show')} needs --init, a checkpoint")

    known = given
    if "init" in given:
        weights, settings = read_weights(given["init"])
        model = settings | describe(weights, settings, given["init"])
        for name in ("size", "patch_size", "channels", "tubelet"):
            if given.get(name, model[name]) != model[name]:
                raise UserError(f"--{name.replace('_', '-')} {given[name]} does not fit {given['init']}: {model[name]}")
        # A published file has no settings: what its shapes do not tell is as in the paper. Of a classifier, or of
        # another method's file, only what all tasks need: its masks, for instance, are not those of this method.
        of_method = not settings or of_model.keys() <= settings.keys()
        kind = "video" if model["frames"] > 1 else "image"
        known = {name: model.get(name, flags[name].others.get(kind, flags[name].value)) for name in of_model
                 if name in flags and (of_method or all(name in recipe for _, recipe, _ in tasks.values()))} | given

    def value(name, *keys):
        of_recipe = flags[name].others
        return known.get(name, next((of_recipe[key] for key in keys if key in of_recipe), flags[name].value))

    demo = ["demo"] if given.get("recipe", "paper" if "data" in given else "demo") == "demo" else []
    video = ["video"] if "frames" in flags and value("frames", *demo) > 1 else []
    keys = [*(["demo_video"] if demo and video else []), *demo, *video, value("size", *demo)]
    args = argparse.Namespace(task=task, settings=list(recipe), **{name: value(name, *keys) for name in flags})
    known = {}
    args.defaults = {name: value(name, *keys) for name in recipe}  # of flags that an older version did not have
    if "epochs" in given and "steps" not in given:
        args.steps = None
    if args.benchmark:
        if task != "pretrain":
            raise UserError("--benchmark is for pretrain")
        args.steps = WARM_STEPS + args.benchmark

    cuda = args.device == "cuda"
    if args.precision is None:
        args.precision = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    args.compile = cuda if args.compile is None else args.compile
    cores, on_cpu = CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), args.device == "cpu"
    if args.workers is None:  # a benchmark loads nothing
        args.workers = 0 if args.benchmark else max(1, min(16, cores // 2 if on_cpu else cores))
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:  # threads and workers on the same core wait for one another
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - args.workers)))
    args.out = args.out or f"runs/{method}" + (f"-{task}" if task != "pretrain" else "")
    writes = task != "show" and not args.benchmark and not given.get("eval_only")
    if writes and (args.init or "").endswith(".pt") and Path(args.init).resolve().parent == Path(args.out).resolve():
        raise UserError(f"--init is in {args.out}, where this run writes its own: give another --out")
    return args


def run_main(main):
    """Run a script's `main`; what the user got wrong is one sentence on stderr and exit code 2."""
    code = 0
    try:
        main()
    except SystemExit as end:  # after --help, a benchmark or a signal
        code = end.code
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        sentence = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            sentence = ("the GPU is out of memory: use --checkpointing, or more micro-batches (--accumulate); the same "
                        "command then goes on from the last checkpoint")
        elif sentence.startswith("Caught "):  # in a worker: torch makes its whole traceback the message
            sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # where rank 0 says the same, torchrun ends the others before they repeat it
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {sentence}", sys.stderr)  # beside an open progress bar too
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    if dist.is_initialized():
        # Before PyTorch 2.8 its destructor keeps Python locked while it waits for a thread of gloo, which may wait for
        # Python to free the tensors of the last operation. Asleep, Python is not locked.
        time.sleep(0.5)
        dist.destroy_process_group()
    sys.exit(code)
