"""Quantization: weights to integer codes by the rules of a recipe, and back."""

from golf_jax.quant.rules import check_quant, quantize, rules_for, without_hessians
from golf_jax.quant.schemes import QTensor, dequantize, dequantize_all

__all__ = ["QTensor", "check_quant", "dequantize", "dequantize_all", "quantize", "rules_for", "without_hessians"]
