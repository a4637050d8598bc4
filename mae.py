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
"""
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid, save_image

import data
from common import (Block, Log, UserError, ViT, accuracy, barrier, cosine, grid_of, is_rank_0, join_processes,
                    load_strictly, make_folder, mix_seed, no_sync, number_of_processes, open_run,
                    parameter_groups, parse_command_line, patchify, precision_of, read_weights, ridge_probe, run_main,
                    save_run, settings_of, sincos_2d, unpatchify)

# Each entry is (paper's value, demo's value) and also a flag, explained below; a dictionary gives values by model size.
MODEL = {
    "size": ("base", "nano"),
    "image_size": (224, 64),
    "patch_size": ({"base": 16, "large": 16, "huge": 14}, 8),
    "log_every": (50, 10),
    "save_every": (1000, 200),
}
RECIPES = {
    "pretrain": {  # Table 8
        **MODEL,
        "decoder_dim": (512, 64),
        "decoder_depth": (8, 1),
        "decoder_heads": (16, 2),
        "masking": ("random", "random"),
        "mask_ratio": (0.75, 0.75),
        "norm_pix_loss": (True, True),
        "encode_mask_tokens": (False, False),
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
    "show": {  # for published files: those with a decoder were trained on plain pixels. Ours know their own values
        "size": ("base", "base"),
        "image": (None, None),
        "decoder_dim": (512, 512),
        "decoder_depth": (8, 8),
        "decoder_heads": (16, 16),
        "masking": ("random", "random"),
        "mask_ratio": (0.75, 0.75),
        "norm_pix_loss": (False, False),
        "encode_mask_tokens": (False, False),
    },
}
FLAGS = {  # beside those of common.py
    "decoder_dim": (int, "width of the decoder"),
    "decoder_depth": (int, "blocks of the decoder"),
    "decoder_heads": (int, "attention heads of the decoder"),
    "masking": (["random", "block", "grid"], "which patches are hidden"),
    "mask_ratio": (float, "share of the patches that are hidden"),
    "norm_pix_loss": (bool, "normalise the pixels of each target patch by their own mean and deviation"),
    "encode_mask_tokens": (bool, "let the encoder see mask tokens too, for comparison"),
    "min_lr": (float, "learning rate at the end"),
    "pool": (["class", "mean"], "what the classifier reads: the class token, or the mean of the patch tokens"),
    "layer_decay": (float, "factor on the learning rate from one block to the block below"),
    "drop_path": (float, "chance to skip a branch of the last block; rises linearly from the first"),
    "randaugment": (float, "magnitude of RandAugment, 0 to 10"),
    "erasing": (float, "probability of random erasing"),
    "mixup": (float, "alpha of MixUp"),
    "cutmix": (float, "alpha of CutMix"),
    "smoothing": (float, "label smoothing"),
    "eval_only": (bool, "only test the classifier in --init"),
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

    def encode(self, images, mask_ratio, noise):
        """Encode the visible patches only.

        images (B, C, H, W), noise (B, L) -> latent (B, 1 + kept, D), mask (B, L) with 1 = removed, and restore (B, L),
        the place of each patch in the sequence (visible patches first, then the removed ones).
        """
        x = self.embed(images)  # (B, L, D), positions added
        shuffle = noise.argsort(dim=1)  # small is kept, large is removed
        restore = shuffle.argsort(dim=1)
        kept = kept_patches(self.grid, mask_ratio)
        mask = (restore >= kept).float()
        if self.encoder_mask_token is not None:
            x = torch.where(mask[..., None] > 0, self.encoder_mask_token + self.pos_embed[:, 1:], x)
            kept = x.shape[1]
        x = x.gather(1, shuffle[:, :kept, None].expand(-1, -1, self.dim))  # (B, kept, D)
        x = self.add_class_token(x)  # (B, 1 + kept, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, restore

    def decode(self, latent, restore):
        """Predict all patches: (B, 1 + kept, D) -> (B, L, P*P*C)."""
        x = self.decoder_embed(latent)  # (B, 1 + kept, decoder_dim)
        B, L, D = *restore.shape, x.shape[2]
        mask_tokens = self.mask_token.expand(B, L + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)  # (B, L, decoder_dim), visible first
        patches = patches.gather(1, restore[..., None].expand(-1, -1, D))  # back in raster order
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, images):
        """Pixels to predict (B, L, P*P*C), and the mean and deviation that were taken out of each patch (B, L, 1)."""
        pixels = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return pixels, torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
        mean, std = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()  # unbiased variance
        return (pixels - mean) / std, mean, std

    def forward(self, images, mask_ratio=0.75, noise=None):
        """images (B, C, H, W) -> (loss, pred (B, L, P*P*C), mask (B, L) with 1 = removed).

        noise (B, L): the patches with the smallest noise are kept; random by default.
        """
        if noise is None:
            noise = random_noise(len(images), self.grid, mask_ratio, None, images.device)
        latent, mask, restore = self.encode(images, mask_ratio, noise)
        pred = self.decode(latent, restore)
        loss = (pred.float() - self.target(images)[0]).square().mean(dim=-1)  # (B, L): mean over a patch's pixels
        loss = (loss * mask).sum() / mask.sum()  # mean over the removed patches
        return loss, pred, mask


# ------------------------------------------------------------------------------------------------------- pre-training


def new_model(args):
    """The model before training, the same for the same seed; with --init the one to go on from, ours or published."""
    grid = grid_of(args.image_size, args.patch_size)
    if not 0 < kept_patches(grid, args.mask_ratio) < math.prod(grid):
        raise UserError(f"--mask-ratio {args.mask_ratio} hides none or all of the {math.prod(grid)} patches")
    torch.manual_seed(args.seed)
    model = MAE(args.size, args.image_size, args.patch_size, args.channels, args.norm_pix_loss, args.decoder_dim,
                args.decoder_depth, args.decoder_heads, args.encode_mask_tokens)
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
    train_source, val_source, classes = data.open_sources(args.data, args.channels, labelled=False)
    data.complete(args, train_source, device, processes)
    augmentation = data.crop_and_flip(args.image_size, args.mean, args.std, scale=(0.2, 1.0))
    samples = data.Samples(train_source, augmentation, args.seed)

    model = new_model(args).to(device)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    autocast, scaler = precision_of(args, device)
    settings = settings_of(args)
    first_step = open_run(args, settings, model, optimizer, scaler)
    net = DistributedDataParallel(model) if processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = iter(data.training_loader(samples, args, first_step, rank, processes, device))
    generator = torch.Generator(device)
    log = Log(args, first_step, "images")
    for step in range(first_step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Every process draws the masks of the whole batch and takes its rows: their number does not change the run.
        generator.manual_seed(mix_seed(args.seed, step))
        noise = MASKINGS[args.masking](args.batch_size, model.grid, args.mask_ratio, generator, device)
        for part in range(args.accumulate):
            rows = data.rows_of_process(args.batch_size, args.accumulate, part, rank, processes)
            images = next(batches)[0].to(device, non_blocking=True)
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss, _, _ = net(images, args.mask_ratio, noise[rows])
                scaler.scale(loss / args.accumulate).backward()
            log.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.step_done()
        saving = log.stopping or log.step % args.save_every == 0 or log.step == args.steps
        if saving or log.step % args.log_every == 0:
            log.write(loss=log.mean_loss(lr, scaler), lr=lr)  # stops the run before it saves, if it is not finite
        if saving:
            save_run(args, settings, log.step, model, optimizer, scaler)
        if log.stopping:
            log.leave()
    log.close()

    if is_rank_0():
        view = data.CentreCrop(args.image_size, args.mean, args.std)
        val = data.Samples(val_source or train_source, view)
        path = Path(args.out, "reconstruction.png")
        save_picture(path, model, [val[i, 0][0] for i in data.evenly(len(val.source), 8)], args)
        print(f"checkpoint {args.out}/last.pt, log {args.out}/log.jsonl, picture {path}")
        if classes:
            train = data.Samples(train_source, view)
            before, after = (probe(m, train, val, args, device) for m in (new_model(args).to(device), model))
            print(f"linear probe of the frozen encoder on validation images: {before:.1f} % before training, "
                  f"{after:.1f} % after")
    barrier()
    data.report_unreadable(train_source, device)


def probe(model, train, val, args, device, limit=3000):
    """Accuracy in percent of ridge regression on the mean of the patch tokens, with up to `limit` images of each."""

    def features(samples):
        x, y = [], []
        for images, labels in data.test_loader(samples, args, device, limit=limit):
            with torch.no_grad(), precision_of(args, device)[0]:
                tokens = model.eval().tokens(images.to(device))  # (B, 1 + L, D)
            x.append(tokens[:, 1:].float().mean(dim=1).cpu())
            y.append(labels)
        return torch.cat(x), torch.cat(y)

    return ridge_probe(*features(train), *features(val))


# ----------------------------------------------------------------------------------------------------- classification


def new_classifier(args, classes):
    """The encoder in --init (or a new one) with a new head; a finished classifier for --eval-only."""
    torch.manual_seed(args.seed)
    changes = {"image_size": args.image_size, "frames": 1, "tubelet": 1, "pool": args.pool, "num_classes": len(classes)}
    if args.task == "finetune":
        changes["drop_path"] = args.drop_path
    if args.init:
        model = ViT.load(args.init, **changes)
    else:
        model = ViT(args.size, patch_size=args.patch_size, channels=args.channels, **changes)
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
        model.pos_embed.requires_grad_(True)  # the published code trains the positions when it fine-tunes
    return model


def classify(args):
    """The tasks `finetune` (Section 4, Table 9) and `linprobe` (Table 10: the encoder is frozen)."""
    if args.eval_only and not args.init:
        raise UserError("--eval-only needs --init, a checkpoint of a classifier")
    device, rank, processes = join_processes(args.device)
    train_source, val_source, classes = data.open_sources(args.data, args.channels)
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
        data.report_unreadable(val_source, device)
        return

    if args.task == "finetune":
        groups = parameter_groups(model, args.weight_decay, args.layer_decay, no_decay=("cls_token", "pos_embed"))
        optimizer = torch.optim.AdamW(groups, fused=True)
        mix = data.mix_up_and_cut_mix(len(classes), args.mixup, args.cutmix)
    else:
        groups = parameter_groups(model, args.weight_decay)
        optimizer = torch.optim.SGD(groups, lr=args.base_lr, momentum=0.9, fused=True)
        mix = data.mix_up_and_cut_mix(len(classes), 0, 0)
    settings = settings_of(args)
    first_step = open_run(args, settings, model, optimizer, scaler)
    net = DistributedDataParallel(model) if processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = iter(data.training_loader(samples, args, first_step, rank, processes, device))
    log = Log(args, first_step, "images")
    for step in range(first_step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        model.train()
        torch.manual_seed(mix_seed(args.seed, step, rank))  # of drop path, MixUp and CutMix
        for part in range(args.accumulate):
            images, labels = (x.to(device, non_blocking=True) for x in next(batches))
            images, labels = mix(images, labels)
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss = F.cross_entropy(net(images), labels, label_smoothing=args.smoothing)
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
        saving = log.stopping or log.step % args.save_every == 0 or log.step == args.steps
        if tested or saving or log.step % args.log_every == 0:
            log.write(loss=log.mean_loss(lr, scaler), lr=lr, **tested)
        if saving:
            save_run(args, settings, log.step, model, optimizer, scaler)
        if log.stopping:
            log.leave()
    log.close()
    for source in (train_source, val_source):
        data.report_unreadable(source, device)
    if is_rank_0() and first_step < args.steps:
        print(f"checkpoint {args.out}/last.pt, log {args.out}/log.jsonl\n"
              f"top-1 {tested['top1']:.2f} %, top-5 {tested['top5']:.2f} % of {len(val_source)} validation images")


# ---------------------------------------------------------------------------------------------------------- pictures


def save_picture(path, model, images, args):
    """Write a picture with a row per image: original, masked, reconstruction with the visible patches pasted in.

    images: list of normalised (C, H, W). Where the targets are normalised, the prediction gets the mean and deviation
    of the true patch back.
    """
    images = torch.stack(images).to(model.cls_token.device)
    generator = torch.Generator(images.device).manual_seed(mix_seed(args.seed))
    noise = MASKINGS[args.masking](len(images), model.grid, args.mask_ratio, generator, images.device)
    with torch.no_grad():
        _, pred, mask = model.eval()(images, args.mask_ratio, noise)
        _, mean, std = model.target(images)
    patches, hidden = patchify(images, model.patch_size), mask[..., None].bool()
    grey = torch.zeros_like(patches)  # the mean of the data
    rows = [patches, torch.where(hidden, grey, patches), torch.where(hidden, pred * std + mean, patches)]
    rows = torch.stack([unpatchify(row, model.patch_size, model.grid) for row in rows], dim=1).flatten(0, 1).cpu()
    rows = rows * torch.tensor(args.std).view(-1, 1, 1) + torch.tensor(args.mean).view(-1, 1, 1)
    if args.channels not in (1, 3):  # no photograph: stretch what the originals hold to the range of a picture
        low, high = rows[::3].amin((0, 2, 3), keepdim=True), rows[::3].amax((0, 2, 3), keepdim=True)
        rows = (rows - low) / (high - low).clamp(min=1e-6)
    rows = rows[:, :3] if rows.shape[1] >= 3 else rows[:, :1]
    zoom = max(1, 160 // rows.shape[-1])
    rows = F.interpolate(rows.clamp(0, 1), scale_factor=zoom, mode="nearest")
    save_image(make_grid(rows, nrow=3, padding=4, pad_value=1.0), path)


def show(args):
    """Write the picture of `save_picture` for --image, or for some images of --data."""
    if not args.init:
        raise UserError("show needs --init, a checkpoint of a whole MAE")
    if args.image:
        source = data.Files([(args.image, 0)], args.channels)
    else:
        train_source, val_source, _ = data.open_sources(args.data, args.channels, labelled=False)
        source = val_source or train_source
    data.complete(args, source, torch.device("cpu"))
    samples = data.Samples(source, data.CentreCrop(args.image_size, args.mean, args.std))
    model, path = new_model(args), Path(args.out, "reconstruction.png")
    make_folder(args.out)
    save_picture(path, model, [samples[i, 0][0] for i in data.evenly(len(source), 8)], args)
    print(f"picture {path}")


def main():
    args = parse_command_line("mae", __doc__, RECIPES, FLAGS)
    {"pretrain": pretrain, "finetune": classify, "linprobe": classify, "show": show}[args.task](args)


if __name__ == "__main__":
    run_main(main)
