"""What writes artifacts, one module per stage: everything that such a module imports is in the keys of its stage."""

from toolchain.builder.stages import engine, graph, merged, model, sampler, tokenizer, weights

__all__ = ["engine", "graph", "merged", "model", "sampler", "tokenizer", "weights"]
