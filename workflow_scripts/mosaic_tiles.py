"""Put a scene's tiles back together: a tile manifest in, one raster of their images or labels out."""

from job import job

with job(snakemake):
    from pathlib import Path

    from crfm_core.data.tiling import mosaic
    from crfm_core.layout import Layout

    tiles = Path(snakemake.input.tiles)
    mosaic(tiles, Layout.tiles.root(tiles), snakemake.wildcards.scene, snakemake.wildcards.kind, Path(snakemake.output.raster))
