"""Reading and writing images and label maps: GeoTIFF when there is a georeference, PNG when there is none."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image, PngImagePlugin
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from crfm_core import DataError, ResourceError
from crfm_core.files import atomic_path
from crfm_core.settings import Scale

IGNORE = 255
#: What rasterio raises when GDAL or PROJ cannot do something.
GDAL_FAULTS = (RasterioError, CRSError, CPLE_BaseError)
STRIP = 1024  #: rows of a raster that are read or written at once where it may be larger than memory
#: Pixels that are sampled, of one scene or of the training scenes together; evenly spaced, from an overview if there is one.
SAMPLE = 1 << 21
IGNORED = (64, 68, 74)  #: colour of ignored pixels in pictures; dark, as palettes are light or vivid

#: Formats whose files hold their pixels, by the names of GDAL's drivers. GDAL detects formats by content, and some of the others only
#: point to other files or to servers, which it then reads; of those only VRT is allowed, in files with that suffix.
FORMATS = (
    "GTiff", "PNG", "JPEG", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "JPEGXL", "AVIF", "WEBP", "BMP", "GIF", "BIGGIF", "PNM",
    "HFA", "ENVI", "EHdr", "NITF", "PCIDSK", "AAIGrid", "RST", "SAGA", "PCRaster",
)  # fmt: skip

#: A truncated JPEG or PNG is an error and not grey ground or noise; the cache (bytes) stays small in every process.
GDAL_OPTIONS = {"GDAL_ERROR_ON_LIBJPEG_WARNING": "YES", "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO", "GDAL_CACHEMAX": 128 * 2**20}


@contextlib.contextmanager
def open_raster(path: Path | str, **options: Any) -> Iterator[rasterio.DatasetReader]:
    """Open a raster of :data:`FORMATS`, or a ``.vrt``, with ``options`` of its driver.

    Any error, also while it is read inside the block, is a DataError naming the file.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if not path.stat().st_size:
        raise DataError(f"{path}: is empty (0 bytes); copy or download it again")
    formats = [*FORMATS, "VRT"] if path.suffix.lower() == ".vrt" else list(FORMATS)
    with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings(), _faults_of(path):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with DatasetReader(str(path), driver=formats, **options) as source:
            yield source


@contextlib.contextmanager
def _faults_of(path: Path | str) -> Iterator[None]:
    """Turn what GDAL raises into a DataError that names the raster."""
    try:
        yield
    except GDAL_FAULTS as error:
        raise DataError(f"{path}: not a readable raster ({error.__cause__ or error}); is it complete, and an image?") from error


@contextlib.contextmanager
def create_raster(
    path: Path | str, bands: int, width: int, height: int, crs: Any = None, transform: Any = None, **options: Any
) -> Iterator[rasterio.io.DatasetWriter]:
    """A uint8 raster to write in parts, atomically: a PNG for .png, otherwise a GeoTIFF (tiled, deflate) with its georeference, if any.

    Any error, a full disk too, is a ResourceError naming ``path``.
    """
    path = Path(path)
    profile = {"driver": "PNG", "dtype": "uint8", "count": bands, "width": width, "height": height} | options
    if path.suffix != ".png":
        profile |= {"driver": "GTiff", "compress": "deflate", "tiled": True, "blockxsize": 512, "blockysize": 512, "bigtiff": "if_safer"}
        profile |= {"crs": crs, "transform": transform} if crs else {}
    with atomic_path(path) as temporary, rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            with rasterio.open(temporary, "w", **profile) as target:
                yield target
            with rasterio.open(temporary) as written:  # on a full disk GDAL may end a file early without an error
                for window in strips_of(written):
                    written.read(window=window)
        except GDAL_FAULTS as error:
            raise ResourceError(f"{path}: could not be written whole ({error.__cause__ or error}); free some space on its disk") from None


def strips_of(raster: rasterio.DatasetReader) -> Iterator[Window]:
    """Windows of the raster's width and at most :data:`STRIP` rows, from its top to its bottom."""
    for top in range(0, raster.height, STRIP):
        yield Window(0, top, raster.width, min(STRIP, raster.height - top))


def read_bands(source: rasterio.DatasetReader, bands: int | Sequence[int], window: Window | None = None, **options: Any) -> np.ndarray:
    """``source.read`` with errors that name this raster, where several are open."""
    with _faults_of(name_of(source)):
        return source.read(bands, window=window, **options)


def name_of(source: rasterio.DatasetReader) -> str:
    """The file of an open raster, or of a resampled view of one."""
    return source.src_dataset.name if isinstance(source, WarpedVRT) else source.name


