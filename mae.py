"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al. 2021, arXiv 2111.06377.

Hide three quarters of an image's patches, encode the visible quarter only, and let a small decoder fill in the pixels
of the hidden ones from those tokens and a learned mask token. To do that well the encoder has to understand the image.
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

import data
from common import (AUGMENTATION, CHANNELS, CLASSIFICATION, INPUT, MASK_SEED, PICTURE_SEED, SIZES, TRAINING, WATCH, Block,
                    PatchEmbed, Run, UserError, ViT, accuracy, cosine, derive_seed, describe, flag, grid_of,
                    height_x_width, join_processes,
                    load_model, load_strictly, no_sync, parameter_groups, parse_command_line, patchify,
                    precision_of, put, read_weights, run_main, save_pictures, share, sincos, sincos_1d, take,
                    train_classifier, unpatchify, use_checkpointing)

# flag(the paper's value for ViT-B, meaning, kind, values for other sizes and in the demo on the built-in photographs)
MODEL = CHANNELS | dict(
    size=flag("base", "of the encoder", list(SIZES), demo="nano"),
    image_size=flag(224, "pixels, a number or HEIGHTxWIDTH", height_x_width, demo=64),
    patch_size=flag(16, "side of a patch, pixels", huge=14, demo=8),
    bands=flag(None, "groups of channels with tokens of their own, such as 0,1,2/3,4 (SatMAE)", str),
    dates=flag(1, "images of each place, at different times, with tokens of their own (SatMAE)"),
)
AUTOENCODER = dict(
    decoder_dim=flag(512, "width of the decoder", demo=64),
    decoder_depth=flag(8, "blocks of the decoder", demo=1),
    decoder_heads=flag(16, "attention heads of the decoder", demo=2),
    masking=flag("random", "which patches are hidden", ["random", "block", "grid"]),
    mask_ratio=flag(0.75, "share of the patches that are hidden", share),
    norm_pix_loss=flag(True, "normalise the pixels of each target patch by their own mean and deviation"),
    encode_mask_tokens=flag(False, "let the encoder see mask tokens too, for comparison"),
    consistent=flag(False, "hide the same places in all groups of bands, or at all dates"),
)
PRETRAIN = INPUT | MODEL | AUTOENCODER | TRAINING | dict(  # Table 8
    epochs=flag(800.0, "passes over the data", demo=7.5),
    batch_size=flag(4096, "images per step, on all GPUs together", demo=64),
    base_lr=flag(1.5e-4, "learning rate per 256 images of a batch", demo=8e-3),
    warmup=flag(40 / 800, "share of the steps in which the learning rate rises", share),
)
FINETUNE = INPUT | MODEL | TRAINING | CLASSIFICATION | AUGMENTATION | dict(  # Table 9; where FINETUNE.md differs, that
    pool=flag("mean", "what the classifier reads: the class token, or the mean of the patch tokens", ["class", "mean"]),
    epochs=flag(100.0, "passes over the data", large=50.0, huge=50.0, demo=10.0),
    batch_size=flag(1024, "images per step, on all GPUs together", demo=128),
    base_lr=flag(5e-4, "learning rate per 256 images of a batch", large=1e-3, huge=1e-3, demo=2e-3),
    warmup=flag(5 / 100, "share of the steps in which the learning rate rises", share, large=0.1, huge=0.1, demo=0.1),
    layer_decay=flag(0.65, "factor on the learning rate from one block to the block below", large=0.75, huge=0.75,
                     demo=0.75),
    drop_path=flag(0.1, "chance to skip a branch of the last block; rises linearly from the first", share, large=0.2,
                   huge=0.3, demo=0.0),
)
LINPROBE = INPUT | MODEL | TRAINING | CLASSIFICATION | dict(  # Table 10
    pool=flag("class", "what the classifier reads: the class token, or the mean of the patch tokens", ["class", "mean"],
              demo="mean"),
    epochs=flag(90.0, "passes over the data", large=50.0, huge=50.0, demo=10.0),
    batch_size=flag(16384, "images per step, on all GPUs together", demo=256),
    base_lr=flag(0.1, "learning rate per 256 images of a batch"),
    min_lr=flag(0.0, "learning rate at the end of the schedule"),
    warmup=flag(10 / 90, "share of the steps in which the learning rate rises", share, large=0.2, huge=0.2, demo=0.1),
    weight_decay=flag(0.0, "of SGD"),
    smoothing=flag(0.0, "label smoothing", share),
)
SHOW = INPUT | MODEL | AUTOENCODER | dict(
    norm_pix_loss=flag(False, "the predictions are pixels normalised by each patch's own mean and deviation"),
    image=flag(None, "photograph for show (default: some of --data)", str),
)

