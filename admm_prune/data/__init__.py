"""Text: sources of documents, tokenization, and batches of sequences."""
