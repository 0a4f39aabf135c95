"""Text in: sources of documents, tokens, and sequences in batches."""