# ------------------------------------------------------------------------------------------------------------ masking
# A mask is two lists of places, visible (B, N) and hidden (B, M): indices of the L patches in raster order.


def split(noise, ratio):
    """noise (B, L) -> (visible, hidden): the patches with the least noise are visible, int(L * (1 - ratio)) of them."""
    kept = int(noise.shape[1] * (1 - ratio))
    order = noise.argsort(dim=1)
    return order[:, :kept], order[:, kept:]


def random_mask(batch, grid, ratio, generator, device):
    """A random sample of the patches without replacement (Section 3, "Masking")."""
    return split(torch.rand(batch, math.prod(grid), generator=generator, device=device), ratio)


def grid_mask(batch, grid, ratio, generator, device):
    """Keeps one patch of every 2 x 2 at the ratio 0.75 (Figure 6); at 0.5 a chessboard. The same for all images."""
    row, column = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    order = (row + column) % 2 * 2 + row % 2  # in a 2 x 2 cell: first the one diagonal, then the other
    return split(order.flatten() + torch.rand(batch, math.prod(grid), generator=generator, device=device), ratio)


def block_mask(batch, grid, ratio, generator, device):
    """Hides large rectangles (BEiT's block-wise masking, arXiv 2106.08254, Algorithm 1).

    Rectangles of aspect 0.3 to 1/0.3, of at least 8 % of the patches, are laid until none of the number to hide is
    left; one that would hide too many is dropped. What the tries leave open is filled with single patches.
    """
    (rows, columns), places = grid, math.prod(grid)
    left = torch.full((batch, 1), places - int(places * (1 - ratio)), device=device)  # still to hide
    row, column = (x.flatten() for x in torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))
    hidden = torch.zeros(batch, places, dtype=torch.bool, device=device)
    for _ in range(32):
        u = torch.rand(4, batch, 1, generator=generator, device=device)
        smallest = 0.08 * places
        area = smallest + u[0] * (left - smallest).clamp(min=0)
        aspect = torch.exp((2 * u[1] - 1) * math.log(1 / 0.3))
        height = (area * aspect).sqrt().round().clamp(1, rows)
        width = (area / aspect).sqrt().round().clamp(1, columns)
        top, start = (u[2] * (rows - height + 1)).floor(), (u[3] * (columns - width + 1)).floor()
        inside = (row >= top) & (row < top + height) & (column >= start) & (column < start + width)
        new = inside & ~hidden
        new &= new.sum(1, keepdim=True) <= left
        hidden |= new
        left -= new.sum(1, keepdim=True)
    return split(hidden + torch.rand(batch, places, generator=generator, device=device), ratio)


