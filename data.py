"""Images and clips in, batches out: the photographs that ship with scikit-image, folders of images or videos, CIFAR-10.

A *source* is a dataset of (pixels, label): a PIL image; floats (C, H, W) in [0, 1] where there are not 1 or 3 channels;
clips of a video, bytes (segments, T, C, H, W); or a series of images of a place, floats (dates, C, H, W), and as a
third item its stamps (dates, 3): years since 2002, months and hours from 0. `Samples` adds the augmentation,
`step_batches` decides which samples make up which step. Every draw of a sample has its own seed, so what a step sees
depends on (seed, step) alone: not on the number of workers or processes, nor on whether the run was interrupted. A
batch on the device is normalised: images (B, C, H, W), series (B, C, dates, H, W), and clips always (B, views,
segments, C, T, H, W), where segments are parts of the time of a video and views parts of its frames.
"""
import atexit
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import CIFAR10
from torchvision.transforms import InterpolationMode, v2

from common import (AUGMENTATION_SEED, BUILT_IN_SEED, EPOCH_SEED, UserError, derive_seed, height_and_width,
                    precision_of, read_checkpoint, sum_over_processes)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy", ".npz", ".avif",
               ".heic", ".heif")  # what Pillow cannot read on a machine is skipped and counted
VIDEO_FILES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")

# ------------------------------------------------------------------------------------------------------------ sources


class Photographs(Dataset):
    """Squares of 96 to 160 pixels of the photographs that ship with scikit-image; the label says which photograph.

    Training crops come from the first 60 % of a photograph along its longer side and validation crops from the rest, so
    that recognising a photograph is not remembering a crop.
    """
    classes = ["astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
               "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle"]

    def __init__(self, train, channels=3, length=6000):
        import skimage.data
        self.regions, self.length = [], length
        for name in Photographs.classes:
            image = getattr(skimage.data, name)()
            image = image[0] if isinstance(image, tuple) else image  # the stereo pair: the left one
            axis = int(image.shape[1] >= image.shape[0])  # the longer side
            parts = np.split(image, [int(0.6 * image.shape[axis])], axis)
            self.regions.append(Image.fromarray(parts[0 if train else 1]).convert("RGB" if channels == 3 else "L"))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index * len(self.classes) // self.length  # sorted by class, as a folder is
        region = self.regions[label]
        width, height = region.size
        draw = torch.Generator().manual_seed(derive_seed(0, BUILT_IN_SEED, index))  # the same at every draw
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
        stamps = np.stack([draw.integers(end, size=self.dates) for end in (16, 12, 24)], axis=1)
        light = 1 - 0.2 * np.cos(stamps[:, 1:] * (2 * math.pi / 12, math.pi / 12)).sum(axis=1)  # (dates,)
        light = light * draw.uniform(0.8, 1.2, self.dates)
        series = light[:, None, None, None] * bands + draw.normal(0, 0.03, (self.dates, *bands.shape))
        pixels = torch.from_numpy(series.astype(np.float32)).permute(0, 3, 1, 2)  # (dates, C, H, W)
        return (pixels[0], label) if self.dates == 1 else (pixels, label, torch.from_numpy(stamps).float())


class Clips(Photographs):
    """Clips of a virtual camera that moves over collages: pans in 8 directions, zooms, rolls. No download.

    A clip is (1, T, C, 64, 64), its label the motion. Each clip has a collage of its own, so that what is hidden cannot
    be told from knowing the picture, only from what is seen and from how that moves. The photographs are the regions of
    `Photographs`, smaller. With twice the stride the camera goes twice as far.
    """
    classes = [f"pan {direction}" for direction in ("right", "down right", "down", "down left", "left", "up left", "up",
                                                    "up right")] + ["zoom in", "zoom out", "roll left", "roll right"]
    side = 64  # pixels of a frame

    def __init__(self, train, frames, channels=3, length=6000, stride=4):
        super().__init__(train, channels, length)
        self.pictures = [x.resize((int(scale * x.width), int(scale * x.height)), Image.BILINEAR)
                         for x in self.regions for scale in (0.35, 0.5, 0.7)]
        y, x = np.mgrid[-1:1:128j, -1:1:128j]
        self.disc = Image.fromarray(x ** 2 + y ** 2 < 1)
        self.train, self.frames, self.speed = train, frames, stride / 4

    def collage(self, draw, side=160, pieces=24):
        """A scene of side x side pixels: a part of a photograph, and squares and discs of others laid over it."""
        def part(size):  # a square of any photograph, turned or mirrored, enlarged only if the photograph is too small
            picture = draw.choice(self.pictures)
            cut = min(size, *picture.size)
            left, top = draw.randint(0, picture.width - cut), draw.randint(0, picture.height - cut)
            image = picture.crop((left, top, left + cut, top + cut)).transpose(draw.choice(list(Image.Transpose)))
            return image if cut == size else image.resize((size, size), Image.BILINEAR)

        scene = part(side)
        for _ in range(pieces):
            size = draw.randint(20, 70)
            corner = draw.randrange(-size, side), draw.randrange(-size, side)  # the edges of the scene may cut it
            scene.paste(part(size), corner, self.disc.resize((size, size)) if draw.random() < 0.5 else None)
        return scene

    def __getitem__(self, index):
        draw = random.Random(derive_seed(0, BUILT_IN_SEED, index, int(self.train)))  # the same at every draw
        scene = self.collage(draw)
        motion, strength = draw.randrange(len(self.classes)), draw.uniform(0.5, 1)
        time = self.speed * strength * np.linspace(-0.5, 0.5, self.frames)
        x, y, zoom, angle = np.zeros((4, self.frames))  # the camera: x and y in sides of the picture, angle in radians
        if motion < 8:
            x, y = 0.6 * time * np.cos(motion * math.pi / 4), 0.6 * time * np.sin(motion * math.pi / 4)
        elif motion < 10:
            zoom = 0.7 * time * (-1 if motion == 8 else 1)  # a smaller window shows things larger
        else:
            angle = 0.8 * time * (1 if motion == 10 else -1)
        half = np.exp(zoom) * (abs(np.cos(angle)) + abs(np.sin(angle))) / 2
        reach = [(abs(x) + half).max(), (abs(y) + half).max()]  # from the middle, sides: the camera stays in the scene
        side = min(draw.uniform(48, 72), scene.width / (2 * max(reach)))
        middle = [side * r + draw.random() * (scene.width - 2 * side * r) for r in reach]

        film = Image.new(scene.mode, (self.side, self.frames * self.side))  # the frames, one below the other
        for t in range(self.frames):  # PIL asks where in the scene each pixel of the frame comes from
            step = side / self.side * math.exp(zoom[t])
            cos, sin = step * math.cos(angle[t]), step * math.sin(angle[t])
            corner = [middle[0] + side * x[t] - (cos - sin) * self.side / 2,
                      middle[1] + side * y[t] - (cos + sin) * self.side / 2]
            where = (cos, -sin, corner[0], sin, cos, corner[1])
            frame = scene.transform((self.side, self.side), Image.AFFINE, where, Image.BILINEAR)
            film.paste(frame, (0, t * self.side))
        pixels = torch.from_numpy(np.array(film).reshape(self.frames, self.side, self.side, -1))
        return pixels.permute(0, 3, 1, 2)[None], motion


