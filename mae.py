"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al. 2021, arXiv 2111.06377.

Hide three quarters of an image's patches, encode the visible quarter only, and let a small decoder fill in the pixels
of the hidden ones from those codes and a learned mask token. To do that well the encoder has to understand the image.
It never sees a mask token, which makes it both better and cheaper; the decoder is thrown away afterwards.

    images (B, C, H, W)
      | cut into L patches of P x P pixels, project, add positions             (B, L, D)
      | keep a random quarter, put the class token before it                   (B, 1 + L/4, D)
    encoder: ViT                                                               (B, 1 + L/4, D)
      | project to the decoder's width, put mask tokens at the hidden places,
      | add positions                                                          (B, 1 + L, decoder_dim)
    decoder: a narrow ViT, then a linear layer to pixels                       (B, L, P*P*C)
      | squared error to the normalised pixels of the hidden patches
    loss

    python mae.py                                      pre-train on the photographs that ship with scikit-image
    torchrun --nproc_per_node=8 mae.py --data DIR      the paper's recipe on your images, 8 GPUs
    python mae.py finetune --data DIR --init runs/mae/last.pt
    python mae.py linprobe --data DIR --init runs/mae/last.pt
    python mae.py show --init runs/mae/last.pt --image photo.jpg
    python mae.py --bands 0,1,2/3,4/5 --out runs/bands      SatMAE on scenes of six bands; --dates 3: at three dates
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate

import data
from common import (Block, Log, PatchEmbed, UserError, ViT, accuracy, cosine, grid_of, is_rank_0, join_processes,
                    load_strictly, mix_seed, no_sync, number_of_processes, open_run, parameter_groups,
                    parse_command_line, patchify, precision_of, read_weights, ridge_probe, run_main, save_pictures,
                    sincos_1d, sincos_2d, unpatchify)

# Each entry is (paper's value, demo's value) and also a flag, explained below; a dictionary gives values by model size.
MODEL = {
    "size": ("base", "nano"),
    "image_size": (224, 64),
    "patch_size": ({"base": 16, "large": 16, "huge": 14}, 8),
    "bands": (None, None),
    "dates": (1, 1),
}
AUTOENCODER = {
    "decoder_dim": (512, 64),
    "decoder_depth": (8, 1),
    "decoder_heads": (16, 2),
    "masking": ("random", "random"),
    "mask_ratio": (0.75, 0.75),
    "norm_pix_loss": (True, True),
    "encode_mask_tokens": (False, False),
    "consistent": (False, False),
}
RECIPES = {
    "pretrain": {  # Table 8
        **MODEL,
        **AUTOENCODER,
        "steps": (None, 700),
        "epochs": (800, None),
        "batch_size": (4096, 64),
        "base_lr": (1.5e-4, 8e-3),
        "warmup": (40 / 800, 0.05),
        "weight_decay": (0.05, 0.05),
    },
    "finetune": {  # Table 9; where the published FINETUNE.md differs, that
        **MODEL,
        "pool": ("mean", "mean"),
        "epochs": ({"base": 100, "large": 50, "huge": 50}, 10),
        "batch_size": (1024, 128),
        "base_lr": ({"base": 5e-4, "large": 1e-3, "huge": 1e-3}, 2e-3),
        "min_lr": (1e-6, 1e-6),
        "warmup": ({"base": 5 / 100, "large": 5 / 50, "huge": 5 / 50}, 0.1),
        "weight_decay": (0.05, 0.05),
        "layer_decay": ({"base": 0.65, "large": 0.75, "huge": 0.75}, 0.75),
        "drop_path": ({"base": 0.1, "large": 0.2, "huge": 0.3}, 0.0),
        "randaugment": (9.0, 0.0),
        "erasing": (0.25, 0.0),
        "mixup": (0.8, 0.0),
        "cutmix": (1.0, 0.0),
        "smoothing": (0.1, 0.1),
        "eval_only": (False, False),
    },
    "linprobe": {  # Table 10
        **MODEL,
        "pool": ("class", "mean"),
        "epochs": ({"base": 90, "large": 50, "huge": 50}, 10),
        "batch_size": (16384, 256),
        "base_lr": (0.1, 0.1),
        "min_lr": (0.0, 0.0),
        "warmup": ({"base": 10 / 90, "large": 10 / 50, "huge": 10 / 50}, 0.1),
        "weight_decay": (0.0, 0.0),
        "smoothing": (0.0, 0.0),
        "eval_only": (False, False),
    },
    # The published files with a decoder were trained on plain pixels; ours know their own values.
    "show": {**MODEL, **AUTOENCODER, "norm_pix_loss": (False, False), "image": (None, None)},
}
FLAGS = {  # beside those of common.py
    "decoder_dim": (int, "width of the decoder"),
    "decoder_depth": (int, "blocks of the decoder"),
    "decoder_heads": (int, "attention heads of the decoder"),
    "masking": (["random", "block", "grid"], "which patches are hidden"),
    "mask_ratio": (float, "share of the patches that are hidden"),
    "norm_pix_loss": (bool, "normalise the pixels of each target patch by their own mean and deviation"),
    "encode_mask_tokens": (bool, "let the encoder see mask tokens too, for comparison"),
    "bands": (str, "groups of channels with tokens of their own, such as 0,1,2/3,4 (SatMAE)"),
    "dates": (int, "images of each place, at different times, with tokens of their own (SatMAE)"),
    "consistent": (bool, "hide the same places in all groups of bands, or at all dates"),
    "pool": (["class", "mean"], "what the classifier reads: the class token, or the mean of the patch tokens"),
    "image": (str, "photograph for show (default: some of --data)"),
}

