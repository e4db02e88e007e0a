"""One process of a training in several, as :func:`crfm_core.segmentor.launching.launch_training` starts it."""

import sys

from crfm_core.segmentor.launching import run_process

run_process(*sys.argv[1:])