class Files(Dataset):
    """Files with labels, [(path, label)]: images, or with frames > 1 videos and folders of frames (see `read_clips`),
    or with dates > 1 folders of images of a place (see `read_series`). Raises what the readers raise.

    segments: so many clips evenly over each video, and dates evenly over all; None: one clip, and dates, at random.
    """

    def __init__(self, found, channels=3, frames=1, stride=1, dates=1):
        self.channels, self.frames, self.stride, self.dates = channels, frames, stride, dates
        self.segments = None
        # Arrays and not lists: workers share their memory, where each would end up with a copy of a list's objects.
        self.names = np.array([os.fsencode(name) for name, _ in found])
        self.labels = np.array([label for _, label in found])
        self.unreadable = torch.zeros(len(found), dtype=torch.bool).share_memory_()  # one memory for all workers

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        path = os.fsdecode(self.names[index])
        if self.dates > 1:
            pixels, stamps = read_series(path, self.dates, self.channels, not self.segments)
            return pixels, int(self.labels[index]), stamps
        if self.frames > 1:
            return read_clips(path, self.frames, self.stride, self.segments, self.channels), int(self.labels[index])
        return read_image(path, self.channels), int(self.labels[index])

    def skip(self, index, error):
        """Note a file that cannot be read. The first ten are named on stderr, the others only counted."""
        named = int(self.unreadable.sum())
        if self.unreadable[index] or named > 10:
            self.unreadable[index] = True
            return
        self.unreadable[index] = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"\nskipped, since it cannot be read: {os.fsdecode(self.names[index])} ({reason})" if named < 10 else
              "\nmore files cannot be read: from here on they are only counted", file=sys.stderr)


def is_system_name(name):
    """Whether a file or folder is none of the user's data, as .ipynb_checkpoints, ._photo.jpg, @eaDir, __MACOSX."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def image_names(folder):
    """The names of the images in a folder, in the order of the numbers in them."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_FILES) and not is_system_name(name)]
    return sorted(names, key=lambda name: [int(part) if part.isdecimal() else part
                                           for part in re.split(r"(\d+)", name)])


def find_files(path, classes=None, clips=False, series=False):
    """[(path, label)] of all images below a folder, at any depth, or of a list; given class names, with their numbers
    as labels, and below the folders of these names alone.

    With `clips`, of all videos, and of all folders that hold images and no video. With `series`, of all folders that
    hold images. Raises UserError if there are none.
    """
    if Path(path).is_file():
        numbers = {name: number for number, name in enumerate(classes or [])}
        return [(name, numbers.get(label, 0)) for name, label in read_list(path)]
    found, endings = [], () if series else VIDEO_FILES if clips else IMAGE_FILES
    # Links are followed, but each folder is read once: a link may point at a folder above it, or at another class.
    visited = {os.path.realpath(Path(path, folder)) for folder in ("", *(classes or []))}
    for label, folder in enumerate(classes or [""]):
        for where, folders, names in os.walk(Path(path, folder), followlinks=True):
            names = [name for name in names if not is_system_name(name)]
            files = [os.path.join(where, name) for name in names if name.lower().endswith(endings)]
            if (clips or series) and not files and any(name.lower().endswith(IMAGE_FILES) for name in names):
                files = [where]
            found += [(name, label) for name in files]
            targets = {name: os.path.realpath(os.path.join(where, name)) for name in folders}
            folders[:] = [name for name in folders if targets[name] not in visited and not is_system_name(name)]
            visited.update(targets.values())
    if not found:
        wanted = "folder of images" if series else "video and no folder of frames" if clips else "image"
        raise UserError(f"there is no {wanted} below {path}")
    return sorted(found)


