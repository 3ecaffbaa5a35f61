"""Text: documents, packing, streams, tokenizers, splits."""
