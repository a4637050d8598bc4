"""What the three methods share: the Vision Transformer, and everything around a training run.

1. The model (Dosovitskiy et al. 2021, arXiv 2010.11929). It needs torch alone, and its parameters
   are named as in timm and the published MAE code, so that weights travel both ways.
2. Weights: checkpoints of this project and published ones.
3. What a run needs: processes, seeds, optimizer; resume, log, save, stop; the benchmark.
4. Configuration: one dataclass a task, and the command line made of its fields.
5. Supervised training, for fine-tuning and probes.

Letters, in all files:
    B  samples of a micro-batch    L  tokens of an image or clip     D     width of a token
    C  channels                    N  visible tokens of a sample     K     values predicted per token
    T  frames of a clip            M  masked tokens of a sample      H, W  height, width in pixels
    P  side of a patch, pixels         S  slices, in SatMAE: groups of bands, or dates
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import textwrap
import time
import traceback
import typing
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# --------------------------------------------------------------------------- the Vision Transformer


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P*P*C): patches in raster order, each as (row, column, channel)."""
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    # (B, C, H/P, P, W/P, P)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: (B, L, P*P*C) -> (B, C, H, W), where grid = (H/P, W/P)."""
    x = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    # (B, H/P, W/P, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def gather_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """The tokens of x (B, L, D) at indices (B, N): (B, N, D)."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2]))


