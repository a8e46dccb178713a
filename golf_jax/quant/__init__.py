"""Quantization: weights to integer codes by the rules of a recipe, and back."""

from golf_jax.quant.schemes import QTensor, dequantize, dequantize_all, quantize, without_hessians

__all__ = ["QTensor", "dequantize", "dequantize_all", "quantize", "without_hessians"]