MASKS = {"random": random_mask, "block": block_mask, "grid": grid_mask}

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
        table = F.pad(sincos(decoder_dim, self.grid), (0, 0, 1, 0))  # zeros for the class token
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

    def target(self, images):
        """Pixels to predict (B, L, P*P*C), and the mean and deviation that were taken out of each patch (B, L, 1)."""
        pixels = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return pixels, torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
        mean, std = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()  # unbiased variance
        return (pixels - mean) / std, mean, std

    def forward(self, images, visible, hidden):
        """images (B, C, H, W), places visible (B, N) and hidden (B, M) -> (loss, pred (B, L, P*P*C))."""
        x = self.embed(images)  # (B, L, D), positions added; `encode` adds the class token
        if self.encoder_mask_token is not None:  # hidden patches are replaced by a token, none is dropped: N = L
            positions = take(self.pos_embed[:, 1:].expand_as(x), hidden)  # (B, M, D)
            x = put(x, hidden, self.encoder_mask_token + positions)
            visible = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        x = self.encode(take(x, visible))  # (B, 1 + N, D), the class token first

        x = self.decoder_embed(x)  # (B, 1 + N, decoder_dim)
        mask_tokens = self.mask_token.expand(len(x), math.prod(self.grid), -1)
        tokens = put(mask_tokens, visible, x[:, 1:])  # (B, L, decoder_dim)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed  # (B, 1 + L, decoder_dim)
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x)[:, 1:])  # (B, L, P*P*C)

        target, _, _ = self.target(images)  # (B, L, P*P*C)
        return (take(pred, hidden).float() - take(target, hidden)).square().mean(), pred


# -------------------------------------------------------------------------------------- SatMAE: many bands, many dates
# "SatMAE: Pre-training Transformers for Temporal and Multi-Spectral Satellite Imagery", Cong et al. 2022, arXiv
# 2207.08051: MAE with S slices, groups of bands or dates, each with a token at every place: S * L tokens.


def fixed(table):
    """(L, D) -> a parameter (1, L, D) that is not trained."""
    return nn.Parameter(table.float()[None], requires_grad=False)


def codes_of_stamps(stamps, width):
    """Time stamps (B, T, 3), of year, month and hour -> their sine-cosine codes side by side, (B, T, 3 * width)."""
    return sincos_1d(width, stamps.flatten()).unflatten(0, stamps.shape).flatten(2).float()


def positions_of_slices(table, codes):
    """Positions of class token and places (1, 1 + L, K), codes of slices (1 or B, S, M) -> (1 or B, S * L, K + M)."""
    places = table[:, None, 1:].expand(*codes.shape[:2], -1, -1)
    return torch.cat([places, codes[:, :, None].expand(-1, -1, places.shape[2], -1)], dim=3).flatten(1, 2)


