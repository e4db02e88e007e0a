"""The networks: the generator's transformer, the mask encoding and the noise schedule they share."""
