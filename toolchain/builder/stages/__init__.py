"""What writes artifacts, one module per stage: everything that such a module imports is in the keys of its stage."""

from toolchain.builder.stages import calibration, engine, graph, merged, model, sampler, tokenizer, weights

__all__ = ["calibration", "engine", "graph", "merged", "model", "sampler", "tokenizer", "weights"]
