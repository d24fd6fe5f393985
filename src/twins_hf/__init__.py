"""Twins (PCPVT and SVT, arXiv 2104.13840) for semantic segmentation, as a transformers model.

Importing the package registers its classes, so that `AutoConfig`, `AutoModel`, `AutoModelForSemanticSegmentation`,
`AutoImageProcessor` and `pipeline("image-segmentation")` know `model_type` "twins".
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from .configuration_twins import TwinsConfig
from .image_processing_pil_twins import TwinsImageProcessorPil
from .modeling_twins import (
    TwinsBackbone,
    TwinsForImageClassification,
    TwinsForSemanticSegmentation,
    TwinsModel,
    TwinsPreTrainedModel,
)

image_processor_classes = {"pil": TwinsImageProcessorPil}
if is_torchvision_available():
    from .image_processing_twins import TwinsImageProcessor

    image_processor_classes["torchvision"] = TwinsImageProcessor

AutoConfig.register(TwinsConfig.model_type, TwinsConfig)
AutoModel.register(TwinsConfig, TwinsModel)
AutoBackbone.register(TwinsConfig, TwinsBackbone)
AutoModelForImageClassification.register(TwinsConfig, TwinsForImageClassification)
AutoModelForSemanticSegmentation.register(TwinsConfig, TwinsForSemanticSegmentation)
# The list that pipeline("image-segmentation") consults before it logs that it does not know a class.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[TwinsConfig.model_type] = TwinsForSemanticSegmentation.__name__
AutoImageProcessor.register(TwinsConfig, image_processor_classes=image_processor_classes)

__all__ = [
    "TwinsBackbone",
    "TwinsConfig",
    "TwinsForImageClassification",
    "TwinsForSemanticSegmentation",
    "TwinsImageProcessorPil",
    "TwinsModel",
    "TwinsPreTrainedModel",
    *(["TwinsImageProcessor"] if is_torchvision_available() else []),
]