def read_list(path):
    """[(path, label or None)] of a text file of `path label` lines, or of paths alone, relative to its own folder.

    Raises UserError for a line that names no image, video or folder (a header, a comment, another separator), and for
    labels that are numbers in some lines only.
    """
    try:
        if os.path.getsize(path) > 2 ** 30:
            raise ValueError("too large for a list")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except ValueError:  # of which a UnicodeDecodeError is one
        raise UserError(f"{path} is neither a folder nor a list of paths") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise UserError(f"{path} is empty")
    pairs = [line.rsplit(maxsplit=1) for _, line in numbered]
    if any(len(pair) < 2 or pair[1].lower().endswith(IMAGE_FILES + VIDEO_FILES) for pair in pairs):
        pairs = [(line, None) for _, line in numbered]
    folder = Path(path).parent
    for (number, line), (name, _) in zip(numbered, pairs):
        if not name.lower().endswith(IMAGE_FILES + VIDEO_FILES) and not os.path.isdir(folder / name):
            raise UserError(f"line {number} of {path} names no image, video or folder: {line[:80]}")
    labels = {label for _, label in pairs} - {None}
    numbers = {label for label in labels if label.isdecimal()}
    if numbers and numbers != labels:
        raise UserError(f"{path} has the label {min(labels - numbers)} among labels that are numbers, such as "
                        f"{min(numbers)}")
    return [(str(folder / name), label) for name, label in pairs]


def class_names(path):
    """The names of the folders in a folder, or the labels of a list, numbers in their order; [] if there are none."""
    if path.is_dir():
        return sorted(p.name for p in path.iterdir() if p.is_dir() and not is_system_name(p.name))
    labels = {label for _, label in read_list(path)} - {None}
    return sorted(labels, key=lambda label: (int(label) if label.isdecimal() else -1, label))


def read_image(path, channels=3):
    """A PIL image (RGB, or grey for 1 channel), or floats (C, H, W) of 16-bit files and any other number of channels.

    uint8 and uint16 are scaled to [0, 1]; other numbers, whose range is not known, are taken as they are. Raises
    ValueError for other channels than asked for, for sizes that could be a decompression bomb, and for values that are
    not finite.
    """
    suffix, array = Path(path).suffix.lower(), None
    if suffix in (".npy", ".npz"):  # (H, W), (H, W, C) or (C, H, W); mapped: no larger than the file
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".npz":
            if array.zip.infolist()[0].file_size > 16 * Image.MAX_IMAGE_PIXELS:
                raise ValueError("it claims a size that could be a decompression bomb")
            array = array[array.files[0]]
    elif suffix in (".tif", ".tiff"):
        array = read_tiff(path, channels)
    if array is None:
        image = Image.open(path)
        if channels in (1, 3) and not image.mode.startswith(("I", "F")):
            return image.convert("RGB" if channels == 3 else "L")
        array = np.asarray(image)
        array = array.astype(np.uint16) if image.mode == "I" and array.min() >= 0 and array.max() < 2 ** 16 else array
    if array.ndim == 3 and array.shape[0] == channels != array.shape[2]:  # channels first, or a page for each
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] == 1 and channels == 3:  # grey
        array = array.repeat(3, axis=-1)
    if array.ndim != 3 or array.shape[2] != channels or array.size == 0:
        raise ValueError(f"it has the shape {array.shape}, not {channels} channels")
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise ValueError("it has values that are not finite numbers")
    scale = {("u", 1): 255, ("u", 2): 65535}.get((array.dtype.kind, array.dtype.itemsize), 1)
    return torch.from_numpy((array / scale).astype(np.float32)).permute(2, 0, 1)


def read_tiff(path, channels):
    """The array in a TIFF file, in any layout; or None for a plain photograph of 8 bits, which Pillow reads."""
    from tifffile import TiffFile  # scikit-image's reader
    with TiffFile(path) as file:
        page = file.pages.first
        plain_grey_or_colour = page.photometric != 1 or page.samplesperpixel == 1  # 1: grey, or bands
        if (channels in (1, 3) and len(file.pages) == 1 and page.bitspersample <= 8 and page.sampleformat == 1
                and page.samplesperpixel <= 4 and plain_grey_or_colour):
            return None
        if math.prod(file.series[0].shape) > 16 * Image.MAX_IMAGE_PIXELS:
            raise ValueError("it claims a size that could be a decompression bomb")
        return file.asarray()


def read_series(folder, dates, channels, chosen_at_random):
    """(images (dates, C, H, W), stamps (dates, 3)) of a folder of images of one place, whose names tell the time.

    A name has year, month, day and, if known, hour, such as 2016-03-24T10.tif. Of more images, so many are taken, at
    random or evenly. Raises ValueError for names without a date, too few images, or images that differ in size.
    """
    names = sorted(image_names(folder))
    pattern = r"(?<!\d)((?:19|20)\d\d)[-_]?(0[1-9]|1[0-2])[-_]?(?:0[1-9]|[12]\d|3[01])(?:T([01]\d|2[0-3])|(?!\d))"
    times = [re.search(pattern, name) for name in names]
    if not all(times):
        raise ValueError(f"{names[times.index(None)]} has no date in its name, such as 2016-03-24T10")
    if len(names) < dates:
        raise ValueError(f"it has {len(names)} images, fewer than {dates} dates")
    at_random = torch.randperm(len(names))[:dates].sort().values.tolist()
    chosen = at_random if chosen_at_random else evenly(len(names), dates)
    images = [v2.functional.to_image(read_image(os.path.join(folder, names[i]), channels)) for i in chosen]
    if len({image.shape for image in images}) > 1:
        raise ValueError("its images differ in size")
    stamps = [[int(times[i][1]) - 2002, int(times[i][2]) - 1, int(times[i][3] or 0)] for i in chosen]
    images = torch.stack([v2.functional.to_dtype(image, scale=True) for image in images])
    return images, torch.tensor(stamps, dtype=torch.float32)