def read_tags(path: Path | str) -> dict[str, str]:
    """The text entries of a raster, as :func:`write_raster` wrote them."""
    with open_raster(path) as source:
        return source.tags()


def read_rgb(path: Path | str, window: Window | None = None) -> np.ndarray:
    """The first three bands (a grey or palette image is expanded) as uint8 [H,W,3]; DataError for any other depth."""
    with open_raster(path) as source:
        return np.ascontiguousarray(rgb_of(source, window))


def read_label(path: Path | str, window: Window | None = None) -> np.ndarray:
    """The class ids of a tile's label as uint8 [H,W], 255 where ignored."""
    with open_raster(path) as source:
        if source.count != 1 or source.dtypes[0] != "uint8":
            raise DataError(f"{name_of(source)}: {source.count} bands of {source.dtypes[0]}, expected one of uint8 with class ids")
        return read_bands(source, 1, window)


def bands_of(source: rasterio.DatasetReader, bands: Sequence[int] | None = None) -> tuple[int, ...]:
    """The bands to show, counted from 1: ``bands``, or the first three, or the first of fewer. DataError when one is missing."""
    chosen = tuple(bands) if bands else (1, 2, 3) if source.count >= 3 else (1,)
    if max(chosen) > source.count:
        raise DataError(f"{name_of(source)}: has {source.count} bands and no band {max(chosen)}; correct tile.bands")
    return chosen


def rgb_of(
    source: rasterio.DatasetReader,
    window: Window | None = None,
    bands: Sequence[int] | None = None,
    limits: tuple[Sequence[float], Sequence[float]] | None = None,
) -> np.ndarray:
    """Pixels of an open raster as uint8 [H,W,3]; one band becomes grey, a palette its colours.

    ``limits`` are the values per band that become 0 and 255; what lies beyond is clipped, NaN becomes 0. Raises DataError for pixels
    that are not uint8 and have no limits.
    """
    chosen = bands_of(source, bands)
    dtype = source.dtypes[chosen[0] - 1]
    if limits is None and dtype != "uint8":
        raise DataError(f"{name_of(source)}: pixels are {dtype}, not uint8; set tile.scale, or scale the scene to 0...255 first")
    pixels = read_bands(source, chosen, window)
    if limits is not None:
        pixels = scaled(pixels, *limits)
    if len(chosen) == 3:
        return np.moveaxis(pixels, 0, -1)
    if limits is None and is_palette(source):
        return palette_of(source)[pixels[0], :3]
    return np.repeat(pixels[0][..., None], 3, axis=2)