# ------------------------------------------------------------------------------------------------------------ masking
# A mask is given as noise (batch, L): the patches with the smallest noise are kept, as in the published code.


def random_noise(batch, grid, ratio, generator, device):
    """Uniform noise: a random sample of the patches without replacement (Section 3, "Masking")."""
    return torch.rand(batch, math.prod(grid), generator=generator, device=device)


def grid_noise(batch, grid, ratio, generator, device):
    """Keeps one patch of every 2 x 2 at the ratio 0.75 (Figure 6); at 0.5 a chessboard. The same for all images."""
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    order = (row + column) % 2 * 2 + row % 2  # in a 2 x 2 cell: first the one diagonal, then the other
    return order.flatten() + random_noise(batch, grid, ratio, generator, device)


def block_noise(batch, grid, ratio, generator, device):
    """Removes large rectangles (BEiT's block-wise masking, arXiv 2106.08254, Algorithm 1).

    Rectangles of aspect 0.3 to 1/0.3, of at least 8 % of the patches, are laid until none of the number to remove is
    left; one that would remove too many is dropped. What the tries leave open is filled with single patches.
    """
    rows, columns = grid
    left = torch.full((batch, 1), math.prod(grid) - kept_patches(grid, ratio), device=device)  # still to remove
    row, column = (x.flatten() for x in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
    removed = torch.zeros(batch, rows * columns, dtype=torch.bool, device=device)
    for _ in range(32):
        u = torch.rand(4, batch, 1, generator=generator, device=device)
        smallest = 0.08 * rows * columns
        area = smallest + u[0] * (left - smallest).clamp(min=0)
        aspect = torch.exp((2 * u[1] - 1) * math.log(1 / 0.3))
        height = (area * aspect).sqrt().round().clamp(1, rows)
        width = (area / aspect).sqrt().round().clamp(1, columns)
        top, start = (u[2] * (rows - height + 1)).floor(), (u[3] * (columns - width + 1)).floor()
        inside = (row >= top) & (row < top + height) & (column >= start) & (column < start + width)
        new = inside & ~removed
        new &= new.sum(1, keepdim=True) <= left
        removed |= new
        left -= new.sum(1, keepdim=True)
    return removed + random_noise(batch, grid, ratio, generator, device)


MASKINGS = {"random": random_noise, "block": block_noise, "grid": grid_noise}


def kept_patches(grid, ratio):
    return int(math.prod(grid) * (1 - ratio))


# -------------------------------------------------------------------------------------------------------------- model


class MAE(ViT):
    """The encoder, which is the ViT that it inherits, and the decoder. `image_size` is an int or (H, W).

    encode_mask_tokens: for comparison, the encoder gets a mask token at each hidden place as well (Table 1c).
    """

    def __init__(self, size="base", image_size=224, patch_size=16, channels=3, norm_pix_loss=True, decoder_dim=512,
                 decoder_depth=8, decoder_heads=16, encode_mask_tokens=False):
        super().__init__(size, image_size, patch_size, channels)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(self.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, self.dim)) if encode_mask_tokens else None
        table = F.pad(sincos_2d(decoder_dim, self.grid), (0, 0, 1, 0))  # zeros for the class token
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * channels)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.patch_embed.proj.reset_parameters()
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # like a linear layer, not like a convolution
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def encode(self, images, mask_ratio, noise, *dates):
        """Encode the visible patches only.

        images (B, C, H, W), noise (B, L) -> latent (B, 1 + kept, D), mask (B, L) with 1 = removed, and restore (B, L),
        the place of each patch in the sequence (visible patches first, then the removed ones).
        """
        x = self.embed(images, *dates)  # (B, L, D), positions added
        shuffle = noise.argsort(dim=1)  # small is kept, large is removed
        restore = shuffle.argsort(dim=1)
        kept = self.kept(mask_ratio)
        mask = (restore >= kept).float()
        if self.encoder_mask_token is not None:
            x = torch.where(mask[..., None] > 0, self.encoder_mask_token + self.pos_embed[:, 1:], x)
            kept = x.shape[1]
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, self.dim))  # (B, kept, D)
        x = self.add_class_token(x)  # (B, 1 + kept, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def decode(self, latent, restore, *dates):
        """Predict all patches: (B, 1 + kept, D) -> (B, L, P*P*C)."""
        x = self.decoder_embed(latent)  # (B, 1 + kept, decoder_dim)
        B, L, D = *restore.shape, x.shape[2]
        mask_tokens = self.mask_token.expand(B, L + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)  # (B, L, decoder_dim), visible first
        patches = patches.gather(1, restore[..., None].expand(-1, -1, D))  # back in raster order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_positions(*dates)
        for block in self.decoder_blocks:
            x = block(x)
        return self.predict(self.decoder_norm(x)[:, 1:])

    def target(self, images):
        """Pixels to predict (B, L, P*P*C), and the mean and deviation that were taken out of each patch (B, L, 1)."""
        pixels = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return pixels, torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
        mean, std = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()  # unbiased variance
        return (pixels - mean) / std, mean, std

    def errors(self, pred, images):
        """Squared error of each patch, the mean over its pixels: (B, L)."""
        return (pred.float() - self.target(images)[0]).square().mean(dim=-1)

    def forward(self, images, mask_ratio=0.75, noise=None, *dates):
        """images (B, C, H, W) -> (loss, pred (B, L, P*P*C), mask (B, L) with 1 = removed).

        noise (B, L): the patches with the smallest noise are kept; random by default.
        """
        if noise is None:
            noise = self.noise("random", len(images), mask_ratio, None, images.device)
        latent, mask, restore = self.encode(images, mask_ratio, noise, *dates)
        pred = self.decode(latent, restore, *dates)
        loss = (self.errors(pred, images) * mask).sum() / mask.sum()  # mean over the removed patches
        return loss, pred, mask

    # The rest of MAE, in methods of its own because SatMAE, below, does it in another way.

    def noise(self, masking, batch, mask_ratio, generator, device):
        """Noise (batch, L) for one of the `MASKINGS`."""
        return MASKINGS[masking](batch, self.grid, mask_ratio, generator, device)

    def kept(self, mask_ratio):
        """How many tokens the encoder sees."""
        return kept_patches(self.grid, mask_ratio)

    def decoder_positions(self):
        """(1, 1 + L, decoder_dim), the class token's first."""
        return self.decoder_pos_embed

    def predict(self, x):
        """(B, L, decoder_dim) -> (B, L, P*P*C)."""
        return self.decoder_pred(x)