def read_clips(path, frames, stride, segments=None, channels=3):
    """Clips (segments, T, C, H, W), bytes, of every `stride`-th frame of a video file or of a folder of frames.

    So many, evenly over the video; for None one, which begins at a random time, drawn from torch's generator. A video
    that is too short repeats its last frame. Time goes by the mean frame rate, so that a variable one does not bend the
    motion. Only the frames asked for are read, and those that their compression depends on. Raises UserError where
    torchcodec or FFmpeg is missing.
    """
    if os.path.isdir(path):  # in the order of the numbers in their names; a gap is closed up
        names = image_names(path)
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
    if segments is None:
        starts = torch.randint(latest + 1, (1,))
    else:
        starts = torch.linspace(0, latest, segments).round() if segments > 1 else torch.tensor([latest // 2])
    times = (starts[:, None] + stride * torch.arange(frames)).clamp(max=length - 1).flatten()  # (segments * T,)
    if os.path.isdir(path):
        chosen, places = times.int().unique(return_inverse=True)
        images = [v2.functional.to_image(read_image(os.path.join(path, names[i]), channels)) for i in chosen]
        pixels = together(images)[places]
    else:
        seconds = begin + (times + 0.5) * (end - begin) / length  # the middle of a frame's time on the screen
        pixels = decoder.get_frames_played_at(seconds.tolist()).data
        pixels = v2.functional.rgb_to_grayscale(pixels) if channels == 1 else pixels
    return pixels.unflatten(0, (-1, frames))


def open_sources(data, channels=3, labelled=True, frames=1, stride=1, dates=1, scenes=False, tested=None):
    """(training source, validation source or None, class names or None) for --data: None, "cifar10", a folder, a list.

    A folder is DIR/train/<class>/... with DIR/val/<class>/... or DIR/test/<class>/..., or DIR/train.txt with
    DIR/val.txt or DIR/test.txt; where no labels are needed (labelled=False) it is any folder or list, and DIR/train
    alone is used if there is one. With frames > 1 the samples are clips, with dates > 1 series of images. scenes:
    instead of the built-in photographs, `Scenes`. tested: the checkpoint of a classifier that is only to be tested: the
    classes are those named in it, and no training samples are needed. Raises UserError for all else.
    """
    kind = Scenes if scenes or dates > 1 else Clips if frames > 1 else Photographs
    if channels not in (1, 3) and (frames > 1 or data is None and kind is Photographs):
        raise UserError(f"{'clips' if frames > 1 else 'the built-in photographs'} have 1 or 3 channels, not {channels}"
                        + ("" if data else ": give --data"))
    tested_classes = read_checkpoint(tested).get("classes") if tested else None
    if tested and not tested_classes and os.environ.get("RANK", "0") == "0":
        print(f"{tested} does not name its classes: they are taken to be those of the data, in their order")
    if data is None:
        others = {Scenes: dict(dates=dates), Clips: dict(frames=frames, stride=stride)}.get(kind, {})
        train, val = (kind(split == "train", channels=channels, length=length, **others)
                      for split, length in (("train", 6000), ("val", 1500)))
        check_classes(train.classes, tested_classes, "the built-in data")
        return train, val, train.classes
    if data == "cifar10":
        if channels != 3 or frames > 1 or dates > 1:
            raise UserError("CIFAR-10 has images of 3 channels and no clips")
        try:
            if os.environ.get("RANK", "0") == "0":  # torchvision keeps the files in ./data
                CIFAR10("data", download=True)
            sum_over_processes(torch.zeros(1))  # the others wait
            train, val = (CIFAR10("data", train=train) for train in (True, False))
        except (OSError, RuntimeError) as error:
            raise UserError(f"CIFAR-10 could not be downloaded to ./data: {error}") from None
        check_classes(train.classes, tested_classes, data)
        return train, val, train.classes

    root = Path(data)
    if not root.exists():
        raise UserError(f"there is no file or folder {root}")
    of_files, kinds = (channels, frames, stride, dates), (frames > 1, dates > 1)
    if not labelled and root.is_file() and root.name.lower().endswith(IMAGE_FILES + VIDEO_FILES):  # for `show`
        return Files([(root, 0)], *of_files), None, None
    train = next((path for path in (root / "train.txt", root / "train") if path.exists()), None)
    suffixes = [train.suffix] if train else ["", ".txt"] if tested else []
    val = next((path for suffix in suffixes for name in ("val", "test")
                if (path := root / f"{name}{suffix}").exists()), None)
    if tested and val:
        classes = tested_classes or class_names(train or val)
        check_classes(class_names(val), tested_classes, val, some=True)
        val = Files(find_files(val, classes, *kinds), *of_files)
        val.segments = 1
        return val, val, classes
    train = train or root
    classes, val_classes = (class_names(path) if path else [] for path in (train, val))
    unknown = sorted(set(val_classes) - set(classes))
    if not labelled and (len(classes) < 2 or unknown):  # the folders' names are no labels
        sources = [Files(find_files(path, None, *kinds), *of_files) if path else None for path in (train, val)]
        return *sources, None
    if not classes or not val_classes:
        if labelled:
            needed = "lists train.txt and val.txt (or test.txt), of lines of `path label`" if train.is_file() else \
                "folders train/<class>/ and val/<class>/ (or test/<class>/)"
            raise UserError(f"{root} needs the {needed}")
        return Files(find_files(train, None, *kinds), *of_files), None, None
    if unknown:
        kind, known = ("label", "the training list") if train.is_file() else ("class folder", train)
        raise UserError(f"{val} has the {kind} {unknown[0]}, which {known} lacks")
    if len(classes) < 2:
        raise UserError(f"{train} has one class, {classes[0]}: a classifier needs two at least")
    train, val = (Files(find_files(path, classes, *kinds), *of_files) for path in (train, val))
    val.segments = 1
    return train, val, classes


def check_classes(classes, tested, where, some=False):
    """Raise UserError if a classifier to be tested has other classes; None if it does not name them. some: of them."""
    if tested and not (set(classes) <= set(tested) if some else list(classes) == list(tested)):
        other = next((name for name in classes if name not in tested), "fewer")
        raise UserError(f"the classifier was trained on the classes {', '.join(tested[:5])}, ... ({len(tested)} in "
                        f"all), but {where} has {other}")


# --------------------------------------------------------------------------------------------------------- transforms

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def crop_and_flip(image_size, scale, flip=True, ratio=(3 / 4, 4 / 3), interpolation=BICUBIC):
    """Augmentation of pre-training: random resized crop of an area share in `scale`, flip, alike in all frames."""
    return v2.Compose([v2.RandomResizedCrop(height_and_width(image_size), scale, ratio, interpolation),
                       v2.RandomHorizontalFlip(0.5 if flip else 0.0), v2.PILToTensor()])


def strong_augmentation(args, flip=True, operations=2):
    """Augmentation of fine-tuning: random crop, flip, RandAugment (magnitude 0 to 10), erasing (a probability)."""
    crop, flip, to_tensor = crop_and_flip(args.image_size, (0.08, 1.0), flip).transforms
    # The papers, as timm, count RandAugment's magnitude to 10, torchvision to 30. It is for 1 or 3 channels only.
    operations = [RandAugment(args.mean, operations, round(3 * args.randaugment))] if args.randaugment else []
    return v2.Compose([crop, flip, *(operations if args.channels in (1, 3) else []), to_tensor,
                       *([Erasing(args)] if args.erasing else [])])


class RandAugment(torch.nn.Module):
    """RandAugment that fills with the mean, in the unit of the picture: bytes, or real numbers.

    Where real numbers are not in [0, 1], the range that operations on colours suppose, only the picture's geometry is
    changed: shears, translations, rotations.
    """

    def __init__(self, mean, operations, magnitude):
        super().__init__()
        options = {"num_ops": operations, "magnitude": magnitude, "interpolation": BILINEAR}
        self.of_bytes = v2.RandAugment(fill=[int(255 * value) for value in mean], **options)
        self.of_numbers = v2.RandAugment(fill=list(mean), **options)
        self.of_geometry = v2.RandAugment(fill=list(mean), **options)
        self.of_geometry._AUGMENTATION_SPACE = {
            name: values for name, values in v2.RandAugment._AUGMENTATION_SPACE.items()
            if name.startswith(("Identity", "Shear", "Translate", "Rotate"))}

    def forward(self, image):
        if not torch.is_tensor(image) or image.dtype == torch.uint8:
            return self.of_bytes(image)
        in_range = image.amin() >= 0 and image.amax() <= 1
        return self.of_numbers(image) if in_range else self.of_geometry(image)


class Erasing(v2.RandomErasing):
    """Fills a random rectangle with noise that is normal once the image is normalised."""

    def __init__(self, args):
        super().__init__(args.erasing, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value="random")
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (args.mean, args.std))

    def forward(self, image):
        image = image / 255 if image.dtype == torch.uint8 else image
        return super().forward((image - self.mean) / self.std) * self.std + self.mean


class CentreCrop:
    """The view at test time: the shorter side resized to size / 0.875 (from 256 to 224), and the centre cut out; an
    image of the right size, as in CIFAR-10, is taken as it is. With views > 1, so many squares evenly along the longer
    side, each as large as the shorter side, as a new first dimension.
    """

    def __init__(self, image_size, views=1):
        self.size, self.views = height_and_width(image_size), views

    def __call__(self, image):
        old, new = v2.functional.get_size(image), self.size
        if self.views > 1 or tuple(old) != new:
            factor = max(new[0] / old[0], new[1] / old[1]) / (0.875 if self.views == 1 else 1)
            if self.views == 1 and max(old) > 8 * min(old):  # of a very long image only the middle is enlarged
                old = [min(length, math.ceil(8 * side / factor)) for length, side in zip(old, new)]
                image = v2.functional.center_crop(image, old)
            larger = [max(side, round(factor * length)) for side, length in zip(new, old)]
            image = v2.functional.resize(image, larger, BICUBIC if self.views == 1 else BILINEAR)
        image = v2.PILToTensor()(image)
        if self.views == 1:
            return v2.functional.center_crop(image, new)
        corners = [[(length - side) * view // (self.views - 1) for side, length in zip(new, larger)]
                   for view in range(self.views)]
        return torch.stack([image[..., y:y + new[0], x:x + new[1]] for y, x in corners])


def repeated(pixels, frames):
    """An image (..., C, H, W), repeated in time as a clip (..., 1, T, C, H, W)."""
    return torch.stack([pixels] * frames, dim=-4).unsqueeze(-5)


def mix_up_and_cut_mix(args, classes):
    """Of a batch (pixels, labels (B,)): MixUp or CutMix, each half of the time; labels become (B, classes)."""
    choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in ((v2.MixUp, args.mixup),
                                                                          (v2.CutMix, args.cutmix)) if alpha > 0]

    def mix(pixels, labels):  # as images (B, all else, H, W): mixed alike in all frames
        images, labels = v2.RandomChoice(choices)(pixels.flatten(1, -3), labels)
        return images.view(pixels.shape), labels
    return mix if choices else None


def measure_mean_and_std(source, image_size, images=1000):
    """Mean and standard deviation of each channel over up to `images` images evenly taken from a source.

    Raises UserError for a channel that is the same number everywhere. Warns of a value that is further from all others
    than these are from one another, as a code for missing data is.
    """
    samples, moments, extremes = Samples(source, CentreCrop(image_size)), [], []
    for index in evenly(len(source), images):
        pixels = v2.functional.to_dtype(samples.example(index)[0], torch.float64, scale=True)
        pixels = pixels.movedim(-3 if pixels.ndim == 3 else -4, 0).flatten(1)  # (C, everything else)
        moments.append(torch.stack([pixels.mean(1), pixels.square().mean(1)]))
        with contextlib.suppress(Exception):  # what cannot be read was replaced in `samples`
            raw = source[index][0]  # before it is resized, which blends values
            if torch.is_tensor(raw) and raw.is_floating_point():
                values = [x.unique() for x in raw.movedim(-3, 0).flatten(1)]  # sorted
                extremes.append([torch.cat([x[:2], x[-2:]]) for x in values])
    for channel, values in enumerate(zip(*extremes)):
        values = torch.cat(values).double().unique()  # sorted
        if len(values) < 3:
            continue
        for code, gap, others in ((values[0], values[1] - values[0], values[-1] - values[1]),
                                  (values[-1], values[-1] - values[-2], values[-2] - values[0])):
            if gap > others:
                print(f"warning: in channel {channel} the value {code:.6g} is further from the others than these are "
                      "from one another; if it stands for missing data, replace it, since mean and std suffer from it",
                      file=sys.stderr)
    mean, square = torch.stack(moments).mean(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    constant = (std <= 1e-6 * mean.abs()).nonzero().flatten().tolist()
    if constant:
        raise UserError(f"channel {constant[0]} is {mean[constant[0]]:.4g} in all training images that were measured: "
                        "there is nothing to learn from it, or give --mean and --std")
    # Rounded, so that a run goes on although another machine measures another last digit.
    return [[float(f"{value:.4g}") for value in values.tolist()] for values in (mean, std)]


# ------------------------------------------------------------------------------------------------------------ batches


class Samples(Dataset):
    """A source with its augmentation: (index, position) -> (pixels, label, ...), not normalised: images (C, H, W),
    series (C, dates, H, W), clips (views, segments, C, T, H, W).

    Augmentation and time of a clip are seeded by (seed, position), where position is the place of the draw in the whole
    run. A file that a reader or a transform cannot cope with is skipped and named: the next one takes its place;
    otherwise, as in a test, which must not count a sample twice, that has the label -1. Raises UserError if none can be
    read.
    """

    def __init__(self, source, transform, seed=0, replace_unreadable=True):
        self.source, self.transform, self.seed, self.replace_unreadable = source, transform, seed, replace_unreadable
        self.example(0)

    def __getitem__(self, item):
        first, position = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, AUGMENTATION_SEED, position))
            for index in (i % len(self.source) for i in range(first, first + len(self.source))):
                try:
                    pixels, label, *stamps = self.source[index]
                    pixels = self.transform(pixels)
                    break
                except UserError:
                    raise
                except Exception as error:  # damaged files make decoders and transforms fail in many ways
                    if not isinstance(self.source, Files):
                        raise
                    self.source.skip(index, error)
            else:
                raise UserError(f"none of the files can be read, for instance {os.fsdecode(self.source.names[0])}")
        label = label if self.replace_unreadable or index == first else -1
        if pixels.ndim > 3:  # channels before time
            pixels = pixels.transpose(-4, -3)
        return (pixels[None] if pixels.ndim == 5 else pixels), label, *stamps

    def example(self, index):
        """The sample of this index, the same each time."""
        return self[index, 0]


