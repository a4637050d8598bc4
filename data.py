"""Images and clips in, batches out: the photographs that ship with scikit-image, folders of images or videos, CIFAR-10.

A *source* is a map-style dataset of (pixels, label): a PIL image, a float tensor (C, H, W) where there are not 1 or 3
channels, a clip (T, C, H, W) of bytes, or a series of images of a place, (dates, C, H, W) and, as a third item, its
stamps (dates, 3): years since 2002, months and hours from 0. `Samples` adds the augmentation, `step_batches` decides
which samples make up which step. Every draw of a sample has its own seed, so what a step sees depends on (seed, step)
alone: not on the number of workers or processes, nor on whether the run was interrupted.
"""
import functools
import itertools
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.datasets import CIFAR10
from torchvision.transforms import InterpolationMode, v2

from common import UserError, barrier, height_and_width, is_rank_0, mix_seed, precision_of, sum_over_processes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy", ".npz"}
VIDEO_FILES = {".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}

# ------------------------------------------------------------------------------------------------------------ sources


class Photographs(Dataset):
    """Crops of the photographs that ship with scikit-image; the label says which photograph.

    Training crops come from the first 60 % of a photograph along its longer side and validation crops from the rest, so
    that recognising a photograph is not remembering a crop. A crop is a square of 96 to 160 pixels.
    """
    classes = ["astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
               "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle"]

    def __init__(self, train, channels=3, length=6000):
        import skimage.data
        self.regions, self.length = [], length
        for name in self.classes:
            photograph = getattr(skimage.data, name)()
            photograph = photograph[0] if isinstance(photograph, tuple) else photograph  # the stereo pair: the left one
            image = Image.fromarray(photograph).convert("RGB" if channels == 3 else "L")
            width, height = image.size
            cut = int(0.6 * max(image.size))
            if width >= height:
                box = (0, 0, cut, height) if train else (cut, 0, width, height)
            else:
                box = (0, 0, width, cut) if train else (0, cut, width, height)
            self.regions.append(image.crop(box))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index * len(self.classes) // self.length  # sorted by class, as a folder is
        region = self.regions[label]
        width, height = region.size
        draw = torch.Generator().manual_seed(mix_seed(index))  # a picture is the same at every draw
        side = min(width, height, int(torch.randint(96, 161, (), generator=draw)))
        left = int(torch.randint(width - side + 1, (), generator=draw))
        top = int(torch.randint(height - side + 1, (), generator=draw))
        return region.crop((left, top, left + side, top + side)), label


class Scenes(Photographs):
    """Scenes as if seen by a satellite, made of the photographs: `channels` bands, at several dates.

    A band is a mixture of the colours, the last like near infrared (bright where there is green), with noise. At each
    date the light is another: it goes by month and hour, and by chance.
    """

    def __init__(self, train, channels, dates=1, length=6000):
        super().__init__(train, 3, length)
        self.dates = dates
        self.mixtures = np.random.default_rng(0).dirichlet(np.ones(3), channels)  # (C, 3), each with the sum 1
        self.mixtures[-1] = (-0.5, 2.0, -0.5)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        draw = np.random.default_rng(index)
        bands = np.asarray(image) / 255 @ self.mixtures.T  # (H, W, C)
        stamps = np.stack([draw.integers(16, size=self.dates), draw.integers(12, size=self.dates),
                           draw.integers(24, size=self.dates)], axis=1)
        light = 1 - 0.2 * np.cos(stamps[:, 1:] * (2 * math.pi / 12, math.pi / 12)).sum(axis=1)  # (dates,)
        light = light * draw.uniform(0.8, 1.2, self.dates)
        series = light[:, None, None, None] * bands + draw.normal(0, 0.03, (self.dates, *bands.shape))
        pixels = torch.from_numpy(series.astype(np.float32)).permute(0, 3, 1, 2)  # (dates, C, H, W)
        return (pixels[0], label) if self.dates == 1 else (pixels, label, torch.from_numpy(stamps).float())


class Clips(Dataset):
    """Clips of a virtual camera that moves over the photographs: pans in 8 directions, zooms, rolls. No download.

    A clip is (T, C, 64, 64). Its label is the photograph, the motion, or both: label = photograph * 12 + motion.
    The regions of training and validation are those of `Photographs`, at half their size. With twice the stride the
    camera goes twice as far.
    """
    motions = [f"pan {direction}" for direction in ("right", "down right", "down", "down left", "left", "up left", "up",
                                                    "up right")] + ["zoom in", "zoom out", "roll left", "roll right"]
    side = 64  # pixels of a frame

    def __init__(self, train, frames, channels=3, label=None, length=6000, stride=4):
        regions = Photographs(train, channels).regions
        self.regions = [region.resize((region.width // 2, region.height // 2), Image.LANCZOS) for region in regions]
        self.frames, self.label, self.length, self.speed = frames, label, length, stride / 4
        both = [f"{photograph}, {motion}" for photograph in Photographs.classes for motion in self.motions]
        self.classes = {"photograph": Photographs.classes, "motion": self.motions, None: both}[label]

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        photograph = index * len(self.regions) // self.length
        region = self.regions[photograph]
        draw = np.random.default_rng(index)  # a clip is the same at every draw
        motion, strength = int(draw.integers(len(self.motions))), draw.uniform(0.5, 1)
        time = self.speed * strength * np.linspace(-0.5, 0.5, self.frames)
        x, y, zoom, angle = np.zeros((4, self.frames))  # the camera: x and y in sides of the picture, angle in radians
        if motion < 8:
            x, y = 0.6 * time * np.cos(motion * math.pi / 4), 0.6 * time * np.sin(motion * math.pi / 4)
        elif motion < 10:
            zoom = 0.7 * time * (-1 if motion == 8 else 1)  # a smaller window shows things larger
        else:
            angle = 0.8 * time * (1 if motion == 10 else -1)
        half = np.exp(zoom) * (abs(np.cos(angle)) + abs(np.sin(angle))) / 2
        reach = [(abs(x) + half).max(), (abs(y) + half).max()]  # from the middle, sides: the camera stays in the region
        side = min(draw.uniform(48, 80), region.width / (2 * reach[0]), region.height / (2 * reach[1]))
        middle = [side * r + draw.uniform() * (length - 2 * side * r) for r, length in zip(reach, region.size)]

        film = Image.new(region.mode, (self.side, self.frames * self.side))  # the frames, one below the other
        for t in range(self.frames):  # PIL asks where in the region each pixel of the frame comes from
            step = side / self.side * math.exp(zoom[t])
            cos, sin = step * math.cos(angle[t]), step * math.sin(angle[t])
            corner = [middle[0] + side * x[t] - (cos - sin) * self.side / 2,
                      middle[1] + side * y[t] - (cos + sin) * self.side / 2]
            where = (cos, -sin, corner[0], sin, cos, corner[1])
            frame = region.transform((self.side, self.side), Image.AFFINE, where, Image.BILINEAR)
            film.paste(frame, (0, t * self.side))
        label = {"photograph": photograph, "motion": motion, None: photograph * len(self.motions) + motion}[self.label]
        pixels = torch.from_numpy(np.array(film).reshape(self.frames, self.side, self.side, -1))
        return pixels.permute(0, 3, 1, 2), label


class Files(Dataset):
    """Files with labels, [(path, label)]: images, or with frames > 1 videos and folders of frames (see `read_clip`), or
    with dates > 1 folders of images of a place (see `read_series`).
    """

    def __init__(self, found, channels=3, frames=1, stride=1, dates=1):
        self.channels, self.frames, self.stride, self.dates = channels, frames, stride, dates
        self.views = None  # clips of a video: one at a random time, or a number of clips evenly over it
        # Arrays and not lists: workers share their memory, where each would end up with a copy of a list's objects.
        self.names = np.array([os.fsencode(name) for name, _ in found])
        self.labels = np.array([label for _, label in found])
        self.unreadable = torch.zeros(len(found), dtype=torch.bool).share_memory_()  # one memory for all workers

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if self.dates > 1:
            pixels, stamps = read_series(self.path(index), self.dates, self.channels, chosen_at_random=not self.views)
            return pixels, int(self.labels[index]), stamps
        if self.frames > 1:
            pixels = read_clip(self.path(index), self.frames, self.stride, self.views, self.channels)
        else:
            pixels = read_image(self.path(index), self.channels)
        return pixels, int(self.labels[index])

    def path(self, index):
        return os.fsdecode(self.names[index])


def find_files(root, classes=None, clips=False, series=False):
    """[(path, label)] of all images below a folder, at any depth; given class names, below the folders of these names.

    With `clips`, of all videos, and of all folders that hold images and no video: each is one clip. With `series`, of
    all folders that hold images.
    """
    found, kinds = [], set() if series else VIDEO_FILES if clips else IMAGE_FILES
    for label, folder in enumerate([root] if classes is None else [Path(root, name) for name in classes]):
        for where, _, names in os.walk(folder, followlinks=True):
            suffixes = {name: os.path.splitext(name)[1].lower() for name in names}
            files = [os.path.join(where, name) for name in names if suffixes[name] in kinds]
            if (clips or series) and not files and IMAGE_FILES & set(suffixes.values()):
                files = [where]
            found += [(name, label) for name in files]
    if not found:
        wanted = "folder of images" if series else "video and no folder of frames" if clips else "image"
        raise UserError(f"there is no {wanted} below {root}")
    return sorted(found)


def read_list(path, classes=None):
    """([(path, label)], class names or None) of a text file of `path label` lines, or of paths alone.

    Paths are relative to the folder of the list. Labels are numbers or names; `classes` are those of the training list.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is neither a folder nor a list of paths") from None
    if not lines:
        raise UserError(f"{path} is empty")
    folder, pairs, known = Path(path).parent, [line.rsplit(maxsplit=1) for line in lines], IMAGE_FILES | VIDEO_FILES
    if not all(len(pair) == 2 and Path(pair[1]).suffix.lower() not in known for pair in pairs):  # paths alone
        return [(str(folder / line), 0) for line in lines], None
    names = {name for _, name in pairs}
    classes = classes or sorted(names, key=lambda name: (int(name) if name.isdecimal() else -1, name))
    if names - set(classes):
        raise UserError(f"{path} has the label {min(names - set(classes))}, which the training list lacks")
    number = {name: label for label, name in enumerate(classes)}
    return [(str(folder / name), number[label]) for name, label in pairs], classes


def read_image(path, channels=3):
    """A PIL image (RGB, or grey for 1 channel), or a float tensor (C, H, W) for any other number of channels."""
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".npz"):  # (H, W) or (H, W, C); mapped: no larger than the file
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".npz":
            if array.zip.infolist()[0].file_size > 16 * Image.MAX_IMAGE_PIXELS:
                raise ValueError("it claims a size that could be a decompression bomb")
            array = array[array.files[0]]
    elif suffix in (".tif", ".tiff") and channels not in (1, 3):
        from tifffile import TiffFile  # scikit-image's reader
        with TiffFile(path) as file:
            if math.prod(file.series[0].shape) > 16 * Image.MAX_IMAGE_PIXELS:
                raise ValueError("it claims a size that could be a decompression bomb")
            array = file.asarray()
        if array.ndim == 3 and array.shape[2] != channels:  # a page for each channel
            array = array.transpose(1, 2, 0)
    else:
        image = Image.open(path)
        if channels in (1, 3) and not image.mode.startswith(("I", "F")):
            return image.convert("RGB" if channels == 3 else "L")
        array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] == 1 and channels == 3:  # 16-bit grey
        array = array.repeat(3, axis=-1)
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"it has the shape {array.shape}, not {channels} channels")
    scale = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1  # integers to [0, 1], real numbers as they are
    if not np.isfinite(array).all():
        raise ValueError("it has values that are not finite")
    return torch.from_numpy((array / scale).astype(np.float32)).permute(2, 0, 1)


def read_series(folder, dates, channels, chosen_at_random):
    """(images (dates, C, H, W), stamps (dates, 3)) of a folder of images of one place, whose names tell the time.

    A name has year, month, day and, if known, hour, such as 2016-03-24T10.tif. Of more images, so many are taken, at
    random or evenly.
    """
    names = sorted(name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_FILES)
    pattern = r"(?<!\d)((?:19|20)\d\d)[-_]?(0[1-9]|1[0-2])[-_]?(?:0[1-9]|[12]\d|3[01])(?:T([01]\d|2[0-3])|(?!\d))"
    times = [re.search(pattern, name) for name in names]
    if not all(times):
        raise ValueError(f"{names[times.index(None)]} has no date in its name, such as 2016-03-24T10")
    if len(names) < dates:
        raise ValueError(f"it has {len(names)} images, fewer than {dates} dates")
    at_random = torch.randperm(len(names))[:dates].sort().values.tolist()
    chosen = at_random if chosen_at_random else evenly(len(names), dates)
    images = [read_image(os.path.join(folder, names[i]), channels) for i in chosen]
    images = [x if torch.is_tensor(x) else v2.functional.to_dtype(v2.functional.pil_to_tensor(x), scale=True)
              for x in images]
    if len({image.shape for image in images}) > 1:
        raise ValueError("its images differ in size")
    stamps = [[int(times[i][1]) - 2002, int(times[i][2]) - 1, int(times[i][3] or 0)] for i in chosen]
    return torch.stack(images), torch.tensor(stamps, dtype=torch.float32)


def read_clip(path, frames, stride, views=None, channels=3):
    """A clip (T, C, H, W), bytes: every `stride`-th frame of a video file or of a folder of frames.

    It begins at a random time, drawn from torch's generator; with `views`, so many clips evenly over the video are
    returned as (views, T, C, H, W). A video that is too short repeats its last frame. Time goes by the mean frame rate,
    so that a variable one does not bend the motion. Of a file, only the frames asked for are read, and those that their
    compression depends on.
    """
    if os.path.isdir(path):  # in the order of the numbers in their names; a gap is closed up
        names = sorted((name for name in os.listdir(path) if os.path.splitext(name)[1].lower() in IMAGE_FILES),
                       key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
        length = len(names)
    else:
        try:
            from torchcodec.decoders import VideoDecoder
            decoder = VideoDecoder(path)
        except (ImportError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("Could not load libtorchcodec"):
                raise  # the file is at fault; else torchcodec is missing, or does not find FFmpeg
            raise UserError(f"to read {path}, install torchcodec (pip install torchcodec) and FFmpeg with its shared "
                            "libraries (apt-get install ffmpeg)") from None
        begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        length = max(1, int((end - begin) * decoder.metadata.average_fps + 0.01))
    latest = max(0, length - 1 - (frames - 1) * stride)  # the last time to begin
    if views is None:
        starts = torch.randint(latest + 1, (1,))
    else:
        starts = torch.linspace(0, latest, views).round() if views > 1 else torch.tensor([latest // 2])
    times = (starts[:, None] + stride * torch.arange(frames)).clamp(max=length - 1).flatten()  # (views * T,)
    if os.path.isdir(path):
        images = {i: read_image(os.path.join(path, names[i])) for i in set(times.int().tolist())}
        images = {i: x if torch.is_tensor(x) else v2.functional.pil_to_tensor(x) for i, x in images.items()}
        pixels = torch.stack([images[i] for i in times.int().tolist()])
    else:
        seconds = begin + (times + 0.5) * (end - begin) / length  # the middle of a frame's time on the screen
        pixels = decoder.get_frames_played_at(seconds.tolist()).data
    pixels = v2.functional.rgb_to_grayscale(pixels) if channels == 1 else pixels
    return pixels if views is None else pixels.unflatten(0, (views, frames))


def open_sources(data, channels=3, labelled=True, frames=1, stride=1, label=None, dates=1, scenes=False):
    """(training source, validation source or None, class names or None) for --data: None, "cifar10", a folder, a list.

    A folder is DIR/train/<class>/... with DIR/val/<class>/... or DIR/test/<class>/..., or DIR/train.txt with
    DIR/val.txt or DIR/test.txt; where no labels are needed (labelled=False) it is any folder or list, and DIR/train
    alone is used if there is one. With frames > 1 the samples are clips, with dates > 1 series of images. label: of the
    built-in clips, see `Clips`. scenes: instead of the built-in photographs, `Scenes`.
    """
    if data is None and (scenes or dates > 1):
        return Scenes(True, channels, dates), Scenes(False, channels, dates, 1500), Photographs.classes
    if (data is None or frames > 1) and channels not in (1, 3):
        raise UserError(f"{'clips' if frames > 1 else 'the built-in photographs'} have 1 or 3 channels, not {channels}"
                        + ("" if data else ": give --data"))
    if data is None and frames > 1:
        train, val = (Clips(train, frames, channels, label, length, stride)
                      for train, length in ((True, 6000), (False, 1500)))
        return train, val, train.classes
    if data is None:
        return Photographs(True, channels), Photographs(False, channels, 1500), Photographs.classes
    if data == "cifar10":
        if channels != 3 or frames > 1 or dates > 1:
            raise UserError("CIFAR-10 has images of 3 channels and no clips")
        try:
            if is_rank_0():  # torchvision keeps the files in ./data
                CIFAR10("data", download=True)
            barrier()
            train, val = (CIFAR10("data", train=train) for train in (True, False))
        except (OSError, RuntimeError) as error:
            raise UserError(f"CIFAR-10 could not be downloaded to ./data: {error}") from None
        return train, val, train.classes

    root, kind, kinds = Path(data), (channels, frames, stride, dates), (frames > 1, dates > 1)
    train_list = root if root.is_file() else root / "train.txt"
    if not root.exists():
        raise UserError(f"there is no file or folder {root}")
    if not labelled and root.is_file() and root.suffix.lower() in IMAGE_FILES | VIDEO_FILES:  # for `show`
        return Files([(root, 0)], *kind), None, None
    if train_list.is_file():
        found, classes = read_list(train_list)
        val_list = next((p for p in (root / "val.txt", root / "test.txt") if p.is_file()), None)
        val_found, val_classes = read_list(val_list, classes) if classes and val_list else (None, None)
        if labelled and not val_classes:
            raise UserError(f"{root} needs the lists train.txt and val.txt (or test.txt), of lines of `path label`")
        train, val = Files(found, *kind), Files(val_found, *kind) if val_classes else None
    else:
        train = root / "train" if (root / "train").is_dir() else root
        val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        classes, val_classes = (sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
                                if folder else [] for folder in (train, val))
        if train == root or not classes or not val_classes:
            if labelled:
                raise UserError(f"{root} needs the folders train/<class>/ and val/<class>/ (or test/<class>/)")
            return Files(find_files(train, None, *kinds), *kind), None, None
        unknown = [name for name in val_classes if name not in classes]
        if unknown:
            raise UserError(f"{val} has the class folder {unknown[0]}, which {train} lacks")
        train, val = (Files(find_files(folder, classes, *kinds), *kind) for folder in (train, val))
    if val:
        val.views = 1
    return train, val, classes if val else None


# --------------------------------------------------------------------------------------------------------- transforms

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


class Normalise:
    """PIL image or any tensor -> float tensor (..., C, H, W): integers scaled to [0, 1], then (x - mean) / std.

    clips: the tensors are (..., C, T, H, W). bytes_later: bytes stay bytes, for `training_loader` to normalise.
    """

    def __init__(self, mean, std, clips=False, bytes_later=False, device=None):
        shape = (-1, 1, 1, 1) if clips else (-1, 1, 1)
        self.mean, self.std = (torch.tensor(values, device=device).view(shape) for values in (mean, std))
        self.bytes_later = bytes_later

    def __call__(self, image):
        image = image if torch.is_tensor(image) else v2.functional.pil_to_tensor(image)
        if self.bytes_later and image.dtype == torch.uint8:
            return image
        largest = 1 if image.is_floating_point() else torch.iinfo(image.dtype).max
        # A single copy, in the order (C, H, W) where PIL has (H, W, C), and the rest in place: half the time.
        image = image.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return image.div_(largest).sub_(self.mean).div_(self.std)


def crop_and_flip(image_size, mean, std, scale, flip=True, ratio=(3 / 4, 4 / 3), interpolation=BICUBIC):
    """Random resized crop of an area share in `scale`, flip: the whole augmentation of pre-training.

    This and the transforms below draw once for all frames of a clip (T, C, H, W).
    """
    return v2.Compose([v2.RandomResizedCrop(height_and_width(image_size), scale, ratio, interpolation),
                       v2.RandomHorizontalFlip(0.5 if flip else 0.0), Normalise(mean, std, bytes_later=True)])


def strong_augmentation(image_size, mean, std, randaugment, erasing, flip=True, operations=2):
    """Augmentation of fine-tuning: random crop, flip, RandAugment (magnitude 0 to 10), erasing (a probability)."""
    crop, flip, _ = crop_and_flip(image_size, mean, std, (0.08, 1.0), flip).transforms
    # The papers, as timm, count RandAugment's magnitude to 10, torchvision to 30. It is for 1 or 3 channels only.
    fill = [int(255 * value) for value in mean]
    colours = [v2.RandAugment(operations, round(3 * randaugment), interpolation=BILINEAR, fill=fill)]
    return v2.Compose([crop, flip, *(colours if randaugment and len(mean) in (1, 3) else []), Normalise(mean, std),
                       v2.RandomErasing(erasing, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value="random")])


class CentreCrop:
    """The view at test time: the shorter side resized to size / 0.875 (from 256 to 224), and the centre cut out.

    An image that already has the right size, as in CIFAR-10, is taken as it is.
    """

    def __init__(self, image_size, mean, std):
        self.size, self.normalise = height_and_width(image_size), Normalise(mean, std)

    def __call__(self, image):
        height, width = v2.functional.get_size(image)
        if (height, width) != self.size:
            factor = max(self.size[0] / height, self.size[1] / width) / 0.875
            larger = [max(side, round(factor * old)) for side, old in zip(self.size, (height, width))]
            image = v2.functional.resize(image, larger, BICUBIC)
            image = v2.functional.center_crop(image, list(self.size))
        return self.normalise(image)


class SpatialViews(CentreCrop):
    """`views` squares evenly along the longer side, each as large as the shorter side: [..., T, C, H, W] ->
    (views, [...,] T, C, size, size). A single view is that of `CentreCrop`, also of a PIL image.
    """

    def __init__(self, image_size, mean, std, views):
        super().__init__(image_size, mean, std)
        self.views = views

    def __call__(self, image):
        if self.views == 1:
            return super().__call__(image)[None]
        factor = max(self.size[0] / image.shape[-2], self.size[1] / image.shape[-1])
        larger = [max(side, round(factor * old)) for side, old in zip(self.size, image.shape[-2:])]
        image = self.normalise(v2.functional.resize(image, larger, BILINEAR))
        spare = [large - side for large, side in zip(larger, self.size)]
        corners = [[s * view // (self.views - 1) for s in spare] for view in range(self.views)]
        return torch.stack([image[..., y:y + self.size[0], x:x + self.size[1]] for y, x in corners])


class Repeated:
    """A transform of images that repeats its result in time, as a clip of a still: -> (..., T, C, H, W)."""

    def __init__(self, transform, frames):
        self.transform, self.frames = transform, frames

    def __call__(self, image):
        pixels = self.transform(image).unsqueeze(-4)
        return pixels.expand(*pixels.shape[:-4], self.frames, *pixels.shape[-3:])


def mix_up_and_cut_mix(num_classes, mixup, cutmix):
    """Of a batch (images or clips, labels): MixUp or CutMix, each half of the time; labels become (B, num_classes)."""
    choices = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
               if alpha > 0]

    def mix(pixels, labels):
        if not choices:
            return pixels, labels
        kind = tv_tensors.Video if pixels.ndim == 5 else tv_tensors.Image
        pixels, labels = v2.RandomChoice(choices)(kind(pixels), labels)
        return pixels.as_subclass(torch.Tensor), labels
    return mix


def measure_mean_and_std(source, image_size, images=1000):
    """Mean and standard deviation of each channel over up to `images` images evenly taken from a source."""
    samples = Samples(source, CentreCrop(image_size, [0.0], [1.0]))
    sums, squares, count = 0, 0, 0
    for index in evenly(len(source), images):
        image = samples[index, 0][0].double()
        image = (image.transpose(0, 1) if image.ndim == 5 else image).flatten(1)  # (C, [views * T *] H * W)
        sums, squares, count = sums + image.sum(1), squares + image.square().sum(1), count + image.shape[1]
    mean = sums / count
    std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    # Rounded, so that a run goes on although another machine measures another last digit.
    return [[float(f"{value:.4g}") for value in values.tolist()] for values in (mean, std)]


# ------------------------------------------------------------------------------------------------------------ batches


class Samples(Dataset):
    """A source with its augmentation: (index, position) -> (image (C, H, W) or clip ([views,] C, T, H, W), label).

    Augmentation and time of a clip are seeded by (seed, position), where position is the place of the draw in the whole
    run. Unreadable files are named once and counted by their source. The next readable one takes their place; without
    `replace`, as in a test, which must not count a sample twice, with the label -1.
    """

    def __init__(self, source, transform, seed=0, replace=True):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace
        if not any(self.read(index) for index in range(len(source))):
            raise UserError(f"none of the files can be read, for instance {source.path(0)}")

    def read(self, index):
        try:
            return self.source[index]
        except Exception as error:  # damaged files make the decoders fail in many ways
            if isinstance(error, UserError) or not isinstance(self.source, Files):
                raise
            if not self.source.unreadable[index]:
                self.source.unreadable[index] = True
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                print(f"\nskipped, since it cannot be read: {self.source.path(index)} ({reason})", file=sys.stderr)

    def __getitem__(self, item):
        index, position = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, position))
            readable = index
            while (sample := self.read(readable)) is None:
                readable = (readable + 1) % len(self.source)
            pixels, label, *dates = sample
            pixels, label = self.transform(pixels), label if self.replace or readable == index else -1
        return (pixels.transpose(-4, -3) if pixels.ndim > 3 else pixels), label, *dates


def evenly(length, count):
    """Up to `count` indices, evenly taken from range(length)."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def rows_of_process(batch_size, accumulate, part, rank, processes):
    """The rows of the global batch that one process takes in one of its `accumulate` passes, as a slice."""
    share = batch_size // (accumulate * processes)
    start = (part * processes + rank) * share
    return slice(start, start + share)


def step_batches(length, args, first_step, rank, processes):
    """The (index, position) pairs of each pass of each step from `first_step` on, for one process.

    Position p of the run is in epoch p // length. An epoch is a permutation seeded by (seed, epoch); the last batch of
    an epoch is filled from the next one.
    """
    order, epoch = None, None
    for step in range(first_step, args.steps):
        for part in range(args.accumulate):
            rows = rows_of_process(args.batch_size, args.accumulate, part, rank, processes)
            batch = []
            for position in range(step * args.batch_size + rows.start, step * args.batch_size + rows.stop):
                if position // length != epoch:
                    epoch = position // length
                    order = np.random.default_rng((args.seed, epoch)).permutation(length)
                batch.append((int(order[position % length]), position))
            yield batch


def ignore_signals(worker):
    """For a worker: a signal often goes to all processes of a run, and a worker ends when the one it serves does.

    Only the first SIGTERM is ignored: the next may come from that one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def stack(normalise, samples):
    """A batch of samples. Bytes stay bytes, unless there are floats among them, which are normalised already."""
    if any(pixels.dtype != torch.uint8 for pixels, *_ in samples):
        samples = [(normalise(pixels) if pixels.dtype == torch.uint8 else pixels, *rest) for pixels, *rest in samples]
    return default_collate(samples)


def training_loader(samples, args, first_step, rank, processes, device):
    """Batches of this process for the steps from `first_step` to `args.steps`, `args.accumulate` of them a step.

    They are on the device, or on their way to it. Bytes are normalised there: less work and less to move for workers.
    """
    if args.benchmark:  # the same random numbers at every step
        pixels, *rest = default_collate([samples[0, 0]] * (args.batch_size // (args.accumulate * processes)))
        return itertools.repeat((torch.randn(pixels.shape, device=device), *(x.to(device) for x in rest)))
    clips = getattr(args, "frames", 1) > 1
    here, there = (Normalise(args.mean, args.std, clips, device=place) for place in ("cpu", device))

    def on_device(batch):
        pixels, *rest = (x.to(device, non_blocking=True) for x in batch)
        return there(pixels) if pixels.dtype == torch.uint8 else pixels, *rest

    batches = step_batches(len(samples.source), args, first_step, rank, processes)
    return map(on_device, DataLoader(samples, batch_sampler=batches, num_workers=args.workers,
                                     collate_fn=functools.partial(stack, here), pin_memory=device.type == "cuda",
                                     worker_init_fn=ignore_signals))


def test_loader(samples, args, device, rank=0, processes=1, limit=None):
    """Each sample once, in order, every process its own ones; with `limit`, that many samples evenly taken from all."""
    chosen = evenly(len(samples.source), limit or len(samples.source))[rank::processes]
    size = max(1, 128 // (getattr(args, "frames", 1) * (getattr(samples.source, "views", None) or 1)))
    batches = [[(index, 0) for index in chosen[i:i + size]] for i in range(0, len(chosen), size)]
    return DataLoader(samples, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda",
                      worker_init_fn=ignore_signals)


@torch.no_grad()
def features(encode, samples, args, device, limit):
    """(encode(pixels), labels (N,)) of up to `limit` samples, evenly taken, without unreadable files."""
    x, y = [], []
    for pixels, labels, *dates in test_loader(samples, args, device, limit=limit):
        pixels = pixels.flatten(0, 1) if pixels.ndim == 6 else pixels  # a single view of each video
        with precision_of(args, device)[0]:
            x.append(encode(pixels.to(device), *(stamps.to(device) for stamps in dates)))
        y.append(labels)
    x, y = torch.cat(x), torch.cat(y)
    x = x.cpu() if device.type == "mps" else x  # a probe computes in float64, which MPS does not have
    return x[y >= 0], y[y >= 0].to(x.device)


def by_label(source, labels):
    """{name: labels}: the built-in clips have two labels, photograph and motion, everything else has one."""
    if isinstance(source, Clips):
        return {"photograph": labels // len(source.motions), "motion": labels % len(source.motions)}
    return {"class": labels}


def report_unreadable(*sources):
    """Wait for all processes, and say how many files of each source they could not read so far, together."""
    barrier()
    for source in sources:
        if isinstance(source, Files):
            bad = int((sum_over_processes(source.unreadable.int()) > 0).sum())
            if is_rank_0() and bad:
                print(f"{bad} of {len(source)} files could not be read and were skipped", file=sys.stderr)


def complete(args, source, device, processes=1):
    """Check and fill in what depends on the data and the machine: mean and deviation, steps, workers, compile."""
    if bool(args.mean) != bool(args.std):
        raise UserError("give both --mean and --std, or neither")
    if args.measure or (not args.mean and args.channels != 3):
        args.mean, args.std = measure_mean_and_std(source, args.image_size)
    args.mean, args.std = list(args.mean or IMAGENET_MEAN), list(args.std or IMAGENET_STD)
    if len(args.mean) != args.channels or len(args.std) != args.channels or not min(args.std) > 0:
        raise UserError(f"--mean and --std need {args.channels} numbers each, one a channel, and --std positive ones")
    if args.batch_size and args.batch_size % (args.accumulate * processes):
        raise UserError(f"a batch of {args.batch_size} cannot be shared by {processes} processes "
                        f"in {args.accumulate} passes each")
    if args.steps is None and args.batch_size:
        args.steps = max(1, math.ceil(args.epochs * len(source) / args.batch_size))
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.compile is None:
        args.compile = device.type == "cuda"
