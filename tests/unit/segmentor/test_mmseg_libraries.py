"""Imports of mmengine and mmsegmentation: without what takes half of their time, and without traces."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from crfm_core.segmentor.mmseg.libraries import replaced_modules


def python(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]


@pytest.mark.parametrize("module", ["training", "critic"])
def test_slow_packages_that_nothing_uses_are_not_imported_along_and_can_be_afterwards(module):
    python(f"""
        import sys
        import crfm_core.segmentor.{module}
        from crfm_core.segmentor.mmseg.networks import build_model
        build_model("unet_tiny", 3)
        assert not {{"transformers", "bitsandbytes", "torch.distributed.optim", "mmcv._ext"}} & set(sys.modules)
        from transformers import SegformerConfig
        assert SegformerConfig().model_type == "segformer"
        import bitsandbytes
        from torch.distributed.optim import ZeroRedundancyOptimizer
    """)


def test_packages_that_were_there_before_stay_as_they_are():
    python("""
        import sys
        import transformers, bitsandbytes
        from transformers.models.segformer import configuration_segformer
        import crfm_core.segmentor.training
        assert sys.modules["transformers"] is transformers and sys.modules["bitsandbytes"] is bitsandbytes
        from transformers import SegformerConfig
        assert SegformerConfig is configuration_segformer.SegformerConfig
    """)


def test_what_stands_in_is_gone_after_an_import_that_fails():
    def attempt():
        with replaced_modules(wave=None):
            import wave  # noqa: F401

    before = sys.modules.pop("wave", None)
    with pytest.raises(ImportError):
        attempt()
    assert "wave" not in sys.modules
    if before:
        sys.modules["wave"] = before