def pick(x, dim, indices):
    """x at some indices of a dimension. `x[:, list]` would copy the list to the GPU and wait for it."""
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
        self.pos_embed = fixed(F.pad(sincos(self.dim - width, self.grid), (0, 0, 1, 0)))
        if bands:
            self.channel_embed = fixed(sincos_1d(width, torch.arange(len(bands))))
            self.patch_embed = nn.ModuleList(PatchEmbed(self.patch_size, len(group), self.dim) for group in bands)
            for embed in self.patch_embed:
                nn.init.xavier_uniform_(embed.proj.weight.flatten(1))

    def embed(self, images, stamps=None):
        """(B, C, [dates,] H, W), and the stamps (B, dates, 3) of dates -> (B, S * L, D), slice by slice."""
        if self.bands:
            x = [embed(pick(images, 1, group)) for embed, group in zip(self.patch_embed, self.bands)]
            codes = self.channel_embed
        else:
            x = [self.patch_embed(image) for image in images.unbind(dim=2)]
            codes = codes_of_stamps(stamps, self.date_width)
        return torch.cat(x, dim=1) + positions_of_slices(self.pos_embed, codes)

    def encode(self, x):
        """As in `ViT`; the position of the class token is zero."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def tokens(self, images, stamps=None):
        return self.encode(self.embed(images, stamps))

    def forward(self, images, stamps=None):
        return self.classify(self.tokens(images, stamps))

    @classmethod
    def load(cls, path, **changes):
        """As `ViT.load`; a checkpoint of ours knows its bands and dates, for a published one give them."""
        settings = read_weights(path)[1]
        return super().load(path, **{"bands": groups_of(settings.get("bands")), "dates": settings.get("dates", 1),
                                     **changes})


class SatMAE(SatelliteViT, MAE):
    """MAE on a `SatelliteViT`: places are numbers of the S * L tokens, targets and predictions lists with an entry
    (B, L, P*P*C) for each slice.
    """

    def __init__(self, *arguments, bands=None, dates=1, **named):
        super().__init__(*arguments, bands=bands, dates=dates, **named)
        decoder_dim = self.decoder_embed.out_features
        self.decoder_date_width = min(64, decoder_dim // 24 * 4)
        width = min(128, decoder_dim // 2) if bands else 3 * self.decoder_date_width
        self.decoder_pos_embed = fixed(F.pad(sincos(decoder_dim - width, self.grid), (0, 0, 1, 0)))
        if bands:
            self.decoder_channel_embed = fixed(sincos_1d(width, torch.arange(len(bands) + 1)))  # the last: class token
            self.decoder_pred = nn.ModuleList(nn.Linear(decoder_dim, len(group) * self.patch_size ** 2)
                                              for group in bands)
            for layer in self.decoder_pred:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def decoder_positions(self, stamps):
        """(1 or B, 1 + S * L, decoder_dim), the class token's first."""
        if self.bands:
            codes, of_class_token = self.decoder_channel_embed[:, :-1], self.decoder_channel_embed[:, -1:]
        else:
            codes = codes_of_stamps(stamps, self.decoder_date_width)
            of_class_token = torch.zeros_like(codes[:, :1])
        of_class_token = F.pad(of_class_token, (self.decoder_pos_embed.shape[2], 0))
        return torch.cat([of_class_token, positions_of_slices(self.decoder_pos_embed, codes)], dim=1)

    def predict(self, x):
        """Decoded tokens (B, S * L, decoder_dim) -> the predictions of each slice."""
        x = x.chunk(self.slices, dim=1)
        if not self.bands:
            return [self.decoder_pred(part) for part in x]
        slots = torch.cat([layer(part).unflatten(2, (len(group), -1))  # (B, L, C, P*P), in the order of the groups
                           for layer, part, group in zip(self.decoder_pred, x, self.bands)], dim=2)
        # As published, output k predicts the k-th lowest band, even where the groups have another order.
        used = sorted(band for group in self.bands for band in group)
        return [pick(slots, 2, [used.index(band) for band in group]).transpose(2, 3).flatten(2) for group in self.bands]

    def target(self, images):
        """As in `MAE`, an entry for each slice. The bands of all groups of a patch are normalised together."""
        if not self.bands:
            return tuple(zip(*(super(SatMAE, self).target(image) for image in images.unbind(dim=2))))
        target, *statistics = super().target(pick(images, 1, [band for group in self.bands for band in group]))
        parts = target.unflatten(2, (self.patch_size ** 2, -1)).split([len(group) for group in self.bands], dim=3)
        return [part.flatten(2) for part in parts], *([x] * self.slices for x in statistics)

    def forward(self, images, visible, hidden, stamps=None):
        """images, stamps as in `embed`, visible (B, N), hidden (B, M) -> (loss, pred of each slice (B, L, P*P*C))."""
        x = self.encode(take(self.embed(images, stamps), visible))  # (B, 1 + N, D)

        x = self.decoder_embed(x)  # (B, 1 + N, decoder_dim)
        mask_tokens = self.mask_token.expand(len(x), self.slices * math.prod(self.grid), -1)
        tokens = put(mask_tokens, visible, x[:, 1:])  # (B, S * L, decoder_dim)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_positions(stamps)
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.predict(self.decoder_norm(x)[:, 1:])

        # The error of every token first, since slices may differ in pixels; each hidden token weighs the same.
        errors = [(p.float() - t).square().mean(dim=2) for p, t in zip(pred, self.target(images)[0])]  # each (B, L)
        return torch.cat(errors, dim=1).gather(1, hidden).mean(), pred


def masks_of_slices(masking, slices, consistent, batch, grid, ratio, generator, device):
    """(visible, hidden) among the S * L tokens. consistent: the same places in all slices. Otherwise, which the paper
    found better, random masks are drawn once among all tokens, and others for each slice by itself.
    """
    if masking == "random" and not consistent:
        return random_mask(batch, (slices, *grid), ratio, generator, device)
    own = 1 if consistent else slices
    first = math.prod(grid) * torch.arange(slices, device=device)[:, None]  # index of each slice's first token
    return tuple((ids.unflatten(0, (batch, own)) + first).flatten(1)
                 for ids in MASKS[masking](batch * own, grid, ratio, generator, device))