def evenly(length, count):
    """Up to `count` indices, evenly taken from range(length)."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def rows_of_process(args, part):
    """The rows of the global batch that this process takes in one of its `accumulate` micro-batches, a slice."""
    share = args.batch_size // (args.accumulate * args.processes)
    start = (part * args.processes + args.rank) * share
    return slice(start, start + share)


def step_batches(length, args, first_step):
    """The (index, position) pairs of each micro-batch of each step from `first_step` on, for this process.

    Position p of the run is in epoch p // length. An epoch is a permutation seeded by (seed, epoch); the last batch of
    an epoch is filled from the next one.
    """
    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return np.random.default_rng(derive_seed(args.seed, EPOCH_SEED, epoch)).permutation(length)

    for step in range(first_step, args.steps):
        for part in range(args.accumulate):
            rows = rows_of_process(args, part)
            positions = range(step * args.batch_size + rows.start, step * args.batch_size + rows.stop)
            yield [(int(order(p // length)[p % length]), p) for p in positions]


def ignore_signals(worker):
    """For a worker: Ctrl-C and SIGTERM often go to all processes of a run, and the one that it serves needs it until
    the step is saved. A second SIGTERM ends the worker: the loader sends one if it does not end by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@atexit.register
def end_workers():
    """End the workers of a loader that an error has kept: Python sends each one SIGTERM, which it only notes, and then
    waits for it for ever.
    """
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own raises an error when a worker ends
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def together(images):
    """A list of images or clips -> (B, ...). Bytes stay bytes, unless there are floats in [0, 1] among them."""
    if len({x.dtype for x in images}) > 1:
        images = [x / 255 if x.dtype == torch.uint8 else x for x in images]
    return default_collate(images)


