"""Georeferenced scenes whose labels lie on another grid, or are polygons: matched by place, and burned onto each scene's grid."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import rasterio
import shapely
from rasterio.enums import Resampling
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds, transform_geom
from rasterio.windows import Window
from rasterio.windows import transform as window_transform

from crfm_core import DataError
from crfm_core.data.globs import files_by_key
from crfm_core.data.labels import LabelMap, require_ids
from crfm_core.data.rasters import create_raster, open_raster, read_bands, strips_of
from crfm_core.data.sources import FoundScene, SceneSource, unmatched
from crfm_core.settings import Dataset, GeotiffSource

VECTORS = (".gpkg", ".geojson", ".json", ".shp", ".fgb", ".gml", ".kml")
#: Marks in the first bytes of files without features that tell GDAL where to read them: in other files, databases, on servers.
POINTERS = (b"<OGRVRTDataSource", b"<OGRWFSDataSource", b"<OGRCSWDataSource", b"gdal_streamed_alg")


class GeotiffScenes(SceneSource):
    """Georeferenced scenes, and labels that lie elsewhere: rasters of another grid, or polygons with an attribute.

    Features: whatever the scenes show.
    Format: rasters with a coordinate system; labels are rasters of any grid, or vector files (GeoPackage, GeoJSON, Shapefile, ...).
    Classes: ids of label rasters, or values of the polygons' attribute, by the dataset's ``label_map``.
    Splits: a glob each, or one glob and the section ``split``, which may cut the ground into blocks.
    Licence: that of the files.
    Citation: that of the files.
    """

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """The scenes that the globs match, without labels. DataError when a glob matches none, or a scene has no CRS."""
        scenes = []
        for split, pattern in (self.settings.splits or {"": self.settings.images}).items():
            images = files_by_key(self.folder, pattern, exclude=self.settings.exclude)
            if not images:
                raise DataError(f"dataset {self.dataset.name}: no file matches {pattern} below {self.folder}; correct the glob or the root")
            for key, image in sorted(images.items()):
                with open_raster(image) as picture:
                    if not picture.crs:
                        raise DataError(
                            f"{image}: has no coordinate system, so no label can be found for it by place; write it into the file "
                            "(gdal_edit.py -a_srs EPSG:...), or use a source of kind folder with labels of the same grid"
                        )
                scenes.append(FoundScene(key, image, None, image.relative_to(self.folder), split, "-".join(key[:-1])))
        return scenes

    def write_labels(self, rows: list[dict], out: Path) -> None:
        """Write a label of training ids for every scene, ``<out>/labels/<scene>.tif`` on the scene's grid, and name it in its row.

        Label files lie over each other in the order of ``source.labels`` and of their names; polygons likewise in the order of the file,
        a pixel belongs to a polygon if its centre does. Ground without a label is ``source.background``. Written in strips, so a scene may
        be larger than memory. Raises DataError for values that ``label_map`` does not have, for features that are no polygons, and for a
        scene without a label on its ground.
        """
        globs = self.settings.labels
        files = [path for pattern in globs for _, path in sorted(files_by_key(self.folder, pattern).items())]
        if not files:
            raise DataError(
                f"dataset {self.dataset.name}: no file matches labels: {', '.join(globs)} below {self.folder}; correct the globs"
            )
        layers = [_Polygons.read(path, self.dataset) if path.suffix.lower() in VECTORS else _Raster(path, self.dataset) for path in files]
        for row in rows:
            row["label"] = out / "labels" / f"{row['scene']}.tif"
            with open_raster(row["image"]) as picture:
                near = [layer for layer in layers if layer.meets(picture)]
                if not near:
                    raise DataError(
                        f"{row['image']}: none of {len(files)} label files lies on its ground; see that both coordinate systems are right, "
                        "or leave the scene out by source.exclude"
                    )
                with create_raster(row["label"], 1, picture.width, picture.height, picture.crs, picture.transform) as target:
                    for window in strips_of(picture):
                        ids = np.full((window.height, window.width), self.settings.background, np.uint8)
                        for layer in near:
                            layer.lay_over(ids, picture, window)
                        target.write(ids, 1, window=window)

    def faults(self) -> list[str]:
        settings = self.settings
        return unmatched(self.dataset, self.folder, [settings.images, *(settings.splits or {}).values(), *settings.labels])


class _Raster:
    """A label raster of any grid."""

    def __init__(self, path: Path, dataset: Dataset) -> None:
        ids = dataset.label_map and {int(key): new for key, new in dataset.label_map.items() if str(key).isdigit()}
        self.path, self.labels = path, LabelMap(ids, len(dataset.classes))
        with open_raster(path) as source:
            require_ids(source)
            if not source.crs:
                raise DataError(f"{path}: has no coordinate system, so no scene can be found for it by place; write it into the file")
            self.crs, self.bounds = source.crs, _bounds(source.transform, source.width, source.height)

    def meets(self, picture: rasterio.DatasetReader) -> bool:
        own = _bounds(picture.transform, picture.width, picture.height)
        return _boxes_meet(transform_bounds(self.crs, picture.crs, *self.bounds), own)

    def lay_over(self, ids: np.ndarray, picture: rasterio.DatasetReader, window: Window) -> None:
        """Write the raster's nearest values over ``ids``, except where it has no data or does not reach."""
        transform = window_transform(window, picture.transform)
        grid = {"crs": picture.crs, "transform": transform, "width": window.width, "height": window.height}
        plain = {"src_nodata": None, "nodata": None}  # nodata may be a class of the label map
        # the tolerance is in pixels; GDAL takes no 0
        with (
            open_raster(self.path) as source,
            WarpedVRT(source, **grid, resampling=Resampling.nearest, tolerance=0.001, add_alpha=True, **plain) as warped,
        ):
            raw, covered = read_bands(warped, 1), read_bands(warped, warped.count) > 0
            if (missing := self.labels.without_label(raw, source)) is not None:
                covered &= ~missing
            ids[covered] = self.labels.ids_of_values(raw[covered], source)