# ------------------------------------------------------------------------------------------------------- pre-training


def open_images(args, labelled):
    """Sources of images, scenes of many bands, or series, as in `data.open_sources`; checks --bands and --dates."""
    bands = [band for group in groups_of(args.bands) or () for band in group]
    if bands and args.dates > 1:
        raise UserError("give --bands or --dates, not both")
    if len(set(bands)) < len(bands):
        raise UserError(f"--bands {args.bands} has a band twice")
    if not args.data and not args.init:  # the built-in scenes have as many channels as are asked for
        args.channels = max([args.channels, *(band + 1 for band in bands)])
    if bands and not 0 <= min(bands) <= max(bands) < args.channels:
        raise UserError(f"--bands {args.bands} has a band that is not among the {args.channels} channels, 0 to "
                        f"{args.channels - 1} (--channels)")
    return data.open_sources(args.data, args.channels, labelled, dates=args.dates, scenes=bool(bands),
                             tested=args.init if labelled and args.eval_only else None)


def new_model(args):
    """The model before training, the same for the same seed; with --init the one to go on from, ours or published."""
    patches = math.prod(grid_of(args.image_size, args.patch_size))
    if not 0 < int(patches * (1 - args.mask_ratio)) < patches:
        raise UserError(f"--mask-ratio {args.mask_ratio} hides none or all of the {patches} patches")
    torch.manual_seed(args.seed)
    shape = (args.size, args.image_size, args.patch_size, args.channels, args.norm_pix_loss, args.decoder_dim,
             args.decoder_depth, args.decoder_heads)
    if args.bands or args.dates > 1:
        if args.encode_mask_tokens:
            raise UserError("--encode-mask-tokens is not for --bands or --dates")
        model = SatMAE(*shape, bands=groups_of(args.bands), dates=args.dates)
    else:
        model = MAE(*shape, args.encode_mask_tokens)
    if args.init:
        load_model(model, args, new=("decoder_", "mask_token", "encoder_mask_token"))
    return model


def draw_masks(args, batch, generator, device):
    """Places (visible, hidden) for a batch."""
    grid, slices = grid_of(args.image_size, args.patch_size), len(groups_of(args.bands) or ()) or args.dates
    if slices == 1:
        return MASKS[args.masking](batch, grid, args.mask_ratio, generator, device)
    return masks_of_slices(args.masking, slices, args.consistent, batch, grid, args.mask_ratio, generator, device)