def collate(samples):
    """A list of samples -> a batch (pixels, labels, ...)."""
    pixels, *others = map(list, zip(*samples))
    return [together(pixels), *map(default_collate, others)]


CHUNK = 2 ** 26  # bytes, about: of the pixels that a worker hands over at once


@functools.cache  # one for all loaders, since the allocator keeps what it has freed for the stream that had it
def stream_of_copies(device):
    """A CUDA stream beside that of the step which is under way; None on other devices."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def loader(samples, batches, args, device, workers):
    """Batches of samples, given as lists of (index, position), on the device or on their way to it, and normalised: the
    only place where that is done.

    Workers make chunks of a batch, of one sample at least, so that the shared memory which they need does not go by the
    size of a batch: two chunks each are ready or on their way.
    """
    largest, mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (255.0, args.mean, args.std))
    size = max(1, CHUNK // (4 * samples.example(0)[0].numel()))  # samples of a chunk, as floats
    batches, to_join = itertools.tee(batches)
    chunks = (batch[k:k + size] for batch in batches for k in range(0, len(batch), size))
    # Not a generator: the workers start, and torch draws their seed, here and not at the first batch.
    loaded = iter(DataLoader(
        samples, batch_sampler=chunks, num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals))

    copies = stream_of_copies(device)

    def to_device(chunk):
        with torch.cuda.stream(copies) if copies else contextlib.nullcontext():
            pixels, *rest = chunk = [x.to(device, non_blocking=True) for x in chunk]
        if copies:
            torch.cuda.current_stream().wait_stream(copies)
            for x in chunk:  # whose memory is taken again only when the step has used it
                x.record_stream(torch.cuda.current_stream())
        is_bytes = pixels.dtype == torch.uint8
        pixels = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if is_bytes:  # by a tensor, since CUDA multiplies by 1 / 255 where it is a number, and HOG sees the last bit
            pixels.div_(largest)
        shape = (-1, 1, 1) if pixels.ndim == 4 else (-1, 1, 1, 1)  # of time too
        return pixels.sub_(mean.view(shape)).div_(std.view(shape)), *rest

    def join(batch):
        parts = [to_device(next(loaded)) for _ in range(0, len(batch), size)]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts)))
    return map(join, to_join)


def examples(samples, indices, args, device):
    """A batch of these samples."""
    return next(loader(samples, [[(index, 0) for index in indices]], args, device, workers=0))


def one_clip(pixels):
    """Of each video its only clip, (B, 1, 1, C, T, H, W) -> (B, C, T, H, W); images are taken as they are."""
    return pixels.flatten(0, 2) if pixels.ndim == 7 else pixels


def training_loader(samples, args, device, first_step):
    """Batches of this process for the steps from `first_step` to `args.steps`, `args.accumulate` of them a step."""
    if args.benchmark:  # the same random numbers at every step
        size = args.batch_size // (args.accumulate * args.processes)
        pixels, *rest = default_collate([samples.example(0)] * size)
        return itertools.repeat((torch.randn(pixels.shape, device=device), *(x.to(device) for x in rest)))
    return loader(samples, step_batches(len(samples.source), args, first_step), args, device, args.workers)


def test_loader(samples, args, device, limit=None):
    """Each sample once, in order, every process its own; with `limit` only so many, evenly taken."""
    planes = math.prod(samples.example(0)[0].shape[:-2])  # 3 of an image, more of a clip
    size = max(1, 384 // planes)
    chosen = evenly(len(samples.source), limit or len(samples.source))
    own = chosen[args.rank::args.processes] or (chosen[:1] if limit else [])  # for `gather`
    batches = [[(index, 0) for index in own[k:k + size]] for k in range(0, len(own), size)]
    return loader(samples, batches, args, device, args.workers)


# ------------------------------------------------------------------------------------------- what features are worth


@torch.no_grad()
def features(encoders, samples, args, device, limit):
    """([features (N, K) of each encoder], labels (N,)) of up to `limit` samples, evenly taken, that can be read.

    An encoder is a function of a batch, (pixels, ...) -> (B, K); clips come as (B, C, T, H, W). The processes share the
    work, and all get all the features.
    """
    parts = []
    for pixels, labels, *stamps in test_loader(samples, args, device, limit):
        pixels = one_clip(pixels)
        with precision_of(args)[0]:
            parts.append([*(encode(pixels, *stamps).float() for encode in encoders), labels.cpu()])
    *x, y = (gather(torch.cat(part), min(limit, len(samples.source)), args) for part in zip(*parts))
    return [part[y >= 0] for part in x], y[y >= 0].to(x[0].device)


def gather(rows, count, args):
    """Rows 0 to `count` of a tensor of which this process has every `processes`-th, from its rank on.

    Where there are fewer rows than processes, the last ones have a row that does not count, for its shape.
    """
    everywhere = rows.new_zeros(count, *rows.shape[1:])
    own = everywhere[args.rank::args.processes]
    own.copy_(rows[:len(own)])
    everywhere = sum_over_processes(everywhere)
    return everywhere.cpu() if rows.device.type == "mps" else everywhere  # which has no float64


def nearest_neighbours(x, labels, neighbours=10):
    """Accuracy in percent when each sample takes the commonest label of its nearest others. x (N, D), labels (N,)."""
    x = F.normalize(x - x.mean(dim=0), dim=1)
    similarity = (x @ x.T).fill_diagonal_(-math.inf)
    votes = F.one_hot(labels[similarity.topk(min(neighbours, len(x) - 1)).indices]).sum(dim=1)
    return 100 * (votes.argmax(dim=1) == labels).double().mean().item()


def spread_and_rank(x):
    """How far a batch of features (N, D) is from a collapse: (spread, effective rank).

    The spread is the standard deviation across the samples relative to the root mean square of the features: 0 if all
    samples have the same features, 1 if their mean is zero, whatever the scale.
    The effective rank is the exponential of the entropy of the singular values' shares (RankMe, arXiv 2210.02885), here
    of the centred features: about the number of directions that are in use.
    """
    scale = x.square().mean().sqrt().clamp(min=1e-12)
    x = x - x.mean(dim=0)
    share = torch.linalg.svdvals(x)
    share = share / share.sum().clamp(min=1e-12)
    return (x.square().mean().sqrt() / scale).item(), torch.exp(-torch.xlogy(share, share).sum()).item()


def watch(encoder, train, held_out, args, device, labelled):
    """For the log, what features of held-out samples are worth: spread, rank, and where there are labels the accuracy
    of nearest neighbours. And the score by which best.pt is chosen, from *training* samples alone: that accuracy
    (`score_knn`), or where there are no labels the rank (`score_rank`).
    """
    looks = []
    for samples in (held_out, train):
        (x,), labels = features([encoder], samples, args, device, args.probe_samples)
        if len(x) < 2 or not x.isfinite().all():
            return {}  # nothing to compare; or the next loss is not finite either, and `Run.log` sees to that
        look = dict(zip(("spread", "rank"), spread_and_rank(x)))
        looks.append(look | {"knn": nearest_neighbours(x, labels)} if labelled else look)
    found, of_training = looks
    score = "knn" if labelled else "rank"
    return found | {f"score_{score}": of_training[score]}


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


def print_probe(encoders, train, val, args, device, train_limit=3000, limit=3000):
    """Print the accuracy of ridge regression on frozen features. encoders: {"after": a function as in `features`}."""
    x, y = features(encoders.values(), train, args, device, train_limit)
    x_val, y_val = features(encoders.values(), val, args, device, limit)
    found = [ridge_probe(one, y, one_val, y_val) for one, one_val in zip(x, x_val)]
    if args.rank == 0:
        print(f"probe of the frozen encoder on validation samples: chance {100 / len(set(y.tolist())):.1f} %, "
              + ", ".join(f"{accuracy:.1f} % {when}" for accuracy, when in zip(found, encoders)))


def report_unreadable(args, *sources):
    """Say how many files of each source all processes together could not read so far."""
    for source in sources:
        if isinstance(source, Files):
            bad = int((sum_over_processes(source.unreadable.int()) > 0).sum())
            if args.rank == 0 and bad:
                print(f"{bad} of {len(source)} files could not be read and were skipped", file=sys.stderr)


def in_unit_range(source):
    """Whether some images of a source are bytes or lie in [0, 1], so that ImageNet's mean and std suit them."""
    if not isinstance(source, Files):
        return True
    samples = Samples(source, v2.PILToTensor())
    pixels = [samples.example(index)[0] for index in evenly(len(source), 4)]
    return all(not x.is_floating_point() or (x.amin() >= 0 and x.amax() <= 1) for x in pixels)