@dataclass(frozen=True)
class _Polygons:
    """The polygons of a vector file with their training ids."""

    crs: str
    shapes: np.ndarray
    ids: np.ndarray

    @classmethod
    def read(cls, path: Path, dataset: Dataset) -> _Polygons:
        import pyogrio
        from pyogrio.errors import DataLayerError, DataSourceError

        source = dataset.source
        assert isinstance(source, GeotiffSource)
        if not source.attribute:
            raise DataError(f"source.attribute: {path} holds features; name the field with their class")
        with path.open("rb") as file:
            head = file.read(4096)
        if any(mark in head for mark in POINTERS):
            raise DataError(f"{path}: has no features but points to other files or servers; give the file that has them")
        pyogrio.set_gdal_config_options({"GML_DOWNLOAD_WFS_SCHEMA": "NO"})  # GML may name a server that GDAL would contact
        try:
            names = [name for name, kind in pyogrio.list_layers(path) if kind is not None]
            layer = source.layer or (names[0] if len(names) == 1 else None)
            if layer not in names:
                raise DataError(f"source.layer: {path} has the layers {', '.join(names) or '(none)'}; name one of them")
            fields = list(pyogrio.read_info(path, layer=layer)["fields"])
            if source.attribute not in fields:
                raise DataError(f"source.attribute: layer {layer} of {path} has no field {source.attribute!r}; it has: {', '.join(fields)}")
            info, _, geometry, columns = pyogrio.raw.read(path, layer=layer, columns=[source.attribute])
        except (DataSourceError, DataLayerError) as error:
            raise DataError(f"{path}: not a readable vector file ({error}); is it complete?") from None
        if not info["crs"]:
            raise DataError(f"{path}: layer {layer} has no coordinate system; write it into the file (ogr2ogr -a_srs EPSG:...)")
        shapes = shapely.from_wkb(geometry, on_invalid="fix")
        if other := Counter(shape.geom_type for shape in shapes if shape is not None and "Polygon" not in shape.geom_type):
            kinds = ", ".join(f"{count} {kind}" for kind, count in other.items())
            raise DataError(f"{path}: layer {layer} holds {kinds}, expected polygons only; buffer or remove the others")
        values = [_text(value) for value in columns[0]]
        known = {str(key): new for key, new in (dataset.label_map or {}).items()}
        if unknown := Counter(value for value in values if value not in known):
            found = ", ".join(f"{value!r} in {count} features" for value, count in unknown.most_common(5))
            raise DataError(
                f"{path}: field {source.attribute} holds {found}; allowed are those of label_map ({', '.join(known)}). "
                "Add them to label_map (255 = ignore) or correct the labels"
            )
        there = np.array([shape is not None and not shape.is_empty for shape in shapes], bool)
        return cls(info["crs"], shapes[there], np.array([known[value] for value in values], np.uint8)[there])

    def meets(self, picture: rasterio.DatasetReader) -> bool:
        return len(self._near(picture, _bounds(picture.transform, picture.width, picture.height))) > 0

    def lay_over(self, ids: np.ndarray, picture: rasterio.DatasetReader, window: Window) -> None:
        """Burn the polygons' ids over ``ids``."""
        transform = window_transform(window, picture.transform)
        near = self._near(picture, _bounds(transform, window.width, window.height))
        if not len(near):
            return
        shapes = transform_geom(self.crs, picture.crs, [shapely.geometry.mapping(self.shapes[i]) for i in near])
        burned = rasterize(
            zip(shapes, self.ids[near].tolist(), strict=True), (window.height, window.width), fill=254, transform=transform, dtype="uint8"
        )
        ids[burned != 254] = burned[burned != 254]

    @cached_property
    def _tree(self) -> shapely.STRtree:
        return shapely.STRtree(self.shapes)

    def _near(self, picture: rasterio.DatasetReader, bounds: tuple) -> np.ndarray:
        """Numbers of the polygons whose boxes meet the ground, in the file's order."""
        return np.sort(self._tree.query(shapely.box(*transform_bounds(picture.crs, self.crs, *bounds))))


def _text(value: object) -> str:
    """An attribute's value as a key of ``label_map``: whole numbers without a fraction, a missing value as null."""
    if value is None or isinstance(value, float) and np.isnan(value):
        return "null"
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    return str(int(value)) if isinstance(value, (float, np.floating)) and float(value).is_integer() else str(value)


def _bounds(transform: Affine, width: int, height: int) -> tuple[float, float, float, float]:
    xs, ys = zip(*(transform @ corner for corner in ((0, 0), (width, 0), (0, height), (width, height))), strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _boxes_meet(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