def pretrain(args):
    """The task `pretrain` (Table 8); at its end a picture, and where the images have labels a probe of the features."""
    device = join_processes(args)
    train_source, val_source, classes = open_images(args, labelled=False)  # labels where there are some
    data.settle(args, train_source, val_source, classes)  # fills in args.steps, args.mean and args.std
    samples = data.Samples(train_source, data.crop_and_flip(args.image_size, scale=(0.2, 1.0)), args.seed)
    view = data.CentreCrop(args.image_size)
    train, val = (data.Samples(x, view, replace_unreadable=False) for x in (train_source, val_source or train_source))

    model = new_model(args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)
    autocast, scaler = precision_of(args)
    run = Run(args, model, optimizer, scaler)  # goes on from --out, if there is a run: then run.step > 0
    if args.checkpointing:
        use_checkpointing(model)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = data.training_loader(samples, args, device, run.step)
    generator = torch.Generator(device)
    for step in range(run.step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Every process draws the masks of the whole batch and uses its own rows: the number of GPUs changes nothing.
        generator.manual_seed(derive_seed(args.seed, MASK_SEED, step))
        visible, hidden = draw_masks(args, args.batch_size, generator, device)
        for part in range(args.accumulate):
            rows = data.rows_of_process(args, part)
            images, _, *stamps = next(batches)  # (B, C, H, W), labels; of dates (B, C, dates, H, W) and (B, dates, 3)
            with no_sync(net, last=part == args.accumulate - 1):  # DDP averages gradients after the last micro-batch
                with autocast:
                    loss = net(images, visible[rows], hidden[rows], *stamps)[0]  # the prediction is not kept
                scaler.scale(loss / args.accumulate).backward()
            run.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        found = None  # no look at the features at this step
        if not args.benchmark and ((step + 1) % args.probe_every == 0 or step + 1 == args.steps):
            found = data.watch(features_of(model), train, val, args, device, bool(classes))
            model.train()
        run.step_done(lr, found)  # logs, saves
    run.close()

    if args.rank == 0:
        save_picture(model, val, args, device)
    if classes:
        models = {"before training": new_model(args).to(device), "after": model}
        data.print_probe({when: features_of(m) for when, m in models.items()}, train, val, args, device)
    data.report_unreadable(args, train_source, val_source)


def features_of(model):
    """The function images -> (B, D), the mean of the patch tokens of the encoder."""
    return lambda *images: model.eval().tokens(*images)[:, 1:].float().mean(dim=1)


# ----------------------------------------------------------------------------------------------------- classification


def new_classifier(args, classes):
    """The encoder in --init (or a new one) with a new head; a finished classifier for --eval-only."""
    torch.manual_seed(args.seed)
    kind, shape = ViT, {"image_size": args.image_size, "channels": args.channels, "num_classes": classes}
    if args.bands or args.dates > 1:
        kind, shape = SatelliteViT, {**shape, "bands": groups_of(args.bands), "dates": args.dates}
    if args.task == "finetune":
        shape["drop_path"] = args.drop_path
    if args.init:
        if args.eval_only:
            args.pool = describe(*read_weights(args.init), args.init)["pool"]
        # frames=1: of a checkpoint of clips the error says that its projection does not fit.
        model = kind.load(args.init, frames=1, tubelet=1, pool=args.pool, **shape)
    else:
        model = kind(args.size, patch_size=args.patch_size, pool=args.pool, **shape)
    head = model.head
    nn.init.zeros_(head.bias)
    if args.task == "linprobe":
        nn.init.trunc_normal_(head.weight, std=0.01)
        model.requires_grad_(False)
        head.requires_grad_(True)
        model.head = nn.Sequential(nn.BatchNorm1d(model.dim, affine=False, eps=1e-6), head)
    else:
        nn.init.trunc_normal_(head.weight, std=2e-5)
        for name in ("pos_embed", "channel_embed"):  # the published code trains them when it fine-tunes
            if hasattr(model, name):
                getattr(model, name).requires_grad_(True)
    if args.eval_only:  # all of the file, with its head, which `load` leaves out where it does not fit
        load_strictly(model, read_weights(args.init)[0], args.init)
    return model


def classify(args):
    """The tasks `finetune` (Section 4, Table 9) and `linprobe` (Table 10: the encoder is frozen)."""
    device = join_processes(args)
    train_source, val_source, classes = open_images(args, labelled=True)
    data.settle(args, train_source, val_source, classes)
    if args.task == "linprobe" and args.batch_size // args.accumulate < 2 * args.processes:
        raise UserError("BatchNorm needs at least 2 images in a micro-batch: raise --batch-size")
    val = data.Samples(val_source, data.CentreCrop(args.image_size), replace_unreadable=False)
    model = new_classifier(args, len(classes)).to(device)

    def test(last):
        return accuracy(args, model, data.test_loader(val, args, device), last)

    def schedule(step):
        peak = args.base_lr * args.batch_size / 256
        return cosine(step, args.steps, args.warmup * args.steps, peak, args.min_lr), args.weight_decay

    if args.task == "finetune":
        augmentation, mix = data.strong_augmentation(args), data.mix_up_and_cut_mix(args, len(classes))
        groups = parameter_groups(model, args.weight_decay, args.layer_decay, no_decay=("cls_token", "pos_embed"))
        optimizer = torch.optim.AdamW(groups, fused=True)
    else:
        augmentation, mix = data.crop_and_flip(args.image_size, scale=(0.08, 1.0)), None
        optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), lr=args.base_lr, momentum=0.9)
    if args.eval_only:
        test(last=True)
    else:
        samples = data.Samples(train_source, augmentation, args.seed)
        train_classifier(args, model, optimizer, schedule, lambda first: data.training_loader(
            samples, args, device, first), test, classes, mix)
    data.report_unreadable(args, train_source, val_source)


