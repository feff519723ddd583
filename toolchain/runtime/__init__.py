"""Bundle -> pictures. Imports numpy, tokenizers, pillow and the engine library; never torch, diffusers or onnx."""
