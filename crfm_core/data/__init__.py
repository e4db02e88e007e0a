"""Sources, scenes, tiles and splits: from rasters to manifests of tiles."""
