"""Weight files: mapped, read as safetensors, and derived from a checkpoint."""