# ---------------------------------------------------------------------------------------------------------- pictures


def save_picture(model, samples, args, device):
    """Write a picture of some samples: original, masked, reconstruction with the visible patches pasted in.

    Each has a row; with bands or dates a row for each group, whose first three bands are shown as colours, or date.
    Where the targets are normalised, the prediction gets the mean and deviation of the true patch back; a column before
    it has the means alone, so that what the model has added can be seen.
    """
    groups = groups_of(args.bands) or [range(args.channels)] * args.dates
    chosen = data.evenly(len(samples.source), max(1, 4 // len(groups)))
    images, _, *stamps = data.examples(samples, chosen, args, device)
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, PICTURE_SEED))
    visible, hidden = draw_masks(args, len(images), generator, device)
    with torch.no_grad():
        _, pred = model.eval()(images, visible, hidden, *stamps)
        target, mean, std = model.target(images)
    if torch.is_tensor(pred):
        pred, target, mean, std = [pred], [target], [mean], [std]
    rows = []
    is_hidden = torch.zeros(len(images), visible.shape[1] + hidden.shape[1], dtype=torch.bool, device=device)
    is_hidden = is_hidden.scatter(1, hidden, True)[..., None].chunk(len(groups), dim=1)
    for group, p, t, m, s, h in zip(groups, pred, target, mean, std, is_hidden):  # (B, L, P*P*C), from m on (B, L, 1)
        patches = t * s + m
        hidden_as = [0.0, m, p * s + m] if model.norm_pix_loss else [0.0, p]  # in K - 1 columns
        row = [patches, *(torch.where(h, x, patches) for x in hidden_as)]
        row = torch.stack([unpatchify(x, model.patch_size, model.grid) for x in row], dim=1).cpu()  # (B, K, C, H, W)
        of_std, of_mean = (torch.tensor(values)[list(group)].view(-1, 1, 1) for values in (args.std, args.mean))
        row = row * of_std + of_mean
        if args.bands or args.channels not in (1, 3):  # no photograph: stretch it to the range of a picture
            low, high = row[:, :1].amin((0, 1, 3, 4), keepdim=True), row[:, :1].amax((0, 1, 3, 4), keepdim=True)
            row = (row - low) / (high - low).clamp(min=1e-6)
        rows.append(row[:, :, :3] if row.shape[2] >= 3 else row[:, :, :1].expand(-1, -1, 3, -1, -1))
    save_pictures(torch.stack(rows, dim=1).flatten(0, 1).unbind(dim=1), args.out, "reconstruction.png")


def show(args):
    """Write the picture of `save_picture` for --image, or for some images of --data."""
    device, args.data = join_processes(args), args.image or args.data
    if not read_weights(args.init)[1]:
        print(f"{args.init} does not say what it predicts: taken for "
              + ("normalised pixels; --no-norm-pix-loss if it is a mae_visualize_vit_*.pth" if args.norm_pix_loss else
                 "plain pixels, as mae_visualize_vit_*.pth; --norm-pix-loss if it is a mae_pretrain_vit_*_full.pth"))
    train_source, val_source, _ = open_images(args, labelled=False)
    source = val_source or train_source
    data.settle(args, source)
    samples = data.Samples(source, data.CentreCrop(args.image_size))
    save_picture(new_model(args).to(device), samples, args, device)


TASKS = {"pretrain": (pretrain, PRETRAIN, WATCH), "finetune": (classify, FINETUNE, {}),
         "linprobe": (classify, LINPROBE, {}), "show": (show, SHOW, {})}


def main():
    args = parse_command_line("mae", __doc__, TASKS, MODEL | AUTOENCODER)
    TASKS[args.task][0](args)


if __name__ == "__main__":
    run_main(main)