def contents(source, classes=None):
    """What a source holds, in words: "12,345 videos in 10 classes"."""
    names = getattr(source, "names", None)
    number, kinds = len(source), {}
    if names is None:
        kinds["built-in clips" if isinstance(source, Clips) else "images"] = number
    elif source.dates > 1:
        kinds["series of images"] = number
    elif source.frames > 1:
        videos = sum(os.fsdecode(name).lower().endswith(VIDEO_FILES) for name in names)
        kinds = {"videos": videos, "folders of frames": number - videos}
    else:
        kinds["images"] = number
    words = " and ".join(f"{count:,} {kind}" for kind, count in kinds.items() if count)
    return words + (f" in {len(classes)} classes" if classes else "")


def settle(args, source, val=None, classes=None):
    """Fill in what depends on the data, mean, std and steps, check what does, and say what was found."""
    if bool(args.mean) != bool(args.std):
        raise UserError("give both --mean and --std, or neither")
    if args.measure or not args.mean and (args.channels != 3 or not in_unit_range(source)):
        args.mean, args.std = measure_mean_and_std(source, args.image_size)
    args.mean, args.std = list(args.mean or IMAGENET_MEAN), list(args.std or IMAGENET_STD)
    if len(args.mean) != args.channels or len(args.std) != args.channels or not min(args.std) > 0:
        raise UserError(f"--mean and --std need {args.channels} numbers each, one a channel, and --std positive ones")
    if args.task == "show":
        return
    if args.batch_size % (args.accumulate * args.processes):
        raise UserError(f"a batch of {args.batch_size} cannot be shared by {args.processes} processes "
                        f"in {args.accumulate} micro-batches each")
    args.steps_per_epoch = max(1, len(source) // args.batch_size)
    if args.steps is None:
        args.steps = max(1, math.ceil(args.epochs * len(source) / args.batch_size))
    if args.rank == 0 and not args.benchmark:  # what was found shows many a mistake at once
        words = f"{contents(source, classes)} for training, " + (f"{len(val):,} for validation" if val else
                                                                 "none for validation")
        passes = args.steps * args.batch_size / len(source)
        words += f"; {args.steps:,} steps of {args.batch_size:,} are {passes:,.3g} passes over the data"
        print(f"{contents(val, classes)} for validation" if getattr(args, "eval_only", False) else words)

