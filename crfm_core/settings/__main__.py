"""Print what is generated from the settings: ``python -m crfm_core.settings schema`` (configs/schema.json) or ``docs``
(docs/configuration.md)."""

import sys

from crfm_core.settings.documentation import configuration_page
from crfm_core.settings.schema import json_schema

PRINTED = {"schema": json_schema, "docs": configuration_page}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PRINTED:
        sys.exit(f"usage: python -m crfm_core.settings {' | '.join(PRINTED)}")
    print(PRINTED[sys.argv[1]](), end="")