def scaled(pixels: np.ndarray, low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """Bands [n,H,W] of any depth as uint8: ``low`` [n] becomes 0, ``high`` [n] 255; a band without contrast, and NaN, become 0."""
    darkest, brightest = (np.asarray(limit, np.float64)[:, None, None] for limit in (low, high))
    span = np.where(brightest > darkest, brightest - darkest, np.inf)
    with np.errstate(invalid="ignore"):
        shares = np.clip((pixels - darkest) / span, 0, 1)
    return np.round(255 * np.nan_to_num(shares)).astype(np.uint8)


def sample_bands(image: Path | str, bands: list[int] | None, count: int = SAMPLE) -> np.ndarray:
    """Valid pixels [n, bands] of a scene, evenly spread, about ``count`` at most. DataError when there is none."""
    with open_raster(image) as source:
        shrink = max(1.0, np.sqrt(source.width * source.height / count))
        shape = max(1, round(source.height / shrink)), max(1, round(source.width / shrink))
        chosen = bands_of(source, bands)
        pixels = read_bands(source, chosen, out_shape=(len(chosen), *shape))
        valid = (source.dataset_mask(out_shape=shape) > 0) & np.isfinite(pixels).all(axis=0)
        if (alpha := alpha_band(source)) is not None:
            valid &= read_bands(source, alpha, out_shape=shape) > 0
    if not valid.any():
        raise DataError(f"{image}: has no valid pixel, all are nodata or not a number; leave the scene out")
    return pixels[:, valid].T


def scene_limits(images: list[Path], training: list[bool], scale: Scale, bands: list[int] | None) -> list[tuple[list, list]]:
    """Per image the values of each band that become 0 and 255.

    With ``over: dataset`` all images get those of the images marked in ``training`` together; no scored image contributes to them.
    """
    if scale.over == "scene":
        return [_percentiles(sample_bands(image, bands), scale) for image in images]
    used = [image for image, marked in zip(images, training, strict=True) if marked]
    limits = _percentiles(np.concatenate([sample_bands(image, bands, SAMPLE // len(used)) for image in used]), scale)
    return [limits for _ in images]


def _percentiles(pixels: np.ndarray, scale: Scale) -> tuple[list, list]:
    low, high = np.percentile(pixels.astype(np.float64), (scale.low, scale.high), axis=0)
    return low.tolist(), high.tolist()


def is_palette(source: rasterio.DatasetReader) -> bool:
    """Whether the first band is indices into a palette."""
    return source.colorinterp[0] is ColorInterp.palette


def palette_of(source: rasterio.DatasetReader) -> np.ndarray:
    """The colours of a palette raster and how opaque they are, uint8 [256,4]."""
    colours = np.zeros((256, 4), np.uint8)
    for value, rgba in source.colormap(1).items():
        colours[value] = rgba
    return colours


def alpha_band(source: rasterio.DatasetReader) -> int | None:
    """The number of the band of opacity, if any; GDAL itself applies it beside one or three bands only."""
    return source.colorinterp.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in source.colorinterp else None


def has_holes(source: rasterio.DatasetReader) -> bool:
    """Whether :func:`invalid_of` can find pixels: by nodata, a mask, an alpha band, or numbers that can be NaN."""
    masked = any(MaskFlags.all_valid not in flags for flags in source.mask_flag_enums)
    return masked or alpha_band(source) is not None or source.dtypes[0].startswith("float")


def invalid_of(source: rasterio.DatasetReader, window: Window | None = None, bands: Sequence[int] | None = None) -> np.ndarray:
    """Pixels without a picture: nodata, masked, transparent, or NaN in a shown band; bool [H,W]."""
    with _faults_of(name_of(source)):
        invalid = source.dataset_mask(window=window) == 0
    if (alpha := alpha_band(source)) is not None:
        invalid |= read_bands(source, alpha, window) == 0
    if source.dtypes[0].startswith("float"):
        invalid |= ~np.isfinite(read_bands(source, bands_of(source, bands), window)).all(axis=0)
    return invalid


def encode_raster(
    suffix: str,
    array: np.ndarray,
    crs: rasterio.CRS | str | None = None,
    transform: Sequence[float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> bytes:
    """The file that :func:`write_raster` writes, as bytes. ``suffix`` is ".tif" or ".png"; the array must fit in memory twice."""
    tags = {name: str(value) for name, value in (tags or {}).items()}
    if suffix == ".png":
        entries = PngImagePlugin.PngInfo()
        for name, value in tags.items():
            entries.add_text(name, value)
        Image.fromarray(array).save(buffer := io.BytesIO(), format="png", pnginfo=entries)
        return buffer.getvalue()
    bands = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    count, height, width = bands.shape
    place = {"crs": crs or None, "transform": Affine(*transform) if transform is not None and len(transform) else None}
    colours = {"photometric": "RGB", "predictor": 2} if count == 3 else {}
    profile = {"count": count, "height": height, "width": width, "dtype": "uint8", "compress": "deflate", "bigtiff": "if_safer"}
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(driver="GTiff", **profile, **place, **colours) as target:
            target.write(bands)
            if tags:
                target.update_tags(**tags)
        return bytes(memory.getbuffer())


def write_raster(
    path: Path | str,
    array: np.ndarray,
    crs: str | None = None,
    transform: Sequence[float] | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write uint8 [H,W] or [H,W,3] atomically: a GeoTIFF (deflate) for .tif, a PNG for .png, ``tags`` as its text entries.

    ``crs`` is WKT (or any text rasterio understands) and ``transform`` six affine numbers; a PNG has room for neither.
    Raises DataError for an array or suffix that cannot be written, ResourceError when the disk is full.
    """
    path, array = Path(path), np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] == 3):
        raise DataError(f"{path}: cannot write {array.dtype} {list(array.shape)}, expected uint8 [H,W] or [H,W,3]")
    if path.suffix == ".png" and crs:
        raise DataError(f"{path}: a PNG cannot hold a coordinate system; write a .tif")
    if path.suffix not in (".tif", ".tiff", ".png"):
        raise DataError(f"{path}: unknown suffix {path.suffix!r}, expected .tif or .png")
    # Encoded in memory and written as bytes, as GDAL reports no error when the disk fills up while it closes a small file.
    content = encode_raster(".png" if path.suffix == ".png" else ".tif", array, crs, transform, tags)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def hash_of_pixels(image: np.ndarray) -> str:
    """Hash of an image uint8 [H,W,3], whatever file it is in, as 64 hex digits."""
    return hashlib.sha256(np.moveaxis(image, -1, 0).tobytes()).hexdigest()  # band by band, as it is read


def paint(label: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class ids [H,W] as colours uint8 [H,W,3]."""
    colours = np.full((256, 3), IGNORED, np.uint8)
    colours[: len(palette)] = palette
    colours[IGNORE] = IGNORED
    return colours[label]
