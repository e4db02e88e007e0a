"""Sources, scenes, tiles and splits: from the user's rasters to manifests of tiles."""
