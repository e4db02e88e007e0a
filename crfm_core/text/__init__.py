"""Captions, text encoders and the prompt cache."""
