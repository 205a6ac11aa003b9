"""A quantiser as transformers has them, made of torch alone: weights of linear layers to whole eighths."""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "eighths-for-tests"


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return (8 * weight).round() / 8


@register_quantization_config(METHOD)
class Eighths(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        super().__init__(quant_method=METHOD)


class _Round(ConversionOps):
    def __init__(self, quantizer):
        pass

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        ((_, value),) = input_dict.items()
        module, name = get_module_from_name(model, full_layer_name)
        assert isinstance(module, nn.Linear) and name == "weight"
        return {full_layer_name: rounded(value[0] if isinstance(value, list) else value)}


@register_quantizer(METHOD)
class EighthsQuantizer(HfQuantizer):
    requires_calibration = False

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, nn.Linear) and name == "weight" and ".terms." in param_name

    def get_quantize_ops(self):
        return _Round(self)

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    def is_serializable(self, **kwargs):
        return True

    is_trainable = False
