"""Print the JSON schema: ``python -m crfm_core.settings schema > configs/schema.json``."""

from crfm_core.settings import json_schema

print(json_schema(), end="")
