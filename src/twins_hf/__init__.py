"""Twins (PCPVT and SVT, arXiv 2104.13840) for semantic segmentation, as a transformers model.

Importing the package registers its classes, so that `AutoConfig`, `AutoModel`, `AutoModelForSemanticSegmentation`,
`AutoImageProcessor` and `pipeline("image-segmentation")` know `model_type` "twins".
"""

from transformers import AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from .configuration_twins import TwinsConfig
from .modeling_twins import TwinsForSemanticSegmentation, TwinsModel, TwinsPreTrainedModel

AutoConfig.register(TwinsConfig.model_type, TwinsConfig)
AutoModel.register(TwinsConfig, TwinsModel)
AutoModelForSemanticSegmentation.register(TwinsConfig, TwinsForSemanticSegmentation)
