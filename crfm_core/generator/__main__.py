"""One process of a training that ``accelerate launch`` runs in several: ``python -m crfm_core.generator JOB``, JOB as JSON."""

import sys

from crfm_core import CrfmError
from crfm_core.generator.training import TrainingJob, train_generator

try:
    train_generator(TrainingJob.model_validate_json(sys.argv[1]))
except CrfmError as error:
    sys.exit(f"error: {error}")