# -------------------------------------------------------------------------------------- SatMAE: many bands, many dates
# "SatMAE: Pre-training Transformers for Temporal and Multi-Spectral Satellite Imagery", Cong et al. 2022, arXiv
# 2207.08051: MAE with S tokens at each place, one for each group of bands or for each date. Above, L becomes S * L.


def fixed(table):
    """(L, D) -> a parameter (1, L, D) that is not trained."""
    return nn.Parameter(table.float()[None], requires_grad=False)


def codes_of_dates(dates, width):
    """Time stamps (B, T, 3), of year, month and hour -> their sine-cosine codes side by side, (B, T, 3 * width)."""
    return sincos_1d(width, dates.flatten()).unflatten(0, dates.shape).flatten(2).float()


def positions_of_slices(table, codes):
    """Positions of class token and places (1, 1 + L, K), codes of slices (1 or B, S, M) -> (1 or B, S * L, K + M)."""
    places = table[:, None, 1:].expand(*codes.shape[:2], -1, -1)
    return torch.cat([places, codes[:, :, None].expand(-1, -1, places.shape[2], -1)], dim=3).flatten(1, 2)


def pick(x, dim, indices):
    """x at some indices of a dimension. With a list as index, a GPU would be waited for."""
    return torch.stack([x.select(dim, index) for index in indices], dim)


