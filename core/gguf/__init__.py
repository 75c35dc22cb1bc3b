"""GGUF files: the container, its tensors dequantised on read, and the config and tokenizer that it describes."""