def scatter_tokens(x: Tensor, indices: Tensor, tokens: Tensor) -> Tensor:
    """x (B, L, D) with `tokens`, (B, N, D) or one for all (1, 1, D), at the indices (B, N)."""
    index = indices[..., None].expand(-1, -1, x.shape[2])
    return x.scatter(1, index, tokens.to(x.dtype).expand_as(index))


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """Sine-cosine embedding of numbers, (N,) -> (N, dim) float64: all sines, then all cosines."""
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    omega = 1 / 10000 ** (torch.arange(dim // 2, dtype=dtype, device=positions.device) / (dim // 2))
    angles = positions.to(dtype)[:, None] * omega  # (N, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos(dim: int, grid: tuple[int, ...]) -> Tensor:
    """Position embeddings (L, dim) of a grid ([times,] rows, columns).

    Each axis gets an equal part of the vector, rounded up to an even number; the end is cut off. As
    published, an image's begin with the *column* (MAE), a clip's with the time (V-JEPA).
    """
    axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    axes = axes[::-1] if len(grid) == 2 else axes
    width = 2 * math.ceil(dim / 2 / len(grid))
    return torch.cat([sincos_1d(width, axis.flatten()) for axis in axes], dim=1)[:, :dim].float()


def init_weights(module: nn.Module) -> None:
    """For `model.apply`: truncated normal weights of std 0.02 and zero biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class PatchEmbed(nn.Module):
    """Linear projection of patches or tubelets: (B, C, [T,] H, W) -> (B, L, D), in raster order."""

    def __init__(self, patch_size: int, channels: int, dim: int, frames: int = 1, tubelet: int = 1):
        super().__init__()
        if frames > 1:
            kernel = (tubelet, patch_size, patch_size)
            self.proj = nn.Conv3d(channels, dim, kernel_size=kernel, stride=kernel)
        else:
            self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} is not a multiple of {heads} attention heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between, (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, (B, N, D) -> (B, N, D). drop_path: rate of stochastic depth."""

    def __init__(self, dim: int, heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.drop_path_rate = drop_path
        self.checkpointing = False  # True: recompute activations in the backward pass

    def drop_path(self, x: Tensor) -> Tensor:
        """Zero the branch (B, N, D) of random samples; divide the others by the probability to be kept."""
        if self.drop_path_rate == 0 or not self.training:
            return x
        return x * F.dropout(x.new_ones(len(x), 1, 1), self.drop_path_rate)

    def residual(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            draws = self.drop_path_rate > 0
            return checkpoint(self.residual, x, use_reentrant=False, preserve_rng_state=draws)
        return self.residual(x)


class ViT(nn.Module):
    """Vision Transformer: the encoder of all three methods, and a classifier.

    size: a key of SIZES. image_size: pixels, an int or (height, width). frames > 1: clips, a token
    spans `tubelet` frames. learned_positions: or fixed sine-cosine. pool: "class" (`norm`,
    then the class token, or the mean without one) or "mean" (of patch tokens, then `fc_norm`).
    num_classes: 0 returns features (B, D), else logits (B, num_classes). drop_path: the last
    block's rate, rising linearly from 0. Raises ValueError if patches do not fill the input.
    """
    SIZES = {  # width D, depth, heads
        "nano": (128, 4, 4),  # not from any paper: for the demos on a CPU
        "tiny": (192, 12, 3),
        "small": (384, 12, 6),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
        "huge": (1280, 32, 16),
    }

    def __init__(self, size: str = "base", image_size: int | tuple[int, int] = 224,
                 patch_size: int = 16, channels: int = 3, frames: int = 1, tubelet: int = 1,
                 class_token: bool = True, learned_positions: bool = False, pool: str = "class",
                 num_classes: int = 0, drop_path: float = 0.0):
        super().__init__()
        dim, depth, heads = self.SIZES[size]
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"image size {height}x{width} is not a multiple of the patch size "
                             f"{patch_size}")
        if frames % tubelet:
            raise ValueError(f"{frames} frames are not a multiple of the tubelet of {tubelet}")
        self.grid = (height // patch_size, width // patch_size)
        if frames > 1:
            self.grid = (frames // tubelet, *self.grid)
        self.dim, self.heads, self.patch_size, self.pool = dim, heads, patch_size, pool

        self.patch_embed = PatchEmbed(patch_size, channels, dim, frames, tubelet)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        positions = F.pad(sincos(dim, self.grid), (0, 0, int(class_token), 0))  # class token: 0
        self.pos_embed = nn.Parameter(positions[None], requires_grad=learned_positions)
        rates = [drop_path * i / (depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, rate) for rate in rates)
        self.norm = nn.Identity() if pool == "mean" else nn.LayerNorm(dim, eps=1e-6)
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

        self.apply(init_weights)
        for parameter in (self.cls_token, self.pos_embed):  # learned ones start at random
            if parameter is not None and parameter.requires_grad:
                nn.init.trunc_normal_(parameter, std=0.02)

    def embed(self, pixels: Tensor) -> Tensor:
        """Patch tokens with positions, without the class token: (B, C, [T,] H, W) -> (B, L, D)."""
        return self.patch_embed(pixels) + self.pos_embed[:, -math.prod(self.grid):]

    def encode(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, N, D) -> encoded, the class token (if any) first: (B, [1+]N, D)."""
        if self.cls_token is not None:
            class_token = self.cls_token + self.pos_embed[:, :1]
            x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """All encoded tokens, the class token first: (B, C, [T,] H, W) -> (B, [1+]L, D)."""
        return self.encode(self.embed(pixels))

    def forward_head(self, x: Tensor) -> Tensor:
        """Encoded tokens (B, [1+]L, D) -> features (B, D), or logits (B, num_classes)."""
        class_tokens = int(self.cls_token is not None)
        if self.pool == "class" and class_tokens:
            x = x[:, 0]
        else:
            x = x[:, class_tokens:].mean(dim=1)
        return self.head(self.fc_norm(x))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))


# ------------------------------------------------------------------------------------------ weights


class UserError(Exception):
    """Something that the user gave is wrong: `main` prints the sentence and exits with code 2."""


NETWORKS = ("encoder", "predictor", "target_encoder", "classifier")  # the parts of V-JEPA's files


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, of tensors and plain values: nothing is executed."""
    try:
        if Path(path).suffix == ".safetensors":  # of the model hubs
            from safetensors.torch import load_file
            return {"model": load_file(path)}
        with torch.serialization.safe_globals([argparse.Namespace]):  # published files hold one
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # check sums
            raise ValueError
    except (FileNotFoundError, PermissionError, MemoryError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    except ImportError:
        raise UserError(f"to read {path}, install safetensors (pip install safetensors)") from None
    except Exception:  # a damaged file makes the reader fail in many ways
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values") from None
    tables = [content]
    if isinstance(content, dict):
        tables += [content.get(name, {}) for name in ("model", "model_state", *NETWORKS)]
    for table in tables:
        if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
            raise UserError(f"{path} holds no weights by name")
    return content


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """(weights by name, settings of the run or {}) of a checkpoint of ours or a published one."""
    content = read_checkpoint(path)
    weights = content.get("model", content.get("model_state", content))  # MaskFeat's: model_state
    if any(network in content for network in NETWORKS):
        weights = {}
        for network in NETWORKS:
            weights |= {f"{network}.{name}": x for name, x in content.get(network, {}).items()}
    renamed = {}
    for name, weight in weights.items():
        for prefix in ("_orig_mod.", "module.", "backbone."):  # torch.compile, DDP, V-JEPA
            name = name.replace(prefix, "")
        name = name.replace("head.transforms.0.0.", "head.0.")  # the published MaskFeat
        name = name.replace("head.projections.0.", "head.1.")
        if torch.is_tensor(weight) and not name.startswith("hogs."):  # MaskFeat's fixed filters
            renamed[name] = weight
    return renamed, content.get("settings", {})


def encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the encoder alone: V-JEPA's target encoder, the encoder under a probe."""
    for prefix in ("target_encoder.", "encoder.", ""):
        part = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        if part:
            return part
    return {}


def encoder_arguments(weights: dict[str, Tensor], settings: dict, path: str | Path) -> dict:
    """The arguments of the ViT that `weights` belong to, read off names, shapes and settings.

    A file of clips without settings is taken for one of 16 frames, as the published ones are.
    """
    weights = encoder_weights(weights)
    try:
        projections = [weight for name, weight in weights.items()
                       if re.fullmatch(r"patch_embed\.(\d\.)?proj\.weight", name)]
        dim, channels, *tubelet, _, patch_size = projections[0].shape  # a tubelet if it is video
        bands = sum(weight.shape[1] for weight in projections)  # SatMAE: groups of bands
        channels = settings.get("channels") or bands
        frames, tubelet = (settings.get("frames", 16), tubelet[0]) if tubelet else (1, 1)
        class_token = "cls_token" in weights
        patches = (weights["pos_embed"].shape[1] - class_token) // (frames // tubelet)  # of a frame
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        size = next(name for name, shape in ViT.SIZES.items() if shape[:2] == (dim, depth))
    except (KeyError, IndexError, AttributeError, ValueError, StopIteration):
        if "pos_embed" not in weights and "blocks.0.norm1.weight" in weights:
            raise UserError(f"{path} has rotary positions (no pos_embed), as V-JEPA 2 has: only "
                            "V-JEPA (1) can be read here") from None
        needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.weight")
        missing = ", ".join(name for name in needed if name not in weights) or "none"
        keys = ", ".join(list(weights)[:3]) or "none"
        raise UserError(f"{path} is not a Vision Transformer of a known size: missing keys "
                        f"{missing}; its keys are {keys}") from None
    image_size = settings.get("image_size") or patch_size * math.isqrt(patches)
    return {"size": size, "image_size": image_size,
            "patch_size": patch_size, "channels": channels, "frames": frames, "tubelet": tubelet,
            "class_token": class_token, "pool": "mean" if "fc_norm.weight" in weights else "class",
            "num_classes": len(weights.get("head.weight", ()))}


def resize_positions(table: Tensor, old_grid: tuple[int, ...], new_grid: tuple[int, ...]) -> Tensor:
    """Interpolate position embeddings (1, [1+]L, D) to another grid ([times,] rows, columns).

    Bicubic in space, linear in time. The class token's row, if there is one, stays as it is.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    length = math.prod(old_grid)
    class_row, table = table.split([table.shape[1] - length, length], dim=1)
    table = table.reshape(-1, *old_grid[-2:], table.shape[-1])  # (times, rows, columns, D)
    table = table.permute(0, 3, 1, 2)
    table = F.interpolate(table, size=tuple(new_grid[-2:]), mode="bicubic")
    if len(old_grid) == 3:
        over_time = table.permute(2, 3, 1, 0).flatten(0, 1)  # (rows * columns, D, times)
        over_time = F.interpolate(over_time, size=new_grid[0], mode="linear")
        table = over_time.unflatten(0, tuple(new_grid[-2:])).permute(3, 2, 0, 1)
    return torch.cat([class_row, table.permute(0, 2, 3, 1).reshape(1, -1, table.shape[1])], dim=1)


def load_strictly(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load every parameter, or raise a UserError with the first keys that do not fit."""
    own = model.state_dict()
    shared = [name for name in own if name in weights]
    faults = {"missing keys": [name for name in own if name not in weights],
              "unexpected keys": [name for name in weights if name not in own],
              "shape mismatch of": [n for n in shared if weights[n].shape != own[n].shape]}
    sentences = []
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            sentences.append(f"{fault} {', '.join(names[:3])}{more}")
    if sentences:
        raise UserError(f"{path} does not fit this model: {'; '.join(sentences)}")
    model.load_state_dict(weights)


def grid_of_file(arguments: dict[str, Any]) -> tuple[int, ...]:
    """The grid of tokens of the ViT with these arguments."""
    with torch.device("meta"):
        return build(ViT, **arguments).grid


def build(function: Callable, *arguments, **named):
    """Call a function or a class; what it finds wrong with its arguments becomes a UserError."""
    try:
        return function(*arguments, **named)
    except ValueError as error:
        raise UserError(error) from None


def load_encoder(path: str | Path, vit_class: type = ViT, **changes) -> ViT:
    """The ViT in a checkpoint of ours or a published one; a UserError if the file does not fit.

    The architecture is read off the file; `changes` override arguments of ViT, such as
    num_classes=10, pool="mean" or image_size=(192, 256), to which positions are interpolated. With
    frames=1 an encoder of clips becomes one of images, each a tubelet of equal frames. A head, and
    the norm before it, are randomly initialized where the file has none that fits.
    """
    weights, settings = read_weights(path)
    arguments = encoder_arguments(weights, settings, path)
    weights, old_grid = encoder_weights(weights), grid_of_file(arguments)
    to_images = arguments["frames"] > 1 and changes.get("frames") == 1
    if to_images:
        changes["tubelet"] = 1
        weights["patch_embed.proj.weight"] = weights["patch_embed.proj.weight"].sum(dim=2)
    vit = build(vit_class, **{**arguments, **changes})
    grid = (1, *vit.grid) if to_images else vit.grid
    weights["pos_embed"] = resize_positions(weights["pos_embed"], old_grid, grid)

    own, after_blocks = vit.state_dict(), ("norm.", "fc_norm.", "head.")
    for name, weight in own.items():
        fits = name in weights and weights[name].shape == weight.shape
        if name.startswith(after_blocks) and not fits:
            weights[name] = weight
    # A whole method has more than its encoder; all that the encoder has must be there.
    others = ("decoder", "mask_token", "encoder_mask_token", "pred_head.", *after_blocks)
    weights = {n: w for n, w in weights.items() if n in own or not n.startswith(others)}
    load_strictly(vit, weights, path)
    return vit


def load_model(model: nn.Module, path: str | Path, new: tuple[str, ...],
               encoder_alone: bool = True) -> None:
    """Load a checkpoint into a whole model, strictly; position embeddings may be of another size.

    new: prefixes of the parts that an encoder alone lacks: they stay randomly initialized, which is
    printed; with encoder_alone=False such a file is a UserError.
    """
    weights, settings = read_weights(path)
    own, encoder = model.state_dict(), encoder_weights(weights)
    if not any(name.startswith(new[0]) for name in weights):
        if not encoder_alone:
            raise UserError(f"{path} is an encoder-only checkpoint: give a whole one, as last.pt")
        if get_rank() == 0:
            print(f"{path} is an encoder-only checkpoint: the rest is randomly initialized")
        with_norm = (*new, "norm.")  # which MaskFeat's encoder lacks
        weights = {name: w for name, w in own.items() if name.startswith(with_norm)}
        for name in own:
            key = name.removeprefix("target_").removeprefix("encoder.")
            if key in encoder and not name.startswith(new):
                weights[name] = encoder[key]
    old_grid = grid_of_file(encoder_arguments(weights, settings, path))
    for name, table in model.named_parameters():
        if name.endswith("pos_embed") and name in weights and weights[name].shape != table.shape:
            resized = resize_positions(weights[name], old_grid, model.grid)
            weights[name] = resized if table.requires_grad else table
    load_strictly(model, weights, path)


# ---------------------------------------------------------------------- processes, seeds, optimizer


def init_distributed(device: str | None = None) -> torch.device:
    """Join the other processes of torchrun, if any: this one's device (None: the best there is)."""
    torch.backends.cudnn.allow_tf32 = False  # fp32 means that of convolutions too
    if device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU")
    if "RANK" not in os.environ or dist.is_initialized():
        return torch.device(device)
    if device == "mps":
        raise UserError("torchrun is for --device cuda or cpu, not mps")
    store, rank, world_size = next(dist.rendezvous("env://"))
    # After a crash, when torchrun starts all again, the store still has the addresses of the dead.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend, device_id = "gloo", None
    if device == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        device_id = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device_id)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, device_id=device_id,
        timeout=datetime.timedelta(minutes=30))  # in which rank 0 draws the picture
    return device_id or torch.device(device)


def get_rank() -> int:
    """The number of this process among those of torchrun, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes, one a GPU."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_once(sentence: str) -> None:
    """Print on stderr, beside an open progress bar, by the first process alone."""
    if get_rank() == 0:
        tqdm.write(sentence, sys.stderr)


def all_reduce(tensor: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or another reduction) of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


BUILT_IN, EPOCH, SAMPLE, MASK, BLOCK_SIZE, TRAIN_STEP, LABELS = range(7)  # purposes of seeds


def derive_seed(seed: int, purpose: int, *numbers: int) -> int:
    """A 64-bit seed for one purpose, such as (seed, MASK, position), independent of the others.

    By numpy's spawn_key, which tells (1,) from (1, 0); its entropy is padded with zeros.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, *numbers))
    return int(sequence.generate_state(1, np.uint64)[0])


def choose_precision(precision: str | None, device: torch.device) -> str:
    """The precision asked for, or for None the best that the device has."""
    if precision is not None:
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"


def mixed_precision(precision: str | None,
                    device: torch.device) -> tuple[torch.autocast, torch.amp.GradScaler]:
    """(autocast context, GradScaler) for a precision, see `choose_precision`."""
    precision = choose_precision(precision, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def share_cores(workers: int | None, device: torch.device) -> int:
    """The number of data loading processes (None: by the cores); on a CPU torch gets the rest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cpu = device.type == "cpu"
    if workers is None:
        workers = max(1, min(16, cores // 2 if on_cpu else cores))
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:  # sharing a core slows both
        torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))
    return workers


def wrap_model(model: nn.Module, config: "Training", device: torch.device,
               by_block: bool = False) -> nn.Module:
    """The model for training: activation checkpointing, DDP and torch.compile, as the config says.

    by_block: compile each block by itself; equal ones share a graph, for all numbers of tokens.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    compiled = config.compile if config.compile is not None else device.type == "cuda"
    for block in blocks:
        block.checkpointing = block.checkpointing or config.checkpointing
        if compiled and by_block:
            block.compile()  # block.forward = ... would leave a copy with this one's weights
    if blocks[0].checkpointing and torch.__version__ < (2, 13):  # DDP cannot split it (issue 104674)
        torch._dynamo.config.optimize_ddp = False
    net = model
    if get_world_size() > 1:
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return torch.compile(net) if compiled and not by_block else net


def cosine_schedule(step: float, steps: float, warmup: float, peak: float, final: float = 0.0,
                    start: float = 0.0) -> float:
    """Linear warm-up from `start` to `peak` over `warmup` steps, then half a cosine to `final`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0,
                     no_decay: tuple[str, ...] = ()) -> list[dict]:
    """Parameter groups for the optimizer: no weight decay on 1-D parameters and on `no_decay`.

    The learning rate of layer l is scaled by layer_decay^(depth + 1 - l): the embedding is layer 0,
    block i layer i + 1, what follows layer depth + 1 (BEiT, arXiv 2106.08254).
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
    return [{"params": parameters, "lr_scale": scale, "decays": decays,
             "weight_decay": weight_decay * decays}
            for (scale, decays), parameters in groups.items()]


# ------------------------------------------------------------------- a run: resume, log, save, stop


class Plan(NamedTuple):
    """What a config leaves to data and GPU: normalization, length in steps, micro-batches."""
    mean: list[float]
    std: list[float]
    steps: int
    steps_per_epoch: int
    accumulate: int = 1  # micro-batches of a step, on each GPU


MARGIN = 0.1  # of a GPU's memory: for torch.compile, NCCL and fragmentation


def plan_micro_batches(config, plan: Plan, model: nn.Module, loader, samples, autocast,
                       largest: int | None = None) -> Plan:
    """The plan with as few micro-batches as fit into the GPU, unless the config says how many.

    largest: the most samples of a micro-batch. If not even one fits, activation checkpointing is
    turned on. Call this before DDP and the optimizer's first step. All processes get the same plan;
    weights, gradients and random numbers stay as they are. Raises UserError if nothing fits.
    """
    if config.accumulate or loader.device.type != "cuda":
        return plan
    (free, total), world_size = torch.cuda.mem_get_info(), get_world_size()
    size = config.batch_size // world_size
    has_batch_norm = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    smallest = 2 if has_batch_norm else 1  # whose statistics need two samples
    sizes = [n for n in range(min(largest or size, size), smallest - 1, -1) if size % n == 0]
    for checkpointing in [True] if config.checkpointing else [False, True]:
        for module in model.modules():
            if isinstance(module, Block):
                module.checkpointing = checkpointing
        if checkpointing and not config.checkpointing:
            print_once("not even one sample fits into memory: as with --checkpointing, activations "
                       "are now recomputed in the backward pass")
        for micro_batch in sizes:
            peak = try_micro_batch(model, loader, samples, autocast, micro_batch, int(MARGIN * total))
            if peak is None:
                continue
            accumulate = size // micro_batch
            parts = f"in {accumulate} micro-batches of {micro_batch}" if accumulate > 1 else "at once"
            gpus = "1 GPU" if world_size == 1 else f"each of {world_size} GPUs"
            advice = ""
            if micro_batch < sizes[0] < size and not checkpointing:
                advice = f"; with --checkpointing up to {sizes[0]}, as published, may fit"
            print_once(f"batch of {config.batch_size:,} {parts} on {gpus}, {peak / 2 ** 30:.1f} of "
                       f"{total / 2 ** 30:.1f} GiB{advice}")
            return plan._replace(accumulate=accumulate)
    raise UserError(f"not even one sample fits into the GPU's memory, of which {free / 2 ** 30:.1f} of "
                    f"{total / 2 ** 30:.1f} GiB are free, with --checkpointing either: use a smaller "
                    "--size or --image-size")


def try_micro_batch(model: nn.Module, loader, samples, autocast, size: int, margin: int) -> int | None:
    """The memory in bytes that training on `size` samples takes; None if a process has not enough."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    torch.cuda.reset_peak_memory_stats()
    with torch.random.fork_rng([torch.cuda.current_device()]):
        fits = fits_in_memory(model, loader, samples, autocast, size, margin)
    # On Windows a driver may give more than there is, and swap.
    fits = fits and torch.cuda.max_memory_allocated() <= torch.cuda.mem_get_info()[1]
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(model.buffers(), buffers):  # BatchNorm's statistics
        buffer.copy_(before)
    peak = torch.cuda.max_memory_allocated() - margin
    torch.cuda.empty_cache()
    # One process may have less memory than another: all go on to the next size together.
    return peak if all_reduce(torch.tensor(int(fits)), dist.ReduceOp.MIN) else None


def fits_in_memory(model: nn.Module, loader, samples, autocast, size: int, margin: int) -> bool:
    """Try a forward and a backward pass on random pixels, beside a margin and AdamW's state."""
    state = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)
    try:
        device = next(model.parameters()).device
        reserved = torch.empty(margin + state, dtype=torch.uint8, device=device)
        pixels, _, *inputs = next(loader.random_batches(samples, size, 1))
        if inputs and isinstance(inputs[-1], list):  # V-JEPA: steps differ, so take the largest of 100
            candidates = []
            for step in range(100):  # far apart, since a batch shares its block sizes
                masks = [samples.draw_mask(step * 10 ** 6 + i) for i in range(size)]
                candidates.append(loader.to_indices(torch.stack(masks)))
            inputs[-2:] = max(candidates, key=lambda x: sum(visible.shape[1] for visible in x[0]))
        if samples.draw_mask:
            *stamps, visible, masked = inputs
            inputs = [visible, masked, *stamps]  # the order of `forward`
        with autocast:
            output = model(pixels, *inputs)
        output = output[0] if isinstance(output, tuple) else output  # the loss, or logits
        output.float().mean().backward()
        del reserved
    except torch.OutOfMemoryError:
        return False
    except RuntimeError as error:  # cuBLAS and the driver have errors of their own
        if "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return False
        raise
    return True


class Checkpoints:
    """last.pt, previous.pt, best.pt and step-00500.pt of a run, in the folder `config.out`.

    classes: names of a classifier's outputs, kept in the checkpoint.
    """

    def __init__(self, config, plan: Plan, model, optimizer, scaler, classes: list | None = None):
        self.config, self.steps, self.out = config, plan.steps, Path(config.out)
        self.accumulate = plan.accumulate
        self.model, self.optimizer, self.scaler, self.classes = model, optimizer, scaler, classes
        self.settings = config.settings()
        self.settings |= {"steps": plan.steps, "mean": plan.mean, "std": plan.std}
        self.best, self.score = -math.inf, "score"

    def resume(self) -> int:
        """Load last.pt, if there is one: the number of steps that the run has done.

        A damaged last.pt becomes last.broken.pt. A run of other settings is a UserError.
        """
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # after a crash
        fresh = self.config.fresh and restarts == 0
        path, content, broken = (None, {}, None) if fresh else self.find()
        step = 0
        if path:
            self.check_settings(content)
            load_strictly(self.model, content["model"], path)
            self.optimizer.load_state_dict(content["optimizer"])
            if content["scaler"]:  # empty unless the run is in fp16
                self.scaler.load_state_dict(content["scaler"])
            step, self.best, self.score = content["step"], content["best"], content["score"]
            before, now = content["world_size"], get_world_size()
            parts = content.get("accumulate", self.accumulate)
            if before != now:
                print_once(f"so far {before} processes made this run, now {now}: sums round, and "
                           "drop path, MixUp and CutMix are drawn, differently")
            elif parts != self.accumulate:
                print_once(f"so far in {parts} micro-batches a step, now in {self.accumulate}: sums "
                           "round differently")
        self.out.mkdir(parents=True, exist_ok=True)
        if all_reduce(torch.tensor(step)) != step * get_world_size():
            raise UserError(f"processes see different {self.out}/last.pt: put --out on a shared disk")
        if get_rank() == 0:
            for old in list(self.out.glob("*.pt")) if fresh else []:
                if not old.name.endswith(".old.pt"):
                    os.replace(old, old.with_suffix(".old.pt"))
            if broken:
                os.replace(broken, self.out / "last.broken.pt")
            settings = ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)
            print(f"step {step} of {self.steps} in {self.out}; {settings}")
        return step

    def find(self) -> tuple[Path | None, dict, Path | None]:
        """(path, content) of the newest readable checkpoint, and path of a damaged one."""
        paths = [self.out / name for name in ("last.pt", "previous.pt")]
        paths = [path for path in paths if path.exists()]
        if not paths:
            return None, {}, None
        try:
            return paths[0], read_checkpoint(paths[0]), None
        except UserError as error:
            if len(paths) == 1:
                raise UserError(f"{error}, and there is no previous.pt: give --fresh") from None
            print_once(f"{error}: resuming from {paths[1]}")
            return paths[1], read_checkpoint(paths[1]), paths[0]

    def check_settings(self, content: dict) -> None:
        """Raise a UserError for a run with other settings; what it lacks counts as the default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.config)}
        old, new = content.get("settings", {}), self.settings
        old = {name: defaults.get(name) for name in new} | old
        changes = [f"{name} {value} there, {new.get(name)} now" for name, value in old.items()
                   if value != new.get(name)]
        if content.get("classes", self.classes) != self.classes:
            changes.append("other classes")
        if changes:
            changes = "; ".join(changes[:5])
            raise UserError(f"{self.out} holds a run with other settings ({changes}): give another "
                            "--out, or --fresh to start over")

    def save(self, step: int, metrics: dict[str, float], now: bool = False) -> None:
        """Write what is due after a step. All processes call this, and all get rank 0's UserError.

        last.pt every `save_every` steps and with `now`; step-00500.pt every `keep_every`; best.pt
        if the "score_..." among the metrics is the highest so far.
        """
        config, names, failure = self.config, [], None
        if config.keep_every and step % config.keep_every == 0:
            names.append(f"step-{step:05}.pt")
        if now or step % config.save_every == 0:
            names.append("last.pt")
        if not names and not metrics:
            return
        if get_rank() == 0:
            for name, value in metrics.items():
                if name.startswith("score") and value > self.best:
                    self.best, self.score = value, name
                    names.insert(0, "best.pt")
            try:
                for name in names:
                    self.write(name, step)
            except UserError as error:
                failure = error
        if all_reduce(torch.tensor(int(failure is not None))):
            raise failure or UserError("rank 0 could not save the run")

    def print_paths(self) -> None:
        """Say where the results of a finished run are."""
        best = f", of the highest {self.score} {self.out}/best.pt" if self.best > -math.inf else ""
        if get_rank() == 0:
            print(f"checkpoint {self.out}/last.pt{best}, log {self.out}/log.jsonl")

    def write(self, name: str, step: int) -> None:
        weights = self.model.state_dict()
        if not torch.stack([weight.isfinite().all() for weight in weights.values()]).all():
            raise UserError(f"the weights after step {step} are not finite, so they are not saved: "
                            "lower --base-lr")
        content = {"settings": self.settings, "classes": self.classes, "step": step,
                   "best": self.best, "score": self.score, "world_size": get_world_size(),
                   "accumulate": self.accumulate, "model": weights,
                   "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        write_atomically(self.out / name, lambda file: torch.save(content, file))


def write_atomically(path: Path, write: Callable) -> None:
    """Fill a file by `write(file)` under another name, then rename it: it is always whole."""
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
        raise UserError(f"{path} could not be written ({reason}); the old one is kept") from None


class Log:
    """The progress bar, and records in log.jsonl and for TensorBoard, if it is installed.

    The bar and TensorBoard are open until `close`.
    """

    def __init__(self, config, plan: Plan, start: int, unit: str = "images"):
        self.config, self.plan, self.unit = config, plan, unit
        self.file = Path(config.out, "log.jsonl")
        self.time, self.last_step, self.board = time.perf_counter(), start, None
        self.progress = tqdm(range(start, plan.steps), initial=start, total=plan.steps, unit="step",
                             disable=get_rank() > 0,
                             mininterval=0.1 if sys.stderr.isatty() else 30)
        if get_rank() == 0:
            self.drop_later_records(start)
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(Path(config.out, "tensorboard"), purge_step=start)

    def steps(self) -> Iterator[int]:
        """The steps that are left, with the progress bar; after 20 says when the run will end."""
        for number, step in enumerate(self.progress):
            if number == 5:  # the first ones compile
                begin = time.perf_counter()
            if number == 20:
                seconds = (time.perf_counter() - begin) / 15
                print_once(estimate(seconds, self.plan.steps, self.plan.steps - step))
            yield step

    def drop_later_records(self, start: int) -> None:
        """Keep the records up to the step that a run resumes from, without damaged lines."""
        kept, damaged = [], 0
        lines = self.file.read_text(errors="replace").splitlines(True) if self.file.exists() else []
        for line in lines:
            try:
                if json.loads(line)["step"] <= start and line.endswith("\n"):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                damaged += 1
        if damaged:
            print(f"{self.file}: {damaged} damaged lines are dropped", file=sys.stderr)
        write_atomically(self.file, lambda file: file.write("".join(kept).encode()))

    def write(self, step: int, losses: list[Tensor], scaler, **values: float) -> None:
        """Record the mean loss and the samples per second since the last record, and other values.

        All processes call this. losses: of the micro-batches since then; the list is emptied. A
        UserError if one is not finite; in fp16, which skips such steps, at a scale below 1 only.
        """
        stacked = all_reduce(torch.stack(losses).float()) / get_world_size()
        finite = stacked.isfinite()
        losses.clear()
        if not finite.all() and not (scaler.is_enabled() and scaler.get_scale() >= 1):
            first = int((~finite).nonzero()[0])
            bad = step - (len(stacked) - 1 - first) // self.plan.accumulate
            raise UserError(f"the loss of step {bad} is not finite, at a learning rate of about "
                            f"{values['lr']:.2g}: lower --base-lr, or use --precision bf16 or fp32")
        now = time.perf_counter()
        rate = (step - self.last_step) * self.config.batch_size / (now - self.time)
        self.time, self.last_step = now, step
        record = {"loss": stacked[finite].mean().item(), **values}
        record[f"{self.unit}_per_second"] = round(rate, 1)
        if get_rank() > 0:
            return
        shown = {name.replace("_per_second", "/s"): f"{x:.4g}" for name, x in record.items()}
        self.progress.set_postfix(shown)
        if self.board:
            for name, value in record.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # a run that a signal or an error ends does not come to `close`
        record = {name: x if math.isfinite(x) else None for name, x in record.items()}  # as JSON
        with open(self.file, "a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")

    def close(self) -> None:
        self.progress.close()
        if self.board:
            self.board.close()


class Stopped(Exception):
    """A signal ended the run after a saved step: `main` says so and exits with 128 + number."""

    def __init__(self, number: int, step: int, out: str):
        super().__init__(f"stopped at step {step} by {signal.Signals(number).name}; the same "
                         f"command, without --fresh, resumes from {out}/last.pt")
        self.number = number


class StopSignals:
    """A context in which SIGINT and SIGTERM are only noted, until a step is finished and saved.

    A second SIGINT ends the process at once. With enabled=False signals are left as they are.
    """

    def __init__(self, enabled: bool = True):
        self.number, self.handlers, self.enabled = 0, {}, enabled

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM) if self.enabled else ():
            self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.number = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def received(self) -> int:
        """The signal that any of the processes has got, or 0. All processes call this."""
        return int(all_reduce(torch.tensor(self.number), dist.ReduceOp.MAX))  # on the CPU: no wait


def estimate(seconds: float, steps: int, remaining: int) -> str:
    """A sentence on when a run ends, from seconds a step, steps in all and remaining ones."""
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds * remaining)
    hours = seconds * remaining / 3600
    duration = f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:,.0f} hours"
    day = f"{end:%A %H:%M}" if hours < 6 * 24 else f"{end:%A %H:%M, %d %B %Y}"
    return (f"{seconds:.2g} s a step, {remaining:,} of {steps:,} steps are left: {duration}, until "
            f"{day}")


WARMUP_STEPS = 5  # of a benchmark
PEAK_FLOPS = {  # dense bf16, from NVIDIA's data sheets
    "NVIDIA B200": 2250e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA A100-PCIE-40GB": 312e12}


def benchmark_steps(config, plan: Plan, device: torch.device, unit: str = "images") -> Iterator[int]:
    """The steps of a benchmark: WARMUP_STEPS, then those that are timed, then a line of JSON.

    Counts the operations of matrix products and, on a GPU, of attention, in the first step, without
    torch.compile. Memory is that of the device, or on a CPU of the whole process.
    """
    cuda = device.type == "cuda"
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = contextlib.nullcontext()  # counts by module have hooks that keep
    counter.mod_tracker.parents = ("Global",)  # recomputed activations alive
    with counter, torch.compiler.set_stance("force_eager"):
        yield 0
    yield from range(1, WARMUP_STEPS)
    torch.get_device_module(device).synchronize()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    timed = range(WARMUP_STEPS, WARMUP_STEPS + config.benchmark)
    yield from tqdm(timed, disable=get_rank() > 0, unit="step")
    torch.get_device_module(device).synchronize()
    seconds = (time.perf_counter() - begin) / config.benchmark
    flops = counter.get_total_flops() * get_world_size()
    peak = PEAK_FLOPS.get(torch.cuda.get_device_name(), 0) * get_world_size() if cuda else 0
    if cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource  # not on Windows; in KiB, on macOS in bytes
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory *= 1 if sys.platform == "darwin" else 1024
    if get_rank() == 0:
        precision = choose_precision(config.precision, device)
        has_mfu = peak and precision != "fp32"
        print(json.dumps({
            f"{unit}_per_second": round(config.batch_size / seconds, 2),
            "ms_per_step": round(1000 * seconds, 2), "gflop_per_step": round(flops / 1e9, 3),
            "mfu": round(flops / seconds / peak, 3) if has_mfu else None,
            "peak_memory_gib": round(memory / 2 ** 30, 2), "precision": precision,
            "compile": cuda if config.compile is None else config.compile,
            "world_size": get_world_size()}))
    print_once("the whole run, without loading data: " + estimate(seconds, plan.steps, plan.steps))


def enlarge(pictures: Tensor, width: int = 224) -> Tensor:
    """Pictures (N, C, H, W) -> colors in [0, 1], pixels repeated until about `width` across."""
    pictures = pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1].expand(-1, 3, -1, -1)
    scale = max(1, width // pictures.shape[-1])
    return F.interpolate(pictures.clamp(0, 1).cpu(), scale_factor=scale)


def stretch(pixels: Tensor, reference: Tensor) -> Tensor:
    """Pixels (..., C, H, W), scaled by channel so that those of `reference` lie in [0, 1]."""
    others = [axis for axis in range(pixels.ndim) if axis != pixels.ndim - 3]
    low, high = reference.amin(others, keepdim=True), reference.amax(others, keepdim=True)
    return (pixels - low) / (high - low).clamp(min=1e-6)


def outline(pictures: Tensor, mask: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) with a white line around what is True in a mask (N, rows, columns)."""
    inside = F.interpolate(mask[:, None].float().cpu(), pictures.shape[-2:])
    outside = F.pad(1 - inside, (2, 2, 2, 2), value=1.0)
    is_line = (inside > 0) & (F.max_pool2d(outside, 5, stride=1) > 0)
    return torch.where(is_line, 1.0, pictures)


def save_pictures(pictures: dict[str, Tensor], path: Path, caption: str,
                  in_rows: bool = False) -> None:
    """Draw {title: pictures (N, C, H, W) in [0, 1]}, each a column or a row, over a caption."""
    tiles = torch.stack([enlarge(x) for x in pictures.values()], dim=0 if in_rows else 1)
    grid = make_grid(tiles.flatten(0, 1), tiles.shape[1], padding=4, pad_value=1.0)
    (sheet_height, sheet_width), (height, width) = grid.shape[1:], (side + 4 for side in tiles.shape[-2:])
    font_size = max(14, sheet_width // 50)  # of letters, which are half as wide
    left, top = (7 * font_size, 0) if in_rows else (0, 3 * font_size)  # for titles of two lines
    caption = textwrap.fill(caption, int((left + sheet_width) / (0.48 * font_size)))
    bottom = int(1.3 * font_size * (1 + caption.count("\n"))) + 8
    sheet = Image.new("RGB", (left + sheet_width, top + sheet_height + bottom), "white")
    sheet.paste(to_pil_image((255 * grid).round().byte()), (left, top))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(font_size)
    for i, title in enumerate(pictures):
        x, y, anchor = (4, (i + 0.5) * height, "lm") if in_rows else ((i + 0.5) * width, top / 2, "mm")
        title = textwrap.fill(title, int((left or width) / (0.48 * font_size)))
        draw.text((x, y), title, "black", font, anchor, align="left" if in_rows else "center")
    draw.text((4, top + sheet_height), caption, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    print(f"picture {path}")


# ------------------------------------------------------------------ configuration, the command line
# A task has one frozen dataclass: its defaults are the paper's, the comment behind a field is the
# flag's help, and its type has the limits: an int is 1 or more and a float 0 or more by default.

Count0 = Annotated[int, 0, math.inf]
Fraction = Annotated[float, 0, 1]
Magnitude = Annotated[float, 0, 10]
ImageSize = int | tuple[int, int]
Size = Literal[tuple(ViT.SIZES)]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The fields of every task."""
    data: str | None = None  # folder of images or videos, list, or cifar10 (default: built-in data)
    init: str | None = None  # checkpoint to start from, of this project or published
    seed: Count0 = 0  # seed of everything random
    measure: bool = False  # mean and std of 1,000 training images instead of ImageNet's
    out: str = "runs"  # folder of the run
    device: Literal["cuda", "mps", "cpu"] | None = None  # device (default: the best there is)
    precision: Literal["bf16", "fp16", "fp32"] | None = None  # precision of products (default: bf16 or fp16 on CUDA)
    workers: Count0 | None = None  # data loading processes per GPU (default: by the cores, up to 16)

    resumable = ("out", "device", "precision", "workers", "fresh", "compile", "accumulate",
                 "checkpointing", "log_every", "save_every", "keep_every", "evaluate_every",
                 "evaluate_samples", "benchmark", "probe_labels")  # may change when a run resumes

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            check_value(name, getattr(self, name), hint)

    def settings(self) -> dict[str, Any]:
        """What has to stay the same for a run to resume."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                    if field.name not in self.resumable}
        if self.data and self.data != "cifar10":
            settings["data"] = str(Path(self.data).resolve())
        return {name: list(x) if isinstance(x, tuple) else x for name, x in settings.items()}


@dataclass(frozen=True, kw_only=True)
class Training(Task):
    """The fields of every task that trains."""
    steps: int | None = None  # length of the training in optimizer steps, instead of epochs
    epochs: float | None = None  # length of the training in passes over the data, instead of steps
    batch_size: int = 256  # samples per step, on all GPUs together
    base_lr: float = 1e-3  # learning rate per 256 samples of a batch
    warmup: Fraction = 0.0  # warm-up, as a fraction of the steps
    clip_grad: float | None = None  # maximum gradient norm (default: no limit)
    accumulate: int | None = None  # micro-batches of a step on each GPU (default: auto, on CUDA as few as fit, else 1)
    checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    compile: bool | None = None  # torch.compile (default: on CUDA)
    fresh: bool = False  # start over instead of resuming the run in --out
    log_every: int = 50  # steps between two records of log.jsonl
    save_every: int = 1000  # steps between two checkpoints
    keep_every: int | None = None  # steps between checkpoints that are all kept (default: none)

    def __post_init__(self):
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give --steps or --epochs, not both")
        writes = not getattr(self, "benchmark", None) and not getattr(self, "eval_only", False)
        init = Path(self.init or "")
        if writes and init.suffix == ".pt" and init.resolve().parent == Path(self.out).resolve():
            raise ValueError(f"--init is in {self.out}, where this run writes its own checkpoints: "
                             "give another --out")

    def log_due(self, step: int) -> bool:
        """Whether a record is due after a step; also before a checkpoint, so resuming is exact."""
        return step % self.log_every == 0 or step % self.save_every == 0


@dataclass(frozen=True, kw_only=True)
class Pretraining(Training):
    """The fields of every pre-training."""
    evaluate_every: int = 1000  # steps between two evaluations of features and predictions
    evaluate_samples: int = 1024  # samples of such an evaluation (of predictions: up to 256)
    benchmark: int | None = None  # training steps on random tensors that are only timed


@dataclass(frozen=True, kw_only=True)
class Classification(Training):
    """The fields of every supervised task."""
    min_lr: float = 1e-6  # learning rate at the end of the schedule
    smoothing: Fraction = 0.1  # label smoothing
    labels: Fraction = 1.0  # fraction of the training samples that are used, in as many steps as all of them
    eval_only: bool = False  # evaluation of the classifier in --init, without training

    def __post_init__(self):
        super().__post_init__()
        if self.eval_only and not self.init:
            raise ValueError("--eval-only needs --init, a checkpoint")
        if not self.labels:
            raise ValueError("--labels 0 leaves no training samples")


def split_hint(hint) -> tuple[Any, float, float]:
    """A type hint -> (type without None, lower limit, upper limit)."""
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)
    return hint, {int: 1, ImageSize: 1, float: 0}.get(hint, -math.inf), math.inf


def check_value(name: str, value, hint) -> None:
    """Raise a ValueError if the value of a field is not of its type or beyond its limits."""
    if value is None and type(None) in typing.get_args(hint):
        return
    kind, low, high = split_hint(hint)
    origin, is_list = typing.get_origin(kind), isinstance(value, (tuple, list))
    if kind in (str, bool):
        fits, wanted = type(value) is kind, "text" if kind is str else "True or False"
    elif origin is Literal:
        fits = value in typing.get_args(kind)
        wanted = f"one of {', '.join(typing.get_args(kind))}"
    else:
        whole = kind in (int, ImageSize)
        fits = is_list == (origin is tuple) or kind == ImageSize and len(value) == 2
        for x in value if is_list else [value]:
            is_number = isinstance(x, int if whole else (int, float)) and type(x) is not bool
            fits = fits and is_number and low <= x <= high and abs(x) != math.inf
        limits = f"of {low} or more" if high == math.inf else f"from {low} to {high}"
        wanted = "a list of numbers" if origin is tuple else f"a {'whole ' * whole}number {limits}"
        wanted += ", or two of them" * (kind == ImageSize)
    if not fits:
        raise ValueError(f"--{name.replace('_', '-')} {value} is not {wanted}")


def parse_image_size(text: str) -> ImageSize:
    """'224' -> 224, '192x256' -> (192, 256)."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number or HEIGHTxWIDTH") from None
    return sides[0] if len(sides) == 1 else tuple(sides)


def parse_or_none(parse: Callable, text: str):
    """`parse(text)`, and None for "auto" and "none", of flags whose default is found or is no limit."""
    return None if text.lower() in ("auto", "none") else parse(text)


def help_texts(config_class: type) -> dict[str, str]:
    """{field: the comment behind it in the source} of a config class and its parents."""
    parents = reversed(config_class.__mro__[:-1])  # without `object`
    source = "".join(inspect.getsource(parent) for parent in parents)
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.*)$", source, re.MULTILINE))


def add_flags(parser, config_class: type, presets: dict, docs: dict[str, str]) -> None:
    """Add a flag for each field of a config, with help from `docs`; only those given are parsed."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        name, kind = field.name, split_hint(hints[field.name])[0]
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            options = {"nargs": "+", "type": float}
        else:
            parse = parse_image_size if kind == ImageSize else kind
            if type(None) in typing.get_args(hints[field.name]) and kind is not str:
                parse = functools.partial(parse_or_none, parse)
                parse.__name__ = kind.__name__  # for the error
            options = {"type": parse, "metavar": name.upper()}
        values = {"default": field.default} | {k: x[name] for k, x in presets.items() if name in x}
        shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in values.items() if value is not None]
        text = docs.get(name, "") + (f" ({', '.join(shown)})" if shown else "")
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=text.replace("%", "%%"), **options)


def configure(tasks: dict, model_fields: tuple[type, ...], task: str, preset: str | None,
              given: dict[str, Any]) -> Task:
    """The config of a task: values given > fields of the model in `init` > presets > defaults.

    tasks: {name: (function, config class, {preset: {field: value}})}. model_fields: classes of the
    model's fields, first those of all tasks. preset: "demo" or "paper" (default: "paper" if `data`
    is given); those named as the size, "video" and "demo_video" apply where they fit.
    """
    if task not in tasks:
        raise UserError(f"{task} is not a task: there are {', '.join(tasks)}")
    if preset not in (None, "paper", "demo"):
        raise UserError(f"{preset} is not a preset: there are paper, demo")
    _, config_class, presets = tasks[task]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class, include_extras=True)
    given = {name: str(x) if isinstance(x, Path) else x for name, x in given.items()}
    for name, value in given.items():
        if name not in defaults:
            raise UserError(f"{task} has no {name}")
        build(check_value, name, value, hints[name])

    demo = preset == "demo" or (preset is None and given.get("data") is None)
    saved = saved_fields(given, defaults, model_fields, presets) if given.get("init") else {}
    merged = {**defaults, **(presets.get("demo", {}) if demo else {}), **saved, **given}
    clips = merged.get("frames", 1) > 1
    used = {merged.get("size"): True, "video": clips, "demo": demo, "demo_video": demo and clips}
    levels = [presets.get(name, {}) for name in used if used[name]]  # the later ones win
    values = dict(defaults)
    for level in [*levels, saved, given]:
        if level.get("steps") is not None or level.get("epochs") is not None:
            values |= {"steps": None, "epochs": None}  # either length replaces the other
        values |= level
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}
    return build(config_class, **values)