def groups_of(bands):
    """The groups of --bands: "0,1,2/3,4" -> ((0, 1, 2), (3, 4)), None -> None."""
    try:
        return bands and tuple(tuple(int(band) for band in group.split(",")) for group in bands.split("/"))
    except ValueError:
        raise UserError(f"--bands {bands} is not a list of groups such as 0,1,2/3,4") from None


class SatelliteViT(ViT):
    """A ViT on images of many bands, or of one place at several dates. The rest as in `ViT`.

    bands: groups of channels, such as ((0, 1, 2), (3, 4)), each with its own projection. Other channels are not used.
    dates: without bands, the number of dates. Images are (B, C, dates, H, W), with their time stamps (B, dates, 3).
    The end of a token's position is the sine-cosine code of its group, or of the year, month and hour of its date.
    """

    def __init__(self, *arguments, bands=None, dates=1, **named):
        super().__init__(*arguments, **named)
        self.bands, self.slices = bands, len(bands) if bands else dates
        self.date_width = min(128, self.dim // 24 * 4)  # the published widths, where the model is wide enough
        width = min(256, self.dim // 2) if bands else 3 * self.date_width
        self.pos_embed = fixed(F.pad(sincos_2d(self.dim - width, self.grid), (0, 0, 1, 0)))
        if bands:
            self.channel_embed = fixed(sincos_1d(width, torch.arange(len(bands))))
            self.patch_embed = nn.ModuleList(PatchEmbed(self.patch_size, len(group), self.dim) for group in bands)
            for embed in self.patch_embed:
                nn.init.xavier_uniform_(embed.proj.weight.flatten(1))

    def embed(self, images, dates=None):
        """(B, C, [dates,] H, W), and the stamps (B, dates, 3) of dates -> (B, S * L, D), slice by slice."""
        if self.bands:
            x = [embed(pick(images, 1, group)) for embed, group in zip(self.patch_embed, self.bands)]
            codes = self.channel_embed
        else:
            x = [self.patch_embed(image) for image in images.unbind(dim=2)]
            codes = codes_of_dates(dates, self.date_width)
        return torch.cat(x, dim=1) + positions_of_slices(self.pos_embed, codes)

    def add_class_token(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # its position is zero

    @classmethod
    def load(cls, path, **changes):
        """As `ViT.load`; a checkpoint of ours knows its bands and dates, for a published one give them."""
        settings = read_weights(path)[1]
        return super().load(path, **{"bands": groups_of(settings.get("bands")), "dates": settings.get("dates", 1),
                                     **changes})


class SatMAE(SatelliteViT, MAE):
    """MAE on a `SatelliteViT`: predictions and targets are lists with an entry (B, L, P*P*C) for each of the S slices.

    consistent: hide the same places in all slices; else each slice has its own, which the paper found better.
    """

    def __init__(self, *arguments, bands=None, dates=1, consistent=False, decoder_dim=512, **named):
        super().__init__(*arguments, bands=bands, dates=dates, decoder_dim=decoder_dim, **named)
        self.consistent, self.decoder_date_width = consistent, min(64, decoder_dim // 24 * 4)
        width = min(128, decoder_dim // 2) if bands else 3 * self.decoder_date_width
        self.decoder_pos_embed = fixed(F.pad(sincos_2d(decoder_dim - width, self.grid), (0, 0, 1, 0)))
        if bands:
            self.decoder_channel_embed = fixed(sincos_1d(width, torch.arange(len(bands) + 1)))  # the last: class token
            self.decoder_pred = nn.ModuleList(nn.Linear(decoder_dim, len(group) * self.patch_size ** 2)
                                              for group in bands)
            for layer in self.decoder_pred:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def noise(self, masking, batch, mask_ratio, generator, device):
        if self.consistent:
            return super().noise(masking, batch, mask_ratio, generator, device).repeat(1, self.slices)
        return super().noise(masking, batch * self.slices, mask_ratio, generator, device).reshape(batch, -1)

    def kept(self, mask_ratio):
        places = math.prod(self.grid)
        return self.slices * int(places * (1 - mask_ratio)) if self.consistent else int(
            self.slices * places * (1 - mask_ratio))

    def decoder_positions(self, dates=None):
        if self.bands:
            codes, of_class_token = self.decoder_channel_embed[:, :-1], self.decoder_channel_embed[:, -1:]
        else:
            codes = codes_of_dates(dates, self.decoder_date_width)
            of_class_token = torch.zeros_like(codes[:, :1])
        of_class_token = F.pad(of_class_token, (self.decoder_pos_embed.shape[2], 0))
        return torch.cat([of_class_token, positions_of_slices(self.decoder_pos_embed, codes)], dim=1)

    def predict(self, x):
        x = x.chunk(self.slices, dim=1)
        if not self.bands:
            return [self.decoder_pred(part) for part in x]
        slots = torch.cat([layer(part).unflatten(2, (len(group), -1))  # (B, L, C, P*P), in the order of the groups
                           for layer, part, group in zip(self.decoder_pred, x, self.bands)], dim=2)
        # The published code takes the k-th of them for the k-th band, though the groups may have another order.
        used = sorted(band for group in self.bands for band in group)
        return [pick(slots, 2, [used.index(band) for band in group]).transpose(2, 3).flatten(2) for group in self.bands]

    def target(self, images):
        if not self.bands:
            return tuple(zip(*(super(SatMAE, self).target(image) for image in images.unbind(dim=2))))
        target, *statistics = super().target(pick(images, 1, [band for group in self.bands for band in group]))
        parts = target.unflatten(2, (self.patch_size ** 2, -1)).split([len(group) for group in self.bands], dim=3)
        return [part.flatten(2) for part in parts], *([x] * self.slices for x in statistics)

    def errors(self, pred, images):
        target, _, _ = self.target(images)
        return torch.cat([(p.float() - t).square().mean(dim=2) for p, t in zip(pred, target)], dim=1)


# ------------------------------------------------------------------------------------------------------- pre-training


def check_bands(args):
    """Check --bands and --dates; the built-in scenes get as many channels as --bands asks for."""
    if args.bands and args.dates > 1:
        raise UserError("give --bands or --dates, not both")
    every = [band for group in groups_of(args.bands) or () for band in group]
    if len(set(every)) < len(every):
        raise UserError(f"--bands {args.bands} has a band twice")
    if not args.data and not args.init:
        args.channels = max([args.channels] + [band + 1 for band in every])
    if every and (max(every) >= args.channels or min(every) < 0):
        raise UserError(f"--bands {args.bands} has a band that is not among the {args.channels} channels, 0 to "
                        f"{args.channels - 1} (--channels)")


def open_images(args, labelled):
    """Sources of images, scenes of many bands, or series, as in `data.open_sources`."""
    check_bands(args)
    return data.open_sources(args.data, args.channels, labelled, dates=args.dates, scenes=bool(args.bands))


def new_model(args):
    """The model before training, the same for the same seed; with --init the one to go on from, ours or published."""
    grid = grid_of(args.image_size, args.patch_size)
    if not 0 < kept_patches(grid, args.mask_ratio) < math.prod(grid):
        raise UserError(f"--mask-ratio {args.mask_ratio} hides none or all of the {math.prod(grid)} patches")
    torch.manual_seed(args.seed)
    shape = (args.size, args.image_size, args.patch_size, args.channels, args.norm_pix_loss)
    decoder = {name: getattr(args, name) for name in ("decoder_dim", "decoder_depth", "decoder_heads")}
    if args.bands or args.dates > 1:
        if args.encode_mask_tokens:
            raise UserError("--encode-mask-tokens is not for --bands or --dates")
        model = SatMAE(*shape, **decoder, bands=groups_of(args.bands), dates=args.dates, consistent=args.consistent)
    else:
        model = MAE(*shape, **decoder, encode_mask_tokens=args.encode_mask_tokens)
    if args.init:
        weights, _ = read_weights(args.init)
        if "decoder_embed.weight" not in weights:
            raise UserError(f"{args.init} holds no decoder: {args.task} needs a whole MAE, such as "
                            "mae_visualize_vit_base.pth or a last.pt of pre-training")
        for name in ("pos_embed", "decoder_pos_embed"):
            if name in weights and weights[name].shape != getattr(model, name).shape:
                weights[name] = getattr(model, name)  # another image size: the fixed table of that size
        load_strictly(model, weights, args.init)
    return model


def pretrain(args):
    device, rank, processes = join_processes(args.device)
    train_source, val_source, classes = open_images(args, labelled=False)
    data.complete(args, train_source, device, processes)
    augmentation = data.crop_and_flip(args.image_size, args.mean, args.std, scale=(0.2, 1.0))
    samples = data.Samples(train_source, augmentation, args.seed)

    model = new_model(args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    autocast, scaler = precision_of(args, device)
    first_step = open_run(args, model, optimizer, scaler)
    net = DistributedDataParallel(model) if processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = data.training_loader(samples, args, first_step, rank, processes, device)
    generator = torch.Generator(device)
    log = Log(args, first_step, "images")
    for step in range(first_step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Every process draws the masks of the whole batch and takes its rows: their number does not change the run.
        generator.manual_seed(mix_seed(args.seed, step))
        noise = model.noise(args.masking, args.batch_size, args.mask_ratio, generator, device)
        for part in range(args.accumulate):
            rows = data.rows_of_process(args.batch_size, args.accumulate, part, rank, processes)
            images, _, *dates = next(batches)
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss, _, _ = net(images, args.mask_ratio, noise[rows], *dates)
                scaler.scale(loss / args.accumulate).backward()
            log.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.step_done()
        if log.due:
            log.write(loss=log.mean_loss(lr, scaler), lr=lr)  # stops the run before it saves, if it is not finite
        log.save_or_leave(model, optimizer, scaler)
    log.close()

    if is_rank_0():
        view = data.CentreCrop(args.image_size, args.mean, args.std)
        val = data.Samples(val_source or train_source, view, replace=False)
        save_picture(model, val, args)
        print(f"checkpoint {args.out}/last.pt, log {args.out}/log.jsonl")
        if classes:
            train = data.Samples(train_source, view, replace=False)
            before, after = (probe(m, train, val, args, device) for m in (new_model(args).to(device), model))
            print(f"linear probe of the frozen encoder on validation images: {before:.1f} % before training, "
                  f"{after:.1f} % after")
    data.report_unreadable(train_source, val_source)


def probe(model, train, val, args, device, limit=3000):
    """Accuracy in percent of ridge regression on the mean of the patch tokens, with up to `limit` images of each."""

    def encode(*images):
        return model.eval().tokens(*images)[:, 1:].float().mean(dim=1)  # (B, D)

    return ridge_probe(*(x for samples in (train, val) for x in data.features(encode, samples, args, device, limit)))


# ----------------------------------------------------------------------------------------------------- classification


def new_classifier(args, classes):
    """The encoder in --init (or a new one) with a new head; a finished classifier for --eval-only."""
    torch.manual_seed(args.seed)
    changes = {"image_size": args.image_size, "frames": 1, "tubelet": 1, "pool": args.pool, "num_classes": len(classes)}
    if args.task == "finetune":
        changes["drop_path"] = args.drop_path
    kind, changes["channels"] = ViT, args.channels
    if args.bands or args.dates > 1:
        kind, changes = SatelliteViT, {**changes, "bands": groups_of(args.bands), "dates": args.dates}
    if args.init:
        model = kind.load(args.init, **changes)
    else:
        model = kind(args.size, patch_size=args.patch_size, **changes)
    head = model.head
    nn.init.zeros_(head.bias)
    if args.task == "linprobe":
        if args.batch_size and args.batch_size // args.accumulate < 2 * number_of_processes():
            raise UserError("BatchNorm needs at least 2 images in a pass of a process: raise --batch-size")
        nn.init.trunc_normal_(head.weight, std=0.01)
        model.requires_grad_(False)
        head.requires_grad_(True)
        model.head = nn.Sequential(nn.BatchNorm1d(model.dim, affine=False, eps=1e-6), head)
    else:
        nn.init.trunc_normal_(head.weight, std=2e-5)
        for name in ("pos_embed", "channel_embed"):  # the published code trains them when it fine-tunes
            if hasattr(model, name):
                getattr(model, name).requires_grad_(True)
    return model


def classify(args):
    """The tasks `finetune` (Section 4, Table 9) and `linprobe` (Table 10: the encoder is frozen)."""
    device, rank, processes = join_processes(args.device)
    train_source, val_source, classes = open_images(args, labelled=True)
    data.complete(args, train_source, device, processes)
    args.num_classes = len(classes)
    if args.task == "finetune":
        augmentation = data.strong_augmentation(args.image_size, args.mean, args.std, args.randaugment, args.erasing)
    else:
        augmentation = data.crop_and_flip(args.image_size, args.mean, args.std, scale=(0.08, 1.0))
    samples = data.Samples(train_source, augmentation, args.seed)
    val = data.Samples(val_source, data.CentreCrop(args.image_size, args.mean, args.std), replace=False)
    val_batches = data.test_loader(val, args, device, rank, processes)

    model = new_classifier(args, classes).to(device)
    autocast, scaler = precision_of(args, device)
    if args.eval_only:
        load_strictly(model, read_weights(args.init)[0], args.init)
        top1, top5 = accuracy(model, val_batches, device, autocast)
        if is_rank_0():
            print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(val_source)} validation images")
        data.report_unreadable(val_source)
        return

    if args.task == "finetune":
        groups = parameter_groups(model, args.weight_decay, args.layer_decay, no_decay=("cls_token", "pos_embed"))
        optimizer = torch.optim.AdamW(groups, fused=True)
    else:
        groups = parameter_groups(model, args.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=args.base_lr, momentum=0.9)
    mix = data.mix_up_and_cut_mix(len(classes), args.mixup or 0, args.cutmix or 0)  # none in linprobe
    first_step = open_run(args, model, optimizer, scaler)
    net = DistributedDataParallel(model) if processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = data.training_loader(samples, args, first_step, rank, processes, device)
    log = Log(args, first_step, "images")
    for step in range(first_step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        model.train()
        torch.manual_seed(mix_seed(args.seed, step, rank))  # of drop path, MixUp and CutMix
        for part in range(args.accumulate):
            images, labels, *dates = next(batches)
            images, labels = mix(images, labels)
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss = F.cross_entropy(net(images, *dates), labels, label_smoothing=args.smoothing)
                scaler.scale(loss / args.accumulate).backward()
            log.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.step_done()
        tested = {}
        if log.step % max(1, len(train_source) // args.batch_size) == 0 or log.step == args.steps:  # each epoch
            tested["top1"], tested["top5"] = accuracy(model, val_batches, device, autocast)
        if tested or log.due:
            log.write(loss=log.mean_loss(lr, scaler), lr=lr, **tested)
        log.save_or_leave(model, optimizer, scaler)
    log.close()
    data.report_unreadable(train_source, val_source)
    if is_rank_0() and first_step < args.steps:
        print(f"checkpoint {args.out}/last.pt, log {args.out}/log.jsonl\n"
              f"top-1 {tested['top1']:.2f} %, top-5 {tested['top5']:.2f} % of {len(val_source)} validation images")


# ---------------------------------------------------------------------------------------------------------- pictures


def save_picture(model, samples, args):
    """Write a picture of some samples: original, masked, reconstruction with the visible patches pasted in.

    Each has a row; with bands or dates a row for each group, whose first three bands are shown as colours, or date.
    Where the targets are normalised, the prediction gets the mean and deviation of the true patch back.
    """
    device, groups = model.cls_token.device, groups_of(args.bands) or [range(args.channels)] * args.dates
    chosen = data.evenly(len(samples.source), max(1, 8 // len(groups)))
    images, _, *dates = (x.to(device) for x in default_collate([samples[index, 0] for index in chosen]))
    generator = torch.Generator(device).manual_seed(mix_seed(args.seed))
    noise = model.noise(args.masking, len(images), args.mask_ratio, generator, device)
    with torch.no_grad():
        _, pred, mask = model.eval()(images, args.mask_ratio, noise, *dates)
        target, mean, std = model.target(images)
    if torch.is_tensor(pred):
        pred, target, mean, std = [pred], [target], [mean], [std]
    rows = []
    hidden = mask[..., None].bool().chunk(len(groups), dim=1)
    for group, p, t, m, s, h in zip(groups, pred, target, mean, std, hidden):  # (B, L, P*P*C), from m on (B, L, 1)
        patches = t * s + m
        row = [patches, torch.where(h, 0.0, patches), torch.where(h, p * s + m, patches)]
        row = torch.stack([unpatchify(x, model.patch_size, model.grid) for x in row], dim=1).cpu()  # (B, 3, C, H, W)
        of_group = [torch.tensor(values)[list(group)].view(-1, 1, 1) for values in (args.std, args.mean)]
        row = row * of_group[0] + of_group[1]
        if args.bands or args.channels not in (1, 3):  # no photograph: stretch it to the range of a picture
            low, high = row[:, :1].amin((0, 1, 3, 4), keepdim=True), row[:, :1].amax((0, 1, 3, 4), keepdim=True)
            row = (row - low) / (high - low).clamp(min=1e-6)
        rows.append(row[:, :, :3] if row.shape[2] >= 3 else row[:, :, :1].expand(-1, -1, 3, -1, -1))
    save_pictures(torch.stack(rows, dim=1).flatten(0, 1).unbind(dim=1), args.out, "reconstruction.png")


def show(args):
    """Write the picture of `save_picture` for --image, or for some images of --data."""
    args.data = args.image or args.data
    train_source, val_source, _ = open_images(args, labelled=False)
    source = val_source or train_source
    data.complete(args, source, torch.device("cpu"))
    samples = data.Samples(source, data.CentreCrop(args.image_size, args.mean, args.std))
    save_picture(new_model(args), samples, args)


def main():
    args = parse_command_line("mae", __doc__, RECIPES, FLAGS)
    {"pretrain": pretrain, "finetune": classify, "linprobe": classify, "show": show}[args.task](args)


if __name__ == "__main__":
    run_main(main)
