"""Tiny segmentors of the transformers library, with random weights, and their image processors."""

from __future__ import annotations

from segmentor_tiles import CLASSES


def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, id2label=dict(enumerate(CLASSES))))


def upernet():
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=stages)
    heads = {"hidden_size": 16, "auxiliary_in_channels": 24, "auxiliary_channels": 8}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, **heads, id2label=dict(enumerate(CLASSES))))


def dpt():
    from transformers import DPTConfig, DPTForSemanticSegmentation

    vit = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 64}
    neck = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    return DPTForSemanticSegmentation(DPTConfig(**vit, **neck, is_hybrid=False, id2label=dict(enumerate(CLASSES))))


def processor_of(kind: str, **settings):
    import transformers

    return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