def saved_fields(given: dict, defaults: dict, model_fields: tuple, presets: dict) -> dict[str, Any]:
    """The model's fields as the checkpoint in `init` says, or else the paper's values."""
    path = given["init"]
    weights, settings = read_weights(path)
    content = settings | encoder_arguments(weights, settings, path)
    paper = defaults | (presets.get("video", {}) if content["frames"] > 1 else {})
    names = [[field.name for field in dataclasses.fields(part)] for part in model_fields]
    # A checkpoint of a classifier, or of another method, says nothing of this method's masks.
    same_method = not settings or all(name in settings for name in sum(names, []))
    names = sum(names, []) if same_method else names[0]
    saved = {name: content.get(name, paper[name]) for name in names if name in defaults}
    for name in ("size", "patch_size", "channels", "tubelet"):
        if name in saved and given.get(name, saved[name]) != saved[name]:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {given[name]} does not fit {path}: {saved[name]}")
    return saved


def parse_command_line(description: str, tasks: dict, words: list[str]) -> tuple:
    """`[task] [flags]` -> (task, preset or None, values of the flags that are given)."""
    script, task = Path(sys.argv[0]).name, next(iter(tasks))
    if words and not words[0].startswith("-"):
        task, *words = words
    if task not in tasks:
        raise UserError(f"{task} is not a task: there are {', '.join(tasks)}")
    lines = [f"  {name:9} {tasks[name][0].__doc__.splitlines()[0]}" for name in tasks]
    parser = argparse.ArgumentParser(
        prog=script, usage=f"{script} [{'|'.join(tasks)}] [flags]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="\n".join([description, "tasks:", *lines, "", f"flags of {task}:"]))
    parser.add_argument("--preset", choices=["paper", "demo"], help="values of all that "
                        "is not given (default: paper with --data, else demo)")
    docs = help_texts(tasks[task][1]) if {"-h", "--help"} & {*words} else {}  # reads source: slow
    add_flags(parser, *tasks[task][1:], docs)

    def fail(message):
        raise UserError(f"{message} (see {script} {task} --help)")
    parser.error = fail
    given = vars(parser.parse_args(words))
    return task, given.pop("preset"), given


def main(description: str, tasks: dict, configure: Callable) -> None:
    """The command line of a script; a user's error is one sentence on stderr and exit code 2."""
    code = 0
    try:
        task, preset, given = parse_command_line(description, tasks, sys.argv[1:])
        tasks[task][0](configure(task, preset, **given))
    except Stopped as stop:
        print_once(str(stop))
        code = 128 + stop.number  # the exit code that a shell gives
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        sentence = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            sentence = ("the GPU is out of memory: use --checkpointing, or more micro-batches "
                        "(--accumulate); the same command then resumes from the last checkpoint")
        elif sentence.startswith("Caught "):  # a worker's whole traceback
            sentence = sentence.strip().splitlines()[-1].partition(": ")[2]
        if os.environ.get("RANK", "0") != "0":
            time.sleep(5)  # if rank 0 fails alike, torchrun ends this one before it repeats it
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {sentence}", sys.stderr)  # beside an open bar
        code = 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    if dist.is_initialized() and code not in (1, 2):
        # Before PyTorch 2.8 its destructor holds Python's lock while it waits for a thread of gloo,
        # which may need the lock to free the last operation's tensors: asleep, we do not hold it.
        time.sleep(0.5)
        dist.destroy_process_group()
    sys.exit(code)


# ------------------------------------------------------------------------------ supervised training


def train_classifier(config, plan: Plan, classes: list[str], model: nn.Module, optimizer,
                     schedule: Callable, loader, samples, test: Callable,
                     mix: Callable | None = None, unit: str = "images") -> None:
    """Train a classifier by cross-entropy; test it after each epoch and at the end.

    schedule(step) -> (learning rate, weight decay); loader, samples: see `data`; test(last) ->
    {metric: value}; mix: MixUp or CutMix of (pixels, labels).
    """
    autocast, scaler = mixed_precision(config.precision, loader.device)
    plan = plan_micro_batches(config, plan, model, loader, samples, autocast)
    checkpoints = Checkpoints(config, plan, model, optimizer, scaler, classes)
    start = checkpoints.resume()
    net = wrap_model(model, config, loader.device)
    batches = loader.train(samples, config, plan, start)
    log, losses = Log(config, plan, start, unit), []

    with StopSignals() as stop:
        for step in log.steps():
            lr, weight_decay = schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
                group["weight_decay"] = weight_decay * group["decays"]

            model.train()
            torch.manual_seed(derive_seed(config.seed, TRAIN_STEP, step, get_rank()))
            for micro_step in range(plan.accumulate):
                pixels, labels, *stamps = next(batches)
                if mix:
                    pixels, labels = mix(pixels, labels)
                net.require_backward_grad_sync = micro_step == plan.accumulate - 1  # of DDP
                with autocast:
                    logits = net(pixels, *stamps)
                    loss = F.cross_entropy(logits, labels, label_smoothing=config.smoothing)
                scaler.scale(loss / plan.accumulate).backward()
                losses.append(loss.detach())
            if config.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            done, stopped = step + 1, stop.received()
            last = done == plan.steps
            metrics = test(last) if last or done % plan.steps_per_epoch == 0 else {}
            if metrics or stopped or config.log_due(done):
                log.write(done, losses, scaler, lr=lr, **metrics)
            checkpoints.save(done, metrics, now=bool(stopped or last))
            if stopped:
                raise Stopped(stopped, done, config.out)
    log.close()
    checkpoints.print_paths()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterator, autocast, verbose: bool) -> dict[str, float]:
    """{"top1", "top5"} in percent over all processes' samples, without those of label -1."""
    model.eval()
    if get_world_size() > 1:
        for buffer in model.buffers():  # BatchNorm's statistics: those of the checkpoint
            dist.broadcast(buffer, 0)
    counts = torch.zeros(3, device=next(model.parameters()).device)  # top 1, top 5, samples
    for pixels, labels, *stamps in batches:
        with autocast:
            logits = model(pixels, *stamps)
        correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5)
        counts += torch.stack([correct[:, 0].sum(), correct.sum(), (labels >= 0).sum()])
    top1, top5, samples = all_reduce(counts).tolist()
    top1, top5 = 100 * top1 / max(1, samples), 100 * top5 / max(1, samples)
    if verbose and get_rank() == 0:
        print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {samples:.0f} validation samples")
    return {"top1": top1, "top5": top5}
